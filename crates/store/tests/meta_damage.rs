//! Flipped bits, torn tails and missing files: recovered without loss, or refused by name, and
//! never silently different.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use endio_store::meta::{DiskMeta, MemoryMeta, MetaError, MetaOptions, Vfs};
use support::{Oracle, Random, Service, payload};

fn options() -> MetaOptions {
    MetaOptions {
        segment_bytes: 4096,
        chunk_cache_bytes: 64 << 10,
        sled_cache_bytes: 1 << 20,
        ballast_bytes: 0,
        ..MetaOptions::default()
    }
}

/// A service with two checkpoints and several segments.
fn grown(meta: &dyn endio_store::meta::MetaStore, oracle: &mut Oracle) -> Service {
    let mut service = Service::open(meta).unwrap();
    let random = &mut Random::new(5);
    for round in 0..60 {
        let payload = payload(random, service.seq + 1);
        service.append(oracle, payload).unwrap();
        service.commit(oracle).unwrap();
        if round == 20 || round == 40 {
            service.checkpoint(oracle).unwrap();
        }
    }
    service
}

/// The open after damage must either find everything or refuse and name a file.
fn check_open(meta: &dyn endio_store::meta::MetaStore, oracle: &Oracle, what: &str) -> bool {
    match Service::open(meta) {
        Ok(mut service) => {
            let all = oracle.committed as u64;
            assert_eq!(service.seq, all, "{what}: committed records were dropped silently");
            oracle.clone().check(&mut service, what);
            true
        }
        Err(MetaError::Damaged { file, .. }) => {
            assert!(file.file_name().is_some(), "{what}");
            false
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

#[test]
fn a_flipped_bit_in_any_file_is_harmless_or_refused() {
    let mut flips = 0;
    let mut refused = 0;
    for clean in [false, true] {
        let whole = MemoryMeta::with_options(options());
        let mut oracle = Oracle::default();
        let service = grown(&whole, &mut oracle);
        if clean {
            service.close(&mut oracle).unwrap();
        } else {
            drop(service);
        }
        let random = &mut Random::new(17);
        for name in whole.disk().list().unwrap() {
            let bits = whole.disk().len(&name).unwrap() * 8;
            for _ in 0..if bits == 0 { 0 } else { 80 } {
                let bit = random.below(bits);
                let meta = whole.copy();
                meta.disk().flip(&name, bit);
                let what = format!("bit {bit} of {name}, clean {clean}");
                refused += u32::from(!check_open(&meta, &oracle, &what));
                flips += 1;
            }
        }
    }
    assert!(flips >= 1000, "only {flips} bits were flipped");
    assert!(refused >= 100, "only {refused} of {flips} refused");
}

#[test]
fn a_removed_or_shortened_file_is_harmless_or_refused() {
    let whole = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    drop(grown(&whole, &mut oracle));
    let random = &mut Random::new(23);
    for name in whole.disk().list().unwrap() {
        let meta = whole.copy();
        meta.disk().remove(&name).unwrap();
        if name != "mark" {
            check_open(&meta, &oracle, &format!("without {name}"));
        }
        let len = whole.disk().len(&name).unwrap();
        for _ in 0..20 {
            let cut = random.below(len.max(1));
            let meta = whole.copy();
            meta.disk().truncate(&name, cut).unwrap();
            check_open(&meta, &oracle, &format!("{name} cut to {cut} of {len} bytes"));
        }
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push(path);
        }
    }
    all.sort();
    all
}

fn flip(path: &Path, bit: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    fs::write(path, bytes).unwrap();
}

struct CleanDisk {
    dir: tempfile::TempDir,
    oracle: Oracle,
}

impl CleanDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut oracle = Oracle::default();
        let meta = DiskMeta::new(dir.path().join("clean"), options());
        grown(&meta, &mut oracle).close(&mut oracle).unwrap();
        Self { dir, oracle }
    }

    fn copy(&self) -> (PathBuf, DiskMeta) {
        let copy = self.dir.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        copy_dir(&self.dir.path().join("clean"), &copy);
        (copy.clone(), DiskMeta::new(copy, options()))
    }

    fn check(&self, meta: &DiskMeta, what: &str) -> Option<String> {
        let mut service = Service::open(meta).unwrap();
        self.oracle.clone().check(&mut service, what);
        service.rebuilt
    }
}

#[test]
fn a_flipped_bit_in_any_file_of_sled_rebuilds_the_table() {
    let clean = CleanDisk::new();
    let (copy, meta) = clean.copy();
    assert_eq!(clean.check(&meta, "untouched"), None);
    let random = &mut Random::new(3);
    let sled = clean.dir.path().join("clean").join("sled");
    for n in 0..100 {
        let all: Vec<PathBuf> =
            files(&sled).into_iter().filter(|path| path.metadata().unwrap().len() > 0).collect();
        let file = &all[random.below(all.len() as u64) as usize];
        let bit = random.below(file.metadata().unwrap().len() * 8);
        let (_, meta) = clean.copy();
        flip(&copy.join("sled").join(file.strip_prefix(&sled).unwrap()), bit);
        let reason = clean.check(&meta, &format!("flip {n}: bit {bit} of {}", file.display()));
        assert!(reason.is_some(), "flip {n}: a changed file was believed");
    }
}

#[test]
fn an_empty_missing_or_garbage_sled_rebuilds_the_table() {
    let clean = CleanDisk::new();
    type Spoil = fn(&Path);
    let spoil: [(&str, Spoil); 5] = [
        ("missing", |sled| fs::remove_dir_all(sled).unwrap()),
        ("empty", |sled| {
            fs::remove_dir_all(sled).unwrap();
            fs::create_dir(sled).unwrap();
        }),
        ("a file", |sled| {
            fs::remove_dir_all(sled).unwrap();
            fs::write(sled, b"garbage").unwrap();
        }),
        ("garbage", |sled| {
            for file in files(sled) {
                fs::write(file, b"garbage in every file").unwrap();
            }
        }),
        ("without its log", |sled| fs::write(sled.join("db"), b"").unwrap()),
    ];
    for (what, spoil) in spoil {
        let (copy, meta) = clean.copy();
        spoil(&copy.join("sled"));
        assert!(clean.check(&meta, what).is_some(), "{what}");
    }
}

fn last_segment(dir: &Path) -> PathBuf {
    let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "log");
    let with_records = |path: &PathBuf| path.metadata().unwrap().len() > 32;
    files(dir).into_iter().rfind(|path| is_log(path) && with_records(path)).unwrap()
}

#[test]
fn a_torn_tail_is_cut_off_and_what_came_before_stays() {
    let dir = tempfile::tempdir().unwrap();
    let meta = DiskMeta::new(dir.path(), options());
    let mut oracle = Oracle::default();
    drop(grown(&meta, &mut oracle));
    // A group whose sync never returned: half a record, then zeroes.
    let segment = last_segment(dir.path());
    let mut bytes = fs::read(&segment).unwrap();
    let half = bytes[32..150].to_vec();
    bytes.extend(half);
    bytes.extend([0; 700]);
    fs::write(&segment, bytes).unwrap();
    let mut service = Service::open(&meta).unwrap();
    oracle.check(&mut service, "after the torn tail");
    let random = &mut Random::new(1);
    let payload = payload(random, service.seq + 1);
    service.append(&mut oracle, payload).unwrap();
    service.commit(&mut oracle).unwrap();
    drop(service);
    oracle.check(&mut Service::open(&meta).unwrap(), "after it was written behind");
}

#[test]
fn damage_in_the_middle_of_the_journal_is_refused_with_file_and_offset() {
    let dir = tempfile::tempdir().unwrap();
    let meta = DiskMeta::new(dir.path(), options());
    let mut oracle = Oracle::default();
    drop(grown(&meta, &mut oracle));
    // Without the mark, as after a power cut, only the later records can tell.
    fs::remove_file(dir.path().join("mark")).unwrap();
    let segment = last_segment(dir.path());
    flip(&segment, (32 + 40) * 8);
    let error = Service::open(&meta).err().unwrap();
    let MetaError::Damaged { file, offset, .. } = &error else { panic!("{error}") };
    assert_eq!((file, *offset), (&segment, 32));
    let text = error.to_string();
    assert!(text.contains(&segment.display().to_string()) && text.contains("offset 32"), "{text}");
}

#[test]
fn a_damaged_checkpoint_falls_back_to_the_older_one_and_two_damaged_are_refused() {
    let whole = MemoryMeta::with_options(options());
    let mut oracle = Oracle::default();
    drop(grown(&whole, &mut oracle));
    let names = whole.disk().list().unwrap();
    let checkpoints: Vec<&String> = names.iter().filter(|name| name.ends_with(".chk")).collect();
    assert_eq!(checkpoints.len(), 2);
    let meta = whole.copy();
    meta.disk().flip(checkpoints[1], 5000);
    let mut service = Service::open(&meta).unwrap();
    oracle.check(&mut service, "with the older checkpoint");
    service.checkpoint(&mut oracle.clone()).unwrap();
    drop(service);
    oracle.check(&mut Service::open(&meta).unwrap(), "with the next checkpoint");
    let meta = whole.copy();
    meta.disk().flip(checkpoints[0], 5000);
    meta.disk().flip(checkpoints[1], 5000);
    let error = Service::open(&meta).err().unwrap();
    assert!(matches!(error, MetaError::Damaged { .. }), "{error}");
}
