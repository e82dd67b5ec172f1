//! Connections to the writeback service.

use std::path::Path;
use std::time::Duration;

use endio_api::writeback::{
    inspect_client::InspectClient, io_client::IoClient, volumes_client::VolumesClient,
};
use endio_chassis::net::{Dialer, DialerConfig};
use endio_chassis::tls::Tls;
use tonic::{Status, transport::Channel};

use crate::failure::{Exit, Failure, Outcome};

/// Largest answer that is accepted; maps and traces are sent in pieces far below it.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A service to talk to. Clones share the connection.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    endpoint: String,
    dialer: Dialer,
    channel: Channel,
}

/// How often the files of a long command are looked at: certificates may live for an hour only.
const TLS_RELOAD: Duration = Duration::from_secs(30);

impl Client {
    /// Prepares a connection without TLS; it is made, and made again, when it is needed.
    ///
    /// # Errors
    /// The endpoint is no URL.
    pub(crate) fn new(endpoint: &str) -> Outcome<Self> {
        Self::over(Dialer::new(DialerConfig::default()), endpoint)
    }

    /// The same, with the certificate in a directory if one is given. Who answers must have one whose
    /// identity begins with `peer`: see `endio_api::access`.
    ///
    /// # Errors
    /// The endpoint is no URL of that kind, or the files are unusable.
    pub(crate) fn secured(
        endpoint: &str,
        tls_dir: Option<&Path>,
        peer: &'static str,
    ) -> Outcome<Self> {
        let Some(dir) = tls_dir else { return Self::new(endpoint) };
        let tls = Tls::load(dir).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            let message = format!("{error}{}", cause.unwrap_or_default());
            Failure::new(Exit::Usage, format!("use the certificate in {}", dir.display()), message)
                .help("`endio pki issue --client NAME` makes one")
        })?;
        tls.reload(TLS_RELOAD);
        let dialer = Dialer::new(DialerConfig::default()).secured(tls);
        Self::over(dialer.expecting(peer), endpoint)
    }

    fn over(dialer: Dialer, endpoint: &str) -> Outcome<Self> {
        let channel = dialer.channel(endpoint).map_err(|error| {
            Failure::new(Exit::Usage, format!("use endpoint {endpoint:?}"), error)
                .help("give http://HOST:PORT or unix:/PATH, or --tls-dir and https://HOST:PORT")
        })?;
        Ok(Self { endpoint: endpoint.into(), dialer, channel })
    }

    /// The same service over a connection of its own.
    pub(crate) fn another(&self) -> Outcome<Self> {
        Self::over(self.dialer.clone(), &self.endpoint)
    }

    /// Where the service is.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The channel.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Volumes.
    pub(crate) fn volumes(&self) -> VolumesClient<Channel> {
        VolumesClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Reads and writes.
    pub(crate) fn io(&self) -> IoClient<Channel> {
        IoClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Questions.
    pub(crate) fn inspect(&self) -> InspectClient<Channel> {
        InspectClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// A failure of a call to this service.
    pub(crate) fn failure(&self, what: impl Into<String>, status: &Status) -> Failure {
        Failure::of_status(what, status, &self.endpoint)
    }
}

/// Waits between tries: doubles from 100 ms to 3 s, unless the service names a time.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(3);

    /// Starts at the shortest wait.
    pub(crate) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// How long to wait now. `hint` is what the service asks for; it is kept below the maximum.
    pub(crate) fn take(&mut self, hint: Option<Duration>) -> Duration {
        let wait = hint.map_or(self.next, |hint| hint.clamp(Duration::from_millis(1), Self::MAX));
        self.next = (self.next * 2).min(Self::MAX);
        wait
    }

    /// Something went well: the next wait is short again.
    pub(crate) fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_start_again_after_success() {
        let mut backoff = Backoff::new();
        let waits: Vec<u128> = (0..7).map(|_| backoff.take(None).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3000, 3000]);
        backoff.reset();
        assert_eq!(backoff.take(None).as_millis(), 100);
    }

    #[test]
    fn a_hint_is_followed_within_the_bound() {
        let mut backoff = Backoff::new();
        assert_eq!(backoff.take(Some(Duration::from_millis(40))).as_millis(), 40);
        assert_eq!(backoff.take(Some(Duration::from_secs(60))), Backoff::MAX);
    }
}
