//! A log line that others can provoke is written once a second at the most.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest time between two lines.
const PAUSE: Duration = Duration::from_secs(1);

/// Lets one line a second pass, and counts those that it held back.
#[derive(Debug, Default)]
pub struct Quiet {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Quiet {
    /// Whether a line may be written now, and how many were held back since the last one.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        // Two numbers, written at once.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, skipped) = *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            *state = (last, skipped + 1);
            return None;
        }
        *state = (Some(now), 0);
        Some(skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_passes_and_the_others_are_counted() {
        let (quiet, start) = (Quiet::default(), Instant::now());
        assert_eq!(quiet.pass_at(start), Some(0));
        assert_eq!(quiet.pass_at(start), None);
        assert_eq!(quiet.pass_at(start + PAUSE / 2), None);
        assert_eq!(quiet.pass_at(start + PAUSE), Some(2));
        assert_eq!(quiet.pass_at(start + 3 * PAUSE), Some(0));
    }
}
