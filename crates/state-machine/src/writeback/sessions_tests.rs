#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;

const NOW: Millis = Millis(0);

fn key(session: u8, sequence: u64) -> RequestKey {
    RequestKey { session: SessionId([session; 16]), sequence }
}

fn small() -> SessionTable {
    SessionTable::new(SessionLimits {
        sessions_max: 2,
        window: 3,
        results_kept: 2,
        idle_min_ms: 100,
    })
}

/// Scenario 33, session table.
#[test]
fn a_retry_of_an_applied_request_is_a_duplicate_with_its_result() {
    let mut table = small();
    assert_eq!(table.begin(key(1, 1), false, NOW), Decision::New);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::InProgress);
    table.applied(key(1, 1), 4096, NOW);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::Duplicate(Some(4096)));
}

#[test]
fn a_retry_of_a_failed_request_is_new() {
    let mut table = small();
    assert_eq!(table.begin(key(1, 1), false, NOW), Decision::New);
    table.failed(key(1, 1));
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::New);
}

#[test]
fn a_retry_of_a_session_that_is_not_known_is_refused_unless_it_is_the_first_request() {
    let mut table = small();
    assert_eq!(table.begin(key(1, 2), true, NOW), Decision::UnknownSession);
    assert!(table.is_empty(), "a refused retry creates no session");
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::New);
    let mut table = small();
    table.mark_memory_lost();
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::UnknownSession);
    assert_eq!(table.begin(key(1, 1), false, NOW), Decision::New);
}

/// A power loss may have taken what was applied last: nothing that was sent before is applied once more.
#[test]
fn after_a_memory_loss_a_known_session_takes_retries_of_what_came_since_only() {
    let mut table = small();
    (1..=6).for_each(|number| table.applied(key(1, number), number, NOW));
    table.mark_memory_lost();
    assert_eq!(table.begin(key(1, 6), true, NOW), Decision::Duplicate(Some(6)));
    assert_eq!(table.begin(key(1, 7), true, NOW), Decision::TooOld, "perhaps it was applied");
    assert_eq!(table.begin(key(1, 9), false, NOW), Decision::New);
    table.failed(key(1, 9));
    assert_eq!(table.begin(key(1, 9), true, NOW), Decision::New, "it came since");
    assert_eq!(table.begin(key(1, 10), true, NOW), Decision::New, "so did this");
    assert_eq!(table.begin(key(1, 8), true, NOW), Decision::TooOld);
}

/// A session that requests began here, before the log was read, is of the life that the log knows of, unless
/// a first try of a later number began it.
#[test]
fn what_began_before_the_memory_was_restored_does_not_hide_that_some_is_lost() {
    let mut lost = small();
    (1..=6).for_each(|number| lost.applied(key(1, number), number, NOW));
    lost.mark_memory_lost();
    let mut table = small();
    assert!(table.meet(key(1, 1), true, NOW));
    assert!(!table.meet(key(2, 7), false, NOW));
    table.restore(lost.snapshot(), NOW);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::Duplicate(None));
    assert_eq!(table.begin(key(1, 7), true, NOW), Decision::TooOld);
    assert_eq!(table.begin(key(2, 6), true, NOW), Decision::TooOld);
    assert_eq!(table.begin(key(2, 8), true, NOW), Decision::New);
}

#[test]
fn a_retry_from_an_earlier_life_of_a_forgotten_session_is_too_old() {
    let mut table = small();
    table.applied(key(1, 5), 1, NOW);
    table.applied(key(2, 1), 1, Millis(50));
    assert_eq!(table.begin(key(3, 1), false, Millis(99)), Decision::Full, "nobody idle enough");
    assert_eq!(table.begin(key(3, 1), false, Millis(100)), Decision::New, "1 is forgotten");
    assert_eq!(table.begin(key(1, 5), true, Millis(100)), Decision::UnknownSession);
    assert_eq!(table.begin(key(1, 6), false, Millis(200)), Decision::New, "2 is forgotten");
    assert_eq!(table.begin(key(1, 5), true, Millis(200)), Decision::TooOld);
    assert_eq!(table.begin(key(1, 7), true, Millis(200)), Decision::New);
}

#[test]
fn a_request_that_was_overtaken_is_new_when_only_the_later_one_was_applied_before_a_restart() {
    let mut table = small();
    // Number 1 is met and refused, 3 is applied, and the service dies.
    assert!(table.meet(key(1, 1), false, NOW), "a session begins with its first request");
    assert!(!table.meet(key(1, 2), false, NOW), "it has begun");
    assert_eq!(table.begin(key(1, 3), false, NOW), Decision::New);
    let mut replayed = small();
    replayed.began(key(1, 1).session, NOW);
    replayed.applied(key(1, 3), 1, NOW);
    let mut table = small();
    table.restore(replayed.snapshot(), NOW);
    assert_eq!(table.begin(key(1, 2), true, NOW), Decision::New);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::New);
    assert_eq!(table.begin(key(1, 3), true, NOW), Decision::Duplicate(Some(1)));
    // One that came from elsewhere in the middle of its life is not taken for one that begins.
    assert!(!table.meet(key(2, 4), false, NOW));
    assert_eq!(table.begin(key(2, 3), true, NOW), Decision::TooOld);
}

#[test]
fn a_session_with_a_request_in_progress_is_never_forgotten() {
    let mut table = small();
    assert_eq!(table.begin(key(1, 1), false, NOW), Decision::New);
    assert_eq!(table.begin(key(2, 1), false, NOW), Decision::New);
    assert_eq!(table.begin(key(3, 1), false, Millis(1_000_000)), Decision::Full);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::InProgress);
}

#[test]
fn memory_of_a_session_is_bounded_and_what_was_forgotten_is_never_applied() {
    let mut table = small();
    // Number 1 never arrives; 2.. are applied.
    for sequence in 2..=10 {
        assert_eq!(table.begin(key(1, sequence), false, NOW), Decision::New);
        table.applied(key(1, sequence), sequence, NOW);
    }
    assert_eq!(table.begin(key(1, 10), true, NOW), Decision::Duplicate(Some(10)));
    assert_eq!(table.begin(key(1, 8), true, NOW), Decision::Duplicate(Some(8)));
    assert_eq!(table.begin(key(1, 7), true, NOW), Decision::TooOld);
    assert_eq!(table.begin(key(1, 1), true, NOW), Decision::TooOld);
    let mut table = small();
    for sequence in 1..=10 {
        table.applied(key(1, sequence), sequence, NOW);
    }
    assert_eq!(table.begin(key(1, 9), true, NOW), Decision::Duplicate(Some(9)));
    assert_eq!(table.begin(key(1, 3), true, NOW), Decision::Duplicate(None));
    assert_eq!(table.begin(key(1, 0), false, NOW), Decision::Malformed);
}

#[test]
fn a_copy_forgets_the_sessions_used_longest_ago() {
    let mut table = small();
    for n in 1..=5 {
        table.applied(key(n, 1), 1, Millis(u64::from(n)));
    }
    table.forget_idlest(2);
    assert_eq!(table.len(), 2);
    assert_eq!(table.begin(key(5, 1), true, NOW), Decision::Duplicate(Some(1)));
}

/// Of what was sent before the table began, or before it forgot the session, it knows nothing.
#[test]
fn a_session_is_younger_than_what_was_before_its_number_1_was_first_sent_here() {
    let mut table = SessionTable::new(SessionLimits::default());
    table.meet(key(1, 1), false, Millis(100));
    table.meet(key(2, 2), false, Millis(100));
    table.meet(key(3, 1), true, Millis(100));
    let younger = |table: &SessionTable, session, then| {
        table.is_younger(SessionId([session; 16]), Millis(then))
    };
    assert!(younger(&table, 1, 99) && !younger(&table, 1, 100));
    assert!(!younger(&table, 2, 99), "number 1 came elsewhere");
    assert!(!younger(&table, 3, 99), "it was sent before");
    assert!(!younger(&table, 4, 99), "it is not known");
    let mut restarted = SessionTable::new(SessionLimits::default());
    restarted.restore(table.snapshot(), Millis(200));
    assert!(!younger(&restarted, 1, 99));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]
    /// Scenario 62, session table.
    ///
    /// Clients send each number once as first try, overtaking each other only for a while, and any
    /// number of times as retry; requests fail, succeed and get lost, the service restarts from
    /// its snapshot, and sessions are forgotten: nothing is applied twice.
    #[test]
    fn a_request_is_applied_at_most_once(
        ops in prop::collection::vec((0u8..4, 1u64..14, 0u8..10), 1..150),
    ) {
        let mut table = small();
        let mut tried = BTreeMap::<RequestKey, u64>::new();
        let mut applied = BTreeSet::new();
        let mut running = Vec::new();
        let mut now = 0u64;
        for (session, sequence, what) in ops {
            now += 15;
            let key = key(session, sequence);
            match what {
                0..=5 => {
                    let overtaken = |(t, at): (&RequestKey, &u64)| {
                        t.session == key.session && t.sequence > sequence && now - *at >= 100
                    };
                    let is_retry = tried.contains_key(&key);
                    if !is_retry && tried.iter().any(overtaken) {
                        continue;
                    }
                    tried.entry(key).or_insert(now);
                    match table.begin(key, is_retry, Millis(now)) {
                        Decision::New => {
                            prop_assert!(!applied.contains(&key), "{key:?} applied twice");
                            running.push(key);
                        }
                        Decision::Duplicate(_) => prop_assert!(applied.contains(&key)),
                        Decision::InProgress => prop_assert!(running.contains(&key)),
                        _ => {}
                    }
                }
                6..=7 if !running.is_empty() => {
                    let key = running.remove(sequence as usize % running.len());
                    prop_assert!(applied.insert(key));
                    table.applied(key, key.sequence, Millis(now));
                }
                8 if !running.is_empty() => {
                    table.failed(running.remove(0));
                }
                9 => {
                    // A restart: what ran had not been applied and never will be.
                    running.clear();
                    let snapshot = table.snapshot();
                    table = small();
                    table.restore(snapshot, Millis(now));
                }
                _ => {}
            }
        }
    }
}
