//! The simulation replays, and keeps every promise over a slice of seeds and all that failed once.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use endio_sim_tests::{Report, run, run_full};
use endio_testkit::seed;

fn assert_kept(seed: u64, full: bool) {
    let (run, option): (fn(u64, bool) -> Report, _) =
        if full { (run_full, " --full") } else { (run, "") };
    let report = run(seed, false);
    assert_eq!(
        report.broken, None,
        "seed {seed}; replay: cargo run -p endio-sim-tests --release --bin sim --{option} --seed {seed}"
    );
}

/// On all processors.
fn assert_all_kept(seeds: Range<u64>, full: bool) {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let take = || next.fetch_add(1, Ordering::Relaxed);
                for seed in std::iter::from_fn(|| Some(take())).take_while(|seed| *seed < seeds.end)
                {
                    assert_kept(seed, full);
                }
            });
        }
    });
}

#[test]
fn one_seed_gives_the_same_events_twice() {
    for seed in [1, 2, 3, 4, 5, 6] {
        let (one, two) = (run(seed, true), run(seed, true));
        assert_eq!(one.log, two.log, "seed {seed}");
        assert_eq!((one.hash, one.steps), (two.hash, two.steps));
        assert_ne!(one.hash, run(seed + 100, false).hash);
    }
}

#[test]
fn every_promise_is_kept_over_a_slice_of_seeds() {
    let from = seed::number("ENDIO_SEED", 27_000_000);
    let count = seed::number("ENDIO_SIM_SEEDS", 1_000);
    assert_all_kept(from..from + count, false);
}

/// An eighth as many again.
#[test]
fn every_promise_is_kept_over_full_stores() {
    let from = seed::number("ENDIO_SEED", 27_000_000);
    let count = seed::number("ENDIO_SIM_SEEDS", 1_000) / 8;
    assert_all_kept(from..from + count, true);
}

/// The numbers at the beginning of the lines.
fn seeds(kept: &str) -> Vec<u64> {
    let lines = kept.lines().filter(|line| !line.starts_with('#'));
    let seeds: Vec<u64> =
        lines.map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert!(!seeds.is_empty());
    seeds
}

#[test]
fn seeds_that_failed_once_do_not_fail_again() {
    for seed in seeds(include_str!("../seeds.txt")) {
        assert_kept(seed, false);
    }
}

#[test]
fn seeds_that_failed_once_over_full_stores_do_not_fail_again() {
    for seed in seeds(include_str!("../seeds_full.txt")) {
        assert_kept(seed, true);
    }
}
