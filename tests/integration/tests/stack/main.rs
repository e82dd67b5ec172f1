//! The real stack in one process says what the contract says.
#![allow(clippy::unwrap_used)]

mod around;
mod cut_off;
mod data_log;
mod defragment;
mod faults;
mod full_log;
mod growing;
mod history;
mod hostile_answers;
mod hostile_block_store;
mod hostile_conversion;
mod hostile_writeback;
mod late;
mod lost;
mod protocol;
mod read_cache;
mod scenarios;
mod silent;
mod surface;
mod unheard;
mod whole;
