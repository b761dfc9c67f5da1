//! The first process of a container: starts the agent as its child, passes signals on to it, reaps whoever is left to it, and
//! ends as it ends.
//!
//! The kernel gives every process whose parent has died to process 1. The agent itself must not wait for any child there is: it
//! waits for its own by name, and would take their ends away from those who want to know of them.

use std::io;
use std::process::{Command, ExitCode};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};

/// What is passed on.
const SIGNALS: [(SignalKind, Signal); 6] = [
    (SignalKind::terminate(), Signal::TERM),
    (SignalKind::interrupt(), Signal::INT),
    (SignalKind::quit(), Signal::QUIT),
    (SignalKind::hangup(), Signal::HUP),
    (SignalKind::user_defined1(), Signal::USR1),
    (SignalKind::user_defined2(), Signal::USR2),
];

/// Whether this process is one that has to do this.
pub fn is_needed() -> bool {
    std::process::id() == 1
}

/// Starts `command` and returns when it has ended, with its code; 128 and the number of the signal that ended it.
///
/// # Errors
/// It can't be started.
pub fn run(command: &mut Command) -> io::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(supervise(command))
}

async fn supervise(command: &mut Command) -> io::Result<ExitCode> {
    let mut ends = signal(SignalKind::child())?;
    let mut streams = Vec::new();
    for (kind, number) in SIGNALS {
        streams.push((signal(kind)?, number));
    }
    // Never waited for by its handle, but like all the others.
    let child = Pid::from_child(&command.spawn()?);
    for (mut stream, number) in streams {
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                let _ = rustix::process::kill_process(child, number);
            }
        });
    }
    loop {
        if let Some(status) = reap(child)? {
            let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from));
        }
        ends.recv().await;
    }
}

/// Reaps everybody who has ended; how `child` did, if it is among them.
fn reap(child: Pid) -> io::Result<Option<WaitStatus>> {
    let mut ended = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == child => ended = Some(status),
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(ended),
            Err(error) => return Err(error.into()),
        }
    }
}
