//! A bounded in-memory store of finished spans: the trace of a write can always be asked for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::trace::Record;

/// Bounds of a [`Recorder`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecorderConfig {
    /// Most spans kept. Too small: a trace is gone before somebody asks. Too large: memory.
    pub spans_max: usize,
    /// Most bytes kept, as estimated from the spans' contents.
    pub bytes_max: usize,
    /// A trace with a span at least so long, in ms, is kept longer than a fast one.
    pub slow_ms: u64,
}

impl Default for RecorderConfig {
    fn default() -> Self {
        Self { spans_max: 50_000, bytes_max: 32 << 20, slow_ms: 100 }
    }
}

/// A finished span.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedSpan {
    /// 32 hexadecimal digits.
    pub trace_id: String,
    /// 16 hexadecimal digits.
    pub span_id: String,
    /// 16 hexadecimal digits; empty for a root span.
    pub parent_span_id: String,
    /// Name of the span.
    pub name: String,
    /// Service that recorded it.
    pub service: String,
    /// Start, nanoseconds since 1970 UTC.
    pub start_unix_ns: u64,
    /// Length in nanoseconds.
    pub duration_ns: u64,
    /// Attributes as text.
    pub attributes: BTreeMap<String, String>,
    /// Trace ids of linked spans.
    pub links: Vec<String>,
    /// Empty: it succeeded. Otherwise what went wrong.
    pub error: String,
}

/// Which spans to return; the default is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpanQuery {
    /// Only this trace (32 hexadecimal digits). Empty: any. Spans come by start time.
    pub trace_id: String,
    /// Only root spans, newest first. Ignored with a `trace_id`.
    pub roots_only: bool,
    /// Only spans that this service recorded. Empty: any.
    pub service: String,
    /// Only spans whose attribute `volume` has this value. Empty: any.
    pub volume: String,
    /// Only spans whose attributes `offset` and `length` cover this byte. `None`: any.
    pub offset_bytes: Option<u64>,
    /// Only spans whose attribute `io_end` has this value. 0: any.
    pub io_end: u64,
    /// At most so many. 0: [`QUERY_LIMIT_DEFAULT`]; never more than [`QUERY_LIMIT_MAX`].
    pub limit: usize,
}

/// Spans returned where a query sets no limit.
pub const QUERY_LIMIT_DEFAULT: usize = 100;
/// Most spans returned by one query.
pub const QUERY_LIMIT_MAX: usize = 10_000;

/// The store. Cheap to clone; all clones are one store.
///
/// Whole traces are dropped to make room, the oldest first. A *notable* trace (slow, failed, or
/// retried: an attribute `attempt` above 1) outlives the others, as long as notable ones fill no
/// more than three quarters of the store: a bad day must not blind it to what happens now.
#[derive(Clone, Debug)]
pub struct Recorder {
    store: Arc<Mutex<Store>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new(RecorderConfig::default())
    }
}

impl Recorder {
    /// An empty store with these bounds.
    #[must_use]
    pub fn new(config: RecorderConfig) -> Self {
        Self { store: Arc::new(Mutex::new(Store::new(config))) }
    }

    /// Adds a finished span and makes room for it if necessary.
    pub fn record(&self, span: Arc<Record>) {
        let mut dead = Vec::new();
        self.store().record(span, &mut dead);
        // The memory of dropped traces is given back here, outside the lock.
    }

    /// Spans that match. Looks at every span in memory unless a `trace_id` is given.
    #[must_use]
    pub fn query(&self, query: &SpanQuery) -> Vec<RecordedSpan> {
        let limit = match query.limit {
            0 => QUERY_LIMIT_DEFAULT,
            limit => limit.min(QUERY_LIMIT_MAX),
        };
        if query.trace_id.is_empty() {
            return self.store().search(query, limit);
        }
        u128::from_str_radix(&query.trace_id, 16)
            .map_or_else(|_| Vec::new(), |trace_id| self.store().trace(trace_id, query, limit))
    }

    /// Spans dropped since start, to make room.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.store().dropped
    }

    /// Spans in memory.
    #[must_use]
    pub fn len(&self) -> usize {
        self.store().spans
    }

    /// Whether nothing is in memory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // A panic inside leaves at worst wrong counts of a diagnostic store, not worth a stop.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notable traces may fill `NOTABLE_SHARE.0 / NOTABLE_SHARE.1` of the store.
const NOTABLE_SHARE: (usize, usize) = (3, 4);

#[derive(Debug)]
struct Store {
    config: RecorderConfig,
    traces: HashMap<u128, Trace>,
    /// Traces by age of their first span; a trace is in one of the two.
    ordinary: BTreeMap<u64, u128>,
    notable: BTreeMap<u64, u128>,
    next_age: u64,
    spans: usize,
    bytes: usize,
    notable_spans: usize,
    notable_bytes: usize,
    dropped: u64,
}

#[derive(Debug)]
struct Trace {
    age: u64,
    is_notable: bool,
    bytes: usize,
    spans: Vec<Arc<Record>>,
}

impl Store {
    fn new(config: RecorderConfig) -> Self {
        Self {
            config,
            traces: HashMap::new(),
            ordinary: BTreeMap::new(),
            notable: BTreeMap::new(),
            next_age: 0,
            spans: 0,
            bytes: 0,
            notable_spans: 0,
            notable_bytes: 0,
            dropped: 0,
        }
    }

    fn record(&mut self, span: Arc<Record>, dead: &mut Vec<Trace>) {
        let id = span.context.trace;
        let is_notable = self.is_notable(&span);
        let bytes = span.weight();
        let trace = self.traces.entry(id).or_insert_with(|| {
            self.next_age += 1;
            self.ordinary.insert(self.next_age, id);
            Trace { age: self.next_age, is_notable: false, bytes: 0, spans: Vec::new() }
        });
        trace.spans.push(span);
        trace.bytes += bytes;
        self.spans += 1;
        self.bytes += bytes;
        if trace.is_notable {
            self.notable_spans += 1;
            self.notable_bytes += bytes;
        } else if is_notable {
            trace.is_notable = true;
            self.ordinary.remove(&trace.age);
            self.notable.insert(trace.age, id);
            self.notable_spans += trace.spans.len();
            self.notable_bytes += trace.bytes;
        }
        while self.spans > self.config.spans_max || self.bytes > self.config.bytes_max {
            let Some(trace) = self.drop_one() else { return };
            dead.push(trace);
        }
    }

    fn is_notable(&self, span: &Record) -> bool {
        let slow = Duration::from_millis(self.config.slow_ms);
        let is_slow = span.duration() >= slow;
        let is_retried = span.number("attempt").is_some_and(|attempt| attempt > 1);
        is_slow || is_retried || span.error.is_some()
    }

    fn drop_one(&mut self) -> Option<Trace> {
        let (part, whole) = NOTABLE_SHARE;
        let is_over =
            |used: usize, max: usize| used.saturating_mul(whole) > max.saturating_mul(part);
        let has_too_many = is_over(self.notable_spans, self.config.spans_max)
            || is_over(self.notable_bytes, self.config.bytes_max);
        let id = if has_too_many || self.ordinary.is_empty() {
            self.notable.pop_first()?.1
        } else {
            self.ordinary.pop_first()?.1
        };
        let trace = self.traces.remove(&id)?;
        let count = trace.spans.len();
        self.spans -= count;
        self.bytes -= trace.bytes;
        self.dropped += count as u64;
        if trace.is_notable {
            self.notable_spans -= count;
            self.notable_bytes -= trace.bytes;
        }
        Some(trace)
    }

    fn trace(&self, id: u128, query: &SpanQuery, limit: usize) -> Vec<RecordedSpan> {
        let Some(trace) = self.traces.get(&id) else { return Vec::new() };
        let mut spans: Vec<_> = trace.spans.iter().filter(|span| matches(span, query)).collect();
        spans.sort_by_key(|span| span.start_ns);
        spans.into_iter().take(limit).map(|span| RecordedSpan::from(&**span)).collect()
    }

    fn search(&self, query: &SpanQuery, limit: usize) -> Vec<RecordedSpan> {
        let is_wanted =
            |span: &&Arc<Record>| (!query.roots_only || span.parent == 0) && matches(span, query);
        let all = self.traces.values().flat_map(|trace| &trace.spans);
        let mut spans: Vec<_> = all.filter(is_wanted).collect();
        spans.sort_by_key(|span| Reverse(span.start_ns));
        spans.truncate(limit);
        if !query.roots_only {
            spans.reverse();
        }
        spans.into_iter().map(|span| RecordedSpan::from(&**span)).collect()
    }
}

impl From<&Record> for RecordedSpan {
    fn from(span: &Record) -> Self {
        let attributes = span.attributes();
        Self {
            trace_id: span.context.trace_id(),
            span_id: span.context.span_id(),
            parent_span_id: match span.parent {
                0 => String::new(),
                parent => format!("{parent:016x}"),
            },
            name: span.name.to_owned(),
            service: span.service.to_owned(),
            start_unix_ns: span.start_ns,
            duration_ns: span.end_ns.saturating_sub(span.start_ns),
            attributes: attributes
                .map(|(key, value)| (key.to_owned(), value.text().into_owned()))
                .collect(),
            links: span.links.iter().map(|link| link.trace_id()).collect(),
            error: span.error.as_deref().unwrap_or_default().to_owned(),
        }
    }
}

fn matches(span: &Record, query: &SpanQuery) -> bool {
    let is_volume = || span.attribute("volume").is_some_and(|v| v.text() == query.volume);
    if !query.volume.is_empty() && !is_volume() {
        return false;
    }
    if query.io_end != 0 && span.number("io_end") != Some(query.io_end) {
        return false;
    }
    if let Some(offset) = query.offset_bytes {
        let (Some(start), Some(length)) = (span.number("offset"), span.number("length")) else {
            return false;
        };
        if offset < start || offset - start >= length {
            return false;
        }
    }
    query.service.is_empty() || span.service == query.service
}
