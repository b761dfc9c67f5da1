//! How much memory there is, beside what the sessions that are allowed may take.
//!
//! A process in Rust ends when an allocation fails, and the kernel ends one that takes more than its control group may, with
//! every session that it has. So the bound has to be there before: `max_sessions`.

use std::fs;
use std::path::{Path, PathBuf};

/// What a session takes: about 2 KiB of the process while it is idle, two sockets in the kernel, and some of their buffers in use.
const SESSION: u64 = 16 << 10;

/// The same where TLS ends or begins here.
const TLS_SESSION: u64 = 64 << 10;

/// What `sessions` may need, in bytes.
pub fn needed(sessions: usize, tls: bool) -> u64 {
    (sessions as u64).saturating_mul(if tls { TLS_SESSION } else { SESSION })
}

/// What this process may take, in bytes: all of the machine's, or what its control groups (version 1 or 2) allow. `None`: not to be
/// found out. `root`: `/`.
pub fn limit(root: &Path) -> Option<u64> {
    let total = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| total(&text));
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().flat_map(|line| files(&root.join("sys/fs/cgroup"), line));
    let limits = limits.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.chain(total).min()
}

fn total(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?;
    kilobytes.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// The files that limit a control group, as `/proc/self/cgroup` names it, and those above it.
fn files(mounted: &Path, line: &str) -> Vec<PathBuf> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (dir, file) = match parts.next() {
        Some("") => (mounted.to_owned(), "memory.max"),
        Some(controllers) if controllers.split(',').any(|name| name == "memory") => {
            (mounted.join("memory"), "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let group = Path::new(parts.next().unwrap_or_default().trim_start_matches('/'));
    group.ancestors().map(|group| dir.join(group).join(file)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_all_limits_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = dir.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        assert_eq!(limit(dir.path()), None);
        write("proc/meminfo", "MemTotal:        8000 kB\nMemFree:  1 kB\n");
        assert_eq!(limit(dir.path()), Some(8_000 << 10));
        write("proc/self/cgroup", "0::/system.slice/trunkline-router.service\n");
        write("sys/fs/cgroup/system.slice/trunkline-router.service/memory.max", "max\n");
        assert_eq!(limit(dir.path()), Some(8_000 << 10));
        write("sys/fs/cgroup/system.slice/memory.max", "4096\n");
        assert_eq!(limit(dir.path()), Some(4096), "that of a group above it");
        write("proc/self/cgroup", "9:cpu:/a\n5:memory:/b\n");
        write("sys/fs/cgroup/memory/b/memory.limit_in_bytes", "2048\n");
        assert_eq!(limit(dir.path()), Some(2048));
        assert!(limit(Path::new("/")).is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn the_default_fits_a_small_machine() {
        assert_eq!(needed(20_000, false), 20_000 * 16 * 1024);
        assert!(needed(20_000, false) < 512 << 20 && needed(usize::MAX, true) == u64::MAX);
    }
}
