//! Volumes as NBD exports: every volume is one, under its name.
//!
//! | NBD | engine |
//! |---|---|
//! | WRITE | buffered once this connection has sent a FLUSH; before that, and with FUA, durable |
//! | FLUSH | fsync of the volume: what any client was told is done |
//! | TRIM, WRITE_ZEROES | a change of the map, durable on return |
//! | BLOCK_STATUS | the states of extents, delayed data over them |
//!
//! The name of an export also says how the volume is opened: see `nbd/name.rs`.
//!
//! A connection keeps the volume as it was when it attached: if the volume is taken over, closed or
//! deleted meanwhile, its requests fail until the client connects again.

mod name;
mod status;
mod tls;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use endio_chassis::net::ListenAddr;
use endio_nbd::tls::{Tls, TlsError, TlsFiles};
use endio_nbd::{
    Client, Errno, Export, ExportInfo, Exports, Extent, Fault, Limits, Listed, ListenError,
    NbdAddr, NbdListener, OpenError, Piece, Purpose, Server, ZeroOptions,
};
use endio_types::{ByteRange, Reason};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::task::JoinHandle;

pub use tls::NbdTls;

use crate::access::Access;
use crate::config::Config;
use crate::engine::{
    Asker, Engine, Mode, Observer, RangeKind, RangeOp, Ranged, ReadOp, Started, Until, WriteOp,
};
use crate::failure::Failure;
use crate::volume::Volume;
use name::How;

/// The metadata context that tells the state of extents.
pub const STATE_CONTEXT: &str = "endio:state";

/// Values of the context [`STATE_CONTEXT`].
pub mod state {
    /// Nothing is allocated; reads as zeroes.
    pub const HOLE: u64 = 0;
    /// Data waits in the dirty cache.
    pub const DELAYED: u64 = 1;
    /// Blocks are allocated and hold nothing; reads as zeroes.
    pub const UNWRITTEN: u64 = 2;
    /// Blocks hold data.
    pub const WRITTEN: u64 = 3;
    /// Data of the dirty cache is on its way to the stores.
    pub const IN_FLIGHT: u64 = 4;
}

/// Most bytes of one write of the engine.
const WRITE_BYTES: usize = 3 << 20;
/// Most bytes of one read of the engine.
const READ_BYTES: u64 = 1 << 20;
/// Reads of one request under way.
const READS_AHEAD: usize = 4;
/// Most bytes that one CACHE reads: more would only push out what was read first.
const CACHE_BYTES_MAX: u64 = 32 << 20;
/// A client may wait for the service to recover before it is told of an export.
const HANDSHAKE_MS: u64 = 60_000;

/// Why there is no NBD server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The address names no socket.
    #[error("nbd_listen {0} is neither IP:PORT nor unix:PATH")]
    Address(ListenAddr),
    /// Without TLS only loopback addresses are taken.
    #[error(
        "without nbd_tls, nbd_listen {0} is refused: it is not a loopback address; give nbd_tls, or \
         --nbd-insecure-any-address if everybody on that network may open every volume"
    )]
    NotLoopback(SocketAddr),
    /// The socket cannot be bound.
    #[error("nbd_listen cannot be bound")]
    Listen(#[source] ListenError),
    /// The files of TLS are unusable.
    #[error("nbd_tls is unusable")]
    Tls(#[source] TlsError),
}

/// A socket that is bound and not yet served.
pub(crate) struct Bound {
    listener: NbdListener,
    tls: Option<Tls>,
}

/// Binds the socket of the configuration, if it has one.
///
/// # Errors
/// See [`NbdError`].
pub(crate) async fn bind(config: &Config) -> Result<Option<Bound>, NbdError> {
    let Some(listen) = &config.nbd_listen else { return Ok(None) };
    let address = match listen {
        ListenAddr::Unix(path) => NbdAddr::Unix(path.clone()),
        ListenAddr::Tcp(text) => {
            let mut found = tokio::net::lookup_host(text).await.into_iter().flatten();
            let found = found.next().ok_or_else(|| NbdError::Address(listen.clone()))?;
            NbdAddr::Tcp(found)
        }
        ListenAddr::Memory(_) => return Err(NbdError::Address(listen.clone())),
    };
    let tls = match &config.nbd_tls {
        None => {
            if let NbdAddr::Tcp(at) = &address
                && !at.ip().is_loopback()
            {
                if !(config.nbd_insecure_any_address || config.tls.insecure_any_address) {
                    return Err(NbdError::NotLoopback(*at));
                }
                tracing::warn!(
                    listen = %at,
                    "nbd is in the clear: whoever reaches the port may open every volume"
                );
            }
            None
        }
        Some(tls) => {
            let files = TlsFiles {
                certificate: tls.certificate.clone(),
                key: tls.key.clone(),
                client_authorities: tls.client_authorities.clone(),
            };
            Some(Tls::load(&files, tls.required).map_err(NbdError::Tls)?)
        }
    };
    let listener = NbdListener::bind(&address).await.map_err(NbdError::Listen)?;
    Ok(Some(Bound { listener, tls }))
}

impl Bound {
    /// Where clients attach.
    pub(crate) fn address(&self) -> NbdAddr {
        self.listener.address().clone()
    }

    /// The same for clients that run elsewhere in the file system.
    pub(crate) fn listen_addr(&self) -> ListenAddr {
        match self.listener.address() {
            NbdAddr::Tcp(address) => ListenAddr::Tcp(address.to_string()),
            NbdAddr::Unix(path) => ListenAddr::Unix(absolute(path)),
        }
    }

    /// Serves until [`Serving::stop`].
    pub(crate) fn serve(self, engine: &Arc<Engine>) -> Serving {
        let limits = Limits { handshake_ms: HANDSHAKE_MS, ..Limits::default() };
        let volumes = Volumes { engine: Arc::clone(engine) };
        let mut server = Server::new(Arc::new(volumes), limits);
        if let Some(tls) = self.tls {
            server = server.with_tls(tls);
        }
        let accepting = tokio::spawn(self.listener.serve(server.clone()));
        Serving { server, accepting }
    }
}

fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The running server.
pub(crate) struct Serving {
    server: Server,
    accepting: JoinHandle<()>,
}

impl Serving {
    /// From now on nothing new begins and nobody connects; what runs is finished. Who asks the
    /// engine to drain does this first, so that no client hears of it.
    pub(crate) fn begin_stop(&self) {
        self.server.stop();
    }

    /// Finishes the requests that run, and closes the connections.
    pub(crate) async fn stop(self) {
        self.server.stop();
        if let Err(error) = self.accepting.await {
            tracing::error!(%error, "the task that accepts nbd clients ended badly");
        }
        self.server.drained().await;
    }
}

/// All volumes, as far as a client may see them.
struct Volumes {
    engine: Arc<Engine>,
}

impl Volumes {
    fn access(&self, client: &Client, volume: &str) -> Option<Access> {
        let tls = self.engine.config.nbd_tls.as_ref();
        tls.map_or(Some(Access::ReadWrite), |tls| tls.access(client, volume))
    }

    /// The only volume that the client sees, if there is one.
    async fn default_volume(&self, client: &Client) -> Result<String, OpenError> {
        let mut listed = self.list(client).await?.into_iter();
        match (listed.next(), listed.next()) {
            (Some(only), None) => Ok(only.name),
            _ => Err(OpenError::Unknown),
        }
    }
}

#[async_trait::async_trait]
impl Exports for Volumes {
    async fn open(
        &self,
        name: &str,
        client: &Client,
        purpose: Purpose,
    ) -> Result<Arc<dyn Export>, OpenError> {
        self.engine.takes_work_soon().await.map_err(refused)?;
        let (name, how) = name::parse(name).ok_or(OpenError::Unknown)?;
        let name = match name {
            "" => self.default_volume(client).await?,
            name => name.to_owned(),
        };
        let denied = || OpenError::Denied("the certificate is not for this volume".to_owned());
        let access = self.access(client, &name).ok_or_else(denied)?;
        let described = self.engine.describe(&name).await.map_err(refused)?;
        let mut info = ExportInfo::new(name::canonical(&name, how), described.size_bytes);
        info.description = format!("endio volume with {} replica(s)", described.replicas);
        // fsync covers the volume, and reads see what any connection wrote.
        info.can_multi_conn = true;
        info.is_single = how == How::Single;
        info.is_read_only = how == How::ReadOnly || access == Access::ReadOnly;
        info.contexts = vec![STATE_CONTEXT.to_owned()];
        let volume = match purpose {
            Purpose::Describe => None,
            Purpose::Attach => Some(self.engine.volume(&name).await.map_err(refused)?),
        };
        let observer = Observer::of(identity(client));
        if let Some(volume) = &volume {
            observer.watch(volume);
            info.size = volume.state().view.size_bytes();
        }
        let engine = Arc::clone(&self.engine);
        let has_flushed = AtomicBool::new(false);
        if volume.is_some() {
            engine.metrics.nbd_connections.add(1);
        }
        Ok(Arc::new(VolumeExport { engine, info, volume, observer, has_flushed }))
    }

    async fn list(&self, client: &Client) -> Result<Vec<Listed>, OpenError> {
        self.engine.takes_work_soon().await.map_err(refused)?;
        let volumes = self.engine.list().await.map_err(refused)?.volumes;
        let listed =
            volumes.into_iter().filter(|volume| self.access(client, &volume.name).is_some());
        let listed = listed.map(|volume| Listed {
            description: format!("{} bytes", volume.size_bytes),
            name: volume.name,
        });
        Ok(listed.collect())
    }
}

/// Who a client is over its connections: its certificate's name, or else where it comes from.
fn identity(client: &Client) -> String {
    let certificate = client.certificate.as_ref();
    match certificate.and_then(|certificate| certificate.common_name.as_deref()) {
        Some(name) => format!("certificate {name}"),
        None => match client.address.parse::<std::net::SocketAddr>() {
            Ok(address) => format!("address {}", address.ip()),
            Err(_) => client.address.clone(),
        },
    }
}

impl Drop for VolumeExport {
    fn drop(&mut self) {
        if self.volume.is_some() {
            self.engine.metrics.nbd_connections.add(-1);
        }
    }
}

/// A volume on one connection.
struct VolumeExport {
    engine: Arc<Engine>,
    info: ExportInfo,
    /// Absent where the client only asked about it.
    volume: Option<Arc<Volume>>,
    observer: Observer,
    /// A client that never flushes is served without a cache.
    has_flushed: AtomicBool,
}

impl VolumeExport {
    fn volume(&self) -> Result<&Arc<Volume>, Fault> {
        let volume = self.volume.as_ref();
        let volume = volume.ok_or_else(|| Fault::new(Errno::Io, "the export is not attached"))?;
        volume.usable().map_err(fault)?;
        Ok(volume)
    }

    fn start_range(&self, kind: RangeKind, bytes: ByteRange) -> Result<Started<Ranged>, Fault> {
        let op = RangeOp { kind, bytes, retry: None, traceparent: String::new() };
        Ok(self.engine.start_range(self.volume()?, op))
    }
}

#[async_trait::async_trait]
impl Export for VolumeExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Piece>, Fault> {
        let volume = self.volume()?;
        let part = |bytes| async move {
            let op = ReadOp { bytes, traceparent: String::new() };
            self.engine.read(volume, &op).await
        };
        let mut parts = parts(offset, u64::from(length), READ_BYTES);
        let read = match (parts.next(), parts.next()) {
            (Some(only), None) => part(only).await,
            (first, second) => {
                let parts = first.into_iter().chain(second).chain(parts);
                stream::iter(parts.map(part)).buffered(READS_AHEAD).try_concat().await
            }
        };
        let piece = |piece| match piece {
            crate::engine::Piece::Data(data) => Piece::Data(data),
            crate::engine::Piece::Zeroes(length) => Piece::Zeroes(length),
        };
        Ok(read.map_err(fault)?.into_iter().map(piece).collect())
    }

    async fn write(&self, offset: u64, mut data: Bytes, fua: bool) -> Result<(), Fault> {
        let volume = self.volume()?;
        let mode = match fua || !self.has_flushed.load(Ordering::SeqCst) {
            true => Mode::Durable,
            false => Mode::Buffered,
        };
        let mut writes = Vec::new();
        let mut offset_bytes = offset;
        // All parts take their places in the order of the volume before anything is waited for.
        while !data.is_empty() {
            let part = data.split_to(data.len().min(WRITE_BYTES));
            let length = part.len() as u64;
            let traceparent = String::new();
            let op = WriteOp { offset_bytes, data: part, mode, retry: None, traceparent };
            writes.push(self.engine.start_write(volume, op));
            offset_bytes += length;
        }
        for write in writes {
            write.await.map_err(fault)?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), Fault> {
        self.has_flushed.store(true, Ordering::SeqCst);
        let flushed =
            self.engine.fsync(self.volume()?, Asker::by(&self.observer), Until::Durable, "").await;
        flushed.map(drop).map_err(fault)
    }

    async fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), Fault> {
        let trim = self.start_range(RangeKind::Trim, ByteRange { offset, len: length })?;
        trim.await.map_err(fault)?;
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, how: ZeroOptions) -> Result<(), Fault> {
        let bytes = ByteRange { offset, len: length };
        if !how.no_hole {
            return self.trim(offset, length, how.fua).await;
        }
        // Both take their places in the order of the volume before anything is waited for.
        let zero = self.start_range(RangeKind::Zero, bytes)?;
        let allocate = self.start_range(RangeKind::Allocate, bytes)?;
        for change in [zero, allocate] {
            change.await.map_err(fault)?;
        }
        Ok(())
    }

    async fn cache(&self, offset: u64, length: u64) -> Result<(), Fault> {
        let volume = self.volume()?;
        let reads =
            parts(offset, length.min(CACHE_BYTES_MAX), READ_BYTES).map(|bytes| async move {
                let op = ReadOp { bytes, traceparent: String::new() };
                // What is read is in the memory of its block-store from then on.
                self.engine.read(volume, &op).await.map(drop)
            });
        let read = stream::iter(reads).buffered(READS_AHEAD).try_for_each(|()| async { Ok(()) });
        read.await.map_err(fault)
    }

    async fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        let bytes = ByteRange { offset, len: length };
        status::extents(&self.engine, self.volume()?, context, bytes, extents_max).await
    }
}

/// A range cut at multiples of `step` bytes.
fn parts(offset: u64, length: u64, step: u64) -> impl Iterator<Item = ByteRange> {
    let end = offset.saturating_add(length);
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let next = (at / step + 1).saturating_mul(step).min(end);
        let part = ByteRange { offset: at, len: next - at };
        at = next;
        Some(part)
    })
}

/// The error of the protocol that says what a client can do.
fn errno(reason: Reason) -> Errno {
    match reason {
        Reason::NoSpace | Reason::MetadataFull => Errno::NoSpc,
        Reason::OutOfRange | Reason::Malformed => Errno::Inval,
        Reason::Draining => Errno::Shutdown,
        _ => Errno::Io,
    }
}

fn fault(failure: Failure) -> Fault {
    Fault::new(errno(failure.reason), failure.detail)
}

fn refused(failure: Failure) -> OpenError {
    match failure.reason {
        Reason::UnknownVolume | Reason::Malformed => OpenError::Unknown,
        Reason::VolumeBusy => OpenError::Denied(failure.detail.into_owned()),
        _ => OpenError::Unavailable(failure.detail.into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_multiples_of_the_step() {
        let cut: Vec<_> = parts(5, 20, 10).map(|part| (part.offset, part.len)).collect();
        assert_eq!(cut, [(5, 5), (10, 10), (20, 5)]);
        assert_eq!(parts(5, 0, 10).count(), 0);
    }

    #[test]
    fn only_full_stores_are_told_as_no_space() {
        let no_space = |reason: &&Reason| errno(**reason) == Errno::NoSpc;
        let told: Vec<_> = Reason::ALL.iter().filter(no_space).collect();
        assert_eq!(told, [&Reason::NoSpace, &Reason::MetadataFull]);
    }

    #[tokio::test]
    async fn without_tls_only_loopback_addresses_are_taken_unless_any_is_asked_for() {
        let mut config = Config {
            nbd_listen: Some(ListenAddr::Tcp("0.0.0.0:0".to_owned())),
            ..Config::default()
        };
        let refused = bind(&config).await.err().expect("everybody could open every volume");
        assert!(matches!(refused, NbdError::NotLoopback(_)), "{refused}");
        config.nbd_insecure_any_address = true;
        assert!(matches!(bind(&config).await, Ok(Some(_))));
        config.nbd_insecure_any_address = false;
        config.nbd_listen = Some(ListenAddr::Tcp("127.0.0.1:0".to_owned()));
        assert!(matches!(bind(&config).await, Ok(Some(_))));
    }
}
