//! A writeback and a block-store of which a test decides every message: they speak the protocol to
//! the conversion service and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use endio_api::common::{Reason, Token};
use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::conversion_message::Message as Answer;
use endio_api::conversion::store_command::Command;
use endio_api::conversion::store_message::Message as FromStore;
use endio_api::conversion::writeback_message::Message as FromWriteback;
use endio_api::conversion::*;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

/// Longest wait for one answer.
const ANSWER_WAIT: Duration = Duration::from_secs(20);
/// How long silence must last to count as "no answer". Only ever used where an answer would be
/// a fault; a slow machine makes the test weaker, never wrong.
const SILENCE: Duration = Duration::from_millis(150);

/// A client of the conversion service.
pub fn conversion(url: &str) -> ConversionClient<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL");
    ConversionClient::new(endpoint.connect_lazy())
}

/// A writeback instance that does only what it is told.
pub struct RawWriteback {
    /// Its name.
    pub name: String,
    /// How many completions have come for each io_end, whether anybody waited for them or not.
    pub completions: BTreeMap<u64, u32>,
    sender: mpsc::Sender<WritebackBatch>,
    answers: Streaming<ConversionBatch>,
    queue: VecDeque<Answer>,
    request: u64,
}

impl RawWriteback {
    /// Opens a session and says hello.
    pub async fn connect(url: &str, name: &str) -> Self {
        Self::connect_over(conversion(url), name).await
    }

    /// The same over a connection of the caller's.
    pub async fn connect_over(mut client: ConversionClient<Channel>, name: &str) -> Self {
        let (sender, messages) = mpsc::channel(64);
        let hello = FromWriteback::Hello(Hello {
            writeback: name.to_owned(),
            protocol: endio_api::protocol::ours(),
        });
        sender.send(batch([hello])).await.expect("the channel is open");
        let opened = client.writeback_session(ReceiverStream::new(messages)).await;
        let answers = opened.expect("a session opens").into_inner();
        let (name, queue, completions) = (name.to_owned(), VecDeque::new(), BTreeMap::new());
        let mut writeback = Self { name, completions, sender, answers, queue, request: 0 };
        writeback.wait(|answer| matches!(answer, Answer::Welcome(_)).then_some(())).await;
        writeback
    }

    /// Sends one message.
    pub async fn send(&self, message: FromWriteback) {
        // A session that conversion has ended is noticed when an answer is waited for.
        let _ = self.sender.send(batch([message])).await;
    }

    /// The next answer that `pick` wants; others are dropped. `Err`: the session has ended.
    pub async fn try_wait<T>(
        &mut self,
        mut pick: impl FnMut(&Answer) -> Option<T>,
    ) -> Result<T, Option<Status>> {
        loop {
            while let Some(answer) = self.queue.pop_front() {
                if let Some(picked) = pick(&answer) {
                    return Ok(picked);
                }
            }
            let next = timeout(ANSWER_WAIT, self.answers.message()).await;
            match next.expect("conversion answers in time") {
                Ok(Some(batch)) => {
                    for answer in batch.messages.into_iter().filter_map(|m| m.message) {
                        if let Answer::Completion(completion) = &answer {
                            *self.completions.entry(completion.io_end).or_default() += 1;
                        }
                        self.queue.push_back(answer);
                    }
                }
                Ok(None) => return Err(None),
                Err(status) => return Err(Some(status)),
            }
        }
    }

    /// The same for a session that must not end.
    pub async fn wait<T>(&mut self, pick: impl FnMut(&Answer) -> Option<T>) -> T {
        match self.try_wait(pick).await {
            Ok(picked) => picked,
            Err(status) => panic!("the session ended: {status:?}"),
        }
    }

    /// Insists that nothing that `unwanted` names comes for a while.
    pub async fn stays_silent(&mut self, mut unwanted: impl FnMut(&Answer) -> bool) {
        let mut pick = |answer: &Answer| unwanted(answer).then(|| format!("{answer:?}"));
        if let Ok(Ok(answer)) = timeout(SILENCE, self.try_wait(&mut pick)).await {
            panic!("unwanted: {answer}");
        }
    }

    /// Begins a write and returns what was granted.
    pub async fn begin(&mut self, begin: BeginIo) -> Begun {
        match self.try_begin(begin).await {
            Ok(begun) => begun,
            Err(refused) => panic!("refused: {refused:?}"),
        }
    }

    /// Begins a write.
    pub async fn try_begin(&mut self, mut begin: BeginIo) -> Result<Begun, BeginRefused> {
        self.request += 1;
        begin.request = self.request;
        begin.attempt = begin.attempt.max(1);
        let request = self.request;
        self.send(FromWriteback::Begin(begin)).await;
        self.wait(|answer| match answer {
            Answer::Begun(begun) if begun.request == request => Some(Ok(begun.clone())),
            Answer::Refused(refused) if refused.request == request => Some(Err(refused.clone())),
            _ => None,
        })
        .await
    }

    /// Sends data for the data log, under a request number of its own.
    pub async fn try_log(&mut self, mut log: LogData) -> Result<(), BeginRefused> {
        self.request += 1;
        log.request = self.request;
        let request = self.request;
        self.send(FromWriteback::Log(log)).await;
        self.wait(|answer| match answer {
            Answer::Logged(logged) if logged.request == request => Some(Ok(())),
            Answer::Refused(refused) if refused.request == request => Some(Err(refused.clone())),
            _ => None,
        })
        .await
    }

    /// Releases the submitter's token; returns the reason of the answer (0: accepted).
    pub async fn release(&mut self, token: Token) -> Reason {
        self.release_as(ReleaseSubmitter { token: Some(token), ..Default::default() }).await
    }

    /// The same with every field.
    pub async fn release_as(&mut self, release: ReleaseSubmitter) -> Reason {
        let io_end = release.token.as_ref().map_or(0, |token| token.io_end);
        self.send(FromWriteback::Release(release)).await;
        // A completion may come first: it is kept for whoever waits for it.
        let mut kept = VecDeque::new();
        let reason = self
            .wait(|answer| match answer {
                Answer::Released(released) if released.io_end == io_end => Some(released.reason()),
                other => {
                    kept.push_back(other.clone());
                    None
                }
            })
            .await;
        kept.append(&mut self.queue);
        self.queue = kept;
        reason
    }

    /// Waits for the completion of an io_end.
    pub async fn completion(&mut self, io_end: u64) -> Completion {
        self.wait(|answer| match answer {
            Answer::Completion(completion) if completion.io_end == io_end => {
                Some(completion.clone())
            }
            _ => None,
        })
        .await
    }
}

fn batch(messages: impl IntoIterator<Item = FromWriteback>) -> WritebackBatch {
    let wrap = |message| WritebackMessage { message: Some(message) };
    WritebackBatch { messages: messages.into_iter().map(wrap).collect() }
}

/// A block-store that does only what it is told.
pub struct RawStore {
    /// Its number.
    pub id: u32,
    /// What it was told at its registration.
    pub registered: Registered,
    /// Its incarnation.
    pub incarnation: u64,
    /// Its identity.
    pub uuid: [u8; 16],
    sender: mpsc::Sender<StoreBatch>,
    commands: Streaming<StoreCommandBatch>,
    queue: VecDeque<Command>,
}

impl RawStore {
    /// Registers a new store of so many blocks and says that it is ready.
    pub async fn register(url: &str, capacity_blocks: u64) -> Self {
        let mut store = Self::register_as(url, rand::random(), 1, capacity_blocks).await;
        store.ready().await;
        store
    }

    /// Registers without saying that it is ready.
    pub async fn register_as(
        url: &str,
        uuid: [u8; 16],
        incarnation: u64,
        capacity_blocks: u64,
    ) -> Self {
        let client = conversion(url);
        let registered = Self::try_register(client, uuid, incarnation, capacity_blocks).await;
        registered.unwrap_or_else(|ended| panic!("the store is not registered: {ended:?}"))
    }

    /// The same over a connection of the caller's. `Err`: conversion ended the session.
    pub async fn try_register(
        mut client: ConversionClient<Channel>,
        uuid: [u8; 16],
        incarnation: u64,
        capacity_blocks: u64,
    ) -> Result<Self, Option<Status>> {
        let (sender, messages) = mpsc::channel(64);
        let register = RegisterStore {
            uuid: uuid.to_vec().into(),
            incarnation,
            capacity_blocks,
            url: "http://127.0.0.1:1".to_owned(),
            protocol: endio_api::protocol::ours(),
        };
        let first = store_batch([FromStore::Register(register)]);
        sender.send(first).await.expect("the channel is open");
        let opened = client.store_session(ReceiverStream::new(messages)).await;
        let commands = opened.expect("a session opens").into_inner();
        let (registered, queue) = (Registered::default(), VecDeque::new());
        let mut store = Self { id: 0, registered, incarnation, uuid, sender, commands, queue };
        let pick = |command: &Command| match command {
            Command::Registered(registered) => Some(registered.clone()),
            _ => None,
        };
        store.registered = store.try_wait(pick).await?;
        store.id = store.registered.store;
        Ok(store)
    }

    /// Says that everything of older epochs has drained.
    pub async fn ready(&mut self) {
        let cluster_epoch = self.registered.cluster_epoch;
        self.send(FromStore::Ready(StoreReady { cluster_epoch })).await;
    }

    /// Sends one message.
    pub async fn send(&self, message: FromStore) {
        let _ = self.sender.send(store_batch([message])).await;
    }

    /// The next command that `pick` wants; others stay for later. `Err`: the session has ended.
    pub async fn try_wait<T>(
        &mut self,
        mut pick: impl FnMut(&Command) -> Option<T>,
    ) -> Result<T, Option<Status>> {
        let mut seen = 0;
        loop {
            while let Some(command) = self.queue.get(seen) {
                if let Some(picked) = pick(command) {
                    self.queue.remove(seen);
                    return Ok(picked);
                }
                seen += 1;
            }
            let next = timeout(ANSWER_WAIT, self.commands.message()).await;
            match next.expect("conversion commands in time") {
                Ok(Some(batch)) => {
                    self.queue.extend(batch.commands.into_iter().filter_map(|c| c.command));
                }
                Ok(None) => return Err(None),
                Err(status) => return Err(Some(status)),
            }
        }
    }

    /// The same for a session that must not end.
    pub async fn wait<T>(&mut self, pick: impl FnMut(&Command) -> Option<T>) -> T {
        match self.try_wait(pick).await {
            Ok(picked) => picked,
            Err(status) => panic!("the session ended: {status:?}"),
        }
    }

    /// Releases a segment's token as durable; returns the reason of the answer (0: accepted).
    pub async fn release(&mut self, token: &Token) -> Reason {
        self.release_as(token, Reason::Unspecified).await
    }

    /// Releases a segment's token with an outcome.
    pub async fn release_as(&mut self, token: &Token, reason: Reason) -> Reason {
        let is_durable = reason == Reason::Unspecified;
        let blocks = usize::try_from(token.blocks).expect("few blocks");
        let release = SegmentRelease {
            token: Some(token.clone()),
            reason: reason.into(),
            crc32c: if is_durable { vec![7; blocks] } else { Vec::new() },
            traceparent: String::new(),
        };
        self.send(FromStore::Release(release)).await;
        let (io_end, segment) = (token.io_end, token.segment);
        self.wait(|command| match command {
            Command::Released(result) if (result.io_end, result.segment) == (io_end, segment) => {
                Some(result.reason())
            }
            _ => None,
        })
        .await
    }

    /// Waits for a fence that names the io_end; does not answer it.
    pub async fn fence_of(&mut self, io_end: u64) -> Fence {
        self.wait(|command| match command {
            Command::Fence(fence) if fence.io_ends.contains(&io_end) => Some(fence.clone()),
            _ => None,
        })
        .await
    }

    /// Says that everything up to that fence has drained.
    pub async fn fence_done(&self, fence: u64) {
        self.send(FromStore::FenceDone(FenceDone { fence })).await;
    }

    /// Answers whatever fences and punches wait now, without waiting for any.
    pub async fn obey(&mut self) {
        while let Ok(Ok(Some(batch))) = timeout(SILENCE, self.commands.message()).await {
            self.queue.extend(batch.commands.into_iter().filter_map(|c| c.command));
        }
        for command in std::mem::take(&mut self.queue) {
            match command {
                Command::Fence(fence) => self.fence_done(fence.fence).await,
                Command::Punch(punch) => {
                    let punch = punch.punch;
                    self.send(FromStore::PunchDone(PunchDone { punch })).await;
                }
                other => self.queue.push_back(other),
            }
        }
    }
}

fn store_batch(messages: impl IntoIterator<Item = FromStore>) -> StoreBatch {
    let wrap = |message| StoreMessage { message: Some(message) };
    StoreBatch { messages: messages.into_iter().map(wrap).collect() }
}
