//! Writes through an io_end of their own, or one that several share; and what is written anew with the data
//! that it has.

use std::rc::Rc;

use endio_state_machine::machine::{Completion, Lane};
use endio_state_machine::writeback::groups::{joined, may_join};
use endio_types::LblkRange;

use super::io_end::Job;
use super::read::UnderWay;
use super::{Failure, MapChanging, Outcome, Volume, Wb};
use crate::block::Block;
use crate::exec::{Answer, MS, answer};
use crate::world::Planted;

/// Most blocks that are written anew at once.
const WINDOW_BLOCKS_MAX: u64 = 8;

/// A direct write on its way into an io_end.
#[derive(Clone)]
struct Direct {
    range: LblkRange,
    data: Vec<Block>,
    end_bytes: u64,
    deadline: u64,
}

/// A write, and who waits for it.
pub(super) struct Waiting(Direct, Answer<Outcome<Completion>>);

impl Wb {
    /// A write of whole blocks through an io_end. The lock of the blocks is held, and cache and log
    /// hold nothing of them.
    pub(super) async fn write_through(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        data: Vec<Block>,
        end_bytes: u64,
        deadline: u64,
    ) -> Outcome<Completion> {
        self.accepted(volume, range, &data);
        let direct = Direct { range, data, end_bytes, deadline };
        let is_shared = self.world.plan.shares_io_ends && !volume.in_place;
        match is_shared && may_join(range) {
            true => self.write_in_group(volume, direct).await,
            false => self.write_alone(volume, direct).await,
        }
    }

    async fn write_in_group(&self, volume: &Rc<Volume>, direct: Direct) -> Outcome<Completion> {
        let (tell, told) = answer();
        let (range, waiting) = (direct.range, Waiting(direct, tell));
        let leads = volume.state.borrow_mut().direct_groups.push(range, waiting);
        if leads {
            let (wb, volume) = (self.clone(), Rc::clone(volume));
            self.spawn(async move {
                loop {
                    let group = volume.state.borrow_mut().direct_groups.take();
                    if group.is_empty() {
                        return;
                    }
                    let group = group.into_iter().map(|(_, waiting)| waiting).collect();
                    wb.write_group(&volume, group).await;
                }
            });
        }
        told.await.unwrap_or(Err(Failure::away()))
    }

    async fn write_group(&self, volume: &Rc<Volume>, group: Vec<Waiting>) {
        self.exec().note("group", self.node(), &[volume.id.0, group.len() as u64]);
        let writes = || group.iter().map(|Waiting(direct, _)| direct);
        let ranges = joined(writes().map(|direct| direct.range));
        let data = writes().flat_map(|direct| direct.data.clone()).collect();
        let end_bytes = writes().map(|direct| direct.end_bytes).max().unwrap_or(0);
        let deadline = writes().map(|direct| direct.deadline).min().unwrap_or(0);
        let together = self.write_ranges(volume, ranges, data, end_bytes, deadline).await;
        let failure = match together {
            Err(failure) if group.len() > 1 && volume.usable().is_ok() => failure,
            outcome => {
                group.into_iter().for_each(|Waiting(_, tell)| tell.send(outcome.clone()));
                return;
            }
        };
        // What is wrong with one write is told to that one only.
        let mut alone = Vec::new();
        for Waiting(direct, tell) in group {
            let (done, is_done) = answer();
            let (wb, volume) = (self.clone(), Rc::clone(volume));
            self.spawn(async move {
                let outcome = wb.write_alone(&volume, direct).await;
                // What they tried together may be converted all the same.
                let doubt =
                    |alone: Failure| Failure { doubt: alone.doubt.or(failure.doubt), ..alone };
                tell.send(outcome.map_err(doubt));
                done.send(());
            });
            alone.push(is_done);
        }
        for is_done in alone {
            is_done.await;
        }
    }

    async fn write_alone(&self, volume: &Rc<Volume>, direct: Direct) -> Outcome<Completion> {
        let Direct { range, data, end_bytes, deadline } = direct;
        self.write_ranges(volume, vec![range], data, end_bytes, deadline).await
    }

    async fn write_ranges(
        &self,
        volume: &Rc<Volume>,
        ranges: Vec<LblkRange>,
        data: Vec<Block>,
        end_bytes: u64,
        deadline: u64,
    ) -> Outcome<Completion> {
        let size_after_bytes = match volume.growable {
            true => volume.state.borrow_mut().view.size_after(end_bytes),
            false => 0,
        };
        let changing = MapChanging::begin(self, volume, ranges.clone());
        let logged_up_to = volume.state.borrow().dirty.log_number();
        let lane = Lane::Direct;
        let job = Job { lane, ranges, data, size_after_bytes, logged_up_to, deadline, gate: None };
        let (outcome, parts) = match self.submit(volume, &job).await {
            Ok(written) => (Ok(written.done), written.parts),
            Err(failure) => (Err(failure), Vec::new()),
        };
        // Before anybody is told: whoever saw the write end reads it.
        changing.ended(parts);
        match &outcome {
            Ok(done) => {
                let mut state = volume.state.borrow_mut();
                state.view.saw_size(done.map_version, done.size_bytes);
            }
            Err(failure) => self.heed(volume, failure),
        }
        volume.changed.notify();
        outcome
    }

    /// Writes windows of the volume anew with the data that they have, as the service does with those that
    /// lie in many pieces.
    pub(super) async fn rewrite_for_ever(self, volume: Rc<Volume>) {
        let mean = self.world.plan.rewrite_ms;
        while !self.world.is_healed.get() {
            self.exec().sleep(self.exec().between(1, 2 * mean) * MS).await;
            if volume.usable().is_err() {
                return;
            }
            let rewritten = self.rewrite(&volume).await;
            self.exec().note("anew", self.node(), &[volume.id.0, rewritten.unwrap_or(0)]);
        }
    }

    /// Writes one window anew; says how many blocks.
    async fn rewrite(&self, volume: &Rc<Volume>) -> Outcome<u64> {
        let deadline = self.deadline();
        let end = volume.state.borrow().view.mapped_end();
        if end == 0 {
            return Ok(0);
        }
        let first = self.exec().below(end);
        let most = WINDOW_BLOCKS_MAX.min(end - first);
        let window = LblkRange::new(first, self.exec().between(1, most));
        let held = volume.locks.acquire(window);
        // Nobody waits for a client here.
        if self.exec().until(0, held.held()).await.is_none() {
            return Ok(0);
        }
        let held = (!self.world.planted(Planted::RewriteUnlocked)).then_some(held);
        if volume.state.borrow().dirty.touches(window) {
            return Ok(0);
        }
        let mapped: Vec<LblkRange> = {
            let _registered = UnderWay::begin(volume);
            let (_, _, map) = self.learn(volume, window, deadline).await?;
            let written = map.iter().filter(|(_, extent)| extent.is_some());
            written.filter_map(|(part, _)| part.intersection(window)).collect()
        };
        let ranges = joined(mapped);
        let mut data = Vec::new();
        for range in &ranges {
            data.extend(self.read_blocks(volume, *range, deadline).await?);
        }
        if data.is_empty() {
            return Ok(0);
        }
        // No older version of a block may come back from the cache log.
        self.forget(volume, window, deadline).await?;
        let mut at = 0;
        for range in &ranges {
            self.accepted(volume, *range, &data[at..at + range.len as usize]);
            at += range.len as usize;
        }
        let blocks = data.len() as u64;
        self.write_ranges(volume, ranges, data, 0, deadline).await?;
        drop(held);
        Ok(blocks)
    }
}
