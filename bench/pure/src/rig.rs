//! One conversion machine, one gate and one dirty map, wired together.

use anyhow::{Context as _, Result, anyhow};
use bytes::{Bytes, BytesMut};
use endio_api::blockstore::Bio;
use endio_api::conversion as proto;
use endio_api::conversion::conversion_message::Message as Told;
use endio_api::conversion::{store_message, writeback_message};
use endio_api::convert::{self as wire, reason_to_wire, token_from_proto};
use endio_nbd::codec::{Mode, ReplyTo, Request};
use endio_nbd::consts::cmd;
use endio_state_machine::extent_map::ChunkTable;
use endio_state_machine::gate::{Admit, Gate, GateLimits, Registration};
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::{
    Call, EffectKind, FromStore, FromWriteback, Input, Machine, Output, ReplyBody, StoreSession,
    ToStore, ToWriteback, VolumeInfo, WritebackSession,
};
use endio_state_machine::record::Snapshot;
use endio_state_machine::token::TokenKey;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::dirty::{DirtyMap, PickLimit};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, IO_END_RANGES_MAX, Incarnation, LblkRange, Millis};

const WRITEBACK: WritebackSession = WritebackSession(1);
const STORE: StoreSession = StoreSession(2);
const INCARNATION: Incarnation = Incarnation(1);
/// So often the writeback confirms which map its reads use, in turns (= ms), unless it is told.
const CONFIRM_TURNS: u64 = 250;
/// Most blocks of one write-out, as in the writeback's configuration.
const WRITE_OUT_BLOCKS: u64 = 256;

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Records of the journal.
    pub records: u64,
    /// Their bytes.
    pub journal_bytes: u64,
    /// Bytes of messages between the services, data included.
    pub wire_bytes: u64,
    /// Segments that were written.
    pub segments: u64,
}

/// See the module. `T` keeps the extent map.
#[derive(Debug)]
pub struct Rig<T> {
    machine: Machine<T>,
    gate: Gate,
    dirty: DirtyMap<Bytes>,
    now: Millis,
    turns: u64,
    confirm_turns: u64,
    lsn: u64,
    data: Bytes,
    volume: Option<VolumeInfo>,
    cost: Cost,
}

impl<T: ChunkTable> Rig<T> {
    /// One store and one volume of these sizes in blocks, ready.
    ///
    /// # Errors
    /// The table or the machine refuses.
    pub fn new(table: T, store_blocks: u64, volume_blocks: u64) -> Result<Self> {
        let mut rig = Self {
            machine: Machine::recover(Limits::default(), table, Snapshot::new([1; 16])),
            gate: Gate::new(INCARNATION, store_blocks, GateLimits::default()),
            dirty: DirtyMap::new(),
            now: Millis(1),
            turns: 0,
            confirm_turns: CONFIRM_TURNS,
            lsn: 0,
            data: Bytes::from(vec![0x5a; BLOCK_SIZE]),
            volume: None,
            cost: Cost::default(),
        };
        let mut out = Output::default();
        rig.machine
            .finish_recovery(TokenKey::new([7; 32]), rig.now, &mut out)
            .map_err(|error| anyhow!("recovery: {error}"))?;
        rig.settle(out)?;
        let register = FromStore::Register {
            uuid: [1; 16],
            incarnation: INCARNATION,
            capacity_blocks: store_blocks,
            url: "http://store".to_owned(),
            name: None,
        };
        rig.feed(vec![Input::Store { session: STORE, message: register }])?;
        let epoch = rig.machine.epoch();
        let hello = FromWriteback::Hello { writeback: "w".to_owned() };
        rig.feed(vec![
            Input::Store { session: STORE, message: FromStore::Ready { epoch } },
            Input::Writeback { session: WRITEBACK, message: hello },
        ])?;
        rig.call(Call::CreateVolume {
            name: "v".to_owned(),
            size_bytes: volume_blocks * BLOCK_BYTES,
            replicas: 1,
            in_place: false,
            growable: false,
            as_of: None,
        })?;
        let open = Call::OpenVolume {
            name: "v".to_owned(),
            volume: None,
            writeback: "w".to_owned(),
            force: true,
            if_generation: None,
            reads_log: true,
        };
        match rig.call(open)? {
            ReplyBody::Opened(info, ..) => rig.volume = Some(info),
            other => return Err(anyhow!("open was answered with {other:?}")),
        }
        Ok(rig)
    }

    /// Sets after how many turns, at least 1, the writeback confirms which map its reads use.
    pub fn confirm_every(&mut self, turns: u64) {
        self.confirm_turns = turns.max(1);
    }

    /// What was done since the start.
    #[must_use]
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// The machine, to look at it.
    pub fn machine(&mut self) -> &mut Machine<T> {
        &mut self.machine
    }

    /// One turn with a direct write of one block at each of these places, from the request of the
    /// client to its reply. The places differ.
    ///
    /// # Errors
    /// A write was refused, or the table failed.
    pub fn direct(&mut self, lblks: &[u64]) -> Result<()> {
        for lblk in lblks {
            self.request(*lblk)?;
        }
        let ranges = lblks.iter().map(|lblk| vec![LblkRange::new(*lblk, 1)]);
        self.write(ranges.collect(), proto::Lane::Direct)?;
        for lblk in lblks {
            let reply = ReplyTo { mode: Mode::Structured, cookie: *lblk, offset: 0 };
            self.cost.wire_bytes += reply.done().iter().map(|f| f.len() as u64).sum::<u64>();
        }
        self.tick()
    }

    /// One turn that takes a buffered write of one block at each of these places, and then writes
    /// everything out.
    ///
    /// # Errors
    /// As [`Self::direct`].
    pub fn buffered(&mut self, lblks: &[u64]) -> Result<()> {
        for lblk in lblks {
            self.request(*lblk)?;
            self.lsn += 1;
            let range = LblkRange::new(*lblk, 1);
            let data = vec![self.data.clone()];
            self.dirty.insert(range, Lsn(self.lsn), range.end() * BLOCK_BYTES, data)?;
        }
        loop {
            let limit = PickLimit::blocks(WRITE_OUT_BLOCKS);
            let picked = self.dirty.gather(limit, IO_END_RANGES_MAX);
            if picked.is_empty() {
                return self.tick();
            }
            let ranges = picked.iter().map(|picked| picked.range).collect();
            self.write(vec![ranges], proto::Lane::WriteOut)?;
            for picked in picked {
                self.dirty.complete(picked.io)?;
            }
        }
    }

    /// Credit for buffered writes, in blocks.
    ///
    /// # Errors
    /// It was refused.
    pub fn reserve(&mut self, blocks: u64) -> Result<()> {
        let volume = self.volume()?;
        let message = FromWriteback::Reserve {
            request: 1,
            volume: volume.id,
            generation: volume.generation,
            reset: true,
            add_blocks: blocks,
            drop_blocks: 0,
        };
        let effects = self.feed(vec![Input::Writeback { session: WRITEBACK, message }])?;
        let is_refused = |kind: &EffectKind| {
            matches!(kind, EffectKind::Writeback(_, ToWriteback::Refused { .. }))
        };
        if effects.iter().any(is_refused) { Err(anyhow!("no credit")) } else { Ok(()) }
    }

    fn volume(&self) -> Result<&VolumeInfo> {
        self.volume.as_ref().context("no volume is open")
    }

    /// What a client sends, decoded.
    fn request(&mut self, lblk: u64) -> Result<()> {
        let sent = Request {
            flags: 0,
            command: cmd::WRITE,
            cookie: lblk,
            offset: lblk * BLOCK_BYTES,
            length: BLOCK_BYTES,
        };
        let mut bytes = BytesMut::with_capacity(64);
        sent.encode(Mode::Structured, &mut bytes);
        let got = Request::decode(Mode::Structured, &bytes)?;
        self.cost.wire_bytes += bytes.len() as u64 + BLOCK_BYTES;
        if got == sent { Ok(()) } else { Err(anyhow!("the request changed on its way")) }
    }

    /// Carries one io_end for each list of ranges from its begin to its completion.
    fn write(&mut self, io_ends: Vec<Vec<LblkRange>>, lane: proto::Lane) -> Result<()> {
        let expected = io_ends.len();
        let begins = io_ends.iter().zip(0..).map(|(ranges, at)| self.begin(ranges, at, lane));
        let begins = begins.collect::<Result<Vec<_>>>()?;
        let told = self.say(begins)?;
        let mut bios = Vec::new();
        let mut releases = Vec::with_capacity(expected);
        for message in told {
            match message {
                Told::Begun(begun) => {
                    let tokens = begun.segments.into_iter().filter_map(|segment| segment.token);
                    bios.extend(tokens);
                    releases.push(writeback_message::Message::Release(proto::ReleaseSubmitter {
                        token: begun.submitter,
                        not_submitted: Vec::new(),
                        abort: false,
                        traceparent: String::new(),
                    }));
                }
                Told::Refused(refused) => return Err(anyhow!("refused: {}", refused.message)),
                _ => {}
            }
        }
        let mut released = Vec::with_capacity(bios.len());
        for token in bios {
            released.push(self.store(token)?);
        }
        self.say(releases)?;
        let batch = proto::StoreBatch { messages: released };
        let batch = self.travel(&batch)?;
        let inputs = batch.messages.into_iter().map(|message| {
            wire::from_store(message).map(|message| Input::Store { session: STORE, message })
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let effects = self.feed(inputs)?;
        let told = self.tell(effects)?;
        let completed =
            told.iter().filter(|told| matches!(told, Told::Completion(done) if done.reason == 0));
        match completed.count() {
            count if count == expected => Ok(()),
            count => Err(anyhow!("{count} of {expected} writes completed")),
        }
    }

    fn begin(
        &self,
        ranges: &[LblkRange],
        request: u64,
        lane: proto::Lane,
    ) -> Result<writeback_message::Message> {
        let volume = self.volume()?;
        let (first, more) = ranges.split_first().context("a write without a range")?;
        Ok(writeback_message::Message::Begin(proto::BeginIo {
            request,
            volume: volume.id.0,
            generation: volume.generation.0,
            lane: lane.into(),
            lblk: first.start.0,
            blocks: u32::try_from(first.len)?,
            more: more.iter().flat_map(|range| [range.start.0, range.len]).collect(),
            attempt: 1,
            ..proto::BeginIo::default()
        }))
    }

    /// What a block-store does with a bio: checks it, and releases its token.
    fn store(&mut self, token: endio_api::common::Token) -> Result<proto::StoreMessage> {
        let blocks = token.blocks as usize;
        let data = match blocks {
            1 => self.data.clone(),
            blocks => Bytes::from(self.data.repeat(blocks)),
        };
        let crc32c = data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
        let bio = Bio { token: Some(token), data, crc32c, traceparent: String::new() };
        let Bio { token: got, data, crc32c, .. } = self.travel(&bio)?;
        let domain = token_from_proto(got.as_ref())?;
        let admitted = self.gate.admit_bio(self.now, &domain, data.len() as u64);
        let Admit::Write(flight) = admitted.map_err(|reason| anyhow!("refused: {reason:?}"))?
        else {
            return Err(anyhow!("a token was seen before"));
        };
        let mut sums = data.chunks(BLOCK_SIZE).map(crc32c::crc32c);
        if !crc32c.iter().all(|expected| sums.next() == Some(*expected)) {
            return Err(anyhow!("a bio changed on its way"));
        }
        self.gate.finish(flight, Ok(()));
        self.cost.segments += 1;
        let release = proto::SegmentRelease {
            token: got,
            reason: reason_to_wire(None),
            crc32c,
            traceparent: String::new(),
        };
        Ok(proto::StoreMessage { message: Some(store_message::Message::Release(release)) })
    }

    /// Messages of the writeback, and what it is told at once.
    fn say(&mut self, messages: Vec<writeback_message::Message>) -> Result<Vec<Told>> {
        let messages =
            messages.into_iter().map(|m| proto::WritebackMessage { message: Some(m) }).collect();
        let batch = self.travel(&proto::WritebackBatch { messages })?;
        let inputs = batch.messages.into_iter().map(|message| {
            wire::from_writeback(message)
                .map(|message| Input::Writeback { session: WRITEBACK, message })
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let effects = self.feed(inputs)?;
        self.tell(effects)
    }

    /// Effects for the writeback, over the wire; those for the store are obeyed.
    fn tell(&mut self, effects: Vec<EffectKind>) -> Result<Vec<Told>> {
        let mut messages = Vec::with_capacity(effects.len());
        let mut obeyed = Vec::new();
        for effect in effects {
            match effect {
                EffectKind::Writeback(_, message) => {
                    messages.push(wire::to_writeback(message, 0)?);
                }
                EffectKind::Store(_, ToStore::Punch { punch, .. }) => {
                    obeyed.push(FromStore::PunchDone { punch });
                }
                EffectKind::Store(_, ToStore::Fence { fence, .. }) => {
                    obeyed.push(FromStore::FenceDone { fence });
                }
                _ => {}
            }
        }
        let told = self.travel(&proto::ConversionBatch { messages })?;
        let inputs = obeyed.into_iter().map(|message| Input::Store { session: STORE, message });
        self.feed(inputs.collect())?;
        Ok(told.messages.into_iter().filter_map(|message| message.message).collect())
    }

    /// Encodes and decodes a message as the two ends of a stream do.
    fn travel<M: prost::Message + Default>(&mut self, message: &M) -> Result<M> {
        let mut bytes = BytesMut::with_capacity(message.encoded_len());
        message.encode(&mut bytes)?;
        self.cost.wire_bytes += bytes.len() as u64;
        Ok(M::decode(bytes.freeze())?)
    }

    fn call(&mut self, call: Call) -> Result<ReplyBody> {
        let reply = endio_state_machine::machine::ReplyTo(1);
        let effects = self.feed(vec![Input::Call { reply, call }])?;
        let answer = effects.into_iter().find_map(|effect| match effect {
            EffectKind::Reply(_, answer) => Some(answer),
            _ => None,
        });
        Ok(answer.context("a call was not answered")??)
    }

    /// One turn of the driver: inputs, conversion, and a commit that succeeds at once.
    fn feed(&mut self, inputs: Vec<Input>) -> Result<Vec<EffectKind>> {
        let mut out = Output::default();
        for input in inputs {
            self.machine
                .handle(self.now, input, &mut out)
                .map_err(|error| anyhow!("the machine: {error}"))?;
        }
        while self.machine.has_work() {
            self.machine
                .drain(self.now, &mut out)
                .map_err(|error| anyhow!("the machine: {error}"))?;
        }
        self.settle(out)
    }

    fn settle(&mut self, out: Output) -> Result<Vec<EffectKind>> {
        let mut effects = Vec::with_capacity(out.effects.len());
        for (seq, record) in out.records {
            let payload = postcard::to_stdvec(&record)?;
            self.cost.records += 1;
            self.cost.journal_bytes += payload.len() as u64;
            self.machine.committed(seq).map_err(|error| anyhow!("the machine: {error}"))?;
        }
        for effect in out.effects {
            if let EffectKind::Store(
                _,
                ToStore::Registered { store, epoch, key, lease_ms, floor },
            ) = effect.kind
            {
                let lease_ms = lease_ms.into();
                let registration =
                    Registration { store, epoch, key, lease_ms, io_end_floor: floor };
                self.gate
                    .register(self.now, registration)
                    .map_err(|reason| anyhow!("the gate refuses: {reason:?}"))?;
                continue;
            }
            effects.push(effect.kind);
        }
        Ok(effects)
    }

    /// A millisecond passes; now and then leases are renewed and the map version is confirmed.
    fn tick(&mut self) -> Result<()> {
        self.now = self.now.plus(1);
        self.turns += 1;
        if !self.turns.is_multiple_of(self.confirm_turns) {
            return Ok(());
        }
        let name = self.volume()?.name.clone();
        let info = self.machine.volume(&name).context("the volume is gone")?;
        let confirms = vec![(info.id, info.generation, info.map_version)];
        let renew = FromWriteback::Renew { confirms };
        let effects = self.feed(vec![
            Input::Writeback { session: WRITEBACK, message: renew },
            Input::Store { session: STORE, message: FromStore::Renew },
        ])?;
        for effect in &effects {
            if let EffectKind::Store(_, ToStore::Renewed { lease_ms, floor }) = effect {
                self.gate.renewed(self.now, (*lease_ms).into(), *floor);
            }
        }
        self.tell(effects)?;
        Ok(())
    }
}
