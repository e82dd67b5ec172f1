//! Which writes a failed flush has lost.
//!
//! After a failed `fdatasync` Linux marks the pages clean that it could not write: the next
//! `fdatasync` succeeds although the data is gone. So everything whose write began before a failed
//! flush returned, and that no earlier flush covers, is lost until it is written anew.
//!
//! # Invariants
//! * `failed-flush-stays-failed`: a write is reported durable only by a flush that succeeded, with no
//!   failed flush between the beginning of the write and that flush.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use endio_types::{Pblk, PblkRange};

use super::BlockDevice;

/// Names the time at which a write began. Compared by [`TrackedDevice::is_lost`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteTicket {
    failed_flushes: u64,
}

/// A device that remembers when a flush failed, and counts flushes.
#[derive(Clone)]
pub struct TrackedDevice {
    device: Arc<dyn BlockDevice>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    flushes: AtomicU64,
    failed_flushes: AtomicU64,
}

impl std::fmt::Debug for TrackedDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrackedDevice")
            .field("capacity_blocks", &self.device.capacity_blocks())
            .field("flushes", &self.flushes())
            .field("failed_flushes", &self.failed_flushes())
            .finish_non_exhaustive()
    }
}

impl TrackedDevice {
    /// Tracks `device`; nobody else may flush it.
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, counts: Arc::default() }
    }

    /// Number of blocks.
    pub fn capacity_blocks(&self) -> u64 {
        self.device.capacity_blocks()
    }

    /// Writes as [`BlockDevice::write_at`] does. The ticket tells later whether a failed flush took
    /// the data with it.
    ///
    /// # Errors
    /// Those of [`BlockDevice::write_at`].
    pub fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<WriteTicket> {
        let ticket =
            WriteTicket { failed_flushes: self.counts.failed_flushes.load(Ordering::SeqCst) };
        self.device.write_at(pblk, data)?;
        Ok(ticket)
    }

    /// Flushes as [`BlockDevice::flush`] does, and remembers a failure. Only one caller at a time.
    ///
    /// A write is durable if it returned before this call, this call succeeds, and the write's
    /// ticket [is not lost](Self::is_lost).
    ///
    /// # Errors
    /// Those of [`BlockDevice::flush`]; every ticket given out so far is lost then, unless an earlier
    /// flush has already covered it.
    pub fn flush(&self) -> io::Result<()> {
        let result = self.device.flush();
        match result {
            Ok(()) => self.counts.flushes.fetch_add(1, Ordering::SeqCst),
            // Counted after the flush returned: a write that ran beside it may have been part of it.
            Err(_) => self.counts.failed_flushes.fetch_add(1, Ordering::SeqCst),
        };
        result
    }

    /// Whether a flush failed since the write of that ticket began. The data must be written anew;
    /// no later flush makes it durable.
    pub fn is_lost(&self, ticket: WriteTicket) -> bool {
        ticket.failed_flushes != self.counts.failed_flushes.load(Ordering::SeqCst)
    }

    /// Reads as [`BlockDevice::read_at`] does.
    ///
    /// # Errors
    /// Those of [`BlockDevice::read_at`].
    pub fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        self.device.read_at(pblk, data)
    }

    /// Reads as [`BlockDevice::read_at_once`] does.
    ///
    /// # Errors
    /// Those of [`BlockDevice::read_at_once`].
    pub fn read_at_once(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<bool> {
        self.device.read_at_once(pblk, data)
    }

    /// Gives blocks back as [`BlockDevice::punch`] does.
    ///
    /// # Errors
    /// Those of [`BlockDevice::punch`].
    pub fn punch(&self, range: PblkRange) -> io::Result<()> {
        self.device.punch(range)
    }

    /// Blocks in use as [`BlockDevice::used_blocks`] counts them.
    ///
    /// # Errors
    /// Those of [`BlockDevice::used_blocks`].
    pub fn used_blocks(&self) -> io::Result<u64> {
        self.device.used_blocks()
    }

    /// Flushes that succeeded.
    pub fn flushes(&self) -> u64 {
        self.counts.flushes.load(Ordering::SeqCst)
    }

    /// Flushes that failed.
    pub fn failed_flushes(&self) -> u64 {
        self.counts.failed_flushes.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use endio_types::BLOCK_SIZE;

    use super::{super::memory::*, *};

    /// Scenario 75.
    #[test]
    fn a_later_flush_does_not_pretend_after_a_failed_one() {
        let memory = Arc::new(MemoryDevice::new(16));
        let device = TrackedDevice::new(memory.clone());
        let before = device.write_at(Pblk(1), &[1; BLOCK_SIZE]).unwrap();
        device.flush().unwrap();
        assert!(!device.is_lost(before));
        let during = device.write_at(Pblk(2), &[2; BLOCK_SIZE]).unwrap();
        memory.inject(DeviceFault::FlushError);
        device.flush().unwrap_err();
        let after = device.write_at(Pblk(3), &[3; BLOCK_SIZE]).unwrap();
        device.flush().unwrap();
        assert!(device.is_lost(during));
        assert!(!device.is_lost(after));
        assert_eq!((device.flushes(), device.failed_flushes()), (2, 1));

        memory.lose_power();
        let mut block = [0; BLOCK_SIZE];
        for (pblk, expected) in [(1, 1), (2, 0), (3, 3)] {
            device.read_at(Pblk(pblk), &mut block).unwrap();
            assert_eq!(block, [expected; BLOCK_SIZE], "block {pblk}");
        }
    }
}
