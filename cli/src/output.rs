//! Printing: JSON objects for programs, tables for people.

use std::io::{self, Write as _};

use endio_api::{
    common::{Extent, ExtentState},
    conversion::{IoEnd, Lane, Store, Volume},
};
use endio_types::{BLOCK_BYTES, ByteSize};
use serde_json::{Value, json};

use crate::failure::{Exit, Failure, Outcome};

/// Where answers go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub(crate) json: bool,
}

impl Output {
    /// Prints one answer: `value` as a line of JSON, or `text`.
    ///
    /// # Errors
    /// Standard output is closed.
    pub(crate) fn print(self, value: &Value, text: impl FnOnce() -> String) -> Outcome {
        let mut line = if self.json { value.to_string() } else { text() };
        if !line.is_empty() && !line.ends_with('\n') {
            line.push('\n');
        }
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| Failure::new(Exit::Failed, "print the answer", error))
    }
}

/// A table with columns as wide as needed; numbers right, text left.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|name| (*name).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, one line for each row.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
        let right: Vec<bool> = (0..columns).map(|c| self.is_numeric(c)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                if column > 0 {
                    line.push_str("  ");
                }
                if right[column] {
                    line.push_str(&pad);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&pad);
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self.rows.iter().skip(1).filter_map(|row| row.get(column)).peekable();
        cells.peek().is_some()
            && cells.all(|cell| cell.starts_with(|c: char| c.is_ascii_digit()) || cell == "-")
    }
}

/// A size for people: exact below 10 KiB and where it is a whole unit, else with one decimal.
pub(crate) fn human(bytes: u64) -> String {
    let mut exact = ByteSize(bytes).to_string();
    if bytes > 0 && exact.ends_with(|last: char| last.is_ascii_digit()) {
        exact.push('B');
    }
    if bytes < 10 * 1024 || exact.trim_end_matches(char::is_alphabetic).len() <= 4 {
        return exact;
    }
    for (name, shift) in [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift {
            #[allow(clippy::cast_precision_loss)] // one decimal is shown
            return format!("{:.1}{name}", bytes as f64 / (1u64 << shift) as f64);
        }
    }
    exact
}

fn blocks(blocks: u64) -> String {
    human(blocks.saturating_mul(BLOCK_BYTES))
}

/// A volume as JSON.
pub(crate) fn volume_json(volume: &Volume) -> Value {
    json!({
        "id": volume.id, "name": volume.name, "size_bytes": volume.size_bytes,
        "replicas": volume.replicas, "in_place": volume.in_place, "growable": volume.growable,
        "generation": volume.generation, "map_version": volume.map_version,
        "mapped_blocks": volume.mapped_blocks, "owner": volume.owner,
    })
}

/// Volumes as a table.
pub(crate) fn volume_table(volumes: &[Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes; create one with `endio volume create NAME --size 8GiB`".into();
    }
    let mut table =
        Table::new(&["NAME", "SIZE", "USED", "REPLICAS", "GENERATION", "KIND", "OPEN IN"]);
    for volume in volumes {
        let kind = match (volume.in_place, volume.growable) {
            (false, false) => "-",
            (true, false) => "in-place",
            (false, true) => "growable",
            (true, true) => "in-place,growable",
        };
        let owner = if volume.owner.is_empty() { "-" } else { &volume.owner };
        table.row(vec![
            volume.name.clone(),
            human(volume.size_bytes),
            blocks(volume.mapped_blocks),
            volume.replicas.to_string(),
            volume.generation.to_string(),
            kind.into(),
            owner.into(),
        ]);
    }
    table.render()
}

/// The word for a state.
pub(crate) fn state_word(state: i32) -> &'static str {
    match ExtentState::try_from(state) {
        Ok(ExtentState::Hole) => "hole",
        Ok(ExtentState::Delayed) => "delayed",
        Ok(ExtentState::Unwritten) => "unwritten",
        Ok(ExtentState::Written) => "written",
        Ok(ExtentState::Unspecified) | Err(_) => "unknown",
    }
}

/// An extent as JSON.
pub(crate) fn extent_json(extent: &Extent) -> Value {
    let places: Vec<Value> =
        extent.places.iter().map(|p| json!({ "store": p.store, "pblk": p.pblk })).collect();
    json!({
        "lblk": extent.lblk, "blocks": extent.blocks, "state": state_word(extent.state),
        "offset_bytes": extent.lblk.saturating_mul(BLOCK_BYTES),
        "length_bytes": u64::from(extent.blocks) * BLOCK_BYTES,
        "places": places,
    })
}

/// Extents as a table.
pub(crate) fn extent_table(extents: &[Extent]) -> String {
    let mut table = Table::new(&["OFFSET", "LENGTH", "LBLK", "BLOCKS", "STATE", "PLACES"]);
    for extent in extents {
        let places: Vec<String> = extent
            .places
            .iter()
            .map(|p| {
                let last = p.pblk.saturating_add(u64::from(extent.blocks)).saturating_sub(1);
                format!("store {}: {}..={last}", p.store, p.pblk)
            })
            .collect();
        table.row(vec![
            extent.lblk.saturating_mul(BLOCK_BYTES).to_string(),
            human(u64::from(extent.blocks) * BLOCK_BYTES),
            extent.lblk.to_string(),
            extent.blocks.to_string(),
            state_word(extent.state).into(),
            places.join(", "),
        ]);
    }
    table.render()
}

/// A store as JSON.
pub(crate) fn store_json(store: &Store) -> Value {
    json!({
        "id": store.id, "uuid": store.uuid, "url": store.url, "incarnation": store.incarnation,
        "capacity_blocks": store.capacity_blocks, "free_blocks": store.free_blocks,
        "mapped_blocks": store.mapped_blocks, "reserved_blocks": store.reserved_blocks,
        "quarantined_blocks": store.quarantined_blocks, "live": store.live,
        "lease_left_ms": store.lease_left_ms,
    })
}

/// Stores as a table.
pub(crate) fn store_table(stores: &[Store]) -> String {
    if stores.is_empty() {
        return "no block-store has ever registered; `endio up` starts one".into();
    }
    let mut table = Table::new(&[
        "ID",
        "LIVE",
        "CAPACITY",
        "FREE",
        "MAPPED",
        "RESERVED",
        "QUARANTINED",
        "LEASE LEFT",
        "URL",
    ]);
    for store in stores {
        table.row(vec![
            store.id.to_string(),
            if store.live { "yes" } else { "NO" }.into(),
            blocks(store.capacity_blocks),
            blocks(store.free_blocks),
            blocks(store.mapped_blocks),
            blocks(store.reserved_blocks),
            blocks(store.quarantined_blocks),
            format!("{} ms", store.lease_left_ms),
            store.url.clone(),
        ]);
    }
    table.render()
}

/// The word for a lane.
fn lane_word(lane: i32) -> &'static str {
    match Lane::try_from(lane) {
        Ok(Lane::WriteOut) => "write-out",
        Ok(Lane::Direct) => "direct",
        Ok(Lane::Unspecified) | Err(_) => "unknown",
    }
}

/// An io_end as JSON.
pub(crate) fn io_end_json(io_end: &IoEnd) -> Value {
    let held: Vec<Value> = io_end
        .held
        .iter()
        .map(|token| {
            json!({
                "segment": token.segment, "holder": token.holder,
                "lease_left_ms": token.lease_left_ms, "pblk": token.pblk, "blocks": token.blocks,
            })
        })
        .collect();
    json!({
        "id": io_end.id, "volume": io_end.volume, "state": io_end.state,
        "lane": lane_word(io_end.lane), "lblk": io_end.lblk, "blocks": io_end.blocks,
        "attempt": io_end.attempt, "age_ms": io_end.age_ms, "held": held,
        "trace_id": io_end.trace_id,
    })
}

/// io_ends with the tokens that are still held.
pub(crate) fn io_end_table(io_ends: &[IoEnd], total: u64) -> String {
    if io_ends.is_empty() {
        return "no write is in flight".into();
    }
    let mut table = Table::new(&[
        "IO_END", "VOLUME", "STATE", "LANE", "LBLK", "BLOCKS", "ATTEMPT", "AGE", "HELD BY",
    ]);
    for io_end in io_ends {
        let held: Vec<String> = io_end
            .held
            .iter()
            .map(|token| {
                let name = match token.segment {
                    0 => "submitter".to_owned(),
                    n => format!("segment {n}"),
                };
                format!("{name}: {} for {} ms", token.holder, token.lease_left_ms)
            })
            .collect();
        table.row(vec![
            io_end.id.to_string(),
            io_end.volume.to_string(),
            io_end.state.clone(),
            lane_word(io_end.lane).into(),
            io_end.lblk.to_string(),
            io_end.blocks.to_string(),
            io_end.attempt.to_string(),
            format!("{} ms", io_end.age_ms),
            held.join("; "),
        ]);
    }
    let mut text = table.render();
    let shown = io_ends.len() as u64;
    if total > shown {
        text.push_str(&format!("{} more; show them with --limit\n", total - shown));
    }
    text
}

#[cfg(test)]
mod tests {
    use endio_api::common::Place;

    use super::*;

    #[test]
    fn numbers_stand_right_and_text_left_in_a_table() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(vec!["a".into(), "4096".into()]);
        table.row(vec!["longer".into(), "8".into()]);
        assert_eq!(table.render(), "NAME    SIZE\na       4096\nlonger     8\n");
    }

    #[test]
    fn sizes_for_people_are_exact_or_rounded_to_one_decimal() {
        assert_eq!(human(0), "0");
        assert_eq!(human(8 << 30), "8GiB");
        assert_eq!(human(4097), "4097B");
        assert_eq!(human((1 << 30) + (1 << 29) + 1), "1.5GiB");
    }

    #[test]
    fn an_extent_names_each_replica_with_its_last_block() {
        let extent = Extent {
            lblk: 2,
            blocks: 3,
            state: ExtentState::Written as i32,
            places: vec![Place { store: 1, pblk: 10 }, Place { store: 2, pblk: 0 }],
            crc32c: vec![],
        };
        let text = extent_table(std::slice::from_ref(&extent));
        assert!(text.contains("written"), "{text}");
        assert!(text.contains("store 1: 10..=12, store 2: 0..=2"), "{text}");
        assert_eq!(extent_json(&extent)["offset_bytes"], 8192);
    }

    #[test]
    fn cut_off_lists_say_how_much_is_missing() {
        let io_end = IoEnd { id: 7, state: "leased".into(), ..IoEnd::default() };
        assert!(io_end_table(&[io_end], 3).contains("2 more"));
    }
}
