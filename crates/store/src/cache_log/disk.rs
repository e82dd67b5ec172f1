//! The few file operations that the log needs, so that tests can cut the power.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;

/// A directory of the log.
pub(super) trait Disk: Send + Sync {
    /// Names of the files in it.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A new, empty file; an existing one is an error.
    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// An existing file.
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// Removes a file; durable after `sync_dir`.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Renames a file over another; durable after `sync_dir`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// For messages.
    fn path(&self, name: &str) -> PathBuf;
    /// Differs after a loss of power.
    fn boot_id(&self) -> io::Result<String>;
}

/// A file of the log.
pub(super) trait LogFile: Send + Sync {
    /// Writes both parts at `offset`; on an error any prefix may have been written.
    fn write_at(&self, offset: u64, head: &[u8], body: &[&[u8]]) -> io::Result<()>;
    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts to `len` bytes.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// A real directory, locked for this process.
pub(super) struct RealDisk {
    dir: PathBuf,
    handle: File,
    /// Held for its lock.
    _lock: File,
}

impl RealDisk {
    /// Creates the directory if need be and locks it. `Ok(None)`: somebody else has it.
    pub(super) fn lock(dir: &Path) -> io::Result<Option<Self>> {
        create_durably(dir)?;
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        Ok(Some(Self { dir: dir.to_owned(), handle: File::open(dir)?, _lock: lock }))
    }
}

/// Creates a directory and what leads to it. Its name and that of the directory around it survive
/// a power loss: what is synced in a directory whose name is lost would be gone with it.
fn create_durably(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for parent in dir.canonicalize()?.ancestors().skip(1).take(2) {
        match File::open(parent).and_then(|parent| parent.sync_all()) {
            // Not ours to read: then it was not created here either.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other?,
        }
    }
    Ok(())
}

impl Disk for RealDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(self.dir.join(name))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.dir.join(name))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn boot_id(&self) -> io::Result<String> {
        if let Some(given) = endio_failpoints::boot_id() {
            return Ok(given);
        }
        Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }
}

struct RealFile(File);

impl LogFile for RealFile {
    fn write_at(&self, offset: u64, head: &[u8], body: &[&[u8]]) -> io::Result<()> {
        let mut slices = Vec::with_capacity(1 + body.len());
        slices.push(IoSlice::new(head));
        slices.extend(body.iter().map(|part| IoSlice::new(part)));
        let mut rest = &mut slices[..];
        let mut at = offset;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            // The kernel takes at most 1024 pieces in one call.
            let batch = &rest[..rest.len().min(1024)];
            match rustix::io::pwritev(&self.0, batch, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    at += written as u64;
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
