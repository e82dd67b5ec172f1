//! Writes as many blocks as it is told, so that their instructions can be counted: see
//! `bench/instructions`.

use anyhow::Result;
use clap::{Parser, ValueEnum};
use endio_bench_pure::{Dice, Rig};
use endio_state_machine::extent_map::MemoryTable;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Path {
    /// Each write is an io_end of its own.
    Direct,
    /// Writes go into the dirty map; each turn writes them out in one io_end.
    Buffered,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// Which way the writes take.
    #[arg(long)]
    path: Path,
    /// Writes of one block.
    #[arg(long)]
    writes: u64,
    /// Writes in one turn of the driver.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Blocks of the volume.
    #[arg(long, default_value_t = 65_536)]
    blocks: u64,
}

fn main() -> Result<()> {
    let Arguments { path, writes, depth, blocks } = Arguments::parse();
    let mut rig = Rig::new(MemoryTable::new(), 4 * blocks, blocks)?;
    rig.reserve(blocks)?;
    let mut dice = Dice::new(1);
    let mut done = 0;
    while done < writes {
        let wanted = depth.min(usize::try_from(writes - done)?);
        let mut places = Vec::with_capacity(wanted);
        while places.len() < wanted {
            let lblk = dice.below(blocks);
            if !places.contains(&lblk) {
                places.push(lblk);
            }
        }
        match path {
            Path::Direct => rig.direct(&places)?,
            Path::Buffered => {
                rig.buffered(&places)?;
                rig.reserve(blocks)?;
            }
        }
        done += places.len() as u64;
    }
    println!("{:?}", rig.cost());
    Ok(())
}
