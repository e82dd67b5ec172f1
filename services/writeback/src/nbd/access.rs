//! TLS of the NBD server: files, and which client may open which volume.

use std::collections::BTreeMap;
use std::path::PathBuf;

use endio_nbd::Certificate;
use serde::{Deserialize, Serialize};

/// Stands for every volume in [`NbdTls::clients`].
const EVERY_VOLUME: &str = "*";

/// STARTTLS for NBD clients. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NbdTls {
    /// Certificate chain of the server, its own first.
    pub certificate: PathBuf,
    /// Private key of the server.
    pub key: PathBuf,
    /// Authorities that sign clients; absent: clients show no certificate.
    #[serde(default)]
    pub client_authorities: Option<PathBuf>,
    /// Whether clients without TLS are refused. Without it, whoever reaches the socket opens every
    /// volume that `clients` does not restrict.
    #[serde(default = "required")]
    pub required: bool,
    /// Common name of a client's certificate, and the volumes that it may open; `*`: all. Empty:
    /// every client that gets in may open every volume.
    #[serde(default)]
    pub clients: BTreeMap<String, Vec<String>>,
}

fn required() -> bool {
    true
}

impl NbdTls {
    /// Whether a client with this certificate may open the volume.
    pub(crate) fn allows(&self, certificate: Option<&Certificate>, volume: &str) -> bool {
        if self.clients.is_empty() {
            return true;
        }
        let name = certificate.and_then(|certificate| certificate.common_name.as_deref());
        let volumes = name.and_then(|name| self.clients.get(name));
        volumes.is_some_and(|volumes| {
            volumes.iter().any(|allowed| allowed == EVERY_VOLUME || allowed == volume)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(clients: &[(&str, &[&str])]) -> NbdTls {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        NbdTls {
            certificate: "cert.pem".into(),
            key: "key.pem".into(),
            client_authorities: Some("ca.pem".into()),
            required: true,
            clients: clients.iter().map(|(who, of)| ((*who).to_owned(), names(of))).collect(),
        }
    }

    fn client(name: &str) -> Certificate {
        Certificate { common_name: Some(name.to_owned()), der: bytes::Bytes::new() }
    }

    #[test]
    fn a_client_opens_only_the_volumes_of_its_certificate() {
        let tls = tls(&[("alice", &["a", "b"]), ("backup", &["*"])]);
        assert!(tls.allows(Some(&client("alice")), "a"));
        assert!(!tls.allows(Some(&client("alice")), "c"));
        assert!(tls.allows(Some(&client("backup")), "c"));
        assert!(!tls.allows(Some(&client("mallory")), "a"));
        assert!(!tls.allows(None, "a"));
    }

    #[test]
    fn without_a_list_every_client_opens_every_volume() {
        assert!(tls(&[]).allows(None, "a"));
    }
}
