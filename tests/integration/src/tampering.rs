//! A conversion between a writeback and the real one: it passes everything on, and says of a volume's
//! data log what a test wants to be said. What it hears in a writeback's session it may lose or answer
//! by itself, it breaks sessions, and holds back opens and the answers to a close.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::conversion_message::Message as FromConversion;
use endio_api::conversion::conversion_server::{Conversion, ConversionServer};
use endio_api::conversion::writeback_message::Message as FromWriteback;
use endio_api::conversion::*;
use endio_chassis::net::Incoming;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use crate::raw;
use crate::services::bind;

/// What is made of an answer; the request is the one that it answers.
pub type Tamper = Box<dyn Fn(&ReadLogRequest, ReadLogResponse) -> ReadLogResponse + Send + Sync>;

/// A message of a writeback's session, on its way.
pub enum Said<'a> {
    /// To conversion.
    ByWriteback(&'a FromWriteback),
    /// To the writeback.
    ByConversion(&'a FromConversion),
}

/// What becomes of it.
pub enum Verdict {
    /// It arrives.
    PassOn,
    /// It is lost.
    Lose,
    /// It is lost, and the writeback is told this.
    Tell(FromConversion),
}

/// What becomes of each message of a session; it is asked before the message arrives.
pub type Judge = Box<dyn Fn(Said<'_>) -> Verdict + Send + Sync>;
type Judged = Arc<Mutex<Option<Judge>>>;
type Listed = Arc<Mutex<Option<ListVolumesResponse>>>;

/// Opens of volumes on their way.
#[derive(Default)]
struct Opens {
    are_held: bool,
    waiting: u32,
}

/// The conversion between.
pub struct Tampering {
    /// Where it answers.
    pub url: String,
    tamper: Arc<Mutex<Option<Tamper>>>,
    judge: Judged,
    list: Listed,
    holds_closes: Arc<watch::Sender<bool>>,
    opens: Arc<watch::Sender<Opens>>,
    sessions: Arc<Mutex<JoinSet<()>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Tampering {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Tampering {
    /// Starts one in front of the conversion there; it passes answers on as they are.
    pub async fn start(conversion: &str) -> Self {
        let listener = bind("127.0.0.1:0").await;
        let url = listener.url().to_owned();
        let service = Between {
            client: raw::conversion(conversion),
            tamper: Arc::default(),
            judge: Arc::default(),
            list: Arc::default(),
            holds_closes: Arc::default(),
            opens: Arc::default(),
            sessions: Arc::default(),
        };
        let Between { tamper, judge, list, holds_closes, opens, sessions, .. } = service.clone();
        let server = tokio::spawn(async move {
            let mut server = tonic::transport::Server::builder();
            let router = server.add_service(ConversionServer::new(service));
            router.serve_with_incoming(Incoming::new([listener])).await.expect("it serves");
        });
        Self { url, tamper, judge, list, holds_closes, opens, sessions, server }
    }

    /// Whether closes of volumes are carried out and not answered, until they may be.
    pub fn holds_closes(&self, holds: bool) {
        self.holds_closes.send_replace(holds);
    }

    /// Whether opens of volumes are held up on their way to conversion, until they may go on.
    pub fn holds_opens(&self, holds: bool) {
        self.opens.send_replace(Opens { are_held: holds, waiting: 0 });
    }

    /// Waits until one is held up, since they are.
    pub async fn open_is_held(&self) {
        // Its sender is in this service.
        let _ = self.opens.subscribe().wait_for(|opens| opens.waiting > 0).await;
    }

    /// These are all volumes that there are, from now on.
    pub fn lists(&self, volumes: Vec<Volume>) {
        let list = ListVolumesResponse { volumes, ..ListVolumesResponse::default() };
        *self.list.lock().unwrap_or_else(PoisonError::into_inner) = Some(list);
    }

    /// Messages of writebacks' sessions are judged like this from now on.
    pub fn judges(&self, judge: impl Fn(Said<'_>) -> Verdict + Send + Sync + 'static) {
        *self.judge.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(judge));
    }

    /// Ends every session of a writeback; new ones are taken.
    pub fn break_sessions(&self) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    /// Answers of the data log are changed like this from now on.
    pub fn tampers(
        &self,
        tamper: impl Fn(&ReadLogRequest, ReadLogResponse) -> ReadLogResponse + Send + Sync + 'static,
    ) {
        *self.tamper.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(tamper));
    }

    /// Answers are passed on as they are from now on.
    pub fn is_honest(&self) {
        *self.tamper.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[derive(Clone)]
struct Between {
    client: ConversionClient<Channel>,
    tamper: Arc<Mutex<Option<Tamper>>>,
    judge: Judged,
    list: Listed,
    holds_closes: Arc<watch::Sender<bool>>,
    opens: Arc<watch::Sender<Opens>>,
    sessions: Arc<Mutex<JoinSet<()>>>,
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn streamed<T: Send + 'static>(answer: Response<Streaming<T>>) -> Response<Streamed<T>> {
    Response::new(Box::pin(answer.into_inner()))
}

fn judge(judge: &Judged, said: Said<'_>) -> Verdict {
    let judge = judge.lock().unwrap_or_else(PoisonError::into_inner);
    judge.as_ref().map_or(Verdict::PassOn, |judge| judge(said))
}

/// What arrives of what a writeback says, and what it is told instead of the rest.
fn to_conversion(judged: &Judged, said: WritebackBatch) -> (WritebackBatch, ConversionBatch) {
    let (mut arrives, mut instead) = (WritebackBatch::default(), ConversionBatch::default());
    for message in said.messages {
        let said = message.message.as_ref().map(Said::ByWriteback);
        match said.map_or(Verdict::PassOn, |said| judge(judged, said)) {
            Verdict::PassOn => arrives.messages.push(message),
            Verdict::Lose => {}
            Verdict::Tell(answer) => {
                instead.messages.push(ConversionMessage { message: Some(answer) });
            }
        }
    }
    (arrives, instead)
}

/// What arrives of what conversion says.
fn to_writeback(judged: &Judged, said: ConversionBatch) -> ConversionBatch {
    let mut arrives = ConversionBatch::default();
    for message in said.messages {
        let said = message.message.as_ref().map(Said::ByConversion);
        match said.map_or(Verdict::PassOn, |said| judge(judged, said)) {
            Verdict::PassOn => arrives.messages.push(message),
            Verdict::Lose => {}
            Verdict::Tell(answer) => {
                arrives.messages.push(ConversionMessage { message: Some(answer) });
            }
        }
    }
    arrives
}

impl Between {
    /// A session, in a task of its own that can be ended at any time.
    fn session(&self, mut said: Streaming<WritebackBatch>) -> Streamed<ConversionBatch> {
        let (judged, mut client) = (Arc::clone(&self.judge), self.client.clone());
        let (tell, told) = mpsc::channel(1);
        let (pass_on, passed_on) = mpsc::channel(1);
        let session = async move {
            let up = async {
                while let Ok(Some(batch)) = said.message().await {
                    let (arrives, instead) = to_conversion(&judged, batch);
                    // Whoever has gone hears nothing.
                    if !instead.messages.is_empty() {
                        let _ = tell.send(Ok(instead)).await;
                    }
                    let _ = pass_on.send(arrives).await;
                }
            };
            let down = async {
                let mut answers = client.writeback_session(ReceiverStream::new(passed_on)).await?;
                while let Some(batch) = answers.get_mut().message().await? {
                    let _ = tell.send(Ok(to_writeback(&judged, batch))).await;
                }
                Ok(())
            };
            let ended = tokio::select! {
                biased;
                () = tell.closed() => Ok(()),
                () = up => Ok(()),
                ended = down => ended,
            };
            if let Err(status) = ended {
                let _ = tell.send(Err(status)).await;
            }
        };
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).spawn(session);
        Box::pin(ReceiverStream::new(told))
    }
}

macro_rules! passes_on {
    ($($call:ident: $request:ty => $answer:ty;)*) => {
        #[tonic::async_trait]
        impl Conversion for Between {
            $(async fn $call(&self, request: Request<$request>) -> Answer<$answer> {
                self.client.clone().$call(request.into_inner()).await
            })*

            async fn list_volumes(
                &self,
                request: Request<ListVolumesRequest>,
            ) -> Answer<ListVolumesResponse> {
                let list = self.list.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match list {
                    Some(list) => Ok(Response::new(list)),
                    None => self.client.clone().list_volumes(request.into_inner()).await,
                }
            }

            async fn open_volume(
                &self,
                request: Request<OpenVolumeRequest>,
            ) -> Answer<OpenVolumeResponse> {
                self.opens.send_modify(|opens| opens.waiting += 1);
                let mut opens = self.opens.subscribe();
                // Its sender is in this service.
                let _ = opens.wait_for(|opens| !opens.are_held).await;
                self.client.clone().open_volume(request.into_inner()).await
            }

            async fn close_volume(
                &self,
                request: Request<CloseVolumeRequest>,
            ) -> Answer<CloseVolumeResponse> {
                let answer = self.client.clone().close_volume(request.into_inner()).await;
                let mut holds = self.holds_closes.subscribe();
                // Its sender is in this service.
                let _ = holds.wait_for(|holds| !holds).await;
                answer
            }

            async fn read_log(&self, request: Request<ReadLogRequest>) -> Answer<ReadLogResponse> {
                let request = request.into_inner();
                let answer = self.client.clone().read_log(request).await?.into_inner();
                let tamper = self.tamper.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Response::new(match &*tamper {
                    Some(tamper) => tamper(&request, answer),
                    None => answer,
                }))
            }

            type WritebackSessionStream = Streamed<ConversionBatch>;

            async fn writeback_session(
                &self,
                request: Request<Streaming<WritebackBatch>>,
            ) -> Answer<Self::WritebackSessionStream> {
                Ok(Response::new(self.session(request.into_inner())))
            }

            type StoreSessionStream = Streamed<StoreCommandBatch>;

            async fn store_session(
                &self,
                request: Request<Streaming<StoreBatch>>,
            ) -> Answer<Self::StoreSessionStream> {
                let messages = request.into_inner().map_while(Result::ok);
                Ok(streamed(self.client.clone().store_session(messages).await?))
            }

            type ListExtentsStream = Streamed<ListExtentsResponse>;

            async fn list_extents(
                &self,
                request: Request<ListExtentsRequest>,
            ) -> Answer<Self::ListExtentsStream> {
                Ok(streamed(self.client.clone().list_extents(request.into_inner()).await?))
            }

            type BackupStream = Streamed<BackupPiece>;

            async fn backup(&self, request: Request<BackupRequest>) -> Answer<Self::BackupStream> {
                Ok(streamed(self.client.clone().backup(request.into_inner()).await?))
            }
        }
    };
}

passes_on! {
    create_volume: CreateVolumeRequest => Volume;
    get_volume: VolumeRequest => Volume;
    resize_volume: ResizeVolumeRequest => Volume;
    delete_volume: DeleteVolumeRequest => DeleteVolumeResponse;
    lookup: LookupRequest => LookupResponse;
    change_map: ChangeMapRequest => ChangeMapResponse;
    list_stores: ListStoresRequest => ListStoresResponse;
    list_io_ends: ListIoEndsRequest => ListIoEndsResponse;
    check: CheckRequest => CheckResponse;
    describe: DescribeRequest => DescribeResponse;
}
