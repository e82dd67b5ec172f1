//! Free space, credit, fences.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use endio_state_machine::free_space::{
    self, Demand, Pool, Promised, Search, StoreSpace, is_feasible, share_of,
};
use endio_state_machine::machine::*;
use endio_types::*;
use proptest::prelude::*;

use crate::map::reserve;
use crate::rig::*;

/// Scenario 65: what is promised is there, whatever direct writes do.
#[test]
fn promised_space_is_kept_from_direct_writes_and_survives_a_restart() {
    let mut rig = Rig::new(1, 10);
    let volume = rig.volume("v", 100, 1);
    assert_eq!(reserve(&mut rig, &volume, 6), Ok(6));
    assert_eq!(reserve(&mut rig, &volume, 5), Err(Reason::NoSpace));
    assert_eq!(rig.try_begin(begin_io(&volume, 0, 5)).unwrap_err().reason, Reason::NoSpace);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    rig.crash();
    rig.hello(WB, "wb");
    rig.join_store(1, 1, 10);
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 6);
    let write_out =
        |lblk, blocks| BeginIo { lane: Lane::WriteOut, ..begin_io(&volume, lblk, blocks) };
    assert_eq!(rig.try_begin(write_out(10, 7)).unwrap_err().reason, Reason::NoSpace);
    let begun = rig.try_begin(write_out(10, 6)).unwrap();
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 0);
    assert_eq!(rig.finish(&begun).failed, None);
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 0);
    rig.assert_sound();
}

/// Five blocks of two copies want five blocks of each store. Whoever takes ten of the other ones must not
/// take them all from one store.
#[test]
fn what_is_promised_to_others_still_fits_after_an_allocation() {
    for (lane, avoid) in [(Lane::Direct, 0), (Lane::Direct, 1), (Lane::WriteOut, 0)] {
        let mut rig = Rig::new(2, 10);
        let one = rig.volume("one", 100, 1);
        let two = rig.volume("two", 100, 2);
        assert_eq!(reserve(&mut rig, &two, 5), Ok(5));
        if lane == Lane::WriteOut {
            assert_eq!(reserve(&mut rig, &one, 10), Ok(10));
        }
        let avoid_stores = (avoid > 0).then_some(StoreId(avoid)).into_iter().collect();
        let begin = BeginIo { lane, avoid_stores, ..begin_io(&one, 0, 10) };
        let begun = rig.try_begin(begin).unwrap();
        let begin = BeginIo { lane: Lane::WriteOut, ..begin_io(&two, 0, 5) };
        let promised = rig.try_begin(begin).unwrap();
        assert_eq!(rig.finish(&promised).failed, None);
        assert_eq!(rig.finish(&begun).failed, None);
        rig.assert_sound();
    }
}

/// While a store is away, not all that is promised has room. The room that it brings back counts.
#[test]
fn what_is_promised_to_others_fits_again_when_a_store_is_back() {
    let mut rig = Rig::new(3, 10);
    let one = rig.volume("one", 100, 1);
    let three = rig.volume("three", 100, 3);
    assert_eq!(reserve(&mut rig, &three, 5), Ok(5));
    assert_eq!(reserve(&mut rig, &one, 10), Ok(10));
    rig.input(Input::StoreLost { session: StoreSession(3) });
    let write_out =
        |volume, blocks| BeginIo { lane: Lane::WriteOut, ..begin_io(volume, 0, blocks) };
    let begun = rig.try_begin(write_out(&one, 10)).unwrap();
    rig.join_store(3, 1, 10);
    let promised = rig.try_begin(write_out(&three, 5)).unwrap();
    assert_eq!(rig.finish(&promised).failed, None);
    assert_eq!(rig.finish(&begun).failed, None);
    rig.assert_sound();
}

/// A volume whose second store is away waits. Others go on, and leave it its share of the store that is left.
#[test]
fn a_volume_with_more_copies_than_stores_are_live_holds_up_no_other() {
    for lane in [Lane::WriteOut, Lane::Direct] {
        let mut rig = Rig::new(2, 10);
        let one = rig.volume("one", 100, 1);
        let two = rig.volume("two", 100, 2);
        assert_eq!(reserve(&mut rig, &two, 4), Ok(4));
        rig.input(Input::StoreLost { session: StoreSession(2) });
        assert_eq!(reserve(&mut rig, &two, 1), Err(Reason::NotEnoughStores));
        match lane {
            Lane::WriteOut => {
                assert_eq!(reserve(&mut rig, &one, 7), Err(Reason::NotEnoughStores));
                assert_eq!(reserve(&mut rig, &one, 6), Ok(6));
            }
            Lane::Direct => {
                let refused = rig.try_begin(begin_io(&one, 0, 7)).unwrap_err();
                assert_eq!(refused.reason, Reason::NotEnoughStores);
            }
        }
        let begun = rig.try_begin(BeginIo { lane, ..begin_io(&one, 0, 6) }).unwrap();
        assert_eq!(rig.finish(&begun).failed, None);
        let write_out = || BeginIo { lane: Lane::WriteOut, ..begin_io(&two, 0, 4) };
        assert_eq!(rig.try_begin(write_out()).unwrap_err().reason, Reason::NotEnoughStores);
        rig.join_store(2, 1, 10);
        let promised = rig.try_begin(write_out()).unwrap();
        assert_eq!(rig.finish(&promised).failed, None);
        rig.assert_sound();
    }
}

/// Without any store nothing is promised.
#[test]
fn nothing_is_promised_while_no_store_is_live() {
    let mut rig = Rig::new(1, 10);
    let volume = rig.volume("v", 100, 1);
    rig.input(Input::StoreLost { session: StoreSession(1) });
    assert_eq!(reserve(&mut rig, &volume, 1), Err(Reason::NotEnoughStores));
}

/// Two copies on the two stores that are left would take what three copies want.
#[test]
fn a_write_out_waits_rather_than_take_what_others_were_promised() {
    let mut rig = Rig::new(3, 10);
    let two = rig.volume("two", 100, 2);
    let three = rig.volume("three", 100, 3);
    assert_eq!(reserve(&mut rig, &three, 5), Ok(5));
    assert_eq!(reserve(&mut rig, &two, 6), Ok(6));
    rig.input(Input::StoreLost { session: StoreSession(3) });
    let write_out =
        |volume, blocks| BeginIo { lane: Lane::WriteOut, ..begin_io(volume, 0, blocks) };
    let refused = rig.try_begin(write_out(&two, 6)).unwrap_err();
    assert_eq!((refused.reason, refused.retry_after_ms > 0), (Reason::NotEnoughStores, true));
    rig.join_store(3, 1, 10);
    for (volume, blocks) in [(&two, 6), (&three, 5)] {
        let begun = rig.try_begin(write_out(volume, blocks)).unwrap();
        assert_eq!(rig.finish(&begun).failed, None);
    }
    rig.assert_sound();
}

#[derive(Clone, Debug)]
struct Spaces(BTreeMap<StoreId, StoreSpace>);

impl Spaces {
    fn empty(free: &[u64]) -> Self {
        Self((1..).zip(free).map(|(id, free)| (StoreId(id), StoreSpace::empty(*free))).collect())
    }
}

impl Pool for Spaces {
    fn most_free(&self) -> impl Iterator<Item = (StoreId, &StoreSpace)> + Clone {
        let mut all: Vec<_> = self.0.iter().map(|(id, space)| (*id, space)).collect();
        all.sort_by_key(|(id, space)| (Reverse(space.free()), *id));
        all.into_iter()
    }
    fn change<R>(&mut self, id: StoreId, with: impl FnOnce(&mut StoreSpace) -> R) -> Option<R> {
        self.0.get_mut(&id).map(with)
    }
}

fn free_blocks(stores: &Spaces) -> Vec<u64> {
    stores.0.values().map(StoreSpace::free).collect()
}

proptest! {
    /// As Gale and Ryser have it: for each number of copies, the blocks with at least so many find room.
    #[test]
    fn a_demand_is_feasible_if_each_set_of_blocks_finds_room(
        free in prop::collection::vec(0u64..20, 0..6),
        demand in prop::array::uniform4(0u64..10),
    ) {
        let finds_room = |least: usize| {
            let blocks: u64 = demand[least..].iter().sum();
            let copies: u64 = (least..4).map(|copies| demand[copies] * copies as u64).sum();
            free.iter().map(|free| *free.min(&blocks)).sum::<u64>() >= copies
        };
        prop_assert_eq!(is_feasible(free.iter().copied(), &demand), (1..4).all(finds_room));
    }
}

proptest! {
    /// Where a request and what is promised fit together, the request is served and the rest still fits.
    #[test]
    fn an_allocation_leaves_room_for_what_is_promised(
        free in prop::collection::vec(0u64..20, 1..6),
        demand in prop::array::uniform4(0u64..10),
        (replicas, blocks) in (1usize..4, 1u64..12),
        taken in prop::collection::vec((0usize..6, 0u64..12), 0..6),
    ) {
        let mut stores = Spaces::empty(&free);
        // Holes, so that runs are short.
        for (at, block) in taken {
            if let Some(space) = stores.0.values_mut().nth(at) {
                let free = space.free();
                let _ = space.allocate(block % (free + 1), Search { runs: 4, reuse_blocks: 0 });
            }
        }
        let fits = |demand: &Demand| is_feasible(free_blocks(&stores).into_iter(), demand);
        let mut all = [0; 4];
        all[replicas] = blocks;
        prop_assume!(fits(&all));
        // As much of what is wanted as there is room for.
        for (copies, wanted) in (1..).zip(&demand[1..]) {
            let most = (0..=*wanted).rev().find(|more| {
                let mut more_of_them = all;
                more_of_them[copies] += more;
                fits(&more_of_them)
            });
            all[copies] += most.unwrap_or(0);
        }
        let mut demand = all;
        demand[replicas] -= blocks;
        let promised = Promised { demand, elsewhere: Vec::new(), with_quarantined: false };
        let (search, none) = (Search { runs: 4, reuse_blocks: 0 }, BTreeSet::new());
        let promised = Some(&promised);
        let runs = free_space::allocate(&mut stores, &none, replicas, blocks, promised, search);
        let runs = runs.expect("there is room");
        prop_assert_eq!(runs.iter().map(|copies| copies[0].1.len).sum::<u64>(), blocks);
        prop_assert!(is_feasible(free_blocks(&stores).into_iter(), &demand));
    }
}

proptest! {
    /// What waits for stores that are away has room when they are back, if all others leave its share.
    #[test]
    fn what_waits_for_stores_that_are_away_fits_when_they_are_back(
        live in prop::collection::vec(0u64..20, 1..4),
        away in prop::collection::vec(0u64..20, 0..3),
        wanted in prop::array::uniform4(0u64..10),
        order in prop::collection::vec((1usize..4, 1u64..12), 0..12),
    ) {
        let mut stores = Spaces::empty(&live);
        let with_away = |stores: &Spaces, demand: &Demand| {
            let all = free_blocks(stores).into_iter().chain(away.iter().copied());
            is_feasible(all, demand)
        };
        let here = |stores: &Spaces, demand: &Demand| {
            is_feasible(free_blocks(stores).into_iter(), &share_of(demand, live.len()))
        };
        // As much of what is wanted as there is room for.
        let mut demand = [0; 4];
        for (copies, wanted) in wanted.into_iter().enumerate().skip(1) {
            let most = (0..=wanted).rev().find(|more| {
                let mut more_of_them = demand;
                more_of_them[copies] += more;
                here(&stores, &more_of_them) && with_away(&stores, &more_of_them)
            });
            demand[copies] += most.unwrap_or(0);
        }
        for (copies, most) in order {
            if copies > live.len() || demand[copies] == 0 {
                continue;
            }
            let blocks = most.min(demand[copies]);
            demand[copies] -= blocks;
            let promised = Promised {
                demand: share_of(&demand, live.len()),
                elsewhere: Vec::new(),
                with_quarantined: false,
            };
            let (search, none) = (Search { runs: 4, reuse_blocks: 0 }, BTreeSet::new());
            let promised = Some(&promised);
            let runs = free_space::allocate(&mut stores, &none, copies, blocks, promised, search);
            prop_assert!(runs.is_some(), "there is room");
            prop_assert!(with_away(&stores, &demand), "{:?} of {demand:?}", free_blocks(&stores));
        }
    }
}

/// A limit delays a write; it never makes one impossible.
#[test]
fn a_write_larger_than_the_limit_in_flight_begins_when_it_is_alone() {
    let limits = endio_state_machine::limits::Limits { in_flight_blocks_max: 8, ..limits() };
    let mut rig = Rig::with_limits(1, 100, limits);
    let volume = rig.volume("v", 100, 1);
    let small = rig.begin(&volume, 0, 1);
    assert_eq!(rig.try_begin(begin_io(&volume, 10, 9)).unwrap_err().reason, Reason::Limit);
    assert_eq!(rig.finish(&small).failed, None);
    let large = rig.try_begin(begin_io(&volume, 10, 9)).unwrap();
    assert_eq!(rig.try_begin(begin_io(&volume, 30, 1)).unwrap_err().reason, Reason::Limit);
    assert_eq!(rig.finish(&large).failed, None);
    rig.assert_sound();
}

#[test]
fn an_abort_returns_the_credit() {
    let mut rig = Rig::new(1, 20);
    let volume = rig.volume("v", 100, 1);
    reserve(&mut rig, &volume, 6).unwrap();
    let begin = BeginIo { lane: Lane::WriteOut, ..begin_io(&volume, 0, 6) };
    let begun = rig.try_begin(begin).unwrap();
    rig.submit_with(&begun.submitter, vec![], true);
    assert_eq!(rig.machine.volume("v").unwrap().credit_blocks, 6);
    rig.assert_sound();
}

#[test]
fn replicas_lie_on_distinct_stores_and_too_few_stores_are_told_from_no_space() {
    let mut rig = Rig::new(2, 10);
    let two = rig.volume("two", 100, 2);
    let three = rig.volume("three", 100, 3);
    let begun = rig.begin(&two, 0, 10);
    assert_ne!(begun.segments[0].token.store, begun.segments[1].token.store);
    let refused = rig.try_begin(begin_io(&three, 0, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::NotEnoughStores);
    assert_eq!(rig.try_begin(begin_io(&two, 20, 1)).unwrap_err().reason, Reason::NoSpace);
}

/// A client that hears "full" gives up; one that hears "away" waits.
#[test]
fn stores_that_are_away_are_told_from_full_ones() {
    let mut rig = Rig::new(2, 10);
    let one = rig.volume("one", 100, 1);
    let two = rig.volume("two", 100, 2);
    rig.input(Input::StoreLost { session: StoreSession(1) });
    for blocks in [1, 10] {
        assert_eq!(reserve(&mut rig, &two, blocks), Err(Reason::NotEnoughStores));
    }
    assert_eq!(reserve(&mut rig, &one, 11), Err(Reason::NotEnoughStores));
    assert_eq!(rig.try_begin(begin_io(&one, 0, 11)).unwrap_err().reason, Reason::NotEnoughStores);
    assert_eq!(reserve(&mut rig, &one, 21), Err(Reason::NoSpace), "not even both hold that");
    assert_eq!(reserve(&mut rig, &one, 10), Ok(10));
    rig.assert_sound();
}

#[test]
fn unequal_stores_are_used_to_the_last_block() {
    let mut rig = Rig::new(0, 1);
    for (store, capacity) in [(1, 2), (2, 2), (3, 2)] {
        rig.join_store(store, 1, capacity);
    }
    let volume = rig.volume("v", 100, 2);
    assert_eq!(rig.write(&volume, 0, 3).failed, None);
    assert!(rig.machine.stores(rig.now).iter().all(|store| store.free_blocks == 0));
    rig.assert_sound();
}

#[test]
fn aborted_blocks_come_back_only_with_the_fence() {
    let mut rig = Rig::new(1, 4);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.submit_with(&begun.submitter, vec![], true);
    let refused = rig.try_begin(begin_io(&volume, 0, 4)).unwrap_err();
    assert_eq!((refused.reason, refused.retry_after_ms > 0), (Reason::NoSpace, true));
    rig.store(1, FromStore::FenceDone { fence: 9999 });
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 4);
    rig.acknowledge();
    assert_eq!(rig.machine.stores(rig.now)[0].free_blocks, 4);
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
}

#[test]
fn a_fence_is_sent_again_when_the_store_comes_back_in_the_same_incarnation() {
    let mut rig = Rig::new(1, 8);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.submit_with(&begun.submitter, vec![], true);
    rig.input(Input::StoreLost { session: StoreSession(1) });
    rig.sent.clear();
    rig.register(1, 1, 8);
    let is_fence = |kind: &EffectKind| matches!(kind, EffectKind::Store(_, ToStore::Fence { io_ends, .. }) if io_ends.len() == 1);
    assert_eq!(rig.count(is_fence), 1);
    rig.acknowledge();
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 0);
    rig.assert_sound();
}

#[test]
fn an_older_incarnation_is_refused() {
    let mut rig = Rig::new(0, 1);
    rig.join_store(1, 5, 10);
    rig.sent.clear();
    rig.input(Input::Store {
        session: StoreSession(9),
        message: FromStore::Register {
            uuid: [1; 16],
            incarnation: Incarnation(4),
            capacity_blocks: 10,
            url: "memory:store-1".into(),
            name: None,
        },
    });
    let refused = |kind: &EffectKind| {
        matches!(kind, EffectKind::Store(StoreSession(9), ToStore::SessionRefused(refusal))
            if refusal.reason == Reason::OldIncarnation)
    };
    assert_eq!(rig.count(refused), 1);
}

/// Scenario 55: the word of a store about another epoch frees nothing.
#[test]
fn a_store_that_is_ready_for_an_older_epoch_gets_no_tokens() {
    let mut rig = Rig::new(1, 8);
    let volume = rig.volume("v", 100, 1);
    let old = rig.machine.epoch();
    rig.crash();
    rig.hello(WB, "wb");
    rig.register(1, 1, 8);
    rig.store(1, FromStore::Ready { epoch: old });
    let refused = rig.try_begin(begin_io(&volume, 0, 1)).unwrap_err();
    assert_eq!(refused.reason, Reason::NotEnoughStores);
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 8);
}

/// A store that starts again has forgotten which generations are fenced.
#[test]
fn a_restarted_store_fences_old_generations_again_before_blocks_move_on() {
    let mut rig = Rig::new(1, 4);
    let volume = rig.volume("v", 4, 1);
    rig.write(&volume, 0, 4);
    let volume = rig.open("v", "wb");
    rig.acknowledge();
    rig.sent.clear();
    rig.join_store(1, 2, 4);
    rig.change(&volume, MapChange::Trim, 0, 4).unwrap();
    rig.confirm(&volume);
    assert_eq!(rig.machine.stores(rig.now)[0].quarantined_blocks, 4);
    rig.acknowledge();
    assert_eq!(rig.write(&volume, 0, 4).failed, None);
    rig.assert_sound();
}

/// A power cut would bring the old map back, and it must find the old bytes.
#[test]
fn blocks_freed_by_a_record_that_is_not_durable_stay_though_earlier_ones_are() {
    let mut rig = Rig::new(1, 8);
    let volume = rig.volume("v", 8, 1);
    rig.write(&volume, 0, 8);
    rig.auto_commit = false;
    for lblk in [0, 4] {
        rig.call_later(change_call(&volume, MapChange::Trim, lblk, 4));
        rig.drain();
    }
    rig.confirm(&volume);
    let first = rig.journal.len() as u64 - 1;
    rig.machine.committed(first).unwrap();
    let store = rig.machine.stores(rig.now).remove(0);
    assert_eq!((store.free_blocks, store.quarantined_blocks), (4, 4));
    rig.commit();
    assert_eq!(rig.machine.stores(rig.now)[0].free_blocks, 8);
}
