//! The commit journal: the truth.
//!
//! Records are buffered by `append` and become durable, all of them, with the one `fdatasync` of
//! `commit`. A failed write or sync closes the journal for good: what the disk holds then is found
//! out by a restart, never guessed.
//!
//! A segment is lengthened with zeroes ahead of its records, so that most commits change no size and
//! no block of the file: the file system then has nothing of its own to make durable (measured:
//! docs/PERFORMANCE.md).
//!
//! # Invariants
//! * `journal-gapless`: records are numbered without gaps; a missing one is damage, not an end.
//! * `no-retry-of-a-failed-sync`: after an error nothing is promised any more.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use endio_failpoints::{Bug, Point, is_planted, reach, reach_io};

use super::api::Record;
use super::canary::write_durably;
use super::segment::{PAYLOAD_BYTES_MAX, SEGMENT_HEADER, Tail};
use super::segment::{put_record, scan, segment_first, segment_header, segment_name};
use super::shared::{JournalHandle, Shared, fault};
use super::vfs::{Vfs, VfsFile};
use super::{MetaError, names};

/// The append-only commit journal.
pub struct Journal {
    shared: Arc<Shared>,
    file: Box<dyn VfsFile>,
    name: String,
    /// Where the records of the current segment end, in bytes.
    len: u64,
    /// Length of its file: zeroes follow the records.
    room: u64,
    mark: Box<dyn VfsFile>,
    buffer: Vec<u8>,
    /// Last record appended.
    last: u64,
    /// Last record known to be durable.
    durable: u64,
    epoch: u64,
    poison: Option<String>,
}

impl Journal {
    /// Begins a fresh segment behind what was found.
    pub(crate) fn start(shared: Arc<Shared>, last: u64, epoch: u64) -> Result<Self, MetaError> {
        let (file, name) = new_segment(&shared, last + 1)?;
        let vfs = &shared.vfs;
        let mark = match vfs.len(names::MARK) {
            Ok(len) if len == MARK_BYTES as u64 => vfs.open(names::MARK),
            _ => vfs.create(names::MARK).and_then(|mut file| {
                file.append(&encode_mark(shared.database, last))?;
                Ok(file)
            }),
        };
        let mark = mark.map_err(|error| shared.fail("open", names::MARK, error))?;
        Ok(Self {
            shared,
            file,
            name,
            len: SEGMENT_HEADER as u64,
            room: SEGMENT_HEADER as u64,
            mark,
            buffer: Vec::new(),
            last,
            durable: last,
            epoch,
            poison: None,
        })
    }

    /// Buffers a record; nothing is promised before [`Self::commit`].
    ///
    /// # Errors
    /// [`MetaError::Misuse`] if `seq` is not the last one + 1, the epoch goes back, or the payload
    /// is longer than 16 MiB; nothing is buffered then.
    pub fn append(&mut self, seq: u64, epoch: u64, payload: &[u8]) -> Result<(), MetaError> {
        self.check_alive()?;
        if seq != self.last + 1 {
            return Err(MetaError::Misuse("a record must have the next sequence number"));
        }
        if epoch < self.epoch {
            return Err(MetaError::Misuse("the epoch of a record must not go back"));
        }
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(MetaError::Misuse("a record must not be longer than 16 MiB"));
        }
        put_record(&mut self.buffer, seq, self.durable, epoch, payload);
        self.last = seq;
        self.epoch = epoch;
        Ok(())
    }

    /// Makes everything appended durable with one `fdatasync` and returns the last durable
    /// number. With nothing appended it does nothing.
    ///
    /// # Errors
    /// After an error the journal refuses everything: whether the group is durable is unknown
    /// until a restart.
    pub fn commit(&mut self) -> Result<u64, MetaError> {
        self.check_alive()?;
        if self.buffer.is_empty() {
            return Ok(self.durable);
        }
        let result = self.write_group();
        self.poisoning(result)?;
        if self.len >= self.shared.options.segment_bytes {
            self.rotate()?;
        }
        Ok(self.durable)
    }

    /// Commits, and begins a new segment, so that a checkpoint at the returned number can drop
    /// whole segments.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn rotate(&mut self) -> Result<u64, MetaError> {
        self.check_alive()?;
        if !self.buffer.is_empty() {
            let result = self.write_group();
            self.poisoning(result)?;
        }
        if self.len > SEGMENT_HEADER as u64 {
            let result = self.next_segment();
            self.poisoning(result)?;
        }
        Ok(self.durable)
    }

    /// Whether new work is to be refused because the metadata disk is full.
    pub fn is_degraded(&self) -> bool {
        self.shared.is_degraded()
    }

    /// Numbers for other threads.
    pub fn handle(&self) -> JournalHandle {
        JournalHandle(Arc::clone(&self.shared))
    }

    fn check_alive(&self) -> Result<(), MetaError> {
        match &self.poison {
            Some(reason) => Err(MetaError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    fn poisoning<R>(&mut self, result: Result<R, MetaError>) -> Result<R, MetaError> {
        if let Err(error) = &result {
            self.poison = Some(error.to_string());
        }
        result
    }

    fn write_group(&mut self) -> Result<(), MetaError> {
        self.make_room(self.buffer.len() as u64)?;
        let written = self.file.write_at(self.len, &self.buffer);
        written.map_err(|error| self.shared.fail("write", &self.name, error))?;
        let fail = |error| self.shared.fail("sync", &self.name, error);
        reach_io(Point::JournalWritten).map_err(fail)?;
        if !is_planted(Bug::JournalSkipsSync) {
            self.file.sync_data().map_err(fail)?;
        }
        reach(Point::JournalSynced);
        let bytes = self.buffer.len() as u64;
        self.len += bytes;
        self.durable = self.last;
        self.buffer.clear();
        // A hint only, so neither synced nor checked: see `read_mark`.
        let _ = self.mark.write_at(0, &encode_mark(self.shared.database, self.durable));
        self.shared.committed(self.durable, bytes);
        Ok(())
    }

    /// Lengthens the file so that `bytes` more fit behind the records.
    fn make_room(&mut self, bytes: u64) -> Result<(), MetaError> {
        let end = self.len + bytes;
        if end <= self.room {
            return Ok(());
        }
        let segment = self.shared.options.segment_bytes;
        let ahead = ZEROES.len() as u64;
        // Never far beyond where the next segment begins, and never for longer than the disk has room.
        let wanted = end.max((end + ahead).min(segment));
        while self.room < wanted {
            let zeroes = &ZEROES[..usize::try_from((wanted - self.room).min(ahead)).unwrap_or(0)];
            match self.file.append(zeroes) {
                Ok(count) => self.room += count as u64,
                Err(error) if is_full(&error) && self.room >= end => return Ok(()),
                Err(error) if is_full(&error) && self.shared.drop_ballast() => {}
                Err(error) => return Err(self.shared.fail("append to", &self.name, error)),
            }
        }
        Ok(())
    }

    fn next_segment(&mut self) -> Result<(), MetaError> {
        // Space that nobody uses. Where it stays, after a power cut say, it is zeroes and says nothing.
        let _ = self.shared.vfs.truncate(&self.name, self.len);
        let (file, name) = new_segment(&self.shared, self.durable + 1)?;
        (self.file, self.name) = (file, name);
        self.len = SEGMENT_HEADER as u64;
        self.room = self.len;
        Ok(())
    }
}

/// How far a segment is lengthened ahead of its records. Too small: the file system's own commit is paid
/// for often. Too large: one commit in so many waits for all of it.
static ZEROES: [u8; 512 << 10] = [0; 512 << 10];

/// Appends everything; gives the ballast up, once, if the disk is full.
fn append_all(
    shared: &Shared,
    file: &mut dyn VfsFile,
    name: &str,
    mut data: &[u8],
) -> Result<(), MetaError> {
    let mut gave_up = false;
    while !data.is_empty() {
        match file.append(data) {
            Ok(count) => data = &data[count..],
            Err(error) if is_full(&error) && !gave_up && shared.drop_ballast() => gave_up = true,
            Err(error) => return Err(shared.fail("append to", name, error)),
        }
    }
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A segment whose header and name are durable before any record is written to it.
fn new_segment(shared: &Shared, first: u64) -> Result<(Box<dyn VfsFile>, String), MetaError> {
    let name = segment_name(first);
    let created = match shared.vfs.create(&name) {
        Err(error) if is_full(&error) && shared.drop_ballast() => shared.vfs.create(&name),
        other => other,
    };
    let mut file = created.map_err(|error| shared.fail("create", &name, error))?;
    append_all(shared, file.as_mut(), &name, &segment_header(shared.database, first))?;
    file.sync_data().map_err(|error| shared.fail("sync", &name, error))?;
    reach(Point::JournalSegmentCreated);
    if !is_planted(Bug::JournalSkipsDirectory) {
        let fail = |error| shared.fail("sync the directory of", &name, error);
        shared.vfs.sync_dir().map_err(fail)?;
    }
    Ok((file, name))
}

const MARK_BYTES: usize = 20;

fn encode_mark(database: u64, durable: u64) -> [u8; MARK_BYTES] {
    let mut mark = [0; MARK_BYTES];
    mark[..8].copy_from_slice(&database.to_le_bytes());
    mark[8..16].copy_from_slice(&durable.to_le_bytes());
    let crc = crc32c::crc32c(&mark[..16]);
    mark[16..].copy_from_slice(&crc.to_le_bytes());
    mark
}

/// The last record that is known to have been durable. Written after each commit without a sync of
/// its own: it survives a kill, and after a power cut it may be old or missing, but it is never
/// ahead of the truth. So a journal that ends before it was damaged.
pub(crate) fn read_mark(vfs: &dyn Vfs, database: u64) -> Option<u64> {
    let bytes = vfs.read(names::MARK, 0, MARK_BYTES).ok()?;
    let durable = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
    (bytes == encode_mark(database, durable)).then_some(durable)
}

/// What the segments on disk hold.
#[derive(Default)]
pub(crate) struct Found {
    /// Names and first sequence numbers, in order.
    pub(crate) segments: Vec<(String, u64)>,
    /// Last record; that before the first segment if there is none.
    pub(crate) last: u64,
    /// Epoch of the last record.
    pub(crate) epoch: u64,
    /// Length of the records after `after`, in bytes.
    pub(crate) bytes: u64,
}

pub(crate) fn read_segment(vfs: &dyn Vfs, name: &str) -> Result<Bytes, MetaError> {
    vfs.len(name)
        .and_then(|len| vfs.read(name, 0, len as usize))
        .map(Bytes::from)
        .map_err(|error| fault(vfs, "read", name, error))
}

/// Reads and checks every segment that holds records after `after`, and cuts a torn tail off the
/// last one.
pub(crate) fn find(vfs: &dyn Vfs, database: u64, after: u64) -> Result<Found, MetaError> {
    let names = vfs.list().map_err(|error| fault(vfs, "list", ".", error))?;
    let mut all: Vec<(String, u64)> =
        names.into_iter().filter_map(|name| segment_first(&name).map(|n| (name, n))).collect();
    all.sort_unstable_by_key(|(_, first)| *first);
    // The last segment that begins at or before the first record wanted, and all behind it.
    let skip = all.iter().rposition(|(_, first)| *first <= after + 1).unwrap_or(0);
    let segments = all.split_off(skip);
    if segments.is_empty() && after > 0 {
        return Err(damaged(vfs, &segment_name(after + 1), 0, "there is no journal".into()));
    }
    let mut found = Found { last: after, ..Found::default() };
    if let Some((name, first)) = segments.first() {
        if *first > after + 1 {
            return Err(damaged(
                vfs,
                name,
                0,
                format!("records from {} on are missing", after + 1),
            ));
        }
        found.last = first - 1;
    }
    let count = segments.len();
    for (n, (name, first)) in segments.into_iter().enumerate() {
        if first != found.last + 1 {
            let what = format!("records {} to {} are missing before it", found.last + 1, first - 1);
            return Err(damaged(vfs, &name, 0, what));
        }
        let is_last = n + 1 == count;
        if check_segment(vfs, database, &name, first, is_last, after, &mut found)? {
            found.segments.push((name, first));
        }
    }
    let marked = read_mark(vfs, database).unwrap_or(0);
    if found.last < marked.max(after) {
        let name = found.segments.last().map_or(".", |(name, _)| name.as_str());
        let end = vfs.len(name).unwrap_or(0);
        let lost = marked.max(after);
        let what = format!("it ends with record {}, but {lost} was durable", found.last);
        return Err(damaged(vfs, name, end, what));
    }
    Ok(found)
}

/// Checks one segment; `false` if it is an empty one that was never finished, and is gone now.
fn check_segment(
    vfs: &dyn Vfs,
    database: u64,
    name: &str,
    first: u64,
    is_last: bool,
    after: u64,
    found: &mut Found,
) -> Result<bool, MetaError> {
    let bytes = read_segment(vfs, name)?;
    let scan = scan(&bytes, database, first, found.epoch);
    for record in &scan.records {
        found.last = record.seq;
        found.epoch = record.epoch;
        if record.seq > after {
            found.bytes += record.payload.len() as u64;
        }
    }
    let marked = read_mark(vfs, database).unwrap_or(0);
    match scan.tail {
        Tail::Clean if !is_last => Ok(true),
        Tail::Clean | Tail::Torn if is_last && found.last >= marked => {
            let len = bytes.len() as u64;
            if scan.tail == Tail::Torn && scan.good_len < len {
                tracing::info!(file = name, offset = scan.good_len, "cut off a torn tail");
            }
            settle(vfs, name, &bytes[..scan.good_len as usize])
        }
        Tail::Clean => Ok(true),
        Tail::Torn => {
            let what = format!("record {} is unreadable but was durable", found.last + 1);
            Err(damaged(vfs, name, scan.good_len, what))
        }
        Tail::Damaged(what) => Err(damaged(vfs, name, scan.good_len, what)),
    }
}

/// Makes what was found durable before anything is built upon it: from here on it counts as
/// committed. It is written anew, because after a failed sync the kernel may show pages that it
/// could not write and does not try to write again.
fn settle(vfs: &dyn Vfs, name: &str, good: &[u8]) -> Result<bool, MetaError> {
    let fail = |error| fault(vfs, "settle", name, error);
    if good.len() < SEGMENT_HEADER {
        vfs.remove(name).map_err(fail)?;
        vfs.sync_dir().map_err(fail)?;
        return Ok(false);
    }
    match write_durably(vfs, names::JOURNAL_NEW, name, good) {
        Err(MetaError::NoSpace { .. }) => {
            // On a full disk the file as it is must do.
            let _ = vfs.remove(names::JOURNAL_NEW);
            vfs.truncate(name, good.len() as u64).map_err(fail)?;
            vfs.open(name).and_then(|mut file| file.sync_data()).map_err(fail)?;
            Ok(true)
        }
        other => other.map(|()| true),
    }
}

pub(crate) fn damaged(vfs: &dyn Vfs, name: &str, offset: u64, what: String) -> MetaError {
    MetaError::Damaged { file: vfs.path(name), offset, what }
}

/// The records after the snapshot, read one segment at a time. Ends after the first error.
pub struct Records {
    shared: Arc<Shared>,
    segments: std::vec::IntoIter<(String, u64)>,
    current: std::vec::IntoIter<Record>,
    next: u64,
    last: u64,
}

impl Records {
    pub(crate) fn new(shared: Arc<Shared>, found: &Found, after: u64) -> Self {
        Self {
            shared,
            segments: found.segments.clone().into_iter(),
            current: Vec::new().into_iter(),
            next: after + 1,
            last: found.last,
        }
    }

    fn advance(&mut self) -> Result<Option<Record>, MetaError> {
        while self.next <= self.last {
            if let Some(record) = self.current.next() {
                if record.seq < self.next {
                    continue;
                }
                self.next += 1;
                return Ok(Some(record));
            }
            let vfs = self.shared.vfs.as_ref();
            let Some((name, first)) = self.segments.next() else {
                let what = format!("record {} vanished while it was read", self.next);
                return Err(damaged(vfs, ".", 0, what));
            };
            let bytes = read_segment(vfs, &name)?;
            self.current = scan(&bytes, self.shared.database, first, 0).records.into_iter();
        }
        Ok(None)
    }
}

impl Iterator for Records {
    type Item = Result<Record, MetaError>;
    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.next = u64::MAX;
            self.last = 0;
        }
        next.transpose()
    }
}
