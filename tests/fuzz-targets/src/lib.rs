//! The bodies of the fuzz targets: decoders and formats under any bytes.
//!
//! A target returns when all is well and panics when it is not. Where a checksum guards a format, the
//! target seals the bytes that it was given, or else nothing behind the checksum would be reached.
//! `fuzz/` runs the targets under a fuzzer, `tests/corpus.rs` replays what the fuzzer kept.
#![allow(clippy::unwrap_used)]

mod data_log;
mod formats;
mod input;
mod metadata;
mod nbd;

/// A target.
pub type Target = fn(&[u8]);

/// All targets by name; the name is that of the folder in `fuzz/corpus` too.
pub const TARGETS: &[(&str, Target)] = &[
    ("nbd_handshake", nbd::handshake),
    ("nbd_codec", nbd::codec),
    ("nbd_session", nbd::session),
    ("chunk", formats::chunk),
    ("superblock", formats::superblock),
    ("cache_log", formats::cache_log),
    ("journal", metadata::journal),
    ("checkpoint", metadata::checkpoint),
    ("data_log", data_log::data_log),
    ("log_answers", data_log::log_answers),
];

/// Runs the target of that name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    target.expect("a target of TARGETS").1(bytes);
}
