//! Dirty blocks that the stores hold already.
//!
//! A conversion may be durable although its writeback never heard so: the process died before it
//! noted the end, a power loss took the note, or the session broke. The blocks are dirty then and
//! want the space that the conversion has used up. Full stores cannot promise it a second time, and
//! no write-out begins without a promise: what the map shows with just these bytes is clean instead.
//!
//! Newer writes may lie over both ends of such a request, or the bytes may be the same by accident.
//! So its middle does not go while the ends are dirty: it is *kept*, holds the group together, wants
//! no space and is not written. The ends leave in one io_end, and the middle is clean with them:
//!
//! ```text
//!   waits ── take_stored ──► kept ──► under write-out ── complete ──► clean
//!     ▲                      │  ▲            │
//!     └────── rewritten ─────┘  └─── fail ───┘
//! ```

use std::collections::BTreeMap;

use endio_types::{IO_END_RANGES_MAX, Lblk, LblkRange};

use super::{Block, CleanRun, DirtyMap, Flight, GROUP_BLOCKS_MAX, Version, push_run};
use crate::writeback::Lsn;

/// Most runs of kept blocks in a group that is picked as a whole: what is between them is one io_end.
pub(super) const GAPS_MAX: usize = IO_END_RANGES_MAX - 1;

/// Most runs of kept blocks that [`DirtyMap::take_stored`] makes in a chain: writes cut them later.
const GAPS_TAKEN_MAX: usize = IO_END_RANGES_MAX / 2;

/// What [`DirtyMap::take_stored`] did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settled {
    /// For `Clean` records; ascending.
    pub clean: Vec<CleanRun>,
    /// Blocks that stay only to hold what is left of one write together; ascending. The log must go
    /// on to have them.
    pub kept: Vec<Lblk>,
    /// Blocks whose credit is free: of all that is not dirty any more and was until now.
    pub credit_freed_blocks: u64,
}

/// A version that waits, under no write-out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Waiting<D> {
    /// The block.
    pub lblk: Lblk,
    /// Newest record in it.
    pub lsn: Lsn,
    /// Where the volume's data ends, in bytes, as far as this block shows.
    pub end_bytes: u64,
    /// Its data.
    pub data: D,
    /// The data log has it, had it, or may have it (no answer said so), in this or an older version:
    /// what the log still has is put back by whoever opens the volume next, so the block must not be
    /// taken as clean before.
    pub is_logged: bool,
}

impl<D: Clone> DirtyMap<D> {
    /// Everything that waits to be written, ascending, without blocks of which a write-out carries a
    /// version.
    pub fn waiting(&self) -> impl Iterator<Item = Waiting<D>> + '_ {
        self.blocks.iter().filter(|(_, block)| block.flight.is_none()).filter_map(
            |(lblk, block)| {
                let version = block.waiting.as_ref().filter(|version| !version.is_kept)?;
                Some(Waiting {
                    lblk: Lblk(*lblk),
                    lsn: version.lsn,
                    end_bytes: version.end_bytes,
                    data: version.data.clone(),
                    is_logged: version.log.may_be_logged(),
                })
            },
        )
    }

    /// Takes blocks as clean whose version the map shows already, durably, and whose record is durable:
    /// by block, the newest record of the version that was compared. What was rewritten since stays
    /// dirty. What lies in the middle of a chain of joined blocks is kept: without it the ends of one
    /// write would leave apart.
    ///
    /// Nothing while a write-out is under way: what it carries may come back into a chain.
    pub fn take_stored(&mut self, stored: &BTreeMap<u64, Lsn>) -> Settled {
        let mut settled = Settled::default();
        if !self.write_outs.is_empty() {
            return settled;
        }
        for chain in self.chains() {
            let is_stored = |lblk: &u64| {
                let version = self.blocks.get(lblk).and_then(|block| block.waiting.as_ref());
                version.is_some_and(|v| v.is_kept || stored.get(lblk) == Some(&v.lsn))
            };
            let (start, end) = (chain.start.0, chain.end());
            let head = (start..end).take_while(is_stored).count() as u64;
            let tail = (start + head..end).rev().take_while(is_stored).count() as u64;
            let middle = start + head..end - tail;
            let kept: Vec<u64> = middle.clone().filter(is_stored).collect();
            if !middle.is_empty() && tail > 0 {
                self.unjoin(middle.end - 1);
            }
            for lblk in (start..middle.start).chain(middle.end..end) {
                self.drop_waiting(lblk, &mut settled);
            }
            if middle.end - middle.start <= GROUP_BLOCKS_MAX {
                self.keep(kept, &mut settled);
            }
        }
        settled
    }

    /// Keeps blocks of one chain.
    fn keep(&mut self, lblks: Vec<u64>, settled: &mut Settled) {
        let (mut gaps, mut next) = (0, None);
        for lblk in lblks {
            gaps += usize::from(next != Some(lblk));
            next = Some(lblk + 1);
            let version = self.blocks.get(&lblk).and_then(|block| block.waiting.clone());
            // What is on its way into the data log wants the space of what is there.
            let version = version.filter(|version| !version.is_kept && !version.log.is_asked());
            let Some(mut version) = version else { continue };
            if gaps > GAPS_TAKEN_MAX {
                return;
            }
            self.forget(&version, lblk, false);
            version.log.stored(version.since);
            version.is_kept = true;
            self.remember(&version, lblk, false);
            self.set_waiting(lblk, version);
            self.waiting_blocks -= 1;
            self.kept_blocks += 1;
            settled.kept.push(Lblk(lblk));
            settled.credit_freed_blocks += 1;
        }
    }

    /// Removes the version of a block that waits and is kept.
    pub(super) fn take_kept(&mut self, lblk: u64) -> Option<Version<D>> {
        if self.kept_blocks == 0 {
            return None;
        }
        let block = self.blocks.get_mut(&lblk)?;
        let version = block.waiting.take_if(|version| version.is_kept)?;
        self.ready.remove(&(version.since, lblk));
        self.forget(&version, lblk, false);
        self.kept_blocks -= 1;
        Some(version)
    }

    /// After a write-out failed: a block that it took along as kept is kept as before, unless newer
    /// data waits or it was discarded.
    pub(super) fn keep_again(&mut self, lblk: u64, flight: Flight<D>) {
        let Flight { version, discarded, .. } = flight;
        let waiting = self.blocks.get_mut(&lblk).and_then(|block| block.waiting.as_mut());
        match waiting {
            _ if discarded => self.kept_blocks -= 1,
            Some(newer) => {
                newer.joined |= version.joined;
                newer.log.follows(&version.log);
                self.kept_blocks -= 1;
            }
            None => {
                self.remember(&version, lblk, false);
                self.set_waiting(lblk, version);
            }
        }
    }

    /// Whether a block waits and is kept.
    pub(super) fn is_kept(&self, lblk: u64) -> bool {
        let waiting = |block: &Block<D>| block.waiting.as_ref().is_some_and(|v| v.is_kept);
        self.kept_blocks > 0 && self.blocks.get(&lblk).is_some_and(waiting)
    }

    /// Runs of kept blocks in a range.
    pub(super) fn gaps(&self, range: LblkRange) -> usize {
        if self.kept_blocks == 0 {
            return 0;
        }
        let is_first = |lblk: &u64| *lblk == range.start.0 || !self.is_kept(*lblk - 1);
        let kept = (range.start.0..range.end()).filter(|lblk| self.is_kept(*lblk));
        kept.filter(is_first).count()
    }

    /// Runs of waiting blocks that writes have joined.
    fn chains(&self) -> Vec<LblkRange> {
        let mut chains: Vec<LblkRange> = Vec::new();
        let mut goes_on = None;
        for (lblk, block) in &self.blocks {
            let Some(version) = &block.waiting else { continue };
            match chains.last_mut().filter(|_| goes_on == Some(*lblk)) {
                Some(chain) => chain.len += 1,
                None => chains.push(LblkRange::new(*lblk, 1)),
            }
            goes_on = version.joined.then_some(lblk + 1);
        }
        chains
    }

    fn unjoin(&mut self, lblk: u64) {
        if let Some(Block { waiting: Some(version), .. }) = self.blocks.get_mut(&lblk) {
            version.joined = false;
        }
    }

    fn drop_waiting(&mut self, lblk: u64, settled: &mut Settled) {
        let kept = self.take_kept(lblk);
        let is_kept = kept.is_some();
        let waiting = self.blocks.remove(&lblk).and_then(|block| block.waiting);
        let Some(version) = kept.or(waiting) else { return };
        if !is_kept {
            self.ready.remove(&(version.since, lblk));
            self.forget(&version, lblk, false);
            self.waiting_blocks -= 1;
            settled.credit_freed_blocks += 1;
        }
        push_run(&mut settled.clean, lblk, version.lsn);
    }
}

#[cfg(test)]
mod tests {
    use endio_types::BLOCK_BYTES;

    use super::super::{PickLimit, WriteOutId};
    use super::*;

    fn map(writes: &[(u64, u64, u64)]) -> DirtyMap<u64> {
        let mut map = DirtyMap::new();
        for (start, len, lsn) in writes {
            let end = (start + len) * BLOCK_BYTES;
            let data = vec![*lsn; *len as usize];
            let used = map.insert(LblkRange::new(*start, *len), Lsn(*lsn), end, data);
            assert!(used.is_ok());
        }
        map
    }

    fn stored(blocks: impl IntoIterator<Item = (u64, u64)>) -> BTreeMap<u64, Lsn> {
        blocks.into_iter().map(|(lblk, lsn)| (lblk, Lsn(lsn))).collect()
    }

    fn run(start: u64, len: u64, up_to: u64) -> CleanRun {
        CleanRun { range: LblkRange::new(start, len), up_to: Lsn(up_to) }
    }

    #[test]
    fn what_is_stored_is_clean_and_nothing_waits_for_it() {
        let mut map = map(&[(0, 3, 1), (10, 1, 2)]);
        assert_eq!(map.waiting().count(), 4);
        let settled = map.take_stored(&stored([(0, 1), (1, 1), (2, 1)]));
        assert_eq!((settled.clean, settled.credit_freed_blocks), (vec![run(0, 3, 1)], 3));
        assert_eq!((map.waiting_blocks(), map.oldest_lsn()), (1, Some(Lsn(2))));
        assert_eq!(map.pick(PickLimit::blocks(9)).map(|p| p.range), Some(LblkRange::new(10, 1)));
        assert_eq!(map.complete(WriteOutId(1)).map(|done| done.cleaned_blocks), Ok(1));
        assert!(map.is_clean());
    }

    #[test]
    fn what_was_rewritten_since_or_is_under_a_write_out_stays_dirty() {
        let mut map = map(&[(0, 1, 1), (5, 2, 2), (5, 1, 3)]);
        assert_eq!(map.take_stored(&stored([(5, 2)])), Settled::default());
        let within = Some(LblkRange::new(0, 1));
        let picked = map.pick(PickLimit { within, ..PickLimit::blocks(1) });
        assert_eq!(picked.map(|picked| picked.range), Some(LblkRange::new(0, 1)));
        assert_eq!(map.waiting().count(), 2);
        let settled = map.take_stored(&stored([(5, 3), (6, 2)]));
        assert_eq!(settled, Settled::default(), "a write-out is under way");
        assert!(map.complete(WriteOutId(1)).is_ok());
        assert_eq!(map.take_stored(&stored([(0, 1), (7, 1)])), Settled::default());
        let settled = map.take_stored(&stored([(5, 3), (6, 2)]));
        assert_eq!(settled.clean, [run(5, 1, 3), run(6, 1, 2)]);
    }

    #[test]
    fn the_rest_of_one_write_still_leaves_together() {
        let mut map = map(&[(0, 7, 1)]);
        let settled = map.take_stored(&stored([(0, 1), (1, 1), (3, 1), (6, 1)]));
        assert_eq!(settled.clean, [run(0, 2, 1), run(6, 1, 1)]);
        assert_eq!((settled.kept, settled.credit_freed_blocks), (vec![Lblk(3)], 4));
        let picked = map.pick(PickLimit::blocks(1)).map(|picked| picked.range);
        assert_eq!(picked, Some(LblkRange::new(2, 4)), "whole-requests");
        // What comes next to it since is a write of its own.
        let mut other = self::map(&[(0, 2, 1)]);
        other.take_stored(&stored([(1, 1)]));
        assert!(other.insert(LblkRange::new(1, 1), Lsn(2), 2 * BLOCK_BYTES, vec![2]).is_ok());
        let picked = other.pick(PickLimit::blocks(1)).map(|picked| picked.range);
        assert_eq!(picked, Some(LblkRange::new(0, 1)));
    }

    /// A request of blocks 0 to 4 was converted unheard; newer writes lie over both of its ends.
    fn converted_unheard() -> DirtyMap<u64> {
        let mut map = map(&[(0, 5, 1), (0, 2, 2), (4, 1, 3)]);
        let settled = map.take_stored(&stored([(2, 1), (3, 1)]));
        let kept = vec![Lblk(2), Lblk(3)];
        assert_eq!(settled, Settled { clean: Vec::new(), kept, credit_freed_blocks: 2 });
        assert_eq!(map.waiting().map(|w| w.lblk.0).collect::<Vec<_>>(), [0, 1, 4]);
        map
    }

    /// Invariants `whole-requests` and `stored-is-clean`, seed 450218.
    #[test]
    fn the_middle_of_a_request_wants_no_space_and_its_ends_leave_together() {
        let mut map = converted_unheard();
        assert_eq!((map.waiting_blocks(), map.read(Lblk(2))), (3, Some(&1)));
        assert_eq!(map.oldest_lsn(), Some(Lsn(1)), "a replay must find what holds it together");
        let picks = map.gather(PickLimit::blocks(1), 1);
        let written: Vec<LblkRange> = picks.iter().flat_map(|p| p.written.clone()).collect();
        assert_eq!(written, [LblkRange::new(0, 2), LblkRange::new(4, 1)]);
        assert_eq!((picks[0].data.as_slice(), map.in_flight_blocks()), (&[2, 2, 3][..], 3));
        // It fails: all is as it was.
        let failed = map.fail(picks[0].io).map(|failed| failed.credit_freed_blocks);
        assert_eq!((failed, map.waiting_blocks()), (Ok(0), 3));
        let again =
            map.pick(PickLimit { within: Some(LblkRange::new(3, 1)), ..PickLimit::blocks(9) });
        assert_eq!(again.as_ref().map(|p| &p.written), Some(&written), "from the middle, too");
        let done = map.complete(WriteOutId(2)).map(|done| done.runs);
        assert_eq!(done, Ok(vec![run(0, 2, 2), run(2, 2, 1), run(4, 1, 3)]));
        assert!(map.is_clean());
    }

    #[test]
    fn what_is_kept_is_not_logged_and_flushes_do_not_wait_for_it() {
        let mut map = converted_unheard();
        assert_eq!((map.pending_blocks_up_to(Lsn(9)), map.logged_blocks()), (3, 0));
        let pick = map.gather_for_log(Lsn(9), 9).ok().flatten();
        let logged = pick.map(|pick| pick.blocks.iter().map(|block| block.lblk.0).collect());
        assert_eq!(logged, Some(vec![0, 1, 4]), "whole-requests");
        map.log_ended(1, true);
        assert_eq!((map.pending_up_to(Lsn(9)), map.logged_blocks()), (false, 3));
        assert_eq!(map.unconverted_blocks_up_to(Lsn(9)), 5);
    }

    #[test]
    fn what_is_written_over_what_is_kept_wants_space_and_leaves_with_the_rest() {
        let mut map = converted_unheard();
        assert_eq!(map.credit_needed(LblkRange::new(2, 1)), 1);
        let used = map.insert(LblkRange::new(2, 1), Lsn(4), 3 * BLOCK_BYTES, vec![4]);
        assert_eq!((used, map.waiting_blocks()), (Ok(1), 4));
        let picked = map.pick(PickLimit::blocks(1));
        let written = picked.map(|picked| picked.written);
        assert_eq!(written, Some(vec![LblkRange::new(0, 3), LblkRange::new(4, 1)]));
        // Over what a write-out takes along: it waits, and does not come back twice.
        assert!(map.insert(LblkRange::new(3, 1), Lsn(5), 4 * BLOCK_BYTES, vec![5]).is_ok());
        assert!(map.fail(WriteOutId(1)).is_ok());
        let written = map.pick(PickLimit::blocks(1)).map(|picked| picked.written);
        assert_eq!(written, Some(vec![LblkRange::new(0, 5)]));
        assert!(map.complete(WriteOutId(2)).is_ok() && map.is_clean());
    }

    #[test]
    fn what_is_kept_goes_when_nothing_is_left_to_hold_together() {
        let mut map = converted_unheard();
        let settled = map.take_stored(&stored([(4, 3)]));
        assert_eq!(
            (settled.clean, settled.credit_freed_blocks),
            (vec![run(2, 2, 1), run(4, 1, 3)], 1)
        );
        let written = map.pick(PickLimit::blocks(1)).map(|picked| picked.written);
        assert_eq!(written, Some(vec![LblkRange::new(0, 2)]));
        let mut map = converted_unheard();
        assert_eq!(map.discard(LblkRange::new(0, 2)).credit_freed_blocks, 2);
        assert_eq!(map.discard(LblkRange::new(4, 1)).credit_freed_blocks, 1);
        let picked = map.pick(PickLimit::blocks(9));
        assert_eq!(picked.map(|p| (p.range, p.written)), Some((LblkRange::new(2, 2), Vec::new())));
        assert!(map.complete(WriteOutId(1)).is_ok() && map.is_clean());
    }

    #[test]
    fn a_group_has_no_more_parts_than_an_io_end_takes() {
        let blocks = 2 * IO_END_RANGES_MAX as u64 + 1;
        let mut map = map(&[(0, blocks, 1)]);
        let odd = (0..blocks / 2).map(|at| (2 * at + 1, 1));
        let settled = map.take_stored(&stored(odd.clone()));
        assert_eq!(settled.kept.len(), GAPS_TAKEN_MAX);
        let picks = map.gather(PickLimit::blocks(1024), IO_END_RANGES_MAX);
        assert_eq!(picks.iter().map(|picked| picked.written.len()).collect::<Vec<_>>(), [129]);
        // Many such chains, joined afterwards.
        let chains = (0..12).map(|at| (64 * at, 64, 1));
        let mut map = self::map(&chains.collect::<Vec<_>>());
        map.take_stored(&stored(
            (0..768).filter(|lblk| lblk % 2 == 1 && lblk % 64 != 63).map(|lblk| (lblk, 1)),
        ));
        map.join(LblkRange::new(0, 768));
        while !map.is_clean() {
            let picks = map.gather(PickLimit::blocks(1024), IO_END_RANGES_MAX);
            assert!(!picks.is_empty());
            assert!(picks.iter().map(|p| p.written.len()).sum::<usize>() <= IO_END_RANGES_MAX);
            for picked in picks {
                assert!(map.complete(picked.io).is_ok());
            }
        }
    }
}
