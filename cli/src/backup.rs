//! `endio backup metadata` and `endio restore metadata`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Write as _},
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
    let mut part = Part::create(&args.out).map_err(|error| failed(&error))?;
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

/// A file that is removed unless it is finished.
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn create(wanted: &Path) -> io::Result<Self> {
        let mut name = wanted.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let path = wanted.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok(Self { path, file })
    }

    fn finish(self, wanted: &Path) -> io::Result<()> {
        fs::rename(&self.path, wanted)?;
        let parent = wanted.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Gone already if it was finished.
        let _ = fs::remove_file(&self.path);
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
        | RestoreError::Backup(BackupError::NotEmpty(_)) => Exit::Usage,
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
