//! A volume that is taken away while its writeback answers.

use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::conversion_message::Message as FromConversion;
use endio_api::writeback::{ExtentsRequest, ReadRequest, StatusRequest, WriteMode, WriteRequest};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::{Said, Tampering, Verdict};
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;

const MIB: u64 = 1 << 20;
const NAME: &str = "vol1";
const BLOCK: u64 = 4096;
/// Where nothing was ever written.
const HOLE: u64 = 8 * MIB;

async fn write(client: &Client, offset_bytes: u64, data: Vec<u8>, mode: WriteMode) {
    let request = WriteRequest {
        volume: NAME.to_owned(),
        offset_bytes,
        data: Bytes::from(data),
        mode: mode.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

/// One read as it is, without a second try.
async fn read(
    client: Client,
    offset_bytes: u64,
    length_bytes: u64,
) -> Result<Vec<u8>, tonic::Status> {
    let volume = NAME.to_owned();
    let request = ReadRequest { volume, offset_bytes, length_bytes, ..Default::default() };
    let mut answers = client.io().read(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = answers.message().await? {
        match piece.data.is_empty() {
            true => bytes.resize(bytes.len() + piece.zeroes_bytes as usize, 0),
            false => bytes.extend_from_slice(&piece.data),
        }
    }
    Ok(bytes)
}

/// A read waits for its turn while the volume is taken by force. What was dirty is discarded by then, and the
/// map that is remembered has a hole there: it must not be read, for the data is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_waited_while_its_volume_was_taken_does_not_see_a_hole() {
    let mut stack = Stack::start(1).await;
    let config = |name: &str| endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join(name),
        // Nothing is written out unless somebody waits for it.
        write_out_after_ms: 600_000,
        read_bytes_in_flight: 4 * MIB,
        read_cache_bytes: 0,
        io_timeout_ms: 20_000,
        ..Default::default()
    };
    let first = Writeback::start_with(config("first")).await;
    let second = Writeback::start_with(config("second")).await;
    let client = first.client();
    client.create(NAME, 16 * MIB, 1).await.unwrap();
    for piece in 0..4 {
        write(&client, piece * MIB, vec![1; MIB as usize], WriteMode::Direct).await;
    }
    // From here on the hole is known.
    assert_eq!(read(client.clone(), HOLE, 2 * BLOCK).await.unwrap(), vec![0; 8192]);
    write(&client, HOLE, vec![7; 4096], WriteMode::Buffered).await;
    client.flush(NAME).await.unwrap();
    assert_eq!(dirty_bytes(&client).await, BLOCK, "it is in the data log only");
    // All turns are taken by reads that find no store.
    stack.stores[0].crash().await;
    let waiting: Vec<_> =
        (0..4).map(|piece| tokio::spawn(read(client.clone(), piece * MIB, MIB))).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let late = tokio::spawn(read(client.clone(), HOLE, 2 * BLOCK));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!late.is_finished(), "it does not wait for the others");
    second.client().open(NAME, true).await.unwrap();
    for _ in 0..600 {
        if dirty_bytes(&client).await == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(dirty_bytes(&client).await, 0, "it has not heard of the takeover");
    stack.stores[0].start_again().await;
    stack.wait_for_stores(1).await;
    for read in waiting {
        let _ = read.await.unwrap();
    }
    let expected = [vec![7; 4096], vec![0; 4096]].concat();
    if let Ok(read) = late.await.unwrap() {
        assert!(read == expected, "a hole where data is durable");
    }
    let moved = second.client().with_patience(Duration::from_secs(30));
    assert_eq!(moved.read(NAME, HOLE, 2 * BLOCK).await.unwrap(), expected);
    moved.fsync(NAME).await.unwrap();
    moved.settles().await.unwrap();
}

async fn dirty_bytes(client: &Client) -> u64 {
    let status = client.inspect().status(StatusRequest { cluster: false }).await.unwrap();
    status.into_inner().dirty_bytes
}

/// What lies where in the volume, as one question is answered.
async fn extents(client: &Client, offset_bytes: u64) -> Result<usize, Refused> {
    let request = ExtentsRequest { volume: NAME.to_owned(), offset_bytes, length_bytes: BLOCK };
    let mut stream = client.inspect().extents(request).await?.into_inner();
    let mut told = 0;
    while let Some(message) = stream.message().await? {
        told += message.extents.len();
    }
    Ok(told)
}

/// A writeback that has not heard yet that its volume was taken: what is a hole in the map has data in the
/// cache of the next owner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_lost_a_volume_unheard_does_not_tell_where_it_has_holes() {
    let stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let config = |name: &str, conversion: &str| endio_writeback::Config {
        conversion: conversion.to_owned(),
        cache_dir: stack.directory.path().join(name),
        // Nothing is written out unless somebody waits for it.
        write_out_after_ms: 600_000,
        ..Default::default()
    };
    let first = Writeback::start_with(config("first", &between.url)).await;
    let second = Writeback::start_with(config("second", &stack.conversion.url)).await;
    let client = first.client();
    client.create(NAME, 16 * MIB, 1).await.unwrap();
    write(&client, 0, vec![1; 4096], WriteMode::Direct).await;
    assert_eq!(extents(&client, 0).await.unwrap(), 1);
    assert_eq!(extents(&client, HOLE).await.unwrap(), 1);
    between.judges(|said| match said {
        Said::ByConversion(FromConversion::Fenced(_)) => Verdict::Lose,
        _ => Verdict::PassOn,
    });
    second.client().open(NAME, true).await.unwrap();
    write(&second.client(), HOLE, vec![7; 4096], WriteMode::Buffered).await;
    for offset in [0, HOLE] {
        let told = extents(&client, offset).await;
        assert_eq!(told.map_err(|refused| refused.reason), Err(Reason::OldGeneration));
    }
    assert_eq!(extents(&second.client(), HOLE).await.unwrap(), 1);
}
