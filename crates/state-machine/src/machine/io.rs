//! What goes into the machine and what comes out of it.

use bytes::Bytes;
use endio_types::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Lblk, LblkRange, MapVersion, Reason,
    SegmentIndex, StoreId, VolumeId,
};

use super::inspect::{StoreInfo, VolumeInfo};
use crate::data_log::LogEntry;
use crate::record::{Record, Seq};
use crate::token::{ReadGrant, Token, TokenKey};

/// Where the answer to a unary call goes. Chosen by the driver; opaque here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReplyTo(pub u64);

/// A stream to a writeback. Chosen by the driver, never reused; opaque here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WritebackSession(pub u64);

/// A stream to a block-store. Chosen by the driver, never reused; opaque here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreSession(pub u64);

/// What a map change does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapChange {
    /// Frees the blocks.
    Trim,
    /// Fills holes with unwritten blocks.
    Allocate,
    /// What is written becomes unwritten.
    Zero,
}

/// Why data is written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Lane {
    /// Write-out of buffered data; uses credit.
    WriteOut,
    /// A caller waits.
    Direct,
}

impl Lane {
    /// Both lanes.
    pub const ALL: [Self; 2] = [Self::WriteOut, Self::Direct];
}

/// A call that gets exactly one reply, see [`ReplyBody`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// Creates a volume. Idempotent.
    CreateVolume {
        /// 1 to 128 of `[A-Za-z0-9._-]`, starting with a letter or digit.
        name: String,
        /// Bytes.
        size_bytes: u64,
        /// 0 means 1.
        replicas: u32,
        /// See [`crate::record::VolumeState::in_place`].
        in_place: bool,
        /// See [`crate::record::VolumeState::growable`].
        growable: bool,
        /// Not after a deletion of which the caller does not know. `None`: at any time.
        as_of: Option<Deletions>,
    },
    /// Sets the size.
    ResizeVolume {
        /// Name.
        name: String,
        /// Bytes.
        size_bytes: u64,
        /// Not another one that has the name since. `None`: whichever has it.
        volume: Option<VolumeId>,
        /// 0: the volume must not be open.
        generation: Generation,
        /// Of the caller.
        attempt: Attempt,
    },
    /// Deletes a volume.
    DeleteVolume {
        /// Name.
        name: String,
        /// As in `ResizeVolume`.
        volume: Option<VolumeId>,
        /// 0: the volume must not be open.
        generation: Generation,
        /// Of the caller.
        attempt: Attempt,
    },
    /// Opens a volume under a new generation.
    OpenVolume {
        /// Name.
        name: String,
        /// As in `ResizeVolume`.
        volume: Option<VolumeId>,
        /// The writeback instance.
        writeback: String,
        /// Take it from an owner that may be alive.
        force: bool,
        /// Only while this is its generation.
        if_generation: Option<Generation>,
        /// The caller heeds the data log.
        reads_log: bool,
    },
    /// Gives a volume up. Idempotent while nobody opens it again.
    CloseVolume {
        /// Name.
        name: String,
        /// As in `ResizeVolume`.
        volume: Option<VolumeId>,
        /// Of the caller.
        generation: Generation,
    },
    /// Trim, allocate, zero.
    ChangeMap {
        /// The volume.
        volume: VolumeId,
        /// Of the caller.
        generation: Generation,
        /// What to do.
        change: MapChange,
        /// Where; at least one block.
        range: LblkRange,
        /// Of the caller.
        attempt: Attempt,
    },
}

/// Which try of a change a call is: one that arrives after its caller gave it up is told from a new
/// one. The default is never refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attempt {
    /// Counts the tries under the volume's generation, from 1; 0: not counted.
    pub number: u64,
    /// Nobody waits for a try up to this number any more.
    pub over: u64,
    /// What was sent to the data log up to this number is older than the change.
    pub logged: u64,
}

/// How many volumes conversion has been asked to delete, those that there were not included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Deletions {
    /// In which they are counted.
    pub epoch: ClusterEpoch,
    /// Since it began.
    pub count: u64,
}

/// Begins a write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BeginIo {
    /// Comes back in the answer.
    pub request: u64,
    /// The volume.
    pub volume: VolumeId,
    /// Of the caller.
    pub generation: Generation,
    /// Which capacity it uses.
    pub lane: Lane,
    /// First block.
    pub lblk: Lblk,
    /// 0: a zero-length write.
    pub blocks: u32,
    /// Further ranges of the same write, ascending and behind the first, none of them empty. Only
    /// for volumes that are written by redirection.
    pub more: Vec<LblkRange>,
    /// Growable volumes: bytes. 0: does not extend.
    pub size_after_bytes: u64,
    /// Stores not to use if others can do.
    pub avoid_stores: Vec<StoreId>,
    /// 1 for the first try.
    pub attempt: u32,
    /// W3C traceparent; empty: none. Given back with every effect of the io_end.
    pub traceparent: String,
    /// A caller waits.
    pub sync: bool,
    /// What the data log has of the blocks up to this number ends with the conversion.
    pub logged_up_to: u64,
}

/// Data of a small flush, to be kept until it is converted. Only for volumes that are written by
/// redirection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogData {
    /// Comes back in the answer.
    pub request: u64,
    /// The volume.
    pub volume: VolumeId,
    /// Of the caller.
    pub generation: Generation,
    /// Grows with each message of the volume.
    pub number: u64,
    /// The blocks; ascending, at least one.
    pub entries: Vec<LogEntry>,
    /// Their data, one behind the other.
    pub data: Bytes,
}

impl BeginIo {
    /// All ranges, the first one first.
    pub fn ranges(&self) -> Vec<LblkRange> {
        let first = LblkRange { start: self.lblk, len: u64::from(self.blocks) };
        std::iter::once(first).chain(self.more.iter().copied()).collect()
    }

    /// Blocks of all ranges.
    pub fn blocks_total(&self) -> u64 {
        let more = self.more.iter().fold(0_u64, |sum, range| sum.saturating_add(range.len));
        more.saturating_add(u64::from(self.blocks))
    }
}

/// What a writeback says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromWriteback {
    /// First message of a session.
    Hello {
        /// Unique for each start of a writeback process.
        writeback: String,
    },
    /// Begins a write.
    Begin(BeginIo),
    /// The submitter's release.
    Release {
        /// The submitter's token.
        token: Token,
        /// Segments that were never sent.
        not_submitted: Vec<SegmentIndex>,
        /// Give the io_end up.
        abort: bool,
    },
    /// Renews the lease; confirms that reads use (volume, generation, map version) or newer.
    Renew {
        /// Read confirms.
        confirms: Vec<(VolumeId, Generation, MapVersion)>,
    },
    /// Changes the credit.
    Reserve {
        /// Comes back in the answer.
        request: u64,
        /// The volume.
        volume: VolumeId,
        /// Of the caller.
        generation: Generation,
        /// Start from zero.
        reset: bool,
        /// Logical blocks to add.
        add_blocks: u64,
        /// Logical blocks to give back.
        drop_blocks: u64,
    },
    /// Data of a small flush.
    Log(LogData),
}

/// How a segment ended on its store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SegmentOutcome {
    /// The data is durable; CRC-32C of each block (may be empty on in-place volumes).
    Durable(Vec<u32>),
    /// It failed.
    Failed(Reason),
}

/// What a block-store says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromStore {
    /// First message of a session.
    Register {
        /// Identity.
        uuid: [u8; 16],
        /// Of this start.
        incarnation: Incarnation,
        /// Blocks.
        capacity_blocks: u64,
        /// Where writebacks reach it.
        url: String,
        /// The name in its certificate. `None`: there is no TLS, so nobody has one.
        name: Option<String>,
    },
    /// Everything of older epochs has drained.
    Ready {
        /// The epoch it is ready for.
        epoch: ClusterEpoch,
    },
    /// A segment ended.
    Release {
        /// Its token.
        token: Token,
        /// How it ended.
        outcome: SegmentOutcome,
    },
    /// Renews the lease.
    Renew,
    /// A fence has drained.
    FenceDone {
        /// Number of the fence.
        fence: u64,
    },
    /// Ranges are holes on the host.
    PunchDone {
        /// Number of the punch.
        punch: u64,
    },
}

/// Everything that can happen to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A unary call.
    Call {
        /// Where the reply goes.
        reply: ReplyTo,
        /// The call.
        call: Call,
    },
    /// A message of a writeback.
    Writeback {
        /// Its stream.
        session: WritebackSession,
        /// The message.
        message: FromWriteback,
    },
    /// The stream to a writeback ended. Its lease runs on.
    WritebackLost {
        /// The stream.
        session: WritebackSession,
    },
    /// A message of a block-store.
    Store {
        /// Its stream.
        session: StoreSession,
        /// The message.
        message: FromStore,
    },
    /// The stream to a block-store ended. Its lease runs on.
    StoreLost {
        /// The stream.
        session: StoreSession,
    },
    /// The metadata disk is (nearly) full or has room again: new writes are refused meanwhile,
    /// accepted ones still convert.
    MetadataFull(bool),
    /// A graceful stop: new work is refused, what is in flight goes on.
    StopIntake,
    /// A forced stop: every io_end and every waiting call ends with an error, nothing converts.
    AbortAll,
    /// Time has passed; see `Machine::next_deadline`.
    Tick,
}

/// When an effect may leave the process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Durability {
    /// At once: it rests on nothing that could be forgotten.
    Now,
    /// Only when the record of this number, and all before, are durable.
    Committed(Seq),
}

/// A successful answer to a [`Call`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplyBody {
    /// Of create and resize.
    Volume(VolumeInfo),
    /// Of open.
    /// The volume, permission to read, and for how long, in milliseconds, an owner that it was
    /// taken from may still answer reads by itself.
    Opened(VolumeInfo, ReadGrant, u64),
    /// Of close.
    Closed,
    /// Of delete.
    Deleted,
    /// Of a map change.
    Changed {
        /// Version of the map that contains the change.
        map_version: MapVersion,
        /// Blocks that were allocated, freed or zeroed, counted once per replica.
        blocks_changed: u64,
    },
}

/// Why a call was refused; nothing was changed by it unless `message` says otherwise.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Machine-readable.
    pub reason: Reason,
    /// For people.
    pub message: &'static str,
    /// Wait so long before trying again; 0: trying again does not help by itself.
    pub retry_after_ms: u32,
}

/// A segment as granted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrantedSegment {
    /// Its token.
    pub token: Token,
    /// First logical block.
    pub lblk: Lblk,
    /// First block of the write's data that belongs here, counted over its ranges in order.
    pub offset_blocks: u32,
    /// Which copy.
    pub replica: u32,
}

/// What conversion says to a writeback.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToWriteback {
    /// Answer to `Hello`.
    Welcome {
        /// Current epoch.
        epoch: ClusterEpoch,
        /// The holder's lease.
        lease_ms: u32,
    },
    /// `Hello` or the whole session is refused; the driver ends the stream.
    SessionRefused(Refusal),
    /// A write has begun.
    Begun {
        /// Of `Begin`.
        request: u64,
        /// The submitter's token.
        submitter: Token,
        /// Segments in the order of their index, from 1.
        segments: Vec<GrantedSegment>,
        /// Conversion is owed.
        owes_conversion: bool,
    },
    /// `Begin`, `Reserve` or `Log` was refused; nothing is held.
    Refused {
        /// Of the request.
        request: u64,
        /// Why.
        refusal: Refusal,
    },
    /// How an io_end ended; once.
    Completion(Completion),
    /// The lease was renewed.
    Renewed {
        /// The holder's lease.
        lease_ms: u32,
        /// Every io_end below has ended.
        floor: IoEndId,
    },
    /// A newer generation exists.
    VolumeFenced {
        /// The volume.
        volume: VolumeId,
        /// Lowest generation still accepted.
        generation: Generation,
    },
    /// Answer to a submitter's release.
    Released {
        /// The io_end.
        io_end: IoEndId,
        /// `None`: accepted.
        refused: Option<Reason>,
    },
    /// The stores changed.
    Stores(Vec<StoreInfo>),
    /// Answer to `Reserve`.
    Reserved {
        /// Of the request.
        request: u64,
        /// Available now, in logical blocks.
        blocks: u64,
    },
    /// Answer to `Log`: the data is durable.
    Logged {
        /// Of the request.
        request: u64,
    },
}

/// How an io_end ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The io_end.
    pub io_end: IoEndId,
    /// The volume.
    pub volume: VolumeId,
    /// `None`: converted and durable (or nothing to convert).
    pub failed: Option<Reason>,
    /// For people; empty on success.
    pub message: &'static str,
    /// The write can begin again.
    pub retryable: bool,
    /// Version of the map afterwards.
    pub map_version: MapVersion,
    /// Size of the volume afterwards, bytes.
    pub size_bytes: u64,
    /// Ranges that now hold the data, ascending.
    pub converted: Vec<LblkRange>,
    /// Store whose segment failed.
    pub failed_store: Option<StoreId>,
    /// Milliseconds on the machine's clock at the last release; the driver measures from there.
    pub last_release_ms: u64,
    /// As given with `BeginIo`.
    pub traceparent: String,
}

/// What conversion says to a block-store.
#[derive(Clone, Debug)]
pub enum ToStore {
    /// Answer to `Register`.
    Registered {
        /// Its number.
        store: StoreId,
        /// Current epoch.
        epoch: ClusterEpoch,
        /// Of the epoch.
        key: TokenKey,
        /// The holder's lease.
        lease_ms: u32,
        /// Refuse every io_end below.
        floor: IoEndId,
    },
    /// Registration or the whole session is refused; the driver ends the stream.
    SessionRefused(Refusal),
    /// Answer to a segment's release.
    Released {
        /// The io_end.
        io_end: IoEndId,
        /// The segment.
        segment: SegmentIndex,
        /// `None`: accepted.
        refused: Option<Reason>,
    },
    /// The lease was renewed.
    Renewed {
        /// The holder's lease.
        lease_ms: u32,
        /// Refuse every io_end below.
        floor: IoEndId,
    },
    /// Refuse these and drain.
    Fence {
        /// Its number.
        fence: u64,
        /// Aborted io_ends.
        io_ends: Vec<IoEndId>,
        /// Lowest generation still accepted, per volume.
        volumes: Vec<(VolumeId, Generation)>,
    },
    /// Give free blocks back to the host.
    Punch {
        /// Its number.
        punch: u64,
        /// The blocks.
        ranges: Vec<endio_types::PblkRange>,
    },
}

/// One thing that the driver sends.
#[derive(Clone, Debug)]
pub enum EffectKind {
    /// Answer to a call.
    Reply(ReplyTo, Result<ReplyBody, Refusal>),
    /// Message to a writeback.
    Writeback(WritebackSession, ToWriteback),
    /// Message to a block-store.
    Store(StoreSession, ToStore),
    /// A newer stream has taken this one's place: end it.
    EndWriteback(WritebackSession),
    /// A newer stream has taken this one's place: end it.
    EndStore(StoreSession),
    /// An accepted write could not be converted: a human must look.
    ConversionFailed {
        /// The io_end.
        io_end: IoEndId,
        /// The volume.
        volume: VolumeId,
        /// The blocks.
        range: LblkRange,
        /// What went wrong, for people.
        why: String,
    },
}

/// An effect and when it may leave.
#[derive(Clone, Debug)]
pub struct Effect {
    /// When.
    pub after: Durability,
    /// What.
    pub kind: EffectKind,
}

/// A conversion batch, for the driver's spans and metrics.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConvertedBatch {
    /// The record.
    pub seq: Seq,
    /// Traceparents of the io_ends in it, without empty ones.
    pub traceparents: Vec<String>,
    /// io_ends in it.
    pub io_ends: Vec<IoEndId>,
    /// Logical blocks converted.
    pub blocks: u64,
}

/// What the machine wants done. The driver appends `records` to the journal in order, and sends
/// each effect when its durability allows, in order per peer. Reused between calls to save
/// allocations; the driver drains both lists.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Records already applied to memory, in order.
    pub records: Vec<(Seq, Record)>,
    /// Effects in order.
    pub effects: Vec<Effect>,
    /// Conversion batches made.
    pub batches: Vec<ConvertedBatch>,
}
