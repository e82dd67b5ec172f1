use std::sync::Arc;

use endio_api::{
    blockstore::ReadRequest,
    conversion::{Fence, VolumeFenced, store_command::Command},
};
use endio_store::block::{DeviceFault, MemoryDevice};
use endio_types::{Pblk, Reason};

use crate::{bench::*, fake::*};

#[tokio::test]
async fn a_read_returns_what_was_written_and_zeroes_where_nothing_was() {
    let (_conversion, mut store, _session) = ready(Arc::new(MemoryDevice::new(100))).await;
    store.write(Want { pblk: 98, ..Want::default() }, blocks(5, 1)).await;
    let expected = [blocks(5, 1), blocks(0, 1)].concat();
    for crc32c in [Vec::new(), crcs(&expected)] {
        let done = store.read_blocks(98, 2, crc32c).await;
        assert_eq!((done.request, done.reason), (9, 0));
        assert_eq!(done.data, expected);
    }
}

/// Scenario 76.
#[tokio::test]
async fn a_damaged_block_is_named_and_its_data_is_not_returned() {
    let device = Arc::new(MemoryDevice::new(100));
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    let crc32c = crcs(&blocks(1, 3));
    let write = async |store: &mut Store, io_end| {
        let want = Want { io_end, pblk: 10, blocks: 3, ..Want::default() };
        assert_eq!(store.write(want, blocks(1, 3)).await.reason, 0);
    };
    write(&mut store, 1).await;
    device.flip_bit(Pblk(11), 12_345);
    let done = store.read_blocks(10, 3, crc32c.clone()).await;
    assert_eq!(reason(done.reason), Some(Reason::ChecksumMismatch));
    assert_eq!((done.bad_pblk, done.data.len()), (11, 0));

    write(&mut store, 2).await;
    assert_eq!(store.read_blocks(10, 3, crc32c.clone()).await.reason, 0);
    device.inject(DeviceFault::MisdirectedWrite(Pblk(11)));
    let want = Want { io_end: 3, pblk: 50, ..Want::default() };
    assert_eq!(store.write(want, blocks(7, 1)).await.reason, 0);
    let done = store.read_blocks(10, 3, crc32c).await;
    assert_eq!((reason(done.reason), done.bad_pblk), (Some(Reason::ChecksumMismatch), 11));
    let lost = store.read_blocks(50, 1, crcs(&blocks(7, 1))).await;
    assert_eq!((reason(lost.reason), lost.bad_pblk), (Some(Reason::ChecksumMismatch), 50));
}

#[tokio::test]
async fn a_device_that_cannot_read_is_told_and_the_next_read_succeeds() {
    let device = Arc::new(MemoryDevice::new(100));
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    device.inject(DeviceFault::ReadError);
    let done = store.read_blocks(0, 1, Vec::new()).await;
    assert_eq!(reason(done.reason), Some(Reason::IoError));
    assert_eq!(store.read_blocks(0, 1, Vec::new()).await.reason, 0);
}

#[tokio::test]
async fn a_read_that_is_not_allowed_is_refused_with_its_reason() {
    let (_conversion, mut store, mut session) = ready(Arc::new(MemoryDevice::new(100))).await;
    let good = ReadRequest { grant: Some(grant(1, 2)), blocks: 1, ..Default::default() };
    assert_eq!(store.read(good.clone()).await.reason, 0);
    let volumes = vec![VolumeFenced { volume: 3, generation: 2 }];
    session.send(Command::Fence(Fence { fence: 1, volumes, ..Fence::default() })).await;
    session.next().await;
    let mut forged = good.clone();
    forged.grant.as_mut().unwrap().volume = 4;
    let bad = [
        (ReadRequest { grant: None, ..good.clone() }, Reason::Malformed),
        (forged, Reason::ForgedToken),
        (ReadRequest { grant: Some(grant(0, 2)), ..good.clone() }, Reason::OldEpoch),
        (ReadRequest { grant: Some(grant(1, 1)), ..good.clone() }, Reason::OldGeneration),
        (ReadRequest { blocks: 0, ..good.clone() }, Reason::Malformed),
        (ReadRequest { blocks: 1025, ..good.clone() }, Reason::Malformed),
        (ReadRequest { blocks: u32::MAX, ..good.clone() }, Reason::Malformed),
        (ReadRequest { crc32c: vec![1, 2], ..good.clone() }, Reason::Malformed),
        (ReadRequest { pblk: 100, ..good.clone() }, Reason::OutOfRange),
        (ReadRequest { pblk: u64::MAX, ..good.clone() }, Reason::OutOfRange),
    ];
    for (request, expected) in bad {
        let done = store.read(request).await;
        assert_eq!(reason(done.reason), Some(expected));
        assert!(done.data.is_empty());
    }
    assert_eq!(store.read(good).await.reason, 0);
}

#[tokio::test]
async fn the_longest_read_fits_in_one_message() {
    let (_conversion, mut store, _session) = ready(Arc::new(MemoryDevice::new(2_000))).await;
    let want = Want { pblk: 7, blocks: 1024, ..Want::default() };
    assert_eq!(store.write(want, blocks(3, 1024)).await.reason, 0);
    let done = store.read_blocks(7, 1024, crcs(&blocks(3, 1024))).await;
    assert_eq!((done.reason, done.data.len()), (0, 4 << 20));
}
