//! The states of extents, as the contexts of NBD tell them.

use std::sync::Arc;

use endio_api::common::{Extent as Mapped, ExtentState};
use endio_nbd::consts::allocation;
use endio_nbd::{Extent, Fault};
use endio_types::{BLOCK_BYTES, ByteRange, LblkRange};

use super::{fault, state};
use crate::engine::Engine;
use crate::volume::Volume;

/// Look-ups of the map for one question; a client asks again behind what it was told.
const LOOK_UPS_MAX: usize = 64;

/// Consecutive extents from the beginning of a range on, in one context.
pub(super) async fn extents(
    engine: &Engine,
    volume: &Arc<Volume>,
    context: &str,
    bytes: ByteRange,
    extents_max: usize,
) -> Result<Vec<Extent>, Fault> {
    let range = volume.check(bytes, false).map_err(fault)?;
    let is_allocation = context == allocation::CONTEXT;
    let mut extents: Vec<Extent> = Vec::new();
    let mut add = |blocks: u64, flags: u64| {
        let told = extents.len();
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.length += blocks * BLOCK_BYTES,
            _ if told > extents_max => {}
            _ => extents.push(Extent { length: blocks * BLOCK_BYTES, flags }),
        }
        told > extents_max
    };
    let mut at = range.start.0;
    'look: for _ in 0..LOOK_UPS_MAX {
        let found = engine.extents(volume, range, at).await.map_err(fault)?;
        let Some((found, next)) = found else { break };
        for extent in &found {
            for (blocks, flags) in flags_of(volume, extent, is_allocation) {
                // One extent more than wanted: then the last one wanted is whole.
                if add(blocks, flags) {
                    break 'look;
                }
            }
        }
        at = next;
    }
    extents.truncate(extents_max);
    if let Some(first) = extents.first_mut() {
        // The first block begins before an unaligned offset.
        first.length -= bytes.offset % BLOCK_BYTES;
    }
    Ok(extents)
}

/// Runs of blocks of an extent with their flags in one of the two contexts.
fn flags_of(volume: &Volume, extent: &Mapped, is_allocation: bool) -> Vec<(u64, u64)> {
    let range = LblkRange::new(extent.lblk, u64::from(extent.blocks));
    let flags = match (extent.state(), is_allocation) {
        (ExtentState::Hole, true) => allocation::HOLE | allocation::ZERO,
        (ExtentState::Unwritten, true) => allocation::ZERO,
        (_, true) => 0,
        (ExtentState::Hole, false) => state::HOLE,
        (ExtentState::Unwritten, false) => state::UNWRITTEN,
        (ExtentState::Written | ExtentState::Unspecified, false) => state::WRITTEN,
        (ExtentState::Delayed, false) => state::DELAYED,
    };
    match is_allocation {
        // Data on its way is not there yet for who asks what is allocated.
        true => vec![(range.len, flags)],
        false => split(range, flags, &on_their_way(volume, range)),
    }
}

/// Blocks of the range whose data is on its way to the stores, ascending.
fn on_their_way(volume: &Volume, range: LblkRange) -> Vec<LblkRange> {
    let state = volume.state();
    let block = |lblk| LblkRange::new(lblk, 1);
    let mut found: Vec<LblkRange> = state.dirty.blocks_in_flight(range).map(block).collect();
    found.extend(state.direct_in(range));
    found.sort_unstable_by_key(|part| part.start);
    found
}

/// A range with its flags, but for some ascending parts that are in flight.
fn split(range: LblkRange, flags: u64, in_flight: &[LblkRange]) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    let mut at = range.start.0;
    for part in in_flight {
        let left = LblkRange::new(at, range.end().saturating_sub(at));
        let Some(part) = part.intersection(left) else { continue };
        if part.start.0 > at {
            runs.push((part.start.0 - at, flags));
        }
        runs.push((part.len, state::IN_FLIGHT));
        at = part.end();
    }
    if at < range.end() {
        runs.push((range.end() - at, flags));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_flight_is_cut_out_of_its_extent() {
        let range = LblkRange::new(10, 10);
        assert_eq!(split(range, 7, &[]), [(10, 7)]);
        let parts = [(8, 3), (12, 1), (12, 2), (19, 5)];
        let parts = parts.map(|(start, len)| LblkRange::new(start, len));
        assert_eq!(split(range, 7, &parts), [(1, 4), (1, 7), (1, 4), (1, 4), (5, 7), (1, 4)]);
        assert_eq!(split(range, 7, &[range]), [(10, 4)]);
    }
}
