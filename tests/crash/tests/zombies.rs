//! Processes that stop, are given up, and come back as if nothing had happened.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use endio_api::common::ListSpansRequest;
use endio_api::conversion::ListIoEndsRequest;
use endio_testkit::client::{Client, Pipe, Put};
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::oracle::Crash;
use endio_testkit::process::{LISTEN, Process, Spec};
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::{Mix, Workload};
use endio_types::Reason;
use tokio::task::block_in_place;
use tokio::time::sleep;

const VOLUME_BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(90);
/// Longer than the lease of these clusters, which is two seconds.
const BEYOND_THE_LEASE: Duration = Duration::from_millis(3500);

fn cluster(stores: usize) -> Cluster {
    let options = Options { stores, capacity: "256MiB".to_owned(), ..Options::default() };
    block_in_place(|| Cluster::start(options)).unwrap()
}

fn load(client: &Client, name: &str) -> Workload {
    let seed = seed::announce("endio-crash-tests", name);
    Workload::new(client.clone(), "vol1", VOLUME_BYTES, Rng::new(seed))
}

/// Scenarios 53 and 55: a store is frozen beyond its lease while work goes on elsewhere, then
/// wakes up with old writes in its hands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_wakes_up_after_its_lease_harms_nothing() {
    let mut cluster = cluster(3);
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 2).await.unwrap();
    let mut load = load(&client, "a_store_that_wakes_up_after_its_lease_harms_nothing");
    load.run(200).await.unwrap();
    cluster.process(Who::Store(0)).pause();
    let began = std::time::Instant::now();
    while began.elapsed() < BEYOND_THE_LEASE {
        load.run(50).await.unwrap();
    }
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    cluster.process(Who::Store(0)).resume();
    load.run(200).await.unwrap();
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    client.fsync("vol1").await.unwrap();
    client.settles().await.unwrap();
    load.verify().await.unwrap();
    cluster.no_panic().unwrap();
}

/// Scenario 61: a writeback is frozen, another one takes its volume by force, the first wakes up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_wakes_up_after_a_takeover_is_fenced() {
    let mut cluster = cluster(1);
    let old = cluster.client().with_patience(PATIENCE);
    old.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut load = load(&old, "a_writeback_that_wakes_up_after_a_takeover_is_fenced");
    load.run(200).await.unwrap();
    load.drain().await.unwrap();
    // Dirty data without an fsync: it may be lost by force, but must never come back later.
    let unsynced = Mix { fsync: 0, depth: 8, ..Mix::draw(&mut Rng::new(1)) };
    let mut load = load.with_mix(unsynced);
    load.run(100).await.unwrap();
    cluster.process(Who::Writeback(0)).pause();
    load.give_up();
    load.crashed(Crash::SinceFlush);
    let second = block_in_place(|| cluster.add_writeback()).unwrap();
    let url = cluster.process(Who::Writeback(second)).url().to_owned();
    let new = Client::new(&url).with_patience(PATIENCE);
    let refused = new.open("vol1", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeBusy, "{refused}");
    new.open("vol1", true).await.unwrap();
    load.move_to(new.clone());
    load.verify().await.unwrap();
    load.run(200).await.unwrap();
    load.drain().await.unwrap();
    cluster.process(Who::Writeback(0)).resume();
    let late = old.clone().with_patience(Duration::from_secs(5));
    let refused = late.read("vol1", 0, 4096).await.unwrap_err();
    let fenced = [Reason::OldGeneration, Reason::VolumeBusy, Reason::TimedOut];
    assert!(fenced.contains(&refused.reason), "{refused}");
    let refused = late.fsync("vol1").await.unwrap_err();
    assert_ne!(refused.reason, Reason::UnknownVolume, "{refused}");
    sleep(BEYOND_THE_LEASE).await;
    load.verify().await.unwrap();
    load.run(100).await.unwrap();
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    new.fsync("vol1").await.unwrap();
    new.settles().await.unwrap();
    cluster.no_panic().unwrap();
}

/// Scenario 51: a store dies with a segment in its hands. The write succeeds on another try, and
/// its one trace shows both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_store_dies_shows_two_attempts_in_one_trace() {
    let mut cluster = cluster(1);
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut pipe = Pipe::new(client.clone(), 7);
    let data = Bytes::from(vec![7; 64 << 10]);
    let put = Put { volume: "vol1".into(), offset: 0, data, direct: true, dsync: false };
    pipe.write(put.clone()).await;
    assert_eq!(pipe.next().await.unwrap().reason, 0);
    cluster.process(Who::Store(0)).pause();
    pipe.write(put).await;
    let waiting = tokio::spawn(async move { pipe.next().await });
    // The write is on its way to the frozen store as soon as its io_end exists.
    wait_for_an_io_end(&client).await;
    block_in_place(|| cluster.bounce(Who::Store(0))).unwrap();
    let completion = waiting.await.unwrap().unwrap();
    assert_eq!(completion.reason, 0, "{}", completion.message);
    let trace_id = completion.trace_id;
    assert_eq!(trace_id.len(), 32, "a retried write is always sampled");
    let request = ListSpansRequest { trace_id: trace_id.clone(), ..Default::default() };
    let spans = client.spans(request).await.unwrap();
    let attempts: Vec<&str> = spans
        .iter()
        .filter_map(|span| span.attributes.get("attempt"))
        .map(String::as_str)
        .collect();
    assert!(attempts.contains(&"1") && attempts.contains(&"2"), "attempts {attempts:?}");
    let shown = cluster.endio_ok(&["trace", &trace_id]).unwrap();
    assert!(shown.contains("attempt"), "the trace does not tell attempts apart:\n{shown}");
}

async fn wait_for_an_io_end(client: &Client) {
    for _ in 0..500 {
        let listed =
            client.inspect().io_ends(ListIoEndsRequest::default()).await.unwrap().into_inner();
        if listed.total > 0 {
            let held = &listed.io_ends[0].held;
            assert!(!held.is_empty(), "an io_end in flight names its holders");
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("the write never began");
}

/// Scenario 68 with real processes: SIGTERM in the middle of work drains and loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_stop_with_work_in_flight_drains_and_loses_nothing() {
    let mut cluster = cluster(1);
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut load = load(&client, "a_graceful_stop_with_work_in_flight_drains_and_loses_nothing");
    load.run(100).await.unwrap();
    let running = tokio::spawn(async move {
        load.run(400).await?;
        load.drain().await?;
        anyhow::Ok(load)
    });
    sleep(Duration::from_millis(100)).await;
    block_in_place(|| {
        for who in cluster.everyone().into_iter().rev() {
            let status = cluster.process(who).stop(Duration::from_secs(30));
            let log = cluster.process(who).tail(2000);
            let status = status.unwrap_or_else(|| panic!("{who:?} does not stop:\n{log}"));
            assert!(status.success(), "{who:?} stopped with {status}:\n{log}");
        }
        cluster.start_all()
    })
    .unwrap();
    let mut load = running.await.unwrap().unwrap();
    load.verify().await.unwrap();
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
}

/// Everything in one process: `endio up` is killed and started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endio_up_survives_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data").to_str().unwrap().to_owned();
    let args =
        ["--json", "up", "--data-dir", &data_dir, "--grpc-listen", LISTEN, "--capacity", "256MiB"];
    let spec = Spec {
        name: "up".to_owned(),
        binary: "endio",
        args: args.map(str::to_owned).to_vec(),
        env: Vec::new(),
        log_dir: directory.path().to_owned(),
    };
    let mut up = block_in_place(|| Process::start(spec)).unwrap();
    let client = Client::new(up.url()).with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut load = load(&client, "endio_up_survives_a_kill");
    for _ in 0..2 {
        load.run(150).await.unwrap();
        let running = tokio::spawn(async move {
            load.run(150).await?;
            load.drain().await?;
            anyhow::Ok(load)
        });
        sleep(Duration::from_millis(50)).await;
        block_in_place(|| up.restart()).unwrap();
        load = running.await.unwrap().unwrap();
        load.verify().await.unwrap();
    }
    client.settles().await.unwrap();
    endio_testkit::checkers::no_panic_in_log(&up.log()).unwrap();
}
