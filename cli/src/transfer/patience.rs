//! How long to keep trying, and what to say meanwhile.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use endio_types::Reason;
use tonic::{Response, Status};

use crate::{
    client::{Backoff, Client},
    failure::{Failure, Outcome},
};

/// What to do about a failed request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// Send it again, as a retry of the same number.
    Again,
    /// Earlier requests may be gone: repeat everything since the last checkpoint.
    Repeat,
    /// Trying again cannot help.
    Stop,
}

/// The one place that decides whether trying again makes sense for a transfer.
pub(crate) fn action(reason: Reason) -> Action {
    match reason {
        Reason::LostWrites | Reason::UnknownSession => Action::Repeat,
        // A writeback that was killed keeps its volumes until its lease ends; then they are free.
        Reason::VolumeBusy | Reason::TimedOut => Action::Again,
        Reason::ChecksumMismatch => Action::Stop,
        reason if reason.is_retryable() => Action::Again,
        _ => Action::Stop,
    }
}

/// Counts the time without progress, waits between tries, and tells why on stderr.
#[derive(Debug)]
pub(crate) struct Patience {
    total: Duration,
    failing_since: Option<Instant>,
    backoff: Backoff,
    told: Option<Reason>,
}

impl Patience {
    /// Gives up after so much time without progress.
    pub(crate) fn new(total: Duration) -> Self {
        Self { total, failing_since: None, backoff: Backoff::new(), told: None }
    }

    /// How long it lasts without progress.
    pub(crate) fn total(&self) -> Duration {
        self.total
    }

    /// Something succeeded.
    pub(crate) fn progress(&mut self) {
        if self.failing_since.take().is_some() {
            self.backoff.reset();
            if self.told.take().is_some() {
                eprintln!("going on");
            }
        }
    }

    /// How long to wait before the next try; says why on stderr when the reason is a new one.
    ///
    /// # Errors
    /// The failure itself once patience is exhausted.
    pub(crate) fn delay(&mut self, failure: &Failure, hint: Option<Duration>) -> Outcome<Duration> {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let left = self.total.saturating_sub(since.elapsed());
        if left.is_zero() {
            let mut failure = failure.clone();
            let waited = self.total.as_secs_f64();
            failure.message = format!("{} (no progress for {waited:.1} s)", failure.message);
            return Err(failure);
        }
        let reason = failure.reason.unwrap_or(Reason::PeerAway);
        // A limit passes within milliseconds; everything else deserves a word.
        if reason != Reason::Limit && self.told != Some(reason) {
            self.told = Some(reason);
            eprintln!("waiting up to {:.0} s: {failure}", left.as_secs_f64().ceil());
        }
        Ok(self.backoff.take(hint).min(left))
    }

    /// [`Self::delay`], slept through. Cancel-safe.
    pub(crate) async fn wait(&mut self, failure: &Failure, hint: Option<Duration>) -> Outcome {
        let delay = self.delay(failure, hint)?;
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// Makes one idempotent call, again and again while that can help.
    ///
    /// # Errors
    /// The last failure, when trying again cannot help or patience is exhausted.
    pub(crate) async fn call<T, F>(
        &mut self,
        client: &Client,
        what: &str,
        mut call: impl FnMut() -> F,
    ) -> Outcome<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        loop {
            match call().await {
                Ok(answer) => {
                    self.progress();
                    return Ok(answer.into_inner());
                }
                Err(status) => {
                    let failure = client.failure(what, &status);
                    match failure.reason.map(action) {
                        Some(Action::Again) => {
                            let hint = endio_api::status::retry_after(&status);
                            self.wait(&failure, hint).await?;
                        }
                        _ => return Err(failure),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_tried_again_and_what_does_not_is_not() {
        use Reason as R;
        for reason in [
            R::PeerAway,
            R::NotReady,
            R::Draining,
            R::Limit,
            R::NotEnoughStores,
            R::NoSpace,
            R::IoError,
            R::VolumeBusy,
            R::TimedOut,
            R::MetadataFull,
        ] {
            assert_eq!(action(reason), Action::Again, "{reason}");
        }
        for reason in [R::LostWrites, R::UnknownSession] {
            assert_eq!(action(reason), Action::Repeat, "{reason}");
        }
        for reason in
            [R::UnknownVolume, R::OutOfRange, R::Malformed, R::OldGeneration, R::ChecksumMismatch]
        {
            assert_eq!(action(reason), Action::Stop, "{reason}");
        }
    }

    #[test]
    fn patience_ends_without_progress_and_is_whole_again_after_some() {
        let failure = Failure::of_reason("x", Reason::Limit, "full");
        let mut none = Patience::new(Duration::ZERO);
        assert!(none.delay(&failure, None).unwrap_err().message.contains("no progress"));
        let mut long = Patience::new(Duration::from_secs(60));
        assert_eq!(long.delay(&failure, None).unwrap(), Duration::from_millis(100));
        assert_eq!(long.delay(&failure, None).unwrap(), Duration::from_millis(200));
        long.progress();
        assert_eq!(long.delay(&failure, None).unwrap(), Duration::from_millis(100));
    }
}
