//! Restoring the metadata from a backup, offline.
//!
//! A backup is an older state. Whatever happened since is not in it, so three things are settled here
//! before anybody may work with it:
//! * *numbers leap*: the epoch, generations, numbers of volumes and of stores go on above anything that
//!   was given out after the backup, so nothing old can pass for new;
//! * *blocks* that the old map names may have been given to others since. Their checksums tell, and
//!   reads of them fail with `CHECKSUM_MISMATCH`. Volumes without checksums (in place) cannot tell, so
//!   they are refused unless the operator decides;
//! * *the map* is checked as `endio check` does before the directory gets its name.

use std::io::Read;
use std::path::Path;

use endio_state_machine::machine::{Machine, MachineError, Output};
use endio_state_machine::record::{Record, Snapshot};
use endio_state_machine::token::TokenKey;
use endio_store::meta::{
    BackupError, BackupHead, DiskMeta, MetaError, MetaOptions, MetaStore, Recovered, Restoring,
};
use endio_types::{ClusterEpoch, IoEndId, Millis};

use crate::driver::{DriverError, database};
use crate::snapshot;

/// How far the epoch leaps unless told otherwise: more starts of conversion than there can have been
/// since any backup. An epoch has 24 bits in the number of an io_end, so there is room for 255 restores.
pub const EPOCH_LEAP: u64 = 1 << 16;
/// Epochs left for starts after a restore, at least.
const EPOCHS_LEFT_MIN: u64 = 1 << 16;

/// What to do with volumes whose blocks have no checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum InPlace {
    /// Refuse the backup if there are any.
    #[default]
    Refuse,
    /// Delete them.
    Drop,
    /// Keep them: the caller knows that no block was written, freed or given to others since.
    Keep,
}

/// How to restore.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// The next start's epoch is at least this. The epoch leaps by [`EPOCH_LEAP`] anyway.
    pub epoch_at_least: u64,
    /// Volumes without checksums.
    pub in_place: InPlace,
}

/// What was restored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restored {
    /// What the backup says of itself.
    pub head: BackupHead,
    /// Epoch of the backup.
    pub epoch_before: u64,
    /// Epoch that the next start goes on from.
    pub epoch: u64,
    /// Volumes, those that were dropped left out.
    pub volumes: Vec<String>,
    /// In-place volumes that were dropped.
    pub dropped: Vec<String>,
    /// Extents in the map.
    pub extents: u64,
    /// Blocks in the map, once per replica.
    pub mapped_blocks: u64,
}

/// Why nothing was restored. The directory is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The backup or the directory cannot be used.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The metadata in the backup cannot be read.
    #[error("the metadata in the backup cannot be used")]
    Driver(#[from] DriverError),
    /// The disk fails.
    #[error("the restored metadata cannot be written")]
    Meta(#[from] MetaError),
    /// Volumes without checksums.
    #[error(
        "the backup has in-place volumes ({}): they have no checksums, so blocks that were given to \
         others since the backup would be read as theirs. Drop them, or keep them if nothing was \
         written since", .0.join(", ")
    )]
    InPlace(Vec<String>),
    /// There are no epochs left.
    #[error("epoch {0} is too high: epochs end at {max}", max = IoEndId(u64::MAX).epoch())]
    Epoch(u64),
    /// The metadata contradicts itself.
    #[error("the restored metadata breaks an invariant: {0}")]
    Broken(String),
}

/// Restores a backup into `dir`, which must be empty or absent, and is as it was after an error.
/// Blocks.
///
/// # Errors
/// See [`RestoreError`].
pub fn restore(
    input: impl Read,
    dir: &Path,
    options: &RestoreOptions,
) -> Result<Restored, RestoreError> {
    let meta = MetaOptions { ballast_bytes: 0, ..MetaOptions::default() };
    let restoring = Restoring::begin(input, dir, &meta)?;
    let restored = settle(&restoring, meta, options)?;
    restoring.finish()?;
    Ok(restored)
}

/// The machine of a directory, with all its records, before any new epoch.
pub(crate) type Opened = (Machine<Box<dyn endio_store::meta::MetaTable>>, Rest);

/// What is left of [`Recovered`] when the machine has its parts.
pub(crate) struct Rest {
    journal: endio_store::meta::Journal,
    next_seq: u64,
    volumes: Vec<(endio_types::VolumeId, String, bool)>,
    epoch: u64,
}

fn recover(store: &DiskMeta) -> Result<Opened, RestoreError> {
    let Recovered { database_id, table, snapshot, records, journal, next_seq, .. } =
        store.open()?;
    let decode = |seq| move |source| DriverError::Decode { seq, source };
    let snapshot = match snapshot {
        Some((seq, bytes)) => snapshot::decode(&bytes).map_err(decode(seq))?,
        None => Snapshot::new(database(database_id)),
    };
    let mut machine = Machine::recover(<_>::default(), table, snapshot);
    for record in records {
        let record = record?;
        let decoded: Record = postcard::from_bytes(&record.payload).map_err(decode(record.seq))?;
        machine.apply(record.seq, &decoded).map_err(DriverError::Machine)?;
    }
    let state = machine.snapshot();
    let alive = state.volumes.values().filter(|volume| !volume.deleted);
    let volumes = alive.map(|volume| (volume.id, volume.name.clone(), volume.in_place)).collect();
    Ok((machine, Rest { journal, next_seq, volumes, epoch: state.epoch.0 }))
}

fn settle(
    restoring: &Restoring,
    meta: MetaOptions,
    options: &RestoreOptions,
) -> Result<Restored, RestoreError> {
    let store = DiskMeta::new(restoring.path(), meta);
    let (mut machine, mut rest) = recover(&store)?;
    let in_place: Vec<_> = rest.volumes.iter().filter(|(.., in_place)| *in_place).collect();
    let names: Vec<String> = in_place.iter().map(|(_, name, _)| name.clone()).collect();
    if options.in_place == InPlace::Refuse && !names.is_empty() {
        return Err(RestoreError::InPlace(names));
    }
    let epoch = (rest.epoch + EPOCH_LEAP).max(options.epoch_at_least.saturating_sub(1));
    if epoch > IoEndId(u64::MAX).epoch().0 - EPOCHS_LEFT_MIN {
        return Err(RestoreError::Epoch(epoch));
    }
    let mut records = vec![Record::Restored { epoch: ClusterEpoch(epoch) }];
    let is_dropping = options.in_place == InPlace::Drop;
    if is_dropping {
        let drop = |(volume, ..): &&(_, _, _)| Record::DeleteVolume { volume: *volume };
        records.extend(in_place.iter().map(drop));
    }
    for (seq, record) in (rest.next_seq..).zip(&records) {
        let payload = postcard::to_stdvec(record).map_err(DriverError::Encode)?;
        rest.journal.append(seq, epoch, &payload)?;
        machine.apply(seq, record).map_err(DriverError::Machine)?;
    }
    let durable = rest.journal.commit()?;
    let report = check(&mut machine)?;
    // Without a clean close the first start rebuilds the table; this one proves it once more.
    machine.table_mut().close(durable)?;
    let dropped = if is_dropping { names } else { Vec::new() };
    let alive = rest.volumes.into_iter().map(|(_, name, _)| name);
    Ok(Restored {
        head: restoring.head,
        epoch_before: rest.epoch,
        epoch,
        volumes: alive.filter(|name| !dropped.contains(name)).collect(),
        dropped,
        extents: report.0,
        mapped_blocks: report.1,
    })
}

/// Checks the map as a running service does; returns extents and mapped blocks.
fn check(
    machine: &mut Machine<Box<dyn endio_store::meta::MetaTable>>,
) -> Result<(u64, u64), RestoreError> {
    let broken = |error: MachineError<MetaError>| DriverError::Machine(error);
    // The epoch's record that this makes is thrown away: the first real start makes its own.
    let mut out = Output::default();
    machine.finish_recovery(TokenKey::new(rand::random()), Millis(0), &mut out).map_err(broken)?;
    let report = machine.check().map_err(broken)?;
    match report.findings.into_iter().next() {
        Some(finding) => Err(RestoreError::Broken(finding)),
        None => Ok((report.extents, report.mapped_blocks)),
    }
}
