//! Judges the traces that a collector has received: is each write one whole tree?
//!
//! ```text
//! write ─ (buffered) write_out ─┬ begin (writeback, conversion)
//!                               ├ segment ─┬ segment (block-store) ─ wait, write, flush, release
//!                               │          └ release (conversion)
//!                               ├ release (conversion), convert (conversion), completion
//!                               └ linked by a convert_batch
//! ```

use std::collections::{BTreeMap, BTreeSet};

use crate::collector::{Received, Span};

const WRITEBACK: &str = "endio-writeback";
const CONVERSION: &str = "endio-conversion";
const BLOCK_STORE: &str = "endio-block-store";

/// All that was received, by trace.
pub struct Traces<'a> {
    by_trace: BTreeMap<&'a str, Vec<&'a Span>>,
    /// Traces and spans that a batch of conversion links to.
    converted: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Traces<'a> {
    /// Sorts what was received.
    pub fn of(received: &'a Received) -> Self {
        let mut by_trace: BTreeMap<&str, Vec<&Span>> = BTreeMap::new();
        let mut converted = BTreeSet::new();
        for span in &received.spans {
            by_trace.entry(&span.trace).or_default().push(span);
            if span.name == "convert_batch" && span.service == CONVERSION {
                let links = span.links.iter();
                converted.extend(links.map(|(trace, id)| (trace.as_str(), id.as_str())));
            }
        }
        Self { by_trace, converted }
    }

    /// The writes that began here: roots of that name.
    pub fn writes(&self) -> Vec<&'a Span> {
        let all = self.by_trace.values().flatten();
        all.filter(|span| span.name == "write" && span.parent.is_empty()).copied().collect()
    }

    /// The number of attempts that the write in this trace took.
    pub fn attempts(&self, trace: &str) -> u64 {
        let spans = self.by_trace.get(trace).into_iter().flatten();
        spans.filter_map(|span| span.attribute("attempt").parse().ok()).max().unwrap_or(0)
    }

    /// What is wrong with the trace of a write. Empty: it is one tree, and its last attempt has
    /// everything that a write has.
    pub fn problems(&self, write: &Span) -> Vec<String> {
        let mut problems = self.loose_ends(&write.trace);
        if write.attribute("mode") == "direct" {
            problems.extend(self.of_job(write));
            return problems;
        }
        let outs = self.below(write, WRITEBACK, "write_out");
        if outs.is_empty() {
            problems.push("no write_out".to_owned());
        }
        for out in outs {
            problems.extend(self.of_write_out(out));
        }
        problems
    }

    /// Spans of a trace whose parent is not there, and roots besides the first.
    pub fn loose_ends(&self, trace: &str) -> Vec<String> {
        let spans = self.by_trace.get(trace).map_or(&[][..], Vec::as_slice);
        let known: BTreeSet<&str> = spans.iter().map(|span| span.id.as_str()).collect();
        let is_loose = |span: &&&Span| !span.parent.is_empty() && !known.contains(&*span.parent);
        let loose = spans.iter().filter(is_loose);
        let loose = loose.map(|span| format!("{} of {} hangs in the air", span.name, span.service));
        let roots = spans.iter().filter(|span| span.parent.is_empty()).count();
        let roots = (roots != 1).then(|| format!("{roots} roots"));
        loose.chain(roots).collect()
    }

    /// A write-out, or the share of one that another trace has.
    fn of_write_out(&self, out: &Span) -> Vec<String> {
        if !self.below(out, WRITEBACK, "begin").is_empty() {
            return self.of_job(out);
        }
        let whole = out.links.iter().find_map(|(trace, id)| self.find(trace, id));
        match whole {
            Some(whole) if whole.name == "write_out" => self.of_job(whole),
            _ => vec!["a write_out without a begin, and without a link to a whole one".to_owned()],
        }
    }

    /// What the last attempt of a write through an io_end lacks.
    fn of_job(&self, job: &Span) -> Vec<String> {
        let mut lacks = Vec::new();
        let attempt = match job.attribute("attempt") {
            "" => "1",
            attempt => attempt,
        };
        let of_attempt = |spans: Vec<&'a Span>| -> Vec<&'a Span> {
            spans.into_iter().filter(|span| span.attribute("attempt") == attempt).collect()
        };
        let begins = of_attempt(self.below(job, WRITEBACK, "begin"));
        let io_end = begins.first().map_or("", |begin| begin.attribute("io_end"));
        let of_io_end = |spans: Vec<&'a Span>| -> Vec<&'a Span> {
            spans.into_iter().filter(|span| span.attribute("io_end") == io_end).collect()
        };
        let segments = of_attempt(self.below(job, WRITEBACK, "segment"));
        let submitters = of_io_end(self.below(job, CONVERSION, "release"));
        let converts = of_io_end(self.below(job, CONVERSION, "convert"));
        let completions = of_attempt(self.below(job, WRITEBACK, "completion"));
        for (what, found) in [
            ("begin of writeback", begins.len()),
            ("begin of conversion", of_attempt(self.below(job, CONVERSION, "begin")).len()),
            ("submitter's release", submitters.len()),
            ("convert", converts.len()),
            ("completion", completions.len()),
        ] {
            if found != 1 {
                lacks.push(format!("{found} times {what} in attempt {attempt}"));
            }
        }
        if segments.is_empty() {
            lacks.push(format!("no segment in attempt {attempt}"));
        }
        for segment in &segments {
            lacks.extend(self.of_segment(segment));
        }
        if !self.converted.contains(&(job.trace.as_str(), job.id.as_str())) {
            lacks.push("no convert_batch links to it".to_owned());
        }
        for span in [begins, segments, converts, completions].into_iter().flatten() {
            if let Some(error) = &span.error {
                lacks.push(format!("{} of the last attempt says {error}", span.name));
            }
        }
        lacks
    }

    fn of_segment(&self, segment: &Span) -> Vec<String> {
        let mut lacks = Vec::new();
        let number = segment.attribute("segment");
        if self.below(segment, CONVERSION, "release").is_empty() {
            lacks.push(format!("no release of segment {number}"));
        }
        let [store] = self.below(segment, BLOCK_STORE, "segment")[..] else {
            lacks.push(format!("segment {number} is not once on a block-store"));
            return lacks;
        };
        for phase in ["wait", "write", "flush", "release"] {
            if self.below(store, BLOCK_STORE, phase).len() != 1 {
                lacks.push(format!("segment {number} has not one {phase}"));
            }
        }
        lacks
    }

    fn find(&self, trace: &str, id: &str) -> Option<&'a Span> {
        self.by_trace.get(trace)?.iter().find(|span| span.id == id).copied()
    }

    fn below(&self, parent: &Span, service: &str, name: &str) -> Vec<&'a Span> {
        let spans = self.by_trace.get(parent.trace.as_str()).into_iter().flatten();
        let is_it = |span: &&&Span| {
            span.parent == parent.id && span.service == service && span.name == name
        };
        spans.filter(is_it).copied().collect()
    }
}
