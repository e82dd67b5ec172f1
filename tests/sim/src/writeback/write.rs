//! Requests of clients: writes, trims, zeroings, allocations, fsync.

use std::rc::Rc;

use endio_state_machine::machine::{Call, MapChange, ReplyBody};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::cover::inner_and_edges;
use endio_state_machine::writeback::credit::Take;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::errseq::Cursor;
use endio_state_machine::writeback::sessions::{Decision, RequestKey};
use endio_state_machine::writeback::throttle::Verdict;
use endio_store::cache_log::{CacheLogError, WriteRecord};
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange, Reason};

use super::{Admission, Failure, Held, MapChanging, Outcome, State, Volume, Wb};
use crate::block::{Block, CELL_BYTES, CELLS, ZEROES, crc, to_bytes};
use crate::exec::MS;
use crate::world::Planted;

/// A log that took nothing for so long is not about to have room.
const LOG_FULL_PATIENCE: u64 = 1_000 * MS;

/// Makes a retry safe.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Session and number.
    pub key: RequestKey,
    /// A second try.
    pub is_retry: bool,
}

/// When a write is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// In the cache.
    Buffered,
    /// Durable: in the data log, if it is small enough.
    Durable,
    /// Converted.
    Direct,
}

/// What happens to a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeKind {
    /// It becomes a hole.
    Trim,
    /// It reads as zeroes.
    Zero,
    /// Its holes become unwritten blocks.
    Allocate,
}

enum Admitted {
    New(Option<Admission>),
    Duplicate,
    Busy,
}

impl Wb {
    fn admit(&self, retry: Option<Retry>) -> Outcome<Admitted> {
        let Some(Retry { key, is_retry }) = retry else { return Ok(Admitted::New(None)) };
        let now = self.exec().clock(self.node());
        match self.engine.sessions.borrow_mut().begin(key, is_retry, now) {
            Decision::New => Ok(Admitted::New(Some(Admission { wb: self.clone(), key }))),
            Decision::Duplicate(_) => Ok(Admitted::Duplicate),
            Decision::InProgress => Ok(Admitted::Busy),
            Decision::TooOld | Decision::UnknownSession => {
                Err(Failure::new(Reason::UnknownSession))
            }
            Decision::Full => Err(Failure::new(Reason::Limit)),
            Decision::Malformed => Err(Failure::new(Reason::Malformed)),
        }
    }

    /// The request's turn: `None` if it was applied before.
    async fn turn(
        &self,
        volume: &Volume,
        blocks: LblkRange,
        retry: Option<Retry>,
        deadline: u64,
    ) -> Outcome<Option<(Option<Admission>, Held)>> {
        let mut admitted = self.admit(retry)?;
        // Its place in the order is taken before anything else happens.
        let mut held = matches!(admitted, Admitted::New(_)).then(|| volume.locks.acquire(blocks));
        while matches!(admitted, Admitted::Busy) {
            let ended = self.engine.session_ended.wait({
                let mut is_first = true;
                move || (!std::mem::replace(&mut is_first, false)).then_some(())
            });
            if self.exec().until(deadline, ended).await.is_none() {
                return Err(Failure::new(Reason::TimedOut));
            }
            admitted = self.admit(retry)?;
        }
        let Admitted::New(admission) = admitted else { return Ok(None) };
        let held = held.take().unwrap_or_else(|| volume.locks.acquire(blocks));
        if self.exec().until(deadline, held.held()).await.is_none() {
            return Err(Failure::new(Reason::TimedOut));
        }
        volume.usable()?;
        Ok(Some((admission, held)))
    }

    /// The blocks of a range of bytes that a request may touch.
    fn check(&self, volume: &Volume, bytes: ByteRange, extends: bool) -> Outcome<LblkRange> {
        let state = volume.state.borrow();
        if let Some(gone) = state.gone {
            return Err(gone);
        }
        if bytes.offset + bytes.len > state.view.size_bytes() && !(extends && volume.growable) {
            return Err(Failure::new(Reason::OutOfRange));
        }
        Ok(bytes.blocks())
    }

    /// Writes cells from cell `first` on.
    pub async fn write(
        &self,
        volume: &Rc<Volume>,
        first: u64,
        cells: Vec<u64>,
        mode: Mode,
        retry: Option<Retry>,
    ) -> Outcome<()> {
        let bytes = ByteRange { offset: first * CELL_BYTES, len: cells.len() as u64 * CELL_BYTES };
        let deadline = self.deadline();
        let blocks = self.check(volume, bytes, true)?;
        let turn = self.turn(volume, blocks, retry, deadline).await?;
        let Some((admission, _held)) = turn else {
            // It was applied before, and perhaps no more than that.
            return match mode {
                Mode::Durable => self.make_durable(volume, deadline).await,
                _ => Ok(()),
            };
        };
        if !self.world.planted(Planted::EndUnchecked) {
            self.check(volume, bytes, true)?;
        }
        let end = bytes.offset + bytes.len;
        if mode == Mode::Direct || (mode == Mode::Durable && !self.is_loggable(volume, blocks)) {
            self.forget(volume, blocks, deadline).await?;
            let whole = self.merge(volume, first, &cells, deadline).await?;
            self.write_through(volume, blocks, whole, end, deadline).await?;
            self.note_done(admission, bytes.len);
            return Ok(());
        }
        let whole = self.merge(volume, first, &cells, deadline).await?;
        if mode == Mode::Durable {
            self.buffered(volume, (blocks, whole), end, admission, deadline).await?;
            return self.make_durable(volume, deadline).await;
        }
        if !self.is_for_the_stores(volume, bytes) {
            return self.buffered(volume, (blocks, whole), end, admission, deadline).await;
        }
        let patience = self.world.plan.around_patience_ms * MS;
        let soon = deadline.min(self.exec().now() + patience);
        self.ask_credit(volume, false);
        let written = async {
            self.forget(volume, blocks, soon).await?;
            self.write_through(volume, blocks, whole.clone(), end, soon).await
        };
        let Err(unknown) = written.await else {
            self.note_done(admission, bytes.len);
            return Ok(());
        };
        volume.usable()?;
        self.exec().note("the cache takes it", self.node(), &[blocks.start.0, blocks.len]);
        // What was tried may be converted all the same: a refusal would say that it is not.
        let taken = self.buffered(volume, (blocks, whole), end, admission, deadline).await;
        taken.map_err(|_| unknown)
    }

    /// Whether a buffered write goes straight to the stores: large, of whole blocks, and nothing of them is
    /// dirty.
    fn is_for_the_stores(&self, volume: &Volume, bytes: ByteRange) -> bool {
        let least = self.world.plan.write_around_blocks * BLOCK_BYTES;
        let is_whole =
            bytes.offset.is_multiple_of(BLOCK_BYTES) && bytes.len.is_multiple_of(BLOCK_BYTES);
        let is_large = least > 0 && bytes.len >= least && is_whole && !volume.in_place;
        is_large && !volume.state.borrow().dirty.touches(bytes.blocks())
    }

    async fn buffered(
        &self,
        volume: &Rc<Volume>,
        (blocks, whole): (LblkRange, Vec<Block>),
        end: u64,
        admission: Option<Admission>,
        deadline: u64,
    ) -> Outcome<()> {
        self.make_room(volume, blocks.len, deadline).await?;
        self.take_credit(volume, blocks.len, deadline).await?;
        let inserted = self.insert(volume, blocks, &whole, end, admission.as_ref(), deadline);
        let used = match inserted.await {
            Ok(Some(used)) => used,
            Ok(None) => {
                volume.state.borrow_mut().credit.put_back(blocks.len);
                self.exec().note("around the full log", self.node(), &[blocks.start.0, blocks.len]);
                self.forget(volume, blocks, deadline).await?;
                self.write_through(volume, blocks, whole, end, deadline).await?;
                return Ok(());
            }
            Err(failure) => {
                volume.state.borrow_mut().credit.put_back(blocks.len);
                return Err(failure);
            }
        };
        self.dirtied(volume.id, used);
        if let Some(admission) = admission {
            admission.applied(whole.len() as u64 * BLOCK_BYTES);
        }
        self.ask_credit(volume, false);
        volume.changed.notify();
        if self.world.plan.logs_ahead > 0 && self.exec().chance(self.world.plan.logs_ahead) {
            let (wb, volume) = (self.clone(), Rc::clone(volume));
            self.spawn(async move { wb.log_flush(&volume, wb.engine.log.last_lsn()).await });
        }
        Ok(())
    }

    /// Remembers that the request was applied, in the log first.
    fn note_done(&self, admission: Option<Admission>, result: u64) {
        let Some(admission) = admission else { return };
        if let Err(error) = self.engine.log.append_done(admission.key, result) {
            self.log_failed(&error);
        }
        admission.applied(result);
    }

    /// Forgets what cache and log hold of blocks, before something goes around the cache.
    pub(super) async fn forget(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        deadline: u64,
    ) -> Outcome<()> {
        if self.world.planted(Planted::ForgetSkipped) {
            return Ok(());
        }
        let touches = volume.state.borrow().dirty.touches(range);
        if touches {
            self.flush_range(volume, range, deadline).await?;
        }
        if self.engine.log.holds(volume.id, range) {
            let clean = volume.state.borrow().last_clean;
            self.log_durable(clean).await?;
        }
        // The log did not take that they are clean when they became so.
        if self.engine.log.holds(volume.id, range) && !self.world.planted(Planted::CleanGuessed) {
            let clean = CleanRun { range, up_to: self.engine.log.last_lsn() };
            let clean = self.engine.log.append_clean(volume.id, &[clean]);
            let clean = clean.map_err(|error| self.log_failed(&error))?;
            self.log_durable(clean).await?;
        }
        Ok(())
    }

    /// Notes in the log that blocks are clean; the volume's state is in the caller's hands.
    pub(super) fn note_clean(&self, volume: &Volume, state: &mut State, clean: &[CleanRun]) {
        // As if the disk of the log was full for a moment.
        let fails = self.world.plan.clean_fails;
        if fails > 0 && self.world.rare.borrow_mut().below(1000) < fails {
            return self.exec().note("clean is not noted", self.node(), &[volume.id.0]);
        }
        match self.engine.log.append_clean(volume.id, clean) {
            Ok(lsn) => state.last_clean = state.last_clean.max(lsn),
            Err(error) => _ = self.log_failed(&error),
        }
    }

    /// Asks conversion for credit where a volume wants some.
    pub(super) fn ask_credit(&self, volume: &Rc<Volume>, idle: bool) {
        let Some(ask) = volume.state.borrow_mut().credit.next_ask(idle) else { return };
        let (wb, volume) = (self.clone(), Rc::clone(volume));
        self.spawn(async move {
            match wb.reserve(&volume, ask.reset, ask.add_blocks, ask.drop_blocks).await {
                Ok(_) => {
                    let mut state = volume.state.borrow_mut();
                    state.is_reset_refused = false;
                    _ = state.credit.granted(ask.request);
                }
                // The next session sets the credit anew and replaces this request.
                Err(failure) if failure.reason == Reason::PeerAway => return,
                Err(failure) => {
                    wb.heed(&volume, &failure);
                    volume.state.borrow_mut().is_reset_refused |= ask.reset;
                    wb.exec().tell(wb.node(), || {
                        let waits: Vec<u64> =
                            volume.state.borrow().dirty.waiting().map(|w| w.lblk.0).collect();
                        format!("volume {}: {ask:?} is refused, {waits:?} wait", volume.id)
                    });
                    let is_full = failure.is_full();
                    if ask.reset && failure.reason == Reason::NoSpace {
                        wb.take_stored(&volume).await;
                    }
                    if ask.reset || !is_full {
                        wb.exec().sleep(wb.world.plan.retry_max_ms * MS).await;
                    }
                    let credit = &mut volume.state.borrow_mut().credit;
                    match is_full {
                        true => credit.refused(ask.request),
                        false => credit.put_off(ask.request),
                    };
                }
            }
            volume.changed.notify();
        });
    }

    /// Waits until the limits of dirty bytes let the write go on.
    async fn make_room(&self, volume: &Rc<Volume>, blocks: u64, deadline: u64) -> Outcome<()> {
        let bytes = blocks * BLOCK_BYTES;
        loop {
            let verdict = self.engine.throttle.borrow().decide(volume.id, bytes);
            match verdict {
                Verdict::Proceed => return Ok(()),
                Verdict::WriteOut => {
                    volume.changed.notify();
                    return Ok(());
                }
                Verdict::Delay(ms) => {
                    volume.changed.notify();
                    self.exec().sleep(ms * MS).await;
                    return Ok(());
                }
                Verdict::WaitForRoom => {
                    self.all().iter().for_each(|volume| volume.changed.notify());
                    volume.usable()?;
                    let look = || {
                        let verdict = self.engine.throttle.borrow().decide(volume.id, bytes);
                        (verdict != Verdict::WaitForRoom).then_some(())
                    };
                    let room = self.engine.room.wait(look);
                    if self.exec().until(deadline, room).await.is_none() {
                        return Err(Failure::new(Reason::Limit));
                    }
                }
            }
        }
    }

    /// Takes credit for as many blocks as the write may make dirty.
    async fn take_credit(&self, volume: &Rc<Volume>, wanted: u64, deadline: u64) -> Outcome<()> {
        loop {
            let look = |state: &mut super::State| {
                if let Some(gone) = state.gone {
                    return Some(Err(gone));
                }
                match state.credit.take(wanted) {
                    Take::Taken => Some(Ok(())),
                    Take::NoSpace => Some(Err(Failure::new(Reason::NoSpace))),
                    Take::Short => None,
                }
            };
            let first = look(&mut volume.state.borrow_mut());
            if let Some(outcome) = first {
                return outcome;
            }
            self.ask_credit(volume, false);
            let until = deadline.min(self.exec().now() + self.world.plan.retry_max_ms * MS);
            if let Some(outcome) = self.exec().until(until, volume.wait(look)).await {
                return outcome;
            }
            if self.exec().now() >= deadline {
                return Err(Failure::away());
            }
        }
    }

    /// Log first, then the cache. Returns how many blocks of credit were needed; `None`: the log stays full,
    /// and the stores are to take the write.
    async fn insert(
        &self,
        volume: &Rc<Volume>,
        blocks: LblkRange,
        whole: &[Block],
        end_bytes: u64,
        admission: Option<&Admission>,
        deadline: u64,
    ) -> Outcome<Option<u64>> {
        let bytes = to_bytes(whole);
        loop {
            volume.usable()?;
            let end_bytes = match self.world.planted(Planted::EndForgotten) {
                true => end_bytes,
                false => volume.state.borrow().dirty.end_of(blocks, end_bytes),
            };
            let record = WriteRecord {
                volume: volume.id,
                generation: volume.generation,
                blocks,
                end_bytes,
                request: admission.map(|admission| admission.key),
                result: bytes.len() as u64,
            };
            let is_skipped =
                self.world.planted(Planted::LogSkipsAppend) && blocks.start.0.is_multiple_of(8);
            let appended = match is_skipped {
                true => Ok(self.engine.log.last_lsn()),
                false => self.engine.log.append_write(&record, &[&bytes]),
            };
            let full_since = &self.engine.log_full_since;
            match appended {
                Ok(lsn) => {
                    full_since.set(None);
                    let used = self.put_into_cache(volume, blocks, lsn, end_bytes, whole);
                    return Ok(Some(used));
                }
                Err(CacheLogError::Full { .. } | CacheLogError::DiskFull) => {}
                Err(error) => return Err(self.log_failed(&error)),
            }
            self.want_everything_out();
            let now = self.exec().now();
            let since = full_since.get().unwrap_or(now);
            full_since.set(Some(since));
            // What may be sent again has its key in one record with its data, or none of both.
            if admission.is_none() && now - since >= LOG_FULL_PATIENCE {
                return Ok(None);
            }
            self.exec().sleep_until(deadline.min(self.exec().now() + 100 * MS)).await;
            if self.exec().now() >= deadline {
                return Err(Failure::new(Reason::Limit));
            }
        }
    }

    fn put_into_cache(
        &self,
        volume: &Volume,
        blocks: LblkRange,
        lsn: Lsn,
        end_bytes: u64,
        whole: &[Block],
    ) -> u64 {
        self.accepted(volume, blocks, whole);
        let mut state = volume.state.borrow_mut();
        let used = state.dirty.insert(blocks, lsn, end_bytes, whole.to_vec());
        let used = used.expect("as much data as blocks");
        state.credit.put_back(blocks.len - used);
        state.view.wrote_up_to(end_bytes);
        state.dirty_since.get_or_insert(self.exec().now());
        used
    }

    pub(super) fn accepted(&self, volume: &Volume, range: LblkRange, data: &[Block]) {
        let mut versions = self.world.versions.borrow_mut();
        for (lblk, block) in (range.start.0..).zip(data) {
            versions.accepted(volume.id, volume.generation, lblk, crc(block));
        }
    }

    /// Whole blocks: cells over what their blocks hold now. The lock of the blocks is held.
    pub(super) async fn merge(
        &self,
        volume: &Rc<Volume>,
        first: u64,
        cells: &[u64],
        deadline: u64,
    ) -> Outcome<Vec<Block>> {
        let end = first + cells.len() as u64;
        let (from, to) = (first / CELLS, end.div_ceil(CELLS));
        let mut whole = vec![ZEROES; (to - from) as usize];
        for edge in [
            (!first.is_multiple_of(CELLS)).then_some(from),
            (!end.is_multiple_of(CELLS)).then_some(to - 1),
        ] {
            let Some(edge) = edge else { continue };
            let held = self.read_blocks(volume, LblkRange::new(edge, 1), deadline).await?;
            whole[(edge - from) as usize] = held[0];
        }
        for (at, cell) in (first..).zip(cells) {
            whole[(at / CELLS - from) as usize][(at % CELLS) as usize] = *cell;
        }
        Ok(whole)
    }

    /// Trim, zeroing or allocation.
    pub async fn range(
        &self,
        volume: &Rc<Volume>,
        kind: RangeKind,
        first: u64,
        cells: u64,
        retry: Option<Retry>,
    ) -> Outcome<()> {
        let bytes = ByteRange { offset: first * CELL_BYTES, len: cells * CELL_BYTES };
        let deadline = self.deadline();
        let blocks = self.check(volume, bytes, false)?;
        let turn = self.turn(volume, blocks, retry, deadline).await?;
        let Some((admission, held)) = turn else { return Ok(()) };
        if kind == RangeKind::Allocate {
            self.change_map(volume, MapChange::Allocate, blocks, held, deadline).await?;
            self.note_done(admission, 0);
            return Ok(());
        }
        self.forget(volume, blocks, deadline).await?;
        let size = volume.state.borrow().view.size_bytes();
        let (inner, edges) = inner_and_edges(bytes, size);
        for edge in edges {
            self.zero_cells(volume, edge.offset / CELL_BYTES, edge.len / CELL_BYTES, deadline)
                .await?;
        }
        let change = match kind {
            RangeKind::Trim => MapChange::Trim,
            _ => MapChange::Zero,
        };
        if inner.len > 0 {
            self.change_map(volume, change, inner, held, deadline).await?;
        }
        self.note_done(admission, 0);
        Ok(())
    }

    /// Zeroes cells inside one block.
    pub(super) async fn zero_cells(
        &self,
        volume: &Rc<Volume>,
        first: u64,
        cells: u64,
        deadline: u64,
    ) -> Outcome<()> {
        let block = LblkRange::new(first / CELLS, 1);
        let held = self.read_blocks(volume, block, deadline).await?;
        if held[0] == ZEROES {
            return Ok(());
        }
        let zeroes = vec![0; cells as usize];
        let whole = self.merge(volume, first, &zeroes, deadline).await?;
        self.write_through(volume, block, whole, 0, deadline).await?;
        Ok(())
    }

    async fn change_map(
        &self,
        volume: &Rc<Volume>,
        change: MapChange,
        range: LblkRange,
        held: Held,
        deadline: u64,
    ) -> Outcome<()> {
        let (id, generation) = (volume.id, volume.generation);
        let make = |attempt| Call::ChangeMap { volume: id, generation, change, range, attempt };
        let changing = MapChanging::begin(self, volume, vec![range]);
        let (outcome, left, tries) = self.change(volume, make, deadline).await;
        if let Ok(ReplyBody::Changed { map_version, .. }) = &outcome {
            volume.state.borrow_mut().view.saw_map(*map_version);
        }
        if let Err(failure) = &outcome {
            self.heed(volume, failure);
        }
        match left {
            None => {
                self.world.tries_ended(volume.id, generation, &tries);
                changing.ended(Vec::new());
            }
            // A try without an answer may yet be carried out: nobody else has the blocks until then.
            Some(number) => {
                let (wb, volume) = (self.clone(), Rc::clone(volume));
                self.spawn(async move {
                    if wb.settle(&volume, number).await.is_some() {
                        wb.world.tries_ended(volume.id, generation, &tries);
                        changing.ended(Vec::new());
                    }
                    drop(held);
                });
            }
        }
        outcome.map(drop)
    }

    /// Waits until everything acknowledged before is converted, or in the data log.
    pub async fn fsync(&self, volume: &Rc<Volume>, cursor: &mut Cursor) -> Outcome<()> {
        let lsn = self.engine.log.last_lsn();
        let (is_pending, errors) = {
            let state = volume.state.borrow();
            (state.dirty.pending_up_to(lsn), state.error_count)
        };
        if is_pending {
            self.log_flush(volume, lsn).await;
        }
        let ended = volume.wait(|state| match state.gone {
            Some(gone) => Some(Err(gone)),
            None if state.error_count != errors => Some(Ok(())),
            None if !state.dirty.pending_up_to(lsn) => Some(Ok(())),
            None => None,
        });
        let patience = self.exec().now() + 2 * self.world.plan.io_timeout_ms * MS;
        match self.exec().until(patience, ended).await {
            Some(ended) => ended?,
            None => return Err(Failure::new(Reason::TimedOut)),
        }
        let mut state = volume.state.borrow_mut();
        let told = state.errors.check(cursor);
        let is_pending = state.dirty.pending_up_to(lsn);
        drop(state);
        match told {
            Some(failure) => {
                if failure.reason == Reason::LostWrites {
                    self.told_of_loss(volume, true);
                }
                Err(failure)
            }
            None if is_pending => Err(Failure::new(Reason::IoError)),
            None => {
                self.told_of_loss(volume, false);
                Ok(())
            }
        }
    }
}
