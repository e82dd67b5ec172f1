//! Who makes a call, and what they may do with which volume.

use endio_api::access::{Identity, Role};
use endio_api::writeback::StatusResponse;
use endio_types::Reason;
use tonic::Request;

use crate::access::{Access, access};
use crate::config::Config;
use crate::failure::Failure;

/// Longest part of a volume's name that a refusal repeats, in characters.
const NAME_SHOWN_MAX: usize = 128;

/// Whoever the table of methods let in. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// `None`: somebody who may use every volume: an admin, or anybody where there is no TLS.
    client: Option<String>,
}

impl Caller {
    /// Who sent this request.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        let identity = Identity::of_call(request);
        let client = identity.filter(|identity| identity.role == Role::Client);
        Self { client: client.map(|client| client.name) }
    }

    fn access(&self, config: &Config, volume: &str) -> Option<Access> {
        match &self.client {
            None => Some(Access::Manage),
            Some(name) => access(&config.clients, Some(name), volume),
        }
    }

    /// Whether they may know of the volume.
    pub(super) fn sees(&self, config: &Config, volume: &str) -> bool {
        self.access(config, volume).is_some()
    }

    /// Whether they may do that much with a volume. It need not exist: whoever may not use it is not
    /// told.
    ///
    /// # Errors
    /// `NOT_ALLOWED`, with who, what, and where to change it.
    pub(super) fn may(&self, config: &Config, volume: &str, needed: Access) -> Result<(), Failure> {
        let allowed = self.access(config, volume);
        if allowed >= Some(needed) {
            return Ok(());
        }
        let who = self.client.as_deref().unwrap_or_default();
        let volume: String = volume.chars().take(NAME_SHOWN_MAX).collect();
        let act = match needed {
            Access::ReadOnly => "read",
            Access::ReadWrite => "change",
            Access::Manage => "create, resize or delete",
        };
        let has = match allowed {
            None => "nothing of it is allowed",
            Some(Access::ReadOnly) => "only reading is allowed",
            Some(_) => "only reading and writing is allowed, and the rest to an admin",
        };
        let detail = format!(
            "client {who:?} may not {act} volume {volume:?}: {has} (`clients` of the writeback service)"
        );
        Err(Failure::new(Reason::NotAllowed, detail))
    }

    /// Leaves out of a status what is about volumes of which they may not know.
    pub(super) fn narrow(&self, config: &Config, status: &mut StatusResponse) {
        status.volumes.retain(|volume| self.sees(config, &volume.name));
        status.all_volumes.retain(|volume| self.sees(config, &volume.name));
        status.blocked.retain(|blocked| {
            let volume = blocked.what.strip_prefix("volume ");
            volume.is_none_or(|volume| self.sees(config, volume))
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use endio_api::conversion::Volume;
    use endio_api::writeback::{Blocked, VolumeStatus};

    use super::*;

    fn config(allowed: &[&str]) -> Config {
        let allowed = allowed.iter().map(|entry| (*entry).to_owned()).collect();
        let clients = BTreeMap::from([("alice".to_owned(), allowed)]);
        Config { clients, ..Config::default() }
    }

    fn alice() -> Caller {
        Caller { client: Some("alice".to_owned()) }
    }

    #[test]
    fn a_client_may_do_what_its_entry_says_and_nothing_more() {
        let config = config(&["a", "b@ro", "c@manage"]);
        let levels = [Access::ReadOnly, Access::ReadWrite, Access::Manage];
        let expected = [
            ("a", [true, true, false]),
            ("b", [true, false, false]),
            ("c", [true, true, true]),
            ("d", [false, false, false]),
        ];
        for (volume, expected) in expected {
            let may = levels.map(|level| alice().may(&config, volume, level).is_ok());
            assert_eq!(may, expected, "{volume}");
            assert_eq!(alice().sees(&config, volume), expected[0], "{volume}");
        }
    }

    #[test]
    fn without_a_list_every_client_uses_every_volume_and_only_admins_manage() {
        let (config, admin) = (Config::default(), Caller { client: None });
        assert!(alice().may(&config, "a", Access::ReadWrite).is_ok());
        assert!(alice().may(&config, "a", Access::Manage).is_err());
        assert!(admin.may(&config, "a", Access::Manage).is_ok());
    }

    #[test]
    fn a_refusal_names_the_client_the_volume_and_what_is_allowed() {
        let refused = alice().may(&config(&["b@ro"]), "b", Access::ReadWrite).unwrap_err();
        assert_eq!(refused.reason, Reason::NotAllowed);
        for part in ["\"alice\"", "change volume \"b\"", "only reading", "clients"] {
            assert!(refused.detail.contains(part), "{part} is missing in: {refused}");
        }
        let long = alice().may(&config(&[]), &"x".repeat(1 << 20), Access::ReadOnly).unwrap_err();
        assert!(long.detail.len() < 512, "{} bytes", long.detail.len());
    }

    #[test]
    fn a_status_tells_a_client_only_of_its_own_volumes() {
        let names = ["a", "other"];
        let status = StatusResponse {
            volumes: names.map(|name| VolumeStatus { name: name.into(), ..<_>::default() }).into(),
            all_volumes: names.map(|name| Volume { name: name.into(), ..<_>::default() }).into(),
            blocked: ["volume a", "volume other", "store 1"]
                .map(|what| Blocked { what: what.into(), ..<_>::default() })
                .into(),
            ..StatusResponse::default()
        };
        let mut narrowed = status.clone();
        alice().narrow(&config(&["a@ro"]), &mut narrowed);
        assert_eq!((narrowed.volumes.len(), narrowed.all_volumes.len()), (1, 1));
        let left: Vec<_> = narrowed.blocked.iter().map(|blocked| blocked.what.as_str()).collect();
        assert_eq!(left, ["volume a", "store 1"]);
        let mut whole = status.clone();
        Caller { client: None }.narrow(&config(&["a@ro"]), &mut whole);
        assert_eq!(whole, status);
    }
}
