//! What is sent is what prost reads, and what prost sends is what is received.

use std::{collections::VecDeque, convert::Infallible, future::poll_fn};

use http_body::{Body as _, Frame};
use prost::Message as _;
use tonic::body::Body;

use super::*;
use crate::{blockstore::Bio, common::Token};

fn bio(io_end: u64, blocks: u32) -> Bio {
    let bytes = 0..blocks as usize * 4096;
    Bio {
        token: Some(Token { io_end, blocks, ..Default::default() }),
        data: bytes.map(|at| (at / 7 + io_end as usize) as u8).collect::<Vec<_>>().into(),
        crc32c: (0..blocks).collect(),
        traceparent: "00-1-2-01".to_owned(),
    }
}

/// The pieces of what was handed over before the stream ended.
async fn pieces(bios: &[Bio]) -> Vec<Bytes> {
    let (give, take) = mpsc::channel(bios.len().max(1));
    for bio in bios {
        give.send(bio.clone()).await.expect("there is room");
    }
    drop(give);
    let (mut body, mut pieces) = (Outgoing::new(take), Vec::new());
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let Ok(frame) = frame;
        pieces.push(frame.into_data().expect("nothing but data"));
    }
    pieces
}

/// As prost would send it, and tonic.
fn plain(bio: &Bio) -> Vec<u8> {
    framed(&bio.encode_to_vec())
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

/// A reader of bytes that come in pieces of that many.
fn incoming(bytes: &[u8], piece: usize) -> Incoming {
    let pieces = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
    Incoming::new(Body::new(Pieces(pieces)), 4 << 20)
}

async fn all(mut incoming: Incoming) -> Result<Vec<Bio>, Status> {
    let mut bios = Vec::new();
    while let Some(bio) = incoming.message().await? {
        bios.push(bio);
    }
    Ok(bios)
}

fn some_bios() -> Vec<Bio> {
    let edge = (APART_BYTES_MIN / 4096) as u32;
    let some = [0, 1, edge - 1, edge, 256, 1, edge + 1, 0];
    some.map(|blocks| bio(u64::from(blocks) + 300, blocks)).into()
}

#[tokio::test]
async fn what_is_sent_is_what_prost_reads() {
    let bios = some_bios();
    let mut sent: Bytes = pieces(&bios).await.concat().into();
    for bio in bios {
        let header = sent.split_to(HEADER_BYTES);
        assert_eq!(header[0], 0, "not compressed");
        let len = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        assert_eq!(Bio::decode(sent.split_to(len as usize)).expect("a bio"), bio);
    }
    assert!(sent.is_empty());
    assert_eq!(pieces(&[Bio::default()]).await.concat(), plain(&Bio::default()));
    assert_eq!(pieces(&[]).await.len(), 0);
}

#[tokio::test]
async fn long_data_is_not_copied_and_short_messages_leave_together() {
    let bios = [bio(1, 1), bio(2, 256), bio(3, 1), bio(4, 1)];
    let sent = pieces(&bios).await;
    assert_eq!(sent.len(), 3, "a bio and the beginning of the next, its data, and the rest");
    assert_eq!(sent[1].as_ptr(), bios[1].data.as_ptr());
    let many: Vec<Bio> = (0..40).map(|number| bio(number, 1)).collect();
    let longest = pieces(&many).await.iter().map(Bytes::len).max();
    assert!(longest.is_some_and(|longest| longest < TOGETHER_BYTES + 8192), "{longest:?}");
}

/// From us or from others, in pieces of any size; and long data lies where a direct write wants it.
#[tokio::test]
async fn what_was_sent_is_received_however_it_is_cut() {
    let bios = some_bios();
    let ours = pieces(&bios).await.concat();
    let theirs: Vec<u8> = bios.iter().flat_map(plain).collect();
    for bytes in [&ours, &theirs] {
        for piece in [1, 2, 13, 4096, 16_384, 16_389, 65_536, bytes.len()] {
            let received = all(incoming(bytes, piece)).await.expect("bios");
            assert_eq!(received, bios, "in pieces of {piece}");
            let long = received.iter().filter(|bio| bio.data.len() >= APART_BYTES_MIN);
            for bio in long {
                assert_eq!(bio.data.as_ptr().align_offset(4096), 0, "{} bytes", bio.data.len());
            }
        }
    }
}

#[tokio::test]
async fn a_field_that_comes_twice_is_its_last() {
    let (one, other) = (bio(1, 16), bio(2, 32));
    for last in [&other, &Bio { data: Bytes::new(), ..other.clone() }] {
        let twice = [one.encode_to_vec(), last.encode_to_vec()].concat();
        let expected = Bio::decode(&twice[..]).expect("prost merges them");
        let received = all(incoming(&framed(&twice), 5_000)).await.expect("a bio");
        assert_eq!(received, [expected]);
    }
}

#[tokio::test]
async fn what_is_no_bio_is_refused() {
    let whole = plain(&bio(1, 16));
    for len in [1, 4, 5, 6, 40, 16_384, 40_000, whole.len() - 1] {
        let cut = all(incoming(&whole[..len], 1_000)).await;
        assert!(cut.is_err(), "cut after {len} bytes");
    }
    let mut compressed = whole.clone();
    compressed[0] = 1;
    let refused = all(incoming(&compressed, 1_000)).await.expect_err("compressed");
    assert_eq!(refused.code(), Code::Unimplemented);
    let long = all(incoming(&[0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3], 8)).await;
    assert_eq!(long.expect_err("4 GiB").code(), Code::OutOfRange);
    // Data that ends behind its message, fields that end inside themselves, and noise.
    let mut beyond = bio(1, 16).encode_to_vec();
    beyond.truncate(40_000);
    assert!(all(incoming(&framed(&beyond), 1_000)).await.is_err());
    let noise: Vec<u8> =
        (0..50_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert!(all(incoming(&framed(&noise), 1_000)).await.is_err());
    let huge =
        [&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1][..], &noise].concat();
    assert!(all(incoming(&framed(&huge), 1_000)).await.is_err());
}
