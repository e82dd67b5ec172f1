//! Devices that fail, lie, forget and fill up.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use endio_api::conversion::ListStoresRequest;
use endio_api::writeback::{FsyncRequest, ReadRequest, SyncAllRequest, WriteMode, WriteRequest};
use endio_integration_tests::services::{Conversion, STORE_BLOCKS, Store};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_store::block::DeviceFault;
use endio_testkit::client::{Client, Refused};
use endio_testkit::seed::{self, Rng};
use endio_types::{Pblk, Reason};

pub(crate) const VOLUME_BYTES: u64 = 16 << 20;
/// Neighbouring regions of so many blocks are read from different copies first.
const REGION_BLOCKS: u64 = 256;

pub(crate) async fn write(
    client: &Client,
    offset: u64,
    data: &[u8],
    mode: WriteMode,
) -> Result<(), Refused> {
    let write = WriteRequest {
        volume: "vol1".into(),
        offset_bytes: offset,
        data: Bytes::copy_from_slice(data),
        mode: mode.into(),
        ..Default::default()
    };
    Ok(client.io().write(write).await.map(drop)?)
}

pub(crate) async fn direct(client: &Client, offset: u64, data: &[u8]) {
    write(client, offset, data, WriteMode::Direct).await.unwrap();
}

/// One store, and a writeback that gives up early.
struct Impatient {
    writeback: Writeback,
    store: Store,
    _conversion: Conversion,
    _directory: tempfile::TempDir,
}

impl Impatient {
    async fn start(store_blocks: u64, io_timeout_ms: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let conversion = Conversion::start(directory.path()).await;
        let store = Store::start_with(&conversion.url, store_blocks).await;
        let config = endio_writeback::Config {
            conversion: conversion.url.clone(),
            cache_dir: directory.path().join("cache"),
            io_timeout_ms,
            ..Default::default()
        };
        let writeback = Writeback::start_with(config).await;
        Self { writeback, store, _conversion: conversion, _directory: directory }
    }
}

async fn stack(stores: usize, replicas: u32) -> (Stack, Client) {
    let stack = Stack::start(stores).await;
    let client = stack.client();
    client.create("vol1", VOLUME_BYTES, replicas).await.unwrap();
    (stack, client)
}

/// Scenarios 19, 20, 25. A device error in one segment is retried elsewhere; the caller sees
/// success, and the data is what it wrote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_fails_once_succeeds_on_fresh_blocks() {
    let (stack, client) = stack(1, 1).await;
    let faults = [
        DeviceFault::WriteError,
        DeviceFault::WriteNoSpace,
        DeviceFault::ShortWrite(3),
        DeviceFault::FlushError,
    ];
    for (number, fault) in (0..).zip(faults) {
        let data = vec![number + 1; 64 << 10];
        stack.stores[0].device.memory.inject(fault);
        direct(&client, u64::from(number) << 20, &data).await;
        let read = client.read("vol1", u64::from(number) << 20, 64 << 10).await.unwrap();
        assert!(read == data, "{fault:?}");
    }
    client.settles().await.unwrap();
}

/// Scenarios 73, 75. A power cut of the store's device after an acknowledgement loses nothing,
/// whatever subset of its cache the device wrote back by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_of_the_device_loses_nothing_that_was_acknowledged_as_durable() {
    let (mut stack, client) = stack(1, 1).await;
    let mut rng = Rng::new(73);
    let mut expected = vec![0; 4 << 20];
    for round in 1..=6_u8 {
        for _ in 0..8 {
            let offset = rng.below((3 << 20) / 512) * 512;
            let length = usize::try_from(rng.between(1, 512) * 512).unwrap();
            let data = vec![round.wrapping_mul(31).wrapping_add(offset as u8); length];
            let is_direct = rng.chance(50);
            let mode = if is_direct { WriteMode::Direct } else { WriteMode::Buffered };
            write(&client, offset, &data, mode).await.unwrap();
            let at = usize::try_from(offset).unwrap();
            expected[at..at + length].copy_from_slice(&data);
        }
        client.fsync("vol1").await.unwrap();
        stack.stores[0].crash().await;
        let survives = rng.fork();
        let mut survives = survives.clone();
        stack.stores[0].device.memory.lose_power_except(|_| survives.chance(50));
        stack.stores[0].start_again().await;
        let read = client.read("vol1", 0, 4 << 20).await.unwrap();
        let differs = read.iter().zip(&expected).position(|(read, wrote)| read != wrote);
        assert_eq!(differs, None, "round {round}: first byte that differs");
    }
    client.settles().await.unwrap();
}

pub(crate) async fn place_of(client: &Client, lblk: u64) -> Vec<(u32, u64)> {
    let request = endio_api::writeback::ExtentsRequest {
        volume: "vol1".into(),
        offset_bytes: lblk * 4096,
        length_bytes: 4096,
    };
    let mut stream = client.inspect().extents(request).await.unwrap().into_inner();
    let mut places = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        for extent in answer.extents {
            let into = lblk.saturating_sub(extent.lblk);
            places.extend(extent.places.iter().map(|place| (place.store, place.pblk + into)));
        }
    }
    places
}

/// Scenario 76. A flipped bit is found on read; with another replica it is not even noticed by the
/// reader, without one it is an error, and never data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_is_never_returned() {
    let (stack, client) = stack(1, 1).await;
    direct(&client, 0, &[5; 4096]).await;
    let places = place_of(&client, 0).await;
    assert_eq!(places.len(), 1);
    stack.stores[0].device.memory.flip_bit(Pblk(places[0].1), 1234);
    let impatient = client.clone().with_patience(Duration::from_secs(3));
    let refused = impatient.read("vol1", 0, 4096).await.unwrap_err();
    assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused}");
    let check = client.check(true).await.unwrap();
    assert!(!check.findings.is_empty(), "a check with data finds it");
    direct(&client, 0, &[6; 4096]).await;
    assert_eq!(client.read("vol1", 0, 4096).await.unwrap(), vec![6; 4096]);
}

/// A block as one read shows it.
pub(crate) async fn read_once(client: &Client, offset_bytes: u64) -> Result<Vec<u8>, Refused> {
    let request = ReadRequest {
        volume: "vol1".into(),
        offset_bytes,
        length_bytes: 4096,
        ..Default::default()
    };
    let mut pieces = client.io().read(request).await?.into_inner();
    let mut data = Vec::new();
    while let Some(piece) = pieces.message().await? {
        data.extend_from_slice(&piece.data);
        data.resize(data.len() + usize::try_from(piece.zeroes_bytes).unwrap(), 0);
    }
    Ok(data)
}

/// A writeback that remembers no clean block, so that each read reaches the stores, and "vol1".
async fn without_memory(stack: &Stack, replicas: u32) -> (Writeback, Client) {
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("without-memory"),
        read_cache_bytes: 0,
        ..Default::default()
    };
    let writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create("vol1", VOLUME_BYTES, replicas).await.unwrap();
    (writeback, client)
}

/// The stores by their numbers.
async fn holders<'a>(stack: &'a Stack, client: &Client) -> BTreeMap<u32, &'a Store> {
    let listed = client.inspect().stores(ListStoresRequest {}).await.unwrap().into_inner();
    let of = |url: &str| stack.stores.iter().find(|store| store.url == url).unwrap();
    listed.stores.into_iter().map(|store| (store.id, of(&store.url))).collect()
}

/// Many random flips, each read back at once: `ENDIO_FLIP_ROUNDS`. With one copy a read is an error,
/// with two it is the data, and in no case other bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_random_flip_is_silent() {
    let rounds = seed::number("ENDIO_FLIP_ROUNDS", 60);
    let mut rng = Rng::new(seed::announce("endio-integration-tests", "no_random_flip_is_silent"));
    for (replicas, share) in [(1, rounds / 2), (2, rounds - rounds / 2)] {
        let stack = Stack::start(replicas).await;
        let (_writeback, client) = without_memory(&stack, u32::try_from(replicas).unwrap()).await;
        let holders = holders(&stack, &client).await;
        let mut errors = 0;
        for round in 0..share {
            let (block, fill) = (rng.below(64), u8::try_from(round % 255).unwrap() + 1);
            let data = vec![fill; 4096];
            direct(&client, block * 4096, &data).await;
            let places = place_of(&client, block).await;
            assert_eq!(places.len(), replicas);
            let victim = usize::try_from(rng.below(places.len() as u64)).unwrap();
            let (store, pblk) = places[victim];
            let bit = usize::try_from(rng.below(4096 * 8)).unwrap();
            holders[&store].device.memory.flip_bit(Pblk(pblk), bit);
            match (replicas, read_once(&client, block * 4096).await) {
                (1, Err(refused)) => {
                    assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused}");
                    errors += 1;
                }
                (1, Ok(_)) => panic!("round {round}: a flipped bit in {block} was not told"),
                (_, read) => assert!(read.unwrap() == data, "round {round}: block {block}"),
            }
        }
        eprintln!("{share} flips with {replicas} copies, {errors} reads failed, none was silent");
    }
}

/// Scenario 76. Whichever copy is bad, a read that meets it takes the other one and nobody is told. The
/// bad copy stays as it is: each read meets it anew, and when the other copy goes bad as well, the data
/// is lost and a read says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_replica_is_read_around() {
    let stack = Stack::start(2).await;
    let (writeback, client) = without_memory(&stack, 2).await;
    let holders = holders(&stack, &client).await;
    for (first, region) in [0, REGION_BLOCKS].into_iter().enumerate() {
        let offset = region * 4096;
        direct(&client, offset, &[5; 8192]).await;
        let places = place_of(&client, region).await;
        assert_eq!(places.len(), 2, "two replicas");
        let flip = |copy: usize, bit| {
            let (store, pblk) = places[copy];
            holders[&store].device.memory.flip_bit(Pblk(pblk), bit);
        };
        flip(first, 3);
        for _ in 0..2 {
            let before = writeback.reads_repaired();
            assert_eq!(client.read("vol1", offset, 8192).await.unwrap(), vec![5; 8192]);
            assert_eq!(
                writeback.reads_repaired(),
                before + 1,
                "the bad copy is met and passed over"
            );
        }
        flip(1 - first, 4);
        let refused = read_once(&client, offset).await.unwrap_err();
        assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused}");
        flip(first, 3);
        let before = writeback.reads_repaired();
        assert_eq!(client.read("vol1", offset, 8192).await.unwrap(), vec![5; 8192]);
        assert_eq!(writeback.reads_repaired(), before, "the good copy was asked first");
    }
}

/// Scenario 76. A write that the device loses or puts elsewhere is found by its checksum.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_misdirected_write_is_never_returned_as_data() {
    let (stack, client) = stack(1, 1).await;
    direct(&client, 0, &[1; 4096]).await;
    for fault in [DeviceFault::LostWrite, DeviceFault::MisdirectedWrite(Pblk(9000))] {
        stack.stores[0].device.memory.inject(fault);
        direct(&client, 0, &[2; 4096]).await;
        let impatient = client.clone().with_patience(Duration::from_secs(3));
        match impatient.read("vol1", 0, 4096).await {
            Ok(data) => assert_eq!(data, vec![2; 4096], "{fault:?} was returned as data"),
            Err(refused) => assert_eq!(refused.reason, Reason::ChecksumMismatch, "{refused}"),
        }
    }
}

/// Scenario 74. A full store is a clear error to the write that hits it; nothing is lost, and
/// service resumes when space returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_is_a_clear_error_and_service_resumes_after_a_trim() {
    let services = Impatient::start(1024, 5_000).await;
    let client = services.writeback.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    let mut written = 0;
    let refused = loop {
        let data = vec![u8::try_from(written % 251).unwrap() + 1; 64 << 10];
        match write(&client, written << 16, &data, WriteMode::Direct).await {
            Ok(()) => written += 1,
            Err(refused) => break refused,
        }
        assert!(written <= 64, "more was written than there is space");
    };
    assert_eq!(refused.reason, Reason::NoSpace, "{refused}");
    assert!(written >= 32, "only {written} of 64 pieces fit into an empty store");
    for piece in 0..written {
        let data = client.read("vol1", piece << 16, 64 << 10).await.unwrap();
        assert_eq!(data[0], u8::try_from(piece % 251).unwrap() + 1);
    }
    let trim = endio_api::writeback::RangeRequest {
        volume: "vol1".into(),
        offset_bytes: 0,
        length_bytes: 1 << 20,
        ..Default::default()
    };
    client.io().trim(trim).await.unwrap();
    let mut last = None;
    for _ in 0..100 {
        last = write(&client, 0, &[9; 64 << 10], WriteMode::Direct).await.err();
        if last.is_none() {
            break;
        }
    }
    assert!(last.is_none(), "service does not resume: {last:?}");
    assert_eq!(client.read("vol1", 0, 64 << 10).await.unwrap(), vec![9; 64 << 10]);
    client.settles().await.unwrap();
}

/// Direct writes that share an io_end are refused together only if none of them fits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn direct_writes_at_once_use_a_store_to_its_last_block() {
    let services = Impatient::start(1024, 5_000).await;
    let client = services.writeback.client();
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    // So that what is left in the end is not nothing.
    write(&client, 12 << 20, &[1; 5 * 4096], WriteMode::Direct).await.unwrap();
    let mut pieces = 0;
    while write(&client, pieces << 16, &[1; 64 << 10], WriteMode::Direct).await.is_ok() {
        pieces += 1;
        assert!(pieces <= 64, "more was written than there is space");
    }
    let small = |number: u64| {
        let client = client.clone();
        let offset = (8 << 20) + (number << 13);
        let write = WriteRequest {
            volume: "vol1".into(),
            offset_bytes: offset,
            data: Bytes::from_static(&[2; 4096]),
            mode: WriteMode::Direct.into(),
            // Not sampled: sampled writes go alone.
            traceparent: format!("00-{:032x}-{:016x}-00", number + 1, number + 1),
            ..Default::default()
        };
        async move { Ok::<_, Refused>(client.io().write(write).await.map(|_| offset)?) }
    };
    // Fewer than 16 blocks are left: some fit, and most do not.
    let all = futures_util::future::join_all((0..64).map(small)).await;
    for outcome in &all {
        match outcome {
            Ok(offset) => {
                let read = client.read("vol1", *offset, 4096).await.unwrap();
                assert!(read.iter().all(|byte| *byte == 2));
            }
            Err(refused) => assert_eq!(refused.reason, Reason::NoSpace, "{refused}"),
        }
    }
    let fitted = all.iter().filter(|outcome| outcome.is_ok()).count();
    assert!((1..16).contains(&fitted), "{fitted} fitted");
    assert_eq!(small(64).await.unwrap_err().reason, Reason::NoSpace, "a block was left");
    client.settles().await.unwrap();
}

/// Promise 6, scenario 23. A device that fails for longer than the timeout is told to the
/// fsync that hits it; the data stays dirty, and once the fault clears, all is well without help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_is_told_and_does_not_stick() {
    let services = Impatient::start(STORE_BLOCKS, 4_000).await;
    let (store, client) = (&services.store, services.writeback.client());
    client.create("vol1", VOLUME_BYTES, 1).await.unwrap();
    direct(&client, 1 << 20, &[1; 4096]).await;
    store.device.break_down();
    write(&client, 0, &[8; 8192], WriteMode::Buffered).await.unwrap();
    let impatient = client.clone().with_patience(Duration::from_millis(1));
    let fsync = |client: &Client| {
        let mut io = client.io();
        let volume = "vol1".to_owned();
        async move {
            io.fsync(endio_api::writeback::FsyncRequest {
                volume,
                may_log: false,
                ..Default::default()
            })
            .await
        }
    };
    let refused: Refused = fsync(&impatient).await.unwrap_err().into();
    assert_ne!(refused.reason, Reason::Malformed, "{refused}");
    let other = write(&client, 1 << 20, &[2; 4096], WriteMode::Direct).await.unwrap_err();
    let expected = [Reason::TimedOut, Reason::IoError];
    assert!(expected.contains(&other.reason), "{other}");
    assert_eq!(client.read("vol1", 0, 8192).await.unwrap(), vec![8; 8192], "it stays readable");
    store.device.open();
    // The failure may be told once more to an observer that has not heard of it; then no more.
    let mut failures = 0;
    while let Err(status) = fsync(&client).await {
        failures += 1;
        assert!(failures <= 2, "the error sticks: {status}");
    }
    assert_eq!(client.read("vol1", 0, 8192).await.unwrap(), vec![8; 8192]);
    client.settles().await.unwrap();
}

/// Promise 6. A call that syncs every volume answers with one error: what is wrong with the others is
/// told to who asks for them next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_syncs_all_hears_one_error_and_the_others_stay_untold() {
    let services = Impatient::start(STORE_BLOCKS, 2_000).await;
    let (store, client) = (&services.store, services.writeback.client());
    for volume in ["vol1", "vol2"] {
        client.create(volume, VOLUME_BYTES, 1).await.unwrap();
    }
    direct(&client, 1 << 20, &[1; 4096]).await;
    store.device.break_down();
    for volume in ["vol1", "vol2"] {
        let request = WriteRequest {
            volume: volume.to_owned(),
            data: Bytes::from_static(&[2; 4096]),
            mode: WriteMode::Buffered.into(),
            ..Default::default()
        };
        client.io().write(request).await.unwrap();
    }
    let all = client.io().sync_all(SyncAllRequest {}).await;
    store.device.open();
    assert!(all.is_err(), "a device that fails was not heard of");
    let mut told = 0;
    for volume in ["vol1", "vol2"] {
        let fsync =
            || FsyncRequest { volume: volume.to_owned(), may_log: false, ..Default::default() };
        let once = client.io().fsync(fsync()).await;
        told += u32::from(once.is_err());
        assert!(client.io().fsync(fsync()).await.is_ok(), "{volume}: the error sticks");
    }
    assert!(told > 0, "one of two errors was told to nobody");
    client.settles().await.unwrap();
}

/// Scenario 40. An fsync waits for a segment that is not durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_fsync_waits_for_a_segment_in_flight() {
    let (stack, client) = stack(1, 1).await;
    stack.stores[0].device.close();
    write(&client, 0, &[3; 4096], WriteMode::Buffered).await.unwrap();
    let waiting = client.clone();
    let fsync = tokio::spawn(async move { waiting.fsync("vol1").await });
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(!fsync.is_finished(), "an fsync of data that is nowhere");
    stack.stores[0].device.open();
    fsync.await.unwrap().unwrap();
    assert_eq!(client.read("vol1", 0, 4096).await.unwrap(), vec![3; 4096]);
}

/// Scenario 37. A lone DSYNC write costs its store one flush, the same as without; what is durable
/// already costs none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dsync_write_costs_one_flush_and_what_is_durable_already_none() {
    let (stack, client) = stack(1, 1).await;
    let device = &stack.stores[0].device;
    let writes =
        [(WriteMode::Direct, false), (WriteMode::Direct, true), (WriteMode::Buffered, true)];
    for (at, (mode, dsync)) in (0..).zip(writes) {
        let before = device.flushes();
        let request = WriteRequest {
            volume: "vol1".into(),
            offset_bytes: at << 20,
            data: Bytes::from_static(&[7; 8192]),
            mode: mode.into(),
            dsync,
            ..Default::default()
        };
        client.io().write(request).await.unwrap();
        assert_eq!(device.flushes(), before + 1, "{mode:?}, dsync: {dsync}");
        client.fsync("vol1").await.unwrap();
        assert_eq!(device.flushes(), before + 1, "{mode:?}, dsync: {dsync}: it was durable");
    }
    write(&client, 4 << 20, &[8; 4096], WriteMode::Buffered).await.unwrap();
    let before = device.flushes();
    client.fsync("vol1").await.unwrap();
    assert_eq!(device.flushes(), before + 1, "it was not durable");
}

/// Scenarios 31, 34. Until the conversion, readers see the old data; afterwards the new.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_during_an_overwrite_sees_old_or_new_and_never_zeroes() {
    let (stack, client) = stack(1, 1).await;
    direct(&client, 0, &[1; 8192]).await;
    stack.stores[0].device.close();
    let writer = client.clone();
    let overwrite = tokio::spawn(async move { direct(&writer, 0, &[2; 8192]).await });
    let reader = client.clone();
    let read = tokio::spawn(async move { reader.read("vol1", 0, 8192).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!overwrite.is_finished(), "a direct write ended before its data was durable");
    stack.stores[0].device.open();
    overwrite.await.unwrap();
    let read = read.await.unwrap();
    assert!(read == vec![1; 8192] || read == vec![2; 8192], "neither old nor new: {}", read[0]);
    assert_eq!(client.read("vol1", 0, 8192).await.unwrap(), vec![2; 8192]);
}

/// Scenario 53. With a store away, writes with two replicas go to the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_goes_on_elsewhere_while_a_store_is_away() {
    let (mut stack, client) = stack(3, 2).await;
    direct(&client, 0, &[1; 1 << 20]).await;
    stack.stores[1].crash().await;
    direct(&client, 1 << 20, &[2; 1 << 20]).await;
    write(&client, 2 << 20, &[3; 1 << 20], WriteMode::Buffered).await.unwrap();
    client.fsync("vol1").await.unwrap();
    let read = client.read("vol1", 0, 3 << 20).await.unwrap();
    for (piece, value) in read.chunks(1 << 20).zip(1..) {
        assert!(piece.iter().all(|byte| *byte == value), "piece {value}");
    }
    stack.stores[1].start_again().await;
    stack.wait_for_stores(3).await;
    client.settles().await.unwrap();
}
