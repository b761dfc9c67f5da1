//! Where a lab is: a directory, a block of ports and the user its servers run as.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use super::cgroup::Cgroup;
use super::ports::Ports;
use super::process::{self, Proc};
use super::tools::{Program, Tools};

/// Directory, ports and user; cheap to clone. With the last clone every process below the directory ends and the data
/// is removed; logs and configuration stay, and their place is printed, unless [`Lab::success`] was said before.
#[derive(Debug, Clone)]
pub struct Lab(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    user: Option<User>,
    tools: Tools,
    ports: Ports,
    /// Held for its standard input, whose end tells it that we are gone.
    guard: Child,
    success: AtomicBool,
    keep: AtomicBool,
}

/// A user that servers run as.
#[derive(Debug, Clone, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
}

impl Lab {
    /// A new lab below `/tmp`, with `name` in its directory's name. With `TRUNKLINE_LAB_KEEP` in the environment its files
    /// are kept whatever happens.
    ///
    /// # Errors
    /// PostgreSQL or etcd are missing; no directory, no ports, no user to run PostgreSQL as.
    pub fn new(name: &str) -> Result<Self> {
        Self::with_tools(name, Tools::find()?)
    }

    /// A lab with other servers than [`Tools::find`] takes.
    ///
    /// # Errors
    /// No directory, no ports, no user to run PostgreSQL as.
    pub fn with_tools(name: &str, tools: Tools) -> Result<Self> {
        let user = if rustix::process::geteuid().is_root() { Some(User::unprivileged()?) } else { None };
        let dir = make_place(name, user.as_ref())?;
        let guard = match start_guard(&dir) {
            Ok(guard) => guard,
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(error);
            }
        };
        let keep = std::env::var_os("TRUNKLINE_LAB_KEEP").is_some();
        let (success, keep) = (AtomicBool::new(false), AtomicBool::new(keep));
        let inner = Inner { dir, user, tools, ports: Ports::claim()?, guard, success, keep };
        Ok(Self(Arc::new(inner)))
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// PostgreSQL and etcd.
    pub fn tools(&self) -> &Tools {
        &self.0.tools
    }

    /// A port of `127.0.0.1` that nobody else in this lab or another was given.
    ///
    /// # Errors
    /// The block of ports is used up.
    pub fn port(&self) -> Result<u16> {
        self.0.ports.next()
    }

    /// Everything went well: keep nothing.
    pub fn success(&self) {
        self.0.success.store(true, Ordering::Relaxed);
    }

    /// Keep everything, the data too, whatever happens. The processes end nevertheless.
    pub fn keep(&self) {
        self.0.keep.store(true, Ordering::Relaxed);
    }

    /// Makes the directory `name`, owned by the lab's user.
    ///
    /// # Errors
    /// It can't be made.
    pub fn make_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.0.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        self.own(&dir)?;
        Ok(dir)
    }

    /// Writes the configuration file `etc/<name>`, readable for the lab's user alone: it has passwords.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_config(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.dir.join("etc").join(name);
        let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(text.as_bytes()).with_context(|| format!("{}", path.display()))?;
        self.own(&path)?;
        Ok(path)
    }

    /// A command that runs `program` as the lab's user in `cwd`, which must be below the lab: that is how its processes
    /// are found again.
    ///
    /// # Errors
    /// The program can't be copied to where that user reaches it.
    pub fn command(&self, program: &Program, cwd: &Path) -> Result<Command> {
        let mut command = Command::new(self.reachable(&program.path)?);
        command.args(&program.args).current_dir(cwd);
        command.env("HOME", cwd).env_remove("PGPASSFILE").env_remove("PGPASSWORD").env_remove("PGSERVICE");
        // The environment is a configuration source of the agents: nothing of the caller's may leak in.
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PATRONI_")) {
            command.env_remove(key);
        }
        command.envs(program.env.iter().map(|(key, value)| (key, value)));
        if let Some(user) = &self.0.user {
            command.uid(user.uid).gid(user.gid);
        }
        Ok(command)
    }

    /// A cgroup that belongs to the lab's user.
    ///
    /// # Errors
    /// It can't be made: the caller is not root, or there is no cgroup v2.
    pub fn cgroup(&self, name: &str) -> Result<Cgroup> {
        let user = self.0.user.as_ref().context("cgroups of nodes need root")?;
        // The place's name is nobody else's, in whatever namespace this runs.
        let place = self.0.dir.file_name().unwrap_or_default().to_string_lossy();
        Cgroup::new(&format!("{place}-{name}"), (user.uid, user.gid))
    }

    /// [`Lab::command`] in a cgroup, with the capabilities that the egress fence needs and no others.
    ///
    /// # Errors
    /// As [`Lab::command`]; the caller is not root.
    pub fn command_in(&self, cgroup: &Cgroup, program: &Program, cwd: &Path) -> Result<Command> {
        let user = self.0.user.as_ref().context("cgroups of nodes need root")?;
        let plain = self.command(program, cwd)?;
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid)).arg("--clear-groups");
        command.args(["--inh-caps=+bpf,+net_admin", "--ambient-caps=+bpf,+net_admin", "--", "env"]);
        // By `env`, as the user: a library that is loaded before all others is not for setpriv, which begins as root.
        for (key, value) in plain.get_envs() {
            match value {
                Some(value) => command.arg([key, "=".as_ref(), value].into_iter().collect::<OsString>()),
                None => command.env_remove(key),
            };
        }
        command.arg(plain.get_program()).args(plain.get_args()).current_dir(cwd);
        cgroup.enter(&mut command)?;
        Ok(command)
    }

    /// Starts `command` with its output in `logs/<name>.log`.
    ///
    /// # Errors
    /// It does not start.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Proc> {
        Proc::spawn(name, command, &self.log(name))
    }

    /// Where the output of the process `name` goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.0.dir.join("logs").join(format!("{name}.log"))
    }

    /// `program` itself if the lab's user can execute it, else a copy: what lies below `/root` is out of its reach.
    ///
    /// # Errors
    /// It can't be copied.
    pub fn reachable(&self, program: &Path) -> Result<PathBuf> {
        let Some(user) = &self.0.user else { return Ok(program.to_owned()) };
        if user.may_execute(program) {
            return Ok(program.to_owned());
        }
        let name = program.file_name().with_context(|| format!("{} is no program", program.display()))?;
        let copy = self.0.dir.join("bin").join(name);
        if !copy.exists() {
            fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        }
        Ok(copy)
    }

    fn own(&self, path: &Path) -> Result<()> {
        match &self.0.user {
            Some(user) => chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("{}", path.display())),
            None => Ok(()),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        process::kill_below(&self.dir);
        free_shared_memory(&self.dir, 3);
        if self.keep.load(Ordering::Relaxed) {
            // The guard would remove the data.
            let _ = self.guard.kill();
            println!("data, logs and configuration are kept in {}", self.dir.display());
        } else if self.success.load(Ordering::Relaxed) {
            let _ = fs::remove_dir_all(&self.dir);
        } else {
            remove_data(&self.dir);
            eprintln!("logs and configuration are kept in {}", self.dir.display());
        }
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// Frees what servers that were killed have left of System V's shared memory: it outlasts them, until they start again, and a
/// machine has room for 4096 pieces of it.
fn free_shared_memory(dir: &Path, depth: u32) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && depth > 0 {
            free_shared_memory(&path, depth - 1);
        } else if entry.file_name() == "postmaster.pid" {
            // The seventh line: its key and its number.
            let text = fs::read_to_string(&path).unwrap_or_default();
            if let Some(id) = text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
                let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
            }
        }
    }
}

/// Removes everything but `logs` and `etc`.
fn remove_data(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !["logs", "etc"].iter().any(|kept| entry.file_name() == *kept) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn make_place(name: &str, user: Option<&User>) -> Result<PathBuf> {
    let prefix = format!("trunkline-{name}-");
    // /tmp, not TMPDIR: paths of PostgreSQL's sockets may have 107 bytes, and /root is closed to other users.
    let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in("/tmp").context("no directory below /tmp")?.keep();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    for inner in ["bin", "etc", "logs"] {
        fs::create_dir(dir.join(inner))?;
        if let Some(user) = user {
            chown(dir.join(inner), Some(user.uid), Some(user.gid))?;
        }
    }
    Ok(dir)
}

/// Should this program end without its destructors (SIGKILL, abort), this shell sees the end of its standard input,
/// kills what works below the directory and removes the data.
fn start_guard(dir: &Path) -> Result<Child> {
    const SCRIPT: &str = r#"
        trap "" INT TERM HUP QUIT
        while read -r _; do :; done
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            [ -d "$1" ] || exit 0
            found=
            for process in /proc/[0-9]*; do
                case "$(readlink "$process/cwd")" in "$1"|"$1"/*) kill -9 "${process#/proc/}"; found=1;; esac
            done 2>/dev/null
            [ -n "$found" ] || break
        done
        for entry in "$1"/*; do case "${entry##*/}" in logs|etc) ;; *) rm -rf "$entry";; esac; done
    "#;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", SCRIPT, "trunkline-guard"]).arg(dir).current_dir("/").process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("/bin/sh does not start")
}

impl User {
    /// PostgreSQL refuses to run as root.
    fn unprivileged() -> Result<Self> {
        let passwd = fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
        let found = ["postgres", "nobody"].iter().find_map(|name| Self::find(&passwd, name));
        found.context("PostgreSQL does not run as root, and /etc/passwd has neither `postgres` nor `nobody`")
    }

    fn find(passwd: &str, name: &str) -> Option<Self> {
        let mut lines = passwd.lines().map(|line| line.split(':'));
        let mut fields = lines.find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?.skip(1);
        Some(Self { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    }

    /// Every directory above can be passed and the file be read and run by this user, as far as mode bits say.
    fn may_execute(&self, program: &Path) -> bool {
        let Ok(path) = program.canonicalize() else { return false };
        path.ancestors().all(|part| {
            let Ok(meta) = part.metadata() else { return false };
            let wanted = if meta.is_dir() { 0o1 } else { 0o5 };
            let shift = match () {
                () if meta.uid() == self.uid => 6,
                () if meta.gid() == self.gid => 3,
                () => 0,
            };
            (meta.mode() >> shift) & wanted == wanted
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_a_passwd_file() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\npostgres:x:101:104::/var/lib/postgresql:/bin/bash\nbad:x:y:z::/:\n";
        assert_eq!(User::find(passwd, "postgres"), Some(User { uid: 101, gid: 104 }));
        assert_eq!(User::find(passwd, "postgre"), None);
        assert_eq!(User::find(passwd, "bad"), None);
    }

    #[test]
    fn programs_behind_closed_directories_are_out_of_reach() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let stranger = User { uid: 4_000_000, gid: 4_000_000 };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!stranger.may_execute(&program), "the directory has mode 0700");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        assert!(stranger.may_execute(&program));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(!stranger.may_execute(&program));
        assert!(!stranger.may_execute(&dir.path().join("absent")));
    }

    /// The guard must work when no destructor runs, so it is tested without one: its input simply ends.
    #[test]
    fn the_guard_kills_and_removes_when_its_input_ends() {
        let dir = make_place("guard", None).unwrap();
        fs::create_dir(dir.join("data")).unwrap();
        fs::write(dir.join("logs/kept.log"), "x").unwrap();
        let mut command = Command::new("sleep");
        command.arg("60").current_dir(dir.join("data"));
        let mut sleeper = Proc::spawn("sleeper", command, &dir.join("logs/sleeper.log")).unwrap();

        let mut guard = start_guard(&dir).unwrap();
        drop(guard.stdin.take());
        guard.wait().unwrap();

        assert!(sleeper.ended().is_some());
        assert!(!dir.join("data").exists());
        assert!(dir.join("logs/kept.log").exists());
        fs::remove_dir_all(&dir).unwrap();
    }
}
