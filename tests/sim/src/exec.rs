//! A seeded executor over virtual time: which task runs next is drawn, and nothing else decides.
//!
//! Tasks belong to nodes. A node that is killed loses its tasks at once, whatever they hold; one
//! that is paused keeps them, and they go on where they were when it wakes up.

use std::cell::{Cell, RefCell};
use std::collections::BinaryHeap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use endio_testkit::seed::{Rng, mix};
use endio_types::Millis;

/// A node, by number. Node 0 is the world: it never dies.
pub type Node = usize;
/// The world.
pub const WORLD: Node = 0;
/// Microseconds in a millisecond.
pub const MS: u64 = 1000;

type Ready = Arc<Mutex<Vec<usize>>>;

struct TaskWaker {
    task: usize,
    is_queued: AtomicBool,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.task);
        }
    }
}

struct Task {
    node: Node,
    life: u64,
    waker: Arc<TaskWaker>,
    /// Absent while it runs.
    work: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

struct Timer {
    at: u64,
    /// Timers of one instant fire in an order that is drawn.
    order: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// A node as the executor knows it.
#[derive(Clone, Debug)]
struct NodeState {
    life: u64,
    is_up: bool,
    is_paused: bool,
    parked: Vec<usize>,
    /// Its clock: parts in a thousand of real speed, and how far it is ahead.
    rate: u64,
    ahead: u64,
    steps: u64,
}

struct Inner {
    now: Cell<u64>,
    rng: RefCell<Rng>,
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Ready,
    timers: RefCell<BinaryHeap<Timer>>,
    nodes: RefCell<Vec<NodeState>>,
    steps: Cell<u64>,
    hash: Cell<u64>,
    log: RefCell<Option<Vec<String>>>,
    broken: RefCell<Option<String>>,
    is_over: Cell<bool>,
}

/// Handle of the executor. Clones share it.
#[derive(Clone)]
pub struct Exec(Rc<Inner>);

impl Exec {
    /// An executor with so many nodes besides the world. `keep_log`: events are kept as text.
    pub fn new(seed: u64, nodes: usize, keep_log: bool) -> Self {
        let node = NodeState {
            life: 1,
            is_up: false,
            is_paused: false,
            parked: Vec::new(),
            rate: 1000,
            ahead: 0,
            steps: 0,
        };
        Self(Rc::new(Inner {
            now: Cell::new(0),
            rng: RefCell::new(Rng::new(seed)),
            tasks: RefCell::default(),
            free: RefCell::default(),
            ready: Ready::default(),
            timers: RefCell::default(),
            nodes: RefCell::new(
                (0..=nodes).map(|at| NodeState { is_up: at == WORLD, ..node.clone() }).collect(),
            ),
            steps: Cell::new(0),
            hash: Cell::new(seed),
            log: RefCell::new(keep_log.then(Vec::new)),
            broken: RefCell::default(),
            is_over: Cell::new(false),
        }))
    }

    /// Microseconds since the beginning.
    pub fn now(&self) -> u64 {
        self.0.now.get()
    }

    /// What a node's monotonic clock says. It may run at another speed, and jump ahead.
    pub fn clock(&self, node: Node) -> Millis {
        let nodes = self.0.nodes.borrow();
        Millis((self.now() * nodes[node].rate / 1000 + nodes[node].ahead) / MS)
    }

    /// Sets the speed of a node's clock, in thousandths. It never goes back.
    pub fn set_clock(&self, node: Node, rate: u64, jump_ms: u64) {
        let before = self.clock(node).0 * MS + MS - 1;
        let nodes = &mut self.0.nodes.borrow_mut()[node];
        nodes.rate = rate;
        nodes.ahead = (before + jump_ms * MS).saturating_sub(self.now() * rate / 1000);
    }

    /// Draws a number below `bound`.
    pub fn below(&self, bound: u64) -> u64 {
        self.0.rng.borrow_mut().below(bound)
    }

    /// Draws a number in `from..=to`.
    pub fn between(&self, from: u64, to: u64) -> u64 {
        self.0.rng.borrow_mut().between(from, to)
    }

    /// True in `permille` of a thousand cases.
    pub fn chance(&self, permille: u64) -> bool {
        permille > 0 && self.below(1000) < permille
    }

    /// Something happened: it goes into the hash of the run, and into the log if that is kept.
    pub fn note(&self, what: &'static str, node: Node, details: &[u64]) {
        let mut hash = mix(self.0.hash.get() ^ self.now());
        hash = mix(hash ^ u64::from(crc32c::crc32c(what.as_bytes())) ^ ((node as u64) << 32));
        for detail in details {
            hash = mix(hash ^ detail);
        }
        self.0.hash.set(hash);
        if let Some(log) = &mut *self.0.log.borrow_mut() {
            let (ms, us) = (self.now() / MS, self.now() % MS);
            log.push(format!("{ms:>7}.{us:03} node {node:>2} {what} {details:?}"));
        }
    }

    /// As [`Exec::note`], with a text that is made only if the log is kept.
    pub fn tell(&self, node: Node, text: impl FnOnce() -> String) {
        if let Some(log) = &mut *self.0.log.borrow_mut() {
            let (ms, us) = (self.now() / MS, self.now() % MS);
            log.push(format!("{ms:>7}.{us:03} node {node:>2} {}", text()));
        }
    }

    /// A promise is broken: the run ends. The first one stands.
    pub fn fail(&self, why: impl Into<String>) {
        let why = why.into();
        self.tell(WORLD, || format!("BROKEN {why}"));
        self.0.broken.borrow_mut().get_or_insert(why);
    }

    /// Everything that was to be shown has been shown: the run ends.
    pub fn finish(&self) {
        self.0.is_over.set(true);
    }

    /// What was broken.
    pub fn broken(&self) -> Option<String> {
        self.0.broken.borrow().clone()
    }

    /// The events so far, if they are kept.
    pub fn log(&self) -> Vec<String> {
        self.0.log.borrow().clone().unwrap_or_default()
    }

    /// A number that differs when anything that was noted differs.
    pub fn hash(&self) -> u64 {
        self.0.hash.get()
    }

    /// Steps of tasks so far.
    pub fn steps(&self) -> u64 {
        self.0.steps.get()
    }

    /// Steps so far by node.
    pub fn steps_by_node(&self) -> Vec<u64> {
        self.0.nodes.borrow().iter().map(|node| node.steps).collect()
    }

    /// Starts a task on a node. On one that is down nothing runs, now or later.
    pub fn spawn(&self, node: Node, work: impl Future<Output = ()> + 'static) {
        let (life, is_up) = {
            let nodes = self.0.nodes.borrow();
            (nodes[node].life, nodes[node].is_up)
        };
        if !is_up {
            return;
        }
        let task = self.0.free.borrow_mut().pop().unwrap_or_else(|| {
            self.0.tasks.borrow_mut().push(None);
            self.0.tasks.borrow().len() - 1
        });
        let ready = Arc::clone(&self.0.ready);
        let waker = Arc::new(TaskWaker { task, is_queued: AtomicBool::new(false), ready });
        waker.wake_by_ref();
        let work: Pin<Box<dyn Future<Output = ()>>> = Box::pin(work);
        self.0.tasks.borrow_mut()[task] = Some(Task { node, life, waker, work: Some(work) });
    }

    /// Whether this life of the node still lasts.
    pub fn is_alive(&self, node: Node, life: u64) -> bool {
        let nodes = self.0.nodes.borrow();
        nodes[node].is_up && nodes[node].life == life
    }

    /// Whether the node runs, paused or not.
    pub fn is_up(&self, node: Node) -> bool {
        self.0.nodes.borrow()[node].is_up
    }

    /// Whether the node is frozen.
    pub fn is_paused(&self, node: Node) -> bool {
        self.0.nodes.borrow()[node].is_paused
    }

    /// The life that the node is in.
    pub fn life(&self, node: Node) -> u64 {
        self.0.nodes.borrow()[node].life
    }

    /// Ends every task of a node, wherever it is.
    pub fn kill(&self, node: Node) {
        {
            let mut nodes = self.0.nodes.borrow_mut();
            let state = &mut nodes[node];
            state.life += 1;
            (state.is_up, state.is_paused) = (false, false);
            state.parked.clear();
        }
        let mut dead = Vec::new();
        for (at, slot) in self.0.tasks.borrow_mut().iter_mut().enumerate() {
            // The task that runs now is put away by whoever runs it.
            if slot.as_ref().is_some_and(|task| task.node == node && task.work.is_some()) {
                dead.extend(slot.take());
                self.0.free.borrow_mut().push(at);
            }
        }
        // What they held may call back into the executor.
        drop(dead);
    }

    /// Drops everything that is left, so that nothing holds anything any more.
    pub fn clear(&self) {
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        let timers = std::mem::take(&mut *self.0.timers.borrow_mut());
        drop((tasks, timers));
    }

    /// A node begins its next life.
    pub fn start(&self, node: Node) -> u64 {
        let mut nodes = self.0.nodes.borrow_mut();
        nodes[node].is_up = true;
        nodes[node].life
    }

    /// Freezes a node.
    pub fn pause(&self, node: Node) {
        self.0.nodes.borrow_mut()[node].is_paused = true;
    }

    /// Wakes a frozen node up.
    pub fn resume(&self, node: Node) {
        let parked = {
            let mut nodes = self.0.nodes.borrow_mut();
            nodes[node].is_paused = false;
            std::mem::take(&mut nodes[node].parked)
        };
        self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).extend(parked);
    }

    /// Runs until `until` microseconds, a broken promise, or so many steps.
    pub fn run(&self, until: u64, steps_max: u64) {
        let goes_on = || self.0.broken.borrow().is_none() && !self.0.is_over.get();
        while self.now() <= until && goes_on() {
            if self.steps() >= steps_max {
                return self.fail(format!("livelock: {steps_max} steps"));
            }
            let next = {
                let mut ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
                let count = ready.len() as u64;
                (count > 0).then(|| ready.swap_remove(self.below(count) as usize))
            };
            match next {
                Some(task) => self.step(task),
                None => {
                    let Some(timer) = self.0.timers.borrow_mut().pop() else { return };
                    if timer.at > until {
                        self.0.timers.borrow_mut().push(timer);
                        self.0.now.set(until + 1);
                        return;
                    }
                    self.0.now.set(self.now().max(timer.at));
                    timer.waker.wake();
                }
            }
        }
    }

    fn step(&self, at: usize) {
        let (node, life, waker, mut work) = {
            let mut tasks = self.0.tasks.borrow_mut();
            let Some(task) = &mut tasks[at] else { return };
            let nodes = &mut self.0.nodes.borrow_mut()[task.node];
            if nodes.is_paused {
                nodes.parked.push(at);
                return;
            }
            let Some(work) = task.work.take() else { return };
            nodes.steps += 1;
            (task.node, task.life, Arc::clone(&task.waker), work)
        };
        waker.is_queued.store(false, Ordering::Relaxed);
        self.0.steps.set(self.steps() + 1);
        let as_waker = Waker::from(Arc::clone(&waker));
        let done = work.as_mut().poll(&mut Context::from_waker(&as_waker)).is_ready();
        let is_over = done || !self.is_alive(node, life);
        if is_over {
            self.0.tasks.borrow_mut()[at] = None;
            self.0.free.borrow_mut().push(at);
            drop(work);
        } else if let Some(task) = &mut self.0.tasks.borrow_mut()[at] {
            task.work = Some(work);
        }
    }

    /// Wakes `waker` at a time.
    pub fn wake_at(&self, at: u64, waker: &Waker) {
        let order = self.0.rng.borrow_mut().draw();
        self.0.timers.borrow_mut().push(Timer { at, order, waker: waker.clone() });
    }

    /// Waits until a time, in microseconds.
    pub async fn sleep_until(&self, at: u64) {
        let mut is_set = false;
        poll_fn(|context| {
            if self.now() >= at {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut is_set, true) {
                self.wake_at(at, context.waker());
            }
            Poll::Pending
        })
        .await;
    }

    /// Waits so many microseconds.
    pub async fn sleep(&self, us: u64) {
        self.sleep_until(self.now() + us).await;
    }

    /// The outcome of `work`, or `None` if it is not there at `at`.
    pub async fn until<T>(&self, at: u64, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut is_set = false;
        poll_fn(|context| {
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Some(done));
            }
            if self.now() >= at {
                return Poll::Ready(None);
            }
            if !std::mem::replace(&mut is_set, true) {
                self.wake_at(at, context.waker());
            }
            Poll::Pending
        })
        .await
    }
}

/// Wakes everybody who waits for something to change.
#[derive(Clone, Default)]
pub struct Signal(Rc<RefCell<Vec<Waker>>>);

impl Signal {
    /// Everybody looks again.
    pub fn notify(&self) {
        let waiting = std::mem::take(&mut *self.0.borrow_mut());
        for waker in waiting {
            waker.wake();
        }
    }

    /// Waits until `look` finds what it wants. Cancel-safe.
    pub async fn wait<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| match look() {
            Some(found) => Poll::Ready(found),
            None => {
                self.register(context.waker());
                Poll::Pending
            }
        })
        .await
    }

    /// Wakes `waker` at the next change.
    pub fn register(&self, waker: &Waker) {
        let mut waiting = self.0.borrow_mut();
        if !waiting.iter().any(|known| known.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }
}

struct Slot<T> {
    value: Option<T>,
    is_closed: bool,
    waker: Option<Waker>,
}

/// Where an answer is put. Dropped without one, its other end hears that.
pub struct Answer<T>(Rc<RefCell<Slot<T>>>);

/// Where an answer comes out: `None` if there will be none.
pub struct Awaited<T>(Rc<RefCell<Slot<T>>>);

/// A way for one value.
pub fn answer<T>() -> (Answer<T>, Awaited<T>) {
    let slot = Rc::new(RefCell::new(Slot { value: None, is_closed: false, waker: None }));
    (Answer(Rc::clone(&slot)), Awaited(slot))
}

impl<T> Answer<T> {
    /// Puts the value in.
    pub fn send(self, value: T) {
        self.0.borrow_mut().value = Some(value);
    }

    /// Whether anybody waits for it.
    pub fn is_awaited(&self) -> bool {
        Rc::strong_count(&self.0) > 1
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.is_closed = true;
            slot.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }
}

impl<T> Future for Awaited<T> {
    type Output = Option<T>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.borrow_mut();
        if let Some(value) = slot.value.take() {
            return Poll::Ready(Some(value));
        }
        if slot.is_closed {
            return Poll::Ready(None);
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// One of two outcomes.
pub enum Either<A, B> {
    /// Of the first.
    One(A),
    /// Of the second.
    Other(B),
}

/// Whichever ends first; the first one if both have.
pub async fn either<A, B>(
    one: impl Future<Output = A>,
    other: impl Future<Output = B>,
) -> Either<A, B> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if let Poll::Ready(done) = one.as_mut().poll(context) {
            return Poll::Ready(Either::One(done));
        }
        other.as_mut().poll(context).map(Either::Other)
    })
    .await
}
