//! Processes that end, stop or fail exactly between two steps of a write.
//!
//! Every point of `crates/failpoints` is a place where a process is killed in the middle of work, and
//! then everything is read back under the oracle. A point that the work never reaches fails the test.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use endio_api::writeback::{OpenRequest, StatusRequest, WriteMode, WriteRequest};
use endio_failpoints::Point;
use endio_testkit::client::Client;
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::{Mix, Workload};
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::sleep;

const VOLUME_BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest wait until work has reached a point.
const REACHED_WAIT: Duration = Duration::from_secs(60);
/// After that long without reaching the point, something else is disturbed to provoke it.
const NUDGE: Duration = Duration::from_secs(2);
/// Longer than the lease of these clusters, which is two seconds.
const BEYOND_THE_LEASE_MS: u64 = 3500;

struct Rig {
    cluster: Cluster,
    load: Option<Workload>,
    rng: Rng,
}

/// Small segments and checkpoints, so that rotations, trims and checkpoints happen all the time.
fn options() -> Options {
    let mut options = Options { capacity: "256MiB".to_owned(), ..Options::default() };
    for (name, value) in [
        ("ENDIO_CONVERSION_CHECKPOINT_JOURNAL_BYTES", "65536"),
        ("ENDIO_WRITEBACK_LOG_SEGMENT_BYTES", "1048576"),
        ("ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS", "100"),
    ] {
        options.env.push((name.to_owned(), value.to_owned()));
    }
    options
}

async fn rig(test: &str) -> Rig {
    let mut rng = Rng::new(seed::announce("endio-crash-tests", test));
    let cluster = block_in_place(|| Cluster::start(options())).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    // Something of everything: each point must be on the way of some request.
    let mix = Mix { direct: 30, dsync: 10, zeroes: 10, fsync: 5, ..Mix::draw(&mut rng) };
    let mix = Mix { depth: mix.depth.max(4), write_cells_max: 256, ..mix };
    let load = Workload::new(client, "vol1", VOLUME_BYTES, rng.fork()).with_mix(mix);
    Rig { cluster, load: Some(load), rng }
}

/// Work that goes on until it is told to end.
struct Running {
    stop: Arc<AtomicBool>,
    task: JoinHandle<anyhow::Result<Workload>>,
}

impl Running {
    fn start(mut load: Workload) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                load.run(20).await?;
            }
            load.drain().await?;
            Ok(load)
        });
        Self { stop, task }
    }

    async fn end(self) -> anyhow::Result<Workload> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

fn who(point: Point) -> Who {
    match point.process() {
        "conversion" => Who::Conversion,
        "store" => Who::Store(0),
        _ => Who::Writeback(0),
    }
}

/// Passed seldom: only the first passages are waited for.
fn is_rare(point: Point) -> bool {
    let rare = ["segment", "trimmed", "checkpoint", "fenced", "punched", "flush", "forgot", "slot"];
    point.is_of_start() || rare.iter().any(|part| point.name().contains(part))
}

impl Rig {
    /// Arms a point in its process, which is started anew in the middle of work.
    async fn arm(&mut self, point: Point, action: &str) -> Running {
        let from = match (point.is_of_start(), is_rare(point)) {
            (true, _) => 1,
            (false, true) => self.rng.between(1, 2),
            (false, false) => self.rng.between(1, 60),
        };
        let running = Running::start(self.load.take().expect("no round is running"));
        // Something dirty is in the log, something is in flight.
        sleep(Duration::from_millis(self.rng.below(150))).await;
        let rule = format!("{}={action}@{from}", point.name());
        eprintln!("{rule}");
        let process = self.cluster.process(who(point));
        process.set_env("ENDIO_FAILPOINTS", Some(&rule));
        if point == Point::CanaryTaken {
            // Only a clean stop leaves a canary behind.
            let stopped = block_in_place(|| process.stop(PATIENCE));
            assert!(stopped.is_some_and(|status| status.success()), "{stopped:?}");
        }
        // It may end before it is ready: that is what some points are for.
        let _ = block_in_place(|| process.restart());
        running
    }

    /// Waits until the process has ended by itself.
    async fn wait_for_its_end(&mut self, point: Point) {
        let began = Instant::now();
        let mut nudged = began;
        while self.cluster.process(who(point)).is_running() {
            let waited = began.elapsed();
            assert!(
                waited < REACHED_WAIT,
                "no work reaches {} (binaries without the feature failpoints?)",
                point.name()
            );
            if nudged.elapsed() > NUDGE {
                nudged = Instant::now();
                self.nudge(point);
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// A point of the start needs another start, a fence needs a takeover.
    fn nudge(&mut self, point: Point) {
        let whom = if point.is_of_start() { who(point) } else { Who::Writeback(0) };
        if point.process() != "writeback" || point.is_of_start() {
            let _ = block_in_place(|| self.cluster.process(whom).restart());
        }
    }

    async fn recover(&mut self, point: Point, running: Running) {
        let process = self.cluster.process(who(point));
        process.set_env("ENDIO_FAILPOINTS", None);
        block_in_place(|| process.restart()).unwrap();
        let name = point.name();
        let ended = running.end().await;
        let mut load = ended.unwrap_or_else(|error| panic!("after {name}: {error:#}"));
        load.verify().await.unwrap_or_else(|error| panic!("after {name}: {error:#}"));
        self.load = Some(load);
    }

    async fn end(mut self) {
        let client: Client = self.cluster.client().with_patience(PATIENCE);
        client.fsync("vol1").await.unwrap();
        block_in_place(|| {
            self.cluster.kill_all();
            self.cluster.start_all()
        })
        .unwrap();
        self.load.as_mut().unwrap().verify().await.unwrap();
        client.settles().await.unwrap();
        self.cluster.no_panic().unwrap();
    }
}

/// Rounds for each point: one, and more on demand.
fn rounds() -> u64 {
    seed::number("ENDIO_FAILPOINT_ROUNDS", 1)
}

async fn die_at_every_point_of(process: &str, test: &str) {
    let mut rig = rig(test).await;
    let mut deaths = 0;
    for _ in 0..rounds() {
        for point in Point::ALL.iter().filter(|point| point.process() == process) {
            let began = Instant::now();
            let running = rig.arm(*point, "kill").await;
            rig.wait_for_its_end(*point).await;
            rig.recover(*point, running).await;
            eprintln!("  {:?}", began.elapsed());
            deaths += 1;
        }
    }
    rig.end().await;
    eprintln!("{deaths} deaths between two steps");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_dies_between_any_two_steps_loses_nothing() {
    let test = "a_writeback_that_dies_between_any_two_steps_loses_nothing";
    die_at_every_point_of("writeback", test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_store_that_dies_between_any_two_steps_loses_nothing() {
    let test = "a_block_store_that_dies_between_any_two_steps_loses_nothing";
    die_at_every_point_of("store", test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversion_that_dies_between_any_two_steps_loses_nothing() {
    let test = "a_conversion_that_dies_between_any_two_steps_loses_nothing";
    die_at_every_point_of("conversion", test).await;
}

/// A process stops (SIGSTOP) between two steps, for shorter or longer than its lease, and goes on
/// as if nothing had happened. Each round draws one of all points that are passed after the start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_stops_between_two_steps_and_goes_on_harms_nothing() {
    let test = "a_process_that_stops_between_two_steps_and_goes_on_harms_nothing";
    let mut rig = rig(test).await;
    // Who stops while it starts is not ready, and its start is not waited for any longer.
    let is_eligible = |point: &Point| !point.is_of_start();
    let points: Vec<Point> = Point::ALL.iter().copied().filter(is_eligible).collect();
    for _ in 0..seed::number("ENDIO_CRASH_ROUNDS", 10) * 3 / 10 {
        let point = points[usize::try_from(rig.rng.below(points.len() as u64)).unwrap()];
        let running = rig.arm(point, "stop").await;
        let began = Instant::now();
        let mut nudged = began;
        while !rig.cluster.process(who(point)).is_stopped() {
            assert!(began.elapsed() < REACHED_WAIT, "no work reaches {}", point.name());
            if nudged.elapsed() > NUDGE {
                nudged = Instant::now();
                rig.nudge(point);
            }
            sleep(Duration::from_millis(10)).await;
        }
        // Long enough for others to give it up, or just not.
        sleep(Duration::from_millis(rig.rng.below(BEYOND_THE_LEASE_MS))).await;
        rig.cluster.process(who(point)).resume();
        rig.recover(point, running).await;
    }
    rig.end().await;
}

/// Writes of a store fail, one in five: they begin again on other blocks, and nothing is lost. A
/// commit of conversion fails: the process ends rather than go on with a guess.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_writes_begin_again_and_a_failed_commit_ends_conversion() {
    let mut rig = rig("failed_writes_begin_again_and_a_failed_commit_ends_conversion").await;
    let running = Running::start(rig.load.take().unwrap());
    let store = rig.cluster.process(Who::Store(0));
    store.set_env("ENDIO_FAILPOINTS", Some("store-written=error%5"));
    block_in_place(|| store.restart()).unwrap();
    let mut load = running.end().await.unwrap();
    load.run(300).await.unwrap();
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    assert!(rig.cluster.process(Who::Store(0)).log().contains("could not be written"));
    rig.load = Some(load);
    let running = rig.arm(Point::JournalWritten, "error").await;
    rig.wait_for_its_end(Point::JournalWritten).await;
    rig.recover(Point::JournalWritten, running).await;
    rig.end().await;
}

/// A checkpoint that meets a full disk, with its first piece or a later one, is given up and begun again;
/// meanwhile conversion serves on, and what it said stays true when it dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversion_goes_on_when_a_checkpoint_meets_a_full_disk() {
    let mut rig = rig("conversion_goes_on_when_a_checkpoint_meets_a_full_disk").await;
    for rule in
        ["conversion-checkpoint-writing=error%1000", "conversion-checkpoint-writing=error@2%1000"]
    {
        let running = Running::start(rig.load.take().unwrap());
        let conversion = rig.cluster.process(Who::Conversion);
        let before = conversion.log().len();
        conversion.set_env("ENDIO_FAILPOINTS", Some(rule));
        block_in_place(|| conversion.restart()).unwrap();
        let began = Instant::now();
        for said in ["no checkpoint on this disk", "checkpoint finished"] {
            while !rig.cluster.process(Who::Conversion).log()[before..].contains(said) {
                assert!(began.elapsed() < REACHED_WAIT, "{rule}: never said {said:?}");
                sleep(Duration::from_millis(50)).await;
            }
        }
        let conversion = rig.cluster.process(Who::Conversion);
        assert!(conversion.is_running(), "{rule}");
        conversion.set_env("ENDIO_FAILPOINTS", None);
        block_in_place(|| {
            conversion.kill();
            conversion.restart()
        })
        .unwrap();
        let mut load = running.end().await.unwrap();
        load.verify().await.unwrap();
        rig.load = Some(load);
    }
    rig.end().await;
}

/// The log does not take every other note that blocks are clean, as if its disk were full for a moment. A
/// direct write over such blocks notes it first: else a replay would put the older data back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_log_does_not_know_to_be_clean_is_not_put_back_over_newer_data() {
    let mut options = options();
    options.env.retain(|(name, _)| name != "ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS");
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let writeback = cluster.process(Who::Writeback(0));
    let rule = format!("{}=error%2", Point::WritebackNotingClean.name());
    writeback.set_env("ENDIO_FAILPOINTS", Some(&rule));
    block_in_place(|| writeback.restart()).unwrap();
    const BLOCKS: u64 = 8;
    let write = async |block: u64, byte: u8, mode: WriteMode| {
        let request = WriteRequest {
            volume: "vol1".to_owned(),
            offset_bytes: block * 4096,
            data: vec![byte; 4096].into(),
            mode: mode.into(),
            ..WriteRequest::default()
        };
        client.io().write(request).await.unwrap();
    };
    for block in 0..BLOCKS {
        write(block, 1, WriteMode::Buffered).await;
        client.fsync("vol1").await.unwrap();
        write(block, 2, WriteMode::Direct).await;
    }
    let writeback = cluster.process(Who::Writeback(0));
    assert!(writeback.log().contains("no space left on the disk of the cache log"));
    writeback.set_env("ENDIO_FAILPOINTS", None);
    block_in_place(|| {
        writeback.kill();
        writeback.restart()
    })
    .unwrap();
    for block in 0..BLOCKS {
        let read = client.read("vol1", block * 4096, 4096).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 2), "block {block} is {}", read[0]);
    }
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
}

/// An open that the cache log does not take, as if its disk were full for a moment: nothing of it is left,
/// neither bytes that count as dirty nor a volume that is open for nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_that_the_log_does_not_take_leaves_nothing_behind() {
    const BYTES: usize = 4 * 4096;
    let mut options = options();
    options.env.retain(|(name, _)| name != "ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS");
    // What is flushed stays in the data log.
    options.env.push(("ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS".to_owned(), "600000".to_owned()));
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let old = cluster.client().with_patience(PATIENCE);
    old.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let request = WriteRequest {
        volume: "vol1".to_owned(),
        data: vec![7; BYTES].into(),
        mode: WriteMode::Buffered.into(),
        ..WriteRequest::default()
    };
    old.io().write(request).await.unwrap();
    old.flush("vol1").await.unwrap();
    let second = block_in_place(|| cluster.add_writeback()).unwrap();
    let process = cluster.process(Who::Writeback(second));
    let rule = format!("{}=error%2", Point::WritebackNotingOpen.name());
    process.set_env("ENDIO_FAILPOINTS", Some(&rule));
    block_in_place(|| process.restart()).unwrap();
    let new = Client::new(process.url()).with_patience(PATIENCE);
    cluster.process(Who::Writeback(0)).kill();
    // Tried once.
    let open = |force: bool| {
        let mut volumes = new.volumes();
        let request = OpenRequest { name: "vol1".to_owned(), force };
        async move { volumes.open(request).await }
    };
    let dirty_bytes = async || {
        let status = new.inspect().status(StatusRequest { cluster: false }).await.unwrap();
        status.into_inner().dirty_bytes
    };
    let refused = open(true).await.unwrap_err();
    assert!(refused.message().contains("no space left"), "{refused}");
    assert_eq!(dirty_bytes().await, 0, "of a volume that is not served");
    open(false).await.unwrap();
    assert_eq!(dirty_bytes().await, BYTES as u64);
    assert_eq!(new.read("vol1", 0, BYTES as u64).await.unwrap(), vec![7; BYTES]);
    new.fsync("vol1").await.unwrap();
    assert_eq!(dirty_bytes().await, 0);
    new.settles().await.unwrap();
    cluster.no_panic().unwrap();
}
