//! Questions that may always be asked: extents, io_ends, stores, traces.

use std::collections::BTreeMap;
use std::sync::Arc;

use endio_api::common::{
    Extent, ExtentState, KeepTracesRequest, ListSpansRequest, ListSpansResponse, Span,
};
use endio_api::conversion::{
    ListIoEndsRequest, ListIoEndsResponse, ListStoresRequest, ListStoresResponse,
};
use endio_api::traces::span_to_proto;
use endio_api::writeback::{NbdListener, NbdTls};
use endio_chassis::metrics::Gauge;
use endio_chassis::net::ListenAddr;
use endio_chassis::recorder::SpanQuery;
use endio_types::{ByteRange, LblkRange};
use tokio::time::{Duration, Instant};

use super::Engine;
use crate::conversion::Client;
use crate::failure::Failure;
use crate::volume::Volume;

/// Blocks of the map that are shown at once.
pub(super) const EXTENT_BLOCKS_MAX: u64 = 65_536;
/// Traces in one request to keep them.
const KEEP_MAX: usize = 1_024;
/// How long that request may take: what is kept is of use to people only.
const KEEP_PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait before it.
const KEEP_AFTER: Duration = Duration::from_millis(100);
/// How long a question may take that waits for other services.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

impl Engine {
    /// The states of some blocks from `at` on, without gaps, and the first block after them;
    /// `None`: the range is done.
    ///
    /// # Errors
    /// As a look-up; `OLD_GENERATION`: the volume is open elsewhere.
    pub async fn extents(
        &self,
        volume: &Arc<Volume>,
        range: LblkRange,
        at: u64,
    ) -> Result<Option<(Vec<Extent>, u64)>, Failure> {
        if at >= range.end() {
            return Ok(None);
        }
        let part = LblkRange::new(at, EXTENT_BLOCKS_MAX.min(range.end() - at));
        let _registered = volume.read_begins();
        let delayed: Vec<u64> = {
            let state = volume.state();
            state.dirty.read_range(part).map(|(lblk, _)| lblk.0).collect()
        };
        let mapped_end = volume.state().view.mapped_end();
        let mapped = part.intersection(LblkRange::new(0, mapped_end));
        // Where nothing can be mapped, the look-up of one block still says whether the volume is ours: what is
        // dirty here, and what looks like a hole, says nothing once another writeback has it.
        let mapped = mapped.unwrap_or(LblkRange { len: 1, ..part });
        let found = self.look_up(volume, mapped, Instant::now() + PATIENCE).await?;
        if found.read_grant.is_none() {
            return Err(Failure::fenced());
        }
        let map = found.extents;
        Ok(Some((overlay(part, &map, &delayed), part.end())))
    }

    /// The blocks of a volume that `offset` and `length` (0: to the end) name.
    ///
    /// # Errors
    /// `OUT_OF_RANGE`.
    pub fn blocks_of(
        &self,
        volume: &Volume,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<LblkRange, Failure> {
        let size = volume.state().view.size_bytes();
        let len = if length_bytes == 0 { size.saturating_sub(offset_bytes) } else { length_bytes };
        volume.check(ByteRange { offset: offset_bytes, len }, false)
    }

    /// Where NBD clients attach.
    pub(super) fn nbd_listeners(&self) -> Vec<NbdListener> {
        let tls = match &self.config.nbd_tls {
            None => NbdTls::Off,
            Some(tls) if tls.required => NbdTls::Required,
            Some(_) => NbdTls::Optional,
        };
        let listener =
            |address: &ListenAddr| NbdListener { address: address.to_string(), tls: tls.into() };
        self.config.nbd_listen.iter().map(listener).collect()
    }

    /// Sets the gauges that are only looked at when somebody reads the metrics, as long as the
    /// engine lives.
    pub(crate) fn show_gauges(self: &Arc<Self>) {
        let registry = &self.metrics.registry;
        let gauge = |name, help| registry.gauge(name, help, &[]);
        let limit = gauge("endio_writeback_dirty_limit_bytes", "Dirty bytes at which writers wait");
        let log = gauge("endio_writeback_cache_log_bytes", "Bytes of the cache log");
        let log_max = gauge("endio_writeback_cache_log_limit_bytes", "Its bound");
        let volumes = gauge("endio_writeback_volumes_open", "Volumes open here");
        let in_flight = gauge("endio_writeback_in_flight_bytes", "On their way to the stores");
        let connected = gauge("endio_writeback_connected", "1: a session with conversion stands");
        let epoch = gauge("endio_writeback_cluster_epoch", "Of that session; 0: none");
        let engine = Arc::downgrade(self);
        registry.before_reading(move || {
            let Some(engine) = engine.upgrade() else { return false };
            let set = |gauge: &Gauge, value: u64| gauge.set(value.try_into().unwrap_or(i64::MAX));
            let status = engine.status();
            set(&limit, status.dirty_bytes_max);
            let (used, bound) = engine.log.usage_bytes();
            set(&log, used);
            set(&log_max, bound);
            set(&volumes, status.volumes.len() as u64);
            set(&in_flight, status.volumes.iter().map(|volume| volume.in_flight_bytes).sum());
            set(&connected, status.connected.into());
            set(&epoch, status.cluster_epoch);
            true
        });
        registry.expose();
    }

    /// Tells the other services which traces that began here are kept, until the service stops.
    pub(crate) async fn tell_kept(self: Arc<Self>) {
        let Some(mut kept) = endio_chassis::trace::take_kept() else { return };
        let mut traces = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                count = kept.recv_many(&mut traces, KEEP_MAX) => if count == 0 { return },
            }
            // Legs that have not ended yet are in the rings a little later.
            tokio::time::sleep(KEEP_AFTER).await;
            while traces.len() < KEEP_MAX
                && let Ok(trace) = kept.try_recv()
            {
                traces.push(trace);
            }
            let ids = std::mem::take(&mut traces).into_iter();
            let trace_ids = ids.map(|trace| trace.to_be_bytes().to_vec().into()).collect();
            self.keep_at_peers(KeepTracesRequest { trace_ids }).await;
        }
    }

    async fn keep_at_peers(&self, request: KeepTracesRequest) {
        use endio_api::common::traces_client::TracesClient;
        let mut client = TracesClient::new(self.conversion.channel());
        let at_conversion = client.keep_traces(request.clone());
        let at_conversion = tokio::time::timeout(KEEP_PATIENCE, at_conversion);
        let stores = self.stores.ids().into_iter();
        let at_stores = stores.map(|store| self.stores.keep(store, request.clone()));
        let (told, stores_told) =
            futures_util::join!(at_conversion, futures_util::future::join_all(at_stores));
        if !matches!(told, Ok(Ok(_))) || stores_told.iter().any(Result::is_err) {
            tracing::debug!("somebody was not told which traces to keep");
        }
    }

    /// io_ends in flight, from conversion.
    ///
    /// # Errors
    /// `PEER_AWAY`.
    pub async fn io_ends(&self, request: ListIoEndsRequest) -> Result<ListIoEndsResponse, Failure> {
        let call = |mut client: Client| async move { client.list_io_ends(request).await };
        self.conversion.call(Instant::now() + PATIENCE, call).await
    }

    /// Block-stores, from conversion.
    ///
    /// # Errors
    /// `PEER_AWAY`.
    pub async fn store_list(&self) -> Result<ListStoresResponse, Failure> {
        let call =
            |mut client: Client| async move { client.list_stores(ListStoresRequest {}).await };
        self.conversion.call(Instant::now() + PATIENCE, call).await
    }

    /// Spans of this service, and of a trace those of the others too: who is away is left out.
    pub async fn trace(&self, request: ListSpansRequest) -> ListSpansResponse {
        let mut all = self.own_spans(&request);
        if request.trace_id.is_empty() {
            return all;
        }
        for (spans, dropped) in self.spans_of_peers(&request).await {
            all.spans.extend(spans);
            all.dropped += dropped;
        }
        // Services of one process share a recorder.
        all.spans.sort_by(|a, b| (&a.span_id, a.start_unix_ns).cmp(&(&b.span_id, b.start_unix_ns)));
        all.spans.dedup_by(|a, b| a.span_id == b.span_id);
        all.spans.sort_by_key(|span| span.start_unix_ns);
        all
    }

    fn own_spans(&self, request: &ListSpansRequest) -> ListSpansResponse {
        let query = SpanQuery {
            trace_id: request.trace_id.clone(),
            roots_only: request.roots_only,
            service: "writeback".to_owned(),
            volume: request.volume.clone(),
            offset_bytes: request.offset_bytes,
            io_end: request.io_end,
            limit: request.limit as usize,
        };
        let spans = self.recorder.query(&query).into_iter().map(span_to_proto).collect();
        ListSpansResponse { spans, dropped: self.recorder.dropped() }
    }

    async fn spans_of_peers(&self, request: &ListSpansRequest) -> Vec<(Vec<Span>, u64)> {
        use endio_api::common::traces_client::TracesClient;
        let mut found = Vec::new();
        let mut client = TracesClient::new(self.conversion.channel());
        match tokio::time::timeout(PATIENCE, client.list_spans(request.clone())).await {
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                found.push((answer.spans, answer.dropped));
            }
            _ => tracing::debug!("conversion told no spans"),
        }
        for store in self.stores.ids() {
            match self.stores.spans(store, request.clone()).await {
                Ok(spans) => found.push(spans),
                Err(error) => tracing::debug!(store, %error, "a block-store told no spans"),
            }
        }
        found
    }
}

/// The map with delayed data over it and holes in between: ascending, without gaps.
fn overlay(range: LblkRange, map: &[Extent], delayed: &[u64]) -> Vec<Extent> {
    let mut states: BTreeMap<u64, u64> = BTreeMap::new();
    for lblk in delayed {
        match states.last_entry() {
            Some(mut last) if last.key() + last.get() == *lblk => *last.get_mut() += 1,
            _ => drop(states.insert(*lblk, 1)),
        }
    }
    let mut out = Vec::new();
    let mut at = range.start.0;
    for (start, len) in states {
        under(LblkRange::new(at, start - at), map, &mut out);
        out.push(plain(start, len, ExtentState::Delayed));
        at = start + len;
    }
    under(LblkRange::new(at, range.end() - at), map, &mut out);
    out
}

/// The map of a range without delayed data, with its holes.
fn under(range: LblkRange, map: &[Extent], out: &mut Vec<Extent>) {
    let mut at = range.start.0;
    for extent in map {
        let whole = LblkRange::new(extent.lblk, extent.blocks.into());
        let left = LblkRange::new(at, range.end().saturating_sub(at));
        let Some(part) = whole.intersection(left) else { continue };
        if part.start.0 > at {
            out.push(plain(at, part.start.0 - at, ExtentState::Hole));
        }
        out.push(cut(extent, part));
        at = part.end();
    }
    if at < range.end() {
        out.push(plain(at, range.end() - at, ExtentState::Hole));
    }
}

fn plain(lblk: u64, len: u64, state: ExtentState) -> Extent {
    // Ranges here are at most EXTENT_BLOCKS_MAX long.
    let blocks = u32::try_from(len).unwrap_or(u32::MAX);
    Extent { lblk, blocks, state: state.into(), places: Vec::new(), crc32c: Vec::new() }
}

fn cut(extent: &Extent, part: LblkRange) -> Extent {
    let skip = part.start.0 - extent.lblk;
    let mut piece = plain(part.start.0, part.len, ExtentState::Unspecified);
    piece.state = extent.state;
    piece.places = extent.places.clone();
    for place in &mut piece.places {
        place.pblk += skip;
    }
    if let (Ok(from), Ok(to)) = (usize::try_from(skip), usize::try_from(skip + part.len)) {
        piece.crc32c = extent.crc32c.get(from..to).unwrap_or_default().to_vec();
    }
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delayed_blocks_hide_the_map_and_gaps_are_holes() {
        let mut written = plain(2, 4, ExtentState::Written);
        written.places = vec![endio_api::common::Place { store: 1, pblk: 100 }];
        written.crc32c = vec![2, 3, 4, 5];
        let seen = overlay(LblkRange::new(0, 8), &[written], &[3, 4, 7]);
        let states: Vec<_> = seen.iter().map(|e| (e.lblk, e.blocks, e.state())).collect();
        assert_eq!(
            states,
            [
                (0, 2, ExtentState::Hole),
                (2, 1, ExtentState::Written),
                (3, 2, ExtentState::Delayed),
                (5, 1, ExtentState::Written),
                (6, 1, ExtentState::Hole),
                (7, 1, ExtentState::Delayed),
            ]
        );
        assert_eq!((seen[3].places[0].pblk, seen[3].crc32c.as_slice()), (103, [5].as_slice()));
    }
}
