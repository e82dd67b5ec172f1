//! What the environment says about each point, and how often each was passed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::{Bug, Point};

/// What happens at a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    Kill,
    Abort,
    Stop,
    Delay(u64),
    Error,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Rule {
    action: Action,
    /// The first hit that counts, from 1.
    from: u64,
    /// Of those, one in so many.
    one_in: u64,
}

struct Registry {
    rules: Vec<(Point, Rule)>,
    hits: Vec<AtomicU64>,
    planted: Vec<Bug>,
}

static REGISTRY: OnceLock<Registry> = OnceLock::new();

fn registry() -> &'static Registry {
    REGISTRY.get_or_init(|| {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let rules = parse(&variable("ENDIO_FAILPOINTS")).unwrap_or_else(|bad| refuse(&bad));
        let planted = planted(&variable("ENDIO_PLANTED")).unwrap_or_else(|bad| refuse(&bad));
        Registry { rules, hits: Point::ALL.iter().map(|_| AtomicU64::new(0)).collect(), planted }
    })
}

fn refuse(what: &str) -> ! {
    eprintln!("failpoints: {what}");
    std::process::exit(2)
}

/// Passes the point; `true`: it is to fail.
pub(crate) fn hit(point: Point) -> bool {
    let registry = registry();
    let hit = registry.hits[point as usize].fetch_add(1, Ordering::Relaxed) + 1;
    let mut is_failing = false;
    for (_, rule) in registry.rules.iter().filter(|(named, _)| *named == point) {
        if hit >= rule.from && (hit - rule.from).is_multiple_of(rule.one_in) {
            is_failing |= act(rule.action);
        }
    }
    is_failing
}

pub(crate) fn is_planted(bug: Bug) -> bool {
    registry().planted.contains(&bug)
}

fn act(action: Action) -> bool {
    match action {
        Action::Kill => {
            signal_self(Signal::KILL);
            // The signal is on its way: nothing more happens in this thread.
            loop {
                std::thread::park();
            }
        }
        Action::Abort => std::process::abort(),
        Action::Stop => signal_self(Signal::STOP),
        Action::Delay(ms) => std::thread::sleep(Duration::from_millis(ms)),
        Action::Error => return true,
    }
    false
}

fn signal_self(signal: Signal) {
    if let Err(error) = kill_process(getpid(), signal) {
        refuse(&format!("the process cannot signal itself: {error}"));
    }
}

fn parse(text: &str) -> Result<Vec<(Point, Rule)>, String> {
    text.split(';').filter(|part| !part.is_empty()).map(parse_one).collect()
}

fn parse_one(part: &str) -> Result<(Point, Rule), String> {
    let bad = |what: &str| format!("{part:?}: {what}");
    let (name, rest) = part.split_once('=').ok_or_else(|| bad("NAME=ACTION is expected"))?;
    let point = Point::named(name).ok_or_else(|| bad("no point has that name"))?;
    let number = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0);
    let (rest, one_in) = match rest.split_once('%') {
        Some((rest, text)) => (rest, number(text).ok_or_else(|| bad("% wants a number"))?),
        None => (rest, 1),
    };
    let (action, from) = match rest.split_once('@') {
        Some((rest, text)) => (rest, number(text).ok_or_else(|| bad("@ wants a number"))?),
        None => (rest, 1),
    };
    let action = match action {
        "kill" => Action::Kill,
        "abort" => Action::Abort,
        "stop" => Action::Stop,
        "error" => Action::Error,
        delay => {
            let ms = delay.strip_prefix("delay(").and_then(|rest| rest.strip_suffix(')'));
            Action::Delay(ms.and_then(number).ok_or_else(|| bad("no such action"))?)
        }
    };
    Ok((point, Rule { action, from, one_in }))
}

fn planted(text: &str) -> Result<Vec<Bug>, String> {
    let names = text.split(',').filter(|name| !name.is_empty());
    names.map(|name| Bug::named(name).ok_or_else(|| format!("no bug is named {name:?}"))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn rules_are_read_with_and_without_their_bounds() {
        let rules = parse("store-written=kill@3;conversion-turn=delay(20)%4").unwrap();
        let kill = Rule { action: Action::Kill, from: 3, one_in: 1 };
        let delay = Rule { action: Action::Delay(20), from: 1, one_in: 4 };
        assert_eq!(rules, [(Point::StoreWritten, kill), (Point::ConversionTurn, delay)]);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn what_is_misspelt_is_refused() {
        for bad in ["store-written", "no-such=kill", "store-written=die", "store-written=kill@0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(planted("no-such").is_err());
        assert_eq!(planted("loss-untold").unwrap(), [Bug::LossUntold]);
    }
}
