//! The stream of bios to a block-store, whose data goes to the transport as it is.
//!
//! tonic copies each message into a buffer of its own before it sends it. Here a long bio becomes two pieces:
//! what is before its data, and its data. On the wire it is the message that `BlockStoreClient::write`
//! would send.

mod received;

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Uri, Version, header};
use http_body::{Body, Frame};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio::sync::mpsc;
use tonic::{
    Code, Status, Streaming,
    codec::{Codec as _, Streaming as Answers},
    codegen::Service as _,
    transport::Channel,
};
use tonic_prost::ProstCodec;

use crate::{
    blockstore::{Bio, BioDone},
    protocol,
};

pub use received::{Apart, Incoming, received};

const PATH: &str = "/endio.blockstore.v1.BlockStore/Write";
/// Field number of `Bio.data`.
const DATA: u32 = 2;
/// What stands before each message of gRPC: whether it is compressed, and its length.
const HEADER_BYTES: usize = 5;
/// Data of so many bytes goes apart: below, a copy costs less than a piece more.
const APART_BYTES_MIN: usize = 32 << 10;
/// Messages that wait together leave together, in pieces of about so many bytes.
const TOGETHER_BYTES: usize = 32 << 10;

/// Opens the stream. It ends when `bios` does.
///
/// # Errors
/// The store cannot be reached, or refuses to speak with us.
pub async fn write(
    channel: &mut Channel,
    bios: mpsc::Receiver<Bio>,
    answer_bytes_max: usize,
) -> Result<Streaming<BioDone>, Status> {
    let (metadata, _, body) = protocol::say(Outgoing::new(bios)).into_parts();
    let mut request = Request::new(tonic::body::Body::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(PATH);
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = metadata.into_headers();
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    request
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let failed = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    poll_fn(|context| channel.poll_ready(context)).await.map_err(failed)?;
    let (head, body) = channel.call(request).await.map_err(failed)?.into_parts();
    let decoder = ProstCodec::<Bio, BioDone>::default().decoder();
    match Status::from_header_map(&head.headers) {
        Some(status) if status.code() != Code::Ok => Err(status),
        Some(_) => Ok(Answers::new_empty(decoder, body)),
        None => Ok(Answers::new_response(decoder, body, head.status, None, Some(answer_bytes_max))),
    }
}

/// The body of the request.
struct Outgoing {
    bios: mpsc::Receiver<Bio>,
    /// What is encoded and not sent.
    room: BytesMut,
    /// Data that comes behind it.
    apart: Option<Bytes>,
}

impl Outgoing {
    fn new(bios: mpsc::Receiver<Bio>) -> Self {
        Self { bios, room: BytesMut::new(), apart: None }
    }

    /// Encodes a bio, up to its data if that goes apart.
    fn put(&mut self, mut bio: Bio) {
        let data = std::mem::take(&mut bio.data);
        let data_bytes = match data.len() {
            0 => 0,
            len => key_len(DATA) + encoded_len_varint(len as u64) + len,
        };
        let message_bytes = bio.encoded_len() + data_bytes;
        let is_apart = data.len() >= APART_BYTES_MIN;
        let here = message_bytes - if is_apart { data.len() } else { 0 };
        self.room.reserve(HEADER_BYTES + here);
        self.room.put_u8(0);
        // Longer than a u32 can say, it is longer than any store takes, and refused as such.
        self.room.put_u32(u32::try_from(message_bytes).unwrap_or(u32::MAX));
        bio.encode_raw(&mut self.room);
        if data.is_empty() {
            return;
        }
        // Fields come in any order: this one last.
        encode_key(DATA, WireType::LengthDelimited, &mut self.room);
        encode_varint(data.len() as u64, &mut self.room);
        match is_apart {
            true => self.apart = Some(data),
            false => self.room.put(data),
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        while self.room.len() < TOGETHER_BYTES && self.apart.is_none() {
            match self.bios.poll_recv(context) {
                Poll::Ready(Some(bio)) => self.put(bio),
                _ if !self.room.is_empty() => break,
                other => return Poll::Ready(ready!(other).and(None)),
            }
        }
        let piece = match self.room.is_empty() {
            true => self.apart.take(),
            false => Some(self.room.split().freeze()),
        };
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }
}

#[cfg(test)]
mod tests;
