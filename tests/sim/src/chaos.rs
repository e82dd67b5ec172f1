//! What goes wrong, when the seed says so; and the end of it.

use std::rc::Rc;

use crate::block::CELLS;
use crate::exec::{MS, Node, WORLD};
use crate::world::{CONVERSION, World};
use crate::{conversion, store, writeback};

/// How a node dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// The process; the kernel and its page cache go on.
    Kill,
    /// The machine.
    Power,
}

/// Ends a node.
pub fn kill(world: &Rc<World>, node: Node, death: Death) {
    if !world.exec.is_up(node) {
        return;
    }
    let power = death == Death::Power;
    world.exec.note(if power { "power cut" } else { "killed" }, node, &[]);
    world.exec.kill(node);
    world.net.node_died(node, power);
    if node == CONVERSION {
        return conversion::died(world);
    }
    if let Some(store) = world.stores.iter().find(|store| store.node == node) {
        store.died();
        if power {
            store.disk.cut_power();
            if let Some(clients) = world.clients.borrow().upgrade() {
                clients.store_power_cut();
            }
        }
    }
    if let Some(at) = world.writebacks.iter().position(|one| one.node == node) {
        let writeback = &world.writebacks[at];
        let open = writeback.died();
        if power {
            writeback.disk.cut_power(|| world.exec.chance(500));
            if let Some(clients) = world.clients.borrow().upgrade() {
                clients.power_cut(at, &open);
            }
        }
    }
}

/// Starts a node that is down.
pub fn start(world: &Rc<World>, node: Node) {
    if world.exec.is_up(node) {
        return;
    }
    if node == CONVERSION {
        conversion::start(world);
    } else if node - 2 < world.stores.len() {
        store::start(world, node - 2);
    } else {
        writeback::start(world, node - 2 - world.stores.len());
    }
}

fn later(world: &Rc<World>, us: u64, act: impl FnOnce(&Rc<World>) + 'static) {
    let world = Rc::clone(world);
    let exec = world.exec.clone();
    exec.spawn(WORLD, async move {
        world.exec.sleep(us).await;
        act(&world);
    });
}

/// Lets things go wrong until the time is over, and then makes everything well.
pub async fn run(world: Rc<World>) {
    let plan = world.plan.chaos.clone();
    let end = world.plan.chaos_ms * MS;
    loop {
        let pause = world.exec.between(1, 2 * plan.every_ms) * MS;
        if plan.every_ms == 0 || world.exec.now() + pause >= end {
            break;
        }
        world.exec.sleep(pause).await;
        one(&world);
    }
    world.exec.sleep_until(end).await;
    heal(&world);
}

fn one(world: &Rc<World>) {
    let plan = &world.plan.chaos;
    let weights = [
        plan.kill,
        plan.power,
        plan.pause,
        plan.cut,
        plan.break_stream,
        plan.clock,
        plan.takeover,
        plan.metadata_full,
        plan.store_full,
        plan.stop,
        plan.blackout,
    ];
    let total: u64 = weights.iter().sum();
    let mut drawn = world.exec.below(total);
    if total == 0 {
        return;
    }
    let what = weights.iter().position(|weight| {
        let hit = drawn < *weight;
        drawn = drawn.saturating_sub(*weight);
        hit
    });
    let exec = &world.exec;
    let nodes = 1 + world.stores.len() + world.writebacks.len();
    let node = 1 + exec.below(nodes as u64) as usize;
    let lease_us = u64::from(world.plan.limits.lease_ms) * MS;
    let soon = exec.below(lease_us * 2);
    match what {
        Some(kind @ (0 | 1)) => {
            kill(world, node, if kind == 0 { Death::Kill } else { Death::Power });
            later(world, soon, move |world| start(world, node));
        }
        Some(2) if !exec.is_paused(node) && exec.is_up(node) => {
            exec.note("paused", node, &[]);
            exec.pause(node);
            let life = exec.life(node);
            let pause = exec.below(lease_us * 4);
            later(world, pause, move |world| {
                if world.exec.life(node) == life {
                    world.zombies.set(world.zombies.get() + u64::from(pause > lease_us));
                    world.exec.note("resumed", node, &[]);
                    world.exec.resume(node);
                }
            });
        }
        Some(3) => {
            let other = 1 + exec.below(nodes as u64) as usize;
            exec.note("cut", node, &[other as u64]);
            world.net.cut(node, other);
            let both = exec.chance(500);
            if both {
                world.net.cut(other, node);
            }
            later(world, soon, move |world| {
                world.net.mend(node, other);
                world.net.mend(other, node);
            });
        }
        Some(4) => {
            let other = 1 + exec.below(nodes as u64) as usize;
            exec.note("break", node, &[other as u64]);
            world.net.break_one(node, other);
        }
        Some(5) => {
            let rate = exec.between(700, 1400);
            let jump = if exec.chance(300) { exec.below(lease_us / MS) } else { 0 };
            exec.note("clock", node, &[rate, jump]);
            exec.set_clock(node, rate, jump);
        }
        Some(6) => world.takeover_wanted.set(world.takeover_wanted.get() + 1),
        Some(7) => {
            world.conversion.set_full(true);
            later(world, soon, |world| world.conversion.set_full(false));
        }
        Some(8) => {
            let at = exec.below(world.stores.len() as u64) as usize;
            world.stores[at].disk.set_full(true);
            later(world, soon, move |world| world.stores[at].disk.set_full(false));
        }
        Some(9) => {
            exec.note("stop", CONVERSION, &[]);
            world.conversion.stop();
            let life = exec.life(CONVERSION);
            let patience = world.plan.drain_ms * 2 * MS;
            later(world, patience, move |world| {
                if world.exec.life(CONVERSION) == life {
                    kill(world, CONVERSION, Death::Kill);
                }
                start(world, CONVERSION);
            });
        }
        Some(10) => {
            for node in 1..=nodes {
                kill(world, node, Death::Power);
                later(world, exec.below(lease_us), move |world| start(world, node));
            }
        }
        _ => {}
    }
}

/// Flips bits of stored blocks that have a checksum until the time of faults is over.
pub async fn rot(world: Rc<World>) {
    let end = world.plan.chaos_ms * MS;
    loop {
        let pause = world.rare.borrow_mut().between(1, 2 * world.plan.rot_ms) * MS;
        if world.exec.now() + pause >= end {
            return;
        }
        world.exec.sleep(pause).await;
        let homes: Vec<_> = world.mirror.borrow().homes_apart().collect();
        let mut rare = world.rare.borrow_mut();
        let (at, cell, bit) = (rare.below(homes.len() as u64), rare.below(CELLS), rare.below(64));
        if let Some((store, pblk)) = homes.get(at as usize).copied()
            && let Some(disk) = world.disk_of(store)
        {
            world.exec.note("a bit flips", WORLD, &[store.0.into(), pblk, cell, bit]);
            disk.flip(pblk, cell as usize, bit);
            world.flips.set(world.flips.get() + 1);
        }
    }
}

/// Ends writebacks alone, again and again, until the time of faults is over.
pub async fn end_writebacks(world: Rc<World>) {
    let end = world.plan.chaos_ms * MS;
    let lease_us = u64::from(world.plan.limits.lease_ms) * MS;
    loop {
        let pause = world.rare.borrow_mut().between(1, 2 * world.plan.writeback_death_ms) * MS;
        if world.exec.now() + pause >= end {
            return;
        }
        world.exec.sleep(pause).await;
        let (at, is_power, soon) = {
            let mut rare = world.rare.borrow_mut();
            let writebacks = world.writebacks.len() as u64;
            (rare.below(writebacks), rare.chance(50), rare.below(lease_us))
        };
        let node = world.writebacks[at as usize].node;
        kill(&world, node, if is_power { Death::Power } else { Death::Kill });
        later(&world, soon, move |world| start(world, node));
    }
}

/// Stops writebacks in order, now and then, until the time of faults is over.
pub async fn stop_writebacks(world: Rc<World>) {
    let end = world.plan.chaos_ms * MS;
    loop {
        let pause = world.exec.between(1, 2 * world.plan.stops_ms) * MS;
        if world.exec.now() + pause >= end {
            return;
        }
        world.exec.sleep(pause).await;
        let at = world.exec.below(world.writebacks.len() as u64) as usize;
        let (node, engine) = (world.writebacks[at].node, world.writebacks[at].serving());
        let (Some(engine), Some(clients)) = (engine, world.clients.borrow().upgrade()) else {
            continue;
        };
        let until = world.exec.now() + world.exec.below(4 * world.plan.io_timeout_ms) * MS;
        let wb = writeback::Wb { world: Rc::clone(&world), at, engine };
        world.exec.note("stop", node, &[]);
        let acked = clients.flush_by_stop(at);
        if clients.inside(&wb, wb.clone().stop(until)).await == Some(true) {
            clients.stopped(acked);
        }
        if world.writebacks[at].is(&wb.engine) {
            kill(&world, node, Death::Kill);
            let soon = world.exec.below(u64::from(world.plan.limits.lease_ms) * MS);
            later(&world, soon, move |world| start(world, node));
        }
    }
}

/// Everything works from now on.
fn heal(world: &Rc<World>) {
    let exec = &world.exec;
    exec.note("heal", WORLD, &[]);
    world.net.mend_all();
    world.net.set_delay(10, 300, 0);
    world.conversion.set_full(false);
    for store in &world.stores {
        store.disk.heal();
    }
    let nodes = 1 + world.stores.len() + world.writebacks.len();
    for node in 1..=nodes {
        if exec.is_paused(node) {
            exec.resume(node);
        }
        start(world, node);
    }
    if world.conversion.is_stopping() {
        kill(world, CONVERSION, Death::Kill);
        start(world, CONVERSION);
    }
    world.is_healed.set(true);
}
