//! Callbacks (`on_start`, `on_role_change` …): commands of the user that run beside everything else (ha-loop §19).

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal};

use super::program;

/// Starts callbacks; a new one kills the one still running, children included, see [`Slot::displaced_by`].
#[derive(Default, Clone)]
pub struct Callbacks {
    running: Arc<Mutex<BTreeMap<Slot, Pid>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Reload,
    Stop,
    Other,
}

impl Slot {
    fn of(event: &str) -> Self {
        match event {
            "on_reload" => Slot::Reload,
            "on_stop" => Slot::Stop,
            _ => Slot::Other,
        }
    }

    /// Whose callbacks this event ends. The `on_role_change` of a primary that is demoted follows at the heels of its
    /// `on_stop`: both go on.
    fn displaced_by(event: &str) -> &'static [Self] {
        match event {
            "on_reload" => &[Slot::Reload],
            "on_role_change" => &[Slot::Other],
            _ => &[Slot::Stop, Slot::Other],
        }
    }
}

impl Callbacks {
    /// Runs `command <event> <role> <scope>` in the background. What goes wrong is logged.
    pub fn run(&self, command: &str, event: &'static str, role: &str, scope: &str) {
        let Some(words) = program::words(command).filter(|words| !words.is_empty()) else {
            tracing::error!("callback {event}: {command:?} is not a command");
            return;
        };
        let mut process = Command::new(&words[0]);
        process.args(&words[1..]).args([event, role, scope]).stdin(Stdio::null()).process_group(0);
        program::clean_environment(&mut process);
        let slot = Slot::of(event);
        let mut running = self.running.lock();
        for earlier in Slot::displaced_by(event).iter().filter_map(|slot| running.remove(slot)).collect::<Vec<_>>() {
            tracing::info!("callback {event} ends the one still running");
            // Its own group, still unreaped: the entry is removed under this lock before the wait below reaps it.
            let _ = rustix::process::kill_process_group(earlier, Signal::KILL);
        }
        let mut child = match process.spawn() {
            Ok(child) => child,
            Err(error) => {
                tracing::error!("callback {event}: {} can't be executed: {error}", words[0]);
                return;
            }
        };
        let pid = Pid::from_child(&child);
        running.insert(slot, pid);
        drop(running);
        let table = self.running.clone();
        let wait = move || {
            let ended = rustix::process::waitid(
                rustix::process::WaitId::Pid(pid),
                rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
            );
            let mut running = table.lock();
            if running.get(&slot) == Some(&pid) {
                running.remove(&slot);
            }
            drop(running);
            match (ended, child.wait()) {
                (Ok(_), Ok(status)) if status.success() => tracing::debug!("callback {event} done"),
                (_, Ok(status)) => tracing::warn!("callback {event} ended with {status}"),
                (_, Err(error)) => tracing::warn!("callback {event}: {error}"),
            }
        };
        if let Err(error) = std::thread::Builder::new().name("callback".to_owned()).spawn(wait) {
            tracing::error!("callback {event}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::Duration;

    use trunkline_common::{Clock, SystemClock};

    fn eventually(what: &str, check: impl Fn() -> bool) {
        let deadline = SystemClock.now() + Duration::from_secs(10);
        while !check() {
            assert!(SystemClock.now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn arguments_are_appended_and_a_new_one_ends_the_old_with_its_children() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (out, pid) = (dir.path().join("out"), dir.path().join("pid"));
        let callbacks = Callbacks::default();
        let slow = format!("sh -c 'sleep 60 & echo $! > {}.tmp; mv {0}.tmp {0}; wait' x", pid.display());
        callbacks.run(&slow, "on_start", "replica", "demo");
        eventually("the slow one starts", || !read(&pid).is_empty());
        callbacks.run(&format!("sh -c 'echo \"$@\" > {}' x", out.display()), "on_role_change", "primary", "demo");
        eventually("the second runs", || read(&out) == "on_role_change primary demo\n");
        let state = format!("/proc/{}/stat", read(&pid).trim());
        eventually("the child is dead", || !Path::new(&state).exists() || read(Path::new(&state)).contains(") Z "));
        eventually("nobody is left", || callbacks.running.lock().is_empty());
    }

    #[test]
    fn a_demotion_does_not_cut_its_on_stop_off() {
        let dir = tempfile::tempdir().expect("temp dir");
        let out = dir.path().join("out");
        let waits = |event: &str| {
            let (out, go) = (out.display(), dir.path().join(format!("{event}.go")));
            format!("sh -c 'until [ -e {} ]; do sleep 0.01; done; echo \"$@\" >> {out}' x", go.display())
        };
        let callbacks = Callbacks::default();
        callbacks.run(&waits("on_stop"), "on_stop", "primary", "demo");
        callbacks.run(&waits("on_role_change"), "on_role_change", "replica", "demo");
        for event in ["on_role_change", "on_stop"] {
            std::fs::write(dir.path().join(format!("{event}.go")), "").expect("go");
        }
        eventually("both run", || read(&out).lines().count() == 2);
        callbacks.run("sleep 60", "on_stop", "primary", "demo");
        callbacks.run("true", "on_start", "replica", "demo");
        eventually("a start ends it", || callbacks.running.lock().is_empty());
    }
}
