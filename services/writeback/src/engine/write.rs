//! Writes: into the dirty cache, or through an io_end (`direct`).

use std::sync::Arc;

use bytes::Bytes;
use endio_chassis::trace::Span;
use endio_failpoints::{Bug, Point, is_planted, reach};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::credit::Take;
use endio_state_machine::writeback::dirty::CleanRun;
use endio_state_machine::writeback::throttle::Verdict;
use endio_store::cache_log::{CacheLogError, WriteRecord};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, ByteRange, Generation, LblkRange, Reason, VolumeId};
use futures_util::FutureExt as _;
use tokio::time::{Duration, Instant};

use super::{Engine, Started};
use crate::dedupe::{Admission, Admitted, Retry};
use crate::failure::Failure;
use crate::locks::Held;
use crate::metrics::Kind;
use crate::volume::{CachedBlock, Volume};

/// How long the cache takes large writes, too, after the stores did not take one in time.
const AROUND_RESTS: Duration = Duration::from_secs(10);

/// A cache log that took nothing for so long is not about to have room: a write-out and a trim take less.
const LOG_FULL_PATIENCE: Duration = Duration::from_secs(1);

/// When a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// From the dirty cache, or converted if it is large (`write_around_bytes`).
    Buffered,
    /// Durable: small ones from the dirty cache and conversion's data log, others converted.
    Durable,
    /// Converted.
    Direct,
}

/// A write as it was asked for.
#[derive(Debug, Clone)]
pub struct WriteOp {
    /// First byte.
    pub offset_bytes: u64,
    /// The bytes; at most 3 MiB.
    pub data: Bytes,
    /// When to acknowledge it.
    pub mode: Mode,
    /// Makes a retry safe.
    pub retry: Option<Retry>,
    /// W3C traceparent of the caller; empty: none.
    pub traceparent: String,
}

/// A write that is acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Acked {
    /// 32 hexadecimal digits; empty: not sampled.
    pub trace_id: String,
    /// All bytes of the request.
    pub written_bytes: u64,
    /// It had been applied before; nothing was done now.
    pub duplicate: bool,
    /// From the last release to the durable commit, microseconds; 0: nothing was waited for.
    pub convert_us: u64,
}

/// What a write has made dirty.
struct Used {
    /// Blocks of credit that it needed.
    blocks: u64,
    /// The flusher may not know that there is something to do, or there is more than should wait.
    wakes_flusher: bool,
    /// The record of the write, if a flush is likely to come next.
    flush_is_next: Option<Lsn>,
}

/// A write under way.
struct Write {
    engine: Arc<Engine>,
    volume: Arc<Volume>,
    op: WriteOp,
    blocks: LblkRange,
    deadline: Instant,
    span: Span,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Durable => "durable",
            Self::Direct => "direct",
        }
    }
}

impl Engine {
    /// Starts a write and takes its place in the order of its blocks before this returns. The
    /// write goes on when the handle is dropped.
    pub fn start_write(self: &Arc<Self>, volume: &Arc<Volume>, op: WriteOp) -> Started<Acked> {
        let started = Instant::now();
        let begun = self.place_write(volume, op);
        Started::begin(&self.tasks, async move {
            let (write, admitted, held) = begun?;
            let span = write.span.clone();
            let (engine, kind) = (Arc::clone(&write.engine), write.kind());
            let (began, volume) = (Instant::now(), Arc::clone(&write.volume));
            let outcome = span.clone().scope(write.run(admitted, held)).await;
            match &outcome {
                Ok(acked) => volume.writes.add(acked.written_bytes, began.elapsed()),
                Err(failure) => span.fail(&failure.detail),
            }
            engine.metrics.answered(kind, started.elapsed(), &span, outcome.is_ok());
            outcome
        })
    }

    fn place_write(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        op: WriteOp,
    ) -> Result<(Write, Admitted, Option<Held>), Failure> {
        self.takes_work()?;
        let span = crate::TRACER
            .entry("write", &op.traceparent)
            .with("volume", &volume.name)
            .with("offset", op.offset_bytes)
            .with("length", op.data.len())
            .with("mode", op.mode.name())
            .with("attempt", 1_u32);
        let bytes = ByteRange { offset: op.offset_bytes, len: op.data.len() as u64 };
        let blocks = volume.check(bytes, true)?;
        let admitted = self.dedupe.admit(op.retry)?;
        let is_new = matches!(admitted, Admitted::New(_));
        let held = is_new.then(|| volume.locks.acquire(blocks));
        let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
        let write = Write { deadline: engine.deadline(), engine, volume, op, blocks, span };
        Ok((write, admitted, held))
    }

    /// A refusal that says that the volume is not ours any more ends it here.
    pub(super) fn heed(&self, volume: &Volume, failure: &Failure) {
        if failure.ends_volume() {
            self.table.end(volume, failure.clone());
        }
    }

    /// Forgets what cache and log hold of blocks, before something goes around the cache: writes it
    /// out and makes durable that it is clean. The caller holds the lock of the blocks.
    pub(super) async fn forget(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<(), Failure> {
        if is_planted(Bug::ForgetSkipped) {
            return Ok(());
        }
        if volume.state().dirty.touches(range) {
            self.flush_range(volume, range, deadline).await?;
        }
        if self.log.holds(volume.id, range) {
            let clean = volume.state().last_clean;
            self.log.durable(clean).await?;
        }
        // The log did not take that they are clean when they became so: a replay would put them back.
        if self.log.holds(volume.id, range) {
            let clean = CleanRun { range, up_to: self.log.last() };
            let clean = self.log.append_clean(volume.id, &[clean])?;
            self.log.durable(clean).await?;
        }
        reach(Point::WritebackForgot);
        Ok(())
    }

    /// Asks conversion for credit where a volume wants some.
    pub(super) fn ask_credit(self: &Arc<Self>, volume: &Arc<Volume>, idle: bool) {
        let (ask, session) = {
            let mut state = volume.state();
            let Some(ask) = state.credit.next_ask(idle) else { return };
            // Under the lock: the next session counts anew under it before it has its number.
            (ask, self.session.link().number)
        };
        let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
        self.tasks.spawn(async move {
            let reserve = endio_api::conversion::Reserve {
                request: 0,
                volume: volume.id,
                generation: volume.generation,
                reset: ask.reset,
                add_blocks: ask.add_blocks,
                drop_blocks: ask.drop_blocks,
            };
            match engine.session.reserve(Some(session), reserve).await {
                Ok(_) => {
                    let mut state = volume.state();
                    state.credit.granted(ask.request);
                    state.credit_refusal = None;
                }
                // The next session sets the credit anew and replaces this request.
                Err(failure) if failure.reason == Reason::PeerAway => return,
                Err(failure) => {
                    engine.heed(&volume, &failure);
                    // What may pass is asked for again when this is told; so is a reset, always.
                    let is_full = failure.is_full();
                    // With a hint to wait, too: blocks that such a conversion has freed wait for
                    // reads of a map that nobody here has seen yet.
                    if ask.reset && failure.reason == Reason::NoSpace {
                        engine.take_stored(&volume).await;
                    }
                    if ask.reset || !is_full {
                        let pause = Duration::from_millis(engine.config.retry_max_ms);
                        tokio::time::sleep(pause).await;
                    }
                    let mut state = volume.state();
                    match is_full {
                        true => state.credit.refused(ask.request),
                        false => state.credit.put_off(ask.request),
                    };
                    state.credit_refusal = Some(failure);
                }
            }
            volume.changed();
        });
    }
}

impl Write {
    fn kind(&self) -> Kind {
        if self.op.mode == Mode::Buffered { Kind::WriteBuffered } else { Kind::WriteDirect }
    }

    async fn run(self, mut admitted: Admitted, held: Option<Held>) -> Result<Acked, Failure> {
        if matches!(admitted, Admitted::Busy) {
            let dedupe = &self.engine.dedupe;
            admitted = dedupe.admit_in_turn(self.op.retry, self.deadline).await?;
        }
        let written_bytes = self.op.data.len() as u64;
        let admission = match admitted {
            Admitted::New(admission) => admission,
            Admitted::Duplicate(result) => {
                self.engine.metrics.duplicates.inc();
                if self.op.mode == Mode::Durable {
                    // It is in the cache, and perhaps no more than that.
                    self.engine.make_durable(&self.volume, self.deadline).await?;
                }
                let written_bytes = result.unwrap_or(written_bytes);
                let trace_id = self.span.trace_id();
                return Ok(Acked { trace_id, written_bytes, duplicate: true, convert_us: 0 });
            }
            Admitted::Busy => return Err(Failure::task_lost()),
        };
        let mut held = held.unwrap_or_else(|| self.volume.locks.acquire(self.blocks));
        if tokio::time::timeout_at(self.deadline, held.held()).await.is_err() {
            let detail = "earlier requests for these blocks are still under way";
            return Err(Failure::new(Reason::TimedOut, detail));
        }
        self.volume.usable()?;
        // A resize that was ahead may have made the volume smaller: data that is acknowledged
        // beyond its end could never be written out.
        self.volume.check(self.bytes(), true)?;
        let convert_us = if self.op.data.is_empty() {
            // Nothing to convert: it completes inline, like an io_end of size zero.
            self.note_done(admission);
            0
        } else if self.goes_around() {
            let convert_us = self.direct().await?;
            reach(Point::WritebackDirectDone);
            self.note_done(admission);
            convert_us
        } else if admission.is_none() && self.is_for_the_stores() {
            match self.around().await? {
                Ok(convert_us) => convert_us,
                Err(unknown) => {
                    // What was tried may be converted all the same: a refusal would say that it is not.
                    self.buffered(admission).await.map_err(|_| unknown)?;
                    0
                }
            }
        } else {
            self.buffered(admission).await?;
            if self.op.mode == Mode::Durable {
                self.engine.make_durable(&self.volume, self.deadline).await?;
            }
            0
        };
        // A write that had to be tried again is recorded from then on.
        let trace_id = self.span.trace_id();
        Ok(Acked { trace_id, written_bytes, duplicate: false, convert_us })
    }

    /// Remembers that the request was applied, in the log first.
    fn note_done(&self, admission: Option<Admission>) {
        let Some(admission) = admission else { return };
        let result = self.op.data.len() as u64;
        if let Err(error) = self.engine.log.append_done(admission.key(), result) {
            // The write is done. Only a retry over a restart would not be recognized.
            tracing::warn!(%error, "a retry key could not be kept");
        }
        admission.applied(result);
    }

    fn bytes(&self) -> ByteRange {
        ByteRange { offset: self.op.offset_bytes, len: self.op.data.len() as u64 }
    }

    fn end_bytes(&self) -> u64 {
        self.op.offset_bytes + self.op.data.len() as u64
    }

    /// Whether it goes around the cache.
    fn goes_around(&self) -> bool {
        match self.op.mode {
            Mode::Buffered => false,
            Mode::Durable => !self.engine.is_loggable(&self.volume, self.blocks.len),
            Mode::Direct => true,
        }
    }

    /// Whether a buffered write is so large that the cache is a detour: whole blocks, of which nothing is
    /// dirty. What may be sent again (an admission) is the cache's: its key is in one record with the data.
    fn is_for_the_stores(&self) -> bool {
        let Self { engine, volume, .. } = self;
        let least = engine.config.write_around_bytes;
        let ByteRange { offset, len } = self.bytes();
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        if self.op.mode != Mode::Buffered
            || least == 0
            || len < least
            || !is_whole
            || volume.in_place
        {
            return false;
        }
        let state = volume.state();
        let rests = state.around_rests_until.is_some_and(|until| Instant::now() < until);
        !rests && !state.dirty.touches(self.blocks)
    }

    /// A buffered write straight to the stores. The inner error: they do not take it soon, and the cache is
    /// to take it. Nothing of it is under way any more, or its session is gone.
    ///
    /// # Errors
    /// The volume is gone.
    async fn around(&self) -> Result<Result<u64, Failure>, Failure> {
        let Self { engine, volume, .. } = self;
        let patience = Duration::from_millis(engine.config.write_around_patience_ms);
        let deadline = self.deadline.min(Instant::now() + patience);
        // What the cache will need if it has to take the next one while conversion is away.
        engine.ask_credit(volume, false);
        let written = async {
            engine.forget(volume, self.blocks, deadline).await?;
            let data = self.op.data.clone();
            engine.write_through(volume, self.blocks, data, self.end_bytes(), deadline).await
        };
        match written.await {
            Ok(done) => {
                reach(Point::WritebackDirectDone);
                Ok(Ok(done.convert_us))
            }
            Err(failure) => {
                volume.usable()?;
                tracing::debug!(volume = %volume.name, %failure, "the cache takes a large write");
                volume.state().around_rests_until = Some(Instant::now() + AROUND_RESTS);
                Ok(Err(failure))
            }
        }
    }

    async fn direct(&self) -> Result<u64, Failure> {
        let Self { engine, volume, .. } = self;
        engine.forget(volume, self.blocks, self.deadline).await?;
        let data = self.op.data.clone();
        let whole = engine.merge(volume, self.bytes(), data, self.deadline).await?;
        let end = self.end_bytes();
        let done = engine.write_through(volume, self.blocks, whole, end, self.deadline).await?;
        Ok(done.convert_us)
    }

    async fn buffered(&self, admission: Option<Admission>) -> Result<(), Failure> {
        let Self { engine, volume, .. } = self;
        let data = self.op.data.clone();
        let whole = engine.merge(volume, self.bytes(), data, self.deadline).await?;
        self.room().await?;
        self.credit().await?;
        let used = match self.insert(&whole, admission.as_ref()).await {
            Ok(Some(used)) => used,
            Ok(None) => {
                volume.state().credit.put_back(self.blocks.len);
                tracing::debug!(volume = %volume.name, "the cache log is full: around it");
                self.direct().await?;
                reach(Point::WritebackDirectDone);
                return Ok(());
            }
            Err(failure) => {
                volume.state().credit.put_back(self.blocks.len);
                return Err(failure);
            }
        };
        reach(Point::WritebackCached);
        if let Some(admission) = admission {
            admission.applied(self.op.data.len() as u64);
        }
        engine.ask_credit(volume, false);
        // More that is dirty is what nobody waits for. Credit that was not needed may be.
        if used.wakes_flusher {
            volume.changed();
        } else if used.blocks < self.blocks.len {
            volume.changed_for_waiters();
        }
        if let Some(lsn) = used.flush_is_next
            && engine.config.log_ahead
            && engine.is_loggable(volume, self.blocks.len)
        {
            engine.log_ahead(volume, lsn);
        }
        Ok(())
    }

    /// Waits until the limits of dirty bytes let the write go on.
    async fn room(&self) -> Result<(), Failure> {
        let Self { engine, volume, .. } = self;
        let bytes = self.blocks.len * endio_types::BLOCK_BYTES;
        loop {
            let room = engine.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            let verdict = engine.throttled(|throttle| throttle.decide(VolumeId(volume.id), bytes));
            match verdict {
                Verdict::Proceed => return Ok(()),
                Verdict::WriteOut => {
                    volume.changed();
                    return Ok(());
                }
                Verdict::Delay(ms) => {
                    engine.metrics.throttled_delayed.inc();
                    volume.changed();
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    return Ok(());
                }
                Verdict::WaitForRoom => {
                    engine.metrics.throttled_waited.inc();
                    engine.wake_flushers();
                    volume.usable()?;
                    if tokio::time::timeout_at(self.deadline, room).await.is_err() {
                        let detail = "too much is dirty and cannot be written out now";
                        return Err(Failure::new(Reason::Limit, detail).retry_after(1_000));
                    }
                }
            }
        }
    }

    /// Takes credit for as many blocks as the write may make dirty.
    async fn credit(&self) -> Result<(), Failure> {
        let Self { engine, volume, .. } = self;
        let wanted = self.blocks.len;
        let taken = volume.wait(|state| {
            if let Some(gone) = &state.gone {
                return Some(Err(gone.clone()));
            }
            match state.credit.take(wanted) {
                Take::Taken => Some(Ok(())),
                Take::NoSpace => {
                    let detail = "no space is left for another buffered write";
                    Some(Err(Failure::new(Reason::NoSpace, detail)))
                }
                Take::Short => None,
            }
        });
        tokio::pin!(taken);
        // The first look says what is short; only then there is something to ask for.
        if let Some(outcome) = taken.as_mut().now_or_never() {
            return outcome;
        }
        loop {
            engine.ask_credit(volume, false);
            let again = Duration::from_millis(engine.config.retry_max_ms);
            let until = self.deadline.min(Instant::now() + again);
            match tokio::time::timeout_at(until, taken.as_mut()).await {
                Ok(outcome) => return outcome,
                Err(_) if Instant::now() >= self.deadline => {
                    let refusal = volume.state().credit_refusal.clone();
                    return Err(refusal.unwrap_or_else(Failure::conversion_away));
                }
                Err(_) => {}
            }
        }
    }

    /// Log first, then the cache. `None`: the log stays full, because what it begins with, of some other
    /// volume perhaps, cannot be written out. The stores of this one may take the write all the same.
    async fn insert(
        &self,
        whole: &Bytes,
        admission: Option<&Admission>,
    ) -> Result<Option<Used>, Failure> {
        loop {
            let room = self.engine.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            match self.try_insert(whole, admission) {
                Err(CacheLogError::Full { .. } | CacheLogError::DiskFull) => {}
                Err(error) => return Err(error.into()),
                Ok(inserted) => return inserted.map(Some),
            }
            self.engine.want_everything_out();
            // What may be sent again has its key in one record with its data, or none of both.
            if admission.is_none() && self.engine.log.is_full_for(LOG_FULL_PATIENCE) {
                return Ok(None);
            }
            let until = self.deadline.min(Instant::now() + Duration::from_millis(100));
            let _ = tokio::time::timeout_at(until, room).await;
            if Instant::now() >= self.deadline {
                let detail = "the cache log is full and cannot be written out now";
                return Err(Failure::new(Reason::Limit, detail).retry_after(1_000));
            }
        }
    }

    fn try_insert(
        &self,
        whole: &Bytes,
        admission: Option<&Admission>,
    ) -> Result<Result<Used, Failure>, CacheLogError> {
        let Self { engine, volume, blocks, .. } = self;
        // Under the lock of the blocks nothing else becomes dirty there.
        let end = volume.state().dirty.end_of(*blocks, self.end_bytes());
        let record = WriteRecord {
            volume: VolumeId(volume.id),
            generation: Generation(volume.generation),
            blocks: *blocks,
            end_bytes: end,
            request: admission.map(Admission::key),
            result: self.op.data.len() as u64,
        };
        let trace = self.span.context();
        let cached: Vec<CachedBlock> = (0..whole.len() / BLOCK_SIZE)
            .map(|at| CachedBlock {
                data: whole.slice(at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE),
                trace,
            })
            .collect();
        let _order = engine.log.order();
        if let Err(gone) = volume.usable() {
            return Ok(Err(gone));
        }
        reach(Point::WritebackAccepted);
        let lsn = engine.log.append_write(&record, &[whole.as_ref()])?;
        reach(Point::WritebackLogged);
        let mut state = volume.state();
        // Taken by somebody else between the look above and this: it is lost like all that was dirty here,
        // which has been counted off by now, perhaps. The log has it, with its retry key.
        if let Some(why) = state.gone.clone() {
            state.credit.put_back(blocks.len);
            drop(state);
            // Whoever let the volume go saw nothing of it. Of a deleted one nobody wants to hear.
            if why.reason != Reason::UnknownVolume {
                engine.table.owe_loss(volume.id);
            }
            return Ok(Ok(Used { blocks: 0, wakes_flusher: false, flush_is_next: None }));
        }
        // Nothing waited: the flusher sleeps without an end. And a flush that saw the record in the
        // log may have looked for its data before it was here.
        let was_idle = state.dirty.waiting_blocks() == 0 || state.dirty_since.is_none();
        let wakes_flusher = was_idle || lsn <= state.flush_up_to;
        let used = match state.dirty.insert(*blocks, lsn, end, cached) {
            Ok(used) => used,
            // Blocks and data come from the same range, so this cannot differ.
            Err(error) => return Ok(Err(Failure::new(Reason::Malformed, error.to_string()))),
        };
        state.credit.put_back(blocks.len - used);
        state.view.wrote_up_to(end);
        state.dirty_since.get_or_insert_with(Instant::now);
        let flush_is_next = (self.op.mode == Mode::Buffered && state.rhythm.wrote()).then_some(lsn);
        // Under the lock: who writes it out counts it off.
        let wakes_flusher = engine.dirtied(volume.id, used) || wakes_flusher;
        Ok(Ok(Used { blocks: used, wakes_flusher, flush_is_next }))
    }
}
