//! Durability of the conversion service: commit journal, checkpoints, and the table of chunks.
//!
//! ```text
//! commit:      Journal::append* ; Journal::commit  (one fdatasync)  ──► replies
//! apply:       MetaTable (sled behind a cache of decoded chunks)
//! checkpoint:  Journal::rotate ; Checkpointer::begin(S, snapshot) ; write_chunks* ; finish
//! open:        checkpoint + journal ──► Recovered; sled is used only if it proves itself
//! ```
//!
//! # Invariants
//! * `committed-is-durable`: a record whose commit returned is found by every later open, or the
//!   open fails and names the file that lost it.
//! * `nothing-invented`: an open never finds a record or a chunk that was not written.
//! * `table-never-ahead`: neither a checkpoint nor a closed table contains a record that the
//!   journal has not made durable.

mod api;
mod backend;
mod backup;
mod canary;
mod checkpoint;
mod error;
mod journal;
mod names;
mod open;
mod restore;
mod segment;
mod shared;
mod sim;
mod sled_backend;
mod table;
mod vfs;

pub use api::{MetaOptions, MetaStore, MetaTable, Record, Recovered, TableStats};
pub use backup::{BACKUP_VERSION, Backup, BackupError, BackupHead, verify_backup};
pub use checkpoint::{Checkpointer, SNAPSHOT_BYTES_MAX};
pub use error::MetaError;
pub use journal::{Journal, Records};
pub use open::{DiskMeta, MemoryMeta};
pub use restore::Restoring;
pub use segment::PAYLOAD_BYTES_MAX;
pub use shared::{JournalHandle, JournalStats};
pub use sim::{LossMode, SimVfs};
pub use vfs::{RealVfs, Vfs, VfsFile};
