//! The machine's clock: it stands still while the driver hears nobody.
//!
//! Whoever was not heard because conversion was stopped, or waited for a disk, was not silent. A clock that
//! is slow only makes leases longer here than their holders take them to be.

use endio_types::Millis;
use tokio::time::{Duration, Instant};

/// A turn that begins later than it was meant to by more than this part of a lease, or lasts longer, heard
/// nobody meanwhile. What is beyond does not count.
const LATE_OF_LEASE: u32 = 8;

/// The time of the machine, a turn of the driver at a time.
pub(super) struct Clock {
    /// Where it began; moves on while it stands still.
    started: Instant,
    /// The time in this turn. It never goes back.
    now: Millis,
    /// How late a turn may be.
    late_max: Duration,
    /// This turn began late.
    is_late: bool,
}

impl Clock {
    /// A clock at zero, for leases of that length.
    pub(super) fn new(now: Instant, lease_ms: u32) -> Self {
        let late_max = Duration::from_millis(lease_ms.into()) / LATE_OF_LEASE;
        Self { started: now, now: Millis(0), late_max, is_late: false }
    }

    /// The first turn is about to begin: nothing before it counts.
    pub(super) fn begins(&mut self, now: Instant) {
        self.started = now;
    }

    /// The time in this turn.
    pub(super) fn now(&self) -> Millis {
        self.now
    }

    /// When it will show that time, as long as it does not stand still.
    pub(super) fn at(&self, time: Millis) -> Instant {
        self.started + Duration::from_millis(time.0)
    }

    /// Somebody else's work kept the driver for so long.
    pub(super) fn stand_still(&mut self, held_up: Duration) {
        self.started += held_up;
    }

    /// A turn begins that was meant to begin by `wake`.
    pub(super) fn turn_begins(&mut self, began: Instant, wake: Instant) -> Turn {
        let late = began.saturating_duration_since(wake);
        let beyond = late.saturating_sub(self.late_max);
        let was_late = std::mem::replace(&mut self.is_late, !beyond.is_zero());
        self.started += beyond;
        if self.is_late && !was_late {
            // What was sent meanwhile is in the sockets, and is read before anybody counts as silent. Not each
            // time: on a machine that is always late, leases end all the same.
            self.started += 2 * self.late_max;
        }
        let now = began.saturating_duration_since(self.started).as_millis();
        self.now = self.now.max(Millis(u64::try_from(now).unwrap_or(u64::MAX)));
        Turn { began, started: self.started }
    }

    /// It has ended. What it took beyond what a turn may take does not count, where it did not stand still
    /// for that already.
    pub(super) fn turn_ends(&mut self, turn: &Turn, ended: Instant) {
        let counted = self.started.saturating_duration_since(turn.started);
        let took = ended.saturating_duration_since(turn.began).saturating_sub(counted);
        self.started += took.saturating_sub(self.late_max);
    }
}

/// A turn under way.
pub(super) struct Turn {
    began: Instant,
    started: Instant,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE_MS: u32 = 800;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A turn that is meant to begin after `wake_ms`, begins so much later, and takes so long.
    fn turn(
        clock: &mut Clock,
        real: &mut Instant,
        wake_ms: u64,
        late_ms: u64,
        took_ms: u64,
    ) -> u64 {
        let wake = *real + ms(wake_ms);
        *real = wake + ms(late_ms);
        let turn = clock.turn_begins(*real, wake);
        *real += ms(took_ms);
        clock.turn_ends(&turn, *real);
        clock.now().0
    }

    #[test]
    fn it_runs_with_the_time_as_long_as_turns_are_short_and_begin_soon() {
        let mut real = Instant::now();
        let mut clock = Clock::new(real, LEASE_MS);
        let shown: Vec<u64> = (0..4).map(|_| turn(&mut clock, &mut real, 40, 60, 100)).collect();
        assert_eq!(shown, [100, 300, 500, 700]);
        assert_eq!(clock.at(Millis(1_000)), real + ms(200));
    }

    #[test]
    fn a_turn_that_begins_late_finds_the_time_at_which_it_was_meant_to_begin_not_yet_come() {
        let mut real = Instant::now();
        let mut clock = Clock::new(real, LEASE_MS);
        assert_eq!(turn(&mut clock, &mut real, 1_000, 0, 0), 1_000);
        // A lease that ends at 1,500, and a process that is stopped for an hour.
        assert_eq!(turn(&mut clock, &mut real, 500, 3_600_000, 0), 1_400);
        assert_eq!(
            clock.at(Millis(1_500)),
            real + ms(100),
            "what was sent meanwhile is heard first"
        );
        assert_eq!(turn(&mut clock, &mut real, 100, 0, 0), 1_500);
    }

    #[test]
    fn what_a_long_turn_takes_beyond_its_due_does_not_count() {
        let mut real = Instant::now();
        let mut clock = Clock::new(real, LEASE_MS);
        turn(&mut clock, &mut real, 10, 0, 5_000);
        assert_eq!(turn(&mut clock, &mut real, 0, 0, 0), 110);
        // A commit of two seconds in it is counted once.
        let begun = clock.turn_begins(real, real);
        clock.stand_still(ms(2_000));
        real += ms(2_050);
        clock.turn_ends(&begun, real);
        assert_eq!(turn(&mut clock, &mut real, 0, 0, 0), 160);
    }

    #[test]
    fn it_never_goes_back_and_on_a_machine_that_is_always_late_it_goes_on() {
        let mut real = Instant::now();
        let mut clock = Clock::new(real, LEASE_MS);
        assert_eq!(turn(&mut clock, &mut real, 50, 0, 0), 50);
        let mut before = 50;
        for _ in 0..100 {
            let now = turn(&mut clock, &mut real, 10, 1_000, 1_000);
            assert!(now >= before, "{now} after {before}");
            before = now;
        }
        assert!(before > 10 * u64::from(LEASE_MS), "leases never end: {before}");
    }
}
