//! Free space of the stores: every block is in exactly one class.
//!
//! ```text
//!   Free ── allocate ──► Reserved ── convert ──► Mapped ── overwrite, trim ──► Quarantined ─┐
//!     ▲                     └────────── abort ──────────────────────────────►              │
//!     └───────────────────── nothing can be in flight there any more ──────────────────────┘
//! ```
//!
//! # Invariants
//! * `block-one-class`: free, reserved and quarantined blocks of a store never overlap, and with
//!   the mapped ones they are the whole store.

use std::collections::{BTreeMap, BTreeSet};

use endio_types::{PblkRange, REPLICAS_MAX, StoreId};

/// A set of block numbers, kept as runs that neither overlap nor touch.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RangeSet {
    /// Start to end (exclusive).
    runs: BTreeMap<u64, u64>,
    total: u64,
}

impl RangeSet {
    /// Blocks in the set.
    pub fn total(&self) -> u64 {
        self.total
    }
    /// The runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PblkRange> + '_ {
        self.runs.iter().map(|(start, end)| PblkRange::new(*start, end - start))
    }
    /// Runs that end after `from`, ascending; the first may begin before it.
    fn runs_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before = self.runs.range(..from).next_back().filter(|(_, end)| **end > from);
        before.into_iter().chain(self.runs.range(from..)).map(|(start, end)| (*start, *end))
    }
    /// Whether every block of `range` is in the set.
    pub fn contains(&self, range: PblkRange) -> bool {
        self.runs.range(..=range.start.0).next_back().is_some_and(|(_, end)| *end >= range.end())
    }
    /// Whether any block of `range` is in the set.
    pub fn overlaps(&self, range: PblkRange) -> bool {
        self.runs_from(range.start.0).next().is_some_and(|(start, _)| start < range.end())
    }
    /// Adds a range; `false`, and nothing is changed, if a block of it is in the set already.
    pub fn insert(&mut self, range: PblkRange) -> bool {
        if range.len == 0 {
            return true;
        }
        if self.overlaps(range) {
            return false;
        }
        let (mut start, mut end) = (range.start.0, range.end());
        if let Some((before, before_end)) = self.runs.range(..start).next_back()
            && *before_end == start
        {
            start = *before;
        }
        if let Some(after_end) = self.runs.remove(&end) {
            end = after_end;
        }
        self.runs.insert(start, end);
        self.total += range.len;
        true
    }
    /// Removes whatever of `range` is in the set; returns how many blocks that were.
    pub fn remove(&mut self, range: PblkRange) -> u64 {
        let (from, to) = (range.start.0, range.end());
        let mut removed = 0;
        loop {
            let next = self.runs_from(from).next().filter(|(start, _)| *start < to);
            let Some((start, end)) = next else { break };
            self.runs.remove(&start);
            if start < from {
                self.runs.insert(start, from);
            }
            if end > to {
                self.runs.insert(to, end);
            }
            removed += end.min(to) - start.max(from);
        }
        self.total -= removed;
        removed
    }
    /// The gaps inside `0..capacity`, ascending.
    pub fn complement(&self, capacity: u64) -> Vec<PblkRange> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (start, end) in &self.runs {
            if at < *start {
                gaps.push(PblkRange::new(at, start - at));
            }
            at = *end;
        }
        if at < capacity {
            gaps.push(PblkRange::new(at, capacity - at));
        }
        gaps
    }
}

/// The classes of the blocks of one store. Which blocks are mapped stands in the extent map; here
/// they are only counted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreSpace {
    capacity: u64,
    free: RangeSet,
    /// Free blocks that still take space on the host; always part of `free`.
    unpunched: RangeSet,
    reserved: RangeSet,
    quarantined: RangeSet,
    mapped: u64,
    /// Where the next search begins.
    cursor: u64,
    /// The same for searches among `unpunched`.
    reuse_cursor: u64,
}

/// How free runs are looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Search {
    /// Runs that are looked at before the best one seen is taken, at least 1.
    pub runs: usize,
    /// From so many free blocks that still take space on the host on, runs of them that suffice are
    /// handed out before others: the host need not make place for them, nor take it back.
    pub reuse_blocks: u64,
}

/// A move between classes that does not fit: the accounting is broken, the process must stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("block-one-class: {0}")]
pub struct WrongClass(pub &'static str);

impl StoreSpace {
    /// A store whose blocks are all free and holes on the host.
    pub fn empty(capacity: u64) -> Self {
        let mut space = Self { capacity, ..Self::default() };
        space.free.insert(PblkRange::new(0, capacity));
        space
    }
    /// A store found at recovery: what is not mapped is quarantined.
    pub fn recovered(capacity: u64, mapped: &RangeSet) -> Self {
        let mut space = Self { capacity, mapped: mapped.total(), ..Self::default() };
        for gap in mapped.complement(capacity) {
            space.quarantined.insert(gap);
        }
        space
    }
    /// The store has become larger.
    pub fn grow(&mut self, capacity: u64) {
        if capacity > self.capacity {
            self.free.insert(PblkRange::new(self.capacity, capacity - self.capacity));
            self.capacity = capacity;
        }
    }
    /// All blocks.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }
    /// Blocks that can be allocated.
    pub fn free(&self) -> u64 {
        self.free.total()
    }
    /// Blocks of io_ends in flight.
    pub fn reserved(&self) -> u64 {
        self.reserved.total()
    }
    /// Blocks that are not safe yet.
    pub fn quarantined(&self) -> u64 {
        self.quarantined.total()
    }
    /// Blocks in the extent map.
    pub fn mapped(&self) -> u64 {
        self.mapped
    }
    /// The sets, for the full check: free, reserved, quarantined.
    pub fn sets(&self) -> [(&'static str, &RangeSet); 3] {
        [("free", &self.free), ("reserved", &self.reserved), ("quarantined", &self.quarantined)]
    }
    /// Whether `unpunched` is part of `free`.
    pub fn unpunched_is_free(&self) -> bool {
        self.unpunched.iter().all(|range| self.free.contains(range))
    }

    /// Reserves a run of at most `max` blocks: the first that is long enough after the last one
    /// taken, or the longest of those looked at. `None`: nothing is free.
    pub fn allocate(&mut self, max: u64, search: Search) -> Option<PblkRange> {
        let found = match self.find_reusable(max, search) {
            Some(found) => {
                self.reuse_cursor = found.end();
                found
            }
            None => {
                let found = self.find(max, search)?;
                self.cursor = found.end();
                found
            }
        };
        self.free.remove(found);
        self.unpunched.remove(found);
        self.reserved.insert(found);
        Some(found)
    }

    /// Length of the run that [`Self::allocate`] would return.
    pub fn longest(&self, max: u64, search: Search) -> u64 {
        let found = self.find_reusable(max, search).or_else(|| self.find(max, search));
        found.map_or(0, |run| run.len)
    }

    /// A run of the whole length that the host has a place for: fragments are no bargain.
    fn find_reusable(&self, max: u64, search: Search) -> Option<PblkRange> {
        if self.unpunched.total() < search.reuse_blocks.max(1) {
            return None;
        }
        let from = self.reuse_cursor;
        let behind = self.unpunched.runs_from(from).map(|(s, e)| (s.max(from), e));
        let all = behind.chain(self.unpunched.runs_from(0));
        let mut long = all.take(search.runs.max(1)).filter(|(start, end)| end - start >= max);
        long.next().map(|(start, _)| PblkRange::new(start, max))
    }

    fn find(&self, max: u64, search: Search) -> Option<PblkRange> {
        let mut best: Option<PblkRange> = None;
        let behind = self.free.runs_from(self.cursor).map(|(s, e)| (s.max(self.cursor), e));
        let all = behind.chain(self.free.runs_from(0));
        for (start, end) in all.take(search.runs.max(1)) {
            let len = (end - start).min(max);
            if best.is_none_or(|best| best.len < len) {
                best = Some(PblkRange::new(start, len));
            }
            if len == max {
                break;
            }
        }
        best
    }

    /// Gives back what was allocated and never granted. Whether the host has a place for it was not
    /// kept; to be asked to take back what it never gave costs it little.
    pub fn unallocate(&mut self, range: PblkRange) {
        if self.reserved.remove(range) == range.len {
            self.free.insert(range);
            self.unpunched.insert(range);
        }
    }

    /// A reserved run got into the map. Blocks that were mapped before stay as they are (`false`).
    pub fn map_reserved(&mut self, range: PblkRange) -> Result<bool, WrongClass> {
        if self.reserved.contains(range) {
            self.reserved.remove(range);
            self.mapped += range.len;
            return Ok(true);
        }
        match self.reserved.overlaps(range) || self.free.overlaps(range) {
            true => Err(WrongClass("a run became mapped that was not reserved as a whole")),
            false => Ok(false),
        }
    }

    /// Mapped blocks left the map.
    pub fn quarantine_mapped(&mut self, range: PblkRange) -> Result<(), WrongClass> {
        if self.mapped < range.len || self.free.overlaps(range) || self.reserved.overlaps(range) {
            return Err(WrongClass("blocks were freed that were not mapped"));
        }
        if !self.quarantined.insert(range) {
            return Err(WrongClass("blocks were freed twice"));
        }
        self.mapped -= range.len;
        Ok(())
    }

    /// Reserved blocks were given up while something may still be in flight there.
    pub fn quarantine_reserved(&mut self, range: PblkRange) -> Result<(), WrongClass> {
        if !self.reserved.contains(range) || !self.quarantined.insert(range) {
            return Err(WrongClass("blocks were given up that were not reserved"));
        }
        self.reserved.remove(range);
        Ok(())
    }

    /// Nothing is in flight there any more. `punched`: the blocks are holes on the host already.
    pub fn release(&mut self, range: PblkRange, punched: bool) -> Result<(), WrongClass> {
        if !self.quarantined.contains(range) || !self.free.insert(range) {
            return Err(WrongClass("blocks were released that were not quarantined"));
        }
        self.quarantined.remove(range);
        if !punched {
            self.unpunched.insert(range);
        }
        Ok(())
    }

    /// Takes runs of at least `least` free blocks that still take space on the host into
    /// quarantine, to be punched: at most so many, and together at most `blocks`.
    pub fn take_unpunched(&mut self, least: u64, ranges: usize, blocks: u64) -> Vec<PblkRange> {
        let mut left = blocks;
        let mut taken = Vec::new();
        let long = self.unpunched.iter().filter(|run| run.len >= least).take(ranges);
        for run in long.collect::<Vec<_>>() {
            if left == 0 {
                break;
            }
            let run = PblkRange { len: run.len.min(left), ..run };
            self.unpunched.remove(run);
            self.free.remove(run);
            self.quarantined.insert(run);
            left -= run.len;
            taken.push(run);
        }
        taken
    }

    /// Free blocks that still take space on the host.
    pub fn unpunched(&self) -> u64 {
        self.unpunched.total()
    }
}

/// Logical blocks that are wanted, by number of copies: `[0]` is unused.
pub type Demand = [u64; REPLICAS_MAX as usize + 1];

/// Whether stores with so much free space can take all of `demand`, each copy of a block on
/// another store.
///
/// By Gale and Ryser that is so if and only if each set of blocks finds enough room; the sets that
/// matter are those of all blocks with at least so many copies.
pub fn is_feasible(free: impl Iterator<Item = u64> + Clone, demand: &Demand) -> bool {
    let mut blocks = 0u64;
    let mut copies = 0u128;
    for replicas in (1..demand.len()).rev() {
        blocks = blocks.saturating_add(demand[replicas]);
        copies += demand[replicas] as u128 * replicas as u128;
        // A few stores tell, mostly: no need to ask a thousand.
        let mut room = 0u128;
        let is_enough = |free: u64| {
            room += u128::from(free.min(blocks));
            room >= copies
        };
        if copies > 0 && !free.clone().any(is_enough) {
            return false;
        }
    }
    true
}

/// The part of `demand` that `stores` stores must have room for: of blocks with more copies than that, one on
/// each of them. The other copies wait for other stores.
///
/// Where this part has room here, and had all of `demand` room together with stores that are away, it still
/// has when they are back, whatever of the blocks with fewer copies was placed here meanwhile: the others leave
/// one block on each store here, which is the most that one of them can take, so they want no
/// more of the stores that are away than in any other placement.
pub fn share_of(demand: &Demand, stores: usize) -> Demand {
    let mut share = *demand;
    for replicas in stores + 1..share.len() {
        let waits = std::mem::take(&mut share[replicas]);
        share[stores] = share[stores].saturating_add(waits);
    }
    share
}

/// One copy of each of a run of blocks: where each lies.
pub type Copies = Vec<(StoreId, PblkRange)>;

/// What must still find room after an allocation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promised {
    /// Logical blocks promised, by number of copies.
    pub demand: Demand,
    /// Blocks of other stores that count as room.
    pub elsewhere: Vec<u64>,
    /// Whether what is in quarantine counts as room, too.
    pub with_quarantined: bool,
}

impl Promised {
    /// Blocks of a store that count as room.
    pub fn room(&self, space: &StoreSpace) -> u64 {
        let quarantined = if self.with_quarantined { space.quarantined() } else { 0 };
        space.free() + quarantined
    }
}

/// The stores that an allocation may take from.
pub trait Pool {
    /// Those with the most free blocks first; of those with as many the lowest number.
    fn most_free(&self) -> impl Iterator<Item = (StoreId, &StoreSpace)> + Clone;
    /// Changes the space of one of them.
    fn change<R>(&mut self, id: StoreId, with: impl FnOnce(&mut StoreSpace) -> R) -> Option<R>;
}

/// Allocates `blocks` logical blocks with `replicas` copies on distinct stores, none of them in `avoid`, in as
/// few runs as it can. What was promised to others still fits afterwards: without `elsewhere` it can always
/// be done where both fitted together.
///
/// That single blocks on the stores with the most room are safe, is Kleitman's and Wang's theorem: if
/// in some placement of everything the block lies on a store with less room instead, then it can
/// change places with a block that lies there and not here.
///
/// `None`, and nothing is taken: there is not enough.
pub fn allocate(
    pool: &mut impl Pool,
    avoid: &BTreeSet<StoreId>,
    replicas: usize,
    blocks: u64,
    promised: Option<&Promised>,
    search: Search,
) -> Option<Vec<Copies>> {
    let mut runs: Vec<Copies> = Vec::new();
    let mut left = blocks;
    while left > 0 {
        let Some(copies) = allocate_run(pool, avoid, replicas, left, promised, search) else {
            for (id, range) in runs.into_iter().flatten() {
                pool.change(id, |space| space.unallocate(range));
            }
            return None;
        };
        left -= copies[0].1.len;
        runs.push(copies);
    }
    Some(runs)
}

fn allocate_run(
    pool: &mut impl Pool,
    avoid: &BTreeSet<StoreId>,
    replicas: usize,
    left: u64,
    promised: Option<&Promised>,
    search: Search,
) -> Option<Copies> {
    let (chosen, len) = choose(pool, avoid, replicas, left, promised, search)?;
    let mut copies = Vec::with_capacity(replicas);
    for id in chosen {
        copies.push((id, pool.change(id, |space| space.allocate(len, search))??));
    }
    Some(copies)
}

/// Where the next run goes, and its length.
fn choose(
    pool: &impl Pool,
    avoid: &BTreeSet<StoreId>,
    replicas: usize,
    left: u64,
    promised: Option<&Promised>,
    search: Search,
) -> Option<(Vec<StoreId>, u64)> {
    let usable = pool.most_free().filter(|(id, _)| !avoid.contains(id));
    let most_free: Vec<(StoreId, &StoreSpace)> = usable.clone().take(replicas).collect();
    let chosen: Vec<StoreId> = most_free.iter().map(|(id, _)| *id).collect();
    let least = most_free.last()?.1.free();
    if chosen.len() < replicas || least == 0 {
        return None;
    }
    // Single blocks, always from the fullest pool, use the space up to the last block.
    let mut len = if least >= left { left } else { 1 };
    if let Some(promised) = promised {
        let here = usable.map(|(id, space)| (promised.room(space), chosen.contains(&id)));
        len = longest_that_leaves(promised, here, replicas, left, len)?;
    }
    for (_, space) in most_free {
        len = len.min(space.longest(len, search));
    }
    Some((chosen, len))
}

/// How many blocks, at most `max`, the chosen stores can give of the `left` ones, so that the others of
/// them and what was promised still find room. `here`: room of each store, and whether it is chosen. `None`:
/// not one.
fn longest_that_leaves(
    promised: &Promised,
    here: impl Iterator<Item = (u64, bool)> + Clone,
    replicas: usize,
    left: u64,
    max: u64,
) -> Option<u64> {
    let leaves = |len: u64| {
        let mut demand = promised.demand;
        demand[replicas] = demand[replicas].saturating_add(left - len);
        let here = here.clone().map(|(room, chosen)| room - if chosen { len } else { 0 });
        is_feasible(here.chain(promised.elsewhere.iter().copied()), &demand)
    };
    if leaves(max) {
        return Some(max);
    }
    // Where so many can be taken, fewer can: the next ones may lie just there.
    let (mut fits, mut too_many) = (0, max);
    while too_many - fits > 1 {
        let len = fits + (too_many - fits) / 2;
        if leaves(len) { fits = len } else { too_many = len }
    }
    (fits > 0).then_some(fits)
}
