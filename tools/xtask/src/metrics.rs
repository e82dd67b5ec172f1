//! Every metric in code stands in docs/OBSERVABILITY.md, and what the guides name exists.

use std::collections::{BTreeMap, BTreeSet};

use crate::rules::Findings;
use crate::tree::Crate;

/// Where each metric has a row, or a line of its own.
pub(crate) const PLACE: &str = "docs/OBSERVABILITY.md";
/// Guides that may name metrics, too.
pub(crate) const GUIDES: &[&str] = &[PLACE, "docs/OPERATIONS.md"];

const LISTED: &str = "every metric in code has a row in docs/OBSERVABILITY.md";
const EXISTS: &str = "a metric that a guide names exists in code";

const PREFIX: &str = "endio_";
/// What a histogram adds to its name for a scraper.
const SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];

/// Compares the metrics of all crates with the text of each of [`GUIDES`], in their order.
pub(crate) fn check(crates: &[Crate], guides: &[(&str, String)], findings: &mut Findings) {
    let in_code = in_code(crates);
    for (place, text) in guides {
        for (number, line) in (1..).zip(text.lines()) {
            for name in names(line) {
                let base = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
                let is_there = |name: &str| in_code.contains_key(name);
                if !is_there(name) && !base.is_some_and(is_there) {
                    findings.add(format!("{place}:{number}"), format!("no `{name}`"), EXISTS);
                }
            }
        }
        if *place == PLACE {
            let rows: BTreeSet<&str> = text.lines().filter_map(row).collect();
            for (name, file) in in_code.iter().filter(|(name, _)| !rows.contains(**name)) {
                findings.add(*file, format!("`{name}` is not listed"), LISTED);
            }
        }
    }
}

/// Names of metrics in literals of what is shipped, each with a file that names it.
fn in_code(crates: &[Crate]) -> BTreeMap<&str, &str> {
    let is_shipped = |path: &str| path.contains("/src/") && !path.contains("/tests");
    let shipped = crates.iter().filter(|krate| !krate.dir.starts_with("tools/"));
    let files = shipped.flat_map(|krate| &krate.files).filter(|file| is_shipped(&file.path));
    let literals = |text| str::split(text, '"').filter(|literal| names(literal) == [*literal]);
    files.flat_map(|file| literals(&file.text).map(|name| (name, file.path.as_str()))).collect()
}

/// The metric that a row of a table, or a line, begins with.
fn row(line: &str) -> Option<&str> {
    line.trim_start_matches("| ").strip_prefix('`')?.split('`').next()
}

/// Words that begin like a metric.
fn names(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.len() > PREFIX.len() && word.starts_with(PREFIX)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;
    use crate::tree;

    fn found(code: &str, guide: &str) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("services/x/src");
        fs::create_dir_all(dir.join("x")).unwrap();
        fs::write(dir.join("../Cargo.toml"), "[package]\nname = \"x\"\n").unwrap();
        fs::write(dir.join("a.rs"), code).unwrap();
        fs::write(dir.join("x/tests.rs"), "\"endio_only_in_a_test\"").unwrap();
        let mut findings = Findings::default();
        let guides = [(PLACE, guide.to_owned())];
        check(&tree::read(root.path()).unwrap(), &guides, &mut findings);
        findings.violations.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metrics_that_are_listed_are_no_findings() {
        let code = "counter(\"endio_a_total\", \"Not endio_prose\"); histogram(\"endio_b\")";
        let guide = "| `endio_a_total` | counter |\n| `endio_b` | histogram |\n\
                     `endio_a_total{x=\"y\"}` `rate(endio_b_count[1m])`";
        assert_eq!(found(code, guide), Vec::<String>::new());
    }

    #[test]
    fn a_metric_without_a_row_is_found() {
        let found = found("\"endio_a_total\"", "prose names `endio_a_total`");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("services/x/src/a.rs: `endio_a_total`"), "{}", found[0]);
    }

    #[test]
    fn a_row_without_a_metric_is_found_with_its_line() {
        let found = found("", "\n| `endio_gone_total` | counter |\nendio_only_in_a_test");
        assert_eq!(found.len(), 2);
        assert!(found[0].starts_with("docs/OBSERVABILITY.md:2: no `endio_gone_total`"));
        assert!(found[1].starts_with("docs/OBSERVABILITY.md:3"), "{}", found[1]);
    }
}
