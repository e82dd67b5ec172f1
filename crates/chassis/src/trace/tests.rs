#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::sync::Arc;

use super::*;
use crate::recorder::{RecordedSpan, Recorder, RecorderConfig, SpanQuery};
use crate::telemetry::{self, TelemetryConfig};

const FRONT: Tracer = Tracer::new("writeback");
const BACK: Tracer = Tracer::new("block-store");

/// The process's recorder: nothing is sampled unless a caller says so, and only minutes are slow.
pub(crate) fn recorder() -> Recorder {
    let trace = TraceConfig { ratio: 0.0, slow_ms: 60_000, ..TraceConfig::default() };
    let config = TelemetryConfig { trace, ..TelemetryConfig::default() };
    telemetry::init(&config, "endio-test").unwrap()
}

fn caller(trace: u128, is_sampled: bool) -> String {
    Context { trace, span: 0xb7, is_sampled }.traceparent()
}

fn spans(trace: u128) -> Vec<RecordedSpan> {
    recorder().query(&SpanQuery { trace_id: format!("{trace:032x}"), ..SpanQuery::default() })
}

fn names(spans: &[RecordedSpan]) -> Vec<&str> {
    let mut names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// A write over two services; returns the traceparent that the other one got.
fn write(parent: &str, end: impl FnOnce(&Span)) -> String {
    let root = FRONT.entry("write", parent).with("volume", "v").with("length", 4096_u64);
    let begin = FRONT.child(&root, "begin").with("io_end", 7_u64);
    drop(begin);
    let segment = FRONT.child(&root, "segment");
    let sent = segment.traceparent();
    let remote = BACK.leg("segment", &sent).with("store", 1_u32);
    remote.phase("wait");
    remote.phase("flush");
    drop((remote, segment));
    end(&root);
    sent
}

#[test]
fn a_sampled_trace_is_one_tree_over_all_services() {
    let _recorder = recorder();
    let trace = 0xa1;
    write(&caller(trace, true), |_| ());
    let spans = spans(trace);
    assert_eq!(names(&spans), ["begin", "flush", "segment", "segment", "wait", "write"]);
    let ids: HashSet<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    assert_eq!(ids.len(), spans.len());
    for span in &spans {
        let is_root = span.name == "write";
        assert_eq!(span.parent_span_id == format!("{:016x}", 0xb7), is_root, "{span:?}");
        assert!(is_root || ids.contains(span.parent_span_id.as_str()), "{span:?}");
    }
    let services: HashSet<&str> = spans.iter().map(|span| span.service.as_str()).collect();
    assert_eq!(services, HashSet::from(["writeback", "block-store"]));
    let flush = spans.iter().find(|span| span.name == "flush").unwrap();
    assert_eq!(flush.attributes["store"], "1", "a phase has the attributes that name its place");
}

#[test]
fn an_unsampled_trace_leaves_nothing() {
    let _recorder = recorder();
    let trace = 0xa2;
    write(&caller(trace, false), |_| ());
    assert_eq!(spans(trace), []);
}

#[test]
fn an_unsampled_trace_that_failed_is_kept_whole() {
    let _recorder = recorder();
    let trace = 0xa3;
    write(&caller(trace, false), |root| root.fail("disk full"));
    let spans = spans(trace);
    assert_eq!(names(&spans), ["begin", "flush", "segment", "segment", "wait", "write"]);
    let root = spans.iter().find(|span| span.name == "write").unwrap();
    assert_eq!((root.error.as_str(), root.attributes["kept"].as_str()), ("disk full", "failed"));
}

#[test]
fn an_unsampled_trace_that_was_slow_is_kept_whole() {
    let _recorder = recorder();
    let trace = 0xa4;
    write(&caller(trace, false), |root| root.began_earlier(60_000_000_000));
    assert_eq!(spans(trace).len(), 6);
    let almost = 0xa5;
    write(&caller(almost, false), |root| root.began_earlier(50_000_000_000));
    assert_eq!(spans(almost), []);
}

#[test]
fn what_follows_an_aborted_attempt_is_sampled_in_all_services() {
    let _recorder = recorder();
    let trace = 0xa6;
    let mut later = String::new();
    let first = write(&caller(trace, false), |root| {
        root.keep(Why::Retried);
        later = root.traceparent();
    });
    assert!(!Context::says_sampled(&first) && Context::says_sampled(&later));
    drop(BACK.leg("segment", &later));
    assert_eq!(spans(trace).len(), 7);
}

#[test]
fn a_leg_that_failed_is_kept_before_anybody_asks() {
    let _recorder = recorder();
    let trace = 0xa7;
    BACK.leg("segment", &caller(trace, false)).fail("EIO");
    assert_eq!(names(&spans(trace)), ["segment"]);
}

#[test]
fn a_leg_is_remembered_until_its_trace_is_kept() {
    let _recorder = recorder();
    let trace = 0xa8;
    drop(BACK.leg("segment", &caller(trace, false)));
    assert_eq!(spans(trace), []);
    assert_eq!(keep(&HashSet::from([trace])), 1);
    assert_eq!(keep(&HashSet::from([trace])), 0);
    assert_eq!(names(&spans(trace)), ["segment"]);
}

#[test]
fn a_batch_links_the_sampled_traces_it_serves() {
    let recorder = recorder();
    let served = |trace, is_sampled| Context { trace, span: 1, is_sampled };
    drop(BACK.batch("convert_batch", [served(0xa9, true), served(0xaa, false)].into_iter()));
    drop(BACK.batch("unsampled_batch", [served(0xab, false)].into_iter()));
    let all = recorder.query(&SpanQuery { limit: 10_000, ..SpanQuery::default() });
    let batch = all.iter().find(|span| span.name == "convert_batch").unwrap();
    assert_eq!(batch.links, [format!("{:032x}", 0xa9)]);
    assert!(!all.iter().any(|span| span.name == "unsampled_batch"));
}

#[tokio::test]
async fn log_lines_inside_a_scope_belong_to_its_span() {
    let _recorder = recorder();
    let trace = 0xac;
    let outer = FRONT.entry("write", &caller(trace, true));
    let inner = FRONT.child(&outer, "begin");
    let inner_context = inner.context();
    let seen = outer.clone().scope(async {
        let before = current_context();
        tokio::task::yield_now().await;
        let inside = inner.scope(async { current_context() }).await;
        (before, inside, current_context())
    });
    assert_eq!(seen.await, (outer.context(), inner_context, outer.context()));
    assert_eq!(current_context(), None);
}

#[test]
fn a_traceparent_that_cannot_be_read_names_no_parent() {
    let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    assert_eq!(Context::parse(good).unwrap().traceparent(), good);
    assert!(Context::parse(&format!("01{}-more", &good[2..])).is_some());
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
    for text in bad {
        assert_eq!(Context::parse(text), None, "{text}");
    }
}

fn store(config: RecorderConfig, spans: impl IntoIterator<Item = Record>) -> Recorder {
    let recorder = Recorder::new(config);
    spans.into_iter().for_each(|span| recorder.record(Arc::new(span)));
    recorder
}

fn span(trace: u128, start_ns: u64, attributes: &[(&'static str, u64)]) -> Record {
    let context = Context { trace, span: context::new_id(), is_sampled: true };
    let mut span = Record::new("writeback", "write", context, start_ns);
    attributes.iter().for_each(|(key, value)| span.set(key, (*value).into()));
    span
}

fn io_ends(recorder: &Recorder, query: SpanQuery) -> Vec<u64> {
    let spans = recorder.query(&SpanQuery { limit: query.limit.max(1_000), ..query });
    spans.iter().map(|span| span.attributes["io_end"].parse().unwrap()).collect()
}

#[test]
fn queries_filter_by_volume_offset_io_end_service_and_roots() {
    let mut all = Vec::new();
    for io_end in 1..=3 {
        let place = [("offset", io_end * 4096), ("length", 4096), ("io_end", io_end)];
        let mut write = span(io_end.into(), io_end, &place);
        write.set("volume", "v".into());
        let mut begin = span(io_end.into(), io_end, &[("io_end", io_end)]);
        (begin.parent, begin.service) = (write.context.span, "conversion");
        all.extend([write, begin]);
    }
    let recorder = store(RecorderConfig::default(), all);
    let ask = |query| io_ends(&recorder, query);
    assert_eq!(ask(SpanQuery { roots_only: true, ..SpanQuery::default() }), [3, 2, 1]);
    let volume = || SpanQuery { volume: "v".to_owned(), ..SpanQuery::default() };
    assert_eq!(ask(volume()), [1, 2, 3]);
    for (offset, found) in [(4095, vec![]), (4096, vec![1]), (8191, vec![1]), (16384, vec![])] {
        assert_eq!(ask(SpanQuery { offset_bytes: Some(offset), ..volume() }), found, "{offset}");
    }
    assert_eq!(ask(SpanQuery { io_end: 2, ..SpanQuery::default() }), [2, 2]);
    let service = "conversion".to_owned();
    assert_eq!(ask(SpanQuery { service, ..SpanQuery::default() }), [1, 2, 3]);
    let trace_id = "no hex".to_owned();
    assert_eq!(recorder.query(&SpanQuery { trace_id, ..SpanQuery::default() }), []);
}

#[test]
fn the_oldest_traces_make_room_and_notable_ones_outlive_them() {
    let config = || RecorderConfig { spans_max: 8, slow_ms: 50, ..RecorderConfig::default() };
    let mut slow = span(100, 0, &[("io_end", 100)]);
    slow.end(60_000_000);
    let mut failed = span(101, 0, &[("io_end", 101)]);
    failed.error = Some("EIO".into());
    let retried = span(102, 0, &[("io_end", 102), ("attempt", 2)]);
    let fast = (1..=50).map(|n| span(n, n as u64, &[("io_end", n as u64), ("attempt", 1)]));
    let recorder = store(config(), [slow, failed, retried].into_iter().chain(fast));
    let mut left = io_ends(&recorder, SpanQuery::default());
    left.sort_unstable();
    assert_eq!(left, [46, 47, 48, 49, 50, 100, 101, 102]);
    assert_eq!((recorder.len(), recorder.dropped()), (8, 45));
    let failed = (1..=50).map(|n| {
        let mut span = span(n, n as u64, &[("io_end", n as u64)]);
        span.error = Some("EIO".into());
        span
    });
    let recorder = store(config(), failed.chain([span(60, 60, &[("io_end", 60)])]));
    let left = io_ends(&recorder, SpanQuery::default());
    assert_eq!(left, [44, 45, 46, 47, 48, 49, 50, 60], "notable ones leave room for new ones");
}

#[test]
fn the_bound_in_bytes_holds() {
    let config = || RecorderConfig { bytes_max: 64 << 10, ..RecorderConfig::default() };
    let large = |trace| {
        let mut span = span(trace, 0, &[]);
        span.set("volume", "x".repeat(10 << 10).into());
        span
    };
    assert!((1..=6).contains(&store(config(), (1..20).map(large)).len()));
    let one_trace = store(config(), (1..20).map(|_| large(1)));
    assert!(one_trace.len() <= 6, "{}", one_trace.len());
}
