//! What a seed decides: the cluster, its settings, the network, and every fault with its instant.

use std::fmt;

use endio_testkit::seed::Rng;

/// Bytes of each volume.
pub const VOLUME_BYTES: u64 = 2 << 20;

/// A host of the simulation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    /// The conversion service.
    Conversion,
    /// A block-store.
    Store(usize),
    /// A writeback.
    Writeback(usize),
    /// Where the requests come from.
    Client,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conversion => f.write_str("conversion"),
            Self::Store(index) => write!(f, "store-{index}"),
            Self::Writeback(index) => write!(f, "writeback-{index}"),
            Self::Client => f.write_str("client"),
        }
    }
}

/// Something that happens to the network or to a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// Nothing passes between the two, and what is on its way is lost.
    Partition(Who, Who),
    /// Nothing passes from the first to the second.
    OneWay(Who, Who),
    /// What is sent between the two waits, as if one of them had stopped.
    Hold(Who, Who),
    /// What was held arrives, all at once.
    Release(Who, Who),
    /// The link is whole again.
    Repair(Who, Who),
    /// Messages between the two take up to so many milliseconds.
    Latency(Who, Who, u64),
    /// So many of 100,000 messages between the two break their link for a while.
    Loss(Who, Who, u32),
    /// The process dies. Its peers see their connections end.
    Crash(Who),
    /// The process is asked to stop.
    Stop(Who),
    /// It starts again, over the files that it left.
    Start(Who),
    /// The clock of the process jumps ahead by so many milliseconds: all its timers fire.
    Jump(Who, u64),
    /// The device of this store fails to write and to flush.
    Break(Who),
    /// It works again.
    Mend(Who),
}

/// A volume and how it is used.
#[derive(Clone, Copy, Debug)]
pub struct Volume {
    /// Copies of each block.
    pub replicas: u32,
    /// The writeback that has it at first.
    pub writeback: usize,
    /// Whether another writeback takes it by force now and then.
    pub moves: bool,
}

/// Everything that a seed decides beforehand.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Number of block-stores.
    pub stores: usize,
    /// Number of writebacks.
    pub writebacks: usize,
    /// Volumes, one client for each.
    pub volumes: Vec<Volume>,
    /// Lease of a holder at conversion, in ms.
    pub lease_ms: u32,
    /// How long a request waits for a peer that is away, in ms.
    pub io_timeout_ms: u64,
    /// How long data stays dirty, in ms.
    pub write_out_after_ms: u64,
    /// Whether blocks are written anew all the time that are read in sequence and lie in many pieces.
    pub defragments: bool,
    /// Whether buffered writes of whole blocks go straight to the stores.
    pub goes_around: bool,
    /// Longest way of a message in calm weather, in ms.
    pub latency_ms: u64,
    /// When all faults are mended, in ms.
    pub heal_ms: u64,
    /// Faults and their ends, in order of their instants in ms.
    pub events: Vec<(u64, Event)>,
}

/// Drawn apart, so that what older seeds do stays.
const DEFRAGMENTS: u64 = 0x6672_6167_6d65_6e74;
/// The same for writes around the cache.
const AROUND: u64 = 0x6172_6f75;

impl Plan {
    /// The plan of a seed. Equal seeds give equal plans.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let draw = |rng: &mut Rng, from, to| rng.between(from, to) as usize;
        let (stores, writebacks) = (draw(&mut rng, 1, 3), draw(&mut rng, 1, 2));
        let volumes = (0..draw(&mut rng, 1, 2)).map(|_| Volume {
            replicas: if stores > 1 { rng.between(1, 2) as u32 } else { 1 },
            writeback: draw(&mut rng, 0, writebacks as u64 - 1),
            moves: writebacks > 1 && rng.chance(60),
        });
        let volumes: Vec<_> = volumes.collect();
        let mut plan = Self {
            seed,
            stores,
            writebacks,
            volumes,
            lease_ms: rng.between(600, 3_000) as u32,
            io_timeout_ms: rng.between(3_000, 20_000),
            write_out_after_ms: rng.between(20, 1_000),
            defragments: Rng::new(seed ^ DEFRAGMENTS).chance(50),
            goes_around: Rng::new(seed ^ AROUND).chance(50),
            latency_ms: [2, 5, 20, 60][draw(&mut rng, 0, 3)],
            heal_ms: rng.between(4_000, 12_000),
            events: Vec::new(),
        };
        // Some runs are calm for long, others are never.
        let pause_max = [400, 1_000, 3_000][draw(&mut rng, 0, 2)];
        let mut at = 300 + rng.below(1_000);
        while at < plan.heal_ms {
            plan.fault(&mut rng, at);
            at += rng.between(10, pause_max);
        }
        plan.events.sort_by_key(|(at, _)| *at);
        plan
    }

    /// All processes that may die.
    pub fn services(&self) -> Vec<Who> {
        let stores = (0..self.stores).map(Who::Store);
        let writebacks = (0..self.writebacks).map(Who::Writeback);
        std::iter::once(Who::Conversion).chain(stores).chain(writebacks).collect()
    }

    /// All pairs that talk to each other.
    pub fn links(&self) -> Vec<(Who, Who)> {
        let mut links = Vec::new();
        for store in (0..self.stores).map(Who::Store) {
            links.push((store, Who::Conversion));
        }
        for writeback in (0..self.writebacks).map(Who::Writeback) {
            links.extend([(writeback, Who::Conversion), (Who::Client, writeback)]);
            links.extend((0..self.stores).map(|store| (writeback, Who::Store(store))));
        }
        links
    }

    fn fault(&mut self, rng: &mut Rng, at: u64) {
        let links = self.links();
        let (a, b) = links[rng.below(links.len() as u64) as usize];
        let services = self.services();
        let who = services[rng.below(services.len() as u64) as usize];
        // Up to a bit beyond the lease, mostly less.
        let lease = u64::from(self.lease_ms);
        let most = if rng.chance(30) { lease * 2 } else { lease / 2 };
        let end = at + rng.between(5, most);
        let stores = self.stores as u64;
        let are_moving = self.volumes.iter().any(|volume| volume.moves);
        let mut add = |at, event| self.events.push((at, event));
        match rng.below(100) {
            0..14 => {
                add(at, Event::Partition(a, b));
                add(end, Event::Repair(a, b));
            }
            14..28 => {
                let (from, to) = if rng.chance(50) { (a, b) } else { (b, a) };
                add(at, Event::OneWay(from, to));
                add(end, Event::Repair(a, b));
            }
            28..38 => {
                add(at, Event::Hold(a, b));
                add(end, Event::Release(a, b));
            }
            38..46 => {
                // Cut off from everybody, or stopped as far as others can see.
                let is_held = rng.chance(50);
                for (a, b) in links.into_iter().filter(|(a, b)| *a == who || *b == who) {
                    let begin = if is_held { Event::Hold } else { Event::Partition };
                    let mend = if is_held { Event::Release } else { Event::Repair };
                    add(at, begin(a, b));
                    add(end, mend(a, b));
                }
            }
            46..54 => {
                add(at, Event::Latency(a, b, rng.between(20, lease)));
                add(end, Event::Latency(a, b, self.latency_ms));
            }
            54..60 => {
                add(at, Event::Loss(a, b, rng.between(100, 5_000) as u32));
                add(end, Event::Loss(a, b, 0));
                add(end, Event::Repair(a, b));
            }
            60..82 => {
                add(at, Event::Crash(who));
                add(end, Event::Start(who));
            }
            82..85 => {
                // The whole machine room, but not its disks.
                for who in services {
                    add(at, Event::Crash(who));
                    add(at + rng.between(1, most), Event::Start(who));
                }
            }
            85..91 => {
                add(at, Event::Stop(who));
                add(end, Event::Start(who));
            }
            91..95 => {
                let store = Who::Store(rng.below(stores) as usize);
                add(at, Event::Break(store));
                add(end, Event::Mend(store));
            }
            _ => {
                // Leases at conversion must not end before their holders know, where somebody else
                // may take over: see docs/SAFETY.md on clocks.
                if !(who == Who::Conversion && are_moving) {
                    add(at, Event::Jump(who, rng.between(50, lease * 3)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_plan() {
        for seed in 0..200 {
            let (one, two) = (Plan::draw(seed), Plan::draw(seed));
            assert_eq!(format!("{one:?}"), format!("{two:?}"));
            assert_ne!(format!("{:?}", one.events), format!("{:?}", Plan::draw(seed + 1).events));
        }
    }

    #[test]
    fn every_kind_of_fault_is_drawn() {
        let names = |event: &Event| format!("{event:?}").split('(').next().map(str::to_owned);
        let drawn: std::collections::BTreeSet<_> = (0..50)
            .flat_map(|seed| Plan::draw(seed).events)
            .filter_map(|(_, e)| names(&e))
            .collect();
        assert_eq!(drawn.len(), 13, "{drawn:?}");
    }
}
