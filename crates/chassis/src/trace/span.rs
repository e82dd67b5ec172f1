//! A span under way.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task;

use super::context::{Context, new_id, now_ns};
use super::record::{Record, Value};
use super::sink::{Sink, sink};

/// Spans of one request that may wait for the decision; more are left out of a kept trace.
const WAITING_MAX: usize = 256;

/// Why an unsampled trace is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It took long.
    Slow = 0,
    /// It failed.
    Failed = 1,
    /// An attempt of it was aborted.
    Retried = 2,
}

impl Why {
    pub(crate) const ALL: [(Self, &'static str); 3] =
        [(Self::Slow, "slow"), (Self::Failed, "failed"), (Self::Retried, "retried")];
}

/// Makes the spans of one service.
#[derive(Clone, Copy, Debug)]
pub struct Tracer {
    service: &'static str,
}

impl Tracer {
    /// For a service under this name.
    #[must_use]
    pub const fn new(service: &'static str) -> Self {
        Self { service }
    }

    /// The entry span of a request: below the caller's span if it named one, else the root of a new
    /// trace. If the trace is not sampled, what it becomes is decided at its end.
    #[must_use]
    pub fn entry(&self, name: &'static str, traceparent: &str) -> Span {
        self.entry_below(name, Context::parse(traceparent))
    }

    /// As [`Self::entry`].
    #[must_use]
    pub fn entry_below(&self, name: &'static str, parent: Option<Context>) -> Span {
        let Some(sink) = sink().filter(|sink| sink.is_on()) else { return Span::none() };
        let trace =
            parent.map_or_else(|| u128::from(new_id()) << 64 | u128::from(new_id()), |p| p.trace);
        let is_sampled = sink.samples(trace, parent.map(|parent| parent.is_sampled));
        if !is_sampled && !sink.keeps {
            return Span::none();
        }
        let context = Context { trace, span: new_id(), is_sampled };
        let mut record = Record::new(self.service, name, context, now_ns());
        record.parent = parent.map_or(0, |parent| parent.span);
        record.is_parent_remote = parent.is_some();
        let fate = if is_sampled { Fate::Emit } else { Fate::Wait };
        let home = Arc::new(Home { fate: AtomicU8::new(fate as u8), waiting: Mutex::default() });
        Span::of(record, home, Role::Entry)
    }

    /// A leg of a request that began in another service. Nothing without a parent.
    #[must_use]
    pub fn leg(&self, name: &'static str, traceparent: &str) -> Span {
        if traceparent.is_empty() {
            return Span::none();
        }
        let Some(sink) = sink() else { return Span::none() };
        let Some(parent) = Context::parse(traceparent) else { return Span::none() };
        if !parent.is_sampled && !sink.keeps {
            return Span::none();
        }
        let context = Context { span: new_id(), ..parent };
        let mut record = Record::new(self.service, name, context, now_ns());
        record.parent = parent.span;
        record.is_parent_remote = true;
        let fate = if parent.is_sampled { Fate::Emit } else { Fate::Wait };
        let home = Arc::new(Home { fate: AtomicU8::new(fate as u8), waiting: Mutex::default() });
        Span::of(record, home, Role::Leg)
    }

    /// A span of a batch: a trace of its own if any of the traces it serves is sampled.
    #[must_use]
    pub fn batch(&self, name: &'static str, served: impl Iterator<Item = Context>) -> Span {
        let served: Vec<Context> = served.filter(|context| context.is_sampled).collect();
        if served.is_empty() || sink().is_none() {
            return Span::none();
        }
        let trace = u128::from(new_id()) << 64 | u128::from(new_id());
        let context = Context { trace, span: new_id(), is_sampled: true };
        let mut record = Record::new(self.service, name, context, now_ns());
        served.into_iter().for_each(|context| record.link(context));
        let fate = AtomicU8::new(Fate::Emit as u8);
        Span::of(record, Arc::new(Home { fate, waiting: Mutex::default() }), Role::Child)
    }

    /// A span below another one of this service.
    #[must_use]
    pub fn child(&self, parent: &Span, name: &'static str) -> Span {
        let Some(parent) = &parent.0 else { return Span::none() };
        let context = Context { span: new_id(), ..parent.context };
        let mut record = Record::new(self.service, name, context, now_ns());
        record.parent = parent.context.span;
        Span::of(record, Arc::clone(&parent.home), Role::Child)
    }
}

/// What becomes of the finished spans of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Fate {
    /// Not known yet: they wait.
    Wait,
    /// They are recorded.
    Emit,
    /// They are forgotten.
    Forget,
}

/// What the spans of one request in this service share.
#[derive(Debug)]
struct Home {
    fate: AtomicU8,
    waiting: Mutex<Vec<Record>>,
}

impl Home {
    fn is(&self, fate: Fate) -> bool {
        self.fate.load(Ordering::Acquire) == fate as u8
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Record>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, fate: Fate) -> Vec<Record> {
        let mut waiting = self.waiting();
        self.fate.store(fate as u8, Ordering::Release);
        std::mem::take(&mut *waiting)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Entry,
    Leg,
    Child,
}

#[derive(Debug)]
struct Inner {
    context: Context,
    home: Arc<Home>,
    role: Role,
    record: Mutex<Record>,
}

/// A span; it ends when its last clone is dropped. Cheap to clone, and to make where its trace is
/// not sampled.
#[derive(Clone, Debug, Default)]
pub struct Span(Option<Arc<Inner>>);

impl Span {
    /// No span; everything that is done with it does nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }

    fn of(record: Record, home: Arc<Home>, role: Role) -> Self {
        let context = record.context;
        Self(Some(Arc::new(Inner { context, home, role, record: Mutex::new(record) })))
    }

    /// The span that [`Self::scope`] is inside of.
    #[must_use]
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    /// With an attribute, before it is shared.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        match self.0.as_mut().and_then(Arc::get_mut) {
            Some(inner) => {
                let record = inner.record.get_mut().unwrap_or_else(PoisonError::into_inner);
                record.set(key, value.into());
            }
            None => self.set(key, value),
        }
        self
    }

    /// Adds an attribute, or replaces it.
    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        self.change(|record| record.set(key, value.into()));
    }

    /// Marks it as failed; of several messages the last one stays.
    pub fn fail(&self, message: &str) {
        self.change(|record| record.error = Some(message.into()));
    }

    /// Links it to a span of another trace.
    pub fn link(&self, to: Context) {
        self.change(|record| record.link(to));
    }

    /// Begins the next phase of it; the one before ends. Phases become spans below it.
    pub fn phase(&self, name: &'static str) {
        self.change(|record| record.phase(name, now_ns()));
    }

    /// For the messages of this span to other services; empty: no span.
    #[must_use]
    pub fn traceparent(&self) -> String {
        self.context().map(|context| context.traceparent()).unwrap_or_default()
    }

    /// Where it is; `None`: no span.
    #[must_use]
    pub fn context(&self) -> Option<Context> {
        let inner = self.0.as_ref()?;
        Some(Context { is_sampled: inner.home.is(Fate::Emit), ..inner.context })
    }

    /// The trace, for the answer to the caller; empty: it is not recorded.
    #[must_use]
    pub fn trace_id(&self) -> String {
        self.sampled().map(|context| context.trace_id()).unwrap_or_default()
    }

    /// Where it is, if it is recorded for sure: for exemplars and links.
    #[must_use]
    pub fn sampled(&self) -> Option<Context> {
        self.context().filter(|context| context.is_sampled)
    }

    /// From now on the trace is recorded, with what was waiting: something went wrong with it, and
    /// what follows is to be seen in all services.
    pub fn keep(&self, why: Why) {
        let (Some(inner), Some(sink)) = (&self.0, sink()) else { return };
        if inner.home.is(Fate::Wait) {
            inner.home.settle(Fate::Emit).into_iter().for_each(|record| sink.emit(record));
            sink.keep(inner.context.trace, why);
        }
    }

    /// The future inside of this span: [`Self::current`] finds it, and log lines name it.
    pub fn scope<F: Future>(self, future: F) -> InSpan<F> {
        InSpan { future: Box::pin(future), span: self }
    }

    #[cfg(test)]
    pub(super) fn began_earlier(&self, ns: u64) {
        self.change(|record| record.start_ns -= ns);
    }

    fn change(&self, change: impl FnOnce(&mut Record)) {
        if let Some(inner) = &self.0 {
            change(&mut inner.record.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(sink) = sink() else { return };
        let record = self.record.get_mut().unwrap_or_else(PoisonError::into_inner);
        record.end(now_ns());
        let mut unused = Record::new("", "", self.context, 0);
        std::mem::swap(record, &mut unused);
        let record = unused;
        if self.home.is(Fate::Emit) {
            return sink.emit(record);
        }
        match self.role {
            Role::Entry => end_entry(sink, &self.home, record),
            Role::Leg => end_leg(sink, &self.home, record),
            Role::Child => {
                let mut waiting = self.home.waiting();
                // It may have been decided since.
                if self.home.is(Fate::Emit) {
                    drop(waiting);
                    sink.emit(record);
                } else if self.home.is(Fate::Wait) && waiting.len() < WAITING_MAX {
                    waiting.push(record);
                }
            }
        }
    }
}

fn end_entry(sink: &Sink, home: &Home, mut record: Record) {
    let why = match () {
        () if record.error.is_some() => Some(Why::Failed),
        () if record.end_ns - record.start_ns >= sink.slow_ns => Some(Why::Slow),
        () => None,
    };
    let Some(why) = why else {
        drop(home.settle(Fate::Forget));
        // A write-out or a peer may still find reason to keep it.
        return sink.remember(record);
    };
    record.set("kept", Value::Word(Why::ALL[why as usize].1));
    let trace = record.context.trace;
    let waiting = home.settle(Fate::Emit);
    std::iter::once(record).chain(waiting).for_each(|record| sink.emit(record));
    sink.keep(trace, why);
}

/// A leg that failed is recorded at once: its caller will keep the trace.
fn end_leg(sink: &Sink, home: &Home, record: Record) {
    let is_failed = record.error.is_some();
    let fate = if is_failed { Fate::Emit } else { Fate::Forget };
    let waiting = home.settle(fate);
    for record in std::iter::once(record).chain(waiting) {
        if is_failed { sink.emit(record) } else { sink.remember(record) }
    }
}

thread_local!(static CURRENT: RefCell<Span> = const { RefCell::new(Span::none()) });

/// Where log lines of this thread belong now.
pub fn current_context() -> Option<Context> {
    // A log line inside the change of the cell itself is none of a span.
    CURRENT.try_with(|current| current.try_borrow().ok()?.context()).ok().flatten()
}

/// A future inside of a span, see [`Span::scope`].
#[derive(Debug)]
pub struct InSpan<F> {
    future: Pin<Box<F>>,
    span: Span,
}

impl<F: Future> Future for InSpan<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> task::Poll<F::Output> {
        let Self { future, span } = &mut *self;
        let _inside = Inside::enter(span);
        future.as_mut().poll(context)
    }
}

/// Swaps the span in, and out again even when the future panics.
struct Inside<'a>(&'a mut Span);

impl<'a> Inside<'a> {
    fn enter(span: &'a mut Span) -> Self {
        CURRENT.with_borrow_mut(|current| std::mem::swap(current, span));
        Self(span)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(|current| std::mem::swap(current, self.0));
    }
}
