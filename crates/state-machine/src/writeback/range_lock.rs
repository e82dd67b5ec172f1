//! A first-in-first-out lock on ranges of blocks of one volume.
//!
//! A request waits for every *earlier* request, held or waiting, that overlaps it and conflicts
//! with it (two shared ones do not conflict). Since it looks only backwards, nobody overtakes a
//! conflicting earlier waiter, there is no deadlock, and each grant follows from a count that
//! reaches zero: releasing and giving up a wait are the same step and cannot lose a wake-up.

use std::collections::{BTreeMap, BTreeSet};

use endio_types::LblkRange;
use endio_types::planted::{self, Bug};

/// Names one request. Never reused within a lock; grows in the order of arrival.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// How a range is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Together with others that share (reads).
    Shared,
    /// Alone (writes, trims, zeroings).
    Exclusive,
}

/// Answer of [`RangeLock::acquire`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Acquired {
    /// The range is held now.
    Granted(Ticket),
    /// It will be in the list that a later `release` or `cancel` returns.
    Queued(Ticket),
}

impl Acquired {
    /// The ticket, held or waiting.
    pub fn ticket(self) -> Ticket {
        match self {
            Self::Granted(ticket) | Self::Queued(ticket) => ticket,
        }
    }
}

#[derive(Clone, Debug)]
struct Request {
    range: LblkRange,
    mode: Mode,
    /// Earlier requests that are live, overlap and conflict. 0: held.
    blockers: usize,
}

/// The lock of one volume.
#[derive(Clone, Debug, Default)]
pub struct RangeLock {
    requests: BTreeMap<Ticket, Request>,
    /// By first block, to find what overlaps.
    by_start: BTreeSet<(u64, Ticket)>,
    /// How many requests have each length: the longest bounds how far before a range an
    /// overlapping one can start.
    lengths: BTreeMap<u64, usize>,
    next: u64,
}

impl RangeLock {
    /// Nothing held.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for a range. An empty range conflicts with nothing and is granted at once.
    pub fn acquire(&mut self, range: LblkRange, mode: Mode) -> Acquired {
        self.next += 1;
        let ticket = Ticket(self.next);
        let mut blockers = self.conflicting(range, mode).len();
        if planted::is(Bug::LockGrantsAll) {
            blockers = 0;
        }
        self.requests.insert(ticket, Request { range, mode, blockers });
        self.by_start.insert((range.start.0, ticket));
        *self.lengths.entry(range.len).or_default() += 1;
        if blockers == 0 { Acquired::Granted(ticket) } else { Acquired::Queued(ticket) }
    }

    /// Ends a held range. Returns the tickets that are held from now on, in order of arrival.
    /// Idempotent: an unknown ticket changes nothing.
    pub fn release(&mut self, ticket: Ticket) -> Vec<Ticket> {
        self.remove(ticket)
    }

    /// Gives up a wait, or ends a range that was granted while the waiter went away: the caller
    /// need not know which. Returns the tickets that are held from now on. Idempotent.
    pub fn cancel(&mut self, ticket: Ticket) -> Vec<Ticket> {
        self.remove(ticket)
    }

    fn remove(&mut self, ticket: Ticket) -> Vec<Ticket> {
        let Some(gone) = self.requests.remove(&ticket) else { return Vec::new() };
        self.by_start.remove(&(gone.range.start.0, ticket));
        if let Some(count) = self.lengths.get_mut(&gone.range.len) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&gone.range.len);
            }
        }
        let mut granted = Vec::new();
        for later in self.conflicting(gone.range, gone.mode) {
            if later < ticket {
                continue;
            }
            if let Some(request) = self.requests.get_mut(&later) {
                request.blockers = request.blockers.saturating_sub(1);
                if request.blockers == 0 {
                    granted.push(later);
                }
            }
        }
        granted.sort_unstable();
        granted
    }

    fn conflicting(&self, range: LblkRange, mode: Mode) -> Vec<Ticket> {
        let longest = self.lengths.last_key_value().map_or(0, |(len, _)| *len);
        let from = range.start.0.saturating_sub(longest);
        self.by_start
            .range((from, Ticket(0))..(range.end(), Ticket(0)))
            .filter_map(|(_, ticket)| Some((*ticket, self.requests.get(ticket)?)))
            .filter(|(_, other)| other.range.overlaps(range))
            .filter(|(_, other)| mode == Mode::Exclusive || other.mode == Mode::Exclusive)
            .map(|(ticket, _)| ticket)
            .collect()
    }

    /// Whether this ticket holds its range now.
    pub fn is_held(&self, ticket: Ticket) -> bool {
        self.requests.get(&ticket).is_some_and(|request| request.blockers == 0)
    }

    /// Requests that hold or wait.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Nobody holds and nobody waits.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

#[cfg(test)]
#[path = "range_lock_tests.rs"]
mod tests;
