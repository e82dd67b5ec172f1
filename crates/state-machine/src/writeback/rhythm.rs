//! When a flush is likely to come next: clients that make every write durable, or every few, do so
//! in an even rhythm.
//!
//! It only says when to begin early what the flush will ask for; whether that is done, and what
//! becomes durable, does not depend on it.

/// Intervals of equal length after which the next one is taken to be as long.
const STEADY_MIN: u32 = 4;
/// Longest interval that is looked at, in writes. What is won is the time of one message; with more under way
/// the flush comes with other writes behind it, which then want a commit of their own.
const WRITES_MAX: u32 = 8;

/// Counts writes between flushes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rhythm {
    /// Writes since the last flush.
    since: u32,
    /// Writes in the interval before it.
    usual: u32,
    /// How many intervals in a row had as many as the one before.
    steady: u32,
}

impl Rhythm {
    /// A write was acknowledged that is not durable. Returns whether a flush is likely to be next.
    pub fn wrote(&mut self) -> bool {
        self.since = self.since.saturating_add(1);
        self.steady >= STEADY_MIN && self.since == self.usual && self.usual <= WRITES_MAX
    }

    /// A flush came. One that follows another without a write between is part of it.
    pub fn flushed(&mut self) {
        if self.since == 0 {
            return;
        }
        self.steady = if self.since == self.usual { self.steady.saturating_add(1) } else { 0 };
        self.usual = self.since;
        self.since = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of `writes` are expected to be followed by a flush.
    fn interval(rhythm: &mut Rhythm, writes: u32) -> Vec<bool> {
        let expected = (0..writes).map(|_| rhythm.wrote()).collect();
        rhythm.flushed();
        expected
    }

    #[test]
    fn nothing_is_expected_before_a_rhythm_is_steady() {
        let mut rhythm = Rhythm::default();
        for _ in 0..=STEADY_MIN {
            assert_eq!(interval(&mut rhythm, 1), [false]);
        }
        assert_eq!(interval(&mut rhythm, 1), [true]);
    }

    #[test]
    fn a_flush_is_expected_behind_the_last_write_of_an_interval_only() {
        let mut rhythm = Rhythm::default();
        for _ in 0..=STEADY_MIN {
            interval(&mut rhythm, 3);
        }
        assert_eq!(interval(&mut rhythm, 3), [false, false, true]);
        // One that has gone on beyond its usual length is expected to end nowhere.
        assert_eq!(interval(&mut rhythm, 5), [false, false, true, false, false]);
        for _ in 0..STEADY_MIN {
            assert_eq!(interval(&mut rhythm, 3), [false; 3]);
        }
    }

    #[test]
    fn a_repeated_flush_changes_nothing() {
        let mut rhythm = Rhythm::default();
        for _ in 0..=STEADY_MIN {
            interval(&mut rhythm, 2);
            rhythm.flushed();
        }
        assert_eq!(interval(&mut rhythm, 2), [false, true]);
    }

    #[test]
    fn intervals_of_many_writes_are_left_alone() {
        let mut rhythm = Rhythm::default();
        for writes in [WRITES_MAX, WRITES_MAX + 1] {
            for _ in 0..=STEADY_MIN {
                interval(&mut rhythm, writes);
            }
            let expected = interval(&mut rhythm, writes);
            assert_eq!(expected.contains(&true), writes <= WRITES_MAX);
        }
    }
}
