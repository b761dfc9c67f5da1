//! A standby cluster (ha-loop §17): its leader follows a server outside, or that one's archive, and the others follow the
//! leader. Nobody is promoted, so nothing here can write; the key only says who follows whom.

use std::time::Duration;

use trunkline_common::ClusterView;

use super::follower::{DRY, mend};
use super::leader::requested_handover;
use super::{Action, Decision, failed_lately, is, resume_replay, step_down_margin};
use crate::ha::situation::{DivergenceState, Situation, remote};
use crate::postgres::{PgRole, PgStatus, Running, StartAs, Upstream};

/// This node leads a standby cluster.
pub fn leader(s: &Situation, view: &ClusterView) -> Decision {
    let paused = view.settings.pause;
    match s.pg {
        PgStatus::NoData => is(Action::Release, "the data directory is empty"),
        PgStatus::Broken(why) => is(Action::Release, format!("the data directory can't be used: {why}")),
        PgStatus::Stopped(_) if paused => is(Action::Release, "paused, and PostgreSQL is down"),
        PgStatus::Stopped(_) => come_back(s, view),
        PgStatus::Stopping => is(Action::Wait, "PostgreSQL is stopping"),
        PgStatus::Starting => is(Action::Wait, "PostgreSQL is starting"),
        PgStatus::Unresponsive => is(Action::Wait, "PostgreSQL does not answer"),
        PgStatus::Refusing(why) => is(Action::Wait, format!("PostgreSQL answers with an error: {why}")),
        PgStatus::Running(running) if running.role == PgRole::Primary && paused => {
            is(Action::Lead, "paused: this cluster became a standby cluster, and its primary goes on")
        }
        PgStatus::Running(running) if running.role == PgRole::Primary => {
            is(Action::DemoteCluster, "this cluster became a standby cluster: its primary becomes a standby")
        }
        PgStatus::Running(_) => lead(s, view),
    }
}

fn lead(s: &Situation, view: &ClusterView) -> Decision {
    let left = s.leader_until.map_or(Duration::ZERO, |until| until.since(s.now));
    if left < step_down_margin(s.ttl) && !view.settings.pause {
        return is(Action::Resign, "the lease could not be renewed; a standby goes on without it");
    }
    if let Some(request) = &view.failover {
        let asked = requested_handover(s, view, request);
        match asked.action {
            // Nothing here can write, so nothing has to be stopped.
            Action::HandOver => return Decision { action: Action::Release, ..asked },
            Action::Lead => {}
            _ => return asked,
        }
    }
    if let Some(decision) = resume_replay(s, view) {
        return decision;
    }
    let remote = remote(view);
    let Some(running) = s.running().filter(|running| !follows(running, remote.as_ref())) else {
        return keep_up(s, view, remote);
    };
    let from = running.upstream.as_deref().unwrap_or("the archive alone");
    let to =
        remote.as_ref().map_or("the archive alone".to_owned(), |remote| format!("{}:{}", remote.host, remote.port));
    is(Action::Follow(remote), format!("leading a standby cluster: following {to}, no longer {from}"))
}

/// It follows whom it should. What the server outside has become may not be what it can follow.
fn keep_up(s: &Situation, view: &ClusterView, remote: Option<Upstream>) -> Decision {
    if let Some(remote) = remote
        && s.may_rewind()
        && !s.backing_off()
    {
        let doubt = match s.memory.divergence {
            DivergenceState::Rewind(_) | DivergenceState::RewindFailed(_) => true,
            _ => s.dry_for() >= s.ttl.max(DRY),
        };
        if doubt {
            let asked = mend(s, view, remote, &s.memory.divergence);
            return Decision { reason: format!("not streaming from outside: {}", asked.reason), ..asked };
        }
    }
    is(Action::Lead, format!("no action. I am ({}), the standby leader with the lock", s.me.name))
}

/// A server that is down in a standby cluster, and that nobody but the one outside can tell what it lacks.
pub fn come_back(s: &Situation, view: &ClusterView) -> Decision {
    if s.backing_off() && !matches!(s.memory.divergence, DivergenceState::RewindFailed(_)) {
        return is(Action::Wait, failed_lately(s, "PostgreSQL could not be started as a standby"));
    }
    let remote = remote(view);
    let unsure = s.memory.divergence != DivergenceState::NotAsked && s.may_rewind();
    // One that can't be asked is no reason to serve no reads.
    let asked_for_long = s.memory.divergence == DivergenceState::Check && s.down_for() > view.settings.ttl;
    match remote {
        Some(remote) if unsure && !asked_for_long => mend(s, view, remote, &s.memory.divergence),
        remote => is(Action::Start(StartAs::Standby(remote)), "PostgreSQL is down; starting it to follow from outside"),
    }
}

/// Whether a server follows `wanted`, which may name several hosts, by the slot that it is to use there.
fn follows(running: &Running, wanted: Option<&Upstream>) -> bool {
    match (&running.upstream, wanted) {
        (None, None) => true,
        (Some(upstream), Some(wanted)) => {
            let is = |host: &str| *upstream == format!("{host}:{}", wanted.port);
            running.upstream_slot == wanted.slot && (is(&wanted.host) || wanted.host.split(',').any(is))
        }
        _ => false,
    }
}
