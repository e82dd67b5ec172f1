//! How many bytes may be dirty: a soft limit that starts write-out, a hard one that stops writers.
//!
//! While several volumes have dirty bytes, each has a *share* of the hard limit. A volume beyond
//! its share stops already half-way between the limits: the other half stays for volumes that are
//! within theirs, so one busy volume cannot starve the others.

use std::collections::BTreeMap;

use endio_types::VolumeId;

/// The limits, in bytes of all volumes together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Above it write-out runs. At most `hard_bytes`.
    pub soft_bytes: u64,
    /// Never exceeded, except by a single write when nothing else is dirty.
    pub hard_bytes: u64,
    /// Delay of a writer that just reaches its limit, milliseconds; less below it.
    pub delay_max_ms: u64,
}

/// What a writer does now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Go on.
    Proceed,
    /// Go on, and see that write-out runs.
    WriteOut,
    /// See that write-out runs, wait this long in milliseconds (at least 1), then go on.
    Delay(u64),
    /// See that write-out runs, and ask again when dirty bytes became fewer.
    WaitForRoom,
}

/// Dirty bytes of all volumes.
#[derive(Clone, Debug)]
pub struct Throttle {
    limits: Limits,
    dirty: BTreeMap<VolumeId, u64>,
    total: u64,
}

impl Throttle {
    /// Nothing dirty. A soft limit above the hard one counts as the hard one.
    pub fn new(limits: Limits) -> Self {
        let soft_bytes = limits.soft_bytes.min(limits.hard_bytes);
        Self { limits: Limits { soft_bytes, ..limits }, dirty: BTreeMap::new(), total: 0 }
    }

    /// What a writer of `bytes` to `volume` does now. Changes nothing: after `Proceed`, `WriteOut`
    /// or an elapsed `Delay` the caller calls [`add`](Self::add).
    pub fn decide(&self, volume: VolumeId, bytes: u64) -> Verdict {
        let Limits { soft_bytes, hard_bytes, delay_max_ms } = self.limits;
        let after = self.total.saturating_add(bytes);
        if after <= soft_bytes {
            return Verdict::Proceed;
        }
        if self.total == 0 {
            // Larger than the limit on its own: waiting would never end.
            return Verdict::WriteOut;
        }
        let beyond_share = self.dirty_bytes(volume).saturating_add(bytes) > self.share(volume);
        let middle = soft_bytes + (hard_bytes - soft_bytes) / 2;
        let limit = if beyond_share { middle } else { hard_bytes };
        if after > limit {
            return Verdict::WaitForRoom;
        }
        if !beyond_share && after <= middle {
            return Verdict::WriteOut;
        }
        let over = u128::from(after - soft_bytes);
        let room = u128::from((limit - soft_bytes).max(1));
        let delay = (u128::from(delay_max_ms) * over / room) as u64;
        if delay == 0 { Verdict::WriteOut } else { Verdict::Delay(delay) }
    }

    /// The part of the hard limit for a volume while as many volumes as now have dirty bytes.
    pub fn share(&self, volume: VolumeId) -> u64 {
        let others = self.dirty.keys().filter(|other| **other != volume).count() as u64;
        self.limits.hard_bytes / (others + 1)
    }

    /// `bytes` of `volume` became dirty.
    pub fn add(&mut self, volume: VolumeId, bytes: u64) {
        if bytes > 0 {
            *self.dirty.entry(volume).or_default() += bytes;
            self.total += bytes;
        }
    }

    /// `bytes` of `volume` became clean or were discarded. Never goes below zero.
    pub fn sub(&mut self, volume: VolumeId, bytes: u64) {
        let Some(dirty) = self.dirty.get_mut(&volume) else { return };
        let bytes = bytes.min(*dirty);
        *dirty -= bytes;
        self.total -= bytes;
        if *dirty == 0 {
            self.dirty.remove(&volume);
        }
    }

    /// Forgets a volume that was closed or deleted.
    pub fn forget(&mut self, volume: VolumeId) {
        self.total -= self.dirty.remove(&volume).unwrap_or(0);
    }

    /// Whether write-out should run now.
    pub fn wants_write_out(&self) -> bool {
        self.total > self.limits.soft_bytes
    }

    /// The volume to write out next: the one with the most dirty bytes.
    pub fn dirtiest(&self) -> Option<VolumeId> {
        self.dirty.iter().max_by_key(|(_, bytes)| **bytes).map(|(volume, _)| *volume)
    }

    /// Dirty bytes of a volume.
    pub fn dirty_bytes(&self, volume: VolumeId) -> u64 {
        self.dirty.get(&volume).copied().unwrap_or(0)
    }

    /// Dirty bytes of all volumes.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
#[path = "throttle_tests.rs"]
mod tests;
