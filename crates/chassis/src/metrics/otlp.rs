//! Metrics as OTLP messages.

use opentelemetry_proto::tonic::common::v1::{
    AnyValue, InstrumentationScope, KeyValue, any_value::Value,
};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Exemplar, Gauge, Histogram, HistogramDataPoint, Metric,
    NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, exemplar, metric::Data, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;

use super::{HISTOGRAM_BUCKETS, Key, Number, Series, Snapshot, SnapshotFamily};
use crate::trace;

/// All exposed metrics of the process, cumulative since `start_ns`.
#[must_use]
pub fn to_otlp(resource: Resource, start_ns: u64) -> ResourceMetrics {
    let snapshot = Snapshot::take();
    let now_ns = trace::now_ns();
    let times = (start_ns, now_ns);
    let metrics = snapshot.families.iter().map(|(name, family)| metric(name, family, times));
    let scope = InstrumentationScope {
        name: "endio".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    ResourceMetrics {
        resource: Some(resource),
        scope_metrics: vec![ScopeMetrics {
            scope: Some(scope),
            metrics: metrics.collect(),
            schema_url: String::new(),
        }],
        schema_url: String::new(),
    }
}

fn metric(name: &str, family: &SnapshotFamily, times: (u64, u64)) -> Metric {
    let unit = match name {
        _ if name.ends_with("_seconds") => "s",
        _ if name.contains("_bytes") => "By",
        _ => "1",
    };
    let is_histogram = family.series.values().any(|series| series.value.is_none());
    let is_counter =
        family.series.values().any(|series| matches!(series.value, Some(Number::Counter(_))));
    let temporality = AggregationTemporality::Cumulative.into();
    let numbers = || family.series.iter().filter_map(|(key, s)| number(key, s, times)).collect();
    let data = if is_histogram {
        let points = family.series.iter().map(|(key, series)| histogram(key, series, times));
        let data_points = points.collect();
        Data::Histogram(Histogram { data_points, aggregation_temporality: temporality })
    } else if is_counter {
        let data_points = numbers();
        Data::Sum(Sum { data_points, aggregation_temporality: temporality, is_monotonic: true })
    } else {
        Data::Gauge(Gauge { data_points: numbers() })
    };
    Metric {
        name: name.to_owned(),
        description: family.help.to_owned(),
        unit: unit.to_owned(),
        metadata: Vec::new(),
        data: Some(data),
    }
}

fn number(key: &Key, series: &Series, (start_ns, now_ns): (u64, u64)) -> Option<NumberDataPoint> {
    let value = match series.value? {
        Number::Counter(value) => i64::try_from(value).unwrap_or(i64::MAX),
        Number::Gauge(value) => value,
    };
    Some(NumberDataPoint {
        attributes: attributes(key),
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        exemplars: Vec::new(),
        flags: 0,
        value: Some(number_data_point::Value::AsInt(value)),
    })
}

fn histogram(key: &Key, series: &Series, (start_ns, now_ns): (u64, u64)) -> HistogramDataPoint {
    let seconds = |us: u64| us as f64 / 1e6;
    let exemplars = series.exemplars.values().map(|exemplar| Exemplar {
        filtered_attributes: Vec::new(),
        time_unix_nano: exemplar.unix_ns,
        span_id: exemplar.context.span.to_be_bytes().to_vec(),
        trace_id: exemplar.context.trace.to_be_bytes().to_vec(),
        value: Some(exemplar::Value::AsDouble(seconds(exemplar.us))),
    });
    HistogramDataPoint {
        attributes: attributes(key),
        start_time_unix_nano: start_ns,
        time_unix_nano: now_ns,
        count: series.buckets.iter().sum(),
        sum: Some(seconds(series.sum_us)),
        bucket_counts: series.buckets.clone(),
        explicit_bounds: (0..HISTOGRAM_BUCKETS - 1).map(|at| seconds(1 << at)).collect(),
        exemplars: exemplars.collect(),
        flags: 0,
        min: None,
        max: None,
    }
}

fn attributes(key: &Key) -> Vec<KeyValue> {
    let value = |text: &str| AnyValue { value: Some(Value::StringValue(text.to_owned())) };
    let pair = |(name, text): &(&str, std::borrow::Cow<'_, str>)| KeyValue {
        key: (*name).to_owned(),
        value: Some(value(text)),
        ..KeyValue::default()
    };
    key.iter().map(pair).collect()
}
