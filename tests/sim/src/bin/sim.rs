//! Replays one seed with its events, or runs many.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use endio_sim_tests::{Report, run, run_full};

/// Deterministic simulation of endio's pure cores.
#[derive(Parser)]
struct Args {
    /// Replay this seed and print its events.
    #[arg(long)]
    seed: Option<u64>,
    /// Run seeds FROM..TO, the last one not included.
    #[arg(long, value_parser = parse_range, default_value = "0..1000")]
    seeds: (u64, u64),
    /// Threads; each runs seeds of its own.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// End after so many failures.
    #[arg(long, default_value_t = 5)]
    failures: usize,
    /// With hardly any room in the stores.
    #[arg(long)]
    full: bool,
}

impl Args {
    fn run(&self, seed: u64, keep_log: bool) -> Report {
        if self.full { run_full(seed, keep_log) } else { run(seed, keep_log) }
    }
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("FROM..TO")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok((number(from)?, number(to)?))
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    let failed = match args.seed {
        Some(seed) => replay(&args, seed),
        None => many(&args),
    };
    if failed { std::process::ExitCode::FAILURE } else { std::process::ExitCode::SUCCESS }
}

fn replay(args: &Args, seed: u64) -> bool {
    let report = args.run(seed, true);
    for line in &report.log {
        println!("{line}");
    }
    println!("seed {seed}: {} steps, hash {:016x}", report.steps, report.hash);
    match &report.broken {
        Some(broken) => println!("BROKEN {broken}"),
        None => println!("every promise was kept"),
    }
    report.broken.is_some()
}

fn many(args: &Args) -> bool {
    let (from, to) = args.seeds;
    let next = AtomicU64::new(from);
    let failures: Mutex<Vec<Report>> = Mutex::default();
    let sums: [AtomicU64; 7] = Default::default();
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let failed = failures.lock().map_or(0, |failures| failures.len());
                    if seed >= to || failed >= args.failures {
                        return;
                    }
                    let report = args.run(seed, false);
                    let Report { steps, messages, requests, judged, flips, zombies, .. } = report;
                    let more = [1, steps, messages, requests, judged, flips, zombies];
                    for (sum, more) in sums.iter().zip(more) {
                        sum.fetch_add(more, Ordering::Relaxed);
                    }
                    if let Some(broken) = &report.broken {
                        println!("seed {seed}: {broken}");
                        if let Ok(mut failures) = failures.lock() {
                            failures.push(report);
                        }
                    }
                }
            });
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let [seeds, steps, messages, requests, judged, flips, zombies] =
        sums.map(AtomicU64::into_inner);
    let each = |count: u64| count as f64 / seconds;
    println!(
        "{seeds} seeds in {seconds:.1} s: {:.0} seeds/s, {:.0} steps/s, {:.0} messages/s, \
         {requests} requests, {judged} cells judged, {flips} bits flipped, {zombies} zombies",
        each(seeds),
        each(steps),
        each(messages)
    );
    let failures = failures.into_inner().unwrap_or_default();
    let mut kinds: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for report in &failures {
        let broken = report.broken.as_deref().unwrap_or_default();
        let kind = broken.split(':').next().unwrap_or_default().to_owned();
        kinds.entry(kind).or_default().push(report.seed);
    }
    for (kind, seeds) in &kinds {
        println!("{kind}: seeds {seeds:?}");
    }
    if let Some(first) = failures.first() {
        let seed = first.seed;
        let full = if args.full { " --full" } else { "" };
        println!("replay: cargo run -p endio-sim-tests --release --bin sim --{full} --seed {seed}");
    }
    !failures.is_empty()
}
