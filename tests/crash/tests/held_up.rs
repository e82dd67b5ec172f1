//! Conversion is held up for longer than a lease: its peers were not silent, it was deaf.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use endio_api::writeback::{OpenRequest, WriteMode, WriteRequest};
use endio_testkit::client::{Client, Refused};
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_types::Reason;
use tokio::task::block_in_place;
use tokio::time::sleep;

const VOLUME_BYTES: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// The lease of these clusters is two seconds.
const BEYOND_THE_LEASE: Duration = Duration::from_millis(3_500);

/// Whoever asks for a volume without force while conversion is frozen does not get what a live owner has, with
/// what that one has acknowledged and not flushed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_owner_keeps_its_volume_when_conversion_was_frozen() {
    let mut options = Options::default();
    // What is acknowledged stays where it is.
    options.env.push(("ENDIO_WRITEBACK_WRITE_OUT_AFTER_MS".to_owned(), "600000".to_owned()));
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let owner = cluster.client().with_patience(PATIENCE);
    owner.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let second = block_in_place(|| cluster.add_writeback()).unwrap();
    let other = Client::new(cluster.process(Who::Writeback(second)).url());
    for round in 1..=2_u8 {
        let request = WriteRequest {
            volume: "vol1".to_owned(),
            data: vec![round; 8192].into(),
            mode: WriteMode::Buffered.into(),
            ..WriteRequest::default()
        };
        owner.io().write(request).await.unwrap();
        cluster.process(Who::Conversion).pause();
        let mut volumes = other.volumes();
        let opening = tokio::spawn(async move {
            volumes.open(OpenRequest { name: "vol1".to_owned(), force: false }).await
        });
        sleep(BEYOND_THE_LEASE).await;
        cluster.process(Who::Conversion).resume();
        let refused = opening.await.unwrap().map(|_| ()).map_err(Refused::from);
        let refused = refused.expect_err("its owner is alive");
        assert_eq!(refused.reason, Reason::VolumeBusy, "{refused}");
        owner.fsync("vol1").await.unwrap();
        assert_eq!(owner.read("vol1", 0, 8192).await.unwrap(), vec![round; 8192]);
    }
    owner.settles().await.unwrap();
    cluster.no_panic().unwrap();
}
