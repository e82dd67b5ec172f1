//! Volumes that grow and shrink by the byte, against bytes in memory.

use endio_api::common::ExtentState;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::writeback::{ExtentsRequest, RangeRequest, ResizeRequest, WriteMode, WriteRequest};
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
        let offset = self.rng.below(SIZE_MAX - WRITE_MAX).min(self.size() + 5_000);
        let length = self.rng.between(1, WRITE_MAX);
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
        if rng.chance(2) {
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
