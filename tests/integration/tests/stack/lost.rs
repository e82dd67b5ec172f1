//! Volumes that are taken while their writeback does not hear of it.

use bytes::Bytes;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::conversion::conversion_message::Message as FromConversion;
use endio_api::writeback::{ExtentsRequest, WriteMode, WriteRequest};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::{Said, Tampering, Verdict};
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Where the first owner never wrote.
const HOLE: u64 = 8 * MIB;

async fn write(client: &Client, volume: &str, offset_bytes: u64, mode: WriteMode) {
    let request = WriteRequest {
        volume: volume.to_owned(),
        offset_bytes,
        data: Bytes::from(vec![7; BLOCK as usize]),
        mode: mode.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

/// How many extents a block is told to have, as the question is answered once.
async fn extents(client: &Client, name: &str, offset_bytes: u64) -> Result<usize, Reason> {
    let volume = name.to_owned();
    let request = ExtentsRequest { volume, offset_bytes, length_bytes: BLOCK };
    let told = async {
        let mut stream = client.inspect().extents(request).await?.into_inner();
        let mut told = 0;
        while let Some(message) = stream.message().await? {
            told += message.extents.len();
        }
        Ok(told)
    };
    told.await.map_err(|status: tonic::Status| Refused::from(status).reason)
}

/// What is a hole in the map has data in the cache of the next owner, and what is in the cache here may be
/// anything there.
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
    client.create("fixed", 16 * MIB, 1).await.unwrap();
    write(&client, "fixed", 0, WriteMode::Direct).await;
    let (name, growable) = ("growing".to_owned(), true);
    client.create_as(CreateVolumeRequest { name, growable, ..Default::default() }).await.unwrap();
    // Conversion does not know yet that it is longer than nothing.
    write(&client, "growing", HOLE, WriteMode::Buffered).await;
    let questions = [("fixed", 0), ("fixed", HOLE), ("growing", 0), ("growing", HOLE)];
    for (name, offset) in questions {
        assert_eq!(extents(&client, name, offset).await, Ok(1), "{name} at {offset}");
    }
    between.judges(|said| match said {
        Said::ByConversion(FromConversion::Fenced(_)) => Verdict::Lose,
        _ => Verdict::PassOn,
    });
    for name in ["fixed", "growing"] {
        second.client().open(name, true).await.unwrap();
        write(&second.client(), name, HOLE, WriteMode::Buffered).await;
    }
    for (name, offset) in questions {
        let told = extents(&client, name, offset).await;
        assert_eq!(told, Err(Reason::OldGeneration), "{name} at {offset}");
        assert_eq!(extents(&second.client(), name, offset).await, Ok(1));
    }
}
