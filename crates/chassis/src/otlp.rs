//! Export of spans, log records and metrics to a collector, by the standard variables.
//!
//! Whoever records never waits: a full queue drops and counts. One task per signal takes what has
//! gathered, and a collector that is slow or away costs that task's time only.

mod env;
mod metrics;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::InstrumentationScope;
use opentelemetry::logs::LogRecord as _;
use opentelemetry_otlp::{LogExporter, SpanExporter};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    LogBatch, LogExporter as _, LogProcessor, SdkLogRecord, SdkLoggerProvider,
};
use opentelemetry_sdk::trace::SpanExporter as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::trace::{Record, current_context};

pub(crate) use env::{Settings, Signal};

/// Counts of one signal.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) dropped: AtomicU64,
    pub(crate) exports: AtomicU64,
    pub(crate) failed_exports: AtomicU64,
}

pub(crate) static SPANS: Counts = Counts::new();
pub(crate) static LOGS: Counts = Counts::new();
pub(crate) static METRICS: Counts = Counts::new();

impl Counts {
    const fn new() -> Self {
        Self {
            dropped: AtomicU64::new(0),
            exports: AtomicU64::new(0),
            failed_exports: AtomicU64::new(0),
        }
    }

    fn add(count: &AtomicU64, n: usize) {
        count.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// Asks a task to export what it has, and is answered when it did.
type Flush = mpsc::Receiver<oneshot::Sender<()>>;

/// The tasks that export.
#[derive(Debug, Default)]
pub(crate) struct Exporters {
    flush: Vec<mpsc::Sender<oneshot::Sender<()>>>,
}

/// Where records of an enabled signal go.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    pub(crate) spans: Option<mpsc::Sender<Arc<Record>>>,
    pub(crate) logs: Option<SdkLoggerProvider>,
}

impl Exporters {
    /// Starts a task for each signal that has an endpoint. Must be called inside a runtime.
    ///
    /// # Errors
    /// What in the variables cannot be used.
    pub(crate) fn start(settings: &Settings) -> Result<(Self, Queues), String> {
        let mut exporters = Self::default();
        let mut queues = Queues::default();
        if settings.is_on(Signal::Traces) {
            let (to, queue) = mpsc::channel(settings.spans.queue_max);
            let exporter = SpanExporter::builder().build().map_err(|error| error.to_string())?;
            exporters.spans(settings, exporter, queue);
            queues.spans = Some(to);
        }
        if settings.is_on(Signal::Logs) {
            let (to, queue) = mpsc::channel(settings.logs.queue_max);
            let exporter = LogExporter::builder().build().map_err(|error| error.to_string())?;
            exporters.logs(settings, exporter, queue);
            let provider = SdkLoggerProvider::builder()
                .with_resource(settings.resource.clone())
                .with_log_processor(ToQueue { to });
            queues.logs = Some(provider.build());
        }
        if settings.is_on(Signal::Metrics) {
            let flush = exporters.flusher();
            tokio::spawn(metrics::run(metrics::Target::new(settings)?, settings.interval, flush));
        }
        Ok((exporters, queues))
    }

    fn flusher(&mut self) -> Flush {
        let (ask, asked) = mpsc::channel(1);
        self.flush.push(ask);
        asked
    }

    fn spans(
        &mut self,
        settings: &Settings,
        mut exporter: SpanExporter,
        queue: mpsc::Receiver<Arc<Record>>,
    ) {
        exporter.set_resource(&settings.resource);
        let exporter = Arc::new(exporter);
        let export = move |batch: Vec<Arc<Record>>| {
            let exporter = Arc::clone(&exporter);
            async move {
                let batch = batch.iter().map(|record| record.to_otel()).collect();
                exporter.export(batch).await
            }
        };
        let flush = self.flusher();
        tokio::spawn(run(queue, flush, settings.spans, &SPANS, "spans", export));
    }

    fn logs(
        &mut self,
        settings: &Settings,
        mut exporter: LogExporter,
        queue: mpsc::Receiver<Logged>,
    ) {
        exporter.set_resource(&settings.resource);
        let exporter = Arc::new(exporter);
        let export = move |batch: Vec<Logged>| {
            let exporter = Arc::clone(&exporter);
            async move {
                let batch: Vec<_> = batch.iter().map(|(record, scope)| (record, scope)).collect();
                exporter.export(LogBatch::new(&batch)).await
            }
        };
        let flush = self.flusher();
        tokio::spawn(run(queue, flush, settings.logs, &LOGS, "log records", export));
    }

    /// Exports what has gathered; gives up after `patience`.
    pub(crate) async fn flush(&self, patience: Duration) {
        let all = self.flush.iter().map(|ask| async move {
            let (done, is_done) = oneshot::channel();
            if ask.send(done).await.is_ok() {
                let _ = is_done.await;
            }
        });
        let all = futures_util::future::join_all(all);
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!("the collector did not take the last telemetry in time");
        }
    }
}

/// Bounds of one signal's batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batching {
    pub(crate) queue_max: usize,
    pub(crate) batch_max: usize,
    pub(crate) delay: Duration,
    pub(crate) timeout: Duration,
}

/// Pause between two looks at the queue: it is looked at, not waited for, so that filling it wakes
/// nobody.
const LOOK: Duration = Duration::from_millis(20);

async fn run<T, F, Fut>(
    mut queue: mpsc::Receiver<T>,
    mut flush: Flush,
    limits: Batching,
    counts: &'static Counts,
    what: &'static str,
    export: F,
) where
    F: Fn(Vec<T>) -> Fut,
    Fut: Future<Output = OTelSdkResult>,
{
    let mut export_by = Instant::now() + limits.delay;
    let mut is_away = false;
    loop {
        let asked = tokio::time::timeout(LOOK.min(limits.delay), flush.recv()).await;
        let asked = match asked {
            Ok(None) => return,
            Ok(Some(done)) => Some(done),
            Err(_) => None,
        };
        let is_due = asked.is_some() || Instant::now() >= export_by;
        while queue.len() >= limits.batch_max || (is_due && !queue.is_empty()) {
            let mut batch = Vec::with_capacity(limits.batch_max.min(queue.len()));
            while batch.len() < limits.batch_max
                && let Ok(item) = queue.try_recv()
            {
                batch.push(item);
            }
            let count = batch.len();
            let outcome = match tokio::time::timeout(limits.timeout, export(batch)).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            note(outcome, count, counts, what, &mut is_away);
        }
        if is_due {
            export_by = Instant::now() + limits.delay;
        }
        if let Some(done) = asked {
            // Who asked may have given up.
            let _ = done.send(());
        }
    }
}

/// Counts an export, and logs when the collector goes away and comes back: not each failure.
fn note(
    outcome: Result<(), String>,
    items: usize,
    counts: &Counts,
    what: &str,
    is_away: &mut bool,
) {
    match outcome {
        Ok(()) => {
            Counts::add(&counts.exports, 1);
            if std::mem::take(is_away) {
                tracing::info!(what, "the collector takes telemetry again");
            }
        }
        Err(error) => {
            Counts::add(&counts.failed_exports, 1);
            Counts::add(&counts.dropped, items);
            if !std::mem::replace(is_away, true) {
                tracing::warn!(what, error, "the collector does not take telemetry; it is dropped");
            }
        }
    }
}

type Logged = (SdkLogRecord, InstrumentationScope);

/// Names the span of a log record and queues it.
#[derive(Debug)]
struct ToQueue {
    to: mpsc::Sender<Logged>,
}

impl LogProcessor for ToQueue {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if let Some(context) = current_context() {
            let flags = opentelemetry::trace::TraceFlags::new(context.is_sampled.into());
            record.set_trace_context(context.trace.into(), context.span.into(), Some(flags));
        }
        if self.to.try_send((record.clone(), scope.clone())).is_err() {
            Counts::add(&LOGS.dropped, 1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
