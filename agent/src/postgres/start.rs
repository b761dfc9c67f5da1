//! Starting: files and checks before, the postmaster, and waiting until it accepts connections.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::time::Duration;

use serde_json::Value;
use trunkline_common::{Clock, Instant};
use trunkline_config::PostgresConfig;

use super::files::{self, DataDir, Unfinished};
use super::instance::Instance;
use super::pidfile::PidFileStatus;
use super::ready::{Changes, Ended};
use super::{ControlState, PgError, StartAs, program, settings};

/// How often the configuration file is checked for settings to leave out.
const CHECKS: u32 = 8;

/// The bound on asking for the value of a setting.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// On which way a server comes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It takes writes after crash recovery, if any.
    Primary,
    /// It stays in recovery.
    Standby,
    /// It takes writes once it has recovered from an archive, however long that takes.
    Restored,
}

impl Way {
    fn words(self) -> &'static str {
        match self {
            Way::Primary => "primary",
            Way::Standby => "standby",
            Way::Restored => "restored cluster",
        }
    }
}

impl Instance {
    pub(super) async fn run_start(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        if self.process().find().is_some() {
            return Err(PgError::Failed("it is already running".to_owned()));
        }
        if files::is_unfinished(Unfinished::Rewind, &self.config_now().data_dir) {
            return Err(PgError::Unusable("pg_rewind was cut off here; the data directory is of no use".to_owned()));
        }
        let until = self.inner.clock.now() + limit;
        self.prepare(&self.config_now(), &role)?;
        let way = if matches!(role, StartAs::Standby(_)) { Way::Standby } else { Way::Primary };
        self.spawn_until(way, until).await
    }

    /// Starts the server and waits until it is up; once more without settings that it does not accept.
    pub(super) async fn spawn_until(&self, way: Way, until: Instant) -> Result<(), PgError> {
        let left = || until.since(self.inner.clock.now());
        let error = match self.spawn_and_wait(way, left()).await {
            Err(error @ PgError::Failed(_)) => error,
            result => return result,
        };
        if self.leave_out_rejected().await? {
            return self.spawn_and_wait(way, left()).await;
        }
        Err(error)
    }

    /// One setting that PostgreSQL does not know or does not accept keeps it from starting at all, and one that it does not
    /// know from taking any other from a file that is reloaded: leaves those out; true if there are any and the rest is
    /// good.
    pub(super) async fn leave_out_rejected(&self) -> Result<bool, PgError> {
        let mut left_out = false;
        // PostgreSQL reads a file in passes and complains about one kind of error in each.
        for _ in 0..CHECKS {
            let (rejected, complaints) = self.rejected_settings().await?;
            if complaints.is_empty() {
                return Ok(left_out);
            }
            let new = self.rewrite(|managed| managed.rejected.extend(rejected.clone()))?;
            if !new {
                return Err(PgError::Failed(complaints));
            }
            tracing::warn!("PostgreSQL rejects {rejected:?}, which are left out: {complaints}");
            left_out = true;
        }
        Ok(left_out)
    }

    async fn spawn_and_wait(&self, way: Way, limit: Duration) -> Result<(), PgError> {
        let config = self.config_now();
        let minimums = self.control().ok().filter(|_| way != Way::Primary).map(|control| control.minimums);
        let (values, raised) = settings::command_line(&config, self.scope(), minimums);
        let mut command = self.postgres();
        command.args(values.iter().map(|(name, value)| format!("--{name}={value}")));
        let mut changes = Changes::of(&config.data_dir);
        let postmaster = self.process().spawn(command)?;
        tracing::info!(pid = postmaster.pid(), "started PostgreSQL as {}", way.words());
        self.set_pending_restart(raised_pending(&values, &config, &raised));
        let up = || {
            let file = self.pid_file().filter(|file| file.pid == postmaster.pid())?;
            let accepts = matches!(file.status, PidFileStatus::Ready | PidFileStatus::Standby);
            // It lets people in while it recovers.
            let recovered =
                || way != Way::Restored || self.control().is_ok_and(|c| c.state == ControlState::InProduction);
            (accepts && recovered()).then_some(())
        };
        match changes.until(&postmaster, limit, up).await {
            Ok(()) => {}
            Err(Ended::Gone) => {
                let text = "PostgreSQL ended while it was starting; its log says why".to_owned();
                return Err(PgError::Failed(text));
            }
            Err(Ended::Timeout) => return Err(PgError::Timeout { what: "starting PostgreSQL".to_owned(), limit }),
        }
        // Read by every process at its start.
        if let Some(names) = self.sync_names_set() {
            self.set_sync_names_in_force(postmaster.pid(), names);
        }
        Ok(())
    }

    /// `postgres` with the data directory and the configuration file.
    fn postgres(&self) -> std::process::Command {
        let config = self.config_now();
        let mut command = std::process::Command::new(program::path(&config, "postgres"));
        command.arg("-D").arg(&config.data_dir);
        command.arg(format!("--config_file={}", files::conf_file(&config).display()));
        command
    }

    /// The value of a setting by the configuration files, whichever of them has it (`postgres -C`).
    ///
    /// # Errors
    /// PostgreSQL does not take the files, or knows no such setting.
    pub(super) async fn configured(&self, name: &str) -> Result<String, PgError> {
        let mut command = self.postgres();
        command.args(["-C", name]);
        program::output_within(ASK_LIMIT, &mut command.into()).await
    }

    /// The settings of the user's that PostgreSQL complains about when it reads the file (`postgres -C` reads it and does
    /// nothing else), and its words.
    async fn rejected_settings(&self) -> Result<(Vec<String>, String), PgError> {
        let mut command = self.postgres();
        command.args(["-C", "data_directory"]).env("LC_ALL", "C");
        let error = match program::run(&mut command.into()).await {
            Ok(()) => return Ok((Vec::new(), String::new())),
            Err(PgError::Failed(error)) => error,
            Err(error) => return Err(error),
        };
        let names = settings::complained_about(&error);
        let config = self.config_now();
        let wanted = settings::wanted(&config, self.role(), self.version());
        let known = |name: &String| wanted.contains_key(name) || config.recovery_conf.contains_key(name);
        Ok((names.into_iter().filter(known).collect(), error))
    }

    /// Files and checks before a postmaster is spawned.
    fn prepare(&self, config: &PostgresConfig, role: &StartAs) -> Result<(), PgError> {
        match files::look(&config.data_dir) {
            DataDir::Present => {}
            DataDir::Empty => return Err(PgError::Unusable(format!("{} is empty", config.data_dir.display()))),
            DataDir::Unfinished => {
                let why = format!("{} holds a copy that was cut off", config.data_dir.display());
                return Err(PgError::Unusable(why));
            }
            DataDir::Refused(why) => return Err(PgError::Unusable(why)),
        }
        check_version(config, self.version())?;
        if !super::process::kill_all(&self.server(), self.inner.clock.now() + Duration::from_secs(1)) {
            return Err(PgError::Failed("processes of an earlier postmaster are still there".to_owned()));
        }
        super::process::remove_stale_lock(&self.server())
            .map_err(|error| PgError::Failed(format!("postmaster.pid: {error}")))?;
        port_is_free(config)?;
        let (standby, upstream) = match role {
            StartAs::Primary => (false, None),
            StartAs::Standby(upstream) => (true, upstream.as_ref()),
        };
        if let Some(upstream) = upstream {
            files::write_pgpass(config, upstream)?;
        }
        let recovery = settings::recovery(config, upstream, &self.inner.name, self.version());
        self.rewrite(|managed| {
            managed.recovery = if standby { recovery } else { Default::default() };
            match standby {
                true => managed.stand_by(),
                false => managed.role = "primary",
            }
        })?;
        files::set_standby_signal(&config.data_dir, standby)
    }
}

/// The data directory's major version against that of the programs.
pub(super) fn check_version(config: &PostgresConfig, version: u32) -> Result<(), PgError> {
    let Ok(text) = std::fs::read_to_string(config.data_dir.join("PG_VERSION")) else { return Ok(()) };
    if text.trim() == version.to_string() {
        return Ok(());
    }
    let (dir, found) = (config.data_dir.display(), text.trim());
    Err(PgError::Unusable(format!("{dir} is of PostgreSQL {found}, the programs are of {version}")))
}

/// PostgreSQL would say so only in its log.
fn port_is_free(config: &PostgresConfig) -> Result<(), PgError> {
    for host in config.listen_addresses.split(',').map(str::trim).filter(|host| !host.is_empty()) {
        let host = if host == "*" { "0.0.0.0" } else { host };
        match TcpListener::bind((host, config.port)) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                return Err(PgError::Unusable(format!("port {} of {host} is taken by another program", config.port)));
            }
            // Anything else is PostgreSQL's to judge: it goes on with the addresses it can get.
            _ => {}
        }
    }
    Ok(())
}

fn raised_pending(
    values: &settings::Values,
    config: &PostgresConfig,
    raised: &BTreeSet<String>,
) -> BTreeMap<String, Value> {
    let entry = |name: &String| {
        let (old, new) = (values.get(name)?, config.protected.get(name)?);
        Some((name.clone(), serde_json::json!({ "old_value": old, "new_value": new })))
    };
    raised.iter().filter_map(entry).collect()
}
