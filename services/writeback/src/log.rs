//! The cache log for tasks: appends in place, flushes on a blocking thread for all who wait.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use endio_failpoints::{Bug, Point, is_planted, reach_io};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::sessions::{RequestKey, SessionId};
use endio_store::cache_log::{CacheLog, CacheLogError, WriteRecord};
use endio_types::{Generation, LblkRange, VolumeId};
use tokio::sync::watch;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::failure::Failure;

/// What the flusher of the log has reached.
#[derive(Clone, Default)]
struct Reached {
    durable: Lsn,
    failed: Option<Failure>,
}

/// Handle of the log. Clones share it.
#[derive(Clone)]
pub(crate) struct Log {
    inner: Arc<CacheLog>,
    order: Arc<Mutex<()>>,
    wanted: watch::Sender<Lsn>,
    reached: watch::Receiver<Reached>,
    full: Arc<FullSince>,
}

/// Since when the log has refused every write for want of room.
struct FullSince {
    started: Instant,
    /// Milliseconds after that, and one; 0: it has room.
    since_ms: AtomicU64,
}

impl FullSince {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn note<T>(&self, appended: &Result<T, CacheLogError>) {
        match appended {
            Err(CacheLogError::Full { .. } | CacheLogError::DiskFull) => {
                let now = self.now_ms() + 1;
                // Somebody else noted it before.
                let _ = self.since_ms.compare_exchange(0, now, Relaxed, Relaxed);
            }
            Ok(_) if self.since_ms.load(Relaxed) != 0 => self.since_ms.store(0, Relaxed),
            _ => {}
        }
    }
}

impl Log {
    /// Takes the log over and starts the task that flushes it. It ends with the last handle.
    pub(crate) fn start(inner: CacheLog) -> Self {
        let inner = Arc::new(inner);
        let (wanted, asks) = watch::channel(Lsn(0));
        let (tell, reached) = watch::channel(Reached::default());
        tokio::spawn(flush_when_wanted(Arc::downgrade(&inner), asks, tell));
        let full = Arc::new(FullSince { started: Instant::now(), since_ms: AtomicU64::new(0) });
        Self { inner, order: Arc::default(), wanted, reached, full }
    }

    /// Held while a record is appended and its data put into the dirty cache, and while the log is
    /// trimmed: a trim between the two would not know that the record is needed.
    pub(crate) fn order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a buffered write: it survives the death of the process.
    ///
    /// # Errors
    /// As [`CacheLog::append_write`].
    pub(crate) fn append_write(
        &self,
        write: &WriteRecord,
        payload: &[&[u8]],
    ) -> Result<Lsn, CacheLogError> {
        if is_planted(Bug::LogSkipsAppend) && write.blocks.start.0.is_multiple_of(8) {
            return Ok(self.inner.last_lsn());
        }
        let appended = self.inner.append_write(write, payload);
        self.full.note(&appended);
        appended
    }

    /// Whether it has taken no write for so long, because it is full.
    pub(crate) fn is_full_for(&self, patience: Duration) -> bool {
        let since_ms = self.full.since_ms.load(Relaxed);
        since_ms > 0 && u128::from(self.full.now_ms() + 1 - since_ms) >= patience.as_millis()
    }

    /// Notes that blocks are converted.
    ///
    /// # Errors
    /// As [`CacheLog::append_clean`].
    pub(crate) fn append_clean(&self, volume: u64, runs: &[CleanRun]) -> Result<Lsn, Failure> {
        reach_io(Point::WritebackNotingClean).map_err(|_| CacheLogError::DiskFull)?;
        Ok(self.inner.append_clean(VolumeId(volume), runs)?)
    }

    /// Notes that a request without data in the log was applied.
    ///
    /// # Errors
    /// As [`CacheLog::append_done`].
    pub(crate) fn append_done(&self, key: RequestKey, result: u64) -> Result<Lsn, Failure> {
        Ok(self.inner.append_done(key, result)?)
    }

    /// Notes that a session begins here.
    ///
    /// # Errors
    /// As [`CacheLog::append_session`].
    pub(crate) fn append_session(&self, session: SessionId) -> Result<Lsn, Failure> {
        Ok(self.inner.append_session(session)?)
    }

    /// Notes that a volume is open here.
    ///
    /// # Errors
    /// As [`CacheLog::append_volume_open`].
    pub(crate) fn append_open(
        &self,
        volume: u64,
        name: &str,
        generation: u64,
    ) -> Result<Lsn, Failure> {
        reach_io(Point::WritebackNotingOpen).map_err(|_| CacheLogError::DiskFull)?;
        Ok(self.inner.append_volume_open(VolumeId(volume), name, Generation(generation))?)
    }

    /// Notes that a volume is not open here any more: its data in the log is of no use.
    ///
    /// # Errors
    /// As [`CacheLog::append_volume_closed`].
    pub(crate) fn append_closed(&self, volume: u64) -> Result<(), Failure> {
        self.inner.append_volume_closed(VolumeId(volume))?;
        Ok(())
    }

    /// Whether a replay could bring back data of this range.
    pub(crate) fn holds(&self, volume: u64, range: LblkRange) -> bool {
        self.inner.holds(VolumeId(volume), range)
    }

    /// The newest record.
    pub(crate) fn last(&self) -> Lsn {
        self.inner.last_lsn()
    }

    /// Bytes on disk, and the bound.
    pub(crate) fn usage_bytes(&self) -> (u64, u64) {
        self.inner.usage_bytes()
    }

    /// Asks for everything up to `lsn` to be made durable, without waiting.
    pub(crate) fn want_durable(&self, lsn: Lsn) {
        self.wanted.send_if_modified(|wanted| {
            let is_more = *wanted < lsn;
            *wanted = (*wanted).max(lsn);
            is_more
        });
    }

    /// Waits until everything up to `lsn` survives a power loss. Cancel-safe.
    ///
    /// # Errors
    /// The log's flush failed, now or before.
    pub(crate) async fn durable(&self, lsn: Lsn) -> Result<(), Failure> {
        if self.inner.durable_lsn() >= lsn {
            return Ok(());
        }
        self.want_durable(lsn);
        let mut reached = self.reached.clone();
        let done = |reached: &Reached| reached.durable >= lsn || reached.failed.is_some();
        let reached = reached.wait_for(done).await.map_err(|_| Failure::draining())?;
        match &reached.failed {
            Some(failure) if reached.durable < lsn => Err(failure.clone()),
            _ => Ok(()),
        }
    }

    /// Drops what is older than `oldest`, on a blocking thread. `oldest` is asked under the order.
    ///
    /// # Errors
    /// As [`CacheLog::make_room`].
    pub(crate) async fn trim(
        &self,
        oldest: impl FnOnce() -> Option<Lsn> + Send + 'static,
    ) -> Result<u64, Failure> {
        let log = self.clone();
        let trimmed = tokio::task::spawn_blocking(move || {
            // A record appended after this look is newer than every segment that may go.
            let oldest = {
                let _order = log.order();
                let last = log.inner.last_lsn();
                let needed = oldest().filter(|_| !is_planted(Bug::TrimTooMuch));
                needed.unwrap_or_else(|| last.next())
            };
            log.inner.make_room(oldest)
        });
        Ok(trimmed.await.map_err(|_| Failure::task_lost())??)
    }

    /// Notes that acknowledged writes of a volume are lost, and that nobody was told.
    pub(crate) async fn note_loss(&self, volume: u64) {
        let inner = Arc::clone(&self.inner);
        let noted = tokio::task::spawn_blocking(move || inner.note_loss(VolumeId(volume)));
        if let Ok(Err(error)) = noted.await {
            tracing::warn!(volume, %error, "a loss may be told to nobody after a restart");
        }
    }

    /// Notes that somebody was told of a volume's losses.
    pub(crate) async fn loss_told(&self, volume: u64) {
        let inner = Arc::clone(&self.inner);
        let noted = tokio::task::spawn_blocking(move || inner.loss_told(VolumeId(volume)));
        if let Ok(Err(error)) = noted.await {
            tracing::warn!(volume, %error, "a loss that was told may be told once more");
        }
    }

    /// Makes all durable and notes that the log ended well.
    ///
    /// # Errors
    /// As [`CacheLog::close_clean`].
    pub(crate) async fn close_clean(&self) -> Result<(), Failure> {
        let inner = Arc::clone(&self.inner);
        let closed = tokio::task::spawn_blocking(move || inner.close_clean());
        Ok(closed.await.map_err(|_| Failure::task_lost())??)
    }
}

impl From<CacheLogError> for Failure {
    fn from(error: CacheLogError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

/// Holds the log only while it flushes: the last handle's drop unlocks the directory.
async fn flush_when_wanted(
    log: Weak<CacheLog>,
    mut asks: watch::Receiver<Lsn>,
    tell: watch::Sender<Reached>,
) {
    while asks.changed().await.is_ok() {
        let wanted = *asks.borrow_and_update();
        let Some(log) = log.upgrade() else { return };
        // One flush covers all that is there, so it serves later askers too.
        let target = log.last_lsn().max(wanted);
        let flusher = Arc::clone(&log);
        let outcome = tokio::task::spawn_blocking(move || flusher.sync_to(target)).await;
        let failed = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                tracing::error!(%error, "the cache log cannot be made durable");
                Some(Failure::from(error))
            }
            Err(_) => Some(Failure::task_lost()),
        };
        tell.send_modify(|reached| {
            reached.durable = log.durable_lsn();
            reached.failed = failed;
        });
    }
}
