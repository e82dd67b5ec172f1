//! Opening a metadata directory: what is durable, and may sled be believed?

use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::sync::Arc;

use endio_failpoints::{Bug, is_planted};
use endio_state_machine::chunk::{Chunk, ChunkId};

use super::api::{DirLock, MetaOptions, MetaStore, Recovered};
use super::backend::{Backend, Changes, Engine, MemoryEngine};
use super::canary::{Canary, write_durably};
use super::checkpoint::{Checkpointer, Head, checkpoint_name, checkpoint_seq, read_all, read_head};
use super::journal::{Found, Journal, Records, damaged, find};
use super::segment::segment_first;
use super::shared::{Shared, fault};
use super::sim::SimVfs;
use super::sled_backend::SledEngine;
use super::table::CachedTable;
use super::vfs::{RealVfs, Vfs};
use super::{MetaError, names};

/// Chunks handed to the store at a time while it is rebuilt.
const REBUILD_BATCH: usize = 256;

/// Metadata in a directory: journal, checkpoints, canary, and sled in `sled/`.
pub struct DiskMeta {
    dir: PathBuf,
    options: MetaOptions,
}

impl DiskMeta {
    /// In `dir`, which is created if it does not exist.
    pub fn new(dir: impl Into<PathBuf>, options: MetaOptions) -> Self {
        Self { dir: dir.into(), options }
    }
}

impl MetaStore for DiskMeta {
    fn open(&self) -> Result<Recovered, MetaError> {
        let vfs = RealVfs::new(&self.dir).map_err(|source| MetaError::Io {
            what: "create the directory",
            path: self.dir.clone(),
            source,
        })?;
        let engine = SledEngine::new(self.dir.join("sled"), self.options.sled_cache_bytes);
        open(Arc::new(vfs), &engine, self.options.clone())
    }
}

/// Metadata in memory: for tests and demonstrations. The same code over a simulated disk. Clones
/// are the same disk, so opening it again finds what was committed.
#[derive(Clone)]
pub struct MemoryMeta {
    disk: SimVfs,
    engine: MemoryEngine,
    options: MetaOptions,
}

impl Default for MemoryMeta {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryMeta {
    /// Empty, without a ballast.
    pub fn new() -> Self {
        Self::with_options(MetaOptions { ballast_bytes: 0, ..MetaOptions::default() })
    }
    /// Empty.
    pub fn with_options(options: MetaOptions) -> Self {
        Self { disk: SimVfs::new(), engine: MemoryEngine::default(), options }
    }
    /// The simulated disk below, for cutting its power and filling it up.
    pub fn disk(&self) -> &SimVfs {
        &self.disk
    }
    /// Forgets changes of the table that were not made durable, each if `keep` says `false`.
    pub fn lose_table_changes(&self, keep: impl FnMut() -> bool) {
        self.engine.lose(keep);
    }
    /// An independent copy of the disk.
    #[must_use]
    pub fn copy(&self) -> Self {
        let options = self.options.clone();
        Self { disk: self.disk.copy(), engine: self.engine.copy(), options }
    }
}

impl MetaStore for MemoryMeta {
    fn open(&self) -> Result<Recovered, MetaError> {
        open(Arc::new(self.disk.clone()), &self.engine, self.options.clone())
    }
}

fn open(
    vfs: Arc<dyn Vfs>,
    engine: &dyn Engine,
    options: MetaOptions,
) -> Result<Recovered, MetaError> {
    let locked = vfs.lock().map_err(|error| fault(vfs.as_ref(), "lock", "lock", error))?;
    let Some(lock) = locked else { return Err(MetaError::Locked(vfs.path(""))) };
    let lock: DirLock = Arc::from(lock);
    let database = identity(vfs.as_ref())?;
    let shared = Arc::new(Shared::new(vfs, options, database, lock));
    let checkpoints = checkpoints(shared.vfs.as_ref())?;
    let canary = Canary::take(&shared)?;

    let kept = match canary {
        Ok(canary) => reuse(&shared, engine, &checkpoints, &canary)?,
        Err(_) if is_planted(Bug::CanaryIgnored) => believe(&shared, engine, &checkpoints)?,
        Err(reason) => Err(reason),
    };
    let (opened, rebuilt) = match kept {
        Ok(opened) => (opened, None),
        Err(reason) => (rebuild(&shared, engine, &checkpoints)?, Some(reason)),
    };
    let Opened { head, found, backend, chunks } = opened;
    // Nothing was there before: that is no rebuilding.
    let rebuilt = rebuilt.filter(|_| found.last > 0);
    if let Some(reason) = &rebuilt {
        tracing::warn!(reason, chunks, "the table of chunks was thrown away and is rebuilt");
    }
    finish(shared, head, found, backend, chunks, rebuilt)
}

struct Opened {
    head: Option<Head>,
    found: Found,
    backend: Box<dyn Backend>,
    chunks: u64,
}

fn finish(
    shared: Arc<Shared>,
    head: Option<Head>,
    found: Found,
    backend: Box<dyn Backend>,
    chunks: u64,
    rebuilt: Option<String>,
) -> Result<Recovered, MetaError> {
    let after = head.as_ref().map_or(0, |head| head.seq);
    shared.set_start(found.last, found.bytes, head.as_ref().map_or(0, |head| head.bytes));
    shared.restore_ballast();
    let records = Records::new(Arc::clone(&shared), &found, after);
    let journal = Journal::start(Arc::clone(&shared), found.last, found.epoch)?;
    let table = CachedTable::new(Arc::clone(&shared), backend, chunks, found.last);
    Ok(Recovered {
        database_id: shared.database,
        table: Box::new(table),
        snapshot: head.map(|head| (head.seq, head.snapshot)),
        records,
        journal,
        checkpointer: Checkpointer::new(shared),
        next_seq: found.last + 1,
        rebuilt,
    })
}

const IDENTITY_MAGIC: &[u8; 8] = b"ENDIOMET";

pub(crate) fn encode_identity(id: u64) -> Vec<u8> {
    let mut bytes = IDENTITY_MAGIC.to_vec();
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Who the database is; made at the first open.
fn identity(vfs: &dyn Vfs) -> Result<u64, MetaError> {
    let fail = |error| fault(vfs, "read", names::IDENTITY, error);
    if vfs.exists(names::IDENTITY).map_err(fail)? {
        let bytes = vfs.read(names::IDENTITY, 0, 64).map_err(fail)?;
        let id = bytes.get(8..).and_then(|bytes| bytes.first_chunk().copied());
        let id = id.map_or(0, u64::from_le_bytes);
        if bytes != encode_identity(id) {
            return Err(damaged(vfs, names::IDENTITY, 0, "checksum mismatch".into()));
        }
        return Ok(id);
    }
    let names = vfs.list().map_err(fail)?;
    let ours = |name: &&String| segment_first(name).or(checkpoint_seq(name)).is_some();
    if let Some(name) = names.iter().find(ours) {
        let what = format!("it is missing although there is {name}");
        return Err(damaged(vfs, names::IDENTITY, 0, what));
    }
    // The keys of a fresh hasher come from the system's source of randomness.
    let id = std::hash::RandomState::new().build_hasher().finish() | 1;
    write_durably(vfs, names::IDENTITY_NEW, names::IDENTITY, &encode_identity(id))?;
    Ok(id)
}

/// Numbers of all checkpoints, newest first.
fn checkpoints(vfs: &dyn Vfs) -> Result<Vec<u64>, MetaError> {
    let names = vfs.list().map_err(|error| fault(vfs, "list", ".", error))?;
    let mut seqs: Vec<u64> = names.iter().filter_map(|name| checkpoint_seq(name)).collect();
    seqs.sort_unstable_by(|a, b| b.cmp(a));
    Ok(seqs)
}

/// Keeps an unreadable checkpoint for whoever looks for the cause, under a name that is not used.
fn set_aside(vfs: &dyn Vfs, name: &str, error: &MetaError) -> Result<(), MetaError> {
    tracing::warn!(%error, "a checkpoint is damaged: falling back to the one before");
    let aside = format!("{name}.damaged");
    vfs.rename(name, &aside).map_err(|error| fault(vfs, "rename", name, error))
}

/// The newest checkpoint that `read` accepts; `None` if there never was one.
fn newest<R>(
    vfs: &dyn Vfs,
    checkpoints: &[u64],
    mut read: impl FnMut(&str) -> Result<R, MetaError>,
) -> Result<Option<R>, MetaError> {
    let mut last = None;
    for seq in checkpoints {
        let name = checkpoint_name(*seq);
        match read(&name) {
            Ok(found) => return Ok(Some(found)),
            Err(error @ MetaError::Damaged { .. }) => {
                last = Some((name, error));
            }
            // Set aside already.
            Err(MetaError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if let Some((name, error)) = &last {
            set_aside(vfs, name, error)?;
            last = None;
        }
    }
    Ok(None)
}

/// Uses the table as it is, if everything that vouches for it agrees; the reason, if not.
fn reuse(
    shared: &Arc<Shared>,
    engine: &dyn Engine,
    checkpoints: &[u64],
    canary: &Canary,
) -> Result<Result<Opened, String>, MetaError> {
    let vfs = shared.vfs.as_ref();
    if canary.database_id != shared.database || !canary.clean {
        return Ok(Err("the canary belongs to another database".into()));
    }
    let head = newest(vfs, checkpoints, |name| read_head(vfs, name, shared.database))?;
    let found = find(vfs, shared.database, head.as_ref().map_or(0, |head| head.seq))?;
    if found.last < canary.last_seq {
        let name = found.segments.last().map_or(names::CANARY, |(name, _)| name.as_str());
        let what = format!("it ends with record {}, not {}", found.last, canary.last_seq);
        return Err(damaged(vfs, name, 0, what));
    }
    if found.last > canary.last_seq {
        return Ok(Err(format!(
            "the table ends with record {}, the journal with {}",
            canary.last_seq, found.last
        )));
    }
    Ok(verify(engine, canary).map(|backend| Opened { head, found, backend, chunks: canary.chunks }))
}

/// A planted bug: the table as it is, with nothing that vouches for it.
fn believe(
    shared: &Arc<Shared>,
    engine: &dyn Engine,
    checkpoints: &[u64],
) -> Result<Result<Opened, String>, MetaError> {
    let vfs = shared.vfs.as_ref();
    let head = newest(vfs, checkpoints, |name| read_head(vfs, name, shared.database))?;
    let found = find(vfs, shared.database, head.as_ref().map_or(0, |head| head.seq))?;
    Ok(engine.open().map(|backend| Opened { head, found, backend, chunks: 0 }))
}

/// Checks the files before the store reads them, and every chunk after.
fn verify(engine: &dyn Engine, canary: &Canary) -> Result<Box<dyn Backend>, String> {
    if engine.fingerprint()? != canary.files_crc32c {
        return Err("the files of the table are not as they were when it was closed".into());
    }
    let mut backend = engine.open()?;
    let mut chunks = 0u64;
    backend.scan(&mut |id, bytes| {
        let chunk = Chunk::decode(id, bytes)
            .map_err(|error| format!("chunk {} of volume {}: {error}", id.index, id.volume))?;
        if chunk.applied().record > canary.last_seq {
            return Err(format!("chunk {} of volume {} is too new", id.index, id.volume));
        }
        chunks += 1;
        Ok(())
    })?;
    if chunks != canary.chunks {
        return Err(format!("the table has {chunks} chunks instead of {}", canary.chunks));
    }
    Ok(backend)
}

/// A fresh table from the newest good checkpoint; the journal is replayed by the caller.
fn rebuild(
    shared: &Arc<Shared>,
    engine: &dyn Engine,
    checkpoints: &[u64],
) -> Result<Opened, MetaError> {
    let vfs = shared.vfs.as_ref();
    // What is left of a checkpoint that was not finished takes room that the table needs.
    let _ = vfs.remove(names::CHECKPOINT_NEW);
    let fill = |name: &str| {
        engine.discard().map_err(MetaError::Table)?;
        let size = vfs.len(name).map_err(|error| fault(vfs, "read", name, error))?;
        check_room(shared, size)?;
        let mut backend = engine.open().map_err(MetaError::Table)?;
        let mut chunks = 0u64;
        let mut batch: Changes = Vec::new();
        let head = read_all(vfs, name, shared.database, &mut |id: ChunkId, bytes: &[u8]| {
            chunks += 1;
            batch.push((id, Some(bytes.to_vec())));
            if batch.len() >= REBUILD_BATCH {
                backend.apply(std::mem::take(&mut batch)).map_err(MetaError::Table)?;
            }
            Ok(())
        })?;
        backend.apply(batch).map_err(MetaError::Table)?;
        Ok((head, backend, chunks))
    };
    let (head, backend, chunks) = match newest(vfs, checkpoints, fill)? {
        Some((head, backend, chunks)) => (Some(head), backend, chunks),
        None => {
            engine.discard().map_err(MetaError::Table)?;
            check_room(shared, 0)?;
            (None, engine.open().map_err(MetaError::Table)?, 0)
        }
    };
    let after = head.as_ref().map_or(0, |head| head.seq);
    let found = find(vfs, shared.database, after)?;
    Ok(Opened { head, found, backend, chunks })
}

fn check_room(shared: &Shared, bytes: u64) -> Result<(), MetaError> {
    // The ballast need not exist yet, and is no reason to refuse to start.
    if shared.has_room_for_table(bytes) || shared.drop_ballast() && shared.has_room_for_table(bytes)
    {
        return Ok(());
    }
    Err(MetaError::NoSpace {
        what: "rebuild the table of chunks in",
        path: shared.vfs.path("sled"),
    })
}
