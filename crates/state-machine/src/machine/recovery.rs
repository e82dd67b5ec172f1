//! Recovery: snapshot, records, one scan of the map, a new epoch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use endio_types::planted::{self, Bug};
use endio_types::{ClusterEpoch, Millis, PblkRange, StoreId, VolumeId};

use super::roster::{Roster, Writebacks};
use super::state::{Reads, StoreRt, VolumeRt, WritebackRt};
use super::{Counters, Machine, MachineError, Output, Step, apply};
use crate::extent_map::{self, ChunkTable};
use crate::free_space::{Demand, RangeSet, StoreSpace};
use crate::lease::Lease;
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::record::{Record, Seq, Snapshot};
use crate::token::TokenKey;

impl<T: ChunkTable> Machine<T> {
    /// Starts recovery from a snapshot ([`Snapshot::new`] for a new database) and the chunks that
    /// the table holds. Next: [`Self::apply`] for each journal record after `snapshot.seq`, then
    /// [`Self::finish_recovery`].
    pub fn recover(limits: Limits, table: T, snapshot: Snapshot) -> Self {
        Self {
            table,
            ledger: Ledger::new(limits.ended_max),
            limits,
            committed: 0,
            durable: snapshot,
            key: None,
            epoch_seq: 0,
            now: Millis(0),
            expires_from: Millis(0),
            lanes: Default::default(),
            volumes: BTreeMap::new(),
            names: BTreeMap::new(),
            deletions: 0,
            reads: BTreeMap::new(),
            readers_awaited: BTreeSet::new(),
            stores: Roster::default(),
            next_news: Millis(0),
            store_sessions: BTreeMap::new(),
            writebacks: Writebacks::default(),
            writeback_sessions: BTreeMap::new(),
            changing: BTreeSet::new(),
            change_turn: VolumeId(0),
            purging: BTreeSet::new(),
            freed: VecDeque::new(),
            credit: Demand::default(),
            in_flight_blocks: 0,
            next_io_end: 1,
            next_release: 1,
            next_command: 1,
            stopping: false,
            metadata_full: false,
            counters: Counters::default(),
        }
    }

    /// Applies a record of the journal during recovery. Records at or before the snapshot's number
    /// change only chunks that are older than they.
    ///
    /// # Errors
    /// The table failed, or the record does not fit: the journal is not this database's.
    pub fn apply(&mut self, seq: Seq, record: &Record) -> Step<T> {
        apply::apply(&mut self.durable, &mut self.table, seq, record).map(|_| ())
    }

    /// Ends recovery: scans the map once, and begins the next epoch with a fresh random key. All
    /// records applied so far must be durable. The epoch's record is in `out`; everything that
    /// grants is refused with `NOT_READY` until [`Self::committed`] says that it is durable.
    ///
    /// # Errors
    /// The table failed, or the map contradicts the volumes and stores.
    pub fn finish_recovery(&mut self, key: TokenKey, now: Millis, out: &mut Output) -> Step<T> {
        self.now = now;
        self.key = Some(key);
        self.committed = self.durable.seq;
        let mut mapped = self.scan()?;
        for (id, store) in &self.durable.stores {
            let mapped = mapped.remove(id).unwrap_or_default();
            let mut rt = StoreRt::new(StoreSpace::recovered(store.capacity_blocks, &mapped));
            rt.wait_epoch = mapped.complement(store.capacity_blocks);
            if planted::is(Bug::EpochIgnored) {
                for range in std::mem::take(&mut rt.wait_epoch) {
                    rt.space.release(range, false)?;
                }
                rt.ready = true;
            }
            self.stores.entry(*id, || rt);
        }
        let ids: Vec<VolumeId> = self.durable.volumes.keys().copied().collect();
        for id in ids {
            self.count_credit(id, true);
        }
        for volume in self.durable.volumes.values() {
            let log_last = self.durable.logs.newest(volume.id);
            let rt = self.volumes.entry(volume.id).or_default();
            rt.log_last = log_last;
            rt.may_be_taken_until = now.plus(self.limits.lease_ms.into());
            if volume.deleted {
                self.purging.insert(volume.id);
            } else {
                self.names.insert(volume.name.clone(), volume.id);
            }
            // An owner that is alive has one lease's time to come back before it can be replaced
            // without force.
            if let Some(owner) = &volume.owner {
                let lease = Some(Lease::grant(now, self.limits.lease_ms));
                let returning = WritebackRt { session: None, lease };
                self.writebacks.change(owner, |rt| *rt = returning);
            }
            self.reads.insert(volume.id, Reads::default());
        }
        let epoch = ClusterEpoch(self.durable.epoch.0 + 1);
        self.commit(Record::Epoch(epoch), out)?;
        self.epoch_seq = self.durable.seq;
        Ok(())
    }

    /// Counts what the map holds, per volume and per store.
    fn scan(&mut self) -> Result<BTreeMap<StoreId, RangeSet>, MachineError<T::Error>> {
        let mut mapped: BTreeMap<StoreId, RangeSet> = BTreeMap::new();
        let mut volumes: BTreeMap<VolumeId, VolumeRt> = BTreeMap::new();
        let mut fault = None;
        let durable = &self.durable;
        extent_map::for_each_extent(&mut self.table, |volume, extent| {
            if !durable.volumes.contains_key(&volume) {
                fault = Some("the map names a volume that does not exist");
            }
            let rt = volumes.entry(volume).or_default();
            for place in extent.places.as_slice() {
                rt.mapped_blocks += extent.range.len;
                let range = PblkRange { start: place.pblk, len: extent.range.len };
                match durable.stores.get(&place.store) {
                    Some(store) if range.end() <= store.capacity_blocks => {}
                    _ => fault = Some("the map names a block that no store has"),
                }
                if !mapped.entry(place.store).or_default().insert(range) {
                    fault = Some("the map names a block twice");
                }
            }
        })
        .map_err(MachineError::Table)?;
        if let Some(why) = fault {
            return Err(MachineError::BadRecord { seq: self.durable.seq, why });
        }
        self.volumes = volumes;
        Ok(mapped)
    }
}
