//! A volume that cannot be written out or read, because a store of it is away, holds up itself and no other.

use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::writeback::{StatusRequest, VolumeRequest, WriteMode, WriteRequest};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;

const SIZE: u64 = 64 << 20;
const PIECE: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
/// On a store that is away.
const STUCK: &str = "stuck";
const HEALTHY: &str = "healthy";

/// Two stores, of which the first one has died, and a writeback with both volumes. What the stuck one has lies
/// on the first store alone, and is overwritten in place; so many pieces of it are dirty.
async fn stack(config: endio_writeback::Config, dirty_pieces: u64) -> (Stack, Writeback) {
    let mut stack = Stack::start(2).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("other"),
        // What is written goes into the cache log.
        write_around_bytes: 0,
        flush_log_bytes: 0,
        // Nothing is written out unless somebody waits for it.
        write_out_after_ms: 600_000,
        io_timeout_ms: 60_000,
        ..config
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    stack.stores[1].crash().await;
    let request = CreateVolumeRequest {
        name: STUCK.to_owned(),
        size_bytes: SIZE,
        replicas: 1,
        in_place: true,
        ..Default::default()
    };
    client.volumes().create(request).await.unwrap();
    let patient = client.clone().with_patience(Duration::from_secs(60));
    for piece in 0..dirty_pieces {
        write(&client, STUCK, piece, 1).await;
    }
    patient.fsync(STUCK).await.unwrap();
    stack.stores[1].start_again().await;
    stack.wait_for_stores(2).await;
    client.create(HEALTHY, SIZE, 1).await.unwrap();
    for piece in 0..dirty_pieces {
        write(&client, STUCK, piece, 2).await;
    }
    stack.stores[0].crash().await;
    (stack, writeback)
}

async fn write(client: &Client, volume: &str, piece: u64, fill: u8) {
    let request = WriteRequest {
        volume: volume.to_owned(),
        offset_bytes: piece * PIECE,
        data: Bytes::from(vec![fill; PIECE as usize]),
        mode: WriteMode::Buffered.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

async fn is_filled(client: &Client, volume: &str, pieces: impl Iterator<Item = (u64, u8)>) {
    for (piece, fill) in pieces {
        let read = client.read(volume, piece * PIECE, PIECE).await.unwrap();
        assert!(read.iter().all(|byte| *byte == fill), "{volume}, piece {piece}: not {fill}");
    }
}

/// The store is back: nothing was lost, and everything ends.
async fn ends_well(mut stack: Stack, client: Client) {
    stack.stores[0].start_again().await;
    stack.wait_for_stores(2).await;
    let patient = client.with_patience(Duration::from_secs(60));
    for volume in [STUCK, HEALTHY] {
        // What failed meanwhile is told once.
        let _ = patient.fsync(volume).await;
        patient.fsync(volume).await.unwrap();
    }
    patient.settles().await.unwrap();
}

/// The log begins with what cannot be written out, so none of it can go. Writes of others go around it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_one_volume_keeps_full_does_not_stop_the_others() {
    let small = endio_writeback::Config {
        log_segment_bytes: MIB,
        log_bytes_max: 4 * MIB,
        ..Default::default()
    };
    let (stack, writeback) = stack(small, 1).await;
    let client = writeback.client();
    // Twice what the log holds, and over the same blocks again.
    let pieces = 8 * MIB / PIECE / 2;
    for fill in [3, 4] {
        for piece in 0..pieces {
            write(&client, HEALTHY, piece, fill).await;
        }
    }
    let status = client.inspect().status(StatusRequest { cluster: false }).await.unwrap();
    assert!(status.into_inner().dirty_bytes >= PIECE, "it was written out after all");
    is_filled(&client, HEALTHY, (0..pieces).map(|piece| (piece, 4))).await;
    is_filled(&client, STUCK, [(0, 2)].into_iter()).await;
    ends_well(stack, client).await;
}

/// Write-outs that wait for a store leave the bytes in flight to those of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_outs_that_wait_for_a_store_leave_room_for_others() {
    let small = endio_writeback::Config {
        write_out_bytes_in_flight: 4 * MIB,
        write_out_blocks: 1_024,
        write_outs_per_volume: 8,
        ..Default::default()
    };
    let (stack, writeback) = stack(small, 8 * MIB / PIECE).await;
    let client = writeback.client();
    let waiting = client.clone();
    let fsync = tokio::spawn(async move { waiting.fsync(STUCK).await });
    // Under way, again and again.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for round in 0..3 {
        write(&client, HEALTHY, round, 3).await;
        // Writes everything out.
        client.volumes().close(VolumeRequest { name: HEALTHY.into() }).await.unwrap();
    }
    is_filled(&client, HEALTHY, (0..3).map(|piece| (piece, 3))).await;
    assert!(!fsync.is_finished(), "the others waited until it had given up");
    ends_well(stack, client).await;
}

/// Reads that wait for a store leave the bytes in flight to those that find theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_wait_for_a_store_leave_room_for_others() {
    let mut stack = Stack::start(2).await;
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("other"),
        read_bytes_in_flight: 4 * MIB,
        read_cache_bytes: 0,
        write_around_bytes: 0,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    // One volume on each store: the other one is away when it is written.
    for (away, volume, fill) in [(1, STUCK, 1), (0, HEALTHY, 2)] {
        client.create(volume, SIZE, 1).await.unwrap();
        stack.stores[away].crash().await;
        for piece in 0..8 * MIB / PIECE {
            write(&client, volume, piece, fill).await;
        }
        let patient = client.clone().with_patience(Duration::from_secs(60));
        patient.fsync(volume).await.unwrap();
        if away == 1 {
            stack.stores[1].start_again().await;
            stack.wait_for_stores(2).await;
        }
    }
    let reads: Vec<_> = (0..8)
        .map(|at| {
            let client = client.clone();
            tokio::spawn(async move { client.read(STUCK, at * MIB, MIB).await.map(drop) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    is_filled(&client, HEALTHY, (0..16).map(|piece| (piece, 2))).await;
    // A part of a block is written after the rest of it was read.
    let request = WriteRequest {
        volume: HEALTHY.to_owned(),
        offset_bytes: 100,
        data: Bytes::from(vec![3; 100]),
        mode: WriteMode::Buffered.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
    assert!(reads.iter().all(|read| !read.is_finished()), "they found their store");
    stack.stores[0].start_again().await;
    stack.wait_for_stores(2).await;
    for read in reads {
        read.await.unwrap().unwrap();
    }
    client.fsync(HEALTHY).await.unwrap();
    client.settles().await.unwrap();
}
