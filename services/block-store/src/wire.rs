//! Messages of this service ⇄ domain.

use endio_api::{blockstore, common};
use endio_state_machine::token::{MAC_LEN, ReadGrant, Token};
use endio_types::{
    BLOCK_SIZE, ClusterEpoch, Generation, Incarnation, IoEndId, Pblk, Reason, SegmentIndex,
    StoreId, VolumeId,
};

/// A token as it came. Only its form is checked here.
pub(crate) fn token(wire: &common::Token) -> Option<Token> {
    Some(Token {
        epoch: ClusterEpoch(wire.cluster_epoch),
        io_end: IoEndId(wire.io_end),
        segment: SegmentIndex(wire.segment),
        volume: VolumeId(wire.volume),
        generation: Generation(wire.volume_generation),
        store: StoreId(wire.store),
        incarnation: Incarnation(wire.store_incarnation),
        pblk: Pblk(wire.pblk),
        blocks: wire.blocks,
        lease_ms: wire.lease_ms,
        mac: mac(&wire.mac)?,
    })
}

/// A read grant as it came.
pub(crate) fn read_grant(wire: &common::ReadGrant) -> Option<ReadGrant> {
    Some(ReadGrant {
        epoch: ClusterEpoch(wire.cluster_epoch),
        volume: VolumeId(wire.volume),
        generation: Generation(wire.volume_generation),
        mac: mac(&wire.mac)?,
    })
}

fn mac(bytes: &[u8]) -> Option<[u8; MAC_LEN]> {
    bytes.try_into().ok()
}

/// The number of a reason; 0 for none.
pub(crate) fn reason(reason: Option<Reason>) -> i32 {
    reason.map_or(0, |reason| reason as i32)
}

/// Answer to a bio that named `token`.
pub(crate) fn bio_done(
    token: Option<&common::Token>,
    outcome: Result<(), Reason>,
    message: &str,
) -> blockstore::BioDone {
    blockstore::BioDone {
        io_end: token.map_or(0, |token| token.io_end),
        segment: token.map_or(0, |token| token.segment),
        reason: reason(outcome.err()),
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
