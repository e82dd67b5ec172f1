//! Direct writes: each waits for its own conversion, and those that come at the same time share an
//! io_end (`groups` of the state machine).
//!
//! A group that fails is written again one by one: what is wrong with one write is told to that one
//! only. Sampled writes go alone, so that their trace is their own.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::conversion::{Completion, Lane};
use endio_chassis::trace::{Span, Why};
use endio_state_machine::writeback::groups::{joined, may_join};
use endio_types::{LblkRange, MapVersion};
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Engine;
use crate::failure::Failure;
use crate::io_end::Job;
use crate::volume::Volume;

/// A direct write on its way into an io_end.
pub(crate) struct Direct {
    range: LblkRange,
    data: Bytes,
    end_bytes: u64,
    deadline: Instant,
    span: Span,
}

/// A write, and who waits for it.
pub(crate) type Waiting = (Direct, oneshot::Sender<Result<Completion, Failure>>);

/// Gives the place of a group back when its task ends before it is over.
struct Leading {
    volume: Arc<Volume>,
    is_over: bool,
}

impl Leading {
    /// Group after group, until nothing waits.
    async fn lead(mut self, engine: Arc<Engine>) {
        loop {
            let group = self.volume.state().direct_groups.take();
            if group.is_empty() {
                self.is_over = true;
                return;
            }
            let group = group.into_iter().map(|(_, waiting)| waiting).collect();
            engine.write_group(&self.volume, group).await;
        }
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        if !self.is_over {
            self.volume.state().direct_groups.left();
        }
    }
}

impl Engine {
    /// A write of whole blocks through an io_end. The caller holds the lock of the blocks, and the
    /// cache and its log hold nothing of them.
    pub(super) async fn write_through(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        range: LblkRange,
        data: Bytes,
        end_bytes: u64,
        deadline: Instant,
    ) -> Result<Completion, Failure> {
        let bytes = data.len() as u64;
        {
            let mut state = volume.state();
            state.direct_bytes += bytes;
            state.direct.insert(range.start.0, range.len);
        }
        let span = Span::current();
        let is_alone = volume.in_place || !may_join(range) || span.sampled().is_some();
        let direct = Direct { range, data, end_bytes, deadline, span };
        let outcome = match is_alone {
            true => self.write_alone(volume, &direct).await,
            false => self.write_in_group(volume, direct).await,
        };
        let mut state = volume.state();
        state.direct_bytes -= bytes;
        state.direct.remove(&range.start.0);
        outcome
    }

    /// Some of the blocks of a range, written anew with the data that they have. What the caller owes is
    /// as for [`Self::write_through`].
    pub(super) async fn write_anew(
        &self,
        volume: &Arc<Volume>,
        within: LblkRange,
        (ranges, data): (Vec<LblkRange>, Bytes),
        deadline: Instant,
    ) -> Result<(), Failure> {
        let bytes = data.len() as u64;
        {
            let mut state = volume.state();
            state.direct_bytes += bytes;
            state.direct.insert(within.start.0, within.len);
        }
        let span = Span::current();
        // It ends at no byte that it did not end at before.
        let outcome = self.write_ranges(volume, ranges, data, 0, deadline, span).await;
        let mut state = volume.state();
        state.direct_bytes -= bytes;
        state.direct.remove(&within.start.0);
        outcome.map(|_| ())
    }

    async fn write_in_group(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        direct: Direct,
    ) -> Result<Completion, Failure> {
        let (answer, answered) = oneshot::channel();
        if volume.state().direct_groups.push(direct.range, (direct, answer)) {
            let leading = Leading { volume: Arc::clone(volume), is_over: false };
            self.tasks.spawn(leading.lead(Arc::clone(self)));
        }
        answered.await.unwrap_or_else(|_| Err(Failure::task_lost()))
    }

    async fn write_group(&self, volume: &Arc<Volume>, group: Vec<Waiting>) {
        let together = match &group[..] {
            [(only, _)] => self.write_alone(volume, only).await,
            _ => self.write_together(volume, &group).await,
        };
        let is_one = group.len() == 1;
        match together {
            Err(failure) if !is_one && !failure.ends_volume() => {
                join_all(group.into_iter().map(|(direct, answer)| async move {
                    // Whoever has gone needs no answer.
                    let _ = answer.send(self.write_alone(volume, &direct).await);
                }))
                .await;
            }
            outcome => {
                for (_, answer) in group {
                    let _ = answer.send(outcome.clone());
                }
            }
        }
    }

    async fn write_together(
        &self,
        volume: &Arc<Volume>,
        group: &[Waiting],
    ) -> Result<Completion, Failure> {
        let writes = || group.iter().map(|(direct, _)| direct);
        let mut data = BytesMut::with_capacity(writes().map(|direct| direct.data.len()).sum());
        for direct in writes() {
            data.extend_from_slice(&direct.data);
        }
        let ranges = joined(writes().map(|direct| direct.range));
        let end_bytes = writes().map(|direct| direct.end_bytes).max().unwrap_or(0);
        let deadline = writes().map(|direct| direct.deadline).min();
        let span = group.first().map_or_else(Span::current, |(first, _)| first.span.clone());
        let deadline = deadline.unwrap_or_else(Instant::now);
        let (data, lead) = (data.freeze(), span.clone());
        let outcome = self.write_ranges(volume, ranges, data, end_bytes, deadline, span).await;
        // None was sampled when it joined: what is by now had to be tried again, or was slow.
        if let Some(context) = lead.sampled() {
            for direct in writes().skip(1) {
                direct.span.link(context);
                direct.span.keep(Why::Retried);
            }
        }
        outcome
    }

    async fn write_alone(
        &self,
        volume: &Arc<Volume>,
        direct: &Direct,
    ) -> Result<Completion, Failure> {
        let (ranges, data) = (vec![direct.range], direct.data.clone());
        let span = direct.span.clone();
        self.write_ranges(volume, ranges, data, direct.end_bytes, direct.deadline, span).await
    }

    async fn write_ranges(
        &self,
        volume: &Arc<Volume>,
        ranges: Vec<LblkRange>,
        data: Bytes,
        end_bytes: u64,
        deadline: Instant,
        span: Span,
    ) -> Result<Completion, Failure> {
        let size_after = volume.growable.then(|| volume.state().view.size_after(end_bytes));
        let changing = volume.map_changes(ranges.clone());
        let job = Job {
            volume: volume.id,
            name: Arc::clone(&volume.name),
            generation: volume.generation,
            lane: Lane::Direct,
            promise: None,
            ranges,
            data,
            size_after_bytes: size_after.unwrap_or(0),
            sync: true,
            // The caller holds the lock of the blocks, and none of them is dirty.
            logged_up_to: volume.state().dirty.log_number(),
            deadline,
            span: span.clone(),
        };
        let write = self.submitter.write(&job, std::future::ready(Ok(())).boxed());
        let (outcome, parts) = match span.scope(write).await {
            Ok(written) => (Ok(written.done), written.parts),
            Err(failure) => (Err(failure), Vec::new()),
        };
        // Before anybody is told: whoever saw the write end reads it.
        changing.ended(parts);
        match &outcome {
            Ok(done) => volume.state().view.saw_size(MapVersion(done.map_version), done.size_bytes),
            Err(failure) => self.heed(volume, failure),
        }
        volume.changed();
        outcome
    }
}
