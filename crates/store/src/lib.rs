//! Durability: commit journal, checkpoints, sled, block files.

pub mod block;
pub mod cache_log;
pub mod meta;
