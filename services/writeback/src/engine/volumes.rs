//! Volumes: open on first use, resize, delete, give up.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use endio_api::conversion::{
    CloseVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, Deletions, DescribeRequest,
    ListVolumesRequest, ListVolumesResponse, OpenVolumeRequest, Reserve, ResizeVolumeRequest,
    Volume as Described, VolumeRequest,
};
use endio_api::writeback::RetryKey;
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange, MapVersion, Reason};
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::conversion::Client;
use crate::dedupe::Retry;
use crate::failure::Failure;
use crate::locks::Held;
use crate::volume::{MapChanging, Opened, State, Volume};

impl Engine {
    /// The volume of that name, opened here if nobody has it open.
    ///
    /// # Errors
    /// `UNKNOWN_VOLUME`; `VOLUME_BUSY` where another writeback has it; `LIMIT`.
    pub async fn volume(self: &Arc<Self>, name: &str) -> Result<Arc<Volume>, Failure> {
        match self.table.find(name) {
            Some(volume) => Ok(volume),
            None => self.open(name, false).await,
        }
    }

    /// The volume that a request with a retry key asks for, which may be refused here, before its
    /// key is looked at: that it came is noted first, so that those that were sent after it, and
    /// may be tried again before it, are not taken for a session of which state is missing.
    ///
    /// # Errors
    /// As [`Engine::volume`]; `MALFORMED`: the key.
    pub async fn volume_for(
        self: &Arc<Self>,
        name: &str,
        key: Option<&RetryKey>,
    ) -> Result<Arc<Volume>, Failure> {
        if let Some(begun) = self.dedupe.meet(Retry::from_wire(key)?)
            && let Err(error) = self.log.append_session(begun)
        {
            tracing::warn!(%error, "the beginning of a session could not be kept");
        }
        self.volume(name).await
    }

    /// Opens a volume here; `force` takes it from another writeback. Idempotent.
    ///
    /// # Errors
    /// As [`Engine::volume`].
    pub async fn open(self: &Arc<Self>, name: &str, force: bool) -> Result<Arc<Volume>, Failure> {
        check_name(name)?;
        let engine = Arc::clone(self);
        let name = name.to_owned();
        // A caller that goes away does not leave a volume half open.
        let open = async move { engine.open_in_turn(&name, force).await };
        self.tasks.spawn(open).await.map_err(|_| Failure::task_lost())?
    }

    async fn open_in_turn(
        self: &Arc<Self>,
        name: &str,
        force: bool,
    ) -> Result<Arc<Volume>, Failure> {
        let gate = self.gate(name);
        let _turn = gate.lock().await;
        let opened = match self.has_open(name, force).await {
            Ok(Some(volume)) => Ok(volume),
            Ok(None) => self.open_now(name, force).await,
            Err(failure) => Err(failure),
        };
        self.forget_gate(name);
        opened
    }

    /// The volume, if it is open here. Whoever forces wants it in any case: then what is open here
    /// counts only if nobody has opened it since, which conversion is asked.
    async fn has_open(&self, name: &str, force: bool) -> Result<Option<Arc<Volume>>, Failure> {
        let Some(volume) = self.table.find(name) else { return Ok(None) };
        if force {
            let now = self.describe(name).await?;
            if (now.id, now.generation) != (volume.id, volume.generation) {
                self.heed(&volume, &Failure::fenced());
                return Ok(None);
            }
        }
        Ok(Some(volume))
    }

    fn gate(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(opening.entry(name.to_owned()).or_default())
    }

    fn forget_gate(&self, name: &str) {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        // The table's and this request's own: nobody else waits.
        opening.retain(|other, gate| other != name || Arc::strong_count(gate) > 2);
    }

    async fn open_now(self: &Arc<Self>, name: &str, force: bool) -> Result<Arc<Volume>, Failure> {
        self.takes_work_soon().await?;
        // The replay may have opened it meanwhile: opened again, its dirty data would be fenced.
        if let Some(volume) = self.table.find(name) {
            return Ok(volume);
        }
        if self.table.len() >= self.config.volumes_max {
            return Err(Failure::new(Reason::Limit, "too many volumes are open here"));
        }
        self.close_in_log(name).await?;
        let opened = self.open_as_it_is(name, force).await?;
        let logged = match self.read_log(&opened).await {
            Ok(logged) => logged,
            Err(failure) => {
                self.give_back(&opened.volume.name, (opened.volume.id, opened.volume.generation))
                    .await;
                return Err(failure);
            }
        };
        let volume = Arc::new(Volume::new(opened, self.volume_limits()));
        match self.take_over(&volume, logged).await {
            Ok(()) => Ok(volume),
            Err(failure) => {
                // Nobody serves it: what the data log has of it is not dirty here.
                self.undirtied(volume.id, volume.state().dirty.waiting_blocks());
                self.give_back(&volume.name, (volume.id, volume.generation)).await;
                Err(failure)
            }
        }
    }

    /// A volume that was opened is served, with what the data log has of it.
    ///
    /// # Errors
    /// The cache log takes nothing. The volume is not served, and what is dirty in it still counts.
    async fn take_over(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        logged: BTreeMap<u64, endio_api::conversion::LoggedBlock>,
    ) -> Result<(), Failure> {
        // Data of an earlier generation that was let go must not come back at a replay.
        if self.log.holds(volume.id, LblkRange::new(0, u64::MAX)) {
            self.log.append_closed(volume.id)?;
        }
        self.put_back(volume, &[], logged)?;
        self.adopt(Arc::clone(volume)).await
    }

    /// What the cache log has of a volume that was let go does not come back, whatever happens from now
    /// on: durable before conversion hears that the volume is open here. Else a replay after a power
    /// loss would find it open here and take what others wrote meanwhile for older.
    async fn close_in_log(&self, name: &str) -> Result<(), Failure> {
        let volume = self.describe(name).await?.id;
        // Whoever began to append while it was still ours is done: nothing of it comes behind this.
        drop(self.log.order());
        self.note_loss(volume).await;
        if self.log.holds(volume, LblkRange::new(0, u64::MAX)) {
            self.log.append_closed(volume)?;
        }
        self.log.durable(self.log.last()).await
    }

    /// The volume, whoever opened it last.
    async fn open_as_it_is(&self, name: &str, force: bool) -> Result<Opened, Failure> {
        let deadline = self.deadline();
        loop {
            let described = self.describe(name).await?;
            match self.open_at_conversion(&described, force, deadline).await {
                // Opened meanwhile: by somebody else, or by a try of this call whose answer was lost.
                Err(failure)
                    if failure.reason == Reason::OldGeneration && Instant::now() < deadline =>
                {
                    let pause = Duration::from_millis(self.config.retry_first_ms);
                    tokio::time::sleep(pause).await;
                }
                opened => return opened,
            }
        }
    }

    /// The new generation, taken from an earlier start of this writeback if need be. Only of the
    /// volume as it was described: a takeover since then is not undone.
    ///
    /// # Errors
    /// `OLD_GENERATION`: somebody has opened it since.
    pub(super) async fn open_at_conversion(
        &self,
        described: &Described,
        force: bool,
        deadline: Instant,
    ) -> Result<Opened, Failure> {
        let is_ours = self.identity.is_earlier_start(&described.owner);
        let request = OpenVolumeRequest {
            name: described.name.clone(),
            writeback: self.identity.writeback(),
            force: force || is_ours,
            if_generation: Some(described.generation),
            volume: described.id,
            reads_log: true,
        };
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.open_volume(request).await }
        };
        let opened = self.conversion.call(deadline, call).await?;
        let volume = opened.volume.ok_or_else(|| {
            Failure::new(Reason::Malformed, "conversion opened a volume without describing it")
        })?;
        // A volume that was taken by force is served when the owner before can serve it no more.
        tokio::time::sleep(std::time::Duration::from_millis(opened.wait_ms)).await;
        let endio_api::conversion::OpenVolumeResponse { logged_number, log_blocks_max, .. } =
            opened;
        Ok(Opened { volume, grant: opened.read_grant, logged_number, log_blocks_max })
    }

    /// Closes at conversion the volume of that id and generation, which was opened and is not served
    /// here. A failure leaves it to the next open with force.
    pub(super) async fn give_back(&self, name: &str, volume: (u64, u64)) {
        let closed = self.close_at_conversion(name, volume, self.deadline()).await;
        if let Err(error) = closed {
            tracing::warn!(volume = %name, %error, "a volume that is not served stays open");
        }
    }

    async fn close_at_conversion(
        &self,
        name: &str,
        (volume, generation): (u64, u64),
        deadline: Instant,
    ) -> Result<(), Failure> {
        let request = CloseVolumeRequest { name: name.to_owned(), generation, volume };
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.close_volume(request).await }
        };
        self.conversion.call(deadline, call).await.map(drop)
    }

    /// A volume that was opened is served from now on. That it is open is durable first: after a
    /// power loss the log must know whose acknowledged writes may be missing.
    pub(super) async fn adopt(self: &Arc<Self>, volume: Arc<Volume>) -> Result<(), Failure> {
        let noted = self.log.append_open(volume.id, &volume.name, volume.generation)?;
        self.log.durable(noted).await?;
        self.table.tell_loss(&volume);
        let ask = {
            let mut state = volume.state();
            let ask = state.credit.reset();
            // Somebody may have taken it since it was opened: what is dirty is read when conversion has
            // answered.
            state.credit_reset = Some(ask.request);
            ask
        };
        self.table.insert(Arc::clone(&volume));
        self.start_flusher(Arc::clone(&volume));
        let (name, generation) = (&volume.name, volume.generation);
        tracing::info!(volume = %name, generation, "volume open");
        let engine = Arc::clone(self);
        self.tasks.spawn(async move {
            // What an earlier owner was promised and did not use is given back here.
            let reserve = Reserve {
                request: 0,
                volume: volume.id,
                generation: volume.generation,
                reset: true,
                add_blocks: ask.add_blocks,
                drop_blocks: 0,
            };
            let is_answered = |state: &mut State| {
                if state.credit_reset == Some(ask.request) {
                    state.credit_reset = None;
                }
            };
            match engine.session.reserve(None, reserve).await {
                Ok(_) => {
                    let mut state = volume.state();
                    state.credit.granted(ask.request);
                    is_answered(&mut state);
                }
                // The next session sets it anew.
                Err(failure) if failure.reason == Reason::PeerAway => {}
                Err(failure) => {
                    engine.heed(&volume, &failure);
                    let mut state = volume.state();
                    is_answered(&mut state);
                    match failure.is_full() {
                        true => state.credit.refused(ask.request),
                        false => state.credit.put_off(ask.request),
                    };
                    state.credit_refusal = Some(failure);
                }
            }
            volume.changed();
        });
        Ok(())
    }

    /// A volume that was let go is noted as closed, unless it is open here again by now.
    pub(super) async fn forget_closed(self: &Arc<Self>, volume: &Volume) {
        let gate = self.gate(&volume.name);
        let turn = gate.lock().await;
        if self.table.find(&volume.name).is_none() {
            self.note_loss(volume.id).await;
            if let Err(error) = self.log.append_closed(volume.id) {
                tracing::warn!(volume = %volume.name, %error, "a closed volume could not be noted");
            }
        }
        drop(turn);
        self.forget_gate(&volume.name);
    }

    /// What somebody has yet to hear of a loss outlives this process. Before the cache log, which knows the
    /// data that is lost, is told that it is of no use.
    pub(super) async fn note_loss(&self, volume: u64) {
        if self.table.owes_loss(volume) {
            self.log.note_loss(volume).await;
        }
    }

    /// Creates a volume. Idempotent for the same properties.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` with other properties, and what conversion refuses.
    pub async fn create(&self, request: CreateVolumeRequest) -> Result<Described, Failure> {
        self.takes_work_soon().await?;
        let deadline = self.deadline();
        loop {
            let as_of = match request.as_of {
                Some(as_of) => Some(as_of),
                None => self.deletions(deadline).await?,
            };
            // Without it, a call that is given up could bring the volume back once it is deleted.
            let request = CreateVolumeRequest { as_of, ..request.clone() };
            let is_ours = request.as_of.is_none();
            let call = |mut client: Client| {
                let request = request.clone();
                async move { client.create_volume(request).await }
            };
            match self.conversion.call(deadline, call).await {
                // Something was deleted meanwhile. The caller waits, so it still wants the volume.
                Err(failure)
                    if is_ours
                        && failure.reason == Reason::WrongState
                        && Instant::now() < deadline =>
                {
                    let pause = Duration::from_millis(self.config.retry_first_ms);
                    tokio::time::sleep(pause).await;
                }
                created => return created,
            }
        }
    }

    async fn deletions(&self, deadline: Instant) -> Result<Option<Deletions>, Failure> {
        let call = |mut client: Client| async move { client.describe(DescribeRequest {}).await };
        Ok(self.conversion.call(deadline, call).await?.deletions)
    }

    /// A volume as conversion knows it.
    ///
    /// # Errors
    /// `UNKNOWN_VOLUME`.
    pub async fn describe(&self, name: &str) -> Result<Described, Failure> {
        check_name(name)?;
        let request = VolumeRequest { name: name.to_owned() };
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        };
        let mut described = self.conversion.call(self.deadline(), call).await?;
        self.overlay(&mut described);
        Ok(described)
    }

    /// The size of a volume that is open here is the one by which its reads are judged: it may
    /// be ahead of the converted one, and for a moment behind it.
    fn overlay(&self, described: &mut Described) {
        if let Some(open) = self.table.find(&described.name) {
            described.size_bytes = open.state().view.size_bytes();
        }
    }

    /// All volumes.
    ///
    /// # Errors
    /// `PEER_AWAY`.
    pub async fn list(&self) -> Result<ListVolumesResponse, Failure> {
        let call =
            |mut client: Client| async move { client.list_volumes(ListVolumesRequest {}).await };
        let mut list = self.conversion.call(self.deadline(), call).await?;
        list.volumes.iter_mut().for_each(|described| self.overlay(described));
        Ok(list)
    }

    /// Sets a volume's size. What lies beyond a smaller one is gone. `meant`: its number; 0: whichever
    /// has the name.
    ///
    /// # Errors
    /// As [`Engine::volume`], and what conversion refuses.
    pub async fn resize(
        self: &Arc<Self>,
        name: &str,
        meant: u64,
        size_bytes: u64,
    ) -> Result<Described, Failure> {
        self.takes_work_soon().await?;
        let volume = self.volume(name).await?;
        check_meant(&volume, meant)?;
        let engine = Arc::clone(self);
        let resize = async move { engine.resize_open(&volume, size_bytes).await };
        self.tasks.spawn(resize).await.map_err(|_| Failure::task_lost())?
    }

    async fn resize_open(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        size_bytes: u64,
    ) -> Result<Described, Failure> {
        let deadline = self.deadline();
        let first = size_bytes / BLOCK_BYTES;
        let beyond = LblkRange::new(first, u64::MAX - first);
        let mut held = volume.locks.acquire(beyond);
        if tokio::time::timeout_at(deadline, held.held()).await.is_err() {
            return Err(Failure::new(Reason::TimedOut, "requests are under way beyond that size"));
        }
        volume.usable()?;
        self.forget(volume, beyond, deadline).await?;
        let tail = size_bytes % BLOCK_BYTES;
        if volume.growable && tail > 0 {
            self.see_size(volume, LblkRange::new(first, 1), deadline).await?;
        }
        let (old, durable) = {
            let state = volume.state();
            (state.view.size_bytes(), state.view.durable_size_bytes())
        };
        // A volume that grows again must not show what was cut off, nor what a write in place that failed
        // has left in the block behind the end.
        let is_cut = size_bytes < old || (volume.in_place && first * BLOCK_BYTES < durable);
        if is_cut && tail > 0 {
            let len = BLOCK_BYTES - tail;
            self.zero_tail(volume, ByteRange { offset: size_bytes, len }, deadline).await?;
        }
        let request = ResizeVolumeRequest {
            name: volume.name.to_string(),
            size_bytes,
            generation: volume.generation,
            attempt: None,
            volume: volume.id,
        };
        let call = |mut client: Client, attempt| {
            let request = ResizeVolumeRequest { attempt: Some(attempt), ..request.clone() };
            async move { client.resize_volume(request).await }
        };
        let changing = volume.map_changes(vec![LblkRange::new(0, u64::MAX)]);
        let (outcome, left) = self.change(volume, deadline, call).await;
        match &outcome {
            Ok(described) => {
                let version = MapVersion(described.map_version);
                volume.state().view.resized(version, described.size_bytes);
            }
            Err(failure) => self.heed(volume, failure),
        }
        match left {
            None => changing.ended(Vec::new()),
            Some(number) => self.learn_size(volume, size_bytes, number, changing, held),
        }
        outcome
    }

    /// Asks for the size of a volume that grows: a direct write that was given up may have extended it, and
    /// nobody here heard. Under a session that is newer than that write's its end is known to conversion.
    /// A question is about blocks: about those that are cut.
    async fn see_size(
        &self,
        volume: &Arc<Volume>,
        cut: LblkRange,
        deadline: Instant,
    ) -> Result<(), Failure> {
        if tokio::time::timeout_at(deadline, self.session.up()).await.is_err() {
            return Err(Failure::conversion_away());
        }
        self.look_up(volume, cut, deadline).await.map(drop)
    }

    /// A try of a resize was given up that may have been carried out all the same: what is
    /// acknowledged beyond the end could never be written out. So the size is asked for until it is
    /// known, and that no try is carried out any more; until then what lies beyond stays locked.
    fn learn_size(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        asked_bytes: u64,
        tried: u64,
        changing: MapChanging,
        held: Held,
    ) {
        let resized = Arc::clone(volume);
        self.settle_later(volume, tried, held, move |found| {
            changing.ended(Vec::new());
            if found.size_bytes == asked_bytes {
                let version = MapVersion(found.map_version);
                resized.state().view.resized(version, asked_bytes);
            }
        });
    }

    async fn zero_tail(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        edge: ByteRange,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let zeroes = bytes::BytesMut::zeroed(edge.len as usize).freeze();
        let whole = self.merge(volume, edge, zeroes, deadline).await?;
        self.write_through(volume, edge.blocks(), whole, 0, deadline).await?;
        Ok(())
    }

    /// Deletes a volume and drops what is cached of it. `meant`: its number; 0: whichever has the
    /// name.
    ///
    /// # Errors
    /// `UNKNOWN_VOLUME`; `VOLUME_BUSY` where another writeback has it.
    pub async fn delete(self: &Arc<Self>, name: &str, meant: u64) -> Result<(), Failure> {
        self.takes_work_soon().await?;
        let volume = self.volume(name).await?;
        check_meant(&volume, meant)?;
        let engine = Arc::clone(self);
        let delete = async move { engine.delete_open(&volume).await };
        self.tasks.spawn(delete).await.map_err(|_| Failure::task_lost())?
    }

    async fn delete_open(self: &Arc<Self>, volume: &Arc<Volume>) -> Result<(), Failure> {
        let deadline = self.deadline();
        let mut held = volume.locks.acquire(LblkRange::new(0, u64::MAX));
        if tokio::time::timeout_at(deadline, held.held()).await.is_err() {
            return Err(Failure::new(Reason::TimedOut, "requests for the volume are under way"));
        }
        volume.usable()?;
        let request = DeleteVolumeRequest {
            name: volume.name.to_string(),
            generation: volume.generation,
            volume: volume.id,
            attempt: None,
        };
        let call = |mut client: Client, attempt| {
            let request = DeleteVolumeRequest { attempt: Some(attempt), ..request.clone() };
            async move { client.delete_volume(request).await }
        };
        // From here on it may be gone, and somebody else may create another one of its name.
        volume.state().leaving = true;
        let (deleted, left) = self.change(volume, deadline, call).await;
        match deleted {
            Ok(_) => {}
            // An earlier try of this call, whose answer was lost, deleted it.
            Err(failure) if failure.reason == Reason::UnknownVolume => {}
            Err(failure) => {
                self.heed(volume, &failure);
                match left {
                    // What is acknowledged from now on must not go with a late deletion.
                    Some(number) => {
                        let stays = Arc::clone(volume);
                        self.settle_later(volume, number, held, move |_| {
                            stays.state().leaving = false;
                        });
                    }
                    None => volume.state().leaving = false,
                }
                return Err(failure);
            }
        }
        // Nothing of it is needed any more, so that its flusher has nothing to complain about.
        let discarded = volume.state().dirty.discard(LblkRange::new(0, u64::MAX));
        self.undirtied(volume.id, discarded.credit_freed_blocks);
        self.table.end(volume, Failure::new(Reason::UnknownVolume, "the volume was deleted"));
        self.log.loss_told(volume.id).await;
        Ok(())
    }

    /// Writes everything out and gives the volume up. Not open: nothing happens.
    ///
    /// # Errors
    /// What keeps it from being written out; it stays open then. That conversion did not answer; it
    /// is not open here any more then, and another call closes it.
    pub async fn close(self: &Arc<Self>, name: &str) -> Result<(), Failure> {
        check_name(name)?;
        let engine = Arc::clone(self);
        let Some(volume) = self.table.find(name) else {
            let name = name.to_owned();
            // A caller that goes away leaves nobody's turn behind.
            let close = async move { engine.close_left_open(&name).await };
            return self.tasks.spawn(close).await.map_err(|_| Failure::task_lost())?;
        };
        let close = async move { engine.close_open(&volume).await };
        self.tasks.spawn(close).await.map_err(|_| Failure::task_lost())?
    }

    /// Closes at conversion what a close whose answer never came may have left open.
    async fn close_left_open(&self, name: &str) -> Result<(), Failure> {
        // Nobody opens it meanwhile, neither a request nor the replay.
        self.takes_work_soon().await?;
        let gate = self.gate(name);
        let turn = gate.lock().await;
        let closed = match self.table.find(name) {
            Some(_) => Ok(()),
            None => self.close_if_ours(name).await,
        };
        drop(turn);
        self.forget_gate(name);
        closed
    }

    async fn close_if_ours(&self, name: &str) -> Result<(), Failure> {
        let described = self.describe(name).await?;
        match described.owner == self.identity.writeback() {
            true => {
                let opened = (described.id, described.generation);
                self.close_at_conversion(name, opened, self.deadline()).await
            }
            false => Ok(()),
        }
    }

    async fn close_open(self: &Arc<Self>, volume: &Arc<Volume>) -> Result<(), Failure> {
        let deadline = self.deadline();
        let everything = LblkRange::new(0, u64::MAX);
        let mut held = volume.locks.acquire(everything);
        if tokio::time::timeout_at(deadline, held.held()).await.is_err() {
            return Err(Failure::new(Reason::TimedOut, "requests for the volume are under way"));
        }
        self.forget(volume, everything, deadline).await?;
        let opened = (volume.id, volume.generation);
        // From here on somebody else may open it, write, and be told that it is done.
        volume.state().leaving = true;
        let closed = self.close_at_conversion(&volume.name, opened, deadline).await;
        // Whatever came of it: it may have been carried out, or may yet be, and then what is
        // acknowledged here would be lost. Nothing is dirty, and the next request opens it again.
        self.table.end(volume, Failure::new(Reason::WrongState, "the volume was closed here"));
        match closed {
            Err(failure) if failure.reason != Reason::WrongState => Err(failure),
            _ => Ok(()),
        }
    }
}

/// Who means another volume than the one that has the name now means one that is gone.
fn check_meant(volume: &Volume, meant: u64) -> Result<(), Failure> {
    match meant == 0 || volume.id == meant {
        true => Ok(()),
        false => Err(Failure::new(Reason::UnknownVolume, "another volume has that name now")),
    }
}

fn check_name(name: &str) -> Result<(), Failure> {
    const NAME_BYTES_MAX: usize = 128;
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(Failure::new(Reason::Malformed, "volume: a name has 1 to 128 characters"));
    }
    Ok(())
}
