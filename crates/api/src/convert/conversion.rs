//! Messages of the conversion service ⇄ inputs and effects of its machine.

use bytes::Bytes;
use endio_state_machine::data_log::{LogEntry, Logged};
use endio_state_machine::machine as domain;
use endio_state_machine::machine::{FromStore, FromWriteback, Refusal, ToStore, ToWriteback};
use endio_types::{
    ClusterEpoch, Generation, Incarnation, Lblk, LblkRange, MapVersion, Reason, SegmentIndex,
    StoreId, VolumeId,
};

use super::{
    Malformed, extent_to_proto, grant_to_proto, hex, reason_from_wire, reason_to_wire,
    token_from_proto, token_to_proto,
};
use crate::conversion as proto;
use crate::status;

fn saturate(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A message of a writeback.
///
/// # Errors
/// It says nothing, or a field cannot be understood.
pub fn from_writeback(message: proto::WritebackMessage) -> Result<FromWriteback, Malformed> {
    use proto::writeback_message::Message;
    Ok(match message.message.ok_or(Malformed::new("message", "is required"))? {
        Message::Hello(hello) => FromWriteback::Hello { writeback: hello.writeback },
        Message::Begin(begin) => FromWriteback::Begin(begin_io(begin)?),
        Message::Release(release) => FromWriteback::Release {
            token: token_from_proto(release.token.as_ref())?,
            not_submitted: release.not_submitted.into_iter().map(SegmentIndex).collect(),
            abort: release.abort,
        },
        Message::Renew(renew) => {
            let confirm = |c: proto::ReadConfirm| {
                (VolumeId(c.volume), Generation(c.generation), MapVersion(c.map_version))
            };
            FromWriteback::Renew { confirms: renew.confirms.into_iter().map(confirm).collect() }
        }
        Message::Reserve(reserve) => FromWriteback::Reserve {
            request: reserve.request,
            volume: VolumeId(reserve.volume),
            generation: Generation(reserve.generation),
            reset: reserve.reset,
            add_blocks: reserve.add_blocks,
            drop_blocks: reserve.drop_blocks,
        },
        Message::Log(log) => FromWriteback::Log(domain::LogData {
            request: log.request,
            volume: VolumeId(log.volume),
            generation: Generation(log.generation),
            number: log.number,
            entries: log.blocks.iter().map(log_entry).collect(),
            data: log.data,
        }),
    })
}

fn log_entry(block: &proto::LoggedBlock) -> LogEntry {
    LogEntry {
        lblk: Lblk(block.lblk),
        end_bytes: block.end_bytes,
        crc: block.crc32c,
        stamp: block.stamp,
    }
}

/// A block of the data log for the wire.
pub fn logged_to_proto((Lblk(lblk), logged): (Lblk, Logged)) -> proto::LoggedBlock {
    proto::LoggedBlock {
        lblk,
        end_bytes: logged.end_bytes,
        crc32c: logged.crc,
        generation: logged.generation.0,
        data: logged.data,
        stamp: logged.stamp,
    }
}

/// The deletions for the wire.
pub fn deletions_to_proto(deletions: domain::Deletions) -> proto::Deletions {
    proto::Deletions { epoch: deletions.epoch.0, count: deletions.count }
}

fn begin_io(begin: proto::BeginIo) -> Result<domain::BeginIo, Malformed> {
    let lane = match proto::Lane::try_from(begin.lane) {
        Ok(proto::Lane::WriteOut) => domain::Lane::WriteOut,
        Ok(proto::Lane::Direct) => domain::Lane::Direct,
        _ => return Err(Malformed::new("begin.lane", "must be WRITE_OUT or DIRECT")),
    };
    let (pairs, []) = begin.more.as_chunks::<2>() else {
        return Err(Malformed::new("begin.more", "must be pairs of lblk and blocks"));
    };
    Ok(domain::BeginIo {
        more: pairs.iter().map(|[lblk, blocks]| LblkRange::new(*lblk, *blocks)).collect(),
        request: begin.request,
        volume: VolumeId(begin.volume),
        generation: Generation(begin.generation),
        lane,
        lblk: Lblk(begin.lblk),
        blocks: begin.blocks,
        size_after_bytes: begin.size_after_bytes,
        avoid_stores: begin.avoid_stores.into_iter().map(StoreId).collect(),
        attempt: begin.attempt,
        traceparent: begin.traceparent,
        sync: begin.sync,
        logged_up_to: begin.logged_up_to,
    })
}

/// A message of a block-store.
///
/// # Errors
/// It says nothing, or a field cannot be understood.
pub fn from_store(message: proto::StoreMessage) -> Result<FromStore, Malformed> {
    use proto::store_message::Message;
    Ok(match message.message.ok_or(Malformed::new("message", "is required"))? {
        Message::Register(register) => FromStore::Register {
            uuid: register.uuid[..]
                .try_into()
                .map_err(|_| Malformed::new("register.uuid", "must be 16 bytes"))?,
            incarnation: Incarnation(register.incarnation),
            capacity_blocks: register.capacity_blocks,
            url: register.url,
            // The skin knows who sent it.
            name: None,
        },
        Message::Ready(ready) => FromStore::Ready { epoch: ClusterEpoch(ready.cluster_epoch) },
        Message::Release(release) => FromStore::Release {
            token: token_from_proto(release.token.as_ref())?,
            outcome: match reason_from_wire(release.reason)? {
                None => domain::SegmentOutcome::Durable(release.crc32c),
                Some(reason) => domain::SegmentOutcome::Failed(reason),
            },
        },
        Message::Renew(_) => FromStore::Renew,
        Message::FenceDone(done) => FromStore::FenceDone { fence: done.fence },
        Message::PunchDone(done) => FromStore::PunchDone { punch: done.punch },
    })
}

/// Which change a request asks for.
///
/// # Errors
/// An unknown one.
pub fn map_change(change: i32) -> Result<domain::MapChange, Malformed> {
    match proto::MapChange::try_from(change) {
        Ok(proto::MapChange::Trim) => Ok(domain::MapChange::Trim),
        Ok(proto::MapChange::Allocate) => Ok(domain::MapChange::Allocate),
        Ok(proto::MapChange::Zero) => Ok(domain::MapChange::Zero),
        _ => Err(Malformed::new("change", "must be TRIM, ALLOCATE or ZERO")),
    }
}

/// A refused call as a status.
pub fn call_refused(refusal: &Refusal) -> tonic::Status {
    if refusal.reason == Reason::Malformed {
        return status::malformed("request", refusal.message);
    }
    status::status_retry(refusal.reason, refusal.message, refusal.retry_after_ms)
}

/// A message to a writeback. `convert_us` is the driver's measurement for a completion.
/// [`ToWriteback::SessionRefused`] has no message: it ends the stream with [`call_refused`].
pub fn to_writeback(
    message: ToWriteback,
    convert_us: u64,
) -> Result<proto::ConversionMessage, tonic::Status> {
    use proto::conversion_message::Message;
    let message = match message {
        ToWriteback::SessionRefused(refusal) => return Err(call_refused(&refusal)),
        ToWriteback::Welcome { epoch, lease_ms } => {
            let protocol = crate::protocol::ours();
            Message::Welcome(proto::Welcome { cluster_epoch: epoch.0, lease_ms, protocol })
        }
        ToWriteback::Begun { request, submitter, segments, owes_conversion } => {
            let segment = |s: &domain::GrantedSegment| proto::Segment {
                token: Some(token_to_proto(&s.token)),
                lblk: s.lblk.0,
                replica: s.replica,
                offset_blocks: s.offset_blocks,
            };
            Message::Begun(proto::Begun {
                request,
                submitter: Some(token_to_proto(&submitter)),
                segments: segments.iter().map(segment).collect(),
                owes_conversion,
            })
        }
        ToWriteback::Refused { request, refusal } => Message::Refused(proto::BeginRefused {
            request,
            reason: refusal.reason as i32,
            message: refusal.message.to_owned(),
            retry_after_ms: refusal.retry_after_ms,
        }),
        ToWriteback::Completion(done) => Message::Completion(completion(done, convert_us)),
        ToWriteback::Renewed { lease_ms, floor } => {
            Message::Renewed(proto::Renewed { lease_ms, io_end_floor: floor.0 })
        }
        ToWriteback::VolumeFenced { volume, generation } => {
            Message::Fenced(proto::VolumeFenced { volume: volume.0, generation: generation.0 })
        }
        ToWriteback::Released { io_end, refused } => Message::Released(proto::SubmitterReleased {
            io_end: io_end.0,
            reason: reason_to_wire(refused),
        }),
        ToWriteback::Stores(stores) => Message::Stores(proto::ListStoresResponse {
            stores: stores.iter().map(store_to_proto).collect(),
        }),
        ToWriteback::Reserved { request, blocks } => {
            Message::Reserved(proto::Reserved { request, blocks })
        }
        ToWriteback::Logged { request } => Message::Logged(proto::Logged { request }),
    };
    Ok(proto::ConversionMessage { message: Some(message) })
}

fn completion(done: domain::Completion, convert_us: u64) -> proto::Completion {
    proto::Completion {
        io_end: done.io_end.0,
        reason: reason_to_wire(done.failed),
        message: done.message.to_owned(),
        retryable: done.retryable,
        map_version: done.map_version.0,
        size_bytes: done.size_bytes,
        converted: done.converted.iter().flat_map(|range| [range.start.0, range.len]).collect(),
        failed_store: done.failed_store.map_or(0, |store| store.0),
        convert_us,
    }
}

/// A command to a block-store. [`ToStore::SessionRefused`] ends the stream instead.
pub fn to_store(command: ToStore) -> Result<proto::StoreCommand, tonic::Status> {
    use proto::store_command::Command;
    let command = match command {
        ToStore::SessionRefused(refusal) => return Err(call_refused(&refusal)),
        ToStore::Registered { store, epoch, key, lease_ms, floor } => {
            Command::Registered(proto::Registered {
                store: store.0,
                cluster_epoch: epoch.0,
                key: Bytes::copy_from_slice(key.expose()),
                lease_ms,
                io_end_floor: floor.0,
                protocol: crate::protocol::ours(),
            })
        }
        ToStore::Released { io_end, segment, refused } => Command::Released(proto::ReleaseResult {
            io_end: io_end.0,
            segment: segment.0,
            reason: reason_to_wire(refused),
        }),
        ToStore::Renewed { lease_ms, floor } => {
            Command::Renewed(proto::Renewed { lease_ms, io_end_floor: floor.0 })
        }
        ToStore::Fence { fence, io_ends, volumes } => {
            let volume = |(volume, generation): &(VolumeId, Generation)| proto::VolumeFenced {
                volume: volume.0,
                generation: generation.0,
            };
            Command::Fence(proto::Fence {
                fence,
                io_ends: io_ends.iter().map(|id| id.0).collect(),
                volumes: volumes.iter().map(volume).collect(),
            })
        }
        ToStore::Punch { punch, ranges } => {
            let range = |r: &endio_types::PblkRange| proto::PhysicalRange {
                pblk: r.start.0,
                blocks: r.len,
            };
            Command::Punch(proto::Punch { punch, ranges: ranges.iter().map(range).collect() })
        }
    };
    Ok(proto::StoreCommand { command: Some(command) })
}

/// A store for display.
pub fn store_to_proto(store: &domain::StoreInfo) -> proto::Store {
    proto::Store {
        id: store.id.0,
        uuid: hex(&store.uuid),
        url: store.url.clone(),
        incarnation: store.incarnation.0,
        capacity_blocks: store.capacity_blocks,
        free_blocks: store.free_blocks,
        mapped_blocks: store.mapped_blocks,
        reserved_blocks: store.reserved_blocks,
        quarantined_blocks: store.quarantined_blocks,
        live: store.live,
        lease_left_ms: saturate(store.lease_left_ms),
    }
}

/// A volume for display.
pub fn volume_to_proto(volume: &domain::VolumeInfo) -> proto::Volume {
    proto::Volume {
        id: volume.id.0,
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        replicas: volume.replicas,
        in_place: volume.in_place,
        growable: volume.growable,
        generation: volume.generation.0,
        map_version: volume.map_version.0,
        mapped_blocks: volume.mapped_blocks,
        owner: volume.owner.clone().unwrap_or_default(),
        logged_blocks: volume.logged_blocks,
    }
}

/// The map of a range for the wire.
pub fn lookup_to_proto(view: &domain::MapView) -> proto::LookupResponse {
    proto::LookupResponse {
        map_version: view.map_version.0,
        extents: view.extents.iter().map(extent_to_proto).collect(),
        size_bytes: view.size_bytes,
        read_grant: view.grant.as_ref().map(grant_to_proto),
    }
}

/// An io_end for display.
pub fn io_end_to_proto(io_end: &domain::IoEndInfo) -> proto::IoEnd {
    let holder = |holder: &domain::Holder| match holder {
        domain::Holder::Writeback(id) => format!("writeback {id}"),
        domain::Holder::Store(id) => format!("store {id}"),
    };
    let held = |held: &domain::HeldInfo| proto::HeldToken {
        segment: held.segment.0,
        holder: holder(&held.holder),
        lease_left_ms: saturate(held.lease_left_ms),
        pblk: held.pblk.0,
        blocks: held.blocks,
    };
    let state = match io_end.state {
        domain::IoEndState::Leased => "leased",
        domain::IoEndState::Deferred => "deferred",
    };
    let lane = match io_end.lane {
        domain::Lane::WriteOut => proto::Lane::WriteOut,
        domain::Lane::Direct => proto::Lane::Direct,
    };
    proto::IoEnd {
        id: io_end.id.0,
        volume: io_end.volume.0,
        state: state.to_owned(),
        lane: lane.into(),
        lblk: io_end.lblk.0,
        blocks: io_end.blocks,
        attempt: io_end.attempt,
        age_ms: io_end.age_ms,
        held: io_end.held.iter().map(held).collect(),
        // A traceparent is "00-<trace id>-<span id>-<flags>".
        trace_id: io_end.traceparent.split('-').nth(1).unwrap_or_default().to_owned(),
    }
}
