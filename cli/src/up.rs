//! `endio up`: all three services in this process, each a library over its own directory.
//!
//! ```text
//!   DIR/conversion   metadata          loopback, any port
//!   DIR/store-1 …    blocks            loopback, any port
//!   DIR/writeback    cache log         --grpc-listen
//! ```
//! They stop in the order in which they need each other: writeback writes out what is dirty while
//! the others still serve, then the block-stores drain, then conversion closes its metadata.

use std::{
    collections::BTreeMap,
    error::Error,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use endio_chassis::{
    admin,
    net::{Dialer, DialerConfig, ListenAddr, Listener},
    recorder::Recorder,
    report,
    shutdown::Shutdown,
    telemetry::{self, TelemetryConfig},
    tls::{Security, TlsConfig, TlsError},
    trace::TraceConfig,
};
use endio_writeback::{engine::Engine, nbd::NbdTls};
use serde_json::json;
use tokio::task::{JoinHandle, JoinSet};

use crate::{
    args::UpArgs,
    failure::{Exit, Failure, Outcome},
};

/// How long the services may take until all of them can work; replaying a long cache log included.
const READY_MAX: Duration = Duration::from_secs(300);
/// Pause between two looks at whether they can.
const READY_LOOK: Duration = Duration::from_millis(20);

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Where everything is kept.
    pub(crate) data_dir: PathBuf,
    /// Where clients reach the writeback service.
    pub(crate) listen: ListenAddr,
    /// Where NBD clients attach.
    pub(crate) nbd_listen: Option<ListenAddr>,
    /// Certificates for NBD clients.
    pub(crate) nbd_tls: Option<NbdTls>,
    pub(crate) nbd_insecure_any_address: bool,
    /// Clients and their volumes over gRPC.
    pub(crate) clients: BTreeMap<String, Vec<String>>,
    /// Whether connections of clients are secured.
    pub(crate) security: Security,
    /// Block-stores, at least; those that have a directory are all started.
    pub(crate) stores: u32,
    /// Capacity in bytes of the block-stores; `None`: as they are, or the default for new ones.
    pub(crate) capacity_bytes: Option<u64>,
}

type Ended = Result<(), Failure>;

/// The services, running.
#[derive(Debug)]
pub(crate) struct Stack {
    /// Url of the writeback service.
    pub(crate) grpc: String,
    /// Url of the conversion service.
    pub(crate) conversion: String,
    /// Urls of the block-stores.
    pub(crate) stores: Vec<String>,
    /// Where NBD clients attach.
    pub(crate) nbd: Option<String>,
    /// The writeback service, as long as it runs.
    engine: Weak<Engine>,
    stop: Shutdown,
    writeback: JoinHandle<Ended>,
    stores_stop: Shutdown,
    store_tasks: JoinSet<Ended>,
    conversion_stop: Shutdown,
    conversion_task: JoinHandle<Ended>,
}

/// `endio up`
pub(crate) async fn run(args: UpArgs, tls_dir: Option<PathBuf>) -> Outcome {
    let what = "start the services";
    let address = |text: &str| {
        text.parse::<ListenAddr>().map_err(|error| Failure::new(Exit::Usage, what, error))
    };
    if !args.allow.is_empty() && tls_dir.is_none() {
        let message = "--allow names certificates, and without --tls-dir there are none";
        return Err(Failure::new(Exit::Usage, what, message));
    }
    let plan = Plan {
        data_dir: args.data_dir,
        listen: address(&args.grpc_listen)?,
        nbd_listen: args.nbd_listen.as_deref().map(address).transpose()?,
        nbd_tls: args.nbd_tls.as_deref().map(|directory| NbdTls {
            required: !args.nbd_tls_optional,
            clients: args.nbd_allow.iter().cloned().collect(),
            ..tls_files(directory)
        }),
        nbd_insecure_any_address: args.nbd_insecure_any_address || args.insecure_any_address,
        clients: args.allow.into_iter().collect(),
        security: security(tls_dir, args.insecure_any_address)?,
        stores: args.stores,
        capacity_bytes: args.capacity.map(|size| size.bytes()),
    };
    let stop = Shutdown::new();
    stop.on_signals().map_err(|error| failed(what, &error))?;
    let stack = start(&plan, stop.clone()).await?;
    let metrics = admin::serve_if(args.metrics_listen.as_deref()).await;
    let metrics = metrics.map_err(|error| failed("serve metrics", &error))?;
    let ready = tokio::select! {
        ready = stack.ready() => ready,
        () = stop.requested() => Ok(()),
    };
    if let Err(failure) = ready {
        stack.stop().await?;
        return Err(failure);
    }
    if !stop.is_requested() {
        stack
            .report(&plan.data_dir, metrics)
            .map_err(|error| failed("report the addresses", &error))?;
    }
    let outcome = stack.wait().await;
    telemetry::flush(telemetry::FLUSH_PATIENCE).await;
    outcome
}

/// Starts all services. They listen when this returns; see [`Stack::ready`].
///
/// # Errors
/// A directory or an address cannot be used; what was started before is stopped.
pub(crate) async fn start(plan: &Plan, stop: Shutdown) -> Outcome<Stack> {
    let what = || format!("start the services in {}", plan.data_dir.display());
    std::fs::create_dir_all(&plan.data_dir).map_err(|error| failed(&what(), &error))?;
    // The log of a laptop says what needs a look; RUST_LOG=info says everything.
    let log_filter = if std::env::var_os("RUST_LOG").is_some() { "" } else { "warn" }.to_owned();
    // One laptop has no collector that a trace could be looked up in later: all are recorded.
    let trace = TraceConfig { ratio: 1.0, ..TraceConfig::default() };
    let config = TelemetryConfig { log_filter, trace, ..TelemetryConfig::default() };
    let recorder = telemetry::init(&config, "endio").map_err(|error| failed(&what(), &error))?;
    // Bound first: of two `endio up`, the second fails before it touches the data.
    let front = plan.security.bind(&plan.listen).await.map_err(|error| match error {
        TlsError::Net(_) => {
            failed(&what(), &error).help("is another `endio up` running? choose --grpc-listen")
        }
        error => failed(&what(), &error),
    })?;

    let conversion_stop = Shutdown::new();
    let conversion = start_conversion(plan, &recorder, &conversion_stop).await?;
    let conversion_url = conversion.url().to_owned();
    let conversion_task = tokio::spawn(async move {
        conversion.wait().await.map_err(|error| failed("run the conversion service", &error))
    });

    let stores_stop = Shutdown::new();
    let mut store_tasks = JoinSet::new();
    let mut stores = Vec::new();
    for number in 1..=store_count(plan) {
        let store = start_store(plan, number, &conversion_url, &recorder, &stores_stop).await?;
        stores.push(store.url());
        store_tasks.spawn(async move {
            let what = format!("run block-store {number}");
            store.wait().await.map_err(|error| failed(&what, &error))
        });
    }

    let config = endio_writeback::Config {
        conversion: conversion_url.clone(),
        cache_dir: plan.data_dir.join("writeback"),
        nbd_listen: plan.nbd_listen.clone(),
        nbd_tls: plan.nbd_tls.clone(),
        nbd_insecure_any_address: plan.nbd_insecure_any_address,
        clients: plan.clients.clone(),
        ..endio_writeback::Config::default()
    };
    let deps = endio_writeback::Deps {
        listener: front,
        dialer: dialer(),
        recorder,
        shutdown: stop.clone(),
    };
    let writeback = endio_writeback::start(config, deps)
        .await
        .map_err(|error| failed("start the writeback service", &error))?;
    let grpc = writeback.url();
    let engine = Arc::downgrade(&writeback.engine());
    let nbd = writeback.nbd_address();
    let writeback = tokio::spawn(async move {
        writeback.wait().await.map_err(|error| failed("run the writeback service", &error))
    });
    Ok(Stack {
        engine,
        grpc,
        conversion: conversion_url,
        stores,
        nbd,
        stop,
        writeback,
        stores_stop,
        store_tasks,
        conversion_stop,
        conversion_task,
    })
}

async fn start_conversion(
    plan: &Plan,
    recorder: &Recorder,
    stop: &Shutdown,
) -> Outcome<endio_conversion::Running> {
    let what = "start the conversion service";
    let listener = Listener::bind(&inner(plan, "conversion")).await;
    let listener = listener.map_err(|error| failed(what, &error))?;
    let config = endio_conversion::Config {
        data_dir: plan.data_dir.join("conversion"),
        // The same threads serve stores and clients here: a commit does not hold them up.
        commit_here_us_max: 0,
        ..endio_conversion::Config::default()
    };
    let deps = endio_conversion::Deps::new(listener, dialer(), recorder.clone(), stop.clone());
    endio_conversion::start(config, deps).await.map_err(|error| failed(what, &error))
}

async fn start_store(
    plan: &Plan,
    number: u32,
    conversion: &str,
    recorder: &Recorder,
    stop: &Shutdown,
) -> Outcome<endio_block_store::Running> {
    let what = format!("start block-store {number}");
    let listener = Listener::bind(&inner(plan, &format!("store-{number}"))).await;
    let listener = listener.map_err(|error| failed(&what, &error))?;
    let config = endio_block_store::Config {
        data_dir: store_dir(&plan.data_dir, number),
        conversion: conversion.to_owned(),
        capacity_bytes: plan.capacity_bytes,
        ..endio_block_store::Config::default()
    };
    let deps = endio_block_store::Deps {
        listener,
        dialer: dialer(),
        recorder: recorder.clone(),
        shutdown: stop.clone(),
    };
    endio_block_store::start(config, deps).await.map_err(|error| failed(&what, &error))
}

/// Where a service that only this process needs listens. Without TLS, on loopback, so that it can be
/// looked at; with TLS, where nobody else can reach it.
fn inner(plan: &Plan, name: &str) -> ListenAddr {
    match plan.security {
        Security::Insecure { .. } => ListenAddr::loopback(),
        Security::Tls(_) => ListenAddr::Memory(format!("up-{name}")),
    }
}

/// `endio up` is for development: to start it without certificates is the choice to do without TLS,
/// but on loopback addresses only.
fn security(dir: Option<PathBuf>, insecure_any_address: bool) -> Outcome<Security> {
    let insecure = dir.is_none();
    let config = TlsConfig { dir, insecure, insecure_any_address, ..TlsConfig::default() };
    if let Some(fault) = config.faults().first() {
        let message = format!("{}: {}", fault.key, fault.message);
        return Err(Failure::new(Exit::Usage, "start the services", message));
    }
    Security::open(&config).map_err(|error| {
        let failure = failed("start the services", &error);
        failure.help("`endio pki issue --service writeback` makes the files of --tls-dir")
    })
}

/// Names of files as libnbd and QEMU have them.
fn tls_files(dir: &Path) -> NbdTls {
    NbdTls {
        certificate: dir.join("server-cert.pem"),
        key: dir.join("server-key.pem"),
        client_authorities: Some(dir.join("ca-cert.pem")),
        required: true,
        clients: BTreeMap::new(),
    }
}

fn dialer() -> Dialer {
    Dialer::new(DialerConfig::default())
}

fn store_dir(data_dir: &Path, number: u32) -> PathBuf {
    data_dir.join(format!("store-{number}"))
}

/// As many as asked for, and all that were started before: their blocks may be in use.
fn store_count(plan: &Plan) -> u32 {
    let mut count = plan.stores;
    while count < 64 && store_dir(&plan.data_dir, count + 1).is_dir() {
        count += 1;
    }
    count
}

impl Stack {
    /// Waits until a write would be taken: writeback has its session and every block-store is live.
    ///
    /// # Errors
    /// That takes too long.
    pub(crate) async fn ready(&self) -> Outcome {
        let is_ready = async {
            loop {
                // Nobody is held up by this look: the engine is let go before the pause.
                let Some(engine) = self.engine.upgrade() else { return };
                let stores = engine.store_list().await;
                let live = stores
                    .map_or(0, |stores| stores.stores.iter().filter(|store| store.live).count());
                let is_connected = engine.status().connected;
                drop(engine);
                if is_connected && live >= self.stores.len() {
                    return;
                }
                tokio::time::sleep(READY_LOOK).await;
            }
        };
        tokio::time::timeout(READY_MAX, is_ready).await.map_err(|_| {
            let message = "the services do not find each other; see the log above";
            Failure::new(Exit::Unreachable, "become ready", message)
        })
    }

    /// One line of JSON on stdout for programs, a few lines on stderr for people.
    fn report(&self, data_dir: &Path, metrics: Option<String>) -> std::io::Result<()> {
        let data_dir = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
        report::ready(
            "endio",
            &self.grpc,
            &[
                ("conversion", json!(self.conversion)),
                ("stores", json!(self.stores)),
                ("nbd", json!(self.nbd)),
                ("metrics", json!(metrics)),
                ("data_dir", json!(data_dir)),
            ],
        )?;
        if self.grpc.starts_with("http:") {
            eprintln!("TLS is off: whoever reaches the ports of this machine may do everything");
        }
        let endpoint = if self.grpc == "http://127.0.0.1:7400" {
            String::new()
        } else {
            format!(" --endpoint {}", self.grpc)
        };
        // Whose certificate, only its owner knows.
        let certificate = if self.grpc.starts_with("https:") { " --tls-dir DIR" } else { "" };
        eprintln!("endio is up: {} with {} block-store(s)", self.grpc, self.stores.len());
        eprintln!("  data        {}", data_dir.display());
        eprintln!("  conversion  {}", self.conversion);
        for store in &self.stores {
            eprintln!("  block-store {store}");
        }
        if let Some(nbd) = &self.nbd {
            eprintln!("  nbd         {nbd}");
        }
        eprintln!("next: endio volume create vol1 --size 8GiB{endpoint}{certificate}");
        eprintln!("Ctrl-C writes out what is dirty and stops");
        Ok(())
    }

    /// Asks all services to stop and waits for them.
    ///
    /// # Errors
    /// The first failure of a service.
    pub(crate) async fn stop(self) -> Outcome {
        self.stop.request();
        self.wait().await
    }

    /// Waits for the stop of writeback, or the failure of any service, and stops the others.
    ///
    /// # Errors
    /// The first failure of a service.
    async fn wait(mut self) -> Outcome {
        let mut outcome = tokio::select! {
            ended = &mut self.writeback => flatten("writeback", ended),
            Some(ended) = self.store_tasks.join_next() => {
                // Without a block-store nothing can be written out; the cache log keeps it.
                self.stop.force();
                let _ = (&mut self.writeback).await;
                flatten("block-store", ended).and_then(|()| Err(early("a block-store")))
            }
            ended = &mut self.conversion_task => {
                self.stop.force();
                let _ = (&mut self.writeback).await;
                self.stores_stop.force();
                while self.store_tasks.join_next().await.is_some() {}
                return flatten("conversion", ended)
                    .and_then(|()| Err(early("the conversion service")));
            }
        };
        self.stores_stop.request();
        while let Some(ended) = self.store_tasks.join_next().await {
            outcome = outcome.and(flatten("block-store", ended));
        }
        self.conversion_stop.request();
        outcome.and(flatten("conversion", (&mut self.conversion_task).await))
    }
}

fn flatten(name: &str, ended: Result<Ended, tokio::task::JoinError>) -> Ended {
    ended.unwrap_or_else(|error| Err(failed(&format!("run the {name} service"), &error)))
}

fn early(who: &str) -> Failure {
    Failure::new(Exit::Failed, "go on", format!("{who} ended by itself"))
}

/// A failure with the whole chain of its causes.
fn failed(what: &str, error: &dyn Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(&format!(": {error}"));
        cause = error.source();
    }
    Failure::new(Exit::Failed, what, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn stores_that_have_a_directory_are_started_although_fewer_are_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let plan = |stores| Plan {
            data_dir: directory.path().into(),
            listen: ListenAddr::loopback(),
            nbd_listen: None,
            nbd_tls: None,
            nbd_insecure_any_address: false,
            clients: BTreeMap::new(),
            security: Security::Insecure { is_any_address: false },
            stores,
            capacity_bytes: None,
        };
        assert_eq!(store_count(&plan(2)), 2);
        for number in 1..=3 {
            std::fs::create_dir(store_dir(directory.path(), number)).unwrap();
        }
        assert_eq!(store_count(&plan(1)), 3);
        assert_eq!(store_count(&plan(4)), 4);
    }
}
