//! Write-out, in the background and on demand; the keeper of the log's size.

use std::rc::Rc;

use endio_state_machine::machine::{Completion, Lane};
use endio_state_machine::writeback::dirty::PickLimit;
use endio_state_machine::writeback::gather::Gathered;
use endio_types::{LblkRange, Reason};

use super::io_end::Job;
use super::{Failure, MapChanging, Outcome, State, Volume, Wb};
use crate::block::Block;
use crate::exec::MS;
use crate::world::Planted;

enum Next {
    WriteOut(Gathered<Block>),
    Wait(Option<u64>),
    Gone,
}

impl Wb {
    pub(super) fn want_everything_out(&self) {
        let last = self.engine.log.last_lsn();
        for volume in self.all() {
            let mut state = volume.state.borrow_mut();
            state.flush_up_to = state.flush_up_to.max(last);
            drop(state);
            volume.changed.notify();
        }
    }

    pub(super) async fn flush_for_ever(self, volume: Rc<Volume>) {
        loop {
            match self.next(&volume) {
                Next::WriteOut(gathered) => {
                    let (wb, volume) = (self.clone(), Rc::clone(&volume));
                    self.spawn(async move { _ = wb.write_out(&volume, gathered).await });
                }
                Next::Wait(until) => {
                    let mut is_first = true;
                    let woken = volume
                        .changed
                        .wait(move || (!std::mem::replace(&mut is_first, false)).then_some(()));
                    self.exec().until(until.unwrap_or(u64::MAX), woken).await;
                }
                Next::Gone => return self.clear(&volume).await,
            }
        }
    }

    fn next(&self, volume: &Rc<Volume>) -> Next {
        let plan = &self.world.plan;
        let now = self.exec().now();
        let mut state = volume.state.borrow_mut();
        if state.gone.is_some() {
            return Next::Gone;
        }
        if state.write_outs >= plan.write_outs {
            return Next::Wait(None);
        }
        if state.rest_until > now {
            return Next::Wait(Some(state.rest_until));
        }
        if state.credit.is_reset_pending() {
            let is_still = state.dirty.write_outs() == 0;
            drop(state);
            if is_still {
                self.ask_credit(volume, false);
            }
            return Next::Wait(None);
        }
        if state.dirty.is_clean() {
            drop(state);
            self.ask_credit(volume, true);
            return Next::Wait(None);
        }
        let blocks_max = plan.write_out_blocks;
        let up_to = Some(state.flush_up_to);
        let urgent = PickLimit { blocks_max, up_to, within: None };
        if let Some(gathered) = pick(volume, &mut state, urgent) {
            return Next::WriteOut(gathered);
        }
        let old_at = state.dirty_since.unwrap_or(now) + plan.write_out_after_ms * MS;
        if old_at <= now {
            state.flush_up_to = self.engine.log.last_lsn();
            state.dirty_since = Some(now);
            drop(state);
            return self.next(volume);
        }
        if self.engine.throttle.borrow().wants_write_out()
            && let Some(gathered) = pick(volume, &mut state, PickLimit::blocks(blocks_max))
        {
            return Next::WriteOut(gathered);
        }
        Next::Wait(Some(old_at))
    }

    /// Writes a range out and waits until it is clean. The lock of the range is held.
    pub(super) async fn flush_range(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        deadline: u64,
    ) -> Outcome<()> {
        let blocks_max = self.world.plan.write_out_blocks;
        let limit = PickLimit { blocks_max, up_to: None, within: Some(range) };
        loop {
            let gathered = {
                let mut state = volume.state.borrow_mut();
                let is_backed = !state.credit.is_reset_pending();
                is_backed.then(|| pick(volume, &mut state, limit)).flatten()
            };
            if let Some(gathered) = gathered {
                let (tell, told) = crate::exec::answer();
                let (wb, volume) = (self.clone(), Rc::clone(volume));
                self.spawn(async move { tell.send(wb.write_out(&volume, gathered).await) });
                told.await.unwrap_or(Err(Failure::away()))?;
                continue;
            }
            let errors = volume.state.borrow().error_count;
            let ended = volume.wait(|state| match () {
                () if state.gone.is_some() => Some(state.gone.map_or(Ok(false), Err)),
                () if !state.dirty.touches(range) => Some(Ok(true)),
                () if state.error_count != errors => Some(Ok(false)),
                () if state.credit.is_reset_pending() => None,
                () if state.dirty.can_pick(limit) => Some(Ok(false)),
                () => None,
            });
            match self.exec().until(deadline, ended).await {
                Some(Ok(true)) => return Ok(()),
                Some(Ok(false)) => {}
                Some(Err(gone)) => return Err(gone),
                None => return Err(Failure::new(Reason::TimedOut)),
            }
        }
    }

    /// Carries a write-out to its end: clean, or dirty again with the error noted.
    async fn write_out(&self, volume: &Rc<Volume>, gathered: Gathered<Block>) -> Outcome<()> {
        if gathered.blocks() == 0 {
            // The stores hold all of it, and nothing is left that it held together.
            return self.written_out(volume, &gathered, None);
        }
        let ranges = gathered.ranges();
        let changing = MapChanging::begin(self, volume, ranges.clone());
        let size_after_bytes = match volume.growable {
            true => volume.state.borrow_mut().view.size_after(gathered.end_bytes()),
            false => 0,
        };
        self.want_log_durable(gathered.max_lsn());
        let details: Vec<u64> = ranges.iter().flat_map(|at| [at.start.0, at.len]).collect();
        self.exec().note("write out", self.node(), &details);
        let job = Job {
            lane: Lane::WriteOut,
            ranges,
            data: gathered.data().copied().collect(),
            size_after_bytes,
            logged_up_to: gathered.logged_up_to(),
            deadline: self.deadline(),
            gate: (!self.world.planted(Planted::LogFirstOff)).then_some(gathered.max_lsn()),
        };
        match self.submit(volume, &job).await {
            Ok(written) => {
                let durable = self.engine.log.durable_lsn();
                if durable < gathered.max_lsn() {
                    let why = format!("{} of {:?} is converted", volume.name, gathered.max_lsn());
                    self.exec().fail(format!("log_first: {why}, the log ends at {durable:?}"));
                }
                // Before the blocks are clean: a read that misses the cache finds them.
                changing.ended(written.parts);
                self.written_out(volume, &gathered, Some(&written.done))
            }
            Err(failure) => {
                changing.ended(Vec::new());
                self.not_written_out(volume, failure);
                self.fall_back(volume, gathered);
                Err(failure)
            }
        }
    }

    fn written_out(
        &self,
        volume: &Volume,
        gathered: &Gathered<Block>,
        done: Option<&Completion>,
    ) -> Outcome<()> {
        let blocks = gathered.blocks();
        let mut state = volume.state.borrow_mut();
        state.write_outs -= 1;
        if let Some(done) = done {
            state.view.saw_size(done.map_version, done.size_bytes);
        }
        state.credit.consumed(blocks);
        state.rest_until = 0;
        let clean = gathered.complete(&mut state.dirty);
        let clean = clean.map_err(|_| Failure::new(Reason::WrongState))?;
        self.note_clean(volume, &mut state, &clean);
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        self.undirtied(volume.id, blocks);
        volume.changed.notify();
        Ok(())
    }

    fn not_written_out(&self, volume: &Volume, failure: Failure) {
        self.exec().note("write-out failed", self.node(), &[failure.reason as u64]);
        let mut state = volume.state.borrow_mut();
        // Nobody has refused the data: it waits for a promise of space, and is tried then.
        let is_unbacked = failure.reason == Reason::NoSpace && state.credit.is_reset_pending();
        if !is_unbacked {
            let is_kept = !self.world.planted(Planted::LossReplaced);
            state
                .errors
                .set_unless(failure, |untold| is_kept && untold.reason == Reason::LostWrites);
            state.error_count += 1;
            state.errors_set += 1;
        }
        state.rest_until = self.exec().now() + self.world.plan.retry_max_ms * MS;
        drop(state);
        self.heed(volume, &failure);
        volume.changed.notify();
    }

    /// The blocks of a write-out that failed are dirty again: while conversion is away, once the next
    /// session counts promises anew, for they may be converted, unheard.
    fn fall_back(&self, volume: &Rc<Volume>, gathered: Gathered<Block>) {
        if self.engine.link_up.get() || self.world.planted(Planted::DoubtIgnored) {
            return self.dirty_again(volume, &gathered);
        }
        let (wb, volume) = (self.clone(), Rc::clone(volume));
        self.spawn(async move {
            // Whoever ends the volume tells only those who wait for it.
            while !wb.engine.link_up.get() && volume.state.borrow().gone.is_none() {
                wb.exec().until(wb.exec().now() + MS, wb.up()).await;
            }
            wb.dirty_again(&volume, &gathered);
        });
    }

    fn dirty_again(&self, volume: &Volume, gathered: &Gathered<Block>) {
        let mut state = volume.state.borrow_mut();
        state.write_outs -= 1;
        let freed = gathered.fail(&mut state.dirty);
        state.credit.put_back(freed);
        // What is in the data log is wanted by no flush, and would wait for ever.
        if !self.world.planted(Planted::FailedNeverOld) {
            state.dirty_since.get_or_insert(self.exec().now());
        }
        drop(state);
        self.undirtied(volume.id, freed);
        volume.changed.notify();
    }

    /// The end of a volume here: what is dirty is of no use to anybody any more.
    async fn clear(&self, volume: &Volume) {
        self.note_loss(volume.id);
        volume.wait(|state| (state.write_outs == 0).then_some(())).await;
        let lost = {
            let mut state = volume.state.borrow_mut();
            if !state.is_pending() {
                // It was converted after all.
                self.world.let_go.borrow_mut().remove(&(self.at, volume.id));
            }
            let lost = state.dirty.waiting_blocks();
            state.dirty.discard(LblkRange::new(0, u64::MAX));
            lost
        };
        self.undirtied(volume.id, lost);
        self.forget_closed(volume).await;
    }

    pub(super) async fn keep_log_small(self) {
        loop {
            self.exec().sleep(50 * MS).await;
            let (used, bound) = self.engine.log.usage_bytes();
            if used <= 2 * self.world.plan.log.segment_bytes && used <= bound / 2 {
                continue;
            }
            if used > bound / 2 {
                self.want_everything_out();
            }
            let last = self.engine.log.last_lsn();
            let oldest =
                self.all().iter().filter_map(|v| v.state.borrow().dirty.oldest_lsn()).min();
            let oldest = oldest.filter(|_| !self.world.planted(Planted::TrimTooMuch));
            let oldest = oldest.unwrap_or_else(|| last.next());
            match self.engine.log.make_room(oldest) {
                Ok(_) => self.engine.room.notify(),
                Err(error) => _ = self.log_failed(&error),
            }
            self.engine.log_moved.notify();
        }
    }
}

/// Puts what the limit allows under writeback.
fn pick(volume: &Volume, state: &mut State, limit: PickLimit) -> Option<Gathered<Block>> {
    let gathered = Gathered::pick(&mut state.dirty, limit, volume.in_place)?;
    state.write_outs += 1;
    Some(gathered)
}
