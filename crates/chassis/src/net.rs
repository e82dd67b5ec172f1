//! Listeners and connectors over TCP, Unix sockets and process memory, behind one address syntax.
//!
//! A service is given its [`Listener`] and its [`Dialer`]; it cannot tell which of the three it
//! runs over, or whether a test gave it a network of its own ([`Transport`], [`Listener::foreign`]).

mod conn;
mod dialer;
mod gate;
mod listener;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

pub use conn::{Bytes, Conn, Peer};
pub use dialer::{Dialer, DialerConfig, Transport};
pub use gate::ConnCounters;
pub(crate) use gate::ConnLimits;
pub use listener::{Incoming, Listener};

use serde::{Deserialize, Serialize};

/// Largest HTTP/2 frame that either side takes, in bytes. The protocol's default of 16 KiB cuts a
/// 1 MiB message into 64 frames; much larger ones delay pings and other streams.
pub(crate) const FRAME_BYTES_MAX: u32 = 256 << 10;

/// Smallest window that a configuration may name, in bytes: HTTP/2 itself begins with it.
pub(crate) const WINDOW_BYTES_MIN: u64 = 65_535;
/// Largest one: HTTP/2 has no larger windows.
pub(crate) const WINDOW_BYTES_MAX: u64 = (1 << 31) - 1;

/// Where to listen: `host:port`, `unix:/path` or `memory:name`.
///
/// A `host` other than a literal address is resolved when the listener is bound. Port 0 lets the
/// system choose; [`Listener::url`] tells the choice.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ListenAddr {
    /// A TCP socket, as `host:port`.
    Tcp(String),
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A name in this process only, for services that are composed in one process.
    Memory(String),
}

impl ListenAddr {
    /// Loopback with a port that the system chooses.
    #[must_use]
    pub fn loopback() -> Self {
        Self::Tcp("127.0.0.1:0".to_owned())
    }
}

impl FromStr for ListenAddr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let bad = || NetError::Address { text: text.to_owned() };
        if let Some(path) = text.strip_prefix("unix:") {
            // A host name `unix` with a port would look the same; an absolute path cannot.
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(bad()) };
        }
        if let Some(name) = text.strip_prefix("memory:") {
            return if name.is_empty() { Err(bad()) } else { Ok(Self::Memory(name.to_owned())) };
        }
        if text.parse::<SocketAddr>().is_ok() {
            return Ok(Self::Tcp(text.to_owned()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let is_host = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
        if host.is_empty() || !host.chars().all(is_host) || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(Self::Tcp(text.to_owned()))
    }
}

impl TryFrom<String> for ListenAddr {
    type Error = NetError;

    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<ListenAddr> for String {
    fn from(addr: ListenAddr) -> Self {
        addr.to_string()
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => f.write_str(host_port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Memory(name) => write!(f, "memory:{name}"),
        }
    }
}

/// Why an address could not be understood, bound or dialed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// Not one of the forms of [`ListenAddr`].
    #[error("`{text}` is no address: use host:port, unix:/absolute/path or memory:name")]
    Address {
        /// What was given.
        text: String,
    },
    /// Not one of the forms that [`Dialer::channel`] takes.
    #[error(
        "`{url}` is no url: use http://host:port, https://host:port, unix:/absolute/path or \
         memory:name"
    )]
    Url {
        /// What was given.
        url: String,
    },
    /// TLS is wanted and the url names none.
    #[error("`{url}` is not secured by TLS: with a TLS directory, use https://host:port")]
    Plain {
        /// What was given.
        url: String,
    },
    /// The url names TLS and there is no certificate to show.
    #[error("`{url}` needs a certificate: give a TLS directory (--tls-dir)")]
    NoCertificate {
        /// What was given.
        url: String,
    },
    /// The address could not be bound.
    #[error("cannot listen on {addr}")]
    Bind {
        /// The address.
        addr: ListenAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The path of a Unix socket is taken by something that is not a dead socket.
    #[error("cannot listen on {addr}: {}", if *is_live { "somebody listens there" } else { "the path is not a socket" })]
    PathTaken {
        /// The address.
        addr: ListenAddr,
        /// A live listener has it (true), or it is another kind of file (false).
        is_live: bool,
    },
}

/// Whether a call failed because the connection did: nobody listens, or the peer went away during
/// the call. Its effect is unknown; the channel connects again by itself.
///
/// tonic says `UNAVAILABLE` for the first, and for the second, depending on the moment,
/// `UNAVAILABLE`, `CANCELLED` or `UNKNOWN`. Unlike a status that the peer has sent, these carry the
/// local error as their source.
#[must_use]
pub fn is_connection_lost(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::Unavailable || std::error::Error::source(status).is_some()
}

#[cfg(test)]
mod tests;
