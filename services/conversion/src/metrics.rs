//! What the service counts; docs/OBSERVABILITY.md lists it.

use std::time::Duration;

use endio_chassis::metrics::{Counter, Gauge, Histogram, Registry};
use endio_chassis::trace::Span;
use endio_state_machine::machine::{Counters, Gauges, StoreInfo};
use endio_types::{BLOCK_BYTES, Reason};

/// Stores that are shown one by one; more would be too many labels.
const STORES_MAX: usize = 1_024;

/// Numbers of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// Turns of the driver's loop.
    pub(crate) turns: Counter,
    /// Journal records.
    pub(crate) records: Counter,
    /// Conversion batches: one record each.
    pub(crate) batches: Counter,
    /// Logical blocks converted.
    pub(crate) converted_blocks: Counter,
    /// Time of a commit of the journal.
    pub(crate) commit: Histogram,
    convert: Histogram,
    told: std::sync::Arc<std::sync::Mutex<Counters>>,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help, &[]);
        Self {
            turns: counter("endio_conversion_turns_total", "Turns of the driver"),
            records: counter("endio_conversion_journal_records_total", "Records of the journal"),
            batches: counter("endio_conversion_batches_total", "Conversion batches"),
            converted_blocks: counter(
                "endio_conversion_converted_blocks_total",
                "Logical blocks converted",
            ),
            commit: registry.histogram(
                "endio_conversion_journal_commit_seconds",
                "Write and fdatasync of a group of records",
                &[],
            ),
            convert: registry.histogram(
                "endio_leg_seconds",
                "Legs of a write",
                &[("leg", "convert")],
            ),
            told: std::sync::Arc::default(),
            registry: registry.clone(),
        }
    }

    /// Counts an io_end whose end was told.
    pub(crate) fn completed(&self, failed: Option<Reason>, took: Duration, span: &Span) {
        match failed {
            None => self.convert.record_of(took, span.sampled()),
            Some(reason) => {
                let help = "Completions that tell a failure";
                let labels = [("reason", reason.name())];
                self.registry.counter("endio_conversion_aborts_total", help, &labels).inc();
            }
        }
    }

    /// Shows what the machine has and has counted.
    pub(crate) fn show(&self, gauges: &Gauges, counters: &Counters, epoch: u64, is_full: bool) {
        let set = |name, help, labels: &[(&'static str, &'static str)], value: u64| {
            let gauge: Gauge = self.registry.gauge(name, help, labels);
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set("endio_conversion_io_ends", "io_ends that live", &[], gauges.io_ends);
        for (lane, count) in ["direct", "write_out"].into_iter().zip(gauges.backlog) {
            let help = "Released io_ends that wait for their batch";
            set("endio_conversion_backlog_io_ends", help, &[("lane", lane)], count);
        }
        let help = "Holders whose lease runs";
        set("endio_conversion_holders", help, &[("kind", "writeback")], gauges.writebacks);
        let help = "Aborted io_ends that a store has not fenced yet";
        set("endio_conversion_fences_pending", help, &[], gauges.fences);
        set("endio_conversion_volumes", "Volumes", &[], gauges.volumes);
        let help = "Flushed blocks that are not converted yet";
        set("endio_conversion_logged_blocks", help, &[], gauges.logged_blocks);
        set("endio_conversion_cluster_epoch", "Grows with each start", &[], epoch);
        let help = "1: the metadata disk is full, writes are refused";
        set("endio_conversion_metadata_full", help, &[], is_full.into());
        let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = |name, help, labels: &[(&'static str, &'static str)], now: u64, before: u64| {
            self.registry.counter(name, help, labels).add(now.saturating_sub(before));
        };
        let (name, help) = ("endio_conversion_io_ends_total", "io_ends that ended");
        count(name, help, &[("end", "converted")], counters.converted, told.converted);
        let (now, before) = (counters.completed_inline, told.completed_inline);
        count(name, help, &[("end", "inline")], now, before);
        count(name, help, &[("end", "aborted")], counters.aborted, told.aborted);
        let help = "io_ends begun";
        count("endio_conversion_io_ends_begun_total", help, &[], counters.begun, told.begun);
        let (now, before) = (counters.logged_blocks, told.logged_blocks);
        let help = "Blocks of small flushes that came into the data log";
        count("endio_conversion_logged_blocks_total", help, &[], now, before);
        let (name, help) = ("endio_conversion_refused_releases_total", "Releases refused");
        count(name, help, &[("why", "forged")], counters.forged, told.forged);
        count(name, help, &[("why", "conflict")], counters.conflicts, told.conflicts);
        let (now, before) = (counters.refused_releases, told.refused_releases);
        count(name, help, &[("why", "other")], now, before);
        *told = *counters;
    }

    /// Shows the space of each store.
    pub(crate) fn show_stores(&self, stores: &[StoreInfo]) {
        let stores = &stores[..stores.len().min(STORES_MAX)];
        let live = stores.iter().filter(|store| store.live).count() as i64;
        let help = "Holders whose lease runs";
        self.registry.gauge("endio_conversion_holders", help, &[("kind", "store")]).set(live);
        let number = |store: &StoreInfo| ("store", store.id.0.to_string());
        let is_live = stores.iter().map(|store| (vec![number(store)], store.live.into()));
        self.registry.set_members("endio_conversion_store_live", "1: its lease runs", is_live);
        let bytes = stores.iter().flat_map(|store| {
            let classes = [
                ("capacity", store.capacity_blocks),
                ("free", store.free_blocks),
                ("mapped", store.mapped_blocks),
                ("reserved", store.reserved_blocks),
                ("quarantined", store.quarantined_blocks),
            ];
            classes.map(|(class, blocks)| {
                let bytes = i64::try_from(blocks.saturating_mul(BLOCK_BYTES)).unwrap_or(i64::MAX);
                (vec![number(store), ("class", class.to_owned())], bytes)
            })
        });
        let help = "Space of a store by class";
        self.registry.set_members("endio_conversion_store_bytes", help, bytes);
    }
}
