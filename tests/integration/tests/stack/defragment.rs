//! What is read in sequence and lies in many pieces is written anew, and nothing else changes by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use endio_api::common::{Extent, ExtentState};
use endio_api::conversion::VolumeRequest;
use endio_api::writeback::*;
use endio_integration_tests::raw;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_testkit::client::Client;
use endio_testkit::seed::{self, Rng};
use endio_testkit::workload::{Mix, Workload};

const NAME: &str = "vol1";
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;

/// A writeback that keeps no clean blocks, so every read says how its blocks lie.
async fn writeback(stack: &Stack, name: &str, after_ms: u64) -> Writeback {
    let config = endio_writeback::Config {
        conversion: stack.conversion.url.clone(),
        cache_dir: stack.directory.path().join(name),
        read_cache_bytes: 0,
        write_out_after_ms: 5,
        defragment_after_ms: after_ms,
        defragment_bytes_per_s: 1 << 40,
        ..Default::default()
    };
    Writeback::start_with(config).await
}

fn range(first: u64, blocks: u64) -> RangeRequest {
    let (offset_bytes, length_bytes) = (first * BLOCK, blocks * BLOCK);
    RangeRequest { volume: NAME.into(), offset_bytes, length_bytes, ..Default::default() }
}

async fn write(client: &Client, block: u64, fill: u8) {
    let data = Bytes::from(vec![fill; BLOCK as usize]);
    let (volume, offset_bytes) = (NAME.to_owned(), block * BLOCK);
    let mode = WriteMode::Direct.into();
    let request = WriteRequest { volume, offset_bytes, data, mode, ..Default::default() };
    client.io().write(request).await.unwrap();
}

async fn extents(client: &Client) -> Vec<Extent> {
    let request = ExtentsRequest { volume: NAME.into(), ..Default::default() };
    let mut stream = client.inspect().extents(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        all.extend(message.extents);
    }
    all
}

/// Runs of blocks with data that lie one behind the other, wherever they are in the volume.
fn pieces(extents: &[Extent]) -> usize {
    let written = extents.iter().filter(|extent| extent.state == ExtentState::Written as i32);
    let written: Vec<&Extent> = written.collect();
    let goes_on = |pair: &&[&Extent]| {
        let follows = |at: usize| {
            let (one, two) = (&pair[0].places[at], &pair[1].places[at]);
            one.store == two.store && one.pblk + u64::from(pair[0].blocks) == two.pblk
        };
        (0..pair[0].places.len()).all(follows)
    };
    written.len() - written.windows(2).filter(goes_on).count()
}

/// What the map says of each block, but for where it lies.
fn states(extents: &[Extent]) -> Vec<(i32, u32)> {
    let of = |extent: &Extent| {
        let crc = |at: usize| extent.crc32c.get(at).copied().unwrap_or(0);
        (0..extent.blocks as usize).map(|at| (extent.state, crc(at))).collect::<Vec<_>>()
    };
    extents.iter().flat_map(of).collect()
}

async fn mapped(stack: &Stack) -> u64 {
    let request = VolumeRequest { name: NAME.to_owned() };
    let volume = raw::conversion(&stack.conversion.url).get_volume(request).await.unwrap();
    volume.into_inner().mapped_blocks
}

async fn read_all(client: &Client) -> Vec<u8> {
    client.read(NAME, 0, BLOCKS * BLOCK).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_read_in_sequence_and_lies_in_many_pieces_is_written_anew() {
    for replicas in [1, 2] {
        let stack = Stack::start(2).await;
        let writer = writeback(&stack, "writer", 86_400_000).await;
        let client = writer.client();
        client.create(NAME, BLOCKS * BLOCK, replicas).await.unwrap();
        // Block after block in an order of its own, with a hole and blocks without data.
        let mut rng = Rng::new(seed::announce("endio-integration-tests", "written_anew"));
        let mut blocks: Vec<u64> =
            (0..BLOCKS).filter(|block| !(300..340).contains(block)).collect();
        for at in (1..blocks.len()).rev() {
            blocks.swap(at, usize::try_from(rng.below(at as u64 + 1)).unwrap());
        }
        for block in blocks {
            write(&client, block, (block % 251) as u8).await;
        }
        client.io().trim(range(700, 5)).await.unwrap();
        client.io().allocate(range(320, 10)).await.unwrap();
        let (before, data) = (extents(&client).await, read_all(&client).await);
        let blocks = mapped(&stack).await;
        assert!(pieces(&before) > 500, "{} pieces", pieces(&before));
        // Nobody reads in sequence there: nothing is done.
        let mut writer = writer;
        writer.stop().await;
        let eager = writeback(&stack, "eager", 0).await;
        let client = eager.client();
        client.open(NAME, true).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert_eq!(pieces(&extents(&client).await), pieces(&before), "nobody has read it");
        let mut now = Vec::new();
        for _ in 0..200 {
            assert!(read_all(&client).await == data, "it reads as before");
            now = extents(&client).await;
            if pieces(&now) < 20 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(pieces(&now) < 20, "{} pieces of {}", pieces(&now), pieces(&before));
        assert!(states(&now) == states(&before), "holes stay holes, and data its own");
        assert_eq!(mapped(&stack).await, blocks, "no block more");
        client.settles().await.unwrap();
        assert!(read_all(&client).await == data);
        assert!(client.check(true).await.unwrap().findings.is_empty());
    }
}

/// Readers that make all of it worth the work, and writers who do not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_writes_meanwhile_loses_nothing() {
    let seed = seed::announce("endio-integration-tests", "whoever_writes_meanwhile");
    let mut rng = Rng::new(seed);
    let stack = Stack::start(2).await;
    let eager = writeback(&stack, "eager", 0).await;
    let client = eager.client();
    client.create(NAME, BLOCKS * BLOCK, 1).await.unwrap();
    // Direct writes, as what is dirty is left alone.
    let mix = Mix { direct: 95, write_cells_max: 8, depth: 8, ..Mix::draw(&mut rng) };
    let load = Workload::new(client.clone(), NAME, BLOCKS * BLOCK, rng.fork()).with_mix(mix);
    let is_over = Arc::new(AtomicBool::new(false));
    let reader = {
        let (client, is_over) = (client.clone(), Arc::clone(&is_over));
        tokio::spawn(async move {
            let mut reads = 0;
            while !is_over.load(Ordering::Relaxed) {
                read_all(&client).await;
                reads += 1;
            }
            reads
        })
    };
    let mut load = load;
    for _ in 0..8 {
        load.run(seed::number("ENDIO_HISTORY_OPERATIONS", 400) / 2).await.unwrap();
        load.drain().await.unwrap();
        load.verify().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    }
    is_over.store(true, Ordering::Relaxed);
    assert!(reader.await.unwrap() > 0);
    assert!(eager.defragmented_blocks() > 0, "something was written anew among the writes");
    load.verify().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    client.settles().await.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
}
