//! A machine with a journal in memory, and peers that do what a test says.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use endio_state_machine::data_log::LogEntry;
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_state_machine::record::{Record, Seq, Snapshot};
use endio_state_machine::token::{Token, TokenKey};
use endio_types::*;

use crate::table::FaultyTable;

pub const WB: WritebackSession = WritebackSession(1);

pub struct Rig {
    pub machine: Machine<FaultyTable>,
    pub now: Millis,
    pub journal: Vec<(Seq, Record)>,
    /// Records up to here are durable.
    pub durable: usize,
    waiting: Vec<Effect>,
    /// Everything that left the process, in order.
    pub sent: Vec<EffectKind>,
    pub replies: BTreeMap<u64, Result<ReplyBody, Refusal>>,
    pub completions: Vec<Completion>,
    pub batches: Vec<ConvertedBatch>,
    pub limits: Limits,
    next: u64,
    pub auto_commit: bool,
    epoch_no: u8,
}

#[derive(Clone, Debug)]
pub struct Begun {
    pub submitter: Token,
    pub segments: Vec<GrantedSegment>,
    pub owes: bool,
    /// What was asked for.
    pub ranges: Vec<LblkRange>,
}

impl Begun {
    /// The logical blocks of a segment, in the order of its data.
    pub fn lblks(&self, segment: &GrantedSegment) -> Vec<u64> {
        let all = self.ranges.iter().flat_map(|range| range.start.0..range.end());
        let (skip, take) = (segment.offset_blocks as usize, segment.token.blocks as usize);
        let lblks: Vec<u64> = all.skip(skip).take(take).collect();
        assert_eq!(lblks.first(), Some(&segment.lblk.0), "a segment says where it begins");
        lblks
    }
}

pub fn limits() -> Limits {
    Limits { lease_ms: 1000, io_end_life_max_ms: 10_000, ..Limits::default() }
}

impl Rig {
    /// `stores` stores of `capacity` blocks, ready; a writeback "wb" on session [`WB`].
    pub fn new(stores: u64, capacity: u64) -> Self {
        Self::with_limits(stores, capacity, limits())
    }

    pub fn with_limits(stores: u64, capacity: u64, limits: Limits) -> Self {
        let snapshot = Snapshot::new([1; 16]);
        let mut rig = Self {
            machine: Machine::recover(limits.clone(), FaultyTable::new(), snapshot),
            now: Millis(1),
            journal: Vec::new(),
            durable: 0,
            waiting: Vec::new(),
            sent: Vec::new(),
            replies: BTreeMap::new(),
            completions: Vec::new(),
            batches: Vec::new(),
            limits,
            next: 100,
            auto_commit: true,
            epoch_no: 1,
        };
        rig.start();
        for store in 1..=stores {
            rig.join_store(store, 1, capacity);
        }
        rig.hello(WB, "wb");
        rig
    }

    fn start(&mut self) {
        self.begin_epoch();
        self.commit();
    }

    fn begin_epoch(&mut self) {
        let mut out = Output::default();
        let key = TokenKey::new([self.epoch_no; 32]);
        self.machine.finish_recovery(key, self.now, &mut out).unwrap();
        self.absorb(out);
    }

    /// The process dies; only durable records remain. Chunks are replayed from nothing.
    pub fn crash(&mut self) {
        self.replay();
        self.start();
    }

    /// As [`Self::crash`]; nothing is committed after it.
    pub fn crash_before_epoch(&mut self) {
        self.replay();
        self.auto_commit = false;
        self.begin_epoch();
    }

    /// The process ends and starts again from a checkpoint of all that is durable.
    pub fn restart_from_snapshot(&mut self) {
        self.commit();
        self.epoch_no = self.epoch_no.wrapping_add(1);
        let (snapshot, table) = (self.machine.snapshot(), self.machine.table_mut().clone());
        self.machine = Machine::recover(self.limits.clone(), table, snapshot);
        self.start();
    }

    fn replay(&mut self) {
        self.journal.truncate(self.durable);
        self.waiting.clear();
        self.epoch_no = self.epoch_no.wrapping_add(1);
        let snapshot = Snapshot::new([1; 16]);
        self.machine = Machine::recover(self.limits.clone(), FaultyTable::new(), snapshot);
        for (seq, record) in &self.journal {
            self.machine.apply(*seq, record).unwrap();
        }
    }

    fn absorb(&mut self, out: Output) {
        self.journal.extend(out.records);
        self.waiting.extend(out.effects);
        self.batches.extend(out.batches);
        self.deliver();
        if self.auto_commit {
            self.commit();
        }
    }

    fn deliver(&mut self) {
        let durable = self.durable as u64;
        let waiting = std::mem::take(&mut self.waiting);
        for effect in waiting {
            match effect.after {
                Durability::Committed(seq) if seq > durable => self.waiting.push(effect),
                _ => self.leave(effect.kind),
            }
        }
    }

    fn leave(&mut self, kind: EffectKind) {
        match &kind {
            EffectKind::Reply(to, body) => {
                let twice = self.replies.insert(to.0, body.clone());
                assert!(twice.is_none(), "a call was answered twice");
            }
            EffectKind::Writeback(_, ToWriteback::Completion(completion)) => {
                let id = completion.io_end;
                let twice = self.completions.iter().any(|other| other.io_end == id);
                assert!(!twice, "io_end {id} completed twice");
                self.completions.push(completion.clone());
            }
            _ => {}
        }
        self.sent.push(kind);
    }

    pub fn commit(&mut self) {
        self.durable = self.journal.len();
        self.machine.committed(self.durable as u64).unwrap();
        self.deliver();
    }

    pub fn input(&mut self, input: Input) {
        let mut out = Output::default();
        self.machine.handle(self.now, input, &mut out).unwrap();
        self.absorb(out);
    }

    pub fn drain_once(&mut self) {
        let mut out = Output::default();
        self.machine.drain(self.now, &mut out).unwrap();
        self.absorb(out);
    }

    /// Drains until nothing is left to do.
    pub fn drain(&mut self) {
        for _ in 0..1000 {
            if !self.machine.has_work() {
                return;
            }
            self.drain_once();
        }
        panic!("the machine never comes to rest");
    }

    pub fn advance(&mut self, ms: u64) {
        self.now = self.now.plus(ms);
        self.input(Input::Tick);
    }

    pub fn store(&mut self, store: u64, message: FromStore) {
        self.input(Input::Store { session: StoreSession(store), message });
    }

    pub fn register(&mut self, store: u64, incarnation: u64, capacity: u64) {
        let message = FromStore::Register {
            uuid: [store as u8; 16],
            incarnation: Incarnation(incarnation),
            capacity_blocks: capacity,
            url: format!("memory:store-{store}"),
            name: None,
        };
        self.store(store, message);
    }

    pub fn join_store(&mut self, store: u64, incarnation: u64, capacity: u64) {
        self.register(store, incarnation, capacity);
        self.ready(store);
    }

    pub fn ready(&mut self, store: u64) {
        let epoch = self.machine.epoch();
        self.store(store, FromStore::Ready { epoch });
    }

    pub fn say(&mut self, message: FromWriteback) {
        self.input(Input::Writeback { session: WB, message });
    }

    pub fn hello(&mut self, session: WritebackSession, name: &str) {
        let message = FromWriteback::Hello { writeback: name.to_owned() };
        self.input(Input::Writeback { session, message });
    }

    /// Renews every holder and lets stores acknowledge fences.
    pub fn keep_alive(&mut self, stores: u64) {
        self.say(FromWriteback::Renew { confirms: vec![] });
        for store in 1..=stores {
            self.store(store, FromStore::Renew);
        }
    }

    pub fn call_later(&mut self, call: Call) -> u64 {
        self.next += 1;
        let reply = self.next;
        self.input(Input::Call { reply: ReplyTo(reply), call });
        reply
    }

    pub fn call(&mut self, call: Call) -> Result<ReplyBody, Refusal> {
        let reply = self.call_later(call);
        self.drain();
        self.replies.get(&reply).cloned().expect("the call was answered")
    }

    /// Creates and opens a volume.
    pub fn volume(&mut self, name: &str, blocks: u64, replicas: u32) -> VolumeInfo {
        self.create(name, blocks * BLOCK_BYTES, replicas, false, false);
        self.open(name, "wb")
    }

    pub fn create(&mut self, name: &str, bytes: u64, replicas: u32, in_place: bool, grow: bool) {
        let call = Call::CreateVolume {
            name: name.to_owned(),
            size_bytes: bytes,
            replicas,
            in_place,
            growable: grow,
            as_of: None,
        };
        self.call(call).unwrap();
    }

    pub fn open(&mut self, name: &str, writeback: &str) -> VolumeInfo {
        let (name, writeback) = (name.to_owned(), writeback.to_owned());
        let call = Call::OpenVolume {
            name,
            volume: None,
            writeback,
            force: true,
            if_generation: None,
            reads_log: true,
        };
        match self.call(call).unwrap() {
            ReplyBody::Opened(info, ..) => info,
            other => panic!("{other:?}"),
        }
    }

    pub fn change(
        &mut self,
        volume: &VolumeInfo,
        change: MapChange,
        lblk: u64,
        blocks: u64,
    ) -> Result<u64, Refusal> {
        match self.call(change_call(volume, change, lblk, blocks))? {
            ReplyBody::Changed { blocks_changed, .. } => Ok(blocks_changed),
            other => panic!("{other:?}"),
        }
    }

    pub fn try_begin(&mut self, begin: BeginIo) -> Result<Begun, Refusal> {
        let request = begin.request;
        let ranges = begin.ranges();
        let from = self.sent.len();
        self.say(FromWriteback::Begin(begin));
        for kind in &self.sent[from..] {
            match kind {
                EffectKind::Writeback(
                    _,
                    ToWriteback::Begun { request: r, submitter, segments, owes_conversion },
                ) if *r == request => {
                    return Ok(Begun {
                        submitter: *submitter,
                        segments: segments.clone(),
                        owes: *owes_conversion,
                        ranges,
                    });
                }
                EffectKind::Writeback(_, ToWriteback::Refused { request: r, refusal })
                    if *r == request =>
                {
                    return Err(refusal.clone());
                }
                _ => {}
            }
        }
        panic!("BeginIo was not answered")
    }

    /// The answer to a message to the data log, if there is one yet.
    pub fn log_answer(&self, request: u64) -> Option<Result<(), Refusal>> {
        self.sent.iter().find_map(|kind| match kind {
            EffectKind::Writeback(_, ToWriteback::Logged { request: r }) if *r == request => {
                Some(Ok(()))
            }
            EffectKind::Writeback(_, ToWriteback::Refused { request: r, refusal })
                if *r == request =>
            {
                Some(Err(refusal.clone()))
            }
            _ => None,
        })
    }

    /// Space for buffered data of a volume, if there is any.
    pub fn promise(&mut self, volume: VolumeId, generation: Generation, add_blocks: u64) {
        let (request, drop_blocks) = (log_request(), 0);
        let reset = false;
        self.say(FromWriteback::Reserve {
            request,
            volume,
            generation,
            reset,
            add_blocks,
            drop_blocks,
        });
    }

    /// Sends data for the log; for what has no promise of space, one is asked for.
    pub fn try_log(&mut self, log: LogData) -> Result<(), Refusal> {
        match self.try_log_as_it_is(log.clone()) {
            Err(refusal) if refusal.reason == Reason::NoSpace => {
                self.promise(log.volume, log.generation, log.entries.len() as u64);
                self.try_log_as_it_is(log)
            }
            answer => answer,
        }
    }

    /// Under a request's number of its own.
    pub fn try_log_as_it_is(&mut self, mut log: LogData) -> Result<(), Refusal> {
        let request = log_request();
        log.request = request;
        self.say(FromWriteback::Log(log));
        self.log_answer(request).expect("LogData was answered")
    }

    /// Logs blocks that are full of a byte.
    pub fn log(
        &mut self,
        volume: &VolumeInfo,
        number: u64,
        blocks: &[(u64, u8)],
    ) -> Result<(), Refusal> {
        self.try_log(log_data(volume, number, blocks))
    }

    /// What the data log has for the owner of a volume: block, number, byte that it is full of.
    pub fn logged(&self, volume: &VolumeInfo) -> Vec<(u64, u64, u8)> {
        let all = self.machine.logged(volume.id, volume.generation, Lblk(0), usize::MAX).unwrap();
        let plain = all.iter().map(|(lblk, logged)| {
            assert_eq!(logged.data, vec![logged.data[0]; BLOCK_SIZE]);
            (lblk.0, logged.number, logged.data[0])
        });
        plain.collect()
    }

    pub fn begin(&mut self, volume: &VolumeInfo, lblk: u64, blocks: u32) -> Begun {
        self.try_begin(begin_io(volume, lblk, blocks)).unwrap()
    }

    /// The answer to a release of a segment.
    pub fn release(&mut self, token: &Token, outcome: SegmentOutcome) -> Option<Reason> {
        let from = self.sent.len();
        let message = FromStore::Release { token: *token, outcome };
        self.store(u64::from(token.store.0), message);
        let answer = self.sent[from..].iter().find_map(|kind| match kind {
            EffectKind::Store(_, ToStore::Released { refused, .. }) => Some(*refused),
            _ => None,
        });
        answer.expect("the release was answered")
    }

    pub fn durable_release(&mut self, token: &Token) -> Option<Reason> {
        self.release(token, SegmentOutcome::Durable(vec![7; token.blocks as usize]))
    }

    pub fn submit(&mut self, token: &Token) -> Option<Reason> {
        self.submit_with(token, vec![], false)
    }

    pub fn submit_with(
        &mut self,
        token: &Token,
        not_submitted: Vec<SegmentIndex>,
        abort: bool,
    ) -> Option<Reason> {
        let from = self.sent.len();
        self.say(FromWriteback::Release { token: *token, not_submitted, abort });
        let answer = self.sent[from..].iter().find_map(|kind| match kind {
            EffectKind::Writeback(_, ToWriteback::Released { refused, .. }) => Some(*refused),
            _ => None,
        });
        answer.expect("the release was answered")
    }

    /// A whole write that succeeds.
    pub fn write(&mut self, volume: &VolumeInfo, lblk: u64, blocks: u32) -> Completion {
        let begun = self.begin(volume, lblk, blocks);
        self.finish(&begun)
    }

    pub fn finish(&mut self, begun: &Begun) -> Completion {
        for segment in &begun.segments {
            assert_eq!(self.durable_release(&segment.token), None);
        }
        assert_eq!(self.submit(&begun.submitter), None);
        self.drain();
        self.completion(begun).expect("the write completed")
    }

    pub fn completion(&self, begun: &Begun) -> Option<Completion> {
        let id = begun.submitter.io_end;
        self.completions.iter().find(|completion| completion.io_end == id).cloned()
    }

    /// Every outstanding fence and punch is acknowledged, until there is none.
    pub fn acknowledge(&mut self) {
        let mut from = 0;
        while from < self.sent.len() {
            let kind = self.sent[from].clone();
            from += 1;
            let EffectKind::Store(session, message) = kind else { continue };
            let message = match message {
                ToStore::Fence { fence, .. } => FromStore::FenceDone { fence },
                ToStore::Punch { punch, .. } => FromStore::PunchDone { punch },
                _ => continue,
            };
            self.input(Input::Store { session, message });
        }
    }

    pub fn confirm(&mut self, volume: &VolumeInfo) {
        let version = self.machine.volume(&volume.name).unwrap().map_version;
        let confirms = vec![(volume.id, volume.generation, version)];
        self.say(FromWriteback::Renew { confirms });
    }

    /// Blocks of a volume that are written, as (lblk, store, pblk) of each first copy.
    pub fn written(&mut self, volume: &VolumeInfo) -> Vec<u64> {
        self.blocks(volume, endio_state_machine::chunk::ExtentState::Written)
    }

    pub fn unwritten(&mut self, volume: &VolumeInfo) -> Vec<u64> {
        self.blocks(volume, endio_state_machine::chunk::ExtentState::Unwritten)
    }

    fn blocks(
        &mut self,
        volume: &VolumeInfo,
        state: endio_state_machine::chunk::ExtentState,
    ) -> Vec<u64> {
        let whole = LblkRange::new(0, 1 << 40);
        let extents = self.machine.extents(&volume.name, whole).unwrap().unwrap_or_default();
        let extents = extents.into_iter().filter(|extent| extent.state == state);
        extents.flat_map(|extent| extent.range.start.0..extent.range.end()).collect()
    }

    /// Physical home of a block's first copy.
    pub fn place(&mut self, volume: &VolumeInfo, lblk: u64) -> Option<(StoreId, Pblk)> {
        let range = LblkRange::new(lblk, 1);
        let extents = self.machine.extents(&volume.name, range).unwrap().unwrap();
        extents.first().map(|e| (e.places.as_slice()[0].store, e.places.as_slice()[0].pblk))
    }

    pub fn assert_sound(&mut self) {
        let report = self.machine.check().unwrap();
        assert!(report.findings.is_empty(), "{:#?}", report.findings);
    }

    pub fn count(&self, wanted: impl Fn(&EffectKind) -> bool) -> usize {
        self.sent.iter().filter(|kind| wanted(kind)).count()
    }

    pub fn conversions(&self) -> usize {
        self.journal.iter().filter(|(_, record)| is_conversion(record)).count()
    }
}

pub fn change_call(volume: &VolumeInfo, change: MapChange, lblk: u64, blocks: u64) -> Call {
    let range = LblkRange::new(lblk, blocks);
    let (volume, generation) = (volume.id, volume.generation);
    Call::ChangeMap { volume, generation, change, range, attempt: Attempt::default() }
}

pub fn begin_io(volume: &VolumeInfo, lblk: u64, blocks: u32) -> BeginIo {
    BeginIo {
        request: 1,
        volume: volume.id,
        generation: volume.generation,
        lane: Lane::Direct,
        lblk: Lblk(lblk),
        blocks,
        more: vec![],
        size_after_bytes: 0,
        avoid_stores: vec![],
        attempt: 1,
        traceparent: String::new(),
        sync: false,
        logged_up_to: 0,
    }
}

fn is_conversion(record: &Record) -> bool {
    matches!(record, Record::Convert(_) | Record::ConvertLogged { .. })
}

/// A number that no other request has.
fn log_request() -> u64 {
    static REQUEST: AtomicU64 = AtomicU64::new(1 << 32);
    REQUEST.fetch_add(1, Ordering::Relaxed)
}

/// A message to the data log: blocks, each full of a byte.
pub fn log_data(volume: &VolumeInfo, number: u64, blocks: &[(u64, u8)]) -> LogData {
    let mut data = Vec::new();
    let mut entries = Vec::new();
    for (lblk, fill) in blocks {
        let block = vec![*fill; BLOCK_SIZE];
        let end_bytes = lblk.saturating_add(1).saturating_mul(BLOCK_BYTES);
        let (crc, stamp) = (crc32c::crc32c(&block), u64::from(*fill));
        entries.push(LogEntry { lblk: Lblk(*lblk), end_bytes, crc, stamp });
        data.extend(block);
    }
    LogData {
        request: log_request(),
        volume: volume.id,
        generation: volume.generation,
        number,
        entries,
        data: data.into(),
    }
}
