//! `endio backup metadata` and `endio restore metadata`.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, BufReader, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use endio_api::conversion::BackupRequest;
use endio_conversion::{InPlace, RestoreError, RestoreOptions, Restored};
use endio_store::meta::{BackupError, BackupHead, verify_backup};
use serde_json::json;

use crate::{
    args::{BackupArgs, InPlaceArg, RestoreArgs},
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, human},
};

/// `endio backup metadata`: the file appears under its name only when it is whole and proven.
pub(crate) async fn backup(client: &Client, out: Output, args: BackupArgs) -> Outcome {
    let what = format!("back the metadata up to {}", args.out.display());
    let failed = |error: &dyn std::error::Error| Failure::new(Exit::Failed, what.clone(), error);
    if args.out.exists() {
        let message = "the file exists";
        return Err(Failure::new(Exit::Usage, what, message).help("choose another name"));
    }
    let mut part = Part::create(&args.out).map_err(|error| failed(&error))?.ok_or_else(|| {
        let message = format!("another backup writes {} now", Part::path(&args.out).display());
        Failure::new(Exit::Refused, what.clone(), message)
            .help("wait until it is over, or choose another name")
    })?;
    let answer = client.inspect().backup(BackupRequest {}).await;
    let mut pieces = answer.map_err(|status| client.failure(&what, &status))?.into_inner();
    let mut bytes = 0;
    while let Some(piece) =
        pieces.message().await.map_err(|status| client.failure(&what, &status))?
    {
        bytes += piece.data.len() as u64;
        part.file.write_all(&piece.data).map_err(|error| failed(&error))?;
    }
    part.file.sync_all().map_err(|error| failed(&error))?;
    let path = part.path.clone();
    let head = tokio::task::spawn_blocking(move || verify(&path)).await;
    let head = head.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
    part.finish(&args.out).map_err(|error| failed(&error))?;
    let value = json!({
        "file": args.out, "bytes": bytes, "last_record": head.last_seq,
        "checkpoint_record": head.checkpoint_seq, "checkpoint_bytes": head.checkpoint_bytes,
    });
    out.print(&value, || {
        format!(
            "backed up {} to {}: the metadata up to record {}, verified",
            human(bytes),
            args.out.display(),
            head.last_seq
        )
    })
}

fn verify(path: &Path) -> Result<BackupHead, BackupError> {
    verify_backup(BufReader::new(File::open(path)?))
}

/// A file that is removed unless it is finished. While it is open it is locked: what an interrupted
/// backup left is taken over, and what another one is writing is left alone.
struct Part {
    path: PathBuf,
    file: File,
    is_finished: bool,
}

/// Tries to lock a part that others finish or remove meanwhile.
const LOCK_TRIES_MAX: u32 = 16;

impl Part {
    fn path(wanted: &Path) -> PathBuf {
        let mut name = wanted.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        wanted.with_file_name(name)
    }

    /// `None`: another backup has it.
    fn create(wanted: &Path) -> io::Result<Option<Self>> {
        let path = Self::path(wanted);
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        for _ in 0..LOCK_TRIES_MAX {
            let file = open_regular(&path).map_err(named)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(named(error)),
            }
            // Only who has the lock renames or removes it. Who had it before may have: then what is
            // locked now is a finished backup, or nothing any more.
            if is_still_at(&path, &file)? {
                file.set_len(0)?;
                return Ok(Some(Self { path, file, is_finished: false }));
            }
        }
        Ok(None)
    }

    fn finish(mut self, wanted: &Path) -> io::Result<()> {
        fs::rename(&self.path, wanted)?;
        self.is_finished = true;
        let parent = wanted.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// Opens it for writing as it is, made if it is absent. A link is not followed.
fn open_regular(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    // A value that fits: it is a flag of the system's own.
    let no_link = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).map_err(io::Error::other)?;
    let file = options.custom_flags(no_link).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    }
}

fn is_still_at(path: &Path, file: &File) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Once it is finished, the name may be that of somebody else's part. The lock goes after this.
        if !self.is_finished {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// `endio restore metadata`: offline, needs no service.
pub(crate) fn restore(out: Output, args: &RestoreArgs) -> Outcome {
    let dir = &args.data_dir;
    let what = format!("restore {} into {}", args.input.display(), dir.display());
    let options = RestoreOptions {
        epoch_at_least: args.epoch_at_least,
        in_place: match args.in_place {
            InPlaceArg::Refuse => InPlace::Refuse,
            InPlaceArg::Drop => InPlace::Drop,
            InPlaceArg::Keep => InPlace::Keep,
        },
    };
    let input = File::open(&args.input).map_err(|error| {
        let exit =
            if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Failure::new(exit, what.clone(), error)
    })?;
    let restored = endio_conversion::restore(BufReader::new(input), dir, &options)
        .map_err(|error| explain(what, &error))?;
    let value = json!({
        "data_dir": dir, "last_record": restored.head.last_seq,
        "epoch_before": restored.epoch_before, "epoch": restored.epoch,
        "volumes": restored.volumes, "dropped": restored.dropped,
        "extents": restored.extents, "mapped_blocks": restored.mapped_blocks,
    });
    out.print(&value, || text(dir, &restored))
}

fn text(dir: &Path, restored: &Restored) -> String {
    let mut text = format!(
        "restored {} volumes ({} extents, {} blocks) into {}\n\
         epoch {} -> {}: nothing of the time after the backup is taken for current\n",
        restored.volumes.len(),
        restored.extents,
        restored.mapped_blocks,
        dir.display(),
        restored.epoch_before,
        restored.epoch,
    );
    if !restored.dropped.is_empty() {
        text.push_str(&format!("dropped in-place volumes: {}\n", restored.dropped.join(", ")));
    }
    text.push_str(
        "next: start the conversion service on it, then `endio check` names every block that was \
         overwritten since the backup\n",
    );
    text
}

fn explain(what: String, error: &RestoreError) -> Failure {
    let exit = match error {
        RestoreError::InPlace(_)
        | RestoreError::Epoch(_)
        | RestoreError::Backup(BackupError::NotEmpty(_) | BackupError::MountPoint(_)) => {
            Exit::Usage
        }
        RestoreError::Backup(BackupError::Damaged { .. }) | RestoreError::Broken(_) => {
            Exit::DataLoss
        }
        _ => Exit::Failed,
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message.push_str(&format!(": {error}"));
        cause = error.source();
    }
    let help = match error {
        RestoreError::InPlace(_) => "see --in-place",
        RestoreError::Backup(BackupError::Damaged { .. }) => "take another backup",
        _ => "",
    };
    Failure::new(exit, what, message).help(help)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_an_interrupted_backup_left_is_taken_over_and_what_is_being_written_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let wanted = directory.path().join("m.backup");
        let left = Part::path(&wanted);
        fs::write(&left, "half of a backup that was killed").unwrap();

        let mut part = Part::create(&wanted).unwrap().unwrap();
        part.file.write_all(b"new").unwrap();
        assert!(Part::create(&wanted).unwrap().is_none(), "two backups write one file");
        part.finish(&wanted).unwrap();
        assert_eq!(fs::read(&wanted).unwrap(), b"new");
        assert!(!left.exists());

        drop(Part::create(&wanted).unwrap().unwrap());
        assert!(!left.exists(), "a backup that failed leaves nothing");
        assert_eq!(fs::read(&wanted).unwrap(), b"new");
    }

    #[test]
    fn a_part_that_is_no_file_of_its_own_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (wanted, other) = (directory.path().join("m"), directory.path().join("other"));
        fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, Part::path(&wanted)).unwrap();
        assert!(Part::create(&wanted).is_err());
        assert_eq!(fs::read(&other).unwrap(), b"precious");
    }
}
