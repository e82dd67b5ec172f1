//! What conversion makes durable: the records of the journal, and the snapshot of a checkpoint.
//!
//! A record is applied to memory by the same function when it is made and when it is replayed.

use std::collections::BTreeMap;

use bytes::Bytes;
use endio_types::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Lblk, LblkRange, MapVersion, Pblk, StoreId,
    VolumeId,
};
use serde::{Deserialize, Serialize};

use crate::data_log::{DataLogs, LogEntry};

/// Number of a record in the journal; counts from 1 without gaps.
pub type Seq = u64;

/// Number that tells one database from another; drawn at random when it is created.
pub type DatabaseId = [u8; 16];

/// The durable properties of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeState {
    /// Number; never reused.
    pub id: VolumeId,
    /// Name; free again once the volume is deleted.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Copies of each block.
    pub replicas: u32,
    /// Overwrites of written blocks go in place.
    pub in_place: bool,
    /// Writes past the end extend it.
    pub growable: bool,
    /// Grows with each open.
    pub generation: Generation,
    /// Grows with each change of the map.
    pub map_version: MapVersion,
    /// Writeback that has it open.
    pub owner: Option<String>,
    /// Logical blocks promised to buffered data, including those that io_ends in flight use.
    pub promised: u64,
    /// The volume is gone for everybody; its blocks are being freed.
    pub deleted: bool,
}

/// The durable properties of a block-store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreState {
    /// Number; never reused.
    pub id: StoreId,
    /// Identity from its superblock.
    pub uuid: [u8; 16],
    /// Highest incarnation that registered.
    pub incarnation: Incarnation,
    /// Capacity in blocks.
    pub capacity_blocks: u64,
    /// Where writebacks reach it.
    pub url: String,
}

/// The small durable state: everything but the extent map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The database.
    pub database: DatabaseId,
    /// The last record contained.
    pub seq: Seq,
    /// Current epoch.
    pub epoch: ClusterEpoch,
    /// Next volume number.
    pub next_volume: VolumeId,
    /// Next store number.
    pub next_store: StoreId,
    /// All volumes.
    pub volumes: BTreeMap<VolumeId, VolumeState>,
    /// All stores ever registered.
    pub stores: BTreeMap<StoreId, StoreState>,
    /// The name in the certificate with which a store was first registered: no other name may speak
    /// for it. Not among the fields of the first format: whoever encodes a snapshot puts it behind them.
    #[serde(skip)]
    pub store_names: BTreeMap<StoreId, String>,
    /// Data of small flushes that is not converted yet. Encoded behind the names.
    #[serde(skip)]
    pub logs: DataLogs,
}

/// How far the numbers of volumes and the generations leap at a restore: more volumes, and more opens
/// of one volume, than there can have been since any backup.
pub const RESTORE_LEAP: u64 = 1 << 20;
/// How far the numbers of stores leap at a restore.
pub const RESTORE_STORES_LEAP: u32 = 1 << 10;

impl Snapshot {
    /// An empty database.
    pub fn new(database: DatabaseId) -> Self {
        Self {
            database,
            seq: 0,
            epoch: ClusterEpoch(0),
            next_volume: VolumeId(1),
            next_store: StoreId(1),
            volumes: BTreeMap::new(),
            stores: BTreeMap::new(),
            store_names: BTreeMap::new(),
            logs: DataLogs::default(),
        }
    }
}

/// A run of blocks and where its copies lie.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// First logical block.
    pub lblk: Lblk,
    /// Length.
    pub blocks: u32,
    /// First physical block of each copy.
    pub places: Vec<(StoreId, Pblk)>,
    /// CRC-32C of each block; empty: none are kept, or the run is unwritten.
    pub crcs: Vec<u32>,
}

impl Run {
    /// The logical blocks.
    pub fn range(&self) -> LblkRange {
        LblkRange { start: self.lblk, len: u64::from(self.blocks) }
    }
}

/// What a batch of conversions does to one volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ConvertVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Runs that become written, in the order of release.
    pub runs: Vec<Run>,
    /// The volume is at least so large afterwards, bytes. 0: does not extend.
    pub size_after_bytes: u64,
    /// Promised blocks that were used up.
    pub credit_used: u64,
    /// The io_ends converted, in the order of release.
    pub io_ends: Vec<IoEndId>,
}

/// What the data log holds of a range up to a number is converted: it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogDone {
    /// The volume.
    pub volume: VolumeId,
    /// The blocks.
    pub range: LblkRange,
    /// Newer entries stay.
    pub up_to: u64,
}

/// One durable change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Record {
    /// Conversion has started: nothing is granted before this is durable.
    Epoch(ClusterEpoch),
    /// A volume exists.
    CreateVolume(VolumeState),
    /// A writeback opened the volume under this generation.
    OpenVolume {
        /// The volume.
        volume: VolumeId,
        /// Its new generation.
        generation: Generation,
        /// The writeback instance.
        owner: String,
    },
    /// The owner gave the volume up.
    CloseVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// The size was set.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Bytes.
        size_bytes: u64,
    },
    /// The volume is gone for everybody; its blocks are freed by `Unmap` records that follow.
    DeleteVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// Nothing is left of a deleted volume.
    ForgetVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// The promise to buffered data was set.
    Reserve {
        /// The volume.
        volume: VolumeId,
        /// Logical blocks promised, including those that io_ends in flight use.
        promised: u64,
    },
    /// A store is known in this incarnation.
    Store(StoreState),
    /// io_ends were converted.
    Convert(Vec<ConvertVolume>),
    /// A range became a hole.
    Unmap {
        /// The volume.
        volume: VolumeId,
        /// The blocks.
        range: LblkRange,
    },
    /// Runs were mapped to unwritten blocks.
    Allocate {
        /// The volume.
        volume: VolumeId,
        /// The runs; without checksums.
        runs: Vec<Run>,
    },
    /// What was written in a range became unwritten, on the blocks it has.
    Zero {
        /// The volume.
        volume: VolumeId,
        /// The blocks.
        range: LblkRange,
    },
    /// Everything up to here comes from a backup. What was given out after it was taken must never
    /// be given out again, so every number makes a leap; nobody has a volume open.
    Restored {
        /// The epoch from here on: higher than any that a store has seen.
        epoch: ClusterEpoch,
    },
    /// Only a certificate with this name may register the store from here on.
    StoreNamed {
        /// The store.
        store: StoreId,
        /// The name.
        name: String,
    },
    /// Data of a small flush: durable here until it is converted.
    Log {
        /// The volume.
        volume: VolumeId,
        /// Under which it was written.
        generation: Generation,
        /// Grows with each message of the volume.
        number: u64,
        /// The blocks; ascending.
        entries: Vec<LogEntry>,
        /// Their data, one behind the other.
        data: Bytes,
    },
    /// As `Convert`; some of it was in the data log, and is no more.
    ConvertLogged {
        /// What is converted.
        volumes: Vec<ConvertVolume>,
        /// What ends with it, in the order of release.
        done: Vec<LogDone>,
    },
    /// The data log holds nothing of a range any more: it became a hole, or zeroes.
    ForgetLogged {
        /// The volume.
        volume: VolumeId,
        /// The blocks.
        range: LblkRange,
    },
}
