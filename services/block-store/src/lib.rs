//! The block-store service: physical blocks.
//!
//! It writes only under a token that it verifies by itself, makes the data durable, and then
//! releases the token straight to conversion. What it refuses is decided by
//! [`endio_state_machine::gate`]; this crate performs it.
//!
//! A service is a library that is given its listener, its dialer and its device: see [`start`] and
//! [`start_on`].

mod bio;
mod config;
mod driver;
mod grpc;
mod metrics;
mod outbox;
mod queue;
mod reader;
mod session;
mod wire;
mod writer;

use std::{io, sync::Arc, time::Duration};

use endio_api::{
    DESCRIPTORS, access::rules, blockstore::block_store_server::BlockStoreServer,
    traces::RecorderTraces,
};
use endio_chassis::{
    admin,
    net::{Dialer, Listener},
    recorder::Recorder,
    server::{self, Readiness, ServeError, ServerCounters, ServerOptions},
    shutdown::Shutdown,
    trace::Tracer,
};
use endio_store::block::{
    BlockDevice, OpenBlockFile, OpenBlockFileError, Superblock, TrackedDevice,
};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tonic::service::Routes;
use tracing::{error, info, warn};

pub use config::{Config, Flags};
pub use metrics::Metrics;

use crate::{
    driver::Driver,
    grpc::{BlockStoreService, MESSAGE_BYTES_MAX},
    session::Session,
    writer::Writer,
};

/// Makes the spans of this service.
pub(crate) const TRACER: Tracer = Tracer::new("block-store");

/// Pause between two looks at what a stop still waits for.
const DRAIN_LOOK: Duration = Duration::from_millis(5);

/// What the service is given.
#[derive(Debug)]
pub struct Deps {
    /// Where it is served.
    pub listener: Listener,
    /// How it reaches conversion.
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
    /// The data directory cannot be used.
    #[error("the data directory cannot be opened")]
    Open(#[from] OpenBlockFileError),
    /// Threads cannot be started.
    #[error("the writer threads cannot be started")]
    Threads(#[source] io::Error),
    /// Opening was cut short by the end of the runtime.
    #[error("opening the data directory was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Why the service ended other than by an orderly stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The server failed.
    #[error("the server failed")]
    Serve(#[from] ServeError),
    /// The stop did not drain in time.
    #[error("the stop overran its deadline; still held: {}", .0.join(", "))]
    Overrun(Vec<String>),
    /// A task of the service panicked.
    #[error("a task of the service panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

/// A running block-store.
#[derive(Debug)]
pub struct Running {
    url: String,
    metrics: Metrics,
    task: JoinHandle<Result<(), RunError>>,
}

impl Running {
    /// Where it is served.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Waits until a requested stop has drained.
    ///
    /// # Errors
    /// A fatal failure, or what was still held when the stop overran its deadline.
    pub async fn wait(self) -> Result<(), RunError> {
        self.task.await.map_err(RunError::Panicked)?
    }
}

/// Opens the data directory, begins a new incarnation and serves. Ready for work only after
/// conversion has registered it; this does not wait for that.
///
/// # Errors
/// See [`StartError`].
pub async fn start(mut config: Config, deps: Deps) -> Result<Running, StartError> {
    let open = OpenBlockFile {
        dir: config.data_dir.clone(),
        capacity_blocks: config.capacity_blocks(),
        new_uuid: rand::random(),
        direct_write_bytes_min: config.direct_write_bytes_min(),
    };
    let opened = tokio::task::spawn_blocking(move || open.open());
    let file = opened.await.map_err(StartError::Interrupted)??;
    if file.was_repaired() {
        warn!("one copy of the superblock was damaged and has been written anew");
    }
    if config.direct_write_bytes_min > 0 && !file.has_direct_writes() {
        info!("the file system has no direct writes: all go through the page cache");
        config.direct_write_bytes_min = 0;
    }
    let superblock = file.superblock();
    start_on(config, deps, Arc::new(file), superblock).await
}

/// Serves a device that is open already, under the identity of `superblock`. Whoever calls this sees
/// to it that the incarnation is new and the device is used by nobody else.
///
/// # Errors
/// See [`StartError`].
pub async fn start_on(
    config: Config,
    deps: Deps,
    device: Arc<dyn BlockDevice>,
    superblock: Superblock,
) -> Result<Running, StartError> {
    let Deps { listener, dialer, recorder, shutdown } = deps;
    let url = listener.url().to_owned();
    let device = TrackedDevice::new(device);
    let driver = Arc::new(Driver::new(&config, device, superblock, shutdown.clone()));
    let writer = Writer::start(&driver, &config).map_err(StartError::Threads)?;
    let readiness = Readiness::new(&["endio.blockstore.v1.BlockStore"]).await;
    admin::watch("block-store", &readiness);
    driver.show_gauges();
    info!(
        uuid = superblock.uuid_hex(),
        incarnation = superblock.incarnation.0,
        capacity_blocks = driver.device.capacity_blocks(),
        url,
        "block-store starts"
    );
    let (is_connected, connected) = watch::channel(false);
    let session = Session {
        driver: Arc::clone(&driver),
        dialer,
        readiness: readiness.clone(),
        url: config.advertise.clone().unwrap_or_else(|| url.clone()),
        config: config.clone(),
        is_connected,
    };
    let blocks = BlockStoreServer::new(BlockStoreService { driver: Arc::clone(&driver) })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let routes = Routes::new(blocks).add_service(RecorderTraces::server(recorder, "block-store"));
    let options = ServerOptions {
        access: Some(Arc::new(rules::OF_BLOCK_STORE)),
        counters: ServerCounters::register(&driver.metrics.registry),
        config: config.server.clone(),
        descriptors: vec![DESCRIPTORS],
        unhurried: &[],
    };
    let server = server::serve(options, listener, routes, readiness.clone(), shutdown);
    let life = Life {
        driver: Arc::clone(&driver),
        writer,
        readiness,
        connected,
        drain_timeout: Duration::from_millis(config.drain_timeout_ms),
        session: tokio::spawn(session.run()),
        server: tokio::spawn(server),
    };
    let task = tokio::spawn(life.run());
    Ok(Running { url, metrics: driver.metrics.clone(), task })
}

/// Everything that must be ended in order.
struct Life {
    driver: Arc<Driver>,
    writer: Writer,
    readiness: Readiness,
    connected: watch::Receiver<bool>,
    drain_timeout: Duration,
    session: JoinHandle<()>,
    server: JoinHandle<Result<(), ServeError>>,
}

impl Life {
    async fn run(mut self) -> Result<(), RunError> {
        let shutdown = self.driver.shutdown.clone();
        let early = tokio::select! {
            biased;
            () = shutdown.requested() => None,
            served = &mut self.server => Some(served),
        };
        // Refuses new work also when the server ended by itself.
        shutdown.request();
        self.readiness.set_not_ready().await;
        let held = self.drain(&shutdown).await;
        self.driver.closed.cancel();
        if let Err(panic) = self.session.await {
            error!(%panic, "the session's task failed");
        }
        if !held.is_empty() {
            // Streams whose answers hang on the device would keep it for its own deadline.
            self.server.abort();
        }
        let served = match early {
            Some(served) => served,
            None => self.server.await,
        };
        if held.is_empty() {
            let writer = self.writer;
            let stopped = tokio::task::spawn_blocking(move || writer.stop());
            stopped.await.map_err(RunError::Panicked)?;
        } else {
            // The threads hang on the device: waiting for them is what has just failed.
            error!(held = held.join(", "), "the stop overran its deadline");
            return Err(RunError::Overrun(held));
        }
        served.map_err(RunError::Panicked)??;
        info!("block-store stopped");
        Ok(())
    }

    /// Waits for what is in flight and for conversion's answers. Returns what is left.
    async fn drain(&self, shutdown: &Shutdown) -> Vec<String> {
        let deadline = Instant::now() + self.drain_timeout;
        loop {
            let held = self.driver.held(*self.connected.borrow());
            if held.is_empty() || Instant::now() >= deadline || shutdown.is_forced() {
                return held;
            }
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }
}
