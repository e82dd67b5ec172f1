//! What the conversion service sees of its metadata.

use std::any::Any;
use std::sync::Arc;

use bytes::Bytes;
use endio_state_machine::extent_map::ChunkTable;

use super::MetaError;
use super::checkpoint::Checkpointer;
use super::journal::{Journal, Records};

/// Sizes and bounds of a metadata directory.
#[derive(Clone, Debug)]
pub struct MetaOptions {
    /// A journal segment is closed when it is longer than this, in bytes. Too small makes many
    /// files; too large keeps space longer than needed after a checkpoint.
    pub segment_bytes: u64,
    /// Memory for decoded chunks, in bytes. Too small decodes the same chunk again and again.
    pub chunk_cache_bytes: usize,
    /// Memory for sled's own pages, in bytes.
    pub sled_cache_bytes: u64,
    /// Size of the file that is given up when the disk is full, in bytes. It must be larger than
    /// what all accepted work can still write to the journal. 0 for none.
    pub ballast_bytes: u64,
    /// A checkpoint is due when the journal since the last one is longer than this and longer
    /// than that checkpoint, in bytes. Too small writes the map again and again; too large makes
    /// recovery slow.
    pub checkpoint_journal_bytes: u64,
}

impl Default for MetaOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            chunk_cache_bytes: 128 << 20,
            sled_cache_bytes: 64 << 20,
            ballast_bytes: 64 << 20,
            checkpoint_journal_bytes: 64 << 20,
        }
    }
}

/// A place where metadata is kept.
pub trait MetaStore: Send {
    /// Opens it, exclusively, and finds out what is durable. Blocks; call it off the runtime.
    ///
    /// # Errors
    /// [`MetaError::Locked`] if it is open already, [`MetaError::Damaged`] if something that was
    /// durable cannot be read: the service must not start, an operator must look.
    fn open(&self) -> Result<Recovered, MetaError>;
}

/// What was found at open. The caller restores `snapshot`, applies every record of `records` to
/// its small state and to `table` (which skips what it has seen), and then goes on at `next_seq`.
/// The directory stays locked until table, journal and checkpointer are all dropped.
pub struct Recovered {
    /// Identity of the metadata, made when the directory was created.
    pub database_id: u64,
    /// The extent map: at least the state of the snapshot, perhaps newer.
    pub table: Box<dyn MetaTable>,
    /// The small state, and the sequence number of the last record that it contains.
    pub snapshot: Option<(u64, Bytes)>,
    /// The records after the snapshot, in order.
    pub records: Records,
    /// Where to commit. May be moved to its own thread.
    pub journal: Journal,
    /// Writes checkpoints.
    pub checkpointer: Checkpointer,
    /// The sequence number of the next record.
    pub next_seq: u64,
    /// Why the table of chunks was thrown away and rebuilt, if it was.
    pub rebuilt: Option<String>,
}

impl std::fmt::Debug for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovered")
            .field("database_id", &self.database_id)
            .field("snapshot", &self.snapshot.as_ref().map(|(seq, _)| seq))
            .field("next_seq", &self.next_seq)
            .field("rebuilt", &self.rebuilt)
            .finish_non_exhaustive()
    }
}

/// One committed record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its number; records are numbered without gaps, from 1.
    pub seq: u64,
    /// The cluster epoch under which it was committed.
    pub epoch: u64,
    /// What the caller gave to `append`.
    pub payload: Bytes,
}

/// A table of chunks with a disk behind it.
pub trait MetaTable: ChunkTable<Error = MetaError> + Send {
    /// Hands changed chunks to the disk store. Not a promise of durability: the journal is.
    fn flush_dirty(&mut self) -> Result<(), MetaError>;
    /// Writes everything out and marks the table as complete up to `durable_seq`, the last record
    /// that the journal made durable. The table must not be used afterwards. Without this call
    /// the next open rebuilds the table.
    ///
    /// # Errors
    /// [`MetaError::Misuse`] if a chunk contains a record later than `durable_seq`.
    fn close(&mut self, durable_seq: u64) -> Result<(), MetaError>;
    /// Sizes.
    fn stats(&self) -> TableStats;
}

/// Sizes of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableStats {
    /// Existing chunks.
    pub chunks: u64,
    /// Chunks held decoded in memory.
    pub cached: u64,
    /// Memory that these take, in bytes.
    pub cached_bytes: u64,
    /// Chunks whose changes are not yet in the disk store.
    pub dirty: u64,
    /// The latest record of which any chunk contains something, also one that it emptied.
    pub newest_seq: u64,
}

/// Keeps the directory for this process.
pub(crate) type DirLock = Arc<dyn Any + Send + Sync>;
