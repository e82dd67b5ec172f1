//! One conversion, one block-store, a writeback or two, and everything between them.
//!
//! ```text
//!   Begin ─► [machine] ─► token ─► bios (any order, twice, or never) ─► [gate] ─► flights ─► platter
//!                ▲                                                        │
//!                └── to_conversion (in order, lost with its session) ◄────┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use endio_state_machine::extent_map::MemoryTable;
use endio_state_machine::gate::{Admit, Cleared, FlightId, Gate, GateLimits, Registration};
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_state_machine::record::{Record, Seq, Snapshot};
use endio_state_machine::token::{Token, TokenKey};
use endio_types::*;

const BLOCKS: u64 = 2;
const LEASE_MS: u32 = 1000;
const VOLUME: &str = "vol1";
/// Where each write goes: the second one overwrites the first.
const TARGETS: [u64; 3] = [0, 0, 1];

/// How often each disturbance may happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    /// Writes of one block; at most three.
    pub writes: usize,
    /// Deliveries of the same bio beyond the first.
    pub duplicates: u8,
    /// Conversion dies and recovers from what was durable.
    pub conversion_crashes: u8,
    /// The store dies; what was in flight is lost.
    pub store_crashes: u8,
    /// The session between them breaks; messages under way are lost.
    pub disconnects: u8,
    /// The store's lease ends at conversion, and the store does not know.
    pub expiries: u8,
    /// The writeback's lease ends.
    pub writeback_expiries: u8,
    /// Another writeback opens the volume by force.
    pub takeovers: u8,
    /// The store renews its lease.
    pub renewals: u8,
    /// The writeback gives an io_end up.
    pub aborts: u8,
    /// Free blocks that are punched at once, after each start of conversion: those cannot be handed
    /// out meanwhile, and the store punches them when nothing is in flight there.
    pub punched: u64,
}

impl Budget {
    /// Writes, and nothing that disturbs them.
    pub const QUIET: Self = Self {
        writes: 2,
        duplicates: 0,
        conversion_crashes: 0,
        store_crashes: 0,
        disconnects: 0,
        expiries: 0,
        writeback_expiries: 0,
        takeovers: 0,
        renewals: 0,
        aborts: 0,
        punched: BLOCKS,
    };
}

/// A bug in the world, to see that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Plant {
    /// The store confirms fences and does not heed them.
    FencesUnheeded,
    /// The store releases a bio before it has landed.
    ReleasedEarly,
    /// A new epoch counts as drained at once, and blocks as punched that may still be written.
    EpochUndrained,
    /// In the machine or the gate themselves; needs the feature `planted-bugs`.
    Pure(planted::Bug),
    /// The same, two at once.
    Both(planted::Bug, planted::Bug),
}

/// One thing that happens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// The next write begins.
    Begin,
    /// The submitter's token of that write is released.
    Submit(usize),
    /// The writeback gives that write up.
    Abort(usize),
    /// That bio reaches the store.
    Bio(usize),
    /// That write reaches the platter, durably.
    Land(usize),
    /// The store's next message reaches conversion.
    ToConversion,
    /// Conversion's next message reaches the store.
    ToStore,
    /// Everything journaled is durable.
    Commit,
    /// The store opens a session.
    Register,
    /// See [`Budget::renewals`].
    Renew,
    /// See [`Budget::conversion_crashes`].
    CrashConversion,
    /// See [`Budget::store_crashes`].
    CrashStore,
    /// See [`Budget::disconnects`].
    Disconnect,
    /// See [`Budget::expiries`].
    ExpireStore,
    /// See [`Budget::writeback_expiries`].
    ExpireWriteback,
    /// See [`Budget::takeovers`].
    Takeover,
}

#[derive(Debug)]
struct Write {
    submitter: Token,
    is_released: bool,
    ended: Option<bool>,
}

/// See the module.
pub struct World {
    budget: Budget,
    plant: Option<Plant>,
    machine: Machine<MemoryTable>,
    now: Millis,
    epochs: u8,
    journal: Vec<(Seq, Record)>,
    durable: usize,
    waiting: Vec<Effect>,
    gate: Gate,
    incarnation: u64,
    sessions: u64,
    is_connected: bool,
    to_store: VecDeque<ToStore>,
    to_conversion: VecDeque<FromStore>,
    bios: Vec<(Token, u8)>,
    flights: Vec<(FlightId, Token)>,
    writebacks: u64,
    volume: Option<VolumeInfo>,
    begun: usize,
    writes: Vec<Write>,
    /// Whose each block is, as conversion granted it last.
    owner: BTreeMap<u64, IoEndId>,
    /// Whose data lies in each block.
    platter: BTreeMap<u64, IoEndId>,
    converted: u64,
    reuses: u64,
    broken: Option<String>,
}

fn limits(budget: Budget) -> Limits {
    Limits {
        punch_blocks_max: budget.punched,
        lease_ms: LEASE_MS,
        io_end_life_max_ms: 10_000,
        // Punching frees nothing that matters here, and multiplies the orders.
        punch_interval_ms: 1_000_000,
        ..Limits::default()
    }
}

impl World {
    /// A registered store, a volume that is open, nothing written.
    pub fn new(budget: Budget, plant: Option<Plant>) -> Self {
        let mut world = Self {
            budget,
            plant,
            machine: Machine::recover(limits(budget), MemoryTable::new(), Snapshot::new([1; 16])),
            now: Millis(1),
            epochs: 0,
            journal: Vec::new(),
            durable: 0,
            waiting: Vec::new(),
            gate: Gate::new(Incarnation(1), BLOCKS, GateLimits::default()),
            incarnation: 1,
            sessions: 0,
            is_connected: false,
            to_store: VecDeque::new(),
            to_conversion: VecDeque::new(),
            bios: Vec::new(),
            flights: Vec::new(),
            writebacks: 1,
            volume: None,
            begun: 0,
            writes: Vec::new(),
            owner: BTreeMap::new(),
            platter: BTreeMap::new(),
            converted: 0,
            reuses: 0,
            broken: None,
        };
        world.start_epoch();
        world.hello();
        world.register();
        world.settle();
        let size_bytes = BLOCKS * BLOCK_BYTES;
        let name = VOLUME.to_owned();
        let (replicas, in_place, growable) = (1, false, false);
        world.call(Call::CreateVolume {
            name,
            size_bytes,
            replicas,
            in_place,
            growable,
            as_of: None,
        });
        world.open();
        world.settle();
        world
    }

    /// What was broken, if anything.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Writes that were completed with success.
    pub fn converted(&self) -> u64 {
        self.converted
    }

    /// Grants of a block that had been granted before.
    pub fn reuses(&self) -> u64 {
        self.reuses
    }

    /// Alike for worlds in which the same can happen.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.budget.hash(&mut hasher);
        let conversion = (&self.machine, &self.journal, self.durable, &self.waiting);
        format!("{conversion:?}").hash(&mut hasher);
        let store = (&self.gate, self.is_connected, &self.to_store, &self.to_conversion);
        format!("{store:?}").hash(&mut hasher);
        let data = (&self.bios, &self.flights, &self.owner, &self.platter, &self.broken);
        format!("{data:?}").hash(&mut hasher);
        format!("{:?}", (self.begun, &self.writes)).hash(&mut hasher);
        hasher.finish()
    }

    /// Everything that can happen now.
    pub fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut add = |is_possible: bool, step: Step| steps.extend(is_possible.then_some(step));
        let budget = &self.budget;
        add(self.begun < budget.writes, Step::Begin);
        for (at, write) in self.writes.iter().enumerate() {
            let is_open = write.ended.is_none() && !write.is_released;
            add(is_open, Step::Submit(at));
            add(is_open && budget.aborts > 0, Step::Abort(at));
        }
        (0..self.bios.len()).for_each(|at| add(true, Step::Bio(at)));
        (0..self.flights.len()).for_each(|at| add(true, Step::Land(at)));
        add(self.is_connected && !self.to_conversion.is_empty(), Step::ToConversion);
        add(self.is_connected && !self.to_store.is_empty(), Step::ToStore);
        add(self.durable < self.journal.len(), Step::Commit);
        add(!self.is_connected, Step::Register);
        add(self.is_connected && budget.renewals > 0, Step::Renew);
        add(budget.conversion_crashes > 0, Step::CrashConversion);
        add(budget.store_crashes > 0, Step::CrashStore);
        add(self.is_connected && budget.disconnects > 0, Step::Disconnect);
        add(budget.expiries > 0, Step::ExpireStore);
        add(budget.writeback_expiries > 0, Step::ExpireWriteback);
        add(budget.takeovers > 0, Step::Takeover);
        steps
    }

    /// Does one of the possible steps.
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Begin => self.begin(),
            Step::Submit(at) => self.submit(at, false),
            Step::Abort(at) => {
                self.budget.aborts -= 1;
                self.submit(at, true);
            }
            Step::Bio(at) => self.bio(at),
            Step::Land(at) => self.land(at),
            Step::ToConversion => {
                if let Some(message) = self.to_conversion.pop_front() {
                    let session = StoreSession(self.sessions);
                    self.input(Input::Store { session, message });
                }
            }
            Step::ToStore => self.deliver_to_store(),
            Step::Commit => self.commit(),
            Step::Register => self.register(),
            Step::Renew => {
                self.budget.renewals -= 1;
                self.to_conversion.push_back(FromStore::Renew);
            }
            Step::CrashConversion => self.crash_conversion(),
            Step::CrashStore => {
                self.budget.store_crashes -= 1;
                self.disconnect();
                self.incarnation += 1;
                let incarnation = Incarnation(self.incarnation);
                self.gate = Gate::new(incarnation, BLOCKS, GateLimits::default());
                self.flights.clear();
            }
            Step::Disconnect => {
                self.budget.disconnects -= 1;
                self.disconnect();
            }
            Step::ExpireStore => {
                self.budget.expiries -= 1;
                // The writeback renews in time, the store does not.
                self.pass(u64::from(LEASE_MS) - 1);
                self.renew_writeback();
                self.pass(2);
            }
            Step::ExpireWriteback => {
                self.budget.writeback_expiries -= 1;
                self.pass(u64::from(LEASE_MS) - 1);
                let session = StoreSession(self.sessions);
                self.input(Input::Store { session, message: FromStore::Renew });
                self.pass(2);
            }
            Step::Takeover => {
                self.budget.takeovers -= 1;
                self.writebacks += 1;
                self.hello();
                self.open();
            }
        }
        self.check();
    }

    /// Heals everything and lets time pass: whether nothing is left over. Call it last.
    pub fn heals(&mut self) -> bool {
        for _ in 0..30 {
            if !self.is_connected {
                self.register();
            }
            self.settle();
            if self.machine.is_idle()
                && self.machine.check().is_ok_and(|r| r.quarantined_blocks == 0)
            {
                return self.broken.is_none();
            }
            self.pass(u64::from(LEASE_MS) / 2);
            self.renew_writeback();
            self.to_conversion.push_back(FromStore::Renew);
        }
        false
    }

    /// Delivers and commits until nothing moves. Bios and flights land, too: time passes for all.
    fn settle(&mut self) {
        for _ in 0..100 {
            let step = self.possible().into_iter().find(|step| {
                matches!(step, Step::Land(_) | Step::ToConversion | Step::ToStore | Step::Commit)
            });
            match step {
                Some(step) => self.step(step),
                None => return,
            }
        }
    }

    fn fail(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    fn check(&mut self) {
        match self.machine.check() {
            Ok(report) if report.findings.is_empty() => {}
            Ok(report) => self.fail(format!("{:?}", report.findings)),
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn start_epoch(&mut self) {
        self.epochs += 1;
        let mut out = Output::default();
        let key = TokenKey::new([self.epochs; 32]);
        match self.machine.finish_recovery(key, self.now, &mut out) {
            Ok(()) => self.absorb(out),
            Err(error) => self.fail(error.to_string()),
        }
        self.commit();
    }

    fn crash_conversion(&mut self) {
        self.budget.conversion_crashes -= 1;
        self.disconnect();
        self.journal.truncate(self.durable);
        self.waiting.clear();
        // Clients hear nothing more of what they had begun.
        self.writes.iter_mut().for_each(|write| write.ended = write.ended.or(Some(false)));
        self.machine =
            Machine::recover(limits(self.budget), MemoryTable::new(), Snapshot::new([1; 16]));
        for (seq, record) in &self.journal {
            if let Err(error) = self.machine.apply(*seq, record) {
                self.broken.get_or_insert(error.to_string());
            }
        }
        self.start_epoch();
        self.hello();
    }

    fn session(&self) -> WritebackSession {
        WritebackSession(u64::from(self.epochs) * 100 + self.writebacks)
    }

    fn say(&mut self, message: FromWriteback) {
        let session = self.session();
        self.input(Input::Writeback { session, message });
    }

    fn hello(&mut self) {
        self.say(FromWriteback::Hello { writeback: format!("wb{}", self.writebacks) });
    }

    fn renew_writeback(&mut self) {
        let version = self.machine.volume(VOLUME).map(|volume| volume.map_version);
        let confirms = self.volume.as_ref().zip(version);
        let confirms = confirms.map(|(volume, version)| (volume.id, volume.generation, version));
        self.say(FromWriteback::Renew { confirms: confirms.into_iter().collect() });
    }

    fn open(&mut self) {
        let writeback = format!("wb{}", self.writebacks);
        let (name, if_generation) = (VOLUME.to_owned(), None);
        self.call(Call::OpenVolume {
            name,
            volume: None,
            writeback,
            force: true,
            if_generation,
            reads_log: true,
        });
    }

    fn call(&mut self, call: Call) {
        let reply = ReplyTo(self.journal.len() as u64 + 1000);
        self.input(Input::Call { reply, call });
        self.commit();
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus(ms);
        self.input(Input::Tick);
    }

    fn begin(&mut self) {
        let Some(volume) = &self.volume else { return };
        let lblk = Lblk(TARGETS[self.begun]);
        let begin = BeginIo {
            request: self.begun as u64,
            volume: volume.id,
            generation: volume.generation,
            lane: Lane::Direct,
            lblk,
            blocks: 1,
            more: Vec::new(),
            size_after_bytes: 0,
            avoid_stores: Vec::new(),
            attempt: 1,
            traceparent: String::new(),
            sync: false,
            logged_up_to: 0,
        };
        // Granted or refused, that is decided at once: a refused one may be tried again later.
        self.begun += 1;
        let before = self.writes.len();
        self.say(FromWriteback::Begin(begin));
        if self.writes.len() == before {
            self.begun -= 1;
        }
    }

    fn submit(&mut self, at: usize, abort: bool) {
        self.writes[at].is_released = true;
        let token = self.writes[at].submitter;
        self.say(FromWriteback::Release { token, not_submitted: Vec::new(), abort });
    }

    /// The driver: a message, then what follows from it.
    fn input(&mut self, input: Input) {
        let mut out = Output::default();
        if let Err(error) = self.machine.handle(self.now, input, &mut out) {
            return self.fail(error.to_string());
        }
        for _ in 0..100 {
            if !self.machine.has_work() {
                break;
            }
            if let Err(error) = self.machine.drain(self.now, &mut out) {
                return self.fail(error.to_string());
            }
        }
        self.absorb(out);
    }

    fn absorb(&mut self, out: Output) {
        self.journal.extend(out.records);
        self.waiting.extend(out.effects);
        self.deliver();
    }

    fn commit(&mut self) {
        self.durable = self.journal.len();
        if let Err(error) = self.machine.committed(self.durable as u64) {
            return self.fail(error.to_string());
        }
        self.input(Input::Tick);
    }

    fn deliver(&mut self) {
        let durable = self.durable as u64;
        for effect in std::mem::take(&mut self.waiting) {
            match effect.after {
                Durability::Committed(seq) if seq > durable => self.waiting.push(effect),
                _ => self.leave(effect.kind),
            }
        }
    }

    fn leave(&mut self, kind: EffectKind) {
        match kind {
            // The session may have broken meanwhile; then nobody gets it.
            EffectKind::Store(session, message)
                if self.is_connected && session.0 == self.sessions =>
            {
                self.to_store.push_back(message);
            }
            EffectKind::EndStore(session) if session.0 == self.sessions => self.disconnect(),
            EffectKind::Writeback(_, ToWriteback::Begun { submitter, segments, .. }) => {
                for segment in segments {
                    self.granted(segment.token);
                }
                self.writes.push(Write { submitter, is_released: false, ended: None });
            }
            EffectKind::Writeback(_, ToWriteback::Completion(done)) => self.completed(&done),
            EffectKind::Reply(_, Ok(ReplyBody::Opened(volume, ..))) => self.volume = Some(volume),
            _ => {}
        }
    }

    fn granted(&mut self, token: Token) {
        if self.owner.insert(token.pblk.0, token.io_end).is_some() {
            self.reuses += 1;
        }
        self.bios.push((token, self.budget.duplicates));
    }

    /// A completion: the only one of its io_end, and a success only if everything has landed.
    fn completed(&mut self, done: &Completion) {
        let Some(write) = self.writes.iter_mut().find(|w| w.submitter.io_end == done.io_end) else {
            return self.fail(format!("io_end {} completed and never began", done.io_end));
        };
        if write.ended.is_some() {
            return self.fail(format!("io_end {} ended twice", done.io_end));
        }
        write.ended = Some(done.failed.is_none());
        if done.failed.is_some() {
            return;
        }
        self.converted += 1;
        if !self.platter.values().any(|io_end| *io_end == done.io_end) {
            self.fail(format!("io_end {} converted and was not durable", done.io_end));
        }
    }

    fn bio(&mut self, at: usize) {
        let (token, left) = self.bios[at];
        match left {
            0 => drop(self.bios.remove(at)),
            _ => self.bios[at].1 -= 1,
        }
        // The store's clock stands still: its lease never ends for it.
        let admitted = self.gate.admit_bio(Millis(0), &token, BLOCK_BYTES);
        if let Ok(Admit::Write(flight)) = admitted {
            if self.plant == Some(Plant::ReleasedEarly) {
                self.release(token);
            }
            self.flights.push((flight, token));
        }
    }

    fn land(&mut self, at: usize) {
        let (flight, token) = self.flights.remove(at);
        let block = token.pblk.0;
        if self.owner.get(&block) != Some(&token.io_end) {
            let owner = self.owner.get(&block);
            self.fail(format!("io_end {} wrote block {block} of {owner:?}", token.io_end));
        }
        self.platter.insert(block, token.io_end);
        let cleared = self.gate.finish(flight, Ok(()));
        if self.gate.epoch() == Some(token.epoch) && self.plant != Some(Plant::ReleasedEarly) {
            self.release(token);
        }
        self.cleared(cleared);
    }

    fn release(&mut self, token: Token) {
        if self.is_connected {
            let outcome = SegmentOutcome::Durable(vec![7; token.blocks as usize]);
            self.to_conversion.push_back(FromStore::Release { token, outcome });
        }
    }

    fn cleared(&mut self, cleared: Vec<Cleared>) {
        for cleared in cleared {
            let message = match cleared {
                Cleared::Fence(fence) => FromStore::FenceDone { fence },
                Cleared::Epoch(epoch) => FromStore::Ready { epoch },
                Cleared::Punched(punch) => FromStore::PunchDone { punch },
                Cleared::Punch(turn) => {
                    let more = self.gate.punched(&turn);
                    self.cleared(more);
                    FromStore::PunchDone { punch: turn.punch }
                }
            };
            if self.is_connected {
                self.to_conversion.push_back(message);
            }
        }
    }

    fn register(&mut self) {
        self.sessions += 1;
        self.is_connected = true;
        self.to_conversion.push_back(FromStore::Register {
            uuid: [1; 16],
            incarnation: Incarnation(self.incarnation),
            capacity_blocks: BLOCKS,
            url: "memory:store".to_owned(),
            name: None,
        });
    }

    fn disconnect(&mut self) {
        if !self.is_connected {
            return;
        }
        self.is_connected = false;
        self.to_store.clear();
        self.to_conversion.clear();
        let session = StoreSession(self.sessions);
        self.input(Input::StoreLost { session });
    }

    fn deliver_to_store(&mut self) {
        let Some(message) = self.to_store.pop_front() else { return };
        match message {
            ToStore::Registered { store, epoch, key, lease_ms, floor } => {
                let registration = Registration {
                    store,
                    epoch,
                    key,
                    lease_ms: lease_ms.into(),
                    io_end_floor: floor,
                };
                let registered = self.gate.register(Millis(0), registration);
                let mut cleared = registered.unwrap_or_default();
                if self.plant == Some(Plant::EpochUndrained) && cleared.is_empty() {
                    cleared.push(Cleared::Epoch(epoch));
                }
                self.cleared(cleared);
            }
            ToStore::Renewed { lease_ms, floor } => {
                self.gate.renewed(Millis(0), lease_ms.into(), floor);
            }
            ToStore::Fence { fence, io_ends, volumes } => {
                if self.plant == Some(Plant::FencesUnheeded) {
                    return self.cleared(vec![Cleared::Fence(fence)]);
                }
                if let Ok(cleared) = self.gate.fence(fence, &io_ends, &volumes) {
                    self.cleared(cleared);
                }
            }
            ToStore::Punch { punch, .. } if self.plant == Some(Plant::EpochUndrained) => {
                self.to_conversion.push_back(FromStore::PunchDone { punch });
            }
            ToStore::Punch { punch, ranges } => {
                if let Ok(cleared) = self.gate.punch(punch, ranges) {
                    self.cleared(cleared);
                }
            }
            ToStore::SessionRefused(_) | ToStore::Released { .. } => {}
        }
    }
}
