//! Seats: the connections of an export in the order in which they attached, so that a newer one
//! begins behind what the older ones had sent.
//!
//! A client that reconnects sends again what was not answered. What its old connection had sent may
//! still lie in the server's socket, behind requests that are under way. So before the first request
//! of a new connection begins, each older one is settled:
//!
//! * a live one has begun everything that its socket held: those requests have their places in the
//!   order of the export (see [`crate::Export`]);
//! * one whose client has left has ended its last request;
//! * one of an export for a single connection ([`crate::ExportInfo::is_single`]) is cut off first:
//!   it begins nothing more, whatever the network still delivers on it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing_mutex::stdsync::{Mutex, MutexGuard};

/// Number of a seat that is free again.
const OVER: u64 = u64::MAX;

type Rows = BTreeMap<String, BTreeMap<u64, Arc<Seat>>>;

/// All seats of a server.
#[derive(Default)]
pub(crate) struct Seats {
    rows: Mutex<Rows>,
    /// The last number that was given. Never given again: an older seat that is settled up to a
    /// connection which has left is not settled up to the next one.
    last: AtomicU64,
}

/// One connection, as the others see it.
pub(crate) struct Seat {
    number: u64,
    /// The number of the newest connection that waits for this one.
    asked: watch::Sender<u64>,
    /// Up to which newer connection this one is settled.
    settled: watch::Sender<u64>,
    has_left: AtomicBool,
    cut: CancellationToken,
}

/// A seat that is taken. Dropping it says that the connection has ended its last request.
pub(crate) struct Taken {
    seats: Arc<Seats>,
    export: String,
    seat: Arc<Seat>,
    older: Vec<Arc<Seat>>,
}

impl Seats {
    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next seat of an export. `is_single`: the older connections are cut off.
    pub(crate) fn take(self: &Arc<Self>, export: &str, is_single: bool) -> Taken {
        let mut rows = self.rows();
        let row = rows.entry(export.to_owned()).or_default();
        // Under the lock: a newer connection has a larger number.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let seat = Arc::new(Seat {
            number,
            asked: watch::Sender::new(0),
            settled: watch::Sender::new(0),
            has_left: AtomicBool::new(false),
            cut: CancellationToken::new(),
        });
        let older: Vec<_> = row.values().cloned().collect();
        row.insert(number, seat.clone());
        drop(rows);
        for older in older.iter().filter(|_| is_single) {
            older.leave();
            older.cut.cancel();
        }
        Taken { seats: self.clone(), export: export.to_owned(), seat, older }
    }
}

impl Taken {
    /// The seat, for the tasks of the connection.
    pub(crate) fn seat(&self) -> Arc<Seat> {
        self.seat.clone()
    }

    /// Waits until every older connection is settled, once.
    pub(crate) async fn older_are_settled(&mut self) {
        for older in std::mem::take(&mut self.older) {
            let number = self.seat.number;
            older.asked.send_modify(|asked| *asked = number.max(*asked));
            let mut settled = older.settled.subscribe();
            // The sender is in the seat, which is held here.
            let _ = settled.wait_for(|settled| *settled >= number).await;
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.seat.settled.send_replace(OVER);
        let mut rows = self.seats.rows();
        if let Some(row) = rows.get_mut(&self.export) {
            row.remove(&self.seat.number);
            if row.is_empty() {
                rows.remove(&self.export);
            }
        }
    }
}

impl Seat {
    /// From now on no change begins here.
    pub(crate) fn leave(&self) {
        self.has_left.store(true, Ordering::SeqCst);
    }

    /// Whether [`Seat::leave`] was called.
    pub(crate) fn has_left(&self) -> bool {
        self.has_left.load(Ordering::SeqCst)
    }

    /// Waits until a newer connection has cut this one off.
    pub(crate) async fn was_cut(&self) {
        self.cut.cancelled().await;
    }

    /// Newer connections that ask, for [`Seat::settle`].
    pub(crate) fn asked(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    /// Up to which newer connection this one is settled.
    pub(crate) fn settled(&self) -> u64 {
        *self.settled.borrow()
    }

    /// Everything that the socket held has begun: connections up to this number may go on.
    pub(crate) fn settle(&self, asked: u64) {
        self.settled.send_modify(|settled| *settled = asked.max(*settled));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_newer_connection_waits_for_each_older_one_of_its_export_and_for_no_other() {
        let seats = Arc::new(Seats::default());
        let (first, second) = (seats.take("a", false), seats.take("a", false));
        let mut third = seats.take("a", false);
        let mut other = seats.take("b", false);
        assert!(other.older_are_settled().now_or_never().is_some());
        let mut waiting = Box::pin(third.older_are_settled());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(second);
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(*first.seat.asked().borrow(), 3);
        first.seat.settle(3);
        assert!(waiting.as_mut().now_or_never().is_some());
        drop(waiting);
        drop((first, third, other));
        assert!(seats.rows().is_empty());
    }

    #[test]
    fn who_attaches_after_a_newer_one_has_left_waits_for_the_older_ones_as_well() {
        let seats = Arc::new(Seats::default());
        let first = seats.take("a", false);
        let mut second = seats.take("a", false);
        assert!(second.older_are_settled().now_or_never().is_none());
        first.seat.settle(*first.seat.asked().borrow());
        drop(second);
        let mut third = seats.take("a", false);
        let mut waiting = Box::pin(third.older_are_settled());
        assert!(waiting.as_mut().now_or_never().is_none(), "settled for one that has left");
        assert!(*first.seat.asked().borrow() > first.seat.settled(), "the older one is not asked");
        first.seat.settle(*first.seat.asked().borrow());
        assert!(waiting.as_mut().now_or_never().is_some());
    }

    #[test]
    fn a_single_connection_cuts_off_the_older_one_and_waits_for_its_end() {
        let seats = Arc::new(Seats::default());
        let first = seats.take("a", true);
        let mut second = seats.take("a", true);
        assert!(first.seat.has_left() && first.seat.was_cut().now_or_never().is_some());
        assert!(!second.seat.has_left());
        let mut waiting = Box::pin(second.older_are_settled());
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        assert!(waiting.as_mut().now_or_never().is_some());
    }
}
