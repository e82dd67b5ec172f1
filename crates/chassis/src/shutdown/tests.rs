#![allow(clippy::unwrap_used)]

use super::*;

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn an_overrun_names_who_still_holds() {
    let shutdown = Shutdown::new();
    let first = shutdown.hold("journal");
    let second = shutdown.hold("journal");
    let other = shutdown.hold("flusher");
    let held = shutdown.drained(Duration::ZERO).await.unwrap_err();
    assert_eq!(held, ["flusher", "journal"]);
    drop((first, other));
    assert_eq!(shutdown.drained(Duration::ZERO).await.unwrap_err(), ["journal"]);
    drop(second);
    shutdown.drained(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn drained_returns_when_the_last_hold_is_dropped() {
    let shutdown = Shutdown::new();
    let hold = shutdown.hold("task");
    let waiter = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.drained(LONG).await }
    });
    tokio::task::yield_now().await;
    assert!(!waiter.is_finished());
    drop(hold);
    assert_eq!(waiter.await.unwrap(), Ok(()));
}

#[tokio::test]
async fn a_request_is_seen_by_all_clones_before_and_after() {
    let shutdown = Shutdown::new();
    let early = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.requested().await }
    });
    tokio::task::yield_now().await;
    assert!(!shutdown.is_requested());
    shutdown.request();
    shutdown.request();
    early.await.unwrap();
    shutdown.clone().requested().await;
    assert!(shutdown.is_requested());
    assert!(!shutdown.is_forced());
}

#[tokio::test]
async fn a_forced_stop_is_a_request_and_ends_draining_at_once() {
    let shutdown = Shutdown::new();
    let _hold = shutdown.hold("stuck");
    shutdown.force();
    shutdown.request();
    shutdown.requested().await;
    assert!(shutdown.is_forced());
    assert_eq!(shutdown.drained(LONG).await.unwrap_err(), ["stuck"]);
}

/// Set in the process that receives the signals: this test binary, started by itself.
const CHILD: &str = "CHASSIS_TEST_SIGNAL_CHILD";

#[test]
fn the_first_signal_requests_a_stop_and_the_second_ends_the_process() {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    if std::env::var_os(CHILD).is_some() {
        return receive_signals();
    }
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let name = "the_first_signal_requests_a_stop_and_the_second_ends_the_process";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("shutdown::tests::{name}"), "--exact", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for expected in ["installed", "requested"] {
            assert!(lines.any(|line| line.unwrap().ends_with(expected)), "{expected} never came");
            let kill = format!("kill -{signal} {}", child.id());
            assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        }
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}

#[tokio::main(flavor = "current_thread")]
async fn receive_signals() {
    let shutdown = Shutdown::new();
    shutdown.on_signals().unwrap();
    println!("\ninstalled");
    shutdown.requested().await;
    println!("\nrequested");
    tokio::time::sleep(LONG).await;
}
