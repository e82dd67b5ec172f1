//! proto ⇄ domain. Validation happens here, once, on receipt; what leaves is valid by construction.

mod conversion;

use bytes::Bytes;
use endio_state_machine::chunk::ExtentState;
use endio_state_machine::extent_map::MapExtent;
use endio_state_machine::token::{MAC_LEN, ReadGrant, Token};
use endio_types::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Pblk, Reason, SegmentIndex, StoreId, VolumeId,
};

pub use conversion::{
    call_refused, deletions_to_proto, from_store, from_writeback, io_end_to_proto, logged_to_proto,
    lookup_to_proto, map_change, store_to_proto, to_store, to_writeback, volume_to_proto,
};

use crate::common;

/// A field that cannot be understood. Becomes INVALID_ARGUMENT with a BadRequest detail.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Malformed {
    /// Path of the field.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: &'static str,
}

impl Malformed {
    /// `message` says what is wrong with `field`.
    pub fn new(field: &'static str, message: &'static str) -> Self {
        Self { field, message }
    }
}

impl From<Malformed> for tonic::Status {
    fn from(malformed: Malformed) -> Self {
        crate::status::malformed(malformed.field, malformed.message)
    }
}

/// `None` (success, accepted) is 0 on the wire.
pub fn reason_to_wire(reason: Option<Reason>) -> i32 {
    reason.map_or(0, |reason| reason as i32)
}

/// 0 is `None`.
///
/// # Errors
/// A number that this version does not know: it must not be taken for success.
pub fn reason_from_wire(number: i32) -> Result<Option<Reason>, Malformed> {
    if number == 0 {
        return Ok(None);
    }
    Reason::from_wire(number).map(Some).ok_or(Malformed::new("reason", "unknown number"))
}

/// The token for the wire.
pub fn token_to_proto(token: &Token) -> common::Token {
    common::Token {
        cluster_epoch: token.epoch.0,
        io_end: token.io_end.0,
        segment: token.segment.0,
        volume: token.volume.0,
        volume_generation: token.generation.0,
        store: token.store.0,
        store_incarnation: token.incarnation.0,
        pblk: token.pblk.0,
        blocks: token.blocks,
        lease_ms: token.lease_ms,
        mac: Bytes::copy_from_slice(&token.mac),
    }
}

/// The token from the wire. Whether it is genuine is for [`Token::verify`].
///
/// # Errors
/// It is absent, or its MAC has another length.
pub fn token_from_proto(token: Option<&common::Token>) -> Result<Token, Malformed> {
    let token = token.ok_or(Malformed::new("token", "is required"))?;
    Ok(Token {
        epoch: ClusterEpoch(token.cluster_epoch),
        io_end: IoEndId(token.io_end),
        segment: SegmentIndex(token.segment),
        volume: VolumeId(token.volume),
        generation: Generation(token.volume_generation),
        store: StoreId(token.store),
        incarnation: Incarnation(token.store_incarnation),
        pblk: Pblk(token.pblk),
        blocks: token.blocks,
        lease_ms: token.lease_ms,
        mac: mac(&token.mac, "token.mac")?,
    })
}

/// The grant for the wire.
pub fn grant_to_proto(grant: &ReadGrant) -> common::ReadGrant {
    common::ReadGrant {
        cluster_epoch: grant.epoch.0,
        volume: grant.volume.0,
        volume_generation: grant.generation.0,
        mac: Bytes::copy_from_slice(&grant.mac),
    }
}

/// The grant from the wire. Whether it is genuine is for [`ReadGrant::verify`].
///
/// # Errors
/// It is absent, or its MAC has another length.
pub fn grant_from_proto(grant: Option<&common::ReadGrant>) -> Result<ReadGrant, Malformed> {
    let grant = grant.ok_or(Malformed::new("grant", "is required"))?;
    Ok(ReadGrant {
        epoch: ClusterEpoch(grant.cluster_epoch),
        volume: VolumeId(grant.volume),
        generation: Generation(grant.volume_generation),
        mac: mac(&grant.mac, "grant.mac")?,
    })
}

fn mac(bytes: &[u8], field: &'static str) -> Result<[u8; MAC_LEN], Malformed> {
    bytes.try_into().map_err(|_| Malformed::new(field, "must be 16 bytes"))
}

/// A mapped extent for the wire. The map cuts extents at chunks, so their length fits.
pub fn extent_to_proto(extent: &MapExtent) -> common::Extent {
    let state = match extent.state {
        ExtentState::Unwritten => common::ExtentState::Unwritten,
        ExtentState::Written => common::ExtentState::Written,
    };
    let place = |place: &endio_state_machine::chunk::Place| common::Place {
        store: place.store.0,
        pblk: place.pblk.0,
    };
    common::Extent {
        lblk: extent.range.start.0,
        blocks: u32::try_from(extent.range.len).unwrap_or(u32::MAX),
        state: state.into(),
        places: extent.places.as_slice().iter().map(place).collect(),
        crc32c: extent.crcs.clone(),
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_wire_and_a_short_mac_is_refused() {
        let token = Token {
            epoch: ClusterEpoch(1),
            io_end: IoEndId(2),
            segment: SegmentIndex(3),
            volume: VolumeId(4),
            generation: Generation(5),
            store: StoreId(6),
            incarnation: Incarnation(7),
            pblk: Pblk(8),
            blocks: 9,
            lease_ms: 10,
            mac: [11; MAC_LEN],
        };
        let mut wire = token_to_proto(&token);
        assert_eq!(token_from_proto(Some(&wire)), Ok(token));
        wire.mac = Bytes::from_static(b"short");
        assert_eq!(token_from_proto(Some(&wire)).map_err(|e| e.field), Err("token.mac"));
        assert_eq!(token_from_proto(None).map_err(|e| e.field), Err("token"));
    }

    #[test]
    fn an_unknown_reason_is_not_taken_for_success() {
        assert_eq!(reason_from_wire(0), Ok(None));
        assert!(reason_from_wire(9_999).is_err());
        assert!(reason_from_wire(-1).is_err());
    }
}
