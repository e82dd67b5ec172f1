//! Mutual TLS: who may connect, and to whom one connects.
//!
//! ```text
//!   DIR/ca.pem    authorities that sign everybody
//!   DIR/cert.pem  own chain, own certificate first        ──► Tls ──► Listener::secured
//!   DIR/key.pem   its private key                              └────► Dialer::secured
//! ```
//! TLS 1.3 only, both sides show a certificate, and no session is resumed: every connection is
//! judged by the files as they are now. The files are looked at again and again; a change counts
//! from the next connection on, and files that make no sense change nothing but the log.
//!
//! What the names in a certificate may do is not decided here: a server hands them to its
//! [`crate::server::Access`].

mod material;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

pub use material::{MaterialError, uri_names};

use self::material::{Files, Material};
use crate::config::Fault;
use crate::net::{Dialer, DialerConfig, ListenAddr, Listener, NetError};

/// Whether connections are secured, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// Directory of `ca.pem`, `cert.pem` and `key.pem`. Absent: no TLS, which `insecure` must allow.
    pub dir: Option<PathBuf>,
    /// Work without TLS: whoever reaches the port may do everything. Loopback addresses only.
    pub insecure: bool,
    /// With `insecure`: on any address. Whoever reaches the network may do everything.
    pub insecure_any_address: bool,
    /// Pause between two looks at the files, in ms; 100 to 3,600,000. Too small: reads for
    /// nothing. Too large: a new certificate counts late.
    pub reload_every_ms: u64,
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self { dir: None, insecure: false, insecure_any_address: false, reload_every_ms: 2_000 }
    }
}

impl TlsConfig {
    /// What is wrong with it, with the keys that it has inside a configuration.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        let range =
            Fault::unless_within("tls.reload_every_ms", self.reload_every_ms, 100, 3_600_000);
        let both = self.dir.is_some() && (self.insecure || self.insecure_any_address);
        let both = both.then(|| Fault::new("tls.insecure", "and tls.dir: choose one"));
        range.into_iter().chain(both).collect()
    }
}

/// The flags of [`TlsConfig`], for the command line of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
pub struct TlsFlags {
    /// Directory of ca.pem, cert.pem and key.pem: mutual TLS in and out.
    #[arg(long = "tls-dir", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Work without TLS, on loopback addresses only: whoever reaches the port may do everything.
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub insecure: bool,
    /// With --insecure: on any address.
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub insecure_any_address: bool,
}

/// A flag that was not given leaves the configuration as it is.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// Why a service has no connections.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// Nobody said whether TLS is wanted.
    #[error(
        "give --tls-dir DIR (`endio pki` makes the files), or --insecure to work without TLS \
         on a loopback address"
    )]
    Undecided,
    /// Without TLS only loopback addresses are taken.
    #[error(
        "without TLS, {addr} is refused: it is not a loopback address; give --tls-dir DIR, or \
         --insecure-any-address if everybody on that network may do everything"
    )]
    NotLoopback {
        /// The address.
        addr: ListenAddr,
    },
    /// A Unix socket is not secured by TLS.
    #[error("{addr} cannot be secured by TLS: give host:port")]
    NotTcp {
        /// The address.
        addr: ListenAddr,
    },
    /// The files are unusable.
    #[error("the files of TLS are unusable")]
    Material(#[from] MaterialError),
    /// The address cannot be bound.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// How a process secures its connections: decided once, at its start.
#[derive(Clone, Debug)]
pub enum Security {
    /// Mutual TLS.
    Tls(Tls),
    /// None, by an explicit choice.
    Insecure {
        /// Also on addresses that are not loopback.
        is_any_address: bool,
    },
}

impl Security {
    /// Reads the files, or takes note of the choice to do without. Logs that choice as a warning.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Neither was chosen, or the files are unusable.
    pub fn open(config: &TlsConfig) -> Result<Self, TlsError> {
        match (&config.dir, config.insecure || config.insecure_any_address) {
            (Some(dir), _) => {
                let every = Duration::from_millis(config.reload_every_ms);
                let tls = Tls::load(dir)?;
                tracing::info!(dir = %dir.display(), names = ?tls.names(), "mutual tls");
                tls.reload(every);
                Ok(Self::Tls(tls))
            }
            (None, true) => {
                let is_any_address = config.insecure_any_address;
                tracing::warn!(
                    is_any_address,
                    "tls is off: whoever reaches the ports may do everything"
                );
                Ok(Self::Insecure { is_any_address })
            }
            (None, false) => Err(TlsError::Undecided),
        }
    }

    /// Whether there is no TLS.
    #[must_use]
    pub fn is_insecure(&self) -> bool {
        matches!(self, Self::Insecure { .. })
    }

    /// Binds an address for connections of this kind.
    ///
    /// # Errors
    /// The address does not fit, or cannot be bound.
    pub async fn bind(&self, addr: &ListenAddr) -> Result<Listener, TlsError> {
        if matches!((self, addr), (Self::Tls(_), ListenAddr::Unix(_))) {
            return Err(TlsError::NotTcp { addr: addr.clone() });
        }
        let listener = Listener::bind(addr).await?;
        match self {
            Self::Insecure { is_any_address } if !is_any_address && !listener.is_local() => {
                Err(TlsError::NotLoopback { addr: addr.clone() })
            }
            Self::Insecure { .. } => Ok(listener),
            Self::Tls(tls) => Ok(listener.secured(tls.clone())),
        }
    }

    /// Makes connections of this kind.
    #[must_use]
    pub fn dialer(&self, config: DialerConfig) -> Dialer {
        match self {
            Self::Insecure { .. } => Dialer::new(config),
            Self::Tls(tls) => Dialer::new(config).secured(tls.clone()),
        }
    }
}

/// A directory of TLS files, as it was when it last made sense. Cheap to clone; clones are one.
#[derive(Clone)]
pub struct Tls {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    material: RwLock<Arc<Material>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tls({})", self.shared.dir.display())
    }
}

impl Tls {
    /// Reads the files once.
    ///
    /// # Errors
    /// Which file is at fault, and why.
    pub fn load(dir: &Path) -> Result<Self, MaterialError> {
        let material = Material::new(Files::read(dir)?, dir)?;
        let material = RwLock::new(Arc::new(material));
        Ok(Self { shared: Arc::new(Shared { dir: dir.to_owned(), material }) })
    }

    /// Looks at the files every so often until nobody uses this any more. Must be called inside a
    /// tokio runtime.
    pub fn reload(&self, every: Duration) {
        tokio::spawn(watch(Arc::downgrade(&self.shared), every));
    }

    /// The URIs in the process's own certificate.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.shared.material().names.clone()
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.shared.material().server)
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.shared.material().client)
    }
}

impl Shared {
    fn material(&self) -> Arc<Material> {
        // The cell is valid after every single statement.
        Arc::clone(&self.material.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, material: Material) {
        *self.material.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
    }
}

/// Takes over changed files. What makes no sense is told once, and looked at again when it changes:
/// while files are being replaced one by one, a key does not fit its certificate for a moment.
async fn watch(shared: Weak<Shared>, every: Duration) {
    let mut told: Option<Result<Files, String>> = None;
    loop {
        tokio::time::sleep(every).await;
        let Some(shared) = shared.upgrade() else { return };
        let dir = shared.dir.clone();
        let read = tokio::task::spawn_blocking(move || Files::read(&dir)).await;
        let Ok(read) = read else { return };
        let current = shared.material();
        let outcome = match read {
            Ok(files) if files == current.files => {
                told = None;
                continue;
            }
            Ok(files) if told.as_ref().is_some_and(|told| told.as_ref() == Ok(&files)) => continue,
            Ok(files) => (Ok(files.clone()), Material::new(files, &shared.dir)),
            Err(error) => (Err(error.to_string()), Err(error)),
        };
        match outcome {
            (_, Ok(material)) => {
                tracing::info!(dir = %shared.dir.display(), names = ?material.names, "tls files reloaded");
                shared.replace(material);
                told = None;
            }
            (seen, Err(error)) => {
                if told.as_ref() != Some(&seen) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, "new tls files are unusable: the old ones stay");
                }
                told = Some(seen);
            }
        }
    }
}

#[cfg(test)]
mod tests;
