//! What a decision is made on: one view, one look at PostgreSQL, what this node remembers, and what the peers said.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use trunkline_common::cluster::LeaderKey;
use trunkline_common::dcs::store::SyncWrite;
use trunkline_common::{ClusterView, Instant, LeaseId, Lsn, Member, MemberName, Revision, SystemId, TimelineId};
use trunkline_config::tags;

use crate::peer::PeerStatus;
use crate::postgres::{ControlData, ControlState, PgRole, PgStatus, Running, Upstream};

/// The answers of the members that were asked: `None` for one that did not answer.
pub type PeerAnswers = BTreeMap<MemberName, Option<PeerStatus>>;

/// Everything that `decide` may look at.
#[derive(Debug, Clone)]
pub struct Situation<'a> {
    /// Now.
    pub now: Instant,
    /// The wall clock, for scheduled requests only.
    pub wall: DateTime<Utc>,
    /// This node's own configuration.
    pub me: &'a Me,
    /// The cluster; `None` until the DCS has been read once.
    pub view: Option<&'a ClusterView>,
    /// Until when nobody else can lead: by the leader key, or by the members' word. `None`: not the leader.
    pub leader_until: Option<Instant>,
    /// Until when the leader key is certainly ours.
    pub key_until: Option<Instant>,
    /// Until when the other members have promised not to lead (failsafe mode), whatever has become of the key.
    pub promised_until: Option<Instant>,
    /// Until when the lease of this process certainly lives, or did; `None`: it has none.
    pub lease_until: Option<Instant>,
    /// How long a lease lasts: the setting, or what ours was granted with while that is shorter (the setting has just grown).
    pub ttl: Duration,
    /// The DCS does not answer at the moment.
    pub dcs_away: bool,
    /// PostgreSQL as observed.
    pub pg: &'a PgStatus,
    /// What happened before.
    pub memory: &'a Memory,
    /// What the peers said, once a decision asked for it.
    pub peers: Option<&'a PeerAnswers>,
}

/// What the last decision was made on, beside the cluster and the server: whoever looks at those anew can decide again.
#[derive(Debug, Clone, PartialEq)]
pub struct Ground {
    /// This node's own configuration.
    pub me: Me,
    /// What it remembers.
    pub memory: Memory,
    /// The cluster as it was seen.
    pub view: Option<Arc<ClusterView>>,
    /// See [`Situation::lease_until`].
    pub lease_until: Option<Instant>,
    /// See [`Situation::ttl`].
    pub ttl: Duration,
    /// See [`Situation::dcs_away`].
    pub dcs_away: bool,
}

impl Ground {
    /// The situation of a node that does not lead.
    pub fn situation<'a>(
        &'a self,
        now: Instant,
        wall: DateTime<Utc>,
        view: Option<&'a ClusterView>,
        pg: &'a PgStatus,
        peers: Option<&'a PeerAnswers>,
    ) -> Situation<'a> {
        Situation {
            now,
            wall,
            me: &self.me,
            view,
            leader_until: None,
            key_until: None,
            promised_until: None,
            lease_until: self.lease_until,
            ttl: self.ttl,
            dcs_away: self.dcs_away,
            pg,
            memory: &self.memory,
            peers,
        }
    }
}

/// The parts of this node's configuration that decisions depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct Me {
    /// The member's name.
    pub name: MemberName,
    /// Its tags.
    pub tags: Map<String, Value>,
    /// It may initialise a new cluster (the file has a `bootstrap` section).
    pub may_bootstrap: bool,
    /// pg_rewind is allowed.
    pub use_pg_rewind: bool,
    /// Slots for members are used.
    pub use_slots: bool,
    /// A method makes replicas without a running server to copy from.
    pub restores_alone: bool,
    /// A diverged data directory may be replaced by a copy.
    pub reclone_diverged: bool,
    /// A data directory that could not be rewound may be replaced by a copy.
    pub reclone_unrewindable: bool,
}

impl Me {
    /// Effective failover priority; ≤ 0: never leader.
    pub fn failover_priority(&self) -> i64 {
        tags::failover_priority(&self.tags)
    }
}

/// What the loop remembers from turn to turn. Lost with the process, and decisions are safe without it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Memory {
    /// Whether the local history may differ from the leader's.
    pub divergence: DivergenceState,
    /// The server took writes when it was last seen running.
    pub was_primary: bool,
    /// The data directory belongs to a bootstrap that was not brought to its end.
    pub half_made: bool,
    /// It is down because this node demoted it.
    pub demoted: bool,
    /// How often it was told to promote itself and may do so yet: that can't be taken back.
    pub promotions: u32,
    /// What this node was last said to be while it ran as a standby: `replica` or `standby_leader`.
    pub standby_role: Option<&'static str>,
    /// It is down because its data directory was made just now.
    pub fresh_copy: bool,
    /// Since when it should answer but doesn't (crashed, starting, silent).
    pub down_since: Option<Instant>,
    /// Since when it is a running standby that does not stream.
    pub dry_since: Option<Instant>,
    /// The leader that was seen last.
    pub former_leader: Option<MemberName>,
    /// Where the REST API of each member is that was ever seen, also of those that are gone from the DCS.
    pub apis: BTreeMap<MemberName, String>,
    /// Since when nobody leads, as far as this node has seen.
    pub leaderless_since: Option<Instant>,
    /// Our position, and since when it has been the same.
    pub position_since: Option<(Lsn, Instant)>,
    /// The failover request (by its revision) that is there without a leader, and since when: whoever is to fulfil it may
    /// turn out to be unable to.
    pub unfulfilled: Option<(Revision, Instant)>,
    /// How many times in a row it was looked at and did not answer at all.
    pub silent: u32,
    /// The primary's flushed position, and since when it has been the same while every look showed somebody who waited for the
    /// disk to take WAL.
    pub disk_silent: Option<(Lsn, Instant)>,
    /// When it was started last; `None` once something else was done to it.
    pub up_since: Option<Instant>,
    /// Attempts to start, clone or rewind that failed since the last success.
    pub failures: u32,
    /// No new attempt before this.
    pub retry_at: Option<Instant>,
    /// Why the last attempt failed.
    pub last_failure: Option<String>,
    /// This node gave the key back because it could not lead; it stays out of races until then.
    pub abstain_until: Option<Instant>,
    /// Why this node may not lead: a watchdog that is required does not work.
    pub must_not_lead: Option<String>,
    /// Position of the primary when each name of `synchronous_standby_names` came into force there.
    pub sync_since: BTreeMap<String, Lsn>,
    /// No write of the `sync` key is left that could still be carried out: the last one of this agent was. Not so before the
    /// first one, as an earlier agent may have left one unanswered.
    pub sync_settled: bool,
    /// What makes the `sync` key say again what it said before this node, a standby, took the leader key, as long as no promotion
    /// was begun: whoever had every commit then still has.
    pub sync_before: Option<SyncWrite>,
    /// When the loop began: how long it may look for the key of a primary that it found running.
    pub started_at: Instant,
    /// The settings that were known to an agent before this one say `pause`.
    pub paused_before: bool,
    /// Our word to a leader that lost the DCS.
    pub promise: Option<Promise>,
    /// Until when an agent before this one has given it.
    pub promised_before: Option<Instant>,
    /// The `failsafe` key as we have tried to write it.
    pub failsafe_attempt: Option<FailsafeAttempt>,
    /// The members were asked for their word in vain.
    pub failsafe_refused: Option<Refusal>,
    /// The leader key (by its creation) that was won by comparing positions with the others.
    pub elected: Option<Revision>,
    /// The leader key (by its creation) that bears this node's name, and when that was seen first.
    pub key_held: Option<(Revision, Instant)>,
    /// Positions that members told this leader while the DCS was away.
    pub heard: BTreeMap<MemberName, Lsn>,
    /// Revision at which the leader key was found or made ours: an older view says nothing about what we hold.
    pub leading_since: Revision,
    /// The revision at which this node claimed the number of a timeline; 0 where it has claimed none. What the `timeline` key says at
    /// another one is not ours to begin.
    pub claimed_at: Revision,
    /// The timeline of another member, later than any that the DCS knew of, as it was heard when this node had the leader key:
    /// somebody was promoted since.
    pub overtaken_by: Option<TimelineId>,
    /// The DCS has gone back to an earlier state: until then somebody may lead by what it has forgotten.
    pub forgotten_until: Option<Instant>,
}

impl Memory {
    /// The DCS has gone back to an earlier state, and counts its revisions from there: nothing that was concluded from those
    /// of before means anything now. Whoever led by what it has forgotten does so no longer than `until`.
    pub fn start_over(&mut self, until: Instant) {
        self.forgotten_until = self.forgotten_until.max(Some(until));
        (self.leading_since, self.claimed_at) = (Revision(0), Revision(0));
        self.sync_settled = false;
        (self.elected, self.key_held, self.unfulfilled) = (None, None, None);
        (self.sync_before, self.failsafe_attempt) = (None, None);
    }
}

/// Our word to a leader that lost the DCS: not to lead for so long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    /// Whom it was given to.
    pub leader: MemberName,
    /// Until when it holds.
    pub until: Instant,
    /// Where its PostgreSQL is.
    pub conn_url: Option<String>,
    /// Where its REST API is.
    pub api_url: Option<String>,
    /// Where its replication slots are.
    pub slots: BTreeMap<String, Lsn>,
}

/// Lists for the `failsafe` key that were sent to the DCS: as long as the view does not show a newer one than was seen
/// then, any of them may be in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailsafeAttempt {
    /// The revision that they were to replace.
    pub seen: Revision,
    /// The members of all of them.
    pub members: BTreeMap<MemberName, String>,
    /// When the last one was sent.
    pub at: Instant,
}

/// Members that were asked to let this primary lead without the DCS have not given their word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// When they were first asked in vain since they gave it last, or since the lease was renewed.
    pub since: Instant,
    /// The same for the last time.
    pub at: Instant,
    /// Until when this node leads all the same: a refusal says nothing about another lease or word.
    pub until: Instant,
    /// Who did not give it.
    pub why: String,
}

/// Where the question "can this data directory follow the leader?" stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DivergenceState {
    /// No doubt.
    #[default]
    NotAsked,
    /// It must be answered before a stopped server follows anybody.
    Check,
    /// A standby did not start, and that may be why. Where nobody can answer it is started again.
    DidNotStart,
    /// It can't follow: rewind. The words name the positions compared.
    Rewind(String),
    /// pg_rewind failed; the words say why.
    RewindFailed(String),
}

impl Situation<'_> {
    /// Whether the leader key is ours with time left on its lease.
    pub fn leads(&self) -> bool {
        self.leader_until.is_some_and(|until| self.now < until)
    }

    /// Whether this process has a lease at all.
    pub fn has_lease(&self) -> bool {
        self.lease_until.is_some()
    }

    /// Whether the leader key is certainly ours.
    pub fn holds_key(&self) -> bool {
        self.key_until.is_some_and(|until| self.now < until)
    }

    /// Whether the other members have promised not to lead.
    pub fn has_word(&self) -> bool {
        self.promised_until.is_some_and(|until| self.now < until)
    }

    /// Our word that still counts. A server that takes writes has given none.
    pub fn promise(&self) -> Option<&Promise> {
        self.memory.promise.as_ref().filter(|promise| self.now < promise.until && !self.is_primary() && !self.leads())
    }

    /// An agent that has just started does not know for certain what the one before it has promised to a leader without DCS:
    /// what that could keep may be more than a ttl of now. Only who is on the failsafe key leads without DCS, and nobody takes it
    /// off there who has not waited for the promises to end.
    pub fn may_have_promised(&self, view: &ClusterView) -> bool {
        let others = view.failsafe.iter().flat_map(BTreeMap::keys).any(|name| *name != self.me.name);
        let young = self.now.since(self.memory.started_at) < view.settings.ttl;
        let kept = self.memory.promised_before.is_some_and(|until| self.now < until);
        !self.is_primary() && (kept || others && young)
    }

    /// Whether somebody may still lead by what the DCS knew before it went back to an earlier state. Whoever takes writes now
    /// is that one.
    pub fn may_be_led(&self) -> bool {
        !self.is_primary() && self.memory.forgotten_until.is_some_and(|until| self.now < until)
    }

    /// Who has to agree before this leader may go on without the DCS (this node not among them). `None`: it may not.
    pub fn failsafe_members(&self, view: &ClusterView) -> Option<BTreeMap<MemberName, String>> {
        let mut members = view.failsafe.clone().filter(|members| members.contains_key(&self.me.name))?;
        if !view.settings.failsafe_mode || view.revision < self.memory.leading_since {
            return None;
        }
        if let Some(attempt) = self.memory.failsafe_attempt.as_ref().filter(|a| view.failsafe_revision <= a.seen) {
            members.extend(attempt.members.clone());
        }
        members.remove(&self.me.name);
        Some(members)
    }

    /// The server's answer, if it runs.
    pub fn running(&self) -> Option<&Running> {
        match self.pg {
            PgStatus::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Whether the server takes writes, as far as anybody can tell: one that does not answer, or only with an error, goes on with the
    /// sessions that it has.
    pub fn may_take_writes(&self) -> bool {
        let silent = matches!(self.pg, PgStatus::Starting | PgStatus::Unresponsive | PgStatus::Refusing(_));
        self.is_primary() || silent && self.memory.was_primary && !self.memory.demoted
    }

    /// Whether the server takes writes.
    pub fn is_primary(&self) -> bool {
        self.running().is_some_and(|running| running.role == PgRole::Primary)
    }

    /// Own WAL position; 0 where it is not known.
    pub fn lsn(&self) -> Lsn {
        self.running().map_or(Lsn::INVALID, |running| running.lsn)
    }

    /// The timeline of a running server, where it is known.
    pub fn timeline(&self) -> Option<TimelineId> {
        self.running()?.timeline
    }

    /// The members' refusal, if it is about the lease or word by which this node leads now.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.memory.failsafe_refused.as_ref().filter(|refusal| Some(refusal.until) == self.leader_until)
    }

    /// Identity of the local data.
    pub fn system_id(&self) -> Option<SystemId> {
        self.pg.system_id()
    }

    /// Whether divergence can be mended at all: if not, nobody asks for it (ha-loop §11.1).
    pub fn may_rewind(&self) -> bool {
        self.me.use_pg_rewind || self.me.reclone_diverged
    }

    /// Whether something failed so lately that it must not be tried again yet.
    pub fn backing_off(&self) -> bool {
        self.memory.retry_at.is_some_and(|at| self.now < at)
    }

    /// How long it has been a running standby that does not stream.
    pub fn dry_for(&self) -> Duration {
        self.memory.dry_since.map_or(Duration::ZERO, |since| self.now.since(since))
    }

    /// How long the server has been down or silent.
    pub fn down_for(&self) -> Duration {
        self.memory.down_since.map_or(Duration::ZERO, |since| self.now.since(since))
    }
}

/// The server that this node should stream from (ha-loop §10): its `replicatefrom` if that member runs, else the
/// leader; nobody with `nostream`. Where `replicatefrom` leads round in a circle, its members follow the leader.
pub fn upstream(me: &Me, view: &ClusterView) -> Option<Upstream> {
    if me.tags.get("nostream").is_some_and(tags::truthy) {
        return None;
    }
    let serves = |name: &MemberName| view.members.get(name).is_some_and(Member::is_running);
    let preferred = replicates_from(view, &me.name, &me.tags).filter(serves);
    at(me, view, preferred.or_else(|| view.leader.as_ref().map(|leader| leader.name.clone()))?)
}

/// Whom the tag `replicatefrom` of the node `name` names: nobody where that is itself, or where the way from one to the
/// next leads back to it without meeting the leader, as nothing new would ever come round.
pub fn replicates_from(view: &ClusterView, name: &MemberName, tags: &Map<String, Value>) -> Option<MemberName> {
    let named = |tags: &Map<String, Value>| tags.get("replicatefrom")?.as_str().map(MemberName::from);
    let next = |at: &MemberName| named(&view.members.get(at).filter(|_| !view.is_leader(at))?.tags);
    let first = named(tags)?;
    let mut way = std::iter::successors(Some(first.clone()), next).take(view.members.len() + 1);
    (!way.any(|at| at == *name)).then_some(first)
}

/// The leader as a source of clones, divergence checks and rewinds.
pub fn leader_upstream(me: &Me, view: &ClusterView) -> Option<Upstream> {
    at(me, view, view.leader.as_ref()?.name.clone())
}

/// The server outside that a standby cluster follows; `None`: it is followed by its archive alone.
pub fn remote(view: &ClusterView) -> Option<Upstream> {
    let section = view.settings.standby_cluster.as_ref()?;
    let text = |key: &str| match section.get(key)? {
        Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let (host, port) = (text("host"), text("port"));
    if host.is_none() && port.is_none() {
        return None;
    }
    Some(Upstream {
        name: MemberName::from("the server outside"),
        host: host.unwrap_or_else(|| "localhost".to_owned()),
        port: port.and_then(|port| port.parse().ok()).unwrap_or(5432),
        // PostgreSQL would refuse any other, and the server never follow as it should.
        slot: text("primary_slot_name").filter(|slot| MemberName::from(slot.as_str()).slot_name() == *slot),
    })
}

/// Where to make a copy from (ha-loop §5): a running replica tagged `clonefrom`, else the leader.
pub fn clone_source(me: &Me, view: &ClusterView) -> Option<Upstream> {
    let leader = &view.leader.as_ref()?.name;
    let willing = |(name, member): &(&MemberName, &Member)| {
        *name != leader && **name != me.name && member.is_running() && member.tag_is_true("clonefrom")
    };
    let replica = view.members.iter().find(willing).map(|(name, _)| name.clone());
    at(me, view, replica.unwrap_or_else(|| leader.clone()))
}

/// The cluster as a node has to see it that has given its word: led by whom it gave it to, although the key is gone. `None`
/// where there is no such word, or somebody else leads.
pub fn as_promised(s: &Situation, view: &ClusterView) -> Option<ClusterView> {
    let promise = s.promise()?;
    if view.leader.is_some() && !view.is_leader(&s.me.name) {
        return None;
    }
    by_promise(promise, &s.me.name, view)
}

/// The same for a promise that still counts; also where its leader's key is still seen.
pub fn by_promise(promise: &Promise, me: &MemberName, view: &ClusterView) -> Option<ClusterView> {
    if view.leader.as_ref().is_some_and(|leader| leader.name != promise.leader && leader.name != *me) {
        return None;
    }
    let mut view = view.clone();
    view.leader = Some(LeaderKey {
        name: promise.leader.clone(),
        lease: LeaseId(0),
        created: Revision(0),
        modified: Revision(0),
    });
    let member = view.members.entry(promise.leader.clone()).or_insert_with(|| Member {
        conn_url: promise.conn_url.clone(),
        api_url: promise.api_url.clone(),
        ..Member::default()
    });
    (member.role, member.state) = ("primary".to_owned(), "running".to_owned());
    if !promise.slots.is_empty() {
        view.status.slots = Some(promise.slots.clone());
    }
    Some(view)
}

fn at(me: &Me, view: &ClusterView, name: MemberName) -> Option<Upstream> {
    if name == me.name {
        return None;
    }
    let (host, port) = view.members.get(&name)?.host_port()?;
    Some(Upstream { name, host, port, slot: me.use_slots.then(|| me.name.slot_name()) })
}

/// Whether pg_control is that of a server that stopped or crashed while it took writes.
pub fn stopped_as_primary(control: &ControlData) -> bool {
    let primary_state = matches!(
        control.state,
        ControlState::InProduction
            | ControlState::InCrashRecovery
            | ControlState::ShuttingDown
            | ControlState::ShutDown
    );
    primary_state && !control.standby
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use trunkline_common::Member;

    use super::*;

    /// Leader `a`; `b` and `c` name each other; `d` hangs below them; `e` names itself; `f` names the leader, which names
    /// `f`; `g` nobody that is there.
    fn view() -> ClusterView {
        let tags = [("a", "f"), ("b", "c"), ("c", "b"), ("d", "c"), ("e", "e"), ("f", "a"), ("g", "x")];
        let member = |(name, from): (&str, &str)| {
            let tags = json!({ "replicatefrom": from }).as_object().unwrap().clone();
            (MemberName::from(name), Member { tags, ..Member::default() })
        };
        let leader = LeaderKey { name: "a".into(), lease: LeaseId(1), created: Revision(1), modified: Revision(1) };
        ClusterView { members: tags.map(member).into(), leader: Some(leader), ..ClusterView::default() }
    }

    #[test]
    fn a_circle_of_replicatefrom_is_followed_by_nobody() {
        let view = view();
        let from = |name: &str| {
            let name = MemberName::from(name);
            replicates_from(&view, &name, &view.members[&name].tags).map(|from| from.0)
        };
        assert_eq!([from("b"), from("c"), from("e")], [None, None, None]);
        assert_eq!(from("d").as_deref(), Some("c"), "the circle is not its own");
        assert_eq!((from("f").as_deref(), from("g").as_deref()), (Some("a"), Some("x")));
    }
}
