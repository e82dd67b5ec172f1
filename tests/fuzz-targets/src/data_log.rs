//! Target of the data log: messages to it, what lies on disk of it, and what its reader is told.

use std::collections::BTreeMap;

use bytes::Bytes;
use endio_state_machine::data_log::{DataLogs, LogEntry};
use endio_state_machine::machine::LogData;
use endio_state_machine::record::{LogDone, Record};
use endio_state_machine::writeback::log_reader::{LogReader, ReadBlock};
use endio_types::{
    BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk, LblkRange, VOLUME_BYTES_MAX, VolumeId,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::input::Input;

/// Volumes that occur.
const VOLUMES: u64 = 3;
/// The generation of whoever reads.
const READER: Generation = Generation(9);

/// Number and first byte of each block of a volume, kept the simple way.
type Model = BTreeMap<(VolumeId, u64), (u64, u8)>;

/// Any bytes as logs and as records; then a history of messages, ends and cuts as the bytes say, against
/// a plain map. What a message may carry, the next owner of the volume takes, also from disk.
pub(crate) fn data_log(bytes: &[u8]) {
    decoded::<DataLogs>(bytes);
    decoded::<Record>(bytes);
    let (mut logs, mut model) = (DataLogs::default(), Model::new());
    let mut input = Input(bytes);
    while !input.is_over() {
        let volume = VolumeId(u64::from(input.u8()) % VOLUMES);
        match input.u8() % 4 {
            0 => forget(&mut logs, &mut model, volume, &mut input),
            1 => cut(&mut logs, &mut model, volume, &mut input),
            _ => put(&mut logs, &mut model, volume, &mut input),
        }
        agree(&logs, &model);
    }
    kept(&logs);
    for id in 0..VOLUMES {
        read(&logs, VolumeId(id));
    }
}

/// What can be decoded is encoded to what decodes alike.
fn decoded<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(found) = postcard::from_bytes::<T>(bytes) {
        kept(&found);
    }
}

fn kept<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(value: &T) {
    let bytes = postcard::to_stdvec(value).expect("it can be encoded");
    assert_eq!(postcard::from_bytes::<T>(&bytes).as_ref(), Ok(value));
    for cut in [0, bytes.len() / 2, bytes.len() - 1] {
        assert!(
            postcard::from_bytes::<T>(&bytes[..cut]).is_err(),
            "cut at {cut} of {}",
            bytes.len()
        );
    }
}

/// Mostly a small number; now and then one at the far end.
fn number(input: &mut Input<'_>) -> u64 {
    let near = u64::from(input.u8());
    match input.u8() {
        0..=239 => near % 24,
        240..=246 => VOLUME_BYTES_MAX / BLOCK_BYTES - near % 3,
        247..=250 => (1 << 62) - 1 + near % 3,
        _ => u64::MAX - near % 3,
    }
}

/// A message as the bytes say; half of them with checksums that match.
fn message(volume: VolumeId, input: &mut Input<'_>) -> LogData {
    let (blocks, how) = (usize::from(input.u8() % 6), input.u8());
    let number_of_message = number(input);
    let mut data = Vec::new();
    let mut entries: Vec<LogEntry> = Vec::new();
    for _ in 0..blocks {
        let lblk = match entries.last() {
            Some(last) if how % 8 < 6 => last.lblk.0.saturating_add(1 + number(input) % 5),
            _ => number(input),
        };
        let fill = input.u8();
        let block = [fill; BLOCK_SIZE];
        let end = lblk.saturating_add(1).saturating_mul(BLOCK_BYTES);
        let end_bytes = match input.u8() % 16 {
            0 => number(input).saturating_mul(BLOCK_BYTES),
            1 => end.saturating_add(1),
            less => end.saturating_sub(u64::from(less)),
        };
        let crc = match how & 0x40 {
            0 => crc32c::crc32c(&block),
            _ => input.u32(),
        };
        entries.push(LogEntry { lblk: Lblk(lblk), end_bytes, crc, stamp: u64::from(how) });
        data.extend(block);
    }
    if how & 0x80 != 0 {
        let length = data.len() + usize::from(input.u8());
        data.resize(length.saturating_sub(usize::from(input.u8())), 0);
    }
    let generation = Generation(1 + u64::from(how) % READER.0);
    let (request, number) = (u64::from(how), number_of_message);
    LogData { request, volume, generation, number, entries, data: data.into() }
}

fn put(logs: &mut DataLogs, model: &mut Model, volume: VolumeId, input: &mut Input<'_>) {
    let log = message(volume, input);
    let fault = log.fault();
    let LogData { generation, number, entries, data, .. } = log;
    if fault.is_some() {
        // Whatever is on disk: an error, or one block of data for each entry.
        let fits = data.len() == entries.len() * BLOCK_SIZE;
        let put = logs.clone().put(volume, (generation, number), &entries, &data);
        assert_eq!(put.is_ok(), fits);
        return;
    }
    assert!((1..=1 << 62).contains(&number) && (1..=1024).contains(&entries.len()));
    assert!(entries.is_sorted_by(|one, next| one.lblk < next.lblk), "{entries:?}");
    for (entry, block) in entries.iter().zip(data.chunks_exact(BLOCK_SIZE)) {
        model.insert((volume, entry.lblk.0), (number, block[0]));
    }
    let record = Record::Log { volume, generation, number, entries, data };
    kept(&record);
    let Record::Log { entries, data, .. } = record else { return };
    logs.put(volume, (generation, number), &entries, &data).expect("a message without a fault");
}

fn range(input: &mut Input<'_>) -> LblkRange {
    let start = number(input);
    LblkRange::new(start, number(input).min(u64::MAX - start))
}

fn forget(logs: &mut DataLogs, model: &mut Model, volume: VolumeId, input: &mut Input<'_>) {
    let (range, up_to) = (range(input), number(input));
    let is_meant = |of: VolumeId, lblk: u64, number: u64| {
        of == volume && range.start.0 <= lblk && lblk < range.end() && number <= up_to
    };
    let has = model.iter().any(|((of, lblk), (number, _))| is_meant(*of, *lblk, *number));
    assert_eq!(logs.has(volume, range, up_to), has);
    let done = vec![LogDone { volume, range, up_to }];
    kept(&Record::ConvertLogged { volumes: Vec::new(), done });
    logs.forget(volume, range, up_to);
    model.retain(|(of, lblk), (number, _)| !is_meant(*of, *lblk, *number));
    assert!(!logs.has(volume, range, up_to));
}

fn cut(logs: &mut DataLogs, model: &mut Model, volume: VolumeId, input: &mut Input<'_>) {
    let size = number(input).saturating_mul(BLOCK_BYTES).saturating_add(number(input));
    logs.cut(volume, size);
    model.retain(|(of, lblk), _| *of != volume || *lblk < size.div_ceil(BLOCK_BYTES));
    assert!(!logs.reaches_behind(volume, size));
}

fn agree(logs: &DataLogs, model: &Model) {
    let found = logs.iter().map(|(volume, Lblk(lblk), logged)| {
        assert_eq!(logged.data.len(), BLOCK_SIZE);
        ((volume, lblk), (logged.number, logged.data[0]))
    });
    assert_eq!(found.collect::<Model>(), *model);
    assert_eq!((logs.blocks(), logs.is_empty()), (model.len() as u64, model.is_empty()));
}

/// Whoever opens the volume next takes all that conversion takes, in answers of any length.
fn read(logs: &DataLogs, volume: VolumeId) {
    let end = VOLUME_BYTES_MAX / BLOCK_BYTES;
    let mut reader = LogReader::new(READER, VOLUME_BYTES_MAX);
    let mut blocks = 0;
    while let Some(from) = reader.next() {
        // Conversion itself takes none behind the end.
        let inside = logs.from(volume, from).take_while(|(lblk, _)| lblk.0 < end);
        let answer: Vec<_> = inside.take(2).collect();
        if answer.is_empty() {
            break;
        }
        for (lblk, logged) in answer {
            let (end_bytes, crc, generation) = (logged.end_bytes, logged.crc, logged.generation);
            let block = ReadBlock { lblk, end_bytes, crc, generation, data: &logged.data };
            reader.take(block).expect("the next owner takes what the log took");
            blocks += 1;
        }
    }
    let inside = logs.from(volume, Lblk(0)).filter(|(lblk, _)| lblk.0 < end);
    assert_eq!(blocks, inside.count());
}

/// Answers of a conversion that says anything.
pub(crate) fn log_answers(bytes: &[u8]) {
    let mut input = Input(bytes);
    let size = number(&mut input).saturating_mul(BLOCK_BYTES).saturating_add(number(&mut input));
    let mut reader = LogReader::new(READER, size);
    let mut last = None;
    while !input.is_over() {
        let lblk = number(&mut input);
        let how = input.u8();
        let data = Bytes::from(vec![how; if how % 8 == 0 { usize::from(how) } else { BLOCK_SIZE }]);
        let end_bytes = match how % 4 {
            0 => number(&mut input),
            _ => lblk.saturating_mul(BLOCK_BYTES).saturating_add(1),
        };
        let crc = if how % 16 == 1 { input.u32() } else { crc32c::crc32c(&data) };
        let generation = Generation(number(&mut input));
        let before = reader.next();
        let block = ReadBlock { lblk: Lblk(lblk), end_bytes, crc, generation, data: &data };
        if reader.take(block).is_err() {
            assert_eq!(reader.next(), before);
            continue;
        }
        assert!(last.is_none_or(|last| last < lblk), "{lblk} comes behind {last:?}");
        assert!(lblk < size.div_ceil(BLOCK_BYTES) && end_bytes <= size && generation <= READER);
        assert!(data.len() == BLOCK_SIZE && crc == crc32c::crc32c(&data));
        assert!(reader.next().is_none_or(|next| next.0 == lblk + 1));
        last = Some(lblk);
    }
}
