//! Interface.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use endio_state_machine::chunk::{Chunk, ChunkId};
use endio_state_machine::extent_map::{ChunkTable, MemoryTable};

use super::MetaError;

/// Sizes and bounds of a metadata directory.
#[derive(Clone, Debug)]
pub struct MetaOptions {
    /// A journal segment is closed when it is longer than this, in bytes.
    pub segment_bytes: u64,
    /// Memory for decoded chunks, in bytes.
    pub chunk_cache_bytes: usize,
    /// Memory for sled's own pages, in bytes.
    pub sled_cache_bytes: u64,
    /// Size of the file that is given up when the disk is full, in bytes.
    pub ballast_bytes: u64,
    /// A checkpoint is due when the journal since the last one is longer than this and longer
    /// than that checkpoint, in bytes.
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
    fn open(&self) -> Result<Recovered, MetaError>;
}

/// What was found at open. The caller restores `snapshot`, applies every record of `records` to
/// its small state and to `table` (the table skips what it has seen), and then goes on at
/// `next_seq`.
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

/// The records after the snapshot, read segment by segment. Ends after the first error.
pub struct Records(std::vec::IntoIter<Record>);

impl Iterator for Records {
    type Item = Result<Record, MetaError>;
    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(Ok)
    }
}

/// A table of chunks with a disk behind it.
pub trait MetaTable: ChunkTable<Error = MetaError> + Send {
    /// Hands changed chunks to the disk store. Not a promise of durability: the journal is.
    fn flush_dirty(&mut self) -> Result<(), MetaError>;
    /// Writes everything out and marks the table as complete up to `durable_seq`, the last record
    /// that the journal made durable. The table must not be used afterwards. Without this call
    /// the next open rebuilds the table.
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
}

/// Numbers of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct JournalStats {
    /// Last durable record; 0 if there is none.
    pub durable_seq: u64,
    /// Length of the journal that a restart would replay, in bytes.
    pub bytes_since_checkpoint: u64,
    /// Size of the last checkpoint, in bytes.
    pub checkpoint_bytes: u64,
    /// Groups committed since open: one `fdatasync` each.
    pub commits: u64,
    /// Whether the ballast was given up because the disk is full: accepted work still commits,
    /// new work is to be refused with `METADATA_FULL`.
    pub degraded: bool,
}

/// Reads the numbers of a journal from any thread.
#[derive(Clone)]
pub struct JournalHandle(Arc<Mutex<JournalStats>>);

impl JournalHandle {
    /// The numbers now.
    pub fn stats(&self) -> JournalStats {
        self.0.lock().map(|s| *s).unwrap_or_default()
    }
    /// Whether new work is to be refused because the metadata disk is full.
    pub fn is_degraded(&self) -> bool {
        self.stats().degraded
    }
}

/// The append-only commit journal.
pub struct Journal {
    last: u64,
    stats: Arc<Mutex<JournalStats>>,
}

impl Journal {
    /// Buffers a record; nothing is promised before [`Self::commit`]. `seq` is the last one + 1.
    pub fn append(&mut self, seq: u64, _epoch: u64, _payload: &[u8]) -> Result<(), MetaError> {
        if seq != self.last + 1 {
            return Err(MetaError::Misuse(format!("record {seq} after {}", self.last)));
        }
        self.last = seq;
        Ok(())
    }
    /// Makes everything appended durable with one `fdatasync` and returns the last durable
    /// number. After an error the journal refuses everything: whether the group is durable is
    /// unknown until a restart.
    pub fn commit(&mut self) -> Result<u64, MetaError> {
        if let Ok(mut stats) = self.stats.lock() {
            stats.durable_seq = self.last;
        }
        Ok(self.last)
    }
    /// Commits, and begins a new segment, so that a checkpoint at the returned number can drop
    /// whole segments.
    pub fn rotate(&mut self) -> Result<u64, MetaError> {
        self.commit()
    }
    /// Whether new work is to be refused because the metadata disk is full.
    pub fn is_degraded(&self) -> bool {
        self.handle().is_degraded()
    }
    /// Numbers for other threads.
    pub fn handle(&self) -> JournalHandle {
        JournalHandle(Arc::clone(&self.stats))
    }
}

/// Writes fuzzy checkpoints, a few chunks at a time.
pub struct Checkpointer {
    from: Option<ChunkId>,
}

impl Checkpointer {
    /// Whether the journal has grown so long that a checkpoint should begin.
    pub fn is_due(&self) -> bool {
        false
    }
    /// Whether a checkpoint has begun and is not finished.
    pub fn is_running(&self) -> bool {
        self.from.is_some()
    }
    /// Begins a checkpoint at record `seq`, of which `snapshot` is the small state. Gives up one
    /// that is running.
    pub fn begin(&mut self, _seq: u64, _snapshot: &[u8]) -> Result<(), MetaError> {
        self.from = Some(ChunkId { volume: endio_types::VolumeId(0), index: 0 });
        Ok(())
    }
    /// Copies up to `max` more chunks; `true` when all of them are in.
    pub fn write_chunks(
        &mut self,
        _table: &mut dyn MetaTable,
        _max: usize,
    ) -> Result<bool, MetaError> {
        Ok(true)
    }
    /// Makes the checkpoint durable, drops the oldest one and the journal segments that only it
    /// needed. `durable_seq` is the last record that the journal made durable: a chunk in the
    /// checkpoint that contains a later one is refused (`Misuse`); commit first, then try again.
    pub fn finish(&mut self, _durable_seq: u64) -> Result<(), MetaError> {
        self.from = None;
        Ok(())
    }
}

/// Metadata in a directory.
pub struct DiskMeta(MemoryMeta);

impl DiskMeta {
    /// In `dir`, which is created if it does not exist.
    pub fn new(_dir: impl Into<PathBuf>, _options: MetaOptions) -> Self {
        Self(MemoryMeta::new())
    }
}

impl MetaStore for DiskMeta {
    fn open(&self) -> Result<Recovered, MetaError> {
        self.0.open()
    }
}

/// Metadata in memory: for tests and demonstrations. Opening it again finds what was committed.
#[derive(Clone, Default)]
pub struct MemoryMeta {}

impl MemoryMeta {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }
}

impl MetaStore for MemoryMeta {
    fn open(&self) -> Result<Recovered, MetaError> {
        Ok(Recovered {
            database_id: 1,
            table: Box::new(Plain(MemoryTable::new())),
            snapshot: None,
            records: Records(Vec::new().into_iter()),
            journal: Journal { last: 0, stats: Arc::default() },
            checkpointer: Checkpointer { from: None },
            next_seq: 1,
            rebuilt: None,
        })
    }
}

struct Plain(MemoryTable);

impl ChunkTable for Plain {
    type Error = MetaError;
    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), MetaError> {
        let Ok(()) = self.0.read(id, f);
        Ok(())
    }
    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), MetaError> {
        let Ok(()) = self.0.update(id, f);
        Ok(())
    }
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, MetaError> {
        let Ok(next) = self.0.next(from);
        Ok(next)
    }
}

impl MetaTable for Plain {
    fn flush_dirty(&mut self) -> Result<(), MetaError> {
        Ok(())
    }
    fn close(&mut self, _durable_seq: u64) -> Result<(), MetaError> {
        Ok(())
    }
    fn stats(&self) -> TableStats {
        TableStats { chunks: self.0.len() as u64, ..TableStats::default() }
    }
}
