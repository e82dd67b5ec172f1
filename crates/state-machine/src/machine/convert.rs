//! Conversion: what is queued becomes written, in batches of one record each.

use std::collections::BTreeMap;

use endio_types::{IoEndId, Reason, VolumeId};

use super::io::{ConvertedBatch, EffectKind, Output};
use super::{Machine, MachineError, Step};
use crate::chunk::CHUNK_BLOCKS;
use crate::chunk::ChunkId;
use crate::extent_map::ChunkTable;
use crate::ledger::{IoEnd, PieceKind};
use crate::record::{ConvertVolume, Record, Run};

impl<T: ChunkTable> Machine<T> {
    /// Converts one batch; `false`: nothing is queued. An io_end whose chunks cannot be read ends
    /// with an error, and the rest of the batch goes on.
    pub(super) fn convert_batch(
        &mut self,
        out: &mut Output,
    ) -> Result<bool, MachineError<T::Error>> {
        let taken = self.take_batch();
        if taken.is_empty() {
            return Ok(false);
        }
        let mut by_volume: BTreeMap<VolumeId, Draft> = BTreeMap::new();
        let mut done = Vec::new();
        let mut batch = ConvertedBatch { seq: 0, traceparents: vec![], io_ends: vec![], blocks: 0 };
        for (volume, id) in taken {
            let Some(io_end) = self.ledger.get(id) else { continue };
            if let Err(error) = read_chunks(&mut self.table, io_end) {
                let (range, why) = (io_end.span(), error.to_string());
                let kind = EffectKind::ConversionFailed { io_end: id, volume, range, why };
                self.push(self.when_committed(), kind, out);
                self.abort(id, Reason::MetadataFull, None, out)?;
                continue;
            }
            self.add_to_batch(&mut by_volume, io_end);
            self.ends_in_log(io_end, &mut done);
            batch.io_ends.push(id);
            batch.blocks += io_end.durable_blocks();
            if !io_end.traceparent.is_empty() {
                batch.traceparents.push(io_end.traceparent.clone());
            }
        }
        if by_volume.is_empty() {
            return Ok(true);
        }
        let items = by_volume.into_values().map(|draft| draft.item).collect();
        let record = match done.is_empty() {
            true => Record::Convert(items),
            false => Record::ConvertLogged { volumes: items, done },
        };
        self.commit(record, out)?;
        self.counters.batches += 1;
        self.counters.converted += batch.io_ends.len() as u64;
        self.counters.converted_blocks += batch.blocks;
        for id in &batch.io_ends {
            self.older_is_late(*id);
            self.complete(*id, out)?;
        }
        batch.seq = self.durable.seq;
        out.batches.push(batch);
        Ok(true)
    }

    /// Takes io_ends from both lanes in turn, and inside a lane from the volumes in turn.
    fn take_batch(&mut self) -> Vec<(VolumeId, IoEndId)> {
        let mut taken = Vec::new();
        let mut blocks = 0;
        let mut lane = 0;
        while taken.len() < self.limits.convert_batch_max && blocks < self.limits.convert_blocks_max
        {
            if self.lanes[lane].is_empty() {
                lane = 1 - lane;
            }
            let Some((volume, id)) = self.lanes[lane].pop() else { break };
            for older in self.older_overlapping(lane, volume, id) {
                self.lanes[1 - lane].remove(volume, older);
                blocks += self.ledger.get(older).map_or(0, IoEnd::blocks);
                taken.push((volume, older));
            }
            blocks += self.ledger.get(id).map_or(0, IoEnd::blocks);
            taken.push((volume, id));
            lane = 1 - lane;
        }
        taken
    }

    /// What must convert before `id`: everything of the other lane up to the last io_end that was
    /// released before it and overlaps it. Each lane by itself is in the order of release.
    fn older_overlapping(&self, lane: usize, volume: VolumeId, id: IoEndId) -> Vec<IoEndId> {
        let Some(io_end) = self.ledger.get(id).filter(|io_end| io_end.overlapped) else {
            return Vec::new();
        };
        let others = self.lanes[1 - lane].of(volume).filter_map(|other| self.ledger.get(other));
        let older: Vec<&IoEnd> =
            others.take_while(|other| other.release_order < io_end.release_order).collect();
        let last = older.iter().rposition(|other| other.overlaps(io_end));
        let count = last.map_or(0, |last| last + 1);
        older[..count].iter().map(|other| other.id).collect()
    }

    fn add_to_batch(&self, batch: &mut BTreeMap<VolumeId, Draft>, io_end: &IoEnd) {
        let in_place = self.durable.volumes.get(&io_end.volume).is_some_and(|v| v.in_place);
        let draft = batch.entry(io_end.volume).or_insert_with(|| Draft::new(io_end.volume));
        let item = &mut draft.item;
        let runs = io_end.runs(!in_place);
        if io_end.credit > 0 {
            // Only fresh blocks take credit, and in this lane every converted fresh block does.
            let fresh = io_end
                .pieces
                .iter()
                .filter(|piece| piece.kind == PieceKind::Fresh && io_end.is_durable(piece));
            item.credit_used += fresh.map(|piece| u64::from(piece.blocks)).sum::<u64>();
        }
        for (kind, run) in runs {
            // Fresh blocks become mapped and unwritten ones are mapped already: a run is one or
            // the other as a whole, also where the two lie side by side.
            match draft.last_kind == Some(kind) {
                true => push_merged(&mut item.runs, run),
                false => item.runs.push(run),
            }
            draft.last_kind = Some(kind);
        }
        item.size_after_bytes = item.size_after_bytes.max(io_end.durable_size());
        item.io_ends.push(io_end.id);
    }
}

/// Reads every chunk that the conversion will change, so that what cannot be read is found before
/// there is a record of it.
fn read_chunks<T: ChunkTable>(table: &mut T, io_end: &IoEnd) -> Result<(), T::Error> {
    // Ascending ranges visit their chunks in order: each is read once.
    let mut next = 0;
    for range in &io_end.ranges {
        let first = (range.start.0 / CHUNK_BLOCKS).max(next);
        let last = range.end().saturating_sub(1) / CHUNK_BLOCKS;
        for index in first..=last {
            table.read(ChunkId { volume: io_end.volume, index }, &mut |_| {})?;
        }
        next = last + 1;
    }
    Ok(())
}

/// A volume's part of a record while it is put together.
struct Draft {
    item: ConvertVolume,
    /// What the blocks of the last run were before.
    last_kind: Option<PieceKind>,
}

impl Draft {
    fn new(volume: VolumeId) -> Self {
        let item = ConvertVolume {
            volume,
            runs: Vec::new(),
            size_after_bytes: 0,
            credit_used: 0,
            io_ends: Vec::new(),
        };
        Self { item, last_kind: None }
    }
}

/// Appends a run, or lengthens the last one if the new one goes on where it ends in the volume and
/// in every copy, with checksums on both sides or on none.
fn push_merged(runs: &mut Vec<Run>, run: Run) {
    let Some(last) = runs.last_mut() else { return runs.push(run) };
    let blocks = u64::from(last.blocks);
    let goes_on = last.range().end() == run.lblk.0
        && last.crcs.is_empty() == run.crcs.is_empty()
        && last.places.len() == run.places.len()
        && last.places.iter().zip(&run.places).all(|((store, pblk), (next_store, next))| {
            store == next_store && pblk.0 + blocks == next.0
        });
    match last.blocks.checked_add(run.blocks).filter(|_| goes_on) {
        Some(blocks) => {
            last.blocks = blocks;
            last.crcs.extend(run.crcs);
        }
        None => runs.push(run),
    }
}

impl<T: ChunkTable> Machine<T> {
    /// Aborts every io_end of a volume, queued or not: its generation is over.
    pub(super) fn abort_of_volume(
        &mut self,
        volume: VolumeId,
        reason: Reason,
        out: &mut Output,
    ) -> Step<T> {
        let all = self.ledger.iter().filter(|io_end| io_end.volume == volume);
        let all: Vec<IoEndId> = all.map(|io_end| io_end.id).collect();
        for id in all {
            self.abort(id, reason, None, out)?;
        }
        Ok(())
    }
}
