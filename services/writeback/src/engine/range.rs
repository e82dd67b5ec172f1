//! Trim, write zeroes, allocate: changes of the map without data.

use std::sync::Arc;

use bytes::BytesMut;
use endio_api::conversion::{ChangeMapRequest, MapChange};
use endio_chassis::trace::Span;
use endio_state_machine::writeback::cover::inner_and_edges;
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange, MapVersion, Reason};
use tokio::time::Instant;

use super::{Engine, Piece, Started};
use crate::dedupe::{Admission, Admitted, Retry};
use crate::failure::Failure;
use crate::locks::Held;
use crate::metrics::Kind;
use crate::volume::{State, Volume};

/// What happens to the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// It becomes a hole.
    Trim,
    /// It reads as zeroes and stays allocated.
    Zero,
    /// Its holes become unwritten blocks.
    Allocate,
}

/// A change as it was asked for.
#[derive(Debug, Clone)]
pub struct RangeOp {
    /// What to do.
    pub kind: RangeKind,
    /// Where.
    pub bytes: ByteRange,
    /// Makes a retry safe.
    pub retry: Option<Retry>,
    /// W3C traceparent of the caller; empty: none.
    pub traceparent: String,
}

/// A change that is durable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ranged {
    /// 32 hexadecimal digits; empty: not sampled.
    pub trace_id: String,
    /// Blocks whose state changed, once per replica.
    pub blocks_changed: u64,
    /// It had been applied before.
    pub duplicate: bool,
}

struct Change {
    engine: Arc<Engine>,
    volume: Arc<Volume>,
    op: RangeOp,
    blocks: LblkRange,
    deadline: Instant,
    span: Span,
}

impl RangeKind {
    fn counted(self) -> Kind {
        match self {
            Self::Trim => Kind::Trim,
            Self::Zero => Kind::WriteZeroes,
            Self::Allocate => Kind::Allocate,
        }
    }

    fn on_the_wire(self) -> MapChange {
        match self {
            Self::Trim => MapChange::Trim,
            Self::Zero => MapChange::Zero,
            Self::Allocate => MapChange::Allocate,
        }
    }
}

impl Engine {
    /// Starts a change and takes its place in the order of its blocks before this returns. It goes
    /// on when the handle is dropped.
    pub fn start_range(self: &Arc<Self>, volume: &Arc<Volume>, op: RangeOp) -> Started<Ranged> {
        let started = Instant::now();
        let begun = self.place_range(volume, op);
        Started::begin(&self.tasks, async move {
            let (change, admitted, held) = begun?;
            let (engine, kind) = (Arc::clone(&change.engine), change.op.kind.counted());
            let span = change.span.clone();
            let (began, volume) = (Instant::now(), Arc::clone(&change.volume));
            let outcome = span.clone().scope(change.run(admitted, held)).await;
            match &outcome {
                // It moves no bytes.
                Ok(_) => volume.writes.add(0, began.elapsed()),
                Err(failure) => span.fail(&failure.detail),
            }
            engine.metrics.answered(kind, started.elapsed(), &span, outcome.is_ok());
            outcome
        })
    }

    fn place_range(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        op: RangeOp,
    ) -> Result<(Change, Admitted, Option<Held>), Failure> {
        self.takes_work()?;
        let name = match op.kind {
            RangeKind::Trim => "trim",
            RangeKind::Zero => "write_zeroes",
            RangeKind::Allocate => "allocate",
        };
        let span = crate::TRACER
            .entry(name, &op.traceparent)
            .with("volume", &volume.name)
            .with("offset", op.bytes.offset)
            .with("length", op.bytes.len);
        let blocks = volume.check(op.bytes, false)?;
        let admitted = self.dedupe.admit(op.retry)?;
        let is_new = matches!(admitted, Admitted::New(_));
        let held = is_new.then(|| volume.locks.acquire(blocks));
        let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
        let change = Change { deadline: engine.deadline(), engine, volume, op, blocks, span };
        Ok((change, admitted, held))
    }
}

impl Change {
    async fn run(self, mut admitted: Admitted, held: Option<Held>) -> Result<Ranged, Failure> {
        let Self { engine, volume, .. } = &self;
        if matches!(admitted, Admitted::Busy) {
            admitted = engine.dedupe.admit_in_turn(self.op.retry, self.deadline).await?;
        }
        let trace_id = self.span.trace_id();
        let admission = match admitted {
            Admitted::New(admission) => admission,
            Admitted::Duplicate(result) => {
                engine.metrics.duplicates.inc();
                let blocks_changed = result.unwrap_or(0);
                return Ok(Ranged { trace_id, blocks_changed, duplicate: true });
            }
            Admitted::Busy => return Err(Failure::task_lost()),
        };
        let mut held = held.unwrap_or_else(|| volume.locks.acquire(self.blocks));
        if tokio::time::timeout_at(self.deadline, held.held()).await.is_err() {
            let detail = "earlier requests for these blocks are still under way";
            return Err(Failure::new(Reason::TimedOut, detail));
        }
        volume.usable()?;
        let blocks_changed = self.apply(held).await?;
        self.note_done(admission, blocks_changed);
        Ok(Ranged { trace_id, blocks_changed, duplicate: false })
    }

    async fn apply(&self, held: Held) -> Result<u64, Failure> {
        if self.blocks.is_empty() {
            return Ok(0);
        }
        if self.op.kind == RangeKind::Allocate {
            self.extended().await?;
            // Allocated or not is a property of whole blocks; data in the cache stays.
            return self.change_map(self.blocks, held).await;
        }
        self.engine.forget(&self.volume, self.blocks, self.deadline).await?;
        let size = self.volume.state().view.size_bytes();
        let (inner, edges) = inner_and_edges(self.op.bytes, size);
        for edge in edges {
            self.zero_edge(edge).await?;
        }
        if inner.is_empty() { Ok(0) } else { self.change_map(inner, held).await }
    }

    /// Waits until conversion knows a growable volume to be as long as the range. It allocates inside the size
    /// that it knows only: blocks behind a size that shrinks are freed, and those behind one that never grew
    /// would be nobody's. What was acknowledged and extends the volume is written out first.
    async fn extended(&self) -> Result<(), Failure> {
        let Self { engine, volume, .. } = self;
        let end = self.blocks.end();
        let is_known = |state: &State| state.view.durable_size_bytes().div_ceil(BLOCK_BYTES) >= end;
        let (lsn, count, cursor) = {
            let mut state = volume.state();
            if is_known(&state) {
                return Ok(());
            }
            let lsn = engine.log.last();
            state.flush_up_to_at_least(lsn);
            (lsn, state.error_count, state.errors.sample())
        };
        volume.changed();
        let known = volume.wait(|state| match &state.gone {
            Some(gone) => Some(Err(gone.clone())),
            None if is_known(state) => Some(Ok(())),
            // Told to whoever asks for errors, too: the data stays dirty.
            None if state.error_count != count => {
                let why = state.errors.peek(cursor).cloned();
                let untold =
                    || Failure::new(Reason::IoError, "a write-out failed and is tried again");
                Some(Err(why.unwrap_or_else(untold)))
            }
            // Nothing extends it any more, and conversion knows better what there is.
            None if state.dirty.oldest_lsn().is_none_or(|oldest| oldest > lsn) => Some(Ok(())),
            None => None,
        });
        tokio::time::timeout_at(self.deadline, known).await.unwrap_or_else(|_| {
            let detail = "what extends the volume could not be written out in time";
            Err(Failure::new(Reason::TimedOut, detail))
        })
    }

    /// Zeroes bytes inside one block.
    async fn zero_edge(&self, edge: ByteRange) -> Result<(), Failure> {
        let Self { engine, volume, deadline, .. } = self;
        let block = edge.blocks();
        let held = engine.read_whole(volume, block, *deadline).await?;
        if held.iter().all(|piece| matches!(piece, Piece::Zeroes(_))) {
            return Ok(());
        }
        // An edge is shorter than a block.
        let zeroes = BytesMut::zeroed(edge.len as usize).freeze();
        let whole = engine.merge(volume, edge, zeroes, *deadline).await?;
        engine.write_through(volume, block, whole, 0, *deadline).await?;
        Ok(())
    }

    async fn change_map(&self, range: LblkRange, held: Held) -> Result<u64, Failure> {
        let Self { engine, volume, .. } = self;
        let request = ChangeMapRequest {
            volume: volume.id,
            generation: volume.generation,
            change: self.op.kind.on_the_wire().into(),
            lblk: range.start.0,
            blocks: range.len,
            traceparent: self.span.traceparent(),
            attempt: None,
        };
        let call = |mut client: crate::conversion::Client, attempt| {
            let request = ChangeMapRequest { attempt: Some(attempt), ..request.clone() };
            async move { client.change_map(request).await }
        };
        let changing = volume.map_changes(vec![range]);
        let (changed, left) = engine.change(volume, self.deadline, call).await;
        if let Err(failure) = &changed {
            engine.heed(volume, failure);
        }
        match left {
            None => changing.ended(Vec::new()),
            // A try without an answer may yet be carried out: nobody else has the blocks until then.
            Some(number) => {
                engine.settle_later(volume, number, held, |_| changing.ended(Vec::new()));
            }
        }
        let changed = changed?;
        volume.state().view.saw_map(MapVersion(changed.map_version));
        Ok(changed.blocks_changed)
    }

    fn note_done(&self, admission: Option<Admission>, result: u64) {
        let Some(admission) = admission else { return };
        if let Err(error) = self.engine.log.append_done(admission.key(), result) {
            // The change is done. Only a retry over a restart would not be recognized.
            tracing::warn!(%error, "a retry key could not be kept");
        }
        admission.applied(result);
    }
}
