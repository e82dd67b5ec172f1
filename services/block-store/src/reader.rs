//! Reads of blocks that are not in memory.
//!
//! ```text
//!   requests ──► stream's task: asks the device ──► [waiting] ──► reader threads: wait for the data
//!                     │ in memory already                             │
//!                     └───────────────────► ReadDone ◄────────────────┘
//! ```
//! The attempt to read without a wait has begun the transfer where the file system can do that. So the
//! device works on all reads that a stream had ready, and one thread finds most of them done. It goes
//! on alone as long as the device is fast: a second one would only take its processor. Of a slow
//! device as many threads wait as it takes for one of them to come back each `reader_each_us`.
//!
//! While anything waits for a thread a task looks after it: what hangs in the device does not hold up
//! the reads behind it.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use endio_api::{
    blockstore::{ReadDone, ReadRequest},
    convert::reason_to_wire,
};
use endio_chassis::trace::Span;
use endio_failpoints::{Bug, is_planted};
use endio_state_machine::gate::FlightId;
use endio_types::{BLOCK_SIZE, Pblk, Reason};
use tokio::sync::OwnedSemaphorePermit;
use tracing::warn;
use tracing_mutex::stdsync::{Condvar, Mutex, MutexGuard};

use crate::{bio::Reply, driver::Driver, wire};

/// Blocks of a read that is tried on the stream's own task: the copy and the checksums of more would
/// hold up what else the task's thread has to do.
const AT_ONCE_BLOCKS_MAX: u32 = 16;
/// Another thread is called when none came back in this many times the time of one.
const STUCK: u64 = 16;
/// Longest time of a read that counts for the pace.
const TOOK_MAX: Duration = Duration::from_secs(1);

/// Tells the gate that a read has ended, also if the reading panicked.
#[derive(Debug)]
struct Reading {
    driver: Arc<Driver>,
    flight: FlightId,
    _turn: OwnedSemaphorePermit,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.driver.finish_read(self.flight);
    }
}

/// An admitted read.
#[derive(Debug)]
pub(crate) struct Job {
    request: ReadRequest,
    reply: Reply<ReadDone>,
    reading: Reading,
    span: Span,
    began: Instant,
    data: Vec<u8>,
}

impl Job {
    /// Asks the gate. `None`: it refused, and that is answered.
    pub(crate) fn admit(
        driver: &Arc<Driver>,
        turn: OwnedSemaphorePermit,
        request: ReadRequest,
        reply: Reply<ReadDone>,
    ) -> Option<Box<Self>> {
        let flight = match driver.admit_read(&request) {
            Ok(flight) => flight,
            Err(reason) => {
                reply.send(refusal(&request, reason, "the read is not allowed here and now"));
                return None;
            }
        };
        let reading = Reading { driver: Arc::clone(driver), flight, _turn: turn };
        let span = crate::TRACER
            .leg("segment", &request.traceparent)
            .with("pblk", request.pblk)
            .with("blocks", request.blocks)
            .with("length", u64::from(request.blocks) * BLOCK_SIZE as u64);
        let data = vec![0; request.blocks as usize * BLOCK_SIZE];
        Some(Box::new(Self { request, reply, reading, span, began: Instant::now(), data }))
    }

    /// Answers a few blocks if that needs no wait for a disk. Else the device has begun to fetch them,
    /// where it can do that.
    pub(crate) fn at_once(mut self: Box<Self>) -> Result<(), Box<Self>> {
        if self.request.blocks > AT_ONCE_BLOCKS_MAX {
            return Err(self);
        }
        let driver = Arc::clone(&self.reading.driver);
        match driver.device.read_at_once(Pblk(self.request.pblk), &mut self.data) {
            Ok(false) => return Err(self),
            Ok(true) => self.end(Ok(())),
            Err(error) => self.end(Err(error)),
        }
        Ok(())
    }

    /// Reads and answers. Blocks on the device. Returns how long that took.
    fn read(mut self: Box<Self>) -> Duration {
        let began = Instant::now();
        let device = &self.reading.driver.device;
        let read = || device.read_at(Pblk(self.request.pblk), &mut self.data);
        // A defect in one read is no reason to lose a thread, or to leave its caller waiting.
        let read = catch_unwind(AssertUnwindSafe(read));
        let took = began.elapsed();
        self.end(read.unwrap_or_else(|_| Err(io::Error::other("the reading panicked"))));
        took
    }

    /// Compares what was read, tells the gate that the read has ended, and answers.
    fn end(self: Box<Self>, read: io::Result<()>) {
        let Self { request, reply, reading, span, began, data } = *self;
        let done = compare(&reading.driver, &request, began, read.map(|()| data));
        if done.reason != 0 {
            span.fail(&done.message);
        }
        drop((reading, span));
        reply.send(done);
    }
}

fn refusal(request: &ReadRequest, reason: Reason, message: &str) -> ReadDone {
    ReadDone {
        request: request.request,
        reason: reason_to_wire(Some(reason)),
        message: message.to_owned(),
        ..ReadDone::default()
    }
}

fn compare(
    driver: &Driver,
    request: &ReadRequest,
    began: Instant,
    read: io::Result<Vec<u8>>,
) -> ReadDone {
    let data = match read {
        Ok(data) => data,
        Err(error) => {
            let (pblk, blocks) = (request.pblk, request.blocks);
            warn!(pblk, blocks, %error, "blocks cannot be read");
            return refusal(request, Reason::IoError, "the device failed to read");
        }
    };
    if let Some(block) = wire::first_mismatch(&data, &request.crc32c)
        && !is_planted(Bug::ReadSkipsChecksum)
    {
        let bad_pblk = request.pblk + block as u64;
        driver.metrics.bad_blocks.inc();
        warn!(pblk = bad_pblk, "a block does not match its checksum");
        let refusal = refusal(request, Reason::ChecksumMismatch, "the block is damaged");
        return ReadDone { bad_pblk, ..refusal };
    }
    driver.metrics.reads.inc();
    driver.metrics.read_blocks.add(request.blocks.into());
    driver.metrics.read_us.add(began.elapsed().as_micros() as u64);
    ReadDone { request: request.request, data: data.into(), ..ReadDone::default() }
}

/// What waits for the device, and who waits with it.
#[derive(Debug)]
pub(crate) struct Readers {
    state: Mutex<State>,
    called: Condvar,
    threads_max: usize,
    each_us: u64,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Box<Job>>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that sleep until they are called.
    asleep: usize,
    /// Calls that no thread has heard yet.
    calls: usize,
    /// Mean time that a read took of late, µs.
    pace_us: u64,
    /// Reads taken so far, for whoever looks after them.
    taken: u64,
    is_watched: bool,
    is_closed: bool,
}

impl State {
    /// Threads that read, or are about to.
    fn awake(&self) -> usize {
        self.threads.len() - self.asleep
    }
}

impl Readers {
    pub(crate) fn new(threads_max: usize, each_us: u64) -> Self {
        Self { state: Mutex::default(), called: Condvar::new(), threads_max, each_us }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after each statement; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing in any more; what waits is still read.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.called.notify_all();
    }

    /// Lets nothing in any more, and waits for the threads. `false`: one of them panicked.
    pub(crate) fn stop(&self) -> bool {
        self.close();
        let threads = std::mem::take(&mut self.lock().threads);
        threads.into_iter().fold(true, |fine, thread| thread.join().is_ok() & fine)
    }

    /// How many threads wait for a device of that pace.
    fn wanted(&self, pace_us: u64) -> usize {
        usize::try_from(pace_us / self.each_us).unwrap_or(usize::MAX).clamp(1, self.threads_max)
    }
}

/// Hands reads over to the threads, in one step.
pub(crate) fn submit(driver: &Arc<Driver>, jobs: &mut VecDeque<Box<Job>>) {
    if jobs.is_empty() {
        return;
    }
    let mut state = driver.readers.lock();
    if state.is_closed {
        drop(state);
        for job in jobs.drain(..) {
            let Job { request, reply, .. } = *job;
            reply.send(refusal(&request, Reason::Draining, "the store is stopping"));
        }
        return;
    }
    state.waiting.append(jobs);
    let wanted = driver.readers.wanted(state.pace_us);
    let waiting = state.waiting.len();
    let called = call_up_to(driver, &mut state, wanted, waiting);
    let is_unwatched = called < waiting && !std::mem::replace(&mut state.is_watched, true);
    drop(state);
    if is_unwatched {
        tokio::spawn(watch(Arc::clone(driver)));
    }
}

/// Calls threads until so many are awake, but no more than have something to do. Returns how many.
fn call_up_to(driver: &Arc<Driver>, state: &mut State, wanted: usize, waiting: usize) -> usize {
    let idle = waiting.saturating_sub(state.calls);
    let missing = wanted.saturating_sub(state.awake()).min(idle);
    for called in 0..missing {
        if state.asleep > 0 {
            state.asleep -= 1;
            state.calls += 1;
            driver.readers.called.notify_one();
            continue;
        }
        let name = format!("block-reader-{}", state.threads.len());
        let driver = Arc::clone(driver);
        match thread::Builder::new().name(name).spawn(move || read_loop(&driver)) {
            Ok(thread) => state.threads.push(thread),
            Err(error) => {
                warn!(threads = state.threads.len(), %error, "a reader thread cannot be started");
                return called;
            }
        }
    }
    missing
}

/// One of the threads.
fn read_loop(driver: &Arc<Driver>) {
    let readers = &driver.readers;
    let mut state = readers.lock();
    loop {
        let Some(job) = state.waiting.pop_front() else {
            if state.is_closed {
                return;
            }
            state.asleep += 1;
            state = readers
                .called
                .wait_while(state, |state| state.calls == 0 && !state.is_closed)
                .unwrap_or_else(PoisonError::into_inner);
            match state.calls {
                0 => state.asleep -= 1,
                _ => state.calls -= 1,
            }
            continue;
        };
        state.taken += 1;
        drop(state);
        let took = job.read();
        state = readers.lock();
        state.pace_us = paced(state.pace_us, took);
        let wanted = readers.wanted(state.pace_us);
        // One of those that wait is for this thread itself.
        let others = state.waiting.len().saturating_sub(1);
        call_up_to(driver, &mut state, wanted, others);
    }
}

/// Looks after what waits until nothing does.
async fn watch(driver: Arc<Driver>) {
    let stuck = Duration::from_micros(driver.readers.each_us * STUCK);
    let mut taken = None;
    loop {
        tokio::time::sleep(stuck).await;
        let mut state = driver.readers.lock();
        if state.is_closed || state.waiting.is_empty() {
            state.is_watched = false;
            return;
        }
        if taken.replace(state.taken) == Some(state.taken) {
            let one_more = (state.awake() + 1).min(driver.readers.threads_max);
            let waiting = state.waiting.len();
            call_up_to(&driver, &mut state, one_more, waiting);
        }
    }
}

/// The mean time of reads, the last ones above all, after one that took so long.
fn paced(pace_us: u64, took: Duration) -> u64 {
    // One that hangs for long is no pace: what comes after it may be quick.
    let took = took.min(TOOK_MAX).as_micros();
    (pace_us * 7 + u64::try_from(took).unwrap_or(u64::MAX)) / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_threads_wait_that_one_comes_back_in_time() {
        let readers = Readers::new(16, 150);
        let wanted = [0, 149, 299, 300, 2_399, 2_400, u64::MAX].map(|pace| readers.wanted(pace));
        assert_eq!(wanted, [1, 1, 1, 2, 15, 16, 16]);
    }

    #[test]
    fn the_pace_follows_a_device_that_becomes_slow_or_fast() {
        let after = |pace, took| (0..40).fold(pace, |pace, _| paced(pace, took));
        assert!((4_900..=5_000).contains(&after(0, Duration::from_millis(5))));
        assert!((50..100).contains(&after(5_000, Duration::from_micros(57))));
        // A hang counts as one slow read.
        assert_eq!(paced(0, Duration::from_secs(3_600)), 125_000);
    }
}
