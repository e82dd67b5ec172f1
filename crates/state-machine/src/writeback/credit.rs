//! Space that conversion promised to a volume's buffered writes, in logical blocks.
//!
//! A buffered write takes credit before it is acknowledged. `BeginIo` in the write-out lane moves
//! it into the io_end; an abort gives it back, and the blocks are dirty again and hold it. So
//! `promised = held + available` at all times, and write-out cannot meet "no space".

use endio_types::planted::{self, Bug};

/// How credit is taken and returned, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CreditPolicy {
    /// Ask for more when less than this is available.
    pub low_blocks: u64,
    /// Return some when more than this is available and the volume is idle.
    pub high_blocks: u64,
    /// How much to ask for at once, beyond what is short.
    pub step_blocks: u64,
}

impl Default for CreditPolicy {
    /// 16 MiB low, 128 MiB high, 64 MiB a step.
    fn default() -> Self {
        Self { low_blocks: 4096, high_blocks: 32_768, step_blocks: 16_384 }
    }
}

/// A `Reserve` to send. Its answer is told with [`Credit::granted`] or [`Credit::refused`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    /// Number of the request; grows.
    pub request: u64,
    /// Count from zero instead of from what is promised now.
    pub reset: bool,
    /// Blocks to add.
    pub add_blocks: u64,
    /// Blocks to give back.
    pub drop_blocks: u64,
}

/// Answer of [`Credit::take`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Take {
    /// The credit is held.
    Taken,
    /// Not enough now; an answer to a `Reserve` may bring it. Ask again then.
    Short,
    /// Conversion refused just what was short, or even what dirty data holds: answer `NO_SPACE`. The
    /// next try asks again.
    NoSpace,
}

/// The credit of one volume.
#[derive(Clone, Debug)]
pub struct Credit {
    policy: CreditPolicy,
    promised: u64,
    held: u64,
    /// Dirty blocks that want no space: in place, their places are in the map.
    excused: u64,
    /// The largest amount that a waiting writer lacks.
    wanted: u64,
    outstanding: Option<Ask>,
    /// A reset was refused: nothing backs what dirty data holds, until another one is granted.
    owes_reset: bool,
    /// The last reset was refused because the stores are full.
    is_reset_full: bool,
    /// The last refusal: conversion could not add this many.
    refused_add: Option<u64>,
    next_request: u64,
}

impl Credit {
    /// Nothing promised.
    pub fn new(policy: CreditPolicy) -> Self {
        Self {
            policy,
            promised: 0,
            held: 0,
            excused: 0,
            wanted: 0,
            outstanding: None,
            owes_reset: false,
            is_reset_full: false,
            refused_add: None,
            next_request: 1,
        }
    }

    /// Takes `blocks` for data that becomes dirty.
    pub fn take(&mut self, blocks: u64) -> Take {
        // What is freed meanwhile was never promised: a reset may be refused, and then full stores
        // never take what was acknowledged on it.
        if self.is_reset_pending() {
            // There is not even space for what is dirty.
            return if self.is_reset_full { Take::NoSpace } else { Take::Short };
        }
        if blocks <= self.available() {
            self.held += blocks;
            return Take::Taken;
        }
        let short = blocks - self.available();
        self.wanted = self.wanted.max(short);
        // Without an answer on its way only a refusal of no more than this says "full".
        match self.refused_add {
            Some(refused) if refused <= short && self.outstanding.is_none() => {
                self.refused_add = None;
                self.wanted = 0;
                Take::NoSpace
            }
            _ => Take::Short,
        }
    }

    /// Holds credit for blocks found dirty at a restart, before any was promised: the next
    /// [`reset`](Self::reset) asks for it.
    pub fn adopt(&mut self, blocks: u64) {
        self.held += blocks;
        self.promised = self.promised.max(self.held);
    }

    /// Held credit is free again: its data was discarded, or a newer version holds its own.
    pub fn put_back(&mut self, blocks: u64) {
        let blocks = self.unexcused(blocks);
        // A reset wants less now, and may be granted.
        self.is_reset_full &= blocks == 0;
        if !planted::is(Bug::CreditLeaked) {
            self.held -= blocks.min(self.held);
        }
    }

    /// So many dirty blocks in all want no space: what they hold need not be promised. Which ones
    /// these are nobody remembers: whatever ends first ends the excuse, so that never less is held
    /// than wants space.
    pub fn excuse(&mut self, blocks: u64) {
        let more = blocks.saturating_sub(self.excused).min(self.held);
        self.excused += more;
        self.held -= more;
    }

    fn unexcused(&mut self, blocks: u64) -> u64 {
        let excused = blocks.min(self.excused);
        self.excused -= excused;
        blocks - excused
    }

    /// `BeginIo` took `blocks` of held credit into an io_end.
    pub fn consumed(&mut self, blocks: u64) {
        let blocks = self.unexcused(blocks).min(self.held);
        self.held -= blocks;
        self.promised -= blocks;
    }

    /// An io_end was aborted: its credit came back, and the blocks are dirty and hold it.
    pub fn restored(&mut self, blocks: u64) {
        self.held += blocks;
        self.promised += blocks;
    }

    /// The `Reserve` to send now, if any. At most one is outstanding.
    pub fn next_ask(&mut self, idle: bool) -> Option<Ask> {
        if self.outstanding.is_some() {
            return None;
        }
        if self.owes_reset {
            return Some(self.ask_reset());
        }
        let available = self.available();
        let (add, drop) = if self.wanted > 0 {
            // After a refusal only what is short: the last blocks of a store are usable too.
            let extra = if self.refused_add.is_some() { 0 } else { self.policy.step_blocks };
            (self.wanted.saturating_add(extra), 0)
        } else if idle && available > self.policy.high_blocks {
            (0, available - self.policy.low_blocks.min(available))
        } else if !idle && available < self.policy.low_blocks && self.refused_add.is_none() {
            (self.policy.step_blocks, 0)
        } else {
            return None;
        };
        if add == 0 && drop == 0 {
            return None;
        }
        // What is given back is not usable from now on: conversion may hand it out at once.
        self.promised -= drop;
        Some(self.ask(false, add, drop))
    }

    /// After a reconnect: the promise starts anew with what dirty data holds. Every io_end of the
    /// old session has ended before this is called, so `held` is exact. Replaces an outstanding
    /// request, whose answer will not come.
    pub fn reset(&mut self) -> Ask {
        self.is_reset_full = false;
        self.ask_reset()
    }

    fn ask_reset(&mut self) -> Ask {
        self.promised = self.held;
        self.wanted = 0;
        self.refused_add = None;
        self.owes_reset = false;
        self.ask(true, self.held, 0)
    }

    fn ask(&mut self, reset: bool, add_blocks: u64, drop_blocks: u64) -> Ask {
        let ask = Ask { request: self.next_request, reset, add_blocks, drop_blocks };
        self.next_request += 1;
        self.outstanding = Some(ask);
        ask
    }

    /// The promise of `request` is durable. Answers to other requests are ignored: `false`.
    pub fn granted(&mut self, request: u64) -> bool {
        let Some(ask) = self.outstanding.take_if(|ask| ask.request == request) else {
            return false;
        };
        if !ask.reset {
            self.promised += ask.add_blocks;
            self.wanted = 0;
        }
        self.refused_add = None;
        self.is_reset_full = false;
        true
    }

    /// `request` was refused for lack of space. Answers to other requests are ignored: `false`.
    pub fn refused(&mut self, request: u64) -> bool {
        let Some(ask) = self.take_back(request) else { return false };
        self.is_reset_full = ask.reset;
        if ask.add_blocks > 0 && !ask.reset {
            self.refused_add = Some(ask.add_blocks);
        }
        true
    }

    /// `request` was refused for now, not because the stores are full: the same is asked for again.
    /// Answers to other requests are ignored: `false`.
    pub fn put_off(&mut self, request: u64) -> bool {
        self.take_back(request).is_some()
    }

    /// A refusal changes nothing at conversion, so what was to be given back is still ours.
    fn take_back(&mut self, request: u64) -> Option<Ask> {
        let ask = self.outstanding.take_if(|ask| ask.request == request)?;
        self.promised += ask.drop_blocks;
        self.owes_reset |= ask.reset;
        self.is_reset_full = false;
        Some(ask)
    }

    /// Blocks that a write can take at once.
    pub fn available(&self) -> u64 {
        self.promised - self.held
    }

    /// Blocks that dirty data holds and no io_end has taken yet.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Blocks that conversion has promised and that no io_end has taken.
    pub fn promised(&self) -> u64 {
        self.promised
    }

    /// A reset is on its way, or was refused and is to be asked for again: until it is granted a
    /// write-out may find no promise, so none is begun.
    pub fn is_reset_pending(&self) -> bool {
        self.owes_reset || self.outstanding.is_some_and(|ask| ask.reset)
    }

    /// A request is on its way.
    pub fn is_outstanding(&self) -> bool {
        self.outstanding.is_some()
    }
}

#[cfg(test)]
#[path = "credit_tests.rs"]
mod tests;
