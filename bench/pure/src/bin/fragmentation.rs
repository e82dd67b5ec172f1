//! What a day of random overwrites does to the places of a volume's blocks.
//!
//! ```text
//! cargo run --release -p endio-bench-pure --bin fragmentation [-- --help]
//! ```
//! The real allocator, map and quarantine, in memory. The volume is filled in sequence first. Time
//! is simulated: a turn is one write-out.

use anyhow::{Context as _, Result};
use clap::Parser;
use endio_bench_pure::{Dice, Rig};
use endio_state_machine::extent_map::MemoryTable;
use endio_types::{LblkRange, Millis};

#[derive(Debug, Parser)]
struct Arguments {
    /// Blocks of the volume.
    #[arg(long, default_value_t = 262_144)]
    blocks: u64,
    /// Blocks of the store for each 100 blocks of the volume.
    #[arg(long, default_value_t = 125)]
    store_percent: u64,
    /// Overwrites: 100 a second for a day.
    #[arg(long, default_value_t = 8_640_000)]
    writes: u64,
    /// Blocks of one write, at a multiple of itself.
    #[arg(long, default_value_t = 1)]
    write_blocks: u64,
    /// Blocks of one write-out.
    #[arg(long, default_value_t = 256)]
    batch: u64,
    /// Share of writes that go to the first tenth of the volume, in percent.
    #[arg(long, default_value_t = 0)]
    hot_percent: u64,
    /// Lines of output.
    #[arg(long, default_value_t = 12)]
    lines: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { blocks, write_blocks, .. } = arguments;
    let store = blocks * arguments.store_percent / 100;
    let mut rig = Rig::new(MemoryTable::new(), store, blocks)?;
    // A write-out of 256 blocks at 100 writes a second takes longer than a confirmation.
    rig.confirm_every(1);
    let credit = arguments.batch.max(1_024);
    for start in (0..blocks).step_by(1_024) {
        rig.reserve(credit)?;
        let group: Vec<u64> = (start..(start + 1_024).min(blocks)).collect();
        rig.buffered(&group)?;
    }
    println!("{arguments:?}");
    println!("{:>12} {:>10} {:>16} {:>18}", "overwrites", "runs", "blocks in a run", "segments");
    let mut dice = Dice::new(1);
    let (mut done, mut step, mut segments, mut write_outs) = (0, 0, 0, 0_u64);
    line(&mut rig, blocks, 0, 0.0)?;
    while done < arguments.writes {
        let mut group = std::collections::BTreeSet::new();
        while (group.len() as u64) < arguments.batch {
            let hot = dice.below(100) < arguments.hot_percent;
            let within = if hot { blocks / 10 } else { blocks };
            let start = dice.below(within / write_blocks) * write_blocks;
            group.extend(start..start + write_blocks);
            done += 1;
        }
        let group: Vec<u64> = group.into_iter().collect();
        rig.reserve(group.len() as u64)?;
        let before = rig.cost().segments;
        rig.buffered(&group)?;
        segments += rig.cost().segments - before;
        write_outs += 1;
        if done * arguments.lines >= (step + 1) * arguments.writes {
            step += 1;
            #[allow(clippy::cast_precision_loss)] // three digits are shown
            line(&mut rig, blocks, done, segments as f64 / write_outs as f64)?;
            (segments, write_outs) = (0, 0);
        }
    }
    let spaces = rig.machine().stores(Millis(0));
    let space = spaces.first().context("the store is gone")?;
    println!("free {} quarantined {}", space.free_blocks, space.quarantined_blocks);
    Ok(())
}

/// Physical runs that a reader of the whole volume meets, in its order.
fn line(rig: &mut Rig<MemoryTable>, blocks: u64, done: u64, segments: f64) -> Result<()> {
    let extents = rig
        .machine()
        .extents("v", LblkRange::new(0, blocks))
        .map_err(|error| anyhow::anyhow!("the machine: {error}"))?
        .context("the volume is gone")?;
    let mut runs = 0_u64;
    let mut next = None;
    for extent in &extents {
        let place = extent.places.as_slice().first().context("an extent without a place")?;
        if next != Some((extent.range.start.0, place.pblk.0)) {
            runs += 1;
        }
        next = Some((extent.range.end(), place.pblk.0 + extent.range.len));
    }
    #[allow(clippy::cast_precision_loss)] // three digits are shown
    let mean = blocks as f64 / runs as f64;
    println!("{done:>12} {runs:>10} {mean:>16.2} {segments:>18.2}");
    Ok(())
}
