//! Backups of metadata: taken at any moment of a life, restored elsewhere, and refused when damaged.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use endio_store::meta::{
    BackupError, DiskMeta, JournalHandle, MemoryMeta, MetaOptions, MetaStore, Restoring,
    verify_backup,
};
use support::{Oracle, Random, Service, live, payload};

fn options() -> MetaOptions {
    MetaOptions {
        segment_bytes: 4096,
        chunk_cache_bytes: 24 << 10,
        sled_cache_bytes: 1 << 20,
        ballast_bytes: 0,
        checkpoint_journal_bytes: 8192,
    }
}

fn take(journal: &JournalHandle) -> Vec<u8> {
    let mut backup = journal.backup().unwrap();
    let mut bytes = Vec::new();
    while let Some(piece) = backup.next_piece().unwrap() {
        bytes.extend_from_slice(&piece);
    }
    bytes
}

fn restore(bytes: &[u8]) -> Result<(tempfile::TempDir, DiskMeta), BackupError> {
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("meta");
    Restoring::begin(bytes, &into, &options())?.finish()?;
    Ok((dir, DiskMeta::new(into, options())))
}

/// Backs up a service that holds `oracle`'s records, and checks the restored one against them.
fn comes_back(meta: &MemoryMeta, oracle: &Oracle, what: &str) -> Vec<u8> {
    let bytes = take(&meta.open().unwrap().journal.handle());
    let (_dir, restored) = restore(&bytes).unwrap();
    let mut oracle = oracle.clone();
    oracle.check(&mut Service::open(&restored).unwrap(), what);
    bytes
}

#[test]
fn a_backup_at_any_moment_of_random_lives_restores_just_that_state() {
    let mut with_checkpoint = 0;
    for seed in 0..6 {
        let meta = MemoryMeta::with_options(options());
        let mut oracle = Oracle::default();
        for life in 0..4 {
            live(&meta, seed * 10 + life, 40, &mut oracle).unwrap();
            oracle.check(&mut Service::open(&meta).unwrap(), "before the backup");
            let bytes = comes_back(&meta, &oracle, &format!("seed {seed}, life {life}"));
            with_checkpoint += u32::from(verify_backup(&bytes[..]).unwrap().checkpoint_seq > 0);
        }
    }
    assert!(with_checkpoint > 3, "only {with_checkpoint} backups contained a checkpoint");
}

#[test]
fn an_empty_database_can_be_backed_up_and_keeps_its_identity() {
    let meta = MemoryMeta::with_options(options());
    let id = meta.open().unwrap().database_id;
    let bytes = comes_back(&meta, &Oracle::default(), "empty");
    assert_eq!(restore(&bytes).unwrap().1.open().unwrap().database_id, id);
}

#[test]
fn records_and_checkpoints_made_while_a_backup_is_read_do_not_disturb_it() {
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let random = &mut Random::new(3);
    let mut grow = |service: &mut Service, oracle: &mut Oracle| {
        for _ in 0..60 {
            let payload = payload(random, service.seq + 1);
            service.append(oracle, payload).unwrap();
        }
        service.commit(oracle).unwrap();
        service.checkpoint(oracle).unwrap();
    };
    grow(&mut service, &mut oracle);
    let before = oracle.clone();
    let mut backup = service.journal.handle().backup().unwrap();
    let mut bytes = backup.next_piece().unwrap().unwrap().to_vec();
    // Four checkpoints later nothing of what the backup names would be left without its hold.
    for _ in 0..4 {
        grow(&mut service, &mut oracle);
    }
    while let Some(piece) = backup.next_piece().unwrap() {
        bytes.extend_from_slice(&piece);
    }
    let (_dir, restored) = restore(&bytes).unwrap();
    before.clone().check(&mut Service::open(&restored).unwrap(), "as of the begin");
    let held = files(&meta);
    drop(backup);
    grow(&mut service, &mut oracle);
    assert!(files(&meta) < held, "what was held is dropped after the backup");
}

fn files(meta: &MemoryMeta) -> usize {
    use endio_store::meta::Vfs as _;
    meta.disk().list().unwrap().len()
}

#[test]
fn every_cut_and_every_flipped_byte_of_a_backup_is_refused() {
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    live(&meta, 5, 12, &mut oracle).unwrap();
    let bytes = take(&meta.open().unwrap().journal.handle());
    for at in 0..bytes.len() {
        assert!(verify_backup(&bytes[..at]).is_err(), "cut at {at}");
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(verify_backup(&bad[..]).is_err(), "flipped at {at}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(verify_backup(&longer[..]), Err(BackupError::Damaged { .. })));
}

#[test]
fn a_damaged_backup_leaves_nothing_behind_and_says_where() {
    let meta = MemoryMeta::with_options(options());
    live(&meta, 6, 30, &mut Oracle::default()).unwrap();
    let bytes = take(&meta.open().unwrap().journal.handle());
    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("meta");
    let error = Restoring::begin(&bytes[..bytes.len() - 9], &into, &options()).unwrap_err();
    assert!(error.to_string().contains("cut off"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // The left-over of one that was killed does not stand in the way of the next one.
    std::fs::create_dir_all(dir.path().join("meta.restoring/sled")).unwrap();
    Restoring::begin(&bytes[..], &into, &options()).unwrap().finish().unwrap();
    let error = Restoring::begin(&bytes[..], &into, &options()).unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
}

#[test]
fn a_backup_of_a_later_version_is_refused_as_such() {
    let meta = MemoryMeta::with_options(options());
    let mut bytes = take(&meta.open().unwrap().journal.handle());
    // kind 1, length 4, magic 8, version 4 …, and the frame's checksum behind its payload.
    bytes[13..17].copy_from_slice(&2u32.to_le_bytes());
    let end = 5 + u32::from_le_bytes(*bytes[1..].first_chunk().unwrap()) as usize;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&0u64.to_le_bytes()), &bytes[..end]);
    bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(verify_backup(&bytes[..]), Err(BackupError::UnknownVersion(2))));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    use endio_store::meta::Vfs as _;
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let random = &mut Random::new(9);
    for _ in 0..3 {
        for _ in 0..40 {
            let payload = payload(random, service.seq + 1);
            service.append(&mut oracle, payload).unwrap();
        }
        service.commit(&mut oracle).unwrap();
        service.checkpoint(&mut oracle).unwrap();
    }
    let names = meta.disk().list().unwrap();
    let newest = names.iter().filter(|name| name.ends_with(".chk")).max().unwrap();
    let middle = meta.disk().len(newest).unwrap() / 2;
    let byte = meta.disk().read(newest, middle, 1).unwrap()[0];
    meta.disk().open(newest).unwrap().write_at(middle, &[byte ^ 4]).unwrap();
    let bytes = take(&service.journal.handle());
    let (_dir, restored) = restore(&bytes).unwrap();
    oracle.check(&mut Service::open(&restored).unwrap(), "from the older checkpoint");
}

/// Overwrites the version in the header of a file, and the header's checksum.
fn make_version(meta: &MemoryMeta, name: &str, header: usize, version: u32) {
    use endio_store::meta::Vfs as _;
    let mut bytes = meta.disk().read(name, 0, header).unwrap();
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..header - 4]);
    bytes[header - 4..].copy_from_slice(&crc.to_le_bytes());
    meta.disk().open(name).unwrap().write_at(0, &bytes).unwrap();
}

/// A downgrade by mistake must not destroy anything: the right version finds all as it was.
#[test]
fn files_of_a_later_version_are_refused_as_such_and_left_as_they_are() {
    use endio_store::meta::Vfs as _;
    for (ending, header) in [(".chk", 36), (".log", 32)] {
        let meta = MemoryMeta::with_options(options());
        let mut oracle = Oracle::default();
        let mut service = Service::open(&meta).unwrap();
        let random = &mut Random::new(4);
        for _ in 0..20 {
            let payload = payload(random, service.seq + 1);
            service.append(&mut oracle, payload).unwrap();
        }
        service.commit(&mut oracle).unwrap();
        service.checkpoint(&mut oracle).unwrap();
        let payload = payload(random, service.seq + 1);
        service.append(&mut oracle, payload).unwrap();
        service.commit(&mut oracle).unwrap();
        drop(service);
        let names = meta.disk().list().unwrap();
        let name = names.iter().filter(|name| name.ends_with(ending)).max().unwrap();
        make_version(&meta, name, header, 2);
        let error = meta.open().unwrap_err().to_string();
        assert!(error.contains("format version 2") && error.contains(name), "{error}");
        make_version(&meta, name, header, 1);
        oracle.check(&mut Service::open(&meta).unwrap(), "with the right version again");
    }
}

#[test]
fn a_mount_point_is_refused_before_any_work_and_a_rename_that_fails_is_named() {
    let meta = MemoryMeta::with_options(options());
    live(&meta, 6, 30, &mut Oracle::default()).unwrap();
    let bytes = take(&meta.open().unwrap().journal.handle());
    let dir = tempfile::tempdir().unwrap();
    // Mounted on every system that runs this, and what cannot be read is not even looked at.
    let error = Restoring::begin(&b"no backup"[..], Path::new("/proc"), &options()).unwrap_err();
    assert!(matches!(&error, BackupError::MountPoint(dir) if dir == Path::new("/proc")), "{error}");
    assert!(!Path::new("/proc.restoring").exists());

    let into = dir.path().join("into");
    let restoring = Restoring::begin(&bytes[..], &into, &options()).unwrap();
    std::fs::write(&into, "in the way").unwrap();
    let error = restoring.finish().unwrap_err();
    assert!(matches!(error, BackupError::Rename { .. }), "{error}");
    assert!(error.to_string().contains("into.restoring cannot be renamed to"), "{error}");
}
