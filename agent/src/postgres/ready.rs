//! Waiting for the server to get somewhere, by events: the postmaster writes its state into `postmaster.pid`, recovery
//! and shutdown theirs into `global/pg_control`, and its end is a pidfd.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};

use super::process::Postmaster;

/// Why a wait ended without what it waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The postmaster has ended.
    Gone,
    /// The time is over.
    Timeout,
}

/// A safety net under inotify (a file system that reports no events): a file is looked at that often anyway.
const NET: Duration = Duration::from_millis(50);

/// Where inotify can't be had (`fs.inotify.max_user_instances` used up) there is no event: look that often.
const RECHECK: Duration = Duration::from_millis(2);

/// Changes of the two files in which PostgreSQL says how far it is.
pub struct Changes {
    events: Option<EventStream<[u8; 4096]>>,
}

impl Changes {
    /// Begins to listen; what changes from here on is not missed.
    pub fn of(data_dir: &Path) -> Self {
        let listen = || -> std::io::Result<EventStream<[u8; 4096]>> {
            let inotify = Inotify::init()?;
            // The directory, not the file: postmaster.pid appears and disappears.
            inotify.watches().add(data_dir, WatchMask::CREATE | WatchMask::MODIFY | WatchMask::DELETE)?;
            // Written in place since initdb, so the file itself can be watched.
            inotify.watches().add(data_dir.join("global/pg_control"), WatchMask::MODIFY)?;
            inotify.into_event_stream([0; 4096])
        };
        let events = listen().inspect_err(|error| tracing::debug!("no inotify: {error}")).ok();
        Self { events }
    }

    /// Returns when something may have changed.
    pub async fn next(&mut self) {
        match &mut self.events {
            Some(events) => {
                let _ = tokio::time::timeout(NET, events.next()).await;
            }
            None => tokio::time::sleep(RECHECK).await,
        }
    }

    /// Asks `check` at once and after every change until it has an answer.
    pub async fn until<T>(
        &mut self,
        postmaster: &Postmaster,
        limit: Duration,
        mut check: impl FnMut() -> Option<T>,
    ) -> Result<T, Ended> {
        let wait = async {
            loop {
                if let Some(answer) = check() {
                    return Ok(answer);
                }
                tokio::select! {
                    () = self.next() => {}
                    () = postmaster.gone() => return check().ok_or(Ended::Gone),
                }
            }
        };
        tokio::time::timeout(limit, wait).await.unwrap_or(Err(Ended::Timeout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::process::Supervisor;

    #[tokio::test]
    async fn a_write_wakes_and_an_end_is_an_answer() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("global")).expect("global");
        std::fs::write(dir.path().join("global/pg_control"), "a").expect("control");
        let mut command = std::process::Command::new("sleep");
        command.arg("60");
        let process = Supervisor::new(dir.path(), None).spawn(command).expect("spawn");
        let mut changes = Changes::of(dir.path());
        let pid_file = dir.path().join("postmaster.pid");
        let limit = Duration::from_secs(10);

        let write = async { std::fs::write(&pid_file, "ready").expect("write") };
        let (seen, ()) =
            tokio::join!(changes.until(&process, limit, || std::fs::read_to_string(&pid_file).ok()), write);
        assert_eq!(seen.map(|_| ()), Ok(()));

        let soon = Duration::from_millis(20);
        assert_eq!(changes.until(&process, soon, || None::<()>).await, Err(Ended::Timeout));
        process.signal(rustix::process::Signal::KILL);
        assert_eq!(changes.until(&process, limit, || None::<()>).await, Err(Ended::Gone));
    }
}
