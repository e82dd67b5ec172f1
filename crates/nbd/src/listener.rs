//! Where clients connect: TCP and Unix sockets.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use tokio::net::{TcpListener, UnixListener};

use crate::export::Client;
use crate::session::{HangUp, Server};

/// Address of a listener: `127.0.0.1:10809` or `unix:/run/endio/nbd.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddr {
    /// Port 0 lets the system choose.
    Tcp(SocketAddr),
    /// Path of a socket.
    Unix(PathBuf),
}

/// A string that is no address of a listener.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected IP:PORT or unix:PATH")]
pub struct AddrError;

impl FromStr for NbdAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        match text.strip_prefix("unix:") {
            Some("") => Err(AddrError),
            Some(path) => Ok(NbdAddr::Unix(path.into())),
            None => text.parse().map(NbdAddr::Tcp).map_err(|_| AddrError),
        }
    }
}

impl fmt::Display for NbdAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddr::Tcp(address) => write!(f, "{address}"),
            NbdAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl NbdAddr {
    /// The NBD URI of an export behind this address, as libnbd and QEMU take it.
    pub fn uri(&self, export: &str) -> String {
        let export = escape(export);
        match self {
            NbdAddr::Tcp(address) => format!("nbd://{address}/{export}"),
            NbdAddr::Unix(path) => {
                let path = escape(&path.to_string_lossy());
                format!("nbd+unix:///{export}?socket={path}")
            }
        }
    }
}

/// Percent-encodes what an URI does not take as it is (RFC 3986, section 2.3; `/` stays).
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Why a listener does not come up.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process serves this socket.
    #[error("{0} is in use")]
    InUse(NbdAddr),
    /// The system refused.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where.
        address: NbdAddr,
        /// What the system said.
        source: io::Error,
    },
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A bound socket.
pub struct NbdListener {
    socket: Socket,
    address: NbdAddr,
}

/// Pause after a failed accept: without file descriptors it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl NbdListener {
    /// Binds the socket. A Unix socket that a dead process left behind is replaced, so that a
    /// server that was killed comes back at the same address.
    ///
    /// # Errors
    /// [`ListenError`] if the address is taken or not allowed.
    pub async fn bind(address: &NbdAddr) -> Result<Self, ListenError> {
        let fault = |source| ListenError::Bind { address: address.clone(), source };
        match address {
            NbdAddr::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).await.map_err(fault)?;
                let address = NbdAddr::Tcp(listener.local_addr().map_err(fault)?);
                Ok(Self { socket: Socket::Tcp(listener), address })
            }
            NbdAddr::Unix(path) => {
                if path.exists() {
                    if tokio::net::UnixStream::connect(path).await.is_ok() {
                        return Err(ListenError::InUse(address.clone()));
                    }
                    remove_socket(path).map_err(fault)?;
                }
                let listener = UnixListener::bind(path).map_err(fault)?;
                let socket = Socket::Unix(listener, path.clone());
                Ok(Self { socket, address: address.clone() })
            }
        }
    }

    /// Where it listens, with the port that the system chose.
    pub fn address(&self) -> &NbdAddr {
        &self.address
    }

    /// Accepts connections until the server stops; sessions that run then end by themselves.
    pub async fn serve(self, server: Server) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = server.stopping() => break,
                accepted = self.accept(&server) => accepted,
            };
            if let Err(error) = accepted {
                tracing::warn!(address = %self.address, %error, "nbd connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        if let Socket::Unix(_, path) = &self.socket {
            // The next start replaces a socket that could not be removed.
            let _ = remove_socket(path);
        }
    }

    async fn accept(&self, server: &Server) -> io::Result<()> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
                let hang_up = Arc::new(PolledHangUp(stream.as_fd().try_clone_to_owned()?));
                server.spawn(stream, client(peer.to_string()), hang_up);
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let hang_up = Arc::new(PolledHangUp(stream.as_fd().try_clone_to_owned()?));
                server.spawn(stream, client("unix".to_owned()), hang_up);
            }
        }
        Ok(())
    }
}

fn client(address: String) -> Client {
    Client { address, ..Client::default() }
}

/// Removes a socket, and nothing that is not one.
fn remove_socket(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    if std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return std::fs::remove_file(path);
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is no socket"))
}

/// A peer that vanished without a word is noticed after about two minutes.
fn keep_alive(stream: &tokio::net::TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(())
}

/// Asks the system whether the other side closed its end: `POLLRDHUP` is told although bytes that
/// came before are still unread.
struct PolledHangUp(OwnedFd);

impl HangUp for PolledHangUp {
    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        match poll(&mut fds, Some(&now)) {
            Ok(_) => fds[0].revents().intersects(gone),
            // Interrupted: the next request asks again.
            Err(_) => false,
        }
    }

    fn has_unread(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // Interrupted: whoever asks, asks again.
        poll(&mut fds, Some(&now)).is_err() || fds[0].revents().contains(PollFlags::IN)
    }
}
