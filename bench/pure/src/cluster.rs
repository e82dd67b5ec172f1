//! One conversion machine with many block-stores, writebacks and volumes: what each costs it.
//!
//! No codecs and no gates: what they take does not depend on how many peers there are.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use endio_state_machine::extent_map::MemoryTable;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::{
    BeginIo, Call, EffectKind, FromStore, FromWriteback, Input, Lane, Machine, Output, ReplyBody,
    ReplyTo, SegmentOutcome, StoreSession, ToStore, ToWriteback, WritebackSession,
};
use endio_state_machine::record::Snapshot;
use endio_state_machine::token::{Token, TokenKey};
use endio_state_machine::writeback::confirms::Confirms;
use endio_types::{BLOCK_BYTES, Generation, Incarnation, Lblk, MapVersion, Millis, VolumeId};

/// Blocks of each volume.
pub const VOLUME_BLOCKS: u64 = 1 << 20;
/// Blocks of each store: 4 TiB.
const STORE_BLOCKS: u64 = 1 << 30;
/// So often a writeback confirms which maps its reads use, as in its configuration.
const CONFIRM_MS: u64 = 250;

/// How many of each there are.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Block-stores.
    pub stores: u64,
    /// Writebacks.
    pub writebacks: u64,
    /// Volumes, all of them open; each writeback has its share.
    pub volumes: u64,
    /// Blocks that each volume is promised for buffered data.
    pub credit_blocks: u64,
}

/// Where the machine's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// In steps that begin writes.
    pub begin: Duration,
    /// In steps that end them: releases, conversion, and what that frees.
    pub end: Duration,
    /// In looks whether there is something to do, and when: one each turn.
    pub look: Duration,
    /// In renewals of stores.
    pub stores: Duration,
    /// In renewals of writebacks, each with the versions of its volumes that have moved.
    pub writebacks: Duration,
}

#[derive(Clone, Debug)]
struct Volume {
    id: VolumeId,
    generation: Generation,
    writeback: u64,
    version: MapVersion,
}

/// See the module.
#[derive(Debug)]
pub struct Cluster {
    machine: Machine<MemoryTable>,
    shape: Shape,
    volumes: Vec<Volume>,
    by_id: BTreeMap<VolumeId, usize>,
    confirms: Vec<Confirms>,
    now: Millis,
    /// What was spent since the start.
    pub spent: Spent,
    /// Entries of all the lists of stores that writebacks were sent.
    pub listed: u64,
}

impl Cluster {
    /// Everything registered, created and open.
    ///
    /// # Errors
    /// The machine refuses.
    pub fn new(shape: Shape) -> Result<Self> {
        let (table, snapshot) = (MemoryTable::new(), Snapshot::new([1; 16]));
        let mut cluster = Self {
            machine: Machine::recover(limits(), table, snapshot),
            shape,
            volumes: Vec::new(),
            by_id: BTreeMap::new(),
            confirms: Vec::new(),
            now: Millis(1),
            spent: Spent::default(),
            listed: 0,
        };
        cluster.begin_epoch()?;
        cluster.register()?;
        for at in 0..shape.volumes {
            let volume = cluster.create(at)?;
            cluster.by_id.insert(volume.id, cluster.volumes.len());
            cluster.volumes.push(volume);
        }
        Ok(cluster)
    }

    /// What a restart of conversion takes: a copy of the small state, as each checkpoint takes one; then the
    /// state is recovered; then all stores and writebacks come back.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn restart(&mut self) -> Result<[Duration; 3]> {
        let began = Instant::now();
        let snapshot = self.machine.snapshot();
        let copied = began.elapsed();
        let table = self.machine.table_mut().clone();
        let began = Instant::now();
        self.machine = Machine::recover(limits(), table, snapshot);
        self.begin_epoch()?;
        let recovered = began.elapsed();
        self.listed = 0;
        let began = Instant::now();
        self.register()?;
        Ok([copied, recovered, began.elapsed()])
    }

    fn begin_epoch(&mut self) -> Result<()> {
        let mut out = Output::default();
        self.machine
            .finish_recovery(TokenKey::new([7; 32]), self.now, &mut out)
            .map_err(|error| anyhow!("recovery: {error}"))?;
        self.settle(out)?;
        Ok(())
    }

    /// Writebacks come, and then the stores, one in a millisecond.
    fn register(&mut self) -> Result<()> {
        self.confirms = vec![Confirms::default(); self.shape.writebacks as usize];
        for at in 0..self.shape.writebacks {
            let hello = FromWriteback::Hello { writeback: instance(at) };
            self.feed([Input::Writeback { session: WritebackSession(at), message: hello }])?;
        }
        let epoch = self.machine.epoch();
        for at in 0..self.shape.stores {
            self.now = self.now.plus(1);
            let mut uuid = [0; 16];
            uuid[..8].copy_from_slice(&(at + 1).to_le_bytes());
            let register = FromStore::Register {
                uuid,
                incarnation: Incarnation(1),
                capacity_blocks: STORE_BLOCKS,
                url: format!("http://store-{at}.example.net:7301"),
                name: None,
            };
            let session = StoreSession(at);
            self.feed([Input::Store { session, message: register }])?;
            self.feed([Input::Store { session, message: FromStore::Ready { epoch } }])?;
        }
        Ok(())
    }

    fn create(&mut self, at: u64) -> Result<Volume> {
        let (name, writeback) = (format!("volume-{at}"), at % self.shape.writebacks);
        self.call(Call::CreateVolume {
            name: name.clone(),
            size_bytes: VOLUME_BLOCKS * BLOCK_BYTES,
            replicas: 1,
            in_place: false,
            growable: false,
            as_of: None,
        })?;
        let opened = self.call(Call::OpenVolume {
            name,
            volume: None,
            writeback: instance(writeback),
            force: false,
            if_generation: None,
            reads_log: true,
        })?;
        let ReplyBody::Opened(info, ..) = opened else {
            return Err(anyhow!("an open was answered with {opened:?}"));
        };
        let (volume, generation, version) = (info.id, info.generation, info.map_version);
        if self.shape.credit_blocks > 0 {
            let message = FromWriteback::Reserve {
                request: 1,
                volume,
                generation,
                reset: true,
                add_blocks: self.shape.credit_blocks,
                drop_blocks: 0,
            };
            self.feed([Input::Writeback { session: WritebackSession(writeback), message }])?;
        }
        Ok(Volume { id: volume, generation, writeback, version })
    }

    /// A millisecond: one block is written at each of these places (volume and block; no place twice), and who is to
    /// renew a lease does so, stores three times in each.
    ///
    /// # Errors
    /// A write is refused, or the machine cannot go on.
    pub fn turn(&mut self, writes: &[(usize, u64)]) -> Result<()> {
        self.now = self.now.plus(1);
        let begins: Vec<Input> =
            (0..).zip(writes).map(|(at, write)| self.begin(at, *write)).collect();
        let began = Instant::now();
        let effects = self.feed(begins)?;
        self.spent.begin += began.elapsed();
        let mut ends = Vec::with_capacity(2 * writes.len());
        for effect in effects {
            let EffectKind::Writeback(session, told) = effect else { continue };
            let ToWriteback::Begun { submitter, segments, .. } = told else { continue };
            let (token, not_submitted) = (submitter, Vec::new());
            let message = FromWriteback::Release { token, not_submitted, abort: false };
            ends.push(Input::Writeback { session, message });
            ends.extend(segments.into_iter().map(|segment| durable(segment.token)));
        }
        let began = Instant::now();
        let effects = self.feed(ends)?;
        self.spent.end += began.elapsed();
        self.obey(effects, writes.len())?;
        let began = Instant::now();
        std::hint::black_box((self.machine.has_work(), self.machine.next_deadline()));
        self.spent.look += began.elapsed();
        self.renew()
    }

    fn begin(&self, at: u64, (volume, lblk): (usize, u64)) -> Input {
        let volume = &self.volumes[volume];
        let begin = BeginIo {
            request: at,
            volume: volume.id,
            generation: volume.generation,
            lane: Lane::Direct,
            lblk: Lblk(lblk),
            blocks: 1,
            more: Vec::new(),
            size_after_bytes: 0,
            avoid_stores: Vec::new(),
            attempt: 1,
            traceparent: String::new(),
            sync: true,
            logged_up_to: 0,
        };
        let session = WritebackSession(volume.writeback);
        Input::Writeback { session, message: FromWriteback::Begin(begin) }
    }

    /// What stores and writebacks make of what they are told. `expected`: writes that must be completed.
    fn obey(&mut self, effects: Vec<EffectKind>, expected: usize) -> Result<()> {
        let (mut done, mut answers) = (0, Vec::new());
        for effect in effects {
            match effect {
                EffectKind::Writeback(_, ToWriteback::Completion(completion)) => {
                    done += usize::from(completion.failed.is_none());
                    let at = self.by_id.get(&completion.volume).context("an unknown volume")?;
                    self.volumes[*at].version = completion.map_version;
                }
                EffectKind::Store(session, ToStore::Punch { punch, .. }) => {
                    answers.push(Input::Store { session, message: FromStore::PunchDone { punch } });
                }
                EffectKind::Store(session, ToStore::Fence { fence, .. }) => {
                    answers.push(Input::Store { session, message: FromStore::FenceDone { fence } });
                }
                _ => {}
            }
        }
        let began = Instant::now();
        self.feed(answers)?;
        self.spent.end += began.elapsed();
        match done == expected {
            true => Ok(()),
            false => Err(anyhow!("{done} of {expected} writes completed")),
        }
    }

    fn renew(&mut self) -> Result<()> {
        let period = u64::from(limits().lease_ms) / 3;
        let due =
            |count: u64, period: u64, now: u64| (now % period..count).step_by(period as usize);
        let stores = due(self.shape.stores, period, self.now.0);
        let stores =
            stores.map(|at| Input::Store { session: StoreSession(at), message: FromStore::Renew });
        let stores: Vec<Input> = stores.collect();
        let shape = self.shape;
        let (volumes, confirms) = (&self.volumes, &mut self.confirms);
        let writebacks = due(shape.writebacks, CONFIRM_MS, self.now.0).map(|at| {
            let own = volumes.iter().skip(at as usize).step_by(shape.writebacks as usize);
            let all = own.map(|volume| (volume.id, volume.generation, volume.version));
            let confirms = confirms[at as usize].news(all);
            let message = FromWriteback::Renew { confirms };
            Input::Writeback { session: WritebackSession(at), message }
        });
        let writebacks: Vec<Input> = writebacks.collect();
        let began = Instant::now();
        let mut effects = self.feed(stores)?;
        self.spent.stores += began.elapsed();
        let began = Instant::now();
        effects.extend(self.feed(writebacks)?);
        self.spent.writebacks += began.elapsed();
        self.obey(effects, 0)
    }

    fn call(&mut self, call: Call) -> Result<ReplyBody> {
        let effects = self.feed([Input::Call { reply: ReplyTo(1), call }])?;
        let answer = effects.into_iter().find_map(|effect| match effect {
            EffectKind::Reply(_, answer) => Some(answer),
            _ => None,
        });
        Ok(answer.context("a call was not answered")??)
    }

    /// One turn of the driver, with a commit that succeeds at once.
    fn feed(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<Vec<EffectKind>> {
        let mut out = Output::default();
        let fault = |error| anyhow!("the machine: {error}");
        for input in inputs {
            self.machine.handle(self.now, input, &mut out).map_err(fault)?;
        }
        while self.machine.has_work() {
            self.machine.drain(self.now, &mut out).map_err(fault)?;
        }
        self.settle(out)
    }

    fn settle(&mut self, out: Output) -> Result<Vec<EffectKind>> {
        if let Some((seq, _)) = out.records.last() {
            self.machine.committed(*seq).map_err(|error| anyhow!("the machine: {error}"))?;
        }
        for effect in &out.effects {
            if let EffectKind::Writeback(_, ToWriteback::Stores(stores)) = &effect.kind {
                self.listed += stores.len() as u64;
            }
        }
        Ok(out.effects.into_iter().map(|effect| effect.kind).collect())
    }
}

fn limits() -> Limits {
    Limits { volumes_max: 1 << 20, ..Limits::default() }
}

/// Name of a writeback.
fn instance(at: u64) -> String {
    format!("writeback-{at}/1")
}

fn durable(token: Token) -> Input {
    let session = StoreSession(u64::from(token.store.0) - 1);
    let outcome = SegmentOutcome::Durable(vec![0x1234_5678; token.blocks as usize]);
    Input::Store { session, message: FromStore::Release { token, outcome } }
}
