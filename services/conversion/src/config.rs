//! What an operator may set. Every limit has a unit, a default, a bound and a reason.

use std::path::PathBuf;

use endio_chassis::config::{Fault, Validate};
use endio_chassis::net::ListenAddr;
use endio_chassis::server::ServerConfig;
use endio_chassis::telemetry::TelemetryConfig;
use endio_chassis::tls::{TlsConfig, TlsFlags};
use endio_state_machine::limits::Limits;
use serde::{Deserialize, Serialize};

/// Configuration of the conversion service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the metadata: journal, checkpoints, sled. Locked while the service runs.
    pub data_dir: PathBuf,
    /// Address to listen on.
    pub listen: ListenAddr,
    /// Inputs taken in one turn of the driver, hence in one commit. 1 to 65,536.
    pub inputs_per_turn_max: usize,
    /// A record that is alone is committed by the driver itself while commits take at most so long, in
    /// µs; 0: never. Too small: two wake-ups more for each lone small write. Too large: what comes
    /// during a commit waits longer to be decided. At most 1,000,000.
    pub commit_here_us_max: u64,
    /// Inputs that may wait for the driver; senders wait beyond it. 1 to 1,000,000.
    pub input_queue_max: usize,
    /// Messages that may wait for one peer; a peer that does not read is cut off beyond it.
    pub session_queue_max: usize,
    /// Bytes of decoded chunks of the extent map kept in memory. At least 1 MiB.
    pub map_cache_bytes: u64,
    /// Bytes of sled's own cache. At least 1 MiB.
    pub sled_cache_bytes: u64,
    /// A checkpoint starts when the journal has grown by this much (or by the size of the last
    /// checkpoint, if that is larger). Too small: constant checkpoints; too large: long replay.
    pub checkpoint_journal_bytes: u64,
    /// How long a stop may drain before what is held is named and left.
    pub drain_deadline_ms: u64,
    /// Leases, io_ends, conversion batches: the bounds of the state machine.
    pub limits: Limits,
    /// Mutual TLS of the listener.
    pub tls: TlsConfig,
    /// Bounds of the gRPC server.
    pub server: ServerConfig,
    /// Log and traces.
    pub telemetry: TelemetryConfig,
    /// Where `/metrics`, `/healthz` and `/readyz` are served over HTTP, e.g. 127.0.0.1:7411; `None`:
    /// nowhere. It asks nobody who they are: keep it on loopback or a private network.
    pub metrics_listen: Option<String>,
}

/// Owns volumes, the extent map, free space and the ledger of io_ends.
#[derive(Clone, Debug, Default, clap::Parser, Serialize)]
#[command(name = "endio-conversion", version)]
pub struct Flags {
    /// Configuration file (TOML). Environment: `ENDIO_CONVERSION_KEY`.
    #[arg(long)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print the effective configuration and end; no data is touched.
    #[arg(long)]
    #[serde(skip)]
    pub check_config: bool,
    /// Directory of the metadata.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Address to listen on, e.g. 127.0.0.1:7401; port 0 chooses one.
    #[arg(long)]
    pub listen: Option<ListenAddr>,
    /// Where /metrics, /healthz and /readyz are served, e.g. 127.0.0.1:7411; port 0 chooses one.
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<String>,
    /// Whether connections are secured.
    #[command(flatten)]
    pub tls: TlsFlags,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("endio-data/conversion"),
            listen: ListenAddr::Tcp("127.0.0.1:7401".to_owned()),
            inputs_per_turn_max: 4_096,
            commit_here_us_max: 2_000,
            input_queue_max: 16_384,
            session_queue_max: 65_536,
            map_cache_bytes: 256 << 20,
            sled_cache_bytes: 64 << 20,
            checkpoint_journal_bytes: 64 << 20,
            drain_deadline_ms: 20_000,
            limits: Limits::default(),
            tls: TlsConfig::default(),
            server: ServerConfig::default(),
            telemetry: TelemetryConfig::default(),
            metrics_listen: None,
        }
    }
}

fn outside(key: &str, value: u64, low: u64, high: u64) -> Option<Fault> {
    let message = || format!("is {value}: it must lie between {low} and {high}");
    (!(low..=high).contains(&value)).then(|| Fault::new(key, message()))
}

/// What is wrong with each of the limits alone. None of them is "none" at 0: a queue without a place, or
/// a step that does nothing, would hold up for ever what it is to bound, or answer that it was done.
fn limit_faults(limits: &Limits) -> Vec<Fault> {
    // Without `..`, so that a new limit gets its bounds here.
    let Limits {
        lease_ms,
        io_end_life_max_ms,
        io_ends_per_volume_max,
        in_flight_blocks_max,
        volumes_max,
        changes_per_volume_max,
        convert_batch_max,
        convert_blocks_max,
        drain_batches_max,
        change_chunks_max,
        fence_io_ends_max,
        punch_ranges_max,
        punch_blocks_max,
        punch_interval_ms,
        listed_stores_per_s,
        punch_run_blocks,
        punch_idle_ms,
        unpunched_blocks_max,
        reuse_blocks,
        log_blocks_per_volume_max,
        log_blocks_max,
        ended_max,
        search_runs_max,
        retry_after_ms,
    } = limits;
    let bounds = [
        ("lease_ms", u64::from(*lease_ms), 200, 600_000),
        ("io_end_life_max_ms", *io_end_life_max_ms, 500, 3_600_000),
        ("io_ends_per_volume_max", *io_ends_per_volume_max as u64, 1, 1_000_000),
        ("in_flight_blocks_max", *in_flight_blocks_max, 1, 1 << 40),
        ("volumes_max", *volumes_max as u64, 1, 1 << 20),
        ("changes_per_volume_max", *changes_per_volume_max as u64, 1, 65_536),
        ("convert_batch_max", *convert_batch_max as u64, 1, 65_536),
        ("convert_blocks_max", *convert_blocks_max, 1, 1 << 24),
        ("drain_batches_max", *drain_batches_max as u64, 1, 1_024),
        ("change_chunks_max", *change_chunks_max, 1, 65_536),
        ("fence_io_ends_max", *fence_io_ends_max as u64, 1, 1 << 20),
        ("punch_ranges_max", *punch_ranges_max as u64, 1, 65_536),
        ("punch_blocks_max", *punch_blocks_max, 1, 1 << 30),
        ("punch_interval_ms", *punch_interval_ms, 1, 3_600_000),
        ("listed_stores_per_s", *listed_stores_per_s, 1_000, 1 << 40),
        ("punch_run_blocks", *punch_run_blocks, 1, 1 << 30),
        ("punch_idle_ms", *punch_idle_ms, 1, 3_600_000),
        ("unpunched_blocks_max", *unpunched_blocks_max, 1, 1 << 40),
        ("reuse_blocks", *reuse_blocks, 1, 1 << 40),
        ("log_blocks_per_volume_max", *log_blocks_per_volume_max, 1, 1 << 20),
        ("log_blocks_max", *log_blocks_max, 1, 1 << 24),
        ("ended_max", *ended_max as u64, 1, 1 << 24),
        ("search_runs_max", *search_runs_max as u64, 1, 1 << 20),
        ("retry_after_ms", u64::from(*retry_after_ms), 1, 60_000),
    ];
    let faults = bounds
        .into_iter()
        .filter_map(|(key, value, low, high)| outside(&format!("limits.{key}"), value, low, high));
    faults.collect()
}

impl Validate for Config {
    fn validate(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut within = |key: &str, value: u64, low: u64, high: u64| {
            faults.extend(outside(key, value, low, high));
        };
        within("inputs_per_turn_max", self.inputs_per_turn_max as u64, 1, 65_536);
        within("commit_here_us_max", self.commit_here_us_max, 0, 1_000_000);
        within("input_queue_max", self.input_queue_max as u64, 1, 1_000_000);
        within("session_queue_max", self.session_queue_max as u64, 16, 10_000_000);
        within("map_cache_bytes", self.map_cache_bytes, 1 << 20, 1 << 40);
        within("sled_cache_bytes", self.sled_cache_bytes, 1 << 20, 1 << 40);
        within("checkpoint_journal_bytes", self.checkpoint_journal_bytes, 1 << 16, 1 << 40);
        within("drain_deadline_ms", self.drain_deadline_ms, 1, 3_600_000);
        let limits = &self.limits;
        faults.extend(limit_faults(limits));
        if u64::from(limits.lease_ms) >= limits.io_end_life_max_ms {
            faults.push(Fault::new(
                "limits.io_end_life_max_ms",
                format!("must be longer than limits.lease_ms ({})", limits.lease_ms),
            ));
        }
        faults.extend(self.tls.faults());
        faults.extend(self.server.faults());
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_fault_and_all_faults_are_told_at_once() {
        assert_eq!(Config::default().validate(), Vec::new());
        let limits = Limits { convert_batch_max: 0, ..Limits::default() };
        let bad = Config { input_queue_max: 0, drain_deadline_ms: 0, limits, ..Config::default() };
        assert_eq!(bad.validate().len(), 3);
    }
}
