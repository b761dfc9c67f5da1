//! One PostgreSQL server: its processes, its data directory, its settings.
//!
//! [`Postgres`] is what the HA loop may ask of it. `instance` is the real one; the simulation has a model of it. This
//! module obeys: it has no opinion about who leads and never looks into the DCS.
//!
//! * `instance` keeps what belongs together; `observe`, `start`, `stop`, `role` are what it does.
//! * `process`, `pidfile`, `listening`, `ready`: the postmaster, its end, where it listens, and waiting for it to get somewhere.
//! * `control`, `wal`: what the data directory says while no server answers.
//! * `query`, `slots`, `sync_names`, `guc`: local SQL. `walsender`, `tls`: another member's.
//! * `settings`, `conninfo` are texts, `files` writes them.
//! * `bootstrap`, `clone`, `rewind`: how a data directory comes to be; `archive`: what of its WAL is kept. `callback`, `program`: other programs.

mod archive;
mod bootstrap;
mod callback;
mod clone;
mod conninfo;
mod control;
mod files;
mod guc;
mod instance;
mod listening;
mod observe;
mod pidfile;
mod process;
mod program;
mod promise;
mod query;
mod ready;
mod rewind;
mod role;
mod settings;
pub mod slots;
mod start;
mod stop;
mod sync_names;
#[cfg(test)]
mod testing;
pub(crate) mod tls;
mod wal;
pub(crate) mod walsender;

pub(crate) use clone::needs_no_leader;
pub use instance::Instance;
pub use process::Server;
pub(crate) use process::{has_ended, kill_processes_of, own_session, real_path};
pub(crate) use sync_names::members as standby_names;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::watch;
use trunkline_common::{History, Instant, Lsn, MemberName, SystemId, TimelineId};
use trunkline_config::PostgresConfig;

/// What is known of the server right now.
// One of these lives at a time, and it is nearly always the large one.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq)]
pub enum PgStatus {
    /// No data directory, or an empty one, or a copy that was cut off.
    NoData,
    /// There is something in the data directory, but it can't be read as a cluster (no pg_control, wrong permissions).
    Broken(String),
    /// A data directory without a postmaster.
    Stopped(ControlData),
    /// A postmaster that does not accept connections yet (recovery, or "the database system is starting up").
    Starting,
    /// A postmaster that is shutting down.
    Stopping,
    /// It answers queries.
    Running(Running),
    /// It answers with an error (no connection left, a password that does not fit, a query that was cancelled): it can't be
    /// asked, but is alive.
    Refusing(String),
    /// A postmaster that should accept connections but did not answer within the deadline.
    Unresponsive,
}

impl PgStatus {
    /// Which cluster the data belongs to, where that can be seen.
    pub fn system_id(&self) -> Option<SystemId> {
        match self {
            PgStatus::Running(running) => Some(running.system_id),
            PgStatus::Stopped(control) => Some(control.system_id),
            _ => None,
        }
    }
}

/// The parts of `global/pg_control` that decisions need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlData {
    /// Identity of the cluster.
    pub system_id: SystemId,
    /// What it was doing when last written.
    pub state: ControlState,
    /// Timeline of the last checkpoint.
    pub timeline: TimelineId,
    /// Position of the last checkpoint record: where a clean shutdown ended.
    pub checkpoint: Lsn,
    /// Whether `standby.signal` or `recovery.signal` is there: it would start as a standby.
    pub standby: bool,
}

/// `pg_control`'s state (PostgreSQL's `DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlState {
    /// Fresh from initdb, or being started.
    Startup,
    /// Cleanly shut down as a primary.
    ShutDown,
    /// Cleanly shut down as a standby.
    ShutDownInRecovery,
    /// In the middle of a shutdown.
    ShuttingDown,
    /// In crash recovery.
    InCrashRecovery,
    /// In archive recovery: a standby, running or crashed.
    InArchiveRecovery,
    /// A primary, running or crashed.
    InProduction,
}

/// A server that answers queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Whether it is in recovery.
    pub role: PgRole,
    /// Identity of the cluster.
    pub system_id: SystemId,
    /// Of the WAL that it writes or receives; `None` where a standby has received nothing yet.
    pub timeline: Option<TimelineId>,
    /// Of its last checkpoint; `None` where that is not known.
    pub checkpoint_timeline: Option<TimelineId>,
    /// Primary: flushed position. Standby: max(received, replayed).
    pub lsn: Lsn,
    /// Standby: last received (written) position.
    pub receive_lsn: Option<Lsn>,
    /// Standby: last replayed position.
    pub replay_lsn: Option<Lsn>,
    /// Standby: since its start it has not come to the end of the WAL on its disk, as far as can be seen: it may have more
    /// than `lsn` says.
    pub reads_own_wal: bool,
    /// Standby: commit time of the last replayed transaction, PostgreSQL's text.
    pub replay_timestamp: Option<String>,
    /// Standby: replay is paused.
    pub replay_paused: bool,
    /// Standby: what the WAL receiver last heard of the primary's end of WAL.
    pub latest_end_lsn: Option<Lsn>,
    /// Standby: `streaming` or `in archive recovery`.
    pub replication_state: Option<String>,
    /// `host:port` the WAL receiver is connected to or configured for.
    pub upstream: Option<String>,
    /// Standby: the slot over there that it is to use (`primary_slot_name`).
    pub upstream_slot: Option<String>,
    /// `server_version_num`.
    pub server_version: u32,
    /// `pg_postmaster_start_time()`, as `YYYY-MM-DD HH:MM:SS.ffffff+00:00`.
    pub postmaster_start_time: String,
    /// WAL senders connected to it.
    pub replication: Vec<WalSender>,
    /// `synchronous_standby_names` in force.
    pub synchronous_standby_names: String,
    /// `synchronous_commit` as new sessions have it: what commits wait for.
    pub synchronous_commit: String,
    /// Primary: one of its processes is waiting for the disk to take WAL right now.
    pub waits_for_disk: bool,
    /// Settings that wait for a restart: name → `{old_value, new_value}`; empty = none.
    pub pending_restart: BTreeMap<String, Value>,
    /// Replication slots: name → `restart_lsn` (physical) or `confirmed_flush_lsn` (logical).
    pub slots: BTreeMap<String, Lsn>,
}

impl Running {
    /// A primary that has had no checkpoint since its promotion is no source for pg_rewind yet.
    pub fn awaits_checkpoint(&self) -> bool {
        self.role == PgRole::Primary && self.checkpoint_timeline.is_some_and(|at| Some(at) < self.timeline)
    }
}

/// What PostgreSQL says of one of its settings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Setting {
    /// The value in force, as people write it.
    pub value: String,
    /// When a change of it counts: `postmaster`, `sighup`, `user` …
    pub context: String,
    /// What has set it: `default`, `command line`, `configuration file` …
    pub source: String,
    /// The file and the line in it.
    pub file: Option<(String, i32)>,
    /// Another value in a file waits for a restart.
    pub pending: bool,
    /// What is configured is not accepted, and left out.
    pub rejected: bool,
    /// Who else has a value of his own, by `ALTER ROLE` or `ALTER DATABASE`: `role app: 8MB`.
    pub overrides: Vec<String>,
}

/// How long operations took when they were last done by this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Took {
    /// From the start of the postmaster until it took connections.
    pub start: Option<Duration>,
    /// A stop in order, until the last process was gone.
    pub stop: Option<Duration>,
    /// A promotion, until writes were taken.
    pub promotion: Option<Duration>,
}

/// Whether the server takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PgRole {
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
}

/// A row of `pg_stat_replication`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalSender {
    /// The user of the connection.
    pub usename: String,
    /// The standby's `application_name`: its member name.
    pub application_name: String,
    /// Where it connects from; `None` on a unix socket.
    pub client_addr: Option<String>,
    /// `startup`, `catchup`, `streaming`, `backup`, `stopping`.
    pub state: String,
    /// `async`, `potential`, `sync`, `quorum`.
    pub sync_state: String,
    /// Its place in `synchronous_standby_names`.
    pub sync_priority: i32,
    /// Written, flushed, replayed on the standby.
    pub write_lsn: Option<Lsn>,
    /// Flushed on the standby.
    pub flush_lsn: Option<Lsn>,
    /// Replayed on the standby.
    pub replay_lsn: Option<Lsn>,
}

/// A server to stream from, clone from or rewind to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Upstream {
    /// Its member name.
    pub name: MemberName,
    /// Host or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Our slot there, where slots are used.
    pub slot: Option<String>,
}

/// A bootstrap method of the user's own (`bootstrap.method`).
#[derive(Debug, Clone, PartialEq)]
pub struct CustomBootstrap {
    /// Its name.
    pub name: String,
    /// Its section: `command`, what goes to it as arguments, and what recovery is to do.
    pub section: Map<String, Value>,
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a shutdown checkpoint (SIGINT).
    Fast,
    /// The same as the first half of a restart, which has a callback of its own.
    Restart,
    /// Ends everything at once; the next start recovers (SIGQUIT, and SIGKILL of what is left soon after).
    Immediate,
}

/// What a replication slot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotKind {
    /// Keeps WAL for a standby.
    Physical,
    /// Decodes one database's changes.
    Logical {
        /// The database.
        database: String,
        /// The output plugin.
        plugin: String,
    },
}

/// A replication slot as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedSlot {
    /// What it is.
    pub kind: SlotKind,
    /// How far it has got where it is in use.
    pub position: Option<Lsn>,
    /// Whether somebody streams from it here, and so moves it; `None`: not known.
    pub in_use: Option<bool>,
}

/// The slots of a server as they shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotPlan {
    /// By name.
    pub wanted: BTreeMap<String, WantedSlot>,
    /// Slots that are dropped where they are not wanted; `None`: all of them.
    pub known: Option<BTreeSet<String>>,
    /// Matchers of slots that are never dropped (`ignore_slots`).
    pub ignored: Vec<Map<String, Value>>,
    /// Slots may be dropped because they are not wanted or of no use any more.
    pub may_drop: bool,
    /// But not physical ones that are not wanted: members may come back to them.
    pub spares: bool,
    /// Slots that nobody uses here may be made anew to get rid of what they hold back.
    pub may_clean: bool,
    /// The primary has to be told which rows are needed here (`hot_standby_feedback`).
    pub feedback: bool,
}

/// What is left to do about slots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotsDone {
    /// Something goes on beside, was in the way, or is there and not yet where it is wanted: look again in the next turn.
    pub again: bool,
    /// Logical slots that this standby lacks and can only get from the primary.
    pub missing: BTreeSet<String>,
}

/// As what to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAs {
    /// Takes writes as soon as it is up (removes `standby.signal`).
    Primary,
    /// Follows; with nobody to follow it only serves reads.
    Standby(Option<Upstream>),
}

/// Whether a server whose past may differ from its upstream's can simply follow (ha-loop §11.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Divergence {
    /// Its WAL is a prefix of the upstream's: follow.
    None,
    /// It went past the fork: rewind. The words name the positions compared.
    Rewind(String),
    /// Both took writes on timelines of the same number: pg_rewind goes by numbers and would find nothing to do. Only a new
    /// copy helps.
    Twice(String),
    /// Can't be told yet (upstream not reachable, still in recovery, or without a checkpoint on its timeline): ask again.
    Unknown(String),
}

/// Why PostgreSQL did not do what was asked, split by what the caller does next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgError {
    /// A program is missing, too old, or can't be executed: an operator has to act.
    #[error("{0}")]
    Unusable(String),
    /// It took longer than allowed; it may still happen.
    #[error("{what} was not done within {limit:?}")]
    Timeout {
        /// The operation.
        what: String,
        /// Its limit.
        limit: Duration,
    },
    /// The operator's `pre_promote` did not allow the promotion: nothing was begun.
    #[error("pre_promote: {0}")]
    Refused(String),
    /// A program or a query failed, with its last words.
    #[error("{0}")]
    Failed(String),
}

/// What the HA loop may ask of a server. Cheap to clone: clones are handles to the same server.
///
/// Everything has a bound in time; nothing here blocks the calling thread for longer than a small file takes.
pub trait Postgres: Clone + Send + Sync + 'static {
    /// Looks: process, pg_control, one query under `deadline`. Never fails; what it could not see is in the status.
    fn observe(&self, deadline: Duration) -> impl Future<Output = PgStatus> + Send;

    /// Counts the ends of postmasters: changes in the moment one exits (pidfd), whoever started it.
    fn exits(&self) -> watch::Receiver<u64>;

    /// New settings from file or DCS: rewrites the configuration files and reloads a running server where they changed.
    fn configure(&self, config: PostgresConfig) -> impl Future<Output = Result<(), PgError>> + Send;

    /// The settings in force.
    fn config(&self) -> PostgresConfig;

    /// `host:port` where others reach the server that runs, or the next one: after an edit that takes a restart, the two are
    /// different.
    fn connect_address(&self) -> String {
        self.config().connect_address
    }

    /// initdb with the given options, and `hba` appended to its pg_hba.conf. Leaves the server stopped.
    fn initdb(&self, options: Vec<String>, hba: Vec<String>) -> impl Future<Output = Result<(), PgError>> + Send;

    /// A new cluster by a method of the user's own (a restore from a backup, say): runs it, starts the server, open to the
    /// local superuser whose password is not known yet, and waits until its recovery is over. Leaves it running as a primary.
    fn restore(&self, method: CustomBootstrap) -> impl Future<Output = Result<(), PgError>> + Send {
        let why = format!("bootstrap by {} is not possible here", method.name);
        async { Err(PgError::Unusable(why)) }
    }

    /// After [`Postgres::restore`] and once the users' passwords are set: access and settings as configured.
    fn end_restore(&self) -> impl Future<Output = Result<(), PgError>> + Send {
        async { Ok(()) }
    }

    /// After the first start of a new cluster: superuser password, replication and rewind users, `post_bootstrap`.
    fn create_users(&self, post_bootstrap: Option<String>) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Replaces the data directory by a copy of `source`, by the first of `create_replica_methods` that works (pg_basebackup
    /// where there are none). Leaves the server stopped.
    fn clone_from(&self, source: Upstream) -> impl Future<Output = Result<(), PgError>> + Send;

    /// The same by pg_basebackup, whatever other methods there are.
    fn base_backup(&self, source: Upstream) -> impl Future<Output = Result<(), PgError>> + Send {
        self.clone_from(source)
    }

    /// The same by the methods of `create_replica_methods` that need no running server to copy from (`no_leader`).
    fn clone_without_source(&self) -> impl Future<Output = Result<(), PgError>> + Send {
        async { Err(PgError::Unusable("there is no method that needs no leader".to_owned())) }
    }

    /// The same for a standby cluster, by its own `methods` (those of this node where there are none).
    fn clone_remote(
        &self,
        source: Option<Upstream>,
        methods: Vec<String>,
    ) -> impl Future<Output = Result<(), PgError>> + Send {
        let _ = (source, methods);
        async { Err(PgError::Unusable("nothing outside can be copied here".to_owned())) }
    }

    /// Archives the WAL file with the shutdown checkpoint of the stopped server, where WAL is archived at all: PostgreSQL
    /// leaves it out as it is not full.
    fn archive_last_wal(&self) -> impl Future<Output = Result<(), PgError>> + Send {
        async { Ok(()) }
    }

    /// The dynamic configuration as it was last known, beside the data.
    fn cached_config(&self) -> Option<Value> {
        None
    }

    /// Keeps it.
    fn cache_config(&self, config: &Value) {
        let _ = config;
    }

    /// Keeps beside the data, durably, that this node has promised not to lead before `until` (failsafe mode).
    fn keep_promise(&self, until: Instant) -> impl Future<Output = Result<(), PgError>> + Send {
        let _ = until;
        async { Ok(()) }
    }

    /// Until when an earlier agent has promised not to lead.
    fn kept_promise(&self) -> Option<Instant> {
        None
    }

    /// Spawns the postmaster and waits until it accepts connections, at most `limit`.
    fn start(&self, role: StartAs, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Stops and waits for the end of every process, at most `limit` (after `before_stop`, which has a minute of its own before
    /// a stop in order); then a fast stop fails with the server still stopping, an immediate one kills what is left. `shut_down` fires, at most once, with the position of the shutdown
    /// checkpoint as soon as pg_control has it, even while a WAL sender still waits for a slow standby. That is where the
    /// record begins: a standby has it when its position is *greater* (records are never sent in part).
    fn stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<tokio::sync::oneshot::Sender<Lsn>>,
    ) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Kills every process of the server and returns once none is left that could write: for a lease that is ending.
    /// Bounded by `limit`; does not touch the network.
    fn fence(&self, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Asks the operator's `pre_promote` whether this standby may be promoted. It ends with the future.
    fn pre_promote(&self, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send {
        let _ = limit;
        async { Ok(()) }
    }

    /// Promotes a standby and returns as soon as it takes writes, with its new timeline: the first number that is free. Those
    /// of `left_out` are not. What is there to be replayed is replayed before, however long that takes; only one that does
    /// not get any further for `patience` fails.
    fn promote(
        &self,
        patience: Duration,
        left_out: Vec<TimelineId>,
    ) -> impl Future<Output = Result<TimelineId, PgError>> + Send;

    /// Makes a running standby follow `upstream` (reload; a restart where the version needs one).
    fn follow(&self, upstream: Option<Upstream>) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Which role the standby has, `replica` or `standby_leader`: its settings and access rules may differ by role.
    fn standby_role(&self, role: &'static str) -> Result<(), PgError> {
        let _ = role;
        Ok(())
    }

    /// Lets a running standby whose replay is paused replay on. Where it was PostgreSQL that paused it, for a setting that is
    /// too small, the server ends.
    fn resume_replay(&self) -> impl Future<Output = Result<(), PgError>> + Send {
        async { Ok(()) }
    }

    /// Compares the local history with that of `upstream`.
    fn diverged(&self, upstream: Upstream) -> impl Future<Output = Divergence> + Send;

    /// pg_rewind of a stopped server to `upstream`. After an error the data directory may be unusable.
    fn rewind(&self, upstream: Upstream) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Whether the data directory says that its server follows another one, or recovers to be told what it is.
    fn is_set_to_follow(&self) -> bool;

    /// Whether the stopped server's data directory is half rewound: pg_rewind was cut off with an earlier agent.
    fn half_rewound(&self) -> bool {
        false
    }

    /// Whether the data directory belongs to a cluster that was being made, and that nobody has said to be finished.
    fn half_made(&self) -> bool {
        false
    }

    /// Says so: the cluster that initdb began is recorded in the DCS.
    fn end_bootstrap(&self) -> Result<(), PgError> {
        Ok(())
    }

    /// Removes the data directory's content.
    fn remove_data(&self) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Moves the data directory of a failed bootstrap aside (`*.failed`), so that nothing is lost.
    fn move_data_aside(&self) -> impl Future<Output = Result<(), PgError>> + Send;

    /// CHECKPOINT.
    fn checkpoint(&self, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Returns once no transaction of a client is open any more that was when this was called, at the latest after `limit`.
    fn end_of_transactions(&self, limit: Duration) -> impl Future<Output = ()> + Send {
        let _ = limit;
        async {}
    }

    /// Sets `synchronous_standby_names` and returns when the server has it in force (`''` = nobody). Also valid on a stopped
    /// server or a standby: then it is what the next start or promotion has.
    fn set_synchronous_standby_names(&self, names: String) -> impl Future<Output = Result<(), PgError>> + Send;

    /// Takes the slots one step nearer to the plan. What decoding takes long for (making and moving logical slots) goes on
    /// beside.
    fn set_slots(&self, plan: SlotPlan) -> impl Future<Output = Result<SlotsDone, PgError>> + Send;

    /// Copies logical slots of `source`, which leads, into this standby: reads them, stops the server, writes their files. Only those
    /// whose readers have confirmed no more than what has been replayed here.
    /// The names of those copied; none: nothing was done, the server runs on.
    fn copy_slots(
        &self,
        wanted: BTreeMap<String, WantedSlot>,
        source: Upstream,
    ) -> impl Future<Output = Result<Vec<String>, PgError>> + Send {
        let _ = (wanted, source);
        async { Ok(Vec::new()) }
    }

    /// The local `.history` file of `timeline`, with the time the file was written (RFC 3339).
    fn history(&self, timeline: TimelineId) -> impl Future<Output = Option<(History, String)>> + Send;

    /// What PostgreSQL says of the setting `name`; `None`: it knows none of that name.
    fn setting(&self, name: &str) -> impl Future<Output = Result<Option<Setting>, PgError>> + Send {
        let why = format!("{name} can't be asked for here");
        async { Err(PgError::Unusable(why)) }
    }

    /// How long operations took.
    fn took(&self) -> Took {
        Took::default()
    }

    /// Runs a callback (`on_start`, `on_role_change` …) in the background with Patroni's arguments.
    fn callback(&self, event: &'static str, role: &str);

    /// Runs `on_start` for a server that was found running: whoever is told by callbacks has heard nothing of it by this
    /// process so far. Otherwise nothing.
    fn introduce(&self, role: &str) {
        let _ = role;
    }
}
