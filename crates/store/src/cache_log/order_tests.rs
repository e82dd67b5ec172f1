//! What may be used after a gap, and in which order things become durable.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use endio_state_machine::writeback::sessions::Decision;
use endio_types::{BLOCK_BYTES, Millis};
use proptest::prelude::*;

use super::sim::SimDisk;
use super::tests::{VOLUME, blocks, clean, open, options, write};
use super::*;

fn refused(disk: &SimDisk) -> bool {
    let opened = CacheLog::open_on(Box::new(disk.clone()), options()).map(|_| ());
    matches!(opened, Err(CacheLogError::Damaged { .. }))
}

/// Two segments; what the first one says after `synced` is not durable. Returns the length of the
/// first segment up to there.
fn two_segments(disk: &SimDisk) -> (CacheLog, Lsn, usize) {
    let (log, _) = open(disk);
    let synced = write(&log, 0, 1, 1).unwrap();
    log.sync_to(synced).unwrap();
    let len = disk.segments()[0].1;
    write(&log, 1, 1, 2).unwrap();
    log.rotate().unwrap();
    write(&log, 2, 1, 3).unwrap();
    (log, synced, len)
}

#[test]
fn nothing_after_a_gap_is_used_and_its_bytes_are_counted_after_a_power_cut() {
    let disk = SimDisk::default();
    let (log, synced, len) = two_segments(&disk);
    drop(log);
    disk.cut_power(|| true);
    let segments = disk.segments();
    disk.edit(&segments[0].0, |data| data.truncate(len));
    let (log, mut replay) = open(&disk);
    assert!(replay.power_lost());
    assert_eq!(replay.torn_bytes(), segments[1].1 as u64);
    assert_eq!((replay.last_lsn(), blocks(&mut replay)), (synced, BTreeMap::from([(0, synced)])));
    // The numbers are given again; the dropped segment must not come back under them.
    let again = write(&log, 5, 1, 2).unwrap();
    log.sync_to(again).unwrap();
    disk.cut_power(|| false);
    let (_, mut replay) = open(&disk);
    assert_eq!(blocks(&mut replay), BTreeMap::from([(0, synced), (5, again)]));
}

#[test]
fn a_gap_without_a_power_cut_is_damage() {
    let disk = SimDisk::default();
    let (log, _, len) = two_segments(&disk);
    drop(log);
    disk.edit(&disk.segments()[0].0, |data| data.truncate(len));
    assert!(refused(&disk));
}

#[test]
fn a_gap_in_what_a_later_segment_calls_durable_is_damage_even_after_a_power_cut() {
    let disk = SimDisk::default();
    let (log, _, len) = two_segments(&disk);
    log.sync_to(log.last_lsn()).unwrap();
    let witness = write(&log, 3, 1, 4).unwrap();
    log.sync_to(witness).unwrap();
    drop(log);
    disk.cut_power(|| false);
    let whole = disk.fork();
    let (_, mut replay) = open(&whole);
    assert_eq!(blocks(&mut replay).len(), 4);
    let before = disk.segments();
    disk.edit(&before[0].0, |data| data.truncate(len));
    assert!(refused(&disk));
    assert_eq!(disk.segments().len(), before.len(), "nothing was changed");
}

#[test]
fn a_missing_segment_is_damage_even_after_a_power_cut() {
    let disk = SimDisk::default();
    let (log, _, _) = two_segments(&disk);
    log.rotate().unwrap();
    drop(log);
    disk.cut_power(|| true);
    disk.remove(&disk.segments()[1].0).unwrap();
    assert!(refused(&disk));
}

#[test]
fn a_refused_record_is_never_mixed_with_the_one_that_took_its_place() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    log.sync_to(log.last_lsn()).unwrap();
    // Both have the same data and number; all but the end of the first reaches the disk.
    let space = usize::try_from(BLOCK_BYTES).unwrap() + 60;
    disk.set_space(Some(space));
    assert!(matches!(write(&log, 0, 1, 2), Err(CacheLogError::DiskFull)));
    disk.set_space(None);
    let taken = write(&log, 1, 1, 1).unwrap();
    let mut changes = 0;
    // Nine sectors of the first, its removal, nine sectors of the second.
    disk.cut_power(|| {
        changes += 1;
        changes <= 9 || changes == 19
    });
    let (_, mut replay) = open(&disk);
    let found = blocks(&mut replay);
    assert!(found.is_empty() || found == BTreeMap::from([(1, taken)]), "{found:?}");
}

#[test]
fn a_full_disk_in_a_rotation_changes_nothing_and_the_log_goes_on() {
    for space in [0, 1, 104, 110] {
        let disk = SimDisk::default();
        let (log, _) = open(&disk);
        log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
        let first = write(&log, 0, 1, 1).unwrap();
        let (segments, usage) = (disk.segments(), log.usage_bytes());
        disk.set_space(Some(space));
        assert!(matches!(log.rotate(), Err(CacheLogError::DiskFull)));
        assert_eq!((disk.segments(), log.usage_bytes()), (segments, usage));
        assert_eq!(log.last_lsn(), first);
        log.sync_to(first).unwrap();
        disk.set_space(None);
        log.rotate().unwrap();
        let second = write(&log, 1, 1, 2).unwrap();
        log.sync_to(second).unwrap();
        disk.cut_power(|| false);
        let (_, mut replay) = open(&disk);
        assert_eq!(replay.open_volumes().len(), 1);
        assert_eq!(blocks(&mut replay), BTreeMap::from([(0, first), (1, second)]));
    }
}

#[test]
fn a_flush_that_fails_in_a_rotation_or_a_trim_is_never_followed_by_a_success() {
    for trims in [false, true] {
        let disk = SimDisk::default();
        let (log, _) = open(&disk);
        let first = write(&log, 0, 1, 1).unwrap();
        if trims {
            log.rotate().unwrap();
            log.sync_to(log.last_lsn()).unwrap();
        }
        disk.set_sync_fails(true);
        let failed = if trims { log.trim(first.next()).is_err() } else { log.rotate().is_err() };
        assert!(failed);
        disk.set_sync_fails(false);
        let promised = log.durable_lsn();
        assert!(matches!(write(&log, 1, 1, 2), Err(CacheLogError::Poisoned(_))));
        assert!(matches!(log.sync_to(promised.next()), Err(CacheLogError::Poisoned(_))));
        assert_eq!(log.durable_lsn(), promised);
    }
}

#[test]
fn a_trim_keeps_what_was_appended_after_the_look_even_if_it_was_sealed_since() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let before = log.last_lsn().next();
    let kept = write(&log, 0, 1, 1).unwrap();
    log.rotate().unwrap();
    assert_eq!(log.trim(before).unwrap(), 0);
    drop(log);
    let (_, mut replay) = open(&disk);
    assert_eq!(blocks(&mut replay), BTreeMap::from([(0, kept)]));
}

#[test]
fn data_of_a_volume_that_was_closed_does_not_come_back_when_it_is_open_again() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
    write(&log, 0, 4, 1).unwrap();
    let closed = log.append_volume_closed(VOLUME).unwrap();
    assert!(log.holds(VOLUME, LblkRange::new(0, 4)), "not before it is durable");
    log.sync_to(closed).unwrap();
    assert!(!log.holds(VOLUME, LblkRange::new(0, 4)));
    log.append_volume_open(VOLUME, "vol", Generation(4)).unwrap();
    let newer = write(&log, 1, 1, 2).unwrap();
    drop(log);
    let (_, mut replay) = open(&disk);
    assert_eq!(blocks(&mut replay), BTreeMap::from([(1, newer)]));
}

#[test]
fn a_loss_is_told_again_after_a_kill_and_after_a_stop_until_somebody_was_told() {
    let (closed, open_on) = (VolumeId(8), VolumeId(9));
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    for volume in [VOLUME, closed] {
        log.append_volume_open(volume, "vol", Generation(3)).unwrap();
    }
    log.sync_to(log.last_lsn()).unwrap();
    drop(log);
    disk.cut_power(|| false);
    let (log, replay) = open(&disk);
    assert!(replay.power_lost() && replay.may_have_lost(VOLUME) && replay.may_have_lost(closed));
    log.append_volume_closed(closed).unwrap();
    log.append_volume_open(open_on, "later", Generation(3)).unwrap();
    drop(log);
    let (log, replay) = open(&disk);
    let told = [VOLUME, closed, open_on].map(|volume| replay.may_have_lost(volume));
    assert_eq!((replay.power_lost(), told), (false, [true, false, false]));
    log.append_volume_closed(VOLUME).unwrap();
    log.close_clean().unwrap();
    drop(log);
    let (log, replay) = open(&disk);
    assert!(replay.may_have_lost(VOLUME) && !replay.power_lost());
    log.loss_told(VOLUME).unwrap();
    drop(log);
    let (_, replay) = open(&disk);
    assert!(!replay.may_have_lost(VOLUME));
}

/// A retry of a request that a power loss may have taken is never new, whatever happens to the log since.
#[test]
fn what_a_session_sent_before_a_power_loss_stays_in_doubt() {
    let key = |sequence| RequestKey { session: SessionId([1; 16]), sequence };
    let decide = |replay: &Replay, sequence| {
        let mut table = SessionTable::new(SessionLimits::default());
        table.restore(replay.sessions().clone(), Millis(0));
        table.begin(key(sequence), true, Millis(0))
    };
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    log.append_done(key(1), 7).unwrap();
    log.sync_to(log.last_lsn()).unwrap();
    log.append_done(key(2), 7).unwrap();
    drop(log);
    disk.cut_power(|| false);
    let (log, replay) = open(&disk);
    assert_eq!(decide(&replay, 1), Decision::Duplicate(Some(7)));
    assert_eq!(decide(&replay, 2), Decision::TooOld);
    drop(log);
    let (log, replay) = open(&disk);
    assert_eq!(decide(&replay, 2), Decision::TooOld, "after a kill");
    // A first try begins another life of the session.
    log.append_done(key(5), 7).unwrap();
    drop(log);
    for how in ["kill", "stop in order"] {
        let (log, replay) = open(&disk);
        assert_eq!(decide(&replay, 2), Decision::TooOld, "{how}");
        assert_eq!(decide(&replay, 5), Decision::Duplicate(Some(7)), "{how}");
        assert_eq!(decide(&replay, 6), Decision::New, "{how}");
        log.close_clean().unwrap();
    }
}

/// A start after a power loss that fails anywhere leaves it to the next one to say that something is in doubt.
#[test]
fn a_start_that_dies_after_a_power_loss_does_not_hide_that_something_is_in_doubt() {
    let key = |sequence| RequestKey { session: SessionId([1; 16]), sequence };
    let (mut failed, mut noted) = (0, 0);
    for room in 0..600 {
        let disk = SimDisk::default();
        let (log, _) = open(&disk);
        log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
        log.append_done(key(1), 7).unwrap();
        log.sync_to(log.last_lsn()).unwrap();
        log.append_done(key(2), 7).unwrap();
        drop(log);
        disk.cut_power(|| false);
        disk.set_space(Some(room));
        let first = CacheLog::open_on(Box::new(disk.clone()), options());
        failed += u32::from(first.is_err());
        drop(first);
        disk.set_space(None);
        let (_, replay) = open(&disk);
        // A power loss that was noted is none any more.
        noted += u32::from(!replay.power_lost());
        let mut table = SessionTable::new(SessionLimits::default());
        table.restore(replay.sessions().clone(), Millis(0));
        assert_eq!(table.begin(key(2), true, Millis(0)), Decision::TooOld, "{room} bytes of room");
    }
    assert!(
        failed > 0 && failed + noted > 600,
        "no start died between its notes: {failed}, {noted}"
    );
}

#[test]
fn a_loss_that_was_noted_outlives_the_volume_the_log_and_a_power_loss() {
    let (told, other) = (VolumeId(8), VolumeId(9));
    let disk = SimDisk::default();
    let (log, replay) = open(&disk);
    assert_eq!(replay.losses().count(), 0);
    for volume in [VOLUME, told] {
        log.append_volume_open(volume, "vol", Generation(3)).unwrap();
        log.note_loss(volume).unwrap();
        log.note_loss(volume).unwrap();
        log.append_volume_closed(volume).unwrap();
    }
    log.loss_told(told).unwrap();
    drop(log);
    let (log, replay) = open(&disk);
    assert_eq!(replay.losses().collect::<Vec<_>>(), [VOLUME]);
    log.append_volume_open(other, "other", Generation(1)).unwrap();
    log.sync_to(log.last_lsn()).unwrap();
    drop(log);
    disk.cut_power(|| false);
    let (log, replay) = open(&disk);
    assert_eq!(replay.losses().collect::<Vec<_>>(), [VOLUME, other]);
    log.loss_told(other).unwrap();
    log.close_clean().unwrap();
    drop(log);
    let (_, replay) = open(&disk);
    assert_eq!(replay.losses().collect::<Vec<_>>(), [VOLUME]);
}

#[test]
fn a_loss_that_was_told_is_not_told_again_and_the_next_one_is() {
    let other = VolumeId(8);
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    for volume in [VOLUME, other] {
        log.append_volume_open(volume, "vol", Generation(3)).unwrap();
    }
    log.sync_to(log.last_lsn()).unwrap();
    drop(log);
    disk.cut_power(|| false);
    let (log, _) = open(&disk);
    log.loss_told(VOLUME).unwrap();
    log.loss_told(VOLUME).unwrap();
    drop(log);
    let (log, replay) = open(&disk);
    assert!(!replay.may_have_lost(VOLUME) && replay.may_have_lost(other));
    drop(log);
    disk.cut_power(|| false);
    let (_, replay) = open(&disk);
    assert!(replay.may_have_lost(VOLUME) && replay.may_have_lost(other));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    WriteOut(u64),
    /// A write that goes around the cache.
    Direct(u64),
    Sync,
    Trim,
    Rotate,
    DiskFull(usize),
    Kill,
    Cut(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0u64..8, 1u64..4).prop_map(|(start, len)| Step::Write(start, len)),
        6 => (0u64..10).prop_map(Step::WriteOut),
        3 => (0u64..10).prop_map(Step::Direct),
        1 => Just(Step::Sync),
        2 => Just(Step::Trim),
        2 => Just(Step::Rotate),
        1 => (0usize..9000).prop_map(Step::DiskFull),
        1 => Just(Step::Kill),
        2 => any::<u64>().prop_map(Step::Cut),
    ]
}

/// A writeback that keeps the rules, in front of a device that keeps everything.
struct Writeback {
    disk: SimDisk,
    log: CacheLog,
    /// Newest record of each dirty block.
    dirty: BTreeMap<u64, Lsn>,
    /// When the data of each record was written, by the clock of all writes.
    ages: BTreeMap<Lsn, u64>,
    /// Age of what the device holds durably.
    device: BTreeMap<u64, u64>,
    clock: u64,
}

impl Writeback {
    fn write(&mut self, start: u64, len: u64) {
        match write(&self.log, start, len, 0) {
            Ok(lsn) => {
                self.clock += 1;
                self.ages.insert(lsn, self.clock);
                self.dirty.extend((start..start + len).map(|lblk| (lblk, lsn)));
            }
            Err(CacheLogError::Full { .. } | CacheLogError::DiskFull) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn write_out(&mut self, lblk: u64) {
        let Some(covered) = self.dirty.remove(&lblk) else { return };
        // Log first.
        self.log.sync_to(covered).unwrap();
        self.device.insert(lblk, self.ages[&covered]);
        clean(&self.log, lblk, 1, covered);
    }

    fn direct(&mut self, lblk: u64) {
        self.write_out(lblk);
        if self.log.holds(VOLUME, LblkRange::new(lblk, 1)) {
            // Forget before going around: its `Clean` record is not durable yet.
            self.log.sync_to(self.log.last_lsn()).unwrap();
        }
        assert!(!self.log.holds(VOLUME, LblkRange::new(lblk, 1)));
        self.clock += 1;
        self.device.insert(lblk, self.clock);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(start, len) => self.write(start, len),
            Step::WriteOut(lblk) => self.write_out(lblk),
            Step::Direct(lblk) => self.direct(lblk),
            Step::Sync => self.log.sync_to(self.log.last_lsn()).unwrap(),
            Step::Trim => {
                let none = self.log.last_lsn().next();
                let oldest = self.dirty.values().min().copied().unwrap_or(none);
                self.log.trim(oldest).unwrap();
            }
            Step::Rotate => self.log.rotate().unwrap(),
            Step::DiskFull(space) => {
                self.disk.set_space(Some(space));
                self.write(0, 2);
                self.disk.set_space(None);
            }
            Step::Kill => self.restart(),
            Step::Cut(mut seed) => {
                self.disk.cut_power(|| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed % 4 > 1
                });
                self.restart();
            }
        }
    }

    fn restart(&mut self) {
        let (log, mut replay) = open(&self.disk);
        self.ages.split_off(&replay.last_lsn().next());
        self.dirty = blocks(&mut replay);
        self.log = log;
        for (lblk, lsn) in &self.dirty {
            let (found, durable) = (self.ages[lsn], self.device.get(lblk).copied().unwrap_or(0));
            assert!(found >= durable, "block {lblk}: {found} was replayed over {durable}");
        }
    }
}

proptest! {
    #![proptest_config(super::tests::config(96))]
    #[test]
    fn a_replay_never_puts_older_data_over_what_was_converted(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let disk = SimDisk::default();
        let (log, _) = open(&disk);
        let (dirty, ages, device) = Default::default();
        let mut writeback = Writeback { disk, log, dirty, ages, device, clock: 0 };
        for step in &steps {
            writeback.step(step);
        }
        writeback.disk.cut_power(|| false);
        writeback.restart();
    }
}

/// Linux tells one of two flushes of a file at once of its error. Here it was the other one, of a failed
/// write that is taken back.
#[test]
fn a_flush_during_which_the_log_is_poisoned_makes_nothing_durable() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    let log = std::sync::Arc::new(log);
    let lsn = write(&log, 0, 1, 1).unwrap();
    let before = log.durable_lsn();
    let other = std::sync::Arc::clone(&log);
    disk.during_sync(move || other.writer().poison("a failed write stays".to_owned()));
    assert!(matches!(log.sync_to(lsn), Err(CacheLogError::Poisoned(_))));
    assert_eq!(log.durable_lsn(), before);
}

/// A log that is more than half full and whose oldest segment is needed does not get a segment more each
/// time somebody looks; one segment that is all there is makes room.
#[test]
fn room_is_made_only_where_a_new_segment_helps() {
    let disk = SimDisk::default();
    let (log, _) = open(&disk);
    log.append_volume_open(VOLUME, "vol", Generation(3)).unwrap();
    let oldest = write(&log, 0, 1, 1).unwrap();
    while log.usage_bytes().0 <= log.usage_bytes().1 / 2 {
        write(&log, 1, 8, 2).unwrap();
    }
    let segments = disk.segments().len();
    assert!(segments > 2);
    for _ in 0..100 {
        assert_eq!(log.make_room(oldest).unwrap(), 0);
    }
    assert_eq!(disk.segments().len(), segments);
    assert!(log.make_room(log.last_lsn().next()).unwrap() > 0);
    assert_eq!(disk.segments().len(), 1);
    // One segment of more than half of what the log may hold.
    let options = CacheLogOptions { segment_bytes: 1 << 20, ..options() };
    let disk = SimDisk::default();
    let (log, _) = CacheLog::open_on(Box::new(disk.clone()), options).unwrap();
    while log.usage_bytes().0 <= log.usage_bytes().1 / 2 {
        write(&log, 1, 8, 2).unwrap();
    }
    assert!(log.make_room(log.last_lsn().next()).unwrap() > 0);
    assert!(log.usage_bytes().0 < log.usage_bytes().1 / 2);
}
