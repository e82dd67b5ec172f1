//! Writes that are carried out, and of whose end the writeback never hears.

use std::sync::Arc;
use std::time::Duration;

use endio_api::conversion::conversion_message::Message as FromConversion;
use endio_api::conversion::writeback_message::Message as FromWriteback;
use endio_api::conversion::{
    BeginRefused, CheckRequest, CreateVolumeRequest, Lane, Volume, VolumeRequest,
};
use endio_api::writeback::{
    FsyncRequest, RangeRequest, ResizeRequest, StatusRequest, VolumeStatus, WriteMode, WriteRequest,
};
use endio_integration_tests::raw;
use endio_integration_tests::services::STORE_BLOCKS;
use endio_integration_tests::stack::{Stack, Writeback};
use endio_integration_tests::tampering::{Said, Tampering, Verdict};
use endio_testkit::client::{Client, Refused};
use endio_types::Reason;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const NAME: &str = "vol1";
const BLOCK: u64 = 4096;
/// Longest wait for something that comes if nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// The line between a writeback and conversion: what is done to it, and what went over it.
#[derive(Default)]
struct Line {
    /// Completions are lost.
    loses_ends: bool,
    /// Answers of the data log are lost.
    loses_logged: bool,
    /// What is dirty is promised no space under a new session.
    is_full: bool,
    /// Nothing gets through.
    is_cut: bool,
    /// Completions that were lost.
    lost: u64,
    /// io_ends that the writeback gave up.
    given_up: u64,
    /// Promises that were refused.
    refused: u64,
    /// Number of the promise that was asked for under this session.
    asked: Option<u64>,
    /// It was made.
    is_backed: bool,
    /// Write-outs that began.
    write_outs: u64,
    /// Those that began before space was promised under their session.
    unbacked: u64,
}

impl Line {
    fn hears(&mut self, said: &Said<'_>) -> Verdict {
        match said {
            _ if self.is_cut => return Verdict::Lose,
            Said::ByWriteback(FromWriteback::Hello(_)) => {
                self.asked = None;
                self.is_backed = false;
            }
            Said::ByWriteback(FromWriteback::Reserve(reserve)) if reserve.reset => {
                if self.is_full {
                    self.refused += 1;
                    return Verdict::Tell(FromConversion::Refused(BeginRefused {
                        request: reserve.request,
                        reason: Reason::NoSpace as i32,
                        ..Default::default()
                    }));
                }
                self.asked = Some(reserve.request);
            }
            Said::ByConversion(FromConversion::Reserved(promise)) => {
                self.is_backed |= self.asked == Some(promise.request);
            }
            Said::ByWriteback(FromWriteback::Begin(begin)) if begin.lane() == Lane::WriteOut => {
                self.write_outs += 1;
                self.unbacked += u64::from(!self.is_backed);
            }
            Said::ByWriteback(FromWriteback::Release(release)) if release.abort => {
                self.given_up += 1;
            }
            Said::ByConversion(FromConversion::Completion(_)) if self.loses_ends => {
                self.lost += 1;
                return Verdict::Lose;
            }
            Said::ByConversion(FromConversion::Logged(_)) if self.loses_logged => {
                self.lost += 1;
                return Verdict::Lose;
            }
            _ => {}
        }
        Verdict::PassOn
    }
}

/// One writeback behind a line that fails when it is told to.
struct Cut {
    stack: Stack,
    between: Tampering,
    line: Arc<watch::Sender<Line>>,
    writeback: Writeback,
    client: Client,
}

impl Cut {
    async fn start(io_timeout_ms: u64) -> Self {
        let stack = Stack::start(1).await;
        let between = Tampering::start(&stack.conversion.url).await;
        let line = Arc::new(watch::Sender::new(Line::default()));
        let heard = Arc::clone(&line);
        between.judges(move |said| {
            let mut verdict = Verdict::PassOn;
            heard.send_modify(|line| verdict = line.hears(&said));
            verdict
        });
        let config = endio_writeback::Config {
            conversion: between.url.clone(),
            cache_dir: stack.directory.path().join("behind"),
            io_timeout_ms,
            // Nothing is written out unless somebody waits for it.
            write_out_after_ms: 600_000,
            retry_max_ms: 50,
            reconnect_max_ms: 100,
            ..Default::default()
        };
        let writeback = Writeback::start_with(config).await;
        let client = writeback.client();
        Self { stack, between, line, writeback, client }
    }

    fn set(&self, set: impl FnOnce(&mut Line)) {
        self.line.send_modify(set);
    }

    /// Waits, bounded, until that is so.
    async fn until(&self, what: &str, is_so: impl FnMut(&Line) -> bool) {
        let mut line = self.line.subscribe();
        let waited = tokio::time::timeout(PATIENCE, line.wait_for(is_so)).await;
        waited.unwrap_or_else(|_| panic!("not in time: {what}")).unwrap();
    }

    async fn create(&self, size_bytes: u64, growable: bool) {
        let name = NAME.to_owned();
        let request = CreateVolumeRequest { name, size_bytes, growable, ..Default::default() };
        self.client.create_as(request).await.unwrap();
    }

    /// Tried once: what the writeback tells is not heard again.
    fn writes(&self, block: u64, data: Vec<u8>, mode: WriteMode) -> JoinHandle<Option<Refused>> {
        let request = WriteRequest {
            volume: NAME.to_owned(),
            offset_bytes: block * BLOCK,
            data: data.into(),
            mode: mode.into(),
            ..Default::default()
        };
        let mut io = self.client.io();
        tokio::spawn(async move { io.write(request).await.err().map(Refused::from) })
    }

    /// Tried once.
    fn syncs(&self) -> JoinHandle<Option<Refused>> {
        let request =
            FsyncRequest { volume: NAME.to_owned(), may_log: false, ..Default::default() };
        let mut io = self.client.io();
        tokio::spawn(async move { io.fsync(request).await.err().map(Refused::from) })
    }

    async fn resize(&self, size_bytes: u64) {
        let request = ResizeRequest { name: NAME.to_owned(), size_bytes, volume: 0 };
        self.client.volumes().resize(request).await.unwrap();
    }

    async fn status(&self) -> VolumeStatus {
        let status = self.client.inspect().status(StatusRequest { cluster: false }).await.unwrap();
        status.into_inner().volumes.remove(0)
    }

    /// As conversion itself sees it.
    async fn volume(&self) -> Volume {
        let request = VolumeRequest { name: NAME.to_owned() };
        let mut conversion = raw::conversion(&self.stack.conversion.url);
        conversion.get_volume(request).await.unwrap().into_inner()
    }

    /// Stops the writeback and looks for anything wrong.
    async fn ends_well(mut self) {
        self.writeback.stop().await;
        let mut conversion = raw::conversion(&self.stack.conversion.url);
        let checked = conversion.check(CheckRequest {}).await.unwrap().into_inner();
        assert_eq!(checked.findings, Vec::<String>::new());
    }
}

/// What became of a request.
async fn told(request: JoinHandle<Option<Refused>>) -> Option<Refused> {
    tokio::time::timeout(PATIENCE, request).await.expect("it is answered in time").unwrap()
}

/// A write-out is converted, and its end is lost with the session. Under the next one the stores are
/// full, so that nothing backs what is dirty: the write-out does not begin again on the promise of
/// others. That it has to wait is nobody's error, and what the stores hold already is clean.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_out_begins_again_before_its_space_is_promised_and_that_is_no_error() {
    let cut = Cut::start(120_000).await;
    cut.create(16 << 20, false).await;
    let buffered = WriteMode::Buffered;
    assert!(told(cut.writes(0, vec![1; 4 * 4096], buffered)).await.is_none());
    cut.set(|line| line.loses_ends = true);
    let first = cut.syncs();
    cut.until("the write-out is converted", |line| line.lost > 0).await;
    // The stores do not have this one.
    assert!(told(cut.writes(8, vec![2; 4096], buffered)).await.is_none());
    cut.set(|line| (line.loses_ends, line.is_full) = (false, true));
    cut.between.break_sessions();
    let refused = told(first).await;
    assert!(refused.is_none(), "told while no space is promised: {refused:?}");
    let second = cut.syncs();
    let refused = cut.line.borrow().refused;
    cut.until("a promise is asked for again", |line| line.refused > refused + 1).await;
    let status = cut.status().await;
    assert_eq!((status.dirty_bytes, status.error_pending), (4096, false), "{}", status.blocked);
    let write_outs = cut.line.borrow().write_outs;
    cut.set(|line| line.is_full = false);
    let refused = told(second).await;
    assert!(refused.is_none(), "told of the time before: {refused:?}");
    {
        let line = cut.line.borrow();
        assert_eq!(line.unbacked, 0, "write-outs began before their space was promised");
        assert_eq!((write_outs, line.write_outs), (1, 2));
    }
    let status = cut.status().await;
    assert_eq!((status.dirty_bytes, status.error_pending), (0, false));
    assert_eq!(cut.client.read(NAME, 0, 4 * BLOCK).await.unwrap(), vec![1; 4 * 4096]);
    assert_eq!(cut.client.read(NAME, 8 * BLOCK, BLOCK).await.unwrap(), vec![2; 4096]);
    cut.ends_well().await;
}

/// Full stores, a write-out that uses up all that was promised but one block, and an end that is lost. While
/// conversion is away nobody knows whether the stores have its blocks: who writes over one of them
/// takes the block that is left, and the next one is not told that all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_over_what_may_be_converted_takes_space_of_its_own() {
    let cut = Cut::start(3_000).await;
    cut.create(16 << 20, false).await;
    let other = cut.stack.client();
    other.create("other", STORE_BLOCKS * BLOCK, 1).await.unwrap();
    let rest = RangeRequest {
        volume: "other".to_owned(),
        length_bytes: (STORE_BLOCKS - 9) * BLOCK,
        ..Default::default()
    };
    other.io().allocate(rest).await.unwrap();
    let buffered = WriteMode::Buffered;
    assert!(told(cut.writes(0, vec![1; 8 * 4096], buffered)).await.is_none());
    // Who writes may need a block, and gives it back where it does not.
    assert!(told(cut.writes(0, vec![1; 4096], buffered)).await.is_none());
    cut.set(|line| line.loses_ends = true);
    let first = cut.syncs();
    cut.until("the write-out is converted", |line| line.lost > 0).await;
    cut.set(|line| line.is_cut = true);
    cut.between.break_sessions();
    assert!(told(first).await.is_some(), "it cannot know");
    let over = told(cut.writes(0, vec![2; 4096], buffered)).await;
    assert!(over.is_none(), "there is a block for it: {over:?}");
    let over = told(cut.writes(1, vec![2; 4096], buffered)).await;
    let over = over.expect("no space is promised for it");
    assert!(matches!(over.reason, Reason::PeerAway | Reason::NoSpace), "{over}");
    cut.set(|line| (line.loses_ends, line.is_cut) = (false, false));
    cut.between.break_sessions();
    let mut refused = told(cut.syncs()).await;
    if refused.is_some() {
        // Of the time before.
        refused = told(cut.syncs()).await;
    }
    assert!(refused.is_none(), "what was acknowledged cannot be flushed: {refused:?}");
    assert_eq!(cut.status().await.dirty_bytes, 0);
    let expected = [vec![2; 4096], vec![1; 7 * 4096]].concat();
    assert_eq!(cut.client.read(NAME, 0, 8 * BLOCK).await.unwrap(), expected);
    cut.ends_well().await;
}

/// A growing volume of two blocks of 1, which a direct write that was given up has extended by two of 2.
async fn extended_unheard() -> Cut {
    let cut = Cut::start(4_000).await;
    cut.create(0, true).await;
    let direct = WriteMode::Direct;
    assert!(told(cut.writes(0, vec![1; 2 * 4096], direct)).await.is_none());
    cut.set(|line| line.loses_ends = true);
    let write = cut.writes(2, vec![2; 2 * 4096], direct);
    cut.until("the write is converted", |line| line.lost > 0).await;
    assert_eq!(cut.volume().await.size_bytes, 4 * BLOCK);
    // Only then: what still has time begins again under the next session, and hears of its end.
    cut.until("the write is given up", |line| line.given_up > 0).await;
    cut.set(|line| line.loses_ends = false);
    cut.between.break_sessions();
    let refused = told(write).await.expect("its end was lost");
    assert_eq!(refused.reason, Reason::TimedOut, "{refused}");
    cut
}

/// A direct write that was given up has made the volume longer all the same. A resize into it, which to
/// the writeback looks as if the volume grew, cuts its data off for good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_resize_cuts_off_of_a_write_that_was_given_up_does_not_come_back() {
    let cut = extended_unheard().await;
    let request = endio_api::writeback::VolumeRequest { name: NAME.to_owned() };
    let seen = cut.client.volumes().get(request).await.unwrap().into_inner();
    assert_eq!(seen.size_bytes, 2 * BLOCK, "the writeback has not heard");
    cut.resize(10_000).await;
    cut.resize(4 * BLOCK).await;
    let read = cut.client.read(NAME, 0, 4 * BLOCK).await.unwrap();
    let expected = [vec![1; 8192], vec![2; 10_000 - 8192], vec![0; 16_384 - 10_000]].concat();
    let differs = read.iter().zip(&expected).position(|(read, meant)| read != meant);
    assert_eq!(differs, None, "first byte that differs");
    cut.ends_well().await;
}

/// A direct write that was given up has made the volume longer all the same. Who writes behind its end, and
/// over a part of it, does not take what is there for a hole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_write_that_was_given_up_has_put_behind_the_end_is_no_hole() {
    let cut = extended_unheard().await;
    assert!(told(cut.writes(3, vec![3; 100], WriteMode::Buffered)).await.is_none());
    let seen = cut.client.read(NAME, 0, 3 * BLOCK + 100).await.unwrap();
    let whole = [vec![1; 8192], vec![2; 4096], vec![3; 100], vec![2; 3996]].concat();
    let differs = |seen: &[u8]| seen.iter().zip(&whole).position(|(seen, meant)| seen != meant);
    assert_eq!(differs(&seen), None, "first byte that differs, in the cache");
    let refused = told(cut.syncs()).await;
    assert!(refused.is_none(), "{refused:?}");
    let seen = cut.client.read(NAME, 0, 4 * BLOCK).await.unwrap();
    assert_eq!(differs(&seen), None, "first byte that differs, on the stores");
    cut.ends_well().await;
}

/// The session stands, and what the data log says of a flush is lost: the flush ends in its time, and the next
/// one needs no log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_ends_in_time_though_the_data_log_never_answers() {
    let cut = Cut::start(1_000).await;
    cut.create(16 << 20, false).await;
    cut.set(|line| line.loses_logged = true);
    assert!(told(cut.writes(0, vec![1; 4096], WriteMode::Buffered)).await.is_none());
    let request = FsyncRequest { volume: NAME.to_owned(), may_log: true, ..Default::default() };
    let mut io = cut.client.io();
    let flush = tokio::spawn(async move { io.fsync(request).await.err().map(Refused::from) });
    let refused = told(flush).await.expect("nobody said that it is durable");
    assert_eq!(refused.reason, Reason::TimedOut, "{refused}");
    cut.until("it was logged", |line| line.lost > 0).await;
    cut.set(|line| line.loses_logged = false);
    assert!(told(cut.syncs()).await.is_none());
    assert_eq!(cut.client.read(NAME, 0, 4096).await.unwrap(), [1; 4096]);
    cut.ends_well().await;
}

/// A read waits for the session, and under the next one the volume is somebody else's. What was dirty is discarded
/// by then, and behind the end that the map knows: it must not be read as a hole, for the data is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_waited_while_its_volume_was_taken_does_not_see_a_hole() {
    let cut = Cut::start(60_000).await;
    cut.create(0, true).await;
    assert!(told(cut.writes(0, vec![7; 4096], WriteMode::Buffered)).await.is_none());
    cut.client.flush(NAME).await.unwrap();
    assert_eq!(cut.status().await.dirty_bytes, BLOCK, "it is in the data log only");
    cut.set(|line| line.is_cut = true);
    cut.between.break_sessions();
    let mut late = None;
    for _ in 0..100 {
        let client = cut.client.clone();
        let mut read = tokio::spawn(async move { client.read(NAME, 0, BLOCK).await });
        // Answered at once as long as the lease runs.
        if tokio::time::timeout(Duration::from_millis(500), &mut read).await.is_err() {
            late = Some(read);
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let late = late.expect("a lease that never ends");
    let config = endio_writeback::Config {
        conversion: cut.stack.conversion.url.clone(),
        cache_dir: cut.stack.directory.path().join("second"),
        ..Default::default()
    };
    let second = Writeback::start_with(config).await;
    second.client().open(NAME, true).await.unwrap();
    cut.set(|line| line.is_cut = false);
    if let Ok(read) = late.await.unwrap() {
        assert!(read == [7; 4096], "a hole where data is durable");
    }
    assert_eq!(second.client().read(NAME, 0, BLOCK).await.unwrap(), [7; 4096]);
    second.client().fsync(NAME).await.unwrap();
    second.client().settles().await.unwrap();
}
