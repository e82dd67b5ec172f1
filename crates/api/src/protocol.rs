//! The versions of the protocol on the wire: in the first message of a session with conversion, in a
//! metadata entry on the legs to block-stores.

use endio_types::{Protocol, ProtocolError, Reason};
use tonic::{Request, Status, metadata::MetadataMap, metadata::MetadataValue};

use crate::{common, conversion};

/// Name of the metadata entry.
pub const METADATA: &str = "endio-protocol";

/// What this program says of itself.
pub fn ours() -> Option<common::Protocol> {
    let Protocol { major, minor } = Protocol::CURRENT;
    Some(common::Protocol { major, minor })
}

/// What a peer says.
pub fn theirs(said: Option<&common::Protocol>) -> Option<Protocol> {
    said.map(|said| Protocol { major: said.major, minor: said.minor })
}

fn refused(error: ProtocolError) -> Status {
    tracing::warn!(%error, "a peer was refused");
    crate::status::status(Reason::Protocol, error.to_string())
}

/// Whether the writeback that says this may open a session; anything but `Hello` passes.
///
/// # Errors
/// `PROTOCOL`, with what to do.
pub fn check_writeback(message: &conversion::WritebackMessage) -> Result<(), Status> {
    match &message.message {
        Some(conversion::writeback_message::Message::Hello(hello)) => {
            Protocol::CURRENT.admits(theirs(hello.protocol.as_ref())).map_err(refused)
        }
        _ => Ok(()),
    }
}

/// Whether the store that says this may open a session; anything but a registration passes.
///
/// # Errors
/// `PROTOCOL`, with what to do.
pub fn check_store(message: &conversion::StoreMessage) -> Result<(), Status> {
    match &message.message {
        Some(conversion::store_message::Message::Register(register)) => {
            Protocol::CURRENT.admits(theirs(register.protocol.as_ref())).map_err(refused)
        }
        _ => Ok(()),
    }
}

/// Whether a service that answered a first message goes on to be spoken with.
///
/// # Errors
/// It is too old.
pub fn check_answer(said: Option<&common::Protocol>) -> Result<(), ProtocolError> {
    Protocol::CURRENT.goes_on_with(theirs(said))
}

/// Says the version with a call.
pub fn say<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    // Digits and a point are a valid value.
    if let Ok(value) = MetadataValue::try_from(Protocol::CURRENT.to_string()) {
        request.metadata_mut().insert(METADATA, value);
    }
    request
}

/// Whether a caller may speak, by its metadata.
///
/// # Errors
/// `PROTOCOL`, with what to do.
pub fn check_metadata(metadata: &MetadataMap) -> Result<(), Status> {
    let said = metadata.get(METADATA).map(|value| {
        let text = value.to_str().map_err(|_| ProtocolError::Malformed)?;
        text.parse::<Protocol>()
    });
    said.transpose().and_then(|said| Protocol::CURRENT.admits(said)).map_err(refused)
}
