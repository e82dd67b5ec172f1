//! The block-store process.

use clap::Parser as _;
use endio_block_store::{Config, Deps, Flags, start};
use endio_chassis::{
    admin, config, net::DialerConfig, report, runtime, shutdown::Shutdown, telemetry, tls::Security,
};

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let config: Config = config::load(flags.config.as_deref(), "ENDIO_BLOCK_STORE", &flags)?;
    if flags.check_config {
        print!("{}", config::effective(&config));
        return Ok(());
    }
    runtime::block_on(config.server.worker_threads, serve(config))?
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let recorder = telemetry::init(&config.telemetry, "endio-block-store")?;
    config::log_effective(&config);
    let shutdown = Shutdown::new();
    shutdown.on_signals()?;
    let metrics = admin::serve_if(config.metrics_listen.as_deref()).await?;
    let security = Security::open(&config.tls)?;
    let listener = security.bind(&config.listen).await?;
    let dialer = security.dialer(DialerConfig::default());
    let running = start(config, Deps { listener, dialer, recorder, shutdown }).await?;
    report::ready("block-store", &running.url(), &[("metrics", metrics.into())])?;
    let outcome = running.wait().await;
    telemetry::flush(telemetry::FLUSH_PATIENCE).await;
    Ok(outcome?)
}
