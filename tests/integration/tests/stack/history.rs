//! Random histories of several clients and volumes, judged by the oracle.

use endio_integration_tests::stack::Stack;
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::Workload;

const VOLUME_BYTES: u64 = 4 << 20;

/// Scenarios 34, 46, 48, 71, 72: every read is possible, every request has one completion, and at
/// the end no io_end lives and space adds up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_histories_of_many_clients_are_possible_and_leave_nothing_behind() {
    let seed = seed::announce("endio-integration-tests", "random_histories_of_many_clients");
    let operations = seed::number("ENDIO_HISTORY_OPERATIONS", 400);
    let mut rng = Rng::new(seed);
    let mut stack = Stack::start(2).await;
    let client = stack.client();
    let mut tasks = Vec::new();
    for (volume, replicas) in [("vol1", 1), ("vol2", 2), ("vol3", 1)] {
        client.create(volume, VOLUME_BYTES, replicas).await.unwrap();
        // Each client has a connection of its own.
        let mut load = Workload::new(stack.client(), volume, VOLUME_BYTES, rng.fork());
        tasks.push(tokio::spawn(async move {
            for _ in 0..4 {
                load.run(operations / 4).await?;
                load.drain().await?;
                load.verify().await?;
            }
            anyhow::Ok(load)
        }));
    }
    let mut loads = Vec::new();
    for task in tasks {
        loads.push(task.await.unwrap().unwrap_or_else(|error| panic!("seed {seed}: {error:#}")));
    }
    client.settles().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    // A graceful stop and a new start of everything changes nothing.
    stack.stop().await;
    stack.conversion.restart().await;
    for store in &mut stack.stores {
        store.start_again().await;
    }
    stack.writeback.restart().await;
    for load in &mut loads {
        load.verify().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    }
    client.settles().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
}

/// Scenario 68. A stop in the middle of work drains; nothing acknowledged is lost by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_stops_in_the_middle_of_work_loses_nothing() {
    let seed = seed::announce("endio-integration-tests", "a_writeback_that_stops_in_the_middle");
    let mut rng = Rng::new(seed);
    let mut stack = Stack::start(1).await;
    let client = stack.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut load = Workload::new(stack.client(), "vol1", VOLUME_BYTES, rng.fork());
    for _ in 0..3 {
        let running = tokio::spawn(async move {
            load.run(120).await?;
            load.drain().await?;
            anyhow::Ok(load)
        });
        tokio::time::sleep(std::time::Duration::from_millis(rng.below(200))).await;
        stack.writeback.restart().await;
        load = running.await.unwrap().unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
        load.verify().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    }
    client.settles().await.unwrap();
}
