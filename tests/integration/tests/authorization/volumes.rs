//! Which volumes a client's certificate opens over gRPC: every method that names a volume, with each
//! kind of entry.

use std::collections::BTreeMap;

use endio_api::access::Role;
use endio_api::common::Reason;
use endio_api::conversion::{CreateVolumeRequest, ListVolumesRequest};
use endio_api::writeback::inspect_client::InspectClient;
use endio_api::writeback::io_client::IoClient;
use endio_api::writeback::io_request::Op;
use endio_api::writeback::volumes_client::VolumesClient;
use endio_api::writeback::{
    DeleteRequest, ExtentsRequest, FsyncRequest, IoRequest, OpenRequest, RangeRequest, ReadRequest,
    ResizeRequest, StatusRequest, SyncAllRequest, VolumeRequest, WriteRequest,
};
use endio_integration_tests::secured::{Secured, is_denied};
use tonic::Status;
use tonic::transport::Channel;

const MIB: u64 = 1 << 20;

const READ: &[&str] = &["get", "read", "fsync", "extents", "submit read", "submit fsync"];
const CHANGE: &[&str] =
    &["open", "close", "write", "trim", "write zeroes", "allocate", "submit write", "submit trim"];
const MANAGE: &[&str] = &["create", "resize", "delete"];

/// Who may do what, written out by hand.
const EXPECTED: &[(Role, &str, &str, &[&[&str]])] = &[
    (Role::Client, "alice", "a", &[READ, CHANGE]),
    (Role::Client, "alice", "b", &[READ]),
    (Role::Client, "alice", "c", &[]),
    (Role::Client, "bob", "a", &[READ]),
    (Role::Client, "bob", "c", &[READ, CHANGE, MANAGE]),
    // Not in the list.
    (Role::Client, "carol", "a", &[]),
    (Role::Admin, "alice", "c", &[READ, CHANGE, MANAGE]),
];

async fn secured() -> Secured {
    let entries = |entries: &[&str]| entries.iter().map(|entry| (*entry).to_owned()).collect();
    Secured::start(|config| {
        config.clients = BTreeMap::from([
            ("alice".to_owned(), entries(&["a", "b@ro"])),
            ("bob".to_owned(), entries(&["*@ro", "c@manage"])),
        ]);
    })
    .await
}

async fn create(channel: &Channel, name: &str) -> Result<(), Status> {
    let request = CreateVolumeRequest { name: name.to_owned(), size_bytes: MIB, ..<_>::default() };
    VolumesClient::new(channel.clone()).create(request).await.map(drop)
}

/// One request over a Submit stream of its own.
async fn submit(channel: &Channel, op: Op) -> Result<(), Status> {
    let requests = tokio_stream::once(IoRequest { cookie: 1, op: Some(op) });
    let mut answers = IoClient::new(channel.clone()).submit(requests).await?.into_inner();
    let done = answers.message().await?.expect("a completion");
    match endio_types::Reason::from_wire(done.reason) {
        None => Ok(()),
        Some(reason) => Err(endio_api::status::status(reason, done.message)),
    }
}

/// Does everything with one volume that is there, its deletion last.
async fn everything(channel: &Channel, name: &str) -> Vec<(&'static str, Result<(), Status>)> {
    let (mut volumes, mut io, mut inspect) = (
        VolumesClient::new(channel.clone()),
        IoClient::new(channel.clone()),
        InspectClient::new(channel.clone()),
    );
    let volume = || name.to_owned();
    let write = || WriteRequest { volume: volume(), data: vec![7; 4096].into(), ..<_>::default() };
    let read = || ReadRequest { volume: volume(), length_bytes: 4096, ..<_>::default() };
    let range = || RangeRequest { volume: volume(), length_bytes: 4096, ..<_>::default() };
    let fsync = || FsyncRequest { volume: volume(), may_log: false, ..Default::default() };
    let extents = ExtentsRequest { volume: volume(), ..<_>::default() };
    let open = OpenRequest { name: volume(), force: false };
    let resize = ResizeRequest { name: volume(), size_bytes: 2 * MIB, volume: 0 };
    vec![
        ("create", create(channel, name).await),
        ("get", volumes.get(VolumeRequest { name: volume() }).await.map(drop)),
        ("open", volumes.open(open).await.map(drop)),
        ("write", io.write(write()).await.map(drop)),
        ("read", io.read(read()).await.map(drop)),
        ("fsync", io.fsync(fsync()).await.map(drop)),
        ("trim", io.trim(range()).await.map(drop)),
        ("write zeroes", io.write_zeroes(range()).await.map(drop)),
        ("allocate", io.allocate(range()).await.map(drop)),
        ("extents", inspect.extents(extents).await.map(drop)),
        ("submit write", submit(channel, Op::Write(write())).await),
        ("submit read", submit(channel, Op::Read(read())).await),
        ("submit trim", submit(channel, Op::Trim(range())).await),
        ("submit fsync", submit(channel, Op::Fsync(fsync())).await),
        ("close", volumes.close(VolumeRequest { name: volume() }).await.map(drop)),
        ("resize", volumes.resize(resize).await.map(drop)),
        ("delete", volumes.delete(DeleteRequest { name: volume(), volume: 0 }).await.map(drop)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_uses_its_volumes_as_its_entry_says_and_no_others() {
    let secured = secured().await;
    let admin = secured.channel(Role::Writeback, Role::Admin, "me");
    let mut wrong = Vec::new();
    for (role, who, volume, allowed) in EXPECTED {
        for name in ["a", "b", "c"] {
            create(&admin, name).await.unwrap();
        }
        let allowed = allowed.concat();
        let channel = secured.channel(Role::Writeback, *role, who);
        for (what, outcome) in everything(&channel, volume).await {
            let is_expected = match allowed.contains(&what) {
                true => outcome.is_ok(),
                false => is_denied(&outcome),
            };
            if !is_expected {
                wrong.push(format!("{role} {who}: {what} {volume}: {outcome:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    secured.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_status_show_a_client_its_own_volumes_only() {
    let secured = secured().await;
    let admin = secured.channel(Role::Writeback, Role::Admin, "me");
    for name in ["a", "b", "c"] {
        create(&admin, name).await.unwrap();
        let open = OpenRequest { name: name.to_owned(), force: false };
        VolumesClient::new(admin.clone()).open(open).await.unwrap();
    }
    for (role, who, expected) in [
        (Role::Admin, "me", &["a", "b", "c"][..]),
        (Role::Client, "alice", &["a", "b"]),
        (Role::Client, "bob", &["a", "b", "c"]),
        (Role::Client, "carol", &[]),
    ] {
        let channel = secured.channel(Role::Writeback, role, who);
        let listed = VolumesClient::new(channel.clone()).list(ListVolumesRequest {}).await;
        let listed = listed.unwrap().into_inner().volumes;
        let names: Vec<_> = listed.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, expected, "{who}");
        let mut inspect = InspectClient::new(channel.clone());
        let status = inspect.status(StatusRequest { cluster: true }).await.unwrap().into_inner();
        let open: Vec<_> = status.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let all: Vec<_> = status.all_volumes.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!((&open[..], &all[..]), (expected, expected), "{who}");
        assert!(!status.insecure, "{who}");
        IoClient::new(channel).sync_all(SyncAllRequest {}).await.unwrap();
    }
    secured.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_of_everything_leaves_other_clients_volumes_alone() {
    let secured = Secured::start(|config| {
        config.clients = BTreeMap::from([("alice".to_owned(), vec!["a".to_owned()])]);
        // Nothing is written out by itself.
        config.write_out_after_ms = 600_000;
    })
    .await;
    let admin = secured.channel(Role::Writeback, Role::Admin, "me");
    for name in ["a", "b"] {
        create(&admin, name).await.unwrap();
        let (volume, data) = (name.to_owned(), vec![7; 8192].into());
        let write = WriteRequest { volume, data, ..<_>::default() };
        IoClient::new(admin.clone()).write(write).await.unwrap();
    }
    let alice = secured.channel(Role::Writeback, Role::Client, "alice");
    let synced = IoClient::new(alice).sync_all(SyncAllRequest {}).await.unwrap().into_inner();
    assert_eq!(synced.waited_for, 2, "the blocks of a");
    let synced = IoClient::new(admin).sync_all(SyncAllRequest {}).await.unwrap().into_inner();
    assert_eq!(synced.waited_for, 2, "the blocks of b");
    secured.stop().await;
}

#[test]
fn the_reason_has_its_number_on_the_wire() {
    assert_eq!(Reason::NotAllowed as i32, endio_types::Reason::NotAllowed as i32);
}
