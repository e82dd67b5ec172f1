//! What every service shows to tools: reflection, health, traces.

use std::collections::BTreeSet;
use std::time::Duration;

use endio_integration_tests::hostile::channel;
use endio_integration_tests::services::{Conversion, Store};
use endio_integration_tests::stack::{Stack, Writeback};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

/// Names that reflection version 1 lists.
async fn listed_v1(url: &str) -> BTreeSet<String> {
    use v1::server_reflection_request::MessageRequest;
    use v1::server_reflection_response::MessageResponse;
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel(url));
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = v1::ServerReflectionRequest { host: String::new(), message_request };
    let requests = tokio_stream::iter([request]);
    let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
    match answers.message().await.unwrap().unwrap().message_response.unwrap() {
        MessageResponse::ListServicesResponse(list) => {
            list.service.into_iter().map(|service| service.name).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// Names that reflection version 1alpha lists: older tools know no other.
async fn listed_v1alpha(url: &str) -> BTreeSet<String> {
    use v1alpha::server_reflection_request::MessageRequest;
    use v1alpha::server_reflection_response::MessageResponse;
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel(url));
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request };
    let requests = tokio_stream::iter([request]);
    let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
    match answers.message().await.unwrap().unwrap().message_response.unwrap() {
        MessageResponse::ListServicesResponse(list) => {
            list.service.into_iter().map(|service| service.name).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_lists_every_service_of_every_port_in_both_versions() {
    let stack = Stack::start(1).await;
    let common = ["endio.common.v1.Traces", "grpc.health.v1.Health"];
    let ports: [(&str, &[&str]); 3] = [
        (&stack.conversion.url, &["endio.conversion.v1.Conversion"]),
        (&stack.stores[0].url, &["endio.blockstore.v1.BlockStore"]),
        (
            &stack.writeback.url,
            &["endio.writeback.v1.Volumes", "endio.writeback.v1.Io", "endio.writeback.v1.Inspect"],
        ),
    ];
    for (url, own) in ports {
        for listed in [listed_v1(url).await, listed_v1alpha(url).await] {
            for name in own.iter().chain(&common) {
                assert!(listed.contains(*name), "{url} does not list {name}: {listed:?}");
            }
        }
    }
}

async fn health(url: &str, service: &str) -> Option<ServingStatus> {
    let service = service.to_owned();
    let checked = HealthClient::new(channel(url)).check(HealthCheckRequest { service }).await;
    checked.ok().map(|checked| checked.into_inner().status())
}

/// Scenario 70. Who cannot work says so, and says so no longer once it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_not_serving_until_the_service_is_ready() {
    let directory = tempfile::tempdir().unwrap();
    let mut conversion = Conversion::start(directory.path()).await;
    let url = conversion.url.clone();
    conversion.stop().await;
    let store = Store::start(&url).await;
    let writeback = Writeback::start(&url, &directory.path().join("cache")).await;
    let (own, both) = ("endio.blockstore.v1.BlockStore", "endio.writeback.v1.Io");
    for (url, service) in [(&store.url, own), (&writeback.url, both)] {
        for service in ["", service] {
            let status = health(url, service).await;
            assert_eq!(status, Some(ServingStatus::NotServing), "{service} at {url}");
        }
    }
    conversion.restart().await;
    for url in [&url, &store.url, &writeback.url] {
        let mut last = None;
        for _ in 0..500 {
            last = health(url, "").await;
            if last == Some(ServingStatus::Serving) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(last, Some(ServingStatus::Serving), "{url}");
    }
}

/// Promise 7. The trace of a direct write has spans of all three services.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trace_of_a_write_shows_every_step() {
    use endio_api::common::ListSpansRequest;
    use endio_api::writeback::{WriteMode, WriteRequest};
    let stack = Stack::start(1).await;
    let client = stack.client();
    client.create("vol1", 1 << 20, 1).await.unwrap();
    let write = WriteRequest {
        volume: "vol1".into(),
        offset_bytes: 4096,
        data: vec![1; 8192].into(),
        mode: WriteMode::Direct.into(),
        ..Default::default()
    };
    let written = client.io().write(write).await.unwrap().into_inner();
    assert_eq!(written.trace_id.len(), 32, "{written:?}");
    let mut names = BTreeSet::new();
    // The store's own spans end a moment after the write is acknowledged.
    for _ in 0..200 {
        let trace_id = written.trace_id.clone();
        let request = ListSpansRequest { trace_id, ..Default::default() };
        let spans = client.spans(request).await.unwrap();
        names = spans.into_iter().map(|span| span.name).collect();
        let wanted = ["write", "begin", "segment", "release", "completion"];
        if wanted.iter().all(|name| names.contains(*name)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the trace shows only {names:?}");
}
