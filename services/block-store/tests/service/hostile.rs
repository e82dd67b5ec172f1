use std::sync::Arc;

use endio_api::{
    blockstore::{Bio, ReadRequest},
    common::{ReadGrant, Token},
    conversion::{Fence, PhysicalRange, Punch, Registered, ReleaseResult, store_command::Command},
};
use endio_store::block::{BlockDevice as _, MemoryDevice};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};

use crate::{bench::*, fake::*};

fn any_token() -> impl Strategy<Value = Option<Token>> {
    let numbers = prop_oneof![Just(0), Just(1), Just(7), Just(u64::MAX), any::<u64>()];
    let mac = prop_oneof![Just(vec![0; 16]), prop::collection::vec(any::<u8>(), 0..40),];
    let token = (prop::array::uniform10(numbers), mac).prop_map(|(n, mac)| Token {
        cluster_epoch: n[0],
        io_end: n[1],
        segment: n[2] as u32,
        volume: n[3],
        volume_generation: n[4],
        store: n[5] as u32,
        store_incarnation: n[6],
        pblk: n[7],
        blocks: n[8] as u32,
        lease_ms: n[9] as u32,
        mac: mac.into(),
    });
    prop::option::of(token)
}

fn any_bio() -> impl Strategy<Value = Bio> {
    let data = prop::collection::vec(any::<u8>(), 0..9_000);
    let crcs = prop::collection::vec(any::<u32>(), 0..4);
    (any_token(), data, crcs, ".{0,60}").prop_map(|(token, data, crc32c, traceparent)| Bio {
        token,
        data: data.into(),
        crc32c,
        traceparent,
    })
}

#[tokio::test]
async fn random_bios_and_reads_get_a_reason_each_and_change_nothing() {
    let device = Arc::new(MemoryDevice::new(100));
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    let mut runner = TestRunner::deterministic();
    let mut writes = store.writes().await;
    for _ in 0..300 {
        let bio = any_bio().new_tree(&mut runner).unwrap().current();
        writes.send(bio).await;
        let done = writes.next().await;
        assert!(reason(done.reason).is_some(), "{done:?}");
    }
    for _ in 0..100 {
        let token = any_token().new_tree(&mut runner).unwrap().current();
        let request = token.map_or_else(ReadRequest::default, |token| ReadRequest {
            grant: Some(ReadGrant {
                cluster_epoch: token.cluster_epoch,
                volume: token.volume,
                volume_generation: token.volume_generation,
                mac: token.mac,
            }),
            pblk: token.pblk,
            blocks: token.blocks,
            ..ReadRequest::default()
        });
        let done = store.read(request).await;
        assert!(reason(done.reason).is_some(), "{done:?}");
    }
    session.assert_silent().await;
    assert_eq!(device.used_blocks().unwrap(), 0);
    let described = store.describe().await;
    assert_eq!((described.in_flight, described.segments, described.refused), (0, 0, 400));
}

#[tokio::test]
async fn a_message_beyond_the_limit_ends_its_stream_and_nothing_else() {
    let (_conversion, mut store, _session) = ready(Arc::new(MemoryDevice::new(4_000))).await;
    let mut writes = store.writes().await;
    writes.send(bio(Want { blocks: 1200, ..Want::default() }, blocks(1, 1200))).await;
    assert!(!matches!(within("the end", writes.answers.message()).await, Ok(Some(_))));
    assert_eq!(store.write(Want::default(), blocks(1, 1)).await.reason, 0);
}

#[tokio::test]
async fn bytes_that_are_no_http_do_not_disturb_the_service() {
    use tokio::io::AsyncWriteExt as _;
    let (_conversion, mut store, _session) = ready(Arc::new(MemoryDevice::new(10))).await;
    let address = store.running.url().trim_start_matches("http://").to_owned();
    for byte in [0, b'G', 0xff] {
        let mut socket = tokio::net::TcpStream::connect(&address).await.unwrap();
        // The service may close the connection while this is written.
        let _ = socket.write_all(&vec![byte; 10_000]).await;
    }
    assert_eq!(store.write(Want::default(), blocks(1, 1)).await.reason, 0);
}

#[tokio::test]
async fn commands_that_make_no_sense_end_the_session_or_change_nothing() {
    let mut conversion = FakeConversion::start().await;
    let mut store = Store::on(config(&conversion), Arc::new(MemoryDevice::new(10))).await;
    let short_key = Registered { key: vec![1; 31].into(), ..Registered::default() };
    conversion.session().await.send(Command::Registered(short_key)).await;
    let too_early = Fence { fence: 1, ..Fence::default() };
    conversion.session().await.send(Command::Fence(too_early)).await;
    let mut session = conversion.registered(3).await;
    let unknown = ReleaseResult { io_end: 1, segment: 2, reason: 12_345 };
    session.send(Command::Released(unknown)).await;
    let beyond = vec![
        PhysicalRange { pblk: u64::MAX, blocks: u64::MAX },
        PhysicalRange { pblk: 0, blocks: 0 },
    ];
    session.send(Command::Punch(Punch { punch: 1, ranges: beyond })).await;
    session.assert_silent().await;
    drop(session);
    // An epoch never goes back.
    conversion.session().await.answer_registration(2, 10_000).await;
    let _session = conversion.registered(3).await;
    let want = Want { epoch: 3, ..Want::default() };
    assert_eq!(store.write(want, blocks(1, 1)).await.reason, 0);
}

/// On the legs to a block-store the version of the protocol travels with the call.
#[tokio::test]
async fn writebacks_of_this_and_the_previous_major_protocol_are_served_and_no_others() {
    let (_conversion, store, _session) = ready(Arc::new(MemoryDevice::new(100))).await;
    let current = endio_types::Protocol::CURRENT.major;
    let said = [format!("{current}.7"), format!("{}.0", current - 1), String::new()];
    let refused = [format!("{}.0", current + 1), "0.1".to_owned(), "new".to_owned()];
    for (versions, is_taken) in [(said, true), (refused, false)] {
        for version in versions {
            let request = || {
                let mut request = tonic::Request::new(tokio_stream::pending::<Bio>());
                if !version.is_empty() {
                    let value = version.parse().unwrap();
                    request.metadata_mut().insert(endio_api::protocol::METADATA, value);
                }
                request
            };
            let opened = within("an answer", store.client.clone().write(request())).await;
            assert_eq!(opened.is_ok(), is_taken, "{version}: {opened:?}");
            if let Err(status) = opened {
                assert_eq!(endio_api::status::reason(&status), endio_types::Reason::Protocol);
            }
        }
    }
}
