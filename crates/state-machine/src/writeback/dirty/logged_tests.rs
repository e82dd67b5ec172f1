#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use endio_types::{BLOCK_BYTES, Lblk, LblkRange};

use super::super::{PickLimit, Picked, WriteOutId};
use super::*;

fn range(start: u64, len: u64) -> LblkRange {
    LblkRange::new(start, len)
}

fn put(map: &mut DirtyMap<u64>, start: u64, len: u64, lsn: u64) {
    let end = (start + len) * BLOCK_BYTES;
    map.insert(range(start, len), Lsn(lsn), end, vec![lsn; len as usize]).unwrap();
}

/// A map with one write of each (start, length), numbered from 1.
fn map(writes: &[(u64, u64)]) -> DirtyMap<u64> {
    let mut map = DirtyMap::new();
    for (lsn, (start, len)) in (1..).zip(writes) {
        put(&mut map, *start, *len, lsn);
    }
    map
}

fn gather(map: &mut DirtyMap<u64>, up_to: u64) -> Option<LogPick<u64>> {
    map.gather_for_log(Lsn(up_to), 1000).unwrap()
}

/// The number of a message, and its blocks with the record in each.
fn message(map: &mut DirtyMap<u64>, up_to: u64) -> (u64, Vec<(u64, u64)>) {
    let pick = gather(map, up_to).unwrap();
    (pick.number, pick.blocks.iter().map(|block| (block.lblk.0, block.data)).collect())
}

/// Gathers and answers.
fn logs(map: &mut DirtyMap<u64>, up_to: u64) {
    let number = gather(map, up_to).unwrap().number;
    map.log_ended(number, true);
}

fn pick(map: &mut DirtyMap<u64>, lblk: u64) -> Picked<u64> {
    map.pick(PickLimit { within: Some(range(lblk, 1)), ..PickLimit::blocks(256) }).unwrap()
}

/// What an fsync of everything waits for, oldest record first: how many versions up to each record.
fn pending(map: &DirtyMap<u64>, newest: u64) -> Vec<u64> {
    (1..=newest).map(|lsn| map.pending_blocks_up_to(Lsn(lsn))).collect()
}

fn is_logged(map: &DirtyMap<u64>, lblk: u64) -> bool {
    map.waiting().find(|waiting| waiting.lblk == Lblk(lblk)).unwrap().is_logged
}

#[test]
fn an_fsync_does_not_wait_for_what_the_log_has_and_the_cache_log_keeps_it_until_it_is_converted() {
    let mut map = map(&[(0, 2), (9, 1)]);
    let (number, blocks) = message(&mut map, 1);
    assert_eq!(blocks, [(0, 1), (1, 1)]);
    assert_eq!(pending(&map, 2), [2, 3], "it is only on its way");
    map.log_ended(number, true);
    assert_eq!(pending(&map, 2), [0, 1]);
    assert!(!map.pending_up_to(Lsn(1)) && map.pending_up_to(Lsn(2)));
    assert_eq!((map.oldest_lsn(), map.logged_blocks()), (Some(Lsn(1)), 2));
    let picked = pick(&mut map, 0);
    assert_eq!((pending(&map, 2), map.oldest_lsn()), (vec![0, 1], Some(Lsn(1))));
    map.fail(picked.io).unwrap();
    assert_eq!((pending(&map, 2), map.oldest_lsn()), (vec![0, 1], Some(Lsn(1))));
    let picked = pick(&mut map, 0);
    map.complete(picked.io).unwrap();
    assert_eq!((map.oldest_lsn(), map.logged_blocks()), (Some(Lsn(2)), 0));
}

#[test]
fn what_is_rewritten_after_it_was_logged_is_waited_for_from_the_new_record_on() {
    let mut map = map(&[(0, 1)]);
    logs(&mut map, 1);
    put(&mut map, 0, 1, 2);
    put(&mut map, 0, 1, 3);
    assert_eq!(pending(&map, 3), [0, 1, 1]);
    assert_eq!(map.oldest_lsn(), Some(Lsn(1)), "a crash of both would need it");
    assert_eq!(gather(&mut map, 1), None);
    assert_eq!(message(&mut map, 2), (2, vec![(0, 3)]));
    map.log_ended(2, true);
    assert_eq!((pending(&map, 3), map.oldest_lsn()), (vec![0, 0, 0], Some(Lsn(1))));
}

#[test]
fn what_is_rewritten_while_its_message_is_under_way_is_waited_for_as_far_as_that_does_not_have_it()
{
    for (is_logged, left) in [(true, [0, 1, 1]), (false, [1, 1, 1])] {
        let mut map = map(&[(0, 1)]);
        let (number, _) = message(&mut map, 1);
        assert_eq!(gather(&mut map, 1), None, "it is on its way");
        put(&mut map, 0, 1, 2);
        put(&mut map, 0, 1, 3);
        assert_eq!(pending(&map, 3), [1, 1, 1]);
        map.log_ended(number, is_logged);
        assert_eq!(pending(&map, 3), left);
        assert_eq!(map.oldest_lsn(), Some(Lsn(1)));
        assert_eq!(message(&mut map, 3).1, [(0, 3)]);
    }
}

/// Invariant `whole-requests`.
#[test]
fn a_message_has_whole_requests_with_what_another_one_carries_and_without_what_the_log_has() {
    let mut map = map(&[(0, 3), (2, 2), (8, 1)]);
    assert_eq!(message(&mut map, 1), (1, vec![(0, 1), (1, 1), (2, 2), (3, 2)]));
    put(&mut map, 3, 2, 4);
    // The first message may not arrive: the second one has all that it has.
    let whole = vec![(0, 1), (1, 1), (2, 2), (3, 4), (4, 4)];
    assert_eq!(message(&mut map, 4), (2, [whole, vec![(8, 3)]].concat()));
    map.log_ended(1, true);
    assert_eq!(pending(&map, 4), [3, 4, 5, 6], "the second one carries them");
    map.log_ended(2, true);
    assert_eq!(pending(&map, 4), [0, 0, 0, 0]);
    put(&mut map, 4, 2, 5);
    assert_eq!(message(&mut map, 5), (3, vec![(4, 5), (5, 5)]));
}

#[test]
fn what_a_write_out_carries_is_not_logged_and_what_is_written_over_it_waits_for_its_end() {
    let mut map = map(&[(0, 2), (9, 1)]);
    let picked = pick(&mut map, 0);
    assert_eq!(gather(&mut map, 1), None);
    put(&mut map, 1, 1, 3);
    // Block 1 may hold bytes of the first write, whose other block nobody would see.
    assert_eq!(map.gather_for_log(Lsn(3), 1000), Err(TooMuch));
    map.complete(picked.io).unwrap();
    assert_eq!(message(&mut map, 3).1, [(1, 3), (9, 2)]);
    map.log_ended(1, true);
    assert_eq!((pending(&map, 3), map.oldest_lsn()), (vec![0, 0, 0], Some(Lsn(2))));
}

#[test]
fn too_much_for_a_message_changes_nothing() {
    let mut map = map(&[(0, 4), (9, 1)]);
    logs(&mut map, 1);
    put(&mut map, 0, 1, 3);
    put(&mut map, 20, 3, 4);
    for blocks_max in 0..5 {
        assert_eq!(map.gather_for_log(Lsn(4), blocks_max), Err(TooMuch));
        assert_eq!((map.log_number(), map.logged_blocks()), (1, 4));
        assert_eq!(pending(&map, 4), [0, 1, 2, 5]);
    }
    assert_eq!(map.gather_for_log(Lsn(4), 5).unwrap().map(|pick| pick.number), Some(2));
    assert_eq!(map.gather_for_log(Lsn(4), 0), Ok(None), "nothing is not too much");
}

#[test]
fn an_answer_finds_its_version_in_a_write_out_and_after_one_that_failed() {
    for fails_first in [false, true] {
        let mut map = map(&[(0, 1)]);
        let (number, _) = message(&mut map, 1);
        let picked = pick(&mut map, 0);
        assert_eq!(pending(&map, 1), [1]);
        if fails_first {
            map.fail(picked.io).unwrap();
            assert_eq!(pending(&map, 1), [1]);
        }
        map.log_ended(number, true);
        assert_eq!((pending(&map, 1), map.oldest_lsn()), (vec![0], Some(Lsn(1))));
        if !fails_first {
            map.fail(picked.io).unwrap();
        }
        assert_eq!((pending(&map, 1), map.oldest_lsn()), (vec![0], Some(Lsn(1))));
        assert!(is_logged(&map, 0));
        assert_eq!(gather(&mut map, 1), None);
        assert_eq!(pick(&mut map, 0).data, [1]);
    }
}

#[test]
fn an_answer_finds_its_version_under_a_newer_one_that_stands_for_it() {
    for fails_first in [false, true] {
        let mut map = map(&[(0, 1)]);
        let (number, _) = message(&mut map, 1);
        let picked = pick(&mut map, 0);
        put(&mut map, 0, 1, 2);
        if fails_first {
            map.fail(picked.io).unwrap();
        }
        map.log_ended(number, true);
        if !fails_first {
            map.fail(picked.io).unwrap();
        }
        assert_eq!(pending(&map, 2), [0, 1], "the newer one is not in the log");
        assert_eq!(map.oldest_lsn(), Some(Lsn(1)));
        assert!(is_logged(&map, 0));
        assert_eq!(message(&mut map, 2).1, [(0, 2)]);
    }
}

/// What the log has of the newer version is newer than all of the one that failed.
#[test]
fn a_logged_version_stands_for_the_older_one_whose_write_out_failed() {
    for is_answered_first in [false, true] {
        let mut map = map(&[(0, 2)]);
        logs(&mut map, 1);
        let picked = pick(&mut map, 0);
        put(&mut map, 1, 1, 2);
        let (second, blocks) = message(&mut map, 2);
        assert_eq!(blocks, [(1, 2)]);
        if is_answered_first {
            map.log_ended(second, true);
        }
        map.fail(picked.io).unwrap();
        if !is_answered_first {
            map.log_ended(second, true);
        }
        assert_eq!(pending(&map, 2), [0, 0], "both are there in their newest version");
        assert_eq!(map.oldest_lsn(), Some(Lsn(1)));
        assert_eq!(gather(&mut map, 2), None);
    }
}

#[test]
fn an_answer_for_what_was_discarded_or_converted_changes_nothing_and_none_counts_twice() {
    let mut discarded = map(&[(0, 1)]);
    let (number, _) = message(&mut discarded, 1);
    discarded.discard(range(0, 1));
    assert_eq!((discarded.oldest_lsn(), discarded.logged_blocks()), (None, 1));
    put(&mut discarded, 0, 1, 2);
    discarded.log_ended(number, true);
    assert_eq!((pending(&discarded, 2), discarded.logged_blocks()), (vec![0, 1], 0));
    assert!(!is_logged(&discarded, 0));

    let mut converted = map(&[(0, 1)]);
    let (number, _) = message(&mut converted, 1);
    let picked = pick(&mut converted, 0);
    converted.complete(picked.io).unwrap();
    converted.log_ended(number, true);
    assert!(converted.is_clean() && converted.oldest_lsn().is_none());
    assert_eq!(converted.logged_blocks(), 0);

    let mut twice = map(&[(0, 1)]);
    let (number, _) = message(&mut twice, 1);
    twice.log_ended(number, false);
    twice.log_ended(number, true);
    twice.log_ended(77, true);
    assert_eq!(pending(&twice, 1), [1], "nothing is known of it");
}

#[test]
fn what_was_discarded_from_a_write_out_does_not_come_back_by_its_answer() {
    let mut map = map(&[(0, 1)]);
    let (number, _) = message(&mut map, 1);
    let picked = pick(&mut map, 0);
    map.discard(range(0, 1));
    map.log_ended(number, true);
    assert_eq!(map.read(Lblk(0)), None);
    map.fail(picked.io).unwrap();
    assert!(map.is_clean() && map.oldest_lsn().is_none());
    assert_eq!(map.logged_blocks(), 0);
}

#[test]
fn an_old_answer_does_not_mark_what_a_newer_message_carries() {
    let mut map = map(&[(0, 1)]);
    let (old, _) = message(&mut map, 1);
    put(&mut map, 0, 1, 2);
    let (new, blocks) = message(&mut map, 2);
    assert_eq!((blocks, old < new), (vec![(0, 2)], true));
    map.log_ended(old, true);
    assert_eq!(pending(&map, 2), [1, 1]);
    map.log_ended(new, true);
    assert_eq!(pending(&map, 2), [0, 0]);
}

#[test]
fn a_write_out_ends_the_messages_before_it_and_none_behind_it() {
    let mut map = map(&[(0, 1), (5, 1)]);
    assert_eq!(pick(&mut map, 5).logged_up_to, 0);
    map.log_numbers_from(40);
    map.log_numbers_from(7);
    assert_eq!(map.log_number(), 40, "numbers grow");
    let (number, _) = message(&mut map, 1);
    let picked = pick(&mut map, 0);
    assert_eq!((number, picked.logged_up_to), (41, 41));
    map.log_ended(number, true);
    put(&mut map, 0, 1, 3);
    assert_eq!(message(&mut map, 3), (42, vec![(0, 3)]));
    assert_eq!(map.complete(picked.io).unwrap().redirtied_blocks, 1);
    map.log_ended(42, true);
    assert!(is_logged(&map, 0), "the write-out was older");
}

#[test]
fn what_the_log_of_an_owner_before_has_is_dirty_and_durable_unless_newer_data_is_here() {
    let mut map = map(&[(3, 1)]);
    let block = |lblk: u64| LogBlock {
        lblk: Lblk(lblk),
        end_bytes: lblk * BLOCK_BYTES + 100,
        lsn: Lsn(1),
        data: 70 + lblk,
    };
    assert!(map.insert_logged(block(2)));
    assert!(!map.insert_logged(block(3)), "the newer one stays");
    assert!(!map.insert_logged(block(2)), "it is there");
    assert_eq!((map.read(Lblk(2)), map.read(Lblk(3))), (Some(&72), Some(&1)));
    assert_eq!((map.waiting_blocks(), map.logged_blocks()), (2, 1));
    assert_eq!((pending(&map, 1), map.oldest_lsn()), (vec![1], Some(Lsn(1))));
    assert!(is_logged(&map, 2) && !is_logged(&map, 3));
    assert_eq!(message(&mut map, 1).1, [(3, 1)]);
    let picked = pick(&mut map, 2);
    assert_eq!((picked.data, picked.end_bytes), (vec![72], 2 * BLOCK_BYTES + 100));
    map.complete(picked.io).unwrap();
    assert_eq!(map.read(Lblk(2)), None);
    assert_eq!(map.logged_blocks(), 1, "what is on its way");
}

#[test]
fn what_is_stored_leaves_the_log_s_books_as_well() {
    let mut map = map(&[(0, 1), (5, 1)]);
    logs(&mut map, 1);
    assert!(is_logged(&map, 0) && !is_logged(&map, 5));
    put(&mut map, 0, 1, 3);
    assert!(is_logged(&map, 0), "it had an older version");
    let stored: BTreeMap<u64, Lsn> = [(0, Lsn(3)), (5, Lsn(2))].into();
    assert_eq!(map.take_stored(&stored).clean.len(), 2);
    assert!(map.is_clean() && map.oldest_lsn().is_none());
    assert_eq!((pending(&map, 3), map.logged_blocks()), (vec![0, 0, 0], 0));
}

/// Data that the map shows was written over it, but what was sent between the two may be in the log,
/// and would come back.
#[test]
fn what_may_be_in_the_log_is_told_although_no_answer_said_so() {
    let mut unknown = map(&[(0, 1)]);
    let (number, _) = message(&mut unknown, 1);
    assert!(is_logged(&unknown, 0), "it is on its way");
    unknown.log_ended(number, false);
    put(&mut unknown, 0, 1, 2);
    assert!(is_logged(&unknown, 0), "nobody knows whether it arrived");

    let mut overtaken = map(&[(0, 1)]);
    let (old, _) = message(&mut overtaken, 1);
    put(&mut overtaken, 0, 1, 2);
    let (new, _) = message(&mut overtaken, 2);
    overtaken.log_ended(old, true);
    overtaken.log_ended(new, false);
    assert!(is_logged(&overtaken, 0), "the log has the first one");

    let mut put_back = map(&[(0, 1)]);
    let (number, _) = message(&mut put_back, 1);
    let picked = pick(&mut put_back, 0);
    assert_eq!(picked.io, WriteOutId(1));
    put(&mut put_back, 0, 1, 2);
    put_back.log_ended(number, false);
    put_back.fail(picked.io).unwrap();
    assert!(is_logged(&put_back, 0), "under the newer one");
}
