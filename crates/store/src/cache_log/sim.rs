//! A directory in memory whose power can be cut, whose disk can be full and whose flush can fail.

#![allow(clippy::unwrap_used)]
// A simulation uses a part of it, the tests of this crate the rest.
#![cfg_attr(not(test), allow(dead_code))]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::disk::{Disk, LogFile};

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Truncate(u64),
}

#[derive(Clone, Default)]
struct Inode {
    data: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone)]
enum Name {
    Link(String, usize),
    Unlink(String),
    Rename(String, String),
}

#[derive(Default)]
struct World {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    pending_names: Vec<Name>,
    boot: u64,
    space: Option<usize>,
    sync_fails: bool,
    syncs: usize,
    during_sync: Option<Box<dyn FnOnce() + Send>>,
}

fn apply(data: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, bytes) => {
            let at = *at as usize;
            if data.len() < at + bytes.len() {
                data.resize(at + bytes.len(), 0);
            }
            data[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Change::Truncate(len) => data.truncate(*len as usize),
    }
}

fn rename(names: &mut BTreeMap<String, usize>, change: &Name) {
    match change {
        Name::Link(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        Name::Unlink(name) => {
            names.remove(name);
        }
        Name::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
    }
}

/// A handle on the directory; clones are the same one.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<World>>);

impl SimDisk {
    fn world<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    /// Drops what was not flushed, except the sectors and changes of names for which `keep` says
    /// yes.
    pub fn cut_power(&self, mut keep: impl FnMut() -> bool) {
        self.world(|world| {
            for inode in &mut world.inodes {
                for change in std::mem::take(&mut inode.pending) {
                    match change {
                        Change::Write(at, bytes) => {
                            for (n, sector) in bytes.chunks(512).enumerate() {
                                let change = Change::Write(at + 512 * n as u64, sector.to_vec());
                                if keep() {
                                    apply(&mut inode.durable, &change);
                                }
                            }
                        }
                        truncate => {
                            if keep() {
                                apply(&mut inode.durable, &truncate);
                            }
                        }
                    }
                }
                inode.data = inode.durable.clone();
            }
            for change in std::mem::take(&mut world.pending_names) {
                if keep() {
                    rename(&mut world.durable_names, &change);
                }
            }
            world.names = world.durable_names.clone();
            world.boot += 1;
        });
    }

    /// Room for that many bytes more; `None`: no limit.
    pub(super) fn set_space(&self, space: Option<usize>) {
        self.world(|world| world.space = space);
    }

    pub(super) fn set_sync_fails(&self, fails: bool) {
        self.world(|world| world.sync_fails = fails);
    }

    /// What happens while the next file is flushed.
    pub(super) fn during_sync(&self, act: impl FnOnce() + Send + 'static) {
        self.world(|world| world.during_sync = Some(Box::new(act)));
    }

    pub(super) fn syncs(&self) -> usize {
        self.world(|world| world.syncs)
    }

    /// Content of a file, changed in place (and durable).
    pub(super) fn edit(&self, name: &str, act: impl FnOnce(&mut Vec<u8>)) {
        self.world(|world| {
            let inode = world.names[name];
            let inode = &mut world.inodes[inode];
            act(&mut inode.data);
            inode.durable = inode.data.clone();
        });
    }

    pub(super) fn segments(&self) -> Vec<(String, usize)> {
        self.world(|world| {
            let names = world.names.iter().filter(|(name, _)| name.starts_with("segment"));
            names.map(|(name, inode)| (name.clone(), world.inodes[*inode].data.len())).collect()
        })
    }

    /// An independent copy.
    pub(super) fn fork(&self) -> Self {
        self.world(|world| {
            Self(Arc::new(Mutex::new(World {
                inodes: world.inodes.clone(),
                names: world.names.clone(),
                durable_names: world.durable_names.clone(),
                pending_names: world.pending_names.clone(),
                ..World { boot: world.boot, ..World::default() }
            })))
        })
    }

    fn file(&self, inode: usize) -> Arc<dyn LogFile> {
        Arc::new(SimFile { disk: self.clone(), inode })
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.world(|world| world.names.keys().cloned().collect()))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let inode = self.world(|world| {
            if world.names.contains_key(name) {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            world.inodes.push(Inode::default());
            let inode = world.inodes.len() - 1;
            world.names.insert(name.to_owned(), inode);
            world.pending_names.push(Name::Link(name.to_owned(), inode));
            Ok(inode)
        })?;
        Ok(self.file(inode))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let inode = self.world(|world| world.names.get(name).copied());
        Ok(self.file(inode.ok_or(io::ErrorKind::NotFound)?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.world(|world| {
            world.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
            world.pending_names.push(Name::Unlink(name.to_owned()));
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.world(|world| {
            let change = Name::Rename(from.to_owned(), to.to_owned());
            rename(&mut world.names, &change);
            world.pending_names.push(change);
            Ok(())
        })
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.world(|world| {
            if world.sync_fails {
                return Err(io::Error::other("the device does not flush"));
            }
            world.pending_names.clear();
            world.durable_names = world.names.clone();
            Ok(())
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("sim/{name}"))
    }

    fn boot_id(&self) -> io::Result<String> {
        Ok(self.world(|world| world.boot.to_string()))
    }
}

struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl LogFile for SimFile {
    fn write_at(&self, offset: u64, head: &[u8], body: &[&[u8]]) -> io::Result<()> {
        let mut bytes = head.to_vec();
        bytes.extend(body.iter().flat_map(|part| part.iter()));
        self.disk.world(|world| {
            let room = world.space.unwrap_or(usize::MAX);
            let full = bytes.len() > room;
            bytes.truncate(room);
            if let Some(space) = &mut world.space {
                *space -= bytes.len();
            }
            let inode = &mut world.inodes[self.inode];
            let change = Change::Write(offset, bytes);
            apply(&mut inode.data, &change);
            inode.pending.push(change);
            if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.world(|world| {
            let data = &world.inodes[self.inode].data;
            let from = offset as usize;
            let part = data.get(from..from + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(part);
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.world(|world| world.inodes[self.inode].data.len() as u64))
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.world(|world| {
            let inode = &mut world.inodes[self.inode];
            let change = Change::Truncate(len);
            apply(&mut inode.data, &change);
            inode.pending.push(change);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        if let Some(act) = self.disk.world(|world| world.during_sync.take()) {
            act();
        }
        self.disk.world(|world| {
            world.syncs += 1;
            if world.sync_fails {
                return Err(io::Error::other("the device does not flush"));
            }
            let inode = &mut world.inodes[self.inode];
            for change in inode.pending.drain(..) {
                apply(&mut inode.durable, &change);
            }
            Ok(())
        })
    }
}
