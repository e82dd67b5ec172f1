//! What waits to leave: effects until their records are durable, and the streams they go to.
//!
//! Effects that rest on nothing that could be forgotten overtake those that wait for the disk; among
//! those that wait, order is kept.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use endio_chassis::trace::{Context, Span};
use endio_state_machine::machine::{
    ConvertedBatch, Durability, Effect, EffectKind, FromStore, FromWriteback, Input, MapView,
    Refusal, ReplyBody, ReplyTo, StoreSession, ToStore, ToWriteback, WritebackSession,
};
use endio_types::Millis;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::handle::{Outgoing, Peer};
use crate::metrics::Metrics;

enum Waiting {
    Effect {
        kind: EffectKind,
        began: Instant,
        /// Of a completion: what the machine's clock had counted since the last release.
        waited_ms: u64,
        span: Span,
    },
    View(Box<MapView>, oneshot::Sender<Result<MapView, Refusal>>),
    /// Held until the batch is durable: its span ends then.
    Batch {
        _span: Span,
    },
}

#[derive(Default)]
pub(crate) struct Outbox {
    pub(crate) writebacks: BTreeMap<WritebackSession, Peer<ToWriteback>>,
    pub(crate) stores: BTreeMap<StoreSession, Peer<ToStore>>,
    waiting: VecDeque<(u64, Waiting)>,
    now: Vec<Waiting>,
}

type Calls = BTreeMap<ReplyTo, oneshot::Sender<Result<ReplyBody, Refusal>>>;

impl Outbox {
    /// Whether nothing waits for the disk.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.now.is_empty()
    }

    pub(crate) fn forget_writeback(&mut self, session: WritebackSession) {
        self.writebacks.remove(&session);
    }

    pub(crate) fn forget_store(&mut self, session: StoreSession) {
        self.stores.remove(&session);
    }

    /// Takes an effect made in the turn that began at `began`.
    pub(crate) fn push(&mut self, effect: Effect, began: Instant, now: Millis) {
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
        match effect.after {
            Durability::Now => self.now.push(waiting),
            Durability::Committed(seq) => self.wait(seq, waiting),
        }
    }

    /// Shows a view of the map once what it rests on is durable.
    pub(crate) fn view(&mut self, view: MapView, reply: oneshot::Sender<Result<MapView, Refusal>>) {
        self.wait(view.seq, Waiting::View(Box::new(view), reply));
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
    }

    fn send(&mut self, waiting: Waiting, calls: &mut Calls, metrics: &Metrics) {
        let (kind, began, waited_ms, span) = match waiting {
            Waiting::Effect { kind, began, waited_ms, span } => (kind, began, waited_ms, span),
            Waiting::View(view, reply) => return drop(reply.send(Ok(*view))),
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
