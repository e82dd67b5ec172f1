//! Who a block-store is: identity, incarnation and capacity, in two copies.
//!
//! ```text
//!   offset 0     4096
//!   ┌───────────┬───────────┐   slot: magic 8 │ version u32 │ sequence u64 │ uuid 16 │
//!   │  slot 0   │  slot 1   │         incarnation u64 │ capacity_blocks u64 │ CRC-32C u32
//!   └───────────┴───────────┘   little-endian, rest of the 4096 bytes zero
//! ```
//!
//! # Invariants
//! * `incarnation-never-repeats`: a new incarnation is durable in *both* slots before anybody hears
//!   of it. Slots are written one after the other, each synced before the next, so a torn write spoils
//!   one slot at most. When only one slot can be read, the lost one may have been one incarnation
//!   ahead, so the next incarnation skips one.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use endio_types::Incarnation;

const MAGIC: [u8; 8] = *b"endio-sb";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 4096;
const FIELDS_BYTES: usize = 8 + 4 + 8 + 16 + 8 + 8;

/// Identity and size of a block-store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Grows with each write of the superblock.
    pub sequence: u64,
    /// Identity; random, fixed when the store is made.
    pub uuid: [u8; 16],
    /// Grows with each start.
    pub incarnation: Incarnation,
    /// Size in blocks. Grows only.
    pub capacity_blocks: u64,
}

/// Why a superblock could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// Neither copy passes its checksum.
    #[error(
        "both copies of the superblock are damaged; the store's identity is lost. Restore the file \
         `superblock` from a backup, or remove the whole data directory to begin as a new store"
    )]
    BothDamaged,
    /// Two good copies that cannot belong together.
    #[error(
        "the two copies of the superblock name different stores ({} and {}): the file was put \
         together from two",
        hex(.0), hex(.1)
    )]
    TwoStores([u8; 16], [u8; 16]),
    /// Written by a later version of this program.
    #[error("the superblock has version {0}; this program knows version {VERSION}")]
    UnknownVersion(u32),
    /// A counter is at its end.
    #[error("the incarnation counter is used up")]
    Exhausted,
    /// The file could not be read or written.
    #[error("cannot access the superblock")]
    Io(#[from] io::Error),
}

fn hex(bytes: &[u8; 16]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(32), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What was found in the two slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Recovered {
    pub(super) superblock: Superblock,
    /// One slot could not be read.
    pub(super) is_one_slot_damaged: bool,
}

impl Superblock {
    /// The identity as 32 hexadecimal digits.
    pub fn uuid_hex(&self) -> String {
        hex(&self.uuid)
    }

    fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            slot[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.sequence.to_le_bytes());
        put(&self.uuid);
        put(&self.incarnation.0.to_le_bytes());
        put(&self.capacity_blocks.to_le_bytes());
        let crc = crc32c::crc32c(&slot[..FIELDS_BYTES]);
        slot[FIELDS_BYTES..FIELDS_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        slot
    }

    /// `Ok(None)`: damaged.
    fn decode(slot: &[u8]) -> Result<Option<Self>, SuperblockError> {
        let mut rest = slot;
        let Some(fields) = slot.get(..FIELDS_BYTES) else { return Ok(None) };
        let (Some(magic), Some(version)) = (take::<8>(&mut rest), take::<4>(&mut rest)) else {
            return Ok(None);
        };
        let (Some(sequence), Some(uuid)) = (take::<8>(&mut rest), take::<16>(&mut rest)) else {
            return Ok(None);
        };
        let (Some(incarnation), Some(capacity)) = (take::<8>(&mut rest), take::<8>(&mut rest))
        else {
            return Ok(None);
        };
        let Some(crc) = take::<4>(&mut rest) else { return Ok(None) };
        if magic != MAGIC || u32::from_le_bytes(crc) != crc32c::crc32c(fields) {
            return Ok(None);
        }
        match u32::from_le_bytes(version) {
            VERSION => Ok(Some(Self {
                sequence: u64::from_le_bytes(sequence),
                uuid,
                incarnation: Incarnation(u64::from_le_bytes(incarnation)),
                capacity_blocks: u64::from_le_bytes(capacity),
            })),
            version => Err(SuperblockError::UnknownVersion(version)),
        }
    }

    /// Reads both slots and returns the newer good one.
    pub(super) fn read(file: &File) -> Result<Recovered, SuperblockError> {
        let mut good = Vec::with_capacity(2);
        for slot in 0..2 {
            let mut bytes = Vec::with_capacity(SLOT_BYTES);
            read_up_to(file, &mut bytes, slot * SLOT_BYTES as u64)?;
            good.extend(Self::decode(&bytes)?);
        }
        match good.as_slice() {
            [] => Err(SuperblockError::BothDamaged),
            [only] => Ok(Recovered { superblock: *only, is_one_slot_damaged: true }),
            [first, second, ..] if first.uuid != second.uuid => {
                Err(SuperblockError::TwoStores(first.uuid, second.uuid))
            }
            [first, second, ..] => {
                let newer = if second.sequence > first.sequence { second } else { first };
                Ok(Recovered { superblock: *newer, is_one_slot_damaged: false })
            }
        }
    }

    /// Writes both slots, one after the other, each durable before the next; the slot that holds
    /// the older copy first.
    pub(super) fn write(&mut self, file: &File) -> Result<(), SuperblockError> {
        for _ in 0..2 {
            self.sequence = self.sequence.checked_add(1).ok_or(SuperblockError::Exhausted)?;
            file.write_all_at(&self.encode(), self.sequence % 2 * SLOT_BYTES as u64)?;
            file.sync_data()?;
            endio_failpoints::reach(endio_failpoints::Point::StoreSuperblockSlot);
        }
        Ok(())
    }
}

impl Recovered {
    /// The superblock of the next start.
    pub(super) fn next_start(&self, capacity_blocks: u64) -> Result<Superblock, SuperblockError> {
        let step = if self.is_one_slot_damaged { 2 } else { 1 };
        let last = self.superblock;
        let incarnation = last.incarnation.0.checked_add(step).ok_or(SuperblockError::Exhausted)?;
        // The slot of `sequence` is the good one, so the next write hits the other first: at every
        // moment at least one slot is whole.
        Ok(Superblock { incarnation: Incarnation(incarnation), capacity_blocks, ..last })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

/// Reads one slot; a file that ends early yields fewer bytes.
fn read_up_to(file: &File, bytes: &mut Vec<u8>, offset: u64) -> io::Result<()> {
    bytes.resize(SLOT_BYTES, 0);
    let mut filled = 0;
    while filled < SLOT_BYTES {
        match file.read_at(&mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn written(times: u32) -> (File, Superblock) {
        let file = tempfile::tempfile().unwrap();
        let mut superblock = Superblock {
            sequence: 0,
            uuid: [7; 16],
            incarnation: Incarnation(0),
            capacity_blocks: 10,
        };
        for _ in 0..times {
            superblock.incarnation.0 += 1;
            superblock.write(&file).unwrap();
        }
        (file, superblock)
    }

    #[test]
    fn both_slots_hold_the_same_incarnation_after_a_start() {
        let (file, superblock) = written(3);
        let found = Superblock::read(&file).unwrap();
        assert_eq!(found, Recovered { superblock, is_one_slot_damaged: false });
        assert_eq!(found.next_start(10).unwrap().incarnation, Incarnation(4));
    }

    /// Scenario 77.
    #[test]
    fn one_torn_slot_is_recovered_from_the_other_and_no_incarnation_repeats() {
        for slot in 0..2 {
            let (file, superblock) = written(3);
            file.write_all_at(&[0xff; 100], slot * SLOT_BYTES as u64).unwrap();
            let found = Superblock::read(&file).unwrap();
            assert!(found.is_one_slot_damaged);
            assert_eq!(found.superblock.uuid, superblock.uuid);
            assert!(found.next_start(10).unwrap().incarnation > superblock.incarnation);
        }
    }

    /// Scenario 77.
    #[test]
    fn a_truncated_file_is_recovered_or_refused_never_guessed() {
        let (file, superblock) = written(2);
        file.set_len(SLOT_BYTES as u64 + 3).unwrap();
        let found = Superblock::read(&file).unwrap();
        assert_eq!(found.superblock.uuid, superblock.uuid);
        for length in [SLOT_BYTES as u64 / 100, 0] {
            file.set_len(length).unwrap();
            assert!(matches!(Superblock::read(&file), Err(SuperblockError::BothDamaged)));
        }
    }

    #[test]
    fn a_superblock_of_a_later_version_and_one_of_two_stores_are_refused() {
        let (file, superblock) = written(1);
        let mut slot = superblock.encode();
        slot[8..12].copy_from_slice(&2_u32.to_le_bytes());
        let crc = crc32c::crc32c(&slot[..FIELDS_BYTES]).to_le_bytes();
        slot[FIELDS_BYTES..FIELDS_BYTES + 4].copy_from_slice(&crc);
        file.write_all_at(&slot, 0).unwrap();
        assert!(matches!(Superblock::read(&file), Err(SuperblockError::UnknownVersion(2))));
        let other = Superblock { uuid: [8; 16], ..superblock };
        file.write_all_at(&other.encode(), 0).unwrap();
        assert!(matches!(Superblock::read(&file), Err(SuperblockError::TwoStores(..))));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_never_changes_what_is_read(bit in 0..2 * 8 * SLOT_BYTES) {
            let (file, superblock) = written(2);
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit as u64 / 8).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit as u64 / 8).unwrap();
            let found = Superblock::read(&file).unwrap();
            prop_assert_eq!(found.superblock.incarnation, superblock.incarnation);
            prop_assert_eq!(found.superblock.uuid, superblock.uuid);
        }

        #[test]
        fn random_bytes_are_damage_and_not_a_superblock(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(matches!(Superblock::decode(&bytes), Ok(None)));
        }
    }
}
