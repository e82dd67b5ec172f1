//! A stream of questions whose answers come in any order.

use std::collections::BTreeMap;
use std::future::Future;

use bytes::Bytes;
use endio_api::blockstore::{
    Bio, BioDone, ReadDone, ReadRequest, block_store_client::BlockStoreClient,
};
use endio_api::protocol;
use endio_types::Reason;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{Limits, store_away};
use crate::failure::Failure;

/// What is asked and answered.
pub(super) trait Protocol: Send + 'static {
    /// Questions that the transport takes before it sends them, in one step if it can.
    const IN_TRANSPORT: usize;

    /// The question.
    type Ask: Send + 'static;
    /// The answer as it comes over the wire.
    type Answer: Send + 'static;
    /// The answer for the caller.
    type Value: Send + 'static;
    /// Which question an answer belongs to.
    type Key: Ord + Send + 'static;

    /// Gives the question its key.
    fn key(&mut self, ask: &mut Self::Ask) -> Self::Key;
    /// Opens the stream.
    fn open(
        &mut self,
        asks: ReceiverStream<Self::Ask>,
    ) -> impl Future<Output = Result<Streaming<Self::Answer>, Status>> + Send;
    /// Takes an answer apart.
    fn value(answer: Self::Answer) -> (Self::Key, Result<Self::Value, Failure>);
}

type Reply<P> = oneshot::Sender<Result<<P as Protocol>::Value, Failure>>;

struct Job<P: Protocol> {
    ask: P::Ask,
    reply: Reply<P>,
}

/// Handle of the stream. The stream ends when the handle is dropped.
pub(super) struct Exchange<P: Protocol> {
    jobs: mpsc::Sender<Job<P>>,
}

impl<P: Protocol> Exchange<P> {
    /// Starts the task that owns the stream.
    pub(super) fn start(protocol: P, limits: Limits) -> Self {
        let (jobs, queue) = mpsc::channel(limits.queue);
        tokio::spawn(run(protocol, queue, limits));
        Self { jobs }
    }

    /// Puts a question in the stream's queue.
    pub(super) async fn hand_over(
        &self,
        ask: P::Ask,
    ) -> Result<oneshot::Receiver<Result<P::Value, Failure>>, Failure> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job { ask, reply }).await.map_err(|_| store_away())?;
        Ok(answer)
    }
}

/// Opens the stream whenever there is something to ask, until the handle is gone.
async fn run<P: Protocol>(mut protocol: P, mut queue: mpsc::Receiver<Job<P>>, limits: Limits) {
    while let Some(first) = queue.recv().await {
        let (asks, stream) = mpsc::channel(P::IN_TRANSPORT);
        let opened = {
            let open = protocol.open(ReceiverStream::new(stream));
            timeout(limits.connect, open).await
        };
        match opened {
            Ok(Ok(inbound)) => standing(&mut protocol, first, &mut queue, asks, inbound).await,
            Ok(Err(status)) => {
                let reason = endio_api::status::reason(&status);
                if matches!(reason, Reason::Protocol | Reason::NotAllowed) {
                    tracing::error!(error = %status, "a block-store refuses to speak with us");
                } else {
                    tracing::debug!(error = %status, "no stream to a block-store");
                }
                let _ = first.reply.send(Err(store_away()));
            }
            Err(_) => drop(first.reply.send(Err(store_away()))),
        }
    }
}

/// One stream until it breaks. Whoever waits then hears that the store is away, by the drop of
/// what is owed.
async fn standing<P: Protocol>(
    protocol: &mut P,
    first: Job<P>,
    queue: &mut mpsc::Receiver<Job<P>>,
    asks: mpsc::Sender<P::Ask>,
    mut inbound: Streaming<P::Answer>,
) {
    let mut owed: BTreeMap<P::Key, Reply<P>> = BTreeMap::new();
    let mut next = Some(first);
    loop {
        tokio::select! {
            biased;
            answer = inbound.message() => match answer {
                Ok(Some(answer)) => {
                    let (key, value) = P::value(answer);
                    if let Some(reply) = owed.remove(&key) {
                        // Whoever asked may have gone.
                        let _ = reply.send(value);
                    }
                }
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(error = %status, "stream to a block-store broke");
                    return;
                }
            },
            permit = asks.reserve(), if next.is_some() => {
                let (Ok(permit), Some(mut job)) = (permit, next.take()) else { return };
                owed.insert(protocol.key(&mut job.ask), job.reply);
                permit.send(job.ask);
            }
            job = queue.recv(), if next.is_none() => match job {
                Some(job) => {
                    next = Some(job);
                    // What was asked together leaves together.
                    while let Some(mut job) = next.take() {
                        let Ok(permit) = asks.try_reserve() else {
                            next = Some(job);
                            break;
                        };
                        owed.insert(protocol.key(&mut job.ask), job.reply);
                        permit.send(job.ask);
                        next = queue.try_recv().ok();
                    }
                }
                None => break,
            },
        }
    }
    // The last answers still count, and nothing new can come.
    drain::<P>(owed, asks, inbound).await;
}

async fn drain<P: Protocol>(
    mut owed: BTreeMap<P::Key, Reply<P>>,
    asks: mpsc::Sender<P::Ask>,
    mut inbound: Streaming<P::Answer>,
) {
    drop(asks);
    if owed.is_empty() {
        return;
    }
    while let Ok(Some(answer)) = inbound.message().await {
        let (key, value) = P::value(answer);
        if let Some(reply) = owed.remove(&key) {
            let _ = reply.send(value);
        }
        if owed.is_empty() {
            return;
        }
    }
}

fn client(channel: Channel) -> BlockStoreClient<Channel> {
    BlockStoreClient::new(channel)
        .max_decoding_message_size(crate::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(crate::MESSAGE_BYTES_MAX)
}

/// Segments.
pub(super) struct Writes {
    client: BlockStoreClient<Channel>,
}

impl Writes {
    pub(super) fn new(channel: Channel) -> Self {
        Self { client: client(channel) }
    }
}

impl Protocol for Writes {
    /// They may be long.
    const IN_TRANSPORT: usize = 4;

    type Ask = Bio;
    type Answer = BioDone;
    type Value = ();
    /// io_end and segment.
    type Key = (u64, u32);

    fn key(&mut self, bio: &mut Bio) -> Self::Key {
        bio.token.as_ref().map_or((0, 0), |token| (token.io_end, token.segment))
    }

    async fn open(&mut self, asks: ReceiverStream<Bio>) -> Result<Streaming<BioDone>, Status> {
        Ok(self.client.write(protocol::say(asks)).await?.into_inner())
    }

    fn value(done: BioDone) -> (Self::Key, Result<(), Failure>) {
        let outcome = Failure::from_wire(done.reason, &done.message).map_or(Ok(()), Err);
        ((done.io_end, done.segment), outcome)
    }
}

/// Reads.
pub(super) struct Reads {
    client: BlockStoreClient<Channel>,
    next: u64,
}

impl Reads {
    pub(super) fn new(channel: Channel) -> Self {
        Self { client: client(channel), next: 1 }
    }
}

impl Protocol for Reads {
    const IN_TRANSPORT: usize = 64;

    type Ask = ReadRequest;
    type Answer = ReadDone;
    type Value = Bytes;
    type Key = u64;

    fn key(&mut self, read: &mut ReadRequest) -> u64 {
        read.request = self.next;
        self.next += 1;
        read.request
    }

    async fn open(
        &mut self,
        asks: ReceiverStream<ReadRequest>,
    ) -> Result<Streaming<ReadDone>, Status> {
        Ok(self.client.read(protocol::say(asks)).await?.into_inner())
    }

    fn value(done: ReadDone) -> (u64, Result<Bytes, Failure>) {
        let outcome = match Failure::from_wire(done.reason, &done.message) {
            None if done.data.is_empty() => {
                Err(Failure::new(Reason::IoError, "a block-store answered without data"))
            }
            None => Ok(done.data),
            Some(failure) => Err(failure),
        };
        (done.request, outcome)
    }
}
