//! Cutting a range of blocks along what covers parts of it.

use endio_types::{BLOCK_BYTES, ByteRange, LblkRange};

use super::map_cache::Part;

/// What of the range nothing covers. `covered` is ascending, without overlap and within the range.
pub fn gaps(covered: impl IntoIterator<Item = LblkRange>, range: LblkRange) -> Vec<LblkRange> {
    let mut gaps = Vec::new();
    let mut at = range.start.0;
    for run in covered {
        if run.start.0 > at {
            gaps.push(LblkRange::new(at, run.start.0 - at));
        }
        at = run.end();
    }
    if at < range.end() {
        gaps.push(LblkRange::new(at, range.end() - at));
    }
    gaps
}

/// Cuts a range along written extents: parts with the extent that holds them, or without one where
/// it reads as zeroes. A reversed or overlapping map leaves out what does not fit.
pub fn parts<E>(
    written: impl IntoIterator<Item = (LblkRange, E)>,
    range: LblkRange,
) -> Vec<Part<E>> {
    let mut parts = Vec::new();
    let mut at = range.start.0;
    for (whole, extent) in written {
        let left = LblkRange::new(at, range.end().saturating_sub(at));
        let Some(part) = whole.intersection(left) else { continue };
        if part.start.0 > at {
            parts.push((LblkRange::new(at, part.start.0 - at), None));
        }
        at = part.end();
        parts.push((part, Some(extent)));
    }
    if at < range.end() {
        parts.push((LblkRange::new(at, range.end() - at), None));
    }
    parts
}

/// The whole blocks of a range of bytes, and what is left of it inside single blocks. A last block
/// that the volume ends in counts as whole when the range reaches that end.
pub fn inner_and_edges(bytes: ByteRange, size_bytes: u64) -> (LblkRange, Vec<ByteRange>) {
    let end = bytes.offset + bytes.len;
    let first = bytes.offset.div_ceil(BLOCK_BYTES);
    let last = if end == size_bytes { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
    if first > last {
        return (LblkRange::new(first, 0), vec![bytes]);
    }
    let mut edges = Vec::new();
    let head = first * BLOCK_BYTES - bytes.offset;
    if head > 0 {
        edges.push(ByteRange { offset: bytes.offset, len: head.min(bytes.len) });
    }
    let tail = end.saturating_sub(last * BLOCK_BYTES);
    if tail > 0 && last * BLOCK_BYTES >= bytes.offset {
        edges.push(ByteRange { offset: last * BLOCK_BYTES, len: tail });
    }
    (LblkRange::new(first, last - first), edges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64, len: u64) -> ByteRange {
        ByteRange { offset, len }
    }

    fn blocks(start: u64, len: u64) -> LblkRange {
        LblkRange::new(start, len)
    }

    #[test]
    fn gaps_are_what_nothing_covers() {
        assert_eq!(gaps([], blocks(3, 2)), [blocks(3, 2)]);
        assert_eq!(gaps([blocks(3, 2)], blocks(3, 2)), []);
        let covered = [blocks(4, 1), blocks(5, 1), blocks(8, 1)];
        assert_eq!(gaps(covered, blocks(3, 7)), [blocks(3, 1), blocks(6, 2), blocks(9, 1)]);
    }

    #[test]
    fn a_range_is_cut_along_the_extents_in_it() {
        let map = [(blocks(0, 4), 'a'), (blocks(6, 10), 'b')];
        let expected = [(blocks(2, 2), Some('a')), (blocks(4, 2), None), (blocks(6, 1), Some('b'))];
        assert_eq!(parts(map, blocks(2, 5)), expected);
    }

    #[test]
    fn what_does_not_fit_into_an_ascending_map_is_left_out() {
        let map = [(blocks(4, 2), 'a'), (blocks(0, 5), 'b'), (blocks(5, 2), 'c')];
        let expected = [(blocks(0, 4), None), (blocks(4, 2), Some('a')), (blocks(6, 1), Some('c'))];
        assert_eq!(parts(map, blocks(0, 7)), expected);
    }

    #[test]
    fn aligned_ranges_have_no_edges() {
        assert_eq!(inner_and_edges(at(4096, 8192), 1 << 20), (LblkRange::new(1, 2), vec![]));
    }

    #[test]
    fn a_range_inside_one_block_is_all_edge() {
        let (inner, edges) = inner_and_edges(at(100, 50), 1 << 20);
        assert!(inner.is_empty());
        assert_eq!(edges, [at(100, 50)]);
    }

    #[test]
    fn both_edges_are_cut_off() {
        let (inner, edges) = inner_and_edges(at(100, 3 * 4096), 1 << 20);
        assert_eq!(inner, LblkRange::new(1, 2));
        assert_eq!(edges, [at(100, 3996), at(3 * 4096, 100)]);
    }

    #[test]
    fn two_halves_of_neighbours_are_two_edges() {
        let (inner, edges) = inner_and_edges(at(4000, 200), 1 << 20);
        assert!(inner.is_empty());
        assert_eq!(edges, [at(4000, 96), at(4096, 104)]);
    }

    #[test]
    fn the_end_of_a_volume_counts_as_whole() {
        let (inner, edges) = inner_and_edges(at(4096, 4196), 8292);
        assert_eq!((inner, edges), (LblkRange::new(1, 2), vec![]));
    }

    #[test]
    fn the_end_of_a_volume_inside_one_block_is_an_edge_at_its_beginning() {
        let (inner, edges) = inner_and_edges(at(100, 50), 150);
        assert!(inner.is_empty());
        assert_eq!(edges, [at(100, 50)]);
    }
}
