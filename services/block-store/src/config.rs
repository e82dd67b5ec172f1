//! Every knob of the block-store service.

use std::path::PathBuf;

use endio_chassis::{
    config::{Fault, Validate},
    net::ListenAddr,
    server::ServerConfig,
    telemetry::TelemetryConfig,
    tls::{TlsConfig, TlsFlags},
};
use endio_types::{BLOCK_BYTES, ByteSize, IO_END_BLOCKS_MAX};
use serde::{Deserialize, Serialize};

/// Configuration of one block-store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the superblock and the blocks; made if absent.
    pub data_dir: PathBuf,
    /// Where to listen.
    pub listen: ListenAddr,
    /// Url of the conversion service.
    pub conversion: String,
    /// Url at which writebacks reach this store. Absent: the listener's own.
    pub advertise: Option<String>,
    /// Capacity in bytes, a multiple of 4096; may grow from start to start. Absent: as it is, or
    /// 16 GiB for a new store.
    pub capacity_bytes: Option<u64>,
    /// Threads that write to the device. Too small: a slow write holds others up. Too large: they
    /// take turns on the processors.
    pub writer_threads: usize,
    /// Bytes from which on a write goes around the page cache (`O_DIRECT`), where the file system can;
    /// 0: none does. Too small: small writes wait for the disk one by one, and what is read again soon
    /// is not in memory. Too large: the page cache costs a multiple of the processor (docs/PERFORMANCE.md).
    pub direct_write_bytes_min: usize,
    /// Threads that make such writes, beside the others. Too small: a fast disk idles, and a slow one
    /// holds them up. Too large: threads, and 1 MiB of memory for each.
    pub direct_writer_threads: usize,
    /// Reads that the device is asked for at once. Too small: a fast device idles. Too large: what is
    /// written waits behind them.
    pub reads_at_once_max: usize,
    /// Threads that wait for reads. Too small: a slow device idles. Too large: threads.
    pub reader_threads_max: usize,
    /// Time in which one reader thread should come back with data, in µs: of a device that takes so
    /// many times longer for a read, so many threads wait. Too small: threads take turns on the
    /// processors for what one of them would find ready. Too large: a slow device idles.
    pub reader_each_us: u64,
    /// Bios and reads under way in the whole service. Too small: `LIMIT` under load. Too large:
    /// memory.
    pub in_flight_max: usize,
    /// Bios, or reads, under way in one stream; further ones wait in the stream. At most
    /// `in_flight_max`.
    pub in_flight_per_stream_max: usize,
    /// Bytes of bios under way in the whole service; further ones wait in their streams. Too small:
    /// no parallelism. Too large: memory.
    pub bio_bytes_max: usize,
    /// Bytes of reads under way in the whole service, as above.
    pub read_bytes_max: usize,
    /// Releases that conversion has not answered. Above it bios are refused with `LIMIT`.
    pub releases_max: usize,
    /// Finished tokens that are remembered, so that none is written twice. Above it the oldest
    /// io_ends are refused.
    pub seen_tokens_max: usize,
    /// Time before the end of the lease from which nothing new is begun, in ms. Too small: a write
    /// is begun that conversion no longer counts on. Too large: writes are refused without need.
    pub lease_margin_ms: u64,
    /// Longest wait for conversion to answer a registration, in ms.
    pub register_timeout_ms: u64,
    /// First pause before a session is tried again, in ms. It doubles up to the longest.
    pub reconnect_first_ms: u64,
    /// Longest pause before a session is tried again, in ms. Too large: slow to come back.
    pub reconnect_max_ms: u64,
    /// How long a stop waits for what is in flight, in ms.
    pub drain_timeout_ms: u64,
    /// Mutual TLS, in and out.
    pub tls: TlsConfig,
    /// Limits of the server.
    pub server: ServerConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
    /// Where `/metrics`, `/healthz` and `/readyz` are served over HTTP, e.g. 127.0.0.1:7410; `None`:
    /// nowhere. It asks nobody who they are: keep it on loopback or a private network.
    pub metrics_listen: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("endio-block-store"),
            listen: ListenAddr::Tcp("127.0.0.1:7402".to_owned()),
            conversion: "http://127.0.0.1:7401".to_owned(),
            advertise: None,
            capacity_bytes: None,
            writer_threads: 1,
            direct_write_bytes_min: 256 << 10,
            direct_writer_threads: 2,
            reads_at_once_max: 64,
            reader_threads_max: 16,
            reader_each_us: 150,
            in_flight_max: 16_384,
            in_flight_per_stream_max: 1_024,
            bio_bytes_max: 64 << 20,
            read_bytes_max: 64 << 20,
            releases_max: 32_768,
            seen_tokens_max: 1 << 20,
            lease_margin_ms: 200,
            register_timeout_ms: 5_000,
            reconnect_first_ms: 20,
            reconnect_max_ms: 1_000,
            drain_timeout_ms: 10_000,
            tls: TlsConfig::default(),
            server: ServerConfig::default(),
            telemetry: TelemetryConfig::default(),
            metrics_listen: None,
        }
    }
}

/// The command line of `endio-block-store`.
#[derive(Clone, Debug, Default, clap::Parser, Serialize)]
#[command(name = "endio-block-store", version, about = "Serves physical blocks of endio volumes")]
pub struct Flags {
    /// TOML file with any of the configuration's keys. Environment: `ENDIO_BLOCK_STORE_KEY`.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print the effective configuration and end; no data is touched.
    #[arg(long)]
    #[serde(skip)]
    pub check_config: bool,
    /// Directory of the superblock and the blocks; made if absent.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where to listen: host:port, unix:/path
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<ListenAddr>,
    /// Url of the conversion service.
    #[arg(long, value_name = "URL")]
    pub conversion: Option<String>,
    /// Url at which writebacks reach this store, if it is not the listener's own.
    #[arg(long, value_name = "URL")]
    pub advertise: Option<String>,
    /// Capacity, e.g. 8GiB, 512MiB or bytes; may grow from start to start.
    #[arg(long = "capacity", value_name = "SIZE")]
    pub capacity_bytes: Option<ByteSize>,
    /// Where /metrics, /healthz and /readyz are served, e.g. 127.0.0.1:7412; port 0 chooses one.
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<String>,
    /// Whether connections are secured.
    #[command(flatten)]
    pub tls: TlsFlags,
}

impl Config {
    /// The capacity in blocks, if one is set.
    pub fn capacity_blocks(&self) -> Option<u64> {
        self.capacity_bytes.map(|bytes| bytes / BLOCK_BYTES)
    }

    /// From how many bytes on a write goes around the page cache, if any does.
    pub fn direct_write_bytes_min(&self) -> Option<usize> {
        (self.direct_write_bytes_min > 0).then_some(self.direct_write_bytes_min)
    }
}

impl Validate for Config {
    fn validate(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut within = |key: &str, value: u64, min: u64, max: u64| {
            if value < min || value > max {
                let message = format!("is {value}, must lie between {min} and {max}");
                faults.push(Fault::new(key, message));
            }
        };
        let bio_max = u64::from(IO_END_BLOCKS_MAX) * BLOCK_BYTES;
        within("writer_threads", self.writer_threads as u64, 1, 256);
        within("direct_writer_threads", self.direct_writer_threads as u64, 1, 256);
        within("reads_at_once_max", self.reads_at_once_max as u64, 1, 4_096);
        within("reader_threads_max", self.reader_threads_max as u64, 1, 400);
        within("reader_each_us", self.reader_each_us, 1, 1_000_000);
        within("in_flight_max", self.in_flight_max as u64, 1, 1 << 20);
        // A stream alone never meets the bound of all: what it sends at once would be refused as
        // a whole, again and again.
        let per_stream_max = (self.in_flight_max as u64).min(1 << 16);
        within("in_flight_per_stream_max", self.in_flight_per_stream_max as u64, 1, per_stream_max);
        within("bio_bytes_max", self.bio_bytes_max as u64, bio_max, 1 << 31);
        within("read_bytes_max", self.read_bytes_max as u64, bio_max, 1 << 31);
        within("releases_max", self.releases_max as u64, 1, 1 << 20);
        within("seen_tokens_max", self.seen_tokens_max as u64, 1_024, 1 << 26);
        within("lease_margin_ms", self.lease_margin_ms, 0, 60_000);
        within("register_timeout_ms", self.register_timeout_ms, 10, 600_000);
        within("reconnect_first_ms", self.reconnect_first_ms, 1, 60_000);
        within("reconnect_max_ms", self.reconnect_max_ms, self.reconnect_first_ms, 60_000);
        within("drain_timeout_ms", self.drain_timeout_ms, 1, 3_600_000);
        match self.capacity_bytes {
            Some(bytes) if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) => {
                let message = format!("is {bytes}, must be a positive multiple of {BLOCK_BYTES}");
                faults.push(Fault::new("capacity_bytes", message));
            }
            _ => {}
        }
        if self.data_dir.as_os_str().is_empty() {
            faults.push(Fault::new("data_dir", "is empty: name the store's directory"));
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
    fn every_flag_is_a_key_of_the_configuration() {
        let flags = Flags {
            config: None,
            check_config: false,
            data_dir: Some("d".into()),
            listen: Some(ListenAddr::loopback()),
            conversion: Some("http://c:1".to_owned()),
            advertise: Some("http://a:1".to_owned()),
            capacity_bytes: Some(ByteSize(8192)),
            metrics_listen: Some("127.0.0.1:0".to_owned()),
            tls: TlsFlags { insecure: true, ..TlsFlags::default() },
        };
        let loaded = endio_chassis::config::load(None, "ENDIO_BLOCK_STORE_TEST_", &flags);
        let expected = Config {
            data_dir: "d".into(),
            listen: ListenAddr::loopback(),
            conversion: "http://c:1".to_owned(),
            advertise: Some("http://a:1".to_owned()),
            capacity_bytes: Some(8192),
            metrics_listen: Some("127.0.0.1:0".to_owned()),
            tls: TlsConfig { insecure: true, ..TlsConfig::default() },
            ..Config::default()
        };
        assert_eq!(loaded.ok(), Some(expected));
    }

    #[test]
    fn the_default_has_no_fault_and_all_faults_are_told_at_once() {
        assert_eq!(Config::default().validate(), Vec::new());
        let bad = Config {
            writer_threads: 0,
            capacity_bytes: Some(4097),
            bio_bytes_max: 1,
            ..Config::default()
        };
        let keys: Vec<_> = bad.validate().into_iter().map(|fault| fault.key).collect();
        assert_eq!(keys, ["writer_threads", "bio_bytes_max", "capacity_bytes"]);
        assert_eq!(Config { capacity_bytes: Some(0), ..Config::default() }.validate().len(), 1);
        let in_flight = |in_flight_max, in_flight_per_stream_max| {
            Config { in_flight_max, in_flight_per_stream_max, ..Config::default() }.validate().len()
        };
        assert_eq!((in_flight(8, 8), in_flight(8, 9)), (0, 1));
        assert_eq!(Config { capacity_bytes: Some(4096), ..Config::default() }.validate(), []);
    }
}
