//! The task behind the session: connects, batches what goes out, routes what comes in.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use endio_api::conversion::{
    BeginRefused, Begun, Completion, ConversionBatch, Hello, ReadConfirm, ReleaseSubmitter,
    Reserve, Welcome, WritebackBatch, WritebackMessage, WritebackRenew,
    conversion_client::ConversionClient, conversion_message::Message as Incoming,
    writeback_message::Message as Outgoing,
};
use endio_api::protocol;
use endio_chassis::net::Dialer;
use endio_state_machine::writeback::confirms::Confirms;
use endio_types::Reason;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{Command, Events, Granted, Limits, Link, Tenure};
use crate::failure::Failure;

/// Batches on their way into the transport. Two: one that is being sent and the next.
const BATCHES_IN_FLIGHT: usize = 2;

/// Owner of the session.
pub(super) struct Task {
    pub(super) writeback: String,
    pub(super) url: String,
    pub(super) dialer: Dialer,
    pub(super) limits: Limits,
    pub(super) events: Arc<dyn Events>,
    pub(super) tell: watch::Sender<Link>,
    pub(super) granted: Arc<Tenure>,
    pub(super) stop: CancellationToken,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the service stops")]
    Stopped,
    #[error("the address cannot be dialed")]
    Dial(#[source] endio_chassis::net::NetError),
    #[error("the stream broke: {0}")]
    Broke(tonic::Status),
    #[error("conversion closed the stream")]
    Closed,
    #[error("the first answer was not a welcome")]
    NoWelcome,
    #[error("conversion is too old")]
    Protocol(#[source] endio_types::ProtocolError),
    #[error("no answer within {0:?}")]
    Silent(Duration),
}

/// Whether a refusal stays as it is until somebody changes something.
fn is_for_people(status: &tonic::Status) -> bool {
    matches!(endio_api::status::reason(status), Reason::Protocol | Reason::NotAllowed)
}

/// An answer that is owed to somebody.
enum Owed {
    Begin(oneshot::Sender<Result<Granted, Failure>>),
    Reserve(oneshot::Sender<Result<u64, Failure>>),
    Log(oneshot::Sender<Result<(), Failure>>),
    Reset { volume: u64 },
}

/// One session that stands.
struct Standing<'a> {
    number: u64,
    events: &'a dyn Events,
    outbox: VecDeque<WritebackMessage>,
    next_request: u64,
    owed: BTreeMap<u64, Owed>,
    io_ends: BTreeMap<u64, oneshot::Sender<Completion>>,
    lease: Duration,
    lease_ends: Instant,
    granted: &'a Tenure,
    /// When the renewals that are not answered yet were sent, oldest first.
    renewals: VecDeque<Instant>,
    confirms: Confirms,
}

impl Task {
    /// Keeps a session until `stop`.
    pub(super) async fn run(self, mut queue: mpsc::Receiver<Command>) {
        let (shortest, longest) = self.limits.backoff;
        let mut backoff = shortest;
        while !self.stop.is_cancelled() {
            let number = self.tell.borrow().number;
            let ended = self.session(&mut queue).await;
            let stood = self.tell.borrow().number > number;
            match ended {
                Ended::Stopped => break,
                ended if stood => {
                    tracing::warn!(error = %ended, "session with conversion lost");
                    backoff = shortest;
                }
                Ended::Broke(status) if is_for_people(&status) => {
                    tracing::error!(error = %status, "conversion refuses to speak with us");
                }
                ended => tracing::debug!(error = ?ended, "no session with conversion yet"),
            }
            let until = Instant::now() + backoff;
            refuse_until(&mut queue, until, &self.stop).await;
            backoff = (backoff * 2).min(longest);
        }
        queue.close();
        while let Some(command) = queue.recv().await {
            refuse(command);
        }
    }

    /// One session from connect to its end.
    async fn session(&self, queue: &mut mpsc::Receiver<Command>) -> Ended {
        let (out, stream) = mpsc::channel(BATCHES_IN_FLIGHT);
        let sent = Instant::now();
        let opened = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Ended::Stopped,
            opened = self.open(&out, stream) => opened,
            () = refuse_all(queue) => return Ended::Stopped,
        };
        let (mut inbound, welcome, rest) = match opened {
            Ok(opened) => opened,
            Err(ended) => return ended,
        };
        let lease = Duration::from_millis(u64::from(welcome.lease_ms.max(1)));
        let mut standing = Standing {
            number: self.tell.borrow().number + 1,
            events: self.events.as_ref(),
            outbox: VecDeque::new(),
            next_request: 1,
            owed: BTreeMap::new(),
            io_ends: BTreeMap::new(),
            lease,
            lease_ends: sent + lease,
            granted: &self.granted,
            renewals: VecDeque::new(),
            confirms: Confirms::default(),
        };
        for reset in self.events.welcome(welcome.cluster_epoch) {
            standing.reset(reset);
        }
        // What is to be proven under this session is noted by now.
        self.granted.granted(sent, lease);
        standing.receive(rest);
        self.tell.send_modify(|link| {
            link.epoch = Some(welcome.cluster_epoch);
            link.number = standing.number;
        });
        tracing::info!(epoch = welcome.cluster_epoch, "session with conversion stands");
        let ended = standing.turn(queue, &out, &mut inbound, &self.limits, &self.stop).await;
        // First: who hears that an io_end is lost must not take its session for one that stands.
        self.tell.send_modify(|link| link.epoch = None);
        standing.fail_all();
        ended
    }

    async fn open(
        &self,
        out: &mpsc::Sender<WritebackBatch>,
        stream: mpsc::Receiver<WritebackBatch>,
    ) -> Result<(Streaming<ConversionBatch>, Welcome, ConversionBatch), Ended> {
        let channel = self.dialer.channel(&self.url).map_err(Ended::Dial)?;
        let mut client = ConversionClient::new(channel)
            .max_decoding_message_size(crate::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(crate::MESSAGE_BYTES_MAX);
        let hello = Outgoing::Hello(Hello {
            writeback: self.writeback.clone(),
            protocol: protocol::ours(),
        });
        // The channel was made just now and holds nothing: this never waits.
        out.send(batch([WritebackMessage { message: Some(hello) }]))
            .await
            .map_err(|_| Ended::Closed)?;
        let first = async {
            let mut inbound = client
                .writeback_session(ReceiverStream::new(stream))
                .await
                .map_err(Ended::Broke)?
                .into_inner();
            let first = inbound.message().await.map_err(Ended::Broke)?.ok_or(Ended::Closed)?;
            Ok((inbound, first))
        };
        let (inbound, mut first) = timeout(self.limits.connect, first)
            .await
            .map_err(|_| Ended::Silent(self.limits.connect))??;
        if first.messages.is_empty() {
            return Err(Ended::NoWelcome);
        }
        match first.messages.remove(0).message {
            Some(Incoming::Welcome(welcome)) => {
                protocol::check_answer(welcome.protocol.as_ref()).map_err(Ended::Protocol)?;
                Ok((inbound, welcome, first))
            }
            _ => Err(Ended::NoWelcome),
        }
    }
}

impl Standing<'_> {
    /// Runs the session until it ends.
    async fn turn(
        &mut self,
        queue: &mut mpsc::Receiver<Command>,
        out: &mpsc::Sender<WritebackBatch>,
        inbound: &mut Streaming<ConversionBatch>,
        limits: &Limits,
        stop: &CancellationToken,
    ) -> Ended {
        let every = limits.confirm_every.min(self.lease / 3).max(Duration::from_millis(1));
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut commands = Vec::with_capacity(limits.batch);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ended::Stopped,
                received = inbound.message() => match received {
                    Ok(Some(batch)) => self.receive(batch),
                    Ok(None) => return Ended::Closed,
                    Err(status) => return Ended::Broke(status),
                },
                () = tokio::time::sleep_until(self.lease_ends) => {
                    return Ended::Silent(self.lease);
                }
                _ = tick.tick() => self.renew(),
                permit = out.reserve(), if !self.outbox.is_empty() => match permit {
                    Ok(permit) => {
                        let count = fits(&self.outbox, limits.batch);
                        permit.send(batch(self.outbox.drain(..count)));
                    }
                    Err(_) => return Ended::Closed,
                },
                taken = queue.recv_many(&mut commands, limits.batch),
                    if self.outbox.len() < limits.batch =>
                {
                    if taken == 0 {
                        return Ended::Stopped;
                    }
                    for command in commands.drain(..) {
                        self.accept(command);
                    }
                }
            }
        }
    }

    fn push(&mut self, message: Outgoing) {
        self.outbox.push_back(WritebackMessage { message: Some(message) });
    }

    fn number(&mut self, owed: Owed) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        self.owed.insert(request, owed);
        request
    }

    fn reset(&mut self, mut reserve: Reserve) {
        reserve.request = self.number(Owed::Reset { volume: reserve.volume });
        self.push(Outgoing::Reserve(reserve));
    }

    fn accept(&mut self, command: Command) {
        match command {
            Command::Begin(mut begin, reply) => {
                begin.request = self.number(Owed::Begin(reply));
                self.push(Outgoing::Begin(begin));
            }
            Command::Release(session, release) => {
                // What an earlier session began ended with it.
                if session == self.number {
                    self.push(Outgoing::Release(release));
                }
            }
            Command::Reserve(Some(session), _, reply) if session != self.number => {
                drop(reply.send(Err(Failure::conversion_away())));
            }
            Command::Reserve(_, mut reserve, reply) => {
                reserve.request = self.number(Owed::Reserve(reply));
                self.push(Outgoing::Reserve(reserve));
            }
            Command::Log(session, _, reply) if session != self.number => {
                drop(reply.send(Err(Failure::conversion_away())));
            }
            Command::Log(_, mut log, reply) => {
                log.request = self.number(Owed::Log(reply));
                self.push(Outgoing::Log(log));
            }
        }
    }

    /// The lease counts from before the renewal is sent; a renewal that finds the transport full
    /// waits in the outbox, and its lease runs meanwhile.
    fn renew(&mut self) {
        self.renewals.push_back(Instant::now());
        let confirms = self.confirms.news(self.events.confirms());
        let confirms = confirms.into_iter().map(|(volume, generation, version)| ReadConfirm {
            volume: volume.0,
            generation: generation.0,
            map_version: version.0,
        });
        let confirms = confirms.collect();
        self.push(Outgoing::Renew(WritebackRenew { confirms }));
    }

    fn receive(&mut self, batch: ConversionBatch) {
        for message in batch.messages {
            match message.message {
                Some(Incoming::Begun(begun)) => self.begun(begun),
                Some(Incoming::Refused(refused)) => self.refused(refused),
                Some(Incoming::Completion(completion)) => {
                    if let Some(done) = self.io_ends.remove(&completion.io_end) {
                        // A caller that has gone needs no answer.
                        let _ = done.send(completion);
                    }
                }
                Some(Incoming::Renewed(renewed)) => {
                    if let Some(sent) = self.renewals.pop_front() {
                        let lease = Duration::from_millis(u64::from(renewed.lease_ms.max(1)));
                        self.lease_ends = sent + lease;
                        self.granted.granted(sent, lease);
                    }
                }
                Some(Incoming::Fenced(fenced)) => {
                    self.events.fenced(fenced.volume, fenced.generation);
                }
                Some(Incoming::Released(released)) => {
                    if released.reason != 0 {
                        let reason = Reason::from_wire(released.reason);
                        tracing::debug!(io_end = released.io_end, ?reason, "release refused");
                    }
                }
                Some(Incoming::Stores(list)) => self.events.stores(&list.stores),
                Some(Incoming::Reserved(reserved)) => {
                    self.reserved(reserved.request, Ok(reserved.blocks));
                }
                Some(Incoming::Logged(logged)) => match self.owed.remove(&logged.request) {
                    // A flush that has gone needs no answer.
                    Some(Owed::Log(reply)) => drop(reply.send(Ok(()))),
                    _ => tracing::warn!(request = logged.request, "nothing was to be logged"),
                },
                Some(Incoming::Welcome(_)) | None => {
                    tracing::warn!("unexpected message in the session with conversion");
                }
            }
        }
    }

    fn begun(&mut self, begun: Begun) {
        let Some(Owed::Begin(reply)) = self.owed.remove(&begun.request) else {
            tracing::warn!(request = begun.request, "answer to a request that was not made");
            return;
        };
        let Some(submitter) = begun.submitter.clone() else {
            let detail = "conversion began a write without a submitter's token";
            let _ = reply.send(Err(Failure::new(Reason::Malformed, detail)));
            return;
        };
        let (done, completion) = oneshot::channel();
        self.io_ends.insert(submitter.io_end, done);
        if reply.send(Ok(Granted { session: self.number, begun, done: completion })).is_err() {
            self.io_ends.remove(&submitter.io_end);
            self.push(Outgoing::Release(ReleaseSubmitter {
                token: Some(submitter),
                abort: true,
                ..ReleaseSubmitter::default()
            }));
        }
    }

    fn refused(&mut self, refused: BeginRefused) {
        let failure = Failure::from_wire(refused.reason, &refused.message)
            .unwrap_or_else(|| Failure::new(Reason::Aborted, "refused without a reason"))
            .retry_after(refused.retry_after_ms);
        match self.owed.remove(&refused.request) {
            Some(Owed::Begin(reply)) => {
                let _ = reply.send(Err(failure));
            }
            Some(Owed::Reserve(reply)) => {
                let _ = reply.send(Err(failure));
            }
            Some(Owed::Log(reply)) => {
                let _ = reply.send(Err(failure));
            }
            Some(Owed::Reset { volume }) => self.events.space_reset(volume, Err(failure)),
            None => tracing::warn!(request = refused.request, "refusal of nothing"),
        }
    }

    fn reserved(&mut self, request: u64, outcome: Result<u64, Failure>) {
        match self.owed.remove(&request) {
            Some(Owed::Reserve(reply)) => {
                let _ = reply.send(outcome);
            }
            Some(Owed::Reset { volume }) => self.events.space_reset(volume, outcome),
            Some(Owed::Begin(_) | Owed::Log(_)) | None => {
                tracing::warn!(request, "promise to nobody")
            }
        }
    }

    /// Every answer that is owed becomes "away"; dropped completions say the same.
    fn fail_all(&mut self) {
        self.io_ends.clear();
        for (_, owed) in std::mem::take(&mut self.owed) {
            match owed {
                Owed::Begin(reply) => drop(reply.send(Err(Failure::conversion_away()))),
                Owed::Reserve(reply) => drop(reply.send(Err(Failure::conversion_away()))),
                Owed::Log(reply) => drop(reply.send(Err(Failure::conversion_away()))),
                Owed::Reset { .. } => {}
            }
        }
    }
}

/// Bytes of data in one batch, but for a single message that has more: a batch beyond what the transport
/// takes would end the session. A message has at most 1 MiB (`flush_log_bytes`).
const BATCH_DATA_BYTES_MAX: usize = 2 << 20;

/// How many of the first messages make up the next batch: at least one, if there is any.
fn fits(outbox: &VecDeque<WritebackMessage>, most: usize) -> usize {
    let mut bytes = 0;
    let fitting = outbox.iter().take(most).take_while(|message| {
        let data = match &message.message {
            Some(Outgoing::Log(log)) => log.data.len(),
            _ => 0,
        };
        let is_first = bytes == 0;
        bytes += data;
        is_first || bytes <= BATCH_DATA_BYTES_MAX
    });
    fitting.count()
}

fn batch(messages: impl IntoIterator<Item = WritebackMessage>) -> WritebackBatch {
    WritebackBatch { messages: messages.into_iter().collect() }
}

fn refuse(command: Command) {
    match command {
        Command::Begin(_, reply) => drop(reply.send(Err(Failure::conversion_away()))),
        Command::Reserve(_, _, reply) => drop(reply.send(Err(Failure::conversion_away()))),
        Command::Log(_, _, reply) => drop(reply.send(Err(Failure::conversion_away()))),
        Command::Release(..) => {}
    }
}

/// Refuses commands until the queue's senders are gone.
async fn refuse_all(queue: &mut mpsc::Receiver<Command>) {
    while let Some(command) = queue.recv().await {
        refuse(command);
    }
}

async fn refuse_until(
    queue: &mut mpsc::Receiver<Command>,
    until: Instant,
    stop: &CancellationToken,
) {
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = tokio::time::sleep_until(until) => {}
        () = refuse_all(queue) => {}
    }
}

#[cfg(test)]
mod tests {
    use endio_api::conversion::LogData;

    use super::*;

    fn log(bytes: usize) -> WritebackMessage {
        let data = vec![0; bytes].into();
        WritebackMessage { message: Some(Outgoing::Log(LogData { data, ..LogData::default() })) }
    }

    fn small() -> WritebackMessage {
        WritebackMessage { message: Some(Outgoing::Renew(WritebackRenew::default())) }
    }

    /// Nobody who hears of anything.
    struct Nobody;

    impl Events for Nobody {
        fn welcome(&self, _: u64) -> Vec<Reserve> {
            Vec::new()
        }
        fn space_reset(&self, _: u64, _: Result<u64, Failure>) {}
        fn stores(&self, _: &[endio_api::conversion::Store]) {}
        fn fenced(&self, _: u64, _: u64) {}
        fn confirms(&self) -> Vec<endio_state_machine::writeback::confirms::Confirm> {
            Vec::new()
        }
    }

    /// What a session began, picked or asked for is nothing that the next one may send: conversion may have
    /// forgotten, in between, that newer changes have passed it.
    #[test]
    fn what_belongs_to_an_earlier_session_is_not_sent_under_the_next_one() {
        let tenure = Tenure::new();
        let mut standing = Standing {
            number: 5,
            events: &Nobody,
            outbox: VecDeque::new(),
            next_request: 1,
            owed: BTreeMap::new(),
            io_ends: BTreeMap::new(),
            lease: Duration::from_secs(1),
            lease_ends: Instant::now(),
            granted: &tenure,
            renewals: VecDeque::new(),
            confirms: Confirms::default(),
        };
        for (session, sent) in [(4, 0), (5, 3), (6, 0)] {
            let (log_reply, mut log_answer) = oneshot::channel();
            let (reserve_reply, mut reserve_answer) = oneshot::channel();
            standing.accept(Command::Log(session, LogData::default(), log_reply));
            standing.accept(Command::Reserve(Some(session), Reserve::default(), reserve_reply));
            standing.accept(Command::Release(session, ReleaseSubmitter::default()));
            assert_eq!(standing.outbox.drain(..).count(), sent, "of session {session}");
            let log = log_answer.try_recv().map(|answer| answer.is_err());
            let reserve = reserve_answer.try_recv().map(|answer| answer.is_err());
            // Refused at once, or not answered yet.
            assert_eq!((log.is_ok(), reserve.is_ok()), (sent == 0, sent == 0));
            assert!(log.unwrap_or(true) && reserve.unwrap_or(true));
        }
    }

    /// Many volumes that flush at once would make a batch that no transport takes.
    #[test]
    fn a_batch_has_no_more_data_than_the_transport_takes_and_always_a_message() {
        let of = |messages: Vec<WritebackMessage>| fits(&messages.into(), 512);
        assert_eq!(of(vec![]), 0);
        assert_eq!(of(vec![small(); 600]), 512);
        assert_eq!(of(vec![log(256 << 10); 40]), 8);
        assert_eq!(of(vec![log(1 << 20), small(), log(1 << 20), small(), log(1)]), 4);
        assert_eq!(of(vec![log(3 << 20), small()]), 1, "one that is too large goes alone");
        let largest = batch(vec![log(1 << 20); 2]);
        assert!(prost::Message::encoded_len(&largest) < crate::MESSAGE_BYTES_MAX);
    }
}
