//! A backup: the newest good checkpoint and the journal behind it, in one checksummed stream.
//!
//! ```text
//! stream:  header frame │ checkpoint frames │ record frames │ end frame
//! frame:   kind u8 │ length u32 │ payload │ crc32c u32 of (number of the frame u64, all before)
//! header:  magic 8 │ version u32 │ database u64 │ checkpoint u64 │ its bytes u64 │ last record u64
//! record:  sequence u64 │ epoch u64 │ payload          end: number of records u64
//! ```
//!
//! It is taken while the service runs and disturbs nobody: a checkpoint and the records up to the last
//! durable one *are* a consistent state. Files that a backup still reads are not dropped meanwhile.
//!
//! # Invariants
//! * `backup-whole`: a stream is accepted only from its header to its end frame, each frame in its
//!   place; cut off, reordered or changed it is refused.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use bytes::Bytes;

use super::api::Record;
use super::checkpoint::{checkpoint_name, checkpoint_seq, read_all};
use super::journal::{damaged, read_segment};
use super::segment::{PAYLOAD_BYTES_MAX, scan, segment_first};
use super::shared::{JournalHandle, Pin, Shared, fault};
use super::{MetaError, names};

const MAGIC: &[u8; 8] = b"ENDIOBAK";
/// Version of the format.
pub const BACKUP_VERSION: u32 = 1;
/// Bytes of the checkpoint in one frame; pieces of the stream are about as long.
const PIECE_BYTES: usize = 256 << 10;
/// Longest payload of a frame: that of a record and its numbers.
const FRAME_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + 16;
const HEADER_BYTES: usize = 44;

const HEADER: u8 = 1;
const CHECKPOINT: u8 = 2;
const RECORD: u8 = 3;
const END: u8 = 4;

/// Why a backup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It is no backup, or it was changed or cut off.
    #[error("the backup is damaged at byte {offset}: {what}")]
    Damaged {
        /// Where, in bytes from the start.
        offset: u64,
        /// In which way.
        what: String,
    },
    /// Made by a later version of this program.
    #[error(
        "the backup has format version {0}, this program knows {BACKUP_VERSION}: restore it with \
         the version that made it, or a later one"
    )]
    UnknownVersion(u32),
    /// The place to restore into holds something.
    #[error("{} is not empty: restore into a new directory", .0.display())]
    NotEmpty(std::path::PathBuf),
    /// The place to restore into is where a file system is mounted: no directory can take its place.
    #[error(
        "{} is a mount point, which no directory can replace: restore into a new directory inside \
         it, and move what is in there up before conversion is started",
        .0.display()
    )]
    MountPoint(std::path::PathBuf),
    /// What was restored cannot be given its name.
    #[error("{} cannot be renamed to {}", from.display(), to.display())]
    Rename {
        /// Where it lies.
        from: std::path::PathBuf,
        /// Where it is wanted.
        to: std::path::PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It cannot be read.
    #[error("the backup cannot be read")]
    Io(#[from] io::Error),
    /// The restored metadata cannot be written or read back.
    #[error("the restored metadata cannot be written")]
    Meta(#[from] MetaError),
}

/// What a backup says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackupHead {
    /// Identity of the metadata.
    pub database: u64,
    /// Last record contained in the checkpoint; 0: there is no checkpoint.
    pub checkpoint_seq: u64,
    /// Length of the checkpoint, bytes.
    pub checkpoint_bytes: u64,
    /// Last record: the backup is the state after it.
    pub last_seq: u64,
}

impl BackupHead {
    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&BACKUP_VERSION.to_le_bytes());
        for number in [self.database, self.checkpoint_seq, self.checkpoint_bytes, self.last_seq] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out
    }

    fn decode(raw: &[u8]) -> Result<Self, BackupError> {
        let bad = |what: &str| BackupError::Damaged { offset: 0, what: what.to_owned() };
        if !raw.starts_with(MAGIC) {
            return Err(bad("it is no backup of endio's metadata"));
        }
        let version = raw.get(8..).and_then(|raw| raw.first_chunk().copied());
        match version.map(u32::from_le_bytes) {
            Some(BACKUP_VERSION) if raw.len() == HEADER_BYTES => {}
            Some(BACKUP_VERSION) | None => return Err(bad("the header has a wrong length")),
            Some(version) => return Err(BackupError::UnknownVersion(version)),
        }
        let number = |n: usize| number_at(raw, 12 + n * 8);
        Ok(Self {
            database: number(0),
            checkpoint_seq: number(1),
            checkpoint_bytes: number(2),
            last_seq: number(3),
        })
    }
}

fn number_at(raw: &[u8], at: usize) -> u64 {
    let bytes = raw.get(at..).and_then(|raw| raw.first_chunk().copied());
    bytes.map_or(0, u64::from_le_bytes)
}

/// A backup that is being taken. Dropping it gives it up; nothing else is affected.
pub struct Backup {
    shared: Arc<Shared>,
    _pin: Pin,
    head: BackupHead,
    frames: u64,
    stage: Stage,
    segments: VecDeque<(String, u64)>,
    records: VecDeque<Record>,
    next_seq: u64,
}

enum Stage {
    Head,
    Checkpoint(u64),
    Records,
    Done,
}

impl JournalHandle {
    /// Begins a backup of everything that is durable now. Blocks: the checkpoint is read and checked
    /// first.
    ///
    /// # Errors
    /// [`MetaError::Damaged`] if no checkpoint is good or a segment is missing.
    pub fn backup(&self) -> Result<Backup, MetaError> {
        Backup::begin(Arc::clone(&self.0))
    }
}

impl Backup {
    fn begin(shared: Arc<Shared>) -> Result<Self, MetaError> {
        let pin = Pin::new(&shared);
        let vfs = shared.vfs.as_ref();
        let names = vfs.list().map_err(|error| fault(vfs, "list", ".", error))?;
        let mut seqs: Vec<u64> = names.iter().filter_map(|name| checkpoint_seq(name)).collect();
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        let mut head = BackupHead { database: shared.database, ..<_>::default() };
        for seq in seqs {
            match read_all(vfs, &checkpoint_name(seq), shared.database, &mut |_, _| Ok(())) {
                Ok(found) => {
                    (head.checkpoint_seq, head.checkpoint_bytes) = (found.seq, found.bytes);
                    break;
                }
                Err(error @ MetaError::Damaged { .. }) => {
                    tracing::error!(%error, "a checkpoint is damaged: the backup uses an older one");
                }
                Err(error) => return Err(error),
            }
        }
        // A fuzzy checkpoint may contain later records; all of them are durable once it is finished.
        head.last_seq = shared.stats().durable_seq;
        let mut segments: Vec<(String, u64)> =
            names.into_iter().filter_map(|name| segment_first(&name).map(|n| (name, n))).collect();
        // Segments begun since the list was made are found when they are needed.
        segments.sort_unstable_by_key(|(_, first)| *first);
        let skip = segments.iter().rposition(|(_, first)| *first <= head.checkpoint_seq + 1);
        let segments = segments.split_off(skip.unwrap_or(0)).into();
        let next_seq = head.checkpoint_seq + 1;
        let records = VecDeque::new();
        let stage = Stage::Head;
        Ok(Self { shared, _pin: pin, head, frames: 0, stage, segments, records, next_seq })
    }

    /// What it will contain.
    pub fn head(&self) -> BackupHead {
        self.head
    }

    /// The next piece of the stream, some hundred KiB (one record, if that is longer); `None` at
    /// the end. Blocks.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged: the backup is worth nothing.
    pub fn next_piece(&mut self) -> Result<Option<Bytes>, MetaError> {
        let mut out = Vec::new();
        while out.len() < PIECE_BYTES {
            match self.stage {
                Stage::Head => {
                    self.put(&mut out, HEADER, &[&self.head.encode()]);
                    self.stage = Stage::Checkpoint(0);
                }
                Stage::Checkpoint(at) if at < self.head.checkpoint_bytes => {
                    let name = checkpoint_name(self.head.checkpoint_seq);
                    let vfs = self.shared.vfs.as_ref();
                    let read = vfs.read(&name, at, PIECE_BYTES);
                    let read = read.map_err(|error| fault(vfs, "read", &name, error))?;
                    if read.is_empty() {
                        return Err(damaged(vfs, &name, at, "it became shorter".into()));
                    }
                    self.put(&mut out, CHECKPOINT, &[&read]);
                    self.stage = Stage::Checkpoint(at + read.len() as u64);
                }
                Stage::Checkpoint(_) => self.stage = Stage::Records,
                Stage::Records if self.next_seq > self.head.last_seq => {
                    let records = self.head.last_seq - self.head.checkpoint_seq;
                    self.put(&mut out, END, &[&records.to_le_bytes()]);
                    self.stage = Stage::Done;
                }
                Stage::Records => {
                    let record = self.next_record()?;
                    let numbers = [record.seq.to_le_bytes(), record.epoch.to_le_bytes()];
                    self.put(&mut out, RECORD, &[&numbers.concat(), &record.payload]);
                }
                Stage::Done => break,
            }
        }
        Ok((!out.is_empty()).then(|| out.into()))
    }

    fn put(&mut self, out: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
        let from = out.len();
        let length: usize = parts.iter().map(|part| part.len()).sum();
        out.push(kind);
        // Never longer than FRAME_BYTES_MAX.
        out.extend_from_slice(&(length as u32).to_le_bytes());
        parts.iter().for_each(|part| out.extend_from_slice(part));
        let crc = crc32c::crc32c_append(crc32c::crc32c(&self.frames.to_le_bytes()), &out[from..]);
        out.extend_from_slice(&crc.to_le_bytes());
        self.frames += 1;
    }

    fn next_record(&mut self) -> Result<Record, MetaError> {
        loop {
            while let Some(record) = self.records.pop_front() {
                if record.seq == self.next_seq {
                    self.next_seq += 1;
                    return Ok(record);
                }
            }
            let vfs = self.shared.vfs.as_ref();
            if self.segments.is_empty() {
                // The journal went on in a new segment after the list of files was made.
                let names = vfs.list().map_err(|error| fault(vfs, "list", ".", error))?;
                let first = |name: &String| segment_first(name) == Some(self.next_seq);
                let found = names.into_iter().find(first).map(|name| (name, self.next_seq));
                self.segments.extend(found);
            }
            let Some((name, first)) = self.segments.pop_front() else {
                let what = format!("record {} is missing", self.next_seq);
                return Err(damaged(vfs, names::MARK, 0, what));
            };
            // The last segment is being appended to: only what is durable is taken from it.
            let bytes = read_segment(vfs, &name)?;
            let last = self.head.last_seq;
            let records = scan(&bytes, self.shared.database, first, 0).records;
            self.records = records.into_iter().filter(|record| record.seq <= last).collect();
        }
    }
}

/// A piece of a backup that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// Bytes of the checkpoint.
    Checkpoint(Vec<u8>),
    /// A record.
    Record(Record),
}

/// Reads a backup, and refuses whatever is not just as it was made.
pub(crate) struct BackupReader<R> {
    input: R,
    offset: u64,
    frames: u64,
    pub(crate) head: BackupHead,
    checkpoint_left: u64,
    next_seq: u64,
}

impl<R: Read> BackupReader<R> {
    pub(crate) fn new(input: R) -> Result<Self, BackupError> {
        let head = BackupHead::default();
        let (checkpoint_left, next_seq) = (0, 0);
        let mut reader = Self { input, offset: 0, frames: 0, head, checkpoint_left, next_seq };
        let (kind, payload) = reader.frame()?;
        if kind != HEADER {
            return Err(reader.bad("it does not begin with a header"));
        }
        reader.head = BackupHead::decode(&payload)?;
        if reader.head.last_seq < reader.head.checkpoint_seq {
            return Err(reader.bad("it ends before its checkpoint"));
        }
        reader.checkpoint_left = reader.head.checkpoint_bytes;
        reader.next_seq = reader.head.checkpoint_seq + 1;
        Ok(reader)
    }

    fn bad(&self, what: impl Into<String>) -> BackupError {
        BackupError::Damaged { offset: self.offset, what: what.into() }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), BackupError> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.bad("it is cut off"),
            _ => BackupError::Io(error),
        })
    }

    fn frame(&mut self) -> Result<(u8, Vec<u8>), BackupError> {
        let mut front = [0; 5];
        self.fill(&mut front)?;
        if self.frames == 0 && front[0] != HEADER {
            return Err(self.bad("it is no backup of endio's metadata"));
        }
        let length = front[1..].first_chunk().map_or(0, |raw| u32::from_le_bytes(*raw)) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(self.bad("a frame is too long"));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload)?;
        let mut told = [0; 4];
        self.fill(&mut told)?;
        let crc = crc32c::crc32c(&self.frames.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, &front), &payload);
        if u32::from_le_bytes(told) != crc {
            return Err(self.bad("checksum mismatch"));
        }
        self.frames += 1;
        self.offset += (front.len() + length + told.len()) as u64;
        Ok((front[0], payload))
    }

    /// The next part; `None` after the end frame.
    pub(crate) fn next_part(&mut self) -> Result<Option<Part>, BackupError> {
        let (kind, payload) = self.frame()?;
        match kind {
            CHECKPOINT if payload.len() as u64 <= self.checkpoint_left => {
                self.checkpoint_left -= payload.len() as u64;
                Ok(Some(Part::Checkpoint(payload)))
            }
            RECORD if self.checkpoint_left == 0 && payload.len() >= 16 => {
                let (seq, epoch) = (number_at(&payload, 0), number_at(&payload, 8));
                if seq != self.next_seq || seq > self.head.last_seq {
                    return Err(self.bad(format!("record {seq} is out of place")));
                }
                self.next_seq += 1;
                let payload = Bytes::from(payload).slice(16..);
                Ok(Some(Part::Record(Record { seq, epoch, payload })))
            }
            END => {
                let records = self.head.last_seq - self.head.checkpoint_seq;
                let told = number_at(&payload, 0);
                if self.next_seq != self.head.last_seq + 1 || told != records {
                    return Err(self.bad("records are missing"));
                }
                if self.input.read(&mut [0])? != 0 {
                    return Err(self.bad("it goes on behind its end"));
                }
                Ok(None)
            }
            _ => Err(self.bad("a frame is out of place")),
        }
    }
}

/// Reads a whole backup and checks every frame of it.
///
/// # Errors
/// It is damaged, cut off, or of a later version.
pub fn verify_backup(input: impl Read) -> Result<BackupHead, BackupError> {
    let mut reader = BackupReader::new(input)?;
    while reader.next_part()?.is_some() {}
    Ok(reader.head)
}
