//! A small service over a metadata store, and an oracle of what it may find after a crash.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use endio_state_machine::chunk::{OpSeq, Place, Places};
use endio_state_machine::extent_map::{self, ChunkTable, MapError, MapExtent, MemoryTable};
use endio_store::meta::{Checkpointer, Journal, MetaError, MetaStore, MetaTable};
use endio_types::{LblkRange, Pblk, StoreId, VolumeId};

/// Small numbers, the same for the same seed (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % bound
    }
}

/// kind, volume, start, length, physical block, and a filler so that lengths differ.
pub fn payload(random: &mut Random, seq: u64) -> Vec<u8> {
    let start = random.below(6 * 1024);
    let numbers = [random.below(4), 1 + random.below(2), start, 1 + random.below(700), seq * 1000];
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    bytes.extend((0..random.below(300)).map(|n| n as u8));
    bytes
}

fn number(payload: &[u8], n: usize) -> u64 {
    u64::from_le_bytes(*payload[n * 8..].first_chunk().unwrap())
}

/// Applies a record to a map: two operations each, as batches have many.
pub fn apply<T: ChunkTable + ?Sized>(
    table: &mut T,
    seq: u64,
    payload: &[u8],
) -> Result<(), T::Error> {
    let [kind, volume, start, len, pblk] = [0, 1, 2, 3, 4].map(|n| number(payload, n));
    let volume = VolumeId(volume);
    let range = LblkRange::new(start, len);
    let copies: Vec<Place> =
        (1..=1 + (seq % 3) as u32).map(|n| Place { store: StoreId(n), pblk: Pblk(pblk) }).collect();
    let places = Places::new(&copies).unwrap();
    let first = OpSeq::new(seq, 0);
    let crcs: Vec<u32> = (0..len).map(|n| (seq * 7 + n) as u32).collect();
    let done = match kind {
        0 => extent_map::unmap(table, first, volume, LblkRange::new(start, len * 6)).map(|_| ()),
        1 => unwrap_table(extent_map::write_unwritten(table, first, volume, range, places)),
        _ => unwrap_table(extent_map::write(table, first, volume, range, places, &crcs)),
    };
    done?;
    let second = LblkRange::new(start + len / 2, 3);
    extent_map::zero(table, OpSeq::new(seq, 1), volume, second).map(|_| ())
}

fn unwrap_table<R, E>(result: Result<R, MapError<E>>) -> Result<(), E> {
    match result {
        Ok(_) => Ok(()),
        Err(MapError::Table(error)) => Err(error),
        Err(MapError::Malformed(what)) => panic!("{what}"),
    }
}

fn mix(hash: u64, payload: &[u8]) -> u64 {
    payload.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

pub fn extents<T: ChunkTable + ?Sized>(table: &mut T) -> Vec<(VolumeId, MapExtent)>
where
    T::Error: std::fmt::Debug,
{
    let mut all = Vec::new();
    extent_map::for_each_extent(table, |volume, extent| all.push((volume, extent))).unwrap();
    all
}

/// Everything that was ever given to the journal, and how much of it was promised.
#[derive(Clone, Default)]
pub struct Oracle {
    pub appended: Vec<Vec<u8>>,
    pub committed: usize,
}

impl Oracle {
    /// Checks what a service found: at least what was committed, at most what was appended, and
    /// exactly the state that those records make. What was never promised and is gone is forgotten.
    pub fn check(&mut self, service: &mut Service, what: &str) {
        let last = service.seq as usize;
        assert!(last >= self.committed, "{what}: {} committed, {last} found", self.committed);
        assert!(last <= self.appended.len(), "{what}: record {last} was never written");
        self.appended.truncate(last);
        self.committed = last;
        let mut map = MemoryTable::new();
        let mut hash = 0;
        for (n, payload) in self.appended.iter().enumerate() {
            hash = mix(hash, payload);
            let Ok(()) = apply(&mut map, n as u64 + 1, payload);
        }
        assert_eq!(service.hash, hash, "{what}: the small state differs");
        assert_eq!(extents(service.table.as_mut()), extents(&mut map), "{what}: the map differs");
        assert_eq!(service.table.stats().chunks, map.len() as u64, "{what}: number of chunks");
    }
}

/// The small state is a hash over all payloads.
pub struct Service {
    pub table: Box<dyn MetaTable>,
    pub journal: Journal,
    pub checkpointer: Checkpointer,
    pub hash: u64,
    pub seq: u64,
    pub rebuilt: Option<String>,
}

impl Service {
    pub fn open(meta: &dyn MetaStore) -> Result<Self, MetaError> {
        let found = meta.open()?;
        let mut service = Self {
            table: found.table,
            journal: found.journal,
            checkpointer: found.checkpointer,
            hash: 0,
            seq: 0,
            rebuilt: found.rebuilt,
        };
        if let Some((seq, snapshot)) = found.snapshot {
            service.seq = seq;
            service.hash = u64::from_le_bytes(*snapshot.first_chunk().unwrap());
        }
        for record in found.records {
            let record = record?;
            assert_eq!(record.seq, service.seq + 1);
            service.take(&record.payload)?;
        }
        assert_eq!(found.next_seq, service.seq + 1);
        Ok(service)
    }

    fn take(&mut self, payload: &[u8]) -> Result<(), MetaError> {
        self.seq += 1;
        self.hash = mix(self.hash, payload);
        apply(self.table.as_mut(), self.seq, payload)
    }

    /// Appends and applies, as drivers do, before the commit.
    pub fn append(&mut self, oracle: &mut Oracle, payload: Vec<u8>) -> Result<(), MetaError> {
        oracle.appended.push(payload.clone());
        self.journal.append(self.seq + 1, self.seq / 10, &payload)?;
        self.take(&payload)
    }

    pub fn commit(&mut self, oracle: &mut Oracle) -> Result<(), MetaError> {
        let durable = self.journal.commit()?;
        assert_eq!(durable, self.seq);
        oracle.committed = durable as usize;
        Ok(())
    }

    pub fn begin_checkpoint(&mut self, oracle: &mut Oracle) -> Result<(), MetaError> {
        let seq = self.journal.rotate()?;
        oracle.committed = seq as usize;
        assert_eq!(seq, self.seq);
        self.checkpointer.begin(seq, &self.hash.to_le_bytes())
    }

    pub fn checkpoint(&mut self, oracle: &mut Oracle) -> Result<(), MetaError> {
        self.begin_checkpoint(oracle)?;
        while !self.checkpointer.write_chunks(self.table.as_mut(), 2)? {}
        self.checkpointer.finish(self.seq)
    }

    pub fn close(mut self, oracle: &mut Oracle) -> Result<(), MetaError> {
        self.commit(oracle)?;
        self.table.close(self.seq)
    }
}

/// A random life: groups of records, fuzzy checkpoints, flushes, clean stops and kills.
pub fn live(
    meta: &dyn MetaStore,
    seed: u64,
    steps: u64,
    oracle: &mut Oracle,
) -> Result<(), MetaError> {
    let random = &mut Random::new(seed);
    let mut service = Service::open(meta)?;
    oracle.check(&mut service, "at first");
    for _ in 0..steps {
        match random.below(12) {
            0 if !service.checkpointer.is_running() => service.begin_checkpoint(oracle)?,
            0..=3 if service.checkpointer.is_running() => {
                if service.checkpointer.write_chunks(service.table.as_mut(), 2)? {
                    service.commit(oracle)?;
                    service.checkpointer.finish(service.seq)?;
                }
            }
            4 => service.table.flush_dirty()?,
            5 if random.below(3) == 0 => {
                service.close(oracle)?;
                service = Service::open(meta)?;
                assert_eq!(service.rebuilt, None);
                oracle.check(&mut service, "after a clean stop");
            }
            6 if random.below(3) == 0 => {
                drop(service);
                service = Service::open(meta)?;
                oracle.check(&mut service, "after a kill");
            }
            _ => {
                for _ in 0..=random.below(3) {
                    let payload = payload(random, service.seq + 1);
                    service.append(oracle, payload)?;
                }
                service.commit(oracle)?;
            }
        }
    }
    Ok(())
}
