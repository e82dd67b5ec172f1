//! The session with conversion: one stream of batches each way, rebuilt for ever.
//!
//! ```text
//!   Down ── stream opened, Welcome ──► Up(epoch) ── stream broke / lease ran out ──► Down
//! ```
//!
//! Callers hand over commands and wait for their answers. When the session is lost, every answer
//! that is still owed becomes "conversion is away": the caller begins again under the next session.
//! Nothing is sent twice.

mod link;

use std::sync::Arc;
use std::time::Duration;

use endio_api::conversion::{
    BeginIo, Begun, Completion, ReadConfirm, ReleaseSubmitter, Reserve, Store,
};
use endio_chassis::net::Dialer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Whether the session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Link {
    /// Cluster epoch of the session; `None` while there is none.
    pub epoch: Option<u64>,
    /// Counts the sessions that stood since start.
    pub number: u64,
}

/// What the session tells the engine. The calls are short and never block.
pub(crate) trait Events: Send + Sync + 'static {
    /// A session stands. Returns the promises of space to set anew, before anything else is sent.
    fn welcome(&self, epoch: u64) -> Vec<Reserve>;
    /// The answer to one of those: blocks that are promised now, or why none are.
    fn space_reset(&self, volume: u64, outcome: Result<u64, Failure>);
    /// The list of stores changed.
    fn stores(&self, stores: &[Store]);
    /// A newer generation of the volume exists.
    fn fenced(&self, volume: u64, generation: u64);
    /// What reads still use, for the next renewal.
    fn confirms(&self) -> Vec<ReadConfirm>;
}

/// Limits and times of the session.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Commands waiting to be sent.
    pub queue: usize,
    /// Messages in one batch.
    pub batch: usize,
    /// Most time between two confirmations of what reads use.
    pub confirm_every: Duration,
    /// First and longest wait before connecting again.
    pub backoff: (Duration, Duration),
    /// Most time for opening the stream.
    pub connect: Duration,
}

/// An io_end that has begun.
#[derive(Debug)]
pub(crate) struct Granted {
    /// The session it belongs to; it cannot be released in another.
    pub session: u64,
    /// The tokens.
    pub begun: Begun,
    /// How it ends. An error means that the session was lost: the outcome is unknown.
    pub done: oneshot::Receiver<Completion>,
}

enum Command {
    Begin(BeginIo, oneshot::Sender<Result<Granted, Failure>>),
    /// Under the session of that number only.
    Release(u64, ReleaseSubmitter),
    Reserve(Reserve, oneshot::Sender<Result<u64, Failure>>),
}

/// Handle of the session. Clones share it.
#[derive(Clone)]
pub(crate) struct Session {
    commands: mpsc::Sender<Command>,
    link: watch::Receiver<Link>,
}

impl Session {
    /// Starts the session's task. It ends when `stop` is cancelled.
    pub(crate) fn start(
        writeback: String,
        url: String,
        dialer: Dialer,
        limits: Limits,
        events: Arc<dyn Events>,
        stop: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, queue) = mpsc::channel(limits.queue);
        let (tell, link) = watch::channel(Link::default());
        let task = link::Task { writeback, url, dialer, limits, events, tell, stop };
        (Self { commands, link }, tokio::spawn(task.run(queue)))
    }

    /// The state now.
    pub(crate) fn link(&self) -> Link {
        *self.link.borrow()
    }

    /// Waits until a session stands. Cancel-safe; callers bound the wait.
    pub(crate) async fn up(&self) -> Link {
        let mut link = self.link.clone();
        let up = link.wait_for(|link| link.epoch.is_some()).await.map(|link| *link);
        match up {
            Ok(up) => up,
            // The task is gone, which happens only at the end of the process.
            Err(_) => std::future::pending().await,
        }
    }

    /// Begins a write. `request` is chosen here.
    ///
    /// Cancel-safe: an io_end whose caller has gone is given up.
    ///
    /// # Errors
    /// What conversion refused, or that it is away.
    pub(crate) async fn begin(&self, begin: BeginIo) -> Result<Granted, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Begin(begin, reply)).await?;
        answer.await.unwrap_or_else(|_| Err(Failure::conversion_away()))
    }

    /// Releases a submitter's token. Lost with its session, like the token itself.
    pub(crate) async fn release(&self, session: u64, release: ReleaseSubmitter) {
        // Without a session there is no token either: its io_end died with the session.
        let _ = self.send(Command::Release(session, release)).await;
    }

    /// Changes the space promised to a volume; returns what is promised then, in blocks.
    ///
    /// # Errors
    /// `NO_SPACE` and other refusals, or that conversion is away.
    pub(crate) async fn reserve(&self, reserve: Reserve) -> Result<u64, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Reserve(reserve, reply)).await?;
        answer.await.unwrap_or_else(|_| Err(Failure::conversion_away()))
    }

    async fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).await.map_err(|_| Failure::conversion_away())
    }
}
