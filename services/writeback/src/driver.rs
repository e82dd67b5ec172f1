//! The life of the service: start, recovery, serving, and a stop that loses nothing.
//!
//! ```text
//!   Starting ── session stands, log replayed ──► Serving ── stop asked for ──► Draining ──► ended
//! ```

use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

use endio_api::access;
use endio_chassis::backoff::Backoff;
use endio_chassis::net::Dialer;
use endio_chassis::recorder::Recorder;
use endio_chassis::server::{Readiness, ServeError};
use endio_chassis::shutdown::Shutdown;
use endio_state_machine::writeback::sessions::SessionLimits;
use endio_state_machine::writeback::throttle::{Limits as ThrottleLimits, Throttle};
use endio_store::cache_log::{CacheLog, CacheLogOptions, Replay};
use endio_types::BLOCK_BYTES;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_mutex::stdsync::Mutex;

use crate::clean::CleanBlocks;
use crate::config::Config;
use crate::conversion::Conversion;
use crate::dedupe::Dedupe;
use crate::engine::{Engine, Identity, STARTING};
use crate::failure::Failure;
use crate::io_end::{Limits as IoLimits, Submitter};
use crate::log::Log;
use crate::metrics::Metrics;
use crate::nbd::Serving;
use crate::session::{Limits as SessionStreamLimits, Session};
use crate::stores::{Limits as StoreLimits, Stores};
use crate::table::Table;
use crate::{RunError, StartError, identity};

/// Pause between two looks at what a stop still waits for.
const DRAIN_LOOK: Duration = Duration::from_millis(20);

/// Longest wait for tasks that still have the engine after everything was written out.
const UNLOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks at them.
const UNLOCK_LOOK: Duration = Duration::from_millis(2);

/// What was opened before anything is served.
pub(crate) struct Opened {
    log: CacheLog,
    replay: Replay,
    identity: Identity,
}

/// Opens the cache directory, blocking.
///
/// # Errors
/// Another process has it, or it is damaged, or the disk fails.
pub(crate) fn open(config: &Config) -> Result<Opened, StartError> {
    let dir = &config.cache_dir;
    let log_dir = dir.join("log");
    std::fs::create_dir_all(&log_dir).map_err(StartError::CacheDir)?;
    let options = CacheLogOptions {
        segment_bytes: config.log_segment_bytes,
        max_bytes: config.log_bytes_max,
        sessions_max: config.sessions_max,
    };
    // The log's lock comes first: two processes must not count one start.
    let (log, replay) = CacheLog::open(&log_dir, options).map_err(StartError::CacheLog)?;
    let identity = identity::next_start(dir).map_err(StartError::CacheDir)?;
    Ok(Opened { log, replay, identity })
}

/// Puts the parts together. Must be called inside a tokio runtime.
///
/// # Errors
/// The url of conversion has no known form.
pub(crate) fn build(
    config: Config,
    opened: Opened,
    dialer: Dialer,
    recorder: Recorder,
    is_insecure: bool,
) -> Result<(Arc<Engine>, Replay, JoinHandle<()>), StartError> {
    let Opened { log, replay, identity } = opened;
    let ms = Duration::from_millis;
    let to_conversion = dialer.expecting(access::CONVERSION);
    let channel = to_conversion.channel(&config.conversion).map_err(StartError::Url)?;
    let backoff = Backoff {
        first: ms(config.retry_first_ms),
        max: ms(config.retry_max_ms),
        retries_max: None,
    };
    let conversion = Conversion::new(channel, ms(config.call_timeout_ms), backoff);
    let connect = ms(config.connect_timeout_ms);
    let read = ms(config.call_timeout_ms);
    let store_limits = StoreLimits { queue: config.store_queue, connect, read };
    let stores = Arc::new(Stores::new(dialer.expecting(access::BLOCK_STORE), store_limits));
    let table = Arc::new(Table::new(Arc::clone(&stores)));
    let stop = CancellationToken::new();
    let limits = SessionStreamLimits {
        queue: config.session_queue,
        batch: config.session_batch,
        confirm_every: ms(config.confirm_every_ms),
        backoff: (ms(config.reconnect_first_ms), ms(config.reconnect_max_ms)),
        connect,
    };
    let (session, task) = Session::start(
        identity.writeback(),
        config.conversion.clone(),
        to_conversion,
        limits,
        Arc::clone(&table) as _,
        stop.clone(),
    );
    let metrics = Arc::new(Metrics::default());
    let io_limits = IoLimits {
        direct_blocks: blocks(config.direct_bytes_in_flight),
        write_out_blocks: blocks(config.write_out_bytes_in_flight),
        backoff: (ms(config.retry_first_ms), ms(config.retry_max_ms)),
    };
    let submitter =
        Submitter::new(session.clone(), Arc::clone(&stores), Arc::clone(&metrics), io_limits);
    let engine = Engine {
        dedupe: Arc::new(Dedupe::new(SessionLimits {
            sessions_max: config.sessions_max,
            idle_min_ms: config.session_idle_min_ms,
            ..SessionLimits::default()
        })),
        throttle: Mutex::new(Throttle::new(ThrottleLimits {
            soft_bytes: config.dirty_bytes_soft,
            hard_bytes: config.dirty_bytes_max,
            delay_max_ms: config.dirty_delay_max_ms,
        })),
        clean: CleanBlocks::new(config.read_cache_bytes),
        reads: Semaphore::new(blocks(config.read_bytes_in_flight)),
        identity,
        session,
        conversion,
        stores,
        submitter,
        table,
        log: Log::start(log),
        metrics,
        recorder,
        is_insecure,
        started: tokio::time::Instant::now(),
        room: Notify::new(),
        opening: Mutex::default(),
        tasks: TaskTracker::new(),
        stop,
        stage: AtomicU8::new(STARTING),
        config,
    };
    Ok((Arc::new(engine), replay, task))
}

fn blocks(bytes: u64) -> usize {
    usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

/// Everything that must be ended in order.
pub(crate) struct Life {
    pub(crate) engine: Arc<Engine>,
    pub(crate) replay: Replay,
    pub(crate) readiness: Readiness,
    pub(crate) shutdown: Shutdown,
    pub(crate) session: JoinHandle<()>,
    pub(crate) server: JoinHandle<Result<(), ServeError>>,
    pub(crate) nbd: Option<Serving>,
}

impl Life {
    /// Recovers, serves, and stops when asked to.
    pub(crate) async fn run(self) -> Result<(), RunError> {
        let Self { engine, replay, readiness, shutdown, session, mut server, nbd } = self;
        let recovery = recover(Arc::clone(&engine), replay, readiness.clone());
        let mut recovery = tokio::spawn(recovery);
        let mut recovered = None;
        let early = loop {
            tokio::select! {
                biased;
                () = shutdown.requested() => break None,
                served = &mut server => break Some(served),
                done = &mut recovery, if recovered.is_none() => match done {
                    Ok(Ok(())) => recovered = Some(()),
                    Ok(Err(failure)) => {
                        shutdown.request();
                        let _ = server.await;
                        stop_nbd(nbd, Instant::now() + UNLOCK_PATIENCE, &shutdown).await;
                        engine.stop.cancel();
                        session.await.map_err(RunError::Panicked)?;
                        unlock(engine).await;
                        return Err(RunError::Recovery(failure));
                    }
                    Err(panic) => return Err(RunError::Panicked(panic)),
                },
            }
        };
        // Refuses new work also when the server ended by itself.
        shutdown.request();
        readiness.set_not_ready().await;
        // One deadline for all that follows, so that whoever stops the process knows how long to wait.
        let until = Instant::now() + Duration::from_millis(engine.config.drain_deadline_ms);
        nbd.iter().for_each(Serving::begin_stop);
        engine.drain();
        let served = match early {
            Some(served) => served,
            None => server.await,
        };
        // What NBD clients were told is done is in the cache before it is written out.
        stop_nbd(nbd, until, &shutdown).await;
        let held = match recovered {
            Some(()) => write_everything_out(&engine, until, &shutdown).await,
            // What was not replayed is in the log, where the next start finds it.
            None => {
                recovery.abort();
                Vec::new()
            }
        };
        let closed = match held.is_empty() && recovered.is_some() {
            true => engine.log.close_clean().await.map_err(RunError::Close),
            false => Ok(()),
        };
        // Whatever came of it: the lease is renewed no more, and the directory is free.
        engine.stop.cancel();
        let session = session.await.map_err(RunError::Panicked);
        unlock(engine).await;
        session?;
        served.map_err(RunError::Panicked)??;
        closed?;
        if held.is_empty() {
            tracing::info!("writeback stopped");
            return Ok(());
        }
        tracing::error!(held = held.join(", "), "the stop overran its deadline");
        Err(RunError::Overrun(held))
    }
}

/// Ends the NBD server; one that overruns its deadline is left, and the process ends without it.
async fn stop_nbd(nbd: Option<Serving>, until: Instant, shutdown: &Shutdown) {
    let Some(nbd) = nbd else { return };
    tokio::select! {
        stopped = tokio::time::timeout_at(until, nbd.stop()) => {
            if stopped.is_err() {
                tracing::warn!("requests of nbd clients are still under way");
            }
        }
        () = shutdown.forced() => {}
    }
}

/// Waits, bounded, until no task has the engine any more: its drop unlocks the cache directory, so
/// that the next start in this process finds it free.
async fn unlock(engine: Arc<Engine>) {
    let until = Instant::now() + UNLOCK_PATIENCE;
    while Arc::strong_count(&engine) > 1 && Instant::now() < until {
        tokio::time::sleep(UNLOCK_LOOK).await;
    }
    if Arc::strong_count(&engine) > 1 {
        tracing::warn!("the cache directory stays locked: a task has not ended");
    }
}

async fn recover(engine: Arc<Engine>, replay: Replay, readiness: Readiness) -> Result<(), Failure> {
    engine.session.up().await;
    engine.replay(replay).await?;
    // Not before: until then the log holds data that no volume knows of.
    engine.start_log_keeper();
    engine.start_defragmenter();
    engine.serve();
    readiness.set_ready().await;
    tracing::info!(writeback = engine.identity.writeback(), "ready");
    Ok(())
}

/// Writes out what is dirty. Returns what is left at the deadline, by name.
async fn write_everything_out(
    engine: &Arc<Engine>,
    until: Instant,
    shutdown: &Shutdown,
) -> Vec<String> {
    loop {
        // Who forces a stop waits for no write-out, so none begins.
        let is_forced = shutdown.is_forced();
        if !is_forced {
            engine.want_everything_out();
        }
        let held = engine.held();
        if held.is_empty() || is_forced || Instant::now() >= until {
            return held;
        }
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}
