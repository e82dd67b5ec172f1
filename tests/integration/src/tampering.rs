//! A conversion between a writeback and the real one: it passes everything on, and says of a volume's
//! data log what a test wants to be said.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::conversion_server::{Conversion, ConversionServer};
use endio_api::conversion::*;
use endio_chassis::net::Incoming;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use crate::raw;
use crate::services::bind;

/// What is made of an answer; the request is the one that it answers.
pub type Tamper = Box<dyn Fn(&ReadLogRequest, ReadLogResponse) -> ReadLogResponse + Send + Sync>;

/// The conversion between.
pub struct Tampering {
    /// Where it answers.
    pub url: String,
    tamper: Arc<Mutex<Option<Tamper>>>,
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
        let tamper = Arc::default();
        let service = Between { client: raw::conversion(conversion), tamper: Arc::clone(&tamper) };
        let server = tokio::spawn(async move {
            let mut server = tonic::transport::Server::builder();
            let router = server.add_service(ConversionServer::new(service));
            router.serve_with_incoming(Incoming::new([listener])).await.expect("it serves");
        });
        Self { url, tamper, server }
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

struct Between {
    client: ConversionClient<Channel>,
    tamper: Arc<Mutex<Option<Tamper>>>,
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn streamed<T: Send + 'static>(answer: Response<Streaming<T>>) -> Response<Streamed<T>> {
    Response::new(Box::pin(answer.into_inner()))
}

macro_rules! passes_on {
    ($($call:ident: $request:ty => $answer:ty;)*) => {
        #[tonic::async_trait]
        impl Conversion for Between {
            $(async fn $call(&self, request: Request<$request>) -> Answer<$answer> {
                self.client.clone().$call(request.into_inner()).await
            })*

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
                let messages = request.into_inner().map_while(Result::ok);
                Ok(streamed(self.client.clone().writeback_session(messages).await?))
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
    list_volumes: ListVolumesRequest => ListVolumesResponse;
    resize_volume: ResizeVolumeRequest => Volume;
    delete_volume: DeleteVolumeRequest => DeleteVolumeResponse;
    open_volume: OpenVolumeRequest => OpenVolumeResponse;
    close_volume: CloseVolumeRequest => CloseVolumeResponse;
    lookup: LookupRequest => LookupResponse;
    change_map: ChangeMapRequest => ChangeMapResponse;
    list_stores: ListStoresRequest => ListStoresResponse;
    list_io_ends: ListIoEndsRequest => ListIoEndsResponse;
    check: CheckRequest => CheckResponse;
    describe: DescribeRequest => DescribeResponse;
}
