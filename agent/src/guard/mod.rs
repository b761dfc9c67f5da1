//! The guard: what ends writes on this host when the lease is over, whatever has become of the agent.
//!
//! The keeper of the lease (`ha::lease`) fences PostgreSQL before its lease ends, but it is part of a process that can be
//! killed, hang, or be frozen together with its host. It tells the guard its [`Deadline`] beforehand; a guard needs
//! nobody's word to act on it.
//!
//! * `process` is the guard: a process of its own that sleeps until the deadline and kills the server. `handle` starts
//!   it, and another one when it is gone; they share a page of `memory`.
//! * `vip` is the leader's address, given up before the lease can be somebody else's, as everything else here.
//! * `watchdog` is the kernel's, which resets the machine.
//! * `egress` is the fence for what even the fastest kill is too late for: a `bpf` program on PostgreSQL's `cgroup`.

mod bpf;
mod cgroup;
mod egress;
mod handle;
mod memory;
mod process;
pub mod vip;
mod watchdog;

use std::ffi::OsString;
use std::fmt::{self, Debug, Display};
use std::path::Path;
use std::sync::Arc;

use tracing::error;
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_config::local;

pub use self::egress::Egress;
use self::handle::GuardProcess;
pub use self::process::run;
use self::vip::{Holder, Vip};
use self::watchdog::Watchdog;

/// When a server here has to have stopped writing, unless that is moved by a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The keeper kills the server: the first line.
    pub fence_at: Instant,
    /// The guard kills it: the second line, early enough that it is over by `until`.
    pub kill_at: Instant,
    /// The end of the lease: from here on somebody else may take writes.
    pub until: Instant,
}

impl Deadline {
    /// Both of the two that come first.
    pub fn sooner(self, other: Deadline) -> Deadline {
        Deadline {
            fence_at: self.fence_at.min(other.fence_at),
            kill_at: self.kill_at.min(other.kill_at),
            until: self.until.min(other.until),
        }
    }
}

/// What the keeper of the lease can do to a guard.
///
/// It is armed before a server here may take writes, every renewal moves the deadline, and it is disarmed once nothing
/// is left that could write, or when an operator has taken over. Calls come one at a time, in order, from wherever the
/// lease changes, so they store and return: nothing here may block or wait.
///
/// A model of it: remember the deadline of the host in a place that outlives the agent (its crash, hang, restart); once
/// the clock has passed `kill_at`, whether the agent lives or not, kill the server as `Fence` does and stay at it until
/// the deadline is moved or removed. A guard that was paused with its host does so at once when it goes on. From `until`
/// on, where there is an egress fence, no answer leaves the server for its clients.
pub trait Guard: Debug + Send + Sync + 'static {
    /// The deadline is this one now, earlier or later than before.
    fn arm(&self, deadline: Deadline);

    /// There is nothing to guard.
    fn disarm(&self);

    /// The deadline in force: after the start that which an earlier agent left behind with its server.
    fn deadline(&self) -> Option<Deadline>;

    /// The leader's address: held here until then, unless that is moved by a renewal, and not added where that is over;
    /// `None`: given up, and gone when this returns.
    fn hold_address(&self, until: Option<Instant>) {
        let _ = until;
    }

    /// What works and what does not, for status documents.
    fn status(&self) -> Status {
        Status::default()
    }
}

/// What ends writes where the agent can't.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// The guard process.
    pub process: Part,
    /// The egress fence.
    pub egress: Part,
    /// The kernel watchdog.
    pub watchdog: Part,
    /// Why this node may not lead: a watchdog that is required does not work.
    pub must_not_lead: Option<String>,
    /// How often the guard process has killed PostgreSQL.
    pub kills: u64,
}

/// One of the means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// It works, and has a deadline.
    Armed,
    /// It works; there is nothing to guard.
    Ready,
    /// It does not work, for this reason.
    Off(String),
}

impl Default for Part {
    fn default() -> Self {
        Part::Off("not started".to_owned())
    }
}

impl Part {
    /// Of something that works if `works`, and has a deadline if `armed`.
    fn of<T>(works: Result<T, String>, armed: bool) -> Self {
        match works {
            Ok(_) if armed => Part::Armed,
            Ok(_) => Part::Ready,
            Err(why) => Part::Off(why),
        }
    }

    /// Whether it works.
    pub fn works(&self) -> bool {
        !matches!(self, Part::Off(_))
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Armed => f.write_str("armed"),
            Part::Ready => f.write_str("ready"),
            Part::Off(why) => write!(f, "off: {why}"),
        }
    }
}

/// The guard of this host.
#[derive(Debug)]
pub struct HostGuard {
    process: Result<GuardProcess, String>,
    egress: Arc<Egress>,
    watchdog: Result<Watchdog, String>,
    address: Option<Holder>,
}

impl HostGuard {
    /// Starts what can be started for the server in `data_dir`, and takes over what an earlier agent left behind. What
    /// does not work is in the status, and in the log. `program`: what its processes are known by where that is not
    /// `postgres…`. `egress`: with a fence, where the system permits it.
    pub fn start(
        data_dir: &Path,
        program: Option<OsString>,
        egress: bool,
        watchdog: &local::Watchdog,
        vip: Option<&local::Vip>,
    ) -> Self {
        let vip = vip.map(Vip::new);
        let process = GuardProcess::start(data_dir, program, vip.clone()).map_err(|error| error.to_string());
        if let Err(why) = &process {
            error!("there is no guard process: {why}");
        }
        let until = process.as_ref().ok().and_then(GuardProcess::kill_at);
        let watchdog = Watchdog::start(watchdog).map_err(|error| error.to_string());
        Self {
            process,
            egress: Arc::new(Egress::new(data_dir, egress, until)),
            watchdog,
            address: vip.map(Holder::new),
        }
    }

    /// The fence that the server has to be started behind.
    pub fn egress(&self) -> Arc<Egress> {
        self.egress.clone()
    }

    /// The agent ends in order.
    pub fn end(&self) {
        if let Ok(process) = &self.process {
            process.end();
        }
        if let Ok(watchdog) = &self.watchdog {
            watchdog.end();
        }
    }
}

impl Guard for HostGuard {
    fn arm(&self, deadline: Deadline) {
        if let Ok(process) = &self.process {
            process.set(Some(deadline.kill_at));
        }
        self.egress.arm(deadline.until);
        if let Ok(watchdog) = &self.watchdog {
            watchdog.arm(deadline.until);
        }
    }

    fn disarm(&self) {
        if let Ok(process) = &self.process {
            process.set(None);
        }
        self.egress.disarm();
        if let Ok(watchdog) = &self.watchdog {
            watchdog.disarm();
        }
    }

    fn hold_address(&self, until: Option<Instant>) {
        let Some(holder) = &self.address else { return };
        // The guard knows of it before it is there, and as long as it may be.
        // Without one nobody would give the address up if this process can't.
        let Ok(process) = &self.process else {
            holder.give_up();
            return;
        };
        match until {
            Some(until) => {
                process.set_address(Some(until));
                holder.hold(until);
            }
            // One that can't be taken away is tried again by the guard.
            None => process.set_address(if holder.give_up() { None } else { Some(SystemClock.now()) }),
        }
    }

    fn deadline(&self) -> Option<Deadline> {
        let at = self.process.as_ref().ok()?.kill_at()?;
        Some(Deadline { fence_at: at, kill_at: at, until: at })
    }

    fn status(&self) -> Status {
        let armed = self.deadline().is_some();
        let process = self.process.as_ref().map_err(Clone::clone).and_then(GuardProcess::state);
        let watchdog = self.watchdog.as_ref().map_err(Clone::clone);
        Status {
            process: Part::of(process, armed),
            egress: Part::of(self.egress.works(), self.egress.is_armed()),
            kills: self.process.as_ref().map_or(0, GuardProcess::kills),
            must_not_lead: watchdog.as_ref().ok().and_then(|watchdog| watchdog.missing()),
            watchdog: watchdog.map_or_else(Part::Off, |watchdog| Part::of(watchdog.works(), watchdog.is_armed())),
        }
    }
}

/// Nobody on guard.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGuard;

impl Guard for NoGuard {
    fn arm(&self, _: Deadline) {}

    fn disarm(&self) {}

    fn deadline(&self) -> Option<Deadline> {
        None
    }
}
