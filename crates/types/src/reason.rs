//! Why something was refused or failed: one list for errors, streams and metrics.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Machine-readable reason. The numbers and names are those of `endio.common.v1.Reason`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(i32)]
pub enum Reason {
    /// The request is malformed; sending it again cannot help.
    Malformed = 1,
    /// There is no volume of that name or id.
    UnknownVolume = 2,
    /// There is no such io_end: it never existed, or it ended long ago.
    UnknownIoEnd = 3,
    /// There is no such token on that io_end.
    UnknownToken = 4,
    /// There is no store of that id.
    UnknownStore = 5,
    /// The token's MAC does not match its fields, or the token belongs to another io_end.
    ForgedToken = 6,
    /// The cluster epoch is older than the current one: begin again under the current epoch.
    OldEpoch = 7,
    /// The volume was opened by somebody else since: this generation is fenced.
    OldGeneration = 8,
    /// The block-store has restarted since the token was granted.
    OldIncarnation = 9,
    /// The lease ran out: the outcome is unknown, never success.
    LeaseExpired = 10,
    /// The io_end was aborted; its write must begin again.
    Aborted = 11,
    /// The token was already released with another outcome; the first one stands.
    OutcomeConflict = 12,
    /// The object is in a state in which this is not possible.
    WrongState = 13,
    /// No space is left on the stores that could take this write.
    NoSpace = 14,
    /// Fewer live stores are registered than the volume has replicas.
    NotEnoughStores = 15,
    /// A limit of the configuration is reached: back off and try again.
    Limit = 16,
    /// The service is stopping.
    Draining = 17,
    /// A service that is needed cannot be reached now.
    PeerAway = 18,
    /// The data does not match its checksum and no good replica is left.
    ChecksumMismatch = 19,
    /// The device failed to read or write.
    IoError = 20,
    /// A volume of that name exists already with other properties.
    AlreadyExists = 21,
    /// The volume is open elsewhere; use force to take it over.
    VolumeBusy = 22,
    /// The range lies beyond the end of a volume that does not grow.
    OutOfRange = 23,
    /// The retried request belongs to a session that is not known (any more): its outcome is unknown.
    UnknownSession = 24,
    /// Writes acknowledged before a power loss may be missing; told once per volume.
    LostWrites = 25,
    /// The I/O timeout of the volume passed while the write was being retried.
    TimedOut = 26,
    /// The metadata disk of the conversion service is full or fails.
    MetadataFull = 27,
    /// The service is not ready yet: it is recovering.
    NotReady = 28,
    /// The submitter gave the io_end up.
    NotSubmitted = 29,
    /// The peer speaks a version of the protocol that this one does not: upgrade the older of the two.
    Protocol = 30,
    /// The identity of the caller may not do this.
    NotAllowed = 31,
}

impl Reason {
    /// Every reason.
    pub const ALL: &[Self] = &[
        Self::Malformed,
        Self::UnknownVolume,
        Self::UnknownIoEnd,
        Self::UnknownToken,
        Self::UnknownStore,
        Self::ForgedToken,
        Self::OldEpoch,
        Self::OldGeneration,
        Self::OldIncarnation,
        Self::LeaseExpired,
        Self::Aborted,
        Self::OutcomeConflict,
        Self::WrongState,
        Self::NoSpace,
        Self::NotEnoughStores,
        Self::Limit,
        Self::Draining,
        Self::PeerAway,
        Self::ChecksumMismatch,
        Self::IoError,
        Self::AlreadyExists,
        Self::VolumeBusy,
        Self::OutOfRange,
        Self::UnknownSession,
        Self::LostWrites,
        Self::TimedOut,
        Self::MetadataFull,
        Self::NotReady,
        Self::NotSubmitted,
        Self::Protocol,
        Self::NotAllowed,
    ];

    /// The name as it stands in `google.rpc.ErrorInfo.reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "MALFORMED",
            Self::UnknownVolume => "UNKNOWN_VOLUME",
            Self::UnknownIoEnd => "UNKNOWN_IO_END",
            Self::UnknownToken => "UNKNOWN_TOKEN",
            Self::UnknownStore => "UNKNOWN_STORE",
            Self::ForgedToken => "FORGED_TOKEN",
            Self::OldEpoch => "OLD_EPOCH",
            Self::OldGeneration => "OLD_GENERATION",
            Self::OldIncarnation => "OLD_INCARNATION",
            Self::LeaseExpired => "LEASE_EXPIRED",
            Self::Aborted => "ABORTED",
            Self::OutcomeConflict => "OUTCOME_CONFLICT",
            Self::WrongState => "WRONG_STATE",
            Self::NoSpace => "NO_SPACE",
            Self::NotEnoughStores => "NOT_ENOUGH_STORES",
            Self::Limit => "LIMIT",
            Self::Draining => "DRAINING",
            Self::PeerAway => "PEER_AWAY",
            Self::ChecksumMismatch => "CHECKSUM_MISMATCH",
            Self::IoError => "IO_ERROR",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::VolumeBusy => "VOLUME_BUSY",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::UnknownSession => "UNKNOWN_SESSION",
            Self::LostWrites => "LOST_WRITES",
            Self::TimedOut => "TIMED_OUT",
            Self::MetadataFull => "METADATA_FULL",
            Self::NotReady => "NOT_READY",
            Self::NotSubmitted => "NOT_SUBMITTED",
            Self::Protocol => "PROTOCOL",
            Self::NotAllowed => "NOT_ALLOWED",
        }
    }

    /// The reason of that number on the wire; `None` for 0 and for numbers of a later version.
    pub fn from_wire(number: i32) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as i32 == number)
    }

    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// Whether the write can begin again under current numbers and may then succeed.
    pub fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::OldEpoch
                | Self::OldIncarnation
                | Self::LeaseExpired
                | Self::Aborted
                | Self::UnknownIoEnd
                | Self::UnknownToken
                | Self::NoSpace
                | Self::NotEnoughStores
                | Self::Limit
                | Self::PeerAway
                | Self::IoError
                | Self::ChecksumMismatch
                | Self::MetadataFull
                | Self::NotReady
                | Self::NotSubmitted
                | Self::Draining
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_its_number_and_its_name() {
        for reason in Reason::ALL.iter().copied() {
            assert_eq!(Reason::from_wire(reason as i32), Some(reason));
            assert_eq!(Reason::from_name(reason.name()), Some(reason));
        }
        assert_eq!(Reason::from_wire(0), None);
    }
}
