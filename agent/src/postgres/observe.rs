//! Looking at the server: process, files, one query; never an error, always a status.

use std::time::Duration;

use trunkline_common::{Clock, Instant, TimelineId};

use super::control::{ControlFile, has_standby_signal};
use super::files::{self, DataDir};
use super::instance::Instance;
use super::listening::Listening;
use super::pidfile::{PidFile, PidFileStatus};
use super::process::Postmaster;
use super::query::NoAnswer;
use super::walsender::{Purpose, Wire};
use super::{PgError, PgRole, PgStatus, Running, Upstream, program, wal};

impl Instance {
    pub(super) async fn look(&self, deadline: Duration) -> PgStatus {
        let until = self.inner.clock.now() + deadline;
        let Some(postmaster) = self.process().find() else { return self.at_rest() };
        if postmaster.has_ended() {
            return self.after(&postmaster, deadline).await;
        }
        let Some(pid_file) = self.pid_file() else { return PgStatus::Starting };
        if postmaster.is_frozen() {
            return PgStatus::Unresponsive;
        }
        match pid_file.status {
            PidFileStatus::Starting => return PgStatus::Starting,
            PidFileStatus::Stopping => return PgStatus::Stopping,
            PidFileStatus::Ready | PidFileStatus::Standby => {}
        }
        // Not `Broken`: that would mean that nothing runs here which could write.
        let Ok(control) = self.control() else { return PgStatus::Unresponsive };
        let config = self.config_now();
        let query = self.inner.sessions.status(&config, &pid_file, control.system_id);
        match tokio::time::timeout(deadline, query).await {
            Ok(Ok(running)) => {
                let left = until.since(self.inner.clock.now());
                // A backend outlives its postmaster for a moment, in which it may answer that nobody streams any more. Whoever
                // believed that would take the standbys off the `sync` key that are to take over.
                if postmaster.has_ended() {
                    return self.after(&postmaster, left).await;
                }
                let replayed = tokio::time::timeout(left, self.replayed_timeline(&running, &control, &pid_file)).await;
                let running = Running { timeline: running.timeline.max(replayed.unwrap_or_default()), ..running };
                self.learn_pending_restart(until.since(self.inner.clock.now())).await;
                PgStatus::Running(self.complete(running, &postmaster, &control))
            }
            Ok(Err(no_answer)) => self.without_answer(&postmaster, no_answer, until).await,
            Err(_) => {
                self.inner.sessions.close().await;
                PgStatus::Unresponsive
            }
        }
    }

    /// After the end of a postmaster: its orphans are being killed; that takes a moment.
    async fn after(&self, postmaster: &Postmaster, limit: Duration) -> PgStatus {
        match tokio::time::timeout(limit, postmaster.gone()).await {
            Ok(()) => self.at_rest(),
            Err(_) => PgStatus::Stopping,
        }
    }

    /// Without a postmaster.
    pub(super) fn at_rest(&self) -> PgStatus {
        let config = self.config_now();
        match files::look(&config.data_dir) {
            DataDir::Empty | DataDir::Unfinished => return PgStatus::NoData,
            DataDir::Refused(why) => return PgStatus::Broken(why),
            DataDir::Present => {}
        }
        match self.control() {
            Ok(control) => PgStatus::Stopped(control.data(has_standby_signal(&config.data_dir))),
            Err(error) => PgStatus::Broken(error.to_string()),
        }
    }

    /// The fallback for layouts of pg_control that aren't known here; blocks for the time a small program takes.
    pub(super) fn controldata(&self) -> Result<ControlFile, PgError> {
        let config = self.config_now();
        let path = program::path(&config, "pg_controldata");
        let output = std::process::Command::new(&path).arg(&config.data_dir).env("LC_ALL", "C").output();
        let output = output.map_err(|error| program::unusable(&path, &error))?;
        let parsed = ControlFile::from_controldata(&String::from_utf8_lossy(&output.stdout));
        parsed.ok_or_else(|| PgError::Failed("pg_controldata could not read global/pg_control".to_owned()))
    }

    /// The timeline that a standby replays without a WAL receiver, where pg_control may not have heard of it yet: right
    /// after a promotion that it followed it was killed, say. PostgreSQL tells it to who replicates.
    async fn replayed_timeline(
        &self,
        running: &Running,
        control: &ControlFile,
        pid_file: &PidFile,
    ) -> Option<TimelineId> {
        let config = self.config_now();
        let told = self.inner.received.lock().filter(|(pid, _)| *pid == pid_file.pid).map(|(_, timeline)| timeline);
        let known = told.max(Some(control.known_timeline()));
        let unknown = running.role == PgRole::Standby && running.timeline.is_none();
        if !unknown || wal::newest_history(&config.data_dir) <= known {
            return None;
        }
        let listening = Listening::of(&config, Some(pid_file));
        let own = Upstream {
            name: self.inner.name.clone(),
            host: listening.local_host(config.use_unix_socket_repl),
            port: listening.port,
            slot: None,
        };
        let ask = async { Wire::connect(&own, &config.replication, Purpose::Replication).await?.identify().await };
        match ask.await {
            Ok(identity) => Some(identity.timeline),
            Err(error) => {
                // Once for each server: this is asked again and again.
                if self.inner.mute.lock().replace(pid_file.pid) != Some(pid_file.pid) {
                    tracing::warn!("the timeline of the local server can't be asked for by replication: {error}");
                }
                None
            }
        }
    }

    /// Adds what the query can't see.
    fn complete(&self, mut running: Running, postmaster: &Postmaster, control: &ControlFile) -> Running {
        running.pending_restart = self.inner.pending_restart.lock().clone();
        running.checkpoint_timeline = Some(control.timeline);
        if running.role == PgRole::Standby {
            let mut received = self.inner.received.lock();
            let earlier = received.filter(|(pid, _)| *pid == postmaster.pid()).map(|(_, timeline)| timeline);
            running.timeline = running.timeline.max(earlier).max(Some(control.known_timeline()));
            *received = running.timeline.map(|timeline| (postmaster.pid(), timeline));
        }
        running
    }

    async fn without_answer(&self, postmaster: &Postmaster, why: NoAnswer, until: Instant) -> PgStatus {
        // A postmaster that is just ending answers like this too.
        if postmaster.has_ended() {
            let left = until.since(self.inner.clock.now());
            return match tokio::time::timeout(left, postmaster.gone()).await {
                Ok(()) => self.at_rest(),
                Err(_) => PgStatus::Stopping,
            };
        }
        let stopping = self.pid_file().is_some_and(|file| file.status == PidFileStatus::Stopping);
        match why {
            _ if stopping => PgStatus::Stopping,
            // It recovers from a crash of one of its processes.
            NoAnswer::NotNow => PgStatus::Starting,
            NoAnswer::Refused(words) => PgStatus::Refusing(words),
            NoAnswer::Error(error) => {
                tracing::warn!("the local server can't be asked: {error}");
                PgStatus::Unresponsive
            }
        }
    }
}

/// A status in a word, for sentences.
pub(super) fn words(status: &PgStatus) -> &'static str {
    match status {
        PgStatus::NoData => "without data",
        PgStatus::Broken(_) => "unreadable",
        PgStatus::Stopped(_) => "stopped",
        PgStatus::Starting => "starting",
        PgStatus::Stopping => "stopping",
        PgStatus::Running(running) => match running.role {
            PgRole::Primary => "running as primary",
            PgRole::Standby => "running as standby",
        },
        PgStatus::Refusing(_) => "answering with an error",
        PgStatus::Unresponsive => "not answering",
    }
}
