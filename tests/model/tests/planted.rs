//! Bugs planted into the machine and the gate are found by exploring every order of events.
#![cfg(feature = "planted-bugs")]

use endio_model_tests::{Budget, Plant, Protocol};
use endio_types::planted::Bug;
use stateright::{Checker as _, HasDiscoveries, Model as _};

const WRITES: Budget = Budget { writes: 3, ..Budget::QUIET };

fn is_found(bug: Bug, budget: Budget) {
    finds(Plant::Pure(bug), budget);
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
fn a_store_that_admits_what_it_has_fenced_is_found() {
    is_found(Bug::NoFence, Budget { aborts: 1, ..WRITES });
}

#[test]
fn a_store_that_compares_no_incarnations_is_found() {
    is_found(Bug::IncarnationUnchecked, Budget { store_crashes: 1, ..WRITES });
}

#[test]
fn an_io_end_that_converts_with_its_first_release_is_found() {
    is_found(Bug::ConvertOnFirstRelease, Budget::QUIET);
}

#[test]
fn aborted_blocks_that_are_free_at_once_are_found() {
    is_found(Bug::AbortedIsFree, Budget { aborts: 1, ..WRITES });
}

/// A store of which not all free blocks are punched at once: what is punched is not handed out, and
/// the store punches nothing below a write. So that hides the bug where all of them are.
const CRASH: Budget = Budget { conversion_crashes: 1, punched: 1, ..WRITES };

#[test]
fn blocks_that_do_not_wait_for_stores_to_drain_after_a_restart_are_found() {
    is_found(Bug::EpochIgnored, CRASH);
}

#[test]
fn neither_side_waiting_for_what_is_older_than_the_epoch_is_found() {
    finds(Plant::Both(Bug::EpochIgnored, Bug::DrainUnawaited), CRASH);
}
