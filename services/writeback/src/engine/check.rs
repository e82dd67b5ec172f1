//! `endio check`: the invariants of the metadata, and every copy of every block against its checksum.
//!
//! Only the owner of a volume may read it. So a volume that nobody has open is opened for the time of its
//! check, and one that another writeback has open is told as not read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use endio_api::blockstore::ReadRequest;
use endio_api::common::{Extent, ExtentState, ReadGrant};
use endio_api::conversion::CheckRequest as MetadataCheck;
use endio_api::writeback::CheckResponse;
use endio_types::{LblkRange, Reason};
use tokio::time::{Duration, Instant};

use super::Engine;
use super::inspect::{EXTENT_BLOCKS_MAX, PATIENCE};
use super::read::READ_BLOCKS_MAX;
use crate::conversion::Client;
use crate::failure::Failure;
use crate::volume::Volume;

/// Findings that a check names; one more says that there are more.
const FINDINGS_MAX: usize = 1_000;
/// Volumes that it names as open elsewhere.
const ELSEWHERE_MAX: usize = 1_000;
/// Who holds a volume that nobody uses: the table, its flusher, and the check.
const HOLDERS: usize = 3;
/// Looks at whether a volume that the check opened is used by nobody else.
const UNUSED_LOOKS: usize = 100;
/// Pause between two of them: what begins with every volume that is opened ends within.
const UNUSED_LOOK: Duration = Duration::from_millis(5);
/// Hint for a request that found a volume just before its check let it go.
const LET_GO_RETRY_MS: u32 = 1;

/// What a check knows so far.
#[derive(Default)]
struct Found {
    report: CheckResponse,
    /// Stores that did not answer: nobody waits for them again.
    away: BTreeSet<u32>,
    /// Blocks on such stores, of the volume that is being read.
    unreachable: BTreeMap<u32, u64>,
}

impl Found {
    fn note(&mut self, finding: String) {
        let findings = &mut self.report.findings;
        match findings.len() {
            len if len < FINDINGS_MAX => findings.push(finding),
            FINDINGS_MAX => findings.push("there are more findings".to_owned()),
            _ => {}
        }
    }

    fn is_elsewhere(&mut self, volume: String) {
        self.report.volumes_not_read += 1;
        if self.report.volumes_elsewhere.len() < ELSEWHERE_MAX {
            self.report.volumes_elsewhere.push(volume);
        }
    }

    fn cannot_reach(&mut self, store: u32, blocks: u64) {
        self.away.insert(store);
        self.report.blocks_unreachable += blocks;
        *self.unreachable.entry(store).or_default() += blocks;
    }

    /// The end of a volume: one finding for each store that has something of it and is away.
    fn volume_ends(&mut self, name: &str) {
        for (store, blocks) in std::mem::take(&mut self.unreachable) {
            self.note(format!("volume {name}: {blocks} blocks on store {store} cannot be reached"));
        }
    }
}

impl Engine {
    /// Verifies the metadata's invariants, and with `read_data` every copy of every block. Takes as long
    /// as reading all of it takes; dropping it ends it.
    ///
    /// # Errors
    /// `PEER_AWAY`: conversion cannot be asked.
    pub async fn check(self: &Arc<Self>, read_data: bool) -> Result<CheckResponse, Failure> {
        let call = |mut client: Client| async move { client.check(MetadataCheck {}).await };
        let retry_until = Instant::now() + PATIENCE;
        let metadata = self.conversion.call_unhurried(retry_until, call).await?;
        let mut found = Found::default();
        found.report.metadata = Some(metadata);
        if read_data {
            self.check_volumes(&mut found).await?;
        }
        Ok(found.report)
    }

    async fn check_volumes(self: &Arc<Self>, found: &mut Found) -> Result<(), Failure> {
        for volume in self.list().await?.volumes {
            let name = volume.name;
            let checked = self.check_volume(&name, found).await;
            found.volume_ends(&name);
            match checked {
                Ok(()) => {}
                // Another writeback has it, or took it meanwhile.
                Err(Failure { reason: Reason::VolumeBusy | Reason::OldGeneration, .. }) => {
                    found.is_elsewhere(name);
                }
                // Deleted meanwhile.
                Err(Failure { reason: Reason::UnknownVolume, .. }) => {}
                // Without conversion no further volume can be read either, and each would be waited for.
                Err(failure) if matches!(failure.reason, Reason::PeerAway | Reason::Draining) => {
                    found.note(format!("volume {name} and all behind it: not read: {failure}"));
                    break;
                }
                Err(failure) => found.note(format!("volume {name}: {failure}")),
            }
        }
        Ok(())
    }

    async fn check_volume(self: &Arc<Self>, name: &str, found: &mut Found) -> Result<(), Failure> {
        let was_open = self.table.find(name).is_some();
        let volume = self.volume(name).await?;
        let checked = self.check_data(&volume, found).await;
        if !was_open {
            self.let_go_unused(volume).await;
        }
        checked
    }

    async fn check_data(&self, volume: &Arc<Volume>, found: &mut Found) -> Result<(), Failure> {
        let end = volume.state().view.mapped_end();
        let mut at = 0;
        while at < end {
            let part = LblkRange::new(at, READ_BLOCKS_MAX.min(end - at));
            let _registered = volume.read_begins();
            let map = self.look_up(volume, part, self.deadline()).await?;
            let grant = map.read_grant.clone().ok_or_else(Failure::fenced)?;
            for extent in map.extents.iter().filter(|e| e.state == ExtentState::Written as i32) {
                self.check_extent(&volume.name, &grant, extent, found).await;
            }
            // A hole of a thin volume may be long: the next extent says where to go on.
            at = match map.extents.is_empty() {
                true => self.next_extent(volume, part.end(), end).await?,
                false => part.end(),
            };
        }
        Ok(())
    }

    /// The first mapped block at or after `at`.
    async fn next_extent(
        &self,
        volume: &Arc<Volume>,
        mut at: u64,
        end: u64,
    ) -> Result<u64, Failure> {
        while at < end {
            let part = LblkRange::new(at, EXTENT_BLOCKS_MAX.min(end - at));
            let map = self.look_up(volume, part, self.deadline()).await?;
            if let Some(first) = map.extents.first() {
                return Ok(first.lblk);
            }
            at = part.end();
        }
        Ok(end)
    }

    async fn check_extent(
        &self,
        name: &str,
        grant: &ReadGrant,
        extent: &Extent,
        found: &mut Found,
    ) {
        let blocks = u64::from(extent.blocks);
        for place in &extent.places {
            let request = ReadRequest {
                request: 0,
                grant: Some(grant.clone()),
                pblk: place.pblk,
                blocks: extent.blocks,
                crc32c: extent.crc32c.clone(),
                traceparent: String::new(),
            };
            let read = match found.away.contains(&place.store) {
                true => Err(crate::stores::store_away()),
                false => self.stores.read(place.store, request).await,
            };
            match read {
                Ok(_) => found.report.blocks_verified += blocks,
                Err(failure) if failure.reason == Reason::PeerAway => {
                    found.cannot_reach(place.store, blocks);
                }
                Err(failure) => {
                    let kind = match failure.reason {
                        Reason::ChecksumMismatch => "does not match its checksum",
                        _ => "cannot be read",
                    };
                    let (lblk, store, pblk) = (extent.lblk, place.store, place.pblk);
                    found.note(format!(
                        "volume {name}: blocks {lblk}+{blocks} on store {store} at {pblk}: the data \
                         {kind} ({failure})"
                    ));
                }
            }
        }
    }

    /// Closes a volume that was opened for its check, unless somebody uses it by now.
    async fn let_go_unused(self: &Arc<Self>, volume: Arc<Volume>) {
        let is_unused = || {
            let requests = volume.reads.count() + volume.writes.count();
            requests == 0 && Arc::strong_count(&volume) <= HOLDERS
        };
        for _ in 0..UNUSED_LOOKS {
            if is_unused() {
                break;
            }
            tokio::time::sleep(UNUSED_LOOK).await;
        }
        if !volume.state().dirty.is_clean() {
            // What was in the data log of an owner that is gone is written out first.
            if is_unused()
                && let Err(error) = self.close(&volume.name).await
            {
                tracing::warn!(volume = %volume.name, %error, "a volume stays open after its check");
            }
        } else if is_unused() {
            // Nothing is awaited since the last look. A request that found it in between comes again.
            let again = Failure::new(Reason::NotReady, "the volume was closed after a check");
            self.table.end(&volume, again.retry_after(LET_GO_RETRY_MS));
            self.give_back(&volume.name, (volume.id, volume.generation)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_out_of_reach_are_one_finding_for_each_volume_and_store() {
        let mut found = Found::default();
        for (store, blocks) in [(2, 3), (1, 4), (2, 5)] {
            found.cannot_reach(store, blocks);
        }
        found.volume_ends("a");
        found.cannot_reach(2, 1);
        found.volume_ends("b");
        let expected = [
            "volume a: 4 blocks on store 1 cannot be reached",
            "volume a: 8 blocks on store 2 cannot be reached",
            "volume b: 1 blocks on store 2 cannot be reached",
        ];
        assert_eq!(found.report.findings, expected);
        assert_eq!(found.report.blocks_unreachable, 13);
        assert_eq!(found.away, BTreeSet::from([1, 2]));
    }

    #[test]
    fn findings_and_names_are_bounded_and_counted() {
        let mut found = Found::default();
        for number in 0..2 * FINDINGS_MAX {
            found.note(number.to_string());
            found.is_elsewhere(number.to_string());
        }
        let CheckResponse { findings, volumes_elsewhere, volumes_not_read, .. } = found.report;
        assert_eq!(findings.len(), FINDINGS_MAX + 1);
        assert_eq!(volumes_elsewhere.len(), ELSEWHERE_MAX);
        assert_eq!(volumes_not_read, 2 * FINDINGS_MAX as u64);
    }
}
