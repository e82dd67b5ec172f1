//! The skin: decode, hand over, await, encode. No rule of the domain lives here.

mod caller;
mod inspect;
mod io;
mod submit;
mod volumes;

use std::sync::Arc;

use endio_api::writeback::inspect_server::InspectServer;
use endio_api::writeback::io_server::IoServer;
use endio_api::writeback::volumes_server::VolumesServer;
use endio_chassis::shutdown::Shutdown;
use tonic::service::Routes;

use crate::MESSAGE_BYTES_MAX;
use crate::conversion::ANSWER_BYTES_MAX;
use crate::engine::Engine;

pub(crate) use inspect::InspectService;
pub(crate) use io::IoService;
pub(crate) use volumes::VolumesService;

/// Full names of the services, for health probes.
pub(crate) const SERVICES: &[&str] =
    &["endio.writeback.v1.Volumes", "endio.writeback.v1.Io", "endio.writeback.v1.Inspect"];

/// All services of the writeback but health and reflection.
pub(crate) fn routes(engine: &Arc<Engine>, shutdown: &Shutdown) -> Routes {
    let engine = || Arc::clone(engine);
    let io = IoService { engine: engine(), shutdown: shutdown.clone() };
    let traces = endio_api::traces::RecorderTraces::server(engine().recorder.clone(), "writeback");
    Routes::new(
        IoServer::new(io)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX),
    )
    .add_service(
        VolumesServer::new(VolumesService { engine: engine() })
            .max_encoding_message_size(ANSWER_BYTES_MAX),
    )
    .add_service(
        InspectServer::new(InspectService { engine: engine() })
            .max_encoding_message_size(ANSWER_BYTES_MAX),
    )
    .add_service(traces)
}
