//! What the table of chunks asks of the store below it, and that store in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use endio_state_machine::chunk::ChunkId;
use endio_types::VolumeId;

/// Volume and index, big-endian, so that the order of keys is that of [`ChunkId`].
pub(crate) type Key = [u8; 16];

pub(crate) fn key(id: ChunkId) -> Key {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&id.volume.0.to_be_bytes());
    key[8..].copy_from_slice(&id.index.to_be_bytes());
    key
}

pub(crate) fn id_of(key: &[u8]) -> Option<ChunkId> {
    let (volume, index) = key.split_first_chunk()?;
    let volume = VolumeId(u64::from_be_bytes(*volume));
    let index = u64::from_be_bytes(index.try_into().ok()?);
    Some(ChunkId { volume, index })
}

/// New values; `None` removes.
pub(crate) type Changes = Vec<(ChunkId, Option<Vec<u8>>)>;
/// Sees every entry of a scan.
pub(crate) type Visit<'a> = dyn FnMut(ChunkId, &[u8]) -> Result<(), String> + 'a;

/// An open store of encoded chunks. An error is a sentence for the log; the store is not used
/// after one.
pub(crate) trait Backend: Send {
    fn get(&mut self, id: ChunkId) -> Result<Option<Vec<u8>>, String>;
    fn apply(&mut self, changes: Changes) -> Result<(), String>;
    /// The first entry at or after `from`.
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, String>;
    fn scan(&mut self, visit: &mut Visit<'_>) -> Result<(), String>;
    /// Makes everything durable and closes; returns the fingerprint of the result.
    fn close(self: Box<Self>) -> Result<u32, String>;
}

/// Where such a store lies.
pub(crate) trait Engine: Send + Sync {
    /// A checksum of everything that [`Self::open`] would read, without opening it.
    fn fingerprint(&self) -> Result<u32, String>;
    fn open(&self) -> Result<Box<dyn Backend>, String>;
    /// Removes everything.
    fn discard(&self) -> Result<(), String>;
}

#[derive(Default)]
struct Entries {
    live: BTreeMap<Key, Vec<u8>>,
    unsynced: BTreeSet<Key>,
}

/// Entries in memory; clones are the same store.
#[derive(Clone, Default)]
pub(crate) struct MemoryEngine(Arc<Mutex<Entries>>);

impl MemoryEngine {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets entries that were not synced, as a power cut may: those that `keep` refuses.
    pub(crate) fn lose(&self, mut keep: impl FnMut() -> bool) {
        let mut entries = self.entries();
        for key in std::mem::take(&mut entries.unsynced) {
            if !keep() {
                entries.live.remove(&key);
            }
        }
    }

    /// An independent copy.
    pub(crate) fn copy(&self) -> Self {
        let entries = self.entries();
        let copy = Entries { live: entries.live.clone(), unsynced: entries.unsynced.clone() };
        Self(Arc::new(Mutex::new(copy)))
    }
}

impl Engine for MemoryEngine {
    fn fingerprint(&self) -> Result<u32, String> {
        let entries = self.entries();
        Ok(entries.live.iter().fold(0, |crc, (key, value)| {
            crc32c::crc32c_append(crc32c::crc32c_append(crc, key), value)
        }))
    }
    fn open(&self) -> Result<Box<dyn Backend>, String> {
        Ok(Box::new(self.clone()))
    }
    fn discard(&self) -> Result<(), String> {
        *self.entries() = Entries::default();
        Ok(())
    }
}

impl Backend for MemoryEngine {
    fn get(&mut self, id: ChunkId) -> Result<Option<Vec<u8>>, String> {
        Ok(self.entries().live.get(&key(id)).cloned())
    }
    fn apply(&mut self, changes: Changes) -> Result<(), String> {
        let mut entries = self.entries();
        for (id, value) in changes {
            entries.unsynced.insert(key(id));
            match value {
                Some(value) => entries.live.insert(key(id), value),
                None => entries.live.remove(&key(id)),
            };
        }
        Ok(())
    }
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, String> {
        let entries = self.entries();
        let mut range = entries.live.range((Bound::Included(key(from)), Bound::Unbounded));
        Ok(range.next().and_then(|(key, _)| id_of(key)))
    }
    fn scan(&mut self, visit: &mut Visit<'_>) -> Result<(), String> {
        let entries = self.entries();
        for (key, value) in &entries.live {
            let id = id_of(key).ok_or("a key is not a chunk's")?;
            visit(id, value)?;
        }
        Ok(())
    }
    fn close(self: Box<Self>) -> Result<u32, String> {
        self.entries().unsynced.clear();
        self.fingerprint()
    }
}
