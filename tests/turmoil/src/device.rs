//! A block file that dies with its host.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use endio_store::block::{BlockDevice, BlockFile};
use endio_types::{Pblk, PblkRange};

/// The threads of a block-store outlive the crash of its host for a moment. From that crash on they
/// reach no file any more, as if they had died with it.
#[derive(Debug)]
pub(crate) struct MortalDevice {
    file: RwLock<Option<BlockFile>>,
    capacity_blocks: u64,
    is_broken: AtomicBool,
}

impl MortalDevice {
    pub(crate) fn new(file: BlockFile) -> Self {
        let capacity_blocks = file.capacity_blocks();
        Self { file: RwLock::new(Some(file)), capacity_blocks, is_broken: AtomicBool::new(false) }
    }

    /// What is under way ends; the file is closed and unlocked.
    pub(crate) fn die(&self) {
        drop(self.file.write().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// From now on writes and flushes fail, or succeed again.
    pub(crate) fn set_broken(&self, is_broken: bool) {
        self.is_broken.store(is_broken, Ordering::SeqCst);
    }

    fn write<T>(&self, run: impl FnOnce(&BlockFile) -> io::Result<T>) -> io::Result<T> {
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("broken on purpose"));
        }
        self.with(run)
    }

    fn with<T>(&self, run: impl FnOnce(&BlockFile) -> io::Result<T>) -> io::Result<T> {
        let file: RwLockReadGuard<'_, _> = self.file.read().unwrap_or_else(PoisonError::into_inner);
        run(file.as_ref().ok_or_else(|| io::Error::other("the host of this device is dead"))?)
    }
}

impl BlockDevice for MortalDevice {
    fn capacity_blocks(&self) -> u64 {
        self.capacity_blocks
    }

    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        self.write(|file| file.write_at(pblk, data))
    }

    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        self.with(|file| file.read_at(pblk, data))
    }

    fn read_at_once(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<bool> {
        self.with(|file| file.read_at_once(pblk, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.write(BlockDevice::flush)
    }

    fn punch(&self, range: PblkRange) -> io::Result<()> {
        self.with(|file| file.punch(range))
    }

    fn used_blocks(&self) -> io::Result<u64> {
        self.with(BlockDevice::used_blocks)
    }
}
