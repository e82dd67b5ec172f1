//! Retry keys: a request of a session is applied at most once.
//!
//! A client numbers the requests of a session from 1 and marks second tries. Per session the table
//! remembers which numbers were applied, in bounded memory:
//! * `low`: every number up to it was applied;
//! * above it, single numbers with their results, at most `window` of them;
//! * `floor`: when the window overflows because some number was never applied (the client gave it
//!   up), the lowest numbers are forgotten, and what is unknown up to the floor stays unknown.
//!
//! A retry of a session that is **not known here**:
//! * number above 1: [`Decision::UnknownSession`]. Number 1 was sent before it, so there was
//!   state, and it is not here: the request may have been applied.
//! * number 1: new, unless this table knows that its memory has a gap (it has forgotten a session,
//!   or [`SessionTable::mark_memory_lost`]): nothing shows that the first try arrived.
//!
//! A first try of a session that is not known creates it. Retries below the number that created
//! it, and not seen since, are [`Decision::TooOld`]: they belong to an earlier life of the session.
//! A session therefore begins as soon as a request of it arrives, even one that is then refused
//! ([`SessionTable::meet`]), and the log is told of one that begins with number 1: its later requests
//! may be applied before the first, and be all that is known of it after a restart.
//! A session that is known, of which a power loss may have taken the newest requests
//! ([`SessionTable::mark_memory_lost`]), is like one of an earlier life up to its next first try:
//! a retry that is not known to be applied is [`Decision::TooOld`].
//!
//! A session is forgotten only after it was idle for `idle_min_ms`, so a client that retries for
//! less time than that never meets a forgotten session. First tries may overtake each other, but
//! not by more than that time: a number is above all that were first sent so long before it.

use std::collections::{BTreeMap, BTreeSet};

use endio_types::Millis;
use serde::{Deserialize, Serialize};

/// A client's session, chosen at random by the client.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct SessionId(pub [u8; 16]);

/// One request of a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestKey {
    /// The session.
    pub session: SessionId,
    /// The number, from 1.
    pub sequence: u64,
}

/// Bounds of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionLimits {
    /// Most sessions.
    pub sessions_max: usize,
    /// Most single numbers remembered per session above its low-water; at least 1.
    pub window: usize,
    /// Results remembered per session below its low-water.
    pub results_kept: usize,
    /// A session is not forgotten before it was idle so long.
    pub idle_min_ms: u64,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self { sessions_max: 1024, window: 4096, results_kept: 64, idle_min_ms: 600_000 }
    }
}

/// What to do with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Apply it; it is marked in progress until [`SessionTable::applied`] or
    /// [`SessionTable::failed`].
    New,
    /// It was applied before. The result, if it is still remembered.
    Duplicate(Option<u64>),
    /// Another try of it runs now: wait for that one's end and ask again.
    InProgress,
    /// Its outcome is no longer known. Never apply it.
    TooOld,
    /// Its session is not known here, and it must have had state. Never apply it.
    UnknownSession,
    /// The table is full of sessions in use: refuse with a limit, try again later.
    Full,
    /// Number 0 is no number.
    Malformed,
}

/// As the first number of a session's life: none of this life has come, only of the one before.
const NOT_YET: u64 = u64::MAX;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Session {
    low: u64,
    floor: u64,
    /// Number with which this life of the session began. Retries of what came before are not taken.
    first: u64,
    results: BTreeMap<u64, u64>,
    #[serde(skip)]
    running: BTreeSet<u64>,
    #[serde(skip)]
    last_used: Millis,
    /// When its number 1 was first sent here. `None`: it may be older than this table.
    #[serde(skip)]
    began: Option<Millis>,
}

/// Content of the table for the cache log: everything but what is in progress.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SessionSnapshot {
    sessions: Vec<(SessionId, Session)>,
    memory_lost: bool,
}

/// All sessions of one writeback.
#[derive(Clone, Debug)]
pub struct SessionTable {
    limits: SessionLimits,
    sessions: BTreeMap<SessionId, Session>,
    memory_lost: bool,
}

impl SessionTable {
    /// No sessions.
    pub fn new(limits: SessionLimits) -> Self {
        let limits = SessionLimits { window: limits.window.max(1), ..limits };
        Self { limits, sessions: BTreeMap::new(), memory_lost: false }
    }

    /// Decides about a request, and marks it in progress if it is new.
    pub fn begin(&mut self, key: RequestKey, is_retry: bool, now: Millis) -> Decision {
        if key.sequence == 0 {
            return Decision::Malformed;
        }
        self.meet(key, is_retry, now);
        if let Some(session) = self.sessions.get_mut(&key.session) {
            session.last_used = now;
            return session.decide(key.sequence, is_retry);
        }
        if self.is_refused(key, is_retry) { Decision::UnknownSession } else { Decision::Full }
    }

    /// A request has arrived, whatever becomes of it: its session begins here if it may. True: it has
    /// begun now, with number 1, which [`SessionTable::began`] repeats after a restart.
    pub fn meet(&mut self, key: RequestKey, is_retry: bool, now: Millis) -> bool {
        if key.sequence == 0
            || self.sessions.contains_key(&key.session)
            || self.is_refused(key, is_retry)
            || !self.make_room(now)
        {
            return false;
        }
        let began = (key.sequence == 1 && !is_retry).then_some(now);
        let session = Session { first: key.sequence, last_used: now, began, ..Session::default() };
        self.sessions.insert(key.session, session);
        key.sequence == 1
    }

    /// Whether no request of the session can have been applied before `then`: its number 1 was first sent here
    /// since.
    pub fn is_younger(&self, session: SessionId, then: Millis) -> bool {
        self.sessions.get(&session).is_some_and(|session| session.began.is_some_and(|at| at > then))
    }

    /// A session is known from its first request on. For replay of the log: whatever the bound.
    pub fn began(&mut self, session: SessionId, now: Millis) {
        let session = self.sessions.entry(session).or_default();
        session.first = session.first.min(1);
        session.last_used = session.last_used.max(now);
    }

    /// A retry of a session that is not known: state of it is missing here.
    fn is_refused(&self, key: RequestKey, is_retry: bool) -> bool {
        is_retry && (key.sequence > 1 || self.memory_lost)
    }

    /// A request that was new has been applied. `result` is what a duplicate is answered with.
    /// Also for replay of the log: creates the session if need be, whatever the bound. Idempotent.
    pub fn applied(&mut self, key: RequestKey, result: u64, now: Millis) {
        let limits = self.limits;
        let session = self
            .sessions
            .entry(key.session)
            .or_insert_with(|| Session { first: key.sequence, ..Session::default() });
        session.last_used = session.last_used.max(now);
        session.running.remove(&key.sequence);
        session.applied(key.sequence, result, limits);
    }

    /// A request that was new has failed without effect: a later try is new again. Idempotent.
    pub fn failed(&mut self, key: RequestKey) {
        if let Some(session) = self.sessions.get_mut(&key.session) {
            session.running.remove(&key.sequence);
        }
    }

    /// State of sessions may be missing (a power loss took the log's tail): from now on no retry
    /// of an unknown session is taken for new, and none of what a known one sent before.
    pub fn mark_memory_lost(&mut self) {
        self.memory_lost = true;
        self.sessions.values_mut().for_each(|session| session.first = NOT_YET);
    }

    /// Room for one more session, if need be by forgetting the one that is idle longest.
    fn make_room(&mut self, now: Millis) -> bool {
        if self.sessions.len() < self.limits.sessions_max {
            return true;
        }
        let idlest = self
            .sessions
            .iter()
            .filter(|(_, session)| session.running.is_empty())
            .min_by_key(|(_, session)| session.last_used)
            .map(|(id, session)| (*id, session.last_used));
        match idlest {
            Some((id, used)) if now.since(used) >= self.limits.idle_min_ms => {
                self.sessions.remove(&id);
                self.memory_lost = true;
                true
            }
            _ => false,
        }
    }

    /// What the cache log keeps of the table.
    pub fn snapshot(&self) -> SessionSnapshot {
        let sessions = self.sessions.iter().map(|(id, s)| (*id, s.clone())).collect();
        SessionSnapshot { sessions, memory_lost: self.memory_lost }
    }

    /// Merges a snapshot in: afterwards a number counts as applied if either said so.
    /// Idle times start anew at `now`.
    pub fn restore(&mut self, snapshot: SessionSnapshot, now: Millis) {
        if snapshot.memory_lost {
            // Number 1 may have begun the session here as a retry, when this was not known.
            let begun = self.sessions.values_mut().filter(|session| session.first == 1);
            begun.for_each(|session| session.first = NOT_YET);
        }
        self.take_in(snapshot, now, |session, stored| session.first.min(stored.first));
    }

    /// Merges a later snapshot of the same log in: as [`SessionTable::restore`], but in which life a
    /// session is, the later one knows.
    pub fn follow(&mut self, snapshot: SessionSnapshot, now: Millis) {
        self.take_in(snapshot, now, |_, stored| stored.first);
    }

    fn take_in(
        &mut self,
        snapshot: SessionSnapshot,
        now: Millis,
        first: impl Fn(&Session, &Session) -> u64,
    ) {
        self.memory_lost |= snapshot.memory_lost;
        let limits = self.limits;
        for (id, stored) in snapshot.sessions {
            let session = self
                .sessions
                .entry(id)
                .or_insert_with(|| Session { first: stored.first, ..Session::default() });
            session.first = first(session, &stored);
            session.merge(stored, limits);
            session.last_used = now;
        }
    }

    /// Forgets the sessions used longest ago until at most `sessions_max` are left, in progress
    /// or not: for a copy of the table that only records what was applied.
    pub fn forget_idlest(&mut self, sessions_max: usize) {
        while self.sessions.len() > sessions_max {
            let idlest = self.sessions.iter().min_by_key(|(_, session)| session.last_used);
            let Some(id) = idlest.map(|(id, _)| *id) else { return };
            self.sessions.remove(&id);
            self.memory_lost = true;
        }
    }

    /// Sessions remembered.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// No session is remembered.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }
}

impl Session {
    fn decide(&mut self, sequence: u64, is_retry: bool) -> Decision {
        if self.running.contains(&sequence) {
            return Decision::InProgress;
        }
        if let Some(result) = self.results.get(&sequence) {
            return Decision::Duplicate(Some(*result));
        }
        if sequence <= self.low {
            return Decision::Duplicate(None);
        }
        if sequence <= self.floor || (is_retry && sequence < self.first) {
            return Decision::TooOld;
        }
        self.begins_with(sequence);
        self.running.insert(sequence);
        Decision::New
    }

    fn begins_with(&mut self, sequence: u64) {
        if self.first == NOT_YET {
            self.first = sequence;
        }
    }

    fn applied(&mut self, sequence: u64, result: u64, limits: SessionLimits) {
        self.begins_with(sequence);
        if sequence > self.low {
            self.results.entry(sequence).or_insert(result);
        }
        self.trim(limits);
    }

    fn merge(&mut self, other: Self, limits: SessionLimits) {
        self.low = self.low.max(other.low);
        self.floor = self.floor.max(other.floor);
        self.results.extend(other.results);
        self.trim(limits);
    }

    /// Moves the marks up and forgets what the bounds do not allow.
    fn trim(&mut self, limits: SessionLimits) {
        while self.results.contains_key(&(self.low + 1)) {
            self.low += 1;
        }
        // At most `results_kept` lie below the mark after the previous call, so this stays short.
        let mut below = self.results.range(..=self.low).count();
        while below > limits.results_kept {
            self.results.pop_first();
            below -= 1;
        }
        while self.results.len() - below > limits.window {
            let Some((&lowest, _)) = self.results.range(self.low + 1..).next() else { break };
            self.results.remove(&lowest);
            self.floor = self.floor.max(lowest);
        }
    }
}

#[cfg(test)]
#[path = "sessions_tests.rs"]
mod tests;
