//! A restart that an operator asks for: whether it is done at all, and as what the server comes back.

use crate::ha::election::is_left_behind;
use crate::ha::publish;
use crate::ha::situation::{Situation, remote, stopped_as_primary, upstream};
use crate::node::RestartFilter;
use crate::postgres::{ControlData, PgStatus, StartAs, Upstream};

/// As what a server comes back. Which of both it was is certain only once it is down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComeBack {
    /// One that was a primary may be one again.
    pub may_be_primary: bool,
    /// Whom it follows otherwise.
    pub upstream: Option<Upstream>,
}

impl ComeBack {
    /// As what to start the server that has left `control` behind.
    pub fn role(self, control: &ControlData) -> StartAs {
        match self.may_be_primary && stopped_as_primary(control) {
            true => StartAs::Primary,
            false => StartAs::Standby(self.upstream),
        }
    }
}

/// Decides on a restart (ha-loop §12, rest-api §4.4).
///
/// # Errors
/// Why it is not done.
pub fn decide(s: &Situation, filter: &RestartFilter) -> Result<ComeBack, &'static str> {
    let may_be_primary = match (s.pg, s.view) {
        (PgStatus::NoData | PgStatus::Broken(_), _) => return Err("there is no data directory to start PostgreSQL on"),
        (PgStatus::Stopped(_), None) => return Err("the DCS has not been read yet"),
        (PgStatus::Stopped(control), Some(_)) => may_lead_again(s, control),
        // Also where it hangs or answers with errors: that may be what a restart is to mend.
        _ => true,
    };
    if filter.role.as_deref().is_some_and(|wanted| wanted != publish::role_text(s.pg, s.memory)) {
        return Err("restart conditions are not satisfied: the role differs");
    }
    // A server that does not answer tells no version, and that nothing is pending; nor would a stopped one keep it pending.
    let running = s.running();
    let older = |than: u32| running.is_some_and(|running| running.server_version < than);
    if filter.older_than.is_some_and(|version| !older(version)) {
        return Err("restart conditions are not satisfied: the version is not known to be older");
    }
    if filter.pending && running.is_none_or(|running| running.pending_restart.is_empty()) {
        return Err("restart conditions are not satisfied: no restart is pending");
    }
    let outside = s.view.filter(|view| view.settings.standby_cluster.is_some() && s.leads());
    let upstream = match outside {
        Some(view) => remote(view),
        None => s.view.and_then(|view| upstream(s.me, view)),
    };
    Ok(ComeBack { may_be_primary, upstream })
}

/// Whether a stopped server that was a primary may be started as one: its node leads, or nobody does in a pause, in which only
/// an operator makes primaries. Not where the `sync` key names another one as the leader: whoever is on it may lead when the
/// pause is over, and commits here would not wait for it.
fn may_lead_again(s: &Situation, control: &ControlData) -> bool {
    let Some(view) = s.view.filter(|view| view.settings.standby_cluster.is_none()) else { return false };
    if s.leads() && view.is_leader(&s.me.name) {
        return true;
    }
    let nobody_else = match &view.leader {
        Some(leader) => leader.name == s.me.name,
        // One that handed over is down for another one to lead.
        None => view.failover.is_none() && !s.memory.demoted,
    };
    let nobody_since = view.sync.leader.as_ref().is_none_or(|leader| *leader == s.me.name);
    view.settings.pause && nobody_else && nobody_since && !is_left_behind(Some(control.timeline), view)
}
