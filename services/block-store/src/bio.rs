//! One bio from its stream to its answers.

use std::time::{Duration, Instant};

use endio_api::{blockstore, common, conversion, convert::reason_to_wire};
use endio_chassis::trace::Span;
use endio_state_machine::token::Token;
use endio_types::{BLOCK_SIZE, Reason};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Where the answers of a stream go, and the shares of the stream's budget that an answer holds
/// until the transport takes it.
#[derive(Debug)]
pub(crate) struct Reply<T> {
    pub(crate) to: mpsc::Sender<Answer<T>>,
    pub(crate) permits: Permits,
}

/// Shares of a stream's and the service's budgets.
#[derive(Debug)]
pub(crate) struct Permits {
    pub(crate) _count: OwnedSemaphorePermit,
    pub(crate) _bytes: OwnedSemaphorePermit,
}

/// An answer on its way to the transport.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) message: T,
    pub(crate) _permits: Permits,
}

impl<T> Reply<T> {
    /// Sends the answer. A caller that has gone away is none that must know.
    pub(crate) fn send(self, message: T) {
        // The channel holds as many answers as the stream has permits, so it is never full.
        let _ = self.to.try_send(Answer { message, _permits: self.permits });
    }
}

/// An admitted bio without its data.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) token: Token,
    pub(crate) wire: common::Token,
    pub(crate) crc32c: Vec<u32>,
    pub(crate) span: Span,
    /// Of the writer, for conversion: a span that was recorded even if this process ends now.
    pub(crate) traceparent: String,
    /// When the leg that it is in began.
    pub(crate) leg_began: Instant,
    pub(crate) reply: Reply<blockstore::BioDone>,
    /// When the bio arrived.
    pub(crate) arrived: std::time::Instant,
}

impl Segment {
    /// How long the leg lasted that ends now; the next one begins.
    pub(crate) fn next_leg(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.leg_began, now))
    }
}

/// The span of a segment, under the write that it belongs to.
pub(crate) fn segment_span(token: &common::Token, traceparent: &str) -> Span {
    crate::TRACER
        .leg("segment", traceparent)
        .with("volume", token.volume)
        .with("io_end", token.io_end)
        .with("segment", token.segment)
        .with("store", token.store)
        .with("pblk", token.pblk)
        .with("blocks", token.blocks)
        .with("length", u64::from(token.blocks) * BLOCK_SIZE as u64)
}

/// The release that tells conversion how the segment ended.
pub(crate) fn release(
    segment: &Segment,
    crc32c: Vec<u32>,
    outcome: Result<(), Reason>,
) -> conversion::SegmentRelease {
    conversion::SegmentRelease {
        token: Some(segment.wire.clone()),
        reason: reason_to_wire(outcome.err()),
        crc32c: if outcome.is_ok() { crc32c } else { Vec::new() },
        traceparent: segment.traceparent.clone(),
    }
}
