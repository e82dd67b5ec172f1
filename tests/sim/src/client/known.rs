//! What is known about the content of a volume.

use endio_testkit::oracle::{At, Oracle};

use crate::block::{CELL_BYTES, CELLS};
use crate::plan::VolumePlan;

/// A request whose outcome is not known, and that may still take effect.
pub(super) struct Doubt {
    pub(super) sequence: u64,
    pub(super) first: u64,
    pub(super) cells: u64,
    pub(super) since: At,
    /// Of the tenure; a session after this one ends the doubt.
    pub(super) session: u64,
    pub(super) tenure: u64,
    pub(super) engine: String,
}

/// What is known about the content of a volume.
pub(super) struct Known {
    pub(super) tag: u64,
    pub(super) oracle: Oracle,
    pub(super) doubts: Vec<Doubt>,
    /// A read up to here is answered.
    pub(super) size_cells: u64,
    /// The size may be this instead: a resize from it failed, or may yet have happened.
    pub(super) reach_cells: u64,
    pub(super) is_resizing: bool,
    /// Changes that were sent.
    pub(super) changes: u64,
    /// Resizes that were sent.
    pub(super) resizes: u64,
    /// What acknowledged writes rule out once they are flushed: a loss of them brings it back. With
    /// when they were acknowledged, sequence, first cell and number of cells.
    pub(super) ruled_out: Vec<(At, u64, u64, u64)>,
    /// Where acknowledged writes end that are not flushed and that the volume grew by, with when they were
    /// acknowledged: a read up to there is answered, too.
    acked_ends: Vec<(At, u64)>,
    /// Where those end that were flushed.
    flushed_end: u64,
    /// How often what was not flushed may have gone.
    pub(super) losses: u64,
    /// A power cut of the owner may have taken writes, and no fsync has said so yet.
    pub(super) unsaid_loss: bool,
}

impl Known {
    pub(super) fn new(tag: u64, plan: &VolumePlan) -> Self {
        Self {
            tag,
            oracle: Oracle::new(tag, CELL_BYTES as usize),
            doubts: Vec::new(),
            size_cells: plan.blocks * CELLS,
            reach_cells: 0,
            is_resizing: false,
            changes: 0,
            resizes: 0,
            ruled_out: Vec::new(),
            acked_ends: Vec::new(),
            flushed_end: 0,
            losses: 0,
            unsaid_loss: false,
        }
    }

    /// Begins a read; with how many changes were sent so far, if none of them is under way.
    pub(super) fn begin_read(&mut self) -> (At, Option<u64>) {
        let is_quiet = self.oracle.pending().is_empty();
        (self.oracle.invoke_read(), is_quiet.then_some(self.changes))
    }

    pub(super) fn ack(
        &mut self,
        sequence: u64,
        invoked: At,
        first: u64,
        cells: u64,
        durable: bool,
    ) {
        self.oracle.ack_write(sequence, durable);
        // What was given up before this was sent must not undo it.
        for doubt in self.doubts.iter().filter(|doubt| doubt.since < invoked) {
            let from = first.max(doubt.first);
            let to = (first + cells).min(doubt.first + doubt.cells);
            match from < to {
                true if durable => self.oracle.rule_out(doubt.sequence, from, to - from),
                true => {
                    let acked = self.oracle.now();
                    self.ruled_out.push((acked, doubt.sequence, from, to - from));
                }
                false => {}
            }
        }
    }

    /// What was acknowledged before is durable.
    pub(super) fn flushed(&mut self, before: At) {
        self.acked_ends.retain(|(acked, end)| {
            let is_covered = *acked <= before;
            if is_covered {
                self.flushed_end = self.flushed_end.max(*end);
            }
            !is_covered
        });
        let Self { oracle, ruled_out, .. } = self;
        ruled_out.retain(|(acked, sequence, first, cells)| {
            let is_covered = *acked <= before;
            if is_covered {
                oracle.rule_out(*sequence, *first, *cells);
            }
            !is_covered
        });
    }

    /// What was not flushed may be lost, and then what it had replaced is back.
    pub(super) fn lose_unflushed(&mut self) {
        self.oracle.lose_unflushed();
        self.ruled_out.clear();
        self.acked_ends.clear();
        self.losses += 1;
    }

    /// An acknowledged write ends there.
    pub(super) fn grew(&mut self, end: u64, durable: bool) {
        match durable {
            true => self.size_cells = self.size_cells.max(end),
            false if end > self.size_cells => self.acked_ends.push((self.oracle.now(), end)),
            false => {}
        }
    }

    /// The volume is about to get another size.
    pub(super) fn resizes_to(&mut self, cells: u64) {
        self.size_cells = self.size_cells.min(cells);
        self.acked_ends.clear();
        self.flushed_end = 0;
    }

    /// A read up to here is answered, whoever of the processes has died.
    pub(super) fn acked_size(&self) -> u64 {
        let ends = self.acked_ends.iter().map(|(_, end)| *end);
        ends.fold(self.size_cells.max(self.flushed_end), u64::max)
    }
}
