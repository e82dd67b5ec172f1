//! Random histories of one volume, against what its next owner may find: the map, and over it the log.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use endio_state_machine::chunk::{CHUNK_BLOCKS, ExtentState};
use endio_state_machine::data_log::LogEntry;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_types::*;
use proptest::prelude::*;

use super::change_after;
use crate::rig::*;

const STORES: u64 = 2;
const CAPACITY: u64 = 600;
/// The blocks that are used: across two chunks, so that a trim takes two steps.
const FIRST: u64 = CHUNK_BLOCKS - 6;
const BLOCKS: u64 = 12;

/// A write-out, and which version of each block it carries.
struct Io {
    begun: Begun,
    versions: BTreeMap<u64, u64>,
    open: BTreeSet<usize>,
}

/// What is known of a block.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Who comes next finds this version or a newer one; 0: nothing was ever promised.
    floor: u64,
    /// A change made it a hole (or was asked to) at this version.
    hole: u64,
}

/// The machine, a writeback that keeps to the rules, and what that was told.
struct World {
    rig: Rig,
    volume: VolumeInfo,
    /// Grows with each write and change of any block.
    version: u64,
    /// Blocks that wait, with their newest version.
    dirty: BTreeMap<u64, u64>,
    ios: Vec<Io>,
    /// Messages to the log that have not arrived.
    stream: VecDeque<LogData>,
    log_number: u64,
    /// Blocks and versions of messages to the log that are not answered.
    asked: BTreeMap<u64, Vec<(u64, u64)>>,
    /// Changes that are not answered: nothing in their range is written.
    changes: BTreeMap<u64, (LblkRange, u64)>,
    known: BTreeMap<u64, Known>,
    request: u64,
    seen: usize,
    done: usize,
}

impl World {
    fn new(replicas: u32) -> Self {
        let small = Limits {
            convert_batch_max: 3,
            drain_batches_max: 1,
            change_chunks_max: 1,
            log_blocks_per_volume_max: 20,
            ..limits()
        };
        let mut rig = Rig::with_limits(STORES, CAPACITY, small);
        let volume = rig.volume("v", 2 * CHUNK_BLOCKS, replicas);
        rig.promise(volume.id, volume.generation, 20);
        rig.auto_commit = false;
        Self {
            volume,
            version: 0,
            dirty: BTreeMap::new(),
            ios: vec![],
            stream: VecDeque::new(),
            log_number: 0,
            asked: BTreeMap::new(),
            changes: BTreeMap::new(),
            known: BTreeMap::new(),
            request: 1 << 40,
            seen: rig.sent.len(),
            done: 0,
            rig,
        }
    }

    fn range(a: u16, b: u16) -> LblkRange {
        let at = u64::from(a) % BLOCKS;
        LblkRange::new(FIRST + at, (u64::from(b) % 4 + 1).min(BLOCKS - at))
    }

    fn is_locked(&self, lblk: u64) -> bool {
        self.changes.values().any(|(range, _)| range.overlaps(LblkRange::new(lblk, 1)))
    }

    fn is_in_flight(&self, lblk: u64) -> bool {
        self.ios.iter().any(|io| io.versions.contains_key(&lblk))
    }

    fn write(&mut self, a: u16, b: u16) {
        let range = Self::range(a, b);
        if (range.start.0..range.end()).any(|lblk| self.is_locked(lblk)) {
            return;
        }
        self.version += 1;
        self.dirty.extend((range.start.0..range.end()).map(|lblk| (lblk, self.version)));
    }

    /// Some of what waits, in one message, which arrives later.
    fn log(&mut self, a: u16) {
        let chosen = self.dirty.iter().filter(|(lblk, _)| a >> (*lblk % 16) & 1 == 0);
        let blocks: Vec<(u64, u64)> = chosen.map(|(lblk, version)| (*lblk, *version)).collect();
        if blocks.is_empty() {
            return;
        }
        self.log_number += 1;
        self.request += 1;
        let mut data = Vec::new();
        let mut entries = Vec::new();
        for (lblk, version) in &blocks {
            let block = version.to_le_bytes().repeat(BLOCK_SIZE / 8);
            let (crc, end_bytes) = (crc32c::crc32c(&block), (lblk + 1) * BLOCK_BYTES);
            entries.push(LogEntry { lblk: Lblk(*lblk), end_bytes, crc, stamp: *version });
            data.extend(block);
        }
        self.asked.insert(self.request, blocks);
        self.stream.push_back(LogData {
            request: self.request,
            volume: self.volume.id,
            generation: self.volume.generation,
            number: self.log_number,
            entries,
            data: Bytes::from(data),
        });
    }

    fn arrive(&mut self) {
        if let Some(log) = self.stream.pop_front() {
            self.rig.say(FromWriteback::Log(log));
        }
    }

    /// Some of what waits. Now and then it overtakes what was gathered for the log before.
    fn begin(&mut self, a: u16, b: u16) {
        while !self.stream.is_empty() && b & 64 == 0 {
            self.arrive();
        }
        let mut ranges: Vec<LblkRange> = Vec::new();
        let mut left = u64::from(b) % 6 + 1;
        for lblk in (FIRST..FIRST + BLOCKS).skip(usize::from(a) % BLOCKS as usize) {
            let is_ready = self.dirty.contains_key(&lblk) && !self.is_in_flight(lblk);
            if left == 0 || !is_ready || self.is_locked(lblk) {
                continue;
            }
            left -= 1;
            match ranges.last_mut() {
                Some(last) if last.end() == lblk => last.len += 1,
                _ => ranges.push(LblkRange::new(lblk, 1)),
            }
        }
        let Some(first) = ranges.first().copied() else { return };
        let begin = BeginIo {
            more: ranges[1..].to_vec(),
            logged_up_to: self.log_number,
            ..begin_io(&self.volume, first.start.0, first.len as u32)
        };
        let Ok(begun) = self.rig.try_begin(begin) else { return };
        let blocks = ranges.iter().flat_map(|range| range.start.0..range.end());
        let versions = blocks.map(|lblk| (lblk, self.dirty.remove(&lblk).unwrap())).collect();
        let open = (0..begun.segments.len()).collect();
        self.ios.push(Io { begun, versions, open });
    }

    fn release(&mut self, at: usize, n: u16, fails: bool) {
        let Some(io) = self.ios.get_mut(at) else { return };
        let Some(index) = io.open.iter().copied().nth(usize::from(n) % io.open.len().max(1)) else {
            return;
        };
        io.open.remove(&index);
        let segment = io.begun.segments[index].clone();
        let crcs = io.begun.lblks(&segment).iter().map(|lblk| io.versions[lblk] as u32).collect();
        let outcome = match fails {
            true => SegmentOutcome::Failed(Reason::IoError),
            false => SegmentOutcome::Durable(crcs),
        };
        self.rig.release(&segment.token, outcome);
    }

    fn submit(&mut self, at: usize, b: u16) {
        let Some(io) = self.ios.get(at) else { return };
        let token = io.begun.submitter;
        let unsent = io.open.iter().map(|index| io.begun.segments[*index].token.segment);
        let unsent = if b.is_multiple_of(5) { unsent.collect() } else { vec![] };
        self.rig.submit_with(&token, unsent, b % 13 == 3);
    }

    fn finish(&mut self, at: usize) {
        while self.ios.get(at).is_some_and(|io| !io.open.is_empty()) {
            self.release(at, 0, false);
        }
        self.submit(at, 1);
    }

    /// Overtakes what is on its way to the log.
    fn change(&mut self, a: u16, b: u16) {
        let range = Self::range(a, b);
        let mut blocks = range.start.0..range.end();
        if blocks.clone().any(|lblk| self.is_locked(lblk) || self.is_in_flight(lblk)) {
            return;
        }
        self.version += 1;
        for lblk in &mut blocks {
            self.dirty.remove(&lblk);
            self.known.entry(lblk).or_default().hole = self.version;
        }
        let change = if b & 16 == 0 { MapChange::Trim } else { MapChange::Zero };
        let at = (range.start.0, range.len);
        let call = change_after(&self.volume, change, at, self.log_number);
        let reply = self.rig.call_later(call);
        self.changes.insert(reply, (range, self.version));
    }

    fn is_found(&mut self, lblk: u64, version: u64) {
        let known = self.known.entry(lblk).or_default();
        known.floor = known.floor.max(version);
    }

    /// Takes in what the writeback was told.
    fn observe(&mut self) {
        let told = self.rig.sent[self.seen..].to_vec();
        for kind in told {
            let EffectKind::Writeback(_, message) = kind else { continue };
            match message {
                ToWriteback::Logged { request } => {
                    for (lblk, version) in self.asked.remove(&request).unwrap_or_default() {
                        self.is_found(lblk, version);
                    }
                }
                ToWriteback::Refused { request, .. } => {
                    self.asked.remove(&request);
                }
                _ => {}
            }
        }
        self.seen = self.rig.sent.len();
        let ended = self.rig.completions[self.done..].to_vec();
        for done in ended {
            let is_it = |io: &Io| io.begun.submitter.io_end == done.io_end;
            let Some(at) = self.ios.iter().position(is_it) else { continue };
            let io = self.ios.remove(at);
            for (lblk, version) in io.versions {
                let block = LblkRange::new(lblk, 1);
                match done.converted.iter().any(|range| range.overlaps(block)) {
                    true => self.is_found(lblk, version),
                    false => {
                        self.dirty.entry(lblk).or_insert(version);
                    }
                }
            }
        }
        self.done = self.rig.completions.len();
        let answered = self.changes.keys().filter(|reply| self.rig.replies.contains_key(reply));
        for reply in answered.copied().collect::<Vec<_>>() {
            let (range, version) = self.changes.remove(&reply).unwrap();
            if self.rig.replies[&reply].is_ok() {
                (range.start.0..range.end()).for_each(|lblk| self.is_found(lblk, version));
            }
        }
    }

    fn mapped(&mut self) -> BTreeMap<u64, u64> {
        let range = LblkRange::new(0, 2 * CHUNK_BLOCKS);
        let extents = self.rig.machine.extents("v", range).unwrap().unwrap();
        let written = extents.iter().filter(|extent| extent.state == ExtentState::Written);
        let blocks = written.flat_map(|extent| (extent.range.start.0..).zip(&extent.crcs));
        blocks.map(|(lblk, version)| (lblk, u64::from(*version))).collect()
    }

    /// What who opens the volume now would find; 0: a hole.
    fn check(&mut self) -> BTreeMap<u64, u64> {
        self.observe();
        self.rig.assert_sound();
        let info = self.rig.machine.volume("v").unwrap();
        let log = self.rig.machine.logged(info.id, info.generation, Lblk(0), usize::MAX).unwrap();
        assert_eq!(info.logged_blocks, log.len() as u64);
        let mut found = self.mapped();
        for (Lblk(lblk), logged) in log {
            assert_eq!(logged.data[..8], logged.stamp.to_le_bytes());
            let map = found.insert(lblk, logged.stamp).unwrap_or(0);
            assert!(logged.stamp > map, "{lblk}: {map} is converted, {} logged", logged.stamp);
        }
        for lblk in FIRST..FIRST + BLOCKS {
            let Known { floor, hole } = self.known.get(&lblk).copied().unwrap_or_default();
            match *found.entry(lblk).or_default() {
                0 => assert!(hole >= floor, "{lblk}: {floor} was promised and is gone"),
                seen => assert!(seen >= floor, "{lblk}: {seen} is back after {floor}"),
            }
        }
        found
    }

    /// Somebody opens the volume, and whatever he finds is what everybody reads from then on.
    fn open(&mut self) {
        self.rig.auto_commit = true;
        self.volume = self.rig.open("v", "wb");
        self.rig.auto_commit = false;
        let found = self.check();
        self.ios.clear();
        self.changes.clear();
        for (lblk, seen) in found {
            self.version += u64::from(seen == 0);
            let known = match seen {
                0 => Known { floor: self.version, hole: self.version },
                seen => Known { floor: seen, hole: 0 },
            };
            self.known.insert(lblk, known);
        }
        let (id, generation) = (self.volume.id, self.volume.generation);
        let log = self.rig.machine.logged(id, generation, Lblk(0), usize::MAX).unwrap();
        self.dirty = log.iter().map(|(lblk, logged)| (lblk.0, logged.stamp)).collect();
        self.log_number = self.volume.logged_number;
    }

    fn restart(&mut self, from_snapshot: bool) {
        self.check();
        match from_snapshot {
            true => self.rig.restart_from_snapshot(),
            false => self.rig.crash(),
        }
        self.stream.clear();
        self.rig.auto_commit = true;
        self.rig.hello(WB, "wb");
        for store in 1..=STORES {
            self.rig.join_store(store, 1, CAPACITY);
        }
        self.open();
        self.asked.clear();
    }

    fn act(&mut self, (what, a, b): (u8, u16, u16)) {
        let at = usize::from(a) % self.ios.len().max(1);
        match what % 32 {
            0..=6 => self.write(a, b),
            7..=10 => self.log(a),
            11..=13 => self.arrive(),
            14..=17 => self.begin(a, b),
            18 => self.release(at, b, b.is_multiple_of(11)),
            19 => self.submit(at, b),
            20..=22 => self.finish(at),
            23 => self.change(a, b),
            24..=26 => self.rig.drain_once(),
            27 | 28 => self.rig.commit(),
            29 => {
                self.rig.keep_alive(STORES);
                self.rig.acknowledge();
            }
            30 if a.is_multiple_of(3) => self.restart(b.is_multiple_of(3)),
            31 if a.is_multiple_of(3) => self.open(),
            _ => self.rig.drain_once(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    /// Invariant `logged-until-converted`.
    #[test]
    fn what_was_flushed_is_never_lost_and_never_comes_back_once_newer_data_was_converted(
        replicas in 1_u32..=2,
        actions in prop::collection::vec(any::<(u8, u16, u16)>(), 1..250)
    ) {
        let mut world = World::new(replicas);
        for action in actions {
            world.act(action);
            world.check();
        }
        world.restart(false);
        world.check();
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}
