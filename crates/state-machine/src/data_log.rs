//! The data log: blocks of small flushes, durable here until they are converted.
//!
//! A flush of a few blocks would wait for a store, its disk and a conversion. Instead the data goes
//! into the journal with one record, the flush is answered, and the write-out comes later, with
//! others. What ZFS's intent log is to a pool, this is to a volume. It is read only by who opens the
//! volume next: its owner has the data in memory.
//!
//! # Invariants
//! * Of each block the log has the newest version that it was given, until this or a newer one is
//!   converted. Messages carry numbers for that: what comes behind a later one is not taken.

use std::collections::BTreeMap;

use bytes::Bytes;
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk, LblkRange, VolumeId};
use serde::{Deserialize, Serialize};

/// A block in a message to the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogEntry {
    /// The block.
    pub lblk: Lblk,
    /// Where the volume's data ends, in bytes, as far as this block shows.
    pub end_bytes: u64,
    /// CRC-32C of its data.
    pub crc: u32,
    /// Of two versions under one generation the newer one has the larger stamp. Means nothing here.
    pub stamp: u64,
}

/// A block in the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Logged {
    /// Number of the message that brought it.
    pub number: u64,
    /// Under which it was written.
    pub generation: Generation,
    /// See [`LogEntry::end_bytes`].
    pub end_bytes: u64,
    /// See [`LogEntry::crc`].
    pub crc: u32,
    /// See [`LogEntry::stamp`].
    pub stamp: u64,
    /// 4096 bytes.
    pub data: Bytes,
}

type Blocks = BTreeMap<u64, Logged>;

/// The logs of all volumes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DataLogs {
    /// None of them is empty.
    volumes: BTreeMap<VolumeId, Blocks>,
    blocks: u64,
}

impl DataLogs {
    /// Whether no volume has anything in the log.
    pub fn is_empty(&self) -> bool {
        self.volumes.is_empty()
    }

    /// Blocks of all volumes.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks of one volume.
    pub fn blocks_of(&self, volume: VolumeId) -> u64 {
        self.volumes.get(&volume).map_or(0, |blocks| blocks.len() as u64)
    }

    /// Newest number of a volume's entries; 0: there are none. Linear in their number.
    pub fn newest(&self, volume: VolumeId) -> u64 {
        let blocks = self.volumes.get(&volume).into_iter().flatten();
        blocks.map(|(_, logged)| logged.number).max().unwrap_or(0)
    }

    /// Entries of a volume from a block on.
    pub fn from(
        &self,
        volume: VolumeId,
        first: Lblk,
    ) -> impl Iterator<Item = (Lblk, &Logged)> + '_ {
        let blocks = self.volumes.get(&volume).into_iter();
        let from = blocks.flat_map(move |blocks| blocks.range(first.0..));
        from.map(|(lblk, logged)| (Lblk(*lblk), logged))
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (VolumeId, Lblk, &Logged)> + '_ {
        let all = self.volumes.iter();
        all.flat_map(|(id, blocks)| blocks.iter().map(|(lblk, l)| (*id, Lblk(*lblk), l)))
    }

    /// Whether there is an entry of the range with a number up to `up_to`.
    pub fn has(&self, volume: VolumeId, range: LblkRange, up_to: u64) -> bool {
        let Some(blocks) = self.volumes.get(&volume) else { return false };
        blocks.range(range.start.0..range.end()).any(|(_, logged)| logged.number <= up_to)
    }

    /// Takes a message; a block that is there already is replaced.
    ///
    /// # Errors
    /// There is not one block of data for each entry.
    pub fn put(
        &mut self,
        volume: VolumeId,
        (generation, number): (Generation, u64),
        entries: &[LogEntry],
        data: &Bytes,
    ) -> Result<(), &'static str> {
        if data.len() != entries.len() * BLOCK_SIZE {
            return Err("logged blocks and their data differ in number");
        }
        if entries.is_empty() {
            return Ok(());
        }
        let blocks = self.volumes.entry(volume).or_default();
        for (entry, data) in entries.iter().zip(data.chunks_exact(BLOCK_SIZE)) {
            let LogEntry { lblk, end_bytes, crc, stamp } = *entry;
            // A copy: a slice would keep the whole message in memory.
            let data = Bytes::copy_from_slice(data);
            let logged = Logged { number, generation, end_bytes, crc, stamp, data };
            let before = blocks.insert(lblk.0, logged);
            self.blocks += u64::from(before.is_none());
        }
        Ok(())
    }

    /// Forgets the entries of a range up to a number. Idempotent.
    pub fn forget(&mut self, volume: VolumeId, range: LblkRange, up_to: u64) {
        self.change(volume, |blocks| {
            let gone = blocks.range(range.start.0..range.end());
            let gone = gone.filter(|(_, logged)| logged.number <= up_to);
            let gone: Vec<u64> = gone.map(|(lblk, _)| *lblk).collect();
            for lblk in gone {
                blocks.remove(&lblk);
            }
        });
    }

    /// Whether [`Self::cut`] would change something.
    pub fn reaches_behind(&self, volume: VolumeId, size_bytes: u64) -> bool {
        let mut behind = self.from(volume, Lblk(size_bytes / BLOCK_BYTES));
        let end = size_bytes.div_ceil(BLOCK_BYTES);
        behind.any(|(lblk, logged)| lblk.0 >= end || logged.end_bytes > size_bytes)
    }

    /// The volume ends here now, in bytes: nothing that is logged lies behind it.
    pub fn cut(&mut self, volume: VolumeId, size_bytes: u64) {
        self.change(volume, |blocks| {
            blocks.split_off(&size_bytes.div_ceil(BLOCK_BYTES));
            for logged in blocks.values_mut() {
                logged.end_bytes = logged.end_bytes.min(size_bytes);
            }
        });
    }

    fn change(&mut self, volume: VolumeId, change: impl FnOnce(&mut Blocks)) {
        let Some(blocks) = self.volumes.get_mut(&volume) else { return };
        let before = blocks.len() as u64;
        change(blocks);
        let after = blocks.len() as u64;
        self.blocks = (self.blocks + after).saturating_sub(before);
        if after == 0 {
            self.volumes.remove(&volume);
        }
    }
}
