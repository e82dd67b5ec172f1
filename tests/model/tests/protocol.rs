//! Exhaustive: every order of events in small configurations.
#![allow(clippy::unwrap_used)]

use endio_model_tests::{Budget, Plant, Protocol};
use stateright::{Checker as _, HasDiscoveries, Model as _};

/// Explores all of one configuration and insists on its properties.
fn explore(name: &str, budget: Budget) {
    let checker = Protocol { budget, plant: None }.checker().threads(2).spawn_bfs().join();
    let (states, unique) = (checker.state_count(), checker.unique_state_count());
    eprintln!("{name}: {states} states, {unique} of them different, depth {}", checker.max_depth());
    assert!(checker.is_done());
    checker.assert_no_discovery("nothing is broken on the way");
    checker.assert_no_discovery("every io_end ends and every block comes back");
    checker.assert_any_discovery("a write converts");
}

fn finds(plant: Plant, budget: Budget) {
    let model = Protocol { budget, plant: Some(plant) };
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_bfs().join();
    let found = checker.assert_any_discovery("nothing is broken on the way");
    let steps = found.into_actions();
    eprintln!("{plant:?}: found after {} states: {steps:?}", checker.unique_state_count());
}

#[test]
fn no_order_of_events_breaks_two_writes_of_which_one_overwrites_the_other() {
    explore("two writes", Budget { duplicates: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_conversion_dies() {
    explore("conversion dies", Budget { conversion_crashes: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_a_store_dies() {
    explore("store dies", Budget { store_crashes: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_a_stores_lease_ends_without_its_knowledge() {
    explore("store expires", Budget { expiries: 1, renewals: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_a_volume_is_taken_over() {
    explore("takeover", Budget { takeovers: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_a_session_breaks_and_a_write_is_given_up() {
    explore("session breaks", Budget { disconnects: 1, aborts: 1, ..Budget::QUIET });
}

#[test]
fn no_order_of_events_breaks_anything_when_a_writeback_expires() {
    explore("writeback expires", Budget { writeback_expiries: 1, ..Budget::QUIET });
}

/// Larger ones: `ENDIO_MODEL_DEEP=1` explores pairs of disturbances with three writes, for minutes.
#[test]
fn no_order_of_events_breaks_anything_when_two_things_go_wrong() {
    let one = Budget { conversion_crashes: 1, expiries: 1, ..Budget::QUIET };
    explore("conversion dies, store expires", one);
    if std::env::var_os("ENDIO_MODEL_DEEP").is_none() {
        return;
    }
    let three = Budget { writes: 3, ..Budget::QUIET };
    explore("three writes, conversion dies", Budget { conversion_crashes: 1, ..three });
    explore("three writes, store expires", Budget { expiries: 1, ..three });
    explore("three writes, takeover", Budget { takeovers: 1, ..three });
    let two = Budget { store_crashes: 1, takeovers: 1, ..Budget::QUIET };
    explore("store dies, takeover", two);
    let two = Budget { conversion_crashes: 2, store_crashes: 1, ..Budget::QUIET };
    explore("conversion dies twice, store dies", two);
    let two = Budget { expiries: 1, disconnects: 1, duplicates: 1, ..Budget::QUIET };
    explore("store expires, session breaks, bios come twice", two);
}

#[test]
fn a_store_that_does_not_heed_its_fences_is_found() {
    finds(Plant::FencesUnheeded, Budget { writes: 3, aborts: 1, ..Budget::QUIET });
}

#[test]
fn a_store_that_releases_before_the_data_has_landed_is_found() {
    finds(Plant::ReleasedEarly, Budget::QUIET);
}

#[test]
fn a_store_that_does_not_drain_before_a_new_epoch_is_found() {
    finds(Plant::EpochUndrained, Budget { writes: 3, conversion_crashes: 1, ..Budget::QUIET });
}
