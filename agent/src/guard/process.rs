//! The guard process: sleeps until the deadline, and kills the server if nobody has moved it by then.
//!
//! It is the agent's own program, started again: one thread, no runtime, no network, no DCS, no log while it matters.
//! Standard input is a pipe that wakes it, whose end says that the agent is gone; standard output is the memory with the
//! deadline. It goes on without its agent until the deadline is met or removed. The leader's address (`vip`) has a time of its
//! own there, a little later: who is connected by it shall see the server end.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::mm::MlockAllFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use trunkline_common::{Clock, Instant, SystemClock};

use super::memory::Memory;
use super::vip::Vip;
use crate::postgres::{Server, kill_processes_of, real_path};

/// Between two looks at what is dying. Each begins with the deadline: it may have been removed, and what is started then
/// must live.
const RECHECK: Duration = Duration::from_millis(1);

/// While a deadline is over and nobody has removed it, a server may yet be started by an agent that hangs: looked for
/// this often.
const SWEEP: Duration = Duration::from_millis(20);

/// Runs the guard of the server in `data_dir`, and of the addresses of its leader. `program`: what the server's is called
/// where that is not `postgres…`.
pub fn run(data_dir: &Path, program: Option<OsString>, vip: Option<Vip>) -> ExitCode {
    match guard(data_dir, program, vip) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the guard of {} ends: {error}", data_dir.display());
            ExitCode::FAILURE
        }
    }
}

fn guard(data_dir: &Path, program: Option<OsString>, vip: Option<Vip>) -> std::io::Result<()> {
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let memory = Memory::open(stdout.as_fd())?;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK)?;
    harden();
    let mut agent_lives = true;
    let mut server = Server { dir: real_path(data_dir), program };
    let mut met = None;
    memory.set_ready(std::process::id());
    loop {
        let now = SystemClock.now();
        // The server first: it is what can do harm, and nothing may keep the guard from ending it.
        let deadline = memory.kill_at();
        let killed = deadline.filter(|at| *at <= now).map(|_| kill(&server));
        let address = vip.as_ref().and_then(|vip| give_up_address(vip, memory, now));
        let done = !agent_lives && address.is_none();
        let look = match (deadline, killed) {
            (None, _) if done => return Ok(()),
            (None, _) => None,
            (Some(at), None) => Some(at),
            (Some(at), Some(found)) => {
                if found && met != deadline {
                    memory.count_kill();
                    met = deadline;
                }
                if !found && done {
                    say_so(data_dir, met == deadline, SystemClock.now().since(at));
                    return Ok(());
                }
                Some(now + if found { RECHECK } else { SWEEP })
            }
        };
        let look = look.into_iter().chain(address).min();
        memory.set_next_look(look);
        let start = Itimerspec { it_interval: Timespec::default(), it_value: timespec(look) };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &start)?;
        let mut waits = [PollFd::new(&timer, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        let waits = &mut waits[..if agent_lives { 2 } else { 1 }];
        match rustix::event::poll(waits, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if waits.get(1).is_some_and(|wait| !wait.revents().is_empty()) {
            agent_lives = rustix::io::read(&stdin, &mut [0u8; 64]) != Ok(0);
            // Looked up now, while the server is well: at the deadline its disk may not answer any more.
            server.dir = real_path(data_dir);
        }
    }
}

/// Gives the leader's address up if its time is over; when to look again, `None` once there is none.
fn give_up_address(vip: &Vip, memory: &Memory, now: Instant) -> Option<Instant> {
    let at = memory.address_until()?;
    if now < at {
        return Some(at);
    }
    if vip.remove().is_err() {
        return Some(now + SWEEP);
    }
    memory.end_address(at);
    None
}

/// Kills everything of the server that is there now; whether there was anything.
fn kill(server: &Server) -> bool {
    !kill_processes_of(server, SystemClock.now(), |_| {})
}

/// Only where nobody else is left to tell it, and after it was done: this may block.
fn say_so(data_dir: &Path, found: bool, late: Duration) {
    let text = match found {
        true => format!("the guard killed PostgreSQL in {}, done {late:.0?} after its deadline", data_dir.display()),
        false => format!("the guard found nothing to kill in {}", data_dir.display()),
    };
    let _ = writeln!(std::io::stderr(), "{text}: the agent is gone, and its lease ends");
}

/// What the system permits of: never swapped out, never chosen by the OOM killer, first in line for the processor. And a
/// signal to all processes of a service is not for the guard: it ends when it has nothing to guard.
#[allow(unsafe_code)]
fn harden() {
    let _ = rustix::thread::set_name(c"trunkline-guard");
    // A program file with capabilities would hide its memory from the next agent.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable);
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    // Not what is allocated later: under a limit on locked memory that would fail.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT);
    // SAFETY: plain system calls on this process; the structure is initialised and outlives the call.
    unsafe {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        let priority = libc::sched_param { sched_priority: 1 };
        if libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) != 0 {
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
        }
    }
}

/// A timer's time; zero disarms it.
fn timespec(at: Option<Instant>) -> Timespec {
    let since_boot = at.map_or(Duration::ZERO, |at| at.since_boot().max(Duration::from_nanos(1)));
    Timespec {
        tv_sec: i64::try_from(since_boot.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: since_boot.subsec_nanos().into(),
    }
}
