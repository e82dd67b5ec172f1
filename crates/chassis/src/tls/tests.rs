#![allow(clippy::unwrap_used)]

use std::time::Duration;

use endio_pki::{Request, Subject};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::server::{Readiness, ServerConfig, ServerCounters, ServerOptions, serve};
use crate::shutdown::Shutdown;

/// Bound of waits that end by themselves unless something is broken.
const LONG: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
const QUICK: Duration = Duration::from_millis(10);

/// An authority and the directories that it made.
struct Authority(TempDir);

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        endio_pki::init(dir.path(), DAY, false).unwrap();
        Self(dir)
    }

    fn issue(&self, subject: Subject, valid_for: Duration) -> PathBuf {
        let out = self.0.path().join(subject.directory());
        let request = Request { subject, sans: Vec::new(), valid_for, if_missing: false };
        endio_pki::issue(self.0.path(), &out, &request).unwrap();
        out
    }

    fn service(&self, kind: &str) -> PathBuf {
        self.issue(Subject::Service { kind: kind.into(), name: "s".into() }, DAY)
    }

    fn client(&self) -> PathBuf {
        self.issue(Subject::Client("alice".into()), DAY)
    }
}

/// A server that answers health checks.
struct Fixture {
    url: String,
    counters: ServerCounters,
    shutdown: Shutdown,
    server: JoinHandle<()>,
}

impl Fixture {
    async fn start(tls: Option<Tls>, config: ServerConfig) -> Self {
        let listener = Listener::bind(&ListenAddr::loopback()).await.unwrap();
        let listener = match tls {
            Some(tls) => listener.secured(tls),
            None => listener,
        };
        let url = listener.url().to_owned();
        let (shutdown, counters) = (Shutdown::new(), ServerCounters::default());
        let options =
            ServerOptions { config, counters: counters.clone(), ..ServerOptions::default() };
        let readiness = Readiness::new(&[]).await;
        let served = serve(options, listener, Routes::default(), readiness, shutdown.clone());
        let server = tokio::spawn(async move { served.await.unwrap() });
        Self { url, counters, shutdown, server }
    }

    fn address(&self) -> &str {
        self.url.split_once("://").unwrap().1
    }

    async fn stop(self) {
        self.shutdown.request();
        self.server.await.unwrap();
    }
}

fn dialer(dir: &Path) -> Dialer {
    Dialer::default().secured(Tls::load(dir).unwrap())
}

/// One call on a connection of its own.
async fn call(dialer: &Dialer, url: &str) -> Result<(), tonic::Status> {
    let mut client = HealthClient::new(dialer.channel(url).unwrap());
    let check = client.check(HealthCheckRequest::default());
    tokio::time::timeout(LONG, check).await.unwrap().map(drop)
}

/// Waits for something that happens elsewhere.
async fn until(mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(QUICK).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.unwrap();
}

#[tokio::test]
async fn only_certificates_of_the_authority_get_in() {
    let (ours, other) = (Authority::new(), Authority::new());
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let fixture = Fixture::start(Some(tls), ServerConfig::default()).await;
    assert!(fixture.url.starts_with("https://"), "{}", fixture.url);
    call(&dialer(&ours.client()), &fixture.url).await.unwrap();
    // It believes the server, and the server does not believe it.
    let stranger = other.client();
    std::fs::copy(ours.0.path().join("ca.pem"), stranger.join("ca.pem")).unwrap();
    call(&dialer(&stranger), &fixture.url).await.unwrap_err();
    assert_eq!(fixture.counters.conns.handshakes_failed.value(), 1);
    // It does not believe the server.
    call(&dialer(&other.client()), &fixture.url).await.unwrap_err();
    until(|| fixture.counters.conns.handshakes_failed.value() == 2).await;
    call(&dialer(&ours.client()), &fixture.url).await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_refused() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let fixture = Fixture::start(Some(tls), ServerConfig::default()).await;
    // Everything as it should be, but for the certificate.
    let whole = Tls::load(&ours.client()).unwrap().client();
    let roots = {
        use tokio_rustls::rustls::RootCertStore;
        use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject as _};
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(ours.0.path().join("ca.pem")).unwrap();
        roots.add(ca).unwrap();
        roots
    };
    let provider = Arc::clone(whole.crypto_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(fixture.address()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = "127.0.0.1".try_into().unwrap();
    // The client's part of the handshake of TLS 1.3 ends before the server has judged it.
    let refused = async {
        let mut stream = connector.connect(name, stream).await?;
        stream.read(&mut [0]).await
    };
    refused.await.unwrap_err();
    until(|| fixture.counters.conns.handshakes_failed.value() == 1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_either_side() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let fixture = Fixture::start(Some(tls), ServerConfig::default()).await;
    let expired = ours.issue(Subject::Client("late".into()), Duration::ZERO);
    let late = dialer(&expired);
    // It counts to the end of the second in which it was made.
    let refused = async { while call(&late, &fixture.url).await.is_ok() {} };
    tokio::time::timeout(LONG, refused).await.unwrap();
    call(&dialer(&ours.client()), &fixture.url).await.unwrap();
    fixture.stop().await;

    let service = Subject::Service { kind: "writeback".into(), name: "late".into() };
    let tls = Tls::load(&ours.issue(service, Duration::ZERO)).unwrap();
    let fixture = Fixture::start(Some(tls), ServerConfig::default()).await;
    let client = dialer(&ours.client());
    let refused = async { while call(&client, &fixture.url).await.is_ok() {} };
    tokio::time::timeout(LONG, refused).await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn plain_text_to_a_tls_port_and_tls_to_a_plain_port_end_in_errors() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let secured = Fixture::start(Some(tls), ServerConfig::default()).await;
    let plain_url = secured.url.replace("https://", "http://");
    call(&Dialer::default(), &plain_url).await.unwrap_err();
    until(|| secured.counters.conns.handshakes_failed.value() > 0).await;
    secured.stop().await;

    let plain = Fixture::start(None, ServerConfig::default()).await;
    let url = plain.url.replace("http://", "https://");
    call(&dialer(&ours.client()), &url).await.unwrap_err();
    call(&Dialer::default(), &plain.url).await.unwrap();
    plain.stop().await;
}

#[tokio::test]
async fn a_url_that_does_not_fit_the_dialer_is_refused_before_anything_is_sent() {
    let ours = Authority::new();
    let secured = dialer(&ours.client());
    for url in ["http://127.0.0.1:1", "unix:/a"] {
        assert!(matches!(secured.channel(url), Err(NetError::Plain { .. })), "{url}");
    }
    let plain = Dialer::default().channel("https://127.0.0.1:1");
    assert!(matches!(plain, Err(NetError::NoCertificate { .. })));
    secured.channel("memory:a").unwrap();
    secured.channel("https://[::1]:1").unwrap();
}

#[tokio::test]
async fn a_peer_that_is_not_what_is_expected_is_not_talked_to() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("block-store")).unwrap();
    let fixture = Fixture::start(Some(tls), ServerConfig::default()).await;
    let dialer = dialer(&ours.client());
    call(&dialer.expecting("endio://service/block-store/"), &fixture.url).await.unwrap();
    let wrong = dialer.expecting("endio://service/conversion/");
    let error = call(&wrong, &fixture.url).await.unwrap_err();
    assert!(crate::net::is_connection_lost(&error), "{error:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn certificates_are_replaced_under_load_without_an_error() {
    let ours = Authority::new();
    let service = ours.service("writeback");
    let tls = Tls::load(&service).unwrap();
    tls.reload(QUICK);
    let fixture = Fixture::start(Some(tls.clone()), ServerConfig::default()).await;
    let client_dir = ours.client();
    let client_tls = Tls::load(&client_dir).unwrap();
    client_tls.reload(QUICK);
    let dialer = Dialer::default().secured(client_tls.clone());
    let mut standing = HealthClient::new(dialer.channel(&fixture.url).unwrap());
    standing.check(HealthCheckRequest::default()).await.unwrap();
    for _ in 0..3 {
        let (before, client_before) = (tls.server(), client_tls.client());
        ours.service("writeback");
        ours.client();
        // New connections all the time, and one that stands.
        let replaced = || {
            !Arc::ptr_eq(&before, &tls.server())
                && !Arc::ptr_eq(&client_before, &client_tls.client())
        };
        let load = async {
            while !replaced() {
                call(&dialer, &fixture.url).await.unwrap();
                standing.check(HealthCheckRequest::default()).await.unwrap();
            }
        };
        tokio::time::timeout(LONG, load).await.unwrap();
        call(&dialer, &fixture.url).await.unwrap();
    }
    fixture.stop().await;
}

#[tokio::test]
async fn files_that_make_no_sense_leave_the_old_ones_in_use() {
    let (ours, other) = (Authority::new(), Authority::new());
    let service = ours.service("writeback");
    let tls = Tls::load(&service).unwrap();
    let before = tls.server();
    let looked = |dir: PathBuf| async move {
        // As the task does it: read, and take over what makes sense.
        Files::read(&dir).and_then(|files| Material::new(files, &dir))
    };
    let strange_key = std::fs::read(other.service("writeback").join("key.pem")).unwrap();
    for (file, bytes) in [
        ("cert.pem", b"garbage".to_vec()),
        ("key.pem", strange_key),
        ("ca.pem", Vec::new()),
        ("cert.pem", vec![0; 2 << 20]),
    ] {
        let good = std::fs::read(service.join(file)).unwrap();
        std::fs::write(service.join(file), bytes).unwrap();
        let error = looked(service.clone()).await.err().expect(file);
        assert!(!error.to_string().contains("PRIVATE"), "{error}");
        std::fs::write(service.join(file), good).unwrap();
    }
    // The task itself, from garbage to a new certificate: what is in use changes once.
    tls.reload(QUICK);
    std::fs::write(service.join("cert.pem"), "garbage").unwrap();
    let fixture = Fixture::start(Some(tls.clone()), ServerConfig::default()).await;
    for _ in 0..5 {
        call(&dialer(&ours.client()), &fixture.url).await.unwrap();
        tokio::time::sleep(QUICK).await;
    }
    assert!(Arc::ptr_eq(&before, &tls.server()));
    ours.service("writeback");
    until(|| !Arc::ptr_eq(&before, &tls.server())).await;
    call(&dialer(&ours.client()), &fixture.url).await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_cut_and_holds_up_nobody() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let config = ServerConfig { handshake_timeout_ms: 200, ..ServerConfig::default() };
    let fixture = Fixture::start(Some(tls), config).await;
    let mut silent = TcpStream::connect(fixture.address()).await.unwrap();
    // The first bytes of a hello whose rest never comes.
    silent.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00]).await.unwrap();
    call(&dialer(&ours.client()), &fixture.url).await.unwrap();
    let read = tokio::time::timeout(LONG, silent.read(&mut [0])).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    until(|| fixture.counters.conns.handshakes_failed.value() == 1).await;
    fixture.stop().await;
}

#[tokio::test]
async fn a_flood_of_connections_is_bounded_and_places_come_back() {
    let ours = Authority::new();
    let tls = Tls::load(&ours.service("writeback")).unwrap();
    let config = ServerConfig { connections_per_address_max: 4, ..ServerConfig::default() };
    let fixture = Fixture::start(Some(tls), config).await;
    let mut flood = Vec::new();
    for _ in 0..4 {
        flood.push(TcpStream::connect(fixture.address()).await.unwrap());
    }
    // The fifth is accepted by the system and closed by the server.
    let mut fifth = TcpStream::connect(fixture.address()).await.unwrap();
    let read = tokio::time::timeout(LONG, fifth.read(&mut [0])).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    assert_eq!(fixture.counters.conns.refused.value(), 1);
    drop(flood);
    let client = dialer(&ours.client());
    let served = async { while call(&client, &fixture.url).await.is_err() {} };
    tokio::time::timeout(LONG, served).await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn without_tls_only_loopback_is_taken_unless_it_is_asked_for() {
    let insecure = |any| {
        let config =
            TlsConfig { insecure: true, insecure_any_address: any, ..TlsConfig::default() };
        Security::open(&config).unwrap()
    };
    assert!(matches!(Security::open(&TlsConfig::default()), Err(TlsError::Undecided)));
    let any: ListenAddr = "0.0.0.0:0".parse().unwrap();
    for local in ["127.0.0.1:0", "localhost:0", "memory:insecure"] {
        insecure(false).bind(&local.parse().unwrap()).await.unwrap();
    }
    let refused = insecure(false).bind(&any).await.unwrap_err();
    assert!(matches!(refused, TlsError::NotLoopback { .. }), "{refused}");
    insecure(true).bind(&any).await.unwrap();

    let ours = Authority::new();
    let dir = Some(ours.service("writeback"));
    let secured = Security::open(&TlsConfig { dir, ..TlsConfig::default() }).unwrap();
    secured.bind(&any).await.unwrap();
    let path = ours.0.path().join("socket");
    let unix = secured.bind(&ListenAddr::Unix(path)).await.unwrap_err();
    assert!(matches!(unix, TlsError::NotTcp { .. }), "{unix}");
}

#[test]
fn no_key_is_in_anything_that_can_be_printed() {
    let ours = Authority::new();
    let dir = ours.client();
    let tls = Tls::load(&dir).unwrap();
    let key = std::fs::read_to_string(dir.join("key.pem")).unwrap();
    let line = key.lines().nth(1).unwrap();
    let config = TlsConfig { dir: Some(dir), ..TlsConfig::default() };
    let dialer = Dialer::default().secured(tls.clone());
    for printed in [
        format!("{tls:?}"),
        format!("{dialer:?}"),
        format!("{config:?}"),
        crate::config::effective(&config),
    ] {
        assert!(!printed.contains(line), "{printed}");
    }
}

#[test]
fn a_directory_and_insecure_together_are_a_fault() {
    let both = TlsConfig { dir: Some("d".into()), insecure: true, ..TlsConfig::default() };
    assert_eq!(both.faults().len(), 1);
    let hot = TlsConfig { reload_every_ms: 0, ..TlsConfig::default() };
    assert_eq!(hot.faults().len(), 1);
    assert!(TlsConfig::default().faults().is_empty());
}
