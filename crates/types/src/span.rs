//! Ranges: half-open, never empty unless a function says so.

use serde::{Deserialize, Serialize};

use crate::{BLOCK_BYTES, Lblk, Pblk};

/// `len` logical blocks from `start`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct LblkRange {
    /// First block.
    pub start: Lblk,
    /// Number of blocks.
    pub len: u64,
}

impl LblkRange {
    /// `len` blocks from `start`.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start: Lblk(start), len }
    }
    /// First block after the range.
    pub fn end(self) -> u64 {
        self.start.0.saturating_add(self.len)
    }
    /// Whether nothing is in it.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
    /// Whether the two share a block.
    pub fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end() && self.len > 0 && other.len > 0
    }
    /// The blocks that both have.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.0.max(other.start.0);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, end - start))
    }
}

/// `len` physical blocks from `start`, on a store that the context names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PblkRange {
    /// First block.
    pub start: Pblk,
    /// Number of blocks.
    pub len: u64,
}

impl PblkRange {
    /// `len` blocks from `start`.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start: Pblk(start), len }
    }
    /// First block after the range.
    pub fn end(self) -> u64 {
        self.start.0.saturating_add(self.len)
    }
    /// Whether the two share a block.
    pub fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end() && self.len > 0 && other.len > 0
    }
}

/// `len` bytes from `offset` inside a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// First byte after the range; `None` if that does not fit in 64 bits.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
    /// The blocks that the range touches, whole or in part. Empty ranges touch none.
    pub fn blocks(self) -> LblkRange {
        if self.len == 0 {
            return LblkRange::new(self.offset / BLOCK_BYTES, 0);
        }
        let first = self.offset / BLOCK_BYTES;
        let last = (self.offset + (self.len - 1)) / BLOCK_BYTES;
        LblkRange::new(first, last - first + 1)
    }
    /// Whether both ends lie on block boundaries.
    pub fn is_aligned(self) -> bool {
        self.offset.is_multiple_of(BLOCK_BYTES) && self.len.is_multiple_of(BLOCK_BYTES)
    }
}
