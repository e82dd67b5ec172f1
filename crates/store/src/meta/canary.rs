//! The canary vouches for the table of chunks after a clean stop. It lies outside sled, is written
//! when sled is closed, and is gone, durably, before sled is touched again.

use endio_failpoints::{Point, reach};
use serde::{Deserialize, Serialize};

use super::shared::Shared;
use super::{MetaError, names};

/// What was true when the table was closed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Canary {
    pub(crate) database_id: u64,
    /// Last record that the table contains.
    pub(crate) last_seq: u64,
    /// Number of chunks.
    pub(crate) chunks: u64,
    /// CRC-32C of all files of the table.
    pub(crate) files_crc32c: u32,
    pub(crate) clean: bool,
}

impl Canary {
    fn encode(&self) -> Result<Vec<u8>, MetaError> {
        let mut text = serde_json::to_vec(self)
            .map_err(|_| MetaError::Misuse("the canary cannot be encoded"))?;
        let crc = crc32c::crc32c(&text);
        text.extend_from_slice(format!("\n{crc:08x}\n").as_bytes());
        Ok(text)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = str::from_utf8(bytes).ok()?;
        let (body, crc) = text.strip_suffix('\n')?.split_once('\n')?;
        let matches = format!("{:08x}", crc32c::crc32c(body.as_bytes())) == crc;
        matches.then(|| serde_json::from_str(body).ok()).flatten()
    }

    /// Makes it durable.
    pub(crate) fn write(&self, shared: &Shared) -> Result<(), MetaError> {
        let text = self.encode()?;
        write_durably(shared.vfs.as_ref(), names::CANARY_NEW, names::CANARY, &text)
    }

    /// Reads it and removes it durably, so that it never vouches twice. The reason, if there is
    /// none to trust.
    pub(crate) fn take(shared: &Shared) -> Result<Result<Self, String>, MetaError> {
        let vfs = shared.vfs.as_ref();
        let fail = |error| shared.fail("remove", names::CANARY, error);
        if !vfs.exists(names::CANARY).map_err(fail)? {
            return Ok(Err("the last stop was not clean".into()));
        }
        let bytes = vfs.read(names::CANARY, 0, 4096).map_err(fail)?;
        vfs.remove(names::CANARY).map_err(fail)?;
        vfs.sync_dir().map_err(fail)?;
        reach(Point::CanaryTaken);
        Ok(Self::decode(&bytes).ok_or_else(|| "the canary file is damaged".into()))
    }
}

/// Writes a small file under another name, syncs it, and renames it durably.
pub(crate) fn write_durably(
    vfs: &dyn super::vfs::Vfs,
    new: &str,
    name: &str,
    data: &[u8],
) -> Result<(), MetaError> {
    let write = || {
        let mut file = vfs.create(new)?;
        let mut left = data;
        while !left.is_empty() {
            left = &left[file.append(left)?..];
        }
        file.sync_data()?;
        vfs.rename(new, name)?;
        vfs.sync_dir()
    };
    write().map_err(|error| super::shared::fault(vfs, "write", name, error))
}
