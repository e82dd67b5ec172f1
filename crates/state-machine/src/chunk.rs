//! One chunk of the extent map: 1024 logical blocks (4 MiB) of a volume.
//!
//! A chunk is the unit in which the map is stored, cached and checkpointed. It is a sorted list of
//! extents, at most one CRC-32C per block, and the number of the last operation applied to it.

use endio_types::{LblkRange, Pblk, PblkRange, REPLICAS_MAX, StoreId, VolumeId};

pub use crate::chunk_codec::{CHUNK_BYTES_MAX, ChunkError};

/// Logical blocks in one chunk: 4 MiB of a volume.
pub const CHUNK_BLOCKS: u64 = 1024;
/// [`CHUNK_BLOCKS`] as the type of offsets inside a chunk.
pub(crate) const CHUNK_LEN: u16 = CHUNK_BLOCKS as u16;
const COPIES: usize = REPLICAS_MAX as usize;

/// Which chunk: `index` counts in units of [`CHUNK_BLOCKS`] from the start of the volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChunkId {
    /// The volume.
    pub volume: VolumeId,
    /// The number of the chunk inside the volume.
    pub index: u64,
}

impl ChunkId {
    /// The logical blocks that the chunk covers.
    pub fn blocks(self) -> LblkRange {
        LblkRange::new(self.index.saturating_mul(CHUNK_BLOCKS), CHUNK_BLOCKS)
    }
}

/// The place of one operation in history: the journal record that carries it, and its position in
/// that record. A record may hold many operations on the same chunk, so the record's number alone
/// cannot say which of them a chunk has seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct OpSeq {
    /// Sequence number of the journal record; counts from 1.
    pub record: u64,
    /// Position inside the record; each operation of a record has its own, in order.
    pub op: u32,
}

impl OpSeq {
    /// Operation `op` of record `record`.
    pub fn new(record: u64, op: u32) -> Self {
        Self { record, op }
    }
}

/// One copy of a block: where it lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Place {
    /// The store.
    pub store: StoreId,
    /// The block inside the store.
    pub pblk: Pblk,
}

/// Where the first block of an extent lies: one to three copies. Block `n` of the extent lies `n`
/// blocks further in each of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Places {
    copies: [Place; COPIES],
    count: u8,
}

impl Places {
    /// From one to three copies; `None` for any other number.
    pub fn new(copies: &[Place]) -> Option<Self> {
        if copies.is_empty() || copies.len() > COPIES {
            return None;
        }
        let mut places = Self { copies: [Place::default(); COPIES], count: copies.len() as u8 };
        places.copies[..copies.len()].copy_from_slice(copies);
        Some(places)
    }
    /// A single copy.
    pub fn single(store: StoreId, pblk: Pblk) -> Self {
        let mut copies = [Place::default(); COPIES];
        copies[0] = Place { store, pblk };
        Self { copies, count: 1 }
    }
    /// The copies, in the order in which they were given.
    pub fn as_slice(&self) -> &[Place] {
        &self.copies[..usize::from(self.count)]
    }
    /// The places of the block that lies `blocks` further in the extent.
    #[must_use]
    pub fn advanced(mut self, blocks: u64) -> Self {
        for copy in &mut self.copies[..usize::from(self.count)] {
            copy.pblk = Pblk(copy.pblk.0.saturating_add(blocks));
        }
        self
    }
}

/// What the blocks of an extent hold.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ExtentState {
    /// Allocated, reads as zeroes.
    Unwritten,
    /// Holds data.
    Written,
}

/// A run of blocks of a chunk that lie one after the other in every copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First block, counted from the start of the chunk.
    pub offset: u16,
    /// Number of blocks, at least 1.
    pub len: u16,
    /// What the blocks hold.
    pub state: ExtentState,
    /// Whether each block has a CRC-32C; only written extents do.
    pub checksummed: bool,
    /// Where the blocks lie.
    pub places: Places,
}

impl Extent {
    /// First block after the extent.
    pub fn end(&self) -> u16 {
        self.offset + self.len
    }
    /// The part of the extent inside `from..to`.
    pub(crate) fn clipped(&self, from: u16, to: u16) -> Option<Self> {
        let offset = self.offset.max(from);
        let end = self.end().min(to);
        (offset < end).then(|| Self {
            offset,
            len: end - offset,
            places: self.places.advanced(u64::from(offset - self.offset)),
            ..*self
        })
    }
    /// Whether `next` goes on where this one ends, in every copy.
    fn continues_in(&self, next: &Self) -> bool {
        self.end() == next.offset
            && self.state == next.state
            && self.checksummed == next.checksummed
            && self.places.advanced(u64::from(self.len)) == next.places
    }
}

/// Physical blocks that the map no longer names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Piece {
    /// The store.
    pub store: StoreId,
    /// The blocks.
    pub range: PblkRange,
}

/// The effect of an operation on the map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Physical blocks that nothing names any more, each copy for itself, in no special order.
    pub freed: Vec<Piece>,
    /// By how many logical blocks the mapped part of the volume grew.
    pub mapped: i64,
    /// By how many logical blocks the written part of the volume grew.
    pub written: i64,
    /// Chunks that had seen the operation before and were left alone (replay only).
    pub skipped: u64,
}

impl Change {
    /// Adds the effect of another operation.
    pub fn absorb(&mut self, other: Self) {
        self.freed.extend(other.freed);
        self.mapped += other.mapped;
        self.written += other.written;
        self.skipped += other.skipped;
    }

    fn leave(&mut self, old: &Extent, kept: Option<Places>) {
        self.mapped -= i64::from(old.len);
        if old.state == ExtentState::Written {
            self.written -= i64::from(old.len);
        }
        let kept = kept.unwrap_or_default();
        for copy in old.places.as_slice() {
            if !kept.as_slice().contains(copy) {
                let range = PblkRange { start: copy.pblk, len: u64::from(old.len) };
                self.freed.push(Piece { store: copy.store, range });
            }
        }
    }

    fn enter(&mut self, new: &Extent) {
        self.mapped += i64::from(new.len);
        if new.state == ExtentState::Written {
            self.written += i64::from(new.len);
        }
    }
}

/// Extents and checksums of one chunk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chunk {
    pub(crate) extents: Vec<Extent>,
    /// One per block, allocated with the first checksum; 0 where there is none.
    pub(crate) crcs: Option<Box<[u32]>>,
    pub(crate) applied: OpSeq,
}

impl Chunk {
    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }
    /// The last operation applied to the chunk.
    pub fn applied(&self) -> OpSeq {
        self.applied
    }
    /// All extents, sorted, never overlapping.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }
    /// The parts of the extents that lie in `offset..offset + len`.
    pub fn lookup(&self, offset: u16, len: u16) -> impl Iterator<Item = Extent> + '_ {
        let end = offset.saturating_add(len).min(CHUNK_LEN);
        let first = self.extents.partition_point(|extent| extent.end() <= offset);
        self.extents[first..]
            .iter()
            .take_while(move |extent| extent.offset < end)
            .filter_map(move |extent| extent.clipped(offset, end))
    }
    /// The checksums of the blocks of an extent of this chunk; empty if it has none.
    pub fn crcs(&self, extent: &Extent) -> &[u32] {
        match &self.crcs {
            Some(crcs) if extent.checksummed => {
                &crcs[usize::from(extent.offset)..usize::from(extent.end())]
            }
            _ => &[],
        }
    }
    /// The unmapped parts of `offset..offset + len`, as (offset, length).
    pub fn holes(&self, offset: u16, len: u16) -> Vec<(u16, u16)> {
        let end = offset.saturating_add(len).min(CHUNK_LEN);
        let mut at = offset;
        let mut holes = Vec::new();
        for extent in self.lookup(offset, len) {
            if at < extent.offset {
                holes.push((at, extent.offset - at));
            }
            at = extent.end();
        }
        if at < end {
            holes.push((at, end - at));
        }
        holes
    }
    /// Bytes of memory that the chunk takes, roughly; for bounding caches.
    pub fn memory(&self) -> usize {
        let crcs = self.crcs.as_ref().map_or(0, |crcs| crcs.len() * 4);
        size_of::<Self>() + self.extents.capacity() * size_of::<Extent>() + crcs
    }

    /// Marks `seq` as applied, unless the chunk has seen it: then nothing may be done (`false`).
    pub(crate) fn advance(&mut self, seq: OpSeq) -> bool {
        if self.applied >= seq {
            return false;
        }
        self.applied = seq;
        true
    }

    /// Maps `offset..offset + len` to `places`. Copies that stay where they are (an unwritten
    /// extent converted in place) are not freed. `crcs` is empty or has one entry per block, and
    /// is empty for unwritten extents.
    pub(crate) fn map(
        &mut self,
        (offset, len): (u16, u16),
        state: ExtentState,
        places: Places,
        crcs: &[u32],
    ) -> Change {
        let mut change = Change::default();
        let new = Extent { offset, len, state, checksummed: !crcs.is_empty(), places };
        for old in self.lookup(offset, len) {
            change.leave(&old, Some(places.advanced(u64::from(old.offset - offset))));
        }
        change.enter(&new);
        self.splice(offset, new.end(), &[new]);
        if !crcs.is_empty() {
            let all =
                self.crcs.get_or_insert_with(|| vec![0; usize::from(CHUNK_LEN)].into_boxed_slice());
            all[usize::from(offset)..usize::from(new.end())].copy_from_slice(crcs);
        }
        change
    }

    /// Unmaps `offset..offset + len`.
    pub(crate) fn unmap(&mut self, offset: u16, len: u16) -> Change {
        let mut change = Change::default();
        for old in self.lookup(offset, len) {
            change.leave(&old, None);
        }
        self.splice(offset, offset + len, &[]);
        change
    }

    /// Turns what is written in `offset..offset + len` into unwritten, on the same blocks.
    pub(crate) fn zero(&mut self, offset: u16, len: u16) -> Change {
        let mut change = Change::default();
        let mut new: Vec<Extent> = Vec::new();
        for old in self.lookup(offset, len) {
            if old.state == ExtentState::Written {
                change.written -= i64::from(old.len);
            }
            new.push(Extent { state: ExtentState::Unwritten, checksummed: false, ..old });
        }
        self.splice(offset, offset + len, &new);
        change
    }

    /// Replaces what is in `from..to` by `new`, which lies inside, sorted; merges neighbours and
    /// forgets the checksums of the range.
    fn splice(&mut self, from: u16, to: u16, new: &[Extent]) {
        let first = self.extents.partition_point(|extent| extent.end() <= from);
        let after = self.extents.partition_point(|extent| extent.offset < to);
        let mut parts: Vec<Extent> = Vec::with_capacity(new.len() + 4);
        // The neighbours join in so that runs which now touch become one.
        let low = first.saturating_sub(1);
        let high = after.max(first).saturating_add(1).min(self.extents.len());
        let before = self.extents[low..high].iter().filter_map(|e| e.clipped(0, from));
        let behind = self.extents[low..high].iter().filter_map(|e| e.clipped(to, CHUNK_LEN));
        for extent in before.chain(new.iter().copied()).chain(behind) {
            match parts.last_mut() {
                Some(last) if last.continues_in(&extent) => last.len += extent.len,
                _ => parts.push(extent),
            }
        }
        self.extents.splice(low..high, parts);
        if let Some(crcs) = &mut self.crcs {
            crcs[usize::from(from)..usize::from(to)].fill(0);
        }
        if !self.extents.iter().any(|extent| extent.checksummed) {
            self.crcs = None;
        }
    }
}
