//! The metadata is backed up while everything runs, lost, and restored with the command, as
//! docs/OPERATIONS.md tells an operator to.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use endio_api::writeback::{WriteMode, WriteRequest};
use endio_testkit::client::Client;
use endio_testkit::cluster::{Cluster, Options, Who};
use endio_types::Reason;
use tokio::task::block_in_place;

const BLOCK: u64 = 4096;
const VOLUME_BLOCKS: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(90);

async fn write(client: &Client, volume: &str, lblk: u64, blocks: u64, byte: u8) {
    let data = vec![byte; usize::try_from(blocks * BLOCK).unwrap()];
    let write = WriteRequest {
        volume: volume.to_owned(),
        offset_bytes: lblk * BLOCK,
        data: data.into(),
        mode: WriteMode::Direct.into(),
        ..WriteRequest::default()
    };
    client.io().write(write).await.unwrap();
}

/// Old bytes or the refusal to return others: a block that the restored map names may belong to
/// somebody else by now.
async fn old_or_refused(client: &Client, lblk: u64, byte: u8) -> bool {
    match client.read("vol1", lblk * BLOCK, BLOCK).await {
        Ok(data) => {
            assert!(data.iter().all(|read| *read == byte), "block {lblk} is of somebody else");
            true
        }
        Err(refused) => {
            assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused:?}");
            false
        }
    }
}

/// Why the volume that the backup does not know is not read. Until the writeback has heard of the restored
/// conversion, at the latest when its lease is over, it goes on to answer from its memory.
async fn refusal_of_late(client: &Client) -> Option<Reason> {
    for _ in 0..200 {
        match client.read("late", 0, BLOCK).await {
            Ok(data) => assert!(data.iter().all(|byte| *byte == 23)),
            Err(error) if error.reason == Reason::PeerAway => {}
            Err(error) => return Some(error.reason),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restored_metadata_shows_what_was_there_at_the_backup_or_says_that_it_is_gone() {
    // Hardly more blocks than the volume has, so that what is freed is used again at once.
    let options = Options { capacity: "4MiB".to_owned(), ..Options::default() };
    let mut cluster = block_in_place(|| Cluster::start(options)).unwrap();
    let client = cluster.client().with_patience(PATIENCE);
    client.create("vol1", VOLUME_BLOCKS * BLOCK, 1).await.unwrap();
    write(&client, "vol1", 0, VOLUME_BLOCKS, 1).await;
    client.fsync("vol1").await.unwrap();

    let backup = cluster.dir().join("metadata.backup").to_str().unwrap().to_owned();
    block_in_place(|| cluster.endio_ok(&["backup", "metadata", "--out", &backup])).unwrap();

    // The first half goes elsewhere, and its old blocks to others, again and again.
    client.create("late", VOLUME_BLOCKS / 2 * BLOCK, 1).await.unwrap();
    for round in 0..4 {
        write(&client, "vol1", 0, VOLUME_BLOCKS / 2, 10 + round).await;
        write(&client, "late", 0, VOLUME_BLOCKS / 4, 20 + round).await;
    }
    client.fsync("vol1").await.unwrap();

    let data_dir = cluster.dir().join("conversion");
    cluster.process(Who::Conversion).kill();
    fs::rename(&data_dir, cluster.dir().join("conversion.lost")).unwrap();
    let restored = data_dir.to_str().unwrap().to_owned();
    let restore = ["restore", "metadata", "--in", &backup, "--data-dir", &restored];
    block_in_place(|| cluster.endio_ok(&restore)).unwrap();
    block_in_place(|| cluster.start_all()).unwrap();

    let client = cluster.client().with_patience(PATIENCE);
    client.open("vol1", false).await.unwrap();
    // Damage does not go away by asking again for long.
    let asks_once = cluster.client().with_patience(Duration::from_millis(500));
    let late = refusal_of_late(&asks_once).await;
    assert_eq!(late, Some(Reason::UnknownVolume));
    let mut refused = 0;
    for lblk in (0..VOLUME_BLOCKS / 2).step_by(8) {
        refused += u64::from(!old_or_refused(&asks_once, lblk, 1).await);
    }
    assert!(refused > 0, "no block was used again, so nothing was tried");
    for lblk in (VOLUME_BLOCKS / 2..VOLUME_BLOCKS).step_by(8) {
        assert!(old_or_refused(&asks_once, lblk, 1).await, "block {lblk} was never written again");
    }
    // What is gone is written again, and all is well.
    write(&client, "vol1", 0, VOLUME_BLOCKS / 2, 3).await;
    client.fsync("vol1").await.unwrap();
    let data = client.read("vol1", 0, VOLUME_BLOCKS * BLOCK).await.unwrap();
    let half = data.len() / 2;
    assert!(
        data[..half].iter().all(|byte| *byte == 3) && data[half..].iter().all(|byte| *byte == 1)
    );
    client.settles().await.unwrap();
    cluster.no_panic().unwrap();
}
