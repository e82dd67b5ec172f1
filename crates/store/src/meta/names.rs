//! Names of files in a metadata directory; segments and checkpoints have numbers in theirs.

/// Who this database is.
pub(crate) const IDENTITY: &str = "identity";
/// Vouches for the table of chunks after a clean stop.
pub(crate) const CANARY: &str = "canary";
/// Space that is given up when the disk is full.
pub(crate) const BALLAST: &str = "ballast";
/// Hint about the last durable record.
pub(crate) const MARK: &str = "mark";
/// Files that are renamed when they are complete.
pub(crate) const IDENTITY_NEW: &str = "identity.new";
pub(crate) const CANARY_NEW: &str = "canary.new";
pub(crate) const JOURNAL_NEW: &str = "journal.new";
pub(crate) const CHECKPOINT_NEW: &str = "checkpoint.new";
