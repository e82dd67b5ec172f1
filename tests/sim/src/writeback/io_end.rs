//! One write to the stores as an io_end, begun as often as it takes.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use endio_state_machine::chunk::{ExtentState, Place, Places};
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::machine::{BeginIo, Completion, GrantedSegment, Lane};
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::layout::{lblk_at, ranges_of};
use endio_state_machine::writeback::map_cache::Part;
use endio_types::{LblkRange, Pblk, Reason, StoreId};

use super::stores::Done;
use super::{Failure, Granted, Outcome, Volume, Wb};
use crate::block::{Block, crcs};
use crate::exec::{Awaited, MS};
use crate::net::Message;
use crate::world::Planted;

/// A write of whole blocks.
pub(super) struct Job {
    pub(super) lane: Lane,
    /// Ascending, at least one; more than one only on volumes that are written by redirection.
    pub(super) ranges: Vec<LblkRange>,
    /// Of all ranges, in order.
    pub(super) data: Vec<Block>,
    pub(super) size_after_bytes: u64,
    /// What the data log has of the blocks up to this number is older than the data, or the same.
    pub(super) logged_up_to: u64,
    pub(super) deadline: u64,
    /// The log must be durable up to here before the submitter's token is released.
    pub(super) gate: Option<Lsn>,
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
pub(super) struct Written {
    pub(super) done: Completion,
    /// What the map says of the job's blocks now; empty where that is not known for certain.
    pub(super) parts: Vec<Part<Rc<MapExtent>>>,
}

struct Missed {
    failure: Failure,
    store: StoreId,
    is_retryable: bool,
}

enum Next {
    Done(Option<Completion>),
    Bio(StoreId, Option<Reason>),
    Late,
}

impl Wb {
    /// Writes until the conversion is durable.
    pub(super) async fn submit(&self, volume: &Volume, job: &Job) -> Outcome<Written> {
        let exec = self.exec();
        let mut avoid: Vec<StoreId> = Vec::new();
        let mut gate = job.gate;
        let mut pause_ms = 1;
        let mut doubt = None;
        for attempt in 1.. {
            let mut missed = match self.attempt(volume, job, attempt, &avoid, &mut gate).await {
                Ok(done) => return Ok(done),
                Err(missed) => missed,
            };
            doubt = missed.failure.doubt.or(doubt);
            missed.failure.doubt = doubt;
            if !missed.is_retryable {
                return Err(missed.failure);
            }
            if missed.store.0 != 0 && !avoid.contains(&missed.store) {
                avoid.push(missed.store);
                if avoid.len() > 4 {
                    avoid.remove(0);
                }
            }
            let pause = exec.between(1, pause_ms).max(missed.failure.retry_ms) * MS;
            pause_ms = (pause_ms * 2).min(self.world.plan.retry_max_ms);
            if exec.now() + pause >= job.deadline {
                return Err(Failure { reason: Reason::TimedOut, ..missed.failure });
            }
            exec.sleep(pause).await;
        }
        Err(Failure::new(Reason::TimedOut))
    }

    async fn attempt(
        &self,
        volume: &Volume,
        job: &Job,
        attempt: u32,
        avoid: &[StoreId],
        gate: &mut Option<Lsn>,
    ) -> Result<Written, Missed> {
        let granted = self.begin_attempt(volume, job, attempt, avoid).await?;
        let io_end = granted.submitter.io_end;
        let first = job.first();
        self.exec().note("begun", self.node(), &[io_end.0, first.start.0, job.blocks()]);
        let mut bios: Vec<(StoreId, Awaited<Done>)> = Vec::new();
        let mut missed = None;
        let firsts = granted.segments.iter().filter(|segment| segment.replica == 0);
        if firsts.map(|segment| u64::from(segment.token.blocks)).sum::<u64>() != job.blocks() {
            self.exec().fail("grant-covers-write: the grant is not for the whole write");
        }
        for segment in &granted.segments {
            let store = segment.token.store;
            let Some(bio) = bio(job, segment) else {
                self.exec().fail("grant-covers-write: a segment beyond its write");
                break;
            };
            match self.hand_over(store, bio) {
                Ok(done) => bios.push((store, done)),
                Err(failure) => {
                    missed = Some(Missed { failure, store, is_retryable: true });
                    break;
                }
            }
            if self.exec().chance(100) {
                self.exec().sleep(self.exec().below(100)).await;
            }
        }
        if missed.is_none()
            && let Some(lsn) = gate.take()
            && let Err(failure) = self.log_durable(lsn).await
        {
            missed = Some(Missed { failure, store: StoreId(0), is_retryable: false });
        }
        self.release(granted.session, granted.submitter, missed.is_some());
        let parts = placed(job, &granted.segments);
        let done = self.completion(job, granted, bios, missed).await?;
        let converted: u64 = done.converted.iter().map(|range| range.len).sum();
        let parts = if converted == job.blocks() { parts } else { Vec::new() };
        Ok(Written { done, parts })
    }

    async fn begin_attempt(
        &self,
        volume: &Volume,
        job: &Job,
        attempt: u32,
        avoid: &[StoreId],
    ) -> Result<Granted, Missed> {
        let logged_up_to = match self.world.planted(Planted::LoggedUpToLate) {
            true => volume.state.borrow().dirty.log_number(),
            false => job.logged_up_to,
        };
        let begin = BeginIo {
            request: 0,
            volume: volume.id,
            generation: volume.generation,
            lane: job.lane,
            lblk: job.first().start,
            blocks: job.first().len as u32,
            more: job.ranges.iter().skip(1).copied().collect(),
            size_after_bytes: job.size_after_bytes,
            avoid_stores: avoid.to_vec(),
            attempt,
            traceparent: String::new(),
            sync: job.lane == Lane::Direct,
            logged_up_to,
        };
        let begun = async {
            self.up().await;
            if let Err(failure) = self.backed(volume, job).await {
                return Err((failure, false));
            }
            let begun = self.begin(begin).await;
            begun.map_err(|failure| (failure, begins_again(job.lane, &failure)))
        };
        let store = StoreId(0);
        match self.exec().until(job.deadline, begun).await {
            Some(Ok(granted)) => Ok(granted),
            Some(Err((failure, is_retryable))) => {
                self.exec().note("begin refused", self.node(), &[failure.reason as u64]);
                Err(Missed { failure, store, is_retryable })
            }
            None => {
                let failure = Failure::new(Reason::TimedOut);
                Err(Missed { failure, store, is_retryable: false })
            }
        }
    }

    /// Waits until it is known whether a write-out has its promise of space under this session. What was
    /// tried under the one before may be converted, and have used up the promise of what waits.
    async fn backed(&self, volume: &Volume, job: &Job) -> Outcome<()> {
        if job.lane != Lane::WriteOut {
            return Ok(());
        }
        volume
            .wait(|state| match &state.credit {
                _ if state.gone.is_some() => Some(state.gone.map_or(Ok(()), Err)),
                credit if !credit.is_reset_pending() => Some(Ok(())),
                credit if credit.is_outstanding() => None,
                _ => Some(Err(Failure::new(Reason::NoSpace))),
            })
            .await
    }

    /// Waits for the io_end's end. A bio that fails or whose stream breaks gives it up.
    async fn completion(
        &self,
        job: &Job,
        mut granted: Granted,
        mut bios: Vec<(StoreId, Awaited<Done>)>,
        mut missed: Option<Missed>,
    ) -> Result<Completion, Missed> {
        let exec = self.exec();
        let mut deadline = missed.is_none().then_some(job.deadline);
        loop {
            let mut is_set = false;
            let next = poll_fn(|context| {
                if let Poll::Ready(done) = Pin::new(&mut granted.done).poll(context) {
                    return Poll::Ready(Next::Done(done));
                }
                for at in 0..bios.len() {
                    if let Poll::Ready(done) = Pin::new(&mut bios[at].1).poll(context) {
                        let (store, _) = bios.swap_remove(at);
                        let failed = match done {
                            Some(Ok(_)) => None,
                            Some(Err(reason)) => Some(reason),
                            None => Some(Reason::PeerAway),
                        };
                        return Poll::Ready(Next::Bio(store, failed));
                    }
                }
                match deadline {
                    Some(at) if exec.now() >= at => return Poll::Ready(Next::Late),
                    Some(at) if !std::mem::replace(&mut is_set, true) => {
                        exec.wake_at(at, context.waker());
                    }
                    _ => {}
                }
                Poll::Pending
            });
            let gave_up = match next.await {
                Next::Done(done) => return ended(done, missed, granted.session),
                Next::Bio(_, None) => continue,
                Next::Bio(store, Some(reason)) => {
                    Missed { failure: Failure::new(reason), store, is_retryable: true }
                }
                Next::Late => {
                    deadline = None;
                    let failure = Failure::new(Reason::TimedOut);
                    Missed { failure, store: StoreId(0), is_retryable: false }
                }
            };
            if missed.is_none() {
                missed = Some(gave_up);
                self.release(granted.session, granted.submitter, true);
            }
        }
    }
}

/// What the end of the io_end means for the job.
fn ended(
    done: Option<Completion>,
    missed: Option<Missed>,
    session: u64,
) -> Result<Completion, Missed> {
    let Some(done) = done else {
        // The io_end died with its session; until the next one stands it may still convert.
        let mut missed = missed.unwrap_or(Missed {
            failure: Failure::away(),
            store: StoreId(0),
            is_retryable: true,
        });
        missed.failure.doubt = Some(session);
        return Err(missed);
    };
    let Some(reason) = done.failed else { return Ok(done) };
    Err(missed.unwrap_or(Missed {
        failure: Failure::new(reason),
        store: done.failed_store.unwrap_or(StoreId(0)),
        is_retryable: done.retryable || reason.is_retryable(),
    }))
}

/// `None`: both sides do not count the blocks of the write alike.
fn bio(job: &Job, segment: &GrantedSegment) -> Option<Message> {
    if lblk_at(&job.ranges, segment.offset_blocks.into()) != Some(segment.lblk) {
        return None;
    }
    let first = segment.offset_blocks as usize;
    let data = job.data.get(first..first + segment.token.blocks as usize)?.to_vec();
    let crcs = crcs(&data);
    Some(Message::Bio { token: segment.token, data, crcs })
}

/// What the map will say of a job's blocks once it is converted.
fn placed(job: &Job, segments: &[GrantedSegment]) -> Vec<Part<Rc<MapExtent>>> {
    let sums = crcs(&job.data);
    let mut parts = Vec::new();
    for first in segments.iter().filter(|segment| segment.replica == 0) {
        let offset = u64::from(first.offset_blocks);
        for (range, nth) in ranges_of(&job.ranges, offset, first.token.blocks.into()) {
            let copies = segments.iter().filter(|s| s.offset_blocks == first.offset_blocks);
            let place = |s: &GrantedSegment| Place {
                store: s.token.store,
                pblk: Pblk(s.token.pblk.0 + (nth - offset)),
            };
            let Some(places) = Places::new(&copies.map(place).collect::<Vec<_>>()) else {
                continue;
            };
            let from = nth as usize;
            let crcs = sums.get(from..from + range.len as usize).unwrap_or_default().to_vec();
            let extent = MapExtent { range, state: ExtentState::Written, places, crcs };
            parts.push((range, Some(Rc::new(extent))));
        }
    }
    parts
}

/// Whether a refused begin is worth another try: where only time can help and will.
fn begins_again(lane: Lane, failure: &Failure) -> bool {
    match failure.reason {
        Reason::NoSpace | Reason::MetadataFull => lane == Lane::WriteOut || failure.retry_ms > 0,
        reason => reason.is_retryable(),
    }
}
