//! The pure parts of writeback: dirty blocks, range locks, sessions, errors, limits, credit.
//!
//! Nothing here does I/O, reads a clock or spawns: the engine of the writeback service owns one of
//! each per volume (or per process), calls it under a lock, and acts on what it returns.

pub mod attempts;
pub mod block_cache;
pub mod confirms;
pub mod cover;
pub mod credit;
pub mod dirty;
pub mod errseq;
pub mod fragments;
pub mod gather;
pub mod groups;
pub mod layout;
pub mod log_reader;
pub mod log_turns;
pub mod map_cache;
pub mod range_lock;
pub mod rhythm;
pub mod sessions;
pub mod throttle;
pub mod view;

use std::fmt;

use serde::{Deserialize, Serialize};

/// Number of a record of the cache log. Grows by one with each record, from 1; 0 is "none".
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
