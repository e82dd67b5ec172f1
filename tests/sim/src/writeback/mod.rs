//! A writeback node. Dirty map, range locks, sessions, errors, credit, throttle and the cache log
//! are the real ones; what calls them follows the service's engine step by step.

mod data_log;
mod direct;
mod flusher;
mod io_end;
mod read;
mod session;
mod stored;
mod stores;
mod volumes;

mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::machine::{Completion, ReplyBody, VolumeInfo};
use endio_state_machine::token::ReadGrant;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::attempts::Attempts;
use endio_state_machine::writeback::block_cache::{BlockCache, Tenant};
use endio_state_machine::writeback::credit::Credit;
use endio_state_machine::writeback::dirty::DirtyMap;
use endio_state_machine::writeback::errseq::{Cursor, ErrSeq};
use endio_state_machine::writeback::groups::Groups;
use endio_state_machine::writeback::log_turns::LogTurns;
use endio_state_machine::writeback::map_cache::{ChangeId, MapCache, Part};
use endio_state_machine::writeback::range_lock::{self, RangeLock, Ticket};
use endio_state_machine::writeback::sessions::{RequestKey, SessionTable};
use endio_state_machine::writeback::throttle::Throttle;
use endio_state_machine::writeback::view::VolumeView;
use endio_store::cache_log::{CacheLog, SimDisk};
use endio_types::{BLOCK_BYTES, Generation, IoEndId, LblkRange, Reason, StoreId, VolumeId};

use crate::block::Block;
use crate::exec::{Answer, Exec, MS, Node, Signal};
use crate::world::{Planted, World};
pub use session::Granted;
pub use volumes::start;
pub use write::{Mode, RangeKind, Retry};

/// Why something failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The reason.
    pub reason: Reason,
    /// Wait so long before trying again.
    pub retry_ms: u64,
    /// What failed may still take effect until a session after this one stands; `None`: it cannot;
    /// `u64::MAX`: until the volume is opened anew.
    pub doubt: Option<u64>,
}

impl Failure {
    /// A failure after which nothing is under way.
    pub fn new(reason: Reason) -> Self {
        Self { reason, retry_ms: 0, doubt: None }
    }

    /// Whether the stores are full, and waiting does not help by itself.
    fn is_full(&self) -> bool {
        self.reason == Reason::NoSpace && self.retry_ms == 0
    }

    fn away() -> Self {
        Self::new(Reason::PeerAway)
    }
}

/// What callers wait for.
pub type Outcome<T> = Result<T, Failure>;

enum Owed {
    Begin(Answer<Outcome<Granted>>),
    Reserve(Answer<Outcome<u64>>),
    Reset(VolumeId),
    Log(Answer<Outcome<()>>),
}

/// One life of the process.
pub struct Engine {
    /// Its name towards conversion.
    pub name: String,
    log: CacheLog,
    log_wanted: Cell<Lsn>,
    log_moved: Signal,
    table: RefCell<BTreeMap<String, Rc<Volume>>>,
    /// Volumes of which somebody has yet to hear that acknowledged writes are lost.
    losses: RefCell<BTreeSet<VolumeId>>,
    sessions: RefCell<SessionTable>,
    /// Since when the log has refused every write for want of room.
    log_full_since: Cell<Option<u64>>,
    session_ended: Signal,
    throttle: RefCell<Throttle>,
    room: Signal,
    /// Counts the sessions that stood.
    pub link_number: Cell<u64>,
    /// Whether one stands.
    pub link_up: Cell<bool>,
    link_moved: Signal,
    outbox: RefCell<Vec<endio_state_machine::machine::FromWriteback>>,
    owed: RefCell<BTreeMap<u64, Owed>>,
    io_ends: RefCell<BTreeMap<IoEndId, Answer<Completion>>>,
    next_request: Cell<u64>,
    clients: RefCell<BTreeMap<StoreId, Rc<stores::Client>>>,
    is_serving: Cell<bool>,
    opening: RefCell<BTreeSet<String>>,
    opened: Signal,
}

/// The node.
pub struct Writeback {
    /// Its number.
    pub node: Node,
    /// Where its cache log lies.
    pub disk: SimDisk,
    start: Cell<u64>,
    engine: RefCell<Option<Rc<Engine>>>,
}

impl Writeback {
    /// A node that has never run.
    pub fn new(node: Node) -> Self {
        let (start, engine) = (Cell::new(0), RefCell::default());
        Self { node, disk: SimDisk::default(), start, engine }
    }

    /// The process is gone. Returns the volumes that were open.
    pub fn died(&self) -> Vec<String> {
        let Some(engine) = self.engine.borrow_mut().take() else { return Vec::new() };
        let is_open = |(_, volume): &(&String, &Rc<Volume>)| volume.usable().is_ok();
        let table = engine.table.borrow();
        table.iter().filter(is_open).map(|(name, _)| name.clone()).collect()
    }

    /// Whether this is the process that runs.
    pub fn is(&self, engine: &Rc<Engine>) -> bool {
        self.engine.borrow().as_ref().is_some_and(|running| Rc::ptr_eq(running, engine))
    }

    /// The process, if it runs and takes work.
    pub fn serving(&self) -> Option<Rc<Engine>> {
        self.engine.borrow().clone().filter(|engine| engine.is_serving.get())
    }
}

/// All writebacks write out what is dirty.
pub fn want_everything_out(world: &Rc<World>) {
    for (at, writeback) in world.writebacks.iter().enumerate() {
        if let Some(engine) = writeback.serving() {
            Wb { world: Rc::clone(world), at, engine }.want_everything_out();
        }
    }
}

impl Engine {
    /// Whether nothing is dirty and no credit is held, but for volumes of which `may_stay` says that
    /// what waits there must wait. Says which these are.
    ///
    /// # Errors
    /// What is left.
    pub fn is_quiet(
        &self,
        may_stay: impl Fn(VolumeId, &[u64]) -> bool,
    ) -> Result<Vec<VolumeId>, String> {
        let (mut stay, mut stay_bytes) = (Vec::new(), 0);
        for (name, volume) in &*self.table.borrow() {
            let state = volume.state.borrow();
            if !state.dirty.is_clean() {
                if !state.unbacked().is_some_and(|waiting| may_stay(volume.id, &waiting)) {
                    return Err(format!("liveness: volume {name} stays dirty"));
                }
                stay.push(volume.id);
                stay_bytes += state.dirty.waiting_blocks() * BLOCK_BYTES;
                continue;
            }
            if state.credit.held() > 0 {
                let held = state.credit.held();
                return Err(format!("space_adds_up: credit of {held} blocks is held by nothing"));
            }
        }
        match self.throttle.borrow().total_bytes() {
            left if left == stay_bytes => Ok(stay),
            left => Err(format!("space_adds_up: {left} bytes count as dirty, not {stay_bytes}")),
        }
    }
}

/// A handle on one life of a writeback for whoever calls it.
#[derive(Clone)]
pub struct Wb {
    /// The world.
    pub world: Rc<World>,
    /// Which writeback.
    pub at: usize,
    /// The process.
    pub engine: Rc<Engine>,
}

/// A volume that is open here.
pub struct Volume {
    /// Number.
    pub id: VolumeId,
    /// Name.
    pub name: String,
    /// Under which generation.
    pub generation: Generation,
    /// Overwrites of written blocks go in place.
    in_place: bool,
    /// Writes past the end extend it.
    pub growable: bool,
    /// Most blocks that conversion's data log holds of it; 0: it takes none.
    log_blocks_max: u64,
    /// The order of overlapping requests.
    locks: Rc<Locks>,
    /// What changes.
    pub state: RefCell<State>,
    changed: Signal,
}

/// Each volume has a cache of its own here.
const ALONE: Tenant = Tenant(0);

/// What changes of a volume.
pub struct State {
    /// Its size, and the versions of its map that reads use.
    pub view: VolumeView,
    /// What is known of the map.
    map: MapCache<Rc<MapExtent>>,
    /// Blocks that were read, as the map shows them now.
    clean: BlockCache<Block>,
    /// Permission to read, as conversion gave it last.
    grant: Option<ReadGrant>,
    /// Direct writes that wait for an io_end.
    direct_groups: Groups<direct::Waiting>,
    /// Tries of changes of the map.
    attempts: Attempts,
    /// Write-outs under way.
    write_outs: usize,
    /// Acknowledged and not yet converted.
    pub dirty: DirtyMap<Block>,
    /// Messages to the data log.
    log_turns: LogTurns,
    dirty_since: Option<u64>,
    credit: Credit,
    credit_reset: Option<u64>,
    /// The last reset of it was refused.
    is_reset_refused: bool,
    /// Failed write-outs.
    pub errors: ErrSeq<Failure>,
    error_count: u64,
    /// Counts the errors that observers are to be told.
    pub errors_set: u64,
    flush_up_to: Lsn,
    last_clean: Lsn,
    rest_until: u64,
    /// Why it is not usable here any more.
    pub gone: Option<Failure>,
}

impl State {
    /// Whether something acknowledged is neither on the stores nor in the data log.
    fn is_pending(&self) -> bool {
        self.dirty.pending_up_to(Lsn(u64::MAX))
    }

    /// The blocks that wait for a promise of space, if it was refused.
    pub fn unbacked(&self) -> Option<Vec<u64>> {
        let is_refused = self.is_reset_refused && self.credit.is_reset_pending();
        let is_refused = is_refused && self.dirty.write_outs() == 0;
        is_refused.then(|| self.dirty.waiting().map(|block| block.lblk.0).collect())
    }
}

impl Volume {
    fn new(world: &World, info: &VolumeInfo, grant: ReadGrant) -> Self {
        let entries = if info.in_place { 0 } else { world.plan.map_entries };
        let log_blocks_max =
            if info.in_place { 0 } else { world.plan.limits.log_blocks_per_volume_max };
        let mut dirty = DirtyMap::new();
        if !world.planted(Planted::LogNumbersAnew) {
            dirty.log_numbers_from(info.logged_number);
        }
        Self {
            id: info.id,
            name: info.name.clone(),
            generation: info.generation,
            in_place: info.in_place,
            growable: info.growable,
            log_blocks_max,
            locks: Rc::default(),
            state: RefCell::new(State {
                view: VolumeView::new(info.map_version, info.size_bytes),
                map: MapCache::new(entries),
                clean: BlockCache::new(if info.in_place { 0 } else { world.plan.clean_blocks }),
                grant: Some(grant),
                direct_groups: Groups::default(),
                attempts: Attempts::default(),
                write_outs: 0,
                dirty,
                log_turns: LogTurns::new(world.plan.log_messages_max),
                dirty_since: None,
                credit: Credit::new(world.plan.credit),
                credit_reset: None,
                is_reset_refused: false,
                errors: ErrSeq::new(),
                error_count: 0,
                errors_set: 0,
                flush_up_to: Lsn(0),
                last_clean: Lsn(0),
                rest_until: 0,
                gone: None,
            }),
            changed: Signal::default(),
        }
    }

    async fn wait<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        self.changed.wait(|| look(&mut self.state.borrow_mut())).await
    }

    /// Says whether something acknowledged that is not durable goes with it, and whether nobody has heard of
    /// an earlier loss.
    fn let_go(&self, why: Failure) -> (bool, bool) {
        let mut state = self.state.borrow_mut();
        let is_first = state.gone.is_none();
        state.gone.get_or_insert(why);
        let is_pending = is_first && state.is_pending();
        let is_loss = |failure: &Failure| failure.reason == Reason::LostWrites;
        let is_unsaid = is_first && state.errors.untold().is_some_and(is_loss);
        drop(state);
        self.changed.notify();
        (is_pending, is_unsaid)
    }

    /// # Errors
    /// Why it is not usable here any more.
    pub fn usable(&self) -> Outcome<()> {
        self.state.borrow().gone.map_or(Ok(()), Err)
    }

    /// A cursor for somebody who wants to hear of errors.
    pub fn watch(&self) -> Cursor {
        self.state.borrow().errors.sample()
    }
}

/// A change of the map that was asked for. Dropping it gives it up: it may take effect at any time.
struct MapChanging {
    volume: Rc<Volume>,
    id: Option<ChangeId>,
}

impl MapChanging {
    fn begin(wb: &Wb, volume: &Rc<Volume>, ranges: Vec<LblkRange>) -> Self {
        let mut state = volume.state.borrow_mut();
        for range in ranges.iter().filter(|_| !wb.world.planted(Planted::CleanKept)) {
            state.clean.forget(ALONE, *range);
        }
        let id = state.map.begin(ranges);
        Self { volume: Rc::clone(volume), id: Some(id) }
    }

    /// It has ended, or died with the session in which it was asked for.
    fn ended(mut self, parts: Vec<Part<Rc<MapExtent>>>) {
        if let Some(id) = self.id.take() {
            self.volume.state.borrow_mut().map.end(id, parts);
        }
    }
}

impl Drop for MapChanging {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.volume.state.borrow_mut().map.give_up(id);
        }
    }
}

/// The range lock of a volume.
#[derive(Default)]
struct Locks {
    lock: RefCell<RangeLock>,
    moved: Signal,
}

/// A place in the order of a volume. Dropping it gives the range back.
struct Held {
    locks: Rc<Locks>,
    ticket: Ticket,
}

impl Locks {
    fn acquire(self: &Rc<Self>, range: LblkRange) -> Held {
        let ticket = self.lock.borrow_mut().acquire(range, range_lock::Mode::Exclusive).ticket();
        Held { locks: Rc::clone(self), ticket }
    }
}

impl Held {
    async fn held(&self) {
        let is_held = || self.locks.lock.borrow().is_held(self.ticket).then_some(());
        self.locks.moved.wait(is_held).await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.locks.lock.borrow_mut().release(self.ticket);
        self.locks.moved.notify();
    }
}

impl Wb {
    fn exec(&self) -> &Exec {
        &self.world.exec
    }

    fn node(&self) -> Node {
        self.world.writebacks[self.at].node
    }

    fn deadline(&self) -> u64 {
        self.exec().now() + self.world.plan.io_timeout_ms * MS
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        // What the process starts dies with it.
        self.exec().spawn(self.node(), work);
    }

    /// The volume of that name, if it is open here.
    pub fn open_here(&self, name: &str) -> Option<Rc<Volume>> {
        self.find(name)
    }

    fn find(&self, name: &str) -> Option<Rc<Volume>> {
        let table = self.engine.table.borrow();
        table.get(name).filter(|volume| volume.usable().is_ok()).cloned()
    }

    fn all(&self) -> Vec<Rc<Volume>> {
        self.engine.table.borrow().values().cloned().collect()
    }

    fn remove(&self, volume: &Volume) {
        let mut table = self.engine.table.borrow_mut();
        let is_same_id =
            |open: &Volume| open.id == volume.id || self.world.planted(Planted::NamesakeForgotten);
        let is_same = |open: &Rc<Volume>| is_same_id(open) && open.generation == volume.generation;
        if table.get(&volume.name).is_some_and(is_same) {
            table.remove(&volume.name);
        }
    }

    /// A refusal that says that the volume is not ours any more ends it here.
    fn heed(&self, volume: &Volume, failure: &Failure) {
        if matches!(failure.reason, Reason::OldGeneration | Reason::UnknownVolume) {
            self.end(volume, *failure);
        }
    }

    /// A volume is not served here any more. If acknowledged writes go with it, who asks for it here next
    /// is told.
    fn end(&self, volume: &Volume, why: Failure) {
        let is_taken = matches!(why.reason, Reason::OldGeneration | Reason::UnknownVolume);
        let is_open = || self.world.settled.borrow().is_open_under(volume.id, volume.generation);
        if is_taken && volume.usable().is_ok() && is_open() {
            // Conversion may forget yet that somebody else has it.
            let why = "is let go, and by what is durable it is open here";
            self.exec().fail(format!("taken-is-durable: {} {why}", volume.name));
        }
        let (is_pending, is_unsaid) = volume.let_go(why);
        self.remove(volume);
        if why.reason == Reason::UnknownVolume {
            return;
        }
        if is_pending {
            self.world.let_go.borrow_mut().insert((self.at, volume.id));
        }
        if (is_pending && !self.world.planted(Planted::LetGoUntold)) || is_unsaid {
            self.owe_loss(volume.id);
        }
    }

    fn owe_loss(&self, volume: VolumeId) {
        self.engine.losses.borrow_mut().insert(volume);
        // Opened here anew before its end was noticed.
        let open = self.all().into_iter().find(|open| open.id == volume && open.usable().is_ok());
        if let Some(open) = open {
            self.tell_loss(&open);
        }
    }

    /// Who asks for the volume is told of what is owed.
    fn tell_loss(&self, volume: &Volume) {
        let is_owed = self.engine.losses.borrow_mut().remove(&volume.id);
        if is_owed && !self.world.planted(Planted::LossUntold) {
            let mut state = volume.state.borrow_mut();
            state.errors.set(Failure::new(Reason::LostWrites));
            state.errors_set += 1;
        }
    }

    /// What somebody has yet to hear of a loss outlives this process.
    fn note_loss(&self, volume: VolumeId) {
        if self.engine.losses.borrow().contains(&volume)
            && let Err(error) = self.engine.log.note_loss(volume)
        {
            self.log_failed(&error);
        }
    }

    /// An fsync has told of a loss, or of none.
    fn told_of_loss(&self, volume: &Volume, is_told: bool) {
        let is_owed = self.world.let_go.borrow_mut().remove(&(self.at, volume.id));
        match is_told {
            true => {
                if let Err(error) = self.engine.log.loss_told(volume.id) {
                    self.log_failed(&error);
                }
            }
            false if is_owed => {
                let why = "an fsync did not tell of what was let go with the volume";
                self.exec().fail(format!("errors_told_once: {}: {why}", volume.name));
            }
            false => {}
        }
    }

    fn dirtied(&self, volume: VolumeId, blocks: u64) {
        self.engine.throttle.borrow_mut().add(volume, blocks * BLOCK_BYTES);
    }

    fn undirtied(&self, volume: VolumeId, blocks: u64) {
        if blocks > 0 {
            self.engine.throttle.borrow_mut().sub(volume, blocks * BLOCK_BYTES);
            self.engine.room.notify();
        }
    }

    /// Asks for the log to be made durable up to a record, without waiting.
    fn want_log_durable(&self, lsn: Lsn) {
        let engine = &self.engine;
        engine.log_wanted.set(engine.log_wanted.get().max(lsn));
        engine.log_moved.notify();
    }

    /// Waits until the log is durable up to a record.
    async fn log_durable(&self, lsn: Lsn) -> Outcome<()> {
        let engine = &self.engine;
        if engine.log.durable_lsn() >= lsn {
            return Ok(());
        }
        self.want_log_durable(lsn);
        let look = || (engine.log.durable_lsn() >= lsn).then_some(());
        engine.log_moved.wait(look).await;
        Ok(())
    }

    async fn keep_log_durable(self) {
        let engine = &self.engine;
        loop {
            let look = || (engine.log_wanted.get() > engine.log.durable_lsn()).then_some(());
            engine.log_moved.wait(look).await;
            let target = engine.log.last_lsn();
            self.exec().sleep(self.world.plan.journal_us.draw(self.exec())).await;
            if let Err(error) = engine.log.sync_to(target) {
                return self.exec().fail(format!("log-reads-back: {error}"));
            }
            engine.log_moved.notify();
        }
    }

    fn log_failed(&self, error: &endio_store::cache_log::CacheLogError) -> Failure {
        self.exec().tell(self.node(), || format!("cache log: {error}"));
        Failure::new(error.reason())
    }
}

/// A request that is being applied; dropped without [`Admission::applied`] it counts as failed.
struct Admission {
    wb: Wb,
    key: RequestKey,
}

impl Admission {
    fn applied(self, result: u64) {
        let now = self.wb.exec().clock(self.wb.node());
        self.wb.engine.sessions.borrow_mut().applied(self.key, result, now);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.wb.engine.sessions.borrow_mut().failed(self.key);
        self.wb.engine.session_ended.notify();
    }
}

/// The volume of an answer.
fn opened(reply: ReplyBody) -> Option<(VolumeInfo, ReadGrant)> {
    match reply {
        ReplyBody::Opened(info, grant, _) => Some((info, grant)),
        _ => None,
    }
}
