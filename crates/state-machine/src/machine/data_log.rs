//! Data of small flushes: kept here until it is converted, and given to who opens the volume next.

use endio_types::planted::{self, Bug};
use endio_types::{
    BLOCK_BYTES, BLOCK_SIZE, Generation, IO_END_BLOCKS_MAX, IoEndId, Lblk, LblkRange, Reason,
    VOLUME_BYTES_MAX, VolumeId,
};

use super::io::{LogData, Output, Refusal, ToWriteback, WritebackSession};
use super::{CheckReport, Machine, Step};
use crate::data_log::{LogEntry, Logged};
use crate::extent_map::ChunkTable;
use crate::ledger::IoEnd;
use crate::record::{LogDone, Record};

impl<T: ChunkTable> Machine<T> {
    /// Keeps the data of a flush. The answer is sent when it is durable.
    pub(super) fn log_data(
        &mut self,
        session: WritebackSession,
        name: &str,
        log: LogData,
        out: &mut Output,
    ) -> Step<T> {
        let request = log.request;
        let message = match self.may_log(name, &log) {
            Ok(()) => {
                let LogData { volume, generation, number, entries, data, .. } = log;
                self.counters.logged_blocks += entries.len() as u64;
                let rt = self.volumes.entry(volume).or_default();
                rt.log_last = rt.log_last.max(number);
                self.commit(Record::Log { volume, generation, number, entries, data }, out)?;
                ToWriteback::Logged { request }
            }
            Err(refusal) => ToWriteback::Refused { request, refusal },
        };
        self.tell(session, self.when_committed(), message, out);
        Ok(())
    }

    fn may_log(&self, name: &str, log: &LogData) -> Result<(), Refusal> {
        let refuse = |reason, message| Err(self.refusal(reason, message));
        if self.granting_key().is_none() {
            return refuse(Reason::NotReady, "recovering");
        }
        if self.stopping {
            return refuse(Reason::Draining, "the service is stopping");
        }
        if self.metadata_full {
            return refuse(Reason::MetadataFull, "the metadata disk is full");
        }
        let volume = match self.owned(name, log.volume, log.generation) {
            Ok(volume) => volume,
            Err(reason) => return refuse(reason, "the volume is not open here"),
        };
        if let Some(message) = log.fault() {
            return refuse(Reason::Malformed, message);
        }
        if volume.in_place {
            return refuse(Reason::Malformed, "data of volumes written in place is not logged");
        }
        let size = if volume.growable { VOLUME_BYTES_MAX } else { volume.size_bytes };
        if log.entries.iter().any(|entry| entry.lblk.0 >= size.div_ceil(BLOCK_BYTES)) {
            return refuse(Reason::OutOfRange, "beyond the end of the volume");
        }
        let rt = self.volumes.get(&volume.id);
        let (over, last) = rt.map_or((0, 0), |rt| (rt.log_over, rt.log_last));
        if log.number <= over && !planted::is(Bug::LateLogCounts) {
            return refuse(Reason::WrongState, "newer data was converted or the map changed since");
        }
        // What overtook it on its way may have newer data of the same blocks.
        if log.number <= last && !planted::is(Bug::OvertakenLogCounts) {
            return refuse(Reason::WrongState, "the log has a newer message of the volume");
        }
        let (logs, more) = (&self.durable.logs, log.entries.len() as u64);
        let is_full = logs.blocks_of(volume.id) + more > self.limits.log_blocks_per_volume_max
            || logs.blocks() + more > self.limits.log_blocks_max;
        match is_full {
            true => refuse(Reason::Limit, "the data log is full"),
            // Whoever opens the volume next could have no room to write it out.
            false if self.logged_with(log) > volume.promised => {
                refuse(Reason::NoSpace, "no space is promised for the data")
            }
            false => Ok(()),
        }
    }

    /// Blocks that the log would hold of the volume.
    fn logged_with(&self, log: &LogData) -> u64 {
        let logs = &self.durable.logs;
        let block = |entry: &&LogEntry| LblkRange { start: entry.lblk, len: 1 };
        let fresh = log.entries.iter().filter(|e| !logs.has(log.volume, block(e), u64::MAX));
        logs.blocks_of(log.volume) + fresh.count() as u64
    }

    /// What of the data log ends with the conversion of an io_end.
    pub(super) fn ends_in_log(&self, io_end: &IoEnd, done: &mut Vec<LogDone>) {
        if self.durable.logs.is_empty() || planted::is(Bug::LoggedForEver) {
            return;
        }
        let volume = io_end.volume;
        let up_to = match planted::is(Bug::LoggedForgottenEarly) {
            true => u64::MAX,
            false => io_end.logged_up_to,
        };
        let ranges = io_end.durable_ranges().into_iter();
        let ends = ranges.filter(|range| self.durable.logs.has(volume, *range, up_to));
        done.extend(ends.map(|range| LogDone { volume, range, up_to }));
    }

    /// What was gathered for the log before the blocks of a write-out that is converted now would
    /// hide its newer data, if it came only after that.
    pub(super) fn older_is_late(&mut self, id: IoEndId) {
        let Some(io_end) = self.ledger.get(id) else { return };
        if let Some(rt) = self.volumes.get_mut(&io_end.volume) {
            rt.log_over = rt.log_over.max(io_end.logged_up_to);
        }
    }

    /// Entries of a volume from a block on, at most `blocks_max`, for its owner. Everything in the log
    /// when the volume was opened was durable before the answer to that.
    ///
    /// # Errors
    /// The volume is not open under that generation, or no volume has such a block.
    pub fn logged(
        &self,
        volume: VolumeId,
        generation: Generation,
        from: Lblk,
        blocks_max: usize,
    ) -> Result<Vec<(Lblk, Logged)>, Refusal> {
        let state = self.durable.volumes.get(&volume).filter(|volume| !volume.deleted);
        match state {
            None => Err(self.unknown()),
            Some(state) if state.owner.is_none() || state.generation != generation => {
                Err(self.refusal(Reason::OldGeneration, "the volume is not open under that"))
            }
            // Behind the end of this volume there is nothing, as whoever has read its last block may ask.
            Some(_) if from.0 > VOLUME_BYTES_MAX / BLOCK_BYTES => {
                Err(self.refusal(Reason::OutOfRange, "no volume is that large"))
            }
            Some(_) => {
                let found = self.durable.logs.from(volume, from).take(blocks_max);
                Ok(found.map(|(lblk, logged)| (lblk, logged.clone())).collect())
            }
        }
    }

    pub(super) fn check_logs(&self, report: &mut CheckReport) {
        let mut blocks = 0;
        for (id, lblk, logged) in self.durable.logs.iter() {
            blocks += 1;
            let volume = self.durable.volumes.get(&id).filter(|volume| !volume.deleted);
            let is_inside = volume.is_some_and(|volume| {
                volume.growable || lblk.0 < volume.size_bytes.div_ceil(BLOCK_BYTES)
            });
            if !is_inside {
                report.findings.push(format!("logged-inside: volume {id} block {lblk}"));
            }
            if logged.data.len() != BLOCK_SIZE || crc32c::crc32c(&logged.data) != logged.crc {
                report.findings.push(format!("logged-intact: volume {id} block {lblk}"));
            }
        }
        if blocks != self.durable.logs.blocks() {
            let counted = self.durable.logs.blocks();
            report.findings.push(format!("logged-counted: {blocks} blocks, {counted} counted"));
        }
    }
}

/// Largest number of a message: whoever opens the volume next counts on from there.
const LOG_NUMBER_MAX: u64 = 1 << 62;

impl LogData {
    /// What is wrong with the message itself, whatever the volume: nobody else looks at its blocks
    /// before the volume is opened the next time.
    pub fn fault(&self) -> Option<&'static str> {
        let entries = &self.entries;
        if !(1..=LOG_NUMBER_MAX).contains(&self.number) {
            return Some("a number is 1 to 2^62");
        }
        if entries.is_empty() || entries.len() > IO_END_BLOCKS_MAX as usize {
            return Some("no blocks, or more than an io_end may have");
        }
        if self.data.len() != entries.len() * BLOCK_SIZE {
            return Some("4096 bytes for each block");
        }
        if !entries.windows(2).all(|pair| pair[0].lblk < pair[1].lblk) {
            return Some("blocks ascend");
        }
        let is_behind = |entry: &LogEntry| {
            entry.end_bytes > entry.lblk.0.saturating_add(1).saturating_mul(BLOCK_BYTES)
        };
        if entries.iter().any(is_behind) {
            return Some("the size lies beyond what is logged");
        }
        let is_damaged = |(entry, data): (&LogEntry, &[u8])| crc32c::crc32c(data) != entry.crc;
        match entries.iter().zip(self.data.chunks_exact(BLOCK_SIZE)).any(is_damaged) {
            true => Some("the data does not match its checksum"),
            false => None,
        }
    }
}
