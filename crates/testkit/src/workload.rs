//! A random history of one volume, judged by the oracle as it goes.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use endio_api::writeback::IoCompletion;
use endio_types::Reason;

use crate::checkers::{self, Completions};
use crate::client::{Client, Pipe, Put};
use crate::oracle::{At, Crash, Flush, Oracle};
use crate::seed::Rng;

/// Cells of half a kibibyte: most writes are not aligned to a block.
pub const CELL_BYTES: usize = 512;
const CELL: u64 = CELL_BYTES as u64;
const BLOCK_CELLS: u64 = 8;
/// Longest read of one request, in cells: 1 MiB.
const READ_CELLS_MAX: u64 = 2048;

/// Shares of the operations, in percent; the rest are buffered writes.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Direct writes.
    pub direct: u64,
    /// Writes with DSYNC, buffered or direct.
    pub dsync: u64,
    /// Trims and zeroings.
    pub zeroes: u64,
    /// Fsyncs.
    pub fsync: u64,
    /// Reads.
    pub read: u64,
    /// Most requests in flight; at most 64.
    pub depth: usize,
    /// Longest usual write, in cells.
    pub write_cells_max: u64,
}

impl Mix {
    /// A mix drawn from the seed.
    pub fn draw(rng: &mut Rng) -> Self {
        Self {
            direct: rng.between(5, 40),
            dsync: rng.between(2, 10),
            zeroes: rng.between(2, 12),
            fsync: rng.between(1, 8),
            read: rng.between(5, 20),
            depth: usize::try_from(rng.between(1, 32)).expect("at most 32"),
            write_cells_max: [8, 64, 256][usize::try_from(rng.below(3)).expect("below 3")],
        }
    }
}

#[derive(Debug)]
enum Asked {
    Write { sequence: u64, durable: bool },
    Flush(Flush),
    Read { began: At, first: u64, cells: u64 },
}

/// Random requests against one volume, and everything that is known about it.
#[derive(Debug)]
pub struct Workload {
    volume: String,
    cells: u64,
    mix: Mix,
    rng: Rng,
    oracle: Oracle,
    pipe: Pipe,
    client: Client,
    asked: BTreeMap<u64, Asked>,
    completions: Completions,
    /// Since it moved to another writeback, which may have let unflushed writes go with the volume before: a
    /// flush of the pipe, and a unary fsync, may each say so once.
    may_hear_of_loss: [bool; 2],
    /// Completions taken.
    pub done: u64,
}

impl Workload {
    /// A workload over the first `bytes` of a fresh volume.
    pub fn new(client: Client, volume: &str, bytes: u64, mut rng: Rng) -> Self {
        let mix = Mix::draw(&mut rng);
        let session = (u128::from(rng.draw()) << 64) | u128::from(rand::random::<u64>());
        Self {
            volume: volume.to_owned(),
            cells: bytes / CELL,
            mix,
            oracle: Oracle::new(rng.draw(), CELL_BYTES),
            rng,
            pipe: Pipe::new(client.clone(), session),
            client,
            asked: BTreeMap::new(),
            completions: Completions::default(),
            may_hear_of_loss: [false; 2],
            done: 0,
        }
    }

    /// Replaces the mix that was drawn.
    #[must_use]
    pub fn with_mix(mut self, mix: Mix) -> Self {
        self.mix = mix;
        self
    }

    /// Requests that were sent more than once.
    pub fn retries(&self) -> u64 {
        self.pipe.retries
    }

    /// Submits `count` random requests and takes completions as they come.
    ///
    /// # Errors
    /// A broken promise, a failure that no retry mends, or patience ended.
    pub async fn run(&mut self, count: u64) -> anyhow::Result<()> {
        for _ in 0..count {
            while self.pipe.in_flight() >= self.mix.depth.clamp(1, 64) {
                self.take_one().await?;
            }
            self.submit_one().await;
        }
        Ok(())
    }

    /// Takes completions until nothing is in flight.
    ///
    /// # Errors
    /// As [`Workload::run`].
    pub async fn drain(&mut self) -> anyhow::Result<()> {
        while self.pipe.in_flight() > 0 {
            self.take_one().await?;
        }
        Ok(self.completions.one_completion_per_write()?)
    }

    fn extent(&mut self) -> (u64, u64) {
        let is_large = self.rng.chance(3);
        let longest = if is_large { READ_CELLS_MAX } else { self.mix.write_cells_max };
        let mut cells = self.rng.between(1, longest.min(self.cells));
        let mut first = self.rng.below(self.cells - cells + 1);
        if self.rng.chance(50) && self.cells >= BLOCK_CELLS {
            first = first / BLOCK_CELLS * BLOCK_CELLS;
            cells = cells.next_multiple_of(BLOCK_CELLS).min(self.cells - first);
        }
        (first, cells)
    }

    async fn submit_one(&mut self) {
        let (first, cells) = self.extent();
        let mut draw = self.rng.below(100);
        let mut is = |share: u64| {
            let hit = draw < share;
            draw = if hit { u64::MAX } else { draw - share };
            hit
        };
        let (cookie, asked) = if is(self.mix.read) {
            let began = self.oracle.invoke_read();
            let cells = cells.min(READ_CELLS_MAX);
            let cookie = self.pipe.read(&self.volume, first * CELL, cells * CELL).await;
            (cookie, Asked::Read { began, first, cells })
        } else if is(self.mix.fsync) {
            let flush = self.oracle.invoke_flush();
            // Both kinds, without a number of its own: older seeds do what they did.
            let cookie = match first % 4 {
                0 => self.pipe.fsync(&self.volume).await,
                _ => self.pipe.flush(&self.volume).await,
            };
            (cookie, Asked::Flush(flush))
        } else if is(self.mix.zeroes) {
            let sequence = self.oracle.invoke_zeroes(first, cells);
            let (volume, at, length) = (&self.volume, first * CELL, cells * CELL);
            let cookie = match self.rng.chance(70) {
                true => self.pipe.trim(volume, at, length).await,
                false => self.pipe.write_zeroes(volume, at, length).await,
            };
            (cookie, Asked::Write { sequence, durable: true })
        } else {
            let (direct, dsync) = (is(self.mix.direct), is(self.mix.dsync));
            let (sequence, data) = self.oracle.invoke_write(first, cells);
            let (volume, data) = (self.volume.clone(), Bytes::from(data));
            let put = Put { volume, offset: first * CELL, data, direct, dsync };
            let durable = direct || dsync;
            (self.pipe.write(put).await, Asked::Write { sequence, durable })
        };
        self.completions.asked(cookie);
        self.asked.insert(cookie, asked);
    }

    async fn take_one(&mut self) -> anyhow::Result<()> {
        let completion = self.pipe.next().await?;
        self.completions.answered(completion.cookie)?;
        let asked = self.asked.remove(&completion.cookie).context("an unknown cookie")?;
        self.done += 1;
        if let Some(reason) = Reason::from_wire(completion.reason) {
            let [in_pipe, _] = &mut self.may_hear_of_loss;
            let is_flush = matches!(asked, Asked::Flush(_));
            if is_flush && reason == Reason::LostWrites && std::mem::take(in_pipe) {
                return Ok(());
            }
            bail!("{asked:?} failed with {reason}: {}", completion.message);
        }
        self.judge(asked, &completion)
    }

    fn judge(&mut self, asked: Asked, completion: &IoCompletion) -> anyhow::Result<()> {
        match asked {
            Asked::Write { sequence, durable } => self.oracle.ack_write(sequence, durable),
            Asked::Flush(flush) => self.oracle.ack_flush(flush),
            Asked::Read { began, first, cells } => {
                let length = completion.data.len() as u64;
                if length != cells * CELL {
                    bail!("a read of {} bytes returned {length}", cells * CELL);
                }
                checkers::contents_are_possible_now(
                    &mut self.oracle,
                    began,
                    first,
                    &completion.data,
                )?;
                self.oracle.end_read(began);
            }
        }
        Ok(())
    }

    /// Gives up what is in flight: the process that had it is dead for good, or its session fenced.
    pub fn give_up(&mut self) {
        for cookie in self.pipe.give_up() {
            self.completions = Completions::default();
            match self.asked.remove(&cookie) {
                Some(Asked::Write { sequence, .. }) => self.oracle.fail_write(sequence),
                Some(Asked::Read { began, .. }) => self.oracle.end_read(began),
                Some(Asked::Flush(_)) | None => {}
            }
        }
    }

    /// The services crashed: tells the oracle.
    pub fn crashed(&mut self, mode: Crash) {
        self.oracle.crash(mode);
    }

    /// What is known now: several futures of one past can be judged, each by a copy of its own.
    pub fn knowledge(&self) -> Oracle {
        self.oracle.clone()
    }

    /// Takes back what was known at another time.
    pub fn know(&mut self, oracle: Oracle) {
        self.oracle = oracle;
    }

    /// From now on talks to another writeback, in a new session. Nothing may be in flight.
    pub fn move_to(&mut self, client: Client) {
        assert_eq!(self.pipe.in_flight(), 0, "drain or give up first");
        let session = (u128::from(self.rng.draw()) << 64) | u128::from(rand::random::<u64>());
        self.pipe = Pipe::new(client.clone(), session);
        self.client = client;
        self.completions = Completions::default();
        self.may_hear_of_loss = [true; 2];
    }

    /// A unary fsync.
    ///
    /// # Errors
    /// It fails, but for one loss that it may hear of: then the next one counts.
    pub async fn fsync(&mut self) -> anyhow::Result<()> {
        let [_, unary] = &mut self.may_hear_of_loss;
        match self.client.fsync(&self.volume).await {
            Err(refused) if refused.reason == Reason::LostWrites && std::mem::take(unary) => {
                Ok(self.client.fsync(&self.volume).await?)
            }
            synced => Ok(synced?),
        }
    }

    /// Reads the whole volume and compares it with all that is known. Nothing may be in flight.
    ///
    /// # Errors
    /// A broken promise, or the volume cannot be read.
    pub async fn verify(&mut self) -> anyhow::Result<()> {
        let began = self.oracle.invoke_read();
        let bytes = self.client.read(&self.volume, 0, self.cells * CELL).await?;
        checkers::contents_are_possible(&mut self.oracle, began, 0, &bytes)?;
        self.oracle.end_read(began);
        Ok(())
    }
}
