//! Nobody leads: race, come up to be compared, or make the cluster.

use trunkline_common::cluster::Initialize;
use trunkline_common::{ClusterView, MemberName};

use super::{Action, Decision, DemoteMode, FIRST_PROOF, MAY_BE_LED, MAY_HAVE_PROMISED, failed_lately, is, standby};
use crate::ha::election::{self, Verdict};
use crate::ha::situation::{DivergenceState, Situation, remote};
use crate::ha::sync;
use crate::postgres::{PgStatus, StartAs};

/// Nobody leads.
pub fn decide(s: &Situation, view: &ClusterView) -> Decision {
    match s.pg {
        PgStatus::NoData => return empty_and_leaderless(s, view),
        PgStatus::Broken(why) => return is(Action::Wait, format!("the data directory can't be used: {why}")),
        PgStatus::Stopped(_) => return start_leaderless(s, view),
        PgStatus::Unresponsive | PgStatus::Refusing(_) if s.may_take_writes() && !view.settings.pause => {
            let reason = "nobody leads, and the server here took writes before it fell silent";
            return is(Action::Demote(DemoteMode::LostKey), reason);
        }
        PgStatus::Starting => return is(Action::Wait, "PostgreSQL is starting; nobody leads"),
        PgStatus::Stopping => return is(Action::Wait, "PostgreSQL is stopping; nobody leads"),
        PgStatus::Unresponsive => return is(Action::Wait, "PostgreSQL does not answer; nobody leads"),
        PgStatus::Refusing(why) => {
            return is(Action::Wait, format!("PostgreSQL answers with an error ({why}); nobody leads"));
        }
        PgStatus::Running(_) if s.may_have_promised(view) => return is(Action::Abstain, MAY_HAVE_PROMISED),
        PgStatus::Running(_) if s.may_be_led() => return is(Action::Abstain, MAY_BE_LED),
        PgStatus::Running(_) => {}
    }
    if !s.has_lease() {
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

pub fn race(s: &Situation, view: &ClusterView) -> Decision {
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
        Initialize::Absent if s.may_be_led() => is(Action::Wait, MAY_BE_LED),
        Initialize::Absent if !s.has_lease() => is(Action::Wait, "waiting for a lease"),
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
        return is(Action::Wait, "PostgreSQL is down, and the key was given back for another one to lead");
    }
    is(Action::Start(StartAs::Standby(None)), "PostgreSQL is down and nobody leads; starting it as a standby")
}
