//! Changes of the map without data: trim, allocate, zero, shrink, delete.
//!
//! A change waits in line while io_ends in flight overlap its range, and new ones are refused
//! meanwhile, so it is never starved and nothing can come back to life below it. It then runs in
//! bounded steps, one record each, that visit only chunks which exist.

use std::collections::BTreeSet;

use endio_types::{BLOCK_BYTES, LblkRange, Reason, VolumeId};

use super::io::{MapChange, Output, ReplyBody};
use super::state::{PendingChange, Work};
use super::{Machine, MachineError, Step};
use crate::chunk::CHUNK_BLOCKS;
use crate::extent_map::{self, ChunkTable};
use crate::record::Record;

/// Whether a change is done.
type Progress<E> = Result<bool, MachineError<E>>;

impl<T: ChunkTable> Machine<T> {
    /// Whether the first change of a volume can make progress now.
    pub(super) fn change_can_run(&self, volume: VolumeId) -> bool {
        let Some(rt) = self.volumes.get(&volume) else { return false };
        let Some(change) = rt.changes.front() else { return false };
        !rt.in_flight.overlaps(change.range)
    }

    /// Makes one step of the change of one volume, of the next in turn that can run, and one step
    /// of freeing a deleted volume.
    pub(super) fn step_changes(&mut self, out: &mut Output) -> Step<T> {
        let behind = self.changing.range(self.change_turn..);
        let turns = behind.chain(self.changing.range(..self.change_turn)).copied();
        let next = turns.filter(|volume| self.change_can_run(*volume)).take(8);
        let next: Vec<VolumeId> = next.collect();
        for volume in next {
            self.change_turn = VolumeId(volume.0 + 1);
            self.step_change(volume, out)?;
        }
        if let Some(volume) = self.purging.first().copied() {
            self.step_purge(volume, out)?;
        }
        Ok(())
    }

    fn step_change(&mut self, volume: VolumeId, out: &mut Output) -> Step<T> {
        let rt = self.volumes.get_mut(&volume);
        let Some(mut change) = rt.and_then(|rt| rt.changes.pop_front()) else { return Ok(()) };
        let is_done = match change.work {
            Work::Map(kind) => self.step_map(volume, &mut change, kind, out)?,
            Work::Shrink(size) => self.step_shrink(volume, &mut change, size, out)?,
            Work::Delete => self.start_delete(volume, &change, out)?,
        };
        let Some(rt) = self.volumes.get_mut(&volume) else { return Ok(()) };
        if !is_done {
            rt.changes.push_front(change);
        }
        if rt.changes.is_empty() {
            self.changing.remove(&volume);
        }
        Ok(())
    }

    /// The part of the rest of a range that one step may handle: at most so many existing chunks.
    /// `None`: nothing is mapped in the rest.
    fn next_mapped(
        &mut self,
        volume: VolumeId,
        rest: LblkRange,
    ) -> Result<Option<LblkRange>, MachineError<T::Error>> {
        let mut end = None;
        let mut index = rest.start.0 / CHUNK_BLOCKS;
        for _ in 0..self.limits.change_chunks_max {
            let found = self.table.next_of(volume, index).map_err(MachineError::Table)?;
            let Some(found) = found.filter(|found| found * CHUNK_BLOCKS < rest.end()) else {
                break;
            };
            index = found + 1;
            end = Some(index * CHUNK_BLOCKS);
        }
        Ok(end.map(|end| LblkRange::new(rest.start.0, end.min(rest.end()) - rest.start.0)))
    }

    fn step_map(
        &mut self,
        volume: VolumeId,
        change: &mut PendingChange,
        kind: MapChange,
        out: &mut Output,
    ) -> Progress<T::Error> {
        let rest = rest_of(change);
        let part = match kind {
            MapChange::Trim | MapChange::Zero => self.next_mapped(volume, rest)?,
            // Holes are the work here; the chunks they lie in need not exist.
            MapChange::Allocate => {
                let len = self.limits.change_chunks_max * CHUNK_BLOCKS;
                (rest.len > 0).then(|| LblkRange { len: rest.len.min(len), ..rest })
            }
        };
        let Some(part) = part else {
            return self.map_changed(volume, change, kind, out);
        };
        let refused = match kind {
            MapChange::Trim => {
                change.blocks_changed += self.unmap(volume, part, out)?;
                None
            }
            MapChange::Zero => {
                let record = Record::Zero { volume, range: part };
                let zeroed: u64 =
                    self.commit(record, out)?.iter().map(|(_, c)| c.written.unsigned_abs()).sum();
                let replicas = self.durable.volumes.get(&volume).map_or(1, |v| v.replicas);
                change.blocks_changed += zeroed * u64::from(replicas);
                None
            }
            MapChange::Allocate => self.allocate(volume, part, change, out)?,
        };
        if let Some(refusal) = refused {
            self.reply(change.reply, Err(refusal), out);
            return Ok(true);
        }
        change.cursor = part.end();
        if change.cursor >= change.range.end() {
            return self.map_changed(volume, change, kind, out);
        }
        Ok(false)
    }

    /// What was logged of a range is forgotten behind its change: the other way round a crash
    /// between the two would show what the map had before the flush.
    fn map_changed(
        &mut self,
        volume: VolumeId,
        change: &PendingChange,
        kind: MapChange,
        out: &mut Output,
    ) -> Progress<T::Error> {
        let is_gone = kind != MapChange::Allocate;
        let range = change.range;
        if is_gone && self.durable.logs.has(volume, range, u64::MAX) {
            self.commit(Record::ForgetLogged { volume, range }, out)?;
        }
        self.reply_changed(volume, change, out);
        Ok(true)
    }

    fn unmap(
        &mut self,
        volume: VolumeId,
        range: LblkRange,
        out: &mut Output,
    ) -> Result<u64, MachineError<T::Error>> {
        let changes = self.commit(Record::Unmap { volume, range }, out)?;
        let freed = changes.iter().flat_map(|(_, change)| &change.freed);
        Ok(freed.map(|piece| piece.range.len).sum())
    }

    /// Fills the holes of a part. What earlier parts allocated stays after a refusal.
    fn allocate(
        &mut self,
        volume: VolumeId,
        part: LblkRange,
        change: &mut PendingChange,
        out: &mut Output,
    ) -> Result<Option<super::Refusal>, MachineError<T::Error>> {
        let holes =
            extent_map::holes(&mut self.table, volume, part).map_err(MachineError::Table)?;
        let replicas = self.durable.volumes.get(&volume).map_or(1, |v| v.replicas);
        let mut runs = Vec::new();
        let mut refused = None;
        for hole in holes {
            match self.reserve_blocks(replicas, hole, None, &BTreeSet::new()) {
                Ok(found) => runs.extend(found),
                Err(refusal) => {
                    refused = Some(refusal);
                    break;
                }
            }
        }
        let blocks: u64 = runs.iter().map(|run| u64::from(run.blocks)).sum();
        change.blocks_changed += blocks * u64::from(replicas);
        if !runs.is_empty() {
            self.commit(Record::Allocate { volume, runs }, out)?;
        }
        Ok(refused)
    }

    fn reply_changed(&self, volume: VolumeId, change: &PendingChange, out: &mut Output) {
        let body = match self.durable.volumes.get(&volume) {
            Some(state) => Ok(ReplyBody::Changed {
                map_version: state.map_version,
                blocks_changed: change.blocks_changed,
            }),
            None => Err(self.unknown()),
        };
        self.reply(change.reply, body, out);
    }

    fn step_shrink(
        &mut self,
        volume: VolumeId,
        change: &mut PendingChange,
        size: u64,
        out: &mut Output,
    ) -> Progress<T::Error> {
        if let Some(part) = self.next_mapped(volume, rest_of(change))? {
            self.unmap(volume, part, out)?;
            change.cursor = part.end();
            if change.cursor < change.range.end() {
                return Ok(false);
            }
        }
        let old = self.durable.volumes.get(&volume).map(|state| state.size_bytes);
        // What is not converted may lie behind an end that stays where it is.
        if old != Some(size) || self.durable.logs.reaches_behind(volume, size) {
            self.commit(Record::Resize { volume, size_bytes: size }, out)?;
        }
        self.reply_volume(change.reply, volume, out);
        Ok(true)
    }

    /// The volume is gone for everybody; its blocks follow in [`Self::step_purge`].
    fn start_delete(
        &mut self,
        volume: VolumeId,
        change: &PendingChange,
        out: &mut Output,
    ) -> Progress<T::Error> {
        let Some(state) = self.durable.volumes.get(&volume).cloned() else { return Ok(true) };
        self.names.remove(&state.name);
        self.deletions += 1;
        let next = endio_types::Generation(state.generation.0 + 1);
        if state.generation.0 > 0 {
            self.fence_generation(volume, next);
        }
        self.commit(Record::DeleteVolume { volume }, out)?;
        self.reply(change.reply, Ok(ReplyBody::Deleted), out);
        self.drop_changes(volume, Reason::UnknownVolume, "the volume was deleted", out);
        self.purging.insert(volume);
        self.settle_reads(volume)?;
        Ok(true)
    }

    fn step_purge(&mut self, volume: VolumeId, out: &mut Output) -> Step<T> {
        let whole = LblkRange::new(0, LAST_BLOCK);
        if let Some(part) = self.next_mapped(volume, whole)? {
            self.unmap(volume, part, out)?;
            return Ok(());
        }
        self.commit(Record::ForgetVolume { volume }, out)?;
        self.purging.remove(&volume);
        self.volumes.remove(&volume);
        Ok(())
    }

    /// Answers every change of a volume that waits with a refusal. Steps already made stay.
    pub(super) fn drop_changes(
        &mut self,
        volume: VolumeId,
        reason: Reason,
        message: &'static str,
        out: &mut Output,
    ) {
        self.changing.remove(&volume);
        let Some(rt) = self.volumes.get_mut(&volume) else { return };
        let dropped = std::mem::take(&mut rt.changes);
        for change in dropped {
            let refusal = self.refusal(reason, message);
            self.reply(change.reply, Err(refusal), out);
        }
    }
}

fn rest_of(change: &PendingChange) -> LblkRange {
    let end = change.range.end().min(LAST_BLOCK);
    LblkRange::new(change.cursor, end.saturating_sub(change.cursor))
}

/// First block beyond the largest volume.
const LAST_BLOCK: u64 = endio_types::VOLUME_BYTES_MAX / BLOCK_BYTES;
