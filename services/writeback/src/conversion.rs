//! Unary calls to conversion, tried again while it is away.

use std::future::Future;
use std::time::Duration;

use endio_api::conversion::conversion_client::ConversionClient;
use endio_chassis::backoff::Backoff;
use endio_types::Reason;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::failure::Failure;

/// The generated client over one channel.
pub(crate) type Client = ConversionClient<Channel>;

/// Unary calls. Clones share the connection.
#[derive(Clone)]
pub(crate) struct Conversion {
    channel: Channel,
    client: Client,
    call_timeout: Duration,
    backoff: Backoff,
}

impl Conversion {
    /// Calls over this channel; one try takes at most `call_timeout`.
    pub(crate) fn new(channel: Channel, call_timeout: Duration, backoff: Backoff) -> Self {
        let client = ConversionClient::new(channel.clone())
            .max_decoding_message_size(crate::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(crate::MESSAGE_BYTES_MAX);
        Self { channel, client, call_timeout, backoff }
    }

    /// The connection, for other services of the same process.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A client for a call that streams.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// One call, tried again until `deadline` while conversion is away, starting or out of room
    /// for one more request. The call must be idempotent.
    ///
    /// # Errors
    /// What conversion refused, or `PEER_AWAY` at the deadline.
    pub(crate) async fn call<T, F>(
        &self,
        deadline: Instant,
        call: impl Fn(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pauses = self.backoff.delays(crate::jitter());
        loop {
            let limit = deadline.min(Instant::now() + self.call_timeout);
            let failure = match tokio::time::timeout_at(limit, call(self.client.clone())).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => Failure::from(status),
                Err(_) => Failure::conversion_away(),
            };
            let passes = matches!(
                failure.reason,
                Reason::PeerAway | Reason::NotReady | Reason::Limit | Reason::Draining
            );
            let pause = pauses.next().unwrap_or(self.call_timeout);
            if !passes || Instant::now() + pause >= deadline {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
        }
    }
}
