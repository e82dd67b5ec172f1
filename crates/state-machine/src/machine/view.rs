//! Read-only views.

use endio_types::{Generation, LblkRange, Millis, Reason, SegmentIndex, StoreId, VolumeId};

use super::inspect::{HeldInfo, Holder, IoEndInfo, IoEndState, MapView, StoreInfo, VolumeInfo};
use super::{Machine, MachineError, Refusal};
use crate::chunk::CHUNK_BLOCKS;
use crate::extent_map::{self, ChunkTable, MapExtent};
use crate::ledger::IoEnd;
use crate::record::VolumeState;
use crate::token::ReadGrant;

/// What [`Machine::lookup`] returns: the inner error is a refusal to the caller.
pub(super) type LookupResult<E> = Result<Result<MapView, Refusal>, MachineError<E>>;

/// What [`Machine::next_extents`] returns: the parts, and where to go on.
pub(super) type Stretch<E> = Result<Option<(Vec<MapExtent>, u64)>, MachineError<E>>;

impl<T: ChunkTable> Machine<T> {
    /// The map of a range. The driver shows it once `MapView::seq` is durable. A generation that
    /// is not the current one sees the map but gets no grant. [`Reason::Limit`] while an aborted write
    /// in place may still land there: whoever read the old data would see the new one later, although
    /// nobody is writing any more. An empty range is never refused so.
    ///
    /// # Errors
    /// `Ok(Err(..))` is a refusal to the caller; `Err` means that the table failed.
    pub fn lookup(
        &mut self,
        volume: VolumeId,
        generation: Generation,
        range: LblkRange,
    ) -> LookupResult<T::Error> {
        let state = self.durable.volumes.get(&volume).filter(|volume| !volume.deleted);
        let Some(state) = state else {
            return Ok(Err(self.refusal(Reason::UnknownVolume, "no such volume")));
        };
        let Some(key) = self.granting_key() else {
            return Ok(Err(self.refusal(Reason::NotReady, "recovering")));
        };
        let current = state.owner.is_some() && state.generation == generation;
        if current && state.in_place && self.may_land(volume, range) {
            let message = "an aborted write in place to this range has not drained yet";
            return Ok(Err(self.refusal(Reason::Limit, message)));
        }
        let epoch = self.durable.epoch;
        let grant = current.then(|| ReadGrant::new(key, epoch, volume, generation));
        let (map_version, size_bytes) = (state.map_version, state.size_bytes);
        let extents = extent_map::lookup(&mut self.table, volume, range);
        let extents = extents.map_err(MachineError::Table)?;
        let seq = self.durable.seq;
        Ok(Ok(MapView { map_version, extents, size_bytes, grant, seq }))
    }

    /// Whether a write in place that was aborted may still land in a range: a store has not
    /// acknowledged its fence.
    fn may_land(&self, volume: VolumeId, range: LblkRange) -> bool {
        let Some(rt) = self.volumes.get(&volume) else { return false };
        rt.in_flight.overlapping(range).any(|io_end| self.ledger.get(io_end).is_none())
    }

    /// Mapped parts of a volume by name, for display; `None`: no such volume.
    ///
    /// # Errors
    /// The table failed.
    pub fn extents(
        &mut self,
        name: &str,
        range: LblkRange,
    ) -> Result<Option<Vec<MapExtent>>, MachineError<T::Error>> {
        let Some(id) = self.names.get(name).copied() else { return Ok(None) };
        extent_map::lookup(&mut self.table, id, range).map(Some).map_err(MachineError::Table)
    }

    /// The next mapped parts of a volume by name, for display, and where to go on: at the end of `range`
    /// if there is no more. Looks at `blocks_max` blocks behind a hole of any length. `None`: no such volume.
    ///
    /// # Errors
    /// The table failed.
    pub fn next_extents(
        &mut self,
        name: &str,
        range: LblkRange,
        blocks_max: u64,
    ) -> Stretch<T::Error> {
        let Some(id) = self.names.get(name).copied() else { return Ok(None) };
        let index = self.table.next_of(id, range.start.0 / CHUNK_BLOCKS);
        let index = index.map_err(MachineError::Table)?;
        let end = range.end();
        let first = index.map_or(end, |index| index.saturating_mul(CHUNK_BLOCKS));
        let first = first.clamp(range.start.0, end);
        let stretch = LblkRange::new(first, blocks_max.min(end - first));
        let extents = extent_map::lookup(&mut self.table, id, stretch);
        Ok(Some((extents.map_err(MachineError::Table)?, stretch.end())))
    }

    /// A volume by name. Shows what is applied, durable or not.
    pub fn volume(&self, name: &str) -> Option<VolumeInfo> {
        self.volume_info(*self.names.get(name)?)
    }

    /// All volumes by name.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.names.values().filter_map(|id| self.volume_info(*id)).collect()
    }

    pub(super) fn volume_info(&self, id: VolumeId) -> Option<VolumeInfo> {
        let volume: &VolumeState = self.durable.volumes.get(&id)?;
        Some(VolumeInfo {
            id,
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            replicas: volume.replicas,
            in_place: volume.in_place,
            growable: volume.growable,
            generation: volume.generation,
            map_version: volume.map_version,
            mapped_blocks: self.volumes.get(&id).map_or(0, |rt| rt.mapped_blocks),
            owner: volume.owner.clone(),
            credit_blocks: self.available_credit(id),
            logged_blocks: self.durable.logs.blocks_of(id),
            logged_number: self.durable.logs.newest(id),
        })
    }

    /// All stores by number.
    pub fn stores(&self, now: Millis) -> Vec<StoreInfo> {
        let infos = self.stores.iter().filter_map(|(id, rt)| {
            let state = self.durable.stores.get(id)?;
            let lease = rt.lease.filter(|lease| !lease.has_ended(now));
            Some(StoreInfo {
                id: *id,
                uuid: state.uuid,
                url: state.url.clone(),
                incarnation: state.incarnation,
                capacity_blocks: rt.space.capacity(),
                free_blocks: rt.space.free(),
                mapped_blocks: rt.space.mapped(),
                reserved_blocks: rt.space.reserved(),
                quarantined_blocks: rt.space.quarantined(),
                live: lease.is_some(),
                lease_left_ms: lease.map_or(0, |lease| lease.left(now)),
            })
        });
        infos.collect()
    }

    /// How much there is of what comes and goes, for metrics.
    pub fn gauges(&self, now: Millis) -> super::Gauges {
        let runs =
            |rt: &&super::state::WritebackRt| rt.lease.is_some_and(|lease| !lease.has_ended(now));
        super::Gauges {
            io_ends: self.ledger.iter().count() as u64,
            backlog: [self.lanes[0].len() as u64, self.lanes[1].len() as u64],
            writebacks: self.writebacks.values().filter(runs).count() as u64,
            fences: self.stores.values().map(|rt| rt.wait_fence.len() as u64).sum(),
            volumes: self.names.len() as u64,
            logged_blocks: self.durable.logs.blocks(),
        }
    }

    /// io_ends in flight by number, at most `limit`, and how many there are in all.
    pub fn io_ends(
        &self,
        now: Millis,
        volume: Option<VolumeId>,
        limit: usize,
    ) -> (Vec<IoEndInfo>, u64) {
        let wanted = |io_end: &&IoEnd| volume.is_none_or(|volume| io_end.volume == volume);
        let total = self.ledger.iter().filter(wanted).count() as u64;
        let infos = self.ledger.iter().filter(wanted).take(limit);
        (infos.map(|io_end| self.io_end_info(io_end, now)).collect(), total)
    }

    fn io_end_info(&self, io_end: &IoEnd, now: Millis) -> IoEndInfo {
        let held = io_end.live.iter().map(|index| self.held_info(io_end, *index, now)).collect();
        IoEndInfo {
            id: io_end.id,
            volume: io_end.volume,
            state: match io_end.live.is_empty() {
                true => IoEndState::Deferred,
                false => IoEndState::Leased,
            },
            lane: io_end.lane,
            lblk: io_end.span().start,
            blocks: u32::try_from(io_end.blocks()).unwrap_or(u32::MAX),
            attempt: io_end.attempt,
            age_ms: now.since(io_end.begun),
            held,
            traceparent: io_end.traceparent.clone(),
        }
    }

    fn held_info(&self, io_end: &IoEnd, index: SegmentIndex, now: Millis) -> HeldInfo {
        let store_lease = |id: StoreId| self.stores.get(&id).and_then(|store| store.lease);
        let (holder, lease, range) = match io_end.segment(index) {
            Some(segment) => {
                (Holder::Store(segment.store), store_lease(segment.store), Some(segment))
            }
            None => {
                let writeback = self.writebacks.get(&io_end.writeback);
                let lease = writeback.and_then(|writeback| writeback.lease);
                (Holder::Writeback(io_end.writeback.clone()), lease, None)
            }
        };
        HeldInfo {
            segment: index,
            holder,
            lease_left_ms: lease.map_or(0, |lease| lease.left(now)),
            pblk: range.map_or(endio_types::Pblk(0), |segment| segment.pblk),
            blocks: range.map_or(0, |segment| segment.blocks),
        }
    }
}
