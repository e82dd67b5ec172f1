//! A writeback service in memory that fails as told, to test transfers against.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use endio_api::{
    common::{Extent, ExtentState, ListSpansRequest, ListSpansResponse},
    conversion as cv,
    status::status,
    writeback::{
        self as wb, IoCompletion, IoRequest, ReadResponse,
        inspect_server::{Inspect, InspectServer},
        io_request::Op,
        io_server::{Io, IoServer},
        volumes_server::{Volumes, VolumesServer},
    },
};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Reason};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

/// What happens to one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Nothing.
    Pass,
    /// The stream breaks; nothing was done.
    CutBeforeApply,
    /// The stream breaks after the request took effect.
    CutAfterApply,
    /// It is refused.
    Refuse(Reason),
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<String, (Vec<u8>, Vec<u8>)>,
    growable: BTreeSet<String>,
    /// One for every second request of Submit streams.
    faults: VecDeque<Fault>,
    read_faults: VecDeque<Fault>,
    seen: u64,
    /// How often each number of each session took effect, and whether it came unmarked again.
    applied: BTreeMap<(Bytes, u64), u32>,
    unmarked_retries: u64,
    duplicates: u64,
    trims: u64,
    written_bytes: u64,
    fsyncs: u64,
    lose_at: Vec<u64>,
    broken_from: Option<u64>,
}

/// The service.
#[derive(Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    url: String,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    /// Listens on a port of its own. Each fault hits one of the first requests of Submit streams.
    pub(crate) async fn start(faults: Vec<Fault>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = State { faults: faults.into(), ..State::default() };
        let fake = Self { state: Arc::new(Mutex::new(state)), url };
        let server = tonic::transport::Server::builder()
            .add_service(IoServer::new(fake.clone()))
            .add_service(InspectServer::new(fake.clone()))
            .add_service(VolumesServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        fake
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn create(&self, name: &str, length: usize, fill: u8) {
        let content = vec![fill; length];
        self.state().volumes.insert(name.into(), (content.clone(), content));
    }

    /// A volume that writes past its end extend.
    pub(crate) fn create_growable(&self, name: &str, length: usize, fill: u8) {
        self.create(name, length, fill);
        self.state().growable.insert(name.into());
    }

    pub(crate) fn put(&self, name: &str, at: usize, data: &[u8]) {
        let mut state = self.state();
        state.volumes.get_mut(name).unwrap().0[at..at + data.len()].copy_from_slice(data);
    }

    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        self.state().volumes[name].0.clone()
    }

    pub(crate) fn durable(&self, name: &str) -> Vec<u8> {
        self.state().volumes[name].1.clone()
    }

    pub(crate) fn break_reads(&self, faults: &[Fault]) {
        self.state().read_faults = faults.to_vec().into();
    }

    /// The n-th fsyncs lose all that was written since the last good one, and say so.
    pub(crate) fn lose_at_fsync(&self, numbers: &[u64]) {
        self.state().lose_at = numbers.to_vec();
    }

    pub(crate) fn break_for_good_at_fsync(&self, number: u64) {
        self.state().broken_from = Some(number);
    }

    pub(crate) fn mend(&self) {
        self.state().broken_from = None;
    }

    pub(crate) fn duplicates(&self) -> u64 {
        self.state().duplicates
    }

    pub(crate) fn trims(&self) -> u64 {
        self.state().trims
    }

    pub(crate) fn fsyncs(&self) -> u64 {
        self.state().fsyncs
    }

    pub(crate) fn written_bytes(&self) -> u64 {
        self.state().written_bytes
    }

    pub(crate) fn faults_left(&self) -> usize {
        self.state().faults.len()
    }

    pub(crate) fn assert_each_sequence_applied_once(&self) {
        let state = self.state();
        assert!(state.applied.values().all(|times| *times == 1), "{:?}", state.applied);
        assert_eq!(state.unmarked_retries, 0, "a second try says that it is one");
        let mut sessions: BTreeMap<&Bytes, Vec<u64>> = BTreeMap::new();
        for (session, sequence) in state.applied.keys() {
            assert_eq!(session.len(), 16);
            sessions.entry(session).or_default().push(*sequence);
        }
        for sequences in sessions.values() {
            assert_eq!(sequences[0], 1);
            assert_eq!(*sequences.last().unwrap(), sequences.len() as u64, "no number is skipped");
        }
    }

    fn describe(&self, name: String) -> Result<Response<cv::Volume>, Status> {
        let state = self.state();
        let (content, _) = state
            .volumes
            .get(&name)
            .ok_or_else(|| status(Reason::UnknownVolume, "there is no such volume"))?;
        let (size_bytes, growable) = (content.len() as u64, state.growable.contains(&name));
        Ok(Response::new(cv::Volume { id: 1, name, size_bytes, growable, ..<_>::default() }))
    }

    fn apply(&self, op: &Op) -> Result<bool, Reason> {
        let mut state = self.state();
        let (Op::Write(wb::WriteRequest { retry, volume, .. })
        | Op::Trim(wb::RangeRequest { retry, volume, .. })) = op
        else {
            return Err(Reason::Malformed);
        };
        let size = state.volumes.get(volume).ok_or(Reason::UnknownVolume)?.0.len() as u64;
        let is_growable = state.growable.contains(volume);
        let end = match op {
            // Past the end it extends the volume.
            Op::Write(_) if is_growable => 0,
            Op::Write(write) => write.offset_bytes + write.data.len() as u64,
            Op::Trim(range) => range.offset_bytes + range.length_bytes,
            _ => 0,
        };
        if end > size {
            return Err(Reason::OutOfRange);
        }
        let key = retry.clone().unwrap();
        if state.applied.contains_key(&(key.session.clone(), key.sequence)) {
            state.duplicates += 1;
            state.unmarked_retries += u64::from(!key.is_retry);
            return Ok(true);
        }
        *state.applied.entry((key.session, key.sequence)).or_default() += 1;
        match op {
            Op::Write(write) => {
                state.written_bytes += write.data.len() as u64;
                let at = usize::try_from(write.offset_bytes).unwrap();
                let content = &mut state.volumes.get_mut(volume).unwrap().0;
                let end = at + write.data.len();
                content.resize(content.len().max(end), 0);
                content[at..end].copy_from_slice(&write.data);
            }
            Op::Trim(range) => {
                state.trims += 1;
                let at = usize::try_from(range.offset_bytes).unwrap();
                let length = usize::try_from(range.length_bytes).unwrap();
                state.volumes.get_mut(volume).unwrap().0[at..at + length].fill(0);
            }
            _ => {}
        }
        Ok(false)
    }

    /// Serves one stream until it ends or a fault cuts it.
    async fn serve(
        self,
        mut requests: Streaming<IoRequest>,
        answers: mpsc::Sender<Result<IoCompletion, Status>>,
    ) {
        while let Ok(Some(request)) = requests.message().await {
            let fault = {
                let mut state = self.state();
                state.seen += 1;
                let hit = state.seen.is_multiple_of(2);
                if hit { state.faults.pop_front() } else { None }.unwrap_or(Fault::Pass)
            };
            let cut = || Status::unavailable("the stream was cut on purpose");
            let outcome = match fault {
                Fault::CutBeforeApply => {
                    let _ = answers.send(Err(cut())).await;
                    return;
                }
                Fault::Refuse(reason) => Err(reason),
                Fault::Pass | Fault::CutAfterApply => self.apply(&request.op.unwrap()),
            };
            if fault == Fault::CutAfterApply {
                let _ = answers.send(Err(cut())).await;
                return;
            }
            let completion = IoCompletion {
                cookie: request.cookie,
                reason: outcome.err().map_or(0, |reason| reason as i32),
                duplicate: outcome == Ok(true),
                ..IoCompletion::default()
            };
            if answers.send(Ok(completion)).await.is_err() {
                return;
            }
        }
    }
}

/// As the engine does: what lies beyond the end is refused.
fn within(content: &[u8], offset: u64, length: u64) -> Result<(), Status> {
    match offset + length <= content.len() as u64 {
        true => Ok(()),
        false => Err(status(Reason::OutOfRange, "the range lies beyond the volume's end")),
    }
}

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("transfers do not need it"))
}

#[tonic::async_trait]
impl Io for Fake {
    type ReadStream = Answers<ReadResponse>;
    type SubmitStream = Answers<IoCompletion>;

    async fn write(
        &self,
        _: Request<wb::WriteRequest>,
    ) -> Result<Response<wb::WriteResponse>, Status> {
        no()
    }

    async fn read(
        &self,
        request: Request<wb::ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let fault = self.state().read_faults.pop_front().unwrap_or(Fault::Pass);
        if let Fault::Refuse(reason) = fault {
            return Err(status(reason, "refused on purpose"));
        }
        let content = self.content(&request.volume);
        within(&content, request.offset_bytes, request.length_bytes)?;
        let mut pieces = Vec::new();
        let (mut at, end) = (request.offset_bytes, request.offset_bytes + request.length_bytes);
        while at < end {
            let length = (end - at).min(300_000);
            let from = usize::try_from(at).unwrap();
            let data = &content[from..from + usize::try_from(length).unwrap()];
            let mut answer = ReadResponse { offset_bytes: at, ..ReadResponse::default() };
            if data.iter().all(|b| *b == 0) {
                answer.zeroes_bytes = length;
            } else {
                answer.data = Bytes::copy_from_slice(data);
            }
            pieces.push(Ok(answer));
            at += length;
        }
        match fault {
            Fault::CutBeforeApply => pieces.truncate(0),
            Fault::CutAfterApply => pieces.truncate(2),
            Fault::Pass | Fault::Refuse(_) => {}
        }
        if fault != Fault::Pass {
            pieces.push(Err(Status::unavailable("cut on purpose")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn submit(
        &self,
        request: Request<Streaming<IoRequest>>,
    ) -> Result<Response<Self::SubmitStream>, Status> {
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(self.clone().serve(request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(|answer| answer))))
    }

    async fn fsync(
        &self,
        request: Request<wb::FsyncRequest>,
    ) -> Result<Response<wb::FsyncResponse>, Status> {
        let volume = request.into_inner().volume;
        let mut state = self.state();
        state.fsyncs += 1;
        let number = state.fsyncs;
        if state.broken_from.is_some_and(|from| number >= from) {
            return Err(status(Reason::NotReady, "broken on purpose"));
        }
        let is_lost = state.lose_at.contains(&number);
        let (content, durable) = state.volumes.get_mut(&volume).unwrap();
        if is_lost {
            content.clone_from(durable);
            return Err(status(Reason::LostWrites, "power was lost on purpose"));
        }
        durable.clone_from(content);
        Ok(Response::new(wb::FsyncResponse { waited_for: 0 }))
    }

    async fn sync_all(
        &self,
        _: Request<wb::SyncAllRequest>,
    ) -> Result<Response<wb::FsyncResponse>, Status> {
        no()
    }

    async fn trim(
        &self,
        _: Request<wb::RangeRequest>,
    ) -> Result<Response<wb::RangeResponse>, Status> {
        no()
    }

    async fn write_zeroes(
        &self,
        _: Request<wb::RangeRequest>,
    ) -> Result<Response<wb::RangeResponse>, Status> {
        no()
    }

    async fn allocate(
        &self,
        _: Request<wb::RangeRequest>,
    ) -> Result<Response<wb::RangeResponse>, Status> {
        no()
    }
}

#[tonic::async_trait]
impl Inspect for Fake {
    type ExtentsStream = Answers<wb::ExtentsResponse>;

    async fn extents(
        &self,
        request: Request<wb::ExtentsRequest>,
    ) -> Result<Response<Self::ExtentsStream>, Status> {
        let request = request.into_inner();
        let content = self.content(&request.volume);
        within(&content, request.offset_bytes, request.length_bytes)?;
        let first = request.offset_bytes / BLOCK_BYTES;
        let blocks = request.length_bytes.div_ceil(BLOCK_BYTES);
        let extents = (first..first + blocks).map(|lblk| {
            let at = usize::try_from(lblk).unwrap() * BLOCK_SIZE;
            let end = (at + BLOCK_SIZE).min(content.len());
            let is_hole = content[at..end].iter().all(|b| *b == 0);
            let state = if is_hole { ExtentState::Hole } else { ExtentState::Written };
            Extent { lblk, blocks: 1, state: state.into(), ..Extent::default() }
        });
        let answer = wb::ExtentsResponse { extents: extents.collect() };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(answer)]))))
    }

    async fn io_ends(
        &self,
        _: Request<cv::ListIoEndsRequest>,
    ) -> Result<Response<cv::ListIoEndsResponse>, Status> {
        no()
    }

    async fn stores(
        &self,
        _: Request<cv::ListStoresRequest>,
    ) -> Result<Response<cv::ListStoresResponse>, Status> {
        no()
    }

    async fn check(
        &self,
        _: Request<wb::CheckRequest>,
    ) -> Result<Response<wb::CheckResponse>, Status> {
        no()
    }

    async fn trace(
        &self,
        _: Request<ListSpansRequest>,
    ) -> Result<Response<ListSpansResponse>, Status> {
        no()
    }

    type BackupStream = Answers<cv::BackupPiece>;

    async fn backup(
        &self,
        _: Request<cv::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        no()
    }

    async fn status(
        &self,
        _: Request<wb::StatusRequest>,
    ) -> Result<Response<wb::StatusResponse>, Status> {
        Ok(Response::new(wb::StatusResponse::default()))
    }
}

#[tonic::async_trait]
impl Volumes for Fake {
    async fn create(
        &self,
        request: Request<cv::CreateVolumeRequest>,
    ) -> Result<Response<cv::Volume>, Status> {
        let request = request.into_inner();
        Self::create(self, &request.name, usize::try_from(request.size_bytes).unwrap(), 0);
        let cv::CreateVolumeRequest { name, size_bytes, .. } = request;
        Ok(Response::new(cv::Volume { id: 1, name, size_bytes, ..cv::Volume::default() }))
    }

    async fn get(
        &self,
        request: Request<wb::VolumeRequest>,
    ) -> Result<Response<cv::Volume>, Status> {
        self.describe(request.into_inner().name)
    }

    async fn list(
        &self,
        _: Request<cv::ListVolumesRequest>,
    ) -> Result<Response<cv::ListVolumesResponse>, Status> {
        no()
    }

    async fn resize(&self, _: Request<wb::ResizeRequest>) -> Result<Response<cv::Volume>, Status> {
        no()
    }

    async fn delete(
        &self,
        _: Request<wb::DeleteRequest>,
    ) -> Result<Response<wb::DeleteResponse>, Status> {
        no()
    }

    async fn open(
        &self,
        request: Request<wb::OpenRequest>,
    ) -> Result<Response<cv::Volume>, Status> {
        self.describe(request.into_inner().name)
    }

    async fn close(
        &self,
        _: Request<wb::VolumeRequest>,
    ) -> Result<Response<cv::CloseVolumeResponse>, Status> {
        no()
    }
}
