//! What a log holds at start, read piece by piece.

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;

use bytes::Bytes;
use endio_state_machine::writeback::Lsn;
use endio_state_machine::writeback::sessions::SessionSnapshot;
use endio_types::{LblkRange, VolumeId};

use super::api::{CacheLogError, OpenVolume, ReplayedWrite, together};
use super::disk::Disk;
use super::scan::{Found, Scan, segment_name};

/// The writes of a log that are not known to be converted, oldest first. Holds no payload; where one has live
/// blocks, it is read when it is asked for, and checked again.
pub struct Replay {
    power_lost: bool,
    losses: BTreeSet<VolumeId>,
    torn_bytes: u64,
    sessions: SessionSnapshot,
    volumes: Vec<OpenVolume>,
    last: Lsn,
    writes: VecDeque<Remaining>,
}

struct Remaining {
    found: Found,
    live: Vec<LblkRange>,
    unconverted: Vec<LblkRange>,
    path: PathBuf,
}

impl Replay {
    pub(super) fn new(
        disk: &dyn Disk,
        scan: &Scan,
        power_lost: bool,
        losses: BTreeSet<VolumeId>,
    ) -> Self {
        let mut writes = VecDeque::new();
        let hidden = scan.hidden.by_record();
        for found in &scan.writes {
            let (lsn, write) = (found.header.lsn, found.header.write());
            let live = scan.live.parts(lsn, write.volume, write.blocks);
            let hidden = hidden.get(&lsn).map_or(&[][..], Vec::as_slice);
            let unconverted = together(&live, hidden);
            // One block may hold together with what only the data log has of the same write.
            let may_join = write.blocks.len > 1 && !unconverted.is_empty();
            if !live.is_empty() || may_join {
                let path = disk.path(&segment_name(found.number));
                writes.push_back(Remaining { found: found.clone(), live, unconverted, path });
            }
        }
        let volumes = scan
            .volumes
            .iter()
            .map(|(volume, (name, generation))| OpenVolume {
                volume: *volume,
                name: name.clone(),
                generation: *generation,
            })
            .collect();
        Self {
            power_lost,
            losses,
            torn_bytes: scan.torn_bytes,
            sessions: scan.sessions.snapshot(),
            volumes,
            last: scan.last,
            writes,
        }
    }

    /// The log was not closed and the machine has restarted since: the newest records may be
    /// missing.
    pub fn power_lost(&self) -> bool {
        self.power_lost
    }

    /// Acknowledged writes of a volume may be missing, and its clients are to be told: since a power loss
    /// in which it was open, or because it was noted ([`CacheLog::note_loss`](super::CacheLog::note_loss)).
    /// Still true at later starts, until somebody was told
    /// ([`CacheLog::loss_told`](super::CacheLog::loss_told)); a volume that is closed after a power loss has to
    /// be noted.
    pub fn may_have_lost(&self, volume: VolumeId) -> bool {
        self.losses.contains(&volume)
    }

    /// All volumes of which that is so, open or not.
    pub fn losses(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.losses.iter().copied()
    }

    /// Bytes that were cut off as a torn tail.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// All requests that the log knows as applied, those of the replayed writes included.
    pub fn sessions(&self) -> &SessionSnapshot {
        &self.sessions
    }

    /// Volumes that were open when the log ended, by id.
    pub fn open_volumes(&self) -> &[OpenVolume] {
        &self.volumes
    }

    /// Newest record found; 0: none.
    pub fn last_lsn(&self) -> Lsn {
        self.last
    }

    /// Blocks that the remaining writes make dirty.
    pub fn remaining_blocks(&self) -> u64 {
        self.writes.iter().flat_map(|write| &write.live).map(|range| range.len).sum()
    }

    /// The next write, or `None` after the last.
    ///
    /// # Errors
    /// [`CacheLogError::Io`], [`CacheLogError::Damaged`]: the payload changed since the log was
    /// opened. The write is not skipped: the next call tries it again.
    pub fn next_write(&mut self) -> Result<Option<ReplayedWrite>, CacheLogError> {
        let Some(Remaining { found, live, unconverted, path }) = self.writes.front() else {
            return Ok(None);
        };
        let (lsn, write) = (found.header.lsn, found.header.write());
        let (live, unconverted) = (live.clone(), unconverted.clone());
        if live.is_empty() {
            self.writes.pop_front();
            return Ok(Some(ReplayedWrite {
                lsn,
                write,
                live,
                unconverted,
                payload: Bytes::new(),
            }));
        }
        let mut payload = vec![0; found.header.payload_len as usize];
        found
            .file
            .read_at(found.payload_at, &mut payload)
            .map_err(|source| CacheLogError::Io { path: path.clone(), source })?;
        if crc32c::crc32c(&payload) != found.header.payload_crc {
            return Err(CacheLogError::Damaged {
                path: path.clone(),
                offset: found.payload_at,
                what: "the payload changed since the log was opened".into(),
            });
        }
        self.writes.pop_front();
        let payload = Bytes::from(payload);
        Ok(Some(ReplayedWrite { lsn, write, live, unconverted, payload }))
    }
}
