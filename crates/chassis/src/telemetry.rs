//! Sets up logs for people, spans for the recorder, and their export to a collector.

mod lines;

use std::io::IsTerminal as _;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tracing::Subscriber;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

use crate::metrics::Registry;
use crate::otlp::{self, Exporters, Queues, Settings};
use crate::recorder::{Recorder, RecorderConfig};
use crate::trace::{self, Sampler, Sink, TraceConfig, Why};

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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Form of the log.
    pub log_format: LogFormat,
    /// Which log lines, as `tracing` directives (`info,endio_conversion=debug`). Empty: the
    /// environment variable `RUST_LOG`, and `info` without one.
    pub log_filter: String,
    /// Which traces are recorded.
    pub trace: TraceConfig,
    /// Bounds of the recorder.
    pub recorder: RecorderConfig,
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
    /// A variable of OpenTelemetry cannot be used.
    #[error("telemetry cannot be exported: {0}")]
    Export(String),
}

static EXPORTERS: OnceLock<Exporters> = OnceLock::new();

/// Installs log, spans and their export for this process, under this name for a collector, and
/// returns the recorder that spans go to.
///
/// Idempotent: later calls return the first call's recorder and ignore their settings, so that
/// every test may call it. Outside of a tokio runtime, nothing is exported.
///
/// # Errors
/// The log filter or a variable of OpenTelemetry cannot be read.
pub fn init(config: &TelemetryConfig, process: &str) -> Result<Recorder, TelemetryError> {
    static INSTALLED: Mutex<Option<Recorder>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(recorder) = installed.as_ref() {
        return Ok(recorder.clone());
    }
    let settings = Settings::from_env(process).map_err(TelemetryError::Export)?;
    let has_runtime = tokio::runtime::Handle::try_current().is_ok();
    let (exporters, queues) = if settings.is_any_on() && has_runtime {
        Exporters::start(&settings).map_err(TelemetryError::Export)?
    } else {
        Default::default()
    };
    let Queues { spans, logs } = queues;
    let logs = match logs {
        Some(provider) => {
            let bridge = OpenTelemetryTracingBridge::new(&provider);
            // Of the exporter's own connection nothing may be logged into it again.
            let filter = not_of_transport(log_filter(config)?);
            Some(bridge.with_filter(filter))
        }
        None => None,
    };
    let subscriber =
        tracing_subscriber::registry().with(log_layer(config, log_filter(config)?)).with(logs);
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        eprintln!("another tracing subscriber is installed already: nothing is logged");
    }
    let recorder = Recorder::new(config.recorder.clone());
    let sampler = settings.sampler.unwrap_or(Sampler::ParentOrRatio(config.trace.ratio));
    trace::install(Sink::new(&config.trace, sampler, recorder.clone(), spans));
    // Only this call comes here.
    let _ = EXPORTERS.set(exporters);
    *installed = Some(recorder.clone());
    Ok(recorder)
}

/// Exports what has gathered, at the very end of a process; gives up after `patience`.
pub async fn flush(patience: Duration) {
    if let Some(exporters) = EXPORTERS.get() {
        exporters.flush(patience).await;
    }
}

/// How long the end of a process waits for the collector.
pub const FLUSH_PATIENCE: Duration = Duration::from_secs(3);

fn log_filter(config: &TelemetryConfig) -> Result<EnvFilter, TelemetryError> {
    let filter = match config.log_filter.as_str() {
        "" => std::env::var("RUST_LOG").unwrap_or_default(),
        filter => filter.to_owned(),
    };
    let filter = if filter.is_empty() { "info".to_owned() } else { filter };
    EnvFilter::try_new(&filter).map_err(|_| TelemetryError::Filter { filter })
}

fn not_of_transport(filter: EnvFilter) -> EnvFilter {
    let transport = ["h2", "hyper", "hyper_util", "tonic", "tower", "opentelemetry"];
    transport.into_iter().fold(filter, |filter, krate| {
        match format!("{krate}=off").parse() {
            Ok(directive) => filter.add_directive(directive),
            // The names above are all directives.
            Err(_) => filter,
        }
    })
}

fn log_layer<S>(config: &TelemetryConfig, filter: EnvFilter) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Human => {
            lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed()
        }
        LogFormat::Json => lines.event_format(lines::Json).with_filter(filter).boxed(),
    }
}

/// What the process itself tells: its version, and what became of its telemetry.
pub(crate) fn process_registry() -> Registry {
    let registry = Registry::default();
    let version = env!("CARGO_PKG_VERSION");
    let info = [(vec![("version", version.to_owned())], 1)];
    registry.set_members("endio_build_info", "Always 1; the version is a label", info);
    if let Some(waiting) = crate::admin::not_ready() {
        let is_ready = waiting.is_empty().into();
        registry
            .gauge("endio_ready", "1: all services of the process take work", &[])
            .set(is_ready);
    }
    let dropped_help = "Telemetry that was not exported: queue full, or not taken";
    let exports_help = "Calls of the collector";
    for (signal, counts) in
        [("traces", &otlp::SPANS), ("logs", &otlp::LOGS), ("metrics", &otlp::METRICS)]
    {
        let load = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        let mut dropped = load(&counts.dropped);
        if let ("traces", Some((counts, ..))) = (signal, trace::counts()) {
            dropped += load(&counts.otlp_dropped);
        }
        registry
            .counter("endio_otlp_dropped_total", dropped_help, &[("signal", signal)])
            .add(dropped);
        for (outcome, count) in [("ok", &counts.exports), ("error", &counts.failed_exports)] {
            let labels = [("signal", signal), ("outcome", outcome)];
            registry.counter("endio_otlp_exports_total", exports_help, &labels).add(load(count));
        }
    }
    if let Some((counts, ring, recorder)) = trace::counts() {
        let spans = counts.spans.load(Ordering::Relaxed);
        registry.counter("endio_trace_spans_total", "Spans recorded", &[]).add(spans);
        for (why, name) in Why::ALL {
            let kept = counts.kept[why as usize].load(Ordering::Relaxed);
            let help = "Unsampled traces that were kept";
            registry.counter("endio_trace_kept_total", help, &[("why", name)]).add(kept);
        }
        let keep = counts.keep_queue_dropped.load(Ordering::Relaxed);
        for (place, dropped) in [("ring", ring), ("recorder", recorder), ("keep_queue", keep)] {
            let help = "Spans, or requests to keep some, that made room in memory";
            let labels = [("where", place)];
            registry.counter("endio_trace_dropped_total", help, &labels).add(dropped);
        }
    }
    registry
}

/// The `traceparent` header of a unary call; empty if there is none.
#[must_use]
pub fn remote_parent(metadata: &MetadataMap) -> &str {
    metadata.get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or("")
}

#[cfg(test)]
mod tests;
