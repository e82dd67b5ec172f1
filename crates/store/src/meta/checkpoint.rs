//! Checkpoints: the small state at one record, and every chunk at that record or later.
//!
//! ```text
//! magic 8 │ version u32 │ database u64 │ sequence u64 │ snapshot length u32 │ crc32c u32
//! snapshot │ crc32c u32
//! chunks:   length u32 │ volume u64 │ index u64 │ encoded chunk
//! footer:   0xffff_ffff │ number of chunks u64 │ crc32c u32 of the whole file before it
//! ```
//!
//! A checkpoint is *fuzzy*: chunks are copied while service goes on, each carries the number of the
//! last operation it contains, and replay skips what a chunk has seen. Two checkpoints are kept, and
//! the journal since the older one, so that one damaged file costs time and not data.

use std::sync::Arc;

use bytes::Bytes;
use endio_failpoints::{Point, reach, reach_io};
use endio_state_machine::chunk::{CHUNK_BYTES_MAX, ChunkId};
use endio_state_machine::extent_map::successor;
use endio_types::VolumeId;

use super::api::MetaTable;
use super::journal::damaged;
use super::segment::{other_version, segment_first};
use super::shared::{Shared, fault};
use super::vfs::{Vfs, VfsFile};
use super::{MetaError, names};

const MAGIC: &[u8; 8] = b"ENDIOCKP";
const VERSION: u32 = 1;
const HEADER: usize = 36;
const END: u32 = u32::MAX;
const BUFFER: usize = 1 << 20;
/// Written out every so many bytes, so that the last sync is short and commits of the journal
/// meanwhile do not wait behind a large one.
const SYNC_EVERY: u64 = 8 << 20;
/// Longest small state, in bytes.
pub const SNAPSHOT_BYTES_MAX: usize = 1 << 30;
/// Checkpoints kept.
const KEEP: usize = 2;

pub(crate) fn checkpoint_name(seq: u64) -> String {
    format!("checkpoint-{seq:020}.chk")
}

pub(crate) fn checkpoint_seq(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.strip_suffix(".chk")?.parse().ok()
}

fn header(database: u64, seq: u64, snapshot: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&database.to_le_bytes());
    header.extend_from_slice(&seq.to_le_bytes());
    header.extend_from_slice(&snapshot.to_le_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    header
}

struct Running {
    seq: u64,
    file: Box<dyn VfsFile>,
    buffer: Vec<u8>,
    crc: u32,
    bytes: u64,
    synced: u64,
    count: u64,
    newest: u64,
    /// Where to go on; `None` when all chunks are in.
    from: Option<ChunkId>,
}

impl Running {
    fn put(&mut self, data: &[u8]) {
        self.crc = crc32c::crc32c_append(self.crc, data);
        self.bytes += data.len() as u64;
        self.buffer.extend_from_slice(data);
    }

    fn write_out(&mut self, shared: &Shared) -> Result<(), MetaError> {
        let fail = |error| shared.fail("append to", names::CHECKPOINT_NEW, error);
        reach_io(Point::CheckpointWriting)
            .map_err(|_| fail(std::io::ErrorKind::StorageFull.into()))?;
        let mut data = &self.buffer[..];
        while !data.is_empty() {
            let count = self.file.append(data).map_err(fail)?;
            data = &data[count..];
        }
        self.buffer.clear();
        if self.bytes - self.synced >= SYNC_EVERY {
            self.sync(shared)?;
        }
        Ok(())
    }

    fn sync(&mut self, shared: &Shared) -> Result<(), MetaError> {
        let synced = self.file.sync_data();
        synced.map_err(|error| shared.fail("sync", names::CHECKPOINT_NEW, error))?;
        self.synced = self.bytes;
        Ok(())
    }
}

/// Writes fuzzy checkpoints, a few chunks at a time. A failure gives the running checkpoint up and
/// leaves those that are complete as they are; begin again later.
pub struct Checkpointer {
    shared: Arc<Shared>,
    running: Option<Running>,
}

impl Checkpointer {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, running: None }
    }

    /// Whether the journal since the last checkpoint has grown longer than the configured bound
    /// and longer than that checkpoint, so that one should begin.
    pub fn is_due(&self) -> bool {
        let stats = self.shared.stats();
        let bound = self.shared.options.checkpoint_journal_bytes.max(stats.checkpoint_bytes);
        self.running.is_none() && stats.bytes_since_checkpoint > bound
    }

    /// Whether a checkpoint has begun and is not finished.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the disk has room for another checkpoint like the last one, and for the journal's reserve
    /// besides. One that fills the disk would take what commits need.
    pub fn has_room(&self) -> bool {
        self.shared.has_room_for_checkpoint()
    }

    /// Gives the running checkpoint up, and its space back.
    pub fn give_up(&mut self) {
        self.running = None;
        // The next one begins the file anew in any case.
        let _ = self.shared.vfs.remove(names::CHECKPOINT_NEW);
    }

    /// Begins a checkpoint at record `seq`, which must be durable; `snapshot` is the small state
    /// that contains exactly the records up to it. Rotate the journal at `seq` first, so that its
    /// segments can go. Gives up a checkpoint that is running.
    pub fn begin(&mut self, seq: u64, snapshot: &[u8]) -> Result<(), MetaError> {
        self.running = None;
        if seq > self.shared.stats().durable_seq {
            return Err(MetaError::Misuse("a checkpoint begins at a durable record"));
        }
        if snapshot.len() > SNAPSHOT_BYTES_MAX {
            return Err(MetaError::Misuse("a snapshot must not be longer than 1 GiB"));
        }
        self.leave_ballast()?;
        let created = self.shared.vfs.create(names::CHECKPOINT_NEW);
        let file =
            created.map_err(|error| self.shared.fail("create", names::CHECKPOINT_NEW, error))?;
        let mut running = Running {
            seq,
            file,
            buffer: Vec::with_capacity(BUFFER),
            crc: 0,
            bytes: 0,
            synced: 0,
            count: 0,
            newest: seq,
            from: Some(ChunkId { volume: VolumeId(0), index: 0 }),
        };
        running.put(&header(self.shared.database, seq, snapshot.len() as u32));
        running.put(snapshot);
        running.put(&crc32c::crc32c(snapshot).to_le_bytes());
        running.write_out(&self.shared)?;
        self.shared.checkpoint_began();
        reach(Point::CheckpointBegun);
        self.running = Some(running);
        Ok(())
    }

    /// Copies up to `max` more chunks; `true` when all of them are in. Chunks may change between
    /// two calls.
    ///
    /// # Errors
    /// [`MetaError::NoSpace`], also as soon as the journal lives on its ballast, which a checkpoint must
    /// not take from it: give it up.
    pub fn write_chunks(
        &mut self,
        table: &mut dyn MetaTable,
        max: usize,
    ) -> Result<bool, MetaError> {
        let Some(mut running) = self.running.take() else {
            return Err(MetaError::Misuse("no checkpoint is running"));
        };
        for _ in 0..max {
            let Some(from) = running.from else { break };
            self.leave_ballast()?;
            let Some(id) = table.next(from)? else {
                running.from = None;
                // A chunk that is missing may have been emptied by a record as new as this.
                running.newest = running.newest.max(table.stats().newest_seq);
                break;
            };
            table.read(id, &mut |chunk| {
                let Some(chunk) = chunk else { return };
                let bytes = chunk.encode(id);
                running.count += 1;
                running.put(&(bytes.len() as u32).to_le_bytes());
                running.put(&id.volume.0.to_le_bytes());
                running.put(&id.index.to_le_bytes());
                running.put(&bytes);
            })?;
            // Never `None`: volume ids do not reach the end of their range.
            running.from = Some(successor(id).unwrap_or(id));
            if running.buffer.len() >= BUFFER {
                running.write_out(&self.shared)?;
            }
        }
        let complete = running.from.is_none();
        self.running = Some(running);
        Ok(complete)
    }

    /// An error while the ballast serves commits. To finish takes little of it, and gives space back.
    fn leave_ballast(&self) -> Result<(), MetaError> {
        match self.shared.lives_on_ballast() {
            false => Ok(()),
            true => {
                let full = std::io::ErrorKind::StorageFull.into();
                Err(self.shared.fail("append to", names::CHECKPOINT_NEW, full))
            }
        }
    }

    /// Makes the checkpoint durable, drops the oldest one and the journal segments that only it
    /// needed. `durable_seq` is the last record that the journal made durable.
    ///
    /// # Errors
    /// [`MetaError::Misuse`] if chunks are missing, or if one contains a record later than
    /// `durable_seq`: the checkpoint would know what the journal may forget. Commit, then call
    /// again; the checkpoint stays running.
    pub fn finish(&mut self, durable_seq: u64) -> Result<(), MetaError> {
        let durable = durable_seq.min(self.shared.stats().durable_seq);
        match &self.running {
            None => return Err(MetaError::Misuse("no checkpoint is running")),
            Some(running) if running.from.is_some() => {
                return Err(MetaError::Misuse("the checkpoint lacks chunks"));
            }
            Some(running) if running.newest > durable => {
                return Err(MetaError::Misuse("the checkpoint is ahead of the journal"));
            }
            Some(_) => {}
        }
        let Some(mut running) = self.running.take() else { return Ok(()) };
        running.put(&END.to_le_bytes());
        running.put(&running.count.to_le_bytes());
        running.put(&running.crc.to_le_bytes());
        running.write_out(&self.shared)?;
        running.sync(&self.shared)?;
        reach(Point::CheckpointSynced);
        let name = checkpoint_name(running.seq);
        let vfs = &self.shared.vfs;
        let fail = |error| self.shared.fail("rename a checkpoint to", &name, error);
        vfs.rename(names::CHECKPOINT_NEW, &name).map_err(fail)?;
        reach(Point::CheckpointRenamed);
        vfs.sync_dir().map_err(fail)?;
        self.shared.checkpoint_finished(running.bytes);
        self.drop_old()?;
        self.shared.restore_ballast();
        Ok(())
    }

    fn drop_old(&self) -> Result<(), MetaError> {
        let backups = self.shared.backups();
        if *backups > 0 {
            // The next checkpoint drops what this one leaves.
            return Ok(());
        }
        let vfs = self.shared.vfs.as_ref();
        let names = vfs.list().map_err(|error| fault(vfs, "list", ".", error))?;
        let remove = |name: &str| {
            vfs.remove(name).map_err(|error| fault(vfs, "remove", name, error))?;
            reach(Point::CheckpointDropped);
            Ok(())
        };
        let mut seqs: Vec<u64> = names.iter().filter_map(|name| checkpoint_seq(name)).collect();
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        for seq in seqs.iter().skip(KEEP) {
            remove(&checkpoint_name(*seq))?;
        }
        // With a single checkpoint the whole journal stands behind it.
        let Some(older) = seqs.get(KEEP - 1) else { return Ok(()) };
        // Durably gone before the segments are, so that no open ever wants those segments.
        vfs.sync_dir().map_err(|error| fault(vfs, "sync", ".", error))?;
        let mut segments: Vec<(u64, &String)> =
            names.iter().filter_map(|name| segment_first(name).map(|n| (n, name))).collect();
        segments.sort_unstable();
        for pair in segments.windows(2) {
            if pair[1].0 <= older + 1 {
                remove(pair[0].1)?;
            }
        }
        Ok(())
    }
}

/// What a checkpoint says of itself.
pub(crate) struct Head {
    pub(crate) seq: u64,
    pub(crate) snapshot: Bytes,
    pub(crate) bytes: u64,
}

struct Reader<'a> {
    vfs: &'a dyn Vfs,
    name: &'a str,
    buffer: Vec<u8>,
    at: usize,
    /// Offset in the file of the end of the buffer.
    end: u64,
    crc: u32,
}

impl<'a> Reader<'a> {
    fn new(vfs: &'a dyn Vfs, name: &'a str) -> Self {
        Self { vfs, name, buffer: Vec::new(), at: 0, end: 0, crc: 0 }
    }

    fn offset(&self) -> u64 {
        self.end - (self.buffer.len() - self.at) as u64
    }

    fn bad(&self, what: &str) -> MetaError {
        damaged(self.vfs, self.name, self.offset(), what.to_owned())
    }

    fn take(&mut self, len: usize) -> Result<&[u8], MetaError> {
        if self.buffer.len() - self.at < len {
            self.buffer.drain(..self.at);
            self.at = 0;
            let want = BUFFER.max(len - self.buffer.len());
            let more = self.vfs.read(self.name, self.end, want);
            let more = more.map_err(|error| fault(self.vfs, "read", self.name, error))?;
            self.end += more.len() as u64;
            self.buffer.extend_from_slice(&more);
        }
        if self.buffer.len() < len {
            return Err(self.bad("it ends too early"));
        }
        let taken = &self.buffer[self.at..self.at + len];
        self.at += len;
        self.crc = crc32c::crc32c_append(self.crc, taken);
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, MetaError> {
        let bytes = self.take(4)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)))
    }

    fn u64(&mut self) -> Result<u64, MetaError> {
        let bytes = self.take(8)?;
        Ok(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    fn head(&mut self, database: u64, bytes: u64) -> Result<Head, MetaError> {
        let raw = self.take(HEADER)?.to_vec();
        let seq = checkpoint_seq(self.name).ok_or_else(|| self.bad("the name has no number"))?;
        let len = raw.get(28..).and_then(|raw| raw.first_chunk().copied());
        let len = len.map_or(0, u32::from_le_bytes);
        if let Some(version) = other_version(Some(&raw), VERSION) {
            return Err(MetaError::UnknownVersion { file: self.vfs.path(self.name), version });
        }
        if raw != header(database, seq, len) || len as usize > SNAPSHOT_BYTES_MAX {
            return Err(self.bad("the header is damaged or belongs to another database"));
        }
        if u64::from(len) > bytes {
            return Err(self.bad("the snapshot is cut off"));
        }
        let snapshot = Bytes::copy_from_slice(self.take(len as usize)?);
        if self.u32()? != crc32c::crc32c(&snapshot) {
            return Err(self.bad("the snapshot is damaged"));
        }
        Ok(Head { seq, snapshot, bytes })
    }
}

/// Takes the chunks of a checkpoint, one by one.
pub(crate) type Sink<'a> = dyn FnMut(ChunkId, &[u8]) -> Result<(), MetaError> + 'a;

/// Reads only the small state, which has a checksum of its own.
pub(crate) fn read_head(vfs: &dyn Vfs, name: &str, database: u64) -> Result<Head, MetaError> {
    let bytes = vfs.len(name).map_err(|error| fault(vfs, "read", name, error))?;
    Reader::new(vfs, name).head(database, bytes)
}

/// Reads and checks everything. Chunks reach `sink` before the whole is known to be good: if this
/// fails, what `sink` got must be thrown away.
pub(crate) fn read_all(
    vfs: &dyn Vfs,
    name: &str,
    database: u64,
    sink: &mut Sink<'_>,
) -> Result<Head, MetaError> {
    let bytes = vfs.len(name).map_err(|error| fault(vfs, "read", name, error))?;
    let mut reader = Reader::new(vfs, name);
    let head = reader.head(database, bytes)?;
    let mut count = 0u64;
    loop {
        let len = reader.u32()?;
        if len == END {
            break;
        }
        if len as usize > CHUNK_BYTES_MAX {
            return Err(reader.bad("a chunk is too long"));
        }
        let id = ChunkId { volume: VolumeId(reader.u64()?), index: reader.u64()? };
        sink(id, reader.take(len as usize)?)?;
        count += 1;
    }
    if reader.u64()? != count {
        return Err(reader.bad("the number of chunks is wrong"));
    }
    let crc = reader.crc;
    if reader.u32()? != crc {
        return Err(reader.bad("checksum mismatch"));
    }
    if reader.offset() != bytes {
        return Err(reader.bad("it goes on behind its end"));
    }
    Ok(head)
}
