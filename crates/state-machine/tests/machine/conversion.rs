//! Conversions that fail, that are cut off, and that nobody may miss.

use endio_state_machine::chunk::CHUNK_BLOCKS;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

/// Every token of the write is released as durable; the conversion has not run.
fn queue(rig: &mut Rig, begun: &Begun) {
    for segment in &begun.segments {
        assert_eq!(rig.durable_release(&segment.token), None);
    }
    assert_eq!(rig.submit(&begun.submitter), None);
}

/// Places of the alarms: io_end, volume, range, cause.
fn alarms(rig: &Rig) -> Vec<(IoEndId, VolumeId, LblkRange, String)> {
    let alarms = rig.sent.iter().filter_map(|kind| match kind {
        EffectKind::ConversionFailed { io_end, volume, range, why } => {
            Some((*io_end, *volume, *range, why.clone()))
        }
        _ => None,
    });
    alarms.collect()
}

/// Scenario 21.
#[test]
fn durable_data_that_cannot_be_converted_is_an_error_with_its_place_and_a_retry_converts() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 3, 4);
    queue(&mut rig, &begun);
    rig.machine.table_mut().damage(volume.id, 0);
    rig.drain();
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.retryable), (Some(Reason::MetadataFull), true));
    let range = LblkRange::new(3, 4);
    let why = "the chunk is damaged".to_owned();
    assert_eq!(alarms(&rig), [(begun.submitter.io_end, volume.id, range, why)]);
    assert_eq!(rig.conversions(), 0);
    rig.machine.table_mut().repair();
    assert_eq!(rig.written(&volume), [0u64; 0]);
    assert_eq!(rig.write(&volume, 3, 4).failed, None);
    assert_eq!(rig.written(&volume), [3, 4, 5, 6]);
    assert_eq!(alarms(&rig).len(), 1);
    rig.assert_sound();
}

/// Scenario 22.
#[test]
fn when_the_second_of_five_conversions_fails_the_other_four_convert() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 5 * CHUNK_BLOCKS, 1);
    let begun: Vec<Begun> = (0..5).map(|n| rig.begin(&volume, n * CHUNK_BLOCKS, 1)).collect();
    for write in &begun {
        queue(&mut rig, write);
    }
    rig.machine.table_mut().damage(volume.id, 1);
    rig.drain();
    for (n, write) in begun.iter().enumerate() {
        let failed = rig.completion(write).unwrap().failed;
        assert_eq!(failed, (n == 1).then_some(Reason::MetadataFull), "conversion {n}");
    }
    assert_eq!((rig.conversions(), alarms(&rig).len()), (1, 1));
    rig.machine.table_mut().repair();
    let converted = [0, 2, 3, 4].map(|n| n * CHUNK_BLOCKS);
    assert_eq!(rig.written(&volume), converted);
    rig.assert_sound();
}

/// Scenario 23. Each round is a retry: `drain` fails if the machine does not come to rest by
/// itself, and the sound volume is served in every one of them.
#[test]
fn a_volume_that_never_converts_neither_spins_nor_holds_up_others_nor_the_stop() {
    let mut rig = Rig::new(1, 1000);
    let broken = rig.volume("broken", 100, 1);
    let sound = rig.volume("sound", 100, 1);
    rig.machine.table_mut().damage(broken.id, 0);
    for round in 1..=50 {
        let bad = rig.begin(&broken, 0, 8);
        let good = rig.begin(&sound, round, 1);
        queue(&mut rig, &bad);
        queue(&mut rig, &good);
        rig.drain_once();
        assert!(!rig.machine.has_work(), "one turn is enough: nothing is tried again by itself");
        assert_eq!(rig.completion(&bad).unwrap().failed, Some(Reason::MetadataFull));
        assert_eq!(rig.completion(&good).unwrap().failed, None);
        assert_eq!(alarms(&rig).len() as u64, round);
        rig.acknowledge();
        rig.sent.retain(|kind| matches!(kind, EffectKind::ConversionFailed { .. }));
    }
    let last = rig.begin(&broken, 0, 8);
    queue(&mut rig, &last);
    rig.input(Input::StopIntake);
    rig.drain();
    assert!(rig.machine.is_idle(), "a stop need not wait for it");
    rig.machine.table_mut().repair();
    assert_eq!(rig.written(&broken), [0u64; 0]);
    rig.assert_sound();
}

/// Scenario 21, the other way to fail: a table that breaks in the middle of a record stops the
/// machine before anybody hears of success, and the write begins again after the recovery.
#[test]
fn a_table_that_breaks_in_a_record_stops_the_machine_and_nothing_is_told() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    queue(&mut rig, &begun);
    rig.machine.table_mut().read_only = true;
    let mut out = Output::default();
    let stopped = rig.machine.drain(rig.now, &mut out);
    assert!(matches!(stopped, Err(MachineError::Table(_))));
    assert!(out.records.is_empty() && out.effects.is_empty());
    rig.crash();
    assert_eq!(rig.written(&volume), [0u64; 0]);
    rig.hello(WB, "wb");
    rig.join_store(1, 1, 100);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    assert_eq!(rig.completions.len(), 1);
    rig.assert_sound();
}

/// Scenario 34.
#[test]
fn a_reader_sees_the_old_map_until_the_conversion_and_a_newer_version_afterwards() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let whole = LblkRange::new(0, 100);
    let view =
        |rig: &mut Rig| rig.machine.lookup(volume.id, volume.generation, whole).unwrap().unwrap();
    let old = rig.begin(&volume, 0, 4);
    rig.finish(&old);
    let before = view(&mut rig);
    let begun = rig.begin(&volume, 0, 8);
    queue(&mut rig, &begun);
    let between = view(&mut rig);
    assert_eq!(between.extents, before.extents, "neither new data nor cached zeroes");
    assert_eq!(between.map_version, before.map_version);
    rig.auto_commit = false;
    rig.drain();
    let after = view(&mut rig);
    assert!(after.map_version > between.map_version);
    assert!(after.seq > rig.durable as u64, "it is not shown before it is durable");
    let place = after.extents[0].places.as_slice()[0];
    assert_eq!(place.pblk, begun.segments[0].token.pblk);
    rig.commit();
    assert_eq!(rig.completion(&begun).unwrap().map_version, after.map_version);
    // What the reader of the old map reads stays where it is until its writeback says so.
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 4);
}

/// Scenario 65: a conversion takes nothing that could be used up while it is queued.
#[test]
fn ninety_queued_conversions_need_no_space_of_their_own() {
    let mut rig = Rig::new(1, 90);
    let volume = rig.volume("v", 1000, 1);
    let begun: Vec<Begun> = (0..90).map(|n| rig.begin(&volume, 2 * n, 1)).collect();
    for write in &begun {
        queue(&mut rig, write);
    }
    assert_eq!(rig.machine.stores(rig.now)[0].free_blocks, 0);
    rig.input(Input::MetadataFull(true));
    rig.drain();
    assert_eq!(rig.completions.len(), 90);
    assert!(rig.completions.iter().all(|done| done.failed.is_none()));
    assert_eq!(rig.written(&volume).len(), 90);
    rig.assert_sound();
}

/// Scenarios 31 and 78: a write of 1 MiB across two chunks of the map, over older data. The
/// process dies after each message of it, and the journal is cut at every record.
#[test]
fn a_write_of_one_mebibyte_is_whole_or_not_at_all_wherever_it_is_cut() {
    const BLOCKS: u32 = 256;
    let lblk = CHUNK_BLOCKS - 100;
    let range = LblkRange::new(lblk, u64::from(BLOCKS));
    let mut seen = std::collections::BTreeSet::new();
    for steps in 0..=6 {
        for is_durable in [false, true] {
            let mut rig = Rig::new(3, 2000);
            let volume = rig.volume("v", 2 * CHUNK_BLOCKS, 3);
            rig.write(&volume, lblk, BLOCKS);
            let old = rig.machine.extents("v", range).unwrap().unwrap();
            rig.auto_commit = is_durable;
            let begun = rig.begin(&volume, lblk, BLOCKS);
            let first = begun.segments[0].token;
            for step in 0..steps {
                match begun.segments.get(step) {
                    Some(segment) => assert_eq!(rig.durable_release(&segment.token), None),
                    None if step == 3 => assert_eq!(rig.submit(&begun.submitter), None),
                    None => rig.drain(),
                }
            }
            let is_told = rig.completion(&begun).is_some();
            rig.crash();
            let now = rig.machine.extents("v", range).unwrap().unwrap();
            let is_new = now != old;
            if is_new {
                let places = now.iter().map(|e| (e.range, e.places.as_slice()[0].pblk.0));
                let wanted = |at: LblkRange| first.pblk.0 + (at.start.0 - lblk);
                assert!(places.into_iter().all(|(at, pblk)| pblk == wanted(at)), "a mixture");
            }
            assert_eq!(now.iter().map(|e| e.range.len).sum::<u64>(), u64::from(BLOCKS));
            assert!(is_new || !is_told, "told, and gone after step {steps}");
            seen.insert(is_new);
        }
    }
    assert_eq!(seen.len(), 2, "both outcomes occur");
}

/// Scenario 16.
#[test]
fn an_io_end_with_several_owing_segments_is_queued_and_counted_once() {
    let mut rig = Rig::new(1, 1000);
    rig.create("v", 1024 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    for lblk in [3, 7] {
        rig.write(&volume, lblk, 1);
    }
    rig.change(&volume, MapChange::Zero, 0, 8).unwrap();
    let before = rig.machine.counters();
    let begun = rig.begin(&volume, 0, 9);
    assert!(begun.segments.len() > 2 && begun.owes);
    queue(&mut rig, &begun);
    rig.drain();
    let after = rig.machine.counters();
    assert_eq!(after.wakeups - before.wakeups, 1);
    assert_eq!(after.converted - before.converted, 1);
    assert_eq!(after.converted_blocks - before.converted_blocks, 9);
    assert!(!rig.machine.has_work() && rig.machine.is_idle());
}

/// Scenario 63, all histories of a small size: two io_ends of one volume and one of another, each
/// in either lane, released in every order, with and without a turn of the converter in between.
#[test]
fn in_every_interleaving_queued_work_is_seen_and_no_io_end_is_stranded() {
    const ORDERS: [[usize; 3]; 6] =
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let one = Limits { convert_batch_max: 1, drain_batches_max: 1, ..limits() };
    for case in 0..6 * 8 * 8usize {
        let (order, lanes, turns) = (ORDERS[case % 6], case / 6 % 8, case / 48);
        let mut rig = Rig::with_limits(1, 100, one.clone());
        let volumes = [rig.volume("a", 100, 1), rig.volume("b", 100, 1)];
        for volume in &volumes {
            crate::map::reserve(&mut rig, volume, 8).unwrap();
        }
        let begun: Vec<Begun> = (0..3usize)
            .map(|n| {
                let direct = begin_io(&volumes[n / 2], n as u64, 1);
                let lane = if lanes >> n & 1 == 0 { Lane::Direct } else { Lane::WriteOut };
                rig.try_begin(BeginIo { lane, ..direct }).unwrap()
            })
            .collect();
        let wakeups = rig.machine.counters().wakeups;
        let mut edges = 0;
        for (at, n) in order.into_iter().enumerate() {
            let waits = |other: &usize| {
                let same_lane = lanes >> *other & 1 == lanes >> n & 1;
                same_lane && rig.completion(&begun[*other]).is_none()
            };
            edges += u64::from(!order[..at].iter().any(waits));
            queue(&mut rig, &begun[n]);
            assert!(rig.machine.has_work(), "case {case}: released and not seen");
            if turns >> at & 1 == 1 {
                rig.drain_once();
            }
        }
        let woken = rig.machine.counters().wakeups - wakeups;
        assert_eq!(woken, edges, "case {case}: one wake-up per lane that was empty");
        rig.drain();
        assert_eq!(rig.completions.len(), 3, "case {case}");
        assert!(rig.machine.is_idle(), "case {case}");
    }
}
