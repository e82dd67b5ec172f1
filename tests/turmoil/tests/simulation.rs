//! A slice of seeds, short here and as long as anybody likes:
//! `ENDIO_TURMOIL_SEEDS=0..1000 cargo test -p endio-turmoil-tests --release --test simulation`.
#![allow(clippy::unwrap_used)]

use endio_testkit::seed;
use endio_turmoil_tests::run;

/// Seeds of a plain run: few, quick, and of many kinds.
const SEEDS: [u64; 4] = [0, 1, 6, 21];

fn seeds() -> Vec<u64> {
    if let Ok(text) = std::env::var("ENDIO_TURMOIL_SEEDS") {
        let (from, to) = text.split_once("..").unwrap();
        return (from.parse().unwrap()..to.parse().unwrap()).collect();
    }
    match std::env::var("ENDIO_SEED") {
        Ok(_) => vec![seed::number("ENDIO_SEED", 0)],
        Err(_) => SEEDS.to_vec(),
    }
}

#[test]
fn every_promise_is_kept_over_a_simulated_network() {
    for seed in seeds() {
        let report = run(seed);
        eprintln!(
            "seed {seed}: {} ms, {} requests, {} faults",
            report.simulated_ms, report.requests, report.faults
        );
        assert_eq!(
            report.broken,
            None,
            "replay: ENDIO_SEED={seed} cargo test -p endio-turmoil-tests --test simulation\n{}",
            report.log.join("\n")
        );
        assert!(report.requests > 0 && report.faults > 0);
    }
}
