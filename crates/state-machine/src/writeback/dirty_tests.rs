#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn range(start: u64, len: u64) -> LblkRange {
    LblkRange::new(start, len)
}

fn put(map: &mut DirtyMap<u64>, start: u64, len: u64, lsn: u64) -> u64 {
    let end = (start + len) * BLOCK_BYTES;
    map.insert(range(start, len), Lsn(lsn), end, vec![lsn; len as usize]).unwrap()
}

#[test]
fn a_block_rewritten_under_writeback_stays_dirty_after_the_old_version_completes() {
    let mut map = DirtyMap::new();
    assert_eq!(put(&mut map, 0, 2, 1), 2);
    let first = map.pick(PickLimit::blocks(256)).unwrap();
    assert_eq!((first.range, first.max_lsn), (range(0, 2), Lsn(1)));
    assert_eq!(put(&mut map, 1, 1, 2), 1, "the newer version needs credit of its own");
    assert_eq!(map.pick(PickLimit::blocks(256)), None, "no block is in two write-outs");
    let done = map.complete(first.io).unwrap();
    assert_eq!((done.cleaned_blocks, done.redirtied_blocks), (1, 1));
    assert_eq!(done.runs, vec![CleanRun { range: range(0, 2), up_to: Lsn(1) }]);
    assert_eq!(map.read(Lblk(0)), None);
    assert_eq!(map.read(Lblk(1)), Some(&2));
    assert_eq!(map.complete(first.io), Err(DirtyError::UnknownWriteOut(first.io)));
    let second = map.pick(PickLimit::blocks(256)).unwrap();
    assert_eq!((second.range, second.data.as_slice()), (range(1, 1), &[2][..]));
    assert_eq!(map.complete(second.io).unwrap().cleaned_blocks, 1);
    assert!(map.is_clean());
}

#[test]
fn the_last_block_of_a_write_ends_where_an_older_version_of_it_did() {
    let mut map = DirtyMap::new();
    let long = 3 * BLOCK_BYTES + 900;
    map.insert(range(2, 2), Lsn(1), long, vec![1; 2]).unwrap();
    let end = |map: &DirtyMap<u64>, first, end_bytes| map.end_of(range(first, 2), end_bytes);
    assert_eq!(end(&map, 2, 3 * BLOCK_BYTES + 100), long, "it was longer");
    assert_eq!(end(&map, 2, 3 * BLOCK_BYTES + 901), 3 * BLOCK_BYTES + 901);
    assert_eq!(end(&map, 1, 2 * BLOCK_BYTES + 100), 3 * BLOCK_BYTES, "the rest is in other blocks");
    assert_eq!(end(&map, 8, 9 * BLOCK_BYTES + 1), 9 * BLOCK_BYTES + 1, "nothing is dirty there");
    let picked = map.pick(PickLimit::blocks(256)).unwrap();
    assert_eq!(end(&map, 2, 3 * BLOCK_BYTES + 100), long, "also while it is under writeback");
    map.complete(picked.io).unwrap();
    assert_eq!(
        end(&map, 2, 3 * BLOCK_BYTES + 100),
        3 * BLOCK_BYTES + 100,
        "conversion knows it now"
    );
    assert_eq!(map.end_of(range(0, 0), 0), 0);
}

#[test]
fn scattered_blocks_are_gathered_oldest_first_up_to_the_limits_and_told_in_ascending_order() {
    let mut map = DirtyMap::new();
    for (lsn, lblk) in [(1, 50), (2, 7), (3, 90), (4, 20)] {
        put(&mut map, lblk, 1, lsn);
    }
    put(&mut map, 200, 5, 5);
    let starts = |picks: &[Picked<u64>]| picks.iter().map(|p| p.range.start.0).collect::<Vec<_>>();
    assert_eq!(starts(&map.clone().gather(PickLimit::blocks(256), 3)), [7, 50, 90]);
    assert_eq!(starts(&map.clone().gather(PickLimit::blocks(2), 256)), [7, 50]);
    let up_to = PickLimit { up_to: Some(Lsn(3)), ..PickLimit::blocks(256) };
    assert_eq!(starts(&map.clone().gather(up_to, 256)), [7, 50, 90]);
    // Five blocks of one write do not fit into the rest, and are not torn.
    assert_eq!(starts(&map.clone().gather(PickLimit::blocks(8), 256)), [7, 20, 50, 90]);
    let picks = map.gather(PickLimit::blocks(9), 256);
    assert_eq!(starts(&picks), [7, 20, 50, 90, 200]);
    assert_eq!(map.gather(PickLimit::blocks(256), 256), [], "no block is in two write-outs");
    put(&mut map, 20, 1, 6);
    for picked in &picks[1..] {
        map.complete(picked.io).unwrap();
    }
    map.fail(picks[0].io).unwrap();
    assert_eq!(starts(&map.gather(PickLimit::blocks(256), 256)), [7, 20]);
}

/// Scenario 24, dirty map.
#[test]
fn a_failed_write_out_is_dirty_again_and_never_hides_newer_data() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 3, 1);
    let picked = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 1, 1, 2);
    let failed = map.fail(picked.io).unwrap();
    assert_eq!(failed, Failed { dirty_again_blocks: 2, credit_freed_blocks: 1 });
    let data: Vec<u64> = map.read_range(range(0, 3)).map(|(_, data)| *data).collect();
    assert_eq!(data, [1, 2, 1]);
    assert_eq!(map.oldest_lsn(), Some(Lsn(1)));
    assert_eq!(map.pending_blocks_up_to(Lsn(1)), 3, "the newer data stands for the older too");
}

/// Scenario 40, dirty map.
#[test]
fn an_fsync_waits_for_what_was_acknowledged_before_it_and_for_nothing_later() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 1, 1);
    put(&mut map, 10, 1, 2);
    let cursor = Lsn(1);
    put(&mut map, 0, 1, 3);
    assert!(map.pending_up_to(cursor), "an overwrite does not end the wait");
    let limit = PickLimit { up_to: Some(cursor), ..PickLimit::blocks(256) };
    let picked = map.pick(limit).unwrap();
    assert_eq!((picked.range, picked.max_lsn), (range(0, 1), Lsn(3)));
    assert_eq!(map.pick(limit), None);
    assert!(map.pending_up_to(cursor));
    map.complete(picked.io).unwrap();
    assert!(!map.pending_up_to(cursor));
    assert!(map.pending_up_to(Lsn(2)));
}

#[test]
fn a_run_is_contiguous_holds_its_limit_and_begins_at_the_oldest_block() {
    let mut map = DirtyMap::new();
    put(&mut map, 100, 4, 1);
    put(&mut map, 98, 2, 2);
    for lblk in (0..98).chain(104..300) {
        put(&mut map, lblk, 1, 3);
    }
    let picked = map.pick(PickLimit::blocks(6)).unwrap();
    assert_eq!(picked.range.len, 6);
    assert!(picked.range.overlaps(range(100, 4)));
    let inside = PickLimit { within: Some(range(10, 5)), ..PickLimit::blocks(256) };
    assert_eq!(map.pick(inside).unwrap().range, range(10, 5));
    assert_eq!(map.pick(PickLimit::blocks(0)), None);
}

/// Invariant `whole-requests`, scenario 78.
#[test]
fn blocks_of_one_write_are_picked_together_whatever_the_limit() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 256, 1);
    put(&mut map, 300, 2, 2);
    assert_eq!(map.pick(PickLimit::blocks(10)).unwrap().range, range(0, 256));
    let inside = PickLimit { within: Some(range(301, 1)), ..PickLimit::blocks(256) };
    assert_eq!(map.pick(inside).unwrap().range, range(300, 2));
}

/// Invariant `whole-requests`.
#[test]
fn a_write_over_a_block_in_flight_waits_as_a_whole() {
    let mut map = DirtyMap::new();
    put(&mut map, 5, 1, 1);
    let first = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 0, 10, 2);
    let inside = PickLimit { within: Some(range(8, 1)), ..PickLimit::blocks(256) };
    assert!(!map.can_pick(inside));
    assert_eq!(map.pick(inside), None);
    put(&mut map, 20, 1, 3);
    assert_eq!(map.pick(PickLimit::blocks(256)).unwrap().range, range(20, 1));
    map.complete(first.io).unwrap();
    assert_eq!(map.pick(inside).unwrap().range, range(0, 10));
}

/// Scenario 36, dirty map. What was written later makes no earlier write-out longer: not one under way,
/// not one that failed and begins again, and not one that takes only a part of what is dirty.
#[test]
fn a_write_out_carries_the_size_of_its_own_writes_only() {
    let mut map = DirtyMap::new();
    map.insert(range(0, 2), Lsn(1), 5000, vec![1, 1]).unwrap();
    let append = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 2, 100, 2);
    assert_eq!(append.end_bytes, 5000);
    map.fail(append.io).unwrap();
    let again = map.pick(PickLimit::blocks(2)).unwrap();
    assert_eq!((again.range, again.end_bytes), (range(0, 2), 5000));
    let rest = map.pick(PickLimit::blocks(256)).unwrap();
    assert_eq!((rest.range, rest.end_bytes), (range(2, 100), 102 * BLOCK_BYTES));
    let mut map = DirtyMap::new();
    map.insert(range(0, 1), Lsn(1), 4096, vec![1]).unwrap();
    map.insert(range(1, 1), Lsn(2), 5000, vec![2]).unwrap();
    let first = map.pick(PickLimit::blocks(1)).unwrap();
    assert_eq!(first.end_bytes, 4096, "never beyond the blocks it converts");
    let second = map.pick(PickLimit::blocks(1)).unwrap();
    assert_eq!(second.end_bytes, 5000);
}

/// Scenario 42, dirty map.
#[test]
fn discarded_blocks_do_not_come_back_when_their_write_out_fails() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 4, 1);
    let picked = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 1, 1, 2);
    let gone = map.discard(range(1, 2));
    assert_eq!(gone.credit_freed_blocks, 1);
    assert_eq!(gone.in_flight.into_iter().collect::<Vec<_>>(), [picked.io]);
    assert_eq!(map.read(Lblk(2)), None);
    let failed = map.fail(picked.io).unwrap();
    assert_eq!(failed, Failed { dirty_again_blocks: 2, credit_freed_blocks: 2 });
    assert_eq!(map.read_range(range(0, 4)).map(|(b, _)| b.0).collect::<Vec<_>>(), [0, 3]);
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Pick(u64, Option<u64>, bool),
    Complete(usize),
    Fail(usize),
    Discard(u64, u64),
    Stored(u64, u64),
    /// How far back, and at most so many blocks.
    Log(u64, u64),
    Answer(usize, bool),
    Restored(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u64..24, 1u64..8).prop_map(|(s, l)| Op::Write(s, l)),
        3 => (1u64..9, prop::option::of(0u64..24), any::<bool>())
            .prop_map(|(n, within, recent)| Op::Pick(n, within, recent)),
        2 => (0usize..4).prop_map(Op::Complete),
        1 => (0usize..4).prop_map(Op::Fail),
        1 => (0u64..24, 1u64..8).prop_map(|(s, l)| Op::Discard(s, l)),
        2 => (0u64..24, 1u64..12).prop_map(|(s, l)| Op::Stored(s, l)),
        4 => (0u64..4, 1u64..16).prop_map(|(back, n)| Op::Log(back, n)),
        3 => (0usize..4, any::<bool>()).prop_map(|(at, ok)| Op::Answer(at, ok)),
        1 => (0u64..24).prop_map(Op::Restored),
    ]
}

/// What is known of a version of a block besides its writes.
#[derive(Clone, Debug, Default)]
struct Part {
    /// Newest message that carries it, and the newest write that this has.
    ask: Option<(u64, u64)>,
    /// The log has all writes up to this one; 0: none.
    logged_to: u64,
    /// Some message carried it.
    sent: bool,
    joined: bool,
    /// The stores hold it: it wants neither space nor the log.
    kept: bool,
    /// Writes that a kept version held together here, and that still are by the one that took its place.
    held: Vec<u64>,
}

impl Part {
    /// It waits, and stands for an older one, too.
    fn absorb(&mut self, older: Self) {
        self.logged_to = self.logged_to.max(older.logged_to);
        self.ask = self.ask.or(older.ask).filter(|(_, newest)| *newest > self.logged_to);
        self.sent |= older.sent;
        self.joined |= older.joined;
        self.held.extend(older.held);
    }
}

/// A block of the oracle: every write to it that is not converted, oldest first, and how many of
/// them the write-out under way carries.
#[derive(Clone, Debug, Default)]
struct Slow {
    writes: Vec<u64>,
    carried: usize,
    io: Option<WriteOutId>,
    discarded: bool,
    waiting: Part,
    flight: Part,
}

impl Slow {
    fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
    fn waits(&self) -> bool {
        self.writes.len() > self.carried
    }
    fn seen(&self) -> Option<u64> {
        if self.waits() || !self.discarded { self.writes.last().copied() } else { None }
    }
    fn launch(&mut self, io: WriteOutId) {
        (self.io, self.carried) = (Some(io), self.writes.len());
        self.flight = std::mem::take(&mut self.waiting);
    }
    /// Of each version: the oldest write that is not in the log.
    fn unlogged(&self) -> [Option<u64>; 2] {
        let (carried, waiting) = self.writes.split_at(self.carried);
        let oldest = |writes: &[u64], part: &Part| {
            writes.iter().copied().find(|write| !part.kept && *write > part.logged_to)
        };
        [oldest(waiting, &self.waiting), oldest(carried, &self.flight)]
    }
    /// Something that is waited for is neither in the log nor on its way there.
    fn wants_log(&self, up_to: u64) -> bool {
        let is_late = |(_, newest)| Some(&newest) != self.writes.last();
        self.unlogged()[0].is_some_and(|oldest| oldest <= up_to)
            && self.waiting.ask.is_none_or(is_late)
    }
}

/// Blocks, and the messages to the log that are not answered.
#[derive(Default)]
struct Oracle(BTreeMap<u64, Slow>, BTreeMap<u64, Vec<u64>>);

impl Oracle {
    fn end(&mut self, picked: &Picked<u64>, converted: bool) {
        for lblk in picked.range.start.0..picked.range.end() {
            let slow = self.0.get_mut(&lblk).unwrap();
            assert_eq!(slow.io.take(), Some(picked.io));
            let carried = std::mem::take(&mut slow.carried);
            let flight = std::mem::take(&mut slow.flight);
            let is_newer = slow.writes.len() > carried;
            if !converted && flight.kept && is_newer && !slow.discarded {
                slow.waiting.sent |= flight.sent || flight.logged_to > 0;
                slow.waiting.joined |= flight.joined;
                slow.waiting.held.extend(flight.held);
                slow.waiting.held.extend(slow.writes.drain(..carried));
            } else if converted || std::mem::take(&mut slow.discarded) {
                slow.writes.drain(..carried);
            } else if slow.writes.len() == carried {
                slow.waiting = flight;
            } else {
                slow.waiting.absorb(flight);
            }
            slow.discarded = false;
        }
        self.0.retain(|_, slow| !slow.is_empty());
    }

    /// Waiting blocks that writes have joined to this one, directly or over others.
    fn chain(&self, seed: u64) -> std::ops::Range<u64> {
        let waiting = |lblk: u64| self.0.get(&lblk).filter(|slow| slow.waits());
        let is_joined = |lblk: u64| waiting(lblk).is_some_and(|slow| slow.waiting.joined);
        let (mut start, mut end) = (seed, seed + 1);
        while start > 0 && is_joined(start - 1) {
            start -= 1;
        }
        while is_joined(end - 1) && waiting(end).is_some() {
            end += 1;
        }
        start..end
    }

    /// What a message to the log has to carry.
    fn for_log(&self, up_to: u64) -> BTreeSet<u64> {
        let seeds = self.0.iter().filter(|(_, slow)| slow.wants_log(up_to));
        let whole = seeds.flat_map(|(seed, _)| self.chain(*seed));
        whole.filter(|lblk| self.0[lblk].unlogged()[0].is_some()).collect()
    }

    fn log(&mut self, map: &mut DirtyMap<u64>, up_to: u64, blocks_max: u64) {
        let wanted = self.for_log(up_to);
        // Of an older write of a block, which is under way and not logged, a part would be seen alone.
        let is_torn = wanted.iter().any(|lblk| self.0[lblk].unlogged()[1].is_some());
        let before = (map.log_number(), map.logged_blocks());
        let pick = match map.gather_for_log(Lsn(up_to), blocks_max) {
            Ok(Some(pick)) => pick,
            other => {
                let is_much = wanted.len() as u64 > blocks_max || is_torn;
                assert_eq!(other, if is_much { Err(TooMuch) } else { Ok(None) });
                assert!(is_much || wanted.is_empty(), "{wanted:?} were left out");
                assert_eq!((map.log_number(), map.logged_blocks()), before);
                return;
            }
        };
        assert_eq!((pick.number, map.log_number()), (before.0 + 1, before.0 + 1));
        assert!(wanted.len() as u64 <= blocks_max && !is_torn);
        let picked: Vec<u64> = pick.blocks.iter().map(|block| block.lblk.0).collect();
        assert_eq!(picked, wanted.into_iter().collect::<Vec<_>>());
        for block in pick.blocks {
            let slow = self.0.get_mut(&block.lblk.0).unwrap();
            let newest = *slow.writes.last().unwrap();
            assert_eq!((block.data, block.lsn), (newest, Lsn(newest)));
            slow.waiting.ask = Some((pick.number, newest));
            slow.waiting.sent = true;
        }
        self.1.insert(pick.number, picked);
    }

    fn answered(&mut self, number: u64, is_logged: bool) {
        if self.1.remove(&number).is_none() {
            return;
        }
        for slow in self.0.values_mut() {
            for part in [&mut slow.waiting, &mut slow.flight] {
                if let Some((_, newest)) = part.ask.take_if(|(asked, _)| *asked == number)
                    && is_logged
                {
                    part.logged_to = newest;
                }
            }
        }
    }

    fn check_log(&self, map: &DirtyMap<u64>, lsn: u64) {
        let unlogged = || self.0.values().flat_map(Slow::unlogged).flatten();
        for cursor in 0..=lsn {
            let pending = unlogged().filter(|oldest| *oldest <= cursor).count() as u64;
            assert_eq!(map.pending_up_to(Lsn(cursor)), pending > 0, "up to {cursor}");
            assert_eq!(map.pending_blocks_up_to(Lsn(cursor)), pending, "up to {cursor}");
        }
        let parts = self.0.values().flat_map(|slow| [&slow.waiting, &slow.flight]);
        let logged = parts.filter(|part| part.logged_to > 0 && !part.kept).count();
        let asked: usize = self.1.values().map(Vec::len).sum();
        assert_eq!(map.logged_blocks(), (logged + asked) as u64);
        let told = map.waiting().map(|waiting| (waiting.lblk.0, waiting.data, waiting.is_logged));
        let waits = self.0.iter().filter(|(_, slow)| slow.io.is_none() && !slow.waiting.kept);
        let is_logged = |slow: &Slow| slow.waiting.sent || slow.waiting.logged_to > 0;
        let waits =
            waits.map(|(lblk, slow)| (*lblk, slow.writes[slow.writes.len() - 1], is_logged(slow)));
        assert_eq!(told.collect::<Vec<_>>(), waits.collect::<Vec<_>>());
    }

    /// Nothing of a write that is picked stays behind, unless a discard cut the write before.
    fn check_whole(&self, picked: &Picked<u64>, cut: &BTreeSet<u64>) {
        let inside = picked.range.start.0..picked.range.end();
        let taken = inside.clone().flat_map(|lblk| self.0[&lblk].writes.iter());
        let taken: BTreeSet<u64> = taken.copied().filter(|write| !cut.contains(write)).collect();
        for (lblk, slow) in self.0.iter().filter(|(lblk, _)| !inside.contains(lblk)) {
            let left = slow.writes.iter().find(|write| taken.contains(write));
            assert_eq!(left, None, "write {left:?} is picked in part, block {lblk} stays");
        }
    }

    fn check(&self, map: &DirtyMap<u64>, lsn: u64) {
        for lblk in 0..40 {
            let seen = self.0.get(&lblk).and_then(Slow::seen);
            assert_eq!(map.read(Lblk(lblk)).copied(), seen, "block {lblk}");
        }
        let oldest = self.0.values().filter_map(|s| s.writes.first()).min().copied();
        assert_eq!(map.oldest_lsn(), oldest.map(Lsn));
        self.check_log(map, lsn);
        let waiting = self.0.values().filter(|s| s.waits() && !s.waiting.kept).count() as u64;
        let flying = self.0.values().filter(|s| s.io.is_some() && !s.flight.kept).count() as u64;
        assert_eq!((map.waiting_blocks(), map.in_flight_blocks()), (waiting, flying));
        assert_eq!(map.is_clean(), self.0.is_empty());
    }
}

/// The credit that the map's answers add up to is what its versions hold.
fn run(ops: Vec<Op>) {
    let mut map = DirtyMap::new();
    let mut oracle = Oracle::default();
    let mut flying: Vec<Picked<u64>> = Vec::new();
    let (mut lsn, mut credit) = (0u64, 0i64);
    let mut cut = BTreeSet::new();
    let mut messages: Vec<u64> = Vec::new();
    for op in ops {
        match op {
            Op::Write(start, len) => {
                lsn += 1;
                let needed = map.credit_needed(range(start, len));
                assert_eq!(put(&mut map, start, len, lsn), needed);
                credit += needed as i64;
                for lblk in start..start + len {
                    let slow = oracle.0.entry(lblk).or_default();
                    if slow.waiting.kept {
                        let Part { joined, mut held, sent, logged_to, .. } =
                            std::mem::take(&mut slow.waiting);
                        held.append(&mut slow.writes);
                        let sent = sent || logged_to > 0;
                        slow.waiting = Part { sent, joined, held, ..Part::default() };
                    }
                    slow.writes.push(lsn);
                    slow.waiting.joined |= lblk + 1 < start + len;
                }
            }
            Op::Pick(blocks_max, within, recent) => {
                let within = within.map(|start| range(start, 6));
                let up_to = recent.then_some(Lsn(lsn / 2));
                let Some(picked) = map.pick(PickLimit { blocks_max, up_to, within }) else {
                    continue;
                };
                assert!(picked.range.len >= 1);
                assert_eq!(picked.logged_up_to, messages.last().copied().unwrap_or(0));
                oracle.check_whole(&picked, &cut);
                let mut oldest = u64::MAX;
                let mut written = Vec::new();
                for lblk in picked.range.start.0..picked.range.end() {
                    let slow = oracle.0.get_mut(&lblk).unwrap();
                    assert_eq!(slow.io, None, "in two write-outs at once");
                    let newest = *slow.writes.last().unwrap();
                    assert!(Lsn(newest) <= picked.max_lsn);
                    if !slow.waiting.kept {
                        written.push((lblk, newest));
                    }
                    oldest = oldest.min(slow.writes[0]);
                    slow.launch(picked.io);
                }
                let lblks = picked.written.iter().flat_map(|at| at.start.0..at.end());
                assert_eq!(lblks.zip(picked.data.iter().copied()).collect::<Vec<_>>(), written);
                assert_eq!(picked.data.len(), written.len());
                // With nothing in flight every group is whole, so the oldest one must go.
                if within.is_none() && flying.is_empty() {
                    let ready = oracle.0.values().filter(|s| s.waits() && s.carried == 0);
                    let oldest_left = ready.map(|s| s.writes[0]).min().unwrap_or(u64::MAX);
                    assert!(oldest <= oldest_left, "the oldest was left behind");
                }
                flying.push(picked);
            }
            Op::Complete(at) if at < flying.len() => {
                let picked = flying.remove(at);
                let done = map.complete(picked.io).unwrap();
                credit -= picked.data.len() as i64;
                let covered: u64 = done.runs.iter().map(|run| run.range.len).sum();
                assert_eq!(covered, picked.range.len);
                for run in &done.runs {
                    let slow = &oracle.0[&run.range.start.0];
                    assert_eq!(
                        run.up_to,
                        Lsn(slow.writes[slow.carried - 1]),
                        "exact for each block"
                    );
                }
                oracle.end(&picked, true);
            }
            Op::Fail(at) if at < flying.len() => {
                let picked = flying.remove(at);
                let failed = map.fail(picked.io).unwrap();
                credit -= failed.credit_freed_blocks as i64;
                oracle.end(&picked, false);
            }
            Op::Discard(start, len) => {
                credit -= map.discard(range(start, len)).credit_freed_blocks as i64;
                for lblk in start..start + len {
                    let Some(slow) = oracle.0.get_mut(&lblk) else { continue };
                    cut.extend(slow.writes.iter().chain(&slow.waiting.held).copied());
                    slow.writes.truncate(slow.carried);
                    slow.waiting = Part::default();
                    slow.discarded = slow.io.is_some();
                }
                oracle.0.retain(|_, slow| !slow.is_empty());
            }
            Op::Stored(start, len) => {
                let told = map.waiting().filter(|w| range(start, len).overlaps(range(w.lblk.0, 1)));
                let told: BTreeMap<u64, Lsn> = told.map(|w| (w.lblk.0, w.lsn)).collect();
                let settled = map.take_stored(&told);
                credit -= settled.credit_freed_blocks as i64;
                for Lblk(lblk) in settled.kept {
                    let slow = oracle.0.get_mut(&lblk).unwrap();
                    assert_eq!((slow.io, slow.waiting.kept, slow.waiting.ask), (None, false, None));
                    assert!(
                        slow.writes.last().is_some_and(|lsn| told.get(&lblk) == Some(&Lsn(*lsn)))
                    );
                    slow.waiting.kept = true;
                }
                for clean in settled.clean {
                    for lblk in clean.range.start.0..clean.range.end() {
                        let slow = oracle.0.remove(&lblk).unwrap();
                        assert_eq!((slow.io, slow.writes.last()), (None, Some(&clean.up_to.0)));
                        assert!(slow.waiting.kept || told.get(&lblk) == Some(&clean.up_to));
                        // What comes next to it since is a write of its own.
                        if let Some(before) = lblk.checked_sub(1).and_then(|b| oracle.0.get_mut(&b))
                        {
                            before.waiting.joined = false;
                        }
                    }
                }
                // Whatever is stored wants no space any more.
                let wants = |lblk: &u64| {
                    let slow = oracle.0.get(lblk).filter(|_| flying.is_empty());
                    slow.is_some_and(|slow| !slow.waiting.kept && slow.waiting.ask.is_none())
                };
                assert_eq!(told.keys().find(|lblk| wants(lblk)), None);
            }
            Op::Log(back, blocks_max) => {
                oracle.log(&mut map, lsn.saturating_sub(back), blocks_max);
                if map.log_number() > messages.last().copied().unwrap_or(0) {
                    messages.push(map.log_number());
                }
            }
            Op::Answer(back, is_logged) => {
                // The newest ones; some of them were answered before.
                let Some(number) = messages.iter().rev().nth(back).copied() else { continue };
                map.log_ended(number, is_logged);
                oracle.answered(number, is_logged);
            }
            Op::Restored(lblk) => {
                lsn += 1;
                let end_bytes = (lblk + 1) * BLOCK_BYTES;
                let block = LogBlock { lblk: Lblk(lblk), end_bytes, lsn: Lsn(lsn), data: lsn };
                let was_clean = !oracle.0.contains_key(&lblk);
                assert_eq!(map.insert_logged(block), was_clean);
                if was_clean {
                    let waiting = Part { logged_to: lsn, ..Part::default() };
                    oracle.0.insert(lblk, Slow { writes: vec![lsn], waiting, ..Slow::default() });
                    credit += 1;
                }
            }
            Op::Complete(_) | Op::Fail(_) => {}
        }
        oracle.check(&map, lsn);
        assert_eq!(credit as u64, map.waiting_blocks() + map.in_flight_blocks());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]
    #[test]
    fn random_histories_agree_with_a_list_of_all_writes(
        ops in prop::collection::vec(op(), 1..60),
    ) {
        run(ops);
    }
}

/// The oracle once took the first write for whole, as nothing of it was left in the block that was discarded.
#[test]
fn a_discard_cuts_the_write_that_a_kept_block_held_together_before() {
    use Op::{Discard, Pick, Stored, Write};
    run(vec![Write(0, 6), Stored(1, 4), Write(0, 5), Discard(1, 1), Pick(1, None, false)]);
}

/// Block 1 may have been merged with what block 0 belongs to: neither is in the log.
#[test]
fn a_block_is_not_logged_over_an_unlogged_version_under_writeback() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 2, 1);
    let first = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 1, 1, 2);
    assert_eq!(map.gather_for_log(Lsn(2), 16), Err(TooMuch));
    map.complete(first.io).unwrap();
    let pick = map.gather_for_log(Lsn(2), 16).unwrap().unwrap();
    map.log_ended(pick.number, true);
    let second = map.pick(PickLimit::blocks(256)).unwrap();
    put(&mut map, 1, 1, 3);
    assert!(map.gather_for_log(Lsn(3), 16).unwrap().is_some(), "the log has the older one");
    map.complete(second.io).unwrap();
}

#[test]
fn a_block_counts_as_logged_when_nothing_is_known_of_its_message() {
    let mut map = DirtyMap::new();
    put(&mut map, 0, 1, 1);
    let is_logged = |map: &DirtyMap<u64>| map.waiting().all(|waiting| waiting.is_logged);
    assert!(!is_logged(&map));
    let pick = map.gather_for_log(Lsn(1), 16).unwrap().unwrap();
    assert!(is_logged(&map), "it may be there before the answer");
    map.log_ended(pick.number, false);
    assert!(is_logged(&map));
    let io = map.pick(PickLimit::blocks(256)).unwrap().io;
    put(&mut map, 0, 1, 2);
    map.fail(io).unwrap();
    assert!(is_logged(&map), "the newer version stands for it");
}
