//! What the skin may ask of the driver: events go in, one answer each comes out.

use endio_api::conversion::DescribeResponse;
use endio_state_machine::data_log::Logged;
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::machine::{
    Call, CheckReport, Deletions, Input, IoEndInfo, MapView, Refusal, ReplyBody, StoreInfo,
    ToStore, ToWriteback, VolumeInfo,
};
use endio_state_machine::machine::{StoreSession, WritebackSession};
use endio_store::meta::JournalHandle;
use endio_types::{Generation, Lblk, LblkRange, Reason, VolumeId};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A message for a peer, or the status that ends its stream.
pub(crate) enum Outgoing<M> {
    /// A message and, for a completion, the microseconds from the last release to the commit.
    Message(M, u64),
    /// The stream ends with this.
    Fail(tonic::Status),
}

/// The driver's end of a stream. Dropping it ends the stream and its reader.
pub(crate) struct Peer<M> {
    pub(crate) outgoing: mpsc::Sender<Outgoing<M>>,
    pub(crate) _alive: DropGuard,
}

/// The skin's end of a stream.
pub(crate) struct Stream<M, S> {
    pub(crate) session: S,
    pub(crate) outgoing: mpsc::Receiver<Outgoing<M>>,
    /// For the reader's own refusals; does not keep the stream open.
    pub(crate) fail: mpsc::WeakSender<Outgoing<M>>,
    /// Cancelled when the driver ends the stream.
    pub(crate) ended: CancellationToken,
}

/// An input and the traceparent of its span; empty: none.
pub(crate) type Traced = (Input, String);

pub(crate) enum Event {
    Inputs(Vec<Traced>),
    Call(Call, oneshot::Sender<Result<ReplyBody, Refusal>>),
    OpenWriteback(Peer<ToWriteback>, oneshot::Sender<WritebackSession>),
    OpenStore(Peer<ToStore>, oneshot::Sender<StoreSession>),
    Ask(Question),
}

/// Entries of a data log, or why they are not told.
pub(crate) type LoggedAnswer = Result<Vec<(Lblk, Logged)>, Refusal>;

pub(crate) enum Question {
    Lookup {
        volume: VolumeId,
        generation: Generation,
        range: LblkRange,
        attempts_over: u64,
        reply: oneshot::Sender<Result<MapView, Refusal>>,
    },
    /// Of a volume by name, behind a hole of any length at most so many blocks, and where to go on.
    Extents(String, LblkRange, u64, oneshot::Sender<Option<(Vec<MapExtent>, u64)>>),
    Logged(VolumeId, Generation, Lblk, usize, oneshot::Sender<LoggedAnswer>),
    /// By name.
    Volume(String, oneshot::Sender<Option<VolumeInfo>>),
    Volumes(oneshot::Sender<Vec<VolumeInfo>>),
    Stores(oneshot::Sender<Vec<StoreInfo>>),
    IoEnds(Option<VolumeId>, usize, oneshot::Sender<(Vec<IoEndInfo>, u64)>),
    Check(oneshot::Sender<CheckReport>),
    Describe(oneshot::Sender<DescribeResponse>),
    Deletions(oneshot::Sender<Deletions>),
    Journal(oneshot::Sender<JournalHandle>),
}

/// The driver has ended: the service is stopping or has failed.
fn gone() -> Refusal {
    Refusal { reason: Reason::Draining, message: "the service is stopping", retry_after_ms: 1_000 }
}

/// Talks to the driver. All queues are bounded: a full one makes the caller wait.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) session_queue_max: usize,
}

impl Handle {
    /// One call. Cancel-safe in that the call is either made or not; what it does goes on.
    pub(crate) async fn call(&self, call: Call) -> Result<ReplyBody, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.events.send(Event::Call(call, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Messages of one peer, in order. `false`: the driver has ended.
    pub(crate) async fn inputs(&self, inputs: Vec<Traced>) -> bool {
        inputs.is_empty() || self.events.send(Event::Inputs(inputs)).await.is_ok()
    }

    /// Asks something that changes nothing.
    pub(crate) async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Question,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.events.send(Event::Ask(question(reply))).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Opens a writeback's stream.
    pub(crate) async fn open_writeback(
        &self,
    ) -> Result<Stream<ToWriteback, WritebackSession>, Refusal> {
        self.open(Event::OpenWriteback).await
    }

    /// Opens a block-store's stream.
    pub(crate) async fn open_store(&self) -> Result<Stream<ToStore, StoreSession>, Refusal> {
        self.open(Event::OpenStore).await
    }

    async fn open<M, S>(
        &self,
        event: impl FnOnce(Peer<M>, oneshot::Sender<S>) -> Event,
    ) -> Result<Stream<M, S>, Refusal> {
        let (sender, outgoing) = mpsc::channel(self.session_queue_max);
        let fail = sender.downgrade();
        let ended = CancellationToken::new();
        let peer = Peer { outgoing: sender, _alive: ended.clone().drop_guard() };
        let (reply, answer) = oneshot::channel();
        self.events.send(event(peer, reply)).await.map_err(|_| gone())?;
        let session = answer.await.map_err(|_| gone())?;
        Ok(Stream { session, outgoing, fail, ended })
    }
}
