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
                push_block(records.entry(*lsn).or_default(), *lblk);
            }
        }
        records
    }
}

/// Appends a block behind ranges that ascend.
pub(super) fn push_block(ranges: &mut Vec<LblkRange>, lblk: u64) {
    match ranges.last_mut() {
        Some(last) if last.end() == lblk => last.len += 1,
        _ => ranges.push(LblkRange::new(lblk, 1)),
    }
}

/// The union of ranges that ascend with others that do; none overlaps another.
pub(super) fn union(one: &[LblkRange], other: &[LblkRange]) -> Vec<LblkRange> {
    let mut all: Vec<LblkRange> = [one, other].concat();
    all.sort_by_key(|range| range.start);
    let mut union: Vec<LblkRange> = Vec::new();
    for range in all {
        match union.last_mut() {
            Some(last) if last.end() == range.start.0 => last.len += range.len,
            _ => union.push(range),
        }
    }
    union
}
