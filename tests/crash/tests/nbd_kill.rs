//! Services die by SIGKILL under NBD clients that connect again and send again what was not
//! answered: none is told an error, nothing that was acknowledged is missing, and what an old
//! connection had under way never overwrites something newer.
//!
//! `ENDIO_CRASH_ROUNDS` sets how many times, `ENDIO_SEED` replays.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use endio_crash_tests::nbd::NbdLoad;
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::seed::{self, Rng};
use tokio::task::block_in_place;
use tokio::time::sleep;

const VOLUMES: [&str; 2] = ["vol1", "vol2"];
const DEPTH: u64 = 8;

/// What clients are connected to dies most often; sometimes all die at once.
fn victims(cluster: &Cluster, rng: &mut Rng) -> Vec<Who> {
    let mut everyone = cluster.everyone();
    match rng.below(100) {
        0..20 => everyone,
        20..60 => vec![Who::Writeback(0)],
        _ => vec![everyone.swap_remove(rng.below(everyone.len() as u64) as usize)],
    }
}

async fn kill_under_clients(stores: usize, replicas: u32, rounds: u64, test: &str) {
    let seed = seed::announce("endio-crash-tests", test);
    let mut rng = Rng::new(seed);
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("nbd");
    let options = Options {
        stores,
        capacity: "256MiB".to_owned(),
        writeback_args: vec!["--nbd-listen".to_owned(), format!("unix:{}", socket.display())],
        ..Options::default()
    };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client();
    let mut loads = Vec::new();
    for volume in VOLUMES {
        client.create(volume, NbdLoad::volume_bytes(DEPTH), replicas).await.unwrap();
        loads.push(NbdLoad::new(socket.clone(), volume, DEPTH, rng.fork()));
    }
    for round in 0..rounds {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for mut load in loads.drain(..) {
            let is_over = Arc::clone(&is_over);
            running.push(tokio::spawn(async move {
                load.run(|| is_over.load(Ordering::SeqCst)).await?;
                load.verify().await?;
                anyhow::Ok(load)
            }));
        }
        for _ in 0..rng.between(1, 2) {
            sleep(Duration::from_millis(rng.between(20, 800))).await;
            let victims = victims(&cluster, &mut rng);
            eprintln!("kill {victims:?}");
            block_in_place(|| {
                victims.iter().for_each(|who| cluster.process(*who).kill());
                cluster.start_all()
            })
            .unwrap();
        }
        is_over.store(true, Ordering::SeqCst);
        for load in running {
            let ended = load.await.unwrap();
            loads.push(ended.unwrap_or_else(|error| panic!("round {round} of {seed}: {error:#}")));
        }
    }
    block_in_place(|| {
        cluster.kill_all();
        cluster.start_all()
    })
    .unwrap();
    for load in &mut loads {
        load.verify().await.unwrap_or_else(|error| panic!("at the end of {seed}: {error:#}"));
        let answered = load.progress().load(Ordering::SeqCst);
        eprintln!("{answered} answered, {} connections", load.connections());
    }
    cluster.client().with_patience(Duration::from_secs(90)).settles().await.unwrap();
    cluster.no_panic().unwrap();
}

fn rounds(share: u64) -> u64 {
    (seed::number("ENDIO_CRASH_ROUNDS", 10) * share / 100).max(1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbd_clients_that_connect_again_lose_nothing_when_services_die() {
    let test = "nbd_clients_that_connect_again_lose_nothing_when_services_die";
    kill_under_clients(1, 1, rounds(60), test).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbd_clients_that_connect_again_lose_nothing_with_replicas() {
    let test = "nbd_clients_that_connect_again_lose_nothing_with_replicas";
    kill_under_clients(3, 2, rounds(40), test).await;
}
