//! Changing the role of a running server: promotion, and following another upstream.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal};
use trunkline_common::{Clock, Lsn, TimelineId};

use super::instance::Instance;
use super::observe::words;
use super::ready::{Changes, Ended};
use super::{ControlState, PgError, PgRole, PgStatus, StartAs, StopMode, Upstream, files, program, query, settings};

/// How long a promotion may be silent before the startup process is woken for the first time; more than a promotion takes
/// that has nothing left to replay.
const FIRST_NUDGE: Duration = Duration::from_millis(30);

/// Each nudge comes after twice the time, up to this: `wal_retrieve_retry_interval`, which it sleeps at most.
const RARE_NUDGE: Duration = Duration::from_secs(5);

/// How far a recovery is; whatever of it moves says that it goes on.
#[derive(Default, PartialEq)]
struct Progress {
    /// pg_control as it is on the disk.
    control: Option<Vec<u8>>,
    /// When a file of WAL last came or went. PostgreSQL reads ahead since 15: it may fetch many files from an archive, if there
    /// is little in them, before it replays the first.
    fetched: Option<SystemTime>,
    /// The furthest position seen to be replayed.
    replayed: Option<Lsn>,
}

impl Instance {
    pub(super) async fn run_pre_promote(&self, limit: Duration) -> Result<(), PgError> {
        let Some(command) = &self.config_now().pre_promote else { return Ok(()) };
        let run = async { program::run(&mut program::shell_words(command)?).await };
        let timeout = PgError::Timeout { what: "pre_promote".to_owned(), limit };
        let done = tokio::time::timeout(limit, run).await.unwrap_or(Err(timeout));
        done.map_err(|error| PgError::Refused(error.to_string()))
    }

    pub(super) async fn run_promote(
        &self,
        patience: Duration,
        left_out: Vec<TimelineId>,
    ) -> Result<TimelineId, PgError> {
        let config = self.config_now();
        let Some(postmaster) = self.process().find() else {
            return Err(PgError::Failed("promotion needs a running standby".to_owned()));
        };
        for timeline in left_out {
            tracing::warn!("leaving out timeline {timeline}: another node may have begun one of that number");
            leave_out(&config.data_dir, timeline)?;
        }
        let mut changes = Changes::of(&config.data_dir);
        // What pg_ctl promote does; the name of the file is the same in every version.
        let signal = config.data_dir.join("promote");
        files::replace(&signal, "").map_err(|error| files::unwritable(&signal, &error))?;
        postmaster.signal(Signal::USR1);
        // Recovery says "in production" there right after it has opened the server for writes. Before that it replays all
        // WAL there is, here and in the archive: as long as that takes.
        let in_production = || (self.control().ok()?.state == ControlState::InProduction).then_some(());
        let mut until = self.inner.clock.now() + patience;
        let (mut nudge, mut progress) = (FIRST_NUDGE, Progress::default());
        loop {
            let left = until.since(self.inner.clock.now());
            match changes.until(&postmaster, nudge.min(left), in_production).await {
                Ok(()) => break,
                Err(Ended::Gone) => return Err(PgError::Failed("PostgreSQL ended while it was promoted".to_owned())),
                // A startup process that has just lost its WAL receiver sleeps out wal_retrieve_retry_interval (5 s),
                // promotion or not; a reload is one of the few things that wake it.
                Err(Ended::Timeout) => {
                    postmaster.signal(Signal::HUP);
                }
            }
            nudge = (nudge * 2).min(RARE_NUDGE);
            let now = self.progress(&progress).await;
            if now != progress {
                if let Some(position) = now.replayed.filter(|_| nudge == RARE_NUDGE) {
                    tracing::info!("the promotion waits for replay, which has got to {position}");
                }
                (progress, until) = (now, self.inner.clock.now() + patience);
            } else if until <= self.inner.clock.now() {
                let what = "promotion, whose replay does not go on,".to_owned();
                return Err(PgError::Timeout { what, limit: patience });
            }
        }
        self.inner.managed.lock().role = "primary";
        self.confirm_sync_names(&postmaster).await?;
        let timeline = match self.look(patience).await {
            PgStatus::Running(running) if running.role == PgRole::Primary => running.timeline,
            status => return Err(PgError::Failed(format!("the server is {} after its promotion", words(&status)))),
        };
        let timeline = timeline.ok_or_else(|| PgError::Failed("the new timeline can't be read".to_owned()))?;
        // Settings and access rules may differ by role.
        self.reload_if_changed()?;
        tracing::info!("promoted, timeline {timeline}");
        Ok(timeline)
    }

    /// How far recovery is, `before` being how far it was.
    async fn progress(&self, before: &Progress) -> Progress {
        let replayed = match self.look(Duration::from_secs(1)).await {
            PgStatus::Running(running) => running.replay_lsn,
            _ => None,
        };
        let data_dir = self.config_now().data_dir.clone();
        Progress {
            control: fs::read(data_dir.join("global/pg_control")).ok(),
            fetched: fs::metadata(data_dir.join("pg_wal")).and_then(|wal| wal.modified()).ok(),
            replayed: replayed.max(before.replayed),
        }
    }

    pub(super) async fn run_follow(&self, upstream: Option<Upstream>) -> Result<(), PgError> {
        let config = self.config_now();
        let mut changed = match &upstream {
            Some(upstream) => files::write_pgpass(&config, upstream)?,
            None => false,
        };
        let recovery = settings::recovery(&config, upstream.as_ref(), &self.inner.name, self.version());
        changed |= self.rewrite(|managed| {
            managed.recovery = recovery;
            managed.stand_by();
        })?;
        let Some(postmaster) = self.process().find() else { return Ok(()) };
        if changed && self.version() < 13 {
            // primary_conninfo takes a restart there.
            let limit = config.pg_ctl_timeout;
            self.run_stop(StopMode::Fast, limit, None).await?;
            return self.run_start(StartAs::Standby(upstream), limit).await;
        }
        // Also where nothing changed: a reload ends recovery's pause of wal_retrieve_retry_interval (5 s) between two
        // tries to reach the upstream.
        self.reload(&postmaster);
        match upstream.filter(|_| !changed) {
            Some(upstream) => self.end_old_receiver(&upstream).await,
            None => Ok(()),
        }
    }

    pub(super) async fn run_resume_replay(&self) -> Result<(), PgError> {
        let limit = Duration::from_secs(1);
        let session = self.session(limit).await?;
        let resume = session.client().batch_execute("SELECT pg_wal_replay_resume()");
        let timeout = PgError::Timeout { what: "resuming replay".to_owned(), limit };
        tokio::time::timeout(limit, resume).await.map_err(|_| timeout)?.map_err(query::failed)
    }

    /// A WAL receiver that was waiting at the end of a timeline when primary_conninfo changed goes on over its old
    /// connection: PostgreSQL does not start it anew. Ended, it connects to where it should.
    async fn end_old_receiver(&self, upstream: &Upstream) -> Result<(), PgError> {
        const SQL: &str = "SELECT pid FROM pg_stat_get_wal_receiver() WHERE sender_host || ':' || sender_port <> $1";
        let session = self.session(Duration::from_secs(1)).await?;
        let address = format!("{}:{}", upstream.host, upstream.port);
        let row = session.client().query_opt(SQL, &[&address]).await.map_err(query::failed)?;
        let pid = row.and_then(|row| row.try_get::<_, Option<i32>>(0).ok().flatten()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            tracing::info!(
                pid = pid.as_raw_nonzero(),
                "the WAL receiver is still connected elsewhere than to {address}: ended"
            );
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        Ok(())
    }
}

/// Makes PostgreSQL take `timeline` for one that there is: at a promotion it takes the first number that has no history file,
/// in the archive or here. This one names no parent, so nobody ever switches to it. Standbys and the archive get it as they
/// get any other, because both look for the newest timeline number by number.
///
/// # Errors
/// The file could not be written. Where there is one, that number is not free anyway.
fn leave_out(data_dir: &Path, timeline: TimelineId) -> Result<(), PgError> {
    let wal = data_dir.join("pg_wal");
    let path = wal.join(format!("{:08X}.history", timeline.0));
    if path.exists() {
        return Ok(());
    }
    let write = || {
        let temporary = wal.join(format!("{:08X}.history.tmp", timeline.0));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        writeln!(file, "# number left out: another node may have begun a timeline with it")?;
        file.sync_all()?;
        // First, so that no retry finds the file there and leaves the archive without it. PostgreSQL removes a mark without
        // its file.
        let ready = wal.join("archive_status").join(format!("{:08X}.history.ready", timeline.0));
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(ready)?;
        // Not over one that has just been received.
        let linked = fs::hard_link(&temporary, &path);
        fs::remove_file(&temporary)?;
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::File::open(&wal)?.sync_all(),
        }
    };
    write().map_err(|error: io::Error| files::unwritable(&path, &error))
}
