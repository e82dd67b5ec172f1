//! A conversion service that does what a test tells it, and a device that waits.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use endio_api::{
    common,
    conversion::{
        conversion_server::{Conversion, ConversionServer},
        store_command::Command,
        store_message::Message,
        *,
    },
};
use endio_chassis::net::{Incoming, ListenAddr, Listener};
use endio_state_machine::token::{ReadGrant, Token, TokenKey};
use endio_store::block::{BlockDevice, MemoryDevice};
use endio_types::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Pblk, PblkRange, SegmentIndex, StoreId,
    VolumeId,
};
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Longest wait for anything; a test that meets it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for `future`, bounded.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

type Commands = Pin<Box<dyn Stream<Item = Result<StoreCommandBatch, Status>> + Send>>;

/// The service side: hands each session to the test.
pub struct FakeConversion {
    pub url: String,
    sessions: mpsc::Receiver<FakeSession>,
    pub answers_renewals: Arc<AtomicBool>,
    pub lease_ms: Arc<AtomicU64>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FakeConversion {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Service {
    sessions: mpsc::Sender<FakeSession>,
    answers_renewals: Arc<AtomicBool>,
    lease_ms: Arc<AtomicU64>,
}

/// One session. Renewals are answered by itself; everything else goes to the test.
pub struct FakeSession {
    pub register: RegisterStore,
    pub from_store: mpsc::Receiver<Message>,
    to_store: mpsc::Sender<Result<StoreCommandBatch, Status>>,
}

impl FakeConversion {
    pub async fn start() -> Self {
        let listener = Listener::bind(&ListenAddr::loopback()).await.unwrap();
        let url = listener.url().to_owned();
        let (to, sessions) = mpsc::channel(16);
        let answers_renewals = Arc::new(AtomicBool::new(true));
        let lease_ms = Arc::new(AtomicU64::new(10_000));
        let service = Service {
            sessions: to,
            answers_renewals: Arc::clone(&answers_renewals),
            lease_ms: Arc::clone(&lease_ms),
        };
        let server = tokio::spawn(async move {
            let router =
                tonic::transport::Server::builder().add_service(ConversionServer::new(service));
            router.serve_with_incoming(Incoming::new([listener])).await.unwrap();
        });
        Self { url, sessions, answers_renewals, lease_ms, server }
    }

    /// The next session, before it is registered.
    pub async fn session(&mut self) -> FakeSession {
        within("a session", self.sessions.recv()).await.unwrap()
    }

    /// The next session, registered under `epoch`; the store has said that it is ready.
    pub async fn registered(&mut self, epoch: u64) -> FakeSession {
        let mut session = self.session().await;
        session.answer_registration(epoch, self.lease_ms.load(Ordering::SeqCst) as u32).await;
        match session.next().await {
            Message::Ready(ready) => assert_eq!(ready.cluster_epoch, epoch),
            other => panic!("expected StoreReady, got {other:?}"),
        }
        session
    }
}

impl FakeSession {
    pub async fn send(&self, command: Command) {
        let commands = vec![StoreCommand { command: Some(command) }];
        self.to_store.send(Ok(StoreCommandBatch { commands })).await.unwrap();
    }

    pub async fn answer_registration(&self, epoch: u64, lease_ms: u32) {
        self.send(Command::Registered(Registered {
            store: STORE.0,
            cluster_epoch: epoch,
            key: key(epoch).expose().to_vec().into(),
            lease_ms,
            io_end_floor: IoEndId::new(ClusterEpoch(epoch), 0).0,
            protocol: None,
        }))
        .await;
    }

    pub async fn next(&mut self) -> Message {
        within("a message of the store", self.from_store.recv()).await.expect("session is open")
    }

    pub async fn release(&mut self) -> SegmentRelease {
        match self.next().await {
            Message::Release(release) => release,
            other => panic!("expected a release, got {other:?}"),
        }
    }

    /// Answers a release as accepted.
    pub async fn accept(&self, release: &SegmentRelease) {
        let token = release.token.as_ref().unwrap();
        let (io_end, segment) = (token.io_end, token.segment);
        self.send(Command::Released(ReleaseResult { io_end, segment, reason: 0 })).await;
    }

    /// Nothing more has come from the store up to now: proven by a fence, which it answers last.
    pub async fn assert_silent(&mut self) {
        self.send(Command::Fence(Fence { fence: 999, ..Fence::default() })).await;
        match self.next().await {
            Message::FenceDone(done) => assert_eq!(done.fence, 999),
            other => panic!("expected nothing, got {other:?}"),
        }
    }
}

/// Number of the store under test.
pub const STORE: StoreId = StoreId(7);

/// The key of an epoch.
pub fn key(epoch: u64) -> TokenKey {
    TokenKey::new([epoch as u8; 32])
}

/// What a test wants to have in a token.
#[derive(Clone, Copy)]
pub struct Want {
    pub epoch: u64,
    pub io_end: u64,
    pub segment: u32,
    pub generation: u64,
    pub store: u32,
    pub incarnation: u64,
    pub pblk: u64,
    pub blocks: u32,
}

impl Default for Want {
    fn default() -> Self {
        Self {
            epoch: 1,
            io_end: 1,
            segment: 1,
            generation: 1,
            store: STORE.0,
            incarnation: 1,
            pblk: 0,
            blocks: 1,
        }
    }
}

/// The signed token.
pub fn token(want: Want) -> common::Token {
    let epoch = ClusterEpoch(want.epoch);
    let token = Token {
        epoch,
        io_end: IoEndId::new(epoch, want.io_end),
        segment: SegmentIndex(want.segment),
        volume: VolumeId(3),
        generation: Generation(want.generation),
        store: StoreId(want.store),
        incarnation: Incarnation(want.incarnation),
        pblk: Pblk(want.pblk),
        blocks: want.blocks,
        lease_ms: 10_000,
        mac: [0; 16],
    }
    .signed(&key(want.epoch));
    common::Token {
        cluster_epoch: token.epoch.0,
        io_end: token.io_end.0,
        segment: token.segment.0,
        volume: token.volume.0,
        volume_generation: token.generation.0,
        store: token.store.0,
        store_incarnation: token.incarnation.0,
        pblk: token.pblk.0,
        blocks: token.blocks,
        lease_ms: token.lease_ms,
        mac: token.mac.to_vec().into(),
    }
}

/// A signed read grant.
pub fn grant(epoch: u64, generation: u64) -> common::ReadGrant {
    let grant =
        ReadGrant::new(&key(epoch), ClusterEpoch(epoch), VolumeId(3), Generation(generation));
    common::ReadGrant {
        cluster_epoch: grant.epoch.0,
        volume: grant.volume.0,
        volume_generation: grant.generation.0,
        mac: grant.mac.to_vec().into(),
    }
}

macro_rules! unimplemented_calls {
    ($($name:ident($request:ty) -> $response:ty;)*) => {$(
        // Written out as `async_trait` would: that macro does not see into this one.
        fn $name<'life0, 'async_trait>(
            &'life0 self,
            _: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'async_trait>>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err(Status::unimplemented("not part of this test")) })
        }
    )*};
}

#[tonic::async_trait]
impl Conversion for Service {
    type WritebackSessionStream =
        Pin<Box<dyn Stream<Item = Result<ConversionBatch, Status>> + Send>>;
    type StoreSessionStream = Commands;
    type BackupStream =
        Pin<Box<dyn Stream<Item = Result<endio_api::conversion::BackupPiece, Status>> + Send>>;
    type ListExtentsStream =
        Pin<Box<dyn Stream<Item = Result<ListExtentsResponse, Status>> + Send>>;

    async fn store_session(
        &self,
        request: Request<Streaming<StoreBatch>>,
    ) -> Result<Response<Commands>, Status> {
        let mut batches = request.into_inner();
        let (to_store, commands) = mpsc::channel(64);
        let (to_test, from_store) = mpsc::channel(4_096);
        let sessions = self.sessions.clone();
        let (answers, lease_ms) = (Arc::clone(&self.answers_renewals), Arc::clone(&self.lease_ms));
        tokio::spawn(async move {
            // Weak: dropping the test's session ends the stream.
            let mut to_store = Some(to_store);
            let mut renewed = None;
            let mut first = Some(from_store);
            while let Ok(Some(batch)) = batches.message().await {
                for message in batch.messages {
                    match message.message.unwrap() {
                        Message::Register(register) => {
                            let to_store = to_store.take().unwrap();
                            renewed = Some(to_store.downgrade());
                            let from_store = first.take().unwrap();
                            let session = FakeSession { register, from_store, to_store };
                            let _ = sessions.send(session).await;
                        }
                        Message::Renew(_) if answers.load(Ordering::SeqCst) => {
                            let lease_ms = lease_ms.load(Ordering::SeqCst) as u32;
                            let renewed_now = Renewed { lease_ms, io_end_floor: 0 };
                            let commands =
                                vec![StoreCommand { command: Some(Command::Renewed(renewed_now)) }];
                            let Some(to) = renewed.as_ref().and_then(|weak| weak.upgrade()) else {
                                return;
                            };
                            let _ = to.send(Ok(StoreCommandBatch { commands })).await;
                        }
                        Message::Renew(_) => {}
                        other => drop(to_test.send(other).await),
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(commands))))
    }

    unimplemented_calls! {
        create_volume(CreateVolumeRequest) -> Volume;
        get_volume(VolumeRequest) -> Volume;
        list_volumes(ListVolumesRequest) -> ListVolumesResponse;
        resize_volume(ResizeVolumeRequest) -> Volume;
        delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse;
        open_volume(OpenVolumeRequest) -> OpenVolumeResponse;
        close_volume(CloseVolumeRequest) -> CloseVolumeResponse;
        lookup(LookupRequest) -> LookupResponse;
        read_log(endio_api::conversion::ReadLogRequest) -> endio_api::conversion::ReadLogResponse;
        change_map(ChangeMapRequest) -> ChangeMapResponse;
        writeback_session(Streaming<WritebackBatch>) -> Self::WritebackSessionStream;
        list_stores(ListStoresRequest) -> ListStoresResponse;
        list_io_ends(ListIoEndsRequest) -> ListIoEndsResponse;
        list_extents(ListExtentsRequest) -> Self::ListExtentsStream;
        check(CheckRequest) -> CheckResponse;
        describe(endio_api::conversion::DescribeRequest) -> endio_api::conversion::DescribeResponse;
        backup(endio_api::conversion::BackupRequest) -> Self::BackupStream;
    }
}

/// A device in memory whose flushes can be held up.
#[derive(Debug)]
pub struct GatedDevice {
    pub memory: MemoryDevice,
    is_held: Mutex<bool>,
    opened: Condvar,
    pub writes: AtomicU64,
    pub flushes_begun: AtomicU64,
}

impl GatedDevice {
    pub fn new(capacity_blocks: u64) -> Arc<Self> {
        Arc::new(Self {
            memory: MemoryDevice::new(capacity_blocks),
            is_held: Mutex::new(false),
            opened: Condvar::new(),
            writes: AtomicU64::new(0),
            flushes_begun: AtomicU64::new(0),
        })
    }

    /// From now on flushes wait.
    pub fn hold(&self) {
        *self.is_held.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.is_held.lock().unwrap() = false;
        self.opened.notify_all();
    }

    pub async fn wait_for(&self, count: &AtomicU64, at_least: u64) {
        within("the device", async {
            while count.load(Ordering::SeqCst) < at_least {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    pub fn block(&self, pblk: u64) -> Vec<u8> {
        let mut block = vec![0; endio_types::BLOCK_SIZE];
        self.memory.read_at(Pblk(pblk), &mut block).unwrap();
        block
    }
}

impl BlockDevice for GatedDevice {
    fn capacity_blocks(&self) -> u64 {
        self.memory.capacity_blocks()
    }
    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        let result = self.memory.write_at(pblk, data);
        self.writes.fetch_add(1, Ordering::SeqCst);
        result
    }
    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        self.memory.read_at(pblk, data)
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes_begun.fetch_add(1, Ordering::SeqCst);
        let held = self.is_held.lock().unwrap();
        drop(self.opened.wait_while(held, |is_held| *is_held).unwrap());
        self.memory.flush()
    }
    fn punch(&self, range: PblkRange) -> io::Result<()> {
        self.memory.punch(range)
    }
    fn used_blocks(&self) -> io::Result<u64> {
        self.memory.used_blocks()
    }
}
