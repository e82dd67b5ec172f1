//! Serving gRPC: limits, the tower stack, health, reflection, and a stop that drains.

mod guard;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message as _;
use prost_types::FileDescriptorSet;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::layer::layer_fn;

use self::guard::CallGuard;
use crate::config::Fault;
use crate::metrics::{Counter, Registry};
use crate::net::{ConnCounters, ConnLimits, Incoming, Peer, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
use crate::shutdown::Shutdown;

/// Longest time that a configuration may name, in ms: a day.
const MS_MAX: u64 = 86_400_000;

/// Limits of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Threads that run the tasks of the process, those for disks aside; 0: half of the processors.
    /// Too small: one busy connection holds others up. Too large: they wake each other for nothing.
    /// At most 1,024.
    pub worker_threads: usize,
    /// Most calls under way in the whole server, streams included; more are shed with
    /// `RESOURCE_EXHAUSTED`. Too small: clients are refused. Too large: memory.
    pub calls_max: usize,
    /// Most streams of one connection.
    pub streams_per_connection_max: u32,
    /// Longest unary call, in ms; streams are not cut. A caller's shorter `grpc-timeout` wins. At most
    /// 86,400,000, as are the other times here.
    pub unary_timeout_ms: u64,
    /// Largest header list of a request, in bytes.
    pub header_list_bytes_max: u32,
    /// Streams that a peer may open and reset before they are served, per connection. Too large:
    /// a peer that resets rapidly costs work.
    pub pending_reset_streams_max: usize,
    /// Pause between HTTP/2 pings, in ms.
    pub keepalive_interval_ms: u64,
    /// Wait for the answer of a ping before the connection counts as dead, in ms.
    pub keepalive_timeout_ms: u64,
    /// Bytes that a client may send ahead on one stream; 65,535 to 2^31 - 1.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection together.
    pub connection_window_bytes: u32,
    /// Longest handshake of TLS, and longest wait for the first bytes behind it, in ms. Too small:
    /// slow networks never connect. Too large: silent connections hold memory for so long.
    pub handshake_timeout_ms: u64,
    /// Handshakes of TLS under way; further connections wait. Too small: many clients that start
    /// at once wait for each other. Too large: a flood takes processors and memory.
    pub handshakes_max: usize,
    /// Connections, those that shake hands included; more are closed at once. Too small: clients
    /// are refused. Too large: memory, up to the window of a connection for each.
    pub connections_max: usize,
    /// Connections from one IP address; more are closed at once. Too small: clients behind one
    /// address are refused. Too large: one machine takes all places.
    pub connections_per_address_max: usize,
    /// How long a stop waits for calls to end before it drops them, in ms.
    pub drain_timeout_ms: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            worker_threads: 0,
            calls_max: 4_096,
            streams_per_connection_max: 1_024,
            unary_timeout_ms: 60_000,
            header_list_bytes_max: 16 << 10,
            pending_reset_streams_max: 64,
            keepalive_interval_ms: 5_000,
            keepalive_timeout_ms: 10_000,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 32 << 20,
            handshake_timeout_ms: 10_000,
            handshakes_max: 512,
            connections_max: 4_096,
            connections_per_address_max: 480,
            drain_timeout_ms: 10_000,
        }
    }
}

impl ServerConfig {
    /// What is wrong with it, with the keys that it has inside a configuration.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        let within = |key: &str, value: u64, min: u64, max: u64| {
            Fault::unless_within(&format!("server.{key}"), value, min, max)
        };
        let count = |key: &str, value: usize| within(key, value as u64, 1, 1 << 20);
        let ms = |key: &str, value: u64| within(key, value, 1, MS_MAX);
        let window =
            |key: &str, value: u32| within(key, value.into(), WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        [
            within("worker_threads", self.worker_threads as u64, 0, 1_024),
            count("calls_max", self.calls_max),
            count("streams_per_connection_max", self.streams_per_connection_max as usize),
            ms("unary_timeout_ms", self.unary_timeout_ms),
            within("header_list_bytes_max", self.header_list_bytes_max.into(), 1_024, 1 << 20),
            count("pending_reset_streams_max", self.pending_reset_streams_max),
            ms("keepalive_interval_ms", self.keepalive_interval_ms),
            ms("keepalive_timeout_ms", self.keepalive_timeout_ms),
            window("stream_window_bytes", self.stream_window_bytes),
            window("connection_window_bytes", self.connection_window_bytes),
            ms("handshake_timeout_ms", self.handshake_timeout_ms),
            count("handshakes_max", self.handshakes_max),
            count("connections_max", self.connections_max),
            count("connections_per_address_max", self.connections_per_address_max),
            ms("drain_timeout_ms", self.drain_timeout_ms),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Decides who may call what.
pub trait Access: Send + Sync + std::fmt::Debug {
    /// Whether this peer may call the method, named by its path `/package.Service/Method`.
    ///
    /// # Errors
    /// What the caller is told; it has been logged and counted.
    fn check(&self, path: &str, peer: &Peer) -> Result<(), Status>;
}

/// What a server counts. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct ServerCounters {
    /// At the door.
    pub conns: ConnCounters,
    /// Calls that the peer was not allowed to make.
    pub calls_denied: Counter,
}

impl ServerCounters {
    /// The counters under their names.
    #[must_use]
    pub fn register(registry: &Registry) -> Self {
        let refused = "Connections closed because there were too many";
        let failed = "Handshakes of TLS that failed or took too long";
        let conns = ConnCounters {
            refused: registry.counter("endio_connections_refused_total", refused, &[]),
            handshakes_failed: registry.counter("endio_handshakes_failed_total", failed, &[]),
        };
        let denied = "Calls that the identity of the caller may not make";
        let calls_denied = registry.counter("endio_calls_denied_total", denied, &[]);
        Self { conns, calls_denied }
    }
}

/// What [`serve`] needs besides routes.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// Who may call what; `None`: whoever can connect, everything.
    pub access: Option<Arc<dyn Access>>,
    /// What is counted.
    pub counters: ServerCounters,
    /// Limits.
    pub config: ServerConfig,
    /// Encoded file descriptor sets for reflection; those of health and reflection are added.
    pub descriptors: Vec<&'static [u8]>,
    /// Unary methods (`/package.Service/Method`) that `unary_timeout_ms` does not cut: what they do takes
    /// as long as it takes. The caller decides how long to wait.
    pub unhurried: &'static [&'static str],
}

/// Tells health probes whether the service takes work. Cheap to clone.
///
/// It starts as not serving: a service says so itself once recovery is done.
#[derive(Clone, Debug)]
pub struct Readiness {
    reporter: HealthReporter,
    services: Arc<[String]>,
    is_ready: Arc<AtomicBool>,
}

impl Readiness {
    /// For these full service names (`endio.conversion.v1.Conversion`), and the server as a whole
    /// (the empty name). All are not serving.
    pub async fn new(services: &[&str]) -> Self {
        let names = std::iter::once("").chain(services.iter().copied()).map(str::to_owned);
        let (reporter, services) = (HealthReporter::new(), names.collect());
        let readiness = Self { reporter, services, is_ready: Arc::default() };
        readiness.set_not_ready().await;
        readiness
    }

    /// From now on probes are answered with SERVING.
    pub async fn set_ready(&self) {
        self.set(ServingStatus::Serving).await;
    }

    /// From now on probes are answered with NOT_SERVING.
    pub async fn set_not_ready(&self) {
        self.set(ServingStatus::NotServing).await;
    }

    /// What probes are answered now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Relaxed)
    }

    async fn set(&self, status: ServingStatus) {
        self.is_ready.store(status == ServingStatus::Serving, Ordering::Relaxed);
        for service in self.services.iter() {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

/// Why serving ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A descriptor set is no protobuf message.
    #[error("the descriptor set cannot be decoded")]
    Descriptors(#[source] prost::DecodeError),
    /// A descriptor set cannot be served.
    #[error("the descriptor set for reflection is broken")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("the transport failed")]
    Transport(#[source] tonic::transport::Error),
}

/// Serves `routes` until `shutdown` is requested and calls have drained, or it is forced.
///
/// Each call passes, outermost first: a log span; panics become `INTERNAL` without details;
/// `access`; calls beyond `calls_max` are shed; unary calls have a deadline; the handler. Which methods are unary
/// is read from the descriptors; a method that is not in them, or is one of `unhurried`, is never cut. Health
/// checks pass also when the server is full.
///
/// Callers set message size limits on their generated servers
/// (`max_decoding_message_size`, `max_encoding_message_size`): tonic offers no common place.
///
/// At a requested stop, health says NOT_SERVING, no more connections are accepted, and calls under
/// way have `drain_timeout_ms` to end: long-lived streams must watch `shutdown` themselves. What
/// is left is dropped then, and at once when the stop is forced, or when this future is dropped.
/// While it serves, it holds `grpc server` of `shutdown`.
///
/// # Errors
/// A broken descriptor set or transport.
pub async fn serve(
    options: ServerOptions,
    incoming: impl Into<Incoming>,
    routes: Routes,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), ServeError> {
    let _hold = shutdown.hold("grpc server");
    let config = &options.config;
    let routes = routes
        .add_service(HealthServer::new(HealthService::from_health_reporter(
            readiness.reporter.clone(),
        )))
        .add_service(reflection(&options)?.build_v1().map_err(ServeError::Reflection)?)
        .add_service(reflection(&options)?.build_v1alpha().map_err(ServeError::Reflection)?);
    let mut hurried = unary_methods(&options.descriptors)?;
    hurried.retain(|path| !options.unhurried.contains(&path.as_str()));
    let unary_timeout = Duration::from_millis(config.unary_timeout_ms);
    let guard = CallGuard::new(config.calls_max, unary_timeout, hurried)
        .with_access(options.access.clone(), options.counters.calls_denied.clone());
    // Cuts the connections when this function returns, or is dropped before.
    let cut = CancellationToken::new();
    let _cut_at_end = cut.clone().drop_guard();
    let limits = ConnLimits {
        connections_max: config.connections_max,
        connections_per_address_max: config.connections_per_address_max,
        handshakes_max: config.handshakes_max,
        handshake: Duration::from_millis(config.handshake_timeout_ms),
    };
    let incoming = incoming.into().guarded(limits, options.counters.conns.clone(), cut.clone());
    let server = builder(config)
        .layer(layer_fn(move |routes| guard.clone().around(routes)))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, shutdown.requested());
    let drain = Duration::from_millis(config.drain_timeout_ms);
    tokio::select! {
        biased;
        () = shutdown.forced() => Ok(()),
        result = server => result.map_err(ServeError::Transport),
        () = overrun(&shutdown, &readiness, drain) => {
            tracing::warn!(drain_ms = config.drain_timeout_ms, "calls dropped: they did not end");
            Ok(())
        }
    }
}

/// Returns when a requested stop has lasted too long.
async fn overrun(shutdown: &Shutdown, readiness: &Readiness, drain: Duration) {
    shutdown.requested().await;
    readiness.set_not_ready().await;
    tokio::time::sleep(drain).await;
}

fn builder(config: &ServerConfig) -> Server {
    Server::builder()
        .max_concurrent_streams(config.streams_per_connection_max)
        .http2_max_header_list_size(config.header_list_bytes_max)
        .http2_max_pending_accept_reset_streams(Some(config.pending_reset_streams_max))
        .http2_max_local_error_reset_streams(Some(config.pending_reset_streams_max))
        .http2_keepalive_interval(Some(Duration::from_millis(config.keepalive_interval_ms)))
        .http2_keepalive_timeout(Some(Duration::from_millis(config.keepalive_timeout_ms)))
        .initial_stream_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_frame_size(crate::net::FRAME_BYTES_MAX)
}

fn reflection<'a>(
    options: &'a ServerOptions,
) -> Result<tonic_reflection::server::Builder<'a>, ServeError> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    Ok(options.descriptors.iter().fold(builder, |builder, descriptors| {
        builder.register_encoded_file_descriptor_set(descriptors)
    }))
}

/// Paths (`/package.Service/Method`) of the methods that stream in no direction.
fn unary_methods(descriptors: &[&'static [u8]]) -> Result<HashSet<String>, ServeError> {
    let mut paths = HashSet::new();
    for bytes in descriptors {
        let set = FileDescriptorSet::decode(*bytes).map_err(ServeError::Descriptors)?;
        for file in &set.file {
            for service in &file.service {
                let unary = service
                    .method
                    .iter()
                    .filter(|method| !method.client_streaming() && !method.server_streaming());
                paths.extend(unary.map(|method| {
                    format!("/{}.{}/{}", file.package(), service.name(), method.name())
                }));
            }
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests;
