//! Clean blocks in the writeback's memory: read without the stores, and never older than the map.

use std::time::Duration;

use bytes::Bytes;
use endio_api::writeback::*;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;

const SIZE: u64 = 16 << 20;
const LEN: u64 = 64 << 10;
const NAME: &str = "vol1";

async fn stack() -> (Stack, Client) {
    let stack = Stack::start(1).await;
    let client = stack.client();
    client.create(NAME, SIZE, 1).await.unwrap();
    (stack, client)
}

async fn write(client: &Client, offset_bytes: u64, byte: u8, len: u64, mode: WriteMode) {
    let data = Bytes::from(vec![byte; usize::try_from(len).unwrap()]);
    let (volume, mode) = (NAME.to_owned(), mode.into());
    let request = WriteRequest { volume, offset_bytes, data, mode, ..Default::default() };
    client.io().write(request).await.unwrap();
}

fn range(offset_bytes: u64, length_bytes: u64) -> RangeRequest {
    RangeRequest { volume: NAME.into(), offset_bytes, length_bytes, ..Default::default() }
}

/// Reads in large and in small pieces, so that both are remembered.
async fn expect(client: &Client, expected: &[u8], what: &str) {
    for _ in 0..2 {
        let read = client.read(NAME, 0, expected.len() as u64).await.unwrap();
        assert!(read == expected, "{what}: a long read");
        for (at, block) in (0..).step_by(4096).zip(expected.chunks(4096)) {
            let read = client.read(NAME, at, block.len() as u64).await.unwrap();
            assert_eq!(read, block, "{what}: at {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_is_read_again_without_the_stores() {
    let (mut stack, client) = stack().await;
    for (at, mode) in [(0, WriteMode::Direct), (LEN, WriteMode::Buffered)] {
        write(&client, at, 7, LEN, mode).await;
    }
    client.fsync(NAME).await.unwrap();
    let data = vec![7; 2 * LEN as usize];
    expect(&client, &data, "written").await;
    stack.stores[0].stop().await;
    expect(&client.clone().with_patience(Duration::from_secs(5)), &data, "without a store").await;
}

/// Every way in which the map of a block changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_read_at_once_whatever_was_remembered() {
    let (stack, client) = stack().await;
    let mut expected = vec![0; LEN as usize];
    expect(&client, &expected, "nothing written").await;
    for round in 0..3_u8 {
        write(&client, 0, 1 + round, LEN, WriteMode::Direct).await;
        expected.fill(1 + round);
        expect(&client, &expected, "direct").await;
        write(&client, 4096, 11 + round, 8192, WriteMode::Buffered).await;
        expected[4096..12_288].fill(11 + round);
        expect(&client, &expected, "buffered").await;
        client.fsync(NAME).await.unwrap();
        expect(&client, &expected, "fsync").await;
        write(&client, 5000, 21 + round, 100, WriteMode::Buffered).await;
        expected[5000..5100].fill(21 + round);
        client.fsync(NAME).await.unwrap();
        expect(&client, &expected, "part of a block").await;
        client.io().trim(range(16_384, 8192)).await.unwrap();
        expected[16_384..24_576].fill(0);
        expect(&client, &expected, "trim").await;
        client.io().write_zeroes(range(30_000, 10_000)).await.unwrap();
        expected[30_000..40_000].fill(0);
        expect(&client, &expected, "write_zeroes").await;
        for size_bytes in [LEN / 2, SIZE] {
            let request = ResizeRequest { name: NAME.into(), size_bytes, volume: 0 };
            client.volumes().resize(request).await.unwrap();
        }
        expected[LEN as usize / 2..].fill(0);
        expect(&client, &expected, "smaller and larger again").await;
    }
    client.volumes().delete(DeleteRequest { name: NAME.into(), volume: 0 }).await.unwrap();
    client.create(NAME, SIZE, 1).await.unwrap();
    expected.fill(0);
    expect(&client, &expected, "another volume of the name").await;
    drop(stack);
}

/// Who has lost the volume does not answer from memory what another has overwritten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_takeover_nothing_old_is_read_from_memory() {
    let (stack, first) = stack().await;
    write(&first, 0, 1, LEN, WriteMode::Direct).await;
    expect(&first, &[1; LEN as usize], "written").await;
    let other = Writeback::start(&stack.conversion.url, &stack.directory.path().join("2")).await;
    let second = other.client();
    let mut opened = second.open(NAME, true).await;
    for _ in 0..200 {
        if opened.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        opened = second.open(NAME, true).await;
    }
    opened.unwrap();
    write(&second, 0, 2, LEN, WriteMode::Direct).await;
    let impatient = first.with_patience(Duration::from_millis(10));
    let old = impatient.read(NAME, 0, 4096).await;
    assert!(old.is_err(), "{old:?}");
    expect(&second, &[2; LEN as usize], "the second's").await;
}

/// A cache that is smaller than what is read stays right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_cache_and_none_read_the_same() {
    let stack = Stack::start(1).await;
    for (number, read_cache_bytes) in [(1_u8, 0), (2, 8192)] {
        let config = endio_writeback::Config {
            conversion: stack.conversion.url.clone(),
            cache_dir: stack.directory.path().join("the-same"),
            read_cache_bytes,
            ..endio_writeback::Config::default()
        };
        let mut writeback = Writeback::start_with(config).await;
        let client = writeback.client();
        if number == 1 {
            client.create(NAME, SIZE, 1).await.unwrap();
        }
        write(&client, 0, number, LEN, WriteMode::Buffered).await;
        client.fsync(NAME).await.unwrap();
        expect(&client, &[number; LEN as usize], "all").await;
        write(&client, 0, 9, 4096, WriteMode::Direct).await;
        let read = client.read(NAME, 0, 8192).await.unwrap();
        assert!(read[..4096] == [9; 4096] && read[4096..] == [number; 4096]);
        writeback.stop().await;
    }
}
