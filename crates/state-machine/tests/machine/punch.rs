//! When free blocks are given back to the host, and when they are used again before that.

use endio_state_machine::free_space::{Search, StoreSpace};
use endio_state_machine::limits::Limits;
use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

fn punching() -> Limits {
    Limits {
        punch_interval_ms: 10,
        punch_run_blocks: 4,
        punch_idle_ms: 100,
        unpunched_blocks_max: 50,
        reuse_blocks: 1_000,
        ..limits()
    }
}

/// A volume of which 40 blocks are written, one after the other on the host.
fn written(limits: Limits) -> (Rig, VolumeInfo) {
    let mut rig = Rig::with_limits(1, 200, limits);
    let volume = rig.volume("v", 100, 1);
    rig.write(&volume, 0, 40);
    (rig, volume)
}

fn trim(rig: &mut Rig, volume: &VolumeInfo, lblk: u64, blocks: u64) {
    rig.change(volume, MapChange::Trim, lblk, blocks).unwrap();
    rig.confirm(volume);
    rig.drain();
}

/// What the store was told to punch since it was asked last: first block and length.
fn punched(rig: &mut Rig) -> Vec<(u64, u64)> {
    let sent = std::mem::take(&mut rig.sent);
    let ranges = sent.into_iter().filter_map(|kind| match kind {
        EffectKind::Store(_, ToStore::Punch { punch, ranges }) => Some((punch, ranges)),
        _ => None,
    });
    let mut all = Vec::new();
    for (punch, ranges) in ranges {
        all.extend(ranges.iter().map(|range| (range.start.0, range.len)));
        rig.store(1, FromStore::PunchDone { punch });
    }
    all
}

fn pass(rig: &mut Rig, ms: u64) {
    rig.advance(ms);
    rig.drain();
}

fn home(rig: &mut Rig, volume: &VolumeInfo, lblk: u64) -> u64 {
    let begun = rig.begin(volume, lblk, 1);
    rig.finish(&begun);
    begun.segments[0].token.pblk.0
}

#[test]
fn short_runs_are_punched_once_nobody_writes_and_long_ones_at_once() {
    let (mut rig, volume) = written(punching());
    trim(&mut rig, &volume, 0, 3);
    pass(&mut rig, 10);
    assert_eq!(punched(&mut rig), []);
    trim(&mut rig, &volume, 10, 4);
    assert_eq!(punched(&mut rig), []);
    pass(&mut rig, 10);
    assert_eq!(punched(&mut rig), [(10, 4)]);
    // The writes were done at 0, so at 99 the store is still being written to.
    pass(&mut rig, 79);
    assert_eq!(punched(&mut rig), []);
    pass(&mut rig, 10);
    assert_eq!(punched(&mut rig), [(0, 3)]);
    rig.assert_sound();
}

#[test]
fn a_write_puts_the_punch_of_short_runs_off() {
    let (mut rig, volume) = written(punching());
    trim(&mut rig, &volume, 0, 3);
    pass(&mut rig, 90);
    rig.write(&volume, 50, 1);
    pass(&mut rig, 90);
    assert_eq!(punched(&mut rig), []);
    pass(&mut rig, 20);
    assert_eq!(punched(&mut rig), [(0, 3)]);
}

#[test]
fn beyond_their_bound_short_runs_are_punched_while_others_write() {
    let (mut rig, volume) = written(Limits { unpunched_blocks_max: 3, ..punching() });
    trim(&mut rig, &volume, 0, 3);
    pass(&mut rig, 10);
    assert_eq!(punched(&mut rig), []);
    trim(&mut rig, &volume, 10, 1);
    pass(&mut rig, 10);
    assert_eq!(punched(&mut rig), [(0, 3), (10, 1)]);
    rig.assert_sound();
}

#[test]
fn many_unpunched_blocks_are_used_again_before_others() {
    let (mut rig, volume) = written(Limits { reuse_blocks: 4, ..punching() });
    trim(&mut rig, &volume, 0, 3);
    // Few: neighbours of the volume stay neighbours.
    assert_eq!(home(&mut rig, &volume, 60), 40);
    trim(&mut rig, &volume, 10, 2);
    assert_eq!(home(&mut rig, &volume, 61), 0);
    assert_eq!(home(&mut rig, &volume, 62), 1);
    // Three are left, so it goes on where it was.
    assert_eq!(home(&mut rig, &volume, 63), 41);
    rig.assert_sound();
}

#[test]
fn what_finds_no_unpunched_run_of_its_length_is_not_cut_into_pieces() {
    let (mut rig, volume) = written(Limits { reuse_blocks: 1, ..punching() });
    for lblk in [0, 10, 20] {
        trim(&mut rig, &volume, lblk, 3);
    }
    let begun = rig.begin(&volume, 60, 4);
    assert_eq!((begun.segments.len(), begun.segments[0].token.pblk.0), (1, 40));
    rig.finish(&begun);
    let begun = rig.begin(&volume, 70, 3);
    assert_eq!((begun.segments.len(), begun.segments[0].token.pblk.0), (1, 0));
    rig.finish(&begun);
    rig.assert_sound();
}

/// What the host never gave may be taken back without harm; what it gave must not be forgotten.
#[test]
fn what_was_allocated_and_never_granted_is_punched_again() {
    let search = Search { runs: 4, reuse_blocks: 1 };
    let mut space = StoreSpace::empty(10);
    let run = space.allocate(4, search).unwrap();
    assert_eq!(space.map_reserved(run), Ok(true));
    space.quarantine_mapped(run).unwrap();
    space.release(run, false).unwrap();
    assert_eq!((space.allocate(4, search), space.unpunched()), (Some(run), 0));
    space.unallocate(run);
    assert_eq!((space.free(), space.unpunched()), (10, 4));
    assert_eq!(space.take_unpunched(5, 9, 9), []);
    assert_eq!(space.take_unpunched(4, 9, 3), [PblkRange::new(0, 3)]);
}
