//! A certificate speaks for itself only: of two of the same kind, none takes the place of the other.

use endio_api::access::Role;
use endio_api::common::Reason;
use endio_api::conversion::conversion_client::ConversionClient;
use endio_api::conversion::{BeginIo, CreateVolumeRequest, Lane, OpenVolumeRequest, Volume};
use endio_api::writeback::inspect_client::InspectClient;
use endio_api::writeback::io_client::IoClient;
use endio_api::writeback::volumes_client::VolumesClient;
use endio_api::writeback::{OpenRequest, StatusRequest, WriteMode, WriteRequest};
use endio_integration_tests::raw::{RawStore, RawWriteback};
use endio_integration_tests::secured::{STORE_UUID, Secured};
use endio_integration_tests::services::STORE_BLOCKS;
use tonic::transport::Channel;

/// A volume `a`, open in the writeback `w1`.
async fn opened(admin: &Channel) -> Volume {
    let mut volumes = VolumesClient::new(admin.clone());
    let create =
        CreateVolumeRequest { name: "a".to_owned(), size_bytes: 1 << 20, ..<_>::default() };
    volumes.create(create).await.unwrap();
    let open = OpenRequest { name: "a".to_owned(), force: false };
    volumes.open(open).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_that_says_the_name_of_a_writeback_gets_nothing_of_it() {
    let secured = Secured::start(|_| {}).await;
    let admin = secured.channel(Role::Writeback, Role::Admin, "me");
    let volume = opened(&admin).await;
    let status = InspectClient::new(admin.clone()).status(StatusRequest::default()).await;
    let name = status.unwrap().into_inner().writeback;
    assert_eq!(volume.owner, format!("{name}@w1"));

    let second = secured.channel(Role::Conversion, Role::Writeback, "w2");
    let mut thief = RawWriteback::connect_over(ConversionClient::new(second.clone()), &name).await;
    let begin = BeginIo {
        volume: volume.id,
        generation: volume.generation,
        lane: Lane::Direct.into(),
        blocks: 1,
        ..<_>::default()
    };
    let refused = thief.try_begin(begin).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::OldGeneration);
    // Nor can it say both names at once.
    for claimed in [format!("{name}@w1"), "@w1".to_owned()] {
        let open = OpenVolumeRequest {
            name: "a".to_owned(),
            writeback: claimed,
            force: true,
            ..<_>::default()
        };
        let refused = ConversionClient::new(second.clone()).open_volume(open).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    }
    // The session of the first one stands, and so does its volume.
    let write = WriteRequest {
        volume: "a".to_owned(),
        data: vec![7; 4096].into(),
        mode: WriteMode::Direct.into(),
        ..<_>::default()
    };
    IoClient::new(admin.clone()).write(write).await.unwrap();
    let status = InspectClient::new(admin).status(StatusRequest::default()).await;
    let status = status.unwrap().into_inner();
    assert!(status.connected);
    assert_eq!(status.volumes[0].generation, volume.generation);
    drop(thief);
    secured.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_cannot_register_in_place_of_a_block_store() {
    let secured = Secured::start(|_| {}).await;
    let admin = secured.channel(Role::Writeback, Role::Admin, "me");
    opened(&admin).await;
    let store = |name: &str| {
        ConversionClient::new(secured.channel(Role::Conversion, Role::BlockStore, name))
    };
    let stolen = RawStore::try_register(store("s2"), STORE_UUID, 9, STORE_BLOCKS).await;
    let Err(Some(refused)) = stolen else { panic!("a second certificate took the store") };
    assert_eq!(endio_api::status::reason(&refused), endio_types::Reason::NotAllowed);
    // With a store of its own it is welcome.
    let own = RawStore::try_register(store("s2"), [9; 16], 1, STORE_BLOCKS).await;
    assert!(own.is_ok_and(|own| own.id != 1));
    // The first one goes on: it was neither replaced nor fenced by the higher incarnation.
    let write = WriteRequest {
        volume: "a".to_owned(),
        data: vec![7; 4096].into(),
        mode: WriteMode::Direct.into(),
        ..<_>::default()
    };
    IoClient::new(admin).write(write).await.unwrap();
    secured.stop().await;
}
