//! What a volume's data log can hold: whoever opens the volume makes nothing else dirty.
//!
//! The log is read from the front, in answers of some hundred blocks. What is in it becomes the
//! newest data of the volume, and moves the end of one that grows, so each block is looked at before
//! any of them is believed.
//!
//! # Invariants
//! * `log-is-checked`: blocks ascend, over all answers; none lies or reaches behind the end of the
//!   volume, or was written under a generation that is newer than the one under which the log is read;
//!   each is what its checksum says.
//!
//! How many blocks there are is not compared with anything: conversions that were queued before the
//! volume was opened may still end entries, and a bound that was lowered says nothing of what is there.

use endio_types::{BLOCK_BYTES, BLOCK_SIZE, Generation, Lblk};

/// A block of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadBlock<'a> {
    /// The block.
    pub lblk: Lblk,
    /// Where the volume's data ends, in bytes, as far as this block shows.
    pub end_bytes: u64,
    /// CRC-32C of its data.
    pub crc: u32,
    /// Under which it was written.
    pub generation: Generation,
    /// 4096 bytes.
    pub data: &'a [u8],
}

/// What cannot be in a data log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LogFault {
    /// It was asked for blocks from a later one on, or had told a later one before.
    #[error("comes where block {} or a later one should", .expected.0)]
    GoesBack {
        /// The first block that could come.
        expected: Lblk,
    },
    /// The volume ends before it.
    #[error("lies behind the end of the volume")]
    BehindEnd,
    /// Its data would end behind itself, or behind the volume.
    #[error("is said to end at byte {end_bytes}, which is not in it")]
    EndsElsewhere {
        /// Where it is said to end.
        end_bytes: u64,
    },
    /// Nobody can have written under a generation that was not given yet.
    #[error("is of generation {}, newer than the volume's", .found.0)]
    FromLater {
        /// The generation.
        found: Generation,
    },
    /// A block has 4096 bytes.
    #[error("has {bytes} bytes")]
    Length {
        /// Bytes that came.
        bytes: usize,
    },
    /// The data is not what was logged.
    #[error("does not match its checksum")]
    Checksum,
}

/// Looks at the blocks of one data log in the order in which they are told.
#[derive(Clone, Debug)]
pub struct LogReader {
    generation: Generation,
    end_bytes: u64,
    next: u64,
}

impl LogReader {
    /// Of a volume that is open under this generation and in which no data can lie behind `end_bytes`:
    /// its size, or the largest size of one that grows.
    pub fn new(generation: Generation, end_bytes: u64) -> Self {
        Self { generation, end_bytes, next: 0 }
    }

    /// The block from which to ask on; `None`: nothing more can come.
    pub fn next(&self) -> Option<Lblk> {
        (self.next < self.end_bytes.div_ceil(BLOCK_BYTES)).then_some(Lblk(self.next))
    }

    /// Looks at the next block.
    ///
    /// # Errors
    /// It cannot be in the log; then none of the answer is to be believed.
    pub fn take(&mut self, block: ReadBlock<'_>) -> Result<(), LogFault> {
        let ReadBlock { lblk, end_bytes, crc, generation, data } = block;
        if lblk.0 < self.next {
            return Err(LogFault::GoesBack { expected: Lblk(self.next) });
        }
        // Below 2^52 from here on: nothing overflows.
        if lblk.0 >= self.end_bytes.div_ceil(BLOCK_BYTES) {
            return Err(LogFault::BehindEnd);
        }
        let block_end = lblk.0.saturating_add(1).saturating_mul(BLOCK_BYTES);
        if end_bytes > block_end.min(self.end_bytes) {
            return Err(LogFault::EndsElsewhere { end_bytes });
        }
        if generation > self.generation {
            return Err(LogFault::FromLater { found: generation });
        }
        if data.len() != BLOCK_SIZE {
            return Err(LogFault::Length { bytes: data.len() });
        }
        if crc32c::crc32c(data) != crc {
            return Err(LogFault::Checksum);
        }
        self.next = lblk.0 + 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use endio_types::VOLUME_BYTES_MAX;

    use super::*;

    static DATA: [u8; BLOCK_SIZE] = [7; BLOCK_SIZE];
    const BLOCKS: u64 = 10;

    fn reader() -> LogReader {
        LogReader::new(Generation(5), BLOCKS * BLOCK_BYTES)
    }

    fn block(lblk: u64) -> ReadBlock<'static> {
        ReadBlock {
            lblk: Lblk(lblk),
            end_bytes: lblk.saturating_add(1).saturating_mul(BLOCK_BYTES),
            crc: crc32c::crc32c(&DATA),
            generation: Generation(4),
            data: &DATA,
        }
    }

    /// What becomes of these blocks, one behind the other.
    fn taken(blocks: &[u64]) -> Vec<Result<(), LogFault>> {
        let mut reader = reader();
        blocks.iter().map(|lblk| reader.take(block(*lblk))).collect()
    }

    #[test]
    fn blocks_that_ascend_are_taken_and_the_next_answer_is_asked_for_behind_them() {
        let mut reader = reader();
        assert_eq!(reader.next(), Some(Lblk(0)));
        for lblk in [0, 1, 5, 8] {
            assert_eq!(reader.take(block(lblk)), Ok(()));
            assert_eq!(reader.next(), Some(Lblk(lblk + 1)));
        }
        assert_eq!(reader.take(block(9)), Ok(()));
        assert_eq!(reader.next(), None, "nothing can be behind the last block");
    }

    #[test]
    fn a_block_that_comes_twice_or_too_late_is_refused() {
        let back = |expected| Err(LogFault::GoesBack { expected: Lblk(expected) });
        assert_eq!(taken(&[3, 3]), [Ok(()), back(4)]);
        assert_eq!(taken(&[3, 2]), [Ok(()), back(4)]);
        assert_eq!(taken(&[9, 0]), [Ok(()), back(10)]);
    }

    #[test]
    fn a_block_behind_the_end_is_refused_wherever_it_is() {
        for lblk in [BLOCKS, BLOCKS + 1, 1 << 52, u64::MAX - 1, u64::MAX] {
            assert_eq!(taken(&[lblk]), [Err(LogFault::BehindEnd)], "{lblk}");
        }
        let grows = |end_bytes| LogReader::new(Generation(5), end_bytes);
        let last = VOLUME_BYTES_MAX / BLOCK_BYTES - 1;
        assert_eq!(grows(VOLUME_BYTES_MAX).take(block(last)), Ok(()));
        assert_eq!(grows(VOLUME_BYTES_MAX).take(block(last + 1)), Err(LogFault::BehindEnd));
        // A conversion that says nonsense of the size, too.
        assert_eq!(grows(u64::MAX).take(block(u64::MAX)), Err(LogFault::BehindEnd));
        let mut vast = grows(u64::MAX);
        assert_eq!(vast.take(block((1 << 52) - 1)), Ok(()));
        assert_eq!(vast.next(), None);
        assert_eq!(grows(0).next(), None);
        assert_eq!(grows(0).take(block(0)), Err(LogFault::BehindEnd));
    }

    #[test]
    fn data_ends_in_its_block_and_in_the_volume() {
        let ends = |size, lblk, end_bytes| {
            LogReader::new(Generation(5), size).take(ReadBlock { end_bytes, ..block(lblk) })
        };
        let elsewhere = |end_bytes| Err(LogFault::EndsElsewhere { end_bytes });
        let size = BLOCKS * BLOCK_BYTES;
        assert_eq!(ends(size, 3, 4 * BLOCK_BYTES), Ok(()));
        assert_eq!(ends(size, 3, 0), Ok(()));
        assert_eq!(ends(size, 3, 4 * BLOCK_BYTES + 1), elsewhere(4 * BLOCK_BYTES + 1));
        assert_eq!(ends(size, 3, u64::MAX), elsewhere(u64::MAX));
        let odd = 3 * BLOCK_BYTES + 100;
        assert_eq!(ends(odd, 3, odd), Ok(()));
        assert_eq!(ends(odd, 3, odd + 1), elsewhere(odd + 1));
    }

    #[test]
    fn what_was_written_under_a_generation_that_is_yet_to_come_is_refused() {
        let under = |generation| {
            reader().take(ReadBlock { generation: Generation(generation), ..block(1) })
        };
        assert_eq!((under(0), under(4), under(5)), (Ok(()), Ok(()), Ok(())));
        assert_eq!(under(6), Err(LogFault::FromLater { found: Generation(6) }));
    }

    #[test]
    fn data_that_is_not_a_block_or_not_what_was_logged_is_refused() {
        let short = &DATA[1..];
        let sealed =
            |data: &'static [u8]| ReadBlock { data, crc: crc32c::crc32c(data), ..block(1) };
        let bytes = BLOCK_SIZE - 1;
        assert_eq!(reader().take(sealed(short)), Err(LogFault::Length { bytes }));
        assert_eq!(reader().take(sealed(&[])), Err(LogFault::Length { bytes: 0 }));
        let flipped = ReadBlock { crc: block(1).crc ^ 1, ..block(1) };
        assert_eq!(reader().take(flipped), Err(LogFault::Checksum));
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let mut reader = reader();
        assert_eq!(reader.take(block(3)), Ok(()));
        for lblk in [2, 3, BLOCKS, u64::MAX] {
            assert!(reader.take(block(lblk)).is_err());
        }
        assert_eq!(reader.next(), Some(Lblk(4)));
        assert_eq!(reader.take(block(4)), Ok(()));
    }
}
