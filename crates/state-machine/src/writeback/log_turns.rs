//! Whose turn it is to send dirty blocks to the data log, and what goes with them.
//!
//! A flush takes what all that ask meanwhile want, too, and few messages of a volume are under way at once:
//! what waits for one of them to end then goes together, in one message and one commit.

use super::Lsn;
use super::dirty::{DirtyMap, LogPick, TooMuch};

/// What bounds a message, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// That the data log holds of the volume.
    pub volume_blocks_max: u64,
    /// Of one message; 0: none may go.
    pub message_blocks_max: u64,
}

/// What comes next for whoever wants data in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next<D> {
    /// This goes in one message, and with it all up to a record. The caller owes [`LogTurns::ended`].
    Send(LogPick<D>, Lsn),
    /// Enough messages are under way: what waits meanwhile goes together.
    Wait,
    /// Everything is on its way into the log, or to the stores, or is more than may go.
    Nothing,
}

/// The messages of one volume to the data log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogTurns {
    messages_max: usize,
    under_way: usize,
    wanted: Lsn,
}

impl LogTurns {
    /// At most so many messages are under way at once. One: conversion idles while the answer travels.
    /// More than a few: each carries little, and costs what a large one costs.
    pub fn new(messages_max: usize) -> Self {
        Self { messages_max, under_way: 0, wanted: Lsn(0) }
    }

    /// Whether another message may be sent.
    pub fn has_room(&self) -> bool {
        self.under_way < self.messages_max
    }

    /// What comes next for somebody who wants what is dirty up to a record, and whether the stores are to
    /// have all of that: it is too much for the log, or the log is to have room again in time.
    pub fn next<D: Clone>(
        &mut self,
        dirty: &mut DirtyMap<D>,
        up_to: Lsn,
        bounds: Bounds,
    ) -> (Next<D>, bool) {
        if !dirty.pending_up_to(up_to) {
            return (Next::Nothing, false);
        }
        self.wanted = self.wanted.max(up_to);
        if !self.has_room() {
            return (Next::Wait, false);
        }
        let room = bounds.volume_blocks_max.saturating_sub(dirty.logged_blocks());
        let limit = room.min(bounds.message_blocks_max);
        let mut taken = self.wanted;
        let pick = match dirty.gather_for_log(taken, limit) {
            Err(TooMuch) if taken > up_to => {
                taken = up_to;
                dirty.gather_for_log(up_to, limit)
            }
            pick => pick,
        };
        let is_much = pick.is_err() || dirty.logged_blocks() > bounds.volume_blocks_max / 2;
        let next = match pick {
            Ok(Some(pick)) => {
                self.under_way += 1;
                Next::Send(pick, taken)
            }
            Ok(None) | Err(TooMuch) => Next::Nothing,
        };
        (next, is_much)
    }

    /// A message has ended, whatever came of it.
    pub fn ended(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use endio_types::{BLOCK_BYTES, LblkRange};

    use super::*;

    const BOUNDS: Bounds = Bounds { volume_blocks_max: 64, message_blocks_max: 8 };

    fn dirty(map: &mut DirtyMap<u32>, lblk: u64, lsn: u64) {
        let end_bytes = (lblk + 1) * BLOCK_BYTES;
        let data = vec![lsn as u32];
        map.insert(LblkRange::new(lblk, 1), Lsn(lsn), end_bytes, data).expect("as much data");
    }

    fn sent(turn: (Next<u32>, bool)) -> (Vec<u64>, Lsn, bool) {
        let (Next::Send(pick, up_to), is_much) = turn else { panic!("nothing goes: {turn:?}") };
        (pick.blocks.iter().map(|block| block.lblk.0).collect(), up_to, is_much)
    }

    #[test]
    fn what_waits_while_enough_messages_are_under_way_goes_together() {
        let (mut turns, mut map) = (LogTurns::new(1), DirtyMap::new());
        dirty(&mut map, 1, 1);
        assert_eq!(sent(turns.next(&mut map, Lsn(1), BOUNDS)), (vec![1], Lsn(1), false));
        for lsn in 2..5 {
            dirty(&mut map, lsn, lsn);
            assert_eq!(turns.next(&mut map, Lsn(lsn), BOUNDS), (Next::Wait, false));
        }
        turns.ended();
        // The first that looks again sends for all of them.
        assert_eq!(sent(turns.next(&mut map, Lsn(2), BOUNDS)), (vec![2, 3, 4], Lsn(4), false));
        turns.ended();
        assert_eq!(turns.next(&mut map, Lsn(4), BOUNDS), (Next::Nothing, false), "on their way");
        assert!(turns.has_room());
    }

    #[test]
    fn who_wants_little_is_not_held_up_by_who_wants_too_much() {
        let (mut turns, mut map) = (LogTurns::new(1), DirtyMap::new());
        for lblk in 0..12 {
            dirty(&mut map, lblk, lblk + 1);
        }
        assert_eq!(
            turns.next(&mut map, Lsn(12), BOUNDS),
            (Next::Nothing, true),
            "the stores' turn"
        );
        assert!(turns.has_room(), "nothing went");
        assert_eq!(sent(turns.next(&mut map, Lsn(3), BOUNDS)), (vec![0, 1, 2], Lsn(3), false));
    }

    #[test]
    fn a_log_that_is_half_full_asks_for_the_stores() {
        let (mut turns, mut map) = (LogTurns::new(2), DirtyMap::new());
        let bounds = Bounds { volume_blocks_max: 4, message_blocks_max: 8 };
        for (lblk, is_much) in [(0, false), (1, false), (2, true), (3, true)] {
            dirty(&mut map, lblk, lblk + 1);
            let turn = turns.next(&mut map, Lsn(lblk + 1), bounds);
            let Next::Send(pick, _) = &turn.0 else { panic!("nothing goes: {turn:?}") };
            assert_eq!((lblk, turn.1), (lblk, is_much));
            map.log_ended(pick.number, true);
            turns.ended();
        }
        dirty(&mut map, 9, 9);
        assert_eq!(turns.next(&mut map, Lsn(9), bounds), (Next::Nothing, true), "it is full");
        let none = Bounds { message_blocks_max: 0, ..BOUNDS };
        assert_eq!(turns.next(&mut map, Lsn(9), none), (Next::Nothing, true), "none may go");
    }
}
