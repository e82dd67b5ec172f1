//! Volumes that grow and shrink by the byte, against bytes in memory.

use bytes::Bytes;
use endio_api::blockstore::Bio;
use endio_api::blockstore::block_store_client::BlockStoreClient;
use endio_api::common::{ExtentState, Reason as WireReason};
use endio_api::conversion::{
    BeginIo, CreateVolumeRequest, Lane, OpenVolumeRequest, ReleaseSubmitter,
};
use endio_api::writeback::{ExtentsRequest, RangeRequest, ResizeRequest, WriteMode, WriteRequest};
use endio_integration_tests::hostile::channel;
use endio_integration_tests::raw::{RawWriteback, conversion};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::{Client, Refused};
use endio_testkit::seed::{self, Rng};
use endio_types::Reason;

const NAME: &str = "vol1";
/// No volume gets longer.
const SIZE_MAX: u64 = 96 << 10;
const WRITE_MAX: u64 = 10_000;
const STEPS: u64 = 250;

/// The volume, and what it must hold.
struct Growing {
    client: Client,
    model: Vec<u8>,
    rng: Rng,
}

impl Growing {
    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    async fn write(&mut self, step: u64) {
        let mut offset = self.rng.below(SIZE_MAX - WRITE_MAX).min(self.size() + 5_000);
        let mut length = self.rng.between(1, WRITE_MAX);
        if self.rng.chance(40) {
            // Around the end, in its last blocks.
            offset = self.size().saturating_sub(self.rng.below(8_000)).min(SIZE_MAX - WRITE_MAX);
            length = self.rng.between(1, 8_000);
        }
        let data = vec![(step % 255) as u8 + 1; length as usize];
        let end = (offset + length) as usize;
        if end > self.model.len() {
            self.model.resize(end, 0);
        }
        self.model[offset as usize..end].copy_from_slice(&data);
        let mode = if self.rng.chance(50) { WriteMode::Buffered } else { WriteMode::Direct };
        let request = WriteRequest {
            volume: NAME.to_owned(),
            offset_bytes: offset,
            data: data.into(),
            mode: mode.into(),
            ..Default::default()
        };
        self.client.io().write(request).await.unwrap();
    }

    async fn resize(&mut self) {
        let mut size_bytes = self.rng.below(SIZE_MAX);
        if self.rng.chance(30) {
            size_bytes -= size_bytes % 4096;
        }
        self.model.resize(size_bytes as usize, 0);
        let request = ResizeRequest { name: NAME.to_owned(), size_bytes, volume: 0 };
        let resized = self.client.volumes().resize(request).await.unwrap().into_inner();
        assert_eq!(resized.size_bytes, size_bytes);
    }

    async fn zero(&mut self) {
        let offset = self.rng.below(self.size());
        let length = self.rng.between(1, self.size() - offset);
        self.model[offset as usize..(offset + length) as usize].fill(0);
        let range = RangeRequest {
            volume: NAME.to_owned(),
            offset_bytes: offset,
            length_bytes: length,
            ..Default::default()
        };
        self.client.io().write_zeroes(range).await.unwrap();
    }

    async fn check(&self, offset: u64, length: u64) {
        let read = self.client.read(NAME, offset, length).await.unwrap();
        let meant = &self.model[offset as usize..(offset + length) as usize];
        let differs = read.iter().zip(meant).position(|(read, meant)| read != meant);
        assert_eq!((read.len(), differs), (meant.len(), None), "from {offset} of {}", self.size());
    }

    async fn step(&mut self, step: u64) {
        match self.rng.below(10) {
            0..4 => self.write(step).await,
            4..6 => self.resize().await,
            6 if self.size() > 0 => self.zero().await,
            7 => self.client.fsync(NAME).await.unwrap(),
            _ if self.size() > 0 => {
                let offset = self.rng.below(self.size());
                let length = self.rng.between(1, self.size() - offset);
                self.check(offset, length).await;
            }
            _ => {}
        }
    }
}

async fn grows_and_shrinks(in_place: bool) {
    let mut rng = Rng::new(seed::announce("endio-integration-tests", "grows_and_shrinks"));
    let mut stack = Stack::start(1).await;
    let client = stack.client();
    let name = NAME.to_owned();
    let request = CreateVolumeRequest { name, growable: true, in_place, ..Default::default() };
    client.create_as(request).await.unwrap();
    let mut growing = Growing { client, model: Vec::new(), rng: rng.fork() };
    for step in 0..STEPS {
        if rng.chance(5) {
            match rng.chance(50) {
                true => stack.writeback.restart().await,
                false => {
                    stack.writeback.crash().await;
                    stack.writeback.start_again().await;
                }
            }
            growing.client = stack.client();
        }
        growing.step(step).await;
    }
    if growing.size() > 0 {
        growing.check(0, growing.size()).await;
    }
    let checked = growing.client.settles().await.unwrap();
    assert_eq!(checked.findings, Vec::<String>::new());
    stack.stop().await;
}

/// A size is exact to the byte, what is cut off never comes back, and a gap reads as zeroes, also
/// when the writeback ends between, in order or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_grows_and_shrinks_holds_what_was_written_and_zeroes() {
    grows_and_shrinks(false).await;
}

/// The same, overwritten in place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_in_place_that_grows_and_shrinks_holds_what_was_written_and_zeroes() {
    grows_and_shrinks(true).await;
}

/// The states of all blocks of the volume.
async fn states(client: &Client) -> Vec<ExtentState> {
    let request = ExtentsRequest { volume: NAME.to_owned(), ..Default::default() };
    let mut stream = client.inspect().extents(request).await.unwrap().into_inner();
    let mut states = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        for extent in message.extents {
            states.extend((0..extent.blocks).map(|_| extent.state()));
        }
    }
    states
}

/// What was acknowledged and extends the volume is not converted yet: conversion knows a volume that ends before
/// the range.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_before_an_extension_that_is_not_written_out_is_trimmed_zeroed_and_allocated() {
    const BLOCK: u64 = 4096;
    let mut stack = Stack::start(1).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("patient"),
        // Nothing is written out unless somebody waits for it.
        write_out_after_ms: 600_000,
        ..Default::default()
    };
    let mut writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    let create =
        CreateVolumeRequest { name: NAME.to_owned(), growable: true, ..Default::default() };
    client.create_as(create).await.unwrap();
    let range = |first: u64, blocks: u64| RangeRequest {
        volume: NAME.to_owned(),
        offset_bytes: first * BLOCK,
        length_bytes: blocks * BLOCK,
        ..Default::default()
    };
    let write = async |at: u64, fill: u8| {
        let request = WriteRequest {
            volume: NAME.to_owned(),
            offset_bytes: at * BLOCK,
            data: vec![fill; BLOCK as usize].into(),
            mode: WriteMode::Buffered.into(),
            ..Default::default()
        };
        client.io().write(request).await.unwrap();
    };
    let (hole, delayed) = (ExtentState::Hole, ExtentState::Delayed);
    let (written, unwritten) = (ExtentState::Written, ExtentState::Unwritten);
    write(16, 1).await;
    client.io().trim(range(0, 16)).await.unwrap();
    client.io().write_zeroes(range(0, 16)).await.unwrap();
    assert_eq!(states(&client).await, [vec![hole; 16], vec![delayed]].concat());
    // Zeroes over data that is in the cache only, before data that stays there.
    write(4, 2).await;
    client.io().write_zeroes(range(0, 12)).await.unwrap();
    let now = states(&client).await;
    assert_eq!((now[4], now[16]), (unwritten, delayed));
    // What is allocated has to lie inside what conversion knows.
    client.io().allocate(range(0, 17)).await.unwrap();
    assert_eq!(states(&client).await, [vec![unwritten; 16], vec![written]].concat());
    let data = client.read(NAME, 0, 17 * BLOCK).await.unwrap();
    assert!(data[..16 << 12].iter().all(|byte| *byte == 0), "zeroes");
    assert!(data[16 << 12..].iter().all(|byte| *byte == 1), "the data stays");
    let beyond = client.io().trim(range(0, 18)).await.unwrap_err();
    assert_eq!(Refused::from(beyond).reason, Reason::OutOfRange);
    let checked = client.settles().await.unwrap();
    assert_eq!(checked.findings, Vec::<String>::new());
    writeback.stop().await;
    stack.stop().await;
}

/// A writeback whose data stays in the cache and its log.
async fn lazy(stack: &Stack) -> Writeback {
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("lazy"),
        write_out_after_ms: 600_000,
        ..Default::default()
    };
    Writeback::start_with(config).await
}

async fn create_growable(client: &Client, in_place: bool) {
    let name = NAME.to_owned();
    let create = CreateVolumeRequest { name, growable: true, in_place, ..Default::default() };
    client.create_as(create).await.unwrap();
}

async fn put(client: &Client, offset_bytes: u64, length: usize, fill: u8, mode: WriteMode) {
    let request = WriteRequest {
        volume: NAME.to_owned(),
        offset_bytes,
        data: vec![fill; length].into(),
        mode: mode.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

/// The record that extended the volume goes when all its blocks are written again: the newer one, which ends
/// before, says where the last block ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_size_outlives_the_record_that_said_it() {
    let mut stack = Stack::start(1).await;
    let mut writeback = lazy(&stack).await;
    let client = writeback.client();
    create_growable(&client, false).await;
    put(&client, 0, 5_000, 1, WriteMode::Buffered).await;
    put(&client, 0, 4_500, 2, WriteMode::Buffered).await;
    writeback.crash().await;
    writeback.start_again().await;
    let client = writeback.client();
    let read = client.read(NAME, 0, 5_000).await.unwrap();
    assert_eq!(read, [vec![2; 4_500], vec![1; 500]].concat());
    client.fsync(NAME).await.unwrap();
    client
        .volumes()
        .close(endio_api::writeback::VolumeRequest { name: NAME.to_owned() })
        .await
        .unwrap();
    assert_eq!(stack.client().read(NAME, 4_499, 501).await.unwrap()[1..], [1; 500]);
    writeback.stop().await;
    stack.stop().await;
}

/// A write in place that fails may have left its data in the volume's last block, behind the end. Whatever size
/// the volume gets next, what lies behind that is zeroes when it grows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_write_in_place_left_behind_the_end_does_not_come_back() {
    for sizes in [[50, 4_096], [100, 4_096], [150, 4_096]] {
        let mut stack = Stack::start(1).await;
        let client = stack.client();
        create_growable(&client, true).await;
        put(&client, 0, 100, 1, WriteMode::Direct).await;
        fails_in_place(&stack).await;
        client.open(NAME, true).await.unwrap();
        for size_bytes in sizes {
            let request = ResizeRequest { name: NAME.to_owned(), size_bytes, volume: 0 };
            client.volumes().resize(request).await.unwrap();
        }
        let read = client.read(NAME, sizes[0], 4_096 - sizes[0]).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 0), "behind byte {}: {read:?}", sizes[0]);
        let checked = client.settles().await.unwrap();
        assert_eq!(checked.findings, Vec::<String>::new());
        stack.stop().await;
    }
}

/// Somebody takes the volume, has 300 bytes written over its first block, and gives that up.
async fn fails_in_place(stack: &Stack) {
    let url = &stack.conversion.url;
    let mut other = RawWriteback::connect(url, "other").await;
    let (name, writeback) = (NAME.to_owned(), "other".to_owned());
    let open = OpenVolumeRequest { name, writeback, force: true, ..Default::default() };
    let opened = conversion(url).open_volume(open).await.unwrap().into_inner();
    let volume = opened.volume.unwrap();
    let begin = BeginIo {
        volume: volume.id,
        generation: volume.generation,
        lane: Lane::Direct.into(),
        blocks: 1,
        size_after_bytes: 300,
        ..Default::default()
    };
    let begun = other.begin(begin).await;
    let token = begun.segments[0].token.clone();
    let data: Bytes = [vec![9; 300], vec![0; 3_796]].concat().into();
    let crc32c = vec![crc32c::crc32c(&data)];
    let bio = Bio { token, data, crc32c, traceparent: String::new() };
    let mut store = BlockStoreClient::new(channel(&stack.stores[0].url));
    let mut answers = store.write(tokio_stream::iter([bio])).await.unwrap().into_inner();
    let landed = answers.message().await.unwrap().unwrap();
    assert_eq!(landed.reason(), WireReason::Unspecified);
    let io_end = begun.submitter.as_ref().map_or(0, |token| token.io_end);
    let release = ReleaseSubmitter { token: begun.submitter, abort: true, ..Default::default() };
    assert_eq!(other.release_as(release).await, WireReason::Unspecified);
    assert_ne!(other.completion(io_end).await.reason(), WireReason::Unspecified);
}
