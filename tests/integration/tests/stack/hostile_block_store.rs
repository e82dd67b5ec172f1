//! Hostile peers of a block-store: each gets a reason, and no byte on the device changes.

use std::collections::BTreeMap;

use bytes::Bytes;
use endio_api::blockstore::block_store_client::BlockStoreClient;
use endio_api::blockstore::{Bio, DescribeRequest, ReadRequest};
use endio_api::common::{ReadGrant, Reason, Token};
use endio_api::conversion::{
    BeginIo, CreateVolumeRequest, Lane, ListStoresRequest, LookupRequest, OpenVolumeRequest, Volume,
};
use endio_integration_tests::hostile::{self, channel};
use endio_integration_tests::raw::{RawWriteback, conversion};
use endio_integration_tests::services::{Conversion, STORE_BLOCKS, Store};
use endio_testkit::seed::{self, Rng};
use tonic::transport::Channel;

struct Rig {
    conversion: Conversion,
    store: Store,
    client: BlockStoreClient<Channel>,
    writeback: RawWriteback,
    volume: Volume,
    grant: ReadGrant,
    _directory: tempfile::TempDir,
}

async fn rig() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let conversion_service = Conversion::start(directory.path()).await;
    let url = conversion_service.url.clone();
    let store = Store::start(&url).await;
    let mut client = conversion(&url);
    for _ in 0..500 {
        let listed = client.list_stores(ListStoresRequest {}).await.unwrap().into_inner();
        if listed.stores.iter().any(|store| store.live) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (name, size_bytes) = ("vol1".to_owned(), 1 << 24);
    let create = CreateVolumeRequest { name: name.clone(), size_bytes, ..Default::default() };
    client.create_volume(create).await.unwrap();
    let writeback = RawWriteback::connect(&url, "wb-1").await;
    let open = OpenVolumeRequest { name, writeback: "wb-1".into(), ..Default::default() };
    let opened = client.open_volume(open).await.unwrap().into_inner();
    let blocks = BlockStoreClient::new(channel(&store.url)).max_decoding_message_size(8 << 20);
    Rig {
        conversion: conversion_service,
        client: blocks,
        store,
        writeback,
        volume: opened.volume.unwrap(),
        grant: opened.read_grant.unwrap(),
        _directory: directory,
    }
}

impl Rig {
    async fn begin(&mut self, blocks: u32) -> (Token, Token) {
        let begin = BeginIo {
            volume: self.volume.id,
            generation: self.volume.generation,
            lane: Lane::Direct.into(),
            lblk: 0,
            blocks,
            ..Default::default()
        };
        for _ in 0..200 {
            if let Ok(begun) = self.writeback.try_begin(begin.clone()).await {
                return (begun.submitter.unwrap(), begun.segments[0].token.clone().unwrap());
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("the store takes no write")
    }

    /// Sends bios in one stream; returns the reasons by position, or the status that ended it.
    async fn write(&mut self, bios: Vec<Bio>) -> Result<Vec<Reason>, tonic::Status> {
        let count = bios.len();
        let mut answers = self.client.write(tokio_stream::iter(bios)).await?.into_inner();
        let mut reasons = Vec::new();
        while let Some(done) = answers.message().await? {
            reasons.push(done.reason());
        }
        assert_eq!(reasons.len(), count, "one answer for each bio");
        Ok(reasons)
    }

    async fn read(&mut self, read: ReadRequest) -> Result<(Reason, Bytes), tonic::Status> {
        let mut answers = self.client.read(tokio_stream::iter([read])).await?.into_inner();
        let done = answers.message().await?.expect("one answer");
        Ok((done.reason(), done.data))
    }

    /// Everything on the device.
    fn bytes(&self) -> BTreeMap<u64, Vec<u8>> {
        use endio_store::block::BlockDevice as _;
        let mut blocks = BTreeMap::new();
        for pblk in 0..STORE_BLOCKS {
            let mut block = vec![0; 4096];
            self.store.device.memory.read_at(endio_types::Pblk(pblk), &mut block).unwrap();
            if block.iter().any(|byte| *byte != 0) {
                blocks.insert(pblk, block);
            }
        }
        blocks
    }
}

fn bio(token: Token, data: &[u8]) -> Bio {
    let crc32c = data.chunks(4096).map(crc32c::crc32c).collect();
    let data = Bytes::copy_from_slice(data);
    Bio { token: Some(token), data, crc32c, traceparent: String::new() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_and_frames_that_are_no_calls_change_nothing() {
    let mut rig = rig().await;
    let seed = seed::announce("endio-integration-tests", "hostile_block_store::bytes_and_frames");
    let mut rng = Rng::new(seed);
    let url = rig.store.url.clone();
    let before = rig.bytes();
    let sent = hostile::attack_bytes(&url, &mut rng).await
        + hostile::attack_frames(&url, "endio.blockstore.v1.BlockStore", &mut rng).await
        + hostile::attack_frames(&url, "endio.common.v1.Traces", &mut rng).await;
    assert!(sent >= 50, "only {sent} attacks");
    assert_eq!(rig.bytes(), before);
    let described = rig.client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(described.in_flight, 0);
}

/// Scenarios 10, 43, 55. A bio is written only under the token that conversion granted for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bios_without_their_very_own_token_are_refused() {
    let mut rig = rig().await;
    let (submitter, good) = rig.begin(4).await;
    let data = vec![0xAB; 4 * 4096];
    let forge = |change: &dyn Fn(&mut Token)| {
        let mut token = good.clone();
        change(&mut token);
        token
    };
    let mut tokens = vec![
        forge(&|token| token.cluster_epoch += 1),
        forge(&|token| token.cluster_epoch = 0),
        forge(&|token| token.io_end += 1),
        forge(&|token| token.segment = 0),
        forge(&|token| token.segment += 1),
        forge(&|token| token.volume += 1),
        forge(&|token| token.volume_generation += 1),
        forge(&|token| token.store += 1),
        forge(&|token| token.store_incarnation += 1),
        forge(&|token| token.pblk += 4),
        forge(&|token| token.pblk = u64::MAX),
        forge(&|token| token.pblk = STORE_BLOCKS - 1),
        forge(&|token| token.lease_ms = u32::MAX),
        submitter,
        Token::default(),
    ];
    for bit in 0..16 * 8 {
        tokens.push(forge(&|token| {
            let mut mac = token.mac.to_vec();
            mac[bit / 8] ^= 1 << (bit % 8);
            token.mac = mac.into();
        }));
    }
    for mac in [0, 1, 15, 17, 1 << 20] {
        tokens.push(forge(&|token| token.mac = vec![0; mac].into()));
    }
    let before = rig.bytes();
    let count = tokens.len();
    for token in tokens {
        let what = format!("{:.300}", format!("{token:?}"));
        let length = usize::try_from(token.blocks).unwrap() * 4096;
        let bio = bio(token, &data[..length.min(data.len())]);
        match rig.write(vec![bio]).await {
            Ok(reasons) => assert_ne!(reasons[0], Reason::Unspecified, "accepted: {what}"),
            Err(status) => assert!(!status.message().is_empty(), "{what}"),
        }
    }
    assert!(count >= 100, "only {count} forgeries");
    assert_eq!(rig.bytes(), before, "a forged token wrote something");
    let reasons = rig.write(vec![bio(good, &data)]).await.unwrap();
    assert_eq!(reasons, [Reason::Unspecified], "the true token still works");
    assert_ne!(rig.bytes(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bios_that_do_not_fit_their_token_are_refused() {
    let mut rig = rig().await;
    let before = rig.bytes();
    let (_, token) = rig.begin(4).await;
    let data = vec![0xCD; 4 * 4096];
    let good = bio(token.clone(), &data);
    let mut flipped = good.clone();
    flipped.crc32c[2] ^= 1;
    let bads = [
        Bio { token: None, ..good.clone() },
        Bio { data: Bytes::new(), ..good.clone() },
        Bio { data: good.data.slice(..4096), ..good.clone() },
        Bio { data: good.data.slice(1..), ..good.clone() },
        Bio { data: vec![0; 5 * 4096].into(), ..good.clone() },
        Bio { crc32c: Vec::new(), ..good.clone() },
        Bio { crc32c: vec![0; 3], ..good.clone() },
        Bio { crc32c: vec![0; 100_000], ..good.clone() },
        Bio { crc32c: vec![0; 4], ..good.clone() },
        flipped,
        Bio::default(),
    ];
    for bad in bads {
        let what = format!("{:.200}", format!("{:?}", bad.token));
        match rig.write(vec![bad]).await {
            Ok(reasons) => assert_ne!(reasons[0], Reason::Unspecified, "accepted: {what}"),
            Err(status) => assert!(!status.message().is_empty(), "{what}"),
        }
    }
    assert_eq!(rig.bytes(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_without_a_grant_or_beyond_the_store_are_refused() {
    let mut rig = rig().await;
    let (_, token) = rig.begin(4).await;
    let secret = vec![0x5E; 4 * 4096];
    let pblk = token.pblk;
    assert_eq!(rig.write(vec![bio(token, &secret)]).await.unwrap(), [Reason::Unspecified]);
    let grant = rig.grant.clone();
    let forge = |change: &dyn Fn(&mut ReadGrant)| {
        let mut forged = grant.clone();
        change(&mut forged);
        Some(forged)
    };
    let read =
        |grant, pblk, blocks| ReadRequest { request: 1, grant, pblk, blocks, ..Default::default() };
    let mut reads = vec![
        read(None, pblk, 1),
        read(Some(ReadGrant::default()), pblk, 1),
        read(forge(&|grant| grant.cluster_epoch += 1), pblk, 1),
        read(forge(&|grant| grant.volume += 1), pblk, 1),
        read(forge(&|grant| grant.volume_generation += 1), pblk, 1),
        read(forge(&|grant| grant.mac = Bytes::new()), pblk, 1),
        read(Some(grant.clone()), pblk, 0),
        read(Some(grant.clone()), pblk, 1025),
        read(Some(grant.clone()), pblk, u32::MAX),
        read(Some(grant.clone()), u64::MAX, 1),
        read(Some(grant.clone()), u64::MAX, u32::MAX),
        read(Some(grant.clone()), STORE_BLOCKS, 1),
        read(Some(grant.clone()), STORE_BLOCKS - 1, 2),
        ReadRequest { crc32c: vec![1; 3], ..read(Some(grant.clone()), pblk, 1) },
        ReadRequest { crc32c: vec![1], ..read(Some(grant.clone()), pblk, 1) },
        ReadRequest { crc32c: vec![1; 200_000], ..read(Some(grant.clone()), pblk, 1) },
    ];
    for bit in 0..16 * 8 {
        let flip = move |grant: &mut ReadGrant| {
            let mut mac = grant.mac.to_vec();
            mac[bit / 8] ^= 1 << (bit % 8);
            grant.mac = mac.into();
        };
        reads.push(read(forge(&flip), pblk, 1));
    }
    assert!(reads.len() >= 100);
    for read in reads {
        let what = format!("{:.200}", format!("{read:?}"));
        match rig.read(read).await {
            Ok((reason, data)) => {
                assert_ne!(reason, Reason::Unspecified, "accepted: {what}");
                assert!(data.is_empty(), "data with a refusal: {what}");
            }
            Err(status) => assert!(!status.message().is_empty(), "{what}"),
        }
    }
    let good = read(Some(grant), pblk, 4);
    let (reason, data) = rig.read(good).await.unwrap();
    assert_eq!((reason, &data[..]), (Reason::Unspecified, &secret[..]));
    let lookup = LookupRequest {
        volume: rig.volume.id,
        generation: rig.volume.generation,
        lblk: 0,
        blocks: 4,
        attempts_over: 0,
    };
    let found = conversion(&rig.conversion.url).lookup(lookup).await.unwrap().into_inner();
    assert!(found.extents.iter().all(|extent| extent.crc32c.is_empty()), "nothing is converted");
}
