//! Makes a metadata directory out of a backup. What it means is for the caller to settle: a restored
//! state is an *older* state, and numbers given out since must not be given out again.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::api::MetaOptions;
use super::backup::{BackupError, BackupHead, BackupReader, Part};
use super::canary::write_durably;
use super::checkpoint::checkpoint_name;
use super::open::encode_identity;
use super::segment::{put_record, segment_header, segment_name};
use super::vfs::{RealVfs, Vfs, VfsFile};
use super::{MetaError, names, shared::fault};

/// A directory next to the wanted one that is renamed when it is complete.
#[derive(Debug)]
pub struct Restoring {
    /// What the backup contains.
    pub head: BackupHead,
    part: PathBuf,
    dir: PathBuf,
}

impl Restoring {
    /// Reads the backup into a directory beside `dir`, which must be empty or absent. Nothing appears
    /// in `dir` before [`Self::finish`], and nothing is left beside it after an error.
    ///
    /// # Errors
    /// `dir` holds something or is a mount point, the backup is damaged, or the disk fails.
    pub fn begin(input: impl Read, dir: &Path, options: &MetaOptions) -> Result<Self, BackupError> {
        // Told before the work is done that would be in vain.
        if is_mount_point(dir)? {
            return Err(BackupError::MountPoint(dir.to_owned()));
        }
        if !is_empty(dir)? {
            return Err(BackupError::NotEmpty(dir.to_owned()));
        }
        let mut reader = BackupReader::new(input)?;
        let mut name = dir.file_name().unwrap_or_default().to_owned();
        name.push(".restoring");
        let part = dir.with_file_name(name);
        // Left over from a restore that was interrupted; nothing else has this name.
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        let restoring = Self { head: reader.head, part, dir: dir.to_owned() };
        let vfs = RealVfs::new(&restoring.part)?;
        write(&mut reader, &vfs, options)?;
        Ok(restoring)
    }

    /// Where the metadata lies until [`Self::finish`].
    pub fn path(&self) -> &Path {
        &self.part
    }

    /// Makes it durable under its name.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn finish(self) -> Result<(), BackupError> {
        fs::rename(&self.part, &self.dir).map_err(|source| {
            let (from, to) = (self.part.clone(), self.dir.clone());
            BackupError::Rename { from, to, source }
        })?;
        let parent = self.dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(())
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        // Gone already if it was finished; else nobody finds half a restore.
        let _ = fs::remove_dir_all(&self.part);
    }
}

/// Whether a file system, or a part of one, is mounted there. Nothing is mounted where nothing is.
fn is_mount_point(dir: &Path) -> io::Result<bool> {
    match rustix::fs::statx(rustix::fs::CWD, dir, AtFlags::empty(), StatxFlags::BASIC_STATS) {
        // Devices alone do not tell: a directory may be mounted on another one of the same disk.
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_empty(dir: &Path) -> io::Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn write(
    reader: &mut BackupReader<impl Read>,
    vfs: &dyn Vfs,
    options: &MetaOptions,
) -> Result<(), BackupError> {
    let head = reader.head;
    write_durably(vfs, names::IDENTITY_NEW, names::IDENTITY, &encode_identity(head.database))?;
    let mut checkpoint = None;
    if head.checkpoint_seq > 0 {
        checkpoint = Some(Output::create(vfs, checkpoint_name(head.checkpoint_seq))?);
    }
    let mut segment = Segment::create(vfs, head.database, head.checkpoint_seq + 1)?;
    while let Some(part) = reader.next_part()? {
        match part {
            Part::Checkpoint(bytes) => match &mut checkpoint {
                Some(file) => file.put(&bytes)?,
                None => {
                    let what = "it has a checkpoint without a number".to_owned();
                    return Err(BackupError::Damaged { offset: 0, what });
                }
            },
            Part::Record(record) => {
                if segment.bytes >= options.segment_bytes {
                    segment.finish()?;
                    segment = Segment::create(vfs, head.database, record.seq)?;
                }
                segment.put(record.seq, record.epoch, &record.payload)?;
            }
        }
    }
    segment.finish()?;
    if let Some(checkpoint) = checkpoint {
        checkpoint.finish()?;
    }
    vfs.sync_dir().map_err(|error| fault(vfs, "sync", ".", error))?;
    Ok(())
}

/// A file that is written from the front.
struct Output<'a> {
    vfs: &'a dyn Vfs,
    name: String,
    file: Box<dyn VfsFile>,
    buffer: Vec<u8>,
}

/// Written out whenever it is longer than this, bytes.
const BUFFER: usize = 1 << 20;

impl<'a> Output<'a> {
    fn create(vfs: &'a dyn Vfs, name: String) -> Result<Self, MetaError> {
        let file = vfs.create(&name).map_err(|error| fault(vfs, "create", &name, error))?;
        Ok(Self { vfs, name, file, buffer: Vec::new() })
    }

    fn put(&mut self, data: &[u8]) -> Result<(), MetaError> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() >= BUFFER { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> Result<(), MetaError> {
        let mut left = &self.buffer[..];
        while !left.is_empty() {
            let count = self.file.append(left);
            let count = count.map_err(|error| fault(self.vfs, "append to", &self.name, error))?;
            left = &left[count..];
        }
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(), MetaError> {
        self.write_out()?;
        self.file.sync_data().map_err(|error| fault(self.vfs, "sync", &self.name, error))
    }
}

struct Segment<'a> {
    output: Output<'a>,
    bytes: u64,
}

impl<'a> Segment<'a> {
    fn create(vfs: &'a dyn Vfs, database: u64, first: u64) -> Result<Self, MetaError> {
        let mut output = Output::create(vfs, segment_name(first))?;
        output.put(&segment_header(database, first))?;
        Ok(Self { output, bytes: 0 })
    }

    fn put(&mut self, seq: u64, epoch: u64, payload: &[u8]) -> Result<(), MetaError> {
        let mut record = Vec::with_capacity(payload.len() + 64);
        // All of a backup was durable, so a bad record in here is damage and no torn tail.
        put_record(&mut record, seq, seq - 1, epoch, payload);
        self.bytes += record.len() as u64;
        self.output.put(&record)
    }

    fn finish(self) -> Result<(), MetaError> {
        self.output.finish()
    }
}
