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

use super::caller::Caller;
use crate::access::Access;
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
        let (caller, request) = (Caller::of(&request), request.into_inner());
        caller.may(&self.engine.config, &request.name, Access::Manage)?;
        Ok(Response::new(self.engine.create(request).await?))
    }

    async fn get(&self, request: Request<VolumeRequest>) -> Result<Response<Volume>, Status> {
        let (caller, name) = (Caller::of(&request), request.into_inner().name);
        caller.may(&self.engine.config, &name, Access::ReadOnly)?;
        Ok(Response::new(self.engine.describe(&name).await?))
    }

    async fn list(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let caller = Caller::of(&request);
        let mut list = self.engine.list().await?;
        list.volumes.retain(|volume| caller.sees(&self.engine.config, &volume.name));
        Ok(Response::new(list))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Result<Response<Volume>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        let ResizeRequest { name, size_bytes, volume } = request;
        caller.may(&self.engine.config, &name, Access::Manage)?;
        Ok(Response::new(self.engine.resize(&name, volume, size_bytes).await?))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        caller.may(&self.engine.config, &request.name, Access::Manage)?;
        self.engine.delete(&request.name, request.volume).await?;
        Ok(Response::new(DeleteResponse {}))
    }

    async fn open(&self, request: Request<OpenRequest>) -> Result<Response<Volume>, Status> {
        let (caller, request) = (Caller::of(&request), request.into_inner());
        let OpenRequest { name, force } = request;
        caller.may(&self.engine.config, &name, Access::ReadWrite)?;
        self.engine.open(&name, force).await?;
        Ok(Response::new(self.engine.describe(&name).await?))
    }

    async fn close(
        &self,
        request: Request<VolumeRequest>,
    ) -> Result<Response<CloseVolumeResponse>, Status> {
        let (caller, name) = (Caller::of(&request), request.into_inner().name);
        caller.may(&self.engine.config, &name, Access::ReadWrite)?;
        self.engine.close(&name).await?;
        Ok(Response::new(CloseVolumeResponse {}))
    }
}
