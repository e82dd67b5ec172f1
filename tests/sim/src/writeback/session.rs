//! The session with conversion, and unary calls beside it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use endio_state_machine::machine::{
    Attempt, BeginIo, Call, Completion, Deletions, FromWriteback, GrantedSegment, LogData, MapView,
    ReplyBody, ToWriteback,
};
use endio_state_machine::token::Token;
use endio_state_machine::writeback::attempts::Tries;
use endio_state_machine::writeback::confirms::Confirms;
use endio_types::{Generation, LblkRange, Reason, SegmentIndex, VolumeId};

use super::{ALONE, Failure, Outcome, Owed, Volume, Wb};
use crate::exec::{Awaited, Either, MS, WORLD, answer, either};
use crate::net::{Kind, Message, Sent};
use crate::world::Planted;

/// An io_end that has begun.
pub struct Granted {
    /// The session it belongs to.
    pub session: u64,
    /// The submitter's token.
    pub submitter: Token,
    /// The segments.
    pub segments: Vec<GrantedSegment>,
    /// How it ends; `None`: the session was lost.
    pub done: Awaited<Completion>,
}

impl Wb {
    /// Keeps a session for ever.
    pub(super) async fn keep_session(self) {
        let mut confirms = Confirms::default();
        loop {
            self.session(&mut confirms).await;
            self.engine.link_up.set(false);
            self.engine.outbox.borrow_mut().clear();
            // Every answer that is owed becomes "away".
            let owed = std::mem::take(&mut *self.engine.owed.borrow_mut());
            let io_ends = std::mem::take(&mut *self.engine.io_ends.borrow_mut());
            drop((owed, io_ends));
            self.engine.link_moved.notify();
            let pause = self.exec().between(1, self.world.plan.reconnect_ms) * MS;
            self.exec().sleep(pause).await;
        }
    }

    async fn session(&self, confirms: &mut Confirms) -> Option<()> {
        let (engine, exec) = (&self.engine, self.exec());
        let lease_us = u64::from(self.world.plan.limits.lease_ms) * MS;
        let begun = exec.now();
        let end = self.world.net.connect(self.node(), 1, Kind::Writeback, lease_us).await?;
        let hello = FromWriteback::Hello { writeback: engine.name.clone() };
        end.send(Message::FromWriteback(hello));
        let first = exec.until(exec.now() + lease_us, end.receive()).await??;
        let Message::ToWriteback(ToWriteback::Welcome { epoch, .. }) = first else { return None };
        exec.note("welcome", self.node(), &[epoch.0]);
        engine.link_number.set(engine.link_number.get() + 1);
        self.reset_credit();
        engine.link_up.set(true);
        engine.link_moved.notify();
        let mut lease_ends = begun + lease_us;
        let every = (self.world.plan.confirm_ms * MS).min(lease_us / 3);
        let mut renew_at = exec.now();
        let mut renewals: VecDeque<u64> = VecDeque::new();
        if !self.world.planted(Planted::ConfirmsKept) {
            *confirms = Confirms::default();
        }
        loop {
            if exec.now() >= lease_ends {
                return None;
            }
            if exec.now() >= renew_at {
                renewals.push_back(exec.now());
                renew_at = exec.now() + every;
                let confirm = |volume: &Rc<Volume>| {
                    (volume.id, volume.generation, volume.state.borrow().view.oldest_read())
                };
                let confirms = confirms.news(self.all().iter().map(confirm));
                engine.outbox.borrow_mut().push(FromWriteback::Renew { confirms });
            }
            for message in std::mem::take(&mut *engine.outbox.borrow_mut()) {
                end.send(Message::FromWriteback(message));
            }
            let more = || (!engine.outbox.borrow().is_empty()).then_some(());
            let next = either(end.receive(), engine.link_moved.wait(more));
            match exec.until(renew_at.min(lease_ends), next).await {
                Some(Either::One(message)) => match message? {
                    Message::ToWriteback(ToWriteback::Renewed { .. }) => {
                        if let Some(sent) = renewals.pop_front() {
                            lease_ends = sent + lease_us;
                        }
                    }
                    Message::ToWriteback(message) => self.received(message)?,
                    _ => return None,
                },
                Some(Either::Other(())) | None => {}
            }
        }
    }

    fn number(&self, owed: Owed) -> u64 {
        let request = self.engine.next_request.get() + 1;
        self.engine.next_request.set(request);
        self.engine.owed.borrow_mut().insert(request, owed);
        request
    }

    fn push(&self, message: FromWriteback) {
        self.engine.outbox.borrow_mut().push(message);
        self.engine.link_moved.notify();
    }

    fn reset_credit(&self) {
        for volume in self.all() {
            let mut state = volume.state.borrow_mut();
            if state.gone.is_some() {
                continue;
            }
            // Reads under an older epoch are refused from now on: the next look-up brings another.
            state.grant = None;
            // Whatever an older session had asked for has ended by now, one way or the other.
            state.map.reset();
            state.clean.forget(ALONE, LblkRange::new(0, u64::MAX));
            let ask = state.credit.reset();
            state.credit_reset = Some(ask.request);
            state.is_reset_refused = false;
            drop(state);
            let request = self.number(Owed::Reset(volume.id));
            self.push(FromWriteback::Reserve {
                request,
                volume: volume.id,
                generation: volume.generation,
                reset: true,
                add_blocks: ask.add_blocks,
                drop_blocks: 0,
            });
        }
    }

    fn received(&self, message: ToWriteback) -> Option<()> {
        let engine = &self.engine;
        match message {
            ToWriteback::Begun { request, submitter, segments, .. } => {
                let owed = engine.owed.borrow_mut().remove(&request);
                let Some(Owed::Begin(reply)) = owed else { return Some(()) };
                if !reply.is_awaited() {
                    self.release(engine.link_number.get(), submitter, true);
                    return Some(());
                }
                let (tell, done) = answer();
                engine.io_ends.borrow_mut().insert(submitter.io_end, tell);
                let session = engine.link_number.get();
                reply.send(Ok(Granted { session, submitter, segments, done }));
            }
            ToWriteback::Refused { request, refusal } => {
                let failure = Failure {
                    reason: refusal.reason,
                    retry_ms: refusal.retry_after_ms.into(),
                    doubt: None,
                };
                let owed = engine.owed.borrow_mut().remove(&request);
                match owed {
                    Some(Owed::Begin(reply)) => reply.send(Err(failure)),
                    Some(Owed::Reserve(reply)) => reply.send(Err(failure)),
                    Some(Owed::Log(reply)) => reply.send(Err(failure)),
                    Some(Owed::Reset(volume)) => self.space_reset(volume, Some(failure)),
                    None => {}
                }
            }
            ToWriteback::Completion(done) => {
                let failed = done.failed.map_or(0, |reason| reason as u64 + 1);
                self.exec().note("completion", self.node(), &[done.io_end.0, failed]);
                let waiting = engine.io_ends.borrow_mut().remove(&done.io_end);
                if let Some(waiting) = waiting {
                    waiting.send(done);
                }
            }
            ToWriteback::VolumeFenced { volume, generation } => {
                for open in self.all() {
                    if open.id == volume && open.generation < generation {
                        self.end(&open, Failure::new(Reason::OldGeneration));
                    }
                }
            }
            ToWriteback::Stores(stores) => self.update_stores(&stores),
            ToWriteback::Reserved { request, blocks } => {
                let owed = engine.owed.borrow_mut().remove(&request);
                match owed {
                    Some(Owed::Reserve(reply)) => reply.send(Ok(blocks)),
                    Some(Owed::Reset(volume)) => self.space_reset(volume, None),
                    _ => {}
                }
            }
            ToWriteback::Logged { request } => {
                let owed = engine.owed.borrow_mut().remove(&request);
                if let Some(Owed::Log(reply)) = owed {
                    reply.send(Ok(()));
                }
            }
            ToWriteback::SessionRefused(_) => return None,
            ToWriteback::Released { .. }
            | ToWriteback::Renewed { .. }
            | ToWriteback::Welcome { .. } => {}
        }
        Some(())
    }

    fn space_reset(&self, volume: VolumeId, refused: Option<Failure>) {
        let Some(volume) = self.all().into_iter().find(|open| open.id == volume) else { return };
        let mut state = volume.state.borrow_mut();
        let Some(request) = state.credit_reset.take() else { return };
        match refused {
            None => state.credit.granted(request),
            Some(failure) if failure.is_full() => state.credit.refused(request),
            Some(_) => state.credit.put_off(request),
        };
        drop(state);
        volume.changed.notify();
    }

    /// Waits until a session stands.
    pub(super) async fn up(&self) {
        let engine = &self.engine;
        engine.link_moved.wait(|| engine.link_up.get().then_some(())).await;
    }

    /// Begins a write.
    pub(super) async fn begin(&self, mut begin: BeginIo) -> Outcome<Granted> {
        if !self.engine.link_up.get() {
            return Err(Failure::away());
        }
        let (tell, told) = answer();
        begin.request = self.number(Owed::Begin(tell));
        self.push(FromWriteback::Begin(begin));
        told.await.unwrap_or_else(|| Err(Failure::away()))
    }

    /// Releases a submitter's token, under the session in which it was granted only.
    pub(super) fn release(&self, session: u64, token: Token, abort: bool) {
        if self.engine.link_up.get() && self.engine.link_number.get() == session {
            let not_submitted: Vec<SegmentIndex> = Vec::new();
            self.push(FromWriteback::Release { token, not_submitted, abort });
        }
    }

    /// Changes the space promised to a volume.
    pub(super) async fn reserve(
        &self,
        volume: &Volume,
        reset: bool,
        add_blocks: u64,
        drop_blocks: u64,
    ) -> Outcome<u64> {
        if !self.engine.link_up.get() {
            return Err(Failure::away());
        }
        let (tell, told) = answer();
        let request = self.number(Owed::Reserve(tell));
        let (volume, generation) = (volume.id, volume.generation);
        self.push(FromWriteback::Reserve {
            request,
            volume,
            generation,
            reset,
            add_blocks,
            drop_blocks,
        });
        told.await.unwrap_or_else(|| Err(Failure::away()))
    }

    /// Makes the data of a small flush durable at conversion, under the session in which it was
    /// picked only: after a restart conversion does not know what is older than a change of the map.
    /// After an error nothing is known of it.
    pub(super) async fn log(&self, session: u64, mut log: LogData) -> Outcome<()> {
        let is_same = session == self.engine.link_number.get();
        let may_be_late = self.world.planted(Planted::LogOfOlderSession);
        if !self.engine.link_up.get() || !(is_same || may_be_late) {
            return Err(Failure::away());
        }
        let (tell, told) = answer();
        log.request = self.number(Owed::Log(tell));
        self.push(FromWriteback::Log(log));
        told.await.unwrap_or_else(|| Err(Failure::away()))
    }

    /// One try of a unary call.
    async fn ask(&self, message: Message, until: u64) -> Option<Message> {
        let patience = self.world.plan.call_timeout_ms * MS;
        let until = until.min(self.exec().now() + patience);
        // An open that is delayed would be one of a client that has gone to another writeback since.
        let is_open = matches!(message, Message::Call(Call::OpenVolume { .. }, _));
        let may_hold = matches!(message, Message::Call(..)) && !is_open;
        if self.world.plan.late_creations && may_hold && self.world.rare.borrow_mut().chance(8) {
            self.hold(message);
            self.exec().sleep_until(until).await;
            return None;
        }
        let connect = self.world.net.connect(self.node(), 1, Kind::Unary, patience);
        let end = self.exec().until(until, connect).await??;
        end.send(message);
        let answer = self.exec().until(until, end.receive()).await;
        if answer.is_none() && !self.exec().chance(self.world.plan.late_calls) {
            end.cancel();
        }
        answer?
    }

    /// A call that the network holds for long: its caller has given it up when it arrives.
    fn hold(&self, message: Message) {
        let (world, node) = (Rc::clone(&self.world), self.node());
        let held_us = world.rare.borrow_mut().between(1, 2_000) * MS;
        self.exec().spawn(WORLD, async move {
            let patience = world.plan.call_timeout_ms * MS;
            // On its own connection, which ends with either process.
            if let Some(end) = world.net.connect(node, 1, Kind::Unary, patience).await {
                world.exec.sleep(held_us).await;
                end.send(message);
                // Nobody waits for the answer.
                world.exec.until(world.exec.now() + patience, end.receive()).await;
            }
        });
    }

    /// A unary call, tried again while conversion is away, starting or out of room; for this volume
    /// only, if one is meant.
    pub(super) async fn call(
        &self,
        call: Call,
        meant: Option<VolumeId>,
        deadline: u64,
    ) -> Outcome<ReplyBody> {
        let next = || {
            let sent = Sent { at: self.exec().now(), meant };
            (Message::Call(call.clone(), sent), ())
        };
        self.call_until(next, deadline, replied).await
    }

    /// How often conversion was asked to delete something.
    pub(super) async fn deletions(&self, deadline: u64) -> Outcome<Deletions> {
        if !self.world.plan.late_creations {
            // Without a message, so that the plans of older seeds go as they went.
            let process = self.world.conversion.process.borrow();
            let now = process.as_ref().map(|process| process.machine.deletions());
            return Ok(now.unwrap_or_default());
        }
        self.call_until(
            || (Message::Deletions, ()),
            deadline,
            |answer| match answer {
                Message::Deleted(deletions) => Ok(deletions),
                _ => Err(Failure::away()),
            },
        )
        .await
    }

    /// A change of a volume, tried again as [`Self::call`] does. Says which try conversion has to
    /// hear of as over before somebody else uses the blocks: see `attempts` of the state machine.
    pub(super) async fn change(
        &self,
        volume: &Rc<Volume>,
        make: impl Fn(Attempt) -> Call,
        deadline: u64,
    ) -> (Outcome<ReplyBody>, Option<u64>, Vec<u64>) {
        let tries = Cell::new(Tries::default());
        let numbers = RefCell::new(Vec::new());
        let next = || {
            let trying = Trying::begin(volume);
            let mut all = tries.get();
            all.began(trying.attempt);
            tries.set(all);
            numbers.borrow_mut().push(trying.attempt.number);
            let sent = Sent { at: self.exec().now(), meant: Some(volume.id) };
            (Message::Call(make(trying.attempt), sent), trying)
        };
        let outcome = self.call_until(next, deadline, replied).await;
        let left = tries.get().left(outcome.is_ok());
        (outcome, left, numbers.into_inner())
    }

    /// Waits until conversion has heard that a try is over, and those before it; `None`: the
    /// volume is not usable here any more.
    pub(super) async fn settle(&self, volume: &Rc<Volume>, number: u64) -> Option<MapView> {
        while volume.usable().is_ok() {
            let over = volume.state.borrow().attempts.over();
            if over >= number {
                let nothing = LblkRange::new(0, 0);
                match self.look_up_after(volume, nothing, over, self.deadline()).await {
                    Ok(found) => return Some(found),
                    Err(failure) => self.heed(volume, &failure),
                }
            }
            self.exec().sleep(self.world.plan.retry_max_ms * MS).await;
        }
        None
    }

    pub(super) async fn call_until<T, G>(
        &self,
        next: impl Fn() -> (Message, G),
        deadline: u64,
        take: impl Fn(Message) -> Outcome<T>,
    ) -> Outcome<T> {
        let exec = self.exec();
        let mut is_doubtful = false;
        loop {
            let (message, trying) = next();
            let answer = self.ask(message, deadline).await;
            drop(trying);
            let failure = match answer {
                Some(answer) => match take(answer) {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => failure,
                },
                None => {
                    is_doubtful = true;
                    Failure::away()
                }
            };
            let failure =
                Failure { doubt: is_doubtful.then_some(u64::MAX).or(failure.doubt), ..failure };
            let passes = matches!(
                failure.reason,
                Reason::PeerAway | Reason::NotReady | Reason::Limit | Reason::Draining
            );
            let pause = exec.between(1, self.world.plan.retry_max_ms) * MS;
            if !passes || exec.now() + pause >= deadline {
                return Err(failure);
            }
            exec.sleep(pause).await;
        }
    }

    /// The map of a range now.
    pub(super) async fn look_up(
        &self,
        volume: &Volume,
        range: LblkRange,
        deadline: u64,
    ) -> Outcome<MapView> {
        self.look_up_after(volume, range, 0, deadline).await
    }

    async fn look_up_after(
        &self,
        volume: &Volume,
        range: LblkRange,
        over: u64,
        deadline: u64,
    ) -> Outcome<MapView> {
        let next = || (Message::Lookup(volume.id, volume.generation, range, over), ());
        let view = self.call_until(next, deadline, |answer| match answer {
            Message::View(Ok(view)) => Ok(view),
            Message::View(Err(refusal)) => Err(Failure::new(refusal.reason)),
            _ => Err(Failure::away()),
        });
        let view = view.await.map_err(|failure| Failure { doubt: None, ..failure })?;
        let mut state = volume.state.borrow_mut();
        state.view.saw_size(view.map_version, view.size_bytes);
        Ok(view)
    }

    /// Number of a volume, who owns it, and under which generation.
    pub(super) async fn owner(
        &self,
        name: &str,
        deadline: u64,
    ) -> Outcome<(VolumeId, Option<String>, Generation)> {
        let next = || (Message::Owner(name.to_owned()), ());
        self.call_until(next, deadline, |answer| match answer {
            Message::Owned(Some(owner)) => Ok(owner),
            Message::Owned(None) => Err(Failure::new(Reason::UnknownVolume)),
            _ => Err(Failure::away()),
        })
        .await
    }
}

fn replied(answer: Message) -> Outcome<ReplyBody> {
    match answer {
        Message::Reply(Ok(body)) => Ok(body),
        Message::Reply(Err(refusal)) => Err(Failure::new(refusal.reason)),
        _ => Err(Failure::away()),
    }
}

/// A try of a change; dropping it ends it.
struct Trying {
    volume: Rc<Volume>,
    attempt: Attempt,
}

impl Trying {
    fn begin(volume: &Rc<Volume>) -> Self {
        let attempt = {
            let mut state = volume.state.borrow_mut();
            let logged = state.dirty.log_number();
            state.attempts.begin(logged)
        };
        Self { volume: Rc::clone(volume), attempt }
    }
}

impl Drop for Trying {
    fn drop(&mut self) {
        self.volume.state.borrow_mut().attempts.end(self.attempt.number);
    }
}
