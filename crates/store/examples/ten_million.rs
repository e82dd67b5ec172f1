//! How the metadata store does with ten thousand, a million and ten million extents.
//!
//! ```text
//! cargo run --release -p endio-store --example ten_million [-- <extents> ...]
//! ```
//!
//! Each size gets a directory of its own below the system's temporary directory. Every logical
//! block is an extent of its own: physical places are random, so nothing merges. Chunks are written
//! in random order, one record per chunk; checkpoints are written when they are due. A *kill* is a
//! store that is dropped without being closed: sled is thrown away then.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use endio_state_machine::chunk::{CHUNK_BLOCKS, OpSeq, Places};
use endio_state_machine::extent_map::{self, ChunkTable, MapError};
use endio_store::meta::{DiskMeta, MetaError, MetaOptions, MetaStore, Recovered};
use endio_types::{LblkRange, Pblk, StoreId, VolumeId};

const VOLUME: VolumeId = VolumeId(1);
const LOOKUPS: u64 = 20_000;
/// Records per group of the journal.
const GROUP: u64 = 8;

type Done<T> = Result<T, Box<dyn Error>>;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }
}

/// A record: chunk index, then place and checksum of each of its blocks.
fn record(random: &mut Random, index: u64, blocks: u64) -> Vec<u8> {
    let mut record = index.to_le_bytes().to_vec();
    for _ in 0..blocks {
        record.extend_from_slice(&(random.next() % (1 << 32)).to_le_bytes());
        record.extend_from_slice(&(random.next() as u32).to_le_bytes());
    }
    record
}

fn apply<T: ChunkTable<Error = MetaError> + ?Sized>(
    table: &mut T,
    seq: u64,
    record: &[u8],
) -> Done<()> {
    let (index, blocks) = record.split_first_chunk::<8>().ok_or("short record")?;
    let start = u64::from_le_bytes(*index) * CHUNK_BLOCKS;
    for (n, block) in blocks.as_chunks::<12>().0.iter().enumerate() {
        let [a, b, c, d, e, f, g, h, crc @ ..] = *block;
        let pblk = Pblk(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        let range = LblkRange::new(start + n as u64, 1);
        let places = Places::single(StoreId(1), pblk);
        let crc = [u32::from_le_bytes(crc)];
        let seq = OpSeq::new(seq, n as u32);
        match extent_map::write(table, seq, VOLUME, range, places, &crc) {
            Ok(_) => {}
            Err(MapError::Table(error)) => return Err(error.into()),
            Err(MapError::Malformed(what)) => return Err(what.into()),
        }
    }
    Ok(())
}

fn build(meta: &DiskMeta, extents: u64, random: &mut Random) -> Done<Recovered> {
    let mut store = meta.open()?;
    let mut chunks: Vec<u64> = (0..extents.div_ceil(CHUNK_BLOCKS)).collect();
    for n in (1..chunks.len()).rev() {
        chunks.swap(n, random.next() as usize % (n + 1));
    }
    let mut seq = 0;
    for index in chunks {
        seq += 1;
        let blocks = CHUNK_BLOCKS.min(extents - index * CHUNK_BLOCKS);
        let record = record(random, index, blocks);
        store.journal.append(seq, 1, &record)?;
        if seq % GROUP == 0 {
            store.journal.commit()?;
        }
        apply(store.table.as_mut(), seq, &record)?;
        if store.checkpointer.is_due() {
            checkpoint(&mut store)?;
        }
    }
    store.journal.commit()?;
    Ok(store)
}

fn checkpoint(store: &mut Recovered) -> Done<()> {
    let seq = store.journal.rotate()?;
    store.checkpointer.begin(seq, b"")?;
    while !store.checkpointer.write_chunks(store.table.as_mut(), 64)? {}
    store.checkpointer.finish(seq)?;
    Ok(())
}

/// Applies what the journal holds behind the checkpoint.
fn replay(store: &mut Recovered) -> Done<u64> {
    let mut count = 0;
    for record in store.records.by_ref() {
        let record = record?;
        apply(store.table.as_mut(), record.seq, &record.payload)?;
        count += 1;
    }
    Ok(count)
}

fn scan(store: &mut Recovered) -> Done<u64> {
    let mut extents = 0;
    extent_map::for_each_extent(store.table.as_mut(), |_, _| extents += 1)?;
    Ok(extents)
}

fn timed<R>(f: impl FnOnce() -> Done<R>) -> Done<(R, Duration)> {
    let start = Instant::now();
    let result = f()?;
    Ok((result, start.elapsed()))
}

fn size(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let inside: u64 = entries.map(|entry| size(&entry.path())).sum();
    let own = fs::metadata(path).map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
    inside + own
}

fn sizes(dir: &Path) -> Done<()> {
    let mut kinds = [("journal", 0), ("checkpoint", 0), ("sled", 0)];
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        for (kind, bytes) in &mut kinds {
            if name.starts_with(*kind) {
                *bytes += size(&entry.path());
            }
        }
    }
    for (kind, bytes) in kinds {
        println!("  size of {kind:<12} {:>10.1} MiB", bytes as f64 / 1048576.0);
    }
    Ok(())
}

/// Highest resident memory since the last [`reset_peak`], in MiB.
fn peak() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let kib = line.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

fn reset_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

fn lookups(store: &mut Recovered, extents: u64, random: &mut Random) -> Done<()> {
    let mut times = Vec::new();
    for _ in 0..LOOKUPS {
        let range = LblkRange::new(random.next() % extents, 1);
        let start = Instant::now();
        let found = extent_map::lookup(store.table.as_mut(), VOLUME, range)?;
        times.push(start.elapsed());
        if found.len() != 1 {
            return Err("an extent is missing".into());
        }
    }
    times.sort_unstable();
    let micros = |n: usize| times[n].as_nanos() as f64 / 1000.0;
    let (half, most) = (micros(times.len() / 2), micros(times.len() * 99 / 100));
    println!("  random lookup, p50 / p99   {half:>8.1} / {most:.1} us");
    Ok(())
}

fn show(what: &str, time: Duration) {
    println!("  {what:<26} {:>8.3} s", time.as_secs_f64());
}

fn measure(extents: u64) -> Done<()> {
    let dir = std::env::temp_dir().join(format!("endio-{}-{extents}", std::process::id()));
    let meta = DiskMeta::new(&dir, MetaOptions::default());
    let random = &mut Random(0x9e37_79b9);
    println!("{extents} extents");

    reset_peak();
    let (mut store, time) = timed(|| build(&meta, extents, random))?;
    show("build", time);
    println!("  peak memory while building {:>8.0} MiB", peak());
    let seq = store.journal.commit()?;
    let ((), time) = timed(|| Ok(store.table.close(seq)?))?;
    show("clean stop", time);
    drop(store);
    sizes(&dir)?;

    reset_peak();
    let (mut store, time) = timed(|| Ok(meta.open()?))?;
    show("open after a clean stop", time);
    if let Some(reason) = &store.rebuilt {
        return Err(format!("rebuilt: {reason}").into());
    }
    let (records, time) = timed(|| replay(&mut store))?;
    show(&format!("  replay of {records} records"), time);
    let (found, time) = timed(|| scan(&mut store))?;
    show("  scan of all extents", time);
    if found != extents {
        return Err(format!("{found} extents found").into());
    }
    lookups(&mut store, extents, random)?;
    println!("  peak memory since open     {:>8.0} MiB", peak());
    drop(store);

    reset_peak();
    let (mut store, time) = timed(|| Ok(meta.open()?))?;
    show("open after a kill", time);
    let (records, time) = timed(|| replay(&mut store))?;
    show(&format!("  replay of {records} records"), time);
    let (found, _) = timed(|| scan(&mut store))?;
    if found != extents || store.rebuilt.is_none() {
        return Err(format!("{found} extents found after a kill").into());
    }
    println!("  peak memory since open     {:>8.0} MiB", peak());
    drop(store);
    fs::remove_dir_all(&dir)?;
    Ok(())
}

fn main() -> Done<()> {
    let given: Vec<u64> =
        std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let sizes = if given.is_empty() { vec![10_000, 1_000_000, 10_000_000] } else { given };
    sizes.into_iter().try_for_each(measure)
}
