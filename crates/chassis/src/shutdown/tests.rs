#![allow(clippy::unwrap_used)]

use super::*;

const LONG: Duration = Duration::from_secs(60);

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
