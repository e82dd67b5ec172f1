//! The volumes that are open here, and what the session with conversion says about them.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use endio_api::conversion::{ReadConfirm, Reserve, Store};
use tracing_mutex::stdsync::{Mutex, MutexGuard};

use crate::failure::Failure;
use crate::session::Events;
use crate::stores::Stores;
use crate::volume::Volume;

/// Open volumes by name.
pub(crate) struct Table {
    volumes: Mutex<BTreeMap<Arc<str>, Arc<Volume>>>,
    stores: Arc<Stores>,
}

impl Table {
    /// Nothing open.
    pub(crate) fn new(stores: Arc<Stores>) -> Self {
        Self { volumes: Mutex::default(), stores }
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

    /// A volume is not open any more. Another generation of it stays, and so does another volume that
    /// has its name by now: generations count from 1 in each.
    pub(crate) fn remove(&self, volume: &Volume) {
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
        let mut state = volume.state();
        let Some(request) = state.credit_reset.take() else { return };
        match outcome {
            Ok(_) => {
                state.credit.granted(request);
                state.credit_refusal = None;
            }
            Err(failure) if failure.ends_volume() => {
                drop(state);
                tracing::warn!(volume = %volume.name, error = %failure, "not open here any more");
                volume.let_go(failure);
                self.remove(&volume);
                return;
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
                open.let_go(Failure::fenced());
                self.remove(&open);
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
