//! What writebacks hear of the stores.

use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;

use crate::rig::*;

/// The lists of stores that a session got from `from` on: which of them are live.
fn lists(rig: &Rig, session: WritebackSession, from: usize) -> Vec<Vec<(u32, bool)>> {
    let lists = rig.sent[from..].iter().filter_map(|kind| match kind {
        EffectKind::Writeback(to, ToWriteback::Stores(stores)) if *to == session => Some(stores),
        _ => None,
    });
    let plain = lists.map(|stores| stores.iter().map(|store| (store.id.0, store.live)).collect());
    plain.collect()
}

#[test]
fn writebacks_hear_of_all_stores_that_change_in_a_turn_at_once() {
    let other = WritebackSession(2);
    let mut rig = Rig::new(1, 100);
    rig.hello(other, "other");
    rig.drain();
    assert!(!rig.machine.has_work());
    let from = rig.sent.len();
    for store in 2..=4 {
        rig.join_store(store, 1, 100);
    }
    rig.input(Input::StoreLost { session: StoreSession(1) });
    assert!(rig.machine.has_work(), "it is due in this turn");
    rig.drain();
    for session in [WB, other] {
        let live = vec![(1, true), (2, true), (3, true), (4, true)];
        assert_eq!(lists(&rig, session, from), [live], "its lease runs, session or not");
    }
    // The leases of all of them end at once.
    let from = rig.sent.len();
    rig.advance(rig.limits.lease_ms.into());
    rig.drain();
    for session in [WB, other] {
        let ended = vec![(1, false), (2, false), (3, false), (4, false)];
        assert_eq!(lists(&rig, session, from), [ended]);
    }
    assert!(!rig.machine.has_work());
    // A lease that only goes on is no news, one that begins again is.
    let from = rig.sent.len();
    for _ in 0..3 {
        rig.store(2, FromStore::Renew);
        rig.drain();
    }
    let again = vec![(1, false), (2, true), (3, false), (4, false)];
    assert_eq!(lists(&rig, WB, from), [again]);
}

/// A list names all stores to all writebacks: while many come, they are few.
#[test]
fn the_next_list_waits_for_its_share_of_the_lists_and_then_names_all() {
    let limits = Limits { listed_stores_per_s: 500, ..limits() };
    let mut rig = Rig::with_limits(1, 100, limits);
    rig.drain();
    rig.advance(10);
    rig.drain();
    let from = rig.sent.len();
    rig.join_store(2, 1, 100);
    rig.drain();
    assert_eq!(lists(&rig, WB, from), [vec![(1, true), (2, true)]]);
    // Two entries: four milliseconds.
    let from = rig.sent.len();
    for store in 3..=4 {
        rig.advance(1);
        rig.join_store(store, 1, 100);
        rig.drain();
    }
    assert!(!rig.machine.has_work(), "it is not due yet");
    assert_eq!(lists(&rig, WB, from), Vec::<Vec<_>>::new());
    assert_eq!(rig.machine.next_deadline(), Some(rig.now.plus(2)));
    rig.advance(2);
    assert!(rig.machine.has_work());
    rig.drain();
    assert_eq!(lists(&rig, WB, from), [vec![(1, true), (2, true), (3, true), (4, true)]]);
    assert_ne!(rig.machine.next_deadline(), Some(rig.now.plus(8)), "there is no more to tell");
}

#[test]
fn what_is_told_of_a_store_waits_for_the_record_of_its_registration() {
    let mut rig = Rig::new(1, 100);
    rig.drain();
    rig.auto_commit = false;
    let from = rig.sent.len();
    rig.register(2, 1, 100);
    rig.drain();
    assert_eq!(lists(&rig, WB, from), Vec::<Vec<_>>::new());
    rig.commit();
    assert_eq!(lists(&rig, WB, from), [vec![(1, true), (2, true)]]);
}

/// A store that is told anything before it is told that it is registered ends its session.
#[test]
fn what_a_store_is_sent_does_not_overtake_its_registration() {
    let mut rig = Rig::new(1, 100);
    let volume = rig.volume("v", 100, 1);
    let begun = rig.begin(&volume, 0, 4);
    rig.drain();
    rig.auto_commit = false;
    rig.input(Input::StoreLost { session: StoreSession(1) });
    let from = rig.sent.len();
    // It comes back larger: that is a record.
    rig.register(1, 1, 200);
    rig.submit_with(&begun.submitter, vec![], true);
    rig.store(1, FromStore::Renew);
    rig.drain();
    let told = |rig: &Rig| -> Vec<&str> {
        let kinds = rig.sent[from..].iter().filter_map(|kind| match kind {
            EffectKind::Store(_, ToStore::Registered { .. }) => Some("registered"),
            EffectKind::Store(_, ToStore::Fence { .. }) => Some("fence"),
            EffectKind::Store(_, ToStore::Renewed { .. }) => Some("renewed"),
            _ => None,
        });
        kinds.collect()
    };
    assert_eq!(told(&rig), Vec::<&str>::new());
    rig.commit();
    let mut told = told(&rig);
    assert_eq!(told.remove(0), "registered");
    told.sort_unstable();
    assert_eq!(told, ["fence", "renewed"]);
}
