//! Whole blocks out of bytes that begin or end inside a block.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, ByteRange, LblkRange};
use tokio::time::Instant;

use super::{Engine, Piece};
use crate::failure::Failure;
use crate::volume::Volume;

impl Engine {
    /// The blocks that `bytes` touches, with `data` over what they hold now. The caller holds the
    /// lock of these blocks, so what an edge holds does not change before it is written back.
    ///
    /// # Errors
    /// As a read of the edges.
    pub(super) async fn merge(
        &self,
        volume: &Arc<Volume>,
        bytes: ByteRange,
        data: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        if bytes.is_aligned() {
            return Ok(data);
        }
        let blocks = bytes.blocks();
        // A request's length is bounded, so its blocks fit in memory.
        let mut whole = BytesMut::zeroed(blocks.len as usize * BLOCK_SIZE);
        let skip = (bytes.offset % BLOCK_BYTES) as usize;
        let end = skip + data.len();
        let last = blocks.end() - 1;
        let tail_at = (blocks.len as usize - 1) * BLOCK_SIZE;
        if skip > 0 {
            let held = self.edge(volume, blocks.start.0, deadline).await?;
            fill(&mut whole[..BLOCK_SIZE], held);
        }
        let head_is_tail = blocks.len == 1 && skip > 0;
        if !end.is_multiple_of(BLOCK_SIZE) && !head_is_tail {
            let held = self.edge(volume, last, deadline).await?;
            fill(&mut whole[tail_at..], held);
        }
        whole[skip..end].copy_from_slice(&data);
        Ok(whole.freeze())
    }

    async fn edge(
        &self,
        volume: &Arc<Volume>,
        lblk: u64,
        deadline: Instant,
    ) -> Result<Vec<Piece>, Failure> {
        self.read_whole(volume, LblkRange::new(lblk, 1), deadline).await
    }
}

/// Copies pieces over a block of zeroes.
fn fill(block: &mut [u8], pieces: Vec<Piece>) {
    let mut at = 0;
    for piece in pieces {
        let len = usize::try_from(piece.len()).unwrap_or(usize::MAX).min(block.len() - at);
        if let Piece::Data(data) = piece {
            block[at..at + len].copy_from_slice(&data[..len]);
        }
        at += len;
    }
}
