//! Volumes that are taken while their writeback does not hear of it.

use bytes::Bytes;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::conversion::conversion_message::Message as FromConversion;
use endio_api::writeback::{
    ExtentsRequest, FsyncRequest, RetryKey, VolumeRequest, WriteMode, WriteRequest,
};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::{Said, Tampering, Verdict};
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Where the first owner never wrote.
const HOLE: u64 = 8 * MIB;

/// Of a writeback that writes nothing out unless somebody waits for it.
fn lazy(stack: &Stack, name: &str, conversion: &str) -> endio_writeback::Config {
    endio_writeback::Config {
        conversion: conversion.to_owned(),
        cache_dir: stack.directory.path().join(name),
        write_out_after_ms: 600_000,
        ..Default::default()
    }
}

async fn write(client: &Client, volume: &str, offset_bytes: u64, mode: WriteMode) {
    fill(client, volume, offset_bytes, mode, 7).await;
}

async fn fill(client: &Client, volume: &str, offset_bytes: u64, mode: WriteMode, byte: u8) {
    let request = WriteRequest {
        volume: volume.to_owned(),
        offset_bytes,
        data: Bytes::from(vec![byte; BLOCK as usize]),
        mode: mode.into(),
        ..Default::default()
    };
    client.io().write(request).await.unwrap();
}

/// How many extents a block is told to have, as the question is answered once.
async fn extents(client: &Client, name: &str, offset_bytes: u64) -> Result<usize, Reason> {
    let volume = name.to_owned();
    let request = ExtentsRequest { volume, offset_bytes, length_bytes: BLOCK };
    let told = async {
        let mut stream = client.inspect().extents(request).await?.into_inner();
        let mut told = 0;
        while let Some(message) = stream.message().await? {
            told += message.extents.len();
        }
        Ok(told)
    };
    told.await.map_err(|status: tonic::Status| Refused::from(status).reason)
}

/// What is a hole in the map has data in the cache of the next owner, and what is in the cache here may be
/// anything there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_lost_a_volume_unheard_does_not_tell_where_it_has_holes() {
    let stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let first = Writeback::start_with(lazy(&stack, "first", &between.url)).await;
    let second = Writeback::start_with(lazy(&stack, "second", &stack.conversion.url)).await;
    let client = first.client();
    client.create("fixed", 16 * MIB, 1).await.unwrap();
    write(&client, "fixed", 0, WriteMode::Direct).await;
    let (name, growable) = ("growing".to_owned(), true);
    client.create_as(CreateVolumeRequest { name, growable, ..Default::default() }).await.unwrap();
    // Conversion does not know yet that it is longer than nothing.
    write(&client, "growing", HOLE, WriteMode::Buffered).await;
    let questions = [("fixed", 0), ("fixed", HOLE), ("growing", 0), ("growing", HOLE)];
    for (name, offset) in questions {
        assert_eq!(extents(&client, name, offset).await, Ok(1), "{name} at {offset}");
    }
    between.judges(|said| match said {
        Said::ByConversion(FromConversion::Fenced(_)) => Verdict::Lose,
        _ => Verdict::PassOn,
    });
    for name in ["fixed", "growing"] {
        second.client().open(name, true).await.unwrap();
        write(&second.client(), name, HOLE, WriteMode::Buffered).await;
    }
    for (name, offset) in questions {
        let told = extents(&client, name, offset).await;
        assert_eq!(told, Err(Reason::OldGeneration), "{name} at {offset}");
        assert_eq!(extents(&second.client(), name, offset).await, Ok(1));
    }
}

/// A close is carried out, and its answer is late. Somebody else has opened the volume by then, and written to it:
/// what is remembered of it here is not answered any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_remembered_of_a_volume_is_not_read_while_its_close_is_not_answered() {
    const NAME: &str = "vol1";
    let stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let config = |name: &str, conversion: &str| endio_writeback::Config {
        io_timeout_ms: 3_000,
        ..lazy(&stack, name, conversion)
    };
    let first = Writeback::start_with(config("first", &between.url)).await;
    let second = Writeback::start_with(config("second", &stack.conversion.url)).await;
    let (client, other) = (first.client(), second.client());
    client.create(NAME, 16 * MIB, 1).await.unwrap();
    write(&client, NAME, 0, WriteMode::Direct).await;
    for _ in 0..2 {
        assert_eq!(client.read(NAME, 0, BLOCK).await.unwrap(), [7; BLOCK as usize]);
    }
    between.holds_closes(true);
    let mut volumes = client.volumes();
    let closing = tokio::spawn(async move {
        volumes.close(VolumeRequest { name: NAME.to_owned() }).await.map(drop)
    });
    let mut opened = other.open(NAME, false).await;
    for _ in 0..200 {
        if opened.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        opened = other.open(NAME, false).await;
    }
    opened.expect("it is closed, whoever hears so");
    fill(&other, NAME, 0, WriteMode::Direct, 9).await;
    assert!(!closing.is_finished(), "its answer is held back");
    if let Ok(read) = client.read(NAME, 0, BLOCK).await {
        assert_eq!(read, [9; BLOCK as usize], "what another one has written over");
    }
    between.holds_closes(false);
    // Too late, or not: it is not open there in either case.
    let _ = closing.await.unwrap();
    assert_eq!(other.read(NAME, 0, BLOCK).await.unwrap(), [9; BLOCK as usize]);
    other.settles().await.unwrap();
}

/// Under a session of its own: fsync says once to each what it may have lost, whoever else was told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_session_hears_of_what_it_may_have_lost_whoever_else_was_told() {
    let stack = Stack::start(1).await;
    let url = &stack.conversion.url;
    let mut first = Writeback::start_with(lazy(&stack, "first", url)).await;
    let second = Writeback::start_with(lazy(&stack, "second", url)).await;
    let (old, new) = (first.client(), second.client());
    old.create("vol1", 64 * MIB, 1).await.unwrap();
    let named = |session: u8| Bytes::from(vec![session; 16]);
    let write = async |session: u8, sequence: u64| {
        let retry = RetryKey { session: named(session), sequence, is_retry: false };
        let request = WriteRequest {
            volume: "vol1".to_owned(),
            data: Bytes::from(vec![session; BLOCK as usize]),
            retry: Some(retry),
            ..Default::default()
        };
        old.io().write(request).await.unwrap();
    };
    let fsync = async |session: Bytes| {
        let request = FsyncRequest { volume: "vol1".to_owned(), session, ..Default::default() };
        old.io().fsync(request).await.map(drop).map_err(|status| endio_api::status::reason(&status))
    };
    const UNWRITTEN: u8 = 9;
    let (mut older, mut sequence) = (vec![1], 0);
    for then in ["goes on", "dies"] {
        sequence += 1;
        for session in &older {
            write(*session, sequence).await;
        }
        new.open("vol1", true).await.unwrap();
        new.volumes().close(VolumeRequest { name: "vol1".into() }).await.unwrap();
        if then == "dies" {
            first.crash().await;
            first.start_again().await;
        }
        let told = match fsync(Bytes::new()).await {
            // It has not heard of the takeover before this.
            Err(Reason::OldGeneration) => fsync(Bytes::new()).await,
            told => told,
        };
        assert_eq!(told, Err(Reason::LostWrites), "{then}");
        assert_eq!(fsync(Bytes::new()).await, Ok(()), "{then}: told twice");
        let younger = older.len() as u8 + 1;
        write(younger, 1).await;
        assert_eq!(fsync(named(younger)).await, Ok(()), "{then}: it has lost nothing");
        for session in older.iter().copied().chain([UNWRITTEN]) {
            let told = fsync(named(session)).await;
            assert_eq!(told, Err(Reason::LostWrites), "{then}: {session}");
            assert_eq!(fsync(named(session)).await, Ok(()), "{then}: {session} is told twice");
        }
        assert_eq!(fsync(Bytes::new()).await, Ok(()), "{then}: told again");
        older.push(younger);
    }
    assert_eq!(fsync(Bytes::from_static(b"short")).await, Err(Reason::Malformed));
    old.settles().await.unwrap();
}

/// An owner dies with something dirty. Another writeback takes its volume, writes, and closes it again: what the
/// cache log of the first one has is older, and must not be replayed over it. The other one may come before the
/// first one starts again, or between its look at the volume and its open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_owner_had_is_not_put_over_what_was_written_since() {
    for comes_between in [false, true] {
        let stack = Stack::start(1).await;
        let between = Tampering::start(&stack.conversion.url).await;
        let mut first = Writeback::start_with(lazy(&stack, "first", &between.url)).await;
        let second = Writeback::start_with(lazy(&stack, "second", &stack.conversion.url)).await;
        let (old, new) = (first.client(), second.client());
        old.create("vol1", 64 * MIB, 1).await.unwrap();
        fill(&old, "vol1", 0, WriteMode::Buffered, 1).await;
        fill(&old, "vol1", MIB, WriteMode::Buffered, 1).await;
        first.crash().await;
        let meanwhile = async {
            new.open("vol1", true).await.unwrap();
            fill(&new, "vol1", 0, WriteMode::Buffered, 2).await;
            new.fsync("vol1").await.unwrap();
            new.volumes().close(VolumeRequest { name: "vol1".into() }).await.unwrap();
        };
        if comes_between {
            between.holds_opens(true);
            let meanwhile = async {
                between.open_is_held().await;
                meanwhile.await;
                between.holds_opens(false);
            };
            tokio::join!(first.start_again(), meanwhile);
        } else {
            meanwhile.await;
            first.start_again().await;
        }
        assert_eq!(old.fsync("vol1").await.unwrap_err().reason, Reason::LostWrites);
        old.fsync("vol1").await.unwrap();
        for (offset, byte) in [(0, 2), (MIB, 0)] {
            let read = old.read("vol1", offset, BLOCK).await.unwrap();
            assert_eq!(read, vec![byte; BLOCK as usize], "{offset}, {comes_between}");
        }
        old.settles().await.unwrap();
    }
}
