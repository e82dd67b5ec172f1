//! The driver: one task that owns the machine, its clock and its disk.
//!
//! ```text
//! turn:  take inputs ─► machine.handle* ─► machine.drain ─► records ─► committer (thread, or here)
//!                                       └► effects: now ─► peers
//!                                                   later ─► wait for the committer ─► peers
//! ```
//! A failed commit or a broken table ends the driver, and with it the process: what is in memory is
//! then ahead of the disk, and recovery is the only way back.

mod checkpoint;
mod clock;
mod outbox;

use std::collections::BTreeMap;
use std::time::Duration;

use endio_api::conversion::DescribeResponse;
use endio_api::convert::deletions_to_proto;
use endio_chassis::runtime;
use endio_chassis::server::Readiness;
use endio_chassis::shutdown::Shutdown;
use endio_failpoints::{Bug, Point, is_planted, reach};
use endio_state_machine::machine::{
    Input, Machine, MachineError, Output, Refusal, ReplyBody, ReplyTo, StoreSession,
    WritebackSession,
};
use endio_state_machine::record::{DatabaseId, Record, Snapshot};
use endio_state_machine::token::TokenKey;
use endio_store::meta::{MetaError, MetaStore, MetaTable, Recovered};
use endio_types::Millis;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::commit::{Committer, Encoded, Progress, Submitted};
use crate::config::Config;
use crate::handle::{Event, Question, Traced};
use crate::metrics::Metrics;
use crate::snapshot;
use checkpoint::Checkpoints;
use clock::Clock;
use outbox::Outbox;

/// Longest sleep without a deadline: bounds how late a full metadata disk is noticed.
const IDLE_MAX: Duration = Duration::from_millis(500);
/// What handing records over takes at most where the queue of the committer has room.
const HELD_UP: Duration = Duration::from_millis(10);

/// Pause between two looks at the gauges.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// Why the driver cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The metadata cannot be opened, read or written.
    #[error("the metadata store failed")]
    Meta(#[from] MetaError),
    /// The state machine cannot go on.
    #[error("the state machine cannot go on")]
    Machine(#[source] MachineError<MetaError>),
    /// A journal record or a snapshot was written by something else.
    #[error("record {seq} of the journal cannot be decoded")]
    Decode {
        /// Its number; that of the snapshot for a snapshot.
        seq: u64,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// A record cannot be encoded.
    #[error("a record cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// A commit failed: what is durable is unknown until a restart.
    #[error("a commit failed: {0}")]
    Commit(String),
    /// A thread cannot be started.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
}

type Table = Box<dyn MetaTable>;

pub(crate) struct Driver {
    machine: Machine<Table>,
    out: Output,
    clock: Clock,
    committer: Committer,
    progress: watch::Receiver<Progress>,
    checkpoints: Checkpoints,
    outbox: Outbox,
    calls: BTreeMap<ReplyTo, oneshot::Sender<Result<ReplyBody, Refusal>>>,
    next_id: u64,
    is_degraded: bool,
    /// When the gauges were set last.
    shown_at: Instant,
    metrics: Metrics,
    config: Config,
}

impl Driver {
    /// Opens the metadata and recovers. Blocks; begins the next epoch, which is committed by the
    /// first turn.
    pub(crate) fn open(
        config: Config,
        store: &dyn MetaStore,
        metrics: Metrics,
    ) -> Result<Self, DriverError> {
        let started = Instant::now();
        let Recovered {
            database_id,
            table,
            snapshot,
            records,
            journal,
            checkpointer,
            next_seq,
            rebuilt,
        } = store.open()?;
        let snapshot = match snapshot {
            Some((seq, bytes)) => {
                snapshot::decode(&bytes).map_err(|source| DriverError::Decode { seq, source })?
            }
            None => Snapshot::new(database(database_id)),
        };
        let from = snapshot.seq;
        let mut machine = Machine::recover(config.limits.clone(), table, snapshot);
        for record in records {
            let record = record?;
            let decoded: Record = postcard::from_bytes(&record.payload)
                .map_err(|source| DriverError::Decode { seq: record.seq, source })?;
            machine.apply(record.seq, &decoded).map_err(DriverError::Machine)?;
        }
        let mut out = Output::default();
        machine
            .finish_recovery(TokenKey::new(rand::random()), Millis(0), &mut out)
            .map_err(DriverError::Machine)?;
        let rebuilt = rebuilt.unwrap_or_default();
        let replayed = (next_seq - 1).saturating_sub(from);
        let recovery_ms = started.elapsed().as_millis() as u64;
        tracing::info!(replayed, recovery_ms, rebuilt, epoch = machine.epoch().0, "recovered");
        reach(Point::ConversionRecovered);
        let here_max = Duration::from_micros(config.commit_here_us_max);
        let time = metrics.commit.clone();
        let committer =
            Committer::start(journal, next_seq - 1, time, here_max).map_err(DriverError::Thread)?;
        Ok(Self {
            machine,
            out,
            clock: Clock::new(started, config.limits.lease_ms),
            progress: committer.progress(),
            committer,
            checkpoints: Checkpoints::new(checkpointer),
            outbox: Outbox::default(),
            calls: BTreeMap::new(),
            next_id: 1,
            is_degraded: false,
            shown_at: started,
            metrics,
            config,
        })
    }

    /// Runs until a requested stop has drained, or a fault.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        readiness: Readiness,
        shutdown: Shutdown,
    ) -> Result<(), DriverError> {
        let _running = shutdown.hold("conversion driver");
        // The epoch is durable before anybody can be granted anything under it.
        self.settle(Instant::now(), false)?;
        let epoch_seq = self.machine.seq();
        while self.durable()? < epoch_seq {
            self.commit_progress().await?;
        }
        reach(Point::ConversionEpoch);
        readiness.set_ready().await;
        // The leases that a recovery grants run from here on: nobody could be heard before.
        self.clock.begins(Instant::now());
        let mut queue = Vec::new();
        let mut stop_by: Option<Instant> = None;
        loop {
            // What is due already does not make the next turn late.
            let wake = self.wake_at().max(Instant::now());
            tokio::select! {
                biased;
                changed = self.progress.changed() => {
                    if changed.is_err() { return Err(self.commit_failure()); }
                }
                taken = events.recv_many(&mut queue, self.config.inputs_per_turn_max),
                    if !events.is_closed() => { let _ = taken; }
                () = shutdown.requested(), if stop_by.is_none() => {
                    readiness.set_not_ready().await;
                    let deadline = Duration::from_millis(self.config.drain_deadline_ms);
                    stop_by = Some(Instant::now() + deadline);
                    self.feed((Input::StopIntake, String::new()))?;
                }
                () = tokio::time::sleep_until(wake) => {}
            }
            let is_waiting = !events.is_empty();
            let under_way = self.clock.turn_begins(Instant::now(), wake);
            self.turn(&mut queue, is_waiting)?;
            self.clock.turn_ends(&under_way, Instant::now());
            if let Some(stop_by) = stop_by {
                let is_late = Instant::now() >= stop_by || shutdown.is_forced();
                if is_late && !self.machine.is_idle() {
                    self.abandon()?;
                }
                if (is_late || self.machine.is_idle()) && self.outbox.is_empty() {
                    drop(events);
                    return self.close();
                }
            }
        }
    }

    /// One turn: everything that waits, then what follows from it. `is_waiting`: more has come since.
    fn turn(&mut self, queue: &mut Vec<Event>, is_waiting: bool) -> Result<(), DriverError> {
        let began = Instant::now();
        self.metrics.turns.inc();
        let durable = self.durable()?;
        self.machine.committed(durable).map_err(DriverError::Machine)?;
        // What waited for it leaves before anything that follows from it: a store hears that it is
        // registered before its first fence.
        self.outbox.release(durable, &mut self.calls, &self.metrics);
        self.watch_disk()?;
        if self.machine.next_deadline().is_some_and(|at| at <= self.now()) {
            self.feed((Input::Tick, String::new()))?;
        }
        for event in queue.drain(..) {
            self.event(event)?;
        }
        if self.machine.has_work() {
            let now = self.now();
            self.machine.drain(now, &mut self.out).map_err(DriverError::Machine)?;
        }
        let is_waiting = is_waiting || self.machine.has_work();
        self.settle(began, is_waiting)?;
        self.show_gauges();
        let seq = self.machine.seq();
        let snapshot = || self.machine.snapshot();
        self.checkpoints.begin_if_due(&self.committer, seq, snapshot)?;
        self.checkpoints.step(self.machine.table_mut(), durable)?;
        self.checkpoints.copied_up_to(seq);
        Ok(())
    }

    /// Copies into the metrics what is only looked at now and then.
    fn show_gauges(&mut self) {
        if self.shown_at.elapsed() >= SHOW_EVERY {
            self.shown_at = Instant::now();
            let now = self.now();
            let machine = &self.machine;
            let epoch = machine.epoch().0;
            self.metrics.show(&machine.gauges(now), &machine.counters(), epoch, self.is_degraded);
            self.metrics.show_stores(&machine.stores(now));
        }
    }

    fn event(&mut self, event: Event) -> Result<(), DriverError> {
        match event {
            Event::Inputs(inputs) => {
                for input in inputs {
                    self.feed(input)?;
                }
                Ok(())
            }
            Event::Call(call, reply) => {
                let id = ReplyTo(self.next_id());
                self.calls.insert(id, reply);
                self.feed((Input::Call { reply: id, call }, String::new()))
            }
            Event::OpenWriteback(peer, reply) => {
                let session = WritebackSession(self.next_id());
                // A peer that went away meanwhile is noticed when its stream ends.
                if reply.send(session).is_ok() {
                    self.outbox.writebacks.insert(session, peer);
                }
                Ok(())
            }
            Event::OpenStore(peer, reply) => {
                let session = StoreSession(self.next_id());
                if reply.send(session).is_ok() {
                    self.outbox.stores.insert(session, peer);
                }
                Ok(())
            }
            Event::Ask(question) => self.answer(question),
        }
    }

    fn feed(&mut self, (input, traceparent): Traced) -> Result<(), DriverError> {
        match &input {
            Input::WritebackLost { session } => self.outbox.forget_writeback(*session),
            Input::StoreLost { session } => self.outbox.forget_store(*session),
            _ => {}
        }
        let span = outbox::input_span(&input, &traceparent);
        let now = self.now();
        let result = self.machine.handle(now, input, &mut self.out);
        drop(span);
        result.map_err(DriverError::Machine)
    }

    /// Sends records to the committer and effects to where they may go now.
    fn settle(&mut self, began: Instant, is_waiting: bool) -> Result<(), DriverError> {
        reach(Point::ConversionTurn);
        let epoch = self.machine.epoch().0;
        let mut group = Vec::with_capacity(self.out.records.len());
        for (seq, record) in self.out.records.drain(..) {
            let payload = postcard::to_stdvec(&record).map_err(DriverError::Encode)?;
            group.push(Encoded { seq, epoch, payload });
        }
        let newest = group.last().map(|record: &Encoded| record.seq);
        self.metrics.records.add(group.len() as u64);
        for batch in self.out.batches.drain(..) {
            self.metrics.batches.inc();
            self.metrics.converted_blocks.add(batch.blocks);
            self.outbox.batch(&batch);
        }
        let now_ms = self.now();
        for effect in self.out.effects.drain(..) {
            self.outbox.push(effect, newest, began, now_ms);
        }
        if !group.is_empty() {
            // What rests on no record does not wait for one.
            self.release()?;
            let began = Instant::now();
            match self.committer.submit(group, is_waiting) {
                // Its queue was full: see below.
                Submitted::Queued if began.elapsed() > HELD_UP => {
                    self.clock.stand_still(began.elapsed());
                }
                Submitted::Queued => {}
                // Nobody could be heard meanwhile: that is no silence of theirs.
                Submitted::Durable(held_up) => self.clock.stand_still(held_up),
                Submitted::Ended => return Err(self.commit_failure()),
            }
        }
        reach(Point::ConversionSubmitted);
        reach(Point::ConversionEffects);
        self.release()?;
        reach(Point::ConversionSent);
        Ok(())
    }

    fn release(&mut self) -> Result<(), DriverError> {
        let is_early = is_planted(Bug::ConversionSendsEarly);
        let durable = if is_early { u64::MAX } else { self.durable()? };
        self.outbox.release(durable, &mut self.calls, &self.metrics);
        Ok(())
    }

    fn answer(&mut self, question: Question) -> Result<(), DriverError> {
        let now = self.now();
        // An answer that nobody waits for any more is dropped.
        match question {
            Question::Lookup { volume, generation, range, attempts_over, reply } => {
                let over = self.machine.attempts_over(volume, generation, attempts_over);
                let view = match over {
                    Ok(()) => self.machine.lookup(volume, generation, range),
                    Err(refusal) => Ok(Err(refusal)),
                };
                self.show(view.map_err(DriverError::Machine)?, reply);
            }
            // For people: no service acts on it.
            Question::Extents(name, range, blocks_max, reply) => {
                let found = self.machine.next_extents(&name, range, blocks_max);
                drop(reply.send(found.map_err(DriverError::Machine)?));
            }
            Question::Logged(volume, generation, from, max, reply) => {
                self.show(self.machine.logged(volume, generation, from, max), reply);
            }
            Question::Volume(name, reply) => self.show(self.machine.volume(&name), reply),
            Question::Volumes(reply) => self.show(self.machine.volumes(), reply),
            Question::Stores(reply) => drop(reply.send(self.machine.stores(now))),
            Question::IoEnds(volume, limit, reply) => {
                drop(reply.send(self.machine.io_ends(now, volume, limit)));
            }
            Question::Describe(reply) => drop(reply.send(self.describe())),
            Question::Deletions(reply) => drop(reply.send(self.machine.deletions())),
            Question::Journal(reply) => drop(reply.send(self.committer.journal().clone())),
            Question::Check(reply) => {
                // It looks at the whole map: seconds, if that is large.
                let began = Instant::now();
                let checked = runtime::aside(|| self.machine.check());
                // Nobody could be heard meanwhile: that is no silence of theirs.
                self.clock.stand_still(began.elapsed());
                drop(reply.send(checked.map_err(DriverError::Machine)?));
            }
        }
        Ok(())
    }

    /// Answers once everything that the answer may show, be it by leaving something out, is durable. A
    /// writeback acts on it for good: it closes a volume of a newer generation in its log, and lets
    /// dirty data go whose older version the data log has no more. After a failure, what was not
    /// durable would not have happened.
    fn show<A: Send + 'static>(&mut self, answer: A, reply: oneshot::Sender<A>) {
        self.outbox.answer(self.machine.seq(), answer, reply);
    }

    fn describe(&self) -> DescribeResponse {
        let stats = self.committer.journal().stats();
        let [queued_write_out, queued_direct] = self.machine.queued().map(|count| count as u64);
        DescribeResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: endio_api::protocol::ours(),
            cluster_epoch: self.machine.epoch().0,
            uptime_ms: self.now().0,
            queued_write_out,
            queued_direct,
            io_ends: self.machine.io_ends_in_flight() as u64,
            metadata_full: stats.degraded,
            durable_record: stats.durable_seq,
            journal_bytes: stats.bytes_since_checkpoint,
            checkpoint_bytes: stats.checkpoint_bytes,
            draining: self.machine.is_stopping(),
            deletions: Some(deletions_to_proto(self.machine.deletions())),
        }
    }

    /// Tells the machine when the metadata disk fills up or has room again.
    fn watch_disk(&mut self) -> Result<(), DriverError> {
        let is_degraded = self.committer.journal().is_degraded();
        if is_degraded != self.is_degraded {
            self.is_degraded = is_degraded;
            if is_degraded {
                tracing::error!("metadata disk is full: new writes are refused until it has room");
            } else {
                tracing::info!("metadata disk has room again");
            }
            self.feed((Input::MetadataFull(is_degraded), String::new()))?;
        }
        Ok(())
    }

    /// The drain deadline has passed: everything left ends with an error, nothing converts.
    fn abandon(&mut self) -> Result<(), DriverError> {
        let (held, total) = self.machine.io_ends(self.now(), None, 16);
        let held: Vec<String> = held.iter().map(|io_end| io_end.id.to_string()).collect();
        tracing::warn!(io_ends = total, held = held.join(","), "stopping with io_ends in flight");
        self.feed((Input::AbortAll, String::new()))?;
        self.settle(Instant::now(), true)
    }

    fn close(self) -> Result<(), DriverError> {
        let Self { mut machine, committer, outbox, .. } = self;
        drop(outbox);
        let durable = committer.finish().map_err(DriverError::Commit)?;
        machine.table_mut().close(durable)?;
        tracing::info!(durable_seq = durable, "metadata closed");
        Ok(())
    }

    async fn commit_progress(&mut self) -> Result<(), DriverError> {
        match self.progress.changed().await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.commit_failure()),
        }
    }

    fn durable(&self) -> Result<u64, DriverError> {
        self.progress.borrow().clone().map_err(DriverError::Commit)
    }

    fn commit_failure(&self) -> DriverError {
        let progress = self.progress.borrow().clone();
        DriverError::Commit(progress.err().unwrap_or_else(|| "the commit thread ended".to_owned()))
    }

    fn wake_at(&self) -> Instant {
        if self.machine.has_work() || self.checkpoints.has_work() {
            return Instant::now();
        }
        let idle = Instant::now() + IDLE_MAX;
        let idle = self.outbox.due().map_or(idle, |due| idle.min(due));
        match self.machine.next_deadline() {
            Some(at) => idle.min(self.clock.at(at)),
            None => idle,
        }
    }

    fn now(&self) -> Millis {
        self.clock.now()
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// The machine's database id from the store's: the same number twice, so that it is never zero by
/// accident and stays the same for the life of the directory.
pub(crate) fn database(id: u64) -> DatabaseId {
    let mut database = [0; 16];
    database[..8].copy_from_slice(&id.to_le_bytes());
    database[8..].copy_from_slice(&id.to_le_bytes());
    database
}

#[cfg(test)]
mod tests;
