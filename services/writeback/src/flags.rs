//! The command line. What is not given leaves the configuration as it is.

use std::path::PathBuf;

use clap::Parser;
use endio_chassis::net::ListenAddr;
use endio_chassis::tls::TlsFlags;
use serde::Serialize;

/// The dirty cache, direct writes and reads: what clients talk to.
#[derive(Parser, Serialize, Debug, Clone, Default)]
#[command(name = "endio-writeback", version)]
pub struct Flags {
    /// Configuration file (TOML). Environment: `ENDIO_WRITEBACK_KEY`.
    #[arg(long)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Print the effective configuration and end; no data is touched.
    #[arg(long)]
    #[serde(skip)]
    pub check_config: bool,
    /// Address to listen on, e.g. 127.0.0.1:7400; port 0 chooses one.
    #[arg(long)]
    pub listen: Option<ListenAddr>,
    /// Url of the conversion service, e.g. http://127.0.0.1:7401.
    #[arg(long)]
    pub conversion: Option<String>,
    /// Directory of the cache log.
    #[arg(long)]
    pub cache_dir: Option<PathBuf>,
    /// Address of the NBD export.
    #[arg(long)]
    pub nbd_listen: Option<ListenAddr>,
    /// Without TLS for NBD (`nbd_tls`): take addresses that are not loopback. Whoever reaches them
    /// opens every volume.
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub nbd_insecure_any_address: bool,
    /// Where /metrics, /healthz and /readyz are served, e.g. 127.0.0.1:7410; port 0 chooses one.
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<String>,
    /// Whether connections are secured.
    #[command(flatten)]
    pub tls: TlsFlags,
}

/// A flag that was not given leaves the configuration as it is.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}
