//! Everything that is simulated, and what only an omniscient observer can check.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};

use endio_state_machine::extent_map::MemoryTable;
use endio_state_machine::machine::{Call, Machine, ToStore, ToWriteback};
use endio_state_machine::record::Record;
use endio_state_machine::token::ReadGrant;
use endio_testkit::seed::Rng;
use endio_types::{ClusterEpoch, Generation, LblkRange, Millis, StoreId, VolumeId};

use crate::client::Clients;
use crate::conversion::Conversion;
use crate::device::SimDevice;
use crate::exec::{Exec, Node};
use crate::logs::Versions;
use crate::mirror::{Home, Mirror};
use crate::net::{Net, Sent};
use crate::plan::{Plan, RARE};
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
    /// Clean blocks stay in the memory of a writeback when the map of them changes.
    CleanKept,
    /// What was read is kept in memory whatever has changed meanwhile.
    OldKept,
    /// Neither a store nor a writeback compares a checksum of what is read.
    ReadSkipsChecksum,
    /// Whoever opens a volume takes nothing from the data log.
    LogUnread,
    /// A replay takes what the data log has although the cache log has newer data.
    LogWinsAlways,
    /// A replay takes what the cache log has although the data log has newer data.
    LogLosesAlways,
    /// What the cache log has of a block stays there although the data log has newer data.
    OlderKept,
    /// What the data log may forget is said when the io_end begins, and not when its blocks are picked.
    LoggedUpToLate,
    /// What comes for the data log of an opened volume is numbered from one.
    LogNumbersAnew,
    /// A flush that is dropped or refused leaves its blocks to whoever writes them out.
    LogGuardOff,
    /// What a write-out left dirty is not written out again when it is old.
    FailedNeverOld,
    /// What was picked for the data log under one session is sent under the next one.
    LogOfOlderSession,
    /// What the stores hold is clean, whatever the data log has of it.
    StoredThoughLogged,
    /// Whatever is not dirty is taken for clean in the log.
    CleanGuessed,
    /// What fails while conversion is away is dirty again at once, and wants no more space when it is
    /// written anew.
    DoubtIgnored,
    /// A loss that nobody was told of gives way to a lesser error.
    LossReplaced,
    /// What goes with a volume that somebody else takes is told to nobody who comes back.
    LetGoUntold,
    /// What is written anew is read and written without the lock of its blocks.
    RewriteUnlocked,
    /// A write that ends before what its last block held says only where it ends itself.
    EndForgotten,
    /// A volume that becomes smaller keeps what its last block has behind the old end.
    TailKept,
    /// An orderly stop does not wait until everything is written out.
    StoppedDirty,
    /// What was confirmed of the maps in one session is not confirmed in the next.
    ConfirmsKept,
    /// A replay forgets what a write held together once newer ones lie over all of it.
    HiddenForgotten,
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
        Self::CleanKept,
        Self::OldKept,
        Self::ReadSkipsChecksum,
        Self::LogUnread,
        Self::LogWinsAlways,
        Self::LogLosesAlways,
        Self::OlderKept,
        Self::LoggedUpToLate,
        Self::LogNumbersAnew,
        Self::LogGuardOff,
        Self::FailedNeverOld,
        Self::LogOfOlderSession,
        Self::StoredThoughLogged,
        Self::CleanGuessed,
        Self::DoubtIgnored,
        Self::LossReplaced,
        Self::LetGoUntold,
        Self::RewriteUnlocked,
        Self::EndForgotten,
        Self::TailKept,
        Self::StoppedDirty,
        Self::ConfirmsKept,
        Self::HiddenForgotten,
    ];
}

#[derive(Clone, PartialEq, Eq)]
struct Reader {
    name: String,
    volume: VolumeId,
    generation: Generation,
    epoch: ClusterEpoch,
}

/// Blocks that a read waits for, until it is dropped.
pub struct Reading {
    world: Rc<World>,
    homes: Vec<Home>,
    reader: Reader,
}

impl Reading {
    /// A volume's read of these blocks is under way.
    pub fn begin(world: &Rc<World>, name: &str, grant: &ReadGrant, homes: Vec<Home>) -> Self {
        let (volume, generation, epoch) = (grant.volume, grant.generation, grant.epoch);
        let reader = Reader { name: name.to_owned(), volume, generation, epoch };
        let mut reading = world.reading.borrow_mut();
        for home in &homes {
            reading.entry(*home).or_default().push(reader.clone());
        }
        drop(reading);
        Self { world: Rc::clone(world), homes, reader }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut reading = self.world.reading.borrow_mut();
        for home in &self.homes {
            if let Some(readers) = reading.get_mut(home) {
                if let Some(at) = readers.iter().position(|reader| *reader == self.reader) {
                    readers.swap_remove(at);
                }
                if readers.is_empty() {
                    reading.remove(home);
                }
            }
        }
    }
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
    /// The same of the durable records only: what a restart of conversion would find.
    pub settled: RefCell<Mirror>,
    /// What writebacks accepted, in order.
    pub versions: RefCell<Versions>,
    /// Blocks that reads wait for, with the volume's name and the permission.
    reading: RefCell<BTreeMap<Home, Vec<Reader>>>,
    /// Tries of changes whose blocks others may use.
    ended: RefCell<BTreeSet<(VolumeId, Generation, u64)>>,
    /// When a volume of that name was last said to be deleted.
    deleted: RefCell<BTreeMap<String, u64>>,
    /// Chance of what came into the plans later.
    pub rare: RefCell<Rng>,
    numbers: RefCell<BTreeMap<StoreId, usize>>,
    /// A bug of the modelled parts.
    pub planted: Option<Planted>,
    /// Takeovers that were drawn and not tried yet.
    pub takeover_wanted: Cell<u64>,
    /// Writebacks and volumes of which acknowledged writes went when the volume was let go there, and that have
    /// told nobody yet.
    pub let_go: RefCell<BTreeSet<(usize, VolumeId)>>,
    /// Bits that flipped where data is stored.
    pub flips: Cell<u64>,
    /// Nodes that were frozen for longer than a lease, and woke up in the same life.
    pub zombies: Cell<u64>,
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
            settled: RefCell::default(),
            versions: RefCell::default(),
            reading: RefCell::default(),
            ended: RefCell::default(),
            deleted: RefCell::default(),
            rare: RefCell::new(Rng::new(seed ^ RARE).fork()),
            numbers: RefCell::default(),
            planted,
            takeover_wanted: Cell::new(0),
            let_go: RefCell::default(),
            flips: Cell::new(0),
            zombies: Cell::new(0),
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

    /// From now on others use the blocks of these tries of a change.
    pub fn tries_ended(&self, volume: VolumeId, generation: Generation, tries: &[u64]) {
        let tries = tries.iter().map(|number| (volume, generation, *number));
        self.ended.borrow_mut().extend(tries);
    }

    /// Conversion takes a call; of the volume that it names, if it does so by its name.
    ///
    /// # Errors
    /// Why it must not, in words that begin with the checker's name.
    pub fn takes(&self, call: &Call, named: Option<VolumeId>, sent: Sent) -> Result<(), String> {
        let is_other = named.zip(sent.meant).is_some_and(|(named, meant)| named != meant);
        if is_other {
            return Err(format!("deleted_stays_deleted: {named:?} has the name, {call:?}"));
        }
        if let Call::CreateVolume { name, .. } = call {
            let deleted = self.deleted.borrow().get(name).copied();
            // An answer that says which volume there is creates none.
            let creates = named.is_none();
            return match deleted.is_some_and(|deleted| creates && sent.at < deleted) {
                true => Err(format!("deleted_stays_deleted: {call:?} of {} us", sent.at)),
                false => Ok(()),
            };
        }
        let (volume, generation, attempt) = match call {
            Call::ChangeMap { volume, generation, attempt, .. } => (*volume, *generation, attempt),
            Call::ResizeVolume { generation, attempt, .. }
            | Call::DeleteVolume { generation, attempt, .. } => {
                (named.unwrap_or_default(), *generation, attempt)
            }
            _ => return Ok(()),
        };
        match self.ended.borrow().contains(&(volume, generation, attempt.number)) {
            true => Err(format!("given_up_is_over: {call:?}")),
            false => Ok(()),
        }
    }

    /// A client was told that its volume is deleted.
    pub fn was_deleted(&self, name: &str) {
        self.deleted.borrow_mut().insert(name.to_owned(), self.exec.now());
    }

    /// The disk of a store.
    pub fn disk_of(&self, store: StoreId) -> Option<&SimDevice> {
        let at = *self.numbers.borrow().get(&store)?;
        self.stores.get(at).map(|store| &store.disk)
    }

    /// Whether blocks may wait for ever, if a promise for all of them is refused: copies of some are
    /// damaged, and nobody has space for others, so their fsync fails until something is trimmed
    /// (docs/SAFETY.md). All others have their promise.
    pub fn may_stay(
        &self,
        machine: &Machine<MemoryTable>,
        volume: VolumeId,
        waiting: &[u64],
    ) -> bool {
        let damaged = waiting.iter().filter(|lblk| self.is_damaged(volume, **lblk)).count();
        let volumes = machine.volumes();
        let Some(info) = volumes.iter().find(|info| info.id == volume) else { return false };
        let (wanted, promised) = (waiting.len() as u64, info.credit_blocks);
        // What all are promised, and this volume wants besides, does not fit.
        let copies = |blocks: u64, replicas: u32| blocks * u64::from(replicas);
        let owed: u64 =
            volumes.iter().map(|other| copies(other.credit_blocks, other.replicas)).sum();
        let more = copies(wanted.saturating_sub(promised), info.replicas);
        let stores = machine.stores(Millis(u64::MAX / 2));
        let free: u64 = stores.iter().map(|store| store.free_blocks).sum();
        let is_full = match info.replicas {
            1 => owed + more > free,
            // One store may be full and another not.
            _ => {
                owed + more + stores.iter().map(|store| store.free_blocks).max().unwrap_or(0) > free
            }
        };
        damaged > 0 && wanted - damaged as u64 <= promised && promised < wanted && is_full
    }

    /// Whether the map shows a block with a checksum that no copy of it has any more.
    fn is_damaged(&self, volume: VolumeId, lblk: u64) -> bool {
        let mirror = self.mirror.borrow();
        let Some((homes, sum)) = mirror.written_at(volume, lblk) else { return false };
        let is_good =
            |(store, pblk): &Home| self.disk_of(*store).is_some_and(|disk| disk.holds(*pblk, sum));
        !homes.iter().any(is_good)
    }

    /// A bio of a volume, or a punch, changes a block.
    ///
    /// # Errors
    /// Why it must not.
    pub fn may_land(&self, volume: VolumeId, home: Home) -> Result<(), &'static str> {
        if !self.mirror.borrow().may_land(volume, home) {
            return Err("that a map names");
        }
        if !self.settled.borrow().may_land(volume, home) {
            return Err("that a map would name after a restart of conversion");
        }
        if self.mirror.borrow().is_in_place(volume) {
            return Ok(());
        }
        let reading = self.reading.borrow();
        let (Some(readers), process) = (reading.get(&home), self.conversion.process.borrow())
        else {
            return Ok(());
        };
        let Some(process) = &*process else { return Ok(()) };
        // Of an older epoch, a closed volume or a fenced generation only the answer is still on its way.
        let is_current = |reader: &Reader| {
            let known = process.machine.volume(&reader.name);
            let is_same = |id, generation| id == reader.volume && generation == reader.generation;
            process.machine.epoch() == reader.epoch
                && known.is_some_and(|v| v.owner.is_some() && is_same(v.id, v.generation))
        };
        match readers.iter().any(is_current) {
            true => Err("that a read waits for"),
            false => Ok(()),
        }
    }

    /// Dirty blocks are clean without a conversion, for the stores hold the same.
    ///
    /// # Errors
    /// The data log has one of them, and would put it back under the next owner.
    pub fn may_be_stored(
        &self,
        volume: VolumeId,
        taken: impl Iterator<Item = LblkRange>,
    ) -> Result<(), String> {
        let mirror = self.mirror.borrow();
        let mut blocks = taken.flat_map(|range| range.start.0..range.end());
        match blocks.find(|lblk| mirror.logs().sum(volume, *lblk).is_some()) {
            Some(lblk) => Err(format!("stored-is-clean: {volume}:{lblk} is in the data log")),
            None => Ok(()),
        }
    }

    /// A record is about to be written: what it says must be so.
    ///
    /// # Errors
    /// What is not so, in words that begin with the checker's name.
    pub fn before_record(&self, record: &Record) -> Result<(), String> {
        self.before_logs(record)?;
        match record {
            Record::Store(state) => {
                let at = usize::from(state.uuid[0]) - 2;
                self.numbers.borrow_mut().insert(state.id, at);
            }
            Record::Convert(items) | Record::ConvertLogged { volumes: items, .. }
                if !self.plan.device.lies() =>
            {
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

    fn before_logs(&self, record: &Record) -> Result<(), String> {
        let (versions, mirror) = (self.versions.borrow(), self.mirror.borrow());
        match record {
            Record::Log { volume, entries, data, .. } => {
                versions.may_log(*volume, entries, data, |lblk| {
                    [mirror.sum(*volume, lblk), mirror.logs().sum(*volume, lblk)]
                })
            }
            Record::Convert(items) => versions.may_convert(mirror.logs(), items, &[]),
            Record::ConvertLogged { volumes, done } => {
                versions.may_convert(mirror.logs(), volumes, done)
            }
            _ => Ok(()),
        }
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
