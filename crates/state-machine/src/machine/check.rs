//! The full check: every invariant, verified by a scan that shares nothing with the accounting.

use std::collections::BTreeMap;

use endio_types::{PblkRange, SegmentIndex, StoreId, VolumeId};

use super::inspect::CheckReport;
use super::{Machine, MachineError};
use crate::extent_map::{self, ChunkTable};
use crate::free_space::{Demand, RangeSet};

/// Most findings reported; one broken invariant often breaks thousands of blocks.
const FINDINGS_MAX: usize = 100;

impl<T: ChunkTable> Machine<T> {
    /// Verifies every invariant by a full scan. Slow.
    ///
    /// # Errors
    /// The table failed.
    pub fn check(&mut self) -> Result<CheckReport, MachineError<T::Error>> {
        let mut report = CheckReport {
            volumes: self.names.len() as u64,
            io_ends: self.ledger.len() as u64,
            ..CheckReport::default()
        };
        let mapped = self.check_map(&mut report)?;
        self.check_stores(&mapped, &mut report);
        self.check_io_ends(&mut report);
        self.check_credit(&mut report);
        self.check_logs(&mut report);
        report.findings.truncate(FINDINGS_MAX);
        Ok(report)
    }

    fn check_map(
        &mut self,
        report: &mut CheckReport,
    ) -> Result<BTreeMap<StoreId, RangeSet>, MachineError<T::Error>> {
        let mut mapped: BTreeMap<StoreId, RangeSet> = BTreeMap::new();
        let mut by_volume: BTreeMap<VolumeId, u64> = BTreeMap::new();
        let durable = &self.durable;
        extent_map::for_each_extent(&mut self.table, |volume, extent| {
            report.extents += 1;
            let state = durable.volumes.get(&volume);
            let copies = extent.places.as_slice().len();
            if state.is_none_or(|state| state.replicas as usize != copies) {
                let at = extent.range.start;
                report
                    .findings
                    .push(format!("map-owner: volume {volume} block {at}: {copies} copies"));
            }
            for (n, place) in extent.places.as_slice().iter().enumerate() {
                *by_volume.entry(volume).or_default() += extent.range.len;
                let range = PblkRange { start: place.pblk, len: extent.range.len };
                if !mapped.entry(place.store).or_default().insert(range) {
                    let (store, pblk) = (place.store, place.pblk);
                    report.findings.push(format!("mapped-once: store {store} block {pblk}"));
                }
                if extent.places.as_slice()[..n].iter().any(|other| other.store == place.store) {
                    let at = extent.range.start;
                    report.findings.push(format!("replicas-apart: volume {volume} block {at}"));
                }
            }
        })
        .map_err(MachineError::Table)?;
        for (volume, rt) in &self.volumes {
            let found = by_volume.get(volume).copied().unwrap_or(0);
            if found != rt.mapped_blocks {
                let counted = rt.mapped_blocks;
                let text = format!("mapped-count: volume {volume}: {counted} not {found}");
                report.findings.push(text);
            }
        }
        Ok(mapped)
    }

    /// `block-one-class`: free + mapped + reserved + quarantined is the store, without overlap.
    fn check_stores(&self, mapped: &BTreeMap<StoreId, RangeSet>, report: &mut CheckReport) {
        let none = RangeSet::default();
        let faults = [self.stores.fault(), self.writebacks.fault()];
        report.findings.extend(faults.into_iter().flatten().map(str::to_owned));
        let awaited = self.reads.iter().filter(|(_, reads)| !reads.freed.is_empty());
        if !awaited.map(|(volume, _)| volume).eq(&self.readers_awaited) {
            report.findings.push("kept-as-walked: volumes that wait for reads".to_owned());
        }
        for id in mapped.keys().filter(|id| !self.stores.contains_key(id)) {
            report.findings.push(format!("map-owner: store {id} does not exist"));
        }
        for (id, rt) in self.stores.iter() {
            let in_map = mapped.get(id).unwrap_or(&none);
            let mut all = in_map.clone();
            for (class, set) in rt.space.sets() {
                for range in set.iter().filter(|range| !all.insert(*range)) {
                    let (pblk, len) = (range.start, range.len);
                    let text = format!("block-one-class: store {id} block {pblk}+{len} is {class}");
                    report.findings.push(text);
                }
            }
            for gap in all.complement(rt.space.capacity()) {
                let (pblk, len) = (gap.start, gap.len);
                report.findings.push(format!("block-one-class: store {id} lost {pblk}+{len}"));
            }
            if all.iter().any(|range| range.end() > rt.space.capacity()) {
                report.findings.push(format!("block-one-class: store {id} ends earlier"));
            }
            if in_map.total() != rt.space.mapped() || !rt.space.unpunched_is_free() {
                report.findings.push(format!("mapped-count: store {id}"));
            }
            self.check_quarantine(*id, report);
            report.mapped_blocks += rt.space.mapped();
            report.reserved_blocks += rt.space.reserved();
            report.quarantined_blocks += rt.space.quarantined();
            report.free_blocks += rt.space.free();
        }
    }

    /// Every quarantined block waits for exactly one thing.
    fn check_quarantine(&self, id: StoreId, report: &mut CheckReport) {
        let Some(rt) = self.stores.get(&id) else { return };
        let fenced = rt.wait_fence.values().flatten().copied();
        let punched = rt.punch.iter().flat_map(|(_, ranges)| ranges).copied();
        let freed = self.freed.iter().filter(|freed| freed.store == id).map(|freed| freed.range);
        let read = self.reads.values().filter_map(|reads| reads.freed.get(&id)).flatten();
        let waiting = rt.wait_epoch.iter().copied().chain(fenced).chain(punched).chain(freed);
        let mut all = RangeSet::default();
        for range in waiting.chain(read.map(|(_, range)| *range)) {
            if !all.insert(range) {
                let pblk = range.start;
                report.findings.push(format!("quarantine-once: store {id} block {pblk}"));
            }
        }
        if all.total() != rt.space.quarantined() {
            report.findings.push(format!("quarantine-ends: store {id} has an orphan"));
        }
        for io_end in rt.wait_fence.keys() {
            let sent = rt.fence.as_ref().is_some_and(|fence| fence.io_ends.contains(io_end));
            if !sent && !rt.fence_io_ends.contains(io_end) {
                report.findings.push(format!("quarantine-ends: io_end {io_end} is never fenced"));
            }
        }
    }

    /// `live-tokens`, and that reserved blocks belong to exactly one io_end.
    fn check_io_ends(&self, report: &mut CheckReport) {
        let mut reserved: BTreeMap<StoreId, RangeSet> = BTreeMap::new();
        let mut in_flight = 0;
        for io_end in self.ledger.iter() {
            let id = io_end.id;
            let mut lanes = self.lanes.iter().flat_map(|lane| lane.of(io_end.volume));
            let is_queued = lanes.any(|queued| queued == id);
            if is_queued != io_end.live.is_empty() {
                report.findings.push(format!("live-tokens: io_end {id}"));
            }
            let unreleased = (1..=io_end.segments.len() as u32).map(SegmentIndex).filter(|index| {
                io_end.segment(*index).is_some_and(|segment| segment.outcome.is_none())
            });
            let live = io_end.live.iter().copied().filter(|index| !index.is_submitter());
            if !unreleased.eq(live) {
                report.findings.push(format!("first-outcome: io_end {id}"));
            }
            for (store, range) in Self::reserved_ranges(io_end) {
                in_flight += range.len;
                if !reserved.entry(store).or_default().insert(range) {
                    report.findings.push(format!("reserved-once: io_end {id} on store {store}"));
                }
            }
        }
        for (id, rt) in self.stores.iter() {
            let held = reserved.get(id).map_or(0, RangeSet::total);
            if held != rt.space.reserved() {
                report.findings.push(format!("reserved-once: store {id} has an orphan"));
            }
        }
        if in_flight != self.in_flight_blocks {
            report.findings.push("in-flight-count: blocks".to_owned());
        }
        let queued: usize = self.lanes.iter().map(|lane| lane.len()).sum();
        let deferred = self.ledger.iter().filter(|io_end| io_end.live.is_empty()).count();
        if queued != deferred {
            report.findings.push(format!("live-tokens: {queued} queued, {deferred} deferred"));
        }
    }

    fn check_credit(&self, report: &mut CheckReport) {
        let mut sum = Demand::default();
        for (id, state) in &self.durable.volumes {
            if let Some(sum) = sum.get_mut(state.replicas as usize) {
                *sum += self.available_credit(*id);
            }
            let used: u64 = self.ledger.iter().filter(|e| e.volume == *id).map(|e| e.credit).sum();
            if self.volumes.get(id).is_none_or(|rt| rt.credit_in_flight != used) {
                report.findings.push(format!("credit-count: volume {id}"));
            }
        }
        if sum != self.credit {
            report.findings.push("credit-count: sum".to_owned());
        }
    }
}
