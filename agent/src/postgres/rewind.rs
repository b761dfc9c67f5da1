//! Whether the local data directory can follow a server, and pg_rewind where it can't (ha-loop §11).

use std::time::Duration;

use tokio::process::Command;
use trunkline_common::{History, Lsn, TimelineId};

use super::control::{ControlFile, has_standby_signal};
use super::files::{self, Unfinished};
use super::instance::Instance;
use super::walsender::{Identity, Purpose, Wire, WireError};
use super::{ControlState, Divergence, PgError, PgRole, PgStatus, Upstream, conninfo, program, settings, wal};

/// The bound on asking the upstream who it is.
const ASK_LIMIT: Duration = Duration::from_secs(3);

/// The bound on a checkpoint over there.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(300);

/// What pg_rewind says before it writes anything.
const REWINDING: &str = "rewinding from last common checkpoint";

/// How the local WAL ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// A standby: up to here it has replayed, or has to.
    Standby(Lsn),
    /// A primary that was shut down: its last record is the shutdown checkpoint, which begins here and ends there (`None`:
    /// the record can't be read).
    Shutdown(Lsn, Option<Lsn>),
    /// A primary that crashed: somewhere behind its last checkpoint.
    Crash(Lsn),
}

/// The verdict (ha-loop §11.2). `history` has the ancestors of `theirs`.
fn verdict(ours: TimelineId, end: End, theirs: TimelineId, history: &History) -> Divergence {
    if ours == theirs {
        return Divergence::None;
    }
    if ours > theirs {
        return Divergence::Rewind(format!("local timeline {ours} is ahead of the upstream's {theirs}"));
    }
    let Some(fork) = history.switchpoint_of(ours) else {
        return Divergence::Rewind(format!("local timeline {ours} is not an ancestor of the upstream's {theirs}"));
    };
    let gone_past = |what: &str, lsn: Lsn| Divergence::Rewind(format!("timeline {ours} ended at {fork}, {what} {lsn}"));
    match end {
        End::Standby(lsn) if lsn > fork => gone_past("this standby has replayed up to", lsn),
        End::Standby(_) => Divergence::None,
        // Only when the new primary has exactly everything, the shutdown checkpoint included, is there nothing of our own.
        End::Shutdown(_, Some(end)) if end == fork => Divergence::None,
        End::Shutdown(_, Some(end)) => gone_past("the local shutdown checkpoint ends at", end),
        End::Shutdown(start, None) => gone_past("the local shutdown checkpoint can't be read at", start),
        // What it wrote after its last checkpoint is unknown; pg_rewind recovers first and then decides.
        End::Crash(lsn) => gone_past("this primary crashed some time after", lsn),
    }
}

impl Instance {
    pub(super) async fn compare(&self, upstream: &Upstream) -> Divergence {
        let (timeline, end) = match self.local_end().await {
            Ok(local) => local,
            Err(why) => return Divergence::Unknown(why),
        };
        let was_primary = !matches!(end, End::Standby(_));
        let ask = async {
            let mut wire = Wire::connect(upstream, &self.config_now().replication, Purpose::Replication).await?;
            let identity = wire.identify().await?;
            let recovers = wire.in_recovery().await?;
            // A leader that is still to be promoted will fork where nobody knows yet.
            if was_primary && recovers {
                return Err(WireError("it is still in recovery".to_owned()));
            }
            Ok::<_, WireError>((identity, recovers, wire.history(identity.timeline).await?))
        };
        let (identity, recovers, history) = match tokio::time::timeout(ASK_LIMIT, ask).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Divergence::Unknown(format!("{}: {error}", upstream.name)),
            Err(_) => return Divergence::Unknown(format!("{} did not answer within {ASK_LIMIT:?}", upstream.name)),
        };
        if self.control().is_ok_and(|control| control.system_id != identity.system_id) {
            return Divergence::Unknown(format!(
                "{} belongs to another cluster: {}",
                upstream.name, identity.system_id
            ));
        }
        let mut verdict = verdict(timeline, end, identity.timeline, &history);
        if timeline == identity.timeline && !recovers {
            verdict = self.compare_wal(upstream, timeline, end).await;
        }
        tracing::debug!("local timeline {timeline} {end:?} against {} {identity:?}: {verdict:?}", upstream.name);
        verdict
    }

    /// The local server and the upstream are on timelines of the same number. Either this is a copy of it, and has the
    /// same WAL. Or two nodes were promoted to that number, one of them before anybody could hear of it: then the last WAL
    /// that is known here is not to be found over there.
    async fn compare_wal(&self, upstream: &Upstream, timeline: TimelineId, end: End) -> Divergence {
        let config = self.config_now();
        let tail = || {
            let control = self.control().ok()?;
            let end = match end {
                End::Standby(lsn) => lsn,
                End::Shutdown(..) | End::Crash(_) => wal::record_end(&config.data_dir, &control)?,
            };
            wal::tail(&config.data_dir, &control, timeline, end)
        };
        let Some(tail) = tail() else { return Divergence::None };
        let read = format!(
            "SELECT encode(pg_catalog.pg_read_binary_file('pg_wal/{}', {}, {}, true), 'hex')",
            tail.file,
            tail.offset,
            tail.bytes.len()
        );
        let ask = async {
            let mut wire = Wire::connect(upstream, &config.superuser, Purpose::Sql(&config.database)).await?;
            let rows = wire.query(&read).await?;
            Ok::<_, WireError>(rows.into_iter().flatten().next().flatten())
        };
        let there = match tokio::time::timeout(ASK_LIMIT, ask).await {
            Ok(Ok(there)) => there,
            Ok(Err(error)) => return Divergence::Unknown(format!("{}: {error}", upstream.name)),
            Err(_) => return Divergence::Unknown(format!("{} did not answer within {ASK_LIMIT:?}", upstream.name)),
        };
        let here: String = tail.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match there {
            Some(there) if there != here => Divergence::Twice(format!(
                "the WAL in {} up to byte {} is another one on {}: two nodes have begun a timeline of this number",
                tail.file,
                tail.offset + tail.bytes.len() as u64,
                upstream.name
            )),
            // A file that is not there any more says nothing: whoever needs it finds that out.
            _ => Divergence::None,
        }
    }

    pub(super) async fn run_rewind(&self, upstream: &Upstream) -> Result<(), PgError> {
        if self.process().find().is_some() {
            return Err(PgError::Failed("pg_rewind needs a stopped server".to_owned()));
        }
        let config = self.config_now();
        super::process::remove_stale_lock(&self.server())
            .map_err(|error| PgError::Failed(format!("postmaster.pid: {error}")))?;
        program::require(&config, "pg_rewind")?;
        files::write_pgpass(&config, upstream)?;
        self.upstream_checkpoint(upstream).await?;
        // Recovery in single-user mode, by pg_rewind or below, refuses to run as a standby.
        files::set_standby_signal(&config.data_dir, false)?;
        let version = self.version();
        let control = self.control()?;
        let clean = matches!(control.state, ControlState::ShutDown | ControlState::ShutDownInRecovery);
        if !clean {
            self.single_user_recovery().await?;
        }
        self.archive_waiting_wal().await;
        let mut settings = conninfo::to_upstream(upstream, &config.rewind, &config.pgpass, version);
        settings.insert("dbname".to_owned(), config.database.clone());
        settings.insert("target_session_attrs".to_owned(), "read-write".to_owned());
        conninfo::end_when_vanished(&mut settings);
        let mut command = Command::new(program::path(&config, "pg_rewind"));
        command.env("PGPASSFILE", &config.pgpass);
        command.env_remove("LC_ALL").env_remove("LANGUAGE").env("LC_MESSAGES", "C");
        command.arg("--target-pgdata").arg(&config.data_dir);
        command.arg("--source-server").arg(conninfo::render(&settings));
        if version >= 13 {
            // pg_rewind asks the server's own configuration for the command; that of a former primary lacks what is set for
            // standbys only.
            let recovery = settings::recovery(&config, None, &self.inner.name, version);
            self.rewrite(|managed| managed.recovery = recovery)?;
            match self.configured("restore_command").await {
                Ok(restore) if restore.is_empty() => {}
                Ok(_) => {
                    command.arg("--restore-target-wal");
                }
                Err(error) => tracing::warn!("pg_rewind goes without the archive: {error}"),
            }
        }
        if version >= 15 && config.config_dir != config.data_dir {
            command.arg("--config-file").arg(files::conf_file(&config));
        }
        command.args(&config.rewind_options);
        tracing::info!("pg_rewind to {} at {}:{}", upstream.name, upstream.host, upstream.port);
        files::begin(Unfinished::Rewind, &config.data_dir)?;
        let result = program::run(&mut command).await;
        // What it says of its own end is known. One that was cut off with this agent leaves the mark behind, and so does one whose source
        // went away when it may have begun to write.
        let begun = |error: &PgError| error.to_string().contains(REWINDING);
        let cut_off =
            result.as_ref().is_err_and(begun) && matches!(self.compare(upstream).await, Divergence::Unknown(_));
        if !cut_off {
            files::end(Unfinished::Rewind, &config.data_dir)?;
        }
        if result.is_ok() {
            self.flush_upstream(upstream).await;
        }
        result
    }

    /// pg_rewind lets recovery go as far as WAL had been written by the source, which may not have flushed that, and then sends
    /// it only with its next commit: a server that is rewound to an idle one would let nobody in until then. So there is one.
    async fn flush_upstream(&self, upstream: &Upstream) {
        const COMMIT: &str = "SET synchronous_commit TO local; SELECT pg_catalog.txid_current()";
        let config = self.config_now();
        let commit = async {
            Wire::connect(upstream, &config.rewind, Purpose::Sql(&config.database)).await?.query(COMMIT).await
        };
        match tokio::time::timeout(ASK_LIMIT, commit).await {
            Ok(Ok(_)) => {}
            // Also a standby, which has nothing to flush.
            Ok(Err(error)) => tracing::debug!("{} was not asked for a commit: {error}", upstream.name),
            Err(_) => tracing::debug!("{} has made no commit within {ASK_LIMIT:?}", upstream.name),
        }
    }

    /// Crash recovery without serving anybody. WAL that is to be archived stays for the next start. pg_rewind would do it
    /// since 13, by the files alone: a `wal_level` below that of the logical slots would end it.
    async fn single_user_recovery(&self) -> Result<(), PgError> {
        let config = self.config_now();
        let mut command = Command::new(program::path(&config, "postgres"));
        command.arg("--single").arg("-D").arg(&config.data_dir);
        command.arg(format!("--config_file={}", files::conf_file(&config).display()));
        let (values, _) = settings::command_line(&config, self.scope(), None);
        for (name, value) in values {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.args(["-c", "archive_mode=on", "-c", "archive_command=false", "template1"]);
        tracing::info!("crash recovery in single-user mode");
        program::run(&mut command).await
    }

    /// pg_rewind before 16 takes the source's timeline from its last checkpoint: right after a promotion that is still the
    /// old one, and it would find nothing to do.
    async fn upstream_checkpoint(&self, upstream: &Upstream) -> Result<(), PgError> {
        let config = self.config_now();
        let failed = |error: WireError| PgError::Failed(format!("{}: {error}", upstream.name));
        let late = |what: &str, limit| PgError::Timeout { what: format!("{what} of {}", upstream.name), limit };
        let ask = async {
            let mut wire = Wire::connect(upstream, &config.replication, Purpose::Replication).await?;
            let Identity { timeline, .. } = wire.identify().await?;
            let mut wire = Wire::connect(upstream, &config.rewind, Purpose::Sql(&config.database)).await?;
            let rows = wire.query("SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()").await?;
            let text = rows.first().and_then(|row| row.first()).and_then(Option::as_deref);
            Ok((timeline, text.and_then(|text| text.parse().ok()).map(TimelineId)))
        };
        let asked = tokio::time::timeout(ASK_LIMIT, ask).await.map_err(|_| late("the timeline", ASK_LIMIT))?;
        let (timeline, checkpointed) = asked.map_err(failed)?;
        if checkpointed == Some(timeline) {
            return Ok(());
        }
        tracing::info!("{} has no checkpoint on timeline {timeline} yet, asking for one", upstream.name);
        let checkpoint = async {
            let mut wire = Wire::connect(upstream, &config.superuser, Purpose::Sql(&config.database)).await?;
            wire.query("CHECKPOINT").await
        };
        let done = tokio::time::timeout(CHECKPOINT_LIMIT, checkpoint).await;
        done.map_err(|_| late("the checkpoint", CHECKPOINT_LIMIT))?.map(drop).map_err(failed)
    }

    async fn local_end(&self) -> Result<(TimelineId, End), String> {
        match self.look(Duration::from_secs(2)).await {
            PgStatus::Running(running) if running.role == PgRole::Standby => {
                let timeline = running.timeline.ok_or_else(|| "the local timeline is not known yet".to_owned())?;
                Ok((timeline, End::Standby(running.replay_lsn.unwrap_or(running.lsn))))
            }
            PgStatus::Stopped(_) => {
                let control = self.control().map_err(|error| error.to_string())?;
                Ok(end_of(&control, &self.config_now().data_dir))
            }
            status => Err(format!("the local server is {}", super::observe::words(&status))),
        }
    }
}

/// Where the WAL of a stopped server ends.
fn end_of(control: &ControlFile, data_dir: &std::path::Path) -> (TimelineId, End) {
    let copy = data_dir.join("backup_label").exists();
    let standby = copy
        || has_standby_signal(data_dir) && control.state != ControlState::ShutDown
        || matches!(control.state, ControlState::ShutDownInRecovery | ControlState::InArchiveRecovery);
    if standby {
        let replayed = control.min_recovery_point.is_valid() && !copy;
        return match replayed {
            true => (control.min_recovery_timeline, End::Standby(control.min_recovery_point)),
            false => (control.timeline, End::Standby(control.checkpoint)),
        };
    }
    if control.state == ControlState::ShutDown {
        let end = wal::record_end(data_dir, control);
        return (control.timeline, End::Shutdown(control.checkpoint, end));
    }
    (control.timeline, End::Crash(control.checkpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let history = History::parse("1\t0/3000000\tx\n2\t0/5000000\tx\n");
        let at = |lsn: u64| Lsn(lsn);
        let fork = at(0x500_0000);
        let before = at(0x4ff_ff00);
        let past = at(0x500_0078);
        for (what, ours, end, theirs, rewind) in [
            ("same timeline", 3, End::Crash(past), 3, false),
            ("ahead", 4, End::Standby(before), 3, true),
            ("standby before the fork", 2, End::Standby(before), 3, false),
            ("standby at the fork", 2, End::Standby(fork), 3, false),
            ("standby past the fork", 2, End::Standby(past), 3, true),
            ("grandparent, before its fork", 1, End::Standby(at(0x200_0000)), 3, false),
            ("grandparent, past its fork", 1, End::Standby(before), 3, true),
            ("shutdown checkpoint was replicated", 2, End::Shutdown(before, Some(fork)), 3, false),
            ("shutdown checkpoint was not replicated", 2, End::Shutdown(fork, Some(past)), 3, true),
            ("shut down long before: another's past", 2, End::Shutdown(at(1), Some(before)), 3, true),
            ("shutdown checkpoint unreadable", 2, End::Shutdown(before, None), 3, true),
            ("crashed", 2, End::Crash(before), 3, true),
        ] {
            let verdict = verdict(TimelineId(ours), end, TimelineId(theirs), &history);
            assert_eq!(matches!(verdict, Divergence::Rewind(_)), rewind, "{what}: {verdict:?}");
        }
        let stranger = verdict(TimelineId(2), End::Standby(before), TimelineId(5), &History::default());
        assert!(matches!(stranger, Divergence::Rewind(why) if why.contains("not an ancestor")));
    }
}
