//! A slow, obvious copy of the extent map, made of the records alone; and what it knows better
//! than any node: where a bio must never land, and what may be converted.

use std::collections::{BTreeMap, BTreeSet};

use endio_state_machine::chunk::ExtentState;
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::record::{Record, Run};
use endio_types::{Generation, IoEndId, LblkRange, StoreId, VolumeId};

use crate::logs::Logs;

/// A physical block.
pub type Home = (StoreId, u64);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapped {
    homes: Vec<Home>,
    written: bool,
    /// Which conversion put it there; 0: none did.
    by: u64,
    /// Its checksum, if it has one.
    sum: Option<u32>,
}

/// All volumes' maps.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    maps: BTreeMap<VolumeId, BTreeMap<u64, Mapped>>,
    homes: BTreeMap<Home, (VolumeId, u64)>,
    in_place: BTreeSet<VolumeId>,
    converted: BTreeSet<IoEndId>,
    logs: Logs,
    /// Volumes that are open, under which generation.
    open: BTreeMap<VolumeId, Generation>,
}

impl Mirror {
    /// Applies one record.
    ///
    /// # Errors
    /// What is wrong with it, in words that begin with the checker's name.
    pub fn apply(&mut self, seq: u64, record: &Record) -> Result<(), String> {
        match record {
            Record::CreateVolume(volume) if volume.in_place => {
                self.in_place.insert(volume.id);
            }
            Record::Convert(items) | Record::ConvertLogged { volumes: items, .. } => {
                for item in items {
                    for io_end in &item.io_ends {
                        if !self.converted.insert(*io_end) {
                            return Err(format!(
                                "convert_once_and_only_if_all_durable: io_end {io_end} twice"
                            ));
                        }
                    }
                    for run in &item.runs {
                        self.map(item.volume, run, true, seq)?;
                    }
                }
            }
            Record::Allocate { volume, runs } => {
                for run in runs {
                    self.map(*volume, run, false, seq)?;
                }
            }
            Record::OpenVolume { volume, generation, .. } => {
                self.open.insert(*volume, *generation);
            }
            Record::CloseVolume { volume } | Record::DeleteVolume { volume } => {
                self.open.remove(volume);
            }
            Record::Unmap { volume, range } => self.unmap(*volume, *range),
            Record::Zero { volume, range } => {
                let map = self.maps.entry(*volume).or_default();
                for (_, mapped) in map.range_mut(range.start.0..range.start.0 + range.len) {
                    mapped.written = false;
                }
            }
            Record::ForgetLogged { volume, range } => {
                let map = self.maps.entry(*volume).or_default();
                let blocks = map.range(range.start.0..range.start.0.saturating_add(range.len));
                if let Some((lblk, _)) = blocks.into_iter().find(|(_, mapped)| mapped.written) {
                    let why = format!("{volume}:{lblk} is forgotten before it reads as zeroes");
                    return Err(format!("logged-until-converted: {why}"));
                }
            }
            _ => {}
        }
        self.logs.apply(record);
        Ok(())
    }

    fn unmap(&mut self, volume: VolumeId, range: LblkRange) {
        let map = self.maps.entry(volume).or_default();
        let end = range.start.0.saturating_add(range.len);
        let gone: Vec<u64> = map.range(range.start.0..end).map(|(lblk, _)| *lblk).collect();
        for lblk in gone {
            for home in map.remove(&lblk).into_iter().flat_map(|mapped| mapped.homes) {
                self.homes.remove(&home);
            }
        }
    }

    fn map(&mut self, volume: VolumeId, run: &Run, written: bool, by: u64) -> Result<(), String> {
        for at in 0..u64::from(run.blocks) {
            let lblk = run.lblk.0 + at;
            let homes: Vec<Home> =
                run.places.iter().map(|(store, pblk)| (*store, pblk.0 + at)).collect();
            self.unmap(volume, LblkRange::new(lblk, 1));
            for home in &homes {
                if let Some(other) = self.homes.insert(*home, (volume, lblk)) {
                    return Err(format!("one-class: {home:?} is mapped twice, also by {other:?}"));
                }
            }
            let sum = run.crcs.get(at as usize).copied();
            let mapped = Mapped { homes, written, by, sum };
            self.maps.entry(volume).or_default().insert(lblk, mapped);
        }
        Ok(())
    }

    /// Whether the volume is open under this generation.
    pub fn is_open_under(&self, volume: VolumeId, generation: Generation) -> bool {
        self.open.get(&volume) == Some(&generation)
    }

    /// Whether a bio of a volume that redirects may land on a block: never where a map leads.
    pub fn may_land(&self, volume: VolumeId, home: Home) -> bool {
        self.in_place.contains(&volume) || !self.homes.contains_key(&home)
    }

    /// Blocks of volumes that redirect.
    pub fn homes_apart(&self) -> impl Iterator<Item = Home> + '_ {
        let apart = self.homes.iter().filter(|(_, (volume, _))| !self.in_place.contains(volume));
        apart.map(|(home, _)| *home)
    }

    /// The data logs.
    pub fn logs(&self) -> &Logs {
        &self.logs
    }

    /// Checksum of a block, if it is written and has one.
    pub fn sum(&self, volume: VolumeId, lblk: u64) -> Option<u32> {
        self.written_at(volume, lblk).map(|(_, sum)| sum)
    }

    /// Where a block is, and its checksum, if it is written and has one.
    pub fn written_at(&self, volume: VolumeId, lblk: u64) -> Option<(&[Home], u32)> {
        let mapped = self.maps.get(&volume)?.get(&lblk)?;
        mapped.sum.filter(|_| mapped.written).map(|sum| (mapped.homes.as_slice(), sum))
    }

    /// Whether the volume is written in place.
    pub fn is_in_place(&self, volume: VolumeId) -> bool {
        self.in_place.contains(&volume)
    }

    /// Blocks of a volume that are written.
    pub fn written(&self, volume: VolumeId) -> u64 {
        let map = self.maps.get(&volume).into_iter().flatten();
        map.filter(|(_, mapped)| mapped.written).count() as u64
    }

    /// Compares a volume's map with the machine's.
    ///
    /// # Errors
    /// The first block where they differ.
    pub fn compare(&self, volume: VolumeId, extents: &[MapExtent]) -> Result<(), String> {
        let mut theirs = BTreeMap::new();
        for extent in extents {
            for at in 0..extent.range.len {
                let homes: Vec<Home> = extent
                    .places
                    .as_slice()
                    .iter()
                    .map(|place| (place.store, place.pblk.0 + at))
                    .collect();
                let written = extent.state == ExtentState::Written;
                theirs.insert(extent.range.start.0 + at, (homes, written));
            }
        }
        let ours: BTreeMap<u64, (Vec<Home>, bool)> = self
            .maps
            .get(&volume)
            .into_iter()
            .flatten()
            .map(|(lblk, mapped)| (*lblk, (mapped.homes.clone(), mapped.written)))
            .collect();
        match ours == theirs {
            true => Ok(()),
            false => {
                Err(format!("map-is-its-records: volume {volume} has {theirs:?}, not {ours:?}"))
            }
        }
    }
}
