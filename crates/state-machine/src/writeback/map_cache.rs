//! What a writeback knows of the map of a volume that it has open, so that a read needs no look-up.
//!
//! ```text
//!   unknown ── look-up, or end of a write ──► known ── a change of the block begins ──► unknown
//! ```
//!
//! Only the writeback that has a volume open changes the volume's map. So what it once learned
//! stays true until a change of its own begins, and from there until that change has ended in a
//! known way nothing is known of the blocks. A look-up that was under way while a change of its
//! blocks began or ended teaches nothing of them: it may have been answered before or after.
//!
//! # Invariants
//! * `known-is-current`: what is known of a block is what the map says of it now.

use std::collections::{BTreeMap, VecDeque};

use endio_types::LblkRange;
use endio_types::planted::{self, Bug};

/// Changes that are remembered for the look-ups under way. A look-up that saw more of them than
/// this begin or end teaches nothing.
const EVENTS_MAX: usize = 4096;
/// Ranges whose change was given up. Beyond it nothing is learned any more.
const LOST_MAX: usize = 64;
/// One entry in so many is forgotten at once when there are too many.
const SWEEP: usize = 8;

/// A change of the map that may be under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ChangeId(u64);

/// When a look-up began.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

#[derive(Clone, Debug)]
struct Known<E> {
    len: u64,
    /// `None`: reads as zeroes.
    extent: Option<E>,
}

/// Blocks and the extent that holds them; `None`: they read as zeroes.
pub type Part<E> = (LblkRange, Option<E>);

/// What is known of one volume's map. `E` is a handle on an extent that is cheap to clone.
#[derive(Clone, Debug)]
pub struct MapCache<E> {
    /// By first block; entries do not overlap.
    known: BTreeMap<u64, Known<E>>,
    entries_max: usize,
    /// Where the next sweep begins.
    hand: u64,
    changing: BTreeMap<ChangeId, Vec<LblkRange>>,
    next_change: u64,
    /// Ranges of changes that may take effect at any time, or never.
    lost: Vec<LblkRange>,
    /// Ranges whose change began or ended, by number.
    events: VecDeque<(u64, LblkRange)>,
    next_event: u64,
    /// Tickets below are void.
    valid_from: u64,
}

impl<E: Clone> MapCache<E> {
    /// Knows nothing, and never more than `entries_max` runs of blocks. 0: it never learns.
    pub fn new(entries_max: usize) -> Self {
        Self {
            known: BTreeMap::new(),
            entries_max,
            hand: 0,
            changing: BTreeMap::new(),
            next_change: 1,
            lost: Vec::new(),
            events: VecDeque::new(),
            next_event: 1,
            valid_from: 0,
        }
    }

    /// Runs of blocks that are known.
    pub fn entries(&self) -> usize {
        self.known.len()
    }

    /// The whole range, ascending; `None` if a block of it is unknown.
    pub fn find(&self, range: LblkRange) -> Option<Vec<Part<E>>> {
        let mut parts = Vec::new();
        let mut at = range.start.0;
        while at < range.end() {
            let (start, known) = self.known.range(..=at).next_back()?;
            let end = (start + known.len).min(range.end());
            if end <= at {
                return None;
            }
            parts.push((LblkRange::new(at, end - at), known.extent.clone()));
            at = end;
        }
        Some(parts)
    }

    /// Taken before a look-up is sent, for [`learn`](Self::learn).
    pub fn ticket(&self) -> Ticket {
        Ticket(self.next_event)
    }

    /// Takes in the answer to a look-up; the parts do not overlap.
    pub fn learn(&mut self, ticket: Ticket, parts: impl IntoIterator<Item = Part<E>>) {
        if ticket.0 < self.valid_from {
            return;
        }
        let since = self.events.iter().rev().take_while(|(number, _)| *number >= ticket.0);
        let mut unsure: Vec<LblkRange> = since.map(|(_, range)| *range).collect();
        unsure.extend(self.changing.values().flatten().chain(&self.lost));
        if planted::is(Bug::LateLookUpBelieved) {
            unsure.clear();
        }
        self.insert(parts, unsure);
    }

    /// Whether the answer to a look-up still says what the map shows of these blocks: no change of
    /// them has begun or ended since, and none is under way.
    pub fn is_current(&self, ticket: Ticket, range: LblkRange) -> bool {
        let mut since = self.events.iter().rev().take_while(|(number, _)| *number >= ticket.0);
        let mut under_way = self.changing.values().flatten().chain(&self.lost);
        ticket.0 >= self.valid_from
            && !since.any(|(_, changed)| changed.overlaps(range))
            && !under_way.any(|changing| changing.overlaps(range))
    }

    /// A change of these blocks is about to be asked for: nothing is known of them until it ends.
    pub fn begin(&mut self, ranges: Vec<LblkRange>) -> ChangeId {
        for range in ranges.iter().filter(|_| !planted::is(Bug::ChangeUnnoticed)) {
            self.forget(*range);
            self.note(*range);
        }
        let id = ChangeId(self.next_change);
        self.next_change += 1;
        self.changing.insert(id, ranges);
        id
    }

    /// A change has ended, and cannot take effect any more if it has not. `parts`: what the map
    /// says of its blocks now, as far as that is known.
    pub fn end(&mut self, id: ChangeId, parts: impl IntoIterator<Item = Part<E>>) {
        for range in self.changing.remove(&id).unwrap_or_default() {
            self.note(range);
        }
        let unsure = self.changing.values().flatten().chain(&self.lost).copied().collect();
        self.insert(parts, unsure);
    }

    /// Nobody waits for a change any more, and it may still take effect: its blocks stay unknown.
    pub fn give_up(&mut self, id: ChangeId) {
        self.lost.extend(self.changing.remove(&id).unwrap_or_default());
        if self.lost.len() > LOST_MAX {
            self.entries_max = 0;
            self.known.clear();
        }
    }

    /// Forgets everything and whatever look-ups under way would teach. Changes stay under way.
    pub fn reset(&mut self) {
        self.known.clear();
        self.events.clear();
        self.next_event += 1;
        self.valid_from = self.next_event;
    }

    /// Nothing is known of a range any more.
    pub fn forget(&mut self, range: LblkRange) {
        if range.is_empty() {
            return;
        }
        let before = self.known.range(..range.start.0).next_back();
        let first = match before {
            Some((start, known)) if start + known.len > range.start.0 => *start,
            _ => range.start.0,
        };
        let touched: Vec<u64> = self.known.range(first..range.end()).map(|(at, _)| *at).collect();
        for start in touched {
            let Some(known) = self.known.remove(&start) else { continue };
            let end = start + known.len;
            if start < range.start.0 {
                let left = Known { len: range.start.0 - start, extent: known.extent.clone() };
                self.known.insert(start, left);
            }
            if end > range.end() {
                self.known.insert(range.end(), Known { len: end - range.end(), ..known });
            }
        }
    }

    fn note(&mut self, range: LblkRange) {
        self.events.push_back((self.next_event, range));
        self.next_event += 1;
        if self.events.len() > EVENTS_MAX
            && let Some((number, _)) = self.events.pop_front()
        {
            self.valid_from = self.valid_from.max(number + 1);
        }
    }

    /// Adds parts, without what is `unsure`.
    fn insert(&mut self, parts: impl IntoIterator<Item = Part<E>>, mut unsure: Vec<LblkRange>) {
        if self.entries_max == 0 {
            return;
        }
        unsure.sort_unstable_by_key(|range| range.start);
        for (range, extent) in parts {
            self.forget(range);
            let mut at = range.start.0;
            for gap in unsure.iter().filter(|other| other.overlaps(range)) {
                self.put(at, gap.start.0, &extent);
                at = at.max(gap.end());
            }
            self.put(at, range.end(), &extent);
        }
        if self.known.len() > self.entries_max {
            self.sweep();
        }
    }

    fn put(&mut self, start: u64, end: u64, extent: &Option<E>) {
        if start < end {
            self.known.insert(start, Known { len: end - start, extent: extent.clone() });
        }
    }

    /// Forgets a share of the entries, going round.
    fn sweep(&mut self) {
        let excess = self.known.len().saturating_sub(self.entries_max);
        let count = excess + self.entries_max / SWEEP;
        let around = self.known.range(self.hand..).chain(self.known.range(..self.hand));
        let gone: Vec<u64> = around.take(count).map(|(start, _)| *start).collect();
        for start in &gone {
            self.known.remove(start);
        }
        self.hand = gone.last().map_or(0, |last| last + 1);
    }
}

#[cfg(test)]
#[path = "map_cache_tests.rs"]
mod tests;
