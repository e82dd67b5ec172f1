//! What came out.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Why a run could not be made.
#[derive(Debug)]
#[non_exhaustive]
pub enum BenchError {
    /// The options contradict each other or the volume.
    Usage(String),
    /// A call failed, or the stream broke.
    Call(tonic::Status),
    /// A task of the load generator died.
    Task(tokio::task::JoinError),
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) => f.write_str(message),
            Self::Call(status) => write!(f, "a call failed: {}", status.message()),
            Self::Task(error) => write!(f, "a task died: {error}"),
        }
    }
}

impl std::error::Error for BenchError {}

/// Longest latency that is told apart, in microseconds: one hour.
const US_MAX: u64 = 3_600_000_000;

/// Latencies in microseconds, three digits exact.
#[derive(Clone, Debug)]
pub struct Latency(Histogram<u64>);

impl Default for Latency {
    fn default() -> Self {
        // The bounds are constants that the histogram accepts.
        Self(Histogram::new_with_bounds(1, US_MAX, 3).expect("1 < one hour, and 3 digits exist"))
    }
}

impl Latency {
    /// Counts one. Longer than an hour counts as an hour.
    pub(crate) fn record(&mut self, us: u64) {
        self.0.saturating_record(us.max(1));
    }

    /// Adds all of another one.
    pub(crate) fn merge(&mut self, other: &Self) {
        // Both have the same bounds, so this cannot be refused.
        let _ = self.0.add(&other.0);
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The latency in microseconds that this share (0.0 to 1.0) stays at or below; 0 if none.
    #[must_use]
    pub fn us(&self, share: f64) -> u64 {
        self.0.value_at_quantile(share)
    }

    fn json(&self) -> Value {
        json!({
            "count": self.count(), "p50_us": self.us(0.5), "p99_us": self.us(0.99),
            "p999_us": self.us(0.999), "max_us": if self.count() == 0 { 0 } else { self.0.max() },
        })
    }
}

/// Result of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// From the first request to the last completion.
    pub elapsed: Duration,
    /// Reads and writes that completed, without fsyncs.
    pub ops: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Acknowledgement of writes as their mode says.
    pub write: Latency,
    /// Reads.
    pub read: Latency,
    /// fsync calls.
    pub flush: Latency,
    /// Last release to durable conversion, as the service says, of writes that waited for one.
    pub convert: Latency,
    /// Requests that failed; they are not tried again.
    pub failed: u64,
    /// The first failure; empty: none.
    pub first_error: String,
    /// Open load: requests that were due but never sent, because the run ended.
    pub unsent: u64,
    /// Blocks read back and compared.
    pub verified: u64,
    /// Blocks that were not what was acknowledged last.
    pub mismatches: u64,
    /// The first of those; empty: none.
    pub first_mismatch: String,
}

impl Report {
    pub(crate) fn merge(&mut self, other: &Self) {
        self.elapsed = self.elapsed.max(other.elapsed);
        self.ops += other.ops;
        self.bytes += other.bytes;
        self.write.merge(&other.write);
        self.read.merge(&other.read);
        self.flush.merge(&other.flush);
        self.convert.merge(&other.convert);
        self.failed += other.failed;
        self.unsent += other.unsent;
        self.verified += other.verified;
        self.mismatches += other.mismatches;
        for (mine, theirs) in [
            (&mut self.first_error, &other.first_error),
            (&mut self.first_mismatch, &other.first_mismatch),
        ] {
            if mine.is_empty() {
                mine.clone_from(theirs);
            }
        }
    }

    pub(crate) fn mismatch(&mut self, what: String) {
        self.mismatches += 1;
        if self.first_mismatch.is_empty() {
            self.first_mismatch = what;
        }
    }

    pub(crate) fn failure(&mut self, what: impl FnOnce() -> String) {
        self.failed += 1;
        if self.first_error.is_empty() {
            self.first_error = what();
        }
    }

    fn per_second(&self, count: u64) -> f64 {
        #[allow(clippy::cast_precision_loss)] // a rate for people
        let count = count as f64;
        count / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The report as one object.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "seconds": self.elapsed.as_secs_f64(), "ops": self.ops, "bytes": self.bytes,
            "ops_per_second": self.per_second(self.ops),
            "bytes_per_second": self.per_second(self.bytes),
            "acknowledge": self.write.json(), "read": self.read.json(),
            "flush": self.flush.json(), "convert": self.convert.json(),
            "failed": self.failed, "first_error": self.first_error, "unsent": self.unsent,
            "verified_blocks": self.verified, "mismatches": self.mismatches,
            "first_mismatch": self.first_mismatch,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.per_second(self.bytes) / f64::from(1 << 20);
        writeln!(
            f,
            "{} ops in {:.2} s: {:.0} ops/s, {mib:.1} MiB/s",
            self.ops,
            self.elapsed.as_secs_f64(),
            self.per_second(self.ops),
        )?;
        writeln!(f, "{:12}{:>10}{:>12}{:>12}{:>12}", "", "count", "p50 us", "p99 us", "p99.9 us")?;
        for (name, latency) in [
            ("acknowledge", &self.write),
            ("read", &self.read),
            ("flush", &self.flush),
            ("convert", &self.convert),
        ] {
            if latency.count() > 0 {
                let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| latency.us(share));
                writeln!(f, "{name:12}{:>10}{p50:>12}{p99:>12}{p999:>12}", latency.count())?;
            }
        }
        if self.failed > 0 {
            writeln!(f, "{} requests FAILED, the first with {}", self.failed, self.first_error)?;
        }
        if self.unsent > 0 {
            writeln!(f, "{} requests were due and not sent: the rate is too high", self.unsent)?;
        }
        if self.verified > 0 {
            writeln!(f, "{} blocks read back, {} WRONG", self.verified, self.mismatches)?;
        }
        if !self.first_mismatch.is_empty() {
            writeln!(f, "first: {}", self.first_mismatch)?;
        }
        Ok(())
    }
}
