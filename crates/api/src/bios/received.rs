//! The stream of bios as a block-store receives it: long data comes to where a disk takes it from.
//!
//! tonic gathers a message in a buffer of its own, and a direct write wants memory that is aligned: two
//! copies. Here the pieces of a long bio's data are gathered once, aligned. Everything else of the call is
//! tonic's: [`Apart`] hands the body on beside the request.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes, BytesMut};
use endio_types::BLOCK_SIZE;
use http::Request;
use http_body::Body as _;
use prost::{
    Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use tonic::{Code, Status, body::Body, codegen::Service, server::NamedService};
use tracing_mutex::stdsync::Mutex;

use super::{APART_BYTES_MIN, DATA, HEADER_BYTES, PATH};
use crate::blockstore::Bio;

/// A long bio's data is looked for among so many first bytes; behind them it is gathered as any message.
const LOOK_BYTES: usize = 16 << 10;
const _: () = assert!(LOOK_BYTES < APART_BYTES_MIN, "data that is found ends behind them");

/// A block-store's service, which gets the body of `Write` as it is.
#[derive(Clone, Debug)]
pub struct Apart<S>(pub S);

impl<S: NamedService> NamedService for Apart<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Apart<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        if request.uri().path() != PATH {
            return self.0.call(request);
        }
        let (mut head, body) = request.into_parts();
        head.extensions.insert(Received(Arc::new(Mutex::new(Some(body)))));
        self.0.call(Request::from_parts(head, Body::empty()))
    }
}

/// The body of a call, for whoever takes it first.
#[derive(Clone)]
struct Received(Arc<Mutex<Option<Body>>>);

/// The bios of a call to a service in [`Apart`], each of at most `message_bytes_max`. Of any other call
/// there are none.
pub fn received<T>(request: &mut tonic::Request<T>, message_bytes_max: usize) -> Incoming {
    let body = request
        .extensions_mut()
        .remove::<Received>()
        .and_then(|received| received.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    Incoming::new(body.unwrap_or_else(Body::empty), message_bytes_max)
}

/// Bios as they come.
pub struct Incoming {
    body: Body,
    /// What has come and is not taken.
    piece: Bytes,
    message_bytes_max: usize,
}

impl Incoming {
    pub(super) fn new(body: Body, message_bytes_max: usize) -> Self {
        Self { body, piece: Bytes::new(), message_bytes_max }
    }

    /// The next one; `None`: the peer has ended the stream. Not cancel-safe: what had come of a message is
    /// gone.
    ///
    /// # Errors
    /// The stream broke, or is none of bios. Nothing can be read from it any more.
    pub async fn message(&mut self) -> Result<Option<Bio>, Status> {
        if self.piece.is_empty() && !self.more().await? {
            return Ok(None);
        }
        let mut header = [0; HEADER_BYTES];
        self.gather(HEADER_BYTES).await?.copy_to_slice(&mut header);
        let [is_compressed, a, b, c, d] = header;
        if is_compressed != 0 {
            return Err(Status::unimplemented("a compressed message"));
        }
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if len > self.message_bytes_max {
            let why = format!("a message of {len} bytes; at most {}", self.message_bytes_max);
            return Err(Status::out_of_range(why));
        }
        self.bio(len).await.map(Some)
    }

    async fn bio(&mut self, len: usize) -> Result<Bio, Status> {
        let first = self.gather(len.min(LOOK_BYTES)).await?;
        let data = if len > LOOK_BYTES { find_data(&first) } else { None };
        let is_long = |data: &Data| data.len >= APART_BYTES_MIN && data.begin + data.len <= len;
        let Some(data) = data.filter(is_long) else {
            let rest = self.gather(len - first.len()).await?;
            // What was received may lie in a large piece, which a small bio must not keep.
            return decode(Bio::default(), [first, rest].concat().into());
        };
        let mut aligned = Aligned::new(data.len);
        aligned.put(&first[data.begin..]);
        let mut missing = data.begin + data.len - first.len();
        while missing > 0 {
            let piece = self.take(missing).await?;
            missing -= piece.len();
            aligned.put(&piece);
        }
        let behind = self.gather(len - data.begin - data.len).await?;
        let before = decode(Bio::default(), Bytes::copy_from_slice(&first[..data.key]))?;
        // Whatever says a field twice means the last one.
        decode(Bio { data: aligned.into(), ..before }, Bytes::copy_from_slice(&behind))
    }

    /// The next bytes, in one piece.
    async fn gather(&mut self, len: usize) -> Result<Bytes, Status> {
        if len <= self.piece.len() {
            return Ok(self.piece.split_to(len));
        }
        let mut whole = BytesMut::with_capacity(len);
        while whole.len() < len {
            whole.extend_from_slice(&self.take(len - whole.len()).await?);
        }
        Ok(whole.freeze())
    }

    /// At most so many of the next bytes, and at least one.
    async fn take(&mut self, most: usize) -> Result<Bytes, Status> {
        if self.piece.is_empty() && !self.more().await? {
            return Err(Status::internal("the stream ends inside a message"));
        }
        Ok(self.piece.split_to(most.min(self.piece.len())))
    }

    /// Waits for bytes; `false`: there are no more.
    async fn more(&mut self) -> Result<bool, Status> {
        while self.piece.is_empty() {
            let body = &mut self.body;
            match poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
                None => return Ok(false),
                // Who gives a call up sends no more.
                Some(Err(status)) if status.code() == Code::Cancelled => return Ok(false),
                Some(frame) => self.piece = frame?.into_data().unwrap_or_default(),
            }
        }
        Ok(true)
    }
}

/// Where the data of a bio lies in its message.
struct Data {
    /// Where its field begins.
    key: usize,
    begin: usize,
    len: usize,
}

/// Looks for it among the first bytes of a message; `None`: it is not there, or they are no bio.
fn find_data(first: &Bytes) -> Option<Data> {
    let mut left = first.clone();
    while left.has_remaining() {
        let key = first.len() - left.len();
        let (tag, wire_type) = decode_key(&mut left).ok()?;
        if tag == DATA && wire_type == WireType::LengthDelimited {
            let len = usize::try_from(decode_varint(&mut left).ok()?).ok()?;
            let begin = first.len() - left.len();
            return begin.checked_add(len).map(|_| Data { key, begin, len });
        }
        skip_field(wire_type, tag, &mut left, DecodeContext::default()).ok()?;
    }
    None
}

/// Adds the fields of a message to a bio.
fn decode(mut bio: Bio, fields: Bytes) -> Result<Bio, Status> {
    let wrong = |error: prost::DecodeError| Status::internal(error.to_string());
    bio.merge(fields).map_err(wrong)?;
    Ok(bio)
}

/// Bytes from where memory is aligned for a direct write.
struct Aligned {
    room: Vec<u8>,
    begin: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let mut room: Vec<u8> = Vec::with_capacity(len + BLOCK_SIZE);
        let begin = room.as_ptr().align_offset(BLOCK_SIZE).min(BLOCK_SIZE);
        room.resize(begin, 0);
        Self { room, begin }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.room.extend_from_slice(bytes);
    }
}

impl From<Aligned> for Bytes {
    fn from(aligned: Aligned) -> Self {
        Self::from(aligned.room).slice(aligned.begin..)
    }
}
