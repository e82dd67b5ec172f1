//! What an operator may set. Every limit has a unit, a default, a bound and a reason.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Configuration of the conversion service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of the metadata: journal, checkpoints, sled. Locked while the service runs.
    pub data_dir: PathBuf,
    /// Address to listen on.
    pub listen: String,
    /// Length of a holder's lease. Too small: a pause of a second aborts writes that would have
    /// finished; too large: the blocks and writes of a dead holder wait that long. 500 to 600,000.
    pub lease_ms: u32,
    /// Longest life of an io_end, whoever renews. Ends writes whose token was lost on the way.
    /// Must be longer than the lease. 1,000 to 3,600,000.
    pub io_end_life_max_ms: u64,
    /// io_ends of one volume at a time; beyond it BeginIo is refused with LIMIT. 1 to 1,000,000.
    pub io_ends_per_volume_max: usize,
    /// io_ends converted in one transaction. Larger batches need fewer commits and make a single
    /// completion wait longer. 1 to 65,536.
    pub convert_batch_max: usize,
    /// Inputs taken in one turn of the driver, hence in one commit. 1 to 65,536.
    pub inputs_per_turn_max: usize,
    /// Inputs that may wait for the driver; senders wait beyond it. 1 to 1,000,000.
    pub input_queue_max: usize,
    /// Messages that may wait for one peer; a peer that does not read is cut off beyond it.
    pub session_queue_max: usize,
    /// Bytes of decoded chunks of the extent map kept in memory. At least 1 MiB.
    pub map_cache_bytes: u64,
    /// Bytes of sled's own cache. At least 1 MiB.
    pub sled_cache_bytes: u64,
    /// A checkpoint starts when the journal has grown by this much (or by the size of the last
    /// checkpoint, if that is larger). Too small: constant checkpoints; too large: long replay.
    pub checkpoint_journal_bytes: u64,
    /// How long a stop may drain before what is held is named and left.
    pub drain_deadline_ms: u64,
    /// Share of traces that are sampled at the head, 0.0 to 1.0.
    pub trace_ratio: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("endio-data/conversion"),
            listen: "127.0.0.1:7401".to_owned(),
            lease_ms: 10_000,
            io_end_life_max_ms: 60_000,
            io_ends_per_volume_max: 16_384,
            convert_batch_max: 1_024,
            inputs_per_turn_max: 4_096,
            input_queue_max: 16_384,
            session_queue_max: 65_536,
            map_cache_bytes: 256 << 20,
            sled_cache_bytes: 64 << 20,
            checkpoint_journal_bytes: 64 << 20,
            drain_deadline_ms: 20_000,
            trace_ratio: 1.0,
        }
    }
}

impl Config {
    /// Every fault of the configuration, each a sentence that names the key.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut within = |key: &str, value: u64, low: u64, high: u64| {
            if !(low..=high).contains(&value) {
                faults.push(format!("{key} is {value}: it must lie between {low} and {high}"));
            }
        };
        within("lease_ms", self.lease_ms.into(), 500, 600_000);
        within("io_end_life_max_ms", self.io_end_life_max_ms, 1_000, 3_600_000);
        within("io_ends_per_volume_max", self.io_ends_per_volume_max as u64, 1, 1_000_000);
        within("convert_batch_max", self.convert_batch_max as u64, 1, 65_536);
        within("inputs_per_turn_max", self.inputs_per_turn_max as u64, 1, 65_536);
        within("input_queue_max", self.input_queue_max as u64, 1, 1_000_000);
        within("session_queue_max", self.session_queue_max as u64, 16, 10_000_000);
        within("map_cache_bytes", self.map_cache_bytes, 1 << 20, 1 << 40);
        within("sled_cache_bytes", self.sled_cache_bytes, 1 << 20, 1 << 40);
        within("checkpoint_journal_bytes", self.checkpoint_journal_bytes, 1 << 16, 1 << 40);
        within("drain_deadline_ms", self.drain_deadline_ms, 1, 3_600_000);
        if u64::from(self.lease_ms) >= self.io_end_life_max_ms {
            faults.push(format!(
                "io_end_life_max_ms is {}: it must be longer than lease_ms ({})",
                self.io_end_life_max_ms, self.lease_ms
            ));
        }
        if !(0.0..=1.0).contains(&self.trace_ratio) {
            faults.push(format!("trace_ratio is {}: it must lie between 0 and 1", self.trace_ratio));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_fault_and_all_faults_are_told_at_once() {
        assert_eq!(Config::default().faults(), Vec::<String>::new());
        let bad = Config { lease_ms: 0, convert_batch_max: 0, trace_ratio: 2.0, ..Config::default() };
        assert_eq!(bad.faults().len(), 3);
    }
}
