#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;

fn credit() -> Credit {
    Credit::new(CreditPolicy { low_blocks: 10, high_blocks: 40, step_blocks: 20 })
}

#[test]
fn a_writer_that_is_short_gets_its_credit_from_the_next_answer() {
    let mut credit = credit();
    assert_eq!(credit.take(5), Take::Short);
    let ask = credit.next_ask(false).unwrap();
    assert_eq!((ask.add_blocks, ask.drop_blocks, ask.reset), (25, 0, false));
    assert_eq!(credit.next_ask(false), None, "one request at a time");
    assert!(!credit.granted(ask.request + 1), "an answer to something else changes nothing");
    assert!(credit.granted(ask.request));
    assert_eq!(credit.take(5), Take::Taken);
    assert_eq!((credit.held(), credit.available(), credit.promised()), (5, 20, 25));
    assert_eq!(credit.next_ask(false), None, "above the low water");
}

#[test]
fn what_is_excused_wants_no_promise_and_never_frees_one() {
    let mut credit = credit();
    credit.adopt(5);
    let ask = credit.reset();
    assert_eq!(ask.add_blocks, 5);
    assert!(credit.refused(ask.request));
    credit.excuse(3);
    credit.excuse(3);
    let ask = credit.next_ask(false).unwrap();
    assert_eq!((ask.reset, ask.add_blocks, credit.held()), (true, 2, 2));
    assert!(credit.granted(ask.request));
    // Whichever end first: two were promised, and none of that is free before all have ended.
    credit.put_back(1);
    credit.consumed(3);
    assert_eq!((credit.held(), credit.available(), credit.promised()), (1, 0, 1));
    credit.consumed(1);
    assert_eq!((credit.held(), credit.available(), credit.promised()), (0, 0, 0));
}

#[test]
fn what_a_reset_that_is_not_granted_frees_is_not_taken() {
    let mut credit = credit();
    credit.adopt(6);
    let ask = credit.reset();
    credit.put_back(2);
    assert_eq!(credit.take(1), Take::Short, "the answer may be a refusal");
    assert!(credit.refused(ask.request));
    credit.put_back(4);
    assert_eq!(credit.take(1), Take::Short, "nothing backs it");
    let ask = credit.next_ask(false).unwrap();
    assert_eq!((ask.reset, ask.add_blocks), (true, 0));
    assert!(credit.granted(ask.request));
    assert_eq!(credit.take(1), Take::Short);
    let ask = credit.next_ask(false).unwrap();
    assert_eq!((ask.reset, ask.add_blocks), (false, 21));
    assert!(credit.granted(ask.request));
    assert_eq!(credit.take(1), Take::Taken);
}

#[test]
fn a_refused_step_is_followed_by_a_try_for_just_what_is_short() {
    let mut credit = credit();
    assert_eq!(credit.take(5), Take::Short);
    let large = credit.next_ask(false).unwrap();
    assert!(credit.refused(large.request));
    assert_eq!(credit.take(5), Take::Short, "25 did not fit, 5 may");
    let exact = credit.next_ask(false).unwrap();
    assert_eq!(exact.add_blocks, 5);
    assert!(credit.refused(exact.request));
    assert_eq!(credit.take(5), Take::NoSpace);
    assert_eq!(credit.take(5), Take::Short, "the next writer asks again");
    let again = credit.next_ask(false).unwrap();
    assert!(credit.granted(again.request));
    assert_eq!(credit.take(5), Take::Taken);
}

#[test]
fn what_is_put_off_is_asked_for_again_and_is_not_taken_for_full() {
    let mut credit = credit();
    assert_eq!(credit.take(5), Take::Short);
    for _ in 0..3 {
        let ask = credit.next_ask(false).unwrap();
        assert_eq!(ask.add_blocks, 25);
        assert!(credit.put_off(ask.request));
        assert_eq!(credit.take(5), Take::Short);
    }
    let reset = credit.reset();
    assert!(!credit.put_off(reset.request - 1), "an answer to something else changes nothing");
    assert!(credit.put_off(reset.request));
    assert!(credit.is_reset_pending());
}

#[test]
fn an_aborted_write_out_holds_its_credit_again() {
    let mut credit = credit();
    credit.adopt(8);
    credit.consumed(8);
    assert_eq!((credit.held(), credit.promised()), (0, 0));
    credit.restored(8);
    credit.put_back(3);
    assert_eq!((credit.held(), credit.available()), (5, 3));
}

#[test]
fn a_reconnect_asks_for_what_dirty_data_holds_and_forgets_the_old_request() {
    let mut credit = credit();
    credit.adopt(8);
    assert_eq!(credit.take(1), Take::Short);
    let lost = credit.next_ask(false).unwrap();
    let reset = credit.reset();
    assert_eq!((reset.reset, reset.add_blocks), (true, 8));
    assert!(!credit.granted(lost.request));
    assert!(credit.granted(reset.request));
    assert_eq!((credit.held(), credit.promised()), (8, 8));
}

#[test]
fn an_idle_volume_gives_back_what_is_above_its_high_water() {
    let mut credit = credit();
    credit.adopt(50);
    credit.put_back(50);
    assert_eq!(credit.next_ask(false), None);
    let ask = credit.next_ask(true).unwrap();
    assert_eq!((ask.add_blocks, ask.drop_blocks), (0, 40));
    assert_eq!(credit.available(), 10, "no longer usable while the answer is on its way");
    assert!(credit.refused(ask.request));
    assert_eq!(credit.available(), 50);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]
    /// Conversion's own book, kept beside: writeback never believes in more than was promised.
    #[test]
    fn writeback_never_holds_more_than_conversion_promised(
        ops in prop::collection::vec((0u8..7, 1u64..30), 1..100),
    ) {
        let mut credit = credit();
        let (mut promised, mut flying, mut free) = (0u64, 0u64, 120u64);
        let mut ask: Option<Ask> = None;
        for (what, n) in ops {
            match what {
                0 | 1 => {
                    let before = credit.held();
                    let taken = credit.take(n) == Take::Taken;
                    prop_assert_eq!(credit.held(), before + if taken { n } else { 0 });
                }
                2 => {
                    if let Some(next) = credit.next_ask(n < 4) {
                        prop_assert!(ask.replace(next).is_none());
                    }
                }
                3 => if let Some(ask) = ask.take() {
                    if ask.add_blocks <= free {
                        free = free - ask.add_blocks + ask.drop_blocks;
                        promised = promised + ask.add_blocks - ask.drop_blocks;
                        credit.granted(ask.request);
                    } else {
                        credit.refused(ask.request);
                    }
                },
                4 => {
                    let n = n.min(credit.held());
                    credit.consumed(n);
                    promised -= n;
                    flying += n;
                }
                5 => {
                    let n = n.min(flying);
                    flying -= n;
                    promised += n;
                    credit.restored(n);
                }
                _ => credit.put_back(n),
            }
            prop_assert!(credit.held() <= credit.promised());
            prop_assert!(credit.promised() <= promised, "more than was promised");
        }
    }
}

#[test]
fn a_reset_that_was_refused_is_asked_for_again_with_what_is_held_then() {
    let mut credit = Credit::new(CreditPolicy::default());
    credit.adopt(5);
    let first = credit.reset();
    assert!(credit.is_reset_pending());
    assert!(credit.refused(first.request));
    assert!(credit.is_reset_pending(), "nothing backs what is held");
    credit.put_back(2);
    let again = credit.next_ask(true).expect("asked for again, idle or not");
    assert_eq!((again.reset, again.add_blocks, again.drop_blocks), (true, 3, 0));
    assert_eq!(credit.next_ask(false), None, "one at a time");
    assert!(credit.granted(again.request));
    assert!(!credit.is_reset_pending());
    assert_eq!((credit.held(), credit.available()), (3, 0));
}

#[test]
fn while_a_reset_is_owed_a_write_is_told_whether_the_stores_are_full() {
    let mut credit = Credit::new(CreditPolicy::default());
    credit.adopt(5);
    let first = credit.reset();
    assert_eq!(credit.take(1), Take::Short, "nobody knows yet");
    assert!(credit.refused(first.request));
    assert_eq!(credit.take(1), Take::NoSpace);
    let again = credit.next_ask(false).unwrap();
    assert_eq!(credit.take(1), Take::NoSpace, "it is asked for again, and nothing has changed");
    assert!(credit.put_off(again.request));
    assert_eq!(credit.take(1), Take::Short, "stores are away: it may pass");
    let again = credit.next_ask(false).unwrap();
    assert!(credit.refused(again.request));
    credit.reset();
    assert_eq!(credit.take(1), Take::Short, "another session begins");
    let last = credit.outstanding.unwrap();
    assert!(credit.refused(last.request));
    let again = credit.next_ask(true).unwrap();
    assert!(credit.granted(again.request));
    assert_eq!(credit.take(1), Take::Short);
    assert_eq!((credit.held(), credit.available()), (5, 0));
}
