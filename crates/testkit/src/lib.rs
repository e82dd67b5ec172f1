//! What the tests share: blocks that name themselves, an oracle of a block device, the named
//! checkers of the promises, real processes that can be killed, and a client that does not give up.
//!
//! Nothing here is part of the product. Every random choice comes from a [`seed::Rng`], so that a
//! failure is replayed by its seed.

#[cfg(feature = "services")]
pub mod checkers;
#[cfg(feature = "services")]
pub mod client;
#[cfg(feature = "services")]
pub mod cluster;
pub mod oracle;
pub mod pattern;
#[cfg(feature = "services")]
pub mod process;
pub mod seed;
#[cfg(feature = "services")]
pub mod workload;
