//! What a client sees of the write path: modes, neighbours, sync, ranges, sizes, retries.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use endio_api::common::ExtentState;
use endio_api::conversion::{CreateVolumeRequest, Volume};
use endio_api::status;
use endio_api::writeback::{
    CheckRequest, ExtentsRequest, FsyncRequest, RangeRequest, ReadRequest, RetryKey, StatusRequest,
    SyncAllRequest, VolumeRequest, WriteMode, WriteRequest, WriteResponse,
};
use endio_integration_tests::stack::Stack;
use endio_types::Reason;
use tonic::Status;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;

/// The stack, with the calls of a client.
struct Client {
    stack: Stack,
}

impl Client {
    async fn start(stores: usize) -> Self {
        Self { stack: Stack::start(stores).await }
    }

    async fn create(&self, request: CreateVolumeRequest) -> Volume {
        self.stack.client().volumes().create(request).await.unwrap().into_inner()
    }

    async fn fixed(&self, size_bytes: u64) {
        self.create(CreateVolumeRequest { name: "v".into(), size_bytes, ..Default::default() })
            .await;
    }

    async fn put(&self, request: WriteRequest) -> Result<WriteResponse, Status> {
        Ok(self.stack.client().io().write(request).await?.into_inner())
    }

    async fn write(&self, mode: WriteMode, offset_bytes: u64, data: Vec<u8>) {
        let len = data.len() as u64;
        let answer = self.put(write(mode, offset_bytes, data)).await.unwrap();
        assert_eq!(answer.written_bytes, len);
        assert!(!answer.duplicate);
    }

    async fn read(&self, offset_bytes: u64, length_bytes: u64) -> Result<Vec<u8>, Status> {
        let request = ReadRequest {
            volume: "v".into(),
            offset_bytes,
            length_bytes,
            ..ReadRequest::default()
        };
        let mut stream = self.stack.client().io().read(request).await?.into_inner();
        let mut all = Vec::new();
        while let Some(piece) = stream.message().await? {
            assert_eq!(piece.offset_bytes, offset_bytes + all.len() as u64);
            all.extend_from_slice(&piece.data);
            all.resize(all.len() + usize::try_from(piece.zeroes_bytes).unwrap(), 0);
        }
        assert_eq!(all.len() as u64, length_bytes);
        Ok(all)
    }

    async fn fsync(&self) {
        let request = FsyncRequest { volume: "v".into(), may_log: false, ..Default::default() };
        self.stack.client().io().fsync(request).await.unwrap();
    }

    async fn states(&self) -> Vec<(u64, u32, ExtentState)> {
        let request = ExtentsRequest { volume: "v".into(), ..ExtentsRequest::default() };
        let mut stream = self.stack.client().inspect().extents(request).await.unwrap().into_inner();
        let mut states: Vec<(u64, u32, ExtentState)> = Vec::new();
        while let Some(some) = stream.message().await.unwrap() {
            for extent in some.extents {
                match states.last_mut() {
                    Some(last) if last.2 == extent.state() => last.1 += extent.blocks,
                    _ => states.push((extent.lblk, extent.blocks, extent.state())),
                }
            }
        }
        states
    }

    async fn assert_clean(&self) {
        let request = CheckRequest { read_data: true };
        let report = self.stack.client().inspect().check(request).await.unwrap().into_inner();
        assert_eq!(report.findings, Vec::<String>::new());
        assert_eq!(report.metadata.unwrap().findings, Vec::<String>::new());
    }
}

fn write(mode: WriteMode, offset_bytes: u64, data: Vec<u8>) -> WriteRequest {
    WriteRequest {
        volume: "v".into(),
        offset_bytes,
        data: Bytes::from(data),
        mode: mode.into(),
        ..WriteRequest::default()
    }
}

fn range(offset_bytes: u64, length_bytes: u64) -> RangeRequest {
    RangeRequest { volume: "v".into(), offset_bytes, length_bytes, ..RangeRequest::default() }
}

/// Bytes of which no two blocks are alike.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|at| seed ^ (at / BLOCK) as u8 ^ (at % 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_in_each_mode_is_read_back() {
    let client = Client::start(1).await;
    client.fixed(16 * MIB).await;
    assert_eq!(client.read(0, 8192).await.unwrap(), vec![0; 8192]);
    client.write(WriteMode::Direct, 0, pattern(1, MIB)).await;
    assert_eq!(client.read(0, MIB).await.unwrap(), pattern(1, MIB));
    client.write(WriteMode::Buffered, 2 * MIB, pattern(2, MIB)).await;
    assert_eq!(client.read(2 * MIB, MIB).await.unwrap(), pattern(2, MIB));
    let dsync =
        WriteRequest { dsync: true, ..write(WriteMode::Buffered, 4 * MIB, pattern(3, 8192)) };
    client.put(dsync).await.unwrap();
    assert_eq!(client.read(4 * MIB, 8192).await.unwrap(), pattern(3, 8192));
    client.write(WriteMode::Direct, 5 * MIB, Vec::new()).await;
    client.write(WriteMode::Direct, 6 * MIB, pattern(4, 3 * MIB)).await;
    assert_eq!(client.read(6 * MIB, 3 * MIB).await.unwrap(), pattern(4, 3 * MIB));
    client.fsync().await;
    assert_eq!(client.read(2 * MIB, MIB).await.unwrap(), pattern(2, MIB));
    client.assert_clean().await;
    let mut stack = client.stack;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unaligned_writes_leave_their_neighbours_alone() {
    let client = Client::start(1).await;
    client.fixed(MIB).await;
    let mut expected = pattern(9, 64 * 1024);
    client.write(WriteMode::Direct, 0, expected.clone()).await;
    let writes = [
        (WriteMode::Buffered, 100, 50),
        (WriteMode::Direct, 4000, 200),
        (WriteMode::Buffered, 8191, 2),
        (WriteMode::Direct, 12_288, 4097),
        (WriteMode::Buffered, 20_481, 12_287),
        (WriteMode::Direct, 20_000, 15_000),
    ];
    for (at, (mode, offset, len)) in writes.into_iter().enumerate() {
        let data = vec![0xA0 + at as u8; len];
        expected[offset..offset + len].copy_from_slice(&data);
        client.write(mode, offset as u64, data).await;
        assert_eq!(client.read(0, 64 * 1024).await.unwrap(), expected, "after write {at}");
    }
    client.fsync().await;
    assert_eq!(client.read(0, 64 * 1024).await.unwrap(), expected);
    assert_eq!(client.read(4_001, 9_000).await.unwrap(), expected[4_001..13_001]);
    client.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extent_goes_from_hole_to_delayed_to_written() {
    let client = Client::start(1).await;
    client.fixed(16 * BLOCK).await;
    assert_eq!(client.states().await, [(0, 16, ExtentState::Hole)]);
    client.write(WriteMode::Buffered, 2 * BLOCK, pattern(1, 2 * BLOCK)).await;
    let states = client.states().await;
    // Write-out may have come first; it does not before its age under no load.
    assert_eq!(states[1].0, 2);
    client.fsync().await;
    let holes = |states: &[(u64, u32, ExtentState)]| {
        states.iter().map(|state| (state.0, state.2)).collect::<Vec<_>>()
    };
    let written = client.states().await;
    assert_eq!(
        holes(&written),
        [(0, ExtentState::Hole), (2, ExtentState::Written), (4, ExtentState::Hole)]
    );
    client.stack.client().io().allocate(range(8 * BLOCK, 4 * BLOCK)).await.unwrap();
    let allocated = client.states().await;
    assert!(allocated.contains(&(8, 4, ExtentState::Unwritten)), "{allocated:?}");
    assert_eq!(client.read(8 * BLOCK, 4 * BLOCK).await.unwrap(), vec![0; 4 * BLOCK as usize]);
    client.write(WriteMode::Direct, 9 * BLOCK, pattern(2, BLOCK)).await;
    let piecewise = client.states().await;
    assert!(piecewise.contains(&(9, 1, ExtentState::Written)), "{piecewise:?}");
    client.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trimmed_and_zeroed_ranges_read_as_zeroes_and_keep_their_edges() {
    let client = Client::start(1).await;
    client.fixed(MIB).await;
    let mut expected = pattern(5, 64 * 1024);
    client.write(WriteMode::Buffered, 0, expected.clone()).await;
    client.stack.client().io().trim(range(100, 3 * BLOCK)).await.unwrap();
    expected[100..100 + 3 * BLOCK as usize].fill(0);
    assert_eq!(client.read(0, 64 * 1024).await.unwrap(), expected);
    let states = client.states().await;
    assert!(states.contains(&(1, 2, ExtentState::Hole)), "{states:?}");
    client.stack.client().io().write_zeroes(range(5 * BLOCK + 1, 3 * BLOCK)).await.unwrap();
    let from = 5 * BLOCK as usize + 1;
    expected[from..from + 3 * BLOCK as usize].fill(0);
    assert_eq!(client.read(0, 64 * 1024).await.unwrap(), expected);
    let states = client.states().await;
    assert!(states.contains(&(6, 2, ExtentState::Unwritten)), "{states:?}");
    client.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_growable_volume_grows_to_the_byte_and_a_fixed_one_refuses() {
    let client = Client::start(1).await;
    let grows = CreateVolumeRequest { name: "v".into(), growable: true, ..Default::default() };
    client.create(grows).await;
    client.write(WriteMode::Buffered, 10_000, pattern(1, 100)).await;
    let size = |volume: Volume| volume.size_bytes;
    let name = || VolumeRequest { name: "v".into() };
    let volumes = client.stack.client();
    assert_eq!(size(volumes.volumes().get(name()).await.unwrap().into_inner()), 10_100);
    client.write(WriteMode::Direct, 20_000, pattern(2, 5)).await;
    client.fsync().await;
    assert_eq!(size(volumes.volumes().get(name()).await.unwrap().into_inner()), 20_005);
    let mut expected = vec![0; 20_005];
    expected[10_000..10_100].copy_from_slice(&pattern(1, 100));
    expected[20_000..].copy_from_slice(&pattern(2, 5));
    assert_eq!(client.read(0, 20_005).await.unwrap(), expected);
    let beyond = client.read(20_000, 6).await.unwrap_err();
    assert_eq!(status::reason(&beyond), Reason::OutOfRange);
    let fixed = CreateVolumeRequest { name: "w".into(), size_bytes: MIB, ..Default::default() };
    client.create(fixed).await;
    let over = WriteRequest { volume: "w".into(), ..write(WriteMode::Direct, MIB - 1, vec![1; 2]) };
    assert_eq!(status::reason(&client.put(over).await.unwrap_err()), Reason::OutOfRange);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_in_place_volume_is_overwritten_in_place() {
    let client = Client::start(1).await;
    let in_place = CreateVolumeRequest {
        name: "v".into(),
        size_bytes: MIB,
        in_place: true,
        ..Default::default()
    };
    client.create(in_place).await;
    client.write(WriteMode::Direct, 0, pattern(1, 64 * 1024)).await;
    client.write(WriteMode::Direct, 4096, pattern(2, 8192)).await;
    client.write(WriteMode::Buffered, 30_000, pattern(3, 100)).await;
    client.fsync().await;
    let mut expected = pattern(1, 64 * 1024);
    expected[4096..12_288].copy_from_slice(&pattern(2, 8192));
    expected[30_000..30_100].copy_from_slice(&pattern(3, 100));
    assert_eq!(client.read(0, 64 * 1024).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_of_an_applied_write_is_answered_and_not_applied() {
    let client = Client::start(1).await;
    client.fixed(MIB).await;
    for mode in [WriteMode::Direct, WriteMode::Buffered] {
        let session = Bytes::from(vec![mode as u8; 16]);
        let key =
            |sequence, is_retry| Some(RetryKey { session: session.clone(), sequence, is_retry });
        let first = WriteRequest { retry: key(1, false), ..write(mode, 0, pattern(1, BLOCK)) };
        assert!(!client.put(first).await.unwrap().duplicate);
        let newer = WriteRequest { retry: key(2, false), ..write(mode, 0, pattern(2, BLOCK)) };
        assert!(!client.put(newer).await.unwrap().duplicate);
        let late = WriteRequest { retry: key(1, true), ..write(mode, 0, pattern(1, BLOCK)) };
        let answer = client.put(late).await.unwrap();
        assert!(answer.duplicate);
        assert_eq!(answer.written_bytes, BLOCK);
        assert_eq!(client.read(0, BLOCK).await.unwrap(), pattern(2, BLOCK));
    }
    let unknown = RetryKey { session: vec![9; 16].into(), sequence: 7, is_retry: true };
    let lost =
        WriteRequest { retry: Some(unknown), ..write(WriteMode::Direct, 0, pattern(3, BLOCK)) };
    let refused = client.put(lost).await.unwrap_err();
    assert_eq!(status::reason(&refused), Reason::UnknownSession);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_and_many_volumes_survive_a_restart_of_everything() {
    let client = Client::start(2).await;
    for (at, name) in ["v", "w"].into_iter().enumerate() {
        let volume = CreateVolumeRequest {
            name: name.into(),
            size_bytes: 4 * MIB,
            replicas: 2,
            ..Default::default()
        };
        client.create(volume).await;
        let data = pattern(at as u8 + 1, 2 * MIB);
        let request = WriteRequest { volume: name.into(), ..write(WriteMode::Buffered, 0, data) };
        client.put(request).await.unwrap();
    }
    let io = client.stack.client();
    io.io().sync_all(SyncAllRequest {}).await.unwrap();
    let status = io.inspect().status(StatusRequest::default()).await.unwrap().into_inner();
    assert_eq!((status.dirty_bytes, status.connected), (0, true));
    client.assert_clean().await;
    let mut client = client;
    client.stack.writeback.restart().await;
    client.stack.wait_for_stores(2).await;
    assert_eq!(client.read(0, 2 * MIB).await.unwrap(), pattern(1, 2 * MIB));
}
