//! Streams to the stores: opened when there is something to ask, and again after a break.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use endio_state_machine::machine::StoreInfo;
use endio_types::{Incarnation, Reason, StoreId};

use super::{Failure, Outcome, Wb};
use crate::block::Block;
use crate::exec::{Answer, Awaited, Either, MS, Signal, WORLD, answer, either};
use crate::net::{Kind, Message};

type Key = (u64, u64);
/// How a bio or a read ended; a bio brings no blocks.
pub(super) type Done = Result<Vec<Block>, Reason>;

struct Job {
    key: Key,
    message: Message,
    reply: Answer<Done>,
}

#[derive(Default)]
struct Exchange {
    jobs: RefCell<VecDeque<Job>>,
    moved: Signal,
    is_closed: Cell<bool>,
}

/// One store in one incarnation.
pub(super) struct Client {
    node: usize,
    incarnation: Incarnation,
    writes: Rc<Exchange>,
    reads: Rc<Exchange>,
}

impl Drop for Client {
    fn drop(&mut self) {
        for exchange in [&self.writes, &self.reads] {
            exchange.is_closed.set(true);
            exchange.moved.notify();
        }
    }
}

impl Wb {
    /// Takes over conversion's list.
    pub(super) fn update_stores(&self, list: &[StoreInfo]) {
        let mut clients = self.engine.clients.borrow_mut();
        clients.retain(|id, _| list.iter().any(|store| store.id == *id));
        for store in list {
            let node = usize::from(store.uuid[0]);
            let same = clients.get(&store.id).is_some_and(|client| {
                client.node == node && client.incarnation == store.incarnation
            });
            if same {
                continue;
            }
            let (writes, reads) = (Rc::<Exchange>::default(), Rc::<Exchange>::default());
            for (kind, exchange) in [(Kind::Bios, &writes), (Kind::Reads, &reads)] {
                let (wb, exchange) = (self.clone(), Rc::clone(exchange));
                self.spawn(async move { wb.exchange(node, kind, exchange).await });
            }
            let client = Client { node, incarnation: store.incarnation, writes, reads };
            clients.insert(store.id, Rc::new(client));
        }
    }

    /// Hands a bio or a read over to its store's stream.
    pub(super) fn hand_over(&self, store: StoreId, message: Message) -> Outcome<Awaited<Done>> {
        let client = self.engine.clients.borrow().get(&store).cloned();
        let client = client.ok_or_else(Failure::away)?;
        let (exchange, key) = match &message {
            Message::Bio { token, .. } => {
                (&client.writes, (token.io_end.0, u64::from(token.segment.0)))
            }
            Message::Read { request, .. } => (&client.reads, (0, *request)),
            _ => return Err(Failure::away()),
        };
        let (reply, done) = answer();
        exchange.jobs.borrow_mut().push_back(Job { key, message, reply });
        exchange.moved.notify();
        Ok(done)
    }

    /// The network may keep a copy of a bio or a read and deliver it later, to whoever is there by
    /// then.
    fn may_repeat(&self, node: usize, kind: Kind, message: &Message) {
        let late = self.world.plan.late_bios;
        if late == 0 || self.world.rare.borrow_mut().below(1000) >= late {
            return;
        }
        let lease_us = u64::from(self.world.plan.limits.lease_ms) * MS;
        let pause = {
            let mut rare = self.world.rare.borrow_mut();
            let most = rare.between(1, 4) * lease_us;
            rare.below(most)
        };
        let (world, message, from) = (Rc::clone(&self.world), message.clone(), self.node());
        self.exec().spawn(WORLD, async move {
            world.exec.sleep(pause).await;
            let patience = world.plan.call_timeout_ms * MS;
            let end = world.net.connect(from, node, kind, patience).await;
            let Some(end) = end else { return };
            end.send(message);
            let until = world.exec.now() + patience;
            world.exec.until(until, end.receive()).await;
        });
    }

    /// Opens the stream whenever there is something to ask.
    async fn exchange(&self, node: usize, kind: Kind, exchange: Rc<Exchange>) {
        loop {
            let look = || match exchange.jobs.borrow_mut().pop_front() {
                Some(job) => Some(Some(job)),
                None => exchange.is_closed.get().then_some(None),
            };
            let Some(first) = exchange.moved.wait(look).await else { return };
            let patience = self.world.plan.call_timeout_ms * MS;
            let end = self.world.net.connect(self.node(), node, kind, patience).await;
            // Whoever asked hears that the store is away, by the drop.
            let Some(end) = end else { continue };
            let mut owed: BTreeMap<Key, Answer<Done>> = BTreeMap::new();
            self.may_repeat(node, kind, &first.message);
            end.send(first.message);
            owed.insert(first.key, first.reply);
            loop {
                let look = || match exchange.jobs.borrow_mut().pop_front() {
                    Some(job) => Some(Some(job)),
                    None => exchange.is_closed.get().then_some(None),
                };
                match either(end.receive(), exchange.moved.wait(look)).await {
                    Either::One(None) => break,
                    Either::One(Some(Message::BioDone(token, outcome))) => {
                        let key = (token.io_end.0, u64::from(token.segment.0));
                        if let Some(reply) = owed.remove(&key) {
                            reply.send(outcome.map(|()| Vec::new()));
                        }
                    }
                    Either::One(Some(Message::ReadDone(request, outcome))) => {
                        if let Some(reply) = owed.remove(&(0, request)) {
                            reply.send(outcome);
                        }
                    }
                    Either::One(Some(_)) => {}
                    Either::Other(Some(job)) => {
                        self.may_repeat(node, kind, &job.message);
                        end.send(job.message);
                        owed.insert(job.key, job.reply);
                    }
                    Either::Other(None) => {
                        // The last answers still count, and nothing new can come.
                        while !owed.is_empty() {
                            match end.receive().await {
                                Some(Message::BioDone(token, outcome)) => {
                                    let key = (token.io_end.0, u64::from(token.segment.0));
                                    if let Some(reply) = owed.remove(&key) {
                                        reply.send(outcome.map(|()| Vec::new()));
                                    }
                                }
                                Some(Message::ReadDone(request, outcome)) => {
                                    if let Some(reply) = owed.remove(&(0, request)) {
                                        reply.send(outcome);
                                    }
                                }
                                Some(_) => {}
                                None => return,
                            }
                        }
                        return;
                    }
                }
            }
        }
    }
}
