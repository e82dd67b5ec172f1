//! What is written: incompressible bytes, and blocks that can say what they should be.
//!
//! ```text
//!   0        8         16        24        28      4096
//!   ├ volume ┼ block   ┼ sequence┼ crc32c  ┼ filler ┤
//! ```
//! The checksum covers the block with its own field as zero. All numbers are little-endian.

use bytes::Bytes;
use endio_types::BLOCK_SIZE;

const CRC: std::ops::Range<usize> = 24..28;

/// A small generator of pseudo-random numbers (splitmix64): the same seed, the same run.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is at least 1.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // The high half of a product: no division, and a bias below 2^-40 for ends below 2^24.
        let wide = u128::from(self.next()) * u128::from(end);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

/// `length` incompressible bytes.
pub(crate) fn noise(dice: &mut Dice, length: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&dice.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// A number for a volume's name.
pub(crate) fn volume_number(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Blocks from `first_block` on that name themselves, over the filler.
pub(crate) fn stamp(filler: &Bytes, volume: u64, first_block: u64, sequence: u64) -> Bytes {
    let mut data = filler.to_vec();
    for (index, block) in data.chunks_exact_mut(BLOCK_SIZE).enumerate() {
        block[0..8].copy_from_slice(&volume.to_le_bytes());
        block[8..16].copy_from_slice(&(first_block + index as u64).to_le_bytes());
        block[16..24].copy_from_slice(&sequence.to_le_bytes());
        block[CRC].fill(0);
        let crc = crc32c::crc32c(block);
        block[CRC].copy_from_slice(&crc.to_le_bytes());
    }
    data.into()
}

/// What is wrong with one block that should be `sequence` of `block`; `None`: nothing.
pub(crate) fn fault(data: &[u8], volume: u64, block: u64, sequence: u64) -> Option<String> {
    let number = |at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(data.get(at..at + 8)?.try_into().ok()?))
    };
    let (Some(found_volume), Some(found_block), Some(found_sequence)) =
        (number(0), number(8), number(16))
    else {
        return Some(format!("block {block} is short"));
    };
    let crc = data.get(CRC).and_then(|crc| crc.try_into().ok()).map(u32::from_le_bytes);
    let zero = [0; 4];
    let rest = data.get(CRC.end..).unwrap_or_default();
    let sum = crc32c::crc32c_append(crc32c::crc32c(&data[..CRC.start]), &zero);
    let expected = crc32c::crc32c_append(sum, rest);
    if data.iter().all(|byte| *byte == 0) {
        return Some(format!("block {block} is zero instead of sequence {sequence}"));
    }
    if crc != Some(expected) {
        return Some(format!("block {block} is torn or foreign: its checksum does not match"));
    }
    if (found_volume, found_block) != (volume, block) {
        return Some(format!("block {block} holds block {found_block} of {found_volume:016x}"));
    }
    (found_sequence != sequence)
        .then(|| format!("block {block} holds sequence {found_sequence} instead of {sequence}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_stamped_block_is_accepted_only_where_it_belongs() {
        let filler = noise(&mut Dice::new(1), 2 * BLOCK_SIZE);
        let data = stamp(&filler, 7, 100, 5);
        let second = &data[BLOCK_SIZE..];
        assert_eq!(fault(second, 7, 101, 5), None);
        assert!(fault(second, 7, 100, 5).unwrap().contains("holds block 101"));
        assert!(fault(second, 8, 101, 5).unwrap().contains("holds block 101"));
        assert!(fault(second, 7, 101, 6).unwrap().contains("holds sequence 5"));
        assert!(fault(&[0; BLOCK_SIZE], 7, 101, 6).unwrap().contains("is zero"));
        assert!(fault(&data[..10], 7, 100, 5).unwrap().contains("short"));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found() {
        let data = stamp(&noise(&mut Dice::new(2), BLOCK_SIZE), 7, 0, 1);
        for at in (0..BLOCK_SIZE).step_by(97).chain(0..32) {
            let mut broken = data.to_vec();
            broken[at] ^= 0x10;
            assert!(fault(&broken, 7, 0, 1).is_some(), "byte {at}");
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_numbers_within_bounds() {
        let (mut a, mut b) = (Dice::new(3), Dice::new(3));
        let numbers: Vec<u64> = (0..1000).map(|_| a.below(10)).collect();
        assert!(numbers.iter().all(|n| *n < 10 && *n == b.below(10)));
        assert!((0..10).all(|n| numbers.contains(&n)));
        assert_eq!(a.below(1), 0);
    }
}
