//! What goes into the cache log, what comes out, and how it fails.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::groups::joined;
use endio_state_machine::writeback::sessions::RequestKey;
use endio_types::{Generation, LblkRange, Reason, VolumeId};

/// Sizes of a cache log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheLogOptions {
    /// A new segment file is begun when the active one is this large. At most a quarter of
    /// `max_bytes`, so that something can always be trimmed.
    pub segment_bytes: u64,
    /// Most bytes of all segments; writes beyond it are refused with [`CacheLogError::Full`].
    /// One sixteenth of it is kept for records that carry no data.
    pub max_bytes: u64,
    /// Most sessions remembered; those that were used longest ago are forgotten first.
    pub sessions_max: usize,
}

impl Default for CacheLogOptions {
    /// 64 MiB a segment, 2 GiB in all, 2048 sessions.
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, max_bytes: 2 << 30, sessions_max: 2048 }
    }
}

/// What is said about a buffered write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Generation under which it is open.
    pub generation: Generation,
    /// Whole blocks: edges have been merged. The payload has exactly this length.
    pub blocks: LblkRange,
    /// Where the client's write ends, in bytes: the payload may be padded beyond it.
    pub end_bytes: u64,
    /// The request, if it may be retried.
    pub request: Option<RequestKey>,
    /// What a duplicate of the request is answered with: bytes written.
    pub result: u64,
}

/// A write that is not known to be converted, from [`super::Replay`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplayedWrite {
    /// Its number.
    pub lsn: Lsn,
    /// What was said about it.
    pub write: WriteRecord,
    /// The blocks of it that are live: not cleaned and not overwritten by a newer record.
    /// Ascending. May be empty: then it only says what was one write.
    pub live: Vec<LblkRange>,
    /// The blocks of it that are not cleaned, overwritten or not: what of them is dirty has to be converted
    /// together, and the log has to keep this record until then. Ascending, not empty.
    pub unconverted: Vec<LblkRange>,
    /// Data of all blocks of `write.blocks`; empty if none is live.
    pub payload: bytes::Bytes,
}

impl ReplayedWrite {
    /// What the write still holds together: what of it is not converted, and the blocks of it that only the data
    /// log has. A replay cleans these in the cache log, because their newer version is in the other one.
    pub fn holds_together(&self, in_data_log: &BTreeSet<u64>) -> Vec<LblkRange> {
        let blocks = self.write.blocks;
        let is_known = |lblk: u64| {
            self.unconverted.iter().any(|range| range.overlaps(LblkRange::new(lblk, 1)))
        };
        let logged = in_data_log.range(blocks.start.0..blocks.end());
        let logged = logged.filter(|lblk| !is_known(**lblk)).map(|lblk| LblkRange::new(*lblk, 1));
        together(&self.unconverted, &logged.collect::<Vec<_>>())
    }

    /// The data of one live range; shares memory with the payload. `None` if it lies outside.
    pub fn data(&self, range: LblkRange) -> Option<bytes::Bytes> {
        let whole = self.write.blocks;
        if range.start < whole.start || range.end() > whole.end() {
            return None;
        }
        let block = endio_types::BLOCK_SIZE;
        let from = usize::try_from(range.start.0 - whole.start.0).ok()?.checked_mul(block)?;
        let len = usize::try_from(range.len).ok()?.checked_mul(block)?;
        let to = from.checked_add(len).filter(|to| *to <= self.payload.len())?;
        Some(self.payload.slice(from..to))
    }
}

/// Ranges of which none overlaps another, ascending, those that touch as one.
pub(super) fn together(some: &[LblkRange], others: &[LblkRange]) -> Vec<LblkRange> {
    let mut all = [some, others].concat();
    all.sort_by_key(|range| range.start);
    joined(all)
}

/// A volume that was open when the log ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// The generation under which it was open.
    pub generation: Generation,
}

/// Failure of the cache log.
#[derive(Debug, thiserror::Error)]
pub enum CacheLogError {
    /// The size bound is reached: delay the writer until write-out and [`trim`] made room.
    ///
    /// [`trim`]: super::CacheLog::trim
    #[error("the cache log is full: {used_bytes} of {max_bytes} bytes")]
    Full {
        /// Bytes of all segments.
        used_bytes: u64,
        /// The bound.
        max_bytes: u64,
    },
    /// The disk is full. The log is as it was before the record.
    #[error("no space left on the disk of the cache log")]
    DiskFull,
    /// The disk failed; the record is not in the log.
    #[error("cache log {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A flush failed before, or a failed write could not be taken back. Nothing is durable from
    /// there on and the log takes nothing more: stop, and open it again.
    #[error("the cache log failed before and is no longer used: {0}")]
    Poisoned(String),
    /// Another process has the directory.
    #[error("the cache directory {0} is in use by another process")]
    InUse(PathBuf),
    /// Bytes that were written are not there any more. Nothing was changed.
    #[error("the cache log is damaged: {path} at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The caller's record is impossible.
    #[error("not a valid record of the cache log: {0}")]
    Invalid(String),
    /// It was closed cleanly.
    #[error("the cache log is closed")]
    Closed,
}

impl CacheLogError {
    /// The reason that a client is told.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Full { .. } | Self::DiskFull => Reason::Limit,
            Self::Invalid(_) => Reason::Malformed,
            Self::Closed => Reason::Draining,
            Self::Io { .. } | Self::Poisoned(_) | Self::InUse(_) | Self::Damaged { .. } => {
                Reason::IoError
            }
        }
    }
}
