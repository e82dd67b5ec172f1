//! One write-out: blocks from all over a volume, in one io_end.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::conversion::{Completion, Lane};
use endio_chassis::trace::{Context, Span};
use endio_state_machine::writeback::dirty::PickLimit;
use endio_state_machine::writeback::gather::Gathered;
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, MapVersion, Reason};
use futures_util::FutureExt as _;
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::failure::Failure;
use crate::io_end::Job;
use crate::volume::{CachedBlock, State, Volume};

type Blocks = Gathered<CachedBlock>;

/// What one write-out takes along.
pub(super) struct WriteOut {
    gathered: Blocks,
    /// A caller waits for it.
    sync: bool,
}

impl WriteOut {
    /// Puts what the limit allows under writeback. `None`: there is nothing.
    pub(super) fn pick(
        volume: &Volume,
        state: &mut State,
        limit: PickLimit,
        sync: bool,
    ) -> Option<Self> {
        let gathered = Gathered::pick(&mut state.dirty, limit, volume.in_place)?;
        state.write_outs += 1;
        Some(Self { gathered, sync })
    }
}

/// One buffer out of the blocks; without a copy if there is only one.
fn one_buffer(gathered: &Blocks) -> Bytes {
    let mut blocks = gathered.data();
    if let (Some(only), None) = (blocks.next(), blocks.next()) {
        return only.data.clone();
    }
    let mut whole = BytesMut::with_capacity(gathered.blocks() as usize * BLOCK_SIZE);
    for block in gathered.data() {
        whole.extend_from_slice(&block.data);
    }
    whole.freeze()
}

impl Engine {
    /// Carries a write-out to its end: clean, or dirty again with the error noted.
    pub(super) async fn write_out(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        out: WriteOut,
    ) -> Result<(), Failure> {
        let WriteOut { gathered, sync } = out;
        if gathered.blocks() == 0 {
            // The stores hold all of it, and nothing is left that it held together.
            return self.written_out(volume, &gathered, None);
        }
        let changing = volume.map_changes(gathered.ranges());
        let served = Served::begin(volume, &gathered);
        let job = self.write_out_job(volume, &gathered, sync, served.span.clone());
        // The log's flush goes beside the stores' and not after them.
        self.log.want_durable(gathered.max_lsn());
        let gate = self.log.durable(gathered.max_lsn()).boxed();
        let written = served.span.clone().scope(self.submitter.write(&job, gate)).await;
        match written {
            Ok(written) => {
                // Before the blocks are clean: a read that misses the cache finds them.
                changing.ended(written.parts);
                self.written_out(volume, &gathered, Some(&written.done))
            }
            Err(failure) => {
                changing.ended(Vec::new());
                served.fail(&failure.detail);
                // The log line names the trace.
                let noting = async { self.not_written_out(volume, &gathered, &failure) };
                served.span.clone().scope(noting).await;
                self.fall_back(volume, gathered);
                Err(failure)
            }
        }
    }

    fn write_out_job(
        &self,
        volume: &Arc<Volume>,
        gathered: &Blocks,
        sync: bool,
        span: Span,
    ) -> Job {
        let end_bytes = gathered.end_bytes();
        let size_after = volume.growable.then(|| volume.state().view.size_after(end_bytes));
        Job {
            volume: volume.id,
            name: Arc::clone(&volume.name),
            generation: volume.generation,
            lane: Lane::WriteOut,
            promise: Some(Arc::clone(volume)),
            ranges: gathered.ranges(),
            data: one_buffer(gathered),
            size_after_bytes: size_after.unwrap_or(0),
            sync,
            logged_up_to: gathered.logged_up_to(),
            deadline: self.deadline(),
            span,
        }
    }

    fn written_out(
        &self,
        volume: &Volume,
        gathered: &Blocks,
        done: Option<&Completion>,
    ) -> Result<(), Failure> {
        let blocks = gathered.blocks();
        let mut state = volume.state();
        state.write_outs -= 1;
        if let Some(done) = done {
            state.view.saw_size(MapVersion(done.map_version), done.size_bytes);
        }
        state.credit.consumed(blocks);
        state.rest_until = None;
        let clean = gathered.complete(&mut state.dirty);
        let clean = clean.map_err(|error| Failure::new(Reason::WrongState, error.to_string()));
        // Under the state's lock: who finds the range clean finds the record, too.
        match clean.and_then(|clean| self.log.append_clean(volume.id, &clean)) {
            Ok(lsn) => state.last_clean = state.last_clean.max(lsn),
            // Replay then writes the same data once more; a direct write over it would wait.
            Err(error) => tracing::error!(volume = %volume.name, %error, "cache log"),
        }
        if state.dirty.waiting_blocks() == 0 {
            state.dirty_since = None;
        }
        drop(state);
        endio_failpoints::reach(endio_failpoints::Point::WritebackClean);
        self.metrics.write_outs.inc();
        self.undirtied(volume.id, blocks);
        volume.changed();
        Ok(())
    }

    fn not_written_out(&self, volume: &Volume, gathered: &Blocks, failure: &Failure) {
        let mut state = volume.state();
        state.rest_until = Some(Instant::now() + Duration::from_millis(self.config.retry_max_ms));
        // Nobody has refused the data: it waits for a promise of space, and is tried then.
        let is_pending = failure.reason == Reason::NoSpace && state.credit.is_reset_pending();
        if failure.is_unbacked() || is_pending {
            return;
        }
        state.errors.set_unless(failure.clone(), Failure::is_loss);
        state.error_count += 1;
        drop(state);
        self.heed(volume, failure);
        if volume.usable().is_err() {
            // The flusher says what is lost with a volume that is not ours any more.
            return;
        }
        tracing::error!(
            volume = %volume.name,
            offset = gathered.start_bytes(),
            length = gathered.blocks() * BLOCK_BYTES,
            ranges = gathered.ranges().len(),
            error = %failure,
            "write-out failed; the data stays dirty and is tried again"
        );
        volume.changed();
    }

    /// The blocks of a write-out that failed are dirty again. While conversion is away it may have
    /// converted them unheard, with the space promised for them: they stay under writeback until the next
    /// session counts promises anew, so that a write over them takes space of its own
    /// (`credit-backed`).
    fn fall_back(self: &Arc<Self>, volume: &Arc<Volume>, gathered: Blocks) {
        if self.session.link().epoch.is_some() {
            return self.dirty_again(volume, &gathered);
        }
        let (engine, volume) = (Arc::clone(self), Arc::clone(volume));
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = engine.stop.cancelled() => {}
                _ = engine.session.up() => {}
                () = volume.wait(|state| state.gone.is_some().then_some(())) => {}
            }
            engine.dirty_again(&volume, &gathered);
        });
    }

    fn dirty_again(&self, volume: &Volume, gathered: &Blocks) {
        let mut state = volume.state();
        state.write_outs -= 1;
        let freed = gathered.fail(&mut state.dirty);
        state.credit.put_back(freed);
        // What is logged no flush asks for: it has to grow old.
        state.dirty_since.get_or_insert_with(Instant::now);
        drop(state);
        self.undirtied(volume.id, freed);
        volume.changed();
    }
}

/// The traces that a write-out serves.
struct Served {
    /// Of the write-out: continues the trace of the first write, of a sampled one if there is any.
    span: Span,
    /// Its share in each of the other sampled traces.
    shares: Vec<Span>,
}

impl Served {
    fn begin(volume: &Volume, gathered: &Blocks) -> Self {
        let traces = gathered.data().filter_map(|block| block.trace);
        let mut first = None;
        let mut sampled: BTreeMap<u64, Context> = BTreeMap::new();
        for trace in traces {
            first.get_or_insert(trace);
            if trace.is_sampled {
                sampled.insert(trace.span, trace);
            }
        }
        let own = sampled.pop_first().map(|(_, trace)| trace).or(first);
        let span = |parent| {
            crate::TRACER
                .entry_below("write_out", parent)
                .with("volume", &volume.name)
                .with("offset", gathered.start_bytes())
                .with("length", gathered.blocks() * BLOCK_BYTES)
                .with("ranges", gathered.ranges().len())
        };
        let whole = span(own);
        let share = |other: Context| {
            whole.link(other);
            let share = span(Some(other));
            whole.context().into_iter().for_each(|whole| share.link(whole));
            share
        };
        let shares = sampled.into_values().map(share).collect();
        Self { span: whole, shares }
    }

    fn fail(&self, message: &str) {
        std::iter::once(&self.span).chain(&self.shares).for_each(|span| span.fail(message));
    }
}
