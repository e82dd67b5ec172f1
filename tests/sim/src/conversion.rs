//! The conversion node: the real machine, driven in the order of the real driver.
//!
//! The journal is a model: records are on disk once their group's flush has ended; a kill or a power
//! cut keeps any prefix that is not shorter. Recovery begins at the newest checkpoint that is not
//! ahead of what was durable, with chunks that may be newer than its small state.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use endio_state_machine::extent_map::MemoryTable;
use endio_state_machine::machine::{
    Call, Durability, Effect, EffectKind, FromStore, Input, Machine, MapView, Output, Refusal,
    ReplyTo, SegmentOutcome, StoreSession, ToWriteback, WritebackSession,
};
use endio_state_machine::record::{Record, Seq, Snapshot};
use endio_state_machine::token::TokenKey;
use endio_types::{ClusterEpoch, LblkRange};

use crate::block::from_bytes;
use crate::exec::{MS, Node, Signal};
use crate::mirror::Mirror;
use crate::net::{End, Kind, Message, Sent};
use crate::world::{Planted, World};

/// What survives the process.
#[derive(Default)]
pub struct Disk {
    /// All records that were written; the first `durable` are flushed.
    pub journal: Vec<(Seq, Record)>,
    /// How many are flushed.
    pub durable: usize,
    /// Small state, chunks, and the record that must be durable for the chunks to count.
    checkpoint: Option<(Snapshot, MemoryTable, Seq)>,
    /// The newest epoch that anybody was told.
    pub epoch_told: ClusterEpoch,
}

enum Event {
    Input(Input),
    Call(Call, Sent, Rc<End>),
    OpenWriteback(WritebackSession, Rc<End>),
    OpenStore(StoreSession, Rc<End>),
    Ask(Message, Rc<End>),
}

enum Waiting {
    Effect(EffectKind),
    View(Result<MapView, Refusal>, Rc<End>),
    /// An answer that shows what the newest record made of a volume.
    Answer(Message, Rc<End>),
}

/// One life of the process.
pub struct Process {
    /// The machine.
    pub machine: Machine<MemoryTable>,
    out: Output,
    inbox: VecDeque<Event>,
    writebacks: BTreeMap<WritebackSession, Rc<End>>,
    stores: BTreeMap<StoreSession, Rc<End>>,
    calls: BTreeMap<ReplyTo, Rc<End>>,
    now: Vec<Waiting>,
    waiting: VecDeque<(Seq, Waiting)>,
    next_id: u64,
    pending_checkpoint: Option<Snapshot>,
    /// A graceful stop was asked for.
    stopping: bool,
    /// Whether the metadata disk is said to be full.
    pub metadata_full: bool,
    told_full: bool,
}

/// The node.
pub struct Conversion {
    /// Its number.
    pub node: Node,
    /// What survives.
    pub disk: RefCell<Disk>,
    /// The process, while it runs.
    pub process: RefCell<Option<Process>>,
    /// Inputs came, or records became durable.
    changed: Signal,
    /// Records wait for the disk.
    wanted: Signal,
}

impl Conversion {
    /// A node that has never run.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            disk: RefCell::default(),
            process: RefCell::default(),
            changed: Signal::default(),
            wanted: Signal::default(),
        }
    }

    fn push(&self, event: Event) {
        if let Some(process) = &mut *self.process.borrow_mut() {
            process.inbox.push_back(event);
        }
        self.changed.notify();
    }

    fn next_id(&self) -> u64 {
        self.process.borrow_mut().as_mut().map_or(0, |process| {
            process.next_id += 1;
            process.next_id
        })
    }

    /// Asks for a graceful stop.
    pub fn stop(&self) {
        if let Some(process) = &mut *self.process.borrow_mut() {
            process.stopping = true;
            process.inbox.push_back(Event::Input(Input::StopIntake));
        }
        self.changed.notify();
    }

    /// Whether a stop was asked for, of a process that still runs.
    pub fn is_stopping(&self) -> bool {
        self.process.borrow().as_ref().is_some_and(|process| process.stopping)
    }

    /// The metadata disk fills up, or has room again.
    pub fn set_full(&self, full: bool) {
        if let Some(process) = &mut *self.process.borrow_mut() {
            process.metadata_full = full;
        }
        self.changed.notify();
    }
}

/// The process is gone; the journal keeps what the disk had, and perhaps more.
pub fn died(world: &World) {
    let conversion = &world.conversion;
    *conversion.process.borrow_mut() = None;
    let mut disk = conversion.disk.borrow_mut();
    let more = (disk.journal.len() - disk.durable) as u64;
    let kept = disk.durable + world.exec.below(more + 1) as usize;
    disk.journal.truncate(kept);
    disk.durable = kept;
    let durable = disk.journal.last().map_or(0, |(seq, _)| *seq);
    if disk.checkpoint.as_ref().is_some_and(|(_, _, needs)| *needs > durable) {
        disk.checkpoint = None;
    }
}

/// Starts the process: recovery, a new epoch, and then the loop.
pub fn start(world: &Rc<World>) {
    let conversion = &world.conversion;
    let node = conversion.node;
    world.exec.start(node);
    let process = match recover(world) {
        Ok(process) => process,
        Err(why) => return world.exec.fail(format!("recovery: {why}")),
    };
    world.exec.note("conversion up", node, &[process.machine.epoch().0]);
    *conversion.process.borrow_mut() = Some(process);
    let accepting = Rc::clone(world);
    world.net.listen(node, move |kind, _, end| accept(&accepting, kind, end));
    let life = world.exec.life(node);
    for step in [0, 1] {
        let world = Rc::clone(world);
        let exec = world.exec.clone();
        exec.spawn(node, async move {
            match step {
                0 => run(world, life).await,
                _ => commit(world).await,
            }
        });
    }
}

fn recover(world: &World) -> Result<Process, String> {
    let conversion = &world.conversion;
    let disk = conversion.disk.borrow();
    let (snapshot, table) = match &disk.checkpoint {
        Some((snapshot, table, _)) => (snapshot.clone(), table.clone()),
        None => (Snapshot::new([1; 16]), MemoryTable::new()),
    };
    let from = snapshot.seq;
    let mut machine = Machine::recover(world.plan.limits.clone(), table, snapshot);
    let mut mirror = Mirror::default();
    for (seq, record) in &disk.journal {
        mirror.apply(*seq, record)?;
        if *seq > from {
            machine.apply(*seq, record).map_err(|error| error.to_string())?;
        }
    }
    mirror.logs().compare(&machine.snapshot().logs)?;
    *world.settled.borrow_mut() = mirror.clone();
    *world.mirror.borrow_mut() = mirror;
    let mut key = [0; 32];
    for byte in &mut key {
        *byte = world.exec.below(256) as u8;
    }
    let mut out = Output::default();
    let now = world.exec.clock(conversion.node);
    machine
        .finish_recovery(TokenKey::new(key), now, &mut out)
        .map_err(|error| error.to_string())?;
    if machine.epoch() <= disk.epoch_told {
        return Err(format!(
            "epochs_never_regress: epoch {} after {}",
            machine.epoch(),
            disk.epoch_told
        ));
    }
    Ok(Process {
        machine,
        out,
        inbox: VecDeque::new(),
        writebacks: BTreeMap::new(),
        stores: BTreeMap::new(),
        calls: BTreeMap::new(),
        now: Vec::new(),
        waiting: VecDeque::new(),
        next_id: 0,
        pending_checkpoint: None,
        stopping: false,
        metadata_full: false,
        told_full: false,
    })
}

/// A stream was opened to conversion: a task reads it into the driver's queue.
fn accept(world: &Rc<World>, kind: Kind, end: End) {
    let end = Rc::new(end);
    let world = Rc::clone(world);
    let exec = world.exec.clone();
    exec.spawn(world.conversion.node, async move {
        let conversion = &world.conversion;
        match kind {
            Kind::Writeback => {
                let session = WritebackSession(conversion.next_id());
                conversion.push(Event::OpenWriteback(session, Rc::clone(&end)));
                while let Some(message) = end.receive().await {
                    let Message::FromWriteback(message) = message else { continue };
                    conversion.push(Event::Input(Input::Writeback { session, message }));
                }
                conversion.push(Event::Input(Input::WritebackLost { session }));
            }
            Kind::Store => {
                let session = StoreSession(conversion.next_id());
                conversion.push(Event::OpenStore(session, Rc::clone(&end)));
                while let Some(message) = end.receive().await {
                    let Message::FromStore(message) = message else { continue };
                    conversion.push(Event::Input(Input::Store { session, message }));
                }
                conversion.push(Event::Input(Input::StoreLost { session }));
            }
            Kind::Unary => match end.receive().await {
                Some(Message::Call(call, sent)) => {
                    conversion.push(Event::Call(call, sent, end));
                }
                Some(message) => conversion.push(Event::Ask(message, end)),
                None => {}
            },
            Kind::Bios | Kind::Reads => {}
        }
    });
}

/// The thread that makes groups durable.
async fn commit(world: Rc<World>) {
    let conversion = &world.conversion;
    loop {
        let target = conversion
            .wanted
            .wait(|| {
                let disk = conversion.disk.borrow();
                (disk.journal.len() > disk.durable).then_some(disk.journal.len())
            })
            .await;
        world.exec.sleep(world.plan.journal_us.draw(&world.exec)).await;
        let mut disk = conversion.disk.borrow_mut();
        let from = std::mem::replace(&mut disk.durable, target);
        let mut settled = world.settled.borrow_mut();
        for (seq, record) in &disk.journal[from..target] {
            if let Err(why) = settled.apply(*seq, record) {
                world.exec.fail(why);
            }
        }
        drop((disk, settled));
        conversion.changed.notify();
    }
}

/// The driver's loop.
async fn run(world: Rc<World>, life: u64) {
    let conversion = &world.conversion;
    let mut stop_by = None;
    loop {
        let wake = wake_at(&world);
        let seen = conversion.disk.borrow().durable;
        let look = || {
            let process = conversion.process.borrow();
            let news = process.as_ref().is_none_or(|process| !process.inbox.is_empty());
            (news || conversion.disk.borrow().durable > seen).then_some(())
        };
        if wake > world.exec.now() {
            world.exec.until(wake, conversion.changed.wait(look)).await;
        } else {
            // One turn ends before the next begins, for others too.
            world.exec.sleep(5).await;
        }
        if !world.exec.is_alive(conversion.node, life) {
            return;
        }
        if let Err(why) = turn(&world) {
            return world.exec.fail(why);
        }
        let mut guard = conversion.process.borrow_mut();
        let Some(process) = &mut *guard else { return };
        if process.stopping {
            let by = *stop_by.get_or_insert(world.exec.now() + world.plan.drain_ms * MS);
            let late = world.exec.now() >= by;
            if late && !process.machine.is_idle() {
                process.inbox.push_back(Event::Input(Input::AbortAll));
            } else if process.machine.is_idle() && process.waiting.is_empty() {
                drop(guard);
                world.exec.note("conversion stopped", conversion.node, &[]);
                // Whoever stops it starts it again.
                return;
            }
        }
    }
}

fn wake_at(world: &World) -> u64 {
    let conversion = &world.conversion;
    let process = conversion.process.borrow();
    let Some(process) = &*process else { return u64::MAX };
    let idle = world.exec.now() + 500 * MS;
    if process.machine.has_work() || !process.inbox.is_empty() {
        return world.exec.now();
    }
    match process.machine.next_deadline() {
        Some(at) => {
            let left = at.since(world.exec.clock(conversion.node));
            idle.min(world.exec.now() + (left * MS).max(50))
        }
        None => idle,
    }
}

/// One turn: everything that waits, then what follows from it.
fn turn(world: &World) -> Result<(), String> {
    let conversion = &world.conversion;
    let mut guard = conversion.process.borrow_mut();
    let Some(process) = &mut *guard else { return Ok(()) };
    let fault = |error: &dyn std::error::Error| format!("the machine stopped: {error}");
    let now = world.exec.clock(conversion.node);
    let durable = durable_seq(&conversion.disk.borrow());
    process.machine.committed(durable).map_err(|error| fault(&error))?;
    if process.metadata_full != process.told_full {
        process.told_full = process.metadata_full;
        process.inbox.push_front(Event::Input(Input::MetadataFull(process.told_full)));
    }
    if process.machine.next_deadline().is_some_and(|at| at <= now) {
        process.machine.handle(now, Input::Tick, &mut process.out).map_err(|e| fault(&e))?;
    }
    for _ in 0..world.plan.inputs_per_turn {
        let Some(event) = process.inbox.pop_front() else { break };
        process.event(world, event)?;
    }
    if process.machine.has_work() {
        process.machine.drain(now, &mut process.out).map_err(|error| fault(&error))?;
    }
    process.settle(world, durable)?;
    process.step_checkpoint(world);
    if world.exec.chance(world.plan.check_permille) {
        let report = process.machine.check().map_err(|error| fault(&error))?;
        if let Some(finding) = report.findings.first() {
            return Err(format!("space_adds_up: {finding}"));
        }
        world.mirror.borrow().logs().compare(&process.machine.snapshot().logs)?;
    }
    Ok(())
}

fn durable_seq(disk: &Disk) -> Seq {
    disk.durable.checked_sub(1).map_or(0, |last| disk.journal[last].0)
}

impl Process {
    fn event(&mut self, world: &World, event: Event) -> Result<(), String> {
        match event {
            Event::Input(input) => {
                match &input {
                    Input::WritebackLost { session } => drop(self.writebacks.remove(session)),
                    Input::StoreLost { session } => drop(self.stores.remove(session)),
                    Input::Store { message, .. } => note_release(world, message),
                    _ => {}
                }
                self.feed(world, input)
            }
            Event::Call(call, sent, end) => {
                self.next_id += 1;
                let reply = ReplyTo(self.next_id);
                self.calls.insert(reply, end);
                world.exec.tell(world.conversion.node, || format!("call {call:?}"));
                let named = match &call {
                    Call::CreateVolume { name, .. }
                    | Call::ResizeVolume { name, .. }
                    | Call::DeleteVolume { name, .. }
                    | Call::OpenVolume { name, .. }
                    | Call::CloseVolume { name, .. } => self.machine.volume(name).map(|v| v.id),
                    Call::ChangeMap { .. } => None,
                };
                let may = world.takes(&call, named, sent);
                self.feed(world, Input::Call { reply, call })?;
                let is_refused = |effect: &Effect| matches!(&effect.kind, EffectKind::Reply(to, Err(_)) if *to == reply);
                if self.out.effects.iter().any(is_refused) { Ok(()) } else { may }
            }
            Event::OpenWriteback(session, end) => {
                self.writebacks.insert(session, end);
                Ok(())
            }
            Event::OpenStore(session, end) => {
                self.stores.insert(session, end);
                Ok(())
            }
            Event::Ask(Message::Lookup(_, _, LblkRange { len: 0, .. }, 0), _) => {
                Err("MALFORMED: a look-up of no blocks".to_owned())
            }
            Event::Ask(Message::Lookup(volume, generation, range, over), end) => {
                if let Err(refusal) = self.machine.attempts_over(volume, generation, over) {
                    self.answer(Message::View(Err(refusal)), end);
                    return Ok(());
                }
                let view = self.machine.lookup(volume, generation, range);
                match view.map_err(|error| error.to_string())? {
                    Ok(view) => self.wait(view.seq, Waiting::View(Ok(view), end)),
                    Err(refusal) => self.answer(Message::View(Err(refusal)), end),
                }
                Ok(())
            }
            Event::Ask(Message::ReadLog(volume, generation, from), end) => {
                let most = world.plan.log_read_blocks;
                let logged = self.machine.logged(volume, generation, from, most);
                self.answer(Message::InLog(logged), end);
                Ok(())
            }
            Event::Ask(Message::Owner(name), end) => {
                let volume = self.machine.volume(&name);
                let owner = volume.map(|volume| (volume.id, volume.owner, volume.generation));
                self.answer(Message::Owned(owner), end);
                Ok(())
            }
            Event::Ask(Message::Deletions, end) => {
                end.send(Message::Deleted(self.machine.deletions()));
                Ok(())
            }
            Event::Ask(..) => Ok(()),
        }
    }

    /// Whoever hears that a volume is somebody else's lets go of what it has acknowledged: only when that is
    /// durable.
    fn answer(&mut self, message: Message, end: Rc<End>) {
        self.wait(self.machine.seq(), Waiting::Answer(message, end));
    }

    fn feed(&mut self, world: &World, input: Input) -> Result<(), String> {
        let now = world.exec.clock(world.conversion.node);
        let fed = self.machine.handle(now, input, &mut self.out);
        fed.map_err(|error| format!("the machine stopped: {error}"))
    }

    fn settle(&mut self, world: &World, durable: Seq) -> Result<(), String> {
        let conversion = &world.conversion;
        if !self.out.records.is_empty() {
            let mut disk = conversion.disk.borrow_mut();
            for (seq, record) in self.out.records.drain(..) {
                world.exec.note("record", conversion.node, &[seq, kind_of(&record)]);
                world.exec.tell(conversion.node, || format!("record {seq} {}", words(&record)));
                world.before_record(&record)?;
                world.mirror.borrow_mut().apply(seq, &record)?;
                disk.journal.push((seq, record));
            }
            conversion.wanted.notify();
        }
        self.out.batches.clear();
        for Effect { after, kind } in std::mem::take(&mut self.out.effects) {
            match after {
                Durability::Now => self.now.push(Waiting::Effect(kind)),
                Durability::Committed(seq) => self.wait(seq, Waiting::Effect(kind)),
            }
        }
        for waiting in std::mem::take(&mut self.now) {
            self.send(world, waiting);
        }
        let is_early = world.planted(Planted::ConversionSendsEarly);
        while self.waiting.front().is_some_and(|(seq, _)| *seq <= durable || is_early) {
            let Some((_, waiting)) = self.waiting.pop_front() else { break };
            self.send(world, waiting);
        }
        Ok(())
    }

    fn wait(&mut self, seq: Seq, waiting: Waiting) {
        let seq = self.waiting.back().map_or(seq, |(last, _)| seq.max(*last));
        self.waiting.push_back((seq, waiting));
    }

    fn send(&mut self, world: &World, waiting: Waiting) {
        let kind = match waiting {
            Waiting::Effect(kind) => kind,
            Waiting::View(view, end) => return end.send(Message::View(view)),
            Waiting::Answer(message, end) => return end.send(message),
        };
        match kind {
            EffectKind::Reply(to, body) => {
                if let Some(end) = self.calls.remove(&to) {
                    end.send(Message::Reply(body));
                }
            }
            EffectKind::Writeback(session, message) => {
                world.told_writeback(&message);
                if let ToWriteback::Refused { refusal, .. } = &message {
                    let now = world.exec.clock(world.conversion.node);
                    world.exec.tell(world.conversion.node, || {
                        let stores = self.machine.stores(now);
                        let rooms = stores.iter().map(|store| {
                            let (free, waits) = (store.free_blocks, store.quarantined_blocks);
                            let live = if store.live { "" } else { ", away" };
                            format!("{}: {free} free, {waits} in quarantine{live}", store.id)
                        });
                        let rooms: Vec<_> = rooms.collect();
                        format!("refuses: {}; {}", refusal.message, rooms.join("; "))
                    });
                }
                if let Some(end) = self.writebacks.get(&session) {
                    end.send(Message::ToWriteback(message));
                }
            }
            EffectKind::Store(session, message) => {
                world.told_store(&message);
                if let Some(end) = self.stores.get(&session) {
                    end.send(Message::ToStore(message));
                }
            }
            EffectKind::EndWriteback(session) => {
                self.writebacks.remove(&session).iter().for_each(|end| end.close());
            }
            EffectKind::EndStore(session) => {
                self.stores.remove(&session).iter().for_each(|end| end.close());
            }
            EffectKind::ConversionFailed { why, .. } => {
                world.exec.fail(format!("conversions_succeed: {why}"));
            }
        }
    }

    /// A fuzzy checkpoint: the small state first, the chunks some turns later.
    fn step_checkpoint(&mut self, world: &World) {
        if let Some(snapshot) = self.pending_checkpoint.take_if(|_| world.exec.chance(300)) {
            let needs = self.machine.seq();
            let table = self.machine.table_mut().clone();
            world.conversion.disk.borrow_mut().checkpoint = Some((snapshot, table, needs));
        } else if self.pending_checkpoint.is_none() && world.exec.chance(10) {
            self.pending_checkpoint = Some(self.machine.snapshot());
        }
    }
}

fn note_release(world: &World, message: &FromStore) {
    if let FromStore::Release { token, outcome } = message {
        let durable = matches!(outcome, SegmentOutcome::Durable(_));
        let details = [token.io_end.0, token.segment.0.into(), durable.into()];
        world.exec.note("release", world.conversion.node, &details);
    }
}

fn kind_of(record: &Record) -> u64 {
    match record {
        Record::Epoch(_) => 1,
        Record::CreateVolume(_) => 2,
        Record::OpenVolume { .. } => 3,
        Record::CloseVolume { .. } => 4,
        Record::Resize { .. } => 5,
        Record::DeleteVolume { .. } => 6,
        Record::ForgetVolume { .. } => 7,
        Record::Reserve { .. } => 8,
        Record::Store(_) => 9,
        Record::Convert(_) => 10,
        Record::Unmap { .. } => 11,
        Record::Allocate { .. } => 12,
        Record::Zero { .. } => 13,
        Record::Restored { .. } => 14,
        Record::StoreNamed { .. } => 15,
        Record::Log { .. } => 16,
        Record::ConvertLogged { .. } => 17,
        Record::ForgetLogged { .. } => 18,
    }
}

/// Without the bytes of blocks.
fn words(record: &Record) -> String {
    match record {
        Record::Log { volume, generation, number, entries, data } => {
            let blocks = from_bytes(data);
            let blocks = entries.iter().zip(&blocks).map(|(e, b)| (e.lblk.0, e.stamp, b));
            let blocks: Vec<_> = blocks.collect();
            format!("Log {number} of {volume} under {generation}: {blocks:x?}")
        }
        record => format!("{record:?}"),
    }
}

/// The whole of a volume.
pub const WHOLE: LblkRange = LblkRange { start: endio_types::Lblk(0), len: 1 << 40 };
