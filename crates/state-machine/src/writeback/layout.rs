//! Where the blocks of one write are: in its data, in the volume, in what was granted for it.
//!
//! A write has ranges of logical blocks, ascending. Its data is those blocks one after the other,
//! and a segment is so many blocks of the data from an offset on, however many ranges they are.

use endio_types::{Lblk, LblkRange};

/// The logical block of a write's `nth` block, counted over its ranges from 0. `None`: it has not
/// so many.
pub fn lblk_at(ranges: &[LblkRange], mut nth: u64) -> Option<Lblk> {
    for range in ranges {
        if nth < range.len {
            return Some(Lblk(range.start.0 + nth));
        }
        nth -= range.len;
    }
    None
}

/// The logical ranges of a segment, each with the number of its first block in the write's data.
/// What lies beyond the write is left out.
pub fn ranges_of(ranges: &[LblkRange], offset: u64, blocks: u64) -> Vec<(LblkRange, u64)> {
    let end = offset.saturating_add(blocks);
    let mut found = Vec::new();
    let mut first = 0;
    for range in ranges {
        let (from, to) = (offset.max(first), end.min(first + range.len));
        if from < to {
            found.push((LblkRange::new(range.start.0 + (from - first), to - from), from));
        }
        first += range.len;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [LblkRange; 3] = [
        LblkRange { start: Lblk(10), len: 2 },
        LblkRange { start: Lblk(20), len: 1 },
        LblkRange { start: Lblk(30), len: 3 },
    ];

    #[test]
    fn every_block_of_a_write_has_its_logical_block() {
        let found: Vec<u64> = (0..7).filter_map(|n| lblk_at(&RANGES, n)).map(|l| l.0).collect();
        assert_eq!(found, [10, 11, 20, 30, 31, 32]);
    }

    #[test]
    fn a_segment_over_several_ranges_is_cut_along_them() {
        let cut = ranges_of(&RANGES, 1, 4);
        let expected =
            [(LblkRange::new(11, 1), 1), (LblkRange::new(20, 1), 2), (LblkRange::new(30, 2), 3)];
        assert_eq!(cut, expected);
    }

    #[test]
    fn segments_that_follow_each_other_cover_the_write_once() {
        for split in 0..=6 {
            let both = [ranges_of(&RANGES, 0, split), ranges_of(&RANGES, split, 6 - split)];
            let blocks = both.iter().flatten().flat_map(|(range, _)| range.start.0..range.end());
            assert_eq!(blocks.collect::<Vec<_>>(), [10, 11, 20, 30, 31, 32], "split at {split}");
        }
    }

    #[test]
    fn what_lies_beyond_the_write_is_left_out() {
        assert_eq!(ranges_of(&RANGES, 5, u64::MAX), [(LblkRange::new(32, 1), 5)]);
        assert_eq!(ranges_of(&RANGES, 6, 1), []);
    }
}
