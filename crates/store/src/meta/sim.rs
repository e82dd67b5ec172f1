//! A directory in memory that forgets what was not synced when its power is cut.
//!
//! Every operation counts; the power can be cut after any of them, and then every further one
//! fails until [`SimVfs::power_on`] decides, by a [`LossMode`], what the disk kept.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::vfs::{Vfs, VfsFile};

const SECTOR: usize = 512;

/// What a disk keeps of that which was not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LossMode {
    /// Nothing.
    Nothing,
    /// Everything.
    Everything,
    /// Of each file some prefix of what was appended; of the directory some prefix of its changes.
    Prefix,
    /// Any of the changed 512-byte sectors of each file, each for itself; all names.
    Sectors,
    /// All contents, but none of the changes to the directory.
    LostNames,
    /// All contents, and any of the changes to the directory, each for itself.
    SomeNames,
}

impl LossMode {
    /// Every mode.
    pub const ALL: [Self; 6] = [
        Self::Nothing,
        Self::Everything,
        Self::Prefix,
        Self::Sectors,
        Self::LostNames,
        Self::SomeNames,
    ];
}

#[derive(Clone, Default)]
struct Inode {
    live: Vec<u8>,
    synced: Vec<u8>,
    /// Whether anything but appending happened since the last sync.
    rewritten: bool,
}

impl Inode {
    fn sync(&mut self) {
        if self.rewritten {
            self.synced.clone_from(&self.live);
            self.rewritten = false;
        } else {
            self.synced.extend_from_slice(&self.live[self.synced.len()..]);
        }
    }
}

#[derive(Default)]
struct Disk {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    synced_names: BTreeMap<String, u64>,
    /// Each state of the directory since its last sync, oldest first.
    name_history: Vec<BTreeMap<String, u64>>,
    next_inode: u64,
    operations: u64,
    /// The power goes after this many operations.
    cut_after: Option<u64>,
    capacity: Option<u64>,
    /// Syncs that still succeed before one fails; `None` if none ever fails.
    syncs_before_failure: Option<u64>,
    locked: bool,
    /// Counts power cycles, so that handles of before stay dead.
    life: u64,
}

impl Disk {
    fn step(&mut self, life: u64) -> io::Result<()> {
        let dead = self.cut_after.is_some_and(|limit| self.operations >= limit);
        if dead || life != self.life {
            return Err(io::Error::other("the power is off"));
        }
        self.operations += 1;
        Ok(())
    }

    fn inode(&mut self, name: &str) -> io::Result<&mut Inode> {
        let id = self.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        self.inodes.get_mut(id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|id| self.inodes.get(id)).map(|i| i.live.len() as u64).sum()
    }

    fn free(&self) -> u64 {
        self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(self.used()))
    }

    fn names_changed(&mut self) {
        self.name_history.push(self.names.clone());
    }
}

/// The directory. Clones are the same directory.
#[derive(Clone, Default)]
pub struct SimVfs {
    disk: Arc<Mutex<Disk>>,
}

struct SimFile {
    disk: Arc<Mutex<Disk>>,
    inode: u64,
    life: u64,
}

struct SimLock {
    disk: Arc<Mutex<Disk>>,
    life: u64,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut disk = lock(&self.disk);
        if disk.life == self.life {
            disk.locked = false;
        }
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A small generator (xorshift64*), enough to scatter losses.
fn draw(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
}

fn surviving(inode: &Inode, mode: LossMode, random: &mut u64) -> Vec<u8> {
    let (live, synced) = (&inode.live, &inode.synced);
    match mode {
        _ if live == synced => live.clone(),
        LossMode::Nothing => synced.clone(),
        LossMode::Everything | LossMode::LostNames | LossMode::SomeNames => live.clone(),
        LossMode::Prefix if live.starts_with(synced) => {
            let more = (live.len() - synced.len()) as u64;
            live[..synced.len() + (draw(random) % (more + 1)) as usize].to_vec()
        }
        LossMode::Prefix => {
            if draw(random).is_multiple_of(2) {
                live.clone()
            } else {
                synced.clone()
            }
        }
        LossMode::Sectors => {
            let lengths = [live.len(), synced.len()];
            let len = lengths[(draw(random) % 2) as usize];
            let mut kept = vec![0; len];
            for (n, sector) in kept.chunks_mut(SECTOR).enumerate() {
                let source = if draw(random).is_multiple_of(2) { live } else { synced };
                let from = source.get(n * SECTOR..).unwrap_or_default();
                let part = from.len().min(sector.len());
                sector[..part].copy_from_slice(&from[..part]);
            }
            kept
        }
    }
}

impl SimVfs {
    /// An empty directory that never fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        lock(&self.disk).operations
    }

    /// Cuts the power as soon as `operations` have been done since the beginning.
    pub fn cut_after(&self, operations: u64) {
        lock(&self.disk).cut_after = Some(operations);
    }

    /// Cuts the power now, and on again: what was not synced is lost as `mode` says, drawn from
    /// `seed`. Open files and locks of before are dead.
    pub fn power_on(&self, mode: LossMode, seed: u64) {
        let mut disk = lock(&self.disk);
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let names = match mode {
            LossMode::Nothing | LossMode::LostNames => disk.synced_names.clone(),
            LossMode::Everything | LossMode::Sectors => disk.names.clone(),
            LossMode::SomeNames => {
                let all = disk.names.keys().chain(disk.synced_names.keys());
                let all: BTreeSet<String> = all.cloned().collect();
                let mut kept = BTreeMap::new();
                for name in all {
                    let newer = draw(&mut random).is_multiple_of(2);
                    let names = if newer { &disk.names } else { &disk.synced_names };
                    if let Some(id) = names.get(&name) {
                        kept.insert(name, *id);
                    }
                }
                kept
            }
            LossMode::Prefix => {
                let pick = draw(&mut random) as usize % (disk.name_history.len() + 1);
                match pick.checked_sub(1) {
                    Some(state) => disk.name_history[state].clone(),
                    None => disk.synced_names.clone(),
                }
            }
        };
        let mut inodes = BTreeMap::new();
        for id in names.values() {
            let inode = disk.inodes.get(id).cloned().unwrap_or_default();
            let kept = surviving(&inode, mode, &mut random);
            inodes.insert(*id, Inode { live: kept.clone(), synced: kept, rewritten: false });
        }
        disk.inodes = inodes;
        disk.synced_names = names.clone();
        disk.names = names;
        disk.name_history.clear();
        disk.cut_after = None;
        disk.syncs_before_failure = None;
        disk.locked = false;
        disk.life += 1;
    }

    /// The process is gone but the machine is not: nothing is lost, and nothing more is synced than
    /// before. Open files and locks of before are dead.
    pub fn kill(&self) {
        let mut disk = lock(&self.disk);
        disk.cut_after = None;
        disk.syncs_before_failure = None;
        disk.locked = false;
        disk.life += 1;
    }

    /// Limits the bytes that all files together may take; `None` for no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        lock(&self.disk).capacity = bytes;
    }

    /// Lets the sync after `successes` more of them fail with EIO, once.
    pub fn fail_sync_after(&self, successes: u64) {
        lock(&self.disk).syncs_before_failure = Some(successes);
    }

    /// Flips one bit of a file, as a bad disk would.
    pub fn flip(&self, name: &str, bit: u64) {
        let mut disk = lock(&self.disk);
        if let Ok(inode) = disk.inode(name) {
            let at = (bit / 8) as usize;
            inode.live[at] ^= 1 << (bit % 8);
            inode.synced = inode.live.clone();
        }
    }

    /// An independent copy, as if the disk had been cloned.
    pub fn copy(&self) -> Self {
        let disk = lock(&self.disk);
        Self {
            disk: Arc::new(Mutex::new(Disk {
                inodes: disk.inodes.clone(),
                names: disk.names.clone(),
                synced_names: disk.synced_names.clone(),
                next_inode: disk.next_inode,
                life: disk.life,
                ..Disk::default()
            })),
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut Disk) -> io::Result<R>) -> io::Result<R> {
        let mut disk = lock(&self.disk);
        let life = disk.life;
        disk.step(life)?;
        f(&mut disk)
    }

    fn file(&self, disk: &Disk, inode: u64) -> Box<dyn VfsFile> {
        Box::new(SimFile { disk: Arc::clone(&self.disk), inode, life: disk.life })
    }
}

impl VfsFile for SimFile {
    fn append(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut disk = lock(&self.disk);
        disk.step(self.life)?;
        let room = disk.free().min(data.len() as u64) as usize;
        if room == 0 && !data.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = disk.inodes.get_mut(&self.inode).ok_or(io::ErrorKind::NotFound)?;
        inode.live.extend_from_slice(&data[..room]);
        Ok(room)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        disk.step(self.life)?;
        let inode = disk.inodes.get_mut(&self.inode).ok_or(io::ErrorKind::NotFound)?;
        let offset = offset as usize;
        let range = offset..offset + data.len();
        inode.rewritten = true;
        inode.live.get_mut(range).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        disk.step(self.life)?;
        match disk.syncs_before_failure {
            Some(0) => {
                disk.syncs_before_failure = None;
                // As Linux does: the pages count as clean, and no later sync writes them.
                if let Some(inode) = disk.inodes.get_mut(&self.inode) {
                    let len = inode.live.len();
                    inode.synced.resize(len, 0);
                    inode.rewritten = false;
                }
                return Err(io::Error::from_raw_os_error(5));
            }
            Some(left) => disk.syncs_before_failure = Some(left - 1),
            None => {}
        }
        let inode = disk.inodes.get_mut(&self.inode).ok_or(io::ErrorKind::NotFound)?;
        inode.sync();
        Ok(())
    }
}

impl Vfs for SimVfs {
    fn lock(&self) -> io::Result<Option<Box<dyn Any + Send + Sync>>> {
        let mut disk = lock(&self.disk);
        if disk.locked {
            return Ok(None);
        }
        disk.locked = true;
        Ok(Some(Box::new(SimLock { disk: Arc::clone(&self.disk), life: disk.life })))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.with(|disk| Ok(disk.names.keys().cloned().collect()))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn VfsFile>> {
        self.with(|disk| {
            let id = match disk.names.get(name) {
                Some(id) => *id,
                None => {
                    disk.next_inode += 1;
                    let id = disk.next_inode;
                    disk.names.insert(name.to_owned(), id);
                    disk.names_changed();
                    id
                }
            };
            let inode = disk.inodes.entry(id).or_default();
            inode.live.clear();
            inode.rewritten = true;
            Ok(self.file(disk, id))
        })
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn VfsFile>> {
        self.with(|disk| {
            let id = *disk.names.get(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(self.file(disk, id))
        })
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        self.with(|disk| Ok(disk.inode(name)?.live.len() as u64))
    }

    fn read(&self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.with(|disk| {
            let live = &disk.inode(name)?.live;
            let from = (offset as usize).min(live.len());
            Ok(live[from..from.saturating_add(len).min(live.len())].to_vec())
        })
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        self.with(|disk| {
            let inode = disk.inode(name)?;
            // Cutting nothing off changes nothing, and makes no page dirty.
            inode.rewritten |= (len as usize) < inode.live.len();
            inode.live.truncate(len as usize);
            Ok(())
        })
    }

    fn reserve(&self, name: &str, len: u64) -> io::Result<()> {
        self.with(|disk| {
            if disk.free() < len {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.next_inode += 1;
            let id = disk.next_inode;
            disk.inodes.insert(id, Inode { live: vec![0; len as usize], ..Inode::default() });
            disk.names.insert(name.to_owned(), id);
            disk.names_changed();
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.with(|disk| {
            let id = disk.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            disk.names.insert(to.to_owned(), id);
            disk.names_changed();
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.with(|disk| {
            disk.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
            disk.names_changed();
            Ok(())
        })
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.with(|disk| {
            disk.synced_names = disk.names.clone();
            disk.name_history.clear();
            let Disk { inodes, names, .. } = disk;
            let named: BTreeSet<u64> = names.values().copied().collect();
            inodes.retain(|id, _| named.contains(id));
            Ok(())
        })
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.with(|disk| Ok(disk.free()))
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("memory").join(name)
    }
}
