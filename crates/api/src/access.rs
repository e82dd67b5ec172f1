//! Who somebody is by their certificate, and who may call what.
//!
//! An identity is one URI among the alternative names of a certificate:
//! `endio://service/KIND/NAME`, `endio://client/NAME` or `endio://admin/NAME`. The rules in
//! [`rules`] name the roles that may call each method; whoever is not named may not.

pub mod rules;

use std::fmt;

use endio_chassis::net::Peer;

/// How the identity of every service begins.
pub const SERVICE: &str = "endio://service/";
/// How the identity of a conversion service begins.
pub const CONVERSION: &str = "endio://service/conversion/";
/// How the identity of a block-store begins.
pub const BLOCK_STORE: &str = "endio://service/block-store/";
/// How the identity of a writeback begins.
pub const WRITEBACK: &str = "endio://service/writeback/";
/// How the identity of a client begins.
pub const CLIENT: &str = "endio://client/";
/// How the identity of an operator begins.
pub const ADMIN: &str = "endio://admin/";

/// What kind of caller a certificate stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A conversion service.
    Conversion,
    /// A block-store.
    BlockStore,
    /// A writeback.
    Writeback,
    /// A client of volumes.
    Client,
    /// An operator.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: &[Self] =
        &[Self::Conversion, Self::BlockStore, Self::Writeback, Self::Client, Self::Admin];

    /// Its name, as messages and documents have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Conversion => "conversion",
            Self::BlockStore => "block-store",
            Self::Writeback => "writeback",
            Self::Client => "client",
            Self::Admin => "admin",
        }
    }

    /// How the URIs of this role begin.
    #[must_use]
    pub fn uri_prefix(self) -> &'static str {
        match self {
            Self::Conversion => CONVERSION,
            Self::BlockStore => BLOCK_STORE,
            Self::Writeback => WRITEBACK,
            Self::Client => CLIENT,
            Self::Admin => ADMIN,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whom a certificate stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its kind.
    pub role: Role,
    /// Its name among those of its kind; not empty, without `/`.
    pub name: String,
}

impl Identity {
    /// The identity in the URIs of one certificate. `None`: there is none, or more than one, so that
    /// nobody is two people at once.
    #[must_use]
    pub fn of(uris: &[String]) -> Option<Self> {
        let mut found = uris.iter().filter(|uri| uri.starts_with("endio://"));
        let uri = found.next()?;
        if found.next().is_some() {
            return None;
        }
        Role::ALL.iter().find_map(|role| {
            let name = uri.strip_prefix(role.uri_prefix())?;
            let is_name = !name.is_empty() && !name.contains('/');
            is_name.then(|| Self { role: *role, name: name.to_owned() })
        })
    }

    /// The identity behind a call, from the extensions of its request. `None`: nobody asked for
    /// one (no TLS), or the certificate has none.
    #[must_use]
    pub fn of_call<T>(request: &tonic::Request<T>) -> Option<Self> {
        match request.extensions().get::<Peer>() {
            Some(Peer::Tls { names, .. }) => Self::of(names),
            _ => None,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.role, self.name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(uris: &[&str]) -> Option<Identity> {
        Identity::of(&uris.iter().map(|uri| (*uri).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn each_kind_of_uri_is_one_role() {
        let expected = [
            ("endio://service/conversion/n", Role::Conversion),
            ("endio://service/block-store/n", Role::BlockStore),
            ("endio://service/writeback/n", Role::Writeback),
            ("endio://client/n", Role::Client),
            ("endio://admin/n", Role::Admin),
        ];
        for (uri, role) in expected {
            assert_eq!(of(&[uri]), Some(Identity { role, name: "n".to_owned() }), "{uri}");
            assert_eq!(of(&["https://elsewhere/", uri]), of(&[uri]), "{uri}");
        }
    }

    #[test]
    fn a_certificate_without_one_plain_identity_is_nobody() {
        let nobody: [&[&str]; 8] = [
            &[],
            &["https://admin/me"],
            &["endio://admin/"],
            &["endio://admin/a/b"],
            &["endio://service/conversion"],
            &["endio://service/other/n"],
            &["endio://root/n"],
            &["endio://client/a", "endio://admin/a"],
        ];
        for uris in nobody {
            assert_eq!(of(uris), None, "{uris:?}");
        }
    }
}
