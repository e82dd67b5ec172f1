//! A block-store node: the real gate and the real tracking of failed flushes, driven in the order of
//! the real driver, with its outbox and its session.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use endio_state_machine::gate::{Admit, Cleared, FlightId, Gate, Outcome, PunchTurn, Registration};
use endio_state_machine::machine::{FromStore, SegmentOutcome, ToStore};
use endio_state_machine::token::{ReadGrant, Token};
use endio_store::block::{TrackedDevice, WriteTicket};
use endio_types::{
    BLOCK_BYTES, BLOCK_SIZE, ClusterEpoch, Generation, Incarnation, IoEndId, Millis, Pblk,
    PblkRange, Reason, SegmentIndex, StoreId, VolumeId,
};

use crate::block::{self, Block};
use crate::device::SimDevice;
use crate::exec::{Either, MS, Node, Signal, either};
use crate::net::{End, Kind, Message};
use crate::world::{Planted, World};

type Key = (IoEndId, SegmentIndex);

/// A segment on its way to the disk.
struct Written {
    flight: FlightId,
    token: Token,
    crcs: Vec<u32>,
    ticket: WriteTicket,
    reply: Reply,
}

/// How much of a stream is under way; what goes beyond waits in the stream.
#[derive(Default)]
struct Budget {
    used: Cell<usize>,
    freed: Signal,
}

/// One bio or read under way.
struct Share(Rc<Budget>);

/// Where the answer to a bio goes.
struct Reply {
    end: Rc<End>,
    _share: Share,
}

impl Budget {
    async fn share(self: &Rc<Self>, most: usize) -> Share {
        self.freed.wait(|| (self.used.get() < most).then_some(())).await;
        self.used.set(self.used.get() + 1);
        Share(Rc::clone(self))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.used.set(self.0.used.get() - 1);
        self.0.freed.notify();
    }
}

impl Reply {
    fn send(&self, message: Message) {
        self.end.send(message);
    }
}

/// What was taken in of fences and epochs, remembered for ever and judged simply.
#[derive(Default)]
struct Fenced {
    epoch: ClusterEpoch,
    floor: IoEndId,
    io_ends: BTreeSet<IoEndId>,
    volumes: BTreeMap<VolumeId, Generation>,
    written: BTreeSet<Key>,
}

enum Item {
    Release(Key),
    Fence(u64),
    Punch(u64),
}

/// One life of the process.
struct Process {
    incarnation: Incarnation,
    gate: Gate,
    device: TrackedDevice,
    queue: VecDeque<Item>,
    unanswered: BTreeMap<Key, FromStore>,
    repeats: BTreeMap<FlightId, Vec<Reply>>,
    is_ready_due: bool,
    written: Vec<Written>,
    fenced: Fenced,
}

/// The node.
pub struct Store {
    /// Its number.
    pub node: Node,
    /// Its disk.
    pub disk: SimDevice,
    capacity: u64,
    incarnation: Cell<u64>,
    process: RefCell<Option<Process>>,
    changed: Signal,
    flushable: Signal,
}

impl Store {
    /// A node that has never run.
    pub fn new(node: Node, disk: SimDevice, capacity: u64) -> Self {
        Self {
            node,
            disk,
            capacity,
            incarnation: Cell::new(0),
            process: RefCell::default(),
            changed: Signal::default(),
            flushable: Signal::default(),
        }
    }

    /// Its identity.
    pub fn uuid(&self) -> [u8; 16] {
        [self.node as u8; 16]
    }

    /// The process is gone.
    pub fn died(&self) {
        *self.process.borrow_mut() = None;
    }

    fn with<T>(&self, act: impl FnOnce(&mut Process) -> T) -> Option<T> {
        self.process.borrow_mut().as_mut().map(act)
    }
}

/// Starts the process under a new incarnation.
pub fn start(world: &Rc<World>, at: usize) {
    let store = &world.stores[at];
    world.exec.start(store.node);
    store.incarnation.set(store.incarnation.get() + 1);
    let incarnation = Incarnation(store.incarnation.get());
    *store.process.borrow_mut() = Some(Process {
        incarnation,
        gate: Gate::new(incarnation, store.capacity, world.plan.gate),
        device: TrackedDevice::new(Arc::new(store.disk.clone())),
        queue: VecDeque::new(),
        unanswered: BTreeMap::new(),
        repeats: BTreeMap::new(),
        is_ready_due: false,
        written: Vec::new(),
        fenced: Fenced::default(),
    });
    world.exec.note("store up", store.node, &[incarnation.0]);
    let accepting = Rc::clone(world);
    world.net.listen(store.node, move |kind, _, end| accept(&accepting, at, kind, end));
    let (one, two) = (Rc::clone(world), Rc::clone(world));
    world.exec.spawn(store.node, async move { session(one, at).await });
    world.exec.spawn(store.node, async move { flush(two, at).await });
}

fn accept(world: &Rc<World>, at: usize, kind: Kind, end: End) {
    let end = Rc::new(end);
    let world = Rc::clone(world);
    let exec = world.exec.clone();
    exec.spawn(world.stores[at].node, async move {
        let budget = Rc::<Budget>::default();
        // A stream alone never meets the bound of all streams.
        let most = world.plan.gate.in_flight_max.div_ceil(2);
        while let Some(message) = end.receive().await {
            let share = budget.share(most).await;
            match (kind, message) {
                (Kind::Bios, Message::Bio { token, data, crcs }) => {
                    let reply = Reply { end: Rc::clone(&end), _share: share };
                    bio(&world, at, token, data, crcs, reply);
                }
                (Kind::Reads, Message::Read { request, grant, pblk, blocks, crcs }) => {
                    let (world, end) = (Rc::clone(&world), Rc::clone(&end));
                    let exec = world.exec.clone();
                    exec.spawn(world.stores[at].node, async move {
                        let range = PblkRange::new(pblk.0, blocks);
                        let done = read(&world, at, grant, range, &crcs).await;
                        end.send(Message::ReadDone(request, done));
                        drop(share);
                    });
                }
                _ => {}
            }
        }
    });
}

fn bio(world: &Rc<World>, at: usize, token: Token, data: Vec<Block>, crcs: Vec<u32>, reply: Reply) {
    let store = &world.stores[at];
    let now = world.exec.clock(store.node);
    let bytes = data.len() as u64 * BLOCK_BYTES;
    let Some(admitted) = store.with(|process| {
        let admitted = process.gate.admit_bio(now, &token, bytes);
        if matches!(admitted, Ok(Admit::Write(_)))
            && let Err(why) = process.fenced.admits(&token, process.incarnation)
        {
            world.exec.fail(format!("fenced_is_refused: {why}: {token:?}"));
        }
        admitted
    }) else {
        return;
    };
    let flight = match admitted {
        Ok(Admit::Write(flight)) => flight,
        Ok(Admit::Repeat(outcome)) => return reply.send(Message::BioDone(token, outcome)),
        Ok(Admit::Pending(flight)) => {
            store.with(|process| process.repeats.entry(flight).or_default().push(reply));
            return;
        }
        Err(reason) => {
            let details = [token.io_end.0, token.segment.0.into(), reason as u64];
            world.exec.note("bio refused", store.node, &details);
            return reply.send(Message::BioDone(token, Err(reason)));
        }
    };
    world.exec.note("bio", store.node, &[token.io_end.0, token.segment.0.into(), token.pblk.0]);
    if block::crcs(&data) != crcs {
        return finish(world, at, flight, token, crcs, reply, Err(Reason::ChecksumMismatch));
    }
    let world = Rc::clone(world);
    let exec = world.exec.clone();
    exec.spawn(store.node, async move {
        let store = &world.stores[at];
        world.exec.sleep(world.plan.write_us.draw(&world.exec)).await;
        world.exec.sleep(hang(&world)).await;
        for block in token.pblk.0..token.pblk.0 + u64::from(token.blocks) {
            if let Err(why) = world.may_land(token.volume, (token.store, block)) {
                let (io_end, id) = (token.io_end, token.store);
                let where_to = format!("io_end {io_end} lands on {id}:{block}");
                world.exec.fail(format!("reuse-after-safe: {where_to} {why}"));
            }
        }
        let bytes = block::to_bytes(&data);
        let result = store.with(|process| process.device.write_at(token.pblk, &bytes));
        match result {
            Some(Ok(ticket)) => {
                store.with(|process| {
                    process.written.push(Written { flight, token, crcs, ticket, reply });
                });
                store.flushable.notify();
            }
            Some(Err(error)) => {
                let full = error.kind() == std::io::ErrorKind::StorageFull;
                let reason = if full { Reason::NoSpace } else { Reason::IoError };
                finish(&world, at, flight, token, crcs, reply, Err(reason));
            }
            None => {}
        }
    });
}

/// The thread that makes groups durable.
async fn flush(world: Rc<World>, at: usize) {
    let store = &world.stores[at];
    loop {
        let look = || {
            let group = store.with(|process| std::mem::take(&mut process.written));
            group.filter(|group| !group.is_empty())
        };
        let group = store.flushable.wait(look).await;
        world.exec.sleep(world.plan.flush_us.draw(&world.exec)).await;
        let Some(result) = store.with(|process| process.device.flush()) else { return };
        world.exec.sleep(world.exec.below(50)).await;
        for Written { flight, token, crcs, ticket, reply } in group {
            let lost = store.with(|process| process.device.is_lost(ticket)).unwrap_or(true);
            let outcome = match &result {
                Ok(()) if !lost => Ok(()),
                _ => Err(Reason::IoError),
            };
            finish(&world, at, flight, token, crcs, reply, outcome);
        }
    }
}

/// A segment has ended: tells its submitter and conversion.
fn finish(
    world: &Rc<World>,
    at: usize,
    flight: FlightId,
    token: Token,
    crcs: Vec<u32>,
    reply: Reply,
    outcome: Outcome,
) {
    let store = &world.stores[at];
    let Some((repeats, turns)) = store.with(|process| {
        let cleared = process.gate.finish(flight, outcome);
        if process.gate.epoch() == Some(token.epoch) {
            let key = (token.io_end, token.segment);
            let outcome = match outcome {
                Ok(()) => SegmentOutcome::Durable(crcs),
                Err(reason) => SegmentOutcome::Failed(reason),
            };
            let release = FromStore::Release { token, outcome };
            if process.unanswered.insert(key, release).is_none() {
                process.queue.push_back(Item::Release(key));
            }
        }
        let repeats = process.repeats.remove(&flight).unwrap_or_default();
        (repeats, process.take_in(cleared))
    }) else {
        return;
    };
    for reply in std::iter::once(reply).chain(repeats) {
        reply.send(Message::BioDone(token, outcome));
    }
    punch(world, at, turns);
    store.changed.notify();
}

async fn read(
    world: &Rc<World>,
    at: usize,
    grant: ReadGrant,
    range: PblkRange,
    crcs: &[u32],
) -> Result<Vec<Block>, Reason> {
    let store = &world.stores[at];
    let now = world.exec.clock(store.node);
    let admitted = store.with(|process| {
        let admitted = process.gate.admit_read(now, &grant, range);
        if admitted.is_ok()
            && let Err(why) = process.fenced.admits_read(&grant)
        {
            world.exec.fail(format!("fenced_is_refused: {why}: {grant:?}"));
        }
        admitted
    });
    let flight = admitted.unwrap_or(Err(Reason::NotReady))?;
    world.exec.sleep(world.plan.read_us.draw(&world.exec)).await;
    let mut bytes = vec![0; range.len as usize * BLOCK_SIZE];
    let result = store.with(|process| process.device.read_at(Pblk(range.start.0), &mut bytes));
    let done = match result {
        Some(Ok(())) => {
            let blocks = block::from_bytes(&bytes);
            let is_blind = crcs.is_empty() || world.planted(Planted::ReadSkipsChecksum);
            let good = is_blind || block::crcs(&blocks) == crcs;
            if good { Ok(blocks) } else { Err(Reason::ChecksumMismatch) }
        }
        _ => Err(Reason::IoError),
    };
    let turns = store.with(|process| {
        let cleared = process.gate.finish(flight, Ok(()));
        process.take_in(cleared)
    });
    punch(world, at, turns.unwrap_or_default());
    store.changed.notify();
    done
}

/// How long a write hangs in its device, beyond what is usual.
fn hang(world: &World) -> u64 {
    if world.plan.hung_writes == 0 || world.is_healed.get() {
        return 0;
    }
    let mut rare = world.rare.borrow_mut();
    match rare.below(1000) < world.plan.hung_writes {
        true => rare.below(2 * u64::from(world.plan.limits.lease_ms) * MS),
        false => 0,
    }
}

fn punch(world: &Rc<World>, at: usize, turns: Vec<PunchTurn>) {
    for turn in turns {
        let world = Rc::clone(world);
        let exec = world.exec.clone();
        exec.spawn(world.stores[at].node, async move {
            let store = &world.stores[at];
            world.exec.sleep(world.plan.write_us.draw(&world.exec)).await;
            for range in &turn.ranges {
                for pblk in range.start.0..range.start.0 + range.len {
                    let volume = VolumeId(0);
                    let id = store.with(|process| process.gate.store()).flatten();
                    let home = (id.unwrap_or(StoreId(0)), pblk);
                    if let Err(why) = world.may_land(volume, home) {
                        world.exec.fail(format!("reuse-after-safe: a punch hits {home:?} {why}"));
                    }
                }
                store.with(|process| process.device.punch(*range).is_ok());
            }
            let turns = store.with(|process| {
                let cleared = process.gate.punched(&turn);
                if process.gate.epoch() == Some(turn.epoch) {
                    process.queue.push_back(Item::Punch(turn.punch));
                }
                process.take_in(cleared)
            });
            punch(&world, at, turns.unwrap_or_default());
            store.changed.notify();
        });
    }
}

/// Keeps a session with conversion for ever.
async fn session(world: Rc<World>, at: usize) {
    let store = &world.stores[at];
    loop {
        once(&world, at).await;
        store.changed.notify();
        let pause = world.exec.between(1, world.plan.reconnect_ms) * MS;
        world.exec.sleep(pause).await;
    }
}

async fn once(world: &Rc<World>, at: usize) -> Option<()> {
    let store = &world.stores[at];
    let exec = &world.exec;
    let lease_us = u64::from(world.plan.limits.lease_ms) * MS;
    let registered_at = exec.clock(store.node);
    let end = world.net.connect(store.node, 1, Kind::Store, lease_us).await?;
    let incarnation = store.with(|process| process.incarnation)?;
    end.send(Message::FromStore(FromStore::Register {
        uuid: store.uuid(),
        incarnation,
        capacity_blocks: store.capacity,
        url: format!("sim:{at}"),
        name: None,
    }));
    let mut silent_at = exec.now() + lease_us;
    let mut renew_at = u64::MAX;
    let mut renewals: VecDeque<Millis> = VecDeque::new();
    let mut is_registered = false;
    loop {
        if is_registered {
            if exec.now() >= renew_at {
                renewals.push_back(exec.clock(store.node));
                end.send(Message::FromStore(FromStore::Renew));
                renew_at = exec.now() + lease_us / 3;
            }
            for message in store.with(Process::take_messages)? {
                end.send(Message::FromStore(message));
            }
        }
        let owing = || {
            let owes = store.with(|process| process.has_messages()).unwrap_or(true);
            (is_registered && owes).then_some(())
        };
        let next = either(end.receive(), store.changed.wait(owing));
        let Some(message) = exec.until(renew_at.min(silent_at), next).await else {
            if exec.now() >= silent_at {
                return None;
            }
            continue;
        };
        let message = match message {
            Either::One(message) => message?,
            Either::Other(()) => continue,
        };
        let Message::ToStore(message) = message else { return None };
        match message {
            ToStore::Registered { store: id, epoch, key, lease_ms, floor } => {
                exec.note("registered", store.node, &[epoch.0]);
                let lease_ms = u64::from(lease_ms);
                let registration =
                    Registration { store: id, epoch, key, lease_ms, io_end_floor: floor };
                let registered = store.with(|process| {
                    process.fenced.registered(epoch, floor);
                    process.register(registered_at, registration)
                })?;
                punch(world, at, registered.ok()?);
                is_registered = true;
                renew_at = exec.now() + lease_us / 3;
                silent_at = exec.now() + lease_us;
            }
            _ if !is_registered => return None,
            ToStore::SessionRefused(_) => return None,
            ToStore::Renewed { lease_ms, floor } => {
                let sent = renewals.pop_front()?;
                store.with(|process| {
                    process.gate.renewed(sent, lease_ms.into(), floor);
                    process.fenced.floor = process.fenced.floor.max(floor);
                    let floor = process.gate.floor();
                    process.unanswered = process.unanswered.split_off(&(floor, SegmentIndex(0)));
                });
                silent_at = exec.now() + lease_us;
            }
            ToStore::Released { io_end, segment, .. } => {
                store.with(|process| process.unanswered.remove(&(io_end, segment)));
            }
            ToStore::Fence { fence, io_ends, volumes } => {
                exec.note("fence", store.node, &[fence, io_ends.len() as u64]);
                let turns = store.with(|process| {
                    process.fenced.fence(&io_ends, &volumes);
                    let cleared = process.gate.fence(fence, &io_ends, &volumes)?;
                    Ok::<_, Reason>(process.take_in(cleared))
                })?;
                punch(world, at, turns.unwrap_or_default());
            }
            ToStore::Punch { punch: number, ranges } => {
                let turns = store.with(|process| {
                    let cleared = process.gate.punch(number, ranges)?;
                    Ok::<_, Reason>(process.take_in(cleared))
                })?;
                punch(world, at, turns.unwrap_or_default());
            }
        }
    }
}

impl Process {
    fn register(
        &mut self,
        sent_at: Millis,
        registration: Registration,
    ) -> Result<Vec<PunchTurn>, Reason> {
        let is_new_epoch = self.gate.epoch() != Some(registration.epoch);
        let cleared = self.gate.register(sent_at, registration)?;
        if is_new_epoch {
            self.queue.clear();
            self.unanswered.clear();
        } else {
            let floor = self.gate.floor();
            self.unanswered = self.unanswered.split_off(&(floor, SegmentIndex(0)));
            self.queue.retain(|item| !matches!(item, Item::Release(_)));
            self.queue.extend(self.unanswered.keys().copied().map(Item::Release));
        }
        self.is_ready_due = false;
        Ok(self.take_in(cleared))
    }

    fn has_messages(&self) -> bool {
        self.gate.is_ready() && (self.is_ready_due || !self.queue.is_empty())
    }

    fn take_messages(&mut self) -> Vec<FromStore> {
        if !self.gate.is_ready() {
            return Vec::new();
        }
        let mut messages = Vec::new();
        if std::mem::take(&mut self.is_ready_due)
            && let Some(epoch) = self.gate.epoch()
        {
            messages.push(FromStore::Ready { epoch });
        }
        for item in std::mem::take(&mut self.queue) {
            messages.extend(match item {
                Item::Release(key) => self.unanswered.get(&key).cloned(),
                Item::Fence(fence) => Some(FromStore::FenceDone { fence }),
                Item::Punch(punch) => Some(FromStore::PunchDone { punch }),
            });
        }
        messages
    }

    fn take_in(&mut self, cleared: Vec<Cleared>) -> Vec<PunchTurn> {
        let mut turns = Vec::new();
        for cleared in cleared {
            match cleared {
                Cleared::Fence(fence) => self.queue.push_back(Item::Fence(fence)),
                Cleared::Epoch(_) => self.is_ready_due = true,
                Cleared::Punch(turn) => turns.push(turn),
                Cleared::Punched(punch) => self.queue.push_back(Item::Punch(punch)),
            }
        }
        turns
    }
}

impl Fenced {
    fn registered(&mut self, epoch: ClusterEpoch, floor: IoEndId) {
        // A fence of an open or close that conversion forgot with its power holds no longer.
        if epoch > self.epoch {
            self.volumes.clear();
        }
        self.epoch = self.epoch.max(epoch);
        self.floor = self.floor.max(floor);
    }

    fn fence(&mut self, io_ends: &[IoEndId], volumes: &[(VolumeId, Generation)]) {
        self.io_ends.extend(io_ends);
        for (volume, generation) in volumes {
            let lowest = self.volumes.entry(*volume).or_default();
            *lowest = (*lowest).max(*generation);
        }
    }

    fn admits_read(&self, grant: &ReadGrant) -> Result<(), &'static str> {
        if grant.epoch < self.epoch {
            return Err("a read of an older epoch");
        }
        if self.volumes.get(&grant.volume).is_some_and(|lowest| grant.generation < *lowest) {
            return Err("a read of a fenced generation");
        }
        Ok(())
    }

    fn admits(&mut self, token: &Token, incarnation: Incarnation) -> Result<(), &'static str> {
        if token.epoch < self.epoch {
            return Err("an older epoch");
        }
        if token.incarnation != incarnation {
            return Err("another incarnation");
        }
        if token.io_end < self.floor {
            return Err("below the floor");
        }
        if self.io_ends.contains(&token.io_end) {
            return Err("a fenced io_end");
        }
        if self.volumes.get(&token.volume).is_some_and(|lowest| token.generation < *lowest) {
            return Err("a fenced generation");
        }
        if !self.written.insert((token.io_end, token.segment)) {
            return Err("a token that was seen before");
        }
        Ok(())
    }
}
