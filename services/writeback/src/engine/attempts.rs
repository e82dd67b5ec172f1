//! Changes of a map that may have been given up: see `attempts` of the state machine.

use std::sync::Arc;
use std::time::Duration;

use endio_api::conversion::{Attempt, LookupResponse};
use endio_state_machine::writeback::attempts::Tries;
use endio_types::LblkRange;
use tokio::time::Instant;
use tonic::{Response, Status};
use tracing_mutex::stdsync::Mutex;

use super::Engine;
use crate::conversion::Client;
use crate::failure::Failure;
use crate::locks::Held;
use crate::volume::Volume;

/// A try of a change; dropping it ends it.
struct Trying {
    volume: Arc<Volume>,
    number: u64,
}

impl Drop for Trying {
    fn drop(&mut self) {
        self.volume.state().attempts.end(self.number);
    }
}

/// A change that was given up keeps its blocks locked; a stop of the service need not wait for that.
struct Settling {
    volume: Arc<Volume>,
}

impl Settling {
    fn begin(volume: &Arc<Volume>) -> Self {
        volume.state().settling += 1;
        Self { volume: Arc::clone(volume) }
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.volume.state().settling -= 1;
    }
}

impl Engine {
    /// A change of a volume's map or size, tried again while conversion is away. Says which try
    /// conversion has to hear of as over before somebody else uses the blocks:
    /// [`Self::settle_later`].
    pub(super) async fn change<T, F>(
        &self,
        volume: &Arc<Volume>,
        deadline: Instant,
        call: impl Fn(Client, Attempt) -> F,
    ) -> (Result<T, Failure>, Option<u64>)
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let tries = Mutex::new(Tries::default());
        let lock = || tries.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let outcome = self
            .conversion
            .call(deadline, |client| {
                let attempt = {
                    let mut state = volume.state();
                    let logged = state.dirty.log_number();
                    state.attempts.begin(logged)
                };
                let trying = Trying { volume: Arc::clone(volume), number: attempt.number };
                lock().began(attempt);
                let endio_state_machine::machine::Attempt { number, over, logged } = attempt;
                let answer = call(client, Attempt { number, over, logged });
                async move {
                    let _trying = trying;
                    answer.await
                }
            })
            .await;
        let left = lock().left(outcome.is_ok());
        (outcome, left)
    }

    /// Keeps the lock of the blocks of a change until conversion has heard that a try of it is over,
    /// and those before it; then `then` is told what the map is like, and the blocks are free again.
    /// If the service stops or the volume is let go before, nothing is told: under its next
    /// generation no try of this one is carried out.
    pub(super) fn settle_later(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        number: u64,
        held: Held,
        then: impl FnOnce(&LookupResponse) + Send + 'static,
    ) {
        let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
        self.tasks.spawn(async move {
            let settling = Settling::begin(&volume);
            if let Some(found) = engine.settle(&volume, number).await {
                then(&found);
            }
            // In this order: a stop may count the lock for a moment longer than needed, never less.
            drop(settling);
            drop(held);
        });
    }

    async fn settle(&self, volume: &Arc<Volume>, number: u64) -> Option<LookupResponse> {
        while volume.usable().is_ok() && !self.stop.is_cancelled() {
            let over = volume.state().attempts.over();
            if over >= number {
                // No map, which an aborted write in place could hold up for as long as its store is
                // away.
                let nothing = LblkRange::new(0, 0);
                let found = tokio::select! {
                    biased;
                    () = self.stop.cancelled() => return None,
                    found = self.look_up_after(volume, nothing, over, self.deadline()) => found,
                };
                match found {
                    Ok(found) => return Some(found),
                    Err(failure) => self.heed(volume, &failure),
                }
            }
            let pause = Duration::from_millis(self.config.retry_max_ms);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep(pause) => {}
            }
        }
        None
    }
}
