//! The completion protocol of the conversion service, spoken by peers that do exactly what a case
//! says: releases in any order, twice, late, forged; holders that vanish; epochs that pass.

use endio_api::common::{ExtentState, Reason, Token};
use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::conversion_message::Message as Answer;
use endio_api::conversion::*;
use endio_integration_tests::raw::{RawStore, RawWriteback, conversion};
use endio_integration_tests::services::Conversion;
use endio_testkit::checkers;
use tempfile::TempDir;
use tonic::transport::Channel;

mod together;

const STORE_BLOCKS: u64 = 4096;
const VOLUME_BLOCKS: u64 = 2048;

/// One conversion, raw stores, one raw writeback that has `vol1` open.
struct Rig {
    conversion: Conversion,
    client: ConversionClient<Channel>,
    stores: Vec<RawStore>,
    writeback: RawWriteback,
    volume: Volume,
    _directory: TempDir,
}

async fn rig(stores: usize, replicas: u32) -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let mut config = endio_conversion::Config {
        data_dir: directory.path().to_owned(),
        ..endio_conversion::Config::default()
    };
    // Nobody renews here: nothing may expire while a test thinks.
    config.limits.lease_ms = 600_000;
    config.limits.io_end_life_max_ms = 3_600_000;
    // A stop with an io_end in flight, which some cases want, need not wait for it.
    config.drain_deadline_ms = 200;
    config.server.drain_timeout_ms = 200;
    let running = Conversion::start_with(config).await;
    let client = conversion(&running.url);
    let mut list = Vec::new();
    for _ in 0..stores {
        list.push(RawStore::register(&running.url, STORE_BLOCKS).await);
    }
    let writeback = RawWriteback::connect(&running.url, "wb-1").await;
    let mut rig = Rig {
        conversion: running,
        client,
        stores: list,
        writeback,
        volume: Volume::default(),
        _directory: directory,
    };
    rig.wait_live(stores).await;
    let request = CreateVolumeRequest {
        name: "vol1".into(),
        size_bytes: VOLUME_BLOCKS * 4096,
        replicas,
        ..Default::default()
    };
    rig.client.create_volume(request).await.unwrap();
    rig.volume = rig.open("wb-1", false).await.unwrap();
    rig
}

impl Rig {
    async fn wait_live(&mut self, count: usize) {
        for _ in 0..500 {
            let listed = self.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
            if listed.stores.iter().filter(|store| store.live).count() == count {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("there are not {count} live stores")
    }

    async fn open(&mut self, writeback: &str, force: bool) -> Result<Volume, Reason> {
        let (name, writeback) = ("vol1".to_owned(), writeback.to_owned());
        let request = OpenVolumeRequest { name, writeback, force, ..Default::default() };
        match self.client.open_volume(request).await {
            Ok(opened) => Ok(opened.into_inner().volume.unwrap()),
            Err(status) => Err(reason_of(&status)),
        }
    }

    fn begin_of(&self, lblk: u64, blocks: u32) -> BeginIo {
        BeginIo {
            volume: self.volume.id,
            generation: self.volume.generation,
            lane: Lane::Direct.into(),
            lblk,
            blocks,
            ..Default::default()
        }
    }

    async fn begin(&mut self, lblk: u64, blocks: u32) -> Begun {
        for _ in 0..200 {
            let begin = self.begin_of(lblk, blocks);
            match self.writeback.try_begin(begin).await {
                Ok(begun) => return begun,
                // After a restart free blocks are punched first: the stores have to say so.
                Err(refused) if refused.retry_after_ms > 0 => {
                    for store in &mut self.stores {
                        store.obey().await;
                    }
                }
                Err(refused) => panic!("refused: {refused:?}"),
            }
        }
        panic!("refused for good")
    }

    fn store(&mut self, id: u32) -> &mut RawStore {
        self.stores.iter_mut().find(|store| store.id == id).unwrap()
    }

    async fn release_segment(&mut self, token: &Token) -> Reason {
        self.store(token.store).release(token).await
    }

    /// Writes and converts.
    async fn write(&mut self, lblk: u64, blocks: u32) -> Completion {
        let begun = self.begin(lblk, blocks).await;
        for segment in &begun.segments {
            let token = segment.token.clone().unwrap();
            assert_eq!(self.release_segment(&token).await, Reason::Unspecified);
        }
        let submitter = begun.submitter.unwrap();
        let io_end = submitter.io_end;
        assert_eq!(self.writeback.release(submitter).await, Reason::Unspecified);
        let completion = self.writeback.completion(io_end).await;
        assert_eq!(completion.reason(), Reason::Unspecified, "{}", completion.message);
        completion
    }

    async fn states(&mut self, lblk: u64, blocks: u32) -> Vec<(u64, u32, ExtentState)> {
        let (volume, generation) = (self.volume.id, self.volume.generation);
        let request = LookupRequest { volume, generation, lblk, blocks, attempts_over: 0 };
        let found = self.client.lookup(request).await.unwrap().into_inner();
        found
            .extents
            .iter()
            .filter(|extent| extent.state() != ExtentState::Hole)
            .map(|extent| (extent.lblk, extent.blocks, extent.state()))
            .collect()
    }

    async fn is_mapped(&mut self, lblk: u64, blocks: u32) -> bool {
        !self.states(lblk, blocks).await.is_empty()
    }

    async fn io_ends(&mut self) -> ListIoEndsResponse {
        let request = ListIoEndsRequest::default();
        self.client.list_io_ends(request).await.unwrap().into_inner()
    }

    async fn adds_up(&mut self) {
        let check = self.client.check(CheckRequest {}).await.unwrap().into_inner();
        let stores = self.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
        checkers::space_adds_up(&check, &stores.stores).unwrap();
    }

    async fn change(&mut self, change: MapChange, lblk: u64, blocks: u64) -> ChangeMapResponse {
        let request = self.change_of(change, lblk, blocks);
        self.client.change_map(request).await.unwrap().into_inner()
    }

    fn change_of(&self, change: MapChange, lblk: u64, blocks: u64) -> ChangeMapRequest {
        ChangeMapRequest {
            volume: self.volume.id,
            generation: self.volume.generation,
            change: change.into(),
            lblk,
            blocks,
            traceparent: String::new(),
            attempt: None,
        }
    }
}

fn reason_of(status: &tonic::Status) -> Reason {
    Reason::try_from(endio_api::status::reason(status) as i32).unwrap()
}

/// Every order of four things.
fn orders() -> Vec<[usize; 4]> {
    let mut orders = Vec::new();
    for code in 0..256_usize {
        let order = [code & 3, (code >> 2) & 3, (code >> 4) & 3, (code >> 6) & 3];
        let distinct = (0..4).all(|wanted| order.contains(&wanted));
        if distinct {
            orders.push(order);
        }
    }
    assert_eq!(orders.len(), 24);
    orders
}

/// Scenarios 1, 2, 4. Whichever reference comes last triggers the one conversion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_release_in_any_order_triggers_one_completion() {
    let mut rig = rig(3, 3).await;
    for (number, order) in (0..).zip(orders()) {
        let lblk = number * 2;
        let begun = rig.begin(lblk, 1).await;
        assert!(begun.owes_conversion);
        assert_eq!(begun.segments.len(), 3);
        let submitter = begun.submitter.unwrap();
        for (position, which) in order.into_iter().enumerate() {
            assert!(!rig.is_mapped(lblk, 1).await, "converted before the last release");
            let reason = match which {
                0 => rig.writeback.release(submitter.clone()).await,
                segment => {
                    let token = begun.segments[segment - 1].token.clone().unwrap();
                    rig.release_segment(&token).await
                }
            };
            assert_eq!(reason, Reason::Unspecified, "{order:?}");
            if position < 3 {
                let is_completion = |answer: &Answer| matches!(answer, Answer::Completion(_));
                if number == 0 {
                    rig.writeback.stays_silent(is_completion).await;
                }
            }
        }
        let completion = rig.writeback.completion(submitter.io_end).await;
        assert_eq!(completion.reason(), Reason::Unspecified);
        assert_eq!(completion.converted, [lblk, 1]);
        assert_eq!(rig.states(lblk, 1).await, [(lblk, 1, ExtentState::Written)]);
    }
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// Scenarios 5, 6, 60. A repeated release gets the same answer, another outcome is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_release_is_answered_alike_and_counts_once() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 4).await;
    let token = begun.segments[0].token.clone().unwrap();
    for _ in 0..3 {
        assert_eq!(rig.release_segment(&token).await, Reason::Unspecified);
    }
    let other = rig.store(token.store).release_as(&token, Reason::IoError).await;
    assert_eq!(other, Reason::OutcomeConflict);
    assert!(!rig.is_mapped(0, 4).await, "the submitter still holds its reference");
    let submitter = begun.submitter.unwrap();
    assert_eq!(rig.writeback.release(submitter.clone()).await, Reason::Unspecified);
    let completion = rig.writeback.completion(submitter.io_end).await;
    assert_eq!(completion.converted, [0, 4]);
    let before = rig.states(0, 16).await;
    rig.release_segment(&token).await;
    rig.writeback.release(submitter).await;
    rig.writeback.stays_silent(|answer| matches!(answer, Answer::Completion(_))).await;
    assert_eq!(rig.states(0, 16).await, before);
    rig.adds_up().await;
}

/// Scenarios 7, 10. Unknown and forged tokens are refused and change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_and_unknown_tokens_are_refused_and_change_nothing() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 4).await;
    let good = begun.segments[0].token.clone().unwrap();
    let forge = |change: &dyn Fn(&mut Token)| {
        let mut token = good.clone();
        change(&mut token);
        token
    };
    let mut forged = vec![
        forge(&|token| token.io_end += 1),
        forge(&|token| token.segment += 1),
        forge(&|token| token.volume += 1),
        forge(&|token| token.volume_generation += 1),
        forge(&|token| token.pblk += 1),
        forge(&|token| token.blocks += 1),
        forge(&|token| token.lease_ms += 1),
        forge(&|token| token.store_incarnation += 1),
        forge(&|token| token.cluster_epoch += 1),
    ];
    for bit in 0..16 * 8 {
        forged.push(forge(&|token| {
            let mut mac = token.mac.to_vec();
            mac[bit / 8] ^= 1 << (bit % 8);
            token.mac = mac.into();
        }));
    }
    let io_ends = rig.io_ends().await.total;
    for token in &forged {
        let reason = rig.stores[0].release(token).await;
        assert_ne!(reason, Reason::Unspecified, "accepted: {token:?}");
    }
    let submitter = begun.submitter.clone().unwrap();
    let mut altered = submitter.clone();
    altered.volume_generation += 1;
    assert_ne!(rig.writeback.release(altered).await, Reason::Unspecified);
    // A store that presents the submitter's token, and a writeback that presents the store's.
    assert_ne!(rig.stores[0].release(&submitter).await, Reason::Unspecified);
    assert_ne!(rig.writeback.release(good.clone()).await, Reason::Unspecified);
    assert_eq!(rig.io_ends().await.total, io_ends);
    assert!(!rig.is_mapped(0, 4).await);
    assert_eq!(rig.release_segment(&good).await, Reason::Unspecified);
    assert_eq!(rig.writeback.release(submitter.clone()).await, Reason::Unspecified);
    assert_eq!(rig.writeback.completion(submitter.io_end).await.reason(), Reason::Unspecified);
    rig.adds_up().await;
}

/// Scenario 12. A zero-byte write completes, and nothing of it stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zero_length_write_completes_and_converts_nothing() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(5, 0).await;
    assert!(!begun.owes_conversion);
    assert!(begun.segments.is_empty());
    let submitter = begun.submitter.unwrap();
    assert_eq!(rig.writeback.release(submitter.clone()).await, Reason::Unspecified);
    let completion = rig.writeback.completion(submitter.io_end).await;
    assert_eq!(completion.reason(), Reason::Unspecified);
    assert!(completion.converted.is_empty());
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// Scenario 19. One of three replicas fails: nothing of the io_end converts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failed_segment_converts_nothing() {
    let mut rig = rig(3, 3).await;
    let begun = rig.begin(0, 8).await;
    let submitter = begun.submitter.unwrap();
    for (number, segment) in begun.segments.iter().enumerate() {
        let token = segment.token.clone().unwrap();
        let outcome = if number == 1 { Reason::IoError } else { Reason::Unspecified };
        let answer = rig.store(token.store).release_as(&token, outcome).await;
        assert_eq!(answer, Reason::Unspecified);
    }
    rig.writeback.release(submitter.clone()).await;
    let completion = rig.writeback.completion(submitter.io_end).await;
    assert_eq!(completion.reason(), Reason::IoError);
    assert!(completion.retryable);
    let failed = begun.segments[1].token.as_ref().unwrap().store;
    assert_eq!(completion.failed_store, failed);
    assert!(!rig.is_mapped(0, 8).await, "a failed write left a mapping");
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// An aborted io_end converts nothing, and its blocks wait in quarantine for the store's word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborted_blocks_stay_in_quarantine_until_the_store_has_drained() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 64).await;
    let submitter = begun.submitter.unwrap();
    let io_end = submitter.io_end;
    let abort = ReleaseSubmitter { token: Some(submitter), abort: true, ..Default::default() };
    rig.writeback.release_as(abort).await;
    let completion = rig.writeback.completion(io_end).await;
    assert_ne!(completion.reason(), Reason::Unspecified);
    let fence = rig.stores[0].fence_of(io_end).await;
    let quarantined = |stores: &[Store]| stores[0].quarantined_blocks;
    let listed = rig.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
    assert_eq!(quarantined(&listed.stores), 64);
    // A late release of the fenced token is refused.
    let token = begun.segments[0].token.clone().unwrap();
    assert_ne!(rig.release_segment(&token).await, Reason::Unspecified);
    rig.stores[0].fence_done(fence.fence).await;
    for _ in 0..500 {
        rig.stores[0].obey().await;
        let listed = rig.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
        if quarantined(&listed.stores) == 0 {
            rig.adds_up().await;
            return;
        }
    }
    panic!("the blocks never left quarantine");
}

/// Scenario 45. An allocated extent converts only where it is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_written_part_of_an_allocated_extent_converts() {
    let mut rig = rig(1, 1).await;
    rig.change(MapChange::Allocate, 0, 16).await;
    assert_eq!(rig.states(0, 16).await, [(0, 16, ExtentState::Unwritten)]);
    let begun = rig.begin(4, 4).await;
    assert_eq!(rig.states(0, 16).await, [(0, 16, ExtentState::Unwritten)]);
    rig.change(MapChange::Allocate, 16, 16).await;
    let token = begun.segments[0].token.clone().unwrap();
    rig.release_segment(&token).await;
    let submitter = begun.submitter.unwrap();
    rig.writeback.release(submitter.clone()).await;
    let completion = rig.writeback.completion(submitter.io_end).await;
    assert_eq!(completion.converted, [4, 4]);
    let mut states = Vec::new();
    for lblk in 0..32 {
        states.push(rig.states(lblk, 1).await[0].2);
    }
    let written: Vec<usize> =
        (0..32).filter(|lblk| states[*lblk] == ExtentState::Written).collect();
    assert_eq!(written, [4, 5, 6, 7]);
    rig.adds_up().await;
}

/// Scenario 42. A trim waits for the write in flight below it; nothing is resurrected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_waits_for_the_write_in_flight_below_it() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 8).await;
    let (mut client, request) = (rig.client.clone(), rig.change_of(MapChange::Trim, 4, 8));
    let trim = tokio::spawn(async move { client.change_map(request).await });
    let token = begun.segments[0].token.clone().unwrap();
    let submitter = begun.submitter.unwrap();
    rig.writeback.stays_silent(|answer| matches!(answer, Answer::Completion(_))).await;
    assert!(!trim.is_finished(), "the trim overtook a write in flight");
    rig.release_segment(&token).await;
    rig.writeback.release(submitter.clone()).await;
    rig.writeback.completion(submitter.io_end).await;
    trim.await.unwrap().unwrap();
    assert_eq!(rig.states(0, 16).await, [(0, 4, ExtentState::Written)]);
    rig.adds_up().await;
}

/// Scenario 49. A delete waits for the tokens in flight; afterwards nothing is accessible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_waits_for_the_tokens_in_flight() {
    let mut rig = rig(1, 1).await;
    rig.write(100, 4).await;
    let begun = rig.begin(0, 8).await;
    let generation = rig.volume.generation;
    let request = DeleteVolumeRequest { name: "vol1".into(), generation, ..Default::default() };
    let mut client = rig.client.clone();
    let delete = tokio::spawn(async move { client.delete_volume(request).await });
    let token = begun.segments[0].token.clone().unwrap();
    let submitter = begun.submitter.unwrap();
    rig.writeback.stays_silent(|answer| matches!(answer, Answer::Completion(_))).await;
    assert!(!delete.is_finished(), "the delete did not wait");
    rig.release_segment(&token).await;
    rig.writeback.release(submitter).await;
    delete.await.unwrap().unwrap();
    let begin = rig.begin_of(0, 1);
    let refused = rig.writeback.try_begin(begin).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::UnknownVolume);
    let listed = rig.client.list_volumes(ListVolumesRequest {}).await.unwrap().into_inner();
    assert!(listed.volumes.is_empty());
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// Scenario 61. A takeover by force fences the first: its begins and releases are refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_fences_the_first_writeback() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 8).await;
    let mut second = RawWriteback::connect(&rig.conversion.url, "wb-2").await;
    assert_eq!(rig.open("wb-2", false).await.unwrap_err(), Reason::VolumeBusy);
    let opened = rig.open("wb-2", true).await.unwrap();
    assert!(opened.generation > rig.volume.generation);
    let volume = rig.volume.id;
    let fenced = rig.writeback.wait(|answer| match answer {
        Answer::Fenced(fenced) if fenced.volume == volume => Some(fenced.generation),
        _ => None,
    });
    assert_eq!(fenced.await, opened.generation);
    let token = begun.segments[0].token.clone().unwrap();
    let late = rig.release_segment(&token).await;
    assert_ne!(late, Reason::Unspecified, "a fenced segment was accepted");
    let late = rig.writeback.release(begun.submitter.unwrap()).await;
    assert_ne!(late, Reason::Unspecified, "a fenced submitter was accepted");
    let begin = rig.begin_of(0, 1);
    let refused = rig.writeback.try_begin(begin).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::OldGeneration);
    let (volume, generation) = (rig.volume.id, rig.volume.generation);
    let stale = LookupRequest { volume, generation, lblk: 0, blocks: 8, attempts_over: 0 };
    let status = rig.client.lookup(stale).await;
    if let Ok(found) = status {
        assert!(found.into_inner().read_grant.is_none(), "a fenced generation may read");
    }
    rig.volume = opened;
    assert!(!rig.is_mapped(0, 8).await);
    let begin = rig.begin_of(0, 8);
    let begun = second.begin(begin).await;
    let token = begun.segments[0].token.clone().unwrap();
    assert_eq!(rig.release_segment(&token).await, Reason::Unspecified);
    let submitter = begun.submitter.unwrap();
    second.release(submitter.clone()).await;
    assert_eq!(second.completion(submitter.io_end).await.reason(), Reason::Unspecified);
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// Scenario 56. After a restart of conversion every token of the older epoch is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn releases_of_an_older_epoch_are_refused() {
    let mut rig = rig(1, 1).await;
    rig.write(100, 4).await;
    let begun = rig.begin(0, 8).await;
    let old_epoch = rig.stores[0].registered.cluster_epoch;
    let (uuid, incarnation) = (rig.stores[0].uuid, rig.stores[0].incarnation);
    rig.conversion.restart().await;
    let url = rig.conversion.url.clone();
    rig.stores[0] = RawStore::register_as(&url, uuid, incarnation, STORE_BLOCKS).await;
    assert!(rig.stores[0].registered.cluster_epoch > old_epoch);
    rig.stores[0].ready().await;
    rig.writeback = RawWriteback::connect(&url, "wb-1").await;
    rig.wait_live(1).await;
    rig.volume = rig.open("wb-1", true).await.unwrap();
    let token = begun.segments[0].token.clone().unwrap();
    assert_eq!(rig.release_segment(&token).await, Reason::OldEpoch);
    assert_eq!(rig.writeback.release(begun.submitter.unwrap()).await, Reason::OldEpoch);
    assert!(!rig.is_mapped(0, 8).await, "an unconverted write survived its epoch");
    assert_eq!(rig.states(100, 4).await, [(100, 4, ExtentState::Written)]);
    let again = rig.begin(0, 8).await;
    let new = again.submitter.as_ref().unwrap().io_end;
    assert!(new > token.io_end, "io_end numbers are never reused");
    checkers::space_adds_up(
        &rig.client.check(CheckRequest {}).await.unwrap().into_inner(),
        &rig.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner().stores,
    )
    .unwrap();
}

/// A new incarnation of a store aborts at once what the old one held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_incarnation_aborts_what_the_old_one_held() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 8).await;
    let submitter = begun.submitter.unwrap();
    rig.writeback.release(submitter.clone()).await;
    let uuid = rig.stores[0].uuid;
    let url = rig.conversion.url.clone();
    let id = rig.stores[0].id;
    rig.stores[0] = RawStore::register_as(&url, uuid, 2, STORE_BLOCKS).await;
    assert_eq!(rig.stores[0].id, id, "the identity keeps its number");
    rig.stores[0].ready().await;
    let completion = rig.writeback.completion(submitter.io_end).await;
    assert_ne!(completion.reason(), Reason::Unspecified);
    assert!(completion.retryable);
    let token = begun.segments[0].token.clone().unwrap();
    let late = rig.release_segment(&token).await;
    assert_ne!(late, Reason::Unspecified, "a token of an older incarnation was accepted");
    assert!(!rig.is_mapped(0, 8).await);
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}

/// A store that comes back with an older incarnation than known is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_incarnation_cannot_register() {
    let rig = rig(1, 1).await;
    let (uuid, url) = (rig.stores[0].uuid, rig.conversion.url.clone());
    let _newer = RawStore::register_as(&url, uuid, 5, STORE_BLOCKS).await;
    let (sender, messages) = tokio::sync::mpsc::channel(4);
    let register = RegisterStore {
        uuid: uuid.to_vec().into(),
        incarnation: 4,
        capacity_blocks: STORE_BLOCKS,
        url: "http://127.0.0.1:1".into(),
        protocol: None,
    };
    let message = Some(store_message::Message::Register(register));
    sender.send(StoreBatch { messages: vec![StoreMessage { message }] }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
    let status = match rig.client.clone().store_session(stream).await {
        Err(status) => status,
        Ok(session) => session.into_inner().message().await.unwrap_err(),
    };
    assert_eq!(reason_of(&status), Reason::OldIncarnation, "{status}");
}

/// Scenario 54. A submitter that dies before its release is superseded by the next open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_submitter_is_superseded_by_the_next_open() {
    let mut rig = rig(1, 1).await;
    let begun = rig.begin(0, 8).await;
    let token = begun.segments[0].token.clone().unwrap();
    assert_eq!(rig.release_segment(&token).await, Reason::Unspecified);
    rig.writeback = RawWriteback::connect(&rig.conversion.url, "wb-2").await;
    rig.volume = rig.open("wb-2", true).await.unwrap();
    for _ in 0..200 {
        if rig.io_ends().await.total == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    assert!(!rig.is_mapped(0, 8).await, "durable but never acknowledged by its submitter");
    rig.adds_up().await;
}

/// Scenarios 43, 46. An overwrite goes to fresh blocks; the old ones come back only after reads
/// under the older map version have been confirmed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overwritten_blocks_wait_for_the_readers_of_the_older_map() {
    let mut rig = rig(1, 1).await;
    rig.write(0, 8).await;
    let places = |extents: &[endio_api::common::Extent]| -> Vec<u64> {
        extents.iter().flat_map(|extent| extent.places.iter().map(|place| place.pblk)).collect()
    };
    let (volume, generation) = (rig.volume.id, rig.volume.generation);
    let request = LookupRequest { volume, generation, lblk: 0, blocks: 8, attempts_over: 0 };
    let before = rig.client.lookup(request).await.unwrap().into_inner();
    let completion = rig.write(0, 8).await;
    let after = rig.client.lookup(request).await.unwrap().into_inner();
    assert_ne!(places(&before.extents), places(&after.extents), "overwritten in place");
    assert!(after.map_version > before.map_version);
    let quarantine = async |rig: &mut Rig| {
        let listed = rig.client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
        listed.stores[0].quarantined_blocks
    };
    rig.stores[0].obey().await;
    assert_eq!(quarantine(&mut rig).await, 8, "handed out while a reader may be there");
    let map_version = completion.map_version;
    let confirm = ReadConfirm { volume, generation, map_version };
    let renew = WritebackRenew { confirms: vec![confirm] };
    rig.writeback.send(writeback_message::Message::Renew(renew)).await;
    for _ in 0..500 {
        rig.stores[0].obey().await;
        if quarantine(&mut rig).await == 0 {
            rig.adds_up().await;
            return;
        }
    }
    panic!("the old blocks never came back");
}

/// Names, sizes and repeats of volumes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creating_a_volume_again_is_no_error_and_with_other_properties_is_one() {
    let mut rig = rig(1, 1).await;
    let same = CreateVolumeRequest {
        name: "vol1".into(),
        size_bytes: VOLUME_BLOCKS * 4096,
        replicas: 1,
        ..Default::default()
    };
    let again = rig.client.create_volume(same.clone()).await.unwrap().into_inner();
    assert_eq!(again.id, rig.volume.id);
    let other = CreateVolumeRequest { size_bytes: 4096, ..same };
    let status = rig.client.create_volume(other).await.unwrap_err();
    assert_eq!(reason_of(&status), Reason::AlreadyExists);
    rig.adds_up().await;
}
