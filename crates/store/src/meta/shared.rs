//! What the parts of one open metadata directory share: numbers, and the ballast against a full
//! disk.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::api::{DirLock, MetaOptions};
use super::vfs::Vfs;
use super::{MetaError, names};

/// Numbers of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct JournalStats {
    /// Last durable record; 0 if there is none.
    pub durable_seq: u64,
    /// Length of the journal that a restart would replay, in bytes.
    pub bytes_since_checkpoint: u64,
    /// Size of the last checkpoint, in bytes.
    pub checkpoint_bytes: u64,
    /// Groups committed since open: one `fdatasync` each.
    pub commits: u64,
    /// Whether the disk is full or nearly so: accepted work still commits, new work is to be
    /// refused with `METADATA_FULL`.
    pub degraded: bool,
}

#[derive(Default)]
struct Numbers {
    stats: JournalStats,
    /// Bytes of journal written before the running checkpoint began.
    before_running_checkpoint: u64,
    /// Free bytes that the table last asked for in vain; 0 if it got what it asked for.
    table_needs: u64,
}

pub(crate) struct Shared {
    pub(crate) vfs: Arc<dyn Vfs>,
    pub(crate) options: MetaOptions,
    pub(crate) database: u64,
    _lock: DirLock,
    numbers: Mutex<Numbers>,
    /// Backups that are being taken: no file is dropped meanwhile.
    backups: Mutex<u32>,
}

impl Shared {
    pub(crate) fn new(
        vfs: Arc<dyn Vfs>,
        options: MetaOptions,
        database: u64,
        lock: DirLock,
    ) -> Self {
        Self {
            vfs,
            options,
            database,
            _lock: lock,
            numbers: Mutex::default(),
            backups: <_>::default(),
        }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of backups that are being taken, held still.
    pub(crate) fn backups(&self) -> MutexGuard<'_, u32> {
        self.backups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> JournalStats {
        self.numbers().stats
    }

    pub(crate) fn set_start(&self, durable_seq: u64, journal_bytes: u64, checkpoint_bytes: u64) {
        let mut numbers = self.numbers();
        numbers.stats.durable_seq = durable_seq;
        numbers.stats.bytes_since_checkpoint = journal_bytes;
        numbers.stats.checkpoint_bytes = checkpoint_bytes;
    }

    pub(crate) fn committed(&self, durable_seq: u64, bytes: u64) {
        let mut numbers = self.numbers();
        numbers.stats.durable_seq = durable_seq;
        numbers.stats.bytes_since_checkpoint += bytes;
        numbers.stats.commits += 1;
    }

    pub(crate) fn checkpoint_began(&self) {
        let mut numbers = self.numbers();
        numbers.before_running_checkpoint = numbers.stats.bytes_since_checkpoint;
    }

    pub(crate) fn checkpoint_finished(&self, bytes: u64) {
        let mut numbers = self.numbers();
        let before = std::mem::take(&mut numbers.before_running_checkpoint);
        let since = &mut numbers.stats.bytes_since_checkpoint;
        *since = since.saturating_sub(before);
        numbers.stats.checkpoint_bytes = bytes;
    }

    /// Makes the ballast if the disk has room for it and as much again; otherwise the directory
    /// is degraded. Returns whether it is.
    pub(crate) fn restore_ballast(&self) -> bool {
        let bytes = self.options.ballast_bytes;
        let made = bytes == 0 || self.ballast_is_whole() || self.make_ballast(bytes);
        let free = self.free_bytes();
        let mut numbers = self.numbers();
        let roomy = free >= bytes.max(numbers.table_needs);
        let degraded = !(made && roomy);
        if numbers.stats.degraded != degraded {
            if degraded {
                tracing::warn!("the metadata disk is full: new work is refused");
            } else {
                tracing::info!("the metadata disk has room again");
            }
        }
        numbers.stats.degraded = degraded;
        degraded
    }

    fn ballast_is_whole(&self) -> bool {
        matches!(self.vfs.len(names::BALLAST), Ok(len) if len == self.options.ballast_bytes)
    }

    fn make_ballast(&self, bytes: u64) -> bool {
        if self.free_bytes() < bytes.saturating_mul(2) {
            return false;
        }
        if self.vfs.reserve(names::BALLAST, bytes).is_err() {
            // A part of it would be taken for the whole at the next start.
            let _ = self.vfs.remove(names::BALLAST);
            return false;
        }
        true
    }

    /// Gives the ballast up; `false` if there was none.
    pub(crate) fn drop_ballast(&self) -> bool {
        let dropped = self.vfs.remove(names::BALLAST).is_ok();
        let mut numbers = self.numbers();
        if !numbers.stats.degraded {
            tracing::warn!(ballast = dropped, "the metadata disk is full: new work is refused");
        }
        numbers.stats.degraded = true;
        dropped
    }

    pub(crate) fn is_degraded(&self) -> bool {
        self.stats().degraded && self.restore_ballast()
    }

    /// Whether the table may hand data to sled: it does not survive a full disk, so it never sees
    /// one.
    pub(crate) fn has_room_for_table(&self, bytes: u64) -> bool {
        if self.options.ballast_bytes == 0 {
            return true;
        }
        let needed = bytes.saturating_mul(2).saturating_add(self.options.ballast_bytes);
        let enough = self.free_bytes() >= needed;
        let mut numbers = self.numbers();
        numbers.table_needs = if enough { 0 } else { needed };
        numbers.stats.degraded |= !enough;
        enough
    }

    pub(crate) fn has_room_for_checkpoint(&self) -> bool {
        let reserve = self.options.ballast_bytes;
        let needed = self.stats().checkpoint_bytes.saturating_add(reserve);
        reserve == 0 || (!self.lives_on_ballast() && self.free_bytes() >= needed)
    }

    /// Whether the ballast was given up: what is free now is for commits alone.
    pub(crate) fn lives_on_ballast(&self) -> bool {
        let is_needed = self.options.ballast_bytes > 0 && self.stats().degraded;
        is_needed && !self.ballast_is_whole()
    }

    fn free_bytes(&self) -> u64 {
        self.vfs.free_bytes().unwrap_or(0)
    }

    pub(crate) fn fail(&self, what: &'static str, name: &str, source: io::Error) -> MetaError {
        fault(self.vfs.as_ref(), what, name, source)
    }
}

/// Keeps every file of the journal and every checkpoint until it is dropped.
pub(crate) struct Pin(Arc<Shared>);

impl Pin {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        *shared.backups() += 1;
        Self(Arc::clone(shared))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        *self.0.backups() -= 1;
    }
}

/// The error of a file operation, with the file's name.
pub(crate) fn fault(vfs: &dyn Vfs, what: &'static str, name: &str, source: io::Error) -> MetaError {
    let path = vfs.path(name);
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            MetaError::NoSpace { what, path }
        }
        _ => MetaError::Io { what, path, source },
    }
}

/// Reads the numbers of a journal from any thread.
#[derive(Clone)]
pub struct JournalHandle(pub(crate) Arc<Shared>);

impl JournalHandle {
    /// The numbers now.
    pub fn stats(&self) -> JournalStats {
        self.0.stats()
    }
    /// Whether new work is to be refused because the metadata disk is full. Looks at the disk
    /// while it is, so it becomes `false` by itself when there is room again.
    pub fn is_degraded(&self) -> bool {
        self.0.is_degraded()
    }
}
