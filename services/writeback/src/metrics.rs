//! Numbers of this service; docs/OBSERVABILITY.md lists them. Labels come from closed sets.

use std::time::Duration;

use endio_chassis::metrics::{Counter, Gauge, Histogram, Registry};
use endio_chassis::trace::Span;
use endio_types::Reason;

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Acknowledged from the dirty cache.
    WriteBuffered,
    /// Acknowledged after its conversion.
    WriteDirect,
    /// A read.
    Read,
    /// An fsync.
    Fsync,
    /// A trim.
    Trim,
    /// Zeroing.
    WriteZeroes,
    /// Allocating.
    Allocate,
}

impl Kind {
    const ALL: [(Self, &'static str); 7] = [
        (Self::WriteBuffered, "write_buffered"),
        (Self::WriteDirect, "write_direct"),
        (Self::Read, "read"),
        (Self::Fsync, "fsync"),
        (Self::Trim, "trim"),
        (Self::WriteZeroes, "write_zeroes"),
        (Self::Allocate, "allocate"),
    ];
}

#[derive(Debug, Clone)]
struct Requests {
    ok: Counter,
    error: Counter,
    time: Histogram,
}

/// Times of the legs of a write, as writeback sees them.
#[derive(Debug, Clone)]
pub struct Legs {
    /// Accepted … the caller is told.
    pub acknowledge: Histogram,
    /// BeginIo sent … granted.
    pub begin: Histogram,
    /// Handed to the store's stream … BioDone.
    pub bio: Histogram,
    /// The submitter's release … the completion.
    pub complete: Histogram,
}

/// All metrics of the service.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The registry they live in.
    pub registry: Registry,
    requests: Vec<Requests>,
    /// Times of the legs.
    pub legs: Legs,
    /// Write-outs converted.
    pub write_outs: Counter,
    /// Flushes whose data went into the data log.
    pub logged_flushes: Counter,
    /// Times that data went to the data log before its flush came.
    pub logged_ahead: Counter,
    /// Requests that had been applied before.
    pub duplicates: Counter,
    /// Questions to conversion about the map of a volume.
    pub look_ups: Counter,
    /// Reads that needed nobody: all blocks were in memory here.
    pub reads_at_hand: Counter,
    /// Reads that went to another replica.
    pub reads_repaired: Counter,
    /// Blocks written anew because they lay in many pieces.
    pub defragmented_blocks: Counter,
    /// Windows that did not lie better afterwards, or could not be written anew.
    pub defragment_missed: Counter,
    /// Buffered writes that were delayed.
    pub throttled_delayed: Counter,
    /// Buffered writes that waited for room.
    pub throttled_waited: Counter,
    /// NBD clients that are attached.
    pub nbd_connections: Gauge,
    /// Dirty bytes, all volumes.
    pub dirty_bytes: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::default();
        let requests = Kind::ALL.iter().map(|(_, kind)| {
            let outcome = |outcome| {
                let labels = [("kind", *kind), ("outcome", outcome)];
                registry.counter("endio_writeback_requests_total", "Requests answered", &labels)
            };
            let (name, help) = ("endio_writeback_request_seconds", "Time of requests");
            let time = registry.histogram(name, help, &[("kind", *kind)]);
            Requests { ok: outcome("ok"), error: outcome("error"), time }
        });
        let requests = requests.collect();
        let leg = |leg| registry.histogram("endio_leg_seconds", "Legs of a write", &[("leg", leg)]);
        let throttled = |how| {
            let help = "Buffered writes slowed down by the limits of dirty bytes";
            registry.counter("endio_writeback_throttled_total", help, &[("how", how)])
        };
        let counter = |name, help| registry.counter(name, help, &[]);
        Self {
            requests,
            legs: Legs {
                acknowledge: leg("acknowledge"),
                begin: leg("begin"),
                bio: leg("bio"),
                complete: leg("complete"),
            },
            logged_flushes: counter(
                "endio_writeback_logged_flushes_total",
                "Flushes whose data went into the data log",
            ),
            logged_ahead: counter(
                "endio_writeback_logged_ahead_total",
                "Times that data went to the data log before its flush came",
            ),
            write_outs: counter("endio_writeback_write_outs_total", "Write-outs converted"),
            duplicates: counter(
                "endio_writeback_duplicates_total",
                "Requests that had been applied before",
            ),
            look_ups: counter(
                "endio_writeback_look_ups_total",
                "Questions to conversion about the map of a volume",
            ),
            reads_at_hand: counter(
                "endio_writeback_reads_at_hand_total",
                "Reads that needed nobody: all blocks were in memory here",
            ),
            reads_repaired: counter(
                "endio_writeback_reads_repaired_total",
                "Reads that went to another replica",
            ),
            defragmented_blocks: counter(
                "endio_writeback_defragmented_blocks_total",
                "Blocks written anew because they lay in many pieces",
            ),
            defragment_missed: counter(
                "endio_writeback_defragment_missed_total",
                "Windows that did not lie better afterwards, or could not be written anew",
            ),
            throttled_delayed: throttled("delayed"),
            throttled_waited: throttled("waited"),
            nbd_connections: registry.gauge(
                "endio_writeback_nbd_connections",
                "NBD clients that are attached",
                &[],
            ),
            dirty_bytes: registry.gauge(
                "endio_writeback_dirty_bytes",
                "Acknowledged, not converted",
                &[],
            ),
            registry,
        }
    }
}

impl Metrics {
    /// Counts a request that was answered.
    pub fn answered(&self, kind: Kind, took: Duration, span: &Span, is_ok: bool) {
        let requests = &self.requests[kind as usize];
        if is_ok {
            requests.ok.inc()
        } else {
            requests.error.inc()
        }
        requests.time.record_of(took, span.sampled());
        if matches!(kind, Kind::WriteBuffered | Kind::WriteDirect) {
            self.legs.acknowledge.record_of(took, span.sampled());
        }
    }

    /// Counts an attempt of an io_end that did not convert.
    pub fn attempt_failed(&self, reason: Reason) {
        let help = "Attempts of an io_end that did not convert";
        let labels = [("reason", reason.name())];
        self.registry.counter("endio_writeback_attempts_failed_total", help, &labels).inc();
    }
}
