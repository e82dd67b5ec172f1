//! Tries of changes of a map, numbered so that conversion tells a late one from a new one.
//!
//! A call that is given up may arrive all the same, after the change was tried again, and after
//! newer data was written where it trims. So each try has a number, and conversion refuses those of
//! which it has heard that nobody waits for them any more.
//!
//! # Invariants
//! * `given-up-is-over`: blocks of a change that was given up belong to nobody else before
//!   conversion has heard so: from then on no try of it is carried out.

use std::collections::BTreeSet;

use crate::machine::Attempt;

/// The tries of one volume under one generation.
#[derive(Clone, Debug, Default)]
pub struct Attempts {
    last: u64,
    under_way: BTreeSet<u64>,
}

impl Attempts {
    /// A try begins. `logged`: newest number that was given to a message for the data log.
    pub fn begin(&mut self, logged: u64) -> Attempt {
        let over = self.over();
        self.last += 1;
        self.under_way.insert(self.last);
        Attempt { number: self.last, over, logged }
    }

    /// A try was answered, or is given up. Idempotent.
    pub fn end(&mut self, number: u64) {
        self.under_way.remove(&number);
    }

    /// Every try up to this number has ended.
    pub fn over(&self) -> u64 {
        self.under_way.first().map_or(self.last, |first| first - 1)
    }
}

/// The tries of one change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tries {
    before: u64,
    last: Attempt,
}

impl Tries {
    /// The next try begins; the one before was not answered, or was refused for now.
    pub fn began(&mut self, attempt: Attempt) {
        (self.before, self.last) = (self.last.number, attempt);
    }

    /// The try of which conversion has to hear that it is over before somebody else may use the
    /// blocks; `None`: all are, or conversion knows. `is_done`: the last one was carried out.
    pub fn left(&self, is_done: bool) -> Option<u64> {
        match is_done {
            // What came with the last one ended those before, unless an older one was under way.
            true => (self.before > self.last.over).then_some(self.before),
            false => (self.last.number > 0).then_some(self.last.number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_over_up_to_the_oldest_that_is_under_way() {
        let mut attempts = Attempts::default();
        assert_eq!(attempts.begin(0), Attempt { number: 1, over: 0, logged: 0 });
        assert_eq!(attempts.begin(0), Attempt { number: 2, over: 0, logged: 0 });
        attempts.end(2);
        assert_eq!(attempts.over(), 0);
        attempts.end(1);
        attempts.end(1);
        assert_eq!(attempts.begin(0), Attempt { number: 3, over: 2, logged: 0 });
    }

    #[test]
    fn a_change_is_over_when_conversion_knows_of_every_try_that_was_not_the_last() {
        let mut tries = Tries::default();
        assert_eq!((tries.left(true), tries.left(false)), (None, None), "nothing was tried");
        tries.began(Attempt { number: 4, over: 2, logged: 0 });
        assert_eq!((tries.left(true), tries.left(false)), (None, Some(4)));
        tries.began(Attempt { number: 5, over: 2, logged: 0 });
        assert_eq!(tries.left(true), Some(4), "the third is under way yet");
        tries.began(Attempt { number: 6, over: 5, logged: 0 });
        assert_eq!((tries.left(true), tries.left(false)), (None, Some(6)));
    }
}
