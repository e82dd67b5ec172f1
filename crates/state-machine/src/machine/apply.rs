//! Applying records: the same function for a record that was just made and for one replayed.

use endio_types::{Generation, LblkRange, MapVersion, StoreId, VolumeId};

use super::MachineError;
use crate::chunk::{Change, OpSeq, Place, Places};
use crate::extent_map::{self, ChunkTable, MapError};
use crate::record::{ConvertVolume, RESTORE_LEAP, RESTORE_STORES_LEAP, Record, Run, Seq, Snapshot};

/// What a record changed in the map, by volume.
pub(super) type Changes = Vec<(VolumeId, Change)>;

/// Applies `record` to the small state and the map, and returns what changed in the map. The
/// small state already contains records up to `durable.seq`; those change only chunks.
pub(super) fn apply<T: ChunkTable>(
    durable: &mut Snapshot,
    table: &mut T,
    seq: Seq,
    record: &Record,
) -> Result<Changes, MachineError<T::Error>> {
    if seq > durable.seq + 1 {
        return Err(MachineError::BadRecord { seq, why: "records are missing before it" });
    }
    let changes = apply_map(table, seq, record)?;
    if seq == durable.seq + 1 {
        durable.seq = seq;
        apply_small(durable, record).map_err(|why| MachineError::BadRecord { seq, why })?;
    }
    Ok(changes)
}

fn apply_map<T: ChunkTable>(
    table: &mut T,
    seq: Seq,
    record: &Record,
) -> Result<Changes, MachineError<T::Error>> {
    let mut changes = Vec::new();
    match record {
        Record::Convert(volumes) | Record::ConvertLogged { volumes, .. } => {
            let mut op = 0;
            for item in volumes {
                let mut total = Change::default();
                for run in &item.runs {
                    total.absorb(map_run(table, OpSeq::new(seq, op), item.volume, run, true)?);
                    op += 1;
                }
                changes.push((item.volume, total));
            }
        }
        Record::Allocate { volume, runs } => {
            let mut total = Change::default();
            for (op, run) in (0..).zip(runs) {
                total.absorb(map_run(table, OpSeq::new(seq, op), *volume, run, false)?);
            }
            changes.push((*volume, total));
        }
        Record::Unmap { volume, range } => {
            let change = extent_map::unmap(table, OpSeq::new(seq, 0), *volume, *range);
            changes.push((*volume, change.map_err(MachineError::Table)?));
        }
        Record::Zero { volume, range } => {
            let change = extent_map::zero(table, OpSeq::new(seq, 0), *volume, *range);
            changes.push((*volume, change.map_err(MachineError::Table)?));
        }
        Record::Epoch(_)
        | Record::CreateVolume(_)
        | Record::OpenVolume { .. }
        | Record::CloseVolume { .. }
        | Record::Resize { .. }
        | Record::DeleteVolume { .. }
        | Record::ForgetVolume { .. }
        | Record::Reserve { .. }
        | Record::Store(_)
        | Record::StoreNamed { .. }
        | Record::Log { .. }
        | Record::ForgetLogged { .. }
        | Record::Restored { .. } => {}
    }
    Ok(changes)
}

fn map_run<T: ChunkTable>(
    table: &mut T,
    op: OpSeq,
    volume: VolumeId,
    run: &Run,
    written: bool,
) -> Result<Change, MachineError<T::Error>> {
    let bad = |why| MachineError::BadRecord { seq: op.record, why };
    let copies: Vec<Place> =
        run.places.iter().map(|(store, pblk)| Place { store: *store, pblk: *pblk }).collect();
    let places = Places::new(&copies).ok_or_else(|| bad("a run has no or too many copies"))?;
    let changed = match written {
        true => extent_map::write(table, op, volume, run.range(), places, &run.crcs),
        false => extent_map::write_unwritten(table, op, volume, run.range(), places),
    };
    changed.map_err(|error| match error {
        MapError::Table(error) => MachineError::Table(error),
        MapError::Malformed(why) => bad(why),
    })
}

/// The part of a record that concerns the small state.
fn apply_small(durable: &mut Snapshot, record: &Record) -> Result<(), &'static str> {
    const UNKNOWN: &str = "it names a volume that does not exist";
    let volumes = &mut durable.volumes;
    match record {
        Record::Epoch(epoch) => {
            if *epoch <= durable.epoch {
                return Err("the epoch does not grow");
            }
            durable.epoch = *epoch;
        }
        Record::CreateVolume(volume) => {
            if volumes.insert(volume.id, volume.clone()).is_some() {
                return Err("the volume exists already");
            }
            durable.next_volume = VolumeId(durable.next_volume.0.max(volume.id.0 + 1));
        }
        Record::OpenVolume { volume, generation, owner } => {
            let volume = volumes.get_mut(volume).ok_or(UNKNOWN)?;
            if *generation <= volume.generation {
                return Err("the generation does not grow");
            }
            volume.generation = *generation;
            volume.owner = Some(owner.clone());
        }
        Record::CloseVolume { volume } => {
            let volume = volumes.get_mut(volume).ok_or(UNKNOWN)?;
            volume.owner = None;
            // Who opens it next writes out what is in the log.
            volume.promised = volume.promised.min(durable.logs.blocks_of(volume.id));
        }
        Record::Resize { volume, size_bytes } => {
            volumes.get_mut(volume).ok_or(UNKNOWN)?.size_bytes = *size_bytes;
            durable.logs.cut(*volume, *size_bytes);
        }
        Record::DeleteVolume { volume } => {
            let volume = volumes.get_mut(volume).ok_or(UNKNOWN)?;
            durable.logs.forget(volume.id, WHOLE, u64::MAX);
            volume.deleted = true;
            volume.owner = None;
            volume.promised = 0;
        }
        Record::ForgetVolume { volume } => {
            volumes.remove(volume).ok_or(UNKNOWN)?;
        }
        Record::Reserve { volume, promised } => {
            volumes.get_mut(volume).ok_or(UNKNOWN)?.promised = *promised;
        }
        Record::Store(store) => {
            durable.stores.insert(store.id, store.clone());
            durable.next_store = StoreId(durable.next_store.0.max(store.id.0 + 1));
        }
        Record::StoreNamed { store, name } => {
            if !durable.stores.contains_key(store) {
                return Err("it names a store that does not exist");
            }
            durable.store_names.insert(*store, name.clone());
        }
        Record::Convert(items) | Record::ConvertLogged { volumes: items, .. } => {
            for item in items {
                let volume = volumes.get_mut(&item.volume).ok_or(UNKNOWN)?;
                volume.map_version = MapVersion(volume.map_version.0 + 1);
                volume.size_bytes = volume.size_bytes.max(item.size_after_bytes);
                volume.promised = volume.promised.saturating_sub(item.credit_used);
            }
            if let Record::ConvertLogged { done, .. } = record {
                for done in done {
                    durable.logs.forget(done.volume, done.range, done.up_to);
                }
            }
        }
        Record::Log { volume, generation, number, entries, data } => {
            let volume = volumes.get(volume).filter(|volume| !volume.deleted).ok_or(UNKNOWN)?;
            durable.logs.put(volume.id, (*generation, *number), entries, data)?;
        }
        Record::ForgetLogged { volume, range } => durable.logs.forget(*volume, *range, u64::MAX),
        Record::Restored { epoch } => {
            if *epoch <= durable.epoch {
                return Err("the epoch does not grow");
            }
            durable.epoch = *epoch;
            durable.next_volume = VolumeId(durable.next_volume.0 + RESTORE_LEAP);
            durable.next_store = StoreId(durable.next_store.0.saturating_add(RESTORE_STORES_LEAP));
            for volume in volumes.values_mut() {
                volume.generation = Generation(volume.generation.0 + RESTORE_LEAP);
                volume.owner = None;
                volume.promised = volume.promised.min(durable.logs.blocks_of(volume.id));
            }
        }
        Record::Unmap { volume, .. }
        | Record::Allocate { volume, .. }
        | Record::Zero { volume, .. } => {
            let volume = volumes.get_mut(volume).ok_or(UNKNOWN)?;
            volume.map_version = MapVersion(volume.map_version.0 + 1);
        }
    }
    Ok(())
}

/// The volumes whose promise a record changes.
pub(super) fn promised_by(record: &Record) -> Vec<VolumeId> {
    match record {
        Record::CloseVolume { volume }
        | Record::DeleteVolume { volume }
        | Record::ForgetVolume { volume }
        | Record::Reserve { volume, .. } => vec![*volume],
        Record::Convert(items) | Record::ConvertLogged { volumes: items, .. } => {
            items.iter().map(|item: &ConvertVolume| item.volume).collect()
        }
        _ => Vec::new(),
    }
}

/// The volume whose map a record changes, with the ranges that it maps, for the accounting.
pub(super) fn mapped_runs(record: &Record) -> Vec<(VolumeId, &Run)> {
    match record {
        Record::Convert(items) | Record::ConvertLogged { volumes: items, .. } => {
            items.iter().flat_map(|item| item.runs.iter().map(|run| (item.volume, run))).collect()
        }
        Record::Allocate { volume, runs } => runs.iter().map(|run| (*volume, run)).collect(),
        _ => Vec::new(),
    }
}

/// Everything of a volume.
pub(super) const WHOLE: LblkRange = LblkRange { start: endio_types::Lblk(0), len: u64::MAX };
