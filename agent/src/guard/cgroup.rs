//! The cgroups (version 2) that PostgreSQL runs in: a new one for each start of the server, below the agent's own.
//!
//! A new one each time because sockets of a dead server go on sending what they have, and must stay behind the gate that
//! was theirs.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use trunkline_common::{Clock, SystemClock};

/// Where the cgroups of one server are.
#[derive(Debug)]
pub(super) struct Place {
    mount: PathBuf,
    parent: PathBuf,
    prefix: String,
}

impl Place {
    /// Below this process's cgroup, for the server in `data_dir`.
    pub fn find(data_dir: &Path) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mount_point(&mounts).ok_or_else(|| io::Error::other("cgroup v2 is not mounted"))?;
        let own = path_of("self")?;
        // Agents may share a cgroup. FNV-1a: the same name in every version of this program.
        let hash = data_dir.as_os_str().as_encoded_bytes().iter();
        let hash =
            hash.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        let parent = mount.join(own.strip_prefix("/").unwrap_or(&own));
        Ok(Self { mount, parent, prefix: format!("trunkline-{hash:016x}-") })
    }

    /// A new, empty one. Those of earlier servers are removed.
    pub fn create(&self) -> io::Result<PathBuf> {
        for entry in fs::read_dir(&self.parent).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&self.prefix) {
                // Not possible, and not wanted, while anybody is in it.
                let _ = fs::remove_dir(entry.path());
            }
        }
        let dir = self.parent.join(format!("{}{}", self.prefix, SystemClock.now().since_boot().as_millis()));
        fs::create_dir(&dir).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", dir.display())))?;
        Ok(dir)
    }

    /// The one that `pid` is in, if it was made here.
    pub fn of(&self, pid: Pid) -> Option<PathBuf> {
        let path = path_of(&pid.as_raw_pid().to_string()).ok()?;
        let ours = path.file_name()?.to_str()?.starts_with(&self.prefix);
        ours.then(|| self.mount.join(path.strip_prefix("/").unwrap_or(&path)))
    }
}

/// What a process writes `0` to, to be in `dir`.
pub(super) fn door(dir: &Path) -> io::Result<OwnedFd> {
    Ok(File::options().write(true).open(dir.join("cgroup.procs"))?.into())
}

fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("cgroup2")).then(|| mount.split(' ').nth(4).map(PathBuf::from)).flatten()
    })
}

fn path_of(process: &str) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(PathBuf::from).ok_or_else(|| io::Error::other("it is in no cgroup of version 2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_2_is_found_beside_others() {
        let hybrid = "37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
                      38 31 0:35 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point("37 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n"), None);
    }
}
