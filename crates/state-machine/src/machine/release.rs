//! Releases of tokens, and the end of an io_end.

use endio_types::planted::{self, Bug};
use endio_types::{IoEndId, LblkRange, PblkRange, Reason, SegmentIndex, StoreId};

use super::io::{Completion, Output, SegmentOutcome, ToWriteback};
use super::{Machine, MachineError, Step};
use crate::extent_map::ChunkTable;
use crate::ledger::{IoEnd, Outcome, PieceKind, Released};
use crate::token::Token;

/// The outer error ends the machine, the inner one is the answer to the peer.
type Answer<E> = Result<Result<Released, Reason>, MachineError<E>>;

impl<T: ChunkTable> Machine<T> {
    /// A store releases a segment's token.
    pub(super) fn release_segment(
        &mut self,
        store: StoreId,
        token: &Token,
        outcome: Outcome,
        out: &mut Output,
    ) -> Answer<T::Error> {
        let result = match token.store == store && !token.segment.is_submitter() {
            true => self.record_segment(token, outcome),
            false => Err(Reason::ForgedToken),
        };
        self.count_release(&result);
        if result == Ok(Released::First) {
            self.finish_if_last(token.io_end, out)?;
        }
        Ok(result)
    }

    fn record_segment(&mut self, token: &Token, outcome: Outcome) -> Result<Released, Reason> {
        self.check_token(token)?;
        if let Outcome::Store(SegmentOutcome::Durable(crcs)) = &outcome {
            let in_place = self.durable.volumes.get(&token.volume).is_some_and(|v| v.in_place);
            let fits = crcs.len() == token.blocks as usize || (in_place && crcs.is_empty());
            if !fits {
                return Err(Reason::Malformed);
            }
        }
        match self.ledger.get_mut(token.io_end) {
            Some(io_end) => io_end.release(token.segment, outcome),
            None => self.ledger.release_ended(token.io_end, token.segment, Some(&outcome)),
        }
    }

    /// The submitter's release: the last segment is on its way.
    pub(super) fn release_submitter(
        &mut self,
        name: &str,
        token: &Token,
        not_submitted: &[SegmentIndex],
        abort: bool,
        out: &mut Output,
    ) -> Answer<T::Error> {
        let result = self.record_submitter(name, token, not_submitted);
        self.count_release(&result);
        match &result {
            Ok(Released::First) if !abort => self.finish_if_last(token.io_end, out)?,
            Ok(Released::First) => self.abort(token.io_end, Reason::NotSubmitted, None, out)?,
            // A segment was lost on its way to its store after the submitter's release: nobody
            // else can end the io_end before its life is over.
            Ok(Released::Again) if abort && self.waits_for_segments(token.io_end) => {
                self.abort(token.io_end, Reason::NotSubmitted, None, out)?;
            }
            _ => {}
        }
        Ok(result)
    }

    fn waits_for_segments(&self, id: IoEndId) -> bool {
        self.ledger.get(id).is_some_and(|io_end| !io_end.live.is_empty())
    }

    fn record_submitter(
        &mut self,
        name: &str,
        token: &Token,
        not_submitted: &[SegmentIndex],
    ) -> Result<Released, Reason> {
        if !token.segment.is_submitter() {
            return Err(Reason::ForgedToken);
        }
        self.check_token(token)?;
        let Some(io_end) = self.ledger.get_mut(token.io_end) else {
            return self.ledger.release_ended(token.io_end, token.segment, None);
        };
        if io_end.writeback != name {
            return Err(Reason::ForgedToken);
        }
        if not_submitted.iter().any(|index| io_end.segment(*index).is_none()) {
            return Err(Reason::UnknownToken);
        }
        if !io_end.live.remove(&SegmentIndex::SUBMITTER) {
            return Ok(Released::Again);
        }
        for index in not_submitted {
            // A segment that its store released first was sent after all: that outcome stands.
            if io_end.release(*index, Outcome::NotSubmitted) == Err(Reason::OutcomeConflict) {
                self.counters.conflicts += 1;
            }
        }
        Ok(Released::First)
    }

    /// Whether this is a token as it was granted in this epoch.
    fn check_token(&self, token: &Token) -> Result<(), Reason> {
        if token.epoch < self.durable.epoch {
            return Err(Reason::OldEpoch);
        }
        match self.granting_key() {
            Some(key) if token.verify(key) => Ok(()),
            _ => Err(Reason::ForgedToken),
        }
    }

    fn count_release(&mut self, result: &Result<Released, Reason>) {
        let counters = &mut self.counters;
        match result {
            Ok(Released::First) => {}
            Ok(Released::Again) => counters.repeated += 1,
            Err(Reason::ForgedToken) => counters.forged += 1,
            Err(Reason::OutcomeConflict) => counters.conflicts += 1,
            Err(_) => counters.refused_releases += 1,
        }
    }

    /// The one place that decides what the last release of an io_end leads to.
    fn finish_if_last(&mut self, id: IoEndId, out: &mut Output) -> Step<T> {
        let now = self.now;
        let Some(io_end) = self.ledger.get_mut(id) else { return Ok(()) };
        if !io_end.live.is_empty() && !planted::is(Bug::ConvertOnFirstRelease) {
            return Ok(());
        }
        io_end.released = Some(now);
        io_end.release_order = self.next_release;
        self.next_release += 1;
        if io_end.failed.is_none() && io_end.has_mismatch() {
            io_end.failed = Some((Reason::ChecksumMismatch, None));
        }
        if let Some((reason, store)) = io_end.failed
            && !planted::is(Bug::ConvertDespiteFailure)
        {
            return self.abort(id, reason, store, out);
        }
        let is_empty = io_end.pieces.iter().all(|piece| !io_end.is_durable(piece));
        if io_end.owes_conversion && !is_empty {
            let (lane, volume) = (io_end.lane, io_end.volume);
            if self.lanes[lane as usize].push(volume, id) {
                self.counters.wakeups += 1;
            }
            return Ok(());
        }
        self.counters.completed_inline += 1;
        self.complete(id, out)
    }

    /// Ends an io_end successfully; what was to convert has been converted.
    pub(super) fn complete(&mut self, id: IoEndId, out: &mut Output) -> Step<T> {
        let Some(io_end) = self.end(id, None)? else { return Ok(()) };
        self.send_completion(&io_end, None, None, out);
        Ok(())
    }

    /// Ends an io_end without a conversion. Idempotent.
    pub(super) fn abort(
        &mut self,
        id: IoEndId,
        reason: Reason,
        store: Option<StoreId>,
        out: &mut Output,
    ) -> Step<T> {
        let Some(io_end) = self.end(id, Some(reason))? else { return Ok(()) };
        self.counters.aborted += 1;
        self.send_completion(&io_end, Some(reason), store, out);
        Ok(())
    }

    /// Takes an io_end out of everything. Fresh blocks that did not get into the map go to
    /// quarantine until the io_end is fenced, because their bios may still be under way.
    fn end(
        &mut self,
        id: IoEndId,
        reason: Option<Reason>,
    ) -> Result<Option<IoEnd>, MachineError<T::Error>> {
        let Some(io_end) = self.ledger.end(id, reason) else { return Ok(None) };
        self.lanes[io_end.lane as usize].remove(io_end.volume, id);
        let mut in_place_risk = false;
        let mut fresh = 0;
        for piece in &io_end.pieces {
            if piece.kind == PieceKind::Fresh {
                fresh += u64::from(piece.blocks) * piece.segments.len() as u64;
            }
            if reason.is_none() && io_end.is_durable(piece) {
                continue;
            }
            for (store, range) in io_end.places(piece) {
                match piece.kind {
                    PieceKind::Fresh => self.quarantine_until_fenced(id, store, range)?,
                    PieceKind::Unwritten | PieceKind::Overwrite => {
                        in_place_risk = true;
                        if let Some(mut rt) = self.stores.get_mut(&store) {
                            rt.fence_io_ends.insert(id);
                        }
                    }
                }
            }
        }
        self.in_flight_blocks = self.in_flight_blocks.saturating_sub(fresh);
        if let Some(rt) = self.volumes.get_mut(&io_end.volume) {
            let count = &mut rt.by_lane[io_end.lane as usize];
            *count = count.saturating_sub(1);
            // The blocks are in the map: nobody may write or free them while a bio of this
            // io_end can still land there.
            match in_place_risk {
                true => self.ledger.linger(id, io_end.volume),
                false => rt.in_flight.remove(id),
            }
        }
        self.use_credit(io_end.volume, 0, io_end.credit);
        Ok(Some(io_end))
    }

    fn send_completion(
        &self,
        io_end: &IoEnd,
        failed: Option<Reason>,
        failed_store: Option<StoreId>,
        out: &mut Output,
    ) {
        let volume = self.durable.volumes.get(&io_end.volume);
        let Some(volume) = volume else { return };
        let converted: Vec<LblkRange> = match failed {
            None => io_end.durable_ranges(),
            Some(_) => Vec::new(),
        };
        let completion = Completion {
            io_end: io_end.id,
            volume: io_end.volume,
            failed,
            message: failed.map_or("", failure_message),
            retryable: failed.is_some_and(Reason::is_retryable),
            map_version: volume.map_version,
            size_bytes: volume.size_bytes,
            converted,
            failed_store,
            last_release_ms: io_end.released.map_or(0, |at| at.0),
            traceparent: io_end.traceparent.clone(),
        };
        let message = ToWriteback::Completion(completion);
        self.tell(io_end.session, self.when_committed(), message, out);
    }

    /// Physical blocks of an io_end that got a fresh place, for the check.
    pub(super) fn reserved_ranges(io_end: &IoEnd) -> Vec<(StoreId, PblkRange)> {
        let fresh = io_end.pieces.iter().filter(|piece| piece.kind == PieceKind::Fresh);
        fresh.flat_map(|piece| io_end.places(piece)).collect()
    }
}

fn failure_message(reason: Reason) -> &'static str {
    match reason {
        Reason::LeaseExpired => "the lease of a holder ended: the outcome is unknown",
        Reason::OldIncarnation => "a block-store has restarted",
        Reason::OldGeneration => "the volume was opened by somebody else",
        Reason::NotSubmitted => "the submitter gave the write up",
        Reason::ChecksumMismatch => "the replicas hold different data",
        Reason::Draining => "the service is stopping",
        Reason::MetadataFull => "the conversion could not be made",
        Reason::Aborted => "the write was aborted",
        _ => "a block-store could not write a segment",
    }
}
