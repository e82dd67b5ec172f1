//! All points and all bugs, in one place.

/// Declares an enum whose values have names.
macro_rules! named {
    ($(#[$about:meta])* $kind:ident { $($(#[$doc:meta])* $value:ident = $name:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $kind { $($(#[$doc])* $value,)* }

        impl $kind {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$value,)*];

            /// The name in the environment.
            pub fn name(self) -> &'static str {
                match self { $(Self::$value => $name,)* }
            }

            /// The one of that name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }
        }
    };
}

named! {
    /// A place between two steps. The prefix of the name is the process that passes it.
    Point {
        // --- writeback: a write
        /// A buffered write has its place and its credit; nothing of it is in the log.
        WritebackAccepted = "writeback-accepted",
        /// It is in the log, not in the cache, and not acknowledged.
        WritebackLogged = "writeback-logged",
        /// It is in log and cache, and not acknowledged.
        WritebackCached = "writeback-cached",
        /// What the cache held of a range is forgotten; the direct write over it has not begun.
        WritebackForgot = "writeback-forgot",
        /// A direct write is converted; its retry key is not in the log.
        WritebackDirectDone = "writeback-direct-done",
        // --- writeback: an io_end
        /// A write to the stores is ready; conversion knows nothing of it.
        WritebackBegin = "writeback-begin",
        /// Conversion granted the tokens; no store knows of them.
        WritebackBegun = "writeback-begun",
        /// A bio is on its way, and perhaps not all.
        WritebackBioSent = "writeback-bio-sent",
        /// All bios are on their way and the log is durable; the submitter's token is held.
        WritebackGateOpen = "writeback-gate-open",
        /// The submitter's token is released.
        WritebackReleased = "writeback-released",
        /// The completion has come; nothing has been done about it.
        WritebackCompleted = "writeback-completed",
        /// Blocks are converted; the log does not know. Can fail.
        WritebackNotingClean = "writeback-noting-clean",
        /// What was written out is clean in memory and in the log.
        WritebackClean = "writeback-clean",
        /// The data of a small flush is about to be sent to the data log.
        WritebackFlushGathered = "writeback-flush-gathered",
        /// It is durable in the data log; the flush is not answered.
        WritebackFlushLogged = "writeback-flush-logged",
        /// Everything that an fsync covers is durable; the caller does not know.
        WritebackFsynced = "writeback-fsynced",
        // --- writeback: start
        /// The log is read; no volume is open.
        WritebackReplay = "writeback-replay",
        /// A volume's data is back in the cache; it is not served.
        WritebackReplayed = "writeback-replayed",
        /// A volume is open at conversion; the log does not know. Can fail.
        WritebackNotingOpen = "writeback-noting-open",
        // --- writeback: the cache log
        /// The log is about to be flushed.
        LogFlush = "writeback-log-flush",
        /// It is flushed; nobody knows.
        LogFlushed = "writeback-log-flushed",
        /// A new segment has a name and nothing in it.
        LogSegmentCreated = "writeback-log-segment-created",
        /// A segment is removed; its directory is not flushed.
        LogTrimmed = "writeback-log-trimmed",
        /// The state file is written beside the old one.
        LogStateWritten = "writeback-log-state-written",
        /// The state file is renamed; the directory is not flushed.
        LogStateRenamed = "writeback-log-state-renamed",
        // --- block-store
        /// A bio is admitted; nothing is written.
        StoreAdmitted = "store-admitted",
        /// It is written; nothing is durable.
        StoreWritten = "store-written",
        /// A group of bios is durable; the gate does not know.
        StoreFlushed = "store-flushed",
        /// A segment has ended and its release is queued; its submitter does not know.
        StoreReleaseQueued = "store-release-queued",
        /// Releases and other messages are taken for the session; they are not sent.
        StoreMessagesTaken = "store-messages-taken",
        /// Conversion registered the store; it has not been told that the store is ready.
        StoreRegistered = "store-registered",
        /// A fence counts at the gate; conversion does not know.
        StoreFenced = "store-fenced",
        /// Blocks are given back to the file system; conversion does not know.
        StorePunched = "store-punched",
        /// One of the two copies of the superblock is written.
        StoreSuperblockSlot = "store-superblock-slot",
        // --- conversion: a turn
        /// A message is taken in; what follows is in memory only.
        ConversionTurn = "conversion-turn",
        /// The records of a turn are with the committer.
        ConversionSubmitted = "conversion-submitted",
        /// Effects whose records are durable are about to leave.
        ConversionEffects = "conversion-effects",
        /// They have left.
        ConversionSent = "conversion-sent",
        // --- conversion: the journal
        /// Records are written; they are not durable.
        JournalWritten = "conversion-journal-written",
        /// They are durable; the driver does not know.
        JournalSynced = "conversion-journal-synced",
        /// A new segment has its header; its name is not durable.
        JournalSegmentCreated = "conversion-journal-segment-created",
        // --- conversion: checkpoints
        /// A piece of a checkpoint is about to be written. Can fail, as if the disk were full.
        CheckpointWriting = "conversion-checkpoint-writing",
        /// A checkpoint has its small state; no chunk is copied.
        CheckpointBegun = "conversion-checkpoint-begun",
        /// All chunks are copied and durable; the file has no name that counts.
        CheckpointSynced = "conversion-checkpoint-synced",
        /// It has its name; the directory is not flushed.
        CheckpointRenamed = "conversion-checkpoint-renamed",
        /// An old checkpoint or segment is removed; the directory is not flushed.
        CheckpointDropped = "conversion-checkpoint-dropped",
        // --- conversion: start
        /// The canary is gone; sled has not been opened.
        CanaryTaken = "conversion-canary-taken",
        /// Journal and table are recovered; the new epoch is not durable.
        ConversionRecovered = "conversion-recovered",
        /// The new epoch is durable; nothing is granted.
        ConversionEpoch = "conversion-epoch",
    }
}

impl Point {
    /// The process that passes it: `conversion`, `store` or `writeback`.
    pub fn process(self) -> &'static str {
        self.name().split('-').next().unwrap_or_default()
    }

    /// Whether it is passed once, while the process starts.
    pub fn is_of_start(self) -> bool {
        matches!(
            self,
            Self::WritebackReplay
                | Self::WritebackReplayed
                | Self::WritebackNotingOpen
                | Self::LogStateWritten
                | Self::LogStateRenamed
                | Self::StoreRegistered
                | Self::StoreSuperblockSlot
                | Self::CanaryTaken
                | Self::ConversionRecovered
                | Self::ConversionEpoch
        )
    }
}

named! {
    /// A bug that a test plants to see it found.
    Bug {
        /// A block-store says that a group is durable without flushing.
        StoreSkipsFlush = "store-skips-flush",
        /// A block-store, and the writeback behind it, compare no checksum of what is read.
        ReadSkipsChecksum = "read-skips-checksum",
        /// A commit writes and does not sync.
        JournalSkipsSync = "journal-skips-sync",
        /// A segment of the journal is used before its name is durable.
        JournalSkipsDirectory = "journal-skips-directory",
        /// Effects leave before their records are durable.
        ConversionSendsEarly = "conversion-sends-early",
        /// sled is believed without a canary.
        CanaryIgnored = "canary-ignored",
        /// Every eighth buffered write is acknowledged without a record in the log.
        LogSkipsAppend = "log-skips-append",
        /// The log counts as durable without a flush.
        LogSkipsFlush = "log-skips-flush",
        /// After a power loss the log takes its state for that of a mere kill.
        BootIdIgnored = "boot-id-ignored",
        /// The loss of buffered writes is told to nobody.
        LossUntold = "loss-untold",
        /// A direct write goes around the cache without making it forget the range.
        ForgetSkipped = "forget-skipped",
        /// What lies in many pieces is read and written anew without the lock of its blocks.
        DefragmentUnlocked = "defragment-unlocked",
        /// Who opens a volume does not ask for its data log.
        DataLogUnread = "data-log-unread",
        /// The log drops segments whose data is still dirty.
        TrimTooMuch = "trim-too-much",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_unique_and_belongs_to_a_process() {
        for point in Point::ALL {
            assert_eq!(Point::named(point.name()), Some(*point));
            assert!(["conversion", "store", "writeback"].contains(&point.process()), "{point:?}");
        }
        for bug in Bug::ALL {
            assert_eq!(Bug::named(bug.name()), Some(*bug));
        }
    }
}
