//! Who this writeback is, kept beside the cache log.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use crate::engine::Identity;

const FILE: &str = "identity";

/// Reads the identity of a cache directory, or draws one, and notes one more start durably.
///
/// # Errors
/// The disk fails, or the file says something that this service never wrote.
pub(crate) fn next_start(dir: &Path) -> io::Result<Identity> {
    let path = dir.join(FILE);
    let identity = match fs::read_to_string(&path) {
        Ok(text) => {
            let last = parse(&text).ok_or_else(|| {
                let what = format!("{} is damaged", path.display());
                io::Error::new(io::ErrorKind::InvalidData, what)
            })?;
            Identity { start: last.start.saturating_add(1), ..last }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Identity { uuid: format!("{:032x}", rand::random::<u128>()), start: 1 }
        }
        Err(error) => return Err(error),
    };
    let next = dir.join("identity.new");
    let mut file = File::create(&next)?;
    writeln!(file, "{} {}", identity.uuid, identity.start)?;
    file.sync_all()?;
    fs::rename(&next, &path)?;
    File::open(dir)?.sync_all()?;
    Ok(identity)
}

fn parse(text: &str) -> Option<Identity> {
    let (uuid, start) = text.trim_end().split_once(' ')?;
    let is_uuid = uuid.len() == 32 && uuid.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_uuid.then_some(())?;
    Some(Identity { uuid: uuid.to_owned(), start: start.parse().ok()? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_directory_keeps_its_identity_and_counts_its_starts() {
        let dir = tempfile::tempdir().unwrap();
        let first = next_start(dir.path()).unwrap();
        let second = next_start(dir.path()).unwrap();
        assert_eq!((first.start, second.start), (1, 2));
        assert_eq!(first.uuid, second.uuid);
        assert!(second.is_earlier_start(&first.writeback()));
        fs::write(dir.path().join(FILE), "nonsense").unwrap();
        assert!(next_start(dir.path()).is_err());
    }
}
