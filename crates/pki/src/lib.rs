//! A development authority: one key in a directory that signs certificates for services and clients.
//!
//! ```text
//!   DIR/ca.pem, DIR/ca-key.pem      the authority         (init)
//!   OUT/ca.pem, cert.pem, key.pem   what a process needs  (issue)
//! ```
//! Who a certificate stands for is a URI among its alternative names, such as
//! `endio://service/block-store/s1` or `endio://client/alice`. Any other authority that makes such
//! certificates does as well; this one has no revocation and no protection of its key but the
//! file's mode, which is why it is for development.

mod current;
mod files;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::current::is_current;
use crate::files::{PRIVATE, PUBLIC, read, write};

/// File of the authorities, with the authority and with everybody.
pub const AUTHORITIES: &str = "ca.pem";
/// File of the authority's private key.
pub const AUTHORITY_KEY: &str = "ca-key.pem";
/// File of the own chain.
pub const CERTIFICATE: &str = "cert.pem";
/// File of the own private key.
pub const KEY: &str = "key.pem";

/// Its name is fixed, so that the key file alone is the authority.
const AUTHORITY_NAME: &str = "endio development authority";
/// Certificates count from a little before now: clocks differ.
const BEFORE: Duration = Duration::from_secs(300);
/// Longest name.
const NAME_BYTES_MAX: usize = 64;

/// Whom a certificate stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A service of that kind: `conversion`, `block-store` or `writeback`.
    Service {
        /// The kind.
        kind: String,
        /// Name of the instance.
        name: String,
    },
    /// A client.
    Client(String),
    /// An operator.
    Admin(String),
}

impl Subject {
    /// The URI in the certificate.
    #[must_use]
    pub fn uri(&self) -> String {
        match self {
            Self::Service { kind, name } => format!("endio://service/{kind}/{name}"),
            Self::Client(name) => format!("endio://client/{name}"),
            Self::Admin(name) => format!("endio://admin/{name}"),
        }
    }

    /// The name of the instance or person, which is also the common name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Service { name, .. } | Self::Client(name) | Self::Admin(name) => name,
        }
    }

    /// Directory below the authority's where its files go if nothing else is said.
    #[must_use]
    pub fn directory(&self) -> String {
        match self {
            Self::Service { kind, name } => format!("{kind}-{name}"),
            Self::Client(name) => format!("client-{name}"),
            Self::Admin(name) => format!("admin-{name}"),
        }
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is an authority already.
    #[error("{} exists: an authority is not replaced by accident", path.display())]
    Exists {
        /// Its key.
        path: PathBuf,
    },
    /// A name that does not fit into a certificate.
    #[error("`{name}` is no name: use 1 to 64 of [A-Za-z0-9._-]")]
    Name {
        /// The name.
        name: String,
    },
    /// A name of a host that does not fit into a certificate.
    #[error("`{san}` is no DNS name or IP address")]
    San {
        /// What was given.
        san: String,
    },
    /// The library refused.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// Makes an authority in a directory, which is made too. `false`: there was one, and `if_missing`
/// allows that.
///
/// # Errors
/// See [`PkiError`].
pub fn init(dir: &Path, valid_for: Duration, if_missing: bool) -> Result<bool, PkiError> {
    let key_path = dir.join(AUTHORITY_KEY);
    if key_path.exists() {
        let is_whole = dir.join(AUTHORITIES).exists();
        return if if_missing && is_whole {
            Ok(false)
        } else {
            Err(PkiError::Exists { path: key_path })
        };
    }
    let key = KeyPair::generate()?;
    let mut params = authority();
    validity(&mut params, valid_for);
    let certificate = params.self_signed(&key)?;
    write(&key_path, key.serialize_pem().as_bytes(), PRIVATE)?;
    write(&dir.join(AUTHORITIES), certificate.pem().as_bytes(), PUBLIC)?;
    Ok(true)
}

/// A certificate that is wanted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whom it stands for.
    pub subject: Subject,
    /// DNS names and IP addresses at which it is reached. For services, none means this machine:
    /// `localhost`, `127.0.0.1`, `::1`.
    pub sans: Vec<String>,
    /// How long it counts.
    pub valid_for: Duration,
    /// Leave files alone that this authority made before for the same subject and hosts, and that
    /// count for another third of `valid_for` at least.
    pub if_missing: bool,
}

impl Request {
    /// Where the subject is reached.
    fn hosts(&self) -> Vec<String> {
        match self.subject {
            Subject::Service { .. } if self.sans.is_empty() => {
                ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec()
            }
            _ => self.sans.clone(),
        }
    }
}

/// Signs a certificate with the authority in `dir` and writes the three files into `out`, which is
/// made. Files that were there are replaced, one at a time. `false`: nothing had to be done.
///
/// # Errors
/// See [`PkiError`].
pub fn issue(dir: &Path, out: &Path, request: &Request) -> Result<bool, PkiError> {
    let authorities = read(&dir.join(AUTHORITIES))?;
    if request.if_missing && is_current(out, &authorities, request) {
        return Ok(false);
    }
    let pem = read(&dir.join(AUTHORITY_KEY))?;
    let issuer = Issuer::new(authority(), KeyPair::from_pem(&pem)?);
    let key = KeyPair::generate()?;
    let certificate = params(request)?.signed_by(&key, &issuer)?;
    write(&out.join(KEY), key.serialize_pem().as_bytes(), PRIVATE)?;
    write(&out.join(CERTIFICATE), certificate.pem().as_bytes(), PUBLIC)?;
    write(&out.join(AUTHORITIES), authorities.as_bytes(), PUBLIC)?;
    Ok(true)
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, AUTHORITY_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn params(request: &Request) -> Result<CertificateParams, PkiError> {
    let subject = &request.subject;
    let parts = match subject {
        Subject::Service { kind, name } => vec![kind, name],
        Subject::Client(name) | Subject::Admin(name) => vec![name],
    };
    for name in parts {
        let is_ok = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_ok) {
            return Err(PkiError::Name { name: name.clone() });
        }
    }
    let mut params = CertificateParams::default();
    validity(&mut params, request.valid_for);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject.name());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(subject.uri())?)];
    if matches!(subject, Subject::Service { .. }) {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    for san in request.hosts() {
        params.subject_alt_names.push(host(san)?);
    }
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn host(san: String) -> Result<SanType, PkiError> {
    if let Ok(address) = san.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let is_ok = |byte: u8| byte.is_ascii_alphanumeric() || b"._-*".contains(&byte);
    if san.is_empty() || !san.bytes().all(is_ok) {
        return Err(PkiError::San { san });
    }
    Ok(SanType::DnsName(Ia5String::try_from(san)?))
}

fn validity(params: &mut CertificateParams, valid_for: Duration) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BEFORE);
    // A year beyond 9999 does not fit into a certificate.
    params.not_after = epoch + (now + valid_for).min(Duration::from_secs(250_000_000_000));
}

#[cfg(test)]
mod tests;
