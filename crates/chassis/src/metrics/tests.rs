#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn the_same_name_and_labels_are_the_same_metric() {
    let registry = Registry::default();
    registry.counter("calls", &[("lane", "direct")]).add(2);
    registry.clone().counter("calls", &[("lane", "direct")]).inc();
    registry.counter("calls", &[("lane", "buffered")]).inc();
    registry.gauge("depth", &[]).set(-4);
    let text = "calls{lane=\"buffered\"} 1\ncalls{lane=\"direct\"} 3\ndepth -4\n";
    assert_eq!(registry.text(), text);
}

#[test]
fn a_name_of_another_kind_is_not_overwritten() {
    let registry = Registry::default();
    registry.counter("calls", &[]).inc();
    registry.gauge("calls", &[]).set(9);
    assert_eq!(registry.text(), "calls 1\n");
}

#[test]
fn a_histogram_counts_by_powers_of_two() {
    let registry = Registry::default();
    let latency = registry.histogram("latency", &[("op", "write")]);
    for us in [0, 1, 2, 3, 4] {
        latency.record(Duration::from_micros(us));
    }
    latency.record(Duration::MAX);
    let reading = &registry.read()["latency{op=\"write\"}"];
    let Reading::Histogram { count, buckets, .. } = reading else { panic!("{reading:?}") };
    assert_eq!(*count, 6);
    assert_eq!(buckets[..4], [1, 1, 2, 1]);
    assert_eq!(buckets.len(), HISTOGRAM_BUCKETS);
    assert!(registry.text().starts_with("latency_count{op=\"write\"} 6\n"));
    serde_json::to_string(&registry.read()).unwrap();
}
