//! The postmaster as a process: spawn, adopt, signal, notice its end, leave nobody behind.
//!
//! A postmaster must outlive the agent and be found again by the next one, so it gets its own session, no parent-death
//! signal and no `kill_on_drop`. Its end is a pidfd becoming readable, watched by a thread of its own: noticing must not
//! depend on how busy the async runtime is.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::watch;
use trunkline_common::{Clock, Instant, SystemClock};

use super::pidfile::PidFile;
use super::{PgError, program};
use crate::guard::Egress;

/// How long an immediate shutdown by SIGQUIT may take before SIGKILL, at most. It usually takes 10–20 ms.
const QUIT_GRACE: Duration = Duration::from_millis(500);

/// A death has no event where the process is not our child and its pidfd isn't held: look again that often.
const RECHECK: Duration = Duration::from_millis(1);

/// How long the watcher waits for killed orphans to be gone before it reports the end all the same (a process in
/// uninterruptible I/O can't be killed, and can't acknowledge anything either).
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// Ticks per second in `/proc/*/stat` (USER_HZ): 100 on every architecture PostgreSQL is built for on Linux.
const TICKS_PER_SECOND: u64 = 100;

/// What the processes of one server are known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Its data directory with links resolved, which all of them work in: a postmaster changes into it, and every child
    /// inherits it.
    pub dir: PathBuf,
    /// What the file of their program is called where that is not `postgres…` ([`program::unusual_name`]). A person's
    /// shell in the directory is neither.
    pub program: Option<OsString>,
}

/// Knows the postmaster of one data directory.
pub struct Supervisor {
    data_dir: PathBuf,
    program: Option<OsString>,
    exits: watch::Sender<u64>,
    current: Mutex<Option<Arc<Postmaster>>>,
    egress: OnceLock<Arc<Egress>>,
}

/// A postmaster that was alive when we looked.
pub struct Postmaster {
    pid: Pid,
    fd: OwnedFd,
    gone: watch::Sender<bool>,
}

impl Supervisor {
    /// For the postmaster of `data_dir`, whoever started it. `program`: that of [`Server`].
    pub fn new(data_dir: &Path, program: Option<OsString>) -> Self {
        let (exits, current, egress) = (watch::Sender::new(0), Mutex::new(None), OnceLock::new());
        Self { data_dir: data_dir.to_owned(), program, exits, current, egress }
    }

    /// What its processes are known by.
    pub fn server(&self) -> Server {
        Server { dir: real_path(&self.data_dir), program: self.program.clone() }
    }

    /// From now on postmasters are started behind this fence; one that is there already is taken in where that can be.
    pub fn fence_egress(&self, egress: Arc<Egress>) {
        let running = self.find();
        if self.egress.set(egress).is_ok() {
            self.adopt(running.map(|postmaster| postmaster.pid), false);
        }
    }

    fn adopt(&self, postmaster: Option<Pid>, started: bool) {
        if let (Some(egress), Some(pid)) = (self.egress.get(), postmaster) {
            egress.adopt(pid, started);
        }
    }

    /// Counts ends.
    pub fn exits(&self) -> watch::Receiver<u64> {
        self.exits.subscribe()
    }

    /// The postmaster, if one is alive: ours, one left by an earlier agent, or one started by hand.
    pub fn find(&self) -> Option<Arc<Postmaster>> {
        let mut current = self.current.lock();
        if let Some(postmaster) = current.as_ref().filter(|postmaster| !postmaster.is_gone()) {
            return Some(postmaster.clone());
        }
        *current = None;
        let file = PidFile::read(&self.data_dir)?;
        let pid = Pid::from_raw(file.pid)?;
        // The descriptor first, the questions after: what /proc says then is about the process that we hold.
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        if !is_postmaster(pid, &file, &self.server()) || has_ended(&fd, Some(Duration::ZERO)) {
            return None;
        }
        tracing::info!(pid = file.pid, "found a running postmaster");
        let postmaster = self.watch(pid, fd, None)?;
        self.adopt(Some(pid), false);
        *current = Some(postmaster.clone());
        Some(postmaster)
    }

    /// Starts `postgres` in a session of its own.
    pub fn spawn(&self, mut command: Command) -> Result<Arc<Postmaster>, PgError> {
        program::clean_environment(&mut command);
        command.stdin(Stdio::null());
        let name = command.get_program().to_owned();
        own_session(&mut command);
        let mut current = self.current.lock();
        if let Some(door) = self.egress.get().and_then(|egress| egress.prepare()) {
            enter(&mut command, door);
        }
        let child = command.spawn().map_err(|error| program::unusable(&name, &error))?;
        let pid = Pid::from_child(&child);
        // Not reaped yet, so the number is still this process.
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| PgError::Unusable(format!("pidfd_open: {error}; Linux 5.3 or later is needed")))?;
        let postmaster = self.watch(pid, fd, Some(child));
        let postmaster = postmaster.ok_or_else(|| PgError::Failed("no thread to watch the postmaster".to_owned()))?;
        self.adopt(Some(pid), true);
        *current = Some(postmaster.clone());
        Ok(postmaster)
    }

    /// Kills everything of the server: SIGQUIT, after `grace` SIGKILL, and returns when no process is left. Blocks the
    /// thread; needs no runtime.
    pub fn kill(&self, grace: Duration, limit: Duration) -> Result<(), PgError> {
        let (deadline, server) = (SystemClock.now() + limit, self.server());
        if let Some(postmaster) = self.find() {
            // A stopped process takes no signal but SIGKILL (and SIGCONT, which would let it finish what it was doing).
            let quit = !postmaster.is_frozen() && postmaster.signal(Signal::QUIT);
            if !(quit && has_ended(&postmaster.fd, Some(grace))) {
                postmaster.signal(Signal::KILL);
                kill_all(&server, deadline);
                has_ended(&postmaster.fd, Some(deadline.since(SystemClock.now())));
            }
        }
        if kill_all(&server, deadline) {
            return Ok(());
        }
        Err(PgError::Timeout { what: "killing PostgreSQL".to_owned(), limit })
    }

    fn watch(&self, pid: Pid, fd: OwnedFd, child: Option<Child>) -> Option<Arc<Postmaster>> {
        let postmaster = Arc::new(Postmaster { pid, fd, gone: watch::Sender::new(false) });
        let (watched, exits) = (postmaster.clone(), self.exits.clone());
        let (data_dir, program) = (self.data_dir.clone(), self.program.clone());
        let wait = move || {
            has_ended(&watched.fd, None);
            let status = child.and_then(|mut child| child.wait().ok());
            // A postmaster that ends by itself waits for its children and removes its pid file last. One that was killed
            // leaves backends that may still be committing; the end is not reported before they are dead.
            if PidFile::read(&data_dir).is_some_and(|file| file.pid == watched.pid.as_raw_pid()) {
                kill_all(&Server { dir: real_path(&data_dir), program }, SystemClock.now() + ORPHAN_LIMIT);
            }
            let status = status.map_or("unknown status".to_owned(), |status| status.to_string());
            tracing::info!(pid = watched.pid.as_raw_pid(), "postmaster ended: {status}");
            watched.gone.send_replace(true);
            exits.send_modify(|count| *count += 1);
        };
        std::thread::Builder::new().name("postmaster".to_owned()).spawn(wait).ok()?;
        Some(postmaster)
    }
}

impl Postmaster {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Sends a signal to exactly this process; false if it has ended.
    pub fn signal(&self, signal: Signal) -> bool {
        rustix::process::pidfd_send_signal(&self.fd, signal).is_ok()
    }

    /// Whether it and all of its children have ended.
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Whether it has ended; its children may not have.
    pub fn has_ended(&self) -> bool {
        has_ended(&self.fd, Some(Duration::ZERO))
    }

    /// Returns when it and all of its children have ended.
    pub async fn gone(&self) {
        // The sender lives in self: it can't be dropped before.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Whether it was stopped (SIGSTOP, a debugger): alive, but it will answer nobody.
    pub fn is_frozen(&self) -> bool {
        stat(self.pid).is_some_and(|stat| matches!(stat.state, 'T' | 't'))
    }
}

/// How long SIGQUIT gets before SIGKILL where everything has to be over within `limit`.
pub fn fence_grace(limit: Duration) -> Duration {
    (limit / 4).min(QUIT_GRACE)
}

/// Kills every process of the server and waits until none is left; false if that is not so at `deadline`.
pub fn kill_all(server: &Server, deadline: Instant) -> bool {
    kill_processes_of(server, deadline, |pid| {
        tracing::debug!(pid = pid.as_raw_pid(), "killed a process of the server");
    })
}

/// The same; tells `killed` of each. Without a look at the disk.
pub fn kill_processes_of(server: &Server, deadline: Instant, mut killed: impl FnMut(Pid)) -> bool {
    loop {
        let left = processes_of(server);
        if left.is_empty() {
            return true;
        }
        for pid in left {
            let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
            if is_server_process(pid, server) && rustix::process::pidfd_send_signal(&fd, Signal::KILL).is_ok() {
                killed(pid);
            }
        }
        if SystemClock.now() >= deadline {
            return false;
        }
        std::thread::sleep(RECHECK);
    }
}

/// What the processes of a server call themselves, such as `postgres: demo: walwriter`.
pub fn titles(server: &Server) -> Vec<String> {
    let title = |pid: &Pid| {
        let text = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).ok()?;
        let text = String::from_utf8_lossy(&text).replace('\0', " ");
        // The postmaster has its whole command line there.
        Some(format!("{} (pid {})", text.split(" -").next().unwrap_or_default().trim(), pid.as_raw_pid()))
    };
    processes_of(server).iter().filter_map(title).collect()
}

/// Removes the `postmaster.pid` of a postmaster that is a zombie. PostgreSQL only asks whether there is a process of that
/// number, and would refuse to start, and pg_rewind with it, until the parent or the init of a container cleans up. Any
/// other doubt is PostgreSQL's to judge: the file may be that of a server in another container.
pub fn remove_stale_lock(server: &Server) -> std::io::Result<()> {
    let Some(file) = PidFile::read(&server.dir) else { return Ok(()) };
    let ours = |stat: &Stat| server.is_of_program(OsStr::new(&stat.program));
    let dead = |stat: Stat| stat.state == 'Z' && ours(&stat) && stat.began(&file) == Some(true);
    if Pid::from_raw(file.pid).and_then(stat).is_some_and(dead) {
        tracing::info!("removing postmaster.pid: process {} has ended and only waits to be reaped", file.pid);
        fs::remove_file(server.dir.join("postmaster.pid"))?;
    }
    Ok(())
}

/// Whether any process of the server is there.
pub fn has_processes(server: &Server) -> bool {
    !processes_of(server).is_empty()
}

/// How a process blocks and sleeps, of `/proc/<pid>/stat`.
struct Stat {
    program: String,
    state: char,
    parent: i32,
    start_ticks: u64,
}

fn processes_of(server: &Server) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| is_server_process(*pid, server)).collect()
}

/// Zombies have no working directory, so they don't count. A process that is just exiting has lost its program but not
/// yet its directory: it does, until it is over.
fn is_server_process(pid: Pid, server: &Server) -> bool {
    let link = |name: &str| fs::read_link(format!("/proc/{}/{name}", pid.as_raw_pid()));
    if !link("cwd").is_ok_and(|cwd| cwd == server.dir) {
        return false;
    }
    match link("exe") {
        Ok(exe) => exe.file_name().is_some_and(|name| server.is_of_program(name)),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Whether `pid` is the postmaster that wrote `file`, not a stranger who got its number after a reboot.
fn is_postmaster(pid: Pid, file: &PidFile, server: &Server) -> bool {
    let Some(stat) = stat(pid) else { return false };
    if stat.state == 'Z' || !is_server_process(pid, server) {
        return false;
    }
    // A stepped wall clock moves computed start times, so a mismatch alone proves nothing; a backend that got the number
    // has another server process as its parent.
    stat.began(file) == Some(true) || Pid::from_raw(stat.parent).is_none_or(|parent| !is_server_process(parent, server))
}

impl Server {
    /// Whether a process is one of it by the file name in `/proc/<pid>/exe`: that of a file which was replaced meanwhile
    /// has an addition.
    fn is_of_program(&self, name: &OsStr) -> bool {
        let bytes = name.as_bytes();
        let name = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
        program::is_usual_name(name) || self.program.as_ref().is_some_and(|program| program.as_bytes() == name)
    }
}

impl Stat {
    /// Whether it began when `file` says, as far as the wall clock can tell.
    fn began(&self, file: &PidFile) -> Option<bool> {
        let text = fs::read_to_string("/proc/stat").ok()?;
        let boot: i64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        let began = boot.saturating_add_unsigned(self.start_ticks / TICKS_PER_SECOND);
        Some(began.abs_diff(file.started) <= 3)
    }
}

fn stat(pid: Pid) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // The command in parentheses may contain anything, parentheses included.
    let (before, after) = text.rsplit_once(')')?;
    let program = before.split_once('(')?.1.to_owned();
    let mut fields = after.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let start_ticks = fields.nth(17)?.parse().ok()?;
    Some(Stat { program, state, parent, start_ticks })
}

/// Links resolved; as it is where it does not exist.
pub fn real_path(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned())
}

/// Waits for a process to end, at most `limit` (none = for ever). A pidfd is readable exactly when it has.
pub fn has_ended(fd: &OwnedFd, limit: Option<Duration>) -> bool {
    let deadline = limit.map(|limit| SystemClock.now() + limit);
    loop {
        let left = deadline.map(|deadline| {
            let left = deadline.since(SystemClock.now());
            Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() }
        });
        match rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], left.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(ready) => return ready > 0,
            Err(error) => {
                tracing::error!("poll of a pidfd: {error}");
                return false;
            }
        }
    }
}

/// So that a signal to the agent's terminal or process group does not reach it.
#[allow(unsafe_code)]
pub fn own_session(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec and only makes one async-signal-safe system call.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into));
    }
}

/// Into a cgroup before it is what it will be, so that all of its sockets are. Where that does not succeed it is started
/// all the same, and found outside.
#[allow(unsafe_code)]
fn enter(command: &mut Command, door: OwnedFd) {
    // SAFETY: the closure runs between fork and exec and only makes one async-signal-safe system call.
    unsafe {
        command.pre_exec(move || {
            let _ = rustix::io::write(&door, b"0");
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_itself_by_stat() {
        let me = rustix::process::getpid();
        let stat = stat(me).expect("own stat");
        assert_eq!(stat.parent, rustix::process::getppid().map_or(0, |pid| pid.as_raw_pid()));
        assert!(matches!(stat.state, 'R' | 'S' | 'D') && stat.start_ticks > 0);
    }

    #[test]
    fn a_pid_file_that_names_a_stranger_is_nobody() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join("postmaster.pid"), format!("{}\n/x\n1\n", std::process::id())).expect("pid file");
        let supervisor = Supervisor::new(dir.path(), None);
        assert!(supervisor.find().is_none());
        assert!(supervisor.kill(Duration::ZERO, Duration::from_secs(1)).is_ok());
    }

    #[test]
    fn the_lock_of_a_dead_postmaster_is_no_lock() {
        let dir = tempfile::tempdir().expect("temp dir");
        let program = dir.path().join("postgres");
        std::os::unix::fs::symlink("/bin/true", &program).expect("link");
        let mut zombies = [Command::new(program).spawn().expect("spawn"), Command::new("true").spawn().expect("spawn")];
        let deadline = SystemClock.now() + Duration::from_secs(10);
        for zombie in &zombies {
            while stat(Pid::from_child(zombie)).is_some_and(|stat| stat.state != 'Z') {
                assert!(SystemClock.now() < deadline, "it does not end");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let lock = dir.path().join("postmaster.pid");
        let now = SystemClock.wall().timestamp();
        let [postmaster, other] = [zombies[0].id(), zombies[1].id()];
        for (pid, started, program, stays) in [
            (postmaster, now, None, false),
            (postmaster, now - 100, None, true),
            (other, now, None, true),
            (other, now, Some("true"), false),
            (std::process::id(), now, None, true),
            (2_000_000_000, now, None, true),
        ] {
            let server = Server { dir: dir.path().to_owned(), program: program.map(Into::into) };
            fs::write(&lock, format!("{pid}\n/x\n{started}\n")).expect("lock");
            remove_stale_lock(&server).expect("removed");
            assert_eq!(lock.exists(), stays, "{pid} {started}");
        }
        for zombie in &mut zombies {
            zombie.wait().expect("reaped");
        }
    }

    #[test]
    fn the_end_of_a_process_is_seen_at_once() {
        let dir = tempfile::tempdir().expect("temp dir");
        let supervisor = Supervisor::new(dir.path(), None);
        let mut exits = supervisor.exits();
        let mut command = Command::new("sleep");
        command.arg("60");
        let postmaster = supervisor.spawn(command).expect("spawn");
        assert!(!postmaster.has_ended());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let before = SystemClock.now();
        assert!(postmaster.signal(Signal::KILL));
        runtime.block_on(async { exits.changed().await.expect("sender lives") });
        assert!(postmaster.is_gone());
        assert!(SystemClock.now().since(before) < Duration::from_secs(2));
    }
}
