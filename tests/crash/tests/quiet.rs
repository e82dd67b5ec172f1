//! Work that no fault disturbs: no service says anything that an operator has to look at.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use endio_testkit::checkers;
use endio_testkit::cluster::{Cluster, Options};
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::Workload;
use tokio::task::block_in_place;

const VOLUME_BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

/// Start, work of every kind over two copies, and a stop in order: no warning, no error, no panic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_without_a_fault_logs_no_warning() {
    let test = "work_without_a_fault_logs_no_warning";
    let options =
        Options { stores: 2, capacity: "256MiB".to_owned(), tls: true, ..Options::default() };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BYTES, 2).await.unwrap();
    let rng = Rng::new(seed::announce("endio-crash-tests", test));
    let mut load = Workload::new(client.clone(), "vol1", VOLUME_BYTES, rng);
    load.run(400).await.unwrap();
    load.drain().await.unwrap();
    load.verify().await.unwrap();
    client.fsync("vol1").await.unwrap();
    client.settles().await.unwrap();
    // Whoever needs the others stops before them.
    for who in cluster.everyone().into_iter().rev() {
        let status = block_in_place(|| cluster.process(who).stop(PATIENCE));
        assert!(status.is_some_and(|status| status.success()), "{who:?}: {status:?}");
        let log = cluster.process(who).log();
        checkers::no_unexpected_log(&log, &[]).unwrap_or_else(|broken| panic!("{who:?}: {broken}"));
    }
}
