//! Namespaces of this program's own, so that the kernel cleans up after it.
//!
//! The program runs itself again below `unshare`: with its own network, mounts, processes and shared memory. Addresses,
//! namespaces of hosts, mounts and processes are therefore seen by nobody else and end with it, however it ends.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

const MARK: &str = "TRUNKLINE_CHAOS_ISOLATED";

/// Whether this is the program below `unshare`.
pub fn is_isolated() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Replaces this program by itself in namespaces of its own; returns only what went wrong.
///
/// # Errors
/// Not root, or `unshare` is missing.
pub fn enter() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "namespaces, mounts and packet filters need root");
    let program = std::env::current_exe().context("where is the running program?")?;
    // The shell is process 1 of the new namespace: it takes in orphans, which would stay as zombies otherwise.
    let init = r#""$@" & trap "" INT TERM HUP; wait $!"#;
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["/bin/sh", "-c", init, "chaos-init"]).arg(program).args(std::env::args_os().skip(1)).env(MARK, "1");
    Err(command.exec()).context("unshare does not start; it is in the package util-linux")
}
