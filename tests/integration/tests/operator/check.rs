//! `endio check` says what it could not read, and leaves volumes as it found them.

use endio_api::conversion::CreateVolumeRequest;
use endio_api::writeback::{StatusRequest, VolumeRequest, WriteMode, WriteRequest};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;

const BLOCK: u64 = 4096;

async fn create(client: &Client, name: &str, replicas: u32) {
    let request = CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: 64 * BLOCK,
        replicas,
        ..CreateVolumeRequest::default()
    };
    client.create_as(request).await.unwrap();
}

/// Writes blocks with a gap after each, durably.
async fn write(client: &Client, volume: &str, blocks: u64) {
    for lblk in 0..blocks {
        let write = WriteRequest {
            volume: volume.to_owned(),
            offset_bytes: lblk * 2 * BLOCK,
            data: vec![7; 4096].into(),
            mode: WriteMode::Direct.into(),
            ..WriteRequest::default()
        };
        client.io().write(write).await.unwrap();
    }
}

async fn close(client: &Client, name: &str) {
    client.volumes().close(VolumeRequest { name: name.to_owned() }).await.unwrap();
}

async fn open_volumes(client: &Client) -> Vec<String> {
    let request = StatusRequest { cluster: false };
    let status = client.inspect().status(request).await.unwrap().into_inner();
    status.volumes.into_iter().map(|volume| volume.name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_on_a_store_that_is_away_are_found_once_for_each_volume() {
    let mut stack = Stack::start(2).await;
    let client = stack.client();
    for (name, blocks) in [("a", 5), ("b", 3)] {
        create(&client, name, 2).await;
        write(&client, name, blocks).await;
    }
    let whole = client.check(true).await.unwrap();
    assert_eq!((whole.findings, whole.blocks_verified), (Vec::new(), 16));

    stack.stores[1].stop().await;
    let check = client.check(true).await.unwrap();
    assert_eq!((check.blocks_verified, check.blocks_unreachable), (8, 8));
    // Which of the two registered first is nobody's concern.
    let expected = [1, 2].map(|store| {
        [("a", 5), ("b", 3)].map(|(volume, blocks)| {
            format!("volume {volume}: {blocks} blocks on store {store} cannot be reached")
        })
    });
    assert!(expected.iter().any(|expected| check.findings == *expected), "{:?}", check.findings);
    assert_eq!(check.volumes_not_read, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_reads_what_it_may_and_leaves_no_volume_open_that_it_opened() {
    let stack = Stack::start(1).await;
    let cache = stack.directory.path().join("other-cache");
    let other = Writeback::start(&stack.conversion.url, &cache).await;
    let (here, there) = (stack.client(), other.client());
    for name in ["empty", "free", "mine", "theirs"] {
        create(&here, name, 1).await;
    }
    write(&here, "free", 4).await;
    close(&here, "free").await;
    write(&here, "mine", 2).await;
    write(&there, "theirs", 8).await;

    let check = here.check(true).await.unwrap();
    assert_eq!((check.findings, check.blocks_verified), (Vec::new(), 6));
    assert_eq!((check.volumes_elsewhere, check.volumes_not_read), (vec!["theirs".to_owned()], 1));
    assert_eq!(open_volumes(&here).await, ["mine"]);
    // Whoever comes gets them, with what is in them.
    assert_eq!(there.read("free", 0, BLOCK).await.unwrap(), vec![7; 4096]);
    write(&there, "empty", 1).await;
    let check = there.check(true).await.unwrap();
    assert_eq!((check.findings, check.blocks_verified), (Vec::new(), 13));
    assert_eq!(check.volumes_elsewhere, ["mine"]);
}
