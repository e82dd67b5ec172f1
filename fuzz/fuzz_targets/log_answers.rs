#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| endio_fuzz_targets::run("log_answers", bytes));
