//! A queue between tasks and threads.

use std::{collections::VecDeque, sync::PoisonError};

use tracing_mutex::stdsync::{Condvar, Mutex, MutexGuard};

/// First in, first out; closed once, and then drained. Bounded by whoever pushes: the gate admits
/// no more bios than its limit.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    is_closed: bool,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Self {
        let state = State { items: VecDeque::new(), is_closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Appends, or gives the item back if the queue is closed.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(item);
        }
        state.items.push_back(item);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes the first item; waits for one. `None`: closed and empty.
    pub(crate) fn pop(&self) -> Option<T> {
        let mut state = self.wait();
        state.items.pop_front()
    }

    /// Takes everything; waits until there is something. Empty: closed.
    pub(crate) fn pop_all(&self) -> VecDeque<T> {
        std::mem::take(&mut self.wait().items)
    }

    /// Lets nothing in any more; what is inside can still be taken.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    fn wait(&self) -> MutexGuard<'_, State<T>> {
        self.changed
            .wait_while(self.lock(), |state| state.items.is_empty() && !state.is_closed)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // The state is whole after each statement; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
