#![allow(clippy::unwrap_used)]

use tracing::subscriber::with_default;
use tracing::{info_span, trace_span};

use super::*;
use crate::recorder::{RecordedSpan, SpanQuery};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const PARENT_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// Runs under a subscriber of its own, so that tests do not see each other's spans.
fn recorded(config: RecorderConfig, ratio: f64, body: impl FnOnce()) -> Recorder {
    let recorder = Recorder::new(config);
    let subscriber = tracing_subscriber::registry().with(span_layer(ratio, recorder.clone()));
    with_default(subscriber, body);
    recorder
}

fn all(recorder: &Recorder) -> Vec<RecordedSpan> {
    recorder.query(&SpanQuery { limit: 10_000, ..Default::default() })
}

fn names(spans: &[RecordedSpan]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

macro_rules! write_span {
    ($($field:tt)*) => {
        info_span!(target: "endio_writeback::front", "write", $($field)*)
    };
}

#[test]
fn a_traceparent_round_trips_into_a_child_of_the_same_trace() {
    let mut sent = String::new();
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        let root = write_span!(volume = "v");
        sent = traceparent(&root);
        let remote = info_span!(target: "endio_block_store", "segment", segment = 3u32);
        set_parent(&remote, &sent);
        remote.in_scope(|| info_span!(target: "endio_block_store", "flush").in_scope(|| ()));
    });
    let trace_id = sent.split('-').nth(1).unwrap().to_owned();
    let spans = recorder.query(&SpanQuery { trace_id, ..Default::default() });
    assert_eq!(names(&spans), ["write", "segment", "flush"]);
    assert_eq!(spans[0].parent_span_id, "");
    assert_eq!(spans[1].parent_span_id, spans[0].span_id);
    assert_eq!(spans[2].parent_span_id, spans[1].span_id);
    assert_eq!(spans[1].attributes["segment"], "3");
    let services: Vec<_> = spans.iter().map(|span| span.service.as_str()).collect();
    assert_eq!(services, ["writeback", "block-store", "block-store"]);
}

#[test]
fn a_parent_that_cannot_be_read_is_ignored() {
    let bad = [
        "",
        "00",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        "00-0af7651916cd43dd8448eb211c8031ü-b7ad6b7169203331-01",
    ];
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        for text in bad {
            let span = write_span!(volume = "v");
            set_parent(&span, text);
            link(&span, text);
        }
    });
    let spans = all(&recorder);
    assert_eq!(spans.len(), bad.len());
    assert!(spans.iter().all(|s| s.parent_span_id.is_empty() && s.links.is_empty()));
    assert!(parse(PARENT).is_some());
}

#[test]
fn a_link_names_the_other_trace() {
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        let span = info_span!(target: "endio_conversion", "convert");
        link(&span, PARENT);
    });
    assert_eq!(all(&recorder)[0].links, [PARENT_TRACE]);
}

#[test]
fn only_spans_of_our_crates_are_recorded() {
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        let rpc = info_span!(target: "endio_chassis::server", "call").entered();
        let h2 = info_span!(target: "h2::client", "frame").entered();
        write_span!(volume = "v").in_scope(|| ());
        trace_span!(target: "endio_writeback", "noise").in_scope(|| ());
        drop((h2, rpc));
    });
    assert_eq!(names(&all(&recorder)), ["write"]);
    assert_eq!(all(&recorder)[0].parent_span_id, "", "a span of the chassis is no parent");
}

#[test]
fn a_trace_that_is_not_sampled_costs_no_memory_and_tells_no_parent() {
    let recorder = recorded(RecorderConfig::default(), 0.0, || {
        let span = write_span!(volume = "v");
        assert_eq!(traceparent(&span), "");
    });
    assert!(recorder.is_empty());
}

#[test]
fn the_callers_sampling_decision_goes_before_the_ratio() {
    let unsampled = format!("{}00", &PARENT[..PARENT.len() - 2]);
    let recorder = recorded(RecorderConfig::default(), 0.0, || {
        set_parent(&write_span!(volume = "v"), PARENT);
    });
    assert_eq!(all(&recorder)[0].trace_id, PARENT_TRACE);
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        set_parent(&write_span!(volume = "v"), &unsampled);
    });
    assert!(recorder.is_empty());
}

#[test]
fn without_a_subscriber_the_helpers_do_nothing() {
    with_default(tracing::subscriber::NoSubscriber::default(), || {
        let span = write_span!(volume = "v");
        set_parent(&span, PARENT);
        link(&span, PARENT);
        fail(&span, "no");
        assert_eq!(traceparent(&span), "");
        let mut metadata = MetadataMap::new();
        inject(&span, &mut metadata);
        assert!(metadata.is_empty());
    });
}

#[test]
fn a_failed_span_tells_why() {
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        let span = write_span!(volume = "v");
        fail(&span, "disk full");
        drop(span);
        let span = write_span!(error = tracing::field::Empty);
        span.record("error", "late");
    });
    let errors: Vec<_> = all(&recorder).into_iter().map(|span| span.error).collect();
    assert_eq!(errors, ["disk full", "late"]);
}

#[test]
fn metadata_carries_the_parent() {
    recorded(RecorderConfig::default(), 1.0, || {
        let span = write_span!(volume = "v");
        let mut metadata = MetadataMap::new();
        assert_eq!(remote_parent(&metadata), "");
        inject(&span, &mut metadata);
        assert_eq!(remote_parent(&metadata), traceparent(&span));
    });
}

#[test]
fn queries_filter_by_volume_offset_io_end_service_and_roots() {
    let recorder = recorded(RecorderConfig::default(), 1.0, || {
        for io_end in 1..=3u64 {
            let write = write_span!(volume = "v", offset = io_end * 4096, length = 4096u64, io_end);
            let _entered = write.entered();
            info_span!(target: "endio_conversion", "begin", io_end).in_scope(|| ());
        }
        write_span!(volume = "w", offset = 4096u64, length = 4096u64, io_end = 9u64);
    });
    let ask = |query: SpanQuery| {
        let spans = recorder.query(&query);
        spans.iter().map(|s| s.attributes["io_end"].parse().unwrap()).collect::<Vec<u64>>()
    };
    let v = || SpanQuery { volume: "v".to_owned(), ..Default::default() };
    assert_eq!(ask(SpanQuery { roots_only: true, ..Default::default() }), [9, 3, 2, 1]);
    assert_eq!(ask(SpanQuery { roots_only: true, limit: 2, ..Default::default() }), [9, 3]);
    assert_eq!(ask(v()), [1, 2, 3]);
    assert_eq!(ask(SpanQuery { limit: 1, ..v() }), [3], "a limit keeps the newest");
    for (offset, expected) in
        [(4095, None), (4096, Some(1)), (8191, Some(1)), (8192, Some(2)), (16384, None)]
    {
        let found = ask(SpanQuery { offset_bytes: Some(offset), ..v() });
        assert_eq!(found, Vec::from_iter(expected), "offset {offset}");
    }
    assert_eq!(ask(SpanQuery { io_end: 2, ..Default::default() }), [2, 2]);
    let service = "conversion".to_owned();
    assert_eq!(ask(SpanQuery { service, ..Default::default() }), [1, 2, 3]);
    assert!(ask(SpanQuery { trace_id: "no hex".to_owned(), ..Default::default() }).is_empty());
}

#[test]
fn the_oldest_traces_make_room_and_are_counted() {
    let config = RecorderConfig { spans_max: 3, ..Default::default() };
    let recorder = recorded(config, 1.0, || {
        for io_end in 1..=5u64 {
            write_span!(io_end);
        }
    });
    let io_ends: Vec<_> = all(&recorder).iter().map(|s| s.attributes["io_end"].clone()).collect();
    assert_eq!(io_ends, ["3", "4", "5"]);
    assert_eq!((recorder.dropped(), recorder.len()), (2, 3));
}

#[test]
fn slow_failed_and_retried_traces_outlive_others() {
    let config = RecorderConfig { spans_max: 8, slow_ms: 50, ..Default::default() };
    let recorder = recorded(config, 1.0, || {
        let slow = write_span!(io_end = 100u64);
        std::thread::sleep(Duration::from_millis(60));
        drop(slow);
        fail(&write_span!(io_end = 101u64), "EIO");
        write_span!(io_end = 102u64, attempt = 2u64);
        for io_end in 1..=50u64 {
            write_span!(io_end, attempt = 1u64);
        }
    });
    let io_ends: Vec<_> = all(&recorder).iter().map(|s| s.attributes["io_end"].clone()).collect();
    assert_eq!(io_ends, ["100", "101", "102", "46", "47", "48", "49", "50"]);
}

#[test]
fn notable_traces_leave_room_for_new_ones() {
    let config = RecorderConfig { spans_max: 8, ..Default::default() };
    let recorder = recorded(config, 1.0, || {
        for io_end in 1..=50u64 {
            fail(&write_span!(io_end), "EIO");
        }
        write_span!(io_end = 51u64);
        write_span!(io_end = 52u64);
    });
    let io_ends: Vec<_> = all(&recorder).iter().map(|s| s.attributes["io_end"].clone()).collect();
    assert_eq!(io_ends, ["45", "46", "47", "48", "49", "50", "51", "52"]);
}

#[test]
fn the_bound_in_bytes_holds_for_large_attributes_and_for_one_huge_trace() {
    let config = RecorderConfig { bytes_max: 64 << 10, ..Default::default() };
    let text = "x".repeat(10 << 10);
    let recorder = recorded(config.clone(), 1.0, || {
        for _ in 0..20 {
            write_span!(volume = text.as_str());
        }
    });
    assert!((1..=6).contains(&recorder.len()), "{}", recorder.len());
    let recorder = recorded(config, 1.0, || {
        let _root = write_span!(volume = "v").entered();
        for _ in 0..20 {
            write_span!(volume = text.as_str());
        }
    });
    // Six large spans and the small root fit at most.
    assert!(recorder.len() <= 7, "{}", recorder.len());
    assert_eq!(recorder.len() as u64 + recorder.dropped(), 21);
}

#[test]
fn init_is_idempotent_and_gives_the_same_recorder() {
    let first = init(&TelemetryConfig::default()).unwrap();
    let second = init(&TelemetryConfig::default()).unwrap();
    write_span!(volume = "init");
    let query = SpanQuery { volume: "init".to_owned(), ..Default::default() };
    assert_eq!(first.query(&query).len(), 1);
    assert_eq!(second.query(&query).len(), 1);
}

#[test]
fn a_filter_that_cannot_be_read_is_refused() {
    let config = TelemetryConfig { log_filter: "a=b=c".to_owned(), ..Default::default() };
    assert!(matches!(log_filter(&config), Err(TelemetryError::Filter { .. })));
}
