//! Direct writes of one volume that come at the same time share an io_end.
//!
//! ```text
//!   write ──► at once, while fewer than GROUPS_MAX groups of the volume are under way
//!        └──► [waiting] ──► all that wait, in one io_end, as soon as a group has ended
//! ```
//! So a lone writer waits for nobody, and many writers cost a few messages for all of them instead of
//! several for each.

use std::collections::VecDeque;

use endio_types::{IO_END_RANGES_MAX, LblkRange};

/// Groups of one volume under way. One: the stores idle while conversion commits. More than a few:
/// the groups are small, and cost what single writes cost.
const GROUPS_MAX: usize = 2;
/// Longest write that joins a group, in blocks: what is larger is worth its own messages.
const JOIN_BLOCKS_MAX: u64 = 16;
/// Most blocks of a group: 1 MiB.
const GROUP_BLOCKS_MAX: u64 = 256;

/// The direct writes of a volume that wait for a group, and how many groups are under way. `T`: a write,
/// and who waits for it.
#[derive(Debug)]
pub struct Groups<T> {
    waiting: VecDeque<(LblkRange, T)>,
    under_way: usize,
}

impl<T> Default for Groups<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), under_way: 0 }
    }
}

impl<T> Groups<T> {
    /// Queues a write whose blocks are locked. True: the caller has to lead a further group, which is
    /// under way until [`Self::take`] finds nothing or [`Self::left`] is called.
    #[must_use = "the write waits until somebody leads a group"]
    pub fn push(&mut self, range: LblkRange, write: T) -> bool {
        self.waiting.push_back((range, write));
        let leads = self.under_way < GROUPS_MAX;
        self.under_way += usize::from(leads);
        leads
    }

    /// What goes together next, in the order of the blocks: the locks keep the writes apart. Empty: nothing
    /// waits, and the group is over.
    pub fn take(&mut self) -> Vec<(LblkRange, T)> {
        let mut group = Vec::new();
        let mut blocks = 0;
        while let Some((next, _)) = self.waiting.front() {
            blocks += next.len;
            let is_full = group.len() >= IO_END_RANGES_MAX || blocks > GROUP_BLOCKS_MAX;
            if is_full && !group.is_empty() {
                break;
            }
            group.extend(self.waiting.pop_front());
        }
        if group.is_empty() {
            self.left();
        }
        group.sort_by_key(|(range, _)| range.start);
        group
    }

    /// Whoever led a group went away before it was over.
    pub fn left(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }
}

/// Whether a write of so many blocks is worth waiting for others.
pub fn may_join(range: LblkRange) -> bool {
    range.len <= JOIN_BLOCKS_MAX
}

/// Ranges that ascend without overlap, those that touch as one.
pub fn joined(ranges: impl IntoIterator<Item = LblkRange>) -> Vec<LblkRange> {
    let mut all: Vec<LblkRange> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end() == range.start.0 => last.len += range.len,
            _ => all.push(range),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(groups: &mut Groups<()>, lblk: u64, blocks: u64) -> bool {
        groups.push(LblkRange::new(lblk, blocks), ())
    }

    #[test]
    fn writes_wait_only_while_enough_groups_are_under_way_and_leave_together() {
        let mut groups = Groups::default();
        assert!(push(&mut groups, 0, 1));
        assert_eq!(groups.take().len(), 1);
        assert!(push(&mut groups, 1, 1));
        assert_eq!(groups.take().len(), 1);
        for lblk in 2..40 {
            assert!(!push(&mut groups, lblk, 1), "two groups are under way");
        }
        assert_eq!(groups.take().len(), 38);
        assert!(groups.take().is_empty());
        assert!(push(&mut groups, 40, 1), "one of two is over");
        assert_eq!(groups.take().len(), 1);
        assert!(groups.take().is_empty() && groups.take().is_empty());
        assert_eq!(groups.under_way, 0);
    }

    #[test]
    fn a_group_is_no_larger_than_an_io_end_may_be() {
        let mut groups = Groups::default();
        for lblk in 0..300 {
            _ = push(&mut groups, lblk * 2, 1);
        }
        assert_eq!((groups.take().len(), groups.take().len()), (IO_END_RANGES_MAX, 44));
        for lblk in 0..40 {
            _ = push(&mut groups, lblk * 100, 16);
        }
        let blocks = GROUP_BLOCKS_MAX as usize / 16;
        assert_eq!((groups.take().len(), groups.take().len()), (blocks, blocks));
        assert_eq!(groups.take().len(), 40 - 2 * blocks);
    }

    #[test]
    fn a_group_ascends_and_whoever_leaves_makes_room_for_another_leader() {
        let mut groups = Groups::default();
        assert!(push(&mut groups, 9, 1) && push(&mut groups, 4, 2));
        assert!(!push(&mut groups, 6, 3));
        let group = groups.take();
        let ranges = joined(group.iter().map(|(range, ())| *range));
        assert_eq!(ranges, [LblkRange::new(4, 6)]);
        assert_eq!(
            joined([LblkRange::new(1, 1), LblkRange::new(3, 1)]),
            [LblkRange::new(1, 1), LblkRange::new(3, 1)]
        );
        groups.left();
        assert!(push(&mut groups, 20, 1), "its place is free");
    }
}
