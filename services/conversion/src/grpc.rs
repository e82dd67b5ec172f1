//! The skin: decode, hand over, await, encode. No rule of the domain lives here.

use std::pin::Pin;
use std::sync::Arc;

use endio_api::access::Identity;
use endio_api::conversion as proto;
use endio_api::conversion::conversion_server::Conversion;
use endio_api::convert::{self, Malformed};
use endio_api::{protocol, status};
use endio_state_machine::machine::{
    Attempt, Call, Deletions, FromStore, FromWriteback, Input, Refusal, ReplyBody, VolumeInfo,
};
use endio_types::{ClusterEpoch, Generation, Lblk, LblkRange, Reason, VolumeId};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::backup;
use crate::batches::{Batcher, batches};
use crate::handle::{Handle, Outgoing, Question, Stream as Session, Traced};

/// Blocks looked up in one step of `ListExtents`: 64 chunks, some milliseconds of the driver's time.
const EXTENTS_STEP_BLOCKS: u64 = 1 << 16;
/// Blocks in one `Lookup`.
const LOOKUP_BLOCKS_MAX: u32 = 65_536;
/// Blocks in one answer to `ReadLog`: 1 MiB.
const LOG_READ_BLOCKS: usize = 256;
/// io_ends listed where the request sets no limit, and at the most.
const IO_ENDS_DEFAULT: u32 = 1_000;
const IO_ENDS_MAX: u32 = 100_000;
/// When to ask again for a backup while another one is taken, milliseconds.
const BACKUP_RETRY_MS: u32 = 5_000;

/// The service on the wire.
#[derive(Clone)]
pub(crate) struct Grpc {
    pub(crate) handle: Handle,
    /// The turn of the one backup that may be taken at a time: it keeps files from being dropped.
    pub(crate) backups: Arc<Semaphore>,
    /// As [`endio_state_machine::limits::Limits::log_blocks_per_volume_max`].
    pub(crate) log_blocks_max: u64,
}

type Answer<T> = Result<Response<T>, Status>;
pub(crate) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn refused(refusal: Refusal) -> Status {
    convert::call_refused(&refusal)
}

/// The driver answers each call with its own kind of body.
fn unexpected() -> Status {
    tracing::error!("the driver answered a call with another call's answer");
    Status::internal("internal error")
}

fn unknown(name: &str) -> Status {
    status::status(Reason::UnknownVolume, format!("volume {name:?} does not exist"))
}

/// The name of a writeback instance, with that of its certificate behind it: so nobody speaks for an
/// instance of another certificate, whatever name they say.
fn of_certificate(writeback: String, identity: Option<&Identity>) -> Result<String, Status> {
    match identity {
        None => Ok(writeback),
        Some(_) if writeback.contains('@') => {
            Err(Malformed::new("writeback", "a name has no @ in it").into())
        }
        // One that is missing stays so, and is refused.
        Some(_) if writeback.is_empty() => Ok(writeback),
        Some(identity) => Ok(format!("{writeback}@{}", identity.name)),
    }
}

impl Grpc {
    async fn volume_call(&self, call: Call) -> Answer<proto::Volume> {
        match self.handle.call(call).await.map_err(refused)? {
            ReplyBody::Volume(volume) => Ok(Response::new(convert::volume_to_proto(&volume))),
            _ => Err(unexpected()),
        }
    }

    async fn volume(&self, name: &str) -> Result<VolumeInfo, Status> {
        let question = |reply| Question::Volume(name.to_owned(), reply);
        self.handle.ask(question).await.map_err(refused)?.ok_or_else(|| unknown(name))
    }
}

#[tonic::async_trait]
impl Conversion for Grpc {
    async fn create_volume(
        &self,
        request: Request<proto::CreateVolumeRequest>,
    ) -> Answer<proto::Volume> {
        let request = request.into_inner();
        self.volume_call(Call::CreateVolume {
            name: request.name,
            size_bytes: request.size_bytes,
            replicas: request.replicas,
            in_place: request.in_place,
            growable: request.growable,
            as_of: request.as_of.map(deletions),
        })
        .await
    }

    async fn get_volume(&self, request: Request<proto::VolumeRequest>) -> Answer<proto::Volume> {
        let name = request.into_inner().name;
        Ok(Response::new(convert::volume_to_proto(&self.volume(&name).await?)))
    }

    async fn list_volumes(
        &self,
        _: Request<proto::ListVolumesRequest>,
    ) -> Answer<proto::ListVolumesResponse> {
        let as_of = self.handle.ask(Question::Deletions).await.map_err(refused)?;
        let as_of = Some(convert::deletions_to_proto(as_of));
        let volumes = self.handle.ask(Question::Volumes).await.map_err(refused)?;
        let volumes = volumes.iter().map(convert::volume_to_proto).collect();
        Ok(Response::new(proto::ListVolumesResponse { volumes, as_of }))
    }

    async fn resize_volume(
        &self,
        request: Request<proto::ResizeVolumeRequest>,
    ) -> Answer<proto::Volume> {
        let request = request.into_inner();
        self.volume_call(Call::ResizeVolume {
            name: request.name,
            volume: meant(request.volume),
            size_bytes: request.size_bytes,
            generation: Generation(request.generation),
            attempt: attempt(request.attempt),
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<proto::DeleteVolumeRequest>,
    ) -> Answer<proto::DeleteVolumeResponse> {
        let request = request.into_inner();
        let call = Call::DeleteVolume {
            name: request.name,
            volume: meant(request.volume),
            generation: Generation(request.generation),
            attempt: attempt(request.attempt),
        };
        match self.handle.call(call).await.map_err(refused)? {
            ReplyBody::Deleted => Ok(Response::new(proto::DeleteVolumeResponse {})),
            _ => Err(unexpected()),
        }
    }

    async fn open_volume(
        &self,
        request: Request<proto::OpenVolumeRequest>,
    ) -> Answer<proto::OpenVolumeResponse> {
        let identity = Identity::of_call(&request);
        let request = request.into_inner();
        let call = Call::OpenVolume {
            name: request.name,
            volume: meant(request.volume),
            writeback: of_certificate(request.writeback, identity.as_ref())?,
            force: request.force,
            if_generation: request.if_generation.map(Generation),
            reads_log: request.reads_log,
        };
        match self.handle.call(call).await.map_err(refused)? {
            ReplyBody::Opened(volume, grant, wait_ms) => {
                Ok(Response::new(proto::OpenVolumeResponse {
                    volume: Some(convert::volume_to_proto(&volume)),
                    read_grant: Some(convert::grant_to_proto(&grant)),
                    wait_ms,
                    logged_number: volume.logged_number,
                    log_blocks_max: if volume.in_place { 0 } else { self.log_blocks_max },
                }))
            }
            _ => Err(unexpected()),
        }
    }

    async fn close_volume(
        &self,
        request: Request<proto::CloseVolumeRequest>,
    ) -> Answer<proto::CloseVolumeResponse> {
        let request = request.into_inner();
        let generation = Generation(request.generation);
        let volume = meant(request.volume);
        let call = Call::CloseVolume { name: request.name, volume, generation };
        match self.handle.call(call).await.map_err(refused)? {
            ReplyBody::Closed => Ok(Response::new(proto::CloseVolumeResponse {})),
            _ => Err(unexpected()),
        }
    }

    async fn lookup(
        &self,
        request: Request<proto::LookupRequest>,
    ) -> Answer<proto::LookupResponse> {
        let request = request.into_inner();
        // Who only says which attempts are over wants no map.
        let least = u32::from(request.attempts_over == 0);
        if !(least..=LOOKUP_BLOCKS_MAX).contains(&request.blocks) {
            let why = "must be 1 to 65536, or 0 beside attempts_over";
            return Err(Malformed::new("blocks", why).into());
        }
        let range = range("lblk", request.lblk, request.blocks.into())?;
        let volume = VolumeId(request.volume);
        let generation = Generation(request.generation);
        let view = self
            .handle
            .ask(|reply| Question::Lookup {
                volume,
                generation,
                range,
                attempts_over: request.attempts_over,
                reply,
            })
            .await
            .and_then(|view| view)
            .map_err(refused)?;
        Ok(Response::new(convert::lookup_to_proto(&view)))
    }

    async fn read_log(
        &self,
        request: Request<proto::ReadLogRequest>,
    ) -> Answer<proto::ReadLogResponse> {
        let request = request.into_inner();
        let (volume, generation) = (VolumeId(request.volume), Generation(request.generation));
        let from = Lblk(request.lblk);
        let found = self
            .handle
            .ask(|reply| Question::Logged(volume, generation, from, LOG_READ_BLOCKS, reply))
            .await
            .and_then(|found| found)
            .map_err(refused)?;
        let blocks = found.into_iter().map(convert::logged_to_proto).collect();
        Ok(Response::new(proto::ReadLogResponse { blocks }))
    }

    async fn change_map(
        &self,
        request: Request<proto::ChangeMapRequest>,
    ) -> Answer<proto::ChangeMapResponse> {
        let request = request.into_inner();
        if request.blocks == 0 {
            return Err(Malformed::new("blocks", "must be at least 1").into());
        }
        let call = Call::ChangeMap {
            volume: VolumeId(request.volume),
            generation: Generation(request.generation),
            change: convert::map_change(request.change)?,
            range: range("lblk", request.lblk, request.blocks)?,
            attempt: attempt(request.attempt),
        };
        match self.handle.call(call).await.map_err(refused)? {
            ReplyBody::Changed { map_version, blocks_changed } => {
                Ok(Response::new(proto::ChangeMapResponse {
                    map_version: map_version.0,
                    blocks_changed,
                }))
            }
            _ => Err(unexpected()),
        }
    }

    type WritebackSessionStream = Streamed<proto::ConversionBatch>;

    async fn writeback_session(
        &self,
        request: Request<Streaming<proto::WritebackBatch>>,
    ) -> Answer<Self::WritebackSessionStream> {
        let identity = Identity::of_call(&request);
        let stream = self.handle.open_writeback().await.map_err(refused)?;
        let session = stream.session;
        let decode = move |batch: proto::WritebackBatch| {
            let identity = identity.clone();
            batch.messages.into_iter().map(move |message| {
                protocol::check_writeback(&message)?;
                let traceparent = writeback_trace(&message);
                let mut message = convert::from_writeback(message)?;
                if let FromWriteback::Hello { writeback } = &mut message {
                    *writeback = of_certificate(std::mem::take(writeback), identity.as_ref())?;
                }
                Ok((Input::Writeback { session, message }, traceparent))
            })
        };
        let lost = Input::WritebackLost { session };
        read_session(self.handle.clone(), request.into_inner(), &stream, decode, lost);
        let batches =
            batches(stream, convert::to_writeback, |messages| proto::ConversionBatch { messages });
        Ok(Response::new(batches))
    }

    type StoreSessionStream = Streamed<proto::StoreCommandBatch>;

    async fn store_session(
        &self,
        request: Request<Streaming<proto::StoreBatch>>,
    ) -> Answer<Self::StoreSessionStream> {
        let identity = Identity::of_call(&request);
        let stream = self.handle.open_store().await.map_err(refused)?;
        let session = stream.session;
        let decode = move |batch: proto::StoreBatch| {
            let identity = identity.clone();
            batch.messages.into_iter().map(move |message| {
                protocol::check_store(&message)?;
                let traceparent = store_trace(&message);
                let mut message = convert::from_store(message)?;
                if let FromStore::Register { name, .. } = &mut message {
                    *name = identity.as_ref().map(|identity| identity.name.clone());
                }
                Ok((Input::Store { session, message }, traceparent))
            })
        };
        let lost = Input::StoreLost { session };
        read_session(self.handle.clone(), request.into_inner(), &stream, decode, lost);
        let batches = batches(
            stream,
            |command, _| convert::to_store(command),
            |commands| proto::StoreCommandBatch { commands },
        );
        Ok(Response::new(batches))
    }

    async fn list_stores(
        &self,
        _: Request<proto::ListStoresRequest>,
    ) -> Answer<proto::ListStoresResponse> {
        let stores = self.handle.ask(Question::Stores).await.map_err(refused)?;
        let stores = stores.iter().map(convert::store_to_proto).collect();
        Ok(Response::new(proto::ListStoresResponse { stores }))
    }

    async fn list_io_ends(
        &self,
        request: Request<proto::ListIoEndsRequest>,
    ) -> Answer<proto::ListIoEndsResponse> {
        let request = request.into_inner();
        let volume = (request.volume != 0).then_some(VolumeId(request.volume));
        let limit = match request.limit {
            0 => IO_ENDS_DEFAULT,
            limit => limit.min(IO_ENDS_MAX),
        };
        let (io_ends, total) = self
            .handle
            .ask(|reply| Question::IoEnds(volume, limit as usize, reply))
            .await
            .map_err(refused)?;
        let io_ends = io_ends.iter().map(convert::io_end_to_proto).collect();
        Ok(Response::new(proto::ListIoEndsResponse { io_ends, total }))
    }

    type ListExtentsStream = Streamed<proto::ListExtentsResponse>;

    async fn list_extents(
        &self,
        request: Request<proto::ListExtentsRequest>,
    ) -> Answer<Self::ListExtentsStream> {
        let request = request.into_inner();
        let volume = self.volume(&request.volume).await?;
        let size_blocks = volume.size_bytes.div_ceil(endio_types::BLOCK_BYTES);
        let end = match request.blocks {
            0 => size_blocks,
            blocks => request.lblk.saturating_add(blocks).min(size_blocks),
        };
        let (sender, receiver) = mpsc::channel(4);
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let mut lblk = request.lblk;
            // Nobody is asked any more on behalf of a caller that is gone.
            while lblk < end && !sender.is_closed() {
                let (name, rest) = (request.volume.clone(), LblkRange::new(lblk, end - lblk));
                let step = |reply| Question::Extents(name, rest, EXTENTS_STEP_BLOCKS, reply);
                let extents = match handle.ask(step).await {
                    Ok(Some((extents, next))) => {
                        lblk = next;
                        extents
                    }
                    Ok(None) => return drop(sender.send(Err(unknown(&request.volume))).await),
                    Err(refusal) => return drop(sender.send(Err(refused(refusal))).await),
                };
                let mut batcher = Batcher::default();
                let extents = extents.iter().map(convert::extent_to_proto);
                let mut messages: Vec<_> = extents.filter_map(|e| batcher.push(e)).collect();
                messages.extend(batcher.take());
                for extents in messages {
                    let answer = proto::ListExtentsResponse { extents };
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn describe(
        &self,
        _: Request<proto::DescribeRequest>,
    ) -> Answer<proto::DescribeResponse> {
        Ok(Response::new(self.handle.ask(Question::Describe).await.map_err(refused)?))
    }

    type BackupStream = Streamed<proto::BackupPiece>;

    async fn backup(&self, _: Request<proto::BackupRequest>) -> Answer<Self::BackupStream> {
        let turn = Arc::clone(&self.backups).try_acquire_owned().map_err(|_| {
            let message = "another backup is being taken";
            status::status_retry(Reason::Limit, message, BACKUP_RETRY_MS)
        })?;
        let journal = self.handle.ask(Question::Journal).await.map_err(refused)?;
        Ok(Response::new(backup::start(journal, turn)))
    }

    async fn check(&self, _: Request<proto::CheckRequest>) -> Answer<proto::CheckResponse> {
        let report = self.handle.ask(Question::Check).await.map_err(refused)?;
        Ok(Response::new(proto::CheckResponse {
            findings: report.findings,
            volumes: report.volumes,
            extents: report.extents,
            mapped_blocks: report.mapped_blocks,
            reserved_blocks: report.reserved_blocks,
            quarantined_blocks: report.quarantined_blocks,
            free_blocks: report.free_blocks,
            io_ends: report.io_ends,
        }))
    }
}

fn range(field: &'static str, lblk: u64, blocks: u64) -> Result<LblkRange, Malformed> {
    match lblk.checked_add(blocks) {
        Some(_) => Ok(LblkRange::new(lblk, blocks)),
        None => Err(Malformed::new(field, "the range ends beyond 2^64 blocks")),
    }
}

fn writeback_trace(message: &proto::WritebackMessage) -> String {
    use proto::writeback_message::Message;
    match &message.message {
        Some(Message::Begin(begin)) => begin.traceparent.clone(),
        Some(Message::Release(release)) => release.traceparent.clone(),
        Some(Message::Log(log)) => log.traceparent.clone(),
        _ => String::new(),
    }
}

fn store_trace(message: &proto::StoreMessage) -> String {
    match &message.message {
        Some(proto::store_message::Message::Release(release)) => release.traceparent.clone(),
        _ => String::new(),
    }
}

/// Feeds the driver until the peer or the driver ends the stream; then says that it is lost, once.
fn read_session<B, M, S, I>(
    handle: Handle,
    mut inbound: Streaming<B>,
    session: &Session<M, S>,
    decode: impl Fn(B) -> I + Send + 'static,
    lost: Input,
) where
    B: Send + 'static,
    M: Send + 'static,
    I: Iterator<Item = Result<Traced, Status>> + Send,
{
    let ended = session.ended.clone();
    let fail = session.fail.clone();
    tokio::spawn(async move {
        loop {
            let batch = tokio::select! {
                biased;
                () = ended.cancelled() => break,
                batch = inbound.message() => batch,
            };
            let batch = match batch {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                Err(status) => {
                    // A peer whose connection broke does not hear it; one that sent garbage does.
                    if let Some(fail) = fail.upgrade() {
                        let told = status::malformed("stream", status.message());
                        drop(fail.try_send(Outgoing::Fail(told)));
                    }
                    break;
                }
            };
            match decode(batch).collect::<Result<Vec<_>, _>>() {
                Ok(inputs) => {
                    if !handle.inputs(inputs).await {
                        break;
                    }
                }
                Err(refused) => {
                    // Nothing of a batch that cannot be understood is taken.
                    if let Some(fail) = fail.upgrade() {
                        drop(fail.try_send(Outgoing::Fail(refused)));
                    }
                    break;
                }
            }
        }
        handle.inputs(vec![(lost, String::new())]).await;
    });
}

/// The volume that a call means; 0: whichever has the name.
fn meant(volume: u64) -> Option<VolumeId> {
    (volume != 0).then_some(VolumeId(volume))
}

fn deletions(as_of: proto::Deletions) -> Deletions {
    Deletions { epoch: ClusterEpoch(as_of.epoch), count: as_of.count }
}

fn attempt(attempt: Option<proto::Attempt>) -> Attempt {
    let proto::Attempt { number, over, logged } = attempt.unwrap_or_default();
    Attempt { number, over, logged }
}
