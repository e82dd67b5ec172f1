//! A network of streams that break as real ones do.
//!
//! A stream is ordered both ways. Each direction delivers what was sent, or a prefix of it and then
//! an end; the two ends notice a break independently, perhaps long after it. A direction of a link
//! can be cut: what is sent meanwhile arrives after the cut ends, if its stream still stands, or
//! not at all. Nothing inside a stream is lost, repeated or reordered: TCP and HTTP/2 do not do
//! that. What is on its way when its sender dies or lets go may still arrive, also after
//! the sender's next life has opened another stream.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::Poll;

use endio_state_machine::data_log::Logged;
use endio_state_machine::machine::{
    Call, Deletions, FromStore, FromWriteback, ReplyBody, ToStore, ToWriteback,
};
use endio_state_machine::machine::{MapView, Refusal};
use endio_state_machine::token::{ReadGrant, Token};
use endio_types::{Generation, Lblk, LblkRange, Pblk, Reason, VolumeId};

use crate::block::Block;
use crate::exec::{Exec, MS, Node, Signal};

/// What travels.
#[derive(Clone, Debug)]
pub enum Message {
    /// Writeback to conversion.
    FromWriteback(FromWriteback),
    /// Conversion to writeback.
    ToWriteback(ToWriteback),
    /// Store to conversion.
    FromStore(FromStore),
    /// Conversion to store.
    ToStore(ToStore),
    /// Writeback to store.
    Bio {
        /// Its token.
        token: Token,
        /// One item per block.
        data: Vec<Block>,
        /// One per block.
        crcs: Vec<u32>,
    },
    /// Store to writeback.
    BioDone(Token, Result<(), Reason>),
    /// Writeback to store.
    Read {
        /// Comes back.
        request: u64,
        /// Permission.
        grant: ReadGrant,
        /// First block.
        pblk: Pblk,
        /// Length.
        blocks: u64,
        /// One per block, or none.
        crcs: Vec<u32>,
    },
    /// Store to writeback.
    ReadDone(u64, Result<Vec<Block>, Reason>),
    /// A unary call, when it was sent, and the volume that it is meant for.
    Call(Call, Sent),
    /// Its answer.
    Reply(Result<ReplyBody, Refusal>),
    /// A unary call; tries of changes up to the number are over.
    Lookup(VolumeId, Generation, LblkRange, u64),
    /// Its answer.
    View(Result<MapView, Refusal>),
    /// A unary call: the data log of a volume from a block on.
    ReadLog(VolumeId, Generation, Lblk),
    /// Its answer; empty: there is no more.
    InLog(Result<Vec<(Lblk, Logged)>, Refusal>),
    /// Who owns a volume, and under which generation.
    Owner(String),
    /// Its answer, with the volume's number: `None`, there is no such volume.
    Owned(Option<(VolumeId, Option<String>, Generation)>),
    /// How often conversion was asked to delete something.
    Deletions,
    /// Its answer.
    Deleted(Deletions),
}

/// What an observer knows of a call, and conversion does not.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// When its caller last wanted it to be carried out, microseconds.
    pub at: u64,
    /// `None`: any that has the name.
    pub meant: Option<VolumeId>,
}

/// What a stream is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A session of a writeback with conversion.
    Writeback,
    /// A session of a store with conversion.
    Store,
    /// Bios of a writeback.
    Bios,
    /// Reads of a writeback.
    Reads,
    /// One call and its answer.
    Unary,
}

#[derive(Default)]
struct Direction {
    queue: VecDeque<(u64, Message)>,
    /// Nothing arrives before what was sent before it.
    last: u64,
    /// When the receiver learns that there is nothing more. `u64::MAX`: once the cut ends.
    ends: Option<u64>,
    /// Nothing that is sent from now on arrives.
    is_deaf: bool,
    arrived: Signal,
}

struct Stream {
    nodes: [Node; 2],
    directions: [RefCell<Direction>; 2],
}

/// One end of a stream. Dropping it ends the stream for the other end.
pub struct End {
    net: Net,
    stream: Rc<Stream>,
    side: usize,
}

type Accept = Rc<dyn Fn(Kind, Node, End)>;

struct Inner {
    exec: Exec,
    /// Who takes streams, by node and life.
    listeners: RefCell<BTreeMap<Node, (u64, Accept)>>,
    streams: RefCell<Vec<Weak<Stream>>>,
    cuts: RefCell<BTreeSet<(Node, Node)>>,
    delay_us: Cell<(u64, u64)>,
    /// How often a message takes much longer, in thousandths.
    slow: Cell<u64>,
    messages: Cell<u64>,
}

/// The network. Clones share it.
#[derive(Clone)]
pub struct Net(Rc<Inner>);

impl Net {
    /// A network without delay.
    pub fn new(exec: Exec) -> Self {
        Self(Rc::new(Inner {
            exec,
            listeners: RefCell::default(),
            streams: RefCell::default(),
            cuts: RefCell::default(),
            delay_us: Cell::new((10, 200)),
            slow: Cell::new(0),
            messages: Cell::new(0),
        }))
    }

    /// Messages take so long, and some of a thousand up to fifty times as long.
    pub fn set_delay(&self, from_us: u64, to_us: u64, slow: u64) {
        self.0.delay_us.set((from_us, to_us));
        self.0.slow.set(slow);
    }

    /// Nobody listens any more.
    pub fn clear(&self) {
        let listeners = std::mem::take(&mut *self.0.listeners.borrow_mut());
        drop(listeners);
    }

    /// Messages so far.
    pub fn messages(&self) -> u64 {
        self.0.messages.get()
    }

    /// The node takes streams from now on, in this life of it.
    pub fn listen(&self, node: Node, accept: impl Fn(Kind, Node, End) + 'static) {
        let life = self.0.exec.life(node);
        self.0.listeners.borrow_mut().insert(node, (life, Rc::new(accept)));
    }

    fn delay(&self) -> u64 {
        let (from, to) = self.0.delay_us.get();
        let delay = self.0.exec.between(from, to);
        if self.0.exec.chance(self.0.slow.get()) {
            delay * self.0.exec.between(2, 50)
        } else {
            delay
        }
    }

    fn is_cut(&self, from: Node, to: Node) -> bool {
        self.0.cuts.borrow().contains(&(from, to))
    }

    /// Opens a stream. `None`: nobody is there, or not in time.
    pub async fn connect(&self, from: Node, to: Node, kind: Kind, patience_us: u64) -> Option<End> {
        let exec = &self.0.exec;
        let begun = exec.now();
        exec.sleep(self.delay()).await;
        if self.is_cut(from, to) || self.is_cut(to, from) {
            exec.sleep_until(begun + patience_us).await;
            return None;
        }
        let accept = {
            let listeners = self.0.listeners.borrow();
            let (life, accept) = listeners.get(&to)?;
            exec.is_alive(to, *life).then(|| Rc::clone(accept))?
        };
        let stream = Rc::new(Stream { nodes: [from, to], directions: Default::default() });
        let mut streams = self.0.streams.borrow_mut();
        streams.retain(|known| known.strong_count() > 0);
        streams.push(Rc::downgrade(&stream));
        drop(streams);
        let theirs = End { net: self.clone(), stream: Rc::clone(&stream), side: 1 };
        accept(kind, from, theirs);
        Some(End { net: self.clone(), stream, side: 0 })
    }

    /// Cuts one direction of a link.
    pub fn cut(&self, from: Node, to: Node) {
        self.0.cuts.borrow_mut().insert((from, to));
    }

    /// Ends the cut: what waited arrives now.
    pub fn mend(&self, from: Node, to: Node) {
        if !self.0.cuts.borrow_mut().remove(&(from, to)) {
            return;
        }
        for stream in self.streams() {
            for side in 0..2 {
                if (stream.nodes[side], stream.nodes[1 - side]) != (from, to) {
                    continue;
                }
                let mut way = stream.directions[side].borrow_mut();
                let mut last = self.0.exec.now();
                for (at, _) in way.queue.iter_mut().filter(|(at, _)| *at == u64::MAX) {
                    last += self.delay();
                    *at = last;
                }
                way.last = way.last.max(last);
                if way.ends == Some(u64::MAX) {
                    way.ends = Some(last + self.delay());
                }
                way.arrived.notify();
            }
        }
    }

    /// Ends every cut.
    pub fn mend_all(&self) {
        let cuts: Vec<(Node, Node)> = self.0.cuts.borrow().iter().copied().collect();
        for (from, to) in cuts {
            self.mend(from, to);
        }
    }

    fn streams(&self) -> Vec<Rc<Stream>> {
        self.0.streams.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    /// Breaks a stream between two nodes, if there is one: each direction delivers a prefix.
    pub fn break_one(&self, one: Node, other: Node) {
        let between =
            |stream: &Rc<Stream>| stream.nodes == [one, other] || stream.nodes == [other, one];
        let all: Vec<_> = self.streams().into_iter().filter(between).collect();
        let picked = self.0.exec.below(all.len() as u64) as usize;
        if let Some(stream) = all.get(picked) {
            self.break_stream(stream, 20 * MS);
        }
    }

    fn break_stream(&self, stream: &Stream, notice_us: u64) {
        for way in &stream.directions {
            let mut way = way.borrow_mut();
            let kept = self.0.exec.below(way.queue.len() as u64 + 1) as usize;
            way.queue.truncate(kept);
            way.is_deaf = true;
            let last = way.queue.back().map_or(0, |(at, _)| *at);
            let notice = self.0.exec.below(notice_us);
            // Sometimes only a timeout of its own tells an end that the other one is gone.
            let notice = if self.0.exec.chance(200) { notice * 20 } else { notice };
            let at = (self.0.exec.now() + notice).max(last);
            way.ends = Some(way.ends.unwrap_or(at).min(at));
            way.arrived.notify();
        }
    }

    /// A node died: its streams end. `power`: nobody tells the other ends.
    pub fn node_died(&self, node: Node, power: bool) {
        self.0.listeners.borrow_mut().remove(&node);
        for stream in self.streams() {
            if stream.nodes.contains(&node) {
                self.break_stream(&stream, if power { 2000 * MS } else { 2 * MS });
            }
        }
    }
}

impl End {
    /// The node at the other end.
    pub fn peer(&self) -> Node {
        self.stream.nodes[1 - self.side]
    }

    /// Sends; whether it arrives, nobody says.
    pub fn send(&self, message: Message) {
        let inner = &self.net.0;
        inner.messages.set(inner.messages.get() + 1);
        let mut way = self.stream.directions[self.side].borrow_mut();
        if way.is_deaf {
            return;
        }
        let (from, to) = (self.stream.nodes[self.side], self.stream.nodes[1 - self.side]);
        let at = match self.net.is_cut(from, to) || way.last == u64::MAX {
            true => u64::MAX,
            false => (inner.exec.now() + self.net.delay()).max(way.last),
        };
        if at != u64::MAX {
            way.last = at;
        }
        way.queue.push_back((at, message));
        way.arrived.notify();
    }

    /// The next message; `None`: the stream has ended. Cancel-safe.
    pub async fn receive(&self) -> Option<Message> {
        let exec = &self.net.0.exec;
        poll_fn(|context| {
            let mut way = self.stream.directions[1 - self.side].borrow_mut();
            let next = way.queue.front().map(|(at, _)| *at);
            let due = match (next, way.ends) {
                (Some(at), _) if at <= exec.now() => {
                    return Poll::Ready(way.queue.pop_front().map(|(_, message)| message));
                }
                (Some(at), Some(ends)) if at == u64::MAX => Some(ends),
                (Some(at), _) => Some(at),
                (None, ends) => ends,
            };
            match due {
                Some(at) if at <= exec.now() => return Poll::Ready(None),
                Some(at) if at != u64::MAX => exec.wake_at(at, context.waker()),
                _ => {}
            }
            way.arrived.register(context.waker());
            Poll::Pending
        })
        .await
    }
}

impl End {
    /// Ends the stream for both ends; what was sent before still arrives. Idempotent.
    pub fn close(&self) {
        let mut way = self.stream.directions[self.side].borrow_mut();
        let (from, to) = (self.stream.nodes[self.side], self.stream.nodes[1 - self.side]);
        way.is_deaf = true;
        if way.ends.is_none() {
            let now = self.net.0.exec.now();
            let last = way.queue.back().map_or(now, |(at, _)| (*at).max(now));
            way.ends = Some(match self.net.is_cut(from, to) {
                true => u64::MAX,
                false => last.saturating_add(self.net.delay()),
            });
        }
        way.arrived.notify();
        // What comes the other way meets nobody.
        let mut back = self.stream.directions[1 - self.side].borrow_mut();
        back.queue.clear();
        back.is_deaf = true;
        back.ends = Some(0);
        back.arrived.notify();
    }

    /// Takes back what has not arrived yet, as the reset of an HTTP/2 stream mostly does.
    pub fn cancel(&self) {
        self.stream.directions[self.side].borrow_mut().queue.clear();
        self.close();
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
    }
}
