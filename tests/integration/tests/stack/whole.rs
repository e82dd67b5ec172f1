//! What was one write before the writeback died is converted as one afterwards.

use std::sync::Arc;

use endio_api::conversion::writeback_message::Message as FromWriteback;
use endio_api::conversion::{BeginIo, Lane};
use endio_api::writeback::{WriteMode, WriteRequest};
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::{Said, Tampering, Verdict};
use tokio::sync::watch;

const NAME: &str = "vol1";
const BLOCK: u64 = 4096;

/// Newer writes lie over all of an older one, each over a part. After a crash what is left goes out in one
/// io_end all the same: a takeover in between would leave a state in which the older write was carried out in
/// half (simulation seed 27580640). What was converted before holds nothing together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_others_lie_over_goes_out_as_one_after_a_crash() {
    let mut stack = Stack::start(1).await;
    let between = Tampering::start(&stack.conversion.url).await;
    let begun = Arc::new(watch::Sender::new(Vec::<Vec<(u64, u64)>>::new()));
    let heard = Arc::clone(&begun);
    between.judges(move |said| {
        if let Said::ByWriteback(FromWriteback::Begin(begin)) = said
            && begin.lane() == Lane::WriteOut
        {
            heard.send_modify(|begun| begun.push(ranges(begin)));
        }
        Verdict::PassOn
    });
    let config = endio_writeback::Config {
        conversion: between.url.clone(),
        cache_dir: stack.directory.path().join("behind"),
        // Nothing is written out before the crash unless somebody waits for it, and no more at once than
        // belongs together.
        write_out_after_ms: 600_000,
        write_out_blocks: 1,
        flush_log_bytes: 0,
        ..Default::default()
    };
    let mut writeback = Writeback::start_with(config).await;
    let client = writeback.client();
    client.create(NAME, 16 << 20, 1).await.unwrap();
    let write = async |block: u64, blocks: usize, byte: u8| {
        let request = WriteRequest {
            volume: NAME.to_owned(),
            offset_bytes: block * BLOCK,
            data: vec![byte; blocks * 4096].into(),
            mode: WriteMode::Buffered.into(),
            ..Default::default()
        };
        client.io().write(request).await.unwrap();
    };
    // Converted: what they held together is apart since.
    write(10, 4, 1).await;
    write(10, 4, 7).await;
    client.fsync(NAME).await.unwrap();
    begun.send_modify(Vec::clear);
    write(10, 2, 2).await;
    write(12, 2, 3).await;
    write(0, 4, 4).await;
    write(0, 1, 5).await;
    write(1, 3, 6).await;
    let expected = [[5; 4096], [6; 4096], [6; 4096], [6; 4096]].concat();
    assert_eq!(*begun.borrow(), Vec::<Vec<(u64, u64)>>::new(), "all of it waits");
    writeback.crash().await;
    writeback.start_again().await;
    let client = writeback.client();
    assert_eq!(client.read(NAME, 0, 4 * BLOCK).await.unwrap(), expected);
    client.fsync(NAME).await.unwrap();
    let mut all = begun.borrow().clone();
    all.sort_unstable();
    assert_eq!(all, [vec![(0, 4)], vec![(10, 2)], vec![(12, 2)]]);
    assert_eq!(client.read(NAME, 0, 4 * BLOCK).await.unwrap(), expected);
    writeback.stop().await;
    stack.stop().await;
}

fn ranges(begin: &BeginIo) -> Vec<(u64, u64)> {
    let more = begin.more.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    std::iter::once((begin.lblk, u64::from(begin.blocks))).chain(more).collect()
}
