#![allow(clippy::unwrap_used)]
use super::*;

const A: VolumeId = VolumeId(1);
const B: VolumeId = VolumeId(2);

fn throttle() -> Throttle {
    Throttle::new(Limits { soft_bytes: 100, hard_bytes: 200, delay_max_ms: 50 })
}

#[test]
fn below_the_soft_limit_nothing_happens_and_above_it_write_out_runs() {
    let mut throttle = throttle();
    assert_eq!(throttle.decide(A, 100), Verdict::Proceed);
    throttle.add(A, 100);
    assert!(!throttle.wants_write_out());
    assert_eq!(throttle.decide(A, 10), Verdict::WriteOut);
    throttle.add(A, 10);
    assert!(throttle.wants_write_out());
}

#[test]
fn a_writer_is_slowed_down_towards_the_hard_limit_and_stopped_at_it() {
    let mut throttle = throttle();
    throttle.add(A, 150);
    let Verdict::Delay(early) = throttle.decide(A, 10) else { panic!("no delay") };
    throttle.add(A, 40);
    let Verdict::Delay(late) = throttle.decide(A, 10) else { panic!("no delay") };
    assert!(early < late && late <= 50);
    throttle.add(A, 10);
    assert_eq!(throttle.decide(A, 1), Verdict::WaitForRoom);
    throttle.sub(A, 100);
    assert_eq!(throttle.decide(A, 1), Verdict::WriteOut);
}

/// Scenario 67, limits.
#[test]
fn a_volume_beyond_its_share_waits_while_another_one_proceeds() {
    let mut throttle = throttle();
    throttle.add(A, 160);
    throttle.add(B, 1);
    assert_eq!(throttle.decide(A, 10), Verdict::WaitForRoom);
    assert!(matches!(throttle.decide(B, 10), Verdict::Delay(_)));
    assert_eq!(throttle.share(B), 100);
    assert_eq!(throttle.dirtiest(), Some(A));
    throttle.forget(A);
    assert_eq!(throttle.total_bytes(), 1);
}

#[test]
fn a_write_larger_than_the_limit_proceeds_when_nothing_is_dirty() {
    let mut throttle = throttle();
    assert_eq!(throttle.decide(A, 1000), Verdict::WriteOut);
    throttle.add(A, 1000);
    assert_eq!(throttle.decide(B, 1), Verdict::WaitForRoom);
    throttle.sub(A, 5000);
    assert_eq!((throttle.total_bytes(), throttle.dirty_bytes(A)), (0, 0));
    assert_eq!(throttle.decide(B, 1), Verdict::Proceed);
}
