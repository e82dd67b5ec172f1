//! The skin: decode, hand over, await, encode. No rule of the domain lives here.

use std::{
    future::ready,
    pin::Pin,
    sync::{Arc, OnceLock},
};

use endio_api::{
    blockstore::{
        Bio, BioDone, DescribeRequest, DescribeResponse, ReadDone, ReadRequest,
        block_store_server::BlockStore,
    },
    convert::reason_to_wire,
    protocol, status,
};
use endio_state_machine::gate::FlightId;
use endio_types::{BLOCK_BYTES, IO_END_BLOCKS_MAX};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    bio::{Answer, Permits, Reply},
    driver::Driver,
};

/// Largest message: the data of the longest bio, its checksums, its token.
pub(crate) const MESSAGE_BYTES_MAX: usize = (4 << 20) + (64 << 10);

/// The BlockStore service.
#[derive(Clone, Debug)]
pub(crate) struct BlockStoreService {
    pub(crate) driver: Arc<Driver>,
}

type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The budget of one stream.
struct Budget<T> {
    to: mpsc::Sender<Answer<T>>,
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    broken: Broken,
}

/// Why a stream could not be read to its end, told after its last answer: nobody hears it if the
/// connection broke, but a peer that sent garbage does.
type Broken = Arc<OnceLock<Status>>;

impl<T> Budget<T> {
    /// A budget and the stream of its answers.
    fn new(max: usize, bytes: &Arc<Semaphore>) -> (Self, AnswerStream<T>)
    where
        T: Send + 'static,
    {
        let (to, answers) = mpsc::channel(max);
        let (count, broken) = (Arc::new(Semaphore::new(max)), Broken::default());
        let budget = Self { to, count, bytes: Arc::clone(bytes), broken: Arc::clone(&broken) };
        // Taking an answer out returns its shares.
        let answers = ReceiverStream::new(answers).map(|answer: Answer<T>| Ok(answer.message));
        let end = stream::once(async move { broken.get().cloned() });
        let answers = answers.chain(end.filter_map(|broken| ready(broken.map(Err))));
        (budget, Box::pin(answers))
    }

    /// Waits for a share. `None`: never again.
    async fn reply(&self, bytes: u64) -> Option<Reply<T>> {
        // No message is larger than the limit of the decoder, and the budget is larger than that.
        let bytes = u32::try_from(bytes.min(u64::from(IO_END_BLOCKS_MAX) * BLOCK_BYTES)).ok()?;
        let count = Arc::clone(&self.count).acquire_owned().await.ok()?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.ok()?;
        Some(Reply { to: self.to.clone(), permits: Permits { _count: count, _bytes: bytes } })
    }
}

#[tonic::async_trait]
impl BlockStore for BlockStoreService {
    type WriteStream = AnswerStream<BioDone>;
    type ReadStream = AnswerStream<ReadDone>;

    async fn write(
        &self,
        request: Request<Streaming<Bio>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        protocol::check_metadata(request.metadata())?;
        let driver = Arc::clone(&self.driver);
        let (budget, answers) = Budget::new(driver.in_flight_per_stream_max, &driver.bio_bytes);
        let mut bios = request.into_inner();
        tokio::spawn(async move {
            while let Some(bio) = next(&driver, &mut bios, &budget.broken).await {
                let Some(reply) = budget.reply(bio.data.len() as u64).await else { return };
                driver.submit(bio, reply);
            }
        });
        Ok(Response::new(answers))
    }

    async fn read(
        &self,
        request: Request<Streaming<ReadRequest>>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        protocol::check_metadata(request.metadata())?;
        let driver = Arc::clone(&self.driver);
        let (budget, answers) = Budget::new(driver.in_flight_per_stream_max, &driver.read_bytes);
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            while let Some(request) = next(&driver, &mut requests, &budget.broken).await {
                let bytes = u64::from(request.blocks) * BLOCK_BYTES;
                let Some(reply) = budget.reply(bytes).await else { return };
                start_read(&driver, request, reply).await;
            }
        });
        Ok(Response::new(answers))
    }

    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(self.driver.describe()))
    }
}

/// The next message; `None` when the peer ended, broke off, or everything has drained.
async fn next<T>(driver: &Driver, from: &mut Streaming<T>, broken: &Broken) -> Option<T> {
    tokio::select! {
        biased;
        () = driver.closed.cancelled() => None,
        message = from.message() => message.unwrap_or_else(|status| {
            tracing::debug!(%status, "a stream broke off");
            let _ = broken.set(status::malformed("stream", status.message()));
            None
        }),
    }
}

/// Tells the gate that a read has ended, also if the reading panicked.
struct Reading {
    driver: Arc<Driver>,
    flight: FlightId,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.driver.finish_read(self.flight);
    }
}

async fn start_read(driver: &Arc<Driver>, request: ReadRequest, reply: Reply<ReadDone>) {
    let Ok(turn) = Arc::clone(&driver.reads).acquire_owned().await else { return };
    let flight = match driver.admit_read(&request) {
        Ok(flight) => flight,
        Err(reason) => {
            return reply.send(ReadDone {
                request: request.request,
                reason: reason_to_wire(Some(reason)),
                message: "the read is not allowed here and now".to_owned(),
                ..ReadDone::default()
            });
        }
    };
    let reading = Reading { driver: Arc::clone(driver), flight };
    let span = crate::TRACER
        .leg("segment", &request.traceparent)
        .with("pblk", request.pblk)
        .with("blocks", request.blocks)
        .with("length", u64::from(request.blocks) * BLOCK_BYTES);
    if let Some(done) = driver.read_at_once(&request) {
        // From the page cache: not worth two switches of threads.
        if done.reason != 0 {
            span.fail(&done.message);
        }
        drop((reading, turn, span));
        return reply.send(done);
    }
    tokio::task::spawn_blocking(move || {
        let done = reading.driver.read(&request);
        if done.reason != 0 {
            span.fail(&done.message);
        }
        drop((reading, turn, span));
        reply.send(done);
    });
}
