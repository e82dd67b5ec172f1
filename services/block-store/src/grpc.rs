//! The skin: decode, hand over, await, encode. No rule of the domain lives here.

use std::{
    collections::VecDeque,
    future::ready,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::Poll,
};

use endio_api::{
    blockstore::{
        Bio, BioDone, DescribeRequest, DescribeResponse, ReadDone, ReadRequest,
        block_store_server::BlockStore,
    },
    protocol, status,
};
use endio_types::{BLOCK_BYTES, IO_END_BLOCKS_MAX};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    bio::{Answer, Permits, Reply},
    driver::Driver,
    reader::{self, Job},
};

/// Reads of one stream that are begun before others get their turn.
const STREAK: usize = 32;

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
        let waiting = VecDeque::new();
        let reads = Reads { driver, requests: request.into_inner(), budget, waiting };
        tokio::spawn(reads.run());
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

/// The reads of one stream. Those that were ready together reach the threads together.
struct Reads {
    driver: Arc<Driver>,
    requests: Streaming<ReadRequest>,
    budget: Budget<ReadDone>,
    waiting: VecDeque<Box<Job>>,
}

impl Reads {
    async fn run(mut self) {
        for streak in 1.. {
            if self.one().await.is_none() {
                break;
            }
            if streak % STREAK == 0 {
                reader::submit(&self.driver, &mut self.waiting);
                tokio::task::yield_now().await;
            }
        }
        reader::submit(&self.driver, &mut self.waiting);
    }

    /// Takes one request. Whatever has to be waited for, what was taken before goes on meanwhile.
    async fn one(&mut self) -> Option<()> {
        let Self { driver, requests, budget, waiting } = self;
        let mut hand_over = || reader::submit(driver, waiting);
        let request = before(&mut hand_over, next(driver, requests, &budget.broken)).await?;
        let bytes = u64::from(request.blocks) * BLOCK_BYTES;
        let reply = before(&mut hand_over, budget.reply(bytes)).await?;
        let turn = before(&mut hand_over, Arc::clone(&driver.reads).acquire_owned()).await.ok()?;
        if let Some(job) = Job::admit(driver, turn, request, reply)
            && let Err(job) = job.at_once()
        {
            waiting.push_back(job);
        }
        Some(())
    }
}

/// Does something before it waits, if it has to wait.
async fn before<T>(wait: &mut impl FnMut(), wanted: impl Future<Output = T>) -> T {
    let mut wanted = pin!(wanted);
    match futures_util::poll!(wanted.as_mut()) {
        Poll::Ready(found) => found,
        Poll::Pending => {
            wait();
            wanted.await
        }
    }
}
