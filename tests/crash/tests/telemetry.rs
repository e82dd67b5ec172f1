//! Real services export to a collector of the test's own: every sampled write is one whole trace
//! over all three of them, also when a block-store or conversion dies with it in its hands.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::ListIoEndsRequest;
use endio_crash_tests::collector::{Collector, Protocol, Received};
use endio_crash_tests::nbd::NbdLoad;
use endio_crash_tests::traces::Traces;
use endio_testkit::client::{Client, Pipe, Put};
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::seed::Rng;
use tokio::task::block_in_place;
use tokio::time::{Instant, sleep};

const VOLUME: &str = "vol1";
const VOLUME_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(90);
/// Pause between two looks at what has arrived.
const LOOK: Duration = Duration::from_millis(50);
const SERVICES: [&str; 3] = ["endio-writeback", "endio-conversion", "endio-block-store"];

/// Services that export everything to a collector, and a client.
struct Rig {
    cluster: Cluster,
    collector: Collector,
    client: Client,
    pipe: Pipe,
    /// Where the next write goes: none overwrites another one, so each is written out.
    offset: u64,
    /// Traces of the writes that were answered; empty: not sampled.
    answered: Vec<String>,
}

impl Rig {
    async fn start(protocol: Protocol, more: &[(&str, &str)], flags: &[&str]) -> Self {
        let collector = Collector::start(protocol).await.unwrap();
        let mut options = Options { capacity: "256MiB".to_owned(), ..Options::default() };
        options.env.extend(collector.variables());
        let more = more.iter().chain(&[("ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS", "50")]);
        options.env.extend(more.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        options.writeback_args = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let cluster = block_in_place(|| Cluster::start(options)).unwrap();
        let client = cluster.client().with_patience(PATIENCE);
        client.create(VOLUME, VOLUME_BYTES, 1).await.unwrap();
        let pipe = Pipe::new(client.clone(), 7);
        Self { cluster, collector, client, pipe, offset: 0, answered: Vec::new() }
    }

    /// Submits a write: buffered, direct, and buffered but durable take turns, some unaligned.
    async fn submit(&mut self, number: u64) -> bool {
        let (direct, dsync) = (number % 3 == 1, number % 3 == 2);
        let length = [4096, 8192, 65_536, 1000][number as usize / 3 % 4];
        let offset = self.offset + if length == 1000 { 300 } else { 0 };
        self.offset += 65_536;
        assert!(self.offset <= VOLUME_BYTES, "the volume is too small for this test");
        let data = Bytes::from(vec![number as u8; length]);
        let volume = VOLUME.to_owned();
        self.pipe.write(Put { volume, offset, data, direct, dsync }).await;
        direct || dsync
    }

    async fn answer(&mut self) {
        let completion = self.pipe.next().await.unwrap();
        assert_eq!(completion.reason, 0, "{}", completion.message);
        self.answered.push(completion.trace_id);
    }

    async fn write(&mut self, count: u64) {
        for number in 0..count {
            while self.pipe.in_flight() >= 16 {
                self.answer().await;
            }
            self.submit(number).await;
        }
        self.drain().await;
    }

    async fn drain(&mut self) {
        while self.pipe.in_flight() > 0 {
            self.answer().await;
        }
        self.client.fsync(VOLUME).await.unwrap();
    }

    /// Begins writes that hang at a frozen store; returns when the io_ends of all that wait for it
    /// live.
    async fn begin(&mut self, count: u64) {
        let mut waiting = 0;
        for number in 0..count {
            waiting += u64::from(self.submit(number).await);
        }
        let inspect = self.client.inspect();
        let began = Instant::now();
        loop {
            let listed = inspect.clone().io_ends(ListIoEndsRequest::default()).await.unwrap();
            let total = listed.into_inner().total;
            if total >= waiting {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{total} of {waiting} writes have begun");
            sleep(LOOK).await;
        }
    }

    /// Waits until exactly `count` writes have arrived and each of them is one whole trace.
    async fn arrives(&self, count: usize) -> Received {
        let began = Instant::now();
        loop {
            let received = self.collector.received();
            let wrong = wrong(&received, count);
            if wrong.is_empty() {
                return received;
            }
            if began.elapsed() > PATIENCE {
                panic!("{} problems:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
            }
            sleep(LOOK).await;
        }
    }
}

fn wrong(received: &Received, count: usize) -> Vec<String> {
    let traces = Traces::of(received);
    let writes = traces.writes();
    let mut wrong = Vec::new();
    if writes.len() != count {
        wrong.push(format!("{} writes were exported, {count} were made", writes.len()));
    }
    for write in writes {
        let problems = traces.problems(write);
        let name =
            format!("{} {} {}", write.trace, write.attribute("mode"), write.attribute("offset"));
        wrong.extend(problems.into_iter().map(|problem| format!("{name}: {problem}")));
    }
    wrong
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_write_is_one_whole_trace_over_three_services() {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("nbd");
    let all = [("OTEL_TRACES_SAMPLER", "parentbased_always_on")];
    let listen = format!("unix:{}", socket.display());
    let mut rig = Rig::start(Protocol::Http, &all, &["--nbd-listen", &listen]).await;
    rig.write(240).await;
    rig.arrives(240).await;

    // An NBD client's writes are traces, too: direct before its first flush and with FUA, else
    // buffered.
    rig.client.create("nbd", NbdLoad::volume_bytes(8), 1).await.unwrap();
    let mut load = NbdLoad::new(socket, "nbd", 8, Rng::new(1));
    let (done, limit) = (load.progress(), AtomicU64::new(150));
    load.run(|| done.load(Ordering::SeqCst) >= limit.load(Ordering::SeqCst)).await.unwrap();
    rig.client.fsync("nbd").await.unwrap();
    let writes = 240 + usize::try_from(load.writes()).unwrap();
    // Its writes overlap: one that was overwritten before it was written out has no write-out.
    let received = arrive_connected(&rig.collector, writes).await;

    for service in SERVICES {
        let legs = (service.to_owned(), "endio_leg_seconds".to_owned());
        let known: BTreeSet<&str> = received.spans.iter().map(|span| span.trace.as_str()).collect();
        wait(|| {
            let received = rig.collector.received();
            let exemplars = received.metrics.get(&legs).cloned().unwrap_or_default();
            exemplars.iter().any(|trace| known.contains(trace.as_str()))
        })
        .await
        .unwrap_or_else(|()| panic!("no exemplar of {legs:?} names a trace"));
        wait(|| rig.collector.received().lines.iter().any(|line| line.service == service))
            .await
            .unwrap_or_else(|()| panic!("no log of {service}"));
    }
    rig.cluster.no_panic().unwrap();
}

/// Waits until that many writes have arrived, and nothing hangs in the air.
async fn arrive_connected(collector: &Collector, count: usize) -> Received {
    let loose = |received: &Received| -> Vec<String> {
        let traces = Traces::of(received);
        let writes = traces.writes();
        let mut loose: Vec<String> =
            writes.iter().flat_map(|write| traces.loose_ends(&write.trace)).collect();
        if writes.len() != count {
            loose.push(format!("{} writes were exported, {count} were made", writes.len()));
        }
        loose
    };
    let arrived = wait(|| loose(&collector.received()).is_empty()).await;
    let received = collector.received();
    arrived.unwrap_or_else(|()| panic!("{}", loose(&received).join("\n")));
    received
}

/// Looks until it is so, for [`PATIENCE`] at most.
async fn wait(is_so: impl Fn() -> bool) -> Result<(), ()> {
    let began = Instant::now();
    while !is_so() {
        if began.elapsed() > PATIENCE {
            return Err(());
        }
        sleep(LOOK).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_store_or_conversion_dies_goes_on_in_its_trace_as_attempt_two() {
    let debug = ("RUST_LOG", "info,endio_writeback=debug");
    let all = ("OTEL_TRACES_SAMPLER", "parentbased_always_on");
    let mut rig = Rig::start(Protocol::Grpc, &[all, debug], &[]).await;
    let mut count = 60;
    rig.write(60).await;
    for round in 0..4 {
        // What a process had not exported when it dies is lost: first everything arrives.
        rig.arrives(count).await;
        let before = rig.answered.len();
        rig.cluster.process(Who::Store(0)).pause();
        rig.begin(24).await;
        let victim = if round % 2 == 0 { Who::Store(0) } else { Who::Conversion };
        block_in_place(|| rig.cluster.bounce(victim)).unwrap();
        rig.cluster.process(Who::Store(0)).resume();
        rig.drain().await;
        count += 24;
        let received = rig.arrives(count).await;
        let traces = Traces::of(&received);
        let again = rig.answered[before..].iter().filter(|trace| traces.attempts(trace) > 1);
        let again = again.count();
        eprintln!("{victim:?} died: {again} of 24 writes were tried again");
        // Two of three waited for the store, and died with it.
        assert!(again >= 16, "only {again} of 24 writes show a second attempt");
    }
    let known: BTreeSet<&String> = rig.answered.iter().collect();
    let tells = |received: &Received| {
        received.lines.iter().any(|line| known.contains(&line.trace) && line.body.contains("again"))
    };
    wait(|| tells(&rig.collector.received()))
        .await
        .expect("no log line of a retry names its trace");
    rig.cluster.no_panic().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_sampled_share_of_writes_is_exported_and_each_of_them_whole() {
    let share = [
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.3"),
        ("ENDIO_WRITEBACK_TELEMETRY__TRACE__KEEP_NOTABLE", "false"),
    ];
    let mut rig = Rig::start(Protocol::Grpc, &share, &[]).await;
    rig.write(300).await;
    let sampled: BTreeSet<&str> =
        rig.answered.iter().map(String::as_str).filter(|trace| !trace.is_empty()).collect();
    let received = rig.arrives(sampled.len()).await;
    let traces = Traces::of(&received);
    let exported: BTreeSet<&str> =
        traces.writes().iter().map(|write| write.trace.as_str()).collect();
    assert_eq!(exported, sampled);
    assert!((30..=160).contains(&sampled.len()), "{} of 300 with a share of 0.3", sampled.len());
    rig.cluster.no_panic().unwrap();
}
