//! `endio.writeback.v1.Io`: reads and writes.

use std::sync::Arc;

use bytes::Bytes;
use endio_api::writeback::io_server::Io;
use endio_api::writeback::{
    FsyncRequest, FsyncResponse, IoCompletion, IoRequest, RangeRequest, RangeResponse, ReadRequest,
    ReadResponse, SyncAllRequest, WriteMode, WriteRequest, WriteResponse,
};
use endio_chassis::shutdown::Shutdown;
use endio_chassis::telemetry;
use endio_types::{ByteRange, Reason};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::submit::Origin;
use crate::access::Access;
use crate::dedupe::{Retry, session_from_wire};
use crate::engine::{Asker, Engine, Mode, Piece, RangeKind, RangeOp, ReadOp, Until, WriteOp};
use crate::failure::Failure;

/// Largest write, bytes: it fits into one io_end with its edges.
pub(super) const WRITE_BYTES_MAX: usize = 3 << 20;
/// Largest piece of a read, bytes.
pub(super) const READ_PIECE_BYTES: u64 = 1 << 20;
/// Pieces of one read that are fetched ahead.
const READ_AHEAD: usize = 4;

/// Reads and writes.
pub(crate) struct IoService {
    pub(crate) engine: Arc<Engine>,
    pub(crate) shutdown: Shutdown,
}

/// A write as it came over the wire. `parent` is the caller's trace context where the message has
/// none.
pub(super) fn write_op(request: WriteRequest, parent: &str) -> Result<WriteOp, Failure> {
    if request.data.len() > WRITE_BYTES_MAX {
        return Err(Failure::new(Reason::Malformed, "data: at most 3 MiB in one write"));
    }
    let mode = WriteMode::try_from(request.mode)
        .map_err(|_| Failure::new(Reason::Malformed, "mode: not a known mode"))?;
    Ok(WriteOp {
        offset_bytes: request.offset_bytes,
        data: request.data,
        // dsync promises the conversion, too.
        mode: match mode == WriteMode::Direct || request.dsync {
            true => Mode::Direct,
            false => Mode::Buffered,
        },
        retry: Retry::from_wire(request.retry.as_ref())?,
        traceparent: or_parent(request.traceparent, parent),
    })
}

/// A change of a range as it came over the wire.
pub(super) fn range_op(
    kind: RangeKind,
    request: RangeRequest,
    parent: &str,
) -> Result<RangeOp, Failure> {
    Ok(RangeOp {
        kind,
        bytes: ByteRange { offset: request.offset_bytes, len: request.length_bytes },
        retry: Retry::from_wire(request.retry.as_ref())?,
        traceparent: or_parent(request.traceparent, parent),
    })
}

/// What an fsync over the wire waits for.
pub(super) fn until(may_log: bool) -> Until {
    if may_log { Until::Durable } else { Until::Converted }
}

fn or_parent(own: String, parent: &str) -> String {
    if own.is_empty() { parent.to_owned() } else { own }
}

fn parent(metadata: &MetadataMap) -> String {
    telemetry::remote_parent(metadata).to_owned()
}

impl IoService {
    async fn range(
        &self,
        kind: RangeKind,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let (caller, parent) = (Caller::of(&request), parent(request.metadata()));
        let request = request.into_inner();
        caller.may(&self.engine.config, &request.volume, Access::ReadWrite)?;
        let key = request.retry.as_ref();
        let volume = self.engine.volume_for(&request.volume, key).await?;
        let op = range_op(kind, request, &parent)?;
        let done = self.engine.start_range(&volume, op).await?;
        Ok(Response::new(RangeResponse { blocks_changed: done.blocks_changed }))
    }
}

#[tonic::async_trait]
impl Io for IoService {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;
    type SubmitStream = BoxStream<'static, Result<IoCompletion, Status>>;

    async fn write(
        &self,
        request: Request<WriteRequest>,
    ) -> Result<Response<WriteResponse>, Status> {
        let (caller, parent) = (Caller::of(&request), parent(request.metadata()));
        let request = request.into_inner();
        caller.may(&self.engine.config, &request.volume, Access::ReadWrite)?;
        let key = request.retry.as_ref();
        let volume = self.engine.volume_for(&request.volume, key).await?;
        let op = write_op(request, &parent)?;
        let acked = self.engine.start_write(&volume, op).await?;
        Ok(Response::new(WriteResponse {
            trace_id: acked.trace_id,
            written_bytes: acked.written_bytes,
            duplicate: acked.duplicate,
        }))
    }

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let (caller, parent) = (Caller::of(&request), parent(request.metadata()));
        let ReadRequest { volume, offset_bytes, length_bytes, traceparent } = request.into_inner();
        let traceparent = or_parent(traceparent, &parent);
        let engine = Arc::clone(&self.engine);
        caller.may(&engine.config, &volume, Access::ReadOnly)?;
        let volume = engine.volume(&volume).await?;
        let whole = ByteRange { offset: offset_bytes, len: length_bytes };
        volume.check(whole, false)?;
        let parts = pieces_of(whole);
        let read = stream::iter(parts)
            .map(move |bytes| {
                let (engine, volume) = (Arc::clone(&engine), Arc::clone(&volume));
                let op = ReadOp { bytes, traceparent: traceparent.clone() };
                async move {
                    match engine.read(&volume, &op).await {
                        Ok(pieces) => answers(bytes.offset, pieces),
                        Err(failure) => vec![Err(Status::from(failure))],
                    }
                }
            })
            .buffered(READ_AHEAD)
            .flat_map(stream::iter);
        Ok(Response::new(read.boxed()))
    }

    async fn submit(
        &self,
        request: Request<Streaming<IoRequest>>,
    ) -> Result<Response<Self::SubmitStream>, Status> {
        let from = Origin { caller: Caller::of(&request), parent: parent(request.metadata()) };
        let (engine, shutdown) = (Arc::clone(&self.engine), self.shutdown.clone());
        let completions = super::submit::start(engine, shutdown, request.into_inner(), from);
        Ok(Response::new(completions))
    }

    async fn fsync(
        &self,
        request: Request<FsyncRequest>,
    ) -> Result<Response<FsyncResponse>, Status> {
        let (caller, parent) = (Caller::of(&request), parent(request.metadata()));
        let FsyncRequest { volume: name, may_log, session } = request.into_inner();
        caller.may(&self.engine.config, &name, Access::ReadOnly)?;
        let session = session_from_wire(&session)?;
        let volume = self.engine.volume(&name).await?;
        let asker = Asker { observer: None, session };
        let waited_for = self.engine.fsync(&volume, asker, until(may_log), &parent).await?;
        Ok(Response::new(FsyncResponse { waited_for }))
    }

    async fn sync_all(
        &self,
        request: Request<SyncAllRequest>,
    ) -> Result<Response<FsyncResponse>, Status> {
        let caller = Caller::of(&request);
        let sees = |volume: &str| caller.sees(&self.engine.config, volume);
        Ok(Response::new(FsyncResponse { waited_for: self.engine.sync_all(sees).await? }))
    }

    async fn trim(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        self.range(RangeKind::Trim, request).await
    }

    async fn write_zeroes(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        self.range(RangeKind::Zero, request).await
    }

    async fn allocate(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        self.range(RangeKind::Allocate, request).await
    }
}

/// A read cut into pieces that end on multiples of the piece's size.
fn pieces_of(whole: ByteRange) -> impl Iterator<Item = ByteRange> {
    let end = whole.offset.saturating_add(whole.len);
    let mut at = whole.offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let next = (at / READ_PIECE_BYTES + 1).saturating_mul(READ_PIECE_BYTES).min(end);
        let piece = ByteRange { offset: at, len: next - at };
        at = next;
        Some(piece)
    })
}

fn answers(mut offset: u64, pieces: Vec<Piece>) -> Vec<Result<ReadResponse, Status>> {
    let mut answers = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let len = piece.len();
        answers.push(Ok(match piece {
            Piece::Data(data) => ReadResponse { offset_bytes: offset, data, zeroes_bytes: 0 },
            Piece::Zeroes(zeroes_bytes) => {
                ReadResponse { offset_bytes: offset, data: Bytes::new(), zeroes_bytes }
            }
        }));
        offset += len;
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_cut_at_multiples_of_its_piece() {
        let whole = ByteRange { offset: READ_PIECE_BYTES - 1, len: READ_PIECE_BYTES + 2 };
        let pieces: Vec<_> = pieces_of(whole).map(|piece| (piece.offset, piece.len)).collect();
        let mib = READ_PIECE_BYTES;
        assert_eq!(pieces, [(mib - 1, 1), (mib, mib), (2 * mib, 1)]);
        assert_eq!(pieces_of(ByteRange { offset: 5, len: 0 }).count(), 0);
    }
}
