//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use endio_types::ByteSize;

use crate::{failure::EXIT_CODES, pki::PkiCommand};

/// Crash-safe, thin-provisioned block volumes.
#[derive(Debug, Parser)]
#[command(name = "endio", version, after_help = EXIT_CODES, propagate_version = true)]
pub(crate) struct Cli {
    /// Where the writeback service answers: http://HOST:PORT, https://HOST:PORT or unix:/PATH.
    /// Default: port 7400 on this machine.
    #[arg(long, global = true, env = "ENDIO_ENDPOINT")]
    pub(crate) endpoint: Option<String>,
    /// Directory of ca.pem, cert.pem and key.pem: show this certificate, and take nobody's word who
    /// cannot show one.
    #[arg(long, global = true, env = "ENDIO_TLS_DIR", value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Print JSON, one object for each answer; errors as JSON on stderr.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Where the writeback service answers.
    pub(crate) fn endpoint(&self) -> &str {
        match (&self.endpoint, &self.tls_dir) {
            (Some(endpoint), _) => endpoint,
            (None, Some(_)) => "https://127.0.0.1:7400",
            (None, None) => "http://127.0.0.1:7400",
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run all three services in this process, over one data directory.
    Up(UpArgs),
    /// Create, list, resize, delete, open and close volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Write standard input into a volume.
    Write(WriteArgs),
    /// Read bytes of a volume to standard output.
    Read(RangeArgs),
    /// Copy a file or block device into a volume; sparse, resumable, survives restarts of services.
    Import(ImportArgs),
    /// Copy a volume into a file; sparse, resumable, survives restarts of services.
    Export(ExportArgs),
    /// Make everything that was acknowledged on a volume durable.
    Fsync {
        /// Volume.
        volume: String,
        /// Keep trying so long while services are away.
        #[arg(long, default_value = "30s", value_parser = parse_duration)]
        patience: std::time::Duration,
    },
    /// Make everything that was acknowledged on every volume durable.
    Sync,
    /// Free a range: it becomes a hole and reads as zeroes.
    Trim(RangeArgs),
    /// Zero a range; it stays allocated.
    Zero(RangeArgs),
    /// Allocate blocks for the holes of a range; they read as zeroes.
    Allocate(RangeArgs),
    /// Show the map of a volume: hole, delayed, unwritten, written, and where.
    Extents(ExtentsArgs),
    /// Show writes in flight: who holds which token until when.
    IoEnds {
        /// Only of this volume.
        #[arg(long)]
        volume: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Ask the service at the endpoint (any of the three) whether it takes work; exit code 0: it does.
    Health {
        /// Full name of a gRPC service, such as endio.writeback.v1.Io. Empty: all of them.
        #[arg(long, default_value = "")]
        service: String,
        /// Wait so long for the answer.
        #[arg(long, default_value = "3s", value_parser = parse_duration)]
        patience: std::time::Duration,
    },
    /// Show block-stores and their space.
    Stores,
    /// Show the state of all services and volumes on one screen, and what is blocked and why.
    Status,
    /// Show rates and latencies of volumes and block-stores, again and again.
    Top(TopArgs),
    /// Copy what cannot be lost, while everything runs.
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Make data directories from backups, offline.
    #[command(subcommand)]
    Restore(RestoreCommand),
    /// Verify the invariants of the whole system, running or stopped.
    Check(CheckArgs),
    /// Show where a write spent its time, across all services.
    Trace(TraceArgs),
    /// Show how NBD clients reach a volume: qemu, libnbd, fio, the kernel.
    Attach(AttachArgs),
    /// Generate load and report throughput and latencies.
    Bench(endio_bench::Options),
    /// Make certificates for mutual TLS, for development.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print a completion script for a shell.
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

/// Rates and latencies.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Time between two looks, 100ms to 1h.
    #[arg(long, default_value = "2s", value_parser = parse_interval)]
    pub(crate) interval: std::time::Duration,
    /// One frame, of one interval, printed plainly.
    #[arg(long, conflicts_with = "iterations")]
    pub(crate) once: bool,
    /// End after so many frames.
    #[arg(long)]
    pub(crate) iterations: Option<u64>,
}

/// What to back up.
#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// The metadata of the conversion service: volumes and where their blocks lie, not the blocks.
    Metadata(BackupArgs),
}

/// Backup of the metadata.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// File to write; must not exist.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

/// What to restore.
#[derive(Debug, Subcommand)]
pub(crate) enum RestoreCommand {
    /// The data directory of the conversion service (`DIR/conversion` of an `endio up`).
    Metadata(RestoreArgs),
}

/// Restoring the metadata.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// File that `endio backup metadata` wrote.
    #[arg(long = "in", value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Data directory of the conversion service; must be empty or absent.
    #[arg(long)]
    pub(crate) data_dir: PathBuf,
    /// Begin with at least this epoch. Without it the epoch leaps by 65536, which is more starts
    /// of the conversion service than there can have been since the backup.
    #[arg(long, default_value_t = 0)]
    pub(crate) epoch_at_least: u64,
    /// What to do with in-place volumes. They have no checksums: of a block that was given to
    /// others since the backup they would read foreign data.
    #[arg(long, value_enum, default_value_t = InPlaceArg::Refuse)]
    pub(crate) in_place: InPlaceArg,
}

/// See [`RestoreArgs::in_place`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum InPlaceArg {
    /// Restore nothing if there are any.
    Refuse,
    /// Delete them.
    Drop,
    /// Keep them: nothing was written, trimmed or deleted since the backup.
    Keep,
}

/// A volume for NBD clients.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Volume.
    pub(crate) volume: String,
    /// Where NBD clients reach the writeback service, IP:PORT or unix:PATH, if not where it says
    /// itself.
    #[arg(long, env = "ENDIO_NBD")]
    pub(crate) nbd: Option<endio_nbd::NbdAddr>,
    /// Attach it read-only.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Directory with ca-cert.pem, client-cert.pem and client-key.pem, for a server with TLS.
    #[arg(long)]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Start the kernel's client (nbd-client) on the first free /dev/nbdN instead; needs root.
    #[arg(long)]
    pub(crate) run: bool,
}

/// Everything in one process.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Where everything is kept; created if absent.
    #[arg(long, default_value = "./endio-data")]
    pub(crate) data_dir: PathBuf,
    /// Where clients reach the writeback service. Port 0 picks a free one.
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub(crate) grpc_listen: String,
    /// Without --tls-dir: take addresses that are not loopback. Whoever reaches them may do
    /// everything.
    #[arg(long)]
    pub(crate) insecure_any_address: bool,
    /// Where NBD clients attach: HOST:PORT or unix:PATH.
    #[arg(long)]
    pub(crate) nbd_listen: Option<String>,
    /// Where /metrics, /healthz and /readyz are served over HTTP, e.g. 127.0.0.1:7410.
    #[arg(long)]
    pub(crate) metrics_listen: Option<String>,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem: NBD clients must use TLS and
    /// show a certificate that this authority signed.
    #[arg(long, requires = "nbd_listen")]
    pub(crate) nbd_tls: Option<PathBuf>,
    /// Without --nbd-tls: take addresses that are not loopback. Whoever reaches them opens every
    /// volume.
    #[arg(long, requires = "nbd_listen")]
    pub(crate) nbd_insecure_any_address: bool,
    /// Let NBD clients in without TLS too; what `--nbd-allow` restricts stays out of their reach.
    #[arg(long, requires = "nbd_tls")]
    pub(crate) nbd_tls_optional: bool,
    /// Volumes that the certificate of this common name may open, such as alice=vol1,vol2@ro or
    /// admin=*; may be repeated. Without any, every certificate opens every volume.
    #[arg(long, requires = "nbd_tls", value_name = "NAME=VOLUMES", value_parser = allowed)]
    pub(crate) nbd_allow: Vec<(String, Vec<String>)>,
    /// Volumes that a client's certificate may use over gRPC, such as alice=vol1,vol2@ro or
    /// ci=scratch@manage; may be repeated; needs --tls-dir. Without any, every client reads and changes
    /// every volume.
    #[arg(long, value_name = "NAME=VOLUMES", value_parser = allowed)]
    pub(crate) allow: Vec<(String, Vec<String>)>,
    /// Block-stores, 1 to 16; as many as the largest number of replicas you want, up to 3, and more
    /// for room.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) stores: u32,
    /// Capacity of each new block-store; space is taken from the disk as it is used.
    #[arg(long)]
    pub(crate) capacity: Option<ByteSize>,
}

/// Reads `NAME=VOLUME,VOLUME`.
fn allowed(text: &str) -> Result<(String, Vec<String>), String> {
    let (name, volumes) = text.split_once('=').ok_or("expected NAME=VOLUME,VOLUME")?;
    let volumes: Vec<String> = volumes.split(',').map(str::to_owned).collect();
    if name.is_empty() || volumes.iter().any(String::is_empty) {
        return Err("expected NAME=VOLUME,VOLUME".to_owned());
    }
    Ok((name.to_owned(), volumes))
}

/// Volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume; the same name with the same properties is no error.
    Create {
        /// 1 to 128 of [A-Za-z0-9._-], starting with a letter or digit.
        name: String,
        /// Size, such as 8GiB; a multiple of 4096 unless growable.
        #[arg(long)]
        size: ByteSize,
        /// Copies of each block, each on another store.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3))]
        replicas: u32,
        /// Overwrite written blocks in place: one replica, no checksums, no redirect on write.
        #[arg(long)]
        in_place: bool,
        /// Writes past the end extend the volume.
        #[arg(long)]
        growable: bool,
    },
    /// List all volumes.
    #[command(visible_alias = "ls")]
    List,
    /// Show one volume.
    Show {
        /// Name.
        name: String,
    },
    /// Set the size. Shrinking frees what lies beyond the new end.
    Resize {
        /// Name.
        name: String,
        /// New size.
        #[arg(long)]
        size: ByteSize,
    },
    /// Delete a volume and everything in it.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name.
        name: String,
    },
    /// Open a volume in this writeback. Other commands do so by themselves if nobody else has it.
    Open {
        /// Name.
        name: String,
        /// Take it from another writeback that may still be alive; that one is fenced.
        #[arg(long)]
        force: bool,
    },
    /// Write out what is dirty, then give the volume up.
    Close {
        /// Name.
        name: String,
    },
}

/// A range of a volume.
#[derive(Debug, Args)]
pub(crate) struct RangeArgs {
    /// Volume.
    pub(crate) volume: String,
    /// First byte.
    #[arg(long, default_value = "0")]
    pub(crate) offset: ByteSize,
    /// Number of bytes.
    #[arg(long)]
    pub(crate) length: ByteSize,
    /// Keep trying so long while services are away, in seconds.
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) patience: std::time::Duration,
}

/// Writing from standard input.
#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// Volume.
    pub(crate) volume: String,
    /// First byte.
    #[arg(long, default_value = "0")]
    pub(crate) offset: ByteSize,
    /// Acknowledge after the conversion instead of from the dirty cache.
    #[arg(long)]
    pub(crate) direct: bool,
    /// Acknowledge only once data and conversion are durable.
    #[arg(long)]
    pub(crate) dsync: bool,
    /// Have it traced by every service, whatever these sample; the answer names the trace.
    #[arg(long)]
    pub(crate) trace: bool,
    /// Keep trying so long without progress while services are away.
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) patience: std::time::Duration,
}

/// What import and export have in common.
#[derive(Debug, Clone, Args)]
pub(crate) struct TransferArgs {
    /// Requests in flight, 1 to 256; each holds up to 1 MiB of memory.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) depth: u16,
    /// Keep trying so long without progress while services are away, full or busy.
    #[arg(long, default_value = "300s", value_parser = parse_duration)]
    pub(crate) patience: std::time::Duration,
    /// Make durable, and remember how far it came, every so many bytes. Smaller: less to repeat
    /// after an interruption. Larger: fewer stops.
    #[arg(long, default_value = "128MiB", value_parser = parse_checkpoint)]
    pub(crate) checkpoint: ByteSize,
    /// State file of an interrupted run; next to FILE unless given.
    #[arg(long)]
    pub(crate) state: Option<PathBuf>,
}

/// Import.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Volume to write into. What it holds beyond the end of FILE stays as it is.
    pub(crate) volume: String,
    /// File or block device to read.
    pub(crate) file: PathBuf,
    /// Create the volume, as large as FILE, if there is none.
    #[arg(long)]
    pub(crate) create: bool,
    /// Replicas of a volume that is created.
    #[arg(long, default_value_t = 1, requires = "create",
          value_parser = clap::value_parser!(u32).range(1..=3))]
    pub(crate) replicas: u32,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
}

/// Export.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Volume to read. Writes made meanwhile may or may not be in the copy.
    pub(crate) volume: String,
    /// File to write.
    pub(crate) file: PathBuf,
    /// Replace FILE if it exists.
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
}

/// Which part of a map to show.
#[derive(Debug, Args)]
pub(crate) struct ExtentsArgs {
    /// Volume.
    pub(crate) volume: String,
    /// First byte.
    #[arg(long, default_value = "0")]
    pub(crate) offset: ByteSize,
    /// Number of bytes; to the end unless given.
    #[arg(long)]
    pub(crate) length: Option<ByteSize>,
}

/// Check.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Also read every block of every replica and compare it with its checksum (the default).
    #[arg(long, overrides_with = "no_data")]
    pub(crate) read_data: bool,
    /// Check metadata only.
    #[arg(long)]
    pub(crate) no_data: bool,
    /// Check the data of a stopped `endio up`: its services run, on private addresses, for the time
    /// of the check. Refused while another process has the data.
    #[arg(long)]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Trace.
#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// A trace id (32 hexadecimal digits), or VOLUME:OFFSET for the latest write there
    /// (or read, if there was no write).
    /// Without it, the latest traces are listed.
    #[arg(conflicts_with = "last")]
    pub(crate) target: Option<String>,
    /// List so many of the latest traces.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) last: Option<u32>,
    /// Width of the bars in characters.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(8..=200))]
    pub(crate) width: u16,
}

/// `300s`, `5m`, `2h`, `250ms`, or plain seconds.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "a whole number with s, m, h or ms")?;
    let ms = match unit {
        "ms" => 1,
        "s" | "" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        other => return Err(format!("unknown unit {other:?}: use ms, s, m or h")),
    };
    let ms = number.checked_mul(ms).ok_or("too long")?;
    Ok(std::time::Duration::from_millis(ms))
}

fn parse_interval(text: &str) -> Result<std::time::Duration, String> {
    let interval = parse_duration(text)?;
    if !(100..=3_600_000).contains(&interval.as_millis()) {
        return Err("must be 100ms to 1h".into());
    }
    Ok(interval)
}

fn parse_checkpoint(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    let min = 1 << 20;
    if size.bytes() < min || !size.bytes().is_multiple_of(min) {
        return Err("must be a multiple of 1MiB, and at least that".into());
    }
    Ok(size)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_parse_with_their_units() {
        assert_eq!(parse_duration("300s").unwrap(), Duration::from_secs(300));
        assert_eq!(parse_duration("5").unwrap(), Duration::from_secs(5));
        assert_eq!(parse_duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_duration("2h").unwrap(), Duration::from_secs(7200));
        assert!(parse_duration("s").is_err());
        assert!(parse_duration("1d").is_err());
        assert!(parse_duration("18446744073709551615h").is_err());
    }

    #[test]
    fn endpoint_and_json_are_accepted_after_the_command() {
        let args = [
            "endio",
            "volume",
            "create",
            "v",
            "--size",
            "8GiB",
            "--json",
            "--endpoint",
            "http://x:1",
        ];
        let cli = Cli::try_parse_from(args).unwrap();
        assert!(cli.json);
        assert_eq!(cli.endpoint(), "http://x:1");
        let Command::Volume(VolumeCommand::Create { size, replicas, .. }) = cli.command else {
            panic!("parsed as {:?}", cli.command)
        };
        assert_eq!((size.bytes(), replicas), (8 << 30, 1));
    }

    #[test]
    fn with_a_certificate_the_default_endpoint_is_secured() {
        let cli = Cli::try_parse_from(["endio", "sync", "--tls-dir", "d"]).unwrap();
        assert_eq!(cli.endpoint(), "https://127.0.0.1:7400");
    }

    #[test]
    fn up_needs_no_flags() {
        let cli = Cli::try_parse_from(["endio", "up"]).unwrap();
        let Command::Up(up) = cli.command else { panic!("parsed as {:?}", cli.command) };
        assert_eq!(up.grpc_listen, "127.0.0.1:7400");
        assert_eq!((up.stores, up.capacity), (1, None));
    }

    #[test]
    fn a_checkpoint_is_a_multiple_of_the_largest_write() {
        assert!(parse_checkpoint("1MiB").is_ok());
        assert!(parse_checkpoint("0").is_err());
        assert!(parse_checkpoint("1500k").is_err());
    }
}
