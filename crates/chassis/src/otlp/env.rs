//! The variables of the OpenTelemetry specification that are heeded here; those of the transport
//! (headers, timeout, protocol) are read by the exporters themselves.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

use super::Batching;
use crate::trace::Sampler;

/// What is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
            Self::Logs => "LOGS",
        }
    }
}

/// Everything that the variables say.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    on: Vec<Signal>,
    /// Of metrics, whose exporter is our own.
    pub(crate) endpoint: String,
    pub(crate) is_grpc: bool,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) timeout: Duration,
    pub(crate) interval: Duration,
    pub(crate) spans: Batching,
    pub(crate) logs: Batching,
    pub(crate) resource: Resource,
    /// `None`: the configuration decides.
    pub(crate) sampler: Option<Sampler>,
}

impl Settings {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// A value that cannot be used, with its name.
    pub(crate) fn from_env(service: &str) -> Result<Self, String> {
        Self::read(service, &|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    pub(crate) fn read(
        service: &str,
        get: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let is_off = get("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let of = |signal: Signal, what: &str| {
            get(&format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.name()))
                .or_else(|| get(&format!("OTEL_EXPORTER_OTLP_{what}")))
        };
        let is_on = |signal: &Signal| {
            let exporter = get(&format!("OTEL_{}_EXPORTER", signal.name()));
            let is_wanted = exporter.is_none_or(|exporter| exporter == "otlp");
            !is_off && is_wanted && of(*signal, "ENDPOINT").is_some()
        };
        let all = [Signal::Traces, Signal::Metrics, Signal::Logs];
        let on: Vec<Signal> = all.into_iter().filter(is_on).collect();
        let is_grpc = match of(Signal::Metrics, "PROTOCOL").as_deref() {
            Some("grpc") => true,
            None | Some("http/protobuf") => false,
            Some(other) => return Err(format!("OTEL_EXPORTER_OTLP_PROTOCOL: `{other}`")),
        };
        let ms = |name: &str, default| number(get, name, default).map(Duration::from_millis);
        let own = get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT");
        let common = get("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default();
        let endpoint = own.unwrap_or_else(|| match is_grpc {
            true => common,
            false => format!("{}/v1/metrics", common.trim_end_matches('/')),
        });
        // A write has a dozen spans: the specification's 2,048 would be full after a few ms.
        let spans = batching(get, "OTEL_BSP", 65_536, 5_000)?;
        let logs = batching(get, "OTEL_BLRP", 4_096, 1_000)?;
        Ok(Self {
            on,
            endpoint,
            is_grpc,
            headers: headers(&of(Signal::Metrics, "HEADERS").unwrap_or_default()),
            timeout: ms("OTEL_EXPORTER_OTLP_TIMEOUT", 10_000)?,
            interval: ms("OTEL_METRIC_EXPORT_INTERVAL", 60_000)?.max(Duration::from_millis(10)),
            spans,
            logs,
            resource: resource(service, get),
            sampler: if is_off { None } else { sampler(get)? },
        })
    }

    pub(crate) fn is_on(&self, signal: Signal) -> bool {
        self.on.contains(&signal)
    }

    pub(crate) fn is_any_on(&self) -> bool {
        !self.on.is_empty()
    }
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str, default: u64) -> Result<u64, String> {
    let Some(text) = get(name) else { return Ok(default) };
    text.trim().parse().map_err(|_| format!("{name}: `{text}` is no number"))
}

fn batching(
    get: &dyn Fn(&str) -> Option<String>,
    prefix: &str,
    queue: u64,
    delay_ms: u64,
) -> Result<Batching, String> {
    let at = |what: &str, default| number(get, &format!("{prefix}_{what}"), default);
    let size = |count: u64| usize::try_from(count.clamp(1, 1 << 20)).unwrap_or(1 << 20);
    let queue_max = size(at("MAX_QUEUE_SIZE", queue)?);
    Ok(Batching {
        queue_max,
        batch_max: size(at("MAX_EXPORT_BATCH_SIZE", 512)?).min(queue_max),
        delay: Duration::from_millis(at("SCHEDULE_DELAY", delay_ms)?.max(1)),
        timeout: Duration::from_millis(at("EXPORT_TIMEOUT", 30_000)?.max(1)),
    })
}

/// `key=value` pairs, separated by commas.
fn headers(text: &str) -> Vec<(String, String)> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        Some((key.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    text.split(',').filter_map(pair).collect()
}

fn resource(service: &str, get: &dyn Fn(&str) -> Option<String>) -> Resource {
    let attributes = get("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let mut resource = Resource::builder_empty().with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", format!("{:016x}", rand::random::<u64>())),
        KeyValue::new("process.pid", i64::from(std::process::id())),
        KeyValue::new("service.name", service.to_owned()),
    ]);
    for pair in attributes.split(',') {
        if let Some((key, value)) = pair.split_once('=') {
            let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
            resource = resource.with_attribute(KeyValue::new(key, value));
        }
    }
    if let Some(name) = get("OTEL_SERVICE_NAME") {
        resource = resource.with_attribute(KeyValue::new("service.name", name));
    }
    resource.build()
}

fn sampler(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Sampler>, String> {
    let Some(name) = get("OTEL_TRACES_SAMPLER") else { return Ok(None) };
    let ratio = || match get("OTEL_TRACES_SAMPLER_ARG") {
        None => Ok(1.0),
        Some(text) => match text.trim().parse::<f64>() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
            _ => Err(format!("OTEL_TRACES_SAMPLER_ARG: `{text}` is no share of 0.0 to 1.0")),
        },
    };
    Ok(Some(match name.as_str() {
        "always_on" => Sampler::Ratio(1.0),
        "always_off" => Sampler::Ratio(0.0),
        "traceidratio" => Sampler::Ratio(ratio()?),
        "parentbased_always_on" => Sampler::ParentOrRatio(1.0),
        "parentbased_always_off" => Sampler::ParentOrRatio(0.0),
        "parentbased_traceidratio" => Sampler::ParentOrRatio(ratio()?),
        other => return Err(format!("OTEL_TRACES_SAMPLER: `{other}` is not known")),
    }))
}
