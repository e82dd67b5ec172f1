//! A client that does not give up: it names each request with a session and a number, and sends it
//! again after a broken connection or a retryable refusal until it is answered.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use endio_api::common::ListSpansRequest;
use endio_api::conversion::{CreateVolumeRequest, ListIoEndsRequest, ListStoresRequest, Volume};
use endio_api::writeback::inspect_client::InspectClient;
use endio_api::writeback::io_client::IoClient;
use endio_api::writeback::io_request::Op;
use endio_api::writeback::volumes_client::VolumesClient;
use endio_api::writeback::{
    CheckRequest, CheckResponse, FsyncRequest, IoCompletion, IoRequest, OpenRequest, RangeRequest,
    ReadRequest, RetryKey, WriteMode, WriteRequest,
};
use endio_api::{common, status};
use endio_types::Reason;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::checkers::{self, Broken};

/// Largest gRPC message a client takes or sends.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Pause before a request is sent again.
const PAUSE: Duration = Duration::from_millis(50);

/// Whether the outcome of a request that failed for this reason is worth another try.
pub fn is_worth_a_retry(reason: Reason) -> bool {
    reason.is_retryable()
        || matches!(reason, Reason::OldGeneration | Reason::VolumeBusy | Reason::TimedOut)
}

/// One client of one writeback.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    patience: Duration,
}

/// A request that was answered with a failure.
#[derive(Debug, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Refused {
    /// Why.
    pub reason: Reason,
    /// In words.
    pub message: String,
}

impl From<Status> for Refused {
    fn from(refusal: Status) -> Self {
        Self { reason: status::reason(&refusal), message: format!("{refusal}") }
    }
}

impl Client {
    /// A client of the service at `http://HOST:PORT`; it connects when it is used.
    pub fn new(url: &str) -> Self {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL from a ready line");
        let endpoint = endpoint.connect_timeout(Duration::from_secs(2));
        Self::over(endpoint.connect_lazy())
    }

    /// A client over a channel of any kind.
    pub fn over(channel: Channel) -> Self {
        Self { channel, patience: Duration::from_secs(60) }
    }

    /// The same client, giving up after `patience`.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The API of volumes.
    pub fn volumes(&self) -> VolumesClient<Channel> {
        VolumesClient::new(self.channel.clone())
    }

    /// The API of reads and writes.
    pub fn io(&self) -> IoClient<Channel> {
        IoClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The API of questions.
    pub fn inspect(&self) -> InspectClient<Channel> {
        InspectClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Calls until it succeeds, fails for good, or patience ends.
    async fn persist<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, Refused>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let deadline = Instant::now() + self.patience;
        let mut last: Refused = Status::new(Code::DeadlineExceeded, "no answer in time").into();
        loop {
            let refused: Refused = match timeout_at(deadline, call()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(refusal)) => refusal.into(),
                Err(_) => return Err(last),
            };
            if !is_worth_a_retry(refused.reason) || Instant::now() + PAUSE >= deadline {
                return Err(refused);
            }
            last = refused;
            sleep(PAUSE).await;
        }
    }

    /// Creates a volume; waits for services that are away.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn create(&self, name: &str, bytes: u64, replicas: u32) -> Result<Volume, Refused> {
        let (name, size_bytes) = (name.to_owned(), bytes);
        let request = CreateVolumeRequest { name, size_bytes, replicas, ..Default::default() };
        self.create_as(request).await
    }

    /// Creates a volume with any properties.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn create_as(&self, request: CreateVolumeRequest) -> Result<Volume, Refused> {
        let call = || {
            let (mut volumes, request) = (self.volumes(), request.clone());
            async move { volumes.create(request).await.map(tonic::Response::into_inner) }
        };
        self.persist(call).await
    }

    /// Opens a volume.
    ///
    /// # Errors
    /// [`Refused`]. Another owner is an error at once unless `force`.
    pub async fn open(&self, name: &str, force: bool) -> Result<Volume, Refused> {
        let request = OpenRequest { name: name.to_owned(), force };
        Ok(self.volumes().open(request).await?.into_inner())
    }

    /// Waits until everything acknowledged before is durable.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn fsync(&self, volume: &str) -> Result<(), Refused> {
        self.sync(volume, false).await
    }

    /// Makes everything acknowledged durable; what is little may stay in the data log.
    ///
    /// # Errors
    /// As [`Client::fsync`].
    pub async fn flush(&self, volume: &str) -> Result<(), Refused> {
        self.sync(volume, true).await
    }

    async fn sync(&self, volume: &str, may_log: bool) -> Result<(), Refused> {
        let call = || {
            let (mut io, volume) = (self.io(), volume.to_owned());
            async move {
                io.fsync(FsyncRequest { volume, may_log, ..Default::default() }).await.map(drop)
            }
        };
        self.persist(call).await
    }

    /// Reads bytes; pieces of zeroes are spelled out.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn read(&self, volume: &str, offset: u64, length: u64) -> Result<Vec<u8>, Refused> {
        let call = || {
            let (mut io, volume) = (self.io(), volume.to_owned());
            let request = ReadRequest {
                volume,
                offset_bytes: offset,
                length_bytes: length,
                ..Default::default()
            };
            async move { assemble(io.read(request).await?.into_inner(), offset, length).await }
        };
        self.persist(call).await
    }

    /// What a check finds, data included if asked.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn check(&self, read_data: bool) -> Result<CheckResponse, Refused> {
        let call = || {
            let mut inspect = self.inspect();
            async move {
                inspect.check(CheckRequest { read_data }).await.map(tonic::Response::into_inner)
            }
        };
        self.persist(call).await
    }

    /// At rest: no io_end lives, space adds up, nothing is found wrong. Waits, bounded, until
    /// io_ends and quarantine have gone.
    ///
    /// # Errors
    /// What is still wrong when patience ends.
    pub async fn settles(&self) -> anyhow::Result<CheckResponse> {
        let deadline = Instant::now() + self.patience;
        loop {
            let wrong = match self.settled().await {
                Ok(check) => return Ok(check),
                Err(wrong) => wrong,
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(wrong);
            }
            sleep(PAUSE * 4).await;
        }
    }

    async fn settled(&self) -> anyhow::Result<CheckResponse> {
        let io_ends = self.inspect().io_ends(ListIoEndsRequest::default()).await?.into_inner();
        checkers::every_io_end_ends(&io_ends)?;
        let stores = self.inspect().stores(ListStoresRequest {}).await?.into_inner().stores;
        let check = self.check(true).await?;
        let metadata = check.metadata.clone().context("a check tells about the metadata")?;
        checkers::space_adds_up(&metadata, &stores)?;
        // What is on a store that a test took away is not to be judged.
        let is_read = |finding: &&String| !finding.ends_with(" cannot be reached");
        let findings: Vec<_> = check.findings.iter().filter(is_read).cloned().collect();
        if !findings.is_empty() {
            let finding = findings.join("; ");
            bail!(Broken { checker: "no_foreign_or_stale_byte", finding });
        }
        Ok(check)
    }

    /// Spans that are still in memory.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn spans(&self, request: ListSpansRequest) -> Result<Vec<common::Span>, Refused> {
        Ok(self.inspect().trace(request).await?.into_inner().spans)
    }
}

/// Puts the pieces of a read together and insists that they fit.
async fn assemble(
    mut pieces: Streaming<endio_api::writeback::ReadResponse>,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>, Status> {
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    while let Some(piece) = pieces.message().await? {
        let at = offset + bytes.len() as u64;
        if piece.offset_bytes != at || (piece.zeroes_bytes > 0) != piece.data.is_empty() {
            return Err(Status::invalid_argument(format!("a piece at {} fits not", at)));
        }
        bytes.extend_from_slice(&piece.data);
        bytes.resize(bytes.len() + usize::try_from(piece.zeroes_bytes).unwrap_or(0), 0);
    }
    if bytes.len() as u64 != length {
        let got = bytes.len();
        return Err(Status::unavailable(format!("the read ended after {got} of {length} bytes")));
    }
    Ok(bytes)
}

/// A write to submit.
#[derive(Clone, Debug)]
pub struct Put {
    /// Volume.
    pub volume: String,
    /// First byte.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
    /// Acknowledge after the conversion.
    pub direct: bool,
    /// Acknowledge once durable.
    pub dsync: bool,
}

/// A stream of requests in flight that survives broken connections: what has no completion is sent
/// again, in order, as a retry.
#[derive(Debug)]
pub struct Pipe {
    client: Client,
    session: Bytes,
    sequence: u64,
    cookie: u64,
    outstanding: BTreeMap<u64, IoRequest>,
    /// Cookies to send again on the stream that stands.
    again: VecDeque<(Instant, u64)>,
    stream: Option<Connected>,
    /// Requests that were sent a second time.
    pub retries: u64,
}

#[derive(Debug)]
struct Connected {
    sender: mpsc::Sender<IoRequest>,
    completions: Streaming<IoCompletion>,
}

/// Requests that may wait for the connection.
const IN_FLIGHT_MAX: usize = 256;

impl Pipe {
    /// A pipe of a new session. `session` is unique for each.
    pub fn new(client: Client, session: u128) -> Self {
        Self {
            client,
            session: Bytes::copy_from_slice(&session.to_le_bytes()),
            sequence: 0,
            cookie: 0,
            outstanding: BTreeMap::new(),
            again: VecDeque::new(),
            stream: None,
            retries: 0,
        }
    }

    /// Number of requests without a completion.
    pub fn in_flight(&self) -> usize {
        self.outstanding.len()
    }

    fn retry_key(&mut self) -> Option<RetryKey> {
        self.sequence += 1;
        Some(RetryKey { session: self.session.clone(), sequence: self.sequence, is_retry: false })
    }

    /// Submits a write; returns its cookie.
    pub async fn write(&mut self, put: Put) -> u64 {
        let mode = if put.direct { WriteMode::Direct } else { WriteMode::Buffered };
        let write = WriteRequest {
            volume: put.volume,
            offset_bytes: put.offset,
            data: put.data,
            mode: mode.into(),
            dsync: put.dsync,
            retry: self.retry_key(),
            traceparent: String::new(),
        };
        self.submit(Op::Write(write)).await
    }

    fn range(&mut self, volume: &str, offset: u64, length: u64) -> RangeRequest {
        RangeRequest {
            volume: volume.to_owned(),
            offset_bytes: offset,
            length_bytes: length,
            retry: self.retry_key(),
            traceparent: String::new(),
        }
    }

    /// Submits a trim; returns its cookie.
    pub async fn trim(&mut self, volume: &str, offset: u64, length: u64) -> u64 {
        let range = self.range(volume, offset, length);
        self.submit(Op::Trim(range)).await
    }

    /// Submits a zeroing; returns its cookie.
    pub async fn write_zeroes(&mut self, volume: &str, offset: u64, length: u64) -> u64 {
        let range = self.range(volume, offset, length);
        self.submit(Op::WriteZeroes(range)).await
    }

    /// Submits an fsync; returns its cookie.
    pub async fn fsync(&mut self, volume: &str) -> u64 {
        self.submit(Op::Fsync(FsyncRequest {
            volume: volume.to_owned(),
            may_log: false,
            ..Default::default()
        }))
        .await
    }

    /// Submits one that may leave what is little in the data log; returns its cookie.
    pub async fn flush(&mut self, volume: &str) -> u64 {
        self.submit(Op::Fsync(FsyncRequest {
            volume: volume.to_owned(),
            may_log: true,
            ..Default::default()
        }))
        .await
    }

    /// Submits a read of at most 1 MiB; returns its cookie.
    pub async fn read(&mut self, volume: &str, offset: u64, length: u64) -> u64 {
        let request = ReadRequest {
            volume: volume.to_owned(),
            offset_bytes: offset,
            length_bytes: length,
            traceparent: String::new(),
        };
        self.submit(Op::Read(request)).await
    }

    async fn submit(&mut self, op: Op) -> u64 {
        assert!(self.in_flight() < IN_FLIGHT_MAX, "take completions first");
        self.cookie += 1;
        let request = IoRequest { cookie: self.cookie, op: Some(op) };
        let mut kept = request.clone();
        if let Some(stream) = &self.stream {
            mark_as_retry(&mut kept);
            if stream.sender.send(request).await.is_err() {
                self.stream = None;
            }
        }
        self.outstanding.insert(self.cookie, kept);
        self.cookie
    }

    /// The next final completion: a success or a failure that no retry can mend.
    ///
    /// # Errors
    /// Patience ended without one, or the service answered what was not asked.
    pub async fn next(&mut self) -> anyhow::Result<IoCompletion> {
        let deadline = Instant::now() + self.client.patience;
        let mut last = String::from("nothing yet");
        while Instant::now() < deadline {
            if self.stream.is_none()
                && let Err(refused) = self.connect(deadline).await
            {
                last = refused.to_string();
                sleep(PAUSE).await;
                continue;
            }
            match self.step(deadline).await {
                Step::Final(completion) => {
                    let cookie = completion.cookie;
                    if self.outstanding.remove(&cookie).is_none() {
                        bail!("one_completion_per_write: {cookie} is not outstanding");
                    }
                    return Ok(completion);
                }
                Step::Again(reason) => last = reason,
            }
        }
        bail!("no completion in {:?}; last: {last}", self.client.patience)
    }

    async fn step(&mut self, deadline: Instant) -> Step {
        let Some(stream) = &mut self.stream else { return Step::Again("not connected".into()) };
        let due = self.again.front().map_or(deadline, |(due, _)| *due);
        let completion = match timeout_at(due, stream.completions.message()).await {
            Err(_) => return self.send_again().await,
            Ok(Ok(Some(completion))) => completion,
            Ok(Ok(None)) => return self.broken("the stream ended".into()),
            Ok(Err(refusal)) => return self.broken(refusal.to_string()),
        };
        match Reason::from_wire(completion.reason) {
            Some(reason) if is_worth_a_retry(reason) => {
                let due = Instant::now() + PAUSE;
                self.again.push_back((due, completion.cookie));
                Step::Again(format!("{reason}: {}", completion.message))
            }
            _ => Step::Final(completion),
        }
    }

    fn broken(&mut self, why: String) -> Step {
        self.stream = None;
        Step::Again(why)
    }

    async fn send_again(&mut self) -> Step {
        let Some((_, cookie)) = self.again.pop_front() else {
            return Step::Again("no answer".into());
        };
        let Some(request) = self.outstanding.get_mut(&cookie) else {
            return Step::Again(format!("{cookie} was answered twice"));
        };
        self.retries += 1;
        let request = request.clone();
        if let Some(stream) = &self.stream
            && stream.sender.send(request).await.is_err()
        {
            self.stream = None;
        }
        Step::Again("sent again".into())
    }

    async fn connect(&mut self, deadline: Instant) -> Result<(), Refused> {
        let (sender, requests) = mpsc::channel(IN_FLIGHT_MAX);
        // What was refused retryably goes out with the rest, in order.
        self.again.clear();
        for request in self.outstanding.values_mut() {
            sender.send(request.clone()).await.expect("the receiver is right here");
            self.retries += u64::from(is_retry(request));
            mark_as_retry(request);
        }
        let mut io = self.client.io();
        let opening = io.submit(ReceiverStream::new(requests));
        let opened = timeout_at(deadline.min(Instant::now() + Duration::from_secs(5)), opening);
        let completions = match opened.await {
            Ok(opened) => opened?.into_inner(),
            Err(_) => return Err(Status::unavailable("no answer to Submit").into()),
        };
        self.stream = Some(Connected { sender, completions });
        Ok(())
    }

    /// Forgets what has no completion: its outcome stays unknown. Returns the cookies.
    pub fn give_up(&mut self) -> Vec<u64> {
        self.stream = None;
        self.again.clear();
        std::mem::take(&mut self.outstanding).into_keys().collect()
    }
}

enum Step {
    Final(IoCompletion),
    Again(String),
}

fn retry_of(request: &mut IoRequest) -> Option<&mut RetryKey> {
    match &mut request.op {
        Some(Op::Write(write)) => write.retry.as_mut(),
        Some(Op::Trim(range) | Op::WriteZeroes(range) | Op::Allocate(range)) => {
            range.retry.as_mut()
        }
        Some(Op::Read(_) | Op::Fsync(_)) | None => None,
    }
}

/// From now on this request may have been applied before.
fn mark_as_retry(request: &mut IoRequest) {
    if let Some(retry) = retry_of(request) {
        retry.is_retry = true;
    }
}

fn is_retry(request: &mut IoRequest) -> bool {
    retry_of(request).is_some_and(|retry| retry.is_retry)
}
