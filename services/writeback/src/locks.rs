//! The range lock of a volume for tasks: a guard that is released when it is dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use endio_state_machine::writeback::range_lock::{Acquired, Mode, RangeLock, Ticket};
use endio_types::LblkRange;
use tokio::sync::oneshot;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

/// First-in-first-out exclusive locks on ranges of blocks.
#[derive(Default)]
pub struct Locks {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    lock: RangeLock,
    waiting: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl Table {
    fn wake(&mut self, granted: Vec<Ticket>) {
        for ticket in granted {
            if let Some(wake) = self.waiting.remove(&ticket) {
                // A waiter that has gone gives its range back in its own drop.
                let _ = wake.send(());
            }
        }
    }
}

/// A place in the order of a volume, held or waiting. Dropping it releases the range or leaves the
/// queue.
#[must_use = "a range that is dropped at once is not held"]
pub struct Held {
    locks: Arc<Locks>,
    ticket: Ticket,
    granted: Option<oneshot::Receiver<()>>,
}

impl Locks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places that are held or waited for: changes of the volume under way.
    pub fn len(&self) -> usize {
        self.table().lock.len()
    }

    /// Whether no change is under way.
    pub fn is_empty(&self) -> bool {
        self.table().lock.is_empty()
    }

    /// Takes a place in the order now. The range is held once [`Held::held`] has returned.
    pub fn acquire(self: &Arc<Self>, range: LblkRange) -> Held {
        let mut table = self.table();
        let (ticket, granted) = match table.lock.acquire(range, Mode::Exclusive) {
            Acquired::Granted(ticket) => (ticket, None),
            Acquired::Queued(ticket) => {
                let (wake, granted) = oneshot::channel();
                table.waiting.insert(ticket, wake);
                (ticket, Some(granted))
            }
        };
        Held { locks: Arc::clone(self), ticket, granted }
    }
}

impl Held {
    /// Waits until the range is held. Cancel-safe: the place in the order stays.
    pub async fn held(&mut self) {
        if let Some(granted) = &mut self.granted {
            // The sender leaves the table only by sending.
            let _ = granted.await;
            self.granted = None;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut table = self.locks.table();
        table.waiting.remove(&self.ticket);
        let granted = table.lock.release(self.ticket);
        table.wake(granted);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_waiter_that_goes_away_leaves_nothing_locked() {
        let locks = Arc::new(Locks::default());
        let range = LblkRange::new(0, 8);
        let first = locks.acquire(range);
        let second = locks.acquire(range);
        let mut third = locks.acquire(range);
        assert!(third.held().now_or_never().is_none());
        drop(second);
        assert!(third.held().now_or_never().is_none());
        drop(first);
        assert!(third.held().now_or_never().is_some());
        drop(third);
        assert!(locks.table().lock.is_empty());
        assert!(locks.table().waiting.is_empty());
    }
}
