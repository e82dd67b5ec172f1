//! An NBD client as people have them: it keeps what was not answered, connects again when the
//! connection ends, and sends it again. An error in a reply ends it, as it would a file system.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::{BufMut as _, BytesMut};
use endio_nbd::codec::{Mode, ReplyHeader, Request};
use endio_nbd::consts::{OPTION_MAGIC, cmd, cmd_flag, opt};
use endio_testkit::checkers;
use endio_testkit::oracle::{At, Flush, Oracle};
use endio_testkit::seed::Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Bytes of a cell of the oracle.
const CELL_BYTES: usize = 512;
const CELL: u64 = CELL_BYTES as u64;
/// Cells of a lane. A lane has one request at a time, so that no two of them overlap.
const LANE_CELLS: u64 = 1024;
const WRITE_CELLS_MAX: u64 = 64;
/// Longest wait for a reply, and for a server that is away.
const PATIENCE: Duration = Duration::from_secs(90);
/// Pause between two tries to connect.
const PAUSE: Duration = Duration::from_millis(20);

enum Asked {
    Write { sequence: u64, durable: bool },
    Flush(Flush),
    Read { began: At, first: u64, cells: u64 },
}

struct Sent {
    request: Request,
    payload: Vec<u8>,
    asked: Asked,
    /// `None`: of the whole volume.
    lane: Option<u64>,
}

/// Random requests over one connection at a time, judged by the oracle as they are answered.
pub struct NbdLoad {
    socket: PathBuf,
    export: String,
    rng: Rng,
    oracle: Oracle,
    free: Vec<u64>,
    is_flushing: bool,
    cookie: u64,
    outstanding: BTreeMap<u64, Sent>,
    stream: Option<UnixStream>,
    connections: u64,
    writes: u64,
    done: Arc<AtomicU64>,
}

impl NbdLoad {
    /// Bytes of a volume for so many requests at a time.
    pub const fn volume_bytes(depth: u64) -> u64 {
        depth * LANE_CELLS * CELL
    }

    /// A client of a fresh volume of [`Self::volume_bytes`].
    pub fn new(socket: PathBuf, export: &str, depth: u64, mut rng: Rng) -> Self {
        Self {
            socket,
            export: export.to_owned(),
            oracle: Oracle::new(rng.draw(), CELL_BYTES),
            rng,
            free: (0..depth).collect(),
            is_flushing: false,
            cookie: 0,
            outstanding: BTreeMap::new(),
            stream: None,
            connections: 0,
            writes: 0,
            done: Arc::default(),
        }
    }

    /// Counts the requests that were answered.
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.done)
    }

    /// How often it has connected.
    pub fn connections(&self) -> u64 {
        self.connections
    }

    /// Writes that it has asked for.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Works until `is_over` says so, and then until everything is answered.
    ///
    /// # Errors
    /// A reply with an error, bytes that cannot be there, or nothing for a minute and a half.
    pub async fn run(&mut self, is_over: impl Fn() -> bool) -> anyhow::Result<()> {
        loop {
            while !is_over() && !self.free.is_empty() {
                self.submit().await;
            }
            if self.outstanding.is_empty() {
                return Ok(());
            }
            self.step().await?;
        }
    }

    /// Reads the whole volume. Nothing may be in flight.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn verify(&mut self) -> anyhow::Result<()> {
        let lanes = self.free.len() as u64;
        for lane in 0..lanes {
            let began = self.oracle.invoke_read();
            let asked = Asked::Read { began, first: lane * LANE_CELLS, cells: LANE_CELLS };
            self.send(cmd::READ, 0, (lane * LANE_CELLS, LANE_CELLS), Vec::new(), asked, None).await;
            while !self.outstanding.is_empty() {
                self.step().await?;
            }
        }
        Ok(())
    }

    async fn submit(&mut self) {
        if !self.is_flushing && self.rng.chance(3) {
            self.is_flushing = true;
            let asked = Asked::Flush(self.oracle.invoke_flush());
            return self.send(cmd::FLUSH, 0, (0, 0), Vec::new(), asked, None).await;
        }
        let at = usize::try_from(self.rng.below(self.free.len() as u64)).expect("a few lanes");
        let lane = self.free.swap_remove(at);
        let cells = self.rng.between(1, WRITE_CELLS_MAX);
        let first = lane * LANE_CELLS + self.rng.below(LANE_CELLS - cells + 1);
        let (range, lane) = ((first, cells), Some(lane));
        if self.rng.chance(25) {
            let asked = Asked::Read { began: self.oracle.invoke_read(), first, cells };
            return self.send(cmd::READ, 0, range, Vec::new(), asked, lane).await;
        }
        if self.rng.chance(10) {
            let sequence = self.oracle.invoke_zeroes(first, cells);
            let command = if self.rng.chance(50) { cmd::TRIM } else { cmd::WRITE_ZEROES };
            let asked = Asked::Write { sequence, durable: true };
            return self.send(command, 0, range, Vec::new(), asked, lane).await;
        }
        self.writes += 1;
        let durable = self.rng.chance(20);
        let flags = if durable { cmd_flag::FUA } else { 0 };
        let (sequence, payload) = self.oracle.invoke_write(first, cells);
        let asked = Asked::Write { sequence, durable };
        self.send(cmd::WRITE, flags, range, payload, asked, lane).await;
    }

    async fn send(
        &mut self,
        command: u16,
        flags: u16,
        (first, cells): (u64, u64),
        payload: Vec<u8>,
        asked: Asked,
        lane: Option<u64>,
    ) {
        self.cookie += 1;
        let (offset, length) = (first * CELL, cells * CELL);
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        let sent = Sent { request, payload, asked, lane };
        if let Some(stream) = &mut self.stream
            && put(stream, &sent).await.is_err()
        {
            self.stream = None;
        }
        self.outstanding.insert(self.cookie, sent);
    }

    /// Takes one reply, over a new connection if need be.
    async fn step(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => self.connect(deadline).await?,
            };
            let reply = timeout_at(deadline, self.reply(&mut stream)).await;
            match reply.with_context(|| format!("no reply in {PATIENCE:?}"))? {
                Ok((cookie, error, data)) => {
                    self.stream = Some(stream);
                    return self.answered(cookie, error, &data);
                }
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                // Connects again, and sends again.
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    async fn reply(&self, stream: &mut UnixStream) -> io::Result<(u64, u32, Vec<u8>)> {
        let mut header = [0; 16];
        stream.read_exact(&mut header).await?;
        let header = ReplyHeader::decode(Mode::Simple, &header).map_err(io::Error::other)?.0;
        let ReplyHeader::Simple { error, cookie } = header else {
            return Err(io::Error::other("a structured reply"));
        };
        let reads = |sent: &Sent| match sent.asked {
            Asked::Read { cells, .. } if error == 0 => cells as usize * CELL_BYTES,
            _ => 0,
        };
        let mut data = vec![0; self.outstanding.get(&cookie).map_or(0, reads)];
        stream.read_exact(&mut data).await?;
        Ok((cookie, error, data))
    }

    fn answered(&mut self, cookie: u64, error: u32, data: &[u8]) -> anyhow::Result<()> {
        let sent = self.outstanding.remove(&cookie).context("a reply to nothing")?;
        if error != 0 {
            bail!("the client is told error {error} for {:?}", sent.request);
        }
        self.free.extend(sent.lane);
        match sent.asked {
            Asked::Write { sequence, durable } => self.oracle.ack_write(sequence, durable),
            Asked::Flush(flush) => {
                self.is_flushing = false;
                self.oracle.ack_flush(flush);
            }
            Asked::Read { began, first, cells } => {
                ensure!(data.len() as u64 == cells * CELL, "{} bytes were read", data.len());
                checkers::contents_are_possible_now(&mut self.oracle, began, first, data)?;
                self.oracle.end_read(began);
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Connects, however long the server is away, and sends everything again that has no reply.
    async fn connect(&mut self, deadline: Instant) -> anyhow::Result<UnixStream> {
        loop {
            match timeout(Duration::from_secs(20), self.try_connect()).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) if Instant::now() >= deadline => {
                    return Err(error).context("the server does not come back");
                }
                Err(_) if Instant::now() >= deadline => bail!("the server does not shake hands"),
                Ok(Err(_)) | Err(_) => sleep(PAUSE).await,
            }
        }
    }

    async fn try_connect(&mut self) -> io::Result<UnixStream> {
        let mut stream = shake_hands(&self.socket, &self.export).await?;
        self.connections += 1;
        for sent in self.outstanding.values() {
            put(&mut stream, sent).await?;
        }
        Ok(stream)
    }
}

/// Opens an export.
async fn shake_hands(socket: &Path, export: &str) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.read_exact(&mut [0; 18]).await?;
    let mut hello = BytesMut::new();
    // Fixed newstyle, no zeroes behind the answer.
    hello.put_u32(3);
    hello.put_u64(OPTION_MAGIC);
    hello.put_u32(opt::EXPORT_NAME);
    hello.put_u32(u32::try_from(export.len()).map_err(io::Error::other)?);
    hello.put_slice(export.as_bytes());
    stream.write_all(&hello).await?;
    stream.read_exact(&mut [0; 10]).await?;
    Ok(stream)
}

/// A connection for one request at a time, which does not connect again.
pub struct Connection {
    stream: UnixStream,
    cookie: u64,
}

impl Connection {
    /// Opens an export.
    ///
    /// # Errors
    /// There is nobody, or no such export.
    pub async fn open(socket: &Path, export: &str) -> io::Result<Self> {
        Ok(Self { stream: shake_hands(socket, export).await?, cookie: 0 })
    }

    /// Sends a request and waits for its answer: the error of the protocol, or what was read.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: usize,
        payload: &[u8],
    ) -> io::Result<Result<Vec<u8>, u32>> {
        self.cookie += 1;
        let request =
            Request { flags, command, cookie: self.cookie, offset, length: length as u64 };
        let mut wire = BytesMut::new();
        request.encode(Mode::Simple, &mut wire);
        wire.put_slice(payload);
        self.stream.write_all(&wire).await?;
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).await?;
        let error = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        if error != 0 {
            return Ok(Err(error));
        }
        let mut data = vec![0; if command == cmd::READ { length } else { 0 }];
        self.stream.read_exact(&mut data).await?;
        Ok(Ok(data))
    }
}

async fn put(stream: &mut UnixStream, sent: &Sent) -> io::Result<()> {
    let mut wire = BytesMut::new();
    sent.request.encode(Mode::Simple, &mut wire);
    wire.put_slice(&sent.payload);
    stream.write_all(&wire).await
}
