//! Traces: where a write spent its time, as a waterfall over all services.

use std::collections::BTreeMap;

use endio_api::{
    common::{ListSpansRequest, Span},
    writeback::VolumeRequest,
};
use endio_types::ByteSize;
use serde_json::{Value, json};

use crate::{
    args::TraceArgs,
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, Table},
};

/// Most spans of one trace that are asked for.
const SPANS_MAX: u32 = 10_000;
/// Traces in the list unless `--last` says otherwise.
const LAST_DEFAULT: u32 = 10;
/// Requests of one place that are looked at, to find a write among them.
const FIND_MAX: u32 = 200;
/// Deepest indentation; a cycle of parents ends there at the latest.
const DEPTH_MAX: usize = 32;

/// `endio trace`
pub(crate) async fn run(client: &Client, out: Output, args: TraceArgs) -> Outcome {
    let Some(target) = &args.target else {
        return list(client, out, args.last.unwrap_or(LAST_DEFAULT)).await;
    };
    let trace_id = match parse_target(target)? {
        Target::Trace(id) => id,
        Target::Place(volume, offset) => find(client, &volume, offset).await?,
    };
    let request =
        ListSpansRequest { trace_id: trace_id.clone(), limit: SPANS_MAX, ..Default::default() };
    let spans = ask(client, request).await?;
    if spans.is_empty() {
        let message = "no service remembers it; memory is bounded, so old traces are dropped";
        return Err(Failure::new(Exit::NotFound, format!("show trace {trace_id}"), message)
            .help("list the latest with `endio trace --last 20`"));
    }
    let value = json!({
        "trace_id": trace_id, "spans": spans.iter().map(span_json).collect::<Vec<_>>(),
    });
    out.print(&value, || format!("trace {trace_id}\n{}", waterfall(&spans, args.width.into())))
}

#[derive(Debug, PartialEq)]
enum Target {
    Trace(String),
    Place(String, u64),
}

fn parse_target(text: &str) -> Outcome<Target> {
    if text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(Target::Trace(text.to_ascii_lowercase()));
    }
    let usage = |message: String| {
        Failure::new(Exit::Usage, format!("show trace {text:?}"), message)
            .help("give 32 hexadecimal digits, or VOLUME:OFFSET such as vol1:8MiB")
    };
    let (volume, offset) =
        text.rsplit_once(':').ok_or_else(|| usage("neither an id nor a place".into()))?;
    let offset: ByteSize = offset.parse().map_err(|e| usage(format!("offset: {e}")))?;
    Ok(Target::Place(volume.into(), offset.bytes()))
}

async fn ask(client: &Client, request: ListSpansRequest) -> Outcome<Vec<Span>> {
    let answer = client.inspect().trace(request).await;
    Ok(answer.map_err(|e| client.failure("ask for traces", &e))?.into_inner().spans)
}

/// The trace of the latest request that covers a byte: of a write if there is one, else of a read.
async fn find(client: &Client, volume: &str, offset: u64) -> Outcome<String> {
    let request = |volume: String| ListSpansRequest {
        roots_only: true,
        volume,
        offset_bytes: Some(offset),
        limit: FIND_MAX,
        ..Default::default()
    };
    let mut spans = ask(client, request(volume.into())).await?;
    if spans.is_empty() {
        // Spans that were recorded before the volume was opened know its number only.
        let answer = client.volumes().get(VolumeRequest { name: volume.into() }).await;
        let id = answer.map_err(|e| client.failure(format!("show volume {volume}"), &e))?;
        spans = ask(client, request(id.into_inner().id.to_string())).await?;
    }
    let latest = spans.iter().find(|span| span.name != "read").or(spans.first());
    latest.map(|span| span.trace_id.clone()).ok_or_else(|| {
        let what = format!("find a trace of byte {offset} of volume {volume}");
        Failure::new(Exit::NotFound, what, "no request of late covers it")
            .help("list the latest with `endio trace --last 20`")
    })
}

async fn list(client: &Client, out: Output, last: u32) -> Outcome {
    let request = ListSpansRequest { roots_only: true, limit: last, ..Default::default() };
    let spans = ask(client, request).await?;
    let value = json!({ "roots": spans.iter().map(span_json).collect::<Vec<_>>() });
    out.print(&value, || {
        if spans.is_empty() {
            return "no traces yet; write something first".into();
        }
        let mut table =
            Table::new(&["TRACE", "NAME", "VOLUME", "OFFSET", "LENGTH", "TOOK", "ERROR"]);
        for span in &spans {
            let cell = |name: &str| span.attributes.get(name).cloned().unwrap_or("-".into());
            table.row(vec![
                span.trace_id.clone(),
                span.name.clone(),
                cell("volume"),
                cell("offset"),
                cell("length"),
                time(span.duration_ns),
                if span.error.is_empty() { "-".into() } else { span.error.clone() },
            ]);
        }
        table.render()
    })
}

fn span_json(span: &Span) -> Value {
    let attributes: BTreeMap<&String, &String> = span.attributes.iter().collect();
    json!({
        "trace_id": span.trace_id, "span_id": span.span_id, "parent_span_id": span.parent_span_id,
        "name": span.name, "service": span.service, "start_unix_ns": span.start_unix_ns,
        "duration_ns": span.duration_ns, "attributes": attributes, "links": span.links,
        "error": span.error,
    })
}

/// A length of time in the unit that reads best.
fn time(ns: u64) -> String {
    #[allow(clippy::cast_precision_loss)] // two digits are shown
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{:.1}us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2}ms", value / 1e6),
        _ => format!("{:.2}s", value / 1e9),
    }
}

/// The spans as a tree: children below their parents by start, with a bar that shows when.
///
/// A span whose parent is not among them (dropped, or still open) stands as a root. Every span
/// stands there exactly once, whatever their parents say.
pub(crate) fn waterfall(spans: &[Span], width: usize) -> String {
    let Some(begin) = spans.iter().map(|span| span.start_unix_ns).min() else {
        return String::new();
    };
    let end = spans.iter().map(|s| s.start_unix_ns.saturating_add(s.duration_ns)).max();
    let whole = end.unwrap_or(begin).saturating_sub(begin).max(1);
    let mut table = Table::new(&["SPAN", "WHEN", "AT", "TOOK", "SERVICE", "DETAILS"]);
    for (depth, span) in in_tree_order(spans) {
        let at = span.start_unix_ns - begin;
        table.row(vec![
            format!("{}{}", "  ".repeat(depth), span.name),
            format!("|{}|", bar(at, span.duration_ns, whole, width)),
            format!("+{}", time(at)),
            time(span.duration_ns),
            span.service.clone(),
            details(span),
        ]);
    }
    table.render()
}

fn in_tree_order(spans: &[Span]) -> Vec<(usize, &Span)> {
    let mut by_start: Vec<&Span> = spans.iter().collect();
    by_start.sort_by_key(|s| (s.start_unix_ns, u64::MAX - s.duration_ns, s.span_id.as_str()));
    let ids: BTreeMap<&str, usize> =
        by_start.iter().enumerate().map(|(i, span)| (span.span_id.as_str(), i)).collect();
    let mut children: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut roots = Vec::new();
    for (index, span) in by_start.iter().enumerate() {
        let parent = span.parent_span_id.as_str();
        if ids.contains_key(parent) && parent != span.span_id {
            children.entry(parent).or_default().push(index);
        } else {
            roots.push(index);
        }
    }
    let mut order = Vec::new();
    let mut seen = vec![false; by_start.len()];
    // Roots first; what a cycle of parents keeps unreachable follows in order of time.
    for start in roots.into_iter().chain(0..by_start.len()) {
        let mut stack = vec![(0, start)];
        while let Some((depth, index)) = stack.pop() {
            if std::mem::replace(&mut seen[index], true) {
                continue;
            }
            order.push((depth, by_start[index]));
            let below = children.get(by_start[index].span_id.as_str());
            let depth = (depth + 1).min(DEPTH_MAX);
            stack.extend(below.into_iter().flatten().rev().map(|child| (depth, *child)));
        }
    }
    order
}

fn bar(at: u64, duration: u64, whole: u64, width: usize) -> String {
    let cell = |ns: u64| {
        let cells = u128::from(ns) * width as u128 / u128::from(whole);
        usize::try_from(cells).unwrap_or(width).min(width)
    };
    let from = cell(at).min(width - 1);
    let to = cell(at.saturating_add(duration)).max(from + 1);
    format!("{}{}{}", " ".repeat(from), "=".repeat(to - from), " ".repeat(width - to))
}

/// Attributes worth a place on the line, in this order; `--json` has all of them.
const DETAILS: [&str; 9] =
    ["volume", "offset", "length", "io_end", "segment", "attempt", "store", "lblk", "blocks"];

fn details(span: &Span) -> String {
    let mut parts: Vec<String> = DETAILS
        .iter()
        .filter_map(|name| span.attributes.get(*name).map(|value| format!("{name}={value}")))
        .collect();
    match span.links.as_slice() {
        [] => {}
        [one] => parts.push(format!("serves {one}")),
        [first, ..] => parts.push(format!("serves {} traces, {first} …", span.links.len())),
    }
    if !span.error.is_empty() {
        parts.push(format!("ERROR: {}", span.error));
    }
    parts.join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn span(id: &str, parent: &str, name: &str, at: u64, took: u64) -> Span {
        Span {
            span_id: id.into(),
            parent_span_id: parent.into(),
            name: name.into(),
            service: "writeback".into(),
            start_unix_ns: 1_000 + at,
            duration_ns: took,
            ..Span::default()
        }
    }

    #[test]
    fn a_waterfall_indents_children_and_places_bars_in_time() {
        let mut segment = span("c", "a", "segment", 50, 50);
        segment.attributes = [("io_end".into(), "7".into()), ("segment".into(), "1".into())].into();
        segment.error = "IO_ERROR".into();
        segment.links = vec!["ff".into()];
        // Out of order on purpose: services answer in any order.
        let spans = [segment, span("a", "", "write", 0, 100), span("b", "a", "begin", 0, 50)];
        let text = waterfall(&spans, 8);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("write      |========|"), "{text}");
        assert!(lines[2].starts_with("  begin    |====    |"), "{text}");
        assert!(lines[3].starts_with("  segment  |    ====|"), "{text}");
        assert!(lines[3].ends_with("io_end=7 segment=1 serves ff ERROR: IO_ERROR"), "{text}");
    }

    #[test]
    fn a_span_without_its_parent_stands_as_a_root() {
        let text = waterfall(&[span("b", "gone", "segment", 0, 10)], 8);
        assert!(text.lines().nth(1).unwrap().starts_with("segment"), "{text}");
    }

    #[test]
    fn spans_that_are_each_others_parents_are_shown_once_each() {
        let spans = [span("a", "b", "one", 0, 10), span("b", "a", "two", 5, 10)];
        assert_eq!(waterfall(&spans, 8).lines().count(), 3);
        let own = [span("a", "a", "own", 0, 10)];
        assert_eq!(waterfall(&own, 8).lines().count(), 2);
    }

    #[test]
    fn a_span_without_length_still_has_a_mark_inside_the_bar() {
        let spans = [span("a", "", "write", 0, 100), span("b", "a", "completion", 100, 0)];
        let text = waterfall(&spans, 8);
        assert!(text.lines().nth(2).unwrap().contains("|       =|"), "{text}");
        assert_eq!(waterfall(&[span("a", "", "x", 0, 0)], 8).lines().count(), 2);
    }

    #[test]
    fn targets_are_ids_or_places() {
        let id = "0123456789abcdef0123456789ABCDEF";
        assert_eq!(parse_target(id).unwrap(), Target::Trace(id.to_ascii_lowercase()));
        assert_eq!(parse_target("vol1:8MiB").unwrap(), Target::Place("vol1".into(), 8 << 20));
        assert_eq!(parse_target("vol1").unwrap_err().exit, Exit::Usage);
        assert_eq!(parse_target("vol1:x").unwrap_err().exit, Exit::Usage);
    }
}
