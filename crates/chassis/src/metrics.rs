//! A small registry of named numbers, readable as JSON.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

/// Label names and values of one metric. Both are `'static`: labels come from closed sets, so an
/// id of a volume or a request cannot become one.
pub type Labels = [(&'static str, &'static str)];

/// Number of buckets of a [`Histogram`]: bucket i counts durations below 2^i µs; the last the rest.
pub const HISTOGRAM_BUCKETS: usize = 32;

/// All metrics of a process or service. Cheap to clone; all clones are one registry.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    metrics: Arc<Mutex<BTreeMap<String, Metric>>>,
}

#[derive(Clone, Debug)]
enum Metric {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

/// Grows only.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count since start.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Goes up and down.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    /// Replaces the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The current value.
    #[must_use]
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations in buckets of powers of two.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<HistogramInner>);

#[derive(Debug, Default)]
struct HistogramInner {
    buckets: [AtomicU64; HISTOGRAM_BUCKETS],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bits = (u64::BITS - us.leading_zeros()) as usize;
        self.0.buckets[bits.min(HISTOGRAM_BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        self.0.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }
}

/// One metric as it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Reading {
    /// A counter.
    Counter(u64),
    /// A gauge.
    Gauge(i64),
    /// A histogram.
    Histogram {
        /// Number of durations.
        count: u64,
        /// Their sum in µs.
        sum_us: u64,
        /// Per bucket, see [`HISTOGRAM_BUCKETS`]; empty buckets at the end are left out.
        buckets: Vec<u64>,
    },
}

impl Registry {
    /// The counter of this name and these labels; made on first use. If the name is taken by
    /// another kind of metric, the result is counted nowhere.
    #[must_use]
    pub fn counter(&self, name: &'static str, labels: &Labels) -> Counter {
        let fresh = || Metric::Counter(Counter::default());
        match self.metrics().entry(key(name, labels)).or_insert_with(fresh) {
            Metric::Counter(counter) => counter.clone(),
            _ => Counter::default(),
        }
    }

    /// The gauge of this name and these labels, as [`Self::counter`].
    #[must_use]
    pub fn gauge(&self, name: &'static str, labels: &Labels) -> Gauge {
        let fresh = || Metric::Gauge(Gauge::default());
        match self.metrics().entry(key(name, labels)).or_insert_with(fresh) {
            Metric::Gauge(gauge) => gauge.clone(),
            _ => Gauge::default(),
        }
    }

    /// The histogram of this name and these labels, as [`Self::counter`].
    #[must_use]
    pub fn histogram(&self, name: &'static str, labels: &Labels) -> Histogram {
        let fresh = || Metric::Histogram(Histogram::default());
        match self.metrics().entry(key(name, labels)).or_insert_with(fresh) {
            Metric::Histogram(histogram) => histogram.clone(),
            _ => Histogram::default(),
        }
    }

    /// All metrics by `name{label="value"}`, in order. Serialize it for JSON.
    #[must_use]
    pub fn read(&self) -> BTreeMap<String, Reading> {
        self.metrics().iter().map(|(key, metric)| (key.clone(), reading(metric))).collect()
    }

    /// All metrics as text, one `name{label="value"} number` per line; a histogram as its count
    /// and its sum.
    #[must_use]
    pub fn text(&self) -> String {
        let line = |(key, reading): (String, Reading)| match reading {
            Reading::Counter(value) => format!("{key} {value}\n"),
            Reading::Gauge(value) => format!("{key} {value}\n"),
            Reading::Histogram { count, sum_us, .. } => {
                let (name, labels) = key.split_at(key.find('{').unwrap_or(key.len()));
                format!("{name}_count{labels} {count}\n{name}_sum_us{labels} {sum_us}\n")
            }
        };
        self.read().into_iter().map(line).collect()
    }

    fn metrics(&self) -> MutexGuard<'_, BTreeMap<String, Metric>> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(name: &str, labels: &Labels) -> String {
    if labels.is_empty() {
        return name.to_owned();
    }
    let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
    format!("{name}{{{}}}", labels.join(","))
}

fn reading(metric: &Metric) -> Reading {
    match metric {
        Metric::Counter(counter) => Reading::Counter(counter.value()),
        Metric::Gauge(gauge) => Reading::Gauge(gauge.value()),
        Metric::Histogram(histogram) => {
            let load = |bucket: &AtomicU64| bucket.load(Ordering::Relaxed);
            let mut buckets: Vec<_> = histogram.0.buckets.iter().map(load).collect();
            while buckets.last() == Some(&0) {
                buckets.pop();
            }
            let count = buckets.iter().sum();
            Reading::Histogram { count, sum_us: load(&histogram.0.sum_us), buckets }
        }
    }
}

#[cfg(test)]
mod tests;
