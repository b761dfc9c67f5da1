//! The leader key is ours, or bears our name: lead on, give way, or step down in time.

use std::time::Duration;

use trunkline_common::cluster::FailoverRequest;
use trunkline_common::{ClusterView, Instant};

use super::{
    Action, Decision, DemoteMode, FAILSAFE_PAUSE, FIRST_PROOF, MAY_BE_LED, MAY_HAVE_PROMISED, failed_lately,
    failsafe_margin, is, leaderless, resume_replay, standby, step_down_margin,
};
use crate::ha::election::{self, Takeover, Verdict};
use crate::ha::routers::{self, Awaited};
use crate::ha::situation::{Situation, stopped_as_primary};
use crate::ha::sync;
use crate::postgres::{ControlData, PgRole, PgStatus, StartAs};

/// A primary whose lease nears its end without a renewal: asks for the members' word, or steps down in time.
fn hold_out(s: &Situation, view: &ClusterView) -> Option<Decision> {
    let settings = &view.settings;
    let left = s.leader_until.map_or(Duration::ZERO, |until| until.since(s.now));
    if !s.may_take_writes() || settings.pause || left >= failsafe_margin(s.ttl, s.dcs_away) {
        return None;
    }
    let refusal = s.refusal();
    let demote = |why: String| {
        if !s.is_primary() {
            // One that does not answer is not stopped in order; the keeper ends it in time.
            return None;
        }
        let reason = format!("demoting self because DCS is not accessible and I was a leader: {why}");
        Some(is(Action::Demote(DemoteMode::Offline), reason))
    };
    if left < step_down_margin(s.ttl) {
        let word = match (settings.failsafe_mode, refusal) {
            (false, _) => String::new(),
            (true, Some(refusal)) => format!("; failsafe mode: {}", refusal.why),
            (true, None) => "; failsafe mode: this node is not in the failsafe key as last seen".to_owned(),
        };
        return demote(format!("the lease could not be renewed and ends in {left:.1?}{word}"));
    }
    if refusal.is_some() && !s.holds_key() && s.has_lease() && !s.dcs_away {
        // The DCS is back, and the key is all that is needed.
        return None;
    }
    let members = s.failsafe_members(view)?;
    match refusal {
        // Whoever leads next may not have what is written from here on. As long as it would lead without this mode it leads with it.
        Some(refusal)
            if s.key_until.is_none_or(|until| until.since(s.now) < step_down_margin(s.ttl))
                && s.now.since(refusal.since) >= settings.loop_wait + settings.retry_timeout =>
        {
            demote(format!("failsafe mode: {} for {:.1?}", refusal.why, s.now.since(refusal.since)))
        }
        Some(refusal) if s.now.since(refusal.at) < FAILSAFE_PAUSE => {
            Some(is(Action::Lead, format!("failsafe mode: {}", refusal.why)))
        }
        Some(refusal) => Some(is(Action::Failsafe(members), format!("failsafe mode: {}", refusal.why))),
        // Asked in time for the next word; nothing has changed.
        None if s.has_word() => Some(is(Action::Failsafe(members), GOING_ON)),
        None => Some(is(Action::Failsafe(members), "failsafe mode: asking all members for their word")),
    }
}

/// Patroni's words.
const GOING_ON: &str = "continue to run as a leader because failsafe mode is enabled and all members are accessible";

/// This primary leads by the members' word, and the leader key is gone: taken again as soon as the DCS answers.
pub fn by_word(s: &Situation, view: &ClusterView) -> Decision {
    if let Some(decision) = hold_out(s, view) {
        return decision;
    }
    if !s.has_lease() || s.dcs_away {
        return is(Action::Lead, GOING_ON);
    }
    leaderless::race(s, view)
}

/// The key is ours and its lease has time left, or the members have given their word.
pub fn decide(s: &Situation, view: &ClusterView) -> Decision {
    let settings = &view.settings;
    if let Some(decision) = hold_out(s, view) {
        return decision;
    }
    if !s.holds_key() && s.has_lease() && !s.dcs_away {
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
            PgStatus::Running(running) if running.role == PgRole::Standby => release_standby(s, reason),
            _ => is(Action::Demote(DemoteMode::Sick), reason),
        };
    }
    match s.pg {
        PgStatus::NoData => is(Action::Release, "the data directory is empty"),
        PgStatus::Broken(why) => is(Action::Release, format!("the data directory can't be used: {why}")),
        PgStatus::Stopping => stopping_leader(s, view),
        PgStatus::Stopped(_) if settings.pause => is(Action::Release, "paused, and PostgreSQL is down"),
        PgStatus::Stopped(control) => recover_leader(s, view, control),
        PgStatus::Starting => sick_leader(s, view, "PostgreSQL is starting"),
        PgStatus::Unresponsive => hung_leader(s, view),
        PgStatus::Refusing(why) if s.memory.was_primary => {
            is(Action::Lead, format!("PostgreSQL answers with an error: {why}"))
        }
        // It can't be promoted like that, nor does anybody else lead.
        PgStatus::Refusing(why) => sick_leader(s, view, &format!("PostgreSQL answers with an error: {why}")),
        PgStatus::Running(running) if running.role == PgRole::Standby => {
            if settings.pause && view.failover.as_ref().is_none_or(|r| r.candidate.as_ref() != Some(&s.me.name)) {
                return release_standby(s, "paused, and PostgreSQL runs as a standby".to_owned());
            }
            promote(s, view)
        }
        PgStatus::Running(_) if !s.holds_key() => is(Action::Lead, GOING_ON),
        PgStatus::Running(_) if disk_is_silent(s, view) => {
            let (lsn, since) = s.memory.disk_silent.unwrap_or((s.lsn(), s.now));
            let what = format!("the disk has taken no WAL for {:.0?} (position {lsn})", s.now.since(since));
            match give_way(s, view, &what) {
                // Who reads is served as before, and the disk may come back.
                Decision { action: Action::Wait, reason } => is(Action::Lead, reason),
                decision => decision,
            }
        }
        PgStatus::Running(_) => match &view.failover {
            Some(request) => requested_handover(s, view, request),
            None if s.dcs_away && s.has_word() => is(Action::Lead, GOING_ON),
            None => is(Action::Lead, format!("no action. I am ({}), the leader with the lock", s.me.name)),
        },
    }
}

/// How long after its start an agent takes into account that the one before it may have begun a promotion.
const INHERITED: Duration = Duration::from_secs(60);

/// Gives the key back of a standby. PostgreSQL can't be told to forget a promotion: where one may have been begun, by this agent or the one
/// before it, the server is stopped first.
fn release_standby(s: &Situation, reason: String) -> Decision {
    let inherited = s.memory.up_since.is_none() && s.now.since(s.memory.started_at) < INHERITED;
    match s.memory.promotions > 0 || inherited {
        true => {
            is(Action::Demote(DemoteMode::Sick), format!("{reason}; stopped first, it may have begun to be promoted"))
        }
        false => is(Action::Release, reason),
    }
}

/// A standby with the leader key. It was won by comparing positions, or it came some other way (an agent that died in
/// between, a request carried out after everybody had given it up): then what was true when it was sent may not be now.
fn promote(s: &Situation, view: &ClusterView) -> Decision {
    let won = view.leader.as_ref().is_some_and(|leader| s.memory.elected == Some(leader.created));
    let why = if won {
        "holding the leader key".to_owned()
    } else {
        match election::overtaken(s, view).unwrap_or_else(|| election::may_race(s, view)) {
            Verdict::Ask(members) => {
                return is(Action::Ask(members), "the leader key is ours, but was not won just now");
            }
            Verdict::Race(why) => format!("the leader key is ours, and nobody is a better choice: {why}"),
            Verdict::Yield(why) => {
                return release_standby(s, format!("the leader key is ours, but was not won just now: {why}"));
            }
        }
    };
    if let Some(decision) = resume_replay(s, view) {
        return decision;
    }
    if let Some(Awaited { names, left }) = routers::awaited(view, s.memory.key_held, s.now) {
        let reason = format!("{why}; not promoted before {} let go of the former leader's sessions", names.join(", "));
        return is(Action::Wait, format!("{reason}, or {left:.1?} have passed"));
    }
    is(Action::Promote(sync::on_promotion(view, &s.me.name)), why)
}

/// The leader's server is down: restart it in place, or let somebody else lead (`primary_start_timeout`).
fn recover_leader(s: &Situation, view: &ClusterView, control: &ControlData) -> Decision {
    let patience = view.settings.primary_start_timeout;
    if s.memory.abstain_until.is_some_and(|until| s.now < until) {
        return is(Action::Release, "PostgreSQL is down, and this node could not be promoted");
    }
    let mut nobody = String::new();
    if s.memory.demoted || s.down_for() >= patience || s.memory.failures > 0 {
        match election::takeover(s, view, None, false) {
            Takeover::Ask(members) => return is(Action::Ask(members), "PostgreSQL is down"),
            Takeover::Possible(name) => {
                return is(Action::Release, format!("PostgreSQL is down, and {name} can take over"));
            }
            Takeover::Impossible(why) if s.backing_off() => {
                return is(Action::Wait, format!("PostgreSQL is down, and nobody can take over: {why}"));
            }
            Takeover::Impossible(why) => nobody = format!(", and nobody can take over ({why})"),
        }
    }
    if s.backing_off() {
        return is(Action::Wait, failed_lately(s, "PostgreSQL did not start"));
    }
    if stopped_as_primary(control) {
        let reason = format!("PostgreSQL is down{nobody}; starting it again as primary, the leader key is ours");
        is(Action::Start(StartAs::Primary), reason)
    } else {
        is(Action::Start(StartAs::Standby(None)), format!("PostgreSQL is down{nobody}; starting it, to be promoted"))
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

/// Somebody has been waiting for so long for WAL to reach the disk that the server counts as hung, though it answers: commits
/// stand still, and nothing else would tell.
fn disk_is_silent(s: &Situation, view: &ClusterView) -> bool {
    let patience = HUNG.1.max(view.settings.ttl);
    let silent = s.memory.disk_silent.is_some_and(|(_, since)| s.now.since(since) >= patience);
    silent && !view.settings.pause
}

/// The leader's server is on its way down, by whoever asked for it: a disk may hold it up, or a session that nobody ends.
fn stopping_leader(s: &Situation, view: &ClusterView) -> Decision {
    let patience = HUNG.1.max(view.settings.ttl).max(view.settings.stop_limit());
    if s.down_for() < patience || view.settings.pause {
        return is(Action::Wait, "PostgreSQL is stopping");
    }
    give_way(s, view, &format!("PostgreSQL has been stopping for {:.0?}", s.down_for()))
}

/// The leader's server is there, but recovers from a crash, or is a standby that lets nobody in.
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
pub fn requested_handover(s: &Situation, view: &ClusterView, request: &FailoverRequest) -> Decision {
    let lead = |reason: String| is(Action::Lead, reason);
    if view.leader.as_ref().is_some_and(|key| view.failover_revision < key.created) {
        // Also where it was in vain, and the one that stepped down leads again: once asked is tried once.
        return is(Action::ClearFailover, "the request is older than this leadership");
    }
    if s.dcs_away {
        return lead("a failover was requested; the DCS, which would say who leads then, does not answer".to_owned());
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

/// How long a router without DCS may go on sending writes to whom it knew as primary: it asks twice a second, and this agent
/// says no. A server that comes up as a standby sooner would be asked to take them.
const ROUTERS_TRUST: Duration = Duration::from_secs(2);

/// A router that has a DCS when this node has none goes by the key, which the DCS removes that much after the lease's end at the
/// latest (etcd looks for leases that are over twice a second).
const KEY_LINGERS: Duration = Duration::from_millis(700);

/// Until when a router may take a stopped primary without DCS for the primary.
pub fn trusted_until(down_since: Option<Instant>, lease_until: Option<Instant>) -> Option<Instant> {
    down_since.map(|since| since + ROUTERS_TRUST).max(lease_until.map(|until| until + KEY_LINGERS))
}

const FOUND: &str = "the leader key bears our name";

/// The key bears our name, but this process does not hold it: an agent restarted, or a lease was lost and found.
pub fn named(s: &Situation, view: &ClusterView) -> Decision {
    let trusted = |s: &Situation| trusted_until(s.memory.down_since, s.lease_until).is_some_and(|until| s.now < until);
    match s.pg {
        PgStatus::NoData | PgStatus::Broken(_) => {
            is(Action::Release, "the leader key bears our name, but there is no data")
        }
        PgStatus::Stopped(_) if s.dcs_away && trusted(s) && !view.settings.pause => {
            is(Action::Wait, "the DCS does not answer; routers may still take this node for the primary")
        }
        PgStatus::Stopped(_) if s.dcs_away && !s.backing_off() && !view.settings.pause => {
            is(Action::Start(StartAs::Standby(None)), "the DCS does not answer; starting as a standby to serve reads")
        }
        PgStatus::Unresponsive | PgStatus::Stopping if s.memory.abstain_until.is_some_and(|until| s.now < until) => {
            is(Action::Wait, "PostgreSQL can't be killed; the leader key is left to run out")
        }
        _ if s.may_have_promised(view) => is(Action::Wait, MAY_HAVE_PROMISED),
        _ if s.may_be_led() => is(Action::Wait, MAY_BE_LED),
        _ if s.has_lease() && !s.dcs_away => match election::overtaken(s, view) {
            Some(Verdict::Ask(members)) => is(Action::Ask(members), FOUND),
            Some(Verdict::Yield(why)) => is(Action::Release, format!("{FOUND}: {why}")),
            Some(Verdict::Race(_)) | None => is(Action::Confirm, FOUND),
        },
        _ if s.is_primary()
            && !view.settings.pause
            && s.now.since(s.memory.started_at) > view.settings.retry_timeout.min(FIRST_PROOF) =>
        {
            is(Action::Demote(DemoteMode::LostKey), "the lease of the leader key could not be renewed")
        }
        _ => is(Action::Wait, "the leader key bears our name; waiting for a lease"),
    }
}
