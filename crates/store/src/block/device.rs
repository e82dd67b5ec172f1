//! What a block-store asks of its disk.

use std::io;

use endio_types::{Pblk, PblkRange};

/// Blocks that can be written, read, made durable and given back.
///
/// All methods may be called from several threads at once. They block the calling thread; none of
/// them waits for anything but the device.
pub trait BlockDevice: Send + Sync + 'static {
    /// Number of blocks. Constant while the device is open.
    fn capacity_blocks(&self) -> u64;

    /// Writes `data`, a whole number of blocks, from block `pblk` on. Not durable before a
    /// [`flush`](Self::flush) that began after this call returned. Idempotent.
    ///
    /// # Errors
    /// The device's error; how much of `data` was written is then unknown. `InvalidInput` for a
    /// range beyond the capacity or a length that is no whole number of blocks.
    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()>;

    /// Fills `data`, a whole number of blocks, from block `pblk` on. Blocks that were never written
    /// read as zeroes.
    ///
    /// # Errors
    /// As for [`write_at`](Self::write_at).
    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()>;

    /// Fills `data` as [`read_at`](Self::read_at) does, if that needs no wait for a disk. `false`:
    /// it may need one, and what `data` holds is unknown.
    ///
    /// # Errors
    /// As for [`read_at`](Self::read_at).
    fn read_at_once(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<bool> {
        let _ = (pblk, data);
        Ok(false)
    }

    /// Makes everything durable whose write returned before this call.
    ///
    /// # Errors
    /// The device's error. A later success says nothing about what this call was asked to make
    /// durable: see [`TrackedDevice`](super::TrackedDevice).
    fn flush(&self) -> io::Result<()>;

    /// Gives the blocks back to whatever lies below; they read as zeroes afterwards. Idempotent.
    ///
    /// # Errors
    /// The device's error; some of the blocks may then have been given back.
    fn punch(&self, range: PblkRange) -> io::Result<()>;

    /// Blocks that occupy space on whatever lies below, rounded up. For display.
    ///
    /// # Errors
    /// The device's error.
    fn used_blocks(&self) -> io::Result<u64>;
}

/// The byte offset of a range of whole blocks that lies inside the capacity.
///
/// # Errors
/// `InvalidInput` if it does not.
pub(super) fn checked_offset(capacity_blocks: u64, pblk: Pblk, bytes: usize) -> io::Result<u64> {
    let invalid = |text: &'static str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if !bytes.is_multiple_of(endio_types::BLOCK_SIZE) {
        return invalid("length is no whole number of blocks");
    }
    let blocks = (bytes / endio_types::BLOCK_SIZE) as u64;
    match pblk.0.checked_add(blocks) {
        Some(end) if end <= capacity_blocks => Ok(pblk.0 * endio_types::BLOCK_BYTES),
        _ => invalid("range lies beyond the capacity"),
    }
}
