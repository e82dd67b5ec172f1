//! Whether the files that are there do as well as new ones would.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage};

use crate::files::read;
use crate::{AUTHORITIES, CERTIFICATE, KEY, Request};

/// Files are replaced once less than this part of the life that is asked for is left to them.
const LIFE_LEFT_MIN: u32 = 3;

/// Whether the files in `out` are by this authority, for that subject and all its hosts, fit
/// together, and have a third of the life that is asked for before them. What cannot be read or
/// understood is not current.
pub(crate) fn is_current(out: &Path, authorities: &str, request: &Request) -> bool {
    let is_same = read(&out.join(AUTHORITIES)).is_ok_and(|found| found == authorities);
    is_same && does(out, authorities, request).unwrap_or(false)
}

fn does(out: &Path, authorities: &str, request: &Request) -> Option<bool> {
    let der = CertificateDer::from_pem_slice(read(&out.join(CERTIFICATE)).ok()?.as_bytes()).ok()?;
    let certificate = EndEntityCert::try_from(&der).ok()?;
    let key = KeyPair::from_pem(&read(&out.join(KEY)).ok()?).ok()?;
    let is_key = certificate.subject_public_key_info().as_ref() == key.subject_public_key_info();
    let is_subject = certificate.valid_uri_names().eq([request.subject.uri().as_str()]);
    let hosts = request.hosts();
    let is_every_host = hosts.iter().all(|host| names(&certificate, host));
    let authority = CertificateDer::from_pem_slice(authorities.as_bytes()).ok()?;
    let anchor = webpki::anchor_from_trusted_cert(&authority).ok()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let counts_at = |when: Duration| {
        let when = UnixTime::since_unix_epoch(when);
        let usage = KeyUsage::client_auth();
        let anchors = std::slice::from_ref(&anchor);
        let algorithms = ALL_VERIFICATION_ALGS;
        certificate.verify_for_usage(algorithms, anchors, &[], when, usage, None, None).is_ok()
    };
    // Also now: a clock that was wrong makes certificates that do not count yet.
    let counts = counts_at(now) && counts_at(now + request.valid_for / LIFE_LEFT_MIN);
    Some(is_key && is_subject && is_every_host && counts)
}

fn names(certificate: &EndEntityCert<'_>, host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(address) => {
            let name = ServerName::IpAddress(address.into());
            certificate.verify_is_valid_for_subject_name(&name).is_ok()
        }
        Err(_) => certificate.valid_dns_names().any(|name| name == host),
    }
}
