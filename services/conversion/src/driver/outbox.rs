//! What waits to leave: effects until their records are durable, and the streams they go to.
//!
//! Effects that rest on nothing that could be forgotten overtake those that wait for the disk; among
//! those that wait, order is kept. Receipts, which nobody waits for, ride with what follows them: a
//! message of its own for each would wake its peer twice for every write.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use endio_chassis::trace::{Context, Span};
use endio_state_machine::machine::{
    ConvertedBatch, Durability, Effect, EffectKind, FromStore, FromWriteback, Input, Refusal,
    ReplyBody, ReplyTo, StoreSession, ToStore, ToWriteback, WritebackSession,
};
use endio_types::Millis;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::handle::{Outgoing, Peer};
use crate::metrics::Metrics;

/// Longest wait of a receipt for a message to ride with.
const RECEIPT_WAITS: Duration = Duration::from_millis(5);

enum Waiting {
    Effect {
        kind: EffectKind,
        began: Instant,
        /// Of a completion: what the machine's clock had counted since the last release.
        waited_ms: u64,
        span: Span,
    },
    /// Sends the answer to a question.
    Answer(Box<dyn FnOnce() + Send>),
    /// Held until the batch is durable: its span ends then.
    Batch { _span: Span },
}

#[derive(Default)]
pub(crate) struct Outbox {
    pub(crate) writebacks: BTreeMap<WritebackSession, Peer<ToWriteback>>,
    pub(crate) stores: BTreeMap<StoreSession, Peer<ToStore>>,
    waiting: VecDeque<(u64, Waiting)>,
    now: Vec<Waiting>,
    receipts: BTreeMap<WritebackSession, Vec<ToWriteback>>,
    /// When the receipts leave by themselves.
    receipts_due: Option<Instant>,
}

type Calls = BTreeMap<ReplyTo, oneshot::Sender<Result<ReplyBody, Refusal>>>;

impl Outbox {
    /// Whether nothing waits, neither for the disk nor for a message to ride with.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.now.is_empty() && self.receipts.is_empty()
    }

    /// When [`Outbox::release`] has something to do whatever happens.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.receipts_due
    }

    pub(crate) fn forget_writeback(&mut self, session: WritebackSession) {
        self.writebacks.remove(&session);
        self.receipts.remove(&session);
    }

    pub(crate) fn forget_store(&mut self, session: StoreSession) {
        self.stores.remove(&session);
    }

    /// Takes an effect made in the turn that began at `began`; `newest`: the last record of that
    /// turn.
    pub(crate) fn push(
        &mut self,
        effect: Effect,
        newest: Option<u64>,
        began: Instant,
        now: Millis,
    ) {
        if let Effect { after: Durability::Now, kind: EffectKind::Writeback(session, message) } =
            &effect
            && is_receipt(message)
        {
            self.receipts.entry(*session).or_default().push(message.clone());
            self.receipts_due.get_or_insert(began + RECEIPT_WAITS);
            return;
        }
        let after = match (&effect.kind, effect.after, newest) {
            // With the blocks that the record frees there may soon be more to say.
            (
                EffectKind::Store(_, ToStore::Released { refused: None, .. }),
                Durability::Now,
                Some(seq),
            ) => Durability::Committed(seq),
            (_, after, _) => after,
        };
        let (span, waited_ms) = match &effect.kind {
            EffectKind::Writeback(_, ToWriteback::Completion(done)) => {
                let span = crate::TRACER
                    .leg("convert", &done.traceparent)
                    .with("io_end", done.io_end.0)
                    .with("volume", done.volume.0);
                if let Some(reason) = done.failed {
                    span.fail(reason.name());
                }
                (span, now.0.saturating_sub(done.last_release_ms))
            }
            _ => (Span::none(), 0),
        };
        let waiting = Waiting::Effect { kind: effect.kind, began, waited_ms, span };
        match after {
            Durability::Now => self.now.push(waiting),
            Durability::Committed(seq) => self.wait(seq, waiting),
        }
    }

    /// Answers a question once records up to `seq` are durable: the last one that the answer shows.
    pub(crate) fn answer<A>(&mut self, seq: u64, answer: A, reply: oneshot::Sender<A>)
    where
        A: Send + 'static,
    {
        // An answer that nobody waits for any more is dropped.
        self.wait(seq, Waiting::Answer(Box::new(move || drop(reply.send(answer)))));
    }

    /// One span for the whole batch, from now until it is durable, with a link to each write.
    pub(crate) fn batch(&mut self, batch: &ConvertedBatch) {
        let sampled = batch.traceparents.iter().filter(|text| Context::says_sampled(text));
        let span = crate::TRACER
            .batch("convert_batch", sampled.filter_map(|text| Context::parse(text)))
            .with("io_ends", batch.io_ends.len())
            .with("blocks", batch.blocks)
            .with("seq", batch.seq);
        self.wait(batch.seq, Waiting::Batch { _span: span });
    }

    fn wait(&mut self, seq: u64, waiting: Waiting) {
        // Numbers come almost in order: a reply may rest on an older record than the last one.
        let seq = self.waiting.back().map_or(seq, |(last, _)| seq.max(*last));
        self.waiting.push_back((seq, waiting));
    }

    /// Sends what may leave now that records up to `durable` are on disk.
    pub(crate) fn release(&mut self, durable: u64, calls: &mut Calls, metrics: &Metrics) {
        for waiting in std::mem::take(&mut self.now) {
            self.send(waiting, calls, metrics);
        }
        while self.waiting.front().is_some_and(|(seq, _)| *seq <= durable) {
            let Some((_, waiting)) = self.waiting.pop_front() else { return };
            self.send(waiting, calls, metrics);
        }
        if self.receipts_due.is_some_and(|due| due <= Instant::now()) {
            for session in self.receipts.keys().copied().collect::<Vec<_>>() {
                self.send_receipts(session);
            }
        }
        if self.receipts.is_empty() {
            self.receipts_due = None;
        }
    }

    fn send_receipts(&mut self, session: WritebackSession) {
        for receipt in self.receipts.remove(&session).unwrap_or_default() {
            if !post(self.writebacks.get(&session), receipt, 0) {
                return self.forget_writeback(session);
            }
        }
    }

    fn send(&mut self, waiting: Waiting, calls: &mut Calls, metrics: &Metrics) {
        let (kind, began, waited_ms, span) = match waiting {
            Waiting::Effect { kind, began, waited_ms, span } => (kind, began, waited_ms, span),
            Waiting::Answer(send) => return send(),
            Waiting::Batch { .. } => return,
        };
        match kind {
            EffectKind::Reply(to, result) => {
                if let Some(reply) = calls.remove(&to) {
                    // Nobody waits any more: the call took effect all the same.
                    drop(reply.send(result));
                }
            }
            EffectKind::Writeback(session, message) => {
                let convert_us =
                    (began.elapsed().as_micros() as u64).saturating_add(waited_ms * 1_000);
                if let ToWriteback::Completion(done) = &message {
                    metrics.completed(done.failed, Duration::from_micros(convert_us), &span);
                }
                let is_last = matches!(message, ToWriteback::SessionRefused(_));
                self.send_receipts(session);
                let sent = post(self.writebacks.get(&session), message, convert_us);
                if is_last || !sent {
                    self.forget_writeback(session);
                }
            }
            EffectKind::Store(session, message) => {
                let is_last = matches!(message, ToStore::SessionRefused(_));
                let sent = post(self.stores.get(&session), message, 0);
                if is_last || !sent {
                    self.forget_store(session);
                }
            }
            EffectKind::EndWriteback(session) => self.forget_writeback(session),
            EffectKind::EndStore(session) => self.forget_store(session),
            EffectKind::ConversionFailed { io_end, volume, range, why } => {
                tracing::error!(
                    io_end = io_end.0,
                    volume = volume.0,
                    lblk = range.start.0,
                    blocks = range.len,
                    error = why,
                    "an accepted write could not be converted; its data stays dirty and is retried"
                );
            }
        }
    }
}

/// Whether a message only says that another one has arrived.
fn is_receipt(message: &ToWriteback) -> bool {
    matches!(message, ToWriteback::Released { refused: None, .. })
}

/// `false`: the peer does not read, or is gone: its stream must end.
fn post<M>(peer: Option<&Peer<M>>, message: M, convert_us: u64) -> bool {
    let Some(peer) = peer else { return true };
    match peer.outgoing.try_send(Outgoing::Message(message, convert_us)) {
        Ok(()) => true,
        Err(mpsc::error::TrySendError::Full(_)) => {
            tracing::warn!("a peer does not read its stream; the stream is ended");
            false
        }
        Err(mpsc::error::TrySendError::Closed(_)) => false,
    }
}

/// The span of a traced input: it lasts while the machine decides.
pub(crate) fn input_span(input: &Input, traceparent: &str) -> Span {
    // Deciding takes microseconds: where a write is slow, it is not here, so these spans are made
    // for sampled writes only.
    if !Context::says_sampled(traceparent) {
        return Span::none();
    }
    match input {
        Input::Writeback { message: FromWriteback::Begin(begin), .. } => crate::TRACER
            .leg("begin", traceparent)
            .with("volume", begin.volume.0)
            .with("lblk", begin.lblk.0)
            .with("blocks", begin.blocks)
            .with("attempt", begin.attempt),
        Input::Writeback { message: FromWriteback::Log(log), .. } => crate::TRACER
            .leg("log", traceparent)
            .with("volume", log.volume.0)
            .with("blocks", log.entries.len()),
        Input::Writeback { message: FromWriteback::Release { token, abort, .. }, .. } => {
            crate::TRACER
                .leg("release", traceparent)
                .with("io_end", token.io_end.0)
                .with("segment", 0_u32)
                .with("abort", *abort)
        }
        Input::Store { message: FromStore::Release { token, .. }, .. } => crate::TRACER
            .leg("release", traceparent)
            .with("io_end", token.io_end.0)
            .with("segment", token.segment.0)
            .with("store", token.store.0),
        _ => Span::none(),
    }
}

#[cfg(test)]
mod tests {
    use endio_chassis::metrics::Registry;
    use endio_types::IoEndId;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const SESSION: WritebackSession = WritebackSession(1);
    const STORE: StoreSession = StoreSession(1);

    struct Rig {
        outbox: Outbox,
        metrics: Metrics,
        writeback: mpsc::Receiver<Outgoing<ToWriteback>>,
        store: mpsc::Receiver<Outgoing<ToStore>>,
    }

    fn peer<M>() -> (Peer<M>, mpsc::Receiver<Outgoing<M>>) {
        let (outgoing, stream) = mpsc::channel(16);
        (Peer { outgoing, _alive: CancellationToken::new().drop_guard() }, stream)
    }

    fn receipt() -> ToWriteback {
        ToWriteback::Released { io_end: IoEndId(1), refused: None }
    }

    fn renewed() -> ToWriteback {
        ToWriteback::Renewed { lease_ms: 1, floor: IoEndId(1) }
    }

    impl Rig {
        fn new() -> Self {
            let mut outbox = Outbox::default();
            let ((to_writeback, writeback), (to_store, store)) = (peer(), peer());
            outbox.writebacks.insert(SESSION, to_writeback);
            outbox.stores.insert(STORE, to_store);
            Self { outbox, metrics: Metrics::new(&Registry::default()), writeback, store }
        }

        fn push(&mut self, kind: EffectKind, newest: Option<u64>) {
            let effect = Effect { after: Durability::Now, kind };
            self.outbox.push(effect, newest, Instant::now(), Millis(0));
        }

        fn release(&mut self, durable: u64) {
            self.outbox.release(durable, &mut Calls::new(), &self.metrics);
        }

        fn heard(&mut self) -> Vec<&'static str> {
            let names =
                std::iter::from_fn(|| self.writeback.try_recv().ok()).map(|sent| match sent {
                    Outgoing::Message(ToWriteback::Released { .. }, _) => "receipt",
                    Outgoing::Message(ToWriteback::Renewed { .. }, _) => "renewed",
                    _ => "other",
                });
            names.collect()
        }
    }

    #[tokio::test]
    async fn a_receipt_rides_with_the_next_message_ahead_of_it() {
        let mut rig = Rig::new();
        rig.push(EffectKind::Writeback(SESSION, receipt()), None);
        rig.release(0);
        assert!(rig.heard().is_empty() && !rig.outbox.is_empty());
        rig.push(EffectKind::Writeback(SESSION, renewed()), None);
        rig.release(0);
        assert_eq!(rig.heard(), ["receipt", "renewed"]);
        assert!(rig.outbox.is_empty() && rig.outbox.due().is_none());
    }

    #[tokio::test]
    async fn a_receipt_that_nothing_follows_leaves_by_itself() {
        let mut rig = Rig::new();
        rig.push(EffectKind::Writeback(SESSION, receipt()), None);
        rig.release(0);
        tokio::time::sleep_until(rig.outbox.due().expect("it leaves")).await;
        rig.release(0);
        assert_eq!(rig.heard(), ["receipt"]);
        assert!(rig.outbox.is_empty() && rig.outbox.due().is_none());
    }

    #[tokio::test]
    async fn receipts_of_a_session_end_with_it() {
        let mut rig = Rig::new();
        rig.push(EffectKind::Writeback(SESSION, receipt()), None);
        rig.outbox.forget_writeback(SESSION);
        assert!(rig.outbox.is_empty());
    }

    #[tokio::test]
    async fn an_answer_waits_for_the_last_record_that_it_shows() {
        let mut rig = Rig::new();
        let (reply, mut answer) = oneshot::channel();
        rig.outbox.answer(7, "volumes", reply);
        rig.release(6);
        assert!(answer.try_recv().is_err() && !rig.outbox.is_empty());
        rig.release(7);
        assert_eq!(answer.try_recv(), Ok("volumes"));
        assert!(rig.outbox.is_empty());
    }

    /// A refusal is no receipt.
    #[tokio::test]
    async fn a_store_hears_with_the_record_of_its_release_or_at_once() {
        let mut rig = Rig::new();
        let released = |refused| ToStore::Released {
            io_end: IoEndId(1),
            segment: endio_types::SegmentIndex(1),
            refused,
        };
        rig.push(EffectKind::Store(STORE, released(None)), Some(7));
        rig.push(EffectKind::Store(STORE, released(Some(endio_types::Reason::Aborted))), Some(7));
        rig.release(6);
        assert!(rig.store.try_recv().is_ok() && rig.store.try_recv().is_err());
        rig.release(7);
        assert!(rig.store.try_recv().is_ok());
        rig.push(EffectKind::Store(STORE, released(None)), None);
        rig.release(7);
        assert!(rig.store.try_recv().is_ok());
    }
}
