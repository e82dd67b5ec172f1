//! One write to the stores as an io_end, begun as often as it takes.
//!
//! ```text
//!   begin ──► bios handed over ──► [log durable] ──► submitter's release ──► completion
//!     ▲                                                                         │
//!     └────────── pause, attempt + 1, fresh blocks ◄── aborted, retryable ──────┘
//! ```
//!
//! Only two things end an attempt: its completion, or the loss of the session in which it began.
//! Until then the write never begins again, so an older attempt cannot convert after a newer one.
//! Nothing is ever sent twice under one token.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use endio_api::blockstore::Bio;
use endio_api::common::{Extent, ExtentState, Place};
use endio_api::conversion::{BeginIo, Completion, Lane, ReleaseSubmitter, Segment};
use endio_chassis::backoff::{Backoff, Delays};
use endio_chassis::metrics::Histogram;
use endio_chassis::trace::{Span, Why};
use endio_failpoints::{Point, reach};
use endio_state_machine::writeback::layout::{lblk_at, ranges_of};
use endio_state_machine::writeback::map_cache::Part;
use endio_types::{BLOCK_SIZE, Lblk, LblkRange, Reason};
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::session::{Granted, Session};
use crate::stores::{Sent, Stores};
use crate::volume::Volume;

/// A write of whole blocks.
pub(crate) struct Job {
    /// Number of the volume.
    pub volume: u64,
    /// Its name, for spans.
    pub name: Arc<str>,
    /// Generation under which it is open here.
    pub generation: u64,
    /// Write-out or direct.
    pub lane: Lane,
    /// Whose promise of space it uses; `None`: it uses none.
    pub promise: Option<Arc<Volume>>,
    /// The blocks: at least one range; ascending, without overlap. More than one only on volumes
    /// that are written by redirection.
    pub ranges: Vec<LblkRange>,
    /// Their data in that order: exactly as many bytes.
    pub data: Bytes,
    /// The size that the write extends a growable volume to, bytes; 0: it does not.
    pub size_after_bytes: u64,
    /// A caller waits for it.
    pub sync: bool,
    /// What the data log has of the blocks up to this number is older than the data, or the same.
    pub logged_up_to: u64,
    /// When to give up; every attempt ends before the answer.
    pub deadline: Instant,
    /// The write's span.
    pub span: Span,
}

impl Job {
    fn first(&self) -> LblkRange {
        self.ranges.first().copied().unwrap_or(LblkRange::new(0, 0))
    }

    fn blocks(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }
}

/// A job that is converted, durably.
pub(crate) struct Written {
    /// As conversion said.
    pub done: Completion,
    /// What the map says of the job's blocks now; empty where that is not known for certain.
    pub parts: Vec<Part<Arc<Extent>>>,
}

/// What has to be durable before the submitter's token is released.
pub(crate) type Gate<'a> = BoxFuture<'a, Result<(), Failure>>;

/// Bounds of writes on their way to the stores.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Blocks in flight of direct writes.
    pub direct_blocks: usize,
    /// Blocks in flight of write-out: its own capacity.
    pub write_out_blocks: usize,
    /// Pauses between attempts.
    pub backoff: (Duration, Duration),
}

/// Carries jobs out.
pub(crate) struct Submitter {
    session: Session,
    stores: Arc<Stores>,
    metrics: Arc<Metrics>,
    limits: Limits,
    direct: Semaphore,
    write_out: Semaphore,
}

/// One attempt that did not convert.
struct Missed {
    failure: Failure,
    store: u32,
    is_retryable: bool,
}

impl Submitter {
    /// A submitter over the session and the stores.
    pub(crate) fn new(
        session: Session,
        stores: Arc<Stores>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> Self {
        let direct = Semaphore::new(limits.direct_blocks);
        let write_out = Semaphore::new(limits.write_out_blocks);
        Self { session, stores, metrics, limits, direct, write_out }
    }

    /// Writes until the conversion is durable.
    ///
    /// `gate` is awaited once, before the first release of a submitter's token. Dropping the
    /// future leaves the io_end to its end at conversion; callers run it in a task of its own.
    ///
    /// # Errors
    /// The last attempt's failure when the job's deadline has passed, or at once where trying again
    /// cannot help. Nothing of the job is in flight then, or its session is gone.
    pub(crate) async fn write(&self, job: &Job, gate: Gate<'_>) -> Result<Written, Failure> {
        let mut room = Some(self.room(job).await?);
        let crcs: Vec<u32> = job.data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
        let (first, max) = self.limits.backoff;
        let backoff = Backoff { first, max, retries_max: None };
        let mut pauses = backoff.delays(crate::jitter());
        let mut avoid: Vec<u32> = Vec::new();
        let mut gate = Some(gate);
        for attempt in 1_u32.. {
            let missed = match self.attempt(job, &crcs, attempt, &avoid, &mut gate).await {
                Ok(done) => return Ok(done),
                Err(missed) => missed,
            };
            self.metrics.attempt_failed(missed.failure.reason);
            if !missed.is_retryable {
                return Err(missed.failure);
            }
            // What follows is recorded in all services: attempt 2 of the same trace.
            job.span.set("attempt", attempt + 1);
            job.span.keep(Why::Retried);
            // Ordinary when a store restarts, and then as many lines as writes were under way.
            tracing::debug!(
                volume = %job.name,
                attempt,
                store = missed.store,
                reason = %missed.failure.reason,
                error = %missed.failure.detail,
                "a write begins again"
            );
            note_store(&mut avoid, missed.store);
            // Write-outs of one volume whose stores are away leave room for those of others; their data is
            // dirty, and counted as that. Data of direct writes is nowhere else.
            if job.lane == Lane::WriteOut {
                room = None;
            }
            pause(&mut pauses, &missed.failure, job.deadline).await?;
            if room.is_none() {
                room = Some(self.room(job).await?);
            }
        }
        Err(Failure::new(Reason::TimedOut, "too many attempts"))
    }

    async fn room(&self, job: &Job) -> Result<SemaphorePermit<'_>, Failure> {
        let (lane, bound) = match job.lane {
            Lane::WriteOut => (&self.write_out, self.limits.write_out_blocks),
            _ => (&self.direct, self.limits.direct_blocks),
        };
        let blocks = usize::try_from(job.blocks()).unwrap_or(usize::MAX).min(bound);
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let permit = tokio::time::timeout_at(job.deadline, lane.acquire_many(blocks)).await;
        match permit {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(Failure::draining()),
            Err(_) => Err(timed_out(&Failure::new(Reason::Limit, "too many bytes in flight"))),
        }
    }

    async fn attempt(
        &self,
        job: &Job,
        crcs: &[u32],
        attempt: u32,
        avoid: &[u32],
        gate: &mut Option<Gate<'_>>,
    ) -> Result<Written, Missed> {
        let mut granted = self.begin(job, attempt, avoid).await?;
        let mut flight = Flight {
            submitter: self,
            job,
            attempt,
            session: granted.session,
            token: granted.begun.submitter.clone(),
            bios: FuturesUnordered::new(),
            missed: None,
        };
        flight.hand_over(&mut granted, crcs).await?;
        if flight.missed.is_none()
            && let Some(durable) = gate.take()
            && let Err(failure) = durable.await
        {
            // The log cannot be made durable: the write must not be released.
            flight.missed = Some(Missed { failure, store: 0, is_retryable: false });
        }
        reach(Point::WritebackGateOpen);
        flight.release().await;
        reach(Point::WritebackReleased);
        let parts = placed(job, &granted.begun.segments, crcs);
        let done = flight.completion(granted).await?;
        let converted: u64 = done.converted.chunks_exact(2).map(|pair| pair[1]).sum();
        let parts = if converted == job.blocks() { parts } else { Vec::new() };
        Ok(Written { done, parts })
    }

    async fn begin(&self, job: &Job, attempt: u32, avoid: &[u32]) -> Result<Granted, Missed> {
        let span = crate::TRACER
            .child(&job.span, "begin")
            .with("volume", &job.name)
            .with("attempt", attempt)
            .with("lblk", job.first().start.0)
            .with("blocks", job.blocks())
            .with("ranges", job.ranges.len());
        let started = Instant::now();
        let request = BeginIo {
            request: 0,
            volume: job.volume,
            generation: job.generation,
            lane: job.lane.into(),
            lblk: job.first().start.0,
            blocks: u32::try_from(job.first().len).unwrap_or(u32::MAX),
            more: job.ranges.iter().skip(1).flat_map(|range| [range.start.0, range.len]).collect(),
            size_after_bytes: job.size_after_bytes,
            avoid_stores: avoid.to_vec(),
            attempt,
            traceparent: job.span.traceparent(),
            sync: job.sync,
            logged_up_to: job.logged_up_to,
        };
        let begun = async {
            self.session.up().await;
            backed(job).await.map_err(|failure| (failure, false))?;
            reach(Point::WritebackBegin);
            let begun = self.session.begin(request).await;
            begun.map_err(|failure| {
                let begins_again = begins_again(job.lane, &failure);
                (failure, begins_again)
            })
        };
        let begun = tokio::time::timeout_at(job.deadline, begun).await;
        self.metrics.legs.begin.record_of(started.elapsed(), span.sampled());
        match begun {
            Ok(Ok(granted)) => {
                reach(Point::WritebackBegun);
                let io_end = granted.begun.submitter.as_ref().map_or(0, |token| token.io_end);
                span.set("io_end", io_end);
                Ok(granted)
            }
            Ok(Err((failure, is_retryable))) => {
                span.fail(&failure.detail);
                Err(Missed { failure, store: 0, is_retryable })
            }
            Err(_) => {
                let failure = timed_out(&Failure::conversion_away());
                span.fail(&failure.detail);
                Err(Missed { failure, store: 0, is_retryable: false })
            }
        }
    }
}

/// Waits until it is known whether there is a promise of space under this session. What was tried under
/// the one before may be converted, and have used up the promise of what waits.
///
/// # Errors
/// `NO_SPACE`: nothing is promised for all that is dirty. The volume is gone.
async fn backed(job: &Job) -> Result<(), Failure> {
    let Some(volume) = &job.promise else { return Ok(()) };
    let known = volume.wait(|state| match &state.gone {
        Some(gone) => Some(Err(gone.clone())),
        None if !state.credit.is_reset_pending() => Some(Ok(())),
        None if state.credit.is_outstanding() => None,
        None => Some(Err(Failure::unbacked())),
    });
    known.await
}

/// One attempt that has begun.
struct Flight<'a> {
    submitter: &'a Submitter,
    job: &'a Job,
    attempt: u32,
    session: u64,
    token: Option<endio_api::common::Token>,
    bios: FuturesUnordered<BoxFuture<'static, (u32, Result<(), Failure>)>>,
    /// Why the io_end is being given up.
    missed: Option<Missed>,
}

/// What became of a segment that is to be handed over.
enum Taken {
    /// Its store's stream has it.
    Sent(Sent),
    /// The io_end has to be given up.
    Missed(Missed),
    /// The io_end has ended by itself.
    Ended(Missed),
}

impl Flight<'_> {
    /// Hands every segment to its store's stream, until one cannot be.
    ///
    /// # Errors
    /// The io_end ended meanwhile: nothing is left to be released.
    async fn hand_over(&mut self, granted: &mut Granted, crcs: &[u32]) -> Result<(), Missed> {
        let Granted { begun, done, .. } = granted;
        let segments = &begun.segments;
        // A conversion that knows no further ranges would leave them out, and call it done.
        let firsts = segments.iter().filter(|segment| segment.replica == 0);
        let blocks: u64 =
            firsts.filter_map(|s| s.token.as_ref()).map(|t| u64::from(t.blocks)).sum();
        if self.job.blocks() != blocks {
            let failure = Failure::new(Reason::Malformed, "the grant is not for the whole write");
            self.missed = Some(Missed { failure, store: 0, is_retryable: false });
            return Ok(());
        }
        for segment in segments {
            let Some(bio) = self.bio(segment, crcs) else {
                let failure = Failure::new(Reason::Malformed, "a segment beyond its write");
                self.missed = Some(Missed { failure, store: 0, is_retryable: false });
                return Ok(());
            };
            let (mut bio, span) = bio;
            bio.traceparent = span.traceparent();
            let store = bio.token.as_ref().map_or(0, |token| token.store);
            match self.taken(bio, store, done).await {
                Taken::Sent(sent) => {
                    let time = self.submitter.metrics.legs.bio.clone();
                    self.bios.push(Box::pin(segment_done(store, sent, span, time)));
                    reach(Point::WritebackBioSent);
                }
                Taken::Missed(missed) => {
                    span.fail(&missed.failure.detail);
                    self.missed = Some(missed);
                    return Ok(());
                }
                Taken::Ended(missed) => {
                    span.fail(&missed.failure.detail);
                    return Err(missed);
                }
            }
        }
        Ok(())
    }

    /// Waits until a store's stream has taken a segment. A stream of a store that is silent takes nothing
    /// for long, so whatever ends the attempt ends the wait: the segment is not sent then, nor later.
    async fn taken(
        &mut self,
        bio: Bio,
        store: u32,
        done: &mut oneshot::Receiver<Completion>,
    ) -> Taken {
        let taken = self.submitter.stores.write(bio);
        tokio::pin!(taken);
        loop {
            tokio::select! {
                biased;
                done = &mut *done => {
                    let is_told = done.is_ok();
                    let mut missed = match self.ended(done.ok()) {
                        Err(missed) => missed,
                        // Its submitter has not released it.
                        Ok(_) => {
                            let detail = "a write is called done that was not submitted";
                            let failure = Failure::new(Reason::Malformed, detail);
                            Missed { failure, store: 0, is_retryable: false }
                        }
                    };
                    if is_told && missed.store == 0 {
                        // Conversion cannot know whom the write waited for.
                        missed.store = store;
                    }
                    return Taken::Ended(missed);
                }
                sent = &mut taken => return match sent {
                    Ok(sent) => Taken::Sent(sent),
                    Err(failure) => Taken::Missed(Missed { failure, store, is_retryable: true }),
                },
                Some((store, outcome)) = self.bios.next() => {
                    if let Err(failure) = outcome {
                        return Taken::Missed(Missed { failure, store, is_retryable: true });
                    }
                }
                () = at(Some(self.job.deadline)) => {
                    let last = Failure::new(Reason::PeerAway, "a block-store takes nothing");
                    let failure = timed_out(&last);
                    return Taken::Missed(Missed { failure, store, is_retryable: false });
                }
            }
        }
    }

    fn bio(&self, segment: &Segment, crcs: &[u32]) -> Option<(Bio, Span)> {
        let token = segment.token.clone()?;
        // Both sides count the blocks of a write alike, or its data would land elsewhere.
        let lblk = lblk_at(&self.job.ranges, segment.offset_blocks.into());
        if lblk != Some(Lblk(segment.lblk)) {
            return None;
        }
        let first = segment.offset_blocks as usize;
        let end = first.checked_add(token.blocks as usize)?;
        let crc32c = crcs.get(first..end)?.to_vec();
        let data = self.job.data.slice(first * BLOCK_SIZE..end * BLOCK_SIZE);
        let span = crate::TRACER
            .child(&self.job.span, "segment")
            .with("volume", &self.job.name)
            .with("io_end", token.io_end)
            .with("segment", token.segment)
            .with("attempt", self.attempt)
            .with("store", token.store)
            .with("lblk", segment.lblk)
            .with("blocks", token.blocks);
        let bio = Bio { token: Some(token), data, crc32c, traceparent: String::new() };
        Some((bio, span))
    }

    /// Releases the submitter's token: for conversion, or to give the io_end up.
    async fn release(&mut self) {
        let release = ReleaseSubmitter {
            token: self.token.clone(),
            not_submitted: Vec::new(),
            abort: self.missed.is_some(),
            traceparent: self.job.span.traceparent(),
        };
        self.submitter.session.release(self.session, release).await;
    }

    /// Waits for the io_end's end. A bio that fails or whose stream breaks gives the io_end up.
    async fn completion(mut self, mut granted: Granted) -> Result<Completion, Missed> {
        let span = crate::TRACER
            .child(&self.job.span, "completion")
            .with("volume", &self.job.name)
            .with("attempt", self.attempt)
            .with("io_end", self.token.as_ref().map_or(0, |token| token.io_end));
        let started = Instant::now();
        let mut deadline = self.missed.is_none().then_some(self.job.deadline);
        loop {
            tokio::select! {
                biased;
                done = &mut granted.done => {
                    reach(Point::WritebackCompleted);
                    let ended = self.ended(done.ok());
                    if let Err(missed) = &ended {
                        span.fail(&missed.failure.detail);
                    }
                    let time = &self.submitter.metrics.legs.complete;
                    time.record_of(started.elapsed(), span.sampled());
                    return ended;
                }
                Some((store, outcome)) = self.bios.next() => {
                    if let (Err(failure), None) = (outcome, &self.missed) {
                        self.missed = Some(Missed { failure, store, is_retryable: true });
                        self.release().await;
                    }
                }
                () = at(deadline) => {
                    deadline = None;
                    if self.missed.is_none() {
                        let failure = timed_out(&Failure::new(Reason::Aborted, "given up"));
                        self.missed = Some(Missed { failure, store: 0, is_retryable: false });
                        self.release().await;
                    }
                }
            }
        }
    }

    /// What the end of the io_end means for the job.
    fn ended(&mut self, done: Option<Completion>) -> Result<Completion, Missed> {
        let Some(done) = done else {
            // The io_end died with its session. What had failed before says more than that.
            return Err(self.missed.take().unwrap_or(Missed {
                failure: Failure::conversion_away(),
                store: 0,
                is_retryable: true,
            }));
        };
        match Failure::from_wire(done.reason, &done.message) {
            None => Ok(done),
            Some(failure) => Err(self.missed.take().unwrap_or(Missed {
                is_retryable: done.retryable || failure.reason.is_retryable(),
                store: done.failed_store,
                failure,
            })),
        }
    }
}

/// What the map will say of a job's blocks once it is converted. Written for volumes that are
/// written by redirection: every block gets the place that was granted for it.
fn placed(job: &Job, segments: &[Segment], crcs: &[u32]) -> Vec<Part<Arc<Extent>>> {
    let mut parts = Vec::new();
    for first in segments.iter().filter(|segment| segment.replica == 0) {
        let copies = segments.iter().filter(|s| s.offset_blocks == first.offset_blocks);
        let places: Vec<(u32, u64)> =
            copies.filter_map(|s| s.token.as_ref()).map(|t| (t.store, t.pblk)).collect();
        let blocks = first.token.as_ref().map_or(0, |token| u64::from(token.blocks));
        let offset = u64::from(first.offset_blocks);
        for (range, nth) in ranges_of(&job.ranges, offset, blocks) {
            let from = nth as usize;
            let crc32c = crcs.get(from..from + range.len as usize).unwrap_or_default().to_vec();
            let place =
                |(store, pblk): &(u32, u64)| Place { store: *store, pblk: pblk + (nth - offset) };
            let extent = Extent {
                lblk: range.start.0,
                blocks: u32::try_from(range.len).unwrap_or(u32::MAX),
                state: ExtentState::Written.into(),
                places: places.iter().map(place).collect(),
                crc32c,
            };
            parts.push((range, Some(Arc::new(extent))));
        }
    }
    parts
}

async fn segment_done(
    store: u32,
    sent: Sent,
    span: Span,
    time: Histogram,
) -> (u32, Result<(), Failure>) {
    let started = Instant::now();
    let outcome = sent.done().await;
    if let Err(failure) = &outcome {
        span.fail(&failure.detail);
    }
    time.record_of(started.elapsed(), span.sampled());
    (store, outcome)
}

/// Whether a refused begin is worth another try: where only time can help and will.
fn begins_again(lane: Lane, failure: &Failure) -> bool {
    match failure.reason {
        // A caller is told at once that the system is full; data that was acknowledged waits.
        Reason::NoSpace | Reason::MetadataFull => {
            lane == Lane::WriteOut || failure.retry_after_ms > 0
        }
        reason => reason.is_retryable(),
    }
}

/// Remembers the last few stores that failed: avoiding all of them would leave none.
fn note_store(avoid: &mut Vec<u32>, store: u32) {
    const AVOID_MAX: usize = 4;
    if store != 0 && !avoid.contains(&store) {
        avoid.push(store);
    }
    if avoid.len() > AVOID_MAX {
        avoid.remove(0);
    }
}

/// Waits before the next attempt.
async fn pause<R: rand::Rng>(
    pauses: &mut Delays<R>,
    failure: &Failure,
    deadline: Instant,
) -> Result<(), Failure> {
    let hint = Duration::from_millis(failure.retry_after_ms.into());
    let pause = pauses.next().unwrap_or(hint).max(hint);
    if Instant::now() + pause >= deadline {
        return Err(timed_out(failure));
    }
    tokio::time::sleep(pause).await;
    Ok(())
}

/// The failure of a job that ran out of time, with what held it up last.
fn timed_out(last: &Failure) -> Failure {
    let detail = format!("the I/O timeout passed; last: {} ({})", last.detail, last.reason);
    Failure::new(Reason::TimedOut, detail)
}

/// Waits for a point in time; `None`: for ever.
pub(crate) async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
