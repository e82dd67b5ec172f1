//! TLS of the NBD server: files, and which client may open which volume.

use std::collections::BTreeMap;
use std::path::PathBuf;

use endio_nbd::Client;
use serde::{Deserialize, Serialize};

use crate::access::{Access, access};

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
    /// Common name of a client's certificate, and the volumes that it may open; `*`: all. With
    /// `@ro` behind it, a volume is opened read-only. Empty: every client that gets in may open
    /// every volume.
    #[serde(default)]
    pub clients: BTreeMap<String, Vec<String>>,
}

fn required() -> bool {
    true
}

impl NbdTls {
    /// What a client may do with the volume.
    pub(crate) fn access(&self, client: &Client, volume: &str) -> Option<Access> {
        let certificate = client.certificate.as_ref();
        let name = certificate.and_then(|certificate| certificate.common_name.as_deref());
        access(&self.clients, name, volume)
    }
}
