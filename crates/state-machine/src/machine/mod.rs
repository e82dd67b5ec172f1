//! The conversion machine: volumes, stores, free space, leases, io_ends, conversion.
//!
//! The driver owns the machine in one task. It feeds each event to [`Machine::handle`], calls
//! [`Machine::drain`] once per turn of its loop, appends the records of [`Output`] to the journal,
//! reports what is durable with [`Machine::committed`], and sends effects when they may leave.

pub mod inspect;
pub mod io;

use endio_types::{ClusterEpoch, LblkRange, Millis, Reason, VolumeId};

use crate::extent_map::{self, ChunkTable};
use crate::limits::Limits;
use crate::record::{Record, Seq, Snapshot};
use crate::token::TokenKey;
pub use inspect::*;
pub use io::*;

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
}

/// See the module.
#[derive(Debug)]
pub struct Machine<T> {
    table: T,
    limits: Limits,
    durable: Snapshot,
    counters: Counters,
}

impl<T: ChunkTable> Machine<T> {
    /// Starts recovery from a snapshot ([`Snapshot::new`] for a new database) and the chunks that
    /// the table holds. Next: [`Self::apply`] for each journal record after `snapshot.seq`, then
    /// [`Self::finish_recovery`].
    pub fn recover(limits: Limits, table: T, snapshot: Snapshot) -> Self {
        Self { table, limits, durable: snapshot, counters: Counters::default() }
    }

    /// Applies a record of the journal during recovery. Records at or before the snapshot's number
    /// change only chunks that are older than they.
    ///
    /// # Errors
    /// The table failed, or the record does not fit: the journal is not this database's.
    pub fn apply(&mut self, seq: Seq, record: &Record) -> Result<(), MachineError<T::Error>> {
        let _ = record;
        self.durable.seq = seq;
        Ok(())
    }

    /// Ends recovery: scans the map once, and begins the next epoch with a fresh random key. All
    /// records applied so far must be durable. The epoch's record is in `out`; everything that
    /// grants is refused with `NOT_READY` until [`Self::committed`] says that it is durable.
    ///
    /// # Errors
    /// The table failed.
    pub fn finish_recovery(
        &mut self,
        key: TokenKey,
        now: Millis,
        out: &mut Output,
    ) -> Result<(), MachineError<T::Error>> {
        let _ = (key, now);
        self.durable.epoch = ClusterEpoch(self.durable.epoch.0 + 1);
        self.durable.seq += 1;
        out.records.push((self.durable.seq, Record::Epoch(self.durable.epoch)));
        Ok(())
    }

    /// Takes one event. Never panics on anything that a peer says.
    ///
    /// # Errors
    /// The machine cannot go on; see [`MachineError`].
    pub fn handle(
        &mut self,
        now: Millis,
        input: Input,
        out: &mut Output,
    ) -> Result<(), MachineError<T::Error>> {
        let _ = now;
        if let Input::Call { reply, .. } = input {
            let refusal = Refusal {
                reason: Reason::NotReady,
                message: "recovering",
                retry_after_ms: self.limits.retry_after_ms,
            };
            let kind = EffectKind::Reply(reply, Err(refusal));
            out.effects.push(Effect { after: Durability::Now, kind });
        }
        Ok(())
    }

    /// Converts what is queued and goes on with map changes, in bounded batches. Called once per
    /// turn of the driver's loop.
    ///
    /// # Errors
    /// The machine cannot go on; see [`MachineError`].
    pub fn drain(&mut self, now: Millis, out: &mut Output) -> Result<(), MachineError<T::Error>> {
        let _ = (now, out);
        Ok(())
    }

    /// Whether [`Self::drain`] has something to do now.
    pub fn has_work(&self) -> bool {
        false
    }

    /// Records up to `seq` are durable: what they freed may move on. Idempotent.
    pub fn committed(&mut self, seq: Seq) {
        let _ = seq;
    }

    /// When a [`Input::Tick`] is due at the latest; `None`: nothing runs.
    pub fn next_deadline(&self) -> Option<Millis> {
        None
    }

    /// The map of a range. The driver shows it once `MapView::seq` is durable.
    ///
    /// # Errors
    /// `Ok(Err(..))` is a refusal to the caller; `Err` means that the table failed.
    pub fn lookup(
        &mut self,
        volume: VolumeId,
        generation: endio_types::Generation,
        range: LblkRange,
    ) -> Result<Result<MapView, Refusal>, MachineError<T::Error>> {
        let _ = generation;
        let extents = extent_map::lookup(&mut self.table, volume, range);
        let extents = extents.map_err(MachineError::Table)?;
        let view = MapView {
            map_version: endio_types::MapVersion(0),
            extents,
            size_bytes: 0,
            grant: None,
            seq: self.durable.seq,
        };
        Ok(Ok(view))
    }

    /// Mapped parts of a volume by name, for display; `None`: no such volume.
    ///
    /// # Errors
    /// The table failed.
    pub fn extents(
        &mut self,
        name: &str,
        range: LblkRange,
    ) -> Result<Option<Vec<extent_map::MapExtent>>, MachineError<T::Error>> {
        let Some(id) = self.volume(name).map(|volume| volume.id) else { return Ok(None) };
        extent_map::lookup(&mut self.table, id, range).map(Some).map_err(MachineError::Table)
    }

    /// A volume by name. Shows what is applied, durable or not.
    pub fn volume(&self, name: &str) -> Option<VolumeInfo> {
        self.volumes().into_iter().find(|volume| volume.name == name)
    }

    /// All volumes by name.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        Vec::new()
    }

    /// All stores by number.
    pub fn stores(&self, now: Millis) -> Vec<StoreInfo> {
        let _ = now;
        Vec::new()
    }

    /// io_ends in flight by number, at most `limit`, and how many there are in all.
    pub fn io_ends(
        &self,
        now: Millis,
        volume: Option<VolumeId>,
        limit: usize,
    ) -> (Vec<IoEndInfo>, u64) {
        let _ = (now, volume, limit);
        (Vec::new(), 0)
    }

    /// Verifies every invariant by a full scan. Slow.
    ///
    /// # Errors
    /// The table failed.
    pub fn check(&mut self) -> Result<CheckReport, MachineError<T::Error>> {
        Ok(CheckReport::default())
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
        true
    }

    /// The table of chunks, for checkpoints and write-back.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }
}
