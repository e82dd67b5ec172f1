//! `endio pki`: certificates for development.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use endio_pki::{Request, Subject};
use serde_json::json;

use crate::{
    args::parse_duration,
    failure::{Exit, Failure, Outcome},
    output::Output,
};

/// Certificates for mutual TLS.
#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a development authority: ca.pem and ca-key.pem.
    Init(InitArgs),
    /// Make ca.pem, cert.pem and key.pem for a service, a client or an admin.
    Issue(IssueArgs),
}

/// An authority.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Directory of the authority; created if absent.
    #[arg(long)]
    dir: PathBuf,
    /// How long it counts, e.g. 87600h.
    #[arg(long, default_value = "87600h", value_parser = parse_duration)]
    valid_for: Duration,
    /// Succeed if there is an authority already; it stays.
    #[arg(long)]
    if_missing: bool,
}

/// A certificate.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("subject").required(true).args(["service", "client", "admin"])))]
pub(crate) struct IssueArgs {
    /// Directory of the authority.
    #[arg(long)]
    dir: PathBuf,
    /// For a service of this kind.
    #[arg(long, requires = "name", value_name = "KIND")]
    service: Option<Kind>,
    /// Name of the service's instance.
    #[arg(long, conflicts_with_all = ["client", "admin"])]
    name: Option<String>,
    /// For a client of that name.
    #[arg(long, value_name = "NAME")]
    client: Option<String>,
    /// For an operator of that name.
    #[arg(long, value_name = "NAME")]
    admin: Option<String>,
    /// DNS name or IP address at which a service is reached; repeat it for several. None: this
    /// machine (localhost, 127.0.0.1, ::1).
    #[arg(long = "san", value_name = "HOST")]
    sans: Vec<String>,
    /// Where the files go; created if absent. Default: a directory named after the subject below
    /// that of the authority.
    #[arg(long)]
    out: Option<PathBuf>,
    /// How long it counts, e.g. 24h.
    #[arg(long, default_value = "2160h", value_parser = parse_duration)]
    valid_for: Duration,
    /// Leave files alone that this authority made before for the same subject and hosts, while a
    /// third of --valid-for is left to them. Run it daily and certificates never end.
    #[arg(long)]
    if_missing: bool,
}

/// Kind of a service.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Conversion,
    BlockStore,
    Writeback,
}

impl IssueArgs {
    fn subject(&self) -> Option<Subject> {
        let name = self.name.clone().unwrap_or_default();
        let service = self.service.map(|kind| {
            let kind = match kind {
                Kind::Conversion => "conversion",
                Kind::BlockStore => "block-store",
                Kind::Writeback => "writeback",
            };
            Subject::Service { kind: kind.to_owned(), name }
        });
        let client = self.client.clone().map(Subject::Client);
        service.or(client).or(self.admin.clone().map(Subject::Admin))
    }
}

/// `endio pki`
pub(crate) fn run(out: Output, command: PkiCommand) -> Outcome {
    match command {
        PkiCommand::Init(args) => {
            let what = format!("make an authority in {}", args.dir.display());
            let made = endio_pki::init(&args.dir, args.valid_for, args.if_missing);
            let made = made.map_err(|error| Failure::new(Exit::Failed, what, error))?;
            out.print(&json!({ "dir": args.dir, "made": made }), || {
                format!("{}: {}", args.dir.display(), said(made))
            })
        }
        PkiCommand::Issue(args) => {
            let usage = |message| Failure::new(Exit::Usage, "issue a certificate", message);
            let subject = args.subject().ok_or_else(|| usage("for whom?"))?;
            let (uri, directory) = (subject.uri(), subject.directory());
            let to = args.out.unwrap_or_else(|| args.dir.join(directory));
            let request = Request {
                subject,
                sans: args.sans,
                valid_for: args.valid_for,
                if_missing: args.if_missing,
            };
            let made = endio_pki::issue(&args.dir, &to, &request);
            let made = made.map_err(|error| {
                Failure::new(Exit::Failed, format!("issue a certificate for {uri}"), error)
                    .help("`endio pki init` makes an authority")
            })?;
            out.print(&json!({ "dir": to, "identity": uri, "made": made }), || {
                format!("{}: {uri}: {}", to.display(), said(made))
            })
        }
    }
}

fn said(made: bool) -> &'static str {
    if made { "made" } else { "there already" }
}
