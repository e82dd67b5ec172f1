//! What the three files say, ready for use.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};

const AUTHORITIES: &str = "ca.pem";
const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";

/// Largest file that is read, in bytes: a chain or a bundle of authorities is far smaller.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why files are unusable. No text of a file is repeated in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaterialError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds no PEM of the kind wanted.
    #[error("{} holds no {wanted} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What should be there.
        wanted: &'static str,
    },
    /// A file was understood and cannot be used.
    #[error("{} cannot be used", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// No client could be verified with these authorities.
    #[error("{} cannot verify anybody", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
}

/// The bytes of the files. Never printed: one is a private key.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Files {
    authorities: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Files {
    pub(super) fn read(dir: &Path) -> Result<Self, MaterialError> {
        Ok(Self {
            authorities: read(&dir.join(AUTHORITIES))?,
            certificate: read(&dir.join(CERTIFICATE))?,
            key: read(&dir.join(KEY))?,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, MaterialError> {
    let failed = |source| MaterialError::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > FILE_BYTES_MAX {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB")));
    }
    std::fs::read(path).map_err(failed)
}

/// Both sides of TLS out of one set of files.
pub(super) struct Material {
    pub(super) files: Files,
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    /// URIs in the own certificate.
    pub(super) names: Vec<String>,
}

impl Material {
    pub(super) fn new(files: Files, dir: &Path) -> Result<Self, MaterialError> {
        let (ca, cert, key) = (dir.join(AUTHORITIES), dir.join(CERTIFICATE), dir.join(KEY));
        let unusable = |path: &Path, source| MaterialError::Unusable { path: path.into(), source };
        let chain = certificates(&files.certificate, &cert)?;
        let private = private_key(&files.key, &key)?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&files.authorities, &ca)? {
            roots.add(authority).map_err(|error| unusable(&ca, error))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let verifier = verifier
            .build()
            .map_err(|source| MaterialError::Authorities { path: ca.clone(), source })?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&cert, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), private.clone_key())
            .map_err(|error| unusable(&cert, error))?;
        // A resumed session would skip the certificate: an expired or replaced one would go on.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&cert, error))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), private)
            .map_err(|error| unusable(&cert, error))?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![b"h2".to_vec()];
        warn_if_readable(&key);
        let names = chain.first().map(|own| uri_names(own)).unwrap_or_default();
        Ok(Self { files, server: Arc::new(server), client: Arc::new(client), names })
    }
}

fn certificates(bytes: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let fault = || MaterialError::Pem { path: path.to_owned(), wanted: "certificate" };
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(bytes).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or_else(fault)
}

fn private_key(bytes: &[u8], path: &Path) -> Result<PrivateKeyDer<'static>, MaterialError> {
    PrivateKeyDer::from_pem_slice(bytes)
        .map_err(|_| MaterialError::Pem { path: path.to_owned(), wanted: "private key" })
}

/// A key that everybody on the machine reads is no secret.
fn warn_if_readable(key: &Path) {
    let mode = std::fs::metadata(key).map_or(0, |meta| meta.permissions().mode());
    if mode & 0o007 != 0 {
        tracing::warn!(path = %key.display(), "every user of this machine may read the private key");
    }
}

/// The URIs among the alternative names of a certificate (RFC 5280, section 4.2.1.6). What is no
/// certificate has none.
#[must_use]
pub fn uri_names(certificate: &[u8]) -> Vec<String> {
    let der = CertificateDer::from(certificate);
    let parsed = webpki::EndEntityCert::try_from(&der);
    parsed.map_or_else(|_| Vec::new(), |cert| cert.valid_uri_names().map(str::to_owned).collect())
}
