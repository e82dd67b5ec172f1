//! Write-out: takes what is dirty to the stores, in the background and on demand.

use std::sync::Arc;

use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::PickLimit;
use endio_types::{BLOCK_BYTES, LblkRange, Reason};
use tokio::time::{Duration, Instant};

use super::Engine;
use super::write_out::WriteOut;
use crate::failure::Failure;
use crate::volume::{State, Volume};

/// Pause between two looks at the log's size.
const LOG_LOOK: Duration = Duration::from_millis(250);

/// What the flusher does next.
enum Next {
    /// Write this out.
    WriteOut(WriteOut),
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
        let mut settling = 0;
        for volume in self.table.all() {
            let bytes = volume.state().dirty_bytes();
            if bytes > 0 {
                held.push(format!("volume {}: {bytes} dirty bytes", volume.name));
            }
            // Nobody waits for what was given up; whoever waits behind it has a lock of its own.
            let given_up = volume.state().settling;
            settling += given_up;
            let requests = volume.locks.len().saturating_sub(given_up);
            if requests > 0 {
                held.push(format!("volume {}: {requests} changes under way", volume.name));
            }
        }
        let tasks = self.tasks.len().saturating_sub(settling);
        if tasks > 0 {
            held.push(format!("{tasks} tasks of requests"));
        }
        held
    }

    async fn flush_for_ever(self: Arc<Self>, volume: Arc<Volume>) {
        loop {
            match self.next(&volume) {
                Next::WriteOut(out) => {
                    let (engine, volume) = (Arc::clone(&self), Arc::clone(&volume));
                    // A failure stays with the volume; the flusher comes back to it.
                    let write_out = async move { drop(engine.write_out(&volume, out).await) };
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
        if state.write_outs >= self.config.write_outs_per_volume {
            return Next::Wait(None);
        }
        if let Some(rest) = state.rest_until.filter(|rest| *rest > now) {
            return Next::Wait(Some(rest));
        }
        if state.credit.is_reset_pending() {
            // Refused while stores were away, perhaps. Counted from what nothing is using.
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
        let up_to = state.flush_up_to;
        let urgent = PickLimit { blocks_max, up_to: Some(up_to), within: None };
        if let Some(out) = WriteOut::pick(volume, &mut state, urgent, true) {
            return Next::WriteOut(out);
        }
        let old_at = state.dirty_since.unwrap_or(now) + self.write_out_after();
        if old_at <= now {
            // Everything that is dirty now is taken; what comes later waits its own time.
            state.flush_up_to = self.log.last();
            state.dirty_since = Some(now);
            drop(state);
            return self.next(volume);
        }
        if self.throttled(|throttle| throttle.wants_write_out())
            && let Some(out) =
                WriteOut::pick(volume, &mut state, PickLimit::blocks(blocks_max), false)
        {
            return Next::WriteOut(out);
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
            let picked = {
                let mut state = volume.state();
                // Without a promise of space it would only be refused.
                let is_backed = !state.credit.is_reset_pending();
                is_backed.then(|| WriteOut::pick(volume, &mut state, limit, true)).flatten()
            };
            if let Some(out) = picked {
                // In a task of its own: what was picked must be given back, whoever waits.
                let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
                let out = async move { engine.write_out(&volume, out).await };
                self.tasks.spawn(out).await.map_err(|_| Failure::task_lost())??;
                continue;
            }
            let errors = volume.state().error_count;
            let ended = volume.wait(|state| match () {
                () if state.gone.is_some() => Some(state.gone.clone().map_or(Ok(false), Err)),
                () if !state.dirty.touches(range) => Some(Ok(true)),
                // Something of it fell back from a write-out that was under way.
                () if state.error_count != errors => Some(Ok(false)),
                () if state.credit.is_reset_pending() => None,
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

    /// The end of a volume here: what is dirty is of no use to anybody any more.
    async fn clear(self: &Arc<Self>, volume: &Arc<Volume>) {
        // Whoever began to append while it was ours is done: nothing comes behind what is noted below.
        drop(self.log.order());
        self.note_loss(volume.id).await;
        volume.wait(|state| (state.write_outs == 0).then_some(())).await;
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
