//! What can go wrong with metadata.

use std::path::PathBuf;

use endio_state_machine::chunk::ChunkId;
use endio_types::Reason;

/// Why metadata could not be read, written or trusted.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// Another process has the directory open.
    #[error("the metadata directory {} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// The disk is full. Nothing of the operation is promised.
    #[error("no space is left for metadata: {what} {}", .path.display())]
    NoSpace {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
    },
    /// The disk or the file system failed.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file holds something that was never written there: it is not a torn tail. The service
    /// must not start over it.
    #[error("{} is damaged at offset {offset}: {what}", .file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// In which way.
        what: String,
    },
    /// A whole file of another version of this program. Nothing is wrong with it.
    #[error("{} has format version {version}, which this program does not know: start the version \
             that wrote it, or a later one", .file.display())]
    UnknownVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A chunk of the extent map cannot be trusted. The service must stop; the next start
    /// rebuilds the map from checkpoint and journal.
    #[error("chunk {} of volume {} is damaged: {what}", .id.index, .id.volume)]
    ChunkDamaged {
        /// The chunk.
        id: ChunkId,
        /// In which way.
        what: String,
    },
    /// The table of chunks failed.
    #[error("the table of chunks failed: {0}")]
    Table(String),
    /// An earlier write or sync failed, so nothing may be promised any more until a restart.
    #[error("the journal is closed after a failure: {0}")]
    Poisoned(String),
    /// The caller broke the order of calls.
    #[error("metadata store used wrongly: {0}")]
    Misuse(&'static str),
}

impl MetaError {
    /// The reason as peers see it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoSpace { .. } => Reason::MetadataFull,
            _ => Reason::IoError,
        }
    }
}
