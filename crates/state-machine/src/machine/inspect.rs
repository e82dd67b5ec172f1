//! What the machine shows: volumes, stores, io_ends in flight, findings of a check.

use endio_types::{
    Generation, Incarnation, IoEndId, Lblk, MapVersion, Pblk, SegmentIndex, StoreId, VolumeId,
};

use super::io::Lane;
use crate::extent_map::MapExtent;
use crate::token::ReadGrant;

/// A volume as others see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeInfo {
    /// Number.
    pub id: VolumeId,
    /// Name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Copies of each block.
    pub replicas: u32,
    /// Overwrites go in place.
    pub in_place: bool,
    /// Writes past the end extend it.
    pub growable: bool,
    /// Current generation.
    pub generation: Generation,
    /// Current version of the map.
    pub map_version: MapVersion,
    /// Blocks in the map, counted once per replica.
    pub mapped_blocks: u64,
    /// Writeback that has it open.
    pub owner: Option<String>,
    /// Logical blocks promised to buffered data and not in use by an io_end.
    pub credit_blocks: u64,
    /// Blocks in the data log.
    pub logged_blocks: u64,
    /// Newest number in the data log; 0: it is empty.
    pub logged_number: u64,
}

/// A store as others see it. The four classes add up to the capacity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreInfo {
    /// Number.
    pub id: StoreId,
    /// Identity.
    pub uuid: [u8; 16],
    /// Address.
    pub url: String,
    /// Highest incarnation registered.
    pub incarnation: Incarnation,
    /// Blocks.
    pub capacity_blocks: u64,
    /// Blocks that can be allocated.
    pub free_blocks: u64,
    /// Blocks in the map.
    pub mapped_blocks: u64,
    /// Blocks of io_ends in flight.
    pub reserved_blocks: u64,
    /// Blocks that are not safe yet.
    pub quarantined_blocks: u64,
    /// Registered under this epoch, and its lease runs.
    pub live: bool,
    /// Milliseconds until its lease ends; 0 when not live.
    pub lease_left_ms: u64,
}

/// Who holds a token.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Holder {
    /// A writeback instance.
    Writeback(String),
    /// A store.
    Store(StoreId),
}

/// A token that is held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldInfo {
    /// 0: the submitter's.
    pub segment: SegmentIndex,
    /// Who holds it.
    pub holder: Holder,
    /// Until the holder's lease ends.
    pub lease_left_ms: u64,
    /// First physical block.
    pub pblk: Pblk,
    /// Length.
    pub blocks: u32,
}

/// Where an io_end is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoEndState {
    /// Tokens are held.
    Leased,
    /// Released, waits for conversion.
    Deferred,
}

/// An io_end in flight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IoEndInfo {
    /// Number.
    pub id: IoEndId,
    /// The volume.
    pub volume: VolumeId,
    /// Where it is.
    pub state: IoEndState,
    /// Its lane.
    pub lane: Lane,
    /// First block.
    pub lblk: Lblk,
    /// Length.
    pub blocks: u32,
    /// From 1.
    pub attempt: u32,
    /// Since it began.
    pub age_ms: u64,
    /// Tokens that are held, by index.
    pub held: Vec<HeldInfo>,
    /// As given with `BeginIo`.
    pub traceparent: String,
}

/// The map of a range at one version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapView {
    /// Version of the whole volume's map.
    pub map_version: MapVersion,
    /// Mapped parts, ascending.
    pub extents: Vec<MapExtent>,
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// Allows reading; present if the generation given is the current one.
    pub grant: Option<ReadGrant>,
    /// The view rests on this record: it may be shown once the record is durable.
    pub seq: u64,
}

/// What a full check found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Sentences that name the violated invariant first. Empty: clean.
    pub findings: Vec<String>,
    /// Volumes.
    pub volumes: u64,
    /// Extents.
    pub extents: u64,
    /// Over all stores.
    pub mapped_blocks: u64,
    /// Over all stores.
    pub reserved_blocks: u64,
    /// Over all stores.
    pub quarantined_blocks: u64,
    /// Over all stores.
    pub free_blocks: u64,
    /// io_ends in flight.
    pub io_ends: u64,
}

/// How much there is of what comes and goes, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Gauges {
    /// io_ends that live.
    pub io_ends: u64,
    /// Released io_ends that wait for their batch, by lane: direct, write-out.
    pub backlog: [u64; 2],
    /// Writebacks whose lease runs.
    pub writebacks: u64,
    /// Aborted io_ends whose blocks wait for a store's acknowledgement, over all stores.
    pub fences: u64,
    /// Volumes.
    pub volumes: u64,
    /// Blocks in the data log.
    pub logged_blocks: u64,
}

/// Counters since start, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// io_ends begun.
    pub begun: u64,
    /// io_ends that completed without a conversion.
    pub completed_inline: u64,
    /// io_ends converted.
    pub converted: u64,
    /// io_ends aborted or failed.
    pub aborted: u64,
    /// Releases with a wrong MAC or of another io_end.
    pub forged: u64,
    /// Releases that contradict the first outcome.
    pub conflicts: u64,
    /// Releases refused for any other reason.
    pub refused_releases: u64,
    /// Repeated releases that were answered again.
    pub repeated: u64,
    /// Conversion records made.
    pub batches: u64,
    /// Logical blocks converted.
    pub converted_blocks: u64,
    /// Wake-ups of the converter: queue went from empty to non-empty.
    pub wakeups: u64,
    /// Blocks that came into the data log.
    pub logged_blocks: u64,
}
