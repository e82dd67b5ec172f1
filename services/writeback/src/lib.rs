//! The writeback service: what clients talk to.
//!
//! It owns the client's side of a write: the dirty cache, the order of overlapping requests,
//! retries, and the data until conversion has said that it is converted. See the proto files for
//! what the service promises and [`engine`] for how.
//!
//! A service is a library that is given its listener, its dialer and its recorder: see [`start`].

pub mod access;
mod clean;
mod config;
mod conversion;
mod dedupe;
mod driver;
pub mod engine;
mod failure;
mod flags;
mod grpc;
mod identity;
mod io_end;
mod locks;
mod log;
mod metrics;
pub mod nbd;
mod session;
mod stores;
mod table;
mod volume;

use std::io;
use std::sync::Arc;

use endio_api::DESCRIPTORS;
use endio_api::access::rules;
use endio_chassis::admin;
use endio_chassis::net::{Dialer, Listener, NetError};
use endio_chassis::recorder::Recorder;
use endio_chassis::server::{self, Readiness, ServeError, ServerCounters, ServerOptions};
use endio_chassis::shutdown::Shutdown;
use endio_chassis::trace::Tracer;
use endio_store::cache_log::CacheLogError;
use tokio::task::{JoinError, JoinHandle};

pub use config::Config;
pub use failure::Failure;
pub use flags::Flags;
pub use metrics::Metrics;
pub use volume::Volume;

use crate::driver::Life;
use crate::engine::Engine;

/// Makes the spans of this service.
pub(crate) const TRACER: Tracer = Tracer::new("writeback");

/// Largest message: a write of 3 MiB or a read of 4 MiB, with room for what is said about it.
pub(crate) const MESSAGE_BYTES_MAX: usize = (4 << 20) + (256 << 10);

/// Randomness for pauses between attempts, of a kind that a task may keep.
pub(crate) fn jitter() -> rand::rngs::StdRng {
    use rand::SeedableRng as _;
    rand::rngs::StdRng::seed_from_u64(rand::random())
}

/// What the service is given.
pub struct Deps {
    /// Where it is served.
    pub listener: Listener,
    /// How it reaches conversion and the block-stores.
    pub dialer: Dialer,
    /// Where its spans are kept.
    pub recorder: Recorder,
    /// The wish to stop.
    pub shutdown: Shutdown,
}

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The cache directory cannot be used.
    #[error("the cache directory cannot be used")]
    CacheDir(#[source] io::Error),
    /// The cache log cannot be opened.
    #[error("the cache log cannot be opened")]
    CacheLog(#[source] CacheLogError),
    /// The url of conversion is none.
    #[error("the conversion service cannot be dialed")]
    Url(#[source] NetError),
    /// The NBD server cannot be started.
    #[error("NBD clients cannot be served")]
    Nbd(#[source] nbd::NbdError),
    /// Opening was cut short by the end of the runtime.
    #[error("opening the cache directory was interrupted")]
    Interrupted(#[source] JoinError),
}

/// Why the service ended other than by an orderly stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The server failed.
    #[error("the server failed")]
    Serve(#[from] ServeError),
    /// What an earlier start left cannot be read.
    #[error("the cache log cannot be replayed")]
    Recovery(#[source] Failure),
    /// The cache log cannot be closed; the next start replays it.
    #[error("the cache log cannot be closed")]
    Close(#[source] Failure),
    /// The stop did not drain in time. What is named is in the cache log.
    #[error("the stop overran its deadline; still held: {}", .0.join(", "))]
    Overrun(Vec<String>),
    /// A task of the service panicked.
    #[error("a task of the service panicked")]
    Panicked(#[source] JoinError),
}

/// A running writeback.
pub struct Running {
    url: String,
    nbd_address: Option<String>,
    engine: Arc<Engine>,
    task: JoinHandle<Result<(), RunError>>,
}

impl Running {
    /// Where it is served.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Where NBD clients attach: `IP:PORT` or `unix:PATH`.
    pub fn nbd_address(&self) -> Option<String> {
        self.nbd_address.clone()
    }

    /// The service without its transport, for other front ends in the same process.
    pub fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.engine)
    }

    /// Waits until a requested stop has written everything out.
    ///
    /// # Errors
    /// A fatal failure, or what was still held when the stop overran its deadline.
    pub async fn wait(self) -> Result<(), RunError> {
        let Self { task, engine, .. } = self;
        // The directory is unlocked when nobody has the engine any more.
        drop(engine);
        task.await.map_err(RunError::Panicked)?
    }
}

/// Opens the cache directory and serves. Ready for work once the session with conversion stands
/// and the cache log is replayed; this does not wait for that.
///
/// # Errors
/// See [`StartError`].
pub async fn start(config: Config, deps: Deps) -> Result<Running, StartError> {
    let Deps { listener, dialer, recorder, shutdown } = deps;
    let url = listener.url().to_owned();
    let is_insecure = url.starts_with("http://") || url.starts_with("unix:");
    let nbd = nbd::bind(&config).await.map_err(StartError::Nbd)?;
    let mut config = config;
    // Clients ask for the port that was chosen.
    config.nbd_listen = nbd.as_ref().map(nbd::Bound::listen_addr);
    let opening = config.clone();
    let opened = tokio::task::spawn_blocking(move || driver::open(&opening));
    let opened = opened.await.map_err(StartError::Interrupted)??;
    let server_config = config.server.clone();
    let (engine, replay, session) = driver::build(config, opened, dialer, recorder, is_insecure)?;
    let options = ServerOptions {
        access: Some(Arc::new(rules::OF_WRITEBACK)),
        counters: ServerCounters::register(&engine.metrics.registry),
        config: server_config,
        descriptors: vec![DESCRIPTORS],
        // It reads everything there is.
        unhurried: &["/endio.writeback.v1.Inspect/Check"],
    };
    let readiness = Readiness::new(grpc::SERVICES).await;
    admin::watch("writeback", &readiness);
    engine.show_gauges();
    tokio::spawn(Arc::clone(&engine).tell_kept());
    let routes = grpc::routes(&engine, &shutdown);
    let server = server::serve(options, listener, routes, readiness.clone(), shutdown.clone());
    let server = tokio::spawn(server);
    let nbd_address = nbd.as_ref().map(|nbd| nbd.address().to_string());
    let nbd = nbd.map(|nbd| nbd.serve(&engine));
    tracing::info!(writeback = engine.identity.writeback(), url, nbd_address, "writeback starts");
    let life =
        Life { engine: Arc::clone(&engine), replay, readiness, shutdown, session, server, nbd };
    Ok(Running { url, nbd_address, engine, task: tokio::spawn(life.run()) })
}
