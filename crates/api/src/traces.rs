//! The trace recorder of a process as a gRPC service; every service of this project serves it.

use std::collections::HashSet;

use endio_chassis::recorder::{RecordedSpan, Recorder, SpanQuery};
use tonic::{Request, Response, Status};

use crate::common::traces_server::{Traces, TracesServer};
use crate::common::{
    KeepTracesRequest, KeepTracesResponse, ListSpansRequest, ListSpansResponse, Span,
};

/// Answers questions about one recorder.
#[derive(Clone, Debug)]
pub struct RecorderTraces {
    recorder: Recorder,
    service: &'static str,
}

impl RecorderTraces {
    /// Shows the spans that `service` recorded: several services may share one process and one
    /// recorder. Empty: all.
    pub fn server(recorder: Recorder, service: &'static str) -> TracesServer<Self> {
        TracesServer::new(Self { recorder, service })
    }

    /// The spans that match.
    pub fn list(&self, request: &ListSpansRequest) -> ListSpansResponse {
        let query = SpanQuery {
            trace_id: request.trace_id.clone(),
            roots_only: request.roots_only,
            service: self.service.to_owned(),
            volume: request.volume.clone(),
            offset_bytes: request.offset_bytes,
            io_end: request.io_end,
            limit: request.limit as usize,
        };
        let spans = self.recorder.query(&query).into_iter().map(span_to_proto).collect();
        ListSpansResponse { spans, dropped: self.recorder.dropped() }
    }
}

#[tonic::async_trait]
impl Traces for RecorderTraces {
    async fn list_spans(
        &self,
        request: Request<ListSpansRequest>,
    ) -> Result<Response<ListSpansResponse>, Status> {
        let request = request.into_inner();
        let is_id = request.trace_id.len() == 32
            && request.trace_id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !request.trace_id.is_empty() && !is_id {
            return Err(crate::status::malformed("trace_id", "must be 32 hexadecimal digits"));
        }
        Ok(Response::new(self.list(&request)))
    }

    async fn keep_traces(
        &self,
        request: Request<KeepTracesRequest>,
    ) -> Result<Response<KeepTracesResponse>, Status> {
        keep(request.get_ref()).map(Response::new)
    }
}

/// Most traces of one request to keep them.
const KEEP_MAX: usize = 1_024;

/// Records what this process remembers of these traces.
///
/// # Errors
/// The ids are too many, or not 16 bytes long.
pub fn keep(request: &KeepTracesRequest) -> Result<KeepTracesResponse, Status> {
    if request.trace_ids.len() > KEEP_MAX {
        return Err(crate::status::malformed("trace_ids", "must be at most 1024"));
    }
    let id = |bytes: &bytes::Bytes| bytes.as_ref().try_into().map(u128::from_be_bytes);
    let ids: Result<HashSet<u128>, _> = request.trace_ids.iter().map(id).collect();
    let ids = ids.map_err(|_| crate::status::malformed("trace_ids", "must be 16 bytes each"))?;
    Ok(KeepTracesResponse { spans: endio_chassis::trace::keep(&ids) as u64 })
}

/// A recorded span for the wire.
pub fn span_to_proto(span: RecordedSpan) -> Span {
    Span {
        trace_id: span.trace_id,
        span_id: span.span_id,
        parent_span_id: span.parent_span_id,
        name: span.name,
        service: span.service,
        start_unix_ns: span.start_unix_ns,
        duration_ns: span.duration_ns,
        attributes: span.attributes.into_iter().collect(),
        links: span.links,
        error: span.error,
    }
}
