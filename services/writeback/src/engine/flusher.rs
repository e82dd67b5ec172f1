//! Write-out: takes what is dirty to the stores, in the background and on demand.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::conversion::{Completion, Lane};
use endio_chassis::telemetry;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::{PickLimit, Picked};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, LblkRange, Reason};
use futures_util::FutureExt as _;
use tokio::time::{Duration, Instant};
use tracing::{Span, info_span};

use super::Engine;
use crate::failure::Failure;
use crate::io_end::Job;
use crate::volume::{CachedBlock, State, Volume};

/// Most traces that one write-out links to besides its own.
const LINKS_MAX: usize = 32;
/// Pause between two looks at the log's size.
const LOG_LOOK: Duration = Duration::from_millis(250);

/// What the flusher does next.
enum Next {
    /// Write this out.
    WriteOut(Picked<CachedBlock>, bool),
    /// Nothing now; look again then, or when something changes.
    Wait(Option<Instant>),
    /// The volume is not ours any more.
    Gone,
}

impl Engine {
    /// Starts the flusher of a volume. It ends when the volume is let go or the service stops.
    pub(super) fn start_flusher(self: &Arc<Self>, volume: Arc<Volume>) {
        let engine = Arc::clone(self);
        tokio::spawn(async move { engine.flush_for_ever(volume).await });
    }

    /// Makes every flusher look.
    pub(crate) fn wake_flushers(&self) {
        for volume in self.table.all() {
            volume.changed();
        }
    }

    /// Everything that is dirty now is to be written out: at a stop, or to make room in the log.
    pub(crate) fn want_everything_out(&self) {
        let last = self.log.last();
        for volume in self.table.all() {
            let mut state = volume.state();
            state.flush_up_to = state.flush_up_to.max(last);
            drop(state);
            volume.changed();
        }
    }

    /// What a stop still waits for, by name.
    pub(crate) fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        for volume in self.table.all() {
            let bytes = volume.state().dirty_bytes();
            if bytes > 0 {
                held.push(format!("volume {}: {bytes} dirty bytes", volume.name));
            }
        }
        let requests = self.tasks.len();
        if requests > 0 {
            held.push(format!("{requests} requests"));
        }
        held
    }

    async fn flush_for_ever(self: Arc<Self>, volume: Arc<Volume>) {
        loop {
            match self.next(&volume) {
                Next::WriteOut(picked, sync) => {
                    let (engine, volume) = (Arc::clone(&self), Arc::clone(&volume));
                    // A failure stays with the volume; the flusher comes back to it.
                    let write_out =
                        async move { drop(engine.write_out(&volume, picked, sync).await) };
                    self.tasks.spawn(write_out);
                }
                Next::Wait(until) => {
                    tokio::select! {
                        biased;
                        () = self.stop.cancelled() => return,
                        () = volume.flusher_woken() => {}
                        () = crate::io_end::at(until) => {}
                    }
                }
                Next::Gone => {
                    self.clear(&volume).await;
                    return;
                }
            }
        }
    }

    fn next(self: &Arc<Self>, volume: &Arc<Volume>) -> Next {
        let now = Instant::now();
        let blocks_max = self.config.write_out_blocks;
        let mut state = volume.state();
        if state.gone.is_some() {
            return Next::Gone;
        }
        if state.dirty.write_outs() >= self.config.write_outs_per_volume {
            return Next::Wait(None);
        }
        if let Some(rest) = state.rest_until.filter(|rest| *rest > now) {
            return Next::Wait(Some(rest));
        }
        if state.dirty.is_clean() {
            drop(state);
            self.ask_credit(volume, true);
            return Next::Wait(None);
        }
        let up_to = state.flush_up_to;
        let urgent = PickLimit { blocks_max, up_to: Some(up_to), within: None };
        if let Some(picked) = state.dirty.pick(urgent) {
            return Next::WriteOut(picked, true);
        }
        let old_at = state.dirty_since.unwrap_or(now) + self.write_out_after();
        if old_at <= now {
            // Everything that is dirty now is taken; what comes later waits its own time.
            state.flush_up_to = self.log.last();
            state.dirty_since = Some(now);
            drop(state);
            return self.next(volume);
        }
        if self.throttle().wants_write_out()
            && let Some(picked) = state.dirty.pick(PickLimit::blocks(blocks_max))
        {
            return Next::WriteOut(picked, false);
        }
        Next::Wait(Some(old_at))
    }

    fn write_out_after(&self) -> Duration {
        Duration::from_millis(self.config.write_out_after_ms)
    }

    /// Writes a range out and waits until it is clean. The caller holds the lock of the range, so
    /// nothing in it becomes dirty meanwhile.
    ///
    /// # Errors
    /// Of the write-out, or `TIMED_OUT` at the deadline.
    pub(super) async fn flush_range(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let blocks_max = self.config.write_out_blocks;
        let limit = PickLimit { blocks_max, up_to: None, within: Some(range) };
        loop {
            let picked = volume.state().dirty.pick(limit);
            if let Some(picked) = picked {
                // In a task of its own: what was picked must be given back, whoever waits.
                let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
                let out = async move { engine.write_out(&volume, picked, true).await };
                self.tasks.spawn(out).await.map_err(|_| Failure::task_lost())??;
                continue;
            }
            let errors = volume.state().error_count;
            let ended = volume.wait(|state| match () {
                () if state.gone.is_some() => Some(state.gone.clone().map_or(Ok(false), Err)),
                () if !state.dirty.touches(range) => Some(Ok(true)),
                // Something of it fell back from a write-out that was under way.
                () if state.error_count != errors => Some(Ok(false)),
                () if state.dirty.can_pick(limit) => Some(Ok(false)),
                () => None,
            });
            match tokio::time::timeout_at(deadline, ended).await {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) => {}
                Ok(Err(gone)) => return Err(gone),
                Err(_) => {
                    let detail = "what the cache holds of the range could not be written out";
                    return Err(Failure::new(Reason::TimedOut, detail));
                }
            }
        }
    }

    /// Carries one pick to its end: clean, or dirty again with the error noted.
    async fn write_out(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        picked: Picked<CachedBlock>,
        sync: bool,
    ) -> Result<(), Failure> {
        let job = self.write_out_job(volume, &picked, sync);
        let gate = self.log.durable(picked.max_lsn).boxed();
        match self.submitter.write(&job, gate).await {
            Ok(done) => self.written_out(volume, &picked, &done),
            Err(failure) => {
                telemetry::fail(&job.span, &failure.detail);
                self.not_written_out(volume, &picked, &failure);
                Err(failure)
            }
        }
    }

    fn write_out_job(&self, volume: &Volume, picked: &Picked<CachedBlock>, sync: bool) -> Job {
        let end_bytes = picked.end_bytes;
        let size_after = volume.growable.then(|| volume.state().size_after(end_bytes));
        Job {
            volume: volume.id,
            name: Arc::clone(&volume.name),
            generation: volume.generation,
            lane: Lane::WriteOut,
            range: picked.range,
            data: gather(&picked.data),
            size_after_bytes: size_after.unwrap_or(0),
            sync,
            deadline: self.deadline(),
            span: write_out_span(volume, picked),
        }
    }

    fn written_out(
        &self,
        volume: &Volume,
        picked: &Picked<CachedBlock>,
        done: &Completion,
    ) -> Result<(), Failure> {
        let mut state = volume.state();
        state.saw_map(done.map_version);
        state.durable_size_bytes = state.durable_size_bytes.max(done.size_bytes);
        state.credit.consumed(picked.range.len);
        state.rest_until = None;
        let noted = match state.dirty.complete(picked.io) {
            // Under the state's lock: who finds the range clean finds the record, too.
            Ok(completed) => self.log.append_clean(volume.id, &completed.runs),
            Err(error) => Err(Failure::new(Reason::WrongState, error.to_string())),
        };
        match noted {
            Ok(lsn) => state.last_clean = state.last_clean.max(lsn),
            // Replay then writes the same data once more; a direct write over it would wait.
            Err(error) => tracing::error!(volume = %volume.name, %error, "cache log"),
        }
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        self.metrics.write_outs.inc();
        self.undirtied(volume.id, picked.range.len);
        volume.changed();
        Ok(())
    }

    fn not_written_out(&self, volume: &Volume, picked: &Picked<CachedBlock>, failure: &Failure) {
        let mut state = volume.state();
        let freed = state.dirty.fail(picked.io).map_or(0, |failed| failed.credit_freed_blocks);
        state.credit.put_back(freed);
        state.errors.set(failure.clone());
        state.error_count += 1;
        state.rest_until = Some(Instant::now() + Duration::from_millis(self.config.retry_max_ms));
        drop(state);
        self.undirtied(volume.id, freed);
        self.heed(volume, failure);
        if volume.usable().is_err() {
            // The flusher says what is lost with a volume that is not ours any more.
            return volume.changed();
        }
        tracing::error!(
            volume = %volume.name,
            offset = picked.range.start.0 * BLOCK_BYTES,
            length = picked.range.len * BLOCK_BYTES,
            error = %failure,
            "write-out failed; the data stays dirty and is tried again"
        );
        volume.changed();
    }

    /// The end of a volume here: what is dirty is of no use to anybody any more.
    async fn clear(self: &Arc<Self>, volume: &Arc<Volume>) {
        volume.wait(|state| (state.dirty.write_outs() == 0).then_some(())).await;
        let lost = {
            let mut state = volume.state();
            let versions = |state: &State| state.dirty.waiting_blocks();
            let lost = versions(&state);
            state.dirty.discard(LblkRange::new(0, u64::MAX));
            lost
        };
        self.undirtied(volume.id, lost);
        if lost > 0 {
            let bytes = lost * BLOCK_BYTES;
            tracing::warn!(volume = %volume.name, bytes, "let go with dirty data");
        }
        self.forget_closed(volume).await;
    }

    /// Starts the task that keeps the log small. It ends with the service.
    pub(crate) fn start_log_keeper(self: &Arc<Self>) {
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = engine.stop.cancelled() => return,
                    () = tokio::time::sleep(LOG_LOOK) => engine.keep_log_small().await,
                }
            }
        });
    }

    async fn keep_log_small(self: &Arc<Self>) {
        let (used, bound) = self.log.usage_bytes();
        if used <= 2 * self.config.log_segment_bytes && used <= bound / 2 {
            return;
        }
        if used > bound / 2 {
            self.want_everything_out();
        }
        let table = Arc::clone(&self.table);
        let oldest = move || -> Option<Lsn> {
            let oldest_of = |volume: &Arc<Volume>| volume.state().dirty.oldest_lsn();
            table.all().iter().filter_map(oldest_of).min()
        };
        match self.log.trim(oldest).await {
            Ok(0) => {}
            Ok(_) => self.room.notify_waiters(),
            Err(error) => tracing::warn!(%error, "the cache log cannot be trimmed"),
        }
    }
}

/// One buffer out of the blocks; without a copy if there is only one.
fn gather(blocks: &[CachedBlock]) -> Bytes {
    if let [only] = blocks {
        return only.data.clone();
    }
    let mut whole = BytesMut::with_capacity(blocks.len() * BLOCK_SIZE);
    for block in blocks {
        whole.extend_from_slice(&block.data);
    }
    whole.freeze()
}

/// Continues the trace of the first write that it covers, and links the others.
fn write_out_span(volume: &Volume, picked: &Picked<CachedBlock>) -> Span {
    let span = info_span!(
        parent: None,
        "write_out",
        volume = %volume.name,
        offset = picked.range.start.0 * BLOCK_BYTES,
        length = picked.range.len * BLOCK_BYTES,
    );
    let mut traces: Vec<&Arc<str>> = Vec::new();
    for block in picked.data.iter().filter(|block| !block.trace.is_empty()) {
        if traces.len() <= LINKS_MAX && !traces.contains(&&block.trace) {
            traces.push(&block.trace);
        }
    }
    if let Some((first, others)) = traces.split_first() {
        telemetry::set_parent(&span, first);
        for other in others {
            telemetry::link(&span, other);
        }
    }
    span
}
