//! Every service is stopped and started again, one after the other, while clients work. None of
//! them sees an error: not one over gRPC that sends again what is refused as retryable, not an NBD
//! client that connects again, not somebody with the command.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use endio_crash_tests::nbd::NbdLoad;
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::process::binaries;
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::Workload;
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::{Instant, sleep};

const VOLUME_BYTES: u64 = 8 << 20;
const NBD_DEPTH: u64 = 8;
const PATIENCE: Duration = Duration::from_secs(90);
/// Longest orderly stop.
const STOP: Duration = Duration::from_secs(60);

/// What all clients of a run share.
#[derive(Clone, Default)]
struct Run {
    is_over: Arc<AtomicBool>,
}

impl Run {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }
}

/// A client and what it has done so far.
struct Worker<T> {
    name: &'static str,
    done: Arc<AtomicU64>,
    task: JoinHandle<anyhow::Result<T>>,
}

impl<T> Worker<T> {
    /// Waits until it has got on by that much, or has ended: then it says why.
    async fn gets_on(&self, by: u64) {
        let goal = self.done.load(Ordering::SeqCst) + by;
        let deadline = Instant::now() + PATIENCE;
        while self.done.load(Ordering::SeqCst) < goal && !self.task.is_finished() {
            assert!(Instant::now() < deadline, "{} does not get on", self.name);
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn ends(self) -> T {
        let ended = self.task.await.unwrap();
        ended.unwrap_or_else(|error| panic!("{}: {error:#}", self.name))
    }
}

fn grpc(run: &Run, mut load: Workload) -> Worker<Workload> {
    let (run, done) = (run.clone(), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&done);
    let task = tokio::spawn(async move {
        while !run.is_over() {
            load.run(20).await?;
            count.fetch_add(20, Ordering::SeqCst);
        }
        load.drain().await?;
        Ok(load)
    });
    Worker { name: "the client over gRPC", done, task }
}

fn nbd(run: &Run, mut load: NbdLoad) -> Worker<NbdLoad> {
    let (run, done) = (run.clone(), load.progress());
    let task = tokio::spawn(async move {
        load.run(|| run.is_over()).await?;
        Ok(load)
    });
    Worker { name: "the NBD client", done, task }
}

/// Somebody who writes, syncs and reads back with the command, again and again.
fn command(run: &Run, endpoint: String) -> Worker<()> {
    let (run, done) = (run.clone(), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&done);
    let work = move || {
        let endio = binaries()?.join("endio");
        let say = |args: &[&str], input: &[u8]| -> anyhow::Result<Vec<u8>> {
            let mut command = std::process::Command::new(&endio);
            command.args(args).env("ENDIO_ENDPOINT", &endpoint);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn()?;
            child.stdin.take().context("stdin is piped")?.write_all(input)?;
            let output = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "endio {args:?}: {}\n{said}", output.status);
            Ok(output.stdout)
        };
        for round in 0..u64::MAX {
            if run.is_over() {
                return Ok(());
            }
            let offset = (round % 16 * 300_001).to_string();
            let text = Rng::new(round).bytes(200_000);
            let mode: &[&str] = if round % 2 == 0 { &["--direct"] } else { &[] };
            say(
                &[&["write", "byhand", "--offset", &offset, "--patience", "90s"], mode].concat(),
                &text,
            )?;
            say(&["fsync", "byhand", "--patience", "90s"], b"")?;
            let read =
                ["read", "byhand", "--offset", &offset, "--length", "200000", "--patience", "90s"];
            ensure!(say(&read, b"")? == text, "other bytes are read back at {offset}");
            count.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    };
    Worker { name: "the command", done, task: tokio::task::spawn_blocking(work) }
}

async fn restart_each_under_load(stores: usize, replicas: u32, rounds: usize, test: &str) {
    let mut rng = Rng::new(seed::announce("endio-crash-tests", test));
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("nbd");
    let options = Options {
        stores,
        capacity: "256MiB".to_owned(),
        writeback_args: vec!["--nbd-listen".to_owned(), format!("unix:{}", socket.display())],
        ..Options::default()
    };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    let nbd_bytes = NbdLoad::volume_bytes(NBD_DEPTH);
    for (volume, bytes) in [("grpc", VOLUME_BYTES), ("nbd", nbd_bytes), ("byhand", VOLUME_BYTES)] {
        client.create(volume, bytes, replicas).await.unwrap();
    }
    let run = Run::default();
    let grpc = grpc(&run, Workload::new(client.clone(), "grpc", VOLUME_BYTES, rng.fork()));
    let nbd = nbd(&run, NbdLoad::new(socket, "nbd", NBD_DEPTH, rng.fork()));
    let command = command(&run, cluster.endpoint().to_owned());
    for _ in 0..rounds {
        for who in cluster.everyone() {
            grpc.gets_on(20).await;
            nbd.gets_on(20).await;
            command.gets_on(1).await;
            block_in_place(|| restart(&mut cluster, who));
        }
    }
    grpc.gets_on(20).await;
    nbd.gets_on(20).await;
    command.gets_on(1).await;
    run.is_over.store(true, Ordering::SeqCst);
    command.ends().await;
    let mut load = grpc.ends().await;
    load.verify().await.unwrap();
    let mut nbd = nbd.ends().await;
    nbd.verify().await.unwrap();
    assert!(nbd.connections() > rounds as u64, "{} connections", nbd.connections());
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
    eprintln!(
        "{} over gRPC, {} of them again; {} over NBD, {} connections",
        load.done,
        load.retries(),
        nbd.progress().load(Ordering::SeqCst),
        nbd.connections()
    );
}

/// As an operator does it: SIGTERM, wait for the end, start, wait until it is ready.
fn restart(cluster: &mut Cluster, who: Who) {
    let process = cluster.process(who);
    let status = process.stop(STOP);
    let status = status.unwrap_or_else(|| panic!("{who:?} does not stop:\n{}", process.tail(3000)));
    assert!(status.success(), "{who:?} stopped with {status}:\n{}", process.tail(3000));
    process.restart().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_client_sees_an_error_while_each_service_is_restarted() {
    let test = "no_client_sees_an_error_while_each_service_is_restarted";
    restart_each_under_load(1, 1, 3, test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_client_sees_an_error_while_each_service_is_restarted_with_replicas() {
    let test = "no_client_sees_an_error_while_each_service_is_restarted_with_replicas";
    restart_each_under_load(2, 2, 2, test).await;
}
