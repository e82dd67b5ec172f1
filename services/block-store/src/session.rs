//! The session with conversion: register, renew, release; fences and punches come back.
//!
//! ```text
//!   (away) ── Register ──► waiting ── Registered ──► draining ── StoreReady ──► ready
//!     ▲                                                                           │
//!     └──────── stream ended, renewal unanswered for a lease; pause, for ever ────┘
//! ```

use std::{collections::VecDeque, sync::Arc, time::Duration};

use endio_api::access;
use endio_api::conversion::{
    RegisterStore, StoreBatch, StoreCommandBatch, StoreMessage, StoreRenew,
    conversion_client::ConversionClient, store_command::Command, store_message::Message,
};
use endio_api::protocol;
use endio_chassis::{
    backoff::Backoff,
    net::{Dialer, NetError},
    server::Readiness,
};
use endio_state_machine::{gate::Registration, token::TokenKey};
use endio_types::{
    ClusterEpoch, Generation, IoEndId, Millis, PblkRange, ProtocolError, Reason, StoreId, VolumeId,
};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tracing::{info, warn};

use crate::{config::Config, driver::Driver};

/// Batches on their way to the transport.
const BATCHES_MAX: usize = 4;
/// Messages in one batch.
const BATCH_MESSAGES_MAX: usize = 512;
/// Largest message from conversion.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// What one session needs.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) driver: Arc<Driver>,
    pub(crate) dialer: Dialer,
    pub(crate) readiness: Readiness,
    pub(crate) config: Config,
    /// Where writebacks reach this store.
    pub(crate) url: String,
    /// Whether a registered session stands.
    pub(crate) is_connected: tokio::sync::watch::Sender<bool>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("conversion's url cannot be used")]
    Url(#[source] NetError),
    #[error("conversion did not answer in time")]
    Silent,
    #[error("conversion ended the session: {}", .0.message())]
    Status(#[from] Box<tonic::Status>),
    #[error("conversion closed the session")]
    Closed,
    #[error("conversion sent something malformed: {0}")]
    Malformed(&'static str),
    #[error("the registration cannot be taken in: {0}{1}")]
    Registration(Reason, &'static str),
    #[error("conversion is too old")]
    Protocol(#[source] ProtocolError),
}

/// What to do about a registration that was refused here.
fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::OldEpoch => {
            " (this store has seen a higher epoch: conversion runs on older metadata than before; \
             restore it with `endio restore metadata --epoch-at-least`)"
        }
        Reason::WrongState => {
            " (conversion gave this store another number than before: its metadata was restored \
             from before this store registered; restart the store)"
        }
        _ => "",
    }
}

/// One open stream.
struct Open<'a> {
    session: &'a Session,
    to: mpsc::Sender<StoreBatch>,
    register_sent: Millis,
    /// When the renewals were sent that are not answered yet.
    renewals: VecDeque<Millis>,
    lease: Duration,
    /// The session is broken unless a renewal is answered before.
    silent_at: Instant,
    renew_at: Instant,
    is_registered: bool,
    is_ready: bool,
}

impl Session {
    /// Keeps a session until everything has drained.
    pub(crate) async fn run(self) {
        let first = Duration::from_millis(self.config.reconnect_first_ms);
        let max = Duration::from_millis(self.config.reconnect_max_ms);
        let backoff = Backoff { first, max, retries_max: None };
        let mut delays = backoff.delays(StdRng::seed_from_u64(rand::random()));
        let closed = self.driver.closed.clone();
        loop {
            let end = tokio::select! {
                biased;
                () = closed.cancelled() => return,
                end = self.once() => end,
            };
            let was_connected = self.is_connected.send_replace(false);
            self.readiness.set_not_ready().await;
            if was_connected {
                delays.reset();
            }
            warn!(error = %Chain(&end), conversion = self.config.conversion, "no session");
            let pause = delays.next().unwrap_or(max);
            tokio::select! {
                biased;
                () = closed.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One session from its registration to its end.
    async fn once(&self) -> SessionEnd {
        match self.open().await {
            Ok((mut open, from)) => match open.run(from).await {
                Ok(never) => match never {},
                Err(end) => end,
            },
            Err(end) => end,
        }
    }

    async fn open(&self) -> Result<(Open<'_>, Streaming<StoreCommandBatch>), SessionEnd> {
        let patience = Duration::from_millis(self.config.register_timeout_ms);
        let dialer = self.dialer.expecting(access::CONVERSION);
        let channel = dialer.channel(&self.config.conversion).map_err(SessionEnd::Url)?;
        let mut client =
            ConversionClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (to, batches) = mpsc::channel(BATCHES_MAX);
        let superblock = self.driver.superblock;
        let register = RegisterStore {
            uuid: superblock.uuid.to_vec().into(),
            incarnation: superblock.incarnation.0,
            capacity_blocks: self.driver.device.capacity_blocks(),
            url: self.url.clone(),
            protocol: protocol::ours(),
        };
        let register_sent = self.driver.now();
        let first = batch(vec![StoreMessage { message: Some(Message::Register(register)) }]);
        // The channel is new and has room.
        let _ = to.try_send(first);
        let call = client.store_session(ReceiverStream::new(batches));
        let response =
            timeout(patience, call).await.map_err(|_| SessionEnd::Silent)?.map_err(Box::new)?;
        let silent_at = Instant::now() + patience;
        let open = Open {
            session: self,
            to,
            register_sent,
            renewals: VecDeque::new(),
            lease: patience,
            silent_at,
            renew_at: silent_at,
            is_registered: false,
            is_ready: false,
        };
        Ok((open, response.into_inner()))
    }
}

impl Open<'_> {
    async fn run(
        &mut self,
        mut from: Streaming<StoreCommandBatch>,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let driver = &self.session.driver;
        loop {
            let is_owing = self.is_registered && driver.has_messages();
            let is_renewal_due = self.is_registered && self.renew_at <= Instant::now();
            tokio::select! {
                biased;
                received = from.message() => {
                    let commands = received.map_err(Box::new)?.ok_or(SessionEnd::Closed)?;
                    for command in commands.commands {
                        let command = command.command;
                        self.take_in(command.ok_or(SessionEnd::Malformed("empty command"))?)?;
                    }
                }
                () = tokio::time::sleep_until(self.silent_at) => return Err(SessionEnd::Silent),
                slot = self.to.clone().reserve_owned(), if is_owing || is_renewal_due => {
                    let slot = slot.map_err(|_| SessionEnd::Closed)?;
                    slot.send(batch(self.next_messages(is_renewal_due)));
                    self.become_ready().await;
                }
                () = driver.changed.notified(), if !is_owing => {}
                () = tokio::time::sleep_until(self.renew_at), if self.is_registered => {}
            }
        }
    }

    fn next_messages(&mut self, is_renewal_due: bool) -> Vec<StoreMessage> {
        let driver = &self.session.driver;
        let mut messages = Vec::new();
        if is_renewal_due {
            let renew = StoreRenew { used_blocks: driver.used_blocks() };
            messages.push(StoreMessage { message: Some(Message::Renew(renew)) });
            self.renewals.push_back(driver.now());
            self.renew_at = Instant::now() + self.lease / 3;
        }
        messages.extend(driver.take_messages(BATCH_MESSAGES_MAX));
        messages
    }

    /// After `StoreReady` went out.
    async fn become_ready(&mut self) {
        if !self.is_ready && self.session.driver.is_ready() {
            self.is_ready = true;
            if !self.session.driver.shutdown.is_requested() {
                self.session.readiness.set_ready().await;
            }
        }
    }

    fn take_in(&mut self, command: Command) -> Result<(), SessionEnd> {
        let driver = &self.session.driver;
        match command {
            Command::Registered(registered) => {
                protocol::check_answer(registered.protocol.as_ref())
                    .map_err(SessionEnd::Protocol)?;
                let key: [u8; 32] = registered
                    .key
                    .as_ref()
                    .try_into()
                    .map_err(|_| SessionEnd::Malformed("a key is 32 bytes"))?;
                let registration = Registration {
                    store: StoreId(registered.store),
                    epoch: ClusterEpoch(registered.cluster_epoch),
                    key: TokenKey::new(key),
                    lease_ms: registered.lease_ms.into(),
                    io_end_floor: IoEndId(registered.io_end_floor),
                };
                driver
                    .register(self.register_sent, registration)
                    .map_err(|reason| SessionEnd::Registration(reason, advice(reason)))?;
                info!(
                    store = registered.store,
                    cluster_epoch = registered.cluster_epoch,
                    incarnation = driver.superblock.incarnation.0,
                    lease_ms = registered.lease_ms,
                    "registered"
                );
                self.is_registered = true;
                self.session.is_connected.send_replace(true);
                self.leased(registered.lease_ms);
            }
            _ if !self.is_registered => return Err(SessionEnd::Malformed("not registered yet")),
            Command::Renewed(renewed) => {
                let sent_at = self
                    .renewals
                    .pop_front()
                    .ok_or(SessionEnd::Malformed("an answer to no renewal"))?;
                driver.renewed(sent_at, renewed.lease_ms, IoEndId(renewed.io_end_floor));
                self.leased(renewed.lease_ms);
            }
            Command::Released(result) => {
                if let Some(reason) = Reason::from_wire(result.reason) {
                    driver.metrics.refused_releases.inc();
                    tracing::debug!(io_end = result.io_end, %reason, "a release was refused");
                }
                driver.released(result.io_end, result.segment);
            }
            Command::Fence(fence) => {
                let io_ends: Vec<_> = fence.io_ends.iter().copied().map(IoEndId).collect();
                let volumes: Vec<_> = fence
                    .volumes
                    .iter()
                    .map(|volume| (VolumeId(volume.volume), Generation(volume.generation)))
                    .collect();
                if let Err(reason) = driver.fence(fence.fence, &io_ends, &volumes) {
                    tracing::error!(fence = fence.fence, %reason, "a fence cannot be confirmed");
                }
            }
            Command::Punch(punch) => {
                let ranges = punch.ranges.iter();
                let ranges = ranges.map(|range| PblkRange::new(range.pblk, range.blocks)).collect();
                if let Err(reason) = driver.punch(punch.punch, ranges) {
                    tracing::error!(punch = punch.punch, %reason, "a punch cannot be carried out");
                }
            }
        }
        Ok(())
    }

    fn leased(&mut self, lease_ms: u32) {
        // A lease of nothing would renew in a hot loop.
        self.lease = Duration::from_millis(u64::from(lease_ms).max(3));
        let now = Instant::now();
        self.renew_at = self.renew_at.min(now + self.lease / 3);
        self.silent_at = now + self.lease;
    }
}

fn batch(messages: Vec<StoreMessage>) -> StoreBatch {
    StoreBatch { messages }
}

/// Prints an error and its sources.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
