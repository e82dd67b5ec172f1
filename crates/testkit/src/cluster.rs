//! A whole endio of real processes in a directory of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use endio_chassis::net::Dialer;
use endio_chassis::tls::Tls;
use endio_pki::Subject;
use tonic::transport::Channel;

use crate::checkers::{self, Broken};
use crate::client::Client;
use crate::process::{LISTEN, Process, Spec, binaries};
use crate::seed::Rng;

/// Directory of the authority, in that of the cluster.
const PKI: &str = "pki";
/// Longer than any test.
const CERTIFICATES_LIVE: Duration = Duration::from_secs(86_400);

/// How to build a [`Cluster`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of block-stores at the start.
    pub stores: usize,
    /// Capacity of each, as the command line takes it.
    pub capacity: String,
    /// More arguments of the conversion service.
    pub conversion_args: Vec<String>,
    /// More arguments of each block-store.
    pub store_args: Vec<String>,
    /// More arguments of each writeback.
    pub writeback_args: Vec<String>,
    /// Where the data directories are made; `None`: in the cluster's own directory.
    pub data_root: Option<PathBuf>,
    /// Mutual TLS everywhere, with certificates of an authority of its own. Without: `--insecure`.
    pub tls: bool,
    /// Environment of all processes.
    pub env: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            stores: 1,
            capacity: "1GiB".to_owned(),
            conversion_args: Vec::new(),
            store_args: Vec::new(),
            writeback_args: Vec::new(),
            data_root: None,
            tls: false,
            env: vec![("ENDIO_CONVERSION_LIMITS__LEASE_MS".to_owned(), "2000".to_owned())],
        }
    }
}

/// From which size on block-stores write around the page cache, and writebacks around theirs: small, or
/// as always. For [`Options::env`].
pub fn drawn_sizes(rng: &mut Rng) -> [(String, String); 2] {
    let mut drawn = |name: &str| {
        let bytes = if rng.chance(50) { "4096" } else { "262144" };
        (name.to_owned(), bytes.to_owned())
    };
    [drawn("ENDIO_BLOCK_STORE_DIRECT_WRITE_BYTES_MIN"), drawn("ENDIO_WRITEBACK_WRITE_AROUND_BYTES")]
}

/// Which process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// The conversion service.
    Conversion,
    /// The block-store of that number, from 0.
    Store(usize),
    /// The writeback of that number, from 0.
    Writeback(usize),
}

/// One conversion, some block-stores, some writebacks. Dropping it kills them all.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    conversion: Process,
    stores: Vec<Process>,
    writebacks: Vec<Process>,
    // Removed after the processes are gone: fields are dropped in this order.
    directory: tempfile::TempDir,
}

impl Cluster {
    /// Starts everything and waits until it is ready.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let data = options.data_root.as_deref().unwrap_or(directory.path()).to_owned();
        if options.tls {
            endio_pki::init(&directory.path().join(PKI), CERTIFICATES_LIVE, false)?;
        }
        let mut more = security(&options, directory.path(), "conversion", "conversion")?;
        more.extend(options.conversion_args.iter().cloned());
        let conversion = Process::start(Spec {
            name: "conversion".to_owned(),
            binary: "endio-conversion",
            args: arguments(
                &[("--data-dir", &path(&data, "conversion")?), ("--listen", LISTEN)],
                &more,
            ),
            env: options.env.clone(),
            log_dir: directory.path().to_owned(),
        })?;
        let (stores, writebacks) = (Vec::new(), Vec::new());
        let mut cluster = Self { options, conversion, stores, writebacks, directory };
        for _ in 0..cluster.options.stores {
            cluster.add_store()?;
        }
        cluster.add_writeback()?;
        Ok(cluster)
    }

    /// Adds a block-store; returns its number.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn add_store(&mut self) -> anyhow::Result<usize> {
        let number = self.stores.len();
        let name = format!("store-{number}");
        let mut more = security(&self.options, self.dir(), "block-store", &name)?;
        more.extend(self.options.store_args.iter().cloned());
        let args = arguments(
            &[
                ("--data-dir", &path(self.data(), &name)?),
                ("--listen", LISTEN),
                ("--conversion", self.conversion.url()),
                ("--capacity", &self.options.capacity),
            ],
            &more,
        );
        let spec = self.spec(name, "endio-block-store", args);
        self.stores.push(Process::start(spec)?);
        Ok(number)
    }

    /// Adds a writeback; returns its number.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn add_writeback(&mut self) -> anyhow::Result<usize> {
        let number = self.writebacks.len();
        let name = format!("writeback-{number}");
        let mut more = security(&self.options, self.dir(), "writeback", &name)?;
        more.extend(self.options.writeback_args.iter().cloned());
        let args = arguments(
            &[
                ("--listen", LISTEN),
                ("--conversion", self.conversion.url()),
                ("--cache-dir", &path(self.data(), &name)?),
            ],
            &more,
        );
        let spec = self.spec(name, "endio-writeback", args);
        self.writebacks.push(Process::start(spec)?);
        Ok(number)
    }

    fn spec(&self, name: String, binary: &'static str, args: Vec<String>) -> Spec {
        let log_dir = self.dir().to_owned();
        Spec { name, binary, args, env: self.options.env.clone(), log_dir }
    }

    fn data(&self) -> &Path {
        self.options.data_root.as_deref().unwrap_or(self.directory.path())
    }

    /// The directory of everything but data that has a directory of its own.
    pub fn dir(&self) -> &Path {
        self.directory.path()
    }

    /// One process.
    pub fn process(&mut self, who: Who) -> &mut Process {
        match who {
            Who::Conversion => &mut self.conversion,
            Who::Store(number) => &mut self.stores[number],
            Who::Writeback(number) => &mut self.writebacks[number],
        }
    }

    /// All processes, in the order in which they are started.
    pub fn everyone(&self) -> Vec<Who> {
        let stores = (0..self.stores.len()).map(Who::Store);
        let writebacks = (0..self.writebacks.len()).map(Who::Writeback);
        [Who::Conversion].into_iter().chain(stores).chain(writebacks).collect()
    }

    /// SIGKILL to every process, as close together as possible. Returns when all are gone.
    pub fn kill_all(&mut self) {
        self.signal_kill();
        for who in self.everyone() {
            self.process(who).kill();
        }
    }

    /// SIGKILL to every process, without waiting until they are gone.
    pub fn signal_kill(&mut self) {
        for who in self.everyone() {
            self.process(who).signal_kill();
        }
    }

    /// Sets a variable of the environment of all processes for their next start.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        for who in self.everyone() {
            self.process(who).set_env(name, value);
        }
    }

    /// Starts again whatever does not run. All at once: the order must not matter.
    ///
    /// # Errors
    /// A process cannot be started, or is not ready in time.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        let processes = [&mut self.conversion]
            .into_iter()
            .chain(self.stores.iter_mut())
            .chain(self.writebacks.iter_mut());
        let mut starting = Vec::new();
        for process in processes {
            if !process.is_running() {
                starting.push(process.spawn()?);
            }
        }
        starting.into_iter().try_for_each(|process| process.wait_ready())
    }

    /// Kills one process and starts it again.
    ///
    /// # Errors
    /// It is not ready in time.
    pub fn bounce(&mut self, who: Who) -> anyhow::Result<()> {
        self.process(who).restart()
    }

    /// Where the first writeback answers.
    pub fn endpoint(&self) -> &str {
        self.writebacks[0].url()
    }

    /// Where conversion answers.
    pub fn conversion_url(&self) -> &str {
        self.conversion.url()
    }

    /// A client of the first writeback; with TLS, an admin.
    ///
    /// # Panics
    /// With TLS, if no certificate can be made.
    pub fn client(&self) -> Client {
        if !self.options.tls {
            return Client::new(self.endpoint());
        }
        let dir = self.certificate(Subject::Admin("test".to_owned())).expect("a certificate");
        Client::over(self.channel(&dir, self.endpoint()).expect("a channel"))
    }

    /// Directory of the authority that signed everybody here.
    pub fn authority(&self) -> PathBuf {
        self.dir().join(PKI)
    }

    /// Directory with a certificate for somebody; made at the first call.
    ///
    /// # Errors
    /// From the file system.
    pub fn certificate(&self, subject: Subject) -> anyhow::Result<PathBuf> {
        certificate(self.dir(), subject)
    }

    /// A connection to one of the services that shows the certificate in a directory.
    ///
    /// # Errors
    /// The files or the url are unusable.
    pub fn channel(&self, certificate: &Path, url: &str) -> anyhow::Result<Channel> {
        Ok(Dialer::default().secured(Tls::load(certificate)?).channel(url)?)
    }

    /// The `endio` command, pointed at the first writeback.
    ///
    /// # Errors
    /// The binaries cannot be built.
    pub fn cli(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(binaries()?.join("endio"));
        command.args(args).env("ENDIO_ENDPOINT", self.endpoint()).stdin(Stdio::null());
        if self.options.tls {
            let dir = self.certificate(Subject::Admin("test".to_owned()))?;
            command.env("ENDIO_TLS_DIR", dir);
        }
        Ok(command)
    }

    /// Runs the `endio` command to its end, whatever it returns.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn endio(&self, args: &[&str]) -> anyhow::Result<Output> {
        self.cli(args)?.output().context("endio cannot be started")
    }

    /// Runs the `endio` command; returns its stdout.
    ///
    /// # Errors
    /// It does not succeed; with what it said.
    pub fn endio_ok(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.endio(args)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(
            output.status.success(),
            "endio {args:?}: {}\n{stdout}\n{stderr}",
            output.status
        );
        Ok(stdout)
    }

    /// The logs of all processes: none may have panicked.
    ///
    /// # Errors
    /// `no_unexpected_log`, with the lines.
    pub fn no_panic(&self) -> Result<(), Broken> {
        [&self.conversion]
            .into_iter()
            .chain(&self.stores)
            .chain(&self.writebacks)
            .try_for_each(|process| checkers::no_panic_in_log(&process.log()))
    }
}

fn path(directory: &Path, name: &str) -> anyhow::Result<String> {
    let path: PathBuf = directory.join(name);
    fs::create_dir_all(&path)?;
    path.into_os_string().into_string().ok().context("a temporary directory has a UTF-8 name")
}

/// Flags that say how a process secures its connections.
fn security(options: &Options, dir: &Path, kind: &str, name: &str) -> anyhow::Result<Vec<String>> {
    if !options.tls {
        return Ok(vec!["--insecure".to_owned()]);
    }
    let subject = Subject::Service { kind: kind.to_owned(), name: name.to_owned() };
    let dir = certificate(dir, subject)?;
    Ok(vec!["--tls-dir".to_owned(), dir.to_str().context("a UTF-8 name")?.to_owned()])
}

fn certificate(dir: &Path, subject: Subject) -> anyhow::Result<PathBuf> {
    let authority = dir.join(PKI);
    let out = authority.join(subject.directory());
    let request = endio_pki::Request {
        subject,
        sans: Vec::new(),
        valid_for: CERTIFICATES_LIVE,
        if_missing: true,
    };
    endio_pki::issue(&authority, &out, &request)?;
    Ok(out)
}

fn arguments(pairs: &[(&str, &str)], more: &[String]) -> Vec<String> {
    let pairs = pairs.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]);
    pairs.chain(more.iter().cloned()).collect()
}

/// Runs a command in the background with its stderr in a file.
#[derive(Debug)]
pub struct Background {
    child: Child,
    stderr: PathBuf,
}

impl Background {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command, stderr: PathBuf) -> anyhow::Result<Self> {
        let file = fs::File::create(&stderr)?;
        let child = command.stdout(Stdio::null()).stderr(file).spawn()?;
        Ok(Self { child, stderr })
    }

    /// What it has said on stderr.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// From the system.
    pub fn is_over(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits, bounded, for its successful end.
    ///
    /// # Errors
    /// It failed or did not end in time; with what it said.
    pub fn finish(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                anyhow::ensure!(status.success(), "it ended with {status}:\n{}", self.said());
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::bail!("it has not ended after {patience:?}:\n{}", self.said())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
