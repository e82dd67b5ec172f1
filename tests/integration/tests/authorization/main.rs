//! Who may call what: every row of the table, with every kind of certificate, over real sockets.
#![allow(clippy::unwrap_used)]

mod outsiders;
mod secrets;
mod sessions;
mod table;
mod volumes;

use std::collections::BTreeSet;

use endio_api::access::Role;
use endio_api::access::rules;
use endio_chassis::metrics::{Form, render};
use endio_integration_tests::secured::{Secured, call_empty, is_denied};

/// What is expected, written out by hand: the service, its method, and who may call it.
const EXPECTED: &[(Role, &str, &[Role])] = {
    use Role::{Admin, BlockStore, Client, Conversion, Writeback};
    &[
        (Conversion, "endio.conversion.v1.Conversion/CreateVolume", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/GetVolume", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/ListVolumes", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/ResizeVolume", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/DeleteVolume", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/OpenVolume", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/CloseVolume", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/Lookup", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/ReadLog", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/ChangeMap", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/WritebackSession", &[Writeback]),
        (Conversion, "endio.conversion.v1.Conversion/StoreSession", &[BlockStore]),
        (Conversion, "endio.conversion.v1.Conversion/ListStores", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/ListIoEnds", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/ListExtents", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/Check", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/Describe", &[Writeback, Admin]),
        (Conversion, "endio.conversion.v1.Conversion/Backup", &[Writeback, Admin]),
        (Conversion, "endio.common.v1.Traces/ListSpans", &[Writeback, Admin]),
        (Conversion, "endio.common.v1.Traces/KeepTraces", &[Writeback, Admin]),
        (BlockStore, "endio.blockstore.v1.BlockStore/Write", &[Writeback]),
        (BlockStore, "endio.blockstore.v1.BlockStore/Read", &[Writeback]),
        (BlockStore, "endio.blockstore.v1.BlockStore/Describe", &[Writeback, Admin]),
        (BlockStore, "endio.common.v1.Traces/ListSpans", &[Writeback, Admin]),
        (BlockStore, "endio.common.v1.Traces/KeepTraces", &[Writeback, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Create", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Get", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/List", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Resize", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Delete", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Open", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Volumes/Close", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Write", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Read", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Submit", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Fsync", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/SyncAll", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Trim", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/WriteZeroes", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Io/Allocate", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Extents", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Inspect/IoEnds", &[Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Stores", &[Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Check", &[Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Trace", &[Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Status", &[Client, Admin]),
        (Writeback, "endio.writeback.v1.Inspect/Backup", &[Admin]),
        (Writeback, "endio.common.v1.Traces/ListSpans", &[Admin]),
        (Writeback, "endio.common.v1.Traces/KeepTraces", &[Admin]),
        // Every valid certificate may ask whether a service works, and for the contract.
        (Conversion, "grpc.health.v1.Health/Check", Role::ALL),
        (BlockStore, "grpc.health.v1.Health/Watch", Role::ALL),
        (Writeback, "grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Role::ALL),
        // What nobody has named is for nobody.
        (Conversion, "endio.writeback.v1.Io/Write", &[]),
        (BlockStore, "endio.conversion.v1.Conversion/StoreSession", &[]),
        (Writeback, "endio.conversion.v1.Conversion/WritebackSession", &[]),
        (Writeback, "endio.writeback.v1.Io/NoSuchMethod", &[]),
    ]
};

#[test]
fn every_row_of_the_table_has_an_expectation() {
    let expected: BTreeSet<_> = EXPECTED.iter().map(|(service, m, _)| (*service, *m)).collect();
    assert_eq!(expected.len(), EXPECTED.len(), "a row stands there twice");
    let services = [Role::Conversion, Role::BlockStore, Role::Writeback];
    for (service, table) in services.into_iter().zip(rules::ALL) {
        assert_eq!(service.name(), table.service);
        for rule in table.rules {
            assert!(expected.contains(&(service, rule.method)), "{service}: {}", rule.method);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_certificate_may_call_what_its_role_may_and_nothing_else() {
    // What a client may do with which volume is another matter.
    let everything = ("somebody".to_owned(), vec!["*@manage".to_owned()]);
    let secured = Secured::start(|config| config.clients = [everything].into()).await;
    let mut wrong = Vec::new();
    for service in [Role::Conversion, Role::BlockStore, Role::Writeback] {
        for caller in Role::ALL {
            let channel = secured.channel(service, *caller, "somebody");
            for (_, method, roles) in EXPECTED.iter().filter(|(of, ..)| *of == service) {
                let outcome = call_empty(&channel, method).await;
                if is_denied(&outcome) == roles.contains(caller) {
                    wrong.push(format!("{caller} → {service} {method}: {outcome:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    secured.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_tells_who_asked_for_what_and_who_may() {
    let secured = Secured::start(|_| {}).await;
    let channel = secured.channel(Role::Conversion, Role::Client, "alice");
    let session = "endio.conversion.v1.Conversion/StoreSession";
    let refused = call_empty(&channel, session).await.unwrap_err();
    for part in ["client \"alice\"", session, "block-store"] {
        assert!(refused.message().contains(part), "{part} is missing in: {}", refused.message());
    }
    let metrics = render(Form::Prometheus);
    let counted = metrics.lines().find_map(|line| line.strip_prefix("endio_calls_denied_total "));
    assert!(counted.is_some_and(|count| count != "0"), "{counted:?}");
    secured.stop().await;
}
