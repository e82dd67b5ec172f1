//! Durability: commit journal, checkpoints, sled, block files.
