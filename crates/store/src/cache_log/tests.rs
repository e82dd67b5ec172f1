#![allow(clippy::unwrap_used)]
use std::collections::{BTreeMap, BTreeSet};

use endio_state_machine::writeback::sessions::{Decision, SessionId};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Millis};
use proptest::prelude::*;

use super::sim::SimDisk;
use super::*;

pub(super) const VOLUME: VolumeId = VolumeId(7);

pub(super) fn options() -> CacheLogOptions {
    CacheLogOptions { segment_bytes: 64 << 10, max_bytes: 1 << 20, sessions_max: 16 }
}

pub(super) fn open(disk: &SimDisk) -> (CacheLog, Replay) {
    CacheLog::open_on(Box::new(disk.clone()), options()).unwrap()
}

pub(super) fn record(start: u64, len: u64, sequence: u64) -> WriteRecord {
    let session = SessionId([1; 16]);
    WriteRecord {
        volume: VOLUME,
        generation: Generation(3),
        blocks: LblkRange::new(start, len),
        end_bytes: (start + len) * BLOCK_BYTES,
        request: (sequence > 0).then_some(RequestKey { session, sequence }),
        result: len,
    }
}

pub(super) fn write(
    log: &CacheLog,
    start: u64,
    len: u64,
    sequence: u64,
) -> Result<Lsn, CacheLogError> {
    let data = vec![(start + len + sequence) as u8; BLOCK_SIZE];
    log.append_write(&record(start, len, sequence), &vec![&data[..]; len as usize])
}

pub(super) fn clean(log: &CacheLog, start: u64, len: u64, up_to: Lsn) -> Lsn {
    let run = CleanRun { range: LblkRange::new(start, len), up_to };
    log.append_clean(VOLUME, &[run]).unwrap()
}

/// Newest live record of each block.
pub(super) fn blocks(replay: &mut Replay) -> BTreeMap<u64, Lsn> {
    blocks_and_joints(replay).0
}

/// Newest live record of each block, and what unconverted records held together: pairs of neighbours, by the
/// first of them.
fn blocks_and_joints(replay: &mut Replay) -> (BTreeMap<u64, Lsn>, BTreeSet<(Lsn, u64)>) {
    let mut found = BTreeMap::new();
    let mut joints = BTreeSet::new();
    let mut last = Lsn(0);
    while let Some(one) = replay.next_write().unwrap() {
        for range in &one.unconverted {
            joints.extend((range.start.0..range.end() - 1).map(|lblk| (one.lsn, lblk)));
        }
        assert!(one.lsn > last, "in order");
        last = one.lsn;
        for range in &one.live {
            let data = one.data(*range).unwrap();
            assert_eq!(data.len() as u64, range.len * BLOCK_BYTES);
            let request = one.write.request.map_or(0, |key| key.sequence);
            let byte = (one.write.blocks.end() + request) as u8;
            assert!(data.iter().all(|b| *b == byte), "another payload");
            for lblk in range.start.0..range.end() {
                assert_eq!(found.insert(lblk, one.lsn), None, "a block twice");
            }
        }
    }
    (found, joints)
}

#[test]
fn everything_appended_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let (log, mut replay) = CacheLog::open(dir.path(), options()).unwrap();
    assert!(replay.next_write().unwrap().is_none() && !replay.power_lost());
    let twice = CacheLog::open(dir.path(), options());
    assert!(matches!(twice, Err(CacheLogError::InUse(_))));
    log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
    let first = write(&log, 0, 4, 1).unwrap();
    let second = write(&log, 2, 1, 2).unwrap();
    for _ in 0..30 {
        write(&log, 50, 3, 0).unwrap();
    }
    clean(&log, 0, 1, first);
    let key = RequestKey { session: SessionId([1; 16]), sequence: 3 };
    log.append_done(key, 77).unwrap();
    let begun = RequestKey { session: SessionId([21; 16]), sequence: 1 };
    log.append_session(begun.session).unwrap();
    let strange = RequestKey { session: SessionId([22; 16]), sequence: 3 };
    log.append_done(strange, 79).unwrap();
    log.append_done(RequestKey { sequence: 3, ..begun }, 78).unwrap();
    let last = log.last_lsn();
    drop(log);
    let (log, mut replay) = CacheLog::open(dir.path(), options()).unwrap();
    assert!(!replay.power_lost());
    assert_eq!((replay.last_lsn(), replay.torn_bytes()), (last, 0));
    let open = OpenVolume { volume: VOLUME, name: "vol".into(), generation: Generation(3) };
    assert_eq!(replay.open_volumes(), [open]);
    let mut table = SessionTable::new(SessionLimits::default());
    table.restore(replay.sessions().clone(), Millis(0));
    assert_eq!(table.begin(key, true, Millis(0)), Decision::Duplicate(Some(77)));
    let overtaken = RequestKey { sequence: 2, ..strange };
    assert_eq!(table.begin(overtaken, true, Millis(0)), Decision::TooOld);
    let overtaken = RequestKey { sequence: 2, ..begun };
    assert_eq!(table.begin(overtaken, true, Millis(0)), Decision::New);
    assert_eq!(replay.remaining_blocks(), 6);
    let found = blocks(&mut replay);
    assert_eq!((found.get(&0), found[&1], found[&2], found[&3]), (None, first, second, first));
    assert!(log.holds(VOLUME, LblkRange::new(1, 1)));
    log.close_clean().unwrap();
    assert!(matches!(write(&log, 0, 1, 0), Err(CacheLogError::Closed)));
}

/// What each record holds together that is not converted, if it is more than one block in sequence.
fn held_together(replay: &mut Replay) -> BTreeMap<Lsn, Vec<u64>> {
    let mut held = BTreeMap::new();
    while let Some(one) = replay.next_write().unwrap() {
        let inside =
            |part: &LblkRange| one.unconverted.iter().any(|r| r.intersection(*part) == Some(*part));
        assert!(one.live.iter().all(inside), "what is live is not converted");
        assert_eq!(one.payload.is_empty(), one.live.is_empty(), "no data that nobody needs");
        let blocks: Vec<u64> =
            one.unconverted.iter().flat_map(|range| range.start.0..range.end()).collect();
        assert!(!blocks.is_empty());
        if one.unconverted.iter().any(|range| range.len > 1) {
            held.insert(one.lsn, blocks);
        }
    }
    held
}

/// Seed 27580640. Two newer records lie over the whole of an older one: until it is converted, what it
/// held together is one write.
#[test]
fn a_record_that_newer_ones_hide_still_says_what_was_one_write() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
    let hidden = write(&log, 0, 3, 1).unwrap();
    let first = write(&log, 0, 1, 2).unwrap();
    let rest = write(&log, 1, 2, 3).unwrap();
    let again = |log: CacheLog| {
        drop(log);
        let (log, mut replay) = open(&disk);
        assert_eq!(replay.remaining_blocks(), 3);
        (log, held_together(&mut replay))
    };
    let (log, held) = again(log);
    let rest_held = BTreeMap::from([(rest, vec![1, 2])]);
    let mut all_held = rest_held.clone();
    all_held.insert(hidden, vec![0, 1, 2]);
    assert_eq!(held, all_held);
    // Converted in a part: what is left is apart from it.
    clean(&log, 2, 1, hidden);
    let (log, held) = again(log);
    all_held.insert(hidden, vec![0, 1]);
    assert_eq!(held, all_held);
    clean(&log, 1, 1, hidden);
    let (log, held) = again(log);
    assert_eq!(held, rest_held);
    clean(&log, 0, 1, hidden);
    let (log, held) = again(log);
    assert_eq!(held, rest_held);
    // A newer record of the same blocks after all of them.
    let newest = write(&log, 0, 3, 4).unwrap();
    let (log, held) = again(log);
    assert_eq!(held, BTreeMap::from([(rest, vec![1, 2]), (newest, vec![0, 1, 2])]));
    log.append_volume_closed(VOLUME).unwrap();
    log.append_volume_open(VOLUME, "vol", Generation(4)).unwrap();
    let first_again = write(&log, 0, 1, 5).unwrap();
    assert!(first < first_again);
    drop(log);
    let (_, mut replay) = open(&disk);
    assert_eq!(held_together(&mut replay), BTreeMap::new());
}

/// At the first start the data log had a newer version of block 1, so what the cache log has of it was cleaned.
#[test]
fn a_write_holds_together_over_what_only_the_data_log_has() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let older = write(&log, 0, 3, 1).unwrap();
    clean(&log, 1, 1, older);
    drop(log);
    let (log, mut replay) = open(&disk);
    let one = replay.next_write().unwrap().unwrap();
    let apart = [LblkRange::new(0, 1), LblkRange::new(2, 1)];
    assert_eq!((one.lsn, one.unconverted.as_slice()), (older, &apart[..]));
    assert_eq!(one.holds_together(&BTreeSet::new()), apart);
    // What both logs have counts once; block 3 is no part of it.
    assert_eq!(one.holds_together(&BTreeSet::from([1, 2, 3])), [LblkRange::new(0, 3)]);
    // The same where newer records hide all that the cache log still has of it.
    let newer = [write(&log, 0, 1, 2).unwrap(), write(&log, 2, 1, 3).unwrap()];
    drop(log);
    let (_, mut replay) = open(&disk);
    let one = replay.next_write().unwrap().unwrap();
    assert_eq!((one.lsn, one.live.as_slice()), (older, &[][..]));
    assert_eq!(one.holds_together(&BTreeSet::from([1])), [LblkRange::new(0, 3)]);
    for lsn in newer {
        assert_eq!(replay.next_write().unwrap().map(|one| one.lsn), Some(lsn));
    }
}

#[test]
fn a_record_cut_short_by_a_kill_is_dropped_and_the_rest_kept() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let kept = write(&log, 0, 1, 1).unwrap();
    let before = disk.segments()[0].1;
    write(&log, 1, 1, 2).unwrap();
    drop(log);
    let (name, whole) = disk.segments()[0].clone();
    for len in (before..whole).step_by(97) {
        let disk = disk.fork();
        disk.edit(&name, |data| data.truncate(len));
        let (_, mut replay) = open(&disk);
        assert_eq!(replay.torn_bytes(), (len - before) as u64);
        assert_eq!(blocks(&mut replay), BTreeMap::from([(0, kept)]));
    }
}

#[test]
fn a_flipped_bit_is_refused_with_its_place_after_a_kill_and_after_a_clean_close() {
    for close in [false, true] {
        let disk = SimDisk::default();
        let (log, _) = open(&disk);
        for n in 0..20 {
            write(&log, n * 4, 2, n + 1).unwrap();
        }
        if close {
            log.close_clean().unwrap();
        }
        drop(log);
        for (name, len) in disk.segments() {
            for at in (0..len).step_by(331) {
                let disk = disk.fork();
                disk.edit(&name, |data| data[at] ^= 1 << (at % 8));
                let refused = CacheLog::open_on(Box::new(disk), options()).map(|_| ());
                let Err(CacheLogError::Damaged { path, offset, .. }) = refused else {
                    panic!("byte {at} of {name}: {refused:?}");
                };
                assert!(path.ends_with(&name) && offset <= at as u64);
            }
        }
    }
}

#[test]
fn a_bit_flipped_below_what_is_known_durable_is_refused_after_a_power_loss() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let before = disk.segments()[0].1;
    let first = write(&log, 0, 1, 1).unwrap();
    log.sync_to(first).unwrap();
    let second = write(&log, 1, 1, 2).unwrap();
    log.sync_to(second).unwrap();
    disk.cut_power(|| false);
    let name = disk.segments()[0].0.clone();
    disk.edit(&name, |data| data[before + 200] ^= 1);
    let refused = CacheLog::open_on(Box::new(disk), options()).map(|_| ());
    assert!(matches!(refused, Err(CacheLogError::Damaged { .. })), "{refused:?}");
}

#[test]
fn a_missing_segment_or_a_short_file_after_a_clean_close_is_refused() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    for n in 0..60 {
        write(&log, n, 1, 0).unwrap();
    }
    log.close_clean().unwrap();
    drop(log);
    let segments = disk.segments();
    assert!(segments.len() >= 3);
    let without = disk.fork();
    without.remove(&segments[1].0).unwrap();
    assert!(CacheLog::open_on(Box::new(without), options()).is_err());
    let without = disk.fork();
    without.remove(&segments.last().unwrap().0).unwrap();
    assert!(CacheLog::open_on(Box::new(without), options()).is_err());
    disk.edit(&segments.last().unwrap().0, |data| data.truncate(data.len() - 1));
    assert!(CacheLog::open_on(Box::new(disk), options()).is_err());
}

/// Scenario 74, cache log.
#[test]
fn a_full_disk_refuses_the_record_and_the_log_goes_on_when_there_is_space() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let kept = write(&log, 0, 1, 1).unwrap();
    for space in [0, 1, 103, 104, 4000] {
        disk.set_space(Some(space));
        assert!(matches!(write(&log, 1, 1, 2), Err(CacheLogError::DiskFull)));
    }
    disk.set_space(None);
    let later = write(&log, 2, 1, 3).unwrap();
    assert_eq!(later, kept.next(), "a refused record has no number");
    drop(log);
    let (_, mut replay) = open(&disk);
    assert_eq!(blocks(&mut replay), BTreeMap::from([(0, kept), (2, later)]));
}

#[test]
fn a_full_log_delays_writes_but_takes_clean_records_and_then_has_room() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let mut newest = Lsn(0);
    let full = (0..1000).find_map(|n| match write(&log, n, 1, 0) {
        Ok(lsn) => {
            newest = lsn;
            None
        }
        Err(error) => Some(error),
    });
    assert!(matches!(full, Some(CacheLogError::Full { .. })));
    let (used, max) = log.usage_bytes();
    assert!(used <= max);
    assert_eq!(log.trim(Lsn(1)).unwrap(), 0);
    let cleaned = clean(&log, 0, 1000, newest);
    assert!(log.holds(VOLUME, LblkRange::new(0, 1)), "not before it is durable");
    log.sync_to(cleaned).unwrap();
    assert!(!log.holds(VOLUME, LblkRange::new(0, 1000)));
    assert!(log.trim(newest.next()).unwrap() > 0);
    write(&log, 5, 1, 0).unwrap();
    assert!(log.holds(VOLUME, LblkRange::new(5, 1)));
    drop(log);
    let (_, mut replay) = open(&disk);
    assert_eq!(blocks(&mut replay).keys().copied().collect::<Vec<_>>(), [5]);
}

/// Scenario 75, cache log.
#[test]
fn a_failed_flush_is_never_followed_by_a_success() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let lsn = write(&log, 0, 1, 1).unwrap();
    disk.set_sync_fails(true);
    assert!(log.sync_to(lsn).is_err());
    disk.set_sync_fails(false);
    assert!(matches!(log.sync_to(lsn), Err(CacheLogError::Poisoned(_))));
    assert!(matches!(write(&log, 1, 1, 2), Err(CacheLogError::Poisoned(_))));
    assert!(log.durable_lsn() < lsn && log.close_clean().is_err());
}

#[test]
fn one_flush_serves_many_and_everybody_who_waited_is_durable() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = &log;
            scope.spawn(move || {
                for n in 0..20 {
                    let lsn = write(log, thread * 100 + n, 1, 0).unwrap();
                    log.sync_to(lsn).unwrap();
                    assert!(log.durable_lsn() >= lsn);
                }
            });
        }
    });
    let before = disk.syncs();
    log.sync_to(log.last_lsn()).unwrap();
    assert_eq!(disk.syncs(), before, "nothing to flush");
    assert!(matches!(log.sync_to(Lsn(1 << 40)), Err(CacheLogError::Invalid(_))));
    disk.cut_power(|| false);
    let (_, mut replay) = open(&disk);
    assert!(replay.power_lost());
    assert_eq!(blocks(&mut replay).len(), 80);
}

#[test]
fn an_impossible_record_is_refused_and_a_foreign_segment_is_not_read() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let data = [0; BLOCK_SIZE];
    assert!(log.append_write(&record(0, 2, 0), &[&data]).is_err());
    assert!(log.append_write(&record(0, 0, 0), &[]).is_err());
    let beyond = WriteRecord { blocks: LblkRange::new(u64::MAX - 1, 1), ..record(0, 1, 0) };
    assert!(log.append_write(&beyond, &[&data]).is_err());
    write(&log, 0, 1, 0).unwrap();
    drop(log);
    let other = SimDisk::default();
    drop(open(&other));
    let name = disk.segments()[0].0.clone();
    let mut bytes = Vec::new();
    disk.edit(&name, |data| bytes = data.clone());
    other.edit(&name, |data| *data = bytes);
    let refused = CacheLog::open_on(Box::new(other), options()).map(|_| ());
    assert!(matches!(refused, Err(CacheLogError::Damaged { .. })));
}

/// `PROPTEST_CASES` wins over the number of cases.
pub(super) fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let is_set = std::env::var_os("PROPTEST_CASES").is_some();
    if is_set { default } else { ProptestConfig { cases, ..default } }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Clean(u64, u64, u64),
    Sync(u64),
    Trim,
    Rotate,
    DiskFull(usize),
    Kill,
    Cut(u64),
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0u64..20, 1u64..5).prop_map(|(s, l)| Op::Write(s, l)),
        4 => (0u64..20, 1u64..9, 0u64..4).prop_map(|(s, l, back)| Op::Clean(s, l, back)),
        3 => (0u64..3).prop_map(Op::Sync),
        2 => Just(Op::Trim),
        1 => Just(Op::Rotate),
        1 => (0usize..9000).prop_map(Op::DiskFull),
        1 => Just(Op::Kill),
        2 => any::<u64>().prop_map(Op::Cut),
        1 => Just(Op::Close),
    ]
}

/// All that was ever said, by number; records of the log itself have no entry.
#[derive(Default)]
struct Oracle {
    said: BTreeMap<u64, (u64, u64, Option<Lsn>)>,
    requests: BTreeMap<u64, u64>,
    /// Older records may be gone.
    trimmed: Lsn,
}

impl Oracle {
    /// Live blocks when the log ends with record `last`.
    fn blocks(&self, last: Lsn) -> BTreeMap<u64, Lsn> {
        let mut live = BTreeMap::new();
        for (lsn, (start, len, clean)) in self.said.range(..=last.0) {
            for lblk in *start..start + len {
                match clean {
                    None => {
                        live.insert(lblk, Lsn(*lsn));
                    }
                    Some(up_to) => {
                        live.retain(|block, lsn| *block != lblk || *lsn > *up_to);
                    }
                }
            }
        }
        live
    }

    /// What records held together of which neither block was cleaned up to them, when the log ends with
    /// record `last`.
    fn joints(&self, last: Lsn) -> BTreeSet<(Lsn, u64)> {
        let said = || self.said.range(..=last.0);
        let is_cleaned = |lblk: u64, lsn: u64| {
            said().filter(|(at, _)| **at > lsn).any(|(_, (start, len, clean))| {
                clean.is_some_and(|up_to| up_to.0 >= lsn) && (*start..start + len).contains(&lblk)
            })
        };
        let mut joints = BTreeSet::new();
        for (lsn, (start, len, _)) in said().filter(|(_, (_, _, clean))| clean.is_none()) {
            let neighbours = (*start..start + len - 1)
                .filter(|lblk| !is_cleaned(*lblk, *lsn) && !is_cleaned(lblk + 1, *lsn));
            joints.extend(neighbours.map(|lblk| (Lsn(*lsn), lblk)));
        }
        joints
    }

    /// A restart: what is found is a prefix of what was said, and not less than promised.
    fn check(&mut self, replay: &mut Replay, promised: Lsn) {
        let last = replay.last_lsn();
        assert!(last >= promised, "{promised} was promised, {last} is the end");
        let (blocks, joints) = blocks_and_joints(replay);
        assert_eq!(blocks, self.blocks(last));
        assert!(self.joints(last).is_superset(&joints), "joined without need");
        let is_kept = |(lsn, _): &&(Lsn, u64)| *lsn >= self.trimmed;
        let needed: BTreeSet<(Lsn, u64)> =
            self.joints(last).iter().filter(is_kept).copied().collect();
        assert!(joints.is_superset(&needed), "{needed:?} held together, found {joints:?}");
        let mut table = SessionTable::new(SessionLimits::default());
        table.restore(replay.sessions().clone(), Millis(0));
        for (sequence, lsn) in &self.requests {
            let key = RequestKey { session: SessionId([1; 16]), sequence: *sequence };
            let known = matches!(table.begin(key, true, Millis(0)), Decision::Duplicate(_));
            assert_eq!(known, Lsn(*lsn) <= last, "request {sequence}");
        }
        self.said.split_off(&(last.0 + 1));
        self.trimmed = self.trimmed.min(last.next());
        self.requests.retain(|_, lsn| *lsn <= last.0);
    }
}

fn run(ops: Vec<Op>) {
    let disk = SimDisk::default();
    let (mut log, _) = open(&disk);
    let mut oracle = Oracle::default();
    for op in ops {
        let (promised, power_lost) = match op {
            Op::Write(start, len) => {
                let sequence = oracle.requests.keys().last().map_or(1, |last| last + 1);
                match write(&log, start, len, sequence) {
                    Ok(lsn) => {
                        oracle.said.insert(lsn.0, (start, len, None));
                        oracle.requests.insert(sequence, lsn.0);
                    }
                    Err(error) => assert!(matches!(error, CacheLogError::Full { .. })),
                }
                continue;
            }
            Op::Clean(start, len, back) => {
                let up_to = Lsn(log.last_lsn().0.saturating_sub(back));
                let lsn = clean(&log, start, len, up_to);
                oracle.said.insert(lsn.0, (start, len, Some(up_to)));
                continue;
            }
            Op::Sync(back) => {
                log.sync_to(Lsn(log.last_lsn().0.saturating_sub(back))).unwrap();
                continue;
            }
            Op::Trim => {
                let live = oracle.blocks(log.last_lsn());
                let none_live = log.last_lsn().next();
                let before = live.values().min().copied().unwrap_or(none_live);
                log.trim(before).unwrap();
                oracle.trimmed = oracle.trimmed.max(before);
                continue;
            }
            Op::Rotate => {
                log.rotate().unwrap();
                continue;
            }
            Op::DiskFull(space) => {
                disk.set_space(Some(space));
                if let Ok(lsn) = write(&log, 0, 3, 0) {
                    oracle.said.insert(lsn.0, (0, 3, None));
                }
                disk.set_space(None);
                continue;
            }
            Op::Kill => (log.last_lsn(), false),
            Op::Cut(mut seed) => {
                disk.cut_power(|| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed % 4 > 1
                });
                (log.durable_lsn(), true)
            }
            Op::Close => {
                log.close_clean().unwrap();
                disk.cut_power(|| false);
                (log.last_lsn(), false)
            }
        };
        drop(log);
        let (next, mut replay) = open(&disk);
        assert_eq!(replay.power_lost(), power_lost);
        oracle.check(&mut replay, promised);
        log = next;
    }
}

/// The new segment reaches the disk, the end of the one before it does not.
#[test]
fn a_segment_that_outlives_the_end_of_the_one_before_it_is_dropped_after_a_power_cut() {
    let ops = vec![
        Op::Write(0, 1),
        Op::Write(0, 1),
        Op::Sync(0),
        Op::Clean(0, 1, 0),
        Op::Clean(0, 1, 0),
        Op::Rotate,
        Op::Cut(1846839454858842018),
    ];
    run(ops);
}

proptest! {
    #![proptest_config(config(96))]
    /// Scenario 73, cache log.
    #[test]
    fn after_kills_power_cuts_and_full_disks_the_log_is_a_prefix_of_what_was_said(
        ops in prop::collection::vec(op(), 1..80),
    ) {
        run(ops);
    }
}
