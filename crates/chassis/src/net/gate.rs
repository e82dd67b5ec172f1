//! The door of a server: how many connections, from whom, and the handshake of TLS.
//!
//! ```text
//!   accepted ── place? ──► shaking hands (at most so many, so long) ──► served
//!                └─ no: closed at once             └─ failed: closed
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Connected as _;

use super::conn::{Conn, Peer};
use crate::metrics::Counter;
use crate::quiet::Quiet;
use crate::tls::Tls;

/// Limits of the connections of a server.
#[derive(Clone, Debug)]
pub(crate) struct ConnLimits {
    /// Most connections, those that shake hands included.
    pub(crate) connections_max: usize,
    /// Most connections from one IP address.
    pub(crate) connections_per_address_max: usize,
    /// Most handshakes of TLS under way; further connections wait to be accepted.
    pub(crate) handshakes_max: usize,
    /// Longest handshake.
    pub(crate) handshake: Duration,
}

/// What is counted at the door. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct ConnCounters {
    /// Connections that were closed because there were too many.
    pub refused: Counter,
    /// Handshakes of TLS that failed or took too long.
    pub handshakes_failed: Counter,
}

/// Counts the connections of one server.
#[derive(Debug)]
pub(super) struct Gate {
    limits: ConnLimits,
    counters: ConnCounters,
    taken: Mutex<Taken>,
    refusals: Quiet,
    failures: Quiet,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    by_address: BTreeMap<IpAddr, usize>,
}

/// A place at the server; dropping it frees it.
#[derive(Debug)]
pub(super) struct Place {
    gate: Arc<Gate>,
    address: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.gate.taken();
        taken.total -= 1;
        let Some(address) = self.address else { return };
        if let Some(count) = taken.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                taken.by_address.remove(&address);
            }
        }
    }
}

/// A connection that has its place.
pub(super) struct Admitted {
    conn: Conn,
    tls: Option<Tls>,
    place: Place,
}

impl Gate {
    pub(super) fn new(limits: ConnLimits, counters: ConnCounters) -> Self {
        let (refusals, failures) = (Quiet::default(), Quiet::default());
        Self { limits, counters, taken: Mutex::default(), refusals, failures }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // The counts agree whenever the lock is free: nothing in between can panic.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` closes the connection: there are too many.
    pub(super) fn admit(self: &Arc<Self>, conn: Conn, tls: Option<Tls>) -> Option<Admitted> {
        let peer = conn.connect_info();
        let address = match &peer {
            Peer::Tcp(addr) => addr.map(|addr| addr.ip().to_canonical()),
            _ => None,
        };
        match self.place(address) {
            Some(place) => Some(Admitted { conn, tls, place }),
            None => {
                self.counters.refused.inc();
                if let Some(skipped) = self.refusals.pass() {
                    tracing::warn!(?address, skipped, "too many connections: one was closed");
                }
                None
            }
        }
    }

    fn place(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Place> {
        let mut taken = self.taken();
        if taken.total >= self.limits.connections_max {
            return None;
        }
        if let Some(address) = address {
            let count = taken.by_address.get(&address).copied().unwrap_or(0);
            if count >= self.limits.connections_per_address_max {
                return None;
            }
            taken.by_address.insert(address, count + 1);
        }
        taken.total += 1;
        Some(Place { gate: Arc::clone(self), address })
    }

    fn failed(&self, address: Option<IpAddr>, error: &dyn std::fmt::Display) {
        self.counters.handshakes_failed.inc();
        if let Some(skipped) = self.failures.pass() {
            tracing::warn!(?address, skipped, %error, "a connection without valid tls was closed");
        }
    }
}

impl Admitted {
    /// Shakes hands, in a task of its own, if the listener wants it. `None`: closed.
    pub(super) async fn ready(self) -> Option<Conn> {
        let Self { conn, tls, place } = self;
        let Some(tls) = tls else { return Some(conn.with_place(place)) };
        // The handshake is some milliseconds of arithmetic: not in the task that accepts.
        let shaking = tokio::spawn(shake(tls, conn, place));
        AbortOnDropHandle::new(shaking).await.ok().flatten()
    }
}

async fn shake(tls: Tls, conn: Conn, place: Place) -> Option<Conn> {
    let gate = Arc::clone(&place.gate);
    let acceptor = TlsAcceptor::from(tls.server());
    let accepting = acceptor.accept(conn.into_tcp()?);
    match tokio::time::timeout(gate.limits.handshake, accepting).await {
        Ok(Ok(stream)) => Some(Conn::tls(TlsStream::Server(stream)).with_place(place)),
        Ok(Err(error)) => {
            gate.failed(place.address, &error);
            None
        }
        Err(_) => {
            gate.failed(place.address, &"the handshake took too long");
            None
        }
    }
}
