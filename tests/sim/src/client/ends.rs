//! Volumes that are deleted, taken over, cut off from power, and looked at in the end.

use std::rc::Rc;

use super::{Clients, FENCED_TAG, Slot};
use crate::block::{CELL_BYTES, cell};
use crate::exec::MS;
use crate::writeback::{Volume, Wb};

impl Clients {
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
            self.exec().sleep(5 * MS).await;
            at = self.volume(slot).await;
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
        loop {
            self.exec().sleep(MS).await;
            let Some(engine) = self.world.writebacks[to].serving() else { continue };
            let wb = Wb { world: Rc::clone(&self.world), at: to, engine };
            // It may not have heard yet that it was fenced long ago.
            wb.forget_stale(&slot.name);
            let (inner, name) = (wb.clone(), slot.name.clone());
            let opened = self.inside(&wb, async move { inner.open(&name, true).await }).await;
            if matches!(opened, Some(Ok(_))) {
                break;
            }
        }
        slot.is_held.set(false);
        self.exec().note("taken over", to, &[]);
        slot.owner.set(to);
        slot.tenure.set(slot.tenure.get() + 1);
        {
            let known = &mut *slot.known.borrow_mut();
            known.oracle.lose_unflushed();
            known.unsaid_loss = false;
            known.is_resizing = false;
            for doubt in std::mem::take(&mut known.doubts) {
                known.oracle.fail_write(doubt.sequence);
            }
        }
        if let Some(old) = old {
            self.haunt(slot, &old).await;
        }
    }

    /// A client that has not heard of the takeover goes on at the old owner.
    async fn haunt(&self, slot: &Slot, old: &Wb) {
        let Some(volume) = old.open_here(&slot.name) else { return };
        let tenure = slot.tenure.get();
        for _ in 0..self.exec().below(4) {
            let Some((first, cells)) = self.somewhere(slot, false) else { return };
            let data = (first..first + cells).map(|at| cell(FENCED_TAG, at, 1)).collect();
            let (inner, volume) = (old.clone(), Rc::clone(&volume));
            let direct = self.exec().chance(500);
            let work = async move { inner.write(&volume, first, data, direct, None).await };
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
            known.oracle.lose_unflushed();
            known.unsaid_loss |= open.contains(&slot.name);
        }
    }

    /// Everything is well: what each volume holds is what it may hold.
    pub async fn inspect(&self, slot: &Rc<Slot>) -> bool {
        for _ in 0..40 {
            if self.try_inspect(slot).await {
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

    async fn try_inspect(&self, slot: &Rc<Slot>) -> bool {
        let Some((wb, volume)) = self.volume(slot).await else { return false };
        if !self.fsync(slot, &wb, &volume, &mut None).await {
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
        let Some(Ok(found)) = read else { return false };
        let mut known = slot.known.borrow_mut();
        if cells < known.size_cells && !known.is_resizing {
            let why = format!("volume {} has {cells} cells", slot.name);
            self.exec().fail(format!("no_lost_flushed_write: {why}"));
        }
        self.check(slot, &mut known, began, 0, &found);
        true
    }
}
