//! What a process has used, by `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// CPU time of all threads of `pid`, by the scheduler's own account (nanoseconds, not ticks).
pub fn cpu(pid: i32) -> Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let nanos: u64 = text.split_whitespace().next().context("schedstat is empty")?.parse()?;
        total += nanos;
    }
    Ok(Duration::from_nanos(total))
}

/// Resident memory of `pid` in bytes.
pub fn resident(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// The children of `pid`, which do the work where the process itself only watches over them (nginx).
pub fn children(pid: i32) -> Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_whitespace().map(|child| Ok(child.parse()?)).collect()
}

/// Binds all threads of processes to one CPU. What they start later stays there, too.
pub fn pin(pids: impl IntoIterator<Item = i32>, cpus: &str) -> Result<()> {
    for pid in pids {
        let done = std::process::Command::new("taskset").args(["-a", "-p", "-c", cpus, &pid.to_string()]).output()?;
        // Backends come and go.
        let gone = !fs::exists(format!("/proc/{pid}")).unwrap_or(false);
        ensure!(done.status.success() || gone, "{}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}
