//! Processes that stop, are given up, and come back as if nothing had happened.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use endio_api::common::ListSpansRequest;
use endio_api::conversion::ListIoEndsRequest;
use endio_testkit::client::{Client, Pipe, Put};
use endio_testkit::cluster::{Background, Cluster, Options, Who};
use endio_testkit::oracle::Crash;
use endio_testkit::process::{LISTEN, Process, Spec, binaries};
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

/// A conversion that is frozen keeps its data directory: no successor starts over it, so there are never
/// two of them, and it goes on where it was. Only its death, frozen as it is, makes room for the next
/// one, which begins a new epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_successor_starts_over_the_directory_of_a_frozen_conversion() {
    let mut cluster = cluster(1);
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut load = load(&client, "no_successor_starts_over_the_directory_of_a_frozen_conversion");
    load.run(100).await.unwrap();
    let data_dir = cluster.dir().join("conversion");
    let mut successor = Command::new(binaries().unwrap().join("endio-conversion"));
    successor.arg("--data-dir").arg(&data_dir).args(["--listen", "127.0.0.1:0", "--insecure"]);
    cluster.process(Who::Conversion).pause();
    let running = tokio::spawn(async move {
        load.run(100).await?;
        load.drain().await?;
        anyhow::Ok(load)
    });
    sleep(BEYOND_THE_LEASE).await;
    let mut successor = Background::start(successor, cluster.dir().join("successor.log")).unwrap();
    let refused = block_in_place(|| successor.finish(PATIENCE)).unwrap_err();
    let refused = format!("{refused:#}");
    assert!(refused.contains("in use by another process"), "{refused}");
    cluster.process(Who::Conversion).resume();
    let mut load = running.await.unwrap().unwrap();
    load.verify().await.unwrap();
    client.settles().await.unwrap();
    // Frozen once more, and killed like that: now there is room.
    cluster.process(Who::Conversion).pause();
    block_in_place(|| cluster.bounce(Who::Conversion)).unwrap();
    load.run(100).await.unwrap();
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
}

/// One frozen process after the other. Leases are short here, so that many rounds fit into a minute.
struct Rounds {
    cluster: Cluster,
    load: Workload,
    rng: Rng,
    /// Which writeback has the volume.
    owner: usize,
    zombies: u64,
    takeovers: u64,
}

const SHORT_LEASE_MS: u64 = 400;

impl Rounds {
    fn client_of(&mut self, writeback: usize) -> Client {
        let url = self.cluster.process(Who::Writeback(writeback)).url().to_owned();
        Client::new(&url).with_patience(PATIENCE)
    }

    /// Most of them outlive the lease.
    fn pause(&mut self) -> Duration {
        Duration::from_millis(self.rng.between(SHORT_LEASE_MS / 2, SHORT_LEASE_MS * 5 / 2))
    }

    /// A store or conversion is frozen under work that goes on, or waits, and is woken up.
    async fn freeze(&mut self, who: Who) -> anyhow::Result<()> {
        let (pause, operations) = (self.pause(), self.rng.between(20, 150));
        self.cluster.process(who).pause();
        let ended = {
            let load = &mut self.load;
            let work = async move {
                load.run(operations).await?;
                load.drain().await
            };
            tokio::pin!(work);
            let until = tokio::time::Instant::now() + pause;
            let early = tokio::time::timeout_at(until, work.as_mut()).await;
            tokio::time::sleep_until(until).await;
            self.cluster.process(who).resume();
            self.zombies += 1;
            match early {
                Ok(ended) => ended,
                Err(_) => work.await,
            }
        };
        ended?;
        self.load.verify().await
    }

    /// The owner is frozen with dirty data and writes under way, loses its volume, and wakes up.
    async fn take_over(&mut self) -> anyhow::Result<()> {
        let (old, next) = (self.owner, 1 - self.owner);
        let operations = self.rng.between(5, 60);
        self.load.run(operations).await?;
        self.cluster.process(Who::Writeback(old)).pause();
        self.load.give_up();
        self.load.crashed(Crash::SinceFlush);
        let new = self.client_of(next);
        new.open("vol1", true).await?;
        self.load.move_to(new);
        self.load.verify().await?;
        self.cluster.process(Who::Writeback(old)).resume();
        (self.owner, self.zombies, self.takeovers) = (next, self.zombies + 1, self.takeovers + 1);
        let late = self.client_of(old).with_patience(Duration::from_millis(1));
        let write = endio_api::writeback::WriteRequest {
            volume: "vol1".into(),
            data: Bytes::from(vec![0xFF; 4096]),
            mode: endio_api::writeback::WriteMode::Direct.into(),
            ..Default::default()
        };
        let written = late.io().write(write).await;
        anyhow::ensure!(written.is_err(), "the fenced owner has written");
        self.load.run(operations).await?;
        self.load.drain().await?;
        self.load.verify().await
    }
}

/// Random processes are frozen at random instants, and wake up; the long form of the tests before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zombies_at_random_instants_harm_nothing() {
    let rounds = seed::number("ENDIO_ZOMBIE_ROUNDS", 5);
    let seed = seed::announce("endio-crash-tests", "zombies_at_random_instants_harm_nothing");
    let mut rng = Rng::new(seed);
    let lease = ("ENDIO_CONVERSION_LIMITS__LEASE_MS".to_owned(), SHORT_LEASE_MS.to_string());
    let options = Options {
        stores: 3,
        capacity: "256MiB".to_owned(),
        env: vec![lease],
        ..Options::default()
    };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    block_in_place(|| cluster.add_writeback()).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 2).await.unwrap();
    let load = Workload::new(client, "vol1", VOLUME_BYTES, rng.fork());
    let mut all = Rounds { cluster, load, rng, owner: 0, zombies: 0, takeovers: 0 };
    for round in 0..rounds {
        let ended = match all.rng.below(8) {
            0 => all.freeze(Who::Conversion).await,
            1..4 => {
                let store = usize::try_from(all.rng.below(3)).unwrap();
                all.freeze(Who::Store(store)).await
            }
            4 => all.freeze(Who::Writeback(all.owner)).await,
            _ => all.take_over().await,
        };
        ended.unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error:#}"));
    }
    let client = all.client_of(all.owner);
    all.load.fsync().await.unwrap();
    client.settles().await.unwrap();
    all.load.verify().await.unwrap();
    all.cluster.no_panic().unwrap();
    let Rounds { zombies, takeovers, load, .. } = all;
    eprintln!("{zombies} zombies, {takeovers} of them taken over, {} requests", load.done);
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
