//! Clients that people use, from Debian packages: see tests/clients/install.sh. What is not
//! installed is said and skipped.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use async_trait::async_trait;
use endio_nbd::memory::{FixedExports, MemoryExport};
use endio_nbd::tls::{Tls, TlsFiles, common_name};
use endio_nbd::{
    Client, Export, ExportInfo, Exports, Limits, Listed, NbdAddr, NbdListener, OpenError, Purpose,
    Server,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

fn disk(name: &str) -> Arc<dyn Export> {
    let mut info = ExportInfo::new(name, 64 << 20);
    info.can_multi_conn = true;
    Arc::new(MemoryExport::new(info, 1 << 30))
}

/// Serves until it is dropped along with the runtime.
async fn listen(server: &Server) -> String {
    let listener = NbdListener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let NbdAddr::Tcp(address) = listener.address().clone() else { panic!("not TCP") };
    tokio::spawn(listener.serve(server.clone()));
    address.to_string()
}

async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn is_installed(tool: &str) -> bool {
    let found = Path::new("/usr/bin").join(tool).exists();
    if !found {
        println!("skip: {tool} is not installed (tests/clients/install.sh)");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_that_people_use_work_with_a_memory_export() {
    let server = Server::new(Arc::new(FixedExports::new([disk("disk")])), Limits::default());
    let address = listen(&server).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/clients/run.sh");
    let mut command = Command::new(script);
    command.args([&address, "disk", "memory:state"]);
    let output = run(command).await;
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Each client may open the export of its own name.
struct Own;

#[async_trait]
impl Exports for Own {
    async fn open(
        &self,
        name: &str,
        client: &Client,
        _purpose: Purpose,
    ) -> Result<Arc<dyn Export>, OpenError> {
        let who = client.certificate.as_ref().and_then(|own| own.common_name.as_deref());
        if who != Some(name) {
            return Err(OpenError::Denied("this is another client's".to_owned()));
        }
        Ok(disk(name))
    }

    async fn list(&self, client: &Client) -> Result<Vec<Listed>, OpenError> {
        let who = client.certificate.as_ref().and_then(|own| own.common_name.clone());
        let listed = |name| Listed { name, description: String::new() };
        Ok(who.map(listed).into_iter().collect())
    }
}

/// An authority with a server's certificate, and directories of clients as libnbd wants them.
struct Authority {
    dir: tempfile::TempDir,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { dir: tempfile::tempdir().unwrap(), certificate, issuer }
    }

    /// Writes ca-cert.pem, WHAT-cert.pem and WHAT-key.pem into a directory of this name.
    fn issue(&self, what: &str, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "tests");
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        assert_eq!(common_name(certificate.der()).as_deref(), Some(name));
        std::fs::write(dir.join("ca-cert.pem"), &self.certificate).unwrap();
        std::fs::write(dir.join(format!("{what}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{what}-key.pem")), key.serialize_pem()).unwrap();
        dir
    }

    fn server(&self, is_required: bool, with_clients: bool) -> Tls {
        let dir = self.dir.path().join("localhost");
        let dir = if dir.exists() { dir } else { self.issue("server", "localhost") };
        let files = TlsFiles {
            certificate: dir.join("server-cert.pem"),
            key: dir.join("server-key.pem"),
            client_authorities: with_clients.then(|| dir.join("ca-cert.pem")),
        };
        Tls::load(&files, is_required).unwrap()
    }
}

async fn nbdinfo(uri: String) -> Output {
    let mut command = Command::new("/usr/bin/nbdinfo");
    command.arg(uri);
    run(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_a_client_opens_what_its_certificate_is_for() {
    if !is_installed("nbdinfo") {
        return;
    }
    let authority = Authority::new();
    let server = Server::new(Arc::new(Own), Limits::default());
    let server = server.with_tls(authority.server(true, true));
    let address = listen(&server).await;
    let port = address.rsplit(':').next().unwrap();
    let alice = authority.issue("client", "alice");
    let of = |scheme: &str, export: &str, certificates: Option<&Path>| {
        let query = certificates.map(|dir| format!("?tls-certificates={}", dir.display()));
        nbdinfo(format!("{scheme}://localhost:{port}/{export}{}", query.unwrap_or_default()))
    };
    let own = of("nbds", "alice", Some(&alice)).await;
    assert!(own.status.success(), "{}", String::from_utf8_lossy(&own.stderr));
    assert!(String::from_utf8_lossy(&own.stdout).contains("with TLS"));
    assert!(!of("nbds", "bob", Some(&alice)).await.status.success());
    // Without TLS, and with TLS but without a certificate of the authority.
    assert!(!of("nbd", "alice", None).await.status.success());
    let other = Authority::new();
    let stranger = other.issue("client", "alice");
    std::fs::copy(alice.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    assert!(!of("nbds", "alice", Some(&stranger)).await.status.success());
    std::fs::remove_file(alice.join("client-cert.pem")).unwrap();
    std::fs::remove_file(alice.join("client-key.pem")).unwrap();
    let nameless = of("nbds", "alice", Some(&alice)).await;
    assert!(!nameless.status.success(), "{nameless:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_tls_is_optional_both_kinds_of_clients_are_served() {
    if !is_installed("nbdinfo") {
        return;
    }
    let authority = Authority::new();
    let server = Server::new(Arc::new(FixedExports::new([disk("disk")])), Limits::default());
    let server = server.with_tls(authority.server(false, false));
    let address = listen(&server).await;
    let port = address.rsplit(':').next().unwrap();
    let dir = authority.issue("client", "somebody");
    let clear = nbdinfo(format!("nbd://localhost:{port}/disk")).await;
    assert!(String::from_utf8_lossy(&clear.stdout).contains("without TLS"));
    let secret =
        nbdinfo(format!("nbds://localhost:{port}/disk?tls-certificates={}", dir.display())).await;
    assert!(String::from_utf8_lossy(&secret.stdout).contains("with TLS"), "{secret:?}");
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cert.pem");
    let files = TlsFiles {
        certificate: path.clone(),
        key: dir.path().join("key.pem"),
        client_authorities: None,
    };
    let told = |files: &TlsFiles| Tls::load(files, true).err().unwrap().to_string();
    assert!(told(&files).contains("cert.pem"));
    std::fs::write(&path, "nothing").unwrap();
    assert!(told(&files).contains("cert.pem"));
    assert_eq!(common_name(b"\x30\x03\x30\x01\x02"), None);
}
