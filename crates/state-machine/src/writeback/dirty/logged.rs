//! Dirty blocks in conversion's data log: durable before they are converted.
//!
//! ```text
//!   unlogged ── gather_for_log ──► being logged ── log_ended(true) ──► logged
//!      ▲                              │                                  │
//!      └───── log_ended(false) ───────┴──────── rewritten ───────────────┘
//! ```
//!
//! Numbers grow with each message to the log. A write-out remembers the newest number when its blocks
//! are picked: what was logged of them up to there is older than what it carries, or the same, and ends
//! with its conversion. What is logged of them afterwards is newer, and stays.

use std::collections::BTreeSet;

use endio_types::Lblk;

use super::{DirtyMap, Version};
use crate::writeback::Lsn;

/// What the data log has of a version.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    /// Oldest record in the version that the log has not; `None`: it has all.
    unlogged: Option<Lsn>,
    /// Oldest record of which the log has something; `None`: it has nothing.
    logged: Option<Lsn>,
    /// On its way into the log.
    asked: Option<Asked>,
    /// It was sent, in this or an older version: whatever was answered, the log may have that.
    was_sent: bool,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    number: u64,
    /// Oldest record that was written into the version since.
    newer: Option<Lsn>,
}

impl State {
    /// Nothing is logged.
    pub(super) fn new(lsn: Lsn) -> Self {
        Self { unlogged: Some(lsn), logged: None, asked: None, was_sent: false }
    }

    /// The version takes the place of one that the stores hold.
    pub(super) fn follows(&mut self, kept: &Self) {
        self.was_sent |= kept.was_sent;
    }

    /// The stores hold the version: nothing of it is to be logged, and the cache log keeps it from
    /// record `since` on.
    pub(super) fn stored(&mut self, since: Lsn) {
        self.unlogged = None;
        self.logged = Some(since);
    }

    /// A message that carries it is on its way.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// The version has newer data. Returns whether the log had all of it until now.
    pub(super) fn rewritten(&mut self, lsn: Lsn) -> bool {
        if let Some(asked) = &mut self.asked {
            asked.newer.get_or_insert(lsn);
        }
        let was_logged = self.unlogged.is_none();
        self.unlogged.get_or_insert(lsn);
        was_logged
    }

    /// The newer version, whose own oldest record is `from`, stays and stands for an older one, too:
    /// both together for records since `since`.
    pub(super) fn stands_for(&mut self, older: &Self, (since, from): (Lsn, Lsn)) {
        // What the log has of the newer version is newer than all of the older one.
        if self.logged.is_none() {
            self.unlogged = self.unlogged.into_iter().chain(older.unlogged).min();
            let newer = |asked: Asked| Some(asked.newer.map_or(from, |newer| newer.min(from)));
            let asked = older.asked.map(|asked| Asked { newer: newer(asked), ..asked });
            self.asked = self.asked.or(asked);
        }
        if self.logged.is_some() || older.logged.is_some() {
            self.logged = Some(since);
        }
        self.was_sent |= older.was_sent;
    }

    /// The version stands for something of record `lsn` as well, which is older than all that it knew.
    pub(super) fn has_since(&mut self, lsn: Lsn) {
        match (&mut self.logged, &mut self.unlogged) {
            (Some(oldest), _) | (None, Some(oldest)) => *oldest = lsn,
            (None, None) => {}
        }
    }

    /// Whether the log may have something of the block.
    pub(super) fn may_be_logged(&self) -> bool {
        self.was_sent
    }

    /// Something in it is neither in the log nor on its way there.
    fn is_wanted(&self) -> bool {
        self.unlogged.is_some() && self.asked.is_none_or(|asked| asked.newer.is_some())
    }
}

/// A block for the data log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogBlock<D> {
    /// The block.
    pub lblk: Lblk,
    /// Where the volume's data ends, in bytes, as far as this block shows.
    pub end_bytes: u64,
    /// Newest record in it.
    pub lsn: Lsn,
    /// Its data.
    pub data: D,
}

/// More is to be logged than is allowed, or it cannot be logged now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooMuch;

/// What goes into the data log in one message: whole requests. It ends with exactly one
/// [`DirtyMap::log_ended`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogPick<D> {
    /// Names it; grows.
    pub number: u64,
    /// Ascending.
    pub blocks: Vec<LogBlock<D>>,
}

impl<D: Clone> DirtyMap<D> {
    /// Takes what waits since a record up to `up_to` and is neither in the log nor on its way there,
    /// with what was written together with it. `None`: there is nothing.
    ///
    /// # Errors
    /// These are more than `blocks_max` blocks, or an older version of one is under writeback and not
    /// in the log; nothing has changed then.
    pub fn gather_for_log(
        &mut self,
        up_to: Lsn,
        blocks_max: u64,
    ) -> Result<Option<LogPick<D>>, TooMuch> {
        let mut wanted: BTreeSet<u64> = BTreeSet::new();
        for (_, seed, in_flight) in self.since.iter().take_while(|(since, _, _)| *since <= up_to) {
            if *in_flight || wanted.contains(seed) || !self.wants_log(*seed) {
                continue;
            }
            // With what is on its way already: if only one of two messages arrived, a part of a
            // write would be seen.
            let group = self.group(*seed);
            wanted.extend((group.start.0..group.end()).filter(|lblk| self.is_unlogged(*lblk)));
            if wanted.len() as u64 > blocks_max {
                return Err(TooMuch);
            }
        }
        // A block may hold the end of a write that is under writeback, with other blocks: if only this
        // one arrived, a part of that write would be seen.
        if wanted.iter().any(|lblk| self.is_flight_unlogged(*lblk)) {
            return Err(TooMuch);
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        self.log_number += 1;
        let number = self.log_number;
        let mut blocks = Vec::with_capacity(wanted.len());
        for lblk in &wanted {
            let version = self.blocks.get_mut(lblk).and_then(|block| block.waiting.as_mut());
            let Some(version) = version else { continue };
            version.log.asked = Some(Asked { number, newer: None });
            version.log.was_sent = true;
            let (end_bytes, lsn, data) = (version.end_bytes, version.lsn, version.data.clone());
            blocks.push(LogBlock { lblk: Lblk(*lblk), end_bytes, lsn, data });
        }
        self.asks.insert(number, wanted.into_iter().collect());
        Ok(Some(LogPick { number, blocks }))
    }

    fn wants_log(&self, lblk: u64) -> bool {
        let version = self.blocks.get(&lblk).and_then(|block| block.waiting.as_ref());
        version.is_some_and(|version| version.log.is_wanted())
    }

    fn is_unlogged(&self, lblk: u64) -> bool {
        let version = self.blocks.get(&lblk).and_then(|block| block.waiting.as_ref());
        version.is_some_and(|version| version.log.unlogged.is_some())
    }

    fn is_flight_unlogged(&self, lblk: u64) -> bool {
        let flight = self.blocks.get(&lblk).and_then(|block| block.flight.as_ref());
        flight.is_some_and(|flight| flight.version.log.unlogged.is_some())
    }

    /// A message to the log was answered: its blocks are durable as they were sent, or, with
    /// `is_logged` false, nothing is known of them. Idempotent.
    pub fn log_ended(&mut self, number: u64, is_logged: bool) {
        for lblk in self.asks.remove(&number).unwrap_or_default() {
            for in_flight in [false, true] {
                self.version_logged((lblk, in_flight), number, is_logged);
            }
        }
    }

    fn version_logged(&mut self, (lblk, in_flight): (u64, bool), number: u64, is_logged: bool) {
        let Some(block) = self.blocks.get_mut(&lblk) else { return };
        let version = match in_flight {
            false => block.waiting.as_mut(),
            true => block.flight.as_mut().map(|flight| &mut flight.version),
        };
        let Some(version) = version else { return };
        let Some(asked) = version.log.asked.take_if(|asked| asked.number == number) else { return };
        if !is_logged {
            return;
        }
        let unlogged = std::mem::replace(&mut version.log.unlogged, asked.newer);
        let logged = *version.log.logged.get_or_insert(version.since);
        if let Some(lsn) = unlogged {
            self.since.remove(&(lsn, lblk, in_flight));
        }
        if let Some(lsn) = asked.newer {
            self.since.insert((lsn, lblk, in_flight));
        }
        self.logged.insert((logged, lblk, in_flight));
    }

    /// Makes a block dirty with what the data log has of it, unless it is dirty: whoever opens a
    /// volume takes the log of its owner before. No record has it; its number is that of the newest
    /// one. Returns whether it did.
    pub fn insert_logged(&mut self, block: LogBlock<D>) -> bool {
        let LogBlock { lblk: Lblk(lblk), end_bytes, lsn, data } = block;
        if self.blocks.contains_key(&lblk) {
            return false;
        }
        self.insert_block(lblk, lsn, end_bytes, data);
        if let Some(version) = self.blocks.get_mut(&lblk).and_then(|block| block.waiting.as_mut()) {
            version.log = State { unlogged: None, logged: Some(lsn), asked: None, was_sent: true };
            self.since.remove(&(lsn, lblk, false));
            self.logged.insert((lsn, lblk, false));
        }
        true
    }

    /// The log may have an older version of a block that is dirty: see [`super::Waiting::is_logged`].
    pub fn log_may_have(&mut self, lblk: Lblk) {
        if let Some(version) = self.blocks.get_mut(&lblk.0).and_then(|b| b.waiting.as_mut()) {
            version.log.was_sent = true;
        }
    }

    /// The log has messages up to this number: the next ones are newer.
    pub fn log_numbers_from(&mut self, last: u64) {
        self.log_number = self.log_number.max(last);
    }

    /// Newest number given to a message.
    pub fn log_number(&self) -> u64 {
        self.log_number
    }

    /// Versions of which the data log has something, on their way there included.
    pub fn logged_blocks(&self) -> u64 {
        let asked: usize = self.asks.values().map(Vec::len).sum();
        (self.logged.len() + asked) as u64 - self.kept_blocks
    }

    /// Enters a version where fsync and the cache log look for it.
    pub(super) fn remember(&mut self, version: &Version<D>, lblk: u64, in_flight: bool) {
        if let Some(lsn) = version.log.unlogged {
            self.since.insert((lsn, lblk, in_flight));
        }
        if let Some(lsn) = version.log.logged {
            self.logged.insert((lsn, lblk, in_flight));
        }
    }

    pub(super) fn forget(&mut self, version: &Version<D>, lblk: u64, in_flight: bool) {
        if let Some(lsn) = version.log.unlogged {
            self.since.remove(&(lsn, lblk, in_flight));
        }
        if let Some(lsn) = version.log.logged {
            self.logged.remove(&(lsn, lblk, in_flight));
        }
    }

    pub(super) fn set_waiting(&mut self, lblk: u64, version: Version<D>) {
        if let Some(block) = self.blocks.get_mut(&lblk) {
            block.waiting = Some(version);
        }
    }
}

#[cfg(test)]
#[path = "logged_tests.rs"]
mod tests;
