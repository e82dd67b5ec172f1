//! STARTTLS ("TLS support"): server certificate, and optionally certificates of clients. Files that
//! are replaced count from the next handshake on, without a restart.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tracing_mutex::stdsync::Mutex;

use crate::export::Certificate;
use crate::handshake::TlsPolicy;
use crate::session::Stream;

/// Files for [`Tls::load`], all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Chain of the server, its own certificate first.
    pub certificate: PathBuf,
    /// Private key of the server.
    pub key: PathBuf,
    /// Authorities that sign clients. If present, a client without a certificate signed by one of
    /// them is refused; if absent, clients show none.
    pub client_authorities: Option<PathBuf>,
}

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds no PEM of the kind wanted.
    #[error("{path}: {error}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: pem::Error,
    },
    /// An authority is unusable.
    #[error("no usable client authorities")]
    Authorities(#[source] VerifierBuilderError),
    /// The parts do not fit together.
    #[error("certificate and key are unusable")]
    Unusable(#[source] rustls::Error),
}

/// Shortest time between two looks at the files. Too short: many handshakes cost many looks. Too
/// long: a certificate that ends soon is shown for longer.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// TLS for a server. Cheap to clone; clones share what they read.
#[derive(Clone)]
pub struct Tls {
    files: Arc<TlsFiles>,
    current: Arc<Mutex<Current>>,
    policy: TlsPolicy,
}

/// What counts now.
struct Current {
    acceptor: TlsAcceptor,
    /// Of the files as they were read last, also if they did not fit together.
    stamp: Stamp,
    looked: Instant,
}

/// By what a file that was replaced is recognised: time of change and length; `None`: not there.
type Stamp = Vec<Option<(SystemTime, u64)>>;

impl Tls {
    /// Reads the files. `is_required` refuses clients that do not start TLS.
    ///
    /// # Errors
    /// [`TlsError`] names the file that is at fault.
    pub fn load(files: &TlsFiles, is_required: bool) -> Result<Self, TlsError> {
        let stamp = files.stamp();
        let acceptor = files.acceptor()?;
        let policy = if is_required { TlsPolicy::Required } else { TlsPolicy::Optional };
        let current = Current { acceptor, stamp, looked: Instant::now() };
        let (files, current) = (Arc::new(files.clone()), Arc::new(Mutex::new(current)));
        Ok(Self { files, current, policy })
    }

    pub(crate) fn policy(&self) -> TlsPolicy {
        self.policy
    }

    /// What the files say by now. Files that do not fit together change nothing, and are told once.
    fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= LOOK_EVERY {
            current.looked = Instant::now();
            let stamp = self.files.stamp();
            if stamp != current.stamp {
                current.stamp = stamp;
                match self.files.acceptor() {
                    Ok(acceptor) => {
                        current.acceptor = acceptor;
                        tracing::info!("certificates of nbd were read again");
                    }
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), "certificates of nbd stay as they were");
                    }
                }
            }
        }
        current.acceptor.clone()
    }

    pub(crate) async fn accept(
        &self,
        stream: Box<dyn Stream>,
    ) -> io::Result<(TlsStream<Box<dyn Stream>>, Option<Certificate>)> {
        let stream = self.acceptor().accept(stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.map(|certificate| Certificate {
            common_name: common_name(certificate),
            der: Bytes::copy_from_slice(certificate),
        });
        Ok((stream, certificate))
    }
}

impl TlsFiles {
    fn stamp(&self) -> Stamp {
        let files = [Some(&self.certificate), Some(&self.key), self.client_authorities.as_ref()];
        let stamp = |path: &PathBuf| {
            let file = std::fs::metadata(path).ok()?;
            Some((file.modified().ok()?, file.len()))
        };
        files.into_iter().flatten().map(stamp).collect()
    }

    fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| TlsError::File { path: self.key.clone(), error })?;
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Unusable)?;
        let config = match &self.client_authorities {
            None => config.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority).map_err(TlsError::Unusable)?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(TlsError::Authorities)?;
                config.with_client_cert_verifier(verifier)
            }
        };
        let config = config.with_single_cert(chain, key).map_err(TlsError::Unusable)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |said, cause| format!("{said}: {cause}"))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fault = |error| TlsError::File { path: path.to_owned(), error };
    let certificates = CertificateDer::pem_file_iter(path).map_err(fault)?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(fault)?;
    if certificates.is_empty() {
        return Err(fault(pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

/// The common name in the subject of a certificate (RFC 5280, section 4.1), the last one if there
/// are several. Any bytes are taken; what is no certificate has no name.
pub fn common_name(certificate: &[u8]) -> Option<String> {
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    const VERSION: u8 = 0xa0;
    /// 2.5.4.3, `id-at-commonName`.
    const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
    let (tag, certificate, _) = der(certificate)?;
    let (inner, tbs, _) = der(certificate)?;
    if tag != SEQUENCE || inner != SEQUENCE {
        return None;
    }
    let (tag, _, rest) = der(tbs)?;
    // Without a version the first field is the serial number.
    let mut rest = if tag == VERSION { der(rest)?.2 } else { rest };
    for _signature_issuer_validity in 0..3 {
        rest = der(rest)?.2;
    }
    let (tag, mut subject, _) = der(rest)?;
    if tag != SEQUENCE {
        return None;
    }
    let mut name = None;
    while !subject.is_empty() {
        let (tag, set, next) = der(subject)?;
        subject = next;
        let (_, attribute, _) = der(set)?;
        let (_, kind, value) = der(attribute)?;
        if tag == SET && kind == COMMON_NAME {
            let (_, value, _) = der(value)?;
            name = std::str::from_utf8(value).ok().map(str::to_owned);
        }
    }
    name
}

/// One DER element: tag, contents, what follows.
fn der(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = bytes.split_first()?;
    let (first, mut rest) = rest.split_first()?;
    let mut length = usize::from(*first);
    if length >= 0x80 {
        let count = length & 0x7f;
        if count == 0 || count > 4 {
            return None;
        }
        length = 0;
        for _ in 0..count {
            let (byte, next) = rest.split_first()?;
            length = length << 8 | usize::from(*byte);
            rest = next;
        }
    }
    let (contents, rest) = rest.split_at_checked(length)?;
    Some((*tag, contents, rest))
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
