//! Owner of the gate: asks it, performs what it allows, and tells it how that ended.
//!
//! ```text
//!   bio ──► gate ──► writer ──► durable ──► gate.finish ──► BioDone to the submitter
//!             │ refused                          │    └────► SegmentRelease to conversion
//!             └──────► BioDone                   └─ what was cleared: FenceDone, StoreReady, punch
//! ```

use std::{collections::HashMap, sync::Arc, time::Instant};

use endio_api::{
    blockstore,
    conversion::StoreMessage,
    convert::{grant_from_proto, token_from_proto},
};
use endio_chassis::{metrics::Gauge, shutdown::Shutdown};
use endio_failpoints::{Point, reach};
use endio_state_machine::gate::{
    Admit, Cleared, FlightId, Gate, GateLimits, Outcome, PunchTurn, Registration,
};
use endio_store::block::{Superblock, TrackedDevice};
use endio_types::{
    BLOCK_SIZE, Generation, IO_END_BLOCKS_MAX, IoEndId, Millis, PblkRange, Reason, VolumeId,
};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::{
    bio::{self, Reply, Segment},
    config::Config,
    metrics::Metrics,
    outbox::{self, Outbox},
    reader::Readers,
    wire,
    writer::{Job, Stages},
};

/// Submitters that may wait for one segment under way, the first one aside.
const REPEATS_MAX: usize = 4;

/// State shared by streams, threads and the session.
#[derive(Debug)]
pub(crate) struct Driver {
    state: Mutex<State>,
    pub(crate) device: TrackedDevice,
    pub(crate) superblock: Superblock,
    pub(crate) stages: Stages,
    pub(crate) readers: Readers,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: Shutdown,
    /// Rings when something lies in the outbox or has drained.
    pub(crate) changed: Notify,
    /// Everything has drained: streams and the session end.
    pub(crate) closed: CancellationToken,
    /// Reads that the device is asked for at once.
    pub(crate) reads: Arc<Semaphore>,
    pub(crate) bio_bytes: Arc<Semaphore>,
    pub(crate) read_bytes: Arc<Semaphore>,
    pub(crate) in_flight_per_stream_max: usize,
    releases_max: usize,
    started: tokio::time::Instant,
}

#[derive(Debug)]
struct State {
    gate: Gate,
    outbox: Outbox,
    repeats: HashMap<FlightId, Vec<Reply<blockstore::BioDone>>>,
    /// `StoreReady` is due in this session.
    is_ready_due: bool,
}

impl Driver {
    pub(crate) fn new(
        config: &Config,
        device: TrackedDevice,
        superblock: Superblock,
        shutdown: Shutdown,
    ) -> Self {
        let limits = GateLimits {
            in_flight_max: config.in_flight_max,
            seen_max: config.seen_tokens_max,
            lease_margin_ms: config.lease_margin_ms,
            ..GateLimits::default()
        };
        let gate = Gate::new(superblock.incarnation, device.capacity_blocks(), limits);
        let state =
            State { gate, outbox: Outbox::default(), repeats: HashMap::new(), is_ready_due: false };
        Self {
            state: Mutex::new(state),
            device,
            superblock,
            stages: Stages::new(config.direct_write_bytes_min().unwrap_or(usize::MAX)),
            readers: Readers::new(config.reader_threads_max, config.reader_each_us),
            metrics: Metrics::new(),
            shutdown,
            changed: Notify::new(),
            closed: CancellationToken::new(),
            reads: Arc::new(Semaphore::new(config.reads_at_once_max)),
            bio_bytes: Arc::new(Semaphore::new(config.bio_bytes_max)),
            read_bytes: Arc::new(Semaphore::new(config.read_bytes_max)),
            in_flight_per_stream_max: config.in_flight_per_stream_max,
            releases_max: config.releases_max,
            started: tokio::time::Instant::now(),
        }
    }

    /// This process's monotonic clock.
    pub(crate) fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic inside the lock would leave gate and outbox in disagreement: nobody goes on then.
        self.state.lock().unwrap_or_else(|_| std::process::abort())
    }

    /// Takes a bio; its answer goes to `reply`, now or when the segment has ended.
    pub(crate) fn submit(&self, bio: blockstore::Bio, reply: Reply<blockstore::BioDone>) {
        let blockstore::Bio { token, data, crc32c, traceparent } = bio;
        let refuse = |reply: Reply<_>, reason: Reason, message: &str| {
            self.metrics.refused.inc();
            reply.send(wire::bio_done(token.as_ref(), Err(reason), message));
        };
        let domain = match token_from_proto(token.as_ref()) {
            Ok(domain) => domain,
            Err(malformed) => return refuse(reply, Reason::Malformed, &malformed.to_string()),
        };
        if crc32c.len() != domain.blocks as usize || domain.blocks > IO_END_BLOCKS_MAX {
            return refuse(reply, Reason::Malformed, "one crc32c per block, 1 to 1024 blocks");
        }
        if self.shutdown.is_requested() {
            return refuse(reply, Reason::Draining, "the store is stopping");
        }
        let mut state = self.state();
        if state.outbox.unanswered() + state.gate.in_flight() >= self.releases_max {
            drop(state);
            return refuse(reply, Reason::Limit, "too many releases wait for conversion");
        }
        let flight = match state.gate.admit_bio(self.now(), &domain, data.len() as u64) {
            Ok(Admit::Write(flight)) => flight,
            Ok(Admit::Repeat(outcome)) => {
                drop(state);
                self.metrics.repeats.inc();
                return reply.send(wire::bio_done(token.as_ref(), outcome, "answered before"));
            }
            Ok(Admit::Pending(flight)) => {
                let waiting = state.repeats.entry(flight).or_default();
                if waiting.len() < REPEATS_MAX {
                    waiting.push(reply);
                    self.metrics.repeats.inc();
                } else {
                    drop(state);
                    refuse(reply, Reason::Limit, "repeated too often while under way");
                }
                return;
            }
            Err(reason) => {
                drop(state);
                return refuse(reply, reason, "the token is not valid here and now");
            }
        };
        drop(state);
        let Some(wire) = token else { return };
        let span = bio::segment_span(&wire, &traceparent);
        let leg_began = Instant::now();
        let arrived = leg_began;
        let segment =
            Segment { token: domain, wire, crc32c, span, traceparent, leg_began, arrived, reply };
        self.begin(flight, segment, data);
    }

    fn begin(&self, flight: FlightId, segment: Segment, data: bytes::Bytes) {
        if let Some(block) = wire::first_mismatch(&data, &segment.crc32c) {
            warn!(
                io_end = segment.wire.io_end,
                segment = segment.wire.segment,
                block,
                "a bio does not match its checksum"
            );
            return self.finish(flight, segment, Err(Reason::ChecksumMismatch));
        }
        reach(Point::StoreAdmitted);
        segment.span.phase("wait");
        let job = Box::new(Job { flight, segment, data });
        if let Err(job) = self.stages.submit(job) {
            self.finish(job.flight, job.segment, Err(Reason::Draining));
        }
    }

    /// A segment has ended: tells its submitter and conversion.
    pub(crate) fn finish(&self, flight: FlightId, mut segment: Segment, outcome: Outcome) {
        match outcome {
            Ok(()) => {
                self.metrics.segments.inc();
                self.metrics.written_blocks.add(segment.wire.blocks.into());
                self.metrics.write_us.add(segment.arrived.elapsed().as_micros() as u64);
            }
            Err(reason) => {
                self.metrics.failed_segments.inc();
                segment.span.fail(reason.name());
            }
        }
        segment.span.phase("release");
        let span = segment.span.clone();
        let crc32c = std::mem::take(&mut segment.crc32c);
        let release = bio::release(&segment, crc32c, outcome);
        let mut state = self.state();
        let cleared = state.gate.finish(flight, outcome);
        // A token of an older epoch died with it.
        if state.gate.epoch() == Some(segment.token.epoch) {
            let key = (segment.wire.io_end, segment.wire.segment);
            state.outbox.release(key, release, span);
            self.metrics.unanswered.set(state.outbox.unanswered() as i64);
        }
        let repeats = state.repeats.remove(&flight).unwrap_or_default();
        let turns = state.take_in(cleared);
        drop(state);
        reach(Point::StoreReleaseQueued);
        let done = wire::bio_done(Some(&segment.wire), outcome, "");
        for reply in std::iter::once(segment.reply).chain(repeats) {
            reply.send(done.clone());
        }
        self.start_punches(turns);
        self.changed.notify_one();
    }

    /// Asks the gate for a read.
    pub(crate) fn admit_read(&self, request: &blockstore::ReadRequest) -> Result<FlightId, Reason> {
        let admitted = self.try_admit_read(request);
        if admitted.is_err() {
            self.metrics.refused.inc();
        }
        admitted
    }

    fn try_admit_read(&self, request: &blockstore::ReadRequest) -> Result<FlightId, Reason> {
        let grant = grant_from_proto(request.grant.as_ref()).map_err(|_| Reason::Malformed)?;
        let blocks = request.blocks as usize;
        let are_crcs_whole = request.crc32c.is_empty() || request.crc32c.len() == blocks;
        if !are_crcs_whole || request.blocks == 0 || request.blocks > IO_END_BLOCKS_MAX {
            return Err(Reason::Malformed);
        }
        if self.shutdown.is_requested() {
            return Err(Reason::Draining);
        }
        let range = PblkRange::new(request.pblk, request.blocks.into());
        self.state().gate.admit_read(self.now(), &grant, range)
    }

    /// A read has ended.
    pub(crate) fn finish_read(&self, flight: FlightId) {
        let mut state = self.state();
        let cleared = state.gate.finish(flight, Ok(()));
        let turns = state.take_in(cleared);
        let is_owing = state.is_owing();
        drop(state);
        self.start_punches(turns);
        // Most reads leave nothing to say.
        if is_owing {
            self.changed.notify_one();
        }
    }

    /// Conversion knows this store; the registration was sent at `sent_at`.
    pub(crate) fn register(
        &self,
        sent_at: Millis,
        registration: Registration,
    ) -> Result<(), Reason> {
        let mut state = self.state();
        let is_new_epoch = state.gate.epoch() != Some(registration.epoch);
        let cleared = state.gate.register(sent_at, registration)?;
        if is_new_epoch {
            state.outbox.forget_all();
        } else {
            let floor = state.gate.floor();
            state.outbox.forget_below(floor);
            state.outbox.send_again();
        }
        state.is_ready_due = false;
        let turns = state.take_in(cleared);
        drop(state);
        reach(Point::StoreRegistered);
        self.metrics.sessions.inc();
        self.start_punches(turns);
        self.changed.notify_one();
        Ok(())
    }

    /// Conversion answered a renewal that was sent at `sent_at`.
    pub(crate) fn renewed(&self, sent_at: Millis, lease_ms: u32, floor: IoEndId) {
        let mut state = self.state();
        state.gate.renewed(sent_at, lease_ms.into(), floor);
        let floor = state.gate.floor();
        state.outbox.forget_below(floor);
    }

    /// Conversion answered a release.
    pub(crate) fn released(&self, io_end: u64, segment: u32) {
        let mut state = self.state();
        let began = state.outbox.answered((io_end, segment));
        self.metrics.unanswered.set(state.outbox.unanswered() as i64);
        drop(state);
        if let Some((took, span)) = began {
            self.metrics.legs.release.record_of(took, span.sampled());
        }
        self.changed.notify_one();
    }

    /// Conversion fences io_ends and volumes.
    pub(crate) fn fence(
        &self,
        fence: u64,
        io_ends: &[IoEndId],
        volumes: &[(VolumeId, Generation)],
    ) -> Result<(), Reason> {
        let mut state = self.state();
        let cleared = state.gate.fence(fence, io_ends, volumes)?;
        let turns = state.take_in(cleared);
        drop(state);
        reach(Point::StoreFenced);
        self.start_punches(turns);
        self.changed.notify_one();
        Ok(())
    }

    /// Conversion wants free blocks to be given back.
    pub(crate) fn punch(&self, punch: u64, ranges: Vec<PblkRange>) -> Result<(), Reason> {
        let mut state = self.state();
        let cleared = state.gate.punch(punch, ranges)?;
        let turns = state.take_in(cleared);
        drop(state);
        self.start_punches(turns);
        self.changed.notify_one();
        Ok(())
    }

    fn start_punches(&self, turns: Vec<PunchTurn>) {
        for turn in turns {
            // A queue that is closed belongs to a store that stops: the punch stays undone, and
            // its blocks are safe with the next incarnation.
            let _ = self.stages.punch(turn);
        }
    }

    /// A punch has been carried out, or has failed: its blocks are free either way, and a block
    /// that still occupies space does no harm but that.
    pub(crate) fn punched(&self, turn: &PunchTurn) {
        let mut state = self.state();
        let cleared = state.gate.punched(turn);
        if state.gate.epoch() == Some(turn.epoch) {
            state.outbox.punch_done(turn.punch);
        }
        let turns = state.take_in(cleared);
        drop(state);
        self.start_punches(turns);
        self.changed.notify_one();
    }

    /// Up to `max` messages for conversion; nothing before `StoreReady` may be said.
    pub(crate) fn take_messages(&self, max: usize) -> Vec<StoreMessage> {
        let mut state = self.state();
        if !state.gate.is_ready() {
            return Vec::new();
        }
        let mut messages = Vec::new();
        if std::mem::take(&mut state.is_ready_due) {
            messages.extend(state.gate.epoch().map(outbox::ready));
        }
        messages.extend(state.outbox.take(max));
        drop(state);
        if !messages.is_empty() {
            reach(Point::StoreMessagesTaken);
        }
        messages
    }

    /// Whether bios and reads of the current epoch are admitted, leases aside.
    pub(crate) fn is_ready(&self) -> bool {
        self.state().gate.is_ready()
    }

    /// Whether [`take_messages`](Self::take_messages) would return something.
    pub(crate) fn has_messages(&self) -> bool {
        let state = self.state();
        state.gate.is_ready() && state.is_owing()
    }

    /// What a stop still waits for, by name; empty: nothing.
    pub(crate) fn held(&self, is_connected: bool) -> Vec<String> {
        let state = self.state();
        let mut held = Vec::new();
        match state.gate.in_flight() {
            0 => {}
            count => held.push(format!("{count} bios, reads and punches in flight")),
        }
        match state.outbox.unanswered() {
            // Without a session nobody answers; conversion aborts these by itself.
            count if count > 0 && is_connected => held.push(format!("{count} releases unanswered")),
            _ => {}
        }
        held
    }

    /// Identity and state.
    pub(crate) fn describe(&self) -> blockstore::DescribeResponse {
        let state = self.state();
        let in_flight = state.gate.bios_in_flight();
        let (store, epoch) = (state.gate.store(), state.gate.epoch());
        drop(state);
        blockstore::DescribeResponse {
            uuid: self.superblock.uuid_hex(),
            store: store.map_or(0, |store| store.0),
            incarnation: self.superblock.incarnation.0,
            cluster_epoch: epoch.map_or(0, |epoch| epoch.0),
            capacity_blocks: self.device.capacity_blocks(),
            used_blocks: self.used_blocks(),
            in_flight: u32::try_from(in_flight).unwrap_or(u32::MAX),
            refused: self.metrics.refused.value(),
            flushes: self.device.flushes(),
            segments: self.metrics.segments.value(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: endio_api::protocol::ours(),
            uptime_ms: self.now().0,
            written_blocks: self.metrics.written_blocks.value(),
            read_blocks: self.metrics.read_blocks.value(),
            reads: self.metrics.reads.value(),
            write_us: self.metrics.write_us.value(),
            read_us: self.metrics.read_us.value(),
        }
    }

    /// Sets the gauges that are only looked at when somebody reads the metrics, as long as the driver
    /// lives.
    pub(crate) fn show_gauges(self: &Arc<Self>) {
        let registry = &self.metrics.registry;
        let gauge = |name, help| registry.gauge(name, help, &[]);
        let in_flight = gauge("endio_block_store_in_flight", "Bios under way");
        let capacity = gauge("endio_block_store_capacity_bytes", "Capacity");
        let used = gauge("endio_block_store_used_bytes", "What the file occupies");
        let incarnation = gauge("endio_block_store_incarnation", "Grows with each start");
        let epoch = gauge("endio_block_store_cluster_epoch", "Of its registration; 0: none");
        let flushes =
            registry.counter("endio_block_store_flushes_total", "Flushes of the device", &[]);
        let driver = Arc::downgrade(self);
        registry.before_reading(move || {
            let Some(driver) = driver.upgrade() else { return false };
            let now = driver.describe();
            let set = |gauge: &Gauge, value: u64| gauge.set(value.try_into().unwrap_or(i64::MAX));
            set(&in_flight, now.in_flight.into());
            set(&capacity, now.capacity_blocks * BLOCK_SIZE as u64);
            set(&used, now.used_blocks * BLOCK_SIZE as u64);
            set(&incarnation, now.incarnation);
            set(&epoch, now.cluster_epoch);
            flushes.add(now.flushes.saturating_sub(flushes.value()));
            true
        });
        registry.expose();
    }

    /// Blocks in use; 0 if the device does not say. Asks the file system's memory, not the disk.
    pub(crate) fn used_blocks(&self) -> u64 {
        self.device.used_blocks().unwrap_or_else(|error| {
            warn!(%error, "cannot tell how many blocks are in use");
            0
        })
    }
}

impl State {
    /// Whether there is something to say to conversion.
    fn is_owing(&self) -> bool {
        self.is_ready_due || self.outbox.has_unsent()
    }

    /// Queues what may be said now and returns the punches whose turn has come.
    fn take_in(&mut self, cleared: Vec<Cleared>) -> Vec<PunchTurn> {
        let mut turns = Vec::new();
        for cleared in cleared {
            match cleared {
                Cleared::Fence(fence) => self.outbox.fence_done(fence),
                Cleared::Epoch(_) => self.is_ready_due = true,
                Cleared::Punch(turn) => turns.push(turn),
                Cleared::Punched(punch) => self.outbox.punch_done(punch),
            }
        }
        turns
    }
}
