//! Small flushes: conversion keeps their data until it is written out, with more of its kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::conversion::{LogData, LoggedBlock, ReadLogRequest, Volume as Described};
use endio_chassis::trace::Span;
use endio_failpoints::{Bug, Point, is_planted, reach};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::LogPick;
use endio_state_machine::writeback::log_reader::{LogFault, LogReader, ReadBlock};
use endio_state_machine::writeback::log_turns::{Bounds, Next};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk, Reason, VOLUME_BYTES_MAX};
use tokio::time::Instant;

use super::Engine;
use crate::conversion::Client;
use crate::failure::Failure;
use crate::volume::{CachedBlock, Opened, State, Volume};

/// A message to the data log. Dropped without a good answer, its blocks are written out instead: other
/// flushes may wait for them, too.
struct Logging {
    volume: Arc<Volume>,
    number: u64,
    up_to: Lsn,
    is_logged: bool,
}

impl Drop for Logging {
    fn drop(&mut self) {
        let mut state = self.volume.state();
        state.log_turns.ended();
        state.dirty.log_ended(self.number, self.is_logged);
        if !self.is_logged {
            state.flush_up_to_at_least(self.up_to);
        }
        drop(state);
        match self.is_logged {
            true => self.volume.changed_for_waiters(),
            false => self.volume.changed(),
        }
    }
}

impl Engine {
    /// Whether a write of so many blocks may become durable in the data log.
    pub(super) fn is_loggable(&self, volume: &Volume, blocks: u64) -> bool {
        let most = (self.config.flush_log_bytes / BLOCK_BYTES).min(volume.log_blocks_max);
        !volume.in_place && blocks <= most
    }

    /// Waits until everything acknowledged before is durable. Tells no errors of others.
    ///
    /// # Errors
    /// The volume is gone, or `TIMED_OUT`.
    pub(super) async fn make_durable(
        &self,
        volume: &Arc<Volume>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let lsn = self.log.last();
        let durable = async {
            self.log_flush(volume, lsn).await;
            let ended = volume.wait(|state| match &state.gone {
                Some(gone) => Some(Err(gone.clone())),
                None => (!state.dirty.pending_up_to(lsn)).then_some(Ok(())),
            });
            ended.await
        };
        match tokio::time::timeout_at(deadline, durable).await {
            Ok(ended) => ended,
            Err(_) => Err(Failure::new(Reason::TimedOut, "the data could not be made durable")),
        }
    }

    /// Begins what a flush that is likely to come will ask for, while its client still hears of the write
    /// before it. The flush then finds its data on the way. In the trace of that write.
    pub(super) fn log_ahead(self: &Arc<Self>, volume: &Arc<Volume>, up_to: Lsn) {
        let (engine, volume, span) = (Arc::clone(self), Arc::clone(volume), Span::current());
        self.metrics.logged_ahead.inc();
        self.tasks.spawn(async move { span.scope(engine.log_flush(&volume, up_to)).await });
    }

    /// Makes what is dirty up to a record durable at conversion, without writing it out. What is too
    /// much, or refused there, is written out. The caller waits for that, and for what is under
    /// write-out, which is not logged.
    pub(super) async fn log_flush(&self, volume: &Arc<Volume>, up_to: Lsn) {
        loop {
            // Before anything is taken: see [`Session::log`](crate::session::Session::log).
            let session = self.session.link().number;
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
            let (volume, number) = (Arc::clone(volume), pick.number);
            let mut logging = Logging { volume, number, up_to, is_logged: false };
            let volume = &logging.volume;
            reach(Point::WritebackFlushGathered);
            let span = crate::TRACER
                .child(&Span::current(), "log")
                .with("volume", &volume.name)
                .with("number", pick.number)
                .with("blocks", pick.blocks.len());
            match self.session.log(session, message(volume, pick, &span)).await {
                Ok(()) => {
                    reach(Point::WritebackFlushLogged);
                    logging.is_logged = true;
                    self.metrics.logged_flushes.inc();
                }
                Err(error) => {
                    span.fail(&error.detail);
                    tracing::debug!(volume = %volume.name, %error, "a flush was not logged");
                    return;
                }
            }
        }
    }

    fn next_log(&self, volume: &Volume, up_to: Lsn) -> Next<CachedBlock> {
        let mut state = volume.state();
        if state.gone.is_some() {
            return Next::Nothing;
        }
        // Without a promise of space it could not be written out afterwards.
        let message_blocks_max = match state.credit.is_reset_pending() {
            true => 0,
            false => self.config.flush_log_bytes / BLOCK_BYTES,
        };
        let bounds = Bounds { volume_blocks_max: volume.log_blocks_max, message_blocks_max };
        let State { log_turns, dirty, .. } = &mut *state;
        let (next, is_much) = log_turns.next(dirty, up_to, bounds);
        if is_much {
            state.flush_up_to_at_least(up_to);
            drop(state);
            volume.changed();
        }
        next
    }

    /// What the data log holds of a volume that was opened just now.
    ///
    /// # Errors
    /// Conversion is away, or something in the log is damaged: `CHECKSUM_MISMATCH`, `MALFORMED`.
    pub(super) async fn read_log(
        &self,
        opened: &Opened,
    ) -> Result<BTreeMap<u64, LoggedBlock>, Failure> {
        let Described { id, name, generation, size_bytes, growable, .. } = &opened.volume;
        // One that grows may have been written to behind the end that the map knows.
        let end_bytes = if *growable { VOLUME_BYTES_MAX } else { *size_bytes };
        match opened.volume.logged_blocks {
            _ if is_planted(Bug::DataLogUnread) => Ok(BTreeMap::new()),
            0 => Ok(BTreeMap::new()),
            _ => self.read_log_of(name, (*id, *generation), end_bytes).await,
        }
    }

    /// What the data log holds of a volume that is open here, in which no data lies behind `end_bytes`.
    ///
    /// # Errors
    /// As [`Self::read_log`].
    pub(super) async fn read_log_of(
        &self,
        name: &str,
        (volume, generation): (u64, u64),
        end_bytes: u64,
    ) -> Result<BTreeMap<u64, LoggedBlock>, Failure> {
        let deadline = self.deadline();
        let mut reader = LogReader::new(Generation(generation), end_bytes);
        let mut all = BTreeMap::new();
        while let Some(Lblk(lblk)) = reader.next() {
            let request = ReadLogRequest { volume, generation, lblk };
            let call = |mut client: Client| async move { client.read_log(request).await };
            let blocks = self.conversion.call(deadline, call).await?.blocks;
            if blocks.is_empty() {
                break;
            }
            for block in blocks {
                let looked_at = reader.take(read_block(&block));
                looked_at.map_err(|fault| damaged(name, block.lblk, fault))?;
                all.insert(block.lblk, block);
            }
        }
        Ok(all)
    }
}

fn read_block(block: &LoggedBlock) -> ReadBlock<'_> {
    ReadBlock {
        lblk: Lblk(block.lblk),
        end_bytes: block.end_bytes,
        crc: block.crc32c,
        generation: Generation(block.generation),
        data: &block.data,
    }
}

/// Nothing of such a log becomes dirty: newer data may hide behind what is damaged.
fn damaged(name: &str, lblk: u64, fault: LogFault) -> Failure {
    let reason = match fault {
        LogFault::Length { .. } | LogFault::Checksum => Reason::ChecksumMismatch,
        LogFault::GoesBack { .. }
        | LogFault::BehindEnd
        | LogFault::EndsElsewhere { .. }
        | LogFault::FromLater { .. } => Reason::Malformed,
    };
    let detail = format!(
        "the data log of volume {name} is damaged, or was on its way: block {lblk} {fault}; \
         nothing of it was used"
    );
    Failure::new(reason, detail)
}

fn message(volume: &Volume, pick: LogPick<CachedBlock>, span: &Span) -> LogData {
    let blocks = pick.blocks.iter().map(|block| LoggedBlock {
        lblk: block.lblk.0,
        end_bytes: block.end_bytes,
        crc32c: crc32c::crc32c(&block.data.data),
        stamp: block.lsn.0,
        ..LoggedBlock::default()
    });
    LogData {
        request: 0,
        volume: volume.id,
        generation: volume.generation,
        number: pick.number,
        blocks: blocks.collect(),
        data: one_buffer(&pick),
        traceparent: span.traceparent(),
    }
}

/// Without a copy if there is only one block.
fn one_buffer(pick: &LogPick<CachedBlock>) -> Bytes {
    if let [only] = &pick.blocks[..] {
        return only.data.data.clone();
    }
    let mut whole = BytesMut::with_capacity(pick.blocks.len() * BLOCK_SIZE);
    for block in &pick.blocks {
        whole.extend_from_slice(&block.data.data);
    }
    whole.freeze()
}
