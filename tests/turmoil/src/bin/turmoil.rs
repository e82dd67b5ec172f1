//! Replays one seed with its events, or runs many.

use std::time::Instant;

use clap::Parser;
use endio_turmoil_tests::{Report, run};

/// The real services over a simulated network.
#[derive(Parser)]
struct Args {
    /// Replay this seed and print its events.
    #[arg(long)]
    seed: Option<u64>,
    /// Run seeds FROM..TO, the last one not included.
    #[arg(long, value_parser = parse_range, default_value = "0..100")]
    seeds: (u64, u64),
    /// End after so many failures.
    #[arg(long, default_value_t = 5)]
    failures: usize,
    /// Plant this bug of the pure crates first (needs the feature `planted-bugs`).
    #[arg(long)]
    plant: Option<String>,
    /// Print each run.
    #[arg(long)]
    verbose: bool,
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("FROM..TO")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok((number(from)?, number(to)?))
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if let Some(name) = &args.plant
        && !plant(name)
    {
        eprintln!("{name}: no such bug in this build");
        return std::process::ExitCode::FAILURE;
    }
    let failed = match args.seed {
        Some(seed) => replay(seed),
        None => many(&args),
    };
    if failed { std::process::ExitCode::FAILURE } else { std::process::ExitCode::SUCCESS }
}

/// `false`: there is no such bug here.
fn plant(name: &str) -> bool {
    #[cfg(feature = "planted-bugs")]
    {
        use endio_types::planted::{Bug, plant};
        let bug = Bug::ALL.iter().copied().find(|bug| format!("{bug:?}") == name);
        plant(bug);
        bug.is_some()
    }
    #[cfg(not(feature = "planted-bugs"))]
    {
        let _ = name;
        false
    }
}

fn tell(report: &Report, seconds: f64) {
    let Report { seed, simulated_ms, requests, retries, takeovers, faults, overruns, .. } = report;
    println!(
        "seed {seed}: {simulated_ms} ms simulated in {seconds:.1} s, {requests} requests, \
         {retries} sent again, {takeovers} takeovers, {faults} faults, {overruns} overruns"
    );
}

fn replay(seed: u64) -> bool {
    let began = Instant::now();
    let report = run(seed);
    for line in &report.log {
        println!("{line}");
    }
    tell(&report, began.elapsed().as_secs_f64());
    match &report.broken {
        Some(broken) => println!("BROKEN {broken}"),
        None => println!("every promise was kept"),
    }
    report.broken.is_some()
}

fn many(args: &Args) -> bool {
    let (from, to) = args.seeds;
    let (mut failures, mut seeds) = (Vec::new(), 0_u64);
    let mut sums = [0_u64; 5];
    let began = Instant::now();
    for seed in from..to {
        let run_began = Instant::now();
        let report = run(seed);
        seeds += 1;
        let Report { simulated_ms, requests, retries, takeovers, faults, .. } = report;
        for (sum, more) in sums.iter_mut().zip([simulated_ms, requests, retries, takeovers, faults])
        {
            *sum += more;
        }
        if args.verbose {
            tell(&report, run_began.elapsed().as_secs_f64());
        }
        if let Some(broken) = &report.broken {
            println!("seed {seed}: {broken}");
            failures.push(seed);
            if failures.len() >= args.failures {
                break;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let [simulated_ms, requests, retries, takeovers, faults] = sums;
    println!(
        "{seeds} seeds in {seconds:.1} s: {} s simulated, {requests} requests, {retries} sent again, \
         {takeovers} takeovers, {faults} faults; broken: {failures:?}",
        simulated_ms / 1000
    );
    if let Some(seed) = failures.first() {
        println!(
            "replay: cargo run -p endio-turmoil-tests --release --bin turmoil -- --seed {seed}"
        );
    }
    !failures.is_empty()
}
