//! Reads: the dirty cache over the map, the map over the stores.

use std::collections::BTreeMap;
use std::rc::Rc;

use endio_state_machine::chunk::ExtentState;
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::token::ReadGrant;
use endio_types::{BLOCK_BYTES, LblkRange, MapVersion, Pblk, Reason};

use super::{Failure, Outcome, Volume, Wb};
use crate::block::{Block, CELLS, ZEROES};
use crate::exec::MS;
use crate::net::Message;

/// A read that is registered; dropping it ends it.
struct UnderWay {
    volume: Rc<Volume>,
    version: MapVersion,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut state = self.volume.state.borrow_mut();
        if let Some(count) = state.reads.get_mut(&self.version) {
            *count -= 1;
            if *count == 0 {
                state.reads.remove(&self.version);
            }
        }
    }
}

impl Wb {
    /// Reads cells from cell `first` on.
    pub async fn read(&self, volume: &Rc<Volume>, first: u64, cells: u64) -> Outcome<Vec<u64>> {
        let bytes = (first + cells) * BLOCK_BYTES / CELLS;
        if bytes > volume.state.borrow().size_bytes {
            return Err(Failure::new(Reason::OutOfRange));
        }
        let (from, to) = (first / CELLS, (first + cells).div_ceil(CELLS));
        let range = LblkRange::new(from, to - from);
        let blocks = self.read_blocks(volume, range, self.deadline()).await?;
        let all: Vec<u64> = blocks.into_iter().flatten().collect();
        let skip = (first - from * CELLS) as usize;
        Ok(all[skip..skip + cells as usize].to_vec())
    }

    pub(super) async fn read_blocks(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        deadline: u64,
    ) -> Outcome<Vec<Block>> {
        let mut pause_ms = 1;
        loop {
            let failure = match self.try_read(volume, range, deadline).await {
                Ok(blocks) => return Ok(blocks),
                Err(failure) => failure,
            };
            volume.usable()?;
            let passes = matches!(
                failure.reason,
                Reason::OldEpoch
                    | Reason::OldGeneration
                    | Reason::PeerAway
                    | Reason::NotReady
                    | Reason::Draining
                    | Reason::Limit
                    | Reason::ForgedToken
            );
            let pause = pause_ms * MS;
            if !passes || self.exec().now() + pause >= deadline {
                return Err(failure);
            }
            self.exec().sleep(pause).await;
            pause_ms = (pause_ms * 2).min(self.world.plan.retry_max_ms);
        }
    }

    async fn try_read(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        deadline: u64,
    ) -> Outcome<Vec<Block>> {
        let _registered = {
            let mut state = volume.state.borrow_mut();
            let version = state.map_version;
            *state.reads.entry(version).or_default() += 1;
            UnderWay { volume: Rc::clone(volume), version }
        };
        let mut found: BTreeMap<u64, Block> = BTreeMap::new();
        {
            let state = volume.state.borrow();
            for (lblk, block) in state.dirty.read_range(range) {
                found.insert(lblk.0, *block);
            }
            let mapped_end = state.durable_size_bytes.div_ceil(BLOCK_BYTES);
            for lblk in mapped_end.max(range.start.0)..range.end() {
                found.entry(lblk).or_insert(ZEROES);
            }
        }
        let missing: Vec<u64> =
            (range.start.0..range.end()).filter(|lblk| !found.contains_key(lblk)).collect();
        if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
            let hull = LblkRange::new(*first, last + 1 - first);
            let map = self.look_up(volume, hull, deadline).await?;
            let grant = map.grant.ok_or(Failure::new(Reason::OldGeneration))?;
            if self.exec().chance(self.world.plan.slow_read) {
                self.exec().sleep(self.exec().below(20 * MS)).await;
            }
            for extent in map.extents.iter().filter(|e| e.state == ExtentState::Written) {
                let wanted: Vec<u64> = missing
                    .iter()
                    .copied()
                    .filter(|lblk| *lblk >= extent.range.start.0 && *lblk < extent.range.end())
                    .collect();
                for part in runs(&wanted) {
                    let blocks = self.read_extent(&grant, part, extent).await?;
                    found.extend((part.start.0..).zip(blocks));
                }
            }
        }
        Ok((range.start.0..range.end())
            .map(|lblk| found.get(&lblk).copied().unwrap_or(ZEROES))
            .collect())
    }

    /// Reads a part of a written extent, from one replica after the other.
    async fn read_extent(
        &self,
        grant: &ReadGrant,
        part: LblkRange,
        extent: &MapExtent,
    ) -> Outcome<Vec<Block>> {
        let skip = part.start.0 - extent.range.start.0;
        let (from, to) = (skip as usize, (skip + part.len) as usize);
        let crcs = extent.crcs.get(from..to).unwrap_or_default().to_vec();
        let places = extent.places.as_slice();
        let turn = self.exec().below(places.len() as u64) as usize;
        let mut worst: Option<Failure> = None;
        for place in places.iter().cycle().skip(turn).take(places.len()) {
            let request = self.engine.next_request.get() + 1;
            self.engine.next_request.set(request);
            let message = Message::Read {
                request,
                grant: *grant,
                pblk: Pblk(place.pblk.0 + skip),
                blocks: part.len,
                crcs: crcs.clone(),
            };
            let patience = self.exec().now() + self.world.plan.call_timeout_ms * MS;
            let outcome = match self.hand_over(place.store, message) {
                Err(failure) => Err(failure.reason),
                Ok(done) => match self.exec().until(patience, done).await {
                    Some(Some(outcome)) => outcome,
                    _ => Err(Reason::PeerAway),
                },
            };
            match outcome {
                Ok(blocks) if blocks.len() as u64 == part.len => return Ok(blocks),
                Ok(_) => worst = worst.or(Some(Failure::new(Reason::IoError))),
                Err(reason) => {
                    if worst.is_none_or(|worst| worst.reason == Reason::ChecksumMismatch) {
                        worst = Some(Failure::new(reason));
                    }
                }
            }
        }
        Err(worst.unwrap_or(Failure::new(Reason::IoError)))
    }
}

/// Runs of consecutive numbers.
fn runs(blocks: &[u64]) -> Vec<LblkRange> {
    let mut runs: Vec<LblkRange> = Vec::new();
    for lblk in blocks {
        match runs.last_mut() {
            Some(last) if last.end() == *lblk => last.len += 1,
            _ => runs.push(LblkRange::new(*lblk, 1)),
        }
    }
    runs
}
