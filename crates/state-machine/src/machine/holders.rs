//! Sessions of writebacks; the expiry of leases.

use endio_types::{Generation, IoEndId, MapVersion, Millis, Reason, VolumeId};

use super::io::{Effect, EffectKind, FromWriteback, Output, ToWriteback, WritebackSession};
use super::{Durability, Machine, Step};
use crate::extent_map::ChunkTable;
use crate::lease::Lease;
use crate::record::Record;

/// Longest name of a writeback instance, bytes.
const WRITEBACK_NAME_MAX: usize = 256;
/// Most logical blocks that one request may add to the credit; keeps sums far from overflow.
const RESERVE_MAX: u64 = 1 << 40;

impl<T: ChunkTable> Machine<T> {
    /// A message of a writeback.
    pub(super) fn writeback(
        &mut self,
        session: WritebackSession,
        message: FromWriteback,
        out: &mut Output,
    ) -> Step<T> {
        if let FromWriteback::Hello { writeback } = message {
            return self.hello(session, writeback, out);
        }
        let Some(name) = self.writeback_sessions.get(&session).cloned() else {
            let refusal = self.refusal(Reason::WrongState, "Hello comes first");
            self.tell(session, Durability::Now, ToWriteback::SessionRefused(refusal), out);
            return Ok(());
        };
        match message {
            FromWriteback::Hello { .. } => Ok(()),
            FromWriteback::Begin(begin) => self.begin(session, &name, begin, out),
            FromWriteback::Log(log) => self.log_data(session, &name, log, out),
            FromWriteback::Release { token, not_submitted, abort } => {
                let at = out.effects.len();
                let released = self.release_submitter(&name, &token, &not_submitted, abort, out)?;
                let (io_end, refused) = (token.io_end, released.err());
                let message = ToWriteback::Released { io_end, refused };
                let kind = EffectKind::Writeback(session, message);
                // Ahead of the completion that it may have caused.
                out.effects.insert(at, Effect { after: Durability::Now, kind });
                Ok(())
            }
            FromWriteback::Renew { confirms } => {
                for (volume, generation, version) in confirms {
                    self.confirm(&name, volume, generation, version)?;
                }
                self.renew_writeback(session, &name, out);
                Ok(())
            }
            FromWriteback::Reserve {
                request,
                volume,
                generation,
                reset,
                add_blocks,
                drop_blocks,
            } => {
                let change = (reset, add_blocks, drop_blocks);
                self.reserve(session, &name, (request, volume, generation), change, out)
            }
        }
    }

    pub(super) fn tell(
        &self,
        session: WritebackSession,
        after: Durability,
        message: ToWriteback,
        out: &mut Output,
    ) {
        self.push(after, EffectKind::Writeback(session, message), out);
    }

    /// A session begins. What an older session of the instance had in flight is given up: the
    /// instance cannot know how it ended, and will write again.
    fn hello(&mut self, session: WritebackSession, name: String, out: &mut Output) -> Step<T> {
        let fault = match () {
            () if self.granting_key().is_none() => {
                Some(self.refusal(Reason::NotReady, "recovering"))
            }
            () if name.is_empty() || name.len() > WRITEBACK_NAME_MAX => {
                Some(self.refusal(Reason::Malformed, "the writeback's name is empty or too long"))
            }
            () if self.writeback_sessions.contains_key(&session) => {
                Some(self.refusal(Reason::WrongState, "Hello was said before"))
            }
            () => None,
        };
        if let Some(refusal) = fault {
            self.tell(session, Durability::Now, ToWriteback::SessionRefused(refusal), out);
            return Ok(());
        }
        let lease = Some(Lease::grant(self.now, self.limits.lease_ms));
        let before = self.writebacks.change(&name, |rt| {
            rt.lease = lease;
            rt.session.replace(session)
        });
        if let Some(before) = before {
            self.writeback_sessions.remove(&before);
            self.push(Durability::Now, EffectKind::EndWriteback(before), out);
        }
        let old = self.ledger.iter().filter(|io_end| io_end.writeback == name);
        let old: Vec<IoEndId> = old.map(|io_end| io_end.id).collect();
        for io_end in old {
            self.abort(io_end, Reason::Aborted, None, out)?;
        }
        self.earlier_starts_are_over()?;
        self.writeback_sessions.insert(session, name);
        let (epoch, lease_ms) = (self.durable.epoch, self.limits.lease_ms);
        self.tell(session, Durability::Now, ToWriteback::Welcome { epoch, lease_ms }, out);
        let stores = ToWriteback::Stores(self.stores(self.now));
        self.tell(session, Durability::Now, stores, out);
        Ok(())
    }

    /// What earlier starts of an instance have freed waits for their reads no more: their volumes may stay open
    /// in their names for long, if nobody asks for them.
    fn earlier_starts_are_over(&mut self) -> Step<T> {
        let is_left = |volume: &VolumeId| {
            let volume = self.durable.volumes.get(volume);
            volume
                .and_then(|volume| volume.owner.as_deref())
                .is_some_and(|owner| self.is_over(owner))
        };
        let left = self.readers_awaited.iter().copied().filter(is_left);
        let left: Vec<VolumeId> = left.collect();
        left.into_iter().try_for_each(|volume| self.settle_reads(volume))
    }

    /// Whether a later start of the same instance was heard of. The directory of an instance has one process
    /// at a time.
    pub(super) fn is_over(&self, name: &str) -> bool {
        let Some((instance, start)) = start_of(name) else { return false };
        let starts = self.writebacks.from(instance).map(start_of);
        let mut same = starts.map_while(|other| other.filter(|(other, _)| *other == instance));
        same.any(|(_, other)| other > start)
    }

    /// A writeback opens a volume, perhaps before its session stands: after a restart of conversion
    /// the session before may not have noticed yet. It has one lease's time to say Hello before
    /// somebody else may take the volume without force, and whoever takes it by force waits as long
    /// for what it may still answer under the lease of its session before.
    pub(super) fn is_heard_of(&mut self, name: &str) {
        let lease = Some(Lease::grant(self.now, self.limits.lease_ms));
        self.writebacks.change(name, |rt| rt.lease = lease);
    }

    /// The stream to a writeback ended. Its tokens live until its lease ends.
    pub(super) fn writeback_lost(&mut self, session: WritebackSession) {
        let Some(name) = self.writeback_sessions.remove(&session) else { return };
        self.writebacks.change(&name, |rt| rt.session = None);
    }

    fn renew_writeback(&mut self, session: WritebackSession, name: &str, out: &mut Output) {
        self.is_heard_of(name);
        let (lease_ms, floor) = (self.limits.lease_ms, self.floor());
        self.tell(session, Durability::Now, ToWriteback::Renewed { lease_ms, floor }, out);
    }

    /// The volume, if the writeback has it open under this generation.
    pub(super) fn owned(
        &self,
        name: &str,
        volume: VolumeId,
        generation: Generation,
    ) -> Result<&crate::record::VolumeState, Reason> {
        let state = self.durable.volumes.get(&volume).filter(|volume| !volume.deleted);
        let state = state.ok_or(Reason::UnknownVolume)?;
        match state.generation == generation && state.owner.as_deref() == Some(name) {
            true => Ok(state),
            false => Err(Reason::OldGeneration),
        }
    }

    fn confirm(
        &mut self,
        name: &str,
        volume: VolumeId,
        generation: Generation,
        version: MapVersion,
    ) -> Step<T> {
        let Ok(state) = self.owned(name, volume, generation) else { return Ok(()) };
        // A version that does not exist yet confirms nothing about it.
        let version = version.min(state.map_version);
        let reads = self.reads.entry(volume).or_default();
        if version > reads.confirmed {
            reads.confirmed = version;
            self.settle_reads(volume)?;
        }
        Ok(())
    }

    fn reserve(
        &mut self,
        session: WritebackSession,
        name: &str,
        (request, volume, generation): (u64, VolumeId, Generation),
        (reset, add, drop): (bool, u64, u64),
        out: &mut Output,
    ) -> Step<T> {
        let refused = match self.owned(name, volume, generation) {
            Err(reason) => Some(self.refusal(reason, "the volume is not open here")),
            Ok(_) if add > 0 && self.stopping => {
                Some(self.refusal(Reason::Draining, "the service is stopping"))
            }
            Ok(_) if add > RESERVE_MAX => {
                Some(self.refusal(Reason::NoSpace, "no store is that large"))
            }
            Ok(state) => {
                let now = self.available_credit(volume);
                let base = if reset { 0 } else { now };
                let wanted = base.saturating_add(add).saturating_sub(drop);
                let mut demand = self.credit;
                if let Some(sum) = demand.get_mut(state.replicas as usize) {
                    *sum = sum.saturating_sub(now).saturating_add(wanted);
                }
                match wanted > now && !self.can_promise(state.replicas, &demand) {
                    true => Some(self.no_room(state.replicas, &demand)),
                    false => {
                        let used = self.volumes.get(&volume).map_or(0, |v| v.credit_in_flight);
                        let promised = used + wanted;
                        self.commit(Record::Reserve { volume, promised }, out)?;
                        None
                    }
                }
            }
        };
        let message = match refused {
            Some(refusal) => ToWriteback::Refused { request, refusal },
            None => ToWriteback::Reserved { request, blocks: self.available_credit(volume) },
        };
        self.tell(session, self.when_committed(), message, out);
        Ok(())
    }

    /// Ends every lease that has run out, and every io_end that has lived too long. Every event asks
    /// for this, so the holders and io_ends are only looked at when one of them can be due.
    pub(super) fn expire(&mut self, out: &mut Output) -> Step<T> {
        let now = self.now;
        if now < self.expires_from {
            return Ok(());
        }
        for name in self.writebacks.ended(now) {
            self.expire_writeback(&name, out)?;
        }
        for id in self.stores.ended(now) {
            self.expire_store(id, out)?;
        }
        while let Some((id, ends)) = self.oldest_leased() {
            if now < ends {
                break;
            }
            self.abort(id, Reason::Aborted, None, out)?;
        }
        // Renewals and releases only move what runs to later or end it.
        let shortest = u64::from(self.limits.lease_ms).min(self.limits.io_end_life_max_ms);
        let granted_from_now = now.plus(shortest);
        let next = self.next_expiry();
        self.expires_from = next.map_or(granted_from_now, |next| next.min(granted_from_now));
        Ok(())
    }

    /// When the first lease ends, or the life of the oldest io_end.
    pub(super) fn next_expiry(&self) -> Option<Millis> {
        let leases = [self.writebacks.next_expiry(), self.stores.next_expiry()];
        let life = self.oldest_leased().map(|(_, ends)| ends);
        leases.into_iter().flatten().chain(life).min()
    }

    /// The io_end with live tokens that began first, and when its life ends.
    pub(super) fn oldest_leased(&self) -> Option<(IoEndId, Millis)> {
        // Numbers grow with time; only io_ends that wait for the next drain are passed over.
        let oldest = self.ledger.iter().find(|io_end| !io_end.live.is_empty())?;
        Some((oldest.id, oldest.begun.plus(self.limits.io_end_life_max_ms)))
    }

    fn expire_writeback(&mut self, name: &str, out: &mut Output) -> Step<T> {
        self.writebacks.change(name, |rt| rt.lease = None);
        let submitter = endio_types::SegmentIndex::SUBMITTER;
        let held =
            self.ledger.iter().filter(|e| e.writeback == name && e.live.contains(&submitter));
        let held: Vec<IoEndId> = held.map(|io_end| io_end.id).collect();
        for io_end in held {
            self.abort(io_end, Reason::LeaseExpired, None, out)?;
        }
        Ok(())
    }

    /// Whether a writeback's lease runs.
    pub(super) fn is_alive(&self, writeback: &str) -> bool {
        self.writebacks.get(writeback).is_some_and(|rt| rt.lease.is_some())
    }

    /// A forced stop: everything in flight ends with an error; nothing converts any more.
    pub(super) fn abort_all(&mut self, out: &mut Output) -> Step<T> {
        self.stopping = true;
        let all: Vec<IoEndId> = self.ledger.iter().map(|io_end| io_end.id).collect();
        for io_end in all {
            self.abort(io_end, Reason::Draining, None, out)?;
        }
        let volumes: Vec<VolumeId> = self.changing.iter().copied().collect();
        for volume in volumes {
            self.drop_changes(volume, Reason::Draining, "the service is stopping", out);
        }
        Ok(())
    }
}

/// The instance, with the slash behind it, and the number of the start.
fn start_of(name: &str) -> Option<(&str, u64)> {
    let (instance, start) = name.split_at(name.rfind('/')? + 1);
    Some((instance, start.parse().ok()?))
}
