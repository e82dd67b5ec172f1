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

/// Largest answer: as much as conversion may send. A list of all volumes is one message.
pub(crate) const ANSWER_BYTES_MAX: usize = 16 << 20;

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
            .max_decoding_message_size(ANSWER_BYTES_MAX)
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
        let limited = |client| {
            let limit = deadline.min(Instant::now() + self.call_timeout);
            let call = tokio::time::timeout_at(limit, call(client));
            async move { call.await.unwrap_or_else(|_| Err(away())) }
        };
        self.call_unhurried(deadline, limited).await
    }

    /// As [`Self::call`], for what takes as long as it takes: no try is cut, but none begins after
    /// `retry_until`. Whoever waits for less drops it.
    ///
    /// # Errors
    /// What conversion refused, or `PEER_AWAY`.
    pub(crate) async fn call_unhurried<T, F>(
        &self,
        retry_until: Instant,
        call: impl Fn(Client) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pauses = self.backoff.delays(crate::jitter());
        loop {
            let failure = match call(self.client.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => Failure::from(status),
            };
            let passes = matches!(
                failure.reason,
                Reason::PeerAway | Reason::NotReady | Reason::Limit | Reason::Draining
            );
            let pause = pauses.next().unwrap_or(self.call_timeout);
            if !passes || Instant::now() + pause >= retry_until {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
        }
    }
}

fn away() -> Status {
    Failure::conversion_away().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_try_is_cut_unless_it_takes_as_long_as_it_takes() {
        let channel = endio_chassis::net::Dialer::default().channel("memory:nobody").unwrap();
        let short = Duration::from_millis(1);
        let backoff = Backoff { first: short, max: short, retries_max: None };
        let conversion = Conversion::new(channel, short, backoff);
        let slow = |_: Client| async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok::<_, Status>(Response::new(7))
        };
        let now = Instant::now();
        let cut = conversion.call(now + short, slow).await.unwrap_err();
        assert_eq!(cut.reason, Reason::PeerAway);
        assert_eq!(conversion.call_unhurried(now, slow).await.unwrap(), 7);
    }
}
