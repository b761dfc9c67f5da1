//! Who leads, and what this node does about it: the one place where it is decided. Pure.
//!
//! `decide` looks at one [`Situation`] and names one [`Decision`] with its reason. No clock, no I/O, no log: the loop in
//! `ha` observes before it and acts after it, and the same words go to log, status and metric.

mod follower;
mod leader;
mod leaderless;
pub mod restart;
mod standby;

pub use self::follower::DRY;
pub use self::leader::trusted_until;

use std::collections::BTreeMap;
use std::time::Duration;

use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::store::SyncWrite;
use trunkline_common::{ClusterView, MemberName, SystemId};
use trunkline_config::dynamic::SynchronousMode;

use super::situation::{Situation, as_promised};
use crate::postgres::{PgStatus, Running, StartAs, Upstream};

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
    /// Let the standby replay on.
    ResumeReplay,
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
            Action::ResumeReplay => "resume_replay",
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
    decide(&Situation { view: Some(&view), leader_until: None, promised_until: None, key_until: None, ..s.clone() })
}

fn decide_on(s: &Situation, view: &ClusterView) -> Decision {
    if let Some(decision) = half_made(s, view).or_else(|| foreign_data(s, view)) {
        return decision;
    }
    if s.leads() && s.holds_key() && !view.is_leader(&s.me.name) {
        return is(Action::Confirm, "the view does not show the leader key that this node holds");
    }
    if s.leads() && view.is_leader(&s.me.name) {
        return leader::decide(s, view);
    }
    if s.leads() && s.may_take_writes() && view.leader.is_none() {
        return leader::by_word(s, view);
    }
    if view.is_leader(&s.me.name) {
        return leader::named(s, view);
    }
    if view.leader.is_some() {
        return follower::decide(s, view);
    }
    leaderless::decide(s, view)
}

/// How long an agent that has just started may look for the key of a primary that it found running. Its predecessor's
/// lease may be over, so this is not a matter of settings.
const FIRST_PROOF: Duration = Duration::from_secs(2);

/// The DCS has never been read by this process. A primary found running may be somebody's deposed leader: it gets as
/// long as one attempt at the DCS takes, then it steps down. Not in a pause, in which the agent before would have left it alone.
fn without_view(s: &Situation) -> Decision {
    if s.memory.paused_before {
        return is(Action::Wait, "waiting for the DCS (paused when it was last read)");
    }
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
    Some(match view.settings.pause {
        false => is(Action::Exit, reason),
        // In the way of whoever has the cluster's data. One that takes writes keeps it until it is down.
        true if s.leads() && view.is_leader(&s.me.name) && !s.is_primary() => is(Action::Release, reason),
        true => is(Action::Wait, reason),
    })
}

/// From 14 on PostgreSQL pauses replay where a setting is too small for what the primary says (`max_connections` …). Shown as
/// streaming, it would stay behind for ever, and can't be promoted. Resumed it ends, and the next start has what it takes.
fn resume_replay(s: &Situation, view: &ClusterView) -> Option<Decision> {
    let paused = |running: &Running| running.replay_paused && running.server_version >= 140_000;
    let resumes = s.running().is_some_and(paused) && !view.settings.pause;
    resumes.then(|| is(Action::ResumeReplay, "replay is paused; resuming it"))
}

const MAY_HAVE_PROMISED: &str =
    "started just now; the agent before may have promised a leader without DCS (failsafe mode) not to lead yet";

const MAY_BE_LED: &str =
    "the DCS has gone back to an earlier state; somebody may lead for a ttl yet by what it has forgotten";

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
