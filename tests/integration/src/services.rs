//! Conversion and block-stores in this process.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use endio_chassis::net::{Dialer, DialerConfig, ListenAddr, Listener};
use endio_chassis::recorder::Recorder;
use endio_chassis::shutdown::Shutdown;
use endio_chassis::telemetry::{self, TelemetryConfig};
use endio_chassis::trace::TraceConfig;
use endio_store::block::{BlockDevice, MemoryDevice, Superblock};
use endio_types::{Incarnation, Pblk, PblkRange};

/// Blocks of each store unless a test says otherwise: 64 MiB.
pub const STORE_BLOCKS: u64 = 16 << 10;
/// Longest wait for a stop.
pub(crate) const STOP_WAIT: Duration = Duration::from_secs(30);

/// The one recorder of this process.
pub fn recorder() -> Recorder {
    let trace = TraceConfig { ratio: 1.0, ..TraceConfig::default() };
    let config = TelemetryConfig { trace, ..TelemetryConfig::default() };
    telemetry::init(&config, "endio-tests").expect("the default filter can be read")
}

pub(crate) fn dialer() -> Dialer {
    Dialer::new(DialerConfig::default())
}

pub(crate) async fn bind(addr: &str) -> Listener {
    let addr: ListenAddr = addr.parse().expect("an address");
    // The port of a service that has just stopped may be taken for a moment.
    for _ in 0..100 {
        if let Ok(listener) = Listener::bind(&addr).await {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{addr} stays taken")
}

pub(crate) fn address(url: &str) -> &str {
    url.trim_start_matches("http://")
}

/// A conversion service.
pub struct Conversion {
    /// Where it answers.
    pub url: String,
    /// Its configuration, for the next start.
    pub config: endio_conversion::Config,
    shutdown: Shutdown,
    running: Option<endio_conversion::Running>,
}

impl Conversion {
    /// Starts one in `directory`.
    pub async fn start(directory: &Path) -> Self {
        let config = endio_conversion::Config {
            data_dir: directory.join("conversion"),
            ..endio_conversion::Config::default()
        };
        Self::start_with(config).await
    }

    /// Starts one with this configuration.
    pub async fn start_with(config: endio_conversion::Config) -> Self {
        let mut conversion =
            Self { url: String::new(), config, shutdown: Shutdown::new(), running: None };
        conversion.launch("127.0.0.1:0").await;
        conversion
    }

    async fn launch(&mut self, listen: &str) {
        let listener = bind(listen).await;
        self.url = listener.url().to_owned();
        self.shutdown = Shutdown::new();
        let deps =
            endio_conversion::Deps::new(listener, dialer(), recorder(), self.shutdown.clone());
        let running = endio_conversion::start(self.config.clone(), deps).await;
        self.running = Some(running.expect("conversion starts"));
    }

    /// Stops it; it must drain.
    pub async fn stop(&mut self) {
        self.shutdown.request();
        if let Some(running) = self.running.take() {
            let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
            ended.expect("conversion stops in time").expect("conversion drains");
        }
    }

    /// Stops it and starts it again on the same port: a new epoch.
    pub async fn restart(&mut self) {
        self.stop().await;
        let url = self.url.clone();
        self.launch(address(&url)).await;
    }
}

/// A device in memory behind a gate: what is asked of it waits while the gate is closed, and
/// fails while it is broken.
#[derive(Debug)]
pub struct GatedDevice {
    /// What lies behind the gate.
    pub memory: MemoryDevice,
    gate: Mutex<Gate>,
    changed: Condvar,
    flushes: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Gate {
    Open,
    Closed,
    Broken,
}

impl GatedDevice {
    fn new(blocks: u64) -> Self {
        let memory = MemoryDevice::new(blocks);
        let (gate, changed) = (Mutex::new(Gate::Open), Condvar::new());
        Self { memory, gate, changed, flushes: AtomicU64::new(0) }
    }

    /// Flushes that it was asked for.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    fn set(&self, gate: Gate) {
        *self.gate.lock().expect("no holder panics") = gate;
        self.changed.notify_all();
    }

    /// From now on writes and flushes wait.
    pub fn close(&self) {
        self.set(Gate::Closed);
    }

    /// Everything that waits goes on.
    pub fn open(&self) {
        self.set(Gate::Open);
    }

    /// From now on writes and flushes fail with EIO.
    pub fn break_down(&self) {
        self.set(Gate::Broken);
    }

    fn pass(&self) -> io::Result<()> {
        let gate = self.gate.lock().expect("no holder panics");
        let is_closed = |gate: &mut Gate| *gate == Gate::Closed;
        let gate = self.changed.wait_while(gate, is_closed).expect("no holder panics");
        if *gate == Gate::Broken { Err(io::Error::other("broken on purpose")) } else { Ok(()) }
    }
}

impl BlockDevice for GatedDevice {
    fn capacity_blocks(&self) -> u64 {
        self.memory.capacity_blocks()
    }

    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        self.pass()?;
        self.memory.write_at(pblk, data)
    }

    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        self.memory.read_at(pblk, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.pass()?;
        self.memory.flush()
    }

    fn punch(&self, range: PblkRange) -> io::Result<()> {
        self.memory.punch(range)
    }

    fn used_blocks(&self) -> io::Result<u64> {
        self.memory.used_blocks()
    }
}

/// A block-store over a device in memory that fails when it is told to.
pub struct Store {
    /// Where it answers.
    pub url: String,
    /// What it writes to.
    pub device: Arc<GatedDevice>,
    superblock: Superblock,
    conversion: String,
    shutdown: Shutdown,
    running: Option<endio_block_store::Running>,
}

impl Store {
    /// Starts one of [`STORE_BLOCKS`].
    pub async fn start(conversion: &str) -> Self {
        Self::start_with(conversion, STORE_BLOCKS).await
    }

    /// Starts one of so many blocks.
    pub async fn start_with(conversion: &str, blocks: u64) -> Self {
        let superblock = Superblock {
            sequence: 1,
            uuid: rand::random(),
            incarnation: Incarnation(0),
            capacity_blocks: blocks,
        };
        let mut store = Self {
            url: String::new(),
            device: Arc::new(GatedDevice::new(blocks)),
            superblock,
            conversion: conversion.to_owned(),
            shutdown: Shutdown::new(),
            running: None,
        };
        store.launch("127.0.0.1:0").await;
        store
    }

    async fn launch(&mut self, listen: &str) {
        let listener = bind(listen).await;
        self.url = listener.url().to_owned();
        self.shutdown = Shutdown::new();
        self.superblock.incarnation.0 += 1;
        let config = endio_block_store::Config {
            conversion: self.conversion.clone(),
            ..endio_block_store::Config::default()
        };
        let deps = endio_block_store::Deps {
            listener,
            dialer: dialer(),
            recorder: recorder(),
            shutdown: self.shutdown.clone(),
        };
        let device: Arc<dyn BlockDevice> = self.device.clone();
        let running = endio_block_store::start_on(config, deps, device, self.superblock).await;
        self.running = Some(running.expect("the block-store starts"));
    }

    /// Stops it; it must drain.
    pub async fn stop(&mut self) {
        self.shutdown.request();
        if let Some(running) = self.running.take() {
            let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
            ended.expect("the block-store stops in time").expect("the block-store drains");
        }
    }

    /// Ends it without draining, as a crash would. What it has not flushed may be lost with
    /// [`MemoryDevice::lose_power`].
    pub async fn crash(&mut self) {
        self.shutdown.force();
        if let Some(running) = self.running.take() {
            let ended = tokio::time::timeout(STOP_WAIT, running.wait()).await;
            // A stop that does not drain says so; that is what a crash is.
            let _ = ended.expect("a forced stop ends in time");
        }
    }

    /// Starts it again after it ended, on the same port: a new incarnation.
    pub async fn start_again(&mut self) {
        let url = self.url.clone();
        self.launch(address(&url)).await;
    }
}
