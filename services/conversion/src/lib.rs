//! The conversion service: owns volumes, the extent map, free space, epochs and the ledger of
//! io_ends. It alone grants tokens and converts.
//!
//! A service is a library that is given its listener, its clients and its store; a binary only
//! supplies them.

mod backup;
mod batches;
mod commit;
mod config;
mod driver;
mod grpc;
mod handle;
mod metrics;
mod restore;
mod snapshot;

use std::sync::Arc;

use endio_api::access::rules;
use endio_api::conversion::conversion_server::ConversionServer;
use endio_api::traces::RecorderTraces;
use endio_chassis::admin;
use endio_chassis::metrics::Registry;
use endio_chassis::net::{Dialer, Incoming, Listener};
use endio_chassis::recorder::Recorder;
use endio_chassis::server::{Readiness, ServeError, ServerCounters, ServerOptions, serve};
use endio_chassis::shutdown::Shutdown;
use endio_chassis::trace::Tracer;
use endio_store::meta::{DiskMeta, MetaOptions, MetaStore};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tonic::service::Routes;

pub use config::{Config, Flags};
pub use driver::DriverError;
pub use restore::{EPOCH_LEAP, InPlace, RestoreError, RestoreOptions, Restored, restore};

/// Makes the spans of this service.
pub(crate) const TRACER: Tracer = Tracer::new("conversion");

/// Messages of a session carry batches of releases with checksums; one of 4 MiB of data has 4 KiB
/// of them. Larger messages are refused.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// What the service is given.
pub struct Deps {
    /// Where it listens; may be several listeners merged into one.
    pub incoming: Incoming,
    /// How it reaches others. Conversion calls nobody; kept so that all services are alike.
    pub dialer: Dialer,
    /// Where its spans can be asked for.
    pub recorder: Recorder,
    /// When to stop.
    pub shutdown: Shutdown,
    /// Where metadata is kept; `None`: in `Config::data_dir`.
    pub store: Option<Box<dyn MetaStore>>,
    /// Whether the driver has a thread and a runtime of its own: its short disk reads hold up nobody
    /// else in the caller's. Without, it is a task of the caller's runtime, which spares each message
    /// two changes of threads, and goes by that one's clock.
    pub has_own_thread: bool,
}

impl Deps {
    /// The usual ones: one listener, metadata in the data directory.
    pub fn new(listener: Listener, dialer: Dialer, recorder: Recorder, shutdown: Shutdown) -> Self {
        let incoming = Incoming::from(listener);
        Self { incoming, dialer, recorder, shutdown, store: None, has_own_thread: true }
    }
}

/// Why the service does not start or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The driver cannot start or go on.
    #[error("the conversion service cannot go on")]
    Driver(#[from] DriverError),
    /// The server failed.
    #[error("the gRPC server failed")]
    Serve(#[from] ServeError),
    /// A thread ended without saying why.
    #[error("the {0} ended unexpectedly")]
    Ended(&'static str),
    /// A thread cannot be started.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// A service that was started.
pub struct Running {
    url: String,
    driver: oneshot::Receiver<Result<(), StartError>>,
    server: tokio::task::JoinHandle<Result<(), ServeError>>,
    shutdown: Shutdown,
}

impl Running {
    /// Where the service is reached.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until a requested stop has drained, or a fault ended the service.
    ///
    /// # Errors
    /// The fault.
    pub async fn wait(self) -> Result<(), StartError> {
        let driver = self.driver.await.unwrap_or(Err(StartError::Ended("driver")));
        // After a fault nobody may be answered any more.
        self.shutdown.request();
        if driver.is_err() {
            self.server.abort();
            return driver;
        }
        match self.server.await {
            Ok(served) => Ok(served?),
            Err(_) => Err(StartError::Ended("server")),
        }
    }
}

/// Starts the service: it listens at once and is ready once it has recovered.
///
/// # Errors
/// The metadata cannot be opened.
pub async fn start(config: Config, deps: Deps) -> Result<Running, StartError> {
    let Deps { incoming, dialer: _, recorder, shutdown, store, has_own_thread } = deps;
    let url = incoming.urls().first().cloned().unwrap_or_default();
    let readiness = Readiness::new(&["endio.conversion.v1.Conversion"]).await;
    admin::watch("conversion", &readiness);
    let (events, queue) = mpsc::channel(config.input_queue_max);
    let handle = handle::Handle { events, session_queue_max: config.session_queue_max };
    let log_blocks_max = config.limits.log_blocks_per_volume_max;
    let grpc = grpc::Grpc { handle, backups: Arc::new(Semaphore::new(1)), log_blocks_max };
    let service = ConversionServer::new(grpc)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let traces = RecorderTraces::server(recorder, "conversion");
    let routes = Routes::new(service).add_service(traces);
    let registry = Registry::default();
    registry.expose();
    let options = ServerOptions {
        access: Some(Arc::new(rules::OF_CONVERSION)),
        counters: ServerCounters::register(&registry),
        config: config.server.clone(),
        descriptors: vec![endio_api::DESCRIPTORS],
        // It reads everything there is.
        unhurried: &["/endio.conversion.v1.Conversion/Check"],
    };
    let server = serve(options, incoming, routes, readiness.clone(), shutdown.clone());
    let server = tokio::spawn(async move {
        // Shown as long as somebody has it.
        let _shown = registry;
        server.await
    });
    let life = Life { config, store, queue, readiness, shutdown: shutdown.clone() };
    let driver = if has_own_thread { life.in_a_thread().await? } else { life.in_a_task()? };
    Ok(Running { url, driver, server, shutdown })
}

/// What the driver is made of.
struct Life {
    config: Config,
    store: Option<Box<dyn MetaStore>>,
    queue: mpsc::Receiver<handle::Event>,
    readiness: Readiness,
    shutdown: Shutdown,
}

impl Life {
    /// Recovers; the future is the driver's life after that.
    fn open(
        self,
    ) -> Result<impl Future<Output = Result<(), DriverError>> + Send + 'static, DriverError> {
        let Self { config, store, queue, readiness, shutdown } = self;
        let store =
            store.unwrap_or_else(|| Box::new(DiskMeta::new(&config.data_dir, options(&config))));
        let registry = Registry::default();
        registry.expose();
        let metrics = metrics::Metrics::new(&registry);
        let driver = driver::Driver::open(config, store.as_ref(), metrics)?;
        Ok(async move {
            // Shown as long as the driver lives, and its store is not closed before it.
            let _kept = (registry, store);
            driver.run(queue, readiness, shutdown).await
        })
    }

    fn in_a_task(self) -> Result<oneshot::Receiver<Result<(), StartError>>, StartError> {
        let (ended, driver) = oneshot::channel();
        let running = self.open()?;
        tokio::spawn(async move { drop(ended.send(running.await.map_err(StartError::from))) });
        Ok(driver)
    }

    async fn in_a_thread(self) -> Result<oneshot::Receiver<Result<(), StartError>>, StartError> {
        let (opened, is_open) = oneshot::channel();
        let (ended, driver) = oneshot::channel();
        let run = move || -> Result<(), StartError> {
            let running = match self.open() {
                Ok(running) => running,
                Err(error) => {
                    drop(opened.send(Err(error)));
                    return Ok(());
                }
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(StartError::Thread)?;
            drop(opened.send(Ok(())));
            Ok(runtime.block_on(running)?)
        };
        std::thread::Builder::new()
            .name("endio-conversion".to_owned())
            .spawn(move || drop(ended.send(run())))
            .map_err(StartError::Thread)?;
        is_open.await.map_err(|_| StartError::Ended("driver"))??;
        Ok(driver)
    }
}

fn options(config: &Config) -> MetaOptions {
    MetaOptions {
        chunk_cache_bytes: usize::try_from(config.map_cache_bytes).unwrap_or(usize::MAX),
        sled_cache_bytes: config.sled_cache_bytes,
        checkpoint_journal_bytes: config.checkpoint_journal_bytes,
        ..MetaOptions::default()
    }
}
