//! A volume that is open here: its dirty blocks, its credit, its errors, its readers.
//!
//! One mutex guards the state; it is never held across an await or I/O. Whoever waits for the
//! state to change waits on [`Volume::wait`], which cannot miss a change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use endio_api::common::{Extent, ReadGrant};
use endio_chassis::trace::Context;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::credit::{Credit, CreditPolicy};
use endio_state_machine::writeback::dirty::DirtyMap;
use endio_state_machine::writeback::errseq::{Cursor, ErrSeq};
use endio_state_machine::writeback::map_cache::{ChangeId, MapCache, Part};
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange, Reason, VOLUME_BYTES_MAX};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::engine::Meter;
use crate::failure::Failure;
use crate::locks::Locks;

/// 4096 bytes in the dirty cache, and the write that they came with.
#[derive(Clone, Debug)]
pub struct CachedBlock {
    /// The bytes.
    pub data: Bytes,
    /// Where the buffered write is in its trace; `None`: it is in none.
    pub trace: Option<Context>,
}

/// A volume under one generation.
pub struct Volume {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: Arc<str>,
    /// The generation under which it is open here.
    pub generation: u64,
    /// Overwrites of written blocks go in place.
    pub in_place: bool,
    /// Writes past the end extend it.
    pub growable: bool,
    /// The order of overlapping requests.
    pub locks: Arc<Locks>,
    /// Writes, trims and zeroings that were acknowledged.
    pub writes: Meter,
    /// Reads that were answered.
    pub reads: Meter,
    state: Mutex<State>,
    changed: Notify,
    flusher: Notify,
}

/// What changes.
pub struct State {
    /// Size as clients of this service see it, bytes: acknowledged extensions count.
    pub size_bytes: u64,
    /// Size that conversion knows, bytes.
    pub durable_size_bytes: u64,
    /// Map version at which the size was set last; what an older map says of it is of the past.
    sized_at: u64,
    /// Acknowledged and not yet converted.
    pub dirty: DirtyMap<CachedBlock>,
    /// Since when something is dirty.
    pub dirty_since: Option<Instant>,
    /// Space promised by conversion.
    pub credit: Credit,
    /// Number of the request that sets the credit anew, while its answer is owed.
    pub credit_reset: Option<u64>,
    /// Failed write-outs.
    pub errors: ErrSeq<Failure>,
    /// Counts the failed write-outs.
    pub error_count: u64,
    /// Acknowledged writes may be missing since a power loss: what everybody who comes back is told
    /// once, whenever that is.
    pub loss: Option<Loss>,
    /// What callers of the unary Fsync were told; they have no identity of their own.
    pub told: Cursor,
    /// Write-outs up to this record are wanted now.
    pub flush_up_to: Lsn,
    /// What is known of the map.
    pub map: MapCache<Arc<Extent>>,
    /// Write-outs under way.
    pub write_outs: usize,
    /// The newest record that says that blocks of this volume are converted.
    pub last_clean: Lsn,
    /// Write-out rests until then, after a failure.
    pub rest_until: Option<Instant>,
    /// Reads under way, by the map version that they may use.
    reads: BTreeMap<u64, usize>,
    /// Newest map version seen.
    map_version: u64,
    /// Permission to read, as conversion gave it last.
    pub grant: Option<ReadGrant>,
    /// Bytes of direct writes under way.
    pub direct_bytes: u64,
    /// First block and number of blocks of the direct writes under way; their locks keep them apart.
    pub direct: BTreeMap<u64, u64>,
    /// Why the volume is not usable here any more.
    pub gone: Option<Failure>,
}

/// Bounds of one volume.
#[derive(Debug, Clone, Copy)]
pub struct VolumeLimits {
    /// How much credit is asked for.
    pub credit: CreditPolicy,
    /// Runs of blocks of the map that are remembered.
    pub map_entries_max: usize,
}

/// A loss of acknowledged writes, and who was told of it.
pub struct Loss {
    why: Failure,
    told: BTreeSet<String>,
}

/// Observers remembered as told; beyond, somebody may be told twice.
const TOLD_MAX: usize = 4_096;

impl Loss {
    /// Nobody was told.
    pub fn new(why: Failure) -> Self {
        Self { why, told: BTreeSet::new() }
    }

    /// What this observer has to be told, once.
    pub fn tell(&mut self, who: &str) -> Option<Failure> {
        if self.told.contains(who) {
            return None;
        }
        if self.told.len() >= TOLD_MAX {
            self.told.clear();
        }
        self.told.insert(who.to_owned());
        Some(self.why.clone())
    }
}

/// What conversion said when the volume was opened.
pub struct Opened {
    /// The volume.
    pub volume: endio_api::conversion::Volume,
    /// Permission to read.
    pub grant: Option<ReadGrant>,
}

impl Volume {
    /// A volume that was opened just now, with nothing dirty.
    pub fn new(opened: Opened, limits: VolumeLimits) -> Self {
        let Opened { volume, grant } = opened;
        let errors = ErrSeq::new();
        let told = errors.sample();
        Self {
            id: volume.id,
            name: volume.name.into(),
            generation: volume.generation,
            in_place: volume.in_place,
            growable: volume.growable,
            locks: Arc::default(),
            writes: Meter::default(),
            reads: Meter::default(),
            state: Mutex::new(State {
                size_bytes: volume.size_bytes,
                durable_size_bytes: volume.size_bytes,
                sized_at: volume.map_version,
                dirty: DirtyMap::new(),
                dirty_since: None,
                credit: Credit::new(limits.credit),
                credit_reset: None,
                errors,
                error_count: 0,
                loss: None,
                told,
                flush_up_to: Lsn(0),
                map: MapCache::new(if volume.in_place { 0 } else { limits.map_entries_max }),
                write_outs: 0,
                last_clean: Lsn(0),
                rest_until: None,
                reads: BTreeMap::new(),
                map_version: volume.map_version,
                grant,
                direct_bytes: 0,
                direct: BTreeMap::new(),
                gone: None,
            }),
            changed: Notify::new(),
            flusher: Notify::new(),
        }
    }

    /// The state. Never held across an await.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything in it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes everybody who waits for the state to change.
    pub fn changed(&self) {
        self.changed.notify_waiters();
        self.flusher.notify_one();
    }

    /// Waits for the next reason to look at what is dirty. One waiter: the flusher.
    pub async fn flusher_woken(&self) {
        self.flusher.notified().await;
    }

    /// Waits until `look` finds what it wants in the state. Cancel-safe.
    pub async fn wait<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the look: a change between the look and the wait is not missed.
            changed.as_mut().enable();
            if let Some(found) = look(&mut self.state()) {
                return found;
            }
            changed.await;
        }
    }

    /// The volume is not usable here any more; every waiter hears why. The first reason stays.
    pub fn let_go(&self, why: Failure) {
        self.state().gone.get_or_insert(why);
        self.changed();
    }

    /// # Errors
    /// Why the volume is not usable here any more.
    pub fn usable(&self) -> Result<(), Failure> {
        self.state().gone.clone().map_or(Ok(()), Err)
    }

    /// The blocks of a range of bytes that a request may touch.
    ///
    /// # Errors
    /// `OUT_OF_RANGE`: beyond the end. `extends`: writes may, on a growable volume.
    pub fn check(&self, bytes: ByteRange, extends: bool) -> Result<LblkRange, Failure> {
        let beyond = || Failure::new(Reason::OutOfRange, "the range lies beyond the volume's end");
        let end = bytes.end().filter(|end| *end <= VOLUME_BYTES_MAX).ok_or_else(beyond)?;
        let state = self.state();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        if end > state.size_bytes && !(extends && self.growable) {
            return Err(beyond());
        }
        Ok(bytes.blocks())
    }

    /// A change of the map of these blocks is about to be asked for.
    pub fn map_changes(self: &Arc<Self>, ranges: Vec<LblkRange>) -> MapChanging {
        let id = self.state().map.begin(ranges);
        MapChanging { volume: Arc::clone(self), id: Some(id) }
    }

    /// Registers a read: blocks that it finds in a map stay untouched until it has ended.
    pub fn read_begins(self: &Arc<Self>) -> ReadUnderWay {
        let mut state = self.state();
        // Whatever version the look-up will have, it is not older than what is known now.
        let version = state.map_version;
        *state.reads.entry(version).or_default() += 1;
        drop(state);
        ReadUnderWay { volume: Arc::clone(self), version }
    }
}

impl State {
    /// A map of this version, or a newer one, is what conversion has now.
    pub fn saw_map(&mut self, version: u64) {
        self.map_version = self.map_version.max(version);
    }

    /// A map of this version has this size. An answer that was under way while the volume was
    /// resized says nothing of the size now.
    pub fn saw_size(&mut self, version: u64, size_bytes: u64) {
        self.saw_map(version);
        if version > self.sized_at {
            self.durable_size_bytes = self.durable_size_bytes.max(size_bytes);
            self.size_bytes = self.size_bytes.max(size_bytes);
        }
    }

    /// The volume was resized.
    pub fn resized(&mut self, version: u64, size_bytes: u64) {
        self.saw_map(version);
        self.sized_at = self.sized_at.max(version);
        self.size_bytes = size_bytes;
        self.durable_size_bytes = size_bytes;
    }

    /// The oldest map version that a read may still use.
    pub fn oldest_read(&self) -> u64 {
        self.reads.first_key_value().map_or(self.map_version, |(version, _)| *version)
    }

    /// Blocks of direct writes under way that touch a range.
    pub fn direct_in(&self, range: LblkRange) -> impl Iterator<Item = LblkRange> + '_ {
        // The writes do not overlap, so only the last one before the range reaches into it.
        let before = self.direct.range(..range.start.0).next_back();
        let within = self.direct.range(range.start.0..range.end());
        before
            .into_iter()
            .chain(within)
            .filter_map(move |(start, len)| LblkRange::new(*start, *len).intersection(range))
    }

    /// Size that a write of blocks up to `end_bytes` makes durable; 0: it does not extend.
    pub fn size_after(&self, end_bytes: u64) -> u64 {
        if end_bytes > self.durable_size_bytes { end_bytes } else { 0 }
    }

    /// Dirty bytes: versions that wait and versions under writeback.
    pub fn dirty_bytes(&self) -> u64 {
        (self.dirty.waiting_blocks() + self.dirty.in_flight_blocks()) * BLOCK_BYTES
    }
}

/// A change of the map that was asked for. Dropping it gives it up: it may take effect at any time.
pub struct MapChanging {
    volume: Arc<Volume>,
    id: Option<ChangeId>,
}

impl MapChanging {
    /// It has ended, or died with the session in which it was asked for.
    pub fn ended(mut self, parts: Vec<Part<Arc<Extent>>>) {
        if let Some(id) = self.id.take() {
            self.volume.state().map.end(id, parts);
        }
    }
}

impl Drop for MapChanging {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.volume.state().map.give_up(id);
        }
    }
}

/// A read that is registered. Dropping it ends it.
pub struct ReadUnderWay {
    volume: Arc<Volume>,
    version: u64,
}

impl Drop for ReadUnderWay {
    fn drop(&mut self) {
        let mut state = self.volume.state();
        if let Some(count) = state.reads.get_mut(&self.version) {
            *count -= 1;
            if *count == 0 {
                state.reads.remove(&self.version);
            }
        }
    }
}
