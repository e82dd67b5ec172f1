//! Power cuts on real files: a file system that remembers what was not synced, and can be cut off
//! at any instant. `disk` decides what survives; `mount` shows it to the kernel.

pub mod disk;
pub mod mount;
