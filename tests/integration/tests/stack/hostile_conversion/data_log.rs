//! A writeback that sends data for the log which the log must not take, and asks for what is not its own.

use super::*;

const BLOCK: usize = 4096;
const END: u64 = SIZE / BLOCK as u64;
const NUMBER_MAX: u64 = 1 << 62;

/// A block that is full of a byte, as it stands in a message.
fn entry(lblk: u64, fill: u8) -> LoggedBlock {
    LoggedBlock {
        lblk,
        end_bytes: lblk.saturating_add(1).saturating_mul(BLOCK as u64),
        crc32c: crc32c::crc32c(&[fill; BLOCK]),
        stamp: 1,
        ..LoggedBlock::default()
    }
}

/// Data that is in order, for these blocks.
fn log(volume: &Volume, number: u64, lblks: &[u64]) -> LogData {
    LogData {
        volume: volume.id,
        generation: volume.generation,
        number,
        blocks: lblks.iter().map(|lblk| entry(*lblk, 7)).collect(),
        data: vec![7; lblks.len() * BLOCK].into(),
        ..LogData::default()
    }
}

/// The same with one block, which is told like this.
fn one(volume: &Volume, block: LoggedBlock) -> LogData {
    LogData { blocks: vec![block], ..log(volume, 100, &[0]) }
}

/// Space for data of a volume is promised from now on, in so many blocks.
async fn promise(rig: &mut Rig, volume: &Volume, add_blocks: u64) {
    let (volume, generation) = (volume.id, volume.generation);
    let reserve =
        Reserve { request: 99, volume, generation, reset: true, add_blocks, drop_blocks: 0 };
    rig.writeback.send(FromWriteback::Reserve(reserve)).await;
    let promised = rig.writeback.wait(|answer| match answer {
        Answer::Reserved(reserved) if reserved.request == 99 => Some(reserved.blocks),
        _ => None,
    });
    assert_eq!(promised.await, add_blocks);
}

/// Everything in the log of a volume.
async fn in_log(client: &mut ConversionClient<Channel>, volume: &Volume) -> Vec<LoggedBlock> {
    let (volume, generation) = (volume.id, volume.generation);
    let request = ReadLogRequest { volume, generation, lblk: 0 };
    client.read_log(request).await.unwrap().into_inner().blocks
}

async fn volume_of(rig: &mut Rig, writeback: &str, create: CreateVolumeRequest) -> Volume {
    let (name, writeback) = (create.name.clone(), writeback.to_owned());
    rig.client.create_volume(create).await.unwrap();
    let open = OpenVolumeRequest { name, writeback, ..Default::default() };
    rig.client.open_volume(open).await.unwrap().into_inner().volume.unwrap()
}

/// Volumes for which this writeback has no business with a log: written in place, open elsewhere, closed.
async fn others(rig: &mut Rig) -> [Volume; 3] {
    let create = |name: &str, in_place| {
        let name = name.to_owned();
        CreateVolumeRequest { name, size_bytes: SIZE, in_place, ..Default::default() }
    };
    let in_place = volume_of(rig, "wb-1", create("in-place", true)).await;
    let elsewhere = volume_of(rig, "wb-2", create("elsewhere", false)).await;
    let closed = volume_of(rig, "wb-1", create("closed", false)).await;
    let Volume { name, generation, id, .. } = closed.clone();
    let close = CloseVolumeRequest { name, generation, volume: id };
    rig.client.close_volume(close).await.unwrap();
    [in_place, elsewhere, closed]
}

/// What is wrong with the message itself, or with its blocks.
fn malformed(volume: &Volume) -> Vec<(&'static str, LogData, Reason)> {
    let good = |lblks: &[u64]| log(volume, 100, lblks);
    let data = |bytes: usize| LogData { data: vec![7; bytes].into(), ..good(&[0, 1]) };
    let ends = |lblk, end_bytes| one(volume, LoggedBlock { end_bytes, ..entry(lblk, 7) });
    let number = |number| LogData { number, ..good(&[0]) };
    let many: Vec<u64> = (0..1025).collect();
    let mut cases = vec![
        ("number 0", number(0)),
        ("a number beyond 2^62", number(NUMBER_MAX + 1)),
        ("the largest number", number(u64::MAX)),
        ("no blocks", good(&[])),
        ("data without blocks", LogData { blocks: vec![], ..good(&[0]) }),
        ("1025 blocks", good(&many)),
        ("blocks without data", data(0)),
        ("data of one block for two", data(BLOCK)),
        ("a byte too few", data(2 * BLOCK - 1)),
        ("a byte too many", data(2 * BLOCK + 1)),
        ("data of three blocks for two", data(3 * BLOCK)),
        ("another checksum", one(volume, entry(0, 8))),
        ("no checksum", one(volume, LoggedBlock { crc32c: 0, ..entry(0, 7) })),
        ("checksums in the wrong order", {
            let mut log = good(&[0, 1]);
            log.blocks[1] = entry(1, 9);
            log.data = [[9; BLOCK], [7; BLOCK]].concat().into();
            log
        }),
        ("a block twice", good(&[3, 3])),
        ("a block twice, apart", good(&[3, 4, 3])),
        ("blocks that do not ascend", good(&[4, 3])),
        ("blocks that go back from the largest", good(&[u64::MAX, 0])),
        ("data that ends behind its block", ends(3, 4 * BLOCK as u64 + 1)),
        ("data that ends behind the volume", ends(END - 1, SIZE + 1)),
        ("data that ends nowhere", ends(0, u64::MAX)),
    ];
    let mut late = good(&[0, 1, 2]);
    late.blocks[2].end_bytes = u64::MAX - 1;
    cases.push(("the last of three blocks ends elsewhere", late));
    cases.into_iter().map(|(what, log)| (what, log, Reason::Malformed)).collect()
}

/// What is in order for another volume, another owner, another size.
fn misplaced(volume: &Volume, others: &[Volume; 3]) -> Vec<(&'static str, LogData, Reason)> {
    let [in_place, elsewhere, closed] = others;
    let of = |id| LogData { volume: id, ..log(volume, 100, &[0]) };
    let under = |generation| LogData { generation, ..log(volume, 100, &[0]) };
    let at = |lblks: &[u64]| log(volume, 100, lblks);
    let unknown = closed.id + 1;
    vec![
        ("volume 0", of(0), Reason::UnknownVolume),
        ("a volume to come", of(unknown), Reason::UnknownVolume),
        ("the last volume of all", of(u64::MAX), Reason::UnknownVolume),
        ("the generation before", under(volume.generation - 1), Reason::OldGeneration),
        ("the next generation", under(volume.generation + 1), Reason::OldGeneration),
        ("the last generation of all", under(u64::MAX), Reason::OldGeneration),
        ("a volume that is open elsewhere", log(elsewhere, 100, &[0]), Reason::OldGeneration),
        ("a volume that is closed", log(closed, 100, &[0]), Reason::OldGeneration),
        ("a volume that is written in place", log(in_place, 100, &[0]), Reason::Malformed),
        ("a block behind the end", at(&[END]), Reason::OutOfRange),
        ("blocks on both sides of the end", at(&[END - 1, END]), Reason::OutOfRange),
        ("a block far behind the end", at(&[1 << 48]), Reason::OutOfRange),
        ("the last block of all", at(&[u64::MAX]), Reason::OutOfRange),
        ("all but the last one", at(&[u64::MAX - 1, u64::MAX]), Reason::OutOfRange),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_that_the_log_must_not_take_is_refused_with_a_reason() {
    let mut rig = rig().await;
    let volume = rig.volume.clone();
    let others = others(&mut rig).await;
    promise(&mut rig, &volume, 5).await;
    rig.writeback.try_log(log(&volume, 5, &[0, 9, END - 1])).await.unwrap();
    let before = picture(&mut rig.client).await;
    let in_log_before = in_log(&mut rig.client, &volume).await;
    assert_eq!(in_log_before.len(), 3);

    let overtaken = |number| log(&volume, number, &[0]);
    let late = [
        ("a number again", overtaken(5), Reason::WrongState),
        ("an overtaken number", overtaken(4), Reason::WrongState),
        ("the first number", overtaken(1), Reason::WrongState),
    ];
    let unpromised = [("more than was promised", log(&volume, 6, &[1, 2, 3]), Reason::NoSpace)];
    let late = late.into_iter().chain(unpromised);
    let cases = malformed(&volume).into_iter().chain(misplaced(&volume, &others)).chain(late);
    for (what, log, reason) in cases {
        match rig.writeback.try_log(log).await {
            Ok(()) => panic!("accepted: {what}"),
            Err(refused) => {
                assert_eq!(refused.reason(), reason, "{what}: {}", refused.message);
                assert!(!refused.message.is_empty(), "{what}: no message");
            }
        }
        assert_eq!(in_log(&mut rig.client, &volume).await, in_log_before, "{what}");
    }
    assert_eq!(picture(&mut rig.client).await, before);
    // Not even the numbers of what was refused count; the session goes on.
    rig.writeback.try_log(log(&volume, 6, &[1])).await.unwrap();
    rig.writeback.try_log(log(&volume, NUMBER_MAX, &[2])).await.unwrap();
    assert_eq!(in_log(&mut rig.client, &volume).await.len(), 5);
    picture(&mut rig.client).await;
}

/// More than the log has room for, in messages that are all in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writeback_that_fills_the_log_is_told_so_and_others_are_not_held_up() {
    let mut rig = rig().await;
    let volume = rig.volume.clone();
    let most = rig.conversion.config.limits.log_blocks_per_volume_max;
    promise(&mut rig, &volume, most + 1024).await;
    let mut number = 0;
    let refused = loop {
        number += 1;
        let first = (number - 1) * 1024;
        let lblks: Vec<u64> = (first..first + 1024).collect();
        match rig.writeback.try_log(log(&volume, number, &lblks)).await {
            Ok(()) => assert!(number * 1024 <= most),
            Err(refused) => break refused,
        }
    };
    assert_eq!((refused.reason(), (number - 1) * 1024), (Reason::Limit, most));
    assert!(refused.retry_after_ms > 0, "the volume is written out meanwhile");
    let before = picture(&mut rig.client).await;
    let again = rig.writeback.try_log(log(&volume, number, &[END - 1])).await.unwrap_err();
    assert_eq!(again.reason(), Reason::Limit);
    assert_eq!(picture(&mut rig.client).await, before);
    let create = CreateVolumeRequest { name: "v2".into(), size_bytes: SIZE, ..Default::default() };
    let other = volume_of(&mut rig, "wb-1", create).await;
    let unpromised = rig.writeback.try_log(log(&other, 1, &[0])).await.unwrap_err();
    assert_eq!(unpromised.reason(), Reason::NoSpace);
    promise(&mut rig, &other, 1).await;
    rig.writeback.try_log(log(&other, 1, &[0])).await.unwrap();
    assert_eq!(in_log(&mut rig.client, &other).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_for_the_log_before_hello_ends_the_session_with_a_reason() {
    let mut rig = rig().await;
    let before = picture(&mut rig.client).await;
    let url = rig.conversion.url.clone();
    let early = || Some(FromWriteback::Log(log(&rig.volume, 1, &[0])));
    for messages in [vec![early()], vec![early(), hello("late")]] {
        let status = writeback_session(&url, messages).await.expect("it does not end well");
        assert_eq!(explained("log before hello", &status), Reason::WrongState);
    }
    // Of somebody whose volume it is not.
    let mut stranger = RawWriteback::connect(&url, "wb-2").await;
    let refused = stranger.try_log(log(&rig.volume, 1, &[0])).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::OldGeneration);
    assert_eq!(picture(&mut rig.client).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_for_a_log_that_is_not_its_own_is_refused_with_a_reason() {
    let mut rig = rig().await;
    let volume = rig.volume.clone();
    let [in_place, elsewhere, closed] = others(&mut rig).await;
    promise(&mut rig, &volume, 2).await;
    rig.writeback.try_log(log(&volume, 1, &[0, END - 1])).await.unwrap();
    let before = picture(&mut rig.client).await;
    let ask = |volume, generation, lblk| ReadLogRequest { volume, generation, lblk };
    let (id, generation) = (volume.id, volume.generation);
    let too_far = (1_u64 << 48) + 1;
    let asks = [
        (ask(0, generation, 0), Reason::UnknownVolume),
        (ask(closed.id + 1, generation, 0), Reason::UnknownVolume),
        (ask(u64::MAX, generation, 0), Reason::UnknownVolume),
        (ask(id, 0, 0), Reason::OldGeneration),
        (ask(id, generation - 1, 0), Reason::OldGeneration),
        (ask(id, generation + 1, 0), Reason::OldGeneration),
        (ask(id, u64::MAX, 0), Reason::OldGeneration),
        (ask(elsewhere.id, elsewhere.generation + 1, 0), Reason::OldGeneration),
        (ask(closed.id, closed.generation, 0), Reason::OldGeneration),
        (ask(closed.id, closed.generation, u64::MAX), Reason::OldGeneration),
        (ask(id, generation, too_far), Reason::OutOfRange),
        (ask(id, generation, u64::MAX), Reason::OutOfRange),
    ];
    for (ask, reason) in asks {
        assert_eq!(refused(&format!("{ask:?}"), rig.client.read_log(ask).await), reason);
    }
    // Whoever has read the last block asks for what is behind it: nothing.
    let empty = [
        ask(id, generation, END),
        ask(id, generation, too_far - 1),
        ask(in_place.id, in_place.generation, 0),
    ];
    for ask in empty {
        let answer = rig.client.read_log(ask).await.unwrap().into_inner();
        assert_eq!(answer.blocks, Vec::new(), "{ask:?}");
    }
    let last = rig.client.read_log(ask(id, generation, 1)).await.unwrap().into_inner();
    assert_eq!(last.blocks.iter().map(|block| block.lblk).collect::<Vec<_>>(), [END - 1]);
    assert_eq!(picture(&mut rig.client).await, before);
}
