//! What this service counts.

use std::time::Duration;

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
    /// Releases that conversion refused.
    pub(crate) refused_releases: Counter,
    /// Sessions with conversion that were registered.
    pub(crate) sessions: Counter,
    /// Ranges that could not be punched.
    pub(crate) failed_punches: Counter,
    /// Releases without an answer.
    pub(crate) unanswered: Gauge,
    write: Histogram,
    flush: Histogram,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let registry = Registry::default();
        let counter = |name| registry.counter(name, &[]);
        Self {
            refused: counter("block_store_refused_total"),
            segments: counter("block_store_segments_total"),
            failed_segments: counter("block_store_failed_segments_total"),
            lost_segments: counter("block_store_lost_segments_total"),
            repeats: counter("block_store_repeats_total"),
            bad_blocks: counter("block_store_bad_blocks_total"),
            reads: counter("block_store_reads_total"),
            refused_releases: counter("block_store_refused_releases_total"),
            sessions: counter("block_store_sessions_total"),
            failed_punches: counter("block_store_failed_punches_total"),
            unanswered: registry.gauge("block_store_unanswered_releases", &[]),
            write: registry.histogram("block_store_write_seconds", &[]),
            flush: registry.histogram("block_store_flush_seconds", &[]),
            registry,
        }
    }

    pub(crate) fn wrote(&self, took: Duration) {
        self.write.record(took);
    }

    pub(crate) fn flushed(&self, took: Duration) {
        self.flush.record(took);
    }
}
