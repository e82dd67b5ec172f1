//! What waits for a peer, packed into batches that it can take.

use std::mem;

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::grpc::Streamed;
use crate::handle::{Outgoing, Stream as Session};

/// Messages put into one batch of a stream.
const BATCH_MAX: usize = 512;
/// Longest batch in bytes, unless a single message is longer. A writeback takes 4.25 MiB, a block-store and
/// the tools 16: half of the least, since longer batches save nothing any more.
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Field number and length of a message in a batch, at most.
const FRAME_BYTES: usize = 6;

/// Cuts messages into batches, in their order.
pub(crate) struct Batcher<P> {
    batch: Vec<P>,
    bytes: usize,
}

impl<P> Default for Batcher<P> {
    fn default() -> Self {
        Self { batch: Vec::new(), bytes: 0 }
    }
}

impl<P: Message> Batcher<P> {
    /// Adds a message; the batch before it if the two do not fit together.
    pub(crate) fn push(&mut self, message: P) -> Option<Vec<P>> {
        let bytes = message.encoded_len() + FRAME_BYTES;
        let full = if self.bytes + bytes > BATCH_BYTES_MAX { self.take() } else { None };
        self.bytes += bytes;
        self.batch.push(message);
        full
    }

    /// What was added since the last batch; `None`: nothing.
    pub(crate) fn take(&mut self) -> Option<Vec<P>> {
        self.bytes = 0;
        Some(mem::take(&mut self.batch)).filter(|batch| !batch.is_empty())
    }
}

/// Packs what waits into batches.
pub(crate) fn batches<M, S, P, B>(
    session: Session<M, S>,
    encode: impl Fn(M, u64) -> Result<P, Status> + Send + 'static,
    pack: impl Fn(Vec<P>) -> B + Send + 'static,
) -> Streamed<B>
where
    M: Send + 'static,
    S: Send + 'static,
    P: Message + 'static,
    B: Send + 'static,
{
    let Session { mut outgoing, .. } = session;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        let mut taken = Vec::new();
        let mut batcher = Batcher::default();
        loop {
            let received = tokio::select! {
                biased;
                () = sender.closed() => return,
                received = outgoing.recv_many(&mut taken, BATCH_MAX) => received,
            };
            if received == 0 {
                return;
            }
            let mut end = None;
            for message in taken.drain(..) {
                let encoded = match message {
                    Outgoing::Message(message, convert_us) => encode(message, convert_us),
                    Outgoing::Fail(status) => Err(status),
                };
                let full = match encoded {
                    Ok(message) => batcher.push(message),
                    Err(status) => {
                        end = Some(status);
                        break;
                    }
                };
                if let Some(full) = full
                    && sender.send(Ok(pack(full))).await.is_err()
                {
                    return;
                }
            }
            if let Some(rest) = batcher.take()
                && sender.send(Ok(pack(rest))).await.is_err()
            {
                return;
            }
            if let Some(status) = end {
                // The peer may be gone already.
                drop(sender.send(Err(status)).await);
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

#[cfg(test)]
mod tests {
    use endio_api::common::{Extent, Place};
    use endio_api::conversion::conversion_message::Message as Said;
    use endio_api::conversion::{ConversionBatch, ConversionMessage, ListExtentsResponse};
    use endio_api::{convert, status};
    use endio_state_machine::machine::{StoreInfo, ToWriteback, WritebackSession};
    use endio_types::{Incarnation, StoreId};
    use futures_util::StreamExt;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn store(id: u32, round: u64) -> StoreInfo {
        StoreInfo {
            id: StoreId(id),
            uuid: [7; 16],
            url: format!("http://store-{id}.storage.example.org:7003"),
            incarnation: Incarnation(1),
            capacity_blocks: round,
            free_blocks: 1 << 30,
            mapped_blocks: 1 << 30,
            reserved_blocks: 1 << 20,
            quarantined_blocks: 1 << 20,
            live: true,
            lease_left_ms: 5_000,
        }
    }

    fn batches_of(messages: Vec<Outgoing<ToWriteback>>) -> Streamed<ConversionBatch> {
        let (sender, outgoing) = mpsc::channel(messages.len());
        let fail = sender.downgrade();
        for message in messages {
            assert!(sender.try_send(message).is_ok());
        }
        let ended = CancellationToken::new();
        let session = Session { session: WritebackSession(1), outgoing, fail, ended };
        batches(session, convert::to_writeback, |messages| ConversionBatch { messages })
    }

    fn rounds(message: &ConversionMessage) -> Option<u64> {
        match &message.message {
            Some(Said::Stores(list)) => list.stores.first().map(|store| store.capacity_blocks),
            _ => None,
        }
    }

    /// After a restart each of many stores comes back, and each time the whole list is told.
    #[tokio::test]
    async fn batches_stay_short_however_long_their_messages_are() {
        let list = |round| (1..=200).map(|id| store(id, round)).collect();
        let told = |round| Outgoing::Message(ToWriteback::Stores(list(round)), 0);
        let mut messages: Vec<_> = (0..300).map(told).collect();
        messages.push(Outgoing::Fail(status::malformed("stream", "the end")));
        let mut stream = batches_of(messages);
        let mut told = Vec::new();
        let mut batches = 0;
        let end = loop {
            match stream.next().await {
                Some(Ok(batch)) => {
                    assert!(batch.encoded_len() <= BATCH_BYTES_MAX, "{}", batch.encoded_len());
                    told.extend(batch.messages.iter().map(rounds));
                    batches += 1;
                }
                end => break end,
            }
        };
        assert!(matches!(end, Some(Err(_))), "what was said before the failure comes before it");
        assert!(stream.next().await.is_none());
        assert!((2..20).contains(&batches), "{batches} batches");
        assert_eq!(told, (0..300).map(Some).collect::<Vec<_>>());
    }

    #[test]
    fn a_message_that_is_too_long_goes_alone() {
        let extent = |blocks: u64| Extent { crc32c: vec![7; blocks as usize], ..Extent::default() };
        let mut batcher = Batcher::default();
        assert_eq!(batcher.push(extent(1)), None);
        let long = BATCH_BYTES_MAX as u64;
        assert_eq!(batcher.push(extent(long)).map(|batch| batch.len()), Some(1));
        assert_eq!(batcher.push(extent(1)).map(|batch| batch.len()), Some(1));
        assert_eq!(batcher.take().map(|batch| batch.len()), Some(1));
        assert_eq!(batcher.take(), None);
    }

    /// Blocks that are all extents of their own, with as many copies and as large numbers as there are.
    #[test]
    fn a_step_of_a_fragmented_volume_is_told_in_several_messages() {
        let place = Place { store: u32::MAX, pblk: u64::MAX };
        let extent = |lblk| Extent {
            lblk,
            blocks: 1,
            state: 1,
            places: vec![place; 3],
            crc32c: vec![u32::MAX],
        };
        let mut batcher = Batcher::default();
        let extents = (0..1 << 16).map(|n| extent((1 << 48) + n));
        let mut messages: Vec<_> = extents.filter_map(|extent| batcher.push(extent)).collect();
        messages.extend(batcher.take());
        assert!(messages.len() > 1);
        let mut count = 0;
        for extents in messages {
            count += extents.len();
            let answer = ListExtentsResponse { extents };
            assert!(answer.encoded_len() <= BATCH_BYTES_MAX, "{}", answer.encoded_len());
        }
        assert_eq!(count, 1 << 16);
    }
}
