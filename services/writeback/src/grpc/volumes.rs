//! `endio.writeback.v1.Volumes`.

use std::sync::Arc;

use endio_api::conversion::{
    CloseVolumeResponse, CreateVolumeRequest, ListVolumesRequest, ListVolumesResponse, Volume,
};
use endio_api::writeback::volumes_server::Volumes;
use endio_api::writeback::{
    DeleteRequest, DeleteResponse, OpenRequest, ResizeRequest, VolumeRequest,
};
use tonic::{Request, Response, Status};

use crate::engine::Engine;

/// Volumes.
pub(crate) struct VolumesService {
    pub(crate) engine: Arc<Engine>,
}

#[tonic::async_trait]
impl Volumes for VolumesService {
    async fn create(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        Ok(Response::new(self.engine.create(request.into_inner()).await?))
    }

    async fn get(&self, request: Request<VolumeRequest>) -> Result<Response<Volume>, Status> {
        Ok(Response::new(self.engine.describe(&request.into_inner().name).await?))
    }

    async fn list(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        Ok(Response::new(ListVolumesResponse { volumes: self.engine.list().await? }))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Result<Response<Volume>, Status> {
        let ResizeRequest { name, size_bytes } = request.into_inner();
        Ok(Response::new(self.engine.resize(&name, size_bytes).await?))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        self.engine.delete(&request.into_inner().name).await?;
        Ok(Response::new(DeleteResponse {}))
    }

    async fn open(&self, request: Request<OpenRequest>) -> Result<Response<Volume>, Status> {
        let OpenRequest { name, force } = request.into_inner();
        self.engine.open(&name, force).await?;
        Ok(Response::new(self.engine.describe(&name).await?))
    }

    async fn close(
        &self,
        request: Request<VolumeRequest>,
    ) -> Result<Response<CloseVolumeResponse>, Status> {
        self.engine.close(&request.into_inner().name).await?;
        Ok(Response::new(CloseVolumeResponse {}))
    }
}
