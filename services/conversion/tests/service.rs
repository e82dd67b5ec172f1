//! The service over real gRPC, with a scripted store and a scripted writeback as its peers.
#![allow(missing_docs, clippy::unwrap_used)]

mod operations;
mod peers;

use endio_api::conversion as proto;
use endio_api::status;
use endio_conversion::{DriverError, StartError};
use endio_store::meta::{MemoryMeta, MetaOptions, Vfs};
use endio_types::Reason;
use peers::{ScriptedStore, ScriptedWriteback, Service};

const BLOCKS: u32 = 8;

async fn volume(service: &Service, replicas: u32) -> proto::Volume {
    let request = proto::CreateVolumeRequest {
        name: "vol".to_owned(),
        size_bytes: 64 << 20,
        replicas,
        ..Default::default()
    };
    service.client().create_volume(request).await.unwrap().into_inner()
}

/// Scenario 2: the submitter first, then the last segment triggers.
#[tokio::test]
async fn a_write_converts_when_its_last_token_is_released() {
    let service = Service::start().await;
    volume(&service, 2).await;
    let mut stores =
        [ScriptedStore::register(&service, 1).await, ScriptedStore::register(&service, 2).await];
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;

    let begun = writeback.begin(0, BLOCKS).await;
    assert_eq!(begun.segments.len(), 2, "one segment for each replica");
    assert!(begun.owes_conversion);
    writeback.release(&begun).await;
    let before = writeback.lookup(&service, 0, BLOCKS).await;
    assert!(before.extents.is_empty(), "nothing is written before the last release");
    for segment in &begun.segments {
        let token = segment.token.clone().unwrap();
        let store = stores.iter_mut().find(|store| store.id == token.store).unwrap();
        assert_eq!(store.release_durable(token).await, None);
    }
    let done = writeback.completion().await;
    assert_eq!((done.reason, done.converted.as_slice()), (0, [0, u64::from(BLOCKS)].as_slice()));

    let after = writeback.lookup(&service, 0, BLOCKS).await;
    assert_eq!(after.extents.len(), 1);
    assert_eq!(after.extents[0].places.len(), 2);
    assert_eq!(after.extents[0].crc32c.len(), BLOCKS as usize);
    assert_eq!(service.findings().await, Vec::<String>::new());
}

/// Scenarios 32 and 56: what was converted survives a restart; what was in flight is of an old
/// epoch.
#[tokio::test]
async fn a_restart_keeps_the_map_and_fences_the_old_epoch() {
    let service = Service::start().await;
    volume(&service, 1).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    let first_epoch = store.epoch;
    writeback.write(&mut store, 0, BLOCKS).await;
    let in_flight = writeback.begin(100, BLOCKS).await;
    writeback.release(&in_flight).await;

    let service = service.restart().await;
    let mut store = ScriptedStore::register(&service, 1).await;
    assert!(store.epoch > first_epoch);
    let stale = in_flight.segments[0].token.clone().unwrap();
    assert_eq!(store.release_durable(stale).await, Some(Reason::OldEpoch));
    let mut writeback = writeback.reconnect(&service).await;
    let view = writeback.lookup(&service, 0, 200).await;
    assert_eq!(view.extents.len(), 1, "only the converted write is in the map");
    assert_eq!(view.extents[0].lblk, 0);
    writeback.write(&mut store, 100, BLOCKS).await;
    assert_eq!(service.findings().await, Vec::<String>::new());
}

/// Scenario 61: the first writeback is fenced.
#[tokio::test]
async fn a_forced_open_fences_the_first_writeback() {
    let service = Service::start().await;
    volume(&service, 1).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    let mut first = ScriptedWriteback::open(&service, "vol").await;
    let in_flight = first.begin(0, BLOCKS).await;

    let refused = ScriptedWriteback::try_open(&service, "vol", false).await.err().unwrap();
    assert_eq!(status::reason(&refused), Reason::VolumeBusy);
    let mut second = ScriptedWriteback::try_open(&service, "vol", true).await.unwrap();
    assert!(second.generation > first.generation);

    let late = in_flight.segments[0].token.clone().unwrap();
    assert!(store.release_durable(late).await.is_some(), "a late release is refused");
    assert_eq!(first.begin_refused(0, BLOCKS).await, Reason::OldGeneration);
    second.write(&mut store, 0, BLOCKS).await;
    assert_eq!(service.findings().await, Vec::<String>::new());
}

#[tokio::test]
async fn creating_a_volume_twice_is_answered_and_another_size_is_refused() {
    let service = Service::start().await;
    let first = volume(&service, 1).await;
    assert_eq!(volume(&service, 1).await.id, first.id);
    let other = proto::CreateVolumeRequest {
        name: "vol".to_owned(),
        size_bytes: 1 << 20,
        ..Default::default()
    };
    let refused = service.client().create_volume(other).await.unwrap_err();
    assert_eq!(status::reason(&refused), Reason::AlreadyExists);
    let unknown = proto::VolumeRequest { name: "nobody".to_owned() };
    let refused = service.client().get_volume(unknown).await.unwrap_err();
    assert_eq!(status::reason(&refused), Reason::UnknownVolume);
}

#[tokio::test]
async fn a_message_that_cannot_be_understood_ends_its_stream_with_a_reason() {
    let service = Service::start().await;
    let mut writeback = ScriptedWriteback::hello(&service).await;
    writeback.send(proto::WritebackMessage { message: None }).await;
    let refused = writeback.failure().await;
    assert_eq!(status::reason(&refused), Reason::Malformed);
    assert_eq!(service.findings().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_write_without_a_live_store_is_refused_with_the_reason() {
    let service = Service::start().await;
    volume(&service, 1).await;
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    assert_eq!(writeback.begin_refused(0, BLOCKS).await, Reason::NotEnoughStores);
}

/// Scenario 68: what is in flight may end, then the service stops by itself.
#[tokio::test]
async fn a_graceful_stop_refuses_new_work_and_finishes_what_is_in_flight() {
    let service = Service::start().await;
    volume(&service, 1).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    let in_flight = writeback.begin(0, BLOCKS).await;
    service.shutdown.request();
    assert_eq!(writeback.refused_at_last(64, BLOCKS).await, Reason::Draining);
    writeback.release(&in_flight).await;
    let token = in_flight.segments[0].token.clone().unwrap();
    assert_eq!(store.release_durable(token).await, None);
    assert_eq!(writeback.completion().await.reason, 0);
    drop((store, writeback));
    service.stopped().await;
}

/// Scenario 70: the disk fails at one sync after the other, from before the epoch's record to
/// after it. Whoever is answered, is answered from a durable epoch; otherwise the service ends.
#[tokio::test]
async fn a_converter_whose_epoch_does_not_become_durable_grants_nothing_and_ends() {
    let (mut refused, mut ended, mut served) = (0, 0, 0);
    for syncs in 0..64 {
        let metadata = MemoryMeta::new();
        metadata.disk().fail_sync_after(syncs);
        let Ok(service) = Service::start_over(&metadata).await else {
            refused += 1;
            continue;
        };
        let request = proto::CreateVolumeRequest {
            name: "vol".to_owned(),
            size_bytes: 64 << 20,
            ..Default::default()
        };
        if service.client().create_volume(request).await.is_ok() {
            served += 1;
            break;
        }
        let fault = service.fault().await;
        assert!(matches!(fault, StartError::Driver(DriverError::Commit(_))), "{fault:?}");
        ended += 1;
    }
    assert!(refused > 0 && ended > 0 && served == 1, "{refused} {ended} {served}");
}

/// Scenario 66: on a full disk the accepted write converts out of the reserve, new ones are
/// refused, and service resumes by itself.
#[tokio::test]
async fn on_a_full_metadata_disk_an_accepted_write_converts_and_service_resumes_with_room() {
    // A segment is lengthened ahead of its records, so a full disk is met at the next one.
    let options =
        MetaOptions { ballast_bytes: 1 << 20, segment_bytes: 1_024, ..MetaOptions::default() };
    let metadata = MemoryMeta::with_options(options);
    let service = Service::start_over(&metadata).await.unwrap();
    volume(&service, 1).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    let mut accepted = writeback.begin(0, BLOCKS).await;
    // Free space is told against a capacity; then the disk is as large as what is on it.
    metadata.disk().set_capacity(Some(1 << 40));
    let used = (1 << 40) - metadata.disk().free_bytes().unwrap();
    metadata.disk().set_capacity(Some(used));
    let mut refused = None;
    for _ in 0..32 {
        writeback.release(&accepted).await;
        let token = accepted.segments[0].token.clone().unwrap();
        assert_eq!(store.release_durable(token).await, None);
        assert_eq!(writeback.completion().await.reason, 0, "what was accepted converts");
        match writeback.try_begin(64, BLOCKS).await {
            Ok(begun) => accepted = begun,
            Err(reason) => {
                refused = Some(reason);
                break;
            }
        }
    }
    assert_eq!(refused, Some(Reason::MetadataFull));
    metadata.disk().set_capacity(None);
    let begun = writeback.begun_at_last(64, BLOCKS).await;
    writeback.release(&begun).await;
    let token = begun.segments[0].token.clone().unwrap();
    assert_eq!(store.release_durable(token).await, None);
    assert_eq!(writeback.completion().await.reason, 0);
    assert_eq!(service.findings().await, Vec::<String>::new());
}
