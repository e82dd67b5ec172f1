//! Clients of volumes, and what they insist on.

mod ends;
mod fsync;
mod known;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use endio_state_machine::machine::{Call, Deletions};
use endio_state_machine::writeback::sessions::{RequestKey, SessionId};
use endio_testkit::oracle::At;
use endio_testkit::pattern::Cell as Found;
use endio_types::{BLOCK_BYTES, Reason};

use crate::block::{CELL_BYTES, CELLS, cell, parse};
use crate::exec::{Exec, MS, WORLD, answer};
use crate::plan::VolumePlan;
use crate::world::World;
use crate::writeback::{Failure, Mode, Outcome, RangeKind, Retry, Volume, Wb};
use fsync::Observer;
use known::{Doubt, Known};

/// Cells that any volume may grow to.
const CELLS_MAX: u64 = 40 * CELLS;
/// Marks what a client of a fenced writeback writes: it must never be seen.
const FENCED_TAG: u64 = 255;

/// A volume of the workload.
pub struct Slot {
    name: String,
    plan: VolumePlan,
    /// Which writeback has it.
    owner: Cell<usize>,
    /// Counts takeovers and deletions: outcomes of an earlier tenure do not count.
    tenure: Cell<u64>,
    known: RefCell<Known>,
    /// Requests under way.
    busy: Cell<usize>,
    is_held: Cell<bool>,
    is_deleting: Cell<bool>,
    is_created: Cell<bool>,
}

/// The clients.
pub struct Clients {
    world: Rc<World>,
    /// The volumes.
    pub slots: Vec<Rc<Slot>>,
    next_tag: Cell<u64>,
    /// Workers that have not finished.
    pub working: Cell<usize>,
    /// Requests so far.
    pub requests: Cell<u64>,
    /// Cells that were read and judged.
    pub judged: Cell<u64>,
}

impl Clients {
    /// Clients of all volumes of the plan.
    pub fn new(world: &Rc<World>) -> Rc<Self> {
        let slots = world.plan.volumes.iter().enumerate().map(|(at, plan)| {
            let tag = at as u64 + 1;
            Rc::new(Slot {
                name: format!("v{at}"),
                plan: plan.clone(),
                owner: Cell::new(at % world.plan.writebacks),
                tenure: Cell::new(1),
                known: RefCell::new(Known::new(tag, plan)),
                busy: Cell::new(0),
                is_held: Cell::new(false),
                is_deleting: Cell::new(false),
                is_created: Cell::new(false),
            })
        });
        let slots: Vec<Rc<Slot>> = slots.collect();
        let clients = Self {
            world: Rc::clone(world),
            next_tag: Cell::new(slots.len() as u64 + 1),
            slots,
            working: Cell::new(0),
            requests: Cell::new(0),
            judged: Cell::new(0),
        };
        Rc::new(clients)
    }

    fn exec(&self) -> &Exec {
        &self.world.exec
    }

    /// Starts every worker.
    pub fn start(self: &Rc<Self>) {
        for slot in &self.slots {
            for number in 0..self.world.plan.workers {
                self.working.set(self.working.get() + 1);
                let (clients, slot) = (Rc::clone(self), Rc::clone(slot));
                self.exec().spawn(WORLD, async move {
                    clients.work(&slot, number as u64).await;
                    clients.working.set(clients.working.get() - 1);
                });
            }
        }
    }

    fn wb(&self, slot: &Slot) -> Option<Wb> {
        let at = slot.owner.get();
        let engine = self.world.writebacks[at].serving()?;
        Some(Wb { world: Rc::clone(&self.world), at, engine })
    }

    /// Runs a request inside its writeback: `None` if that dies meanwhile.
    pub(crate) async fn inside<T: 'static>(
        &self,
        wb: &Wb,
        work: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        // Nobody reaches a process that is gone or stops, and its successor is another one.
        let serving = self.world.writebacks[wb.at].serving();
        if !serving.is_some_and(|serving| Rc::ptr_eq(&serving, &wb.engine)) {
            return None;
        }
        let (tell, told) = answer();
        let node = self.world.writebacks[wb.at].node;
        self.exec().spawn(node, async move { tell.send(work.await) });
        told.await
    }

    /// The volume at its owner, opened or created if need be.
    async fn volume(&self, slot: &Rc<Slot>) -> Option<(Wb, Rc<Volume>)> {
        let wb = self.wb(slot)?;
        let tenure = slot.tenure.get();
        // What somebody tries to delete has been there, whatever became of the answers to its creation.
        let is_known = || slot.is_created.get() || slot.is_deleting.get();
        if !is_known() {
            let (inner, call) = (wb.clone(), create(slot));
            let created = self.inside(&wb, async move { inner.create(call).await }).await?;
            if created.is_ok() {
                slot.is_created.set(true);
            }
        }
        // Who finds no volume had looked for it before somebody else created it.
        let is_there = is_known();
        let (inner, name) = (wb.clone(), slot.name.clone());
        let opened = self.inside(&wb, async move { inner.open(&name, false).await }).await?;
        if slot.tenure.get() != tenure {
            return None;
        }
        match opened {
            Ok(volume) => {
                self.settle_doubts(slot, &wb);
                Some((wb, volume))
            }
            Err(failure) => {
                if failure.reason == Reason::VolumeBusy {
                    self.take_back(slot, &wb).await;
                }
                if failure.reason == Reason::UnknownVolume && is_there {
                    match slot.is_deleting.get() {
                        true => self.renew(slot),
                        false => self.exec().fail(format!("volumes_stay: {}", slot.name)),
                    }
                }
                None
            }
        }
    }

    /// The volume was deleted: another one takes its name.
    fn renew(&self, slot: &Slot) {
        self.world.was_deleted(&slot.name);
        let tag = self.next_tag.get();
        self.next_tag.set(tag + 1);
        *slot.known.borrow_mut() = Known::new(tag, &slot.plan);
        slot.tenure.set(slot.tenure.get() + 1);
        slot.is_deleting.set(false);
        slot.is_created.set(false);
    }

    /// What is in doubt only until a later session stands, or until another process has opened
    /// the volume, is over.
    fn settle_doubts(&self, slot: &Slot, wb: &Wb) {
        let mut known = slot.known.borrow_mut();
        let Known { oracle, doubts, .. } = &mut *known;
        doubts.retain(|doubt| {
            let is_other = doubt.engine != wb.engine.name || doubt.tenure != slot.tenure.get();
            let is_over = is_other || wb.engine.link_number.get() > doubt.session;
            if is_over {
                oracle.fail_write(doubt.sequence);
            }
            !is_over
        });
    }

    async fn work(self: &Rc<Self>, slot: &Rc<Slot>, number: u64) {
        let exec = self.exec().clone();
        let mut observer: Option<Observer> = None;
        let mut sequence = 0;
        let mut session = self.session(number);
        let mut done = 0;
        while done < self.world.plan.operations {
            // What is left when the faults are over is done in a hurry.
            if self.world.is_healed.get() && done >= 3 {
                return;
            }
            let pause = exec.between(0, 3) * exec.below(5 * MS);
            exec.sleep(pause + 50).await;
            if slot.is_held.get() {
                exec.sleep(MS).await;
                continue;
            }
            let wanted = self.world.takeover_wanted.get();
            if wanted > 0 && self.world.plan.writebacks > 1 {
                self.world.takeover_wanted.set(wanted - 1);
                self.take_over(slot).await;
                session = self.session(number);
                sequence = 0;
                continue;
            }
            slot.busy.set(slot.busy.get() + 1);
            self.requests.set(self.requests.get() + 1);
            let got = self.volume(slot).await;
            match got {
                Some((wb, volume)) => {
                    done += 1;
                    let before = slot.tenure.get();
                    self.request(slot, &wb, &volume, session, &mut sequence, &mut observer).await;
                    if slot.tenure.get() != before {
                        session = self.session(number);
                        sequence = 0;
                    }
                }
                None => exec.sleep(exec.between(1, 20) * MS).await,
            }
            slot.busy.set(slot.busy.get() - 1);
        }
    }

    fn session(&self, number: u64) -> SessionId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.exec().below(u64::MAX).to_le_bytes());
        id[8..].copy_from_slice(&number.to_le_bytes());
        SessionId(id)
    }

    async fn request(
        self: &Rc<Self>,
        slot: &Rc<Slot>,
        wb: &Wb,
        volume: &Rc<Volume>,
        session: SessionId,
        sequence: &mut u64,
        observer: &mut Option<Observer>,
    ) {
        let exec = self.exec();
        let mix = &self.world.plan.mix;
        let weights = [
            mix.buffered,
            mix.direct,
            mix.read,
            mix.fsync,
            mix.trim,
            mix.zero,
            mix.allocate,
            mix.resize,
            mix.close,
            mix.delete,
            mix.leave,
        ];
        let mut drawn = exec.below(weights.iter().sum());
        let what = weights.iter().position(|weight| {
            let hit = drawn < *weight;
            drawn = drawn.saturating_sub(*weight);
            hit
        });
        let retry = exec.chance(500).then(|| {
            *sequence += 1;
            Retry { key: RequestKey { session, sequence: *sequence }, is_retry: false }
        });
        match what {
            Some(0) => {
                let durable = self.world.plan.durable_writes;
                let mode = match durable > 0 && exec.chance(durable) {
                    true => Mode::Durable,
                    false => Mode::Buffered,
                };
                self.write(slot, wb, volume, mode, retry).await;
            }
            Some(1) => self.write(slot, wb, volume, Mode::Direct, retry).await,
            Some(2) => self.read(slot, wb, volume).await,
            Some(3) => _ = self.fsync(slot, wb, volume, observer).await,
            Some(4) => self.range(slot, wb, volume, RangeKind::Trim, retry).await,
            Some(5) => self.range(slot, wb, volume, RangeKind::Zero, retry).await,
            Some(6) => self.range(slot, wb, volume, RangeKind::Allocate, retry).await,
            Some(7) => self.resize(slot, wb, volume).await,
            Some(8) => self.close(slot, wb, volume).await,
            Some(10) => self.leave(slot, wb, volume).await,
            _ => self.delete(slot, wb, volume).await,
        }
    }

    /// Whether a change goes where the volume ends.
    fn is_near_end(&self, slot: &Slot) -> bool {
        let permille = self.world.plan.near_end;
        slot.plan.growable && permille > 0 && self.exec().chance(permille)
    }

    /// Somewhere in the volume, and how long.
    fn somewhere(&self, slot: &Slot, extends: bool) -> Option<(u64, u64)> {
        let exec = self.exec();
        let known = slot.known.borrow();
        let size = match extends {
            true => known.size_cells.max(known.reach_cells),
            false if self.world.plan.reads_all => known.acked_size(),
            false => known.size_cells,
        };
        let end = if extends && slot.plan.growable { (size + 12).min(CELLS_MAX) } else { size };
        if end == 0 {
            return None;
        }
        let (mut first, mut cells) = (exec.below(end), exec.between(1, self.world.plan.cells_max));
        if extends && self.is_near_end(slot) {
            first = near(exec, size).min(end - 1);
            cells = cells.min(2 * CELLS);
        }
        if exec.chance(self.world.plan.aligned * 10) {
            first -= first % CELLS;
            cells = cells.next_multiple_of(CELLS);
        }
        Some((first, cells.min(end - first)))
    }

    async fn write(
        &self,
        slot: &Rc<Slot>,
        wb: &Wb,
        volume: &Rc<Volume>,
        mode: Mode,
        retry: Option<Retry>,
    ) {
        let Some((first, cells)) = self.somewhere(slot, true) else { return };
        let (sequence, invoked, data) = {
            let known = &mut *slot.known.borrow_mut();
            known.changes += 1;
            let invoked = known.oracle.now();
            let zeroes = self.world.plan.zero_writes;
            if zeroes > 0 && self.exec().chance(zeroes) {
                let sequence = known.oracle.invoke_zeroes(first, cells);
                (sequence, invoked, vec![0; cells as usize])
            } else {
                let sequence = known.oracle.begin_write(first, cells);
                let number = |at| cell(known.tag, at, sequence);
                (sequence, invoked, (first..first + cells).map(number).collect())
            }
        };
        let durable = mode != Mode::Buffered;
        let details = [first, cells, sequence, durable.into()];
        self.exec().note("write", slot.owner.get(), &details);
        let (tenure, resizes) = (slot.tenure.get(), slot.known.borrow().resizes);
        let outcome = self
            .at_most_once(slot, wb, volume, retry, move |wb, volume, retry| {
                let data = data.clone();
                Box::pin(async move { wb.write(&volume, first, data, mode, retry).await })
            })
            .await;
        self.judge(slot, wb, tenure, (sequence, invoked, first, cells), outcome, durable);
        if slot.tenure.get() == tenure && outcome == Some(Ok(())) {
            let mut known = slot.known.borrow_mut();
            if known.resizes == resizes && !known.is_resizing {
                known.grew(first + cells, durable);
            }
        }
    }

    /// What the outcome of a change means for what a read may return.
    fn judge(
        &self,
        slot: &Slot,
        wb: &Wb,
        tenure: u64,
        (sequence, invoked, first, cells): (u64, At, u64, u64),
        outcome: Option<Outcome<()>>,
        durable: bool,
    ) {
        let told = match outcome {
            None => 0,
            Some(Ok(())) => 1,
            Some(Err(failure)) => 2 + failure.reason as u64,
        };
        self.exec().note("outcome", slot.owner.get(), &[sequence, told]);
        let mut known = slot.known.borrow_mut();
        if slot.tenure.get() != tenure {
            // The old tenure is fenced, or its volume is gone: nothing of it is under way.
            known.oracle.fail_write(sequence);
            return;
        }
        match outcome {
            Some(Ok(())) => {
                // A deletion that was given up is over.
                slot.is_deleting.set(false);
                known.ack(sequence, invoked, first, cells, durable);
            }
            Some(Err(Failure { doubt: None, .. })) => known.oracle.fail_write(sequence),
            Some(Err(Failure { doubt: Some(session), .. })) => {
                self.doubt(&mut known, wb, (sequence, first, cells), session, tenure);
            }
            None => self.doubt(&mut known, wb, (sequence, first, cells), u64::MAX, tenure),
        }
    }

    fn doubt(
        &self,
        known: &mut Known,
        wb: &Wb,
        (sequence, first, cells): (u64, u64, u64),
        session: u64,
        tenure: u64,
    ) {
        let since = known.oracle.now();
        let engine = wb.engine.name.clone();
        known.doubts.push(Doubt { sequence, first, cells, since, session, tenure, engine });
    }

    /// Sends a request, and sends it again under its key while its outcome is not known.
    async fn at_most_once(
        &self,
        slot: &Rc<Slot>,
        wb: &Wb,
        volume: &Rc<Volume>,
        retry: Option<Retry>,
        send: impl Fn(Wb, Rc<Volume>, Option<Retry>) -> Sent,
    ) -> Option<Outcome<()>> {
        let tenure = slot.tenure.get();
        let mut at = (wb.clone(), Rc::clone(volume));
        let mut retry = retry;
        let mut doubt = None;
        for _ in 0..4 {
            let (wb, volume) = (at.0.clone(), Rc::clone(&at.1));
            let outcome = self.inside(&at.0, send(wb, volume, retry)).await;
            let is_known = matches!(outcome, Some(Ok(()) | Err(Failure { doubt: None, .. })));
            // A try that is refused says nothing of the ones before it.
            let outcome = outcome.map(|outcome| {
                outcome.map_err(|failure| Failure { doubt: failure.doubt.max(doubt), ..failure })
            });
            let Some(key) = &mut retry else { return outcome };
            if is_known {
                return outcome;
            }
            doubt = match outcome {
                Some(Err(failure)) => failure.doubt,
                _ => Some(u64::MAX),
            };
            key.is_retry = true;
            self.exec().sleep(self.exec().between(1, 30) * MS).await;
            if slot.tenure.get() != tenure || slot.is_held.get() {
                return outcome;
            }
            match self.volume(slot).await {
                Some(again) if slot.tenure.get() == tenure => at = again,
                _ => return outcome,
            }
        }
        None
    }

    async fn range(
        &self,
        slot: &Rc<Slot>,
        wb: &Wb,
        volume: &Rc<Volume>,
        kind: RangeKind,
        retry: Option<Retry>,
    ) {
        let Some((first, cells)) = self.somewhere(slot, false) else { return };
        self.exec().note("range", slot.owner.get(), &[kind as u64, first, cells]);
        let tenure = slot.tenure.get();
        let change = (kind != RangeKind::Allocate).then(|| {
            let known = &mut *slot.known.borrow_mut();
            known.changes += 1;
            let oracle = &mut known.oracle;
            let invoked = oracle.now();
            (oracle.invoke_zeroes(first, cells), invoked, first, cells)
        });
        let outcome = self
            .at_most_once(slot, wb, volume, retry, move |wb, volume, retry| {
                Box::pin(async move { wb.range(&volume, kind, first, cells, retry).await })
            })
            .await;
        if let Some(change) = change {
            self.judge(slot, wb, tenure, change, outcome, true);
        }
    }

    async fn resize(&self, slot: &Rc<Slot>, wb: &Wb, volume: &Rc<Volume>) {
        let exec = self.exec();
        if slot.known.borrow().is_resizing {
            return;
        }
        let mut cells = exec.between(1, 30 * CELLS);
        if self.is_near_end(slot) {
            cells = near(exec, slot.known.borrow().size_cells).clamp(1, CELLS_MAX);
        }
        if !slot.plan.growable {
            cells = cells.next_multiple_of(CELLS);
        }
        exec.note("resize", slot.owner.get(), &[cells]);
        let tenure = slot.tenure.get();
        let change = {
            let known = &mut *slot.known.borrow_mut();
            known.is_resizing = true;
            known.resizes += 1;
            known.changes += 1;
            known.reach_cells = known.reach_cells.max(known.size_cells);
            known.resizes_to(cells);
            let invoked = known.oracle.now();
            let beyond = 2 * CELLS_MAX - cells;
            (known.oracle.invoke_zeroes(cells, beyond), invoked, cells, beyond)
        };
        let (inner, volume) = (wb.clone(), Rc::clone(volume));
        let bytes = cells * CELL_BYTES;
        let outcome = self.inside(wb, async move { inner.resize(&volume, bytes).await }).await;
        if outcome.is_some_and(|outcome| outcome.is_err_and(|f| f.reason == Reason::OutOfRange)) {
            self.exec().fail(format!("size_is_known: {} gets no {cells} cells", slot.name));
        }
        self.judge(slot, wb, tenure, change, outcome, true);
        let mut known = slot.known.borrow_mut();
        if slot.tenure.get() == tenure {
            known.is_resizing = false;
            if outcome == Some(Ok(())) && !known.doubts.iter().any(|d| d.cells >= CELLS_MAX) {
                (known.size_cells, known.reach_cells) = (cells, 0);
            }
        }
    }

    async fn read(&self, slot: &Rc<Slot>, wb: &Wb, volume: &Rc<Volume>) {
        let Some((first, cells)) = self.somewhere(slot, false) else { return };
        let tenure = slot.tenure.get();
        let (losses, resizes) = {
            let known = slot.known.borrow();
            (known.losses, known.resizes)
        };
        let (began, quiet) = slot.known.borrow_mut().begin_read();
        let (inner, volume) = (wb.clone(), Rc::clone(volume));
        let read = self.inside(wb, async move { inner.read(&volume, first, cells).await }).await;
        self.exec().tell(slot.owner.get(), || {
            let ended = read.as_ref().map(|read| read.as_ref().map(|_| ()));
            format!("read {} [{first}, {cells}] of {began:?} ended {ended:?}", slot.name)
        });
        let mut known = slot.known.borrow_mut();
        if slot.tenure.get() == tenure {
            if let Some(Ok(found)) = &read {
                self.check(slot, &mut known, (began, quiet), first, found);
            }
            let is_short = |failure: &Failure| failure.reason == Reason::OutOfRange;
            if matches!(&read, Some(Err(failure)) if is_short(failure))
                && (known.losses, known.resizes) == (losses, resizes)
            {
                let end = first + cells;
                self.exec().fail(format!("size_is_known: {} ends before {end}", slot.name));
            }
            let plan = &self.world.plan;
            let is_alarm = |failure: &Failure| failure.reason == Reason::ChecksumMismatch;
            if matches!(&read, Some(Err(failure)) if is_alarm(failure))
                && !plan.device.lies()
                && plan.rot_ms == 0
            {
                self.exec().fail(format!("no_false_alarm: {} at {first}", slot.name));
            }
            known.oracle.end_read(began);
        } else if let Some(Ok(found)) = &read {
            // Of an older tenure: old data is fine, and so is what a client of the fenced owner put
            // into its cache. Somebody else's never is.
            for (at, number) in (first..).zip(found) {
                if let Found::Written { tag, cell, .. } = parse(*number)
                    && (cell != at || (tag > known.tag && tag != FENCED_TAG))
                {
                    self.exec().fail(format!("no_foreign_or_stale_byte: cell {at}: {number:x}"));
                }
            }
        }
    }

    /// Judges cells that were read.
    fn check(
        &self,
        slot: &Slot,
        known: &mut Known,
        (began, quiet): (At, Option<u64>),
        first: u64,
        found: &[u64],
    ) -> bool {
        let mut seen = std::collections::BTreeMap::new();
        for (at, number) in (first..).zip(found) {
            self.judged.set(self.judged.get() + 1);
            match known.oracle.check_cell(began, at, parse(*number)) {
                Ok(sequence) => _ = seen.insert(at, sequence),
                Err(violation) => {
                    let history = known.oracle.explain(at);
                    let (name, checker) = (&slot.name, violation.checker());
                    self.exec().fail(format!("{checker}: {name}: {violation}\n{history}"));
                    return false;
                }
            }
        }
        // A read beside a write may see a part of it: the two halves are read at two times.
        if quiet == Some(known.changes)
            && !slot.plan.in_place
            && let Err(violation) = known.oracle.check_whole_writes(&seen)
        {
            let history = known.oracle.explain(violation.cell());
            self.exec().fail(format!("no_torn_write: {}: {violation}\n{history}", slot.name));
            return false;
        }
        true
    }
}

/// A cell in some blocks around this one.
fn near(exec: &Exec, cell: u64) -> u64 {
    (cell + exec.below(3 * CELLS)).saturating_sub(2 * CELLS)
}

type Sent = std::pin::Pin<Box<dyn Future<Output = Outcome<()>>>>;

fn create(slot: &Slot) -> impl Fn(Deletions) -> Call + use<> {
    let (name, plan) = (slot.name.clone(), slot.plan.clone());
    move |as_of| Call::CreateVolume {
        name: name.clone(),
        size_bytes: plan.blocks * BLOCK_BYTES,
        replicas: plan.replicas,
        in_place: plan.in_place,
        growable: plan.growable,
        as_of: Some(as_of),
    }
}
