//! Which blocks the log holds data for.

use std::collections::{BTreeMap, VecDeque};

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::groups::joined;
use endio_types::{LblkRange, VolumeId};

/// Newest record of each block that is not known, durably, to be converted.
#[derive(Debug, Default)]
pub(super) struct Live {
    blocks: BTreeMap<VolumeId, BTreeMap<u64, Lsn>>,
    /// `Clean` records that are not durable yet: they count only when they are.
    pending: VecDeque<(Lsn, VolumeId, CleanRun)>,
}

impl Live {
    pub(super) fn wrote(&mut self, lsn: Lsn, volume: VolumeId, range: LblkRange) {
        self.wrote_over(lsn, volume, range, |_, _| ());
    }

    /// As [`wrote`](Self::wrote); tells of which blocks, ascending, it was written over which record.
    pub(super) fn wrote_over(
        &mut self,
        lsn: Lsn,
        volume: VolumeId,
        range: LblkRange,
        mut over: impl FnMut(u64, Lsn),
    ) {
        let blocks = self.blocks.entry(volume).or_default();
        for lblk in range.start.0..range.end() {
            if let Some(older) = blocks.insert(lblk, lsn) {
                over(lblk, older);
            }
        }
    }

    /// A `Clean` record with number `lsn` was appended.
    pub(super) fn will_clean(&mut self, lsn: Lsn, volume: VolumeId, run: CleanRun) {
        self.pending.push_back((lsn, volume, run));
    }

    /// Everything up to `durable` is durable.
    pub(super) fn durable(&mut self, durable: Lsn) {
        while let Some((lsn, volume, run)) = self.pending.front().copied() {
            if lsn > durable {
                break;
            }
            self.pending.pop_front();
            self.clean(volume, run);
        }
    }

    /// All that a volume has in the log up to a record, of use to nobody once it is closed.
    pub(super) fn all(up_to: Lsn) -> CleanRun {
        CleanRun { range: LblkRange::new(0, u64::MAX), up_to }
    }

    /// Forgets the blocks of a run whose newest record it covers.
    pub(super) fn clean(&mut self, volume: VolumeId, run: CleanRun) {
        let Some(blocks) = self.blocks.get_mut(&volume) else { return };
        let covered: Vec<u64> = blocks
            .range(run.range.start.0..run.range.end())
            .filter(|(_, lsn)| **lsn <= run.up_to)
            .map(|(lblk, _)| *lblk)
            .collect();
        for lblk in covered {
            blocks.remove(&lblk);
        }
        if blocks.is_empty() {
            self.blocks.remove(&volume);
        }
    }

    /// Records before `first` are no longer in the log.
    pub(super) fn trimmed(&mut self, first: Lsn) {
        self.blocks.retain(|_, blocks| {
            blocks.retain(|_, lsn| *lsn >= first);
            !blocks.is_empty()
        });
    }

    pub(super) fn holds(&self, volume: VolumeId, range: LblkRange) -> bool {
        self.blocks
            .get(&volume)
            .is_some_and(|blocks| blocks.range(range.start.0..range.end()).next().is_some())
    }

    /// The parts of a record's range of which it is the newest record.
    pub(super) fn parts(&self, lsn: Lsn, volume: VolumeId, range: LblkRange) -> Vec<LblkRange> {
        let Some(blocks) = self.blocks.get(&volume) else { return Vec::new() };
        let newest = blocks.range(range.start.0..range.end()).filter(|(_, newest)| **newest == lsn);
        joined(newest.map(|(lblk, _)| LblkRange::new(*lblk, 1)))
    }
}
