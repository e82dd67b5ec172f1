//! The state file of an interrupted transfer.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure, Outcome};

/// Version of the form that is written.
const VERSION: u32 = 1;

/// What a transfer must remember to go on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// Of this form.
    version: u32,
    /// "import" or "export".
    pub(crate) kind: String,
    /// Volume's name.
    pub(crate) volume: String,
    /// Volume's number: a volume that was deleted and created again is another one.
    pub(crate) volume_id: u64,
    /// Bytes of the source.
    pub(crate) source_bytes: u64,
    /// When the source file was changed, nanoseconds since 1970; 0 for a volume.
    pub(crate) source_modified_ns: u64,
    /// Everything of the source below this is durable at the target.
    pub(crate) offset: u64,
    /// Session whose requests got that far, hexadecimal, to find them in logs. A run that goes on
    /// begins a session of its own: which numbers beyond the checkpoint were used is not known.
    pub(crate) session: String,
}

impl State {
    /// The state of a transfer that begins.
    pub(crate) fn new(kind: &str, volume: &str, volume_id: u64, source: (u64, u64)) -> Self {
        Self {
            version: VERSION,
            kind: kind.into(),
            volume: volume.into(),
            volume_id,
            source_bytes: source.0,
            source_modified_ns: source.1,
            offset: 0,
            session: String::new(),
        }
    }

    /// Takes the offset over from an earlier run of the same transfer.
    ///
    /// # Errors
    /// The earlier run was another transfer.
    fn resume(&mut self, earlier: Self) -> Result<(), &'static str> {
        let same = Self { offset: self.offset, session: self.session.clone(), ..earlier.clone() };
        if earlier.version != VERSION {
            return Err("it was written by another version of endio");
        }
        if earlier.kind != self.kind || earlier.volume != self.volume {
            return Err("it belongs to another transfer");
        }
        if earlier.volume_id != self.volume_id {
            return Err("the volume was deleted and created again since");
        }
        if same != *self {
            return Err("the source has changed since (size or time of change)");
        }
        if earlier.offset > self.source_bytes {
            return Err("its offset lies beyond the end of the source");
        }
        *self = earlier;
        Ok(())
    }
}

/// A state file at its place.
#[derive(Clone, Debug)]
pub(crate) struct StateFile(PathBuf);

impl StateFile {
    /// At `explicit`, or at FILE.`suffix`.
    pub(crate) fn at(explicit: Option<PathBuf>, file: &Path, suffix: &str) -> Self {
        Self(explicit.unwrap_or_else(|| {
            let mut name = file.as_os_str().to_owned();
            name.push(suffix);
            name.into()
        }))
    }

    /// Its path, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Continues an earlier run in `state` if there was one. Says whether.
    ///
    /// # Errors
    /// The file cannot be read, or is that of another transfer.
    pub(crate) fn resume(&self, state: &mut State) -> Outcome<bool> {
        let what = format!("continue from {}", self.0.display());
        let text = match fs::read(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Failure::new(Exit::Failed, what, error)),
        };
        let refuse = |why: String| {
            Failure::new(Exit::Usage, what.clone(), why)
                .help(format!("remove {} to begin from the start", self.0.display()))
        };
        let earlier = serde_json::from_slice(&text)
            .map_err(|error| refuse(format!("it is no state file: {error}")))?;
        state.resume(earlier).map_err(|why| refuse(why.into()))?;
        Ok(true)
    }

    /// Replaces the file, durably: after a crash it is the old one or the new one, whole.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn save(&self, state: &State) -> Outcome {
        let mut name = self.0.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let write = || {
            let mut text = serde_json::to_vec_pretty(state)?;
            text.push(b'\n');
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &self.0)?;
            sync_directory(&self.0)
        };
        write().map_err(|error: io::Error| {
            Failure::new(Exit::Failed, format!("write state file {}", self.0.display()), error)
        })
    }

    /// Removes it: the transfer is complete. Idempotent.
    ///
    /// # Errors
    /// It cannot be removed.
    pub(crate) fn remove(&self) -> Outcome {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let what = format!("remove state file {}", self.0.display());
                Err(Failure::new(Exit::Failed, what, error))
            }
            _ => Ok(()),
        }
    }
}

/// Makes the directory entry of a file durable.
pub(crate) fn sync_directory(file: &Path) -> io::Result<()> {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn state() -> State {
        State::new("import", "v1", 7, (1 << 20, 99))
    }

    #[test]
    fn a_saved_state_is_resumed_by_the_same_transfer() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::at(None, &directory.path().join("disk.img"), ".endio-import");
        assert!(file.path().ends_with("disk.img.endio-import"));
        assert!(!file.resume(&mut state()).unwrap());
        let saved = State { offset: 4096, session: "ab".into(), ..state() };
        file.save(&saved).unwrap();
        file.save(&saved).unwrap();
        let mut next = state();
        assert!(file.resume(&mut next).unwrap());
        assert_eq!(next, saved);
        file.remove().unwrap();
        file.remove().unwrap();
        assert!(!file.path().exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_state_of_another_transfer_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::at(Some(directory.path().join("s")), Path::new("x"), "");
        file.save(&State { offset: 4096, ..state() }).unwrap();
        for mut other in [
            State { volume: "v2".into(), ..state() },
            State { volume_id: 8, ..state() },
            State { source_bytes: 2 << 20, ..state() },
            State { source_modified_ns: 98, ..state() },
            State { kind: "export".into(), ..state() },
        ] {
            let failure = file.resume(&mut other).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{other:?}");
            assert_eq!(other.offset, 0);
        }
    }

    #[test]
    fn a_torn_or_foreign_state_file_is_refused_and_never_guessed() {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::at(Some(directory.path().join("s")), Path::new("x"), "");
        let beyond = State { offset: (1 << 20) + 1, ..state() };
        let whole = serde_json::to_string(&State { offset: 4096, ..state() }).unwrap();
        let future = whole.replace("\"version\":1", "\"version\":2");
        let beyond = serde_json::to_string(&beyond).unwrap();
        for text in [&whole[..whole.len() / 2], "", "{}", &future, &beyond] {
            fs::write(file.path(), text).unwrap();
            assert!(file.resume(&mut state()).is_err(), "{text}");
        }
    }
}
