//! Clean blocks in memory, for reads: see `block_cache`.
//!
//! A volume's handle is used under the volume's lock, so that a change of the map that begins is seen
//! together with what it makes wrong. The lock of the cache is taken within it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use endio_state_machine::writeback::block_cache::{Admission, BlockCache, Tenant};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, LblkRange};
use tracing_mutex::stdsync::{Mutex, MutexGuard};

/// Reads of so many blocks and fewer may push out what others have read.
const SHORT_BLOCKS: u64 = 16;

/// The clean blocks of all volumes.
#[derive(Debug)]
pub struct CleanBlocks {
    cache: Mutex<BlockCache<Bytes>>,
    next: AtomicU64,
}

/// The clean blocks of one volume. They are forgotten with it.
#[derive(Debug)]
pub struct VolumeBlocks {
    all: Arc<CleanBlocks>,
    tenant: Tenant,
}

impl CleanBlocks {
    /// None, and never more than so many bytes.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        let blocks_max = usize::try_from(bytes_max / BLOCK_BYTES).unwrap_or(usize::MAX);
        let cache = Mutex::new(BlockCache::new(blocks_max));
        Arc::new(Self { cache, next: AtomicU64::new(0) })
    }

    /// Bytes of data in it.
    pub fn bytes(&self) -> u64 {
        self.cache().len() as u64 * BLOCK_BYTES
    }

    fn cache(&self) -> MutexGuard<'_, BlockCache<Bytes>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A volume that was opened.
    pub fn volume(self: &Arc<Self>) -> VolumeBlocks {
        let tenant = Tenant(self.next.fetch_add(1, Ordering::Relaxed));
        VolumeBlocks { all: Arc::clone(self), tenant }
    }
}

impl VolumeBlocks {
    /// The blocks of a range, each from `newer` or from here; `None`: one is in neither.
    pub fn read(
        &self,
        range: LblkRange,
        mut newer: impl FnMut(u64) -> Option<Bytes>,
    ) -> Option<Vec<Bytes>> {
        let mut cache = self.all.cache();
        let mut blocks = Vec::new();
        for lblk in range.start.0..range.end() {
            let block = newer(lblk).or_else(|| cache.get(self.tenant, lblk).cloned())?;
            blocks.push(block);
        }
        Some(blocks)
    }

    /// Takes in what was read of a range, which the map shows of it now.
    pub fn insert(&self, range: LblkRange, data: &[u8]) {
        let is_short = range.len <= SHORT_BLOCKS;
        let admission = if is_short { Admission::Evict } else { Admission::IfRoom };
        let mut cache = self.all.cache();
        for (lblk, block) in (range.start.0..range.end()).zip(data.chunks_exact(BLOCK_SIZE)) {
            if !cache.takes(admission) {
                return;
            }
            // A copy: a slice would keep the whole message in memory that it came with.
            cache.insert(self.tenant, lblk, Bytes::copy_from_slice(block), admission);
        }
    }

    /// Nothing is known of a range any more.
    pub fn forget(&self, range: LblkRange) {
        self.all.cache().forget(self.tenant, range);
    }

    /// Nothing is known of the volume any more.
    pub fn clear(&self) {
        self.forget(LblkRange::new(0, u64::MAX));
    }
}

impl Drop for VolumeBlocks {
    fn drop(&mut self) {
        self.clear();
    }
}
