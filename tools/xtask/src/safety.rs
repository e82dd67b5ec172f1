//! docs/SAFETY.md names the tests and the files that keep each promise: they must exist.

use std::collections::BTreeSet;
use std::path::Path;

use crate::rules::Findings;
use crate::source::code;
use crate::tree::Crate;

/// Where the promises stand.
pub(crate) const PLACE: &str = "docs/SAFETY.md";

const NAMED: &str = "what docs/SAFETY.md names exists: a test as a function, a path as a file";

/// Words that tell a test name from a value or an invariant: `release_by_a_fenced_holder`.
const UNDERSCORES_MIN: usize = 2;

/// Checks every name between backticks in `text`, a copy of docs/SAFETY.md below `root`.
pub(crate) fn check(root: &Path, text: &str, crates: &[Crate], findings: &mut Findings) {
    let functions: BTreeSet<String> =
        crates.iter().flat_map(|krate| &krate.files).flat_map(|file| names(&file.text)).collect();
    for (number, line) in (1..).zip(text.lines()) {
        for name in line.split('`').skip(1).step_by(2) {
            let is_there = match kind(name) {
                Kind::Test => functions.contains(name),
                Kind::Path => root.join(name).exists(),
                Kind::Other => true,
            };
            if !is_there {
                findings.add(format!("{PLACE}:{number}"), format!("no `{name}`"), NAMED);
            }
        }
        if line.ends_with("| — |") {
            findings.warnings.push(format!("{PLACE}:{number}: a promise that no test checks"));
        }
    }
}

enum Kind {
    Test,
    Path,
    Other,
}

fn kind(name: &str) -> Kind {
    let is_lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.contains('/') {
        Kind::Path
    } else if name.chars().all(is_lower) && name.matches('_').count() >= UNDERSCORES_MIN {
        Kind::Test
    } else {
        Kind::Other
    }
}

/// Names of the functions in a source, apart from its comments and literals.
fn names(text: &str) -> Vec<String> {
    let code = code(text);
    let words: Vec<&str> = code.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
    words.windows(2).filter(|pair| pair[0] == "fn").map(|pair| pair[1].to_owned()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;
    use crate::tree;

    fn check_in(text: &str) -> (Vec<String>, usize) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("crates/types/src");
        fs::create_dir_all(&dir).unwrap();
        fs::write(root.path().join("crates/types/Cargo.toml"), "[package]\nname = \"x\"\n")
            .unwrap();
        let source =
            "// fn only_in_a_comment\nasync fn a_test_that_exists() { let s = \"fn in_a_text\"; }";
        fs::write(dir.join("a.rs"), source).unwrap();
        let mut findings = Findings::default();
        check(root.path(), text, &tree::read(root.path()).unwrap(), &mut findings);
        (findings.violations.iter().map(ToString::to_string).collect(), findings.warnings.len())
    }

    #[test]
    fn tests_and_files_that_exist_are_no_findings() {
        let text =
            "| x | `crates/types/src/a.rs` | `a_test_that_exists` |\n`NO_SPACE`, `one-ending`";
        assert_eq!(check_in(text), (vec![], 0));
    }

    #[test]
    fn a_test_or_file_that_is_gone_is_found_with_its_line() {
        let text = "\n`a_test_that_is_gone`\n`crates/types/src/b.rs`\n`only_in_a_comment`";
        let (found, _) = check_in(text);
        assert_eq!(found.len(), 3);
        assert!(found[0].starts_with("docs/SAFETY.md:2: no `a_test_that_is_gone`"), "{}", found[0]);
        assert!(found[1].starts_with("docs/SAFETY.md:3"));
        assert!(found[2].starts_with("docs/SAFETY.md:4"));
    }

    #[test]
    fn a_row_without_a_test_is_a_warning() {
        assert_eq!(check_in("| 9 | something | — |"), (vec![], 1));
    }
}
