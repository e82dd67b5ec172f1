//! The few file operations that journal and checkpoints are made of, so that tests can cut the
//! power after any of them.
//!
//! A [`Vfs`] is one flat directory. Contents are durable after [`VfsFile::sync_data`], names after
//! [`Vfs::sync_dir`], and nothing is durable otherwise.

use std::any::Any;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation};

/// An open file.
pub trait VfsFile: Send {
    /// Appends a prefix of `data`, never nothing unless `data` is empty, and returns its length.
    /// A short count is followed by the reason when the rest is tried.
    fn append(&mut self, data: &[u8]) -> io::Result<usize>;
    /// Overwrites at `offset`; the range lies inside the file.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes the contents and the length durable. After an error nothing is known about what was
    /// not durable before, and trying again proves nothing.
    fn sync_data(&mut self) -> io::Result<()>;
}

/// One directory.
pub trait Vfs: Send + Sync {
    /// Takes the directory for this process until the guard is dropped; `None` if another has it.
    fn lock(&self) -> io::Result<Option<Box<dyn Any + Send + Sync>>>;
    /// The names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Creates an empty file, replacing one of that name, and opens it.
    fn create(&self, name: &str) -> io::Result<Box<dyn VfsFile>>;
    /// Opens an existing file for appending and overwriting.
    fn open(&self, name: &str) -> io::Result<Box<dyn VfsFile>>;
    /// Length in bytes.
    fn len(&self, name: &str) -> io::Result<u64>;
    /// Up to `len` bytes from `offset`; fewer only at the end of the file.
    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Cuts a file to `len` bytes.
    fn truncate(&self, name: &str, len: u64) -> io::Result<()>;
    /// Creates a file of `len` bytes whose space is really taken from the disk.
    fn reserve(&self, name: &str, len: u64) -> io::Result<()>;
    /// Renames, replacing `to`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Bytes that can still be written.
    fn free_bytes(&self) -> io::Result<u64>;
    /// The name as a person finds it.
    fn path(&self, name: &str) -> PathBuf;

    /// Whether the file exists.
    fn exists(&self, name: &str) -> io::Result<bool> {
        match self.len(name) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A real directory.
pub struct RealVfs {
    dir: PathBuf,
}

impl RealVfs {
    /// The directory `dir`, created with its parents if it does not exist.
    pub fn new(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        if !dir.is_dir() {
            fs::create_dir_all(&dir)?;
            if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(Self { dir })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

struct RealFile(File);

impl VfsFile for RealFile {
    fn append(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(data) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) if !data.is_empty() => return Err(io::ErrorKind::WriteZero.into()),
                other => return other,
            }
        }
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
    fn sync_data(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

impl Vfs for RealVfs {
    fn lock(&self) -> io::Result<Option<Box<dyn Any + Send + Sync>>> {
        let path = self.dir.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                // A name that is not UTF-8 is none of ours.
                names.extend(entry.file_name().into_string().ok());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn VfsFile>> {
        let path = self.dir.join(name);
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
        Ok(Box::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn VfsFile>> {
        let mut file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Box::new(RealFile(file)))
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.dir.join(name))?.len())
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut file = File::open(self.dir.join(name))?;
        let there = file.metadata()?.len().saturating_sub(offset).min(len as u64);
        file.seek(SeekFrom::Start(offset))?;
        let mut data = Vec::with_capacity(there as usize);
        file.take(len as u64).read_to_end(&mut data)?;
        Ok(data)
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.dir.join(name))?.set_len(len)
    }

    fn reserve(&self, name: &str, len: u64) -> io::Result<()> {
        let path = self.dir.join(name);
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let zeros = vec![0; 1 << 20];
                let mut left = len;
                while left > 0 {
                    let part = left.min(zeros.len() as u64);
                    file.write_all(&zeros[..part as usize])?;
                    left -= part;
                }
                file.sync_data()
            }
            Err(error) => Err(error.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.dir.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}
