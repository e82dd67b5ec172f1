//! What an earlier start of this writeback acknowledged and did not write out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use endio_api::conversion::LoggedBlock;
use endio_failpoints::{Point, reach};
use endio_state_machine::writeback::dirty::{CleanRun, LogBlock};
use endio_store::cache_log::{OpenVolume, Replay, ReplayedWrite};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Lblk, LblkRange, Reason};
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::failure::Failure;
use crate::volume::{CachedBlock, Opened, Volume};

/// A write of the log, read back.
type Writes = BTreeMap<u64, Vec<ReplayedWrite>>;

impl Engine {
    /// Opens the volumes that the log has data of, or that were open when a power loss took its
    /// tail, and puts the data back into the dirty cache. Waits for conversion as long as it takes.
    ///
    /// # Errors
    /// The log cannot be read, or conversion gives a volume neither here nor to somebody else: its data
    /// is still in the log. A volume that is somebody else's by now loses its data, and the log says so.
    pub async fn replay(self: &Arc<Self>, mut replay: Replay) -> Result<(), Failure> {
        reach(Point::WritebackReplay);
        let power_lost = replay.power_lost();
        self.dedupe.restore(replay.sessions().clone());
        let mut writes = Writes::new();
        while let Some(write) = replay.next_write()? {
            writes.entry(write.write.volume.0).or_default().push(write);
        }
        if replay.torn_bytes() > 0 || power_lost {
            let torn_bytes = replay.torn_bytes();
            tracing::warn!(power_lost, torn_bytes, "the cache log did not end well");
        }
        for volume in replay.losses() {
            self.table.owe_loss(volume.0);
        }
        for open in replay.open_volumes() {
            let data = writes.remove(&open.volume.0).unwrap_or_default();
            let may_have_lost = replay.may_have_lost(open.volume);
            if data.is_empty() && !may_have_lost {
                self.log.append_closed(open.volume.0)?;
                continue;
            }
            self.replay_volume(open, data).await?;
        }
        for (volume, data) in writes {
            // Appended while the volume was taken away, and noted behind that.
            let writes = data.len();
            tracing::error!(volume, writes, "data in the cache log of a volume that is not open");
            self.table.owe_loss(volume);
            self.note_loss(volume).await;
            self.log.append_closed(volume)?;
        }
        Ok(())
    }

    async fn replay_volume(
        self: &Arc<Self>,
        open: &OpenVolume,
        data: Vec<ReplayedWrite>,
    ) -> Result<(), Failure> {
        let (id, name) = (open.volume.0, open.name.as_str());
        let opened = loop {
            match self.open_again_with_log(open).await {
                Err(failure) if passes(&failure) => {
                    tracing::warn!(volume = name, error = %failure, "replay waits for conversion");
                    tokio::select! {
                        biased;
                        () = self.stop.cancelled() => return Err(Failure::draining()),
                        _ = self.session.up() => {}
                    }
                    let pause = self.config.retry_max_ms;
                    tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
                }
                opened => break opened,
            }
        };
        let lost = match opened {
            Ok((opened, logged)) if opened.volume.id == id => {
                let volume = Arc::new(Volume::new(opened, self.volume_limits()));
                self.put_back(&volume, &data, logged)?;
                reach(Point::WritebackReplayed);
                return self.adopt(volume).await;
            }
            Ok((opened, _)) => {
                // Nobody serves that one here.
                self.give_back(&opened.volume.name, (opened.volume.id, opened.volume.generation))
                    .await;
                namesake()
            }
            Err(failure) if failure.ends_volume() => failure,
            // Whatever it is, it is no reason to let acknowledged data go. The volume stays open here at
            // conversion: the next start takes it over again, and nobody else without force.
            Err(failure) => return Err(kept(name, &failure)),
        };
        tracing::error!(
            volume = name, writes = data.len(), error = %lost,
            "acknowledged writes cannot be written out: the volume is not ours any more"
        );
        match lost.reason {
            Reason::UnknownVolume => {
                // Deleted: nobody wants to hear.
                self.table.forget_loss(id);
                self.log.loss_told(id).await;
            }
            _ => {
                if !data.is_empty() {
                    self.table.owe_loss(id);
                }
                self.note_loss(id).await;
            }
        }
        self.log.append_closed(id)
    }

    /// As [`Self::open_again`], with what the data log holds. If somebody takes the volume between the
    /// two, it is not ours any more.
    async fn open_again_with_log(
        &self,
        open: &OpenVolume,
    ) -> Result<(Opened, BTreeMap<u64, LoggedBlock>), Failure> {
        let opened = self.open_again(open).await?;
        let logged = self.read_log(&opened).await?;
        Ok((opened, logged))
    }

    /// Opens a volume if nobody else has opened it since it was open here. Another writeback may
    /// have had it and be gone again: what the log holds is then older than what that one wrote.
    async fn open_again(&self, open: &OpenVolume) -> Result<Opened, Failure> {
        let deadline = self.deadline();
        loop {
            let described = self.describe(&open.name).await?;
            if described.id != open.volume.0 {
                return Err(namesake());
            }
            let is_ours = self.identity.is_earlier_start(&described.owner);
            if !is_ours && described.generation != open.generation.0 {
                return Err(Failure::fenced());
            }
            match self.open_at_conversion(&described, false, deadline).await {
                // Somebody was faster, or a try of this call whose answer was lost. What is
                // decided, is decided by the volume as it is now: never by this answer, however late.
                Err(failure) if failure.reason == Reason::OldGeneration => {
                    if Instant::now() >= deadline {
                        let detail =
                            "somebody, or a try whose answer was lost, opened it meanwhile";
                        return Err(Failure::new(Reason::TimedOut, detail));
                    }
                    let pause = Duration::from_millis(self.config.retry_first_ms);
                    tokio::time::sleep(pause).await;
                }
                opened => return opened,
            }
        }
    }

    /// Makes dirty what the cache log and conversion's data log hold of a volume: of each block the
    /// newer version.
    ///
    /// # Errors
    /// The cache log takes nothing.
    pub(super) fn put_back(
        &self,
        volume: &Volume,
        data: &[ReplayedWrite],
        mut logged: BTreeMap<u64, LoggedBlock>,
    ) -> Result<(), Failure> {
        let mut state = volume.state();
        let mut blocks = 0;
        let (mut outdated, mut superseded) = (Vec::new(), Vec::new());
        for write in data {
            for range in &write.live {
                for part in newer_parts(write, *range, &mut logged, &mut outdated) {
                    blocks += insert(&mut state, write, part);
                }
                let up_to = write.lsn;
                let older = logged.range(range.start.0..range.end());
                let older = older.map(|(lblk, _)| LblkRange::new(*lblk, 1));
                superseded.extend(older.map(|range| CleanRun { range, up_to }));
            }
        }
        if !superseded.is_empty() {
            // Once the newer version is converted, neither log has it, and the older one must not come
            // back. Durable before the volume serves anything: see `adopt`.
            self.log.append_clean(volume.id, &superseded)?;
        }
        for lblk in outdated {
            state.dirty.log_may_have(Lblk(lblk));
        }
        let in_data_log: BTreeSet<u64> = logged.keys().copied().collect();
        let lsn = self.log.last();
        for (lblk, LoggedBlock { end_bytes, data, .. }) in logged {
            state.view.wrote_up_to(end_bytes);
            let data = CachedBlock { data, trace: None };
            let block = LogBlock { lblk: Lblk(lblk), end_bytes, lsn, data };
            blocks += u64::from(state.dirty.insert_logged(block));
        }
        if blocks == 0 {
            return Ok(());
        }
        // Newer writes may lie over parts of a write, or over all of it: what it held together still does.
        for write in data {
            for range in write.holds_together(&in_data_log) {
                state.dirty.rejoin(range, write.lsn);
            }
        }
        state.credit.adopt(blocks);
        state.dirty_since = Some(Instant::now());
        state.flush_up_to = self.log.last();
        drop(state);
        self.dirtied(volume.id, blocks);
        let bytes = blocks * BLOCK_BYTES;
        tracing::info!(volume = %volume.name, bytes, "replayed from the logs");
        Ok(())
    }
}

/// The parts of a range of a replayed write that are newer than what the data log has; moves what
/// that has of them to `outdated`. A power loss may have taken the end of the cache log, and what the data log has is
/// newer then. Every open has its generation, and within one the records' numbers grow.
fn newer_parts(
    write: &ReplayedWrite,
    range: LblkRange,
    logged: &mut BTreeMap<u64, LoggedBlock>,
    outdated: &mut Vec<u64>,
) -> Vec<LblkRange> {
    let ours = (write.write.generation.0, write.lsn.0);
    let is_older = |_: &u64, block: &mut LoggedBlock| (block.generation, block.stamp) <= ours;
    let lblks = range.start.0..range.end();
    outdated.extend(logged.extract_if(lblks, is_older).map(|(lblk, _)| lblk));
    let mut parts = Vec::new();
    let mut at = range.start.0;
    for (newer, _) in logged.range(range.start.0..range.end()) {
        parts.push(LblkRange::new(at, newer - at));
        at = newer + 1;
    }
    parts.push(LblkRange::new(at, range.end() - at));
    parts.retain(|part| part.len > 0);
    parts
}

fn insert(state: &mut crate::volume::State, write: &ReplayedWrite, range: LblkRange) -> u64 {
    let Some(data) = write.data(range) else { return 0 };
    let end_bytes = write.write.end_bytes;
    let cached = (0..data.len() / BLOCK_SIZE)
        .map(|at| CachedBlock {
            data: data.slice(at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE),
            trace: None,
        })
        .collect();
    state.view.wrote_up_to(end_bytes.min(range.end() * BLOCK_BYTES));
    state.dirty.insert(range, write.lsn, end_bytes, cached).unwrap_or(0)
}

fn namesake() -> Failure {
    Failure::new(Reason::UnknownVolume, "another volume has that name now")
}

fn kept(name: &str, failure: &Failure) -> Failure {
    let detail = &failure.detail;
    let detail = format!(
        "volume {name} cannot be opened again: {detail}; what was acknowledged stays in the cache log, \
         for the next start"
    );
    Failure::new(failure.reason, detail)
}

/// Whether waiting can help.
fn passes(failure: &Failure) -> bool {
    matches!(
        failure.reason,
        Reason::PeerAway
            | Reason::NotReady
            | Reason::Draining
            | Reason::Limit
            | Reason::TimedOut
            | Reason::MetadataFull
    )
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use endio_state_machine::writeback::Lsn;
    use endio_store::cache_log::WriteRecord;
    use endio_types::{Generation, VolumeId};

    use super::*;

    fn write(generation: u64, lsn: u64, blocks: LblkRange) -> ReplayedWrite {
        let write = WriteRecord {
            volume: VolumeId(1),
            generation: Generation(generation),
            blocks,
            end_bytes: blocks.end() * BLOCK_BYTES,
            request: None,
            result: 0,
        };
        let payload = Bytes::from(vec![0; blocks.len as usize * BLOCK_SIZE]);
        ReplayedWrite {
            lsn: Lsn(lsn),
            write,
            live: vec![blocks],
            unconverted: vec![blocks],
            payload,
        }
    }

    fn logged(entries: &[(u64, u64, u64)]) -> BTreeMap<u64, LoggedBlock> {
        let block = |(lblk, generation, stamp): &(u64, u64, u64)| {
            let (generation, stamp) = (*generation, *stamp);
            (*lblk, LoggedBlock { lblk: *lblk, generation, stamp, ..LoggedBlock::default() })
        };
        entries.iter().map(block).collect()
    }

    /// The parts taken from the cache log, what the data log keeps, and what of it is outdated.
    fn merged(
        write: &ReplayedWrite,
        mut logged: BTreeMap<u64, LoggedBlock>,
    ) -> (Vec<LblkRange>, Vec<u64>, Vec<u64>) {
        let mut outdated = Vec::new();
        let parts = newer_parts(write, write.write.blocks, &mut logged, &mut outdated);
        (parts, logged.into_keys().collect(), outdated)
    }

    /// Under generation 4, record 10 of blocks 0 to 7 is the last that the disk has. Block 2 was
    /// flushed in a newer version, block 3 in this one, block 4 in an older one; block 9 is not in it.
    #[test]
    fn after_a_power_loss_the_data_log_fills_what_the_cache_log_lost() {
        let write = write(4, 10, LblkRange::new(0, 8));
        let log = logged(&[(2, 4, 11), (3, 4, 10), (4, 4, 9), (9, 4, 1)]);
        let (parts, kept, outdated) = merged(&write, log);
        assert_eq!(parts, [LblkRange::new(0, 2), LblkRange::new(3, 5)]);
        assert_eq!((kept, outdated), (vec![2, 9], vec![3, 4]));
    }

    /// What is acknowledged is let go if somebody else has the volume, or it is gone; for no other reason.
    #[test]
    fn only_a_volume_that_is_not_ours_any_more_lets_its_data_go() {
        let failure = |reason: &Reason| Failure::new(*reason, "why");
        let let_go = Reason::ALL.iter().filter(|reason| failure(reason).ends_volume());
        let let_go: Vec<&Reason> = let_go.collect();
        assert_eq!(let_go, [&Reason::UnknownVolume, &Reason::OldGeneration]);
        for reason in Reason::ALL {
            let failure = failure(reason);
            assert!(!(passes(&failure) && failure.ends_volume()), "{reason}");
            let kept = kept("disk", &failure);
            assert_eq!(kept.reason, *reason);
            assert!(kept.detail.contains("disk") && kept.detail.contains("why"), "{kept}");
        }
    }

    /// Numbers of records may begin anew behind a power loss: the generation comes first.
    #[test]
    fn what_was_written_under_a_newer_generation_is_newer() {
        let (parts, kept, _) = merged(&write(5, 3, LblkRange::new(1, 1)), logged(&[(1, 4, 99)]));
        assert_eq!((parts, kept), (vec![LblkRange::new(1, 1)], Vec::new()));
        let (parts, kept, _) = merged(&write(4, 99, LblkRange::new(1, 1)), logged(&[(1, 5, 3)]));
        assert_eq!((parts, kept), (Vec::new(), vec![1]));
    }
}
