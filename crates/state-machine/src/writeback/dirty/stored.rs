//! Dirty blocks that the stores hold already.
//!
//! A conversion may be durable although its writeback never heard so: the process died before it
//! noted the end, a power loss took the note, or the session broke. The blocks are dirty then and
//! want the space that the conversion has used up. Full stores cannot promise it a second time, and
//! no write-out begins without a promise: what the map shows with just these bytes is clean instead.

use std::collections::BTreeMap;

use endio_types::{Lblk, LblkRange};

use super::{Block, CleanRun, DirtyMap, push_run};
use crate::writeback::Lsn;

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
    /// The data log has it, or had it, or may have it, in this or an older version: what the log still has is put
    /// back by whoever opens the volume next, so the block must not be taken as clean before.
    pub is_logged: bool,
}

impl<D: Clone> DirtyMap<D> {
    /// Everything that waits, ascending, without blocks of which a write-out carries a version.
    pub fn waiting(&self) -> impl Iterator<Item = Waiting<D>> + '_ {
        self.blocks.iter().filter(|(_, block)| block.flight.is_none()).filter_map(
            |(lblk, block)| {
                let version = block.waiting.as_ref()?;
                Some(Waiting {
                    lblk: Lblk(*lblk),
                    lsn: version.lsn,
                    end_bytes: version.end_bytes,
                    data: version.data.clone(),
                    is_logged: version.log.is_logged(),
                })
            },
        )
    }

    /// Takes blocks as clean whose version the map shows already: by block, the newest record of
    /// the version that was compared. What was rewritten since stays dirty. So does what lies in the
    /// middle of a chain of joined blocks: without it the ends of one write would leave apart.
    ///
    /// Returns what the log may say is clean; each of these blocks frees its credit. Nothing while a
    /// write-out is under way: what it carries may come back into a chain.
    pub fn take_stored(&mut self, stored: &BTreeMap<u64, Lsn>) -> Vec<CleanRun> {
        let mut clean = Vec::new();
        if !self.write_outs.is_empty() {
            return clean;
        }
        for chain in self.chains() {
            let is_stored = |lblk: &u64| {
                let lsn = self.blocks.get(lblk).and_then(|b| b.waiting.as_ref()).map(|v| v.lsn);
                lsn.is_some() && stored.get(lblk).copied() == lsn
            };
            let (start, end) = (chain.start.0, chain.end());
            let head = (start..end).take_while(is_stored).count() as u64;
            let tail = (start + head..end).rev().take_while(is_stored).count() as u64;
            if head + tail < chain.len && tail > 0 {
                self.unjoin(end - tail - 1);
            }
            for lblk in (start..start + head).chain(end - tail..end) {
                if let Some(lsn) = self.drop_waiting(lblk) {
                    push_run(&mut clean, lblk, lsn);
                }
            }
        }
        clean
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

    fn drop_waiting(&mut self, lblk: u64) -> Option<Lsn> {
        let version = self.blocks.remove(&lblk)?.waiting?;
        self.ready.remove(&(version.since, lblk));
        self.forget(&version, lblk, false);
        self.waiting_blocks -= 1;
        Some(version.lsn)
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
        let clean = map.take_stored(&stored([(0, 1), (1, 1), (2, 1)]));
        assert_eq!(clean, [run(0, 3, 1)]);
        assert_eq!((map.waiting_blocks(), map.oldest_lsn()), (1, Some(Lsn(2))));
        assert_eq!(map.pick(PickLimit::blocks(9)).map(|p| p.range), Some(LblkRange::new(10, 1)));
        assert_eq!(map.complete(WriteOutId(1)).map(|done| done.cleaned_blocks), Ok(1));
        assert!(map.is_clean());
    }

    #[test]
    fn what_was_rewritten_since_or_is_under_a_write_out_stays_dirty() {
        let mut map = map(&[(0, 1, 1), (5, 2, 2), (5, 1, 3)]);
        assert_eq!(map.take_stored(&stored([(5, 2)])), []);
        let within = Some(LblkRange::new(0, 1));
        let picked = map.pick(PickLimit { within, ..PickLimit::blocks(1) });
        assert_eq!(picked.map(|picked| picked.range), Some(LblkRange::new(0, 1)));
        assert_eq!(map.waiting().count(), 2);
        assert_eq!(map.take_stored(&stored([(5, 3), (6, 2)])), [], "a write-out is under way");
        assert!(map.complete(WriteOutId(1)).is_ok());
        assert_eq!(map.take_stored(&stored([(0, 1), (7, 1)])), []);
        assert_eq!(map.take_stored(&stored([(5, 3), (6, 2)])), [run(5, 1, 3), run(6, 1, 2)]);
    }

    #[test]
    fn the_rest_of_one_write_still_leaves_together() {
        let mut map = map(&[(0, 7, 1)]);
        let clean = map.take_stored(&stored([(0, 1), (1, 1), (3, 1), (6, 1)]));
        assert_eq!(clean, [run(0, 2, 1), run(6, 1, 1)]);
        let picked = map.pick(PickLimit::blocks(1)).map(|picked| picked.range);
        assert_eq!(picked, Some(LblkRange::new(2, 4)), "whole-requests");
        // What comes next to it since is a write of its own.
        let mut other = self::map(&[(0, 2, 1)]);
        other.take_stored(&stored([(1, 1)]));
        assert!(other.insert(LblkRange::new(1, 1), Lsn(2), 2 * BLOCK_BYTES, vec![2]).is_ok());
        let picked = other.pick(PickLimit::blocks(1)).map(|picked| picked.range);
        assert_eq!(picked, Some(LblkRange::new(0, 1)));
    }
}
