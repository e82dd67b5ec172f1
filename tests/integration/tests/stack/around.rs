//! Large buffered writes go straight to the stores, and the cache takes them where these do not.

use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::CheckRequest;
use endio_api::writeback::*;
use endio_integration_tests::raw;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;

const SIZE: u64 = 64 << 20;
const NAME: &str = "vol1";
const BLOCK: u64 = 4096;
/// Blocks of a write that is large.
const LARGE: u64 = 64;

/// A writeback that writes nothing out unless it is asked to.
async fn stack(patience_ms: u64) -> (Stack, Writeback) {
    let stack = Stack::start(1).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("other"),
        write_out_after_ms: 600_000,
        write_around_patience_ms: patience_ms,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    writeback.client().create(NAME, SIZE, 1).await.unwrap();
    (stack, writeback)
}

async fn write(client: &Client, block: u64, fill: u8, bytes: u64) {
    let request = WriteRequest {
        volume: NAME.to_owned(),
        offset_bytes: block * BLOCK,
        data: Bytes::from(vec![fill; bytes as usize]),
        mode: WriteMode::Buffered.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

async fn dirty_blocks(client: &Client) -> u64 {
    let status = client.inspect().status(StatusRequest { cluster: false }).await.unwrap();
    status.into_inner().dirty_bytes / BLOCK
}

/// What the blocks are filled with.
async fn fills(client: &Client, first: u64, blocks: u64) -> Vec<u8> {
    let read = client.read(NAME, first * BLOCK, blocks * BLOCK).await.unwrap();
    let of_a_block = |block: &[u8]| {
        assert!(block.iter().all(|byte| *byte == block[0]), "a block of two halves");
        block[0]
    };
    read.chunks(BLOCK as usize).map(of_a_block).collect()
}

async fn is_sound(stack: &Stack) {
    let checked = raw::conversion(&stack.conversion.url).check(CheckRequest {}).await.unwrap();
    assert_eq!(checked.into_inner().findings, Vec::<String>::new());
}

/// Whole blocks, enough of them, of which nothing is dirty: all else is the cache's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_write_is_converted_and_nothing_else_leaves_the_cache() {
    let (stack, mut writeback) = stack(60_000).await;
    let client = writeback.client();
    write(&client, 0, 1, LARGE * BLOCK).await;
    assert_eq!(dirty_blocks(&client).await, 0, "a large write");
    write(&client, LARGE, 2, (LARGE - 1) * BLOCK).await;
    assert_eq!(dirty_blocks(&client).await, LARGE - 1, "a smaller one");
    write(&client, 2 * LARGE, 3, LARGE * BLOCK + 1).await;
    assert_eq!(dirty_blocks(&client).await, 2 * LARGE, "a part of a block");
    // Over what is dirty: only the cache knows which is newer.
    write(&client, LARGE, 4, LARGE * BLOCK).await;
    assert_eq!(dirty_blocks(&client).await, 2 * LARGE + 1, "over dirty blocks");
    client.fsync(NAME).await.unwrap();
    assert_eq!(dirty_blocks(&client).await, 0);
    // Over what the cache log has, and is clean: a replay must not bring it back.
    write(&client, LARGE, 5, LARGE * BLOCK).await;
    assert_eq!(dirty_blocks(&client).await, 0, "over clean blocks");
    writeback.crash().await;
    writeback.start_again().await;
    let client = writeback.client();
    let expected = [vec![1; LARGE as usize], vec![5; LARGE as usize], vec![3; LARGE as usize]];
    assert_eq!(fills(&client, 0, 3 * LARGE).await, expected.concat());
    writeback.stop().await;
    is_sound(&stack).await;
}

/// Without stores a large write waits for them for its patience once; then the cache takes it, and those
/// behind it, and all is written out when a store is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cache_takes_large_writes_when_no_store_does() {
    let (mut stack, mut writeback) = stack(300).await;
    let client = writeback.client();
    write(&client, 0, 1, BLOCK).await;
    stack.stores[0].crash().await;
    for large in 1..4 {
        write(&client, large * LARGE, large as u8 + 1, LARGE * BLOCK).await;
    }
    assert_eq!(dirty_blocks(&client).await, 3 * LARGE + 1);
    // An acknowledged write is one, also if the writeback dies before a store comes.
    writeback.crash().await;
    stack.stores[0].start_again().await;
    writeback.start_again().await;
    let client = writeback.client().with_patience(Duration::from_secs(60));
    client.fsync(NAME).await.unwrap();
    assert_eq!(dirty_blocks(&client).await, 0);
    let expected = [vec![2; LARGE as usize], vec![3; LARGE as usize], vec![4; LARGE as usize]];
    assert_eq!(fills(&client, LARGE, 3 * LARGE).await, expected.concat());
    assert_eq!(fills(&client, 0, 1).await, [1]);
    writeback.stop().await;
    is_sound(&stack).await;
}
