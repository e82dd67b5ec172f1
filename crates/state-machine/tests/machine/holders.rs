//! Leases, epochs, generations, incarnations.

use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

/// Scenario 50. Of two releases of a store's token the one before the end of its lease is the last one
/// that the write waits for, and the one at the end comes too late.
#[test]
fn a_release_one_millisecond_before_expiry_counts_and_at_expiry_does_not() {
    for (wait, refused) in [(999, None), (1000, Some(Reason::LeaseExpired))] {
        let mut rig = Rig::new(1, 100);
        let volume = rig.volume("v", 100, 1);
        let begun = rig.begin(&volume, 0, 1);
        assert_eq!(rig.submit(&begun.submitter), None);
        // Only the store's lease ends.
        rig.now = rig.now.plus(500);
        rig.say(FromWriteback::Renew { confirms: vec![] });
        rig.now = rig.now.plus(wait - 500);
        assert_eq!(rig.durable_release(&begun.segments[0].token), refused);
        rig.drain();
        let done = rig.completion(&begun).unwrap();
        assert_eq!(done.failed, refused);
        assert_eq!(rig.conversions(), usize::from(refused.is_none()));
        let written: &[u64] = if refused.is_none() { &[0] } else { &[] };
        assert_eq!(rig.written(&volume), written);
        rig.assert_sound();
    }
}

/// Scenarios 51, 52 and 41.
#[test]
fn a_store_that_dies_holding_a_token_aborts_the_write_and_the_retry_succeeds() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 1);
    let token = begun.segments[0].token;
    assert_eq!(rig.submit(&begun.submitter), None);
    let dead = u64::from(token.store.0);
    rig.input(Input::StoreLost { session: StoreSession(dead) });
    for _ in 0..10 {
        rig.say(FromWriteback::Renew { confirms: vec![] });
        rig.store(3 - dead, FromStore::Renew);
        rig.advance(100);
    }
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.retryable), (Some(Reason::LeaseExpired), true));
    assert_eq!(done.failed_store, Some(token.store));
    let retry = rig.write(&volume, 0, 1);
    assert_eq!(retry.failed, None);
    // The blocks of the first attempt stay out of reach until the store is heard of again.
    let quarantined = |rig: &Rig| -> u64 {
        rig.machine.stores(rig.now).iter().map(|store| store.quarantined_blocks).sum()
    };
    assert_eq!(quarantined(&rig), 1);
    rig.join_store(dead, 2, 100);
    rig.acknowledge();
    assert_eq!(quarantined(&rig), 0);
    assert_eq!(rig.durable_release(&token), Some(Reason::LeaseExpired));
    rig.assert_sound();
}

/// Scenario 53.
#[test]
fn blocks_of_an_unreachable_store_are_not_reused_and_others_serve() {
    let mut rig = Rig::new(2, 8);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    let dead = u64::from(begun.segments[0].token.store.0);
    rig.input(Input::StoreLost { session: StoreSession(dead) });
    for _ in 0..300 {
        rig.say(FromWriteback::Renew { confirms: vec![] });
        rig.store(3 - dead, FromStore::Renew);
        rig.advance(900);
    }
    assert_eq!(rig.write(&volume, 0, 8).failed, None);
    let refused = rig.try_begin(begin_io(&volume, 20, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::NotEnoughStores, "not full: one that has room is away");
    rig.assert_sound();
}

/// Scenario 54.
#[test]
fn a_dead_submitters_io_end_ends_at_expiry_or_when_its_generation_is_superseded() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let slow = rig.begin(&volume, 0, 1);
    rig.input(Input::WritebackLost { session: WB });
    rig.store(1, FromStore::Renew);
    rig.advance(999);
    assert!(!rig.machine.is_idle());
    rig.store(1, FromStore::Renew);
    rig.advance(1);
    assert!(rig.machine.is_idle());
    assert_eq!(rig.completion(&slow).unwrap().failed, Some(Reason::LeaseExpired));
    rig.hello(WB, "wb");
    let begun = rig.begin(&volume, 4, 1);
    rig.open("v", "other");
    assert_eq!(rig.completion(&begun).unwrap().failed, Some(Reason::OldGeneration));
    rig.assert_sound();
}

/// After a restart of conversion an owner may open before the end of its old session is noticed.
#[test]
fn whoever_opens_a_volume_has_a_lease_to_say_hello_before_it_can_be_taken_without_force() {
    let open = |rig: &mut Rig, writeback: &str, force: bool| {
        let call = Call::OpenVolume {
            name: "v".to_owned(),
            volume: None,
            writeback: writeback.to_owned(),
            force,
            if_generation: None,
            reads_log: true,
        };
        rig.call(call).map_err(|refusal| refusal.reason)
    };
    let mut rig = Rig::new(1, 100);
    rig.volume("v", 100, 1);
    rig.advance(5_000);
    rig.crash();
    rig.advance(500);
    assert!(open(&mut rig, "unheard/1", true).is_ok());
    rig.advance(999);
    assert_eq!(open(&mut rig, "other/1", false), Err(Reason::VolumeBusy));
    // What it remembers it may answer under its session of before, which it may renew yet.
    let Ok(ReplyBody::Opened(_, _, wait_ms)) = open(&mut rig, "forced/1", true) else { panic!() };
    assert_eq!(wait_ms, 1_000);
    rig.advance(1_000);
    assert!(open(&mut rig, "other/1", false).is_ok(), "it did not say Hello");
    rig.assert_sound();
}

/// Scenarios 32, 55 and 56.
#[test]
fn after_a_restart_old_tokens_are_refused_and_the_write_begins_again() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.auto_commit = false;
    let begun = rig.begin(&volume, 0, 4);
    rig.durable_release(&begun.segments[0].token);
    rig.submit(&begun.submitter);
    rig.drain();
    assert!(rig.completion(&begun).is_none(), "the record is not durable yet");
    rig.crash();
    rig.auto_commit = true;
    rig.hello(WB, "wb");
    rig.register(1, 1, 100);
    // Not ready: something of the old epoch may still land there.
    let refused = rig.try_begin(begin_io(&volume, 0, 4)).unwrap_err();
    assert_eq!(refused.reason, Reason::NotEnoughStores);
    rig.ready(1);
    assert_eq!(rig.durable_release(&begun.segments[0].token), Some(Reason::OldEpoch));
    assert_eq!(rig.submit(&begun.submitter), Some(Reason::OldEpoch));
    assert_eq!(rig.written(&volume), [0u64; 0]);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    assert_eq!(rig.completions.len(), 1);
    rig.assert_sound();
}

/// Scenario 33. What is released again after the crash converts nothing a second time; a retry is a write
/// of its own, with a conversion of its own.
#[test]
fn after_a_crash_behind_the_commit_the_data_is_written_and_a_retry_succeeds() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.finish(&begun);
    assert_eq!(rig.conversions(), 1);
    rig.crash();
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    let place = rig.place(&volume, 0);
    rig.hello(WB, "wb");
    rig.join_store(1, 1, 100);
    assert_eq!(rig.durable_release(&begun.segments[0].token), Some(Reason::OldEpoch));
    assert_eq!(rig.submit(&begun.submitter), Some(Reason::OldEpoch));
    rig.drain();
    assert_eq!(rig.conversions(), 1, "the io_end converted twice");
    assert_eq!(rig.place(&volume, 0), place);
    // What is free was to be punched since.
    rig.acknowledge();
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    assert_eq!(rig.conversions(), 2);
    assert_eq!(rig.completions.len(), 2);
    rig.assert_sound();
}

/// Scenario 57.
#[test]
fn a_renewal_at_expiry_does_not_save_the_tokens() {
    for (wait, alive) in [(999, true), (1000, false)] {
        let mut rig = Rig::new(1, 100);
        let volume = rig.volume("v", 100, 1);
        let begun = rig.begin(&volume, 0, 1);
        rig.store(1, FromStore::Renew);
        rig.now = rig.now.plus(wait);
        rig.say(FromWriteback::Renew { confirms: vec![] });
        rig.store(1, FromStore::Renew);
        rig.advance(500);
        assert_eq!(rig.completion(&begun).is_none(), alive);
        assert_eq!(rig.durable_release(&begun.segments[0].token).is_none(), alive);
    }
}

/// Scenario 58.
#[test]
fn a_clock_that_goes_back_expires_nothing_early_and_completes_nothing_twice() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.advance(100);
    rig.keep_alive(1);
    let begun = rig.begin(&volume, 0, 1);
    rig.now = Millis(0);
    rig.input(Input::Tick);
    assert!(rig.completion(&begun).is_none());
    assert_eq!(rig.finish(&begun).failed, None);
}

/// Scenario 58: an hour back changes nothing. An hour ahead cannot be told from a pause of an hour:
/// the holders are gone, the write ends once with a retryable error, and what is granted after
/// either jump lives its whole lease.
#[test]
fn a_clock_that_jumps_an_hour_either_way_ends_each_write_once_and_none_early() {
    const HOUR: u64 = 3_600_000;
    for ahead_first in [true, false] {
        let mut rig = Rig::new(1, 100);
        let volume = rig.volume("v", 100, 1);
        rig.advance(HOUR + 100);
        let start = rig.now;
        rig.join_store(1, 1, 100);
        rig.hello(WB, "wb");
        let begun = rig.begin(&volume, 0, 1);
        if ahead_first {
            rig.now = start.plus(HOUR);
            rig.input(Input::Tick);
            let done = rig.completion(&begun).unwrap();
            assert_eq!((done.failed, done.retryable), (Some(Reason::LeaseExpired), true));
        }
        rig.now = Millis(start.0 - HOUR);
        rig.input(Input::Tick);
        assert_eq!(rig.completion(&begun).is_some(), ahead_first);
        let late = rig.durable_release(&begun.segments[0].token);
        assert_eq!(late, ahead_first.then_some(Reason::LeaseExpired));
        rig.register(1, 1, 100);
        rig.ready(1);
        rig.hello(WB, "wb");
        let next = rig.begin(&volume, 4, 1);
        for _ in 0..20 {
            rig.advance(10_000);
            rig.keep_alive(1);
        }
        assert!(rig.completion(&next).is_none(), "the clock stands still, so no lease ends");
        assert_eq!(rig.finish(&next).failed, None);
        let ends = rig.completions.iter().filter(|done| done.io_end == begun.submitter.io_end);
        assert_eq!(ends.count(), usize::from(ahead_first));
        rig.assert_sound();
    }
}

/// Scenario 59. The first attempt is given up with its session, the second one completes, and only then
/// the store's release of the first arrives.
#[test]
fn a_late_release_of_the_first_attempt_changes_nothing_after_the_second() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let first = rig.begin(&volume, 0, 1);
    rig.submit(&first.submitter);
    rig.input(Input::WritebackLost { session: WB });
    rig.hello(WB, "wb");
    let second = rig.begin(&volume, 0, 1);
    assert_eq!(rig.finish(&second).failed, None);
    let token = second.segments[0].token;
    let places = |rig: &mut Rig| (rig.place(&volume, 0), rig.conversions(), rig.journal.len());
    let before = places(&mut rig);
    assert_eq!((before.0, before.1), (Some((token.store, token.pblk)), 1));
    assert_eq!(rig.durable_release(&first.segments[0].token), Some(Reason::Aborted));
    rig.drain();
    assert_eq!(places(&mut rig), before);
    assert_eq!(rig.completion(&first).and_then(|done| done.failed), Some(Reason::Aborted));
    rig.assert_sound();
}

fn open(writeback: &str, force: bool, if_generation: Option<Generation>) -> Call {
    let (name, writeback) = ("v".into(), writeback.into());
    Call::OpenVolume { name, volume: None, writeback, force, if_generation, reads_log: true }
}

/// Scenario 61: what a writeback read of a volume before a takeover does not undo the takeover.
#[test]
fn an_open_of_a_generation_that_is_over_is_refused_with_and_without_force() {
    let mut rig = Rig::new(1, 100);
    let first = rig.volume("v", 100, 1);
    let seen = Some(first.generation);
    rig.call(open("w2", true, seen)).unwrap();
    for (writeback, force) in [("w", true), ("w", false), ("w2", true)] {
        let refusal = rig.call(open(writeback, force, seen)).unwrap_err();
        assert_eq!(refusal.reason, Reason::OldGeneration, "{writeback}, force {force}");
    }
    let now = rig.machine.volume("v").unwrap();
    assert_eq!(now.owner.as_deref(), Some("w2"));
    rig.call(open("w3", true, Some(now.generation))).unwrap();
    rig.assert_sound();
}

/// Scenario 61.
#[test]
fn a_second_writeback_that_opens_the_volume_fences_the_first() {
    let mut rig = Rig::new(1, 100);
    let old = rig.volume("v", 100, 1);
    let held = rig.begin(&old, 0, 1);
    let queued = rig.begin(&old, 4, 1);
    rig.durable_release(&queued.segments[0].token);
    rig.submit(&queued.submitter);
    let call = |force| open("w2", force, None);
    assert_eq!(rig.call(call(false)).unwrap_err().reason, Reason::VolumeBusy);
    let held_2 = rig.begin(&old, 8, 1);
    rig.call(call(true)).unwrap();
    for write in [&held, &held_2] {
        assert_eq!(rig.completion(write).unwrap().failed, Some(Reason::OldGeneration));
        assert_eq!(rig.submit(&write.submitter), Some(Reason::OldGeneration));
        let token = write.segments[0].token;
        assert_eq!(rig.durable_release(&token), Some(Reason::OldGeneration));
    }
    assert_eq!(rig.try_begin(begin_io(&old, 0, 1)).unwrap_err().reason, Reason::OldGeneration);
    let fenced = |kind: &EffectKind| {
        matches!(kind, EffectKind::Writeback(WB, ToWriteback::VolumeFenced { .. }))
    };
    assert_eq!(rig.count(fenced), 1);
    rig.assert_sound();
}

/// Scenario 70.
#[test]
fn nothing_is_granted_before_the_epoch_is_durable() {
    use endio_state_machine::extent_map::MemoryTable;
    use endio_state_machine::record::Snapshot;
    use endio_state_machine::token::TokenKey;
    let mut machine = Machine::recover(limits(), MemoryTable::new(), Snapshot::new([1; 16]));
    let mut out = Output::default();
    machine.finish_recovery(TokenKey::new([1; 32]), Millis(1), &mut out).unwrap();
    let call = open("w", false, None);
    machine.handle(Millis(1), Input::Call { reply: ReplyTo(1), call }, &mut out).unwrap();
    let Some(EffectKind::Reply(_, Err(refusal))) = out.effects.last().map(|e| e.kind.clone())
    else {
        panic!("the call is answered")
    };
    assert_eq!(refusal.reason, Reason::NotReady);
}

/// Scenario 68.
#[test]
fn a_graceful_stop_refuses_new_writes_and_finishes_old_ones() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 1);
    rig.input(Input::StopIntake);
    let refused = rig.try_begin(begin_io(&volume, 4, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::Draining);
    assert!(!rig.machine.is_idle());
    assert_eq!(rig.finish(&begun).failed, None);
    assert!(rig.machine.is_idle());
}

/// Scenario 69.
#[test]
fn a_forced_stop_answers_every_waiter_with_an_error() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 1);
    let waiting = rig.call_later(change_call(&volume, MapChange::Trim, 0, 4));
    rig.input(Input::AbortAll);
    assert_eq!(rig.completion(&begun).unwrap().failed, Some(Reason::Draining));
    assert_eq!(rig.replies[&waiting].clone().unwrap_err().reason, Reason::Draining);
    assert!(rig.machine.is_idle());
    let alarm = |kind: &EffectKind| matches!(kind, EffectKind::ConversionFailed { .. });
    assert_eq!(rig.count(alarm), 0);
    rig.assert_sound();
}

/// A token that is renewed for ever ends all the same.
#[test]
fn an_io_end_ends_after_its_longest_life_even_if_its_holders_renew() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 1);
    for _ in 0..19 {
        rig.advance(500);
        rig.keep_alive(1);
    }
    assert!(rig.completion(&begun).is_none());
    rig.advance(500);
    assert_eq!(rig.completion(&begun).unwrap().failed, Some(Reason::Aborted));
}

/// Registers store 1 with that name in its certificate, on a session of its own; the reason if it is
/// refused.
fn register_as(
    rig: &mut Rig,
    session: u64,
    incarnation: u64,
    name: Option<&str>,
) -> Option<Reason> {
    rig.sent.clear();
    let message = FromStore::Register {
        uuid: [1; 16],
        incarnation: Incarnation(incarnation),
        capacity_blocks: 10,
        url: "memory:store-1".into(),
        name: name.map(str::to_owned),
    };
    rig.input(Input::Store { session: StoreSession(session), message });
    rig.sent.iter().find_map(|kind| match kind {
        EffectKind::Store(to, ToStore::SessionRefused(refusal)) if to.0 == session => {
            Some(refusal.reason)
        }
        _ => None,
    })
}

#[test]
fn a_store_belongs_to_the_name_in_its_first_certificate_also_after_a_crash() {
    let mut rig = Rig::new(0, 10);
    assert_eq!(register_as(&mut rig, 1, 1, Some("s1")), None);
    assert_eq!(register_as(&mut rig, 2, 2, Some("s2")), Some(Reason::NotAllowed));
    // Nothing of the refused one counts: neither its incarnation nor its session.
    assert_eq!(register_as(&mut rig, 1, 1, Some("s1")), None);
    rig.crash();
    assert_eq!(register_as(&mut rig, 2, 2, Some("s2")), Some(Reason::NotAllowed));
    assert_eq!(register_as(&mut rig, 1, 2, Some("s1")), None);
    assert_eq!(rig.machine.snapshot().store_names.len(), 1);
    rig.assert_sound();
}

#[test]
fn a_store_without_a_certificate_is_bound_by_the_first_that_it_shows() {
    let mut rig = Rig::new(0, 10);
    assert_eq!(register_as(&mut rig, 1, 1, None), None);
    assert_eq!(register_as(&mut rig, 2, 1, Some("s1")), None);
    assert_eq!(register_as(&mut rig, 3, 1, Some("s2")), Some(Reason::NotAllowed));
    // Without TLS nobody has a name, and there is nothing to compare.
    assert_eq!(register_as(&mut rig, 4, 1, None), None);
    rig.assert_sound();
}

/// Of two writebacks that have said Hello, and a volume that nobody has opened.
fn two_writebacks_and_a_volume() -> Rig {
    let mut rig = Rig::new(1, 100);
    let (first, other) = (WritebackSession(11), WritebackSession(12));
    rig.hello(first, "wb-a/1");
    rig.hello(other, "wb-b/1");
    rig.create("v", BLOCK_BYTES, 1, false, false);
    rig
}

/// How long who opens the volume by force is told to wait, in milliseconds.
fn waits_ms(rig: &mut Rig, writeback: &str) -> u64 {
    match rig.call(open(writeback, true, None)) {
        Ok(ReplyBody::Opened(_, _, wait_ms)) => wait_ms,
        other => panic!("{other:?}"),
    }
}

/// What an owner remembers it may serve under its lease, whoever has the volume by then.
#[test]
fn a_forced_open_is_told_to_wait_until_the_owner_before_serves_nothing() {
    let mut rig = two_writebacks_and_a_volume();
    assert_eq!(waits_ms(&mut rig, "wb-a/1"), 0, "nobody had it");
    rig.now = rig.now.plus(100);
    assert_eq!(waits_ms(&mut rig, "wb-b/1"), 1000, "a may renew its lease until that is durable");
    rig.now = rig.now.plus(100);
    assert_eq!(waits_ms(&mut rig, "wb-b/2"), 1000, "a later start of b waits for a as well");
    rig.now = rig.now.plus(1000);
    assert_eq!(waits_ms(&mut rig, "wb-b/3"), 0, "and not for b");
    assert_eq!(waits_ms(&mut rig, "wb-c/1"), 1000, "b/2 has a lease since it opened the volume");
    rig.now = rig.now.plus(1000);
    assert_eq!(waits_ms(&mut rig, "wb-a/2"), 0);
}

/// The answer to a takeover dies with conversion. Whoever asked is on record as the owner when it asks
/// again, and the owner before is not on record at all: it may be cut off, and its lease not over.
#[test]
fn who_may_have_taken_a_volume_before_a_restart_waits_for_the_owner_that_nothing_names() {
    let mut rig = two_writebacks_and_a_volume();
    assert_eq!(waits_ms(&mut rig, "wb-a/1"), 0);
    assert_eq!(waits_ms(&mut rig, "wb-b/1"), 1000, "and this is not heard");
    rig.crash();
    assert_eq!(waits_ms(&mut rig, "wb-b/1"), 1000, "as long as a lease from before can last");
    rig.now = rig.now.plus(400);
    assert_eq!(waits_ms(&mut rig, "wb-b/1"), 1000, "asked anew, it counts anew");
    rig.now = rig.now.plus(1000);
    assert_eq!(waits_ms(&mut rig, "wb-b/1"), 0);
}

/// Whoever hears that its volume was taken lets go of what it has acknowledged. A takeover that conversion
/// forgets, because it dies before that is durable, must not have been heard of.
#[test]
fn nobody_hears_of_a_takeover_before_it_is_durable() {
    let mut rig = Rig::new(1, 100);
    let old = rig.volume("v", 100, 1);
    rig.promise(old.id, old.generation, 8);
    let is_told = |kind: &EffectKind| match kind {
        EffectKind::Writeback(WB, ToWriteback::VolumeFenced { .. }) => true,
        EffectKind::Writeback(WB, ToWriteback::Refused { refusal, .. }) => {
            refusal.reason == Reason::OldGeneration
        }
        EffectKind::Store(_, ToStore::Fence { volumes, .. }) => !volumes.is_empty(),
        _ => false,
    };
    let before = rig.count(is_told);
    for is_lost in [true, false] {
        rig.auto_commit = false;
        rig.call_later(open("w2", true, None));
        let begin = begin_io(&old, 0, 1);
        rig.say(FromWriteback::Begin(begin));
        rig.drain_once();
        assert_eq!(rig.count(is_told), before, "a takeover that is not durable");
        rig.auto_commit = true;
        match is_lost {
            true => {
                rig.crash();
                rig.join_store(1, 2, 100);
                rig.hello(WB, "wb");
                let now = rig.machine.volume("v").unwrap();
                assert_eq!((now.owner.as_deref(), now.generation), (Some("wb"), old.generation));
            }
            false => {
                rig.commit();
                assert!(rig.count(is_told) >= before + 2, "the owner and its store hear of it");
            }
        }
    }
    rig.assert_sound();
}

/// What was overwritten waits for the reads of the owner. One that has started again reads nothing any more
/// under its name of before, though nobody has opened the volume since.
#[test]
fn what_is_freed_does_not_wait_for_the_reads_of_an_owner_that_has_started_again() {
    let free = |rig: &mut Rig| {
        rig.drain();
        rig.machine.stores(rig.now)[0].free_blocks
    };
    let mut rig = Rig::new(1, 10);
    rig.input(Input::WritebackLost { session: WB });
    rig.hello(WB, "i/9");
    rig.create("v", 100 * BLOCK_BYTES, 1, false, false);
    let volume = rig.open("v", "i/9");
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    assert_eq!(free(&mut rig), 6);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    assert_eq!(free(&mut rig), 2, "four wait for reads");
    for (session, name) in [(4, "i/8"), (5, "other/10"), (6, "i"), (7, "j/10"), (8, "i/x")] {
        rig.hello(WritebackSession(session), name);
        assert_eq!(free(&mut rig), 2, "{name}");
    }
    rig.hello(WritebackSession(9), "i/10");
    assert_eq!(free(&mut rig), 6);
    rig.assert_sound();
}
