//! Processes of a lab: started with a log file of their own, signalled by pid, and never left behind.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

use super::wait;

/// A process that was started here. Dropping it kills it.
#[derive(Debug)]
pub struct Proc {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Proc {
    /// Starts `command` with its output appended to `log`, in a process group of its own: Ctrl-C at the terminal goes to
    /// the lab alone, which then ends its processes in their order.
    ///
    /// # Errors
    /// The program does not start.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = File::options().create(true).append(true).open(log).with_context(|| format!("{}", log.display()))?;
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).process_group(0);
        let child = command.spawn().with_context(|| format!("{name} does not start ({})", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal; nothing happens if it has ended already.
    pub fn signal(&self, signal: Signal) {
        let _ = rustix::process::kill_process(self.pid(), signal);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It has not ended within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let (name, log) = (self.name.clone(), self.log.clone());
        let ended = wait::until(format!("the end of {name}"), limit, async || self.ended().context("it is running"));
        ended.await.with_context(|| format!("last lines of {}:\n{}", log.display(), tail(&log, 15)))
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// It has not ended within `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM);
        self.wait(limit).await
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last `lines` lines of a text file, or why there are none.
pub fn tail(path: &Path, lines: usize) -> String {
    const MOST: u64 = 32 * 1024;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => {
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({error})"),
    }
}

/// The processes whose working directory is `dir` or below it. PostgreSQL's processes all work in the data directory,
/// so this finds a server's whole family whoever their parent is by now.
pub fn below(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let cwd = std::fs::read_link(entry.path().join("cwd")).ok()?;
        cwd.starts_with(dir).then(|| Pid::from_raw(pid)).flatten()
    });
    pids.collect()
}

/// Sends a signal to every process of [`below`]. New ones may appear meanwhile: repeated until a round finds no new
/// one, at most ten times.
pub fn signal_below(dir: &Path, signal: Signal) {
    let mut known: Vec<Pid> = Vec::new();
    for _ in 0..10 {
        let fresh: Vec<Pid> = below(dir).into_iter().filter(|pid| !known.contains(pid)).collect();
        if fresh.is_empty() {
            return;
        }
        for pid in &fresh {
            let _ = rustix::process::kill_process(*pid, signal);
        }
        known.extend(fresh);
    }
}

/// Kills every process of [`below`] and returns when none is left, or after five seconds.
pub fn kill_below(dir: &Path) {
    for _ in 0..500 {
        if below(dir).is_empty() {
            return;
        }
        signal_below(dir, Signal::KILL);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn finds_signals_and_ends_the_processes_below_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60").current_dir(&inner);
        let mut proc = Proc::spawn("sleeper", command, &dir.path().join("log")).unwrap();

        assert_eq!(below(dir.path()), [proc.pid()]);
        assert!(proc.ended().is_none());
        signal_below(dir.path(), Signal::TERM);
        let status = proc.wait(Duration::from_secs(5)).await.unwrap();
        assert!(!status.success());
        assert!(below(dir.path()).is_empty());
    }

    #[test]
    fn tail_of_long_short_and_absent_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "a\nb\nc\n").unwrap();
        assert_eq!(tail(&path, 2), "b\nc");
        assert_eq!(tail(&path, 20), "a\nb\nc");
        assert!(tail(&dir.path().join("none"), 2).contains("No such file"));
    }
}
