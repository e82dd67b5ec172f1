//! The scenarios of the completion protocol on the pure machine.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod conversion;
mod data_log;
mod errors;
mod gather;
mod holders;
mod map;
mod punch;
mod random;
mod references;
mod rig;
mod space;
mod stores;
mod table;
