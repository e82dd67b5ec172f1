//! The load itself: one task for each connection, each with its own stream.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use endio_api::writeback::{
    FsyncRequest, IoCompletion, IoRequest, ReadRequest, WriteMode, WriteRequest,
    io_client::IoClient, io_request::Op,
};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Reason};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    options::{AccessPattern, Mode, Options},
    pattern::{Dice, fault, noise, stamp, volume_number},
    report::{BenchError, Report},
};

/// After the end of a run, so long may what is in flight take.
const DRAIN: Duration = Duration::from_secs(60);

/// Runs the load over these connections and reports. The volume has `volume_bytes`.
/// Not cancel-safe: a dropped run leaves requests in flight in the service.
///
/// # Errors
/// The options make no sense for the volume, or a stream broke. Failed requests are no error: the
/// report counts them.
pub async fn run(
    channels: Vec<Channel>,
    options: &Options,
    volume_bytes: u64,
) -> Result<Report, BenchError> {
    let slots = options.slots(volume_bytes)?;
    let connections = channels.len().max(1) as u64;
    let options = Arc::new(options.clone());
    let mut tasks = tokio::task::JoinSet::new();
    for (index, channel) in (0..).zip(channels) {
        let ops = options
            .ops
            .map_or(u64::MAX, |ops| ops / connections + u64::from(index < ops % connections));
        let worker = Worker::new(Arc::clone(&options), slots, index, connections, ops);
        tasks.spawn(worker.run(channel));
    }
    let mut report = Report::default();
    while let Some(done) = tasks.join_next().await {
        report.merge(&done.map_err(BenchError::Task)??);
    }
    Ok(report)
}

struct Worker {
    options: Arc<Options>,
    slots: u64,
    index: u64,
    connections: u64,
    ops_left: u64,
    dice: Dice,
    filler: Bytes,
    volume: u64,
    next_slot: u64,
    next_cookie: u64,
    writes: u64,
    fsync_due: bool,
    in_flight: BTreeMap<u64, InFlight>,
    /// Slots in flight, and what was acknowledged last in each; only to verify.
    busy: BTreeSet<u64>,
    acknowledged: BTreeMap<u64, Expect>,
    report: Report,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Sequence(u64),
    /// A write failed, so old or new bytes may be there.
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Read,
    Fsync,
    Verify,
}

struct InFlight {
    kind: Kind,
    slot: u64,
    due: Instant,
}

struct Stream {
    requests: mpsc::Sender<IoRequest>,
    completions: Streaming<IoCompletion>,
}

impl Worker {
    fn new(options: Arc<Options>, slots: u64, index: u64, connections: u64, ops_left: u64) -> Self {
        let mut dice = Dice::new(options.seed.wrapping_add(index.wrapping_mul(0x5851_F42D)));
        let block = usize::try_from(options.block_size.bytes()).unwrap_or(BLOCK_SIZE);
        let filler = noise(&mut dice, block + BLOCK_SIZE);
        let volume = volume_number(&options.volume);
        Self {
            slots,
            index,
            connections,
            ops_left,
            dice,
            filler,
            volume,
            next_slot: slots / connections * index,
            next_cookie: 1,
            writes: 0,
            fsync_due: false,
            in_flight: BTreeMap::new(),
            busy: BTreeSet::new(),
            acknowledged: BTreeMap::new(),
            report: Report::default(),
            options,
        }
    }

    async fn run(mut self, channel: Channel) -> Result<Report, BenchError> {
        let (requests, receiver) = mpsc::channel(self.options.depth as usize + 1);
        let mut client = IoClient::new(channel);
        let answer = client.submit(ReceiverStream::new(receiver)).await;
        let completions = answer.map_err(BenchError::Call)?.into_inner();
        let mut stream = Stream { requests, completions };
        let start = Instant::now();
        self.load(&mut stream, start).await?;
        self.report.elapsed = start.elapsed();
        if self.options.verify {
            self.read_back(&mut stream).await?;
        }
        Ok(self.report)
    }

    async fn load(&mut self, stream: &mut Stream, start: Instant) -> Result<(), BenchError> {
        let end = start + self.options.duration();
        let interval = self.interval();
        let mut due = start;
        loop {
            let now = Instant::now();
            let is_over = now >= end || self.ops_left == 0;
            if is_over && self.in_flight.is_empty() {
                break;
            }
            let has_room = !is_over && self.in_flight.len() < self.options.depth as usize;
            if has_room && (interval.is_none() || due <= now) {
                let at = if interval.is_some() { due } else { now };
                self.send_next(stream, at).await?;
                due += interval.unwrap_or_default();
                continue;
            }
            let wake = if is_over { now + DRAIN } else { end };
            let wake = if has_room { wake.min(due) } else { wake };
            tokio::select! {
                biased;
                answer = stream.completions.message(), if !self.in_flight.is_empty() => {
                    self.complete(answer)?;
                }
                () = tokio::time::sleep_until(wake) => {
                    if is_over {
                        let message = format!("{} requests never completed", self.in_flight.len());
                        return Err(BenchError::Call(Status::deadline_exceeded(message)));
                    }
                }
            }
        }
        if let Some(interval) = interval.filter(|_| self.ops_left > 0) {
            let late = end.saturating_duration_since(due).as_nanos() / interval.as_nanos().max(1);
            self.report.unsent = u64::try_from(late).unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// Open load: time between two requests of this connection.
    fn interval(&self) -> Option<Duration> {
        let rate = self.options.rate.filter(|_| self.options.mode == Mode::Open)?;
        let connections = u32::try_from(self.connections).unwrap_or(1);
        Some(Duration::from_secs(1) * connections / rate)
    }

    async fn send_next(&mut self, stream: &Stream, due: Instant) -> Result<(), BenchError> {
        if std::mem::take(&mut self.fsync_due) {
            let op = Op::Fsync(FsyncRequest {
                volume: self.options.volume.clone(),
                may_log: false,
                ..Default::default()
            });
            return self.send(stream, Kind::Fsync, 0, due, op).await;
        }
        self.ops_left -= 1;
        let slot = self.pick();
        if self.dice.below(100) < u64::from(self.options.read_percent) {
            let op = self.read(slot);
            return self.send(stream, Kind::Read, slot, due, op).await;
        }
        self.writes += 1;
        self.fsync_due =
            self.options.fsync_every > 0 && self.writes.is_multiple_of(self.options.fsync_every);
        let op = self.write(slot);
        self.send(stream, Kind::Write, slot, due, op).await
    }

    /// The next place. To verify, a connection stays on its own slots, and off those in flight.
    fn pick(&mut self) -> u64 {
        let own = if self.options.verify { self.slots / self.connections } else { self.slots };
        let mut slot = match self.options.pattern {
            AccessPattern::Random => self.dice.below(own),
            AccessPattern::Sequential => {
                self.next_slot += 1;
                (self.next_slot - 1) % own
            }
        };
        if !self.options.verify {
            return slot;
        }
        // There are more slots than requests in flight, so one is free.
        while self.busy.contains(&(slot * self.connections + self.index)) {
            slot = (slot + 1) % own;
        }
        let slot = slot * self.connections + self.index;
        self.busy.insert(slot);
        slot
    }

    fn read(&self, slot: u64) -> Op {
        let block = self.options.block_size.bytes();
        Op::Read(ReadRequest {
            volume: self.options.volume.clone(),
            offset_bytes: slot * block,
            length_bytes: block,
            traceparent: String::new(),
        })
    }

    fn write(&mut self, slot: u64) -> Op {
        let block = self.options.block_size.bytes();
        let length = self.filler.len() - BLOCK_SIZE;
        // Each request takes the noise from another place, so equal blocks are rare; no copy.
        let from = usize::try_from(self.dice.below(BLOCK_BYTES)).unwrap_or(0);
        let noise = self.filler.slice(from..from + length);
        let data = if self.options.verify {
            stamp(&noise, self.volume, slot * block / BLOCK_BYTES, self.next_cookie)
        } else {
            noise
        };
        let mode = if self.options.direct { WriteMode::Direct } else { WriteMode::Buffered };
        Op::Write(WriteRequest {
            volume: self.options.volume.clone(),
            offset_bytes: slot * block,
            data,
            mode: mode.into(),
            dsync: self.options.dsync,
            retry: None,
            traceparent: String::new(),
        })
    }

    async fn send(
        &mut self,
        stream: &Stream,
        kind: Kind,
        slot: u64,
        due: Instant,
        op: Op,
    ) -> Result<(), BenchError> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.in_flight.insert(cookie, InFlight { kind, slot, due });
        let request = IoRequest { cookie, op: Some(op) };
        let gone = |_| BenchError::Call(Status::unavailable("the stream broke"));
        stream.requests.send(request).await.map_err(gone)
    }

    fn complete(&mut self, answer: Result<Option<IoCompletion>, Status>) -> Result<(), BenchError> {
        let answer = answer.map_err(BenchError::Call)?;
        let Some(answer) = answer else {
            return Err(BenchError::Call(Status::unavailable("the stream ended")));
        };
        let Some(request) = self.in_flight.remove(&answer.cookie) else {
            let message = format!("a completion names request {}, unknown here", answer.cookie);
            return Err(BenchError::Call(Status::internal(message)));
        };
        self.busy.remove(&request.slot);
        let is_ok = answer.reason == 0;
        if request.kind == Kind::Write {
            let expect = if is_ok { Expect::Sequence(answer.cookie) } else { Expect::Unknown };
            self.acknowledged.insert(request.slot, expect);
            if !self.options.verify {
                self.acknowledged.clear();
            }
        }
        if !is_ok {
            self.report.failure(|| {
                let reason = Reason::from_wire(answer.reason).map_or("UNKNOWN", Reason::name);
                format!("{reason}: {}", answer.message)
            });
            return Ok(());
        }
        let us = u64::try_from(request.due.elapsed().as_micros()).unwrap_or(u64::MAX);
        let block = self.options.block_size.bytes();
        match request.kind {
            Kind::Write => self.report.write.record(us),
            Kind::Read => self.report.read.record(us),
            Kind::Fsync => self.report.flush.record(us),
            Kind::Verify => self.compare(request.slot, &answer.data),
        }
        if matches!(request.kind, Kind::Write | Kind::Read) {
            self.report.ops += 1;
            self.report.bytes += block;
        }
        if answer.convert_us > 0 {
            self.report.convert.record(answer.convert_us);
        }
        Ok(())
    }

    /// Reads everything that was acknowledged and compares it.
    async fn read_back(&mut self, stream: &mut Stream) -> Result<(), BenchError> {
        let mut slots: Vec<u64> = self.acknowledged.keys().copied().collect();
        while !slots.is_empty() || !self.in_flight.is_empty() {
            while self.in_flight.len() < self.options.depth as usize
                && let Some(slot) = slots.pop()
            {
                let op = self.read(slot);
                self.send(stream, Kind::Verify, slot, Instant::now(), op).await?;
            }
            let answer = tokio::time::timeout(DRAIN, stream.completions.message()).await;
            let late = |_| BenchError::Call(Status::deadline_exceeded("a read never completed"));
            self.complete(answer.map_err(late)?)?;
        }
        Ok(())
    }

    fn compare(&mut self, slot: u64, data: &Bytes) {
        let Some(Expect::Sequence(sequence)) = self.acknowledged.get(&slot).copied() else {
            return;
        };
        let block = self.options.block_size.bytes();
        let zeroes = vec![0; usize::try_from(block).unwrap_or(0)];
        // A hole may be answered without data.
        let data = if data.is_empty() { &zeroes[..] } else { &data[..] };
        let first = slot * block / BLOCK_BYTES;
        for (number, bytes) in (first..first + block / BLOCK_BYTES).zip(data.chunks(BLOCK_SIZE)) {
            self.report.verified += 1;
            if let Some(what) = fault(bytes, self.volume, number, sequence) {
                self.report.mismatch(what);
            }
        }
        if data.len() as u64 != block {
            self.report.mismatch(format!("a read of {block} bytes returned {}", data.len()));
        }
    }
}
