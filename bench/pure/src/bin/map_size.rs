//! What a write costs as the extent map grows, and what the map takes in memory.
//!
//! ```text
//! cargo run --release -p endio-bench-pure --bin map_size [-- --disk] [<extents> ...]
//! ```
//! Every block of the volume is an extent of its own: it is filled in random order. Then random
//! blocks are overwritten, 32 direct writes in a turn, and the processor time of the whole process
//! is counted, so that other processes hardly matter. With `--disk` the map is where conversion
//! keeps it (sled behind a bounded cache, in the temporary directory), else in memory.

use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use endio_bench_pure::{Dice, Rig, process};
use endio_state_machine::extent_map::{ChunkTable, MemoryTable};
use endio_store::meta::{DiskMeta, MetaOptions, MetaStore as _};

const WRITES: u64 = 50_000;
const DEPTH: usize = 32;
/// Blocks filled in one turn.
const FILL: usize = 256;

#[derive(Debug, Parser)]
struct Arguments {
    /// Keep the map on disk.
    #[arg(long)]
    disk: bool,
    /// Sizes to try.
    #[arg(default_values_t = [10_000, 100_000, 1_000_000, 10_000_000])]
    extents: Vec<u64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!(
        "{:>10} {:>10} {:>14} {:>14} {:>12} {:>14}",
        "extents", "fill s", "cpu µs/write", "wall µs/write", "RSS MiB", "bytes/extent"
    );
    for extents in arguments.extents {
        if arguments.disk {
            let directory = tempfile::tempdir()?;
            let meta = DiskMeta::new(directory.path(), MetaOptions::default());
            measure(meta.open()?.table, extents)?;
        } else {
            measure(MemoryTable::new(), extents)?;
        }
    }
    Ok(())
}

fn measure<T: ChunkTable>(table: T, extents: u64) -> Result<()> {
    let before = process::resident_bytes()?;
    let began = Instant::now();
    let mut rig = Rig::new(table, 2 * extents + (1 << 20), extents)?;
    rig.reserve(extents.min(1 << 20))?;
    let mut dice = Dice::new(extents);
    let places = shuffled(extents, &mut dice)?;
    for group in places.chunks(FILL) {
        let group: Vec<u64> = group.iter().map(|place| u64::from(*place)).collect();
        rig.buffered(&group)?;
        rig.reserve(extents.min(1 << 20))?;
    }
    drop(places);
    let filled = began.elapsed().as_secs_f64();
    let held = process::resident_bytes()?.saturating_sub(before);
    let (began, cpu) = (Instant::now(), process::cpu_ns()?);
    let mut done = 0;
    while done < WRITES {
        let mut group = Vec::with_capacity(DEPTH);
        while group.len() < DEPTH {
            let lblk = dice.below(extents);
            if !group.contains(&lblk) {
                group.push(lblk);
            }
        }
        rig.direct(&group)?;
        done += group.len() as u64;
    }
    let cpu = process::cpu_ns()? - cpu;
    let wall = began.elapsed().as_nanos();
    #[allow(clippy::cast_precision_loss)] // three digits are shown
    let per_write = |ns: u128| ns as f64 / done as f64 / 1e3;
    println!(
        "{extents:>10} {filled:>10.1} {:>14.2} {:>14.2} {:>12} {:>14}",
        per_write(cpu.into()),
        per_write(wall),
        process::resident_bytes()? >> 20,
        held / extents,
    );
    Ok(())
}

fn shuffled(count: u64, dice: &mut Dice) -> Result<Vec<u32>> {
    let count = u32::try_from(count).context("too many extents")?;
    let mut places: Vec<u32> = (0..count).collect();
    for at in (1..places.len()).rev() {
        let other = usize::try_from(dice.below(at as u64 + 1))?;
        places.swap(at, other);
    }
    Ok(places)
}
