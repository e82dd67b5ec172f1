use std::sync::Arc;

use endio_api::conversion::{Fence, VolumeFenced, store_command::Command, store_message::Message};
use endio_store::block::{BlockDevice as _, DeviceFault, MemoryDevice};
use endio_types::{ClusterEpoch, IoEndId, Reason};

use crate::{bench::*, fake::*};

#[tokio::test]
async fn a_segment_is_durable_before_it_is_answered_and_released() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    let want = Want { pblk: 10, blocks: 3, ..Want::default() };
    let done = store.write(want, blocks(1, 3)).await;
    assert_eq!((reason(done.reason), done.segment), (None, 1));
    let release = session.release().await;
    assert_eq!((release.token, release.reason), (Some(token(want)), 0));
    assert_eq!(release.crc32c, crcs(&blocks(1, 3)));
    device.memory.lose_power();
    assert_eq!(device.block(12), blocks(1, 1));
    let described = store.describe().await;
    assert_eq!((described.store, described.cluster_epoch, described.segments), (7, 1, 1));
    assert_eq!((described.in_flight, described.flushes), (0, 1));
}

#[tokio::test]
async fn a_repeated_token_is_answered_and_not_written_again() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    store.write(Want::default(), blocks(1, 1)).await;
    store.write(Want { io_end: 2, ..Want::default() }, blocks(2, 1)).await;
    let done = store.write(Want::default(), blocks(1, 1)).await;
    assert_eq!(reason(done.reason), None);
    assert_eq!(device.block(0), blocks(2, 1));
    session.release().await;
    session.release().await;
    session.assert_silent().await;
}

#[tokio::test]
async fn a_token_repeated_while_under_way_gets_the_same_outcome_and_is_written_once() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    device.hold();
    let mut writes = store.writes().await;
    for _ in 0..3 {
        writes.send(bio(Want::default(), blocks(1, 1))).await;
    }
    writes.send(bio(Want { io_end: 2, ..Want::default() }, blocks(2, 1))).await;
    device.wait_for(&device.writes, 2).await;
    device.memory.inject(DeviceFault::FlushError);
    device.open();
    let mut failed = 0;
    for _ in 0..4 {
        failed += usize::from(reason(writes.next().await.reason) == Some(Reason::IoError));
    }
    assert_eq!(device.writes.load(std::sync::atomic::Ordering::SeqCst), 2);
    assert!(failed >= 3, "{failed}");
}

/// Scenario 10.
#[tokio::test]
async fn a_bio_that_is_not_allowed_is_refused_with_its_reason_and_changes_nothing() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    let epoch = ClusterEpoch(1);
    let fence = Fence {
        fence: 1,
        io_ends: vec![IoEndId::new(epoch, 50).0],
        volumes: vec![VolumeFenced { volume: 3, generation: 1 }],
    };
    session.send(Command::Fence(fence)).await;
    assert!(matches!(session.next().await, Message::FenceDone(done) if done.fence == 1));
    let good = Want { io_end: 60, ..Want::default() };
    let bad = [
        (Want { epoch: 0, ..good }, Reason::OldEpoch),
        (Want { epoch: 2, ..good }, Reason::NotReady),
        (Want { incarnation: 0, ..good }, Reason::OldIncarnation),
        (Want { store: 8, ..good }, Reason::UnknownStore),
        (Want { segment: 0, ..good }, Reason::Malformed),
        (Want { pblk: 100, ..good }, Reason::OutOfRange),
        (Want { pblk: u64::MAX, ..good }, Reason::OutOfRange),
        (Want { io_end: 50, ..good }, Reason::Aborted),
        (Want { generation: 0, ..good }, Reason::OldGeneration),
    ];
    for (want, expected) in bad {
        let done = store.write(want, blocks(9, 1)).await;
        assert_eq!(reason(done.reason), Some(expected));
        assert!(!done.message.is_empty());
    }
    let mut forged = bio(good, blocks(9, 1));
    forged.token.as_mut().unwrap().pblk += 1;
    assert_eq!(reason(store.bio(forged).await.reason), Some(Reason::ForgedToken));
    let mut cut = bio(good, blocks(9, 1));
    cut.data = cut.data.slice(1..);
    assert_eq!(reason(store.bio(cut).await.reason), Some(Reason::Malformed));
    session.assert_silent().await;
    assert_eq!(device.memory.used_blocks().unwrap(), 0);
    assert_eq!(store.describe().await.refused, 11);
    assert_eq!(reason(store.write(good, blocks(9, 1)).await.reason), None);
}

#[tokio::test]
async fn a_bio_that_does_not_match_its_checksum_is_released_as_failed() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    let mut bio = bio(Want { blocks: 2, ..Want::default() }, blocks(1, 2));
    bio.crc32c[1] ^= 1;
    let done = store.bio(bio).await;
    assert_eq!(reason(done.reason), Some(Reason::ChecksumMismatch));
    let release = session.release().await;
    assert_eq!(reason(release.reason), Some(Reason::ChecksumMismatch));
    assert!(release.crc32c.is_empty());
    assert_eq!(device.memory.used_blocks().unwrap(), 0);
}

/// Scenarios 19 and 74.
#[tokio::test]
async fn a_device_that_fails_or_is_full_is_told_and_service_resumes() {
    let device = Arc::new(MemoryDevice::new(100));
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    let faults = [
        (DeviceFault::WriteError, Reason::IoError),
        (DeviceFault::WriteNoSpace, Reason::NoSpace),
        (DeviceFault::ShortWrite(1), Reason::IoError),
    ];
    for (io_end, (fault, expected)) in (1..).zip(faults) {
        device.inject(fault);
        let done = store.write(Want { io_end, blocks: 2, ..Want::default() }, blocks(1, 2)).await;
        assert_eq!(reason(done.reason), Some(expected));
        assert_eq!(reason(session.release().await.reason), Some(expected));
    }
    let done = store.write(Want { io_end: 9, ..Want::default() }, blocks(1, 1)).await;
    assert_eq!(reason(done.reason), None);
    assert_eq!(session.release().await.reason, 0);
}

/// Scenario 75.
#[tokio::test]
async fn what_a_failed_flush_covers_is_never_released_as_durable() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    device.hold();
    device.memory.inject(DeviceFault::FlushError);
    let mut writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    // Written beside the flush that fails: it may have been part of it.
    writes.send(bio(Want { io_end: 2, pblk: 1, ..Want::default() }, blocks(2, 1))).await;
    device.wait_for(&device.writes, 2).await;
    device.open();
    for _ in 0..2 {
        assert_eq!(reason(writes.next().await.reason), Some(Reason::IoError));
        assert_eq!(reason(session.release().await.reason), Some(Reason::IoError));
    }
    writes.send(bio(Want { io_end: 3, pblk: 2, ..Want::default() }, blocks(3, 1))).await;
    assert_eq!(reason(writes.next().await.reason), None);
    device.memory.lose_power();
    assert_eq!(device.block(2), blocks(3, 1));
}

/// Scenario 37.
#[tokio::test]
async fn one_flush_serves_all_segments_written_before_it_and_idle_stores_do_not_flush() {
    let device = GatedDevice::new(100);
    let (_conversion, mut store, mut session) = ready(device.clone()).await;
    device.hold();
    let mut writes = store.writes().await;
    writes.send(bio(Want::default(), blocks(1, 1))).await;
    device.wait_for(&device.flushes_begun, 1).await;
    for io_end in 2..=33 {
        let want = Want { io_end, pblk: io_end, ..Want::default() };
        writes.send(bio(want, blocks(1, 1))).await;
    }
    device.wait_for(&device.writes, 33).await;
    device.open();
    for _ in 1..=33 {
        assert_eq!(writes.next().await.reason, 0);
        session.release().await;
    }
    assert_eq!(store.describe().await.flushes, 2);
    session.assert_silent().await;
    assert_eq!(store.describe().await.flushes, 2);
}

/// Scenario 73.
#[tokio::test]
async fn every_segment_that_was_answered_survives_a_power_cut() {
    let device = GatedDevice::new(4_096);
    let (_conversion, mut store, _session) = ready(device.clone()).await;
    let mut writes = store.writes().await;
    for io_end in 1..=200 {
        let want = Want { io_end, pblk: io_end * 2, blocks: 2, ..Want::default() };
        writes.send(bio(want, blocks(io_end as u8, 2))).await;
    }
    let mut answered = Vec::new();
    for _ in 0..100 {
        answered.push(writes.next().await);
    }
    // The power fails while the other hundred are under way.
    device.memory.lose_power();
    for done in answered {
        assert_eq!(done.reason, 0);
        let io_end = done.io_end & ((1 << IoEndId::COUNTER_BITS) - 1);
        assert_eq!(device.block(io_end * 2 + 1), blocks(io_end as u8, 1), "io_end {io_end}");
    }
}

#[tokio::test]
async fn a_segment_is_one_trace_with_its_wait_write_flush_and_release() {
    let (_conversion, mut store, mut session) = ready(GatedDevice::new(100)).await;
    let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut bio = bio(Want { io_end: 77, ..Want::default() }, blocks(1, 1));
    bio.traceparent = format!("00-{trace_id}-00f067aa0ba902b7-01");
    store.bio(bio).await;
    let release = session.release().await;
    assert!(release.traceparent.contains(trace_id), "{:?}", release.traceparent);
    session.accept(&release).await;
    session.assert_silent().await;
    let query =
        endio_chassis::recorder::SpanQuery { trace_id: trace_id.to_owned(), ..Default::default() };
    let names = within("the spans", async {
        loop {
            let spans = store.recorder.query(&query);
            if spans.len() >= 5 {
                break spans.into_iter().map(|span| span.name).collect::<Vec<_>>();
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    })
    .await;
    for name in ["segment", "wait", "write", "flush", "release"] {
        assert!(names.iter().any(|known| known == name), "{name} is not in {names:?}");
    }
}
