//! What a write, a turn and a renewal take of conversion's one thread as stores, writebacks and volumes grow in
//! number, simulated: the real state machine, with nobody behind its messages.
//!
//! ```text
//! cargo run --release -p endio-bench-pure --bin cluster [-- --stores 1000 --volumes 100000]
//! ```

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, value_parser};
use endio_bench_pure::cluster::{Cluster, Shape};
use endio_bench_pure::{Dice, process};

/// Blocks that are written, over all volumes: the map is as large in each row.
const BLOCKS: u64 = 1 << 17;

#[derive(Debug, Parser)]
struct Arguments {
    /// Numbers of block-stores to try.
    #[arg(long, default_values_t = [1, 10, 100, 1000], num_args = 1.., value_delimiter = ',',
          value_parser = value_parser!(u64).range(1..=10_000))]
    stores: Vec<u64>,
    /// Volumes for each store.
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u64).range(1..=10_000))]
    volumes: u64,
    /// Stores for each writeback.
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(1..))]
    stores_per_writeback: u64,
    /// Writes that are counted, beyond those that fill the volumes.
    #[arg(long, default_value_t = 65_536, value_parser = value_parser!(u64).range(1..))]
    writes: u64,
    /// Print only the rows.
    #[arg(long)]
    rows: bool,
    /// Writes in one turn, each in another place.
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u64).range(1..=4096))]
    depth: u64,
    /// Blocks that each volume is promised for buffered data.
    #[arg(long, default_value_t = 1024)]
    credit: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !arguments.rows {
        println!(
            "| stores, writebacks | open volumes | begin of a write, µs | its end, µs | look, µs a turn \
         | renewals of stores, ms a second | of writebacks | memory, KiB for each volume \
         | copy for a checkpoint, ms | recover, ms | all come back, ms | entries in lists |"
        );
        println!("|{}", "---|".repeat(12));
    }
    for stores in &arguments.stores {
        let volumes = stores * arguments.volumes;
        let writebacks = stores.div_ceil(arguments.stores_per_writeback);
        let credit_blocks = arguments.credit;
        let shape = Shape { stores: *stores, writebacks, volumes, credit_blocks };
        match arguments.rows {
            true => measure(shape, &arguments)?,
            // A process of its own: what others have freed is not counted as free.
            false => again(*stores, &arguments)?,
        }
    }
    Ok(())
}

fn again(stores: u64, arguments: &Arguments) -> Result<()> {
    let numbers = [
        ("--stores", stores),
        ("--volumes", arguments.volumes),
        ("--stores-per-writeback", arguments.stores_per_writeback),
        ("--writes", arguments.writes),
        ("--depth", arguments.depth),
        ("--credit", arguments.credit),
    ];
    let mut row = Command::new(std::env::current_exe()?);
    row.arg("--rows").args(numbers.map(|(name, number)| format!("{name}={number}")));
    let status = row.status()?;
    if status.success() { Ok(()) } else { bail!("{stores} stores: {status}") }
}

fn measure(shape: Shape, arguments: &Arguments) -> Result<()> {
    let before = process::resident_bytes()?;
    let mut cluster = Cluster::new(shape)?;
    let held = process::resident_bytes()?.saturating_sub(before);
    let mut dice = Dice::new(shape.volumes);
    let each = BLOCKS / shape.volumes + 1;
    let mut write = |cluster: &mut Cluster, count: u64| -> Result<u64> {
        let turns = count.div_ceil(arguments.depth);
        for _ in 0..turns {
            let mut group = Vec::with_capacity(32);
            while (group.len() as u64) < arguments.depth {
                let place = (dice.below(shape.volumes) as usize, dice.below(each));
                if !group.contains(&place) {
                    group.push(place);
                }
            }
            cluster.turn(&group)?;
        }
        Ok(turns)
    };
    write(&mut cluster, BLOCKS)?;
    cluster.spent = Default::default();
    let turns = write(&mut cluster, arguments.writes)?;
    let spent = cluster.spent;
    let [copied, recovered, back] = cluster.restart()?;
    let (Shape { stores, writebacks, volumes, .. }, listed) = (shape, cluster.listed);
    let writes = (turns * arguments.depth) as f64;
    let us = |spent: Duration| spent.as_secs_f64() * 1e6;
    // A turn is a millisecond.
    let seconds = turns as f64 / 1e3;
    println!(
        "| {stores}, {writebacks} | {volumes} | {:.1} | {:.1} | {:.2} | {:.2} | {:.1} | {:.2} | {:.1} | {:.0} \
         | {:.0} | {listed} |",
        us(spent.begin) / writes,
        us(spent.end) / writes,
        us(spent.look) / turns as f64,
        us(spent.stores) / seconds / 1e3,
        us(spent.writebacks) / seconds / 1e3,
        held as f64 / 1024.0 / volumes as f64,
        us(copied) / 1e3,
        us(recovered) / 1e3,
        us(back) / 1e3,
    );
    Ok(())
}
