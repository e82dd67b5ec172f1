//! The conversion machine: volumes, stores, free space, leases, io_ends, conversion.
//!
//! The driver owns the machine in one task. It feeds each event to [`Machine::handle`], calls
//! [`Machine::drain`] once per turn of its loop, appends the records of [`Output`] to the journal,
//! reports what is durable with [`Machine::committed`], and sends effects when they may leave.
//!
//! An effect marked `Now` may overtake one marked `Committed`; where the order matters to a peer
//! (a store hears `Registered` first), the marks see to it. Effects of equal marks keep their order.
//!
//! # Invariants
//! Besides those of [`crate::ledger`], [`crate::free_space`] and [`crate::queue`]:
//! * `grant-after-epoch`: nothing is granted before the epoch's record is durable.
//! * `reuse-after-safe`: a block is allocated only if no bio, no read and no older map that a power
//!   cut could bring back can still touch it.
//! * `release-order`: overlapping io_ends of a volume convert in the order of their last releases.
//! * `change-alone`: a change of the map runs while no io_end in flight overlaps its range.
//! * `deleted-stays-deleted`: after the answer to a deletion, no call that was made before it creates
//!   the volume again, and none that was meant for it touches another one of its name.
//! * `logged-until-converted`: what was logged is in the log until this or newer data of the block is
//!   converted, trimmed or zeroed, and not longer.
//! * `credit-holds`: promised blocks fit into the free space of the usable stores, with all their copies, or
//!   with as many as stores are usable; only a store that goes away can break that.

mod apply;
mod begin;
mod calls;
mod change;
mod check;
mod convert;
mod data_log;
mod holders;
pub mod inspect;
pub mod io;
mod quarantine;
mod recovery;
mod release;
mod roster;
mod state;
mod stores;
mod view;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use endio_types::{ClusterEpoch, IoEndId, Millis, Reason, StoreId, VolumeId};

use crate::extent_map::ChunkTable;
use crate::free_space::{Demand, WrongClass};
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::queue::LaneQueue;
use crate::record::{Record, Seq, Snapshot};
use crate::token::TokenKey;
pub use inspect::*;
pub use io::*;
use roster::{Roster, Writebacks};
use state::{FreedAt, Reads, VolumeRt};

/// Why the machine cannot go on. After one of these it must not be used any more: the process
/// stops and recovers from the journal.
#[derive(Debug, thiserror::Error)]
pub enum MachineError<E> {
    /// The table of chunks failed.
    #[error("the extent map's table failed")]
    Table(E),
    /// A record contradicts the state that it is applied to.
    #[error("record {seq} cannot be applied: {why}")]
    BadRecord {
        /// Its number.
        seq: Seq,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The accounting of blocks contradicts itself.
    #[error(transparent)]
    Space(#[from] WrongClass),
}

/// What most steps of the machine return.
type Step<T> = Result<(), MachineError<<T as ChunkTable>::Error>>;

/// See the module.
#[derive(Debug)]
pub struct Machine<T> {
    table: T,
    limits: Limits,
    /// Volumes, stores and numbers, with every record applied.
    durable: Snapshot,
    /// Records up to this one are on disk.
    committed: Seq,
    key: Option<TokenKey>,
    /// Record of this start's epoch; 0 during recovery.
    epoch_seq: Seq,
    now: Millis,
    /// Before this nothing can expire: neither what runs now nor what is granted meanwhile.
    expires_from: Millis,
    ledger: Ledger,
    lanes: [LaneQueue; 2],
    volumes: BTreeMap<VolumeId, VolumeRt>,
    /// Names of volumes that are not deleted.
    names: BTreeMap<String, VolumeId>,
    /// Deletions that were asked for in this epoch and may have been answered.
    deletions: u64,
    reads: BTreeMap<VolumeId, Reads>,
    /// Volumes of which something freed waits for reads.
    readers_awaited: BTreeSet<VolumeId>,
    stores: Roster,
    /// Before this writebacks hear nothing new of the stores.
    next_news: Millis,
    store_sessions: BTreeMap<StoreSession, StoreId>,
    writebacks: Writebacks,
    writeback_sessions: BTreeMap<WritebackSession, String>,
    /// Volumes with a change that waits or runs.
    changing: BTreeSet<VolumeId>,
    /// Where the next turn of changes begins.
    change_turn: VolumeId,
    /// Deleted volumes that still have blocks.
    purging: BTreeSet<VolumeId>,
    freed: VecDeque<FreedAt>,
    /// Credit that no io_end uses, by number of replicas.
    credit: Demand,
    in_flight_blocks: u64,
    next_io_end: u64,
    next_release: u64,
    next_command: u64,
    stopping: bool,
    metadata_full: bool,
    counters: Counters,
}

impl<T: ChunkTable> Machine<T> {
    /// Takes one event. Never panics on anything that a peer says. `now` must not go back; if it
    /// does, the latest time seen counts.
    ///
    /// # Errors
    /// The machine cannot go on; see [`MachineError`].
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Output) -> Step<T> {
        self.now = self.now.max(now);
        self.expire(out)?;
        match input {
            Input::Call { reply, call } => self.call(reply, call, out)?,
            Input::Writeback { session, message } => self.writeback(session, message, out)?,
            Input::WritebackLost { session } => self.writeback_lost(session),
            Input::Store { session, message } => self.store(session, message, out)?,
            Input::StoreLost { session } => self.store_lost(session),
            Input::MetadataFull(full) => self.metadata_full = full,
            Input::StopIntake => self.stopping = true,
            Input::AbortAll => self.abort_all(out)?,
            Input::Tick => {}
        }
        self.send_fences(out);
        Ok(())
    }

    /// Tells writebacks what is new of the stores, converts what is queued, goes on with map changes and
    /// punches free blocks, in bounded batches. Called once per turn of the driver's loop.
    ///
    /// # Errors
    /// The machine cannot go on; see [`MachineError`].
    pub fn drain(&mut self, now: Millis, out: &mut Output) -> Step<T> {
        self.now = self.now.max(now);
        self.expire(out)?;
        self.tell_stores(out);
        for _ in 0..self.limits.drain_batches_max {
            if !self.convert_batch(out)? {
                break;
            }
        }
        self.step_changes(out)?;
        self.send_fences(out);
        self.send_punches(out);
        Ok(())
    }

    /// Whether [`Self::drain`] has something to do now.
    pub fn has_work(&self) -> bool {
        let queued = self.lanes.iter().any(|lane| !lane.is_empty());
        let changes = self.changing.iter().any(|volume| self.change_can_run(*volume));
        queued || changes || !self.purging.is_empty() || self.stores_want_a_turn()
    }

    /// Records up to `seq` are durable: what they freed may move on. Idempotent.
    ///
    /// # Errors
    /// The machine cannot go on; see [`MachineError`].
    pub fn committed(&mut self, seq: Seq) -> Step<T> {
        self.committed = self.committed.max(seq.min(self.durable.seq));
        self.settle_committed()
    }

    /// When an [`Input::Tick`] (and a `drain`) is due at the latest; `None`: nothing runs.
    pub fn next_deadline(&self) -> Option<Millis> {
        [self.next_expiry(), self.stores.next_punch(), self.later_news()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Makes a record: applies it to memory, accounts for it and hands it to the driver.
    fn commit(
        &mut self,
        record: Record,
        out: &mut Output,
    ) -> Result<apply::Changes, MachineError<T::Error>> {
        let seq = self.durable.seq + 1;
        let promised = apply::promised_by(&record);
        for volume in &promised {
            self.count_credit(*volume, false);
        }
        let changes = apply::apply(&mut self.durable, &mut self.table, seq, &record)?;
        for volume in &promised {
            self.count_credit(*volume, true);
        }
        for (volume, run) in apply::mapped_runs(&record) {
            self.account_mapped(volume, run)?;
        }
        for (volume, change) in &changes {
            self.account_freed(*volume, seq, change)?;
        }
        out.records.push((seq, record));
        Ok(changes)
    }

    /// Effects that rest on the state as it is now.
    fn when_committed(&self) -> Durability {
        Durability::Committed(self.durable.seq)
    }

    fn push(&self, after: Durability, kind: EffectKind, out: &mut Output) {
        out.effects.push(Effect { after, kind });
    }

    fn reply(&self, to: ReplyTo, body: Result<ReplyBody, Refusal>, out: &mut Output) {
        self.push(self.when_committed(), EffectKind::Reply(to, body), out);
    }

    fn refusal(&self, reason: Reason, message: &'static str) -> Refusal {
        let waits = matches!(
            reason,
            Reason::Limit
                | Reason::NotReady
                | Reason::NotEnoughStores
                | Reason::MetadataFull
                | Reason::Draining
        );
        let retry_after_ms = if waits { self.limits.retry_after_ms } else { 0 };
        Refusal { reason, message, retry_after_ms }
    }

    /// The key, once the epoch is durable.
    fn granting_key(&self) -> Option<&TokenKey> {
        let granting = self.epoch_seq > 0 && self.committed >= self.epoch_seq;
        self.key.as_ref().filter(|_| granting)
    }

    /// The lowest io_end that lives, or the next one.
    fn floor(&self) -> IoEndId {
        match self.ledger.first() {
            Some(io_end) => io_end.id,
            None => IoEndId::new(self.durable.epoch, self.next_io_end),
        }
    }

    /// Logical blocks of a volume's promise that no io_end uses.
    fn available_credit(&self, volume: VolumeId) -> u64 {
        let promised = self.durable.volumes.get(&volume).map_or(0, |volume| volume.promised);
        let used = self.volumes.get(&volume).map_or(0, |volume| volume.credit_in_flight);
        promised.saturating_sub(used)
    }

    /// Adds a volume's credit to the sum over all, or takes it out around a change.
    fn count_credit(&mut self, volume: VolumeId, add: bool) {
        let available = self.available_credit(volume);
        let Some(replicas) = self.durable.volumes.get(&volume).map(|volume| volume.replicas) else {
            return;
        };
        let Some(sum) = self.credit.get_mut(replicas as usize) else { return };
        *sum = if add { *sum + available } else { sum.saturating_sub(available) };
    }

    /// Changes how much of a volume's promise io_ends in flight use.
    fn use_credit(&mut self, volume: VolumeId, take: u64, give: u64) {
        self.count_credit(volume, false);
        if let Some(volume) = self.volumes.get_mut(&volume) {
            volume.credit_in_flight = (volume.credit_in_flight + take).saturating_sub(give);
        }
        self.count_credit(volume, true);
    }

    /// Counters since start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The current epoch.
    pub fn epoch(&self) -> ClusterEpoch {
        self.durable.epoch
    }

    /// The last record made or applied.
    pub fn seq(&self) -> Seq {
        self.durable.seq
    }

    /// The small durable state as of [`Self::seq`], for a checkpoint.
    pub fn snapshot(&self) -> Snapshot {
        self.durable.clone()
    }

    /// Whether nothing is in flight: no io_end, no waiting call. For a graceful stop.
    pub fn is_idle(&self) -> bool {
        self.ledger.is_empty() && self.changing.is_empty()
    }

    /// io_ends that wait for conversion, by lane: write-out, direct.
    pub fn queued(&self) -> [usize; 2] {
        [self.lanes[0].len(), self.lanes[1].len()]
    }

    /// io_ends in flight.
    pub fn io_ends_in_flight(&self) -> usize {
        self.ledger.len()
    }

    /// Whether new work is refused because of a stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// The table of chunks, for checkpoints and write-back.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }
}
