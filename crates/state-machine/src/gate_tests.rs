#![allow(clippy::unwrap_used)]

use endio_types::Pblk;
use proptest::prelude::*;

use super::*;

const LEASE_MS: u64 = 1_000;
const NOW: Millis = Millis(500);

fn key(epoch: u64) -> TokenKey {
    TokenKey::new([epoch as u8; 32])
}

fn registration(epoch: u64) -> Registration {
    Registration {
        store: StoreId(7),
        epoch: ClusterEpoch(epoch),
        key: key(epoch),
        lease_ms: LEASE_MS,
        io_end_floor: IoEndId(10),
    }
}

fn limits() -> GateLimits {
    GateLimits { lease_margin_ms: 100, ..GateLimits::default() }
}

/// Registered at time 0 under epoch 3, 100 blocks.
fn gate_with(limits: GateLimits) -> Gate {
    let mut gate = Gate::new(Incarnation(4), 100, limits);
    let cleared = gate.register(Millis(0), registration(3)).unwrap();
    assert_eq!(cleared, [Cleared::Epoch(ClusterEpoch(3))]);
    gate
}

fn gate() -> Gate {
    gate_with(limits())
}

fn unsigned(io_end: u64) -> Token {
    Token {
        epoch: ClusterEpoch(3),
        io_end: IoEndId(io_end),
        segment: SegmentIndex(1),
        volume: VolumeId(5),
        generation: Generation(2),
        store: StoreId(7),
        incarnation: Incarnation(4),
        pblk: Pblk(0),
        blocks: 1,
        lease_ms: 1_000,
        mac: [0; 16],
    }
}

fn token(io_end: u64) -> Token {
    unsigned(io_end).signed(&key(3))
}

fn grant(epoch: u64, generation: u64) -> ReadGrant {
    ReadGrant::new(&key(epoch), ClusterEpoch(epoch), VolumeId(5), Generation(generation))
}

fn admit(gate: &mut Gate, token: &Token) -> Result<Admit, Reason> {
    gate.admit_bio(NOW, token, u64::from(token.blocks) * BLOCK_BYTES)
}

fn write(gate: &mut Gate, token: &Token) -> FlightId {
    match admit(gate, token) {
        Ok(Admit::Write(flight)) => flight,
        other => panic!("not admitted: {other:?}"),
    }
}

fn read(gate: &mut Gate, generation: u64, range: PblkRange) -> Result<FlightId, Reason> {
    gate.admit_read(NOW, &grant(3, generation), range)
}

#[test]
fn nothing_is_admitted_before_the_store_is_registered() {
    let mut gate = Gate::new(Incarnation(4), 100, limits());
    assert_eq!(admit(&mut gate, &token(10)), Err(Reason::NotReady));
    assert_eq!(read(&mut gate, 2, PblkRange::new(0, 1)), Err(Reason::NotReady));
    assert_eq!(gate.punch(1, vec![PblkRange::new(0, 1)]), Err(Reason::NotReady));
}

/// Scenario 10.
#[test]
fn a_token_that_is_not_for_here_and_now_is_refused_with_its_reason() {
    let mut gate = gate();
    let good = unsigned(10);
    let signed = [
        (Token { epoch: ClusterEpoch(2), ..good }, Reason::OldEpoch),
        (Token { epoch: ClusterEpoch(4), ..good }, Reason::NotReady),
        (Token { store: StoreId(8), ..good }, Reason::UnknownStore),
        (Token { incarnation: Incarnation(3), ..good }, Reason::OldIncarnation),
        (Token { incarnation: Incarnation(5), ..good }, Reason::OldIncarnation),
        (Token { segment: SegmentIndex::SUBMITTER, ..good }, Reason::Malformed),
        (Token { blocks: 0, ..good }, Reason::OutOfRange),
        (Token { pblk: Pblk(100), ..good }, Reason::OutOfRange),
        (Token { pblk: Pblk(99), blocks: 2, ..good }, Reason::OutOfRange),
        (Token { pblk: Pblk(u64::MAX), blocks: u32::MAX, ..good }, Reason::OutOfRange),
        (Token { io_end: IoEndId(9), ..good }, Reason::UnknownIoEnd),
    ];
    for (token, expected) in signed {
        let token = token.signed(&key(token.epoch.0));
        assert_eq!(admit(&mut gate, &token), Err(expected), "{token:?}");
    }
    let forged = Token { pblk: Pblk(1), ..good.signed(&key(3)) };
    assert_eq!(admit(&mut gate, &forged), Err(Reason::ForgedToken));
    for bytes in [0, BLOCK_BYTES - 1, BLOCK_BYTES + 1, u64::MAX] {
        assert_eq!(gate.admit_bio(NOW, &token(10), bytes), Err(Reason::Malformed));
    }
    assert_eq!(gate.in_flight(), 0);
    let last = Token { pblk: Pblk(99), ..good }.signed(&key(3));
    assert!(matches!(admit(&mut gate, &last), Ok(Admit::Write(_))));
}

#[test]
fn a_read_that_is_not_for_here_and_now_is_refused_with_its_reason() {
    let mut gate = gate();
    let block = PblkRange::new(0, 1);
    assert_eq!(gate.admit_read(NOW, &grant(2, 2), block), Err(Reason::OldEpoch));
    assert_eq!(gate.admit_read(NOW, &grant(4, 2), block), Err(Reason::NotReady));
    let forged = ReadGrant { volume: VolumeId(6), ..grant(3, 2) };
    assert_eq!(gate.admit_read(NOW, &forged, block), Err(Reason::ForgedToken));
    assert_eq!(read(&mut gate, 2, PblkRange::new(0, 0)), Err(Reason::OutOfRange));
    assert_eq!(read(&mut gate, 2, PblkRange::new(99, 2)), Err(Reason::OutOfRange));
    assert_eq!(read(&mut gate, 2, PblkRange::new(u64::MAX, 2)), Err(Reason::OutOfRange));
    read(&mut gate, 2, PblkRange::new(99, 1)).unwrap();
}

#[test]
fn a_repeated_token_is_answered_with_the_first_outcome_and_never_admitted_again() {
    for outcome in [Ok(()), Err(Reason::IoError)] {
        let mut gate = gate();
        let flight = write(&mut gate, &token(10));
        assert_eq!(admit(&mut gate, &token(10)), Ok(Admit::Pending(flight)));
        assert_eq!(gate.finish(flight, outcome), []);
        assert_eq!(gate.finish(flight, Err(Reason::Limit)), []);
        assert_eq!(admit(&mut gate, &token(10)), Ok(Admit::Repeat(outcome)));
        gate.renewed(NOW, LEASE_MS, IoEndId(11));
        assert_eq!(admit(&mut gate, &token(10)), Err(Reason::UnknownIoEnd));
    }
}

#[test]
fn a_token_below_a_floor_that_rose_while_it_was_in_flight_is_not_admitted_again() {
    let mut gate = gate();
    let flight = write(&mut gate, &token(10));
    gate.renewed(NOW, LEASE_MS, IoEndId(11));
    assert_eq!(admit(&mut gate, &token(10)), Ok(Admit::Pending(flight)));
    gate.finish(flight, Ok(()));
    assert_eq!(admit(&mut gate, &token(10)), Err(Reason::UnknownIoEnd));
}

/// Scenario 50.
#[test]
fn nothing_is_admitted_within_the_margin_before_the_end_of_the_lease() {
    let mut gate = gate();
    let block = PblkRange::new(0, 1);
    let last = Millis(LEASE_MS - 101);
    let late = Millis(LEASE_MS - 100);
    assert!(gate.admit_bio(last, &token(10), BLOCK_BYTES).is_ok());
    assert!(gate.admit_read(last, &grant(3, 2), block).is_ok());
    assert_eq!(gate.admit_bio(late, &token(11), BLOCK_BYTES), Err(Reason::LeaseExpired));
    assert_eq!(gate.admit_read(late, &grant(3, 2), block), Err(Reason::LeaseExpired));
    // The lease counts from when the renewal was sent, not from when its answer came.
    gate.renewed(Millis(1), LEASE_MS, IoEndId(10));
    assert!(gate.admit_bio(late, &token(11), BLOCK_BYTES).is_ok());
    // An answer that overtook another one takes nothing back.
    gate.renewed(Millis(0), LEASE_MS, IoEndId(10));
    assert!(gate.admit_bio(late, &token(12), BLOCK_BYTES).is_ok());
}

#[test]
fn a_margin_takes_at_most_a_quarter_of_a_lease() {
    let mut gate = gate_with(GateLimits { lease_margin_ms: 5_000, ..limits() });
    assert!(gate.is_leased(Millis(LEASE_MS / 4 * 3 - 1)));
    assert!(!gate.is_leased(Millis(LEASE_MS / 4 * 3)));
    gate.renewed(Millis(u64::MAX), u64::MAX, IoEndId(10));
    assert!(gate.is_leased(Millis(u64::MAX - 1)));
}

/// Scenario 43.
#[test]
fn a_fence_refuses_what_it_names_and_is_cleared_when_that_has_drained() {
    let mut gate = gate();
    let named = write(&mut gate, &token(10));
    let other = write(&mut gate, &token(11));
    assert_eq!(gate.fence(1, &[IoEndId(10), IoEndId(12)], &[]), Ok(vec![]));
    let second = Token { segment: SegmentIndex(2), ..unsigned(10) }.signed(&key(3));
    assert_eq!(admit(&mut gate, &second), Err(Reason::Aborted));
    assert_eq!(admit(&mut gate, &token(12)), Err(Reason::Aborted));
    assert_eq!(gate.finish(other, Ok(())), []);
    assert_eq!(gate.finish(named, Ok(())), [Cleared::Fence(1)]);
    assert_eq!(gate.fence(2, &[IoEndId(10)], &[]), Ok(vec![Cleared::Fence(2)]));
}

/// Scenarios 43 and 61.
#[test]
fn a_fenced_generation_is_refused_for_bios_and_reads_and_the_next_one_is_not() {
    let mut gate = gate();
    let bio = write(&mut gate, &token(10));
    let old_read = read(&mut gate, 2, PblkRange::new(0, 1)).unwrap();
    let new_read = read(&mut gate, 3, PblkRange::new(0, 1)).unwrap();
    assert_eq!(gate.fence(1, &[], &[(VolumeId(5), Generation(3))]), Ok(vec![]));
    // An older fence takes nothing back.
    assert_eq!(gate.fence(2, &[], &[(VolumeId(5), Generation(2))]), Ok(vec![Cleared::Fence(2)]));
    assert_eq!(admit(&mut gate, &token(11)), Err(Reason::OldGeneration));
    assert_eq!(read(&mut gate, 2, PblkRange::new(0, 1)), Err(Reason::OldGeneration));
    read(&mut gate, 3, PblkRange::new(0, 1)).unwrap();
    assert_eq!(gate.finish(new_read, Ok(())), []);
    assert_eq!(gate.finish(bio, Ok(())), []);
    assert_eq!(gate.finish(old_read, Ok(())), [Cleared::Fence(1)]);
}

/// Scenarios 55 and 56.
#[test]
fn a_new_epoch_refuses_the_old_one_at_once_and_admits_its_own_after_the_drain() {
    let mut gate = gate();
    let bio = write(&mut gate, &token(10));
    let reading = read(&mut gate, 2, PblkRange::new(0, 1)).unwrap();
    assert_eq!(gate.fence(9, &[IoEndId(10)], &[]), Ok(vec![]));
    assert_eq!(gate.register(Millis(0), registration(4)), Ok(vec![]));
    let new = Token { epoch: ClusterEpoch(4), ..unsigned(20) }.signed(&key(4));
    assert_eq!(admit(&mut gate, &token(11)), Err(Reason::OldEpoch));
    assert_eq!(admit(&mut gate, &new), Err(Reason::NotReady));
    assert!(!gate.is_ready());
    assert_eq!(gate.finish(reading, Ok(())), []);
    // The fence died with the epoch that asked for it.
    assert_eq!(gate.finish(bio, Ok(())), [Cleared::Epoch(ClusterEpoch(4))]);
    assert!(matches!(admit(&mut gate, &new), Ok(Admit::Write(_))));
    assert_eq!(gate.register(Millis(0), registration(3)), Err(Reason::OldEpoch));
    let elsewhere = Registration { store: StoreId(8), ..registration(5) };
    assert_eq!(gate.register(Millis(0), elsewhere), Err(Reason::WrongState));
}

#[test]
fn a_second_registration_in_the_same_epoch_keeps_fences_and_outcomes() {
    let mut gate = gate();
    let flight = write(&mut gate, &token(10));
    let waiting = write(&mut gate, &token(11));
    gate.finish(flight, Ok(()));
    gate.fence(1, &[IoEndId(11), IoEndId(12)], &[]).unwrap();
    let again = gate.register(Millis(0), registration(3)).unwrap();
    assert_eq!(again, [Cleared::Epoch(ClusterEpoch(3))]);
    assert_eq!(admit(&mut gate, &token(10)), Ok(Admit::Repeat(Ok(()))));
    assert_eq!(admit(&mut gate, &token(12)), Err(Reason::Aborted));
    assert_eq!(gate.finish(waiting, Ok(())), [Cleared::Fence(1)]);
}

#[test]
fn a_punch_waits_for_what_is_in_flight_there_and_keeps_bios_away() {
    let mut gate = gate();
    let there = write(&mut gate, &token(10));
    let reading = read(&mut gate, 2, PblkRange::new(0, 5)).unwrap();
    let beside = read(&mut gate, 2, PblkRange::new(1, 5)).unwrap();
    assert_eq!(gate.punch(1, vec![PblkRange::new(0, 1), PblkRange::new(50, 2)]), Ok(vec![]));
    let into = Token { pblk: Pblk(51), ..unsigned(11) }.signed(&key(3));
    assert_eq!(admit(&mut gate, &into), Err(Reason::WrongState));
    assert_eq!(gate.finish(there, Ok(())), []);
    let cleared = gate.finish(reading, Ok(()));
    let [Cleared::Punch(turn)] = cleared.as_slice() else { panic!("{cleared:?}") };
    assert_eq!(turn.ranges, [PblkRange::new(0, 1), PblkRange::new(50, 2)]);
    assert_eq!(admit(&mut gate, &into), Err(Reason::WrongState));
    assert_eq!(gate.punched(turn), []);
    assert!(matches!(admit(&mut gate, &into), Ok(Admit::Write(_))));
    gate.finish(beside, Ok(()));
    assert_eq!(gate.punch(2, vec![PblkRange::new(99, 2)]), Err(Reason::OutOfRange));
}

#[test]
fn a_new_epoch_waits_for_a_punch_under_way_and_drops_one_that_waits() {
    let mut gate = gate();
    let bio = write(&mut gate, &token(10));
    gate.punch(1, vec![PblkRange::new(0, 1)]).unwrap();
    let cleared = gate.punch(2, vec![PblkRange::new(9, 1)]).unwrap();
    let [Cleared::Punch(turn)] = cleared.as_slice() else { panic!("{cleared:?}") };
    assert_eq!(gate.register(Millis(0), registration(4)), Ok(vec![]));
    assert_eq!(gate.finish(bio, Ok(())), []);
    assert_eq!(gate.punched(turn), [Cleared::Epoch(ClusterEpoch(4))]);
    let new = Token { epoch: ClusterEpoch(4), ..unsigned(20) }.signed(&key(4));
    assert!(matches!(admit(&mut gate, &new), Ok(Admit::Write(_))));
}

#[test]
fn a_punch_that_is_sent_again_is_not_carried_out_again() {
    let mut gate = gate();
    let ranges = vec![PblkRange::new(0, 2)];
    let cleared = gate.punch(5, ranges.clone()).unwrap();
    let [Cleared::Punch(turn)] = cleared.as_slice() else { panic!("{cleared:?}") };
    // The session broke: it comes again while it is under way, and after its end.
    gate.register(Millis(0), registration(3)).unwrap();
    assert_eq!(gate.punch(5, ranges.clone()), Ok(vec![]));
    assert_eq!(gate.punched(turn), []);
    let bio = write(&mut gate, &token(10));
    assert_eq!(gate.finish(bio, Ok(())), []);
    assert_eq!(gate.punch(5, ranges.clone()), Ok(vec![Cleared::Punched(5)]));
    assert_eq!(gate.punch(4, ranges.clone()), Ok(vec![]));
    assert!(matches!(admit(&mut gate, &token(11)), Ok(Admit::Write(_))), "nothing is punched");
    // The next epoch counts anew.
    let cleared = gate.register(Millis(0), registration(4)).unwrap();
    assert_eq!(cleared, []);
    assert_eq!(gate.punch(5, vec![PblkRange::new(9, 1)]).unwrap().len(), 1);
}

#[test]
fn bios_and_reads_above_the_limit_are_refused_until_one_has_ended() {
    let mut gate = gate_with(GateLimits { in_flight_max: 2, ..limits() });
    let first = write(&mut gate, &token(10));
    read(&mut gate, 2, PblkRange::new(0, 1)).unwrap();
    assert_eq!(admit(&mut gate, &token(11)), Err(Reason::Limit));
    assert_eq!(read(&mut gate, 2, PblkRange::new(0, 1)), Err(Reason::Limit));
    gate.finish(first, Ok(()));
    write(&mut gate, &token(11));
}

#[test]
fn outcomes_above_the_limit_are_forgotten_and_their_io_ends_refused() {
    let mut gate = gate_with(GateLimits { seen_max: 4, ..limits() });
    for io_end in 10..100 {
        let flight = write(&mut gate, &token(io_end));
        gate.finish(flight, Ok(()));
        assert!(gate.seen.len() <= 5);
    }
    assert_eq!(admit(&mut gate, &token(10)), Err(Reason::UnknownIoEnd));
    assert_eq!(admit(&mut gate, &token(99)), Ok(Admit::Repeat(Ok(()))));
}

#[test]
fn fenced_io_ends_above_the_limit_are_refused_by_a_higher_floor() {
    let mut gate = gate_with(GateLimits { fenced_io_ends_max: 2, ..limits() });
    let in_flight = write(&mut gate, &token(20));
    let fenced: Vec<_> = (20..25).map(IoEndId).collect();
    assert_eq!(gate.fence(1, &fenced, &[]), Ok(vec![]));
    assert!(gate.fenced_io_ends.len() <= 2);
    for io_end in 20..25 {
        let other = Token { segment: SegmentIndex(9), ..unsigned(io_end) }.signed(&key(3));
        admit(&mut gate, &other).unwrap_err();
    }
    assert_eq!(gate.finish(in_flight, Ok(())), [Cleared::Fence(1)]);
    write(&mut gate, &token(25));
}

#[test]
fn a_fence_of_too_many_volumes_is_never_cleared() {
    let mut gate = gate_with(GateLimits { fenced_volumes_max: 1, ..limits() });
    let volumes = [(VolumeId(1), Generation(2)), (VolumeId(5), Generation(3))];
    assert_eq!(gate.fence(1, &[], &volumes), Err(Reason::Limit));
    assert_eq!(gate.fence(2, &[], &volumes[..1]), Ok(vec![Cleared::Fence(2)]));
}

/// The same rules, slow and obvious: nothing is ever forgotten.
#[derive(Default)]
struct Oracle {
    epoch: u64,
    floor: u64,
    fenced: Vec<u64>,
    generations: Vec<u64>,
    written: Vec<(u64, u64)>,
    in_flight: Vec<(FlightId, u64, Option<u64>, u64)>,
    fences: Vec<(u64, u64, Vec<u64>, u64)>,
}

impl Oracle {
    fn may_write(&self, epoch: u64, io_end: u64, generation: u64) -> bool {
        epoch == self.epoch
            && !self.in_flight.iter().any(|flight| flight.1 != self.epoch)
            && io_end >= self.floor
            && !self.fenced.contains(&io_end)
            && !self.written.contains(&(epoch, io_end))
            && self.generations.iter().all(|lowest| generation >= *lowest)
    }

    /// Fences of this epoch that wait for nothing.
    fn clear_fences(&mut self) -> Vec<u64> {
        let in_flight = std::mem::take(&mut self.in_flight);
        let is_clear = |fence: &mut (u64, u64, Vec<u64>, u64)| {
            !in_flight.iter().any(|(id, _, io_end, generation)| {
                let is_older = *id < FlightId(fence.3);
                let is_named = io_end.is_some_and(|io_end| fence.2.contains(&io_end));
                is_older && (is_named || *generation < fence.1)
            })
        };
        let mut cleared: Vec<_> =
            self.fences.extract_if(.., is_clear).map(|fence| fence.0).collect();
        self.in_flight = in_flight;
        cleared.sort_unstable();
        cleared
    }
}

#[derive(Clone, Debug)]
enum Step {
    Bio { epoch: u64, io_end: u64, generation: u64 },
    Read { generation: u64 },
    Finish { index: usize },
    Fence { io_ends: Vec<u64>, generation: u64 },
    Epoch,
    Floor { io_end: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let io_end = || 10..30_u64;
    prop_oneof![
        6 => (1..4_u64, io_end(), 1..5_u64)
            .prop_map(|(epoch, io_end, generation)| Step::Bio { epoch, io_end, generation }),
        2 => (1..5_u64).prop_map(|generation| Step::Read { generation }),
        6 => (0..20_usize).prop_map(|index| Step::Finish { index }),
        2 => (prop::collection::vec(io_end(), 0..3), 0..4_u64)
            .prop_map(|(io_ends, generation)| Step::Fence { io_ends, generation }),
        1 => Just(Step::Epoch),
        1 => (8..20_u64).prop_map(|io_end| Step::Floor { io_end }),
    ]
}

fn fences(cleared: Vec<Cleared>) -> Vec<u64> {
    let fence = |cleared| match cleared {
        Cleared::Fence(fence) => Some(fence),
        _ => None,
    };
    let mut fences: Vec<_> = cleared.into_iter().filter_map(fence).collect();
    fences.sort_unstable();
    fences
}

proptest! {
    #[test]
    fn random_histories_agree_with_a_gate_that_forgets_nothing(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut gate = Gate::new(Incarnation(4), 100, limits());
        gate.register(Millis(0), registration(1)).unwrap();
        let mut oracle = Oracle { epoch: 1, floor: 10, ..Oracle::default() };
        for (number, step) in (0..).zip(steps) {
            match step {
                Step::Bio { epoch, io_end, generation } => {
                    let token = Token {
                        epoch: ClusterEpoch(epoch),
                        generation: Generation(generation),
                        ..unsigned(io_end)
                    }
                    .signed(&key(epoch));
                    let may = oracle.may_write(epoch, io_end, generation);
                    let admitted = admit(&mut gate, &token);
                    prop_assert_eq!(matches!(admitted, Ok(Admit::Write(_))), may, "{:?}", admitted);
                    if let Ok(Admit::Write(flight)) = admitted {
                        oracle.written.push((epoch, io_end));
                        oracle.in_flight.push((flight, epoch, Some(io_end), generation));
                    }
                }
                Step::Read { generation } => {
                    let grant = grant(oracle.epoch, generation);
                    let range = PblkRange::new(0, 1);
                    if let Ok(flight) = gate.admit_read(NOW, &grant, range) {
                        oracle.in_flight.push((flight, oracle.epoch, None, generation));
                    }
                }
                Step::Finish { index } if !oracle.in_flight.is_empty() => {
                    let index = index % oracle.in_flight.len();
                    let (flight, ..) = oracle.in_flight.remove(index);
                    let cleared = fences(gate.finish(flight, Ok(())));
                    prop_assert_eq!(cleared, oracle.clear_fences());
                }
                Step::Finish { .. } => {}
                Step::Fence { io_ends, generation } => {
                    let named: Vec<_> = io_ends.iter().copied().map(IoEndId).collect();
                    let volumes = [(VolumeId(5), Generation(generation))];
                    let cleared = fences(gate.fence(number, &named, &volumes).unwrap());
                    oracle.fenced.extend(&io_ends);
                    oracle.generations.push(generation);
                    oracle.fences.push((number, generation, io_ends, gate.next_flight));
                    prop_assert_eq!(cleared, oracle.clear_fences());
                }
                Step::Epoch => {
                    oracle.epoch += 1;
                    oracle.fenced.clear();
                    oracle.generations.clear();
                    oracle.fences.clear();
                    gate.register(Millis(0), registration(oracle.epoch)).unwrap();
                }
                Step::Floor { io_end } => {
                    oracle.floor = oracle.floor.max(io_end);
                    gate.renewed(Millis(0), LEASE_MS, IoEndId(io_end));
                }
            }
            prop_assert_eq!(gate.in_flight(), oracle.in_flight.len());
            let is_drained = oracle.in_flight.iter().all(|flight| flight.1 == oracle.epoch);
            prop_assert_eq!(gate.is_ready(), is_drained);
        }
    }
}
