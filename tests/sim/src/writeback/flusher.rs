//! Write-out, in the background and on demand; the keeper of the log's size.

use std::rc::Rc;

use endio_state_machine::machine::{Completion, Lane};
use endio_state_machine::writeback::dirty::{PickLimit, Picked};
use endio_types::{LblkRange, Reason};

use super::io_end::Job;
use super::{Failure, Outcome, Volume, Wb};
use crate::block::Block;
use crate::exec::MS;
use crate::world::Planted;

enum Next {
    WriteOut(Picked<Block>),
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
                Next::WriteOut(picked) => {
                    let (wb, volume) = (self.clone(), Rc::clone(&volume));
                    self.spawn(async move { _ = wb.write_out(&volume, picked).await });
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
        if state.dirty.write_outs() >= plan.write_outs {
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
        if let Some(picked) = state.dirty.pick(PickLimit { blocks_max, up_to, within: None }) {
            return Next::WriteOut(picked);
        }
        let old_at = state.dirty_since.unwrap_or(now) + plan.write_out_after_ms * MS;
        if old_at <= now {
            state.flush_up_to = self.engine.log.last_lsn();
            state.dirty_since = Some(now);
            drop(state);
            return self.next(volume);
        }
        if self.engine.throttle.borrow().wants_write_out()
            && let Some(picked) = state.dirty.pick(PickLimit::blocks(blocks_max))
        {
            return Next::WriteOut(picked);
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
            let picked = {
                let mut state = volume.state.borrow_mut();
                let is_backed = !state.credit.is_reset_pending();
                is_backed.then(|| state.dirty.pick(limit)).flatten()
            };
            if let Some(picked) = picked {
                let (tell, told) = crate::exec::answer();
                let (wb, volume) = (self.clone(), Rc::clone(volume));
                self.spawn(async move { tell.send(wb.write_out(&volume, picked).await) });
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

    /// Carries one pick to its end: clean, or dirty again with the error noted.
    async fn write_out(&self, volume: &Rc<Volume>, picked: Picked<Block>) -> Outcome<()> {
        let size_after_bytes = match volume.growable {
            true => volume.state.borrow().size_after(picked.end_bytes),
            false => 0,
        };
        let job = Job {
            lane: Lane::WriteOut,
            range: picked.range,
            data: picked.data.clone(),
            size_after_bytes,
            deadline: self.deadline(),
            gate: (!self.world.planted(Planted::LogFirstOff)).then_some(picked.max_lsn),
        };
        let (start, len) = (picked.range.start.0, picked.range.len);
        self.exec().note("write out", self.node(), &[start, len]);
        match self.submit(volume, &job).await {
            Ok(done) => self.written_out(volume, &picked, &done),
            Err(failure) => {
                self.not_written_out(volume, &picked, failure);
                Err(failure)
            }
        }
    }

    fn written_out(
        &self,
        volume: &Volume,
        picked: &Picked<Block>,
        done: &Completion,
    ) -> Outcome<()> {
        let mut state = volume.state.borrow_mut();
        state.saw_size(done.map_version, done.size_bytes);
        state.credit.consumed(picked.range.len);
        state.rest_until = 0;
        let completed = state.dirty.complete(picked.io);
        let completed = completed.map_err(|_| Failure::new(Reason::WrongState))?;
        match self.engine.log.append_clean(volume.id, &completed.runs) {
            Ok(lsn) => state.last_clean = state.last_clean.max(lsn),
            Err(error) => _ = self.log_failed(&error),
        }
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        self.undirtied(volume.id, picked.range.len);
        volume.changed.notify();
        Ok(())
    }

    fn not_written_out(&self, volume: &Volume, picked: &Picked<Block>, failure: Failure) {
        self.exec().note("write-out failed", self.node(), &[failure.reason as u64]);
        let mut state = volume.state.borrow_mut();
        let freed = state.dirty.fail(picked.io).map_or(0, |failed| failed.credit_freed_blocks);
        state.credit.put_back(freed);
        state.errors.set(failure);
        state.error_count += 1;
        state.errors_set += 1;
        state.rest_until = self.exec().now() + self.world.plan.retry_max_ms * MS;
        drop(state);
        self.undirtied(volume.id, freed);
        self.heed(volume, &failure);
        volume.changed.notify();
    }

    /// The end of a volume here: what is dirty is of no use to anybody any more.
    async fn clear(&self, volume: &Volume) {
        volume.wait(|state| (state.dirty.write_outs() == 0).then_some(())).await;
        let lost = {
            let mut state = volume.state.borrow_mut();
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
            let oldest = oldest.unwrap_or_else(|| last.next());
            if used > bound / 2
                && let Err(error) = self.engine.log.rotate()
            {
                self.log_failed(&error);
            }
            match self.engine.log.trim(oldest) {
                Ok(_) => self.engine.room.notify(),
                Err(error) => _ = self.log_failed(&error),
            }
            self.engine.log_moved.notify();
        }
    }
}
