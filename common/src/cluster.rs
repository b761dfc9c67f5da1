//! The cluster as one consistent reading of the DCS shows it: the input of every decision.
//!
//! Plain data and look-ups. How the values are written in the DCS is the business of `dcs::codec`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value};
use trunkline_config::dynamic::Settings;

use crate::{History, LeaseId, Lsn, MemberName, Revision, SystemId, TimelineId};

/// Everything below `/<namespace>/<scope>/` at one revision.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterView {
    /// Revision of the store that this view shows.
    pub revision: Revision,
    /// The `initialize` key: whether there is a cluster, and which.
    pub initialize: Initialize,
    /// Its revision, 0 while it is absent; what a compare-and-set has to name.
    pub initialize_revision: Revision,
    /// The `config` key, `None` while it is absent.
    pub config: Option<ConfigRecord>,
    /// What `config` says, with Patroni's defaults for what it doesn't; the last good one where the key is malformed.
    pub settings: Settings,
    /// The `leader` key.
    pub leader: Option<LeaderKey>,
    /// The `members/` keys.
    pub members: BTreeMap<MemberName, Member>,
    /// The `failover` key, where it asks for something.
    pub failover: Option<FailoverRequest>,
    /// Revision of the `failover` key even where it is empty (`{}`); what a compare-and-set has to name.
    pub failover_revision: Revision,
    /// The `sync` key.
    pub sync: SyncState,
    /// The `status` key (or the legacy `optime/leader`).
    pub status: Status,
    /// Revision of the `status` key, 0 while it is absent.
    pub status_revision: Revision,
    /// The `history` key.
    pub history: Vec<HistoryLine>,
    /// Whether there is a `history` key: an empty one says "timeline 1", an absent one says nothing.
    pub has_history: bool,
    /// Its revision; what a compare-and-set has to name.
    pub history_revision: Revision,
    /// The `timeline` key (ours): the highest number with which somebody may have begun a timeline, whether or not it has
    /// lived to write the history; 0 where there is no key.
    pub claimed: TimelineId,
    /// Its revision; what a compare-and-set has to name.
    pub claimed_revision: Revision,
    /// The `restored` key (ours), as the first agent wrote it that found the DCS gone back to an earlier state.
    pub restored: RestoreRecord,
    /// Its revision; what a compare-and-set has to name.
    pub restored_revision: Revision,
    /// What this node knows of a restore and `restored` does not say. Nothing that was read: an agent adds it to what it read.
    pub unsaid: Option<RestoreRecord>,
    /// The `failsafe` key: members that must answer for a leader to survive the loss of the DCS.
    pub failsafe: Option<BTreeMap<MemberName, String>>,
    /// Its revision; what a compare-and-set has to name.
    pub failsafe_revision: Revision,
    /// The `routers/` keys, by the last part of their names.
    pub routers: BTreeMap<String, RouterRecord>,
    /// Keys whose value makes no sense, with the revision at which it doesn't: what this view has for them is older.
    pub malformed: BTreeMap<String, Revision>,
    /// Of those the ones, without the cluster's prefix, that have been malformed for as long as this process has read them: no good value
    /// stays in force.
    pub unknown: BTreeSet<String>,
}

impl ClusterView {
    /// The member that holds the leader key, if it has a member key too.
    pub fn leader_member(&self) -> Option<&Member> {
        self.members.get(&self.leader.as_ref()?.name)
    }

    /// Whether `name` holds the leader key. By name, as Patroni does: a restarted agent finds its own key again.
    pub fn is_leader(&self, name: &MemberName) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader.name == *name)
    }

    /// `restored` has been written.
    pub fn has_said(&mut self, record: RestoreRecord, revision: Revision) {
        (self.restored, self.restored_revision, self.unsaid) = (record, revision, None);
    }

    /// Who had every commit before the DCS was restored from a backup, where the `sync` key is as old as that and somebody has told.
    pub fn sync_before_restore(&self) -> Option<&SyncState> {
        self.restored.sync.as_ref().filter(|_| self.sync.revision <= self.restored.since)
    }

    /// The cluster's timeline as `history` tells it: one past the last finished one, 1 for an empty history,
    /// `None` where there is no `history` key.
    pub fn timeline(&self) -> Option<TimelineId> {
        let begun = |line: &HistoryLine| TimelineId(line.timeline.0.saturating_add(1));
        self.history.last().map(begun).or(self.has_history.then_some(TimelineId(1)))
    }
}

/// The `restored` key. Revisions do not tell what was written since a restore from what came with the backup: whoever notices it late
/// would take one for the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestoreRecord {
    /// How often that has happened. One more than anybody knew of before: a number that was seen earlier came with the backup.
    pub count: u64,
    /// The first revision that was seen after the last time. What has a later one was written since.
    pub since: Revision,
    /// The `sync` key as it was before that, with its revision of then: the newest that anybody has told of. Whoever has not seen it
    /// would go by the one of the backup.
    pub sync: Option<SyncState>,
}

/// The `initialize` key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Initialize {
    /// Nobody has bootstrapped.
    #[default]
    Absent,
    /// Empty value: somebody is bootstrapping now.
    Running,
    /// Bootstrapped: every member's data directory must have this identifier.
    Done(SystemId),
    /// Not something Patroni writes; the leader overwrites it.
    Invalid(String),
}

/// The `config` key.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigRecord {
    /// The object as it stands, unknown fields included.
    pub value: Value,
    /// What a compare-and-set has to name.
    pub revision: Revision,
}

/// The `leader` key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderKey {
    /// Its value: who leads.
    pub name: MemberName,
    /// The lease it goes away with.
    pub lease: LeaseId,
    /// When it was created: a new holder has a new one, a re-leased key keeps it.
    pub created: Revision,
    /// When it was last written.
    pub modified: Revision,
}

/// A `members/<name>` key.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Member {
    /// The key's lease.
    pub lease: LeaseId,
    /// `postgres://host:port/database`, without user and password.
    pub conn_url: Option<String>,
    /// `http(s)://host:port/patroni`.
    pub api_url: Option<String>,
    /// `postgres://…` of a pooler in front of the member.
    pub proxy_url: Option<String>,
    /// Patroni's state text, `unknown` where absent.
    pub state: String,
    /// Patroni's role text (`primary`, `replica`, `standby_leader`, `promoted`, `demoted`, `uninitialized`, `master`).
    pub role: String,
    /// The agent's version.
    pub version: Option<String>,
    /// The member's tags, JSON types and order kept.
    pub tags: Map<String, Value>,
    /// Flushed position of a primary, max(received, replayed) of a standby.
    pub xlog_location: Option<Lsn>,
    /// Last received position of a standby.
    pub receive_lsn: Option<Lsn>,
    /// Last replayed position of a standby.
    pub replay_lsn: Option<Lsn>,
    /// `streaming` or `in archive recovery`.
    pub replication_state: Option<String>,
    /// The member's timeline, `None` where unknown.
    pub timeline: Option<TimelineId>,
    /// `false` while a new primary has not had a checkpoint on its timeline yet: no source for pg_rewind until then.
    pub checkpoint_after_promote: Option<bool>,
    /// PostgreSQL has to be restarted for a setting.
    pub pending_restart: bool,
    /// Which settings, and their values, as Patroni writes them.
    pub pending_restart_reason: Option<Value>,
    /// A planned restart, as Patroni writes it.
    pub scheduled_restart: Option<Value>,
    /// The member has seen `pause`.
    pub pause: bool,
}

impl Member {
    /// Patroni's `running`.
    pub fn is_running(&self) -> bool {
        self.state == "running"
    }

    /// Whether the member says that it takes writes. Proof only together with the leader key (dcs-layout §6.2).
    pub fn claims_primary(&self) -> bool {
        self.is_running() && matches!(self.role.as_str(), "primary" | "master")
    }

    /// Host and port of `conn_url`; IPv6 brackets removed.
    pub fn host_port(&self) -> Option<(String, u16)> {
        host_port(self.conn_url.as_deref()?)
    }

    /// A boolean tag, by Python truthiness of its value as Patroni has it (the string `"false"` is true).
    pub fn tag_is_true(&self, tag: &str) -> bool {
        self.tags.get(tag).is_some_and(trunkline_config::tags::truthy)
    }

    /// The member must never become leader (`nofailover`, or `failover_priority` ≤ 0).
    pub fn nofailover(&self) -> bool {
        trunkline_config::tags::failover_priority(&self.tags) <= 0
    }

    /// The member must never be synchronous (`nosync`, or `sync_priority` ≤ 0).
    pub fn nosync(&self) -> bool {
        trunkline_config::tags::sync_priority(&self.tags) <= 0
    }
}

/// A `routers/<lease>` key: a router that a new leader may wait for. Not Patroni's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterRecord {
    /// What it calls itself.
    pub name: String,
    /// The length of its lease by its own count: so long after its last renewal it has ended the sessions of its leader.
    pub lease: Duration,
    /// When the leader key was created that it follows: every session to a leader before that one is over, and none will be
    /// opened. 0: it has not seen one.
    pub epoch: Revision,
}

/// The `failover` key: somebody asks for another leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailoverRequest {
    /// Who must step down. Present: a switchover. Absent: a manual failover.
    pub leader: Option<MemberName>,
    /// Who shall lead (`member` in the DCS, `candidate` in REST).
    pub candidate: Option<MemberName>,
    /// Not before this time.
    pub scheduled_at: Option<chrono::DateTime<chrono::FixedOffset>>,
    /// The time as it was written.
    pub scheduled_at_text: Option<String>,
}

/// The `sync` key: who may be promoted without losing an acknowledged commit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SyncState {
    /// The primary that owns `synchronous_standby_names`. Without one the record counts as empty.
    pub leader: Option<MemberName>,
    /// The synchronous standbys (mode `on`) or voters (mode `quorum`), sorted.
    pub standbys: Vec<String>,
    /// Votes needed in mode `quorum`; 0 in mode `on`.
    pub quorum: u32,
    /// Revision of the key; 0 while it is absent.
    pub revision: Revision,
}

impl SyncState {
    /// Whether the record restricts who may lead.
    pub fn is_active(&self) -> bool {
        self.leader.is_some()
    }

    /// Whether `name` is the owner or a listed standby (case-insensitively).
    pub fn includes(&self, name: &MemberName) -> bool {
        self.leader.as_ref().is_some_and(|leader| name.matches(leader.as_str())) || self.lists(name)
    }

    /// Whether `name` is a listed standby (case-insensitively).
    pub fn lists(&self, name: &MemberName) -> bool {
        self.is_active() && self.standbys.iter().any(|standby| name.matches(standby))
    }
}

/// The `status` key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// The leader's last WAL position.
    pub optime: Lsn,
    /// Positions of replication slots on the leader.
    pub slots: Option<BTreeMap<String, Lsn>>,
    /// Slots of members that were here lately.
    pub retain_slots: Option<Vec<String>>,
}

/// A line of the `history` key: a finished timeline and who began the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryLine {
    /// The timeline that ended.
    pub timeline: TimelineId,
    /// Where it ended.
    pub switchpoint: Lsn,
    /// PostgreSQL's words.
    pub reason: String,
    /// When the next one began, as written.
    pub promoted_at: Option<String>,
    /// Who began it.
    pub new_leader: Option<String>,
}

impl ClusterView {
    /// The `history` key's switches, without its extra fields.
    pub fn switches(&self) -> History {
        let switch = |line: &HistoryLine| crate::timeline::Switch {
            timeline: line.timeline,
            switchpoint: line.switchpoint,
            reason: line.reason.clone(),
        };
        History(self.history.iter().map(switch).collect())
    }
}

/// Host and port of a `postgres://` URL; the port defaults to 5432, brackets of IPv6 are removed.
pub fn host_port(url: &str) -> Option<(String, u16)> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next()?;
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        _ => (authority, 5432),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| (host.to_owned(), port))
}
