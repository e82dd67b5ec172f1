//! The numbers of the protocol, each its own type.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$meta:meta])* $name:ident($inner:ty)) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number!(
    /// A volume. Never reused.
    VolumeId(u64)
);
number!(
    /// A block-store, as registered with conversion. Never reused.
    StoreId(u32)
);
number!(
    /// A block number inside a volume.
    Lblk(u64)
);
number!(
    /// A block number inside a block-store.
    Pblk(u64)
);
number!(
    /// An io_end. Never reused: the epoch stands in the upper 24 bits, a counter in the lower 40.
    IoEndId(u64)
);
number!(
    /// Grows when conversion starts; durable before anything is granted under it.
    ClusterEpoch(u64)
);
number!(
    /// Grows when a writeback opens the volume; durable before the open returns.
    Generation(u64)
);
number!(
    /// Grows when a block-store starts; durable in its superblock before it registers.
    Incarnation(u64)
);
number!(
    /// A token of an io_end: 0 is the submitter's, segments count from 1.
    SegmentIndex(u32)
);
number!(
    /// Grows with each change of a volume's map.
    MapVersion(u64)
);
number!(
    /// A point on the caller's monotonic clock, or a length of time, in milliseconds. The pure
    /// core never reads a clock: it is told.
    Millis(u64)
);

impl IoEndId {
    /// Bits of the counter inside an epoch.
    pub const COUNTER_BITS: u32 = 40;

    /// The number of the `counter`-th io_end of an epoch.
    pub fn new(epoch: ClusterEpoch, counter: u64) -> Self {
        debug_assert!(counter < 1 << Self::COUNTER_BITS, "io_end counter of an epoch ran out");
        Self((epoch.0 << Self::COUNTER_BITS) | counter)
    }

    /// The epoch that granted it.
    pub fn epoch(self) -> ClusterEpoch {
        ClusterEpoch(self.0 >> Self::COUNTER_BITS)
    }
}

impl SegmentIndex {
    /// The submitter's token.
    pub const SUBMITTER: Self = Self(0);

    /// Whether this is the submitter's token.
    pub fn is_submitter(self) -> bool {
        self == Self::SUBMITTER
    }
}

impl Millis {
    /// This point moved later by `ms`; stops at the end of time instead of wrapping.
    #[must_use]
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds since `earlier`; 0 if that lies in the future.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
