//! The real server behind the trait [`Postgres`].

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::process::Signal;
use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};
use trunkline_common::{Clock, History, Instant, Lsn, MemberName, SystemClock, TimelineId};
use trunkline_config::PostgresConfig;

use super::callback::Callbacks;
use super::control::{ControlError, ControlFile, has_standby_signal};
use super::files::{self, DataDir, Unfinished};
use super::listening::Listening;
use super::pidfile::{PidFile, PidFileStatus};
use super::process::{Postmaster, Server, Supervisor};
use super::query::{self, Connection, Session, Sessions};
use super::settings::{self, Managed};
use super::slots::Decoding;
use super::start::check_version;
use super::{
    CustomBootstrap, Divergence, PgError, PgStatus, Postgres, Setting, SlotPlan, SlotsDone, StartAs, StopMode, Took,
    Upstream, WantedSlot, program, promise,
};
use crate::guard::Egress;

/// How long after a server could not be asked it is asked again what waits for a restart.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// The bound on asking it right after a change of the configuration.
const PENDING_LIMIT: Duration = Duration::from_secs(5);

/// Patroni's name for the file in the data directory.
const CACHED_CONFIG: &str = "patroni.dynamic.json";

/// One PostgreSQL server on this host. Clones are handles to the same one.
#[derive(Clone)]
pub struct Instance {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) scope: String,
    pub(super) name: MemberName,
    pub(super) clock: SystemClock,
    pub(super) version: u32,
    pub(super) process: Supervisor,
    pub(super) config: RwLock<Arc<PostgresConfig>>,
    pub(super) managed: Mutex<Managed>,
    pub(super) sessions: Sessions,
    pub(super) callbacks: Callbacks,
    /// The role that callbacks were told last.
    told: Mutex<Option<String>>,
    /// Whether a callback has said what the server is.
    introduced: AtomicBool,
    pub(super) pending_restart: Mutex<BTreeMap<String, Value>>,
    /// When that is to be asked for: it may be another.
    ask_pending_at: Mutex<Option<Instant>>,
    took: Mutex<Took>,
    /// Of the WAL last received, by which postmaster: a standby forgets it with its WAL receiver.
    pub(super) received: Mutex<Option<(i32, TimelineId)>>,
    /// The postmaster that would not let the replication user in.
    pub(super) mute: Mutex<Option<i32>>,
    pub(super) sync_names_in_force: Mutex<Option<(i32, String)>>,
    /// Work on logical slots that goes on beside.
    pub(super) decoding: Mutex<Decoding>,
    /// Held while files of the data directory are moved or removed in bulk.
    pub(super) bulk: Mutex<()>,
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
            process: Supervisor::new(&config.data_dir, program::unusual_name(&config)),
            config: RwLock::new(Arc::new(config)),
            managed: Mutex::new(managed),
            sessions: Sessions::default(),
            callbacks: Callbacks::default(),
            told: Mutex::default(),
            introduced: AtomicBool::new(false),
            pending_restart: Mutex::default(),
            ask_pending_at: Mutex::new(Some(clock.now())),
            took: Mutex::default(),
            received: Mutex::default(),
            mute: Mutex::default(),
            sync_names_in_force: Mutex::default(),
            decoding: Mutex::default(),
            bulk: Mutex::default(),
        };
        let instance = Self { inner: Arc::new(inner) };
        instance.process().find();
        Ok(instance)
    }

    /// From now on the server is started behind this fence.
    pub fn fence_egress(&self, egress: Arc<Egress>) {
        self.process().fence_egress(egress);
    }

    /// Whether any process of the server is there, be it one that a postmaster left behind.
    pub fn has_processes(&self) -> bool {
        super::process::has_processes(&self.server())
    }

    /// What the processes of the server are known by.
    pub fn server(&self) -> Server {
        self.process().server()
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

    /// Changes what is managed and writes the files; true if they changed.
    pub(super) fn rewrite(&self, change: impl FnOnce(&mut Managed)) -> Result<bool, PgError> {
        let config = self.config_now();
        let mut managed = self.inner.managed.lock();
        change(&mut managed);
        match files::look(&config.data_dir) {
            DataDir::Present => files::write(&config, &managed, self.version()),
            // Kept for the data directory to come.
            DataDir::Empty | DataDir::Unfinished => Ok(false),
            DataDir::Refused(why) => Err(PgError::Unusable(why)),
        }
    }

    /// A new data directory has nothing managed in it yet, whatever the files copied into it say, and nothing is fetched for it.
    pub(super) fn reset_managed(&self) {
        self.stop_fetching_wal();
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

    /// Learns what waits for a restart, where the configuration has changed since it was asked, or this agent has not asked yet.
    pub(super) async fn learn_pending_restart(&self, limit: Duration) {
        let now = self.inner.clock.now();
        if self.inner.ask_pending_at.lock().take_if(|at| *at <= now).is_none() {
            return;
        }
        let error = match tokio::time::timeout(limit, self.pending_restart()).await {
            Ok(Ok(pending)) => return self.set_pending_restart(pending),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {limit:?}"),
        };
        self.inner.ask_pending_at.lock().get_or_insert(now + ASK_AGAIN);
        tracing::warn!("PostgreSQL can't be asked which settings wait for a restart: {error}; again in {ASK_AGAIN:?}");
    }

    pub(super) fn role(&self) -> &'static str {
        self.inner.managed.lock().role
    }

    /// Whether PostgreSQL has refused the configured value of a parameter.
    pub(super) fn rejects(&self, name: &str) -> bool {
        self.inner.managed.lock().rejected.contains(name)
    }

    /// Writes the files and reloads the server where they changed. What it does not accept is left out a moment later: a new
    /// primary must not wait for that.
    pub(super) fn reload_if_changed(&self) -> Result<(), PgError> {
        if self.rewrite(|_| {})?
            && let Some(postmaster) = self.process().find()
        {
            self.reload(&postmaster);
            tracing::info!("configuration files changed, reloaded");
            let instance = self.clone();
            tokio::spawn(async move {
                if instance.leave_out_of_reload().await {
                    instance.reload(&postmaster);
                }
            });
        }
        Ok(())
    }

    /// Before a reload; true if something was left out. Whatever comes of it: what can be used is.
    async fn leave_out_of_reload(&self) -> bool {
        const LIMIT: Duration = Duration::from_secs(1);
        match tokio::time::timeout(LIMIT, self.leave_out_rejected()).await {
            Ok(Ok(left_out)) => left_out,
            Ok(Err(error)) => {
                tracing::warn!("PostgreSQL may not take its configuration files: {error}");
                false
            }
            Err(_) => {
                tracing::warn!("the configuration files could not be checked within {LIMIT:?}");
                false
            }
        }
    }

    /// Makes the server read its files.
    pub(super) fn reload(&self, postmaster: &Postmaster) {
        postmaster.signal(Signal::HUP);
        self.tell("on_reload");
    }

    /// Runs the callback for what happens to a server whose role stays what it is.
    pub(super) fn tell(&self, event: &'static str) {
        let role = self.inner.told.lock().clone();
        self.callback(event, role.as_deref().unwrap_or_else(|| self.role()));
    }

    /// The server is known by the name of its program, to the guard as well, and from the start on.
    fn keep_program(&self, config: &mut PostgresConfig) {
        if program::unusual_name(config) != self.server().program {
            tracing::warn!(
                "postgresql.bin_dir and bin_name stay as they were: PostgreSQL's processes would get another name. \
                 Restart the agent, with PostgreSQL stopped"
            );
            let before = self.config_now();
            config.bin_dir.clone_from(&before.bin_dir);
            config.bin_name.clone_from(&before.bin_name);
        }
    }

    async fn run_configure(&self, mut config: PostgresConfig) -> Result<(), PgError> {
        self.keep_program(&mut config);
        let config = Arc::new(config);
        let before = std::mem::replace(&mut *self.inner.config.write(), config.clone());
        if let Err(error) = self.write_configuration(&before, &config).await {
            // What is not in the files is not in force, and is new to them the next time.
            *self.inner.config.write() = before;
            return Err(error);
        }
        *self.inner.ask_pending_at.lock() = Some(self.inner.clock.now());
        // At once where it can be asked: an answer also shows that the postmaster has read the files.
        if self.pid_file().is_some_and(|f| matches!(f.status, PidFileStatus::Ready | PidFileStatus::Standby)) {
            self.learn_pending_restart(PENDING_LIMIT).await;
        }
        Ok(())
    }

    async fn write_configuration(&self, before: &PostgresConfig, config: &PostgresConfig) -> Result<(), PgError> {
        {
            let mut managed = self.inner.managed.lock();
            managed.rejected.clear();
            // Recovery settings and credentials may have changed; whom to follow stays.
            if !managed.recovery.is_empty() {
                let upstream = settings::upstream_in(&managed.recovery);
                if let Some(upstream) = &upstream {
                    files::write_pgpass(config, upstream)?;
                }
                managed.recovery = settings::recovery(config, upstream.as_ref(), &self.inner.name, self.version());
            }
        }
        let postmaster = self.process().find();
        let mut changed = self.rewrite(|_| {})?;
        if let Some(postmaster) = &postmaster {
            changed |= self.leave_out_of_reload().await;
            // Asked for without a change: certificates, or files that those here include, may have one.
            if changed || before == config {
                self.reload(postmaster);
            }
            if changed {
                tracing::info!("configuration files changed, reloaded");
            }
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

    fn connect_address(&self) -> String {
        let config = self.config_now();
        Listening::of(&config, self.pid_file().as_ref()).connect_address(&config)
    }

    async fn initdb(&self, options: Vec<String>, hba: Vec<String>) -> Result<(), PgError> {
        self.run_initdb(options, hba).await
    }

    async fn restore(&self, method: CustomBootstrap) -> Result<(), PgError> {
        self.run_restore(&method).await
    }

    async fn end_restore(&self) -> Result<(), PgError> {
        self.run_end_restore().await
    }

    async fn create_users(&self, post_bootstrap: Option<String>) -> Result<(), PgError> {
        self.run_create_users(post_bootstrap).await
    }

    async fn clone_from(&self, source: Upstream) -> Result<(), PgError> {
        self.run_clone(Some(&source), &[]).await
    }

    async fn base_backup(&self, source: Upstream) -> Result<(), PgError> {
        self.run_clone(Some(&source), &["basebackup".to_owned()]).await
    }

    async fn clone_without_source(&self) -> Result<(), PgError> {
        self.run_clone(None, &[]).await
    }

    async fn clone_remote(&self, source: Option<Upstream>, methods: Vec<String>) -> Result<(), PgError> {
        self.run_clone(source.as_ref(), &methods).await
    }

    async fn archive_last_wal(&self) -> Result<(), PgError> {
        self.run_archive_last_wal().await
    }

    fn cached_config(&self) -> Option<Value> {
        let text = std::fs::read_to_string(self.config_now().data_dir.join(CACHED_CONFIG)).ok()?;
        serde_json::from_str(&text).ok().filter(Value::is_object)
    }

    fn cache_config(&self, config: &Value) {
        let path = self.config_now().data_dir.join(CACHED_CONFIG);
        if let Err(error) = files::replace(&path, &config.to_string()) {
            tracing::warn!("{}", files::unwritable(&path, &error));
        }
    }

    async fn keep_promise(&self, until: Instant) -> Result<(), PgError> {
        let now = self.inner.clock.now();
        self.in_pool(move |instance| promise::keep(&instance.config_now().data_dir, until, now)).await
    }

    fn kept_promise(&self) -> Option<Instant> {
        promise::kept(&self.config_now().data_dir, self.inner.clock.now())
    }

    async fn start(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        let began = self.inner.clock.now();
        let started = self.run_start(role, limit).await;
        if started.is_ok() {
            self.inner.took.lock().start = Some(self.inner.clock.now().since(began));
        }
        started
    }

    async fn stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<oneshot::Sender<Lsn>>,
    ) -> Result<(), PgError> {
        let was_there = self.process().find().is_some();
        let began = self.inner.clock.now();
        let stopped = self.run_stop(mode, limit, shut_down).await;
        if stopped.is_ok() && was_there {
            if mode != StopMode::Immediate {
                self.inner.took.lock().stop = Some(self.inner.clock.now().since(began));
            }
            if mode != StopMode::Restart && !self.half_made() {
                self.tell("on_stop");
            }
        }
        stopped
    }

    async fn fence(&self, limit: Duration) -> Result<(), PgError> {
        self.kill_in_thread(super::process::fence_grace(limit), limit).await
    }

    async fn pre_promote(&self, limit: Duration) -> Result<(), PgError> {
        self.run_pre_promote(limit).await
    }

    async fn promote(&self, patience: Duration, left_out: Vec<TimelineId>) -> Result<TimelineId, PgError> {
        let began = self.inner.clock.now();
        let promoted = self.run_promote(patience, left_out).await;
        if promoted.is_ok() {
            self.inner.took.lock().promotion = Some(self.inner.clock.now().since(began));
        }
        promoted
    }

    async fn follow(&self, upstream: Option<Upstream>) -> Result<(), PgError> {
        self.run_follow(upstream).await
    }

    fn standby_role(&self, role: &'static str) -> Result<(), PgError> {
        let before = std::mem::replace(&mut self.inner.managed.lock().role, role);
        if before == role { Ok(()) } else { self.reload_if_changed() }
    }

    async fn resume_replay(&self) -> Result<(), PgError> {
        self.run_resume_replay().await
    }

    async fn diverged(&self, upstream: Upstream) -> Divergence {
        self.compare(&upstream).await
    }

    async fn rewind(&self, upstream: Upstream) -> Result<(), PgError> {
        self.run_rewind(&upstream).await
    }

    fn half_rewound(&self) -> bool {
        files::is_unfinished(Unfinished::Rewind, &self.config_now().data_dir)
    }

    fn is_set_to_follow(&self) -> bool {
        has_standby_signal(&self.config_now().data_dir)
    }

    fn half_made(&self) -> bool {
        files::is_unfinished(Unfinished::Bootstrap, &self.config_now().data_dir)
    }

    fn end_bootstrap(&self) -> Result<(), PgError> {
        files::end(Unfinished::Bootstrap, &self.config_now().data_dir)
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
            if let Some(to) = files::move_aside(&instance.config_now().data_dir)? {
                tracing::warn!("moved the data directory to {}", to.display());
            }
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

    async fn end_of_transactions(&self, limit: Duration) {
        let over = async {
            let session = self.session(limit).await?;
            query::end_of_transactions(session.client()).await
        };
        match tokio::time::timeout(limit, over).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!("transactions in flight can't be waited for: {error}"),
            Err(_) => info!("transactions are still open after {limit:?}; they end with the server"),
        }
    }

    async fn set_synchronous_standby_names(&self, names: String) -> Result<(), PgError> {
        self.apply_sync_names(names).await
    }

    async fn set_slots(&self, plan: SlotPlan) -> Result<SlotsDone, PgError> {
        self.apply_slots(plan).await
    }

    async fn copy_slots(&self, wanted: BTreeMap<String, WantedSlot>, source: Upstream) -> Result<Vec<String>, PgError> {
        self.run_copy_slots(wanted, source).await
    }

    async fn history(&self, timeline: TimelineId) -> Option<(History, String)> {
        let path = self.config_now().data_dir.join(format!("pg_wal/{:08X}.history", timeline.0));
        let text = std::fs::read_to_string(&path).ok()?;
        let written = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        let written = chrono::DateTime::<chrono::Local>::from(written);
        Some((History::parse(&text), written.to_rfc3339_opts(chrono::SecondsFormat::Micros, false)))
    }

    async fn setting(&self, name: &str) -> Result<Option<Setting>, PgError> {
        self.ask_setting(name).await
    }

    fn took(&self) -> Took {
        *self.inner.took.lock()
    }

    fn callback(&self, event: &'static str, role: &str) {
        *self.inner.told.lock() = Some(role.to_owned());
        if event != "on_reload" {
            self.inner.introduced.store(true, Ordering::Relaxed);
        }
        if let Some(command) = self.config_now().callbacks.get(event) {
            self.inner.callbacks.run(command, event, role, self.scope());
        }
    }

    fn introduce(&self, role: &str) {
        if !self.inner.introduced.load(Ordering::Relaxed) {
            self.callback("on_start", role);
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

    /// The data directory, empty and ours. Returns once everything that was in it is gone: removing a large one takes its
    /// time, during which nothing else may wait.
    pub(super) async fn empty_data_dir(&self) -> Result<(), PgError> {
        self.in_pool(|instance| {
            let data_dir = &instance.config_now().data_dir;
            files::remove_data(data_dir)?;
            files::create_private_dir(data_dir)
        })
        .await
    }

    /// On a thread for what blocks, one after the other: a removal whose caller was cut off goes on, and must not hit what
    /// the next one creates.
    pub(super) fn in_pool<T: Send + 'static>(
        &self,
        work: impl FnOnce(Self) -> Result<T, PgError> + Send + 'static,
    ) -> impl Future<Output = Result<T, PgError>> + Send {
        let instance = self.clone();
        async move {
            let run = move || {
                let one_at_a_time = instance.inner.clone();
                let _turn = one_at_a_time.bulk.lock();
                work(instance)
            };
            let done = tokio::task::spawn_blocking(run).await;
            done.unwrap_or_else(|error| Err(PgError::Failed(error.to_string())))
        }
    }
}
