//! The extent map against an oracle that keeps every block by itself.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use endio_state_machine::chunk::{
    CHUNK_BLOCKS, Change, Chunk, ChunkId, ExtentState, OpSeq, Place, Places,
};
use endio_state_machine::extent_map::{self, ChunkTable, MemoryTable};
use endio_types::{LblkRange, Pblk, StoreId, VolumeId};
use proptest::prelude::*;

const VOLUME: VolumeId = VolumeId(2);

#[derive(Clone, Debug)]
enum Op {
    Write { range: LblkRange, copies: usize, checked: bool },
    Unwritten { range: LblkRange, copies: usize },
    Convert { range: LblkRange },
    Unmap { range: LblkRange },
    Zero { range: LblkRange },
}

type Block = (ExtentState, Vec<Place>, Option<u32>);

/// One entry per mapped block.
#[derive(Clone, Default, Debug)]
struct Oracle(BTreeMap<u64, Block>);

impl Oracle {
    fn put(&mut self, range: LblkRange, block: impl Fn(u64) -> Option<Block>) -> Vec<Place> {
        let mut freed = Vec::new();
        for lblk in range.start.0..range.end() {
            let new = block(lblk);
            let kept = new.as_ref().map(|new| new.1.clone()).unwrap_or_default();
            let old = match new {
                Some(new) => self.0.insert(lblk, new),
                None => self.0.remove(&lblk),
            };
            let old = old.map(|old| old.1).unwrap_or_default();
            freed.extend(old.into_iter().filter(|place| !kept.contains(place)));
        }
        freed.sort_unstable();
        freed
    }

    fn written(&self) -> i64 {
        self.0.values().filter(|block| block.0 == ExtentState::Written).count() as i64
    }
}

fn crc(lblk: u64, salt: u64) -> u32 {
    (lblk * 31 + salt * 7919) as u32
}

fn moved(places: &Places, blocks: u64) -> Vec<Place> {
    places.advanced(blocks).as_slice().to_vec()
}

fn freed_blocks(change: &Change) -> Vec<Place> {
    let mut freed: Vec<Place> = change
        .freed
        .iter()
        .flat_map(|piece| {
            let store = piece.store;
            (piece.range.start.0..piece.range.end()).map(move |at| Place { store, pblk: Pblk(at) })
        })
        .collect();
    freed.sort_unstable();
    freed
}

/// Fresh places for each call; sometimes right behind those of the call before, so that
/// neighbours can merge.
fn fresh(next: &mut u64, copies: usize, len: u64) -> Places {
    let start = *next;
    *next += len;
    let all: Vec<Place> =
        (0..copies as u32).map(|n| Place { store: StoreId(n + 1), pblk: Pblk(start) }).collect();
    Places::new(&all).unwrap()
}

struct Pair {
    map: MemoryTable,
    oracle: Oracle,
    next: u64,
    seq: u64,
}

impl Pair {
    fn new() -> Self {
        Self { map: MemoryTable::new(), oracle: Oracle::default(), next: 1000, seq: 0 }
    }

    fn step(&mut self, op: &Op) {
        self.seq += 1;
        let (seq, salt) = (OpSeq::new(self.seq, 0), self.seq);
        let before = (self.oracle.0.len() as i64, self.oracle.written());
        let (change, freed) = match *op {
            Op::Write { range, copies, checked } => {
                let places = fresh(&mut self.next, copies, range.len);
                self.write(seq, salt, range, places, checked)
            }
            Op::Unwritten { range, copies } => {
                let places = fresh(&mut self.next, copies, range.len);
                let change =
                    extent_map::write_unwritten(&mut self.map, seq, VOLUME, range, places).unwrap();
                let freed = self.oracle.put(range, |lblk| {
                    let places = moved(&places, lblk - range.start.0);
                    Some((ExtentState::Unwritten, places, None))
                });
                (change, freed)
            }
            Op::Convert { range } => {
                // Converts the first extent found, on the blocks that it has.
                let found = extent_map::lookup(&mut self.map, VOLUME, range).unwrap();
                let Some(first) = found.first() else { return };
                self.write(seq, salt, first.range, first.places, true)
            }
            Op::Unmap { range } => {
                let change = extent_map::unmap(&mut self.map, seq, VOLUME, range).unwrap();
                (change, self.oracle.put(range, |_| None))
            }
            Op::Zero { range } => {
                let change = extent_map::zero(&mut self.map, seq, VOLUME, range).unwrap();
                for (_, block) in self.oracle.0.range_mut(range.start.0..range.end()) {
                    (block.0, block.2) = (ExtentState::Unwritten, None);
                }
                (change, Vec::new())
            }
        };
        assert_eq!(freed_blocks(&change), freed, "freed by {op:?}");
        assert_eq!(change.mapped, self.oracle.0.len() as i64 - before.0, "mapped by {op:?}");
        assert_eq!(change.written, self.oracle.written() - before.1, "written by {op:?}");
        assert_eq!(change.skipped, 0);
    }

    fn write(
        &mut self,
        seq: OpSeq,
        salt: u64,
        range: LblkRange,
        places: Places,
        checked: bool,
    ) -> (Change, Vec<Place>) {
        let all: Vec<u32> = (range.start.0..range.end()).map(|lblk| crc(lblk, salt)).collect();
        let crcs: &[u32] = if checked { &all } else { &[] };
        let change = extent_map::write(&mut self.map, seq, VOLUME, range, places, crcs).unwrap();
        let freed = self.oracle.put(range, |lblk| {
            let places = moved(&places, lblk - range.start.0);
            Some((ExtentState::Written, places, checked.then(|| crc(lblk, salt))))
        });
        (change, freed)
    }

    fn check(&mut self, range: LblkRange) {
        let found = extent_map::lookup(&mut self.map, VOLUME, range).unwrap();
        assert_eq!(by_block(&found), self.expected(range));
        let holes = extent_map::holes(&mut self.map, VOLUME, range).unwrap();
        let mut blocks: Vec<u64> = holes.iter().flat_map(|h| h.start.0..h.end()).collect();
        blocks.extend(self.expected(range).keys());
        blocks.sort_unstable();
        assert_eq!(blocks, (range.start.0..range.end()).collect::<Vec<_>>());
    }

    fn expected(&self, range: LblkRange) -> BTreeMap<u64, Block> {
        self.oracle.0.range(range.start.0..range.end()).map(|(k, v)| (*k, v.clone())).collect()
    }
}

fn by_block(found: &[extent_map::MapExtent]) -> BTreeMap<u64, Block> {
    let mut blocks = BTreeMap::new();
    for extent in found {
        for (n, lblk) in (extent.range.start.0..extent.range.end()).enumerate() {
            let block =
                (extent.state, moved(&extent.places, n as u64), extent.crcs.get(n).copied());
            assert!(blocks.insert(lblk, block).is_none(), "block {lblk} is mapped twice");
        }
    }
    blocks
}

/// Sorted, not overlapping, inside the chunk, never empty, merged where possible, and the same
/// after a trip through bytes.
fn check_shape(map: &mut MemoryTable) {
    let mut from = ChunkId { volume: VolumeId(0), index: 0 };
    while let Some(id) = map.next(from).unwrap() {
        map.read(id, &mut |chunk| {
            let chunk = chunk.unwrap();
            assert!(!chunk.is_empty());
            for pair in chunk.extents().windows(2) {
                assert!(pair[0].end() <= pair[1].offset);
                let merges = pair[0].end() == pair[1].offset
                    && pair[0].state == pair[1].state
                    && pair[0].checksummed == pair[1].checksummed
                    && pair[0].places.advanced(u64::from(pair[0].len)) == pair[1].places;
                assert!(!merges, "neighbours left apart: {pair:?}");
            }
            assert!(chunk.extents().iter().all(|e| e.len > 0 && e.end() <= 1024));
            assert_eq!(Chunk::decode(id, &chunk.encode(id)).as_ref(), Ok(chunk));
        })
        .unwrap();
        from = extent_map::successor(id).unwrap();
    }
}

const SPAN: u64 = 3 * CHUNK_BLOCKS;

fn ranges() -> impl Strategy<Value = LblkRange> {
    // Near chunk borders and near each other, mostly short.
    let start = prop_oneof![0..40u64, 1000..1040u64, 2030..2070u64, 0..SPAN];
    (start, prop_oneof![4 => 1..16u64, 1 => 1..SPAN])
        .prop_map(|(start, len)| LblkRange::new(start, len.min(SPAN - start)))
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (ranges(), 1..4usize, any::<bool>())
            .prop_map(|(range, copies, checked)| Op::Write { range, copies, checked }),
        2 => (ranges(), 1..4usize).prop_map(|(range, copies)| Op::Unwritten { range, copies }),
        2 => ranges().prop_map(|range| Op::Convert { range }),
        2 => ranges().prop_map(|range| Op::Unmap { range }),
        1 => ranges().prop_map(|range| Op::Zero { range }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_history_maps_what_the_oracle_maps(
        history in proptest::collection::vec(ops(), 1..60), window in ranges()
    ) {
        let mut pair = Pair::new();
        for op in &history {
            pair.step(op);
            pair.check(window);
        }
        pair.check(LblkRange::new(0, SPAN));
        check_shape(&mut pair.map);
    }

    /// A fuzzy checkpoint: begun at record `begin`, each chunk copied at its own later time. Replay
    /// from `begin` on must end where the original ended, whatever was skipped.
    #[test]
    fn replay_over_a_fuzzy_checkpoint_ends_in_the_same_map(
        history in proptest::collection::vec(ops(), 1..40),
        begin in 0..40usize,
        copied in proptest::collection::vec(0..40usize, 3),
    ) {
        let begin = begin.min(history.len());
        let mut states = vec![Pair::new().map];
        let mut pair = Pair::new();
        for op in &history {
            pair.step(op);
            states.push(pair.map.clone());
        }
        let mut replayed = Pair::new();
        for (index, at) in copied.iter().enumerate() {
            let at = (begin + at).min(history.len());
            copy_chunk(&mut states[at], &mut replayed.map, index as u64);
        }
        replay(&history, begin, &states, &mut replayed);
        prop_assert_eq!(replayed.map, pair.map);
    }
}

fn copy_chunk(from: &mut MemoryTable, to: &mut MemoryTable, index: u64) {
    let id = ChunkId { volume: VOLUME, index };
    let mut copy = None;
    from.read(id, &mut |chunk| copy = chunk.cloned()).unwrap();
    if let Some(copy) = copy {
        to.update(id, &mut |chunk| *chunk = copy.clone()).unwrap();
    }
}

/// Records carry effects, never decisions: what `Convert` found is taken from the original run.
fn replay(history: &[Op], begin: usize, states: &[MemoryTable], into: &mut Pair) {
    for (n, op) in history.iter().enumerate() {
        let seq = OpSeq::new(n as u64 + 1, 0);
        let salt = n as u64 + 1;
        let next = &mut into.next;
        let replayed = n >= begin;
        let (range, places, checked) = match *op {
            Op::Write { range, copies, checked } => {
                (range, fresh(next, copies, range.len), checked)
            }
            Op::Convert { range } => {
                let found = extent_map::lookup(&mut states[n].clone(), VOLUME, range).unwrap();
                let Some(first) = found.first() else { continue };
                (first.range, first.places, true)
            }
            Op::Unwritten { range, copies } => {
                let places = fresh(next, copies, range.len);
                if replayed {
                    extent_map::write_unwritten(&mut into.map, seq, VOLUME, range, places).unwrap();
                }
                continue;
            }
            Op::Unmap { range } | Op::Zero { range } if !replayed => {
                let _ = range;
                continue;
            }
            Op::Unmap { range } => {
                extent_map::unmap(&mut into.map, seq, VOLUME, range).unwrap();
                continue;
            }
            Op::Zero { range } => {
                extent_map::zero(&mut into.map, seq, VOLUME, range).unwrap();
                continue;
            }
        };
        if replayed {
            let all: Vec<u32> = (range.start.0..range.end()).map(|lblk| crc(lblk, salt)).collect();
            let crcs: &[u32] = if checked { &all } else { &[] };
            extent_map::write(&mut into.map, seq, VOLUME, range, places, crcs).unwrap();
        }
    }
}

#[test]
fn two_operations_of_one_record_on_one_chunk_are_both_applied() {
    let mut map = MemoryTable::new();
    for op in 0..2 {
        let range = LblkRange::new(u64::from(op) * 4, 4);
        let places = Places::single(StoreId(1), Pblk(u64::from(op) * 100));
        let seq = OpSeq::new(1, op);
        extent_map::write(&mut map, seq, VOLUME, range, places, &[0; 4]).unwrap();
    }
    let found = extent_map::lookup(&mut map, VOLUME, LblkRange::new(0, 8)).unwrap();
    assert_eq!(found.len(), 2);
}

#[test]
fn an_operation_that_the_chunk_has_seen_changes_nothing() {
    let mut map = MemoryTable::new();
    let range = LblkRange::new(0, 4);
    let places = Places::single(StoreId(1), Pblk(10));
    extent_map::write(&mut map, OpSeq::new(5, 1), VOLUME, range, places, &[7; 4]).unwrap();
    let before = map.clone();
    for seq in [OpSeq::new(5, 1), OpSeq::new(5, 0), OpSeq::new(4, 9)] {
        let change = extent_map::unmap(&mut map, seq, VOLUME, range).unwrap();
        assert_eq!((change.skipped, change.freed.len(), change.mapped), (1, 0, 0));
    }
    assert_eq!(map, before);
}

/// Counts how often chunks are touched.
struct Counting(MemoryTable, u64);

impl ChunkTable for Counting {
    type Error = std::convert::Infallible;
    fn read(&mut self, id: ChunkId, f: &mut dyn FnMut(Option<&Chunk>)) -> Result<(), Self::Error> {
        self.1 += 1;
        self.0.read(id, f)
    }
    fn update(&mut self, id: ChunkId, f: &mut dyn FnMut(&mut Chunk)) -> Result<(), Self::Error> {
        self.1 += 1;
        self.0.update(id, f)
    }
    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, Self::Error> {
        self.1 += 1;
        self.0.next(from)
    }
}

#[test]
fn unmapping_a_large_volume_visits_existing_chunks_only() {
    let mut map = Counting(MemoryTable::new(), 0);
    let blocks = (2u64 << 40) / 4096;
    for (n, lblk) in [0, blocks / 2, blocks - 1].into_iter().enumerate() {
        let range = LblkRange::new(lblk, 1);
        let places = Places::single(StoreId(1), Pblk(lblk));
        let seq = OpSeq::new(n as u64 + 1, 0);
        extent_map::write(&mut map, seq, VOLUME, range, places, &[1]).unwrap();
    }
    map.1 = 0;
    let whole = LblkRange::new(0, blocks);
    let change = extent_map::unmap(&mut map, OpSeq::new(9, 0), VOLUME, whole).unwrap();
    assert_eq!((change.mapped, change.freed.len()), (-3, 3));
    assert!(map.0.is_empty());
    assert!(map.1 <= 7, "{} visits", map.1);
}

#[test]
fn malformed_operations_are_refused_and_change_nothing() {
    let mut map = MemoryTable::new();
    let places = Places::single(StoreId(1), Pblk(10));
    let seq = OpSeq::new(1, 0);
    let range = LblkRange::new(0, 4);
    assert!(extent_map::write(&mut map, seq, VOLUME, range, places, &[1; 3]).is_err());
    let none = Places::default();
    assert!(extent_map::write(&mut map, seq, VOLUME, range, none, &[1; 4]).is_err());
    let beyond = LblkRange::new(u64::MAX, 4);
    assert!(extent_map::write(&mut map, seq, VOLUME, beyond, places, &[1; 4]).is_err());
    assert!(map.is_empty());
}
