//! Unary calls on volumes.

use endio_types::planted::{self, Bug};
use endio_types::{
    BLOCK_BYTES, Generation, LblkRange, MapVersion, Millis, REPLICAS_MAX, Reason, VOLUME_BYTES_MAX,
    VolumeId,
};

use super::io::{
    Attempt, Call, Deletions, MapChange, Output, Refusal, ReplyBody, ReplyTo, ToWriteback,
};
use super::state::{PendingChange, VolumeRt, Work};
use super::{Durability, Machine, Step};
use crate::extent_map::ChunkTable;
use crate::record::{Record, VolumeState};
use crate::token::ReadGrant;

/// Longest name of a volume, bytes.
const VOLUME_NAME_MAX: usize = 128;

/// A name, and the number of the volume that is meant by it; `None`: whichever has the name.
type Named<'a> = (&'a str, Option<VolumeId>);

impl<T: ChunkTable> Machine<T> {
    pub(super) fn call(&mut self, reply: ReplyTo, call: Call, out: &mut Output) -> Step<T> {
        let closes = matches!(call, Call::CloseVolume { .. });
        if self.granting_key().is_none() {
            let refusal = self.refusal(Reason::NotReady, "recovering");
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        if self.stopping && !closes {
            let refusal = self.refusal(Reason::Draining, "the service is stopping");
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        match call {
            Call::CreateVolume { name, size_bytes, replicas, in_place, growable, as_of } => {
                let volume = VolumeState {
                    id: self.durable.next_volume,
                    name,
                    size_bytes,
                    replicas: replicas.max(1),
                    in_place,
                    growable,
                    generation: Generation(0),
                    map_version: MapVersion(0),
                    owner: None,
                    promised: 0,
                    deleted: false,
                };
                self.create(reply, volume, as_of, out)
            }
            Call::ResizeVolume { name, volume, size_bytes, generation, attempt } => {
                self.resize(reply, (&name, volume), (size_bytes, generation, attempt), out)
            }
            Call::DeleteVolume { name, volume, generation, attempt } => {
                self.delete(reply, (&name, volume), (generation, attempt), out)
            }
            Call::OpenVolume { name, volume, writeback, force, if_generation, reads_log } => {
                let how = (force, if_generation, reads_log);
                self.open(reply, (&name, volume), writeback, how, out)
            }
            Call::CloseVolume { name, volume, generation } => {
                self.close(reply, (&name, volume), generation, out)
            }
            Call::ChangeMap { volume, generation, change, range, attempt } => {
                self.change_map(reply, (volume, generation, attempt), change, range, out)
            }
        }
    }

    /// For a later [`Call::CreateVolume`].
    pub fn deletions(&self) -> Deletions {
        Deletions { epoch: self.durable.epoch, count: self.deletions }
    }

    fn create(
        &mut self,
        reply: ReplyTo,
        new: VolumeState,
        as_of: Option<Deletions>,
        out: &mut Output,
    ) -> Step<T> {
        let is_late = as_of.is_some_and(|as_of| as_of != self.deletions());
        let refusal = match creation_fault(&new) {
            Some(message) => Some(self.refusal(Reason::Malformed, message)),
            None => match self.names.get(&new.name).and_then(|id| self.durable.volumes.get(id)) {
                Some(old) if !is_same_volume(old, &new) => {
                    let message = "a volume of that name has other properties";
                    Some(self.refusal(Reason::AlreadyExists, message))
                }
                Some(_) => None,
                None if is_late && !planted::is(Bug::LateCreationCounts) => {
                    let message = "a volume was deleted meanwhile, perhaps this one";
                    Some(self.refusal(Reason::WrongState, message))
                }
                None if self.durable.volumes.len() >= self.limits.volumes_max => {
                    Some(self.refusal(Reason::Limit, "too many volumes"))
                }
                None => {
                    self.names.insert(new.name.clone(), new.id);
                    self.volumes.insert(new.id, VolumeRt::default());
                    self.commit(Record::CreateVolume(new.clone()), out)?;
                    None
                }
            },
        };
        match (refusal, self.names.get(&new.name).copied()) {
            (None, Some(id)) => self.reply_volume(reply, id, out),
            (refusal, _) => {
                let refusal = refusal.unwrap_or_else(|| self.unknown());
                self.reply(reply, Err(refusal), out);
            }
        }
        Ok(())
    }

    pub(super) fn unknown(&self) -> Refusal {
        self.refusal(Reason::UnknownVolume, "no such volume")
    }

    pub(super) fn reply_volume(&self, reply: ReplyTo, id: VolumeId, out: &mut Output) {
        let body = self.volume_info(id).map(ReplyBody::Volume);
        self.reply(reply, body.ok_or_else(|| self.unknown()), out);
    }

    /// The volume that a call names, if it is the one that is meant.
    fn meant(&self, (name, meant): Named<'_>) -> Option<&VolumeState> {
        let id = self.names.get(name)?;
        let is_meant = meant.is_none_or(|meant| meant == *id) || planted::is(Bug::NamesakeTaken);
        self.durable.volumes.get(id).filter(|_| is_meant)
    }

    /// The volume that a call names, if the caller may change it.
    fn administered(
        &self,
        named: Named<'_>,
        generation: Generation,
    ) -> Result<VolumeState, Refusal> {
        let volume = self.meant(named).ok_or_else(|| self.unknown())?;
        match (&volume.owner, generation) {
            (None, Generation(0)) => Ok(volume.clone()),
            (Some(_), Generation(0)) => Err(self.refusal(Reason::VolumeBusy, "the volume is open")),
            (Some(_), given) if given == volume.generation => Ok(volume.clone()),
            _ => Err(self.refusal(Reason::OldGeneration, "the volume is not open under that")),
        }
    }

    fn resize(
        &mut self,
        reply: ReplyTo,
        named: Named<'_>,
        (size_bytes, generation, attempt): (u64, Generation, Attempt),
        out: &mut Output,
    ) -> Step<T> {
        let volume = match self.administered(named, generation) {
            Ok(volume) => volume,
            Err(refusal) => {
                self.reply(reply, Err(refusal), out);
                return Ok(());
            }
        };
        if let Some(message) = size_fault(size_bytes, volume.growable) {
            let refusal = self.refusal(Reason::Malformed, message);
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        if !self.is_waited_for(volume.id, attempt) {
            return self.given_up(reply, out);
        }
        // The block that the new end cuts stays, but writes to it may extend the volume: wait for
        // them too.
        let first = size_bytes / BLOCK_BYTES;
        let range = LblkRange::new(first, u64::MAX - first);
        let work = Work::Shrink(size_bytes);
        self.wait_to_change(reply, (volume.id, attempt.number), work, range, out)
    }

    fn delete(
        &mut self,
        reply: ReplyTo,
        named: Named<'_>,
        (generation, attempt): (Generation, Attempt),
        out: &mut Output,
    ) -> Step<T> {
        match self.administered(named, generation) {
            Ok(volume) if !self.is_waited_for(volume.id, attempt) => self.given_up(reply, out),
            Ok(volume) => {
                let whole = super::apply::WHOLE;
                self.wait_to_change(reply, (volume.id, attempt.number), Work::Delete, whole, out)
            }
            Err(refusal) => {
                // Whoever hears that there is no such volume relies on it, too.
                self.deletions += u64::from(refusal.reason == Reason::UnknownVolume);
                self.reply(reply, Err(refusal), out);
                Ok(())
            }
        }
    }

    fn open(
        &mut self,
        reply: ReplyTo,
        named: Named<'_>,
        writeback: String,
        (force, if_generation, reads_log): (bool, Option<Generation>, bool),
        out: &mut Output,
    ) -> Step<T> {
        let found = self.meant(named).cloned();
        let refusal = match &found {
            None if self.names.contains_key(named.0) => {
                Some(self.refusal(Reason::OldGeneration, "another volume has that name meanwhile"))
            }
            None => Some(self.unknown()),
            _ if writeback.is_empty() => {
                Some(self.refusal(Reason::Malformed, "the writeback has no name"))
            }
            Some(volume) if !reads_log && self.durable.logs.blocks_of(volume.id) > 0 => {
                let message =
                    "the volume has flushed data in its log, which the caller cannot read";
                Some(self.refusal(Reason::Protocol, message))
            }
            Some(volume) if if_generation.is_some_and(|seen| seen != volume.generation) => {
                Some(self.refusal(Reason::OldGeneration, "the volume was opened meanwhile"))
            }
            Some(volume) => match &volume.owner {
                Some(owner) if *owner != writeback && !force && self.is_alive(owner) => {
                    Some(self.refusal(Reason::VolumeBusy, "the volume is open elsewhere"))
                }
                _ => None,
            },
        };
        let (Some(volume), None) = (found, &refusal) else {
            let refusal = refusal.unwrap_or_else(|| self.unknown());
            self.reply(reply, Err(refusal), out);
            return Ok(());
        };
        let generation = Generation(volume.generation.0 + 1);
        let wait_ms = self.owner_before_reads_until(&volume, &writeback).since(self.now);
        let before = volume.owner.as_ref().and_then(|owner| self.writebacks.get(owner));
        let before = before.and_then(|owner| owner.session);
        self.is_heard_of(&writeback);
        let log_last = self.durable.logs.newest(volume.id);
        let rt = self.volumes.entry(volume.id).or_default();
        (rt.attempts_over, rt.log_over, rt.log_last) = (0, 0, log_last);
        let owner = writeback;
        self.commit(Record::OpenVolume { volume: volume.id, generation, owner }, out)?;
        self.supersede(&volume, generation, out)?;
        if let Some(session) = before.filter(|_| volume.generation > Generation(0)) {
            // Whoever hears this lets go of what it has acknowledged: not before it is so for good.
            let message = ToWriteback::VolumeFenced { volume: volume.id, generation };
            let after = match planted::is(Bug::FencedEarly) {
                true => Durability::Now,
                false => self.when_committed(),
            };
            self.tell(session, after, message, out);
        }
        self.reads.entry(volume.id).or_default().opened(volume.map_version);
        self.settle_reads(volume.id)?;
        if let (Some(key), Some(info)) = (self.granting_key(), self.volume_info(volume.id)) {
            let grant = ReadGrant::new(key, self.durable.epoch, volume.id, generation);
            self.reply(reply, Ok(ReplyBody::Opened(info, grant, wait_ms)), out);
        }
        Ok(())
    }

    /// Until when an owner that the volume is taken from may answer reads from what it remembers,
    /// which no store checks. It may renew its lease until the record of the opening is durable, from when
    /// on the caller counts: so whatever there is to wait for takes a whole lease. An earlier start of the
    /// same instance is over. Who is on record as the owner
    /// itself may have taken the volume just before this process's predecessor died, and never heard so.
    fn owner_before_reads_until(&mut self, volume: &VolumeState, next: &str) -> Millis {
        if volume.owner.as_deref() == Some(next) {
            let rt = self.volumes.entry(volume.id).or_default();
            rt.read_elsewhere_until = rt.read_elsewhere_until.max(rt.may_be_taken_until);
        }
        let before = volume.owner.as_deref().filter(|before| !is_same_instance(before, next));
        let is_leased = before.is_some_and(|before| self.is_alive(before));
        let a_lease_from_now = self.now.plus(self.limits.lease_ms.into());
        let now = self.now;
        let rt = self.volumes.entry(volume.id).or_default();
        if is_leased || rt.read_elsewhere_until > now {
            rt.read_elsewhere_until = rt.read_elsewhere_until.max(a_lease_from_now);
        }
        rt.read_elsewhere_until
    }

    /// Ends what generations below `generation` have in flight, and fences them. Behind the record that makes
    /// it so: whoever hears of such an end lets go of what it has acknowledged.
    fn supersede(
        &mut self,
        volume: &VolumeState,
        generation: Generation,
        out: &mut Output,
    ) -> Step<T> {
        self.abort_of_volume(volume.id, Reason::OldGeneration, out)?;
        let message = "the volume was opened or closed meanwhile";
        self.drop_changes(volume.id, Reason::OldGeneration, message, out);
        if volume.generation > Generation(0) {
            self.fence_generation(volume.id, generation);
        }
        Ok(())
    }

    fn close(
        &mut self,
        reply: ReplyTo,
        named: Named<'_>,
        generation: Generation,
        out: &mut Output,
    ) -> Step<T> {
        let found = self.meant(named).cloned();
        let body = match found {
            None => Err(self.unknown()),
            Some(volume) if volume.generation != generation => {
                Err(self.refusal(Reason::OldGeneration, "the volume is not open under that"))
            }
            Some(volume) if volume.owner.is_none() => Ok(ReplyBody::Closed),
            Some(mut volume) => {
                let next = Generation(generation.0 + 1);
                let id = volume.id;
                // The owner asked for it; there is nobody to warn.
                volume.owner = None;
                self.commit(Record::CloseVolume { volume: id }, out)?;
                self.supersede(&volume, next, out)?;
                self.settle_reads(id)?;
                Ok(ReplyBody::Closed)
            }
        };
        self.reply(reply, body, out);
        Ok(())
    }

    fn change_map(
        &mut self,
        reply: ReplyTo,
        (volume, generation, attempt): (VolumeId, Generation, Attempt),
        change: MapChange,
        range: LblkRange,
        out: &mut Output,
    ) -> Step<T> {
        let state = self.durable.volumes.get(&volume).filter(|volume| !volume.deleted);
        let fault = match state {
            None => Some((Reason::UnknownVolume, "no such volume")),
            Some(state) if state.generation != generation || state.owner.is_none() => {
                Some((Reason::OldGeneration, "the volume is not open under that"))
            }
            Some(_) if range.len == 0 => Some((Reason::Malformed, "no blocks are named")),
            Some(state) => {
                let end = range.start.0.checked_add(range.len);
                // The owner of a growable volume has acknowledged what is not converted yet, and may
                // trim before it, where nothing is mapped. Cut here, the change would not wait for
                // a write in flight that extends the volume.
                let size_bytes = match change {
                    MapChange::Trim | MapChange::Zero if state.growable => VOLUME_BYTES_MAX,
                    _ => state.size_bytes,
                };
                let size = size_bytes.div_ceil(BLOCK_BYTES);
                let is_inside = end.is_some_and(|end| end <= size);
                (!is_inside).then_some((Reason::OutOfRange, "beyond the end of the volume"))
            }
        };
        if let Some((reason, message)) = fault {
            let refusal = self.refusal(reason, message);
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        if !self.is_waited_for(volume, attempt) {
            return self.given_up(reply, out);
        }
        if self.metadata_full {
            let refusal = self.refusal(Reason::MetadataFull, "the metadata disk is full");
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        self.wait_to_change(reply, (volume, attempt.number), Work::Map(change), range, out)
    }

    /// Whether the caller waits for this try, as far as is known; remembers what it says of others.
    fn is_waited_for(&mut self, volume: VolumeId, attempt: Attempt) -> bool {
        let rt = self.volumes.entry(volume).or_default();
        let is_late = attempt.number != 0 && attempt.number <= rt.attempts_over;
        rt.attempts_over = rt.attempts_over.max(attempt.over);
        rt.log_over = rt.log_over.max(attempt.logged);
        !is_late || planted::is(Bug::LateChangeCounts)
    }

    fn given_up(&self, reply: ReplyTo, out: &mut Output) -> Step<T> {
        let refusal = self.refusal(Reason::WrongState, "the caller gave this change up");
        self.reply(reply, Err(refusal), out);
        Ok(())
    }

    /// Nobody waits for a try of a change up to this number any more: none of them is carried out
    /// from now on. Says nothing of volumes that are not open under that generation.
    ///
    /// # Errors
    /// [`Reason::Limit`] while one of them is under way.
    pub fn attempts_over(
        &mut self,
        volume: VolumeId,
        generation: Generation,
        over: u64,
    ) -> Result<(), Refusal> {
        let state = self.durable.volumes.get(&volume).filter(|volume| volume.owner.is_some());
        if over == 0 || state.is_none_or(|state| state.generation != generation) {
            return Ok(());
        }
        let rt = self.volumes.entry(volume).or_default();
        rt.attempts_over = rt.attempts_over.max(over);
        match rt.changes.iter().any(|change| (1..=over).contains(&change.attempt)) {
            true => Err(self.refusal(Reason::Limit, "a change that was given up is under way")),
            false => Ok(()),
        }
    }

    /// Puts a change in line; it runs in `drain` once nothing in flight overlaps its range.
    fn wait_to_change(
        &mut self,
        reply: ReplyTo,
        (volume, attempt): (VolumeId, u64),
        work: Work,
        range: LblkRange,
        out: &mut Output,
    ) -> Step<T> {
        let max = self.limits.changes_per_volume_max;
        let rt = self.volumes.entry(volume).or_default();
        if rt.changes.len() >= max {
            let refusal = self.refusal(Reason::Limit, "too many changes of the volume wait");
            self.reply(reply, Err(refusal), out);
            return Ok(());
        }
        let cursor = match work {
            Work::Shrink(size) => size.div_ceil(BLOCK_BYTES),
            Work::Map(_) | Work::Delete => range.start.0,
        };
        let change = PendingChange { work, range, reply, cursor, blocks_changed: 0, attempt };
        rt.changes.push_back(change);
        self.changing.insert(volume);
        Ok(())
    }
}

fn is_same_volume(old: &VolumeState, new: &VolumeState) -> bool {
    // A growable volume has grown since; its size is no property that tells it from another.
    let same_size = old.size_bytes == new.size_bytes || (old.growable && new.growable);
    same_size
        && old.replicas == new.replicas
        && old.in_place == new.in_place
        && old.growable == new.growable
}

fn creation_fault(volume: &VolumeState) -> Option<&'static str> {
    let name = volume.name.as_bytes();
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    if name.is_empty() || name.len() > VOLUME_NAME_MAX || !name.iter().all(is_word) {
        return Some("a name has 1 to 128 of A-Z a-z 0-9 . _ -");
    }
    if !name[0].is_ascii_alphanumeric() {
        return Some("a name starts with a letter or digit");
    }
    if volume.replicas > REPLICAS_MAX {
        return Some("at most 3 replicas");
    }
    if volume.in_place && volume.replicas != 1 {
        return Some("a volume written in place has one replica");
    }
    size_fault(volume.size_bytes, volume.growable)
}

fn size_fault(size_bytes: u64, growable: bool) -> Option<&'static str> {
    if size_bytes > VOLUME_BYTES_MAX {
        return Some("larger than 2^60 bytes");
    }
    if !growable && !size_bytes.is_multiple_of(BLOCK_BYTES) {
        return Some("the size is no multiple of 4096");
    }
    None
}

/// Whether both names are starts of one instance: `INSTANCE/START`.
fn is_same_instance(one: &str, other: &str) -> bool {
    one == other
        || match (one.rsplit_once('/'), other.rsplit_once('/')) {
            (Some((one, _)), Some((other, _))) => one == other,
            _ => false,
        }
}
