//! Files and directories in memory, each as it is now and as it is on the platter, with a list of
//! what lies between the two.
//!
//! ```text
//!   write, truncate, punch ──► now ── fsync(file) ──► durable
//!   create, rename, unlink ──► now ── fsync(dir)  ──► durable
//!   cut(policy) ──► a disk whose `now` and `durable` are what survived
//! ```
//! Contents become durable with their file, names with their directory, and nothing is durable
//! otherwise: a file whose name was never synced is gone, however often it was synced itself. That
//! is less than most file systems give, and all that POSIX promises.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use endio_testkit::seed::Rng;

/// Inode number of the root.
pub const ROOT: u64 = 1;
/// Bytes of a page; a hole is a page that is not there.
const PAGE: usize = 4096;
/// What a disk writes whole or not at all.
const SECTOR: u64 = 512;

/// What survives of everything that was not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// Nothing.
    Nothing,
    /// Everything: the cache happened to be written back.
    Everything,
    /// Everything up to some moment, in the order in which it happened.
    Prefix,
    /// Any subset: each write for itself, the last one of each file torn between sectors; of each
    /// directory what happened up to some moment.
    Subset,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Everything, Self::Prefix, Self::Subset];
}

/// Why an operation is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// ENOENT
    NotFound,
    /// EEXIST
    Exists,
    /// ENOTDIR or EISDIR
    WrongKind,
    /// ENOTEMPTY
    NotEmpty,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Arc<[u8]>),
    Truncate(u64),
    Punch(u64, u64),
}

/// The bytes of a file.
#[derive(Clone, Default, Debug)]
struct Bytes {
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
    size: u64,
}

impl Bytes {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(offset, data) => self.write(*offset, data),
            Change::Truncate(size) => self.truncate(*size),
            Change::Punch(offset, length) => self.zero(*offset, *length),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut left = data;
        while !left.is_empty() {
            let (page, skip) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let (head, rest) = left.split_at(left.len().min(PAGE - skip));
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(bytes)[skip..skip + head.len()].copy_from_slice(head);
            at += head.len() as u64;
            left = rest;
        }
        self.size = self.size.max(at);
    }

    fn truncate(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let first = offset / PAGE as u64;
        let pages: Vec<u64> =
            self.pages.range(first..end.div_ceil(PAGE as u64)).map(|(page, _)| *page).collect();
        for page in pages {
            let start = page * PAGE as u64;
            let from = offset.saturating_sub(start).min(PAGE as u64) as usize;
            let to = (end - start).min(PAGE as u64) as usize;
            if (from, to) == (0, PAGE) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[from..to].fill(0);
            }
        }
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = offset.saturating_add(length as u64).min(self.size);
        let mut data = vec![0; usize::try_from(end.saturating_sub(offset)).unwrap_or(0)];
        for (page, bytes) in self.pages.range(offset / PAGE as u64..end.div_ceil(PAGE as u64)) {
            let start = page * PAGE as u64;
            let (from, to) = (start.max(offset), (start + PAGE as u64).min(end));
            let source = &bytes[(from - start) as usize..(to - start) as usize];
            data[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
        data
    }
}

type Names = BTreeMap<OsString, u64>;

#[derive(Clone, Debug)]
enum Naming {
    Put(OsString, u64),
    Remove(OsString),
    Rename(OsString, OsString),
}

impl Naming {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Put(name, inode) => drop(names.insert(name.clone(), *inode)),
            Self::Remove(name) => drop(names.remove(name)),
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }
}

/// Something as it is, as it is on the platter, and the numbered changes between.
#[derive(Clone, Debug)]
struct Cached<T, C> {
    now: T,
    durable: T,
    pending: Vec<(u64, C)>,
}

impl<T: Default, C> Default for Cached<T, C> {
    fn default() -> Self {
        Self { now: T::default(), durable: T::default(), pending: Vec::new() }
    }
}

#[derive(Clone, Debug)]
enum Inode {
    File(Cached<Bytes, Change>),
    Directory(Cached<Names, Naming>),
}

/// What the kernel wants to know of an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// Its number.
    pub inode: u64,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Bytes.
    pub size: u64,
    /// Bytes that occupy space.
    pub used: u64,
}

/// How much was lost at a cut.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Loss {
    /// Changes of files that were not synced.
    pub changes: u64,
    /// Of these, lost or torn.
    pub changes_lost: u64,
    /// Changes of directories that were not synced.
    pub names: u64,
    /// Of these, lost.
    pub names_lost: u64,
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    inodes: BTreeMap<u64, Inode>,
    next: u64,
    step: u64,
}

impl Default for Disk {
    fn default() -> Self {
        let root = Inode::Directory(Cached::default());
        Self { inodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1, step: 0 }
    }
}

impl Disk {
    fn step(&mut self) -> u64 {
        self.step += 1;
        self.step
    }

    fn names(&mut self, inode: u64) -> Result<&mut Cached<Names, Naming>, Refused> {
        match self.inodes.get_mut(&inode) {
            Some(Inode::Directory(names)) => Ok(names),
            Some(Inode::File(_)) => Err(Refused::WrongKind),
            None => Err(Refused::NotFound),
        }
    }

    fn bytes(&mut self, inode: u64) -> Result<&mut Cached<Bytes, Change>, Refused> {
        match self.inodes.get_mut(&inode) {
            Some(Inode::File(bytes)) => Ok(bytes),
            Some(Inode::Directory(_)) => Err(Refused::WrongKind),
            None => Err(Refused::NotFound),
        }
    }

    fn name(&mut self, parent: u64, naming: Naming) -> Result<(), Refused> {
        let step = self.step();
        let names = self.names(parent)?;
        naming.apply(&mut names.now);
        names.pending.push((step, naming));
        Ok(())
    }

    fn change(&mut self, inode: u64, change: Change) -> Result<(), Refused> {
        let step = self.step();
        let bytes = self.bytes(inode)?;
        bytes.now.apply(&change);
        bytes.pending.push((step, change));
        Ok(())
    }

    /// The inode of a name.
    ///
    /// # Errors
    /// There is none.
    pub fn lookup(&mut self, parent: u64, name: &OsStr) -> Result<u64, Refused> {
        self.names(parent)?.now.get(name).copied().ok_or(Refused::NotFound)
    }

    /// What the kernel wants to know.
    ///
    /// # Errors
    /// There is no such inode.
    pub fn attributes(&self, inode: u64) -> Result<Attributes, Refused> {
        let (is_directory, size, used) = match self.inodes.get(&inode).ok_or(Refused::NotFound)? {
            Inode::Directory(_) => (true, 0, 0),
            Inode::File(bytes) => {
                (false, bytes.now.size, bytes.now.pages.len() as u64 * PAGE as u64)
            }
        };
        Ok(Attributes { inode, is_directory, size, used })
    }

    /// A new, empty file or directory.
    ///
    /// # Errors
    /// The name is taken.
    pub fn create(
        &mut self,
        parent: u64,
        name: &OsStr,
        is_directory: bool,
    ) -> Result<u64, Refused> {
        if self.lookup(parent, name).is_ok() {
            return Err(Refused::Exists);
        }
        let inode = self.next;
        self.name(parent, Naming::Put(name.to_owned(), inode))?;
        self.next += 1;
        let made = match is_directory {
            true => Inode::Directory(Cached::default()),
            false => Inode::File(Cached::default()),
        };
        self.inodes.insert(inode, made);
        Ok(inode)
    }

    /// Removes a name. Its inode stays: somebody may have it open, and the platter may name it.
    ///
    /// # Errors
    /// There is no such name, or it is a directory that is not empty.
    pub fn remove(&mut self, parent: u64, name: &OsStr) -> Result<(), Refused> {
        let inode = self.lookup(parent, name)?;
        if matches!(self.inodes.get(&inode), Some(Inode::Directory(names)) if !names.now.is_empty())
        {
            return Err(Refused::NotEmpty);
        }
        self.name(parent, Naming::Remove(name.to_owned()))
    }

    /// Renames, over another file if need be.
    ///
    /// # Errors
    /// There is no such name.
    pub fn rename(
        &mut self,
        (parent, name): (u64, &OsStr),
        (to, new): (u64, &OsStr),
    ) -> Result<(), Refused> {
        let inode = self.lookup(parent, name)?;
        if parent == to {
            return self.name(parent, Naming::Rename(name.to_owned(), new.to_owned()));
        }
        self.name(to, Naming::Put(new.to_owned(), inode))?;
        self.name(parent, Naming::Remove(name.to_owned()))
    }

    /// Names and inodes of a directory.
    ///
    /// # Errors
    /// It is none.
    pub fn list(&mut self, inode: u64) -> Result<Vec<(OsString, Attributes)>, Refused> {
        let names = self.names(inode)?.now.clone();
        names.into_iter().map(|(name, inode)| Ok((name, self.attributes(inode)?))).collect()
    }

    /// Reads what is there now.
    ///
    /// # Errors
    /// It is not a file.
    pub fn read(&mut self, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, Refused> {
        Ok(self.bytes(inode)?.now.read(offset, length))
    }

    /// Writes; not durable.
    ///
    /// # Errors
    /// It is not a file.
    pub fn write(&mut self, inode: u64, offset: u64, data: &[u8]) -> Result<(), Refused> {
        self.change(inode, Change::Write(offset, data.into()))
    }

    /// Sets the length; not durable.
    ///
    /// # Errors
    /// It is not a file.
    pub fn truncate(&mut self, inode: u64, size: u64) -> Result<(), Refused> {
        self.change(inode, Change::Truncate(size))
    }

    /// Makes a hole inside the file; not durable.
    ///
    /// # Errors
    /// It is not a file.
    pub fn punch(&mut self, inode: u64, offset: u64, length: u64) -> Result<(), Refused> {
        let length = length.min(self.bytes(inode)?.now.size.saturating_sub(offset));
        self.change(inode, Change::Punch(offset, length))
    }

    /// Makes a file's contents, or a directory's names, durable.
    ///
    /// # Errors
    /// There is no such inode.
    pub fn sync(&mut self, inode: u64) -> Result<(), Refused> {
        match self.inodes.get_mut(&inode).ok_or(Refused::NotFound)? {
            Inode::File(bytes) => {
                for (_, change) in bytes.pending.drain(..) {
                    bytes.durable.apply(&change);
                }
            }
            Inode::Directory(names) => {
                for (_, naming) in names.pending.drain(..) {
                    naming.apply(&mut names.durable);
                }
            }
        }
        Ok(())
    }

    /// What a machine finds after its power was cut now.
    pub fn cut(&self, policy: Policy, rng: &mut Rng) -> (Self, Loss) {
        let mut loss = Loss::default();
        let moment = rng.between(0, self.step);
        let mut inodes = BTreeMap::new();
        for (number, inode) in &self.inodes {
            let survived = match inode {
                Inode::File(bytes) => {
                    let pending = &bytes.pending;
                    loss.changes += pending.len() as u64;
                    let kept = surviving_changes(pending, policy, moment, rng);
                    let whole = kept.iter().filter(|(_, whole)| *whole).count();
                    loss.changes_lost += (pending.len() - whole) as u64;
                    let mut now = bytes.durable.clone();
                    kept.iter().for_each(|(change, _)| now.apply(change));
                    Inode::File(Cached { durable: now.clone(), now, pending: Vec::new() })
                }
                Inode::Directory(names) => {
                    let pending = &names.pending;
                    let count = match policy {
                        Policy::Nothing => 0,
                        Policy::Everything => pending.len(),
                        Policy::Prefix => pending.partition_point(|(step, _)| *step <= moment),
                        Policy::Subset => rng.below(pending.len() as u64 + 1) as usize,
                    };
                    loss.names += pending.len() as u64;
                    loss.names_lost += (pending.len() - count) as u64;
                    let mut now = names.durable.clone();
                    pending[..count].iter().for_each(|(_, naming)| naming.apply(&mut now));
                    Inode::Directory(Cached { durable: now.clone(), now, pending: Vec::new() })
                }
            };
            inodes.insert(*number, survived);
        }
        let mut disk = Self { inodes, next: self.next, step: 0 };
        disk.forget_unnamed();
        (disk, loss)
    }

    /// What nothing names is gone.
    fn forget_unnamed(&mut self) {
        let mut named = BTreeMap::new();
        let mut next = vec![ROOT];
        while let Some(inode) = next.pop() {
            let Some(found) = self.inodes.remove(&inode) else { continue };
            if let Inode::Directory(names) = &found {
                next.extend(names.now.values());
            }
            named.insert(inode, found);
        }
        self.inodes = named;
    }
}

/// The changes that reach the platter, in order, and whether each did so whole.
fn surviving_changes(
    pending: &[(u64, Change)],
    policy: Policy,
    moment: u64,
    rng: &mut Rng,
) -> Vec<(Change, bool)> {
    let count = pending.partition_point(|(step, _)| *step <= moment);
    match policy {
        Policy::Nothing => Vec::new(),
        Policy::Everything => pending.iter().map(|(_, change)| (change.clone(), true)).collect(),
        Policy::Prefix => {
            let mut kept: Vec<_> =
                pending[..count].iter().map(|(_, change)| (change.clone(), true)).collect();
            // The one that was under way may be torn.
            kept.extend(pending.get(count).and_then(|(_, change)| torn(change, rng)));
            kept
        }
        Policy::Subset => {
            let share = rng.below(101);
            let mut kept = Vec::new();
            for (at, (_, change)) in pending.iter().enumerate() {
                if at + 1 == pending.len() && rng.chance(50) {
                    kept.extend(torn(change, rng));
                } else if rng.chance(share) {
                    kept.push((change.clone(), true));
                }
            }
            kept
        }
    }
}

/// The first sectors of a write.
fn torn(change: &Change, rng: &mut Rng) -> Option<(Change, bool)> {
    let Change::Write(offset, data) = change else { return None };
    let length = data.len() as u64;
    let sectors = rng.below(length.div_ceil(SECTOR));
    // Sectors are those of the disk, not of the write.
    let end = ((offset / SECTOR + sectors) * SECTOR).saturating_sub(*offset).min(length);
    let part: Arc<[u8]> = data[..end as usize].into();
    (end > 0).then_some((Change::Write(*offset, part), false))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn names(disk: &mut Disk) -> Vec<OsString> {
        disk.list(ROOT).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn what_was_synced_survives_every_cut_and_what_was_not_survives_the_lucky_ones() {
        let mut disk = Disk::default();
        let file = disk.create(ROOT, "a".as_ref(), false).unwrap();
        disk.write(file, 0, &[1; 6000]).unwrap();
        disk.sync(file).unwrap();
        disk.sync(ROOT).unwrap();
        disk.write(file, 4096, &[2; 4096]).unwrap();
        for seed in 0..200 {
            for policy in Policy::ALL {
                let (mut after, loss) = disk.cut(policy, &mut Rng::new(seed));
                let data = after.read(file, 0, 9000).unwrap();
                assert_eq!(data[..4096], [1; 4096]);
                match policy {
                    Policy::Nothing => assert_eq!(data, [1; 6000]),
                    Policy::Everything => assert_eq!(data[4096..], [2; 4096]),
                    Policy::Prefix | Policy::Subset => {
                        let new = data[4096..].iter().take_while(|byte| **byte == 2).count();
                        assert_eq!(new % SECTOR as usize, 0, "a sector is whole");
                        assert_eq!(loss.changes_lost == 0, new == 4096, "{loss:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_name_that_was_not_synced_is_lost_however_often_its_file_was() {
        let mut disk = Disk::default();
        let old = disk.create(ROOT, "state".as_ref(), false).unwrap();
        disk.write(old, 0, b"old").unwrap();
        disk.sync(old).unwrap();
        disk.sync(ROOT).unwrap();
        let new = disk.create(ROOT, "state.new".as_ref(), false).unwrap();
        disk.write(new, 0, b"new").unwrap();
        disk.sync(new).unwrap();
        disk.rename((ROOT, "state.new".as_ref()), (ROOT, "state".as_ref())).unwrap();
        let (mut after, _) = disk.cut(Policy::Nothing, &mut Rng::new(1));
        assert_eq!(names(&mut after), ["state"]);
        assert_eq!(after.read(old, 0, 9).unwrap(), b"old");
        disk.sync(ROOT).unwrap();
        let (mut after, _) = disk.cut(Policy::Nothing, &mut Rng::new(1));
        assert_eq!(names(&mut after), ["state"]);
        assert_eq!(after.read(new, 0, 9).unwrap(), b"new");
        assert!(after.read(old, 0, 9).is_err(), "nothing names it any more");
    }

    #[test]
    fn a_hole_reads_as_zeroes_and_occupies_nothing() {
        let mut disk = Disk::default();
        let file = disk.create(ROOT, "a".as_ref(), false).unwrap();
        disk.write(file, 0, &[1; 3 * PAGE]).unwrap();
        disk.punch(file, 100, 2 * PAGE as u64).unwrap();
        assert_eq!(disk.attributes(file).unwrap().used, 2 * PAGE as u64);
        let data = disk.read(file, 0, 4 * PAGE).unwrap();
        assert_eq!(data.len(), 3 * PAGE);
        assert_eq!(data.iter().filter(|byte| **byte == 0).count(), 2 * PAGE);
        disk.truncate(file, 50).unwrap();
        disk.truncate(file, 200).unwrap();
        assert_eq!(disk.read(file, 0, 200).unwrap()[50..], [0; 150]);
    }
}
