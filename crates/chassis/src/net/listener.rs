//! The listening side, and the process-wide table of memory listeners.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use tokio::io::DuplexStream;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::conn::Conn;
use super::gate::{ConnCounters, ConnLimits, Gate};
use super::{ListenAddr, NetError};
use crate::tls::Tls;

/// Connections to a memory name that wait to be accepted; more are refused, as by a full backlog.
const MEMORY_BACKLOG: usize = 64;
/// Bytes in flight per direction of a memory connection: one full-size message with its frames.
const MEMORY_PIPE_BYTES: usize = 1 << 20;
/// Pause after a failed accept (out of file descriptors), so that it is not tried in a hot loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static MEMORY: Mutex<BTreeMap<String, mpsc::Sender<DuplexStream>>> = Mutex::new(BTreeMap::new());

fn memory_names() -> MutexGuard<'static, BTreeMap<String, mpsc::Sender<DuplexStream>>> {
    // The table is valid after every single statement, so a panic elsewhere cannot have torn it.
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connects to a memory name; refused if nobody listens or the backlog is full.
pub(super) fn dial_memory(name: &str) -> io::Result<Conn> {
    let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
    let sender = memory_names().get(name).cloned().ok_or_else(refused)?;
    let (near, far) = tokio::io::duplex(MEMORY_PIPE_BYTES);
    sender.try_send(far).map_err(|_| refused())?;
    Ok(Conn::memory(near))
}

/// A bound address that has not been served yet. Dropping it frees the address.
#[derive(Debug)]
pub struct Listener {
    inner: Inner,
    url: String,
    tls: Option<Tls>,
}

#[derive(Debug)]
enum Inner {
    Tcp(TcpListener),
    Unix(UnixListener),
    Memory(MemoryListener),
    Foreign(Accepted),
}

/// Connections that somebody else accepts.
struct Accepted(BoxStream<'static, io::Result<Conn>>);

impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Accepted")
    }
}

#[derive(Debug)]
struct MemoryListener {
    name: String,
    queue: mpsc::Receiver<DuplexStream>,
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        memory_names().remove(&self.name);
    }
}

impl Listener {
    /// Binds the address; connections queue up from now on.
    ///
    /// A Unix socket file that nobody listens on any more is removed first; any other file at its
    /// path is left alone. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The address is taken, not permitted, or cannot be resolved.
    pub async fn bind(addr: &ListenAddr) -> Result<Self, NetError> {
        let failed = |source| NetError::Bind { addr: addr.clone(), source };
        match addr {
            ListenAddr::Tcp(host_port) => {
                let listener = TcpListener::bind(host_port).await.map_err(failed)?;
                let url = format!("http://{}", listener.local_addr().map_err(failed)?);
                Ok(Self { inner: Inner::Tcp(listener), url, tls: None })
            }
            ListenAddr::Unix(path) => {
                remove_dead_socket(addr, path).await?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                Ok(Self { inner: Inner::Unix(listener), url: addr.to_string(), tls: None })
            }
            ListenAddr::Memory(name) => {
                let mut names = memory_names();
                if names.contains_key(name) {
                    return Err(failed(io::ErrorKind::AddrInUse.into()));
                }
                let (sender, queue) = mpsc::channel(MEMORY_BACKLOG);
                names.insert(name.clone(), sender);
                let inner = Inner::Memory(MemoryListener { name: name.clone(), queue });
                Ok(Self { inner, url: addr.to_string(), tls: None })
            }
        }
    }

    /// A listener of a transport of the caller's own: peers reach it at `url`, and it serves the
    /// connections of `accepted` until that ends. See [`super::Transport`].
    #[must_use]
    pub fn foreign(url: String, accepted: BoxStream<'static, io::Result<Conn>>) -> Self {
        Self { inner: Inner::Foreign(Accepted(accepted)), url, tls: None }
    }

    /// The same with mutual TLS, if it listens on TCP: what is not TLS is refused, and so is a peer
    /// without a certificate of the authorities. Peers in this process need none.
    #[must_use]
    pub fn secured(mut self, tls: Tls) -> Self {
        if matches!(self.inner, Inner::Tcp(_)) {
            self.url = self.url.replacen("http://", "https://", 1);
            self.tls = Some(tls);
        }
        self
    }

    /// Whether only this machine can reach it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match &self.inner {
            Inner::Tcp(listener) => listener.local_addr().is_ok_and(|addr| addr.ip().is_loopback()),
            Inner::Unix(_) | Inner::Memory(_) | Inner::Foreign(_) => true,
        }
    }

    /// What a [`super::Dialer`] needs to reach this listener: `http://127.0.0.1:PORT` (`https://`
    /// with TLS) with the actual port, `unix:/path` or `memory:name`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    async fn accept(&mut self) -> Option<io::Result<Conn>> {
        match &mut self.inner {
            Inner::Tcp(listener) => Some(listener.accept().await.map(|(s, _)| Conn::tcp(s))),
            Inner::Unix(listener) => Some(listener.accept().await.map(|(s, _)| Conn::unix(s))),
            Inner::Memory(listener) => Some(Ok(Conn::memory(listener.queue.recv().await?))),
            Inner::Foreign(Accepted(conns)) => conns.next().await,
        }
    }

    async fn next_conn(mut self) -> Option<((Conn, Option<Tls>), Self)> {
        loop {
            match self.accept().await? {
                Ok(conn) => return Some(((conn, self.tls.clone()), self)),
                Err(error) => {
                    tracing::warn!(%error, url = %self.url, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn remove_dead_socket(addr: &ListenAddr, path: &Path) -> Result<(), NetError> {
    let failed = |source| NetError::Bind { addr: addr.clone(), source };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(NetError::PathTaken { addr: addr.clone(), is_live: false });
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(NetError::PathTaken { addr: addr.clone(), is_live: true }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// One or several listeners that are served together.
pub struct Incoming {
    conns: SelectAll<BoxStream<'static, (Conn, Option<Tls>)>>,
    urls: Vec<String>,
}

impl Incoming {
    /// Merges listeners; none gives a stream that ends at once.
    #[must_use]
    pub fn new(listeners: impl IntoIterator<Item = Listener>) -> Self {
        let mut incoming = Self { conns: SelectAll::new(), urls: Vec::new() };
        for listener in listeners {
            incoming.urls.push(listener.url.clone());
            incoming.conns.push(stream::unfold(listener, Listener::next_conn).boxed());
        }
        incoming
    }

    /// The connections that a server serves: within the limits, secured where their listener is,
    /// and ended when `cut` is cancelled. It never yields an error: what fails is counted, logged
    /// and left out.
    pub(crate) fn guarded(
        self,
        limits: ConnLimits,
        counters: ConnCounters,
        cut: CancellationToken,
    ) -> BoxStream<'static, io::Result<Conn>> {
        let (handshake, handshakes_max) = (limits.handshake, limits.handshakes_max);
        let gate = Arc::new(Gate::new(limits, counters));
        self.conns
            .filter_map(move |(conn, tls)| std::future::ready(gate.admit(conn, tls)))
            .map(|admitted| admitted.ready())
            .buffer_unordered(handshakes_max)
            .filter_map(std::future::ready)
            .map(move |conn| Ok(conn.guarded(cut.clone(), handshake)))
            .boxed()
    }

    /// The urls of the merged listeners, in the order given.
    #[must_use]
    pub fn urls(&self) -> &[String] {
        &self.urls
    }
}

/// Without limits, for tests of peers; what needs TLS is closed. [`crate::server::serve`] serves all.
impl stream::Stream for Incoming {
    type Item = io::Result<Conn>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match std::task::ready!(self.conns.poll_next_unpin(cx)) {
                Some((conn, None)) => return Poll::Ready(Some(Ok(conn))),
                Some((_, Some(_))) => {}
                None => return Poll::Ready(None),
            }
        }
    }
}

impl From<Listener> for Incoming {
    fn from(listener: Listener) -> Self {
        Self::new([listener])
    }
}
