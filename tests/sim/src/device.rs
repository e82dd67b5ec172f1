//! A block device that forgets what was not flushed, fails, lies, and tears blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use endio_store::block::BlockDevice;
use endio_testkit::seed::Rng;
use endio_types::{BLOCK_SIZE, Pblk, PblkRange};

use crate::block::{Block, CELLS, ZEROES, crc, from_bytes, to_bytes};

/// How often what goes wrong, in thousandths.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceFaults {
    /// A write fails; a part of it may be there.
    pub write_error: u64,
    /// A flush fails, and what it covered is gone at the next power cut.
    pub flush_error: u64,
    /// A read fails.
    pub read_error: u64,
    /// A write says that it is done, and did nothing.
    pub lost_write: u64,
    /// A write goes somewhere else.
    pub misdirected: u64,
    /// One bit is not what was written.
    pub flipped: u64,
}

impl DeviceFaults {
    /// Whether it ever says that something is there that is not.
    pub fn lies(&self) -> bool {
        self.lost_write + self.misdirected + self.flipped > 0
    }
}

#[derive(Debug)]
struct State {
    capacity: u64,
    current: BTreeMap<u64, Block>,
    durable: BTreeMap<u64, Block>,
    dirty: BTreeSet<u64>,
    faults: DeviceFaults,
    is_full: bool,
    rng: Rng,
}

/// The device. Clones are the same one.
#[derive(Clone, Debug)]
pub struct SimDevice(Arc<Mutex<State>>);

impl SimDevice {
    /// An empty device.
    pub fn new(capacity: u64, faults: DeviceFaults, rng: Rng) -> Self {
        Self(Arc::new(Mutex::new(State {
            capacity,
            current: BTreeMap::new(),
            durable: BTreeMap::new(),
            dirty: BTreeSet::new(),
            faults,
            is_full: false,
            rng,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it works, but what it forgot stays forgotten.
    pub fn heal(&self) {
        let mut state = self.state();
        state.faults = DeviceFaults::default();
        state.is_full = false;
    }

    /// Every write fails for lack of space, or does again what it should.
    pub fn set_full(&self, full: bool) {
        self.state().is_full = full;
    }

    /// What was not flushed is gone, or there, or there in part.
    pub fn cut_power(&self) {
        let mut guard = self.state();
        let state = &mut *guard;
        for pblk in std::mem::take(&mut state.dirty) {
            let new = state.current.get(&pblk).copied().unwrap_or(ZEROES);
            let old = state.durable.get(&pblk).copied().unwrap_or(ZEROES);
            let kept = match state.rng.below(3) {
                0 => old,
                1 => new,
                _ => {
                    let mut torn = old;
                    let cut = state.rng.below(CELLS) as usize;
                    torn[..cut].copy_from_slice(&new[..cut]);
                    torn
                }
            };
            state.durable.insert(pblk, kept);
        }
        state.current = state.durable.clone();
    }

    /// A bit of a stored block is another one from now on.
    pub fn flip(&self, pblk: u64, cell: usize, bit: u64) {
        let mut guard = self.state();
        let state = &mut *guard;
        for blocks in [&mut state.current, &mut state.durable] {
            blocks.entry(pblk).or_insert(ZEROES)[cell] ^= 1 << bit;
        }
    }

    /// Whether a block has this checksum now.
    pub fn holds(&self, pblk: u64, sum: u32) -> bool {
        crc(&self.state().current.get(&pblk).copied().unwrap_or(ZEROES)) == sum
    }

    /// Whether a block that survives a power cut has this checksum.
    pub fn holds_durably(&self, pblk: u64, sum: u32) -> bool {
        let state = self.state();
        crc(&state.durable.get(&pblk).copied().unwrap_or(ZEROES)) == sum
    }
}

fn eio() -> io::Error {
    io::Error::other("injected")
}

impl State {
    fn chance(&mut self, permille: u64) -> bool {
        permille > 0 && self.rng.below(1000) < permille
    }

    fn put(&mut self, pblk: u64, blocks: &[Block]) {
        for (pblk, block) in (pblk..self.capacity).zip(blocks) {
            self.current.insert(pblk, *block);
            self.dirty.insert(pblk);
        }
    }
}

impl BlockDevice for SimDevice {
    fn capacity_blocks(&self) -> u64 {
        self.state().capacity
    }

    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        let mut blocks = from_bytes(data);
        let mut state = self.state();
        if state.is_full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let faults = state.faults;
        if state.chance(faults.write_error) {
            let part = state.rng.below(blocks.len() as u64 + 1) as usize;
            state.put(pblk.0, &blocks[..part]);
            return Err(eio());
        }
        if state.chance(faults.lost_write) {
            return Ok(());
        }
        if state.chance(faults.misdirected) {
            let capacity = state.capacity;
            let other = state.rng.below(capacity);
            state.put(other, &blocks);
            return Ok(());
        }
        if state.chance(faults.flipped) {
            let at = state.rng.below(blocks.len() as u64) as usize;
            let (cell, bit) = (state.rng.below(CELLS) as usize, state.rng.below(64));
            blocks[at][cell] ^= 1 << bit;
        }
        state.put(pblk.0, &blocks);
        Ok(())
    }

    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        let faults = state.faults;
        if state.chance(faults.read_error) {
            return Err(eio());
        }
        let count = (data.len() / BLOCK_SIZE) as u64;
        let blocks: Vec<Block> = (pblk.0..pblk.0 + count)
            .map(|pblk| state.current.get(&pblk).copied().unwrap_or(ZEROES))
            .collect();
        data.copy_from_slice(&to_bytes(&blocks));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut guard = self.state();
        let state = &mut *guard;
        let dirty = std::mem::take(&mut state.dirty);
        let faults = state.faults;
        if state.chance(faults.flush_error) {
            // As Linux does it: the pages count as clean from here on.
            return Err(eio());
        }
        for pblk in dirty {
            let block = state.current.get(&pblk).copied().unwrap_or(ZEROES);
            state.durable.insert(pblk, block);
        }
        Ok(())
    }

    fn punch(&self, range: PblkRange) -> io::Result<()> {
        let mut state = self.state();
        for pblk in range.start.0..range.start.0 + range.len {
            if state.current.remove(&pblk).is_some() {
                state.dirty.insert(pblk);
            }
        }
        Ok(())
    }

    fn used_blocks(&self) -> io::Result<u64> {
        Ok(self.state().current.len() as u64)
    }
}
