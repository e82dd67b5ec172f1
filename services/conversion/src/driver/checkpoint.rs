//! When the journal has grown: rotate it, then copy the map a few chunks per turn.

use endio_state_machine::record::Snapshot;
use endio_store::meta::{Checkpointer, MetaError, MetaTable};
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant};

use super::DriverError;
use crate::commit::Committer;
use crate::snapshot;

/// Chunks copied in one turn: some milliseconds of the driver's time.
const CHUNKS_PER_TURN: usize = 64;

/// Between two looks at a disk that has no room for a checkpoint.
const REST: Duration = Duration::from_secs(10);

enum Stage {
    Idle(Checkpointer),
    /// The journal begins a new segment after the record of the snapshot.
    Rotating(Checkpointer, Snapshot, oneshot::Receiver<u64>),
    Copying(Checkpointer),
    /// All chunks are copied; they may contain records up to this one.
    Copied(Checkpointer, Option<u64>),
    /// The file is made durable on a thread of its own: it may be large.
    Finishing(oneshot::Receiver<(Checkpointer, Result<(), MetaError>)>),
    /// Between two stages, or after a fault.
    Moved,
}

pub(crate) struct Checkpoints {
    stage: Stage,
    /// None begins before: the disk had no room for one.
    rest_until: Option<Instant>,
}

impl Checkpoints {
    pub(crate) fn new(checkpointer: Checkpointer) -> Self {
        Self { stage: Stage::Idle(checkpointer), rest_until: None }
    }

    /// Whether the next turn can copy something.
    pub(crate) fn has_work(&self) -> bool {
        matches!(self.stage, Stage::Copying(_))
    }

    /// Begins one if the journal is long enough. `snapshot` is the small state at `seq`.
    pub(crate) fn begin_if_due(
        &mut self,
        committer: &Committer,
        seq: u64,
        snapshot: impl FnOnce() -> Snapshot,
    ) -> Result<(), DriverError> {
        let Stage::Idle(checkpointer) = &self.stage else { return Ok(()) };
        if !checkpointer.is_due() || self.rest_until.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        if !checkpointer.has_room() {
            self.rest("it has no room for another one");
            return Ok(());
        }
        if let Stage::Idle(checkpointer) = std::mem::replace(&mut self.stage, Stage::Moved) {
            let snapshot = snapshot();
            debug_assert_eq!(snapshot.seq, seq, "the snapshot is of the last record");
            self.stage = Stage::Rotating(checkpointer, snapshot, committer.rotate());
        }
        Ok(())
    }

    /// Goes on, a bounded piece at a time. `durable`: the last durable record.
    pub(crate) fn step(
        &mut self,
        table: &mut Box<dyn MetaTable>,
        durable: u64,
    ) -> Result<(), DriverError> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Moved) {
            Stage::Rotating(mut checkpointer, snapshot, mut rotated) => match rotated.try_recv() {
                Ok(_) => {
                    let bytes = snapshot::encode(&snapshot).map_err(DriverError::Encode)?;
                    let begun = checkpointer.begin(snapshot.seq, &bytes);
                    match self.may_go_on(&mut checkpointer, begun)? {
                        Some(()) => Stage::Copying(checkpointer),
                        None => Stage::Idle(checkpointer),
                    }
                }
                // Still under way, or the committer failed, which the driver notices by itself.
                Err(_) => Stage::Rotating(checkpointer, snapshot, rotated),
            },
            Stage::Copying(mut checkpointer) => {
                let copied = checkpointer.write_chunks(table.as_mut(), CHUNKS_PER_TURN);
                match self.may_go_on(&mut checkpointer, copied)? {
                    Some(true) => Stage::Copied(checkpointer, None),
                    Some(false) => Stage::Copying(checkpointer),
                    None => Stage::Idle(checkpointer),
                }
            }
            stage => stage,
        };
        self.finish(durable)
    }

    /// A checkpoint that meets a full disk is given up, and begun again when there is room: the journal
    /// and the checkpoints before it have everything.
    fn may_go_on<T>(
        &mut self,
        checkpointer: &mut Checkpointer,
        result: Result<T, MetaError>,
    ) -> Result<Option<T>, DriverError> {
        match result {
            Err(error @ MetaError::NoSpace { .. }) => {
                checkpointer.give_up();
                self.rest(&error.to_string());
                Ok(None)
            }
            result => Ok(Some(result?)),
        }
    }

    fn rest(&mut self, why: &str) {
        self.rest_until = Some(Instant::now() + REST);
        tracing::warn!(
            error = why,
            "no checkpoint on this disk: the journal grows until it has room"
        );
    }

    /// Records applied up to `seq` may be in the copied chunks.
    pub(crate) fn copied_up_to(&mut self, seq: u64) {
        if let Stage::Copied(_, contains @ None) = &mut self.stage {
            *contains = Some(seq);
        }
    }

    fn finish(&mut self, durable: u64) -> Result<(), DriverError> {
        match std::mem::replace(&mut self.stage, Stage::Moved) {
            Stage::Copied(checkpointer, Some(contains)) if contains <= durable => {
                let (tell, done) = oneshot::channel();
                std::thread::Builder::new()
                    .name("endio-checkpoint".to_owned())
                    .spawn(move || {
                        let mut checkpointer = checkpointer;
                        let result = checkpointer.finish(durable);
                        // Nobody waits any more only if the driver has stopped.
                        drop(tell.send((checkpointer, result)));
                    })
                    .map_err(DriverError::Thread)?;
                self.stage = Stage::Finishing(done);
            }
            Stage::Finishing(mut done) => match done.try_recv() {
                Ok((mut checkpointer, result)) => {
                    if self.may_go_on(&mut checkpointer, result)?.is_some() {
                        tracing::info!("checkpoint finished");
                    }
                    self.stage = Stage::Idle(checkpointer);
                }
                Err(oneshot::error::TryRecvError::Empty) => self.stage = Stage::Finishing(done),
                Err(oneshot::error::TryRecvError::Closed) => {
                    return Err(DriverError::Commit("the checkpoint thread panicked".to_owned()));
                }
            },
            stage => self.stage = stage,
        }
        Ok(())
    }
}
