//! Data of small flushes.

use bytes::Bytes;
use endio_state_machine::data_log::LogEntry;
use endio_state_machine::machine::*;
use endio_types::*;

use crate::rig::*;

/// Sends a block to the data log; why it was refused.
fn log(rig: &mut Rig, volume: &VolumeInfo, number: u64, lblk: u64) -> Option<Reason> {
    let data = Bytes::from(vec![number as u8; BLOCK_SIZE]);
    let (crc, end_bytes) = (crc32c::crc32c(&data), (lblk + 1) * BLOCK_BYTES);
    let entries = vec![LogEntry { lblk: Lblk(lblk), end_bytes, crc, stamp: number }];
    let (volume, generation, request) = (volume.id, volume.generation, number);
    let from = rig.sent.len();
    rig.say(FromWriteback::Log(LogData { request, volume, generation, number, entries, data }));
    rig.commit();
    let answer = rig.sent[from..].iter().find_map(|kind| match kind {
        EffectKind::Writeback(_, ToWriteback::Logged { .. }) => Some(None),
        EffectKind::Writeback(_, ToWriteback::Refused { refusal, .. }) => {
            Some(Some(refusal.reason))
        }
        _ => None,
    });
    answer.expect("the message was answered")
}

/// The sender of a message to the log was held up until a later write-out had overtaken it.
#[test]
fn what_comes_for_the_log_behind_an_io_end_that_was_to_end_it_is_refused() {
    let mut rig = Rig::new(1, 64);
    let volume = rig.volume("v", 16, 1);
    assert_eq!(log(&mut rig, &volume, 1, 3), None);
    let begin = BeginIo { logged_up_to: 2, ..begin_io(&volume, 3, 1) };
    let begun = rig.try_begin(begin).unwrap();
    rig.finish(&begun);
    assert_eq!(rig.machine.volume("v").unwrap().logged_blocks, 0);
    assert_eq!(log(&mut rig, &volume, 2, 3), Some(Reason::WrongState));
    assert_eq!(log(&mut rig, &volume, 3, 3), None, "it is newer");
    rig.assert_sound();
}
