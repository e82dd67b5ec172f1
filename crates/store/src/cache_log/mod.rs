//! The cache log: buffered writes survive the death of the writeback process.
//!
//! A record is handed to the kernel before its write is acknowledged, so it survives SIGKILL;
//! [`CacheLog::sync_to`] makes it survive a power loss. Records are numbered without gaps over a
//! sequence of segment files. Each segment begins with a snapshot of the session table and of the
//! open volumes, so whole segments can be dropped at the front and nothing but converted data goes.
//!
//! At start a record that is not whole is a *torn tail* only if it can be one: after a kill, when
//! the last file ends inside it; after a power loss, when nothing in the log says that it was
//! durable (each record carries what was known to be durable when it was written). The same holds
//! for a segment that outlives the end of the one before it: nothing after a gap is used. The name
//! of a segment is durable before the next one is created, so no power loss takes a whole segment
//! from the middle or the front. Anything else is damage and refused with file and offset: acknowledged data is never dropped in silence.

mod api;
mod disk;
mod hidden;
mod live;
#[cfg(test)]
mod order_tests;
mod record;
mod replay;
mod scan;
#[cfg(any(test, feature = "simulation"))]
mod sim;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use endio_failpoints::{Bug, Point, is_planted, reach};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::sessions::{
    RequestKey, SessionId, SessionLimits, SessionTable,
};
use endio_types::{Generation, LblkRange, VolumeId};
use tracing_mutex::stdsync::{Condvar, Mutex, MutexGuard};

pub use api::{CacheLogError, CacheLogOptions, OpenVolume, ReplayedWrite, WriteRecord};
pub use replay::Replay;

#[cfg(feature = "simulation")]
pub use sim::SimDisk;

use disk::{Disk, RealDisk};
use live::Live;
use record::{CleanPayload, Header, Kind, VolumePayload};
use scan::State;
use writer::{Body, Writer};

/// The log of one writeback. All methods take `&self` and may be called from several threads;
/// they block on the disk, so an asynchronous caller uses a blocking thread.
pub struct CacheLog {
    disk: Box<dyn Disk>,
    state: Mutex<State>,
    max_bytes: u64,
    writer: Mutex<Writer>,
    durable: AtomicU64,
    syncing: Mutex<Syncing>,
    synced: Condvar,
    trimming: Mutex<()>,
}

#[derive(Default)]
struct Syncing {
    running: bool,
    failed: Option<String>,
}

impl CacheLog {
    /// Opens or creates the log in `dir` and locks the directory for this process. What
    /// [`Replay`] yields must be put into the dirty cache before any volume is served.
    ///
    /// # Errors
    /// [`CacheLogError::InUse`]; [`CacheLogError::Damaged`], with which nothing was changed;
    /// [`CacheLogError::DiskFull`] and [`CacheLogError::Io`].
    pub fn open(dir: &Path, options: CacheLogOptions) -> Result<(Self, Replay), CacheLogError> {
        let locked = RealDisk::lock(dir)
            .map_err(|source| CacheLogError::Io { path: dir.to_owned(), source })?;
        let disk = locked.ok_or_else(|| CacheLogError::InUse(dir.to_owned()))?;
        Self::open_on(Box::new(disk), options)
    }

    /// As [`CacheLog::open`], on a directory in memory.
    ///
    /// # Errors
    /// As [`CacheLog::open`].
    #[cfg(feature = "simulation")]
    pub fn open_simulated(
        disk: &SimDisk,
        options: CacheLogOptions,
    ) -> Result<(Self, Replay), CacheLogError> {
        Self::open_on(Box::new(disk.clone()), options)
    }

    fn open_on(
        disk: Box<dyn Disk>,
        options: CacheLogOptions,
    ) -> Result<(Self, Replay), CacheLogError> {
        let io = |name: &str, source| CacheLogError::Io { path: disk.path(name), source };
        let boot_id = disk.boot_id().map_err(|source| io("boot id", source))?;
        let before = scan::read_state(&*disk)?;
        let fresh = before.is_none();
        let before = before.unwrap_or_else(|| State {
            version: 1,
            tag: new_tag(&boot_id),
            boot_id: boot_id.clone(),
            clean: true,
            durable: Lsn(0),
            lost: None,
            untold: BTreeSet::new(),
        });
        let is_blind = is_planted(Bug::BootIdIgnored);
        let power_lost = !before.clean && before.boot_id != boot_id && !is_blind;
        let sessions = SessionTable::new(SessionLimits {
            sessions_max: options.sessions_max,
            ..SessionLimits::default()
        });
        let mut scan = scan::scan(&*disk, &before, power_lost, sessions)?;
        // A start after a power loss may have died before it noted that in a segment of its own.
        let is_unnoted = !before.clean && before.lost.is_some() && scan.snapshot <= before.durable;
        if power_lost || is_unnoted {
            scan.sessions.mark_memory_lost();
        }
        // After a kill the newest records may be in the page cache only.
        for segment in &scan.segments {
            segment
                .file
                .sync()
                .map_err(|source| io(&scan::segment_name(segment.number), source))?;
        }
        if !fresh {
            disk.sync_dir().map_err(|source| io("", source))?;
        }
        let lost = scan.lost(before.lost, power_lost);
        let state = State { boot_id, clean: false, durable: scan.last, lost, ..before };
        scan::write_state(&*disk, &state)?;
        let mut losses = state.untold.clone();
        losses.extend(state.lost.iter().flatten());
        let replay = Replay::new(&*disk, &scan, power_lost, losses);
        let durable = AtomicU64::new(scan.last.0);
        let max_bytes = options.max_bytes;
        let writer = Writer::start(&*disk, state.tag, options, scan)?;
        let log = Self {
            disk,
            state: Mutex::new(state),
            max_bytes,
            writer: Mutex::new(writer),
            durable,
            syncing: Mutex::default(),
            synced: Condvar::new(),
            trimming: Mutex::new(()),
        };
        Ok((log, replay))
    }

    /// Appends a buffered write. When this returns, the record survives the death of the process.
    /// `payload` may come in pieces; together they are exactly the blocks.
    ///
    /// # Errors
    /// [`CacheLogError::Full`] and [`CacheLogError::DiskFull`]: delay the writer, nothing was
    /// written. Any other: the log takes nothing more, or the record was impossible.
    pub fn append_write(
        &self,
        write: &WriteRecord,
        payload: &[&[u8]],
    ) -> Result<Lsn, CacheLogError> {
        let header = writer::write_header(write, payload)?;
        let mut writer = self.writer();
        let body = Body { parts: payload, keeps_reserve: true };
        let lsn = writer.append(&*self.disk, header, &body, self.durable_lsn())?;
        writer.live.wrote(lsn, write.volume, write.blocks);
        Ok(lsn)
    }

    /// Says that blocks are converted: their records up to a number are dead. It counts once it
    /// is durable. `runs` come from `DirtyMap::complete`; an empty list appends nothing and
    /// returns the newest number.
    ///
    /// # Errors
    /// As [`append_write`](Self::append_write), but a full log still takes it while the reserve
    /// lasts.
    pub fn append_clean(&self, volume: VolumeId, runs: &[CleanRun]) -> Result<Lsn, CacheLogError> {
        if runs.is_empty() {
            return Ok(self.last_lsn());
        }
        let header = Header { volume, ..Header::plain(Kind::Clean) };
        let payload = writer::encode(&CleanPayload::new(runs))?;
        let mut writer = self.writer();
        let lsn = self.append_small(&mut writer, header, &payload)?;
        for run in runs {
            writer.live.will_clean(lsn, volume, *run);
        }
        Ok(lsn)
    }

    /// Says that a request whose data is not in the log (direct write, trim, zeroing) was applied.
    ///
    /// # Errors
    /// As [`append_clean`](Self::append_clean).
    pub fn append_done(&self, request: RequestKey, result: u64) -> Result<Lsn, CacheLogError> {
        if request.sequence == 0 {
            return Err(CacheLogError::Invalid("request number 0".into()));
        }
        let header = Header { request: Some(request), result, ..Header::plain(Kind::Done) };
        self.append_small(&mut self.writer(), header, &[])
    }

    /// Says that a session begins here with its first request, which is not applied yet.
    ///
    /// # Errors
    /// As [`append_clean`](Self::append_clean).
    pub fn append_session(&self, session: SessionId) -> Result<Lsn, CacheLogError> {
        let request = Some(RequestKey { session, sequence: 0 });
        let header = Header { request, ..Header::plain(Kind::Done) };
        self.append_small(&mut self.writer(), header, &[])
    }

    /// Says that a volume is open here from now on.
    ///
    /// # Errors
    /// As [`append_clean`](Self::append_clean).
    pub fn append_volume_open(
        &self,
        volume: VolumeId,
        name: &str,
        generation: Generation,
    ) -> Result<Lsn, CacheLogError> {
        self.append_volume(volume, name, generation, true)
    }

    /// Says that a volume was closed, deleted or taken over: its data in the log is of no use.
    ///
    /// # Errors
    /// As [`append_clean`](Self::append_clean).
    pub fn append_volume_closed(&self, volume: VolumeId) -> Result<Lsn, CacheLogError> {
        self.append_volume(volume, "", Generation(0), false)
    }

    fn append_volume(
        &self,
        volume: VolumeId,
        name: &str,
        generation: Generation,
        open: bool,
    ) -> Result<Lsn, CacheLogError> {
        let header = Header { volume, generation, ..Header::plain(Kind::Volume) };
        let payload = writer::encode(&VolumePayload { name: name.to_owned(), open })?;
        let mut writer = self.writer();
        let lsn = self.append_small(&mut writer, header, &payload)?;
        writer.volume_mark(volume, name, generation, open);
        if !open {
            writer.live.will_clean(lsn, volume, Live::all(lsn));
        }
        Ok(lsn)
    }

    fn append_small(
        &self,
        writer: &mut Writer,
        header: Header,
        payload: &[u8],
    ) -> Result<Lsn, CacheLogError> {
        let header = writer::with_payload(header, &[payload])?;
        let body = Body { parts: &[payload], keeps_reserve: false };
        writer.append(&*self.disk, header, &body, self.durable_lsn())
    }

    /// Makes everything up to `lsn` survive a power loss. One flush serves all callers that wait.
    /// Idempotent.
    ///
    /// # Errors
    /// [`CacheLogError::Poisoned`] from the first failed flush on, whatever happens later: pages
    /// of a failed flush may be gone although the next flush succeeds.
    pub fn sync_to(&self, lsn: Lsn) -> Result<(), CacheLogError> {
        let mut syncing = lock(&self.syncing);
        loop {
            if let Some(what) = &syncing.failed {
                return Err(CacheLogError::Poisoned(what.clone()));
            }
            if self.durable_lsn() >= lsn {
                return Ok(());
            }
            if !syncing.running {
                break;
            }
            syncing = self.synced.wait(syncing).unwrap_or_else(PoisonError::into_inner);
        }
        syncing.running = true;
        drop(syncing);
        let outcome = self.flush();
        let mut syncing = lock(&self.syncing);
        syncing.running = false;
        if let Err(error) = &outcome {
            syncing.failed = Some(error.to_string());
        }
        self.synced.notify_all();
        drop(syncing);
        let flushed = outcome?;
        if flushed < lsn {
            return Err(CacheLogError::Invalid(format!("record {lsn} was never appended")));
        }
        Ok(())
    }

    /// Flushes all there is now; returns its newest record.
    fn flush(&self) -> Result<Lsn, CacheLogError> {
        let target = self.writer().take_unsynced()?;
        reach(Point::LogFlush);
        let flush = || {
            if is_planted(Bug::LogSkipsFlush) {
                return Ok(());
            }
            for (name, file) in &target.files {
                file.sync().map_err(|source| (name.as_str(), source))?;
            }
            if target.new_name {
                self.disk.sync_dir().map_err(|source| ("", source))
            } else {
                Ok(())
            }
        };
        let outcome = flush()
            .map_err(|(name, source)| CacheLogError::Io { path: self.disk.path(name), source });
        reach(Point::LogFlushed);
        let mut writer = self.writer();
        if let Err(error) = outcome {
            writer.poison(format!("a flush failed: {error}"));
            return Err(error);
        }
        // Linux tells one of two flushes of a file at once of its error: of the other one, which took a
        // failed write back, only the writer knows.
        writer.unpoisoned()?;
        writer.flushed(&target);
        self.durable.fetch_max(target.last.0, Ordering::SeqCst);
        Ok(target.last)
    }

    /// Everything up to here survives a power loss.
    pub fn durable_lsn(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::SeqCst))
    }

    /// The newest record.
    pub fn last_lsn(&self) -> Lsn {
        self.writer().last()
    }

    /// Bytes of all segments, and the bound.
    pub fn usage_bytes(&self) -> (u64, u64) {
        (self.writer().bytes(), self.max_bytes)
    }

    /// Whether the log holds data of a range that is not durably known to be converted: a replay
    /// would bring it back. Before a write, trim or zeroing goes around the cache: write the
    /// range out, [`append_clean`](Self::append_clean), [`sync_to`](Self::sync_to) it.
    pub fn holds(&self, volume: VolumeId, range: LblkRange) -> bool {
        self.writer().live.holds(volume, range)
    }

    /// Removes whole segments whose records are all older than `before`, never the active one.
    /// Flushes first, so that what took their place is durable. Returns the bytes freed.
    /// Idempotent.
    ///
    /// `before` is the oldest record that is needed or, when none is, the one after
    /// [`last_lsn`](Self::last_lsn) as it was *before* the caller looked: records that were
    /// appended since the look stay, even if their segment has been sealed meanwhile.
    ///
    /// # Errors
    /// [`CacheLogError::Io`]: the segment stays, call again. [`CacheLogError::Poisoned`].
    pub fn trim(&self, before: Lsn) -> Result<u64, CacheLogError> {
        let _one_at_a_time = lock(&self.trimming);
        let mut freed = 0;
        loop {
            let (segment, last) = {
                let writer = self.writer();
                (writer.trimmable(before), writer.last())
            };
            let Some((name, bytes)) = segment else { return Ok(freed) };
            self.sync_to(last)?;
            let io = |source| CacheLogError::Io { path: self.disk.path(&name), source };
            match self.disk.remove(&name) {
                // An earlier try removed it and could not make that durable.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.map_err(io)?,
            }
            reach(Point::LogTrimmed);
            // One by one: a crash must not leave a hole between segments.
            if let Err(source) = self.disk.sync_dir() {
                // The next flush of the directory would succeed without having done it.
                self.writer().poison(format!("a flush of the directory failed: {source}"));
                return Err(io(source));
            }
            self.writer().trimmed();
            freed += bytes;
        }
    }

    /// As [`trim`](Self::trim). Where all that is left is one segment of more than half of the bound, a new
    /// one is begun, so that the old one can go. Not where older ones stay: more segments would not
    /// help, and whoever asks again and again would get one each time.
    ///
    /// # Errors
    /// As [`trim`](Self::trim) and [`append_clean`](Self::append_clean).
    pub fn make_room(&self, before: Lsn) -> Result<u64, CacheLogError> {
        let freed = self.trim(before)?;
        {
            let mut writer = self.writer();
            if !writer.is_one_segment() || writer.bytes() <= self.max_bytes / 2 {
                return Ok(freed);
            }
            match writer.rotate(&*self.disk, self.durable_lsn()) {
                Ok(()) => {}
                // A full disk has no room for another one.
                Err(CacheLogError::DiskFull) => return Ok(freed),
                Err(error) => return Err(error),
            }
        }
        Ok(freed + self.trim(before)?)
    }

    /// Begins a new segment, so that [`trim`](Self::trim) can remove the active one later.
    ///
    /// # Errors
    /// As [`append_clean`](Self::append_clean).
    pub fn rotate(&self) -> Result<(), CacheLogError> {
        self.writer().rotate(&*self.disk, self.durable_lsn())
    }

    /// Notes, durably, that acknowledged writes of a volume are lost and that nobody was told: each start
    /// says so ([`Replay::losses`]) until [`CacheLog::loss_told`]. Idempotent.
    ///
    /// # Errors
    /// The note may be missing.
    pub fn note_loss(&self, volume: VolumeId) -> Result<(), CacheLogError> {
        // Held while it is written: two notes must not overtake each other.
        let mut state = lock(&self.state);
        match state.untold.insert(volume) {
            true => scan::write_state(&*self.disk, &state),
            false => Ok(()),
        }
    }

    /// Notes, durably, that somebody was told of a volume's losses: the next start does not tell
    /// them again. Idempotent.
    ///
    /// # Errors
    /// The note may be missing, and the loss be told once more.
    pub fn loss_told(&self, volume: VolumeId) -> Result<(), CacheLogError> {
        let mut state = lock(&self.state);
        let was_lost = state.lost.as_mut().is_some_and(|lost| lost.remove(&volume));
        match state.untold.remove(&volume) || was_lost {
            true => scan::write_state(&*self.disk, &state),
            false => Ok(()),
        }
    }

    /// Makes all durable and notes that the log ended well. Everything after it is refused with
    /// [`CacheLogError::Closed`].
    ///
    /// # Errors
    /// The log counts as not closed then.
    pub fn close_clean(&self) -> Result<(), CacheLogError> {
        let last = {
            let mut writer = self.writer();
            writer.close()?;
            writer.last()
        };
        self.sync_to(last)?;
        let mut state = lock(&self.state);
        // Whoever stops the service in order was not told by that.
        let lost = state.lost.take().unwrap_or_default();
        state.untold.extend(lost);
        (state.clean, state.durable) = (true, last);
        scan::write_state(&*self.disk, &state)
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.writer)
    }
}

/// A panic elsewhere does not make the data under a lock wrong: each change is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Differs between logs, so that bytes of one inside another are not taken for its records.
fn new_tag(boot_id: &str) -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let crc = crc32c::crc32c(boot_id.as_bytes());
    crc32c::crc32c_append(crc, &now.as_nanos().to_le_bytes())
}
