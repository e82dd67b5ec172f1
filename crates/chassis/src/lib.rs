//! What every process needs: config, telemetry, net, health, reflection, shutdown.
//!
//! No word of the storage domain stands here, so that a reader of a service finds its rules in the
//! service and its plumbing in this crate.

pub mod admin;
pub mod backoff;
pub mod config;
pub mod metrics;
pub mod net;
mod otlp;
pub mod quiet;
pub mod recorder;
pub mod report;
pub mod runtime;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace;
