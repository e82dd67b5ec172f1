//! Failures of segments and of conversion.

use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

/// Scenario 19.
#[test]
fn one_failed_segment_keeps_the_whole_io_end_from_converting() {
    let mut rig = Rig::new(3, 100);
    let volume = rig.volume("v", 100, 3);
    let begun = rig.begin(&volume, 0, 4);
    rig.durable_release(&begun.segments[0].token);
    let bad = begun.segments[1].token;
    assert_eq!(rig.release(&bad, SegmentOutcome::Failed(Reason::IoError)), None);
    rig.durable_release(&begun.segments[2].token);
    rig.submit(&begun.submitter);
    rig.drain();
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.retryable), (Some(Reason::IoError), true));
    assert_eq!(done.failed_store, Some(bad.store));
    assert_eq!(rig.written(&volume), [0u64; 0]);
    assert_eq!(rig.conversions(), 0);
    rig.assert_sound();
}

/// Scenarios 17 and 20.
#[test]
fn after_a_failed_segment_the_retry_on_another_store_converts() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    let bad = begun.segments[0].token;
    rig.release(&bad, SegmentOutcome::Failed(Reason::IoError));
    rig.submit(&begun.submitter);
    let mut retry = begin_io(&volume, 0, 4);
    retry.attempt = 2;
    retry.avoid_stores = vec![bad.store];
    let again = rig.try_begin(retry).unwrap();
    assert_ne!(again.segments[0].token.store, bad.store);
    assert_eq!(rig.finish(&again).failed, None);
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    rig.assert_sound();
}

/// Scenario 24: and nothing is left behind.
#[test]
fn a_refused_begin_holds_nothing() {
    let mut rig = Rig::new(2, 10);
    let volume = rig.volume("v", 100, 2);
    let refused = rig.try_begin(begin_io(&volume, 0, 11)).unwrap_err();
    assert_eq!(refused.reason, Reason::NoSpace);
    assert!(rig.machine.is_idle());
    assert!(rig.machine.stores(rig.now).iter().all(|store| store.free_blocks == 10));
    let beyond = rig.try_begin(begin_io(&volume, 99, 2)).unwrap_err();
    assert_eq!(beyond.reason, Reason::OutOfRange);
    let many = rig.try_begin(begin_io(&volume, 0, IO_END_BLOCKS_MAX + 1)).unwrap_err();
    assert_eq!(many.reason, Reason::Malformed);
    rig.assert_sound();
}

/// Scenario 27, when the stream to a store breaks after the submitter's release.
#[test]
fn an_abort_after_the_submitters_release_ends_what_a_lost_segment_holds_up() {
    let mut rig = Rig::new(3, 100);
    let volume = rig.volume("v", 100, 3);
    let begun = rig.begin(&volume, 0, 4);
    assert_eq!(rig.submit_with(&begun.submitter, vec![], false), None);
    rig.durable_release(&begun.segments[0].token);
    assert_eq!(rig.submit_with(&begun.submitter, vec![], true), None);
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.retryable), (Some(Reason::NotSubmitted), true));
    let late = rig.durable_release(&begun.segments[1].token);
    assert_eq!(late, Some(Reason::NotSubmitted));
    rig.assert_sound();
}

/// Scenario 27: one segment is out, so only what the submitter still owns is released by it.
#[test]
fn an_abort_by_the_submitter_ends_the_io_end_once_and_late_releases_are_refused() {
    let mut rig = Rig::new(3, 100);
    let volume = rig.volume("v", 100, 3);
    let begun = rig.begin(&volume, 0, 4);
    rig.durable_release(&begun.segments[0].token);
    assert_eq!(rig.submit_with(&begun.submitter, vec![], true), None);
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.retryable), (Some(Reason::NotSubmitted), true));
    let late = rig.durable_release(&begun.segments[1].token);
    assert_eq!(late, Some(Reason::NotSubmitted));
    assert_eq!(rig.submit_with(&begun.submitter, vec![], true), None);
    rig.assert_sound();
}

/// Scenario 26: nothing was sent, and one message gives every reference back. Repeating it gives
/// nothing back twice, and a map change that waited gets its turn.
#[test]
fn a_write_given_up_before_anything_was_sent_releases_each_reference_once() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 2);
    let begun = rig.begin(&volume, 0, 4);
    let waiting = rig.call_later(change_call(&volume, MapChange::Trim, 0, 4));
    rig.drain();
    assert!(!rig.replies.contains_key(&waiting));
    assert_eq!(rig.submit_with(&begun.submitter, vec![], true), None);
    rig.drain();
    assert!(rig.replies[&waiting].is_ok(), "the range is open again");
    assert!(rig.machine.is_idle());
    assert_eq!(rig.submit_with(&begun.submitter, vec![], true), None);
    assert_eq!((rig.completions.len(), rig.machine.counters().aborted), (1, 1));
    rig.acknowledge();
    rig.drain();
    rig.acknowledge();
    assert!(rig.machine.stores(rig.now).iter().all(|store| store.free_blocks == 100));
    rig.assert_sound();
}

/// Scenarios 25 and 29: of five segments two go out; just those convert, and the rest is written
/// by a second attempt.
#[test]
fn what_was_sent_of_a_write_completes_and_a_second_attempt_writes_the_rest() {
    let mut rig = Rig::new(1, 1000);
    rig.create("v", 100 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    for lblk in [3, 5] {
        rig.write(&volume, lblk, 1);
    }
    rig.change(&volume, MapChange::Zero, 0, 8).unwrap();
    let begun = rig.begin(&volume, 0, 8);
    assert_eq!(begun.segments.len(), 5);
    let sent = |lblk: Lblk| lblk == Lblk(0) || lblk == Lblk(6);
    let (out, kept): (Vec<_>, Vec<_>) = begun.segments.iter().partition(|s| sent(s.lblk));
    for segment in &out {
        assert_eq!(rig.durable_release(&segment.token), None);
    }
    let kept = kept.iter().map(|segment| segment.token.segment).collect();
    assert_eq!(rig.submit_with(&begun.submitter, kept, false), None);
    rig.drain();
    let done = rig.completion(&begun).unwrap();
    assert_eq!(done.converted, [LblkRange::new(0, 3), LblkRange::new(6, 2)]);
    assert_eq!(rig.written(&volume), [0, 1, 2, 6, 7], "5 of 8 blocks");
    rig.acknowledge();
    let retry = BeginIo { attempt: 2, ..begin_io(&volume, 3, 3) };
    let again = rig.try_begin(retry).unwrap();
    assert_eq!(rig.finish(&again).failed, None);
    assert_eq!(rig.written(&volume), (0..8).collect::<Vec<_>>());
    rig.assert_sound();
}

/// Scenario 28.
#[test]
fn a_write_whose_reply_was_lost_stays_in_flight_until_a_later_release() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.submit(&begun.submitter);
    rig.input(Input::StoreLost { session: StoreSession(1) });
    rig.drain();
    assert!(rig.completion(&begun).is_none());
    rig.register(1, 1, 100);
    rig.durable_release(&begun.segments[0].token);
    rig.drain();
    assert_eq!(rig.completion(&begun).unwrap().failed, None);
}

/// Copies that differ are an error, not a choice.
#[test]
fn replicas_with_different_checksums_do_not_convert() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 2);
    let begun = rig.begin(&volume, 0, 1);
    rig.release(&begun.segments[0].token, SegmentOutcome::Durable(vec![1]));
    rig.release(&begun.segments[1].token, SegmentOutcome::Durable(vec![2]));
    rig.submit(&begun.submitter);
    rig.drain();
    assert_eq!(rig.completion(&begun).unwrap().failed, Some(Reason::ChecksumMismatch));
    assert_eq!(rig.conversions(), 0);
}

/// Scenario 66.
#[test]
fn a_full_metadata_disk_refuses_new_writes_and_converts_accepted_ones() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.input(Input::MetadataFull(true));
    let refused = rig.try_begin(begin_io(&volume, 8, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::MetadataFull);
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    rig.input(Input::MetadataFull(false));
    assert_eq!(rig.write(&volume, 8, 1).failed, None);
}
