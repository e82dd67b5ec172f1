//! Some ten thousands of volumes are one long list, and a list that fails is not an empty one.

use endio_api::conversion::{ListVolumesRequest, Volume};
use endio_api::writeback::StatusRequest;
use endio_integration_tests::services::Conversion;
use endio_integration_tests::stack::Writeback;
use endio_integration_tests::tampering::Tampering;

/// What conversion sends in one message, and the command takes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Some 150 bytes each.
fn volumes(count: u64) -> Vec<Volume> {
    let volume = |id| Volume { id, name: format!("{id:0>128}"), ..Volume::default() };
    (1..=count).map(volume).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_volumes_may_be_as_long_as_conversion_can_send_it() {
    let directory = tempfile::tempdir().unwrap();
    let conversion = Conversion::start(directory.path()).await;
    let between = Tampering::start(&conversion.url).await;
    let writeback = Writeback::start(&between.url, &directory.path().join("cache")).await;
    let client = writeback.client();
    let status = || async {
        let mut inspect = client.inspect().max_decoding_message_size(MESSAGE_BYTES_MAX);
        inspect.status(StatusRequest { cluster: true }).await.unwrap().into_inner()
    };

    between.lists(volumes(50_000));
    let mut volumes_client = client.volumes().max_decoding_message_size(MESSAGE_BYTES_MAX);
    let listed = volumes_client.list(ListVolumesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.volumes.len(), 50_000);
    let told = status().await;
    assert_eq!((told.all_volumes.len(), told.volumes_unknown.as_str()), (50_000, ""));

    between.lists(volumes(150_000));
    let told = status().await;
    assert!(told.all_volumes.is_empty() && told.conversion.is_some());
    assert!(!told.volumes_unknown.is_empty(), "it looks as if there were no volumes");
}
