//! Errors of a volume, told once to each observer.
//!
//! The rules are those of Linux' `errseq_t`: an observer learns of an error that happened after
//! its cursor was taken, once. A cursor taken while an error has been told to *nobody* still
//! reports it, so an error cannot vanish between two opens; an error that somebody was told
//! before the cursor was taken is history. Several errors that nobody asked for meanwhile are
//! told as one, the latest.

use endio_types::planted::{self, Bug};

/// Where an observer stands. Take one with [`ErrSeq::sample`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Cursor(u64);

/// The error sequence of one volume. `E` describes an error.
#[derive(Clone, Debug)]
pub struct ErrSeq<E> {
    seq: u64,
    latest: Option<E>,
    told: bool,
}

impl<E> Default for ErrSeq<E> {
    fn default() -> Self {
        Self { seq: 0, latest: None, told: true }
    }
}

impl<E: Clone> ErrSeq<E> {
    /// No error so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records an error.
    pub fn set(&mut self, error: E) {
        if planted::is(Bug::NeverTold) {
            return;
        }
        // While nobody was told, no cursor can stand at the current number.
        if self.told {
            self.seq += 1;
            self.told = false;
        }
        self.latest = Some(error);
    }

    /// Records an error, unless one that nobody was told yet is graver: that one must not go untold.
    pub fn set_unless(&mut self, error: E, is_graver: impl FnOnce(&E) -> bool) {
        if !self.untold().is_some_and(is_graver) {
            self.set(error);
        }
    }

    /// A cursor for a new observer.
    pub fn sample(&self) -> Cursor {
        if self.told { Cursor(self.seq) } else { Cursor(self.seq.saturating_sub(1)) }
    }

    /// The error that this observer has not been told, if any, without telling it.
    pub fn peek(&self, cursor: Cursor) -> Option<&E> {
        if cursor.0 == self.seq { None } else { self.latest.as_ref() }
    }

    /// Tells the observer what it has not been told yet and moves its cursor.
    pub fn check(&mut self, cursor: &mut Cursor) -> Option<E> {
        if cursor.0 == self.seq {
            return None;
        }
        if !planted::is(Bug::ToldTwice) {
            cursor.0 = self.seq;
        }
        self.told = true;
        self.latest.clone()
    }

    /// The newest error, whoever was told.
    pub fn latest(&self) -> Option<&E> {
        self.latest.as_ref()
    }

    /// Whether an error exists that nobody was told.
    pub fn is_untold(&self) -> bool {
        !self.told
    }

    /// The error that nobody was told, if there is one.
    pub fn untold(&self) -> Option<&E> {
        self.latest.as_ref().filter(|_| !self.told)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Scenario 20, error sequence.
    #[test]
    fn each_observer_is_told_an_error_once() {
        let mut errors = ErrSeq::new();
        let (mut a, mut b) = (errors.sample(), errors.sample());
        errors.set("EIO");
        assert_eq!(errors.check(&mut a), Some("EIO"));
        assert_eq!(errors.check(&mut a), None);
        assert_eq!(errors.check(&mut b), Some("EIO"));
        assert_eq!(errors.check(&mut b), None);
    }

    #[test]
    fn a_lesser_error_does_not_take_the_place_of_one_that_nobody_heard() {
        let mut errors = ErrSeq::new();
        let mut cursor = errors.sample();
        let is_graver = |error: &&str| *error == "LOST";
        errors.set_unless("EIO", is_graver);
        errors.set_unless("LOST", is_graver);
        errors.set_unless("EIO", is_graver);
        assert_eq!(errors.check(&mut cursor), Some("LOST"));
        errors.set_unless("EIO", is_graver);
        assert_eq!(errors.check(&mut cursor), Some("EIO"));
    }

    #[test]
    fn an_observer_that_comes_after_an_error_nobody_heard_is_told() {
        let mut errors = ErrSeq::new();
        errors.set("EIO");
        let mut late = errors.sample();
        assert!(errors.is_untold());
        assert_eq!(errors.peek(late), Some(&"EIO"));
        assert_eq!(errors.check(&mut late), Some("EIO"));
        assert!(!errors.is_untold());
    }

    #[test]
    fn an_observer_that_comes_after_an_error_was_told_is_not() {
        let mut errors = ErrSeq::new();
        let mut first = errors.sample();
        errors.set("EIO");
        assert_eq!(errors.check(&mut first), Some("EIO"));
        let mut late = errors.sample();
        assert_eq!(errors.check(&mut late), None);
        errors.set("ENOSPC");
        assert_eq!(errors.check(&mut late), Some("ENOSPC"));
        assert_eq!(errors.check(&mut first), Some("ENOSPC"));
    }

    #[test]
    fn errors_that_nobody_asked_for_are_told_as_the_latest() {
        let mut errors = ErrSeq::new();
        let mut a = errors.sample();
        errors.set("first");
        errors.set("second");
        assert_eq!(errors.check(&mut a), Some("second"));
        assert_eq!(errors.check(&mut a), None);
    }

    #[test]
    fn an_error_that_one_was_told_still_reaches_the_other_after_a_second_one() {
        let mut errors = ErrSeq::new();
        let (mut a, mut b) = (errors.sample(), errors.sample());
        errors.set(1);
        assert_eq!(errors.check(&mut a), Some(1));
        errors.set(2);
        assert_eq!(errors.check(&mut a), Some(2));
        assert_eq!(errors.check(&mut b), Some(2));
        assert_eq!(errors.check(&mut b), None);
    }
}
