//! The dynamic settings: the `config` key of the DCS, or `bootstrap.dcs` of a cluster that is only coming to be.

use std::time::Duration;

use serde_json::{Map, Value};

/// Typed settings with Patroni's defaults for what is absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How long a lease lasts without renewal.
    pub ttl: Duration,
    /// Longest pause between two turns of the HA loop.
    pub loop_wait: Duration,
    /// How long one operation on DCS or PostgreSQL is tried.
    pub retry_timeout: Duration,
    /// Bytes a candidate may be behind.
    pub maximum_lag_on_failover: u64,
    /// Bytes a synchronous standby may be behind before another takes its place; `None` = no limit.
    pub maximum_lag_on_syncnode: Option<u64>,
    /// How many lines the `history` key keeps; 0 = all.
    pub max_timelines_history: usize,
    /// How long a crashed primary may take to start before another takes over; zero = fail over at once.
    pub primary_start_timeout: Duration,
    /// How long a primary may take to stop in synchronous mode; `None` = no limit.
    pub primary_stop_timeout: Option<Duration>,
    /// Longest wait for a still active primary's WAL before a race.
    pub primary_race_backoff: Duration,
    /// Synchronous replication.
    pub synchronous_mode: SynchronousMode,
    /// Rather block writes than be without a synchronous standby.
    pub synchronous_mode_strict: bool,
    /// How many standbys confirm a commit.
    pub synchronous_node_count: usize,
    /// Go on without the DCS while every member answers.
    pub failsafe_mode: bool,
    /// Refuse to promote a node of an older timeline.
    pub check_timeline: bool,
    /// Hands off: no automatic failover.
    pub pause: bool,
    /// How long the slot of an absent member is kept; zero = dropped at once.
    pub member_slots_ttl: Duration,
    /// Permanent slots: name → definition.
    pub slots: Map<String, Value>,
    /// Matchers of slots to leave alone.
    pub ignore_slots: Vec<Map<String, Value>>,
    /// Follow a primary outside the cluster. `None` where it has none of `host`, `port`, `restore_command`.
    pub standby_cluster: Option<Map<String, Value>>,
    /// The `postgresql` section as it stands.
    pub postgresql: Map<String, Value>,
}

/// `synchronous_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SynchronousMode {
    /// Asynchronous.
    #[default]
    Off,
    /// Named standbys confirm each commit, and only they may be promoted.
    On,
    /// Any `n` of the voters confirm each commit.
    Quorum,
}

impl Default for Settings {
    /// Patroni's defaults: what an existing cluster runs with where its `config` key says nothing.
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(30),
            loop_wait: Duration::from_secs(10),
            retry_timeout: Duration::from_secs(10),
            maximum_lag_on_failover: 1_048_576,
            maximum_lag_on_syncnode: None,
            max_timelines_history: 0,
            primary_start_timeout: Duration::from_secs(300),
            primary_stop_timeout: None,
            primary_race_backoff: Duration::ZERO,
            synchronous_mode: SynchronousMode::Off,
            synchronous_mode_strict: false,
            synchronous_node_count: 1,
            failsafe_mode: false,
            check_timeline: false,
            pause: false,
            member_slots_ttl: Duration::from_secs(1800),
            slots: Map::new(),
            ignore_slots: Vec::new(),
            standby_cluster: None,
            postgresql: Map::new(),
        }
    }
}
