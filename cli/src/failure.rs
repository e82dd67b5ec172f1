//! How a command fails: what it tried, on what, why, what to do, and the exit code for scripts.

use std::fmt;

use endio_api::status;
use endio_types::Reason;
use serde_json::json;
use tonic::Status;

/// Exit codes of the `endio` command. They are part of its interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It failed for another reason than those below.
    Failed = 1,
    /// The command line or a file name makes no sense. clap exits with the same code.
    Usage = 2,
    /// There is no such volume, trace or file.
    NotFound = 3,
    /// The service, or another one that it needs, cannot be reached or is not ready.
    Unreachable = 4,
    /// A check ran to its end and found something.
    CheckFound = 5,
    /// Data was lost: a checksum without a good replica, or acknowledged writes that are gone.
    DataLoss = 6,
    /// Refused for now: a limit, no space, busy. The same command can succeed later.
    Refused = 7,
}

/// The table of exit codes, shown at the end of `endio --help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  ok
  1  failed
  2  usage: the command line makes no sense
  3  not found: no such volume, trace or file
  4  unreachable: the service, or one that it needs, is away or not ready
  5  a check found something
  6  data loss: bad checksum without a good replica, or lost writes
  7  refused for now: limit, no space, volume busy";

/// A failed command.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// What was tried, on what: "read 4096 bytes at 0 of volume v1".
    pub(crate) what: String,
    /// The machine-readable reason, if a service gave one.
    pub(crate) reason: Option<Reason>,
    /// What went wrong.
    pub(crate) message: String,
    /// What to do about it; empty: nothing known.
    pub(crate) help: String,
    /// What the process exits with.
    pub(crate) exit: Exit,
}

/// Result of a command or of a part of one.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure that no service reported.
    pub(crate) fn new(exit: Exit, what: impl Into<String>, message: impl fmt::Display) -> Self {
        let message = message.to_string();
        Self { what: what.into(), reason: None, message, help: String::new(), exit }
    }

    /// The same with advice.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = help.into();
        self
    }

    /// A failure that a service or the connection to it reported.
    pub(crate) fn of_status(what: impl Into<String>, status: &Status, endpoint: &str) -> Self {
        if !is_from_service(status) && endio_chassis::net::is_connection_lost(status) {
            return Self {
                what: what.into(),
                reason: Some(Reason::PeerAway),
                message: format!("no endio service answers at {endpoint} ({})", status.message()),
                help: format!(
                    "start one with `endio up`, or name another with --endpoint (now {endpoint}); \
                     one with TLS wants https:// and --tls-dir"
                ),
                exit: Exit::Unreachable,
            };
        }
        Self::of_reason(what, status::reason(status), status.message())
    }

    /// A failure with a reason, as completions of a stream carry it.
    pub(crate) fn of_reason(
        what: impl Into<String>,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            reason: Some(reason),
            message: message.into(),
            help: advice(reason).into(),
            exit: exit_of(reason),
        }
    }

    /// One object for `--json`.
    pub(crate) fn json(&self) -> serde_json::Value {
        json!({
            "error": {
                "what": self.what,
                "reason": self.reason.map(Reason::name),
                "message": self.message,
                "help": self.help,
                "exit_code": self.exit as u8,
            }
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: ", self.what)?;
        if let Some(reason) = self.reason {
            write!(f, "{reason}: ")?;
        }
        f.write_str(&self.message)?;
        if !self.help.is_empty() {
            write!(f, "\n  help: {}", self.help)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Whether a service of this project made the status, and not a connection that broke.
pub(crate) fn is_from_service(status: &Status) -> bool {
    use tonic_types::StatusExt as _;
    status.get_details_error_info().is_some_and(|info| info.domain == status::DOMAIN)
}

fn exit_of(reason: Reason) -> Exit {
    match reason {
        Reason::Malformed | Reason::OutOfRange => Exit::Usage,
        Reason::UnknownVolume
        | Reason::UnknownIoEnd
        | Reason::UnknownToken
        | Reason::UnknownStore => Exit::NotFound,
        Reason::PeerAway | Reason::NotReady | Reason::Draining | Reason::NotEnoughStores => {
            Exit::Unreachable
        }
        Reason::ChecksumMismatch | Reason::LostWrites => Exit::DataLoss,
        Reason::Limit
        | Reason::NoSpace
        | Reason::MetadataFull
        | Reason::VolumeBusy
        | Reason::TimedOut => Exit::Refused,
        _ => Exit::Failed,
    }
}

/// What a person can do about a reason.
pub(crate) fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::UnknownVolume => "list volumes with `endio volume list`",
        Reason::NotEnoughStores => {
            "start more block-stores (`endio stores` shows those that are alive), or use a volume \
             with fewer replicas"
        }
        Reason::NoSpace => {
            "free space with `endio trim` or `endio volume delete`, or add a block-store; \
             `endio stores` shows what is free"
        }
        Reason::MetadataFull => "free space on the disk of the conversion service",
        Reason::VolumeBusy => {
            "another writeback has the volume; close it there, or take it over with \
             `endio volume open NAME --force` (the other one is fenced)"
        }
        Reason::OldGeneration => "the volume was taken over by another writeback; use that one",
        Reason::OutOfRange => "see the size with `endio volume show`, grow it with `volume resize`",
        Reason::AlreadyExists => "choose another name, or the properties that the volume has",
        Reason::ChecksumMismatch => {
            "no good copy is left; see which blocks with `endio check --read-data`, restore them \
             from a backup by writing them again"
        }
        Reason::LostWrites => {
            "a power loss, or another writeback that took the volume, may have taken writes that were \
             not fsynced; write again what was written since the last fsync that succeeded"
        }
        Reason::PeerAway => "see which service is away with `endio status` and `endio stores`",
        Reason::NotReady | Reason::Draining | Reason::Limit => "try again in a moment",
        Reason::TimedOut => "the write is still retried; see `endio status` and `endio io-ends`",
        Reason::Protocol => {
            "upgrade the older service: first conversion, then block-stores, then writebacks"
        }
        Reason::NotAllowed => {
            "show a certificate that may do this (`--tls-dir`); docs/SECURITY.md has the table"
        }
        Reason::IoError => "see the log of the block-store and its disk",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_volume_exits_with_not_found_and_says_how_to_list() {
        let status = status::status(Reason::UnknownVolume, "there is no volume v1");
        let failure = Failure::of_status("read volume v1", &status, "http://x");
        assert_eq!(failure.exit, Exit::NotFound);
        assert_eq!(
            failure.to_string(),
            "cannot read volume v1: UNKNOWN_VOLUME: there is no volume v1\n  \
             help: list volumes with `endio volume list`"
        );
        assert_eq!(failure.json()["error"]["exit_code"], 3);
    }

    #[test]
    fn a_dead_endpoint_is_told_apart_from_a_peer_that_the_service_misses() {
        let dead = Failure::of_status("x", &Status::unavailable("tcp connect error"), "http://x:1");
        assert!(dead.message.contains("http://x:1"));
        assert!(dead.help.contains("endio up"));
        let away = status::status(Reason::PeerAway, "conversion is away");
        let away = Failure::of_status("x", &away, "http://x:1");
        assert!(away.help.contains("endio status"));
        assert_eq!((dead.exit, away.exit), (Exit::Unreachable, Exit::Unreachable));
    }

    #[test]
    fn lost_data_has_its_own_exit_code() {
        for reason in [Reason::LostWrites, Reason::ChecksumMismatch] {
            assert_eq!(Failure::of_reason("x", reason, "").exit, Exit::DataLoss);
        }
        assert_eq!(Failure::of_reason("x", Reason::NoSpace, "").exit, Exit::Refused);
    }
}
