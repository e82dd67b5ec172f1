//! A collector of telemetry: takes OTLP over gRPC or http/protobuf and remembers all of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{
    LogsService, LogsServiceServer,
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{Metric, metric};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as wire;
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Largest message, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What the services speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// OTLP over gRPC.
    Grpc,
    /// OTLP over HTTP 1.1, protobuf.
    Http,
}

/// A span, as far as the tests look at it. Ids are hexadecimal, an absent parent is empty.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process.
    pub service: String,
    /// What it is.
    pub name: String,
    /// Its trace.
    pub trace: String,
    /// Itself.
    pub id: String,
    /// The span above it.
    pub parent: String,
    /// Traces and spans that it served.
    pub links: Vec<(String, String)>,
    /// As text.
    pub attributes: BTreeMap<String, String>,
    /// What went wrong.
    pub error: Option<String>,
}

impl Span {
    /// An attribute; empty if it has none of that name.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

/// A line of a log.
#[derive(Clone, Debug)]
pub struct Line {
    /// `service.name` of the process.
    pub service: String,
    /// What it says.
    pub body: String,
    /// The trace that it belongs to, or empty.
    pub trace: String,
}

/// Everything that has arrived.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// In order of arrival.
    pub spans: Vec<Span>,
    /// In order of arrival.
    pub lines: Vec<Line>,
    /// Traces of the exemplars of each metric, by service and name of the metric.
    pub metrics: BTreeMap<(String, String), Vec<String>>,
}

type Shared = Arc<Mutex<Received>>;

/// A running collector; dropping it ends it.
#[derive(Debug)]
pub struct Collector {
    address: String,
    protocol: Protocol,
    received: Shared,
    task: JoinHandle<()>,
}

impl Collector {
    /// Listens on a port of the system's choice.
    ///
    /// # Errors
    /// The port cannot be bound.
    pub async fn start(protocol: Protocol) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let received = Shared::default();
        let task = match protocol {
            Protocol::Grpc => tokio::spawn(grpc(listener, Arc::clone(&received))),
            Protocol::Http => tokio::spawn(http(listener, Arc::clone(&received))),
        };
        Ok(Self { address, protocol, received, task })
    }

    /// The variables that send everything here, soon.
    pub fn variables(&self) -> Vec<(String, String)> {
        let protocol = match self.protocol {
            Protocol::Grpc => "grpc",
            Protocol::Http => "http/protobuf",
        };
        let endpoint = format!("http://{}", self.address);
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "100"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "500"),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    /// What has arrived so far.
    pub fn received(&self) -> Received {
        lock(&self.received).clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Received> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn grpc(listener: TcpListener, received: Shared) {
    let sink = Sink(received);
    let size = MESSAGE_BYTES_MAX;
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(sink.clone()).max_decoding_message_size(size))
        .add_service(MetricsServiceServer::new(sink.clone()).max_decoding_message_size(size))
        .add_service(LogsServiceServer::new(sink).max_decoding_message_size(size));
    // It ends with the collector.
    let _ = server.serve_with_incoming(TcpListenerStream::new(listener)).await;
}

async fn http(listener: TcpListener, received: Shared) {
    type Take<M> = fn(&mut Received, M);
    type To<M> = State<(Shared, Take<M>)>;
    /// Empty is a whole answer, too.
    async fn take<M: Message + Default>(State((received, take)): To<M>, body: Bytes) -> StatusCode {
        match M::decode(body) {
            Ok(message) => {
                take(&mut lock(&received), message);
                StatusCode::OK
            }
            Err(_) => StatusCode::BAD_REQUEST,
        }
    }
    let (spans, metrics, lines): (Take<_>, Take<_>, Take<_>) =
        (Received::take_spans, Received::take_metrics, Received::take_lines);
    let router = Router::new()
        .route("/v1/traces", post(take).with_state((Arc::clone(&received), spans)))
        .route("/v1/metrics", post(take).with_state((Arc::clone(&received), metrics)))
        .route("/v1/logs", post(take).with_state((received, lines)))
        .layer(DefaultBodyLimit::max(MESSAGE_BYTES_MAX));
    // It ends with the collector.
    let _ = axum::serve(listener, router).await;
}

#[derive(Clone)]
struct Sink(Shared);

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        lock(&self.0).take_spans(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        lock(&self.0).take_metrics(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        lock(&self.0).take_lines(request.into_inner());
        Ok(Response::new(Default::default()))
    }
}

impl Received {
    fn take_spans(&mut self, request: ExportTraceServiceRequest) {
        for of_process in request.resource_spans {
            let service = service(of_process.resource.as_ref());
            for span in of_process.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.spans.push(Span::new(&service, span));
            }
        }
    }

    fn take_lines(&mut self, request: ExportLogsServiceRequest) {
        for of_process in request.resource_logs {
            let service = service(of_process.resource.as_ref());
            for line in of_process.scope_logs.into_iter().flat_map(|scope| scope.log_records) {
                let body = line.body.and_then(|body| body.value).map(text).unwrap_or_default();
                self.lines.push(Line {
                    service: service.clone(),
                    body,
                    trace: hex(&line.trace_id),
                });
            }
        }
    }

    fn take_metrics(&mut self, request: ExportMetricsServiceRequest) {
        for of_process in request.resource_metrics {
            let service = service(of_process.resource.as_ref());
            for metric in of_process.scope_metrics.into_iter().flat_map(|scope| scope.metrics) {
                let traces = exemplars(&metric);
                self.metrics.entry((service.clone(), metric.name)).or_default().extend(traces);
            }
        }
    }
}

impl Span {
    fn new(service: &str, span: wire::Span) -> Self {
        let links = span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id)));
        let failed = |status: &wire::Status| {
            let is_error = status.code == wire::status::StatusCode::Error as i32;
            is_error.then(|| status.message.clone())
        };
        Self {
            service: service.to_owned(),
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            links: links.collect(),
            error: span.status.as_ref().and_then(failed),
            attributes: span.attributes.into_iter().map(pair).collect(),
            name: span.name,
        }
    }
}

fn exemplars(metric: &Metric) -> Vec<String> {
    match &metric.data {
        Some(metric::Data::Histogram(histogram)) => {
            let points = histogram.data_points.iter();
            points.flat_map(|point| &point.exemplars).map(|it| hex(&it.trace_id)).collect()
        }
        _ => Vec::new(),
    }
}

fn service(resource: Option<&Resource>) -> String {
    let attributes = resource.into_iter().flat_map(|resource| resource.attributes.iter().cloned());
    let named = attributes.map(pair).find(|(key, _)| key == "service.name");
    named.map(|(_, name)| name).unwrap_or_default()
}

fn pair(pair: KeyValue) -> (String, String) {
    (pair.key, pair.value.and_then(|value| value.value).map(text).unwrap_or_default())
}

fn text(value: any_value::Value) -> String {
    match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(is) => is.to_string(),
        other => format!("{other:?}"),
    }
}

/// Empty for an id that is absent.
fn hex(id: &[u8]) -> String {
    match id.iter().all(|byte| *byte == 0) {
        true => String::new(),
        false => id.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}
