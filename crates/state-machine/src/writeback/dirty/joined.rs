//! Dirty blocks that one write covered: they leave together (invariant `whole-requests`).

use endio_types::LblkRange;
use endio_types::planted::{self, Bug};

use super::stored::GAPS_MAX;
use super::{Block, DirtyMap, GROUP_BLOCKS_MAX, PickLimit};
use crate::writeback::Lsn;

impl<D: Clone> DirtyMap<D> {
    /// Waiting blocks of a range are parts of one write, of record `lsn`: they are picked together, and the log
    /// has to keep that record as long as they wait. A replay, which inserts of each block the newest version
    /// only, says so afterwards of what is left of each older write.
    pub fn rejoin(&mut self, range: LblkRange, lsn: Lsn) {
        self.join(range);
        let is_younger = |block: &&Block<D>| block.waiting.as_ref().is_some_and(|v| v.since > lsn);
        let blocks = self.overlapping(range).filter(|(_, block)| is_younger(block));
        let younger: Vec<u64> = blocks.map(|(lblk, _)| lblk).collect();
        for lblk in younger {
            let block = self.blocks.get_mut(&lblk);
            let Some(mut version) = block.and_then(|block| block.waiting.take()) else { continue };
            self.ready.remove(&(version.since, lblk));
            self.forget(&version, lblk, false);
            version.since = lsn;
            version.log.has_since(lsn);
            self.remember(&version, lblk, false);
            self.set_waiting(lblk, version);
            if self.is_ready(lblk) {
                self.ready.insert((lsn, lblk));
            }
        }
    }

    /// Waiting blocks of a range are parts of one write: they are picked together.
    pub(super) fn join(&mut self, range: LblkRange) {
        if planted::is(Bug::WholeRequestsOff) {
            return;
        }
        let before_last = range.start.0..range.end().saturating_sub(1).max(range.start.0);
        for (_, block) in self.blocks.range_mut(before_last) {
            if let Some(waiting) = &mut block.waiting {
                waiting.joined = true;
            }
        }
    }

    /// The waiting blocks that are joined to a waiting block, directly or over others.
    pub(super) fn group(&self, seed: u64) -> LblkRange {
        let joined = |lblk: u64| {
            self.blocks.get(&lblk).and_then(|b| b.waiting.as_ref()).is_some_and(|v| v.joined)
        };
        let is_waiting = |lblk: u64| self.blocks.get(&lblk).is_some_and(|b| b.waiting.is_some());
        let (mut start, mut end) = (seed, seed + 1);
        let mut gaps = usize::from(self.is_kept(seed));
        let is_short = |len, gaps| len < GROUP_BLOCKS_MAX && gaps < GAPS_MAX;
        while start > 0 && joined(start - 1) && is_short(end - start, gaps) {
            start -= 1;
            gaps += usize::from(self.is_kept(start) && !self.is_kept(start + 1));
        }
        while joined(end - 1) && is_waiting(end) && is_short(end - start, gaps) {
            gaps += usize::from(self.is_kept(end) && !self.is_kept(end - 1));
            end += 1;
        }
        LblkRange::new(start, end - start)
    }

    /// A group and its neighbours, whole groups as long as the limit allows. Grows forward first:
    /// a sequential writer's data then leaves in its own order.
    pub(super) fn run_around(&self, group: LblkRange, limit: PickLimit) -> LblkRange {
        let (mut start, mut end) = (group.start.0, group.end());
        let fits = |more: LblkRange, len: u64| {
            limit.within.is_none_or(|range| range.overlaps(more))
                && len + more.len <= limit.blocks_max
                && (more.start.0..more.end()).all(|lblk| self.is_ready(lblk))
                // With its gaps it might be too many ranges: it has its own turn.
                && self.gaps(more) == 0
        };
        while end - start < limit.blocks_max && self.is_ready(end) {
            let more = self.group(end);
            if more.start.0 != end || !fits(more, end - start) {
                break;
            }
            end = more.end();
        }
        while end - start < limit.blocks_max && start > 0 && self.is_ready(start - 1) {
            let more = self.group(start - 1);
            if more.end() != start || !fits(more, end - start) {
                break;
            }
            start = more.start.0;
        }
        LblkRange::new(start, end - start)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use endio_types::{BLOCK_BYTES, Lblk};

    use super::super::{CleanRun, LogBlock};
    use super::*;

    fn range(start: u64, len: u64) -> LblkRange {
        LblkRange::new(start, len)
    }

    fn put(map: &mut DirtyMap<u64>, start: u64, len: u64, lsn: u64) {
        let end = (start + len) * BLOCK_BYTES;
        map.insert(range(start, len), Lsn(lsn), end, vec![lsn; len as usize]).unwrap();
    }

    /// Invariant `whole-requests`.
    #[test]
    fn what_is_left_of_a_write_around_a_newer_one_is_picked_with_it() {
        let mut map = DirtyMap::new();
        put(&mut map, 0, 10, 1);
        put(&mut map, 4, 2, 2);
        assert_eq!(map.pick(PickLimit::blocks(3)).unwrap().range, range(0, 10));
        let mut replayed = DirtyMap::new();
        put(&mut replayed, 0, 4, 1);
        put(&mut replayed, 6, 4, 1);
        put(&mut replayed, 4, 2, 2);
        replayed.rejoin(range(0, 10), Lsn(1));
        assert_eq!(replayed.pick(PickLimit::blocks(3)).unwrap().range, range(0, 10));
    }

    /// Invariant `whole-requests`, seed 27580640: the newer writes lie over all of the older one.
    #[test]
    fn what_was_written_over_a_write_before_a_restart_is_picked_with_all_that_it_was_written_over()
    {
        let mut map = DirtyMap::new();
        put(&mut map, 0, 3, 1);
        put(&mut map, 0, 1, 2);
        put(&mut map, 1, 2, 3);
        let mut replayed = DirtyMap::new();
        put(&mut replayed, 0, 1, 2);
        put(&mut replayed, 1, 2, 3);
        assert!(replayed.insert_logged(LogBlock {
            lblk: Lblk(3),
            end_bytes: 1,
            lsn: Lsn(9),
            data: 9
        }));
        assert_eq!(replayed.oldest_lsn(), Some(Lsn(2)));
        for map in [&mut map, &mut replayed] {
            map.rejoin(range(0, 3), Lsn(1));
            // A restart after this one needs the older record again.
            assert_eq!((map.oldest_lsn(), map.pending_blocks_up_to(Lsn(1))), (Some(Lsn(1)), 3));
            let picked =
                map.pick(PickLimit { up_to: Some(Lsn(1)), ..PickLimit::blocks(1) }).unwrap();
            assert_eq!((picked.range, picked.max_lsn), (range(0, 3), Lsn(3)));
            let runs = map.complete(picked.io).unwrap().runs;
            let run = |start, len, up_to| CleanRun { range: range(start, len), up_to: Lsn(up_to) };
            assert_eq!(runs, [run(0, 1, 2), run(1, 2, 3)]);
        }
        assert!(map.is_clean());
        // What only the data log has, and what is on its way there.
        assert_eq!((replayed.oldest_lsn(), replayed.pending_up_to(Lsn(9))), (Some(Lsn(9)), false));
        replayed.rejoin(range(3, 1), Lsn(4));
        assert_eq!((replayed.oldest_lsn(), replayed.pending_up_to(Lsn(9))), (Some(Lsn(4)), false));
        put(&mut replayed, 4, 1, 10);
        let asked = replayed.gather_for_log(Lsn(10), 8).unwrap().unwrap();
        replayed.rejoin(range(3, 2), Lsn(2));
        assert!(replayed.pending_up_to(Lsn(2)));
        replayed.log_ended(asked.number, true);
        assert_eq!((replayed.oldest_lsn(), replayed.pending_up_to(Lsn(10))), (Some(Lsn(2)), false));
        assert_eq!(replayed.pick(PickLimit::blocks(1)).unwrap().range, range(3, 2));
        // Under a write-out nothing changes.
        replayed.rejoin(range(3, 2), Lsn(1));
        assert_eq!(replayed.oldest_lsn(), Some(Lsn(2)));
    }

    #[test]
    fn a_group_that_is_too_long_is_cut() {
        let mut map = DirtyMap::new();
        put(&mut map, 0, 2 * GROUP_BLOCKS_MAX, 1);
        assert_eq!(map.pick(PickLimit::blocks(1)).unwrap().range.len, GROUP_BLOCKS_MAX);
        assert_eq!(map.pick(PickLimit::blocks(1)).unwrap().range.len, GROUP_BLOCKS_MAX);
        assert_eq!(map.pick(PickLimit::blocks(1)), None);
    }
}
