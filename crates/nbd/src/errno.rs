//! Errors that a client can be told ("Error values" in the NBD specification).

/// The errors of the transmission phase. Any other fault of an export is told as [`Errno::Io`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Errno {
    /// The export is read-only, or the client may not do this.
    #[error("operation not permitted")]
    Perm,
    /// The medium failed, or an acknowledged write was lost.
    #[error("input/output error")]
    Io,
    /// The server is out of memory for this request.
    #[error("cannot allocate memory")]
    NoMem,
    /// The request is malformed.
    #[error("invalid argument")]
    Inval,
    /// No space is left, or the range ends behind the export.
    #[error("no space left on device")]
    NoSpc,
    /// The reply would be too large for one chunk.
    #[error("value too large")]
    Overflow,
    /// Not supported; also: zeroes could not be written fast.
    #[error("operation not supported")]
    NotSup,
    /// The server is about to stop. An export that says so ends the connection without an answer,
    /// and the client may send the request again.
    #[error("server is shutting down")]
    Shutdown,
}

impl Errno {
    /// Every error, for tests and tables.
    pub const ALL: [Errno; 8] = [
        Errno::Perm,
        Errno::Io,
        Errno::NoMem,
        Errno::Inval,
        Errno::NoSpc,
        Errno::Overflow,
        Errno::NotSup,
        Errno::Shutdown,
    ];

    /// The number on the wire; never zero.
    pub const fn code(self) -> u32 {
        match self {
            Errno::Perm => 1,
            Errno::Io => 5,
            Errno::NoMem => 12,
            Errno::Inval => 22,
            Errno::NoSpc => 28,
            Errno::Overflow => 75,
            Errno::NotSup => 95,
            Errno::Shutdown => 108,
        }
    }

    /// The error with this number; an unknown number is [`Errno::Inval`], as the specification asks
    /// ("Error values").
    pub fn from_code(code: u32) -> Self {
        let known = Self::ALL.into_iter().find(|errno| errno.code() == code);
        known.unwrap_or(Errno::Inval)
    }
}

/// A refusal with a sentence for the people who read the client's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// The error on the wire.
    pub errno: Errno,
    /// One sentence, sent along in structured replies.
    pub message: String,
}

impl Fault {
    /// A fault with a message of its own.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self { errno, message: message.into() }
    }
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self { errno, message: errno.to_string() }
    }
}
