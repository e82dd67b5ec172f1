//! `endio-conversion`: the conversion service as a process of its own.

use clap::Parser as _;
use endio_chassis::net::DialerConfig;
use endio_chassis::{admin, config, report, runtime, shutdown::Shutdown, telemetry, tls::Security};
use endio_conversion::{Config, Deps, Flags, start};

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let config: Config = config::load(flags.config.as_deref(), "ENDIO_CONVERSION", &flags)?;
    if flags.check_config {
        print!("{}", config::effective(&config));
        return Ok(());
    }
    runtime::block_on(config.server.worker_threads, serve(config))?
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let recorder = telemetry::init(&config.telemetry, "endio-conversion")?;
    config::log_effective(&config);
    let shutdown = Shutdown::new();
    shutdown.on_signals()?;
    let metrics = admin::serve_if(config.metrics_listen.as_deref()).await?;
    let security = Security::open(&config.tls)?;
    let listener = security.bind(&config.listen).await?;
    let dialer = security.dialer(DialerConfig::default());
    // Its peers' messages then reach the driver without a change of threads.
    let deps = Deps { has_own_thread: false, ..Deps::new(listener, dialer, recorder, shutdown) };
    let running = start(config, deps).await?;
    report::ready("conversion", running.url(), &[("metrics", metrics.into())])?;
    let outcome = running.wait().await;
    telemetry::flush(telemetry::FLUSH_PATIENCE).await;
    Ok(outcome?)
}
