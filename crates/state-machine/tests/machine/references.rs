//! References, decisions, the queue.

use endio_state_machine::machine::*;
use endio_state_machine::token::Token;
use endio_types::*;

use crate::rig::*;

/// Four stores of little space in pieces, so that a write gets several segments.
fn pieces(rig: &mut Rig) -> (VolumeInfo, Begun) {
    let volume = rig.volume("v", 1024, 3);
    let begun = rig.begin(&volume, 0, 4);
    assert_eq!(begun.segments.len(), 3);
    (volume, begun)
}

/// Scenario 1.
#[test]
fn segments_released_first_convert_nothing_until_the_submitter_releases() {
    let mut rig = Rig::new(3, 1000);
    let (volume, begun) = pieces(&mut rig);
    for segment in &begun.segments {
        assert_eq!(rig.durable_release(&segment.token), None);
    }
    rig.drain();
    assert_eq!(rig.written(&volume), [0u64; 0]);
    assert!(rig.completion(&begun).is_none());
    assert_eq!(rig.submit(&begun.submitter), None);
    rig.drain();
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    assert_eq!(rig.conversions(), 1);
    assert_eq!(rig.completions.len(), 1);
    rig.assert_sound();
}

/// Scenarios 2, 3 and 4: however the four race, the machine sees one of these 24 orders.
#[test]
fn every_order_of_releases_converts_the_same_blocks_at_the_last_one() {
    for order in 0..24usize {
        let mut rig = Rig::new(3, 1000);
        let (volume, begun) = pieces(&mut rig);
        let mut left: Vec<usize> = (0..4).collect();
        let mut code = order;
        for base in (1..=4).rev() {
            assert!(rig.completion(&begun).is_none());
            match left.remove(code % base) {
                3 => assert_eq!(rig.submit(&begun.submitter), None),
                n => assert_eq!(rig.durable_release(&begun.segments[n].token), None),
            }
            code /= base;
            rig.drain();
        }
        assert_eq!(rig.completion(&begun).unwrap().failed, None);
        assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
        assert_eq!(rig.conversions(), 1);
        rig.assert_sound();
    }
}

/// Scenarios 5 and 60.
#[test]
fn a_repeated_release_gets_the_same_answer_before_and_after_the_end() {
    let mut rig = Rig::new(1, 1000);
    let volume = rig.volume("v", 1024, 1);
    let begun = rig.begin(&volume, 0, 4);
    let token = begun.segments[0].token;
    assert_eq!(rig.durable_release(&token), None);
    assert_eq!(rig.durable_release(&token), None);
    assert_eq!(rig.machine.io_ends(rig.now, None, 10).0[0].held.len(), 1);
    assert_eq!(rig.submit(&begun.submitter), None);
    assert_eq!(rig.submit(&begun.submitter), None);
    rig.drain();
    assert_eq!(rig.durable_release(&token), None);
    assert_eq!(rig.submit(&begun.submitter), None);
    rig.drain();
    assert_eq!(rig.machine.counters().repeated, 4);
    assert_eq!(rig.conversions(), 1);
    rig.assert_sound();
}

/// Scenario 6.
#[test]
fn a_second_release_with_another_outcome_is_refused_and_counted() {
    let mut rig = Rig::new(1, 1000);
    let volume = rig.volume("v", 1024, 1);
    let begun = rig.begin(&volume, 0, 4);
    let token = begun.segments[0].token;
    assert_eq!(rig.durable_release(&token), None);
    let failed = SegmentOutcome::Failed(Reason::IoError);
    assert_eq!(rig.release(&token, failed.clone()), Some(Reason::OutcomeConflict));
    let other = SegmentOutcome::Durable(vec![8; 4]);
    assert_eq!(rig.release(&token, other), Some(Reason::OutcomeConflict));
    assert_eq!(rig.submit(&begun.submitter), None);
    rig.drain();
    assert_eq!(rig.completion(&begun).unwrap().failed, None);
    assert_eq!(rig.release(&token, failed), Some(Reason::OutcomeConflict));
    assert_eq!(rig.machine.counters().conflicts, 3);
}

/// Scenarios 7 and 8: a token of an io_end that is forgotten or never was.
#[test]
fn a_release_on_an_io_end_that_is_forgotten_is_unknown() {
    let mut rig =
        Rig::with_limits(1, 1000, endio_state_machine::limits::Limits { ended_max: 1, ..limits() });
    let volume = rig.volume("v", 1024, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.finish(&begun);
    rig.write(&volume, 8, 1);
    let version = rig.machine.volume("v").unwrap().map_version;
    assert_eq!(rig.durable_release(&begun.segments[0].token), Some(Reason::UnknownIoEnd));
    assert_eq!(rig.submit(&begun.submitter), Some(Reason::UnknownIoEnd));
    rig.drain();
    assert_eq!(rig.machine.volume("v").unwrap().map_version, version);
}

/// Scenarios 8 and 9: all references are granted with the io_end. There is no message that adds
/// one, and a token beyond them is refused even with the right MAC, before and after the end.
#[test]
fn no_reference_is_added_to_an_io_end_after_it_has_begun() {
    let mut rig = Rig::new(1, 1000);
    let volume = rig.volume("v", 1024, 1);
    let begun = rig.begin(&volume, 0, 4);
    let key = endio_state_machine::token::TokenKey::new([1; 32]);
    let granted = begun.segments[0].token;
    assert!(granted.verify(&key), "the key of the rig's first epoch");
    let added = Token { segment: SegmentIndex(2), ..granted }.signed(&key);
    let held = |rig: &Rig| rig.machine.io_ends(rig.now, None, 10).0[0].held.len();
    assert_eq!(rig.durable_release(&added), Some(Reason::UnknownToken));
    assert_eq!(held(&rig), 2);
    assert_eq!(rig.submit(&begun.submitter), None);
    assert_eq!(rig.durable_release(&added), Some(Reason::UnknownToken));
    assert_eq!(held(&rig), 1);
    assert_eq!(rig.durable_release(&granted), None);
    rig.drain();
    assert_eq!(rig.durable_release(&added), Some(Reason::UnknownToken));
    assert_eq!((rig.conversions(), rig.completions.len()), (1, 1));
    rig.assert_sound();
}

/// Scenario 10.
#[test]
fn a_token_of_another_io_end_or_with_a_bit_changed_is_forged() {
    let mut rig = Rig::new(2, 1000);
    let volume = rig.volume("v", 1024, 1);
    let (x, y) = (rig.begin(&volume, 0, 4), rig.begin(&volume, 8, 4));
    let good = x.segments[0].token;
    let forged = [
        Token { io_end: y.submitter.io_end, ..good },
        Token { pblk: Pblk(good.pblk.0 + 1), ..good },
        Token { mac: y.segments[0].token.mac, ..good },
    ];
    for token in forged {
        assert_eq!(rig.durable_release(&token), Some(Reason::ForgedToken));
    }
    // The right token, released by a store that does not hold it.
    let thief = if good.store == StoreId(1) { 2 } else { 1 };
    let outcome = SegmentOutcome::Durable(vec![7; 4]);
    rig.store(thief, FromStore::Release { token: good, outcome });
    assert_eq!(rig.machine.counters().forged, 4);
    assert_eq!(rig.submit(&good), Some(Reason::ForgedToken));
    assert!(rig.finish(&x).failed.is_none());
    assert!(rig.finish(&y).failed.is_none());
}

/// Scenarios 11 and 15: the decision is made at begin and told to everybody.
#[test]
fn an_overwrite_in_place_completes_inline_without_a_record() {
    let mut rig = Rig::new(1, 1000);
    rig.create("v", 1024 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    let first = rig.begin(&volume, 0, 4);
    assert!(first.owes);
    rig.finish(&first);
    let records = rig.journal.len();
    let again = rig.begin(&volume, 0, 4);
    assert!(!again.owes);
    let done = rig.finish(&again);
    assert_eq!(done.converted, [LblkRange::new(0, 4)]);
    assert_eq!(rig.journal.len(), records);
    // One piece of three owes conversion: the whole io_end does.
    rig.write(&volume, 8, 4);
    let mixed = rig.begin(&volume, 0, 12);
    assert!(mixed.owes);
    assert_eq!(mixed.segments.len(), 3);
    let conversions = rig.conversions();
    rig.finish(&mixed);
    assert_eq!(rig.conversions(), conversions + 1);
    assert_eq!(rig.written(&volume), (0..12).collect::<Vec<_>>());
    rig.assert_sound();
}

/// Scenario 12.
#[test]
fn a_write_of_zero_blocks_completes_without_a_record() {
    let mut rig = Rig::new(1, 1000);
    let volume = rig.volume("v", 1024, 1);
    let records = rig.journal.len();
    let begun = rig.begin(&volume, 0, 0);
    assert!(!begun.owes && begun.segments.is_empty());
    assert_eq!(rig.submit(&begun.submitter), None);
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.converted.len()), (None, 0));
    assert_eq!(rig.journal.len(), records);
    assert!(rig.machine.is_idle());
}

/// Scenarios 13 and 14.
#[test]
fn an_io_end_that_owes_conversion_but_has_nothing_to_convert_completes() {
    let mut rig = Rig::new(1, 1000);
    let volume = rig.volume("v", 1024, 1);
    let begun = rig.begin(&volume, 0, 4);
    assert!(begun.owes);
    assert_eq!(rig.submit_with(&begun.submitter, vec![SegmentIndex(1)], false), None);
    assert_eq!(rig.completion(&begun).unwrap().converted, []);
    assert!(rig.machine.is_idle());
    rig.assert_sound();
    rig.acknowledge();
    rig.drain();
    rig.acknowledge();
    rig.assert_sound();
    assert_eq!(rig.machine.stores(rig.now)[0].free_blocks, 1000);
}

/// A volume in place whose blocks 3 and 7 lie apart, so that a write of 0..8 has 4 segments.
fn scattered(rig: &mut Rig) -> VolumeInfo {
    rig.create("v", 1024 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    rig.write(&volume, 3, 1);
    rig.write(&volume, 7, 1);
    rig.change(&volume, MapChange::Zero, 0, 8).unwrap();
    volume
}

/// Scenarios 18 and 29.
#[test]
fn segments_that_were_not_submitted_are_not_converted_and_the_rest_is() {
    let mut rig = Rig::new(1, 1000);
    let volume = scattered(&mut rig);
    let begun = rig.begin(&volume, 0, 9);
    let skipped = begun.segments.iter().find(|segment| segment.lblk == Lblk(3)).unwrap();
    for segment in begun.segments.iter().filter(|segment| segment.lblk != Lblk(3)) {
        assert_eq!(rig.durable_release(&segment.token), None);
    }
    let index = skipped.token.segment;
    assert_eq!(rig.submit_with(&begun.submitter, vec![index], false), None);
    rig.drain();
    let done = rig.completion(&begun).unwrap();
    assert_eq!(done.converted, [LblkRange::new(0, 3), LblkRange::new(4, 5)]);
    assert_eq!(rig.written(&volume), [0, 1, 2, 4, 5, 6, 7, 8]);
    assert_eq!(rig.unwritten(&volume), [3]);
    rig.assert_sound();
}

/// Scenarios 3 and 63.
#[test]
fn ten_thousand_io_ends_of_one_volume_wake_once_and_all_complete() {
    let wide = endio_state_machine::limits::Limits { io_ends_per_volume_max: 10_000, ..limits() };
    let mut rig = Rig::with_limits(1, 20_000, wide);
    let volume = rig.volume("v", 20_000, 1);
    let begun: Vec<_> = (0..10_000).map(|n| rig.begin(&volume, n, 1)).collect();
    for write in &begun {
        rig.durable_release(&write.segments[0].token);
        rig.submit(&write.submitter);
    }
    assert_eq!(rig.machine.counters().wakeups, 1);
    rig.drain();
    assert_eq!(rig.completions.len(), 10_000);
    assert!(rig.completions.iter().all(|done| done.failed.is_none()));
    assert_eq!(rig.machine.counters().wakeups, 1);
    assert!(rig.machine.is_idle());
    rig.assert_sound();
}

/// Scenario 64.
#[test]
fn adjacent_io_ends_merge_and_make_few_records() {
    let mut rig = Rig::new(1, 20_000);
    let volume = rig.volume("v", 20_000, 1);
    let begun: Vec<_> = (0..1000).map(|n| rig.begin(&volume, n, 1)).collect();
    for write in &begun {
        rig.durable_release(&write.segments[0].token);
        rig.submit(&write.submitter);
    }
    rig.drain();
    assert_eq!(rig.conversions(), 1000usize.div_ceil(rig.limits.convert_batch_max));
    for (_, record) in &rig.journal {
        if let endio_state_machine::record::Record::Convert(volumes) = record {
            assert_eq!(volumes[0].runs.len(), 1, "physically contiguous runs merge");
        }
    }
    // A gap in the volume does not merge.
    let apart = [rig.begin(&volume, 5000, 1), rig.begin(&volume, 5002, 1)];
    for write in &apart {
        rig.durable_release(&write.segments[0].token);
        rig.submit(&write.submitter);
    }
    rig.drain();
    let Some((_, endio_state_machine::record::Record::Convert(volumes))) = rig.journal.last()
    else {
        panic!("a conversion is the last record")
    };
    assert_eq!(volumes[0].runs.len(), 2);
}

/// Scenario 64, blocks of different status: an allocated block and a fresh one that happen to lie
/// side by side on the store, written as one io_end and as two of one batch.
#[test]
fn blocks_of_different_status_convert_in_runs_of_their_own() {
    for is_one_write in [true, false] {
        let mut rig = Rig::new(1, 1000);
        rig.create("v", 1024 * BLOCK_BYTES, 1, true, false);
        let volume = rig.open("v", "wb");
        rig.change(&volume, MapChange::Allocate, 8, 2).unwrap();
        let writes = match is_one_write {
            true => vec![rig.begin(&volume, 8, 4)],
            false => vec![rig.begin(&volume, 8, 2), rig.begin(&volume, 10, 2)],
        };
        let segments: Vec<_> = writes.iter().flat_map(|write| &write.segments).collect();
        let places: Vec<u64> = segments.iter().map(|s| s.token.pblk.0).collect();
        assert_eq!(places, [places[0], places[0] + 2], "side by side");
        for write in &writes {
            write.segments.iter().for_each(|s| assert_eq!(rig.durable_release(&s.token), None));
            rig.submit(&write.submitter);
        }
        rig.drain();
        assert_eq!(rig.conversions(), 1);
        assert_eq!(rig.written(&volume), [8, 9, 10, 11]);
        rig.assert_sound();
    }
}

/// Scenario 67.
#[test]
fn a_long_queue_of_one_volume_does_not_hold_up_another() {
    let few = endio_state_machine::limits::Limits {
        convert_batch_max: 8,
        drain_batches_max: 1,
        ..limits()
    };
    let mut rig = Rig::with_limits(1, 20_000, few);
    let busy = rig.volume("busy", 10_000, 1);
    let calm = rig.volume("calm", 100, 1);
    let begun: Vec<_> = (0..500).map(|n| rig.begin(&busy, n, 1)).collect();
    for write in &begun {
        rig.durable_release(&write.segments[0].token);
        rig.submit(&write.submitter);
    }
    let one = rig.begin(&calm, 0, 1);
    rig.durable_release(&one.segments[0].token);
    rig.submit(&one.submitter);
    rig.drain_once();
    assert!(rig.completion(&one).is_some(), "served in the first turn");
    rig.drain();
    assert_eq!(rig.completions.len(), 501);
}
