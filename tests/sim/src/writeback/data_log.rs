//! Small flushes: conversion keeps their data until it is written out. And what an opened volume has
//! in the two logs.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use endio_state_machine::data_log::{LogEntry, Logged};
use endio_state_machine::machine::{LogData, VolumeInfo};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::{CleanRun, LogBlock, LogPick};
use endio_state_machine::writeback::log_reader::{LogReader, ReadBlock};
use endio_state_machine::writeback::log_turns::{Bounds, Next};
use endio_store::cache_log::ReplayedWrite;
use endio_types::{
    BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk, LblkRange, Reason, VOLUME_BYTES_MAX, VolumeId,
};

use super::{Failure, Outcome, State, Volume, Wb};
use crate::block::{Block, from_bytes, to_bytes};
use crate::exec::MS;
use crate::net::Message;
use crate::world::Planted;

/// What the data log has of a volume, by block.
pub(super) type InLog = BTreeMap<u64, Logged>;

/// A message to the data log. Dropped without a good answer, its blocks are written out instead.
struct Logging {
    volume: Rc<Volume>,
    number: u64,
    up_to: Lsn,
    is_logged: bool,
    is_guarded: bool,
}

impl Drop for Logging {
    fn drop(&mut self) {
        let mut state = self.volume.state.borrow_mut();
        state.log_turns.ended();
        if self.is_logged || self.is_guarded {
            state.dirty.log_ended(self.number, self.is_logged);
        }
        if !self.is_logged && self.is_guarded {
            state.flush_up_to = state.flush_up_to.max(self.up_to);
        }
        drop(state);
        self.volume.changed.notify();
    }
}

impl Wb {
    /// Whether a write of these blocks may become durable in the data log.
    pub(super) fn is_loggable(&self, volume: &Volume, blocks: LblkRange) -> bool {
        let most = self.world.plan.flush_log_blocks.min(volume.log_blocks_max);
        !volume.in_place && blocks.len <= most
    }

    /// Waits until everything acknowledged before is durable. Tells no errors of others.
    pub(super) async fn make_durable(&self, volume: &Rc<Volume>, deadline: u64) -> Outcome<()> {
        let lsn = self.engine.log.last_lsn();
        let durable = async {
            self.log_flush(volume, lsn).await;
            let ended = volume.wait(|state| match state.gone {
                Some(gone) => Some(Err(gone)),
                None => (!state.dirty.pending_up_to(lsn)).then_some(Ok(())),
            });
            ended.await
        };
        let timed_out = Err(Failure::new(Reason::TimedOut));
        self.exec().until(deadline, durable).await.unwrap_or(timed_out)
    }

    /// Makes what is dirty up to a record durable at conversion, without writing it out. What is too
    /// much, or refused there, is written out.
    pub(super) async fn log_flush(&self, volume: &Rc<Volume>, up_to: Lsn) {
        let plan = &self.world.plan;
        let is_guarded = !self.world.planted(Planted::LogGuardOff);
        loop {
            let session = self.engine.link_number.get();
            let (pick, up_to) = match self.next_log(volume, up_to) {
                Next::Send(pick, up_to) => (pick, up_to),
                Next::Wait => {
                    let is_next = |state: &mut State| {
                        let is_over = state.gone.is_some() || !state.dirty.pending_up_to(up_to);
                        (state.log_turns.has_room() || is_over).then_some(())
                    };
                    volume.wait(is_next).await;
                    continue;
                }
                Next::Nothing => return,
            };
            let number = pick.number;
            let message = message(volume, &pick);
            let volume = Rc::clone(volume);
            let mut logging = Logging { volume, number, up_to, is_logged: false, is_guarded };
            if plan.log_dawdles > 0 && self.exec().chance(plan.log_dawdles) {
                self.exec().sleep(self.exec().below(plan.log_dawdle_ms * MS)).await;
            }
            let outcome = self.log(session, message).await;
            let failed = outcome.err().map_or(0, |failure| failure.reason as u64 + 1);
            self.exec().note("logged", self.node(), &[logging.volume.id.0, number, failed]);
            logging.is_logged = outcome.is_ok();
            if !logging.is_logged {
                return;
            }
        }
    }

    fn next_log(&self, volume: &Volume, up_to: Lsn) -> Next<Block> {
        let mut state = volume.state.borrow_mut();
        if state.gone.is_some() {
            return Next::Nothing;
        }
        let message_blocks_max = match state.credit.is_reset_pending() {
            true => 0,
            false => self.world.plan.flush_log_blocks,
        };
        let bounds = Bounds { volume_blocks_max: volume.log_blocks_max, message_blocks_max };
        let State { log_turns, dirty, .. } = &mut *state;
        let (next, is_much) = log_turns.next(dirty, up_to, bounds);
        if is_much {
            state.flush_up_to = state.flush_up_to.max(up_to);
            drop(state);
            volume.changed.notify();
        }
        next
    }

    /// What the data log holds of a volume that was opened just now.
    pub(super) async fn read_log(&self, info: &VolumeInfo) -> Outcome<InLog> {
        if info.logged_blocks == 0 || self.world.planted(Planted::LogUnread) {
            return Ok(InLog::new());
        }
        // One that grows may have been written to behind the end that the map knows.
        let end_bytes = if info.growable { VOLUME_BYTES_MAX } else { info.size_bytes };
        self.read_log_of((info.id, info.generation), end_bytes).await
    }

    /// What the data log holds of a volume that is open here, in which no data lies behind `end_bytes`.
    pub(super) async fn read_log_of(
        &self,
        (volume, generation): (VolumeId, Generation),
        end_bytes: u64,
    ) -> Outcome<InLog> {
        let deadline = self.deadline();
        let mut reader = LogReader::new(generation, end_bytes);
        let mut all = InLog::new();
        while let Some(from) = reader.next() {
            let next = || (Message::ReadLog(volume, generation, from), ());
            let blocks = self.call_until(next, deadline, |answer| match answer {
                Message::InLog(Ok(blocks)) => Ok(blocks),
                Message::InLog(Err(refusal)) => Err(Failure::new(refusal.reason)),
                _ => Err(Failure::away()),
            });
            let blocks = blocks.await?;
            if blocks.is_empty() {
                break;
            }
            for (lblk, logged) in blocks {
                if let Err(fault) = reader.take(read_block(lblk, &logged)) {
                    self.exec().fail(format!("log-is-checked: {volume}:{lblk} {fault}"));
                }
                all.insert(lblk.0, logged);
            }
        }
        Ok(all)
    }

    /// Makes dirty what the cache log and the data log hold of a volume: of each block the newer
    /// version.
    pub(super) fn put_back(&self, volume: &Volume, data: &[ReplayedWrite], mut logged: InLog) {
        let mut state = volume.state.borrow_mut();
        let mut blocks = 0;
        let (mut older, mut outdated) = (Vec::new(), Vec::new());
        for write in data {
            for range in &write.live {
                let apart = (&mut outdated, &mut older);
                for part in self.newer_parts(write, *range, &mut logged, apart) {
                    let Some(bytes) = write.data(part) else { continue };
                    let end_bytes = write.write.end_bytes;
                    state.view.wrote_up_to(end_bytes.min(part.end() * BLOCK_BYTES));
                    let cached = from_bytes(&bytes);
                    blocks += state.dirty.insert(part, write.lsn, end_bytes, cached).unwrap_or(0);
                }
            }
        }
        // A write-out of what the data log has waits until the cache log holds nothing older of it: the
        // next replay would take that for newer than the map.
        if !older.is_empty()
            && !self.world.planted(Planted::OlderKept)
            && let Err(error) = self.engine.log.append_clean(volume.id, &older)
        {
            self.log_failed(&error);
        }
        for lblk in outdated {
            state.dirty.log_may_have(Lblk(lblk));
        }
        let in_data_log: BTreeSet<u64> = logged.keys().copied().collect();
        let lsn = self.engine.log.last_lsn();
        for (lblk, Logged { end_bytes, data, .. }) in logged {
            state.view.wrote_up_to(end_bytes);
            let Some(data) = from_bytes(&data).first().copied() else { continue };
            let block = LogBlock { lblk: Lblk(lblk), end_bytes, lsn, data };
            blocks += u64::from(state.dirty.insert_logged(block));
        }
        if blocks == 0 {
            return;
        }
        for write in data {
            if write.live.is_empty() && self.world.planted(Planted::HiddenForgotten) {
                continue;
            }
            for range in write.holds_together(&in_data_log) {
                state.dirty.rejoin(range, write.lsn);
            }
        }
        state.credit.adopt(blocks);
        state.dirty_since = Some(self.exec().now());
        state.flush_up_to = self.engine.log.last_lsn();
        drop(state);
        self.exec().note("replayed", self.node(), &[volume.id.0, blocks]);
        self.dirtied(volume.id, blocks);
    }

    /// The cache log has nothing of blocks of which the data log has newer data, durably: once that is
    /// converted, the next replay would take what is left for newer than the map.
    pub(super) fn holds_none(&self, volume: VolumeId, newer: &[u64]) {
        let is_held = |lblk: &&u64| self.engine.log.holds(volume, LblkRange::new(**lblk, 1));
        if let Some(lblk) = newer.iter().find(is_held) {
            self.exec().fail(format!("newer-log-wins: older data of {volume}:{lblk} stays"));
        }
    }

    /// The parts of a range of a replayed write that are newer than what the data log has; moves what
    /// that has of them to what is outdated. Adds the others to what is older.
    fn newer_parts(
        &self,
        write: &ReplayedWrite,
        range: LblkRange,
        logged: &mut InLog,
        (outdated, older): (&mut Vec<u64>, &mut Vec<CleanRun>),
    ) -> Vec<LblkRange> {
        let ours = (write.write.generation, write.lsn.0);
        let is_older = |_: &u64, block: &mut Logged| match () {
            () if self.world.planted(Planted::LogWinsAlways) => false,
            () if self.world.planted(Planted::LogLosesAlways) => true,
            () => (block.generation, block.stamp) <= ours,
        };
        let lblks = range.start.0..range.end();
        outdated.extend(logged.extract_if(lblks, is_older).map(|(lblk, _)| lblk));
        let mut parts = Vec::new();
        let mut at = range.start.0;
        for (newer, _) in logged.range(range.start.0..range.end()) {
            parts.push(LblkRange::new(at, newer - at));
            at = newer + 1;
            older.push(CleanRun { range: LblkRange::new(*newer, 1), up_to: write.lsn });
        }
        parts.push(LblkRange::new(at, range.end() - at));
        parts.retain(|part| part.len > 0);
        parts
    }
}

fn read_block(lblk: Lblk, logged: &Logged) -> ReadBlock<'_> {
    let Logged { end_bytes, crc, generation, .. } = *logged;
    ReadBlock { lblk, end_bytes, crc, generation, data: &logged.data }
}

/// Blocks of which the data log has newer data than a replay.
pub(super) fn newer_in_log(data: &[ReplayedWrite], logged: &InLog) -> Vec<u64> {
    let is_live = |write: &&ReplayedWrite, lblk: u64| {
        write.live.iter().any(|range| range.overlaps(LblkRange::new(lblk, 1)))
    };
    let is_newer = |(lblk, block): &(&u64, &Logged)| {
        let writes = data.iter().filter(|write| is_live(write, **lblk));
        let newest = writes.map(|write| (write.write.generation, write.lsn.0)).max();
        newest.is_some_and(|newest| newest < (block.generation, block.stamp))
    };
    logged.iter().filter(is_newer).map(|(lblk, _)| *lblk).collect()
}

fn message(volume: &Volume, pick: &LogPick<Block>) -> LogData {
    let blocks: Vec<Block> = pick.blocks.iter().map(|block| block.data).collect();
    let data = to_bytes(&blocks);
    let entry = |(block, data): (&LogBlock<Block>, &[u8])| LogEntry {
        lblk: block.lblk,
        end_bytes: block.end_bytes,
        crc: crc32c::crc32c(data),
        stamp: block.lsn.0,
    };
    LogData {
        request: 0,
        volume: volume.id,
        generation: volume.generation,
        number: pick.number,
        entries: pick.blocks.iter().zip(data.chunks_exact(BLOCK_SIZE)).map(entry).collect(),
        data: Bytes::from(data),
    }
}
