//! Parts of a volume that are read in sequence and lie in many pieces: worth writing anew.
//!
//! Redirect-on-write gives each random overwrite a new place, and who reads in sequence afterwards
//! asks for each block apart. What nobody reads so may lie as it likes: it is the readers who say what
//! is worth the work.

use std::collections::BTreeSet;

use endio_types::{Lblk, LblkRange};

use crate::chunk::Place;

/// Blocks that are written anew at once, 1 MiB: as much as one read may ask for. A multiple of them
/// begins each window.
pub const WINDOW_BLOCKS: u64 = 256;
/// Shorter reads say nothing about sequence, in blocks: 64 KiB, the least that usual clients read ahead.
const READ_BLOCKS_MIN: u64 = 16;
/// From so many blocks in a piece on, on average, another piece costs little beside its data.
const PIECE_BLOCKS: u64 = 8;
/// Windows remembered, of some 30 bytes each: 4 GiB of a volume. What finds no room is read again.
const WINDOWS_MAX: usize = 4_096;

/// Windows of one volume that wait for being written anew.
#[derive(Debug, Default)]
pub struct Fragments {
    windows: BTreeSet<u64>,
    /// Where the next one is looked for.
    next: u64,
}

impl Fragments {
    /// A read of these blocks was put together from so many pieces.
    pub fn read(&mut self, range: LblkRange, pieces: u64) {
        if range.len < READ_BLOCKS_MIN || !is_many(pieces, range.len) {
            return;
        }
        for window in range.start.0 / WINDOW_BLOCKS..range.end().div_ceil(WINDOW_BLOCKS) {
            if self.windows.len() < WINDOWS_MAX {
                self.windows.insert(window);
            }
        }
    }

    /// Takes the next window, in order of the blocks and from the beginning again behind the last.
    pub fn take(&mut self) -> Option<LblkRange> {
        let behind = self.windows.range(self.next..).next();
        let window = behind.or_else(|| self.windows.first()).copied()?;
        self.windows.remove(&window);
        self.next = window + 1;
        Some(LblkRange { start: Lblk(window * WINDOW_BLOCKS), len: WINDOW_BLOCKS })
    }

    /// Could not be done now: its turn comes again behind all others.
    pub fn put_back(&mut self, window: LblkRange) {
        self.windows.insert(window.start.0 / WINDOW_BLOCKS);
    }

    /// Nothing waits any more.
    pub fn clear(&mut self) {
        self.windows.clear();
    }

    /// Windows that wait.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }
}

/// How a window lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// Blocks with data.
    pub blocks: u64,
    /// Runs of them that are one behind the other in every copy, wherever they are in the volume: as
    /// an allocation for all of them could be at best one.
    pub pieces: u64,
}

impl Layout {
    /// Of extents in the order of their blocks: how many blocks, and where each copy begins.
    pub fn of<'a>(extents: impl Iterator<Item = (u64, &'a [Place])>) -> Self {
        let mut layout = Self::default();
        let mut before: Option<(u64, &[Place])> = None;
        for (blocks, places) in extents {
            let goes_on = before.is_some_and(|(len, before)| {
                let follows = |(place, before): (&Place, &Place)| {
                    place.store == before.store && place.pblk.0 == before.pblk.0 + len
                };
                before.len() == places.len() && places.iter().zip(before).all(follows)
            });
            layout.blocks += blocks;
            layout.pieces += u64::from(!goes_on);
            before = Some((blocks, places));
        }
        layout
    }

    /// Whether it pays to write the window anew.
    pub fn is_worth_it(self) -> bool {
        self.blocks >= READ_BLOCKS_MIN && is_many(self.pieces, self.blocks)
    }

    /// Whether it paid: that there was room in one piece. Else the next window would find none, either.
    pub fn is_better_than(self, before: Self) -> bool {
        self.pieces * 2 <= before.pieces
    }
}

fn is_many(pieces: u64, blocks: u64) -> bool {
    pieces > 1 && pieces.saturating_mul(PIECE_BLOCKS) > blocks
}

#[cfg(test)]
mod tests {
    use endio_types::{Pblk, StoreId};

    use super::*;

    fn taken(fragments: &mut Fragments) -> Vec<u64> {
        std::iter::from_fn(|| fragments.take()).map(|window| window.start.0).collect()
    }

    #[test]
    fn only_long_reads_in_many_pieces_say_what_is_worth_the_work() {
        let mut fragments = Fragments::default();
        fragments.read(LblkRange::new(0, 15), 15);
        fragments.read(LblkRange::new(0, 256), 32);
        fragments.read(LblkRange::new(0, 16), 1);
        assert!(fragments.is_empty());
        fragments.read(LblkRange::new(256, 16), 3);
        fragments.read(LblkRange::new(1000, 256), 33);
        assert_eq!(taken(&mut fragments), [256, 768, 1024]);
    }

    #[test]
    fn windows_come_in_turn_and_what_is_put_back_comes_last() {
        let mut fragments = Fragments::default();
        for window in [5, 1, 3] {
            fragments.read(LblkRange::new(window * WINDOW_BLOCKS, WINDOW_BLOCKS), 200);
        }
        let first = fragments.take().expect("three wait");
        assert_eq!(first, LblkRange::new(256, 256));
        fragments.put_back(first);
        assert_eq!(taken(&mut fragments), [3 * 256, 5 * 256, 256]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut fragments = Fragments::default();
        let blocks = 2 * WINDOWS_MAX as u64 * WINDOW_BLOCKS;
        fragments.read(LblkRange::new(0, blocks), blocks);
        assert_eq!(fragments.len(), WINDOWS_MAX);
        // The last block that a volume can have.
        let end = endio_types::VOLUME_BYTES_MAX / endio_types::BLOCK_BYTES;
        fragments.clear();
        fragments.read(LblkRange::new(end - 16, 16), 16);
        assert_eq!(fragments.take().map(LblkRange::end), Some(end));
    }

    fn place(store: u32, pblk: u64) -> Place {
        Place { store: StoreId(store), pblk: Pblk(pblk) }
    }

    #[test]
    fn a_piece_goes_on_where_every_copy_goes_on() {
        let extents = [
            (4, vec![place(1, 10), place(2, 50)]),
            (2, vec![place(1, 14), place(2, 54)]),
            // One copy lies elsewhere.
            (2, vec![place(1, 16), place(2, 90)]),
            // On another store at the number that would go on.
            (2, vec![place(3, 18), place(2, 92)]),
            (2, vec![place(3, 20)]),
        ];
        let layout = Layout::of(extents.iter().map(|(blocks, places)| (*blocks, &places[..])));
        assert_eq!(layout, Layout { blocks: 12, pieces: 4 });
    }

    #[test]
    fn it_pays_where_half_of_the_pieces_go() {
        let before = Layout { blocks: 256, pieces: 200 };
        assert!(before.is_worth_it());
        assert!(Layout { blocks: 256, pieces: 100 }.is_better_than(before));
        assert!(!Layout { blocks: 256, pieces: 101 }.is_better_than(before));
        assert!(!Layout { blocks: 256, pieces: 32 }.is_worth_it());
        assert!(!Layout { blocks: 15, pieces: 15 }.is_worth_it());
        assert!(!Layout::default().is_worth_it());
    }
}
