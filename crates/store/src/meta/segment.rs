//! Journal segments as bytes, and what a segment found on disk says.
//!
//! ```text
//! segment:  magic 8 │ version u32 │ database u64 │ first sequence u64 │ crc32c u32 │ records
//! record:   length u32 │ crc32c u32 │ sequence u64 │ durable before u64 │ epoch u64 │ payload
//! ```
//!
//! *Durable before* is the last record that was durable when this one was written. It tells a torn
//! tail from damage: if a record is bad and a later one says that the bad one had been durable,
//! the disk lost something it had promised. If no later record says so, the bad one belongs to
//! the last group, whose `fdatasync` never returned, and may go.

use bytes::Bytes;

use super::api::Record;

pub(crate) const SEGMENT_HEADER: usize = 32;
pub(crate) const RECORD_HEADER: usize = 32;
/// Longest payload of one record, in bytes. A length beyond it is not even looked at.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;
const MAGIC: &[u8; 8] = b"ENDIOJNL";
const VERSION: u32 = 1;

pub(crate) fn segment_name(first: u64) -> String {
    format!("journal-{first:020}.log")
}

/// The first sequence number of a segment, from its name.
pub(crate) fn segment_first(name: &str) -> Option<u64> {
    name.strip_prefix("journal-")?.strip_suffix(".log")?.parse().ok()
}

pub(crate) fn segment_header(database: u64, first: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(SEGMENT_HEADER);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&database.to_le_bytes());
    header.extend_from_slice(&first.to_le_bytes());
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    header
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Appends one record to `out`.
pub(crate) fn put_record(out: &mut Vec<u8>, seq: u64, durable: u64, epoch: u64, payload: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&seq.to_le_bytes());
    out.extend_from_slice(&durable.to_le_bytes());
    out.extend_from_slice(&epoch.to_le_bytes());
    out.extend_from_slice(payload);
    let crc = record_crc(&out[start..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// Over the length and everything after the checksum.
fn record_crc(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[..4]), &record[8..])
}

struct Parsed {
    record: Record,
    durable_before: u64,
    len: usize,
}

fn parse_record(bytes: &Bytes, at: usize) -> Option<Parsed> {
    let len = u32_at(bytes, at)? as usize;
    if len > PAYLOAD_BYTES_MAX {
        return None;
    }
    let end = at + RECORD_HEADER + len;
    let raw = bytes.get(at..end)?;
    if record_crc(raw) != u32_at(raw, 4)? {
        return None;
    }
    let record = Record {
        seq: u64_at(raw, 8)?,
        epoch: u64_at(raw, 24)?,
        payload: bytes.slice(at + RECORD_HEADER..end),
    };
    Some(Parsed { record, durable_before: u64_at(raw, 16)?, len: RECORD_HEADER + len })
}

/// What a segment holds.
#[derive(Debug)]
pub(crate) struct Scan {
    /// The good records from the start.
    pub(crate) records: Vec<Record>,
    /// Where they end, in bytes.
    pub(crate) good_len: u64,
    /// What follows them.
    pub(crate) tail: Tail,
}

/// How a segment ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Tail {
    /// With its last record; zeroes may follow, of the file that was lengthened ahead.
    Clean,
    /// In the middle of a group that was never durable.
    Torn,
    /// In something that was durable and is not any more.
    Damaged(String),
}

/// Reads the segment that begins with record `first`; `epoch` is that of the record before it.
pub(crate) fn scan(bytes: &Bytes, database: u64, first: u64, epoch: u64) -> Scan {
    let mut scan = Scan { records: Vec::new(), good_len: 0, tail: Tail::Clean };
    if bytes.get(..SEGMENT_HEADER) != Some(&segment_header(database, first)[..]) {
        if let Some(version) = other_version(bytes.get(..SEGMENT_HEADER), VERSION) {
            scan.tail = Tail::Damaged(version_fault(version));
            return scan;
        }
        // Records are written only behind a header that is durable.
        scan.tail = if bytes.len() <= SEGMENT_HEADER {
            Tail::Torn
        } else {
            Tail::Damaged(header_fault(bytes, database))
        };
        return scan;
    }
    let mut at = SEGMENT_HEADER;
    let (mut expected, mut epoch) = (first, epoch);
    while at < bytes.len() {
        let good = parse_record(bytes, at).filter(|parsed| parsed.record.seq == expected);
        let Some(parsed) = good else {
            // Of a record that is gone altogether nothing is seen here: who knows how far the journal
            // was durable compares its end.
            let is_unused = bytes[at..].iter().all(|byte| *byte == 0);
            scan.tail = if is_unused { Tail::Clean } else { tail(bytes, at, expected) };
            break;
        };
        if parsed.record.epoch < epoch {
            scan.tail = Tail::Damaged(format!("record {expected} is of an older epoch"));
            break;
        }
        epoch = parsed.record.epoch;
        expected += 1;
        at += parsed.len;
        scan.records.push(parsed.record);
    }
    scan.good_len = at as u64;
    scan
}

/// The version of a header that is whole, but not of version `known`. All headers of this directory
/// begin with a magic and a version, and end with a checksum of themselves.
pub(crate) fn other_version(header: Option<&[u8]>, known: u32) -> Option<u32> {
    let (fields, crc) = header?.split_last_chunk::<4>()?;
    let version = u32_at(fields, 8).filter(|version| *version != known)?;
    (u32::from_le_bytes(*crc) == crc32c::crc32c(fields)).then_some(version)
}

/// What is said about it.
pub(crate) fn version_fault(version: u32) -> String {
    format!(
        "it has format version {version}, which this program does not know: start the version \
         that wrote it, or a later one"
    )
}

fn header_fault(bytes: &[u8], database: u64) -> String {
    if u64_at(bytes, 12).is_some_and(|found| found != database) && bytes.starts_with(MAGIC) {
        return "the segment header is damaged or belongs to another database".into();
    }
    "the segment header is damaged".into()
}

/// Looks behind a bad record for one that proves that the bad one had been durable. Records are
/// not aligned, so every offset is tried; the sequence number rules out nearly all of them before
/// a checksum is computed.
fn tail(bytes: &Bytes, bad: usize, expected: u64) -> Tail {
    let most = expected.saturating_add((bytes.len() / RECORD_HEADER) as u64);
    for at in bad..bytes.len().saturating_sub(RECORD_HEADER - 1) {
        let plausible = u64_at(bytes, at + 8).is_some_and(|seq| (expected..=most).contains(&seq));
        if !plausible {
            continue;
        }
        let Some(later) = parse_record(bytes, at) else { continue };
        if later.durable_before >= expected {
            let seq = later.record.seq;
            return Tail::Damaged(format!(
                "record {expected} is unreadable although record {seq} behind it proves that it \
                 was durable"
            ));
        }
    }
    Tail::Torn
}
