//! `endio-writeback`: the writeback service as a process of its own.

use clap::Parser as _;
use endio_chassis::{admin, config, report, runtime, shutdown::Shutdown, telemetry, tls::Security};
use endio_writeback::{Config, Deps, Flags, start};

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let config: Config = config::load(flags.config.as_deref(), "ENDIO_WRITEBACK", &flags)?;
    if flags.check_config {
        print!("{}", config::effective(&config));
        return Ok(());
    }
    runtime::block_on(config.server.worker_threads, serve(config))?
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let recorder = telemetry::init(&config.telemetry, "endio-writeback")?;
    config::log_effective(&config);
    let shutdown = Shutdown::new();
    shutdown.on_signals()?;
    let metrics = admin::serve_if(config.metrics_listen.as_deref()).await?;
    let security = Security::open(&config.tls)?;
    let listener = security.bind(&config.listen).await?;
    let dialer = security.dialer(config.dialer.clone());
    let running = start(config, Deps { listener, dialer, recorder, shutdown }).await?;
    let nbd = running.nbd_address();
    let extra = [("nbd", nbd.into()), ("metrics", metrics.into())];
    report::ready("writeback", &running.url(), &extra)?;
    let outcome = running.wait().await;
    telemetry::flush(telemetry::FLUSH_PATIENCE).await;
    Ok(outcome?)
}
