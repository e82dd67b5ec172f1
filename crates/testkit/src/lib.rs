//! What the tests share: blocks that name themselves, an oracle of a block device, the named
//! checkers of the promises, real processes that can be killed, and a client that does not give up.
//!
//! Nothing here is part of the product. Every random choice comes from a [`seed::Rng`], so that a
//! failure is replayed by its seed.

pub mod checkers;
pub mod client;
pub mod cluster;
pub mod oracle;
pub mod pattern;
pub mod process;
pub mod seed;
pub mod workload;
