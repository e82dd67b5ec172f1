//! A table of chunks that refuses what a test tells it to refuse.

use std::collections::BTreeSet;

use endio_state_machine::chunk::{Chunk, ChunkId};
use endio_state_machine::extent_map::{ChunkTable, MemoryTable};
use endio_types::VolumeId;

/// What a refused access says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the chunk is damaged")]
pub struct Damaged;

#[derive(Clone, Debug, Default)]
pub struct FaultyTable {
    chunks: MemoryTable,
    unreadable: BTreeSet<ChunkId>,
    /// Changes fail, as on a disk that is gone.
    pub read_only: bool,
}

impl FaultyTable {
    pub fn new() -> Self {
        Self::default()
    }

    /// The chunk cannot be read until [`Self::repair`].
    pub fn damage(&mut self, volume: VolumeId, index: u64) {
        self.unreadable.insert(ChunkId { volume, index });
    }

    pub fn repair(&mut self) {
        self.unreadable.clear();
    }

    fn readable(&self, id: ChunkId) -> Result<(), Damaged> {
        if self.unreadable.contains(&id) { Err(Damaged) } else { Ok(()) }
    }
}

impl ChunkTable for FaultyTable {
    type Error = Damaged;

    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), Damaged> {
        self.readable(id)?;
        let Ok(()) = self.chunks.read(id, f);
        Ok(())
    }

    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), Damaged> {
        self.readable(id)?;
        if self.read_only {
            return Err(Damaged);
        }
        let Ok(()) = self.chunks.update(id, f);
        Ok(())
    }

    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, Damaged> {
        let Ok(next) = self.chunks.next(from);
        Ok(next)
    }
}
