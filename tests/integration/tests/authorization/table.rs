//! The tables themselves: nothing of the contract is missing in them, and the document shows them.

use std::collections::BTreeSet;
use std::sync::Arc;

use endio_api::access::Role;
use endio_api::access::rules::{ALL, OF_BLOCK_STORE, OF_CONVERSION, OF_WRITEBACK};
use endio_chassis::net::Peer;
use endio_chassis::server::Access as _;
use prost::Message as _;
use prost_types::FileDescriptorSet;

/// `package.Service/Method` of every method of the contract in these packages.
fn contract(packages: &[&str]) -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(endio_api::DESCRIPTORS).unwrap();
    let mut methods = BTreeSet::new();
    for file in set.file.iter().filter(|file| packages.contains(&file.package())) {
        for service in &file.service {
            methods.extend(
                service.method.iter().map(|method| {
                    format!("{}.{}/{}", file.package(), service.name(), method.name())
                }),
            );
        }
    }
    methods
}

fn peer(uris: &[&str]) -> Peer {
    let names: Vec<String> = uris.iter().map(|uri| (*uri).to_owned()).collect();
    Peer::Tls { addr: None, names: Arc::from(names) }
}

#[test]
fn every_method_of_the_contract_has_one_rule_at_each_service_that_has_it() {
    let packages = [
        (OF_CONVERSION, "endio.conversion.v1"),
        (OF_BLOCK_STORE, "endio.blockstore.v1"),
        (OF_WRITEBACK, "endio.writeback.v1"),
    ];
    assert_eq!(packages.len(), ALL.len());
    for (table, package) in packages {
        let expected = contract(&[package, "endio.common.v1"]);
        assert!(expected.len() > 4, "{package}: {expected:?}");
        let named = table.rules.iter().map(|rule| rule.method.to_owned());
        let named: BTreeSet<String> = named.collect();
        assert_eq!(named, expected, "{package}");
        assert_eq!(named.len(), table.rules.len(), "{package} names a method twice");
        assert!(table.rules.iter().all(|rule| !rule.roles.is_empty()), "{package}");
    }
}

/// The tables as docs/SECURITY.md shows them: methods with the same roles in one row.
fn rendered() -> String {
    let mut text = "| service | methods | who may |\n|---|---|---|\n".to_owned();
    for table in ALL {
        let mut rows: Vec<(&str, &[Role], Vec<&str>)> = Vec::new();
        for rule in table.rules {
            let (service, method) = rule.method.split_once('/').unwrap();
            let service = service.rsplit('.').next().unwrap();
            match rows.iter_mut().find(|(of, roles, _)| (*of, *roles) == (service, rule.roles)) {
                Some((.., methods)) => methods.push(method),
                None => rows.push((service, rule.roles, vec![method])),
            }
        }
        for (service, roles, methods) in rows {
            let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
            let (methods, roles) = (methods.join(", "), roles.join(", "));
            text.push_str(&format!("| {} | `{service}`: {methods} | {roles} |\n", table.service));
        }
    }
    text
}

#[test]
fn the_document_shows_the_table_as_it_is() {
    let document = include_str!("../../../../docs/SECURITY.md");
    assert!(document.contains(&rendered()), "docs/SECURITY.md should have:\n{}", rendered());
}

#[test]
fn a_certificate_without_one_identity_asks_only_for_health_and_the_contract() {
    let nobody: [&[&str]; 4] = [
        &[],
        &["https://example.org/"],
        &["endio://service/other/n"],
        &["endio://admin/a", "endio://service/writeback/w"],
    ];
    for (table, uris) in ALL.iter().flat_map(|table| nobody.map(|uris| (table, uris))) {
        table.check("/grpc.health.v1.Health/Check", &peer(uris)).unwrap();
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        table.check(reflection, &peer(uris)).unwrap();
        for rule in table.rules {
            table.check(&format!("/{}", rule.method), &peer(uris)).unwrap_err();
        }
    }
}

#[test]
fn without_tls_there_is_no_identity_and_everything_is_allowed() {
    for peer in [Peer::Tcp(None), Peer::Unix, Peer::Memory] {
        for rule in OF_WRITEBACK.rules {
            OF_WRITEBACK.check(&format!("/{}", rule.method), &peer).unwrap();
        }
    }
}
