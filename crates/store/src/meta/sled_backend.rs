//! sled as the store of encoded chunks. Nothing it says is believed without the canary, every
//! panic inside it is caught, and it never decides what is durable.

use std::fs::{self, File};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use endio_state_machine::chunk::ChunkId;

use super::backend::{Backend, Changes, Engine, Visit, id_of, key};

const TREE: &str = "chunks";
/// sled's threads let go of its files shortly after the last handle is dropped.
const RELEASE_TRIES: u32 = 2000;

/// sled in a directory of its own.
pub(crate) struct SledEngine {
    dir: PathBuf,
    cache_bytes: u64,
}

impl SledEngine {
    pub(crate) fn new(dir: PathBuf, cache_bytes: u64) -> Self {
        Self { dir, cache_bytes }
    }
}

struct SledBackend {
    // Declared before the database: handles of trees go first.
    tree: Option<sled::Tree>,
    db: Option<sled::Db>,
    dir: PathBuf,
}

/// Runs `f`, which calls into sled; a panic becomes an error.
fn caught<R>(what: &str, f: impl FnOnce() -> Result<R, sled::Error>) -> Result<R, String> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) => Err(format!("{what}: {error}")),
        Err(panic) => Err(format!("{what}: sled panicked: {}", panic_text(panic.as_ref()))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

impl Engine for SledEngine {
    fn fingerprint(&self) -> Result<u32, String> {
        fingerprint(&self.dir).map_err(|error| format!("sled's files cannot be read: {error}"))
    }

    fn open(&self) -> Result<Box<dyn Backend>, String> {
        let config = sled::Config::new()
            .path(&self.dir)
            .cache_capacity(self.cache_bytes)
            .flush_every_ms(None)
            .mode(sled::Mode::HighThroughput);
        let (db, tree) = caught("open", || {
            let db = config.open()?;
            let tree = db.open_tree(TREE)?;
            Ok((db, tree))
        })?;
        Ok(Box::new(SledBackend { tree: Some(tree), db: Some(db), dir: self.dir.clone() }))
    }

    fn discard(&self) -> Result<(), String> {
        let removed = match fs::symlink_metadata(&self.dir) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&self.dir),
            Ok(_) => fs::remove_file(&self.dir),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(|error| format!("sled's directory cannot be removed: {error}"))
    }
}

impl SledBackend {
    fn tree(&self) -> Result<&sled::Tree, String> {
        self.tree.as_ref().ok_or_else(|| "sled is closed".into())
    }

    fn release(&mut self) -> Result<(), String> {
        let (tree, db) = (self.tree.take(), self.db.take());
        caught("close", || {
            drop(tree);
            drop(db);
            Ok(())
        })
    }
}

impl Drop for SledBackend {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(error, "sled did not close");
        }
    }
}

impl Backend for SledBackend {
    fn get(&mut self, id: ChunkId) -> Result<Option<Vec<u8>>, String> {
        let tree = self.tree()?;
        caught("get", || Ok(tree.get(key(id))?.map(|value| value.to_vec())))
    }

    fn apply(&mut self, changes: Changes) -> Result<(), String> {
        let tree = self.tree()?;
        caught("write", || {
            for (id, value) in changes {
                match value {
                    Some(value) => tree.insert(key(id), value)?,
                    None => tree.remove(key(id))?,
                };
            }
            Ok(())
        })
    }

    fn next(&mut self, from: ChunkId) -> Result<Option<ChunkId>, String> {
        let tree = self.tree()?;
        let found = caught("find", || tree.range(key(from)..).next().transpose())?;
        found.map(|(key, _)| id_of(&key).ok_or("a key is not a chunk's".into())).transpose()
    }

    fn scan(&mut self, visit: &mut Visit<'_>) -> Result<(), String> {
        let tree = self.tree()?;
        let mut entries = tree.iter();
        while let Some((key, value)) = caught("scan", || entries.next().transpose())? {
            let id = id_of(&key).ok_or("a key is not a chunk's")?;
            visit(id, &value)?;
        }
        Ok(())
    }

    fn close(mut self: Box<Self>) -> Result<u32, String> {
        if let Some(db) = &self.db {
            caught("flush", || db.flush())?;
        }
        self.release()?;
        let fail = |error: io::Error| format!("sled's files cannot be made durable: {error}");
        wait_until_released(&self.dir).map_err(fail)?;
        sync_all(&self.dir).map_err(fail)?;
        fingerprint(&self.dir).map_err(fail)
    }
}

/// Waits until no thread of sled holds the lock on its file, so that it does not change any more.
fn wait_until_released(dir: &Path) -> io::Result<()> {
    let file = File::open(dir.join("db"))?;
    for _ in 0..RELEASE_TRIES {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(5)),
            other => return Ok(other?),
        }
    }
    Err(io::Error::other("sled does not let go of its files"))
}

/// All files below `dir`, sorted.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn sync_all(dir: &Path) -> io::Result<()> {
    for file in files(dir)? {
        File::open(file)?.sync_all()?;
    }
    let blobs = dir.join("blobs");
    if blobs.is_dir() {
        File::open(blobs)?.sync_all()?;
    }
    File::open(dir)?.sync_all()?;
    match dir.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn fingerprint(dir: &Path) -> io::Result<u32> {
    let mut crc = 0;
    let mut buffer = vec![0; 1 << 20];
    for path in files(dir)? {
        let name = path.strip_prefix(dir).unwrap_or(&path);
        crc = crc32c::crc32c_append(crc, name.as_os_str().as_encoded_bytes());
        let mut file = File::open(&path)?;
        crc = crc32c::crc32c_append(crc, &file.metadata()?.len().to_le_bytes());
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            crc = crc32c::crc32c_append(crc, &buffer[..count]);
        }
    }
    Ok(crc)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use endio_state_machine::chunk::Chunk;
    use endio_types::VolumeId;

    use super::*;

    fn id(n: u64) -> ChunkId {
        ChunkId { volume: VolumeId(1), index: n }
    }

    fn entries(engine: &SledEngine) -> Result<Vec<(ChunkId, Vec<u8>)>, String> {
        let mut all = Vec::new();
        let mut backend = engine.open()?;
        backend.scan(&mut |id, bytes| {
            Chunk::decode(id, bytes).map_err(|error| error.to_string())?;
            all.push((id, bytes.to_vec()));
            Ok(())
        })?;
        Ok(all)
    }

    /// The second line of defence, behind the fingerprint: no flipped bit lets sled bring the
    /// process down, or show as many chunks as the canary counted with other contents.
    #[test]
    fn whatever_sled_makes_of_flipped_bits_is_caught() {
        let dir = tempfile::tempdir().unwrap();
        let engine = SledEngine::new(dir.path().join("sled"), 1 << 20);
        let mut backend = engine.open().unwrap();
        backend
            .apply((0..300).map(|n| (id(n), Some(Chunk::default().encode(id(n))))).collect())
            .unwrap();
        let crc = backend.close().unwrap();
        assert_eq!(engine.fingerprint().unwrap(), crc);
        let db = dir.path().join("sled").join("db");
        let good = fs::read(&db).unwrap();
        let whole = entries(&engine).unwrap();
        assert_eq!(whole.len(), 300);
        let used = good.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1;
        let mut noticed = 0;
        for n in 0..40u64 {
            let bit = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (used * 8);
            let copy = dir.path().join(format!("copy-{n}"));
            fs::create_dir(&copy).unwrap();
            for file in files(&dir.path().join("sled")).unwrap() {
                fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
            }
            let mut bad = good.clone();
            bad[(bit / 8) as usize] ^= 1 << (bit % 8);
            fs::write(copy.join("db"), bad).unwrap();
            match entries(&SledEngine::new(copy, 1 << 20)) {
                Ok(found) if found.len() == whole.len() => assert_eq!(found, whole, "bit {bit}"),
                Ok(_) | Err(_) => noticed += 1,
            }
        }
        assert!(noticed > 0, "no flipped bit mattered");
    }
}
