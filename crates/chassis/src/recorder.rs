//! A bounded in-memory store of finished spans: the trace of a write can always be asked for.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use opentelemetry::trace::{SpanContext, SpanId, Status, TraceId};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::trace::SpanData;
use serde::{Deserialize, Serialize};

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
    pub fn record(&self, span: SpanData) {
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
        TraceId::from_hex(&query.trace_id)
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
    traces: HashMap<TraceId, Trace>,
    /// Traces by age of their first span; a trace is in one of the two.
    ordinary: BTreeMap<u64, TraceId>,
    notable: BTreeMap<u64, TraceId>,
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
    spans: Vec<SpanData>,
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

    fn record(&mut self, span: SpanData, dead: &mut Vec<Trace>) {
        let id = span.span_context.trace_id();
        let is_notable = self.is_notable(&span);
        let bytes = weight(&span);
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

    fn is_notable(&self, span: &SpanData) -> bool {
        let slow = Duration::from_millis(self.config.slow_ms);
        let is_slow = duration(span) >= slow;
        let is_retried = number(span, "attempt").is_some_and(|attempt| attempt > 1);
        is_slow || is_retried || has_error(span)
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

    fn trace(&self, id: TraceId, query: &SpanQuery, limit: usize) -> Vec<RecordedSpan> {
        let Some(trace) = self.traces.get(&id) else { return Vec::new() };
        let mut spans: Vec<_> = trace.spans.iter().filter(|span| matches(span, query)).collect();
        spans.sort_by_key(|span| span.start_time);
        spans.into_iter().take(limit).map(RecordedSpan::from).collect()
    }

    fn search(&self, query: &SpanQuery, limit: usize) -> Vec<RecordedSpan> {
        let is_wanted = |span: &&SpanData| {
            (!query.roots_only || span.parent_span_id == SpanId::INVALID) && matches(span, query)
        };
        let all = self.traces.values().flat_map(|trace| &trace.spans);
        let mut spans: Vec<_> = all.filter(is_wanted).collect();
        spans.sort_by_key(|span| Reverse(span.start_time));
        spans.truncate(limit);
        if !query.roots_only {
            spans.reverse();
        }
        spans.into_iter().map(RecordedSpan::from).collect()
    }
}

impl From<&SpanData> for RecordedSpan {
    fn from(span: &SpanData) -> Self {
        let parent = span.parent_span_id;
        let is_told = |key: &str| key != TARGET;
        let attributes = span.attributes.iter().filter(|pair| is_told(pair.key.as_str()));
        let start = span.start_time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            trace_id: span.span_context.trace_id().to_string(),
            span_id: span.span_context.span_id().to_string(),
            parent_span_id: if parent == SpanId::INVALID {
                String::new()
            } else {
                parent.to_string()
            },
            name: span.name.to_string(),
            service: service(span).into_owned(),
            start_unix_ns: nanos(start),
            duration_ns: nanos(duration(span)),
            attributes: attributes
                .map(|pair| (pair.key.to_string(), pair.value.to_string()))
                .collect(),
            links: span.links.iter().map(|link| link.span_context.trace_id().to_string()).collect(),
            error: error(span),
        }
    }
}

/// The attribute in which the tracing layer leaves the target of a span.
const TARGET: &str = "target";

/// The service of a span: the crate of its target, without our prefix.
fn service(span: &SpanData) -> Cow<'_, str> {
    service_of(attribute(span, TARGET).map_or(Cow::Borrowed(""), Value::as_str))
}

fn service_of(target: Cow<'_, str>) -> Cow<'_, str> {
    let krate = target.split("::").next().unwrap_or("");
    match krate.strip_prefix("endio_") {
        Some(service) => Cow::Owned(service.replace('_', "-")),
        None => Cow::Owned(krate.to_owned()),
    }
}

fn matches(span: &SpanData, query: &SpanQuery) -> bool {
    let is_text = |key, text: &str| attribute(span, key).is_some_and(|v| v.as_str() == text);
    if !query.volume.is_empty() && !is_text("volume", &query.volume) {
        return false;
    }
    if query.io_end != 0 && number(span, "io_end") != Some(query.io_end) {
        return false;
    }
    if let Some(offset) = query.offset_bytes {
        let (Some(start), Some(length)) = (number(span, "offset"), number(span, "length")) else {
            return false;
        };
        if offset < start || offset - start >= length {
            return false;
        }
    }
    query.service.is_empty() || service(span) == query.service
}

fn attribute<'a>(span: &'a SpanData, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|pair| pair.key.as_str() == key).map(|pair| &pair.value)
}

/// Numbers above `i64::MAX` and ids behind newtypes arrive as text.
fn number(span: &SpanData, key: &str) -> Option<u64> {
    match attribute(span, key)? {
        Value::I64(value) => u64::try_from(*value).ok(),
        value => value.as_str().parse().ok(),
    }
}

fn has_error(span: &SpanData) -> bool {
    matches!(span.status, Status::Error { .. })
        || attribute(span, "error").is_some_and(|value| !value.as_str().is_empty())
}

fn error(span: &SpanData) -> String {
    match &span.status {
        Status::Error { description } if !description.is_empty() => description.to_string(),
        Status::Error { .. } => "error".to_owned(),
        _ => attribute(span, "error").map(ToString::to_string).unwrap_or_default(),
    }
}

fn duration(span: &SpanData) -> Duration {
    span.end_time.duration_since(span.start_time).unwrap_or_default()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes that the span keeps in memory, roughly: its own size and what it owns.
fn weight(span: &SpanData) -> usize {
    let text =
        |value: &Value| if let Value::String(text) = value { text.as_str().len() } else { 0 };
    let pairs = |pairs: &[KeyValue]| {
        size_of_val(pairs) + pairs.iter().map(|pair| text(&pair.value)).sum::<usize>()
    };
    let events: usize = span.events.iter().map(|event| pairs(&event.attributes)).sum();
    size_of::<SpanData>()
        + pairs(&span.attributes)
        + events
        + span.links.len() * size_of::<SpanContext>() * 2
}
