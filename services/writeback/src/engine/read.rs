//! Reads: the dirty cache over the map, the map over the stores.
//!
//! What is in memory here, dirty or clean, is answered at once. Else
//! the dirty cache is looked at first and the map after it: what is clean at the first look is in
//! the map by then. What is known of the map needs no look-up (see `map_cache`); if a read fails, it
//! is looked up all the same. The blocks that a map names stay untouched while the read is registered, so a
//! read sees old or new and never what somebody else put there since.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::blockstore::ReadRequest;
use endio_api::common::{Extent, ExtentState, Place, ReadGrant};
use endio_api::conversion::{LookupRequest, LookupResponse};
use endio_chassis::trace::Span;
use endio_failpoints::{Bug, is_planted};
use endio_state_machine::writeback::cover::{gaps, parts};
use endio_state_machine::writeback::map_cache::{Part, Ticket};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, ByteRange, Lblk, LblkRange, MapVersion, Reason};
use futures_util::future::try_join_all;
use tokio::time::Instant;

use super::Engine;
use crate::failure::Failure;
use crate::metrics::Kind;
use crate::volume::Volume;

/// Most blocks that are read at once.
pub(super) const READ_BLOCKS_MAX: u64 = 256;
/// Blocks of the map that a read learns at once, with those around it: as many as conversion keeps
/// together.
const LEARN_BLOCKS: u64 = 1024;

/// A read as it was asked for.
#[derive(Debug, Clone)]
pub struct ReadOp {
    /// Which bytes.
    pub bytes: ByteRange,
    /// W3C traceparent of the caller; empty: none.
    pub traceparent: String,
}

/// A piece of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes.
    Data(Bytes),
    /// So many zero bytes: nothing was ever written there.
    Zeroes(u64),
}

impl Piece {
    /// How many bytes it stands for.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeroes(len) => *len,
        }
    }

    /// Whether it stands for nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn slice(&self, from: u64, to: u64) -> Self {
        match self {
            // Bounds are those of one piece, which is in memory.
            Self::Data(data) => Self::Data(data.slice(from as usize..to as usize)),
            Self::Zeroes(_) => Self::Zeroes(to - from),
        }
    }
}

/// A run of blocks that a read found in one place.
pub(super) struct Run {
    pub(super) range: LblkRange,
    pub(super) piece: Piece,
}

impl Engine {
    /// Reads at most 1 MiB. The pieces are in order and cover the range.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// `OUT_OF_RANGE`, `CHECKSUM_MISMATCH` where no good replica is left, `PEER_AWAY` or
    /// `TIMED_OUT` where a store or conversion is away for the I/O timeout.
    pub async fn read(&self, volume: &Arc<Volume>, op: &ReadOp) -> Result<Vec<Piece>, Failure> {
        let started = Instant::now();
        let span = crate::TRACER
            .entry("read", &op.traceparent)
            .with("volume", &volume.name)
            .with("offset", op.bytes.offset)
            .with("length", op.bytes.len);
        let blocks = volume.check(op.bytes, false)?;
        let outcome = match self.at_hand(volume, blocks) {
            Some(runs) => Ok(runs),
            None => {
                let read = self.read_blocks(volume, blocks, self.deadline());
                span.clone().scope(read).await
            }
        };
        self.metrics.answered(Kind::Read, started.elapsed(), &span, outcome.is_ok());
        match outcome {
            Ok(runs) => {
                volume.reads.add(op.bytes.len, started.elapsed());
                Ok(cut(runs, blocks, op.bytes))
            }
            Err(failure) => {
                span.fail(&failure.detail);
                Err(failure)
            }
        }
    }

    /// Whole blocks that need not be fetched, if all of them are in memory here.
    fn at_hand(&self, volume: &Volume, range: LblkRange) -> Option<Vec<Run>> {
        if range.is_empty() || range.len > READ_BLOCKS_MAX {
            return None;
        }
        let blocks = {
            let state = volume.state();
            let newer = |lblk| state.dirty.read(Lblk(lblk)).map(|block| block.data.clone());
            state.clean.read(range, newer)?
        };
        self.is_ours(volume).ok()?;
        self.metrics.reads_at_hand.inc();
        let run = |(lblk, data)| Run { range: LblkRange::new(lblk, 1), piece: Piece::Data(data) };
        Some((range.start.0..range.end()).zip(blocks).map(run).collect())
    }

    /// Whole blocks, as pieces in order.
    pub(super) async fn read_whole(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<Vec<Piece>, Failure> {
        let bytes = ByteRange { offset: range.start.0 * BLOCK_BYTES, len: range.len * BLOCK_BYTES };
        Ok(cut(self.read_blocks(volume, range, deadline).await?, range, bytes))
    }

    /// Whole blocks, as runs in order.
    pub(super) async fn read_blocks(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<Vec<Run>, Failure> {
        let mut runs = Vec::new();
        let mut at = range.start.0;
        while at < range.end() {
            let len = READ_BLOCKS_MAX.min(range.end() - at);
            runs.extend(self.read_some(volume, LblkRange::new(at, len), deadline).await?);
            at += len;
        }
        Ok(runs)
    }

    async fn read_some(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<Vec<Run>, Failure> {
        let permits = u32::try_from(range.len).unwrap_or(u32::MAX);
        let mut pause = std::time::Duration::from_millis(self.config.retry_first_ms);
        let mut trusts_cache = true;
        loop {
            // For each try: those that wait for a store that is away leave room for others, of other volumes
            // perhaps. They hold no data.
            let room = tokio::time::timeout_at(deadline, self.reads.acquire_many(permits)).await;
            let room = match room {
                Ok(Ok(room)) => room,
                Ok(Err(_)) => return Err(Failure::draining()),
                Err(_) => {
                    return Err(Failure::new(Reason::Limit, "too many bytes of reads in flight"));
                }
            };
            let failure = match self.try_read(volume, range, &mut trusts_cache, deadline).await {
                Ok(runs) => return Ok(runs),
                Err(failure) => failure,
            };
            drop(room);
            volume.usable()?;
            if std::mem::take(&mut trusts_cache) {
                // Whatever is wrong with the blocks, first of all they must be the right ones.
                let mut state = volume.state();
                state.map.forget(range);
                state.clean.forget(range);
                continue;
            }
            // What a fence, a restart or a moved block refuses, a new look-up mends.
            let passes = matches!(
                failure.reason,
                Reason::OldEpoch
                    | Reason::OldGeneration
                    | Reason::PeerAway
                    | Reason::NotReady
                    | Reason::Draining
                    | Reason::Limit
                    | Reason::ForgedToken
                    // A store that was cut off from conversion takes no part until it is back.
                    | Reason::LeaseExpired
            );
            if !passes || Instant::now() + pause >= deadline {
                return Err(failure);
            }
            volume.state().grant = None;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(std::time::Duration::from_millis(self.config.retry_max_ms));
        }
    }

    async fn try_read(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        trusts_cache: &mut bool,
        deadline: Instant,
    ) -> Result<Vec<Run>, Failure> {
        let _registered = volume.read_begins();
        let mut runs = cached(volume, range);
        let mapped_end = volume.state().view.mapped_end();
        let mut gaps = gaps(runs.iter().map(|run| run.range), range);
        // What a growing volume has beyond the size that conversion knows is dirty or a hole.
        for gap in gaps.extract_if(.., |gap| gap.start.0 >= mapped_end) {
            runs.push(Run { range: gap, piece: Piece::Zeroes(gap.len * BLOCK_BYTES) });
        }
        runs.sort_by_key(|run| run.range.start);
        let (Some(first), Some(last)) = (gaps.first(), gaps.last()) else {
            self.is_ours(volume)?;
            return Ok(runs);
        };
        let hull = LblkRange::new(first.start.0, last.end() - first.start.0);
        let (ticket, grant, map) = match known(volume, &gaps).filter(|_| *trusts_cache) {
            Some(known) => {
                self.is_ours(volume)?;
                known
            }
            None => {
                *trusts_cache = false;
                self.learn(volume, hull, deadline).await?
            }
        };
        let mut wanted = Vec::new();
        for (part, extent) in &map {
            for part in gaps.iter().filter_map(|gap| gap.intersection(*part)) {
                match extent {
                    Some(extent) => wanted.push(self.read_extent(volume, &grant, part, extent)),
                    None => {
                        let piece = Piece::Zeroes(part.len * BLOCK_BYTES);
                        runs.push(Run { range: part, piece });
                    }
                }
            }
        }
        let pieces = wanted.len() as u64;
        let read = match wanted.pop() {
            Some(only) if wanted.is_empty() => vec![only.await?],
            last => try_join_all(wanted.into_iter().chain(last)).await?,
        };
        if !volume.in_place {
            keep(volume, ticket, &read);
            if pieces > 1 {
                volume.state().fragments.read(range, pieces);
            }
        }
        runs.extend(read);
        runs.sort_by_key(|run| run.range.start);
        Ok(runs)
    }

    /// What was found here just now is what everybody may see, as long as nobody else can have
    /// opened the volume meanwhile. A look-up would say so, too, and so does a store of what it
    /// holds; nothing else does: not of what is dirty here, and not of holes.
    fn is_ours(&self, volume: &Volume) -> Result<(), Failure> {
        // The lease first: whatever conversion had said before it renewed the lease is heeded by then. What
        // is let go is discarded only afterwards, and must not look like a hole.
        let is_leased = self.session.lease_holds();
        let state = volume.state();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        // Under a new session, first of all conversion must know the volume as ours.
        if is_leased && state.credit_reset.is_none() && !state.leaving {
            return Ok(());
        }
        let detail = "conversion has not confirmed for a while that the volume is open here";
        Err(Failure::new(Reason::PeerAway, detail))
    }

    /// Asks for the map of a range, and remembers what is around it, too.
    pub(super) async fn learn(
        &self,
        volume: &Arc<Volume>,
        hull: LblkRange,
        deadline: Instant,
    ) -> Result<(Ticket, ReadGrant, Map), Failure> {
        let (ticket, asked) = {
            let state = volume.state();
            let end = state.view.mapped_end();
            let start = hull.start.0 / LEARN_BLOCKS * LEARN_BLOCKS;
            let end = hull.end().next_multiple_of(LEARN_BLOCKS).min(end).max(hull.end());
            let around = LblkRange::new(start, end - start);
            (state.map.ticket(), if volume.in_place { hull } else { around })
        };
        let found = self.look_up(volume, asked, deadline).await?;
        let grant = found.read_grant.ok_or_else(Failure::fenced)?;
        let map: Map = parts(found.extents.into_iter().filter_map(written), asked);
        let mut state = volume.state();
        state.grant = Some(grant.clone());
        state.map.learn(ticket, map.iter().cloned());
        Ok((ticket, grant, map))
    }

    /// The map of a range now.
    pub(super) async fn look_up(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        deadline: Instant,
    ) -> Result<LookupResponse, Failure> {
        self.look_up_after(volume, range, 0, deadline).await
    }

    /// As [`Self::look_up`], after no try of a change up to that number can be carried out any more.
    pub(super) async fn look_up_after(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        attempts_over: u64,
        deadline: Instant,
    ) -> Result<LookupResponse, Failure> {
        self.metrics.look_ups.inc();
        let request = LookupRequest {
            volume: volume.id,
            generation: volume.generation,
            lblk: range.start.0,
            blocks: u32::try_from(range.len).unwrap_or(u32::MAX),
            attempts_over,
        };
        let call =
            |mut client: crate::conversion::Client| async move { client.lookup(request).await };
        let map = self.conversion.call(deadline, call).await?;
        let mut state = volume.state();
        state.view.saw_size(MapVersion(map.map_version), map.size_bytes);
        Ok(map)
    }

    /// Reads a part of a written extent, from one replica after the other.
    pub(super) async fn read_extent(
        &self,
        volume: &Volume,
        grant: &ReadGrant,
        part: LblkRange,
        extent: &Extent,
    ) -> Result<Run, Failure> {
        let skip = part.start.0 - extent.lblk;
        let end = skip + part.len;
        let crc32c = match (usize::try_from(skip), usize::try_from(end)) {
            (Ok(from), Ok(to)) => extent.crc32c.get(from..to).unwrap_or_default(),
            _ => &[],
        };
        let places = extent.places.len().max(1) as u64;
        // Neighbouring regions begin with different replicas, so all stores share the reads.
        let turn = (extent.lblk / READ_BLOCKS_MAX) % places;
        let turn = usize::try_from(turn).unwrap_or(0);
        let mut worst: Option<Failure> = None;
        for place in extent.places.iter().cycle().skip(turn).take(extent.places.len()) {
            let read = self.read_place(grant, place, skip, part, crc32c);
            match read.await {
                Ok(data) if data.len() as u64 == part.len * BLOCK_BYTES => {
                    if worst.is_some() {
                        self.metrics.reads_repaired.inc();
                    }
                    return Ok(Run { range: part, piece: Piece::Data(data) });
                }
                Ok(_) => {
                    let failure = Failure::new(Reason::IoError, "a store sent too few blocks");
                    worst.get_or_insert(failure);
                }
                Err(failure) => {
                    tracing::warn!(
                        volume = %volume.name, store = place.store, lblk = part.start.0,
                        blocks = part.len, error = %failure, "a replica could not be read"
                    );
                    // A store that is away may come back; a bad copy stays bad.
                    if worst.as_ref().is_none_or(|w| w.reason == Reason::ChecksumMismatch) {
                        worst = Some(failure);
                    }
                }
            }
        }
        Err(worst.unwrap_or_else(|| Failure::new(Reason::IoError, "an extent without a place")))
    }

    async fn read_place(
        &self,
        grant: &ReadGrant,
        place: &Place,
        skip: u64,
        part: LblkRange,
        crc32c: &[u32],
    ) -> Result<Bytes, Failure> {
        let request = ReadRequest {
            request: 0,
            grant: Some(grant.clone()),
            pblk: place.pblk + skip,
            blocks: u32::try_from(part.len).unwrap_or(u32::MAX),
            crc32c: crc32c.to_vec(),
            traceparent: Span::current().traceparent(),
        };
        let data = self.stores.read(place.store, request).await?;
        if is_planted(Bug::ReadSkipsChecksum) {
            return Ok(data);
        }
        match data.chunks(BLOCK_SIZE).zip(crc32c).position(|(b, crc)| crc32c::crc32c(b) != *crc) {
            None => Ok(data),
            // Its own check passed, or it lies: what was written is known here, not there.
            Some(block) => {
                let (store, pblk) = (place.store, place.pblk + skip + block as u64);
                let detail = format!("store {store} sent another block {pblk} than was written");
                Err(Failure::new(Reason::ChecksumMismatch, detail))
            }
        }
    }
}

/// Parts of a range with the written extent that holds them; none: they read as zeroes.
pub(super) type Map = Vec<Part<Arc<Extent>>>;

/// The map of some ranges without asking conversion. What it names stays untouched while the read
/// is registered, which it is already.
fn known(volume: &Volume, ranges: &[LblkRange]) -> Option<(Ticket, ReadGrant, Map)> {
    let state = volume.state();
    let grant = state.grant.clone()?;
    let found: Option<Vec<Map>> = ranges.iter().map(|range| state.map.find(*range)).collect();
    Some((state.map.ticket(), grant, found?.concat()))
}

/// Keeps blocks in memory that were read by a map as it was at `ticket`, and is still.
fn keep(volume: &Volume, ticket: Ticket, read: &[Run]) {
    let state = volume.state();
    for Run { range, piece } in read {
        if let Piece::Data(data) = piece
            && state.map.is_current(ticket, *range)
        {
            state.clean.insert(*range, data);
        }
    }
}

/// Runs of the range that the dirty cache has.
fn cached(volume: &Volume, range: LblkRange) -> Vec<Run> {
    let state = volume.state();
    let block = |(lblk, block): (endio_types::Lblk, &crate::volume::CachedBlock)| Run {
        range: LblkRange::new(lblk.0, 1),
        piece: Piece::Data(block.data.clone()),
    };
    state.dirty.read_range(range).map(block).collect()
}

/// An extent with data, and its blocks.
fn written(extent: Extent) -> Option<(LblkRange, Arc<Extent>)> {
    let range = LblkRange::new(extent.lblk, extent.blocks.into());
    (extent.state == ExtentState::Written as i32).then(|| (range, Arc::new(extent)))
}

/// The bytes asked for, out of runs of whole blocks that cover them; neighbours are joined.
fn cut(runs: Vec<Run>, blocks: LblkRange, bytes: ByteRange) -> Vec<Piece> {
    let mut left = bytes.offset - blocks.start.0 * BLOCK_BYTES;
    let mut wanted = bytes.len;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut joined: Option<BytesMut> = None;
    for run in runs {
        let len = run.piece.len();
        let from = left.min(len);
        left -= from;
        let to = (from + wanted).min(len);
        wanted -= to - from;
        if from == to {
            continue;
        }
        match (run.piece.slice(from, to), pieces.last_mut()) {
            (Piece::Zeroes(more), Some(Piece::Zeroes(zeroes))) if joined.is_none() => {
                *zeroes += more;
            }
            (Piece::Data(data), _) => match &mut joined {
                Some(buffer) => buffer.extend_from_slice(&data),
                // One run that is the whole answer is handed on without a copy.
                None if wanted == 0 && pieces.is_empty() => pieces.push(Piece::Data(data)),
                None => {
                    let more = usize::try_from(wanted).unwrap_or(BLOCK_SIZE);
                    let mut buffer = BytesMut::with_capacity(data.len() + more);
                    buffer.extend_from_slice(&data);
                    joined = Some(buffer);
                }
            },
            (zeroes, _) => {
                pieces.extend(joined.take().map(|buffer| Piece::Data(buffer.freeze())));
                pieces.push(zeroes);
            }
        }
    }
    pieces.extend(joined.map(|buffer| Piece::Data(buffer.freeze())));
    pieces
}
