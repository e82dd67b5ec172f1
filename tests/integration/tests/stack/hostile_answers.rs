//! A conversion that says of a data log what cannot be: nothing of it is believed, and nothing is lost.

use bytes::Bytes;
use endio_api::conversion::{
    CheckRequest, LoggedBlock, ReadLogRequest, ReadLogResponse, Volume, VolumeRequest,
};
use endio_api::writeback::*;
use endio_integration_tests::raw;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::Tampering;
use endio_testkit::client::Client;
use endio_types::Reason;
use endio_writeback::RunError;

const SIZE: u64 = 16 << 20;
const END: u64 = SIZE / BLOCK;
const NAME: &str = "vol1";
const BLOCK: u64 = 4096;

/// A writeback behind a conversion that can be made to lie; it writes nothing out unless it is asked to.
async fn behind(between: &Tampering, stack: &Stack, directory: &str) -> Writeback {
    let config = endio_writeback::Config {
        conversion: between.url.clone(),
        cache_dir: stack.directory.path().join(directory),
        write_out_after_ms: 600_000,
        ..Default::default()
    };
    Writeback::start_with(config).await
}

async fn write(client: &Client, block: u64, fill: u8, blocks: u64) {
    let data = Bytes::from(vec![fill; (blocks * BLOCK) as usize]);
    let (volume, offset_bytes) = (NAME.to_owned(), block * BLOCK);
    let mode = WriteMode::Buffered.into();
    let request = WriteRequest { volume, offset_bytes, data, mode, ..Default::default() };
    client.io().write(request).await.unwrap();
}

/// As conversion itself sees it.
async fn volume(stack: &Stack) -> Volume {
    let request = VolumeRequest { name: NAME.to_owned() };
    raw::conversion(&stack.conversion.url).get_volume(request).await.unwrap().into_inner()
}

async fn is_sound(stack: &Stack) {
    let checked = raw::conversion(&stack.conversion.url).check(CheckRequest {}).await.unwrap();
    assert_eq!(checked.into_inner().findings, Vec::<String>::new());
}

async fn first_bytes(client: &Client, blocks: u64) -> Vec<u8> {
    let read = client.read(NAME, 0, blocks * BLOCK).await.unwrap();
    read.chunks(BLOCK as usize)
        .map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]), "a block of two halves");
            block[0]
        })
        .collect()
}

/// A lie about an answer that has blocks.
struct Lie {
    what: &'static str,
    reason: Reason,
    /// The block that the error names.
    block: u64,
    tell: fn(&ReadLogRequest, &mut Vec<LoggedBlock>),
}

fn lie(
    what: &'static str,
    (reason, block): (Reason, u64),
    tell: fn(&ReadLogRequest, &mut Vec<LoggedBlock>),
) -> Lie {
    Lie { what, reason, block, tell }
}

/// The log holds blocks 0 to 3 and the last one, in one answer.
fn lies() -> Vec<Lie> {
    let malformed = |block| (Reason::Malformed, block);
    let damaged = |block| (Reason::ChecksumMismatch, block);
    vec![
        lie("a flipped bit", damaged(2), |_, blocks| {
            let mut data = blocks[2].data.to_vec();
            data[77] ^= 4;
            blocks[2].data = data.into();
        }),
        lie("another checksum", damaged(0), |_, blocks| blocks[0].crc32c ^= 1),
        lie("no data", damaged(1), |_, blocks| {
            blocks[1].data = Bytes::new();
            blocks[1].crc32c = 0;
        }),
        lie("a short block", damaged(3), |_, blocks| {
            blocks[3].data = blocks[3].data.slice(1..);
            blocks[3].crc32c = crc32c::crc32c(&blocks[3].data);
        }),
        lie("two blocks in one", damaged(3), |_, blocks| {
            blocks[3].data = blocks[3].data.repeat(2).into();
            blocks[3].crc32c = crc32c::crc32c(&blocks[3].data);
        }),
        lie("a block twice", malformed(1), |_, blocks| {
            let again = blocks[1].clone();
            blocks.insert(2, again);
        }),
        lie("blocks in the wrong order", malformed(1), |_, blocks| blocks.swap(1, 2)),
        lie("a second answer from the front", malformed(0), |asked, blocks| {
            blocks.truncate(4);
            if asked.lblk > 0 {
                blocks[0].lblk = 0;
            }
        }),
        lie("a block just before the one that was asked for", malformed(3), |asked, blocks| {
            blocks.truncate(4);
            if asked.lblk > 0 {
                blocks[0].lblk = asked.lblk - 1;
            }
        }),
        lie("a block behind the end", malformed(END), |_, blocks| blocks[4].lblk = END),
        lie("a block far behind it", malformed(1 << 52), |_, blocks| blocks[4].lblk = 1 << 52),
        lie("the largest number", malformed(u64::MAX), |_, blocks| blocks[4].lblk = u64::MAX),
        lie("data that ends behind its block", malformed(1), |_, blocks| {
            blocks[1].end_bytes = 2 * BLOCK + 1;
        }),
        lie("data that ends behind the volume", malformed(END - 1), |_, blocks| {
            blocks[4].end_bytes = SIZE + 1;
        }),
        lie("data that ends nowhere", malformed(0), |_, blocks| blocks[0].end_bytes = u64::MAX),
        lie("a generation to come", malformed(3), |asked, blocks| {
            blocks[3].generation = asked.generation + 1;
        }),
        lie("the last generation of all", malformed(0), |_, blocks| {
            blocks[0].generation = u64::MAX;
        }),
    ]
}

impl Lie {
    fn is_told_by(&self, between: &Tampering) {
        let tell = self.tell;
        between.tampers(move |asked, mut answer: ReadLogResponse| {
            tell(asked, &mut answer.blocks);
            answer
        });
    }

    fn explains(&self, error: &str) {
        let what = self.what;
        assert!(error.contains(NAME), "{what}: {error}");
        assert!(error.contains(&format!("block {} ", self.block)), "{what}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_whose_data_log_cannot_be_as_it_is_told_is_not_opened_and_loses_nothing() {
    let stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let before = behind(&between, &stack, "before").await;
    let client = before.client();
    client.create(NAME, SIZE, 1).await.unwrap();
    write(&client, 0, 1, 4).await;
    write(&client, END - 1, 2, 1).await;
    client.flush(NAME).await.unwrap();
    assert_eq!(volume(&stack).await.logged_blocks, 5);

    let mut next = behind(&between, &stack, "next").await;
    let client = next.client();
    let open = || OpenRequest { name: NAME.into(), force: true };
    for lie in lies() {
        lie.is_told_by(&between);
        let refused = client.volumes().open(open()).await;
        let status = refused.err().unwrap_or_else(|| panic!("believed: {}", lie.what));
        assert_eq!(endio_api::status::reason(&status), lie.reason, "{}: {status}", lie.what);
        lie.explains(status.message());
        let volume = volume(&stack).await;
        assert_eq!((volume.logged_blocks, volume.mapped_blocks), (5, 0), "{}", lie.what);
        assert_eq!(volume.owner, "", "{}: it is given back", lie.what);
    }
    between.is_honest();
    client.volumes().open(open()).await.unwrap();
    assert_eq!(first_bytes(&client, 5).await, [1, 1, 1, 1, 0]);
    let last = client.read(NAME, SIZE - BLOCK, BLOCK).await.unwrap();
    assert!(last.iter().all(|byte| *byte == 2));
    next.stop().await;
    assert_eq!(volume(&stack).await.logged_blocks, 0, "a stop writes everything out");
    is_sound(&stack).await;
}

/// What only the cache log has is not let go because the data log of its volume is damaged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_is_told_a_damaged_data_log_stops_and_keeps_the_cache_log() {
    let stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let mut writeback = behind(&between, &stack, "replayed").await;
    let client = writeback.client();
    client.create(NAME, SIZE, 1).await.unwrap();
    write(&client, 0, 1, 4).await;
    write(&client, END - 1, 1, 1).await;
    client.flush(NAME).await.unwrap();
    // Acknowledged, and not flushed: nobody else has it.
    write(&client, 1, 2, 1).await;
    write(&client, 5, 3, 1).await;
    assert_eq!(volume(&stack).await.logged_blocks, 5);
    // What it may begin to write out in its last moment does not arrive.
    stack.stores[0].device.close();
    writeback.crash().await;
    for lie in lies() {
        lie.is_told_by(&between);
        writeback.start_again().await;
        let error = writeback.fails().await;
        let RunError::Recovery(failure) = &error else { panic!("{}: {error:?}", lie.what) };
        assert_eq!(failure.reason, lie.reason, "{}: {failure}", lie.what);
        lie.explains(&failure.detail);
        assert!(failure.detail.contains("stays in the cache log"), "{failure}");
        assert_eq!(volume(&stack).await.logged_blocks, 5, "{}", lie.what);
    }
    stack.stores[0].device.open();
    between.is_honest();
    writeback.start_again().await;
    assert_eq!(first_bytes(&client, 7).await, [1, 2, 1, 1, 0, 3, 0]);
    writeback.stop().await;
    assert_eq!(volume(&stack).await.mapped_blocks, 6);
    is_sound(&stack).await;
}
