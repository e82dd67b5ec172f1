//! Streams a backup of the metadata to one caller, from a thread: it reads files.

use std::time::Duration;

use endio_api::conversion::BackupPiece;
use endio_api::status;
use endio_store::meta::{JournalHandle, MetaError};
use endio_types::Reason;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::grpc::Streamed;

/// Pieces read ahead of the caller; with the one in hand they bound the memory of a backup.
const PIECES_AHEAD: usize = 4;
/// A caller that takes nothing for so long is cut off: a backup keeps old files from being dropped.
const STALL_MAX: Duration = Duration::from_secs(60);

/// Begins a backup. It ends, and lets go of its turn, when the caller goes away.
pub(crate) fn start(journal: JournalHandle, turn: OwnedSemaphorePermit) -> Streamed<BackupPiece> {
    let (pieces, stream) = mpsc::channel(PIECES_AHEAD);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let sent = send_all(&journal, |piece| {
            let sent = pieces.send_timeout(piece, STALL_MAX);
            runtime.block_on(sent).is_ok()
        });
        match sent {
            Ok(Some(bytes)) => tracing::info!(bytes, "a backup of the metadata was taken"),
            Ok(None) => tracing::warn!("a backup was given up by its caller"),
            Err(error) => tracing::error!(%error, "a backup of the metadata failed"),
        }
    });
    Box::pin(ReceiverStream::new(stream))
}

/// Returns the bytes sent; `None`: the caller is gone.
fn send_all(
    journal: &JournalHandle,
    mut send: impl FnMut(Result<BackupPiece, Status>) -> bool,
) -> Result<Option<u64>, MetaError> {
    let mut pieces = || -> Result<Option<u64>, MetaError> {
        let mut backup = journal.backup()?;
        let mut bytes = 0;
        while let Some(data) = backup.next_piece()? {
            bytes += data.len() as u64;
            if !send(Ok(BackupPiece { data })) {
                return Ok(None);
            }
        }
        Ok(Some(bytes))
    };
    let done = pieces();
    if let Err(error) = &done {
        let reason = match error {
            MetaError::Damaged { .. } => Reason::ChecksumMismatch,
            error => error.reason(),
        };
        // File names are no secret of the operator who asks for a backup.
        send(Err(status::status(reason, error.to_string())));
    }
    done
}
