//! The oracle of a block device: which values a read may return.
//!
//! Per cell that is the last acknowledged write plus every write whose outcome is unknown since. A
//! successful flush fixes what it covered; a crash that drops what was not flushed makes every
//! later write unknown again. The first read after a crash decides an unknown outcome for good.
//!
//! ```text
//!  invoke_write ──► pending ── ack_write ──► acknowledged ── flush or dsync ──► durable
//!                      │                          │
//!                 fail_write                crash(SinceFlush)
//!                      ▼                          ▼
//!                   unknown ◄──────────────────────
//! ```
//!
//! A caller fails a write only when nothing of it can still be under way to the service: after the
//! process that held it is dead, or after its session was fenced.

use std::collections::{BTreeMap, BTreeSet};

use crate::pattern::{self, BadCell, Cell};

/// What a crash may take away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// Nothing that was acknowledged: the processes died, the machine did not.
    LosesNothing,
    /// Anything acknowledged since the last flush: the machine lost its power.
    SinceFlush,
}

/// A point in the history, in steps of the oracle's own clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct At(u64);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Pending,
    Acknowledged(At),
    Unknown(At),
}

#[derive(Clone, Debug)]
struct Write {
    first: u64,
    cells: u64,
    zeroes: bool,
    invoked: At,
    state: State,
    durable: bool,
}

impl Write {
    /// When it was over for its caller. `None`: it is still under way.
    fn ended(&self) -> Option<At> {
        match self.state {
            State::Pending => None,
            State::Acknowledged(at) | State::Unknown(at) => Some(at),
        }
    }

    fn covers(&self, cell: u64) -> bool {
        cell >= self.first && cell - self.first < self.cells
    }
}

/// A value that a read has returned.
#[derive(Clone, Copy, Debug)]
struct Shown {
    sequence: u64,
    /// The read was sent: what ended before and is not this value, is not there.
    began: At,
    /// The read had returned: reads sent later may not go back behind it.
    ended: At,
}

/// A promise that was broken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// The bytes were written by nobody.
    #[error("cell {cell}: {source}")]
    Garbage {
        /// Where it was read.
        cell: u64,
        /// What is wrong with them.
        source: BadCell,
    },
    /// The bytes belong to another place, another volume, or to no write of this history.
    #[error("cell {cell} of volume {tag:#x} holds {found:?}, which was never written there")]
    Foreign {
        /// Where it was read.
        cell: u64,
        /// Tag of the volume it was read from.
        tag: u64,
        /// What was found.
        found: Cell,
    },
    /// The value was replaced by an acknowledged write before the read began.
    #[error("cell {cell} holds {found:?}, but only writes {allowed:?} are possible")]
    Stale {
        /// Where it was read.
        cell: u64,
        /// What was found.
        found: Cell,
        /// Numbers of the writes that a read may return; 0 is "never written".
        allowed: Vec<u64>,
    },
    /// A durable write is missing.
    #[error("cell {cell} holds {found:?}, but write {lost} was flushed; possible: {allowed:?}")]
    LostFlushed {
        /// Where it was read.
        cell: u64,
        /// What was found.
        found: Cell,
        /// The durable write that ought to be there.
        lost: u64,
        /// Numbers of the writes that a read may return; 0 is "never written".
        allowed: Vec<u64>,
    },
    /// One write is visible in one cell and missing in another.
    #[error("write {sequence} is in cell {seen_in} but cell {missing_in} holds the older {older}")]
    TornWrite {
        /// The write.
        sequence: u64,
        /// A cell that shows it.
        seen_in: u64,
        /// A cell of the same write that does not.
        missing_in: u64,
        /// What that cell shows; 0 is "never written".
        older: u64,
    },
}

impl Violation {
    /// Where it was noticed.
    pub fn cell(&self) -> u64 {
        match self {
            Self::Garbage { cell, .. }
            | Self::Foreign { cell, .. }
            | Self::Stale { cell, .. }
            | Self::LostFlushed { cell, .. } => *cell,
            Self::TornWrite { missing_in, .. } => *missing_in,
        }
    }

    /// Name of the checker whose promise is broken.
    pub fn checker(&self) -> &'static str {
        match self {
            Self::Garbage { .. } | Self::Foreign { .. } | Self::Stale { .. } => {
                "no_foreign_or_stale_byte"
            }
            Self::LostFlushed { .. } => "no_lost_flushed_write",
            Self::TornWrite { .. } => "no_torn_write",
        }
    }
}

/// A flush under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flush(At);

/// The number of the state "never written".
pub const NEVER: u64 = 0;
/// Longest write that must be visible whole or not at all, in bytes.
pub const ATOMIC_BYTES_MAX: u64 = 1 << 20;

/// What one volume may hold. Methods take cell numbers; a cell is `cell_bytes` long.
#[derive(Clone, Debug)]
pub struct Oracle {
    tag: u64,
    cell_bytes: usize,
    now: At,
    next: u64,
    writes: BTreeMap<u64, Write>,
    /// Writes that still matter to a cell, by number. Absent: only [`NEVER`].
    history: BTreeMap<u64, BTreeSet<u64>>,
    /// What the latest read has shown of each cell.
    shown: BTreeMap<u64, Shown>,
    /// Reads under way, by when they were sent: each is judged by what was known then.
    reads: BTreeSet<At>,
    /// Cells and writes that no read sent since then may return there.
    ruled_out: BTreeMap<(u64, u64), At>,
}

impl Oracle {
    /// A volume of zeroes whose cells carry `tag`.
    pub fn new(tag: u64, cell_bytes: usize) -> Self {
        let never = Write {
            first: 0,
            cells: u64::MAX,
            zeroes: true,
            invoked: At(0),
            state: State::Acknowledged(At(0)),
            durable: true,
        };
        Self {
            tag,
            cell_bytes,
            now: At(0),
            next: 1,
            writes: BTreeMap::from([(NEVER, never)]),
            history: BTreeMap::new(),
            shown: BTreeMap::new(),
            reads: BTreeSet::new(),
            ruled_out: BTreeMap::new(),
        }
    }

    /// Bytes of a cell.
    pub fn cell_bytes(&self) -> usize {
        self.cell_bytes
    }

    fn tick(&mut self) -> At {
        self.now.0 += 1;
        self.now
    }

    fn invoke(&mut self, first: u64, cells: u64, zeroes: bool) -> u64 {
        let invoked = self.tick();
        let sequence = self.next;
        self.next += 1;
        let state = State::Pending;
        let write = Write { first, cells, zeroes, invoked, state, durable: false };
        self.writes.insert(sequence, write);
        for cell in first..first + cells {
            let known = self.history.entry(cell).or_insert_with(|| BTreeSet::from([NEVER]));
            known.insert(sequence);
        }
        sequence
    }

    /// A write is about to be sent. Returns its number and the bytes to send.
    pub fn invoke_write(&mut self, first: u64, cells: u64) -> (u64, Vec<u8>) {
        let sequence = self.invoke(first, cells, false);
        (sequence, pattern::cells(self.cell_bytes, self.tag, first, cells, sequence))
    }

    /// As [`Oracle::invoke_write`], for a test whose cells are not bytes.
    pub fn begin_write(&mut self, first: u64, cells: u64) -> u64 {
        self.invoke(first, cells, false)
    }

    /// A trim or zeroing is about to be sent. Returns its number.
    pub fn invoke_zeroes(&mut self, first: u64, cells: u64) -> u64 {
        self.invoke(first, cells, true)
    }

    /// The write was acknowledged. `durable`: it was a DSYNC write, or a change of the map.
    pub fn ack_write(&mut self, sequence: u64, durable: bool) {
        let at = self.tick();
        if let Some(write) = self.writes.get_mut(&sequence) {
            write.state = State::Acknowledged(at);
            write.durable |= durable;
        }
    }

    /// The write failed, or its answer never came: it may or may not have taken effect.
    pub fn fail_write(&mut self, sequence: u64) {
        let at = self.tick();
        if let Some(write) = self.writes.get_mut(&sequence) {
            write.state = State::Unknown(at);
        }
    }

    /// What this write put into these cells cannot appear there any more: something that was
    /// sent after the write had been given up was acknowledged over it. A read that was sent before
    /// now may still return it, however late it is answered.
    pub fn rule_out(&mut self, sequence: u64, first: u64, cells: u64) {
        let at = self.tick();
        for (cell, known) in self.history.range_mut(first..first + cells) {
            if self.reads.is_empty() {
                known.remove(&sequence);
            } else if known.contains(&sequence) {
                self.ruled_out.entry((*cell, sequence)).or_insert(at);
            }
        }
    }

    /// Acknowledged writes that were not flushed may be gone: their holder lost its power, or its
    /// volume was taken from it. Those under way stay so.
    pub fn lose_unflushed(&mut self) {
        let at = self.tick();
        for write in self.writes.values_mut() {
            if matches!(write.state, State::Acknowledged(_)) && !write.durable {
                write.state = State::Unknown(at);
            }
        }
        self.shown.clear();
    }

    /// What reads have shown of writes that were not acknowledged may be gone again: of a volume that is
    /// written in place they may see data before it is durable, and a store has lost its power.
    pub fn forget_shown(&mut self) {
        self.shown.clear();
    }

    /// The point in the history that comes next.
    pub fn now(&mut self) -> At {
        self.tick()
    }

    /// Numbers of the writes that were neither acknowledged nor failed.
    pub fn pending(&self) -> Vec<u64> {
        let pending = |(_, write): &(&u64, &Write)| write.state == State::Pending;
        self.writes.iter().filter(pending).map(|(sequence, _)| *sequence).collect()
    }

    /// A flush is about to be sent.
    pub fn invoke_flush(&mut self) -> Flush {
        Flush(self.tick())
    }

    /// The flush succeeded: what was acknowledged before it was sent stays for good.
    pub fn ack_flush(&mut self, flush: Flush) {
        self.tick();
        for write in self.writes.values_mut() {
            if let State::Acknowledged(at) = write.state {
                write.durable |= at < flush.0;
            }
        }
        self.forget_what_is_covered();
    }

    /// Drops values that a durable write has replaced: no crash can bring them back. A read that
    /// was sent before that write ended may still return them, however late it is answered.
    fn forget_what_is_covered(&mut self) {
        let writes = &self.writes;
        let oldest_read = self.reads.first().copied();
        let is_before_reads = |ended: At| oldest_read.is_none_or(|oldest_read| ended < oldest_read);
        for known in self.history.values_mut() {
            let newest_durable = known
                .iter()
                .filter_map(|sequence| writes.get(sequence))
                .filter(|write| write.durable && write.ended().is_some_and(is_before_reads))
                .map(|write| write.invoked)
                .max();
            let Some(covered) = newest_durable else { continue };
            known.retain(|sequence| match writes[sequence].ended() {
                Some(ended) => ended >= covered,
                None => true,
            });
        }
        let needed: BTreeSet<u64> = self.history.values().flatten().copied().collect();
        self.writes.retain(|sequence, write| {
            *sequence == NEVER || needed.contains(sequence) || write.state == State::Pending
        });
        let history = &self.history;
        self.ruled_out.retain(|(cell, sequence), _| {
            history.get(cell).is_some_and(|known| known.contains(sequence))
        });
    }

    /// The system crashed and is back. Pending writes become unknown.
    pub fn crash(&mut self, mode: Crash) {
        let at = self.tick();
        for write in self.writes.values_mut() {
            let is_lost = match write.state {
                State::Pending => true,
                State::Acknowledged(_) => mode == Crash::SinceFlush && !write.durable,
                State::Unknown(_) => false,
            };
            if is_lost {
                write.state = State::Unknown(at);
            }
        }
        if mode == Crash::SinceFlush {
            self.shown.clear();
        }
    }

    /// A read is about to be sent: what was acknowledged before now is required of it.
    /// Ends with [`Oracle::end_read`].
    pub fn invoke_read(&mut self) -> At {
        let began = self.tick();
        self.reads.insert(began);
        began
    }

    /// The read was answered and judged, or given up. Idempotent.
    pub fn end_read(&mut self, began: At) {
        self.reads.remove(&began);
    }

    /// Numbers of the writes that a read that began at `began` may return.
    pub fn allowed(&self, cell: u64, began: At) -> Vec<u64> {
        let Some(known) = self.history.get(&cell) else { return vec![NEVER] };
        let newest_required = known
            .iter()
            .filter_map(|sequence| match self.writes[sequence].state {
                State::Acknowledged(at) if at < began => Some(self.writes[sequence].invoked),
                _ => None,
            })
            .max();
        let is_allowed = |sequence: &u64| {
            let Some(ended) = self.writes[sequence].ended() else { return true };
            let replaced = newest_required.is_some_and(|required| ended < required);
            let ruled_out = self.ruled_out.get(&(cell, *sequence)).is_some_and(|at| *at < began);
            let decided = self.shown.get(&cell).is_some_and(|shown| {
                shown.ended < began && shown.sequence != *sequence && ended < shown.began
            });
            !replaced && !decided && !ruled_out
        };
        known.iter().copied().filter(is_allowed).collect()
    }

    /// Checks one cell of a read that began at `began`; a good value is remembered.
    ///
    /// # Errors
    /// The [`Violation`] that this value is.
    pub fn check_read(&mut self, began: At, cell: u64, bytes: &[u8]) -> Result<u64, Violation> {
        let found = pattern::parse(bytes).map_err(|source| Violation::Garbage { cell, source })?;
        self.check_cell(began, cell, found)
    }

    /// As [`Oracle::check_read`], for a cell that was parsed already.
    ///
    /// # Errors
    /// The [`Violation`] that this value is.
    pub fn check_cell(&mut self, began: At, cell: u64, found: Cell) -> Result<u64, Violation> {
        let allowed = self.allowed(cell, began);
        let sequence = match found {
            Cell::Zero => allowed.iter().copied().rev().find(|allowed| self.writes[allowed].zeroes),
            Cell::Written { tag, cell: named, sequence } => {
                let write = self.writes.get(&sequence);
                let is_ours = tag == self.tag
                    && named == cell
                    && sequence < self.next
                    && write.is_none_or(|write| write.covers(cell) && !write.zeroes);
                if !is_ours {
                    return Err(Violation::Foreign { cell, tag: self.tag, found });
                }
                allowed.contains(&sequence).then_some(sequence)
            }
        };
        let Some(sequence) = sequence else { return Err(self.replaced(cell, found, allowed)) };
        let ended = self.tick();
        let shown = Shown { sequence, began, ended };
        let latest = self.shown.entry(cell).or_insert(shown);
        if latest.began <= began {
            *latest = shown;
        }
        Ok(sequence)
    }

    fn replaced(&self, cell: u64, found: Cell, allowed: Vec<u64>) -> Violation {
        let is_durable = |sequence: &&u64| **sequence != NEVER && self.writes[*sequence].durable;
        match allowed.iter().find(is_durable).copied() {
            Some(lost) => Violation::LostFlushed { cell, found, lost, allowed },
            None => Violation::Stale { cell, found, allowed },
        }
    }

    /// What is known about a cell, for a person who looks into a violation.
    pub fn explain(&self, cell: u64) -> String {
        let known = self.history.get(&cell).into_iter().flatten();
        let mut lines = vec![format!("cell {cell}, last shown {:?}:", self.shown.get(&cell))];
        for sequence in known {
            let write = &self.writes[sequence];
            let what = if write.zeroes { "zeroes" } else { "write" };
            let (first, last) = (write.first, write.first.saturating_add(write.cells - 1));
            let (invoked, state, durable) = (write.invoked, write.state, write.durable);
            lines.push(format!(
                "  {what} {sequence}: cells {first} to {last}, sent {invoked:?}, {state:?}, \
                 durable {durable}"
            ));
        }
        lines.join("\n")
    }

    /// Checks a whole read; returns the write found in each cell.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub fn check_range(
        &mut self,
        began: At,
        first: u64,
        bytes: &[u8],
    ) -> Result<BTreeMap<u64, u64>, Violation> {
        let mut seen = BTreeMap::new();
        for (cell, bytes) in (first..).zip(bytes.chunks(self.cell_bytes)) {
            seen.insert(cell, self.check_read(began, cell, bytes)?);
        }
        Ok(seen)
    }

    /// Whether every write of at most 1 MiB is in `seen` as a whole or not at all. `seen` is what
    /// [`Oracle::check_range`] found while no write was under way.
    ///
    /// # Errors
    /// [`Violation::TornWrite`].
    pub fn check_whole_writes(&self, seen: &BTreeMap<u64, u64>) -> Result<(), Violation> {
        let mut shown_by: BTreeMap<u64, u64> = BTreeMap::new();
        for (cell, sequence) in seen {
            shown_by.entry(*sequence).or_insert(*cell);
        }
        for (sequence, seen_in) in shown_by {
            let Some(write) = self.writes.get(&sequence) else { continue };
            let cells_max = ATOMIC_BYTES_MAX / self.cell_bytes as u64;
            if write.zeroes || write.cells > cells_max {
                continue;
            }
            for (cell, other) in seen.range(write.first..write.first + write.cells) {
                let precedes = match self.writes.get(other) {
                    Some(other) => other.ended().is_some_and(|ended| ended < write.invoked),
                    None => true,
                };
                if *other != sequence && precedes {
                    let (missing_in, older) = (*cell, *other);
                    return Err(Violation::TornWrite { sequence, seen_in, missing_in, older });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "oracle_tests.rs"]
mod tests;
