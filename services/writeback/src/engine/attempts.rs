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

impl Engine {
    /// A change of a volume's map or size, tried again while conversion is away. Says which try
    /// conversion has to hear of as over before somebody else uses the blocks: [`Self::settle`].
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
                let attempt = volume.state().attempts.begin();
                let trying = Trying { volume: Arc::clone(volume), number: attempt.number };
                lock().began(attempt);
                let (number, over) = (attempt.number, attempt.over);
                let answer = call(client, Attempt { number, over });
                async move {
                    let _trying = trying;
                    answer.await
                }
            })
            .await;
        let left = lock().left(outcome.is_ok());
        (outcome, left)
    }

    /// Waits until conversion has heard that a try is over, and those before it. Until then the
    /// caller keeps the lock of its blocks. `None`: the volume is not usable here any more.
    pub(super) async fn settle(&self, volume: &Arc<Volume>, number: u64) -> Option<LookupResponse> {
        while volume.usable().is_ok() {
            let over = volume.state().attempts.over();
            if over >= number {
                let first = LblkRange::new(0, 1);
                let found = tokio::select! {
                    biased;
                    () = self.stop.cancelled() => return None,
                    found = self.look_up_after(volume, first, over, self.deadline()) => found,
                };
                match found {
                    Ok(found) => return Some(found),
                    Err(failure) => self.heed(volume, &failure),
                }
            }
            tokio::time::sleep(Duration::from_millis(self.config.retry_max_ms)).await;
        }
        None
    }
}
