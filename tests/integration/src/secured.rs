//! The services in this process behind mutual TLS on real sockets, and callers with certificates.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use endio_api::access::{Identity, Role};
use endio_chassis::net::{Dialer, ListenAddr, Listener};
use endio_chassis::shutdown::Shutdown;
use endio_chassis::tls::Tls;
use endio_pki::{Request, Subject};
use endio_store::block::{BlockDevice, MemoryDevice, Superblock};
use endio_types::Incarnation;
use tempfile::TempDir;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::services::{STORE_BLOCKS, recorder};

/// Identity of the block-store.
pub const STORE_UUID: [u8; 16] = [7; 16];
/// Longer than any test.
const CERTIFICATES_LIVE: Duration = Duration::from_secs(86_400);
/// Longest wait for what ends by itself unless something is broken.
const LONG: Duration = Duration::from_secs(60);

/// An authority in a directory of its own.
pub struct Authority(TempDir);

impl Default for Authority {
    fn default() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        endio_pki::init(dir.path(), CERTIFICATES_LIVE, false).expect("an authority");
        Self(dir)
    }
}

impl Authority {
    /// Directory with a certificate for somebody; made at the first call.
    pub fn certificate(&self, role: Role, name: &str) -> PathBuf {
        self.issue(role, name, CERTIFICATES_LIVE)
    }

    /// Directory with a certificate that ends with the second in which it is made.
    pub fn ended(&self, role: Role, name: &str) -> PathBuf {
        self.issue(role, name, Duration::ZERO)
    }

    /// Directory with the certificate of the authority itself.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    fn issue(&self, role: Role, name: &str, valid_for: Duration) -> PathBuf {
        let subject = match role {
            Role::Client => Subject::Client(name.to_owned()),
            Role::Admin => Subject::Admin(name.to_owned()),
            service => Subject::Service { kind: service.to_string(), name: name.to_owned() },
        };
        let expected = Identity { role, name: name.to_owned() };
        assert_eq!(Identity::of(&[subject.uri()]), Some(expected), "endio pki and the rules agree");
        let out = self.0.path().join(subject.directory());
        let request = Request { subject, sans: Vec::new(), valid_for, if_missing: true };
        endio_pki::issue(self.0.path(), &out, &request).expect("a certificate");
        out
    }

    fn tls(&self, role: Role, name: &str) -> Tls {
        Tls::load(&self.certificate(role, name)).expect("the files fit together")
    }

    /// Connects as somebody.
    pub fn dialer(&self, role: Role, name: &str) -> Dialer {
        Dialer::default().secured(self.tls(role, name))
    }

    async fn listener(&self, role: Role, name: &str) -> Listener {
        let listener = Listener::bind(&ListenAddr::loopback()).await.expect("a free port");
        listener.secured(self.tls(role, name))
    }
}

/// One conversion `c1`, one block-store `s1`, one writeback `w1`.
pub struct Secured {
    /// Who signed everybody.
    pub authority: Authority,
    /// Where conversion answers.
    pub conversion: String,
    /// Where the block-store answers.
    pub store: String,
    /// Where the writeback answers.
    pub writeback: String,
    shutdowns: [Shutdown; 3],
    running:
        Option<(endio_writeback::Running, endio_block_store::Running, endio_conversion::Running)>,
    // Removed after everything has stopped.
    _directory: TempDir,
}

impl Secured {
    /// Starts all three; `change` may change the writeback's configuration.
    pub async fn start(change: impl FnOnce(&mut endio_writeback::Config)) -> Self {
        let authority = Authority::default();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let shutdowns = [Shutdown::new(), Shutdown::new(), Shutdown::new()];
        let [of_writeback, of_store, of_conversion] = shutdowns.clone();

        let listener = authority.listener(Role::Conversion, "c1").await;
        let conversion = listener.url().to_owned();
        let config = endio_conversion::Config {
            data_dir: directory.path().join("conversion"),
            ..endio_conversion::Config::default()
        };
        let dialer = authority.dialer(Role::Conversion, "c1");
        let deps = endio_conversion::Deps::new(listener, dialer, recorder(), of_conversion);
        let running_conversion = endio_conversion::start(config, deps).await.expect("conversion");

        let config = endio_block_store::Config {
            conversion: conversion.clone(),
            ..endio_block_store::Config::default()
        };
        let deps = endio_block_store::Deps {
            listener: authority.listener(Role::BlockStore, "s1").await,
            dialer: authority.dialer(Role::BlockStore, "s1"),
            recorder: recorder(),
            shutdown: of_store,
        };
        let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(STORE_BLOCKS));
        let superblock = Superblock {
            sequence: 1,
            uuid: STORE_UUID,
            incarnation: Incarnation(1),
            capacity_blocks: STORE_BLOCKS,
        };
        let running_store = endio_block_store::start_on(config, deps, device, superblock).await;
        let running_store = running_store.expect("the block-store");
        let store = running_store.url();

        let mut config = endio_writeback::Config {
            conversion: conversion.clone(),
            cache_dir: directory.path().join("cache"),
            ..endio_writeback::Config::default()
        };
        change(&mut config);
        let deps = endio_writeback::Deps {
            listener: authority.listener(Role::Writeback, "w1").await,
            dialer: authority.dialer(Role::Writeback, "w1"),
            recorder: recorder(),
            shutdown: of_writeback,
        };
        let running = endio_writeback::start(config, deps).await.expect("the writeback");
        let writeback = running.url();
        let running = Some((running, running_store, running_conversion));
        Self { authority, conversion, store, writeback, shutdowns, running, _directory: directory }
    }

    /// Where a service answers.
    pub fn url(&self, service: Role) -> &str {
        match service {
            Role::Conversion => &self.conversion,
            Role::BlockStore => &self.store,
            _ => &self.writeback,
        }
    }

    /// A connection to a service as somebody.
    pub fn channel(&self, service: Role, role: Role, name: &str) -> Channel {
        let dialer = self.authority.dialer(role, name);
        dialer.channel(self.url(service)).expect("a channel")
    }

    /// Stops everything in order; each must drain.
    pub async fn stop(mut self) {
        let Some((writeback, store, conversion)) = self.running.take() else { return };
        let [of_writeback, of_store, of_conversion] = &self.shutdowns;
        of_writeback.request();
        let ended = tokio::time::timeout(LONG, writeback.wait()).await;
        ended.expect("the writeback stops in time").expect("the writeback drains");
        of_store.request();
        let ended = tokio::time::timeout(LONG, store.wait()).await;
        ended.expect("the block-store stops in time").expect("the block-store drains");
        of_conversion.request();
        let ended = tokio::time::timeout(LONG, conversion.wait()).await;
        ended.expect("conversion stops in time").expect("conversion drains");
    }
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls any method, `package.Service/Method`, with one empty message, and waits until the service
/// has taken the call or refused it.
///
/// # Errors
/// What the service said.
pub async fn call_empty(channel: &Channel, method: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    let path = format!("/{method}").parse().expect("a path");
    let call = async {
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        grpc.server_streaming(tonic::Request::new(Bytes::new()), path, Raw).await
    };
    tokio::time::timeout(LONG, call).await.expect("the service answers in time").map(drop)
}

/// Whether a call was refused because of who made it.
pub fn is_denied(outcome: &Result<(), Status>) -> bool {
    let Err(status) = outcome else { return false };
    let is_reason = endio_api::status::reason(status) == endio_types::Reason::NotAllowed;
    status.code() == Code::PermissionDenied && is_reason
}
