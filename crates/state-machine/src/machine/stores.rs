//! Sessions of block-stores.

use endio_types::{
    BLOCK_BYTES, ClusterEpoch, Incarnation, Millis, Reason, SegmentIndex, StoreId, VOLUME_BYTES_MAX,
};

use super::io::{EffectKind, FromStore, Output, Refusal, StoreSession, ToStore, ToWriteback};
use super::quarantine::{after, fence_message};
use super::state::StoreRt;
use super::{Durability, Machine, Step};
use crate::extent_map::ChunkTable;
use crate::free_space::StoreSpace;
use crate::lease::Lease;
use crate::ledger::Outcome;
use crate::record::{Record, StoreState};

/// Longest url of a store; it is kept for good.
const STORE_URL_BYTES_MAX: usize = 1024;

impl<T: ChunkTable> Machine<T> {
    /// A message of a block-store.
    pub(super) fn store(
        &mut self,
        session: StoreSession,
        message: FromStore,
        out: &mut Output,
    ) -> Step<T> {
        if let FromStore::Register { uuid, incarnation, capacity_blocks, url, name } = message {
            let id = self.durable.stores.values().find(|store| store.uuid == uuid);
            let id = id.map_or(self.durable.next_store, |store| store.id);
            let state = StoreState { id, uuid, incarnation, capacity_blocks, url };
            return self.register(session, state, name, out);
        }
        let Some(store) = self.store_sessions.get(&session).copied() else {
            let refusal = self.refusal(Reason::WrongState, "the store is not registered");
            self.refuse_store(session, refusal, out);
            return Ok(());
        };
        match message {
            FromStore::Register { .. } => Ok(()),
            FromStore::Ready { epoch } => self.store_ready(store, epoch),
            FromStore::Release { token, outcome } => {
                let released = self.release_segment(store, &token, Outcome::Store(outcome), out)?;
                let (io_end, segment) = (token.io_end, token.segment);
                if let Some(mut rt) = self.stores.get_mut(&store) {
                    rt.written_at = Some(self.now);
                }
                let refused = released.err();
                self.send_store(store, ToStore::Released { io_end, segment, refused }, out);
                Ok(())
            }
            FromStore::Renew => {
                self.renew_store(store, out);
                Ok(())
            }
            FromStore::FenceDone { fence } => self.fence_done(store, fence),
            FromStore::PunchDone { punch } => self.punch_done(store, punch),
        }
    }

    fn refuse_store(&self, session: StoreSession, refusal: Refusal, out: &mut Output) {
        let kind = EffectKind::Store(session, ToStore::SessionRefused(refusal));
        self.push(Durability::Now, kind, out);
    }

    /// Sends to a store, never ahead of its registration.
    fn send_store(&self, store: StoreId, message: ToStore, out: &mut Output) {
        let Some(rt) = self.stores.get(&store) else { return };
        if let Some(session) = rt.session {
            self.push(after(rt, self.committed), EffectKind::Store(session, message), out);
        }
    }

    /// Why a registration is refused, if it is.
    fn registration_fault(&self, new: &StoreState, name: Option<&String>) -> Option<Refusal> {
        if self.granting_key().is_none() {
            return Some(self.refusal(Reason::NotReady, "recovering"));
        }
        let bound = self.durable.store_names.get(&new.id);
        if name.zip(bound).is_some_and(|(name, bound)| name != bound) {
            let message = "the store was first registered with another name in its certificate: give \
                           it a certificate with that name";
            return Some(self.refusal(Reason::NotAllowed, message));
        }
        if new.incarnation == Incarnation(0) || new.capacity_blocks == 0 {
            return Some(self.refusal(Reason::Malformed, "incarnation and capacity start at 1"));
        }
        // Sums of the capacities of many stores stay far from overflow.
        if new.capacity_blocks > VOLUME_BYTES_MAX / BLOCK_BYTES {
            return Some(self.refusal(Reason::Malformed, "the capacity is at most 2^48 blocks"));
        }
        if new.url.is_empty() || new.url.len() > STORE_URL_BYTES_MAX {
            return Some(self.refusal(Reason::Malformed, "the url is empty or too long"));
        }
        let old = self.durable.stores.get(&new.id)?;
        if new.incarnation < old.incarnation {
            return Some(self.refusal(Reason::OldIncarnation, "a newer incarnation registered"));
        }
        if new.capacity_blocks < old.capacity_blocks {
            return Some(self.refusal(Reason::WrongState, "a store cannot shrink"));
        }
        None
    }

    fn register(
        &mut self,
        session: StoreSession,
        new: StoreState,
        name: Option<String>,
        out: &mut Output,
    ) -> Step<T> {
        if let Some(refusal) = self.registration_fault(&new, name.as_ref()) {
            self.refuse_store(session, refusal, out);
            return Ok(());
        }
        let id = new.id;
        let old = self.durable.stores.get(&id).cloned();
        if let Some(before) = self.store_sessions.get(&session).filter(|before| **before != id) {
            let before = *before;
            if let Some(mut rt) = self.stores.get_mut(&before) {
                rt.session = None;
            }
        }
        let capacity = new.capacity_blocks;
        let is_restart = old.as_ref().is_none_or(|old| old.incarnation < new.incarnation);
        let is_known = old.as_ref() == Some(&new);
        let mut rt = self.stores.entry(id, || StoreRt::new(StoreSpace::empty(capacity)));
        rt.space.grow(capacity);
        rt.lease = Some(Lease::grant(self.now, self.limits.lease_ms));
        let replaced = rt.session.replace(session).filter(|before| *before != session);
        if is_restart {
            rt.ready = false;
        }
        drop(rt);
        if let Some(before) = replaced {
            self.store_sessions.remove(&before);
            self.push(Durability::Now, EffectKind::EndStore(before), out);
        }
        self.store_sessions.insert(session, id);
        if !is_known {
            self.commit(Record::Store(new), out)?;
        }
        if let Some(name) = name.filter(|_| !self.durable.store_names.contains_key(&id)) {
            self.commit(Record::StoreNamed { store: id, name }, out)?;
        }
        if let Some(mut rt) = self.stores.get_mut(&id) {
            rt.registered = self.durable.seq;
        }
        if is_restart {
            self.abort_of_store(id, Reason::OldIncarnation, out)?;
            self.drained_by_restart(id)?;
        }
        self.registered(id, out);
        Ok(())
    }

    /// Answers a registration, and sends again what the store may not have heard.
    fn registered(&mut self, id: StoreId, out: &mut Output) {
        let Some(key) = self.granting_key().cloned() else { return };
        let message = ToStore::Registered {
            store: id,
            epoch: self.durable.epoch,
            key,
            lease_ms: self.limits.lease_ms,
            floor: self.floor(),
        };
        self.send_store(id, message, out);
        let Some(rt) = self.stores.get(&id) else { return };
        let fence = rt.fence.as_ref().map(fence_message);
        let punch = rt.punch.clone().map(|(punch, ranges)| ToStore::Punch { punch, ranges });
        for message in fence.into_iter().chain(punch) {
            self.send_store(id, message, out);
        }
        self.note_news(id);
    }

    fn store_ready(&mut self, id: StoreId, epoch: ClusterEpoch) -> Step<T> {
        if epoch != self.durable.epoch {
            return Ok(());
        }
        if let Some(mut rt) = self.stores.get_mut(&id) {
            rt.ready = true;
        }
        self.drained_by_epoch(id)?;
        self.note_news(id);
        Ok(())
    }

    fn renew_store(&mut self, id: StoreId, out: &mut Output) {
        let lease = Lease::grant(self.now, self.limits.lease_ms);
        let Some(mut rt) = self.stores.get_mut(&id) else { return };
        let returned = rt.lease.replace(lease).is_none();
        drop(rt);
        let message = ToStore::Renewed { lease_ms: self.limits.lease_ms, floor: self.floor() };
        self.send_store(id, message, out);
        if returned {
            self.note_news(id);
        }
    }

    /// The stream to a store ended. Its tokens live until its lease ends.
    pub(super) fn store_lost(&mut self, session: StoreSession) {
        let Some(id) = self.store_sessions.remove(&session) else { return };
        if let Some(mut rt) = self.stores.get_mut(&id) {
            rt.session = None;
        }
        self.note_news(id);
    }

    /// The lease of a store has ended.
    pub(super) fn expire_store(&mut self, id: StoreId, out: &mut Output) -> Step<T> {
        if let Some(mut rt) = self.stores.get_mut(&id) {
            rt.lease = None;
        }
        self.abort_of_store(id, Reason::LeaseExpired, out)?;
        self.note_news(id);
        Ok(())
    }

    /// Aborts every io_end of which the store holds a token.
    fn abort_of_store(&mut self, id: StoreId, reason: Reason, out: &mut Output) -> Step<T> {
        let holds = |index: &SegmentIndex, io_end: &crate::ledger::IoEnd| {
            io_end.segment(*index).is_some_and(|segment| segment.store == id)
        };
        let held = self.ledger.iter().filter(|e| e.live.iter().any(|index| holds(index, e)));
        let held: Vec<_> = held.map(|io_end| io_end.id).collect();
        for io_end in held {
            self.abort(io_end, reason, Some(id), out)?;
        }
        Ok(())
    }

    /// Notes that writebacks are to hear of a store, with the next [`Machine::drain`].
    fn note_news(&mut self, id: StoreId) {
        if let Some(mut rt) = self.stores.get_mut(&id) {
            rt.untold = true;
        }
    }

    /// Whether writebacks are to hear something of the stores now.
    pub(super) fn has_news(&self) -> bool {
        self.next_news <= self.now && !self.stores.untold().is_empty()
    }

    /// When they are, if it is later than now.
    pub(super) fn later_news(&self) -> Option<Millis> {
        (self.next_news > self.now && !self.stores.untold().is_empty()).then_some(self.next_news)
    }

    /// Tells every writeback about the stores, if there is news of one. Once a turn: the list names all of
    /// them, and after a restart each of them comes twice. That is early enough: it waits for records,
    /// so a grant that names a store overtakes what was said of the store in the same turn in any case. Where
    /// many stores tell many writebacks, the next list waits for its share of `listed_stores_per_s`.
    pub(super) fn tell_stores(&mut self, out: &mut Output) {
        if !self.has_news() {
            return;
        }
        for id in self.stores.untold().clone() {
            if let Some(mut rt) = self.stores.get_mut(&id) {
                rt.untold = false;
            }
        }
        if self.writeback_sessions.is_empty() {
            return;
        }
        let stores = self.stores(self.now);
        let entries = (stores.len() * self.writeback_sessions.len()) as u64;
        self.next_news = self.now.plus(entries * 1000 / self.limits.listed_stores_per_s.max(1));
        for session in self.writeback_sessions.keys() {
            let message = ToWriteback::Stores(stores.clone());
            self.push(self.when_committed(), EffectKind::Writeback(*session, message), out);
        }
    }
}
