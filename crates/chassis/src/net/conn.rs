//! One connection, whatever it runs over.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;
use tokio_rustls::TlsStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::gate::Place;
use crate::tls::uri_names;

/// A byte stream of a transport that this crate does not know.
pub trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A byte stream over TCP, TLS, a Unix socket, memory or a transport of the caller's own.
pub struct Conn {
    inner: Inner,
    guard: Option<Guard>,
    /// Its place among the connections of the server.
    place: Option<Place>,
}

/// Bytes of the preface that opens an HTTP/2 connection (RFC 9113, section 3.4).
const PREFACE_BYTES: usize = 24;

/// Ends a connection from outside, or because its peer stays silent.
struct Guard {
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Runs until the preface was read.
    handshake: Option<Pin<Box<Sleep>>>,
    bytes_read: usize,
}

impl Guard {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
        }
        let silent = self.handshake.as_mut().map(|handshake| handshake.as_mut().poll(cx));
        match silent {
            Some(Poll::Ready(())) => Poll::Ready(io::ErrorKind::TimedOut.into()),
            _ => Poll::Pending,
        }
    }

    fn note_read(&mut self, bytes: usize) {
        if self.handshake.is_some() {
            self.bytes_read += bytes;
            if self.bytes_read >= PREFACE_BYTES {
                self.handshake = None;
            }
        }
    }
}

enum Inner {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
    Memory(DuplexStream),
    Foreign(Box<dyn Bytes>, Option<SocketAddr>),
}

/// Who is at the other end; tonic puts it into the extensions of each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer without TLS; `None` if it was gone before it could be asked.
    Tcp(Option<SocketAddr>),
    /// A TCP peer whose certificate was verified.
    Tls {
        /// Its address; `None` if it was gone before it could be asked.
        addr: Option<SocketAddr>,
        /// The URIs in its certificate.
        names: Arc<[String]>,
    },
    /// A process on this machine.
    Unix,
    /// This process.
    Memory,
}

impl Conn {
    fn new(inner: Inner) -> Self {
        Self { inner, guard: None, place: None }
    }

    pub(super) fn tls(stream: TlsStream<TcpStream>) -> Self {
        Self::new(Inner::Tls(Box::new(stream)))
    }

    /// The stream under it, for TLS; `None` if it is no TCP connection.
    pub(super) fn into_tcp(self) -> Option<TcpStream> {
        match self.inner {
            Inner::Tcp(stream) => Some(stream),
            _ => None,
        }
    }

    pub(super) fn with_place(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// URIs in the certificate of the other end; none without TLS.
    pub(super) fn names(&self) -> Vec<String> {
        match &self.inner {
            Inner::Tls(stream) => {
                let chain = stream.get_ref().1.peer_certificates();
                chain.and_then(|chain| chain.first()).map(|own| uri_names(own)).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn guarded(mut self, cut: CancellationToken, handshake: Duration) -> Self {
        self.guard = Some(Guard {
            cut: Box::pin(cut.cancelled_owned()),
            handshake: Some(Box::pin(tokio::time::sleep(handshake))),
            bytes_read: 0,
        });
        self
    }

    pub(super) fn tcp(stream: TcpStream) -> Self {
        // Without it small frames wait for the acknowledgement of earlier ones. It only fails on
        // a socket that is closed already, and then the next read says so.
        let _ = stream.set_nodelay(true);
        Self::new(Inner::Tcp(stream))
    }

    pub(super) fn unix(stream: UnixStream) -> Self {
        Self::new(Inner::Unix(stream))
    }

    pub(super) fn memory(stream: DuplexStream) -> Self {
        Self::new(Inner::Memory(stream))
    }

    /// A connection of a [`super::Transport`]. To the server it is TCP without TLS, from `peer`.
    pub fn foreign(stream: impl Bytes + 'static, peer: Option<SocketAddr>) -> Self {
        Self::new(Inner::Foreign(Box::new(stream), peer))
    }
}

impl Connected for Conn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match &self.inner {
            Inner::Tcp(stream) => Peer::Tcp(stream.peer_addr().ok()),
            Inner::Tls(stream) => {
                Peer::Tls { addr: stream.get_ref().0.peer_addr().ok(), names: self.names().into() }
            }
            Inner::Unix(_) => Peer::Unix,
            Inner::Memory(_) => Peer::Memory,
            Inner::Foreign(_, peer) => Peer::Tcp(*peer),
        }
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(guard) = &mut this.guard
            && let Poll::Ready(error) = guard.poll_end(cx)
        {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        let result = match &mut this.inner {
            Inner::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Memory(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Foreign(stream, _) => Pin::new(stream).poll_read(cx, buf),
        };
        if let Some(guard) = &mut this.guard {
            guard.note_read(buf.filled().len() - before);
        }
        result
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.inner {
            Inner::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Inner::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Inner::Memory(stream) => Pin::new(stream).poll_write(cx, buf),
            Inner::Foreign(stream, _) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.inner {
            Inner::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Inner::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Inner::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Inner::Memory(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Inner::Foreign(stream, _) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Tcp(stream) => stream.is_write_vectored(),
            Inner::Tls(stream) => stream.is_write_vectored(),
            Inner::Unix(stream) => stream.is_write_vectored(),
            Inner::Memory(stream) => stream.is_write_vectored(),
            Inner::Foreign(stream, _) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Inner::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Memory(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Foreign(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Inner::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Memory(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Foreign(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
