//! What a server of block devices gives to the sessions: exports, and the list of them.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::errno::Fault;

/// Constraints on offsets and lengths ("Block size constraints").
///
/// Requests that break them are refused with `EINVAL`, except that a client which did not ask for
/// them must be served at a granularity of one byte: an export whose `minimum` is greater than one
/// refuses such clients with `NBD_REP_ERR_BLOCK_SIZE_REQD`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Bytes, a power of two from 1 to 64 KiB; every offset and length is a multiple of it.
    pub minimum: u32,
    /// Bytes, a power of two of at least 512 and `minimum`: what is efficient.
    pub preferred: u32,
    /// Bytes, a multiple of `minimum`: the longest read and write payload.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What a client assumes that was told nothing: 1 byte, 4 KiB, 32 MiB.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }
}

/// What a client is told about an export before it uses it. Plain data, fixed for a session: a
/// client learns a new size when it connects again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The canonical name, at most 4096 bytes.
    pub name: String,
    /// For people; empty if there is nothing to say.
    pub description: String,
    /// Bytes; a multiple of `block_sizes.minimum`.
    pub size: u64,
    /// Whether writes, trims and zeroings are refused with `EPERM`.
    pub is_read_only: bool,
    /// Whether a flush on one connection covers all that *any* connection was told is done, and
    /// every connection reads what another wrote. Say so only if it is true.
    pub can_multi_conn: bool,
    /// Whether one connection at a time is served under this name: a new one cuts off the older ones
    /// and begins when their last request has ended. Excludes `can_multi_conn`.
    pub is_single: bool,
    /// Whether `trim` is served.
    pub can_trim: bool,
    /// Whether `cache` does something; a client is told that it may ask.
    pub can_cache: bool,
    /// Whether `write_zeroes` knows at once if it can be fast.
    pub can_fast_zero: bool,
    /// Constraints on requests.
    pub block_sizes: BlockSizes,
    /// Names of the metadata contexts besides `base:allocation`, each `namespace:leaf`.
    pub contexts: Vec<String>,
}

impl ExportInfo {
    /// A writable export with every command and one connection.
    pub fn new(name: impl Into<String>, size: u64) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            size,
            is_read_only: false,
            can_multi_conn: false,
            is_single: false,
            can_trim: true,
            can_cache: true,
            can_fast_zero: true,
            block_sizes: BlockSizes::default(),
            contexts: Vec::new(),
        }
    }
}

/// A stretch of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of the export.
    Data(Bytes),
    /// This many zero bytes.
    Zeroes(u64),
}

impl Piece {
    /// Bytes of the export that the piece covers.
    pub fn len(&self) -> u64 {
        match self {
            Piece::Data(data) => data.len() as u64,
            Piece::Zeroes(length) => *length,
        }
    }

    /// Whether the piece covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A stretch with one status in one metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least one.
    pub length: u64,
    /// Flags of the context; without extended headers only the low 32 bits travel.
    pub flags: u64,
}

/// How to write zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroOptions {
    /// The range must stay (or become) allocated.
    pub no_hole: bool,
    /// Fail with [`crate::Errno::NotSup`] at once, before anything changed, if this would be as slow
    /// as writing the zeroes.
    pub fast_zero: bool,
    /// Durable before the call returns.
    pub fua: bool,
}

/// One block device.
///
/// The session has checked every range against `info()` before it calls, so ranges are not empty
/// and lie within the size. Many calls run at once. A call is polled for the first time when its
/// request has been read, and then driven to its end. *Calls that overlap must take effect in the
/// order in which they were polled for the first time*: that is why a request of a connection that
/// broke can never overwrite what a later connection wrote.
#[async_trait]
pub trait Export: Send + Sync + 'static {
    /// Size, constraints and abilities. The session asks once, when it opens the export.
    fn info(&self) -> ExportInfo;

    /// The bytes from `offset`, as pieces whose lengths sum up to `length` exactly.
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Piece>, Fault>;

    /// Writes `data`; with `fua` it is durable on return.
    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Fault>;

    /// Makes durable what was acknowledged before the call on *any* connection.
    async fn flush(&self) -> Result<(), Fault>;

    /// Gives up the contents of a range; reads of it are unspecified afterwards by the protocol.
    async fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), Fault>;

    /// Makes a range read as zeroes.
    async fn write_zeroes(&self, offset: u64, length: u64, how: ZeroOptions) -> Result<(), Fault>;

    /// A hint that the range is read soon. Success promises nothing.
    async fn cache(&self, offset: u64, length: u64) -> Result<(), Fault> {
        let _ = (offset, length);
        Ok(())
    }

    /// Status of the range in one context (`base:allocation`, or a name from `info().contexts`):
    /// consecutive extents from `offset` on, at least one, at most `extents_max`. They may end
    /// before the range does, or behind it.
    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault>;
}

/// Who the client is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Client {
    /// Address for logs: `127.0.0.1:4242`, `unix`.
    pub address: String,
    /// Whether the connection is encrypted.
    pub is_tls: bool,
    /// Identity from a verified client certificate.
    pub certificate: Option<Certificate>,
}

/// A client certificate that the server's authority signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The common name of the subject; absent if there is none.
    pub common_name: Option<String>,
    /// The whole certificate, DER.
    pub der: Bytes,
}

/// An entry of `NBD_OPT_LIST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name by which the export is opened.
    pub name: String,
    /// For people; empty if there is nothing to say.
    pub description: String,
}

/// Why an export is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of this name.
    #[error("there is no export of this name")]
    Unknown,
    /// There is one, and this client may not open it.
    #[error("this client may not open the export: {0}")]
    Denied(String),
    /// It cannot be opened now.
    #[error("the export cannot be opened now: {0}")]
    Unavailable(String),
}

/// What an export is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To tell the client about it; nothing is read or written.
    Describe,
    /// To be served on this connection.
    Attach,
}

/// The exports of a server.
#[async_trait]
pub trait Exports: Send + Sync + 'static {
    /// The export of this name; the empty name asks for the default export, if there is one.
    async fn open(
        &self,
        name: &str,
        client: &Client,
        purpose: Purpose,
    ) -> Result<Arc<dyn Export>, OpenError>;

    /// What this client may open.
    async fn list(&self, client: &Client) -> Result<Vec<Listed>, OpenError>;
}
