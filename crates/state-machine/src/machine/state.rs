//! The volatile parts of the machine's state. All of it may be forgotten.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use endio_types::{
    Generation, IO_END_BLOCKS_MAX, IoEndId, LblkRange, MapVersion, Millis, PblkRange, StoreId,
    VolumeId,
};

use super::io::{MapChange, ReplyTo, StoreSession, WritebackSession};
use crate::free_space::StoreSpace;
use crate::lease::Lease;
use crate::record::Seq;

/// What a waiting change does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// Trim, allocate or zero.
    Map(MapChange),
    /// Free what lies beyond the new end, then set the size.
    Shrink(u64),
    /// Delete the volume.
    Delete,
}

/// A change of the map that waits for io_ends or is under way.
#[derive(Clone, Debug)]
pub(super) struct PendingChange {
    pub(super) work: Work,
    pub(super) range: LblkRange,
    pub(super) reply: ReplyTo,
    /// First block not handled yet.
    pub(super) cursor: u64,
    pub(super) blocks_changed: u64,
    /// Number of the caller's try; 0: not counted.
    pub(super) attempt: u64,
}

/// The ranges of io_ends, to be asked who overlaps whom without looking at all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlight {
    ranges: BTreeMap<IoEndId, Vec<LblkRange>>,
    /// By first block, then io_end; with the length, which is at most [`IO_END_BLOCKS_MAX`].
    starts: BTreeMap<(u64, IoEndId), u64>,
}

impl InFlight {
    /// Enters an io_end. Its ranges do not overlap each other.
    pub(super) fn insert(&mut self, id: IoEndId, ranges: Vec<LblkRange>) {
        for range in ranges.iter().filter(|range| range.len > 0) {
            self.starts.insert((range.start.0, id), range.len);
        }
        self.ranges.insert(id, ranges);
    }

    /// Takes an io_end out. Idempotent.
    pub(super) fn remove(&mut self, id: IoEndId) {
        for range in self.ranges.remove(&id).unwrap_or_default() {
            self.starts.remove(&(range.start.0, id));
        }
    }

    /// The io_ends that touch a range; one that touches it twice comes twice.
    pub(super) fn overlapping(&self, range: LblkRange) -> impl Iterator<Item = IoEndId> {
        // No longer range exists, so none that begins earlier reaches here.
        let from = range.start.0.saturating_sub(u64::from(IO_END_BLOCKS_MAX));
        let near = self.starts.range((from, IoEndId(0))..(range.end(), IoEndId(0)));
        near.filter(move |((start, _), len)| {
            range.len > 0 && start.saturating_add(**len) > range.start.0
        })
        .map(|((_, id), _)| *id)
    }

    /// Whether any io_end touches a range.
    pub(super) fn overlaps(&self, range: LblkRange) -> bool {
        self.overlapping(range).next().is_some()
    }
}

/// Volatile state of a volume.
#[derive(Clone, Debug, Default)]
pub(super) struct VolumeRt {
    /// Ranges that something in flight may touch: io_ends, and aborted io_ends that wrote in
    /// place until their fence is done.
    pub(super) in_flight: InFlight,
    /// io_ends in flight by lane.
    pub(super) by_lane: [usize; 2],
    /// In order; only the first makes progress.
    pub(super) changes: VecDeque<PendingChange>,
    /// Promised blocks that io_ends in flight use.
    pub(super) credit_in_flight: u64,
    /// Blocks in the map, once per replica.
    pub(super) mapped_blocks: u64,
    /// Until then an owner that the volume was taken from may answer reads by itself. Forgotten
    /// with the epoch: whoever was told to wait does so all the same.
    pub(super) read_elsewhere_until: Millis,
    /// A lease after recovery: until then an owner may answer reads that an earlier epoch took the volume
    /// from, and which nothing durable names.
    pub(super) may_be_taken_until: Millis,
    /// Tries of changes under this generation up to this number are refused. Forgotten with the
    /// epoch, as is every connection on which one could arrive.
    pub(super) attempts_over: u64,
    /// What comes for the data log under this generation up to this number is older than a change
    /// of the map or a conversion, and refused. Forgotten with the epoch, as is the stream on which
    /// it comes.
    pub(super) log_over: u64,
    /// Newest number that the data log took of the volume under this generation, or has of it.
    pub(super) log_last: u64,
}

/// Who may still read blocks that the map no longer names. Outlives its volume.
#[derive(Clone, Debug, Default)]
pub(super) struct Reads {
    /// Lowest generation still accepted, once an older one was superseded in this epoch.
    pub(super) min_generation: Option<Generation>,
    /// Reads of the current generation use this map version or newer.
    pub(super) confirmed: MapVersion,
    /// Lowest generation each store accepts, as it acknowledged.
    pub(super) acked: BTreeMap<StoreId, Generation>,
    /// Freed durably, and the map version without them; ascending.
    pub(super) freed: BTreeMap<StoreId, VecDeque<(MapVersion, PblkRange)>>,
}

/// A fence that was sent.
#[derive(Clone, Debug)]
pub(super) struct FenceOut {
    pub(super) id: u64,
    pub(super) io_ends: Vec<IoEndId>,
    pub(super) volumes: Vec<(VolumeId, Generation)>,
}

/// Volatile state of a store.
#[derive(Clone, Debug)]
pub(super) struct StoreRt {
    pub(super) space: StoreSpace,
    pub(super) session: Option<StoreSession>,
    pub(super) lease: Option<Lease>,
    /// Number of the record that made its registration durable.
    pub(super) registered: Seq,
    /// It has drained everything of older epochs.
    pub(super) ready: bool,
    /// Quarantined until `ready`.
    pub(super) wait_epoch: Vec<PblkRange>,
    /// Quarantined until the io_end is fenced.
    pub(super) wait_fence: BTreeMap<IoEndId, Vec<PblkRange>>,
    /// To be named in the next fence.
    pub(super) fence_io_ends: BTreeSet<IoEndId>,
    /// To be named in the next fence.
    pub(super) fence_volumes: BTreeMap<VolumeId, Generation>,
    pub(super) fence: Option<FenceOut>,
    pub(super) punch: Option<(u64, Vec<PblkRange>)>,
    /// No punch before: each costs the host file system work.
    pub(super) next_punch: Millis,
    /// When it released a segment last.
    pub(super) written_at: Option<Millis>,
    /// Something of it has changed that writebacks are to hear.
    pub(super) untold: bool,
}

impl StoreRt {
    pub(super) fn new(space: StoreSpace) -> Self {
        Self {
            space,
            session: None,
            lease: None,
            registered: 0,
            ready: false,
            wait_epoch: Vec::new(),
            wait_fence: BTreeMap::new(),
            fence_io_ends: BTreeSet::new(),
            fence_volumes: BTreeMap::new(),
            fence: None,
            punch: None,
            next_punch: Millis(0),
            written_at: None,
            untold: false,
        }
    }
    /// There is something to fence, and nothing in its way.
    pub(super) fn wants_fence(&self) -> bool {
        let can_be_sent = self.session.is_some() && self.lease.is_some() && self.fence.is_none();
        can_be_sent && !(self.fence_io_ends.is_empty() && self.fence_volumes.is_empty())
    }
    /// Blocks being punched cannot be allocated, so a store that is short of space is left alone.
    pub(super) fn can_punch(&self) -> bool {
        self.is_usable()
            && self.punch.is_none()
            && self.space.unpunched() > 0
            && self.space.free() > self.space.capacity() / 8
    }
    /// New tokens may name it.
    pub(super) fn is_usable(&self) -> bool {
        self.session.is_some() && self.lease.is_some() && self.ready
    }
}

/// Volatile state of a writeback instance.
#[derive(Clone, Debug, Default)]
pub(super) struct WritebackRt {
    pub(super) session: Option<WritebackSession>,
    /// `None`: it has ended.
    pub(super) lease: Option<Lease>,
}

/// Blocks freed by a record that is not durable yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreedAt {
    pub(super) seq: Seq,
    pub(super) volume: VolumeId,
    pub(super) version: MapVersion,
    pub(super) store: StoreId,
    pub(super) range: PblkRange,
}
