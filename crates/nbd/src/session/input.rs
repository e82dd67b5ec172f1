//! The bytes of a client, and the moment at which all that were received have been used.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, ReadHalf};
use tokio::sync::watch;

use super::{EndReason, HangUp, STEP, Stream};
use crate::seats::Seat;
use crate::transmission::payload_buffer;

/// The readable half and what was read ahead.
pub(super) struct Input {
    stream: ReadHalf<Box<dyn Stream>>,
    bytes: BytesMut,
    /// Newer connections of the export that wait for this one.
    asked: watch::Receiver<u64>,
    seat: Arc<Seat>,
    hang_up: Arc<dyn HangUp>,
}

impl Input {
    pub(super) fn new(
        stream: ReadHalf<Box<dyn Stream>>,
        bytes: BytesMut,
        seat: Arc<Seat>,
        hang_up: Arc<dyn HangUp>,
    ) -> Self {
        Self { stream, bytes, asked: seat.asked(), seat, hang_up }
    }

    /// What was read ahead.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads until `length` bytes are buffered. Cancel-safe.
    pub(super) async fn fill(&mut self, length: usize) -> Result<(), EndReason> {
        while self.bytes.len() < length {
            self.bytes.reserve(STEP);
            self.something_came(None).await?;
        }
        Ok(())
    }

    /// Reads once: into a payload at most what it lacks, or ahead. While nothing comes, everything
    /// that was received has begun, and newer connections are told so. Cancel-safe.
    async fn something_came(
        &mut self,
        payload: Option<(&mut BytesMut, u64)>,
    ) -> Result<(), EndReason> {
        let Self { stream, bytes, asked, seat, hang_up } = self;
        let (into, most) = payload.unwrap_or((bytes, u64::MAX));
        let mut stream = stream.take(most);
        loop {
            let settled = seat.settled();
            tokio::select! {
                biased;
                read = stream.read_buf(into) => match read.map_err(EndReason::Io)? {
                    0 => return Err(EndReason::Closed),
                    _ => return Ok(()),
                },
                newest = newest_beyond(asked, settled) => match hang_up.has_unread() {
                    true => tokio::task::yield_now().await,
                    false => seat.settle(newest),
                },
            }
        }
    }

    /// Drops `head` bytes, then takes `length` bytes into a buffer of their own, so that a small
    /// payload that is kept for long does not keep a large buffer.
    pub(super) async fn take(
        &mut self,
        head: usize,
        length: u64,
    ) -> Result<bytes::Bytes, EndReason> {
        self.bytes.advance(head);
        let mut payload = payload_buffer(length);
        let ahead = self.bytes.len().min(length as usize);
        payload.extend_from_slice(&self.bytes.split_to(ahead));
        while (payload.len() as u64) < length {
            let left = length - payload.len() as u64;
            self.something_came(Some((&mut payload, left))).await?;
        }
        Ok(payload.freeze())
    }

    /// Throws `length` bytes away.
    pub(super) async fn skip(&mut self, mut length: u64) -> Result<(), EndReason> {
        while length > 0 {
            self.fill(1).await?;
            let step = (self.bytes.len() as u64).min(length);
            self.bytes.advance(step as usize);
            length -= step;
        }
        Ok(())
    }
}

/// Waits until a newer connection than `settled` asks. Cancel-safe.
async fn newest_beyond(asked: &mut watch::Receiver<u64>, settled: u64) -> u64 {
    let newest = asked.wait_for(|asked| *asked > settled).await.map(|newest| *newest);
    match newest {
        Ok(newest) => newest,
        // The sender is in the seat, which the reader holds.
        Err(_) => std::future::pending().await,
    }
}
