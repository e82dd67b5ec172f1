//! The `endio` command.
//!
//! Each command is a thin client of the writeback service, but for `up` and `check --data-dir`, which
//! run all services in this process.

mod args;
mod attach;
mod backup;
mod client;
mod commands;
mod failure;
mod health;
mod inspect;
mod output;
mod pki;
mod status;
mod top;
mod trace;
mod transfer;
mod up;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use endio_api::access;

use crate::{
    args::{BackupCommand, Cli, Command, RestoreCommand},
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::Output,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, "start the runtime", error))
        .and_then(|runtime| runtime.block_on(run(cli)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if json {
                eprintln!("{}", failure.json());
            } else {
                eprintln!("error: {failure}");
            }
            ExitCode::from(failure.exit as u8)
        }
    }
}

/// Stands for a service where none is needed; nothing connects to it.
const NOBODY: &str = "memory:nobody";

/// Who may answer a command, as its certificate says.
fn peer(command: &Command) -> &'static str {
    match command {
        // Any of the three services says whether it is healthy.
        Command::Health { .. } => access::SERVICE,
        // Data goes to a writeback, and nobody else may say that it is durable.
        _ => access::WRITEBACK,
    }
}

async fn run(cli: Cli) -> Outcome {
    let out = Output { json: cli.json };
    let tls_dir = cli.tls_dir.as_deref();
    let client = match &cli.command {
        // These talk to no service.
        Command::Up(_) | Command::Pki(_) | Command::Completions { .. } => Client::new(NOBODY)?,
        command => Client::secured(cli.endpoint(), tls_dir, peer(command))?,
    };
    match cli.command {
        Command::Up(args) => up::run(args, cli.tls_dir).await,
        Command::Pki(command) => pki::run(out, command),
        Command::Volume(command) => commands::volume(&client, out, command).await,
        Command::Write(args) => commands::write(&client, out, args).await,
        Command::Read(args) => commands::read(&client, &args).await,
        Command::Import(args) => transfer::import::run(&client, out, args).await,
        Command::Export(args) => transfer::export::run(&client, out, args).await,
        Command::Fsync { volume, patience } => {
            commands::fsync(&client, out, volume, patience).await
        }
        Command::Sync => commands::sync(&client, out).await,
        Command::Trim(args) => commands::range(&client, out, args, "trim").await,
        Command::Zero(args) => commands::range(&client, out, args, "zero").await,
        Command::Allocate(args) => commands::range(&client, out, args, "allocate").await,
        Command::Extents(args) => inspect::extents(&client, out, args).await,
        Command::IoEnds { volume, limit } => inspect::io_ends(&client, out, volume, limit).await,
        Command::Health { service, patience } => health::run(&client, out, service, patience).await,
        Command::Stores => inspect::stores(&client, out).await,
        Command::Status => status::run(&client, out).await,
        Command::Top(args) => top::run(&client, out, args).await,
        Command::Backup(BackupCommand::Metadata(args)) => backup::backup(&client, out, args).await,
        Command::Restore(RestoreCommand::Metadata(args)) => backup::restore(out, &args),
        Command::Check(args) => inspect::check(&client, out, args).await,
        Command::Trace(args) => trace::run(&client, out, args).await,
        Command::Attach(args) => attach::run(&client, out, args).await,
        Command::Bench(options) => commands::bench(&client, out, options).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "endio", &mut std::io::stdout());
            Ok(())
        }
    }
}
