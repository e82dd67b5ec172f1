//! Calls that arrive, or may arrive, after their caller gave them up.

use endio_api::conversion::{
    BeginIo, CreateVolumeRequest, DescribeRequest, Lane, ListVolumesRequest, LookupRequest,
    OpenVolumeRequest, ReleaseSubmitter,
};
use endio_api::writeback::{DeleteRequest, RangeRequest, ResizeRequest, WriteMode, WriteRequest};
use endio_integration_tests::raw::{self, RawStore, RawWriteback};
use endio_integration_tests::services::{Conversion, Store};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;

const NAME: &str = "vol1";
const SIZE: u64 = 16 << 20;

/// Writes, again if need be: after a restart stores may not be back yet.
async fn write(client: &Client, fill: u8) {
    let write = WriteRequest {
        volume: NAME.into(),
        data: vec![fill; 65_536].into(),
        mode: WriteMode::Direct.into(),
        ..Default::default()
    };
    let mut refused = None;
    for _ in 0..100 {
        match client.io().write(write.clone()).await {
            Ok(_) => return,
            Err(status) => refused = Some(status),
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("not written: {refused:?}");
}

fn reason<T>(answer: Result<T, tonic::Status>) -> Option<Reason> {
    answer.err().map(|status| Refused::from(status).reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_from_before_a_deletion_creates_nothing() {
    let mut stack = Stack::start(1).await;
    let client = stack.client();
    let mut conversion = raw::conversion(&stack.conversion.url);
    let as_of = conversion.describe(DescribeRequest {}).await.unwrap().into_inner().deletions;
    let listed = client.volumes().list(ListVolumesRequest {}).await.unwrap().into_inner();
    assert!(as_of.is_some());
    assert_eq!(listed.as_of, as_of);
    let create = |as_of| CreateVolumeRequest {
        name: NAME.into(),
        size_bytes: SIZE,
        as_of,
        ..Default::default()
    };
    client.volumes().create(create(as_of)).await.unwrap();
    let delete = DeleteRequest { name: NAME.into(), volume: 0 };
    client.volumes().delete(delete.clone()).await.unwrap();
    // At conversion, where a call of a writeback may be late, and at a writeback that woke up late.
    assert_eq!(reason(conversion.create_volume(create(as_of)).await), Some(Reason::WrongState));
    let late = client.volumes().create(create(as_of)).await;
    assert_eq!(reason(late), Some(Reason::WrongState));
    assert_eq!(reason(client.volumes().delete(delete).await), Some(Reason::UnknownVolume));
    // Who wants it now gets it, also from a writeback that asked an older start of conversion.
    client.volumes().create(create(None)).await.unwrap();
    stack.conversion.restart().await;
    let again = CreateVolumeRequest { name: "vol2".into(), ..create(None) };
    client.create_as(again).await.unwrap();
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_names_a_deleted_volume_by_its_number_leaves_the_next_one_alone() {
    let mut stack = Stack::start(1).await;
    let client = stack.client();
    let first = client.create(NAME, SIZE, 1).await.unwrap().id;
    let delete = DeleteRequest { name: NAME.into(), volume: first };
    client.volumes().delete(delete.clone()).await.unwrap();
    let second = client.create(NAME, SIZE, 1).await.unwrap().id;
    write(&client, 7).await;
    assert_eq!(reason(client.volumes().delete(delete).await), Some(Reason::UnknownVolume));
    let resize = ResizeRequest { name: NAME.into(), size_bytes: 0, volume: first };
    assert_eq!(reason(client.volumes().resize(resize).await), Some(Reason::UnknownVolume));
    assert_eq!(client.read(NAME, 0, 65_536).await.unwrap(), vec![7; 65_536]);
    let delete = DeleteRequest { name: NAME.into(), volume: second };
    client.volumes().delete(delete).await.unwrap();
    stack.stop().await;
}

/// A trim and a resize are given up while conversion is away, and nobody knows what becomes of
/// them. A stop does not wait for that: the next start opens the volume under another generation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_wait_for_changes_that_were_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let mut conversion = Conversion::start(directory.path()).await;
    let store = Store::start(&conversion.url).await;
    let config = endio_writeback::Config {
        conversion: conversion.url.clone(),
        cache_dir: directory.path().join("cache"),
        io_timeout_ms: 2_000,
        // Less than this test waits for a stop.
        drain_deadline_ms: 10_000,
        ..Default::default()
    };
    let mut writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create(NAME, SIZE, 1).await.unwrap();
    write(&client, 7).await;
    conversion.stop().await;
    let trim = RangeRequest {
        volume: NAME.into(),
        offset_bytes: 0,
        length_bytes: 4096,
        ..Default::default()
    };
    assert_eq!(reason(client.io().trim(trim).await), Some(Reason::PeerAway));
    let resize = ResizeRequest { name: NAME.into(), size_bytes: SIZE / 2, volume: 0 };
    assert_eq!(reason(client.volumes().resize(resize).await), Some(Reason::PeerAway));
    writeback.stop().await;
    conversion.restart().await;
    writeback.restart().await;
    let client = writeback.client();
    write(&client, 8).await;
    assert_eq!(client.read(NAME, 0, 65_536).await.unwrap(), vec![8; 65_536]);
    client.settles().await.unwrap();
    writeback.stop().await;
    drop(store);
}

/// A store that is gone for good has not said that an aborted write in place to it cannot land any more:
/// there is no map to read by. Who only says which tries of changes are over wants none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tries_that_were_given_up_are_settled_while_a_write_in_place_may_still_land() {
    let directory = tempfile::tempdir().unwrap();
    let running = Conversion::start(directory.path()).await;
    let mut client = raw::conversion(&running.url);
    let mut store = RawStore::register(&running.url, 1 << 10).await;
    let (name, in_place) = (NAME.to_owned(), true);
    let create = CreateVolumeRequest { name, size_bytes: SIZE, in_place, ..Default::default() };
    client.create_volume(create).await.unwrap();
    let mut writeback = RawWriteback::connect(&running.url, "wb").await;
    let (name, owner) = (NAME.to_owned(), "wb".to_owned());
    let open = OpenVolumeRequest { name, writeback: owner, ..Default::default() };
    let opened = client.open_volume(open).await.unwrap().into_inner().volume.unwrap();
    let (volume, generation) = (opened.id, opened.generation);
    let lane: i32 = Lane::Direct.into();
    let begin = BeginIo { volume, generation, lane, blocks: 1, ..Default::default() };
    let first = writeback.begin(begin.clone()).await;
    for segment in &first.segments {
        store.release(segment.token.as_ref().unwrap()).await;
    }
    let submitter = first.submitter.unwrap();
    let io_end = submitter.io_end;
    writeback.release(submitter).await;
    assert_eq!(writeback.completion(io_end).await.reason, 0);
    // The overwrite goes where the block is, and is given up. The store says nothing any more.
    let token = writeback.begin(begin).await.submitter;
    let release = ReleaseSubmitter { token, abort: true, ..Default::default() };
    writeback.release_as(release).await;
    let look_up = |blocks, attempts_over| LookupRequest {
        volume,
        generation,
        lblk: 0,
        blocks,
        attempts_over,
    };
    let held = client.lookup(look_up(1, 3)).await;
    assert_eq!(reason(held), Some(Reason::Limit), "the block may still change");
    let settled = client.lookup(look_up(0, 3)).await.unwrap().into_inner();
    assert_eq!((settled.size_bytes, settled.extents.len()), (SIZE, 0));
    assert_eq!(reason(client.lookup(look_up(0, 0)).await), Some(Reason::Malformed));
}
