//! Writes anew what is read in sequence and lies in many pieces, while nobody writes.
//!
//! ```text
//!   a long read found many pieces ──► its windows wait ──► nobody wrote for a while, there is room
//!        ──► under the lock of the window: nothing dirty, look up, read, write in one io_end
//! ```
//! To conversion and the stores it is a direct write of the data that is there: what holds for one,
//! whoever dies in the middle, holds here. Holes and unwritten blocks are not touched. There is one
//! window under way in this process, so a client waits at most for one.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use endio_api::common::Extent;
use endio_api::conversion::ListStoresRequest;
use endio_failpoints::{Bug, is_planted};
use endio_state_machine::chunk::Place;
use endio_state_machine::writeback::fragments::Layout;
use endio_state_machine::writeback::groups::joined;
use endio_state_machine::writeback::map_cache::Part;
use endio_types::{BLOCK_BYTES, BLOCK_SIZE, LblkRange, Pblk, StoreId};
use futures_util::FutureExt as _;
use tokio::time::{Duration, Instant};

use super::{Engine, Piece};
use crate::conversion::Client;
use crate::failure::Failure;
use crate::volume::Volume;

/// Pause between two looks at the volumes.
const LOOK: Duration = Duration::from_millis(100);
/// How long a volume is left alone after a window that did not lie better, or failed.
const REST: Duration = Duration::from_mins(10);
/// How long a window may be tried: a client may wait behind it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long nothing is written anew, of any volume, after the stores were found short of room or conversion did
/// not say: room comes back when somebody deletes or a store joins, a matter of minutes, and each look asks
/// for the list of all stores.
const SHORT_REST: Duration = Duration::from_secs(30);
/// Free part of each store below which nothing is written anew: the room is for those who write.
const FREE_PART: u64 = 16;

/// What was seen of a volume.
struct Seen {
    /// Writes that it had acknowledged.
    writes: u64,
    /// Nobody has written, and nothing was dirty, since then.
    quiet_since: Instant,
    /// Nothing is done before then.
    rest_until: Instant,
}

/// Volumes by number and generation.
type Book = BTreeMap<(u64, u64), Seen>;

/// How a window was left.
enum Left {
    /// It lies better: so many blocks were moved.
    Better(u64),
    /// Nothing to do any more.
    Fine,
    /// Somebody uses it, or it is dirty.
    Busy,
    /// It was written anew, and lies no better: free space lies in pieces, too.
    NoBetter(u64),
}

impl Engine {
    /// Starts the task that writes anew. It ends with the service.
    pub(crate) fn start_defragmenter(self: &Arc<Self>) {
        let rate = self.config.defragment_bytes_per_s;
        if rate == 0 {
            return;
        }
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            let quiet = Duration::from_millis(engine.config.defragment_after_ms);
            let mut book = Book::new();
            loop {
                // A stop does not wait for a conversion that is away; a window under way has its own task.
                let (bytes, is_short) = tokio::select! {
                    biased;
                    () = engine.stop.cancelled() => return,
                    some = engine.defragment_some(&mut book, quiet) => some,
                };
                let pause = pause_after(bytes, is_short, rate);
                tokio::select! {
                    biased;
                    () = engine.stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
    }

    /// One window of each volume that wants it and that nobody writes to. Returns the bytes written, and
    /// whether the stores are short of room.
    async fn defragment_some(self: &Arc<Self>, book: &mut Book, quiet: Duration) -> (u64, bool) {
        let volumes = self.table.all();
        book.retain(|key, _| volumes.iter().any(|open| (open.id, open.generation) == *key));
        let mut bytes = 0;
        for volume in volumes {
            let now = Instant::now();
            let seen = look(book, &volume, now);
            if now < seen.rest_until || now < seen.quiet_since + quiet {
                continue;
            }
            if self.stop.is_cancelled() || self.takes_work().is_err() {
                return (bytes, false);
            }
            let Some(window) = volume.state().fragments.take() else { continue };
            if !self.has_room().await {
                volume.state().fragments.put_back(window);
                return (bytes, true);
            }
            // In a task of its own: a stop waits for it, and nothing cuts it short.
            let engine = Arc::clone(self);
            let of = Arc::clone(&volume);
            let span = crate::TRACER
                .entry("defragment", "")
                .with("volume", &volume.name)
                .with("offset", window.start.0 * BLOCK_BYTES);
            let work = async move {
                let work = span.clone().scope(engine.defragment(&of, window)).await;
                if let Err(failure) = &work {
                    span.fail(&failure.detail);
                }
                work
            };
            let left = self.tasks.spawn(work).await.unwrap_or_else(|_| Err(Failure::task_lost()));
            match left {
                Ok(Left::Fine) => {}
                Ok(Left::Busy) => volume.state().fragments.put_back(window),
                Ok(Left::Better(blocks)) => {
                    self.metrics.defragmented_blocks.add(blocks);
                    bytes += blocks * BLOCK_BYTES;
                }
                Ok(Left::NoBetter(blocks)) => {
                    self.metrics.defragmented_blocks.add(blocks);
                    bytes += blocks * BLOCK_BYTES;
                    self.rest(&volume, seen);
                    tracing::debug!(volume = %volume.name, "free space lies in pieces, too");
                }
                Err(failure) => {
                    self.rest(&volume, seen);
                    tracing::debug!(
                        volume = %volume.name, lblk = window.start.0, error = %failure,
                        "a window could not be written anew"
                    );
                }
            }
        }
        (bytes, false)
    }

    fn rest(&self, volume: &Volume, seen: &mut Seen) {
        self.metrics.defragment_missed.inc();
        seen.rest_until = Instant::now() + REST;
        volume.state().fragments.clear();
    }

    /// Whether no store is short of free blocks.
    async fn has_room(&self) -> bool {
        let call =
            |mut client: Client| async move { client.list_stores(ListStoresRequest {}).await };
        let Ok(list) = self.conversion.call(self.deadline(), call).await else { return false };
        list.stores.iter().all(|store| store.free_blocks > store.capacity_blocks / FREE_PART)
    }

    async fn defragment(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        window: LblkRange,
    ) -> Result<Left, Failure> {
        let deadline = self.deadline().min(Instant::now() + PATIENCE);
        let mut held = volume.locks.acquire(window);
        if held.held().now_or_never().is_none() {
            return Ok(Left::Busy);
        }
        let held = (!is_planted(Bug::DefragmentUnlocked)).then_some(held);
        let (end, is_dirty) = {
            let state = volume.state();
            (state.view.mapped_end(), state.dirty.touches(window))
        };
        volume.usable()?;
        if is_dirty {
            return Ok(Left::Busy);
        }
        if end <= window.start.0 {
            return Ok(Left::Fine);
        }
        let window = LblkRange { len: window.len.min(end - window.start.0), ..window };
        let before = self.layout(volume, window, deadline).await?;
        if !before.is_worth_it() {
            return Ok(Left::Fine);
        }
        let what = self.mapped_data(volume, window, deadline).await?;
        let blocks = (what.1.len() / BLOCK_SIZE) as u64;
        if blocks == 0 {
            return Ok(Left::Fine);
        }
        // No older version of a block may come back from the cache log.
        self.forget(volume, window, deadline).await?;
        self.write_anew(volume, window, what, deadline).await?;
        let after = self.layout(volume, window, deadline).await?;
        drop(held);
        let is_better = after.is_better_than(before);
        Ok(if is_better { Left::Better(blocks) } else { Left::NoBetter(blocks) })
    }

    /// The blocks of a window that have data, and their data.
    async fn mapped_data(
        &self,
        volume: &Arc<Volume>,
        window: LblkRange,
        deadline: Instant,
    ) -> Result<(Vec<LblkRange>, Bytes), Failure> {
        let mut runs = Vec::new();
        let mut whole = BytesMut::with_capacity(window.len as usize * BLOCK_SIZE);
        for run in self.read_blocks(volume, window, deadline).await? {
            let Piece::Data(data) = &run.piece else { continue };
            whole.extend_from_slice(data);
            runs.push(run.range);
        }
        Ok((joined(runs), whole.freeze()))
    }

    /// How a window lies now, as conversion says.
    async fn layout(
        &self,
        volume: &Arc<Volume>,
        window: LblkRange,
        deadline: Instant,
    ) -> Result<Layout, Failure> {
        // Kept alive, so that no block moves on between the two looks of one read.
        let _registered = volume.read_begins();
        let (_, _, map) = self.learn(volume, window, deadline).await?;
        let written: Vec<(u64, Vec<Place>)> =
            map.iter().filter_map(|part| places_in(part, window)).collect();
        Ok(Layout::of(written.iter().map(|(blocks, places)| (*blocks, &places[..]))))
    }
}

/// Pause after a look at the volumes in which so many bytes were written, at so many bytes a second.
fn pause_after(bytes: u64, is_short: bool, rate: u64) -> Duration {
    let paced = Duration::from_micros(bytes.saturating_mul(1_000_000) / rate);
    match (is_short, bytes) {
        (true, _) => paced.max(SHORT_REST),
        (false, 0) => LOOK,
        (false, _) => paced,
    }
}

/// The part of an extent in a window: how many blocks, and where each copy begins.
fn places_in((range, extent): &Part<Arc<Extent>>, window: LblkRange) -> Option<(u64, Vec<Place>)> {
    let part = range.intersection(window)?;
    let extent = extent.as_ref()?;
    let skip = part.start.0 - extent.lblk;
    let places = extent.places.iter();
    let places =
        places.map(|place| Place { store: StoreId(place.store), pblk: Pblk(place.pblk + skip) });
    Some((part.len, places.collect()))
}

/// Looks whether somebody has written since the last look.
fn look<'a>(book: &'a mut Book, volume: &Volume, now: Instant) -> &'a mut Seen {
    let writes = volume.writes.count();
    let is_busy = !volume.locks.is_empty() || !volume.state().dirty.is_clean();
    let seen = book.entry((volume.id, volume.generation)).or_insert(Seen {
        writes,
        quiet_since: now,
        rest_until: now,
    });
    if is_busy || seen.writes != writes {
        seen.writes = writes;
        seen.quiet_since = now;
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_that_are_short_of_room_are_left_alone_for_a_while() {
        const MIB: u64 = 1 << 20;
        assert_eq!(pause_after(0, false, MIB), LOOK);
        assert_eq!(pause_after(2 * MIB, false, MIB), Duration::from_secs(2));
        assert_eq!(pause_after(0, true, MIB), SHORT_REST);
        assert_eq!(pause_after(2 * MIB, true, MIB), SHORT_REST);
        assert_eq!(pause_after(90 * MIB, true, MIB), Duration::from_secs(90));
    }
}
