//! Many requests in flight over one Submit stream, each applied once whatever breaks.
//!
//! ```text
//!   job ──► sent ── success ──► (gone)
//!            │ ▲
//!            │ └ resent as retry: after a pause, or on a new stream
//!            └── refused for good ──► the whole run fails
//! ```
//!
//! # Invariants
//! * `sequence-once`: a job has one sequence number for its life; sending it again says so.
//! * `bounded-flight`: at most `depth` jobs are in flight, and so in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use endio_api::writeback::{
    FsyncRequest, IoCompletion, IoRequest, RetryKey, StatusRequest, io_request::Op,
};
use endio_types::Reason;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::patience::{Action, Patience, action};
use crate::{
    client::Client,
    failure::{Exit, Failure, Outcome, is_from_service},
};

/// A request without its retry key.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// What to do.
    pub(crate) op: Op,
    /// Bytes of progress it stands for.
    pub(crate) bytes: u64,
}

/// How a run ended that did not fail for good.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Everything was acknowledged, or is durable.
    Done,
    /// Acknowledged requests may be gone, for this reason: repeat since the last checkpoint.
    Repeat(Failure),
}

/// How to run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Jobs in flight, at least 1.
    pub(crate) depth: usize,
    /// Time without progress after which to give up.
    pub(crate) patience: Duration,
    /// For messages: "import disk.img into volume v1".
    pub(crate) what: String,
}

/// One session of requests.
#[derive(Debug)]
pub(crate) struct Pipeline {
    client: Client,
    settings: Settings,
    session: Bytes,
    next_sequence: u64,
    stream: Option<Stream>,
    patience: Patience,
    last_trace_id: String,
}

#[derive(Debug)]
struct Stream {
    requests: mpsc::Sender<IoRequest>,
    completions: Streaming<IoCompletion>,
}

#[derive(Debug, Default)]
struct Flight {
    /// By sequence number, which is the cookie too.
    sent: BTreeMap<u64, Sent>,
    /// Those of them that wait for `again_at`.
    again: BTreeSet<u64>,
    again_at: Option<Instant>,
}

#[derive(Debug)]
struct Sent {
    job: Job,
    /// The service may have seen it already.
    is_retry: bool,
}

enum Event {
    Job(Option<Outcome<Job>>),
    Completion(Result<Option<IoCompletion>, Status>),
    ResendDue,
    Stalled,
}

impl Pipeline {
    /// A new session with a random name.
    pub(crate) fn new(client: Client, settings: Settings) -> Self {
        let patience = Patience::new(settings.patience);
        let last_trace_id = String::new();
        let session = random_session();
        Self { client, settings, session, next_sequence: 1, stream: None, patience, last_trace_id }
    }

    /// Name of the session, hexadecimal.
    pub(crate) fn session_hex(&self) -> String {
        self.session.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Trace of the request that completed last; empty: none.
    pub(crate) fn last_trace_id(&self) -> &str {
        &self.last_trace_id
    }

    /// The time that is left for things outside of [`Self::run`].
    pub(crate) fn patience(&mut self) -> &mut Patience {
        &mut self.patience
    }

    /// Sends all jobs and waits until each is acknowledged. `progress` is told the bytes of each.
    /// Not cancel-safe: a dropped run leaves jobs with an unknown outcome.
    ///
    /// # Errors
    /// A job was refused for good, the source failed, or patience is exhausted.
    pub(crate) async fn run(
        &mut self,
        jobs: &mut mpsc::Receiver<Outcome<Job>>,
        mut progress: impl FnMut(u64),
    ) -> Outcome<Verdict> {
        let mut flight = Flight::default();
        let mut has_more = true;
        loop {
            if flight.sent.is_empty() && !has_more {
                return Ok(Verdict::Done);
            }
            if self.stream.is_none() && !flight.sent.is_empty() {
                self.connect(&mut flight).await?;
                continue;
            }
            let wants_job =
                has_more && flight.again.is_empty() && flight.sent.len() < self.settings.depth;
            match self.next_event(&flight, jobs, wants_job).await {
                Event::Job(None) => has_more = false,
                Event::Job(Some(job)) => self.send(&mut flight, job?).await,
                Event::ResendDue => self.resend(&mut flight).await,
                Event::Stalled => {
                    let message = "no completion came in all that time";
                    return Err(Failure::of_reason(&self.settings.what, Reason::TimedOut, message));
                }
                Event::Completion(Ok(Some(completion))) => {
                    if let Some(failure) = self.complete(&mut flight, completion, &mut progress)? {
                        self.start_over();
                        return Ok(Verdict::Repeat(failure));
                    }
                }
                Event::Completion(broken) => {
                    self.stream = None;
                    let status =
                        broken.err().unwrap_or_else(|| Status::unavailable("stream ended"));
                    let failure = self.client.failure(&self.settings.what, &status);
                    match action(endio_api::status::reason(&status)) {
                        Action::Again => self.patience.wait(&failure, None).await?,
                        Action::Repeat => {
                            self.start_over();
                            return Ok(Verdict::Repeat(failure));
                        }
                        Action::Stop => return Err(failure),
                    }
                }
            }
        }
    }

    async fn next_event(
        &mut self,
        flight: &Flight,
        jobs: &mut mpsc::Receiver<Outcome<Job>>,
        wants_job: bool,
    ) -> Event {
        let Some(stream) = &mut self.stream else {
            return Event::Job(jobs.recv().await);
        };
        let stalled = Instant::now() + self.patience.total().max(Duration::from_secs(1));
        let has_sent = flight.sent.len() > flight.again.len();
        tokio::select! {
            biased;
            completion = stream.completions.message(), if has_sent => Event::Completion(completion),
            () = tokio::time::sleep_until(flight.again_at.unwrap_or(stalled)),
                if flight.again_at.is_some() => Event::ResendDue,
            job = jobs.recv(), if wants_job => Event::Job(job),
            () = tokio::time::sleep_until(stalled), if has_sent && !wants_job => Event::Stalled,
        }
    }

    /// Opens a stream and sends on it whatever is in flight. On failure waits and returns; the
    /// caller tries again.
    async fn connect(&mut self, flight: &mut Flight) -> Outcome {
        // Asking first keeps requests from being marked as retries that were never sent.
        if let Err(status) = self.client.inspect().status(StatusRequest::default()).await {
            return self.wait(&status).await;
        }
        let (requests, receiver) = mpsc::channel(self.settings.depth + 1);
        flight.again.clear();
        flight.again_at = None;
        for (sequence, sent) in &mut flight.sent {
            let request = build(&self.session, *sequence, sent);
            sent.is_retry = true;
            // The channel has room for all of them, so this fails only if its receiver is gone.
            let _ = requests.try_send(request);
        }
        match self.client.io().submit(ReceiverStream::new(receiver)).await {
            Ok(answer) => {
                self.stream = Some(Stream { requests, completions: answer.into_inner() });
                Ok(())
            }
            Err(status) => self.wait(&status).await,
        }
    }

    async fn wait(&mut self, status: &Status) -> Outcome {
        let failure = self.client.failure(&self.settings.what, status);
        if action(endio_api::status::reason(status)) == Action::Stop {
            return Err(failure);
        }
        self.patience.wait(&failure, endio_api::status::retry_after(status)).await
    }

    async fn send(&mut self, flight: &mut Flight, job: Job) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let mut sent = Sent { job, is_retry: false };
        if let Some(stream) = &self.stream {
            let request = build(&self.session, sequence, &sent);
            sent.is_retry = true;
            // A stream that broke is noticed at its completions, and the job is sent again.
            let _ = stream.requests.send(request).await;
        }
        flight.sent.insert(sequence, sent);
    }

    async fn resend(&mut self, flight: &mut Flight) {
        flight.again_at = None;
        let Some(stream) = &self.stream else { return };
        for sequence in std::mem::take(&mut flight.again) {
            if let Some(sent) = flight.sent.get(&sequence) {
                let _ = stream.requests.send(build(&self.session, sequence, sent)).await;
            }
        }
    }

    /// Takes one completion; returns the failure that makes the whole round be repeated.
    fn complete(
        &mut self,
        flight: &mut Flight,
        completion: IoCompletion,
        progress: &mut impl FnMut(u64),
    ) -> Outcome<Option<Failure>> {
        let Some(sent) = flight.sent.get(&completion.cookie) else {
            let message = format!("a completion names request {}, unknown here", completion.cookie);
            return Err(Failure::new(Exit::Failed, &self.settings.what, message));
        };
        if completion.reason == 0 {
            let bytes = sent.job.bytes;
            flight.sent.remove(&completion.cookie);
            self.patience.progress();
            self.last_trace_id = completion.trace_id;
            progress(bytes);
            return Ok(None);
        }
        let reason = Reason::from_wire(completion.reason).unwrap_or(Reason::WrongState);
        let failure = Failure::of_reason(&self.settings.what, reason, completion.message);
        match action(reason) {
            Action::Stop => Err(failure),
            Action::Repeat => Ok(Some(failure)),
            Action::Again => {
                flight.again.insert(completion.cookie);
                if flight.again_at.is_none() {
                    let after = Duration::from_millis(completion.retry_after_ms.into());
                    let hint = (!after.is_zero()).then_some(after);
                    let delay = self.patience.delay(&failure, hint)?;
                    flight.again_at = Some(Instant::now() + delay);
                }
                Ok(None)
            }
        }
    }

    /// Forgets the session: nothing of it is sent again.
    fn start_over(&mut self) {
        self.stream = None;
        self.session = random_session();
        self.next_sequence = 1;
    }

    /// Makes everything acknowledged so far durable.
    ///
    /// # Errors
    /// Refused for good, or patience is exhausted.
    pub(crate) async fn fsync(&mut self, volume: &str) -> Outcome<Verdict> {
        loop {
            // Somebody else's fsync may have been told of a loss that was of this one's writes. A session that
            // has sent nothing could not be told from one that was lost.
            let has_sent = self.next_sequence > 1;
            let session = if has_sent { self.session.clone() } else { Bytes::new() };
            let request = FsyncRequest { volume: volume.into(), session, ..Default::default() };
            let Err(status) = self.client.io().fsync(request).await else {
                self.patience.progress();
                return Ok(Verdict::Done);
            };
            let failure = self.client.failure(format!("fsync volume {volume}"), &status);
            let reason = endio_api::status::reason(&status);
            if action(reason) == Action::Stop {
                return Err(failure);
            }
            self.patience.wait(&failure, endio_api::status::retry_after(&status)).await?;
            if !was_refused_before_it_began(&status, reason) {
                self.start_over();
                return Ok(Verdict::Repeat(failure));
            }
        }
    }
}

/// A failed write-out and lost writes are told once. Only an fsync that surely did not look for
/// them may simply be called again; after any other, success could mean that the news was missed.
fn was_refused_before_it_began(status: &Status, reason: Reason) -> bool {
    use Reason as R;
    is_from_service(status)
        && matches!(reason, R::NotReady | R::Draining | R::Limit | R::VolumeBusy | R::PeerAway)
}

fn random_session() -> Bytes {
    Bytes::copy_from_slice(&rand::random::<[u8; 16]>())
}

fn build(session: &Bytes, sequence: u64, sent: &Sent) -> IoRequest {
    let retry = Some(RetryKey { session: session.clone(), sequence, is_retry: sent.is_retry });
    let mut op = sent.job.op.clone();
    match &mut op {
        Op::Write(request) => request.retry = retry,
        Op::Trim(request) | Op::WriteZeroes(request) | Op::Allocate(request) => {
            request.retry = retry;
        }
        Op::Read(_) | Op::Fsync(_) => {}
    }
    IoRequest { cookie: sequence, op: Some(op) }
}
