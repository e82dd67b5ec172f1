//! The Submit stream: requests are started in the order in which they come, and answered as they
//! end. A stream with too much under way is not read, so its sender waits.

use std::future::Future;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::status;
use endio_api::writeback::io_request::Op;
use endio_api::writeback::{FsyncRequest, IoCompletion, IoRequest};
use endio_chassis::shutdown::Shutdown;
use endio_types::{ByteRange, Reason};
use futures_util::FutureExt as _;
use futures_util::stream::{BoxStream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::caller::Caller;
use super::io::{READ_PIECE_BYTES, range_op, until, write_op};
use crate::access::Access;
use crate::dedupe::session_from_wire;
use crate::engine::{Asker, Engine, Observer, Piece, RangeKind, ReadOp};
use crate::failure::Failure;

/// Unit of the bound of bytes under way.
const PERMIT_BYTES: usize = 4096;

/// Where a stream comes from.
pub(super) struct Origin {
    /// Who opened it.
    pub(super) caller: Caller,
    /// Trace context of requests that have none of their own.
    pub(super) parent: String,
}

/// Serves one stream in a task of its own; the completions come out.
pub(super) fn start(
    engine: Arc<Engine>,
    shutdown: Shutdown,
    requests: Streaming<IoRequest>,
    from: Origin,
) -> BoxStream<'static, Result<IoCompletion, Status>> {
    let (completions, stream) = mpsc::channel(engine.config.submit_requests);
    let permits = usize::try_from(engine.config.submit_bytes).unwrap_or(usize::MAX) / PERMIT_BYTES;
    let permits = permits.min(Semaphore::MAX_PERMITS);
    let submit = Submit {
        slots: Arc::new(Semaphore::new(engine.config.submit_requests)),
        bytes: Arc::new(Semaphore::new(permits)),
        permits,
        observer: Arc::default(),
        engine,
        from,
        completions,
    };
    tokio::spawn(submit.run(shutdown, requests));
    ReceiverStream::new(stream).boxed()
}

struct Submit {
    engine: Arc<Engine>,
    from: Origin,
    completions: mpsc::Sender<Result<IoCompletion, Status>>,
    slots: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    permits: usize,
    observer: Arc<Observer>,
}

/// What a request holds while it is under way.
struct Room {
    _slot: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Submit {
    async fn run(self, shutdown: Shutdown, mut requests: Streaming<IoRequest>) {
        loop {
            let next = tokio::select! {
                biased;
                () = shutdown.requested() => return,
                () = self.completions.closed() => return,
                next = requests.message() => next,
            };
            match next {
                Ok(Some(request)) => self.accept(request).await,
                // The client sends no more; what is under way goes on.
                Ok(None) => return,
                // It has gone, or has sent garbage and is told so.
                Err(status) => {
                    let told = status::malformed("stream", status.message());
                    let _ = self.completions.send(Err(told)).await;
                    return;
                }
            }
        }
    }

    async fn accept(&self, request: IoRequest) {
        let started = Instant::now();
        let cookie = request.cookie;
        let Some(room) = self.room(&request).await else { return };
        let Some(op) = request.op else {
            let failure = Failure::new(Reason::Malformed, "op: a request without an operation");
            return self.answer(room, cookie, started, async { Err(failure) });
        };
        // The volume is found and the place in its order is taken before the next request is read.
        if let Err(failure) = self.begin(op, cookie, started, room).await {
            let (room, failure) = *failure;
            self.answer(room, cookie, started, async { Err(failure) });
        }
    }

    async fn room(&self, request: &IoRequest) -> Option<Room> {
        let bytes = match &request.op {
            Some(Op::Write(write)) => write.data.len(),
            Some(Op::Read(read)) => usize::try_from(read.length_bytes).unwrap_or(usize::MAX),
            _ => 0,
        };
        let permits = bytes.div_ceil(PERMIT_BYTES).clamp(1, self.permits);
        let permits = u32::try_from(permits).unwrap_or(u32::MAX);
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(permits).await.ok()?;
        Some(Room { _slot: slot, _bytes: bytes })
    }

    async fn begin(
        &self,
        op: Op,
        cookie: u64,
        started: Instant,
        room: Room,
    ) -> Result<(), Box<(Room, Failure)>> {
        let (name, needed, key) = match &op {
            Op::Write(write) => (&write.volume, Access::ReadWrite, write.retry.as_ref()),
            Op::Read(read) => (&read.volume, Access::ReadOnly, None),
            Op::Fsync(fsync) => (&fsync.volume, Access::ReadOnly, None),
            Op::Trim(range) | Op::WriteZeroes(range) | Op::Allocate(range) => {
                (&range.volume, Access::ReadWrite, range.retry.as_ref())
            }
        };
        if let Err(failure) = self.from.caller.may(&self.engine.config, name, needed) {
            return Err(Box::new((room, failure)));
        }
        let volume = match self.engine.volume_for(name, key).await {
            Ok(volume) => volume,
            Err(failure) => return Err(Box::new((room, failure))),
        };
        self.observer.watch(&volume);
        let engine = Arc::clone(&self.engine);
        match op {
            Op::Write(write) => {
                let op = match write_op(write, &self.from.parent) {
                    Ok(op) => op,
                    Err(failure) => return Err(Box::new((room, failure))),
                };
                let acked = engine.start_write(&volume, op);
                self.answer(room, cookie, started, async move {
                    let acked = acked.await?;
                    Ok(IoCompletion {
                        bytes: acked.written_bytes,
                        trace_id: acked.trace_id,
                        duplicate: acked.duplicate,
                        convert_us: acked.convert_us,
                        ..IoCompletion::default()
                    })
                });
            }
            Op::Read(read) => {
                let bytes = ByteRange { offset: read.offset_bytes, len: read.length_bytes };
                if bytes.len > READ_PIECE_BYTES {
                    let detail = "length_bytes: at most 1 MiB in a Submit stream";
                    return Err(Box::new((room, Failure::new(Reason::Malformed, detail))));
                }
                let own = read.traceparent;
                let traceparent = if own.is_empty() { self.from.parent.clone() } else { own };
                let op = ReadOp { bytes, traceparent };
                self.answer(room, cookie, started, async move {
                    let data = joined(engine.read(&volume, &op).await?);
                    let bytes = data.len() as u64;
                    Ok(IoCompletion { bytes, data, ..IoCompletion::default() })
                });
            }
            Op::Fsync(FsyncRequest { may_log, session, .. }) => {
                let session = match session_from_wire(&session) {
                    Ok(session) => session,
                    Err(failure) => return Err(Box::new((room, failure))),
                };
                let (observer, parent) = (Arc::clone(&self.observer), self.from.parent.clone());
                self.answer(room, cookie, started, async move {
                    let asker = Asker { observer: Some(&observer), session };
                    engine.fsync(&volume, asker, until(may_log), &parent).await?;
                    Ok(IoCompletion::default())
                });
            }
            Op::Trim(range) => {
                self.range(RangeKind::Trim, range, &volume, cookie, started, room)?
            }
            Op::WriteZeroes(range) => {
                self.range(RangeKind::Zero, range, &volume, cookie, started, room)?;
            }
            Op::Allocate(range) => {
                self.range(RangeKind::Allocate, range, &volume, cookie, started, room)?;
            }
        }
        Ok(())
    }

    fn range(
        &self,
        kind: RangeKind,
        range: endio_api::writeback::RangeRequest,
        volume: &Arc<crate::volume::Volume>,
        cookie: u64,
        started: Instant,
        room: Room,
    ) -> Result<(), Box<(Room, Failure)>> {
        let bytes = range.length_bytes;
        let op = match range_op(kind, range, &self.from.parent) {
            Ok(op) => op,
            Err(failure) => return Err(Box::new((room, failure))),
        };
        let done = self.engine.start_range(volume, op);
        self.answer(room, cookie, started, async move {
            let done = done.await?;
            let (trace_id, duplicate) = (done.trace_id, done.duplicate);
            Ok(IoCompletion { bytes, trace_id, duplicate, ..IoCompletion::default() })
        });
        Ok(())
    }

    /// Sends the completion when the request has ended, and then gives its room back.
    fn answer(
        &self,
        room: Room,
        cookie: u64,
        started: Instant,
        outcome: impl Future<Output = Result<IoCompletion, Failure>> + Send + 'static,
    ) {
        let completions = self.completions.clone();
        let mut answering = Box::pin(async move {
            let mut completion = outcome.await.unwrap_or_else(|failure| IoCompletion {
                reason: failure.reason as i32,
                message: failure.detail.into_owned(),
                retry_after_ms: failure.retry_after_ms,
                ..IoCompletion::default()
            });
            completion.cookie = cookie;
            let us = started.elapsed().as_micros();
            completion.service_us = u64::try_from(us).unwrap_or(u64::MAX);
            // A client that has gone needs no completion.
            let _ = completions.send(Ok(completion)).await;
            drop(room);
        });
        // What is done already needs no task.
        if answering.as_mut().now_or_never().is_none() {
            tokio::spawn(answering);
        }
    }
}

/// One buffer out of pieces.
fn joined(pieces: Vec<Piece>) -> Bytes {
    let mut whole = BytesMut::new();
    for piece in pieces {
        match piece {
            Piece::Data(data) if whole.is_empty() => {
                whole = data.try_into_mut().unwrap_or_else(|data| BytesMut::from(data.as_ref()))
            }
            Piece::Data(data) => whole.extend_from_slice(&data),
            // A read of this stream is at most 1 MiB.
            Piece::Zeroes(len) => whole.resize(whole.len() + len as usize, 0),
        }
    }
    whole.freeze()
}
