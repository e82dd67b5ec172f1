//! The bounds of the conversion machine: every queue, table and batch has one.

use serde::{Deserialize, Serialize};

/// Lengths are milliseconds, sizes are blocks or counts. Every value must be at least 1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Lease of a holder. Too small: a short pause aborts writes. Too large: a dead holder blocks
    /// its ranges for long.
    pub lease_ms: u32,
    /// Longest life of an io_end; then it is aborted. Too small: slow disks never finish.
    pub io_end_life_max_ms: u64,
    /// io_ends in flight per volume and lane; more are refused with a hint to wait.
    pub io_ends_per_volume_max: usize,
    /// Physical blocks reserved for io_ends in flight, over all volumes. A write that is larger by
    /// itself begins when nothing else is in flight.
    pub in_flight_blocks_max: u64,
    /// Volumes, including those being deleted.
    pub volumes_max: usize,
    /// Map changes (trim, allocate, zero, resize, delete) that wait or run, per volume.
    pub changes_per_volume_max: usize,
    /// io_ends in one conversion record.
    pub convert_batch_max: usize,
    /// Logical blocks in one conversion record.
    pub convert_blocks_max: u64,
    /// Conversion records made by one `drain`.
    pub drain_batches_max: usize,
    /// Chunks of the map that one step of a map change visits.
    pub change_chunks_max: u64,
    /// io_ends that one `Fence` command names.
    pub fence_io_ends_max: usize,
    /// Ranges of one `Punch` command.
    pub punch_ranges_max: usize,
    /// Blocks of one `Punch` command: they cannot be allocated while it runs.
    pub punch_blocks_max: u64,
    /// Least time between two punches of a store. Too small: overwrites keep the host file system
    /// busy. Too large: freed space comes back late.
    pub punch_interval_ms: u64,
    /// Entries in lists of stores that all writebacks together are sent in a second, besides the list that
    /// answers a Hello: while many stores come at once, each list names all of them to everybody. A list is
    /// never cut: the next one waits. Too small: news of a store come late, and writes to it wait. Too
    /// large: conversion does little else meanwhile.
    pub listed_stores_per_s: u64,
    /// Shorter runs are punched only while nobody writes to the store: each punch holds up its
    /// writes and flushes for up to milliseconds, and gives back little. Too large: what a busy
    /// volume trims comes back late.
    pub punch_run_blocks: u64,
    /// Without a write for so long, nobody writes to a store.
    pub punch_idle_ms: u64,
    /// Free blocks of a store that take space on its host; beyond it, short runs are punched while
    /// others write, too.
    pub unpunched_blocks_max: u64,
    /// From so many such blocks on, they are handed out first, where a run suffices. Too small:
    /// neighbours of a volume are scattered. Too large: they wait for their punch.
    pub reuse_blocks: u64,
    /// Blocks of a volume in the data log. Too small: flushes wait for conversions sooner. Too large:
    /// who opens the volume next takes longer.
    pub log_blocks_per_volume_max: u64,
    /// Blocks of all volumes in the data log: they are in memory and in every checkpoint.
    pub log_blocks_max: u64,
    /// io_ends that have ended and are remembered, so that a repeated release gets its answer.
    pub ended_max: usize,
    /// Free runs that one search looks at before it takes the best it has seen.
    pub search_runs_max: usize,
    /// Hint given with a refusal that passes by itself.
    pub retry_after_ms: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lease_ms: 5_000,
            io_end_life_max_ms: 120_000,
            io_ends_per_volume_max: 4_096,
            in_flight_blocks_max: 1 << 20,
            volumes_max: 65_536,
            changes_per_volume_max: 64,
            convert_batch_max: 256,
            convert_blocks_max: 16_384,
            drain_batches_max: 4,
            change_chunks_max: 64,
            fence_io_ends_max: 1_024,
            punch_ranges_max: 256,
            punch_blocks_max: 65_536,
            punch_interval_ms: 1_000,
            listed_stores_per_s: 1_000_000,
            punch_run_blocks: 64,
            punch_idle_ms: 2_000,
            unpunched_blocks_max: 65_536,
            reuse_blocks: 16_384,
            log_blocks_per_volume_max: 4_096,
            log_blocks_max: 32_768,
            ended_max: 65_536,
            search_runs_max: 64,
            retry_after_ms: 20,
        }
    }
}
