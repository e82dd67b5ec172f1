//! The state of the whole system as this writeback can tell it, and what is blocked and why.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use endio_api::blockstore::DescribeResponse as StoreAnswer;
use endio_api::conversion::{self, DescribeRequest, ListVolumesRequest, Store};
use endio_api::convert::reason_to_wire;
use endio_api::writeback::{Blocked, StatusResponse, StoreStatus, VolumeStatus};
use endio_types::{BLOCK_BYTES, Reason};
use tokio::time::{Duration, Instant, timeout};

use super::Engine;
use crate::conversion::Client;
use crate::volume::Volume;

/// How long another service may take to answer before it is told as away.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Things that are told as blocked at the most; the rest is as good as told.
const BLOCKED_MAX: usize = 200;

/// Requests of one volume since it was opened here.
#[derive(Debug, Default)]
pub struct Meter {
    count: AtomicU64,
    bytes: AtomicU64,
    us: AtomicU64,
}

impl Meter {
    /// A request ended well.
    pub(crate) fn add(&self, bytes: u64, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        for (counter, value) in [(&self.count, 1), (&self.bytes, bytes), (&self.us, us)] {
            counter.fetch_add(value, Ordering::Relaxed);
        }
    }

    /// Requests that ended well.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn read(&self) -> [u64; 3] {
        [&self.count, &self.bytes, &self.us].map(|counter| counter.load(Ordering::Relaxed))
    }
}

impl Engine {
    /// This writeback's state.
    pub fn status(&self) -> StatusResponse {
        let link = self.session.link();
        StatusResponse {
            writeback: self.identity.writeback(),
            cluster_epoch: link.epoch.unwrap_or(0),
            connected: link.epoch.is_some(),
            dirty_bytes: self.throttled(|throttle| throttle.total_bytes()),
            dirty_bytes_max: self.config.dirty_bytes_max,
            log_bytes: self.log.usage_bytes().0,
            volumes: self.table.all().iter().map(volume_status).collect(),
            nbd: self.nbd_listeners(),
            insecure: self.is_insecure,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..StatusResponse::default()
        }
    }

    /// The state of all services. Who does not answer is told as away; this never fails.
    pub async fn cluster_status(self: &Arc<Self>) -> StatusResponse {
        let mut status = self.status();
        let deadline = Instant::now() + ANSWER_MAX;
        let describe =
            |mut client: Client| async move { client.describe(DescribeRequest {}).await };
        let volumes =
            |mut client: Client| async move { client.list_volumes(ListVolumesRequest {}).await };
        let (conversion, volumes, stores) = tokio::join!(
            self.conversion.call(deadline, describe),
            self.conversion.call(deadline, volumes),
            timeout(ANSWER_MAX, self.store_list()),
        );
        status.conversion = conversion.ok();
        match volumes {
            Ok(volumes) => status.all_volumes = volumes.volumes,
            Err(failure) => status.volumes_unknown = failure.to_string(),
        }
        let stores = stores.ok().and_then(Result::ok).map_or_else(Vec::new, |list| list.stores);
        let mut asked = tokio::task::JoinSet::new();
        for store in stores {
            let engine = Arc::clone(self);
            asked.spawn(async move {
                let answer = timeout(ANSWER_MAX, engine.stores.describe(store.id)).await;
                let answer = answer.ok().and_then(Result::ok);
                StoreStatus { store: Some(store), answer }
            });
        }
        while let Some(store) = asked.join_next().await {
            status.stores.extend(store.ok());
        }
        status.stores.sort_by_key(|store| store.store.as_ref().map_or(0, |store| store.id));
        status.blocked = blocked(&status);
        status
    }
}

fn volume_status(volume: &Arc<Volume>) -> VolumeStatus {
    let state = volume.state();
    let pending = state.errors.peek(state.told);
    let blocked = match &state.gone {
        Some(gone) => gone.detail.to_string(),
        None if state.rest_until.is_some_and(|until| until > Instant::now()) => {
            let why = pending.map_or("", |failure| &failure.detail);
            format!("write-out failed and is tried again: {why}").trim_end_matches(": ").to_owned()
        }
        None => String::new(),
    };
    let [writes, written_bytes, write_us] = volume.writes.read();
    let [reads, read_bytes, read_us] = volume.reads.read();
    VolumeStatus {
        name: volume.name.to_string(),
        generation: volume.generation,
        dirty_bytes: state.dirty_bytes(),
        in_flight_bytes: state.dirty.in_flight_blocks() * BLOCK_BYTES + state.direct_bytes,
        error_pending: state.errors.is_untold(),
        blocked,
        writes,
        written_bytes,
        write_us,
        reads,
        read_bytes,
        read_us,
        lost_writes: pending.is_some_and(|failure| failure.reason == Reason::LostWrites),
    }
}

/// What keeps writes from going on, most general first.
fn blocked(status: &StatusResponse) -> Vec<Blocked> {
    let mut found = Vec::new();
    let mut tell = |reason: Reason, what: String, message: String| {
        if found.len() < BLOCKED_MAX {
            found.push(Blocked { reason: reason_to_wire(Some(reason)), what, message });
        }
    };
    if !status.connected {
        let message = "no session with the conversion service: is it running, and reachable from \
                       the writeback service?";
        tell(Reason::PeerAway, "conversion".into(), message.into());
    }
    if let Some(conversion) = &status.conversion {
        if conversion.metadata_full {
            let message = "the metadata disk is full or fails: new writes are refused until it has \
                           room";
            tell(Reason::MetadataFull, "conversion".into(), message.into());
        }
        if conversion.draining {
            let message = "the conversion service is stopping";
            tell(Reason::Draining, "conversion".into(), message.into());
        }
    }
    if status.dirty_bytes_max > 0 && status.dirty_bytes >= status.dirty_bytes_max {
        let message = "the dirty cache is full: buffered writes wait for write-out";
        tell(Reason::Limit, "writeback".into(), message.into());
    }
    for StoreStatus { store, answer } in &status.stores {
        let Some(store) = store else { continue };
        if let Some((reason, message)) = store_trouble(store, answer.as_ref()) {
            tell(reason, format!("store {}", store.id), message);
        }
    }
    let live = status.stores.iter().filter_map(|store| store.store.as_ref());
    let live: Vec<&Store> = live.filter(|store| store.live).collect();
    for volume in &status.all_volumes {
        if let Some((reason, message)) = volume_trouble(volume, &live) {
            tell(reason, format!("volume {}", volume.name), message);
        }
    }
    for volume in &status.volumes {
        let what = || format!("volume {}", volume.name);
        if volume.lost_writes {
            let message = "acknowledged writes may be missing since a power loss or a takeover: the next \
                           fsync says so, once";
            tell(Reason::LostWrites, what(), message.into());
        } else if volume.error_pending || !volume.blocked.is_empty() {
            let why = if volume.blocked.is_empty() {
                "a write-out failed; the data is kept and tried again, and the next fsync says so"
            } else {
                &volume.blocked
            };
            tell(Reason::IoError, what(), why.to_owned());
        }
    }
    found
}

fn store_trouble(store: &Store, answer: Option<&StoreAnswer>) -> Option<(Reason, String)> {
    if !store.live {
        let mut message =
            "away: nothing new goes there, and what only it has cannot be read; start \
                           it again"
                .to_owned();
        if store.quarantined_blocks > 0 {
            let blocks = store.quarantined_blocks;
            message.push_str(&format!("; {blocks} freed blocks wait for it to come back"));
        }
        return Some((Reason::PeerAway, message));
    }
    if answer.is_none() {
        let message = "conversion hears it, this writeback does not: check the network between \
                       them, and the address under which it registered";
        return Some((Reason::PeerAway, format!("{message} ({})", store.url)));
    }
    (store.free_blocks == 0).then(|| {
        let waiting = store.quarantined_blocks;
        let message = format!("no free block is left; {waiting} are about to become free");
        (Reason::NoSpace, message)
    })
}

fn volume_trouble(volume: &conversion::Volume, live: &[&Store]) -> Option<(Reason, String)> {
    let wanted = volume.replicas as usize;
    if live.len() < wanted {
        let message =
            format!("wants {wanted} block-stores, {} live: writes wait for more", live.len());
        return Some((Reason::NotEnoughStores, message));
    }
    let roomy = live.iter().filter(|store| store.free_blocks > 0).count();
    (roomy < wanted).then(|| {
        let message = format!("wants {wanted} block-stores with free space, {roomy} have some");
        (Reason::NoSpace, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(id: u32, live: bool, free_blocks: u64) -> StoreStatus {
        let store = Store { id, live, free_blocks, quarantined_blocks: 7, ..Store::default() };
        StoreStatus { store: Some(store), answer: Some(StoreAnswer::default()) }
    }

    fn volume(replicas: u32) -> conversion::Volume {
        conversion::Volume { name: "v".into(), replicas, ..conversion::Volume::default() }
    }

    fn reasons(status: &StatusResponse) -> Vec<(String, String)> {
        let name = |reason| Reason::from_wire(reason).map_or("", Reason::name).to_owned();
        blocked(status).into_iter().map(|found| (found.what, name(found.reason))).collect()
    }

    fn healthy() -> StatusResponse {
        StatusResponse {
            connected: true,
            dirty_bytes_max: 100,
            conversion: Some(conversion::DescribeResponse::default()),
            stores: vec![store(1, true, 5), store(2, true, 5)],
            all_volumes: vec![volume(2)],
            volumes: vec![VolumeStatus { name: "v".into(), ..VolumeStatus::default() }],
            ..StatusResponse::default()
        }
    }

    #[test]
    fn nothing_is_blocked_where_everything_works() {
        assert_eq!(reasons(&healthy()), []);
    }

    #[test]
    fn a_store_that_is_away_blocks_the_volumes_that_want_it() {
        let status =
            StatusResponse { stores: vec![store(1, true, 5), store(2, false, 5)], ..healthy() };
        let expected = [("store 2", "PEER_AWAY"), ("volume v", "NOT_ENOUGH_STORES")];
        assert_eq!(reasons(&status), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn a_full_store_blocks_the_volumes_that_want_it() {
        let status =
            StatusResponse { stores: vec![store(1, true, 5), store(2, true, 0)], ..healthy() };
        let expected = [("store 2", "NO_SPACE"), ("volume v", "NO_SPACE")];
        assert_eq!(reasons(&status), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn each_other_hindrance_is_told_with_its_reason() {
        let metadata_full = conversion::DescribeResponse { metadata_full: true, ..<_>::default() };
        let unheard = StoreStatus { answer: None, ..store(1, true, 5) };
        let lossy = VolumeStatus { lost_writes: true, error_pending: true, ..<_>::default() };
        let failing = VolumeStatus { blocked: "no".into(), ..VolumeStatus::default() };
        let cases = [
            (StatusResponse { connected: false, ..healthy() }, "PEER_AWAY"),
            (StatusResponse { conversion: Some(metadata_full), ..healthy() }, "METADATA_FULL"),
            (StatusResponse { dirty_bytes: 100, ..healthy() }, "LIMIT"),
            (StatusResponse { stores: vec![unheard, store(2, true, 5)], ..healthy() }, "PEER_AWAY"),
            (StatusResponse { volumes: vec![lossy], ..healthy() }, "LOST_WRITES"),
            (StatusResponse { volumes: vec![failing], ..healthy() }, "IO_ERROR"),
        ];
        for (status, expected) in cases {
            let found: Vec<String> =
                reasons(&status).into_iter().map(|(_, reason)| reason).collect();
            assert_eq!(found, [expected]);
        }
    }
}
