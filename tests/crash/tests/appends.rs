//! Appends that were answered as durable, by services that die at once.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use endio_api::conversion::CreateVolumeRequest;
use endio_api::writeback::{VolumeRequest, WriteMode, WriteRequest};
use endio_testkit::client::Client;
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_testkit::seed::{self, Rng};
use tokio::task::block_in_place;
use tokio::time::sleep;

const PATIENCE: Duration = Duration::from_secs(90);

/// Opens the volume by force, as soon as conversion is back.
async fn take_over(client: &Client) {
    for _ in 0..400 {
        if client.open("vol1", true).await.is_ok() {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("the volume cannot be opened");
}

/// Scenario 38. Conversion and the writeback are killed as soon as a DSYNC append is answered. Another
/// writeback, which has nothing of the first one's cache log, finds the new size and the data behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_of_a_dsync_append_is_durable_before_its_answer() {
    let options = Options { capacity: "256MiB".to_owned(), ..Options::default() };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let mut client = cluster.client().with_patience(PATIENCE);
    let name = || "vol1".to_owned();
    let create =
        CreateVolumeRequest { name: name(), size_bytes: 0, growable: true, ..Default::default() };
    client.create_as(create).await.unwrap();
    let mut owner = 0;
    let mut whole = Vec::new();
    let modes = [WriteMode::Buffered, WriteMode::Direct, WriteMode::Buffered, WriteMode::Direct];
    for (number, mode) in (1..).zip(modes) {
        let data = vec![number; 1000 + 3777 * usize::from(number)];
        let append = WriteRequest {
            volume: name(),
            offset_bytes: whole.len() as u64,
            data: data.clone().into(),
            mode: mode.into(),
            dsync: true,
            ..Default::default()
        };
        client.io().write(append).await.unwrap();
        for who in [Who::Writeback(owner), Who::Conversion] {
            cluster.process(who).signal_kill();
        }
        whole.extend(data);
        owner = block_in_place(|| {
            cluster.process(Who::Writeback(owner)).kill();
            cluster.process(Who::Conversion).restart()?;
            cluster.add_writeback()
        })
        .unwrap();
        client = Client::new(cluster.process(Who::Writeback(owner)).url()).with_patience(PATIENCE);
        take_over(&client).await;
        let found = client.volumes().get(VolumeRequest { name: name() }).await.unwrap();
        assert_eq!(found.into_inner().size_bytes, whole.len() as u64, "append {number}, {mode:?}");
        let read = client.read("vol1", 0, whole.len() as u64).await.unwrap();
        assert!(read == whole, "append {number}, {mode:?}");
    }
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
}

/// Buffered writes around the end of a growing volume, and a writeback that is killed again and again before it
/// has written them out: every byte is there, and the volume ends where it did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_of_a_growing_volume_outlives_kills_of_its_writeback() {
    const ROUNDS: u64 = 8;
    const SIZE_MAX: u64 = 64 << 10;
    let mut rng = Rng::new(seed::announce("endio-crash-tests", "growing_volume_outlives_kills"));
    let options = Options { capacity: "256MiB".to_owned(), ..Options::default() };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    let name = || "vol1".to_owned();
    let create =
        CreateVolumeRequest { name: name(), size_bytes: 0, growable: true, ..Default::default() };
    client.create_as(create).await.unwrap();
    let mut whole: Vec<u8> = Vec::new();
    for round in 0..ROUNDS {
        let client = cluster.client().with_patience(PATIENCE);
        for _ in 0..rng.between(2, 8) {
            let size = whole.len() as u64;
            let offset = size.saturating_sub(rng.below(8_000)).min(SIZE_MAX);
            let (length, fill) = (rng.between(1, 8_000), rng.below(255) as u8 + 1);
            let (from, to) = (offset as usize, (offset + length) as usize);
            whole.resize(whole.len().max(to), 0);
            whole[from..to].fill(fill);
            let write = WriteRequest {
                volume: name(),
                offset_bytes: offset,
                data: vec![fill; length as usize].into(),
                mode: WriteMode::Buffered.into(),
                ..Default::default()
            };
            client.io().write(write).await.unwrap();
        }
        if rng.chance(30) {
            client.flush("vol1").await.unwrap();
        }
        block_in_place(|| cluster.process(Who::Writeback(0)).restart()).unwrap();
        let client = cluster.client().with_patience(PATIENCE);
        // It waits for the replay, before which only conversion's size is known.
        let read = client.read("vol1", 0, whole.len() as u64).await.unwrap();
        assert!(read == whole, "round {round}");
        let found = client.volumes().get(VolumeRequest { name: name() }).await.unwrap();
        assert_eq!(found.into_inner().size_bytes, whole.len() as u64, "round {round}");
    }
    cluster.client().settles().await.unwrap();
    cluster.no_panic().unwrap();
}
