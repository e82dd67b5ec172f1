//! The committer: makes groups of records durable, in a thread of its own while the driver goes on,
//! or at once where the driver has nothing else to do.
//!
//! The driver hands over groups in order and learns the last durable number through a watch, which
//! never blocks, so the two can never wait for each other in a circle.
//!
//! A group that goes to the thread costs two wake-ups, one there and one back. For a lone small write
//! they take as long as half of its flush. So a group that is alone is committed where it was
//! made, as long as commits are short ([`Pace`]); what comes meanwhile waits that long and then goes
//! together. A disk that begins to hang is waited for once, with everything else that this process does; the
//! driver's clock stands still meanwhile, so nobody's lease ends because of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use endio_chassis::metrics::Histogram;
use endio_store::meta::{Journal, JournalHandle, MetaError};
use tokio::sync::{oneshot, watch};

/// Groups that may wait for the disk; the driver waits beyond it.
const GROUPS_MAX: usize = 64;
/// Groups that one `fdatasync` may serve.
const GROUPS_PER_COMMIT_MAX: usize = 256;

/// Bytes of the largest group that the driver commits itself: of a larger one the wake-ups are a small
/// part, and more is under way that the driver can go on with.
const HERE_BYTES_MAX: usize = 16 << 10;

/// An encoded record.
pub(crate) struct Encoded {
    pub(crate) seq: u64,
    pub(crate) epoch: u64,
    pub(crate) payload: Vec<u8>,
}

enum Order {
    Group(Vec<Encoded>),
    /// Commit, begin a new segment, tell the last record before it.
    Rotate(oneshot::Sender<u64>),
}

/// What the committer has done. An error is final: nobody continues on a guessed disk.
pub(crate) type Progress = Result<u64, String>;

/// How long commits take: the slowest of the last ones, the older the less.
#[derive(Default)]
struct Pace(AtomicU64);

impl Pace {
    fn saw(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(took.max(before - before / 16), Ordering::Relaxed);
    }

    fn is_within(&self, most: Duration) -> bool {
        u128::from(self.0.load(Ordering::Relaxed)) <= most.as_nanos()
    }
}

/// What the thread and the driver share.
struct Desk {
    journal: Mutex<Journal>,
    tell: watch::Sender<Progress>,
    time: Histogram,
    pace: Pace,
    /// Segments that were begun because somebody asked.
    rotated: AtomicU64,
}

impl Desk {
    /// Never contended: the driver takes it only while the thread has nothing to do.
    fn journal(&self) -> MutexGuard<'_, Journal> {
        // A journal in which something failed refuses everything by itself.
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committed(&self, last: u64, began: Instant) {
        let took = began.elapsed();
        self.time.record(took);
        self.pace.saw(took);
        drop(self.tell.send_replace(Ok(last)));
    }
}

/// How a group was taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Submitted {
    /// It waits for the thread.
    Queued,
    /// It is durable; the caller was held up for so long.
    Durable(Duration),
    /// Nothing is taken any more, and [`Committer::progress`] says why.
    Ended,
}

/// Takes groups. Dropping it ends the thread after the last group.
pub(crate) struct Committer {
    orders: Option<SyncSender<Order>>,
    desk: Arc<Desk>,
    progress: watch::Receiver<Progress>,
    journal: JournalHandle,
    thread: Option<JoinHandle<()>>,
    /// Last record that was submitted.
    submitted: u64,
    /// Segments that were asked for.
    rotations: AtomicU64,
    /// Longest commit that the driver waits for.
    here_max: Duration,
}

impl Committer {
    /// Starts the thread over a recovered journal whose last record is `durable`. The driver itself
    /// commits what is alone while commits take at most `here_max`; zero: never.
    pub(crate) fn start(
        journal: Journal,
        durable: u64,
        time: Histogram,
        here_max: Duration,
    ) -> std::io::Result<Self> {
        let (orders, queue) = sync_channel(GROUPS_MAX);
        let (tell, progress) = watch::channel(Ok(durable));
        let handle = journal.handle();
        let journal = Mutex::new(journal);
        let desk = Arc::new(Desk {
            journal,
            tell,
            time,
            pace: Pace::default(),
            rotated: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new().name("endio-commit".to_owned()).spawn({
            let desk = Arc::clone(&desk);
            move || run(&desk, &queue)
        })?;
        Ok(Self {
            orders: Some(orders),
            desk,
            progress,
            journal: handle,
            thread: Some(thread),
            submitted: durable,
            rotations: AtomicU64::new(0),
            here_max,
        })
    }

    /// Takes records, of which `group` has at least one. Waits if too many groups wait already; if
    /// nothing else `is_waiting` for the caller, for the commit itself, if that is likely to be short.
    pub(crate) fn submit(&mut self, group: Vec<Encoded>, is_waiting: bool) -> Submitted {
        let is_idle = self.is_idle();
        self.submitted = group.last().map_or(self.submitted, |record| record.seq);
        let is_allowed = !self.here_max.is_zero() && self.desk.pace.is_within(self.here_max);
        let bytes: usize = group.iter().map(|record| record.payload.len()).sum();
        if is_idle && !is_waiting && is_allowed && bytes <= HERE_BYTES_MAX {
            return self.commit_here(group);
        }
        if self.send(Order::Group(group)) { Submitted::Queued } else { Submitted::Ended }
    }

    /// Whether the thread has done everything that was asked of it.
    fn is_idle(&self) -> bool {
        let is_durable = matches!(*self.progress.borrow(), Ok(last) if last == self.submitted);
        let asked = self.rotations.load(Ordering::Relaxed);
        is_durable && self.desk.rotated.load(Ordering::Acquire) == asked
    }

    fn commit_here(&self, group: Vec<Encoded>) -> Submitted {
        let began = Instant::now();
        let mut journal = self.desk.journal();
        match append(&mut journal, group).and_then(|()| journal.commit()) {
            Ok(last) => {
                self.desk.committed(last, began);
                Submitted::Durable(began.elapsed())
            }
            Err(error) => {
                drop(self.desk.tell.send_replace(Err(describe(&error))));
                Submitted::Ended
            }
        }
    }

    /// Begins a new segment after everything submitted so far.
    pub(crate) fn rotate(&self) -> oneshot::Receiver<u64> {
        let (tell, rotated) = oneshot::channel();
        self.rotations.fetch_add(1, Ordering::Relaxed);
        self.send(Order::Rotate(tell));
        rotated
    }

    /// The last durable record, as it changes.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Numbers of the journal.
    pub(crate) fn journal(&self) -> &JournalHandle {
        &self.journal
    }

    /// Waits until everything submitted is durable (or failed) and ends the thread.
    pub(crate) fn finish(mut self) -> Progress {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            return Err("the commit thread panicked".to_owned());
        }
        self.progress.borrow().clone()
    }

    fn send(&self, order: Order) -> bool {
        self.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok())
    }
}

fn run(desk: &Desk, queue: &Receiver<Order>) {
    while let Ok(first) = queue.recv() {
        if let Err(error) = serve(desk, first, queue) {
            drop(desk.tell.send_replace(Err(describe(&error))));
            return;
        }
    }
}

/// Serves an order, and those that wait behind it.
fn serve(desk: &Desk, first: Order, queue: &Receiver<Order>) -> Result<(), MetaError> {
    let mut journal = desk.journal();
    let mut next = Some(first);
    while next.is_some() {
        let began = Instant::now();
        for _ in 0..GROUPS_PER_COMMIT_MAX {
            match next.take() {
                Some(Order::Group(group)) => append(&mut journal, group)?,
                Some(Order::Rotate(rotated)) => {
                    let last = journal.rotate()?;
                    drop(desk.tell.send_replace(Ok(last)));
                    desk.rotated.fetch_add(1, Ordering::Release);
                    // Nobody waits any more only if the driver has stopped.
                    let _ = rotated.send(last);
                    return Ok(());
                }
                None => break,
            }
            next = queue.try_recv().ok();
        }
        let last = journal.commit()?;
        desk.committed(last, began);
    }
    Ok(())
}

fn append(journal: &mut Journal, group: Vec<Encoded>) -> Result<(), MetaError> {
    for record in group {
        journal.append(record.seq, record.epoch, &record.payload)?;
    }
    Ok(())
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use endio_chassis::metrics::Registry;
    use endio_store::meta::{MemoryMeta, MetaStore as _};

    use super::*;

    const LONG: Duration = Duration::from_secs(3_600);

    fn committer(meta: &MemoryMeta, here_max: Duration) -> Committer {
        let recovered = meta.open().expect("a disk in memory");
        let time = Registry::default().histogram("commit", "", &[]);
        let durable = recovered.next_seq - 1;
        Committer::start(recovered.journal, durable, time, here_max).expect("a thread")
    }

    fn record(seq: u64) -> Vec<Encoded> {
        vec![Encoded { seq, epoch: 1, payload: vec![7; 100] }]
    }

    fn durable(committer: &Committer) -> u64 {
        committer.progress().borrow().clone().expect("no commit failed")
    }

    #[test]
    fn a_record_that_is_alone_is_durable_at_once() {
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, LONG);
        assert!(matches!(committer.submit(record(1), false), Submitted::Durable(_)));
        assert_eq!(durable(&committer), 1);
        meta.disk().kill();
        let found = meta.copy().open().expect("recovered");
        assert_eq!(found.next_seq, 2);
    }

    #[test]
    fn what_is_not_alone_goes_to_the_thread_in_order() {
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, LONG);
        assert_eq!(committer.submit(record(1), true), Submitted::Queued);
        // Alone or not: the one before may still be on its way.
        let mut at_once = 0;
        for seq in 2..200 {
            at_once += u64::from(committer.submit(record(seq), seq % 7 == 0) != Submitted::Queued);
        }
        println!("{at_once} records were committed at once");
        assert_eq!(committer.finish(), Ok(199));
        meta.disk().kill();
        assert_eq!(meta.copy().open().expect("recovered").next_seq, 200);
    }

    #[test]
    fn nothing_is_committed_at_once_while_a_segment_is_to_begin() {
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, LONG);
        assert!(matches!(committer.submit(record(1), false), Submitted::Durable(_)));
        // The thread waits for the journal, so the order is still under way.
        let desk = Arc::clone(&committer.desk);
        let held = desk.journal();
        let rotated = committer.rotate();
        assert_eq!(committer.submit(record(2), false), Submitted::Queued);
        drop(held);
        assert_eq!(rotated.blocking_recv(), Ok(1));
        assert_eq!(committer.finish(), Ok(2));
    }

    #[test]
    fn a_slow_disk_is_left_to_the_thread_until_it_has_been_quick_for_a_while() {
        let pace = Pace::default();
        let most = Duration::from_millis(1);
        assert!(pace.is_within(most));
        pace.saw(Duration::from_millis(5));
        assert!(!pace.is_within(most));
        let quick = (1..100).find(|_| {
            pace.saw(Duration::from_micros(100));
            pace.is_within(most)
        });
        assert!(quick.is_some_and(|count| (10..60).contains(&count)), "{quick:?}");
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, most);
        committer.desk.pace.saw(Duration::from_secs(1));
        assert_eq!(committer.submit(record(1), false), Submitted::Queued);
    }

    #[test]
    fn with_a_limit_of_nothing_every_record_goes_to_the_thread() {
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, Duration::ZERO);
        for seq in 1..20 {
            assert_eq!(committer.submit(record(seq), false), Submitted::Queued);
        }
        assert_eq!(committer.finish(), Ok(19));
    }

    #[test]
    fn a_failed_commit_at_once_ends_it_for_good() {
        let meta = MemoryMeta::new();
        let mut committer = committer(&meta, LONG);
        assert!(matches!(committer.submit(record(1), false), Submitted::Durable(_)));
        meta.disk().fail_sync_after(0);
        assert_eq!(committer.submit(record(2), false), Submitted::Ended);
        assert!(committer.progress().borrow().is_err());
        // Neither way leads on.
        assert_eq!(committer.submit(record(3), false), Submitted::Queued);
        assert!(committer.finish().is_err());
    }
}
