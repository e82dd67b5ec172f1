//! Where spans go, and the decision which of them are kept.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::record::Record;
use super::ring::Ring;
use super::span::Why;
use crate::recorder::Recorder;

/// Traces that may wait to be kept by the other services; more are counted and dropped.
pub const KEEP_QUEUE: usize = 4_096;

/// Which traces are recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TraceConfig {
    /// Share of traces that are sampled at their root, 0.0 to 1.0; a caller's decision goes before
    /// it, and `OTEL_TRACES_SAMPLER` replaces it. Too small: few whole traces of ordinary writes.
    /// Too large: some µs per write.
    pub ratio: f64,
    /// Whether writes that are not sampled are kept when they were slow, failed or retried.
    pub keep_notable: bool,
    /// A write that took at least so long is slow, ms. Too small: everything is kept.
    pub slow_ms: u64,
    /// Spans of unsampled traces that a process remembers in case one is kept, some 600 bytes each.
    /// Too small: a kept trace lacks the spans of other services.
    pub ring_spans: usize,
}

impl Default for TraceConfig {
    fn default() -> Self {
        Self { ratio: 0.01, keep_notable: true, slow_ms: 100, ring_spans: 32_768 }
    }
}

/// How roots decide.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sampler {
    /// The caller's decision; without one this share.
    ParentOrRatio(f64),
    /// This share, whatever a caller decided.
    Ratio(f64),
}

/// Numbers for metrics.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) spans: AtomicU64,
    pub(crate) kept: [AtomicU64; 3],
    pub(crate) keep_queue_dropped: AtomicU64,
    pub(crate) otlp_dropped: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) sampler: Sampler,
    pub(crate) keeps: bool,
    pub(crate) slow_ns: u64,
    pub(crate) recorder: Recorder,
    ring: Ring,
    pub(crate) otlp: Option<mpsc::Sender<Arc<Record>>>,
    keep: mpsc::Sender<u128>,
    kept: Mutex<Option<mpsc::Receiver<u128>>>,
    pub(crate) counts: Counts,
}

static SINK: OnceLock<Sink> = OnceLock::new();

/// Where spans go; `None`: nowhere.
pub(super) fn sink() -> Option<&'static Sink> {
    SINK.get()
}

/// Spans go there from now on; the first call wins.
pub(crate) fn install(sink: Sink) {
    // The caller holds a lock of its own around the first call.
    let _ = SINK.set(sink);
}

/// Numbers of this process; `None`: nothing is recorded.
pub(crate) fn counts() -> Option<(&'static Counts, u64, u64)> {
    sink().map(|sink| (&sink.counts, sink.ring.dropped(), sink.recorder.dropped()))
}

/// Records what the ring still has of these traces: their writes were slow, failed or retried.
/// Returns how many spans that were.
pub fn keep(traces: &HashSet<u128>) -> usize {
    let Some(sink) = sink() else { return 0 };
    let records = sink.ring.take(traces);
    let count = records.len();
    records.into_iter().for_each(|record| sink.emit(record));
    count
}

/// The traces that began here and are kept; the other services are to be told. The first caller
/// gets them.
pub fn take_kept() -> Option<mpsc::Receiver<u128>> {
    sink()?.kept.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl Sink {
    pub(crate) fn new(
        config: &TraceConfig,
        sampler: Sampler,
        recorder: Recorder,
        otlp: Option<mpsc::Sender<Arc<Record>>>,
    ) -> Self {
        let (keep, kept) = mpsc::channel(KEEP_QUEUE);
        Self {
            sampler,
            keeps: config.keep_notable,
            slow_ns: config.slow_ms.saturating_mul(1_000_000),
            recorder,
            ring: Ring::new(if config.keep_notable { config.ring_spans } else { 0 }),
            otlp,
            keep,
            kept: Mutex::new(Some(kept)),
            counts: Counts::default(),
        }
    }

    /// Whether any span may be wanted.
    pub(super) fn is_on(&self) -> bool {
        let (Sampler::ParentOrRatio(ratio) | Sampler::Ratio(ratio)) = self.sampler;
        self.keeps || ratio > 0.0 || matches!(self.sampler, Sampler::ParentOrRatio(_))
    }

    /// The decision at a root, by the trace id alone: every process comes to the same one.
    pub(super) fn samples(&self, trace: u128, parent: Option<bool>) -> bool {
        match (self.sampler, parent) {
            (Sampler::ParentOrRatio(_), Some(is_sampled)) => is_sampled,
            (Sampler::ParentOrRatio(ratio) | Sampler::Ratio(ratio), _) => {
                let bound = (ratio.clamp(0.0, 1.0) * (1_u64 << 63) as f64) as u64;
                (trace as u64 >> 1) < bound
            }
        }
    }

    /// Records a finished span and its phases.
    pub(super) fn emit(&self, record: Record) {
        let phases: Vec<Record> = record.phases().collect();
        for record in std::iter::once(record).chain(phases) {
            let record = Arc::new(record);
            self.counts.spans.fetch_add(1, Ordering::Relaxed);
            if let Some(otlp) = &self.otlp
                && otlp.try_send(Arc::clone(&record)).is_err()
            {
                self.counts.otlp_dropped.fetch_add(1, Ordering::Relaxed);
            }
            self.recorder.record(record);
        }
    }

    /// Remembers a finished span of an unsampled trace.
    pub(super) fn remember(&self, record: Record) {
        self.ring.push(record);
    }

    /// A trace that began here is kept: what the ring has of it is recorded, and the others are
    /// told.
    pub(super) fn keep(&self, trace: u128, why: Why) {
        self.counts.kept[why as usize].fetch_add(1, Ordering::Relaxed);
        let records = self.ring.take(&HashSet::from([trace]));
        records.into_iter().for_each(|record| self.emit(record));
        if self.keep.try_send(trace).is_err() {
            self.counts.keep_queue_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}
