//! A client of its own for tests: it can do what no honest client does.
#![allow(clippy::unwrap_used, dead_code)]

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use endio_nbd::codec::{Mode, ReplyHeader, Request};
use endio_nbd::consts::{OPTION_MAGIC, chunk, opt};
use endio_nbd::memory::{FixedExports, MemoryExport};
use endio_nbd::{Client, Export, ExportInfo, Exports, Limits, Server};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

/// A server of one export.
pub(crate) fn server(export: impl Export, limits: Limits) -> Server {
    let exports: Arc<dyn Exports> = Arc::new(FixedExports::new([Arc::new(export) as _]));
    Server::new(exports, limits)
}

/// One mebibyte of memory.
pub(crate) fn memory() -> MemoryExport {
    MemoryExport::new(ExportInfo::new("disk", 1 << 20), 1 << 20)
}

/// Who the tests are.
pub(crate) fn somebody() -> Client {
    Client { address: "test".to_owned(), ..Client::default() }
}

/// One end of a connection in the transmission phase.
pub(crate) struct Conn<S> {
    pub(crate) stream: S,
    pub(crate) mode: Mode,
}

/// A whole reply: error number or the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) outcome: Result<Vec<u8>, u32>,
}

fn option(number: u32, data: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64(OPTION_MAGIC);
    out.put_u32(number);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out.freeze()
}

impl<S: AsyncRead + AsyncWrite + Unpin> Conn<S> {
    /// Shakes hands and opens `disk`.
    pub(crate) async fn open(mut stream: S, mode: Mode) -> Self {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        stream.write_all(&[0, 0, 0, 3]).await.unwrap();
        let form = match mode {
            Mode::Simple => None,
            Mode::Structured => Some(opt::STRUCTURED_REPLY),
            Mode::Extended => Some(opt::EXTENDED_HEADERS),
        };
        if let Some(form) = form {
            stream.write_all(&option(form, b"")).await.unwrap();
            stream.read_exact(&mut [0; 20]).await.unwrap();
        }
        stream.write_all(&option(opt::EXPORT_NAME, b"disk")).await.unwrap();
        stream.read_exact(&mut [0; 10]).await.unwrap();
        Self { stream, mode }
    }

    pub(crate) async fn send(&mut self, request: Request, payload: &[u8]) {
        let mut wire = BytesMut::new();
        request.encode(self.mode, &mut wire);
        wire.put_slice(payload);
        self.stream.write_all(&wire).await.unwrap();
    }

    /// The next reply, to a read from offset zero or to something without data.
    pub(crate) async fn reply(&mut self, read_length: usize) -> Reply {
        self.reply_at(0, read_length).await
    }

    /// The next reply, its chunks put together; holes are zeroes.
    pub(crate) async fn reply_at(&mut self, offset: u64, read_length: usize) -> Reply {
        let mut data = vec![0; read_length];
        loop {
            let mut header = vec![0; self.mode.reply_len()];
            self.stream.read_exact(&mut header).await.unwrap();
            match ReplyHeader::decode(self.mode, &header).unwrap().0 {
                ReplyHeader::Simple { error: 0, cookie } => {
                    self.stream.read_exact(&mut data).await.unwrap();
                    return Reply { cookie, outcome: Ok(data) };
                }
                ReplyHeader::Simple { error, cookie } => {
                    return Reply { cookie, outcome: Err(error) };
                }
                ReplyHeader::Chunk { flags, kind, cookie, length, .. } => {
                    let mut payload = vec![0; length as usize];
                    self.stream.read_exact(&mut payload).await.unwrap();
                    if kind == chunk::ERROR {
                        let code = u32::from_be_bytes(payload[..4].try_into().unwrap());
                        return Reply { cookie, outcome: Err(code) };
                    }
                    if kind == chunk::OFFSET_DATA {
                        let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
                        let at = (at - offset) as usize;
                        data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                    }
                    if flags & chunk::DONE != 0 {
                        return Reply { cookie, outcome: Ok(data) };
                    }
                }
            }
        }
    }
}

/// A connection in memory of this many bytes each way.
pub(crate) fn pipe(bytes: usize) -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(bytes)
}

pub(crate) fn request(command: u16, cookie: u64, offset: u64, length: u64) -> Request {
    Request { flags: 0, command, cookie, offset, length }
}
