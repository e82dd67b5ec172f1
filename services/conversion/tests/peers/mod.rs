//! A store and a writeback that do just what a test says.

use std::time::Duration;

use endio_api::conversion as proto;
use endio_api::conversion::conversion_client::ConversionClient;
use endio_chassis::net::{Dialer, DialerConfig, ListenAddr, Listener};
use endio_chassis::recorder::Recorder;
use endio_chassis::shutdown::Shutdown;
use endio_conversion::{Config, Deps, Running, StartError, start};
use endio_store::meta::{MemoryMeta, MetaStore};
use endio_types::Reason;
use proto::conversion_message::Message as ToWriteback;
use proto::store_command::Command as ToStore;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Longest wait for anything; a test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("no {what} came"))
}

/// The service under test and its data directory.
pub(crate) struct Service {
    dir: tempfile::TempDir,
    running: Running,
    channel: Channel,
    pub(crate) shutdown: Shutdown,
}

impl Service {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    /// Over the metadata that lies in `meta` of this directory.
    pub(crate) async fn start_at(dir: tempfile::TempDir) -> Self {
        Self::start_in(dir).await
    }

    async fn start_in(dir: tempfile::TempDir) -> Self {
        Self::try_start(dir, None).await.unwrap()
    }

    /// Over metadata of the test's own.
    pub(crate) async fn start_over(metadata: &MemoryMeta) -> Result<Self, StartError> {
        let metadata: Box<dyn MetaStore> = Box::new(metadata.clone());
        Self::try_start(tempfile::tempdir().unwrap(), Some(metadata)).await
    }

    async fn try_start(
        dir: tempfile::TempDir,
        store: Option<Box<dyn MetaStore>>,
    ) -> Result<Self, StartError> {
        let config = Config { data_dir: dir.path().join("meta"), ..Config::default() };
        let listener = Listener::bind(&ListenAddr::loopback()).await.unwrap();
        let dialer = Dialer::new(DialerConfig::default());
        let channel = dialer.channel(listener.url()).unwrap();
        let shutdown = Shutdown::new();
        let deps = Deps::new(listener, dialer, Recorder::default(), shutdown.clone());
        let running = start(config, Deps { store, ..deps }).await?;
        Ok(Self { dir, running, channel, shutdown })
    }

    /// Stops gracefully and starts over the same data.
    pub(crate) async fn restart(self) -> Self {
        self.shutdown.force();
        within("stop", self.running.wait()).await.unwrap();
        Self::start_in(self.dir).await
    }

    pub(crate) async fn stopped(self) {
        within("stop", self.running.wait()).await.unwrap();
    }

    /// The fault that ends the service.
    pub(crate) async fn fault(self) -> StartError {
        within("fault", self.running.wait()).await.unwrap_err()
    }

    pub(crate) fn client(&self) -> ConversionClient<Channel> {
        ConversionClient::new(self.channel.clone())
    }

    pub(crate) async fn findings(&self) -> Vec<String> {
        self.client().check(proto::CheckRequest {}).await.unwrap().into_inner().findings
    }
}

/// How a session that begins like this goes: it is answered, or refused with "REASON: message".
fn told<T>(answer: Result<Option<T>, tonic::Status>) -> Result<(), String> {
    match answer {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err("closed".to_owned()),
        Err(status) => Err(format!("{}: {}", endio_api::status::reason(&status), status.message())),
    }
}

/// Opens a session as a writeback that speaks this.
pub(crate) async fn hello(
    service: &Service,
    protocol: Option<endio_api::common::Protocol>,
) -> Result<(), String> {
    let hello = proto::Hello { writeback: format!("wb-{}", rand::random::<u64>()), protocol };
    let hello = proto::writeback_message::Message::Hello(hello);
    let first = proto::WritebackMessage { message: Some(hello) };
    let first = proto::WritebackBatch { messages: vec![first] };
    let stream =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    match within("session", service.client().writeback_session(stream)).await {
        Ok(session) => told(within("answer", session.into_inner().message()).await),
        Err(status) => told::<()>(Err(status)),
    }
}

/// Opens a session as a block-store that speaks this.
pub(crate) async fn register(
    service: &Service,
    protocol: Option<endio_api::common::Protocol>,
) -> Result<(), String> {
    let register = proto::RegisterStore {
        uuid: rand::random::<[u8; 16]>().to_vec().into(),
        incarnation: 1,
        capacity_blocks: 1 << 20,
        url: "memory:store".to_owned(),
        protocol,
    };
    let register = proto::store_message::Message::Register(register);
    let first = proto::StoreMessage { message: Some(register) };
    let first = proto::StoreBatch { messages: vec![first] };
    let stream =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    match within("session", service.client().store_session(stream)).await {
        Ok(session) => told(within("answer", session.into_inner().message()).await),
        Err(status) => told::<()>(Err(status)),
    }
}

/// A block-store that writes nothing.
pub(crate) struct ScriptedStore {
    pub(crate) id: u32,
    pub(crate) epoch: u64,
    outgoing: mpsc::Sender<proto::StoreBatch>,
    incoming: Streaming<proto::StoreCommandBatch>,
    waiting: std::collections::VecDeque<ToStore>,
}

impl ScriptedStore {
    pub(crate) async fn register(service: &Service, number: u8) -> Self {
        let (outgoing, queue) = mpsc::channel(16);
        let request = ReceiverStream::new(queue);
        let mut client = service.client();
        let session = client.store_session(request);
        let register = proto::RegisterStore {
            uuid: vec![number; 16].into(),
            incarnation: 1,
            capacity_blocks: 1 << 20,
            url: format!("memory:store-{number}"),
            ..Default::default()
        };
        let register = proto::store_message::Message::Register(register);
        let first = proto::StoreMessage { message: Some(register) };
        outgoing.send(proto::StoreBatch { messages: vec![first] }).await.unwrap();
        let incoming = within("session", session).await.unwrap().into_inner();
        let waiting = Default::default();
        let mut store = Self { id: 0, epoch: 0, outgoing, incoming, waiting };
        let registered = store
            .until("registration", |command| match command {
                ToStore::Registered(registered) => Some(registered.clone()),
                _ => None,
            })
            .await;
        (store.id, store.epoch) = (registered.store, registered.cluster_epoch);
        let ready = proto::StoreReady { cluster_epoch: store.epoch };
        store.send(proto::store_message::Message::Ready(ready)).await;
        store.settle(service).await;
        store
    }

    /// Waits until conversion shows the store as live.
    async fn settle(&self, service: &Service) {
        let live = async {
            loop {
                let stores = service.client().list_stores(proto::ListStoresRequest {}).await;
                let stores = stores.unwrap().into_inner().stores;
                if stores.iter().any(|store| store.id == self.id && store.live) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within("live store", live).await;
    }

    async fn send(&self, message: proto::store_message::Message) {
        let message = proto::StoreMessage { message: Some(message) };
        self.outgoing.send(proto::StoreBatch { messages: vec![message] }).await.unwrap();
    }

    /// Says that the data is durable; the reason if conversion refuses.
    pub(crate) async fn release_durable(
        &mut self,
        token: endio_api::common::Token,
    ) -> Option<Reason> {
        let (io_end, segment) = (token.io_end, token.segment);
        let crc32c = vec![7; token.blocks as usize];
        let release = proto::SegmentRelease {
            token: Some(token),
            reason: 0,
            crc32c,
            traceparent: String::new(),
        };
        self.send(proto::store_message::Message::Release(release)).await;
        let answer = |command: &ToStore| match command {
            ToStore::Released(r) if (r.io_end, r.segment) == (io_end, segment) => Some(r.reason),
            _ => None,
        };
        Reason::from_wire(self.until("release result", answer).await)
    }

    async fn until<T>(&mut self, what: &str, pick: impl Fn(&ToStore) -> Option<T>) -> T {
        loop {
            while let Some(command) = self.waiting.pop_front() {
                if let Some(found) = pick(&command) {
                    return found;
                }
            }
            let batch = within(what, self.incoming.message()).await.unwrap().unwrap();
            self.waiting.extend(batch.commands.into_iter().filter_map(|c| c.command));
        }
    }
}

/// A writeback that keeps nothing.
pub(crate) struct ScriptedWriteback {
    name: String,
    volume: u64,
    pub(crate) generation: u64,
    requests: u64,
    outgoing: mpsc::Sender<proto::WritebackBatch>,
    incoming: Streaming<proto::ConversionBatch>,
    waiting: std::collections::VecDeque<ToWriteback>,
}

impl ScriptedWriteback {
    pub(crate) async fn hello(service: &Service) -> Self {
        let name = format!("wb-{:016x}", rand::random::<u64>());
        Self::connect(service, name).await
    }

    async fn connect(service: &Service, name: String) -> Self {
        let (outgoing, queue) = mpsc::channel(16);
        let mut client = service.client();
        let session = client.writeback_session(ReceiverStream::new(queue));
        let hello = proto::Hello { writeback: name.clone(), ..Default::default() };
        let hello = proto::writeback_message::Message::Hello(hello);
        let first = proto::WritebackMessage { message: Some(hello) };
        outgoing.send(proto::WritebackBatch { messages: vec![first] }).await.unwrap();
        let incoming = within("session", session).await.unwrap().into_inner();
        let (volume, generation, requests) = (0, 0, 0);
        let waiting = Default::default();
        let mut writeback =
            Self { name, volume, generation, requests, outgoing, incoming, waiting };
        writeback.until("welcome", |m| matches!(m, ToWriteback::Welcome(_)).then_some(())).await;
        writeback
    }

    pub(crate) async fn open(service: &Service, volume: &str) -> Self {
        Self::try_open(service, volume, false).await.unwrap()
    }

    pub(crate) async fn try_open(
        service: &Service,
        volume: &str,
        force: bool,
    ) -> Result<Self, tonic::Status> {
        let mut writeback = Self::hello(service).await;
        let request = proto::OpenVolumeRequest {
            name: volume.to_owned(),
            writeback: writeback.name.clone(),
            force,
            ..Default::default()
        };
        let opened = service.client().open_volume(request).await?.into_inner().volume.unwrap();
        (writeback.volume, writeback.generation) = (opened.id, opened.generation);
        Ok(writeback)
    }

    /// The same instance over a new stream, as after a restart of conversion.
    pub(crate) async fn reconnect(self, service: &Service) -> Self {
        let fresh = Self::connect(service, self.name).await;
        Self { volume: self.volume, generation: self.generation, ..fresh }
    }

    pub(crate) async fn send(&self, message: proto::WritebackMessage) {
        self.outgoing.send(proto::WritebackBatch { messages: vec![message] }).await.unwrap();
    }

    async fn ask(&mut self, lblk: u64, blocks: u32) -> u64 {
        self.requests += 1;
        let begin = proto::BeginIo {
            request: self.requests,
            volume: self.volume,
            generation: self.generation,
            lane: proto::Lane::Direct.into(),
            lblk,
            blocks,
            attempt: 1,
            ..Default::default()
        };
        let begin = proto::writeback_message::Message::Begin(begin);
        self.send(proto::WritebackMessage { message: Some(begin) }).await;
        self.requests
    }

    pub(crate) async fn begin(&mut self, lblk: u64, blocks: u32) -> proto::Begun {
        let request = self.ask(lblk, blocks).await;
        self.until("begun", |message| match message {
            ToWriteback::Begun(begun) if begun.request == request => Some(begun.clone()),
            ToWriteback::Refused(refused) if refused.request == request => {
                panic!("refused: {}", refused.message)
            }
            _ => None,
        })
        .await
    }

    pub(crate) async fn begin_refused(&mut self, lblk: u64, blocks: u32) -> Reason {
        let request = self.ask(lblk, blocks).await;
        let reason = self
            .until("refusal", |message| match message {
                ToWriteback::Refused(r) if r.request == request => Some(r.reason),
                ToWriteback::Begun(b) if b.request == request => panic!("it has begun"),
                _ => None,
            })
            .await;
        Reason::from_wire(reason).unwrap()
    }

    pub(crate) async fn try_begin(
        &mut self,
        lblk: u64,
        blocks: u32,
    ) -> Result<proto::Begun, Reason> {
        let request = self.ask(lblk, blocks).await;
        self.until("answer", |message| match message {
            ToWriteback::Refused(r) if r.request == request => {
                Some(Err(Reason::from_wire(r.reason).unwrap()))
            }
            ToWriteback::Begun(begun) if begun.request == request => Some(Ok(begun.clone())),
            _ => None,
        })
        .await
    }

    /// Begins until it is refused: a stop takes effect a moment after it was asked for.
    pub(crate) async fn refused_at_last(&mut self, lblk: u64, blocks: u32) -> Reason {
        for _ in 0..10_000 {
            match self.try_begin(lblk, blocks).await {
                Err(reason) => return reason,
                Ok(begun) => self.give_up(begun.submitter).await,
            }
        }
        panic!("it was never refused");
    }

    /// Begins until it is not refused: what was in the way goes away a moment later.
    pub(crate) async fn begun_at_last(&mut self, lblk: u64, blocks: u32) -> proto::Begun {
        for _ in 0..4_000 {
            if let Ok(begun) = self.try_begin(lblk, blocks).await {
                return begun;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it was always refused");
    }

    async fn give_up(&mut self, token: Option<endio_api::common::Token>) {
        let io_end = token.as_ref().unwrap().io_end;
        let release = proto::ReleaseSubmitter { token, abort: true, ..Default::default() };
        let release = proto::writeback_message::Message::Release(release);
        self.send(proto::WritebackMessage { message: Some(release) }).await;
        self.until("abort", |message| match message {
            ToWriteback::Completion(done) if done.io_end == io_end => Some(()),
            _ => None,
        })
        .await;
    }

    pub(crate) async fn release(&self, begun: &proto::Begun) {
        let release =
            proto::ReleaseSubmitter { token: begun.submitter.clone(), ..Default::default() };
        let release = proto::writeback_message::Message::Release(release);
        self.send(proto::WritebackMessage { message: Some(release) }).await;
    }

    pub(crate) async fn completion(&mut self) -> proto::Completion {
        self.until("completion", |message| match message {
            ToWriteback::Completion(done) => Some(done.clone()),
            _ => None,
        })
        .await
    }

    /// A whole write on one store.
    pub(crate) async fn write(&mut self, store: &mut ScriptedStore, lblk: u64, blocks: u32) {
        let begun = self.begin(lblk, blocks).await;
        self.release(&begun).await;
        for segment in &begun.segments {
            assert_eq!(store.release_durable(segment.token.clone().unwrap()).await, None);
        }
        assert_eq!(self.completion().await.reason, 0);
    }

    pub(crate) async fn lookup(
        &mut self,
        service: &Service,
        lblk: u64,
        blocks: u32,
    ) -> proto::LookupResponse {
        let request = proto::LookupRequest {
            volume: self.volume,
            generation: self.generation,
            lblk,
            blocks,
            attempts_over: 0,
        };
        service.client().lookup(request).await.unwrap().into_inner()
    }

    /// The status with which conversion ends the stream.
    pub(crate) async fn failure(&mut self) -> tonic::Status {
        loop {
            match within("end of the stream", self.incoming.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a reason"),
                Err(status) => return status,
            }
        }
    }

    async fn until<T>(&mut self, what: &str, pick: impl Fn(&ToWriteback) -> Option<T>) -> T {
        loop {
            let found = self.waiting.iter().enumerate().find_map(|(at, m)| Some((at, pick(m)?)));
            if let Some((at, found)) = found {
                self.waiting.remove(at);
                return found;
            }
            let batch = within(what, self.incoming.message()).await.unwrap().unwrap();
            self.waiting.extend(batch.messages.into_iter().filter_map(|m| m.message));
        }
    }
}
