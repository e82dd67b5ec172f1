//! The ledger of io_ends: which tokens live, and how each ended.
//!
//! ```text
//!   (absent) ── begin ──► Leased ── last release, conversion owed ──► Deferred ── convert ──┐
//!                          │  │                                          │                  ▼
//!                          │  └── last release, nothing owed ────────────┼──────────────► (ended)
//!                          └── expire, fence, give up ── abort ──────────┴──────────────────▲
//! ```
//!
//! # Invariants
//! * `live-tokens`: an io_end is deferred or ended if and only if no token of it lives; the tokens
//!   are a set, never a bare count.
//! * `convert-once`: an io_end is converted at most once, and a block of it only if every replica
//!   was released as durable.
//! * `first-outcome`: the first recorded outcome of a token stands.
//! * `one-predicate`: whether conversion is owed is decided once, by [`owes_conversion`], and kept.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use endio_types::{
    BLOCK_BYTES, Generation, Incarnation, IoEndId, Lblk, LblkRange, Millis, Pblk, PblkRange,
    Reason, SegmentIndex, StoreId, VolumeId,
};

use crate::machine::{Lane, SegmentOutcome, WritebackSession};
use crate::record::Run;

/// What the blocks of a piece were when the write began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PieceKind {
    /// Freshly reserved: nobody's map names them.
    Fresh,
    /// In the map as unwritten (in-place volumes): written where they are, then converted.
    Unwritten,
    /// In the map as written (in-place volumes): nothing is owed.
    Overwrite,
}

/// A run of logical blocks that is contiguous on every store that gets a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First logical block.
    pub lblk: Lblk,
    /// Length.
    pub blocks: u32,
    /// What the blocks were.
    pub kind: PieceKind,
    /// One segment per copy, in the order of the places. Pieces of several ranges that lie side by
    /// side on their stores share their segments.
    pub segments: Vec<SegmentIndex>,
    /// First block of the piece inside each of its segments.
    pub offset: u32,
}

impl Piece {
    /// The logical blocks.
    pub fn range(&self) -> LblkRange {
        LblkRange { start: self.lblk, len: u64::from(self.blocks) }
    }
}

/// A recorded outcome.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// As the store said.
    Store(SegmentOutcome),
    /// The submitter never sent it.
    NotSubmitted,
}

impl Outcome {
    /// A short stand-in that differs when the outcome differs (CRCs by a 64-bit hash).
    fn digest(&self) -> Digest {
        match self {
            Self::Store(SegmentOutcome::Durable(crcs)) => Digest::Durable(fnv(crcs)),
            Self::Store(SegmentOutcome::Failed(reason)) => Digest::Failed(*reason),
            Self::NotSubmitted => Digest::NotSubmitted,
        }
    }
}

/// FNV-1a: tells honest repeats from honest conflicts; nothing of safety rests on it.
fn fnv(words: &[u32]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ u64::from(*word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Digest {
    Durable(u64),
    Failed(Reason),
    NotSubmitted,
    Submitted,
}

/// One segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Who holds its token.
    pub store: StoreId,
    /// At grant.
    pub incarnation: Incarnation,
    /// First physical block.
    pub pblk: Pblk,
    /// Length.
    pub blocks: u32,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl Segment {
    /// The physical blocks.
    pub fn range(&self) -> PblkRange {
        PblkRange { start: self.pblk, len: u64::from(self.blocks) }
    }
}

/// One write whose completion may convert extents.
#[derive(Clone, Debug)]
pub struct IoEnd {
    /// Number.
    pub id: IoEndId,
    /// The volume.
    pub volume: VolumeId,
    /// At begin.
    pub generation: Generation,
    /// Where the completion goes.
    pub session: WritebackSession,
    /// Who holds the submitter's token.
    pub writeback: String,
    /// Its lane.
    pub lane: Lane,
    /// Logical blocks: at least one range; ascending, without overlap.
    pub ranges: Vec<LblkRange>,
    /// Bytes; 0: does not extend.
    pub size_after_bytes: u64,
    /// From 1.
    pub attempt: u32,
    /// As given.
    pub traceparent: String,
    /// When it began.
    pub begun: Millis,
    /// Logical pieces, ascending.
    pub pieces: Vec<Piece>,
    /// Segments; index 1 is the first.
    pub segments: Vec<Segment>,
    /// Tokens that live.
    pub live: BTreeSet<SegmentIndex>,
    /// Conversion is owed.
    pub owes_conversion: bool,
    /// Logical blocks taken from the volume's credit.
    pub credit: u64,
    /// The first failure, and the store where it happened.
    pub failed: Option<(Reason, Option<StoreId>)>,
    /// When the last token was released.
    pub released: Option<Millis>,
    /// Position in the order of last releases; 0 while tokens live.
    pub release_order: u64,
    /// Another io_end in flight overlapped it at some time.
    pub overlapped: bool,
    /// What the data log has of its blocks up to this number ends with its conversion.
    pub logged_up_to: u64,
}

/// The one predicate that says whether an io_end owes conversion: a piece is not written yet, or
/// the volume grows.
pub fn owes_conversion(pieces: &[Piece], grows: bool) -> bool {
    grows || pieces.iter().any(|piece| piece.kind != PieceKind::Overwrite)
}

impl IoEnd {
    /// The segment of an index.
    pub fn segment(&self, index: SegmentIndex) -> Option<&Segment> {
        self.segments.get((index.0 as usize).checked_sub(1)?)
    }

    /// Logical blocks of all ranges.
    pub fn blocks(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// The range from the first block to the last, for people.
    pub fn span(&self) -> LblkRange {
        let start = self.ranges.first().map_or(0, |range| range.start.0);
        let end = self.ranges.last().map_or(0, |range| range.end());
        LblkRange::new(start, end.saturating_sub(start))
    }

    /// Whether a block is written by both.
    pub fn overlaps(&self, other: &Self) -> bool {
        // Both ascend, so whichever ends first can be left behind.
        let (mut mine, mut theirs) = (self.ranges.iter(), other.ranges.iter());
        let (mut one, mut two) = (mine.next(), theirs.next());
        while let (Some(a), Some(b)) = (one, two) {
            if a.overlaps(*b) {
                return true;
            }
            match a.end() <= b.end() {
                true => one = mine.next(),
                false => two = theirs.next(),
            }
        }
        false
    }

    /// Where the copies of a piece lie.
    pub fn places<'a>(
        &'a self,
        piece: &'a Piece,
    ) -> impl Iterator<Item = (StoreId, PblkRange)> + 'a {
        let segments = piece.segments.iter().filter_map(|index| self.segment(*index));
        segments.map(|segment| {
            let start = segment.pblk.0 + u64::from(piece.offset);
            (segment.store, PblkRange::new(start, piece.blocks.into()))
        })
    }

    fn segment_mut(&mut self, index: SegmentIndex) -> Option<&mut Segment> {
        self.segments.get_mut((index.0 as usize).checked_sub(1)?)
    }

    /// Records how a segment ended and drops its token.
    ///
    /// # Errors
    /// `UnknownToken`: no such segment. `OutcomeConflict`: it ended otherwise before.
    pub fn release(&mut self, index: SegmentIndex, outcome: Outcome) -> Result<Released, Reason> {
        let segment = self.segment_mut(index).ok_or(Reason::UnknownToken)?;
        if let Some(first) = &segment.outcome {
            return match first.digest() == outcome.digest() {
                true => Ok(Released::Again),
                false => Err(Reason::OutcomeConflict),
            };
        }
        let store = segment.store;
        let failure = match &outcome {
            Outcome::Store(SegmentOutcome::Failed(reason)) => Some(*reason),
            _ => None,
        };
        segment.outcome = Some(outcome);
        self.live.remove(&index);
        if let (Some(reason), None) = (failure, self.failed) {
            self.failed = Some((reason, Some(store)));
        }
        Ok(Released::First)
    }

    /// Whether every copy of the piece is durable.
    pub fn is_durable(&self, piece: &Piece) -> bool {
        piece.segments.iter().all(|index| {
            let outcome = self.segment(*index).and_then(|segment| segment.outcome.as_ref());
            matches!(outcome, Some(Outcome::Store(SegmentOutcome::Durable(_))))
        })
    }

    /// Whether some copies of a durable piece differ: one of them is not what was sent.
    pub fn has_mismatch(&self) -> bool {
        self.pieces.iter().filter(|piece| self.is_durable(piece)).any(|piece| {
            let mut digests = piece
                .segments
                .iter()
                .filter_map(|index| self.segment(*index)?.outcome.as_ref().map(Outcome::digest));
            let first = digests.next();
            digests.any(|digest| Some(digest) != first)
        })
    }

    /// The logical ranges whose data is durable, ascending and merged.
    pub fn durable_ranges(&self) -> Vec<LblkRange> {
        let mut ranges: Vec<LblkRange> = Vec::new();
        for piece in self.pieces.iter().filter(|piece| self.is_durable(piece)) {
            match ranges.last_mut() {
                Some(last) if last.end() == piece.lblk.0 => last.len += u64::from(piece.blocks),
                _ => ranges.push(piece.range()),
            }
        }
        ranges
    }

    /// Logical blocks whose data is durable.
    pub fn durable_blocks(&self) -> u64 {
        let durable = self.pieces.iter().filter(|piece| self.is_durable(piece));
        durable.map(|piece| u64::from(piece.blocks)).sum()
    }

    /// The size that the durable part extends the volume to, bytes: never beyond its last block.
    pub fn durable_size(&self) -> u64 {
        let end = self.durable_ranges().last().map_or(0, |range| range.end());
        self.size_after_bytes.min(end.saturating_mul(BLOCK_BYTES))
    }

    /// What conversion makes written, ascending, with what the blocks were before.
    pub fn runs(&self, keep_crcs: bool) -> Vec<(PieceKind, Run)> {
        let owing = self.pieces.iter().filter(|piece| piece.kind != PieceKind::Overwrite);
        owing
            .filter(|piece| self.is_durable(piece))
            .map(|piece| {
                let first = piece.segments.first().and_then(|index| self.segment(*index));
                let part = piece.offset as usize..(piece.offset + piece.blocks) as usize;
                let crcs = first.and_then(|segment| match &segment.outcome {
                    Some(Outcome::Store(SegmentOutcome::Durable(crcs))) if keep_crcs => {
                        crcs.get(part).map(<[u32]>::to_vec)
                    }
                    _ => None,
                });
                let run = Run {
                    lblk: piece.lblk,
                    blocks: piece.blocks,
                    places: self.places(piece).map(|(store, at)| (store, at.start)).collect(),
                    crcs: crcs.unwrap_or_default(),
                };
                (piece.kind, run)
            })
            .collect()
    }
}

/// Whether a release changed something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Released {
    /// It was recorded.
    First,
    /// It had been recorded before, with the same outcome.
    Again,
}

/// What is remembered of an io_end that has ended.
#[derive(Clone, Debug)]
struct Ended {
    /// `None`: it succeeded.
    reason: Option<Reason>,
    /// By token index; `None`: the token was never released.
    tokens: Vec<Option<Digest>>,
}

/// All io_ends in flight, and a bounded memory of those that ended.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    io_ends: BTreeMap<IoEndId, IoEnd>,
    ended: BTreeMap<IoEndId, Ended>,
    ended_order: VecDeque<IoEndId>,
    ended_max: usize,
    /// Ended ones that may still write to blocks in the map, and the volume of each.
    lingering: BTreeMap<IoEndId, VolumeId>,
}

impl Ledger {
    /// Remembers at most `ended_max` ended io_ends.
    pub fn new(ended_max: usize) -> Self {
        Self { ended_max, ..Self::default() }
    }
    /// Adds one that begins.
    pub fn insert(&mut self, io_end: IoEnd) {
        self.io_ends.insert(io_end.id, io_end);
    }
    /// One in flight.
    pub fn get(&self, id: IoEndId) -> Option<&IoEnd> {
        self.io_ends.get(&id)
    }
    /// One in flight.
    pub fn get_mut(&mut self, id: IoEndId) -> Option<&mut IoEnd> {
        self.io_ends.get_mut(&id)
    }
    /// All in flight, by number.
    pub fn iter(&self) -> impl Iterator<Item = &IoEnd> {
        self.io_ends.values()
    }
    /// Number in flight.
    pub fn len(&self) -> usize {
        self.io_ends.len()
    }
    /// Whether none is in flight.
    pub fn is_empty(&self) -> bool {
        self.io_ends.is_empty()
    }
    /// The lowest in flight.
    pub fn first(&self) -> Option<&IoEnd> {
        self.io_ends.values().next()
    }

    /// Takes one out and remembers how it ended. `reason`: `None` for success.
    pub fn end(&mut self, id: IoEndId, reason: Option<Reason>) -> Option<IoEnd> {
        let io_end = self.io_ends.remove(&id)?;
        let submitter =
            (!io_end.live.contains(&SegmentIndex::SUBMITTER)).then_some(Digest::Submitted);
        let segments = io_end.segments.iter().map(|s| s.outcome.as_ref().map(Outcome::digest));
        let tokens = std::iter::once(submitter).chain(segments).collect();
        self.ended.insert(id, Ended { reason, tokens });
        self.ended_order.push_back(id);
        while self.ended_order.len() > self.ended_max {
            if let Some(oldest) = self.ended_order.pop_front() {
                self.ended.remove(&oldest);
            }
        }
        Some(io_end)
    }

    /// Notes that one that has ended may still write in place, until it is fenced.
    pub fn linger(&mut self, id: IoEndId, volume: VolumeId) {
        self.lingering.insert(id, volume);
    }
    /// The volume of an ended one that may still write in place; `None`: it cannot.
    pub fn lingers(&self, id: IoEndId) -> Option<VolumeId> {
        self.lingering.get(&id).copied()
    }
    /// It is fenced everywhere. Idempotent.
    pub fn lingers_no_more(&mut self, id: IoEndId) {
        self.lingering.remove(&id);
    }

    /// The answer to a release of a token whose io_end is not in flight. `outcome`: `None` for the
    /// submitter's.
    ///
    /// # Errors
    /// Why it is refused; `UnknownIoEnd` if the io_end never was or is forgotten.
    pub fn release_ended(
        &self,
        id: IoEndId,
        index: SegmentIndex,
        outcome: Option<&Outcome>,
    ) -> Result<Released, Reason> {
        let ended = self.ended.get(&id).ok_or(Reason::UnknownIoEnd)?;
        let token = ended.tokens.get(index.0 as usize).ok_or(Reason::UnknownToken)?;
        let given = outcome.map_or(Digest::Submitted, Outcome::digest);
        match token {
            Some(first) if *first == given => Ok(Released::Again),
            Some(_) => Err(Reason::OutcomeConflict),
            None => Err(ended.reason.unwrap_or(Reason::UnknownToken)),
        }
    }
}
