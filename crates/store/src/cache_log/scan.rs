//! Reading a log at start: what is whole, what is a torn tail, what is damage.

use std::sync::Arc;

use endio_failpoints::{Point, reach};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::sessions::SessionTable;
use endio_types::Millis;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

use endio_types::{BLOCK_BYTES, Generation, VolumeId};

use super::api::CacheLogError;
use super::disk::{Disk, LogFile};
use super::hidden::Hidden;
use super::live::Live;
use super::record::{CleanPayload, HEADER_LEN, Header, Kind, SnapshotPayload, VolumePayload};

const STATE: &str = "state";
const STATE_NEW: &str = "state.new";
const STATE_BYTES_MAX: u64 = 16 << 20;

/// What is known about the log as a whole. Written durably at each open and clean close.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub(super) version: u32,
    /// Stands in each record: bytes of another log are never taken for records of this one.
    pub(super) tag: u32,
    pub(super) boot_id: String,
    /// Closed after everything was durable.
    pub(super) clean: bool,
    /// Everything up to here was durable when this was written.
    pub(super) durable: Lsn,
    /// There was a power loss since the last clean close: volumes that were open then and have
    /// not been closed since. Kept over kills, so that one does not hide the loss.
    #[serde(default)]
    pub(super) lost: Option<BTreeSet<VolumeId>>,
    /// Volumes of which acknowledged writes are lost, as nobody was told yet; over closes of the volume
    /// and of the log.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(super) untold: BTreeSet<VolumeId>,
}

/// The state of a directory; `None`: there is no log in it.
pub(super) fn read_state(disk: &dyn Disk) -> Result<Option<State>, CacheLogError> {
    if !list(disk)?.iter().any(|name| name == STATE) {
        return Ok(None);
    }
    let io = |source| CacheLogError::Io { path: disk.path(STATE), source };
    let file = disk.open(STATE).map_err(io)?;
    let len = file.len().map_err(io)?.min(STATE_BYTES_MAX);
    let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(0, &mut text).map_err(io)?;
    let damaged = |what: String| CacheLogError::Damaged { path: disk.path(STATE), offset: 0, what };
    let (crc, body) = text.split_first_chunk::<8>().ok_or_else(|| damaged("too short".into()))?;
    if format!("{:08x}", crc32c::crc32c(body)).as_bytes() != crc {
        return Err(damaged("the checksum does not match".into()));
    }
    let state: State = serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))?;
    if state.version != 1 {
        return Err(damaged(format!("version {} is not known", state.version)));
    }
    Ok(Some(state))
}

/// Replaces the state; durable when it returns.
pub(super) fn write_state(disk: &dyn Disk, state: &State) -> Result<(), CacheLogError> {
    let body = serde_json::to_vec(state)
        .map_err(|error| CacheLogError::Invalid(format!("state: {error}")))?;
    let crc = format!("{:08x}", crc32c::crc32c(&body));
    let write = || {
        if disk.list()?.iter().any(|name| name == STATE_NEW) {
            disk.remove(STATE_NEW)?;
        }
        let file = disk.create(STATE_NEW)?;
        file.write_at(0, crc.as_bytes(), &[&body])?;
        file.sync()?;
        reach(Point::LogStateWritten);
        disk.rename(STATE_NEW, STATE)?;
        reach(Point::LogStateRenamed);
        disk.sync_dir()
    };
    write().map_err(|source| CacheLogError::Io { path: disk.path(STATE), source })
}

fn list(disk: &dyn Disk) -> Result<Vec<String>, CacheLogError> {
    disk.list().map_err(|source| CacheLogError::Io { path: disk.path(""), source })
}

/// File name of a segment.
pub(super) fn segment_name(number: u64) -> String {
    format!("segment-{number:016x}.log")
}

fn segment_number(name: &str) -> Option<u64> {
    let hex = name.strip_prefix("segment-")?.strip_suffix(".log")?;
    if hex.len() == 16 { u64::from_str_radix(hex, 16).ok() } else { None }
}

/// A whole segment.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: Arc<dyn LogFile>,
    pub(super) last: Lsn,
    pub(super) bytes: u64,
}

/// Where a write record lies.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) header: Header,
    pub(super) file: Arc<dyn LogFile>,
    pub(super) number: u64,
    pub(super) payload_at: u64,
}

/// Everything that a log says.
pub(super) struct Scan {
    pub(super) segments: Vec<Segment>,
    pub(super) writes: Vec<Found>,
    pub(super) live: Live,
    pub(super) hidden: Hidden,
    pub(super) sessions: SessionTable,
    pub(super) volumes: BTreeMap<VolumeId, (String, Generation)>,
    pub(super) last: Lsn,
    /// The newest snapshot: what begins the newest segment.
    pub(super) snapshot: Lsn,
    /// Newest record that some record calls durable.
    claimed: Lsn,
    pub(super) torn_bytes: u64,
}

/// Where the first record lies that is not whole.
struct Broken {
    index: usize,
    offset: u64,
    what: &'static str,
    /// The file ends inside the record: a write that was cut short.
    cut_short: bool,
}

/// Reads all segments, cuts a torn tail off and refuses damage.
pub(super) fn scan(
    disk: &dyn Disk,
    state: &State,
    power_lost: bool,
    sessions: SessionTable,
) -> Result<Scan, CacheLogError> {
    let numbers = numbers(disk)?;
    let mut scan = Scan {
        segments: Vec::new(),
        writes: Vec::new(),
        live: Live::default(),
        hidden: Hidden::default(),
        sessions,
        volumes: BTreeMap::new(),
        last: Lsn(0),
        snapshot: Lsn(0),
        claimed: state.durable,
        torn_bytes: 0,
    };
    let mut files = Vec::new();
    for number in numbers {
        let name = segment_name(number);
        let io = |source| CacheLogError::Io { path: disk.path(&name), source };
        let file = disk.open(&name).map_err(io)?;
        let len = file.len().map_err(io)?;
        files.push((number, file, len));
    }
    for index in 0..files.len() {
        let (number, file, len) = &files[index];
        if let Some(broken) = scan.segment(disk, state.tag, index, *number, file, *len)? {
            scan.tail(disk, state, power_lost, &files, &broken)?;
            break;
        }
    }
    if scan.last < state.durable {
        return Err(CacheLogError::Damaged {
            path: disk.path(""),
            offset: 0,
            what: format!("records {} to {} are missing", scan.last.next(), state.durable),
        });
    }
    Ok(scan)
}

fn numbers(disk: &dyn Disk) -> Result<Vec<u64>, CacheLogError> {
    let mut numbers: Vec<u64> = list(disk)?.iter().filter_map(|n| segment_number(n)).collect();
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        if pair[0] + 1 != pair[1] {
            return Err(CacheLogError::Damaged {
                path: disk.path(&segment_name(pair[0] + 1)),
                offset: 0,
                what: "the segment is missing between others".into(),
            });
        }
    }
    Ok(numbers)
}

impl Scan {
    /// Reads one segment up to its end or to the first record that is not whole.
    fn segment(
        &mut self,
        disk: &dyn Disk,
        tag: u32,
        index: usize,
        number: u64,
        file: &Arc<dyn LogFile>,
        len: u64,
    ) -> Result<Option<Broken>, CacheLogError> {
        let name = segment_name(number);
        let mut at = 0;
        let mut first = None;
        let mut broken = None;
        while at < len {
            let (header, payload) = match read_record(file, tag, at, len) {
                Ok(record) => record,
                Err(Bad::Io(source)) => {
                    return Err(CacheLogError::Io { path: disk.path(&name), source });
                }
                Err(Bad::Broken { what, cut_short }) => {
                    broken = Some(Broken { index, offset: at, what, cut_short });
                    break;
                }
            };
            let damaged = |what: &str| CacheLogError::Damaged {
                path: disk.path(&name),
                offset: at,
                what: what.into(),
            };
            let starts_log = index == 0 && first.is_none();
            if !starts_log && header.lsn != self.last.next() {
                let what = "a record is missing before this one";
                if first.is_some() {
                    // No flush makes part of a file durable and leaves whole records out of it.
                    return Err(damaged(what));
                }
                // The segment before it ends with a whole record, but too early: its end never
                // reached the disk, or it was damaged.
                broken = Some(Broken { index, offset: 0, what, cut_short: false });
                break;
            }
            if (first.is_none()) != (header.kind == Kind::Snapshot) {
                return Err(damaged("a segment does not begin with a snapshot"));
            }
            first = Some(header.lsn);
            self.last = header.lsn;
            self.claimed = self.claimed.max(header.durable);
            self.apply(header, &payload, file, number, at).map_err(damaged)?;
            at += header.record_len();
        }
        if len == 0 {
            let what = "the segment is empty";
            broken = Some(Broken { index, offset: 0, what, cut_short: true });
        }
        if first.is_some() {
            let (file, last) = (file.clone(), self.last);
            self.segments.push(Segment { number, file, last, bytes: at });
        }
        Ok(broken)
    }

    fn apply(
        &mut self,
        header: Header,
        payload: &[u8],
        file: &Arc<dyn LogFile>,
        number: u64,
        at: u64,
    ) -> Result<(), &'static str> {
        let unreadable = "a payload that cannot be read";
        // The table orders sessions by use: numbers of records serve as its clock here.
        let now = Millis(header.lsn.0);
        match header.kind {
            Kind::Write => {
                if !payload.len().is_multiple_of(BLOCK_BYTES as usize) {
                    return Err("a write that is not whole blocks");
                }
                let write = header.write();
                let hide = |lblk, older| self.hidden.hide(write.volume, lblk, older);
                self.live.wrote_over(header.lsn, write.volume, write.blocks, hide);
                let payload_at = at + HEADER_LEN as u64;
                self.writes.push(Found { header, file: file.clone(), number, payload_at });
            }
            Kind::Clean => {
                let clean: CleanPayload = postcard::from_bytes(payload).map_err(|_| unreadable)?;
                for run in clean.runs() {
                    self.clean(header.volume, run);
                }
            }
            Kind::Snapshot => {
                let snapshot: SnapshotPayload =
                    postcard::from_bytes(payload).map_err(|_| unreadable)?;
                self.sessions.follow(snapshot.sessions, now);
                self.snapshot = header.lsn;
                self.volumes = snapshot.volumes;
            }
            Kind::Volume => {
                let mark: VolumePayload = postcard::from_bytes(payload).map_err(|_| unreadable)?;
                if mark.open {
                    self.volumes.insert(header.volume, (mark.name, header.generation));
                } else {
                    self.volumes.remove(&header.volume);
                    self.clean(header.volume, Live::all(header.lsn));
                }
            }
            Kind::Done => {}
        }
        header.note_request(&mut self.sessions, now);
        Ok(())
    }

    fn clean(&mut self, volume: VolumeId, run: CleanRun) {
        self.live.clean(volume, run);
        self.hidden.clean(volume, run);
    }

    /// Volumes of which acknowledged writes may be missing; `None`: no power loss is on record.
    pub(super) fn lost(
        &self,
        before: Option<BTreeSet<VolumeId>>,
        power_lost: bool,
    ) -> Option<BTreeSet<VolumeId>> {
        let open = self.volumes.keys().copied();
        if power_lost {
            return Some(open.collect());
        }
        before.map(|before| open.filter(|volume| before.contains(volume)).collect())
    }

    /// Decides whether what is broken is a tail that may be cut off, and cuts it off.
    fn tail(
        &mut self,
        disk: &dyn Disk,
        state: &State,
        power_lost: bool,
        files: &[(u64, Arc<dyn LogFile>, u64)],
        broken: &Broken,
    ) -> Result<(), CacheLogError> {
        let (number, file, len) = &files[broken.index];
        let name = segment_name(*number);
        let is_last = broken.index + 1 == files.len();
        let torn = if state.clean {
            false
        } else if power_lost {
            self.newest_claim(disk, state.tag, files, broken)? <= self.last
        } else {
            // Without a power loss the page cache kept all that was written: only the very last
            // write can have been cut short.
            is_last && broken.cut_short
        };
        if !torn {
            return Err(CacheLogError::Damaged {
                path: disk.path(&name),
                offset: broken.offset,
                what: broken.what.into(),
            });
        }
        let io = |source| CacheLogError::Io { path: disk.path(&name), source };
        // Backwards, so that a crash in between leaves a log without holes.
        for (number, _, len) in files[broken.index + 1..].iter().rev() {
            self.torn_bytes += len;
            disk.remove(&segment_name(*number)).map_err(io)?;
            disk.sync_dir().map_err(io)?;
        }
        self.torn_bytes += len - broken.offset;
        if broken.offset == 0 {
            disk.remove(&name).map_err(io)?;
            disk.sync_dir().map_err(io)
        } else {
            file.truncate(broken.offset).map_err(io)?;
            file.sync().map_err(io)
        }
    }

    /// The newest record that anything, before or behind what is broken, calls durable.
    fn newest_claim(
        &self,
        disk: &dyn Disk,
        tag: u32,
        files: &[(u64, Arc<dyn LogFile>, u64)],
        broken: &Broken,
    ) -> Result<Lsn, CacheLogError> {
        let mut newest = self.claimed;
        for (index, (number, file, len)) in files.iter().enumerate().skip(broken.index) {
            let from = if index == broken.index { broken.offset } else { 0 };
            let mut bytes = vec![0; usize::try_from(len - from).unwrap_or(0)];
            file.read_at(from, &mut bytes).map_err(|source| CacheLogError::Io {
                path: disk.path(&segment_name(*number)),
                source,
            })?;
            for window in bytes.windows(HEADER_LEN) {
                // Cheap first: almost no position begins with the magic number.
                if !Header::begins(window) {
                    continue;
                }
                let Ok(head) = <&[u8; HEADER_LEN]>::try_from(window) else { continue };
                if let Ok(header) = Header::decode(head, tag) {
                    newest = newest.max(header.durable);
                }
            }
        }
        Ok(newest)
    }
}

enum Bad {
    Io(std::io::Error),
    Broken { what: &'static str, cut_short: bool },
}

fn read_record(
    file: &Arc<dyn LogFile>,
    tag: u32,
    at: u64,
    len: u64,
) -> Result<(Header, Vec<u8>), Bad> {
    if len - at < HEADER_LEN as u64 {
        return Err(Bad::Broken { what: "the file ends inside a header", cut_short: true });
    }
    let mut head = [0; HEADER_LEN];
    file.read_at(at, &mut head).map_err(Bad::Io)?;
    let header =
        Header::decode(&head, tag).map_err(|what| Bad::Broken { what, cut_short: false })?;
    if len - at < header.record_len() {
        return Err(Bad::Broken { what: "the file ends inside a payload", cut_short: true });
    }
    let mut payload = vec![0; header.payload_len as usize];
    file.read_at(at + HEADER_LEN as u64, &mut payload).map_err(Bad::Io)?;
    if crc32c::crc32c(&payload) != header.payload_crc {
        let what = "the checksum of the payload does not match";
        return Err(Bad::Broken { what, cut_short: false });
    }
    Ok((header, payload))
}
