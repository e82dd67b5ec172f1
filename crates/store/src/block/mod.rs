//! The data of a block-store: superblock, block file, and devices that misbehave on purpose.

mod device;
mod direct;
mod file;
mod memory;
mod superblock;
mod tracked;

pub use device::BlockDevice;
pub use file::{BlockFile, DEFAULT_CAPACITY_BLOCKS, OpenBlockFile, OpenBlockFileError};
pub use memory::{DeviceFault, MemoryDevice};
pub use superblock::{Superblock, SuperblockError};
pub use tracked::{TrackedDevice, WriteTicket};
