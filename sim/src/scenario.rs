//! One world before it begins: who takes part, with which settings, and what will go wrong when.
//!
//! A scenario is drawn from a seed, and is a plain document: a failing one is shrunk by leaving events out, and kept as a
//! regression test that no later change of the drawing can alter.

use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

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
    /// The holder of the leader key.
    Leader,
    /// The first of the synchronous standbys.
    Synchronous,
}

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
    /// The answers of the next calls get lost after they took effect.
    LoseAnswers { node: usize, count: u32 },
    /// Requests and answers are slow.
    SlowDcs { node: usize, request: u64, answer: u64, ms: u64 },
    /// Watch events come late.
    SlowWatch { node: usize, delay: u64, ms: u64 },
    /// Watches break.
    BreakWatches,
    /// The store forgets its history: watches that need it are cancelled.
    Compact,
    /// Nothing can be written to PostgreSQL's disk.
    DiskFull { node: usize, ms: u64 },
    /// Starts, stops, checkpoints and recovery take seconds.
    SlowDisk { node: usize, ms: u64 },
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
            | Self::FreezeHost { node, .. }
            | Self::Isolate { node, .. }
            | Self::LoseAnswers { node, .. }
            | Self::SlowDcs { node, .. }
            | Self::SlowWatch { node, .. }
            | Self::DiskFull { node, .. }
            | Self::SlowDisk { node, .. }
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

impl Event {
    /// Milliseconds after the world's beginning at which it is over.
    pub fn ends(&self) -> u64 {
        self.at
            + match &self.what {
                Fault::KillAgent { ms, .. }
                | Fault::StopAgent { ms, .. }
                | Fault::CrashHost { ms, .. }
                | Fault::FreezeAgent { ms, .. }
                | Fault::FreezePostgres { ms, .. }
                | Fault::FreezeHost { ms, .. }
                | Fault::FreezeRouter { ms, .. }
                | Fault::Cut { ms, .. }
                | Fault::Isolate { ms, .. }
                | Fault::DcsDown { ms, .. }
                | Fault::DcsLeaderChange { ms }
                | Fault::SlowDcs { ms, .. }
                | Fault::SlowWatch { ms, .. }
                | Fault::DiskFull { ms, .. }
                | Fault::SlowDisk { ms, .. } => *ms,
                _ => 0,
            }
    }
}

impl Scenario {
    /// Draws one.
    pub fn draw(seed: u64) -> Self {
        // Not the numbers that the world itself draws.
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x5EED_0000_0000);
        let count = *[2, 3, 3, 3, 3, 4, 5].choose(&mut rng).unwrap_or(&3);
        let priority = |rng: &mut SmallRng| if rng.random_ratio(1, 8) { rng.random_range(0..3) } else { 1 };
        let mut nodes: Vec<Node> =
            (0..count).map(|_| Node { ppm: rng.random_range(-500..=500), priority: priority(&mut rng) }).collect();
        // At least two that may lead, or nothing of interest happens.
        nodes[0].priority = nodes[0].priority.max(1);
        nodes[1].priority = nodes[1].priority.max(1);
        let synchronous = rng.random_ratio(2, 3);
        let mode = if synchronous && rng.random_ratio(1, 3) { json!("quorum") } else { json!(synchronous) };
        let ttl = *[2, 3, 5, 5, 5, 10].choose(&mut rng).unwrap_or(&5);
        let settings = json!({
            "ttl": ttl,
            "loop_wait": 1,
            "retry_timeout": 1,
            "maximum_lag_on_failover": *[640u64, 6_400, 1_048_576].choose(&mut rng).unwrap_or(&6_400),
            "primary_start_timeout": *[0u64, 2, 300].choose(&mut rng).unwrap_or(&2),
            "synchronous_mode": mode,
            "synchronous_mode_strict": synchronous && rng.random_ratio(1, 4),
            "synchronous_node_count": if count > 3 && rng.random() { 2 } else { 1 },
            "check_timeline": rng.random_ratio(1, 4),
            "failsafe_mode": rng.random_ratio(1, 3),
            "postgresql": {
                "use_pg_rewind": rng.random_ratio(7, 8),
                "remove_data_directory_on_rewind_failure": rng.random::<bool>(),
            },
        });
        let routers = rng.random_range(1..=2);
        let chaos = rng.random_range(10_000..=40_000u64);
        let mut draw = Draw { rng, count, routers, ttl: ttl * 1000, synchronous };
        let events = draw.events(chaos);
        let calm_at = events.iter().map(Event::ends).max().unwrap_or(0).max(BOOTSTRAP) + 100;
        Self { seed, nodes, routers, settings, events, calm_at }
    }

    /// How long the world waits, from `calm_at` on, until everything has to be well.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(90)
    }

    /// Whether commits wait for standbys from the first one on to the last.
    pub fn always_synchronous(&self) -> bool {
        let switched = |event: &Event| matches!(&event.what, Fault::Configure { patch } if patch.get("synchronous_mode") == Some(&json!(false)));
        self.settings["synchronous_mode"] != json!(false) && !self.events.iter().any(switched)
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

    /// The same without some of its events.
    pub fn with(&self, keep: impl Fn(usize) -> bool) -> Self {
        let events: Vec<Event> =
            self.events.iter().enumerate().filter(|(index, _)| keep(*index)).map(|(_, event)| event.clone()).collect();
        Self { events, ..self.clone() }
    }
}

/// Nothing goes wrong until here, so that there is a cluster to break.
const BOOTSTRAP: u64 = 4_000;

struct Draw {
    rng: SmallRng,
    count: usize,
    routers: usize,
    ttl: u64,
    synchronous: bool,
}

impl Draw {
    fn events(&mut self, chaos: u64) -> Vec<Event> {
        let mut events = Vec::new();
        // Some worlds break from the start: a bootstrap is a time to fail in, too.
        let mut at = if self.rng.random_ratio(1, 6) { 0 } else { BOOTSTRAP };
        let pace = *[500u64, 2_000, 5_000].choose(&mut self.rng).unwrap_or(&2_000);
        while at < chaos {
            at += self.rng.random_range(1..pace * 2);
            let first = self.event(at);
            let lasts = first.ends() - at;
            events.push(first);
            // Trouble seldom comes alone: right after it, or while it lasts.
            let within = *[0, 0, 200, lasts.max(1)].choose(&mut self.rng).unwrap_or(&0);
            if within > 0 {
                let at = at + self.rng.random_range(0..within);
                events.push(self.event(at));
            }
        }
        events.sort_by_key(|event| event.at);
        events
    }

    /// Most faults hit anybody; what decides over a cluster is what happens to its leader.
    fn event(&mut self, at: u64) -> Event {
        let aim = match self.rng.random_range(0..8) {
            0..2 => Some(Aim::Leader),
            2 => Some(Aim::Synchronous),
            _ => None,
        };
        Event { at, aim, what: self.fault() }
    }

    fn fault(&mut self) -> Fault {
        let node = self.rng.random_range(0..self.count);
        let router = self.rng.random_range(0..self.routers);
        let ms = self.duration();
        match self.rng.random_range(0..100) {
            0..8 => Fault::KillAgent { node, ms },
            8..11 => Fault::StopAgent { node, ms },
            11..18 => Fault::KillPostgres { node },
            18..24 => Fault::CrashHost { node, ms },
            24..29 => Fault::FreezeAgent { node, ms },
            29..34 => Fault::FreezePostgres { node, ms },
            34..41 => Fault::FreezeHost { node, ms },
            41..43 => Fault::FreezeRouter { router, ms },
            43..57 => {
                let (from, to) = self.ends();
                Fault::Cut { from, to, both: self.rng.random(), ms }
            }
            57..62 => Fault::Isolate { node, ms },
            62..65 => Fault::DcsDown { refused: self.rng.random(), ms },
            65..69 => Fault::DcsLeaderChange { ms: self.rng.random_range(0..3_000) },
            69..73 => Fault::LoseAnswers { node, count: self.rng.random_range(1..4) },
            73..77 => {
                let delays: RangeInclusive<u64> = 0..=*[50u64, 800, 4_000].choose(&mut self.rng).unwrap_or(&50);
                Fault::SlowDcs {
                    node,
                    request: self.rng.random_range(delays.clone()),
                    answer: self.rng.random_range(delays),
                    ms,
                }
            }
            77..80 => Fault::SlowWatch { node, delay: self.rng.random_range(10..3_000), ms },
            80..82 => Fault::BreakWatches,
            82..83 => Fault::Compact,
            83..85 => Fault::DiskFull { node, ms },
            85..87 => Fault::SlowDisk { node, ms },
            87..89 => Fault::WallJump { node, by: self.rng.random_range(-3_600_000..3_600_000) },
            89 if !self.synchronous => Fault::Failover { candidate: node },
            89..94 => Fault::Switchover { candidate: self.rng.random::<bool>().then_some(node) },
            94..96 => Fault::Restart { node },
            96..97 => Fault::Reinitialize { node },
            _ => Fault::Configure { patch: self.patch() },
        }
    }

    /// From a blink to far beyond the lease.
    fn duration(&mut self) -> u64 {
        match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..500),
            1 => self.rng.random_range(500..self.ttl),
            2 => self.rng.random_range(self.ttl * 8 / 10..self.ttl * 12 / 10),
            _ => self.rng.random_range(self.ttl..self.ttl * 3),
        }
    }

    fn ends(&mut self) -> (End, End) {
        let node = self.rng.random_range(0..self.count);
        let other = (node + self.rng.random_range(1..self.count)) % self.count;
        match self.rng.random_range(0..10) {
            0..3 => (End::Agent(node), End::Dcs),
            3 => (End::Dcs, End::Agent(node)),
            4..6 => (End::Agent(node), End::Agent(other)),
            6..9 => (End::Postgres(node), End::Postgres(other)),
            _ => (End::Router(self.rng.random_range(0..self.routers)), End::Postgres(node)),
        }
    }

    fn patch(&mut self) -> Value {
        match self.rng.random_range(0..if self.synchronous { 6 } else { 4 }) {
            // From one way to wait for standbys to the other.
            4 => json!({ "synchronous_mode": "quorum" }),
            5 => json!({ "synchronous_mode": true }),
            0 => json!({ "ttl": *[2, 3, 5, 10, 20].choose(&mut self.rng).unwrap_or(&5) }),
            1 => json!({ "primary_start_timeout": self.rng.random_range(0..10) }),
            2 => json!({ "maximum_lag_on_failover": self.rng.random_range(64..10_000) }),
            _ => json!({ "synchronous_node_count": self.rng.random_range(1..3) }),
        }
    }
}
