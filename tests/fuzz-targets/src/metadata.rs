//! Targets of conversion's metadata: journal and checkpoints over a disk in memory.

use std::sync::OnceLock;

use endio_state_machine::record::{Record, Snapshot};
use endio_store::meta::{MemoryMeta, MetaOptions, MetaStore as _, Vfs as _};

use crate::input::{Input, damage};

const SEGMENT_HEADER: usize = 32;
const RECORD_HEADER: usize = 32;

/// A directory with some records and a checkpoint.
fn whole() -> MemoryMeta {
    static WHOLE: OnceLock<MemoryMeta> = OnceLock::new();
    WHOLE.get_or_init(grown).copy()
}

fn grown() -> MemoryMeta {
    let options = MetaOptions { segment_bytes: 4096, ballast_bytes: 0, ..MetaOptions::default() };
    let meta = MemoryMeta::with_options(options);
    let mut opened = meta.open().expect("an empty directory");
    for seq in 1..=40 {
        opened.journal.append(seq, 1, &[seq as u8; 100]).expect("a record");
        let durable = opened.journal.commit().expect("a commit");
        if seq == 20 {
            opened.journal.rotate().expect("a new segment");
            opened.checkpointer.begin(seq, b"snapshot").expect("a checkpoint");
            while !opened
                .checkpointer
                .write_chunks(&mut *opened.table, 16)
                .expect("chunks of the checkpoint")
            {}
            opened.checkpointer.finish(durable).expect("the end of a checkpoint");
        }
    }
    drop(opened);
    meta
}

fn read(meta: &MemoryMeta, name: &str) -> Vec<u8> {
    let length = meta.disk().len(name).unwrap();
    meta.disk().read(name, 0, length as usize).unwrap()
}

fn write(meta: &MemoryMeta, name: &str, bytes: &[u8]) {
    let mut file = meta.disk().create(name).unwrap();
    let mut left = bytes;
    while !left.is_empty() {
        let taken = file.append(left).unwrap();
        left = &left[taken..];
    }
    file.sync_data().unwrap();
    meta.disk().sync_dir().unwrap();
}

/// Opens what was damaged and reads everything; an error says which file.
fn open(meta: &MemoryMeta) {
    match meta.open() {
        Ok(opened) => {
            if let Some((_, snapshot)) = &opened.snapshot {
                let _ = postcard::from_bytes::<Snapshot>(snapshot);
            }
            let mut last = None;
            for record in opened.records {
                let Ok(record) = record else { return };
                assert!(last.is_none_or(|last| record.seq == last + 1), "records have no gaps");
                last = Some(record.seq);
                let _ = postcard::from_bytes::<Record>(&record.payload);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Records of a segment with these fields and payloads, behind good checksums or not.
pub(crate) fn journal(bytes: &[u8]) {
    let _ = postcard::from_bytes::<Record>(bytes);
    let _ = postcard::from_bytes::<Snapshot>(bytes);
    let meta = whole();
    let mut names = meta.disk().list().unwrap();
    names.retain(|name| name.starts_with("journal-"));
    let mut input = Input(bytes);
    let name = &names[usize::from(input.u8()) % names.len()];
    let mut file = read(&meta, name);
    while !input.is_over() {
        let which = usize::from(input.u8());
        damage(&mut file, &mut input);
        if file.len() < SEGMENT_HEADER || which % 4 == 0 {
            continue;
        }
        let crc = crc32c::crc32c(&file[..SEGMENT_HEADER - 4]).to_le_bytes();
        file[SEGMENT_HEADER - 4..SEGMENT_HEADER].copy_from_slice(&crc);
        let mut at = SEGMENT_HEADER;
        while let Some(length) = file.get(at..at + 4) {
            let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
            let end = at.saturating_add(RECORD_HEADER).saturating_add(length);
            let Some(record) = file.get(at..end) else { break };
            let crc = crc32c::crc32c_append(crc32c::crc32c(&record[..4]), &record[8..]);
            file[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
            at = end;
        }
    }
    write(&meta, name, &file);
    open(&meta);
}

/// Any file of the directory changed: checkpoints, marks, the canary.
pub(crate) fn checkpoint(bytes: &[u8]) {
    let meta = whole();
    let names = meta.disk().list().unwrap();
    let mut input = Input(bytes);
    while !input.is_over() {
        let name = &names[usize::from(input.u8()) % names.len()];
        let mut file = read(&meta, name);
        let is_sealed = input.u8() % 2 == 0;
        damage(&mut file, &mut input);
        if is_sealed && file.len() > 4 {
            let end = file.len() - 4;
            let crc = crc32c::crc32c(&file[..end]).to_le_bytes();
            file[end..].copy_from_slice(&crc);
        }
        write(&meta, name, &file);
    }
    open(&meta);
}
