//! Releases that come at the same moment.

use std::sync::Arc;

use tokio::sync::Barrier;

use super::*;

/// Scenario 3. All four holders release at the same moment, each over its own connection, from a task of
/// its own; 200 rounds. Each io_end converts once and completes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn releases_at_the_same_moment_make_one_conversion_and_one_completion() {
    let mut rig = rig(3, 3).await;
    let mut map_version = rig.volume.map_version;
    for round in 0..200 {
        let lblk = round * 2;
        let begun = rig.begin(lblk, 1).await;
        let submitter = begun.submitter.unwrap();
        let together = Arc::new(Barrier::new(4));
        let mut holders = Vec::new();
        for mut store in std::mem::take(&mut rig.stores) {
            let of_store = |token: &Token| token.store == store.id;
            let mut tokens = begun.segments.iter().filter_map(|segment| segment.token.clone());
            let token = tokens.find(of_store).unwrap();
            let together = together.clone();
            holders.push(tokio::spawn(async move {
                together.wait().await;
                let reason = store.release(&token).await;
                (store, reason)
            }));
        }
        together.wait().await;
        assert_eq!(rig.writeback.release(submitter.clone()).await, Reason::Unspecified);
        for holder in holders {
            let (store, reason) = holder.await.unwrap();
            assert_eq!(reason, Reason::Unspecified, "round {round}");
            rig.stores.push(store);
        }
        let completion = rig.writeback.completion(submitter.io_end).await;
        assert_eq!(completion.reason(), Reason::Unspecified, "round {round}");
        assert_eq!(completion.converted, [lblk, 1], "round {round}");
        map_version += 1;
        let request = VolumeRequest { name: "vol1".into() };
        let volume = rig.client.get_volume(request).await.unwrap().into_inner();
        assert_eq!(volume.map_version, map_version, "round {round}: one conversion");
    }
    rig.writeback.stays_silent(|answer| matches!(answer, Answer::Completion(_))).await;
    assert_eq!(rig.writeback.completions.len(), 200);
    assert!(rig.writeback.completions.values().all(|count| *count == 1), "completed twice");
    checkers::every_io_end_ends(&rig.io_ends().await).unwrap();
    rig.adds_up().await;
}
