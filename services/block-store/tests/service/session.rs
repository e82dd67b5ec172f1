use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use endio_api::conversion::{
    Fence, PhysicalRange, Punch, store_command::Command, store_message::Message,
};
use endio_store::block::{BlockDevice as _, MemoryDevice};
use endio_types::{BLOCK_SIZE, ClusterEpoch, IoEndId, Reason};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{bench::*, fake::*};

async fn wait_for_health(store: &Store, expected: ServingStatus) {
    let mut client = HealthClient::new(store.channel.clone());
    let service = "endio.blockstore.v1.BlockStore".to_owned();
    let request = HealthCheckRequest { service };
    within("the health", async {
        while client.check(request.clone()).await.unwrap().into_inner().status != expected as i32 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn nothing_is_served_before_conversion_knows_the_store() {
    let mut conversion = FakeConversion::start().await;
    let mut store = Store::on(config(&conversion), Arc::new(MemoryDevice::new(10))).await;
    let mut session = conversion.session().await;
    assert_eq!(session.register.uuid, [5; 16].as_slice());
    assert_eq!((session.register.incarnation, session.register.capacity_blocks), (1, 10));
    assert_eq!(session.register.url, store.running.url());
    wait_for_health(&store, ServingStatus::NotServing).await;
    let done = store.write(Want::default(), blocks(1, 1)).await;
    assert_eq!(reason(done.reason), Some(Reason::NotReady));
    let done = store.read_blocks(0, 1, Vec::new()).await;
    assert_eq!(reason(done.reason), Some(Reason::NotReady));
    session.answer_registration(1, 10_000).await;
    assert!(matches!(session.next().await, Message::Ready(ready) if ready.cluster_epoch == 1));
    wait_for_health(&store, ServingStatus::Serving).await;
    drop(session);
    wait_for_health(&store, ServingStatus::NotServing).await;
    let _session = conversion.registered(1).await;
    wait_for_health(&store, ServingStatus::Serving).await;
}

#[tokio::test]
async fn an_unanswered_release_is_sent_again_in_the_same_epoch_and_dropped_in_the_next() {
    let (mut conversion, mut store, mut session) = ready(Arc::new(MemoryDevice::new(10))).await;
    for io_end in 1..=2 {
        store.write(Want { io_end, ..Want::default() }, blocks(1, 1)).await;
    }
    let first = session.release().await;
    let second = session.release().await;
    session.accept(&first).await;
    session.assert_silent().await;
    drop(session);
    let mut session = conversion.registered(1).await;
    assert_eq!(session.release().await.token, second.token);
    session.assert_silent().await;
    drop(session);
    let mut session = conversion.registered(2).await;
    session.assert_silent().await;
    let done = store.write(Want { io_end: 3, ..Want::default() }, blocks(1, 1)).await;
    assert_eq!(reason(done.reason), Some(Reason::OldEpoch));
}

/// Scenario 55.
#[tokio::test]
async fn a_new_epoch_waits_until_every_bio_of_the_old_one_has_drained() {
    let device = GatedDevice::new(10);
    let (mut conversion, mut store, session) = ready(device.clone()).await;
    device.hold();
    let mut writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    drop(session);
    let mut session = conversion.session().await;
    session.answer_registration(2, 10_000).await;
    within("the epoch", async {
        while store.describe().await.cluster_epoch != 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let new = Want { epoch: 2, io_end: 5, ..Want::default() };
    assert_eq!(reason(store.write(new, blocks(2, 1)).await.reason), Some(Reason::NotReady));
    assert!(session.from_store.try_recv().is_err());
    device.open();
    assert_eq!(writes.next().await.reason, 0);
    assert!(matches!(session.next().await, Message::Ready(ready) if ready.cluster_epoch == 2));
    assert_eq!(reason(store.write(new, blocks(2, 1)).await.reason), None);
    let release = session.release().await;
    assert_eq!(release.token.unwrap().io_end, IoEndId::new(ClusterEpoch(2), 5).0);
}

/// Scenario 43.
#[tokio::test]
async fn a_fence_is_confirmed_after_what_it_names_has_drained_and_late_bios_are_refused() {
    let device = GatedDevice::new(10);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    device.hold();
    let writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    let io_ends = vec![IoEndId::new(ClusterEpoch(1), 1).0];
    session.send(Command::Fence(Fence { fence: 5, io_ends, ..Fence::default() })).await;
    // A fence of nothing is confirmed at once, before the one that waits.
    session.assert_silent().await;
    let late = Want { segment: 2, ..Want::default() };
    assert_eq!(reason(store.write(late, blocks(2, 1)).await.reason), Some(Reason::Aborted));
    device.open();
    let (mut released, mut fenced) = (0, 0);
    for _ in 0..2 {
        match session.next().await {
            Message::Release(_) => released += 1,
            Message::FenceDone(done) => fenced += usize::from(done.fence == 5),
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!((released, fenced), (1, 1));
    assert_eq!(device.writes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_punch_gives_space_back_to_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let mut conversion = FakeConversion::start().await;
    let config = endio_block_store::Config { capacity_bytes: Some(8 << 20), ..config(&conversion) };
    let mut store = Store::in_dir(config, dir.path()).await.unwrap();
    let mut session = conversion.registered(1).await;
    let want = Want { pblk: 100, blocks: 256, ..Want::default() };
    assert_eq!(store.write(want, blocks(1, 256)).await.reason, 0);
    let release = session.release().await;
    session.accept(&release).await;
    let full = store.describe().await.used_blocks;
    let ranges = vec![PhysicalRange { pblk: 100, blocks: 200 }];
    session.send(Command::Punch(Punch { punch: 3, ranges })).await;
    assert!(matches!(session.next().await, Message::PunchDone(done) if done.punch == 3));
    assert_eq!(store.describe().await.used_blocks, full - 200);
    assert_eq!(store.read_blocks(299, 1, Vec::new()).await.data, blocks(0, 1));
    assert_eq!(store.read_blocks(300, 1, Vec::new()).await.data, blocks(1, 1));
    store.stop().await;
}

#[tokio::test]
async fn a_punch_waits_for_a_bio_on_its_blocks() {
    let device = GatedDevice::new(10);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    device.hold();
    let writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    let ranges = vec![PhysicalRange { pblk: 0, blocks: 1 }];
    session.send(Command::Punch(Punch { punch: 3, ranges })).await;
    session.assert_silent().await;
    assert_eq!(device.block(0), blocks(1, 1));
    device.open();
    assert!(matches!(session.next().await, Message::Release(_)));
    assert!(matches!(session.next().await, Message::PunchDone(done) if done.punch == 3));
    assert_eq!(device.block(0), vec![0; BLOCK_SIZE]);
    assert_eq!(device.memory.used_blocks().unwrap(), 0);
}

/// Scenario 50: the margin lies on the store's side.
#[tokio::test]
async fn a_store_whose_lease_is_not_renewed_refuses_bios_and_registers_anew() {
    let mut conversion = FakeConversion::start().await;
    conversion.lease_ms.store(300, Ordering::SeqCst);
    conversion.answers_renewals.store(false, Ordering::SeqCst);
    let mut store = Store::on(config(&conversion), Arc::new(MemoryDevice::new(10))).await;
    let _silent = conversion.registered(1).await;
    within("the end of the lease", async {
        for io_end in 1.. {
            let done = store.write(Want { io_end, ..Want::default() }, blocks(1, 1)).await;
            match reason(done.reason) {
                None => tokio::time::sleep(Duration::from_millis(5)).await,
                refused => {
                    assert_eq!(refused, Some(Reason::LeaseExpired));
                    break;
                }
            }
        }
    })
    .await;
    // Not before: a renewal that was sent just now would be answered, and the session would go on.
    let _session = conversion.registered(1).await;
    conversion.answers_renewals.store(true, Ordering::SeqCst);
    let want = Want { io_end: 1 << 30, ..Want::default() };
    assert_eq!(store.write(want, blocks(1, 1)).await.reason, 0);
}
