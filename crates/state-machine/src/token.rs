//! Tokens and read grants: permissions that a block-store verifies by itself.
//!
//! The MAC is the first 16 bytes of keyed BLAKE3 over a fixed encoding: a tag byte that tells
//! tokens (`1`) from read grants (`2`), then every field in the order of the struct, little-endian,
//! at its full width. The encoding has one length per tag, so no two values share one.

use std::fmt;

use endio_types::{
    ClusterEpoch, Generation, Incarnation, IoEndId, Pblk, SegmentIndex, StoreId, VolumeId,
};

/// Length of a MAC in bytes.
pub const MAC_LEN: usize = 16;

const TAG_TOKEN: u8 = 1;
const TAG_READ_GRANT: u8 = 2;

/// The secret key of one epoch. `Debug` prints nothing of it.
#[derive(Clone)]
pub struct TokenKey([u8; 32]);

impl TokenKey {
    /// From 32 random bytes, drawn anew for each epoch.
    pub fn new(key: [u8; 32]) -> Self {
        Self(key)
    }
    /// The bytes, for handing the key to a block-store. Never logged.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
    fn mac(&self, encoded: &[u8]) -> [u8; MAC_LEN] {
        let hash = blake3::keyed_hash(&self.0, encoded);
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&hash.as_bytes()[..MAC_LEN]);
        mac
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// One leased reference on an io_end. See `endio.common.v1.Token` for the fields.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token {
    /// Epoch that granted it.
    pub epoch: ClusterEpoch,
    /// The io_end.
    pub io_end: IoEndId,
    /// 0: the submitter's.
    pub segment: SegmentIndex,
    /// The volume.
    pub volume: VolumeId,
    /// Its generation at grant.
    pub generation: Generation,
    /// Store that may use it; 0 for the submitter's.
    pub store: StoreId,
    /// The store's incarnation at grant; 0 for the submitter's.
    pub incarnation: Incarnation,
    /// First physical block; 0 for the submitter's.
    pub pblk: Pblk,
    /// Length in blocks; 0 for the submitter's.
    pub blocks: u32,
    /// Length of the lease in milliseconds.
    pub lease_ms: u32,
    /// Keyed hash over all of the above.
    pub mac: [u8; MAC_LEN],
}

impl Token {
    /// The bytes under the MAC.
    fn encode(&self) -> [u8; 69] {
        let mut out = Encoder::new(TAG_TOKEN);
        out.put(&self.epoch.0.to_le_bytes());
        out.put(&self.io_end.0.to_le_bytes());
        out.put(&self.segment.0.to_le_bytes());
        out.put(&self.volume.0.to_le_bytes());
        out.put(&self.generation.0.to_le_bytes());
        out.put(&self.store.0.to_le_bytes());
        out.put(&self.incarnation.0.to_le_bytes());
        out.put(&self.pblk.0.to_le_bytes());
        out.put(&self.blocks.to_le_bytes());
        out.put(&self.lease_ms.to_le_bytes());
        out.bytes
    }
    /// The token with the MAC that belongs to its other fields.
    #[must_use]
    pub fn signed(self, key: &TokenKey) -> Self {
        Self { mac: key.mac(&self.encode()), ..self }
    }
    /// Whether the MAC belongs to the other fields. Takes the same time whatever differs.
    pub fn verify(&self, key: &TokenKey) -> bool {
        same(&key.mac(&self.encode()), &self.mac)
    }
}

/// Permission to read blocks of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReadGrant {
    /// Epoch that granted it.
    pub epoch: ClusterEpoch,
    /// The volume.
    pub volume: VolumeId,
    /// The generation that may read.
    pub generation: Generation,
    /// Keyed hash over all of the above.
    pub mac: [u8; MAC_LEN],
}

impl ReadGrant {
    fn encode(&self) -> [u8; 25] {
        let mut out = Encoder::new(TAG_READ_GRANT);
        out.put(&self.epoch.0.to_le_bytes());
        out.put(&self.volume.0.to_le_bytes());
        out.put(&self.generation.0.to_le_bytes());
        out.bytes
    }
    /// A grant for one generation of a volume.
    pub fn new(
        key: &TokenKey,
        epoch: ClusterEpoch,
        volume: VolumeId,
        generation: Generation,
    ) -> Self {
        let unsigned = Self { epoch, volume, generation, mac: [0; MAC_LEN] };
        Self { mac: key.mac(&unsigned.encode()), ..unsigned }
    }
    /// Whether the MAC belongs to the other fields. Takes the same time whatever differs.
    pub fn verify(&self, key: &TokenKey) -> bool {
        same(&key.mac(&self.encode()), &self.mac)
    }
}

struct Encoder<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Encoder<N> {
    fn new(tag: u8) -> Self {
        let mut bytes = [0; N];
        bytes[0] = tag;
        Self { bytes, at: 1 }
    }
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }
}

/// Compares without an early exit, so that timing tells nothing about a forged MAC.
fn same(left: &[u8; MAC_LEN], right: &[u8; MAC_LEN]) -> bool {
    let differs = left.iter().zip(right).fold(0u8, |acc, (a, b)| acc | (a ^ b));
    std::hint::black_box(differs) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            epoch: ClusterEpoch(3),
            io_end: IoEndId(77),
            segment: SegmentIndex(2),
            volume: VolumeId(5),
            generation: Generation(9),
            store: StoreId(1),
            incarnation: Incarnation(4),
            pblk: Pblk(1000),
            blocks: 16,
            lease_ms: 5000,
            mac: [0; MAC_LEN],
        }
    }

    /// Scenario 10.
    #[test]
    fn a_token_with_any_one_field_changed_is_refused() {
        let key = TokenKey::new([7; 32]);
        let good = token().signed(&key);
        assert!(good.verify(&key));
        let changed = [
            Token { epoch: ClusterEpoch(2), ..good },
            Token { io_end: IoEndId(78), ..good },
            Token { segment: SegmentIndex(1), ..good },
            Token { volume: VolumeId(4), ..good },
            Token { generation: Generation(8), ..good },
            Token { store: StoreId(2), ..good },
            Token { incarnation: Incarnation(5), ..good },
            Token { pblk: Pblk(1001), ..good },
            Token { blocks: 17, ..good },
            Token { lease_ms: 5001, ..good },
        ];
        for bad in changed {
            assert!(!bad.verify(&key), "{bad:?}");
        }
        for bit in 0..MAC_LEN * 8 {
            let mut bad = good;
            bad.mac[bit / 8] ^= 1 << (bit % 8);
            assert!(!bad.verify(&key), "bit {bit}");
        }
        assert!(!good.verify(&TokenKey::new([8; 32])));
    }

    #[test]
    fn a_read_grant_is_bound_to_its_epoch_volume_and_generation() {
        let key = TokenKey::new([7; 32]);
        let good = ReadGrant::new(&key, ClusterEpoch(1), VolumeId(2), Generation(3));
        assert!(good.verify(&key));
        assert!(!ReadGrant { epoch: ClusterEpoch(2), ..good }.verify(&key));
        assert!(!ReadGrant { volume: VolumeId(3), ..good }.verify(&key));
        assert!(!ReadGrant { generation: Generation(4), ..good }.verify(&key));
    }

    #[test]
    fn a_key_prints_nothing() {
        assert_eq!(format!("{:?}", TokenKey::new([7; 32])), "TokenKey(..)");
    }
}
