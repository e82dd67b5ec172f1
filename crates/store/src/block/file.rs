//! A data directory: `superblock`, a sparse file `blocks`, and a lock.
//!
//! ```text
//!   LOCK         exclusive flock while a process has the directory
//!   superblock   identity, incarnation, capacity (two copies)
//!   blocks       block N at byte N × 4096; sparse
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSliceMut},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Incarnation, Pblk, PblkRange};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::{Errno, ReadWriteFlags};

use super::{BlockDevice, Superblock, SuperblockError, device::checked_offset, direct::Direct};

const LOCK: &str = "LOCK";
const SUPERBLOCK: &str = "superblock";
const SUPERBLOCK_NEW: &str = "superblock.new";
const BLOCKS: &str = "blocks";

/// Capacity of a new store for which none is configured: 16 GiB in blocks. Sparse: it takes no space.
pub const DEFAULT_CAPACITY_BLOCKS: u64 = (16 << 30) / BLOCK_BYTES;

/// How to open a data directory.
#[derive(Clone, Debug)]
pub struct OpenBlockFile {
    /// The directory; made if absent.
    pub dir: PathBuf,
    /// Capacity in blocks. `None`: as it is, or 16 GiB for a new store.
    pub capacity_blocks: Option<u64>,
    /// Identity of the store if it is a new one; must be random.
    pub new_uuid: [u8; 16],
    /// Writes of at least so many bytes go around the page cache, where the file system can; `None`:
    /// none do.
    pub direct_write_bytes_min: Option<usize>,
}

/// Why a data directory could not be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenBlockFileError {
    /// Another process has it.
    #[error("the data directory {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Something is wrong with the superblock.
    #[error("the superblock in {} cannot be used", .0.display())]
    Superblock(PathBuf, #[source] SuperblockError),
    /// Data without an identity.
    #[error(
        "{} holds data but its superblock is missing: restore the file `superblock`, or remove the \
         directory to begin as a new store", .0.display()
    )]
    SuperblockMissing(PathBuf),
    /// An identity without data.
    #[error("{} has a superblock but its file `blocks` is missing", .0.display())]
    BlocksMissing(PathBuf),
    /// The data file lost its tail.
    #[error("the file `blocks` in {} holds {found} bytes, the superblock says {expected}", dir.display())]
    BlocksTruncated {
        /// The data directory.
        dir: PathBuf,
        /// Length of the file.
        found: u64,
        /// Length according to the superblock.
        expected: u64,
    },
    /// The configured capacity is below the present one.
    #[error("the capacity is {present} blocks and cannot shrink to {wanted}")]
    Shrinks {
        /// Capacity in the superblock.
        present: u64,
        /// Capacity asked for.
        wanted: u64,
    },
    /// A capacity of nothing, or of more than a file can hold.
    #[error("a capacity of {0} blocks is impossible")]
    BadCapacity(u64),
    /// The file system refused.
    #[error("cannot access {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

/// An open data directory. The lock is held until it is dropped.
#[derive(Debug)]
pub struct BlockFile {
    superblock: Superblock,
    was_repaired: bool,
    blocks: File,
    direct: Option<Direct>,
    /// Keeps the flock.
    _lock: File,
}

impl OpenBlockFile {
    /// Opens or makes the store and begins a new incarnation, durable before this returns.
    ///
    /// # Errors
    /// See [`OpenBlockFileError`]. Blocks the calling thread on the disk.
    pub fn open(self) -> Result<BlockFile, OpenBlockFileError> {
        let dir = &self.dir;
        fs::create_dir_all(dir).map_err(|error| io_error(dir, error))?;
        let lock = lock(dir)?;
        if !dir.join(SUPERBLOCK).exists() {
            self.format()?;
        }
        let path = dir.join(SUPERBLOCK);
        let file = open(&path, false)?;
        let bad = |error| OpenBlockFileError::Superblock(dir.clone(), error);
        let found = Superblock::read(&file).map_err(bad)?;
        let present = found.superblock.capacity_blocks;
        let wanted = self.capacity_blocks.unwrap_or(present);
        if wanted < present {
            return Err(OpenBlockFileError::Shrinks { present, wanted });
        }
        let bytes = bytes_of(wanted)?;
        let blocks = self.open_blocks(present)?;
        // The file grows before the superblock says so: a file that is too short is damage.
        blocks
            .set_len(bytes)
            .and_then(|()| blocks.sync_all())
            .map_err(|error| io_error(&dir.join(BLOCKS), error))?;
        let mut superblock = found.next_start(wanted).map_err(bad)?;
        superblock.write(&file).map_err(bad)?;
        let was_repaired = found.is_one_slot_damaged;
        let path = dir.join(BLOCKS);
        let direct = self.direct_write_bytes_min.and_then(|min| Direct::open(&path, min));
        Ok(BlockFile { superblock, was_repaired, blocks, direct, _lock: lock })
    }

    fn open_blocks(&self, present: u64) -> Result<File, OpenBlockFileError> {
        let path = self.dir.join(BLOCKS);
        if !path.exists() {
            return Err(OpenBlockFileError::BlocksMissing(self.dir.clone()));
        }
        let blocks = open(&path, false)?;
        let found = blocks.metadata().map_err(|error| io_error(&path, error))?.len();
        let expected = bytes_of(present)?;
        if found < expected {
            return Err(OpenBlockFileError::BlocksTruncated {
                dir: self.dir.clone(),
                found,
                expected,
            });
        }
        Ok(blocks)
    }

    /// Makes a new store. The superblock appears last and whole; until then a crash leaves a
    /// directory that holds no data and is formatted again.
    fn format(&self) -> Result<(), OpenBlockFileError> {
        let blocks = self.dir.join(BLOCKS);
        let io = |error| io_error(&self.dir, error);
        if blocks.exists() && fs::metadata(&blocks).map_err(io)?.blocks() > 0 {
            return Err(OpenBlockFileError::SuperblockMissing(self.dir.clone()));
        }
        let capacity_blocks = self.capacity_blocks.unwrap_or(DEFAULT_CAPACITY_BLOCKS);
        let file = open(&blocks, true)?;
        file.set_len(bytes_of(capacity_blocks)?).and_then(|()| file.sync_all()).map_err(io)?;
        let new = self.dir.join(SUPERBLOCK_NEW);
        let mut superblock = Superblock {
            sequence: 0,
            uuid: self.new_uuid,
            incarnation: Incarnation(0),
            capacity_blocks,
        };
        let file = open(&new, true)?;
        file.set_len(0).map_err(io)?;
        superblock
            .write(&file)
            .map_err(|error| OpenBlockFileError::Superblock(self.dir.clone(), error))?;
        file.sync_all().map_err(io)?;
        fs::rename(&new, self.dir.join(SUPERBLOCK)).map_err(io)?;
        sync_dir(&self.dir).map_err(io)?;
        // The directory itself may be new in its parent.
        match self.dir.canonicalize().map_err(io)?.parent() {
            Some(parent) => sync_dir(parent).map_err(io),
            None => Ok(()),
        }
    }
}

impl BlockFile {
    /// Identity, incarnation and capacity of this start.
    pub fn superblock(&self) -> Superblock {
        self.superblock
    }

    /// Whether large writes go around the page cache.
    pub fn has_direct_writes(&self) -> bool {
        self.direct.is_some()
    }

    /// Whether one copy of the superblock was damaged and has been written anew.
    pub fn was_repaired(&self) -> bool {
        self.was_repaired
    }
}

impl BlockDevice for BlockFile {
    fn capacity_blocks(&self) -> u64 {
        self.superblock.capacity_blocks
    }

    fn write_at(&self, pblk: Pblk, data: &[u8]) -> io::Result<()> {
        let offset = checked_offset(self.superblock.capacity_blocks, pblk, data.len())?;
        match self.direct.as_ref().and_then(|direct| direct.write_at(data, offset)) {
            Some(written) => written,
            None => self.blocks.write_all_at(data, offset),
        }
    }

    fn read_at(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<()> {
        let offset = checked_offset(self.superblock.capacity_blocks, pblk, data.len())?;
        self.blocks.read_exact_at(data, offset)
    }

    fn read_at_once(&self, pblk: Pblk, data: &mut [u8]) -> io::Result<bool> {
        let offset = checked_offset(self.superblock.capacity_blocks, pblk, data.len())?;
        let wanted = data.len();
        let mut parts = [IoSliceMut::new(data)];
        match rustix::io::preadv2(&self.blocks, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            // Less than all: the rest is not in memory.
            Ok(read) => Ok(read == wanted),
            // Not in memory, or a file system that cannot tell.
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.blocks.sync_data()
    }

    fn punch(&self, range: PblkRange) -> io::Result<()> {
        let bytes = range
            .len
            .checked_mul(BLOCK_BYTES)
            .filter(|bytes| *bytes > 0 && range.end() <= self.superblock.capacity_blocks)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.blocks, flags, range.start.0 * BLOCK_BYTES, bytes)?)
    }

    fn used_blocks(&self) -> io::Result<u64> {
        // `st_blocks` counts 512-byte units, whatever the file system's block is.
        Ok(self.blocks.metadata()?.blocks().div_ceil(BLOCK_SIZE as u64 / 512))
    }
}

fn bytes_of(blocks: u64) -> Result<u64, OpenBlockFileError> {
    blocks
        .checked_mul(BLOCK_BYTES)
        .filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok())
        .ok_or(OpenBlockFileError::BadCapacity(blocks))
}

fn io_error(path: &Path, error: io::Error) -> OpenBlockFileError {
    OpenBlockFileError::Io(path.to_owned(), error)
}

fn open(path: &Path, create: bool) -> Result<File, OpenBlockFileError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).truncate(false);
    options.open(path).map_err(|error| io_error(path, error))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn lock(dir: &Path) -> Result<File, OpenBlockFileError> {
    let path = dir.join(LOCK);
    let file = open(&path, true)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenBlockFileError::InUse(dir.to_owned())),
        Err(error) => Err(io_error(&path, error.into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn options(dir: &Path, capacity_blocks: Option<u64>) -> OpenBlockFile {
        let direct_write_bytes_min = Some(2 * BLOCK_SIZE);
        OpenBlockFile {
            dir: dir.to_owned(),
            capacity_blocks,
            new_uuid: [9; 16],
            direct_write_bytes_min,
        }
    }

    #[test]
    fn the_incarnation_grows_at_each_start_and_the_data_stays() {
        let dir = tempfile::tempdir().unwrap();
        for incarnation in 1..4 {
            let file = options(&dir.path().join("new"), Some(100)).open().unwrap();
            assert_eq!(file.superblock().incarnation, Incarnation(incarnation));
            assert_eq!(file.superblock().uuid, [9; 16]);
            let mut block = [0; BLOCK_SIZE];
            if incarnation > 1 {
                file.read_at(Pblk(99), &mut block).unwrap();
                assert_eq!(block, [5; BLOCK_SIZE]);
            }
            file.write_at(Pblk(99), &[5; BLOCK_SIZE]).unwrap();
            file.flush().unwrap();
        }
    }

    #[test]
    fn a_second_opener_of_the_same_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = options(dir.path(), Some(1)).open().unwrap();
        let second = options(dir.path(), Some(1)).open().unwrap_err();
        assert!(matches!(second, OpenBlockFileError::InUse(_)), "{second}");
        drop(first);
        options(dir.path(), Some(1)).open().unwrap();
    }

    #[test]
    fn the_capacity_grows_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(options(dir.path(), Some(10)).open().unwrap().capacity_blocks(), 10);
        assert_eq!(options(dir.path(), Some(11)).open().unwrap().capacity_blocks(), 11);
        assert_eq!(options(dir.path(), None).open().unwrap().capacity_blocks(), 11);
        let shrunk = options(dir.path(), Some(10)).open().unwrap_err();
        assert!(matches!(shrunk, OpenBlockFileError::Shrinks { present: 11, wanted: 10 }));
        let zero = options(&dir.path().join("zero"), Some(0)).open().unwrap_err();
        assert!(matches!(zero, OpenBlockFileError::BadCapacity(0)));
        let huge = options(&dir.path().join("huge"), Some(1 << 60)).open().unwrap_err();
        assert!(matches!(huge, OpenBlockFileError::BadCapacity(_)));
    }

    #[test]
    fn what_is_in_the_page_cache_is_read_at_once_and_the_bounds_are_those_of_a_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = options(directory.path(), Some(100)).open().unwrap();
        file.write_at(Pblk(3), &[7; 2 * BLOCK_SIZE]).unwrap();
        let mut data = [1; 2 * BLOCK_SIZE];
        // A file system that cannot tell says no; then there is nothing to compare.
        if file.read_at_once(Pblk(3), &mut data).unwrap() {
            assert_eq!(data, [7; 2 * BLOCK_SIZE]);
        } else {
            println!("skipped: this file system cannot read without waiting");
        }
        let beyond = Pblk(file.capacity_blocks() - 1);
        let error = file.read_at_once(beyond, &mut data).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn punched_blocks_leave_the_host_file_system_and_read_as_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let file = options(dir.path(), Some(100)).open().unwrap();
        file.write_at(Pblk(10), &[1; 64 * BLOCK_SIZE]).unwrap();
        file.flush().unwrap();
        let full = file.used_blocks().unwrap();
        file.punch(PblkRange::new(10, 32)).unwrap();
        file.flush().unwrap();
        assert_eq!(file.used_blocks().unwrap(), full - 32);
        let mut block = [7; BLOCK_SIZE];
        file.read_at(Pblk(41), &mut block).unwrap();
        assert_eq!(block, [0; BLOCK_SIZE]);
        file.read_at(Pblk(42), &mut block).unwrap();
        assert_eq!(block, [1; BLOCK_SIZE]);
    }

    #[test]
    fn nothing_is_touched_beyond_the_capacity() {
        let dir = tempfile::tempdir().unwrap();
        let file = options(dir.path(), Some(10)).open().unwrap();
        file.write_at(Pblk(9), &[1; BLOCK_SIZE]).unwrap();
        for pblk in [10, u64::MAX] {
            file.write_at(Pblk(pblk), &[1; BLOCK_SIZE]).unwrap_err();
            file.read_at(Pblk(pblk), &mut [1; BLOCK_SIZE]).unwrap_err();
            file.punch(PblkRange::new(pblk, 1)).unwrap_err();
        }
        file.write_at(Pblk(9), &[1; 2 * BLOCK_SIZE]).unwrap_err();
        file.write_at(Pblk(0), &[1; 100]).unwrap_err();
        file.punch(PblkRange::new(0, 0)).unwrap_err();
    }

    /// Scenario 77.
    #[test]
    fn a_damaged_directory_is_refused_with_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        drop(options(dir.path(), Some(10)).open().unwrap());
        let blocks = dir.path().join(BLOCKS);
        OpenOptions::new().write(true).open(&blocks).unwrap().set_len(4096).unwrap();
        let error = options(dir.path(), None).open().unwrap_err();
        assert!(matches!(error, OpenBlockFileError::BlocksTruncated { found: 4096, .. }));
        fs::rename(&blocks, dir.path().join("elsewhere")).unwrap();
        let error = options(dir.path(), None).open().unwrap_err();
        assert!(matches!(error, OpenBlockFileError::BlocksMissing(_)));
        fs::write(&blocks, vec![1; 10 * BLOCK_SIZE]).unwrap();
        fs::remove_file(dir.path().join(SUPERBLOCK)).unwrap();
        let error = options(dir.path(), None).open().unwrap_err();
        assert!(matches!(error, OpenBlockFileError::SuperblockMissing(_)), "{error}");
    }

    #[test]
    fn a_format_that_was_cut_short_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join(BLOCKS)).unwrap().set_len(4096).unwrap();
        fs::write(dir.path().join(SUPERBLOCK_NEW), vec![3; 9000]).unwrap();
        let file = options(dir.path(), Some(10)).open().unwrap();
        assert_eq!(file.superblock().incarnation, Incarnation(1));
    }
}
