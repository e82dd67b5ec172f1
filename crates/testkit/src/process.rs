//! Real processes: started, killed, paused, and started again on the port they had.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for the line that says that a process is ready.
pub const READY_WAIT: Duration = Duration::from_secs(60);
/// How often a start is tried while the old port is still taken.
const STARTS_MAX: u32 = 20;
/// Stands in an argument for the address to listen on.
pub const LISTEN: &str = "{listen}";
/// Packages that own the binaries.
const PACKAGES: [&str; 4] =
    ["endio-conversion", "endio-block-store", "endio-writeback", "endio-cli"];

/// One build serves all tests with processes: the points do nothing unless a test says so.
const FEATURES: &str =
    "endio-conversion/failpoints,endio-block-store/failpoints,endio-writeback/failpoints";

/// Where the binaries are; builds them first, once for each test executable, with the profile and
/// into the target directory of that executable, and with the points of `crates/failpoints`.
/// `ENDIO_BIN_DIR` names a directory to take instead.
///
/// # Errors
/// The build fails, or this executable does not lie in a target directory.
pub fn binaries() -> anyhow::Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

fn build() -> anyhow::Result<PathBuf> {
    if let Some(directory) = env::var_os("ENDIO_BIN_DIR") {
        return Ok(PathBuf::from(directory));
    }
    let executable = env::current_exe()?;
    let directory = executable
        .parent()
        .and_then(Path::parent)
        .context("a test executable lies in target/PROFILE/deps")?;
    let profile = directory.file_name().and_then(|name| name.to_str()).context("a profile")?;
    let target = directory.parent().context("a target directory")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.arg("build").arg("--quiet").arg("--bins").arg("--target-dir").arg(target);
    command.arg("--manifest-path").arg(workspace().join("Cargo.toml"));
    for package in PACKAGES {
        command.args(["-p", package]);
    }
    // It has no binary, but the features of dependencies that tests need: see its Cargo.toml.
    command.args(["-p", "endio-testkit", "--features", FEATURES]);
    if profile != "debug" {
        command.args(["--profile", profile]);
    }
    // What `cargo test` tells of the test's own package. Build scripts (ring's) that watch these
    // variables would run again for every test crate, and all that depends on them be built again.
    for (name, _) in env::vars_os() {
        let told = name.to_str().is_some_and(|name| {
            ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.starts_with(prefix))
        });
        if told {
            command.env_remove(&name);
        }
    }
    let status = command.status().context("cargo cannot be started")?;
    ensure!(status.success(), "cargo build of the binaries failed: {status}");
    Ok(directory.to_owned())
}

/// Root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Whether a program of the host is there; says so if it is not.
pub fn host_has(program: &str) -> bool {
    let found =
        env::var_os("PATH").is_some_and(|path| {
            env::split_paths(&path).any(|directory| directory.join(program).is_file())
        }) || ["/sbin", "/usr/sbin"].iter().any(|place| Path::new(place).join(program).is_file());
    if !found {
        eprintln!("skipped: {program} is not installed on this host");
    }
    found
}

/// How to start a process.
#[derive(Clone, Debug)]
pub struct Spec {
    /// For messages and for the name of the log.
    pub name: String,
    /// File name of the binary.
    pub binary: &'static str,
    /// Arguments; [`LISTEN`] stands for the address to listen on.
    pub args: Vec<String>,
    /// Environment, besides what is inherited.
    pub env: Vec<(String, String)>,
    /// Directory of the log.
    pub log_dir: PathBuf,
}

/// A process and everything needed to start it again.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    child: Option<Child>,
    listen: String,
    url: String,
    starts: u32,
}

/// Longest wait until a process has stopped.
const STOPPED_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks at whether it has.
const STOPPED_LOOK: Duration = Duration::from_millis(1);

/// Whether a thread of a process is neither stopped nor dead.
fn is_running(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().any(|thread| {
        let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else { return false };
        // Behind the name, which may have anything in it.
        let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
        !matches!(state, Some('T' | 't' | 'Z' | 'X'))
    })
}

impl Process {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// It cannot be started, ends, or is not ready in [`READY_WAIT`]; with the end of its log.
    pub fn start(spec: Spec) -> anyhow::Result<Self> {
        let listen = "127.0.0.1:0".to_owned();
        let mut process = Self { spec, child: None, listen, url: String::new(), starts: 0 };
        process.restart()?;
        Ok(process)
    }

    /// Name from its [`Spec`].
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Where it answers; the same after each start.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Number of times it was started.
    pub fn starts(&self) -> u32 {
        self.starts
    }

    /// Adds an argument for the next start.
    pub fn push_arg(&mut self, arg: &str) {
        self.spec.args.push(arg.to_owned());
    }

    /// Sets a variable of the environment for the next start; `None` removes it.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        self.spec.env.retain(|(known, _)| known != name);
        let value = value.map(|value| (name.to_owned(), value.to_owned()));
        self.spec.env.extend(value);
    }

    /// Its log so far, of all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.spec.log_dir.join(format!("{}.log", self.spec.name))
    }

    /// Whether it runs (or is paused).
    pub fn is_running(&mut self) -> bool {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(None)) => true,
            Some(_) | None => false,
        }
    }

    /// Whether SIGSTOP holds it.
    pub fn is_stopped(&self) -> bool {
        let Some(child) = &self.child else { return false };
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        // The state follows the name, which may hold anything but ends with the last parenthesis.
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    }

    /// Kills it if it runs, and starts it on the port that it had. Waits until it is ready.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.spawn()?.wait_ready()
    }

    /// Starts it without waiting until it is ready; [`Starting::wait_ready`] does.
    ///
    /// # Errors
    /// The binary cannot be started.
    pub fn spawn(&mut self) -> anyhow::Result<Starting<'_>> {
        self.kill();
        self.starts += 1;
        let lines = self.launch()?;
        Ok(Starting { process: self, lines })
    }

    fn launch(&mut self) -> anyhow::Result<mpsc::Receiver<String>> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let mut child = Command::new(binaries()?.join(self.spec.binary))
            .args(self.spec.args.iter().map(|arg| arg.replace(LISTEN, &self.listen)))
            .envs(self.spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.spec.binary))?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = mpsc::sync_channel(16);
        thread::spawn(move || {
            // Reads on when nobody listens any more, so that the process never waits on a full pipe.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.try_send(line);
            }
        });
        self.child = Some(child);
        Ok(lines)
    }

    fn wait_ready(&mut self, mut lines: mpsc::Receiver<String>) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_WAIT;
        for _ in 0..STARTS_MAX {
            match self.read_ready(&lines, deadline)? {
                Some(url) => {
                    let (_, listen) = url.split_once("://").context("the address is no url")?;
                    self.listen = listen.to_owned();
                    self.url = url;
                    return Ok(());
                }
                None => {
                    let is_port_taken = self.tail(400).contains("in use");
                    ensure!(
                        is_port_taken,
                        "{} ended while starting:\n{}",
                        self.name(),
                        self.tail(4000)
                    );
                    thread::sleep(Duration::from_millis(250));
                    lines = self.launch()?;
                }
            }
        }
        bail!("{} found its port taken {STARTS_MAX} times", self.name())
    }

    /// The URL of the ready line. `None`: the process ended before it was ready.
    fn read_ready(
        &mut self,
        lines: &mpsc::Receiver<String>,
        deadline: Instant,
    ) -> anyhow::Result<Option<String>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) => {
                    let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else {
                        continue;
                    };
                    if line["event"] == "ready" {
                        let url =
                            line["grpc"].as_str().context("the ready line names no address")?;
                        return Ok(Some(url.to_owned()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.wait();
                    return Ok(None);
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{} is not ready after {READY_WAIT:?}:\n{}", self.name(), self.tail(4000))
                }
            }
        }
    }

    /// The last `bytes` of its log.
    pub fn tail(&self, bytes: usize) -> String {
        let log = self.log();
        let from = log.len().saturating_sub(bytes);
        String::from_utf8_lossy(&log.as_bytes()[from..]).into_owned()
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().and_then(|child| Pid::from_raw(child.id().cast_signed()));
        if let Some(pid) = pid {
            // A process that has just ended cannot be signalled, and need not be.
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL; returns when it is gone. Nothing happens if it does not run.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// SIGKILL, without waiting until it is gone.
    pub fn signal_kill(&self) {
        self.signal(Signal::KILL);
    }

    /// SIGSTOP: it keeps everything and does nothing. Waits, bounded, until that is so: on a busy
    /// machine its threads go on until one of them has taken the signal.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + STOPPED_WAIT;
        while self.child.as_ref().is_some_and(|child| is_running(child.id()))
            && Instant::now() < deadline
        {
            thread::sleep(STOPPED_LOOK);
        }
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM; waits, bounded, until it has ended. `None`: it did not, and was killed.
    pub fn stop(&mut self, patience: Duration) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + patience;
        let child = self.child.as_mut()?;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = child.try_wait() {
                self.child = None;
                return Some(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        None
    }

    fn wait(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

/// A process that was started and may not be ready yet.
#[derive(Debug)]
pub struct Starting<'a> {
    process: &'a mut Process,
    lines: mpsc::Receiver<String>,
}

impl Starting<'_> {
    /// Waits until it is ready; tries again while its port is still taken.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn wait_ready(self) -> anyhow::Result<()> {
        self.process.wait_ready(self.lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- end of the log of {}\n{}", self.spec.name, self.tail(6000));
        }
        self.resume();
        self.kill();
    }
}

/// A command of the host, run to its end.
///
/// # Errors
/// It cannot be started or does not succeed; with what it said.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    Ok(said)
}

/// A sparse file of that length.
///
/// # Errors
/// From the file system.
pub fn sparse_file(path: &Path, length: u64) -> anyhow::Result<()> {
    Ok(File::create(path)?.set_len(length)?)
}
