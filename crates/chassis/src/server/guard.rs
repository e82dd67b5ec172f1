//! What surrounds every call: log span, panics, shedding, deadline.

use std::any::Any;
use std::collections::HashSet;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::Service;
use tracing::Instrument as _;

use super::Access;
use crate::metrics::Counter;
use crate::net::Peer;
use crate::quiet::Quiet;

/// When a shed caller may try again. Short: a place is free as soon as any call ends.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// The settings of the stack, shared by all connections.
#[derive(Clone)]
pub(super) struct CallGuard {
    places: Arc<Semaphore>,
    unary_timeout: Duration,
    unary_methods: Arc<HashSet<String>>,
    access: Option<Arc<dyn Access>>,
    denied: Counter,
    denials: Arc<Quiet>,
}

impl CallGuard {
    pub(super) fn new(
        calls_max: usize,
        unary_timeout: Duration,
        unary_methods: HashSet<String>,
    ) -> Self {
        let places = Arc::new(Semaphore::new(calls_max.min(Semaphore::MAX_PERMITS)));
        let unary_methods = Arc::new(unary_methods);
        Self {
            places,
            unary_timeout,
            unary_methods,
            access: None,
            denied: Counter::default(),
            denials: Arc::default(),
        }
    }

    pub(super) fn with_access(self, access: Option<Arc<dyn Access>>, denied: Counter) -> Self {
        Self { access, denied, ..self }
    }

    /// Whether the peer of this request may make it. A request whose peer is not known is made by
    /// nobody who may do anything.
    fn check(&self, path: &str, request: &Request<Body>) -> Result<(), Status> {
        let Some(access) = &self.access else { return Ok(()) };
        let unknown = Peer::Tls { addr: None, names: Arc::default() };
        let peer = request.extensions().get::<Peer>().unwrap_or(&unknown);
        access.check(path, peer).inspect_err(|status| {
            self.denied.inc();
            // A caller may go on and on.
            if let Some(skipped) = self.denials.pass() {
                tracing::warn!(message = status.message(), ?peer, skipped, "call denied");
            }
        })
    }

    pub(super) fn around<S>(self, inner: S) -> Guarded<S> {
        Guarded { guard: self, inner }
    }

    /// A place for this call. Health checks need none: a full server is alive.
    fn enter(&self, path: &str) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if path.starts_with("/grpc.health.") {
            return Ok(None);
        }
        match self.places.clone().try_acquire_owned() {
            Ok(place) => Ok(Some(place)),
            Err(_) => Err(Status::with_error_details(
                Code::ResourceExhausted,
                "the server has too many calls under way",
                ErrorDetails::with_retry_info(Some(RETRY_AFTER)),
            )),
        }
    }
}

/// A service inside its [`CallGuard`].
#[derive(Clone)]
pub(super) struct Guarded<S> {
    guard: CallGuard,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path: Arc<str> = request.uri().path().into();
        let span = tracing::debug_span!("call", method = &*path);
        let entered = self.guard.check(&path, &request).and_then(|()| self.guard.enter(&path));
        let place = match entered {
            Ok(place) => place,
            Err(status) => {
                span.in_scope(|| tracing::debug!(code = ?status.code(), "call refused"));
                return std::future::ready(Ok(status.into_http())).boxed();
            }
        };
        let is_unary = self.guard.unary_methods.contains(&*path);
        let timeout = is_unary.then_some(self.guard.unary_timeout);
        let started = catch_unwind(AssertUnwindSafe(|| self.inner.call(request)));
        let call = async move {
            let handler = match started {
                Ok(handler) => AssertUnwindSafe(handler).catch_unwind(),
                Err(panic) => return Ok(on_panic(&path, &*panic).into_http()),
            };
            let outcome = match timeout {
                Some(timeout) => tokio::time::timeout(timeout, handler).await,
                None => Ok(handler.await),
            };
            Ok(match outcome {
                Ok(Ok(response)) => {
                    let Ok(response) = response;
                    response.map(|body| Body::new(GuardedBody { body, path, _place: place }))
                }
                Ok(Err(panic)) => on_panic(&path, &*panic).into_http(),
                Err(_) => Status::deadline_exceeded("the call took too long").into_http(),
            })
        };
        call.instrument(span).boxed()
    }
}

/// Logs a panic and gives what the peer is told, which is nothing of it.
fn on_panic(path: &str, panic: &(dyn Any + Send)) -> Status {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!(method = path, panic = text.unwrap_or("not text"), "handler panicked");
    Status::internal("internal error")
}

/// The messages of a response. Holds the call's place until the last one, and turns a panic of the
/// stream behind it into trailers.
struct GuardedBody {
    body: Body,
    path: Arc<str>,
    _place: Option<OwnedSemaphorePermit>,
}

impl HttpBody for GuardedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let body = Pin::new(&mut this.body);
        match catch_unwind(AssertUnwindSafe(|| body.poll_frame(cx))) {
            Ok(frame) => frame,
            Err(panic) => {
                // The stream must not be polled again.
                this.body = Body::empty();
                let mut trailers = HeaderMap::new();
                let added = on_panic(&this.path, &*panic).add_header(&mut trailers);
                Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
