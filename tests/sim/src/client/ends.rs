//! Volumes that are closed, deleted, taken over, cut off from power, and looked at in the end.

use std::rc::Rc;

use endio_testkit::oracle::{At, Flush};
use endio_types::{LblkRange, Reason};

use super::{Clients, FENCED_TAG, Slot};
use crate::block::{CELL_BYTES, CELLS, cell};
use crate::exec::MS;
use crate::writeback::{Mode, Volume, Wb};

/// What an orderly stop is to a volume: a flush.
pub struct Stop {
    slot: Rc<Slot>,
    tenure: u64,
    before: At,
    flush: Flush,
}

impl Clients {
    /// Closes the volume: what was acknowledged before is durable then.
    pub(super) async fn close(&self, slot: &Slot, wb: &Wb, volume: &Rc<Volume>) {
        let tenure = slot.tenure.get();
        let (before, flush) = {
            let oracle = &mut slot.known.borrow_mut().oracle;
            (oracle.now(), oracle.invoke_flush())
        };
        let (inner, open) = (wb.clone(), Rc::clone(volume));
        let closed = self.inside(wb, async move { inner.close(&open).await }).await;
        self.exec().note("close", slot.owner.get(), &[(closed == Some(Ok(()))).into()]);
        if closed == Some(Ok(())) && slot.tenure.get() == tenure {
            let mut known = slot.known.borrow_mut();
            known.oracle.ack_flush(flush);
            known.flushed(before);
        }
    }

    /// Closes the volume when nobody else works on it, and nobody asks for it for a while.
    pub(super) async fn leave(&self, slot: &Rc<Slot>, wb: &Wb, volume: &Rc<Volume>) {
        if slot.is_held.get() || slot.is_deleting.get() {
            return;
        }
        slot.is_held.set(true);
        while slot.busy.get() > 1 {
            self.exec().sleep(MS).await;
        }
        self.close(slot, wb, volume).await;
        let longest = 3 * u64::from(self.world.plan.limits.lease_ms) * MS;
        self.exec().sleep(self.exec().below(longest)).await;
        slot.is_held.set(false);
    }

    /// Deletes the volume when nobody else works on it, until it is gone.
    pub(super) async fn delete(&self, slot: &Rc<Slot>, wb: &Wb, volume: &Rc<Volume>) {
        if slot.is_held.get() || slot.is_deleting.get() {
            return;
        }
        slot.is_held.set(true);
        while slot.busy.get() > 1 {
            self.exec().sleep(MS).await;
        }
        self.exec().note("delete", slot.owner.get(), &[]);
        slot.is_deleting.set(true);
        let tenure = slot.tenure.get();
        let mut at = Some((wb.clone(), Rc::clone(volume)));
        while slot.tenure.get() == tenure {
            if let Some((wb, open)) = at {
                let inner = wb.clone();
                let delete = async move { inner.delete(&open).await };
                if let Some(Ok(())) = self.inside(&wb, delete).await {
                    self.renew(slot);
                    break;
                }
            }
            // Who gives up has a volume that is there or not: until it has taken another write.
            if self.world.plan.late_creations && self.world.rare.borrow_mut().chance(50) {
                break;
            }
            self.exec().sleep(5 * MS).await;
            at = self.volume(slot).await;
        }
        if self.world.plan.late_creations {
            // Long enough for what was sent before to arrive while nobody has the name.
            let pause = self.world.rare.borrow_mut().between(1, 300);
            self.exec().sleep(pause * MS).await;
        }
        slot.is_held.set(false);
    }

    /// The volume goes to another writeback, whatever its owner does.
    pub(super) async fn take_over(self: &Rc<Self>, slot: &Rc<Slot>) {
        let from = slot.owner.get();
        let to = (from + 1) % self.world.plan.writebacks;
        if slot.is_held.get() || slot.is_deleting.get() || !slot.is_created.get() {
            return;
        }
        slot.is_held.set(true);
        self.exec().note("takeover", to, &[from as u64]);
        let old = self.wb(slot);
        // A try whose answer is lost may have taken it: there is no way back.
        let taken = loop {
            self.exec().sleep(MS).await;
            let Some(engine) = self.world.writebacks[to].serving() else { continue };
            let wb = Wb { world: Rc::clone(&self.world), at: to, engine };
            let (inner, name) = (wb.clone(), slot.name.clone());
            let opened = self.inside(&wb, async move { inner.open(&name, true).await }).await;
            if let Some(Ok(taken)) = opened {
                break taken;
            }
        };
        slot.is_held.set(false);
        self.exec().note("taken over", to, &[]);
        slot.owner.set(to);
        slot.tenure.set(slot.tenure.get() + 1);
        self.taken_from(slot);
        if let Some(old) = old {
            self.haunt(slot, &old, &taken).await;
        }
    }

    /// Another writeback serves the volume: it opened it, while it was closed, for a client that had
    /// asked before the takeover and not heard of it. Nobody works there, and without force nobody
    /// gets the volume.
    pub(super) async fn take_back(&self, slot: &Slot, wb: &Wb) {
        // Not while a takeover goes on. Who deletes it has nobody else who would take it.
        let is_taken = slot.is_held.get() && !slot.is_deleting.get();
        if is_taken || !self.is_served(&slot.name) {
            return;
        }
        self.exec().note("taken back", wb.at, &[]);
        // What the owner had acknowledged and not flushed went with its generation.
        slot.tenure.set(slot.tenure.get() + 1);
        self.taken_from(slot);
        let (inner, name) = (wb.clone(), slot.name.clone());
        self.inside(wb, async move { inner.open(&name, true).await }).await;
    }

    /// Whether conversion's owner of a volume lives and has it open under the generation that counts.
    fn is_served(&self, name: &str) -> bool {
        let process = self.world.conversion.process.borrow();
        let volumes = process.as_ref().map(|process| process.machine.volumes()).unwrap_or_default();
        let Some(info) = volumes.into_iter().find(|info| info.name == name) else { return false };
        let mut others = self.world.writebacks.iter().enumerate();
        others.any(|(at, writeback)| {
            let Some(engine) = writeback.serving() else { return false };
            let is_owner = info.owner.as_ref() == Some(&engine.name);
            let open = Wb { world: Rc::clone(&self.world), at, engine }.open_here(name);
            let numbers = open.map(|open| (open.id, open.generation));
            is_owner && numbers == Some((info.id, info.generation))
        })
    }

    /// An older generation of the volume is over, and what it had not flushed.
    fn taken_from(&self, slot: &Slot) {
        let known = &mut *slot.known.borrow_mut();
        known.lose_unflushed();
        known.unsaid_loss = false;
        known.is_resizing = false;
        for doubt in std::mem::take(&mut known.doubts) {
            known.oracle.fail_write(doubt.sequence);
        }
    }

    /// A client that has not heard of the takeover goes on at the old owner.
    async fn haunt(&self, slot: &Slot, old: &Wb, taken: &Volume) {
        let Some(volume) = old.open_here(&slot.name) else { return };
        // An answer that came late: the other one has taken the volume back since.
        if volume.id != taken.id || volume.generation >= taken.generation {
            return;
        }
        let tenure = slot.tenure.get();
        for _ in 0..self.exec().below(4) {
            let Some((first, cells)) = self.somewhere(slot, false) else { return };
            let data = (first..first + cells).map(|at| cell(FENCED_TAG, at, 1)).collect();
            let (inner, volume) = (old.clone(), Rc::clone(&volume));
            let direct = self.exec().chance(500);
            let mode = if direct { Mode::Direct } else { Mode::Buffered };
            let work = async move { inner.write(&volume, first, data, mode, None).await };
            let outcome = self.inside(old, work).await;
            let still = slot.tenure.get() == tenure;
            if direct && outcome == Some(Ok(())) && still {
                self.exec().fail("fenced_is_refused: a direct write of a fenced owner converted");
            }
        }
    }

    /// A writeback lost its power: what was not flushed may be gone, and that must be said.
    pub fn power_cut(&self, at: usize, open: &[String]) {
        for slot in self.slots.iter().filter(|slot| slot.owner.get() == at) {
            let mut known = slot.known.borrow_mut();
            known.lose_unflushed();
            known.unsaid_loss |= open.contains(&slot.name);
        }
    }

    /// A writeback is about to stop in order: what it acknowledged of its volumes so far is durable once it has.
    pub fn flush_by_stop(&self, at: usize) -> Vec<Stop> {
        let is_there = |slot: &&Rc<Slot>| slot.owner.get() == at && !slot.is_held.get();
        let flush = |slot: &Rc<Slot>| {
            let oracle = &mut slot.known.borrow_mut().oracle;
            let (before, flush) = (oracle.now(), oracle.invoke_flush());
            Stop { slot: Rc::clone(slot), tenure: slot.tenure.get(), before, flush }
        };
        self.slots.iter().filter(is_there).map(flush).collect()
    }

    /// It has.
    pub fn stopped(&self, stops: Vec<Stop>) {
        for Stop { slot, tenure, before, flush } in stops {
            if slot.tenure.get() == tenure && !slot.is_held.get() {
                let mut known = slot.known.borrow_mut();
                known.oracle.ack_flush(flush);
                known.flushed(before);
            }
        }
    }

    /// A store lost its power: data of running writes in place, which was not flushed, may be gone
    /// although a read has seen it.
    pub fn store_power_cut(&self) {
        for slot in self.slots.iter().filter(|slot| slot.plan.in_place) {
            slot.known.borrow_mut().oracle.forget_shown();
        }
    }

    /// Everything is well: what each volume holds is what it may hold.
    pub async fn inspect(&self, slot: &Rc<Slot>) -> bool {
        for tried in 0..40 {
            if self.try_inspect(slot, tried).await {
                return true;
            }
            self.exec().sleep(u64::from(self.world.plan.limits.lease_ms) * MS / 4).await;
        }
        let lies = self.world.plan.device.lies();
        if !lies {
            self.exec().fail(format!("liveness: volume {} cannot be read", slot.name));
        }
        lies
    }

    async fn try_inspect(&self, slot: &Rc<Slot>, tried: u32) -> bool {
        let Some((wb, volume)) = self.volume(slot).await else { return false };
        let is_flushed = self.fsync(slot, &wb, &volume, &mut None).await;
        // Some tries more than it takes where it can be flushed: each may last as long as a write-out.
        if !is_flushed && (tried < 5 || !self.may_stay(&volume)) {
            return false;
        }
        {
            let known = &mut *slot.known.borrow_mut();
            for doubt in std::mem::take(&mut known.doubts) {
                known.oracle.fail_write(doubt.sequence);
            }
        }
        let began = slot.known.borrow_mut().begin_read();
        let cells = volume.state.borrow().view.size_bytes() / CELL_BYTES;
        let (inner, open) = (wb.clone(), Rc::clone(&volume));
        let read = self.inside(&wb, async move { inner.read(&open, 0, cells).await }).await;
        let Some(Ok(found)) = read else { return self.inspect_blocks(slot, &wb, &volume).await };
        let mut known = slot.known.borrow_mut();
        if cells < known.acked_size() && !known.is_resizing {
            let why = format!("volume {} has {cells} cells", slot.name);
            self.exec().fail(format!("no_lost_flushed_write: {why}"));
        }
        self.check(slot, &mut known, began, 0, &found);
        true
    }

    /// Where bits flipped: every block of which there is a good copy holds what it may, and
    /// the others are said to be damaged.
    async fn inspect_blocks(&self, slot: &Rc<Slot>, wb: &Wb, volume: &Rc<Volume>) -> bool {
        if self.world.plan.rot_ms == 0 {
            return false;
        }
        let cells = volume.state.borrow().view.size_bytes() / CELL_BYTES;
        for first in (0..cells).step_by(CELLS as usize) {
            let began = slot.known.borrow_mut().begin_read();
            // One that is written anew meanwhile may get a good copy later.
            let was_good = self.has_good_copy(&slot.name, first / CELLS);
            let count = CELLS.min(cells - first);
            let (inner, open) = (wb.clone(), Rc::clone(volume));
            let read = async move { inner.read(&open, first, count).await };
            match self.inside(wb, read).await {
                Some(Ok(found)) => {
                    self.check(slot, &mut slot.known.borrow_mut(), began, first, &found);
                }
                Some(Err(failure)) if failure.reason == Reason::ChecksumMismatch => {
                    if was_good {
                        let why = format!("{} at {first} has a good copy", slot.name);
                        self.exec().fail(format!("no_false_alarm: {why}"));
                    }
                }
                _ => return false,
            }
        }
        true
    }

    /// Whether what is dirty of a volume may stay so.
    fn may_stay(&self, volume: &Volume) -> bool {
        let process = self.world.conversion.process.borrow();
        let unbacked = volume.state.borrow().unbacked();
        process.as_ref().zip(unbacked).is_some_and(|(process, waiting)| {
            self.world.may_stay(&process.machine, volume.id, &waiting)
        })
    }

    /// Whether a store holds what the map says of a block.
    fn has_good_copy(&self, name: &str, lblk: u64) -> bool {
        let mut process = self.world.conversion.process.borrow_mut();
        let range = LblkRange::new(lblk, 1);
        let found = process.as_mut().map(|process| process.machine.extents(name, range));
        let Some(Ok(Some(extents))) = found else { return false };
        extents.iter().any(|extent| {
            let at = lblk - extent.range.start.0;
            let sum = extent.crcs.get(at as usize).copied();
            extent.places.as_slice().iter().any(|place| {
                let disk = self.world.disk_of(place.store);
                disk.zip(sum).is_some_and(|(disk, sum)| disk.holds(place.pblk.0 + at, sum))
            })
        })
    }
}
