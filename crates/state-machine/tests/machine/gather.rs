//! Writes of many ranges: one io_end, and as few segments as the free space allows.

use endio_state_machine::chunk::ExtentState;
use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

fn gathered(volume: &VolumeInfo, ranges: &[(u64, u64)]) -> BeginIo {
    let mut ranges = ranges.iter().map(|(lblk, len)| LblkRange::new(*lblk, *len));
    let first = ranges.next().unwrap();
    BeginIo { more: ranges.collect(), ..begin_io(volume, first.start.0, first.len as u32) }
}

#[test]
fn many_ranges_get_one_segment_per_copy_and_each_block_its_place_and_checksum() {
    let mut rig = Rig::new(2, 64);
    let volume = rig.volume("v", 4096, 2);
    let begun = rig.try_begin(gathered(&volume, &[(3, 1), (5, 2), (2000, 1)])).unwrap();
    assert_eq!(begun.segments.len(), 2, "one per copy");
    for segment in &begun.segments {
        assert_eq!((segment.offset_blocks, segment.token.blocks), (0, 4));
        let crcs = SegmentOutcome::Durable(vec![11, 12, 13, 14]);
        assert_eq!(rig.release(&segment.token, crcs), None);
    }
    assert_eq!(rig.submit(&begun.submitter), None);
    rig.drain();
    let done = rig.completion(&begun).unwrap();
    let converted = [(3, 1), (5, 2), (2000, 1)].map(|(at, len)| LblkRange::new(at, len));
    assert_eq!((done.failed, done.converted), (None, converted.to_vec()));
    assert_eq!(rig.conversions(), 1, "one record for all of them");
    let whole = LblkRange::new(0, 4096);
    let extents = rig.machine.extents("v", whole).unwrap().unwrap();
    let mut found = Vec::new();
    for extent in &extents {
        assert_eq!(extent.state, ExtentState::Written);
        for place in extent.places.as_slice() {
            let segment = begun.segments.iter().find(|s| s.token.store == place.store).unwrap();
            let offset = place.pblk.0 - segment.token.pblk.0;
            found.push((extent.range.start.0, extent.range.len, offset, extent.crcs.clone()));
        }
    }
    let expected = [(3, 1, 0, vec![11]), (5, 2, 1, vec![12, 13]), (2000, 1, 3, vec![14])];
    let twice = expected.into_iter().flat_map(|extent| [extent.clone(), extent]);
    assert_eq!(found, twice.collect::<Vec<_>>());
    rig.assert_sound();
}

#[test]
fn ranges_that_find_no_room_side_by_side_are_cut_where_the_room_ends() {
    let mut rig = Rig::new(1, 8);
    let volume = rig.volume("v", 100, 1);
    assert_eq!(rig.write(&volume, 0, 8).failed, None);
    for lblk in [1, 3, 4] {
        rig.change(&volume, MapChange::Trim, lblk, 1).unwrap();
    }
    let volume = rig.machine.volume("v").unwrap();
    rig.confirm(&volume);
    rig.acknowledge();
    let begun = rig.try_begin(gathered(&volume, &[(20, 2), (30, 1)])).unwrap();
    let mut parts: Vec<(u32, Vec<u64>)> =
        begun.segments.iter().map(|s| (s.offset_blocks, begun.lblks(s))).collect();
    parts.sort();
    let lblks: Vec<u64> = parts.iter().flat_map(|(_, lblks)| lblks.clone()).collect();
    assert_eq!((parts.len(), lblks), (2, vec![20, 21, 30]));
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(rig.written(&volume), [0, 2, 5, 6, 7, 20, 21, 30]);
    rig.assert_sound();
}

#[test]
fn a_segment_that_fails_converts_no_range_and_every_block_comes_back() {
    let mut rig = Rig::new(1, 8);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.try_begin(gathered(&volume, &[(1, 2), (9, 3), (40, 3)])).unwrap();
    let token = begun.segments[0].token;
    assert_eq!(rig.release(&token, SegmentOutcome::Failed(Reason::IoError)), None);
    assert_eq!(rig.submit(&begun.submitter), None);
    let done = rig.completion(&begun).unwrap();
    assert_eq!((done.failed, done.converted), (Some(Reason::IoError), vec![]));
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 8);
    rig.acknowledge();
    assert_eq!(rig.machine.stores(rig.now)[0].free_blocks, 8);
    assert_eq!(rig.written(&volume), []);
    rig.assert_sound();
}

#[test]
fn a_trim_waits_for_a_write_that_touches_it_with_its_last_range_only() {
    let mut rig = Rig::new(1, 64);
    let volume = rig.volume("v", 5000, 1);
    let begun = rig.try_begin(gathered(&volume, &[(1, 1), (3000, 2)])).unwrap();
    let call = rig.call_later(change_call(&volume, MapChange::Trim, 3001, 1));
    rig.drain();
    assert!(!rig.replies.contains_key(&call), "the write is in flight");
    let refused = rig.try_begin(gathered(&volume, &[(7, 1), (3001, 1)])).unwrap_err();
    assert_eq!(refused.reason, Reason::Limit, "nor may another one begin there");
    assert_eq!(rig.finish(&begun).failed, None);
    rig.drain();
    assert!(rig.replies.contains_key(&call));
    assert_eq!(rig.written(&volume), [1, 3000]);
    rig.assert_sound();
}

/// Scenario 46 for writes of many ranges: overlaps convert in the order of release, across lanes.
#[test]
fn of_two_writes_that_share_one_block_the_later_released_one_wins_in_any_lane() {
    for lanes in [[Lane::Direct, Lane::WriteOut], [Lane::WriteOut, Lane::Direct]] {
        let mut rig = Rig::new(1, 64);
        let volume = rig.volume("v", 100, 1);
        crate::map::reserve(&mut rig, &volume, 8).unwrap();
        let [first, second] = [(0, [(1, 1), (50, 1)]), (1, [(8, 2), (50, 2)])]
            .map(|(n, ranges)| BeginIo { lane: lanes[n], ..gathered(&volume, &ranges) });
        // Begun in the other order than released.
        let second = rig.try_begin(second).unwrap();
        let first = rig.try_begin(first).unwrap();
        for begun in [&first, &second] {
            assert_eq!(rig.durable_release(&begun.segments[0].token), None);
            assert_eq!(rig.submit(&begun.submitter), None);
        }
        rig.drain();
        let extents = rig.machine.extents("v", LblkRange::new(50, 1)).unwrap().unwrap();
        let token = second.segments[0].token;
        assert_eq!(extents[0].places.as_slice()[0].pblk, Pblk(token.pblk.0 + 2));
        rig.assert_sound();
    }
}

#[test]
fn ranges_must_ascend_without_overlap_and_within_the_limits() {
    let mut rig = Rig::new(1, 4096);
    let volume = rig.volume("v", 100_000, 1);
    rig.create("place", 100_000 * BLOCK_BYTES, 1, true, false);
    let place = rig.open("place", "wb");
    let refused = |rig: &mut Rig, begin| rig.try_begin(begin).unwrap_err().reason;
    for ranges in [
        &[(5, 2), (6, 1)][..],
        &[(5, 1), (4, 1)],
        &[(5, 1), (5, 1)],
        &[(5, 1), (7, 0)],
        &[(5, 0), (7, 1)],
        &[(5, 1000), (2000, 25)],
        &[(5, 1), (u64::MAX, u64::MAX)],
    ] {
        assert_eq!(refused(&mut rig, gathered(&volume, ranges)), Reason::Malformed, "{ranges:?}");
    }
    let beyond = gathered(&volume, &[(5, 1), (99_999, 2)]);
    assert_eq!(refused(&mut rig, beyond), Reason::OutOfRange);
    let many: Vec<(u64, u64)> = (0..=IO_END_RANGES_MAX as u64).map(|n| (n * 2, 1)).collect();
    assert_eq!(refused(&mut rig, gathered(&volume, &many)), Reason::Malformed);
    assert_eq!(refused(&mut rig, gathered(&place, &[(5, 1), (9, 1)])), Reason::Malformed);
    let begun = rig.try_begin(gathered(&volume, &many[1..])).unwrap();
    assert_eq!(begun.segments.len(), 1);
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(rig.written(&volume).len(), IO_END_RANGES_MAX);
    rig.assert_sound();
}
