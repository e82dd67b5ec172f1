//! Blocks that name themselves, so that a foreign, stale or torn one can be told apart.
//!
//! A *cell* is the unit a test writes in: a whole block of 4096 bytes, or a 512-byte piece of one
//! for writes that are not aligned. Layout, little-endian:
//!
//! ```text
//!  0        8        16       24        32                       n-8      n
//!  | magic  | tag    | cell   | sequence | words mixed from all   | crc32c |
//! ```
//!
//! The words in the middle depend on everything before them and on their own position: a cell
//! that is put together from two writes fails its checksum, and the error names both halves.

use std::fmt;

use crate::seed::mix;

/// First eight bytes of a written cell.
pub const MAGIC: [u8; 8] = *b"ENDIOBLK";
/// Smallest cell: header, one word, checksum.
pub const CELL_BYTES_MIN: usize = 64;
const HEADER: usize = 32;

/// What a cell says about itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Cell {
    /// Zeroes from end to end: never written, or trimmed.
    Zero,
    /// Written by the write of that number.
    Written {
        /// Tag of the volume.
        tag: u64,
        /// Number of the cell inside the volume.
        cell: u64,
        /// Number of the write.
        sequence: u64,
    },
}

/// A cell that nobody can have written as a whole.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadCell {
    /// Neither zeroes nor the magic at the start.
    #[error("no magic, begins with {begins:02x?}; first byte that is not zero at {first_nonzero}")]
    NoMagic {
        /// First bytes.
        begins: Vec<u8>,
        /// Position of the first byte that is not zero.
        first_nonzero: usize,
    },
    /// The header of one write and the body of something else.
    #[error("torn: header of {header}, but bytes from {differs_at} on are not of that write")]
    Torn {
        /// What the header says.
        header: Header,
        /// First byte that differs from what this write puts there.
        differs_at: usize,
    },
}

/// The header of a cell, unverified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Tag of the volume.
    pub tag: u64,
    /// Number of the cell.
    pub cell: u64,
    /// Number of the write.
    pub sequence: u64,
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "write {} to cell {} of volume {:#x}", self.sequence, self.cell, self.tag)
    }
}

/// Fills a whole cell. `buffer` is at least [`CELL_BYTES_MIN`] long and a multiple of 8.
pub fn fill(buffer: &mut [u8], tag: u64, cell: u64, sequence: u64) {
    assert!(buffer.len() >= CELL_BYTES_MIN && buffer.len().is_multiple_of(8), "a whole cell");
    let end = buffer.len() - 8;
    buffer[..8].copy_from_slice(&MAGIC);
    buffer[8..16].copy_from_slice(&tag.to_le_bytes());
    buffer[16..24].copy_from_slice(&cell.to_le_bytes());
    buffer[24..32].copy_from_slice(&sequence.to_le_bytes());
    let base = mix(tag ^ mix(cell ^ mix(sequence)));
    for (position, word) in buffer[HEADER..end].chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(base.wrapping_add(position as u64)).to_le_bytes());
    }
    let sum = u64::from(crc32c::crc32c(&buffer[..end]));
    buffer[end..].copy_from_slice(&sum.to_le_bytes());
}

/// `cells` consecutive cells of one write, from cell number `first` on.
pub fn cells(cell_bytes: usize, tag: u64, first: u64, cells: u64, sequence: u64) -> Vec<u8> {
    let mut data = vec![0; cell_bytes * usize::try_from(cells).expect("fits in memory")];
    for (cell, buffer) in (first..).zip(data.chunks_exact_mut(cell_bytes)) {
        fill(buffer, tag, cell, sequence);
    }
    data
}

/// Reads a cell and verifies every byte of it.
///
/// # Errors
/// [`BadCell`] if no single write, and no zeroing, can have left these bytes.
pub fn parse(buffer: &[u8]) -> Result<Cell, BadCell> {
    let Some(first_nonzero) = buffer.iter().position(|byte| *byte != 0) else {
        return Ok(Cell::Zero);
    };
    if buffer.len() < CELL_BYTES_MIN || buffer[..8] != MAGIC {
        let begins = buffer.iter().copied().take(16).collect();
        return Err(BadCell::NoMagic { begins, first_nonzero });
    }
    let word = |at: usize| {
        u64::from_le_bytes(buffer[at..at + 8].try_into().expect("the slice has eight bytes"))
    };
    let header = Header { tag: word(8), cell: word(16), sequence: word(24) };
    let mut expected = vec![0; buffer.len()];
    fill(&mut expected, header.tag, header.cell, header.sequence);
    match expected.iter().zip(buffer).position(|(expected, found)| expected != found) {
        None => Ok(Cell::Written { tag: header.tag, cell: header.cell, sequence: header.sequence }),
        Some(differs_at) => Err(BadCell::Torn { header, differs_at }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_cell_names_itself_whatever_its_size() {
        for size in [64, 512, 4096] {
            let data = cells(size, 9, 4, 2, 77);
            let found: Vec<Cell> = data.chunks(size).map(|cell| parse(cell).unwrap()).collect();
            assert_eq!(found[0], Cell::Written { tag: 9, cell: 4, sequence: 77 });
            assert_eq!(found[1], Cell::Written { tag: 9, cell: 5, sequence: 77 });
        }
    }

    #[test]
    fn zeroes_are_a_cell_that_was_never_written() {
        assert_eq!(parse(&[0; 4096]), Ok(Cell::Zero));
    }

    #[test]
    fn any_single_flipped_bit_is_found() {
        let good = cells(512, 1, 2, 1, 3);
        for bit in 0..512 * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_cell_of_two_writes_is_torn_and_says_where() {
        let mut torn = cells(4096, 1, 2, 1, 3);
        torn[1024..].copy_from_slice(&cells(4096, 1, 2, 1, 4)[1024..]);
        let BadCell::Torn { header, differs_at } = parse(&torn).unwrap_err() else {
            panic!("not torn")
        };
        assert_eq!((header.sequence, differs_at), (3, 1024));
        let mut tail_only = vec![0; 4096];
        tail_only[2048..].copy_from_slice(&torn[2048..]);
        let error = parse(&tail_only).unwrap_err();
        assert!(matches!(error, BadCell::NoMagic { first_nonzero: 2048, .. }), "{error}");
    }
}
