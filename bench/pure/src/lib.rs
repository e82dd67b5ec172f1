//! The write path without network, disk and runtime: what each write costs in instructions, and
//! what many writes do to the map.
//!
//! ```text
//!   NBD request ─► BeginIo ─► machine ─► Begun ─► Bio ─► gate ─► SegmentRelease ─► machine ─► record
//!                  encoded and decoded at every arrow, as between processes
//! ```
//! Everything is deterministic: two runs execute the same instructions.

pub mod cluster;
mod dice;
pub mod process;
mod rig;

pub use dice::Dice;
pub use rig::{Cost, Rig};
