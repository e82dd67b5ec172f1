//! The committer: a thread that makes groups of records durable while the driver goes on.
//!
//! The driver hands over groups in order and learns the last durable number through a watch, which
//! never blocks, so the two can never wait for each other in a circle.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use endio_chassis::metrics::Histogram;
use endio_store::meta::{Journal, JournalHandle, MetaError};
use tokio::sync::{oneshot, watch};

/// Groups that may wait for the disk; the driver waits beyond it.
const GROUPS_MAX: usize = 64;
/// Groups that one `fdatasync` may serve.
const GROUPS_PER_COMMIT_MAX: usize = 256;

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

/// Hands groups to the thread. Dropping it ends the thread after the last group.
pub(crate) struct Committer {
    orders: Option<SyncSender<Order>>,
    progress: watch::Receiver<Progress>,
    journal: JournalHandle,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    /// Starts the thread over a recovered journal whose last record is `durable`.
    pub(crate) fn start(journal: Journal, durable: u64, time: Histogram) -> std::io::Result<Self> {
        let (orders, queue) = sync_channel(GROUPS_MAX);
        let (tell, progress) = watch::channel(Ok(durable));
        let handle = journal.handle();
        let thread = std::thread::Builder::new()
            .name("endio-commit".to_owned())
            .spawn(move || run(journal, &queue, &tell, &time))?;
        Ok(Self { orders: Some(orders), progress, journal: handle, thread: Some(thread) })
    }

    /// Queues records; waits if too many groups wait already. `false`: the thread has ended, and
    /// [`Self::progress`] says why.
    pub(crate) fn submit(&self, group: Vec<Encoded>) -> bool {
        self.send(Order::Group(group))
    }

    /// Begins a new segment after everything submitted so far.
    pub(crate) fn rotate(&self) -> oneshot::Receiver<u64> {
        let (tell, rotated) = oneshot::channel();
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

fn run(
    mut journal: Journal,
    queue: &Receiver<Order>,
    tell: &watch::Sender<Progress>,
    time: &Histogram,
) {
    while let Ok(first) = queue.recv() {
        if let Err(error) = serve(&mut journal, first, queue, tell, time) {
            drop(tell.send_replace(Err(describe(&error))));
            return;
        }
    }
}

fn serve(
    journal: &mut Journal,
    first: Order,
    queue: &Receiver<Order>,
    tell: &watch::Sender<Progress>,
    time: &Histogram,
) -> Result<(), MetaError> {
    let began = Instant::now();
    let mut next = Some(first);
    for _ in 0..GROUPS_PER_COMMIT_MAX {
        match next.take() {
            Some(Order::Group(group)) => {
                for record in group {
                    journal.append(record.seq, record.epoch, &record.payload)?;
                }
            }
            Some(Order::Rotate(rotated)) => {
                let last = journal.rotate()?;
                drop(tell.send_replace(Ok(last)));
                // Nobody waits any more only if the driver has stopped.
                let _ = rotated.send(last);
                return Ok(());
            }
            None => break,
        }
        next = queue.try_recv().ok();
    }
    let last = journal.commit()?;
    time.record(began.elapsed());
    drop(tell.send_replace(Ok(last)));
    match next {
        Some(order) => serve(journal, order, queue, tell, time),
        None => Ok(()),
    }
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
