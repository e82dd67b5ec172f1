//! A store that is live to conversion, and to writebacks no more than an open port.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use endio_api::blockstore::block_store_server::{BlockStore, BlockStoreServer};
use endio_api::blockstore::{
    Bio, BioDone, DescribeRequest, DescribeResponse, ReadDone, ReadRequest,
};
use endio_api::conversion::store_command::Command;
use endio_api::conversion::store_message::Message as FromStore;
use endio_api::conversion::{
    FenceDone, PunchDone, RegisterStore, StoreBatch, StoreMessage, StoreReady, StoreRenew,
};
use endio_api::writeback::WriteMode;
use endio_chassis::net::{Incoming, Listener};
use endio_chassis::server::ServerConfig;
use endio_integration_tests::raw;
use endio_integration_tests::services::{Conversion, STORE_BLOCKS, Store};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;
use futures_util::future::join_all;
use futures_util::{Stream, StreamExt as _, stream};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::faults::{VOLUME_BYTES, write};

/// Pause between two renewals of the store's lease.
const RENEW: Duration = Duration::from_millis(200);

fn batch(message: FromStore) -> StoreBatch {
    StoreBatch { messages: vec![StoreMessage { message: Some(message) }] }
}

/// Where connections are taken and everything is read, and nothing is ever answered. Counts connections.
async fn swallows(tasks: &mut JoinSet<()>, asked: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut connection, _)) = listener.accept().await {
            asked.fetch_add(1, Ordering::Relaxed);
            connections.spawn(async move {
                let mut piece = vec![0; 64 << 10];
                while let Ok(1..) = connection.read(&mut piece).await {}
            });
            while connections.try_join_next().is_some() {}
        }
    });
    url
}

/// A store that opens streams and then takes nothing from them. Counts streams of writes.
struct TakesNothing {
    asked: Arc<AtomicUsize>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers that never come, while what is asked is kept and not looked at.
fn never<A: Send + 'static, T: Send + 'static>(asks: Streaming<A>) -> Answers<T> {
    let kept = async move {
        let _asks = asks;
        std::future::pending().await
    };
    stream::once(kept).boxed()
}

#[tonic::async_trait]
impl BlockStore for TakesNothing {
    type WriteStream = Answers<BioDone>;
    type ReadStream = Answers<ReadDone>;

    async fn write(
        &self,
        request: Request<Streaming<Bio>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(never(request.into_inner())))
    }

    async fn read(
        &self,
        request: Request<Streaming<ReadRequest>>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        Ok(Response::new(never(request.into_inner())))
    }

    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        std::future::pending().await
    }
}

/// Where such a store answers.
async fn takes_nothing(tasks: &mut JoinSet<()>, asked: Arc<AtomicUsize>) -> String {
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = listener.url().to_owned();
    tasks.spawn(async move {
        let server = BlockStoreServer::new(TakesNothing { asked });
        let router = tonic::transport::Server::builder().add_service(server);
        router.serve_with_incoming(Incoming::new([listener])).await.unwrap();
    });
    url
}

/// Registers a store that is reached there, and does for conversion what it has to. It has more room than the
/// others, so writes begin there first.
async fn register(conversion: &str, url: String, tasks: &mut JoinSet<()>) {
    let register = RegisterStore {
        uuid: vec![0x51; 16].into(),
        incarnation: 1,
        capacity_blocks: 4 * STORE_BLOCKS,
        url,
        protocol: endio_api::protocol::ours(),
    };
    let (say, said) = mpsc::channel(64);
    say.send(batch(FromStore::Register(register))).await.unwrap();
    let mut client = raw::conversion(conversion);
    let opened = client.store_session(ReceiverStream::new(said)).await;
    let mut commands = opened.unwrap().into_inner();
    tasks.spawn(async move {
        let mut renew = tokio::time::interval(RENEW);
        loop {
            let told = tokio::select! {
                biased;
                told = commands.message() => told,
                _ = renew.tick() => {
                    let _ = say.send(batch(FromStore::Renew(StoreRenew::default()))).await;
                    continue;
                }
            };
            let Ok(Some(told)) = told else { return };
            for command in told.commands.into_iter().filter_map(|command| command.command) {
                let answer = match command {
                    Command::Registered(registered) => {
                        let cluster_epoch = registered.cluster_epoch;
                        FromStore::Ready(StoreReady { cluster_epoch })
                    }
                    Command::Fence(fence) => FromStore::FenceDone(FenceDone { fence: fence.fence }),
                    Command::Punch(punch) => FromStore::PunchDone(PunchDone { punch: punch.punch }),
                    Command::Released(_) | Command::Renewed(_) => continue,
                };
                let _ = say.send(batch(answer)).await;
            }
        }
    });
}

/// Many writes at once, as they are answered; then what they left is read.
async fn write_many(client: &Client, bytes: usize) {
    const WRITES: u64 = 48;
    let fill = |number: u64| vec![number as u8 + 1; bytes];
    let offset = |number: u64| number * 2 * bytes as u64;
    let all = (0..WRITES).map(|number| async move {
        write(client, offset(number), &fill(number), WriteMode::Direct).await
    });
    for written in join_all(all).await {
        written.unwrap();
    }
    for number in 0..WRITES {
        let read = client.read("vol1", offset(number), bytes as u64).await.unwrap();
        assert!(read == fill(number), "write {number}");
    }
}

/// Many writes wait for one store, in a queue that holds one of them at a time. All are told of the same open
/// that fails, and begin again elsewhere; one after the other they would not all do so in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_wait_for_a_silent_store_begin_again_elsewhere_together() {
    let (mut tasks, asked) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    let stack = Stack::start(2).await;
    let url = swallows(&mut tasks, Arc::clone(&asked)).await;
    register(&stack.conversion.url, url, &mut tasks).await;
    stack.wait_for_stores(3).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("other"),
        store_queue: 1,
        connect_timeout_ms: 1_000,
        io_timeout_ms: 20_000,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    write_many(&client, 4096).await;
    assert!(asked.load(Ordering::Relaxed) > 0, "nobody waited for the silent store");
}

/// A stream that stands and takes nothing fails nobody. What ends is the io_ends: conversion gives them up, and
/// the writes begin again elsewhere, though they have not handed over what was granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_no_stream_takes_begin_again_when_their_io_ends_end() {
    let (mut tasks, asked) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("conversion");
    let mut config = endio_conversion::Config { data_dir, ..Default::default() };
    (config.limits.lease_ms, config.limits.io_end_life_max_ms) = (1_000, 1_500);
    let conversion = Conversion::start_with(config).await;
    let stores = vec![Store::start(&conversion.url).await, Store::start(&conversion.url).await];
    let url = takes_nothing(&mut tasks, Arc::clone(&asked)).await;
    register(&conversion.url, url, &mut tasks).await;
    let config = endio_writeback::Config {
        conversion: conversion.url.clone(),
        cache_dir: directory.path().join("cache"),
        store_queue: 1,
        io_timeout_ms: 30_000,
        // Who is not answered by then never is.
        server: ServerConfig { unary_timeout_ms: 40_000, ..Default::default() },
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let stack = Stack { conversion, stores, writeback, directory };
    stack.wait_for_stores(3).await;
    let client = stack.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    write_many(&client, 128 << 10).await;
    assert!(asked.load(Ordering::Relaxed) > 0, "nobody waited for the silent store");
}
