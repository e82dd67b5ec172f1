//! Small flushes: durable in conversion's data log before they are written out, and found there by
//! whoever opens the volume next.

use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::{CheckRequest, VolumeRequest};
use endio_api::writeback::*;
use endio_integration_tests::raw;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;

const SIZE: u64 = 16 << 20;
const NAME: &str = "vol1";
const BLOCK: u64 = 4096;

/// A writeback that writes nothing out unless it is asked to.
async fn lazy(stack: &Stack, name: &str, flush_log_bytes: u64) -> Writeback {
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join(name),
        write_out_after_ms: 600_000,
        flush_log_bytes,
        ..Default::default()
    };
    Writeback::start_with(config).await
}

async fn rig() -> (Stack, Writeback, Client) {
    let stack = Stack::start(1).await;
    let writeback = lazy(&stack, "lazy", 256 << 10).await;
    let client = writeback.client();
    client.create(NAME, SIZE, 1).await.unwrap();
    (stack, writeback, client)
}

async fn write(client: &Client, block: u64, fill: u8, blocks: u64) {
    let data = Bytes::from(vec![fill; (blocks * BLOCK) as usize]);
    let (volume, offset_bytes) = (NAME.to_owned(), block * BLOCK);
    let mode = WriteMode::Buffered.into();
    let request = WriteRequest { volume, offset_bytes, data, mode, ..Default::default() };
    client.io().write(request).await.unwrap();
}

async fn volume(stack: &Stack) -> endio_api::conversion::Volume {
    let request = VolumeRequest { name: NAME.to_owned() };
    raw::conversion(&stack.conversion.url).get_volume(request).await.unwrap().into_inner()
}

async fn logged(stack: &Stack) -> u64 {
    volume(stack).await.logged_blocks
}

/// Waits, bounded, until the log holds nothing.
async fn is_written_out(stack: &Stack) {
    for _ in 0..1_000 {
        if logged(stack).await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the log still holds {} blocks", logged(stack).await);
}

async fn first_bytes(client: &Client, blocks: u64) -> Vec<u8> {
    let read = client.read(NAME, 0, blocks * BLOCK).await.unwrap();
    read.chunks(BLOCK as usize)
        .map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]), "a block of two halves");
            block[0]
        })
        .collect()
}

async fn check(stack: &Stack) {
    let checked = raw::conversion(&stack.conversion.url).check(CheckRequest {}).await.unwrap();
    assert_eq!(checked.into_inner().findings, Vec::<String>::new());
}

async fn take(stack: &Stack, name: &str) -> (Writeback, Client) {
    let writeback =
        Writeback::start(&stack.conversion.url, &stack.directory.path().join(name)).await;
    let client = writeback.client();
    client.volumes().open(OpenRequest { name: NAME.into(), force: true }).await.unwrap();
    (writeback, client)
}

/// Also over a restart of conversion, and although no store is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_flush_waits_for_no_store_and_is_found_by_the_next_owner() {
    let (mut stack, _writeback, client) = rig().await;
    write(&client, 0, 1, 4).await;
    client.flush(NAME).await.unwrap();
    assert_eq!((logged(&stack).await, volume(&stack).await.mapped_blocks), (4, 0));
    stack.stores[0].device.close();
    write(&client, 2, 2, 1).await;
    client.flush(NAME).await.unwrap();
    // Not flushed: a takeover may lose it.
    write(&client, 3, 3, 1).await;
    stack.conversion.restart().await;
    assert_eq!(logged(&stack).await, 4);
    stack.stores[0].device.open();
    let (mut other, client) = take(&stack, "other").await;
    assert_eq!(first_bytes(&client, 5).await, [1, 1, 2, 1, 0]);
    is_written_out(&stack).await;
    assert_eq!(first_bytes(&client, 5).await, [1, 1, 2, 1, 0]);
    assert_eq!(volume(&stack).await.mapped_blocks, 4);
    check(&stack).await;
    other.stop().await;
}

/// What came after it is not undone by the log: buffered data, direct writes, trims, a shrink.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_newer_than_the_log_stays_over_a_takeover() {
    let (stack, _writeback, client) = rig().await;
    write(&client, 0, 1, 6).await;
    client.flush(NAME).await.unwrap();
    assert_eq!(logged(&stack).await, 6);
    let data = Bytes::from(vec![2; BLOCK as usize]);
    let (volume, mode) = (NAME.to_owned(), WriteMode::Direct.into());
    let direct = WriteRequest { volume, data, mode, ..Default::default() };
    client.io().write(direct).await.unwrap();
    let range = |block| RangeRequest {
        volume: NAME.into(),
        offset_bytes: block * BLOCK,
        length_bytes: BLOCK,
        ..Default::default()
    };
    client.io().trim(range(1)).await.unwrap();
    client.io().write_zeroes(range(2)).await.unwrap();
    // Data that was logged, and then written out after it was written over.
    write(&client, 7, 3, 1).await;
    client.flush(NAME).await.unwrap();
    write(&client, 7, 4, 1).await;
    client.flush(NAME).await.unwrap();
    let (mut other, client) = take(&stack, "other").await;
    assert_eq!(first_bytes(&client, 8).await, [2, 0, 0, 1, 1, 1, 0, 4]);
    write(&client, 3, 5, 1).await;
    client.flush(NAME).await.unwrap();
    let resize = ResizeRequest { name: NAME.into(), size_bytes: 5 * BLOCK, volume: 0 };
    client.volumes().resize(resize.clone()).await.unwrap();
    client.volumes().resize(ResizeRequest { size_bytes: SIZE, ..resize }).await.unwrap();
    assert_eq!(first_bytes(&client, 8).await, [2, 0, 0, 5, 1, 0, 0, 0]);
    other.stop().await;
    assert_eq!(logged(&stack).await, 0, "a stop writes everything out");
    check(&stack).await;
}

/// Many flushes go through a log that is much smaller than what they flush.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_makes_flushes_wait_and_fails_none() {
    let mut stack = Stack::start(1).await;
    stack.conversion.config.limits.log_blocks_per_volume_max = 8;
    stack.conversion.restart().await;
    stack.wait_for_stores(1).await;
    let writeback = lazy(&stack, "lazy", 256 << 10).await;
    let client = writeback.client().with_patience(Duration::from_secs(60));
    client.create(NAME, SIZE, 1).await.unwrap();
    let mut expected = vec![0; 64];
    for round in 1..=200_u64 {
        let (block, fill) = (round * 7 % 60, u8::try_from(round).unwrap());
        write(&client, block, fill, 1 + round % 5).await;
        expected[block as usize..(block + 1 + round % 5) as usize].fill(fill);
        client.flush(NAME).await.unwrap();
        assert!(logged(&stack).await <= 8);
    }
    let (mut other, client) = take(&stack, "other").await;
    assert_eq!(first_bytes(&client, 64).await, expected);
    check(&stack).await;
    other.stop().await;
}

/// One that is off waits for conversions, and so does one that is too large.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_log_does_not_take_is_written_out() {
    let (stack, _writeback, client) = rig().await;
    write(&client, 0, 1, 65).await;
    client.flush(NAME).await.unwrap();
    assert_eq!((logged(&stack).await, volume(&stack).await.mapped_blocks), (0, 65));
    let mut off = lazy(&stack, "off", 0).await;
    let client = off.client();
    client.volumes().open(OpenRequest { name: NAME.into(), force: true }).await.unwrap();
    write(&client, 70, 2, 1).await;
    client.flush(NAME).await.unwrap();
    assert_eq!((logged(&stack).await, volume(&stack).await.mapped_blocks), (0, 66));
    off.stop().await;
}

/// In place there may be older data on its way to the disk at any time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_written_in_place_have_no_log() {
    let (stack, _writeback, client) = rig().await;
    client.volumes().delete(DeleteRequest { name: NAME.into(), volume: 0 }).await.unwrap();
    let create = endio_api::conversion::CreateVolumeRequest {
        name: NAME.into(),
        size_bytes: SIZE,
        in_place: true,
        ..Default::default()
    };
    client.create_as(create).await.unwrap();
    write(&client, 0, 1, 1).await;
    client.flush(NAME).await.unwrap();
    assert_eq!((logged(&stack).await, volume(&stack).await.mapped_blocks), (0, 1));
}

/// A deleted volume takes its log along; a growable one grows by what is in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_with_its_volume_and_knows_how_far_it_grew() {
    let (stack, _writeback, client) = rig().await;
    write(&client, 0, 1, 4).await;
    client.flush(NAME).await.unwrap();
    client.volumes().delete(DeleteRequest { name: NAME.into(), volume: 0 }).await.unwrap();
    let create = endio_api::conversion::CreateVolumeRequest {
        name: NAME.into(),
        growable: true,
        ..Default::default()
    };
    client.create_as(create).await.unwrap();
    assert_eq!(logged(&stack).await, 0);
    let data = Bytes::from(vec![7; 5_000]);
    let (volume, mode) = (NAME.to_owned(), WriteMode::Buffered.into());
    let request = WriteRequest { volume, data, mode, ..Default::default() };
    client.io().write(request).await.unwrap();
    client.flush(NAME).await.unwrap();
    assert_eq!(logged(&stack).await, 2);
    let (mut other, client) = take(&stack, "other").await;
    let read = client.read(NAME, 0, 5_000).await.unwrap();
    assert!(read.len() == 5_000 && read.iter().all(|byte| *byte == 7));
    is_written_out(&stack).await;
    assert_eq!(self::volume(&stack).await.size_bytes, 5_000);
    check(&stack).await;
    other.stop().await;
}

/// Whoever flushes in an even rhythm finds the data on its way; nothing else is different.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_an_even_rhythm_data_is_logged_before_its_flush() {
    let (stack, _writeback, client) = rig().await;
    for block in 0..6 {
        write(&client, block, 1, 1).await;
        client.flush(NAME).await.unwrap();
    }
    assert_eq!(logged(&stack).await, 6);
    write(&client, 6, 2, 1).await;
    for _ in 0..1_000 {
        if logged(&stack).await == 7 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(logged(&stack).await, 7, "the write that a flush was to follow is not on its way");
    // The flush does not come: what is written next waits for one.
    write(&client, 7, 3, 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(logged(&stack).await, 7);
    client.flush(NAME).await.unwrap();
    assert_eq!(logged(&stack).await, 8);
    let (mut other, client) = take(&stack, "other").await;
    assert_eq!(first_bytes(&client, 9).await, [1, 1, 1, 1, 1, 1, 2, 3, 0]);
    is_written_out(&stack).await;
    check(&stack).await;
    other.stop().await;
}
