#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn the_same_name_and_labels_are_the_same_metric() {
    let registry = Registry::default();
    registry.counter("calls_total", "Calls", &[("lane", "direct")]).add(2);
    registry.clone().counter("calls_total", "Calls", &[("lane", "direct")]).inc();
    registry.counter("calls_total", "Calls", &[("lane", "buffered")]).inc();
    registry.gauge("depth", "Depth", &[]).set(-4);
    let text = "# HELP calls Calls\n# TYPE calls counter\n\
        calls_total{lane=\"buffered\"} 1\ncalls_total{lane=\"direct\"} 3\n\
        # HELP depth Depth\n# TYPE depth gauge\ndepth -4\n# EOF\n";
    assert_eq!(Snapshot::of(&registry).render(Form::OpenMetrics), text);
    let read = registry.read();
    assert_eq!(read["calls_total{lane=\"direct\"}"], Reading::Counter(3));
}

#[test]
fn a_name_of_another_kind_is_not_overwritten() {
    let registry = Registry::default();
    registry.counter("calls", "", &[]).inc();
    registry.gauge("calls", "", &[]).set(9);
    assert_eq!(registry.read()["calls"], Reading::Counter(1));
}

#[test]
fn a_histogram_counts_by_powers_of_two() {
    let registry = Registry::default();
    let latency = registry.histogram("latency_seconds", "Latency", &[("op", "write")]);
    for us in [0, 1, 2, 3, 4] {
        latency.record(Duration::from_micros(us));
    }
    latency.record(Duration::MAX);
    let reading = &registry.read()["latency_seconds{op=\"write\"}"];
    let Reading::Histogram { count, buckets, .. } = reading else { panic!("{reading:?}") };
    assert_eq!(*count, 6);
    assert_eq!(buckets[..4], [1, 1, 2, 1]);
    assert_eq!(buckets.len(), HISTOGRAM_BUCKETS);
    let text = Snapshot::of(&registry).render(Form::Prometheus);
    let has = |line: &str| assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    has("# TYPE latency_seconds histogram");
    has("latency_seconds_bucket{op=\"write\",le=\"0.000002\"} 2");
    has("latency_seconds_bucket{op=\"write\",le=\"0.000004\"} 4");
    has("latency_seconds_bucket{op=\"write\",le=\"67.108864\"} 5");
    has("latency_seconds_bucket{op=\"write\",le=\"+Inf\"} 6");
    has("latency_seconds_count{op=\"write\"} 6");
}

#[test]
fn an_exemplar_names_the_trace_in_openmetrics_only() {
    let registry = Registry::default();
    let latency = registry.histogram("latency_seconds", "Latency", &[]);
    let context = |is_sampled| Context { trace: 0xab, span: 0xcd, is_sampled };
    latency.record_of(Duration::from_micros(5), Some(context(false)));
    let is_exemplar = |line: &&str| line.contains(" # {trace_id=");
    let text = Snapshot::of(&registry).render(Form::OpenMetrics);
    assert_eq!(text.lines().filter(is_exemplar).count(), 0, "the trace is not recorded");
    latency.record_of(Duration::from_micros(5), Some(context(true)));
    let snapshot = Snapshot::of(&registry);
    let text = snapshot.render(Form::OpenMetrics);
    let line = text.lines().find(is_exemplar).unwrap();
    let expected = "latency_seconds_bucket{le=\"0.000008\"} 2 # {trace_id=\"\
        000000000000000000000000000000ab\",span_id=\"00000000000000cd\"} 0.000005 ";
    assert!(line.starts_with(expected), "{line}");
    assert!(!snapshot.render(Form::Prometheus).contains("trace_id"));
}

#[test]
fn members_that_are_gone_are_not_shown_any_more() {
    let registry = Registry::default();
    let show = |members: &[(&str, i64)]| {
        let members = members.iter().map(|(id, n)| (vec![("store", (*id).to_owned())], *n));
        registry.set_members("free_bytes", "Free", members);
        registry.read().into_keys().collect::<Vec<_>>()
    };
    assert_eq!(show(&[("1", 5), ("2", 6)]).len(), 2);
    assert_eq!(show(&[("2", 6)]), ["free_bytes{store=\"2\"}"]);
}

#[test]
fn what_is_read_from_is_asked_before_each_reading_until_it_is_gone() {
    let registry = Registry::default();
    let gauge = registry.gauge("depth", "Depth", &[]);
    registry.before_reading(move || {
        gauge.add(1);
        gauge.value() < 2
    });
    for expected in [1, 2, 2] {
        assert_eq!(registry.read()["depth"], Reading::Gauge(expected));
    }
}

#[test]
fn a_registry_is_shown_until_it_is_dropped() {
    let registry = Registry::default();
    registry.counter("of_this_test_total", "Test", &[]).add(3);
    registry.expose();
    assert!(render(Form::OpenMetrics).contains("of_this_test_total 3\n"));
    drop(registry);
    assert!(!render(Form::OpenMetrics).contains("of_this_test_total"));
}
