//! A cgroup (version 2) for each node, as a service manager would make it: delegated to the node's user, who may fence
//! PostgreSQL's packets in it; and all that is in it can be frozen at once, like a host.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// One node's. Dropping it kills what is in it.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// A new one below the caller's, which has none of this name yet.
    ///
    /// # Errors
    /// The caller is not root, or there are no cgroups of version 2 that can be made.
    pub(super) fn new(name: &str, owner: (u32, u32)) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "cgroups of nodes need root");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("in no cgroup of version 2")?;
        let parent = Path::new(mount.context("cgroup v2 is not mounted")?).join(own);
        let dir = parent.join(name);
        fs::create_dir(&dir).with_context(|| format!("{}", dir.display()))?;
        let cgroup = Self { dir };
        for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
            let path = cgroup.dir.join(file);
            chown(&path, Some(owner.0), Some(owner.1)).with_context(|| format!("{}", path.display()))?;
        }
        Ok(cgroup)
    }

    /// `command` is started in it.
    ///
    /// # Errors
    /// It is not there any more.
    #[allow(unsafe_code)]
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let procs = File::options().write(true).open(self.dir.join("cgroup.procs"))?;
        // SAFETY: the closure runs between fork and exec and only makes one async-signal-safe system call.
        unsafe { command.pre_exec(move || Ok(rustix::io::write(&procs, b"0").map(drop)?)) };
        Ok(())
    }

    /// Freezes or thaws everything in it.
    ///
    /// # Errors
    /// The kernel does not.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        Ok(fs::write(self.dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        for _ in 0..200 {
            for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    let _ = fs::remove_dir(entry.path());
                }
            }
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
