//! Dirty blocks of one volume and what is under writeback of them.
//!
//! A block has at most two versions: one *in flight* (picked into an io, not yet converted) and one
//! *waiting* (newer than the one in flight, or the only one). A version in flight is never changed,
//! so the device never sees half of a newer write; a write to a block in flight makes a waiting
//! version, which is picked only after the io ended. So no block is ever in two ios at once, and
//! the end of an io clears exactly what that io carried.
//!
//! Each version knows two log numbers: `lsn`, the newest record in it, and `since`, the oldest
//! record that no converted version covers yet. Overwriting a waiting version keeps its `since`:
//! an fsync that began before the overwrite still waits for the block, and a block that is written
//! all the time still becomes the oldest one and is picked.
//!
//! A small flush does not wait for its blocks to be converted: conversion keeps them in its data log
//! until they are (`logged`). Such a block is durable, and as dirty as before.
//!
//! # Invariants
//! * `whole-requests`: waiting blocks that one write covered are picked together, so what an io
//!   converts is whole requests. Otherwise a takeover between two ios would leave half of a
//!   write. Blocks are *joined* to their right neighbour by each write that covers both and stay so
//!   until they are converted; a chain of joined blocks is a *group*. Only a group longer than
//!   [`GROUP_BLOCKS_MAX`] (many overlapping writes, or one of more than 1 MiB) is cut. Blocks in the
//!   middle of a group that the stores hold already are *kept* (`stored`): they hold it together and
//!   are not written again. What a write held together before a restart is joined anew (`rejoin`).

mod joined;
mod logged;
mod stored;

use std::collections::{BTreeMap, BTreeSet};

use endio_types::planted::{self, Bug};
use endio_types::{BLOCK_BYTES, Lblk, LblkRange};

use super::Lsn;
pub use logged::{LogBlock, LogPick, TooMuch};
pub use stored::{Settled, Waiting};

/// Longest group of joined blocks that is picked as a whole: three times the longest write that
/// must never be seen in part, because writes that overlap are picked together.
pub const GROUP_BLOCKS_MAX: u64 = 768;

/// Names one pick of blocks. Never reused within a map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WriteOutId(pub u64);

/// What [`DirtyMap::pick`] may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PickLimit {
    /// Most blocks in the run, unless one group of joined blocks is longer; 0 picks nothing.
    pub blocks_max: u64,
    /// Only when the oldest block of the run waits since this record or an earlier one (fsync).
    pub up_to: Option<Lsn>,
    /// Only groups with a block of this range (writing out before a trim or a direct write).
    pub within: Option<LblkRange>,
}

impl PickLimit {
    /// The oldest run of at most `blocks_max` blocks, wherever it lies.
    pub fn blocks(blocks_max: u64) -> Self {
        Self { blocks_max, up_to: None, within: None }
    }
}

/// Contiguous blocks that are now under writeback. It ends with exactly one [`DirtyMap::complete`]
/// or [`DirtyMap::fail`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Picked<D> {
    /// Names this write-out.
    pub io: WriteOutId,
    /// The blocks.
    pub range: LblkRange,
    /// Those of them that are written, ascending: all but what the stores hold already.
    pub written: Vec<LblkRange>,
    /// Data of each block that is written, in order.
    pub data: Vec<D>,
    /// Newest record that this covers: the log must be durable up to here before the submitter's
    /// token is released.
    pub max_lsn: Lsn,
    /// Where the volume's data ends, in bytes, as far as these blocks show: captured now, so a
    /// write that grows the volume later does not leak into the size that this one makes durable.
    pub end_bytes: u64,
    /// What the data log has of these blocks up to this number is not needed once they are
    /// converted: nothing newer was logged of them when they were picked.
    pub logged_up_to: u64,
}

/// Blocks whose data up to a record is converted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CleanRun {
    /// The blocks.
    pub range: LblkRange,
    /// Records up to this one are no longer needed for these blocks; exact for each block, so
    /// a record that was appended meanwhile is never covered by accident.
    pub up_to: Lsn,
}

/// What ended with a write-out that succeeded.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Completed {
    /// For `Clean` records; ascending, every block of the io once.
    pub runs: Vec<CleanRun>,
    /// Blocks that are clean now.
    pub cleaned_blocks: u64,
    /// Blocks of the io that are dirty with newer data.
    pub redirtied_blocks: u64,
}

/// What ended with a write-out that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Failed {
    /// Blocks dirty again with the data of this io.
    pub dirty_again_blocks: u64,
    /// Blocks whose version is not needed any more (a newer one waits, or it was discarded):
    /// their credit, which the abort gave back, is free.
    pub credit_freed_blocks: u64,
}

/// What [`DirtyMap::discard`] found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Discarded {
    /// Blocks whose waiting version was dropped; their credit is free.
    pub credit_freed_blocks: u64,
    /// Write-outs that still carry blocks of the range. They must end before the trim goes on;
    /// if they fail, the blocks of the range do not become dirty again.
    pub in_flight: BTreeSet<WriteOutId>,
}

/// How the caller of [`DirtyMap::complete`] or [`DirtyMap::fail`] was wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyError {
    /// There is no such write-out: it never was, or it has ended.
    #[error("no write-out {} is under way", .0.0)]
    UnknownWriteOut(WriteOutId),
    /// An insert whose number of blocks and of data items differ.
    #[error("{blocks} blocks with {items} data items")]
    LengthMismatch {
        /// Blocks of the range.
        blocks: u64,
        /// Items given.
        items: u64,
    },
}

#[derive(Clone, Debug)]
struct Version<D> {
    data: D,
    lsn: Lsn,
    since: Lsn,
    end_bytes: u64,
    /// A write covered this block and the next one.
    joined: bool,
    log: logged::State,
    /// The stores hold it: see `stored`.
    is_kept: bool,
}

#[derive(Clone, Debug)]
struct Flight<D> {
    version: Version<D>,
    io: WriteOutId,
    discarded: bool,
}

#[derive(Clone, Debug)]
struct Block<D> {
    waiting: Option<Version<D>>,
    flight: Option<Flight<D>>,
}

/// The dirty blocks of one volume. `D` is a handle on 4096 bytes that is cheap to clone.
#[derive(Clone, Debug)]
pub struct DirtyMap<D> {
    blocks: BTreeMap<u64, Block<D>>,
    /// Blocks that may be picked, by `since`: those with a waiting version and none in flight.
    ready: BTreeSet<(Lsn, u64)>,
    /// `since` of every version, waiting or in flight, with the block and whether it is in flight;
    /// of one that the data log has, the oldest record that is newer than what it has, if any.
    since: BTreeSet<(Lsn, u64, bool)>,
    /// `since` of every version of which the data log has something.
    logged: BTreeSet<(Lsn, u64, bool)>,
    /// Blocks that are being logged, by number.
    asks: BTreeMap<u64, Vec<u64>>,
    log_number: u64,
    write_outs: BTreeMap<WriteOutId, LblkRange>,
    next_io: u64,
    waiting_blocks: u64,
    in_flight_blocks: u64,
    kept_blocks: u64,
}

impl<D> Default for DirtyMap<D> {
    fn default() -> Self {
        Self {
            blocks: BTreeMap::new(),
            ready: BTreeSet::new(),
            since: BTreeSet::new(),
            logged: BTreeSet::new(),
            asks: BTreeMap::new(),
            log_number: 0,
            write_outs: BTreeMap::new(),
            next_io: 1,
            waiting_blocks: 0,
            in_flight_blocks: 0,
            kept_blocks: 0,
        }
    }
}

impl<D: Clone> DirtyMap<D> {
    /// A map without dirty blocks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Blocks of credit that an [`insert`](Self::insert) of `range` would need now.
    pub fn credit_needed(&self, range: LblkRange) -> u64 {
        let holds = |block: &Block<D>| block.waiting.as_ref().is_some_and(|v| !v.is_kept);
        let waiting = self.overlapping(range).filter(|(_, block)| holds(block)).count();
        range.len.saturating_sub(waiting as u64)
    }

    /// Where the data of a write's whole blocks ends, bytes: where the write does, or what its last block holds
    /// by an older version that is not converted. Whoever finds the newer version alone, in a log, learns no
    /// smaller size from it than from the older one.
    pub fn end_of(&self, range: LblkRange, write_end_bytes: u64) -> u64 {
        let last = range.end().checked_sub(1).and_then(|last| self.blocks.get(&last));
        let versions = last.iter().flat_map(|block| {
            let flight = block.flight.as_ref().map(|flight| &flight.version);
            block.waiting.iter().chain(flight)
        });
        versions.fold(write_end_bytes, |end, version| end.max(version.end_bytes))
    }

    /// Makes `range` dirty with `data`, one item per block. `lsn` is the record that holds it, and
    /// `end_bytes` is where the write ends (offset + length). Returns how many blocks of credit
    /// this used: each version needs its own, a rewritten waiting version needs none.
    ///
    /// # Errors
    /// [`DirtyError::LengthMismatch`]; nothing has changed then.
    pub fn insert(
        &mut self,
        range: LblkRange,
        lsn: Lsn,
        end_bytes: u64,
        data: Vec<D>,
    ) -> Result<u64, DirtyError> {
        if data.len() as u64 != range.len {
            let (blocks, items) = (range.len, data.len() as u64);
            return Err(DirtyError::LengthMismatch { blocks, items });
        }
        let mut credit = 0;
        for (lblk, data) in (range.start.0..range.end()).zip(data) {
            credit += u64::from(self.insert_block(lblk, lsn, end_bytes, data));
        }
        self.join(range);
        Ok(credit)
    }

    /// Returns whether credit for one more block is needed.
    fn insert_block(&mut self, lblk: u64, lsn: Lsn, end_bytes: u64, data: D) -> bool {
        let end_bytes = end_bytes.min(block_end(lblk));
        let kept = self.take_kept(lblk);
        let block = self.blocks.entry(lblk).or_insert(Block { waiting: None, flight: None });
        if let Some(waiting) = &mut block.waiting {
            waiting.data = data;
            waiting.lsn = waiting.lsn.max(lsn);
            waiting.end_bytes = waiting.end_bytes.max(end_bytes);
            if waiting.log.rewritten(lsn) {
                self.since.insert((lsn, lblk, false));
            }
            return false;
        }
        let joined = kept.as_ref().is_some_and(|kept| kept.joined);
        let mut log = logged::State::new(lsn);
        kept.iter().for_each(|kept| log.follows(&kept.log));
        let version = Version { data, lsn, since: lsn, end_bytes, joined, log, is_kept: false };
        block.waiting = Some(version);
        if block.flight.is_none() {
            self.ready.insert((lsn, lblk));
        }
        self.since.insert((lsn, lblk, false));
        self.waiting_blocks += 1;
        true
    }

    /// The newest cached data of a block; `None`: the block is clean, read it from the stores.
    pub fn read(&self, lblk: Lblk) -> Option<&D> {
        let block = self.blocks.get(&lblk.0)?;
        match (&block.waiting, &block.flight) {
            (Some(version), _) => Some(&version.data),
            // The trim that discarded it decides what readers see.
            (None, Some(flight)) => (!flight.discarded).then_some(&flight.version.data),
            (None, None) => None,
        }
    }

    /// Cached blocks of a range with their newest data, ascending.
    pub fn read_range(&self, range: LblkRange) -> impl Iterator<Item = (Lblk, &D)> {
        self.overlapping(range)
            .filter_map(|(lblk, _)| self.read(Lblk(lblk)).map(|data| (Lblk(lblk), data)))
    }

    /// Takes the contiguous run around the oldest pickable block, as large as the limit allows,
    /// and puts it under writeback. `None`: nothing to pick under that limit.
    pub fn pick(&mut self, limit: PickLimit) -> Option<Picked<D>> {
        let group = self.seed(limit)?;
        Some(self.take(group, limit))
    }

    fn take(&mut self, group: LblkRange, limit: PickLimit) -> Picked<D> {
        let range = self.run_around(group, limit);
        let io = WriteOutId(self.next_io);
        self.next_io += 1;
        let mut picked = Picked {
            io,
            range,
            written: Vec::new(),
            data: Vec::new(),
            max_lsn: Lsn(0),
            end_bytes: 0,
            logged_up_to: self.log_number,
        };
        for lblk in range.start.0..range.end() {
            let Some(version) = self.launch(lblk, io) else { continue };
            picked.max_lsn = picked.max_lsn.max(version.lsn);
            if version.is_kept {
                continue;
            }
            match picked.written.last_mut().filter(|last| last.end() == lblk) {
                Some(last) => last.len += 1,
                None => picked.written.push(LblkRange::new(lblk, 1)),
            }
            picked.end_bytes = picked.end_bytes.max(version.end_bytes);
            picked.data.push(version.data);
        }
        self.write_outs.insert(io, range);
        picked
    }

    /// Picks again and again, oldest first, until the limit's blocks or `ranges_max` ranges are
    /// reached: scattered blocks leave together. Ascending by block; empty: nothing to pick.
    pub fn gather(&mut self, limit: PickLimit, ranges_max: usize) -> Vec<Picked<D>> {
        let mut picks: Vec<Picked<D>> = Vec::new();
        let (mut left, mut ranges_left) = (limit.blocks_max, ranges_max);
        while ranges_left > 0 && left > 0 {
            let limit = PickLimit { blocks_max: left, ..limit };
            let Some(group) = self.seed(limit) else { break };
            // Parts of one write stay together, so the first may be larger than the limit.
            let is_large = group.len > left || self.gaps(group) >= ranges_left;
            if !picks.is_empty() && is_large {
                break;
            }
            let picked = self.take(group, limit);
            left = left.saturating_sub(picked.range.len);
            ranges_left = ranges_left.saturating_sub(picked.written.len().max(1));
            picks.push(picked);
        }
        picks.sort_by_key(|picked| picked.range.start);
        picks
    }

    /// Whether [`pick`](Self::pick) would find something under this limit.
    pub fn can_pick(&self, limit: PickLimit) -> bool {
        self.seed(limit).is_some()
    }

    /// The group of the oldest block that the limit allows.
    fn seed(&self, limit: PickLimit) -> Option<LblkRange> {
        if limit.blocks_max == 0 {
            return None;
        }
        let allowed = |since: Lsn| limit.up_to.is_none_or(|up_to| since <= up_to);
        match limit.within {
            None => {
                let oldest = self.ready.iter().take_while(|(since, _)| allowed(*since));
                self.first_whole_group(oldest.map(|(_, lblk)| *lblk))
            }
            Some(range) => {
                let ready = |(lblk, block): (u64, &Block<D>)| {
                    let since = block.waiting.as_ref()?.since;
                    (block.flight.is_none() && allowed(since)).then_some((since, lblk))
                };
                let inside: BTreeSet<(Lsn, u64)> =
                    self.overlapping(range).filter_map(ready).collect();
                self.first_whole_group(inside.into_iter().map(|(_, lblk)| lblk))
            }
        }
    }

    fn first_whole_group(&self, seeds: impl Iterator<Item = u64>) -> Option<LblkRange> {
        let mut rejected: Option<LblkRange> = None;
        for seed in seeds {
            let one = LblkRange::new(seed, 1);
            if rejected.is_some_and(|group| group.overlaps(one)) {
                continue;
            }
            let group = self.group(seed);
            if (group.start.0..group.end()).all(|lblk| self.is_ready(lblk)) {
                return Some(group);
            }
            // A part of it is under writeback in an older version: its turn comes after that.
            rejected = Some(group);
        }
        None
    }

    fn is_ready(&self, lblk: u64) -> bool {
        self.blocks.get(&lblk).is_some_and(|b| b.waiting.is_some() && b.flight.is_none())
    }

    fn launch(&mut self, lblk: u64, io: WriteOutId) -> Option<Version<D>> {
        let block = self.blocks.get_mut(&lblk)?;
        let version = block.waiting.take()?;
        block.flight = Some(Flight { version: version.clone(), io, discarded: false });
        self.ready.remove(&(version.since, lblk));
        self.forget(&version, lblk, false);
        self.remember(&version, lblk, true);
        self.waiting_blocks -= u64::from(!version.is_kept);
        self.in_flight_blocks += u64::from(!version.is_kept);
        Some(version)
    }

    /// The conversion of a write-out is durable. Blocks without newer data become clean.
    ///
    /// # Errors
    /// [`DirtyError::UnknownWriteOut`] if it has ended before; nothing has changed then.
    pub fn complete(&mut self, io: WriteOutId) -> Result<Completed, DirtyError> {
        let range = self.write_outs.remove(&io).ok_or(DirtyError::UnknownWriteOut(io))?;
        let mut done = Completed::default();
        for lblk in range.start.0..range.end() {
            let Some(flight) = self.land(lblk, io) else { continue };
            push_run(&mut done.runs, lblk, flight.version.lsn);
            self.kept_blocks -= u64::from(flight.version.is_kept);
            if self.settle(lblk) {
                done.cleaned_blocks += 1;
            } else {
                done.redirtied_blocks += 1;
            }
        }
        Ok(done)
    }

    /// A write-out ended without conversion: its blocks are dirty as before, except where newer
    /// data waits already or the block was discarded.
    ///
    /// # Errors
    /// [`DirtyError::UnknownWriteOut`] if it has ended before; nothing has changed then.
    pub fn fail(&mut self, io: WriteOutId) -> Result<Failed, DirtyError> {
        let range = self.write_outs.remove(&io).ok_or(DirtyError::UnknownWriteOut(io))?;
        let mut failed = Failed::default();
        for lblk in range.start.0..range.end() {
            let Some(flight) = self.land(lblk, io) else { continue };
            if flight.version.is_kept {
                self.keep_again(lblk, flight);
            } else if flight.discarded {
                failed.credit_freed_blocks += 1;
            } else if self.put_back(lblk, flight.version) {
                failed.dirty_again_blocks += 1;
            } else {
                failed.credit_freed_blocks += 1;
            }
            self.settle(lblk);
        }
        Ok(failed)
    }

    /// Takes the version in flight out of a block.
    fn land(&mut self, lblk: u64, io: WriteOutId) -> Option<Flight<D>> {
        let block = self.blocks.get_mut(&lblk)?;
        let flight = block.flight.take_if(|flight| flight.io == io)?;
        self.forget(&flight.version, lblk, true);
        self.in_flight_blocks -= u64::from(!flight.version.is_kept);
        Some(flight)
    }

    /// Makes a failed version wait again; `false` if a newer one waits, which then stands for both.
    fn put_back(&mut self, lblk: u64, version: Version<D>) -> bool {
        if planted::is(Bug::FailedIsClean) {
            return false;
        }
        let Some(block) = self.blocks.get_mut(&lblk) else { return false };
        if let Some(mut newer) = block.waiting.take() {
            self.forget(&newer, lblk, false);
            let from = newer.since;
            newer.since = newer.since.min(version.since);
            newer.end_bytes = newer.end_bytes.max(version.end_bytes);
            newer.joined |= version.joined;
            newer.log.stands_for(&version.log, (newer.since, from));
            self.remember(&newer, lblk, false);
            self.set_waiting(lblk, newer);
            return false;
        }
        self.remember(&version, lblk, false);
        self.waiting_blocks += 1;
        self.set_waiting(lblk, version);
        true
    }

    /// After a flight ended: the block is pickable again or gone. Returns whether it is gone.
    fn settle(&mut self, lblk: u64) -> bool {
        let Some(block) = self.blocks.get(&lblk) else { return true };
        match &block.waiting {
            Some(version) => {
                self.ready.insert((version.since, lblk));
                false
            }
            None => self.blocks.remove(&lblk).is_some(),
        }
    }

    /// Forgets the dirty data of a range (trim, delete, or a write that went around the cache).
    /// Idempotent.
    pub fn discard(&mut self, range: LblkRange) -> Discarded {
        let mut gone = Discarded::default();
        let touched: Vec<u64> = self.overlapping(range).map(|(lblk, _)| lblk).collect();
        for lblk in touched {
            self.take_kept(lblk);
            let Some(block) = self.blocks.get_mut(&lblk) else { continue };
            if let Some(version) = block.waiting.take() {
                self.ready.remove(&(version.since, lblk));
                self.forget(&version, lblk, false);
                self.waiting_blocks -= 1;
                gone.credit_freed_blocks += 1;
            }
            let Some(block) = self.blocks.get_mut(&lblk) else { continue };
            match &mut block.flight {
                Some(flight) => {
                    flight.discarded = true;
                    gone.in_flight.insert(flight.io);
                }
                None => {
                    self.blocks.remove(&lblk);
                }
            }
        }
        gone
    }

    /// Write-outs under way that carry blocks of a range.
    pub fn in_flight(&self, range: LblkRange) -> BTreeSet<WriteOutId> {
        self.overlapping(range).filter_map(|(_, b)| b.flight.as_ref().map(|f| f.io)).collect()
    }

    /// Blocks of a range that a write-out under way carries, ascending.
    pub fn blocks_in_flight(&self, range: LblkRange) -> impl Iterator<Item = u64> + '_ {
        self.overlapping(range).filter(|(_, block)| block.flight.is_some()).map(|(lblk, _)| lblk)
    }

    /// Whether a range has any version, waiting or in flight.
    pub fn touches(&self, range: LblkRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// Oldest record that something not yet converted may need: the log keeps it and all after it.
    /// `None`: nothing is needed.
    pub fn oldest_lsn(&self) -> Option<Lsn> {
        let oldest = self.since.first().into_iter().chain(self.logged.first());
        oldest.map(|(lsn, _, _)| *lsn).min()
    }

    /// Whether something acknowledged with record `lsn` or before is neither converted nor in the
    /// data log.
    pub fn pending_up_to(&self, lsn: Lsn) -> bool {
        self.since.first().is_some_and(|(oldest, _, _)| *oldest <= lsn)
    }

    /// How many block versions an fsync up to `lsn` has to wait for. Linear in the answer.
    pub fn pending_blocks_up_to(&self, lsn: Lsn) -> u64 {
        self.since.iter().take_while(|(since, _, _)| *since <= lsn).count() as u64
    }

    /// How many block versions with something up to `lsn` are not converted, logged or not. Linear in
    /// the answer; one that is logged and rewritten since counts twice.
    pub fn unconverted_blocks_up_to(&self, lsn: Lsn) -> u64 {
        let old = |set: &BTreeSet<(Lsn, u64, bool)>| {
            set.iter().take_while(|(since, _, _)| *since <= lsn).count() as u64
        };
        old(&self.since) + old(&self.logged)
    }

    /// Versions that wait to be written (or for the version in flight before them).
    pub fn waiting_blocks(&self) -> u64 {
        self.waiting_blocks
    }

    /// Versions under writeback.
    pub fn in_flight_blocks(&self) -> u64 {
        self.in_flight_blocks
    }

    /// Write-outs under way.
    pub fn write_outs(&self) -> usize {
        self.write_outs.len()
    }

    /// Nothing waits and nothing is in flight.
    pub fn is_clean(&self) -> bool {
        self.blocks.is_empty()
    }

    fn overlapping(&self, range: LblkRange) -> impl Iterator<Item = (u64, &Block<D>)> {
        self.blocks.range(range.start.0..range.end()).map(|(lblk, block)| (*lblk, block))
    }
}

fn block_end(lblk: u64) -> u64 {
    lblk.saturating_add(1).saturating_mul(BLOCK_BYTES)
}

fn push_run(runs: &mut Vec<CleanRun>, lblk: u64, up_to: Lsn) {
    if let Some(last) = runs.last_mut()
        && last.range.end() == lblk
        && last.up_to == up_to
    {
        last.range.len += 1;
        return;
    }
    runs.push(CleanRun { range: LblkRange::new(lblk, 1), up_to });
}

#[cfg(test)]
#[path = "dirty_tests.rs"]
mod tests;
