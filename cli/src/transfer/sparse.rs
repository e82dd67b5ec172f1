//! Where a file has data, and which blocks of it are zeroes.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use bytes::Bytes;
use endio_types::{BLOCK_BYTES, BLOCK_SIZE};
use rustix::{fs::SeekFrom, io::Errno};

use super::reader::Piece;

/// Longest piece of data: what one request carries whole.
pub(crate) const PIECE_BYTES_MAX: u64 = 1 << 20;

/// Cuts bytes that begin at a block boundary of the target into runs of blocks with and without
/// data. The last block may be short.
pub(crate) fn split(offset: u64, data: &Bytes) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < data.len() {
        let is_zero = is_zero_block(data, start);
        let mut end = start;
        while end < data.len() && is_zero_block(data, end) == is_zero {
            end = (end + BLOCK_SIZE).min(data.len());
        }
        let at = offset + start as u64;
        pieces.push(if is_zero {
            Piece::Zeroes(at, (end - start) as u64)
        } else {
            Piece::Data(at, data.slice(start..end))
        });
        start = end;
    }
    pieces
}

fn is_zero_block(data: &Bytes, at: usize) -> bool {
    data[at..(at + BLOCK_SIZE).min(data.len())].iter().all(|byte| *byte == 0)
}

/// Reads `start..end` of a file as pieces of at most [`PIECE_BYTES_MAX`], in order; holes are not
/// read. `start` is a block boundary, `end` one too or the end of the file. Stops early when `give`
/// says so by `false`.
///
/// # Errors
/// The file cannot be read, or ends before `end`.
pub(crate) fn scan(
    file: &File,
    start: u64,
    end: u64,
    mut give: impl FnMut(Piece) -> bool,
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        // File systems with blocks below ours have holes that begin inside a block.
        let data = next_data(file, at)?.map_or(end, |data| data / BLOCK_BYTES * BLOCK_BYTES);
        let data = data.clamp(at, end);
        if data > at && !give(Piece::Zeroes(at, data - at)) {
            return Ok(());
        }
        at = data;
        if at == end {
            return Ok(());
        }
        let hole = next_hole(file, at)?.map_or(end, |h| h.next_multiple_of(BLOCK_BYTES));
        let hole = hole.clamp((at + BLOCK_BYTES).min(end), end);
        while at < hole {
            let length = (hole - at).min(PIECE_BYTES_MAX - at % PIECE_BYTES_MAX);
            let mut buffer = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            file.read_exact_at(&mut buffer, at)?;
            for piece in split(at, &Bytes::from(buffer)) {
                if !give(piece) {
                    return Ok(());
                }
            }
            at += length;
        }
    }
    Ok(())
}

/// First byte at or after `at` that is data; `None`: only holes follow.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // Block devices and some file systems do not know holes: all is data.
        Err(Errno::INVAL | Errno::NOTSUP) => Ok(Some(at)),
        Err(errno) => Err(errno.into()),
    }
}

/// First byte at or after `at` that is in a hole; `None`: data to the end.
fn next_hole(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Hole(at)) {
        Ok(hole) => Ok(Some(hole)),
        Err(Errno::NXIO | Errno::INVAL | Errno::NOTSUP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn collect(file: &File, start: u64, end: u64) -> Vec<(bool, u64, u64)> {
        let mut pieces = Vec::new();
        scan(file, start, end, |piece| {
            pieces.push(match piece {
                Piece::Data(at, data) => (true, at, data.len() as u64),
                Piece::Zeroes(at, length) => (false, at, length),
            });
            true
        })
        .unwrap();
        pieces
    }

    #[test]
    fn zero_blocks_inside_data_are_cut_out_block_by_block() {
        let mut data = vec![0; 4 * BLOCK_SIZE + 10];
        data[0] = 1;
        data[2 * BLOCK_SIZE - 1] = 1;
        let pieces = split(8192, &data.clone().into());
        assert_eq!(
            pieces,
            [
                Piece::Data(8192, data[..2 * BLOCK_SIZE].to_vec().into()),
                Piece::Zeroes(8192 + 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 10),
            ]
        );
        assert_eq!(split(0, &Bytes::new()), []);
        let tail = [vec![0; BLOCK_SIZE], vec![7]].concat();
        assert_eq!(split(0, &tail.into()).len(), 2);
    }

    #[test]
    fn a_scan_covers_its_range_once_and_in_order_and_holes_cost_nothing() {
        let file = tempfile::tempfile().unwrap();
        let length = (64 << 20) + 100;
        file.set_len(length).unwrap();
        file.write_all_at(&[1; 3 * BLOCK_SIZE], 5 * BLOCK_BYTES).unwrap();
        file.write_all_at(&[2; 3 << 20], 10 << 20).unwrap();
        file.write_all_at(&[3], length - 1).unwrap();
        let pieces = collect(&file, 0, length);
        let mut at = 0;
        for (is_data, start, length) in &pieces {
            assert_eq!(*start, at);
            assert!(!is_data || *length <= PIECE_BYTES_MAX);
            at += length;
        }
        assert_eq!(at, length);
        let data: u64 = pieces.iter().filter(|p| p.0).map(|p| p.2).sum();
        assert_eq!(data, 3 * BLOCK_BYTES + (3 << 20) + 100);
        assert_eq!(collect(&file, 11 << 20, 12 << 20), [(true, 11 << 20, 1 << 20)]);
        assert_eq!(collect(&file, 0, 0), []);
    }

    #[test]
    fn a_file_that_shrinks_while_it_is_read_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; BLOCK_SIZE], 0).unwrap();
        let error = scan(&file, 0, BLOCK_BYTES, |_| true).and_then(|()| {
            file.set_len(10)?;
            scan(&file, 0, BLOCK_BYTES, |_| true)
        });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
