//! One place that turns a domain reason into a gRPC status with machine-readable details, and back.
//!
//! | domain fact | gRPC code |
//! |---|---|
//! | malformed, beyond the end | INVALID_ARGUMENT, OUT_OF_RANGE |
//! | unknown volume, io_end, token, store | NOT_FOUND |
//! | fenced, expired, old number | ABORTED |
//! | forged token, not allowed to this caller | PERMISSION_DENIED |
//! | wrong state, busy | FAILED_PRECONDITION |
//! | a limit | RESOURCE_EXHAUSTED + RetryInfo |
//! | draining, peer away, not ready | UNAVAILABLE |
//! | bad checksum without a good replica, lost writes | DATA_LOSS |

use std::time::Duration;

use endio_types::Reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// `ErrorInfo.domain` of every error of this project.
pub const DOMAIN: &str = "endio";

/// The gRPC code of a reason.
pub fn code(reason: Reason) -> Code {
    match reason {
        Reason::Malformed => Code::InvalidArgument,
        Reason::OutOfRange => Code::OutOfRange,
        Reason::UnknownVolume
        | Reason::UnknownIoEnd
        | Reason::UnknownToken
        | Reason::UnknownStore => Code::NotFound,
        Reason::ForgedToken | Reason::NotAllowed => Code::PermissionDenied,
        Reason::OldEpoch
        | Reason::OldGeneration
        | Reason::OldIncarnation
        | Reason::LeaseExpired
        | Reason::Aborted
        | Reason::UnknownSession
        | Reason::NotSubmitted => Code::Aborted,
        Reason::OutcomeConflict | Reason::WrongState | Reason::VolumeBusy | Reason::Protocol => {
            Code::FailedPrecondition
        }
        Reason::AlreadyExists => Code::AlreadyExists,
        Reason::NoSpace | Reason::Limit | Reason::MetadataFull => Code::ResourceExhausted,
        Reason::NotEnoughStores | Reason::Draining | Reason::PeerAway | Reason::NotReady => {
            Code::Unavailable
        }
        Reason::ChecksumMismatch | Reason::LostWrites => Code::DataLoss,
        Reason::IoError => Code::Internal,
        Reason::TimedOut => Code::DeadlineExceeded,
    }
}

/// A status that says why in words and for machines.
pub fn status(reason: Reason, message: impl Into<String>) -> Status {
    build(reason, message.into(), None)
}

/// The same with a hint of how long to wait before trying again. 0 gives no hint.
pub fn status_retry(reason: Reason, message: impl Into<String>, retry_after_ms: u32) -> Status {
    let after = (retry_after_ms > 0).then(|| Duration::from_millis(retry_after_ms.into()));
    build(reason, message.into(), after)
}

/// The caller sent something that no retry can mend. `field` names the offending field.
pub fn malformed(field: &str, message: impl Into<String>) -> Status {
    let message = bounded(message.into());
    let mut details = ErrorDetails::new();
    details.set_error_info(Reason::Malformed.name(), DOMAIN, [("field".into(), field.into())]);
    details.add_bad_request_violation(field, &message);
    let text = format!("{field}: {message}");
    Status::with_error_details(Code::InvalidArgument, text, details)
}

/// Longest message in a status, in bytes. A status travels in headers: a message that repeats what
/// a caller sent could otherwise grow beyond what the caller's own side takes.
const MESSAGE_BYTES_MAX: usize = 512;

fn bounded(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        message.push('…');
    }
    message
}

fn build(reason: Reason, message: String, retry_after: Option<Duration>) -> Status {
    let message = bounded(message);
    let mut details = ErrorDetails::new();
    details.set_error_info(reason.name(), DOMAIN, std::collections::HashMap::new());
    if retry_after.is_some() {
        details.set_retry_info(retry_after);
    }
    Status::with_error_details(code(reason), message, details)
}

/// The reason inside a status: from its details, else the nearest one to its code.
///
/// A status that this project did not make (a connection that broke, a proxy) has no details;
/// UNAVAILABLE, CANCELLED and UNKNOWN then count as [`Reason::PeerAway`]: the outcome is unknown.
pub fn reason(status: &Status) -> Reason {
    let info = status.get_details_error_info();
    if let Some(info) = info.filter(|info| info.domain == DOMAIN)
        && let Some(reason) = Reason::from_name(&info.reason)
    {
        return reason;
    }
    match status.code() {
        Code::InvalidArgument | Code::Unimplemented => Reason::Malformed,
        Code::OutOfRange => Reason::OutOfRange,
        Code::NotFound => Reason::UnknownVolume,
        Code::FailedPrecondition => Reason::WrongState,
        Code::AlreadyExists => Reason::AlreadyExists,
        Code::ResourceExhausted => Reason::Limit,
        Code::DataLoss => Reason::ChecksumMismatch,
        Code::DeadlineExceeded => Reason::TimedOut,
        Code::Aborted => Reason::Aborted,
        Code::PermissionDenied | Code::Unauthenticated => Reason::NotAllowed,
        Code::Internal => Reason::IoError,
        _ => Reason::PeerAway,
    }
}

/// How long the peer asks to wait, if it says.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info().and_then(|info| info.retry_delay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_way_through_a_status() {
        for expected in Reason::ALL.iter().copied() {
            let made = status(expected, "text");
            assert_eq!(reason(&made), expected);
            assert_ne!(made.code(), Code::Ok);
        }
    }

    #[test]
    fn a_retry_hint_arrives_and_no_hint_stays_none() {
        let hinted = status_retry(Reason::Limit, "full", 250);
        assert_eq!(retry_after(&hinted), Some(Duration::from_millis(250)));
        assert_eq!(retry_after(&status_retry(Reason::Limit, "full", 0)), None);
    }

    #[test]
    fn a_message_that_repeats_a_long_input_is_cut() {
        let long = "é".repeat(100_000);
        for made in [status(Reason::UnknownVolume, long.clone()), malformed("name", long)] {
            assert!(made.message().len() < 600, "{} bytes", made.message().len());
            assert!(made.details().len() < 2_000, "{} bytes", made.details().len());
        }
    }

    #[test]
    fn a_broken_connection_is_a_peer_that_is_away() {
        assert_eq!(reason(&Status::unavailable("connection reset")), Reason::PeerAway);
    }
}
