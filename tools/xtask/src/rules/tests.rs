#![allow(clippy::unwrap_used)]

use std::fs;

use super::*;
use crate::tree;

const PLAIN: &str = "[package]\nname = \"x\"\n[lints]\nworkspace = true\n[dependencies]\n";

/// Writes files into a folder of its own and reads them back as a workspace.
fn find_in(files: &[(&str, &str)]) -> Findings {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    find(&tree::read(root.path()).unwrap())
}

fn violations(files: &[(&str, &str)]) -> Vec<(String, &'static str)> {
    let found = find_in(files).violations;
    found.into_iter().map(|violation| (violation.place, violation.sentence)).collect()
}

fn with_dependency(line: &str) -> String {
    format!("{PLAIN}{line}\n")
}

/// The sentences of what is wrong with one source file in `dir`.
fn sentences(dir: &str, source: &str) -> Vec<&'static str> {
    let (manifest, file) = (format!("{dir}/Cargo.toml"), format!("{dir}/src/a.rs"));
    let found = violations(&[(&manifest, PLAIN), (&file, source)]);
    found.into_iter().map(|(_, sentence)| sentence).collect()
}

#[test]
fn a_tree_that_keeps_the_rules_has_no_findings() {
    let service =
        with_dependency("endio-api.workspace = true\n[dev-dependencies]\nendio-testkit = 1");
    let findings = find_in(&[
        ("crates/types/Cargo.toml", PLAIN),
        ("services/conversion/Cargo.toml", &service),
        ("services/conversion/src/main.rs", "fn main() {} // sled::Db, todo!()"),
    ]);
    assert_eq!(findings.violations, []);
    assert!(findings.warnings.is_empty());
}

#[test]
fn services_that_use_each_other_are_found_even_in_tests() {
    for section in ["", "[dev-dependencies]\n"] {
        let manifest = with_dependency(&format!("{section}endio-block-store.workspace = true"));
        let found = violations(&[("services/writeback/Cargo.toml", &manifest)]);
        let place = "services/writeback/Cargo.toml".to_owned();
        assert_eq!(found, [(place, NEVER_EACH_OTHER)]);
    }
}

#[test]
fn an_import_against_the_layers_is_found() {
    for (dir, name) in [
        ("crates/chassis", "endio-types"),
        ("crates/types", "endio-api"),
        ("crates/store", "endio-chassis"),
        ("bench", "endio-writeback"),
    ] {
        let path = format!("{dir}/Cargo.toml");
        let manifest = with_dependency(&format!("{name}.workspace = true"));
        assert_eq!(violations(&[(&path, &manifest)]), [(path.clone(), LAYERING)], "{dir}");
    }
}

#[test]
fn a_crate_without_a_place_in_the_layers_is_found() {
    let found = violations(&[("crates/new/Cargo.toml", PLAIN)]);
    assert_eq!(found, [("crates/new/Cargo.toml".to_owned(), LAYERING)]);
}

#[test]
fn testkit_outside_dev_dependencies_is_found() {
    let manifest = with_dependency("endio-testkit.workspace = true");
    let found = violations(&[("cli/Cargo.toml", &manifest)]);
    assert_eq!(found, [("cli/Cargo.toml".to_owned(), TESTKIT)]);
}

#[test]
fn what_lies_in_tests_may_use_everything() {
    let manifest = with_dependency("endio-testkit = 1\nendio-writeback = 1\nendio-conversion = 1");
    assert_eq!(violations(&[("tests/crash/Cargo.toml", &manifest)]), []);
}

#[test]
fn sled_outside_the_store_is_found_in_code_and_in_the_manifest() {
    let source = "fn f() {}\nuse sled::Db;";
    let found = violations(&[
        ("crates/api/Cargo.toml", &with_dependency("sled.workspace = true")),
        ("crates/api/src/a.rs", source),
        ("crates/store/Cargo.toml", &with_dependency("sled.workspace = true")),
        ("crates/store/src/a.rs", source),
    ]);
    let places: Vec<_> = found.iter().map(|(place, _)| place.as_str()).collect();
    // Two patterns meet on the line, and each is told.
    assert_eq!(places, ["crates/api/Cargo.toml", "crates/api/src/a.rs:2", "crates/api/src/a.rs:2"]);
    assert!(found.iter().all(|(_, sentence)| sentence.contains("sled")));
}

#[test]
fn an_impure_state_machine_is_found() {
    for source in [
        "use tokio::sync::mpsc;",
        "let t = std::time::Instant::now();",
        "use std::collections::HashMap;",
        "tracing::info!(1);",
        "std::fs::read(p);",
        "let x: u8 = rand::random();",
    ] {
        assert!(!sentences("crates/state-machine", source).is_empty(), "{source}");
        assert!(sentences("services/conversion", source).is_empty(), "{source}");
    }
    let manifest = with_dependency("tokio.workspace = true");
    assert_eq!(violations(&[("crates/state-machine/Cargo.toml", &manifest)]).len(), 1);
}

/// Scenario 58: what sets the time of day moves no lease, because no service asks for it.
#[test]
fn a_service_that_asks_for_the_time_of_day_is_found() {
    let source = "fn f() { std::time::SystemTime::now(); }";
    for dir in ["services/conversion", "services/block-store", "services/writeback"] {
        let found = sentences(dir, source);
        assert!(found.iter().any(|sentence| sentence.starts_with("leases")), "{dir}: {found:?}");
    }
    assert!(sentences("services/writeback", "fn f() { std::time::Instant::now(); }").is_empty());
    // Certificates and the times of spans go by the time of day.
    assert!(sentences("crates/pki", source).is_empty());
}

#[test]
fn tests_of_the_state_machine_may_read_their_seed() {
    let text = "let seed = std::env::var(\"SEED\");";
    let dir = "crates/state-machine";
    let found = |path| violations(&[(&format!("{dir}/Cargo.toml"), PLAIN), (path, text)]).len();
    assert_eq!(found("crates/state-machine/tests/a.rs"), 0);
    assert_eq!(found("crates/state-machine/src/a.rs"), 1);
}

#[test]
fn generated_types_outside_the_api_are_found() {
    for source in ["tonic::include_proto!(\"x\");", "#[derive(prost::Message)]"] {
        assert_eq!(sentences("cli", source).len(), 1, "{source}");
        assert_eq!(sentences("crates/api", source).len(), 0, "{source}");
    }
}

#[test]
fn unbounded_queues_ignored_tests_and_unfinished_code_are_found() {
    let unfinished = ["todo", "!()"].concat();
    for source in ["mpsc::unbounded_channel();", "#[ignore]", "#[should_panic]", &unfinished] {
        assert_eq!(sentences("cli", source).len(), 1, "{source}");
    }
}

#[test]
fn a_crate_without_the_lints_is_found() {
    let manifest = "[package]\nname = \"x\"\n";
    let found = violations(&[("cli/Cargo.toml", manifest)]);
    assert_eq!(found, [("cli/Cargo.toml".to_owned(), LINTS)]);
}

#[test]
fn long_files_are_found_and_announced_before() {
    for (lines, is_violation, is_warning) in
        [(600, false, false), (601, false, true), (700, false, true), (701, true, false)]
    {
        let text = "\n".repeat(lines);
        let findings = find_in(&[("cli/Cargo.toml", PLAIN), ("cli/src/a.rs", &text)]);
        assert_eq!(!findings.violations.is_empty(), is_violation, "{lines}");
        assert_eq!(!findings.warnings.is_empty(), is_warning, "{lines}");
    }
}

#[test]
fn a_main_that_does_more_than_supply_is_found() {
    for (lines, count) in [(40, 0), (41, 1)] {
        let text = "\n".repeat(lines);
        let manifest = ("services/writeback/Cargo.toml", PLAIN);
        let found = violations(&[manifest, ("services/writeback/src/main.rs", &text)]);
        assert_eq!(found.len(), count, "{lines}");
    }
}

#[test]
fn a_violation_is_printed_with_its_sentence() {
    let text = find_in(&[("crates/new/Cargo.toml", PLAIN)]).violations[0].to_string();
    assert!(text.contains("crates/new/Cargo.toml") && text.contains(LAYERING), "{text}");
}
