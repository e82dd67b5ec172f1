//! Reads that have to wait for the device.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use endio_api::blockstore::{ReadDone, ReadRequest};
use endio_block_store::Config;
use endio_store::block::{BlockDevice, MemoryDevice};
use endio_types::{Pblk, PblkRange, Reason};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{bench::*, fake::*};

/// A device whose reads wait, or panic, where a test says so. Nothing of it is in memory.
struct ReadDevice {
    memory: MemoryDevice,
    held: Mutex<BTreeSet<u64>>,
    opened: Condvar,
    begun: AtomicU64,
    threads: Mutex<BTreeSet<String>>,
    panics_at: u64,
}

impl ReadDevice {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: MemoryDevice::new(100),
            held: Mutex::default(),
            opened: Condvar::new(),
            begun: AtomicU64::new(0),
            threads: Mutex::default(),
            panics_at: 99,
        })
    }

    /// From now on reads of these blocks wait.
    fn hold(&self, pblks: impl IntoIterator<Item = u64>) {
        self.held.lock().unwrap().extend(pblks);
    }

    fn open(&self) {
        self.held.lock().unwrap().clear();
        self.opened.notify_all();
    }

    async fn has_begun(&self, reads: u64) {
        let begun = async {
            while self.begun.load(Ordering::SeqCst) < reads {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        within("reads of the device", begun).await;
    }
}

impl BlockDevice for ReadDevice {
    fn capacity_blocks(&self) -> u64 {
        self.memory.capacity_blocks()
    }
    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        self.memory.write_at(pblk, data)
    }
    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.threads.lock().unwrap().insert(thread);
        self.begun.fetch_add(1, Ordering::SeqCst);
        assert_ne!(pblk.0, self.panics_at, "planted by a test");
        let held = self.held.lock().unwrap();
        drop(self.opened.wait_while(held, |held| held.contains(&pblk.0)).unwrap());
        self.memory.read_at(pblk, data)
    }
    fn flush(&self) -> io::Result<()> {
        self.memory.flush()
    }
    fn punch(&self, range: PblkRange) -> io::Result<()> {
        self.memory.punch(range)
    }
    fn used_blocks(&self) -> io::Result<u64> {
        self.memory.used_blocks()
    }
}

/// A stream of reads.
struct Reads {
    to: mpsc::Sender<ReadRequest>,
    answers: Streaming<ReadDone>,
}

impl Reads {
    async fn open(store: &mut Store) -> Self {
        let (to, requests) = mpsc::channel(64);
        let answers = store.client.read(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { to, answers }
    }

    /// Asks for one block, under its own number.
    async fn ask(&self, pblk: u64) {
        let grant = Some(grant(1, 1));
        let request =
            ReadRequest { request: pblk, grant, pblk, blocks: 1, ..ReadRequest::default() };
        self.to.send(request).await.unwrap();
    }

    async fn answer(&mut self) -> ReadDone {
        within("an answer", self.answers.message()).await.unwrap().unwrap()
    }

    /// Numbers of the next answers, which have data.
    async fn good(&mut self, count: usize) -> BTreeSet<u64> {
        let mut good = BTreeSet::new();
        for _ in 0..count {
            let done = self.answer().await;
            assert_eq!((done.reason, done.data.len()), (0, 4096), "block {}", done.request);
            good.insert(done.request);
        }
        good
    }
}

async fn with(
    device: &Arc<ReadDevice>,
    change: impl FnOnce(&mut Config),
) -> (FakeConversion, Store, FakeSession) {
    let mut conversion = FakeConversion::start().await;
    let mut config = config(&conversion);
    change(&mut config);
    let store = Store::on(config, device.clone()).await;
    let session = conversion.registered(1).await;
    (conversion, store, session)
}

#[tokio::test]
async fn a_fast_device_is_read_by_one_thread() {
    let device = ReadDevice::new();
    // Whatever this machine does meanwhile, a second is not exceeded on average.
    let (_conversion, mut store, _session) =
        with(&device, |config| config.reader_each_us = 1_000_000).await;
    let mut reads = Reads::open(&mut store).await;
    for pblk in 0..40 {
        reads.ask(pblk).await;
    }
    assert_eq!(reads.good(40).await, (0..40).collect());
    let threads: Vec<_> = device.threads.lock().unwrap().iter().cloned().collect();
    assert_eq!(threads, ["block-reader-0"]);
    store.stop().await;
}

#[tokio::test]
async fn a_device_that_answers_nothing_is_asked_by_all_threads_and_no_more() {
    let device = ReadDevice::new();
    let (_conversion, mut store, _session) = with(&device, |config| {
        (config.reader_threads_max, config.reader_each_us) = (4, 100);
    })
    .await;
    device.hold(0..10);
    let mut reads = Reads::open(&mut store).await;
    for pblk in 0..10 {
        reads.ask(pblk).await;
    }
    device.has_begun(4).await;
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert_eq!(device.begun.load(Ordering::SeqCst), 4);
    device.open();
    assert_eq!(reads.good(10).await, (0..10).collect());
    store.stop().await;
}

#[tokio::test]
async fn reads_behind_one_that_hangs_are_answered() {
    let device = ReadDevice::new();
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    device.hold([5]);
    let mut reads = Reads::open(&mut store).await;
    for pblk in 0..20 {
        reads.ask(pblk).await;
    }
    assert_eq!(reads.good(19).await, (0..20).filter(|pblk| *pblk != 5).collect());
    // One that comes alone, while the others still wait for nothing, is answered, too.
    reads.ask(30).await;
    assert_eq!(reads.good(1).await, [30].into());
    device.open();
    assert_eq!(reads.good(1).await, [5].into());
    store.stop().await;
}

#[tokio::test]
async fn a_read_that_panics_is_answered_and_ends_its_flight() {
    let device = ReadDevice::new();
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    let mut reads = Reads::open(&mut store).await;
    for pblk in [1, device.panics_at, 2] {
        reads.ask(pblk).await;
    }
    let mut failed = Vec::new();
    for _ in 0..3 {
        let done = reads.answer().await;
        if let Some(reason) = reason(done.reason) {
            failed.push((done.request, reason));
        }
    }
    assert_eq!(failed, [(device.panics_at, Reason::IoError)]);
    // A stop waits for every flight.
    store.stop().await;
}

#[tokio::test]
async fn a_stop_answers_every_read() {
    let device = ReadDevice::new();
    let (_conversion, mut store, _session) = with(&device, |config| {
        config.reader_threads_max = 1;
    })
    .await;
    device.hold([0]);
    let mut reads = Reads::open(&mut store).await;
    for pblk in 0..5 {
        reads.ask(pblk).await;
    }
    device.has_begun(1).await;
    store.shutdown.request();
    reads.ask(6).await;
    // What came before the stop is finished, what came later is refused.
    let mut ended = BTreeSet::new();
    loop {
        let done = reads.answer().await;
        assert_eq!(reason(done.reason), Some(Reason::Draining));
        ended.insert(done.request);
        if done.request == 6 {
            break;
        }
    }
    device.open();
    while ended.len() < 6 {
        let done = reads.answer().await;
        assert_eq!((done.reason, done.data.len()), (0, 4096));
        ended.insert(done.request);
    }
    assert_eq!(ended, [0, 1, 2, 3, 4, 6].into());
    within("the stop", store.running.wait()).await.unwrap();
}

#[tokio::test]
async fn no_more_reads_are_under_way_than_allowed_and_all_are_answered() {
    let device = ReadDevice::new();
    let (_conversion, mut store, _session) = with(&device, |config| {
        config.reads_at_once_max = 2;
    })
    .await;
    let mut reads = Reads::open(&mut store).await;
    for pblk in 0..40 {
        reads.ask(pblk).await;
    }
    assert_eq!(reads.good(40).await, (0..40).collect());
    store.stop().await;
}
