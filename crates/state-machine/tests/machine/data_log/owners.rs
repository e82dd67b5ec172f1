//! Who may log what, and what the next owner of a volume finds.

use bytes::Bytes;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_types::*;

use super::{logged, newer_than, next_owner, write_newer};
use crate::map::reserve;
use crate::rig::*;

/// What is wrong with a message, and why it is refused.
#[test]
fn what_may_not_be_logged_is_refused_and_changes_nothing() {
    let small = Limits { log_blocks_per_volume_max: 6, log_blocks_max: 9, ..limits() };
    let mut rig = Rig::with_limits(1, 100, small);
    let volume = rig.volume("v", 100, 1);
    let other = rig.volume("other", 100, 1);
    rig.create("place", 100 * BLOCK_BYTES, 1, true, false);
    let place = rig.open("place", "wb");
    rig.create("elsewhere", 100 * BLOCK_BYTES, 1, false, false);
    let elsewhere = rig.open("elsewhere", "another");
    rig.create("closed", 100 * BLOCK_BYTES, 1, false, false);
    let closed = rig.machine.volume("closed").unwrap();
    rig.log(&volume, 1, &[(0, 1), (1, 1)]).unwrap();
    let good = log_data(&volume, 2, &[(0, 2), (99, 2)]);
    let with = |change: fn(&mut LogData)| {
        let mut log = good.clone();
        change(&mut log);
        log
    };
    let many: Vec<(u64, u8)> = (0..=u64::from(IO_END_BLOCKS_MAX)).map(|lblk| (lblk, 1)).collect();
    let wrong = [
        (Reason::UnknownVolume, with(|log| log.volume = VolumeId(99))),
        (Reason::OldGeneration, with(|log| log.generation.0 += 1)),
        (Reason::OldGeneration, with(|log| log.generation.0 -= 1)),
        (Reason::OldGeneration, log_data(&elsewhere, 1, &[(0, 1)])),
        (Reason::OldGeneration, log_data(&closed, 1, &[(0, 1)])),
        (Reason::Malformed, log_data(&place, 1, &[(0, 1)])),
        (Reason::OutOfRange, log_data(&volume, 2, &[(0, 2), (100, 2)])),
        (Reason::OutOfRange, log_data(&volume, 2, &[(u64::MAX, 2)])),
        (Reason::Malformed, with(|log| log.entries[1].crc ^= 1)),
        (Reason::Malformed, with(|log| log.entries[0].end_bytes = BLOCK_BYTES + 1)),
        (Reason::Malformed, with(|log| log.entries[0].end_bytes = u64::MAX)),
        (Reason::Malformed, with(|log| log.entries.swap(0, 1))),
        (Reason::Malformed, with(|log| log.entries[1].lblk = log.entries[0].lblk)),
        (Reason::Malformed, log_data(&volume, 2, &[])),
        (Reason::Malformed, with(|log| log.entries.clear())),
        (Reason::Malformed, log_data(&volume, 2, &many)),
        (Reason::Malformed, with(|log| log.data = log.data.slice(1..))),
        (Reason::Malformed, with(|log| log.data = log.data.slice(BLOCK_SIZE..))),
        (Reason::Malformed, with(|log| log.data = Bytes::from(vec![2; 3 * BLOCK_SIZE]))),
        (Reason::Malformed, with(|log| log.data = Bytes::new())),
        (Reason::Malformed, with(|log| log.number = 0)),
        (Reason::Malformed, with(|log| log.number = (1 << 62) + 1)),
        (Reason::Malformed, with(|log| log.number = u64::MAX)),
        (Reason::WrongState, with(|log| log.number = 1)),
        (Reason::Limit, log_data(&volume, 2, &[2, 3, 4, 5, 6].map(|lblk| (lblk, 2)))),
    ];
    let before = rig.machine.snapshot();
    for (n, (reason, log)) in wrong.into_iter().enumerate() {
        assert_eq!(rig.try_log(log).unwrap_err().reason, reason, "the wrong one {n}");
        assert_eq!(rig.machine.snapshot(), before, "the wrong one {n}");
    }
    // Full in all, though neither volume is.
    rig.log(&other, 1, &[(0, 1), (1, 1), (2, 1), (3, 1)]).unwrap();
    let before = rig.machine.snapshot();
    let full = rig.log(&volume, 2, &[2, 3, 4, 5].map(|lblk| (lblk, 2))).unwrap_err();
    assert_eq!((full.reason, full.retry_after_ms > 0), (Reason::Limit, true));
    rig.input(Input::MetadataFull(true));
    assert_eq!(rig.try_log(good.clone()).unwrap_err().reason, Reason::MetadataFull);
    rig.input(Input::MetadataFull(false));
    rig.hello(WritebackSession(2), "another");
    rig.input(Input::Writeback {
        session: WritebackSession(2),
        message: FromWriteback::Log(good.clone()),
    });
    assert_eq!(rig.log_answer(good.request).unwrap().unwrap_err().reason, Reason::OldGeneration);
    assert_eq!(rig.machine.snapshot(), before);
    rig.try_log(good.clone()).unwrap();
    assert_eq!(logged(&rig, &volume), [(0, 2), (1, 1), (99, 2)]);
    rig.input(Input::StopIntake);
    assert_eq!(rig.log(&volume, 3, &[(5, 1)]).unwrap_err().reason, Reason::Draining);
    assert_eq!(logged(&rig, &volume), [(0, 2), (1, 1), (99, 2)]);
    rig.assert_sound();
}

/// Invariant `credit-backed`: whoever opens the volume next has the space for what it finds in the log.
#[test]
fn the_log_holds_no_more_blocks_of_a_volume_than_space_was_promised() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let log = |rig: &mut Rig, number, blocks: &[(u64, u8)]| {
        rig.try_log_as_it_is(log_data(&volume, number, blocks)).map_err(|refusal| refusal.reason)
    };
    assert_eq!(log(&mut rig, 1, &[(3, 1)]), Err(Reason::NoSpace));
    rig.promise(volume.id, volume.generation, 3);
    let before = rig.machine.snapshot();
    assert_eq!(log(&mut rig, 1, &[(3, 1), (4, 1), (5, 1), (6, 1)]), Err(Reason::NoSpace));
    assert_eq!(rig.machine.snapshot(), before);
    assert_eq!(log(&mut rig, 1, &[(3, 1), (4, 1)]), Ok(()));
    // What is there already needs no more.
    assert_eq!(log(&mut rig, 2, &[(3, 2), (4, 2), (5, 2)]), Ok(()));
    assert_eq!(log(&mut rig, 3, &[(5, 3), (6, 3)]), Err(Reason::NoSpace));
    // A write-out has its part of the promise until it ends, and so has what the log holds of it.
    let begin = BeginIo { lane: Lane::WriteOut, ..newer_than(&volume, 3, 2, 2) };
    let begun = rig.try_begin(begin).unwrap();
    assert_eq!(log(&mut rig, 3, &[(5, 3)]), Ok(()));
    assert_eq!(log(&mut rig, 4, &[(6, 4)]), Err(Reason::NoSpace));
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(logged(&rig, &volume), [(5, 3)]);
    assert_eq!(log(&mut rig, 4, &[(6, 4)]), Err(Reason::NoSpace), "the promise is used up");
    rig.promise(volume.id, volume.generation, 1);
    assert_eq!(log(&mut rig, 4, &[(6, 4)]), Ok(()));
    rig.assert_sound();
}

#[test]
fn a_growable_volume_may_have_data_in_the_log_behind_its_end() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 0, 1, false, true);
    let volume = rig.open("v", "wb");
    let last = VOLUME_BYTES_MAX / BLOCK_BYTES - 1;
    rig.log(&volume, 1, &[(0, 1), (last, 1)]).unwrap();
    let beyond = rig.log(&volume, 2, &[(last + 1, 1)]).unwrap_err();
    assert_eq!(beyond.reason, Reason::OutOfRange);
    let next = next_owner(&mut rig);
    assert_eq!(logged(&rig, &next), [(0, 1), (last, 1)]);
    assert_eq!(next.size_bytes, 0, "the log does not say how large the volume is");
    rig.assert_sound();
}

#[test]
fn nothing_is_logged_before_the_epoch_is_durable_nor_without_a_session() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.crash_before_epoch();
    let before = rig.machine.snapshot();
    rig.hello(WB, "wb");
    let log = log_data(&volume, 1, &[(3, 1)]);
    let request = log.request;
    rig.say(FromWriteback::Log(log));
    assert!(!matches!(rig.log_answer(request), Some(Ok(()))));
    assert_eq!(rig.machine.snapshot(), before);
    rig.commit();
    rig.say(FromWriteback::Log(log_data(&volume, 1, &[(3, 1)])));
    assert_eq!(rig.machine.snapshot().logs, before.logs, "Hello comes first");
    rig.assert_sound();
}

#[test]
fn the_owner_before_logs_nothing_and_reads_nothing_after_a_takeover_and_the_new_one_has_all() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.log(&volume, 1, &[(3, 1), (4, 1)]).unwrap();
    rig.hello(WritebackSession(2), "another");
    let next = rig.open("v", "another");
    assert_eq!((next.logged_blocks, next.logged_number), (2, 1));
    let before = rig.machine.snapshot();
    assert_eq!(rig.log(&volume, 2, &[(3, 9)]).unwrap_err().reason, Reason::OldGeneration);
    let stolen = log_data(&next, 2, &[(3, 9)]);
    assert_eq!(rig.try_log(stolen).unwrap_err().reason, Reason::OldGeneration);
    assert_eq!(rig.machine.snapshot(), before);
    let read = |generation| {
        let found = rig.machine.logged(volume.id, generation, Lblk(0), 9);
        found.map(|found| found.len()).map_err(|refusal| refusal.reason)
    };
    assert_eq!(read(volume.generation), Err(Reason::OldGeneration));
    assert_eq!(read(Generation(next.generation.0 + 1)), Err(Reason::OldGeneration));
    assert_eq!(read(next.generation), Ok(2));
    let close = Call::CloseVolume { name: "v".into(), volume: None, generation: next.generation };
    rig.call(close).unwrap();
    let closed = rig.machine.logged(volume.id, next.generation, Lblk(0), 9);
    assert_eq!(closed.unwrap_err().reason, Reason::OldGeneration);
    let last = rig.open("v", "wb");
    assert_eq!(logged(&rig, &last), [(3, 1), (4, 1)], "it outlives that it is closed");
    rig.assert_sound();
}

#[test]
fn who_cannot_read_the_log_opens_only_volumes_without_one() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let open = |rig: &mut Rig| {
        let call = Call::OpenVolume {
            name: "v".into(),
            volume: None,
            writeback: "wb".into(),
            force: true,
            if_generation: None,
            reads_log: false,
        };
        rig.call(call).map_err(|refusal| refusal.reason)
    };
    rig.log(&volume, 1, &[(3, 1)]).unwrap();
    let before = rig.machine.snapshot();
    assert_eq!(open(&mut rig), Err(Reason::Protocol));
    assert_eq!(rig.machine.snapshot(), before, "its owner is still its owner");
    write_newer(&mut rig, &volume, 3, 1, 1);
    assert!(matches!(open(&mut rig), Ok(ReplyBody::Opened(..))));
    rig.assert_sound();
}

#[test]
fn the_next_owner_has_the_space_for_what_is_in_the_log_although_the_stores_are_full() {
    for is_crash in [false, true] {
        let mut rig = Rig::new(1, 20);
        let volume = rig.volume("v", 100, 1);
        let other = rig.volume("other", 100, 1);
        assert_eq!(reserve(&mut rig, &volume, 4), Ok(4));
        rig.log(&volume, 1, &[0, 1, 2, 3].map(|lblk| (lblk, 1))).unwrap();
        rig.write(&other, 0, 16);
        assert_eq!(reserve(&mut rig, &other, 1), Err(Reason::NoSpace));
        // Two of them are under way when the owner is gone.
        let lane = Lane::WriteOut;
        let begun = rig.try_begin(BeginIo { lane, ..newer_than(&volume, 0, 2, 1) }).unwrap();
        rig.durable_release(&begun.segments[0].token);
        if is_crash {
            rig.crash();
            rig.hello(WB, "wb");
            rig.join_store(1, 1, 20);
        }
        let next = rig.open("v", "wb");
        assert_eq!((next.logged_blocks, next.credit_blocks), (4, 4));
        let from = rig.sent.len();
        rig.say(FromWriteback::Reserve {
            request: 5,
            volume: next.id,
            generation: next.generation,
            reset: true,
            add_blocks: 4,
            drop_blocks: 0,
        });
        let is_granted = |kind: &EffectKind| {
            let EffectKind::Writeback(_, message) = kind else { return false };
            *message == ToWriteback::Reserved { request: 5, blocks: 4 }
        };
        assert!(rig.sent[from..].iter().any(is_granted), "crash {is_crash}");
        rig.acknowledge();
        rig.advance(100);
        rig.drain();
        rig.acknowledge();
        let begin = BeginIo { lane, ..newer_than(&next, 0, 4, next.logged_number) };
        let begun = rig.try_begin(begin).unwrap();
        assert_eq!(rig.finish(&begun).failed, None);
        assert_eq!(logged(&rig, &next), []);
        rig.assert_sound();
    }
}

/// Whoever cannot read the log for now gives the volume back.
#[test]
fn a_volume_that_is_closed_keeps_the_space_for_what_is_in_its_log_and_no_more() {
    let mut rig = Rig::new(1, 20);
    let volume = rig.volume("v", 100, 1);
    let other = rig.volume("other", 100, 1);
    assert_eq!(reserve(&mut rig, &volume, 9), Ok(9));
    rig.log(&volume, 1, &[0, 1, 2, 3].map(|lblk| (lblk, 1))).unwrap();
    let generation = volume.generation;
    rig.call(Call::CloseVolume { name: "v".into(), volume: None, generation }).unwrap();
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 4);
    rig.assert_sound();
    rig.write(&other, 0, 16);
    assert_eq!(reserve(&mut rig, &other, 1), Err(Reason::NoSpace));
    rig.crash();
    rig.hello(WB, "wb");
    rig.join_store(1, 1, 20);
    let next = rig.open("v", "wb");
    assert_eq!((next.logged_blocks, next.credit_blocks), (4, 4));
    rig.acknowledge();
    let lane = Lane::WriteOut;
    let begun = rig.try_begin(BeginIo { lane, ..newer_than(&next, 0, 4, 1) }).unwrap();
    assert_eq!(rig.finish(&begun).failed, None);
    let generation = next.generation;
    rig.call(Call::CloseVolume { name: "v".into(), volume: None, generation }).unwrap();
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 0);
    rig.assert_sound();
}
