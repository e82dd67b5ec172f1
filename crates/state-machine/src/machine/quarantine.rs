//! When a block may be handed out again; fences; punching.
//!
//! A quarantined block waits for exactly one of these at a time:
//! * `wait_epoch`: the store has not drained older epochs yet;
//! * `wait_fence`: an aborted io_end may still write it;
//! * [`FreedAt`]: the record that freed it is not durable;
//! * [`Reads::freed`]: a read under an older map version may still be in flight;
//! * a punch that is under way.
//!
//! A store that starts again (newer incarnation) has nothing in flight, but has also forgotten
//! which generations are fenced: they are fenced again before blocks that wait for that move on.

use std::collections::{BTreeMap, BTreeSet};

use endio_types::planted::{self, Bug};
use endio_types::{Generation, IoEndId, MapVersion, Millis, PblkRange, StoreId, VolumeId};

use super::io::{EffectKind, Output, ToStore};
use super::state::{FenceOut, FreedAt, Reads, StoreRt};
use super::{Durability, Machine, Step};
use crate::chunk::Change;
use crate::extent_map::ChunkTable;
use crate::free_space::WrongClass;
use crate::limits::Limits;
use crate::record::{Run, Seq};

const NO_STORE: WrongClass = WrongClass("blocks of a store that does not exist");

impl<T: ChunkTable> Machine<T> {
    /// Moves the blocks of a run that got into the map from reserved to mapped.
    pub(super) fn account_mapped(&mut self, volume: VolumeId, run: &Run) -> Step<T> {
        for (store, pblk) in &run.places {
            let mut rt = self.stores.get_mut(store).ok_or(NO_STORE)?;
            let range = PblkRange { start: *pblk, len: u64::from(run.blocks) };
            if rt.space.map_reserved(range)? {
                self.volumes.entry(volume).or_default().mapped_blocks += range.len;
            }
        }
        Ok(())
    }

    /// Quarantines what a record freed.
    pub(super) fn account_freed(&mut self, volume: VolumeId, seq: Seq, change: &Change) -> Step<T> {
        let version = self.durable.volumes.get(&volume).map_or(MapVersion(0), |v| v.map_version);
        for piece in &change.freed {
            let mut rt = self.stores.get_mut(&piece.store).ok_or(NO_STORE)?;
            rt.space.quarantine_mapped(piece.range)?;
            let mapped = &mut self.volumes.entry(volume).or_default().mapped_blocks;
            *mapped = mapped.saturating_sub(piece.range.len);
            let (store, range) = (piece.store, piece.range);
            self.freed.push_back(FreedAt { seq, volume, version, store, range });
        }
        Ok(())
    }

    /// Moves on what was freed by records that are durable now.
    pub(super) fn settle_committed(&mut self) -> Step<T> {
        let mut touched = BTreeSet::new();
        while let Some(freed) = self.freed.front().copied() {
            if freed.seq > self.committed && !planted::is(Bug::FreedBeforeDurable) {
                break;
            }
            self.freed.pop_front();
            let reads = self.reads.entry(freed.volume).or_default();
            reads.freed.entry(freed.store).or_default().push_back((freed.version, freed.range));
            self.readers_awaited.insert(freed.volume);
            touched.insert(freed.volume);
        }
        for volume in touched {
            self.settle_reads(volume)?;
        }
        Ok(())
    }

    /// Moves on what no read of the volume can touch any more. An owner that is over has nobody who could be
    /// given what its reads find.
    pub(super) fn settle_reads(&mut self, volume: VolumeId) -> Step<T> {
        let owner = self.durable.volumes.get(&volume).and_then(|v| v.owner.as_deref());
        let is_open = owner.is_some_and(|owner| !self.is_over(owner));
        let Some(reads) = self.reads.get_mut(&volume) else { return Ok(()) };
        let needed = reads.min_generation.unwrap_or(Generation(0));
        for (store, queue) in &mut reads.freed {
            let acked = reads.acked.get(store).copied().unwrap_or(Generation(0));
            let is_lax = planted::is(Bug::ReadersIgnored);
            if acked < needed && !is_lax {
                continue;
            }
            let mut rt = self.stores.get_mut(store).ok_or(NO_STORE)?;
            while let Some((version, range)) = queue.front().copied() {
                if is_open && version > reads.confirmed && !is_lax {
                    break;
                }
                queue.pop_front();
                rt.space.release(range, false)?;
            }
        }
        reads.freed.retain(|_, queue| !queue.is_empty());
        if reads.freed.is_empty() {
            self.readers_awaited.remove(&volume);
        }
        Ok(())
    }

    /// From now on only `generation` and newer of a volume are accepted.
    pub(super) fn fence_generation(&mut self, volume: VolumeId, generation: Generation) {
        let reads = self.reads.entry(volume).or_default();
        reads.min_generation = Some(generation);
        self.stores.for_each_mut(|rt| {
            rt.fence_volumes.insert(volume, generation);
        });
    }

    /// Quarantines reserved blocks that an aborted or partly unsent io_end may still write.
    pub(super) fn quarantine_until_fenced(
        &mut self,
        io_end: IoEndId,
        store: StoreId,
        range: PblkRange,
    ) -> Step<T> {
        let mut rt = self.stores.get_mut(&store).ok_or(NO_STORE)?;
        rt.space.quarantine_reserved(range)?;
        if planted::is(Bug::AbortedIsFree) {
            rt.space.release(range, false)?;
            return Ok(());
        }
        rt.wait_fence.entry(io_end).or_default().push(range);
        rt.fence_io_ends.insert(io_end);
        Ok(())
    }

    /// Sends the next fence to each store that has none outstanding.
    pub(super) fn send_fences(&mut self, out: &mut Output) {
        let newest = self.when_committed();
        for id in self.stores.want_fence() {
            let Some(mut rt) = self.stores.get_mut(&id) else { continue };
            let Some(session) = rt.session else { continue };
            let max = self.limits.fence_io_ends_max;
            let io_ends: Vec<IoEndId> =
                std::iter::from_fn(|| rt.fence_io_ends.pop_first()).take(max).collect();
            let volumes: Vec<_> =
                std::iter::from_fn(|| rt.fence_volumes.pop_first()).take(max).collect();
            let fence = FenceOut { id: self.next_command, io_ends, volumes };
            self.next_command += 1;
            let message = fence_message(&fence);
            let kind = EffectKind::Store(session, message);
            // What a store refuses under an old generation its owner takes for gone: not before it is.
            let is_early = fence.volumes.is_empty() || planted::is(Bug::FreedBeforeDurable);
            let after = match is_early {
                true => after(&rt, self.committed),
                false => newest,
            };
            out.effects.push(super::Effect { after, kind });
            rt.fence = Some(fence);
        }
    }

    /// A store has drained everything up to a fence.
    pub(super) fn fence_done(&mut self, store: StoreId, fence: u64) -> Step<T> {
        let Some(mut rt) = self.stores.get_mut(&store) else { return Ok(()) };
        let Some(done) = rt.fence.take_if(|out| out.id == fence) else { return Ok(()) };
        for io_end in &done.io_ends {
            for range in rt.wait_fence.remove(io_end).unwrap_or_default() {
                rt.space.release(range, false)?;
            }
        }
        drop(rt);
        for (volume, generation) in &done.volumes {
            if let Some(reads) = self.reads.get_mut(volume) {
                reads.acked.insert(store, *generation);
            }
            self.settle_reads(*volume)?;
        }
        for io_end in done.io_ends {
            self.in_place_fenced(io_end, store);
        }
        Ok(())
    }

    /// An aborted io_end that wrote in place keeps its range until every store has fenced it.
    fn in_place_fenced(&mut self, io_end: IoEndId, store: StoreId) {
        let Some(volume) = self.ledger.lingers(io_end) else { return };
        let waits = self.stores.iter().any(|(id, rt)| {
            let outstanding = rt.fence.as_ref().is_some_and(|f| f.io_ends.contains(&io_end));
            *id != store && (outstanding || rt.fence_io_ends.contains(&io_end))
        });
        if waits {
            return;
        }
        self.ledger.lingers_no_more(io_end);
        if let Some(rt) = self.volumes.get_mut(&volume) {
            rt.in_flight.remove(io_end);
        }
    }

    /// A newer incarnation of a store registered: nothing of the old one is in flight.
    pub(super) fn drained_by_restart(&mut self, store: StoreId) -> Step<T> {
        let Some(mut rt) = self.stores.get_mut(&store) else { return Ok(()) };
        let mut fenced: Vec<IoEndId> = rt.fence_io_ends.iter().copied().collect();
        if let Some(fence) = rt.fence.take() {
            fenced.extend(fence.io_ends);
        }
        rt.fence_io_ends.clear();
        let waited: BTreeMap<IoEndId, Vec<PblkRange>> = std::mem::take(&mut rt.wait_fence);
        for range in waited.into_values().flatten() {
            rt.space.release(range, false)?;
        }
        if let Some((_, ranges)) = rt.punch.take() {
            for range in ranges {
                rt.space.release(range, false)?;
            }
        }
        rt.fence_volumes.clear();
        for (volume, reads) in &mut self.reads {
            reads.acked.remove(&store);
            if let Some(generation) = reads.min_generation {
                rt.fence_volumes.insert(*volume, generation);
            }
        }
        drop(rt);
        for io_end in fenced {
            self.in_place_fenced(io_end, store);
        }
        Ok(())
    }

    /// A store has drained everything of older epochs.
    pub(super) fn drained_by_epoch(&mut self, store: StoreId) -> Step<T> {
        let Some(mut rt) = self.stores.get_mut(&store) else { return Ok(()) };
        for range in std::mem::take(&mut rt.wait_epoch) {
            rt.space.release(range, false)?;
        }
        Ok(())
    }

    /// Whether a store could get a punch now, or writebacks have something to hear of one.
    pub(super) fn stores_want_a_turn(&self) -> bool {
        let can_punch = self.stores.next_punch().is_some_and(|at| at <= self.now);
        can_punch || self.has_news()
    }

    /// Gives free blocks back to the host file systems, a bounded batch per store at a time.
    pub(super) fn send_punches(&mut self, out: &mut Output) {
        let now = self.now;
        for id in self.stores.can_be_punched(now) {
            let Some(mut rt) = self.stores.get_mut(&id) else { continue };
            let Some(session) = rt.session else { continue };
            let limits = &self.limits;
            rt.next_punch = now.plus(limits.punch_interval_ms);
            let least = least_punched(&rt, now, limits);
            let (ranges, blocks) = (limits.punch_ranges_max, limits.punch_blocks_max);
            let ranges = rt.space.take_unpunched(least, ranges, blocks);
            if ranges.is_empty() {
                continue;
            }
            let punch = self.next_command;
            self.next_command += 1;
            rt.punch = Some((punch, ranges.clone()));
            let kind = EffectKind::Store(session, ToStore::Punch { punch, ranges });
            out.effects.push(super::Effect { after: after(&rt, self.committed), kind });
        }
    }

    /// A punch is done: its blocks are free and holes.
    pub(super) fn punch_done(&mut self, store: StoreId, punch: u64) -> Step<T> {
        let Some(mut rt) = self.stores.get_mut(&store) else { return Ok(()) };
        let Some((_, ranges)) = rt.punch.take_if(|(id, _)| *id == punch) else { return Ok(()) };
        for range in ranges {
            rt.space.release(range, true)?;
        }
        Ok(())
    }
}

/// Blocks that a run needs at least to be punched now.
fn least_punched(rt: &StoreRt, now: Millis, limits: &Limits) -> u64 {
    let is_written = rt.written_at.is_some_and(|at| now < at.plus(limits.punch_idle_ms));
    match is_written && rt.space.unpunched() <= limits.unpunched_blocks_max {
        true => limits.punch_run_blocks,
        false => 1,
    }
}

/// What goes to a store must not overtake its registration.
pub(super) fn after(rt: &StoreRt, committed: Seq) -> Durability {
    match rt.registered > committed {
        true => Durability::Committed(rt.registered),
        false => Durability::Now,
    }
}

/// The message of a fence; sent again as it was when the store comes back.
pub(super) fn fence_message(fence: &FenceOut) -> ToStore {
    ToStore::Fence {
        fence: fence.id,
        io_ends: fence.io_ends.clone(),
        volumes: fence.volumes.clone(),
    }
}

impl Reads {
    /// For a volume that is opened: its reads use the map as it is now.
    pub(super) fn opened(&mut self, version: MapVersion) {
        self.confirmed = version;
    }
}
