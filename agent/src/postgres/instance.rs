//! The real server behind the trait [`Postgres`].

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::process::Signal;
use serde_json::Value;
use tokio::sync::{oneshot, watch};
use trunkline_common::{Clock, History, Instant, Lsn, MemberName, SystemClock, TimelineId};
use trunkline_config::PostgresConfig;

use super::callback::Callbacks;
use super::control::{ControlError, ControlFile, has_standby_signal};
use super::files::{self, DataDir};
use super::pidfile::{PidFile, PidFileStatus};
use super::process::{Postmaster, Supervisor};
use super::query::{self, Connection, NoAnswer, Session, Sessions};
use super::ready::{Changes, Ended};
use super::settings::{self, Managed};
use super::{ControlState, Divergence, PgError, PgRole, PgStatus, Postgres, StartAs, StopMode, Upstream, program};

/// After SIGQUIT, how long an immediate stop may take before SIGKILL.
const IMMEDIATE_GRACE: Duration = Duration::from_secs(5);

/// How often the configuration file is checked for settings to leave out.
const CHECKS: u32 = 8;

/// How long a promotion may be silent before the startup process is woken again; more than a promotion takes.
const PROMOTE_NUDGE: Duration = Duration::from_millis(30);

/// The bound on `before_stop`.
const BEFORE_STOP_LIMIT: Duration = Duration::from_secs(60);

/// One PostgreSQL server on this host. Clones are handles to the same one.
#[derive(Clone)]
pub struct Instance {
    inner: Arc<Inner>,
}

struct Inner {
    scope: String,
    name: MemberName,
    clock: SystemClock,
    version: u32,
    process: Supervisor,
    config: RwLock<Arc<PostgresConfig>>,
    managed: Mutex<Managed>,
    sessions: Sessions,
    callbacks: Callbacks,
    pending_restart: Mutex<BTreeMap<String, Value>>,
    /// Of the WAL last received, by which postmaster: a standby forgets it with its WAL receiver.
    received: Mutex<Option<(i32, TimelineId)>>,
    sync_names_in_force: Mutex<Option<(i32, String)>>,
}

impl Instance {
    /// A handle to the server of `config`. Starts nothing and changes nothing; a postmaster that is running is found.
    ///
    /// # Errors
    /// [`PgError::Unusable`]: run as root, programs missing, PostgreSQL older than 12, a data directory that PostgreSQL
    /// would refuse.
    pub fn new(
        config: PostgresConfig,
        scope: impl Into<String>,
        name: MemberName,
        clock: SystemClock,
    ) -> Result<Self, PgError> {
        if rustix::process::geteuid().is_root() {
            return Err(PgError::Unusable("PostgreSQL can't be run as root: start the agent as its user".to_owned()));
        }
        for tool in ["postgres", "initdb", "pg_basebackup"] {
            program::require(&config, tool)?;
        }
        let version = program::version(&config)?;
        if let DataDir::Refused(why) = files::look(&config.data_dir) {
            return Err(PgError::Unusable(why));
        }
        check_version(&config, version)?;
        let role = if has_standby_signal(&config.data_dir) { "replica" } else { "primary" };
        let managed = Managed { role, ..files::managed(&config) };
        let inner = Inner {
            scope: scope.into(),
            name,
            clock,
            version,
            process: Supervisor::new(&config.data_dir),
            config: RwLock::new(Arc::new(config)),
            managed: Mutex::new(managed),
            sessions: Sessions::default(),
            callbacks: Callbacks::default(),
            pending_restart: Mutex::default(),
            received: Mutex::default(),
            sync_names_in_force: Mutex::default(),
        };
        let instance = Self { inner: Arc::new(inner) };
        instance.process().find();
        Ok(instance)
    }

    pub(super) fn config_now(&self) -> Arc<PostgresConfig> {
        self.inner.config.read().clone()
    }

    pub(super) fn process(&self) -> &Supervisor {
        &self.inner.process
    }

    /// Major version of the programs.
    pub(super) fn version(&self) -> u32 {
        self.inner.version
    }

    pub(super) fn scope(&self) -> &str {
        &self.inner.scope
    }

    pub(super) fn pid_file(&self) -> Option<PidFile> {
        PidFile::read(&self.config_now().data_dir)
    }

    pub(super) fn control(&self) -> Result<ControlFile, PgError> {
        let config = self.config_now();
        match ControlFile::read(&config.data_dir) {
            Ok(control) => Ok(control),
            Err(ControlError::UnknownVersion(_)) => self.controldata(),
            Err(error) => Err(PgError::Failed(error.to_string())),
        }
    }

    /// A session of its own; `limit` is also its statement_timeout.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Connection, PgError> {
        let pid_file = self.pid_file();
        let config = self.config_now();
        let connect = query::connect(&config, pid_file.as_ref(), limit);
        let timeout = PgError::Timeout { what: "connecting to the local server".to_owned(), limit };
        Ok(tokio::time::timeout(limit, connect).await.map_err(|_| timeout)??)
    }

    /// The session kept for short queries (statement_timeout 2 s).
    pub(super) async fn session(&self, limit: Duration) -> Result<Arc<Session>, PgError> {
        let config = self.config_now();
        let pid_file = self.pid_file().ok_or_else(|| PgError::Failed("the server is not running".to_owned()))?;
        let open = self.inner.sessions.open(&config, &pid_file);
        let timeout = PgError::Timeout { what: "connecting to the local server".to_owned(), limit };
        Ok(tokio::time::timeout(limit, open).await.map_err(|_| timeout)??)
    }

    pub(super) async fn look(&self, deadline: Duration) -> PgStatus {
        let until = self.inner.clock.now() + deadline;
        let Some(postmaster) = self.process().find() else { return self.at_rest() };
        if postmaster.has_ended() {
            // Its orphans are being killed; that takes a moment.
            return match tokio::time::timeout(deadline, postmaster.gone()).await {
                Ok(()) => self.at_rest(),
                Err(_) => PgStatus::Stopping,
            };
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
        let Ok(control) = self.control() else { return PgStatus::Broken("global/pg_control can't be read".to_owned()) };
        let config = self.config_now();
        let query = self.inner.sessions.status(&config, &pid_file, control.system_id);
        match tokio::time::timeout(deadline, query).await {
            Ok(Ok(running)) => PgStatus::Running(self.complete(running, &postmaster, &control)),
            Ok(Err(no_answer)) => self.without_answer(&postmaster, no_answer, until).await,
            Err(_) => {
                self.inner.sessions.close().await;
                PgStatus::Unresponsive
            }
        }
    }

    /// Changes what is managed and writes the files; true if they changed.
    pub(super) fn rewrite(&self, change: impl FnOnce(&mut Managed)) -> Result<bool, PgError> {
        let config = self.config_now();
        let mut managed = self.inner.managed.lock();
        change(&mut managed);
        match files::look(&config.data_dir) {
            DataDir::Present => files::write(&config, &managed, self.version()),
            // Kept for the data directory to come.
            DataDir::Empty => Ok(false),
            DataDir::Refused(why) => Err(PgError::Unusable(why)),
        }
    }

    /// A new data directory has nothing managed in it yet, whatever the files copied into it say.
    pub(super) fn reset_managed(&self) {
        *self.inner.managed.lock() = Managed { role: "replica", ..Managed::default() };
    }

    pub(super) fn sync_names_set(&self) -> Option<String> {
        self.inner.managed.lock().synchronous_standby_names.clone()
    }

    pub(super) fn sync_names_in_force(&self) -> Option<(i32, String)> {
        self.inner.sync_names_in_force.lock().clone()
    }

    pub(super) fn set_sync_names_in_force(&self, postmaster: i32, names: String) {
        *self.inner.sync_names_in_force.lock() = Some((postmaster, names));
    }

    pub(super) fn set_pending_restart(&self, pending: BTreeMap<String, Value>) {
        let mut current = self.inner.pending_restart.lock();
        if *current != pending {
            tracing::info!("settings that wait for a restart: {:?}", pending.keys().collect::<Vec<_>>());
            *current = pending;
        }
    }

    pub(super) fn role(&self) -> &'static str {
        self.inner.managed.lock().role
    }

    /// Without a postmaster.
    fn at_rest(&self) -> PgStatus {
        let config = self.config_now();
        match files::look(&config.data_dir) {
            DataDir::Empty => return PgStatus::NoData,
            DataDir::Refused(why) => return PgStatus::Broken(why),
            DataDir::Present => {}
        }
        match self.control() {
            Ok(control) => PgStatus::Stopped(control.data(has_standby_signal(&config.data_dir))),
            Err(error) => PgStatus::Broken(error.to_string()),
        }
    }

    /// The fallback for layouts of pg_control that aren't known here; blocks for the time a small program takes.
    fn controldata(&self) -> Result<ControlFile, PgError> {
        let config = self.config_now();
        let path = program::path(&config, "pg_controldata");
        let output = std::process::Command::new(&path).arg(&config.data_dir).env("LC_ALL", "C").output();
        let output = output.map_err(|error| program::unusable(&path, &error))?;
        let parsed = ControlFile::from_controldata(&String::from_utf8_lossy(&output.stdout));
        parsed.ok_or_else(|| PgError::Failed("pg_controldata could not read global/pg_control".to_owned()))
    }

    /// Adds what the query can't see.
    fn complete(&self, mut running: super::Running, postmaster: &Postmaster, control: &ControlFile) -> super::Running {
        running.pending_restart = self.inner.pending_restart.lock().clone();
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
            NoAnswer::Error(error) => {
                tracing::warn!("the local server can't be asked: {error}");
                PgStatus::Unresponsive
            }
        }
    }

    async fn run_start(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        if self.process().find().is_some() {
            return Err(PgError::Failed("it is already running".to_owned()));
        }
        let until = self.inner.clock.now() + limit;
        self.prepare(&self.config_now(), &role)?;
        let standby = matches!(role, StartAs::Standby(_));
        let error = match self.spawn_and_wait(standby, limit).await {
            Err(error @ PgError::Failed(_)) => error,
            result => return result,
        };
        if self.leave_out_rejected().await? {
            return self.spawn_and_wait(standby, until.since(self.inner.clock.now())).await;
        }
        Err(error)
    }

    /// One setting that PostgreSQL does not know or does not accept keeps it from starting at all: leaves those out; true
    /// if there are any and the rest is good.
    async fn leave_out_rejected(&self) -> Result<bool, PgError> {
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
            tracing::warn!("PostgreSQL rejects {rejected:?}, starting without: {complaints}");
            left_out = true;
        }
        Ok(left_out)
    }

    async fn spawn_and_wait(&self, standby: bool, limit: Duration) -> Result<(), PgError> {
        let config = self.config_now();
        let minimums = self.control().ok().filter(|_| standby).map(|control| control.minimums);
        let (values, raised) = settings::command_line(&config, self.scope(), minimums);
        let mut command = self.postgres();
        command.args(values.iter().map(|(name, value)| format!("--{name}={value}")));
        let mut changes = Changes::of(&config.data_dir);
        let postmaster = self.process().spawn(command)?;
        tracing::info!(pid = postmaster.pid(), "started PostgreSQL as {}", if standby { "standby" } else { "primary" });
        self.set_pending_restart(raised_pending(&values, &config, &raised));
        let up = || {
            let file = self.pid_file().filter(|file| file.pid == postmaster.pid())?;
            matches!(file.status, PidFileStatus::Ready | PidFileStatus::Standby).then_some(())
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
            DataDir::Refused(why) => return Err(PgError::Unusable(why)),
        }
        check_version(config, self.version())?;
        if !super::process::kill_all(&config.data_dir, self.inner.clock.now() + Duration::from_secs(1)) {
            return Err(PgError::Failed("processes of an earlier postmaster are still there".to_owned()));
        }
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
            managed.role = if standby { "replica" } else { "primary" };
        })?;
        files::set_standby_signal(&config.data_dir, standby)
    }

    async fn run_stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<oneshot::Sender<Lsn>>,
    ) -> Result<(), PgError> {
        let until = self.inner.clock.now() + limit;
        if mode == StopMode::Immediate {
            return self.kill_in_thread((limit / 2).min(IMMEDIATE_GRACE), limit).await;
        }
        let config = self.config_now();
        if let Some(command) = &config.before_stop {
            let run = async { program::run(&mut program::shell_words(command)?).await };
            match tokio::time::timeout(BEFORE_STOP_LIMIT.min(limit), run).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("before_stop: {error}"),
                Err(_) => tracing::warn!("before_stop was not done in time"),
            }
        }
        let Some(postmaster) = self.process().find() else { return Ok(()) };
        let mut changes = Changes::of(&config.data_dir);
        postmaster.signal(Signal::INT);
        let checkpointed = || {
            let control = self.control().ok()?;
            (control.state == ControlState::ShutDown).then_some(control.checkpoint)
        };
        if let Some(sender) = shut_down {
            let left = until.since(self.inner.clock.now());
            if let Ok(lsn) = changes.until(&postmaster, left, checkpointed).await {
                // Nobody waits for it any more: fine.
                let _ = sender.send(lsn);
            }
        }
        let left = until.since(self.inner.clock.now());
        let gone = tokio::time::timeout(left, postmaster.gone()).await;
        gone.map_err(|_| PgError::Timeout { what: "stopping PostgreSQL".to_owned(), limit })
    }

    /// On a thread of its own: a fence must not wait for the runtime's workers or its pool of blocking threads.
    async fn kill_in_thread(&self, grace: Duration, limit: Duration) -> Result<(), PgError> {
        let (done, outcome) = oneshot::channel();
        let instance = self.clone();
        let kill = move || {
            // The caller may have given up; the kill is still right.
            let _ = done.send(instance.process().kill(grace, limit));
        };
        let spawned = std::thread::Builder::new().name("fence".to_owned()).spawn(kill);
        if spawned.is_err() {
            return self.process().kill(grace, limit);
        }
        outcome.await.unwrap_or_else(|_| Err(PgError::Failed("the killing thread ended".to_owned())))?;
        self.inner.sessions.close().await;
        Ok(())
    }

    async fn run_promote(&self, limit: Duration) -> Result<TimelineId, PgError> {
        let until = self.inner.clock.now() + limit;
        let config = self.config_now();
        if let Some(command) = &config.pre_promote {
            let run = async { program::run(&mut program::shell_words(command)?).await };
            let timeout = PgError::Timeout { what: "pre_promote".to_owned(), limit };
            tokio::time::timeout(limit, run).await.unwrap_or(Err(timeout))?;
        }
        let Some(postmaster) = self.process().find() else {
            return Err(PgError::Failed("promotion needs a running standby".to_owned()));
        };
        let mut changes = Changes::of(&config.data_dir);
        // What pg_ctl promote does; the name of the file is the same in every version.
        let signal = config.data_dir.join("promote");
        files::replace(&signal, "").map_err(|error| files::unwritable(&signal, &error))?;
        postmaster.signal(Signal::USR1);
        // Recovery says "in production" there right after it has opened the server for writes.
        let in_production = || (self.control().ok()?.state == ControlState::InProduction).then_some(());
        loop {
            let left = until.since(self.inner.clock.now());
            match changes.until(&postmaster, left.min(PROMOTE_NUDGE), in_production).await {
                Ok(()) => break,
                Err(Ended::Gone) => return Err(PgError::Failed("PostgreSQL ended while it was promoted".to_owned())),
                // A startup process that has just lost its WAL receiver sleeps out wal_retrieve_retry_interval (5 s),
                // promotion or not; a reload is one of the few things that wake it.
                Err(Ended::Timeout) if left > PROMOTE_NUDGE => {
                    postmaster.signal(Signal::HUP);
                }
                Err(Ended::Timeout) => return Err(PgError::Timeout { what: "promotion".to_owned(), limit }),
            }
        }
        self.inner.managed.lock().role = "primary";
        self.confirm_sync_names(&postmaster).await?;
        let left = until.since(self.inner.clock.now()).max(Duration::from_secs(1));
        let timeline = match self.look(left).await {
            PgStatus::Running(running) if running.role == PgRole::Primary => running.timeline,
            status => return Err(PgError::Failed(format!("the server is {} after its promotion", words(&status)))),
        };
        let timeline = timeline.ok_or_else(|| PgError::Failed("the new timeline can't be read".to_owned()))?;
        // Settings and access rules may differ by role.
        self.reload_if_changed()?;
        tracing::info!("promoted, timeline {timeline}");
        Ok(timeline)
    }

    async fn run_follow(&self, upstream: Option<Upstream>) -> Result<(), PgError> {
        let config = self.config_now();
        let mut changed = match &upstream {
            Some(upstream) => files::write_pgpass(&config, upstream)?,
            None => false,
        };
        let recovery = settings::recovery(&config, upstream.as_ref(), &self.inner.name, self.version());
        changed |= self.rewrite(|managed| {
            managed.recovery = recovery;
            managed.role = "replica";
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
        postmaster.signal(Signal::HUP);
        Ok(())
    }

    fn reload_if_changed(&self) -> Result<bool, PgError> {
        let changed = self.rewrite(|_| {})?;
        if changed && let Some(postmaster) = self.process().find() {
            postmaster.signal(Signal::HUP);
            tracing::info!("configuration files changed, reloaded");
        }
        Ok(changed)
    }

    async fn run_configure(&self, config: PostgresConfig) -> Result<(), PgError> {
        let config = Arc::new(config);
        *self.inner.config.write() = config.clone();
        {
            let mut managed = self.inner.managed.lock();
            managed.rejected.clear();
            // Recovery settings and credentials may have changed; whom to follow stays.
            if !managed.recovery.is_empty() {
                let upstream = settings::upstream_in(&managed.recovery);
                if let Some(upstream) = &upstream {
                    files::write_pgpass(&config, upstream)?;
                }
                managed.recovery = settings::recovery(&config, upstream.as_ref(), &self.inner.name, self.version());
            }
        }
        let running = self.process().find().is_some();
        self.reload_if_changed()?;
        if running && self.pid_file().is_some_and(|f| matches!(f.status, PidFileStatus::Ready | PidFileStatus::Standby))
        {
            let pending = self.pending_restart().await?;
            self.set_pending_restart(pending);
        }
        Ok(())
    }
}

impl Postgres for Instance {
    async fn observe(&self, deadline: Duration) -> PgStatus {
        self.look(deadline).await
    }

    fn exits(&self) -> watch::Receiver<u64> {
        self.process().exits()
    }

    async fn configure(&self, config: PostgresConfig) -> Result<(), PgError> {
        self.run_configure(config).await
    }

    fn config(&self) -> PostgresConfig {
        (*self.config_now()).clone()
    }

    async fn initdb(&self, options: Vec<String>, hba: Vec<String>) -> Result<(), PgError> {
        self.run_initdb(options, hba).await
    }

    async fn create_users(&self, post_bootstrap: Option<String>) -> Result<(), PgError> {
        self.run_create_users(post_bootstrap).await
    }

    async fn clone_from(&self, source: Upstream) -> Result<(), PgError> {
        self.run_clone(&source).await
    }

    async fn start(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        self.run_start(role, limit).await
    }

    async fn stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<oneshot::Sender<Lsn>>,
    ) -> Result<(), PgError> {
        self.run_stop(mode, limit, shut_down).await
    }

    async fn fence(&self, limit: Duration) -> Result<(), PgError> {
        self.kill_in_thread(super::process::fence_grace(limit), limit).await
    }

    async fn promote(&self, limit: Duration) -> Result<TimelineId, PgError> {
        self.run_promote(limit).await
    }

    async fn follow(&self, upstream: Option<Upstream>) -> Result<(), PgError> {
        self.run_follow(upstream).await
    }

    async fn diverged(&self, upstream: Upstream) -> Divergence {
        self.compare(&upstream).await
    }

    async fn rewind(&self, upstream: Upstream) -> Result<(), PgError> {
        self.run_rewind(&upstream).await
    }

    async fn remove_data(&self) -> Result<(), PgError> {
        self.in_pool(|instance| {
            instance.needs_no_server("removing the data directory")?;
            instance.reset_managed();
            files::remove_data(&instance.config_now().data_dir)
        })
        .await
    }

    async fn move_data_aside(&self) -> Result<(), PgError> {
        self.in_pool(|instance| {
            instance.needs_no_server("moving the data directory")?;
            instance.reset_managed();
            let to = files::move_aside(&instance.config_now().data_dir)?;
            tracing::warn!("moved the data directory to {}", to.display());
            Ok(())
        })
        .await
    }

    async fn checkpoint(&self, limit: Duration) -> Result<(), PgError> {
        let connection = self.connect(limit).await?;
        let checkpoint = connection.client.batch_execute("CHECKPOINT");
        let timeout = PgError::Timeout { what: "CHECKPOINT".to_owned(), limit };
        tokio::time::timeout(limit, checkpoint).await.map_err(|_| timeout)?.map_err(query::failed)
    }

    async fn set_synchronous_standby_names(&self, names: String) -> Result<(), PgError> {
        self.apply_sync_names(names).await
    }

    async fn set_slots(&self, wanted: BTreeMap<String, Option<Lsn>>) -> Result<(), PgError> {
        self.apply_slots(wanted).await
    }

    async fn history(&self, timeline: TimelineId) -> Option<(History, String)> {
        let path = self.config_now().data_dir.join(format!("pg_wal/{:08X}.history", timeline.0));
        let text = std::fs::read_to_string(&path).ok()?;
        let written = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        let written = chrono::DateTime::<chrono::Local>::from(written);
        Some((History::parse(&text), written.to_rfc3339_opts(chrono::SecondsFormat::Micros, false)))
    }

    fn callback(&self, event: &'static str, role: &str) {
        if let Some(command) = self.config_now().callbacks.get(event) {
            self.inner.callbacks.run(command, event, role, self.scope());
        }
    }
}

impl Instance {
    fn needs_no_server(&self, what: &str) -> Result<(), PgError> {
        match self.process().find() {
            Some(_) => Err(PgError::Failed(format!("{what} needs a stopped server"))),
            None => Ok(()),
        }
    }

    /// Removing a large data directory takes its time.
    fn in_pool<T: Send + 'static>(
        &self,
        work: impl FnOnce(Self) -> Result<T, PgError> + Send + 'static,
    ) -> impl Future<Output = Result<T, PgError>> + Send {
        let instance = self.clone();
        async move {
            let done = tokio::task::spawn_blocking(move || work(instance)).await;
            done.unwrap_or_else(|error| Err(PgError::Failed(error.to_string())))
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
        PgStatus::Unresponsive => "not answering",
    }
}

/// The data directory's major version against that of the programs.
fn check_version(config: &PostgresConfig, version: u32) -> Result<(), PgError> {
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
    raised: &std::collections::BTreeSet<String>,
) -> BTreeMap<String, Value> {
    let entry = |name: &String| {
        let (old, new) = (values.get(name)?, config.protected.get(name)?);
        Some((name.clone(), serde_json::json!({ "old_value": old, "new_value": new })))
    };
    raised.iter().filter_map(entry).collect()
}
