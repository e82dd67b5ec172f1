//! What the service does, apart from how it is asked: volumes, writes, reads, sync.
//!
//! Every request that changes something ends whoever waits for it: what has to wait runs in a task of
//! its own ([`Started`]), so that a client that goes away leaves nothing half done and nothing locked.

mod attempts;
mod check;
mod data_log;
mod defragment;
pub(crate) mod direct;
mod flusher;
mod inspect;
mod merge;
mod range;
mod read;
mod replay;
mod started;
mod status;
mod stored;
mod sync;
mod volumes;
mod write;
mod write_out;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use endio_chassis::recorder::Recorder;
use endio_state_machine::writeback::credit::CreditPolicy;
use endio_state_machine::writeback::throttle::Throttle;
use endio_types::{BLOCK_BYTES, Reason, VolumeId};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_mutex::stdsync::Mutex;

pub use range::{RangeKind, RangeOp, Ranged};
pub use read::{Piece, ReadOp};
pub use started::Started;
pub use status::Meter;
pub use sync::{Asker, Observer, Until};
pub use write::{Acked, Mode, WriteOp};

use crate::clean::CleanBlocks;
use crate::config::Config;
use crate::conversion::Conversion;
use crate::dedupe::Dedupe;
use crate::failure::Failure;
use crate::io_end::Submitter;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::session::Session;
use crate::stores::Stores;
use crate::table::Table;
use crate::volume::VolumeLimits;

/// Stages of a service's life.
pub(crate) const STARTING: u8 = 0;
const SERVING: u8 = 1;
const DRAINING: u8 = 2;
/// Hint for clients that come before the service is ready.
const STARTING_RETRY_MS: u32 = 200;
/// Longest wait of a request that comes before the service is ready.
const STARTING_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks at whether it is.
const STARTING_LOOK: Duration = Duration::from_millis(5);

/// Who this writeback is: the same over restarts of a cache directory, but for the start's number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cache directory's.
    pub uuid: String,
    /// Counts the starts.
    pub start: u64,
}

impl Identity {
    /// The name towards conversion: unique for each start.
    pub fn writeback(&self) -> String {
        format!("wb-{}/{}", self.uuid, self.start)
    }

    /// Whether an owner's name is that of an earlier start of the same cache directory. Conversion
    /// writes the name in the certificate behind it: `wb-UUID/START@NAME`.
    pub fn is_earlier_start(&self, owner: &str) -> bool {
        let owner = owner.split('@').next().unwrap_or_default();
        owner.strip_prefix("wb-").and_then(|rest| rest.split_once('/')).is_some_and(
            |(uuid, start)| {
                uuid == self.uuid && start.parse::<u64>().is_ok_and(|start| start <= self.start)
            },
        )
    }
}

/// Everything a request needs. Shared by all tasks.
pub struct Engine {
    pub(crate) config: Config,
    pub(crate) identity: Identity,
    pub(crate) session: Session,
    pub(crate) conversion: Conversion,
    pub(crate) stores: Arc<Stores>,
    pub(crate) submitter: Submitter,
    pub(crate) table: Arc<Table>,
    pub(crate) log: Log,
    pub(crate) dedupe: Arc<Dedupe>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) recorder: Recorder,
    /// gRPC clients are served without TLS.
    pub(crate) is_insecure: bool,
    /// When this process started to serve.
    pub(crate) started: Instant,
    pub(crate) throttle: Mutex<Throttle>,
    /// Dirty bytes became fewer, or the log got room.
    pub(crate) room: Notify,
    pub(crate) reads: Semaphore,
    pub(crate) clean: Arc<CleanBlocks>,
    /// Gates of volumes that are being opened, so that one request opens for all.
    pub(crate) opening: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) stage: AtomicU8,
}

impl Engine {
    /// The numbers of the service.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// When a request that begins now gives up.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.config.io_timeout_ms)
    }

    pub(crate) fn volume_limits(&self) -> VolumeLimits {
        let credit = CreditPolicy {
            low_blocks: self.config.credit_low_blocks,
            high_blocks: self.config.credit_high_blocks,
            step_blocks: self.config.credit_step_blocks,
        };
        let clean = Arc::clone(&self.clean);
        VolumeLimits { credit, map_entries_max: self.config.map_entries_per_volume, clean }
    }

    /// Asks or changes the throttle. It is the innermost lock, taken under a volume's state: `with`
    /// takes no other. A guard in an expression would live to the end of the whole statement.
    pub(crate) fn throttled<T>(&self, with: impl FnOnce(&mut Throttle) -> T) -> T {
        with(&mut self.throttle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Versions of blocks of a volume became dirty. Whether so much is dirty now that it is to be
    /// written out before its time.
    pub(crate) fn dirtied(&self, volume: u64, blocks: u64) -> bool {
        self.metrics.dirty_bytes.add(i64::try_from(blocks * BLOCK_BYTES).unwrap_or(i64::MAX));
        self.throttled(|throttle| {
            throttle.add(VolumeId(volume), blocks * BLOCK_BYTES);
            throttle.wants_write_out()
        })
    }

    /// Versions of blocks of a volume are not dirty any more.
    pub(crate) fn undirtied(&self, volume: u64, blocks: u64) {
        if blocks > 0 {
            self.throttled(|throttle| throttle.sub(VolumeId(volume), blocks * BLOCK_BYTES));
            let bytes = i64::try_from(blocks * BLOCK_BYTES).unwrap_or(i64::MAX);
            self.metrics.dirty_bytes.add(-bytes);
            self.room.notify_waiters();
        }
    }

    /// Everything that an earlier start left is loaded: from now on requests are taken.
    pub(crate) fn serve(&self) {
        let (from, to) = (STARTING, SERVING);
        // A stop that was asked for meanwhile stays.
        let _ = self.stage.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// From now on nothing new is taken.
    pub(crate) fn drain(&self) {
        self.stage.store(DRAINING, Ordering::SeqCst);
    }

    /// # Errors
    /// `NOT_READY` until everything is loaded; `DRAINING` once a stop was asked for.
    pub(crate) fn takes_work(&self) -> Result<(), Failure> {
        match self.stage.load(Ordering::SeqCst) {
            STARTING => Err(Failure::new(Reason::NotReady, "the service is starting")
                .retry_after(STARTING_RETRY_MS)),
            SERVING => Ok(()),
            _ => Err(Failure::draining()),
        }
    }

    /// Waits, bounded, until everything is loaded.
    ///
    /// # Errors
    /// As [`Engine::takes_work`].
    pub(crate) async fn takes_work_soon(&self) -> Result<(), Failure> {
        let until = self.deadline().min(Instant::now() + STARTING_PATIENCE);
        while self.stage.load(Ordering::SeqCst) == STARTING && Instant::now() < until {
            tokio::time::sleep(STARTING_LOOK).await;
        }
        self.takes_work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_start_of_the_same_directory_is_taken_for_ours() {
        let us = Identity { uuid: "aa".to_owned(), start: 3 };
        assert!(us.is_earlier_start("wb-aa/2"));
        assert!(us.is_earlier_start("wb-aa/2@w1"));
        assert!(!us.is_earlier_start("wb-aa/4@w1"));
        assert!(!us.is_earlier_start("wb-ab/2@wb-aa/2"));
        assert!(us.is_earlier_start(&us.writeback()));
        assert!(!us.is_earlier_start("wb-aa/4"));
        assert!(!us.is_earlier_start("wb-ab/2"));
        assert!(!us.is_earlier_start(""));
    }
}
