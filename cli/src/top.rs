//! `endio top`: rates and latencies of volumes and block-stores, again and again.
//!
//! On a terminal it takes the screen and is left with q, Esc or Ctrl-C. Into a pipe it prints one
//! frame after the other (with `--json` one line each), so that it can be recorded.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use crossterm::{
    cursor,
    event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    execute, terminal,
};
use endio_api::writeback::StatusResponse;
use endio_types::{BLOCK_BYTES, Reason};
use serde_json::{Value, json};

use crate::{
    args::TopArgs,
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{Output, Table, human},
    status::ask,
};

/// Rows of each table where there is no terminal that says how many fit.
const ROWS_MAX: usize = 50;
/// Lines of a frame that are no rows of its two tables.
const OTHER_LINES: usize = 8;

/// Counters of one kind of request: how many, bytes, microseconds.
type Counters = [u64; 3];

/// What is shown of one volume or store.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rates {
    writes: Rate,
    reads: Rate,
}

/// Requests of one kind between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rate {
    per_s: f64,
    bytes_per_s: f64,
    /// Mean time of one; `None`: there was none.
    mean_us: Option<f64>,
}

/// Counters of everything at one moment, by the name that is shown.
#[derive(Debug, Default)]
struct Sample {
    volumes: BTreeMap<String, [Counters; 2]>,
    stores: BTreeMap<u32, [Counters; 2]>,
}

impl Sample {
    fn of(status: &StatusResponse) -> Self {
        let volumes = status.volumes.iter().map(|volume| {
            let writes = [volume.writes, volume.written_bytes, volume.write_us];
            (volume.name.clone(), [writes, [volume.reads, volume.read_bytes, volume.read_us]])
        });
        let stores = status.stores.iter().filter_map(|store| {
            let (id, it) = (store.store.as_ref()?.id, store.answer.as_ref()?);
            let writes = [it.segments, it.written_blocks * BLOCK_BYTES, it.write_us];
            Some((id, [writes, [it.reads, it.read_blocks * BLOCK_BYTES, it.read_us]]))
        });
        Self { volumes: volumes.collect(), stores: stores.collect() }
    }
}

/// What happened between two looks. Something that started anew counts from zero.
fn rates(before: Option<&[Counters; 2]>, now: &[Counters; 2], seconds: f64) -> Rates {
    let zero = [[0; 3]; 2];
    let before = before.unwrap_or(&zero);
    let rate = |kind: usize| {
        let restarted = now[kind][0] < before[kind][0];
        let base = if restarted { [0; 3] } else { before[kind] };
        #[allow(clippy::cast_precision_loss)] // for people
        let [count, bytes, us] = [0, 1, 2].map(|n| now[kind][n].saturating_sub(base[n]) as f64);
        Rate {
            per_s: count / seconds,
            bytes_per_s: bytes / seconds,
            mean_us: (count > 0.0).then(|| us / count),
        }
    };
    Rates { writes: rate(0), reads: rate(1) }
}

/// One picture.
#[derive(Debug)]
struct Frame<'a> {
    status: &'a StatusResponse,
    volumes: Vec<(String, Rates)>,
    stores: Vec<(u32, Rates)>,
}

impl<'a> Frame<'a> {
    fn new(before: &Sample, now: &Sample, status: &'a StatusResponse, seconds: f64) -> Self {
        let seconds = seconds.max(0.001);
        let volumes = now.volumes.iter().map(|(name, counters)| {
            (name.clone(), rates(before.volumes.get(name), counters, seconds))
        });
        let mut volumes: Vec<_> = volumes.collect();
        // The busiest first; the same order where nothing differs.
        let load = |rates: &Rates| rates.writes.per_s + rates.reads.per_s;
        volumes.sort_by(|(_, a), (_, b)| load(b).total_cmp(&load(a)));
        let stores = now.stores.iter();
        let stores =
            stores.map(|(id, counters)| (*id, rates(before.stores.get(id), counters, seconds)));
        Self { status, volumes, stores: stores.collect() }
    }

    fn json(&self) -> Value {
        let rate = |rate: Rate| {
            json!({
                "per_s": rate.per_s, "bytes_per_s": rate.bytes_per_s, "mean_us": rate.mean_us,
            })
        };
        let volumes = self.volumes.iter().map(|(name, rates)| {
            json!({ "name": name, "writes": rate(rates.writes), "reads": rate(rates.reads) })
        });
        let stores = self.stores.iter().map(|(id, rates)| {
            json!({ "id": id, "writes": rate(rates.writes), "reads": rate(rates.reads) })
        });
        json!({
            "volumes": volumes.collect::<Vec<_>>(), "stores": stores.collect::<Vec<_>>(),
            "dirty_bytes": self.status.dirty_bytes,
            "io_ends": self.status.conversion.as_ref().map(|it| it.io_ends),
            "blocked": self.status.blocked.len(),
        })
    }

    /// At most `rows` rows of each table.
    fn text(&self, rows: usize) -> String {
        let status = self.status;
        let (io_ends, queued) = status
            .conversion
            .as_ref()
            .map_or((0, 0), |it| (it.io_ends, it.queued_direct + it.queued_write_out));
        let mut text = format!(
            "epoch {}  io_ends {io_ends}  to convert {queued}  dirty {}/{}  log {}  blocked {}\n\n",
            status.cluster_epoch,
            human(status.dirty_bytes),
            human(status.dirty_bytes_max),
            human(status.log_bytes),
            status.blocked.len(),
        );
        let name = |(name, rates): &(String, Rates)| (name.clone(), *rates);
        text.push_str(&table("VOLUME", self.volumes.iter().map(name), rows));
        text.push('\n');
        let name = |(id, rates): &(u32, Rates)| (format!("store {id}"), *rates);
        text.push_str(&table("STORE", self.stores.iter().map(name), rows));
        if let Some(first) = status.blocked.first() {
            let reason = Reason::from_wire(first.reason).map_or("", Reason::name);
            text.push_str(&format!("\nBLOCKED {}: {reason}: {}\n", first.what, first.message));
        }
        text
    }
}

fn table(what: &str, all: impl ExactSizeIterator<Item = (String, Rates)>, rows: usize) -> String {
    let heads = [what, "WRITE/s", "WRITE B/s", "MEAN ms", "READ/s", "READ B/s", "MEAN ms"];
    let mut table = Table::new(&heads);
    let more = all.len().saturating_sub(rows);
    for (name, rates) in all.take(rows) {
        let mut cells = vec![name];
        for rate in [rates.writes, rates.reads] {
            cells.push(format!("{:.0}", rate.per_s));
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rate is ≥ 0
            cells.push(human(rate.bytes_per_s as u64));
            cells.push(rate.mean_us.map_or("-".into(), |us| format!("{:.2}", us / 1_000.0)));
        }
        table.row(cells);
    }
    let mut text = table.render();
    if more > 0 {
        text.push_str(&format!("… and {more} more\n"));
    }
    text
}

/// The screen, given back when dropped.
struct Screen;

impl Screen {
    fn take() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // From here on `drop` gives it back, whatever happens.
        let screen = Self;
        execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }

    fn show(&self, text: &str) -> io::Result<()> {
        let (columns, lines) = terminal::size().unwrap_or((80, 24));
        let mut out = io::stdout().lock();
        execute!(out, cursor::MoveTo(0, 0), terminal::Clear(terminal::ClearType::All))?;
        for line in text.lines().take(lines.into()) {
            let line: String = line.chars().take(columns.into()).collect();
            // Raw mode: a line feed alone does not go back to the left.
            write!(out, "{line}\r\n")?;
        }
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = execute!(io::stdout(), terminal::LeaveAlternateScreen, cursor::Show);
        let _ = terminal::disable_raw_mode();
    }
}

/// Waits for the time to pass or for a key that ends it; `true`: it ends.
fn is_left_within(time: Duration) -> io::Result<bool> {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if !event::poll(left)? {
            return Ok(false);
        }
        if let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
        {
            let is_interrupt =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(true);
            }
        }
    }
}

/// `endio top`
pub(crate) async fn run(client: &Client, out: Output, args: TopArgs) -> Outcome {
    let failed = |error: io::Error| Failure::new(Exit::Failed, "show the screen", error);
    let iterations = if args.once { Some(1) } else { args.iterations };
    let is_screen =
        !out.json && !args.once && io::stdout().is_terminal() && io::stdin().is_terminal();
    // Before the screen is taken, so that a service that is away is told on a plain terminal.
    let mut status = ask(client).await?;
    let mut before = (Instant::now(), Sample::of(&status));
    let screen = if is_screen { Some(Screen::take().map_err(failed)?) } else { None };
    let mut shown = 0;
    while iterations.is_none_or(|most| shown < most) {
        let interval = args.interval;
        if screen.is_some() {
            let left = tokio::task::spawn_blocking(move || is_left_within(interval)).await;
            if left.map_err(|error| failed(error.into()))?.map_err(failed)? {
                break;
            }
        } else {
            tokio::time::sleep(interval).await;
        }
        let at = Instant::now();
        status = match ask(client).await {
            Ok(status) => status,
            // A service that restarts is something to look at, not a reason to leave.
            Err(failure) if iterations.is_none() => {
                show(screen.as_ref(), &format!("{failure}\n")).map_err(failed)?;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let now = Sample::of(&status);
        let frame = Frame::new(&before.1, &now, &status, (at - before.0).as_secs_f64());
        match &screen {
            Some(screen) => {
                let lines: usize = terminal::size().map_or(24, |(_, lines)| lines).into();
                let rows = (lines.saturating_sub(OTHER_LINES) / 2).max(1);
                screen.show(&frame.text(rows)).map_err(failed)?;
            }
            None => out.print(&frame.json(), || format!("{}\n", frame.text(ROWS_MAX)))?,
        }
        before = (at, now);
        shown += 1;
    }
    Ok(())
}

fn show(screen: Option<&Screen>, text: &str) -> io::Result<()> {
    match screen {
        Some(screen) => screen.show(text),
        None => io::stderr().write_all(text.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use endio_api::writeback::VolumeStatus;

    use super::*;

    #[test]
    fn rates_are_what_happened_between_two_looks_and_restarts_count_from_zero() {
        let before = [[100, 1_000, 50], [7, 70, 7]];
        let now = [[300, 5_000, 450], [2, 20, 8]];
        let Rates { writes, reads } = rates(Some(&before), &now, 2.0);
        assert_eq!(writes, Rate { per_s: 100.0, bytes_per_s: 2_000.0, mean_us: Some(2.0) });
        assert_eq!(reads, Rate { per_s: 1.0, bytes_per_s: 10.0, mean_us: Some(4.0) });
        assert_eq!(rates(Some(&now), &now, 1.0).writes.mean_us, None);
    }

    #[test]
    fn the_busiest_volume_comes_first_and_what_does_not_fit_is_counted() {
        let volume =
            |name: &str, writes| VolumeStatus { name: name.into(), writes, ..<_>::default() };
        let volumes = vec![volume("a", 1), volume("b", 9), volume("c", 5)];
        let status = StatusResponse { volumes, ..StatusResponse::default() };
        let now = Sample::of(&status);
        let frame = Frame::new(&Sample::default(), &now, &status, 1.0);
        let text = frame.text(2);
        let at = |name: &str| text.find(&format!("\n{name} "));
        assert!(at("b") < at("c") && at("b").is_some() && at("a").is_none(), "{text}");
        assert!(text.contains("… and 1 more"), "{text}");
        assert_eq!(frame.json()["volumes"][0]["name"], "b");
    }
}
