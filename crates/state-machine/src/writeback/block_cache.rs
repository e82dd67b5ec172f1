//! Blocks that are clean and were read before, so that reading them again asks nobody.
//!
//! The cache knows blocks by their tenant, an opened volume, and their logical number. Whoever has the
//! volume open forgets blocks before a change of the map of them begins, and puts in only what was
//! read while no such change was under way ([`MapCache::is_current`](super::map_cache::MapCache)).
//!
//! # Invariants
//! * `clean-is-current`: what is cached of a block is what the map shows of it now. Kept by the
//!   callers, as said above.
//! * Never more than `blocks_max` blocks. Who goes first is chosen as by a clock: what was read since
//!   the hand came by stays for another round.

use std::collections::BTreeMap;

use endio_types::LblkRange;

/// Slots that one insertion looks at for a victim; then the next is taken, whatever it is.
const LOOKS_MAX: usize = 64;

/// A volume, for as long as it is open: a number that is never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Tenant(pub u64);

/// What may be done to take a block in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Another block may go for it.
    Evict,
    /// Only if there is room: long reads would push out what is read often.
    IfRoom,
}

#[derive(Clone, Debug)]
struct Slot<D> {
    key: (Tenant, u64),
    data: D,
    /// Read since the hand came by.
    is_recent: bool,
}

/// Clean blocks of all volumes. `D` is a handle on a block's data that is cheap to clone.
#[derive(Clone, Debug)]
pub struct BlockCache<D> {
    slots: Vec<Slot<D>>,
    index: BTreeMap<(Tenant, u64), usize>,
    hand: usize,
    blocks_max: usize,
}

impl<D> BlockCache<D> {
    /// Empty, and never more than `blocks_max` blocks; 0: it takes nothing in.
    pub fn new(blocks_max: usize) -> Self {
        Self { slots: Vec::new(), index: BTreeMap::new(), hand: 0, blocks_max }
    }

    /// Blocks in it.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether a block would be taken in.
    pub fn takes(&self, admission: Admission) -> bool {
        self.slots.len() < self.blocks_max || (admission == Admission::Evict && self.blocks_max > 0)
    }

    /// A block, which counts as read now.
    pub fn get(&mut self, tenant: Tenant, lblk: u64) -> Option<&D> {
        let slot = &mut self.slots[*self.index.get(&(tenant, lblk))?];
        slot.is_recent = true;
        Some(&slot.data)
    }

    /// Takes a block in, in place of what was known of it.
    pub fn insert(&mut self, tenant: Tenant, lblk: u64, data: D, admission: Admission) {
        let key = (tenant, lblk);
        if let Some(at) = self.index.get(&key) {
            self.slots[*at].data = data;
            return;
        }
        if !self.takes(admission) {
            return;
        }
        let slot = Slot { key, data, is_recent: false };
        if self.slots.len() < self.blocks_max {
            self.index.insert(key, self.slots.len());
            self.slots.push(slot);
            return;
        }
        let victim = self.victim();
        self.index.remove(&self.slots[victim].key);
        self.index.insert(key, victim);
        self.slots[victim] = slot;
    }

    /// Nothing is known of these blocks any more.
    pub fn forget(&mut self, tenant: Tenant, range: LblkRange) {
        let found = self.index.range((tenant, range.start.0)..(tenant, range.end()));
        let gone: Vec<_> = found.map(|(key, _)| *key).collect();
        for key in gone {
            if let Some(at) = self.index.remove(&key) {
                self.remove(at);
            }
        }
    }

    /// Takes a slot out that the index does not know any more.
    fn remove(&mut self, at: usize) {
        self.slots.swap_remove(at);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.key, at);
        }
    }

    /// The cache is full, so there is one.
    fn victim(&mut self) -> usize {
        for _ in 0..LOOKS_MAX {
            let at = self.turn();
            if !std::mem::take(&mut self.slots[at].is_recent) {
                return at;
            }
        }
        self.turn()
    }

    fn turn(&mut self) -> usize {
        let at = if self.hand < self.slots.len() { self.hand } else { 0 };
        self.hand = at + 1;
        at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Tenant = Tenant(1);
    const B: Tenant = Tenant(2);

    #[test]
    fn what_was_read_stays_longer_than_what_was_not() {
        let mut cache = BlockCache::new(4);
        for lblk in 0..4 {
            cache.insert(A, lblk, lblk, Admission::IfRoom);
        }
        assert_eq!(cache.get(A, 1), Some(&1));
        for lblk in 10..13 {
            cache.insert(A, lblk, lblk, Admission::IfRoom);
            assert_eq!(cache.get(A, lblk), None, "a long read pushes nothing out");
            cache.insert(A, lblk, lblk, Admission::Evict);
        }
        assert_eq!(cache.len(), 4);
        assert_eq!(cache.get(A, 1), Some(&1));
        assert_eq!(cache.get(A, 0), None);
    }

    #[test]
    fn a_cache_of_no_size_takes_nothing() {
        let mut cache = BlockCache::new(0);
        cache.insert(A, 1, 1, Admission::Evict);
        assert!(cache.is_empty() && cache.get(A, 1).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]
        /// Whatever it still has is what was put in last and not forgotten since, and it keeps its
        /// bound.
        #[test]
        fn it_returns_what_was_put_in_last_or_nothing(
            ops in prop::collection::vec((0u8..4, any::<bool>(), 0u64..24, 1u64..40), 1..200),
        ) {
            let mut cache = BlockCache::new(8);
            let mut model = BTreeMap::new();
            for (number, (what, is_a, lblk, len)) in ops.into_iter().enumerate() {
                let tenant = if is_a { A } else { B };
                match what {
                    0 | 1 => {
                        let admission = if what == 0 { Admission::Evict } else { Admission::IfRoom };
                        cache.insert(tenant, lblk, number, admission);
                        model.insert((tenant.0, lblk), number);
                    }
                    2 => {
                        cache.forget(tenant, LblkRange::new(lblk, len));
                        model.retain(|(t, at), _| *t != tenant.0 || *at < lblk || *at >= lblk + len);
                    }
                    _ => {
                        if let Some(found) = cache.get(tenant, lblk) {
                            prop_assert_eq!(Some(found), model.get(&(tenant.0, lblk)));
                        }
                    }
                }
                prop_assert!(cache.len() <= 8);
                prop_assert_eq!(cache.index.len(), cache.slots.len());
                for (key, at) in &cache.index {
                    prop_assert_eq!(cache.slots[*at].key, *key);
                }
            }
        }
    }
}
