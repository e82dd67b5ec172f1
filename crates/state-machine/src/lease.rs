//! The lease of a holder: one for all its tokens.

use endio_types::Millis;

/// Until when a holder's tokens live. Only the grantor's clock counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Lease {
    ends: Millis,
}

impl Lease {
    /// A lease that runs `ms` from `now`.
    pub fn grant(now: Millis, ms: u32) -> Self {
        Self { ends: now.plus(u64::from(ms)) }
    }
    /// Whether it has ended. At its very end it has.
    pub fn has_ended(self, now: Millis) -> bool {
        now >= self.ends
    }
    /// Milliseconds left; 0 once it has ended.
    pub fn left(self, now: Millis) -> u64 {
        self.ends.since(now)
    }
    /// The first point at which it has ended.
    pub fn ends(self) -> Millis {
        self.ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario 50.
    #[test]
    fn a_lease_runs_to_the_last_millisecond_and_no_further() {
        let lease = Lease::grant(Millis(100), 50);
        assert!(!lease.has_ended(Millis(149)));
        assert!(lease.has_ended(Millis(150)));
        assert_eq!(lease.left(Millis(149)), 1);
        assert_eq!(lease.left(Millis(151)), 0);
    }
}
