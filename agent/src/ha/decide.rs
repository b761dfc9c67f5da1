//! Who leads, and what this node does about it: the one place where it is decided. Pure.
//!
//! `decide` looks at one [`Situation`] and names one [`Decision`] with its reason. No clock, no I/O, no log: the loop in
//! `ha` observes before it and acts after it, and the same words go to log, status and metric.

mod standby;

use std::collections::BTreeMap;
use std::time::Duration;

use trunkline_common::cluster::{FailoverRequest, Initialize, Member};
use trunkline_common::dcs::store::SyncWrite;
use trunkline_common::{ClusterView, MemberName, SystemId};
use trunkline_config::dynamic::SynchronousMode;

use super::election::{self, Takeover, Verdict};
use super::situation::{
    DivergenceState, Situation, as_promised, clone_source, leader_upstream, remote, stopped_as_primary, upstream,
};
use super::sync;
use crate::postgres::{ControlData, PgRole, PgStatus, StartAs, Upstream};

/// What to do, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The action.
    pub action: Action,
    /// The reason, with the numbers compared; goes to log and status.
    pub reason: String,
}

/// One step. Whatever takes longer than a query or a transaction runs as a task beside the loop.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Nothing to do but to publish this node's state.
    Wait,
    /// Nobody leads, and this node leaves it to others.
    Abstain,
    /// Ask these members how they are, and decide again.
    Ask(BTreeMap<MemberName, String>),
    /// Lead on: keep status, slots, history and the synchronous set up to date.
    Lead,
    /// Prove that the leader key, ours by name, is ours by lease.
    Confirm,
    /// Ask all of these members for their word that this primary may go on without the DCS.
    Failsafe(BTreeMap<MemberName, String>),
    /// Try to create the leader key; `sync` goes into the same transaction.
    Acquire(Option<SyncWrite>),
    /// Promote the standby, the key being ours. `sync` has to be written first.
    Promote(Option<SyncWrite>),
    /// Give up the key: nothing here can write.
    Release,
    /// Let the key run out: nothing here can write, and the DCS can't be told.
    Resign,
    /// Step down in order, for a requested switchover: stop, hand the key over, follow.
    HandOver,
    /// Stop at once and come back as a standby.
    Demote(DemoteMode),
    /// Stop in order and come back as the leader of a standby cluster, the key being kept.
    DemoteCluster,
    /// Copy the data directory of a server outside, which a standby cluster follows.
    CloneRemote(Option<Upstream>),
    /// Forget a failover request that can't be carried out.
    ClearFailover,
    /// Win or lose the right to initialise the cluster, and do it.
    Bootstrap,
    /// Copy a data directory.
    Clone(Upstream),
    /// Make a data directory by a method that needs no running server to copy from.
    RestoreReplica,
    /// Start the stopped server.
    Start(StartAs),
    /// Let the running standby follow another server.
    Follow(Option<Upstream>),
    /// Find out whether the local history is a prefix of the leader's.
    CheckDivergence(Upstream),
    /// Stop if need be, and pg_rewind.
    Rewind(Upstream),
    /// Replace the diverged data directory by a copy.
    Reclone(Upstream),
    /// Move half a cluster, with this identity as far as it has one, aside.
    Discard(Option<SystemId>),
    /// End the agent: going on would do harm, and only a person can tell what is right.
    Exit,
}

/// How a primary stops being one when it can't be done in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoteMode {
    /// The key is ours no longer: not another write, stop at once.
    LostKey,
    /// The DCS does not answer and the lease runs out: sessions end in order while there is time.
    Offline,
    /// The server here is sick, somebody else can lead: stop at once, then give up the key.
    Sick,
}

impl Action {
    /// A name for metrics and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Action::Wait => "wait",
            Action::Abstain => "abstain",
            Action::Ask(_) => "ask",
            Action::Lead => "lead",
            Action::Confirm => "confirm",
            Action::Failsafe(_) => "failsafe",
            Action::Acquire(_) => "acquire",
            Action::Promote(_) => "promote",
            Action::Release => "release",
            Action::Resign => "resign",
            Action::HandOver => "hand_over",
            Action::Demote(_) => "demote",
            Action::DemoteCluster => "demote_cluster",
            Action::CloneRemote(_) => "clone_remote",
            Action::ClearFailover => "clear_failover",
            Action::Bootstrap => "bootstrap",
            Action::Clone(_) => "clone",
            Action::RestoreReplica => "restore_replica",
            Action::Start(_) => "start",
            Action::Follow(_) => "follow",
            Action::CheckDivergence(_) => "check_divergence",
            Action::Rewind(_) => "rewind",
            Action::Reclone(_) => "reclone",
            Action::Discard(_) => "discard",
            Action::Exit => "exit",
        }
    }
}

fn is(action: Action, reason: impl Into<String>) -> Decision {
    Decision { action, reason: reason.into() }
}

/// How long before the end of its lease a primary that can't renew begins to step down: early enough for a fast stop,
/// late enough to outlive an election of the DCS's own leader (up to 3 s with etcd's default timers, at ttl 5).
pub fn step_down_margin(ttl: Duration) -> Duration {
    (ttl / 5).clamp(Duration::from_millis(600), Duration::from_secs(5))
}

/// With how much time left a primary that can't renew asks the members for their word (failsafe mode): early enough to ask
/// more than once on a busy machine. `away`: a renewal has failed; otherwise it is only late.
pub fn failsafe_margin(ttl: Duration, away: bool) -> Duration {
    if away { ttl * 4 / 5 } else { ttl * 3 / 5 }
}

/// Pause after asking the members in vain.
pub const FAILSAFE_PAUSE: Duration = Duration::from_millis(250);

/// Decides.
pub fn decide(s: &Situation) -> Decision {
    let Some(view) = s.view else {
        return without_view(s);
    };
    let Some(promised) = as_promised(s, view) else { return decide_on(s, view) };
    let decision = decide_on(s, &promised);
    Decision { reason: decision.reason + " (by failsafe mode, without the leader key)", ..decision }
}

/// What this node would decide if nobody led and everything else were as it is: its verdict on itself as a successor.
pub fn without_leader(s: &Situation) -> Decision {
    let Some(leader) = s.view.and_then(|view| view.leader.as_ref()).filter(|leader| leader.name != s.me.name) else {
        return decide(s);
    };
    let mut view = s.view.cloned().unwrap_or_default();
    view.members.remove(&leader.name);
    view.leader = None;
    view.failover = None;
    decide(&Situation { view: Some(&view), leader_until: None, promised_until: None, holds_key: false, ..s.clone() })
}

fn decide_on(s: &Situation, view: &ClusterView) -> Decision {
    if let Some(decision) = half_made(s, view).or_else(|| foreign_data(s, view)) {
        return decision;
    }
    if s.leads() && s.holds_key && !view.is_leader(&s.me.name) {
        return is(Action::Confirm, "the view does not show the leader key that this node holds");
    }
    if s.leads() && view.is_leader(&s.me.name) {
        return leader(s, view);
    }
    if s.leads() && s.is_primary() && view.leader.is_none() {
        return by_word(s, view);
    }
    if view.is_leader(&s.me.name) {
        return named_leader(s, view);
    }
    if view.leader.is_some() {
        return follower(s, view);
    }
    leaderless(s, view)
}

/// How long an agent that has just started may look for the key of a primary that it found running. Its predecessor's
/// lease may be over, so this is not a matter of settings.
const FIRST_PROOF: Duration = Duration::from_secs(2);

/// The DCS has never been read by this process. A primary found running may be somebody's deposed leader: it gets as
/// long as one attempt at the DCS takes, then it steps down.
fn without_view(s: &Situation) -> Decision {
    if s.is_primary() && s.now.since(s.memory.started_at) > FIRST_PROOF {
        return is(
            Action::Demote(DemoteMode::LostKey),
            "the DCS can't be read, so this primary can't know that it leads",
        );
    }
    is(Action::Wait, "waiting for the DCS")
}

/// What the bootstrap of an agent before has left: nobody knows it, it may lack users and settings, and another one is
/// made as soon as the right to make one is free. Neither may it lead, nor is it in the way.
fn half_made(s: &Situation, view: &ClusterView) -> Option<Decision> {
    if !s.memory.half_made || s.leads() || view.is_leader(&s.me.name) || s.dcs_away {
        return None;
    }
    let what = "the bootstrap of an earlier agent was cut off";
    Some(match s.pg {
        PgStatus::NoData => return None,
        _ if view.settings.pause => is(Action::Wait, format!("paused: {what}")),
        // It may be the earlier agent's, whose last request may still be on its way.
        PgStatus::Stopped(_) | PgStatus::Broken(_) if view.initialize == Initialize::Running => {
            is(Action::Wait, format!("{what}; waiting for the initialize key"))
        }
        PgStatus::Stopped(_) | PgStatus::Broken(_) if s.backing_off() => is(Action::Wait, failed_lately(s, what)),
        PgStatus::Stopped(_) | PgStatus::Broken(_) => {
            is(Action::Discard(s.system_id()), format!("{what}; moving its data directory aside"))
        }
        _ => is(Action::Demote(DemoteMode::LostKey), format!("{what}; stopping its server")),
    })
}

/// Data of another cluster must neither lead nor follow here (ha-loop §2 row 11).
fn foreign_data(s: &Situation, view: &ClusterView) -> Option<Decision> {
    let (Initialize::Done(cluster), Some(own)) = (&view.initialize, s.system_id()) else {
        return None;
    };
    if *cluster == own {
        return None;
    }
    let reason = format!("system identifier {own} of the data directory is not that of the cluster, {cluster}");
    Some(if view.settings.pause { is(Action::Wait, reason) } else { is(Action::Exit, reason) })
}

/// A primary whose lease nears its end without a renewal: asks for the members' word, or steps down in time.
fn hold_out(s: &Situation, view: &ClusterView) -> Option<Decision> {
    let settings = &view.settings;
    let left = s.leader_until.map_or(Duration::ZERO, |until| until.since(s.now));
    if !s.is_primary() || settings.pause || left >= failsafe_margin(s.ttl, s.dcs_away) {
        return None;
    }
    let refused = s.memory.failsafe_refused.as_ref();
    if left < step_down_margin(s.ttl) {
        let word = match (settings.failsafe_mode, refused) {
            (false, _) => String::new(),
            (true, Some((_, who))) => format!("; failsafe mode: {who}"),
            (true, None) => "; failsafe mode: this node is not in the failsafe key as last seen".to_owned(),
        };
        let reason = format!("the lease could not be renewed and ends in {left:.1?}{word}");
        return Some(is(Action::Demote(DemoteMode::Offline), reason));
    }
    let members = s.failsafe_members(view)?;
    match refused {
        Some((at, who)) if s.now.since(*at) < FAILSAFE_PAUSE => Some(is(Action::Lead, format!("failsafe mode: {who}"))),
        _ => Some(is(Action::Failsafe(members), GOING_ON)),
    }
}

/// Patroni's words.
const GOING_ON: &str = "continue to run as a leader because failsafe mode is enabled and all members are accessible";

/// This primary leads by the members' word, and the leader key is gone: taken again as soon as the DCS answers.
fn by_word(s: &Situation, view: &ClusterView) -> Decision {
    if let Some(decision) = hold_out(s, view) {
        return decision;
    }
    if !s.has_lease || s.dcs_away {
        return is(Action::Lead, GOING_ON);
    }
    race(s, view)
}

/// The key is ours and its lease has time left, or the members have given their word.
fn leader(s: &Situation, view: &ClusterView) -> Decision {
    let settings = &view.settings;
    if let Some(decision) = hold_out(s, view) {
        return decision;
    }
    if !s.holds_key && s.has_lease && !s.dcs_away {
        return is(Action::Confirm, "led by failsafe mode while the DCS was away");
    }
    if settings.standby_cluster.is_some() {
        return standby::leader(s, view);
    }
    if let Some(why) = s.memory.must_not_lead.as_ref().filter(|_| !settings.pause) {
        let reason = format!("the watchdog is required and does not work: {why}");
        return match s.pg {
            PgStatus::Stopping => is(Action::Wait, reason),
            PgStatus::NoData | PgStatus::Broken(_) | PgStatus::Stopped(_) => is(Action::Release, reason),
            PgStatus::Running(running) if running.role == PgRole::Standby => is(Action::Release, reason),
            _ => is(Action::Demote(DemoteMode::Sick), reason),
        };
    }
    match s.pg {
        PgStatus::NoData => is(Action::Release, "the data directory is empty"),
        PgStatus::Broken(why) => is(Action::Release, format!("the data directory can't be used: {why}")),
        PgStatus::Stopping => is(Action::Wait, "PostgreSQL is stopping"),
        PgStatus::Stopped(_) if settings.pause => is(Action::Release, "paused, and PostgreSQL is down"),
        PgStatus::Stopped(control) => recover_leader(s, view, control),
        PgStatus::Starting => sick_leader(s, view, "PostgreSQL is starting"),
        PgStatus::Unresponsive => hung_leader(s, view),
        PgStatus::Refusing(why) if s.memory.was_primary => {
            is(Action::Lead, format!("PostgreSQL answers with an error: {why}"))
        }
        PgStatus::Refusing(why) => is(Action::Wait, format!("PostgreSQL answers with an error: {why}")),
        PgStatus::Running(running) if running.role == PgRole::Standby => {
            if settings.pause && view.failover.as_ref().is_none_or(|r| r.candidate.as_ref() != Some(&s.me.name)) {
                return is(Action::Release, "paused, and PostgreSQL runs as a standby");
            }
            promote(s, view)
        }
        PgStatus::Running(_) if !s.holds_key => is(Action::Lead, GOING_ON),
        PgStatus::Running(_) => match &view.failover {
            Some(request) => requested_handover(s, view, request),
            None => is(Action::Lead, format!("no action. I am ({}), the leader with the lock", s.me.name)),
        },
    }
}

/// How long after its start an agent takes into account that the one before it may have begun a promotion.
const INHERITED: Duration = Duration::from_secs(60);

/// A standby with the leader key. It was won by comparing positions, or it came some other way (an agent that died in
/// between, a request carried out after everybody had given it up): then what was true when it was sent may not be now.
fn promote(s: &Situation, view: &ClusterView) -> Decision {
    let won = view.leader.as_ref().is_some_and(|leader| s.memory.elected == Some(leader.created));
    let why = if won {
        "holding the leader key".to_owned()
    } else {
        match election::may_race(s, view) {
            Verdict::Ask(members) => {
                return is(Action::Ask(members), "the leader key is ours, but was not won just now");
            }
            Verdict::Race(why) => format!("the leader key is ours, and nobody is a better choice: {why}"),
            Verdict::Yield(why) if s.memory.up_since.is_none() && s.now.since(s.memory.started_at) < INHERITED => {
                let reason = format!("{why}; stopped first, an earlier agent may have begun to promote it");
                return is(Action::Demote(DemoteMode::Sick), reason);
            }
            Verdict::Yield(why) => {
                return is(Action::Release, format!("the leader key is ours, but was not won just now: {why}"));
            }
        }
    };
    is(Action::Promote(sync::on_promotion(view, &s.me.name)), why)
}

/// The leader's server is down: restart it in place, or let somebody else lead (`primary_start_timeout`).
fn recover_leader(s: &Situation, view: &ClusterView, control: &ControlData) -> Decision {
    let patience = view.settings.primary_start_timeout;
    if s.memory.abstain_until.is_some_and(|until| s.now < until) {
        return is(Action::Release, "PostgreSQL is down, and this node could not be promoted");
    }
    if s.memory.demoted || s.down_for() >= patience || s.memory.failures > 0 {
        match election::takeover(s, view, None, false) {
            Takeover::Ask(members) => return is(Action::Ask(members), "PostgreSQL is down"),
            Takeover::Possible(name) => {
                return is(Action::Release, format!("PostgreSQL is down, and {name} can take over"));
            }
            Takeover::Impossible(why) if s.backing_off() => {
                return is(Action::Wait, format!("PostgreSQL is down, and nobody can take over: {why}"));
            }
            Takeover::Impossible(_) => {}
        }
    }
    if s.backing_off() {
        return is(Action::Wait, failed_lately(s, "PostgreSQL did not start"));
    }
    if stopped_as_primary(control) {
        is(Action::Start(StartAs::Primary), "PostgreSQL is down; starting it again as primary, the leader key is ours")
    } else {
        is(Action::Start(StartAs::Standby(None)), "PostgreSQL is down; starting it, to be promoted")
    }
}

/// A server that lets nobody in is taken for hung after so many looks in a row and so much time (or `ttl`, if that is
/// longer): an overloaded machine gets a connection through now and then, and one is enough.
const HUNG: (u32, Duration) = (3, Duration::from_secs(10));

/// The leader's server takes no connection: stopped, or waiting for a disk. Sessions that it has may go on for ever.
fn hung_leader(s: &Situation, view: &ClusterView) -> Decision {
    let patience = HUNG.1.max(view.settings.ttl);
    let so_far = format!("PostgreSQL has not answered {} times, for {:.0?}", s.memory.silent, s.down_for());
    if s.memory.silent < HUNG.0 || s.down_for() < patience || view.settings.pause {
        return is(Action::Wait, format!("{so_far}; it is taken for hung after {} times and {patience:?}", HUNG.0));
    }
    give_way(s, view, &so_far)
}

/// The leader's server is there, but recovers from a crash.
fn sick_leader(s: &Situation, view: &ClusterView, what: &str) -> Decision {
    let patience = view.settings.primary_start_timeout.max(view.settings.ttl);
    if s.down_for() < patience || view.settings.pause {
        return is(Action::Wait, format!("{what}, for {:.0?}", s.down_for()));
    }
    give_way(s, view, what)
}

/// Kills a server that is of no use, if somebody else can lead.
fn give_way(s: &Situation, view: &ClusterView, what: &str) -> Decision {
    match election::takeover(s, view, None, false) {
        Takeover::Ask(members) => is(Action::Ask(members), what),
        Takeover::Possible(name) => is(Action::Demote(DemoteMode::Sick), format!("{what}, and {name} can take over")),
        Takeover::Impossible(why) => is(Action::Wait, format!("{what}, and nobody can take over: {why}")),
    }
}

/// A failover request seen by the running primary (ha-loop §9.2).
fn requested_handover(s: &Situation, view: &ClusterView, request: &FailoverRequest) -> Decision {
    let lead = |reason: String| is(Action::Lead, reason);
    if view.leader.as_ref().is_some_and(|key| view.failover_revision < key.created) {
        // Also where it was in vain, and the one that stepped down leads again: once asked is tried once.
        return is(Action::ClearFailover, "the request is older than this leadership");
    }
    if let Some(at) = request.scheduled_at {
        let late = (s.wall - at.to_utc()).to_std();
        match late {
            Err(_) => return lead(format!("a switchover is scheduled at {}", at.to_rfc3339())),
            Ok(_) if view.settings.pause => return lead("paused: a scheduled switchover is left alone".to_owned()),
            Ok(late) if late > view.settings.loop_wait.mul_f32(1.5).max(Duration::from_secs(5)) => {
                return is(Action::ClearFailover, format!("the scheduled switchover is {late:.0?} too old"));
            }
            Ok(_) => {}
        }
    }
    let candidate = request.candidate.as_ref();
    if let Some(other) = request.leader.as_ref().filter(|leader| **leader != s.me.name) {
        return is(Action::ClearFailover, format!("the request asks {other} to step down, which does not lead"));
    }
    if candidate == Some(&s.me.name) {
        return is(Action::ClearFailover, "the requested candidate leads already");
    }
    if candidate.is_none() && view.settings.pause {
        return is(Action::ClearFailover, "paused: a failover needs a candidate");
    }
    match election::takeover(s, view, candidate, request.leader.is_none()) {
        Takeover::Ask(members) => is(Action::Ask(members), "a failover was requested"),
        Takeover::Possible(name) => is(Action::HandOver, format!("a failover was requested, and {name} can take over")),
        Takeover::Impossible(why) => is(Action::ClearFailover, format!("nobody can take over: {why}")),
    }
}

/// How long a router without DCS may go on sending writes to whom it knew as primary (its `stale_after`, and a proof that
/// has just been given): a server that comes up as a standby sooner would be asked to take them.
const ROUTERS_TRUST: Duration = Duration::from_secs(7);

/// The key bears our name, but this process does not hold it: an agent restarted, or a lease was lost and found.
fn named_leader(s: &Situation, view: &ClusterView) -> Decision {
    match s.pg {
        PgStatus::NoData | PgStatus::Broken(_) => {
            is(Action::Release, "the leader key bears our name, but there is no data")
        }
        PgStatus::Stopped(_) if s.dcs_away && s.down_for() < ROUTERS_TRUST && !view.settings.pause => {
            is(Action::Wait, "the DCS does not answer; routers may still take this node for the primary")
        }
        PgStatus::Stopped(_) if s.dcs_away && !s.backing_off() && !view.settings.pause => {
            is(Action::Start(StartAs::Standby(None)), "the DCS does not answer; starting as a standby to serve reads")
        }
        PgStatus::Unresponsive | PgStatus::Stopping if s.memory.abstain_until.is_some_and(|until| s.now < until) => {
            is(Action::Wait, "PostgreSQL can't be killed; the leader key is left to run out")
        }
        _ if s.may_have_promised(view) => is(Action::Wait, MAY_HAVE_PROMISED),
        _ if s.has_lease && !s.dcs_away => is(Action::Confirm, "the leader key bears our name"),
        _ if s.is_primary()
            && !view.settings.pause
            && s.now.since(s.memory.started_at) > view.settings.retry_timeout.min(FIRST_PROOF) =>
        {
            is(Action::Demote(DemoteMode::LostKey), "the lease of the leader key could not be renewed")
        }
        _ => is(Action::Wait, "the leader key bears our name; waiting for a lease"),
    }
}

/// Somebody else leads.
fn follower(s: &Situation, view: &ClusterView) -> Decision {
    let leader = view.leader.as_ref().map_or("nobody", |leader| leader.name.as_str());
    match s.pg {
        PgStatus::NoData => clone(s, view, leader),
        PgStatus::Broken(why) => is(Action::Wait, format!("the data directory can't be used: {why}")),
        PgStatus::Starting | PgStatus::Unresponsive | PgStatus::Refusing(_)
            if s.memory.was_primary && !s.memory.demoted && !view.settings.pause =>
        {
            let reason =
                format!("{leader} holds the leader key, and the server here took writes before it fell silent");
            is(Action::Demote(DemoteMode::LostKey), reason)
        }
        PgStatus::Starting => is(Action::Wait, format!("PostgreSQL is starting; {leader} leads")),
        PgStatus::Stopping => is(Action::Wait, "PostgreSQL is stopping"),
        PgStatus::Unresponsive => is(Action::Wait, format!("PostgreSQL does not answer; {leader} leads")),
        PgStatus::Refusing(why) => {
            is(Action::Wait, format!("PostgreSQL answers with an error ({why}); {leader} leads"))
        }
        PgStatus::Running(running) if running.role == PgRole::Primary => {
            if view.settings.pause {
                return is(
                    Action::Wait,
                    format!("paused: continue to run as primary without the lock, {leader} leads"),
                );
            }
            is(Action::Demote(DemoteMode::LostKey), format!("demoting self because {leader} holds the leader key"))
        }
        PgStatus::Stopped(_) => rejoin(s, view, leader),
        PgStatus::Running(_) => follow(s, view, leader),
    }
}

/// Whether the leader's server can be copied.
fn serves_copies(member: &Member, view: &ClusterView) -> bool {
    let standby_leader = view.settings.standby_cluster.is_some() && member.role == "standby_leader";
    member.claims_primary() || standby_leader && member.is_running()
}

/// No data here: make a copy.
fn clone(s: &Situation, view: &ClusterView, leader: &str) -> Decision {
    if view.settings.pause {
        return is(Action::Wait, "paused: no data directory is created");
    }
    if s.backing_off() {
        return is(Action::Wait, failed_lately(s, "the copy failed"));
    }
    let ready = view.leader_member().is_some_and(|member| serves_copies(member, view));
    match clone_source(s.me, view) {
        Some(source) if ready => {
            is(Action::Clone(source.clone()), format!("no data here; copying from {}", source.name))
        }
        _ => is(Action::Wait, format!("no data here; waiting for {leader} to take connections")),
    }
}

/// The server is down and somebody else leads: find out whether it can follow, mend it if not, start it.
fn rejoin(s: &Situation, view: &ClusterView, leader: &str) -> Decision {
    let divergence = &s.memory.divergence;
    // In pause what somebody stopped stays stopped; what this node demoted, copied or rewound follows.
    let ours = s.memory.demoted || s.memory.fresh_copy || matches!(divergence, DivergenceState::Rewind(_));
    if view.settings.pause && !ours {
        return is(Action::Wait, "paused: PostgreSQL is not started");
    }
    if s.backing_off() {
        let compares = s.memory.failures == 0 && *divergence == DivergenceState::Check;
        let outside = remote(view).map_or("the archive".to_owned(), |remote| remote.name.0);
        let whose = if view.settings.standby_cluster.is_some() { outside.as_str() } else { leader };
        let reason = if compares { comparing(s, whose) } else { failed_lately(s, "PostgreSQL could not rejoin") };
        return is(Action::Wait, reason);
    }
    let start = |reason: String| is(Action::Start(StartAs::Standby(upstream(s.me, view))), reason);
    if *divergence == DivergenceState::NotAsked || !s.may_rewind() {
        return start(format!("PostgreSQL is down; starting it to follow {leader}"));
    }
    if view.settings.standby_cluster.is_some() {
        // What differs from the server outside differs from the leader as well.
        return match remote(view) {
            Some(remote) if s.down_for() <= view.settings.ttl => mend(s, view, remote, divergence),
            _ => start(format!("PostgreSQL is down; starting it to follow {leader}")),
        };
    }
    let ready = view.leader_member().is_some_and(|member| member.claims_primary());
    let Some(source) = leader_upstream(s.me, view).filter(|_| ready) else {
        return is(Action::Wait, format!("waiting for {leader} to be promoted before following it"));
    };
    mend(s, view, source, divergence)
}

/// One rung after the other of the ladder: ask, rewind, copy anew where a setting allows it, or say what a person can do.
fn mend(s: &Situation, view: &ClusterView, source: Upstream, divergence: &DivergenceState) -> Decision {
    let no_checkpoint = view.leader_member().is_some_and(|leader| leader.checkpoint_after_promote == Some(false));
    match divergence {
        DivergenceState::NotAsked | DivergenceState::Check => {
            let reason = comparing(s, source.name.as_str());
            is(Action::CheckDivergence(source), reason)
        }
        DivergenceState::Rewind(why) if s.me.use_pg_rewind && no_checkpoint => {
            is(Action::Wait, format!("{why}; waiting for the first checkpoint of {} before rewinding", source.name))
        }
        DivergenceState::Rewind(why) if s.me.use_pg_rewind => is(Action::Rewind(source), why.clone()),
        DivergenceState::Rewind(why) if s.me.reclone_diverged => is(Action::Reclone(source), why.clone()),
        DivergenceState::RewindFailed(why) if s.me.reclone_unrewindable || s.me.reclone_diverged => {
            is(Action::Reclone(source), format!("pg_rewind failed ({why}); copying anew"))
        }
        DivergenceState::Rewind(why) => is(Action::Wait, format!("{why}; neither pg_rewind nor a new copy is allowed")),
        DivergenceState::RewindFailed(why) => is(
            Action::Wait,
            format!(
                "pg_rewind failed ({why}); reinitialize this member, or set remove_data_directory_on_rewind_failure"
            ),
        ),
    }
}

/// A comparison that could not be made yet: the same words while it waits and when it is tried again, several times a second.
fn comparing(s: &Situation, whose: &str) -> String {
    format!("comparing the local history with that of {whose}{}", not_yet(s))
}

/// Why what is tried again and again has not come to a result.
fn not_yet(s: &Situation) -> String {
    match &s.memory.last_failure {
        Some(why) if s.memory.failures == 0 => format!(": {why}"),
        _ => String::new(),
    }
}

/// A running standby under somebody else's lead.
fn follow(s: &Situation, view: &ClusterView, leader: &str) -> Decision {
    let Some(running) = s.running() else {
        return is(Action::Wait, "PostgreSQL does not run");
    };
    let target = upstream(s.me, view);
    if target.is_none() && view.leader_member().is_none() {
        return is(Action::Wait, format!("the address of {leader} is not known"));
    }
    let address = target.as_ref().map(|upstream| format!("{}:{}", upstream.host, upstream.port));
    if address != running.upstream {
        return is(Action::Follow(target), format!("following {leader}"));
    }
    if let DivergenceState::Rewind(_) | DivergenceState::RewindFailed(_) = s.memory.divergence
        && let Some(source) = leader_upstream(s.me, view)
    {
        return mend(s, view, source, &s.memory.divergence);
    }
    let streaming = running.replication_state.as_deref() == Some("streaming");
    let promoted = view.leader_member().filter(|member| member.claims_primary());
    // On the same timeline, too: two promotions that knew nothing of each other have given it the same number.
    let dry = s.dry_for() >= s.ttl.max(DRY);
    let newer = promoted.is_some_and(|leader| leader.timeline > running.timeline);
    if !streaming
        && (newer || dry && promoted.is_some())
        && s.may_rewind()
        && let Some(source) = leader_upstream(s.me, view)
    {
        let why = if newer { format!("{leader} is on a newer timeline") } else { format!("for {:.0?}", s.dry_for()) };
        let reason = format!("not streaming, {why}{}", not_yet(s));
        return is(if s.backing_off() { Action::Wait } else { Action::CheckDivergence(source) }, reason);
    }
    is(Action::Wait, format!("no action. I am ({}), a secondary, and following a leader ({leader})", s.me.name))
}

/// A standby that does not stream for so long (or for ttl, if that is longer: then a leader that is gone would be known to be)
/// is compared with its leader.
const DRY: Duration = Duration::from_secs(10);

const MAY_HAVE_PROMISED: &str =
    "started just now; the agent before may have promised a leader without DCS (failsafe mode) not to lead for a ttl";

/// Nobody leads.
fn leaderless(s: &Situation, view: &ClusterView) -> Decision {
    match s.pg {
        PgStatus::NoData => return empty_and_leaderless(s, view),
        PgStatus::Broken(why) => return is(Action::Wait, format!("the data directory can't be used: {why}")),
        PgStatus::Stopped(_) => return start_leaderless(s, view),
        PgStatus::Starting => return is(Action::Wait, "PostgreSQL is starting; nobody leads"),
        PgStatus::Stopping => return is(Action::Wait, "PostgreSQL is stopping; nobody leads"),
        PgStatus::Unresponsive => return is(Action::Wait, "PostgreSQL does not answer; nobody leads"),
        PgStatus::Refusing(why) => {
            return is(Action::Wait, format!("PostgreSQL answers with an error ({why}); nobody leads"));
        }
        PgStatus::Running(_) if s.may_have_promised(view) => return is(Action::Wait, MAY_HAVE_PROMISED),
        PgStatus::Running(_) => {}
    }
    if !s.has_lease {
        return match s.is_primary()
            && !view.settings.pause
            && s.now.since(s.memory.started_at) > view.settings.retry_timeout.min(FIRST_PROOF)
        {
            true => is(Action::Demote(DemoteMode::LostKey), "this primary has no lease to lead with"),
            false => is(Action::Wait, "waiting for a lease"),
        };
    }
    race(s, view)
}

fn race(s: &Situation, view: &ClusterView) -> Decision {
    if let Some(why) = primary_is_active(s, view) {
        return is(Action::Abstain, why);
    }
    match election::may_race(s, view) {
        Verdict::Ask(members) => is(Action::Ask(members), "nobody leads"),
        Verdict::Race(why) => is(Action::Acquire(sync::on_promotion(view, &s.me.name)), why),
        Verdict::Yield(why) if s.is_primary() && !view.settings.pause => {
            is(Action::Demote(DemoteMode::LostKey), format!("primary without the leader key: {why}"))
        }
        Verdict::Yield(why) => is(Action::Abstain, why),
    }
}

/// `primary_race_backoff`: nobody holds the key, but WAL goes on arriving, so there is a primary that works and may only be
/// unable to reach the DCS. For the first `loop_wait` it is not known yet whether it does.
fn primary_is_active(s: &Situation, view: &ClusterView) -> Option<String> {
    let settings = &view.settings;
    let requested = view.failover.as_ref().is_some_and(|request| request.candidate.is_some());
    if settings.primary_race_backoff.is_zero() || settings.pause || settings.standby_cluster.is_some() || requested {
        return None;
    }
    let streams = s.running().is_some_and(|running| running.replication_state.as_deref() == Some("streaming"));
    let waited = s.now.since(s.memory.leaderless_since?);
    let left = settings.primary_race_backoff.checked_sub(waited).filter(|left| streams && !left.is_zero())?;
    let moved = s.memory.position_since.is_some_and(|(_, since)| s.now.since(since) < settings.loop_wait);
    let name = &s.me.name;
    (moved || waited < settings.loop_wait).then(|| {
        format!(
            "My ({name}) wal position moved since last heart beat loop, {} seconds until leader race",
            left.as_secs()
        )
    })
}

/// No data and no leader: initialise the cluster, if there is none yet.
fn empty_and_leaderless(s: &Situation, view: &ClusterView) -> Decision {
    match &view.initialize {
        Initialize::Absent if !s.me.may_bootstrap => {
            is(Action::Wait, "waiting for a leader to copy from (no bootstrap section in the configuration)")
        }
        Initialize::Absent if s.me.failover_priority() <= 0 => is(Action::Wait, "waiting for a leader (nofailover)"),
        Initialize::Absent if s.memory.must_not_lead.is_some() => {
            is(Action::Wait, "waiting for a leader (the watchdog is required and does not work)")
        }
        Initialize::Absent if view.settings.standby_cluster.is_some() && s.backing_off() => {
            is(Action::Wait, failed_lately(s, "the copy failed"))
        }
        // Whoever is first leads; that the others copy from outside as well does no harm.
        Initialize::Absent if view.settings.standby_cluster.is_some() => {
            is(Action::CloneRemote(remote(view)), "no data here; copying from outside, for a standby cluster")
        }
        Initialize::Absent if s.may_have_promised(view) => is(Action::Wait, MAY_HAVE_PROMISED),
        Initialize::Absent if !s.has_lease => is(Action::Wait, "waiting for a lease"),
        Initialize::Absent if s.backing_off() => is(Action::Wait, failed_lately(s, "the bootstrap failed")),
        Initialize::Absent => match has_data(s, view) {
            Some(name) => is(Action::Wait, format!("waiting for {name}, which has data, to lead")),
            None => is(Action::Bootstrap, "trying to bootstrap a new cluster"),
        },
        Initialize::Running => is(Action::Wait, "another member is bootstrapping the cluster"),
        _ if !s.me.restores_alone || view.settings.pause => is(Action::Wait, "waiting for a leader to copy from"),
        _ if s.backing_off() => is(Action::Wait, failed_lately(s, "the copy failed")),
        _ => is(Action::RestoreReplica, "no data here and nobody leads; restoring a replica without a leader"),
    }
}

/// Another member that has data: there is a cluster, though the DCS does not know it (any more).
fn has_data<'v>(s: &Situation, view: &'v ClusterView) -> Option<&'v MemberName> {
    let others = view.members.iter().filter(|(name, _)| **name != s.me.name);
    others.filter(|(_, member)| member.role != "uninitialized").map(|(name, _)| name).next()
}

/// The server is down and nobody leads: up as a standby first, so that positions can be compared.
fn start_leaderless(s: &Situation, view: &ClusterView) -> Decision {
    if view.settings.pause {
        return is(Action::Wait, "paused: PostgreSQL is not started, nobody leads");
    }
    if let DivergenceState::RewindFailed(why) = &s.memory.divergence {
        return is(
            Action::Wait,
            format!("pg_rewind failed ({why}), so this data directory is of no use; nobody leads"),
        );
    }
    if view.settings.standby_cluster.is_some() {
        return standby::come_back(s, view);
    }
    if s.backing_off() {
        return is(Action::Wait, failed_lately(s, "PostgreSQL did not start"));
    }
    if s.memory.abstain_until.is_some_and(|until| s.now < until) {
        // Crash recovery here would only take the machine away from whoever is being promoted.
        return is(Action::Wait, "PostgreSQL is down, and somebody else is about to lead");
    }
    is(Action::Start(StartAs::Standby(None)), "PostgreSQL is down and nobody leads; starting it as a standby")
}

fn failed_lately(s: &Situation, what: &str) -> String {
    let why = s.memory.last_failure.as_deref().unwrap_or("no reason known");
    format!("{what} ({} times so far): {why}", s.memory.failures)
}

/// Whether commits wait for standbys in this cluster.
pub fn synchronous(view: &ClusterView) -> bool {
    view.settings.synchronous_mode != SynchronousMode::Off && view.settings.standby_cluster.is_none()
}

#[cfg(test)]
mod tests;
