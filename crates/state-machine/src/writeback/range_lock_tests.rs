#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::Mode::{Exclusive, Shared};
use super::*;

fn range(start: u64, len: u64) -> LblkRange {
    LblkRange::new(start, len)
}

/// Scenario 46, range lock.
#[test]
fn a_later_request_does_not_overtake_an_overlapping_waiter() {
    let mut lock = RangeLock::new();
    let a = lock.acquire(range(0, 10), Exclusive);
    let b = lock.acquire(range(5, 10), Exclusive);
    let c = lock.acquire(range(12, 2), Exclusive);
    let d = lock.acquire(range(20, 1), Exclusive);
    assert!(matches!(a, Acquired::Granted(_)));
    assert!(matches!(b, Acquired::Queued(_)));
    assert!(matches!(c, Acquired::Queued(_)), "only the waiter b is in its way");
    assert!(matches!(d, Acquired::Granted(_)));
    assert_eq!(lock.release(a.ticket()), [b.ticket()]);
    assert_eq!(lock.release(b.ticket()), [c.ticket()]);
}

#[test]
fn shared_requests_hold_together_and_wait_behind_an_exclusive_one() {
    let mut lock = RangeLock::new();
    let a = lock.acquire(range(0, 4), Shared);
    let b = lock.acquire(range(0, 4), Shared);
    let writer = lock.acquire(range(0, 4), Exclusive);
    let late = lock.acquire(range(0, 4), Shared);
    assert!(matches!(b, Acquired::Granted(_)));
    assert!(matches!(late, Acquired::Queued(_)), "readers cannot starve a writer");
    assert_eq!(lock.release(a.ticket()), []);
    assert_eq!(lock.release(b.ticket()), [writer.ticket()]);
    assert_eq!(lock.release(writer.ticket()), [late.ticket()]);
}

#[test]
fn a_waiter_that_gives_up_lets_those_behind_it_pass() {
    let mut lock = RangeLock::new();
    let a = lock.acquire(range(0, 4), Shared);
    let dropped = lock.acquire(range(0, 8), Exclusive);
    let b = lock.acquire(range(2, 4), Shared);
    assert_eq!(lock.cancel(dropped.ticket()), [b.ticket()]);
    assert_eq!(lock.cancel(dropped.ticket()), [], "giving up twice changes nothing");
    lock.release(a.ticket());
    lock.release(b.ticket());
    assert!(lock.is_empty());
}

#[test]
fn a_whole_volume_trim_waits_for_all_and_blocks_all() {
    let mut lock = RangeLock::new();
    let held: Vec<_> = (0..10).map(|i| lock.acquire(range(i * 100, 1), Exclusive)).collect();
    let all = lock.acquire(range(0, 1 << 48), Exclusive);
    let late = lock.acquire(range(1 << 40, 1), Exclusive);
    assert!(matches!(late, Acquired::Queued(_)));
    for (n, one) in held.iter().enumerate() {
        let granted = lock.release(one.ticket());
        assert_eq!(granted.len(), usize::from(n == 9));
    }
    assert_eq!(lock.release(all.ticket()), [late.ticket()]);
}

/// Requests in order of arrival. One holds if no earlier live one conflicts: the definition.
#[derive(Default)]
struct Slow(Vec<(Ticket, LblkRange, Mode)>);

impl Slow {
    fn held(&self) -> BTreeSet<Ticket> {
        let conflict = |a: &(Ticket, LblkRange, Mode), b: &(Ticket, LblkRange, Mode)| {
            a.1.overlaps(b.1) && (a.2 == Exclusive || b.2 == Exclusive)
        };
        let holds = |n: usize| !self.0[..n].iter().any(|earlier| conflict(earlier, &self.0[n]));
        (0..self.0.len()).filter(|n| holds(*n)).map(|n| self.0[n].0).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]
    #[test]
    fn grants_are_what_the_definition_says_and_no_wake_up_is_lost(
        ops in prop::collection::vec((any::<bool>(), 0u64..30, 0u64..12, any::<bool>(), 0usize..8), 1..80),
    ) {
        let mut lock = RangeLock::new();
        let mut slow = Slow::default();
        let mut held = BTreeSet::new();
        for (acquire, start, len, shared, which) in ops {
            if acquire || slow.0.is_empty() {
                let mode = if shared { Shared } else { Exclusive };
                let got = lock.acquire(range(start, len), mode);
                slow.0.push((got.ticket(), range(start, len), mode));
                if let Acquired::Granted(ticket) = got {
                    held.insert(ticket);
                }
            } else {
                let (ticket, _, _) = slow.0.remove(which % slow.0.len());
                let was_held = held.remove(&ticket);
                let granted =
                    if was_held { lock.release(ticket) } else { lock.cancel(ticket) };
                for ticket in granted {
                    prop_assert!(held.insert(ticket), "granted twice");
                }
            }
            prop_assert_eq!(&held, &slow.held());
            for (ticket, _, _) in &slow.0 {
                prop_assert_eq!(lock.is_held(*ticket), held.contains(ticket));
            }
        }
    }
}
