//! Everything that is simulated, and what only an omniscient observer can check.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Weak;

use endio_state_machine::machine::{ToStore, ToWriteback};
use endio_state_machine::record::Record;
use endio_testkit::seed::Rng;
use endio_types::StoreId;

use crate::client::Clients;
use crate::conversion::Conversion;
use crate::device::SimDevice;
use crate::exec::{Exec, Node};
use crate::mirror::Mirror;
use crate::net::Net;
use crate::plan::Plan;
use crate::store::Store;
use crate::writeback::Writeback;

/// The node of conversion.
pub const CONVERSION: Node = 1;

/// Bugs planted into the parts of the services that the simulation models.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Planted {
    /// A submitter's token is released before the log is durable.
    LogFirstOff,
    /// A write that waited for a resize is not compared with the new end.
    EndUnchecked,
    /// The end of a deleted volume closes the one that has its name since.
    NamesakeForgotten,
    /// Data in the log is replayed although somebody else has had the volume since.
    StaleReplay,
    /// A volume is opened whoever has opened it since it was looked at.
    OpenUnconditional,
    /// The size after a resize whose answer never came is taken for the old one.
    SizeGuessed,
    /// What goes around the cache does not write it out before.
    ForgetSkipped,
    /// Every eighth buffered write is acknowledged without a record in the log.
    LogSkipsAppend,
    /// The log drops segments whose data is still dirty.
    TrimTooMuch,
    /// The loss of buffered writes is told to nobody.
    LossUntold,
    /// Effects leave conversion before their records are durable.
    ConversionSendsEarly,
    /// Neither a store nor a writeback compares a checksum of what is read.
    ReadSkipsChecksum,
}

impl Planted {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::LogFirstOff,
        Self::EndUnchecked,
        Self::SizeGuessed,
        Self::NamesakeForgotten,
        Self::StaleReplay,
        Self::OpenUnconditional,
        Self::ForgetSkipped,
        Self::LogSkipsAppend,
        Self::TrimTooMuch,
        Self::LossUntold,
        Self::ConversionSendsEarly,
        Self::ReadSkipsChecksum,
    ];
}

/// The world.
pub struct World {
    /// Time and chance.
    pub exec: Exec,
    /// The network.
    pub net: Net,
    /// What was drawn for this run.
    pub plan: Plan,
    /// The conversion node.
    pub conversion: Conversion,
    /// Block-stores.
    pub stores: Vec<Store>,
    /// Writebacks.
    pub writebacks: Vec<Writeback>,
    /// The map, made of records.
    pub mirror: RefCell<Mirror>,
    numbers: RefCell<BTreeMap<StoreId, usize>>,
    /// A bug of the modelled parts.
    pub planted: Option<Planted>,
    /// Takeovers that were drawn and not tried yet.
    pub takeover_wanted: Cell<u64>,
    /// No more faults.
    pub is_healed: Cell<bool>,
    /// Everything was found in order at the end.
    pub is_finished: Cell<bool>,
    /// Who must hear of power cuts.
    pub clients: RefCell<Weak<Clients>>,
}

impl World {
    /// All nodes, none of them running.
    pub fn new(seed: u64, plan: Plan, keep_log: bool, planted: Option<Planted>) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let nodes = 1 + plan.stores + plan.writebacks;
        let exec = Exec::new(seed, nodes, keep_log);
        let store = |at: usize| {
            let disk = SimDevice::new(plan.capacity, plan.device, rng.fork());
            Store::new(2 + at, disk, plan.capacity)
        };
        let stores: Vec<Store> = (0..plan.stores).map(store).collect();
        let first = 2 + plan.stores;
        let writebacks = (0..plan.writebacks).map(|at| Writeback::new(first + at)).collect();
        Self {
            net: Net::new(exec.clone()),
            exec,
            conversion: Conversion::new(CONVERSION),
            stores,
            writebacks,
            mirror: RefCell::default(),
            numbers: RefCell::default(),
            planted,
            takeover_wanted: Cell::new(0),
            is_healed: Cell::new(false),
            is_finished: Cell::new(false),
            clients: RefCell::default(),
            plan,
        }
    }

    /// Whether this bug is planted.
    pub fn planted(&self, bug: Planted) -> bool {
        self.planted == Some(bug)
    }

    /// A record is about to be written: what it says must be so.
    ///
    /// # Errors
    /// What is not so, in words that begin with the checker's name.
    pub fn before_record(&self, record: &Record) -> Result<(), String> {
        match record {
            Record::Store(state) => {
                let at = usize::from(state.uuid[0]) - 2;
                self.numbers.borrow_mut().insert(state.id, at);
            }
            Record::Convert(items) if !self.plan.device.lies() => {
                let runs = items.iter().flat_map(|item| &item.runs);
                for run in runs.filter(|run| !run.crcs.is_empty()) {
                    for (store, pblk) in &run.places {
                        let numbers = self.numbers.borrow();
                        let Some(at) = numbers.get(store) else { continue };
                        let disk = &self.stores[*at].disk;
                        for (block, sum) in (pblk.0..).zip(&run.crcs) {
                            if !disk.holds_durably(block, *sum) {
                                return Err(format!(
                                    "convert_once_and_only_if_all_durable: {store}:{block} of \
                                     {run:?}"
                                ));
                            }
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Conversion says something to a writeback.
    pub fn told_writeback(&self, message: &ToWriteback) {
        if let ToWriteback::Welcome { epoch, .. } = message {
            let told = &mut self.conversion.disk.borrow_mut().epoch_told;
            *told = (*told).max(*epoch);
        }
    }

    /// Conversion says something to a store.
    pub fn told_store(&self, message: &ToStore) {
        if let ToStore::Registered { epoch, .. } = message {
            let told = &mut self.conversion.disk.borrow_mut().epoch_told;
            *told = (*told).max(*epoch);
        }
    }
}
