//! Hostile clients of a writeback: each gets an error with a reason, and nothing changes.

use std::fmt::Debug;

use bytes::Bytes;
use endio_api::conversion::{CreateVolumeRequest, ListVolumesRequest};
use endio_api::writeback::io_request::Op;
use endio_api::writeback::*;
use endio_integration_tests::hostile;
use endio_integration_tests::stack::Stack;
use endio_testkit::client::Client;
use endio_testkit::seed::{self, Rng};
use endio_types::Reason;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

const SIZE: u64 = 4 << 20;

async fn stack() -> (Stack, Client, Vec<u8>) {
    let stack = Stack::start(1).await;
    let client = stack.client();
    client.create("vol1", SIZE, 1).await.unwrap();
    let bytes = Rng::new(5).bytes(256 << 10);
    let write = WriteRequest {
        volume: "vol1".into(),
        data: bytes.clone().into(),
        dsync: true,
        ..Default::default()
    };
    client.io().write(write).await.unwrap();
    client.settles().await.unwrap();
    (stack, client, bytes)
}

async fn unchanged(client: &Client, bytes: &[u8]) {
    let read = client.read("vol1", 0, SIZE).await.unwrap();
    assert!(read[..bytes.len()] == *bytes, "the data changed");
    assert!(read[bytes.len()..].iter().all(|byte| *byte == 0), "zeroes changed");
    let listed = client.volumes().list(ListVolumesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.volumes.len(), 1);
    assert_eq!(listed.volumes[0].size_bytes, SIZE);
    assert_eq!(listed.volumes[0].mapped_blocks, bytes.len() as u64 / 4096);
    client.settles().await.unwrap();
}

fn explained(what: &str, status: &Status) -> Reason {
    let internal = [Code::Internal, Code::Unknown, Code::Ok];
    assert!(!internal.contains(&status.code()), "{what}: {status}");
    assert!(!status.message().is_empty(), "{what}: no message");
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("{what}: no ErrorInfo in {status}"));
    assert_eq!(info.domain, "endio", "{what}");
    Reason::from_name(&info.reason).unwrap_or_else(|| panic!("{what}: {}", info.reason))
}

fn refused<T: Debug>(what: &str, answer: Result<Response<T>, Status>) -> Reason {
    match answer {
        Ok(answer) => panic!("accepted: {what}: {:?}", answer.into_inner()),
        Err(status) => explained(what, &status),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_and_frames_that_are_no_calls_change_nothing() {
    let (stack, client, bytes) = stack().await;
    let seed = seed::announce("endio-integration-tests", "hostile_writeback::bytes_and_frames");
    let mut rng = Rng::new(seed);
    let url = stack.writeback.url.clone();
    let mut sent = hostile::attack_bytes(&url, &mut rng).await;
    for service in ["Volumes", "Io", "Inspect"] {
        let service = format!("endio.writeback.v1.{service}");
        sent += hostile::attack_frames(&url, &service, &mut rng).await;
    }
    assert!(sent >= 100, "only {sent} attacks");
    unchanged(&client, &bytes).await;
}

fn names() -> Vec<String> {
    let long = "a".repeat(129);
    let vast = "a".repeat(200_000);
    let odd = ["", "absent", "..", "a/b", "é", "a\0b", " a", "-a", "a b", "\u{202e}", "vol1 "];
    odd.iter().map(|name| (*name).to_owned()).chain([long, vast]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_are_refused_by_every_call() {
    let (_stack, client, bytes) = stack().await;
    for name in names() {
        let (mut volumes, mut io, mut inspect) = (client.volumes(), client.io(), client.inspect());
        let what = format!("{name:.40}");
        let request = VolumeRequest { name: name.clone() };
        refused(&what, volumes.get(request.clone()).await);
        refused(&what, volumes.close(request).await);
        refused(&what, volumes.open(OpenRequest { name: name.clone(), force: true }).await);
        refused(&what, volumes.delete(DeleteRequest { name: name.clone(), volume: 0 }).await);
        let resize = ResizeRequest { name: name.clone(), size_bytes: 4096, volume: 0 };
        refused(&what, volumes.resize(resize).await);
        if name != "absent" {
            let create =
                CreateVolumeRequest { name: name.clone(), size_bytes: 4096, ..Default::default() };
            assert_eq!(refused(&what, volumes.create(create).await), Reason::Malformed);
        }
        let volume = name.clone();
        let data = Bytes::from_static(&[1; 4096]);
        let write = WriteRequest { volume: volume.clone(), data, ..Default::default() };
        refused(&what, io.write(write).await);
        refused(
            &what,
            io.fsync(FsyncRequest { volume: volume.clone(), may_log: false, ..Default::default() })
                .await,
        );
        let range = RangeRequest { volume: volume.clone(), length_bytes: 1, ..Default::default() };
        refused(&what, io.trim(range.clone()).await);
        refused(&what, io.write_zeroes(range.clone()).await);
        refused(&what, io.allocate(range).await);
        let read = ReadRequest { volume: volume.clone(), length_bytes: 1, ..Default::default() };
        ended(&what, io.read(read).await).await;
        let extents = ExtentsRequest { volume, ..Default::default() };
        ended(&what, inspect.extents(extents).await).await;
    }
    unchanged(&client, &bytes).await;
}

/// A stream may say no at once or with its first message.
async fn ended<T: Debug>(what: &str, stream: Result<Response<tonic::Streaming<T>>, Status>) {
    match stream {
        Err(status) => explained(what, &status),
        Ok(stream) => match stream.into_inner().message().await {
            Ok(message) => panic!("accepted: {what}: {message:?}"),
            Err(status) => explained(what, &status),
        },
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_that_cannot_be_are_refused() {
    let (_stack, client, bytes) = stack().await;
    let mut io = client.io();
    let ends = [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE + 1, 1),
        (0, SIZE + 1),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (1, u64::MAX),
        (u64::MAX - 4095, 4096),
        (u64::MAX / 2, u64::MAX / 2 + 2),
        (1 << 60, 4096),
        (1 << 63, 1 << 63),
    ];
    for (offset_bytes, length_bytes) in ends {
        let what = format!("{offset_bytes}+{length_bytes}");
        let volume = "vol1".to_owned();
        let range = RangeRequest { volume, offset_bytes, length_bytes, ..Default::default() };
        refused(&what, io.trim(range.clone()).await);
        refused(&what, io.write_zeroes(range.clone()).await);
        refused(&what, io.allocate(range).await);
        let volume = "vol1".to_owned();
        let read = ReadRequest { volume, offset_bytes, length_bytes, ..Default::default() };
        ended(&what, io.read(read).await).await;
        let data = vec![7; usize::try_from(length_bytes.min(8192)).unwrap()].into();
        if offset_bytes.checked_add(length_bytes.min(8192)).is_none_or(|end| end > SIZE) {
            for mode in [WriteMode::Buffered, WriteMode::Direct] {
                let volume = "vol1".to_owned();
                let data = Bytes::clone(&data);
                let mode = mode.into();
                let write = WriteRequest { volume, offset_bytes, data, mode, ..Default::default() };
                refused(&what, io.write(write).await);
            }
        }
    }
    unchanged(&client, &bytes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_writes_are_refused() {
    let (_stack, client, bytes) = stack().await;
    let mut io = client.io();
    let good = WriteRequest {
        volume: "vol1".into(),
        data: Bytes::from_static(&[9; 4096]),
        ..Default::default()
    };
    for mode in [3, 99, -1, i32::MAX] {
        refused("mode", io.write(WriteRequest { mode, ..good.clone() }).await);
    }
    let large = WriteRequest { data: vec![1; (3 << 20) + 1].into(), ..good.clone() };
    refused("more than 3 MiB", io.write(large).await);
    let key = |session: usize, sequence, is_retry| {
        let session = Bytes::from(vec![3; session]);
        Some(RetryKey { session, sequence, is_retry })
    };
    let keys = [
        key(0, 1, false),
        key(15, 1, false),
        key(17, 1, false),
        key(1 << 20, 1, false),
        key(16, 0, false),
        // A retry in a session that nobody knows: its outcome is unknown.
        key(16, 5, true),
    ];
    for retry in keys {
        let what = format!("{:.80}", format!("{retry:?}"));
        refused(&what, io.write(WriteRequest { retry: retry.clone(), ..good.clone() }).await);
        let range =
            RangeRequest { volume: "vol1".into(), length_bytes: 4096, retry, ..Default::default() };
        refused(&what, io.trim(range).await);
    }
    unchanged(&client, &bytes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bad_request_of_a_stream_has_its_own_completion_and_the_stream_goes_on() {
    let (_stack, client, bytes) = stack().await;
    let volume = || "vol1".to_owned();
    let range = |offset_bytes, length_bytes| RangeRequest {
        volume: volume(),
        offset_bytes,
        length_bytes,
        ..Default::default()
    };
    let read = |offset_bytes, length_bytes| ReadRequest {
        volume: volume(),
        offset_bytes,
        length_bytes,
        ..Default::default()
    };
    let data = Bytes::from_static(&[1; 10]);
    let mut bad = vec![
        None,
        Some(Op::Write(WriteRequest::default())),
        Some(Op::Write(WriteRequest {
            volume: "absent".into(),
            data: data.clone(),
            ..Default::default()
        })),
        Some(Op::Write(WriteRequest {
            volume: volume(),
            offset_bytes: SIZE - 5,
            data,
            ..Default::default()
        })),
        Some(Op::Read(read(SIZE, 1))),
        Some(Op::Read(read(0, (1 << 20) + 1))),
        Some(Op::Read(read(u64::MAX, u64::MAX))),
        Some(Op::Fsync(FsyncRequest {
            volume: String::new(),
            may_log: false,
            ..Default::default()
        })),
        Some(Op::Trim(range(u64::MAX, 1))),
        Some(Op::WriteZeroes(range(SIZE, 1))),
        Some(Op::Allocate(range(1, u64::MAX))),
    ];
    for _ in 0..9 {
        bad.extend(bad.clone().into_iter().take(11));
    }
    assert!(bad.len() >= 100);
    let count = bad.len() as u64;
    let requests: Vec<IoRequest> =
        (0..).zip(bad).map(|(cookie, op)| IoRequest { cookie, op }).collect();
    let good = IoRequest { cookie: count, op: Some(Op::Read(read(0, 4096))) };
    let stream = tokio_stream::iter(requests.into_iter().chain([good]));
    let mut completions = client.io().submit(stream).await.unwrap().into_inner();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(completion) = completions.message().await.unwrap() {
        let cookie = completion.cookie;
        assert!(seen.insert(cookie), "one_completion_per_write: {cookie} came twice");
        if cookie == count {
            assert_eq!(completion.reason, 0, "{}", completion.message);
            assert_eq!(completion.data[..], bytes[..4096]);
        } else {
            assert!(Reason::from_wire(completion.reason).is_some(), "accepted: {completion:?}");
            assert!(!completion.message.is_empty(), "no message: {completion:?}");
        }
    }
    assert_eq!(seen.len() as u64, count + 1, "every request has a completion");
    unchanged(&client, &bytes).await;
}
