//! The volumes that are open here, and what the session with conversion says about them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use endio_api::conversion::{Reserve, Store};
use endio_state_machine::writeback::confirms::Confirm;
use endio_types::{Generation, Reason, VolumeId};
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::failure::Failure;
use crate::session::Events;
use crate::stores::Stores;
use crate::volume::Volume;

/// Volumes that are not open here, and of which somebody has yet to hear that acknowledged writes are lost.
/// What is beyond is logged and told to nobody.
const LOSSES_MAX: usize = 65_536;

/// Open volumes by name.
pub(crate) struct Table {
    volumes: Mutex<BTreeMap<Arc<str>, Arc<Volume>>>,
    losses: Mutex<BTreeSet<u64>>,
    stores: Arc<Stores>,
}

impl Table {
    /// Nothing open.
    pub(crate) fn new(stores: Arc<Stores>) -> Self {
        Self { volumes: Mutex::default(), losses: Mutex::default(), stores }
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Arc<Volume>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume of that name, if it is open here and usable.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Volume>> {
        self.volumes().get(name).filter(|volume| volume.usable().is_ok()).cloned()
    }

    /// All volumes by name.
    pub(crate) fn all(&self) -> Vec<Arc<Volume>> {
        self.volumes().values().cloned().collect()
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.volumes().len()
    }

    /// A volume is open from now on.
    pub(crate) fn insert(&self, volume: Arc<Volume>) {
        self.volumes().insert(Arc::clone(&volume.name), volume);
    }

    /// A volume is not served here any more. If acknowledged writes go with it, who asks for it here next
    /// is told; of a volume that is deleted nobody wants to hear.
    pub(crate) fn end(&self, volume: &Volume, why: Failure) {
        let is_deleted = why.reason == Reason::UnknownVolume;
        let owe = || {
            if !is_deleted {
                self.remember_loss(volume.id);
            }
        };
        let is_owed = volume.let_go(why, owe);
        self.remove(volume);
        if is_owed && !is_deleted {
            self.pass_loss_on(volume.id);
        }
    }

    /// Acknowledged writes of a volume are lost, and nobody was told.
    pub(crate) fn owe_loss(&self, volume: u64) {
        self.remember_loss(volume);
        self.pass_loss_on(volume);
    }

    /// Under the lock of a volume's state, perhaps: takes none of those.
    fn remember_loss(&self, volume: u64) {
        let mut losses = self.losses();
        if losses.len() >= LOSSES_MAX && !losses.contains(&volume) {
            tracing::error!(
                volume,
                "acknowledged writes are lost, and too many such are remembered"
            );
            return;
        }
        losses.insert(volume);
    }

    /// Tells of a loss where the volume is open here anew, since before its end was noticed.
    fn pass_loss_on(&self, volume: u64) {
        let open = self.all().into_iter().find(|open| open.id == volume && open.usable().is_ok());
        if let Some(open) = open {
            self.tell_loss(&open);
        }
    }

    /// Whether somebody has yet to hear of a loss of acknowledged writes.
    pub(crate) fn owes_loss(&self, volume: u64) -> bool {
        self.losses().contains(&volume)
    }

    /// Who asks for the volume, which is or will be open here, is told of what is owed.
    pub(crate) fn tell_loss(&self, volume: &Volume) {
        if self.losses().remove(&volume.id) {
            volume.has_lost();
        }
    }

    /// Nobody wants to hear of it any more.
    pub(crate) fn forget_loss(&self, volume: u64) {
        self.losses().remove(&volume);
    }

    fn losses(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A volume is not open any more. Another generation of it stays, and so does another volume that
    /// has its name by now: generations count from 1 in each.
    fn remove(&self, volume: &Volume) {
        let mut volumes = self.volumes();
        let same =
            |open: &Arc<Volume>| open.id == volume.id && open.generation == volume.generation;
        if volumes.get(&volume.name).is_some_and(same) {
            volumes.remove(&volume.name);
        }
    }
}

impl Events for Table {
    fn welcome(&self, _epoch: u64) -> Vec<Reserve> {
        let mut resets = Vec::new();
        for volume in self.all() {
            let mut state = volume.state();
            if state.gone.is_some() {
                continue;
            }
            // Reads under an older epoch are refused from now on: the next look-up brings another.
            state.grant = None;
            // Whatever an older session had asked for has ended by now, one way or the other.
            state.map.reset();
            state.clean.clear();
            let ask = state.credit.reset();
            state.credit_reset = Some(ask.request);
            resets.push(Reserve {
                request: 0,
                volume: volume.id,
                generation: volume.generation,
                reset: true,
                add_blocks: ask.add_blocks,
                drop_blocks: 0,
            });
        }
        resets
    }

    fn space_reset(&self, volume: u64, outcome: Result<u64, Failure>) {
        let Some(volume) = self.all().into_iter().find(|open| open.id == volume) else { return };
        if let Err(failure) = &outcome
            && failure.ends_volume()
        {
            // What is remembered here is not served until it is gone: the reset stays pending.
            if volume.state().credit_reset.is_some() {
                tracing::warn!(volume = %volume.name, error = %failure, "not open here any more");
                self.end(&volume, failure.clone());
            }
            return;
        }
        let mut state = volume.state();
        let Some(request) = state.credit_reset.take() else { return };
        match outcome {
            Ok(_) => {
                state.credit.granted(request);
                state.credit_refusal = None;
            }
            Err(failure) => {
                match failure.is_full() {
                    true => state.credit.refused(request),
                    false => state.credit.put_off(request),
                };
                state.credit_refusal = Some(failure.clone());
                let held_blocks = state.credit.held();
                tracing::warn!(
                    volume = %volume.name, held_blocks, error = %failure,
                    "no promise of space for what is dirty"
                );
            }
        }
        drop(state);
        volume.changed();
    }

    fn stores(&self, stores: &[Store]) {
        self.stores.update(stores);
    }

    fn fenced(&self, volume: u64, generation: u64) {
        for open in self.all() {
            if open.id == volume && open.generation < generation {
                tracing::warn!(volume = %open.name, generation, "fenced by another writeback");
                self.end(&open, Failure::fenced());
            }
        }
    }

    fn confirms(&self) -> Vec<Confirm> {
        let confirm = |volume: &Arc<Volume>| {
            let version = volume.state().view.oldest_read();
            (VolumeId(volume.id), Generation(volume.generation), version)
        };
        self.all().iter().map(confirm).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use endio_chassis::net::Dialer;
    use endio_state_machine::writeback::credit::CreditPolicy;

    use super::*;
    use crate::clean::CleanBlocks;
    use crate::stores::Limits;
    use crate::volume::{Opened, VolumeLimits};

    fn open_volume(table: &Table) -> Arc<Volume> {
        let opened = Opened {
            volume: endio_api::conversion::Volume {
                id: 7,
                name: "vol1".to_owned(),
                generation: 3,
                size_bytes: 1 << 20,
                ..Default::default()
            },
            grant: None,
            logged_number: 0,
            log_blocks_max: 0,
        };
        let clean = CleanBlocks::new(0);
        let limits = VolumeLimits { credit: CreditPolicy::default(), map_entries_max: 16, clean };
        let volume = Arc::new(Volume::new(opened, limits));
        table.insert(Arc::clone(&volume));
        volume
    }

    fn table() -> Table {
        let second = Duration::from_secs(1);
        let limits = Limits { queue: 1, connect: second, read: second };
        Table::new(Arc::new(Stores::new(Dialer::default(), limits)))
    }

    /// Reads are answered from memory unless the reset is pending or the volume is gone: there is no moment
    /// between the two.
    #[test]
    fn a_volume_whose_reset_is_refused_is_gone_before_the_reset_is_over() {
        let table = table();
        let volume = open_volume(&table);
        assert_eq!(table.welcome(1).len(), 1);
        table.space_reset(7, Err(Failure::fenced()));
        assert!(volume.usable().is_err() && table.find("vol1").is_none());
        assert!(volume.state().credit_reset.is_some());
    }

    #[test]
    fn a_reset_that_is_granted_or_refused_for_want_of_space_is_over() {
        for outcome in [Ok(0), Err(Failure::new(Reason::NoSpace, "full"))] {
            let table = table();
            let volume = open_volume(&table);
            table.welcome(1);
            table.space_reset(7, outcome);
            assert!(volume.usable().is_ok() && volume.state().credit_reset.is_none());
        }
    }

    /// Whoever sees that it is gone may note at once what is owed.
    #[test]
    fn a_loss_is_owed_before_the_volume_is_gone_for_anybody() {
        let table = table();
        let volume = open_volume(&table);
        volume.has_lost();
        let mut is_owed = false;
        volume.let_go(Failure::fenced(), || is_owed = true);
        assert!(is_owed);
        // A second end owes nothing more.
        volume.let_go(Failure::fenced(), || panic!("owed twice"));
        let volume = open_volume(&table);
        volume.has_lost();
        table.end(&volume, Failure::fenced());
        assert!(table.owes_loss(7));
        table.forget_loss(7);
        let volume = open_volume(&table);
        volume.has_lost();
        table.end(&volume, Failure::new(Reason::UnknownVolume, "deleted"));
        assert!(!table.owes_loss(7));
    }
}
