//! Targets of NBD: handshake, codec, and whole sessions with a client that sends anything.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use endio_nbd::codec::{Mode, ReplyHeader, Request, StatusPayload};
use endio_nbd::consts::OPTION_REPLY_MAGIC;
use endio_nbd::handshake::{Action, Handshake};
use endio_nbd::memory::{FixedExports, MemoryExport};
use endio_nbd::session::CannotTell;
use endio_nbd::{Client, ExportInfo, Exports, Limits, Listed, OpenError, Server, TlsPolicy};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::input::Input;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn info(name: &str) -> Result<ExportInfo, OpenError> {
    match name {
        "" | "disk" => {
            let mut info = ExportInfo::new("disk", 1 << 20);
            info.contexts = vec!["endio:state".to_owned()];
            Ok(info)
        }
        "locked" => Err(OpenError::Denied("no".to_owned())),
        "away" => Err(OpenError::Unavailable("later".to_owned())),
        _ => Err(OpenError::Unknown),
    }
}

/// Every reply to an option is whole, and a client in the clear hears nothing where TLS is required.
pub(crate) fn handshake(bytes: &[u8]) {
    let mut input = Input(bytes);
    let policy = [TlsPolicy::Off, TlsPolicy::Optional, TlsPolicy::Required];
    let policy = policy[usize::from(input.u8()) % 3];
    let step = usize::from(input.u8()).max(1);
    let mut is_secret = false;
    let mut handshake = Handshake::new(policy);
    let mut pieces = input.0.chunks(step);
    let mut buffer = BytesMut::new();
    loop {
        let Ok(mut action) = handshake.advance(&mut buffer) else { return };
        let may_tell = policy != TlsPolicy::Required || is_secret;
        if action == Action::List {
            assert!(may_tell, "exports are listed before TLS");
            let listed = Listed { name: "disk".to_owned(), description: String::new() };
            action = handshake.listed(Ok(vec![listed])).unwrap();
        } else if let Action::Open(name, _) = &action {
            assert!(may_tell, "an export is opened before TLS");
            action = handshake.opened(info(name)).unwrap();
        }
        match action {
            Action::More => match pieces.next() {
                Some(piece) => buffer.extend_from_slice(piece),
                None => return,
            },
            Action::Send(reply) => are_replies(reply),
            Action::StartTls(reply) => {
                are_replies(reply);
                handshake.tls_started();
                is_secret = true;
            }
            Action::Begin(..) => {
                assert!(may_tell, "the transmission begins before TLS");
                return;
            }
            Action::Close(..) => return,
            Action::List | Action::Open(..) => panic!("a question answered with a question"),
        }
    }
}

fn are_replies(mut reply: Bytes) {
    while !reply.is_empty() {
        assert_eq!(reply.get_u64(), OPTION_REPLY_MAGIC);
        reply.advance(8);
        let length = reply.get_u32() as usize;
        reply.advance(length);
    }
}

/// What is decoded is encoded to the same bytes.
pub(crate) fn codec(bytes: &[u8]) {
    for mode in MODES {
        if let Ok(request) = Request::decode(mode, bytes) {
            let mut again = BytesMut::new();
            request.encode(mode, &mut again);
            assert_eq!(again[..], bytes[..mode.request_len()]);
            let _ = request.payload_len(mode);
        }
        let _ = ReplyHeader::decode(mode, bytes);
    }
    if let Some(payload) = StatusPayload::decode(bytes) {
        let mut again = BytesMut::new();
        payload.encode(&mut again);
        assert_eq!(again[..], *bytes);
    }
    let _ = endio_nbd::tls::common_name(bytes);
}

/// Runs one future to its end; a timeout of its own passes at once when nothing else can.
fn block_on<F: Future>(future: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap().block_on(future)
}

/// Whatever a client sends, the session ends when it hangs up.
pub(crate) fn session(bytes: &[u8]) {
    block_on(async {
        let export = MemoryExport::new(ExportInfo::new("disk", 1 << 20), 1 << 20);
        let exports: Arc<dyn Exports> = Arc::new(FixedExports::new([Arc::new(export) as _]));
        let limits = Limits { bytes_max: 1 << 20, requests_max: 8, ..Limits::default() };
        let server = Server::new(exports, limits);
        let (near, far) = tokio::io::duplex(4096);
        let (mut read, mut write) = tokio::io::split(near);
        let hang_up = Arc::new(CannotTell);
        let served =
            tokio::spawn(async move { server.serve(far, Client::default(), hang_up).await });
        let sent = bytes.to_vec();
        let sending = tokio::spawn(async move {
            // The server may have closed before everything was sent.
            let _ = write.write_all(&sent).await;
            let _ = write.shutdown().await;
        });
        let mut replies = Vec::new();
        let _ = read.read_to_end(&mut replies).await;
        let ended = tokio::time::timeout(Duration::from_secs(3600), served).await;
        ended.expect("the session ends").expect("the session does not panic");
        sending.await.unwrap();
    });
}
