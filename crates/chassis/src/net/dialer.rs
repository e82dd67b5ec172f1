//! The connecting side: lazy channels that outlive their peer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsConnector, TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::conn::Conn;
use super::listener::dial_memory;
use super::{FRAME_BYTES_MAX, NetError, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
use crate::config::Fault;
use crate::tls::Tls;

/// How channels connect and how they notice that their peer is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DialerConfig {
    /// Longest wait for a connection, in ms. Too small: slow networks never connect. Too large: a
    /// call to a host that swallows packets hangs for so long.
    pub connect_timeout_ms: u64,
    /// Pause between HTTP/2 pings, in ms, also while idle. Too small: traffic for nothing. Too
    /// large: a dead peer is noticed late.
    pub keepalive_interval_ms: u64,
    /// Wait for the answer of a ping before the connection counts as dead, in ms. Too small: a
    /// busy peer is cut off. Too large: a dead peer holds calls for so long.
    pub keepalive_timeout_ms: u64,
    /// Bytes that the peer may send ahead on one stream; 65,535 to 2^31 - 1. Too small: throughput is
    /// bounded by the round trip. Too large: memory per stream.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection together.
    pub connection_window_bytes: u32,
}

impl Default for DialerConfig {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 2_000,
            keepalive_interval_ms: 2_000,
            keepalive_timeout_ms: 4_000,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 32 << 20,
        }
    }
}

impl DialerConfig {
    /// What is wrong with it, with the keys that it has inside a configuration.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        let ms = |key: &str, value: u64| {
            Fault::unless_within(&format!("dialer.{key}"), value, 1, 3_600_000)
        };
        let window = |key: &str, value: u32| {
            let (min, max) = (WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
            Fault::unless_within(&format!("dialer.{key}"), value.into(), min, max)
        };
        [
            ms("connect_timeout_ms", self.connect_timeout_ms),
            ms("keepalive_interval_ms", self.keepalive_interval_ms),
            ms("keepalive_timeout_ms", self.keepalive_timeout_ms),
            window("stream_window_bytes", self.stream_window_bytes),
            window("connection_window_bytes", self.connection_window_bytes),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Connects in place of TCP. Tests run the services over a simulated network with it.
pub trait Transport: std::fmt::Debug + Send + Sync {
    /// Connects to `host:port`.
    fn connect(&self, host_port: String) -> BoxFuture<'static, io::Result<Conn>>;
}

/// Makes channels. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    config: DialerConfig,
    tls: Option<Tls>,
    expects: Option<&'static str>,
    transport: Option<Arc<dyn Transport>>,
}

#[derive(Clone)]
enum Target {
    Tcp(String),
    Tls(Box<Secured>),
    Unix(PathBuf),
    Memory(String),
    Foreign(Arc<dyn Transport>, String),
}

/// A peer that must show who it is.
#[derive(Clone)]
struct Secured {
    host_port: String,
    name: ServerName<'static>,
    tls: Tls,
    expects: Option<&'static str>,
}

impl Dialer {
    /// A dialer with these settings, without TLS.
    #[must_use]
    pub fn new(config: DialerConfig) -> Self {
        Self { config, tls: None, expects: None, transport: None }
    }

    /// The same, with `transport` for `http://host:port`.
    #[must_use]
    pub fn over(self, transport: Arc<dyn Transport>) -> Self {
        Self { transport: Some(transport), ..self }
    }

    /// The same over mutual TLS: urls are `https://`, or of this process (`memory:`).
    #[must_use]
    pub fn secured(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// The same, for peers whose certificate has a URI that begins so, and no other URI of the same
    /// scheme: nobody is two people at once. Whoever holds another certificate for the same host is not
    /// taken for them. Without TLS it means nothing.
    #[must_use]
    pub fn expecting(&self, uri_prefix: &'static str) -> Self {
        Self { expects: Some(uri_prefix), ..self.clone() }
    }

    /// A channel to `http://host:port`, `https://host:port`, `unix:/path` or `memory:name`.
    ///
    /// It connects on first use, and again after the peer went away: a call made while nobody
    /// listens fails (see [`super::is_connection_lost`]), and a later one on the same channel
    /// succeeds once somebody does. A peer that stops answering is noticed by HTTP/2 pings, also while idle.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The url has none of these forms, or does not fit to whether this dialer has a certificate.
    pub fn channel(&self, url: &str) -> Result<Channel, NetError> {
        let (target, uri) = self.target(url)?;
        let config = &self.config;
        let endpoint = Endpoint::from(uri)
            .connect_timeout(Duration::from_millis(config.connect_timeout_ms))
            .http2_keep_alive_interval(Duration::from_millis(config.keepalive_interval_ms))
            .keep_alive_timeout(Duration::from_millis(config.keepalive_timeout_ms))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(config.stream_window_bytes)
            .initial_connection_window_size(config.connection_window_bytes)
            .max_frame_size(FRAME_BYTES_MAX);
        let connector = service_fn(move |_: Uri| connect(target.clone()));
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    fn target(&self, url: &str) -> Result<(Target, Uri), NetError> {
        let (target, uri) = parse(url)?;
        let is_https = uri.scheme_str() == Some("https");
        match (&self.tls, target) {
            (None, _) if is_https => Err(NetError::NoCertificate { url: url.to_owned() }),
            (Some(tls), Target::Tcp(host_port)) if is_https => {
                let bad = |_| NetError::Url { url: url.to_owned() };
                let host = uri.host().unwrap_or_default();
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let name = ServerName::try_from(host.to_owned()).map_err(bad)?;
                // tonic refuses https where it does not do the TLS itself; the connector does it.
                let uri = url.replacen("https://", "http://", 1).parse();
                let uri = uri.map_err(|_| NetError::Url { url: url.to_owned() })?;
                let (tls, expects) = (tls.clone(), self.expects);
                Ok((Target::Tls(Box::new(Secured { host_port, name, tls, expects })), uri))
            }
            (Some(_), Target::Tcp(_) | Target::Unix(_)) => {
                Err(NetError::Plain { url: url.to_owned() })
            }
            (_, Target::Tcp(host_port)) => match &self.transport {
                Some(transport) => Ok((Target::Foreign(Arc::clone(transport), host_port), uri)),
                None => Ok((Target::Tcp(host_port), uri)),
            },
            (_, target) => Ok((target, uri)),
        }
    }
}

fn parse(url: &str) -> Result<(Target, Uri), NetError> {
    let bad = || NetError::Url { url: url.to_owned() };
    // The authority that peers see where the address is no host name.
    let local = Uri::from_static("http://localhost");
    if let Some(path) = url.strip_prefix("unix:") {
        // `unix:///path` is the same place as `unix:/path`.
        let path = path.strip_prefix("//").unwrap_or(path);
        return if path.starts_with('/') {
            Ok((Target::Unix(path.into()), local))
        } else {
            Err(bad())
        };
    }
    if let Some(name) = url.strip_prefix("memory:") {
        return if name.is_empty() {
            Err(bad())
        } else {
            Ok((Target::Memory(name.to_owned()), local))
        };
    }
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let is_bare = uri.path_and_query().is_none_or(|p| p.as_str() == "/");
    match (uri.scheme_str(), uri.host(), uri.port_u16()) {
        (Some("http" | "https"), Some(host), Some(port)) if is_bare => {
            Ok((Target::Tcp(format!("{host}:{port}")), uri))
        }
        _ => Err(bad()),
    }
}

fn connect(target: Target) -> BoxFuture<'static, io::Result<TokioIo<Conn>>> {
    Box::pin(async move {
        let conn = match target {
            Target::Tcp(host_port) => Conn::tcp(TcpStream::connect(host_port).await?),
            Target::Tls(secured) => secured.connect().await?,
            Target::Unix(path) => Conn::unix(UnixStream::connect(path).await?),
            Target::Memory(name) => dial_memory(&name)?,
            Target::Foreign(transport, host_port) => transport.connect(host_port).await?,
        };
        Ok(TokioIo::new(conn))
    })
}

/// Whether the one name of this scheme begins so.
fn is_one_of(names: &[String], prefix: &str) -> bool {
    let scheme = prefix.split_inclusive("://").next().unwrap_or(prefix);
    let mut names = names.iter().filter(|name| name.starts_with(scheme));
    names.next().is_some_and(|name| name.starts_with(prefix)) && names.next().is_none()
}

impl Secured {
    /// With the certificates as they are now.
    async fn connect(self) -> io::Result<Conn> {
        let stream = TcpStream::connect(&self.host_port).await?;
        // As in [`Conn::tcp`].
        let _ = stream.set_nodelay(true);
        let stream = TlsConnector::from(self.tls.client()).connect(self.name, stream).await?;
        let conn = Conn::tls(TlsStream::Client(stream));
        let names = conn.names();
        match self.expects {
            Some(prefix) if !is_one_of(&names, prefix) => {
                let text = format!("{} is {names:?}, and not {prefix}…", self.host_port);
                Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
            }
            _ => Ok(conn),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_two_identities_is_nobody() {
        let is = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            is_one_of(&names, "endio://service/writeback/")
        };
        assert!(is(&["endio://service/writeback/w1"]));
        assert!(is(&["spiffe://cluster/w1", "endio://service/writeback/w1"]));
        assert!(!is(&["endio://service/block-store/s1"]));
        assert!(!is(&["endio://service/writeback/w1", "endio://service/block-store/s1"]));
        assert!(!is(&["endio://service/writeback/w1", "endio://service/writeback/w2"]));
        assert!(!is(&[]));
    }

    #[test]
    fn every_value_without_meaning_is_named() {
        assert_eq!(DialerConfig::default().faults(), []);
        let config = DialerConfig {
            connect_timeout_ms: 0,
            keepalive_interval_ms: 0,
            keepalive_timeout_ms: 0,
            stream_window_bytes: 65_534,
            connection_window_bytes: 1 << 31,
        };
        let keys: Vec<_> = config.faults().into_iter().map(|fault| fault.key).collect();
        let expected = [
            "dialer.connect_timeout_ms",
            "dialer.keepalive_interval_ms",
            "dialer.keepalive_timeout_ms",
            "dialer.stream_window_bytes",
            "dialer.connection_window_bytes",
        ];
        assert_eq!(keys, expected);
    }
}
