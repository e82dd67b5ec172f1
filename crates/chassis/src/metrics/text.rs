//! Metrics as text for a scraper.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::{Number, Series, Snapshot};

/// Which text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0, with exemplars.
    OpenMetrics,
    /// Prometheus 0.0.4.
    Prometheus,
}

/// First and last bucket that is written: from 2 µs to 67 s; the others are added to them.
const BUCKETS: std::ops::RangeInclusive<usize> = 1..=26;

impl Form {
    /// What a scraper accepts best.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// For the header of the answer.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// All exposed metrics of the process.
#[must_use]
pub fn render(form: Form) -> String {
    Snapshot::take().render(form)
}

impl Snapshot {
    pub(super) fn render(&self, form: Form) -> String {
        let mut text = String::new();
        for (name, family) in &self.families {
            let Some(first) = family.series.values().next() else { continue };
            let kind = match first.value {
                Some(Number::Counter(_)) => "counter",
                Some(Number::Gauge(_)) => "gauge",
                None => "histogram",
            };
            // OpenMetrics names the family of a counter without its ending.
            let title = match form {
                Form::OpenMetrics => name.strip_suffix("_total").unwrap_or(name),
                Form::Prometheus => name,
            };
            // Writing into a string cannot fail.
            let _ = writeln!(text, "# HELP {title} {}", escaped(family.help));
            let _ = writeln!(text, "# TYPE {title} {kind}");
            for (key, series) in &family.series {
                match series.value {
                    Some(Number::Counter(value)) => {
                        let _ = writeln!(text, "{name}{} {value}", labels(key));
                    }
                    Some(Number::Gauge(value)) => {
                        let _ = writeln!(text, "{name}{} {value}", labels(key));
                    }
                    None => series.histogram(&mut text, name, key, form),
                }
            }
        }
        if form == Form::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

impl Series {
    fn histogram(
        &self,
        text: &mut String,
        name: &str,
        key: &[(&'static str, Cow<'_, str>)],
        form: Form,
    ) {
        let mut bucket = |le: String, count: u64, of: std::ops::RangeInclusive<usize>| {
            let mut with_le: Vec<(&str, Cow<'_, str>)> = key.to_vec();
            with_le.push(("le", le.into()));
            let _ = write!(text, "{name}_bucket{} {count}", labels(&with_le));
            let exemplar = of.filter_map(|at| self.exemplars.get(&at)).max_by_key(|e| e.unix_ns);
            if let (Form::OpenMetrics, Some(exemplar)) = (form, exemplar) {
                let (trace, span) = (exemplar.context.trace_id(), exemplar.context.span_id());
                let seconds = exemplar.us as f64 / 1e6;
                let at = exemplar.unix_ns as f64 / 1e9;
                let _ = write!(
                    text,
                    " # {{trace_id=\"{trace}\",span_id=\"{span}\"}} {seconds} {at:.3}"
                );
            }
            text.push('\n');
        };
        let mut count = 0;
        let mut from = 0;
        for at in BUCKETS {
            count += self.buckets[from..=at].iter().sum::<u64>();
            bucket(format!("{}", (1_u64 << at) as f64 / 1e6), count, from..=at);
            from = at + 1;
        }
        count += self.buckets[from..].iter().sum::<u64>();
        bucket("+Inf".to_owned(), count, from..=self.buckets.len() - 1);
        let _ = writeln!(text, "{name}_count{} {count}", labels(key));
        let _ = writeln!(text, "{name}_sum{} {}", labels(key), self.sum_us as f64 / 1e6);
    }
}

/// `{name="value",…}`, or nothing.
pub(super) fn labels(key: &[(&str, Cow<'_, str>)]) -> String {
    if key.is_empty() {
        return String::new();
    }
    let one = |(name, value): &(&str, Cow<'_, str>)| format!("{name}=\"{}\"", escaped(value));
    let all: Vec<_> = key.iter().map(one).collect();
    format!("{{{}}}", all.join(","))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
