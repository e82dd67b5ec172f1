//! One block-store under test and its clients.

use std::{path::Path, sync::Arc};

use endio_api::blockstore::{
    Bio, BioDone, DescribeRequest, DescribeResponse, ReadDone, ReadRequest,
    block_store_client::BlockStoreClient,
};
use endio_block_store::{Config, Deps, Running, StartError, start, start_on};
use endio_chassis::{
    net::{Dialer, ListenAddr, Listener},
    recorder::Recorder,
    shutdown::Shutdown,
    telemetry,
};
use endio_store::block::{BlockDevice, Superblock};
use endio_types::{BLOCK_SIZE, Incarnation, Reason};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::fake::{FakeConversion, FakeSession, Want, grant, token, within};

pub struct Store {
    pub running: Running,
    pub shutdown: Shutdown,
    pub client: BlockStoreClient<Channel>,
    pub channel: Channel,
    pub recorder: Recorder,
}

async fn deps() -> (Deps, Shutdown, Recorder) {
    let recorder = telemetry::init(&telemetry::TelemetryConfig::default(), "test").unwrap();
    let listener = Listener::bind(&ListenAddr::loopback()).await.unwrap();
    let shutdown = Shutdown::new();
    let dialer = Dialer::default();
    let deps = Deps { listener, dialer, recorder: recorder.clone(), shutdown: shutdown.clone() };
    (deps, shutdown, recorder)
}

pub fn config(conversion: &FakeConversion) -> Config {
    Config { conversion: conversion.url.clone(), drain_timeout_ms: 2_000, ..Config::default() }
}

impl Store {
    fn over(running: Running, shutdown: Shutdown, recorder: Recorder) -> Self {
        let channel = Dialer::default().channel(&running.url()).unwrap();
        let client = BlockStoreClient::new(channel.clone())
            .max_decoding_message_size(8 << 20)
            .max_encoding_message_size(16 << 20);
        Self { running, shutdown, client, channel, recorder }
    }

    /// On a device, in its first incarnation.
    pub async fn on(config: Config, device: Arc<dyn BlockDevice>) -> Self {
        let (deps, shutdown, recorder) = deps().await;
        let superblock = Superblock {
            sequence: 2,
            uuid: [5; 16],
            incarnation: Incarnation(1),
            capacity_blocks: device.capacity_blocks(),
        };
        let running = start_on(config, deps, device, superblock).await.unwrap();
        Self::over(running, shutdown, recorder)
    }

    /// In a directory.
    pub async fn in_dir(config: Config, dir: &Path) -> Result<Self, StartError> {
        let (deps, shutdown, recorder) = deps().await;
        let config = Config { data_dir: dir.to_owned(), ..config };
        let running = start(config, deps).await?;
        Ok(Self::over(running, shutdown, recorder))
    }

    pub async fn writes(&mut self) -> Writes {
        let (to, bios) = mpsc::channel(64);
        let answers = self.client.write(ReceiverStream::new(bios)).await.unwrap().into_inner();
        Writes { to, answers }
    }

    /// One write on a stream of its own.
    pub async fn write(&mut self, want: Want, data: Vec<u8>) -> BioDone {
        let mut writes = self.writes().await;
        writes.send(bio(want, data)).await;
        writes.next().await
    }

    pub async fn bio(&mut self, bio: Bio) -> BioDone {
        let mut writes = self.writes().await;
        writes.send(bio).await;
        writes.next().await
    }

    pub async fn read(&mut self, request: ReadRequest) -> ReadDone {
        let requests = tokio_stream::iter([request]);
        let mut answers = self.client.read(requests).await.unwrap().into_inner();
        within("a read", answers.message()).await.unwrap().unwrap()
    }

    /// Reads under the current grant.
    pub async fn read_blocks(&mut self, pblk: u64, blocks: u32, crc32c: Vec<u32>) -> ReadDone {
        let grant = Some(grant(1, 1));
        self.read(ReadRequest { request: 9, grant, pblk, blocks, crc32c, ..Default::default() })
            .await
    }

    pub async fn describe(&mut self) -> DescribeResponse {
        self.client.describe(DescribeRequest {}).await.unwrap().into_inner()
    }

    pub async fn stop(self) {
        self.shutdown.request();
        within("the stop", self.running.wait()).await.unwrap();
    }
}

pub struct Writes {
    pub to: mpsc::Sender<Bio>,
    pub answers: Streaming<BioDone>,
}

impl Writes {
    pub async fn send(&self, bio: Bio) {
        self.to.send(bio).await.unwrap();
    }
    pub async fn next(&mut self) -> BioDone {
        within("an answer", self.answers.message()).await.unwrap().unwrap()
    }
}

/// A registered store over `device`.
pub async fn ready(device: Arc<dyn BlockDevice>) -> (FakeConversion, Store, FakeSession) {
    let mut conversion = FakeConversion::start().await;
    let store = Store::on(config(&conversion), device).await;
    let session = conversion.registered(1).await;
    (conversion, store, session)
}

pub fn crcs(data: &[u8]) -> Vec<u32> {
    data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect()
}

pub fn bio(want: Want, data: Vec<u8>) -> Bio {
    let crc32c = crcs(&data);
    Bio { token: Some(token(want)), data: data.into(), crc32c, traceparent: String::new() }
}

/// Blocks full of one byte.
pub fn blocks(byte: u8, count: usize) -> Vec<u8> {
    vec![byte; count * BLOCK_SIZE]
}

pub fn reason(number: i32) -> Option<Reason> {
    Reason::from_wire(number)
}
