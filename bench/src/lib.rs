//! Load over gRPC: throughput, and the latencies of acknowledge, flush and convert apart.
//!
//! *Closed* load keeps a number of requests in flight and sends the next when one completes: it
//! shows what the service can do. *Open* load sends at a rate, whatever completes, and counts
//! latency from when a request was due: it shows what users feel when the service stalls.

mod load;
mod options;
mod pattern;
mod report;

pub use load::run;
pub use options::{AccessPattern, Mode, Options};
pub use report::{BenchError, Latency, Report};
