#![allow(clippy::unwrap_used)]
use std::fs;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use super::*;

/// A certificate of its own authority for `localhost`, written over what is there.
fn issue(files: &TlsFiles) -> CertificateDer<'static> {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(&files.certificate, cert.pem()).unwrap();
    fs::write(&files.key, signing_key.serialize_pem()).unwrap();
    cert.der().clone()
}

/// Whether a client that trusts only this certificate gets through.
async fn is_shown(tls: &Tls, trusted: &CertificateDer<'static>) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (client, server) = tokio::io::duplex(1 << 16);
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    let (shown, _) = tokio::join!(connector.connect(name, client), tls.accept(Box::new(server)));
    shown.is_ok()
}

#[tokio::test(start_paused = true)]
async fn certificates_that_are_replaced_count_from_the_next_handshake_on() {
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificate: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
        client_authorities: None,
    };
    let first = issue(&files);
    let tls = Tls::load(&files, true).unwrap();
    assert!(is_shown(&tls, &first).await);
    // Half of the new pair is there: the old one goes on.
    let key = fs::read(&files.key).unwrap();
    let second = issue(&files);
    let new_key = fs::read(&files.key).unwrap();
    fs::write(&files.key, [&key[..], b"\n"].concat()).unwrap();
    tokio::time::advance(LOOK_EVERY).await;
    assert!(is_shown(&tls, &first).await);
    fs::write(&files.key, [&new_key[..], b"\n\n"].concat()).unwrap();
    assert!(is_shown(&tls, &first).await, "not yet");
    tokio::time::advance(LOOK_EVERY).await;
    assert!(is_shown(&tls, &second).await && !is_shown(&tls, &first).await);
}
