//! The small state in a checkpoint, as bytes.
//!
//! ```text
//!   Snapshot [store names]      postcard, one behind the other
//! ```
//! The names came after the first format. A checkpoint without any is written as before, and an older
//! program does not look behind the snapshot.

use endio_state_machine::record::Snapshot;

pub(crate) fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, postcard::Error> {
    let bytes = postcard::to_stdvec(snapshot)?;
    match snapshot.store_names.is_empty() {
        true => Ok(bytes),
        false => postcard::to_extend(&snapshot.store_names, bytes),
    }
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Snapshot, postcard::Error> {
    let (mut snapshot, rest) = postcard::take_from_bytes::<Snapshot>(bytes)?;
    if !rest.is_empty() {
        snapshot.store_names = postcard::from_bytes(rest)?;
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use endio_types::StoreId;

    use super::*;

    #[test]
    fn names_of_stores_come_back_and_without_any_the_bytes_are_those_of_the_first_format() {
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
    }
}
