//! Real processes over mutual TLS: the whole path of a write, kills, and those who may not come in.

use std::io::Write as _;
use std::process::{Output, Stdio};

use anyhow::{Context as _, ensure};
use endio_pki::Subject;
use endio_testkit::cluster::{Cluster, Options};

fn secured() -> anyhow::Result<Cluster> {
    let mut options = Options { tls: true, capacity: "256MiB".to_owned(), ..Options::default() };
    // The test looks for the trace of one write.
    for service in ["CONVERSION", "BLOCK_STORE", "WRITEBACK"] {
        options.env.push((format!("ENDIO_{service}_TELEMETRY__TRACE__RATIO"), "1".to_owned()));
    }
    Cluster::start(options)
}

/// Runs the command with this text on its standard input.
fn fed(cluster: &Cluster, args: &[&str], input: &str) -> anyhow::Result<Output> {
    let mut command = cluster.cli(args)?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("stdin is piped")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

#[test]
fn a_write_goes_through_three_processes_over_tls_and_outlives_their_death() -> anyhow::Result<()> {
    let mut cluster = secured()?;
    ensure!(cluster.endpoint().starts_with("https://"), "{}", cluster.endpoint());
    cluster.endio_ok(&["volume", "create", "v", "--size", "16MiB"])?;
    let text = "written over mutual tls\n";
    let written = fed(&cluster, &["write", "v", "--offset", "4090", "--direct"], text)?;
    ensure!(written.status.success(), "{written:?}");
    let buffered = fed(&cluster, &["write", "v", "--offset", "100000"], text)?;
    ensure!(buffered.status.success(), "{buffered:?}");
    let trace = cluster.endio_ok(&["trace", "v:4096"])?;
    for service in ["writeback", "conversion", "block-store"] {
        ensure!(trace.contains(service), "{service} is missing in\n{trace}");
    }
    cluster.kill_all();
    cluster.start_all()?;
    let length = text.len().to_string();
    for offset in ["4090", "100000"] {
        let read = ["read", "v", "--offset", offset, "--length", &length];
        ensure!(cluster.endio_ok(&read)? == text, "at {offset}");
    }
    cluster.endio_ok(&["check"])?;
    Ok(cluster.no_panic()?)
}

#[test]
fn the_command_tells_why_it_was_not_let_in() -> anyhow::Result<()> {
    let cluster = secured()?;
    let stranger = tempfile::tempdir()?;
    let day = std::time::Duration::from_secs(86_400);
    endio_pki::init(stranger.path(), day, false)?;
    let request = endio_pki::Request {
        subject: Subject::Admin("stranger".to_owned()),
        sans: Vec::new(),
        valid_for: day,
        if_missing: false,
    };
    endio_pki::issue(stranger.path(), &stranger.path().join("me"), &request)?;
    let stranger = stranger.path().join("me");
    let plain = cluster.endpoint().replace("https://", "http://");

    let mut command = cluster.cli(&["status"])?;
    let output = command.env("ENDIO_TLS_DIR", &stranger).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(4) && said.contains("invalid peer certificate"), "{said}");

    let mut command = cluster.cli(&["status", "--endpoint", &plain])?;
    let output = command.env_remove("ENDIO_TLS_DIR").output()?;
    ensure!(output.status.code() == Some(4), "{output:?}");

    let mut command = cluster.cli(&["status"])?;
    let output = command.env_remove("ENDIO_TLS_DIR").output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(2) && said.contains("--tls-dir"), "{said}");
    Ok(cluster.no_panic()?)
}

/// Data goes to a writeback, and nobody else may say that it is durable.
#[test]
fn the_command_takes_no_other_service_for_a_writeback() -> anyhow::Result<()> {
    let cluster = secured()?;
    let conversion = cluster.conversion_url().to_owned();
    cluster.endio_ok(&["health", "--endpoint", &conversion])?;
    let output = cluster.endio(&["volume", "list", "--endpoint", &conversion])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_told = said.contains("and not endio://service/writeback/");
    ensure!(output.status.code() == Some(4) && is_told, "{said}");
    Ok(cluster.no_panic()?)
}

#[test]
fn a_service_does_not_start_before_somebody_has_chosen() -> anyhow::Result<()> {
    let bin = endio_testkit::process::binaries()?;
    let dir = tempfile::tempdir()?;
    for (binary, data) in [
        ("endio-conversion", "--data-dir"),
        ("endio-block-store", "--data-dir"),
        ("endio-writeback", "--cache-dir"),
    ] {
        let start = |more: &[&str]| {
            let mut command = std::process::Command::new(bin.join(binary));
            command.arg(data).arg(dir.path().join(binary)).args(more).output()
        };
        let undecided = start(&["--listen", "127.0.0.1:0"])?;
        let said = String::from_utf8_lossy(&undecided.stderr).into_owned();
        ensure!(!undecided.status.success() && said.contains("--insecure"), "{binary}: {said}");
        let open = start(&["--listen", "0.0.0.0:0", "--insecure"])?;
        let said = String::from_utf8_lossy(&open.stderr).into_owned();
        ensure!(!open.status.success() && said.contains("loopback"), "{binary}: {said}");
    }
    Ok(())
}
