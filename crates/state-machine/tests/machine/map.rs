//! Order, sizes, trim, allocate, delete.

use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

/// Scenarios 35 and 36.
#[test]
fn the_size_grows_with_the_conversion_byte_exact_and_never_beyond_it() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 0, 1, false, true);
    let volume = rig.open("v", "wb");
    let mut append = begin_io(&volume, 0, 2);
    append.size_after_bytes = 5000;
    let begun = rig.try_begin(append.clone()).unwrap();
    assert_eq!(rig.machine.volume("v").unwrap().size_bytes, 0);
    let mut longer = begin_io(&volume, 0, 4);
    longer.size_after_bytes = 4 * BLOCK_BYTES;
    let second = rig.try_begin(longer).unwrap();
    assert_eq!(rig.finish(&begun).size_bytes, 5000);
    let skipped = second.segments[0].token.segment;
    rig.submit_with(&second.submitter, vec![skipped], false);
    rig.drain();
    assert_eq!(rig.completion(&second).unwrap().size_bytes, 5000);
    rig.crash();
    assert_eq!(rig.machine.volume("v").unwrap().size_bytes, 5000);
}

/// The owner of a growable volume has acknowledged what is not converted yet, or was converted unheard.
#[test]
fn a_trim_behind_the_end_of_a_growable_volume_waits_for_the_write_that_extends_it() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 0, 1, false, true);
    let volume = rig.open("v", "wb");
    let last = VOLUME_BYTES_MAX / BLOCK_BYTES;
    for change in [MapChange::Trim, MapChange::Zero] {
        assert_eq!(rig.change(&volume, change, 0, last), Ok(0), "{change:?} of nothing");
        let refused = rig.change(&volume, change, 1, last).unwrap_err();
        assert_eq!(refused.reason, Reason::OutOfRange, "no volume is so long");
    }
    let refused = rig.change(&volume, MapChange::Allocate, 0, 1).unwrap_err();
    assert_eq!(refused.reason, Reason::OutOfRange, "who would free it?");
    assert_eq!(rig.machine.volume("v").unwrap().size_bytes, 0);
    let mut append = begin_io(&volume, 8, 4);
    append.size_after_bytes = 12 * BLOCK_BYTES;
    let begun = rig.try_begin(append).unwrap();
    let trim = rig.call_later(change_call(&volume, MapChange::Trim, 0, 10));
    rig.drain();
    assert!(!rig.replies.contains_key(&trim));
    rig.finish(&begun);
    rig.drain();
    let Ok(ReplyBody::Changed { blocks_changed, .. }) = rig.replies[&trim] else {
        panic!("{:?}", rig.replies[&trim])
    };
    assert_eq!((blocks_changed, rig.written(&volume)), (2, vec![10, 11]));
    assert_eq!(rig.machine.volume("v").unwrap().size_bytes, 12 * BLOCK_BYTES);
    let fixed = rig.volume("w", 8, 1);
    for change in [MapChange::Trim, MapChange::Zero, MapChange::Allocate] {
        let refused = rig.change(&fixed, change, 0, 9).unwrap_err();
        assert_eq!(refused.reason, Reason::OutOfRange, "{change:?} of a volume of a fixed size");
    }
    rig.assert_sound();
}

/// Scenarios 42 and 44.
#[test]
fn a_trim_waits_for_the_write_below_it_and_nothing_comes_back_to_life() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    let trim = rig.call_later(change_call(&volume, MapChange::Trim, 2, 8));
    rig.drain();
    assert!(!rig.replies.contains_key(&trim));
    let refused = rig.try_begin(begin_io(&volume, 5, 1)).unwrap_err();
    assert_eq!((refused.reason, refused.retry_after_ms > 0), (Reason::Limit, true));
    assert_eq!(rig.write(&volume, 20, 1).failed, None);
    rig.finish(&begun);
    rig.drain();
    assert!(rig.replies[&trim].is_ok());
    assert_eq!(rig.written(&volume), [0, 1, 20]);
    rig.assert_sound();
}

/// Scenario 71.
#[test]
fn a_caller_waiting_in_trim_gets_its_earlier_completion_without_its_help() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.submit(&begun.submitter);
    let trim = rig.call_later(change_call(&volume, MapChange::Trim, 0, 4));
    rig.durable_release(&begun.segments[0].token);
    rig.drain();
    assert_eq!(rig.completion(&begun).unwrap().failed, None);
    assert!(rig.replies[&trim].is_ok());
    assert_eq!(rig.written(&volume), [0u64; 0]);
}

/// Scenario 43.
#[test]
fn freed_blocks_serve_another_volume_only_after_reads_and_commit_and_late_releases_do_nothing() {
    let mut rig = Rig::new(1, 4);
    let volume = rig.volume("v", 4, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.finish(&begun);
    let other = rig.volume("w", 4, 1);
    rig.auto_commit = false;
    rig.call_later(change_call(&volume, MapChange::Trim, 0, 4));
    rig.drain();
    rig.confirm(&volume);
    let refused = rig.try_begin(begin_io(&other, 0, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::NoSpace, "the record is not durable");
    rig.auto_commit = true;
    rig.commit();
    assert_eq!(rig.write(&other, 0, 4).failed, None);
    assert_eq!(rig.durable_release(&begun.segments[0].token), None);
    assert_eq!(rig.written(&other), [0, 1, 2, 3]);
    assert_eq!(rig.written(&volume), [0u64; 0]);
    rig.assert_sound();
}

/// The other half of scenario 43: a reader may still be in flight.
#[test]
fn freed_blocks_wait_until_the_writeback_confirms_its_reads() {
    let mut rig = Rig::new(1, 4);
    let volume = rig.volume("v", 4, 1);
    rig.write(&volume, 0, 4);
    rig.change(&volume, MapChange::Trim, 0, 4).unwrap();
    let refused = rig.try_begin(begin_io(&volume, 0, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::NoSpace);
    rig.confirm(&volume);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
}

/// A reader of an older generation holds blocks back until its store has fenced it.
#[test]
fn freed_blocks_wait_until_the_old_generation_is_fenced() {
    let mut rig = Rig::new(1, 4);
    let volume = rig.volume("v", 4, 1);
    rig.write(&volume, 0, 4);
    let volume = rig.open("v", "wb");
    rig.change(&volume, MapChange::Trim, 0, 4).unwrap();
    rig.confirm(&volume);
    assert_eq!(rig.try_begin(begin_io(&volume, 0, 1)).unwrap_err().reason, Reason::NoSpace);
    rig.acknowledge();
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    rig.assert_sound();
}

/// Scenario 45.
#[test]
fn allocate_beside_a_write_in_flight_converts_only_what_was_written() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.change(&volume, MapChange::Allocate, 0, 8).unwrap();
    let begun = rig.begin(&volume, 2, 2);
    assert_eq!(rig.change(&volume, MapChange::Allocate, 8, 8).unwrap(), 8);
    rig.finish(&begun);
    assert_eq!(rig.written(&volume), [2, 3]);
    let unwritten: Vec<u64> = (0..16).filter(|at| *at != 2 && *at != 3).collect();
    assert_eq!(rig.unwritten(&volume), unwritten);
    rig.assert_sound();
}

/// Scenario 46. The order of release decides, and neither the order of begin nor the lane.
#[test]
fn of_two_overlapping_io_ends_the_later_released_one_wins_in_any_lane() {
    let lanes =
        Lane::ALL.iter().flat_map(|first| Lane::ALL.iter().map(move |then| [*first, *then]));
    for (lanes, released) in lanes.flat_map(|lanes| [(lanes, [0, 1]), (lanes, [1, 0])]) {
        let mut rig = Rig::new(1, 100);
        let volume = rig.volume("v", 100, 1);
        reserve(&mut rig, &volume, 50).unwrap();
        let writes = [(lanes[0], 0, 2), (lanes[1], 1, 2)].map(|(lane, lblk, blocks)| {
            let begin = BeginIo { lane, ..begin_io(&volume, lblk, blocks) };
            rig.try_begin(begin).unwrap()
        });
        for at in released {
            rig.durable_release(&writes[at].segments[0].token);
            rig.submit(&writes[at].submitter);
        }
        rig.drain();
        let of = |at: usize, block: u64| {
            let token = writes[at].segments[0].token;
            Some((token.store, Pblk(token.pblk.0 + block)))
        };
        let last = released[1];
        let both = of(last, if last == 0 { 1 } else { 0 });
        assert_eq!(rig.place(&volume, 1), both, "{lanes:?}, released {released:?}");
        assert_eq!(rig.place(&volume, 0), of(0, 0));
        assert_eq!(rig.place(&volume, 2), of(1, 1));
        rig.assert_sound();
    }
}

/// Scenario 48.
#[test]
fn an_overwrite_in_place_beside_an_unwritten_write_is_not_confused() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 100 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    rig.write(&volume, 0, 4);
    let over = rig.begin(&volume, 0, 4);
    let fresh = rig.begin(&volume, 4, 4);
    assert!(!over.owes && fresh.owes);
    let refused = rig.try_begin(begin_io(&volume, 3, 2)).unwrap_err();
    assert_eq!(refused.reason, Reason::Limit);
    rig.finish(&over);
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    rig.finish(&fresh);
    assert_eq!(rig.written(&volume), (0..8).collect::<Vec<_>>());
    rig.assert_sound();
}

/// An aborted write in place blocks its range until its bios cannot land any more.
#[test]
fn a_range_written_in_place_is_closed_after_an_abort_until_the_fence() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 100 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    rig.write(&volume, 0, 4);
    let begun = rig.begin(&volume, 0, 4);
    rig.submit_with(&begun.submitter, vec![], true);
    assert_eq!(rig.try_begin(begin_io(&volume, 0, 1)).unwrap_err().reason, Reason::Limit);
    rig.acknowledge();
    assert_eq!(rig.write(&volume, 0, 1).failed, None);
    rig.assert_sound();
}

/// Whoever was told that a write in place failed and reads the old data does not see it change later:
/// there is no map to read by while that write may still land.
#[test]
fn what_an_aborted_write_in_place_may_still_change_is_not_read_before_the_fence() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 100 * BLOCK_BYTES, 1, true, false);
    let volume = rig.open("v", "wb");
    rig.write(&volume, 0, 8);
    let look_up = |rig: &mut Rig, generation, lblk, blocks| {
        let found = rig.machine.lookup(volume.id, generation, LblkRange::new(lblk, blocks));
        found.unwrap().map(|view| view.grant.is_some()).map_err(|refusal| refusal.reason)
    };
    let current = volume.generation;
    let begun = rig.begin(&volume, 2, 3);
    assert_eq!(look_up(&mut rig, current, 0, 8), Ok(true), "its writer still waits for it");
    rig.submit_with(&begun.submitter, vec![], true);
    assert_eq!(look_up(&mut rig, current, 4, 1), Err(Reason::Limit));
    assert_eq!(look_up(&mut rig, current, 0, 8), Err(Reason::Limit));
    assert_eq!(look_up(&mut rig, current, 0, 2), Ok(true));
    assert_eq!(look_up(&mut rig, current, 5, 3), Ok(true));
    assert_eq!(look_up(&mut rig, current, 2, 0), Ok(true), "no block is looked at");
    assert_eq!(look_up(&mut rig, Generation(0), 0, 8), Ok(false), "without a grant nobody reads");
    rig.acknowledge();
    assert_eq!(look_up(&mut rig, current, 0, 8), Ok(true));
    // So does the next owner, who never heard of it.
    rig.begin(&volume, 7, 1);
    let next = rig.open("v", "wb").generation;
    assert_ne!(next, current);
    assert_eq!(look_up(&mut rig, next, 7, 1), Err(Reason::Limit));
    rig.acknowledge();
    assert_eq!(look_up(&mut rig, next, 0, 8), Ok(true));
    rig.assert_sound();
}

/// Scenario 49.
#[test]
fn delete_waits_for_io_ends_and_gives_all_space_back() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 2);
    rig.write(&volume, 0, 10);
    let begun = rig.begin(&volume, 20, 4);
    let generation = volume.generation;
    let call = Call::DeleteVolume {
        name: "v".into(),
        volume: None,
        generation,
        attempt: Attempt::default(),
    };
    let delete = rig.call_later(call.clone());
    rig.drain();
    assert!(!rig.replies.contains_key(&delete));
    rig.finish(&begun);
    rig.drain();
    assert_eq!(rig.replies[&delete], Ok(ReplyBody::Deleted));
    assert_eq!(rig.call(call).unwrap_err().reason, Reason::UnknownVolume);
    assert_eq!(rig.try_begin(begin_io(&volume, 0, 1)).unwrap_err().reason, Reason::UnknownVolume);
    rig.acknowledge();
    rig.drain();
    rig.acknowledge();
    for store in rig.machine.stores(rig.now) {
        assert_eq!(store.free_blocks, 100);
    }
    rig.assert_sound();
}

/// A creation that was given up arrives after the volume was created by another try and deleted.
#[test]
fn a_creation_that_its_caller_gave_up_does_not_bring_a_deleted_volume_back() {
    let mut rig = Rig::new(1, 100);
    let create = |rig: &mut Rig, as_of| {
        let call = Call::CreateVolume {
            name: "v".into(),
            size_bytes: 8 * BLOCK_BYTES,
            replicas: 1,
            in_place: false,
            growable: false,
            as_of: Some(as_of),
        };
        rig.call(call).map(drop).map_err(|refusal| refusal.reason)
    };
    let delete = || Call::DeleteVolume {
        name: "v".into(),
        volume: None,
        generation: Generation(0),
        attempt: Attempt::default(),
    };
    let first = rig.machine.deletions();
    assert_eq!(create(&mut rig, first), Ok(()));
    assert_eq!(create(&mut rig, first), Ok(()), "it is there");
    rig.call(delete()).unwrap();
    assert_eq!(create(&mut rig, first), Err(Reason::WrongState));
    assert!(rig.machine.volume("v").is_none());
    // Whoever is told that there is no such volume relies on it as well.
    let second = rig.machine.deletions();
    assert_eq!(rig.call(delete()).unwrap_err().reason, Reason::UnknownVolume);
    assert_eq!(create(&mut rig, second), Err(Reason::WrongState));
    // What a restart has forgotten is not guessed.
    let third = rig.machine.deletions();
    rig.crash();
    assert_eq!(create(&mut rig, third), Err(Reason::WrongState));
    let fourth = rig.machine.deletions();
    assert_eq!(create(&mut rig, fourth), Ok(()));
    assert_eq!(create(&mut rig, third), Ok(()), "nothing is created, and the answer is true");
    rig.assert_sound();
}

/// Calls that were given up arrive when another volume has the name, opened as often.
#[test]
fn what_is_meant_for_a_deleted_volume_leaves_the_next_one_of_its_name_alone() {
    let mut rig = Rig::new(1, 100);
    let first = rig.volume("v", 100, 1);
    let (generation, attempt) = (first.generation, Attempt { number: 1, over: 0, logged: 0 });
    let (name, volume) = (|| "v".to_owned(), Some(first.id));
    let delete = Call::DeleteVolume { name: name(), volume, generation, attempt };
    rig.call(delete.clone()).unwrap();
    let second = rig.volume("v", 100, 1);
    assert_eq!(second.generation, generation);
    rig.write(&second, 0, 4);
    let resize = Call::ResizeVolume { name: name(), volume, size_bytes: 0, generation, attempt };
    let close = Call::CloseVolume { name: name(), volume, generation };
    for late in [delete, resize, close] {
        assert_eq!(rig.call(late).unwrap_err().reason, Reason::UnknownVolume);
    }
    let (writeback, if_generation) = ("wb".to_owned(), Some(generation));
    let open = Call::OpenVolume {
        name: name(),
        volume,
        writeback,
        force: true,
        if_generation,
        reads_log: true,
    };
    assert_eq!(rig.call(open).unwrap_err().reason, Reason::OldGeneration);
    let left = rig.machine.volume("v").unwrap();
    assert_eq!((left.size_bytes, left.owner), (second.size_bytes, second.owner.clone()));
    assert_eq!(rig.written(&second), [0, 1, 2, 3]);
    rig.assert_sound();
}

/// A trim of a whole large volume costs as much as there is mapped.
#[test]
fn trimming_two_tebibytes_of_holes_makes_one_record() {
    let mut rig = Rig::new(1, 100);
    let blocks = (2 << 40) / BLOCK_BYTES;
    let volume = rig.volume("v", blocks, 1);
    rig.write(&volume, 0, 2);
    rig.write(&volume, blocks - 2, 2);
    let records = rig.journal.len();
    assert_eq!(rig.change(&volume, MapChange::Trim, 0, blocks).unwrap(), 4);
    assert_eq!(rig.journal.len(), records + 1);
    assert_eq!(rig.change(&volume, MapChange::Trim, 0, blocks).unwrap(), 0);
    assert_eq!(rig.journal.len(), records + 1);
    rig.assert_sound();
}

#[test]
fn shrinking_frees_what_lies_beyond_and_zeroing_keeps_it() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.write(&volume, 0, 10);
    assert_eq!(rig.change(&volume, MapChange::Zero, 4, 2).unwrap(), 2);
    let resize = Call::ResizeVolume {
        name: "v".into(),
        volume: None,
        size_bytes: 6 * BLOCK_BYTES,
        generation: volume.generation,
        attempt: Attempt::default(),
    };
    rig.call(resize).unwrap();
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    assert_eq!(rig.unwritten(&volume), [4, 5]);
    assert_eq!(rig.machine.volume("v").unwrap().size_bytes, 6 * BLOCK_BYTES);
    rig.assert_sound();
}

pub fn reserve(rig: &mut Rig, volume: &VolumeInfo, add_blocks: u64) -> Result<u64, Reason> {
    let from = rig.sent.len();
    rig.say(FromWriteback::Reserve {
        request: 5,
        volume: volume.id,
        generation: volume.generation,
        reset: false,
        add_blocks,
        drop_blocks: 0,
    });
    let answer = rig.sent[from..].iter().find_map(|kind| match kind {
        EffectKind::Writeback(_, ToWriteback::Reserved { blocks, .. }) => Some(Ok(*blocks)),
        EffectKind::Writeback(_, ToWriteback::Refused { refusal, .. }) => Some(Err(refusal.reason)),
        _ => None,
    });
    answer.expect("Reserve was answered")
}

/// A trim that was given up arrives after newer data was written there.
#[test]
fn a_change_that_its_caller_gave_up_is_not_carried_out_when_it_arrives_late() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let numbered = |number, over| match change_call(&volume, MapChange::Trim, 0, 4) {
        Call::ChangeMap { volume, generation, change, range, .. } => {
            let attempt = Attempt { number, over, logged: 0 };
            Call::ChangeMap { volume, generation, change, range, attempt }
        }
        other => other,
    };
    let over = |rig: &mut Rig, over| {
        let told = rig.machine.attempts_over(volume.id, volume.generation, over);
        told.map_err(|refusal| refusal.reason)
    };
    rig.write(&volume, 0, 4);
    // The first try is lost for now, the second is carried out and says so.
    assert!(rig.call(numbered(2, 1)).is_ok());
    rig.write(&volume, 0, 4);
    assert_eq!(rig.call(numbered(1, 0)).unwrap_err().reason, Reason::WrongState);
    // A try waits for a write in flight while it is given up: conversion says so until it has ended.
    let begun = rig.begin(&volume, 1, 1);
    rig.call_later(numbered(3, 2));
    assert_eq!(over(&mut rig, 3), Err(Reason::Limit));
    rig.finish(&begun);
    rig.drain();
    assert_eq!(rig.written(&volume), [0u64; 0]);
    assert_eq!(over(&mut rig, 3), Ok(()));
    // One is given up without any other: a look-up says so.
    rig.write(&volume, 0, 4);
    assert_eq!(over(&mut rig, 4), Ok(()));
    assert_eq!(rig.call(numbered(4, 3)).unwrap_err().reason, Reason::WrongState);
    let delete = Call::DeleteVolume {
        name: "v".into(),
        volume: Some(volume.id),
        generation: volume.generation,
        attempt: Attempt { number: 4, over: 3, logged: 0 },
    };
    assert_eq!(rig.call(delete).unwrap_err().reason, Reason::WrongState);
    assert_eq!(rig.written(&volume), [0, 1, 2, 3]);
    // The next generation counts anew.
    let next = rig.open("v", "wb");
    let call = change_call(&next, MapChange::Trim, 0, 1);
    assert!(rig.call(call).is_ok());
    assert_eq!(over(&mut rig, 9), Ok(()), "nothing is said of an older generation");
    rig.assert_sound();
}

#[test]
fn a_hole_of_any_length_is_one_step_of_a_list_of_extents() {
    let mut rig = Rig::new(1, 100);
    let blocks = VOLUME_BYTES_MAX / BLOCK_BYTES;
    let volume = rig.volume("v", blocks, 1);
    let last = blocks - 1;
    for lblk in [3, 1024 * 70, last] {
        rig.write(&volume, lblk, 1);
    }
    let mut steps = Vec::new();
    let mut at = 0;
    while at < blocks && steps.len() < 100 {
        let rest = LblkRange::new(at, blocks - at);
        let (extents, next) = rig.machine.next_extents("v", rest, 1024 * 64).unwrap().unwrap();
        assert!(next > at);
        at = next;
        steps.push(extents.iter().map(|extent| extent.range.start.0).collect::<Vec<_>>());
    }
    assert_eq!(steps, [vec![3], vec![1024 * 70], vec![last]]);
    // Inside a chunk that has nothing there, and behind everything.
    let (none, next) = rig.machine.next_extents("v", LblkRange::new(5, 10), 4).unwrap().unwrap();
    assert_eq!((none.len(), next), (0, 9));
    let nothing = LblkRange::new(1024 * 71, 500);
    assert_eq!(rig.machine.next_extents("v", nothing, 4).unwrap(), Some((vec![], 1024 * 71 + 500)));
    assert_eq!(rig.machine.next_extents("w", nothing, 4).unwrap(), None);
}
