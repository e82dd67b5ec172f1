//! The table of chunks: decoded chunks in bounded memory over a store of encoded ones.
//!
//! Changes stay in memory until their chunk is evicted or [`MetaTable::flush_dirty`] is called. A
//! chunk that became empty is kept as an empty, dirty entry until the store has removed it.
//!
//! # Invariants
//! * `no-silent-damage`: a chunk that does not decode is an error that names it; from then on the
//!   table refuses everything, and, as the canary is gone since open, the next open rebuilds.

use std::collections::BTreeMap;
use std::sync::Arc;

use endio_state_machine::chunk::{Chunk, ChunkId};
use endio_state_machine::extent_map::{ChunkTable, successor};

use super::MetaError;
use super::api::{MetaTable, TableStats};
use super::backend::{Backend, Changes};
use super::canary::Canary;
use super::shared::Shared;

/// Emptied chunks kept at most before they are written out: finding the next chunk steps over each.
const EMPTIED_MAX: u64 = 1024;
/// What an entry of the cache takes beside its chunk, in bytes.
const ENTRY_BYTES: usize = 128;

struct Slot {
    chunk: Chunk,
    dirty: bool,
    used: u64,
    bytes: usize,
}

/// The table over sled, or over memory in tests.
pub(crate) struct CachedTable {
    shared: Arc<Shared>,
    backend: Option<Box<dyn Backend>>,
    slots: BTreeMap<ChunkId, Slot>,
    /// When each slot was used last, oldest first.
    order: BTreeMap<u64, ChunkId>,
    clock: u64,
    cached_bytes: usize,
    chunks: u64,
    dirty: u64,
    emptied: u64,
    newest: u64,
    broken: Option<String>,
}

impl CachedTable {
    pub(crate) fn new(
        shared: Arc<Shared>,
        backend: Box<dyn Backend>,
        chunks: u64,
        newest: u64,
    ) -> Self {
        Self {
            shared,
            backend: Some(backend),
            slots: BTreeMap::new(),
            order: BTreeMap::new(),
            clock: 0,
            cached_bytes: 0,
            chunks,
            dirty: 0,
            emptied: 0,
            newest,
            broken: None,
        }
    }

    /// Runs `f` on the store below; its first failure breaks the table.
    fn below<R>(
        &mut self,
        f: impl FnOnce(&mut dyn Backend) -> Result<R, String>,
    ) -> Result<R, MetaError> {
        if let Some(reason) = &self.broken {
            return Err(MetaError::Table(reason.clone()));
        }
        let Some(backend) = self.backend.as_mut() else {
            return Err(MetaError::Misuse("the table is closed"));
        };
        f(backend.as_mut()).map_err(|reason| {
            self.broken = Some(reason.clone());
            MetaError::Table(reason)
        })
    }

    fn check(&self) -> Result<(), MetaError> {
        match (&self.broken, &self.backend) {
            (Some(reason), _) => Err(MetaError::Table(reason.clone())),
            (None, None) => Err(MetaError::Misuse("the table is closed")),
            (None, Some(_)) => Ok(()),
        }
    }

    /// Brings the chunk into the cache, if it exists.
    fn load(&mut self, id: ChunkId) -> Result<bool, MetaError> {
        self.check()?;
        if self.slots.contains_key(&id) {
            return Ok(true);
        }
        let Some(bytes) = self.below(|backend| backend.get(id))? else { return Ok(false) };
        let chunk = Chunk::decode(id, &bytes).map_err(|error| {
            let what = error.to_string();
            let volume = id.volume;
            self.broken = Some(format!("chunk {} of volume {volume} is damaged", id.index));
            MetaError::ChunkDamaged { id, what }
        })?;
        self.insert(id, chunk);
        Ok(true)
    }

    fn insert(&mut self, id: ChunkId, chunk: Chunk) {
        self.clock += 1;
        let bytes = chunk.memory() + ENTRY_BYTES;
        self.cached_bytes += bytes;
        self.order.insert(self.clock, id);
        self.slots.insert(id, Slot { chunk, dirty: false, used: self.clock, bytes });
    }

    fn touch(&mut self, id: ChunkId) {
        self.clock += 1;
        if let Some(slot) = self.slots.get_mut(&id) {
            self.order.remove(&slot.used);
            slot.used = self.clock;
            self.order.insert(self.clock, id);
        }
    }

    /// Evicts the least recently used until the cache fits with some room to spare, so that
    /// changed chunks go out many at a time.
    fn shrink(&mut self) -> Result<(), MetaError> {
        let bound = self.shared.options.chunk_cache_bytes;
        if self.emptied > EMPTIED_MAX {
            self.flush_dirty()?;
        }
        if self.cached_bytes <= bound {
            return Ok(());
        }
        let target = bound - bound / 8;
        let mut victims = Vec::new();
        let mut left = self.cached_bytes;
        let mut dirty_bytes = 0;
        for id in self.order.values() {
            if left <= target {
                break;
            }
            if let Some(slot) = self.slots.get(id) {
                left -= slot.bytes;
                dirty_bytes += if slot.dirty { slot.bytes as u64 } else { 0 };
                victims.push(*id);
            }
        }
        let may_write = dirty_bytes == 0 || self.shared.has_room_for_table(dirty_bytes);
        if !may_write {
            // Accepted work goes on in memory; new work is refused until there is room.
            victims.retain(|id| self.slots.get(id).is_some_and(|slot| !slot.dirty));
        }
        self.write_out(&victims)?;
        for id in victims {
            if let Some(slot) = self.slots.remove(&id) {
                self.order.remove(&slot.used);
                self.cached_bytes -= slot.bytes;
            }
        }
        Ok(())
    }

    /// Writes the dirty ones among `ids`.
    fn write_out(&mut self, ids: &[ChunkId]) -> Result<(), MetaError> {
        for part in ids.chunks(256) {
            let mut changes: Changes = Vec::new();
            for id in part {
                let Some(slot) = self.slots.get_mut(id).filter(|slot| slot.dirty) else { continue };
                slot.dirty = false;
                self.dirty -= 1;
                let value = (!slot.chunk.is_empty()).then(|| slot.chunk.encode(*id));
                self.emptied -= u64::from(value.is_none());
                changes.push((*id, value));
            }
            let emptied: Vec<ChunkId> =
                changes.iter().filter(|(_, value)| value.is_none()).map(|(id, _)| *id).collect();
            if !changes.is_empty() {
                self.below(|backend| backend.apply(changes))?;
            }
            for id in emptied {
                if let Some(slot) = self.slots.remove(&id) {
                    self.order.remove(&slot.used);
                    self.cached_bytes -= slot.bytes;
                }
            }
        }
        Ok(())
    }
}

impl ChunkTable for CachedTable {
    type Error = MetaError;

    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), MetaError> {
        if !self.load(id)? {
            f(None);
            return Ok(());
        }
        self.touch(id);
        f(self.slots.get(&id).map(|slot| &slot.chunk).filter(|chunk| !chunk.is_empty()));
        self.shrink()
    }

    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), MetaError> {
        if !self.load(id)? {
            self.insert(id, Chunk::default());
        }
        self.touch(id);
        let Some(slot) = self.slots.get_mut(&id) else {
            return Err(MetaError::Misuse("a chunk left the cache while it was used"));
        };
        let was_empty = slot.chunk.is_empty();
        let was_dirty = slot.dirty;
        if was_empty {
            // An emptied chunk forgets what it has seen, whether or not it was written out yet.
            slot.chunk = Chunk::default();
        }
        let seen = slot.chunk.applied();
        f(&mut slot.chunk);
        if slot.chunk.applied() == seen && !was_empty {
            // Replay found that the chunk knows the operation: nothing to write.
            return self.shrink();
        }
        self.newest = self.newest.max(slot.chunk.applied().record);
        let is_empty = slot.chunk.is_empty();
        slot.dirty = true;
        let bytes = slot.chunk.memory() + ENTRY_BYTES;
        self.cached_bytes = self.cached_bytes + bytes - slot.bytes;
        slot.bytes = bytes;
        self.dirty += u64::from(!was_dirty);
        match (was_empty, is_empty) {
            (true, false) => self.chunks += 1,
            (false, true) => self.chunks -= 1,
            _ => {}
        }
        self.emptied -= u64::from(was_empty && was_dirty);
        self.emptied += u64::from(is_empty);
        self.shrink()
    }

    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, MetaError> {
        self.check()?;
        let cached =
            self.slots.range(from..).find(|(_, slot)| !slot.chunk.is_empty()).map(|(id, _)| *id);
        let mut at = from;
        let stored = loop {
            let Some(id) = self.below(|backend| backend.next(at))? else { break None };
            match self.slots.get(&id) {
                Some(slot) if slot.chunk.is_empty() => match successor(id) {
                    Some(next) => at = next,
                    None => break None,
                },
                _ => break Some(id),
            }
        };
        Ok(cached.into_iter().chain(stored).min())
    }
}

impl MetaTable for CachedTable {
    fn flush_dirty(&mut self) -> Result<(), MetaError> {
        self.check()?;
        let dirty: Vec<ChunkId> =
            self.slots.iter().filter(|(_, slot)| slot.dirty).map(|(id, _)| *id).collect();
        let bytes: usize = dirty.iter().filter_map(|id| self.slots.get(id)).map(|s| s.bytes).sum();
        if dirty.is_empty() || !self.shared.has_room_for_table(bytes as u64) {
            return Ok(());
        }
        self.write_out(&dirty)
    }

    fn close(&mut self, durable_seq: u64) -> Result<(), MetaError> {
        self.check()?;
        if self.newest > durable_seq.min(self.shared.stats().durable_seq) {
            return Err(MetaError::Misuse("the table is ahead of the journal: commit first"));
        }
        self.flush_dirty()?;
        let Some(backend) = self.backend.take() else { return Ok(()) };
        if self.dirty > 0 {
            tracing::warn!(dirty = self.dirty, "no room to write the table out: it is rebuilt");
            return Ok(());
        }
        let files_crc32c = backend.close().map_err(MetaError::Table)?;
        let canary = Canary {
            database_id: self.shared.database,
            last_seq: self.shared.stats().durable_seq,
            chunks: self.chunks,
            files_crc32c,
            clean: true,
        };
        canary.write(&self.shared)
    }

    fn stats(&self) -> TableStats {
        TableStats {
            chunks: self.chunks,
            cached: self.slots.len() as u64,
            cached_bytes: self.cached_bytes as u64,
            dirty: self.dirty,
            newest_seq: self.newest,
        }
    }
}
