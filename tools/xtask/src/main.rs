//! The project's one check command.
//!
//! `cargo xtask check` is what a commit must pass; `cargo xtask rules` is the part of it that no
//! ready-made tool does: who may import whom, and the limits that keep the code readable.

mod manifest;
mod metrics;
mod rules;
mod safety;
mod source;
mod tree;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

const USAGE: &str = "usage: cargo xtask <command>
  check   everything a commit must pass: format, rules, clippy, documentation, tests
  rules   who may import whom, the limits on files, and that the guides name what exists";

/// A step of `check`: name, arguments of cargo, additional environment.
type Step = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)]);

const STEPS: &[Step] = &[
    ("format", &["fmt", "--all", "--", "--check"], &[]),
    ("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
    (
        "documentation",
        &["doc", "--workspace", "--no-deps", "--document-private-items"],
        &[("RUSTDOCFLAGS", "-D warnings")],
    ),
    ("tests", &["test", "--workspace"], &[]),
    // The workspace's tests build them away.
    ("failpoints", &["test", "-p", "endio-failpoints", "--all-features"], &[]),
];

fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    let result = match command.as_deref() {
        Some("check") => check(),
        Some("rules") => rules(),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace: cargo tells where this package lies, two levels below its root.
fn root() -> anyhow::Result<PathBuf> {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("run me with `cargo xtask`")?;
    let root = Path::new(&package).ancestors().nth(2).context("tools/xtask has moved")?;
    Ok(root.to_owned())
}

/// Runs every step, also after a failed one, so that one run tells all that is wrong.
fn check() -> anyhow::Result<()> {
    let root = root()?;
    let mut failed = Vec::new();
    println!("== rules");
    if let Err(error) = rules() {
        eprintln!("{error:#}");
        failed.push("rules");
    }
    for (name, arguments, environment) in STEPS {
        println!("== {name}: cargo {}", arguments.join(" "));
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(&root).args(*arguments).envs(environment.iter().copied());
        let status = command.status().with_context(|| format!("cannot run step {name}"))?;
        if !status.success() {
            failed.push(name);
        }
    }
    if failed.is_empty() {
        println!("== all checks passed");
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "))
}

fn rules() -> anyhow::Result<()> {
    let root = root()?;
    let crates = tree::read(&root)?;
    let mut findings = rules::find(&crates);
    let promises = std::fs::read_to_string(root.join(safety::PLACE)).context(safety::PLACE)?;
    safety::check(&root, &promises, &crates, &mut findings);
    let read = |place: &&'static str| {
        Ok((*place, std::fs::read_to_string(root.join(place)).context(*place)?))
    };
    let guides: Vec<_> = metrics::GUIDES.iter().map(read).collect::<anyhow::Result<_>>()?;
    metrics::check(&crates, &guides, &mut findings);
    for warning in &findings.warnings {
        println!("warning: {warning}");
    }
    if findings.violations.is_empty() {
        println!("all rules hold");
        return Ok(());
    }
    for violation in &findings.violations {
        eprintln!("{violation}");
    }
    bail!("{} violations", findings.violations.len())
}
