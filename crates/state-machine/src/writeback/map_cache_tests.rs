#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;

fn range(start: u64, len: u64) -> LblkRange {
    LblkRange::new(start, len)
}

#[test]
fn a_range_is_found_only_if_all_of_it_is_known() {
    let mut cache = MapCache::new(100);
    let ticket = cache.ticket();
    cache.learn(ticket, [(range(0, 4), Some('a')), (range(4, 2), None), (range(7, 3), Some('b'))]);
    let found = cache.find(range(2, 4)).unwrap();
    assert_eq!(found, [(range(2, 2), Some('a')), (range(4, 2), None)]);
    assert_eq!(cache.find(range(5, 3)), None);
    assert_eq!(cache.find(range(9, 2)), None);
    assert_eq!(cache.find(range(8, 2)), Some(vec![(range(8, 2), Some('b'))]));
}

#[test]
fn a_change_hides_its_blocks_until_it_ends_and_its_end_tells_them() {
    let mut cache = MapCache::new(100);
    cache.learn(cache.ticket(), [(range(0, 10), Some('a'))]);
    let change = cache.begin(vec![range(2, 2), range(6, 1)]);
    assert_eq!(cache.find(range(3, 1)), None);
    assert_eq!(cache.find(range(6, 1)), None);
    assert_eq!(cache.find(range(4, 2)), Some(vec![(range(4, 2), Some('a'))]));
    cache.learn(cache.ticket(), [(range(0, 10), Some('a'))]);
    assert_eq!(cache.find(range(2, 1)), None, "the look-up may be older than the change");
    cache.end(change, [(range(2, 2), Some('b')), (range(6, 1), Some('b'))]);
    assert_eq!(cache.find(range(2, 2)), Some(vec![(range(2, 2), Some('b'))]));
    assert_eq!(cache.find(range(6, 1)), Some(vec![(range(6, 1), Some('b'))]));
}

#[test]
fn a_look_up_teaches_nothing_of_what_changed_meanwhile() {
    let mut cache = MapCache::new(100);
    let asked = cache.ticket();
    let change = cache.begin(vec![range(2, 1)]);
    cache.end(change, [(range(2, 1), Some('b'))]);
    cache.learn(asked, [(range(0, 4), Some('a'))]);
    assert_eq!(cache.find(range(2, 1)), None, "nor does what the end told stay");
    assert!(cache.find(range(0, 2)).is_some() && cache.find(range(3, 1)).is_some());
    let asked = cache.ticket();
    cache.reset();
    cache.learn(asked, [(range(0, 4), Some('a'))]);
    assert_eq!(cache.entries(), 0);
}

#[test]
fn an_answer_is_current_until_its_blocks_change_or_another_session_begins() {
    let mut cache = MapCache::<char>::new(0);
    let asked = cache.ticket();
    assert!(cache.is_current(asked, range(2, 2)));
    let change = cache.begin(vec![range(3, 1)]);
    assert!(cache.is_current(asked, range(2, 1)) && !cache.is_current(asked, range(2, 2)));
    assert!(!cache.is_current(cache.ticket(), range(3, 1)), "it is under way");
    cache.end(change, []);
    assert!(cache.is_current(cache.ticket(), range(3, 1)) && !cache.is_current(asked, range(3, 1)));
    let lost = cache.begin(vec![range(9, 1)]);
    cache.give_up(lost);
    assert!(!cache.is_current(cache.ticket(), range(9, 1)), "it may take effect at any time");
    let asked = cache.ticket();
    cache.reset();
    assert!(!cache.is_current(asked, range(2, 1)));
}

#[test]
fn a_look_up_that_outlives_the_memory_of_changes_teaches_nothing() {
    let mut cache = MapCache::new(100);
    let asked = cache.ticket();
    for _ in 0..EVENTS_MAX {
        let change = cache.begin(vec![range(50, 1)]);
        cache.end(change, []);
    }
    cache.learn(asked, [(range(0, 4), Some('a'))]);
    assert_eq!(cache.entries(), 0);
}

#[test]
fn blocks_of_a_change_that_was_given_up_stay_unknown() {
    let mut cache = MapCache::new(100);
    let change = cache.begin(vec![range(2, 1)]);
    cache.give_up(change);
    cache.reset();
    cache.learn(cache.ticket(), [(range(0, 4), Some('a'))]);
    assert_eq!((cache.find(range(2, 1)), cache.entries()), (None, 2));
    for _ in 0..LOST_MAX {
        let change = cache.begin(vec![range(9, 1)]);
        cache.give_up(change);
    }
    cache.learn(cache.ticket(), [(range(0, 1), Some('a'))]);
    assert_eq!(cache.entries(), 0, "too much is lost to be sure of anything");
}

#[test]
fn it_never_holds_more_than_its_bound() {
    let mut cache = MapCache::new(16);
    for at in 0..1000 {
        cache.learn(cache.ticket(), [(range(at * 2, 1), Some(at))]);
        assert!(cache.entries() <= 16);
    }
    let mut never = MapCache::new(0);
    never.learn(never.ticket(), [(range(0, 1), Some(1))]);
    assert_eq!(never.entries(), 0);
}

const BLOCKS: u64 = 24;

/// When it was asked, for what, and what the map said when it was answered.
type LookUp = (Ticket, LblkRange, Option<Vec<Option<u32>>>);

/// A map that changes at any time between the begin and the end of a change.
struct World {
    map: Vec<Option<u32>>,
    cache: MapCache<u32>,
    /// Change, its range, what it writes, whether it has taken effect.
    changes: Vec<(ChangeId, LblkRange, Option<u32>, bool)>,
    look_ups: Vec<LookUp>,
    next: u32,
}

impl World {
    fn act(&mut self, what: u8, a: u64, b: u64) {
        let at = a % BLOCKS;
        let asked = range(at, 1 + b % 6 % (BLOCKS - at));
        match what % 8 {
            // One change of a block at a time, as the locks of the service see to.
            0 | 1 if self.changes.iter().all(|(_, other, _, _)| !other.overlaps(asked)) => {
                self.next += 1;
                let value = (!b.is_multiple_of(5)).then_some(self.next);
                self.changes.push((self.cache.begin(vec![asked]), asked, value, false));
            }
            2 => self.take_effect(a),
            3 if !self.changes.is_empty() => {
                let index = a as usize % self.changes.len();
                let (id, range, value, done) = self.changes.swap_remove(index);
                match done {
                    true if !b.is_multiple_of(3) => self.cache.end(id, [(range, value)]),
                    // It did not take effect and never will, or nobody knows what it did.
                    _ => self.cache.end(id, []),
                }
            }
            4 => self.look_ups.push((self.cache.ticket(), asked, None)),
            5 if !self.look_ups.is_empty() => {
                let index = a as usize % self.look_ups.len();
                let (_, range, answer) = &mut self.look_ups[index];
                let blocks = range.start.0 as usize..range.end() as usize;
                *answer = Some(self.map[blocks].to_vec());
            }
            6 if !self.look_ups.is_empty() => {
                let index = a as usize % self.look_ups.len();
                if self.look_ups[index].2.is_some() {
                    let (ticket, range, answer) = self.look_ups.swap_remove(index);
                    let blocks = (range.start.0..range.end()).map(|at| LblkRange::new(at, 1));
                    self.cache.learn(ticket, blocks.zip(answer.unwrap()));
                }
            }
            7 if b.is_multiple_of(16) => self.cache.reset(),
            _ => {}
        }
    }

    fn take_effect(&mut self, a: u64) {
        let count = self.changes.len() as u64;
        if count == 0 {
            return;
        }
        let (_, range, value, done) = &mut self.changes[(a % count) as usize];
        *done = true;
        for at in range.start.0..range.end() {
            self.map[at as usize] = *value;
        }
    }

    fn check(&self) {
        for at in 0..BLOCKS {
            if let Some(found) = self.cache.find(range(at, 1)) {
                assert_eq!(found, [(range(at, 1), self.map[at as usize])], "known-is-current");
            }
        }
    }
}

proptest! {
    #[test]
    fn what_is_known_is_what_the_map_says(
        actions in prop::collection::vec(any::<(u8, u64, u64)>(), 1..200)
    ) {
        let mut world = World {
            map: vec![None; BLOCKS as usize],
            cache: MapCache::new(12),
            changes: Vec::new(),
            look_ups: Vec::new(),
            next: 0,
        };
        for (what, a, b) in actions {
            world.act(what, a, b);
            world.check();
        }
    }
}
