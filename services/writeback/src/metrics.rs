//! Numbers of this service. Labels come from closed sets.

use endio_chassis::metrics::{Counter, Gauge, Histogram, Registry};

/// All metrics of the service.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The registry they live in.
    pub registry: Registry,
    /// Writes acknowledged from the dirty cache.
    pub writes_buffered: Counter,
    /// Writes acknowledged after their conversion.
    pub writes_direct: Counter,
    /// Reads answered.
    pub reads: Counter,
    /// Write-outs converted.
    pub write_outs: Counter,
    /// Attempts of an io_end that did not convert.
    pub attempts_failed: Counter,
    /// Requests that had been applied before.
    pub duplicates: Counter,
    /// Questions to conversion about the map of a volume.
    pub look_ups: Counter,
    /// Reads that went to another replica.
    pub reads_repaired: Counter,
    /// Dirty bytes, all volumes.
    pub dirty_bytes: Gauge,
    /// Time of a write in the service.
    pub write_time: Histogram,
    /// Time of a read in the service.
    pub read_time: Histogram,
    /// Time of an fsync in the service.
    pub fsync_time: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::default();
        Self {
            writes_buffered: registry.counter("writes", &[("mode", "buffered")]),
            writes_direct: registry.counter("writes", &[("mode", "direct")]),
            reads: registry.counter("reads", &[]),
            write_outs: registry.counter("write_outs", &[]),
            attempts_failed: registry.counter("attempts_failed", &[]),
            duplicates: registry.counter("duplicates", &[]),
            look_ups: registry.counter("look_ups", &[]),
            reads_repaired: registry.counter("reads_repaired", &[]),
            dirty_bytes: registry.gauge("dirty_bytes", &[]),
            write_time: registry.histogram("write_time", &[]),
            read_time: registry.histogram("read_time", &[]),
            fsync_time: registry.histogram("fsync_time", &[]),
            registry,
        }
    }
}
