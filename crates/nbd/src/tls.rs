//! STARTTLS ("TLS support"): server certificate, and optionally certificates of clients.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;

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

/// TLS for a server. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    policy: TlsPolicy,
}

impl Tls {
    /// Reads the files. `is_required` refuses clients that do not start TLS.
    ///
    /// # Errors
    /// [`TlsError`] names the file that is at fault.
    pub fn load(files: &TlsFiles, is_required: bool) -> Result<Self, TlsError> {
        let chain = certificates(&files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| TlsError::File { path: files.key.clone(), error })?;
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Unusable)?;
        let config = match &files.client_authorities {
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
        let policy = if is_required { TlsPolicy::Required } else { TlsPolicy::Optional };
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), policy })
    }

    pub(crate) fn policy(&self) -> TlsPolicy {
        self.policy
    }

    pub(crate) async fn accept(
        &self,
        stream: Box<dyn Stream>,
    ) -> io::Result<(TlsStream<Box<dyn Stream>>, Option<Certificate>)> {
        let stream = self.acceptor.accept(stream).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.map(|certificate| Certificate {
            common_name: common_name(certificate),
            der: Bytes::copy_from_slice(certificate),
        });
        Ok((stream, certificate))
    }
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
