//! Planted bugs are caught, each by the checkers that are there for it.
//!
//! Twenty-four of them run in the short form. All: `ENDIO_PLANTED_ALL=1 cargo test -p endio-sim-tests --features planted-bugs
//! --test planted -- --nocapture`; one: `ENDIO_PLANTED_ONE=NoFence` beside it; more seeds for each:
//! `ENDIO_PLANTED_SEEDS=30000`; from another one on: `ENDIO_SEED=7000000`.
#![cfg(feature = "planted-bugs")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use endio_sim_tests::run_planted;
use endio_sim_tests::world::Planted;
use endio_testkit::seed;
use endio_types::planted::{Bug, plant};

/// Most seeds for one bug, unless `ENDIO_PLANTED_SEEDS` says otherwise.
const SEEDS_MAX: u64 = 3_000;

fn seeds_max() -> u64 {
    seed::number("ENDIO_PLANTED_SEEDS", SEEDS_MAX)
}

#[derive(Clone, Copy, Debug)]
enum Plant {
    /// In the pure crates.
    Pure(Bug),
    /// In what the simulation models of the services.
    Modelled(Planted),
}

impl Plant {
    fn name(self) -> String {
        match self {
            Self::Pure(bug) => format!("{bug:?}"),
            Self::Modelled(bug) => format!("{bug:?}"),
        }
    }

    /// The checkers that caught it before: one of them has to again. `None`: any that has a name,
    /// and not a panic.
    fn checkers(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Pure(Bug::NoFence | Bug::SeenForgotten | Bug::GenerationUnchecked) => {
                Some(&["fenced_is_refused"])
            }
            Self::Pure(Bug::FreedBeforeDurable) => Some(&["reuse-after-safe"]),
            // A reader that is ignored finds other data, and says that its own is damaged.
            Self::Pure(Bug::ReadersIgnored) => Some(&["reuse-after-safe", "no_false_alarm"]),
            Self::Pure(Bug::LateCreationCounts | Bug::NamesakeTaken) => {
                Some(&["deleted_stays_deleted", "given_up_is_over"])
            }
            // What is acknowledged beyond the end is lost, if nobody looks at the size before.
            Self::Modelled(Planted::SizeGuessed) => {
                Some(&["size_is_known", "no_lost_flushed_write", "liveness"])
            }
            // What `check` finds; and what reads may still use stays in quarantine.
            Self::Pure(Bug::LeaseUnindexed) | Self::Modelled(Planted::ConfirmsKept) => {
                Some(&["space_adds_up"])
            }
            Self::Modelled(Planted::LogFirstOff) => Some(&["log_first"]),
            Self::Pure(Bug::FencedEarly) => Some(&["taken-is-durable"]),
            Self::Modelled(Planted::OlderKept) => {
                Some(&["newer-log-wins", "no_lost_flushed_write"])
            }
            Self::Modelled(Planted::StoredThoughLogged) => Some(&["stored-is-clean"]),
            Self::Modelled(Planted::LogGuardOff) => Some(&["liveness"]),
            Self::Pure(Bug::CreditLeaked) => Some(&["space_adds_up"]),
            Self::Pure(Bug::ToldTwice | Bug::NeverTold)
            | Self::Modelled(Planted::LossUntold | Planted::LossReplaced | Planted::LetGoUntold) => {
                Some(&["errors_told_once"])
            }
            Self::Pure(Bug::WholeRequestsOff) | Self::Modelled(Planted::HiddenForgotten) => {
                Some(&["no_torn_write"])
            }
            // Which of the two is broken first is a matter of what is asked first.
            Self::Pure(
                Bug::ConvertOnFirstRelease | Bug::ConvertDespiteFailure | Bug::FailedIsClean,
            ) => Some(&[
                "size_is_known",
                "no_foreign_or_stale_byte",
                "no_lost_flushed_write",
                // What the data log has of a block ended with a conversion that was none.
                "logged-until-converted",
            ]),
            Self::Pure(Bug::LockGrantsAll) => {
                Some(&["no_foreign_or_stale_byte", "no_lost_flushed_write", "liveness"])
            }
            _ => None,
        }
    }

    /// The first seed, unless `ENDIO_SEED` says otherwise: whatever plans have is drawn from here on.
    fn first() -> u64 {
        seed::number("ENDIO_SEED", 8_000_000)
    }

    /// Whether nothing here has caught it yet, or hardly: docs/TESTING.md says why, or who does.
    fn is_uncaught(self) -> bool {
        let pure =
            [Bug::IncarnationUnchecked, Bug::AbortedIsFree, Bug::EpochIgnored, Bug::DrainUnawaited];
        // In some thousand seeds, or not.
        let rare = [Bug::OvertakenLogCounts];
        let rare_modelled = [
            Planted::StoredThoughLogged,
            Planted::SizeGuessed,
            Planted::NamesakeForgotten,
            Planted::StaleReplay,
            Planted::OpenUnconditional,
            Planted::LogLosesAlways,
            Planted::OlderKept,
            Planted::FailedNeverOld,
            Planted::LogOfOlderSession,
            // Over full stores only, and in one seed of a hundred thousand.
            Planted::DoubtIgnored,
            Planted::TrimTooMuch,
            Planted::EndForgotten,
            Planted::TailKept,
            Planted::ConfirmsKept,
            // In some ten thousand seeds, from 29,000,000 on.
            Planted::HiddenForgotten,
        ];
        match self {
            Self::Pure(bug) => pure.contains(&bug) || rare.contains(&bug),
            Self::Modelled(bug) => rare_modelled.contains(&bug),
        }
    }

    /// Whether a seed that breaks this says nothing of the bug: on stores that are as full as this
    /// one's, an fsync may fail for want of space for ever without it, too (docs/TESTING.md).
    fn is_of_others(self, checker: &str) -> bool {
        matches!(self, Self::Modelled(Planted::StoredThoughLogged)) && checker == "liveness"
    }

    /// The checker that the first seed from `from` on breaks, and how many seeds it took.
    fn caught(self, from: u64) -> Option<(u64, String)> {
        (0..seeds_max()).find_map(|count| {
            let modelled = match self {
                Self::Pure(bug) => {
                    plant(Some(bug));
                    None
                }
                Self::Modelled(bug) => Some(bug),
            };
            let run = AssertUnwindSafe(|| run_planted(from + count, false, modelled));
            let report = catch_unwind(run);
            plant(None);
            let checker = match &report {
                Ok(report) => report.checker()?,
                Err(_) => "panic",
            };
            (!self.is_of_others(checker)).then(|| (count + 1, checker.to_owned()))
        })
    }
}

fn bugs() -> Vec<Plant> {
    if seed::number("ENDIO_PLANTED_ALL", 0) > 0 {
        let pure = Bug::ALL.iter().map(|bug| Plant::Pure(*bug));
        return pure.chain(Planted::ALL.iter().map(|bug| Plant::Modelled(*bug))).collect();
    }
    let pure = [
        Bug::NoFence,
        Bug::SeenForgotten,
        Bug::GenerationUnchecked,
        Bug::FreedBeforeDurable,
        Bug::ReadersIgnored,
        Bug::ConvertOnFirstRelease,
        Bug::ConvertDespiteFailure,
        Bug::LockGrantsAll,
        Bug::CreditLeaked,
        Bug::LoggedForEver,
        Bug::FencedEarly,
        Bug::ToldTwice,
        Bug::LeaseUnindexed,
    ];
    let modelled = [
        Planted::LogFirstOff,
        Planted::ForgetSkipped,
        Planted::CleanKept,
        Planted::OldKept,
        Planted::ReadSkipsChecksum,
        Planted::LogUnread,
        Planted::LogGuardOff,
        Planted::CleanGuessed,
        Planted::LossReplaced,
        Planted::LetGoUntold,
        Planted::RewriteUnlocked,
    ];
    pure.map(Plant::Pure).into_iter().chain(modelled.map(Plant::Modelled)).collect()
}

#[test]
fn planted_bugs_are_caught_by_the_checkers_that_are_there_for_them() {
    let all = seed::number("ENDIO_PLANTED_ALL", 0) > 0;
    let mut wrong = Vec::new();
    let one = std::env::var("ENDIO_PLANTED_ONE").ok();
    for bug in bugs().into_iter().filter(|bug| one.as_ref().is_none_or(|one| bug.name() == *one)) {
        for round in 0..if all { 3 } else { 1 } {
            let (name, caught) = (bug.name(), bug.caught(Plant::first() + 100_000 * round));
            match caught {
                Some((seeds, checker)) => {
                    println!("{name}: {seeds} seeds, {checker}");
                    let is_right = match bug.checkers() {
                        Some(checkers) => checkers.contains(&checker.as_str()),
                        None => checker != "panic",
                    };
                    if !is_right {
                        wrong.push(format!("{name} by {checker}"));
                    }
                }
                None => {
                    println!("{name}: not in {} seeds", seeds_max());
                    if !bug.is_uncaught() {
                        wrong.push(format!("{name} by nobody"));
                    }
                    break;
                }
            }
        }
    }
    assert!(wrong.is_empty(), "caught by others: {wrong:?}");
}
