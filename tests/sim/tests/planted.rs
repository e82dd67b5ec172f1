//! Bugs in the pure crates are caught by the simulation, or there is a hole in it.
//!
//! Five of them run in the short form. All: `ENDIO_PLANTED_ALL=1 cargo test -p endio-sim-tests
//! --features planted-bugs --test planted -- --nocapture`.
#![cfg(feature = "planted-bugs")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use endio_sim_tests::run;
use endio_testkit::seed;
use endio_types::planted::{Bug, plant};

/// Most seeds for one bug.
const SEEDS_MAX: u64 = 3_000;

const SHORT: &[Bug] = &[
    Bug::ConvertDespiteFailure,
    Bug::AbortedIsFree,
    Bug::FailedIsClean,
    Bug::ToldTwice,
    Bug::LockGrantsAll,
];

/// How many seeds from `from` on it takes until something is found, and what. A panic counts.
fn caught(bug: Bug, from: u64) -> Option<(u64, String)> {
    let found = (0..SEEDS_MAX).find_map(|count| {
        plant(Some(bug));
        let report = catch_unwind(AssertUnwindSafe(|| run(from + count, false)));
        plant(None);
        let broken = report.map_or_else(|_| Some("panic".to_owned()), |report| report.broken)?;
        let what = broken.split(':').next().unwrap_or_default().to_owned();
        Some((count + 1, what))
    });
    found
}

#[test]
fn planted_bugs_of_the_pure_crates_are_caught() {
    let all = seed::number("ENDIO_PLANTED_ALL", 0) > 0;
    let bugs = if all { Bug::ALL } else { SHORT };
    let runs = if all { 3 } else { 1 };
    let mut missed = Vec::new();
    for bug in bugs {
        for round in 0..runs {
            match caught(*bug, 100_000 * round) {
                Some((seeds, what)) => println!("{bug:?}: {seeds} seeds, {what}"),
                None => {
                    println!("{bug:?}: not in {SEEDS_MAX} seeds");
                    missed.push(*bug);
                    break;
                }
            }
        }
    }
    assert!(all || missed.is_empty(), "{missed:?} are not caught");
}
