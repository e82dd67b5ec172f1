//! Hostile peers of the conversion service: each gets an error with a reason, and nothing changes.

mod data_log;

use std::fmt::Debug;
use std::time::Duration;

use bytes::Bytes;
use endio_api::common::{Reason, Token};
use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::conversion_message::Message as Answer;
use endio_api::conversion::store_message::Message as FromStore;
use endio_api::conversion::writeback_message::Message as FromWriteback;
use endio_api::conversion::*;
use endio_integration_tests::hostile;
use endio_integration_tests::raw::{RawStore, RawWriteback, conversion};
use endio_integration_tests::services::Conversion;
use endio_testkit::seed::{self, Rng};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

const SIZE: u64 = 64 << 20;

struct Rig {
    conversion: Conversion,
    client: ConversionClient<Channel>,
    store: RawStore,
    writeback: RawWriteback,
    volume: Volume,
    _directory: tempfile::TempDir,
}

async fn rig() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let mut config = endio_conversion::Config {
        data_dir: directory.path().to_owned(),
        ..endio_conversion::Config::default()
    };
    config.limits.lease_ms = 600_000;
    config.limits.io_end_life_max_ms = 3_600_000;
    let running = Conversion::start_with(config).await;
    let mut client = conversion(&running.url);
    let store = RawStore::register(&running.url, 16 << 10).await;
    let request =
        CreateVolumeRequest { name: "vol1".into(), size_bytes: SIZE, ..Default::default() };
    client.create_volume(request).await.unwrap();
    let writeback = RawWriteback::connect(&running.url, "wb-1").await;
    let (name, instance) = ("vol1".to_owned(), "wb-1".to_owned());
    let open = OpenVolumeRequest { name, writeback: instance, ..Default::default() };
    let opened = client.open_volume(open).await.unwrap().into_inner();
    let volume = opened.volume.unwrap();
    Rig { conversion: running, client, store, writeback, volume, _directory: directory }
}

/// Everything that must not change.
async fn picture(client: &mut ConversionClient<Channel>) -> String {
    // Without `as_of`: that a deletion was asked for counts, though there was no such volume.
    let volumes = client.list_volumes(ListVolumesRequest {}).await.unwrap().into_inner().volumes;
    let check = client.check(CheckRequest {}).await.unwrap().into_inner();
    assert!(check.findings.is_empty(), "{:?}", check.findings);
    let mut stores = client.list_stores(ListStoresRequest {}).await.unwrap().into_inner().stores;
    for store in &mut stores {
        store.lease_left_ms = 0;
    }
    let io_ends = client.list_io_ends(ListIoEndsRequest::default()).await.unwrap().into_inner();
    format!("{volumes:?} {check:?} {stores:?} {}", io_ends.total)
}

fn refused<T: Debug>(what: &str, answer: Result<Response<T>, Status>) -> Reason {
    match answer {
        Ok(answer) => panic!("accepted: {what}: {:?}", answer.into_inner()),
        Err(status) => explained(what, &status),
    }
}

fn explained(what: &str, status: &Status) -> Reason {
    let internal = [Code::Internal, Code::Unknown, Code::Ok];
    assert!(!internal.contains(&status.code()), "{what}: {status}");
    assert!(!status.message().is_empty(), "{what}: no message");
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("{what}: no ErrorInfo in {status}"));
    assert_eq!(info.domain, "endio", "{what}");
    Reason::from_str_name(&format!("REASON_{}", info.reason))
        .unwrap_or_else(|| panic!("{what}: unknown reason {}", info.reason))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_and_frames_that_are_no_calls_change_nothing() {
    let mut rig = rig().await;
    let seed = seed::announce("endio-integration-tests", "bytes_and_frames_that_are_no_calls");
    let mut rng = Rng::new(seed);
    let before = picture(&mut rig.client).await;
    let url = rig.conversion.url.clone();
    let sent = hostile::attack_bytes(&url, &mut rng).await
        + hostile::attack_frames(&url, "endio.conversion.v1.Conversion", &mut rng).await
        + hostile::attack_frames(&url, "endio.common.v1.Traces", &mut rng).await;
    assert!(sent >= 100, "only {sent} attacks");
    assert_eq!(picture(&mut rig.client).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_volume_calls_are_refused_with_a_reason() {
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    let generation = rig.volume.generation;
    let client = &mut rig.client;
    let long = "a".repeat(129);
    let vast = "a".repeat(100_000);
    let names = ["", &long, &vast, "..", "a/b", "é", "a\0b", " a", "-a", ".a", "a b", "\u{202e}"];
    for name in names {
        let create =
            CreateVolumeRequest { name: name.into(), size_bytes: 4096, ..Default::default() };
        let reason = refused(name, client.create_volume(create).await);
        assert_eq!(reason, Reason::Malformed, "create {name:?}");
        let name = name.to_owned();
        refused("get", client.get_volume(VolumeRequest { name: name.clone() }).await);
        let open = OpenVolumeRequest {
            name: name.clone(),
            writeback: "x".into(),
            force: true,
            ..Default::default()
        };
        refused("open", client.open_volume(open).await);
        let delete = DeleteVolumeRequest { name, ..Default::default() };
        refused("delete", client.delete_volume(delete).await);
    }
    let bad = |size_bytes, replicas, in_place, growable| {
        let name = "new".to_owned();
        CreateVolumeRequest { name, size_bytes, replicas, in_place, growable, as_of: None }
    };
    let bads = [
        bad(1, 1, false, false),
        bad(4097, 1, false, false),
        bad((1 << 60) + 4096, 1, false, false),
        bad((1 << 60) + 1, 1, false, true),
        bad(u64::MAX, 1, false, true),
        bad(!4095, 1, false, false),
        bad(4096, 4, false, false),
        bad(4096, u32::MAX, false, false),
        bad(4096, 2, true, false),
    ];
    for create in bads {
        let reason = refused(&format!("{create:?}"), client.create_volume(create).await);
        assert_eq!(reason, Reason::Malformed);
    }
    for size_bytes in [1, 4097, (1 << 60) + 4096, u64::MAX] {
        let name = "vol1".to_owned();
        let resize = ResizeVolumeRequest { name, size_bytes, generation, ..Default::default() };
        refused("resize", client.resize_volume(resize).await);
    }
    for stale in [0, generation - 1, generation + 1, u64::MAX] {
        let name = "vol1".to_owned();
        let resize = ResizeVolumeRequest {
            name: name.clone(),
            size_bytes: 4096,
            generation: stale,
            ..Default::default()
        };
        refused("resize of another generation", client.resize_volume(resize).await);
        let delete =
            DeleteVolumeRequest { name: name.clone(), generation: stale, ..Default::default() };
        refused("delete of another generation", client.delete_volume(delete).await);
        let close = CloseVolumeRequest { name, generation: stale, volume: 0 };
        refused("close of another generation", client.close_volume(close).await);
    }
    let name = "vol1".to_owned();
    let open = |writeback: &str, force, if_generation| OpenVolumeRequest {
        name: name.clone(),
        writeback: writeback.to_owned(),
        force,
        if_generation,
        volume: 0,
        reads_log: true,
    };
    refused("open by nobody", client.open_volume(open("", true, None)).await);
    let busy = client.open_volume(open("other", false, None)).await;
    assert_eq!(refused("busy", busy), Reason::VolumeBusy);
    let past = client.open_volume(open("other", true, Some(0))).await;
    assert_eq!(refused("opened since", past), Reason::OldGeneration);
    assert_eq!(picture(&mut rig.client).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_map_calls_are_refused_with_a_reason() {
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    let (volume, generation) = (rig.volume.id, rig.volume.generation);
    let client = &mut rig.client;
    let attempts_over = u64::MAX;
    let lookup = |volume, generation, lblk, blocks| LookupRequest {
        volume,
        generation,
        lblk,
        blocks,
        attempts_over,
    };
    let lookups = [
        lookup(0, generation, 0, 1),
        lookup(volume + 1, generation, 0, 1),
        lookup(u64::MAX, generation, 0, 1),
        LookupRequest { attempts_over: 0, ..lookup(volume, generation, 0, 0) },
        lookup(volume, generation, 0, 65_537),
        lookup(volume, generation, 0, u32::MAX),
        lookup(volume, generation, u64::MAX, 1),
        lookup(volume, generation, u64::MAX, u32::MAX),
    ];
    for request in lookups {
        refused(&format!("{request:?}"), client.lookup(request).await);
    }
    let change = |volume, generation, change, lblk, blocks| ChangeMapRequest {
        volume,
        generation,
        change,
        lblk,
        blocks,
        traceparent: "garbage \u{1f4a5}".to_owned(),
        attempt: None,
    };
    let mut changes = Vec::new();
    for kind in [1, 2, 3] {
        changes.extend([
            change(0, generation, kind, 0, 1),
            change(u64::MAX, generation, kind, 0, 1),
            change(volume, generation - 1, kind, 0, 1),
            change(volume, generation + 1, kind, 0, 1),
            change(volume, u64::MAX, kind, 0, 1),
            change(volume, generation, kind, 0, 0),
            change(volume, generation, kind, u64::MAX, 1),
            change(volume, generation, kind, u64::MAX, u64::MAX),
            change(volume, generation, kind, 1, u64::MAX),
            change(volume, generation, kind, SIZE / 4096, 1),
            change(volume, generation, kind, 0, SIZE / 4096 + 1),
        ]);
    }
    for kind in [0, 4, -1, i32::MAX, i32::MIN] {
        changes.push(change(volume, generation, kind, 0, 1));
    }
    for request in changes {
        refused(&format!("{request:?}"), client.change_map(request).await);
    }
    for name in ["", "absent", "a/b"] {
        let request = ListExtentsRequest { volume: name.into(), lblk: 0, blocks: 0 };
        match client.list_extents(request).await {
            Err(status) => explained("extents", &status),
            Ok(stream) => explained("extents", &stream.into_inner().message().await.unwrap_err()),
        };
    }
    assert_eq!(picture(&mut rig.client).await, before);
}

/// Sends messages as the first ones of a session and returns how the session ended.
async fn writeback_session(url: &str, messages: Vec<Option<FromWriteback>>) -> Option<Status> {
    let (sender, stream) = tokio::sync::mpsc::channel(16);
    let what = format!("{:.200}", format!("{messages:?}"));
    let messages = messages.into_iter().map(|message| WritebackMessage { message }).collect();
    sender.send(WritebackBatch { messages }).await.unwrap();
    let opening = conversion(url).writeback_session(ReceiverStream::new(stream)).await;
    let mut answers = match opening {
        Err(status) => return Some(status),
        Ok(session) => session.into_inner(),
    };
    let ended = async {
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    };
    let ended = timeout(Duration::from_secs(20), ended).await;
    drop(sender);
    ended.unwrap_or_else(|_| panic!("not ended: {what}"))
}

async fn store_session(url: &str, messages: Vec<Option<FromStore>>) -> Option<Status> {
    let (sender, stream) = tokio::sync::mpsc::channel(16);
    let what = format!("{:.200}", format!("{messages:?}"));
    let messages = messages.into_iter().map(|message| StoreMessage { message }).collect();
    sender.send(StoreBatch { messages }).await.unwrap();
    let opening = conversion(url).store_session(ReceiverStream::new(stream)).await;
    let mut answers = match opening {
        Err(status) => return Some(status),
        Ok(session) => session.into_inner(),
    };
    let ended = async {
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    };
    let ended = timeout(Duration::from_secs(20), ended).await;
    drop(sender);
    ended.unwrap_or_else(|_| panic!("not ended: {what}"))
}

fn hello(name: &str) -> Option<FromWriteback> {
    Some(FromWriteback::Hello(Hello { writeback: name.to_owned(), protocol: None }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_break_the_protocol_are_ended_with_a_reason() {
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    let url = rig.conversion.url.clone();
    let begin = Some(FromWriteback::Begin(BeginIo::default()));
    let release = Some(FromWriteback::Release(ReleaseSubmitter::default()));
    let renew = Some(FromWriteback::Renew(WritebackRenew::default()));
    let reserve = Some(FromWriteback::Reserve(Reserve::default()));
    let sessions = [
        vec![None],
        vec![begin.clone()],
        vec![release.clone()],
        vec![renew],
        vec![reserve],
        vec![hello("")],
        vec![hello(&"x".repeat(100_000))],
        vec![hello("twice"), hello("twice")],
        vec![hello("a"), hello("b")],
        vec![hello("c"), None],
        vec![release, hello("late")],
    ];
    for messages in sessions {
        let what = format!("{:.120}", format!("{messages:?}"));
        let status = writeback_session(&url, messages).await;
        explained(&what, &status.unwrap_or_else(|| panic!("ended well: {what}")));
    }
    for lane in [0, 99, -1, i32::MAX] {
        let begin = Some(FromWriteback::Begin(BeginIo { lane, ..BeginIo::default() }));
        let status = writeback_session(&url, vec![hello("lane"), begin]).await;
        assert_eq!(explained("lane", &status.expect("a status")), Reason::Malformed);
    }
    let register = |uuid: usize, incarnation, capacity_blocks, url: &str| {
        let uuid = Bytes::from(vec![9; uuid]);
        let url = url.to_owned();
        Some(FromStore::Register(RegisterStore {
            uuid,
            incarnation,
            capacity_blocks,
            url,
            protocol: None,
        }))
    };
    let good = "http://127.0.0.1:1";
    let sessions = [
        vec![None],
        vec![Some(FromStore::Ready(StoreReady { cluster_epoch: 1 }))],
        vec![Some(FromStore::Release(SegmentRelease::default()))],
        vec![Some(FromStore::Renew(StoreRenew::default()))],
        vec![Some(FromStore::FenceDone(FenceDone { fence: 1 }))],
        vec![Some(FromStore::PunchDone(PunchDone { punch: 1 }))],
        vec![register(0, 1, 100, good)],
        vec![register(15, 1, 100, good)],
        vec![register(17, 1, 100, good)],
        vec![register(1 << 20, 1, 100, good)],
        vec![register(16, 0, 100, good)],
        vec![register(16, 1, 0, good)],
        vec![register(16, 1, u64::MAX, good)],
        vec![register(16, 1, 100, "")],
    ];
    for messages in sessions {
        let what = format!("{:.120}", format!("{messages:?}"));
        let status = store_session(&url, messages).await;
        explained(&what, &status.unwrap_or_else(|| panic!("ended well: {what}")));
    }
    assert_eq!(picture(&mut rig.client).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_writes_are_refused_with_a_reason() {
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    let (volume, generation) = (rig.volume.id, rig.volume.generation);
    let lane: i32 = Lane::Direct.into();
    let good = BeginIo { volume, generation, lane, lblk: 0, blocks: 1, ..Default::default() };
    let end = SIZE / 4096;
    let writes = [
        BeginIo { volume: 0, ..good.clone() },
        BeginIo { volume: u64::MAX, ..good.clone() },
        BeginIo { generation: generation - 1, ..good.clone() },
        BeginIo { generation: generation + 1, ..good.clone() },
        BeginIo { generation: u64::MAX, ..good.clone() },
        BeginIo { blocks: 1025, ..good.clone() },
        BeginIo { blocks: u32::MAX, ..good.clone() },
        BeginIo { lblk: u64::MAX, ..good.clone() },
        BeginIo { lblk: u64::MAX, blocks: 1024, ..good.clone() },
        BeginIo { lblk: end, ..good.clone() },
        BeginIo { lblk: end - 1, blocks: 2, ..good.clone() },
        BeginIo { size_after_bytes: u64::MAX, ..good.clone() },
        BeginIo { lane: Lane::WriteOut.into(), ..good.clone() },
    ];
    for begin in writes {
        let what = format!("{begin:?}");
        match rig.writeback.try_begin(begin).await {
            Ok(begun) => panic!("accepted: {what}: {begun:?}"),
            Err(refused) => {
                assert_ne!(refused.reason(), Reason::Unspecified, "{what}");
                assert!(!refused.message.is_empty(), "{what}: no message");
            }
        }
    }
    let reserve = |add_blocks, drop_blocks, volume, generation| Reserve {
        request: 77,
        volume,
        generation,
        reset: false,
        add_blocks,
        drop_blocks,
    };
    let reserves = [
        reserve(u64::MAX, 0, volume, generation),
        reserve(1 << 40, 0, volume, generation),
        reserve(1, 0, 0, generation),
        reserve(1, 0, volume, generation + 1),
        reserve(1, 0, volume, generation - 1),
    ];
    for reserve in reserves {
        rig.writeback.send(FromWriteback::Reserve(reserve)).await;
        let reason = rig.writeback.wait(|answer| match answer {
            Answer::Refused(refused) if refused.request == 77 => Some(refused.reason()),
            Answer::Reserved(reserved) if reserved.request == 77 => Some(Reason::Unspecified),
            _ => None,
        });
        assert_ne!(reason.await, Reason::Unspecified, "accepted: {reserve:?}");
    }
    assert_eq!(picture(&mut rig.client).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_tokens_and_numbers_in_sessions_change_nothing() {
    let seed = seed::announce("endio-integration-tests", "random_tokens_and_numbers_in_sessions");
    let mut rng = Rng::new(seed);
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    for _ in 0..60 {
        let mut small = || if rng.chance(50) { rng.below(4) } else { rng.draw() };
        let token = Token {
            cluster_epoch: small(),
            io_end: small(),
            segment: u32::try_from(small() & 0xFFFF_FFFF).unwrap(),
            volume: small(),
            volume_generation: small(),
            store: u32::try_from(small() & 0xFFFF_FFFF).unwrap(),
            store_incarnation: small(),
            pblk: small(),
            blocks: u32::try_from(small() % 2000).unwrap(),
            lease_ms: 1,
            mac: Bytes::from(rng.bytes(16)),
        };
        assert_ne!(rig.store.release(&token).await, Reason::Unspecified, "{token:?}");
        let release = ReleaseSubmitter {
            token: Some(token.clone()),
            not_submitted: vec![u32::MAX, 0, 7],
            abort: rng.chance(50),
            traceparent: "00-zz-zz-zz".to_owned(),
        };
        assert_ne!(rig.writeback.release_as(release).await, Reason::Unspecified, "{token:?}");
        rig.store.send(FromStore::FenceDone(FenceDone { fence: rng.draw() })).await;
        rig.store.send(FromStore::PunchDone(PunchDone { punch: rng.draw() })).await;
        let confirm =
            ReadConfirm { volume: rng.draw(), generation: rng.draw(), map_version: u64::MAX };
        let renew = WritebackRenew { confirms: vec![confirm] };
        rig.writeback.send(FromWriteback::Renew(renew)).await;
    }
    assert_eq!(picture(&mut rig.client).await, before);
}
