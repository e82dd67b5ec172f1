#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::{Body as _, Frame};
use prost_types::{FileDescriptorProto, MethodDescriptorProto, ServiceDescriptorProto};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus as Answer;
use tonic_health::pb::health_client::HealthClient;
use tower::{Service, ServiceExt as _};

use super::*;
use crate::net::{Dialer, ListenAddr, Listener, is_connection_lost};

/// Bound of waits that end by themselves unless something is broken.
const LONG: Duration = Duration::from_secs(30);

/// A service by hand: its methods are named after what goes wrong in them.
#[derive(Clone)]
struct Faulty;

impl NamedService for Faulty {
    const NAME: &'static str = "test.Faulty";
}

impl Service<Request<Body>> for Faulty {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match request.uri().path().rsplit('/').next().unwrap() {
            "PanicsAtOnce" => panic!("secret"),
            "PanicsLater" => Box::pin(async {
                tokio::task::yield_now().await;
                panic!("secret")
            }),
            "PanicsInStream" => Box::pin(async {
                let mut response = Response::new(Body::new(PanickingBody));
                let grpc = http::HeaderValue::from_static("application/grpc");
                response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
                Ok(response)
            }),
            "Streams" => Box::pin(async { Ok(Response::new(Body::new(SilentBody))) }),
            _ => Box::pin(pending()),
        }
    }
}

struct PanickingBody;

impl http_body::Body for PanickingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        panic!("secret")
    }
}

struct SilentBody;

impl http_body::Body for SilentBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Pending
    }
}

struct Fixture {
    url: String,
    channel: Channel,
    readiness: Readiness,
    shutdown: Shutdown,
    server: JoinHandle<Result<(), ServeError>>,
}

impl Fixture {
    async fn start(config: ServerConfig) -> Self {
        Self::start_at(&ListenAddr::loopback(), config).await
    }

    async fn start_at(addr: &ListenAddr, config: ServerConfig) -> Self {
        let listener = Listener::bind(addr).await.unwrap();
        let url = listener.url().to_owned();
        let channel = Dialer::default().channel(&url).unwrap();
        let readiness = Readiness::new(&[Faulty::NAME]).await;
        let shutdown = Shutdown::new();
        let options = ServerOptions {
            config,
            descriptors: vec![descriptors()],
            unhurried: &["/test.Faulty/HangsForGoodReason"],
            ..ServerOptions::default()
        };
        let routes = Routes::new(Faulty);
        let server = serve(options, listener, routes, readiness.clone(), shutdown.clone());
        let server = tokio::spawn(server);
        Self { url, channel, readiness, shutdown, server }
    }

    async fn stop(self) {
        self.shutdown.request();
        self.server.await.unwrap().unwrap();
    }
}

fn descriptors() -> &'static [u8] {
    let method = |name: &str, is_stream| MethodDescriptorProto {
        name: Some(name.to_owned()),
        input_type: Some(".test.Empty".to_owned()),
        output_type: Some(".test.Empty".to_owned()),
        server_streaming: Some(is_stream),
        ..Default::default()
    };
    let service = ServiceDescriptorProto {
        name: Some("Faulty".to_owned()),
        method: vec![
            method("Hangs", false),
            method("HangsForGoodReason", false),
            method("HangsInStream", true),
        ],
        ..Default::default()
    };
    let file = FileDescriptorProto {
        name: Some("test.proto".to_owned()),
        package: Some("test".to_owned()),
        message_type: vec![prost_types::DescriptorProto {
            name: Some("Empty".to_owned()),
            ..Default::default()
        }],
        service: vec![service],
        ..Default::default()
    };
    Vec::leak(FileDescriptorSet { file: vec![file] }.encode_to_vec())
}

async fn start_call(channel: &Channel, method: &str) -> Result<Response<Body>, Status> {
    let uri = format!("http://localhost/test.Faulty/{method}");
    let request = Request::post(uri).body(Body::empty()).unwrap();
    let mut channel = channel.clone();
    let ready = channel.ready().await.map_err(|error| Status::from_error(error.into()))?;
    ready.call(request).await.map_err(|error| Status::from_error(error.into()))
}

/// The status of a call, from its headers or its trailers.
async fn call(channel: &Channel, method: &str) -> Status {
    let mut response = match start_call(channel, method).await {
        Ok(response) => response,
        Err(status) => return status,
    };
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    loop {
        let body = Pin::new(response.body_mut());
        match poll_fn({
            let mut body = body;
            move |cx| body.as_mut().poll_frame(cx)
        })
        .await
        {
            Some(Ok(frame)) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return Status::from_header_map(&trailers).unwrap();
                }
            }
            Some(Err(status)) => return status,
            None => return Status::unknown("no trailers"),
        }
    }
}

async fn health(channel: &Channel, service: &str) -> Result<Answer, Status> {
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel.clone()).check(request).await?;
    Ok(answer.into_inner().status())
}

#[tokio::test]
async fn health_says_not_serving_until_the_service_is_ready() {
    let fixture = Fixture::start(ServerConfig::default()).await;
    for service in ["", Faulty::NAME] {
        assert_eq!(health(&fixture.channel, service).await.unwrap(), Answer::NotServing);
    }
    fixture.readiness.set_ready().await;
    for service in ["", Faulty::NAME] {
        assert_eq!(health(&fixture.channel, service).await.unwrap(), Answer::Serving);
    }
    fixture.readiness.set_not_ready().await;
    assert_eq!(health(&fixture.channel, "").await.unwrap(), Answer::NotServing);
    assert_eq!(health(&fixture.channel, "other").await.unwrap_err().code(), Code::NotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn a_panicking_handler_is_internal_without_details_and_the_server_lives_on() {
    let fixture = Fixture::start(ServerConfig::default()).await;
    for method in ["PanicsAtOnce", "PanicsLater", "PanicsInStream"] {
        let status = call(&fixture.channel, method).await;
        assert_eq!(status.code(), Code::Internal, "{method}: {status:?}");
        assert!(!format!("{status:?}").contains("secret"), "{status:?}");
    }
    assert!(health(&fixture.channel, "").await.is_ok());
    fixture.stop().await;
}

#[tokio::test]
async fn calls_beyond_the_limit_are_shed_until_one_ends() {
    let config = ServerConfig { calls_max: 1, ..Default::default() };
    let fixture = Fixture::start(config).await;
    // The response has begun, its stream has not ended: the place stays taken.
    let stream = start_call(&fixture.channel, "Streams").await.unwrap();
    let status = call(&fixture.channel, "PanicsAtOnce").await;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(tonic_types::StatusExt::get_details_retry_info(&status).is_some());
    assert!(health(&fixture.channel, "").await.is_ok(), "a full server is alive");
    drop(stream);
    // The reset travels on its own, so the place is free soon, not at once.
    let mut code = Code::ResourceExhausted;
    for _ in 0..1_000 {
        code = call(&fixture.channel, "PanicsAtOnce").await.code();
        if code != Code::ResourceExhausted {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(code, Code::Internal);
    fixture.stop().await;
}

#[tokio::test]
async fn the_deadline_ends_a_unary_call_and_leaves_streams_and_the_unhurried_alone() {
    let config = ServerConfig { unary_timeout_ms: 50, ..Default::default() };
    let fixture = Fixture::start(config).await;
    let stream = tokio::spawn({
        let channel = fixture.channel.clone();
        async move { call(&channel, "HangsInStream").await }
    });
    let unhurried = tokio::spawn({
        let channel = fixture.channel.clone();
        async move { call(&channel, "HangsForGoodReason").await }
    });
    // Two rounds, so that the stream has outlived the deadline by the time it is looked at.
    for _ in 0..2 {
        let status = call(&fixture.channel, "Hangs").await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    }
    assert!(!stream.is_finished() && !unhurried.is_finished());
    stream.abort();
    unhurried.abort();
    fixture.shutdown.force();
    fixture.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_forced_stop_cuts_streams_at_once_and_a_requested_one_after_the_drain() {
    for is_forced in [true, false] {
        let config = ServerConfig { drain_timeout_ms: 10, ..Default::default() };
        let fixture = Fixture::start(config).await;
        let mut stream = start_call(&fixture.channel, "Streams").await.unwrap();
        assert_eq!(fixture.shutdown.drained(Duration::ZERO).await, Err(vec!["grpc server".into()]));
        if is_forced {
            fixture.shutdown.force()
        } else {
            fixture.shutdown.request()
        }
        fixture.server.await.unwrap().unwrap();
        assert_eq!(fixture.shutdown.drained(Duration::ZERO).await, Ok(()));
        let mut body = Pin::new(stream.body_mut());
        let frame = poll_fn(|cx| body.as_mut().poll_frame(cx));
        let frame = tokio::time::timeout(LONG, frame).await.unwrap();
        assert!(matches!(frame, Some(Err(_)) | None), "the connection must end");
    }
}

#[tokio::test]
async fn a_channel_works_again_after_the_server_restarted_on_the_same_address() {
    let dir = tempfile::tempdir().unwrap();
    let unix = ListenAddr::Unix(dir.path().join("socket"));
    let memory = ListenAddr::Memory("restart".to_owned());
    for addr in [ListenAddr::loopback(), unix, memory] {
        let first = Fixture::start_at(&addr, ServerConfig::default()).await;
        let channel = first.channel.clone();
        assert!(health(&channel, "").await.is_ok());
        let url = first.url.clone();
        first.shutdown.force();
        first.server.await.unwrap().unwrap();
        let refused = health(&channel, "").await.unwrap_err();
        assert!(is_connection_lost(&refused), "{addr}: {refused:?}");
        let addr = url.strip_prefix("http://").unwrap_or(&url).parse().unwrap();
        let second = Fixture::start_at(&addr, ServerConfig::default()).await;
        health(&channel, "").await.unwrap();
        second.stop().await;
    }
}

#[tokio::test]
async fn a_memory_name_that_is_not_bound_yet_is_unavailable_and_works_later() {
    let channel = Dialer::default().channel("memory:later").unwrap();
    assert_eq!(health(&channel, "").await.unwrap_err().code(), Code::Unavailable);
    let addr = ListenAddr::Memory("later".to_owned());
    let fixture = Fixture::start_at(&addr, ServerConfig::default()).await;
    assert_eq!(health(&channel, "").await.unwrap(), Answer::NotServing);
    fixture.stop().await;
}

#[tokio::test]
async fn one_server_serves_several_listeners() {
    let dir = tempfile::tempdir().unwrap();
    let tcp = Listener::bind(&ListenAddr::loopback()).await.unwrap();
    let unix = Listener::bind(&ListenAddr::Unix(dir.path().join("s"))).await.unwrap();
    let incoming = Incoming::new([tcp, unix]);
    let urls = incoming.urls().to_vec();
    let shutdown = Shutdown::new();
    let readiness = Readiness::new(&[]).await;
    let options = ServerOptions::default();
    let routes = Routes::new(Faulty);
    let server = tokio::spawn(serve(options, incoming, routes, readiness, shutdown.clone()));
    for url in &urls {
        assert!(health(&Dialer::default().channel(url).unwrap(), "").await.is_ok(), "{url}");
    }
    shutdown.request();
    server.await.unwrap().unwrap();
}

macro_rules! listed_services {
    ($version:ident, $channel:expr) => {{
        use pb::server_reflection_request::MessageRequest;
        use pb::server_reflection_response::MessageResponse;
        use tonic_reflection::pb::$version as pb;
        let request = pb::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = pb::server_reflection_client::ServerReflectionClient::new($channel);
        let requests = tokio_stream::iter([request]);
        let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
        match answers.next().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test]
async fn reflection_lists_our_services_in_v1_and_in_v1alpha() {
    let fixture = Fixture::start(ServerConfig::default()).await;
    let v1: Vec<String> = listed_services!(v1, fixture.channel.clone());
    let v1alpha: Vec<String> = listed_services!(v1alpha, fixture.channel.clone());
    for list in [v1, v1alpha] {
        for name in [Faulty::NAME, "grpc.health.v1.Health"] {
            assert!(list.iter().any(|service| service == name), "{name} is not in {list:?}");
        }
    }
    fixture.stop().await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let config = ServerConfig { handshake_timeout_ms: 20, ..Default::default() };
    let fixture = Fixture::start(config).await;
    let host_port = fixture.url.strip_prefix("http://").unwrap();
    let mut silent = tokio::net::TcpStream::connect(host_port).await.unwrap();
    let mut bytes = Vec::new();
    // Ends when the server closes; an error is as good as an end.
    let read = tokio::io::AsyncReadExt::read_to_end(&mut silent, &mut bytes);
    let _ = tokio::time::timeout(LONG, read).await.unwrap();
    assert!(health(&fixture.channel, "").await.is_ok());
    fixture.stop().await;
}

#[tokio::test]
async fn a_broken_descriptor_set_is_refused() {
    let listener = Listener::bind(&ListenAddr::Memory("broken".to_owned())).await.unwrap();
    let options = ServerOptions { descriptors: vec![b"\xff\xff"], ..Default::default() };
    let readiness = Readiness::new(&[]).await;
    let result = serve(options, listener, Routes::new(Faulty), readiness, Shutdown::new()).await;
    assert!(result.is_err());
}
