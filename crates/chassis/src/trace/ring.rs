//! The last spans of unsampled traces, in case somebody wants to keep one.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::record::Record;

/// Parts with a lock each, so that threads seldom meet.
const SHARDS: usize = 16;

#[derive(Debug)]
pub(super) struct Ring {
    shards: Vec<Mutex<VecDeque<Record>>>,
    shard_max: usize,
    dropped: AtomicU64,
}

impl Ring {
    pub(super) fn new(spans_max: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, shard_max: spans_max.div_ceil(SHARDS), dropped: AtomicU64::new(0) }
    }

    fn shard(&self, trace: u128) -> MutexGuard<'_, VecDeque<Record>> {
        // A panic inside leaves a diagnostic store without a span, not worth a stop.
        let shard = &self.shards[trace as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a span; the oldest one makes room.
    pub(super) fn push(&self, record: Record) {
        if self.shard_max == 0 {
            return;
        }
        let mut shard = self.shard(record.context.trace);
        let oldest = if shard.len() >= self.shard_max { shard.pop_front() } else { None };
        shard.push_back(record);
        drop(shard);
        if oldest.is_some() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes out the spans of these traces.
    pub(super) fn take(&self, traces: &HashSet<u128>) -> Vec<Record> {
        let mut taken = Vec::new();
        let shards: HashSet<usize> = traces.iter().map(|trace| *trace as usize % SHARDS).collect();
        for shard in shards {
            let mut shard = self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner);
            let mut at = 0;
            while at < shard.len() {
                if traces.contains(&shard[at].context.trace) {
                    taken.extend(shard.remove(at));
                } else {
                    at += 1;
                }
            }
        }
        taken
    }

    /// Spans that made room.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}
