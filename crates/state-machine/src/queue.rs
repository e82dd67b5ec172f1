//! Queues of io_ends that wait for conversion: per lane and volume in order of release, fair
//! between volumes.
//!
//! # Invariants
//! * `wake-on-edge`: the converter is woken when a queue goes from empty to non-empty, and only
//!   then; what is pushed while it is awake is found by the same turn.

use std::collections::{BTreeMap, VecDeque};

use endio_types::{IoEndId, VolumeId};

/// One lane. Bounded by the io_ends that may be in flight.
#[derive(Clone, Debug, Default)]
pub struct LaneQueue {
    volumes: BTreeMap<VolumeId, VecDeque<IoEndId>>,
    /// Each volume with something queued, once, in the order in which they are served.
    turns: VecDeque<VolumeId>,
    len: usize,
}

impl LaneQueue {
    /// Appends; returns whether the lane was empty, i.e. whether the converter must be woken.
    pub fn push(&mut self, volume: VolumeId, io_end: IoEndId) -> bool {
        let queue = self.volumes.entry(volume).or_default();
        if queue.is_empty() {
            self.turns.push_back(volume);
        }
        queue.push_back(io_end);
        self.len += 1;
        self.len == 1
    }

    /// Takes the oldest of the volume whose turn it is; the volume goes to the end of the line.
    pub fn pop(&mut self) -> Option<(VolumeId, IoEndId)> {
        let volume = self.turns.front().copied()?;
        let io_end = self.pop_of(volume)?;
        if self.turns.front() == Some(&volume) {
            self.turns.rotate_left(1);
        }
        Some((volume, io_end))
    }

    /// Takes the oldest of one volume.
    pub fn pop_of(&mut self, volume: VolumeId) -> Option<IoEndId> {
        let io_end = self.volumes.get(&volume)?.front().copied()?;
        self.remove(volume, io_end);
        Some(io_end)
    }

    /// Takes one out of the line; `false`: it was not queued.
    pub fn remove(&mut self, volume: VolumeId, io_end: IoEndId) -> bool {
        let Some(queue) = self.volumes.get_mut(&volume) else { return false };
        let Some(at) = queue.iter().position(|queued| *queued == io_end) else { return false };
        queue.remove(at);
        if queue.is_empty() {
            self.volumes.remove(&volume);
            self.turns.retain(|turn| *turn != volume);
        }
        self.len -= 1;
        true
    }

    /// What one volume has queued, oldest first.
    pub fn of(&self, volume: VolumeId) -> impl Iterator<Item = IoEndId> + '_ {
        self.volumes.get(&volume).into_iter().flatten().copied()
    }

    /// Number queued.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario 63.
    #[test]
    fn ten_thousand_pushes_wake_the_converter_once_and_strand_nothing() {
        let mut queue = LaneQueue::default();
        let wakes = (1..=10_000).filter(|n| queue.push(VolumeId(1), IoEndId(*n))).count();
        assert_eq!(wakes, 1);
        let taken: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(_, id)| id.0).collect();
        assert_eq!(taken, (1..=10_000).collect::<Vec<_>>());
        assert!(queue.push(VolumeId(1), IoEndId(10_001)));
    }

    /// Scenario 63, checked on every history of up to seven steps. The converter sleeps only after
    /// it has found nothing; a push wakes it only if it says so. Then work never lies beside a
    /// sleeping converter, and each volume's io_ends come out once and in order.
    #[test]
    fn no_history_of_seven_steps_leaves_work_beside_a_sleeping_converter() {
        const STEPS: u32 = 7;
        const KINDS: u32 = 5;
        for history in 0..KINDS.pow(STEPS) {
            let (mut queue, mut is_awake, mut next) = (LaneQueue::default(), false, 1);
            let mut model: Vec<(VolumeId, IoEndId)> = Vec::new();
            for step in 0..STEPS {
                match history / KINDS.pow(step) % KINDS {
                    kind @ (0 | 1) => {
                        let new = (VolumeId(u64::from(kind)), IoEndId(next));
                        next += 1;
                        let wakes = queue.push(new.0, new.1);
                        assert_eq!(wakes, model.is_empty(), "a wake-up per edge, and only there");
                        is_awake |= wakes;
                        model.push(new);
                    }
                    // An abort takes one out of the middle or the end.
                    kind @ (2 | 3) => {
                        let at = if kind == 2 { 0 } else { model.len().saturating_sub(1) };
                        if let Some((volume, id)) = model.get(at).copied() {
                            assert!(queue.remove(volume, id));
                            model.remove(at);
                        }
                    }
                    _ if is_awake => match queue.pop() {
                        None => is_awake = false,
                        Some(taken) => {
                            let oldest = model.iter().position(|(volume, _)| *volume == taken.0);
                            assert_eq!(oldest.map(|at| model.remove(at)), Some(taken));
                        }
                    },
                    _ => {}
                }
                assert_eq!(queue.len(), model.len());
                assert!(is_awake || queue.is_empty(), "stranded in history {history}");
            }
            let left = std::iter::from_fn(|| queue.pop()).count();
            assert_eq!(left, model.len());
        }
    }

    #[test]
    fn volumes_take_turns_and_keep_their_order() {
        let mut queue = LaneQueue::default();
        for (volume, id) in [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)] {
            queue.push(VolumeId(volume), IoEndId(id));
        }
        let taken: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(_, id)| id.0).collect();
        assert_eq!(taken, [1, 4, 2, 5, 3]);
    }

    #[test]
    fn what_was_removed_is_not_popped() {
        let mut queue = LaneQueue::default();
        queue.push(VolumeId(1), IoEndId(1));
        queue.push(VolumeId(1), IoEndId(2));
        assert!(queue.remove(VolumeId(1), IoEndId(1)));
        assert!(!queue.remove(VolumeId(1), IoEndId(1)));
        assert_eq!(queue.pop(), Some((VolumeId(1), IoEndId(2))));
        assert!(queue.is_empty());
    }
}
