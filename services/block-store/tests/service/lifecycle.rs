use std::sync::Arc;

use endio_block_store::{Config, RunError, StartError};
use endio_store::block::{MemoryDevice, OpenBlockFileError};
use endio_types::Reason;

use crate::{bench::*, fake::*};

#[tokio::test]
async fn the_incarnation_grows_at_each_start_and_the_data_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut conversion = FakeConversion::start().await;
    for incarnation in 1..=3 {
        let config = Config { capacity_bytes: Some(1 << 20), ..config(&conversion) };
        let mut store = Store::in_dir(config, dir.path()).await.unwrap();
        let session = conversion.registered(incarnation).await;
        assert_eq!(session.register.incarnation, incarnation);
        let want = Want { epoch: incarnation, incarnation, pblk: incarnation, ..Want::default() };
        if incarnation > 1 {
            let old = Want { incarnation: incarnation - 1, ..want };
            let done = store.write(old, blocks(9, 1)).await;
            assert_eq!(reason(done.reason), Some(Reason::OldIncarnation));
            let read = endio_api::blockstore::ReadRequest {
                grant: Some(grant(incarnation, 1)),
                pblk: incarnation - 1,
                blocks: 1,
                ..Default::default()
            };
            assert_eq!(store.read(read).await.data, blocks(incarnation as u8 - 1, 1));
        }
        assert_eq!(store.write(want, blocks(incarnation as u8, 1)).await.reason, 0);
        drop(session);
        store.shutdown.request();
        // Nobody answers the release any more: the stop does not wait for it.
        within("the stop", store.running.wait()).await.unwrap();
    }
}

#[tokio::test]
async fn a_second_store_on_the_same_data_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let conversion = FakeConversion::start().await;
    let first = Store::in_dir(config(&conversion), dir.path()).await.unwrap();
    let second = Store::in_dir(config(&conversion), dir.path()).await;
    let error = second.err().expect("the directory is locked");
    assert!(matches!(error, StartError::Open(OpenBlockFileError::InUse(_))), "{error}");
    first.stop().await;
    Store::in_dir(config(&conversion), dir.path()).await.unwrap().stop().await;
}

/// Scenario 68.
#[tokio::test]
async fn a_stop_refuses_new_bios_and_finishes_what_is_under_way() {
    let device = GatedDevice::new(10);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    device.hold();
    let mut writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    store.shutdown.request();
    writes.send(bio(Want { io_end: 2, ..Want::default() }, blocks(2, 1))).await;
    assert_eq!(reason(writes.next().await.reason), Some(Reason::Draining));
    device.open();
    assert_eq!(writes.next().await.reason, 0);
    let release = session.release().await;
    assert_eq!(release.reason, 0);
    session.accept(&release).await;
    within("the stop", store.running.wait()).await.unwrap();
}

/// Scenario 68.
#[tokio::test]
async fn a_stop_that_overruns_names_what_is_held() {
    let device = GatedDevice::new(10);
    let mut conversion = FakeConversion::start().await;
    let config = Config { drain_timeout_ms: 50, ..config(&conversion) };
    let mut store = Store::on(config, device.clone()).await;
    let _session = conversion.registered(1).await;
    device.hold();
    let writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    store.shutdown.request();
    let error = within("the stop", store.running.wait()).await.unwrap_err();
    match error {
        RunError::Overrun(held) => assert!(held[0].contains("in flight"), "{held:?}"),
        other => panic!("unexpected {other}"),
    }
    device.open();
}

#[tokio::test]
async fn a_store_without_a_conversion_stops_at_once() {
    let conversion = FakeConversion::start().await;
    let config = Config { conversion: "http://127.0.0.1:1".to_owned(), ..config(&conversion) };
    Store::on(config, Arc::new(MemoryDevice::new(10))).await.stop().await;
}
