//! One write-out: blocks from all over a volume that leave in one io_end.

use endio_types::{BLOCK_BYTES, IO_END_RANGES_MAX, LblkRange};

use super::Lsn;
use super::dirty::{CleanRun, DirtyError, DirtyMap, PickLimit, Picked};

/// What one write-out takes along; under writeback until it has ended, by exactly one
/// [`complete`](Self::complete) or [`fail`](Self::fail).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gathered<D> {
    /// Ascending; at least one.
    picks: Vec<Picked<D>>,
}

impl<D: Clone> Gathered<D> {
    /// Puts what the limit allows under writeback. `None`: there is nothing.
    pub fn pick(dirty: &mut DirtyMap<D>, limit: PickLimit, in_place: bool) -> Option<Self> {
        // What is written in place has its places already: one range at a time.
        let ranges_max = if in_place { 1 } else { IO_END_RANGES_MAX };
        let picks = dirty.gather(limit, ranges_max);
        (!picks.is_empty()).then_some(Self { picks })
    }

    /// The blocks to write; ascending, without overlap. Empty: the stores hold all of it already, and
    /// it is complete.
    pub fn ranges(&self) -> Vec<LblkRange> {
        self.picks.iter().flat_map(|picked| &picked.written).copied().collect()
    }

    /// How many blocks are to be written.
    pub fn blocks(&self) -> u64 {
        self.picks.iter().map(|picked| picked.data.len() as u64).sum()
    }

    /// The data of each block, in the order of the ranges.
    pub fn data(&self) -> impl Iterator<Item = &D> {
        self.picks.iter().flat_map(|picked| &picked.data)
    }

    /// Newest record that it covers: see [`Picked::max_lsn`].
    pub fn max_lsn(&self) -> Lsn {
        self.picks.iter().map(|picked| picked.max_lsn).max().unwrap_or(Lsn(0))
    }

    /// Where the volume's data ends, as far as these blocks show: see [`Picked::end_bytes`].
    pub fn end_bytes(&self) -> u64 {
        self.picks.iter().map(|picked| picked.end_bytes).max().unwrap_or(0)
    }

    /// What the data log has of the blocks up to this number ends with their conversion: see
    /// [`Picked::logged_up_to`].
    pub fn logged_up_to(&self) -> u64 {
        self.picks.iter().map(|picked| picked.logged_up_to).min().unwrap_or(0)
    }

    /// Where the first block begins in the volume, bytes.
    pub fn start_bytes(&self) -> u64 {
        self.picks.first().map_or(0, |picked| picked.range.start.0 * BLOCK_BYTES)
    }

    /// The conversion is durable. Returns what the log may say is clean.
    ///
    /// # Errors
    /// [`DirtyError::UnknownWriteOut`] if a part has ended before; the others have ended now.
    pub fn complete(&self, dirty: &mut DirtyMap<D>) -> Result<Vec<CleanRun>, DirtyError> {
        let mut clean = Vec::with_capacity(self.picks.len());
        let mut outcome = Ok(());
        for picked in &self.picks {
            match dirty.complete(picked.io) {
                Ok(completed) => clean.extend(completed.runs),
                Err(error) => outcome = Err(error),
            }
        }
        outcome.map(|()| clean)
    }

    /// It ended without conversion. Returns for how many blocks credit is free, because newer data
    /// waits or they were discarded.
    pub fn fail(&self, dirty: &mut DirtyMap<D>) -> u64 {
        let failed = self.picks.iter().map(|picked| dirty.fail(picked.io));
        failed.map(|failed| failed.map_or(0, |failed| failed.credit_freed_blocks)).sum()
    }
}
