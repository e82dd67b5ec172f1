//! What an operator may set. Every limit has a unit, a default, a bound and a reason.

use std::collections::BTreeMap;
use std::path::PathBuf;

use endio_chassis::config::{Fault, Validate};
use endio_chassis::net::{DialerConfig, ListenAddr};
use endio_chassis::server::ServerConfig;
use endio_chassis::telemetry::TelemetryConfig;
use endio_chassis::tls::TlsConfig;
use serde::{Deserialize, Serialize};

use crate::access;
use crate::nbd::NbdTls;

/// Configuration of the writeback service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where clients reach it.
    pub listen: ListenAddr,
    /// Url of the conversion service.
    pub conversion: String,
    /// Directory of the cache log. Locked while the service runs. Whoever loses it loses what was
    /// acknowledged and not yet written out.
    pub cache_dir: PathBuf,
    /// Where the NBD export listens; absent: no export.
    pub nbd_listen: Option<ListenAddr>,
    /// STARTTLS for NBD clients; absent: none.
    pub nbd_tls: Option<NbdTls>,
    /// Without `nbd_tls`: take addresses that are not loopback. Whoever reaches them opens every
    /// volume.
    pub nbd_insecure_any_address: bool,
    /// Name in a client's certificate (`endio://client/NAME`), and the volumes that it may use over
    /// gRPC: `volume` (read and change), `volume@ro` (read), `volume@manage` (also create, resize,
    /// delete); `*`: all. Empty: every client reads and changes every volume.
    pub clients: BTreeMap<String, Vec<String>>,
    /// How long a request waits for what is away or full before its caller gets an error, in ms.
    /// Too small: a restart of a peer becomes an I/O error. Too large: a caller hangs. 100 to
    /// 3,600,000, and at most `server.unary_timeout_ms`.
    pub io_timeout_ms: u64,
    /// Dirty bytes above which write-out starts at once. At most `dirty_bytes_max`.
    pub dirty_bytes_soft: u64,
    /// Dirty bytes at which writers are held up. Too small: write-out cannot merge. Too large:
    /// memory, and a long replay. At least 8 MiB.
    pub dirty_bytes_max: u64,
    /// Delay of a writer that just reaches the limit, in ms. 0 to 1,000.
    pub dirty_delay_max_ms: u64,
    /// How long data stays dirty before it is written out, in ms. Too small: no merging. Too
    /// large: a longer fsync. 1 to 600,000.
    pub write_out_after_ms: u64,
    /// Most bytes that a flush sends to conversion's data log instead of waiting until they are
    /// written out. Too small: flushes wait for stores. Too large: much data is written twice. 0: none;
    /// at most 1 MiB.
    pub flush_log_bytes: u64,
    /// Whether the data of a small write goes to the data log before its flush, where flushes come in an
    /// even rhythm. Off: such a flush takes the time of one answer longer. On: a client that breaks its
    /// rhythm costs a message and a commit for nothing.
    pub log_ahead: bool,
    /// Buffered writes of at least so many bytes go straight to the stores, and are converted when they
    /// are acknowledged. Too small: what memory could take waits for stores. Too large: each byte is
    /// written twice, to the cache log first (docs/PERFORMANCE.md). 0: none does.
    pub write_around_bytes: u64,
    /// How long such a write waits for the stores before the cache takes it, in ms. Too small: a
    /// hiccup is as good as no stores. Too large: writers wait for stores that are away. 1 to 60,000.
    pub write_around_patience_ms: u64,
    /// Most blocks in one write-out. Too small: more conversions. Too large: one failure costs
    /// more. 1 to 1,024.
    pub write_out_blocks: u64,
    /// Write-outs under way per volume. Too small: stores that are far away idle. Too large: small groups,
    /// and bursts that durable writes wait behind (docs/PERFORMANCE.md). 1 to 1,024.
    pub write_outs_per_volume: usize,
    /// Bytes of write-out in flight, all volumes. At least 4 MiB.
    pub write_out_bytes_in_flight: u64,
    /// Bytes of direct writes in flight, all volumes. At least 4 MiB.
    pub direct_bytes_in_flight: u64,
    /// Bytes of reads in flight, all volumes. At least 4 MiB.
    pub read_bytes_in_flight: u64,
    /// Requests of one Submit stream under way; beyond it the stream is not read. 1 to 65,536.
    pub submit_requests: usize,
    /// Bytes of the requests of one Submit stream under way. At least 4 MiB.
    pub submit_bytes: u64,
    /// Blocks of credit below which a volume asks for more.
    pub credit_low_blocks: u64,
    /// Blocks of credit above which an idle volume gives some back.
    pub credit_high_blocks: u64,
    /// Blocks of credit asked for at once. Too small: many durable promises. Too large: space that
    /// others cannot use. 1 to 1,048,576.
    pub credit_step_blocks: u64,
    /// Most bytes of the cache log. At least four segments.
    pub log_bytes_max: u64,
    /// Bytes of one segment of the cache log. At least 1 MiB.
    pub log_segment_bytes: u64,
    /// Runs of blocks of a volume's map that are remembered for reads, some 150 bytes each, and 4
    /// for each block. Too small: reads ask conversion. Too large: memory. 0: none; at most 2^24.
    pub map_entries_per_volume: usize,
    /// Bytes of clean blocks that are kept for reads, all volumes, and some 100 more for each block of
    /// 4 KiB. Too small: reads ask the block-stores. Too large: memory. 0: none; at most 2^40.
    pub read_cache_bytes: u64,
    /// Most bytes a second that are written anew, all volumes, because they are read in sequence and lie
    /// in many pieces. Too small: such reads stay slow for long. Too large: the disks are busy with it.
    /// 0: none; at most 2^40.
    pub defragment_bytes_per_s: u64,
    /// How long nobody may have written to a volume before that, in ms. Too small: it is in the way of
    /// writers. Too large: it never begins. 0: it does not wait; at most 86,400,000.
    pub defragment_after_ms: u64,
    /// Sessions of retrying clients remembered.
    pub sessions_max: usize,
    /// A session is not forgotten before it was idle so long, in ms. 1 to 86,400,000.
    pub session_idle_min_ms: u64,
    /// Volumes open here at a time. 1 to 65,536.
    pub volumes_max: usize,
    /// First pause before a write begins again, in ms.
    pub retry_first_ms: u64,
    /// Longest pause before a write begins again, in ms. 1 to 600,000.
    pub retry_max_ms: u64,
    /// First pause before the session is opened again, in ms.
    pub reconnect_first_ms: u64,
    /// Longest pause before the session is opened again, in ms. 1 to 600,000.
    pub reconnect_max_ms: u64,
    /// Most time for opening a stream to a peer, in ms.
    pub connect_timeout_ms: u64,
    /// Most time for one call of a peer, in ms; the request is tried again until its own timeout.
    pub call_timeout_ms: u64,
    /// Most time between two confirmations of what reads use, in ms. Too small: messages for
    /// nothing. Too large: overwritten blocks come back late.
    pub confirm_every_ms: u64,
    /// Messages of one batch to conversion. 1 to 65,536.
    pub session_batch: usize,
    /// Messages waiting for the session. 1 to 65,536.
    pub session_queue: usize,
    /// Bios or reads waiting for one store's stream. 1 to 65,536.
    pub store_queue: usize,
    /// How long a stop may finish requests and write out before what is held is named and left, in
    /// ms. What is left is in the cache log.
    pub drain_deadline_ms: u64,
    /// Mutual TLS of the gRPC server and of connections to peers.
    pub tls: TlsConfig,
    /// The gRPC server.
    pub server: ServerConfig,
    /// Connections to peers.
    pub dialer: DialerConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
    /// Where `/metrics`, `/healthz` and `/readyz` are served over HTTP, e.g. 127.0.0.1:7410; `None`:
    /// nowhere. It asks nobody who they are: keep it on loopback or a private network.
    pub metrics_listen: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        let io_timeout_ms = 120_000;
        Self {
            listen: ListenAddr::Tcp("127.0.0.1:7400".to_owned()),
            conversion: "http://127.0.0.1:7401".to_owned(),
            cache_dir: PathBuf::from("endio-data/cache"),
            nbd_listen: None,
            nbd_tls: None,
            nbd_insecure_any_address: false,
            clients: BTreeMap::new(),
            io_timeout_ms,
            dirty_bytes_soft: 64 << 20,
            dirty_bytes_max: 256 << 20,
            dirty_delay_max_ms: 20,
            write_out_after_ms: 1_000,
            flush_log_bytes: 256 << 10,
            log_ahead: true,
            write_around_bytes: 256 << 10,
            write_around_patience_ms: 2_000,
            write_out_blocks: 256,
            write_outs_per_volume: 4,
            write_out_bytes_in_flight: 64 << 20,
            direct_bytes_in_flight: 64 << 20,
            read_bytes_in_flight: 64 << 20,
            submit_requests: 256,
            submit_bytes: 64 << 20,
            credit_low_blocks: 1_024,
            credit_high_blocks: 16_384,
            credit_step_blocks: 4_096,
            log_bytes_max: 2 << 30,
            log_segment_bytes: 64 << 20,
            map_entries_per_volume: 1 << 18,
            read_cache_bytes: 128 << 20,
            defragment_bytes_per_s: 16 << 20,
            defragment_after_ms: 5_000,
            sessions_max: 2_048,
            session_idle_min_ms: 600_000,
            volumes_max: 4_096,
            retry_first_ms: 5,
            retry_max_ms: 1_000,
            reconnect_first_ms: 20,
            reconnect_max_ms: 1_000,
            connect_timeout_ms: 3_000,
            call_timeout_ms: 10_000,
            confirm_every_ms: 250,
            session_batch: 512,
            session_queue: 4_096,
            store_queue: 256,
            drain_deadline_ms: 30_000,
            tls: TlsConfig::default(),
            // A unary call may wait for the I/O timeout, and a little for its answer.
            server: ServerConfig {
                unary_timeout_ms: io_timeout_ms + 30_000,
                ..ServerConfig::default()
            },
            dialer: DialerConfig::default(),
            telemetry: TelemetryConfig::default(),
            metrics_listen: None,
        }
    }
}

impl Validate for Config {
    fn validate(&self) -> Vec<Fault> {
        const MIB: u64 = 1 << 20;
        let mut faults = Vec::new();
        let mut within = |key: &str, value: u64, least: u64, most: u64| {
            if value < least || value > most {
                faults.push(Fault::new(key, format!("{value} is not in {least} to {most}")));
            }
        };
        within("io_timeout_ms", self.io_timeout_ms, 100, 3_600_000);
        within("dirty_bytes_max", self.dirty_bytes_max, 8 * MIB, 1 << 40);
        within("dirty_bytes_soft", self.dirty_bytes_soft, 0, self.dirty_bytes_max);
        within("dirty_delay_max_ms", self.dirty_delay_max_ms, 0, 1_000);
        within("write_out_after_ms", self.write_out_after_ms, 1, 600_000);
        within("flush_log_bytes", self.flush_log_bytes, 0, MIB);
        within("write_around_patience_ms", self.write_around_patience_ms, 1, 60_000);
        within("write_out_blocks", self.write_out_blocks, 1, 1_024);
        within("write_outs_per_volume", self.write_outs_per_volume as u64, 1, 1_024);
        within("write_out_bytes_in_flight", self.write_out_bytes_in_flight, 4 * MIB, 1 << 36);
        within("direct_bytes_in_flight", self.direct_bytes_in_flight, 4 * MIB, 1 << 36);
        within("read_bytes_in_flight", self.read_bytes_in_flight, 4 * MIB, 1 << 36);
        within("submit_requests", self.submit_requests as u64, 1, 65_536);
        within("submit_bytes", self.submit_bytes, 4 * MIB, 1 << 36);
        within("credit_step_blocks", self.credit_step_blocks, 1, 1 << 20);
        within("credit_high_blocks", self.credit_high_blocks, self.credit_low_blocks, 1 << 30);
        within("log_segment_bytes", self.log_segment_bytes, MIB, 1 << 34);
        let segments = self.log_segment_bytes.saturating_mul(4);
        within("log_bytes_max", self.log_bytes_max, segments, 1 << 44);
        within("read_cache_bytes", self.read_cache_bytes, 0, 1 << 40);
        within("defragment_bytes_per_s", self.defragment_bytes_per_s, 0, 1 << 40);
        within("defragment_after_ms", self.defragment_after_ms, 0, 86_400_000);
        within("map_entries_per_volume", self.map_entries_per_volume as u64, 0, 1 << 24);
        within("sessions_max", self.sessions_max as u64, 1, 1 << 20);
        within("session_idle_min_ms", self.session_idle_min_ms, 1, 86_400_000);
        within("volumes_max", self.volumes_max as u64, 1, 65_536);
        within("retry_first_ms", self.retry_first_ms, 1, self.retry_max_ms);
        within("retry_max_ms", self.retry_max_ms, 1, 600_000);
        within("reconnect_first_ms", self.reconnect_first_ms, 1, self.reconnect_max_ms);
        within("reconnect_max_ms", self.reconnect_max_ms, 1, 600_000);
        within("connect_timeout_ms", self.connect_timeout_ms, 1, 600_000);
        within("call_timeout_ms", self.call_timeout_ms, 1, 600_000);
        within("confirm_every_ms", self.confirm_every_ms, 1, 600_000);
        within("session_batch", self.session_batch as u64, 1, 65_536);
        within("session_queue", self.session_queue as u64, 1, 65_536);
        within("store_queue", self.store_queue as u64, 1, 65_536);
        within("drain_deadline_ms", self.drain_deadline_ms, 1, 3_600_000);
        let tls = self.nbd_tls.as_ref();
        if tls.is_some_and(|tls| !tls.clients.is_empty() && tls.client_authorities.is_none()) {
            let why = "names clients, but without client_authorities none can show who it is";
            faults.push(Fault::new("nbd_tls.clients", why));
        }
        let of_nbd = tls.map(|tls| ("nbd_tls.clients", &tls.clients));
        for (key, list) in [("clients", &self.clients)].into_iter().chain(of_nbd) {
            for entry in access::faults(list) {
                let why = format!("{entry} is no VOLUME, VOLUME@ro or VOLUME@manage");
                faults.push(Fault::new(key, why));
            }
        }
        let (unary, io) = (self.server.unary_timeout_ms, self.io_timeout_ms);
        if unary < io {
            let why = format!(
                "{unary} is less than io_timeout_ms ({io}): calls would be cut that are still tried"
            );
            faults.push(Fault::new("server.unary_timeout_ms", why));
        }
        faults.extend(self.tls.faults());
        faults.extend(self.server.faults());
        faults.extend(self.dialer.faults());
        faults
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;

    #[test]
    fn the_defaults_are_within_their_own_bounds() {
        assert_eq!(Config::default().validate(), Vec::new());
    }

    #[test]
    fn every_value_out_of_bounds_is_named_at_once() {
        let config = Config { io_timeout_ms: 0, write_out_blocks: 0, ..Config::default() };
        let keys: Vec<_> = config.validate().into_iter().map(|fault| fault.key).collect();
        assert_eq!(keys, ["io_timeout_ms", "write_out_blocks"]);
    }

    fn load(file: Option<&Path>, env: Option<(&str, &str)>) -> Config {
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let flags = serde_json::json!({});
        endio_chassis::config::load_with_env(file, "ENDIO_WRITEBACK", env, &flags).unwrap()
    }

    #[test]
    fn the_clients_of_the_documentation_are_taken() {
        let text = include_str!("../../../docs/SECURITY.md");
        let (_, table) = text.split_once("```toml\n[clients]").unwrap();
        let (table, _) = table.split_once("```").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("writeback.toml");
        std::fs::write(&path, format!("[clients]{table}")).unwrap();
        let clients = load(Some(&path), None).clients;
        assert_eq!(clients["alice"], ["vol1", "vol2@ro"]);
        assert_eq!(clients["backup"], ["*@ro"]);
    }

    #[test]
    fn clients_are_taken_from_the_environment() {
        let text = r#"{alice=["vol1"], backup=["*@ro"]}"#;
        let clients = load(None, Some(("ENDIO_WRITEBACK_CLIENTS", text))).clients;
        assert_eq!((&clients["alice"], clients.len()), (&vec!["vol1".to_owned()], 2));
    }

    #[test]
    fn a_call_is_not_cut_before_its_request_gives_up() {
        let faults = |unary_timeout_ms| {
            let server = ServerConfig { unary_timeout_ms, ..ServerConfig::default() };
            let config = Config { io_timeout_ms: 1_000, server, ..Config::default() };
            config.validate().into_iter().map(|fault| fault.key).collect::<Vec<_>>()
        };
        assert_eq!(faults(1_000), Vec::<String>::new());
        assert_eq!(faults(999), ["server.unary_timeout_ms"]);
    }

    #[test]
    fn nbd_tls_is_taken_from_the_environment() {
        let name = "T_NBD_TLS".to_owned();
        let text = r#"{certificate="/c", key="/k", client_authorities="/ca"}"#;
        let flags = serde_json::json!({});
        let config =
            endio_chassis::config::load_with_env(None, "T", [(name, text.to_owned())], &flags);
        let config: Config = config.unwrap();
        let tls = config.nbd_tls.unwrap();
        assert_eq!((tls.certificate, tls.key), ("/c".into(), "/k".into()));
        assert!(tls.required, "what is not said is the safe choice");
    }
}
