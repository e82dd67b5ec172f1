//! Chunks as bytes.
//!
//! ```text
//! version u8 │ crc32c u32 │ applied.record, applied.op, number of extents │ extents │ checksums
//! extent:   gap to the end of the one before, length, flags u8, then (store, pblk) of each copy
//! flags:    bits 0-1 number of copies, bit 2 written, bit 3 checksummed
//! ```
//!
//! Numbers without a width are LEB128. The checksum covers everything after itself and the id of
//! the chunk, so a chunk that turns up under another key is refused. Checksums of blocks stand at
//! the end, 4 bytes each, for the checksummed extents in order.
//!
//! The longest chunk is 1024 extents of one block in three copies: 50 bytes each, 4 for the
//! checksum, and a header of at most 22 bytes: 55,318 bytes, below the 64 KiB that sled likes.

use endio_types::{Pblk, StoreId};

use crate::chunk::{CHUNK_LEN, Chunk, ChunkId, Extent, ExtentState, OpSeq, Place, Places};

const VERSION: u8 = 1;
const HEADER: usize = 5;
const COPIES_MASK: u8 = 0b0011;
const WRITTEN: u8 = 0b0100;
const CHECKSUMMED: u8 = 0b1000;

/// Longest encoding of a chunk, in bytes.
pub const CHUNK_BYTES_MAX: usize = 55_318;

/// Why bytes are not a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChunkError {
    /// A later version wrote it.
    #[error("version {0} of the encoding is not known")]
    Version(u8),
    /// The bytes changed since they were written, or belong to another chunk.
    #[error("checksum mismatch")]
    Checksum,
    /// It ends too early or goes on too long.
    #[error("wrong length")]
    Length,
    /// It says something that no chunk can say.
    #[error("impossible extent")]
    Extent,
}

fn checksum(id: ChunkId, body: &[u8]) -> u32 {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&id.volume.0.to_le_bytes());
    key[8..].copy_from_slice(&id.index.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&key), body)
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, ChunkError> {
        let (first, rest) = self.0.split_first().ok_or(ChunkError::Length)?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, ChunkError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(ChunkError::Extent);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ChunkError::Extent)
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Result<T, ChunkError> {
        T::try_from(self.number()?).map_err(|_| ChunkError::Extent)
    }

    fn extent(&mut self, before: u16) -> Result<Extent, ChunkError> {
        let gap: u16 = self.small()?;
        let len: u16 = self.small()?;
        let flags = self.byte()?;
        let offset = before.checked_add(gap).ok_or(ChunkError::Extent)?;
        let end = offset.checked_add(len).ok_or(ChunkError::Extent)?;
        let state =
            if flags & WRITTEN == 0 { ExtentState::Unwritten } else { ExtentState::Written };
        let checksummed = flags & CHECKSUMMED != 0;
        let unknown = flags & !(COPIES_MASK | WRITTEN | CHECKSUMMED) != 0;
        if len == 0 || end > CHUNK_LEN || unknown {
            return Err(ChunkError::Extent);
        }
        if checksummed && state == ExtentState::Unwritten {
            return Err(ChunkError::Extent);
        }
        let mut copies = [Place::default(); COPIES_MASK as usize];
        let count = usize::from(flags & COPIES_MASK);
        for copy in &mut copies[..count] {
            let store = StoreId(self.small()?);
            let pblk = Pblk(self.number()?);
            pblk.0.checked_add(u64::from(len)).ok_or(ChunkError::Extent)?;
            *copy = Place { store, pblk };
        }
        let places = Places::new(&copies[..count]).ok_or(ChunkError::Extent)?;
        Ok(Extent { offset, len, state, checksummed, places })
    }
}

impl Chunk {
    /// The chunk as bytes, at most [`CHUNK_BYTES_MAX`], bound to `id`.
    pub fn encode(&self, id: ChunkId) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.extents.len() * 16);
        out.push(VERSION);
        out.extend_from_slice(&[0; 4]);
        put(&mut out, self.applied.record);
        put(&mut out, u64::from(self.applied.op));
        put(&mut out, self.extents.len() as u64);
        let mut at = 0;
        for extent in &self.extents {
            put(&mut out, u64::from(extent.offset - at));
            put(&mut out, u64::from(extent.len));
            let copies = extent.places.as_slice();
            let mut flags = copies.len() as u8;
            if extent.state == ExtentState::Written {
                flags |= WRITTEN;
            }
            if extent.checksummed {
                flags |= CHECKSUMMED;
            }
            out.push(flags);
            for copy in copies {
                put(&mut out, u64::from(copy.store.0));
                put(&mut out, copy.pblk.0);
            }
            at = extent.end();
        }
        for extent in &self.extents {
            for crc in self.crcs(extent) {
                out.extend_from_slice(&crc.to_le_bytes());
            }
        }
        let crc = checksum(id, &out[HEADER..]);
        out[1..HEADER].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The chunk `id` from its bytes. Any bytes are safe to give.
    ///
    /// # Errors
    /// Everything that [`Self::encode`] did not write for this id.
    pub fn decode(id: ChunkId, bytes: &[u8]) -> Result<Self, ChunkError> {
        let (header, body) = bytes.split_at_checked(HEADER).ok_or(ChunkError::Length)?;
        if header[0] != VERSION {
            return Err(ChunkError::Version(header[0]));
        }
        if header[1..] != checksum(id, body).to_le_bytes() {
            return Err(ChunkError::Checksum);
        }
        let mut reader = Reader(body);
        let applied = OpSeq { record: reader.number()?, op: reader.small()? };
        let count: u16 = reader.small()?;
        if count > CHUNK_LEN {
            return Err(ChunkError::Extent);
        }
        let mut extents = Vec::with_capacity(usize::from(count));
        let mut at = 0;
        for _ in 0..count {
            let extent = reader.extent(at)?;
            at = extent.end();
            extents.push(extent);
        }
        let crcs = decode_crcs(&extents, reader.0)?;
        Ok(Self { extents, crcs, applied })
    }
}

fn decode_crcs(extents: &[Extent], bytes: &[u8]) -> Result<Option<Box<[u32]>>, ChunkError> {
    let (words, rest) = bytes.as_chunks::<4>();
    let covered = extents.iter().filter(|e| e.checksummed).map(|e| usize::from(e.len));
    if !rest.is_empty() || covered.sum::<usize>() != words.len() {
        return Err(ChunkError::Length);
    }
    if words.is_empty() {
        return Ok(None);
    }
    let mut crcs = vec![0; usize::from(CHUNK_LEN)].into_boxed_slice();
    let mut words = words.iter();
    for extent in extents.iter().filter(|extent| extent.checksummed) {
        let blocks = &mut crcs[usize::from(extent.offset)..usize::from(extent.end())];
        for (crc, word) in blocks.iter_mut().zip(&mut words) {
            *crc = u32::from_le_bytes(*word);
        }
    }
    Ok(Some(crcs))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use endio_types::VolumeId;
    use proptest::prelude::*;

    use super::*;

    const ID: ChunkId = ChunkId { volume: VolumeId(7), index: 3 };

    fn worst() -> Chunk {
        let mut chunk = Chunk { applied: OpSeq::new(u64::MAX, u32::MAX), ..Chunk::default() };
        for offset in 0..CHUNK_LEN {
            // Descending, so that no two neighbours merge.
            let place = Place {
                store: StoreId(u32::MAX),
                pblk: Pblk(u64::MAX - 2 - u64::from(offset) * 2),
            };
            let places = Places::new(&[place; 3]).unwrap();
            chunk.map((offset, 1), ExtentState::Written, places, &[u32::from(offset)]);
        }
        chunk
    }

    #[test]
    fn the_longest_chunk_stays_below_64_kib_and_survives() {
        let chunk = worst();
        assert_eq!(chunk.extents().len(), 1024);
        let bytes = chunk.encode(ID);
        assert!(bytes.len() <= CHUNK_BYTES_MAX, "{}", bytes.len());
        assert_eq!(Chunk::decode(ID, &bytes), Ok(chunk));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut chunk = Chunk::default();
        let places = Places::single(StoreId(1), Pblk(500));
        chunk.map((3, 4), ExtentState::Written, places, &[1, 2, 3, 4]);
        let bytes = chunk.encode(ID);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Chunk::decode(ID, &bad).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Chunk::decode(ID, &bytes[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn a_chunk_under_another_id_is_refused() {
        let bytes = worst().encode(ID);
        let other = ChunkId { index: 4, ..ID };
        assert_eq!(Chunk::decode(other, &bytes), Err(ChunkError::Checksum));
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(
            body in proptest::collection::vec(any::<u8>(), 0..200), small in any::<bool>()
        ) {
            // With a right checksum, so that the parser behind it is reached.
            let body: Vec<u8> =
                if small { body.iter().map(|byte| byte & 0x0f).collect() } else { body };
            let mut bytes = vec![VERSION];
            bytes.extend_from_slice(&checksum(ID, &body).to_le_bytes());
            bytes.extend_from_slice(&body);
            if let Ok(chunk) = Chunk::decode(ID, &bytes) {
                let again = Chunk::decode(ID, &chunk.encode(ID));
                prop_assert_eq!(again, Ok(chunk));
            }
            let _ = Chunk::decode(ID, &body);
        }
    }
}
