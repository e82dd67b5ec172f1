//! What to run.

use std::time::Duration;

use clap::{Args, ValueEnum};
use endio_types::{BLOCK_BYTES, ByteSize};

use crate::report::BenchError;

/// How requests follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// The next one is sent when one completes.
    Closed,
    /// They are sent at `--rate`; latency counts from when a request was due.
    Open,
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AccessPattern {
    /// Anywhere.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
}

/// The options of `endio bench`.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Volume to load. What it holds is overwritten.
    #[arg(long)]
    pub volume: String,
    /// Create the volume with this size if there is none.
    #[arg(long, value_name = "SIZE")]
    pub create: Option<ByteSize>,
    /// Closed: as fast as completions come. Open: at a rate.
    #[arg(long, value_enum, default_value_t = Mode::Closed)]
    pub mode: Mode,
    /// Bytes of each request, 512 to 1MiB.
    #[arg(long, default_value = "4k")]
    pub block_size: ByteSize,
    /// Requests in flight on each connection, 1 to 4096.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub depth: u32,
    /// Connections, 1 to 64.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: u32,
    /// Stop after so many reads and writes in all.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub ops: Option<u64>,
    /// Stop after so many seconds, 1 to 3600; 10 unless --ops is given.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: Option<u64>,
    /// On each connection, an fsync after so many writes; 0: none.
    #[arg(long, default_value_t = 0)]
    pub fsync_every: u64,
    /// Share of reads.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub read_percent: u8,
    /// Where requests go.
    #[arg(long, value_enum, default_value_t = AccessPattern::Random)]
    pub pattern: AccessPattern,
    /// Acknowledge writes after their conversion.
    #[arg(long, conflicts_with = "buffered")]
    pub direct: bool,
    /// Acknowledge writes from the dirty cache (the default).
    #[arg(long)]
    pub buffered: bool,
    /// Acknowledge writes only once they are durable.
    #[arg(long)]
    pub dsync: bool,
    /// Open load: requests per second in all.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000),
          required_if_eq("mode", "open"))]
    pub rate: Option<u32>,
    /// The same seed makes the same requests.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Use only so much of the volume, from its start.
    #[arg(long)]
    pub span: Option<ByteSize>,
    /// Write blocks that name volume, block and sequence, and read all of them back at the end.
    #[arg(long)]
    pub verify: bool,
}

/// Longest run when only `--ops` is given.
const SECONDS_MAX: u64 = 3600;
/// Length of a run when nothing is given.
const SECONDS_DEFAULT: u64 = 10;

impl Options {
    /// When the run ends at the latest.
    pub(crate) fn duration(&self) -> Duration {
        let unless_given = if self.ops.is_some() { SECONDS_MAX } else { SECONDS_DEFAULT };
        Duration::from_secs(self.seconds.unwrap_or(unless_given))
    }

    /// Requests that fit side by side into the part of the volume that is used.
    ///
    /// # Errors
    /// The options contradict each other or the volume's size.
    pub(crate) fn slots(&self, volume_bytes: u64) -> Result<u64, BenchError> {
        let block = self.block_size.bytes();
        let usage = |message: String| Err(BenchError::Usage(message));
        if !(512..=1 << 20).contains(&block) {
            return usage(format!("--block-size {} is not between 512 and 1MiB", self.block_size));
        }
        if self.verify && !block.is_multiple_of(BLOCK_BYTES) {
            return usage("--verify needs a --block-size that is a multiple of 4096".into());
        }
        let bytes = self.span.map_or(volume_bytes, |span| span.bytes().min(volume_bytes));
        let slots = bytes / block;
        // Connections that verify have slots of their own, more than they have in flight.
        let least =
            if self.verify { u64::from(self.connections) * (u64::from(self.depth) + 1) } else { 1 };
        if slots < least {
            let room = ByteSize(least * block);
            return usage(format!("{} is too small for this: {room} are needed", ByteSize(bytes)));
        }
        Ok(slots)
    }
}
