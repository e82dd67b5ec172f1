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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use endio_api::conversion::{
    BeginIo, Begun, Completion, LogData, ReleaseSubmitter, Reserve, Store,
};
use endio_chassis::net::Dialer;
use endio_state_machine::writeback::confirms::Confirm;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
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
    /// What reads of each open volume still use.
    fn confirms(&self) -> Vec<Confirm>;
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

/// A write whose begin is awaited. Dropped with a grant that came and was not taken, it gives the io_end up:
/// nobody else knows of it.
struct Asked<'a> {
    session: &'a Session,
    answer: oneshot::Receiver<Result<Granted, Failure>>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        // A grant that comes from now on is refused, and given up by who sends it.
        self.answer.close();
        if let Ok(Ok(Granted { session, begun, .. })) = self.answer.try_recv() {
            let release =
                ReleaseSubmitter { token: begun.submitter, abort: true, ..Default::default() };
            // Where the queue is full, the io_end lives until conversion ends it.
            let _ = self.session.commands.try_send(Command::Release(session, release));
        }
    }
}

enum Command {
    Begin(BeginIo, oneshot::Sender<Result<Granted, Failure>>),
    /// Under the session of that number only.
    Release(u64, ReleaseSubmitter),
    /// Under the session of that number only, if any.
    Reserve(Option<u64>, Reserve, oneshot::Sender<Result<u64, Failure>>),
    /// Under the session of that number only.
    Log(u64, LogData, oneshot::Sender<Result<(), Failure>>),
}

/// Handle of the session. Clones share it.
#[derive(Clone)]
pub(crate) struct Session {
    commands: mpsc::Sender<Command>,
    link: watch::Receiver<Link>,
    tenure: Arc<Tenure>,
}

/// For how long nobody else serves the volumes that are open here, whatever happened to the
/// session: what is answered without asking anybody is answered under this.
#[derive(Debug)]
pub(crate) struct Tenure {
    start: Instant,
    ends_after_us: AtomicU64,
}

impl Tenure {
    fn new() -> Self {
        Self { start: Instant::now(), ends_after_us: AtomicU64::new(0) }
    }

    /// A lease was granted in answer to what was sent then. An eighth of it is kept back, for
    /// clocks that run at different speeds.
    fn granted(&self, sent: Instant, lease: Duration) {
        let ends = (sent + lease - lease / 8).saturating_duration_since(self.start);
        let ends = u64::try_from(ends.as_micros()).unwrap_or(u64::MAX);
        self.ends_after_us.fetch_max(ends, Ordering::Release);
    }

    fn holds(&self) -> bool {
        let now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        now < self.ends_after_us.load(Ordering::Acquire)
    }
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
        let tenure = Arc::new(Tenure::new());
        let granted = Arc::clone(&tenure);
        let task = link::Task { writeback, url, dialer, limits, events, tell, granted, stop };
        (Self { commands, link, tenure }, tokio::spawn(task.run(queue)))
    }

    /// Whether the lease holds, so that no other writeback serves what is open here.
    pub(crate) fn lease_holds(&self) -> bool {
        self.tenure.holds()
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
        let mut asked = Asked { session: self, answer };
        self.send(Command::Begin(begin, reply)).await?;
        (&mut asked.answer).await.unwrap_or_else(|_| Err(Failure::conversion_away()))
    }

    /// Releases a submitter's token. Lost with its session, like the token itself.
    pub(crate) async fn release(&self, session: u64, release: ReleaseSubmitter) {
        // Without a session there is no token either: its io_end died with the session.
        let _ = self.send(Command::Release(session, release)).await;
    }

    /// Changes the space promised to a volume; returns what is promised then, in blocks. `session`: the
    /// one under which the change was worked out. A later one has begun with a count of its own, and the
    /// change would come on top of it.
    ///
    /// # Errors
    /// `NO_SPACE` and other refusals, or that conversion is away.
    pub(crate) async fn reserve(
        &self,
        session: Option<u64>,
        reserve: Reserve,
    ) -> Result<u64, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Reserve(session, reserve, reply)).await?;
        answer.await.unwrap_or_else(|_| Err(Failure::conversion_away()))
    }

    /// Makes the data of a small flush durable at conversion. `request` is chosen here. `session`: the
    /// one that stood before the data was taken. Under a later one a change of the map may have come
    /// between of which conversion, started anew, does not know that it is newer.
    ///
    /// # Errors
    /// What conversion refused, or that it is away: then nothing is known of the data.
    pub(crate) async fn log(&self, session: u64, log: LogData) -> Result<(), Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Log(session, log, reply)).await?;
        answer.await.unwrap_or_else(|_| Err(Failure::conversion_away()))
    }

    async fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).await.map_err(|_| Failure::conversion_away())
    }
}

#[cfg(test)]
mod tests {
    use endio_api::common::Token;
    use futures_util::poll;

    use super::*;

    /// A caller that is gone at the instant at which its grant comes: nobody else would end the io_end.
    #[tokio::test]
    async fn a_grant_that_nobody_takes_is_given_up() {
        let (commands, mut queue) = mpsc::channel(8);
        let (_tell, link) = watch::channel(Link::default());
        let session = Session { commands, link, tenure: Arc::new(Tenure::new()) };
        let mut begun = Box::pin(session.begin(BeginIo::default()));
        assert!(poll!(begun.as_mut()).is_pending());
        let Some(Command::Begin(_, reply)) = queue.recv().await else { panic!("nothing is asked") };
        let (_end, done) = oneshot::channel();
        let submitter = Some(Token { io_end: 7, ..Token::default() });
        let granted = Granted { session: 3, begun: Begun { submitter, ..Begun::default() }, done };
        assert!(reply.send(Ok(granted)).is_ok());
        drop(begun);
        let Ok(Command::Release(session, release)) = queue.try_recv() else {
            panic!("the io_end lives until conversion ends it")
        };
        assert_eq!((session, release.abort), (3, true));
        assert_eq!(release.token.map(|token| token.io_end), Some(7));
        // Whoever takes it ends it himself.
        assert!(queue.try_recv().is_err());
    }
}
