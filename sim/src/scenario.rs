//! One world before it begins: who takes part, with which settings, and what will go wrong when.
//!
//! A scenario is drawn from a seed, and is a plain document: a failing one is shrunk by leaving events out, and kept as a
//! regression test that no later change of the drawing can alter.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A world before it begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// Draws everything that is not an event: latencies, who is first.
    pub seed: u64,
    /// The hosts, each with an agent and a PostgreSQL.
    pub nodes: Vec<Node>,
    /// How many routers.
    pub routers: usize,
    /// The cluster's dynamic configuration.
    pub settings: Value,
    /// What goes wrong, in order of time.
    pub events: Vec<Event>,
    /// From when on nothing goes wrong any more, in milliseconds.
    pub calm_at: u64,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// How much faster its clocks run, in millionths.
    pub ppm: i64,
    /// The tag `failover_priority`; 0 is `nofailover`.
    pub priority: i64,
    /// It may lead only with a kernel watchdog.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub watchdog: bool,
    /// Its other tags.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub tags: Map<String, Value>,
}

/// Something that happens at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds after the world's beginning.
    pub at: u64,
    /// Whom it hits, where that is known only then; `None`: whom it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aim: Option<Aim>,
    /// What.
    #[serde(flatten)]
    pub what: Fault,
}

/// A node by its part at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aim {
    /// The holder of the leader key; while there is none, who has the right to make the cluster.
    Leader,
    /// The first of the synchronous standbys.
    Synchronous,
    /// Who takes the leader key next, while it is promoted or shortly before or after. Nobody, where that does not come in
    /// [`NEXT_LEADER_WITHIN`] milliseconds.
    NextLeader,
}

/// How long an event waits for the next leader, in milliseconds.
pub const NEXT_LEADER_WITHIN: u64 = 12_000;

/// Where a message comes from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The agent of a node.
    Agent(usize),
    /// The PostgreSQL of a node.
    Postgres(usize),
    /// A router.
    Router(usize),
    /// The DCS.
    Dcs,
}

/// What can go wrong, or be asked for. `ms` is how long it lasts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Fault {
    /// SIGKILL of the agent; its supervisor starts it again.
    KillAgent { node: usize, ms: u64 },
    /// SIGTERM of the agent; started again later.
    StopAgent { node: usize, ms: u64 },
    /// SIGKILL of the postmaster.
    KillPostgres { node: usize },
    /// Power cut.
    CrashHost { node: usize, ms: u64 },
    /// SIGSTOP, then SIGCONT.
    FreezeAgent { node: usize, ms: u64 },
    /// The same with the postmaster and all its processes.
    FreezePostgres { node: usize, ms: u64 },
    /// The same with the postmaster alone: whoever is connected goes on.
    FreezePostmaster { node: usize, ms: u64 },
    /// The whole host stands still.
    FreezeHost { node: usize, ms: u64 },
    /// A router stands still.
    FreezeRouter { router: usize, ms: u64 },
    /// Packets from one end to another get lost.
    Cut { from: End, to: End, both: bool, ms: u64 },
    /// A host is cut off from all others.
    Isolate { node: usize, ms: u64 },
    /// The store answers nobody; `refused`: it says so.
    DcsDown { refused: bool, ms: u64 },
    /// The store has elected a new leader: leases begin anew, watches break.
    DcsLeaderChange { ms: u64 },
    /// The store ends the lease of a node before its time: its leader has thawed, and does not know of renewals meanwhile.
    RevokeLease { node: usize },
    /// The store is lost for `ms` and comes back as it was at first, `age` before that, or, `anew`, with nothing in it.
    RestoreDcs { age: u64, anew: bool, ms: u64 },
    /// The answers of the next calls get lost after they took effect.
    LoseAnswers { node: usize, count: u32 },
    /// Requests and answers are slow.
    SlowDcs { node: usize, request: u64, answer: u64, ms: u64 },
    /// Watch events come late.
    SlowWatch { node: usize, delay: u64, ms: u64 },
    /// The same of a router.
    SlowRouter { router: usize, delay: u64, ms: u64 },
    /// The next events never come.
    LoseEvents { node: usize, count: u32 },
    /// Watches break.
    BreakWatches,
    /// The store forgets its history: watches that need it are cancelled.
    Compact,
    /// Nothing can be written to PostgreSQL's disk.
    DiskFull { node: usize, ms: u64 },
    /// Starts, stops, checkpoints and recovery take seconds.
    SlowDisk { node: usize, ms: u64 },
    /// The operator's `pre_promote` says no.
    RefusePromotion { node: usize, ms: u64 },
    /// The server answers its agent with errors, and serves everybody else.
    RefuseAgent { node: usize, ms: u64 },
    /// There is so much to replay that a promotion does not come to its end before, nor does a standby that is started
    /// meanwhile know before what is on its disk.
    SlowReplay { node: usize, ms: u64 },
    /// The kernel watchdog does not work.
    BreakWatchdog { node: usize, ms: u64 },
    /// Some other program makes a replication slot for itself.
    MakeSlot { node: usize },
    /// The wall clock jumps.
    WallJump { node: usize, by: i64 },
    /// `trunklinectl switchover`.
    Switchover { candidate: Option<usize> },
    /// `trunklinectl failover`, by which an operator may lose commits: not drawn where none may be lost.
    Failover { candidate: usize },
    /// `trunklinectl restart`.
    Restart { node: usize },
    /// `trunklinectl reinit`.
    Reinitialize { node: usize },
    /// `trunklinectl edit-config`.
    Configure { patch: Value },
    /// `trunklinectl pause`, then `resume`.
    Pause { ms: u64 },
}

impl Fault {
    /// The same at another node, where it has one.
    pub fn at(mut self, target: usize) -> Self {
        match &mut self {
            Self::KillAgent { node, .. }
            | Self::StopAgent { node, .. }
            | Self::KillPostgres { node }
            | Self::CrashHost { node, .. }
            | Self::FreezeAgent { node, .. }
            | Self::FreezePostgres { node, .. }
            | Self::FreezePostmaster { node, .. }
            | Self::FreezeHost { node, .. }
            | Self::Isolate { node, .. }
            | Self::RevokeLease { node }
            | Self::LoseAnswers { node, .. }
            | Self::LoseEvents { node, .. }
            | Self::SlowDcs { node, .. }
            | Self::SlowWatch { node, .. }
            | Self::DiskFull { node, .. }
            | Self::SlowDisk { node, .. }
            | Self::RefusePromotion { node, .. }
            | Self::RefuseAgent { node, .. }
            | Self::SlowReplay { node, .. }
            | Self::BreakWatchdog { node, .. }
            | Self::MakeSlot { node }
            | Self::WallJump { node, .. }
            | Self::Restart { node }
            | Self::Reinitialize { node } => *node = target,
            Self::Cut { from: End::Agent(one), to: End::Agent(other), .. }
            | Self::Cut { from: End::Postgres(one), to: End::Postgres(other), .. } => {
                if *other == target {
                    *other = *one;
                }
                *one = target;
            }
            Self::Cut { from: End::Agent(node) | End::Postgres(node), .. }
            | Self::Cut { to: End::Agent(node) | End::Postgres(node), .. } => *node = target,
            _ => (),
        }
        self
    }
}

impl Fault {
    /// Whom it disturbs, beyond a server that is down for a moment: `None` is everybody.
    pub fn hits(&self) -> Vec<Option<usize>> {
        let node = |end: &End| match end {
            End::Agent(node) | End::Postgres(node) => Some(Some(*node)),
            End::Router(_) | End::Dcs => None,
        };
        match self {
            Self::KillAgent { node, .. }
            | Self::StopAgent { node, .. }
            | Self::CrashHost { node, .. }
            | Self::FreezeAgent { node, .. }
            | Self::FreezePostgres { node, .. }
            | Self::FreezePostmaster { node, .. }
            | Self::FreezeHost { node, .. }
            | Self::Isolate { node, .. }
            | Self::RevokeLease { node }
            | Self::LoseAnswers { node, .. }
            | Self::LoseEvents { node, .. }
            | Self::SlowDcs { node, .. }
            | Self::SlowWatch { node, .. }
            | Self::DiskFull { node, .. }
            | Self::SlowDisk { node, .. }
            | Self::RefuseAgent { node, .. }
            | Self::Restart { node }
            | Self::Reinitialize { node } => vec![Some(*node)],
            Self::Cut { from, to, .. } => [from, to].into_iter().filter_map(node).collect(),
            Self::DcsDown { .. }
            | Self::DcsLeaderChange { .. }
            | Self::RestoreDcs { .. }
            | Self::BreakWatches
            | Self::Compact
            | Self::Configure { .. }
            | Self::Pause { .. } => vec![None],
            Self::KillPostgres { .. }
            | Self::FreezeRouter { .. }
            | Self::SlowRouter { .. }
            | Self::RefusePromotion { .. }
            | Self::SlowReplay { .. }
            | Self::BreakWatchdog { .. }
            | Self::MakeSlot { .. }
            | Self::WallJump { .. }
            | Self::Switchover { .. }
            | Self::Failover { .. } => Vec::new(),
        }
    }
}

impl Event {
    /// Milliseconds after the world's beginning at which it is over.
    pub fn ends(&self) -> u64 {
        let waits = if self.aim == Some(Aim::NextLeader) { NEXT_LEADER_WITHIN } else { 0 };
        self.at
            + waits
            + match &self.what {
                Fault::KillAgent { ms, .. }
                | Fault::StopAgent { ms, .. }
                | Fault::CrashHost { ms, .. }
                | Fault::FreezeAgent { ms, .. }
                | Fault::FreezePostgres { ms, .. }
                | Fault::FreezePostmaster { ms, .. }
                | Fault::FreezeHost { ms, .. }
                | Fault::FreezeRouter { ms, .. }
                | Fault::Cut { ms, .. }
                | Fault::Isolate { ms, .. }
                | Fault::DcsDown { ms, .. }
                | Fault::DcsLeaderChange { ms }
                | Fault::SlowDcs { ms, .. }
                | Fault::SlowWatch { ms, .. }
                | Fault::SlowRouter { ms, .. }
                | Fault::DiskFull { ms, .. }
                | Fault::SlowDisk { ms, .. }
                | Fault::RefusePromotion { ms, .. }
                | Fault::RefuseAgent { ms, .. }
                | Fault::SlowReplay { ms, .. }
                | Fault::BreakWatchdog { ms, .. }
                | Fault::Pause { ms } => *ms,
                Fault::RestoreDcs { age, ms, .. } => age + ms,
                _ => 0,
            }
    }
}

/// What a leader may take longer than lease, turn and request: the start of a server on a disk that was slow a moment ago, its
/// second try, and a promise in failsafe mode that was given in the last moment of the trouble.
const ALLOWED: Duration = Duration::from_secs(10);

impl Scenario {
    /// How long the world waits, from `calm_at` on, until everything has to be well.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(45)
    }

    /// How long it may take, from `calm_at` on, until somebody leads: the longest lease that this world has, a turn of the loop
    /// and a request that gets no answer, and what is allowed for besides.
    pub fn patience_for_a_leader(&self) -> Duration {
        let longest = |key: &str| {
            let changed = self.events.iter().filter_map(|event| match &event.what {
                Fault::Configure { patch } => patch[key].as_u64(),
                _ => None,
            });
            changed.chain(self.settings[key].as_u64()).max().unwrap_or_default()
        };
        Duration::from_secs(longest("ttl") + longest("loop_wait") + longest("retry_timeout")) + ALLOWED
    }

    /// Whether commits wait for standbys from the first one on to the last.
    pub fn always_synchronous(&self) -> bool {
        let switched = |event: &Event| matches!(&event.what, Fault::Configure { patch } if patch.get("synchronous_mode") == Some(&json!(false)));
        self.settings["synchronous_mode"] != json!(false) && !self.events.iter().any(switched)
    }

    /// Whether commits wait for standbys all the time, also where there is none.
    pub fn always_strict(&self) -> bool {
        let loosened = |event: &Event| match &event.what {
            Fault::Configure { patch } => patch.get("synchronous_mode_strict") == Some(&json!(false)),
            _ => false,
        };
        let strict = self.settings["synchronous_mode_strict"] == json!(true);
        strict && self.always_synchronous() && !self.events.iter().any(loosened)
    }

    /// The largest `maximum_lag_on_failover` that is ever in force.
    pub fn largest_lag(&self) -> u64 {
        let lag = |settings: &Value| settings["maximum_lag_on_failover"].as_u64();
        let changed = self.events.iter().filter_map(|event| match &event.what {
            Fault::Configure { patch } => lag(patch),
            _ => None,
        });
        changed.chain(lag(&self.settings)).max().unwrap_or(u64::MAX)
    }

    /// The name of the permanent logical slot, if there is one.
    pub fn logical_slot(&self) -> Option<String> {
        let slots = self.settings["slots"].as_object()?;
        slots.iter().find(|(_, slot)| slot["type"] == json!("logical")).map(|(name, _)| name.clone())
    }

    /// The same without some of its events.
    pub fn with(&self, keep: impl Fn(usize) -> bool) -> Self {
        let events: Vec<Event> =
            self.events.iter().enumerate().filter(|(index, _)| keep(*index)).map(|(_, event)| event.clone()).collect();
        Self { events, ..self.clone() }
    }
}
