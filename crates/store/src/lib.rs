//! Durability: commit journal, checkpoints, sled, block files.

pub mod meta;
