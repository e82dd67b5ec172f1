//! Deterministic simulation: one seed decides everything that happens.
//!
//! The pure cores are the real ones: conversion's machine, the stores' gate, writeback's dirty map,
//! range locks, sessions, errors, credit and throttle, and its cache log on a simulated disk. What
//! drives them follows the drivers of the services step by step: decide, apply, commit, then effects.
//! docs/TESTING.md says exactly what is real and what is modelled.

pub mod block;
pub mod chaos;
pub mod client;
pub mod conversion;
pub mod device;
pub mod exec;
pub mod logs;
pub mod mirror;
pub mod net;
pub mod plan;
pub mod store;
pub mod world;
pub mod writeback;

use std::rc::Rc;

use endio_testkit::seed::Rng;
use endio_types::Millis;

use client::Clients;
use exec::{MS, WORLD};
use plan::Plan;
use world::{Planted, World};

/// Most steps of tasks in one run.
const STEPS_MAX: u64 = 4_000_000;

/// How a run went.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What was broken; `None`: nothing.
    pub broken: Option<String>,
    /// Differs when anything that happened differs.
    pub hash: u64,
    /// Steps of tasks.
    pub steps: u64,
    /// Messages that were sent.
    pub messages: u64,
    /// Requests of clients.
    pub requests: u64,
    /// Cells that were read and judged.
    pub judged: u64,
    /// Bits that flipped where data is stored.
    pub flips: u64,
    /// Nodes that were frozen beyond a lease and woke up.
    pub zombies: u64,
    /// The events, if they were wanted.
    pub log: Vec<String>,
}

impl Report {
    /// The name of the checker that found something.
    pub fn checker(&self) -> Option<&str> {
        self.broken.as_deref().map(|broken| broken.split(':').next().unwrap_or_default())
    }
}

/// Runs one seed.
pub fn run(seed: u64, keep_log: bool) -> Report {
    run_plan(seed, Plan::draw(seed), keep_log, None)
}

/// Runs one seed with hardly any room in the stores.
pub fn run_full(seed: u64, keep_log: bool) -> Report {
    run_plan(seed, full(seed), keep_log, None)
}

/// Runs one seed with a bug in one of the modelled parts.
pub fn run_planted(seed: u64, keep_log: bool, planted: Option<Planted>) -> Report {
    let plan = match planted {
        // Elsewhere hardly anything is taken as clean because the stores have it.
        Some(Planted::StoredThoughLogged) => full(seed),
        _ => Plan::draw(seed),
    };
    run_plan(seed, plan, keep_log, planted)
}

fn full(seed: u64) -> Plan {
    let mut plan = Plan::draw(seed);
    plan.fill_up(&mut Rng::new(seed));
    plan
}

fn run_plan(seed: u64, plan: Plan, keep_log: bool, planted: Option<Planted>) -> Report {
    let world = Rc::new(World::new(seed, plan, keep_log, planted));
    let clients = Clients::new(&world);
    let exec = world.exec.clone();
    exec.tell(WORLD, || format!("{:#?}", world.plan));
    world.net.set_delay(world.plan.delay_us.0, world.plan.delay_us.1, world.plan.slow);
    *world.clients.borrow_mut() = Rc::downgrade(&clients);
    let nodes = 1 + world.stores.len() + world.writebacks.len();
    for node in 1..=nodes {
        chaos::start(&world, node);
    }
    clients.start();
    exec.spawn(WORLD, chaos::run(Rc::clone(&world)));
    if world.plan.rot_ms > 0 {
        exec.spawn(WORLD, chaos::rot(Rc::clone(&world)));
    }
    if world.plan.writeback_death_ms > 0 {
        exec.spawn(WORLD, chaos::end_writebacks(Rc::clone(&world)));
    }
    if world.plan.stops_ms > 0 {
        exec.spawn(WORLD, chaos::stop_writebacks(Rc::clone(&world)));
    }
    exec.spawn(WORLD, finish(Rc::clone(&world), Rc::clone(&clients)));
    let plan = &world.plan;
    let slack = plan.io_timeout_ms * 60 + u64::from(plan.limits.lease_ms) * 200 + 60_000;
    exec.run((plan.chaos_ms + slack) * MS, STEPS_MAX);
    if exec.broken().is_none() && !world.is_finished.get() {
        exec.fail(format!("liveness: {} clients still work", clients.working.get()));
    }
    exec.tell(WORLD, || format!("steps by node {:?}", exec.steps_by_node()));
    let report = Report {
        seed,
        broken: exec.broken(),
        hash: exec.hash(),
        steps: exec.steps(),
        messages: world.net.messages(),
        requests: clients.requests.get(),
        judged: clients.judged.get(),
        flips: world.flips.get(),
        zombies: world.zombies.get(),
        log: exec.log(),
    };
    world.net.clear();
    exec.clear();
    report
}

/// After the faults: every request ends, every volume holds what it may, and nothing is left over.
async fn finish(world: Rc<World>, clients: Rc<Clients>) {
    let exec = world.exec.clone();
    while !world.is_healed.get() || clients.working.get() > 0 {
        exec.sleep(10 * MS).await;
    }
    exec.note("clients are done", WORLD, &[]);
    for slot in &clients.slots {
        if !clients.inspect(slot).await {
            return;
        }
    }
    let mut why = String::new();
    for _ in 0..200 {
        if world.plan.is_lazy {
            writeback::want_everything_out(&world);
        }
        match is_quiet(&world) {
            Ok(()) => {
                world.is_finished.set(true);
                exec.note("quiet", WORLD, &[]);
                return exec.finish();
            }
            Err(left) => why = left,
        }
        exec.sleep(u64::from(world.plan.limits.lease_ms) * MS / 10 + 20 * MS).await;
    }
    exec.fail(why);
}

/// Nothing is in flight, nothing waits, and every block is accounted for.
fn is_quiet(world: &World) -> Result<(), String> {
    let mut process = world.conversion.process.borrow_mut();
    let Some(process) = &mut *process else { return Err("liveness: no conversion".to_owned()) };
    let machine = &mut process.machine;
    let now = Millis(u64::MAX / 2);
    let (io_ends, total) = machine.io_ends(now, None, 3);
    if total > 0 {
        return Err(format!("every_io_end_ends: {total} live, {io_ends:?}"));
    }
    let report = machine.check().map_err(|error| error.to_string())?;
    if let Some(finding) = report.findings.first() {
        return Err(format!("space_adds_up: {finding}"));
    }
    for store in machine.stores(now) {
        if store.quarantined_blocks + store.reserved_blocks > 0 {
            return Err(format!("space_adds_up: quarantine does not drain: {store:?}"));
        }
        if store.free_blocks + store.mapped_blocks != store.capacity_blocks {
            return Err(format!("space_adds_up: {store:?}"));
        }
    }
    world.mirror.borrow().logs().compare(&machine.snapshot().logs)?;
    for volume in machine.volumes() {
        let extents = machine.extents(&volume.name, conversion::WHOLE);
        let extents = extents.map_err(|error| error.to_string())?.unwrap_or_default();
        world.mirror.borrow().compare(volume.id, &extents)?;
    }
    let may_stay = |volume, waiting: &[u64]| world.may_stay(machine, volume, waiting);
    let mut stay = Vec::new();
    for writeback in &world.writebacks {
        if let Some(engine) = writeback.serving() {
            stay.extend(engine.is_quiet(may_stay)?);
        }
    }
    for volume in &stay {
        world.exec.note("stays dirty", WORLD, &[volume.0]);
    }
    // Nothing else is dirty any more.
    world.mirror.borrow().logs().is_empty_but_for(&stay)
}
