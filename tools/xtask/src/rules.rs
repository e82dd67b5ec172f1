//! The rules, each with the sentence that is printed when it is broken.

use std::fmt;

use crate::source::{code, lines_with};
use crate::tree::{Crate, File};

/// Which of our crates each crate may use, apart from in its tests. ARCHITECTURE.md draws it: arrows
/// point down only. What lies in `tests/` may use everything.
const LAYERS: &[(&str, &[&str])] = &[
    ("crates/types", &[]),
    ("crates/failpoints", &[]),
    ("crates/state-machine", &["types"]),
    ("crates/api", &["types", "state-machine", "chassis"]),
    ("crates/store", &["types", "state-machine", "failpoints"]),
    ("crates/chassis", &[]),
    ("crates/nbd", &[]),
    ("crates/pki", &[]),
    ("crates/testkit", &["types", "state-machine", "api", "store", "chassis", "pki"]),
    ("services/conversion", SERVICE),
    ("services/block-store", SERVICE),
    (
        "services/writeback",
        &["types", "state-machine", "api", "store", "chassis", "nbd", "failpoints"],
    ),
    ("bench", &["types", "api", "chassis"]),
    ("bench/pure", &["types", "state-machine", "api", "store", "nbd"]),
    (
        "cli",
        &[
            "types",
            "state-machine",
            "api",
            "store",
            "chassis",
            "conversion",
            "block-store",
            "writeback",
            "bench",
            "nbd",
            "pki",
        ],
    ),
    ("tools/xtask", &[]),
];
const SERVICE: &[&str] = &["types", "state-machine", "api", "store", "chassis", "failpoints"];

const LAYERING: &str = "a crate uses only crates below it (tools/xtask/src/rules.rs, LAYERS)";
const NEVER_EACH_OTHER: &str =
    "services never use each other: they meet only through the clients of crates/api";
const TESTKIT: &str = "testkit is for tests: it stands only under [dev-dependencies]";
const LINTS: &str = "every crate takes the lints of the workspace ([lints] workspace = true)";
const MAIN: &str = "a service is a library: its main.rs only supplies it, in at most 40 lines";
const LENGTH: &str = "a file has at most 700 lines: cut it where its reader would";

const MAIN_LINES_MAX: usize = 40;
const FILE_LINES_MAX: usize = 700;
const FILE_LINES_WARN: usize = 600;

/// Words that only some folders may use.
struct Words {
    sentence: &'static str,
    /// Patterns in code, as whole words.
    words: &'static [&'static str],
    /// Names of packages.
    packages: &'static [&'static str],
    applies: fn(&str) -> bool,
    /// Files in the `tests` folder of a crate may do it: they feed the code, they are not it.
    spares_tests: bool,
}

const WORDS: &[Words] = &[
    Words {
        sentence: "only crates/store names sled: whoever asks for metadata asks its traits",
        words: &["sled::", "use sled", "extern crate sled"],
        packages: &["sled"],
        applies: |dir| dir != "crates/store",
        spares_tests: false,
    },
    Words {
        sentence: "the state machine is pure: no runtime, log, randomness, clock, file, socket, \
                   thread, or map whose order differs from run to run",
        words: &[
            "tokio",
            "tracing",
            "rand",
            "futures",
            "std::time",
            "std::fs",
            "std::net",
            "std::env",
            "std::thread",
            "std::process",
            "SystemTime",
            "Instant::now",
            "HashMap",
            "HashSet",
            "RandomState",
        ],
        packages: &["tokio", "tracing", "rand", "futures-util", "tonic", "prost", "rustix"],
        applies: |dir| dir == "crates/state-machine" || dir == "crates/types",
        spares_tests: true,
    },
    Words {
        sentence: "leases and timeouts go by the monotonic clock: no service asks for the time of day",
        words: &["SystemTime", "UNIX_EPOCH", "chrono::", "clock_gettime", "ClockId::Realtime"],
        packages: &["chrono", "time", "jiff"],
        applies: |dir| dir.starts_with("services/"),
        spares_tests: true,
    },
    Words {
        sentence: "only crates/api generates and defines protobuf types",
        words: &["tonic::include_proto", "prost::Message)", "prost::Oneof", "prost::Enumeration"],
        packages: &["tonic-prost-build", "prost-build", "protox"],
        applies: |dir| dir != "crates/api",
        spares_tests: false,
    },
    Words {
        sentence: "storage and rules know no gRPC: crates/api and the services translate",
        words: &["tonic::", "endio_api::"],
        packages: &["tonic", "tonic-prost", "prost"],
        applies: |dir| dir == "crates/store",
        spares_tests: false,
    },
    Words {
        sentence: "every queue has a bound",
        words: &["unbounded_channel", "mpsc::unbounded", "UnboundedSender"],
        packages: &[],
        applies: |_| true,
        spares_tests: false,
    },
    Words {
        sentence: "every test runs, and says itself what it expects",
        words: &["#[ignore", "should_panic"],
        packages: &[],
        applies: |_| true,
        spares_tests: false,
    },
    Words {
        sentence: "what is committed is finished",
        words: &["todo!", "unimplemented!", "dbg!"],
        packages: &[],
        applies: |_| true,
        spares_tests: false,
    },
];

/// A broken rule and the place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    place: String,
    found: String,
    sentence: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n    rule: {}", self.place, self.found, self.sentence)
    }
}

/// What the rules say about a tree.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) violations: Vec<Violation>,
    pub(crate) warnings: Vec<String>,
}

impl Findings {
    pub(crate) fn add(
        &mut self,
        place: impl Into<String>,
        found: impl Into<String>,
        sentence: &'static str,
    ) {
        self.violations.push(Violation { place: place.into(), found: found.into(), sentence });
    }
}

/// Checks every rule on every crate.
pub(crate) fn find(crates: &[Crate]) -> Findings {
    let mut findings = Findings::default();
    for krate in crates {
        layers(krate, &mut findings);
        packages(krate, &mut findings);
        for file in &krate.files {
            words(krate, file, &mut findings);
            lengths(krate, file, &mut findings);
        }
    }
    findings
}

fn layers(krate: &Crate, findings: &mut Findings) {
    let place = format!("{}/Cargo.toml", krate.dir);
    let manifest = &krate.manifest;
    if !manifest.has_lints {
        findings.add(&place, "no [lints]", LINTS);
    }
    if krate.dir.starts_with("tests/") {
        return;
    }
    let Some((_, allowed)) = LAYERS.iter().find(|(dir, _)| *dir == krate.dir) else {
        findings.add(&place, format!("{} is not in LAYERS", manifest.name), LAYERING);
        return;
    };
    let is_service = |dir: &str, name: &str| dir.strip_prefix("services/") == Some(name);
    for dependency in &manifest.dependencies {
        let Some(name) = dependency.name.strip_prefix("endio-") else { continue };
        let found = format!("depends on {}", dependency.name);
        let names_service = LAYERS.iter().any(|(dir, _)| is_service(dir, name));
        if krate.dir.starts_with("services/") && names_service {
            findings.add(&place, found, NEVER_EACH_OTHER);
        } else if dependency.is_dev {
            // Tests may compose what the code may not.
        } else if name == "testkit" {
            findings.add(&place, found, TESTKIT);
        } else if !allowed.contains(&name) {
            findings.add(&place, found, LAYERING);
        }
    }
}

fn packages(krate: &Crate, findings: &mut Findings) {
    for rule in WORDS.iter().filter(|rule| (rule.applies)(&krate.dir)) {
        for dependency in &krate.manifest.dependencies {
            if rule.packages.contains(&dependency.name.as_str()) {
                let place = format!("{}/Cargo.toml", krate.dir);
                findings.add(place, format!("depends on {}", dependency.name), rule.sentence);
            }
        }
    }
}

fn words(krate: &Crate, file: &File, findings: &mut Findings) {
    let code = code(&file.text);
    let is_test = file.path.starts_with(&format!("{}/tests/", krate.dir));
    let applies = |rule: &&Words| (rule.applies)(&krate.dir) && !(is_test && rule.spares_tests);
    for rule in WORDS.iter().filter(applies) {
        for word in rule.words {
            for line in lines_with(&code, word) {
                let place = format!("{}:{line}", file.path);
                findings.add(place, format!("names `{word}`"), rule.sentence);
            }
        }
    }
}

fn lengths(krate: &Crate, file: &File, findings: &mut Findings) {
    let lines = file.text.lines().count();
    let is_service_main =
        krate.dir.starts_with("services/") && file.path == format!("{}/src/main.rs", krate.dir);
    if is_service_main && lines > MAIN_LINES_MAX {
        findings.add(&file.path, format!("{lines} lines"), MAIN);
    }
    if lines > FILE_LINES_MAX {
        findings.add(&file.path, format!("{lines} lines"), LENGTH);
    } else if lines > FILE_LINES_WARN {
        findings.warnings.push(format!("{}: {lines} lines of {FILE_LINES_MAX}", file.path));
    }
}

#[cfg(test)]
mod tests;
