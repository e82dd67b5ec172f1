//! Dirty blocks that the stores hold already: see `dirty/stored.rs` of the state machine.

use std::collections::BTreeMap;
use std::rc::Rc;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::Waiting;
use endio_types::{LblkRange, Reason, VOLUME_BYTES_MAX};

use super::read::UnderWay;
use super::{Outcome, Volume, Wb};
use crate::block::{Block, ZEROES, crc};
use crate::world::Planted;

/// Most blocks that are compared at once.
const BLOCKS_MAX: u64 = 256;

impl Wb {
    /// Takes as clean what the stores hold already, and frees its credit. Asked for when a promise
    /// for all that is dirty was refused: then no write-out is under way, and none begins.
    pub(super) async fn take_stored(&self, volume: &Rc<Volume>) {
        let (ticket, runs) = {
            let state = volume.state.borrow();
            if state.dirty.write_outs() > 0 {
                return;
            }
            (state.map.ticket(), runs(state.dirty.waiting()))
        };
        let is_logged = runs.iter().flatten().filter(|waiting| waiting.is_logged);
        let is_logged: Vec<u64> = is_logged.map(|waiting| waiting.lblk.0).collect();
        let ends = runs.iter().flatten().map(|waiting| (waiting.lblk.0, waiting.end_bytes));
        let ends: BTreeMap<u64, u64> = ends.collect();
        let mut stored = BTreeMap::new();
        for run in runs {
            let found = match volume.in_place {
                true => self.in_the_map(volume, &run).await,
                false => self.compare(volume, &run).await,
            };
            // What cannot be read now stays dirty.
            stored.extend(found.unwrap_or_default());
        }
        // Whoever opens the volume next takes what the data log has, which may be older than what is
        // dirty here: it ends only with a conversion.
        if !is_logged.is_empty() && !self.world.planted(Planted::StoredThoughLogged) {
            let open = (volume.id, volume.generation);
            match self.read_log_of(open, VOLUME_BYTES_MAX).await {
                Ok(logged) => stored.retain(|lblk, _| !logged.contains_key(lblk)),
                Err(_) => stored.retain(|lblk, _| !is_logged.contains(lblk)),
            }
        }
        // A flush of it is over with this: an older record must not come back after a power loss.
        let newest = stored.values().max().filter(|_| !volume.in_place).copied();
        if let Some(newest) = newest
            && self.log_durable(newest).await.is_err()
        {
            return;
        }
        // Under a later session the answers say nothing.
        if !self.engine.link_up.get() {
            return;
        }
        let mut state = volume.state.borrow_mut();
        stored.retain(|lblk, _| state.map.is_current(ticket, LblkRange::new(*lblk, 1)));
        if volume.in_place {
            // Nobody can tell what of them is durable: they stay dirty, and want no space.
            state.credit.excuse(stored.len() as u64);
            return;
        }
        // What makes the volume longer is not converted, whatever the blocks hold.
        let size = state.view.durable_size_bytes();
        stored.retain(|lblk, _| ends.get(lblk).is_some_and(|end| *end <= size));
        let settled = state.dirty.take_stored(&stored);
        let blocks = settled.credit_freed_blocks;
        if blocks == 0 {
            return;
        }
        let kept = settled.kept.len() as u64;
        self.exec().note("stored already", self.node(), &[volume.id.0, blocks, kept]);
        let kept = settled.kept.iter().map(|lblk| LblkRange::new(lblk.0, 1));
        let taken = settled.clean.iter().map(|run| run.range).chain(kept);
        if let Err(why) = self.world.may_be_stored(volume.id, taken) {
            self.exec().fail(why);
        }
        state.credit.put_back(blocks);
        // What is kept is not clean in the log: a replay needs it, to hold a write together.
        self.note_clean(volume, &mut state, &settled.clean);
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        self.undirtied(volume.id, blocks);
        volume.changed.notify();
    }

    /// The blocks of a run that have places.
    async fn in_the_map(
        &self,
        volume: &Rc<Volume>,
        run: &[Waiting<Block>],
    ) -> Outcome<Vec<(u64, Lsn)>> {
        let Some(first) = run.first() else { return Ok(Vec::new()) };
        let range = LblkRange::new(first.lblk.0, run.len() as u64);
        let found = self.look_up(volume, range, self.deadline()).await?;
        let has_place = |waiting: &&Waiting<Block>| {
            let block = LblkRange::new(waiting.lblk.0, 1);
            found.extents.iter().any(|extent| extent.range.overlaps(block))
        };
        Ok(run.iter().filter(has_place).map(|waiting| (waiting.lblk.0, waiting.lsn)).collect())
    }

    /// The blocks of a run that the map shows with the same bytes.
    async fn compare(
        &self,
        volume: &Rc<Volume>,
        run: &[Waiting<Block>],
    ) -> Outcome<Vec<(u64, Lsn)>> {
        let Some(first) = run.first() else { return Ok(Vec::new()) };
        let _registered = UnderWay::begin(volume);
        let deadline = self.deadline();
        let range = LblkRange::new(first.lblk.0, run.len() as u64);
        let (_, grant, map) = self.learn(volume, range, deadline).await?;
        let mut same = Vec::new();
        for waiting in run {
            let block = LblkRange::new(waiting.lblk.0, 1);
            let Some((_, extent)) = map.iter().find(|(part, _)| part.overlaps(block)) else {
                continue;
            };
            let is_same = match extent {
                None => waiting.data == ZEROES,
                Some(extent) => {
                    let at = (block.start.0 - extent.range.start.0) as usize;
                    let is_likely = extent.crcs.get(at) == Some(&crc(&waiting.data));
                    is_likely && {
                        match self.read_extent(volume, &grant, block, extent).await {
                            Ok(found) => found == [waiting.data],
                            // That one is dirty still, and the only good copy.
                            Err(failure) if failure.reason == Reason::ChecksumMismatch => false,
                            Err(failure) => return Err(failure),
                        }
                    }
                }
            };
            if is_same {
                same.push((block.start.0, waiting.lsn));
            }
        }
        Ok(same)
    }
}

/// Cuts what waits into runs of neighbours.
fn runs(waiting: impl Iterator<Item = Waiting<Block>>) -> Vec<Vec<Waiting<Block>>> {
    let mut runs: Vec<Vec<Waiting<Block>>> = Vec::new();
    for block in waiting {
        match runs.last_mut() {
            Some(run)
                if run.len() < BLOCKS_MAX as usize
                    && run.last().is_some_and(|last| last.lblk.0 + 1 == block.lblk.0) =>
            {
                run.push(block);
            }
            _ => runs.push(vec![block]),
        }
    }
    runs
}
