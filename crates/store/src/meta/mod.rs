//! Durability of the conversion service: commit journal, checkpoints, and the table of chunks.
//!
//! ```text
//! commit:      Journal::append* ; Journal::commit  (one fdatasync)  ──► replies
//! apply:       MetaTable (sled behind a cache of decoded chunks)
//! checkpoint:  Journal::rotate ; Checkpointer::begin(S, snapshot) ; write_chunks* ; finish
//! open:        checkpoint + journal ──► Recovered; sled is used only if it proves itself
//! ```

mod api;
mod error;

pub use api::{
    Checkpointer, DiskMeta, Journal, JournalHandle, JournalStats, MemoryMeta, MetaOptions,
    MetaStore, MetaTable, Record, Records, Recovered, TableStats,
};
pub use error::MetaError;
