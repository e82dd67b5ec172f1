#![allow(clippy::unwrap_used)]

use super::*;

const CELL: usize = 512;

fn oracle() -> Oracle {
    Oracle::new(0xA, CELL)
}

fn bytes(cell: u64, sequence: u64) -> Vec<u8> {
    if sequence == NEVER {
        return vec![0; CELL];
    }
    pattern::cells(CELL, 0xA, cell, 1, sequence)
}

fn read(oracle: &mut Oracle, cell: u64, sequence: u64) -> Result<u64, Violation> {
    let began = oracle.invoke_read();
    oracle.check_read(began, cell, &bytes(cell, sequence))
}

fn write(oracle: &mut Oracle, first: u64, cells: u64) -> u64 {
    let (sequence, _) = oracle.invoke_write(first, cells);
    oracle.ack_write(sequence, false);
    sequence
}

#[test]
fn what_was_never_written_reads_as_zeroes_and_as_nothing_else() {
    let mut oracle = oracle();
    assert_eq!(read(&mut oracle, 3, NEVER), Ok(NEVER));
    let violation = read(&mut oracle, 3, 1).unwrap_err();
    assert_eq!(violation.checker(), "no_foreign_or_stale_byte");
}

#[test]
fn an_acknowledged_write_replaces_what_was_there() {
    let mut oracle = oracle();
    let (first, second) = (write(&mut oracle, 3, 1), write(&mut oracle, 3, 1));
    assert!(matches!(read(&mut oracle, 3, first), Err(Violation::Stale { .. })));
    assert_eq!(read(&mut oracle, 3, second), Ok(second));
    assert!(read(&mut oracle, 3, NEVER).is_err());
}

#[test]
fn a_write_under_way_may_be_seen_or_not_until_it_is_acknowledged() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 1);
    let (new, _) = oracle.invoke_write(0, 1);
    let began = oracle.invoke_read();
    assert_eq!(oracle.allowed(0, began), vec![old, new]);
    assert!(read(&mut oracle, 0, old).is_ok());
    assert!(read(&mut oracle, 0, new).is_ok());
    assert!(read(&mut oracle, 0, old).is_err(), "a later read goes back in time");
    assert!(oracle.check_read(began, 0, &bytes(0, old)).is_ok(), "an older read may");
    oracle.ack_write(new, false);
    assert!(read(&mut oracle, 0, old).is_err());
    assert!(read(&mut oracle, 0, new).is_ok());
}

#[test]
fn a_read_that_began_before_the_acknowledgement_may_return_the_old_value() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 1);
    let (new, _) = oracle.invoke_write(0, 1);
    let began = oracle.invoke_read();
    oracle.ack_write(new, false);
    assert!(oracle.check_read(began, 0, &bytes(0, old)).is_ok());
}

#[test]
fn an_unknown_write_is_decided_by_the_first_look_at_it() {
    for outcome in [true, false] {
        let mut oracle = oracle();
        let old = write(&mut oracle, 0, 1);
        let (new, _) = oracle.invoke_write(0, 1);
        oracle.crash(Crash::LosesNothing);
        let (shown, hidden) = if outcome { (new, old) } else { (old, new) };
        assert!(read(&mut oracle, 0, shown).is_ok());
        assert!(read(&mut oracle, 0, hidden).is_err(), "it changed its mind");
    }
}

#[test]
fn a_killed_process_loses_no_acknowledged_write() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 1);
    let new = write(&mut oracle, 0, 1);
    oracle.crash(Crash::LosesNothing);
    assert!(read(&mut oracle, 0, old).is_err());
    assert!(read(&mut oracle, 0, new).is_ok());
}

#[test]
fn a_power_cut_loses_only_what_was_not_flushed() {
    let mut oracle = oracle();
    let gone = write(&mut oracle, 0, 1);
    let kept = write(&mut oracle, 0, 1);
    let flush = oracle.invoke_flush();
    let late = write(&mut oracle, 0, 1);
    oracle.ack_flush(flush);
    oracle.crash(Crash::SinceFlush);
    let violation = read(&mut oracle, 0, gone).unwrap_err();
    assert_eq!(violation.checker(), "no_lost_flushed_write");
    let began = oracle.invoke_read();
    assert_eq!(oracle.allowed(0, began), vec![kept, late]);
    assert!(read(&mut oracle, 0, kept).is_ok());
    assert!(read(&mut oracle, 0, late).is_err());
}

#[test]
fn a_flush_covers_only_what_was_acknowledged_before_it_was_sent() {
    let mut oracle = oracle();
    let (under_way, _) = oracle.invoke_write(0, 1);
    let flush = oracle.invoke_flush();
    oracle.ack_write(under_way, false);
    oracle.ack_flush(flush);
    oracle.crash(Crash::SinceFlush);
    assert!(read(&mut oracle, 0, NEVER).is_ok());
}

#[test]
fn a_durable_write_needs_no_flush() {
    let mut oracle = oracle();
    let (durable, _) = oracle.invoke_write(0, 1);
    oracle.ack_write(durable, true);
    oracle.crash(Crash::SinceFlush);
    let violation = read(&mut oracle, 0, NEVER).unwrap_err();
    assert_eq!(violation.checker(), "no_lost_flushed_write");
    assert!(read(&mut oracle, 0, durable).is_ok());
}

#[test]
fn a_trim_reads_as_zeroes_and_the_data_before_it_is_stale() {
    let mut oracle = oracle();
    let data = write(&mut oracle, 0, 2);
    let trim = oracle.invoke_zeroes(0, 1);
    oracle.ack_write(trim, true);
    assert_eq!(read(&mut oracle, 0, NEVER), Ok(trim));
    assert!(read(&mut oracle, 0, data).is_err());
    assert!(read(&mut oracle, 1, data).is_ok());
}

#[test]
fn bytes_of_another_place_or_volume_are_foreign() {
    let mut oracle = oracle();
    let sequence = write(&mut oracle, 0, 2);
    let began = oracle.invoke_read();
    let misplaced = oracle.check_read(began, 0, &bytes(1, sequence)).unwrap_err();
    assert!(matches!(misplaced, Violation::Foreign { .. }));
    let other = pattern::cells(CELL, 0xB, 0, 1, sequence);
    let foreign = oracle.check_read(began, 0, &other).unwrap_err();
    assert!(matches!(foreign, Violation::Foreign { .. }));
    let garbage = oracle.check_read(began, 0, &[7; CELL]).unwrap_err();
    assert!(matches!(garbage, Violation::Garbage { .. }));
}

#[test]
fn a_write_that_is_visible_in_part_is_torn() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 4);
    let (new, _) = oracle.invoke_write(0, 4);
    oracle.crash(Crash::LosesNothing);
    let whole = BTreeMap::from([(0, new), (1, new), (2, new), (3, new)]);
    assert_eq!(oracle.check_whole_writes(&whole), Ok(()));
    let none = BTreeMap::from([(0, old), (1, old), (2, old), (3, old)]);
    assert_eq!(oracle.check_whole_writes(&none), Ok(()));
    let torn = BTreeMap::from([(0, new), (1, new), (2, old), (3, new)]);
    let violation = oracle.check_whole_writes(&torn).unwrap_err();
    assert_eq!(violation.checker(), "no_torn_write");
    let (sequence, older) = (new, old);
    let expected = Violation::TornWrite { sequence, seen_in: 0, missing_in: 2, older };
    assert_eq!(violation, expected);
}

#[test]
fn a_later_write_over_a_part_does_not_tear_the_earlier_one() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 4);
    let over = write(&mut oracle, 1, 2);
    let seen = BTreeMap::from([(0, old), (1, over), (2, over), (3, old)]);
    assert_eq!(oracle.check_whole_writes(&seen), Ok(()));
    let trim = oracle.invoke_zeroes(3, 1);
    oracle.ack_write(trim, true);
    let began = oracle.invoke_read();
    let mut read = bytes(0, old);
    read.extend(bytes(1, over));
    read.extend(bytes(2, over));
    read.extend(bytes(3, NEVER));
    let seen = oracle.check_range(began, 0, &read).unwrap();
    assert_eq!(oracle.check_whole_writes(&seen), Ok(()));
}

#[test]
fn memory_of_what_a_flush_covered_is_given_back() {
    let mut oracle = oracle();
    for _ in 0..100 {
        write(&mut oracle, 0, 4);
    }
    let flush = oracle.invoke_flush();
    oracle.ack_flush(flush);
    assert!(oracle.writes.len() <= 2, "{} writes kept", oracle.writes.len());
}

#[test]
fn an_old_value_that_a_slow_read_returned_late_decides_nothing() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 1);
    let slow = oracle.invoke_read();
    let new = write(&mut oracle, 0, 1);
    assert!(oracle.check_read(slow, 0, &bytes(0, old)).is_ok());
    assert!(read(&mut oracle, 0, old).is_err());
    assert!(read(&mut oracle, 0, new).is_ok());
}

#[test]
fn a_read_that_was_sent_before_a_flushed_write_may_return_what_was_there_before() {
    let mut oracle = oracle();
    let first = write(&mut oracle, 3, 1);
    let slow = oracle.invoke_read();
    let second = write(&mut oracle, 3, 1);
    let flush = oracle.invoke_flush();
    oracle.ack_flush(flush);
    let stale = read(&mut oracle, 3, first).unwrap_err();
    assert_eq!(stale.checker(), "no_lost_flushed_write", "a read sent now must not");
    assert_eq!(oracle.check_read(slow, 3, &bytes(3, first)), Ok(first));
    oracle.end_read(slow);
    assert_eq!(read(&mut oracle, 3, second), Ok(second));
}

#[test]
fn a_read_under_way_may_return_what_was_ruled_out_meanwhile_and_a_later_one_may_not() {
    let mut oracle = oracle();
    write(&mut oracle, 3, 1);
    let given_up = oracle.invoke_zeroes(3, 1);
    oracle.fail_write(given_up);
    let began = oracle.invoke_read();
    let over = write(&mut oracle, 3, 1);
    oracle.rule_out(given_up, 3, 1);
    let later = oracle.invoke_read();
    assert!(oracle.check_read(later, 3, &bytes(3, NEVER)).is_err());
    assert_eq!(oracle.check_read(began, 3, &bytes(3, NEVER)), Ok(given_up));
    oracle.end_read(began);
    assert_eq!(oracle.check_read(later, 3, &bytes(3, over)), Ok(over));
}

#[test]
fn what_was_shown_of_a_write_under_way_stays_unless_it_may_be_gone() {
    let mut oracle = oracle();
    let old = write(&mut oracle, 0, 1);
    let (new, _) = oracle.invoke_write(0, 1);
    assert_eq!(read(&mut oracle, 0, new), Ok(new));
    assert!(read(&mut oracle, 0, old).is_err());
    oracle.forget_shown();
    assert_eq!(read(&mut oracle, 0, old), Ok(old));
}
