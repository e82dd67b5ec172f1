//! What a client may rely on, case by case.

use std::time::Duration;

use bytes::Bytes;
use endio_api::common::ExtentState;
use endio_api::conversion::CreateVolumeRequest;
use endio_api::status;
use endio_api::writeback::*;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::{Client, Pipe, Put};
use endio_types::Reason;

const SIZE: u64 = 16 << 20;

async fn stack() -> (Stack, Client) {
    let stack = Stack::start(1).await;
    let client = stack.client();
    client.create("vol1", SIZE, 1).await.unwrap();
    (stack, client)
}

fn write_of(offset_bytes: u64, data: &[u8], mode: WriteMode) -> WriteRequest {
    WriteRequest {
        volume: "vol1".into(),
        offset_bytes,
        data: Bytes::copy_from_slice(data),
        mode: mode.into(),
        ..Default::default()
    }
}

async fn write(client: &Client, offset: u64, data: &[u8], mode: WriteMode) -> WriteResponse {
    client.io().write(write_of(offset, data, mode)).await.unwrap().into_inner()
}

async fn states(client: &Client, length_bytes: u64) -> Vec<(u64, u32, ExtentState)> {
    let request = ExtentsRequest { volume: "vol1".into(), offset_bytes: 0, length_bytes };
    let mut stream = client.inspect().extents(request).await.unwrap().into_inner();
    let mut states = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        states.extend(answer.extents.iter().map(|e| (e.lblk, e.blocks, e.state())));
    }
    states
}

fn range(offset_bytes: u64, length_bytes: u64) -> RangeRequest {
    RangeRequest { volume: "vol1".into(), offset_bytes, length_bytes, ..Default::default() }
}

/// Promise 7. The map shows holes, delayed data, unwritten and written extents without gaps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_map_tells_the_four_states_apart() {
    let (stack, client) = stack().await;
    write(&client, 0, &[1; 8192], WriteMode::Direct).await;
    client.io().allocate(range(16384, 8192)).await.unwrap();
    stack.stores[0].device.close();
    write(&client, 40960, &[2; 4096], WriteMode::Buffered).await;
    let states = states(&client, 65536).await;
    let mut at = 0;
    for (lblk, blocks, _) in &states {
        assert_eq!(*lblk, at, "a gap or overlap in {states:?}");
        at += u64::from(*blocks);
    }
    assert_eq!(at, 16, "{states:?}");
    let of = |wanted: u64| {
        let covers = |(lblk, blocks, _): &&(u64, u32, ExtentState)| {
            (*lblk..*lblk + u64::from(*blocks)).contains(&wanted)
        };
        states.iter().find(covers).unwrap().2
    };
    assert_eq!(of(0), ExtentState::Written);
    assert_eq!(of(2), ExtentState::Hole);
    assert_eq!(of(4), ExtentState::Unwritten);
    assert_eq!(of(10), ExtentState::Delayed);
    stack.stores[0].device.open();
    client.fsync("vol1").await.unwrap();
    assert_eq!(client.read("vol1", 16384, 8192).await.unwrap(), vec![0; 8192]);
}

/// Scenario 47. Unaligned writes into one block leave each other's bytes alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unaligned_writes_in_one_block_keep_each_others_bytes() {
    let (_stack, client) = stack().await;
    for mode in [WriteMode::Buffered, WriteMode::Direct] {
        let mut tasks = Vec::new();
        for piece in 0..64_u8 {
            let client = client.clone();
            tasks.push(tokio::spawn(async move {
                let offset = 100 + u64::from(piece) * 61;
                write(&client, offset, &[piece + 1; 61], mode).await;
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        let read = client.read("vol1", 0, 8192).await.unwrap();
        assert!(read[..100].iter().all(|byte| *byte == 0));
        for (piece, bytes) in (1..=64).zip(read[100..].chunks(61)) {
            assert!(bytes.iter().all(|byte| *byte == piece), "piece {piece}: {bytes:?}");
        }
        client.io().trim(range(0, 8192)).await.unwrap();
    }
}

/// Scenarios 33, 62. A retry that comes after newer writes is answered and never applied or converted
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_retry_never_overwrites_newer_data() {
    let (mut stack, client) = stack().await;
    // The last one is so large that without a key it would go around the cache.
    let writes =
        [(WriteMode::Buffered, 4096), (WriteMode::Direct, 4096), (WriteMode::Buffered, 512 << 10)];
    for (at, (mode, length)) in (1..).zip(writes) {
        let session = Bytes::from(vec![at; 16]);
        let (old, new) = (vec![1; length], vec![2; length]);
        let key =
            |sequence, is_retry| Some(RetryKey { session: session.clone(), sequence, is_retry });
        let first = WriteRequest { retry: key(1, false), ..write_of(0, &old, mode) };
        let second = WriteRequest { retry: key(2, false), ..write_of(0, &new, mode) };
        assert!(!client.io().write(first.clone()).await.unwrap().into_inner().duplicate);
        client.io().write(second).await.unwrap();
        let map_version = async || {
            let request = VolumeRequest { name: "vol1".into() };
            client.volumes().get(request).await.unwrap().into_inner().map_version
        };
        let before = map_version().await;
        let late = WriteRequest { retry: key(1, true), ..first };
        let answer = client.io().write(late.clone()).await.unwrap().into_inner();
        assert!(answer.duplicate, "{answer:?}");
        // Buffered data is converted some time; a direct write is when it is answered.
        if mode == WriteMode::Direct {
            assert_eq!(map_version().await, before, "a retry of what is done converts nothing");
        }
        assert_eq!(client.read("vol1", 0, length as u64).await.unwrap(), new);
        // The memory of what was applied outlives the process.
        stack.writeback.restart().await;
        client.fsync("vol1").await.unwrap();
        let answer = client.io().write(late).await.unwrap().into_inner();
        assert!(answer.duplicate, "{answer:?}");
        assert_eq!(client.read("vol1", 0, length as u64).await.unwrap(), new);
    }
}

/// A request may be refused before its key is looked at, for instance while its volume cannot be
/// opened yet. Those after it are no strangers for that: once a pipelined client was told
/// `UNKNOWN_SESSION` when the writeback died early in its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_that_overtake_a_refused_first_request_are_applied_also_after_a_restart() {
    let (mut stack, client) = stack().await;
    let session = Bytes::from(vec![7; 16]);
    let request = |volume: &str, sequence, is_retry| WriteRequest {
        volume: volume.into(),
        retry: Some(RetryKey { session: session.clone(), sequence, is_retry }),
        ..write_of(sequence << 12, &[7; 4096], WriteMode::Direct)
    };
    for sequence in [1, 2] {
        let refused = client.io().write(request("not-yet", sequence, true)).await.unwrap_err();
        let expected = [Reason::UnknownVolume, Reason::UnknownSession];
        assert!(expected.contains(&status::reason(&refused)), "{refused}");
    }
    for sequence in [5, 4] {
        let answer = client.io().write(request("vol1", sequence, true)).await.unwrap();
        assert!(!answer.into_inner().duplicate);
    }
    stack.writeback.restart().await;
    for (sequence, duplicate) in [(4, true), (3, false), (1, false), (5, true), (1, true)] {
        let answer = client.io().write(request("vol1", sequence, true)).await.unwrap();
        assert_eq!(answer.into_inner().duplicate, duplicate, "number {sequence}");
    }
}

/// Scenario 39. sync_all leaves nothing dirty and nothing in flight, on any volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sync_all_covers_every_volume() {
    let (_stack, client) = stack().await;
    client.create("vol2", SIZE, 1).await.unwrap();
    for volume in ["vol1", "vol2"] {
        for piece in 0..3 {
            let request = write_of(piece << 20, &[7; 64 << 10], WriteMode::Buffered);
            client.io().write(WriteRequest { volume: volume.into(), ..request }).await.unwrap();
        }
    }
    client.io().sync_all(SyncAllRequest {}).await.unwrap();
    let status = client.inspect().status(StatusRequest::default()).await.unwrap().into_inner();
    assert_eq!(status.dirty_bytes, 0, "{status:?}");
    assert!(status.connected);
    let delayed = |(_, _, state): &(u64, u32, ExtentState)| *state == ExtentState::Delayed;
    assert!(!states(&client, SIZE).await.iter().any(delayed));
    client.settles().await.unwrap();
}

/// Whoever asks for the status stops no write: once it held the lock of the throttle and waited for
/// a volume's, while the flusher held the volume's and waited for the throttle's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_told_while_buffered_data_is_written_out() {
    let (_stack, client) = stack().await;
    let writer = client.clone();
    let writes = tokio::spawn(async move {
        for piece in 0..200_u64 {
            let write = write_of((piece % 8) << 16, &[7; 64 << 10], WriteMode::Buffered);
            writer.io().write(write).await.unwrap();
        }
        writer.fsync("vol1").await.unwrap();
    });
    while !writes.is_finished() {
        client.inspect().status(StatusRequest::default()).await.unwrap();
    }
    writes.await.unwrap();
    client.settles().await.unwrap();
}

/// What is dirty is written out without anybody's asking, also where dirty blocks were cut off with
/// the end of the volume before: the flusher sleeps until it is told that something is dirty again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_dirty_after_a_cut_is_written_out_by_itself() {
    let (_stack, client) = stack().await;
    for size_bytes in [SIZE / 2, SIZE] {
        let write = write_of(SIZE - 4096, &[7; 4096], WriteMode::Buffered);
        client.io().write(write).await.unwrap();
        let name = "vol1".to_owned();
        for size_bytes in [SIZE / 2, SIZE] {
            let request = ResizeRequest { name: name.clone(), size_bytes, volume: 0 };
            client.volumes().resize(request).await.unwrap();
        }
        let write = write_of(size_bytes - 8192, &[8; 4096], WriteMode::Buffered);
        client.io().write(write).await.unwrap();
        let mut dirty_bytes = u64::MAX;
        for _ in 0..600 {
            let status = client.inspect().status(StatusRequest::default()).await.unwrap();
            dirty_bytes = status.into_inner().dirty_bytes;
            if dirty_bytes == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(dirty_bytes, 0);
    }
    client.settles().await.unwrap();
}

/// Scenarios 35, 36. A growable volume's size is byte-exact and never ahead of its data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_of_a_growing_volume_is_never_ahead_of_its_data() {
    let stack = Stack::start(1).await;
    let client = stack.client();
    let name = "vol1".to_owned();
    let create = CreateVolumeRequest { name, size_bytes: 0, growable: true, ..Default::default() };
    client.create_as(create).await.unwrap();
    let writer = client.clone();
    let appends = tokio::spawn(async move {
        let mut end = 0;
        for piece in 0..40_u64 {
            let length = 1000 + piece * 37;
            let data = vec![5; usize::try_from(length).unwrap()];
            let mut request = write_of(end, &data, WriteMode::Direct);
            request.dsync = piece % 2 == 0;
            writer.io().write(request).await.unwrap();
            end += length;
        }
        end
    });
    let mut last = 0;
    while !appends.is_finished() {
        let name = "vol1".to_owned();
        let size = client.volumes().get(VolumeRequest { name }).await.unwrap();
        let size = size.into_inner().size_bytes;
        assert!(size >= last, "the size went back");
        last = size;
        if size > 0 {
            let read = client.read("vol1", 0, size).await.unwrap();
            let zero = read.iter().position(|byte| *byte != 5);
            assert_eq!(zero, None, "the size {size} is ahead of the data");
        }
    }
    let end = appends.await.unwrap();
    let name = "vol1".to_owned();
    let size = client.volumes().get(VolumeRequest { name }).await.unwrap().into_inner();
    assert_eq!(size.size_bytes, end, "byte-exact");
}

/// Scenario 71. A trim that follows a write in one stream gets that write's completion without
/// anybody's help, and wins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_behind_a_write_in_the_same_stream_wins_and_ends() {
    let (_stack, client) = stack().await;
    let mut pipe = Pipe::new(client.clone(), 71);
    for direct in [true, false] {
        for _ in 0..20 {
            let data = Bytes::from_static(&[6; 16384]);
            let volume = "vol1".to_owned();
            pipe.write(Put { volume, offset: 0, data, direct, dsync: false }).await;
            pipe.trim("vol1", 0, 16384).await;
            for _ in 0..2 {
                assert_eq!(pipe.next().await.unwrap().reason, 0);
            }
            assert_eq!(client.read("vol1", 0, 16384).await.unwrap(), vec![0; 16384]);
        }
    }
    client.settles().await.unwrap();
}

/// Scenario 42. Trimmed space comes back to the pool, at its edges byte-exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_gives_space_back_and_zeroes_its_edges_exactly() {
    let (_stack, client) = stack().await;
    write(&client, 0, &[3; 1 << 20], WriteMode::Direct).await;
    client.io().trim(range(5000, (1 << 20) - 10_000)).await.unwrap();
    let read = client.read("vol1", 0, 1 << 20).await.unwrap();
    let expected = |at: usize| {
        if (5000..(1 << 20) - 5000).contains(&at) { 0 } else { 3 }
    };
    let differs = read.iter().enumerate().position(|(at, byte)| *byte != expected(at));
    assert_eq!(differs, None);
    client.fsync("vol1").await.unwrap();
    let check = client.settles().await.unwrap();
    let mapped = check.metadata.unwrap().mapped_blocks;
    assert!(mapped <= 4, "{mapped} blocks stay mapped");
}

/// Scenario 49. A deleted volume is gone at once, and a new one of its name is empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_of_a_deleted_name_begins_empty() {
    let (_stack, client) = stack().await;
    write(&client, 0, &[8; 1 << 20], WriteMode::Buffered).await;
    client.volumes().delete(DeleteRequest { name: "vol1".into(), volume: 0 }).await.unwrap();
    let gone = client.clone().with_patience(std::time::Duration::from_millis(10));
    let refused = gone.read("vol1", 0, 4096).await.unwrap_err();
    assert_eq!(refused.reason, Reason::UnknownVolume, "{refused}");
    client.create("vol1", SIZE, 1).await.unwrap();
    assert_eq!(client.read("vol1", 0, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
    client.settles().await.unwrap();
}

/// Scenario 61. Of two living writebacks the second gets the volume by force only, and the first
/// is refused from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_by_force_fences_the_first_writeback() {
    let (stack, first) = stack().await;
    write(&first, 0, &[1; 8192], WriteMode::Direct).await;
    let cache = stack.directory.path().join("cache-2");
    let other = Writeback::start(&stack.conversion.url, &cache).await;
    let second = other.client();
    for _ in 0..200 {
        let status = second.inspect().status(StatusRequest::default()).await;
        if status.is_ok_and(|status| status.into_inner().connected) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let refused = second.open("vol1", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeBusy, "{refused}");
    second.open("vol1", true).await.unwrap();
    // And back at once: who is forced does not believe that it still has the volume.
    let (open, by) = (first.open("vol1", true).await.unwrap(), second.open("vol1", true).await);
    assert_eq!((open.generation, by.unwrap().generation), (3, 4));
    write(&second, 0, &[2; 4096], WriteMode::Direct).await;
    let late = first.io().write(write_of(0, &[3; 4096], WriteMode::Direct)).await;
    let refused = endio_api::status::reason(&late.unwrap_err());
    assert!([Reason::OldGeneration, Reason::VolumeBusy].contains(&refused), "{refused}");
    let read = second.read("vol1", 0, 8192).await.unwrap();
    assert!(read[..4096] == [2; 4096] && read[4096..] == [1; 4096]);
    second.settles().await.unwrap();
}

/// Promises 1 and 6. A writeback has acknowledged writes to a volume that another one takes by force and
/// closes again: it opens the volume anew for whoever asks, and says once that acknowledged writes are lost;
/// also if it dies or stops before anybody asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_after_a_takeover_is_told_of_what_was_lost_once() {
    let stack = Stack::start(1).await;
    let config = |name: &str| endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join(name),
        // Nothing is written out unless somebody waits for it.
        write_out_after_ms: 600_000,
        ..endio_writeback::Config::default()
    };
    let mut first = Writeback::start_with(config("first")).await;
    let second = Writeback::start_with(config("second")).await;
    let (old, new) = (first.client(), second.client());
    old.create("vol1", SIZE, 1).await.unwrap();
    for then in ["goes on", "dies", "stops", "has flushed"] {
        old.open("vol1", false).await.unwrap();
        write(&old, 0, &[1; 8192], WriteMode::Buffered).await;
        if then == "has flushed" {
            old.fsync("vol1").await.unwrap();
        }
        new.open("vol1", true).await.unwrap();
        new.volumes().close(VolumeRequest { name: "vol1".into() }).await.unwrap();
        match then {
            "dies" => {
                first.crash().await;
                first.start_again().await;
            }
            "stops" => first.restart().await,
            _ => {}
        }
        let told = match old.fsync("vol1").await {
            // It has not heard of the takeover before this.
            Err(refused) if refused.reason == Reason::OldGeneration => old.fsync("vol1").await,
            told => told,
        };
        match then {
            "has flushed" => assert_eq!(told.map_err(|refused| refused.to_string()), Ok(())),
            _ => assert_eq!(told.expect_err(then).reason, Reason::LostWrites, "{then}"),
        }
        old.fsync("vol1").await.unwrap_or_else(|refused| panic!("{then}: told twice: {refused}"));
        first.restart().await;
        old.fsync("vol1").await.unwrap_or_else(|refused| panic!("{then}: told again: {refused}"));
        old.volumes().close(VolumeRequest { name: "vol1".into() }).await.unwrap();
    }
    old.settles().await.unwrap();
}

/// Scenarios 32, 33, 56. Conversion restarts in the middle of work: writes begin again under the
/// new epoch, each completes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_begin_again_when_conversion_restarts() {
    let (mut stack, client) = stack().await;
    let mut pipe = Pipe::new(client.clone(), 32);
    stack.conversion.config.drain_deadline_ms = 100;
    for round in 0..4_u8 {
        for piece in 0..16_u8 {
            let data = Bytes::from(vec![round * 16 + piece + 1; 64 << 10]);
            let offset = u64::from(piece) << 16;
            let put = Put { volume: "vol1".into(), offset, data, direct: true, dsync: false };
            pipe.write(put).await;
        }
        if round % 2 == 1 {
            let first = pipe.next().await.unwrap();
            assert_eq!(first.reason, 0, "{}", first.message);
        }
        let restart = stack.conversion.restart();
        let rest = async {
            while pipe.in_flight() > 0 {
                let completion = pipe.next().await.unwrap();
                assert_eq!(completion.reason, 0, "{}", completion.message);
            }
        };
        tokio::join!(restart, rest);
        let read = client.read("vol1", 0, 1 << 20).await.unwrap();
        for (piece, bytes) in (0..).zip(read.chunks(64 << 10)) {
            let value = round * 16 + piece + 1;
            assert!(bytes.iter().all(|byte| *byte == value), "piece {piece} of round {round}");
        }
    }
    client.settles().await.unwrap();
}

/// Behaviour 53. What is known of the map is read without asking conversion, until it changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_blocks_are_read_while_conversion_is_away_and_a_change_is_seen_at_once() {
    let (mut stack, client) = stack().await;
    write(&client, 0, &[1; 8192], WriteMode::Direct).await;
    write(&client, 8192, &[2; 4096], WriteMode::Buffered).await;
    client.fsync("vol1").await.unwrap();
    assert_eq!(client.read("vol1", 0, 16384).await.unwrap()[12288..], [0; 4096]);
    write(&client, 4096, &[3; 8192], WriteMode::Direct).await;
    client.io().trim(range(0, 4096)).await.unwrap();
    let now = [vec![0; 4096], vec![3; 8192], vec![0; 4096]].concat();
    assert!(client.read("vol1", 0, 16384).await.unwrap() == now);
    stack.conversion.stop().await;
    assert!(client.read("vol1", 0, 16384).await.unwrap() == now, "within the store's lease");
    stack.conversion.restart().await;
    assert!(client.read("vol1", 0, 16384).await.unwrap() == now);
    write(&client, 0, &[4; 4096], WriteMode::Direct).await;
    assert_eq!(client.read("vol1", 0, 4096).await.unwrap()[..], [4; 4096]);
}

/// A close that conversion did not answer may have been carried out, or may yet be: nothing is
/// acknowledged on the strength of what was open before, and another call closes the volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_after_a_close_that_was_not_answered() {
    let mut stack = Stack::start(1).await;
    let impatient = Writeback::start_with(endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join("impatient"),
        io_timeout_ms: 3_000,
        ..endio_writeback::Config::default()
    })
    .await;
    let client = impatient.client();
    client.create("vol1", SIZE, 1).await.unwrap();
    // On a slow machine a second passes before the volume is open: asked again until it is.
    let mut pipe = Pipe::new(client.clone(), 92);
    let data = Bytes::from_static(&[1; 8192]);
    let volume = "vol1".to_owned();
    pipe.write(Put { volume, offset: 0, data, direct: false, dsync: false }).await;
    assert_eq!(pipe.next().await.unwrap().reason, 0);
    client.fsync("vol1").await.unwrap();
    drop(pipe);
    stack.conversion.stop().await;
    let close = VolumeRequest { name: "vol1".into() };
    client.volumes().close(close.clone()).await.unwrap_err();
    let late = write_of(0, &[2; 4096], WriteMode::Buffered);
    client.io().write(late).await.unwrap_err();
    stack.conversion.restart().await;
    for _ in 0..100 {
        if client.volumes().close(close.clone()).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Closed: somebody else opens it without force.
    let other = stack.client();
    other.open("vol1", false).await.unwrap();
    assert!(other.read("vol1", 0, 8192).await.unwrap() == [1; 8192]);
    other.settles().await.unwrap();
}
