//! Records of the cache log: a fixed header with its own checksum, then a payload.

use std::collections::BTreeMap;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::sessions::{
    RequestKey, SessionId, SessionSnapshot, SessionTable,
};
use endio_types::{BLOCK_BYTES, Generation, LblkRange, Millis, VolumeId};
use serde::{Deserialize, Serialize};

use super::api::WriteRecord;

/// Length of a header in bytes.
pub(super) const HEADER_LEN: usize = 104;
/// Largest payload: a reader never allocates more because of what a file says.
pub(super) const PAYLOAD_MAX: usize = 64 << 20;
const MAGIC: u32 = 0x4543_4C31; // "ECL1"
const VERSION: u8 = 1;

/// Kind of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Kind {
    /// Data of a buffered write.
    Write = 1,
    /// Blocks that are converted.
    Clean = 2,
    /// A request without data in the log was applied; or, with number 0, its session began here.
    Done = 3,
    /// First of a segment: what older segments said about sessions and volumes.
    Snapshot = 4,
    /// A volume was opened or closed.
    Volume = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Write, Self::Clean, Self::Done, Self::Snapshot, Self::Volume]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A header, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) lsn: Lsn,
    /// What the writer knew to be durable: a reader that misses a record up to here is looking
    /// at damage, not at a tail that never reached the disk.
    pub(super) durable: Lsn,
    pub(super) volume: VolumeId,
    pub(super) generation: Generation,
    pub(super) offset_bytes: u64,
    pub(super) end_bytes: u64,
    /// Number 0, of [`Kind::Done`] only: the session began. Versions before this one read nothing
    /// there, and take retries of the session for those of one that began later.
    pub(super) request: Option<RequestKey>,
    pub(super) result: u64,
    pub(super) payload_len: u32,
    pub(super) payload_crc: u32,
}

impl Header {
    /// A header without particulars.
    pub(super) fn plain(kind: Kind) -> Self {
        Self {
            kind,
            lsn: Lsn(0),
            durable: Lsn(0),
            volume: VolumeId(0),
            generation: Generation(0),
            offset_bytes: 0,
            end_bytes: 0,
            request: None,
            result: 0,
            payload_len: 0,
            payload_crc: 0,
        }
    }

    /// The header of a write.
    pub(super) fn of_write(write: &WriteRecord) -> Self {
        Self {
            volume: write.volume,
            generation: write.generation,
            offset_bytes: write.blocks.start.0 * BLOCK_BYTES,
            end_bytes: write.end_bytes,
            request: write.request,
            result: write.result,
            ..Self::plain(Kind::Write)
        }
    }

    /// What a write's header says.
    pub(super) fn write(&self) -> WriteRecord {
        let start = self.offset_bytes / BLOCK_BYTES;
        let len = u64::from(self.payload_len) / BLOCK_BYTES;
        WriteRecord {
            volume: self.volume,
            generation: self.generation,
            blocks: LblkRange::new(start, len),
            end_bytes: self.end_bytes,
            request: self.request,
            result: self.result,
        }
    }

    /// Tells a table what the record says of a session.
    pub(super) fn note_request(&self, sessions: &mut SessionTable, now: Millis) {
        match self.request {
            Some(RequestKey { session, sequence: 0 }) => sessions.began(session, now),
            Some(key) => sessions.applied(key, self.result, now),
            None => {}
        }
    }

    /// The bytes; `tag` is the log's own.
    pub(super) fn encode(&self, tag: u32) -> [u8; HEADER_LEN] {
        let key = self.request.unwrap_or(RequestKey { session: SessionId([0; 16]), sequence: 0 });
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend(MAGIC.to_le_bytes());
        out.extend([VERSION, self.kind as u8, 0, 0]);
        for number in [
            self.lsn.0,
            self.durable.0,
            self.volume.0,
            self.generation.0,
            self.offset_bytes,
            self.end_bytes,
            self.result,
            key.sequence,
        ] {
            out.extend(number.to_le_bytes());
        }
        out.extend(key.session.0);
        out.extend(self.payload_len.to_le_bytes());
        out.extend(self.payload_crc.to_le_bytes());
        out.extend(tag.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(&out);
        bytes
    }

    /// `Err` says what is wrong.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN], tag: u32) -> Result<Self, &'static str> {
        let (body, crc) = bytes.split_at(HEADER_LEN - 4);
        if crc32c::crc32c(body).to_le_bytes() != crc {
            return Err("the checksum of the header does not match");
        }
        let mut reader = Reader(body);
        if u32::from_le_bytes(reader.take()) != MAGIC {
            return Err("not a record");
        }
        let [version, kind, _, _] = reader.take();
        if version != VERSION {
            return Err("a record of another version");
        }
        let kind = Kind::from_byte(kind).ok_or("a record of an unknown kind")?;
        let [lsn, durable, volume, generation, offset_bytes, end_bytes, result, sequence] =
            std::array::from_fn(|_| u64::from_le_bytes(reader.take()));
        let session = SessionId(reader.take());
        let payload_len = u32::from_le_bytes(reader.take());
        let payload_crc = u32::from_le_bytes(reader.take());
        if u32::from_le_bytes(reader.take()) != tag {
            return Err("a record of another log");
        }
        if payload_len as usize > PAYLOAD_MAX {
            return Err("a payload beyond the limit");
        }
        let has_begun = kind == Kind::Done && session != SessionId::default();
        Ok(Self {
            kind,
            lsn: Lsn(lsn),
            durable: Lsn(durable),
            volume: VolumeId(volume),
            generation: Generation(generation),
            offset_bytes,
            end_bytes,
            request: (sequence > 0 || has_begun).then_some(RequestKey { session, sequence }),
            result,
            payload_len,
            payload_crc,
        })
    }

    /// Whether bytes may begin a header.
    pub(super) fn begins(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC.to_le_bytes())
    }

    /// Bytes of the whole record.
    pub(super) fn record_len(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.payload_len)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) =
            self.0.split_first_chunk().expect("the header's length is the sum of its fields");
        self.0 = rest;
        *head
    }
}

/// Payload of a `Clean` record.
#[derive(Serialize, Deserialize, Debug)]
pub(super) struct CleanPayload(Vec<(u64, u64, u64)>);

impl CleanPayload {
    pub(super) fn new(runs: &[CleanRun]) -> Self {
        Self(runs.iter().map(|r| (r.range.start.0, r.range.len, r.up_to.0)).collect())
    }

    pub(super) fn runs(&self) -> impl Iterator<Item = CleanRun> {
        self.0.iter().map(|(start, len, up_to)| CleanRun {
            range: LblkRange::new(*start, *len),
            up_to: Lsn(*up_to),
        })
    }
}

/// Payload of a `Volume` record.
#[derive(Serialize, Deserialize, Debug)]
pub(super) struct VolumePayload {
    pub(super) name: String,
    pub(super) open: bool,
}

/// Payload of a `Snapshot` record.
#[derive(Serialize, Deserialize, Debug, Default)]
pub(super) struct SnapshotPayload {
    pub(super) sessions: SessionSnapshot,
    pub(super) volumes: BTreeMap<VolumeId, (String, Generation)>,
}
