//! What conversion has not been told yet, or has not answered.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use endio_api::conversion::{
    FenceDone, PunchDone, SegmentRelease, StoreMessage, StoreReady, store_message::Message,
};
use endio_chassis::trace::Span;
use endio_types::{ClusterEpoch, IoEndId};

/// io_end and segment.
pub(crate) type Key = (u64, u32);

/// Releases are kept until they are answered and sent again in the next session of the same epoch.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Item>,
    unanswered: BTreeMap<Key, Held>,
}

#[derive(Debug)]
struct Held {
    release: SegmentRelease,
    /// Ends with conversion's answer.
    span: Span,
    began: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Item {
    Release(Key),
    FenceDone(u64),
    PunchDone(u64),
}

impl Outbox {
    /// Keeps a release until it is answered.
    pub(crate) fn release(&mut self, key: Key, release: SegmentRelease, span: Span) {
        if self.unanswered.insert(key, Held { release, span, began: Instant::now() }).is_none() {
            self.queue.push_back(Item::Release(key));
        }
    }

    pub(crate) fn fence_done(&mut self, fence: u64) {
        self.queue.push_back(Item::FenceDone(fence));
    }

    pub(crate) fn punch_done(&mut self, punch: u64) {
        self.queue.push_back(Item::PunchDone(punch));
    }

    /// A release was answered: how long that took, and its span. `None`: it was not waited for.
    pub(crate) fn answered(&mut self, key: Key) -> Option<(Duration, Span)> {
        self.unanswered.remove(&key).map(|held| (held.began.elapsed(), held.span))
    }

    /// io_ends below have ended; nobody waits for their releases.
    pub(crate) fn forget_below(&mut self, floor: IoEndId) {
        self.unanswered = self.unanswered.split_off(&(floor.0, 0));
    }

    /// Another epoch began: nobody waits for anything any more.
    pub(crate) fn forget_all(&mut self) {
        *self = Self::default();
    }

    /// A new session of the same epoch began: what is unanswered is sent once more.
    pub(crate) fn send_again(&mut self) {
        self.queue.retain(|item| !matches!(item, Item::Release(_)));
        self.queue.extend(self.unanswered.keys().copied().map(Item::Release));
    }

    pub(crate) fn has_unsent(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// Takes up to `max` messages that are to be sent, in order.
    pub(crate) fn take(&mut self, max: usize) -> Vec<StoreMessage> {
        let mut batch = Vec::with_capacity(max.min(self.queue.len()));
        while batch.len() < max
            && let Some(item) = self.queue.pop_front()
        {
            batch.extend(match item {
                // Forgotten meanwhile.
                Item::Release(key) => {
                    self.unanswered.get(&key).map(|held| Message::Release(held.release.clone()))
                }
                Item::FenceDone(fence) => Some(Message::FenceDone(FenceDone { fence })),
                Item::PunchDone(punch) => Some(Message::PunchDone(PunchDone { punch })),
            });
        }
        batch.into_iter().map(|message| StoreMessage { message: Some(message) }).collect()
    }
}

/// Says that everything older than `epoch` has drained.
pub(crate) fn ready(epoch: ClusterEpoch) -> StoreMessage {
    StoreMessage { message: Some(Message::Ready(StoreReady { cluster_epoch: epoch.0 })) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(io_ends: std::ops::Range<u64>) -> Outbox {
        let mut outbox = Outbox::default();
        for io_end in io_ends {
            outbox.release((io_end, 1), SegmentRelease::default(), Span::none());
        }
        outbox
    }

    #[test]
    fn an_unanswered_release_is_sent_again_and_an_answered_one_is_not() {
        let mut outbox = filled(1..4);
        assert_eq!(outbox.take(2).len(), 2);
        assert_eq!(outbox.take(9).len(), 1);
        assert!(!outbox.has_unsent());
        assert!(outbox.answered((2, 1)).is_some());
        assert!(outbox.answered((2, 1)).is_none());
        outbox.send_again();
        assert_eq!(outbox.take(9).len(), 2);
    }

    #[test]
    fn releases_below_the_floor_are_forgotten_and_the_one_at_it_is_not() {
        let mut outbox = filled(1..4);
        outbox.forget_below(IoEndId(3));
        assert_eq!((outbox.unanswered(), outbox.take(9).len()), (1, 1));
        outbox.fence_done(5);
        outbox.forget_all();
        assert!(!outbox.has_unsent());
    }
}
