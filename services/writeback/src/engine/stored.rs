//! Dirty blocks that the stores hold already: of a conversion whose end this writeback never heard,
//! or forgot. They want space a second time, which full stores cannot promise.

use std::collections::BTreeMap;
use std::sync::Arc;

use endio_api::common::Extent;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::Waiting;
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, LblkRange, Reason, VOLUME_BYTES_MAX};

use super::Engine;
use super::read::{Piece, READ_BLOCKS_MAX};
use crate::failure::Failure;
use crate::volume::{CachedBlock, Volume};

/// Neighbouring blocks that wait.
type Neighbours = Vec<Waiting<CachedBlock>>;

impl Engine {
    /// Takes as clean what the stores hold already, and frees its credit. Asked for when a promise
    /// for all that is dirty was refused: then no write-out is under way, and none begins, so the
    /// map does not change.
    ///
    /// The map's checksum picks the blocks, and their bytes decide.
    pub(super) async fn take_stored(self: &Arc<Self>, volume: &Arc<Volume>) {
        let (ticket, runs) = {
            let state = volume.state();
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
            match found {
                Ok(same) => stored.extend(same),
                // It stays dirty.
                Err(error) => {
                    tracing::warn!(volume = %volume.name, %error, "dirty data not compared")
                }
            }
        }
        // Whoever opens the volume next takes what the data log has, which may be older than what is
        // dirty here: it ends only with a conversion.
        if !is_logged.is_empty() {
            // Only which blocks it has is of interest, and the size may change meanwhile.
            let (open, end_bytes) = ((volume.id, volume.generation), VOLUME_BYTES_MAX);
            match self.read_log_of(&volume.name, open, end_bytes).await {
                Ok(logged) => stored.retain(|lblk, _| !logged.contains_key(lblk)),
                Err(error) => {
                    tracing::warn!(volume = %volume.name, %error, "the data log was not read");
                    stored.retain(|lblk, _| !is_logged.contains(lblk));
                }
            }
        }
        // A flush of it is over with this: an older record must not come back after a power loss.
        let newest = stored.values().max().filter(|_| !volume.in_place).copied();
        if let Some(newest) = newest
            && let Err(error) = self.log.durable(newest).await
        {
            tracing::warn!(volume = %volume.name, %error, "the cache log is not durable");
            return;
        }
        // Under a later session the answers say nothing; it sets the map's memory back, too.
        if self.session.link().epoch.is_none() {
            return;
        }
        let mut state = volume.state();
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
        state.credit.put_back(blocks);
        // What is kept is not clean in the log: a replay needs it, to hold a write together.
        match self.log.append_clean(volume.id, &settled.clean) {
            Ok(lsn) => state.last_clean = state.last_clean.max(lsn),
            // The next replay finds them once more.
            Err(error) => tracing::error!(volume = %volume.name, %error, "cache log"),
        }
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        let bytes = blocks * BLOCK_BYTES;
        tracing::info!(volume = %volume.name, bytes, "dirty data was converted already");
        self.undirtied(volume.id, blocks);
        volume.changed();
    }

    /// The blocks of a run that have places.
    async fn in_the_map(
        &self,
        volume: &Arc<Volume>,
        run: &Neighbours,
    ) -> Result<Vec<(u64, Lsn)>, Failure> {
        let Some(first) = run.first() else { return Ok(Vec::new()) };
        let range = LblkRange::new(first.lblk.0, run.len() as u64);
        let found = self.look_up(volume, range, self.deadline()).await?;
        let has_place = |waiting: &&Waiting<CachedBlock>| {
            let block = LblkRange::new(waiting.lblk.0, 1);
            let at = |extent: &Extent| LblkRange::new(extent.lblk, extent.blocks.into());
            found.extents.iter().any(|extent| at(extent).overlaps(block))
        };
        Ok(run.iter().filter(has_place).map(|waiting| (waiting.lblk.0, waiting.lsn)).collect())
    }

    /// The blocks of a run that the map shows with the same bytes, and the record of each.
    async fn compare(
        &self,
        volume: &Arc<Volume>,
        run: &Neighbours,
    ) -> Result<Vec<(u64, Lsn)>, Failure> {
        let Some(first) = run.first() else { return Ok(Vec::new()) };
        let _registered = volume.read_begins();
        let range = LblkRange::new(first.lblk.0, run.len() as u64);
        let (_, grant, map) = self.learn(volume, range, self.deadline()).await?;
        let mut same = Vec::new();
        for waiting in run {
            let block = LblkRange::new(waiting.lblk.0, 1);
            let Some((_, extent)) = map.iter().find(|(part, _)| part.overlaps(block)) else {
                continue;
            };
            let data = &waiting.data.data;
            let is_same = match extent {
                None => data.iter().all(|byte| *byte == 0),
                Some(extent) => {
                    let at = usize::try_from(block.start.0 - extent.lblk).unwrap_or(usize::MAX);
                    let is_likely = extent.crc32c.get(at) == Some(&crc32c::crc32c(data));
                    is_likely && {
                        match self.read_extent(volume, &grant, block, extent).await {
                            Ok(found) => {
                                matches!(found.piece, Piece::Data(found) if found == *data)
                            }
                            // That one is dirty still, and the only good copy.
                            Err(failure) if failure.reason == Reason::ChecksumMismatch => false,
                            Err(failure) => return Err(failure),
                        }
                    }
                }
            };
            if is_same && data.len() == BLOCK_SIZE {
                same.push((block.start.0, waiting.lsn));
            }
        }
        Ok(same)
    }
}

/// Cuts what waits into runs of neighbours.
fn runs(waiting: impl Iterator<Item = Waiting<CachedBlock>>) -> Vec<Neighbours> {
    let mut runs: Vec<Neighbours> = Vec::new();
    for block in waiting {
        let is_next = |run: &&mut Neighbours| {
            let ends_before = run.last().is_some_and(|last| last.lblk.0 + 1 == block.lblk.0);
            ends_before && (run.len() as u64) < READ_BLOCKS_MAX
        };
        match runs.last_mut().filter(is_next) {
            Some(run) => run.push(block),
            None => runs.push(vec![block]),
        }
    }
    runs
}
