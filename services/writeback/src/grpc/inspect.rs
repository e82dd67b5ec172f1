//! `endio.writeback.v1.Inspect`.

use std::sync::Arc;

use endio_api::common::{ListSpansRequest, ListSpansResponse};
use endio_api::conversion::{
    BackupPiece, BackupRequest, ListIoEndsRequest, ListIoEndsResponse, ListStoresRequest,
    ListStoresResponse,
};
use endio_api::writeback::inspect_server::Inspect;
use endio_api::writeback::{
    CheckRequest, CheckResponse, ExtentsRequest, ExtentsResponse, StatusRequest, StatusResponse,
};
use endio_types::Reason;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::caller::Caller;
use crate::access::Access;
use crate::engine::Engine;
use crate::failure::Failure;

/// Extents in one message: with their checksums it stays far below the size limit.
const EXTENTS_PER_MESSAGE: usize = 1_024;

/// Questions.
pub(crate) struct InspectService {
    pub(crate) engine: Arc<Engine>,
}

#[tonic::async_trait]
impl Inspect for InspectService {
    type ExtentsStream = BoxStream<'static, Result<ExtentsResponse, Status>>;

    async fn extents(
        &self,
        request: Request<ExtentsRequest>,
    ) -> Result<Response<Self::ExtentsStream>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        let ExtentsRequest { volume, offset_bytes, length_bytes } = request;
        let engine = Arc::clone(&self.engine);
        caller.may(&engine.config, &volume, Access::ReadOnly)?;
        let volume = engine.volume(&volume).await?;
        let range = engine.blocks_of(&volume, offset_bytes, length_bytes)?;
        let parts = stream::try_unfold(range.start.0, move |at| {
            let (engine, volume) = (Arc::clone(&engine), Arc::clone(&volume));
            async move { Ok::<_, Status>(engine.extents(&volume, range, at).await?) }
        });
        let messages = parts.flat_map(|part| {
            let messages: Vec<Result<ExtentsResponse, Status>> = match part {
                Ok(extents) => extents
                    .chunks(EXTENTS_PER_MESSAGE)
                    .map(|some| Ok(ExtentsResponse { extents: some.to_vec() }))
                    .collect(),
                Err(status) => vec![Err(status)],
            };
            stream::iter(messages)
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn io_ends(
        &self,
        request: Request<ListIoEndsRequest>,
    ) -> Result<Response<ListIoEndsResponse>, Status> {
        Ok(Response::new(self.engine.io_ends(request.into_inner()).await?))
    }

    async fn stores(
        &self,
        _: Request<ListStoresRequest>,
    ) -> Result<Response<ListStoresResponse>, Status> {
        Ok(Response::new(self.engine.store_list().await?))
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        Ok(Response::new(self.engine.check(request.into_inner().read_data).await?))
    }

    async fn trace(
        &self,
        request: Request<ListSpansRequest>,
    ) -> Result<Response<ListSpansResponse>, Status> {
        Ok(Response::new(self.engine.trace(request.into_inner()).await))
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let caller = Caller::of(&request);
        let mut status = match request.into_inner().cluster {
            true => self.engine.cluster_status().await,
            false => self.engine.status(),
        };
        caller.narrow(&self.engine.config, &mut status);
        Ok(Response::new(status))
    }

    type BackupStream = BoxStream<'static, Result<BackupPiece, Status>>;

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        // Not tried again in here: the file begins anew with each try.
        let pieces = self.engine.conversion.client().backup(request.into_inner()).await;
        let pieces = pieces.map_err(of_conversion)?.into_inner();
        Ok(Response::new(pieces.map(|piece| piece.map_err(of_conversion)).boxed()))
    }
}

/// An error of the connection to conversion is not one of the connection to us.
fn of_conversion(status: Status) -> Status {
    let failure = Failure::from(status);
    if failure.reason == Reason::PeerAway { Failure::conversion_away() } else { failure }.into()
}
