//! What a block holds in the simulation: four cells that name themselves.
//!
//! A cell stands for 1024 bytes and is one number: which write of which volume put it where. Where
//! the real code wants bytes (the cache log, a block device) the block is spread over 4096 of them.

use endio_testkit::pattern::Cell;
use endio_types::BLOCK_SIZE;

/// Cells in a block.
pub const CELLS: u64 = 4;
/// Bytes that a cell stands for.
pub const CELL_BYTES: u64 = BLOCK_SIZE as u64 / CELLS;
/// A block.
pub type Block = [u64; CELLS as usize];
/// Zeroes.
pub const ZEROES: Block = [0; CELLS as usize];

/// The number of a cell: eight bits tag, sixteen cell, forty sequence.
pub fn cell(tag: u64, at: u64, sequence: u64) -> u64 {
    (tag << 56) | (at << 40) | sequence
}

/// What a number says of itself.
pub fn parse(number: u64) -> Cell {
    match number {
        0 => Cell::Zero,
        _ => Cell::Written {
            tag: number >> 56,
            cell: (number >> 40) & 0xffff,
            sequence: number & 0xff_ffff_ffff,
        },
    }
}

/// The checksum of a block.
pub fn crc(block: &Block) -> u32 {
    block.iter().fold(0, |crc, cell| crc32c::crc32c_append(crc, &cell.to_le_bytes()))
}

/// The checksums of blocks.
pub fn crcs(blocks: &[Block]) -> Vec<u32> {
    blocks.iter().map(crc).collect()
}

/// Blocks as bytes.
pub fn to_bytes(blocks: &[Block]) -> Vec<u8> {
    let mut bytes = vec![0; blocks.len() * BLOCK_SIZE];
    for (block, bytes) in blocks.iter().zip(bytes.chunks_exact_mut(BLOCK_SIZE)) {
        for (cell, bytes) in block.iter().zip(bytes.chunks_exact_mut(CELL_BYTES as usize)) {
            bytes[..8].copy_from_slice(&cell.to_le_bytes());
        }
    }
    bytes
}

/// Bytes as blocks.
pub fn from_bytes(bytes: &[u8]) -> Vec<Block> {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let block = |bytes: &[u8]| {
        let mut block = ZEROES;
        for (cell, bytes) in block.iter_mut().zip(bytes.chunks_exact(CELL_BYTES as usize)) {
            *cell = word(bytes);
        }
        block
    };
    bytes.chunks_exact(BLOCK_SIZE).map(block).collect()
}
