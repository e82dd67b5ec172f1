//! Targets of what lies on disk: chunks of the map, superblocks, segments of the cache log.

use std::cell::RefCell;
use std::fs;

use endio_state_machine::chunk::{Chunk, ChunkId};
use endio_store::block::OpenBlockFile;
use endio_store::cache_log::{CacheLog, CacheLogError, CacheLogOptions, WriteRecord};
use endio_types::{BLOCK_SIZE, Generation, LblkRange, VolumeId};

use crate::input::{Input, damage};

/// A chunk of these bytes behind a good checksum: refused, or encoded to what decodes alike.
pub(crate) fn chunk(bytes: &[u8]) {
    let id = ChunkId { volume: VolumeId(3), index: 5 };
    let _ = Chunk::decode(id, bytes);
    let mut key = [0; 16];
    key[..8].copy_from_slice(&id.volume.0.to_le_bytes());
    key[8..].copy_from_slice(&id.index.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&key), bytes);
    let sealed = [&[1][..], &crc.to_le_bytes(), bytes].concat();
    if let Ok(chunk) = Chunk::decode(id, &sealed) {
        let again = Chunk::decode(id, &chunk.encode(id)).expect("what was encoded is decoded");
        assert_eq!(again, chunk);
    }
}

const SLOT_BYTES: usize = 4096;
const FIELDS_BYTES: usize = 52;

/// Two slots with these fields, each behind a good checksum or not: opened with an incarnation that
/// is newer than both, or refused.
pub(crate) fn superblock(bytes: &[u8]) {
    thread_local!(static DIR: tempfile::TempDir = scratch());
    DIR.with(|dir| {
        let dir = dir.path().join("store");
        let _ = fs::remove_dir_all(&dir);
        let make = |capacity_blocks| OpenBlockFile {
            dir: dir.clone(),
            capacity_blocks,
            new_uuid: [5; 16],
            direct_write_bytes_min: None,
        };
        let first = make(Some(4)).open().expect("a new store");
        let made = first.superblock().incarnation;
        drop(first);
        let path = dir.join("superblock");
        let mut file = fs::read(&path).unwrap();
        let mut input = Input(bytes);
        while !input.is_over() {
            let slot = usize::from(input.u8() % 2) * SLOT_BYTES;
            let is_sealed = input.u8() % 4 != 0;
            damage(&mut file, &mut input);
            let Some(fields) = file.get(slot..slot + FIELDS_BYTES + 4) else { continue };
            if is_sealed {
                let crc = crc32c::crc32c(&fields[..FIELDS_BYTES]);
                let at = slot + FIELDS_BYTES;
                file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            }
        }
        let is_as_it_was = file == fs::read(&path).unwrap();
        fs::write(&path, &file).unwrap();
        match make(None).open() {
            Ok(opened) => {
                let now = opened.superblock().incarnation;
                drop(opened);
                let next = make(None).open().expect("what was opened is opened again");
                assert!(next.superblock().incarnation > now);
                assert!(!is_as_it_was || now > made);
            }
            Err(error) => {
                assert!(!is_as_it_was, "{error}");
                assert!(!error.to_string().is_empty());
            }
        }
    });
}

/// A directory in memory where there is one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

const LOG_HEADER: usize = 104;

/// Offsets of the records of a segment, by its own lengths.
fn records(segment: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(header) = segment.get(at..at + LOG_HEADER) {
        found.push(at);
        let length = &header[LOG_HEADER - 16..LOG_HEADER - 12];
        at += LOG_HEADER + u32::from_le_bytes(length.try_into().unwrap()) as usize;
    }
    found
}

/// Seals the header of the record that begins there, and its payload.
fn seal(segment: &mut [u8], at: usize) {
    let Some(record) = segment.get_mut(at..) else { return };
    if record.len() < LOG_HEADER {
        return;
    }
    let length = record[LOG_HEADER - 16..LOG_HEADER - 12].try_into().unwrap();
    let end = LOG_HEADER.saturating_add(u32::from_le_bytes(length) as usize);
    if let Some(payload) = record.get(LOG_HEADER..end) {
        let crc = crc32c::crc32c(payload).to_le_bytes();
        record[LOG_HEADER - 12..LOG_HEADER - 8].copy_from_slice(&crc);
    }
    let crc = crc32c::crc32c(&record[..LOG_HEADER - 4]).to_le_bytes();
    record[LOG_HEADER - 4..LOG_HEADER].copy_from_slice(&crc);
}

fn small() -> CacheLogOptions {
    CacheLogOptions { segment_bytes: 64 << 10, max_bytes: 1 << 20, sessions_max: 16 }
}

/// A log of some records whose segments were changed, with good checksums or not: opened and
/// replayed, or refused with a reason.
pub(crate) fn cache_log(bytes: &[u8]) {
    type Whole = (tempfile::TempDir, Vec<(String, Vec<u8>)>);
    thread_local!(static WHOLE: RefCell<Option<Whole>> = const { RefCell::new(None) });
    WHOLE.with_borrow_mut(|whole| {
        let (dir, files) = whole.get_or_insert_with(|| {
            let dir = scratch();
            let files = grown(dir.path()).expect("a log that was written a moment ago");
            (dir, files)
        });
        let path = dir.path().join("damaged");
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        let mut files = files.clone();
        let mut input = Input(bytes);
        while !input.is_over() {
            let number = usize::from(input.u8()) % files.len();
            let which = usize::from(input.u8());
            let file = &mut files[number].1;
            let starts = records(file);
            damage(file, &mut input);
            if which % 4 != 0 && !starts.is_empty() {
                seal(file, starts[which / 4 % starts.len()]);
            }
        }
        for (name, file) in &files {
            fs::write(path.join(name), file).unwrap();
        }
        if let Ok((log, mut replay)) = CacheLog::open(&path, small()) {
            // Records are bounded by the bytes that are there.
            for _ in 0..10_000 {
                match replay.next_write() {
                    Ok(Some(write)) => {
                        for range in &write.live {
                            assert!(write.data(*range).is_some(), "live data is there");
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return assert!(!error.to_string().is_empty()),
                }
            }
            drop(log);
        }
    });
}

fn grown(dir: &std::path::Path) -> Result<Vec<(String, Vec<u8>)>, CacheLogError> {
    let log_dir = dir.join("whole");
    fs::create_dir(&log_dir).unwrap();
    let (log, _) = CacheLog::open(&log_dir, small())?;
    for volume in [1, 2] {
        log.append_volume_open(VolumeId(volume), "disk", Generation(1))?;
    }
    for at in 0..12 {
        let record = WriteRecord {
            volume: VolumeId(1 + at % 2),
            generation: Generation(1),
            blocks: LblkRange::new(at, 1 + at % 2),
            end_bytes: (at + 1) * BLOCK_SIZE as u64,
            request: None,
            result: 0,
        };
        let data = vec![at as u8; (1 + at as usize % 2) * BLOCK_SIZE];
        log.append_write(&record, &[&data])?;
    }
    log.append_volume_closed(VolumeId(2))?;
    log.sync_to(log.last_lsn())?;
    drop(log);
    let mut files = Vec::new();
    for entry in fs::read_dir(&log_dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        files.push((name, fs::read(&path).unwrap()));
    }
    files.sort();
    Ok(files)
}
