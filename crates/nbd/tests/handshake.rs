//! The handshake against recorded clients and against a model with random options.
#![allow(clippy::unwrap_used)]

use bytes::{Buf, BufMut, Bytes, BytesMut};
use endio_nbd::codec::Mode;
use endio_nbd::consts::{OPTION_MAGIC, OPTION_REPLY_MAGIC, info, opt, rep, transmission_flag};
use endio_nbd::handshake::{Action, CloseReason, Handshake, HandshakeError, Negotiated};
use endio_nbd::{BlockSizes, ExportInfo, Listed, OpenError, TlsPolicy};
use proptest::prelude::*;

fn export(name: &str) -> Result<ExportInfo, OpenError> {
    match name {
        "disk" | "" => {
            let mut export = ExportInfo::new("disk", 1 << 20);
            export.contexts = vec!["endio:state".to_owned()];
            Ok(export)
        }
        "coarse" => {
            let mut export = ExportInfo::new("coarse", 1 << 20);
            export.block_sizes = BlockSizes { minimum: 512, ..BlockSizes::default() };
            Ok(export)
        }
        "locked" => Err(OpenError::Denied("no".to_owned())),
        _ => Err(OpenError::Unknown),
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_u64(OPTION_MAGIC);
    out.put_u32(number);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out.to_vec()
}

fn go(number: u32, name: &str, wants: &[u16]) -> Vec<u8> {
    let mut data = BytesMut::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u16(wants.len() as u16);
    wants.iter().for_each(|want| data.put_u16(*want));
    option(number, &data)
}

fn contexts(number: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = BytesMut::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    option(number, &data)
}

/// What a handshake came to after some bytes.
#[derive(Debug, Default)]
struct Run {
    replies: Vec<(u32, u32, Vec<u8>)>,
    begun: Option<(Bytes, Negotiated)>,
    closed: Option<CloseReason>,
    error: Option<HandshakeError>,
}

impl Run {
    fn kinds(&self) -> Vec<u32> {
        self.replies.iter().map(|(_, kind, _)| *kind).collect()
    }

    fn note(&mut self, mut reply: Bytes) {
        while !reply.is_empty() {
            assert_eq!(reply.get_u64(), OPTION_REPLY_MAGIC);
            let (option, kind) = (reply.get_u32(), reply.get_u32());
            let length = reply.get_u32() as usize;
            self.replies.push((option, kind, reply.split_to(length).to_vec()));
        }
    }
}

/// Feeds bytes in pieces of at most `step` and answers questions.
fn drive(handshake: &mut Handshake, wire: &[u8], step: usize) -> Run {
    let mut run = Run::default();
    let mut bytes = BytesMut::new();
    let mut pieces = wire.chunks(step.max(1));
    loop {
        let mut action = match handshake.advance(&mut bytes) {
            Ok(action) => action,
            Err(error) => {
                run.error = Some(error);
                return run;
            }
        };
        if action == Action::List {
            let listed = Listed { name: "disk".to_owned(), description: "d".to_owned() };
            action = handshake.listed(Ok(vec![listed])).unwrap();
        } else if let Action::Open(name, _) = &action {
            action = handshake.opened(export(name)).unwrap();
        }
        match action {
            Action::More => match pieces.next() {
                Some(piece) => bytes.extend_from_slice(piece),
                None => return run,
            },
            Action::Send(reply) => run.note(reply),
            Action::StartTls(reply) => {
                run.note(reply);
                handshake.tls_started();
            }
            Action::Begin(reply, negotiated) => {
                run.begun = Some((reply, *negotiated));
                return run;
            }
            Action::Close(reply, reason) => {
                run.note(reply);
                run.closed = Some(reason);
                return run;
            }
            Action::List | Action::Open(..) => panic!("a question was answered with a question"),
        }
    }
}

const FIXED: [u8; 4] = [0, 0, 0, 3];

fn run(tls: TlsPolicy, options: &[Vec<u8>]) -> Run {
    let mut wire = FIXED.to_vec();
    options.iter().for_each(|option| wire.extend_from_slice(option));
    drive(&mut Handshake::new(tls), &wire, usize::MAX)
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

#[test]
fn recorded_handshakes_of_clients_reach_the_transmission_phase() {
    // tests/corpus/*.hex: what clients sent, recorded at a listener.
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus");
    let mut seen = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let wire = bytes_of(std::fs::read_to_string(&path).unwrap().trim());
        for step in [1, 7, usize::MAX] {
            let run = drive(&mut Handshake::new(TlsPolicy::Off), &wire, step);
            assert!(run.begun.is_some(), "{}: {run:?}", path.display());
        }
        seen += 1;
    }
    assert!(seen >= 5, "{seen} recordings");
}

#[test]
fn export_name_is_answered_with_size_flags_and_zeroes_as_agreed() {
    for (flags, length) in [(1, 134), (3, 10)] {
        let mut wire = vec![0, 0, 0, flags];
        wire.extend(option(opt::EXPORT_NAME, b"disk"));
        let run = drive(&mut Handshake::new(TlsPolicy::Off), &wire, 3);
        let (reply, negotiated) = run.begun.unwrap();
        assert_eq!(reply.len(), length);
        assert_eq!(reply[..8], (1_u64 << 20).to_be_bytes());
        assert_eq!(negotiated.mode, Mode::Simple);
        assert_eq!(negotiated.transmission_flags() & transmission_flag::SEND_DF, 0);
    }
}

#[test]
fn an_export_name_that_cannot_be_opened_ends_the_connection() {
    for name in ["none", "locked", "coarse"] {
        let run = run(TlsPolicy::Off, &[option(opt::EXPORT_NAME, name.as_bytes())]);
        assert_eq!(run.closed, Some(CloseReason::ExportRefused), "{name}");
        assert!(run.replies.is_empty());
    }
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let mut wire = vec![0, 0, 0, 0];
    wire.extend(option(opt::LIST, b""));
    let run = drive(&mut Handshake::new(TlsPolicy::Off), &wire, 100);
    assert_eq!(run.error, Some(HandshakeError::NotFixed(opt::LIST)));
}

#[test]
fn unknown_client_flags_and_garbage_end_the_connection() {
    let run_of = |wire: &[u8]| drive(&mut Handshake::new(TlsPolicy::Off), wire, 100).error;
    assert_eq!(run_of(&[0, 0, 0, 7]), Some(HandshakeError::ClientFlags(7)));
    let http = b"\0\0\0\x03GET / HTTP/1.1\r\n";
    assert!(matches!(run_of(http), Some(HandshakeError::Magic(_))));
    let mut long = FIXED.to_vec();
    long.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    long.extend_from_slice(&[0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff]);
    let error = HandshakeError::TooLong { option: 9, length: u32::MAX };
    assert_eq!(run_of(&long), Some(error));
}

#[test]
fn a_long_option_is_skipped_and_refused_as_too_big() {
    let long = option(opt::LIST_META_CONTEXT, &vec![0; 70_000]);
    let run = run(TlsPolicy::Off, &[long, option(opt::LIST, b"")]);
    assert_eq!(run.kinds(), [rep::ERR_TOO_BIG, rep::SERVER, rep::ACK]);
}

#[test]
fn unknown_options_are_refused_and_the_handshake_goes_on() {
    let run = run(TlsPolicy::Off, &[option(4, b"x"), option(77, b""), option(opt::ABORT, b"")]);
    assert_eq!(run.kinds(), [rep::ERR_UNSUP, rep::ERR_UNSUP, rep::ACK]);
    assert_eq!(run.closed, Some(CloseReason::Aborted));
}

#[test]
fn contexts_count_for_the_export_for_which_they_were_selected() {
    let structured = option(opt::STRUCTURED_REPLY, b"");
    let select = |queries: &[&str]| contexts(opt::SET_META_CONTEXT, "disk", queries);
    let both = select(&["endio:state", "base:allocation", "other:thing"]);
    let run_of = |options: &[Vec<u8>]| run(TlsPolicy::Off, options).begun.unwrap().1.contexts;
    let chosen = run_of(&[structured.clone(), both.clone(), go(opt::GO, "disk", &[])]);
    assert_eq!(chosen, ["base:allocation", "endio:state"]);
    // Another export, a failed selection, a namespace alone, another form: nothing is selected.
    let other = run_of(&[structured.clone(), both.clone(), go(opt::GO, "", &[])]);
    assert!(other.is_empty());
    let bad = contexts(opt::SET_META_CONTEXT, "disk", &["no-colon"]);
    assert!(run_of(&[structured.clone(), both.clone(), bad, go(opt::GO, "disk", &[])]).is_empty());
    let space = select(&["base:"]);
    assert!(run_of(&[structured.clone(), space, go(opt::GO, "disk", &[])]).is_empty());
    let extended = option(opt::EXTENDED_HEADERS, b"");
    assert!(run_of(&[structured, both, extended, go(opt::GO, "disk", &[])]).is_empty());
}

#[test]
fn contexts_are_listed_all_by_namespace_or_by_name() {
    let structured = option(opt::STRUCTURED_REPLY, b"");
    for (queries, count) in [
        (&[][..], 2),
        (&["base:"], 1),
        (&["endio:state"], 1),
        (&["endio:", "base:"], 2),
        (&["x:"], 0),
    ] {
        let list = contexts(opt::LIST_META_CONTEXT, "disk", queries);
        let run = run(TlsPolicy::Off, &[structured.clone(), list]);
        let found = run.kinds().iter().filter(|kind| **kind == rep::META_CONTEXT).count();
        assert_eq!(found, count, "{queries:?}");
        assert_eq!(*run.kinds().last().unwrap(), rep::ACK);
    }
    let early = run(TlsPolicy::Off, &[contexts(opt::LIST_META_CONTEXT, "disk", &[])]);
    assert_eq!(early.kinds(), [rep::ERR_INVALID]);
}

#[test]
fn an_export_with_constraints_is_not_given_to_a_client_that_does_not_ask_for_them() {
    let without = run(TlsPolicy::Off, &[go(opt::GO, "coarse", &[])]);
    assert_eq!(without.kinds(), [rep::ERR_BLOCK_SIZE_REQD]);
    let with = run(TlsPolicy::Off, &[go(opt::GO, "coarse", &[info::BLOCK_SIZE])]);
    assert!(with.begun.is_some());
}

#[test]
fn extended_headers_and_contexts_allow_a_status_payload() {
    let select = contexts(opt::SET_META_CONTEXT, "disk", &["base:allocation"]);
    let options = [option(opt::EXTENDED_HEADERS, b""), select, go(opt::GO, "disk", &[])];
    let negotiated = run(TlsPolicy::Off, &options).begun.unwrap().1;
    assert_eq!(negotiated.mode, Mode::Extended);
    let flags = negotiated.transmission_flags();
    assert_ne!(flags & transmission_flag::BLOCK_STATUS_PAYLOAD, 0);
    assert_ne!(flags & transmission_flag::SEND_DF, 0);
    let late = option(opt::STRUCTURED_REPLY, b"");
    let run = run(TlsPolicy::Off, &[option(opt::EXTENDED_HEADERS, b""), late]);
    assert_eq!(run.kinds(), [rep::ACK, rep::ERR_INVALID]);
}

#[test]
fn tls_first_nothing_is_told_before_tls_where_it_is_required() {
    let structured = option(opt::STRUCTURED_REPLY, b"");
    let asks = [option(opt::LIST, b""), go(opt::GO, "disk", &[]), structured, option(77, b"")];
    assert_eq!(run(TlsPolicy::Required, &asks).kinds(), [rep::ERR_TLS_REQD; 4]);
    let old = run(TlsPolicy::Required, &[option(opt::EXPORT_NAME, b"disk")]);
    assert_eq!(old.closed, Some(CloseReason::ExportRefused));
    assert_eq!(run(TlsPolicy::Off, &[option(opt::STARTTLS, b"")]).kinds(), [rep::ERR_UNSUP]);
}

#[test]
fn no_carry_over_what_was_agreed_in_the_clear_is_forgotten_after_starttls() {
    let mut handshake = Handshake::new(TlsPolicy::Optional);
    let mut wire = FIXED.to_vec();
    wire.extend(option(opt::STRUCTURED_REPLY, b""));
    wire.extend(option(opt::STARTTLS, b""));
    let clear = drive(&mut handshake, &wire, usize::MAX);
    assert_eq!(clear.kinds(), [rep::ACK, rep::ACK]);
    let wire = [option(opt::STARTTLS, b""), go(opt::GO, "disk", &[])].concat();
    let run = drive(&mut handshake, &wire, usize::MAX);
    assert_eq!(run.kinds(), [rep::ERR_INVALID]);
    assert_eq!(run.begun.unwrap().1.mode, Mode::Simple);
}

#[test]
fn no_carry_over_bytes_behind_starttls_end_the_connection() {
    let options = [option(opt::STARTTLS, b""), option(opt::LIST, b"")];
    let run = run(TlsPolicy::Required, &options);
    assert_eq!(run.error, Some(HandshakeError::BytesBehindStartTls));
}

#[test]
fn a_stopping_server_refuses_everything_but_goodbye() {
    let mut handshake = Handshake::new(TlsPolicy::Off);
    handshake.stop();
    let mut wire = FIXED.to_vec();
    wire.extend(option(opt::LIST, b""));
    wire.extend(go(opt::GO, "disk", &[]));
    wire.extend(option(opt::ABORT, b""));
    let run = drive(&mut handshake, &wire, usize::MAX);
    assert_eq!(run.kinds(), [rep::ERR_SHUTDOWN, rep::ERR_SHUTDOWN, rep::ACK]);
}

#[test]
fn an_answer_that_was_not_asked_for_is_refused() {
    let mut handshake = Handshake::new(TlsPolicy::Off);
    assert_eq!(handshake.opened(export("disk")), Err(HandshakeError::OutOfStep));
    assert_eq!(handshake.listed(Ok(Vec::new())), Err(HandshakeError::OutOfStep));
}

/// What a client may send, with the answer that the model gives.
#[derive(Debug, Clone)]
enum Ask {
    List,
    Structured,
    Extended,
    Select(bool),
    Info(&'static str),
    Unknown(u32),
    StartTls,
    Malformed(u32),
}

/// The handshake in one screen: mode, contexts, TLS.
struct Model {
    tls: TlsPolicy,
    is_tls: bool,
    mode: Mode,
    selected: bool,
}

impl Model {
    fn answer(&mut self, ask: &Ask) -> u32 {
        let is_start = matches!(ask, Ask::StartTls);
        if self.tls == TlsPolicy::Required && !self.is_tls && !is_start {
            return rep::ERR_TLS_REQD;
        }
        match ask {
            Ask::List => rep::ACK,
            Ask::Structured if self.mode == Mode::Simple => {
                (self.mode, self.selected) = (Mode::Structured, false);
                rep::ACK
            }
            Ask::Extended if self.mode != Mode::Extended => {
                (self.mode, self.selected) = (Mode::Extended, false);
                rep::ACK
            }
            Ask::Select(_) if self.mode == Mode::Simple => rep::ERR_INVALID,
            Ask::Select(is_known) => {
                self.selected = *is_known;
                if *is_known { rep::ACK } else { rep::ERR_UNKNOWN }
            }
            Ask::Info("disk") => rep::ACK,
            Ask::Info("locked") => rep::ERR_POLICY,
            Ask::Info(_) => rep::ERR_UNKNOWN,
            Ask::Unknown(_) => rep::ERR_UNSUP,
            Ask::StartTls if self.is_tls => rep::ERR_INVALID,
            Ask::StartTls if self.tls == TlsPolicy::Off => rep::ERR_UNSUP,
            Ask::StartTls => {
                (self.is_tls, self.mode, self.selected) = (true, Mode::Simple, false);
                rep::ACK
            }
            Ask::Malformed(number) => {
                if *number == opt::SET_META_CONTEXT {
                    self.selected = false;
                }
                rep::ERR_INVALID
            }
            Ask::Structured | Ask::Extended => rep::ERR_INVALID,
        }
    }
}

impl Ask {
    fn wire(&self) -> Vec<u8> {
        match self {
            Ask::List => option(opt::LIST, b""),
            Ask::Structured => option(opt::STRUCTURED_REPLY, b""),
            Ask::Extended => option(opt::EXTENDED_HEADERS, b""),
            Ask::Select(is_known) => {
                let name = if *is_known { "disk" } else { "none" };
                contexts(opt::SET_META_CONTEXT, name, &["base:allocation"])
            }
            Ask::Info(name) => go(opt::INFO, name, &[info::NAME, info::DESCRIPTION]),
            Ask::Unknown(number) => option(*number, b"abc"),
            Ask::StartTls => option(opt::STARTTLS, b""),
            Ask::Malformed(number) => option(*number, b"\0\0\0\x09short"),
        }
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let malformed = vec![
        opt::LIST,
        opt::INFO,
        opt::GO,
        opt::STRUCTURED_REPLY,
        opt::LIST_META_CONTEXT,
        opt::SET_META_CONTEXT,
        opt::EXTENDED_HEADERS,
    ];
    prop_oneof![
        Just(Ask::List),
        Just(Ask::Structured),
        Just(Ask::Extended),
        any::<bool>().prop_map(Ask::Select),
        prop::sample::select(vec!["disk", "none", "locked"]).prop_map(Ask::Info),
        (12_u32..100).prop_map(Ask::Unknown),
        Just(Ask::StartTls),
        prop::sample::select(malformed).prop_map(Ask::Malformed),
    ]
}

fn policy() -> impl Strategy<Value = TlsPolicy> {
    prop::sample::select(vec![TlsPolicy::Off, TlsPolicy::Optional, TlsPolicy::Required])
}

proptest! {
    #[test]
    fn one_answer_each_option_is_answered_as_the_model_says(
        tls in policy(), asks in prop::collection::vec(ask(), 0..20), step in 1_usize..40,
    ) {
        let mut model = Model { tls, is_tls: false, mode: Mode::Simple, selected: false };
        let mut handshake = Handshake::new(tls);
        drive(&mut handshake, &FIXED, 4);
        for ask in &asks {
            let run = drive(&mut handshake, &ask.wire(), step);
            prop_assert_eq!(run.error, None);
            let last = run.replies.iter().filter(|(_, kind, _)| {
                ![rep::SERVER, rep::INFO, rep::META_CONTEXT].contains(kind)
            });
            let finals: Vec<u32> = last.map(|(_, kind, _)| *kind).collect();
            prop_assert_eq!(finals, vec![model.answer(ask)], "{:?}", ask);
        }
        let run = drive(&mut handshake, &go(opt::GO, "disk", &[]), step);
        if model.tls == TlsPolicy::Required && !model.is_tls {
            prop_assert_eq!(run.kinds(), vec![rep::ERR_TLS_REQD]);
        } else {
            let negotiated = run.begun.unwrap().1;
            prop_assert_eq!(negotiated.mode, model.mode);
            prop_assert_eq!(!negotiated.contexts.is_empty(), model.selected);
        }
    }

    #[test]
    fn no_bytes_make_the_handshake_panic(
        tls in policy(), wire in prop::collection::vec(any::<u8>(), 0..200), step in 1_usize..50,
    ) {
        drive(&mut Handshake::new(tls), &wire, step);
        let framed = [&FIXED[..], &option(u32::from(wire.first().copied().unwrap_or(0)) % 13, &wire)];
        drive(&mut Handshake::new(tls), &framed.concat(), step);
    }

    #[test]
    fn damaged_handshakes_never_panic(
        options in prop::collection::vec(ask(), 1..6), at: prop::sample::Index, value: u8,
        step in 1_usize..50,
    ) {
        let mut wire = FIXED.to_vec();
        options.iter().for_each(|ask| wire.extend(ask.wire()));
        let at = at.index(wire.len());
        wire[at] = value;
        drive(&mut Handshake::new(TlsPolicy::Optional), &wire, step);
    }
}
