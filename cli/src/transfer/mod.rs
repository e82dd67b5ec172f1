//! Moving bytes between files and volumes, whatever restarts meanwhile.
//!
//! A transfer proceeds in *rounds*. A round is sent, fsynced, and then remembered in a state file:
//!
//! ```text
//!   round ── all sent ──► fsync ── durable ──► state file (offset) ──► next round
//!     ▲                     │
//!     └── again ◄── error, lost writes, unknown outcome
//! ```
//!
//! # Invariants
//! * `checkpoint-durable`: all bytes of the source below the offset in the state file are durable
//!   at the target.
//! * `source-reproducible`: whatever lies above that offset can be read from the source again, so a
//!   failed fsync loses nothing.

pub(crate) mod export;
#[cfg(test)]
mod fake;
pub(crate) mod import;
pub(crate) mod patience;
pub(crate) mod pipeline;
pub(crate) mod reader;
pub(crate) mod sparse;
pub(crate) mod state;

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr when that is a terminal; else nothing.
fn progress_bar(length: u64, done: u64, label: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    bar.set_draw_target(if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    });
    let template = "{msg} {bytes}/{total_bytes} [{bar:30}] {binary_bytes_per_sec} eta {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(label);
    bar.set_position(done);
    bar
}
