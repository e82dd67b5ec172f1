//! BeginIo: everything fallible happens here, before anything is sent.

use std::collections::BTreeSet;

use endio_types::{
    BLOCK_BYTES, IO_END_BLOCKS_MAX, IO_END_RANGES_MAX, Incarnation, IoEndId, Lblk, LblkRange, Pblk,
    Reason, SegmentIndex, StoreId, VOLUME_BYTES_MAX, VolumeId,
};

use super::io::{BeginIo, GrantedSegment, Lane, Output, Refusal, ToWriteback, WritebackSession};
use super::state::StoreRt;
use super::{Durability, Machine, MachineError, Step};
use crate::chunk::{ExtentState, Place};
use crate::extent_map::{self, ChunkTable};
use crate::free_space::{self, Demand, Promised, Search, StoreSpace};
use crate::ledger::{IoEnd, Piece, PieceKind, Segment, owes_conversion};
use crate::limits::Limits;
use crate::record::{Run, VolumeState};
use crate::token::{MAC_LEN, Token};

/// A run of blocks on the stores before its segments have numbers: contiguous in every copy, and
/// as long as its pieces together.
struct Planned {
    /// Logical, ascending.
    pieces: Vec<LblkRange>,
    blocks: u64,
    kind: PieceKind,
    places: Vec<Place>,
}

impl Planned {
    fn start(&self) -> u64 {
        self.pieces.first().map_or(0, |piece| piece.start.0)
    }

    /// One run for each piece.
    fn split(self) -> Vec<Self> {
        let mut offset = 0;
        let mut runs = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces {
            let places = self.places.iter();
            let places = places.map(|p| Place { store: p.store, pblk: Pblk(p.pblk.0 + offset) });
            runs.push(Self {
                pieces: vec![piece],
                blocks: piece.len,
                kind: self.kind,
                places: places.collect(),
            });
            offset += piece.len;
        }
        runs
    }
}

/// What a write needs, or why it is refused.
type Plan<E> = Result<Result<Vec<Planned>, Refusal>, MachineError<E>>;

impl<T: ChunkTable> Machine<T> {
    pub(super) fn begin(
        &mut self,
        session: WritebackSession,
        name: &str,
        begin: BeginIo,
        out: &mut Output,
    ) -> Step<T> {
        let request = begin.request;
        let (after, message) = match self.try_begin(session, name, begin)? {
            Ok(begun) => (Durability::Now, begun),
            // Who hears that a volume is not its own lets go of what it has acknowledged: only if that
            // is so for good.
            Err(refusal) => match refusal.reason {
                Reason::OldGeneration | Reason::UnknownVolume => {
                    (self.when_committed(), ToWriteback::Refused { request, refusal })
                }
                _ => (Durability::Now, ToWriteback::Refused { request, refusal }),
            },
        };
        self.tell(session, after, message, out);
        Ok(())
    }

    fn try_begin(
        &mut self,
        session: WritebackSession,
        name: &str,
        begin: BeginIo,
    ) -> Result<Result<ToWriteback, Refusal>, MachineError<T::Error>> {
        let volume = match self.may_begin(name, &begin) {
            Ok(volume) => volume,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let plan = match self.plan(&volume, &begin)? {
            Ok(plan) => plan,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let request = begin.request;
        let io_end = self.enter(session, name, begin, &volume, &plan);
        let message = self.begun_message(request, &io_end);
        self.counters.begun += 1;
        self.ledger.insert(io_end);
        Ok(Ok(message))
    }

    /// The checks that need neither map nor space.
    fn may_begin(&self, name: &str, begin: &BeginIo) -> Result<VolumeState, Refusal> {
        let refuse = |reason, message| Err(self.refusal(reason, message));
        if self.granting_key().is_none() {
            return refuse(Reason::NotReady, "recovering");
        }
        if self.stopping {
            return refuse(Reason::Draining, "the service is stopping");
        }
        if self.metadata_full {
            return refuse(Reason::MetadataFull, "the metadata disk is full");
        }
        let volume = match self.owned(name, begin.volume, begin.generation) {
            Ok(volume) => volume.clone(),
            Err(reason) => return refuse(reason, "the volume is not open here"),
        };
        self.check_range(&volume, begin)?;
        let ranges = begin.ranges();
        let Some(rt) = self.volumes.get(&volume.id) else {
            return refuse(Reason::UnknownVolume, "no such volume");
        };
        if rt.by_lane[begin.lane as usize] >= self.limits.io_ends_per_volume_max {
            return refuse(Reason::Limit, "too many io_ends of the volume are in flight");
        }
        let copies = begin.blocks_total() * u64::from(volume.replicas);
        // A write larger than the limit takes its turn alone: refused for ever, it would stay dirty.
        let is_alone = self.in_flight_blocks == 0;
        if !is_alone && self.in_flight_blocks + copies > self.limits.in_flight_blocks_max {
            return refuse(Reason::Limit, "too many blocks are in flight");
        }
        let waits = |range: &LblkRange| rt.changes.iter().any(|c| c.range.overlaps(*range));
        if ranges.iter().any(waits) {
            return refuse(Reason::Limit, "a change of the map waits for this range");
        }
        // Data that is written in place reaches the disk when it likes: overlaps would mix.
        if volume.in_place && ranges.iter().any(|range| rt.in_flight.overlaps(*range)) {
            return refuse(Reason::Limit, "a write in place to this range is in flight");
        }
        Ok(volume)
    }

    fn check_range(&self, volume: &VolumeState, begin: &BeginIo) -> Result<(), Refusal> {
        let refuse = |reason, message| Err(self.refusal(reason, message));
        if begin.blocks_total() > IO_END_BLOCKS_MAX.into() {
            return refuse(Reason::Malformed, "more blocks than an io_end may have");
        }
        if begin.more.len() >= IO_END_RANGES_MAX {
            return refuse(Reason::Malformed, "more ranges than an io_end may have");
        }
        if volume.in_place && !begin.more.is_empty() {
            return refuse(Reason::Malformed, "a write in place has one range");
        }
        let ranges = begin.ranges();
        let ascend = |pair: &[LblkRange]| pair[0].end() <= pair[1].start.0;
        let has_empty = !begin.more.is_empty() && ranges.iter().any(|range| range.is_empty());
        if has_empty || !ranges.windows(2).all(ascend) {
            return refuse(Reason::Malformed, "ranges ascend, without overlap and none is empty");
        }
        let last = ranges.last().copied().unwrap_or(LblkRange { start: begin.lblk, len: 0 });
        let end = last.start.0.checked_add(last.len);
        let Some(end) = end.filter(|end| *end <= VOLUME_BYTES_MAX / BLOCK_BYTES) else {
            return refuse(Reason::OutOfRange, "beyond the largest volume");
        };
        if begin.size_after_bytes > end * BLOCK_BYTES {
            return refuse(Reason::Malformed, "the size lies beyond what is written");
        }
        let grows = begin.size_after_bytes > volume.size_bytes;
        if grows && !volume.growable {
            return refuse(Reason::OutOfRange, "the volume does not grow");
        }
        let size = volume.size_bytes.max(begin.size_after_bytes);
        if end > size.div_ceil(BLOCK_BYTES) && begin.blocks > 0 {
            return refuse(Reason::OutOfRange, "beyond the end of the volume");
        }
        Ok(())
    }

    /// Decides what each block of the write is, and reserves what it needs.
    fn plan(&mut self, volume: &VolumeState, begin: &BeginIo) -> Plan<T::Error> {
        let mut planned: Vec<Planned> = Vec::new();
        if volume.in_place {
            let range = LblkRange { start: begin.lblk, len: u64::from(begin.blocks) };
            let found = extent_map::lookup(&mut self.table, volume.id, range);
            for extent in found.map_err(MachineError::Table)? {
                planned.push(Planned {
                    pieces: vec![extent.range],
                    blocks: extent.range.len,
                    kind: match extent.state {
                        ExtentState::Written => PieceKind::Overwrite,
                        ExtentState::Unwritten => PieceKind::Unwritten,
                    },
                    places: extent.places.as_slice().to_vec(),
                });
            }
        }
        let holes = match volume.in_place {
            true => gaps(LblkRange { start: begin.lblk, len: begin.blocks.into() }, &planned),
            false => begin.ranges(),
        };
        let needed: u64 = holes.iter().map(|hole| hole.len).sum();
        if let Some(away) = self.away(volume, &planned) {
            return Ok(Err(away));
        }
        if begin.lane == Lane::WriteOut && needed > self.available_credit(volume.id) {
            let refusal = self.refusal(Reason::NoSpace, "the write-out has no credit");
            return Ok(Err(refusal));
        }
        let avoid: BTreeSet<StoreId> = begin.avoid_stores.iter().copied().collect();
        if needed > 0 {
            // Side by side on the stores, wherever they are in the volume: one segment takes them.
            let whole = LblkRange::new(0, needed);
            match self.reserve_blocks(volume.replicas, whole, Some(begin.lane), &avoid) {
                Ok(fresh) if volume.in_place => {
                    // What lies between two holes has a place already: each hole is a segment.
                    let runs = planned_runs(&fresh, &holes);
                    planned.extend(runs.into_iter().flat_map(Planned::split));
                }
                Ok(fresh) => planned.extend(planned_runs(&fresh, &holes)),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        planned.sort_by_key(Planned::start);
        Ok(Ok(planned))
    }

    /// Refuses a write in place to blocks of a store that cannot be reached.
    fn away(&self, volume: &VolumeState, planned: &[Planned]) -> Option<Refusal> {
        let places = planned.iter().flat_map(|piece| &piece.places);
        let usable = |id| self.stores.get(id).is_some_and(|rt| rt.is_usable());
        let away = places.into_iter().any(|place| !usable(&place.store));
        let refusal = self.refusal(Reason::NotEnoughStores, "the store of these blocks is away");
        (volume.in_place && away).then_some(refusal)
    }

    /// Whether the usable stores can hold so much, or their share of it: one volume with more copies than
    /// stores are here waits for others, and holds nobody else up.
    fn fits(&self, demand: &Demand) -> bool {
        let share = free_space::share_of(demand, self.stores.usable());
        free_space::is_feasible(self.stores.room(), &share)
    }

    /// Whether so much can be promised, where what is new has that many copies.
    pub(super) fn can_promise(&self, replicas: u32, demand: &Demand) -> bool {
        self.stores.usable() >= replicas as usize && self.fits(demand)
    }

    /// What an allocation must leave room for: every promise but the one that it uses itself. While stores
    /// are away, or freed blocks are not safe yet, room may be short: then what they will bring back counts,
    /// and who would take it from others by writing now waits for them. `None`: whatever is done,
    /// there is no room for all that is promised.
    fn promised_besides(&self, replicas: u32, blocks: u64, lane: Option<Lane>) -> Option<Promised> {
        let mut demand = self.credit;
        let own = demand.get_mut(replicas as usize)?;
        if lane == Some(Lane::WriteOut) {
            *own = own.saturating_sub(blocks);
        }
        let mut all = demand;
        all[replicas as usize] = all[replicas as usize].saturating_add(blocks);
        if self.fits(&all) {
            let demand = free_space::share_of(&demand, self.stores.usable());
            return Some(Promised { demand, elsewhere: Vec::new(), with_quarantined: false });
        }
        let will_have = |rt: &StoreRt| rt.space.free() + rt.space.quarantined();
        if !free_space::is_feasible(self.stores.values().map(will_have), &all) {
            return None;
        }
        let away = self.stores.values().filter(|rt| !rt.is_usable());
        let elsewhere = away.map(will_have).collect();
        Some(Promised { demand, elsewhere, with_quarantined: true })
    }

    /// Reserves blocks for a logical range. `lane`: `WriteOut` takes from the promise, everything
    /// else must leave the promises intact. Where the blocks come from leaves room for what is promised
    /// to others: that may want more copies, each on another store.
    pub(super) fn reserve_blocks(
        &mut self,
        replicas: u32,
        range: LblkRange,
        lane: Option<Lane>,
        avoid: &BTreeSet<StoreId>,
    ) -> Result<Vec<Run>, Refusal> {
        if self.stores.usable() < replicas as usize {
            let message = "fewer stores are live than the volume has replicas";
            return Err(self.refusal(Reason::NotEnoughStores, message));
        }
        if lane != Some(Lane::WriteOut) {
            let mut demand = self.credit;
            if let Some(sum) = demand.get_mut(replicas as usize) {
                *sum = sum.saturating_add(range.len);
            }
            if !self.fits(&demand) {
                return Err(self.no_room(replicas, &demand));
            }
        }
        let Limits { search_runs_max: runs, reuse_blocks, .. } = self.limits;
        let search = Search { runs, reuse_blocks };
        let promised = self.promised_besides(replicas, range.len, lane);
        let (copies, blocks) = (replicas as usize, range.len);
        let avoided: Vec<&StoreSpace> =
            avoid.iter().filter_map(|id| self.stores.usable_space(*id)).collect();
        let mut found = None;
        if !avoided.is_empty() {
            let mut promised = promised.clone();
            if let Some(promised) = &mut promised {
                let room: Vec<u64> = avoided.iter().map(|space| promised.room(space)).collect();
                promised.elsewhere.extend(room);
            }
            let (stores, promised) = (&mut self.stores, promised.as_ref());
            found = free_space::allocate(stores, avoid, copies, blocks, promised, search);
        }
        if found.is_none() {
            let (stores, promised, none) = (&mut self.stores, promised.as_ref(), BTreeSet::new());
            found = free_space::allocate(stores, &none, copies, blocks, promised, search);
        }
        let Some(found) = found else {
            let mut demand = self.credit;
            if let Some(sum) = demand.get_mut(copies).filter(|_| lane != Some(Lane::WriteOut)) {
                *sum = sum.saturating_add(blocks);
            }
            return Err(self.no_room(replicas, &demand));
        };
        let mut at = range.start.0;
        let mut runs = Vec::with_capacity(found.len());
        for copies in found {
            let blocks = copies[0].1.len;
            runs.push(Run {
                lblk: Lblk(at),
                blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
                places: copies.iter().map(|(store, range)| (*store, range.start)).collect(),
                crcs: Vec::new(),
            });
            at += blocks;
        }
        Ok(runs)
    }

    /// Why the usable stores cannot hold so much. Stores that are away count with all that they may
    /// have: while those would do, the stores are not full, and the caller had better wait.
    pub(super) fn no_room(&self, replicas: u32, demand: &Demand) -> Refusal {
        let usable = self.stores.usable();
        let may_have = |rt: &StoreRt| match rt.is_usable() {
            true => rt.space.free(),
            false => rt.space.free() + rt.space.quarantined(),
        };
        let would_fit = free_space::is_feasible(self.stores.values().map(may_have), demand);
        if usable < replicas as usize || (usable < self.stores.len() && would_fit) {
            let message = "the stores that are here cannot hold that, and others are away";
            return self.refusal(Reason::NotEnoughStores, message);
        }
        self.no_space()
    }

    /// No space; with a hint to wait if blocks are about to become free.
    fn no_space(&self) -> Refusal {
        let waits = self.stores.values().any(|rt| rt.is_usable() && rt.space.quarantined() > 0);
        let retry_after_ms = if waits { self.limits.retry_after_ms } else { 0 };
        Refusal { reason: Reason::NoSpace, message: "the stores are full", retry_after_ms }
    }

    /// Makes the io_end and accounts for it.
    fn enter(
        &mut self,
        session: WritebackSession,
        name: &str,
        begin: BeginIo,
        volume: &VolumeState,
        plan: &[Planned],
    ) -> IoEnd {
        let id = IoEndId::new(self.durable.epoch, self.next_io_end);
        self.next_io_end += 1;
        let ranges = begin.ranges();
        let (pieces, segments) = self.number(plan);
        let fresh: u64 = plan.iter().filter(|p| p.kind == PieceKind::Fresh).map(|p| p.blocks).sum();
        let credit = if begin.lane == Lane::WriteOut { fresh } else { 0 };
        self.use_credit(volume.id, credit, 0);
        self.in_flight_blocks += fresh * u64::from(volume.replicas);
        let overlapped = self.note_in_flight(volume.id, id, &ranges, begin.lane);
        let grows = begin.size_after_bytes > volume.size_bytes;
        let live = (0..=segments.len() as u32).map(SegmentIndex).collect();
        IoEnd {
            id,
            volume: volume.id,
            generation: begin.generation,
            session,
            writeback: name.to_owned(),
            lane: begin.lane,
            ranges,
            size_after_bytes: begin.size_after_bytes,
            attempt: begin.attempt,
            traceparent: begin.traceparent,
            begun: self.now,
            owes_conversion: owes_conversion(&pieces, grows && begin.blocks > 0),
            pieces,
            segments,
            live,
            credit,
            failed: None,
            released: None,
            release_order: 0,
            overlapped,
            logged_up_to: begin.logged_up_to,
        }
    }

    fn number(&self, plan: &[Planned]) -> (Vec<Piece>, Vec<Segment>) {
        let mut segments = Vec::new();
        let mut pieces = Vec::with_capacity(plan.len());
        for run in plan {
            let blocks = u32::try_from(run.blocks).unwrap_or(u32::MAX);
            let mut indexes = Vec::with_capacity(run.places.len());
            for place in &run.places {
                let state = self.durable.stores.get(&place.store);
                segments.push(Segment {
                    store: place.store,
                    incarnation: state.map_or(Incarnation(0), |state| state.incarnation),
                    pblk: place.pblk,
                    blocks,
                    outcome: None,
                });
                indexes.push(SegmentIndex(segments.len() as u32));
            }
            let mut offset = 0;
            for piece in &run.pieces {
                let blocks = u32::try_from(piece.len).unwrap_or(u32::MAX);
                let segments = indexes.clone();
                pieces.push(Piece { lblk: piece.start, blocks, kind: run.kind, segments, offset });
                offset += blocks;
            }
        }
        (pieces, segments)
    }

    /// Enters the ranges among those in flight; returns whether they overlap another's.
    fn note_in_flight(
        &mut self,
        volume: VolumeId,
        id: IoEndId,
        ranges: &[LblkRange],
        lane: Lane,
    ) -> bool {
        let Some(rt) = self.volumes.get_mut(&volume) else { return false };
        let others = ranges.iter().flat_map(|range| rt.in_flight.overlapping(*range));
        let others: Vec<IoEndId> = others.collect();
        rt.in_flight.insert(id, ranges.to_vec());
        rt.by_lane[lane as usize] += 1;
        for other in &others {
            if let Some(io_end) = self.ledger.get_mut(*other) {
                io_end.overlapped = true;
            }
        }
        !others.is_empty()
    }

    fn begun_message(&self, request: u64, io_end: &IoEnd) -> ToWriteback {
        let mut segments = Vec::with_capacity(io_end.segments.len());
        let mut offset_blocks = 0;
        for piece in &io_end.pieces {
            // What shares its segments with the piece before is told with that.
            if piece.offset == 0 {
                for (replica, index) in (0..).zip(&piece.segments) {
                    let (token, lblk) = (self.token(io_end, *index), piece.lblk);
                    segments.push(GrantedSegment { token, lblk, offset_blocks, replica });
                }
            }
            offset_blocks += piece.blocks;
        }
        ToWriteback::Begun {
            request,
            submitter: self.token(io_end, SegmentIndex::SUBMITTER),
            segments,
            owes_conversion: io_end.owes_conversion,
        }
    }

    /// The token of an io_end as it was granted.
    pub(super) fn token(&self, io_end: &IoEnd, index: SegmentIndex) -> Token {
        let segment = io_end.segment(index);
        let token = Token {
            epoch: self.durable.epoch,
            io_end: io_end.id,
            segment: index,
            volume: io_end.volume,
            generation: io_end.generation,
            store: segment.map_or(StoreId(0), |segment| segment.store),
            incarnation: segment.map_or(Incarnation(0), |segment| segment.incarnation),
            pblk: segment.map_or(Pblk(0), |segment| segment.pblk),
            blocks: segment.map_or(0, |segment| segment.blocks),
            lease_ms: self.limits.lease_ms,
            mac: [0; MAC_LEN],
        };
        match &self.key {
            Some(key) => token.signed(key),
            None => token,
        }
    }
}

/// Lays logical ranges over runs of fresh blocks, in order; both have the same number of blocks.
fn planned_runs(runs: &[Run], holes: &[LblkRange]) -> Vec<Planned> {
    let mut rest = holes.iter().copied().filter(|hole| hole.len > 0);
    let mut hole = rest.next();
    let mut planned = Vec::with_capacity(runs.len());
    for run in runs {
        let mut left = u64::from(run.blocks);
        let mut pieces = Vec::new();
        while let Some(at) = hole.filter(|_| left > 0) {
            let len = at.len.min(left);
            pieces.push(LblkRange::new(at.start.0, len));
            left -= len;
            hole = match at.len > len {
                true => Some(LblkRange::new(at.start.0 + len, at.len - len)),
                false => rest.next(),
            };
        }
        let places = run.places.iter().map(|(store, pblk)| Place { store: *store, pblk: *pblk });
        planned.push(Planned {
            pieces,
            blocks: u64::from(run.blocks),
            kind: PieceKind::Fresh,
            places: places.collect(),
        });
    }
    planned
}

/// The parts of `range` that no piece covers; the pieces are ascending.
fn gaps(range: LblkRange, planned: &[Planned]) -> Vec<LblkRange> {
    let mut gaps = Vec::new();
    let mut at = range.start.0;
    for piece in planned.iter().flat_map(|run| &run.pieces) {
        if at < piece.start.0 {
            gaps.push(LblkRange::new(at, piece.start.0 - at));
        }
        at = piece.end();
    }
    if at < range.end() {
        gaps.push(LblkRange::new(at, range.end() - at));
    }
    gaps
}
