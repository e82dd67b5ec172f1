//! One request: checked against what was agreed on, then run on the export, then answered.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::codec::{Frames, Mode, ReplyTo, Request, StatusPayload};
use crate::consts::{allocation, cmd, cmd_flag};
use crate::errno::{Errno, Fault};
use crate::export::{Export, Extent, Piece, ZeroOptions};
use crate::handshake::Negotiated;

/// Most extents in one reply chunk; a client asks again behind the last one.
pub(crate) const EXTENTS_MAX: usize = 4096;
/// Longest payload of `NBD_CMD_BLOCK_STATUS` that is read, in bytes.
const STATUS_PAYLOAD_MAX: u64 = 8 + 4 * 1024;
/// Bytes that the bookkeeping of one request is taken to cost.
const REQUEST_COST: u64 = 512;

/// What a client agreed on and the export that it got.
pub(crate) struct Transmission {
    export: Arc<dyn Export>,
    negotiated: Negotiated,
}

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job {
    Nothing,
    Read { offset: u64, length: u32, is_whole: bool },
    Write { offset: u64, data: Bytes, fua: bool },
    Flush,
    Trim { offset: u64, length: u64, fua: bool },
    Zero { offset: u64, length: u64, how: ZeroOptions },
    Cache { offset: u64, length: u64 },
    Status { offset: u64, length: u64, contexts: Vec<u32>, is_one: bool },
}

impl Job {
    /// Whether it changes the export, and must not run for a client that has left.
    pub(crate) fn is_mutation(&self) -> bool {
        matches!(self, Job::Write { .. } | Job::Trim { .. } | Job::Zero { .. })
    }
}

impl Transmission {
    pub(crate) fn new(export: Arc<dyn Export>, negotiated: Negotiated) -> Self {
        Self { export, negotiated }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.negotiated.mode
    }

    pub(crate) fn reply_to(&self, request: &Request) -> ReplyTo {
        ReplyTo { mode: self.mode(), cookie: request.cookie, offset: request.offset }
    }

    /// Whether the payload is to be read into memory; if not, it is skipped.
    pub(crate) fn wants_payload(&self, request: &Request) -> bool {
        let length = request.payload_len(self.mode());
        match request.command {
            cmd::WRITE => length <= u64::from(self.negotiated.info.block_sizes.maximum),
            cmd::BLOCK_STATUS => length <= STATUS_PAYLOAD_MAX,
            _ => false,
        }
    }

    /// Bytes of memory that the request may take, its reply included.
    pub(crate) fn cost(&self, request: &Request) -> u64 {
        let maximum = u64::from(self.negotiated.info.block_sizes.maximum);
        let variable = match request.command {
            cmd::READ | cmd::WRITE => request.length.min(maximum),
            cmd::BLOCK_STATUS => {
                let contexts = self.negotiated.contexts.len().max(1) as u64;
                STATUS_PAYLOAD_MAX + contexts * EXTENTS_MAX as u64 * 16
            }
            _ => 0,
        };
        REQUEST_COST + variable
    }

    /// Turns a request into a job. `payload` is absent if there was none, or it was skipped.
    pub(crate) fn check(&self, request: &Request, payload: Option<Bytes>) -> Result<Job, Fault> {
        self.check_flags(request)?;
        let had_payload = request.payload_len(self.mode()) > 0;
        if had_payload && payload.is_none() {
            return Err(Fault::new(Errno::Inval, "the command has no such payload"));
        }
        let fua = request.flags & cmd_flag::FUA != 0;
        let (offset, length) = (request.offset, request.length);
        let behind_end = match request.command {
            cmd::WRITE | cmd::WRITE_ZEROES => Errno::NoSpc,
            _ => Errno::Inval,
        };
        let status =
            (request.command == cmd::BLOCK_STATUS).then(|| self.status(request, payload.as_ref()));
        if let Some(job) = status {
            return job;
        }
        match request.command {
            cmd::FLUSH if offset == 0 && length == 0 => return Ok(Job::Flush),
            cmd::FLUSH => return Err(Fault::new(Errno::Inval, "a flush has no range")),
            cmd::READ | cmd::WRITE | cmd::TRIM | cmd::CACHE | cmd::WRITE_ZEROES => {}
            _ => return Err(Fault::new(Errno::Inval, "unknown command")),
        }
        let is_change = !matches!(request.command, cmd::READ | cmd::CACHE);
        if is_change && self.negotiated.info.is_read_only {
            return Err(Fault::new(Errno::Perm, "the export is read-only"));
        }
        self.check_range(offset, length, behind_end)?;
        if length == 0 {
            return Ok(Job::Nothing);
        }
        Ok(match request.command {
            cmd::READ => {
                let is_whole = request.flags & cmd_flag::DF != 0;
                Job::Read { offset, length: self.payload_bytes(length)?, is_whole }
            }
            cmd::WRITE => {
                self.payload_bytes(length)?;
                Job::Write { offset, data: payload.unwrap_or_default(), fua }
            }
            cmd::TRIM => Job::Trim { offset, length, fua },
            cmd::CACHE => Job::Cache { offset, length },
            _ => {
                let how = ZeroOptions {
                    no_hole: request.flags & cmd_flag::NO_HOLE != 0,
                    fast_zero: request.flags & cmd_flag::FAST_ZERO != 0,
                    fua,
                };
                Job::Zero { offset, length, how }
            }
        })
    }

    /// "Command flags": a flag that the command does not know is an error, FUA is known to all.
    fn check_flags(&self, request: &Request) -> Result<(), Fault> {
        let mode = self.mode();
        let own = match request.command {
            cmd::READ if mode != Mode::Simple => cmd_flag::DF,
            cmd::WRITE if mode == Mode::Extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES if self.negotiated.info.can_fast_zero => {
                cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO
            }
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE,
            cmd::BLOCK_STATUS if mode == Mode::Extended => {
                cmd_flag::REQ_ONE | cmd_flag::PAYLOAD_LEN
            }
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        if request.flags & !(own | cmd_flag::FUA) != 0 {
            return Err(Fault::new(Errno::Inval, "the command has no such flag"));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, length: u64, behind_end: Errno) -> Result<(), Fault> {
        let minimum = u64::from(self.negotiated.info.block_sizes.minimum.max(1));
        if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
            return Err(Fault::new(Errno::Inval, "not a multiple of the minimum block size"));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.negotiated.info.size => Ok(()),
            _ => Err(Fault::new(behind_end, "the range ends behind the export")),
        }
    }

    fn payload_bytes(&self, length: u64) -> Result<u32, Fault> {
        let maximum = self.negotiated.info.block_sizes.maximum;
        let length = u32::try_from(length).ok().filter(|length| *length <= maximum);
        length.ok_or_else(|| Fault::new(Errno::Inval, "longer than the maximum block size"))
    }

    /// "NBD_CMD_BLOCK_STATUS".
    fn status(&self, request: &Request, payload: Option<&Bytes>) -> Result<Job, Fault> {
        let all = 0..self.negotiated.contexts.len() as u32;
        if all.is_empty() {
            return Err(Fault::new(Errno::Inval, "no metadata context was selected"));
        }
        let (length, contexts) = match payload {
            None => (request.length, all.collect()),
            Some(payload) => {
                let malformed = || Fault::new(Errno::Inval, "malformed list of contexts");
                let mut payload = StatusPayload::decode(payload).ok_or_else(malformed)?;
                payload.contexts.sort_unstable();
                payload.contexts.dedup();
                if payload.contexts.iter().any(|id| !all.contains(id)) {
                    return Err(Fault::new(Errno::Inval, "a context was not selected"));
                }
                (payload.length, payload.contexts)
            }
        };
        if length == 0 {
            return Err(Fault::new(Errno::Inval, "the range is empty"));
        }
        self.check_range(request.offset, length, Errno::Inval)?;
        let is_one = request.flags & cmd_flag::REQ_ONE != 0;
        Ok(Job::Status { offset: request.offset, length, contexts, is_one })
    }

    /// Runs a job and encodes its reply. `None`: the export stops and has not done it, so the client
    /// is to ask again over another connection.
    pub(crate) async fn run(&self, to: ReplyTo, job: Job) -> Option<Frames> {
        match self.try_run(to, job).await {
            Ok(frames) => Some(frames),
            Err(fault) if fault.errno == Errno::Shutdown => None,
            Err(fault) => Some(to.failed(&fault)),
        }
    }

    async fn try_run(&self, to: ReplyTo, job: Job) -> Result<Frames, Fault> {
        let export = &self.export;
        match job {
            Job::Nothing => {}
            Job::Read { offset, length, is_whole } => {
                let pieces = export.read(offset, length).await?;
                let got: u64 = pieces.iter().map(Piece::len).sum();
                if got != u64::from(length) {
                    tracing::error!(wanted = length, got, "export returned a wrong length");
                    return Err(Errno::Io.into());
                }
                return Ok(to.read(pieces, is_whole));
            }
            Job::Write { offset, data, fua } => export.write(offset, data, fua).await?,
            Job::Flush => export.flush().await?,
            Job::Trim { offset, length, fua } => export.trim(offset, length, fua).await?,
            Job::Zero { offset, length, how } => export.write_zeroes(offset, length, how).await?,
            Job::Cache { offset, length } => export.cache(offset, length).await?,
            Job::Status { offset, length, contexts, is_one } => {
                let mut found = Vec::with_capacity(contexts.len());
                for id in contexts {
                    found.push((id, self.extents(id, offset, length, is_one).await?));
                }
                return Ok(to.block_status(&found));
            }
        }
        Ok(to.done())
    }

    async fn extents(
        &self,
        id: u32,
        offset: u64,
        length: u64,
        is_one: bool,
    ) -> Result<Vec<Extent>, Fault> {
        let context = self.negotiated.contexts.get(id as usize);
        let context = context.map_or(allocation::CONTEXT, String::as_str);
        let max = if is_one { 1 } else { EXTENTS_MAX };
        let found = self.export.block_status(context, offset, length, max).await?;
        let minimum = u64::from(self.negotiated.info.block_sizes.minimum.max(1));
        let extents = fit(found, length, max, self.mode(), minimum);
        if extents.is_empty() {
            tracing::error!(context, "export told no status");
            return Err(Errno::Io.into());
        }
        Ok(extents)
    }
}

/// Joins neighbours of one status, cuts at the end of the range, and keeps lengths within what the
/// form of the reply can tell.
fn fit(found: Vec<Extent>, length: u64, max: usize, mode: Mode, minimum: u64) -> Vec<Extent> {
    // 32-bit lengths are to be multiples of the minimum block size.
    let longest = match mode {
        Mode::Extended => u64::MAX,
        Mode::Simple | Mode::Structured => u64::from(u32::MAX) / minimum * minimum,
    };
    let mut extents: Vec<Extent> = Vec::new();
    let mut left = length;
    for extent in found {
        let length = extent.length.min(left);
        if length == 0 {
            continue;
        }
        left -= length;
        let told = extents.len();
        match extents.last_mut() {
            Some(last) if last.flags == extent.flags => last.length += length,
            _ if told == max => break,
            _ => extents.push(Extent { length, flags: extent.flags }),
        }
    }
    if let Some(long) = extents.iter().position(|extent| extent.length > longest) {
        // What follows is asked for again, behind the part that could be told.
        extents.truncate(long + 1);
        extents[long].length = longest;
    }
    extents
}

/// A buffer of exactly `length` bytes to come.
pub(crate) fn payload_buffer(length: u64) -> BytesMut {
    BytesMut::with_capacity(usize::try_from(length).unwrap_or(0))
}
