#![allow(clippy::unwrap_used)]

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;

fn backoff(retries_max: Option<u32>) -> Delays<StdRng> {
    let backoff =
        Backoff { first: Duration::from_millis(10), max: Duration::from_millis(35), retries_max };
    backoff.delays(StdRng::seed_from_u64(1))
}

#[test]
fn pauses_double_up_to_the_bound_and_jitter_in_the_upper_half() {
    let spans_ms = [10, 20, 35, 35, 35];
    for (pause, span_ms) in backoff(None).zip(spans_ms) {
        let span = Duration::from_millis(span_ms);
        assert!(pause >= span / 2 && pause <= span, "{pause:?} of {span:?}");
    }
}

#[test]
fn the_number_of_retries_is_bounded_and_reset_starts_again() {
    let mut delays = backoff(Some(3));
    assert_eq!(delays.by_ref().count(), 3);
    assert_eq!(delays.next(), None);
    delays.reset();
    assert!(delays.next().unwrap() <= Duration::from_millis(10));
    assert_eq!(backoff(Some(0)).count(), 0);
}

#[test]
fn the_same_seed_gives_the_same_pauses() {
    assert!(backoff(Some(9)).eq(backoff(Some(9))));
}
