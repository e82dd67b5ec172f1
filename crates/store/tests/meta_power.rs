//! Power cuts after every operation of the disk, failing syncs, and a full disk.
//!
//! A failure prints `seed`, `cut` and the loss mode; the same numbers fail again.
#![allow(clippy::unwrap_used)]

mod support;

use endio_store::meta::{LossMode, MemoryMeta, MetaError, MetaOptions};
use support::{Oracle, Random, Service, live, payload};

fn options() -> MetaOptions {
    MetaOptions {
        segment_bytes: 2048,
        chunk_cache_bytes: 24 << 10,
        ballast_bytes: 8192,
        ..MetaOptions::default()
    }
}

fn cut_power(meta: &MemoryMeta, mode: LossMode, seed: u64) {
    meta.disk().power_on(mode, seed);
    let random = &mut Random::new(seed ^ 0x55);
    meta.lose_table_changes(|| random.below(2) == 0);
}

/// Cuts the power after each operation of one random life, in every mode; lives on; cuts it again.
fn cut_everywhere(seed: u64, steps: u64) -> u64 {
    let whole = MemoryMeta::with_options(options());
    live(&whole, seed, steps, &mut Oracle::default()).unwrap();
    let operations = whole.disk().operations();
    for cut in 0..operations {
        for (n, mode) in LossMode::ALL.into_iter().enumerate() {
            let what = format!("seed {seed}, cut {cut}, {mode:?}");
            let mut oracle = Oracle::default();
            let meta = MemoryMeta::with_options(options());
            meta.disk().cut_after(cut);
            let died = live(&meta, seed, steps, &mut oracle);
            // The last operations may be hints, whose failure nobody needs to know.
            assert!(died.is_err() || cut + 3 > operations, "{what}: lived on without power");
            cut_power(&meta, mode, cut * 8 + n as u64);
            live_on_and_check(&meta, seed, cut * 31 + n as u64, &mut oracle, &what);
        }
        // Killed at the same moment: what was not synced is still there, and still not synced.
        let what = format!("seed {seed}, killed after {cut}");
        let mut oracle = Oracle::default();
        let meta = MemoryMeta::with_options(options());
        meta.disk().cut_after(cut);
        let _ = live(&meta, seed, steps, &mut oracle);
        meta.disk().kill();
        live_on_and_check(&meta, seed, cut * 31 + 7, &mut oracle, &what);
    }
    operations
}

/// A second life, cut off somewhere, also in the middle of its recovery.
fn live_on_and_check(meta: &MemoryMeta, seed: u64, salt: u64, oracle: &mut Oracle, what: &str) {
    let random = &mut Random::new(salt);
    meta.disk().cut_after(meta.disk().operations() + random.below(60));
    let _ = live(meta, seed + 1000, 5, oracle);
    let mode = LossMode::ALL[random.below(6) as usize];
    cut_power(meta, mode, salt);
    let opened = Service::open(meta);
    let mut service = opened.unwrap_or_else(|error| panic!("{what}, then {mode:?}: {error}"));
    oracle.check(&mut service, &format!("{what}, then {mode:?}"));
}

#[test]
fn a_power_cut_after_any_operation_loses_nothing_committed_and_invents_nothing() {
    let operations: u64 = (0..4).map(|seed| cut_everywhere(seed, 24)).sum();
    assert!(operations > 300, "only {operations} operations were cut");
}

#[test]
fn a_failed_sync_closes_the_journal_and_is_never_turned_into_success() {
    let mut poisoned = 0;
    for failing in 0..60 {
        for mode in LossMode::ALL {
            let meta = MemoryMeta::with_options(options());
            let mut oracle = Oracle::default();
            let mut service = Service::open(&meta).unwrap();
            meta.disk().fail_sync_after(failing);
            let random = &mut Random::new(failing);
            let failed = (0..40).find_map(|_| {
                let payload = payload(random, service.seq + 1);
                let appended = service.append(&mut oracle, payload);
                appended.and_then(|()| service.commit(&mut oracle)).err()
            });
            if let Some(error) = failed {
                assert!(matches!(error, MetaError::Io { what: "sync", .. }), "{error}");
                for _ in 0..3 {
                    assert!(matches!(service.journal.commit(), Err(MetaError::Poisoned(_))));
                    assert!(matches!(service.journal.rotate(), Err(MetaError::Poisoned(_))));
                }
                poisoned += 1;
            }
            drop(service);
            let what = format!("sync {failing} failed, {mode:?}");
            // A new process sees what the disk never got, goes on, and then the power is cut.
            meta.disk().kill();
            let mut service = Service::open(&meta).unwrap();
            oracle.check(&mut service, &what);
            let payload = payload(random, service.seq + 1);
            service.append(&mut oracle, payload).unwrap();
            service.commit(&mut oracle).unwrap();
            drop(service);
            cut_power(&meta, mode, failing);
            oracle.check(&mut Service::open(&meta).unwrap(), &what);
        }
    }
    assert!(poisoned > 100, "only {poisoned} journals failed");
}

#[test]
fn a_failed_sync_of_a_checkpoint_leaves_the_ones_before() {
    for failing in 0..4 {
        let meta = MemoryMeta::with_options(options());
        let mut oracle = Oracle::default();
        let mut service = Service::open(&meta).unwrap();
        let random = &mut Random::new(failing);
        for round in 0..4 {
            for _ in 0..8 {
                let payload = payload(random, service.seq + 1);
                service.append(&mut oracle, payload).unwrap();
            }
            service.commit(&mut oracle).unwrap();
            service.begin_checkpoint(&mut oracle).unwrap();
            while !service.checkpointer.write_chunks(service.table.as_mut(), 1).unwrap() {}
            if round == failing {
                meta.disk().fail_sync_after(0);
                assert!(service.checkpointer.finish(service.seq).is_err());
                assert!(!service.checkpointer.is_running());
            } else {
                service.checkpointer.finish(service.seq).unwrap();
            }
        }
        drop(service);
        cut_power(&meta, LossMode::Nothing, failing);
        oracle.check(&mut Service::open(&meta).unwrap(), "after the cut");
    }
}

/// Leaves `bytes` free.
fn leave_free(meta: &MemoryMeta, bytes: u64) {
    use endio_store::meta::Vfs;
    meta.disk().set_capacity(None);
    let used = u64::MAX - meta.disk().free_bytes().unwrap();
    assert_eq!(used, 0, "free space is measured against a capacity");
    meta.disk().set_capacity(Some(1 << 40));
    let used = (1 << 40) - meta.disk().free_bytes().unwrap();
    meta.disk().set_capacity(Some(used + bytes));
}

#[test]
fn on_a_full_disk_accepted_work_commits_from_the_ballast_and_new_work_is_refused() {
    for free in [0, 1, 31, 200, 511] {
        let meta = MemoryMeta::with_options(options());
        let mut oracle = Oracle::default();
        let mut service = Service::open(&meta).unwrap();
        let random = &mut Random::new(free);
        leave_free(&meta, free);
        let mut accepted = 0;
        let error = loop {
            let payload = payload(random, service.seq + 1);
            let appended = service.append(&mut oracle, payload);
            match appended.and_then(|()| service.commit(&mut oracle)) {
                Ok(()) => accepted += 1,
                Err(error) => break error,
            }
            if accepted > 5 {
                assert!(service.journal.is_degraded(), "{accepted} commits on a full disk");
            }
            assert!(accepted < 1000);
        };
        // The ballast is 8 KiB, a record at most 400 bytes.
        assert!(accepted >= 15, "only {accepted} commits from the ballast");
        assert!(matches!(error, MetaError::NoSpace { .. }), "{error}");
        assert!(error.to_string().contains("journal-"), "{error}");
        assert_eq!(error.reason(), endio_types::Reason::MetadataFull);
        drop(service);

        // A restart on the full disk either works or says why.
        match Service::open(&meta) {
            Ok(mut service) => oracle.check(&mut service, "on the full disk"),
            Err(error) => assert!(matches!(error, MetaError::NoSpace { .. }), "{error}"),
        }
        meta.disk().set_capacity(None);
        let mut service = Service::open(&meta).unwrap();
        oracle.check(&mut service, "with room again");
        assert!(!service.journal.is_degraded());
    }
}

#[test]
fn service_resumes_by_itself_when_there_is_room_again() {
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let handle = service.journal.handle();
    let random = &mut Random::new(7);
    assert!(!handle.is_degraded());
    leave_free(&meta, 10);
    while !handle.is_degraded() {
        let payload = payload(random, service.seq + 1);
        service.append(&mut oracle, payload).unwrap();
        service.commit(&mut oracle).unwrap();
    }
    // Too little to make the ballast again and keep as much free.
    leave_free(&meta, 8192);
    assert!(handle.is_degraded());
    leave_free(&meta, 3 * 8192);
    assert!(!handle.is_degraded());
    let payload = payload(random, service.seq + 1);
    service.append(&mut oracle, payload).unwrap();
    service.commit(&mut oracle).unwrap();
}

#[test]
fn a_full_disk_gives_a_checkpoint_up_and_keeps_the_service() {
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let random = &mut Random::new(9);
    for _ in 0..30 {
        let payload = payload(random, service.seq + 1);
        service.append(&mut oracle, payload).unwrap();
    }
    service.commit(&mut oracle).unwrap();
    leave_free(&meta, 100);
    let error = service.checkpoint(&mut oracle).unwrap_err();
    assert!(matches!(error, MetaError::NoSpace { .. }), "{error}");
    use endio_store::meta::Vfs;
    let before = meta.disk().free_bytes().unwrap();
    service.checkpointer.give_up();
    assert!(meta.disk().free_bytes().unwrap() > before, "what was written of it stays");
    assert!(!service.checkpointer.is_running() && !service.checkpointer.has_room());
    meta.disk().set_capacity(None);
    assert!(service.checkpointer.has_room());
    service.checkpoint(&mut oracle).unwrap();
    service.close(&mut oracle).unwrap();
    oracle.check(&mut Service::open(&meta).unwrap(), "at last");
}

/// The disk fills up beside a checkpoint that is under way.
#[test]
fn a_checkpoint_leaves_the_ballast_to_commits() {
    use endio_store::meta::Vfs;
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let random = &mut Random::new(11);
    let mut commit = |service: &mut Service, oracle: &mut Oracle| {
        let payload = payload(random, service.seq + 1);
        service.append(oracle, payload).unwrap();
        service.commit(oracle).unwrap();
    };
    for _ in 0..30 {
        commit(&mut service, &mut oracle);
    }
    service.begin_checkpoint(&mut oracle).unwrap();
    assert!(!service.checkpointer.write_chunks(service.table.as_mut(), 1).unwrap());
    leave_free(&meta, 100);
    let has_ballast = || meta.disk().list().unwrap().iter().any(|name| name == "ballast");
    for _ in 0..1000 {
        if !has_ballast() {
            break;
        }
        commit(&mut service, &mut oracle);
    }
    assert!(service.journal.is_degraded() && !has_ballast());
    let error = service.checkpointer.write_chunks(service.table.as_mut(), 1).unwrap_err();
    assert!(matches!(error, MetaError::NoSpace { .. }), "{error}");
    service.checkpointer.give_up();
    assert!(!service.checkpointer.is_running());
    // None begins either: the room that there is has been given up for commits.
    let used = (8192 * 3) / 2;
    leave_free(&meta, used);
    assert!(service.journal.is_degraded() && !service.checkpointer.has_room());
    let error = service.begin_checkpoint(&mut oracle).unwrap_err();
    assert!(matches!(error, MetaError::NoSpace { .. }), "{error}");
    for _ in 0..10 {
        commit(&mut service, &mut oracle);
    }
    leave_free(&meta, 1 << 30);
    assert!(!service.journal.is_degraded() && service.checkpointer.has_room());
    service.checkpoint(&mut oracle).unwrap();
    service.close(&mut oracle).unwrap();
    oracle.check(&mut Service::open(&meta).unwrap(), "at last");
}

#[test]
fn on_a_full_disk_the_table_goes_on_in_memory_and_asks_for_no_new_work() {
    let meta = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    let mut service = Service::open(&meta).unwrap();
    let random = &mut Random::new(13);
    leave_free(&meta, 8192);
    for _ in 0..20 {
        let payload = payload(random, service.seq + 1);
        service.append(&mut oracle, payload).unwrap();
    }
    service.commit(&mut oracle).unwrap();
    service.table.flush_dirty().unwrap();
    assert!(service.table.stats().dirty > 0);
    assert!(service.journal.is_degraded());
    // A stop on the full disk is no clean one, and loses nothing.
    let durable = service.seq;
    service.table.close(durable).unwrap();
    drop(service);
    meta.disk().set_capacity(None);
    let mut service = Service::open(&meta).unwrap();
    assert!(service.rebuilt.is_some());
    oracle.check(&mut service, "with room again");
    service.table.flush_dirty().unwrap();
    assert_eq!(service.table.stats().dirty, 0);
}
