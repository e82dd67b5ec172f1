//! Random requests of a session, several in flight at a time, against a model that is an array of
//! bytes and the rules of the NBD specification ("Request types", "Error values").
#![allow(clippy::unwrap_used)]

mod client;

use std::collections::BTreeMap;
use std::sync::Arc;

use client::{Conn, memory, pipe, server, somebody};
use endio_nbd::codec::{Mode, ReplyHeader, Request};
use endio_nbd::consts::{chunk, cmd, cmd_flag};
use endio_nbd::memory::MemoryExport;
use endio_nbd::session::CannotTell;
use endio_nbd::{EndReason, ExportInfo, Limits};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, DuplexStream};

/// Bytes of the export that [`memory`] makes.
const SIZE: u64 = 1 << 20;
/// Requests in flight. Each has a part of the export for itself, as nothing orders them.
const DEPTH: u64 = 6;
const PART: u64 = SIZE / DEPTH;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// What a client sends: a command with flags, and a range within its part or far from it.
#[derive(Debug, Clone)]
struct Ask {
    command: u16,
    flags: u16,
    start: u64,
    length: u64,
    /// Moves the range to behind the end.
    is_beyond: bool,
    fill: u8,
}

fn ask() -> impl Strategy<Value = Ask> {
    let commands = [
        cmd::READ,
        cmd::READ,
        cmd::WRITE,
        cmd::WRITE,
        cmd::WRITE,
        cmd::TRIM,
        cmd::WRITE_ZEROES,
        cmd::FLUSH,
        cmd::CACHE,
        cmd::BLOCK_STATUS,
        77,
    ];
    let flags = prop_oneof![
        6 => Just(0), 2 => Just(cmd_flag::FUA), 1 => Just(cmd_flag::NO_HOLE),
        1 => Just(cmd_flag::DF), 1 => Just(cmd_flag::FAST_ZERO), 1 => Just(1 << 12),
    ];
    let length = prop_oneof![1 => Just(0), 6 => 1..9000_u64, 2 => 1..PART];
    (
        prop::sample::select(commands.to_vec()),
        flags,
        0..PART,
        length,
        prop::bool::weighted(0.05),
        1..=255_u8,
    )
        .prop_map(|(command, flags, start, length, is_beyond, fill)| {
            let length = length.min(PART - start);
            Ask { command, flags, start, length, is_beyond, fill }
        })
}

/// The bytes of the export as the specification allows them to be.
struct Model {
    bytes: Vec<u8>,
    /// Was trimmed: reads as it was, or as zero.
    trimmed: Vec<bool>,
    is_read_only: bool,
    mode: Mode,
}

impl Model {
    /// The error that a request must be answered with, from the specification alone.
    fn error(&self, request: &Request) -> Option<u32> {
        let own = match request.command {
            cmd::READ if self.mode != Mode::Simple => cmd_flag::DF,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            _ => 0,
        };
        let is_change = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let is_beyond = request.offset + request.length > SIZE;
        match request.command {
            _ if request.flags & !(own | cmd_flag::FUA) != 0 => Some(EINVAL),
            // No context was selected, and there is no command 77.
            cmd::BLOCK_STATUS | 77 => Some(EINVAL),
            cmd::FLUSH => None,
            _ if is_change && self.is_read_only => Some(EPERM),
            cmd::WRITE | cmd::WRITE_ZEROES if is_beyond => Some(ENOSPC),
            _ if is_beyond => Some(EINVAL),
            _ => None,
        }
    }

    fn apply(&mut self, request: &Request, fill: u8) {
        let range = request.offset as usize..(request.offset + request.length) as usize;
        match request.command {
            cmd::TRIM => self.trimmed[range].fill(true),
            cmd::WRITE | cmd::WRITE_ZEROES => {
                let byte = if request.command == cmd::WRITE { fill } else { 0 };
                self.bytes[range.clone()].fill(byte);
                self.trimmed[range].fill(false);
            }
            _ => {}
        }
    }

    fn judge(&self, offset: u64, found: &[u8]) {
        for (at, byte) in (offset as usize..).zip(found) {
            let is_possible = *byte == self.bytes[at] || (self.trimmed[at] && *byte == 0);
            assert!(is_possible, "byte {at} is {byte}, not {}", self.bytes[at]);
        }
    }
}

/// One request in flight.
struct Sent {
    request: Request,
    fill: u8,
    data: Vec<u8>,
    error: Option<u32>,
}

/// Takes one chunk or reply; the cookie of a request that it completes.
async fn take(conn: &mut Conn<DuplexStream>, sent: &mut BTreeMap<u64, Sent>) -> Option<u64> {
    let mut header = vec![0; conn.mode.reply_len()];
    // Errors of structured modes are chunks, and so is everything else.
    conn.stream.read_exact(&mut header).await.unwrap();
    match ReplyHeader::decode(conn.mode, &header).unwrap().0 {
        ReplyHeader::Simple { error, cookie } => {
            let of = sent.get_mut(&cookie).expect("a reply to a request in flight");
            of.error = Some(error).filter(|error| *error != 0);
            if of.error.is_none() && of.request.command == cmd::READ {
                conn.stream.read_exact(&mut of.data).await.unwrap();
            }
            Some(cookie)
        }
        ReplyHeader::Chunk { flags, kind, cookie, length, .. } => {
            let mut payload = vec![0; length as usize];
            conn.stream.read_exact(&mut payload).await.unwrap();
            let of = sent.get_mut(&cookie).expect("a reply to a request in flight");
            let offset = || u64::from_be_bytes(payload[..8].try_into().unwrap());
            match kind {
                chunk::NONE => {}
                chunk::ERROR => {
                    of.error = Some(u32::from_be_bytes(payload[..4].try_into().unwrap()));
                }
                chunk::OFFSET_DATA => {
                    let at = (offset() - of.request.offset) as usize;
                    of.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                }
                chunk::OFFSET_HOLE => {
                    let at = (offset() - of.request.offset) as usize;
                    let hole = u32::from_be_bytes(payload[8..12].try_into().unwrap());
                    of.data[at..at + hole as usize].fill(0);
                }
                other => panic!("a chunk of kind {other}"),
            }
            (flags & chunk::DONE != 0).then_some(cookie)
        }
    }
}

async fn session(mode: Mode, is_read_only: bool, asks: Vec<Ask>) {
    let export = match is_read_only {
        true => {
            let info = ExportInfo { is_read_only, ..ExportInfo::new("disk", SIZE) };
            MemoryExport::new(info, SIZE)
        }
        false => memory(),
    };
    let server = server(export, Limits::default());
    let (near, far) = pipe(4 << 20);
    let running =
        tokio::spawn(async move { server.serve(far, somebody(), Arc::new(CannotTell)).await });
    let mut conn = Conn::open(near, mode).await;
    let (bytes, trimmed) = (vec![0; SIZE as usize], vec![false; SIZE as usize]);
    let mut model = Model { bytes, trimmed, is_read_only, mode };
    let mut cookie = 0;
    for batch in asks.chunks(DEPTH as usize) {
        let mut sent = BTreeMap::new();
        for (part, ask) in (0..).zip(batch) {
            cookie += 1;
            let offset = part * PART + ask.start + if ask.is_beyond { SIZE } else { 0 };
            let (offset, length) =
                if ask.command == cmd::FLUSH { (0, 0) } else { (offset, ask.length) };
            let Ask { command, mut flags, fill, .. } = ask.clone();
            let is_write = command == cmd::WRITE;
            if is_write && mode == Mode::Extended {
                flags |= cmd_flag::PAYLOAD_LEN;
            }
            let request = Request { flags, command, cookie, offset, length };
            let payload = vec![fill; if is_write { length as usize } else { 0 }];
            conn.send(request, &payload).await;
            // Not zero, so that what no chunk covers is seen.
            let data = vec![0xee; if command == cmd::READ { length as usize } else { 0 }];
            sent.insert(cookie, Sent { request, fill, data, error: None });
        }
        let mut open = sent.len();
        while open > 0 {
            let Some(cookie) = take(&mut conn, &mut sent).await else { continue };
            open -= 1;
            let done = sent.remove(&cookie).unwrap();
            let plain =
                Request { flags: done.request.flags & !cmd_flag::PAYLOAD_LEN, ..done.request };
            assert_eq!(done.error, model.error(&plain), "{:?}", done.request);
            match done.error {
                None if plain.command == cmd::READ => model.judge(plain.offset, &done.data),
                None => model.apply(&plain, done.fill),
                Some(_) => {}
            }
        }
    }
    let leave = Request { flags: 0, command: cmd::DISC, cookie: 0, offset: 0, length: 0 };
    conn.send(leave, &[]).await;
    assert!(matches!(running.await.unwrap(), EndReason::Disconnected), "the client took its leave");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_session_answers_as_the_model_does(
        mode in prop::sample::select(&[Mode::Simple, Mode::Structured, Mode::Extended][..]),
        is_read_only in prop::bool::weighted(0.1),
        asks in prop::collection::vec(ask(), 1..90),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(session(mode, is_read_only, asks));
    }
}
