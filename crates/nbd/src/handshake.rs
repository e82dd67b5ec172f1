//! The handshake as a machine without I/O: bytes of the client in, actions of the server out.
//!
//! ```text
//!  greeting ──► ClientFlags ──► Options ──┬─ GO, EXPORT_NAME ──► Begin (transmission)
//!                                 ▲  │    ├─ STARTTLS ──► bytes are TLS, everything forgotten ─┐
//!                                 │  │    └─ ABORT, violation ──► Close                        │
//!                                 └──┴────────────────────────────────────────────────────────┘
//! ```
//!
//! Sections of the NBD specification: "Fixed newstyle negotiation", "Termination of the session
//! during option haggling", "TLS support", "Block size constraints", "Metadata querying",
//! "Option types", "Option reply types".
//!
//! # Invariants
//! * `tls-first`: if TLS is required, nothing about exports is told or opened before it.
//! * `no-carry-over`: nothing that a client said in the clear counts after STARTTLS, and bytes that
//!   it sent behind STARTTLS without waiting end the connection.
//! * `one-answer`: every option but EXPORT_NAME gets exactly one final reply.

mod wire;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use self::wire::{context_request, info_request, is_text, open_refusal, refusal, reply, text};
use crate::codec::{Mode, cut};
use crate::consts::{
    INIT_MAGIC, OPTION_MAGIC, STRING_MAX, allocation, client_flag, handshake_flag, info, opt, rep,
    transmission_flag,
};
use crate::export::{ExportInfo, Listed, OpenError, Purpose};

/// Longest data of an option that is looked at, in bytes; longer ones are refused as too big.
pub const OPTION_DATA_MAX: usize = 64 << 10;
/// Longest data of an option that is skipped rather than ending the connection, in bytes.
const OPTION_SKIP_MAX: usize = 4 << 20;
/// Bytes of the header of an option.
const OPTION_HEADER: usize = 16;
/// Most metadata contexts that one client may select.
const CONTEXTS_MAX: usize = 64;

/// What the server wants of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// STARTTLS is unknown here.
    #[default]
    Off,
    /// A client may use TLS.
    Optional,
    /// Nothing is served without TLS ("FORCEDTLS mode").
    Required,
}

/// The result of a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// Form of headers.
    pub mode: Mode,
    /// Selected metadata contexts; the index is the id that the client was told.
    pub contexts: Vec<String>,
    /// What the client was told about the export.
    pub info: ExportInfo,
}

/// What the driver is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Read more bytes, then call [`Handshake::advance`] again.
    More,
    /// Send this, then call [`Handshake::advance`] again.
    Send(Bytes),
    /// Send this, go over to TLS, tell [`Handshake::tls_started`].
    StartTls(Bytes),
    /// List the exports and answer with [`Handshake::listed`].
    List,
    /// Open the export of this name and answer with [`Handshake::opened`].
    Open(String, Purpose),
    /// Send this; the export that was opened last is now served.
    Begin(Bytes, Box<Negotiated>),
    /// Send this and close: the client asked for it, or gave no other choice.
    Close(Bytes, CloseReason),
}

/// Why a handshake ends without transmission, though the client broke no rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client sent `NBD_OPT_ABORT`.
    #[error("the client ended the handshake")]
    Aborted,
    /// `NBD_OPT_EXPORT_NAME` has no other way to be refused.
    #[error("the export asked for with NBD_OPT_EXPORT_NAME cannot be opened")]
    ExportRefused,
}

/// A violation of the protocol: the connection is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Client flags that were not offered.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// An option does not begin with its magic number.
    #[error("an option begins with {0:#018x}")]
    Magic(u64),
    /// An option announces more data than is worth skipping.
    #[error("option {option} announces {length} bytes")]
    TooLong {
        /// Number of the option.
        option: u32,
        /// Bytes announced.
        length: u32,
    },
    /// Bytes in the clear behind STARTTLS: somebody may have injected them.
    #[error("bytes in the clear follow STARTTLS")]
    BytesBehindStartTls,
    /// A client without fixed newstyle may send `NBD_OPT_EXPORT_NAME` only.
    #[error("option {0} without fixed newstyle")]
    NotFixed(u32),
    /// The driver answered a question that was not asked.
    #[error("the driver of the handshake is out of step")]
    OutOfStep,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    ClientFlags,
    Options,
    /// Data of an option that is too big is being thrown away.
    Skip {
        option: u32,
        left: usize,
    },
    Asked(Question),
    Over,
}

/// What the driver was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Question {
    List,
    ExportName { name: String },
    Info { option: u32, name: String, wants: Vec<u16> },
    Contexts { option: u32, name: String, queries: Vec<String> },
}

/// One handshake.
#[derive(Debug, Clone)]
pub struct Handshake {
    tls: TlsPolicy,
    is_tls: bool,
    state: State,
    mode: Mode,
    is_fixed: bool,
    no_zeroes: bool,
    is_stopping: bool,
    selected: Option<Selected>,
}

/// The contexts of `NBD_OPT_SET_META_CONTEXT`; they count for the export of this name only.
#[derive(Debug, Clone)]
struct Selected {
    export: String,
    contexts: Vec<String>,
}

impl Handshake {
    /// A handshake before the first byte.
    pub fn new(tls: TlsPolicy) -> Self {
        Self {
            tls,
            is_tls: false,
            state: State::ClientFlags,
            mode: Mode::Simple,
            is_fixed: false,
            no_zeroes: false,
            is_stopping: false,
            selected: None,
        }
    }

    /// What the server sends first ("Newstyle negotiation").
    pub fn greeting() -> Bytes {
        let mut out = BytesMut::with_capacity(18);
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        out.freeze()
    }

    /// From now on options are refused with `NBD_REP_ERR_SHUTDOWN`, except ABORT.
    pub fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// The connection is encrypted now; what was agreed on in the clear is forgotten.
    ///
    /// The specification has the client begin its options again ("TLS support"): structured replies
    /// and contexts too, so that nobody in the middle can have chosen them.
    pub fn tls_started(&mut self) {
        self.is_tls = true;
        self.mode = Mode::Simple;
        self.selected = None;
        self.state = State::Options;
    }

    /// Takes what it can from `bytes` and says what to do.
    ///
    /// # Errors
    /// [`HandshakeError`] if the client broke the protocol.
    pub fn advance(&mut self, bytes: &mut BytesMut) -> Result<Action, HandshakeError> {
        match &mut self.state {
            State::ClientFlags => {
                if bytes.len() < 4 {
                    return Ok(Action::More);
                }
                let flags = bytes.get_u32();
                if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
                    return Err(HandshakeError::ClientFlags(flags));
                }
                self.is_fixed = flags & client_flag::FIXED_NEWSTYLE != 0;
                self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
                self.state = State::Options;
                self.advance(bytes)
            }
            State::Skip { option, left } => {
                let taken = bytes.len().min(*left);
                bytes.advance(taken);
                *left -= taken;
                if *left > 0 {
                    return Ok(Action::More);
                }
                let option = *option;
                self.state = State::Options;
                Ok(Action::Send(refusal(option, rep::ERR_TOO_BIG, "the option is too long")))
            }
            State::Options => self.option(bytes),
            State::Asked(_) | State::Over => Err(HandshakeError::OutOfStep),
        }
    }

    fn option(&mut self, bytes: &mut BytesMut) -> Result<Action, HandshakeError> {
        let Some(mut header) = bytes.get(..OPTION_HEADER) else {
            // A wrong magic number is told at once, not after a timeout.
            return match bytes.get(..8).map(|mut magic| magic.get_u64()) {
                Some(magic) if magic != OPTION_MAGIC => Err(HandshakeError::Magic(magic)),
                _ => Ok(Action::More),
            };
        };
        let magic = header.get_u64();
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::Magic(magic));
        }
        let (option, announced) = (header.get_u32(), header.get_u32());
        let length = announced as usize;
        if !self.is_fixed && option != opt::EXPORT_NAME {
            return Err(HandshakeError::NotFixed(option));
        }
        if length > OPTION_DATA_MAX {
            if length > OPTION_SKIP_MAX || option == opt::EXPORT_NAME {
                return Err(HandshakeError::TooLong { option, length: announced });
            }
            bytes.advance(OPTION_HEADER);
            self.state = State::Skip { option, left: length };
            return self.advance(bytes);
        }
        if bytes.len() < OPTION_HEADER + length {
            return Ok(Action::More);
        }
        bytes.advance(OPTION_HEADER);
        let data = bytes.split_to(length).freeze();
        if option == opt::STARTTLS && self.will_start_tls(&data) && !bytes.is_empty() {
            return Err(HandshakeError::BytesBehindStartTls);
        }
        Ok(self.dispatch(option, data))
    }

    fn will_start_tls(&self, data: &[u8]) -> bool {
        self.tls != TlsPolicy::Off && !self.is_tls && data.is_empty() && !self.is_stopping
    }

    fn dispatch(&mut self, option: u32, data: Bytes) -> Action {
        if option == opt::ABORT {
            self.state = State::Over;
            return Action::Close(reply(option, rep::ACK, &[]), CloseReason::Aborted);
        }
        let needs_tls = self.tls == TlsPolicy::Required && !self.is_tls;
        if option == opt::EXPORT_NAME {
            return match text(&data) {
                Some(name) if !needs_tls && !self.is_stopping => {
                    self.ask(Question::ExportName { name })
                }
                _ => self.refuse_export_name(),
            };
        }
        let refuse = |kind, why| Action::Send(refusal(option, kind, why));
        if self.is_stopping {
            return refuse(rep::ERR_SHUTDOWN, "the server is shutting down");
        }
        if needs_tls && option != opt::STARTTLS {
            return refuse(rep::ERR_TLS_REQD, "the server wants TLS first");
        }
        match option {
            opt::STARTTLS => self.start_tls(&data),
            opt::LIST if data.is_empty() => self.ask(Question::List),
            opt::STRUCTURED_REPLY if data.is_empty() => match self.mode {
                // "NBD_OPT_EXTENDED_HEADERS": it includes structured replies.
                Mode::Extended => refuse(rep::ERR_INVALID, "extended headers are in use"),
                Mode::Structured => {
                    refuse(rep::ERR_INVALID, "structured replies were agreed on before")
                }
                Mode::Simple => self.set_mode(option, Mode::Structured),
            },
            opt::EXTENDED_HEADERS if data.is_empty() => match self.mode {
                Mode::Extended => {
                    refuse(rep::ERR_INVALID, "extended headers were agreed on before")
                }
                Mode::Simple | Mode::Structured => self.set_mode(option, Mode::Extended),
            },
            opt::INFO | opt::GO => match info_request(data) {
                Some((name, wants)) => self.ask(Question::Info { option, name, wants }),
                None => refuse(rep::ERR_INVALID, "malformed request for information"),
            },
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.contexts(option, data),
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                refuse(rep::ERR_INVALID, "the option has no data")
            }
            _ => refuse(rep::ERR_UNSUP, "the option is not supported"),
        }
    }

    fn ask(&mut self, question: Question) -> Action {
        let action = match &question {
            Question::List => Action::List,
            Question::ExportName { name } => Action::Open(name.clone(), Purpose::Attach),
            Question::Info { option: opt::GO, name, .. } => {
                Action::Open(name.clone(), Purpose::Attach)
            }
            Question::Info { name, .. } | Question::Contexts { name, .. } => {
                Action::Open(name.clone(), Purpose::Describe)
            }
        };
        self.state = State::Asked(question);
        action
    }

    fn start_tls(&mut self, data: &[u8]) -> Action {
        let refuse = |kind, why| Action::Send(refusal(opt::STARTTLS, kind, why));
        if self.is_tls {
            return refuse(rep::ERR_INVALID, "TLS is in use");
        }
        if self.tls == TlsPolicy::Off {
            return refuse(rep::ERR_UNSUP, "the server has no TLS");
        }
        if !data.is_empty() {
            return refuse(rep::ERR_INVALID, "the option has no data");
        }
        Action::StartTls(reply(opt::STARTTLS, rep::ACK, &[]))
    }

    fn set_mode(&mut self, option: u32, mode: Mode) -> Action {
        self.mode = mode;
        self.selected = None;
        Action::Send(reply(option, rep::ACK, &[]))
    }

    fn contexts(&mut self, option: u32, data: Bytes) -> Action {
        let refuse = |why| Action::Send(refusal(option, rep::ERR_INVALID, why));
        if option == opt::SET_META_CONTEXT {
            // A failed selection selects nothing ("NBD_OPT_SET_META_CONTEXT").
            self.selected = None;
        }
        if self.mode == Mode::Simple {
            return refuse("metadata contexts need structured replies");
        }
        match context_request(data) {
            Some((name, queries)) => self.ask(Question::Contexts { option, name, queries }),
            None => refuse("malformed request for metadata contexts"),
        }
    }

    fn refuse_export_name(&mut self) -> Action {
        self.state = State::Over;
        Action::Close(Bytes::new(), CloseReason::ExportRefused)
    }

    /// The answer to [`Action::List`].
    ///
    /// # Errors
    /// [`HandshakeError::OutOfStep`] if that was not asked.
    pub fn listed(
        &mut self,
        exports: Result<Vec<Listed>, OpenError>,
    ) -> Result<Action, HandshakeError> {
        if self.state != State::Asked(Question::List) {
            return Err(HandshakeError::OutOfStep);
        }
        self.state = State::Options;
        let exports = match exports {
            Ok(exports) => exports,
            Err(error) => return Ok(Action::Send(open_refusal(opt::LIST, &error))),
        };
        let mut out = BytesMut::new();
        for export in exports.iter().filter(|export| is_text(&export.name)) {
            let description = cut(&export.description, STRING_MAX);
            let mut data = BytesMut::new();
            data.put_u32(export.name.len() as u32);
            data.put_slice(export.name.as_bytes());
            data.put_slice(description.as_bytes());
            out.put_slice(&reply(opt::LIST, rep::SERVER, &data));
        }
        out.put_slice(&reply(opt::LIST, rep::ACK, &[]));
        Ok(Action::Send(out.freeze()))
    }

    /// The answer to [`Action::Open`].
    ///
    /// # Errors
    /// [`HandshakeError::OutOfStep`] if that was not asked.
    pub fn opened(
        &mut self,
        export: Result<ExportInfo, OpenError>,
    ) -> Result<Action, HandshakeError> {
        let State::Asked(question) = std::mem::replace(&mut self.state, State::Options) else {
            return Err(HandshakeError::OutOfStep);
        };
        match question {
            Question::List => Err(HandshakeError::OutOfStep),
            Question::ExportName { name } => Ok(match export {
                Ok(export) if export.block_sizes.minimum <= 1 => self.begin_old(&name, export),
                _ => self.refuse_export_name(),
            }),
            Question::Info { option, name, wants } => Ok(match export {
                Ok(export) => self.inform(option, &name, &wants, export),
                Err(error) => Action::Send(open_refusal(option, &error)),
            }),
            Question::Contexts { option, name, queries } => Ok(match export {
                Ok(export) => self.select(option, name, &queries, &export),
                Err(error) => Action::Send(open_refusal(option, &error)),
            }),
        }
    }

    /// "NBD_OPT_EXPORT_NAME": size, flags, and zeroes unless both sides can do without.
    fn begin_old(&mut self, name: &str, export: ExportInfo) -> Action {
        let negotiated = self.negotiated(name, export);
        let mut out = BytesMut::with_capacity(134);
        out.put_u64(negotiated.info.size);
        out.put_u16(negotiated.transmission_flags());
        if !self.no_zeroes {
            out.put_bytes(0, 124);
        }
        self.state = State::Over;
        Action::Begin(out.freeze(), Box::new(negotiated))
    }

    fn inform(&mut self, option: u32, name: &str, wants: &[u16], export: ExportInfo) -> Action {
        let sizes = export.block_sizes;
        if sizes.minimum > 1 && !wants.contains(&info::BLOCK_SIZE) && option == opt::GO {
            let why = "the export has block size constraints: ask for NBD_INFO_BLOCK_SIZE";
            return Action::Send(refusal(option, rep::ERR_BLOCK_SIZE_REQD, why));
        }
        let negotiated = self.negotiated(name, export);
        let mut out = BytesMut::new();
        let mut tell = |kind: u16, rest: &[u8]| {
            let mut data = BytesMut::with_capacity(2 + rest.len());
            data.put_u16(kind);
            data.put_slice(rest);
            out.put_slice(&reply(option, rep::INFO, &data));
        };
        let mut data = BytesMut::new();
        data.put_u64(negotiated.info.size);
        data.put_u16(negotiated.transmission_flags());
        tell(info::EXPORT, &data);
        if wants.contains(&info::NAME) {
            tell(info::NAME, cut(&negotiated.info.name, STRING_MAX).as_bytes());
        }
        let description = cut(&negotiated.info.description, STRING_MAX);
        if wants.contains(&info::DESCRIPTION) && !description.is_empty() {
            tell(info::DESCRIPTION, description.as_bytes());
        }
        data.clear();
        data.put_u32(sizes.minimum);
        data.put_u32(sizes.preferred);
        data.put_u32(sizes.maximum);
        tell(info::BLOCK_SIZE, &data);
        out.put_slice(&reply(option, rep::ACK, &[]));
        if option == opt::INFO {
            return Action::Send(out.freeze());
        }
        self.state = State::Over;
        Action::Begin(out.freeze(), Box::new(negotiated))
    }

    fn negotiated(&self, name: &str, info: ExportInfo) -> Negotiated {
        let contexts = match &self.selected {
            Some(selected) if selected.export == name => selected.contexts.clone(),
            _ => Vec::new(),
        };
        Negotiated { mode: self.mode, contexts, info }
    }

    /// "NBD_OPT_LIST_META_CONTEXT" and "NBD_OPT_SET_META_CONTEXT".
    fn select(
        &mut self,
        option: u32,
        name: String,
        queries: &[String],
        export: &ExportInfo,
    ) -> Action {
        let is_list = option == opt::LIST_META_CONTEXT;
        let known =
            std::iter::once(allocation::CONTEXT).chain(export.contexts.iter().map(String::as_str));
        let matches = |context: &&str| {
            let wanted = |query: &String| {
                // Asking for a namespace lists what is in it, and selects nothing.
                let in_namespace = query.ends_with(':') && context.starts_with(query.as_str());
                query == context || (is_list && in_namespace)
            };
            (is_list && queries.is_empty()) || queries.iter().any(wanted)
        };
        let contexts: Vec<String> =
            known.filter(matches).take(CONTEXTS_MAX).map(str::to_owned).collect();
        let mut out = BytesMut::new();
        for (id, context) in contexts.iter().enumerate() {
            let mut data = BytesMut::new();
            data.put_u32(if is_list { 0 } else { id as u32 });
            data.put_slice(context.as_bytes());
            out.put_slice(&reply(option, rep::META_CONTEXT, &data));
        }
        out.put_slice(&reply(option, rep::ACK, &[]));
        if !is_list {
            self.selected = Some(Selected { export: name, contexts });
        }
        Action::Send(out.freeze())
    }
}

impl Negotiated {
    /// "Transmission flags": only what this mode and this export can do.
    pub fn transmission_flags(&self) -> u16 {
        use transmission_flag as flag;
        let info = &self.info;
        let writable = !info.is_read_only;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA;
        let mut set = |flag, is_set: bool| flags |= if is_set { flag } else { 0 };
        set(flag::READ_ONLY, info.is_read_only);
        set(flag::SEND_TRIM, writable && info.can_trim);
        set(flag::SEND_WRITE_ZEROES, writable);
        set(flag::SEND_FAST_ZERO, writable && info.can_fast_zero);
        set(flag::SEND_CACHE, info.can_cache);
        set(flag::CAN_MULTI_CONN, info.can_multi_conn && !info.is_single);
        set(flag::SEND_DF, self.mode != Mode::Simple);
        let has_contexts = !self.contexts.is_empty();
        set(flag::BLOCK_STATUS_PAYLOAD, self.mode == Mode::Extended && has_contexts);
        flags
    }
}
