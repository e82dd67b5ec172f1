//! A volume that is open here: its dirty blocks, its credit, its errors, its readers.
//!
//! One mutex guards the state; it is never held across an await or I/O. Whoever waits for the
//! state to change waits on [`Volume::wait`], which cannot miss a change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use endio_api::common::{Extent, ReadGrant};
use endio_chassis::trace::Context;
use endio_failpoints::{Bug, is_planted};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::attempts::Attempts;
use endio_state_machine::writeback::credit::{Credit, CreditPolicy};
use endio_state_machine::writeback::dirty::DirtyMap;
use endio_state_machine::writeback::errseq::{Cursor, ErrSeq};
use endio_state_machine::writeback::fragments::Fragments;
use endio_state_machine::writeback::groups::Groups;
use endio_state_machine::writeback::log_turns::LogTurns;
use endio_state_machine::writeback::map_cache::{ChangeId, MapCache, Part};
use endio_state_machine::writeback::rhythm::Rhythm;
use endio_state_machine::writeback::view::VolumeView;
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange, MapVersion, Reason, VOLUME_BYTES_MAX};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::clean::{CleanBlocks, VolumeBlocks};
use crate::engine::Meter;
use crate::engine::direct::Waiting;
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
    /// Most blocks that conversion's data log holds of it; 0: it takes none.
    pub log_blocks_max: u64,
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
    /// Its size, and the versions of its map that reads use.
    pub view: VolumeView,
    /// Acknowledged and not yet converted.
    pub dirty: DirtyMap<CachedBlock>,
    /// Since when something is dirty.
    pub dirty_since: Option<Instant>,
    /// Space promised by conversion.
    pub credit: Credit,
    /// Number of the request that sets the credit anew, while its answer is owed. Until then it is
    /// not known whether the volume is still open here.
    pub credit_reset: Option<u64>,
    /// Why conversion promised no more space when it was asked last.
    pub credit_refusal: Option<Failure>,
    /// Failed write-outs.
    pub errors: ErrSeq<Failure>,
    /// Counts the failed write-outs.
    pub error_count: u64,
    /// Acknowledged writes may be missing since a power loss or a takeover: what everybody who comes back
    /// is told once, whenever that is.
    pub loss: Option<Loss>,
    /// What callers of the unary Fsync were told; they have no identity of their own.
    pub told: Cursor,
    /// Write-outs up to this record are wanted now.
    pub flush_up_to: Lsn,
    /// What is known of the map.
    pub map: MapCache<Arc<Extent>>,
    /// Blocks that were read, as the map shows them now. Never of a volume that is written in place.
    pub clean: VolumeBlocks,
    /// What is read in sequence and lies in many pieces.
    pub fragments: Fragments,
    /// Tries of changes of the map.
    pub attempts: Attempts,
    /// Changes of the map that were given up and keep their blocks locked.
    pub settling: usize,
    /// Write-outs under way.
    pub write_outs: usize,
    /// Messages to the data log.
    pub log_turns: LogTurns,
    /// How buffered writes and flushes follow each other.
    pub rhythm: Rhythm,
    /// The newest record that says that blocks of this volume are converted.
    pub last_clean: Lsn,
    /// Write-out rests until then, after a failure.
    pub rest_until: Option<Instant>,
    /// Until then the cache takes large writes, too: the stores did not answer one in time.
    pub around_rests_until: Option<Instant>,
    /// Permission to read, as conversion gave it last.
    pub grant: Option<ReadGrant>,
    /// Bytes of direct writes under way.
    pub direct_bytes: u64,
    /// First block and number of blocks of the direct writes under way; their locks keep them apart.
    pub direct: BTreeMap<u64, u64>,
    /// Direct writes that wait to share an io_end.
    pub(crate) direct_groups: Groups<Waiting>,
    /// It is being closed or deleted at conversion, and may be somebody else's at any moment.
    pub leaving: bool,
    /// Why the volume is not usable here any more.
    pub gone: Option<Failure>,
}

/// Bounds of one volume.
#[derive(Debug, Clone)]
pub struct VolumeLimits {
    /// How much credit is asked for.
    pub credit: CreditPolicy,
    /// Runs of blocks of the map that are remembered.
    pub map_entries_max: usize,
    /// Where clean blocks are kept.
    pub clean: Arc<CleanBlocks>,
}

/// A loss of acknowledged writes, and who was told of it.
pub struct Loss {
    why: Failure,
    told: BTreeSet<String>,
    /// When it was found: whoever has written only since has lost nothing.
    found: Instant,
}

/// Observers remembered as told; beyond, somebody may be told twice.
const TOLD_MAX: usize = 4_096;
/// Messages of a volume to the data log under way.
const LOG_MESSAGES_MAX: usize = 2;

impl Loss {
    /// Nobody was told.
    pub fn new(why: Failure) -> Self {
        Self { why, told: BTreeSet::new(), found: Instant::now() }
    }

    /// When it was found.
    pub fn found(&self) -> Instant {
        self.found
    }

    /// Whether this observer has yet to be told.
    pub fn is_untold(&self, who: &str) -> bool {
        !self.told.contains(who)
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
    /// Newest number in its data log.
    pub logged_number: u64,
    /// Most blocks that the data log may hold of it; 0: it takes none.
    pub log_blocks_max: u64,
}

impl State {
    /// Whether somebody of that name has yet to hear of a loss of acknowledged writes.
    pub fn is_loss_untold(&self, who: Option<&str>) -> bool {
        who.zip(self.loss.as_ref()).is_some_and(|(who, loss)| loss.is_untold(who))
    }

    /// What somebody of that name has to be told of a loss, once.
    pub fn tell_loss(&mut self, who: Option<&str>) -> Option<Failure> {
        who.zip(self.loss.as_mut()).and_then(|(who, loss)| loss.tell(who))
    }
}

impl Volume {
    /// A volume that was opened just now, with nothing dirty.
    pub fn new(opened: Opened, limits: VolumeLimits) -> Self {
        let Opened { volume, grant, logged_number, log_blocks_max, .. } = opened;
        let mut dirty = DirtyMap::new();
        dirty.log_numbers_from(logged_number);
        let errors = ErrSeq::new();
        let told = errors.sample();
        Self {
            id: volume.id,
            name: volume.name.into(),
            generation: volume.generation,
            in_place: volume.in_place,
            growable: volume.growable,
            log_blocks_max,
            locks: Arc::default(),
            writes: Meter::default(),
            reads: Meter::default(),
            state: Mutex::new(State {
                view: VolumeView::new(MapVersion(volume.map_version), volume.size_bytes),
                dirty,
                dirty_since: None,
                credit: Credit::new(limits.credit),
                credit_reset: None,
                credit_refusal: None,
                errors,
                error_count: 0,
                loss: None,
                told,
                flush_up_to: Lsn(0),
                clean: limits.clean.volume(),
                map: MapCache::new(if volume.in_place { 0 } else { limits.map_entries_max }),
                fragments: Fragments::default(),
                attempts: Attempts::default(),
                settling: 0,
                write_outs: 0,
                log_turns: LogTurns::new(LOG_MESSAGES_MAX),
                rhythm: Rhythm::default(),
                last_clean: Lsn(0),
                rest_until: None,
                around_rests_until: None,
                grant,
                direct_bytes: 0,
                direct: BTreeMap::new(),
                direct_groups: Groups::default(),
                leaving: false,
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

    /// As [`Volume::changed`], where nothing changed that the flusher does not look at by itself.
    pub fn changed_for_waiters(&self) {
        self.changed.notify_waiters();
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

    /// The volume is not usable here any more; every waiter hears why. The first reason stays. Says
    /// whether a client of this writeback has yet to hear that acknowledged writes are lost: `owe` is
    /// called then, before anybody sees that the volume is gone.
    pub fn let_go(&self, why: Failure, owe: impl FnOnce()) -> bool {
        let is_owed = {
            let mut state = self.state();
            let is_first = state.gone.is_none();
            state.gone.get_or_insert(why);
            let is_owed = is_first && state.goes_with_a_loss();
            if is_owed {
                owe();
            }
            is_owed
        };
        self.changed();
        is_owed
    }

    /// Acknowledged writes are lost: each client is told once, whenever it comes.
    pub fn has_lost(&self) {
        if is_planted(Bug::LossUntold) {
            return;
        }
        let detail = "acknowledged writes may be missing: the machine lost its power, or the volume \
                      was taken by another writeback, before they were flushed";
        let lost = Failure::new(Reason::LostWrites, detail);
        let mut state = self.state();
        state.errors.set(lost.clone());
        state.loss = Some(Loss::new(lost));
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
        if end > state.view.size_bytes() && !(extends && self.growable) {
            return Err(beyond());
        }
        Ok(bytes.blocks())
    }

    /// A change of the map of these blocks is about to be asked for.
    pub fn map_changes(self: &Arc<Self>, ranges: Vec<LblkRange>) -> MapChanging {
        let id = {
            let mut state = self.state();
            for range in &ranges {
                state.clean.forget(*range);
            }
            state.map.begin(ranges)
        };
        MapChanging { volume: Arc::clone(self), id: Some(id) }
    }

    /// Registers a read: blocks that it finds in a map stay untouched until it has ended.
    pub fn read_begins(self: &Arc<Self>) -> ReadUnderWay {
        let version = self.state().view.read_begins();
        ReadUnderWay { volume: Arc::clone(self), version }
    }
}

impl State {
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

    /// Whether something acknowledged is neither on the stores nor in the data log, or nobody has heard
    /// of an earlier loss.
    fn goes_with_a_loss(&self) -> bool {
        self.dirty.pending_up_to(Lsn(u64::MAX))
            || self.errors.untold().is_some_and(Failure::is_loss)
    }

    /// What is dirty up to a record is wanted out now.
    pub fn flush_up_to_at_least(&mut self, lsn: Lsn) {
        self.flush_up_to = self.flush_up_to.max(lsn);
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
    version: MapVersion,
}

impl Drop for ReadUnderWay {
    fn drop(&mut self) {
        self.volume.state().view.read_ends(self.version);
    }
}
