//! Records that newer ones have been written over, while a log is read.

use std::collections::BTreeMap;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_types::{LblkRange, VolumeId};

/// Of each block, the records that have it besides the newest, and that are not known to be converted. Their
/// data is of no use, but what they held together still has to be converted together.
#[derive(Debug, Default)]
pub(super) struct Hidden {
    blocks: BTreeMap<VolumeId, BTreeMap<u64, Vec<Lsn>>>,
}

impl Hidden {
    /// A newer record has a block that record `lsn` had.
    pub(super) fn hide(&mut self, volume: VolumeId, lblk: u64, lsn: Lsn) {
        self.blocks.entry(volume).or_default().entry(lblk).or_default().push(lsn);
    }

    /// Forgets what a run covers.
    pub(super) fn clean(&mut self, volume: VolumeId, run: CleanRun) {
        let Some(blocks) = self.blocks.get_mut(&volume) else { return };
        let is_over = |_: &u64, lsns: &mut Vec<Lsn>| {
            lsns.retain(|lsn| *lsn > run.up_to);
            lsns.is_empty()
        };
        blocks.extract_if(run.range.start.0..run.range.end(), is_over).for_each(drop);
    }

    /// The blocks of each record, ascending, that it has besides the newest.
    pub(super) fn by_record(&self) -> BTreeMap<Lsn, Vec<LblkRange>> {
        let mut records: BTreeMap<Lsn, Vec<LblkRange>> = BTreeMap::new();
        for (lblk, lsns) in self.blocks.values().flatten() {
            for lsn in lsns {
                records.entry(*lsn).or_default().push(LblkRange::new(*lblk, 1));
            }
        }
        records
    }
}
