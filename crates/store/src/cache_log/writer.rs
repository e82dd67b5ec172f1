//! The appending end of the log. Everything here runs under one lock.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::sessions::SessionTable;
use endio_types::{BLOCK_BYTES, Generation, Millis, VOLUME_BYTES_MAX, VolumeId};
use serde::Serialize;

use super::api::{CacheLogError, CacheLogOptions, WriteRecord};
use super::disk::{Disk, LogFile};
use super::live::Live;
use super::record::{Header, Kind, PAYLOAD_MAX, SnapshotPayload};
use super::scan::{Scan, segment_name};

/// The payload of a record on its way.
pub(super) struct Body<'a> {
    pub(super) parts: &'a [&'a [u8]],
    /// Data leaves the reserve to records without which no space would ever become free.
    pub(super) keeps_reserve: bool,
}

/// A file that a flush must cover, by name.
pub(super) type Unsynced = (String, Arc<dyn LogFile>);

/// What one flush covers.
pub(super) struct Target {
    /// The newest record.
    pub(super) last: Lsn,
    /// Files to flush.
    pub(super) files: Vec<Unsynced>,
    /// The newest segment, whose name counts as durable afterwards.
    number: u64,
    /// Whether the directory must be flushed too.
    pub(super) new_name: bool,
}

struct Sealed {
    number: u64,
    last: Lsn,
    bytes: u64,
}

struct Active {
    number: u64,
    file: Arc<dyn LogFile>,
    len: u64,
}

pub(super) struct Writer {
    tag: u32,
    options: CacheLogOptions,
    sealed: VecDeque<Sealed>,
    active: Active,
    last: Lsn,
    bytes: u64,
    /// Sealed files that no flush has covered.
    unsynced: Vec<Unsynced>,
    /// The names of all segments up to this one are durable.
    named: u64,
    /// What the log itself says about sessions: exactly what a snapshot may stand for.
    sessions: SessionTable,
    volumes: BTreeMap<VolumeId, (String, Generation)>,
    pub(super) live: Live,
    poisoned: Option<String>,
    closed: bool,
}

impl Writer {
    /// Begins a new segment after what was found.
    pub(super) fn start(
        disk: &dyn Disk,
        tag: u32,
        options: CacheLogOptions,
        scan: Scan,
    ) -> Result<Self, CacheLogError> {
        let segment_bytes = options.segment_bytes.min(options.max_bytes / 4);
        let number = scan.segments.last().map_or(1, |segment| segment.number + 1);
        let snapshot =
            SnapshotPayload { sessions: scan.sessions.snapshot(), volumes: scan.volumes.clone() };
        let active = begin_segment(disk, tag, number, scan.last.next(), scan.last, &snapshot)?;
        let sealed: VecDeque<Sealed> = scan
            .segments
            .iter()
            .map(|s| Sealed { number: s.number, last: s.last, bytes: s.bytes })
            .collect();
        let bytes = sealed.iter().map(|s| s.bytes).sum::<u64>() + active.len;
        Ok(Self {
            tag,
            options: CacheLogOptions { segment_bytes, ..options },
            sealed,
            active,
            last: scan.last.next(),
            bytes,
            unsynced: Vec::new(),
            named: number - 1,
            sessions: scan.sessions,
            volumes: scan.volumes,
            live: scan.live,
            poisoned: None,
            closed: false,
        })
    }

    fn usable(&self) -> Result<(), CacheLogError> {
        match &self.poisoned {
            Some(what) => Err(CacheLogError::Poisoned(what.clone())),
            None if self.closed => Err(CacheLogError::Closed),
            None => Ok(()),
        }
    }

    /// Appends one record; on an error the log is as before.
    pub(super) fn append(
        &mut self,
        disk: &dyn Disk,
        header: Header,
        body: &Body<'_>,
        durable: Lsn,
    ) -> Result<Lsn, CacheLogError> {
        self.usable()?;
        let CacheLogOptions { segment_bytes, max_bytes, sessions_max } = self.options;
        let bound = if body.keeps_reserve { max_bytes - max_bytes / 16 } else { max_bytes };
        if self.bytes.saturating_add(header.record_len()) > bound {
            return Err(CacheLogError::Full { used_bytes: self.bytes, max_bytes });
        }
        if self.active.len >= segment_bytes {
            self.rotate(disk, durable)?;
        }
        let lsn = self.last.next();
        let head = Header { lsn, durable, ..header }.encode(self.tag);
        if let Err(source) = self.active.file.write_at(self.active.len, &head, body.parts) {
            let name = segment_name(self.active.number);
            // A partial record in the middle would read as damage. The flush keeps the two
            // records that have the same number and place from being mixed by a power loss.
            let file = &self.active.file;
            if let Err(error) = file.truncate(self.active.len).and_then(|()| file.sync()) {
                self.poison(format!("{name}: a failed write could not be taken back: {error}"));
            }
            return Err(write_error(disk, &name, source));
        }
        self.active.len += header.record_len();
        self.bytes += header.record_len();
        self.last = lsn;
        if header.request.is_some() {
            header.note_request(&mut self.sessions, Millis(lsn.0));
            self.sessions.forget_idlest(sessions_max);
        }
        Ok(lsn)
    }

    /// Begins a new segment. The end of the old one need not be durable: a reader drops all that
    /// follows a gap which nothing calls durable. Its name must be, or a power loss could take
    /// the whole segment and leave a log that seems to begin later.
    pub(super) fn rotate(&mut self, disk: &dyn Disk, durable: Lsn) -> Result<(), CacheLogError> {
        self.usable()?;
        if self.named < self.active.number {
            if let Err(source) = disk.sync_dir() {
                self.poison(format!("a flush of the directory failed: {source}"));
                return Err(CacheLogError::Io { path: disk.path(""), source });
            }
            self.named = self.active.number;
        }
        let snapshot =
            SnapshotPayload { sessions: self.sessions.snapshot(), volumes: self.volumes.clone() };
        let number = self.active.number + 1;
        let next = begin_segment(disk, self.tag, number, self.last.next(), durable, &snapshot)
            .inspect_err(|error| {
                if let CacheLogError::Poisoned(what) = error {
                    self.poisoned = Some(what.clone());
                }
            })?;
        let old = std::mem::replace(&mut self.active, next);
        self.sealed.push_back(Sealed { number: old.number, last: self.last, bytes: old.len });
        self.unsynced.push((segment_name(old.number), old.file));
        self.last = self.last.next();
        self.bytes += self.active.len;
        Ok(())
    }

    /// # Errors
    /// [`CacheLogError::Poisoned`]: nothing becomes durable any more.
    pub(super) fn unpoisoned(&self) -> Result<(), CacheLogError> {
        let poisoned = self.poisoned.clone();
        poisoned.map_or(Ok(()), |what| Err(CacheLogError::Poisoned(what)))
    }

    /// Whether there is no other segment than the active one.
    pub(super) fn is_one_segment(&self) -> bool {
        self.sealed.is_empty()
    }

    /// What a flush must cover to make everything up to the target durable.
    pub(super) fn take_unsynced(&mut self) -> Result<Target, CacheLogError> {
        self.unpoisoned()?;
        // A flush that fails poisons the log, so nothing has to be put back.
        let mut files = std::mem::take(&mut self.unsynced);
        files.push((segment_name(self.active.number), self.active.file.clone()));
        let (number, last) = (self.active.number, self.last);
        Ok(Target { last, files, number, new_name: self.named < number })
    }

    /// A flush of that target has succeeded.
    pub(super) fn flushed(&mut self, target: &Target) {
        self.named = self.named.max(target.number);
        // What a `Clean` record covers is forgotten before anybody can see it as durable.
        self.live.durable(target.last);
    }

    pub(super) fn volume_mark(
        &mut self,
        volume: VolumeId,
        name: &str,
        generation: Generation,
        open: bool,
    ) {
        if open {
            self.volumes.insert(volume, (name.to_owned(), generation));
        } else {
            self.volumes.remove(&volume);
        }
    }

    /// The first segment, if all of it is older: its name and size.
    pub(super) fn trimmable(&self, before: Lsn) -> Option<(String, u64)> {
        let first = self.sealed.front().filter(|first| first.last < before)?;
        Some((segment_name(first.number), first.bytes))
    }

    /// The first segment is gone.
    pub(super) fn trimmed(&mut self) {
        if let Some(first) = self.sealed.pop_front() {
            self.bytes -= first.bytes;
            self.live.trimmed(first.last.next());
        }
    }

    pub(super) fn poison(&mut self, what: String) {
        self.poisoned.get_or_insert(what);
    }

    pub(super) fn close(&mut self) -> Result<(), CacheLogError> {
        self.usable()?;
        self.closed = true;
        Ok(())
    }

    pub(super) fn last(&self) -> Lsn {
        self.last
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn begin_segment(
    disk: &dyn Disk,
    tag: u32,
    number: u64,
    lsn: Lsn,
    durable: Lsn,
    snapshot: &SnapshotPayload,
) -> Result<Active, CacheLogError> {
    let name = segment_name(number);
    let payload = encode(snapshot)?;
    let header = with_payload(Header::plain(Kind::Snapshot), &[&payload])?;
    let header = Header { lsn, durable, ..header };
    let file = disk.create(&name).map_err(|source| write_error(disk, &name, source))?;
    endio_failpoints::reach(endio_failpoints::Point::LogSegmentCreated);
    if let Err(source) = file.write_at(0, &header.encode(tag), &[&payload]) {
        if let Err(error) = disk.remove(&name) {
            return Err(CacheLogError::Poisoned(format!("{name} cannot be removed: {error}")));
        }
        return Err(write_error(disk, &name, source));
    }
    Ok(Active { number, file, len: header.record_len() })
}

fn write_error(disk: &dyn Disk, name: &str, source: io::Error) -> CacheLogError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CacheLogError::DiskFull,
        _ => CacheLogError::Io { path: disk.path(name), source },
    }
}

/// Encodes a payload.
pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CacheLogError> {
    postcard::to_extend(value, Vec::new())
        .map_err(|error| CacheLogError::Invalid(format!("payload: {error}")))
}

/// Fills in length and checksum.
pub(super) fn with_payload(header: Header, parts: &[&[u8]]) -> Result<Header, CacheLogError> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len > PAYLOAD_MAX {
        return Err(CacheLogError::Invalid(format!("a payload of {len} bytes")));
    }
    let payload_len = u32::try_from(len).expect("the limit fits in 32 bits");
    let payload_crc = parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part));
    Ok(Header { payload_len, payload_crc, ..header })
}

/// The header of a write, if the write is possible.
pub(super) fn write_header(
    write: &WriteRecord,
    payload: &[&[u8]],
) -> Result<Header, CacheLogError> {
    if write.blocks.is_empty() || write.blocks.end() > VOLUME_BYTES_MAX / BLOCK_BYTES {
        return Err(CacheLogError::Invalid(format!("blocks {:?}", write.blocks)));
    }
    let header = with_payload(Header::of_write(write), payload)?;
    if u64::from(header.payload_len) != write.blocks.len * BLOCK_BYTES {
        let (blocks, len) = (write.blocks.len, header.payload_len);
        return Err(CacheLogError::Invalid(format!("{len} bytes for {blocks} blocks")));
    }
    if write.request.is_some_and(|key| key.sequence == 0) {
        return Err(CacheLogError::Invalid("request number 0".into()));
    }
    Ok(header)
}
