//! A stream of questions whose answers come in any order.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

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

/// How long every question is refused at once after a stream could not be opened. Long enough that all who
/// waited for that stream are told of it, though the queue holds few of them at a time; short beside what an
/// open may take, so that a store that is back is soon asked again.
const REFUSE: Duration = Duration::from_millis(100);

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

    /// Puts a question in the stream's queue, and waits for room there as long as the stream takes nothing.
    ///
    /// Cancel-safe: the question is in the queue when this returns, and never otherwise.
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
                refuse(first, &mut queue).await;
            }
            Err(_) => refuse(first, &mut queue).await,
        }
    }
}

/// Answers everything that waits for a stream that could not be opened, and what comes in the next moment:
/// each would pay for an open of its own, one after the other.
async fn refuse<P: Protocol>(first: Job<P>, queue: &mut mpsc::Receiver<Job<P>>) {
    let over = tokio::time::sleep(REFUSE);
    tokio::pin!(over);
    let mut next = Some(first);
    while let Some(job) = next {
        // Whoever asked may have gone.
        let _ = job.reply.send(Err(store_away()));
        next = tokio::select! {
            biased;
            // First: whoever asks again and again does not put the next open off for ever.
            () = &mut over => None,
            next = queue.recv() => next,
        };
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    /// How a store that cannot be used meets a call.
    #[derive(Clone, Copy, Debug)]
    enum Store {
        Silent,
        FailsSlowly,
    }

    /// Streams that are never opened.
    struct Never {
        store: Store,
        opens: Arc<AtomicUsize>,
    }

    impl Protocol for Never {
        const IN_TRANSPORT: usize = 1;

        type Ask = u64;
        type Answer = u64;
        type Value = ();
        type Key = u64;

        fn key(&mut self, ask: &mut u64) -> u64 {
            *ask
        }

        async fn open(&mut self, _: ReceiverStream<u64>) -> Result<Streaming<u64>, Status> {
            self.opens.fetch_add(1, Ordering::Relaxed);
            match self.store {
                Store::Silent => std::future::pending().await,
                Store::FailsSlowly => tokio::time::sleep(Duration::from_millis(200)).await,
            }
            Err(Status::unavailable("it fails in the end"))
        }

        fn value(answer: u64) -> (u64, Result<(), Failure>) {
            (answer, Ok(()))
        }
    }

    /// However few of them the queue holds.
    #[tokio::test]
    async fn all_who_wait_for_a_stream_that_does_not_open_are_told_of_one_open() {
        const ASKED: usize = 64;
        for (store, queue) in
            [Store::Silent, Store::FailsSlowly].into_iter().flat_map(|s| [(s, 1), (s, 256)])
        {
            let opens = Arc::new(AtomicUsize::new(0));
            let never = Never { store, opens: Arc::clone(&opens) };
            let limits =
                Limits { queue, connect: Duration::from_millis(500), read: Duration::from_secs(1) };
            let exchange = Exchange::start(never, limits);
            let ask = async |number| exchange.hand_over(number).await?.await.unwrap();
            for answer in join_all((0..ASKED as u64).map(ask)).await {
                assert_eq!(answer.unwrap_err().reason, Reason::PeerAway);
            }
            // A machine that is slow may have been asked again before the last one was heard.
            let opens = opens.load(Ordering::Relaxed);
            assert!(opens <= 3, "{opens} opens for {store:?}, a queue of {queue}");
        }
    }
}
