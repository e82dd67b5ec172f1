//! Simulated time waits for the threads of the services.
//!
//! Writers, flushers and committers are threads of the operating system: simulated time knows
//! nothing of them and would run ahead while they work. So each step of the simulation begins only
//! when all of them sleep, as the kernel tells (`/proc/self/task/*/stat`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

/// Longest wait for threads that do not come to rest; then simulated time goes on.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks.
const LOOK: Duration = Duration::from_micros(50);

/// Looks at the other threads of this process.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    threads: BTreeMap<String, File>,
    own: String,
    /// Waits that were given up.
    pub(crate) overruns: u64,
}

impl Pace {
    pub(crate) fn new() -> Self {
        let own = fs::read_link("/proc/thread-self").unwrap_or_default();
        let own = own.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self { own, ..Self::default() }
    }

    /// Waits until every other thread sleeps.
    pub(crate) fn rest(&mut self) {
        let began = Instant::now();
        while !self.is_at_rest() {
            if began.elapsed() > WAIT_MAX {
                self.overruns += 1;
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn is_at_rest(&mut self) -> bool {
        let Ok(tasks) = fs::read_dir("/proc/self/task") else { return true };
        let names = tasks.flatten().map(|task| task.file_name().to_string_lossy().into_owned());
        let mut known = std::mem::take(&mut self.threads);
        let mut is_at_rest = true;
        for name in names.filter(|name| *name != self.own) {
            let file = match known.remove(&name) {
                Some(file) => file,
                // A thread that ended meanwhile works no more.
                None => match File::open(format!("/proc/self/task/{name}/stat")) {
                    Ok(file) => file,
                    Err(_) => continue,
                },
            };
            is_at_rest &= sleeps(&file);
            self.threads.insert(name, file);
        }
        is_at_rest
    }
}

fn sleeps(stat: &File) -> bool {
    let mut text = [0; 64];
    let Ok(length) = stat.read_at(&mut text, 0) else { return true };
    // `ID (NAME) STATE …`; a name has at most 15 bytes and may contain anything.
    let text = &text[..length];
    let state = text.iter().rposition(|byte| *byte == b')').and_then(|at| text.get(at + 2));
    !matches!(state, Some(b'R' | b'D'))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_thread_that_works_is_waited_for() {
        let flags: [Arc<AtomicBool>; 2] = Default::default();
        let [begun, done] = flags.clone();
        let worker = std::thread::spawn(move || {
            begun.store(true, Ordering::SeqCst);
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(100) {
                std::hint::spin_loop();
            }
            done.store(true, Ordering::SeqCst);
        });
        let [begun, done] = flags;
        while !begun.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
        }
        Pace::new().rest();
        assert!(done.load(Ordering::SeqCst));
        worker.join().expect("the thread ends");
    }
}
