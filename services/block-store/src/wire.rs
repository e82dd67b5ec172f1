//! Answers and checksums of this service.

use endio_api::{blockstore, common, convert::reason_to_wire};
use endio_types::{BLOCK_SIZE, Reason};

/// Answer to a bio that named `token`.
pub(crate) fn bio_done(
    token: Option<&common::Token>,
    outcome: Result<(), Reason>,
    message: &str,
) -> blockstore::BioDone {
    blockstore::BioDone {
        io_end: token.map_or(0, |token| token.io_end),
        segment: token.map_or(0, |token| token.segment),
        reason: reason_to_wire(outcome.err()),
        message: message.to_owned(),
    }
}

/// Index of the first block whose CRC-32C is not the expected one. Blocks without an expected
/// checksum are not looked at.
pub(crate) fn first_mismatch(data: &[u8], expected: &[u32]) -> Option<usize> {
    data.chunks(BLOCK_SIZE)
        .zip(expected)
        .position(|(block, expected)| crc32c::crc32c(block) != *expected)
}
