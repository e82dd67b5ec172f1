//! The corpus that the fuzzers keep, and random bytes, over every target.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use endio_fuzz_targets::TARGETS;
use endio_testkit::process::workspace;
use endio_testkit::seed::{self, Rng};

fn corpus(target: &str) -> PathBuf {
    workspace().join("fuzz/corpus").join(target)
}

#[test]
fn every_target_takes_what_its_fuzzer_has_kept() {
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpus(name)).unwrap_or_else(|error| panic!("{name}: {error}")) {
            let path = entry.unwrap().path();
            // The last line of a failing test says which input it was.
            println!("{name} {}", path.display());
            target(&fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs >= 3, "{name} has {inputs} inputs");
    }
}

#[test]
fn every_target_is_a_fuzzer() {
    let manifest = fs::read_to_string(workspace().join("fuzz/Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/");
    }
}

#[test]
fn random_bytes_and_damaged_inputs_panic_no_target() {
    let seed = seed::announce("endio-fuzz-targets", "random_bytes_and_damaged_inputs");
    let mut rng = Rng::new(seed);
    for (name, target) in TARGETS {
        let mut kept: Vec<PathBuf> =
            fs::read_dir(corpus(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        kept.sort();
        for _ in 0..seed::number("ENDIO_FUZZ_INPUTS", 40) {
            let length = usize::try_from(rng.below(300)).unwrap();
            target(&rng.bytes(length));
            let which = usize::try_from(rng.below(kept.len() as u64)).unwrap();
            let mut input = fs::read(&kept[which]).unwrap();
            if !input.is_empty() {
                let at = usize::try_from(rng.below(input.len() as u64)).unwrap();
                input[at] = rng.bytes(1)[0];
            }
            target(&input);
        }
    }
}
