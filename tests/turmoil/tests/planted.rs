//! Planted bugs of the pure crates, in the services that run them, are caught.
//!
//! `cargo test -p endio-turmoil-tests --features planted-bugs --test planted -- --nocapture`
#![cfg(feature = "planted-bugs")]

use endio_turmoil_tests::run;
use endio_types::planted::{Bug, plant};

/// Most seeds for one bug.
const SEEDS_MAX: u64 = 20;

/// The first seed that something is broken with, and what.
fn caught(bug: Bug) -> Option<(u64, String)> {
    (0..SEEDS_MAX).find_map(|seed| {
        plant(Some(bug));
        let report = run(seed);
        plant(None);
        report.broken.map(|broken| (seed, broken))
    })
}

#[test]
fn planted_bugs_of_the_pure_crates_are_caught_in_the_services() {
    for bug in [Bug::ConvertDespiteFailure, Bug::LockGrantsAll] {
        let found = caught(bug);
        println!("{bug:?}: {found:?}");
        assert!(found.is_some(), "{bug:?} is not found in {SEEDS_MAX} seeds");
    }
}
