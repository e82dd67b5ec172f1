//! Which roles may call which methods: one table for each service, and nothing else decides it.
//!
//! A method that no row names may be called by nobody. What a client may do with *which* volume is
//! decided behind this, by the writeback service's list of clients.
//!
//! Health and reflection are open to every valid certificate: whoever supervises a service has to
//! ask whether it works, and they tell nothing but that and the published contract.

use endio_chassis::net::Peer;
use endio_chassis::server::Access;
use endio_types::Reason;
use tonic::Status;

use super::{Identity, Role};

/// Who may call one method.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// `package.Service/Method`.
    pub method: &'static str,
    /// The roles that may.
    pub roles: &'static [Role],
}

/// The rules of one service.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// The service's kind.
    pub service: &'static str,
    /// One for each method that it serves, but for health and reflection.
    pub rules: &'static [Rule],
}

const fn rule(method: &'static str, roles: &'static [Role]) -> Rule {
    Rule { method, roles }
}

/// The write path, and what changes volumes: never around a writeback, which may have data of theirs.
const WRITEBACK: &[Role] = &[Role::Writeback];
const BLOCK_STORE: &[Role] = &[Role::BlockStore];
/// Questions that change nothing.
const WRITEBACK_ADMIN: &[Role] = &[Role::Writeback, Role::Admin];
/// What clients do with their volumes; the list of clients says which these are.
const CLIENT_ADMIN: &[Role] = &[Role::Client, Role::Admin];
/// What concerns all volumes, or the whole system.
const ADMIN: &[Role] = &[Role::Admin];

/// What conversion answers.
pub const OF_CONVERSION: Table = Table {
    service: "conversion",
    rules: &[
        rule("endio.conversion.v1.Conversion/CreateVolume", WRITEBACK),
        rule("endio.conversion.v1.Conversion/GetVolume", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/ListVolumes", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/ResizeVolume", WRITEBACK),
        rule("endio.conversion.v1.Conversion/DeleteVolume", WRITEBACK),
        rule("endio.conversion.v1.Conversion/OpenVolume", WRITEBACK),
        rule("endio.conversion.v1.Conversion/CloseVolume", WRITEBACK),
        rule("endio.conversion.v1.Conversion/Lookup", WRITEBACK),
        rule("endio.conversion.v1.Conversion/ReadLog", WRITEBACK),
        rule("endio.conversion.v1.Conversion/ChangeMap", WRITEBACK),
        rule("endio.conversion.v1.Conversion/WritebackSession", WRITEBACK),
        rule("endio.conversion.v1.Conversion/StoreSession", BLOCK_STORE),
        rule("endio.conversion.v1.Conversion/ListStores", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/ListIoEnds", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/ListExtents", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/Check", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/Describe", WRITEBACK_ADMIN),
        rule("endio.conversion.v1.Conversion/Backup", WRITEBACK_ADMIN),
        rule("endio.common.v1.Traces/ListSpans", WRITEBACK_ADMIN),
        rule("endio.common.v1.Traces/KeepTraces", WRITEBACK_ADMIN),
    ],
};

/// What a block-store answers.
pub const OF_BLOCK_STORE: Table = Table {
    service: "block-store",
    rules: &[
        rule("endio.blockstore.v1.BlockStore/Write", WRITEBACK),
        rule("endio.blockstore.v1.BlockStore/Read", WRITEBACK),
        rule("endio.blockstore.v1.BlockStore/Describe", WRITEBACK_ADMIN),
        rule("endio.common.v1.Traces/ListSpans", WRITEBACK_ADMIN),
        rule("endio.common.v1.Traces/KeepTraces", WRITEBACK_ADMIN),
    ],
};

/// What a writeback answers.
pub const OF_WRITEBACK: Table = Table {
    service: "writeback",
    rules: &[
        rule("endio.writeback.v1.Volumes/Create", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/Get", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/List", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/Resize", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/Delete", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/Open", CLIENT_ADMIN),
        rule("endio.writeback.v1.Volumes/Close", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Write", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Read", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Submit", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Fsync", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/SyncAll", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Trim", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/WriteZeroes", CLIENT_ADMIN),
        rule("endio.writeback.v1.Io/Allocate", CLIENT_ADMIN),
        rule("endio.writeback.v1.Inspect/Extents", CLIENT_ADMIN),
        rule("endio.writeback.v1.Inspect/IoEnds", ADMIN),
        rule("endio.writeback.v1.Inspect/Stores", ADMIN),
        rule("endio.writeback.v1.Inspect/Check", ADMIN),
        rule("endio.writeback.v1.Inspect/Trace", ADMIN),
        rule("endio.writeback.v1.Inspect/Status", CLIENT_ADMIN),
        rule("endio.writeback.v1.Inspect/Backup", ADMIN),
        rule("endio.common.v1.Traces/ListSpans", ADMIN),
        rule("endio.common.v1.Traces/KeepTraces", ADMIN),
    ],
};

/// The tables of all services.
pub const ALL: &[Table] = &[OF_CONVERSION, OF_BLOCK_STORE, OF_WRITEBACK];

/// How the paths begin that every valid certificate may call.
const OPEN: &[&str] = &["/grpc.health.v1.Health/", "/grpc.reflection."];

impl Table {
    /// Who may call the method of this path; `None`: no row names it.
    #[must_use]
    pub fn roles(&self, path: &str) -> Option<&'static [Role]> {
        let method = path.strip_prefix('/')?;
        self.rules.iter().find(|rule| rule.method == method).map(|rule| rule.roles)
    }
}

impl Access for Table {
    fn check(&self, path: &str, peer: &Peer) -> Result<(), Status> {
        // Without TLS nobody has an identity; that was an explicit choice, and it was logged.
        let Peer::Tls { names, .. } = peer else { return Ok(()) };
        if OPEN.iter().any(|open| path.starts_with(open)) {
            return Ok(());
        }
        let caller = Identity::of(names);
        let roles = self.roles(path);
        let role = caller.as_ref().map(|caller| caller.role);
        if role.is_some_and(|role| roles.is_some_and(|roles| roles.contains(&role))) {
            return Ok(());
        }
        let who = caller.map_or_else(
            || "a certificate without one endio:// identity".to_owned(),
            |caller| caller.to_string(),
        );
        let whose = match roles {
            Some(roles) => {
                let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
                format!("that is for a certificate of {}", names.join(" or "))
            }
            None => "no rule allows it to anybody".to_owned(),
        };
        let method = path.trim_start_matches('/');
        let message =
            format!("{who} may not call {method} of the {} service: {whose}", self.service);
        Err(crate::status::status(Reason::NotAllowed, message))
    }
}
