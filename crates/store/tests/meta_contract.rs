//! What every metadata store promises, run over the disk and over memory.
#![allow(clippy::unwrap_used)]

mod support;

use endio_state_machine::chunk::ChunkId;
use endio_state_machine::extent_map::{ChunkTable, MemoryTable};
use endio_store::meta::{DiskMeta, MemoryMeta, MetaError, MetaOptions, MetaStore};
use endio_types::VolumeId;
use support::{Oracle, Random, Service, apply, extents, live, payload};

fn options() -> MetaOptions {
    MetaOptions {
        segment_bytes: 4096,
        chunk_cache_bytes: 24 << 10,
        sled_cache_bytes: 1 << 20,
        ballast_bytes: 1 << 20,
        checkpoint_journal_bytes: 8192,
    }
}

/// Runs a test over each kind of store.
fn over_both(test: impl Fn(&dyn MetaStore)) {
    test(&MemoryMeta::with_options(MetaOptions { ballast_bytes: 0, ..options() }));
    let dir = tempfile::tempdir().unwrap();
    test(&DiskMeta::new(dir.path().join("meta"), options()));
}

fn grow(service: &mut Service, oracle: &mut Oracle, seed: u64, records: u64) {
    let random = &mut Random::new(seed);
    for _ in 0..records {
        let payload = payload(random, service.seq + 1);
        service.append(oracle, payload).unwrap();
    }
    service.commit(oracle).unwrap();
}

#[test]
fn random_lives_always_find_what_was_committed() {
    over_both(|meta| {
        let mut oracle = Oracle::default();
        for seed in 0..4 {
            live(meta, seed, 60, &mut oracle).unwrap();
        }
        oracle.check(&mut Service::open(meta).unwrap(), "at last");
    });
}

#[test]
fn a_new_directory_is_empty_and_not_called_rebuilt() {
    over_both(|meta| {
        let mut found = meta.open().unwrap();
        assert_eq!((found.next_seq, found.rebuilt.clone()), (1, None));
        assert!(found.snapshot.is_none() && found.records.next().is_none());
        assert!(extents(found.table.as_mut()).is_empty());
    });
}

#[test]
fn the_database_keeps_its_id() {
    over_both(|meta| {
        let id = meta.open().unwrap().database_id;
        assert_eq!(meta.open().unwrap().database_id, id);
        assert_ne!(id, 0);
    });
}

#[test]
fn a_clean_stop_keeps_the_table_and_a_kill_rebuilds_it() {
    over_both(|meta| {
        let mut oracle = Oracle::default();
        let mut service = Service::open(meta).unwrap();
        grow(&mut service, &mut oracle, 1, 40);
        service.close(&mut oracle).unwrap();
        let mut service = Service::open(meta).unwrap();
        assert_eq!(service.rebuilt, None);
        oracle.check(&mut service, "after a clean stop");
        drop(service);
        let mut service = Service::open(meta).unwrap();
        assert!(service.rebuilt.as_deref().unwrap().contains("not clean"));
        oracle.check(&mut service, "after a kill");
    });
}

#[test]
fn a_store_that_is_open_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let meta = DiskMeta::new(dir.path(), options());
    let first = meta.open().unwrap();
    let error = meta.open().err().unwrap();
    assert!(matches!(error, MetaError::Locked(_)));
    assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    drop(first);
    meta.open().unwrap();
    let meta = MemoryMeta::new();
    let first = meta.open().unwrap();
    assert!(matches!(meta.open(), Err(MetaError::Locked(_))));
    drop(first);
    meta.open().unwrap();
}

#[test]
fn the_journal_works_in_a_thread_of_its_own() {
    over_both(|meta| {
        let found = meta.open().unwrap();
        let mut journal = found.journal;
        let handle = journal.handle();
        let thread = std::thread::spawn(move || {
            journal.append(1, 1, b"one").unwrap();
            journal.append(2, 1, b"two").unwrap();
            journal.commit().unwrap()
        });
        assert_eq!(thread.join().unwrap(), 2);
        assert_eq!((handle.stats().durable_seq, handle.stats().commits), (2, 1));
        drop((found.table, found.records, found.checkpointer, handle));
        let records: Vec<_> = meta.open().unwrap().records.map(Result::unwrap).collect();
        assert_eq!(records.len(), 2);
        assert_eq!(
            (records[1].seq, records[1].epoch, &records[1].payload[..]),
            (2, 1, &b"two"[..])
        );
    });
}

#[test]
fn records_out_of_order_are_refused_and_change_nothing() {
    over_both(|meta| {
        let mut found = meta.open().unwrap();
        let journal = &mut found.journal;
        journal.append(1, 5, b"x").unwrap();
        for (seq, epoch) in [(1, 5), (3, 5), (2, 4)] {
            assert!(matches!(journal.append(seq, epoch, b"y"), Err(MetaError::Misuse(_))));
        }
        journal.append(2, 5, b"z").unwrap();
        assert_eq!(journal.commit().unwrap(), 2);
        assert_eq!(journal.commit().unwrap(), 2);
    });
}

#[test]
fn a_table_ahead_of_the_journal_is_neither_closed_nor_checkpointed() {
    over_both(|meta| {
        let mut oracle = Oracle::default();
        let mut service = Service::open(meta).unwrap();
        grow(&mut service, &mut oracle, 3, 10);
        service.begin_checkpoint(&mut oracle).unwrap();
        // An unmapping of everything: the chunks are gone, and only the table's own number says so.
        for volume in 1..3u64 {
            let everything = [0, volume, 0, 2000, 1].map(u64::to_le_bytes).concat();
            service.append(&mut oracle, everything).unwrap();
        }
        assert!(service.checkpointer.write_chunks(service.table.as_mut(), 1000).unwrap());
        let ahead = service.checkpointer.finish(service.seq);
        assert!(matches!(ahead, Err(MetaError::Misuse(_))), "{ahead:?}");
        assert!(matches!(service.table.close(service.seq), Err(MetaError::Misuse(_))));
        service.commit(&mut oracle).unwrap();
        service.checkpointer.finish(service.seq).unwrap();
        service.close(&mut oracle).unwrap();
        oracle.check(&mut Service::open(meta).unwrap(), "after all");
    });
}

#[test]
fn checkpoints_bound_the_journal() {
    over_both(|meta| {
        let mut oracle = Oracle::default();
        let mut service = Service::open(meta).unwrap();
        let mut most = 0;
        for round in 0..30 {
            grow(&mut service, &mut oracle, round, 20);
            most = most.max(service.journal.handle().stats().bytes_since_checkpoint);
            if service.checkpointer.is_due() {
                service.checkpoint(&mut oracle).unwrap();
                assert!(!service.checkpointer.is_due());
            }
        }
        let largest = service.journal.handle().stats().checkpoint_bytes.max(8192);
        assert!(most < largest + 20 * 400, "{most} bytes of journal, checkpoint {largest}");
        drop(service);
        oracle.check(&mut Service::open(meta).unwrap(), "after a kill");
    });
}

#[test]
fn the_table_agrees_with_one_in_memory_whatever_is_evicted() {
    over_both(|meta| {
        let mut found = meta.open().unwrap();
        let mut plain = MemoryTable::new();
        let random = &mut Random::new(11);
        for seq in 1..400 {
            let payload = payload(random, seq);
            apply(found.table.as_mut(), seq, &payload).unwrap();
            let Ok(()) = apply(&mut plain, seq, &payload);
            let from = ChunkId { volume: VolumeId(random.below(4)), index: random.below(14) };
            assert_eq!(found.table.next(from).unwrap(), plain.next(from).unwrap());
            if random.below(20) == 0 {
                found.table.flush_dirty().unwrap();
                assert_eq!(found.table.stats().dirty, 0);
            }
            // One decoded chunk may be larger than the bound's slack.
            assert!(found.table.stats().cached_bytes <= 24 << 10, "after record {seq}");
        }
        assert_eq!(extents(found.table.as_mut()), extents(&mut plain));
        assert_eq!(found.table.stats().chunks, plain.len() as u64);
    });
}
