//! Random histories against slow, obvious bookkeeping.
//!
//! Replay a longer search with `PROPTEST_CASES=5000 cargo test -p endio-state-machine --test machine
//! random`; a failing seed is printed and kept by proptest.

use std::collections::{BTreeMap, BTreeSet};

use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_types::*;
use proptest::prelude::*;

use crate::rig::*;

const STORES: u64 = 3;
const CAPACITY: u64 = 64;
const BLOCKS: u64 = 24;
const NAMES: [&str; 3] = ["one", "two", "place"];

type Home = (StoreId, Pblk);

/// The machine and what an observer knows about it.
struct World {
    rig: Rig,
    begun: Vec<Begun>,
    /// Blocks of a granted token whose bio may still land, by io_end.
    hot: BTreeMap<Home, IoEndId>,
    /// Blocks named by the map that a power cut would bring back.
    durable_map: BTreeSet<Home>,
    /// Blocks that reads may use, per volume, since the last confirm or open.
    readable: BTreeMap<&'static str, BTreeSet<Home>>,
    /// Blocks that readers of a generation below this one may use until their store has fenced it.
    fencing: Vec<(VolumeId, Generation, BTreeSet<Home>)>,
    /// Logical blocks for which every replica of some io_end was released as durable.
    acknowledged: BTreeSet<(VolumeId, u64)>,
    /// Logical blocks that a completion called converted, and nothing has changed since.
    promised: BTreeSet<(VolumeId, u64)>,
    incarnation: [u64; STORES as usize + 1],
    seen: usize,
    done: usize,
}

fn small() -> Limits {
    Limits {
        lease_ms: 100,
        io_end_life_max_ms: 500,
        convert_batch_max: 3,
        drain_batches_max: 1,
        change_chunks_max: 1,
        fence_io_ends_max: 2,
        punch_blocks_max: 8,
        punch_interval_ms: 10,
        punch_run_blocks: 2,
        punch_idle_ms: 40,
        unpunched_blocks_max: 6,
        reuse_blocks: 3,
        ended_max: 8,
        search_runs_max: 4,
        ..Limits::default()
    }
}

impl World {
    fn new() -> Self {
        let mut rig = Rig::with_limits(STORES, CAPACITY, small());
        rig.create(NAMES[0], BLOCKS * BLOCK_BYTES, 1, false, true);
        rig.create(NAMES[1], BLOCKS * BLOCK_BYTES, 2, false, false);
        rig.create(NAMES[2], BLOCKS * BLOCK_BYTES, 1, true, false);
        for name in NAMES {
            rig.open(name, "wb");
        }
        rig.auto_commit = false;
        let mut world = Self {
            rig,
            begun: vec![],
            hot: BTreeMap::new(),
            durable_map: BTreeSet::new(),
            readable: BTreeMap::new(),
            fencing: vec![],
            acknowledged: BTreeSet::new(),
            promised: BTreeSet::new(),
            incarnation: [1; STORES as usize + 1],
            seen: 0,
            done: 0,
        };
        world.seen = world.rig.sent.len();
        world
    }

    fn info(&self, n: u16) -> VolumeInfo {
        self.rig.machine.volume(NAMES[usize::from(n) % 3]).unwrap()
    }

    fn homes(&mut self, name: &str) -> BTreeSet<Home> {
        let whole = LblkRange::new(0, 1 << 30);
        let extents = self.rig.machine.extents(name, whole).unwrap().unwrap_or_default();
        let mut homes = BTreeSet::new();
        for extent in extents {
            for place in extent.places.as_slice() {
                homes.extend((0..extent.range.len).map(|n| (place.store, Pblk(place.pblk.0 + n))));
            }
        }
        homes
    }

    fn begin(&mut self, n: u16, a: u16, len: u16) {
        let volume = self.info(n);
        let lblk = u64::from(a) % BLOCKS;
        let blocks = (u64::from(len) % 9).min(BLOCKS - lblk) as u32;
        let mut begin = begin_io(&volume, lblk, blocks);
        if a.is_multiple_of(5) {
            begin.lane = Lane::WriteOut;
        }
        if volume.growable && len.is_multiple_of(3) {
            begin.lblk = Lblk(lblk + 6);
            begin.size_after_bytes = (lblk + 6 + u64::from(blocks)) * BLOCK_BYTES;
        }
        if !volume.in_place && blocks > 0 && !len.is_multiple_of(4) {
            begin.more = more_ranges(begin.lblk.0 + u64::from(blocks), len);
            begin.size_after_bytes = match (volume.growable, begin.more.last()) {
                (true, Some(last)) => last.end() * BLOCK_BYTES,
                _ => begin.size_after_bytes,
            };
        }
        begin.avoid_stores = vec![StoreId(u32::from(len) % 4)];
        let Ok(begun) = self.rig.try_begin(begin) else { return };
        let current = self.homes(&volume.name);
        for segment in &begun.segments {
            for at in 0..u64::from(segment.token.blocks) {
                let home = (segment.token.store, Pblk(segment.token.pblk.0 + at));
                let other = self.hot.get(&home);
                assert!(other.is_none(), "{home:?} may still be written by {other:?}");
                if volume.in_place && current.contains(&home) {
                    self.hot.insert(home, begun.submitter.io_end);
                    continue;
                }
                assert!(!self.durable_map.contains(&home), "{home:?} is in a map on disk");
                let reader = self.readable.iter().find(|(_, homes)| homes.contains(&home));
                assert!(reader.is_none(), "{home:?} may still be read by {:?}", reader.unwrap().0);
                let old = self.fencing.iter().find(|(_, _, homes)| homes.contains(&home));
                assert!(
                    old.is_none(),
                    "{home:?} may be read by an old owner of {:?}",
                    old.unwrap().0
                );
                self.hot.insert(home, begun.submitter.io_end);
            }
        }
        self.begun.push(begun);
    }

    fn pick(&self, a: u16) -> Option<Begun> {
        let recent = self.begun.len().min(12);
        let first = self.begun.len() - recent;
        (recent > 0).then(|| self.begun[first + usize::from(a) % recent].clone())
    }

    fn release(&mut self, a: u16, b: u16) {
        let Some(begun) = self.pick(a) else { return };
        if begun.segments.is_empty() {
            return;
        }
        let mut token = begun.segments[usize::from(b) % begun.segments.len()].token;
        // A store releases when its bio is over.
        let store = token.store;
        let bio = token.pblk.0..token.pblk.0 + u64::from(token.blocks);
        self.hot
            .retain(|home, id| *id != token.io_end || home.0 != store || !bio.contains(&home.1.0));
        match b % 23 {
            0 => {
                self.rig.release(&token, SegmentOutcome::Failed(Reason::IoError));
            }
            1 => {
                token.pblk = Pblk(token.pblk.0 ^ 1);
                assert!(self.rig.durable_release(&token).is_some());
            }
            _ => {
                let refused = self.rig.durable_release(&token);
                if refused.is_none() {
                    let segment = begun.segments.iter().find(|s| s.token == token).unwrap();
                    for at in begun.lblks(segment) {
                        self.acknowledged.insert((token.volume, at));
                    }
                }
            }
        }
    }

    fn submit(&mut self, a: u16, b: u16) {
        let Some(begun) = self.pick(a) else { return };
        let unsent = match b % 7 {
            0 if !begun.segments.is_empty() => vec![begun.segments[0].token.segment],
            _ => vec![],
        };
        self.rig.submit_with(&begun.submitter, unsent, b % 17 == 3);
    }

    fn change(&mut self, n: u16, a: u16, b: u16) {
        let volume = self.info(n);
        let lblk = u64::from(a) % BLOCKS;
        let blocks = (u64::from(b) % 12 + 1).min(BLOCKS - lblk);
        let change = match b % 3 {
            0 => MapChange::Trim,
            1 => MapChange::Allocate,
            _ => MapChange::Zero,
        };
        if change != MapChange::Allocate {
            self.promised.retain(|(id, at)| *id != volume.id || *at < lblk || *at >= lblk + blocks);
        }
        let call = change_call(&volume, change, lblk, blocks);
        self.rig.call_later(call);
        // The range may be converted by io_ends ahead of the change; what they promise until it
        // has run is not kept.
        self.settle();
    }

    /// Runs everything that waits, so that the bookkeeping knows what came first.
    fn settle(&mut self) {
        for _ in 0..200 {
            if self.rig.machine.is_idle() {
                break;
            }
            self.rig.drain_once();
            self.rig.now = self.rig.now.plus(20);
            self.rig.keep_alive(STORES);
            self.acknowledge();
        }
        assert!(self.rig.machine.is_idle(), "every io_end ends");
        self.commit();
        self.forget_promises();
    }

    fn forget_promises(&mut self) {
        self.observe();
        self.promised.clear();
    }

    fn fence_done(&mut self, kind: &EffectKind) {
        let EffectKind::Store(session, message) = kind else { return };
        let (session, store) = (*session, StoreId(session.0 as u32));
        match message {
            ToStore::Fence { fence, io_ends, volumes } => {
                for (volume, needed, homes) in &mut self.fencing {
                    if volumes.iter().any(|(id, fenced)| id == volume && fenced >= needed) {
                        homes.retain(|home| home.0 != store);
                    }
                }
                self.hot.retain(|home, id| home.0 != store || !io_ends.contains(id));
                let message = FromStore::FenceDone { fence: *fence };
                self.rig.input(Input::Store { session, message });
            }
            ToStore::Punch { punch, .. } => {
                let message = FromStore::PunchDone { punch: *punch };
                self.rig.input(Input::Store { session, message });
            }
            _ => {}
        }
    }

    /// Peers acknowledge what they were told.
    fn acknowledge(&mut self) {
        for _ in 0..1000 {
            let Some(kind) = self.rig.sent.get(self.seen).cloned() else { return };
            self.seen += 1;
            self.fence_done(&kind);
        }
    }

    fn restart_store(&mut self, a: u16) {
        let store = u64::from(a) % STORES + 1;
        self.incarnation[store as usize] += 1;
        self.hot.retain(|home, _| u64::from(home.0.0) != store);
        self.rig.join_store(store, self.incarnation[store as usize], CAPACITY);
        self.commit();
    }

    fn commit(&mut self) {
        self.rig.commit();
        self.durable_map = NAMES.iter().flat_map(|name| self.homes(name)).collect();
    }

    fn confirm(&mut self, n: u16) {
        let name = NAMES[usize::from(n) % 3];
        let homes = self.homes(name);
        self.readable.insert(name, homes);
        let info = self.info(n);
        self.rig.confirm(&info);
    }

    fn reopen(&mut self, n: u16) {
        self.settle();
        let name = NAMES[usize::from(n) % 3];
        let homes = self.homes(name);
        // Readers of the old generation live until their store has fenced it.
        let mut old = self.readable.insert(name, homes.clone()).unwrap_or_default();
        old.extend(homes);
        self.rig.auto_commit = true;
        let opened = self.rig.open(name, "wb");
        self.rig.auto_commit = false;
        self.fencing.push((opened.id, opened.generation, old));
        self.commit();
    }

    fn crash(&mut self) {
        self.rig.crash();
        self.begun.clear();
        self.hot.clear();
        self.readable.clear();
        self.fencing.clear();
        self.promised.clear();
        self.seen = self.rig.sent.len();
        self.done = self.rig.completions.len();
        self.rig.assert_sound();
        self.rig.hello(WB, "wb");
        for store in 1..=STORES {
            self.rig.register(store, self.incarnation[store as usize], CAPACITY);
            self.rig.commit();
            self.rig.ready(store);
        }
        self.commit();
    }

    fn reserve(&mut self, n: u16, a: u16) {
        let volume = self.info(n);
        self.rig.say(FromWriteback::Reserve {
            request: 9,
            volume: volume.id,
            generation: volume.generation,
            reset: a.is_multiple_of(3),
            add_blocks: u64::from(a) % 7,
            drop_blocks: u64::from(a) % 2,
        });
    }

    fn observe(&mut self) {
        for done in &self.rig.completions[self.done..] {
            if done.failed.is_none() {
                for range in &done.converted {
                    let blocks = range.start.0..range.end();
                    self.promised.extend(blocks.map(|at| (done.volume, at)));
                }
            }
        }
        self.done = self.rig.completions.len();
    }

    fn check(&mut self) {
        self.observe();
        self.rig.assert_sound();
        for name in NAMES {
            let info = self.rig.machine.volume(name).unwrap();
            let written: BTreeSet<u64> = self.rig.written(&info).into_iter().collect();
            for at in &written {
                assert!(
                    self.acknowledged.contains(&(info.id, *at)),
                    "{name} {at} was never written"
                );
            }
            let promised = self.promised.iter().filter(|(id, _)| *id == info.id);
            for (_, at) in promised {
                assert!(written.contains(at), "{name} {at} was promised and is gone");
            }
            assert!(
                written.last().is_none_or(|last| *last < info.size_bytes.div_ceil(BLOCK_BYTES))
            );
        }
    }

    /// Faults stop: everything ends and every block is free or mapped.
    fn heal(&mut self) {
        self.rig.auto_commit = true;
        self.commit();
        for round in 0..80 {
            self.rig.now = self.rig.now.plus(20);
            self.rig.keep_alive(STORES);
            self.acknowledge();
            self.rig.drain();
            if round > 30 {
                NAMES.iter().enumerate().for_each(|(n, _)| self.confirm(n as u16));
            }
        }
        self.check();
        assert!(self.rig.machine.is_idle());
        for store in self.rig.machine.stores(self.rig.now) {
            assert_eq!(store.reserved_blocks, 0);
            assert_eq!(store.quarantined_blocks, 0, "store {}", store.id);
        }
        let before = (self.rig.machine.snapshot(), self.places());
        self.rig.crash();
        let mut after = (self.rig.machine.snapshot(), self.places());
        // Starting again adds exactly one record: the new epoch.
        assert_eq!(after.0.epoch.0, before.0.epoch.0 + 1);
        after.0.epoch = before.0.epoch;
        after.0.seq -= 1;
        assert_eq!(after, before, "replay gives the same durable state");
    }

    fn places(&mut self) -> Vec<BTreeSet<Home>> {
        NAMES.iter().map(|name| self.homes(name)).collect()
    }

    fn act(&mut self, (what, a, b, c): (u8, u16, u16, u16)) {
        match what % 32 {
            0..=7 => self.begin(a, b, c),
            8..=14 => self.release(a, b),
            15..=19 => self.submit(a, b),
            20 => self.change(a, b, c),
            21 | 22 => self.rig.drain_once(),
            23 => self.commit(),
            24 => self.acknowledge(),
            25 => self.confirm(a),
            26 => {
                self.rig.keep_alive(STORES);
                self.rig.advance(u64::from(b) % 40);
            }
            27 => self.reserve(a, b),
            28 if a % 4 == 0 => self.crash(),
            29 if a % 4 == 0 => self.restart_store(b),
            30 if a % 4 == 0 => self.reopen(b),
            31 if a % 4 == 0 => self.rig.advance(u64::from(b) % 200),
            _ => self.rig.drain_once(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    /// Scenario 72.
    #[test]
    fn random_histories_keep_every_invariant(
        actions in prop::collection::vec(any::<(u8, u16, u16, u16)>(), 1..250)
    ) {
        let mut world = World::new();
        for action in actions {
            world.act(action);
            world.check();
        }
        world.heal();
    }
}

/// Up to three short ranges behind `end`, some side by side, inside the volume.
fn more_ranges(end: u64, seed: u16) -> Vec<LblkRange> {
    let mut at = end;
    let mut more = Vec::new();
    for step in 0..u64::from(seed) % 4 {
        let start = at + (u64::from(seed) >> (2 + step)) % 3;
        let len = 1 + (u64::from(seed) >> (5 + step)) % 2;
        if start + len > BLOCKS {
            break;
        }
        more.push(LblkRange::new(start, len));
        at = start + len;
    }
    more
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}
