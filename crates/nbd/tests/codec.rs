//! Codec: what is encoded is decoded again, and no bytes make a decoder panic.
#![allow(clippy::unwrap_used)]

use bytes::{Buf, Bytes, BytesMut};
use endio_nbd::codec::{CodecError, Mode, ReplyHeader, ReplyTo, Request, StatusPayload};
use endio_nbd::consts::{chunk, cmd, cmd_flag};
use endio_nbd::{Errno, Extent, Fault, Piece};
use proptest::prelude::*;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn mode() -> impl Strategy<Value = Mode> {
    prop::sample::select(&MODES[..])
}

fn joined(frames: &[Bytes]) -> Vec<u8> {
    frames.concat()
}

/// What a client that follows the specification makes of a reply to a read.
fn read_back(to: ReplyTo, mut wire: &[u8], length: usize) -> Result<Vec<u8>, u32> {
    let mut out = vec![0xee; length];
    let mut covered = 0;
    loop {
        let (header, taken) = ReplyHeader::decode(to.mode, wire).unwrap();
        wire.advance(taken);
        match header {
            ReplyHeader::Simple { error, cookie } => {
                assert_eq!(cookie, to.cookie);
                if error != 0 {
                    assert!(wire.is_empty());
                    return Err(error);
                }
                out.copy_from_slice(wire);
                return Ok(out);
            }
            ReplyHeader::Chunk { flags, kind, cookie, offset, length } => {
                assert_eq!(cookie, to.cookie);
                assert!(offset.is_none_or(|offset| offset == to.offset));
                let mut payload = &wire[..length as usize];
                wire.advance(length as usize);
                match kind {
                    chunk::NONE => assert_eq!(payload.len(), 0),
                    chunk::OFFSET_DATA => {
                        let at = (payload.get_u64() - to.offset) as usize;
                        out[at..at + payload.len()].copy_from_slice(payload);
                        covered += payload.len();
                    }
                    chunk::OFFSET_HOLE => {
                        let at = (payload.get_u64() - to.offset) as usize;
                        let run = payload.get_u32() as usize;
                        assert!(payload.is_empty());
                        out[at..at + run].fill(0);
                        covered += run;
                    }
                    chunk::ERROR => {
                        let error = payload.get_u32();
                        assert_eq!(usize::from(payload.get_u16()), payload.len());
                        return Err(error);
                    }
                    kind => panic!("chunk of type {kind}"),
                }
                if flags & chunk::DONE != 0 {
                    assert!(wire.is_empty());
                    assert_eq!(covered, out.len());
                    return Ok(out);
                }
            }
        }
    }
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|data| Piece::Data(data.into())),
        (0_u64..5000).prop_map(Piece::Zeroes),
    ]
}

fn plain(pieces: &[Piece]) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Data(data) => out.extend_from_slice(data),
            Piece::Zeroes(length) => out.resize(out.len() + *length as usize, 0),
        }
    }
    out
}

proptest! {
    #[test]
    fn a_request_survives_the_wire(
        mode in mode(), flags: u16, command in 0_u16..12, cookie: u64, offset: u64, length: u32,
    ) {
        let request = Request { flags, command, cookie, offset, length: u64::from(length) };
        let mut wire = BytesMut::new();
        request.encode(mode, &mut wire);
        prop_assert_eq!(wire.len(), mode.request_len());
        prop_assert_eq!(Request::decode(mode, &wire), Ok(request));
    }

    #[test]
    fn no_bytes_make_the_decoders_panic(
        mode in mode(), bytes in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let _ = Request::decode(mode, &bytes);
        let _ = ReplyHeader::decode(mode, &bytes);
        let _ = StatusPayload::decode(&bytes);
        let _ = endio_nbd::tls::common_name(&bytes);
    }

    #[test]
    fn a_read_reply_carries_the_bytes_in_every_form(
        mode in mode(), is_whole: bool, offset in 0_u64..1 << 40,
        pieces in prop::collection::vec(piece(), 0..6),
    ) {
        let to = ReplyTo { mode, cookie: 7, offset };
        let expected = plain(&pieces);
        let frames = to.read(pieces, is_whole);
        let wire = joined(&frames);
        prop_assert_eq!(read_back(to, &wire, expected.len()), Ok(expected));
    }

    #[test]
    fn a_failure_carries_its_number_in_every_form(
        mode in mode(), errno in prop::sample::select(&Errno::ALL[..]), message in ".{0,40}",
    ) {
        let to = ReplyTo { mode, cookie: 9, offset: 1 };
        let wire = joined(&to.failed(&Fault::new(errno, message)));
        prop_assert_eq!(read_back(to, &wire, 0), Err(errno.code()));
    }

    #[test]
    fn a_status_payload_survives_the_wire(
        length: u64, contexts in prop::collection::vec(any::<u32>(), 1..20),
    ) {
        let payload = StatusPayload { length, contexts };
        let mut wire = BytesMut::new();
        payload.encode(&mut wire);
        prop_assert_eq!(StatusPayload::decode(&wire), Some(payload));
        prop_assert_eq!(StatusPayload::decode(&wire[..wire.len() - 1]), None);
    }
}

#[test]
fn zeroes_of_a_structured_read_do_not_travel() {
    let to = ReplyTo { mode: Mode::Structured, cookie: 1, offset: 4096 };
    let pieces = vec![Piece::Zeroes(1 << 20), Piece::Data(Bytes::from_static(b"x"))];
    let wire = joined(&to.read(pieces, false));
    assert_eq!(wire.len(), 20 + 12 + 20 + 8 + 1);
    // A client that set DF gets one chunk, and a hole is one.
    let wire = joined(&to.read(vec![Piece::Zeroes(5), Piece::Zeroes(6)], true));
    assert_eq!(wire.len(), 20 + 12);
}

#[test]
fn another_magic_number_is_an_error() {
    let request = Request { flags: 0, command: cmd::READ, cookie: 1, offset: 2, length: 3 };
    let mut wire = BytesMut::new();
    request.encode(Mode::Structured, &mut wire);
    wire.resize(32, 0);
    let decoded = Request::decode(Mode::Extended, &wire);
    assert_eq!(decoded, Err(CodecError::Magic(0x2560_9513)));
    assert_eq!(Request::decode(Mode::Simple, &wire[..27]), Err(CodecError::Short));
}

#[test]
fn the_payload_of_a_request_is_told_by_command_or_flag() {
    let of = |command, flags, mode| {
        Request { flags, command, cookie: 0, offset: 0, length: 10 }.payload_len(mode)
    };
    for mode in MODES {
        assert_eq!(of(cmd::WRITE, 0, mode), 10);
        assert_eq!(of(cmd::READ, 0, mode), 0);
        assert_eq!(of(99, 0, mode), 0);
    }
    assert_eq!(of(cmd::READ, cmd_flag::PAYLOAD_LEN, Mode::Structured), 0);
    assert_eq!(of(cmd::READ, cmd_flag::PAYLOAD_LEN, Mode::Extended), 10);
    assert_eq!(of(99, cmd_flag::PAYLOAD_LEN, Mode::Extended), 10);
}

#[test]
fn block_status_has_32_bit_extents_or_64_bit_ones() {
    let extents = vec![Extent { length: 4096, flags: 3 }, Extent { length: 512, flags: 0 }];
    let contexts = [(0, extents.clone()), (5, extents)];
    let compact = ReplyTo { mode: Mode::Structured, cookie: 1, offset: 0 };
    assert_eq!(joined(&compact.block_status(&contexts)).len(), 2 * (20 + 4 + 2 * 8));
    let extended = ReplyTo { mode: Mode::Extended, cookie: 1, offset: 0 };
    let wire = joined(&extended.block_status(&contexts));
    assert_eq!(wire.len(), 2 * (32 + 8 + 2 * 16));
    let (header, _) = ReplyHeader::decode(Mode::Extended, &wire).unwrap();
    let expected =
        ReplyHeader::Chunk { flags: 0, kind: 6, cookie: 1, offset: Some(0), length: 8 + 2 * 16 };
    assert_eq!(header, expected);
}

#[test]
fn every_error_has_a_number_of_its_own() {
    for errno in Errno::ALL {
        assert_ne!(errno.code(), 0);
        assert_eq!(Errno::from_code(errno.code()), errno);
    }
    assert_eq!(Errno::from_code(4242), Errno::Inval);
}
