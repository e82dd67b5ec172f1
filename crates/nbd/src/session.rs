//! One connection, from the greeting to its end, over any stream.
//!
//! ```text
//!             ┌──────── permits: requests and bytes ◄───────────────┐
//!             ▼                                                     │ when written
//!  stream ─► reader ─► one task per request ─► bounded queue ─► writer ─► stream
//!               └────── answered at once ──────────▲
//! ```
//!
//! Reader and writer are one task; a request becomes a task of its own when it has to wait.
//! The reader stops reading when the permits are used up, so a client cannot make the server hold
//! more than [`Limits`] says. A permit returns when the reply was written, so a client that does not
//! read its replies stops itself, and is dropped after [`Limits::stall_ms`].
//!
//! # Invariants
//! * `left-is-left`: once a client has hung up, no change that it asked for begins. Its requests may
//!   still lie in the socket or wait for permits; the client may have connected again and have written
//!   newer data. Requests that began before are ordered by the export.
//! * `older-first`: what an older connection of an export had sent when a newer one attached begins
//!   before everything of the newer one, or never. A request takes its place when it is read.
//! * `slot-until-done`: a connection counts as one until its last request has ended.
//! * `stop-is-no-error`: no client is told an error because the server stops. Requests that run are
//!   finished and answered, the others get no answer: the connection ends, and a client that connects
//!   again sends them again. (`NBD_ESHUTDOWN` would be allowed, but the clients that people use hand
//!   it on as an I/O error.)

mod input;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::codec::{CodecError, Frames, Request};
use crate::consts::cmd;
use crate::export::{Client, Export, ExportInfo, Exports, OpenError, Purpose};
use crate::handshake::{Action, CloseReason, Handshake, HandshakeError, Negotiated, TlsPolicy};
use crate::seats::{Seat, Seats, Taken};
use crate::tls::Tls;
use crate::transmission::{Job, Transmission};
use input::Input;

/// Bounds on what one connection may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Milliseconds from the connection to the transmission phase. Too small drops slow clients, too
    /// large lets idle ones hold a slot.
    pub handshake_ms: u64,
    /// Milliseconds without a byte taken by a client that has replies to read; then it is dropped.
    pub stall_ms: u64,
    /// Requests of one connection that are read and not yet answered, at least 1.
    pub requests_max: u32,
    /// Bytes of payload of one connection, requests and replies together. A single request of the
    /// export's maximum size is always admitted, alone if need be.
    pub bytes_max: u32,
    /// Connections of the server at once.
    pub connections_max: u32,
    /// Milliseconds that a new connection waits for the older ones of its export to begin what they
    /// were sent, and to end it if their clients have left; then the new one is dropped, and its
    /// client may try again. Too small: a stalled disk lets nobody reconnect. Too large: a client
    /// gives up before it hears why.
    pub settle_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_ms: 10_000,
            stall_ms: 30_000,
            requests_max: 128,
            bytes_max: 64 << 20,
            connections_max: 256,
            settle_ms: 60_000,
        }
    }
}

/// Longest payload that is skipped so that the client can be told `EINVAL`, in bytes; a longer one
/// ends the connection.
const SKIP_MAX: u64 = 256 << 20;
/// Bytes read ahead, and written in one step.
const STEP: usize = 64 << 10;
/// Requests answered in one go before other tasks have their turn. Too small: a system call for
/// each few replies. Too large: a flush that waits for other tasks waits for these requests, too.
const STREAK: usize = 8;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum EndReason {
    /// The client said goodbye with `NBD_CMD_DISC`.
    #[error("the client disconnected")]
    Disconnected,
    /// The client closed the stream.
    #[error("the client closed the connection")]
    Closed,
    /// The client ended the handshake, or could not be refused in another way.
    #[error("{0}")]
    Refused(CloseReason),
    /// No transmission phase in time.
    #[error("the handshake took too long")]
    HandshakeTimeout,
    /// A violation in the handshake.
    #[error("violation of the protocol: {0}")]
    Handshake(HandshakeError),
    /// A violation in the transmission phase.
    #[error("violation of the protocol: {0}")]
    Garbage(CodecError),
    /// A payload so long that it is not worth skipping.
    #[error("a request announces {0} bytes of payload")]
    PayloadTooLong(u64),
    /// Replies were not taken in time.
    #[error("the client does not read its replies")]
    Stalled,
    /// TLS could not be established.
    #[error("TLS failed: {0}")]
    Tls(std::io::Error),
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(std::io::Error),
    /// The server stopped.
    #[error("the server stopped")]
    Stopped,
    /// All slots are taken.
    #[error("there are too many connections")]
    TooMany,
    /// Older connections of the export are not settled in time.
    #[error("requests of older connections of the export are still under way")]
    Unsettled,
    /// A newer connection took the place of this one.
    #[error("a newer connection took the place of this one")]
    Replaced,
}

impl EndReason {
    /// Whether an operator may want to know: the client misbehaved.
    pub fn is_fault(&self) -> bool {
        !matches!(
            self,
            EndReason::Disconnected
                | EndReason::Closed
                | EndReason::Refused(_)
                | EndReason::Stopped
                | EndReason::Replaced
                | EndReason::Io(_)
        )
    }
}

/// A stream to a client.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// Tells whether the client has hung up, even if bytes that it sent before are still unread.
pub trait HangUp: Send + Sync + 'static {
    /// True from the moment on that the other side closed its end.
    fn is_hung_up(&self) -> bool;

    /// Whether bytes have arrived that were not read yet.
    fn has_unread(&self) -> bool {
        false
    }
}

/// For streams that cannot tell.
#[derive(Debug, Clone, Copy, Default)]
pub struct CannotTell;

impl HangUp for CannotTell {
    fn is_hung_up(&self) -> bool {
        false
    }
}

/// A server: exports, TLS and limits, shared by all connections. Cheap to clone.
#[derive(Clone)]
pub struct Server {
    exports: Arc<dyn Exports>,
    tls: Option<Tls>,
    limits: Limits,
    slots: Arc<Semaphore>,
    seats: Arc<Seats>,
    stop: CancellationToken,
    sessions: TaskTracker,
}

impl Server {
    /// A server without TLS.
    pub fn new(exports: Arc<dyn Exports>, limits: Limits) -> Self {
        Self {
            exports,
            tls: None,
            limits,
            slots: Arc::new(Semaphore::new(limits.connections_max as usize)),
            seats: Arc::default(),
            stop: CancellationToken::new(),
            sessions: TaskTracker::new(),
        }
    }

    /// The same server with STARTTLS.
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Asks every session to end: requests that run are finished and answered, nothing new begins,
    /// and the connections are closed. Idempotent.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Whether [`Server::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Waits for [`Server::stop`].
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Waits until every session that was spawned has ended; call [`Server::stop`] first.
    pub async fn drained(&self) {
        self.sessions.close();
        self.sessions.wait().await;
    }

    /// Serves a connection in a task of its own and logs why it ended.
    pub fn spawn(&self, stream: impl Stream, client: Client, hang_up: Arc<dyn HangUp>) {
        let server = self.clone();
        self.sessions.spawn(async move {
            let address = client.address.clone();
            let reason = server.serve(stream, client, hang_up).await;
            if reason.is_fault() {
                tracing::warn!(client = address, %reason, "nbd client dropped");
            } else {
                tracing::info!(client = address, %reason, "nbd client left");
            }
        });
    }

    /// Serves one connection to its end and says why it ended. Not cancel-safe: if it is dropped,
    /// requests that run go on unobserved.
    pub async fn serve(
        &self,
        stream: impl Stream,
        client: Client,
        hang_up: Arc<dyn HangUp>,
    ) -> EndReason {
        let Ok(_slot) = self.slots.try_acquire() else {
            return EndReason::TooMany;
        };
        let begun = Instant::now();
        let limit = Duration::from_millis(self.limits.handshake_ms);
        let shaken = tokio::select! {
            shaken = timeout(limit, self.shake_hands(Box::new(stream), client)) => shaken,
            () = self.stopping() => return EndReason::Stopped,
        };
        let agreed = match shaken {
            Ok(Ok(agreed)) => agreed,
            Ok(Err(reason)) => return reason,
            Err(_) => return EndReason::HandshakeTimeout,
        };
        tracing::info!(
            export = agreed.negotiated.info.name,
            mode = ?agreed.negotiated.mode,
            handshake_ms = begun.elapsed().as_millis() as u64,
            "nbd client attached"
        );
        let info = &agreed.negotiated.info;
        let mut taken = self.seats.take(&info.name, info.is_single);
        if !info.is_read_only {
            let limit = Duration::from_millis(self.limits.settle_ms);
            tokio::select! {
                settled = timeout(limit, taken.older_are_settled()) => if settled.is_err() {
                    return EndReason::Unsettled;
                },
                () = self.stopping() => {}
            }
        }
        self.transmit(agreed, hang_up, taken).await
    }

    async fn shake_hands(
        &self,
        mut stream: Box<dyn Stream>,
        mut client: Client,
    ) -> Result<Agreed, EndReason> {
        let policy = self.tls.as_ref().map_or(TlsPolicy::Off, Tls::policy);
        let mut handshake = Handshake::new(policy);
        let mut bytes = BytesMut::new();
        let mut export: Option<Arc<dyn Export>> = None;
        send(&mut stream, &Handshake::greeting()).await?;
        loop {
            if self.is_stopping() {
                handshake.stop();
            }
            let mut action = handshake.advance(&mut bytes).map_err(EndReason::Handshake)?;
            if action == Action::List {
                let list = self.exports.list(&client).await;
                action = handshake.listed(list).map_err(EndReason::Handshake)?;
            } else if let Action::Open(name, purpose) = &action {
                let opened = self.open(name, &client, *purpose).await;
                let info = opened.map(|(opened, info)| {
                    export = Some(opened);
                    info
                });
                action = handshake.opened(info).map_err(EndReason::Handshake)?;
            }
            match action {
                Action::More => {
                    if stream.read_buf(&mut bytes).await.map_err(EndReason::Io)? == 0 {
                        return Err(EndReason::Closed);
                    }
                }
                Action::Send(reply) => send(&mut stream, &reply).await?,
                Action::StartTls(reply) => {
                    send(&mut stream, &reply).await?;
                    let tls = self.tls.as_ref().ok_or(HandshakeError::OutOfStep);
                    let tls = tls.map_err(EndReason::Handshake)?;
                    let (encrypted, certificate) =
                        tls.accept(stream).await.map_err(EndReason::Tls)?;
                    stream = Box::new(encrypted);
                    client.is_tls = true;
                    client.certificate = certificate;
                    handshake.tls_started();
                }
                Action::Begin(reply, negotiated) => {
                    send(&mut stream, &reply).await?;
                    let export = export.ok_or(HandshakeError::OutOfStep);
                    let export = export.map_err(EndReason::Handshake)?;
                    return Ok(Agreed { stream, bytes, export, negotiated: *negotiated });
                }
                Action::Close(reply, reason) => {
                    send(&mut stream, &reply).await?;
                    // Closing is a courtesy: the client may be gone already.
                    let _ = stream.shutdown().await;
                    return Err(EndReason::Refused(reason));
                }
                Action::List | Action::Open(..) => {
                    return Err(EndReason::Handshake(HandshakeError::OutOfStep));
                }
            }
        }
    }

    async fn open(
        &self,
        name: &str,
        client: &Client,
        purpose: Purpose,
    ) -> Result<(Arc<dyn Export>, ExportInfo), OpenError> {
        let export = self.exports.open(name, client, purpose).await?;
        let info = export.info();
        Ok((export, info))
    }

    async fn transmit(&self, agreed: Agreed, hang_up: Arc<dyn HangUp>, taken: Taken) -> EndReason {
        let (read, write) = tokio::io::split(agreed.stream);
        let (replies, queue) = mpsc::channel(self.limits.requests_max.max(1) as usize);
        let stall = Duration::from_millis(self.limits.stall_ms);
        let seat = taken.seat();
        let jobs = TaskTracker::new();
        let stop = self.stop.child_token();
        let mut reader = Reader {
            input: Input::new(read, agreed.bytes, seat.clone(), hang_up.clone()),
            transmission: Arc::new(Transmission::new(agreed.export, agreed.negotiated)),
            requests: Arc::new(Semaphore::new(self.limits.requests_max.max(1) as usize)),
            memory: Arc::new(Semaphore::new(self.limits.bytes_max.max(1) as usize)),
            bytes_max: self.limits.bytes_max.max(1),
            replies,
            jobs: jobs.clone(),
            hang_up,
            seat: seat.clone(),
            stop: stop.clone(),
        };
        // In one task with the reader: what is answered at once wakes nobody, and all replies to
        // what one read brought leave in one step.
        let writer = write_replies(write, queue, stall);
        tokio::pin!(writer);
        let mut written = None;
        let ended = tokio::select! {
            biased;
            () = seat.was_cut() => EndReason::Replaced,
            () = stop.cancelled() => EndReason::Stopped,
            reason = reader.run() => reason,
            // Before the last sender is gone: the client takes nothing more.
            early = &mut writer => {
                written = Some(early);
                EndReason::Stalled
            }
        };
        // A client that said goodbye gets its replies; nothing new begins for one that is lost.
        if !matches!(ended, EndReason::Disconnected | EndReason::Stopped) {
            seat.leave();
        }
        drop(reader);
        jobs.close();
        let settled = async {
            jobs.wait().await;
            // The writer may still wait for a client that does not read: newer connections need not.
            drop(taken);
        };
        let rest = async {
            match written {
                Some(written) => written,
                None => writer.await,
            }
        };
        let ((), written) = tokio::join!(settled, rest);
        match written {
            Err(reason) if matches!(ended, EndReason::Stalled | EndReason::Closed) => reason,
            _ => ended,
        }
    }
}

/// What a handshake leaves behind.
struct Agreed {
    stream: Box<dyn Stream>,
    /// Bytes behind the last option: a client may send requests at once.
    bytes: BytesMut,
    export: Arc<dyn Export>,
    negotiated: Negotiated,
}

/// What a request holds until its reply was written.
struct Permits {
    _request: OwnedSemaphorePermit,
    _memory: OwnedSemaphorePermit,
}

struct Reader {
    input: Input,
    transmission: Arc<Transmission>,
    requests: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    bytes_max: u32,
    replies: mpsc::Sender<(Frames, Permits)>,
    jobs: TaskTracker,
    hang_up: Arc<dyn HangUp>,
    seat: Arc<Seat>,
    /// Of this connection: the server stops, or the export does.
    stop: CancellationToken,
}

impl Reader {
    /// Reads requests until the client leaves. Dropped only where the connection ends, because a
    /// payload may be half read.
    async fn run(&mut self) -> EndReason {
        loop {
            for _ in 0..STREAK {
                if let Err(reason) = self.next().await {
                    return reason;
                }
            }
            // What was begun has woken others, and its replies wait to be written.
            tokio::task::yield_now().await;
        }
    }

    async fn next(&mut self) -> Result<(), EndReason> {
        let mode = self.transmission.mode();
        self.input.fill(mode.request_len()).await?;
        let request = Request::decode(mode, self.input.bytes()).map_err(EndReason::Garbage)?;
        if request.command == cmd::DISC {
            return Err(EndReason::Disconnected);
        }
        let permits = self.permits(&request).await;
        let length = request.payload_len(mode);
        if length > SKIP_MAX {
            return Err(EndReason::PayloadTooLong(length));
        }
        let payload = match self.transmission.wants_payload(&request) {
            true => Some(self.input.take(mode.request_len(), length).await?),
            false => {
                self.input.skip(mode.request_len() as u64 + length).await?;
                None
            }
        };
        let payload = payload.filter(|_| length > 0);
        let to = self.transmission.reply_to(&request);
        if self.stop.is_cancelled() {
            return Err(EndReason::Stopped);
        }
        match self.transmission.check(&request, payload) {
            Err(fault) => {
                let reply = (to.failed(&fault), permits);
                self.replies.send(reply).await.map_err(|_| EndReason::Stalled)
            }
            Ok(job) => self.start(to, job, permits).await,
        }
    }

    fn permits(&self, request: &Request) -> impl Future<Output = Permits> + Send + use<> {
        let cost = self.transmission.cost(request).min(u64::from(self.bytes_max)) as u32;
        let (requests, memory) = (self.requests.clone(), self.memory.clone());
        async move {
            let never = "the semaphores of a session are never closed";
            Permits {
                _request: requests.acquire_owned().await.expect(never),
                _memory: memory.acquire_many_owned(cost).await.expect(never),
            }
        }
    }

    /// Begins a request: it takes its place in the order of the export before this returns, and goes
    /// on in a task of its own.
    async fn start(
        &mut self,
        to: crate::codec::ReplyTo,
        job: Job,
        permits: Permits,
    ) -> Result<(), EndReason> {
        if job.is_mutation() && (self.seat.has_left() || self.hang_up.is_hung_up()) {
            return Err(EndReason::Closed);
        }
        let transmission = self.transmission.clone();
        let mut run = Box::pin(async move { transmission.run(to, job).await });
        match futures_util::poll!(run.as_mut()) {
            Poll::Ready(None) => Err(EndReason::Stopped),
            Poll::Ready(Some(frames)) => {
                let sent = self.replies.send((frames, permits)).await;
                sent.map_err(|_| EndReason::Stalled)
            }
            Poll::Pending => {
                let (replies, stop) = (self.replies.clone(), self.stop.clone());
                self.jobs.spawn(async move {
                    match run.await {
                        // If the writer is gone, nobody waits for the reply.
                        Some(frames) => drop(replies.send((frames, permits)).await),
                        None => stop.cancel(),
                    }
                });
                Ok(())
            }
        }
    }
}

async fn send(stream: &mut Box<dyn Stream>, bytes: &[u8]) -> Result<(), EndReason> {
    stream.write_all(bytes).await.map_err(EndReason::Io)?;
    stream.flush().await.map_err(EndReason::Io)
}

/// Writes replies until the last sender is gone, or the client stops to take them.
async fn write_replies(
    stream: WriteHalf<Box<dyn Stream>>,
    mut queue: mpsc::Receiver<(Frames, Permits)>,
    stall: Duration,
) -> Result<(), EndReason> {
    let mut stream = BufWriter::with_capacity(STEP, stream);
    while let Some((frames, permits)) = queue.recv().await {
        for frame in &frames {
            for step in frame.chunks(STEP) {
                within(stall, stream.write_all(step)).await?;
            }
        }
        if queue.is_empty() {
            within(stall, stream.flush()).await?;
        }
        drop(permits);
    }
    within(stall, stream.flush()).await?;
    within(stall, stream.shutdown()).await
}

async fn within(
    limit: Duration,
    step: impl Future<Output = std::io::Result<()>>,
) -> Result<(), EndReason> {
    match timeout(limit, step).await {
        Ok(done) => done.map_err(EndReason::Io),
        Err(_) => Err(EndReason::Stalled),
    }
}
