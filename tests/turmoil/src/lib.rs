//! The real services over a simulated network.
//!
//! Conversion, block-stores, writebacks and their clients are hosts of one [`turmoil`] simulation:
//! their own code, drivers, gRPC and files, over simulated sockets and time, in one thread. A
//! [`Plan`] drawn from a seed has partitions in one or both directions, held and slow messages,
//! links that break, processes that die, stop and start again over what lies in their directories,
//! devices that fail, and clocks that jump. After the faults everything is mended, and then everything must end: each
//! request has an answer, the volumes read back as the oracle allows, no io_end lives, space adds
//! up, and all of that once more after every process was killed and started.
//!
//! # What a seed replays, and what it does not
//! Cluster, settings, requests, faults and their simulated instants are the same each time, and so
//! is what the network draws as long as the same messages are sent. Not replayed: keys, ids and
//! jitter that the services draw themselves, and the order in which their threads (writers,
//! flushers, committers) and the blocking pool end what they do. Simulated time waits for them
//! (`pace`), so a slow disk is no timeout, but two runs of a seed may send other messages. A
//! failure may need its seed run several times.
//!
//! # What dies with a host
//! A crash drops every task of a host where it waits, closes its files and ends its connections.
//! It does not cut between two instructions (`endio-crash-tests` does), and what was written stays
//! written: nothing here loses power (`endio-power-tests`). Records that conversion has handed to
//! its committer are still committed.

mod client;
mod device;
mod host;
mod net;
mod pace;
pub mod plan;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

pub use client::Phase;
use client::Shared;
use host::{Command, Slot};
use pace::Pace;
use plan::{Event, Plan, Who};
use turmoil::{Builder, Sim};

/// Simulated time after which a run that has not ended is broken.
const TIME_MAX: Duration = Duration::from_secs(400);

/// How a run went.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What happened when.
    pub log: Vec<String>,
    /// Simulated milliseconds.
    pub simulated_ms: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Requests that were sent more than once.
    pub retries: u64,
    /// Volumes that were taken by force.
    pub takeovers: u64,
    /// Faults, without their ends.
    pub faults: u64,
    /// Steps that did not wait for all threads.
    pub overruns: u64,
    /// The promise that was broken. `None`: all were kept.
    pub broken: Option<String>,
}

/// Panics of tasks, which nobody hears of otherwise.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(panic);
        }));
    });
}

/// Runs a seed. One at a time in a process: others wait.
pub fn run(seed: u64) -> Report {
    run_plan(Plan::draw(seed))
}

/// Runs a plan.
pub fn run_plan(plan: Plan) -> Report {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    count_panics();
    let panics = PANICS.load(Ordering::SeqCst);
    let mut report = World::new(plan).run();
    let panics = PANICS.load(Ordering::SeqCst) - panics;
    if report.broken.is_none() && panics > 0 {
        report.broken = Some(format!("no_unexpected_log: {panics} panics"));
    }
    report
}

struct World<'a> {
    plan: Plan,
    sim: Sim<'a>,
    slots: Vec<Rc<Slot>>,
    shared: Rc<Shared>,
    pace: Pace,
    faults: u64,
    _directory: Option<tempfile::TempDir>,
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl World<'_> {
    fn new(plan: Plan) -> Self {
        // A directory in memory: nothing here loses power, and a sync that is quick keeps the
        // simulation quick.
        let directory = tempfile::Builder::new().prefix("endio-turmoil").tempdir_in("/dev/shm");
        let directory = directory.or_else(|_| tempfile::tempdir()).ok();
        let root = directory.as_ref().map(|dir| dir.path().to_owned()).unwrap_or_default();
        let mut sim = Builder::new()
            .rng_seed(plan.seed)
            .simulation_duration(TIME_MAX * 2)
            .tick_duration(millis(2))
            .min_message_latency(millis(0))
            .max_message_latency(millis(plan.latency_ms))
            .fail_rate(0.0)
            .repair_rate(0.01)
            .tcp_capacity(1024)
            .enable_random_order()
            .build();
        let mut slots = Vec::new();
        for who in plan.services() {
            let slot = Rc::new(Slot::new(who, root.join(who.to_string()), plan.clone()));
            slots.push(Rc::clone(&slot));
            sim.host(who.to_string(), move || {
                let slot = Rc::clone(&slot);
                async move { slot.run().await }
            });
        }
        let shared = Rc::new(Shared::new());
        sim.client(Who::Client.to_string(), client::run(plan.clone(), Rc::clone(&shared)));
        Self { plan, sim, slots, shared, pace: Pace::new(), faults: 0, _directory: directory }
    }

    fn run(mut self) -> Report {
        let ended = catch_unwind(AssertUnwindSafe(|| self.steps()));
        let broken = match ended {
            Ok(Ok(())) => None,
            Ok(Err(broken)) => Some(broken),
            Err(_) => Some("panic: in the simulation".to_owned()),
        };
        if let Some(broken) = &broken {
            self.note(format_args!("BROKEN {broken}"));
        }
        let shared = &self.shared;
        Report {
            seed: self.plan.seed,
            simulated_ms: self.now(),
            requests: shared.requests.get(),
            retries: shared.retries.get(),
            takeovers: shared.takeovers.get(),
            faults: self.faults,
            overruns: self.pace.overruns,
            log: shared.log.take(),
            broken,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.sim.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn note(&self, text: impl std::fmt::Display) {
        let line = format!("{:>7} ms  {text}", self.now());
        self.shared.log.borrow_mut().push(line);
    }

    fn steps(&mut self) -> Result<(), String> {
        let mut events = std::mem::take(&mut self.plan.events).into_iter().peekable();
        loop {
            let now = self.now();
            match self.shared.phase.get() {
                Phase::Faults if now >= self.plan.heal_ms => {
                    self.heal();
                    self.shared.phase.set(Phase::Healed);
                }
                Phase::Faults => {
                    while let Some((_, event)) = events.next_if(|(at, _)| *at <= now) {
                        self.happen(event);
                    }
                }
                Phase::Judged => {
                    self.note("all are killed and started once more");
                    for who in self.plan.services() {
                        self.crash(who);
                    }
                    self.pace.rest();
                    for who in self.plan.services() {
                        self.sim.bounce(who.to_string());
                    }
                    self.shared.phase.set(Phase::Again);
                }
                Phase::Healed => self.start_what_stopped(),
                Phase::Again | Phase::Done => {}
            }
            let is_over = self.sim.step().map_err(|error| error.to_string())?;
            self.pace.rest();
            if is_over {
                return Ok(());
            }
            if self.sim.elapsed() > TIME_MAX {
                let phase = self.shared.phase.get();
                return Err(format!("liveness: still {phase:?} after {TIME_MAX:?}"));
            }
        }
    }

    fn slot(&self, who: Who) -> Option<&Rc<Slot>> {
        self.slots.iter().find(|slot| slot.who == who)
    }

    fn crash(&mut self, who: Who) {
        if let Some(slot) = self.slot(who) {
            slot.die();
        }
        self.sim.crash(who.to_string());
    }

    fn start(&mut self, who: Who) {
        if !self.sim.is_host_running(who.to_string()) {
            // An orderly stop left the process: its files are closed before the next one opens them.
            if let Some(slot) = self.slot(who) {
                slot.die();
            }
            self.sim.bounce(who.to_string());
        }
    }

    fn happen(&mut self, event: Event) {
        self.note(format_args!("{event:?}"));
        let text = |a: Who, b: Who| (a.to_string(), b.to_string());
        let is_end = matches!(event, Event::Release(..) | Event::Repair(..) | Event::Mend(_))
            || matches!(event, Event::Start(_));
        self.faults += u64::from(!is_end);
        match event {
            Event::Partition(a, b) => {
                let (a, b) = text(a, b);
                self.sim.partition(a, b);
            }
            Event::OneWay(a, b) => {
                let (a, b) = text(a, b);
                self.sim.partition_oneway(a, b);
            }
            Event::Hold(a, b) => {
                let (a, b) = text(a, b);
                self.sim.hold(a, b);
            }
            Event::Latency(a, b, ms) => {
                let (a, b) = text(a, b);
                self.sim.set_link_max_message_latency(a, b, millis(ms));
            }
            Event::Loss(a, b, rate) => {
                let (a, b) = text(a, b);
                self.sim.set_link_fail_rate(a, b, f64::from(rate) / 100_000.0);
            }
            Event::Crash(who) => self.crash(who),
            Event::Stop(who) => self.order(who, Command::Stop),
            Event::Jump(who, ms) => self.order(who, Command::Jump(millis(ms))),
            Event::Start(who) => self.start(who),
            Event::Break(who) => self.break_device(who, true),
            Event::Mend(who) => self.break_device(who, false),
            Event::Release(a, b) => {
                let (a, b) = text(a, b);
                self.sim.release(a, b);
            }
            Event::Repair(a, b) => {
                let (a, b) = text(a, b);
                self.sim.repair(a, b);
            }
        }
    }

    fn order(&self, who: Who, command: Command) {
        if let Some(slot) = self.slot(who) {
            slot.tell(command);
        }
    }

    fn break_device(&self, who: Who, is_broken: bool) {
        if let Some(slot) = self.slot(who) {
            slot.break_device(is_broken);
        }
    }

    fn heal(&mut self) {
        self.note("everything is mended");
        self.sim.set_fail_rate(0.0);
        self.plan.services().into_iter().for_each(|who| self.break_device(who, false));
        for (a, b) in self.plan.links() {
            let (a, b) = (a.to_string(), b.to_string());
            self.sim.set_link_fail_rate(&*a, &*b, 0.0);
            self.sim.set_link_max_message_latency(&*a, &*b, millis(self.plan.latency_ms));
            self.sim.release(&*a, &*b);
            self.sim.repair(&*a, &*b);
        }
        self.start_what_stopped();
    }

    fn start_what_stopped(&mut self) {
        for who in self.plan.services() {
            self.start(who);
        }
    }
}
