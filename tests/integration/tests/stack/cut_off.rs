//! Stores that are cut off, gone for good, or wrong about what is durable.

use std::time::Duration;

use endio_api::conversion::ListIoEndsRequest;
use endio_api::writeback::{FsyncRequest, WriteMode};
use endio_integration_tests::line::Line;
use endio_integration_tests::services::{Conversion, Store};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_store::block::DeviceFault;
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;

use crate::faults::{VOLUME_BYTES, direct, place_of, read_once, write};

/// Waits, bounded, until a store holds a token.
async fn wait_for_a_token(client: &Client) {
    for _ in 0..500 {
        let listed = client.inspect().io_ends(ListIoEndsRequest::default()).await.unwrap();
        if listed.into_inner().io_ends.iter().any(|io_end| !io_end.held.is_empty()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no write began");
}

/// Scenario 41. While an fsync waits, the store with its data is cut off from conversion for longer than
/// its lease: its token expires. Where another store is there the write begins again and the fsync
/// succeeds; where none is, it says that it did not. In either case its success means data on a store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_fsync_whose_token_expires_succeeds_elsewhere_or_says_that_it_did_not() {
    for is_alone in [false, true] {
        fsync_over_a_store_that_is_cut_off(is_alone).await;
    }
}

async fn fsync_over_a_store_that_is_cut_off(is_alone: bool) {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("conversion");
    let mut config = endio_conversion::Config { data_dir, ..Default::default() };
    config.limits.lease_ms = 1_000;
    let conversion = Conversion::start_with(config).await;
    let line = Line::start(&conversion.url).await;
    let held = Store::start(&line.url).await;
    let config = endio_writeback::Config {
        conversion: conversion.url.clone(),
        cache_dir: directory.path().join("cache"),
        io_timeout_ms: if is_alone { 4_000 } else { 60_000 },
        // Nothing is written out unless somebody waits for it, and a read reaches the stores.
        write_out_after_ms: 600_000,
        read_cache_bytes: 0,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    direct(&client, 1 << 20, &[1; 4096]).await;
    let first = place_of(&client, 256).await;
    write(&client, 0, &[3; 4096], WriteMode::Buffered).await.unwrap();
    held.device.close();
    // Tried once: nobody asks again for what it says.
    let fsync = || {
        let (mut io, volume) = (client.io(), "vol1".to_owned());
        async move { io.fsync(FsyncRequest { volume, may_log: false, ..Default::default() }).await }
    };
    let waiting = tokio::spawn(fsync());
    wait_for_a_token(&client).await;
    let elsewhere = match is_alone {
        true => None,
        false => Some(Store::start(&conversion.url).await),
    };
    line.cut();
    let told = tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap();
    match (&elsewhere, told) {
        (Some(_), told) => {
            told.unwrap();
            let places = place_of(&client, 0).await;
            assert_eq!(places.len(), 1);
            assert_ne!(places[0].0, first[0].0, "the store that holds it is cut off");
            assert_eq!(client.read("vol1", 0, 4096).await.unwrap(), vec![3; 4096]);
        }
        (None, told) => {
            let refused: Refused = told.expect_err("nothing was written").into();
            assert_ne!(refused.reason, Reason::Malformed, "{refused}");
            assert_eq!(place_of(&client, 0).await, [], "it is on no store");
        }
    }
    held.device.open();
    line.mend();
    let mut failures = 0;
    while let Err(status) = fsync().await {
        // What went on after the first was told may have failed as well; then no more.
        failures += 1;
        assert!(is_alone && failures <= 2, "the error sticks: {status}");
    }
    assert_eq!(place_of(&client, 0).await.len(), 1);
    assert_eq!(client.read("vol1", 0, 4096).await.unwrap(), vec![3; 4096]);
    client.settles().await.unwrap();
}

/// A store that is gone for good takes with it what no other one has: who reads that is told, and nobody
/// is given anything else. Everything else goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_lost_store_had_is_an_error_and_the_rest_is_served() {
    let mut stack = Stack::start(1).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("impatient"),
        // Longer than the lease of the lost store, so that new writes find the other one.
        io_timeout_ms: 8_000,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    direct(&client, 0, &[5; 4096]).await;
    stack.stores.push(Store::start(&stack.conversion.url).await);
    stack.wait_for_stores(2).await;
    stack.stores[0].crash().await;
    let refused = read_once(&client, 0).await.unwrap_err();
    assert_eq!(refused.reason, Reason::PeerAway, "{refused}");
    direct(&client, 1 << 20, &[6; 4096]).await;
    assert_eq!(read_once(&client, 1 << 20).await.unwrap(), vec![6; 4096]);
    assert_eq!(read_once(&client, 2 << 20).await.unwrap(), vec![0; 4096]);
    // Written anew, it is there again.
    direct(&client, 0, &[7; 4096]).await;
    assert_eq!(read_once(&client, 0).await.unwrap(), vec![7; 4096]);
}

/// A device that calls durable what is not takes a write with it that was acknowledged. What is left in
/// its place is not returned as data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_store_wrongly_called_durable_is_refused_once_it_is_gone() {
    let mut stack = Stack::start(1).await;
    let client = stack.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    direct(&client, 0, &[1; 4096]).await;
    stack.stores[0].device.memory.inject(DeviceFault::LyingFlush);
    direct(&client, 0, &[2; 4096]).await;
    stack.stores[0].crash().await;
    stack.stores[0].device.memory.lose_power();
    stack.stores[0].start_again().await;
    // Waits until the store is back.
    let refused = read_once(&client, 0).await.unwrap_err();
    assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused}");
}
