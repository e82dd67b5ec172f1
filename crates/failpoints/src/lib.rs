//! Named points between the steps of a write, and bugs that a test may plant.
//!
//! Without the feature `failpoints`, which only test builds of the binaries set, every function
//! here is empty. With it, variables of the environment decide, read once:
//!
//! ```text
//! ENDIO_FAILPOINTS=store-written=kill@3;conversion-journal-synced=delay(20)%4
//!                  name        = action [@ from which hit on] [% one hit in so many]
//! ENDIO_PLANTED=store-skips-flush,log-skips-flush
//! ENDIO_BOOT_ID=any text         an identity of the boot other than the machine's
//! ```
//!
//! Actions: `kill` (SIGKILL to the process itself: nothing is flushed or unwound), `abort`, `stop`
//! (SIGSTOP: somebody else sends SIGCONT), `delay(ms)` (the thread sleeps), `error` (an I/O error
//! where the point can return one; nothing elsewhere). A name or an action that does not exist ends
//! the process at its first point: a test that misspells must not pass.

mod names;
#[cfg(feature = "failpoints")]
mod registry;

pub use names::{Bug, Point};

/// Passes a point: may not return, or return late.
#[inline(always)]
pub fn reach(point: Point) {
    #[cfg(feature = "failpoints")]
    let _ = registry::hit(point);
    #[cfg(not(feature = "failpoints"))]
    let _ = point;
}

/// Passes a point where an I/O operation can fail.
///
/// # Errors
/// If a test says so.
#[inline(always)]
pub fn reach_io(point: Point) -> std::io::Result<()> {
    #[cfg(feature = "failpoints")]
    return match registry::hit(point) {
        true => Err(std::io::Error::other(format!("failpoint {}", point.name()))),
        false => Ok(()),
    };
    #[cfg(not(feature = "failpoints"))]
    {
        let _ = point;
        Ok(())
    }
}

/// Whether a test planted this bug in the process.
#[inline(always)]
pub fn is_planted(bug: Bug) -> bool {
    #[cfg(feature = "failpoints")]
    return registry::is_planted(bug);
    #[cfg(not(feature = "failpoints"))]
    {
        let _ = bug;
        false
    }
}

/// An identity of the boot that a test gives, so that it can cut the power of a directory without
/// cutting that of the machine.
#[inline(always)]
pub fn boot_id() -> Option<String> {
    #[cfg(feature = "failpoints")]
    return std::env::var("ENDIO_BOOT_ID").ok();
    #[cfg(not(feature = "failpoints"))]
    None
}
