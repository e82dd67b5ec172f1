//! Logs for people, spans for the recorder, and trace context across processes.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::{
    SpanContext, SpanId, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    TracerProvider as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanProcessor};
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata, Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use crate::recorder::{Recorder, RecorderConfig};

/// Attributes of one span; more are counted and dropped.
const ATTRIBUTES_MAX: u32 = 32;
/// Events of one span.
const EVENTS_MAX: u32 = 16;
/// Links of one span: a batch links to each of the requests that it served.
const LINKS_MAX: u32 = 1024;

/// Form of the log on stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// Logs and traces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Form of the log.
    pub log_format: LogFormat,
    /// Which log lines, as `tracing` directives (`info,endio_conversion=debug`). Empty: the
    /// environment variable `RUST_LOG`, and `info` without one.
    pub log_filter: String,
    /// Share of traces that are recorded, 0.0 to 1.0; a caller's decision goes before it. Too
    /// small: the interesting write was not recorded. Too large: a few µs per span.
    pub trace_ratio: f64,
    /// Bounds of the recorder.
    pub recorder: RecorderConfig,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log_format: LogFormat::Human,
            log_filter: String::new(),
            trace_ratio: 1.0,
            recorder: RecorderConfig::default(),
        }
    }
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// `log_filter` or `RUST_LOG` cannot be read.
    #[error("`{filter}` is no log filter")]
    Filter {
        /// What was given.
        filter: String,
    },
}

/// Installs log and tracing for this process and returns the recorder that spans go to.
///
/// Idempotent: later calls return the first call's recorder and ignore their settings, so that
/// every test may call it. Spans of crates named `endio_…` down to DEBUG are recorded, others are
/// not. If somebody else installed a subscriber before, nothing is recorded.
///
/// # Errors
/// The log filter cannot be read.
pub fn init(config: &TelemetryConfig) -> Result<Recorder, TelemetryError> {
    static INSTALLED: Mutex<Option<Recorder>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(recorder) = installed.as_ref() {
        return Ok(recorder.clone());
    }
    let recorder = Recorder::new(config.recorder.clone());
    let subscriber = tracing_subscriber::registry()
        .with(log_layer(config, log_filter(config)?))
        .with(span_layer(config.trace_ratio, recorder.clone()));
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        eprintln!("another tracing subscriber is installed already: spans are not recorded");
    }
    *installed = Some(recorder.clone());
    Ok(recorder)
}

fn log_filter(config: &TelemetryConfig) -> Result<EnvFilter, TelemetryError> {
    let filter = match config.log_filter.as_str() {
        "" => std::env::var("RUST_LOG").unwrap_or_default(),
        filter => filter.to_owned(),
    };
    let filter = if filter.is_empty() { "info".to_owned() } else { filter };
    EnvFilter::try_new(&filter).map_err(|_| TelemetryError::Filter { filter })
}

fn log_layer<S>(config: &TelemetryConfig, filter: EnvFilter) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // Down to INFO, log lines carry no span context: else the fields of each span of the write
    // path would be formatted, and almost never printed.
    let wants_spans = filter.max_level_hint().is_none_or(|level| level >= LevelFilter::DEBUG);
    let filter = filter.and(filter_fn(move |meta| wants_spans || meta.is_event()));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Human => {
            lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed()
        }
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
    }
}

/// The layer that turns tracing spans into recorded ones.
///
/// Spans of this crate wrap whole calls, also streams that live for days; they are left out, so
/// that a span opened by a handler is a root or has the parent that the message named.
fn span_layer<S>(ratio: f64, recorder: Recorder) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)));
    let provider = SdkTracerProvider::builder()
        .with_span_processor(Feed { recorder })
        .with_sampler(sampler)
        .with_max_attributes_per_span(ATTRIBUTES_MAX)
        .with_max_events_per_span(EVENTS_MAX)
        .with_max_links_per_span(LINKS_MAX)
        .with_resource(Resource::builder_empty().build())
        .build();
    let is_ours = |meta: &Metadata<'_>| {
        let target = meta.target();
        let krate = target.split("::").next().unwrap_or(target);
        let level = if meta.is_span() { Level::DEBUG } else { Level::ERROR };
        krate.starts_with("endio") && krate != "endio_chassis" && *meta.level() <= level
    };
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("endio"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false)
        .with_filter(filter_fn(is_ours))
}

/// Hands finished spans to the recorder.
#[derive(Debug)]
struct Feed {
    recorder: Recorder,
}

impl SpanProcessor for Feed {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.recorder.record(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The W3C `traceparent` of the span; empty if it is disabled or its trace is not sampled.
///
/// Calling it starts the span: its parent cannot be changed afterwards.
#[must_use]
pub fn traceparent(span: &Span) -> String {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    if !context.is_valid() || !context.is_sampled() {
        return String::new();
    }
    format!("00-{:032x}-{:016x}-01", context.trace_id(), context.span_id())
}

/// Makes a span of another process the parent. Must be called before the span is entered, has
/// children or was asked for its [`traceparent`]; later calls are ignored, and so is empty or
/// invalid input.
pub fn set_parent(span: &Span, traceparent: &str) {
    if let Some(parent) = parse(traceparent) {
        // It fails where nothing is recorded, and then there is nothing to set.
        let _ = span.set_parent(Context::new().with_remote_span_context(parent));
    }
}

/// Links the span to one of another trace. Empty or invalid input is ignored.
pub fn link(span: &Span, traceparent: &str) {
    if let Some(other) = parse(traceparent) {
        span.add_link(other);
    }
}

/// Marks the span as failed; the message becomes [`crate::recorder::RecordedSpan::error`].
pub fn fail(span: &Span, message: &str) {
    span.set_status(Status::error(message.to_owned()));
}

/// The `traceparent` header of a unary call, for [`set_parent`]; empty if there is none.
#[must_use]
pub fn remote_parent(metadata: &MetadataMap) -> &str {
    metadata.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// Puts the span's `traceparent` into the headers of a unary call; nothing if it is not sampled.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    let value = traceparent(span);
    if !value.is_empty()
        && let Ok(value) = value.parse()
    {
        metadata.insert("traceparent", value);
    }
}

/// Reads `00-<trace>-<span>-<flags>` (W3C Trace Context, section 3.2).
fn parse(text: &str) -> Option<SpanContext> {
    let is_hex = |part: &&str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = text.split('-');
    let mut next = |digits| parts.next().filter(|part| part.len() == digits).filter(is_hex);
    let (version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
    // Later versions may add fields; version 0 has exactly these, and ff is forbidden.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests;
