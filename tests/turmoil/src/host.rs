//! The services as hosts of the simulation.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use endio_chassis::net::DialerConfig;
use endio_chassis::recorder::Recorder;
use endio_chassis::server::ServerConfig;
use endio_chassis::shutdown::Shutdown;
use endio_state_machine::limits::Limits;
use endio_store::block::{BlockDevice, OpenBlockFile};
use tokio::sync::mpsc;

use crate::device::MortalDevice;
use crate::net;
use crate::plan::{Plan, Who};

/// Bytes of each store.
const STORE_BYTES: u64 = 64 << 20;
/// Starts that find the directory still locked by threads of the process before.
const LOCKED_MAX: usize = 400;

/// What a host is told while it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Command {
    Stop,
    Jump(Duration),
}

/// One host: its directory, and how it is reached from outside of the simulation.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) who: Who,
    directory: PathBuf,
    plan: Plan,
    commands: RefCell<Option<mpsc::Sender<Command>>>,
    device: RefCell<Option<Arc<MortalDevice>>>,
    pub(crate) starts: Cell<u64>,
}

pub(crate) fn port(who: Who) -> u16 {
    match who {
        Who::Writeback(_) => 7400,
        Who::Conversion | Who::Client => 7401,
        Who::Store(_) => 7402,
    }
}

pub(crate) fn url(who: Who) -> String {
    format!("http://{who}:{}", port(who))
}

/// Peers that fell silent are noticed within a second or so.
pub(crate) fn dialing() -> DialerConfig {
    DialerConfig {
        connect_timeout_ms: 500,
        keepalive_interval_ms: 400,
        keepalive_timeout_ms: 600,
        ..DialerConfig::default()
    }
}

fn serving(unary_timeout_ms: u64) -> ServerConfig {
    ServerConfig {
        keepalive_interval_ms: 500,
        keepalive_timeout_ms: 800,
        drain_timeout_ms: 500,
        unary_timeout_ms,
        ..ServerConfig::default()
    }
}

impl Slot {
    pub(crate) fn new(who: Who, directory: PathBuf, plan: Plan) -> Self {
        let (commands, device) = Default::default();
        Self { who, directory, plan, commands, device, starts: Cell::new(0) }
    }

    /// Tells the process something, if it runs.
    pub(crate) fn tell(&self, command: Command) {
        if let Some(commands) = &*self.commands.borrow() {
            // One that has just ended, or has sixteen orders waiting, is not told.
            let _ = commands.try_send(command);
        }
    }

    /// From now on the device of a store fails to write, or works again, until the process ends.
    pub(crate) fn break_device(&self, is_broken: bool) {
        if let Some(device) = &*self.device.borrow() {
            device.set_broken(is_broken);
        }
    }

    /// The process is about to die: its threads do no more.
    pub(crate) fn die(&self) {
        self.commands.replace(None);
        if let Some(device) = self.device.take() {
            device.die();
        }
    }

    /// The life of the process. An orderly stop that was asked for ends well.
    pub(crate) async fn run(&self) -> turmoil::Result {
        self.starts.set(self.starts.get() + 1);
        let (tell, commands) = mpsc::channel(16);
        self.commands.replace(Some(tell));
        let shutdown = Shutdown::new();
        let life = async {
            match self.who {
                Who::Conversion => self.conversion(&shutdown).await,
                Who::Store(_) => self.store(&shutdown).await,
                Who::Writeback(_) => self.writeback(&shutdown).await,
                Who::Client => anyhow::bail!("the client is no service"),
            }
        };
        let ended = obey(life, commands, &shutdown).await;
        match ended {
            // What a stop could not drain in time is named, and left: that is its right.
            _ if shutdown.is_requested() => Ok(()),
            Ok(()) => Err(format!("{} ended by itself", self.who).into()),
            Err(error) => Err(format!("{} failed: {error:#}", self.who).into()),
        }
    }

    async fn conversion(&self, shutdown: &Shutdown) -> anyhow::Result<()> {
        let plan = &self.plan;
        let config = endio_conversion::Config {
            data_dir: self.directory.clone(),
            map_cache_bytes: 1 << 20,
            sled_cache_bytes: 1 << 20,
            checkpoint_journal_bytes: 1 << 16,
            drain_deadline_ms: 1_000,
            limits: Limits {
                lease_ms: plan.lease_ms,
                io_end_life_max_ms: u64::from(plan.lease_ms) * 4,
                punch_interval_ms: 100,
                punch_run_blocks: 4,
                punch_idle_ms: 200,
                unpunched_blocks_max: 256,
                reuse_blocks: 64,
                ..Limits::default()
            },
            server: serving(10_000),
            ..endio_conversion::Config::default()
        };
        let mut tries = 0;
        let running = loop {
            let listener = net::listen(&self.who.to_string(), port(self.who)).await?;
            let (dialer, recorder) = (net::dialer(dialing()), Recorder::default());
            let deps = endio_conversion::Deps {
                has_own_thread: false,
                ..endio_conversion::Deps::new(listener, dialer, recorder, shutdown.clone())
            };
            match endio_conversion::start(config.clone(), deps).await {
                Ok(running) => break running,
                Err(error) => self.again(&mut tries, error.into()).await?,
            }
        };
        Ok(running.wait().await?)
    }

    async fn store(&self, shutdown: &Shutdown) -> anyhow::Result<()> {
        let config = endio_block_store::Config {
            conversion: url(Who::Conversion),
            register_timeout_ms: 1_000,
            reconnect_max_ms: 200,
            lease_margin_ms: 100,
            drain_timeout_ms: 500,
            server: serving(10_000),
            ..endio_block_store::Config::default()
        };
        let open = OpenBlockFile {
            dir: self.directory.clone(),
            capacity_blocks: Some(STORE_BYTES / endio_types::BLOCK_BYTES),
            new_uuid: rand::random(),
            direct_write_bytes_min: None,
        };
        let mut tries = 0;
        let file = loop {
            match open.clone().open() {
                Ok(file) => break file,
                Err(error) => self.again(&mut tries, error.into()).await?,
            }
        };
        let superblock = file.superblock();
        let device = Arc::new(MortalDevice::new(file));
        self.device.replace(Some(Arc::clone(&device)));
        let device: Arc<dyn BlockDevice> = device;
        let listener = net::listen(&self.who.to_string(), port(self.who)).await?;
        let deps = endio_block_store::Deps {
            listener,
            dialer: net::dialer(dialing()),
            recorder: Recorder::default(),
            shutdown: shutdown.clone(),
        };
        let running = endio_block_store::start_on(config, deps, device, superblock).await?;
        Ok(running.wait().await?)
    }

    async fn writeback(&self, shutdown: &Shutdown) -> anyhow::Result<()> {
        let plan = &self.plan;
        let config = endio_writeback::Config {
            conversion: url(Who::Conversion),
            cache_dir: self.directory.clone(),
            io_timeout_ms: plan.io_timeout_ms,
            write_out_after_ms: plan.write_out_after_ms,
            dirty_bytes_soft: 1 << 20,
            dirty_bytes_max: 8 << 20,
            credit_low_blocks: 64,
            credit_high_blocks: 512,
            credit_step_blocks: 128,
            log_segment_bytes: 1 << 20,
            log_bytes_max: 32 << 20,
            retry_max_ms: 200,
            reconnect_max_ms: 200,
            connect_timeout_ms: 500,
            call_timeout_ms: 1_500,
            confirm_every_ms: 50,
            drain_deadline_ms: 1_500,
            // Reads say how blocks lie only where they are not in memory.
            read_cache_bytes: if plan.defragments { 0 } else { 128 << 20 },
            defragment_bytes_per_s: if plan.defragments { 1 << 30 } else { 0 },
            defragment_after_ms: 0,
            write_around_bytes: if plan.goes_around { 4_096 } else { 256 << 10 },
            write_around_patience_ms: plan.io_timeout_ms / 8,
            server: serving(plan.io_timeout_ms + 5_000),
            dialer: dialing(),
            ..endio_writeback::Config::default()
        };
        let mut tries = 0;
        let running = loop {
            let listener = net::listen(&self.who.to_string(), port(self.who)).await?;
            let deps = endio_writeback::Deps {
                listener,
                dialer: net::dialer(dialing()),
                recorder: Recorder::default(),
                shutdown: shutdown.clone(),
            };
            match endio_writeback::start(config.clone(), deps).await {
                Ok(running) => break running,
                Err(error) => self.again(&mut tries, error.into()).await?,
            }
        };
        Ok(running.wait().await?)
    }

    /// A start failed. Threads of the process before may have the lock for a moment.
    async fn again(&self, tries: &mut usize, error: anyhow::Error) -> anyhow::Result<()> {
        *tries += 1;
        if *tries > LOCKED_MAX {
            return Err(error).context("it does not start");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        Ok(())
    }
}

async fn obey<T>(
    life: impl Future<Output = T>,
    mut commands: mpsc::Receiver<Command>,
    shutdown: &Shutdown,
) -> T {
    tokio::pin!(life);
    loop {
        tokio::select! {
            biased;
            ended = &mut life => return ended,
            Some(command) = commands.recv() => match command {
                Command::Stop => shutdown.request(),
                Command::Jump(ahead) => tokio::time::advance(ahead).await,
            },
        }
    }
}
