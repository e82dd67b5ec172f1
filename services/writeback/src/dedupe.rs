//! Retry keys for tasks: one try of a request at a time, applied at most once.

use std::sync::{Arc, PoisonError};

use endio_api::writeback::RetryKey;
use endio_state_machine::writeback::sessions::{
    Decision, RequestKey, SessionId, SessionLimits, SessionSnapshot, SessionTable,
};
use endio_types::{Millis, Reason};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::failure::Failure;

/// The sessions of this writeback.
pub(crate) struct Dedupe {
    table: Mutex<SessionTable>,
    ended: Notify,
    started: Instant,
}

/// A request's key as it was received and checked.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Session and number.
    pub key: RequestKey,
    /// The client says that this is a second try.
    pub is_retry: bool,
}

/// What to do with a request.
pub(crate) enum Admitted {
    /// Apply it. A request without a key is always new.
    New(Option<Admission>),
    /// It was applied before, with this result if it is still remembered.
    Duplicate(Option<u64>),
    /// Another try runs: wait for an end ([`Dedupe::ended`]) and ask again.
    Busy,
}

/// A request that is being applied. Dropped without [`Admission::applied`], it counts as failed
/// and a later try is new.
pub(crate) struct Admission {
    dedupe: Arc<Dedupe>,
    key: RequestKey,
}

impl Retry {
    /// Checks a key as it came over the wire; `None`: the request has none.
    ///
    /// # Errors
    /// `MALFORMED`: the session is not 16 bytes or the number is 0.
    pub fn from_wire(key: Option<&RetryKey>) -> Result<Option<Self>, Failure> {
        let Some(key) = key else { return Ok(None) };
        let session: [u8; 16] = key.session.as_ref().try_into().map_err(|_| {
            Failure::new(Reason::Malformed, "retry.session: must be exactly 16 bytes")
        })?;
        if key.sequence == 0 {
            return Err(Failure::new(Reason::Malformed, "retry.sequence: counts from 1"));
        }
        let key_checked = RequestKey { session: SessionId(session), sequence: key.sequence };
        Ok(Some(Self { key: key_checked, is_retry: key.is_retry }))
    }
}

/// Checks a session that is named without a number; `None`: none is.
///
/// # Errors
/// `MALFORMED`: it is not 16 bytes.
pub(crate) fn session_from_wire(session: &[u8]) -> Result<Option<SessionId>, Failure> {
    if session.is_empty() {
        return Ok(None);
    }
    let session = session.try_into().map_err(|_| {
        Failure::new(Reason::Malformed, "session: must be exactly 16 bytes, or empty")
    })?;
    Ok(Some(SessionId(session)))
}

impl Dedupe {
    /// No sessions.
    pub(crate) fn new(limits: SessionLimits) -> Self {
        let table = Mutex::new(SessionTable::new(limits));
        Self { table, ended: Notify::new(), started: Instant::now() }
    }

    fn table(&self) -> MutexGuard<'_, SessionTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Takes over what the cache log remembers, and that its tail may be missing.
    pub(crate) fn restore(&self, snapshot: SessionSnapshot) {
        self.table().restore(snapshot, self.now());
    }

    /// A request has arrived; nothing else is known of it yet. The session that begins with it.
    pub(crate) fn meet(&self, retry: Option<Retry>) -> Option<SessionId> {
        let Retry { key, is_retry } = retry?;
        self.table().meet(key, is_retry, self.now()).then_some(key.session)
    }

    /// Whether no request of the session can have been applied before `then`.
    pub(crate) fn is_younger(&self, session: SessionId, then: Instant) -> bool {
        let then = then.saturating_duration_since(self.started).as_millis();
        self.table().is_younger(session, Millis(u64::try_from(then).unwrap_or(u64::MAX)))
    }

    /// Decides about a request.
    ///
    /// # Errors
    /// `UNKNOWN_SESSION` where the outcome of the first try is not known; `LIMIT` where there are
    /// too many sessions.
    pub(crate) fn admit(self: &Arc<Self>, retry: Option<Retry>) -> Result<Admitted, Failure> {
        let Some(Retry { key, is_retry }) = retry else { return Ok(Admitted::New(None)) };
        match self.table().begin(key, is_retry, self.now()) {
            Decision::New => Ok(Admitted::New(Some(Admission { dedupe: Arc::clone(self), key }))),
            Decision::Duplicate(result) => Ok(Admitted::Duplicate(result)),
            Decision::InProgress => Ok(Admitted::Busy),
            Decision::TooOld | Decision::UnknownSession => Err(Failure::new(
                Reason::UnknownSession,
                "the outcome of this request's first try is not known any more",
            )),
            Decision::Full => {
                Err(Failure::new(Reason::Limit, "too many sessions").retry_after(1_000))
            }
            Decision::Malformed => {
                Err(Failure::new(Reason::Malformed, "retry.sequence: counts from 1"))
            }
        }
    }

    /// Waits until `admit` gives another answer than "busy".
    ///
    /// # Errors
    /// As [`Dedupe::admit`], and `TIMED_OUT` at the deadline.
    pub(crate) async fn admit_in_turn(
        self: &Arc<Self>,
        retry: Option<Retry>,
        deadline: Instant,
    ) -> Result<Admitted, Failure> {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            match self.admit(retry)? {
                Admitted::Busy => {}
                admitted => return Ok(admitted),
            }
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                return Err(Failure::new(
                    Reason::TimedOut,
                    "an earlier try of this request is still under way",
                ));
            }
        }
    }
}

impl Admission {
    /// Session and number, for the cache log.
    pub(crate) fn key(&self) -> RequestKey {
        self.key
    }

    /// The request has been applied; a duplicate is answered with `result`.
    pub(crate) fn applied(self, result: u64) {
        let now = self.dedupe.now();
        // The drop that follows finds nothing in progress and only wakes the waiters.
        self.dedupe.table().applied(self.key, result, now);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.dedupe.table().failed(self.key);
        self.dedupe.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn retry(sequence: u64, is_retry: bool) -> Option<Retry> {
        Some(Retry { key: RequestKey { session: SessionId([7; 16]), sequence }, is_retry })
    }

    #[tokio::test]
    async fn a_retry_waits_for_the_first_try_and_gets_its_answer() {
        let dedupe = Arc::new(Dedupe::new(SessionLimits::default()));
        let Admitted::New(Some(first)) = dedupe.admit(retry(1, false)).unwrap() else {
            panic!("the first try is new")
        };
        let second = tokio::spawn({
            let dedupe = Arc::clone(&dedupe);
            let deadline = Instant::now() + std::time::Duration::from_secs(60);
            async move { dedupe.admit_in_turn(retry(1, true), deadline).await }
        });
        tokio::task::yield_now().await;
        first.applied(42);
        assert!(matches!(second.await.unwrap().unwrap(), Admitted::Duplicate(Some(42))));
    }

    #[test]
    fn a_first_try_that_failed_leaves_the_number_free() {
        let dedupe = Arc::new(Dedupe::new(SessionLimits::default()));
        drop(dedupe.admit(retry(1, false)).unwrap());
        assert!(matches!(dedupe.admit(retry(1, true)).unwrap(), Admitted::New(Some(_))));
    }
}
