//! The agent's side of the guard process: there always is one, and a new agent takes its predecessor's place.
//!
//! Guards share the page with the deadline, so any number of them does the same: a new one is started before an old one
//! is ended, and there is no moment without.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, Signal};
use tracing::{error, info, warn};
use trunkline_common::{Clock, Instant, SystemClock};

use super::memory::{self, Memory};
use super::vip::{self, Vip};
use crate::postgres::{has_ended, own_session};

/// The hidden option that makes the agent's program a guard.
pub const OPTION: &str = "--guard";

/// The one that says what the server's program is called where that is not `postgres…`.
pub const PROGRAM_OPTION: &str = "--guard-program";

/// The one that names an address for it to give up: `eth0=10.0.0.100/24`.
pub const VIP_OPTION: &str = "--guard-vip";

/// How long a guard may take to come up.
const UP_LIMIT: Duration = Duration::from_secs(2);

/// Pause between attempts to start one, and between looks at one that runs.
const PAUSE: Duration = Duration::from_secs(1);

/// A guard that has not looked for so long after the time it meant to does not work.
const STUCK: Duration = Duration::from_secs(2);

/// A guard process of this agent's, kept alive by a thread.
#[derive(Debug)]
pub struct GuardProcess {
    shared: Arc<Shared>,
    /// Ends with the thread.
    ended: Mutex<Receiver<()>>,
}

#[derive(Debug)]
struct Shared {
    data_dir: PathBuf,
    program: Option<OsString>,
    vip: Option<Vip>,
    fd: OwnedFd,
    memory: &'static Memory,
    /// The write end of the newest guard's pipe.
    wake: Mutex<Option<OwnedFd>>,
    /// Its pid, or why there is none.
    state: Mutex<Result<u32, String>>,
    ending: AtomicBool,
}

/// A guard process, ours or one that was found.
#[derive(Debug)]
struct Running {
    pidfd: OwnedFd,
    child: Option<Child>,
}

impl GuardProcess {
    /// Starts a guard for the server in `data_dir`, and takes the deadline over from one that an earlier agent left
    /// behind. `program`: what the server's is called where that is not `postgres…`. Returns when it is up, or could not
    /// be started: then that is tried again and again.
    ///
    /// # Errors
    /// No shared memory or no thread.
    pub fn start(data_dir: &Path, program: Option<OsString>, vip: Option<Vip>) -> io::Result<Self> {
        let data_dir = stable_name(data_dir);
        let found = find(&data_dir);
        let armed = found.iter().position(|(_, _, memory)| memory.kill_at().is_some());
        let mut old = Vec::new();
        let mut inherited = None;
        for (i, (running, fd, memory)) in found.into_iter().enumerate() {
            if i == armed.unwrap_or(0) {
                info!("an earlier agent's guard is here, {}", armed_text(memory));
                inherited = Some((fd, memory));
            }
            old.push(running);
        }
        let (fd, memory) = inherited.map_or_else(Memory::create, Ok)?;
        let state = Mutex::new(Err("not started yet".to_owned()));
        let (wake, ending) = (Mutex::new(None), AtomicBool::new(false));
        let shared = Arc::new(Shared { data_dir, program, vip, fd, memory, wake, state, ending });
        let (up, first) = mpsc::channel();
        let (running, ended) = mpsc::channel();
        let kept = shared.clone();
        let keep = move || {
            kept.keep(old, &up);
            drop::<Sender<()>>(running);
        };
        std::thread::Builder::new().name("guard".to_owned()).spawn(keep)?;
        // An error means that the thread is gone, which the state tells.
        let _ = first.recv_timeout(UP_LIMIT * 2);
        Ok(Self { shared, ended: Mutex::new(ended) })
    }

    /// Kill the server then; `None`: there is nothing to guard.
    pub fn set(&self, kill_at: Option<Instant>) {
        let before = self.shared.memory.set_kill_at(kill_at);
        // It sleeps until the time it knew: only something earlier has to wake it.
        if kill_at.is_some() && (before.is_none() || kill_at < before) {
            self.shared.wake();
        }
    }

    /// The leader's address may be here until then; `None`: it is not here any more.
    pub fn set_address(&self, until: Option<Instant>) {
        let before = self.shared.memory.set_address_until(until);
        if until.is_some() && (before.is_none() || until < before) {
            self.shared.wake();
        }
    }

    /// Until when the leader's address may be here.
    pub fn address_until(&self) -> Option<Instant> {
        self.shared.memory.address_until()
    }

    /// How often it has killed PostgreSQL.
    pub fn kills(&self) -> u64 {
        self.shared.memory.kills()
    }

    /// When the server will be killed.
    pub fn kill_at(&self) -> Option<Instant> {
        self.shared.memory.kill_at()
    }

    /// The guard's pid, or why there is none.
    pub fn state(&self) -> Result<u32, String> {
        self.shared.state.lock().clone()
    }

    /// The agent ends. A guard that still has a deadline stays until it is met.
    pub fn end(&self) {
        if self.kill_at().is_some() || self.address_until().is_some() {
            warn!("the guard stays: {}", armed_text(self.shared.memory));
            return;
        }
        self.shared.ending.store(true, Ordering::SeqCst);
        *self.shared.wake.lock() = None;
        let _ = self.ended.lock().recv_timeout(UP_LIMIT);
    }
}

impl Shared {
    /// Starts a guard, watches it, and starts another one when it is gone.
    fn keep(&self, mut old: Vec<Running>, up: &Sender<()>) {
        let mut kills = self.memory.kills();
        while !self.ending.load(Ordering::SeqCst) {
            let started = self.spawn();
            *self.state.lock() = started.as_ref().map(Running::pid).map_err(ToString::to_string);
            let _ = up.send(());
            let mut guard = match started {
                Ok(guard) => guard,
                Err(error) => {
                    error!("no guard can be started, trying again: {error}");
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            info!(pid = guard.pid(), "the guard is up");
            old.drain(..).for_each(|mut old| old.kill());
            let stuck = self.watch(&guard, &mut kills);
            if self.ending.load(Ordering::SeqCst) {
                return guard.reap();
            }
            let what = if stuck { "does not move" } else { "has ended" };
            *self.state.lock() = Err(format!("the last one {what}"));
            error!(pid = guard.pid(), "the guard {what}; starting another one");
            match stuck {
                true => old.push(guard),
                false => guard.reap(),
            }
        }
    }

    fn spawn(&self) -> io::Result<Running> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // Whoever wakes it must not wait: a full pipe wakes as well.
        rustix::io::ioctl_fionbio(&write, true)?;
        // This very program, also where its file has been replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg(OPTION).arg(&self.data_dir).env_clear();
        command.stdin(Stdio::from(read)).stdout(Stdio::from(self.fd.try_clone()?));
        if let Some(program) = &self.program {
            command.arg(PROGRAM_OPTION).arg(program);
        }
        for argument in self.vip.iter().flat_map(Vip::arguments) {
            command.arg(VIP_OPTION).arg(argument);
        }
        own_session(&mut command);
        let child = match &self.vip {
            Some(_) => vip::with_capability(|| command.spawn())?,
            None => command.spawn()?,
        };
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let mut guard = Running { pidfd, child: Some(child) };
        *self.wake.lock() = Some(write);
        let give_up = SystemClock.now() + UP_LIMIT;
        while self.memory.ready() != u64::from(guard.pid()) {
            if has_ended(&guard.pidfd, Some(Duration::from_millis(1))) {
                guard.reap();
                return Err(io::Error::other("it ends at once"));
            }
            if SystemClock.now() > give_up {
                guard.kill();
                return Err(io::Error::other(format!("it is not up within {UP_LIMIT:?}")));
            }
        }
        Ok(guard)
    }

    /// Returns when the guard has ended, or (true) does not do its work.
    fn watch(&self, guard: &Running, kills: &mut u64) -> bool {
        let mut late = false;
        while !has_ended(&guard.pidfd, Some(PAUSE)) {
            if std::mem::replace(kills, self.memory.kills()) != self.memory.kills() {
                error!("the guard has killed PostgreSQL: its deadline was over, and this agent had not moved it");
            }
            // Twice in a row: after a freeze of the host this thread may be the first to go on.
            let due = self.memory.next_look().filter(|_| self.memory.kill_at().is_some());
            let late_before = std::mem::replace(&mut late, due.is_some_and(|at| at + STUCK < SystemClock.now()));
            if late && late_before {
                return true;
            }
        }
        false
    }

    fn wake(&self) {
        if let Some(pipe) = &*self.wake.lock() {
            // Full: it will wake up. Broken: there is none, and the next one looks first.
            let _ = rustix::io::write(pipe, &[1]);
        }
    }
}

impl Running {
    fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    fn reap(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }

    fn kill(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        has_ended(&self.pidfd, Some(UP_LIMIT));
        self.reap();
    }
}

/// The guards of this server that are there already.
fn find(data_dir: &Path) -> Vec<(Running, OwnedFd, &'static Memory)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter_map(|pid| open(pid, data_dir)).collect()
}

fn open(pid: Pid, data_dir: &Path) -> Option<(Running, OwnedFd, &'static Memory)> {
    let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_pid()));
    let output = proc.join("fd/1");
    if !fs::read_link(&output).ok()?.to_str()?.contains(memory::NAME) {
        return None;
    }
    // The descriptor first, the questions after: what /proc says then is about the process that we hold.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let ours = fs::metadata(&proc).ok()?.uid() == rustix::process::geteuid().as_raw();
    let command = fs::read(proc.join("cmdline")).ok()?;
    let mut arguments = command.split(|byte| *byte == 0).skip(1);
    let serves = arguments.next() == Some(OPTION.as_bytes())
        && arguments.next() == Some(data_dir.as_os_str().as_bytes())
        && ours;
    if !serves || has_ended(&pidfd, Some(Duration::ZERO)) {
        return None;
    }
    let fd = OwnedFd::from(fs::File::options().read(true).write(true).open(&output).ok()?);
    match Memory::open(&fd) {
        Ok(memory) => Some((Running { pidfd, child: None }, fd, memory)),
        Err(error) => {
            warn!(pid = pid.as_raw_pid(), "an earlier agent's guard can't be taken over: {error}");
            None
        }
    }
}

fn armed_text(memory: &Memory) -> String {
    match memory.kill_at() {
        None => "with nothing to guard".to_owned(),
        Some(at) => format!("to kill PostgreSQL in {:.1?}", at.since(SystemClock.now())),
    }
}

/// A name that is the same before the directory exists and after.
pub(super) fn stable_name(data_dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    match (absolute.parent().and_then(|parent| parent.canonicalize().ok()), absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    }
}
