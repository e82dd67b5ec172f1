//! A slow, obvious copy of the data log, made of the records alone; and the order in which versions
//! of blocks were accepted, which no node knows.

use std::collections::BTreeMap;

use bytes::Bytes;
use endio_state_machine::data_log::{DataLogs, LogEntry, Logged};
use endio_state_machine::record::{ConvertVolume, LogDone, Record, Run};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk, LblkRange, VolumeId};

use crate::block::{ZEROES, crc, from_bytes};

/// The data logs of all volumes.
#[derive(Clone, Debug, Default)]
pub struct Logs(BTreeMap<(VolumeId, u64), Logged>);

impl Logs {
    /// Applies one record.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Log { volume, generation, number, entries, data } => {
                for (entry, data) in entries.iter().zip(data.chunks_exact(BLOCK_SIZE)) {
                    let LogEntry { lblk, end_bytes, crc, stamp } = *entry;
                    let data = Bytes::copy_from_slice(data);
                    let (number, generation) = (*number, *generation);
                    let logged = Logged { number, generation, end_bytes, crc, stamp, data };
                    self.0.insert((*volume, lblk.0), logged);
                }
            }
            Record::ConvertLogged { done, .. } => {
                self.0.retain(|(volume, lblk), logged| {
                    !done.iter().any(|done| ends(done, *volume, *lblk, logged))
                });
            }
            Record::ForgetLogged { volume, range } => {
                let block = |lblk| LblkRange::new(lblk, 1);
                self.0.retain(|(of, lblk), _| of != volume || !range.overlaps(block(*lblk)));
            }
            Record::DeleteVolume { volume } => self.0.retain(|(of, _), _| of != volume),
            Record::Resize { volume, size_bytes } => {
                self.0.retain(|(of, lblk), logged| {
                    let is_other = of != volume;
                    if !is_other {
                        logged.end_bytes = logged.end_bytes.min(*size_bytes);
                    }
                    is_other || *lblk < size_bytes.div_ceil(BLOCK_BYTES)
                });
            }
            _ => {}
        }
    }

    /// Compares them with the machine's.
    ///
    /// # Errors
    /// What they hold.
    pub fn compare(&self, theirs: &DataLogs) -> Result<(), String> {
        let all = || theirs.iter().map(|(volume, lblk, logged)| ((volume, lblk.0), logged));
        match all().eq(self.0.iter().map(|(at, logged)| (*at, logged))) {
            true => Ok(()),
            false => {
                let theirs: Vec<_> = all().map(|(at, logged)| (at, logged.number)).collect();
                let ours: Vec<_> = self.0.iter().map(|(at, logged)| (at, logged.number)).collect();
                Err(format!("log-is-its-records: {theirs:?}, not {ours:?}"))
            }
        }
    }

    /// Checksum of what is logged of a block.
    pub fn sum(&self, volume: VolumeId, lblk: u64) -> Option<u32> {
        self.0.get(&(volume, lblk)).map(|logged| sum_of(&logged.data))
    }

    /// Whether nothing is logged.
    ///
    /// # Errors
    /// What is.
    pub fn is_empty_but_for(&self, stay: &[VolumeId]) -> Result<(), String> {
        let left = self.0.iter().filter(|((volume, _), _)| !stay.contains(volume));
        let left: Vec<_> = left.map(|(at, logged)| (at, logged.number)).collect();
        match left.is_empty() {
            true => Ok(()),
            false => Err(format!("logged-until-converted: {left:?} stay in the log")),
        }
    }
}

fn ends(done: &LogDone, volume: VolumeId, lblk: u64, logged: &Logged) -> bool {
    done.volume == volume
        && done.range.overlaps(LblkRange::new(lblk, 1))
        && logged.number <= done.up_to
}

/// Under which generation, and after how many others.
type Order = (Generation, u64);

/// When writebacks accepted which data of a block: the first time, and the last time.
#[derive(Default)]
pub struct Versions {
    count: u64,
    known: BTreeMap<(VolumeId, u64, u32), (Order, Order)>,
}

impl Versions {
    /// A writeback accepts new data of a block.
    pub fn accepted(&mut self, volume: VolumeId, generation: Generation, lblk: u64, sum: u32) {
        self.count += 1;
        let order = (generation, self.count);
        let known = self.known.entry((volume, lblk, sum)).or_insert((order, order));
        known.1 = known.1.max(order);
    }

    fn of(&self, volume: VolumeId, lblk: u64, sum: u32) -> Result<(Order, Order), String> {
        let known = self.known.get(&(volume, lblk, sum)).copied();
        known.ok_or(format!("logged-until-converted: nobody wrote {sum:x} to {volume}:{lblk}"))
    }

    /// Data is about to be logged of blocks; `known` are the checksums of what is converted of one, and
    /// of what is logged.
    ///
    /// # Errors
    /// It is older than that.
    pub fn may_log(
        &self,
        volume: VolumeId,
        entries: &[LogEntry],
        data: &Bytes,
        known: impl Fn(u64) -> [Option<u32>; 2],
    ) -> Result<(), String> {
        for (LogEntry { lblk: Lblk(lblk), .. }, data) in
            entries.iter().zip(data.chunks_exact(BLOCK_SIZE))
        {
            for known in known(*lblk).into_iter().flatten() {
                let (_, last) = self.of(volume, *lblk, sum_of(data))?;
                if last < self.of(volume, *lblk, known)?.0 {
                    return Err(format!(
                        "logged-until-converted: {volume}:{lblk} has newer data than what is logged"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Blocks are about to be converted. What ends in the log is not newer, and what stays is.
    ///
    /// # Errors
    /// The first block of which that is not so.
    pub fn may_convert(
        &self,
        logs: &Logs,
        items: &[ConvertVolume],
        done: &[LogDone],
    ) -> Result<(), String> {
        // Of a block that is converted twice the last one counts.
        let mut converted: BTreeMap<(VolumeId, u64), u32> = BTreeMap::new();
        for item in items {
            for Run { lblk, crcs, .. } in &item.runs {
                let blocks = (lblk.0..).zip(crcs);
                converted.extend(blocks.map(|(lblk, sum)| ((item.volume, lblk), *sum)));
            }
        }
        for ((volume, lblk), logged) in &logs.0 {
            let is_over = done.iter().any(|done| ends(done, *volume, *lblk, logged));
            let Some(sum) = converted.get(&(*volume, *lblk)) else {
                if is_over {
                    let why = format!("{volume}:{lblk} ends unconverted");
                    return Err(format!("logged-until-converted: {why}"));
                }
                continue;
            };
            let in_log = self.of(*volume, *lblk, sum_of(&logged.data))?;
            let now = self.of(*volume, *lblk, *sum)?;
            let wrong = match is_over {
                true if in_log.0 > now.1 => "ends with older data",
                // Zeroes are the one thing that is written more than once.
                false if in_log.1 <= now.0 && *sum != crc(&ZEROES) => "stays with newer data",
                _ => continue,
            };
            let number = logged.number;
            return Err(format!(
                "logged-until-converted: {volume}:{lblk} of message {number} {wrong} converted"
            ));
        }
        Ok(())
    }
}

fn sum_of(data: &[u8]) -> u32 {
    from_bytes(data).first().map_or(0, crc)
}
