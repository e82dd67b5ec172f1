//! Reads: the dirty cache over the map, the map over the stores.

use std::rc::Rc;

use endio_state_machine::chunk::ExtentState;
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::token::ReadGrant;
use endio_state_machine::writeback::block_cache::Admission;
use endio_state_machine::writeback::cover::{gaps, parts};
use endio_state_machine::writeback::map_cache::{Part, Ticket};
use endio_types::{BLOCK_BYTES, Lblk, LblkRange, MapVersion, Pblk, Reason};

use super::{ALONE, Failure, Outcome, State, Volume, Wb};
use crate::block::{Block, CELLS, ZEROES, crc};
use crate::exec::MS;
use crate::net::Message;
use crate::world::{Planted, Reading};

/// Parts of a range with the written extent that holds them; none: they read as zeroes.
type Map = Vec<Part<Rc<MapExtent>>>;

/// A read that is registered; dropping it ends it.
pub(super) struct UnderWay {
    volume: Rc<Volume>,
    version: MapVersion,
}

impl UnderWay {
    pub(super) fn begin(volume: &Rc<Volume>) -> Self {
        let version = volume.state.borrow_mut().view.read_begins();
        Self { volume: Rc::clone(volume), version }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.volume.state.borrow_mut().view.read_ends(self.version);
    }
}

impl Wb {
    /// Reads cells from cell `first` on.
    pub async fn read(&self, volume: &Rc<Volume>, first: u64, cells: u64) -> Outcome<Vec<u64>> {
        let bytes = (first + cells) * BLOCK_BYTES / CELLS;
        if bytes > volume.state.borrow().view.size_bytes() {
            return Err(Failure::new(Reason::OutOfRange));
        }
        let (from, to) = (first / CELLS, (first + cells).div_ceil(CELLS));
        let range = LblkRange::new(from, to - from);
        let blocks = match at_hand(volume, range) {
            Some(blocks) => blocks,
            None => self.read_blocks(volume, range, self.deadline()).await?,
        };
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
        let mut trusts_cache = true;
        loop {
            let failure = match self.try_read(volume, range, &mut trusts_cache, deadline).await {
                Ok(blocks) => return Ok(blocks),
                Err(failure) => failure,
            };
            volume.usable()?;
            if std::mem::take(&mut trusts_cache) {
                // Whatever is wrong with the blocks, first of all they must be the right ones.
                let mut state = volume.state.borrow_mut();
                state.map.forget(range);
                state.clean.forget(ALONE, range);
                continue;
            }
            let passes = matches!(
                failure.reason,
                Reason::OldEpoch
                    | Reason::OldGeneration
                    | Reason::PeerAway
                    | Reason::NotReady
                    | Reason::Draining
                    | Reason::Limit
                    | Reason::ForgedToken
                    | Reason::LeaseExpired
            );
            let pause = pause_ms * MS;
            if !passes || self.exec().now() + pause >= deadline {
                return Err(failure);
            }
            volume.state.borrow_mut().grant = None;
            self.exec().sleep(pause).await;
            pause_ms = (pause_ms * 2).min(self.world.plan.retry_max_ms);
        }
    }

    async fn try_read(
        &self,
        volume: &Rc<Volume>,
        range: LblkRange,
        trusts_cache: &mut bool,
        deadline: u64,
    ) -> Outcome<Vec<Block>> {
        let _registered = UnderWay::begin(volume);
        let mut blocks = vec![ZEROES; range.len as usize];
        let gaps = {
            let state = volume.state.borrow();
            let cached = state.dirty.read_range(range);
            let cached = cached.map(|(lblk, block)| {
                blocks[(lblk.0 - range.start.0) as usize] = *block;
                LblkRange::new(lblk.0, 1)
            });
            let mut gaps = gaps(cached, range);
            // What a growing volume has beyond the size that conversion knows is dirty or a hole.
            gaps.retain(|gap| gap.start.0 < state.view.mapped_end());
            gaps
        };
        // What is let go is discarded, and must not look like a hole.
        volume.usable()?;
        let (Some(first), Some(last)) = (gaps.first(), gaps.last()) else { return Ok(blocks) };
        let hull = LblkRange::new(first.start.0, last.end() - first.start.0);
        let (ticket, grant, map) = match known(volume, &gaps).filter(|_| *trusts_cache) {
            Some(known) => known,
            None => {
                *trusts_cache = false;
                self.learn(volume, hull, deadline).await?
            }
        };
        if self.exec().chance(self.world.plan.slow_read) {
            self.exec().sleep(self.exec().below(20 * MS)).await;
        }
        for (part, extent) in &map {
            let Some(extent) = extent else { continue };
            for part in gaps.iter().filter_map(|gap| gap.intersection(*part)) {
                let found = self.read_extent(volume, &grant, part, extent).await?;
                let at = (part.start.0 - range.start.0) as usize;
                blocks[at..at + found.len()].copy_from_slice(&found);
                let mut state = volume.state.borrow_mut();
                if state.map.is_current(ticket, part) || self.world.planted(Planted::OldKept) {
                    for (lblk, block) in (part.start.0..part.end()).zip(found) {
                        let admission =
                            if part.len > 4 { Admission::IfRoom } else { Admission::Evict };
                        state.clean.insert(ALONE, lblk, block, admission);
                    }
                }
            }
        }
        Ok(blocks)
    }

    /// Asks for the map of a range, and remembers what is around it, too.
    pub(super) async fn learn(
        &self,
        volume: &Rc<Volume>,
        hull: LblkRange,
        deadline: u64,
    ) -> Outcome<(Ticket, ReadGrant, Map)> {
        let (ticket, asked) = {
            let state = volume.state.borrow();
            let step = self.world.plan.learn_blocks;
            let end = state.view.mapped_end();
            let start = hull.start.0 / step * step;
            let end = hull.end().next_multiple_of(step).min(end).max(hull.end());
            let around = LblkRange::new(start, end - start);
            (state.map.ticket(), if volume.in_place { hull } else { around })
        };
        let found = self.look_up(volume, asked, deadline).await?;
        let grant = found.grant.ok_or(Failure::new(Reason::OldGeneration))?;
        let written = found.extents.into_iter().filter(|e| e.state == ExtentState::Written);
        let map: Map = parts(written.map(|extent| (extent.range, Rc::new(extent))), asked);
        let mut state = volume.state.borrow_mut();
        state.grant = Some(grant);
        state.map.learn(ticket, map.iter().cloned());
        Ok((ticket, grant, map))
    }

    /// Reads a part of a written extent, from one replica after the other.
    pub(super) async fn read_extent(
        &self,
        volume: &Volume,
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
            let blocks = place.pblk.0 + skip..place.pblk.0 + skip + part.len;
            let homes = blocks.map(|block| (place.store, block)).collect();
            let _reading = Reading::begin(&self.world, &volume.name, grant, homes);
            let outcome = match self.hand_over(place.store, message) {
                Err(failure) => Err(failure.reason),
                Ok(done) => match self.exec().until(patience, done).await {
                    Some(Some(outcome)) => outcome,
                    _ => Err(Reason::PeerAway),
                },
            };
            // What was written is known here, whatever the store says.
            let is_blind = self.world.planted(Planted::ReadSkipsChecksum);
            let is_right =
                |blocks: &[Block]| blocks.iter().zip(&crcs).all(|(block, sum)| crc(block) == *sum);
            let reason = match outcome {
                Ok(blocks) if blocks.len() as u64 != part.len => Reason::IoError,
                Ok(blocks) if is_blind || is_right(&blocks) => return Ok(blocks),
                Ok(_) => Reason::ChecksumMismatch,
                Err(reason) => reason,
            };
            if worst.is_none_or(|worst| worst.reason == Reason::ChecksumMismatch) {
                worst = Some(Failure::new(reason));
            }
        }
        Err(worst.unwrap_or(Failure::new(Reason::IoError)))
    }
}

/// The map of some ranges without asking conversion. What it names stays untouched while the read
/// is registered, which it is already.
fn known(volume: &Volume, ranges: &[LblkRange]) -> Option<(Ticket, ReadGrant, Map)> {
    let state = volume.state.borrow();
    let grant = state.grant?;
    let found: Option<Vec<Map>> = ranges.iter().map(|range| state.map.find(*range)).collect();
    Some((state.map.ticket(), grant, found?.concat()))
}

/// Blocks that need not be fetched, if all of them are in memory.
fn at_hand(volume: &Volume, range: LblkRange) -> Option<Vec<Block>> {
    let State { dirty, clean, .. } = &mut *volume.state.borrow_mut();
    let block = |lblk| dirty.read(Lblk(lblk)).or_else(|| clean.get(ALONE, lblk)).copied();
    (range.start.0..range.end()).map(block).collect()
}
