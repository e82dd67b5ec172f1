//! Spans of requests: cheap where nobody will look, complete where somebody will.
//!
//! ```text
//!   entry span (a request, a write-out) ──┬─ sampled ──────────────► recorder, OTLP
//!     its children wait with it           └─ not sampled ─ ended ─┬─ slow, failed, retried: kept
//!                                                                 └─ else: forgotten
//!   leg in another service ───┬─ sampled ► recorder, OTLP         ▲
//!   (its parent is remote)    └─ not ► ring ── asked to keep ─────┘
//! ```
//! Whether a trace is sampled is decided at its root and travels in the W3C context. A span of an
//! unsampled trace is a small struct that is filled in and thrown away; who began the trace decides
//! at its end whether it is worth keeping, and tells the others, which look into their rings.

mod context;
mod record;
mod ring;
mod sink;
mod span;

pub use context::Context;
pub(crate) use context::now_ns;
pub use record::{Record, Value};
pub use sink::{KEEP_QUEUE, TraceConfig, keep, take_kept};
pub(crate) use sink::{Sampler, Sink, counts, install};
pub use span::{InSpan, Span, Tracer, Why, current_context};

#[cfg(test)]
pub(crate) mod tests;
