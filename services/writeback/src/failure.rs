//! Why a request failed, in the form in which it goes to the caller and into the error cursor.

use std::borrow::Cow;

use endio_types::Reason;
use tonic::Status;

const UNBACKED: &str = "no space is promised for what is dirty";

/// A failure with its machine-readable reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// What kind of failure it is.
    pub reason: Reason,
    /// One sentence for people.
    pub detail: Cow<'static, str>,
    /// Wait so long before trying again, milliseconds. 0: no hint.
    pub retry_after_ms: u32,
}

impl Failure {
    /// A failure without a hint of when to try again.
    pub fn new(reason: Reason, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, detail: detail.into(), retry_after_ms: 0 }
    }

    /// The same with a hint, in milliseconds.
    #[must_use]
    pub fn retry_after(mut self, ms: u32) -> Self {
        self.retry_after_ms = ms;
        self
    }

    /// The failure of a wire message that carries a reason; `None` when the number says success.
    /// A number of a later version counts as aborted: unknown outcome, never success.
    pub fn from_wire(number: i32, detail: &str) -> Option<Self> {
        if number == 0 {
            return None;
        }
        let reason = Reason::from_wire(number).unwrap_or(Reason::Aborted);
        let detail: Cow<'static, str> =
            if detail.is_empty() { reason.name().into() } else { detail.to_owned().into() };
        Some(Self::new(reason, detail))
    }

    /// The session with conversion broke, or does not stand.
    pub fn conversion_away() -> Self {
        Self::new(Reason::PeerAway, "the conversion service cannot be reached now")
    }

    /// Whether the stores are full, and waiting does not help by itself.
    pub fn is_full(&self) -> bool {
        self.reason == Reason::NoSpace && self.retry_after_ms == 0
    }

    /// Whether it says that the volume is not open here any more.
    pub fn ends_volume(&self) -> bool {
        matches!(self.reason, Reason::OldGeneration | Reason::UnknownVolume)
    }

    /// Nothing was tried, because no space is promised for what is dirty.
    pub fn unbacked() -> Self {
        Self::new(Reason::NoSpace, UNBACKED)
    }

    /// Whether acknowledged writes may be missing: graver than what is tried again.
    pub fn is_loss(&self) -> bool {
        self.reason == Reason::LostWrites
    }

    /// Whether it is [`Self::unbacked`].
    pub fn is_unbacked(&self) -> bool {
        self.reason == Reason::NoSpace && self.detail == UNBACKED
    }

    /// A newer generation of the volume exists.
    pub fn fenced() -> Self {
        Self::new(Reason::OldGeneration, "the volume was opened by somebody else since")
    }

    /// The service is stopping.
    pub fn draining() -> Self {
        Self::new(Reason::Draining, "the service is stopping")
    }

    /// The request's task ended without an answer, which is a fault of this service.
    pub fn task_lost() -> Self {
        Self::new(Reason::IoError, "the request's task ended without an answer")
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let after = endio_api::status::retry_after(&status);
        let ms = after.map_or(0, |after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX));
        Self::new(endio_api::status::reason(&status), status.message().to_owned()).retry_after(ms)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let Failure { reason, detail, retry_after_ms } = failure;
        endio_api::status::status_retry(reason, detail, retry_after_ms)
    }
}
