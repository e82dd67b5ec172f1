//! Requests and replies of the transmission phase as bytes ("Transmission phase" in the NBD
//! specification: "Request message", "Simple reply message", "Structured reply chunk message",
//! "Extended headers").
//!
//! Pure functions over slices: no socket, no clock. Decoders take any bytes and never panic.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::consts::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, cmd, cmd_flag,
};
use crate::errno::Fault;
use crate::export::{Extent, Piece};

/// The form of headers that the handshake agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests, extended replies.
    Extended,
}

impl Mode {
    /// Bytes of a request header in this mode.
    pub const fn request_len(self) -> usize {
        match self {
            Mode::Simple | Mode::Structured => 28,
            Mode::Extended => 32,
        }
    }

    /// Bytes of a reply header in this mode.
    pub const fn reply_len(self) -> usize {
        match self {
            Mode::Simple => 16,
            Mode::Structured => 20,
            Mode::Extended => 32,
        }
    }
}

/// Bytes that are no message of the protocol. The stream cannot be understood any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The first word is not the magic number of the mode.
    #[error("bad magic number {0:#010x}")]
    Magic(u32),
    /// There are fewer bytes than the header has.
    #[error("the header is cut short")]
    Short,
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`, also unknown ones.
    pub flags: u16,
    /// `NBD_CMD_*`, also unknown ones.
    pub command: u16,
    /// Chosen by the client, returned in every reply.
    pub cookie: u64,
    /// Byte offset in the export.
    pub offset: u64,
    /// Bytes: of the effect, or of the payload where there is one.
    pub length: u64,
}

impl Request {
    /// Reads a header from exactly `mode.request_len()` bytes (more are ignored).
    ///
    /// # Errors
    /// [`CodecError`]: the connection is to be dropped, because the next header cannot be found.
    pub fn decode(mode: Mode, mut bytes: &[u8]) -> Result<Self, CodecError> {
        if bytes.len() < mode.request_len() {
            return Err(CodecError::Short);
        }
        let expected = match mode {
            Mode::Simple | Mode::Structured => REQUEST_MAGIC,
            Mode::Extended => EXTENDED_REQUEST_MAGIC,
        };
        let magic = bytes.get_u32();
        if magic != expected {
            return Err(CodecError::Magic(magic));
        }
        let (flags, command) = (bytes.get_u16(), bytes.get_u16());
        let (cookie, offset) = (bytes.get_u64(), bytes.get_u64());
        let length = match mode {
            Mode::Simple | Mode::Structured => u64::from(bytes.get_u32()),
            Mode::Extended => bytes.get_u64(),
        };
        Ok(Self { flags, command, cookie, offset, length })
    }

    /// Appends the header; without extended headers only the low 32 bits of the length travel.
    pub fn encode(&self, mode: Mode, out: &mut BytesMut) {
        out.put_u32(match mode {
            Mode::Simple | Mode::Structured => REQUEST_MAGIC,
            Mode::Extended => EXTENDED_REQUEST_MAGIC,
        });
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        match mode {
            Mode::Simple | Mode::Structured => out.put_u32(self.length as u32),
            Mode::Extended => out.put_u64(self.length),
        }
    }

    /// Bytes that follow the header on the wire.
    ///
    /// With extended headers the flag decides ("NBD_CMD_FLAG_PAYLOAD_LEN"), so that a server can
    /// skip the payload of a command which it does not know. A write has a payload even without the
    /// flag: QEMU's client (10.0) leaves it out, and QEMU's server takes that.
    pub fn payload_len(&self, mode: Mode) -> u64 {
        let has_payload = match mode {
            Mode::Simple | Mode::Structured => self.command == cmd::WRITE,
            Mode::Extended => self.command == cmd::WRITE || self.flags & cmd_flag::PAYLOAD_LEN != 0,
        };
        if has_payload { self.length } else { 0 }
    }
}

/// The payload of `NBD_CMD_BLOCK_STATUS`: a range and the contexts that the client wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusPayload {
    /// Bytes of the range.
    pub length: u64,
    /// Context ids of the handshake.
    pub contexts: Vec<u32>,
}

impl StatusPayload {
    /// Reads a payload; `None` if its length is not 8 + 4·n with n of at least one.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() < 12 || !bytes.len().is_multiple_of(4) {
            return None;
        }
        let length = bytes.get_u64();
        let contexts = bytes.chunks_exact(4).map(|mut id| id.get_u32()).collect();
        Some(Self { length, contexts })
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u64(self.length);
        for id in &self.contexts {
            out.put_u32(*id);
        }
    }
}

/// A reply as the buffers to write, in order. Data is not copied.
pub type Frames = Vec<Bytes>;

/// What a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    /// Form of the reply.
    pub mode: Mode,
    /// Cookie of the request.
    pub cookie: u64,
    /// Offset of the request; extended replies repeat it.
    pub offset: u64,
}

impl ReplyTo {
    fn header(&self, flags: u16, kind: u16, length: u64, out: &mut BytesMut) {
        match self.mode {
            Mode::Simple | Mode::Structured => {
                out.put_u32(STRUCTURED_REPLY_MAGIC);
                out.put_u16(flags);
                out.put_u16(kind);
                out.put_u64(self.cookie);
                out.put_u32(length as u32);
            }
            Mode::Extended => {
                out.put_u32(EXTENDED_REPLY_MAGIC);
                out.put_u16(flags);
                out.put_u16(kind);
                out.put_u64(self.cookie);
                out.put_u64(self.offset);
                out.put_u64(length);
            }
        }
    }

    fn simple(&self, error: u32) -> Bytes {
        let mut out = BytesMut::with_capacity(16);
        out.put_u32(SIMPLE_REPLY_MAGIC);
        out.put_u32(error);
        out.put_u64(self.cookie);
        out.freeze()
    }

    /// Success without data.
    pub fn done(&self) -> Frames {
        if self.mode == Mode::Simple {
            return vec![self.simple(0)];
        }
        let mut out = BytesMut::with_capacity(self.mode.reply_len());
        self.header(chunk::DONE, chunk::NONE, 0, &mut out);
        vec![out.freeze()]
    }

    /// Failure, with its message where the form has room for one.
    pub fn failed(&self, fault: &Fault) -> Frames {
        let code = fault.errno.code();
        if self.mode == Mode::Simple {
            return vec![self.simple(code)];
        }
        let message = cut(&fault.message, crate::consts::STRING_MAX);
        let mut out = BytesMut::with_capacity(self.mode.reply_len() + 6 + message.len());
        self.header(chunk::DONE, chunk::ERROR, 6 + message.len() as u64, &mut out);
        out.put_u32(code);
        out.put_u16(message.len() as u16);
        out.put_slice(message.as_bytes());
        vec![out.freeze()]
    }

    /// What was read, in one chunk if `is_whole` (`NBD_CMD_FLAG_DF`), else with a chunk for each
    /// piece, so that zeroes do not travel (`NBD_REPLY_TYPE_OFFSET_HOLE`).
    pub fn read(&self, pieces: Vec<Piece>, is_whole: bool) -> Frames {
        let pieces: Vec<Piece> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
        if self.mode == Mode::Simple {
            let mut frames = vec![self.simple(0)];
            frames.extend(pieces.into_iter().map(plain));
            return frames;
        }
        let all_zero = pieces.iter().all(|piece| matches!(piece, Piece::Zeroes(_)));
        let total: u64 = pieces.iter().map(Piece::len).sum();
        if total == 0 {
            return self.done();
        }
        if is_whole && !all_zero {
            let mut head = BytesMut::with_capacity(self.mode.reply_len() + 8);
            self.header(chunk::DONE, chunk::OFFSET_DATA, 8 + total, &mut head);
            head.put_u64(self.offset);
            let mut frames = vec![head.freeze()];
            frames.extend(pieces.into_iter().map(plain));
            return frames;
        }
        let pieces = if all_zero { vec![Piece::Zeroes(total)] } else { pieces };
        let mut frames = Vec::with_capacity(2 * pieces.len());
        let (mut offset, last) = (self.offset, pieces.len().saturating_sub(1));
        for (index, piece) in pieces.into_iter().enumerate() {
            let flags = if index == last { chunk::DONE } else { 0 };
            let length = piece.len();
            let mut head = BytesMut::with_capacity(self.mode.reply_len() + 12);
            match piece {
                Piece::Data(data) => {
                    self.header(flags, chunk::OFFSET_DATA, 8 + length, &mut head);
                    head.put_u64(offset);
                    frames.push(head.freeze());
                    frames.push(data);
                }
                Piece::Zeroes(length) => {
                    self.header(flags, chunk::OFFSET_HOLE, 12, &mut head);
                    head.put_u64(offset);
                    // A read is at most 2^32 - 1 bytes long, so a run of zeroes is too.
                    head.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
                    frames.push(head.freeze());
                }
            }
            offset = offset.saturating_add(length);
        }
        frames
    }

    /// Status of a range, one chunk per context. Not for [`Mode::Simple`], which has no form for it.
    pub fn block_status(&self, contexts: &[(u32, Vec<Extent>)]) -> Frames {
        if contexts.is_empty() {
            return self.done();
        }
        let mut out = BytesMut::new();
        for (index, (id, extents)) in contexts.iter().enumerate() {
            let flags = if index + 1 == contexts.len() { chunk::DONE } else { 0 };
            if self.mode == Mode::Extended {
                let length = 8 + 16 * extents.len() as u64;
                self.header(flags, chunk::BLOCK_STATUS_EXT, length, &mut out);
                out.put_u32(*id);
                out.put_u32(extents.len() as u32);
                for extent in extents {
                    out.put_u64(extent.length);
                    out.put_u64(extent.flags);
                }
            } else {
                let length = 4 + 8 * extents.len() as u64;
                self.header(flags, chunk::BLOCK_STATUS, length, &mut out);
                out.put_u32(*id);
                for extent in extents {
                    out.put_u32(u32::try_from(extent.length).unwrap_or(u32::MAX));
                    out.put_u32(extent.flags as u32);
                }
            }
        }
        vec![out.freeze()]
    }
}

/// The header of a reply, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; data of a read follows if the error is zero.
    Simple {
        /// `NBD_E*`, or zero.
        error: u32,
        /// Cookie of the request.
        cookie: u64,
    },
    /// A structured or extended chunk.
    Chunk {
        /// `NBD_REPLY_FLAG_*`.
        flags: u16,
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// Cookie of the request.
        cookie: u64,
        /// Offset of the request; only in extended headers.
        offset: Option<u64>,
        /// Bytes of payload that follow.
        length: u64,
    },
}

impl ReplyHeader {
    /// Reads a reply header and says how many bytes it took.
    ///
    /// # Errors
    /// [`CodecError`] for a form that the mode does not allow, or too few bytes.
    pub fn decode(mode: Mode, bytes: &[u8]) -> Result<(Self, usize), CodecError> {
        let mut rest = bytes;
        if rest.len() < 4 {
            return Err(CodecError::Short);
        }
        let magic = rest.get_u32();
        let length = match (magic, mode) {
            (SIMPLE_REPLY_MAGIC, Mode::Simple | Mode::Structured) => 16,
            (STRUCTURED_REPLY_MAGIC, Mode::Structured) => 20,
            (EXTENDED_REPLY_MAGIC, Mode::Extended) => 32,
            _ => return Err(CodecError::Magic(magic)),
        };
        if bytes.len() < length {
            return Err(CodecError::Short);
        }
        let header = if magic == SIMPLE_REPLY_MAGIC {
            ReplyHeader::Simple { error: rest.get_u32(), cookie: rest.get_u64() }
        } else {
            let (flags, kind, cookie) = (rest.get_u16(), rest.get_u16(), rest.get_u64());
            let (offset, length) = match mode {
                Mode::Extended => (Some(rest.get_u64()), rest.get_u64()),
                Mode::Simple | Mode::Structured => (None, u64::from(rest.get_u32())),
            };
            ReplyHeader::Chunk { flags, kind, cookie, offset, length }
        };
        Ok((header, length))
    }
}

/// One mebibyte of zeroes, shared by all replies that must send zeroes as data.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// A piece as bytes; zeroes up to 1 MiB cost no memory.
fn plain(piece: Piece) -> Bytes {
    match piece {
        Piece::Data(data) => data,
        Piece::Zeroes(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            match ZEROES.get(..length) {
                Some(zeroes) => Bytes::from_static(zeroes),
                None => BytesMut::zeroed(length).freeze(),
            }
        }
    }
}

/// The longest start of `text` with at most `max` bytes.
pub(crate) fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
