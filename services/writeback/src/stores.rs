//! Clients of the block-stores: for each store one stream of writes and one of reads.
//!
//! A store's streams are opened on first use and again after they broke. What was on its way when
//! a stream broke is answered with `PEER_AWAY`: a bio is never sent twice, because its token is
//! good for one use; a read may be asked again by the caller.

mod exchange;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use endio_api::blockstore::block_store_client::BlockStoreClient;
use endio_api::blockstore::{Bio, DescribeRequest, DescribeResponse, ReadRequest};
use endio_api::common::{Span, Token};
use endio_api::conversion::Store;
use endio_chassis::net::Dialer;
use endio_types::Reason;
use tokio::sync::oneshot;
use tracing_mutex::stdsync::Mutex;

use crate::failure::Failure;
use exchange::{Exchange, Reads, Writes};

/// Limits and times of the streams to a store.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Bios or reads waiting to be sent, per store.
    pub queue: usize,
    /// Most time for opening a stream.
    pub connect: Duration,
    /// Most time between asking for blocks and having them.
    pub read: Duration,
}

/// All stores by number.
pub(crate) struct Stores {
    dialer: Dialer,
    limits: Limits,
    clients: Mutex<BTreeMap<u32, Arc<Client>>>,
}

/// One store in one incarnation.
struct Client {
    url: String,
    incarnation: u64,
    writes: Exchange<Writes>,
    reads: Exchange<Reads>,
}

/// A segment that was handed over to its store's stream.
#[derive(Debug)]
pub(crate) struct Sent {
    done: oneshot::Receiver<Result<(), Failure>>,
}

impl Sent {
    /// Waits for the store's word on the segment.
    ///
    /// # Errors
    /// What the store refused or failed, or that its stream broke: the outcome is unknown.
    pub(crate) async fn done(self) -> Result<(), Failure> {
        self.done.await.unwrap_or_else(|_| Err(store_away()))
    }
}

impl Stores {
    /// No stores yet; [`Stores::update`] brings them.
    pub(crate) fn new(dialer: Dialer, limits: Limits) -> Self {
        Self { dialer, limits, clients: Mutex::default() }
    }

    /// Takes over conversion's list. Must be called inside a tokio runtime.
    pub(crate) fn update(&self, list: &[Store]) {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|id, _| list.iter().any(|store| store.id == *id));
        for store in list.iter().filter(|store| !store.url.is_empty()) {
            let same = clients.get(&store.id).is_some_and(|client| {
                client.url == store.url && client.incarnation == store.incarnation
            });
            if same {
                continue;
            }
            match self.connect(store) {
                Ok(client) => drop(clients.insert(store.id, Arc::new(client))),
                Err(error) => {
                    tracing::warn!(store = store.id, %error, "store has an address of no use");
                }
            }
        }
    }

    /// Numbers of the stores that have an address.
    pub(crate) fn ids(&self) -> Vec<u32> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.keys().copied().collect()
    }

    /// Hands a segment over to its store's stream; returns when the stream has taken it.
    ///
    /// Cancel-safe: what is not taken yet is not sent. Callers bound the wait.
    ///
    /// # Errors
    /// `PEER_AWAY`: the segment was not handed over. Its token must not be used again all the same.
    pub(crate) async fn write(&self, bio: Bio) -> Result<Sent, Failure> {
        let store = bio.token.as_ref().map_or(0, |token: &Token| token.store);
        let client = self.client(store)?;
        let done = client.writes.hand_over(bio).await?;
        Ok(Sent { done })
    }

    /// Reads blocks of a store.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// `CHECKSUM_MISMATCH`, a refused grant, `PEER_AWAY`.
    pub(crate) async fn read(&self, store: u32, request: ReadRequest) -> Result<Bytes, Failure> {
        let client = self.client(store)?;
        let answer = async {
            let done = client.reads.hand_over(request).await?;
            done.await.unwrap_or_else(|_| Err(store_away()))
        };
        tokio::time::timeout(self.limits.read, answer).await.unwrap_or_else(|_| Err(store_away()))
    }

    /// Spans of one store's recorder.
    ///
    /// # Errors
    /// The store cannot be reached.
    pub(crate) async fn spans(
        &self,
        store: u32,
        request: endio_api::common::ListSpansRequest,
    ) -> Result<(Vec<Span>, u64), Failure> {
        use endio_api::common::traces_client::TracesClient;
        let url = self.client(store)?.url.clone();
        let channel = self.dialer.channel(&url).map_err(|_| store_away())?;
        let mut client = TracesClient::new(channel);
        let answer = tokio::time::timeout(self.limits.connect, client.list_spans(request)).await;
        let answer = answer.map_err(|_| store_away())??.into_inner();
        Ok((answer.spans, answer.dropped))
    }

    /// Asks one store to keep traces.
    ///
    /// # Errors
    /// The store cannot be reached.
    pub(crate) async fn keep(
        &self,
        store: u32,
        request: endio_api::common::KeepTracesRequest,
    ) -> Result<(), Failure> {
        use endio_api::common::traces_client::TracesClient;
        let url = self.client(store)?.url.clone();
        let channel = self.dialer.channel(&url).map_err(|_| store_away())?;
        let mut client = TracesClient::new(channel);
        let kept = tokio::time::timeout(self.limits.connect, client.keep_traces(request)).await;
        kept.map_err(|_| store_away())??;
        Ok(())
    }

    /// What one store says of itself.
    ///
    /// # Errors
    /// The store cannot be reached.
    pub(crate) async fn describe(&self, store: u32) -> Result<DescribeResponse, Failure> {
        let url = self.client(store)?.url.clone();
        let channel = self.dialer.channel(&url).map_err(|_| store_away())?;
        let mut client = BlockStoreClient::new(channel);
        let answer = tokio::time::timeout(self.limits.connect, client.describe(DescribeRequest {}));
        Ok(answer.await.map_err(|_| store_away())??.into_inner())
    }

    fn client(&self, store: u32) -> Result<Arc<Client>, Failure> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.get(&store).cloned().ok_or_else(store_away)
    }

    fn connect(&self, store: &Store) -> Result<Client, endio_chassis::net::NetError> {
        // Two connections: a long transfer one way does not hold up the other.
        let writes = self.dialer.channel(&store.url)?;
        let reads = self.dialer.channel(&store.url)?;
        Ok(Client {
            url: store.url.clone(),
            incarnation: store.incarnation,
            writes: Exchange::start(Writes::new(writes), self.limits.clone()),
            reads: Exchange::start(Reads::new(reads), self.limits.clone()),
        })
    }
}

/// The store cannot be reached, or its stream broke.
pub(crate) fn store_away() -> Failure {
    Failure::new(Reason::PeerAway, "a block-store cannot be reached now")
}
