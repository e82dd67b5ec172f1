//! What a writeback knows of a volume that it has open: how large it is, and which map reads use.
//!
//! The size has two values: what clients see, which acknowledged extensions count in, and what
//! conversion knows. An answer of conversion carries the map version at which its size held, and
//! answers may come in another order than they were given: only a resize makes a volume smaller,
//! so an answer from before the newest resize says nothing of the size.
//!
//! A write that extends the volume may be converted without anybody here hearing of it: from the moment it is
//! asked for, the map may have blocks up to its end.

use std::collections::BTreeMap;

use endio_types::{BLOCK_BYTES, MapVersion};

/// Size of a volume and the versions of its map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeView {
    size_bytes: u64,
    durable_size_bytes: u64,
    /// End of the longest extension that was asked for, bytes, whatever came of it.
    asked_size_bytes: u64,
    /// Map version at which the size was set last; what an older map says of it is of the past.
    sized_at: MapVersion,
    /// Reads under way, by the map version that they may use.
    reads: BTreeMap<MapVersion, usize>,
    /// Newest map version seen.
    map_version: MapVersion,
}

impl VolumeView {
    /// A volume that was opened just now.
    pub fn new(version: MapVersion, size_bytes: u64) -> Self {
        Self {
            size_bytes,
            durable_size_bytes: size_bytes,
            asked_size_bytes: 0,
            sized_at: version,
            reads: BTreeMap::new(),
            map_version: version,
        }
    }

    /// Size as clients of this writeback see it, bytes: acknowledged extensions count.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size that conversion knows, bytes.
    pub fn durable_size_bytes(&self) -> u64 {
        self.durable_size_bytes
    }

    /// First block beyond what conversion may know: what the volume has from here on is dirty or a
    /// hole.
    pub fn mapped_end(&self) -> u64 {
        self.durable_size_bytes.max(self.asked_size_bytes).div_ceil(BLOCK_BYTES)
    }

    /// A write that ends there is acknowledged.
    pub fn wrote_up_to(&mut self, end_bytes: u64) {
        self.size_bytes = self.size_bytes.max(end_bytes);
    }

    /// Size that a write of blocks up to `end_bytes`, which is about to be asked for, makes durable; 0: it
    /// does not extend.
    pub fn size_after(&mut self, end_bytes: u64) -> u64 {
        if end_bytes <= self.durable_size_bytes {
            return 0;
        }
        self.asked_size_bytes = self.asked_size_bytes.max(end_bytes);
        end_bytes
    }

    /// A map of this version, or a newer one, is what conversion has now.
    pub fn saw_map(&mut self, version: MapVersion) {
        self.map_version = self.map_version.max(version);
    }

    /// A map of this version has this size. An answer that was under way while the volume was
    /// resized says nothing of the size now.
    pub fn saw_size(&mut self, version: MapVersion, size_bytes: u64) {
        self.saw_map(version);
        if version > self.sized_at {
            self.durable_size_bytes = self.durable_size_bytes.max(size_bytes);
            self.size_bytes = self.size_bytes.max(size_bytes);
        }
    }

    /// The volume was resized.
    pub fn resized(&mut self, version: MapVersion, size_bytes: u64) {
        self.saw_map(version);
        self.sized_at = self.sized_at.max(version);
        self.size_bytes = size_bytes;
        self.durable_size_bytes = size_bytes;
    }

    /// Registers a read: blocks that it finds in a map stay untouched until
    /// [`read_ends`](Self::read_ends) is told the version that this returns.
    pub fn read_begins(&mut self) -> MapVersion {
        // Whatever version the look-up will have, it is not older than what is known now.
        let version = self.map_version;
        *self.reads.entry(version).or_default() += 1;
        version
    }

    /// A read that was registered at that version has ended.
    pub fn read_ends(&mut self, version: MapVersion) {
        if let Some(count) = self.reads.get_mut(&version) {
            *count -= 1;
            if *count == 0 {
                self.reads.remove(&version);
            }
        }
    }

    /// The oldest map version that a read may still use.
    pub fn oldest_read(&self) -> MapVersion {
        self.reads.first_key_value().map_or(self.map_version, |(version, _)| *version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_from_before_a_resize_says_nothing_of_the_size() {
        let mut view = VolumeView::new(MapVersion(5), 8192);
        view.resized(MapVersion(9), 4096);
        view.saw_size(MapVersion(9), 8192);
        assert_eq!((view.size_bytes(), view.durable_size_bytes()), (4096, 4096));
        view.saw_size(MapVersion(10), 8192);
        assert_eq!((view.size_bytes(), view.durable_size_bytes()), (8192, 8192));
    }

    #[test]
    fn only_what_ends_beyond_the_durable_size_extends_it() {
        let mut view = VolumeView::new(MapVersion(1), 4096);
        view.wrote_up_to(10_000);
        assert_eq!((view.size_bytes(), view.durable_size_bytes()), (10_000, 4096));
        assert_eq!(view.mapped_end(), 1);
        assert_eq!((view.size_after(4096), view.size_after(4097)), (0, 4097));
    }

    #[test]
    fn the_map_may_have_what_a_write_of_which_nobody_heard_has_extended() {
        let mut view = VolumeView::new(MapVersion(1), 4096);
        assert_eq!(view.size_after(10_000), 10_000);
        assert_eq!(
            (view.size_bytes(), view.durable_size_bytes(), view.mapped_end()),
            (4096, 4096, 3)
        );
        assert_eq!(view.size_after(5_000), 5_000, "a shorter one");
        view.resized(MapVersion(2), 0);
        assert_eq!(view.mapped_end(), 3, "it may come behind the resize");
        view.saw_size(MapVersion(3), 20_000);
        assert_eq!(view.mapped_end(), 5);
    }

    #[test]
    fn the_oldest_read_under_way_holds_its_version() {
        let mut view = VolumeView::new(MapVersion(3), 0);
        assert_eq!(view.oldest_read(), MapVersion(3));
        let (one, two) = (view.read_begins(), view.read_begins());
        view.saw_map(MapVersion(7));
        view.read_ends(one);
        assert_eq!(view.oldest_read(), MapVersion(3));
        view.read_ends(two);
        assert_eq!(view.oldest_read(), MapVersion(7));
    }
}
