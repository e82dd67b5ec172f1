//! Writes segments and makes them durable in groups.
//!
//! ```text
//!   bios ──► [queue] ──► writer threads: pwrite ──► [written] ──► flusher thread: one fdatasync for
//!            [large]     others for those that              everything written before it
//!                        go around the page cache
//! ```
//! While one flush runs, what is written meanwhile gathers for the next.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
};

use endio_failpoints::{Bug, Point, is_planted, reach, reach_io};
use endio_state_machine::gate::{FlightId, PunchTurn};
use endio_store::block::{TrackedDevice, WriteTicket};
use endio_types::Reason;

use crate::{bio::Segment, config::Config, driver::Driver, queue::Queue};

/// One admitted bio on its way to the device.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) flight: FlightId,
    pub(crate) segment: Segment,
    pub(crate) data: bytes::Bytes,
}

#[derive(Debug)]
struct Written {
    flight: FlightId,
    segment: Segment,
    ticket: WriteTicket,
}

/// The queues between the stages.
#[derive(Debug)]
pub(crate) struct Stages {
    bios: Queue<Box<Job>>,
    /// What waits for the disk while it is written, and would hold up the others.
    large: Queue<Box<Job>>,
    large_bytes_min: usize,
    written: Queue<Box<Written>>,
    punches: Queue<PunchTurn>,
}

impl Stages {
    /// Bios of at least so many bytes are large.
    pub(crate) fn new(large_bytes_min: usize) -> Self {
        Self {
            bios: Queue::new(),
            large: Queue::new(),
            large_bytes_min,
            written: Queue::new(),
            punches: Queue::new(),
        }
    }

    /// Hands a punch to its thread, or gives it back when that has stopped.
    pub(crate) fn punch(&self, turn: PunchTurn) -> Result<(), PunchTurn> {
        self.punches.push(turn)
    }

    /// Hands a job to the writers, or gives it back when they have stopped.
    pub(crate) fn submit(&self, job: Box<Job>) -> Result<(), Box<Job>> {
        match job.data.len() >= self.large_bytes_min {
            true => self.large.push(job),
            false => self.bios.push(job),
        }
    }
}

/// The threads of the stages. Dropping it ends them, too, without waiting.
#[derive(Debug)]
pub(crate) struct Writer {
    writers: Vec<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
    driver: Arc<Driver>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.driver.stages.bios.close();
        self.driver.stages.large.close();
        self.driver.stages.written.close();
        self.driver.stages.punches.close();
        self.driver.readers.close();
    }
}

impl Writer {
    /// Starts the writers, the flusher and the puncher.
    pub(crate) fn start(driver: &Arc<Driver>, config: &Config) -> io::Result<Self> {
        let spawn = |name: String, run: fn(&Driver)| {
            let driver = Arc::clone(driver);
            thread::Builder::new().name(name).spawn(move || run(&driver))
        };
        let mut writers = Vec::new();
        for index in 0..config.writer_threads {
            let run = |driver: &Driver| write_loop(driver, &driver.stages.bios);
            writers.push(spawn(format!("bio-writer-{index}"), run)?);
        }
        let threads = config.direct_write_bytes_min().map_or(0, |_| config.direct_writer_threads);
        for index in 0..threads {
            let run = |driver: &Driver| write_loop(driver, &driver.stages.large);
            writers.push(spawn(format!("bio-direct-{index}"), run)?);
        }
        let flusher = spawn("bio-flusher".to_owned(), flush_loop)?;
        let puncher = spawn("block-puncher".to_owned(), punch_loop)?;
        Ok(Self { writers, others: vec![flusher, puncher], driver: Arc::clone(driver) })
    }

    /// Finishes what is queued and ends the threads. Blocks on the device.
    pub(crate) fn stop(mut self) {
        self.driver.stages.bios.close();
        self.driver.stages.large.close();
        if !have_ended(&mut self.writers) {
            tracing::error!("a writer thread panicked");
        }
        self.driver.stages.written.close();
        self.driver.stages.punches.close();
        if !self.driver.readers.stop() {
            tracing::error!("a reader thread panicked");
        }
        if !have_ended(&mut self.others) {
            tracing::error!("the flusher or puncher thread panicked");
        }
    }
}

/// Waits for all of them. `false`: one panicked.
fn have_ended(threads: &mut Vec<JoinHandle<()>>) -> bool {
    threads.drain(..).fold(true, |fine, thread| thread.join().is_ok() & fine)
}

fn write_loop(driver: &Driver, jobs: &Queue<Box<Job>>) {
    while let Some(job) = jobs.pop() {
        let Job { flight, mut segment, data } = *job;
        driver.metrics.legs.wait.record_of(segment.next_leg(), segment.span.sampled());
        segment.span.phase("write");
        let result = driver.device.write_at(segment.token.pblk, &data);
        drop(data);
        driver.metrics.legs.write.record_of(segment.next_leg(), segment.span.sampled());
        let result = result.and_then(|ticket| reach_io(Point::StoreWritten).map(|()| ticket));
        match result {
            Ok(ticket) => {
                segment.span.phase("flush");
                let written = Box::new(Written { flight, segment, ticket });
                if let Err(written) = driver.stages.written.push(written) {
                    driver.finish(written.flight, written.segment, Err(Reason::Draining));
                }
            }
            Err(error) => {
                tracing::warn!(
                    pblk = segment.token.pblk.0,
                    blocks = segment.token.blocks,
                    %error,
                    "a segment could not be written"
                );
                driver.finish(flight, segment, Err(reason_of(&error)));
            }
        }
    }
}

fn flush_loop(driver: &Driver) {
    loop {
        let group = driver.stages.written.pop_all();
        if group.is_empty() {
            return;
        }
        let is_lying = is_planted(Bug::StoreSkipsFlush);
        let result = if is_lying { Ok(()) } else { driver.device.flush() };
        reach(Point::StoreFlushed);
        let failure = result.as_ref().err().map(reason_of);
        if let Err(error) = result {
            tracing::error!(
                segments = group.len(),
                %error,
                "a flush failed: nothing that it covers is durable"
            );
        }
        let size = group.len();
        for written in group {
            let Written { flight, mut segment, ticket } = *written;
            driver.metrics.legs.flush.record_of(segment.next_leg(), segment.span.sampled());
            segment.span.set("group", size);
            let outcome = outcome(&driver.device, ticket, failure);
            if outcome.is_err() {
                driver.metrics.lost_segments.inc();
            }
            driver.finish(flight, segment, outcome);
        }
    }
}

/// Punching goes beside the writers: it may take long and nobody waits for it.
fn punch_loop(driver: &Driver) {
    while let Some(turn) = driver.stages.punches.pop() {
        for range in &turn.ranges {
            if let Err(error) = driver.device.punch(*range) {
                driver.metrics.failed_punches.inc();
                let (pblk, blocks) = (range.start.0, range.len);
                tracing::warn!(pblk, blocks, %error, "blocks cannot be punched");
            }
        }
        reach(Point::StorePunched);
        driver.punched(&turn);
    }
}

/// A segment is durable only if its flush succeeded and none failed since its write began.
fn outcome(
    device: &TrackedDevice,
    ticket: WriteTicket,
    failure: Option<Reason>,
) -> Result<(), Reason> {
    match failure {
        Some(reason) => Err(reason),
        None if device.is_lost(ticket) => Err(Reason::IoError),
        None => Ok(()),
    }
}

/// A full device is told apart from a broken one.
fn reason_of(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::NoSpace,
        _ => Reason::IoError,
    }
}
