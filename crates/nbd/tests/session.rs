//! Sessions with clients that misbehave, and exports that take their time.
#![allow(clippy::unwrap_used)]

mod client;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use client::{Conn, memory, pipe, request, server, somebody};
use endio_nbd::codec::Mode;
use endio_nbd::consts::{cmd, cmd_flag};
use endio_nbd::session::{CannotTell, HangUp};
use endio_nbd::{
    EndReason, Errno, Export, ExportInfo, Extent, Fault, Limits, NbdAddr, NbdListener, Piece,
    Server, ZeroOptions,
};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Writes wait for a permit of the gate; what was written is counted.
struct Gated {
    info: ExportInfo,
    gate: Arc<Semaphore>,
    begun: Arc<AtomicU64>,
    /// Offsets of the writes in the order in which they began.
    order: Arc<Mutex<Vec<u64>>>,
}

impl Gated {
    fn new() -> (Self, Arc<Semaphore>, Arc<AtomicU64>) {
        let (gate, begun) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU64::new(0)));
        let (info, order) = (ExportInfo::new("disk", 1 << 40), Arc::default());
        (Self { info, gate: gate.clone(), begun: begun.clone(), order }, gate, begun)
    }
}

#[async_trait]
impl Export for Gated {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    async fn read(&self, _offset: u64, length: u32) -> Result<Vec<Piece>, Fault> {
        Ok(vec![Piece::Data(vec![7; length as usize].into())])
    }

    async fn write(&self, offset: u64, _data: Bytes, _fua: bool) -> Result<(), Fault> {
        self.order.lock().unwrap().push(offset);
        self.begun.fetch_add(1, Ordering::SeqCst);
        match self.gate.acquire().await {
            Ok(permit) => permit.forget(),
            // A closed gate is an export that stops.
            Err(_) => return Err(Errno::Shutdown.into()),
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    async fn trim(&self, _offset: u64, _length: u64, _fua: bool) -> Result<(), Fault> {
        Ok(())
    }

    async fn write_zeroes(&self, _: u64, _: u64, _: ZeroOptions) -> Result<(), Fault> {
        Ok(())
    }

    async fn block_status(
        &self,
        _context: &str,
        _offset: u64,
        length: u64,
        _extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        Ok(vec![Extent { length, flags: 0 }])
    }
}

/// Whether a test said so.
#[derive(Default)]
struct Switch(AtomicBool);

impl HangUp for Switch {
    fn is_hung_up(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Far more than anything here takes; under paused time it passes only when nothing else can.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// Why a session ended.
async fn ended(session: tokio::task::JoinHandle<EndReason>) -> EndReason {
    tokio::time::timeout(PATIENCE, session).await.expect("the session ends").unwrap()
}

/// Waits until so many writes have begun.
async fn until(begun: &AtomicU64, count: u64) {
    let begin = async {
        while begun.load(Ordering::SeqCst) < count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, begin).await.expect("the writes begin");
}

fn serve(
    server: &Server,
    bytes: usize,
) -> (tokio::io::DuplexStream, tokio::task::JoinHandle<EndReason>) {
    let (near, far) = pipe(bytes);
    let server = server.clone();
    let hang_up = Arc::new(CannotTell);
    (near, tokio::spawn(async move { server.serve(far, somebody(), hang_up).await }))
}

#[tokio::test]
async fn what_is_written_is_read_in_every_form() {
    let server = server(memory(), Limits::default());
    for mode in MODES {
        let (near, session) = serve(&server, 1 << 16);
        let mut conn = Conn::open(near, mode).await;
        let mut write = request(cmd::WRITE, 1, 10, 5);
        if mode == Mode::Extended {
            write.flags = cmd_flag::PAYLOAD_LEN;
        }
        conn.send(write, b"hello").await;
        assert_eq!(conn.reply(0).await.outcome, Ok(vec![]));
        conn.send(request(cmd::READ, 2, 0, 20), b"").await;
        let read = conn.reply(20).await;
        assert_eq!(read.cookie, 2);
        assert_eq!(read.outcome.unwrap()[10..15], *b"hello");
        conn.send(request(cmd::DISC, 3, 0, 0), b"").await;
        assert!(matches!(ended(session).await, EndReason::Disconnected));
    }
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_refused_and_the_connection_goes_on() {
    let server = server(memory(), Limits::default());
    let (near, _session) = serve(&server, 1 << 16);
    let mut conn = Conn::open(near, Mode::Extended).await;
    let size = 1 << 20;
    let flagged = |command, flags, length| {
        let mut bad = request(command, 9, 0, length);
        bad.flags = flags;
        bad
    };
    let cases = [
        (request(cmd::READ, 9, size, 1), Errno::Inval),
        (request(cmd::READ, 9, u64::MAX, u64::MAX), Errno::Inval),
        (request(cmd::WRITE_ZEROES, 9, size - 1, 2), Errno::NoSpc),
        (request(cmd::TRIM, 9, 1, size), Errno::Inval),
        (request(cmd::FLUSH, 9, 0, 1), Errno::Inval),
        (request(42, 9, 0, 0), Errno::Inval),
        (request(cmd::BLOCK_STATUS, 9, 0, 4096), Errno::Inval),
        (flagged(cmd::READ, cmd_flag::REQ_ONE, 4), Errno::Inval),
        (flagged(cmd::TRIM, 1 << 15, 4), Errno::Inval),
    ];
    for (bad, errno) in cases {
        conn.send(bad, b"").await;
        assert_eq!(conn.reply(0).await.outcome, Err(errno.code()), "{bad:?}");
    }
    // A payload that no command of this kind has is skipped.
    conn.send(flagged(cmd::READ, cmd_flag::PAYLOAD_LEN, 3), b"abc").await;
    assert_eq!(conn.reply(0).await.outcome, Err(Errno::Inval.code()));
    conn.send(flagged(42, cmd_flag::PAYLOAD_LEN, 3), b"abc").await;
    assert_eq!(conn.reply(0).await.outcome, Err(Errno::Inval.code()));
    conn.send(request(cmd::READ, 1, 0, 4), b"").await;
    assert_eq!(conn.reply(4).await.outcome, Ok(vec![0; 4]));
}

#[tokio::test]
async fn a_read_only_export_refuses_changes() {
    let mut info = ExportInfo::new("disk", 1 << 20);
    info.is_read_only = true;
    let export = endio_nbd::memory::MemoryExport::new(info, 1 << 20);
    let server = server(export, Limits::default());
    let (near, _session) = serve(&server, 1 << 16);
    let mut conn = Conn::open(near, Mode::Structured).await;
    conn.send(request(cmd::WRITE, 1, 0, 3), b"abc").await;
    assert_eq!(conn.reply(0).await.outcome, Err(Errno::Perm.code()));
    for command in [cmd::TRIM, cmd::WRITE_ZEROES] {
        conn.send(request(command, 1, 0, 3), b"").await;
        assert_eq!(conn.reply(0).await.outcome, Err(Errno::Perm.code()));
    }
}

#[tokio::test]
async fn replies_come_in_the_order_in_which_requests_end() {
    let (export, gate, _) = Gated::new();
    let server = server(export, Limits::default());
    let (near, _session) = serve(&server, 1 << 16);
    let mut conn = Conn::open(near, Mode::Structured).await;
    conn.send(request(cmd::WRITE, 1, 0, 3), b"abc").await;
    conn.send(request(cmd::READ, 2, 0, 3), b"").await;
    assert_eq!(conn.reply(3).await.cookie, 2);
    gate.add_permits(1);
    assert_eq!(conn.reply(0).await.cookie, 1);
}

#[tokio::test]
async fn a_connection_takes_no_more_requests_than_its_limit() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits { requests_max: 4, ..Limits::default() });
    let (near, _session) = serve(&server, 1 << 16);
    let mut conn = Conn::open(near, Mode::Simple).await;
    for cookie in 0..10 {
        conn.send(request(cmd::WRITE, cookie, 0, 1), b"x").await;
    }
    gate.add_permits(1);
    conn.reply(0).await;
    // One has ended, four are under way, and the other five have not begun.
    until(&begun, 5).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(begun.load(Ordering::SeqCst), 5);
    gate.add_permits(100);
    for _ in 1..10 {
        conn.reply(0).await;
    }
    assert_eq!(begun.load(Ordering::SeqCst), 10);
}

#[tokio::test]
async fn a_connection_takes_no_more_bytes_than_its_limit() {
    let (export, gate, begun) = Gated::new();
    let limits = Limits { bytes_max: 100_000, ..Limits::default() };
    let server = server(export, limits);
    let (near, _session) = serve(&server, 1 << 20);
    let mut conn = Conn::open(near, Mode::Simple).await;
    for cookie in 0..4 {
        conn.send(request(cmd::WRITE, cookie, 0, 40_000), &[1; 40_000]).await;
    }
    until(&begun, 2).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(begun.load(Ordering::SeqCst), 2);
    gate.add_permits(4);
    for _ in 0..4 {
        conn.reply(0).await;
    }
    // A request above the limit is served alone.
    gate.add_permits(1);
    conn.send(request(cmd::WRITE, 9, 0, 200_000), &[1; 200_000]).await;
    assert_eq!(conn.reply(0).await.cookie, 9);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_its_replies_is_dropped_and_harms_no_other() {
    let (export, _gate, _) = Gated::new();
    let server = server(export, Limits::default());
    let (near, session) = serve(&server, 1 << 12);
    let mut greedy = Conn::open(near, Mode::Simple).await;
    for cookie in 0..50 {
        greedy.send(request(cmd::READ, cookie, 0, 1 << 20), b"").await;
    }
    let (near, _other) = serve(&server, 1 << 16);
    let mut other = Conn::open(near, Mode::Simple).await;
    other.send(request(cmd::READ, 1, 0, 10), b"").await;
    assert_eq!(other.reply(10).await.outcome, Ok(vec![7; 10]));
    assert!(matches!(ended(session).await, EndReason::Stalled));
    other.send(request(cmd::READ, 2, 0, 10), b"").await;
    assert_eq!(other.reply(10).await.outcome, Ok(vec![7; 10]));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_end_its_handshake_is_dropped() {
    let server = server(memory(), Limits::default());
    let (mut near, session) = serve(&server, 1 << 12);
    near.write_all(&[0, 0, 0, 3]).await.unwrap();
    assert!(matches!(ended(session).await, EndReason::HandshakeTimeout));
}

#[tokio::test]
async fn garbage_ends_the_connection_with_a_reason() {
    let server = server(memory(), Limits::default());
    let (near, session) = serve(&server, 1 << 12);
    let mut conn = Conn::open(near, Mode::Structured).await;
    conn.stream.write_all(&[0x47; 28]).await.unwrap();
    let reason = ended(session).await;
    assert!(matches!(reason, EndReason::Garbage(_)), "{reason}");
    assert!(reason.is_fault());
    let (mut near, session) = serve(&server, 1 << 12);
    near.write_all(b"\0\0\0\x03GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(ended(session).await, EndReason::Handshake(_)));
    let (near, session) = serve(&server, 1 << 12);
    let mut conn = Conn::open(near, Mode::Extended).await;
    let mut endless = request(cmd::WRITE, 1, 0, u64::MAX);
    endless.flags = cmd_flag::PAYLOAD_LEN;
    conn.send(endless, b"").await;
    assert!(matches!(ended(session).await, EndReason::PayloadTooLong(u64::MAX)));
}

#[tokio::test]
async fn left_is_left_no_change_begins_for_a_client_that_hung_up() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits { requests_max: 1, ..Limits::default() });
    let (near, far) = pipe(1 << 16);
    let hang_up = Arc::new(Switch::default());
    let session = {
        let (server, hang_up) = (server.clone(), hang_up.clone());
        tokio::spawn(async move { server.serve(far, somebody(), hang_up).await })
    };
    let mut conn = Conn::open(near, Mode::Simple).await;
    conn.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
    conn.send(request(cmd::WRITE, 2, 0, 1), b"b").await;
    until(&begun, 1).await;
    // The second write waits for the first one's permit when the client leaves.
    hang_up.0.store(true, Ordering::SeqCst);
    gate.add_permits(10);
    assert!(matches!(ended(session).await, EndReason::Closed));
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn left_is_left_bytes_that_a_closed_socket_still_holds_change_nothing() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits { requests_max: 1, ..Limits::default() });
    let listener = NbdListener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let NbdAddr::Tcp(address) = listener.address().clone() else { panic!("not TCP") };
    let accepting = tokio::spawn(listener.serve(server.clone()));
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut conn = Conn::open(stream, Mode::Simple).await;
    conn.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
    conn.send(request(cmd::WRITE, 2, 0, 1), b"b").await;
    until(&begun, 1).await;
    conn.stream.shutdown().await.unwrap();
    gate.add_permits(10);
    // Everything that was to be read has been read when the server closes its end.
    let mut rest = Vec::new();
    conn.stream.read_to_end(&mut rest).await.unwrap();
    server.stop();
    accepting.await.unwrap();
    server.drained().await;
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}

/// A connection of an export under this name whose client closes without the server being told.
async fn attach(
    server: &Server,
) -> (Conn<tokio::io::DuplexStream>, tokio::task::JoinHandle<EndReason>) {
    let (near, session) = serve(server, 1 << 16);
    (Conn::open(near, Mode::Simple).await, session)
}

/// A client that reconnects sends its write again, and a newer one; what its old connection had sent
/// is before both, although nobody ever hears that it was closed.
#[tokio::test]
async fn older_first_what_an_older_connection_had_sent_begins_before_a_newer_one() {
    let (export, gate, _) = Gated::new();
    let order = export.order.clone();
    let server = server(export, Limits { requests_max: 1, ..Limits::default() });
    let (mut old, _still_open) = attach(&server).await;
    for cookie in [1, 2, 3] {
        old.send(request(cmd::WRITE, cookie, cookie, 1), b"a").await;
    }
    let (mut new, _session) = attach(&server).await;
    new.send(request(cmd::WRITE, 4, 4, 1), b"b").await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    // The newer connection waits: the older one has begun one of its three requests.
    assert_eq!(*order.lock().unwrap(), [1]);
    gate.add_permits(4);
    assert_eq!(new.reply(0).await.cookie, 4);
    assert_eq!(*order.lock().unwrap(), [1, 2, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn older_first_a_connection_is_dropped_when_older_ones_do_not_settle() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits { requests_max: 1, ..Limits::default() });
    let (mut old, _still_open) = attach(&server).await;
    old.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
    old.send(request(cmd::WRITE, 2, 0, 1), b"a").await;
    let (_new, session) = attach(&server).await;
    assert!(matches!(ended(session).await, EndReason::Unsettled));
    assert_eq!(begun.load(Ordering::SeqCst), 1);
    // The older one is as good as before.
    gate.add_permits(2);
    assert_eq!((old.reply(0).await.cookie, old.reply(0).await.cookie), (1, 2));
}

#[tokio::test]
async fn older_first_a_single_connection_ends_the_older_one_and_its_unread_requests() {
    let (mut export, gate, begun) = Gated::new();
    export.info.is_single = true;
    let order = export.order.clone();
    let server = server(export, Limits { requests_max: 1, ..Limits::default() });
    let (mut old, replaced) = attach(&server).await;
    old.send(request(cmd::WRITE, 1, 1, 1), b"a").await;
    old.send(request(cmd::WRITE, 2, 2, 1), b"a").await;
    until(&begun, 1).await;
    let (mut new, _session) = attach(&server).await;
    new.send(request(cmd::WRITE, 3, 3, 1), b"b").await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    // What was under way ends first; what was not begun never begins, whatever comes on it later.
    assert_eq!(*order.lock().unwrap(), [1]);
    gate.add_permits(5);
    assert_eq!(new.reply(0).await.cookie, 3);
    assert!(matches!(ended(replaced).await, EndReason::Replaced));
    assert_eq!(*order.lock().unwrap(), [1, 3]);
}

/// The place in the order is that of the arrival: nothing lies between the socket and the export.
#[tokio::test]
async fn older_first_a_request_has_its_place_when_the_next_one_is_read() {
    let (export, gate, _) = Gated::new();
    let order = export.order.clone();
    let server = server(export, Limits::default());
    let (mut conn, _session) = attach(&server).await;
    for cookie in 0..100 {
        conn.send(request(cmd::WRITE, cookie, cookie, 1), b"a").await;
    }
    gate.add_permits(100);
    for _ in 0..100 {
        conn.reply(0).await;
    }
    assert_eq!(*order.lock().unwrap(), (0..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn slot_until_done_a_connection_counts_until_its_last_request_has_ended() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits { connections_max: 1, ..Limits::default() });
    let (near, session) = serve(&server, 1 << 12);
    let mut conn = Conn::open(near, Mode::Simple).await;
    conn.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
    until(&begun, 1).await;
    drop(conn);
    let (_near, second) = serve(&server, 1 << 12);
    assert!(matches!(ended(second).await, EndReason::TooMany));
    gate.add_permits(1);
    ended(session).await;
    let (near, _third) = serve(&server, 1 << 12);
    Conn::open(near, Mode::Simple).await;
}

/// What a client still hears on its connection.
async fn rest<S: AsyncReadExt + Unpin>(stream: &mut S) -> Vec<u8> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    rest
}

#[tokio::test]
async fn stop_is_no_error_what_runs_is_answered_and_what_comes_is_not() {
    let (export, gate, begun) = Gated::new();
    let server = server(export, Limits::default());
    let (near, session) = serve(&server, 1 << 12);
    let mut conn = Conn::open(near, Mode::Structured).await;
    conn.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
    until(&begun, 1).await;
    server.stop();
    conn.send(request(cmd::WRITE, 2, 0, 1), b"b").await;
    conn.send(request(cmd::READ, 3, 0, 1), b"").await;
    gate.add_permits(2);
    let done = conn.reply(0).await;
    assert_eq!((done.cookie, done.outcome), (1, Ok(vec![])));
    assert_eq!(rest(&mut conn.stream).await, b"", "the connection ends without another answer");
    assert!(matches!(ended(session).await, EndReason::Stopped));
    assert_eq!(begun.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn stop_is_no_error_what_a_stopping_export_has_not_done_is_not_answered() {
    for mode in MODES {
        let (export, gate, begun) = Gated::new();
        let server = server(export, Limits::default());
        let (near, session) = serve(&server, 1 << 12);
        let mut conn = Conn::open(near, mode).await;
        conn.send(request(cmd::WRITE, 1, 0, 1), b"a").await;
        conn.send(request(cmd::WRITE, 2, 0, 1), b"b").await;
        until(&begun, 2).await;
        gate.add_permits(1);
        assert_eq!(conn.reply(0).await.outcome, Ok(vec![]));
        gate.close();
        assert_eq!(rest(&mut conn.stream).await, b"");
        assert!(matches!(ended(session).await, EndReason::Stopped));
    }
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_client_that_has_not_shaken_hands() {
    let server = server(memory(), Limits::default());
    let (mut near, session) = serve(&server, 1 << 12);
    near.read_exact(&mut [0; 18]).await.unwrap();
    server.stop();
    assert!(matches!(ended(session).await, EndReason::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_stop_closes_the_connection_of_a_client_that_stays() {
    let server = server(memory(), Limits::default());
    let (near, session) = serve(&server, 1 << 12);
    let _conn = Conn::open(near, Mode::Structured).await;
    server.stop();
    assert!(matches!(ended(session).await, EndReason::Stopped));
}

#[tokio::test]
async fn a_unix_socket_of_a_dead_server_is_replaced_and_one_in_use_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let address = NbdAddr::Unix(path.clone());
    // Dropped without serving, as a killed process does: the socket stays behind.
    drop(NbdListener::bind(&address).await.unwrap());
    assert!(path.exists());
    let listener = NbdListener::bind(&address).await.unwrap();
    assert!(NbdListener::bind(&address).await.is_err());
    let server = server(memory(), Limits::default());
    let accepting = tokio::spawn(listener.serve(server.clone()));
    let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    let mut conn = Conn::open(stream, Mode::Simple).await;
    conn.send(request(cmd::FLUSH, 1, 0, 0), b"").await;
    assert_eq!(conn.reply(0).await.outcome, Ok(vec![]));
    drop(conn);
    server.stop();
    accepting.await.unwrap();
    server.drained().await;
    assert!(!path.exists());
    // A file that is no socket is left alone.
    std::fs::write(&path, b"data").unwrap();
    assert!(NbdListener::bind(&address).await.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn an_address_reads_back_and_has_an_uri() {
    for text in ["127.0.0.1:10809", "[::1]:1", "unix:/run/a b.sock"] {
        assert_eq!(text.parse::<NbdAddr>().unwrap().to_string(), text);
    }
    assert!("unix:".parse::<NbdAddr>().is_err());
    assert!("localhost".parse::<NbdAddr>().is_err());
    let unix: NbdAddr = "unix:/run/a b.sock".parse().unwrap();
    assert_eq!(unix.uri("v 1"), "nbd+unix:///v%201?socket=/run/a%20b.sock");
}

/// What a client does in the model test.
#[derive(Debug, Clone)]
enum Act {
    Read(u64, u64),
    Write(u64, Vec<u8>),
    Zero(u64, u64, bool),
    Trim(u64, u64),
    Flush,
}

/// Bytes of the export of the model test.
const MODEL_BYTES: u64 = 20_000;

fn act() -> impl Strategy<Value = Act> {
    // Some ranges end behind the export.
    let range = || (0..MODEL_BYTES + 100, 1_u64..9_000);
    prop_oneof![
        range().prop_map(|(offset, length)| Act::Read(offset, length)),
        (0..MODEL_BYTES + 100, prop::collection::vec(1_u8.., 1..9_000))
            .prop_map(|(offset, data)| Act::Write(offset, data)),
        (range(), any::<bool>())
            .prop_map(|((offset, length), no_hole)| { Act::Zero(offset, length, no_hole) }),
        range().prop_map(|(offset, length)| Act::Trim(offset, length)),
        Just(Act::Flush),
    ]
}

/// The bytes that the export should have, and the answer that it should give.
fn model(bytes: &mut [u8], act: &Act) -> Result<Vec<u8>, u32> {
    let range = |offset: u64, length: u64, errno: Errno| {
        let range = offset as usize..(offset + length) as usize;
        if range.end > MODEL_BYTES as usize { Err(errno.code()) } else { Ok(range) }
    };
    match act {
        Act::Read(offset, length) => {
            let range = range(*offset, *length, Errno::Inval)?;
            return Ok(bytes[range].to_vec());
        }
        Act::Write(offset, data) => {
            let range = range(*offset, data.len() as u64, Errno::NoSpc)?;
            bytes[range].copy_from_slice(data);
        }
        Act::Zero(offset, length, _) => bytes[range(*offset, *length, Errno::NoSpc)?].fill(0),
        Act::Trim(offset, length) => bytes[range(*offset, *length, Errno::Inval)?].fill(0),
        Act::Flush => {}
    }
    Ok(Vec::new())
}

/// Does it over the wire. Data of reads is put where its offset says, so reads begin at zero there.
async fn perform(conn: &mut Conn<tokio::io::DuplexStream>, act: &Act) -> Result<Vec<u8>, u32> {
    let extended = conn.mode == Mode::Extended;
    match act {
        Act::Read(offset, length) => {
            conn.send(request(cmd::READ, 1, *offset, *length), b"").await;
            return conn.reply_at(*offset, *length as usize).await.outcome;
        }
        Act::Write(offset, data) => {
            let mut write = request(cmd::WRITE, 1, *offset, data.len() as u64);
            write.flags = if extended { cmd_flag::PAYLOAD_LEN } else { 0 };
            conn.send(write, data).await;
        }
        Act::Zero(offset, length, no_hole) => {
            let mut zero = request(cmd::WRITE_ZEROES, 1, *offset, *length);
            zero.flags = if *no_hole { cmd_flag::NO_HOLE } else { 0 };
            conn.send(zero, b"").await;
        }
        Act::Trim(offset, length) => {
            conn.send(request(cmd::TRIM, 1, *offset, *length), b"").await;
        }
        Act::Flush => conn.send(request(cmd::FLUSH, 1, 0, 0), b"").await,
    }
    conn.reply(0).await.outcome
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_session_answers_as_an_array_of_bytes_would(
        mode in prop::sample::select(&MODES[..]), acts in prop::collection::vec(act(), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let info = ExportInfo::new("disk", MODEL_BYTES);
            let export = endio_nbd::memory::MemoryExport::new(info, 1 << 20);
            let (near, session) = serve(&server(export, Limits::default()), 1 << 16);
            let mut conn = Conn::open(near, mode).await;
            let mut bytes = vec![0; MODEL_BYTES as usize];
            for act in &acts {
                let expected = model(&mut bytes, act);
                prop_assert_eq!(perform(&mut conn, act).await, expected, "{:?}", act);
            }
            conn.send(request(cmd::DISC, 1, 0, 0), b"").await;
            prop_assert!(matches!(ended(session).await, EndReason::Disconnected));
            Ok(())
        })?;
    }
}
