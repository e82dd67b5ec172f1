//! The named checkers of the promises. Each returns what it found wrong in words; the same names
//! stand in docs/SAFETY.md and docs/TESTING.md.
//!
//! `no_lost_flushed_write`, `no_foreign_or_stale_byte` and `no_torn_write` are judged by the
//! [`Oracle`]: a [`crate::oracle::Violation`] carries the name of its checker.

use std::collections::BTreeMap;

use endio_api::conversion::{self, ListIoEndsResponse, Store};

use crate::oracle::Oracle;

/// A broken promise and the checker that noticed it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{checker}: {finding}")]
pub struct Broken {
    /// Name of the checker.
    pub checker: &'static str,
    /// What was found, in words.
    pub finding: String,
}

fn broken(checker: &'static str, finding: impl Into<String>) -> Broken {
    Broken { checker, finding: finding.into() }
}

/// Reads of cells from `first` on, begun at `began`: nothing flushed is lost, no byte is foreign
/// or stale, and (with no write under way) every write is there whole or not at all.
///
/// # Errors
/// The first broken promise.
pub fn contents_are_possible(
    oracle: &mut Oracle,
    began: crate::oracle::At,
    first: u64,
    bytes: &[u8],
) -> Result<(), Broken> {
    let judge = |oracle: &mut Oracle| {
        let seen = oracle.check_range(began, first, bytes)?;
        if oracle.pending().is_empty() { oracle.check_whole_writes(&seen) } else { Ok(()) }
    };
    judge(oracle).map_err(|violation| {
        let history = oracle.explain(violation.cell());
        broken(violation.checker(), format!("{violation}\n{history}"))
    })
}

/// The same for a read among writes: nothing is said about whole writes.
///
/// # Errors
/// The first broken promise.
pub fn contents_are_possible_now(
    oracle: &mut Oracle,
    began: crate::oracle::At,
    first: u64,
    bytes: &[u8],
) -> Result<(), Broken> {
    oracle.check_range(began, first, bytes).map(drop).map_err(|violation| {
        let history = oracle.explain(violation.cell());
        broken(violation.checker(), format!("{violation}\n{history}"))
    })
}

/// Counts what was asked and what was answered.
#[derive(Debug, Default)]
pub struct Completions {
    answered: BTreeMap<u64, u64>,
}

impl Completions {
    /// A request with this cookie was accepted.
    pub fn asked(&mut self, cookie: u64) {
        self.answered.entry(cookie).or_insert(0);
    }

    /// A completion with this cookie came.
    ///
    /// # Errors
    /// `one_completion_per_write` if nobody asked, or if it was answered before.
    pub fn answered(&mut self, cookie: u64) -> Result<(), Broken> {
        let name = "one_completion_per_write";
        match self.answered.get_mut(&cookie) {
            None => Err(broken(name, format!("completion {cookie} answers no request"))),
            Some(times) => {
                *times += 1;
                let times = *times;
                let finding = format!("request {cookie} has {times} completions");
                if times == 1 { Ok(()) } else { Err(broken(name, finding)) }
            }
        }
    }

    /// At the end: everything that was asked has one answer.
    ///
    /// # Errors
    /// `one_completion_per_write`, naming the requests without an answer.
    pub fn one_completion_per_write(&self) -> Result<(), Broken> {
        let silent = |(_, times): &(&u64, &u64)| **times != 1;
        let open: Vec<u64> =
            self.answered.iter().filter(silent).map(|(cookie, _)| *cookie).collect();
        if open.is_empty() {
            return Ok(());
        }
        let finding = format!("requests {open:?} do not have exactly one completion");
        Err(broken("one_completion_per_write", finding))
    }
}

/// Whether no io_end is in flight. Ask again, bounded, until it is so.
///
/// # Errors
/// `every_io_end_ends`, naming those that live and who holds them.
pub fn every_io_end_ends(listed: &ListIoEndsResponse) -> Result<(), Broken> {
    if listed.total == 0 && listed.io_ends.is_empty() {
        return Ok(());
    }
    let describe = |io_end: &conversion::IoEnd| {
        let held: Vec<&str> = io_end.held.iter().map(|token| token.holder.as_str()).collect();
        let (id, state, age) = (io_end.id, &io_end.state, io_end.age_ms);
        format!("io_end {id} {state} for {age} ms, held by {held:?}")
    };
    let some: Vec<String> = listed.io_ends.iter().take(5).map(describe).collect();
    let finding = format!("{} io_ends live: {}", listed.total, some.join("; "));
    Err(broken("every_io_end_ends", finding))
}

/// Whether each block of each store is in exactly one class, and the metadata is clean.
///
/// # Errors
/// `space_adds_up`, with each finding.
pub fn space_adds_up(check: &conversion::CheckResponse, stores: &[Store]) -> Result<(), Broken> {
    let mut findings = check.findings.clone();
    let mut sum = [0_u64; 4];
    for store in stores {
        let classes = [
            store.free_blocks,
            store.mapped_blocks,
            store.reserved_blocks,
            store.quarantined_blocks,
        ];
        let total: u64 = classes.iter().sum();
        if total != store.capacity_blocks {
            let (id, capacity) = (store.id, store.capacity_blocks);
            findings.push(format!(
                "store {id}: free, mapped, reserved, quarantined are {classes:?}, which is {total} \
                 of {capacity} blocks"
            ));
        }
        for (sum, class) in sum.iter_mut().zip(classes) {
            *sum += class;
        }
    }
    let told =
        [check.free_blocks, check.mapped_blocks, check.reserved_blocks, check.quarantined_blocks];
    if !stores.is_empty() && sum != told {
        findings.push(format!("the stores add up to {sum:?}, the check says {told:?}"));
    }
    if findings.is_empty() {
        return Ok(());
    }
    Err(broken("space_adds_up", findings.join("; ")))
}

/// Who has been told of which failed write-out.
#[derive(Debug, Default)]
pub struct Errors {
    failures: Vec<(u64, String)>,
    told: BTreeMap<(String, u64), u64>,
    observers: BTreeMap<String, u64>,
    clock: u64,
}

impl Errors {
    /// An observer (an fsync cursor) of a volume begins to watch.
    pub fn observe(&mut self, observer: &str) {
        self.clock += 1;
        self.observers.insert(observer.to_owned(), self.clock);
    }

    /// A write-out of the volume failed for good. Returns the number of the failure.
    pub fn failed(&mut self, what: &str) -> u64 {
        self.clock += 1;
        self.failures.push((self.clock, what.to_owned()));
        self.clock
    }

    /// The observer's fsync returned an error that stands for every failure so far.
    pub fn told(&mut self, observer: &str) {
        let numbers: Vec<u64> = self.failures.iter().map(|(number, _)| *number).collect();
        let since = self.observers.get(observer).copied().unwrap_or(0);
        let mut news = 0;
        for number in numbers.iter().copied().filter(|number| *number > since) {
            let times = self.told.entry((observer.to_owned(), number)).or_insert(0);
            if *times == 0 {
                news += 1;
            }
            *times += u64::from(*times == 0);
        }
        if news == 0 {
            // Nothing was new: the same failures were told twice.
            let newest = numbers.last().copied().unwrap_or(0);
            *self.told.entry((observer.to_owned(), newest)).or_insert(0) += 2;
        }
    }

    /// Whether each observer was told of each failure since it began to watch exactly once.
    ///
    /// # Errors
    /// `errors_told_once`, naming observer and failure.
    pub fn errors_told_once(&self) -> Result<(), Broken> {
        for ((observer, number), times) in &self.told {
            if *times > 1 {
                let finding = format!("{observer} was told of failure {number} more than once");
                return Err(broken("errors_told_once", finding));
            }
        }
        for (observer, since) in &self.observers {
            for (number, what) in self.failures.iter().filter(|(number, _)| number > since) {
                if !self.told.contains_key(&(observer.clone(), *number)) {
                    let finding = format!("{observer} was never told of: {what}");
                    return Err(broken("errors_told_once", finding));
                }
            }
        }
        Ok(())
    }
}

/// Whether a log holds no warning, error or panic but those that contain one of `expected`.
///
/// # Errors
/// `no_unexpected_log`, with the lines.
pub fn no_unexpected_log(log: &str, expected: &[&str]) -> Result<(), Broken> {
    let is_bad = |line: &&str| {
        let plain = strip_colours(line);
        let words = [" WARN ", " ERROR ", "\"WARN\"", "\"ERROR\"", "panicked at"];
        let starts = plain.starts_with("WARN ") || plain.starts_with("ERROR ");
        (starts || words.iter().any(|word| plain.contains(word)))
            && !expected.iter().any(|expected| plain.contains(expected))
    };
    let lines: Vec<&str> = log.lines().filter(is_bad).take(10).collect();
    if lines.is_empty() {
        return Ok(());
    }
    Err(broken("no_unexpected_log", lines.join("\n")))
}

/// Whether nothing panicked.
///
/// # Errors
/// `no_unexpected_log`, with the lines.
pub fn no_panic_in_log(log: &str) -> Result<(), Broken> {
    no_unexpected_log(log, &[" WARN ", " ERROR ", "\"WARN\"", "\"ERROR\""])
}

fn strip_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut in_escape = false;
    for character in line.chars() {
        match (in_escape, character) {
            (false, '\u{1b}') => in_escape = true,
            (false, _) => plain.push(character),
            (true, 'm') => in_escape = false,
            (true, _) => {}
        }
    }
    plain
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::oracle::Crash;

    fn store(free: u64, mapped: u64, reserved: u64, quarantined: u64) -> Store {
        Store {
            id: 1,
            capacity_blocks: 100,
            free_blocks: free,
            mapped_blocks: mapped,
            reserved_blocks: reserved,
            quarantined_blocks: quarantined,
            ..Store::default()
        }
    }

    fn check(free: u64, mapped: u64, reserved: u64, quarantined: u64) -> conversion::CheckResponse {
        conversion::CheckResponse {
            free_blocks: free,
            mapped_blocks: mapped,
            reserved_blocks: reserved,
            quarantined_blocks: quarantined,
            ..conversion::CheckResponse::default()
        }
    }

    #[test]
    fn space_that_leaks_or_is_counted_twice_is_found() {
        assert!(space_adds_up(&check(50, 30, 15, 5), &[store(50, 30, 15, 5)]).is_ok());
        let leaked = space_adds_up(&check(49, 30, 15, 5), &[store(49, 30, 15, 5)]).unwrap_err();
        assert!(leaked.finding.contains("99 of 100"), "{leaked}");
        assert!(space_adds_up(&check(51, 30, 15, 5), &[store(51, 30, 15, 5)]).is_err());
        assert!(space_adds_up(&check(50, 29, 15, 5), &[store(50, 30, 15, 5)]).is_err());
        let mut dirty = check(50, 30, 15, 5);
        dirty.findings.push("extents overlap".into());
        assert!(space_adds_up(&dirty, &[store(50, 30, 15, 5)]).is_err());
    }

    #[test]
    fn an_io_end_that_lives_is_named_with_its_holder() {
        assert!(every_io_end_ends(&ListIoEndsResponse::default()).is_ok());
        let holder = "store 3".to_owned();
        let held = vec![conversion::HeldToken { holder, ..Default::default() }];
        let io_ends = vec![conversion::IoEnd { id: 42, held, ..Default::default() }];
        let broken = every_io_end_ends(&ListIoEndsResponse { io_ends, total: 1 }).unwrap_err();
        assert!(broken.finding.contains("io_end 42"), "{broken}");
        assert!(broken.finding.contains("store 3"), "{broken}");
    }

    #[test]
    fn two_completions_none_and_one_that_nobody_asked_for_are_found() {
        let mut completions = Completions::default();
        completions.asked(1);
        assert!(completions.one_completion_per_write().is_err(), "none");
        assert!(completions.answered(1).is_ok());
        assert!(completions.one_completion_per_write().is_ok());
        assert!(completions.answered(1).is_err(), "two");
        assert!(completions.one_completion_per_write().is_err());
        assert!(Completions::default().answered(9).is_err(), "nobody asked");
    }

    #[test]
    fn an_error_that_is_hidden_or_told_twice_is_found() {
        let mut errors = Errors::default();
        errors.observe("a");
        assert!(errors.errors_told_once().is_ok());
        errors.failed("EIO at 0");
        assert!(errors.errors_told_once().is_err(), "hidden");
        errors.told("a");
        assert!(errors.errors_told_once().is_ok());
        errors.observe("late");
        assert!(errors.errors_told_once().is_ok(), "a later observer has missed nothing");
        errors.told("a");
        assert!(errors.errors_told_once().is_err(), "told twice");
    }

    #[test]
    fn an_error_that_never_happened_is_found_when_it_is_told() {
        let mut errors = Errors::default();
        errors.observe("a");
        errors.told("a");
        assert!(errors.errors_told_once().is_err());
    }

    #[test]
    fn warnings_are_found_in_text_colour_and_json_unless_they_are_expected() {
        let text = "2026-01-01T00:00:00Z  WARN endio: store is away store=1\n";
        let colour = "\u{1b}[2m2026\u{1b}[0m \u{1b}[33m WARN\u{1b}[0m endio: away\n";
        let json = "{\"level\":\"ERROR\",\"message\":\"no\"}\n";
        let panic = "thread 'main' panicked at src/x.rs:1:1:\n";
        for log in [text, colour, json, panic] {
            assert!(no_unexpected_log(log, &[]).is_err(), "{log}");
        }
        assert!(no_unexpected_log(text, &["store is away"]).is_ok());
        assert!(no_unexpected_log("2026  INFO endio: WARNING is a word\n", &[]).is_ok());
        assert!(no_panic_in_log(text).is_ok());
        assert!(no_panic_in_log(panic).is_err());
    }

    #[test]
    fn a_lost_flushed_write_is_named_by_its_checker() {
        let mut oracle = Oracle::new(1, 512);
        let (sequence, _) = oracle.invoke_write(0, 1);
        oracle.ack_write(sequence, true);
        oracle.crash(Crash::SinceFlush);
        let began = oracle.invoke_read();
        let broken = contents_are_possible(&mut oracle, began, 0, &[0; 512]).unwrap_err();
        assert_eq!(broken.checker, "no_lost_flushed_write");
    }

    #[test]
    fn a_torn_write_is_named_by_its_checker() {
        let mut oracle = Oracle::new(1, 512);
        let (_, data) = oracle.invoke_write(0, 2);
        oracle.crash(Crash::LosesNothing);
        let mut half = data;
        half[512..].fill(0);
        let began = oracle.invoke_read();
        let broken = contents_are_possible(&mut oracle, began, 0, &half).unwrap_err();
        assert_eq!(broken.checker, "no_torn_write");
    }
}
