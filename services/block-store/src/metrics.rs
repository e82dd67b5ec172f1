//! What this service counts; docs/OBSERVABILITY.md lists it.

use endio_chassis::metrics::{Counter, Gauge, Histogram, Registry};

/// Counters of one block-store.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// All of them, for reading.
    pub registry: Registry,
    /// Bios and reads refused.
    pub(crate) refused: Counter,
    /// Segments made durable.
    pub(crate) segments: Counter,
    /// Segments that failed on the device or by their checksum.
    pub(crate) failed_segments: Counter,
    /// Segments that a failed flush took with it.
    pub(crate) lost_segments: Counter,
    /// Repeated tokens answered with the first outcome.
    pub(crate) repeats: Counter,
    /// Blocks read whose checksum did not match.
    pub(crate) bad_blocks: Counter,
    /// Reads answered with data.
    pub(crate) reads: Counter,
    /// Blocks made durable.
    pub(crate) written_blocks: Counter,
    /// Blocks read.
    pub(crate) read_blocks: Counter,
    /// Time of all segments written, from arrival to durable.
    pub(crate) write_us: Counter,
    /// Time of all reads.
    pub(crate) read_us: Counter,
    /// Releases that conversion refused.
    pub(crate) refused_releases: Counter,
    /// Sessions with conversion that were registered.
    pub(crate) sessions: Counter,
    /// Ranges that could not be punched.
    pub(crate) failed_punches: Counter,
    /// Releases without an answer.
    pub(crate) unanswered: Gauge,
    pub(crate) legs: Legs,
}

/// Times of the legs of a segment here.
#[derive(Clone, Debug)]
pub(crate) struct Legs {
    pub(crate) wait: Histogram,
    pub(crate) write: Histogram,
    pub(crate) flush: Histogram,
    pub(crate) release: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::default();
        let counter = |name, help| registry.counter(name, help, &[]);
        let segments = |outcome| {
            let labels = [("outcome", outcome)];
            registry.counter("endio_block_store_segments_total", "Segments that ended", &labels)
        };
        let leg = |leg| registry.histogram("endio_leg_seconds", "Legs of a write", &[("leg", leg)]);
        Self {
            refused: counter("endio_block_store_refused_total", "Bios and reads refused"),
            segments: segments("ok"),
            failed_segments: segments("failed"),
            lost_segments: segments("lost"),
            repeats: counter(
                "endio_block_store_repeats_total",
                "Repeated tokens answered with the first outcome",
            ),
            bad_blocks: counter(
                "endio_block_store_checksum_errors_total",
                "Blocks whose checksum did not match",
            ),
            reads: counter("endio_block_store_reads_total", "Reads answered with data"),
            refused_releases: counter(
                "endio_block_store_refused_releases_total",
                "Releases that conversion refused",
            ),
            sessions: counter("endio_block_store_sessions_total", "Registrations"),
            failed_punches: counter(
                "endio_block_store_failed_punches_total",
                "Ranges that could not be given back",
            ),
            unanswered: registry.gauge(
                "endio_block_store_unanswered_releases",
                "Releases without an answer",
                &[],
            ),
            legs: Legs {
                wait: leg("wait"),
                write: leg("write"),
                flush: leg("flush"),
                release: leg("release"),
            },
            written_blocks: counter(
                "endio_block_store_written_blocks_total",
                "Blocks made durable",
            ),
            read_blocks: counter("endio_block_store_read_blocks_total", "Blocks read"),
            write_us: counter(
                "endio_block_store_write_microseconds_total",
                "Time of all segments, from arrival to durable",
            ),
            read_us: counter("endio_block_store_read_microseconds_total", "Time of all reads"),
            registry,
        }
    }
}
