//! A device in memory that forgets what was not flushed, and fails when it is told to.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use endio_types::{BLOCK_SIZE, Pblk, PblkRange};

use super::{BlockDevice, device::checked_offset};

type Block = Box<[u8]>;

/// A fault that hits the next call it fits, once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceFault {
    /// The next write fails with EIO; nothing is written.
    WriteError,
    /// The next write fails with ENOSPC; nothing is written.
    WriteNoSpace,
    /// The next write stops after so many blocks and fails with EIO.
    ShortWrite(u32),
    /// The next write says that it succeeded, and writes nothing.
    LostWrite,
    /// The next write goes to this block instead.
    MisdirectedWrite(Pblk),
    /// The next read fails with EIO.
    ReadError,
    /// The next flush fails with EIO, and what it was to make durable never becomes so.
    FlushError,
    /// The next flush says that it succeeded, and makes nothing durable.
    LyingFlush,
}

/// Blocks in memory. What was not flushed is gone after [`lose_power`](Self::lose_power).
#[derive(Debug)]
pub struct MemoryDevice {
    capacity_blocks: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What readers see.
    current: BTreeMap<u64, Block>,
    /// What survives a loss of power.
    durable: BTreeMap<u64, Block>,
    /// Blocks that the next flush makes durable.
    dirty: BTreeSet<u64>,
    faults: VecDeque<DeviceFault>,
}

impl MemoryDevice {
    /// A device of so many blocks, all zeroes.
    pub fn new(capacity_blocks: u64) -> Self {
        Self { capacity_blocks, state: Mutex::default() }
    }

    /// Queues a fault. Faults of one kind of call hit in the order in which they were queued.
    pub fn inject(&self, fault: DeviceFault) {
        self.state().faults.push_back(fault);
    }

    /// Forgets everything that was not flushed.
    pub fn lose_power(&self) {
        let mut state = self.state();
        state.current = state.durable.clone();
        state.dirty.clear();
    }

    /// Forgets what was not flushed, except the blocks for which `survives` says true: a disk may
    /// write back any subset of its cache.
    pub fn lose_power_except(&self, mut survives: impl FnMut(Pblk) -> bool) {
        let mut state = self.state();
        let kept: BTreeSet<u64> =
            state.dirty.iter().copied().filter(|pblk| survives(Pblk(*pblk))).collect();
        state.write_back(&kept);
        state.current = state.durable.clone();
        state.dirty.clear();
    }

    /// Flips one bit of a block, in the cache and on the medium. `bit` counts from 0 and wraps at
    /// the end of the block.
    pub fn flip_bit(&self, pblk: Pblk, bit: usize) {
        let mut state = self.state();
        let bit = bit % (BLOCK_SIZE * 8);
        let State { current, durable, .. } = &mut *state;
        for blocks in [current, durable] {
            if let Some(block) = blocks.get_mut(&pblk.0) {
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is plain data, whole after each statement: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, fits: impl Fn(DeviceFault) -> bool) -> Option<DeviceFault> {
        let at = self.faults.iter().position(|fault| fits(*fault))?;
        self.faults.remove(at)
    }

    fn write(&mut self, pblk: u64, data: &[u8]) {
        for (pblk, block) in (pblk..).zip(data.chunks_exact(BLOCK_SIZE)) {
            self.current.insert(pblk, block.into());
            self.dirty.insert(pblk);
        }
    }

    fn write_back(&mut self, blocks: &BTreeSet<u64>) {
        for pblk in blocks {
            match self.current.get(pblk) {
                Some(block) => self.durable.insert(*pblk, block.clone()),
                None => self.durable.remove(pblk),
            };
        }
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())
}

impl BlockDevice for MemoryDevice {
    fn capacity_blocks(&self) -> u64 {
        self.capacity_blocks
    }

    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        checked_offset(self.capacity_blocks, pblk, data.len())?;
        let mut state = self.state();
        let fault = state.take(|fault| {
            use DeviceFault as F;
            matches!(
                fault,
                F::WriteError
                    | F::WriteNoSpace
                    | F::ShortWrite(_)
                    | F::LostWrite
                    | F::MisdirectedWrite(_)
            )
        });
        match fault {
            Some(DeviceFault::WriteNoSpace) => {
                return Err(rustix::io::Errno::NOSPC.into());
            }
            Some(DeviceFault::ShortWrite(blocks)) => {
                let bytes = (blocks as usize * BLOCK_SIZE).min(data.len());
                state.write(pblk.0, &data[..bytes]);
                return Err(eio());
            }
            Some(DeviceFault::LostWrite) => {}
            Some(DeviceFault::MisdirectedWrite(other)) => {
                checked_offset(self.capacity_blocks, other, data.len())?;
                state.write(other.0, data);
            }
            Some(_) => return Err(eio()),
            None => state.write(pblk.0, data),
        }
        Ok(())
    }

    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        checked_offset(self.capacity_blocks, pblk, data.len())?;
        let mut state = self.state();
        if state.take(|fault| fault == DeviceFault::ReadError).is_some() {
            return Err(eio());
        }
        for (pblk, block) in (pblk.0..).zip(data.chunks_exact_mut(BLOCK_SIZE)) {
            match state.current.get(&pblk) {
                Some(stored) => block.copy_from_slice(stored),
                None => block.fill(0),
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        let dirty = std::mem::take(&mut state.dirty);
        match state.take(|f| matches!(f, DeviceFault::FlushError | DeviceFault::LyingFlush)) {
            // As Linux does it: the pages count as clean from here on.
            Some(DeviceFault::FlushError) => return Err(eio()),
            Some(_) => {}
            None => state.write_back(&dirty),
        }
        Ok(())
    }

    fn punch(&self, range: PblkRange) -> io::Result<()> {
        let bytes = usize::try_from(range.len)
            .ok()
            .and_then(|blocks| blocks.checked_mul(BLOCK_SIZE))
            .ok_or(io::ErrorKind::InvalidInput)?;
        checked_offset(self.capacity_blocks, range.start, bytes)?;
        let mut state = self.state();
        let held: Vec<u64> =
            state.current.range(range.start.0..range.end()).map(|(pblk, _)| *pblk).collect();
        for pblk in held {
            state.current.remove(&pblk);
            state.dirty.insert(pblk);
        }
        Ok(())
    }

    fn used_blocks(&self) -> io::Result<u64> {
        Ok(self.state().current.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(device: &MemoryDevice, pblk: u64) -> u8 {
        let mut block = [0; BLOCK_SIZE];
        device.read_at(Pblk(pblk), &mut block).unwrap();
        block[0]
    }

    #[test]
    fn a_flushed_block_survives_a_loss_of_power_and_others_do_not() {
        let device = MemoryDevice::new(4);
        device.write_at(Pblk(0), &[1; BLOCK_SIZE]).unwrap();
        device.flush().unwrap();
        device.write_at(Pblk(0), &[2; BLOCK_SIZE]).unwrap();
        device.write_at(Pblk(1), &[3; BLOCK_SIZE]).unwrap();
        device.lose_power_except(|pblk| pblk == Pblk(1));
        assert_eq!((read(&device, 0), read(&device, 1)), (1, 3));
        device.punch(PblkRange::new(0, 2)).unwrap();
        assert_eq!((read(&device, 0), device.used_blocks().unwrap()), (0, 0));
        device.lose_power();
        assert_eq!(read(&device, 0), 1);
    }

    #[test]
    fn each_fault_hits_once() {
        let device = MemoryDevice::new(4);
        device.inject(DeviceFault::WriteNoSpace);
        device.inject(DeviceFault::ShortWrite(1));
        device.inject(DeviceFault::LostWrite);
        device.inject(DeviceFault::MisdirectedWrite(Pblk(2)));
        let full = device.write_at(Pblk(0), &[1; BLOCK_SIZE]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        device.write_at(Pblk(0), &[2; 2 * BLOCK_SIZE]).unwrap_err();
        assert_eq!((read(&device, 0), read(&device, 1)), (2, 0));
        device.write_at(Pblk(0), &[3; BLOCK_SIZE]).unwrap();
        assert_eq!(read(&device, 0), 2);
        device.write_at(Pblk(0), &[4; BLOCK_SIZE]).unwrap();
        assert_eq!((read(&device, 0), read(&device, 2)), (2, 4));
        device.write_at(Pblk(3), &[5; BLOCK_SIZE]).unwrap();
        device.flip_bit(Pblk(3), 0);
        assert_eq!(read(&device, 3), 4);
        device.write_at(Pblk(3), &[5; 2 * BLOCK_SIZE]).unwrap_err();
    }
}
