//! A registry of named numbers, readable as JSON, as OpenMetrics text and as OTLP.

mod otlp;
mod text;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::Serialize;

use crate::trace::{self, Context};

pub use otlp::to_otlp;
pub use text::{Form, render};

/// Label names and values of one metric. Both are `'static`: labels come from closed sets, so an
/// id of a volume or a request cannot become one.
pub type Labels = [(&'static str, &'static str)];

/// Number of buckets of a [`Histogram`]: bucket i counts durations below 2^i µs; the last the rest.
pub const HISTOGRAM_BUCKETS: usize = 32;

/// All metrics of a process or service. Cheap to clone; all clones are one registry.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    metrics: Mutex<Metrics>,
    refresh: Mutex<Vec<Refresh>>,
}

/// By name, then by labels.
type Metrics = BTreeMap<&'static str, Family>;

struct Refresh(Box<dyn Fn() -> bool + Send + Sync>);

impl fmt::Debug for Refresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Refresh")
    }
}

#[derive(Debug, Default)]
struct Family {
    help: &'static str,
    metrics: BTreeMap<Key, Metric>,
}

type Key = Vec<(&'static str, Cow<'static, str>)>;

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
    /// The last one of each bucket whose trace is recorded.
    exemplars: Mutex<BTreeMap<usize, Exemplar>>,
}

/// A duration that belongs to a recorded trace.
#[derive(Clone, Copy, Debug)]
struct Exemplar {
    context: Context,
    us: u64,
    unix_ns: u64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        self.count_in(duration);
    }

    /// Counts one duration, and names the trace that it belongs to if that is recorded.
    pub fn record_of(&self, duration: Duration, trace: Option<Context>) {
        let (bucket, us) = self.count_in(duration);
        let Some(context) = trace.filter(|context| context.is_sampled) else { return };
        // Somebody reads them just now: the next one will do as well.
        if let Ok(mut exemplars) = self.0.exemplars.try_lock() {
            exemplars.insert(bucket, Exemplar { context, us, unix_ns: trace::now_ns() });
        }
    }

    fn count_in(&self, duration: Duration) -> (usize, u64) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bits = (u64::BITS - us.leading_zeros()) as usize;
        let bucket = bits.min(HISTOGRAM_BUCKETS - 1);
        self.0.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum_us.fetch_add(us, Ordering::Relaxed);
        (bucket, us)
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
    pub fn counter(&self, name: &'static str, help: &'static str, labels: &Labels) -> Counter {
        match self.metric(name, help, own(labels), || Metric::Counter(Counter::default())) {
            Metric::Counter(counter) => counter,
            _ => Counter::default(),
        }
    }

    /// The gauge of this name and these labels, as [`Self::counter`].
    #[must_use]
    pub fn gauge(&self, name: &'static str, help: &'static str, labels: &Labels) -> Gauge {
        match self.metric(name, help, own(labels), || Metric::Gauge(Gauge::default())) {
            Metric::Gauge(gauge) => gauge,
            _ => Gauge::default(),
        }
    }

    /// The histogram of this name and these labels, as [`Self::counter`].
    #[must_use]
    pub fn histogram(&self, name: &'static str, help: &'static str, labels: &Labels) -> Histogram {
        match self.metric(name, help, own(labels), || Metric::Histogram(Histogram::default())) {
            Metric::Histogram(histogram) => histogram,
            _ => Histogram::default(),
        }
    }

    /// Replaces all gauges of this name: of members of a small set that changes seldom, like the
    /// parts of a cluster. Callers bound the set.
    pub fn set_members(
        &self,
        name: &'static str,
        help: &'static str,
        members: impl IntoIterator<Item = (Vec<(&'static str, String)>, i64)>,
    ) {
        let metrics = members.into_iter().map(|(labels, value)| {
            let gauge = Gauge::default();
            gauge.set(value);
            let key = labels.into_iter().map(|(name, value)| (name, Cow::Owned(value)));
            (key.collect(), Metric::Gauge(gauge))
        });
        let metrics = metrics.collect();
        self.metrics().insert(name, Family { help, metrics });
    }

    /// Called before each reading, to set gauges; `false`: what it reads from is gone.
    pub fn before_reading(&self, refresh: impl Fn() -> bool + Send + Sync + 'static) {
        let mut all = self.inner.refresh.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Refresh(Box::new(refresh)));
    }

    /// Shows this registry on the process's `/metrics` and exports it, until its last clone is
    /// dropped.
    pub fn expose(&self) {
        let mut exposed = EXPOSED.lock().unwrap_or_else(PoisonError::into_inner);
        exposed.retain(|registry| registry.strong_count() > 0);
        exposed.push(Arc::downgrade(&self.inner));
    }

    /// All metrics by `name{label="value"}`, in order. Serialize it for JSON.
    #[must_use]
    pub fn read(&self) -> BTreeMap<String, Reading> {
        self.refresh();
        let metrics = self.metrics();
        let families = metrics.iter().flat_map(|(name, family)| {
            let named = move |(labels, metric): (&Key, &Metric)| {
                (format!("{name}{}", text::labels(labels)), reading(metric))
            };
            family.metrics.iter().map(named)
        });
        families.collect()
    }

    fn metric(
        &self,
        name: &'static str,
        help: &'static str,
        key: Key,
        fresh: impl FnOnce() -> Metric,
    ) -> Metric {
        let mut metrics = self.metrics();
        let family = metrics.entry(name).or_default();
        family.help = help;
        family.metrics.entry(key).or_insert_with(fresh).clone()
    }

    fn refresh(&self) {
        let mut all = self.inner.refresh.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|refresh| (refresh.0)());
    }

    fn metrics(&self) -> MutexGuard<'_, Metrics> {
        self.inner.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

static EXPOSED: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

fn own(labels: &Labels) -> Key {
    labels.iter().map(|(name, value)| (*name, Cow::Borrowed(*value))).collect()
}

fn load(bucket: &AtomicU64) -> u64 {
    bucket.load(Ordering::Relaxed)
}

fn reading(metric: &Metric) -> Reading {
    match metric {
        Metric::Counter(counter) => Reading::Counter(counter.value()),
        Metric::Gauge(gauge) => Reading::Gauge(gauge.value()),
        Metric::Histogram(histogram) => {
            let mut buckets: Vec<_> = histogram.0.buckets.iter().map(load).collect();
            while buckets.last() == Some(&0) {
                buckets.pop();
            }
            let count = buckets.iter().sum();
            Reading::Histogram { count, sum_us: load(&histogram.0.sum_us), buckets }
        }
    }
}

/// What all exposed registries say together, and what the process itself has to say.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) families: BTreeMap<&'static str, SnapshotFamily>,
}

#[derive(Debug)]
pub(crate) struct SnapshotFamily {
    pub(crate) help: &'static str,
    pub(crate) series: BTreeMap<Key, Series>,
}

#[derive(Debug, Default)]
pub(crate) struct Series {
    pub(crate) value: Option<Number>,
    pub(crate) buckets: Vec<u64>,
    pub(crate) sum_us: u64,
    exemplars: HashMap<usize, Exemplar>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    Counter(u64),
    Gauge(i64),
}

impl Snapshot {
    /// Services of one process that count the same are added up.
    pub(crate) fn take() -> Self {
        let exposed: Vec<_> = {
            let exposed = EXPOSED.lock().unwrap_or_else(PoisonError::into_inner);
            exposed.iter().filter_map(Weak::upgrade).collect()
        };
        let mut snapshot = Self::default();
        let mut process = crate::telemetry::process_registry();
        process.refresh();
        snapshot.add(&process);
        for inner in exposed {
            process = Registry { inner };
            process.refresh();
            snapshot.add(&process);
        }
        snapshot
    }

    #[cfg(test)]
    pub(crate) fn of(registry: &Registry) -> Self {
        let mut snapshot = Self::default();
        snapshot.add(registry);
        snapshot
    }

    fn add(&mut self, registry: &Registry) {
        for (name, family) in registry.metrics().iter() {
            let fresh = || SnapshotFamily { help: family.help, series: BTreeMap::new() };
            let all = self.families.entry(name).or_insert_with(fresh);
            for (key, metric) in &family.metrics {
                all.series.entry(key.clone()).or_default().add(metric);
            }
        }
    }
}

impl Series {
    fn add(&mut self, metric: &Metric) {
        match (metric, self.value) {
            (Metric::Counter(counter), None) => self.value = Some(Number::Counter(counter.value())),
            (Metric::Counter(counter), Some(Number::Counter(sum))) => {
                self.value = Some(Number::Counter(sum + counter.value()));
            }
            (Metric::Gauge(gauge), None) => self.value = Some(Number::Gauge(gauge.value())),
            (Metric::Gauge(gauge), Some(Number::Gauge(sum))) => {
                self.value = Some(Number::Gauge(sum + gauge.value()));
            }
            (Metric::Histogram(histogram), _) => {
                self.buckets.resize(HISTOGRAM_BUCKETS, 0);
                for (sum, bucket) in self.buckets.iter_mut().zip(&histogram.0.buckets) {
                    *sum += load(bucket);
                }
                self.sum_us += load(&histogram.0.sum_us);
                let exemplars = &histogram.0.exemplars;
                let exemplars = exemplars.lock().unwrap_or_else(PoisonError::into_inner);
                self.exemplars.extend(exemplars.iter().map(|(at, exemplar)| (*at, *exemplar)));
            }
            // Two kinds under one name: the first one stays.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
