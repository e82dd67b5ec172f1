//! Backup and restore of the metadata, and who may speak with this service.

use std::path::Path;

use endio_api::conversion as proto;
use endio_api::{common, status};
use endio_conversion::{EPOCH_LEAP, InPlace, RestoreError, RestoreOptions, Restored, restore};
use endio_store::meta::BackupError;
use endio_types::{Protocol, Reason};
use tokio_stream::StreamExt as _;

use crate::peers::{self, ScriptedStore, ScriptedWriteback, Service};

async fn create(service: &Service, name: &str, in_place: bool) -> proto::Volume {
    let request = proto::CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: 64 << 20,
        in_place,
        ..Default::default()
    };
    service.client().create_volume(request).await.unwrap().into_inner()
}

async fn take(service: &Service) -> Vec<u8> {
    let pieces = service.client().backup(proto::BackupRequest {}).await.unwrap().into_inner();
    let pieces: Vec<_> = pieces.collect().await;
    pieces.into_iter().flat_map(|piece| piece.unwrap().data).collect()
}

fn into(dir: &Path, backup: &[u8], in_place: InPlace) -> Result<Restored, RestoreError> {
    let options = RestoreOptions { in_place, ..RestoreOptions::default() };
    restore(backup, &dir.join("meta"), &options)
}

/// What was in the map at the backup is there again, and every number that was given out since is
/// skipped.
#[tokio::test]
async fn a_restored_service_has_the_map_of_the_backup_and_numbers_above_all_since() {
    let service = Service::start().await;
    create(&service, "vol", false).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    writeback.write(&mut store, 0, 8).await;
    let backup = take(&service).await;
    // Things that a restore takes back.
    writeback.write(&mut store, 100, 8).await;
    let later = create(&service, "later", false).await;
    let later_store = ScriptedStore::register(&service, 2).await;
    let service = service.restart().await;
    let last_epoch = ScriptedStore::register(&service, 1).await.epoch;
    let before = ScriptedWriteback::try_open(&service, "vol", true).await.unwrap().generation;

    let dir = tempfile::tempdir().unwrap();
    let restored = into(dir.path(), &backup, InPlace::Refuse).unwrap();
    assert_eq!((restored.volumes, restored.mapped_blocks), (vec!["vol".to_owned()], 8));
    let service = Service::start_at(dir).await;
    let mut store = ScriptedStore::register(&service, 1).await;
    assert!(store.epoch > last_epoch + EPOCH_LEAP / 2, "{} after {last_epoch}", store.epoch);
    let mut writeback = ScriptedWriteback::open(&service, "vol").await;
    assert!(writeback.generation > before);
    let view = writeback.lookup(&service, 0, 200).await;
    let found: Vec<_> = view.extents.iter().map(|extent| (extent.lblk, extent.blocks)).collect();
    assert_eq!(found, [(0, 8)]);
    writeback.write(&mut store, 50, 8).await;
    let other = create(&service, "other", false).await;
    assert!(other.id > later.id, "the number of a volume of after the backup is not given again");
    let other_store = ScriptedStore::register(&service, 3).await;
    assert!(other_store.id > later_store.id, "nor is that of a store");
    assert_eq!(service.findings().await, Vec::<String>::new());
}

#[tokio::test]
async fn in_place_volumes_are_refused_dropped_or_kept_as_the_operator_says() {
    let service = Service::start().await;
    create(&service, "plain", false).await;
    create(&service, "raw", true).await;
    let backup = take(&service).await;
    let dir = tempfile::tempdir().unwrap();
    let error = into(dir.path(), &backup, InPlace::Refuse).unwrap_err();
    assert!(matches!(&error, RestoreError::InPlace(names) if names == &["raw"]), "{error}");
    assert!(!dir.path().join("meta").exists(), "a refusal leaves no directory");
    let restored = into(dir.path(), &backup, InPlace::Drop).unwrap();
    assert_eq!((restored.volumes, restored.dropped), (vec!["plain".into()], vec!["raw".into()]));
    let service = Service::start_at(dir).await;
    let volumes = service.client().list_volumes(proto::ListVolumesRequest {}).await.unwrap();
    let names: Vec<_> = volumes.into_inner().volumes.into_iter().map(|v| v.name).collect();
    assert_eq!(names, ["plain"]);
    let dir = tempfile::tempdir().unwrap();
    let restored = into(dir.path(), &backup, InPlace::Keep).unwrap();
    assert_eq!(restored.volumes, ["plain", "raw"]);
}

#[tokio::test]
async fn a_cut_off_backup_and_a_directory_in_use_are_refused() {
    let service = Service::start().await;
    create(&service, "vol", false).await;
    let backup = take(&service).await;
    let dir = tempfile::tempdir().unwrap();
    let cut = into(dir.path(), &backup[..backup.len() - 1], InPlace::Refuse).unwrap_err();
    assert!(matches!(cut, RestoreError::Backup(BackupError::Damaged { .. })), "{cut}");
    into(dir.path(), &backup, InPlace::Refuse).unwrap();
    let again = into(dir.path(), &backup, InPlace::Refuse).unwrap_err();
    assert!(again.to_string().contains("is not empty"), "{again}");
    let too_high = RestoreOptions { epoch_at_least: 1 << 24, ..RestoreOptions::default() };
    let elsewhere = dir.path().join("elsewhere");
    let error = restore(&backup[..], &elsewhere, &too_high).unwrap_err();
    assert!(matches!(error, RestoreError::Epoch(_)), "{error}");
}

/// A backup holds files: there is one at a time, and its end, also a broken one, lets go.
#[tokio::test]
async fn a_second_backup_waits_for_the_first_and_a_dropped_one_lets_go() {
    let service = Service::start().await;
    // More than the pieces that are read ahead.
    let name = "n".repeat(128);
    for n in 0..200 {
        create(&service, &format!("{}{n}", &name[..120]), false).await;
    }
    let first = service.client().backup(proto::BackupRequest {}).await.unwrap();
    let mut refused = 0;
    drop(first);
    for _ in 0..500 {
        match service.client().backup(proto::BackupRequest {}).await {
            Ok(_) => return,
            Err(told) => {
                assert_eq!(status::reason(&told), Reason::Limit);
                refused += 1;
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }
    panic!("still refused after {refused} tries");
}

fn version(major: u32, minor: u32) -> Option<common::Protocol> {
    Some(common::Protocol { major, minor })
}

/// N and N-1 are served, anything else is refused with what to do.
#[tokio::test]
async fn peers_of_this_and_the_previous_major_protocol_are_served_and_no_others() {
    let service = Service::start().await;
    let Protocol { major, .. } = Protocol::CURRENT;
    for taken in [version(major, 0), version(major, 99), version(major - 1, 0), None] {
        assert_eq!(peers::hello(&service, taken).await, Ok(()), "{taken:?}");
        assert_eq!(peers::register(&service, taken).await, Ok(()), "{taken:?}");
    }
    let refused = [(version(major + 1, 0), "this service first"), (version(0, 9), "the peer, one")];
    for (version, advice) in refused {
        for told in
            [peers::hello(&service, version).await, peers::register(&service, version).await]
        {
            let told = told.unwrap_err();
            assert!(told.starts_with("PROTOCOL: ") && told.contains(advice), "{told}");
        }
    }
}

#[tokio::test]
async fn the_service_describes_itself() {
    let service = Service::start().await;
    create(&service, "vol", false).await;
    let it = service.client().describe(proto::DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((it.cluster_epoch, it.version.as_str()), (1, env!("CARGO_PKG_VERSION")));
    assert!(it.durable_record >= 2 && it.journal_bytes > 0 && !it.metadata_full, "{it:?}");
}
