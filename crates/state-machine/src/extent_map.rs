//! The extent map: which blocks of a volume lie where, over any table of chunks.
//!
//! Every operation carries its [`OpSeq`]. A chunk that has already seen an operation with the same
//! or a later number is left alone, so records can be replayed over a fuzzy checkpoint in which
//! some chunks are newer than others. A chunk that became empty is removed and forgets its number;
//! replaying over its absence ends in the same map, because every block that is mapped in between
//! is unmapped again by the record that emptied the chunk. What a *replayed* operation returns is
//! therefore not reliable: after a replay, count and collect with [`for_each_extent`] instead.

use endio_types::{Lblk, LblkRange, VolumeId};

use crate::chunk::{CHUNK_BLOCKS, Change, Chunk, ChunkId, ExtentState, OpSeq, Places};

/// Where chunks are kept: memory, sled, or something that forgets.
pub trait ChunkTable {
    /// What can go wrong. After an error of `update` the table must not be used any more.
    type Error: std::fmt::Display;

    /// Calls `f` once with the chunk, or with `None` if nothing of it is mapped.
    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), Self::Error>;

    /// Calls `f` once with the chunk, an empty one if it does not exist, and keeps what `f` makes
    /// of it; a chunk that is empty afterwards is removed. Every change moves [`Chunk::applied`]: a
    /// chunk that says the same number afterwards may be taken for unchanged.
    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), Self::Error>;

    /// The first existing chunk at or after `from`, in the order of volume and index.
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, Self::Error>;

    /// The first existing chunk of a volume at or after `index`.
    fn next_of(&mut self, volume: VolumeId, index: u64) -> Result<Option<u64>, Self::Error> {
        let found = self.next(ChunkId { volume, index })?;
        Ok(found.filter(|id| id.volume == volume).map(|id| id.index))
    }
}

impl<T: ChunkTable + ?Sized> ChunkTable for Box<T> {
    type Error = T::Error;
    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), Self::Error> {
        (**self).read(id, f)
    }
    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), Self::Error> {
        (**self).update(id, f)
    }
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, Self::Error> {
        (**self).next(from)
    }
}

/// Chunks in memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemoryTable {
    chunks: std::collections::BTreeMap<ChunkId, Chunk>,
}

impl MemoryTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }
    /// Number of chunks.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }
    /// Whether there is no chunk.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

impl ChunkTable for MemoryTable {
    type Error = std::convert::Infallible;

    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), Self::Error> {
        f(self.chunks.get(&id));
        Ok(())
    }

    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), Self::Error> {
        let chunk = self.chunks.entry(id).or_default();
        f(chunk);
        if chunk.is_empty() {
            self.chunks.remove(&id);
        }
        Ok(())
    }

    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, Self::Error> {
        Ok(self.chunks.range(from..).next().map(|(id, _)| *id))
    }
}

/// Why an operation on the map failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError<E> {
    /// The table of chunks failed.
    #[error(transparent)]
    Table(E),
    /// The operation itself makes no sense; nothing was changed.
    #[error("malformed map operation: {0}")]
    Malformed(&'static str),
}

/// A part of a volume that is mapped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapExtent {
    /// The logical blocks.
    pub range: LblkRange,
    /// What they hold.
    pub state: ExtentState,
    /// Where the first of them lies.
    pub places: Places,
    /// The CRC-32C of each block; empty if the extent has none.
    pub crcs: Vec<u32>,
}

/// The mapped parts of `range`, in order; holes are left out. Physically contiguous neighbours are
/// one extent inside a chunk, never across two. Visits existing chunks only.
pub fn lookup<T: ChunkTable + ?Sized>(
    table: &mut T,
    volume: VolumeId,
    range: LblkRange,
) -> Result<Vec<MapExtent>, T::Error> {
    let mut found = Vec::new();
    visit(table, volume, range, |table, id, offset, len| {
        table.read(id, &mut |chunk| {
            let Some(chunk) = chunk else { return };
            found.extend(chunk.lookup(offset, len).map(|extent| map_extent(id, chunk, &extent)));
        })
    })?;
    Ok(found)
}

/// The parts of `range` that are not mapped, in order, merged across chunks.
pub fn holes<T: ChunkTable + ?Sized>(
    table: &mut T,
    volume: VolumeId,
    range: LblkRange,
) -> Result<Vec<LblkRange>, T::Error> {
    let mut holes = Vec::new();
    let mut at = range.start.0;
    visit(table, volume, range, |table, id, offset, len| {
        table.read(id, &mut |chunk| {
            for extent in chunk.into_iter().flat_map(|chunk| chunk.lookup(offset, len)) {
                let start = id.blocks().start.0 + u64::from(extent.offset);
                if at < start {
                    holes.push(LblkRange::new(at, start - at));
                }
                at = start + u64::from(extent.len);
            }
        })
    })?;
    if at < range.end() {
        holes.push(LblkRange::new(at, range.end() - at));
    }
    Ok(holes)
}

/// Maps `range` to `places` as *written*. `crcs` has one entry per block, or is empty for a volume
/// without checksums. What the range was mapped to before is freed, except copies that stay where
/// they are.
pub fn write<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
    places: Places,
    crcs: &[u32],
) -> Result<Change, MapError<T::Error>> {
    map(table, seq, volume, range, ExtentState::Written, places, crcs)
}

/// Maps `range` to `places` as *unwritten*: it reads as zeroes.
pub fn write_unwritten<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
    places: Places,
) -> Result<Change, MapError<T::Error>> {
    map(table, seq, volume, range, ExtentState::Unwritten, places, &[])
}

/// Unmaps `range`: it reads as zeroes and takes no space. Visits existing chunks only, so a whole
/// volume of any size is cheap if little of it is mapped.
pub fn unmap<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
) -> Result<Change, T::Error> {
    change_existing(table, seq, volume, range, Chunk::unmap)
}

/// Turns what is written in `range` into unwritten, on the blocks that it has: it reads as zeroes
/// and keeps its space. Holes stay holes; see [`holes`] for filling them.
pub fn zero<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
) -> Result<Change, T::Error> {
    change_existing(table, seq, volume, range, Chunk::zero)
}

/// Calls `f` with every mapped extent of every volume, in order. Used after recovery to find out
/// which physical blocks are in use and how many blocks each volume has.
pub fn for_each_extent<T: ChunkTable + ?Sized>(
    table: &mut T,
    mut f: impl FnMut(VolumeId, MapExtent),
) -> Result<(), T::Error> {
    let mut from = Some(ChunkId { volume: VolumeId(0), index: 0 });
    while let Some(start) = from {
        let Some(id) = table.next(start)? else { break };
        table.read(id, &mut |chunk| {
            let Some(chunk) = chunk else { return };
            for extent in chunk.extents() {
                f(id.volume, map_extent(id, chunk, extent));
            }
        })?;
        from = successor(id);
    }
    Ok(())
}

/// The id right after `id`; `None` at the very end.
pub fn successor(id: ChunkId) -> Option<ChunkId> {
    match id.index.checked_add(1) {
        Some(index) => Some(ChunkId { index, ..id }),
        None => Some(ChunkId { volume: VolumeId(id.volume.0.checked_add(1)?), index: 0 }),
    }
}

fn map_extent(id: ChunkId, chunk: &Chunk, extent: &crate::chunk::Extent) -> MapExtent {
    MapExtent {
        range: LblkRange::new(
            id.blocks().start.0 + u64::from(extent.offset),
            u64::from(extent.len),
        ),
        state: extent.state,
        places: extent.places,
        crcs: chunk.crcs(extent).to_vec(),
    }
}

fn map<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
    state: ExtentState,
    places: Places,
    crcs: &[u32],
) -> Result<Change, MapError<T::Error>> {
    if range.start.0.checked_add(range.len).is_none() {
        return Err(MapError::Malformed("the range ends beyond 2^64 blocks"));
    }
    if !crcs.is_empty() && crcs.len() as u64 != range.len {
        return Err(MapError::Malformed("one checksum per block is needed"));
    }
    if places.as_slice().is_empty() {
        return Err(MapError::Malformed("an extent needs at least one place"));
    }
    let mut total = Change::default();
    let mut at = range.start.0;
    while at < range.end() {
        let (id, offset, len) = part(volume, at, range.end());
        let done = at - range.start.0;
        let crcs = if crcs.is_empty() { crcs } else { &crcs[done as usize..][..usize::from(len)] };
        let updated = table.update(id, &mut |chunk| {
            if chunk.advance(seq) {
                total.absorb(chunk.map((offset, len), state, places.advanced(done), crcs));
            } else {
                total.skipped += 1;
            }
        });
        updated.map_err(MapError::Table)?;
        at += u64::from(len);
    }
    Ok(total)
}

fn change_existing<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: OpSeq,
    volume: VolumeId,
    range: LblkRange,
    mut change: impl FnMut(&mut Chunk, u16, u16) -> Change,
) -> Result<Change, T::Error> {
    let mut total = Change::default();
    visit(table, volume, range, |table, id, offset, len| {
        table.update(id, &mut |chunk| {
            if chunk.advance(seq) {
                total.absorb(change(chunk, offset, len));
            } else {
                total.skipped += 1;
            }
        })
    })?;
    Ok(total)
}

/// The chunk of block `at`, and the part of it that lies before `end`.
fn part(volume: VolumeId, at: u64, end: u64) -> (ChunkId, u16, u16) {
    let offset = at % CHUNK_BLOCKS;
    let len = (CHUNK_BLOCKS - offset).min(end - at);
    (ChunkId { volume, index: at / CHUNK_BLOCKS }, offset as u16, len as u16)
}

/// Calls `f` with each existing chunk of `range` and the part of it that the range covers.
fn visit<T: ChunkTable + ?Sized>(
    table: &mut T,
    volume: VolumeId,
    range: LblkRange,
    mut f: impl FnMut(&mut T, ChunkId, u16, u16) -> Result<(), T::Error>,
) -> Result<(), T::Error> {
    let mut at = range.start.0;
    while at < range.end() {
        let Some(index) = table.next_of(volume, at / CHUNK_BLOCKS)? else { break };
        at = at.max(index.saturating_mul(CHUNK_BLOCKS));
        if at >= range.end() {
            break;
        }
        let (id, offset, len) = part(volume, at, range.end());
        f(table, id, offset, len)?;
        at = at.saturating_add(u64::from(len));
    }
    Ok(())
}

/// The block's own chunk: for callers that touch single chunks.
pub fn chunk_of(volume: VolumeId, lblk: Lblk) -> ChunkId {
    ChunkId { volume, index: lblk.0 / CHUNK_BLOCKS }
}
