//! The stores and the writebacks, with what every event asks of all of them kept at hand: with a thousand of
//! each, a walk over them costs more than the event.
//!
//! # Invariants
//! * `kept-as-walked`: what is kept at hand is what a walk would find (`fault`, asked for by `check`).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::ops::{Bound, Deref, DerefMut};

use endio_types::planted::{self, Bug};
use endio_types::{Millis, StoreId};

use super::state::{StoreRt, WritebackRt};
use crate::free_space::{Pool, StoreSpace};
use crate::lease::Lease;

/// The stores, by number.
#[derive(Debug, Default)]
pub(super) struct Roster {
    stores: BTreeMap<StoreId, StoreRt>,
    index: Index,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Index {
    /// Usable stores: free blocks, then the lower number later.
    room: BTreeSet<(u64, Reverse<StoreId>)>,
    /// Those that want a fence and can be sent one.
    fences: BTreeSet<StoreId>,
    /// Those that can be punched, and from when on.
    punches: BTreeSet<(Millis, StoreId)>,
    /// Those of which writebacks have something to hear.
    untold: BTreeSet<StoreId>,
    /// When their leases end.
    leases: BTreeSet<(Millis, StoreId)>,
}

/// Where a store stands in the index.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Keys {
    room: Option<u64>,
    fence: bool,
    punch: Option<Millis>,
    untold: bool,
    lease: Option<Millis>,
}

impl Keys {
    const NONE: Self = Self { room: None, fence: false, punch: None, untold: false, lease: None };

    fn of(rt: &StoreRt) -> Self {
        Self {
            room: rt.is_usable().then(|| rt.space.free()),
            fence: rt.wants_fence(),
            punch: rt.can_punch().then_some(rt.next_punch),
            untold: rt.untold,
            lease: rt.lease.map(|lease| lease.ends()),
        }
    }
}

impl Index {
    fn change(&mut self, id: StoreId, old: Keys, new: Keys) {
        fn put<K: Ord>(set: &mut BTreeSet<K>, old: Option<K>, new: Option<K>) {
            if old != new {
                old.map(|key| set.remove(&key));
                set.extend(new);
            }
        }
        put(&mut self.room, old.room.map(|f| (f, Reverse(id))), new.room.map(|f| (f, Reverse(id))));
        put(&mut self.fences, old.fence.then_some(id), new.fence.then_some(id));
        put(&mut self.punches, old.punch.map(|at| (at, id)), new.punch.map(|at| (at, id)));
        put(&mut self.untold, old.untold.then_some(id), new.untold.then_some(id));
        if planted::is(Bug::LeaseUnindexed) {
            return;
        }
        put(&mut self.leases, old.lease.map(|at| (at, id)), new.lease.map(|at| (at, id)));
    }
}

/// A store that may be changed; what is kept at hand follows when this goes.
pub(super) struct StoreMut<'a> {
    id: StoreId,
    rt: &'a mut StoreRt,
    index: &'a mut Index,
    before: Keys,
}

impl Deref for StoreMut<'_> {
    type Target = StoreRt;
    fn deref(&self) -> &StoreRt {
        self.rt
    }
}

impl DerefMut for StoreMut<'_> {
    fn deref_mut(&mut self) -> &mut StoreRt {
        self.rt
    }
}

impl Drop for StoreMut<'_> {
    fn drop(&mut self) {
        let after = Keys::of(self.rt);
        if after != self.before {
            self.index.change(self.id, self.before, after);
        }
    }
}

impl Roster {
    pub(super) fn len(&self) -> usize {
        self.stores.len()
    }

    pub(super) fn contains_key(&self, id: &StoreId) -> bool {
        self.stores.contains_key(id)
    }

    pub(super) fn get(&self, id: &StoreId) -> Option<&StoreRt> {
        self.stores.get(id)
    }

    pub(super) fn values(&self) -> btree_map::Values<'_, StoreId, StoreRt> {
        self.stores.values()
    }

    pub(super) fn iter(&self) -> btree_map::Iter<'_, StoreId, StoreRt> {
        self.stores.iter()
    }

    pub(super) fn get_mut(&mut self, id: &StoreId) -> Option<StoreMut<'_>> {
        let rt = self.stores.get_mut(id)?;
        Some(StoreMut { id: *id, before: Keys::of(rt), rt, index: &mut self.index })
    }

    /// The store; `or` makes it if there is none.
    pub(super) fn entry(&mut self, id: StoreId, or: impl FnOnce() -> StoreRt) -> StoreMut<'_> {
        let mut before = Keys::NONE;
        let rt = match self.stores.entry(id) {
            btree_map::Entry::Vacant(vacant) => vacant.insert(or()),
            btree_map::Entry::Occupied(occupied) => {
                before = Keys::of(occupied.get());
                occupied.into_mut()
            }
        };
        StoreMut { id, rt, index: &mut self.index, before }
    }

    /// Changes all of them.
    pub(super) fn for_each_mut(&mut self, mut change: impl FnMut(&mut StoreRt)) {
        for (id, rt) in &mut self.stores {
            change(&mut StoreMut { id: *id, before: Keys::of(rt), rt, index: &mut self.index });
        }
    }

    /// How many are usable.
    pub(super) fn usable(&self) -> usize {
        self.index.room.len()
    }

    /// The space of a usable one.
    pub(super) fn usable_space(&self, id: StoreId) -> Option<&StoreSpace> {
        self.stores.get(&id).filter(|rt| rt.is_usable()).map(|rt| &rt.space)
    }

    /// Free blocks of the usable ones, most first.
    pub(super) fn room(&self) -> impl Iterator<Item = u64> + Clone {
        self.index.room.iter().rev().map(|(free, _)| *free)
    }

    /// Those that want a fence and can be sent one, by number.
    pub(super) fn want_fence(&self) -> Vec<StoreId> {
        self.index.fences.iter().copied().collect()
    }

    /// Those that can be punched now, by number.
    pub(super) fn can_be_punched(&self, now: Millis) -> Vec<StoreId> {
        let due = self.index.punches.iter().take_while(|(at, _)| *at <= now);
        let mut due: Vec<StoreId> = due.map(|(_, id)| *id).collect();
        due.sort_unstable();
        due
    }

    /// When the first of them can be punched.
    pub(super) fn next_punch(&self) -> Option<Millis> {
        self.index.punches.first().map(|(at, _)| *at)
    }

    /// Those of which writebacks have something to hear.
    pub(super) fn untold(&self) -> &BTreeSet<StoreId> {
        &self.index.untold
    }

    /// When the first lease ends.
    pub(super) fn next_expiry(&self) -> Option<Millis> {
        self.index.leases.first().map(|(at, _)| *at)
    }

    /// Those whose lease has ended by now, by number.
    pub(super) fn ended(&self, now: Millis) -> Vec<StoreId> {
        let ended = self.index.leases.iter().take_while(|(ends, _)| *ends <= now);
        let mut ended: Vec<StoreId> = ended.map(|(_, id)| *id).collect();
        ended.sort_unstable();
        ended
    }

    /// What is kept at hand and not so.
    pub(super) fn fault(&self) -> Option<&'static str> {
        let all = || self.stores.iter();
        let walked = Index {
            room: all()
                .filter(|(_, rt)| rt.is_usable())
                .map(|(id, rt)| (rt.space.free(), Reverse(*id)))
                .collect(),
            fences: all().filter(|(_, rt)| rt.wants_fence()).map(|(id, _)| *id).collect(),
            punches: all()
                .filter(|(_, rt)| rt.can_punch())
                .map(|(id, rt)| (rt.next_punch, *id))
                .collect(),
            untold: all().filter(|(_, rt)| rt.untold).map(|(id, _)| *id).collect(),
            leases: all().filter_map(|(id, rt)| Some((rt.lease?.ends(), *id))).collect(),
        };
        (walked != self.index)
            .then_some("kept-as-walked: what is kept of the stores is not what they are")
    }
}

impl Pool for Roster {
    fn most_free(&self) -> impl Iterator<Item = (StoreId, &StoreSpace)> + Clone {
        let ids = self.index.room.iter().rev().map(|(_, Reverse(id))| *id);
        ids.filter_map(|id| Some((id, &self.stores.get(&id)?.space)))
    }

    fn change<R>(&mut self, id: StoreId, with: impl FnOnce(&mut StoreSpace) -> R) -> Option<R> {
        self.get_mut(&id).map(|mut rt| with(&mut rt.space))
    }
}

/// The writebacks, by name.
#[derive(Debug, Default)]
pub(super) struct Writebacks {
    by_name: BTreeMap<String, WritebackRt>,
    /// When their leases end.
    leases: BTreeSet<(Millis, String)>,
}

impl Writebacks {
    pub(super) fn get(&self, name: &str) -> Option<&WritebackRt> {
        self.by_name.get(name)
    }

    pub(super) fn values(&self) -> btree_map::Values<'_, String, WritebackRt> {
        self.by_name.values()
    }

    /// Those whose names do not come before this one, in order.
    pub(super) fn from<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let from = (Bound::Included(name), Bound::Unbounded);
        self.by_name.range::<str, _>(from).map(|(name, _)| name.as_str())
    }

    /// Changes one, which is made if there is none. Without a session and a lease it goes.
    pub(super) fn change<R>(&mut self, name: &str, with: impl FnOnce(&mut WritebackRt) -> R) -> R {
        let mut rt = self.by_name.get(name).cloned().unwrap_or_default();
        let ends = |rt: &WritebackRt| rt.lease.map(|lease: Lease| (lease.ends(), name.to_owned()));
        let before = ends(&rt);
        let result = with(&mut rt);
        let after = ends(&rt);
        if before != after {
            before.map(|key| self.leases.remove(&key));
            self.leases.extend(after);
        }
        match rt.session.is_none() && rt.lease.is_none() {
            true => drop(self.by_name.remove(name)),
            false => match self.by_name.get_mut(name) {
                Some(old) => *old = rt,
                None => drop(self.by_name.insert(name.to_owned(), rt)),
            },
        }
        result
    }

    /// When the first lease ends.
    pub(super) fn next_expiry(&self) -> Option<Millis> {
        self.leases.first().map(|(at, _)| *at)
    }

    /// Those whose lease has ended by now, by name.
    pub(super) fn ended(&self, now: Millis) -> Vec<String> {
        let ended = self.leases.iter().take_while(|(ends, _)| *ends <= now);
        let mut ended: Vec<String> = ended.map(|(_, name)| name.clone()).collect();
        ended.sort_unstable();
        ended
    }

    /// What is kept at hand and not so.
    pub(super) fn fault(&self) -> Option<&'static str> {
        let walked = self.by_name.iter().filter_map(|(name, rt)| Some((rt.lease?.ends(), name)));
        let walked: BTreeSet<(Millis, &String)> = walked.collect();
        let is_same = walked.into_iter().eq(self.leases.iter().map(|(at, name)| (*at, name)));
        (!is_same).then_some("kept-as-walked: what is kept of the writebacks is not what they are")
    }
}
