//! Bounded exponential backoff with jitter.

use std::time::Duration;

use rand::{Rng, RngExt as _};

/// How long to wait between attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// First pause.
    pub first: Duration,
    /// Longest pause.
    pub max: Duration,
    /// Number of pauses, that is retries; `None`: without end.
    pub retries_max: Option<u32>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(20), max: Duration::from_secs(2), retries_max: None }
    }
}

impl Backoff {
    /// The pauses, one per retry. Each is drawn from the upper half of a span that doubles up to
    /// `max`: never zero, never more than `max`, and two callers soon drift apart.
    pub fn delays<R: Rng>(self, rng: R) -> Delays<R> {
        Delays { backoff: self, next: self.first, left: self.retries_max, rng }
    }
}

/// Iterator over the pauses; see [`Backoff::delays`].
#[derive(Debug)]
pub struct Delays<R> {
    backoff: Backoff,
    next: Duration,
    left: Option<u32>,
    rng: R,
}

impl<R> Delays<R> {
    /// Starts again at the first pause, after a success.
    pub fn reset(&mut self) {
        self.next = self.backoff.first;
        self.left = self.backoff.retries_max;
    }
}

impl<R: Rng> Iterator for Delays<R> {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1)?;
        }
        let span = self.next.min(self.backoff.max);
        self.next = span.saturating_mul(2);
        Some(span.mul_f64(self.rng.random_range(0.5..=1.0)))
    }
}

#[cfg(test)]
mod tests;
