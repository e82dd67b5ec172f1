//! fsync: what was acknowledged before the call is converted, and errors are told once.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use endio_chassis::trace::Span;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::errseq::Cursor;
use endio_state_machine::writeback::sessions::SessionId;
use endio_types::Reason;
use futures_util::future::join_all;
use tokio::time::{Duration, Instant};
use tracing_mutex::stdsync::Mutex;

use super::Engine;
use crate::failure::Failure;
use crate::metrics::Kind;
use crate::volume::{State, Volume};

/// Who asks for an fsync, and is told of errors. Without an observer and a session the callers of the unary
/// call count as one.
#[derive(Default, Clone, Copy)]
pub struct Asker<'a> {
    /// Its stream or connection.
    pub observer: Option<&'a Observer>,
    /// The session of its writes: it is told of a loss of acknowledged writes that these may be part of,
    /// whoever else was told.
    pub session: Option<SessionId>,
}

impl<'a> Asker<'a> {
    /// Somebody with a stream or connection.
    pub fn by(observer: &'a Observer) -> Self {
        Self { observer: Some(observer), session: None }
    }
}

/// Somebody who is told each error of a volume once: a Submit stream, an NBD connection.
///
/// An observer with a name is known again when it comes back: of a loss of acknowledged writes it is
/// told once, even if others were told before it came. One that was not there before the loss is told
/// too, because nobody can tell it apart.
#[derive(Default)]
pub struct Observer {
    who: Option<String>,
    cursors: Mutex<BTreeMap<(u64, u64), Cursor>>,
}

impl Observer {
    /// An observer that is known again under this name.
    pub fn of(who: String) -> Self {
        Self { who: Some(who), ..Self::default() }
    }

    /// Errors of the volume from now on are told to this observer. Idempotent.
    pub fn watch(&self, volume: &Volume) {
        let now = volume.state().errors.sample();
        let mut cursors = self.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        // A later generation is another volume to its observers, and the old one ends here.
        cursors.retain(|(id, generation), _| *id != volume.id || *generation == volume.generation);
        cursors.entry((volume.id, volume.generation)).or_insert(now);
    }

    /// Whether this observer is about to hear of a loss of acknowledged writes.
    fn is_to_hear_of_loss(&self, volume: &Volume, state: &State, who: Option<&str>) -> bool {
        let by_name = state.is_loss_untold(who);
        let cursors = self.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        let cursor = cursors.get(&(volume.id, volume.generation)).copied();
        let cursor = cursor.unwrap_or_else(|| state.errors.sample());
        by_name || state.errors.peek(cursor).is_some_and(Failure::is_loss)
    }

    fn check(&self, volume: &Volume, state: &mut State, who: Option<&str>) -> Option<Failure> {
        let mut cursors = self.cursors.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (volume.id, volume.generation);
        let cursor = cursors.entry(key).or_insert_with(|| state.errors.sample());
        let loss = state.tell_loss(who);
        // An error besides the loss is told next time.
        if loss.is_some() && !state.errors.peek(*cursor).is_some_and(Failure::is_loss) {
            return loss;
        }
        state.errors.check(cursor)
    }
}

/// What an fsync waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Converted, or in conversion's data log.
    Durable,
    /// Converted: the map shows it.
    Converted,
}

impl Until {
    /// Whether something acknowledged with record `lsn` or before is not so far.
    fn is_ahead(self, state: &State, lsn: Lsn) -> bool {
        match self {
            Self::Durable => state.dirty.pending_up_to(lsn),
            Self::Converted => state.dirty.oldest_lsn().is_some_and(|oldest| oldest <= lsn),
        }
    }
}

impl Engine {
    /// Waits until everything acknowledged before is durable, or converted. Returns how many versions
    /// of blocks it waited for.
    ///
    /// Cancel-safe: write-out goes on.
    ///
    /// # Errors
    /// An error of a write-out that the asker was not told yet, once; the data stays dirty and
    /// is tried again. `TIMED_OUT` where it does not end in time.
    pub async fn fsync(
        &self,
        volume: &Arc<Volume>,
        asker: Asker<'_>,
        until: Until,
        traceparent: &str,
    ) -> Result<u64, Failure> {
        let work = async {
            let (lsn, waited_for) = self.all_out(volume, until).await?;
            self.tell(volume, asker, until, lsn).await?;
            Ok(waited_for)
        };
        self.traced(volume, traceparent, work).await
    }

    async fn traced<T>(
        &self,
        volume: &Volume,
        traceparent: &str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let started = Instant::now();
        let span = crate::TRACER.entry("fsync", traceparent).with("volume", &volume.name);
        let outcome = span.clone().scope(work).await;
        if let Err(failure) = &outcome {
            span.fail(&failure.detail);
        }
        self.metrics.answered(Kind::Fsync, started.elapsed(), &span, outcome.is_ok());
        outcome
    }

    /// Tells the asker what it was not told yet, once everything up to `lsn` is out or has failed.
    async fn tell(
        &self,
        volume: &Volume,
        asker: Asker<'_>,
        until: Until,
        lsn: Lsn,
    ) -> Result<(), Failure> {
        // Noted first, so that it is not told again after a kill. From where it counts as told on, nothing is
        // waited for: who asks and goes away meanwhile was not told, and the next one is.
        let by_itself = asker.observer.and_then(|observer| observer.who.as_deref());
        let session = asker.session.filter(|_| by_itself.is_none());
        let session = session.and_then(|session| self.name_of(session, volume));
        let who = by_itself.or(session.as_deref());
        let is_loss = {
            let state = volume.state();
            match asker {
                Asker { observer: Some(observer), .. } => {
                    observer.is_to_hear_of_loss(volume, &state, who)
                }
                Asker { session: Some(_), .. } => state.is_loss_untold(who),
                _ => state.errors.peek(state.told).is_some_and(Failure::is_loss),
            }
        };
        if is_loss {
            self.log.loss_told(volume.id).await;
        }
        let (untold, pending) = {
            let mut state = volume.state();
            let untold = match asker {
                Asker { observer: Some(observer), .. } => observer.check(volume, &mut state, who),
                // Of a write-out that failed it hears for as long as the data is not out, below. It takes
                // no news from those who count as one.
                Asker { session: Some(_), .. } => state.tell_loss(who),
                _ => {
                    let State { errors, told, .. } = &mut *state;
                    errors.check(told)
                }
            };
            // Somebody else was told of the failure, perhaps; the data is still not there.
            let failed = || {
                let known = state.errors.latest().filter(|_| asker.session.is_some());
                let known = known.filter(|failure| !failure.is_loss()).cloned();
                let detail = "a write-out failed and is tried again";
                known.unwrap_or_else(|| Failure::new(Reason::IoError, detail))
            };
            let pending = until.is_ahead(&state, lsn).then(failed);
            (untold, pending)
        };
        match untold.or(pending) {
            Some(failure) => Err(failure),
            None => {
                endio_failpoints::reach(endio_failpoints::Point::WritebackFsynced);
                Ok(())
            }
        }
    }

    /// Under which name a session hears of a loss, if it may have lost something.
    fn name_of(&self, session: SessionId, volume: &Volume) -> Option<String> {
        let found = volume.state().loss.as_ref()?.found();
        let name = format!("session {:032x}", u128::from_be_bytes(session.0));
        (!self.dedupe.is_younger(session, found)).then_some(name)
    }

    /// Waits until what was acknowledged before is out, or a write-out has failed; tells nobody.
    async fn all_out(&self, volume: &Arc<Volume>, until: Until) -> Result<(Lsn, u64), Failure> {
        let out = async {
            let (lsn, errors, waited_for) = self.want_all_out(volume, until).await;
            let ended = volume.wait(|state| match &state.gone {
                Some(gone) => Some(Err(gone.clone())),
                None if state.error_count != errors => Some(Ok((lsn, waited_for))),
                None if !until.is_ahead(state, lsn) => Some(Ok((lsn, waited_for))),
                None => None,
            });
            ended.await
        };
        // Write-outs have their own timeout, after which they leave an error here.
        let patience = Duration::from_millis(self.config.io_timeout_ms.saturating_mul(2));
        match tokio::time::timeout(patience, out).await {
            Ok(out) => out,
            Err(_) => {
                let detail = "what is dirty could not be written out in time";
                Err(Failure::new(Reason::TimedOut, detail))
            }
        }
    }

    /// Asks for everything that is dirty now to be made durable: in the data log, if that takes it,
    /// and else on the stores.
    async fn want_all_out(&self, volume: &Arc<Volume>, until: Until) -> (Lsn, u64, u64) {
        // What was acknowledged before this has a number up to here.
        let lsn = self.log.last();
        let (pending, errors) = {
            let mut state = volume.state();
            state.rhythm.flushed();
            let pending = match until {
                Until::Durable => state.dirty.pending_blocks_up_to(lsn),
                Until::Converted => state.dirty.unconverted_blocks_up_to(lsn),
            };
            if pending > 0 && until == Until::Converted {
                state.flush_up_to_at_least(lsn);
            }
            (pending, state.error_count)
        };
        match until {
            _ if pending == 0 => {}
            Until::Durable => self.log_flush(volume, lsn).await,
            Until::Converted => volume.changed(),
        }
        (lsn, errors, pending)
    }

    /// fsync of every volume that is open here and that `is_meant` names.
    ///
    /// # Errors
    /// The first error; the others are written out all the same, and their errors are told to who asks
    /// next.
    pub async fn sync_all(&self, is_meant: impl Fn(&str) -> bool) -> Result<u64, Failure> {
        let mut volumes = self.table.all();
        volumes.retain(|volume| is_meant(&volume.name));
        let traceparent = Span::current().traceparent();
        let out = volumes.iter().map(|volume| {
            self.traced(volume, &traceparent, self.all_out(volume, Until::Converted))
        });
        let out = join_all(out).await;
        let mut waited_for = 0;
        // One answer tells of one error: what is behind it must stay untold.
        for (volume, out) in volumes.iter().zip(out) {
            let (lsn, more) = out?;
            self.tell(volume, Asker::default(), Until::Converted, lsn).await?;
            waited_for += more;
        }
        Ok(waited_for)
    }
}
