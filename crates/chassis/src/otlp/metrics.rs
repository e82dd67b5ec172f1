//! Metrics go out at an interval.

use std::time::Duration;

use opentelemetry_http::HttpClient as _;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use super::{Flush, METRICS, Settings, note};
use crate::{metrics, trace};

enum Transport {
    Grpc(Box<MetricsServiceClient<Channel>>, MetadataMap),
    Http(Box<HyperClient>, http::Uri, Vec<(String, String)>),
}

/// Where metrics go.
pub(super) struct Target {
    transport: Transport,
    resource: Resource,
    start_ns: u64,
    timeout: Duration,
}

impl Target {
    pub(super) fn new(settings: &Settings) -> Result<Self, String> {
        let text = &settings.endpoint;
        let bad = |why: &str| format!("OTLP endpoint `{text}`: {why}");
        let transport = if settings.is_grpc {
            let endpoint = Endpoint::from_shared(text.clone()).map_err(|e| bad(&e.to_string()))?;
            let endpoint = if text.starts_with("https:") {
                let tls = ClientTlsConfig::new().with_enabled_roots();
                endpoint.tls_config(tls).map_err(|error| bad(&error.to_string()))?
            } else {
                endpoint
            };
            let client = MetricsServiceClient::new(endpoint.connect_lazy());
            Transport::Grpc(Box::new(client), metadata(&settings.headers)?)
        } else {
            let uri: http::Uri = text.parse().map_err(|_| bad("no url"))?;
            if uri.scheme_str() != Some("http") {
                return Err(bad("metrics over http/protobuf take http only; use grpc for TLS"));
            }
            let client = HyperClient::with_default_connector(settings.timeout, None);
            Transport::Http(Box::new(client), uri, settings.headers.clone())
        };
        Ok(Self {
            transport,
            resource: (&settings.resource).into(),
            start_ns: trace::now_ns(),
            timeout: settings.timeout,
        })
    }

    async fn export(&mut self) -> Result<(), String> {
        let metrics = metrics::to_otlp(self.resource.clone(), self.start_ns);
        let message = ExportMetricsServiceRequest { resource_metrics: vec![metrics] };
        match &mut self.transport {
            Transport::Grpc(client, metadata) => {
                let mut request = tonic::Request::new(message);
                *request.metadata_mut() = metadata.clone();
                client.export(request).await.map_err(|status| status.message().to_owned())?;
            }
            Transport::Http(client, uri, headers) => {
                let mut request = http::Request::post(uri.clone())
                    .header(http::header::CONTENT_TYPE, "application/x-protobuf");
                for (key, value) in headers {
                    request = request.header(key.as_str(), value.as_str());
                }
                let request = request.body(message.encode_to_vec().into());
                let request = request.map_err(|error| error.to_string())?;
                let answer = client.send_bytes(request).await.map_err(|error| error.to_string())?;
                if !answer.status().is_success() {
                    return Err(answer.status().to_string());
                }
            }
        }
        Ok(())
    }
}

fn metadata(headers: &[(String, String)]) -> Result<MetadataMap, String> {
    let mut metadata = MetadataMap::new();
    for (key, value) in headers {
        let bad = || format!("OTEL_EXPORTER_OTLP_HEADERS: `{key}` cannot be sent");
        let key = MetadataKey::from_bytes(key.as_bytes()).map_err(|_| bad())?;
        let value = MetadataValue::try_from(value.as_str()).map_err(|_| bad())?;
        metadata.insert(key, value);
    }
    Ok(metadata)
}

/// Exports at each interval, and when asked to.
pub(super) async fn run(mut target: Target, interval: Duration, mut flush: Flush) {
    let mut is_away = false;
    loop {
        let asked = match tokio::time::timeout(interval, flush.recv()).await {
            Ok(None) => return,
            Ok(Some(done)) => Some(done),
            Err(_) => None,
        };
        let timeout = target.timeout;
        let outcome = tokio::time::timeout(timeout, target.export()).await;
        let outcome = outcome.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        note(outcome, 0, &METRICS, "metrics", &mut is_away);
        if let Some(done) = asked {
            // Who asked may have given up.
            let _ = done.send(());
        }
    }
}
