//! Somebody else leads: copy, rejoin, follow.

use std::time::Duration;

use trunkline_common::ClusterView;
use trunkline_common::cluster::Member;

use super::{Action, Decision, DemoteMode, failed_lately, is, resume_replay};
use crate::ha::situation::{DivergenceState, Situation, clone_source, leader_upstream, remote, upstream};
use crate::postgres::{PgRole, PgStatus, StartAs, Upstream};

/// Somebody else leads.
pub fn decide(s: &Situation, view: &ClusterView) -> Decision {
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
        if *divergence == DivergenceState::DidNotStart {
            return start(format!("PostgreSQL is down; starting it again to follow {leader}"));
        }
        return is(Action::Wait, format!("waiting for {leader} to be promoted before following it"));
    };
    mend(s, view, source, divergence)
}

/// One rung after the other of the ladder: ask, rewind, copy anew where a setting allows it, or say what a person can do.
pub fn mend(s: &Situation, view: &ClusterView, source: Upstream, divergence: &DivergenceState) -> Decision {
    let no_checkpoint = view.leader_member().is_some_and(|leader| leader.checkpoint_after_promote == Some(false));
    match divergence {
        DivergenceState::NotAsked | DivergenceState::Check | DivergenceState::DidNotStart => {
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
    let promoted = view.leader_member().filter(|member| member.claims_primary());
    // It took writes, and came up while nobody led. Once it streams, the WAL that tells is overwritten.
    if s.memory.divergence == DivergenceState::Check && s.may_rewind() && view.settings.standby_cluster.is_none() {
        let source = leader_upstream(s.me, view).filter(|_| promoted.is_some() && !s.backing_off());
        return match source {
            Some(source) => mend(s, view, source, &DivergenceState::Check),
            None => is(Action::Wait, comparing(s, leader)),
        };
    }
    if let DivergenceState::Rewind(_) | DivergenceState::RewindFailed(_) = s.memory.divergence
        && let Some(source) = leader_upstream(s.me, view)
    {
        return mend(s, view, source, &s.memory.divergence);
    }
    if let Some(decision) = resume_replay(s, view) {
        return decision;
    }
    let address = target.as_ref().map(|upstream| format!("{}:{}", upstream.host, upstream.port));
    let slot = target.as_ref().and_then(|upstream| upstream.slot.as_ref());
    if address != running.upstream || slot != running.upstream_slot.as_ref() {
        return is(Action::Follow(target), format!("following {leader}"));
    }
    let streaming = running.replication_state.as_deref() == Some("streaming");
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
    if let Some(upstream) = target.filter(|_| dry) {
        let unmended = if s.may_rewind() { "" } else { ", and neither pg_rewind nor a new copy is allowed here" };
        let reason = format!("following {leader}, but nothing is streamed from {}", upstream.name);
        return is(Action::Wait, format!("{reason}: PostgreSQL's log says why{unmended}"));
    }
    is(Action::Wait, format!("no action. I am ({}), a secondary, and following a leader ({leader})", s.me.name))
}

/// A standby that does not stream for so long (or for ttl, if that is longer: then a leader that is gone would be known to be)
/// is compared with its leader.
pub const DRY: Duration = Duration::from_secs(10);
