//! Serves disks in memory: `cargo run -p endio-nbd --example memory -- --listen 127.0.0.1:10809`.
//!
//! Prints one line with the address on standard output and serves until its standard input ends or
//! it is interrupted.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use endio_nbd::memory::{FixedExports, MemoryExport};
use endio_nbd::tls::{Tls, TlsFiles};
use endio_nbd::{Export, ExportInfo, Limits, NbdAddr, NbdListener, Server};
use tokio::io::AsyncReadExt;

/// Serves disks in memory over NBD.
#[derive(Parser)]
struct Args {
    /// `IP:PORT` or `unix:PATH`.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: NbdAddr,
    /// Size of each disk in bytes.
    #[arg(long, default_value_t = 1 << 30)]
    size: u64,
    /// Names of the disks.
    #[arg(long = "export", default_values_t = ["disk".to_owned()])]
    exports: Vec<String>,
    /// Most memory that each disk takes, in bytes.
    #[arg(long, default_value_t = 1 << 30)]
    memory: u64,
    /// Adds an export `read-only` of the same size.
    #[arg(long)]
    read_only: bool,
    /// Certificate chain of the server, PEM.
    #[arg(long, requires = "key")]
    certificate: Option<PathBuf>,
    /// Private key of the server, PEM.
    #[arg(long)]
    key: Option<PathBuf>,
    /// Authorities that sign client certificates, PEM.
    #[arg(long)]
    client_authorities: Option<PathBuf>,
    /// Refuses clients that do not start TLS.
    #[arg(long)]
    require_tls: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let disk = |name: &str, is_read_only| -> Arc<dyn Export> {
        let mut info = ExportInfo::new(name, args.size);
        info.description = format!("{} bytes of memory", args.size);
        info.can_multi_conn = true;
        info.is_read_only = is_read_only;
        Arc::new(MemoryExport::new(info, args.memory))
    };
    let mut disks: Vec<_> = args.exports.iter().map(|name| disk(name, false)).collect();
    if args.read_only {
        disks.push(disk("read-only", true));
    }
    let mut server = Server::new(Arc::new(FixedExports::new(disks)), Limits::default());
    if let (Some(certificate), Some(key)) = (args.certificate, args.key) {
        let files = TlsFiles { certificate, key, client_authorities: args.client_authorities };
        server = server.with_tls(Tls::load(&files, args.require_tls).context("TLS")?);
    }
    let listener = NbdListener::bind(&args.listen).await?;
    println!("{}", listener.address());
    let serving = tokio::spawn(listener.serve(server.clone()));
    let mut ignored = [0; 64];
    let mut input = tokio::io::stdin();
    loop {
        tokio::select! {
            read = input.read(&mut ignored) => match read {
                Ok(length) if length > 0 => {}
                _ => break,
            },
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    server.stop();
    serving.await?;
    server.drained().await;
    Ok(())
}
