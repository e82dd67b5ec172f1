//! What the service counts.

use endio_chassis::metrics::{Counter, Registry};

/// Counters of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Turns of the driver's loop.
    pub(crate) turns: Counter,
    /// Journal records.
    pub(crate) records: Counter,
    /// Conversion batches: one record each.
    pub(crate) batches: Counter,
    /// Logical blocks converted.
    pub(crate) converted_blocks: Counter,
    /// Completions sent.
    pub(crate) completions: Counter,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        Self {
            turns: registry.counter("conversion_turns", &[]),
            records: registry.counter("conversion_records", &[]),
            batches: registry.counter("conversion_batches", &[]),
            converted_blocks: registry.counter("conversion_converted_blocks", &[]),
            completions: registry.counter("conversion_completions", &[]),
        }
    }
}
