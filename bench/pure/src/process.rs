//! What this process has used, as the kernel counts it.

use std::fs;

use anyhow::{Context as _, Result};

/// Bytes of memory that are resident.
///
/// # Errors
/// There is no such file on this system.
pub fn resident_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmRSS")?;
    Ok(kib.parse::<u64>()? * 1024)
}

/// Nanoseconds that all living threads have run.
///
/// # Errors
/// As [`resident_bytes`].
pub fn cpu_ns() -> Result<u64> {
    let mut total = 0;
    for task in fs::read_dir("/proc/self/task")? {
        // A thread may end between the listing and the look.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total += text.split_whitespace().next().context("empty schedstat")?.parse::<u64>()?;
    }
    Ok(total)
}
