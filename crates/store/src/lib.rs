//! Durability: commit journal, checkpoints, sled, block files.

pub mod block;
pub mod meta;
