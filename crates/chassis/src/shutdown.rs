//! Stopping a process: ask, let everybody finish, and name who does not.

use std::collections::BTreeMap;
use std::future::pending;
use std::process::exit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Counts who still works, by name.
///
/// Cheap to clone; all clones are one gate.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    inner: Arc<GateInner>,
}

#[derive(Debug, Default)]
struct GateInner {
    holders: Mutex<BTreeMap<&'static str, usize>>,
    changed: watch::Sender<()>,
}

impl GateInner {
    fn holders(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        // Each change is one statement, so a panic of another holder cannot have torn the map.
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Takes a hold under this name; the gate is drained when every hold was dropped.
    pub fn hold(&self, name: &'static str) -> Hold {
        *self.inner.holders().entry(name).or_insert(0) += 1;
        Hold { gate: self.inner.clone(), name }
    }

    /// Names that are still held, each once, in order.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        self.inner.holders().keys().map(|name| (*name).to_owned()).collect()
    }

    /// Waits until nobody holds the gate. Cancel-safe.
    ///
    /// # Errors
    /// The names still held when `deadline` has passed.
    pub async fn drained(&self, deadline: Duration) -> Result<(), Vec<String>> {
        let mut changed = self.inner.changed.subscribe();
        let empty = async {
            while !self.inner.holders().is_empty() {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        match tokio::time::timeout(deadline, empty).await {
            Ok(()) => Ok(()),
            Err(_) => match self.held() {
                names if names.is_empty() => Ok(()),
                names => Err(names),
            },
        }
    }
}

/// Keeps a [`Gate`] from being drained until it is dropped.
#[derive(Debug)]
#[must_use = "a hold that is dropped at once holds nothing"]
pub struct Hold {
    gate: Arc<GateInner>,
    name: &'static str,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holders = self.gate.holders();
        if let Some(count) = holders.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                holders.remove(self.name);
            }
        }
        drop(holders);
        self.gate.changed.send_replace(());
    }
}

/// How far the stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Requested,
    Forced,
}

/// The wish to stop, seen by everybody who has a clone. It never goes back.
///
/// A *requested* stop refuses new work and finishes the old; a *forced* stop drops the old too, and
/// every waiter gets an error.
#[derive(Clone, Debug)]
pub struct Shutdown {
    stage: Arc<watch::Sender<Stage>>,
    gate: Gate,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Nobody asked to stop yet.
    #[must_use]
    pub fn new() -> Self {
        Self { stage: Arc::new(watch::Sender::new(Stage::Running)), gate: Gate::default() }
    }

    /// Asks to stop. Idempotent.
    pub fn request(&self) {
        self.advance(Stage::Requested);
    }

    /// Asks to stop without finishing what is under way. Idempotent; implies [`Self::request`].
    pub fn force(&self) {
        self.advance(Stage::Forced);
    }

    /// Whether a stop was requested or forced.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.stage.borrow() >= Stage::Requested
    }

    /// Whether the stop is a forced one.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        *self.stage.borrow() >= Stage::Forced
    }

    /// Waits for a request (or force). Returns at once if it was made already. Cancel-safe.
    pub async fn requested(&self) {
        self.reached(Stage::Requested).await;
    }

    /// Waits for a forced stop. Cancel-safe.
    pub async fn forced(&self) {
        self.reached(Stage::Forced).await;
    }

    /// Takes a hold under this name: [`Self::drained`] waits for its drop.
    pub fn hold(&self, name: &'static str) -> Hold {
        self.gate.hold(name)
    }

    /// Waits until every hold was dropped. Cancel-safe.
    ///
    /// # Errors
    /// The names still held when `deadline` has passed, or at once when the stop is forced.
    pub async fn drained(&self, deadline: Duration) -> Result<(), Vec<String>> {
        tokio::select! {
            biased;
            result = self.gate.drained(deadline) => result,
            () = self.forced() => match self.gate.held() {
                names if names.is_empty() => Ok(()),
                names => Err(names),
            },
        }
    }

    /// Requests a stop at the first SIGTERM or SIGINT; the second one ends the process at once with
    /// exit code 143 or 130. Must be called inside a tokio runtime, once per process.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        tokio::spawn(async move {
            let mut is_second = false;
            loop {
                let (name, code) = tokio::select! {
                    Some(()) = terminate.recv() => ("SIGTERM", 143),
                    Some(()) = interrupt.recv() => ("SIGINT", 130),
                    else => return,
                };
                if is_second {
                    exit(code);
                }
                is_second = true;
                tracing::info!(signal = name, "stop requested; the same again ends at once");
                shutdown.request();
            }
        });
        Ok(())
    }

    fn advance(&self, to: Stage) {
        self.stage.send_if_modified(|stage| {
            let is_forward = *stage < to;
            if is_forward {
                *stage = to;
            }
            is_forward
        });
    }

    async fn reached(&self, goal: Stage) {
        let mut stage = self.stage.subscribe();
        if stage.wait_for(|stage| *stage >= goal).await.is_err() {
            // The sender lives in self, so this is never reached; waiting is the harmless answer.
            pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests;
