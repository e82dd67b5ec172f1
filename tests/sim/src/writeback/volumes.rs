//! The life of the process and of its volumes: start, replay, open, resize, close, delete.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use endio_state_machine::machine::{Call, Deletions, ReplyBody, VolumeInfo};
use endio_state_machine::token::ReadGrant;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::sessions::SessionTable;
use endio_state_machine::writeback::throttle::Throttle;
use endio_store::cache_log::{CacheLog, OpenVolume, Replay, ReplayedWrite};
use endio_types::{BLOCK_BYTES, Generation, LblkRange, Reason, VolumeId};

use super::data_log::{InLog, newer_in_log};
use super::{Engine, Failure, MapChanging, Outcome, Volume, Wb, opened};
use crate::block::CELL_BYTES;
use crate::exec::{MS, Signal};
use crate::world::{Planted, World};

/// Starts the process: what an earlier one left is replayed before anything is served.
pub fn start(world: &Rc<World>, at: usize) {
    let writeback = &world.writebacks[at];
    let node = writeback.node;
    world.exec.start(node);
    let (log, replay) = match CacheLog::open_simulated(&writeback.disk, world.plan.log) {
        Ok(opened) => opened,
        Err(error) => return world.exec.fail(format!("log-reads-back: {error}")),
    };
    writeback.start.set(writeback.start.get() + 1);
    let engine = Rc::new(Engine {
        name: format!("wb-{at}/{}", writeback.start.get()),
        log,
        log_wanted: Cell::new(Lsn(0)),
        log_moved: Signal::default(),
        table: RefCell::default(),
        losses: RefCell::default(),
        sessions: RefCell::new(SessionTable::new(world.plan.sessions)),
        log_full_since: Cell::default(),
        session_ended: Signal::default(),
        throttle: RefCell::new(Throttle::new(world.plan.throttle)),
        room: Signal::default(),
        link_number: Cell::new(0),
        link_up: Cell::new(false),
        link_moved: Signal::default(),
        outbox: RefCell::default(),
        owed: RefCell::default(),
        io_ends: RefCell::default(),
        next_request: Cell::new(0),
        clients: RefCell::default(),
        is_serving: Cell::new(false),
        opening: RefCell::default(),
        opened: Signal::default(),
    });
    *writeback.engine.borrow_mut() = Some(Rc::clone(&engine));
    let wb = Wb { world: Rc::clone(world), at, engine };
    world.exec.note("writeback up", node, &[writeback.start.get()]);
    wb.spawn(wb.clone().keep_session());
    wb.spawn(wb.clone().keep_log_durable());
    wb.spawn(wb.clone().recover(replay));
}

impl Wb {
    async fn recover(self, mut replay: Replay) {
        self.up().await;
        let now = self.exec().clock(self.node());
        self.engine.sessions.borrow_mut().restore(replay.sessions().clone(), now);
        let mut writes: BTreeMap<VolumeId, Vec<ReplayedWrite>> = BTreeMap::new();
        loop {
            match replay.next_write() {
                Ok(Some(write)) => writes.entry(write.write.volume).or_default().push(write),
                Ok(None) => break,
                Err(error) => return self.exec().fail(format!("log-reads-back: {error}")),
            }
        }
        for volume in replay.losses() {
            self.owe_loss(volume);
        }
        for open in replay.open_volumes() {
            let data = writes.remove(&open.volume).unwrap_or_default();
            if data.is_empty() && !replay.may_have_lost(open.volume) {
                // What was let go with it was converted after all.
                self.world.let_go.borrow_mut().remove(&(self.at, open.volume));
                self.note_closed(open.volume);
                continue;
            }
            self.replay_volume(open, data).await;
        }
        let wb = self.clone();
        self.spawn(wb.keep_log_small());
        self.engine.is_serving.set(true);
        self.exec().note("serving", self.node(), &[]);
    }

    /// Stops in order: nobody is served any more, everything is written out, and the log is closed. False: not
    /// all of it could be, or a volume went to somebody else meanwhile. The process is to end then.
    pub async fn stop(self, until: u64) -> bool {
        self.engine.is_serving.set(false);
        let open = self.all();
        loop {
            self.want_everything_out();
            let is_still = |volume: &Rc<Volume>| {
                volume.state.borrow().dirty.is_clean() && volume.locks.lock.borrow().is_empty()
            };
            if self.all().iter().all(is_still) || self.world.planted(Planted::StoppedDirty) {
                break;
            }
            if self.exec().now() >= until {
                return false;
            }
            self.exec().sleep(5 * MS).await;
        }
        if let Err(error) = self.engine.log.close_clean() {
            self.log_failed(&error);
            return false;
        }
        self.exec().note("stopped", self.node(), &[]);
        open.iter().all(|volume| volume.usable().is_ok())
    }

    fn note_closed(&self, volume: VolumeId) {
        if let Err(error) = self.engine.log.append_volume_closed(volume) {
            self.log_failed(&error);
        }
    }

    async fn replay_volume(&self, open: &OpenVolume, data: Vec<ReplayedWrite>) {
        let id = open.volume;
        let opened = loop {
            let opened = match self.open_again(open).await {
                Ok((info, grant)) if info.id == id => {
                    let logged = self.read_log(&info).await;
                    logged.map(|logged| (info, grant, logged))
                }
                Ok((info, grant)) => Ok((info, grant, InLog::new())),
                Err(failure) => Err(failure),
            };
            match opened {
                Err(failure) if passes(&failure) => {
                    self.exec().sleep(self.world.plan.retry_max_ms * MS).await;
                }
                opened => break opened,
            }
        };
        if let Ok((info, ..)) = &opened
            && info.id != id
        {
            self.give_back(info).await;
        } else if let Ok((info, grant, logged)) = opened {
            let volume = Rc::new(Volume::new(&self.world, &info, grant));
            let newer = newer_in_log(&data, &logged);
            self.put_back(&volume, &data, logged);
            if self.adopt(volume).await.is_ok() {
                self.holds_none(id, &newer);
                return;
            }
        }
        if !data.is_empty() {
            self.world.let_go.borrow_mut().insert((self.at, id));
            self.owe_loss(id);
        }
        self.note_loss(id);
        self.note_closed(id);
    }

    /// Closes at conversion what was opened and is not served here.
    async fn give_back(&self, info: &VolumeInfo) {
        let call = close(info.name.clone(), info.id, info.generation);
        _ = self.call(call, Some(info.id), self.deadline()).await;
    }

    /// Opens a volume if nobody else has opened it since it was open here.
    async fn open_again(&self, open: &OpenVolume) -> Outcome<(VolumeInfo, ReadGrant)> {
        let deadline = self.deadline();
        loop {
            let (id, owner, generation) = self.owner(&open.name, deadline).await?;
            if id != open.volume {
                return Err(Failure::new(Reason::UnknownVolume));
            }
            let is_ours = owner.as_ref().is_some_and(|owner| self.is_earlier_start(owner));
            let is_stale = !is_ours && generation != open.generation;
            if is_stale && !self.world.planted(Planted::StaleReplay) {
                return Err(Failure::new(Reason::OldGeneration));
            }
            let seen = (id, generation);
            match self.open_at_conversion(&open.name, (is_ours, seen), deadline).await {
                Err(failure) if self.is_overtaken(&failure, deadline) => {
                    self.exec().sleep(MS).await;
                }
                // The volume as it is now decides, and not an answer to what was asked before.
                Err(failure) if failure.reason == Reason::OldGeneration => {
                    return Err(Failure::new(Reason::TimedOut));
                }
                opened => return opened,
            }
        }
    }

    /// Somebody opened the volume meanwhile, or a try of the call whose answer was lost did.
    fn is_overtaken(&self, failure: &Failure, deadline: u64) -> bool {
        failure.reason == Reason::OldGeneration && self.exec().now() < deadline
    }

    fn is_earlier_start(&self, owner: &str) -> bool {
        let start = self.world.writebacks[self.at].start.get();
        let ours = owner.strip_prefix(&format!("wb-{}/", self.at));
        ours.is_some_and(|ours| ours.parse::<u64>().is_ok_and(|ours| ours <= start))
    }

    /// What the cache log has of a volume that was let go does not come back: durable before conversion
    /// hears that the volume is open here.
    async fn close_in_log(&self, name: &str) -> Outcome<()> {
        let (volume, _, _) = self.owner(name, self.deadline()).await?;
        self.note_loss(volume);
        if self.engine.log.holds(volume, LblkRange::new(0, u64::MAX)) {
            self.note_closed(volume);
        }
        self.log_durable(self.engine.log.last_lsn()).await
    }

    /// The volume, whoever opened it last.
    async fn open_as_it_is(&self, name: &str, force: bool) -> Outcome<(VolumeInfo, ReadGrant)> {
        let deadline = self.deadline();
        loop {
            let (id, owner, generation) = self.owner(name, deadline).await?;
            let is_ours = owner.is_some_and(|owner| self.is_earlier_start(&owner));
            let seen = (id, generation);
            match self.open_at_conversion(name, (force || is_ours, seen), deadline).await {
                Err(failure) if self.is_overtaken(&failure, deadline) => {
                    self.exec().sleep(MS).await;
                }
                opened => return opened,
            }
        }
    }

    async fn open_at_conversion(
        &self,
        name: &str,
        (force, (id, seen)): (bool, (VolumeId, Generation)),
        deadline: u64,
    ) -> Outcome<(VolumeInfo, ReadGrant)> {
        let call = Call::OpenVolume {
            name: name.to_owned(),
            volume: Some(id),
            writeback: self.engine.name.clone(),
            force,
            if_generation: (!self.world.planted(Planted::OpenUnconditional)).then_some(seen),
            reads_log: true,
        };
        let body = self.call(call, Some(id), deadline).await?;
        opened(body).ok_or(Failure::new(Reason::Malformed))
    }

    async fn adopt(&self, volume: Rc<Volume>) -> Outcome<()> {
        let engine = &self.engine;
        let noted = engine.log.append_volume_open(volume.id, &volume.name, volume.generation);
        let noted = noted.map_err(|error| self.log_failed(&error))?;
        self.log_durable(noted).await?;
        self.tell_loss(&volume);
        engine.table.borrow_mut().insert(volume.name.clone(), Rc::clone(&volume));
        self.exec().note("volume open", self.node(), &[volume.id.0, volume.generation.0]);
        let wb = self.clone();
        self.spawn(wb.flush_for_ever(Rc::clone(&volume)));
        if self.world.plan.rewrite_ms > 0 && !volume.in_place {
            let wb = self.clone();
            self.spawn(wb.rewrite_for_ever(Rc::clone(&volume)));
        }
        let ask = volume.state.borrow_mut().credit.reset();
        let wb = self.clone();
        self.spawn(async move {
            match wb.reserve(&volume, true, ask.add_blocks, 0).await {
                Ok(_) => _ = volume.state.borrow_mut().credit.granted(ask.request),
                Err(failure) if failure.reason == Reason::PeerAway => {}
                Err(failure) => {
                    wb.heed(&volume, &failure);
                    let credit = &mut volume.state.borrow_mut().credit;
                    match failure.is_full() {
                        true => credit.refused(ask.request),
                        false => credit.put_off(ask.request),
                    };
                }
            }
            volume.changed.notify();
        });
        Ok(())
    }

    /// The volume of that name, opened here if need be; `force` takes it from another writeback.
    pub async fn open(&self, name: &str, force: bool) -> Outcome<Rc<Volume>> {
        let engine = &self.engine;
        // A caller that goes away does not leave a volume half open.
        let (tell, told) = crate::exec::answer();
        let (wb, name) = (self.clone(), name.to_owned());
        self.spawn(async move {
            let turn = || wb.engine.opening.borrow_mut().insert(name.clone()).then_some(());
            wb.engine.opened.wait(turn).await;
            let opened = match wb.has_open(&name, force).await {
                Ok(Some(volume)) => Ok(volume),
                Ok(None) => wb.open_now(&name, force).await,
                Err(failure) => Err(failure),
            };
            wb.engine.opening.borrow_mut().remove(&name);
            wb.engine.opened.notify();
            tell.send(opened);
        });
        let opened = told.await.unwrap_or(Err(Failure::away()));
        engine.opened.notify();
        opened
    }

    /// The volume, if it is open here; if it is forced, only if nobody has opened it since.
    async fn has_open(&self, name: &str, force: bool) -> Outcome<Option<Rc<Volume>>> {
        let Some(volume) = self.find(name) else { return Ok(None) };
        if force {
            let (id, _, generation) = self.owner(name, self.deadline()).await?;
            if (id, generation) != (volume.id, volume.generation) {
                self.heed(&volume, &Failure::new(Reason::OldGeneration));
                return Ok(None);
            }
        }
        Ok(Some(volume))
    }

    async fn open_now(&self, name: &str, force: bool) -> Outcome<Rc<Volume>> {
        self.close_in_log(name).await?;
        let (info, grant) = self.open_as_it_is(name, force).await?;
        let logged = match self.read_log(&info).await {
            Ok(logged) => logged,
            Err(failure) => {
                self.give_back(&info).await;
                return Err(failure);
            }
        };
        let volume = Rc::new(Volume::new(&self.world, &info, grant));
        // Data of an earlier generation that was let go must not come back at a replay.
        if self.engine.log.holds(volume.id, LblkRange::new(0, u64::MAX)) {
            self.note_closed(volume.id);
        }
        self.put_back(&volume, &[], logged);
        self.adopt(Rc::clone(&volume)).await?;
        Ok(volume)
    }

    /// A volume that was let go is noted as closed, unless it is open here again by now.
    pub(super) async fn forget_closed(&self, volume: &Volume) {
        let name = volume.name.clone();
        let turn = || self.engine.opening.borrow_mut().insert(name.clone()).then_some(());
        self.engine.opened.wait(turn).await;
        if self.find(&name).is_none() {
            self.note_loss(volume.id);
            self.note_closed(volume.id);
        }
        self.engine.opening.borrow_mut().remove(&name);
        self.engine.opened.notify();
    }

    /// Creates a volume: the call is given once it is known what was deleted before.
    pub async fn create(&self, call: impl Fn(Deletions) -> Call) -> Outcome<()> {
        let deadline = self.deadline();
        loop {
            let call = call(self.deletions(deadline).await?);
            match self.call(call, None, deadline).await {
                // Something was deleted meanwhile. The caller waits, so it still wants the volume.
                Err(failure)
                    if failure.reason == Reason::WrongState && self.exec().now() < deadline =>
                {
                    self.exec().sleep(MS).await;
                }
                created => return created.map(drop),
            }
        }
    }

    async fn alone(&self, volume: &Rc<Volume>, first: u64, deadline: u64) -> Outcome<super::Held> {
        let held = volume.locks.acquire(LblkRange::new(first, u64::MAX - first));
        if self.exec().until(deadline, held.held()).await.is_none() {
            return Err(Failure::new(Reason::TimedOut));
        }
        volume.usable()?;
        Ok(held)
    }

    /// Sets the size. What lies beyond a smaller one is gone.
    pub async fn resize(&self, volume: &Rc<Volume>, size_bytes: u64) -> Outcome<()> {
        let deadline = self.deadline();
        let first = size_bytes / BLOCK_BYTES;
        let held = self.alone(volume, first, deadline).await?;
        let beyond = LblkRange::new(first, u64::MAX - first);
        self.forget(volume, beyond, deadline).await?;
        let tail = size_bytes % BLOCK_BYTES;
        if volume.growable && tail > 0 {
            // A direct write that was given up may have extended it, and nobody here heard.
            if self.exec().until(deadline, self.up()).await.is_none() {
                return Err(Failure::away());
            }
            self.look_up(volume, LblkRange::new(first, 1), deadline).await?;
        }
        let (old, durable) = {
            let state = volume.state.borrow();
            (state.view.size_bytes(), state.view.durable_size_bytes())
        };
        let is_cut = match self.world.planted(Planted::TailKept) {
            true => size_bytes < old,
            false => size_bytes < old || (volume.in_place && first * BLOCK_BYTES < durable),
        };
        if is_cut && tail > 0 {
            let len = match self.world.planted(Planted::TailKept) {
                true => (BLOCK_BYTES - tail).min(old - size_bytes),
                false => BLOCK_BYTES - tail,
            };
            let (first, cells) = (size_bytes / CELL_BYTES, len / CELL_BYTES);
            let zeroes = vec![0; cells as usize];
            let whole = self.merge(volume, first, &zeroes, deadline).await?;
            let block = LblkRange::new(size_bytes / BLOCK_BYTES, 1);
            self.write_through(volume, block, whole, 0, deadline).await?;
        }
        let make = |attempt| Call::ResizeVolume {
            name: volume.name.clone(),
            volume: Some(volume.id),
            size_bytes,
            generation: volume.generation,
            attempt,
        };
        let changing = MapChanging::begin(self, volume, vec![LblkRange::new(0, u64::MAX)]);
        let (outcome, left, tries) = self.change(volume, make, deadline).await;
        if let Ok(ReplyBody::Volume(info)) = &outcome {
            volume.state.borrow_mut().view.resized(info.map_version, info.size_bytes);
        }
        if let Err(failure) = &outcome {
            self.heed(volume, failure);
        }
        match left {
            None => {
                self.world.tries_ended(volume.id, volume.generation, &tries);
                changing.ended(Vec::new());
            }
            Some(number) => {
                let (wb, volume) = (self.clone(), Rc::clone(volume));
                self.spawn(async move {
                    if !wb.world.planted(Planted::SizeGuessed) {
                        wb.learn_size(&volume, size_bytes, number, changing).await;
                        wb.world.tries_ended(volume.id, volume.generation, &tries);
                    }
                    wb.check_size(&volume);
                    drop(held);
                });
            }
        }
        outcome.map(drop)
    }

    /// A try of a resize was given up that may have been carried out all the same: the size is asked
    /// for until it is known, and that no try is carried out any more.
    async fn learn_size(&self, volume: &Rc<Volume>, asked: u64, tried: u64, changing: MapChanging) {
        let Some(found) = self.settle(volume, tried).await else { return };
        changing.ended(Vec::new());
        if found.size_bytes == asked {
            volume.state.borrow_mut().view.resized(found.map_version, asked);
        }
    }

    /// Whoever writes next goes by the size that is known here.
    fn check_size(&self, volume: &Volume) {
        let process = self.world.conversion.process.borrow();
        let there = process.as_ref().and_then(|process| process.machine.volume(&volume.name));
        let is_same = |v: &VolumeInfo| (v.id, v.generation) == (volume.id, volume.generation);
        let Some(there) = there.filter(is_same) else { return };
        let here = volume.state.borrow().view.size_bytes();
        if volume.usable().is_ok() && !volume.growable && here != there.size_bytes {
            let why = format!("{} has {} bytes, not {here}", volume.name, there.size_bytes);
            self.exec().fail(format!("size_is_known: {why}"));
        }
    }

    /// Writes everything out and gives the volume up.
    pub async fn close(&self, volume: &Rc<Volume>) -> Outcome<()> {
        let deadline = self.deadline();
        let _held = self.alone(volume, 0, deadline).await?;
        self.forget(volume, LblkRange::new(0, u64::MAX), deadline).await?;
        let call = close(volume.name.clone(), volume.id, volume.generation);
        let closed = self.call(call, Some(volume.id), deadline).await;
        // Whatever came of it: it may have been carried out, or may yet be, and then what is
        // acknowledged here would be lost. Nothing is dirty, and the next request opens it again.
        self.end(volume, Failure::new(Reason::WrongState));
        match closed {
            Err(failure) if failure.reason != Reason::WrongState => Err(failure),
            _ => Ok(()),
        }
    }

    /// Deletes a volume and drops what is cached of it.
    pub async fn delete(&self, volume: &Rc<Volume>) -> Outcome<()> {
        let deadline = self.deadline();
        let held = self.alone(volume, 0, deadline).await?;
        let make = |attempt| Call::DeleteVolume {
            name: volume.name.clone(),
            volume: Some(volume.id),
            generation: volume.generation,
            attempt,
        };
        let (deleted, left, tries) = self.change(volume, make, deadline).await;
        match deleted {
            Ok(_) => {}
            Err(failure) if failure.reason == Reason::UnknownVolume => {}
            Err(failure) => {
                self.heed(volume, &failure);
                if let Some(number) = left {
                    let (wb, volume) = (self.clone(), Rc::clone(volume));
                    self.spawn(async move {
                        // What is acknowledged from now on must not go with a late deletion.
                        wb.settle(&volume, number).await;
                        wb.world.tries_ended(volume.id, volume.generation, &tries);
                        drop(held);
                    });
                }
                return Err(failure);
            }
        }
        let all = LblkRange::new(0, u64::MAX);
        let discarded = volume.state.borrow_mut().dirty.discard(all);
        self.undirtied(volume.id, discarded.credit_freed_blocks);
        self.end(volume, Failure::new(Reason::UnknownVolume));
        Ok(())
    }
}

fn close(name: String, volume: VolumeId, generation: Generation) -> Call {
    Call::CloseVolume { name, volume: Some(volume), generation }
}

fn passes(failure: &Failure) -> bool {
    matches!(
        failure.reason,
        Reason::PeerAway
            | Reason::NotReady
            | Reason::Draining
            | Reason::Limit
            | Reason::TimedOut
            | Reason::MetadataFull
    )
}
