//! The write path while its peers come and go, and what a client can see of it afterwards.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use endio_api::common::ListSpansRequest;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::writeback::io_request::Op;
use endio_api::writeback::{
    CheckRequest, FsyncRequest, IoRequest, ReadRequest, WriteMode, WriteRequest, WriteResponse,
};
use endio_integration_tests::stack::Stack;
use tokio_stream::iter;

const MIB: u64 = 1 << 20;
/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

async fn started(stores: usize) -> Stack {
    let stack = Stack::start(stores).await;
    let volume =
        CreateVolumeRequest { name: "v".into(), size_bytes: 8 * MIB, ..Default::default() };
    stack.client().volumes().create(volume).await.unwrap();
    stack
}

fn write(mode: WriteMode, offset_bytes: u64, fill: u8, len: usize) -> WriteRequest {
    WriteRequest {
        volume: "v".into(),
        offset_bytes,
        data: Bytes::from(vec![fill; len]),
        mode: mode.into(),
        ..WriteRequest::default()
    }
}

async fn put(stack: &Stack, request: WriteRequest) -> WriteResponse {
    let mut io = stack.client().io();
    tokio::time::timeout(PATIENCE, io.write(request)).await.unwrap().unwrap().into_inner()
}

async fn fsync(stack: &Stack) {
    let mut io = stack.client().io();
    let fsync = io.fsync(FsyncRequest { volume: "v".into(), may_log: false, ..Default::default() });
    tokio::time::timeout(PATIENCE, fsync).await.unwrap().unwrap();
}

async fn read(stack: &Stack, offset_bytes: u64, length_bytes: u64) -> Vec<u8> {
    let request =
        ReadRequest { volume: "v".into(), offset_bytes, length_bytes, ..ReadRequest::default() };
    let mut stream = stack.client().io().read(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(piece) = stream.message().await.unwrap() {
        all.extend_from_slice(&piece.data);
        all.resize(all.len() + usize::try_from(piece.zeroes_bytes).unwrap(), 0);
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_go_on_after_conversion_has_restarted() {
    let mut stack = started(1).await;
    put(&stack, write(WriteMode::Direct, 0, 1, 8192)).await;
    put(&stack, write(WriteMode::Buffered, MIB, 2, 8192)).await;
    stack.conversion.restart().await;
    put(&stack, write(WriteMode::Buffered, 2 * MIB, 3, 4096)).await;
    put(&stack, write(WriteMode::Direct, 3 * MIB, 4, 4096)).await;
    fsync(&stack).await;
    for (offset, fill, len) in [(0, 1, 8192), (MIB, 2, 8192), (2 * MIB, 3, 4096)] {
        assert_eq!(read(&stack, offset, len).await, vec![fill; len as usize]);
    }
    let check = CheckRequest { read_data: true };
    let report = stack.client().inspect().check(check).await.unwrap().into_inner();
    assert_eq!(report.findings, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_waits_for_a_store_that_is_away() {
    let mut stack = started(1).await;
    put(&stack, write(WriteMode::Direct, 0, 1, 4096)).await;
    stack.stores[0].stop().await;
    let mut io = stack.client().io();
    let waiting = tokio::spawn(async move {
        io.write(write(WriteMode::Direct, 0, 2, 4096)).await.unwrap().into_inner()
    });
    stack.stores[0].start_again().await;
    let answer = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(answer.written_bytes, 4096);
    assert_eq!(read(&stack, 0, 4096).await, vec![2; 4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_submit_stream_completes_every_request_with_its_cookie() {
    let stack = started(1).await;
    let writes = (0..200_u64).map(|at| {
        let mode = if at % 2 == 0 { WriteMode::Direct } else { WriteMode::Buffered };
        // Twenty blocks, so that requests overlap; the last ten rounds decide.
        let op = Op::Write(write(mode, at % 20 * 4096, at as u8, 4096));
        IoRequest { cookie: at, op: Some(op) }
    });
    let mut completions = stack.client().io().submit(iter(writes)).await.unwrap().into_inner();
    let mut cookies = Vec::new();
    while let Some(done) =
        tokio::time::timeout(PATIENCE, completions.message()).await.unwrap().unwrap()
    {
        assert_eq!((done.reason, done.bytes), (0, 4096), "{}", done.message);
        cookies.push(done.cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, (0..200).collect::<Vec<_>>());
    fsync(&stack).await;
    for block in 0..20_u64 {
        assert_eq!(read(&stack, block * 4096, 4096).await, vec![180 + block as u8; 4096]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trace_of_a_write_shows_all_three_services() {
    let stack = started(1).await;
    let trace_id = put(&stack, write(WriteMode::Direct, 0, 1, 4096)).await.trace_id;
    assert_eq!(trace_id.len(), 32);
    let request = ListSpansRequest { trace_id, limit: 1_000, ..ListSpansRequest::default() };
    let mut names = Vec::new();
    // Spans are recorded when they end, which may be after the answer.
    for _ in 0..100 {
        let spans = stack.client().inspect().trace(request.clone()).await.unwrap().into_inner();
        names = spans.spans.into_iter().map(|span| span.name).collect();
        let wanted = ["write", "begin", "segment", "completion"];
        if wanted.iter().all(|wanted| names.iter().any(|name| name == wanted)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("spans are missing: {names:?}");
}
