//! Bugs that a test may plant into the pure crates, to see that a checker catches them.
//!
//! Without the feature `planted-bugs`, which only tests set, [`is`] is constantly false. With it, a
//! test says for its own thread which bug there is.

/// A bug.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Bug {
    /// A store admits io_ends that it has fenced.
    NoFence,
    /// A store does not compare incarnations.
    IncarnationUnchecked,
    /// A store does not compare generations with its fences.
    GenerationUnchecked,
    /// A store forgets which tokens it has seen.
    SeenForgotten,
    /// An io_end completes with its first release.
    ConvertOnFirstRelease,
    /// An io_end converts although a segment failed.
    ConvertDespiteFailure,
    /// Blocks of an aborted io_end are free at once.
    AbortedIsFree,
    /// Overwritten blocks do not wait for readers.
    ReadersIgnored,
    /// After a restart blocks do not wait for stores to drain.
    EpochIgnored,
    /// Blocks are free before the record that freed them is durable. A fence, which must be acknowledged first,
    /// waits for the newest record, too: it does not here, or nothing would show.
    FreedBeforeDurable,
    /// A range is granted whoever holds it.
    LockGrantsAll,
    /// Blocks of one write are written out one by one.
    WholeRequestsOff,
    /// Data of a failed write-out is dropped.
    FailedIsClean,
    /// An observer is told an error again and again.
    ToldTwice,
    /// Nobody is told of an error.
    NeverTold,
    /// Credit that is not needed is not given back.
    CreditLeaked,
    /// A change of a map is carried out although its caller has given it up.
    LateChangeCounts,
    /// A volume is created although it was deleted since its creation was asked for.
    LateCreationCounts,
    /// What is meant for a deleted volume is done to the one that has its name since.
    NamesakeTaken,
    /// What is known of a map stays known while the map changes.
    ChangeUnnoticed,
    /// A look-up is believed although the map changed while it was under way.
    LateLookUpBelieved,
    /// What is converted stays in the data log.
    LoggedForEver,
    /// A conversion ends what was logged of its blocks after it was picked.
    LoggedForgottenEarly,
    /// What comes for the data log after a change of the map is kept, though it is older.
    LateLogCounts,
    /// What overtook another message to the data log is replaced by what that one brings.
    OvertakenLogCounts,
    /// A store admits bios of a new epoch before what is older has drained.
    DrainUnawaited,
    /// The owner hears of a takeover before that is durable.
    FencedEarly,
    /// What is kept at hand of the stores does not follow their leases.
    LeaseUnindexed,
}

impl Bug {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::NoFence,
        Self::IncarnationUnchecked,
        Self::GenerationUnchecked,
        Self::SeenForgotten,
        Self::ConvertOnFirstRelease,
        Self::ConvertDespiteFailure,
        Self::AbortedIsFree,
        Self::ReadersIgnored,
        Self::EpochIgnored,
        Self::FreedBeforeDurable,
        Self::LockGrantsAll,
        Self::WholeRequestsOff,
        Self::FailedIsClean,
        Self::ToldTwice,
        Self::NeverTold,
        Self::CreditLeaked,
        Self::LateChangeCounts,
        Self::LateCreationCounts,
        Self::NamesakeTaken,
        Self::ChangeUnnoticed,
        Self::LateLookUpBelieved,
        Self::LoggedForEver,
        Self::LoggedForgottenEarly,
        Self::LateLogCounts,
        Self::OvertakenLogCounts,
        Self::DrainUnawaited,
        Self::FencedEarly,
        Self::LeaseUnindexed,
    ];
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    /// A bit for each.
    static PLANTED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Plants bugs in this thread, mostly one, in place of those that were there; `None`: takes them out.
/// Two at once show that each of two rules is enough.
#[cfg(feature = "planted-bugs")]
pub fn plant(bugs: impl IntoIterator<Item = Bug>) {
    let planted = bugs.into_iter().fold(0, |planted, bug| planted | bit(bug));
    PLANTED.with(|bits| bits.set(planted));
}

#[cfg(feature = "planted-bugs")]
fn bit(bug: Bug) -> u64 {
    1 << (bug as u32)
}

/// Whether this bug is planted.
#[inline(always)]
pub fn is(bug: Bug) -> bool {
    #[cfg(feature = "planted-bugs")]
    return PLANTED.with(|planted| planted.get() & bit(bug) != 0);
    #[cfg(not(feature = "planted-bugs"))]
    {
        let _ = bug;
        false
    }
}
