//! A [`Disk`] as a file system that processes use without knowing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use endio_testkit::process::host_has;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use crate::disk::{Attributes, Disk, Refused};

/// How long the kernel may believe a name or a length: nobody changes them behind its back.
const TTL: Duration = Duration::from_secs(3600);
/// Of `fallocate(2)`.
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;
const KEEP_SIZE: i32 = 1;

/// Whether this host can mount; says so if it cannot.
pub fn is_possible() -> bool {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: /dev/fuse does not exist on this host");
        return false;
    }
    if rustix::process::geteuid().is_root() { true } else { host_has("fusermount3") }
}

#[derive(Default)]
struct State {
    disk: Disk,
    /// The power is off: nothing happens any more.
    is_cut: bool,
    /// Whoever waits for the disk that is off gets an error instead.
    is_over: bool,
}

#[derive(Clone, Default)]
struct Shared(Arc<(Mutex<State>, Condvar)>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for ever on a disk without power, so that no process learns of it before it dies.
    fn on<R>(&self, act: impl FnOnce(&mut Disk) -> Result<R, Refused>) -> Result<R, Errno> {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.is_cut && !state.is_over {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.is_cut {
            return Err(Errno::EIO);
        }
        act(&mut state.disk).map_err(errno)
    }
}

fn errno(refused: Refused) -> Errno {
    match refused {
        Refused::NotFound => Errno::ENOENT,
        Refused::Exists => Errno::EEXIST,
        Refused::WrongKind => Errno::EINVAL,
        Refused::NotEmpty => Errno::ENOTEMPTY,
    }
}

/// A mounted disk. Dropping it unmounts.
pub struct Mounted {
    shared: Shared,
    session: Option<BackgroundSession>,
    place: PathBuf,
}

impl Mounted {
    /// Mounts a disk.
    ///
    /// # Errors
    /// The kernel or `fusermount3` refuses.
    pub fn new(disk: Disk, place: &Path) -> anyhow::Result<Self> {
        let shared = Shared::default();
        shared.lock().disk = disk;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("endio-power-tests".to_owned())];
        let session = fuser::spawn_mount(View(shared.clone()), place, &config)
            .with_context(|| format!("cannot mount {}", place.display()))?;
        Ok(Self { shared, session: Some(session), place: place.to_owned() })
    }

    /// Cuts the power: from now on every operation waits, as on a machine that stands still.
    pub fn cut(&self) {
        self.shared.lock().is_cut = true;
    }

    /// Everybody who used the disk has been killed: lets what waits fail, so that they can end.
    pub fn end(&self) {
        self.shared.lock().is_over = true;
        self.shared.0.1.notify_all();
    }

    /// Unmounts; returns the disk as it was when its power was cut, or is now.
    ///
    /// # Errors
    /// Somebody still uses it.
    pub fn unmount(mut self) -> anyhow::Result<Disk> {
        if let Some(session) = self.session.take() {
            session
                .umount_and_join()
                .with_context(|| format!("{} is busy", self.place.display()))?;
        }
        Ok(std::mem::take(&mut self.shared.lock().disk))
    }
}

/// What the kernel talks to.
struct View(Shared);

fn file_attr(attributes: Attributes) -> FileAttr {
    let now = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.size,
        blocks: attributes.used / 512,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind: kind(attributes),
        perm: if attributes.is_directory { 0o755 } else { 0o644 },
        nlink: if attributes.is_directory { 2 } else { 1 },
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn kind(attributes: Attributes) -> FileType {
    if attributes.is_directory { FileType::Directory } else { FileType::RegularFile }
}

fn empty(reply: ReplyEmpty, outcome: Result<(), Errno>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn entry(reply: ReplyEntry, outcome: Result<Attributes, Errno>) {
    match outcome {
        Ok(attributes) => reply.entry(&TTL, &file_attr(attributes), Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for View {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.0.on(|disk| {
            let inode = disk.lookup(parent.0, name)?;
            disk.attributes(inode)
        });
        entry(reply, found);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.on(|disk| disk.attributes(ino.0)) {
            Ok(attributes) => reply.attr(&TTL, &file_attr(attributes)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.0.on(|disk| {
            if let Some(size) = size {
                disk.truncate(ino.0, size)?;
            }
            disk.attributes(ino.0)
        });
        match changed {
            Ok(attributes) => reply.attr(&TTL, &file_attr(attributes)),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = self.0.on(|disk| {
            let inode = disk.create(parent.0, name, true)?;
            disk.attributes(inode)
        });
        entry(reply, made);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.on(|disk| disk.remove(parent.0, name)));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.on(|disk| disk.remove(parent.0, name)));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let renamed = self.0.on(|disk| disk.rename((parent.0, name), (newparent.0, newname)));
        empty(reply, renamed);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.on(|disk| disk.read(ino.0, offset, size as usize)) {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.on(|disk| disk.write(ino.0, offset, data)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Called at close, which makes nothing durable.
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.0.on(|disk| disk.sync(ino.0)));
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.0.on(|disk| disk.sync(ino.0)));
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = match self.0.on(|disk| disk.list(ino.0)) {
            Ok(listed) => listed,
            Err(errno) => return reply.error(errno),
        };
        for (at, (name, attributes)) in (1_u64..).zip(listed).skip(offset as usize) {
            if reply.add(INodeNo(attributes.inode), at, kind(attributes), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // As large as anybody may want.
        let (blocks, files) = (1 << 28, 1 << 20);
        reply.statfs(blocks, blocks, blocks, files, files, 4096, 255, 4096);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let made = self.0.on(|disk| {
            let inode = disk.create(parent.0, name, false)?;
            disk.attributes(inode)
        });
        match made {
            Ok(attributes) => {
                let (attr, flags) = (file_attr(attributes), FopenFlags::empty());
                reply.created(&TTL, &attr, Generation(0), FileHandle(0), flags);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.0.on(|disk| {
            let end = offset.saturating_add(length);
            if mode & KEEP_SIZE == 0 && disk.attributes(ino.0)?.size < end {
                disk.truncate(ino.0, end)?;
            }
            // Space is never short here, so taking it in advance needs nothing.
            if mode & (PUNCH_HOLE | ZERO_RANGE) != 0 {
                disk.punch(ino.0, offset, length)
            } else {
                Ok(())
            }
        });
        empty(reply, done);
    }
}
