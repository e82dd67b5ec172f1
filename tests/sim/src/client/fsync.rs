//! Flushes, and what they have to tell.

use std::rc::Rc;

use endio_state_machine::writeback::errseq::Cursor;
use endio_types::Reason;

use super::{Clients, Slot};
use crate::exec::MS;
use crate::writeback::{Volume, Wb};

/// Who asks, and what it was told.
pub(super) struct Observer {
    engine: String,
    open: (u64, u64),
    cursor: Cursor,
    seen: u64,
}

impl Clients {
    fn patience_of_a_flush(&self) -> u64 {
        let exec = self.exec();
        let hasty = self.world.plan.hasty_flushes;
        match hasty > 0 && !self.world.is_healed.get() && exec.chance(hasty) {
            true => exec.now() + exec.below(20 * MS),
            false => u64::MAX,
        }
    }

    pub(super) async fn fsync(
        &self,
        slot: &Rc<Slot>,
        wb: &Wb,
        volume: &Rc<Volume>,
        observer: &mut Option<Observer>,
    ) -> bool {
        let tenure = slot.tenure.get();
        let (before, flush) = {
            let oracle = &mut slot.known.borrow_mut().oracle;
            (oracle.now(), oracle.invoke_flush())
        };
        let open = (volume.id.0, volume.generation.0);
        let is_same =
            observer.as_ref().is_some_and(|o| o.engine == wb.engine.name && o.open == open);
        if !is_same {
            let state = volume.state.borrow();
            let seen = state.errors_set - u64::from(state.errors.is_untold());
            let engine = wb.engine.name.clone();
            drop(state);
            *observer = Some(Observer { engine, open, cursor: volume.watch(), seen });
        }
        let mut cursor = observer.as_ref().map(|o| o.cursor).unwrap_or_default();
        let (inner, open) = (wb.clone(), Rc::clone(volume));
        let patience = self.patience_of_a_flush();
        let exec = self.exec().clone();
        let of = Rc::clone(slot);
        let work = async move {
            // Whoever goes away drops the flush where it is.
            let outcome = exec.until(patience, inner.fsync(&open, &mut cursor)).await?;
            // Said from here on: who comes after this one is not told, though its answer is on its way.
            if of.tenure.get() == tenure
                && outcome.as_ref().is_err_and(|failure| failure.reason == Reason::LostWrites)
            {
                of.known.borrow_mut().unsaid_loss = false;
            }
            let set = open.state.borrow().errors_set;
            Some((outcome, cursor, set))
        };
        let Some(Some((outcome, cursor, set))) = self.inside(wb, work).await else { return false };
        let Some(observer) = observer else { return false };
        // A loss is said by nothing else.
        let is_loss = outcome.as_ref().is_err_and(|failure| failure.reason == Reason::LostWrites);
        let was_told = observer.cursor != cursor || is_loss;
        let has_news = set > observer.seen;
        let is_error = outcome.is_err();
        if was_told && !has_news {
            self.exec().fail(format!("errors_told_once: {} was told twice", slot.name));
        }
        if !is_error && has_news {
            self.exec().fail(format!("errors_told_once: {} was never told", slot.name));
        }
        observer.cursor = cursor;
        if was_told {
            observer.seen = set;
        }
        self.exec().note("fsync", slot.owner.get(), &[is_error.into()]);
        let mut known = slot.known.borrow_mut();
        if slot.tenure.get() != tenure {
            return false;
        }
        match outcome {
            Ok(()) => {
                if std::mem::take(&mut known.unsaid_loss) {
                    let why = "an fsync after a power cut did not tell of lost writes";
                    self.exec().fail(format!("errors_told_once: {}: {why}", slot.name));
                }
                known.oracle.ack_flush(flush);
                known.flushed(before);
                true
            }
            Err(failure) => {
                if failure.reason == Reason::LostWrites {
                    known.unsaid_loss = false;
                }
                false
            }
        }
    }
}
