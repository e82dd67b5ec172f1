//! The version of the protocol between the services, and who may speak with whom.
//!
//! The side that is called decides: conversion about writebacks and block-stores, a block-store about
//! writebacks. So the called side is upgraded first: conversion, then block-stores, then writebacks.

use std::fmt;
use std::str::FromStr;

/// A version of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Protocol {
    /// Grows when an older peer would misunderstand what is said.
    pub major: u32,
    /// Grows when something is added that an older peer may ignore.
    pub minor: u32,
}

/// Why a peer is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The peer is more than one major version behind.
    #[error(
        "the peer speaks protocol {theirs}, this service {ours} and the major version before it: \
         upgrade the peer, one major version at a time"
    )]
    TooOld {
        /// What the peer speaks.
        theirs: Protocol,
        /// What this service speaks.
        ours: Protocol,
    },
    /// The peer is of a later major version.
    #[error(
        "the peer speaks protocol {theirs}, this service only {ours}: upgrade this service first \
         (the order is conversion, block-stores, writebacks)"
    )]
    TooNew {
        /// What the peer speaks.
        theirs: Protocol,
        /// What this service speaks.
        ours: Protocol,
    },
    /// It is no version.
    #[error("the protocol's version must be MAJOR.MINOR")]
    Malformed,
}

impl Protocol {
    /// What this program speaks.
    pub const CURRENT: Self = Self { major: 2, minor: 0 };
    /// What peers speak that do not say it.
    pub const UNSAID: Self = Self { major: 1, minor: 0 };

    /// Whether a service that speaks `self` takes a peer that says `theirs`; `None`: it says nothing.
    ///
    /// # Errors
    /// Why not, with what to do.
    pub fn admits(self, theirs: Option<Self>) -> Result<(), ProtocolError> {
        let theirs = theirs.unwrap_or(Self::UNSAID);
        if theirs.major > self.major {
            return Err(ProtocolError::TooNew { theirs, ours: self });
        }
        if theirs.major + 1 < self.major {
            return Err(ProtocolError::TooOld { theirs, ours: self });
        }
        Ok(())
    }

    /// Whether a caller that speaks `self` goes on with a service that admitted it and says
    /// `theirs`: the newer of the two knows the older one, so only a service that is too old is left.
    ///
    /// # Errors
    /// The service is too old.
    pub fn goes_on_with(self, theirs: Option<Self>) -> Result<(), ProtocolError> {
        match self.admits(theirs) {
            Err(ProtocolError::TooNew { .. }) => Ok(()),
            other => other,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Protocol {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Self, ProtocolError> {
        let (major, minor) = text.split_once('.').ok_or(ProtocolError::Malformed)?;
        let number = |text: &str| text.parse().map_err(|_| ProtocolError::Malformed);
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn version(major: u32, minor: u32) -> Option<Protocol> {
        Some(Protocol { major, minor })
    }

    #[test]
    fn peers_of_this_and_the_previous_major_version_are_taken_and_no_others() {
        let ours = Protocol { major: 5, minor: 3 };
        for taken in [version(5, 0), version(5, 9), version(4, 0), version(4, 99)] {
            assert_eq!(ours.admits(taken), Ok(()), "{taken:?}");
        }
        for old in [version(3, 99), version(0, 0), None] {
            assert!(matches!(ours.admits(old), Err(ProtocolError::TooOld { .. })), "{old:?}");
        }
        for new in [version(6, 0), version(u32::MAX, 0)] {
            assert!(matches!(ours.admits(new), Err(ProtocolError::TooNew { .. })), "{new:?}");
            assert_eq!(ours.goes_on_with(new), Ok(()), "a newer service has decided");
        }
        assert!(ours.goes_on_with(version(3, 0)).is_err());
        assert_eq!(Protocol::CURRENT.admits(None), Ok(()), "peers of before the handshake are N-1");
    }

    #[test]
    fn a_version_survives_its_text_and_garbage_is_refused() {
        assert_eq!("2.17".parse(), Ok(Protocol { major: 2, minor: 17 }));
        assert_eq!(Protocol::CURRENT.to_string().parse(), Ok(Protocol::CURRENT));
        for garbage in ["", "2", "2.", ".0", "2.0.1", "-1.0", "two.zero", "4294967296.0"] {
            assert!(garbage.parse::<Protocol>().is_err(), "{garbage:?}");
        }
    }
}
