//! The data log: small flushes that are durable before they are converted.

mod owners;
mod random;

use endio_state_machine::chunk::CHUNK_BLOCKS;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_state_machine::record::Record;
use endio_types::*;

use crate::rig::*;

/// A write-out that is newer than messages up to a number.
fn newer_than(volume: &VolumeInfo, lblk: u64, blocks: u32, logged_up_to: u64) -> BeginIo {
    BeginIo { logged_up_to, ..begin_io(volume, lblk, blocks) }
}

/// Everything is released; the conversion has not run.
fn queue(rig: &mut Rig, begun: &Begun) {
    for segment in &begun.segments {
        assert_eq!(rig.durable_release(&segment.token), None);
    }
    assert_eq!(rig.submit(&begun.submitter), None);
}

fn write_newer(rig: &mut Rig, volume: &VolumeInfo, lblk: u64, blocks: u32, up_to: u64) {
    let begun = rig.try_begin(newer_than(volume, lblk, blocks, up_to)).unwrap();
    assert_eq!(rig.finish(&begun).failed, None);
}

/// After a crash: peers are back, and "wb" opens the volume again.
fn next_owner(rig: &mut Rig) -> VolumeInfo {
    rig.crash();
    rig.hello(WB, "wb");
    rig.open("v", "wb")
}

/// The blocks in the log, with the byte that they are full of.
fn logged(rig: &Rig, volume: &VolumeInfo) -> Vec<(u64, u8)> {
    rig.logged(volume).into_iter().map(|(lblk, _, fill)| (lblk, fill)).collect()
}

fn attempt(logged: u64) -> Attempt {
    Attempt { logged, ..Attempt::default() }
}

fn change_after(volume: &VolumeInfo, change: MapChange, at: (u64, u64), logged: u64) -> Call {
    match change_call(volume, change, at.0, at.1) {
        Call::ChangeMap { volume, generation, change, range, .. } => {
            Call::ChangeMap { volume, generation, change, range, attempt: attempt(logged) }
        }
        other => other,
    }
}

fn resize(volume: &VolumeInfo, size_bytes: u64, logged: u64) -> Call {
    Call::ResizeVolume {
        name: volume.name.clone(),
        size_bytes,
        volume: Some(volume.id),
        generation: volume.generation,
        attempt: attempt(logged),
    }
}

fn unanswered(rig: &mut Rig, log: LogData) -> u64 {
    let request = log.request;
    rig.say(FromWriteback::Log(log));
    assert_eq!(rig.log_answer(request), None, "it is not durable");
    request
}

#[test]
fn a_flush_is_answered_when_its_data_is_durable_and_then_it_is_there_after_a_crash() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.promise(volume.id, volume.generation, 4);
    rig.auto_commit = false;
    let first = unanswered(&mut rig, log_data(&volume, 1, &[(3, 1), (4, 2)]));
    rig.commit();
    assert_eq!(rig.log_answer(first), Some(Ok(())));
    let second = unanswered(&mut rig, log_data(&volume, 2, &[(4, 9), (50, 9)]));
    rig.auto_commit = true;
    let next = next_owner(&mut rig);
    assert_eq!(rig.log_answer(second), None);
    assert_eq!(rig.logged(&next), [(3, 1, 1), (4, 1, 2)]);
    assert_eq!((next.logged_blocks, next.logged_number), (2, 1));
    // Without a conversion the map is as it was.
    assert_eq!(rig.written(&next), [0u64; 0]);
    rig.assert_sound();
}

#[test]
fn a_checkpoint_holds_what_was_logged_with_all_that_is_said_of_it() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let mut log = log_data(&volume, 7, &[(3, 1), (90, 2)]);
    log.entries[1].end_bytes = 90 * BLOCK_BYTES + 17;
    log.entries[1].stamp = 1234;
    rig.try_log(log.clone()).unwrap();
    rig.restart_from_snapshot();
    rig.hello(WB, "wb");
    let next = rig.open("v", "wb");
    assert_eq!(rig.logged(&next), [(3, 7, 1), (90, 7, 2)]);
    let all = rig.machine.logged(next.id, next.generation, Lblk(0), 9).unwrap();
    for ((lblk, found), entry) in all.iter().zip(&log.entries) {
        assert_eq!((*lblk, found.generation), (entry.lblk, volume.generation));
        assert_eq!(
            (found.end_bytes, found.crc, found.stamp),
            (entry.end_bytes, entry.crc, entry.stamp)
        );
        assert_eq!((found.number, found.data.len()), (7, BLOCK_SIZE));
    }
    assert_eq!(rig.machine.gauges(rig.now).logged_blocks, 2);
    rig.assert_sound();
}

#[test]
fn a_block_that_is_logged_again_is_there_once_in_its_newest_version() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let other = rig.volume("other", 100, 1);
    rig.log(&volume, 1, &[(3, 1), (4, 1), (5, 1)]).unwrap();
    rig.log(&volume, 2, &[(4, 2), (6, 2)]).unwrap();
    rig.log(&other, 1, &[(4, 7)]).unwrap();
    assert_eq!(rig.logged(&volume), [(3, 1, 1), (4, 2, 2), (5, 1, 1), (6, 2, 2)]);
    assert_eq!(rig.logged(&other), [(4, 1, 7)]);
    let info = rig.machine.volume("v").unwrap();
    assert_eq!((info.logged_blocks, info.logged_number), (4, 2));
    assert_eq!(rig.machine.gauges(rig.now).logged_blocks, 5);
    assert_eq!(rig.machine.counters().logged_blocks, 6);
    let part = rig.machine.logged(volume.id, volume.generation, Lblk(4), 2).unwrap();
    assert_eq!(part.iter().map(|(lblk, _)| lblk.0).collect::<Vec<_>>(), [4, 5]);
    rig.assert_sound();
}

/// Invariant `logged-until-converted`.
#[test]
fn a_conversion_ends_what_was_logged_of_its_blocks_before_it_was_picked_and_nothing_else() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.log(&volume, 1, &[(2, 1), (3, 1), (4, 1), (5, 1), (9, 1)]).unwrap();
    rig.log(&volume, 2, &[(4, 2)]).unwrap();
    let more = vec![LblkRange::new(9, 1), LblkRange::new(20, 1)];
    let begun = rig.try_begin(BeginIo { more, ..newer_than(&volume, 3, 2, 2) }).unwrap();
    rig.log(&volume, 3, &[(9, 3), (20, 3)]).unwrap();
    assert_eq!(logged(&rig, &volume).len(), 6, "nothing ends before the conversion");
    queue(&mut rig, &begun);
    assert_eq!(logged(&rig, &volume).len(), 6, "nothing ends before the conversion");
    rig.drain();
    assert_eq!(rig.completion(&begun).unwrap().failed, None);
    assert_eq!(logged(&rig, &volume), [(2, 1), (5, 1), (9, 3), (20, 3)]);
    write_newer(&mut rig, &volume, 2, 4, 0);
    assert_eq!(logged(&rig, &volume).len(), 4, "older than all that was logged");
    write_newer(&mut rig, &volume, 0, 30, 3);
    assert_eq!(logged(&rig, &volume), []);
    let info = rig.machine.volume("v").unwrap();
    assert_eq!((info.logged_blocks, info.logged_number), (0, 0));
    rig.assert_sound();
}

#[test]
fn the_end_in_the_log_and_the_new_map_are_durable_together() {
    for is_durable in [false, true] {
        let mut rig = Rig::new(1, 100);
        let volume = rig.volume("v", 100, 1);
        rig.log(&volume, 1, &[(3, 1), (4, 1)]).unwrap();
        let begun = rig.try_begin(newer_than(&volume, 3, 1, 1)).unwrap();
        queue(&mut rig, &begun);
        rig.auto_commit = false;
        let records = rig.journal.len();
        rig.drain();
        assert_eq!(rig.journal.len(), records + 1, "one record");
        if is_durable {
            rig.commit();
        }
        rig.auto_commit = true;
        let next = next_owner(&mut rig);
        let (left, written) = match is_durable {
            true => (vec![(4, 1)], vec![3]),
            false => (vec![(3, 1), (4, 1)], vec![]),
        };
        assert_eq!((logged(&rig, &next), rig.written(&next)), (left, written));
        rig.assert_sound();
    }
}

#[test]
fn several_conversions_of_one_batch_end_each_what_is_theirs() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let other = rig.volume("other", 100, 1);
    rig.log(&volume, 1, &[(0, 1), (5, 1), (6, 1)]).unwrap();
    rig.log(&other, 1, &[(0, 1), (5, 1)]).unwrap();
    let one = rig.try_begin(newer_than(&volume, 0, 1, 1)).unwrap();
    rig.log(&volume, 2, &[(0, 2), (6, 2)]).unwrap();
    let two = rig.try_begin(newer_than(&volume, 5, 2, 1)).unwrap();
    let three = rig.try_begin(newer_than(&other, 5, 1, 1)).unwrap();
    for begun in [&one, &two, &three] {
        queue(&mut rig, begun);
    }
    let records = rig.journal.len();
    rig.drain();
    assert_eq!(rig.journal.len(), records + 1, "one batch");
    assert_eq!(logged(&rig, &volume), [(0, 2), (6, 2)]);
    assert_eq!(logged(&rig, &other), [(0, 1)]);
    rig.assert_sound();
}

#[test]
fn a_write_out_that_fails_or_is_given_up_and_blocks_that_were_not_sent_end_nothing() {
    let mut rig = Rig::new(2, 100);
    let volume = rig.volume("v", 100, 2);
    rig.log(&volume, 1, &[(3, 1), (4, 1)]).unwrap();
    let all = vec![(3, 1), (4, 1)];
    let begin = |rig: &mut Rig| rig.try_begin(newer_than(&volume, 3, 2, 1)).unwrap();

    let failed = begin(&mut rig);
    rig.release(&failed.segments[0].token, SegmentOutcome::Failed(Reason::IoError));
    rig.durable_release(&failed.segments[1].token);
    rig.submit(&failed.submitter);
    rig.drain();
    assert!(rig.completion(&failed).unwrap().failed.is_some());
    assert_eq!(logged(&rig, &volume), all);

    let given_up = begin(&mut rig);
    rig.submit_with(&given_up.submitter, vec![], true);
    rig.drain();
    assert!(rig.completion(&given_up).unwrap().failed.is_some());
    assert_eq!(logged(&rig, &volume), all);

    // One copy of two is not durable data.
    let half = begin(&mut rig);
    rig.durable_release(&half.segments[0].token);
    let unsent = vec![half.segments[1].token.segment];
    rig.submit_with(&half.submitter, unsent, false);
    rig.drain();
    assert_eq!(rig.completion(&half).unwrap().converted, []);
    assert_eq!(logged(&rig, &volume), all);

    let unreadable = begin(&mut rig);
    queue(&mut rig, &unreadable);
    rig.machine.table_mut().damage(volume.id, 0);
    rig.drain();
    assert_eq!(rig.completion(&unreadable).unwrap().failed, Some(Reason::MetadataFull));
    rig.machine.table_mut().repair();
    assert_eq!(logged(&rig, &volume), all);

    let late = begin(&mut rig);
    for segment in &late.segments {
        rig.durable_release(&segment.token);
    }
    let next = rig.open("v", "wb");
    rig.drain();
    assert_eq!(logged(&rig, &next), all, "the owner before had not converted it");
    rig.assert_sound();
}

/// A file system's blocks lie where they lie: two pieces of one write-out, one of them not sent.
#[test]
fn of_a_write_out_in_part_the_entries_of_the_durable_part_end() {
    let mut rig = Rig::new(1, 100);
    // Runs of two blocks are all that is free: a write-out of four has two segments.
    let filler = rig.volume("filler", 100, 1);
    rig.write(&filler, 0, 100);
    rig.change(&filler, MapChange::Trim, 10, 2).unwrap();
    rig.change(&filler, MapChange::Trim, 20, 2).unwrap();
    rig.confirm(&filler);
    rig.acknowledge();
    rig.advance(100);
    rig.drain();
    let volume = rig.volume("v", 100, 1);
    rig.log(&volume, 1, &[(0, 1), (1, 1), (2, 1), (3, 1)]).unwrap();
    let write_out = BeginIo { lane: Lane::WriteOut, ..newer_than(&volume, 0, 4, 1) };
    let begun = rig.try_begin(write_out).unwrap();
    assert_eq!(begun.segments.len(), 2);
    let sent = &begun.segments[1];
    assert_eq!(rig.durable_release(&sent.token), None);
    rig.submit_with(&begun.submitter, vec![begun.segments[0].token.segment], false);
    rig.drain();
    let durable = begun.lblks(sent);
    assert_eq!(rig.written(&volume), durable);
    let left: Vec<u64> = logged(&rig, &volume).into_iter().map(|(lblk, _)| lblk).collect();
    assert!(left.len() == 2 && left.iter().all(|lblk| !durable.contains(lblk)), "{left:?}");
    rig.assert_sound();
}

#[test]
fn trim_and_zero_end_what_was_logged_in_their_range_whether_anything_is_mapped_or_not() {
    for change in [MapChange::Trim, MapChange::Zero] {
        for is_mapped in [false, true] {
            let mut rig = Rig::new(1, 100);
            let volume = rig.volume("v", 3 * CHUNK_BLOCKS, 1);
            if is_mapped {
                rig.write(&volume, 2, 4);
                rig.write(&volume, CHUNK_BLOCKS, 4);
            }
            let ends = CHUNK_BLOCKS + 2;
            rig.log(&volume, 1, &[(1, 1), (3, 1), (ends - 1, 1), (ends, 1)]).unwrap();
            rig.change(&volume, change, 2, ends - 2).unwrap();
            assert_eq!(logged(&rig, &volume), [(1, 1), (ends, 1)], "{change:?} {is_mapped}");
            let next = next_owner(&mut rig);
            assert_eq!(logged(&rig, &next), [(1, 1), (ends, 1)], "{change:?} {is_mapped}");
            rig.assert_sound();
        }
    }
}

#[test]
fn to_allocate_or_to_grow_ends_nothing_in_the_log() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 50, 1);
    rig.log(&volume, 1, &[(3, 1), (49, 1)]).unwrap();
    rig.change(&volume, MapChange::Allocate, 0, 10).unwrap();
    rig.call(resize(&volume, 80 * BLOCK_BYTES, 0)).unwrap();
    rig.call(resize(&volume, 80 * BLOCK_BYTES, 0)).unwrap();
    assert_eq!(logged(&rig, &volume), [(3, 1), (49, 1)]);
    let next = next_owner(&mut rig);
    assert_eq!(logged(&rig, &next), [(3, 1), (49, 1)]);
    rig.assert_sound();
}

#[test]
fn a_volume_that_shrinks_ends_what_was_logged_behind_its_new_end() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 50 * BLOCK_BYTES, 1, false, true);
    let volume = rig.open("v", "wb");
    rig.write(&volume, 40, 2);
    rig.log(&volume, 1, &[(8, 1), (9, 1), (10, 1), (60, 1)]).unwrap();
    rig.call(resize(&volume, 9 * BLOCK_BYTES + 100, 0)).unwrap();
    assert_eq!(logged(&rig, &volume), [(8, 1), (9, 1)]);
    let all = rig.machine.logged(volume.id, volume.generation, Lblk(0), 9).unwrap();
    let ends: Vec<u64> = all.iter().map(|(_, logged)| logged.end_bytes).collect();
    assert_eq!(ends, [9 * BLOCK_BYTES, 9 * BLOCK_BYTES + 100], "none reaches behind it");
    rig.call(resize(&volume, 50 * BLOCK_BYTES, 0)).unwrap();
    let next = next_owner(&mut rig);
    assert_eq!(logged(&rig, &next), [(8, 1), (9, 1)]);
    rig.assert_sound();
}

/// A file was appended to and flushed, and is cut off again before anything of it was converted: its
/// size in the map is the one that it is cut to.
#[test]
fn what_was_logged_behind_the_end_ends_although_the_size_does_not_change() {
    for size in [0, 9 * BLOCK_BYTES] {
        let mut rig = Rig::new(1, 100);
        rig.create("v", size, 1, false, true);
        let volume = rig.open("v", "wb");
        rig.log(&volume, 1, &[(9, 1), (10, 1)]).unwrap();
        rig.call(resize(&volume, size, 1)).unwrap();
        assert_eq!(logged(&rig, &volume), [], "size {size}");
        let next = next_owner(&mut rig);
        assert_eq!(logged(&rig, &next), [], "size {size}");
        assert_eq!(next.size_bytes, size);
        rig.assert_sound();
    }
}

/// It is cut off above what the map knows of: for the map it grows.
#[test]
fn what_was_logged_behind_the_end_ends_although_the_size_grows() {
    let mut rig = Rig::new(1, 100);
    rig.create("v", 0, 1, false, true);
    let volume = rig.open("v", "wb");
    rig.log(&volume, 1, &[(3, 1), (9, 1)]).unwrap();
    rig.call(resize(&volume, 4 * BLOCK_BYTES, 1)).unwrap();
    assert_eq!(logged(&rig, &volume), [(3, 1)]);
    rig.assert_sound();
}

#[test]
fn a_deleted_volume_leaves_nothing_in_the_log() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let other = rig.volume("other", 100, 1);
    rig.log(&volume, 1, &[(3, 1), (99, 1)]).unwrap();
    rig.log(&other, 1, &[(3, 2)]).unwrap();
    let delete = Call::DeleteVolume {
        name: "v".into(),
        volume: Some(volume.id),
        generation: volume.generation,
        attempt: attempt(1),
    };
    rig.call(delete).unwrap();
    assert_eq!(rig.machine.gauges(rig.now).logged_blocks, 1);
    let refused = rig.log(&volume, 2, &[(3, 1)]).unwrap_err();
    assert_eq!(refused.reason, Reason::UnknownVolume);
    let read = rig.machine.logged(volume.id, volume.generation, Lblk(0), 9);
    assert_eq!(read.unwrap_err().reason, Reason::UnknownVolume);
    let again = rig.volume("v", 100, 1);
    assert_eq!(logged(&rig, &again), []);
    assert_eq!(logged(&rig, &other), [(3, 2)]);
    rig.assert_sound();
}

/// Wherever the process dies, each block shows the hole or what was flushed.
#[test]
fn a_crash_in_the_middle_of_a_trim_never_shows_what_the_map_had_before_the_flush() {
    const AT: [u64; 3] = [0, CHUNK_BLOCKS, 2 * CHUNK_BLOCKS];
    let mut seen = std::collections::BTreeSet::new();
    for records in 0..=5 {
        let small = Limits { change_chunks_max: 1, ..limits() };
        let mut rig = Rig::with_limits(1, 100, small);
        let volume = rig.volume("v", 3 * CHUNK_BLOCKS, 1);
        for lblk in AT {
            rig.write(&volume, lblk, 1);
        }
        rig.log(&volume, 1, &AT.map(|lblk| (lblk, 1))).unwrap();
        rig.auto_commit = false;
        let before = rig.journal.len();
        rig.call_later(change_after(&volume, MapChange::Trim, (0, 3 * CHUNK_BLOCKS), 1));
        rig.drain();
        rig.durable = (before + records).min(rig.journal.len());
        rig.auto_commit = true;
        let next = next_owner(&mut rig);
        let (log, map) = (logged(&rig, &next), rig.written(&next));
        for lblk in AT {
            let is_logged = log.contains(&(lblk, 1));
            assert!(is_logged || !map.contains(&lblk), "after {records} records: {lblk}");
            seen.insert((is_logged, map.contains(&lblk)));
        }
        rig.assert_sound();
    }
    assert_eq!(seen.len(), 3, "both, flushed only, hole");
}

#[test]
fn what_comes_for_the_log_behind_a_change_of_the_map_and_is_older_is_refused() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let late = |rig: &mut Rig, volume: &VolumeInfo, number| {
        let before = rig.machine.snapshot();
        let answer = rig.log(volume, number, &[(3, 1)]).map_err(|refusal| refusal.reason);
        assert!(answer.is_ok() || rig.machine.snapshot() == before);
        answer
    };
    let changes = [
        change_after(&volume, MapChange::Trim, (0, 10), 4),
        change_after(&volume, MapChange::Zero, (0, 10), 6),
        resize(&volume, 50 * BLOCK_BYTES, 8),
        // An older one that comes last takes nothing back.
        change_after(&volume, MapChange::Trim, (20, 1), 2),
    ];
    for (change, (over, next)) in changes.into_iter().zip([(4, 5), (6, 7), (8, 9), (8, 10)]) {
        rig.call(change).unwrap();
        for number in [1, over - 1, over] {
            assert_eq!(late(&mut rig, &volume, number), Err(Reason::WrongState), "{number}");
        }
        assert_eq!(late(&mut rig, &volume, next), Ok(()));
    }
    rig.call(change_after(&volume, MapChange::Trim, (20, 1), 30)).unwrap();
    let next = rig.open("v", "wb");
    assert_eq!(late(&mut rig, &next, 10), Err(Reason::WrongState), "the log has that");
    assert_eq!(late(&mut rig, &next, 11), Ok(()), "nothing of this owner is over");
    rig.call(change_after(&next, MapChange::Trim, (0, 10), 30)).unwrap();
    let next = next_owner(&mut rig);
    assert_eq!(late(&mut rig, &next, 1), Ok(()), "numbers begin anew");
    rig.assert_sound();
}

/// Two tasks gather data of one block, and the older message is sent last.
#[test]
fn what_comes_for_the_log_behind_a_later_message_is_refused() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    rig.log(&volume, 7, &[(3, 2)]).unwrap();
    let refused = |rig: &mut Rig, volume: &VolumeInfo, number| {
        let before = rig.machine.snapshot();
        assert_eq!(rig.log(volume, number, &[(3, 1)]).unwrap_err().reason, Reason::WrongState);
        assert_eq!(rig.machine.snapshot(), before);
    };
    [1, 6, 7].into_iter().for_each(|number| refused(&mut rig, &volume, number));
    rig.log(&volume, 8, &[(4, 3)]).unwrap();
    // Its block is converted, and still it counts.
    write_newer(&mut rig, &volume, 4, 1, 0);
    rig.change(&volume, MapChange::Trim, 4, 1).unwrap();
    refused(&mut rig, &volume, 8);
    // Also over a crash and under the next generation, as far as the log has something newer.
    let next = next_owner(&mut rig);
    refused(&mut rig, &next, 7);
    assert_eq!(logged(&rig, &next), [(3, 2)]);
    rig.log(&next, 8, &[(3, 4)]).unwrap();
    assert_eq!(logged(&rig, &next), [(3, 4)]);
    rig.assert_sound();
}

/// The task that gathered it was held up, and a write-out that was picked later overtook it.
#[test]
fn what_comes_for_the_log_behind_a_conversion_of_newer_data_is_refused() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.try_begin(newer_than(&volume, 3, 1, 5)).unwrap();
    rig.log(&volume, 4, &[(3, 1), (8, 1)]).unwrap();
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(logged(&rig, &volume), [(8, 1)]);
    let late = rig.log(&volume, 5, &[(3, 2)]).unwrap_err();
    assert_eq!((late.reason, logged(&rig, &volume)), (Reason::WrongState, vec![(8, 1)]));
    rig.log(&volume, 6, &[(3, 3)]).unwrap();
    assert_eq!(logged(&rig, &volume), [(3, 3), (8, 1)]);
    rig.assert_sound();
}

/// It counts from its arrival on, also while it waits for a write-out.
#[test]
fn a_change_that_waits_in_line_refuses_what_is_older_already() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    let reply = rig.call_later(change_after(&volume, MapChange::Trim, (0, 10), 2));
    rig.drain();
    assert!(!rig.replies.contains_key(&reply));
    assert_eq!(rig.log(&volume, 2, &[(9, 1)]).unwrap_err().reason, Reason::WrongState);
    rig.log(&volume, 3, &[(50, 1)]).unwrap();
    rig.finish(&begun);
    assert!(rig.replies[&reply].is_ok());
    assert_eq!(logged(&rig, &volume), [(50, 1)]);
    rig.assert_sound();
}

/// What came before the log was a part of the program, and what is written without it, is as before.
#[test]
fn without_anything_in_the_log_no_record_speaks_of_it() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    write_newer(&mut rig, &volume, 0, 4, 12);
    rig.change(&volume, MapChange::Trim, 0, 2).unwrap();
    rig.change(&volume, MapChange::Zero, 2, 2).unwrap();
    let speaks = |record: &Record| {
        matches!(
            record,
            Record::Log { .. } | Record::ConvertLogged { .. } | Record::ForgetLogged { .. }
        )
    };
    assert!(!rig.journal.iter().any(|(_, record)| speaks(record)));
    assert_eq!(rig.conversions(), 1);
}
