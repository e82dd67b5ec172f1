//! What a block-store refuses, and what must drain before it may say so.
//!
//! ```text
//!              admit_bio                      finish
//!   (unseen) ───────────► in flight ─────────────────────► seen(outcome) ── floor passes ──► refused
//!       │                    │  repeat: Pending               repeat: first outcome
//!       └─ refused           └─ fence / epoch / punch wait for it, then Cleared
//! ```
//!
//! # Invariants
//! * `fenced-is-refused`: after a fence, an epoch or a floor was taken in, nothing older is admitted.
//! * `write-at-most-once`: a token is admitted for writing at most once, as long as anything that it
//!   names could be admitted at all.
//! * `punch-once`: a punch that conversion sends again is never carried out again: what it names was
//!   free only until its end was told.
//! * `clear-means-drained`: [`Cleared`] is said of a fence, an epoch or a punch only when nothing that
//!   it names is in flight any more, and nothing that it names can be admitted again.
//!
//! All memory is bounded by [`GateLimits`].

use std::collections::{BTreeMap, BTreeSet};

use endio_types::planted::{self, Bug};
use endio_types::{
    BLOCK_BYTES, ClusterEpoch, Generation, Incarnation, IoEndId, Millis, PblkRange, Reason,
    SegmentIndex, StoreId, VolumeId,
};

use crate::token::{ReadGrant, Token, TokenKey};

/// Bounds on what a gate remembers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GateLimits {
    /// Bios and reads in flight, counted together. Above it: [`Reason::Limit`].
    pub in_flight_max: usize,
    /// Finished tokens whose outcome is remembered. Above it the lowest io_ends are forgotten, and
    /// refused from then on: at least as many as one io_end may have in a store, or it never ends.
    pub seen_max: usize,
    /// Fenced io_ends that are remembered one by one. Above it everything up to the lowest of them is
    /// refused.
    pub fenced_io_ends_max: usize,
    /// Volumes with a fenced generation, deleted ones too, for an epoch: some tens of bytes each. Above
    /// it, and above as many fences and punches that wait: [`Reason::Limit`].
    pub fenced_volumes_max: usize,
    /// Milliseconds before the end of the lease at which nothing new is admitted any more; at most
    /// a quarter of the lease.
    pub lease_margin_ms: u64,
}

impl Default for GateLimits {
    fn default() -> Self {
        Self {
            in_flight_max: 16_384,
            seen_max: 1 << 20,
            fenced_io_ends_max: 1 << 18,
            fenced_volumes_max: 1 << 20,
            lease_margin_ms: 200,
        }
    }
}

/// How a segment ended. `Err` holds why.
pub type Outcome = Result<(), Reason>;

/// A bio or read in flight. Unique while the gate lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlightId(u64);

/// What to do with a bio that is not refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admit {
    /// Write it, then call [`Gate::finish`].
    Write(FlightId),
    /// The same token is being written right now: its outcome is the answer.
    Pending(FlightId),
    /// The same token ended before. Do not write; this is the answer.
    Repeat(Outcome),
}

/// Something that waited has nothing in flight any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cleared {
    /// `FenceDone` may be said.
    Fence(u64),
    /// `StoreReady` may be said.
    Epoch(ClusterEpoch),
    /// The ranges may be punched.
    Punch(PunchTurn),
    /// `PunchDone` may be said again: this punch ended before, and its blocks may be somebody's by
    /// now.
    Punched(u64),
}

/// A punch whose turn has come. Punch the ranges, then call [`Gate::punched`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PunchTurn {
    /// Number of the punch.
    pub punch: u64,
    /// Epoch that asked for it.
    pub epoch: ClusterEpoch,
    /// The ranges.
    pub ranges: Vec<PblkRange>,
    flight: FlightId,
}

/// What conversion says when it knows the store.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Number of this store.
    pub store: StoreId,
    /// The current epoch.
    pub epoch: ClusterEpoch,
    /// Its key.
    pub key: TokenKey,
    /// Length of the store's lease.
    pub lease_ms: u64,
    /// Every io_end below has ended.
    pub io_end_floor: IoEndId,
}

#[derive(Clone, Copy, Debug)]
enum Seen {
    InFlight(FlightId),
    Done(Outcome),
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    epoch: ClusterEpoch,
    volume: VolumeId,
    generation: Generation,
    range: PblkRange,
    /// `None`: a read.
    segment: Option<(IoEndId, SegmentIndex)>,
}

#[derive(Debug)]
struct Registered {
    store: StoreId,
    epoch: ClusterEpoch,
    key: TokenKey,
    is_drained: bool,
}

#[derive(Debug)]
struct Drain {
    then: Cleared,
    waits_for: BTreeSet<FlightId>,
}

/// Guards one block-store in one incarnation. See the module's text.
#[derive(Debug)]
pub struct Gate {
    limits: GateLimits,
    incarnation: Incarnation,
    capacity_blocks: u64,
    registered: Option<Registered>,
    /// The end of the lease less the margin.
    admit_until: Millis,
    floor: IoEndId,
    fenced_io_ends: BTreeSet<IoEndId>,
    fenced_volumes: BTreeMap<VolumeId, Generation>,
    seen: BTreeMap<(IoEndId, SegmentIndex), Seen>,
    flights: BTreeMap<FlightId, Flight>,
    next_flight: u64,
    drains: Vec<Drain>,
    /// Ranges that wait for their punch or are being punched.
    punching: BTreeMap<FlightId, Vec<PblkRange>>,
    /// The newest punch of this epoch, and whether it has ended.
    last_punch: Option<(u64, bool)>,
}

impl Gate {
    /// A gate that refuses everything as [`Reason::NotReady`] until [`register`](Self::register).
    pub fn new(incarnation: Incarnation, capacity_blocks: u64, limits: GateLimits) -> Self {
        Self {
            limits,
            incarnation,
            capacity_blocks,
            registered: None,
            admit_until: Millis(0),
            floor: IoEndId(0),
            fenced_io_ends: BTreeSet::new(),
            fenced_volumes: BTreeMap::new(),
            seen: BTreeMap::new(),
            flights: BTreeMap::new(),
            next_flight: 0,
            drains: Vec::new(),
            punching: BTreeMap::new(),
            last_punch: None,
        }
    }

    /// Number of this store; `None` before it is registered.
    pub fn store(&self) -> Option<StoreId> {
        self.registered.as_ref().map(|registered| registered.store)
    }

    /// Epoch of the registration; `None` before it.
    pub fn epoch(&self) -> Option<ClusterEpoch> {
        self.registered.as_ref().map(|registered| registered.epoch)
    }

    /// Whether bios and reads of the current epoch are admitted, leases aside.
    pub fn is_ready(&self) -> bool {
        self.registered.as_ref().is_some_and(|registered| registered.is_drained)
    }

    /// Whether the lease still runs at `now`, margin included.
    pub fn is_leased(&self, now: Millis) -> bool {
        now < self.admit_until
    }

    /// Bios and reads in flight.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Bios in flight.
    pub fn bios_in_flight(&self) -> usize {
        self.flights.values().filter(|flight| flight.segment.is_some()).count()
    }

    /// Every io_end below this is refused.
    pub fn floor(&self) -> IoEndId {
        self.floor
    }

    /// Takes a registration in. `sent_at` is when the request for it was sent: the lease counts
    /// from there. Idempotent for the same epoch.
    ///
    /// A new epoch refuses everything older at once; [`Cleared::Epoch`] comes when it has drained.
    ///
    /// # Errors
    /// [`Reason::OldEpoch`] if the epoch is lower than one seen before.
    pub fn register(
        &mut self,
        sent_at: Millis,
        registration: Registration,
    ) -> Result<Vec<Cleared>, Reason> {
        let Registration { store, epoch, key, lease_ms, io_end_floor } = registration;
        match &self.registered {
            Some(known) if epoch < known.epoch => return Err(Reason::OldEpoch),
            // The number of a store never changes; another one is another cluster's.
            Some(known) if store != known.store => return Err(Reason::WrongState),
            Some(known) if epoch == known.epoch => {}
            _ => self.forget_older_epochs(),
        }
        self.registered = Some(Registered { store, epoch, key, is_drained: false });
        self.admit_until = self.end_of_lease(sent_at, lease_ms);
        self.raise_floor(io_end_floor);
        self.drains.retain(|drain| !matches!(drain.then, Cleared::Epoch(_)));
        Ok(self.drain(Cleared::Epoch(epoch), |flight| flight.epoch != epoch))
    }

    /// What the old epoch fenced is refused by its epoch from now on, and who asked is gone.
    fn forget_older_epochs(&mut self) {
        self.fenced_io_ends.clear();
        self.fenced_volumes.clear();
        self.seen.clear();
        self.drains.clear();
        self.last_punch = None;
        // A punch that is under way must end before the new epoch hands its blocks out.
        self.punching.retain(|flight, _| self.flights.contains_key(flight));
    }

    /// Takes the answer to a renewal in; `sent_at` is when that renewal was sent.
    pub fn renewed(&mut self, sent_at: Millis, lease_ms: u64, io_end_floor: IoEndId) {
        self.admit_until = self.admit_until.max(self.end_of_lease(sent_at, lease_ms));
        self.raise_floor(io_end_floor);
    }

    fn end_of_lease(&self, sent_at: Millis, lease_ms: u64) -> Millis {
        // A short lease keeps most of its length.
        sent_at.plus(lease_ms - self.limits.lease_margin_ms.min(lease_ms / 4))
    }

    /// Asks to write `data_bytes` bytes under `token` at `now`.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn admit_bio(
        &mut self,
        now: Millis,
        token: &Token,
        data_bytes: u64,
    ) -> Result<Admit, Reason> {
        let registered = self.check_epoch(token.epoch)?;
        if !token.verify(&registered.key) {
            return Err(Reason::ForgedToken);
        }
        if token.store != registered.store {
            return Err(Reason::UnknownStore);
        }
        if token.incarnation != self.incarnation && !planted::is(Bug::IncarnationUnchecked) {
            return Err(Reason::OldIncarnation);
        }
        let range = PblkRange::new(token.pblk.0, token.blocks.into());
        if token.segment.is_submitter() || data_bytes != range.len * BLOCK_BYTES {
            return Err(Reason::Malformed);
        }
        self.check_range(range)?;
        let seen = self.seen.get(&(token.io_end, token.segment));
        match seen.filter(|_| !planted::is(Bug::SeenForgotten)) {
            Some(Seen::InFlight(flight)) => return Ok(Admit::Pending(*flight)),
            Some(Seen::Done(outcome)) => return Ok(Admit::Repeat(*outcome)),
            None => {}
        }
        if token.io_end < self.floor {
            return Err(Reason::UnknownIoEnd);
        }
        if self.fenced_io_ends.contains(&token.io_end) && !planted::is(Bug::NoFence) {
            return Err(Reason::Aborted);
        }
        self.check_generation(token.volume, token.generation)?;
        if self.punching.values().flatten().any(|punched| punched.overlaps(range)) {
            return Err(Reason::WrongState);
        }
        self.check_lease_and_limit(now)?;
        let flight = self.take_off(Flight {
            epoch: token.epoch,
            volume: token.volume,
            generation: token.generation,
            range,
            segment: Some((token.io_end, token.segment)),
        });
        self.seen.insert((token.io_end, token.segment), Seen::InFlight(flight));
        Ok(Admit::Write(flight))
    }

    /// Asks to read `range` under `grant` at `now`. Call [`finish`](Self::finish) afterwards.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn admit_read(
        &mut self,
        now: Millis,
        grant: &ReadGrant,
        range: PblkRange,
    ) -> Result<FlightId, Reason> {
        let registered = self.check_epoch(grant.epoch)?;
        if !grant.verify(&registered.key) {
            return Err(Reason::ForgedToken);
        }
        self.check_range(range)?;
        self.check_generation(grant.volume, grant.generation)?;
        self.check_lease_and_limit(now)?;
        let ReadGrant { epoch, volume, generation, .. } = *grant;
        Ok(self.take_off(Flight { epoch, volume, generation, range, segment: None }))
    }

    /// A bio or read has ended; of a read only that counts. Says what this was the last obstacle to.
    /// A flight that ended before changes nothing.
    pub fn finish(&mut self, id: FlightId, outcome: Outcome) -> Vec<Cleared> {
        let Some(flight) = self.flights.remove(&id) else { return Vec::new() };
        if let Some(segment) = flight.segment
            && let Some(seen) = self.seen.get_mut(&segment)
            && matches!(seen, Seen::InFlight(known) if *known == id)
        {
            *seen = Seen::Done(outcome);
            if segment.0 < self.floor {
                self.seen.remove(&segment);
            }
            self.bound_seen();
        }
        for drain in &mut self.drains {
            drain.waits_for.remove(&id);
        }
        self.take_cleared()
    }

    /// Refuses these io_ends and the volumes' generations below the given ones from now on.
    /// [`Cleared::Fence`] comes, now or later, when nothing of them is in flight. Idempotent.
    ///
    /// # Errors
    /// [`Reason::Limit`] if too many volumes are fenced or too many fences wait; the fence is then
    /// never cleared, so what it names is never taken for safe.
    pub fn fence(
        &mut self,
        fence: u64,
        io_ends: &[IoEndId],
        volumes: &[(VolumeId, Generation)],
    ) -> Result<Vec<Cleared>, Reason> {
        self.check_drains()?;
        for io_end in io_ends.iter().filter(|io_end| **io_end >= self.floor) {
            self.fenced_io_ends.insert(*io_end);
        }
        let surplus = self.fenced_io_ends.len().saturating_sub(self.limits.fenced_io_ends_max);
        if surplus > 0
            && let Some(last) = self.fenced_io_ends.iter().nth(surplus - 1).copied()
        {
            // Refusing too much is safe: such a write begins again as another io_end.
            self.raise_floor(IoEndId(last.0.saturating_add(1)));
        }
        for (volume, generation) in volumes.iter().copied() {
            let known = self.fenced_volumes.len();
            match self.fenced_volumes.get_mut(&volume) {
                Some(lowest) => *lowest = (*lowest).max(generation),
                None if known >= self.limits.fenced_volumes_max => return Err(Reason::Limit),
                None => _ = self.fenced_volumes.insert(volume, generation),
            }
        }
        let io_ends: BTreeSet<IoEndId> = io_ends.iter().copied().collect();
        Ok(self.drain(Cleared::Fence(fence), |flight| {
            flight.segment.is_some_and(|(io_end, _)| io_ends.contains(&io_end))
                || volumes
                    .iter()
                    .any(|(volume, lowest)| flight.volume == *volume && flight.generation < *lowest)
        }))
    }

    /// Refuses bios to these ranges from now on. [`Cleared::Punch`] comes, now or later, when
    /// nothing is in flight there. Numbers of punches grow, and conversion sends a punch again when
    /// it may not have arrived: then nothing is refused or punched, and [`Cleared::Punched`] comes
    /// if that punch has ended.
    ///
    /// # Errors
    /// [`Reason::OutOfRange`] if a range is empty or beyond the capacity, [`Reason::Limit`] if too
    /// much waits. Nothing has changed then.
    /// [`Reason::NotReady`] before the first registration.
    pub fn punch(&mut self, punch: u64, ranges: Vec<PblkRange>) -> Result<Vec<Cleared>, Reason> {
        self.check_drains()?;
        let epoch = self.epoch().ok_or(Reason::NotReady)?;
        for range in &ranges {
            self.check_range(*range)?;
        }
        if let Some((last, has_ended)) = self.last_punch
            && punch <= last
        {
            // The next punch is sent after the end of the one before was heard.
            let is_owed = punch == last && has_ended;
            return Ok(if is_owed { vec![Cleared::Punched(punch)] } else { Vec::new() });
        }
        self.last_punch = Some((punch, false));
        let flight = self.next_flight_id();
        self.punching.insert(flight, ranges.clone());
        let turn = PunchTurn { punch, epoch, ranges: ranges.clone(), flight };
        Ok(self.drain(Cleared::Punch(turn), |flight| {
            ranges.iter().any(|range| range.overlaps(flight.range))
        }))
    }

    /// The ranges of that punch are holes, or could not be made so: bios may go there again.
    /// Says what this was the last obstacle to.
    pub fn punched(&mut self, turn: &PunchTurn) -> Vec<Cleared> {
        self.punching.remove(&turn.flight);
        let is_of_this_epoch = self.epoch() == Some(turn.epoch);
        if let Some((last, has_ended)) = &mut self.last_punch
            && is_of_this_epoch
            && *last == turn.punch
        {
            *has_ended = true;
        }
        self.finish(turn.flight, Ok(()))
    }

    fn check_epoch(&self, epoch: ClusterEpoch) -> Result<&Registered, Reason> {
        match &self.registered {
            Some(registered) if epoch < registered.epoch => Err(Reason::OldEpoch),
            Some(registered)
                if epoch == registered.epoch
                    && (registered.is_drained || planted::is(Bug::DrainUnawaited)) =>
            {
                Ok(registered)
            }
            // An epoch that this store has not heard of: conversion is about to register it.
            _ => Err(Reason::NotReady),
        }
    }

    fn check_range(&self, range: PblkRange) -> Result<(), Reason> {
        let end = range.start.0.checked_add(range.len).ok_or(Reason::OutOfRange)?;
        if range.len == 0 || end > self.capacity_blocks {
            return Err(Reason::OutOfRange);
        }
        Ok(())
    }

    fn check_generation(&self, volume: VolumeId, generation: Generation) -> Result<(), Reason> {
        match self.fenced_volumes.get(&volume) {
            Some(lowest) if generation < *lowest && !planted::is(Bug::GenerationUnchecked) => {
                Err(Reason::OldGeneration)
            }
            _ => Ok(()),
        }
    }

    fn check_lease_and_limit(&self, now: Millis) -> Result<(), Reason> {
        if !self.is_leased(now) {
            return Err(Reason::LeaseExpired);
        }
        if self.flights.len() >= self.limits.in_flight_max {
            return Err(Reason::Limit);
        }
        Ok(())
    }

    fn check_drains(&self) -> Result<(), Reason> {
        let is_full = self.drains.len() >= self.limits.fenced_volumes_max
            || self.punching.len() >= self.limits.fenced_volumes_max;
        if is_full { Err(Reason::Limit) } else { Ok(()) }
    }

    fn next_flight_id(&mut self) -> FlightId {
        let id = FlightId(self.next_flight);
        self.next_flight += 1;
        id
    }

    fn take_off(&mut self, flight: Flight) -> FlightId {
        let id = self.next_flight_id();
        self.flights.insert(id, flight);
        id
    }

    fn drain(&mut self, then: Cleared, names: impl Fn(&Flight) -> bool) -> Vec<Cleared> {
        let waits_for =
            self.flights.iter().filter(|(_, flight)| names(flight)).map(|(id, _)| *id).collect();
        self.drains.push(Drain { then, waits_for });
        self.take_cleared()
    }

    fn take_cleared(&mut self) -> Vec<Cleared> {
        let is_clear = |drain: &mut Drain| drain.waits_for.is_empty();
        let cleared: Vec<_> =
            self.drains.extract_if(.., is_clear).map(|drain| drain.then).collect();
        for cleared in &cleared {
            match cleared {
                Cleared::Epoch(_) => {
                    if let Some(registered) = &mut self.registered {
                        registered.is_drained = true;
                    }
                }
                // Under way, so that a new epoch waits for it. It blocks bios by `punching`.
                Cleared::Punch(PunchTurn { epoch, flight, .. }) => {
                    let range = PblkRange::new(0, 0);
                    let (volume, generation) = (VolumeId(0), Generation(u64::MAX));
                    let under_way =
                        Flight { epoch: *epoch, volume, generation, range, segment: None };
                    self.flights.insert(*flight, under_way);
                }
                Cleared::Fence(_) | Cleared::Punched(_) => {}
            }
        }
        cleared
    }

    fn raise_floor(&mut self, floor: IoEndId) {
        if floor <= self.floor {
            return;
        }
        self.floor = floor;
        self.fenced_io_ends = self.fenced_io_ends.split_off(&floor);
        let mut below = std::mem::take(&mut self.seen);
        self.seen = below.split_off(&(floor, SegmentIndex(0)));
        // What is in flight is remembered until it ends.
        below.retain(|_, seen| matches!(seen, Seen::InFlight(_)));
        self.seen.append(&mut below);
    }

    fn bound_seen(&mut self) {
        if self.seen.len() <= self.limits.seen_max {
            return;
        }
        // A sixteenth at once: each time costs as much as the memory is large.
        if let Some((io_end, _)) = self.seen.keys().nth(self.seen.len() / 16).copied() {
            self.raise_floor(IoEndId(io_end.0.saturating_add(1)));
        }
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
