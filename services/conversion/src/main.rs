//! `endio-conversion`: the conversion service as a process of its own.

use std::path::PathBuf;

use clap::Parser;
use endio_chassis::net::{Dialer, DialerConfig, ListenAddr, Listener};
use endio_chassis::{config, report, shutdown::Shutdown, telemetry};
use endio_conversion::{Config, Deps, start};
use serde::Serialize;

/// Owns volumes, the extent map, free space and the ledger of io_ends.
#[derive(Parser, Serialize)]
#[command(version)]
struct Flags {
    /// Configuration file (TOML). Environment: `ENDIO_CONVERSION_KEY`.
    #[arg(long)]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Directory of the metadata.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Address to listen on, e.g. 127.0.0.1:7401; port 0 chooses one.
    #[arg(long)]
    listen: Option<ListenAddr>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let config: Config = config::load(flags.config.as_deref(), "ENDIO_CONVERSION", &flags)?;
    let recorder = telemetry::init(&config.telemetry)?;
    config::log_effective(&config);
    let shutdown = Shutdown::new();
    shutdown.on_signals()?;
    let listener = Listener::bind(&config.listen).await?;
    let deps = Deps::new(listener, Dialer::new(DialerConfig::default()), recorder, shutdown);
    let running = start(config, deps).await?;
    report::ready("conversion", running.url(), &[])?;
    Ok(running.wait().await?)
}
