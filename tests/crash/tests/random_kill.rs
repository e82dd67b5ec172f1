//! Random work, and a random process dies at a random instant. SIGKILL of any or all processes
//! loses no acknowledged write at all.
//!
//! `ENDIO_CRASH_ROUNDS` sets how many times, `ENDIO_SEED` replays.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use endio_testkit::client::Client;
use endio_testkit::cluster::{Cluster, Options, Who, drawn_sizes};
use endio_testkit::oracle::Crash;
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::Workload;
use tokio::task::block_in_place;
use tokio::time::{sleep, timeout};

const VOLUME_BYTES: u64 = 8 << 20;
const VOLUMES: [&str; 2] = ["vol1", "vol2"];

struct Rig {
    cluster: Cluster,
    loads: Vec<Workload>,
    rng: Rng,
    kills: u64,
}

async fn rig(stores: usize, replicas: u32, seed: u64) -> anyhow::Result<Rig> {
    let mut rng = Rng::new(seed);
    let mut options = Options { stores, capacity: "256MiB".to_owned(), ..Options::default() };
    options.env.extend(drawn_sizes(&mut rng));
    let cluster = block_in_place(|| Cluster::start(options))?;
    let client = patient(&cluster);
    let mut loads = Vec::new();
    for volume in VOLUMES {
        client.create(volume, VOLUME_BYTES, replicas).await?;
        loads.push(Workload::new(client.clone(), volume, VOLUME_BYTES, rng.fork()));
    }
    Ok(Rig { cluster, loads, rng, kills: 0 })
}

fn patient(cluster: &Cluster) -> Client {
    cluster.client().with_patience(Duration::from_secs(90))
}

impl Rig {
    /// Some random victims; often one, sometimes all.
    fn victims(&mut self) -> Vec<Who> {
        let everyone = self.cluster.everyone();
        if self.rng.chance(25) {
            return everyone;
        }
        let number = usize::try_from(self.rng.below(everyone.len() as u64)).unwrap();
        vec![everyone[number]]
    }

    fn kill(&mut self, victims: &[Who]) {
        self.kills += victims.len() as u64;
        for who in victims {
            self.cluster.process(*who).kill();
        }
    }

    /// The client sends again what was not answered: every write has an outcome.
    async fn round_with_retries(&mut self) -> anyhow::Result<()> {
        let operations = self.rng.between(100, 400);
        let mut tasks = Vec::new();
        for mut load in self.loads.drain(..) {
            tasks.push(tokio::spawn(async move {
                load.run(operations).await?;
                load.drain().await?;
                anyhow::Ok(load)
            }));
        }
        sleep(Duration::from_millis(self.rng.below(800))).await;
        let victims = self.victims();
        eprintln!("kill {victims:?}");
        block_in_place(|| {
            self.kill(&victims);
            self.cluster.start_all()
        })?;
        for task in tasks {
            self.loads.push(task.await??);
        }
        Ok(())
    }

    /// The client dies with the writeback: what was not answered has an unknown outcome.
    async fn round_without_retries(&mut self) -> anyhow::Result<()> {
        let instant = Duration::from_millis(self.rng.between(20, 600));
        let mut running = Vec::new();
        for mut load in self.loads.drain(..) {
            running.push(tokio::spawn(async move {
                match timeout(instant, load.run(100_000)).await {
                    Ok(ended) => ended.map(|()| load),
                    Err(_) => Ok(load),
                }
            }));
        }
        for task in running {
            self.loads.push(task.await??);
        }
        let mut victims = self.victims();
        victims.insert(0, Who::Writeback(0));
        eprintln!("kill {victims:?} and the client");
        block_in_place(|| self.kill(&victims));
        for load in &mut self.loads {
            load.give_up();
            load.crashed(Crash::LosesNothing);
        }
        block_in_place(|| self.cluster.start_all())
    }

    async fn verify(&mut self) -> anyhow::Result<()> {
        for load in &mut self.loads {
            load.verify().await?;
        }
        Ok(())
    }
}

async fn kill_at_random(stores: usize, replicas: u32, rounds: u64, test: &str) {
    let seed = seed::announce("endio-crash-tests", test);
    let mut rig = rig(stores, replicas, seed).await.unwrap();
    for round in 0..rounds {
        let ended = match rig.rng.chance(40) {
            true => rig.round_without_retries().await,
            false => rig.round_with_retries().await,
        };
        ended.unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error:#}"));
        rig.verify().await.unwrap_or_else(|error| panic!("round {round} of {seed}: {error:#}"));
    }
    for volume in VOLUMES {
        patient(&rig.cluster).fsync(volume).await.unwrap();
    }
    block_in_place(|| {
        rig.cluster.kill_all();
        rig.cluster.start_all()
    })
    .unwrap();
    rig.verify().await.unwrap();
    patient(&rig.cluster).settles().await.unwrap();
    rig.cluster.no_panic().unwrap();
    let done: u64 = rig.loads.iter().map(|load| load.done).sum();
    let retries: u64 = rig.loads.iter().map(Workload::retries).sum();
    let kills = rig.kills;
    eprintln!("{rounds} rounds, {kills} kills, {done} requests, {retries} of them sent again");
}

fn rounds(share: u64) -> u64 {
    (seed::number("ENDIO_CRASH_ROUNDS", 10) * share / 100).max(1)
}

/// Scenarios 30 to 33, 51, 52 and 59 with real processes, at random instants.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_any_process_is_killed() {
    kill_at_random(1, 1, rounds(60), "no_acknowledged_write_is_lost").await;
}

/// The same with two replicas on three stores.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_with_replicas() {
    kill_at_random(3, 2, rounds(40), "no_acknowledged_write_is_lost_with_replicas").await;
}
