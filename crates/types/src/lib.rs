//! Ids and units as newtypes: a logical block is never taken for a physical one.
//!
//! Everything counts in blocks of [`BLOCK_SIZE`] bytes unless its name says `bytes`. Ids start at 1;
//! 0 is never handed out and means "none" on the wire.

mod ids;
pub mod planted;
mod protocol;
mod reason;
mod size;
mod span;

pub use ids::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Lblk, MapVersion, Millis, Pblk, SegmentIndex,
    StoreId, VolumeId,
};
pub use protocol::{Protocol, ProtocolError};
pub use reason::Reason;
pub use size::{ByteSize, ByteSizeError};
pub use span::{ByteRange, LblkRange, PblkRange};

/// Size of a block in bytes: the unit of allocation, of checksums and of conversion.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] as the type of byte offsets.
pub const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;
/// Longest write that becomes visible after a crash whole or not at all: 1 MiB in blocks.
pub const ATOMIC_WRITE_BLOCKS_MAX: u32 = 256;
/// Most blocks in one io_end: 4 MiB. A larger io_end holds its blocks and its memory too long.
pub const IO_END_BLOCKS_MAX: u32 = 1024;
/// Most ranges of logical blocks in one io_end. Bounds the work of one message; as many single
/// blocks make a write-out of 1 MiB.
pub const IO_END_RANGES_MAX: usize = 256;
/// Most copies of a block.
pub const REPLICAS_MAX: u32 = 3;
/// Largest volume in bytes: 2^60. Above it, offset arithmetic would need a check at each step.
pub const VOLUME_BYTES_MAX: u64 = 1 << 60;
