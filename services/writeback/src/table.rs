//! The volumes that are open here, and what the session with conversion says about them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use endio_api::conversion::{ReadConfirm, Reserve, Store};
use endio_types::Reason;
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

    fn confirms(&self) -> Vec<ReadConfirm> {
        let confirm = |volume: &Arc<Volume>| ReadConfirm {
            volume: volume.id,
            generation: volume.generation,
            map_version: volume.state().view.oldest_read().0,
        };
        self.all().iter().map(confirm).collect()
    }
}
