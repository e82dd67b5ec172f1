//! Large writes around the page cache.
//!
//! What goes through the page cache is copied there page by page, and the file system allocates for
//! each; a large write costs a multiple of the processor that way (docs/PERFORMANCE.md). It is as
//! little durable before a flush as any other: the disk has a cache, too, and so has the file system
//! for what it knows of the file.
//!
//! The kernel keeps both ways coherent: before a direct write it writes back and drops what the page
//! cache has of the range, and after it what was read into it meanwhile. What it cannot drop, because a
//! neighbour in the same folio was written to, makes the next flush fail: all that was written since the one
//! before is written anew elsewhere, and no block counts of which the page cache has something older.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// What the memory of a direct write is aligned to: enough for every disk whose blocks are no larger
/// than the store's.
const ALIGN: usize = endio_types::BLOCK_SIZE;

/// Most bytes that go to the disk at once; each thread that writes keeps as much memory.
const PIECE_BYTES: usize = 1 << 20;

thread_local! {
    static ALIGNED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A second handle of a file.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    bytes_min: usize,
    is_refused: AtomicBool,
}

impl Direct {
    /// For writes of at least `bytes_min` bytes. `None`: the file system has no such way.
    pub(super) fn open(path: &Path, bytes_min: usize) -> Option<Self> {
        let mut options = OpenOptions::new();
        let flags = i32::try_from(OFlags::DIRECT.bits()).ok()?;
        let file = options.write(true).custom_flags(flags).open(path).ok()?;
        Some(Self { file, bytes_min, is_refused: AtomicBool::new(false) })
    }

    /// Writes whole blocks. `None`: it is for the page cache to write them.
    pub(super) fn write_at(&self, data: &[u8], offset: u64) -> Option<io::Result<()>> {
        if data.len() < self.bytes_min || self.is_refused.load(Ordering::Relaxed) {
            return None;
        }
        let mut at = offset;
        for piece in data.chunks(PIECE_BYTES) {
            let written = match is_aligned(piece) {
                true => self.file.write_all_at(piece, at),
                false => {
                    ALIGNED.with_borrow_mut(|room| self.file.write_all_at(aligned(room, piece), at))
                }
            };
            match written {
                Ok(()) => at += piece.len() as u64,
                // Blocks of the disk that are larger than the store's, or a file system that said it could.
                Err(error) if is_refusal(&error) => {
                    self.is_refused.store(true, Ordering::Relaxed);
                    return None;
                }
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(()))
    }
}

fn is_refusal(error: &io::Error) -> bool {
    let refusals = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOTSUP];
    Errno::from_io_error(error).is_some_and(|errno| refusals.contains(&errno))
}

fn is_aligned(data: &[u8]) -> bool {
    data.as_ptr().align_offset(ALIGN) == 0
}

/// A copy that begins where the memory is aligned.
fn aligned<'a>(room: &'a mut Vec<u8>, data: &[u8]) -> &'a [u8] {
    if room.is_empty() {
        *room = vec![0; PIECE_BYTES + ALIGN];
    }
    let first = room.as_ptr().align_offset(ALIGN);
    let place = &mut room[first..first + data.len()];
    place.copy_from_slice(data);
    place
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn file(bytes: u64) -> (tempfile::TempDir, std::path::PathBuf, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blocks");
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        file.set_len(bytes).unwrap();
        (directory, path, file)
    }

    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|at| (at / 4096 + at % 251) as u8 ^ seed).collect()
    }

    #[test]
    fn what_goes_around_the_page_cache_is_read_through_it_and_the_other_way_round() {
        let (_directory, path, file) = file(16 << 20);
        let Some(direct) = Direct::open(&path, 8192) else {
            println!("skipped: this file system has no direct writes");
            return;
        };
        let mut all = vec![0; 16 << 20];
        file.write_all_at(&bytes(8 << 20, 1), 0).unwrap();
        all[..8 << 20].copy_from_slice(&bytes(8 << 20, 1));
        // Aligned in memory or not, of more than one piece, over pages that are dirty, and over holes.
        for (seed, shift, len, at) in [
            (2, 0, 3 << 20, 4096),
            (3, 1, (2 << 20) + 4096, 7 << 20),
            (4, 17, 8192, (8 << 20) - 4096),
            (5, 4095, 1 << 20, 12 << 20),
        ] {
            let data = bytes(len + shift, seed);
            match direct.write_at(&data[shift..], at as u64) {
                Some(written) => written.unwrap(),
                None => file.write_all_at(&data[shift..], at as u64).unwrap(),
            }
            all[at..at + len].copy_from_slice(&data[shift..]);
            let mut found = vec![0; 16 << 20];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == all, "after write {seed}");
            file.write_all_at(&[seed; 4096], at as u64 + 4096).unwrap();
            all[at + 4096..at + 8192].fill(seed);
        }
        file.sync_data().unwrap();
        let mut found = vec![0; 16 << 20];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == all, "after the flush");
    }

    #[test]
    fn what_is_small_goes_through_the_page_cache() {
        let (_directory, path, _file) = file(1 << 20);
        let Some(direct) = Direct::open(&path, 8192) else { return };
        assert!(direct.write_at(&[1; 4096], 0).is_none());
        assert!(!direct.is_refused.load(Ordering::Relaxed));
    }

    #[test]
    fn who_refuses_a_direct_write_once_is_not_asked_again() {
        let (_directory, path, file) = file(1 << 20);
        let Some(direct) = Direct::open(&path, 4096) else { return };
        // No multiple of any disk's block: refused, unless the file system copies all the same.
        let refused = direct.write_at(&bytes(4096, 1), 1).is_none();
        assert_eq!(direct.is_refused.load(Ordering::Relaxed), refused);
        if refused {
            assert!(direct.write_at(&bytes(4096, 2), 4096).is_none());
            let mut found = vec![1; 1 << 20];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found.iter().all(|byte| *byte == 0), "nothing was written");
        }
    }

    #[test]
    fn a_write_beyond_what_may_be_written_fails_and_is_no_refusal() {
        let (_directory, path, _file) = file(1 << 20);
        let Some(mut direct) = Direct::open(&path, 4096) else { return };
        direct.file = File::open(&path).unwrap();
        direct.write_at(&bytes(4096, 1), 0).unwrap().unwrap_err();
        assert!(!direct.is_refused.load(Ordering::Relaxed));
    }
}
