//! The small state in a checkpoint, as bytes.
//!
//! ```text
//!   Snapshot [store names [data logs]]      postcard, one behind the other
//! ```
//! The names came after the first format, and the logs after the names. A checkpoint without any is
//! written as before, and an older program does not look behind what it knows.

use endio_state_machine::record::Snapshot;

pub(crate) fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, postcard::Error> {
    let mut bytes = postcard::to_stdvec(snapshot)?;
    if !snapshot.store_names.is_empty() || !snapshot.logs.is_empty() {
        bytes = postcard::to_extend(&snapshot.store_names, bytes)?;
    }
    if !snapshot.logs.is_empty() {
        bytes = postcard::to_extend(&snapshot.logs, bytes)?;
    }
    Ok(bytes)
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Snapshot, postcard::Error> {
    let (mut snapshot, rest) = postcard::take_from_bytes::<Snapshot>(bytes)?;
    if !rest.is_empty() {
        let (names, rest) = postcard::take_from_bytes(rest)?;
        snapshot.store_names = names;
        if !rest.is_empty() {
            snapshot.logs = postcard::from_bytes(rest)?;
        }
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use endio_state_machine::data_log::LogEntry;
    use endio_types::{BLOCK_SIZE, Generation, Lblk, StoreId, VolumeId};

    use super::*;

    #[test]
    fn names_and_logs_come_back_and_without_any_the_bytes_are_those_of_the_first_format() {
        let mut snapshot = Snapshot::new([7; 16]);
        let first = postcard::to_stdvec(&snapshot).unwrap();
        assert_eq!(encode(&snapshot).unwrap(), first);
        assert_eq!(decode(&first).unwrap(), snapshot);
        snapshot.store_names.insert(StoreId(3), "s3".to_owned());
        let bytes = encode(&snapshot).unwrap();
        assert_eq!(decode(&bytes).unwrap(), snapshot);
        // What a program of before makes of it.
        let older: Snapshot = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(older, Snapshot::new([7; 16]));
        for cut in first.len() + 1..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
        let names = bytes.len();
        let entry = LogEntry { lblk: Lblk(7), end_bytes: 1, crc: 2, stamp: 3 };
        let data = bytes::Bytes::from(vec![3; BLOCK_SIZE]);
        snapshot.logs.put(VolumeId(4), (Generation(5), 6), &[entry], &data).unwrap();
        let bytes = encode(&snapshot).unwrap();
        assert_eq!(decode(&bytes).unwrap(), snapshot);
        for cut in names + 1..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "{cut}");
        }
        snapshot.store_names.clear();
        assert_eq!(decode(&encode(&snapshot).unwrap()).unwrap(), snapshot);
    }
}
