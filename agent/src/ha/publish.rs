//! What this node writes about itself, and what a leader writes about the cluster. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};
use trunkline_common::cluster::{HistoryLine, Member, Status};
use trunkline_common::timeline::Switch;
use trunkline_common::{ClusterView, History, Instant, Lsn, MemberName, TimelineId};
use trunkline_config::tags;

use super::situation::{Me, Memory};
use super::task::TaskKind;
use crate::node::PATRONI_VERSION;
use crate::postgres::{ControlState, PgRole, PgStatus};

/// Patroni's state text (dcs-layout §4.1).
pub fn state_text(pg: &PgStatus, task: Option<&TaskKind>, memory: &Memory) -> &'static str {
    match task {
        Some(TaskKind::Bootstrap) => return "initializing new cluster",
        Some(TaskKind::Clone | TaskKind::Reinitialize) => return "creating replica",
        Some(TaskKind::Start) => return "starting",
        Some(TaskKind::Restart) => return "restarting",
        Some(TaskKind::HandOver | TaskKind::Demote) => return "stopping",
        Some(TaskKind::Promote | TaskKind::CheckDivergence | TaskKind::Rewind) | None => {}
    }
    match pg {
        PgStatus::Running(_) => "running",
        PgStatus::Refusing(_) | PgStatus::Unresponsive => "running",
        PgStatus::Starting => "starting",
        PgStatus::Stopping => "stopping",
        PgStatus::NoData | PgStatus::Broken(_) => "stopped",
        PgStatus::Stopped(_) if memory.failures > 0 => "start failed",
        PgStatus::Stopped(control) => match control.state {
            ControlState::ShutDown | ControlState::ShutDownInRecovery => "stopped",
            _ if memory.demoted => "stopped",
            _ => "crashed",
        },
    }
}

/// Patroni's role text (dcs-layout §4.2).
pub fn role_text(pg: &PgStatus, memory: &Memory) -> &'static str {
    match pg {
        PgStatus::NoData => "uninitialized",
        PgStatus::Running(running) if running.role == PgRole::Primary => "primary",
        PgStatus::Running(_) => "replica",
        _ if memory.demoted => "demoted",
        _ if memory.was_primary => "primary",
        _ => "replica",
    }
}

/// The member key.
pub fn member(
    me: &Me,
    urls: &Urls,
    pg: &PgStatus,
    task: Option<&TaskKind>,
    memory: &Memory,
    view: Option<&ClusterView>,
) -> Member {
    let mut member = Member {
        conn_url: Some(urls.connection.clone()),
        api_url: Some(urls.api.clone()),
        proxy_url: urls.proxy.clone(),
        state: state_text(pg, task, memory).to_owned(),
        role: role_text(pg, memory).to_owned(),
        version: Some(PATRONI_VERSION.to_owned()),
        tags: tags::published(&me.tags),
        pause: view.is_some_and(|view| view.settings.pause),
        ..Member::default()
    };
    if let PgStatus::Running(running) = pg {
        let standby = running.role == PgRole::Standby;
        member.checkpoint_after_promote = running.awaits_checkpoint().then_some(false);
        member.xlog_location = Some(running.lsn);
        member.replay_lsn = running.replay_lsn.filter(|lsn| standby && lsn.is_valid());
        member.receive_lsn = running.receive_lsn.filter(|lsn| standby && lsn.is_valid());
        member.replication_state = running.replication_state.clone().filter(|_| standby);
        member.timeline = running.timeline.filter(|timeline| timeline.0 > 0);
        member.pending_restart = !running.pending_restart.is_empty();
        member.pending_restart_reason = member
            .pending_restart
            .then(|| running.pending_restart.iter().map(|(guc, change)| (guc.clone(), change.clone())).collect());
    }
    member
}

/// Where this node can be reached, as others are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urls {
    /// `postgres://host:port/database`.
    pub connection: String,
    /// `http(s)://host:port/patroni`.
    pub api: String,
    /// `postgres://…` of a pooler.
    pub proxy: Option<String>,
}

/// The `history` key after a promotion to `timeline`: PostgreSQL's own lines, with the time and the new leader kept for
/// those that the key already has. `None`: it is up to date.
pub fn history(
    view: &ClusterView,
    me: &MemberName,
    timeline: TimelineId,
    local: &History,
    written_at: &str,
) -> Option<Vec<HistoryLine>> {
    let complete =
        view.history.last().is_some_and(|line| line.timeline.0 + 1 == timeline.0 && line.new_leader.is_some());
    if complete || (timeline.0 <= 1 && view.history.is_empty()) {
        return None;
    }
    let last = local.0.len().saturating_sub(1);
    let line = |(index, switch): (usize, &Switch)| {
        let known = view.history.iter().find(|l| l.timeline == switch.timeline && l.switchpoint == switch.switchpoint);
        let newest = index == last;
        HistoryLine {
            timeline: switch.timeline,
            switchpoint: switch.switchpoint,
            reason: switch.reason.clone(),
            promoted_at: known.and_then(|l| l.promoted_at.clone()).or_else(|| newest.then(|| written_at.to_owned())),
            new_leader: known.and_then(|l| l.new_leader.clone()).or_else(|| newest.then(|| me.0.clone())),
        }
    };
    let mut lines: Vec<HistoryLine> = local.0.iter().enumerate().map(line).collect();
    let keep = view.settings.max_timelines_history;
    if keep > 0 && lines.len() > keep {
        lines.drain(..lines.len() - keep);
    }
    Some(lines)
}

/// Slots that this node should have (ha-loop §16, physical only), with the position to advance to on a standby: those of
/// other members, the permanent ones, and those that `ignore_slots` says to leave alone. `seen` says when each slot's
/// member was last there: the slot outlives it by `member_slots_ttl`.
pub fn slots(
    view: &ClusterView,
    me: &Me,
    existing: &BTreeMap<String, Lsn>,
    seen: &BTreeMap<String, Instant>,
    now: Instant,
) -> BTreeMap<String, Option<Lsn>> {
    let settings = &view.settings;
    let keep = settings.member_slots_ttl.max(Duration::from_secs(1));
    let members = seen.iter().filter(|(_, at)| now.since(**at) < keep).map(|(slot, _)| slot);
    let permanent = settings.slots.iter().filter(|(_, slot)| is_physical(slot)).map(|(name, _)| name);
    let ignored = existing.keys().filter(|slot| settings.ignore_slots.iter().any(|matcher| ignores(matcher, slot)));
    let own = me.name.slot_name();
    let position = |slot: &String| view.status.slots.as_ref()?.get(slot).copied();
    let wanted = members.chain(permanent).filter(|slot| **slot != own).map(|slot| (slot.clone(), position(slot)));
    wanted.chain(ignored.map(|slot| (slot.clone(), None))).collect()
}

/// Whether an entry of `slots` is a physical slot (config §4): no mapping at all, `type: physical`, or neither type nor
/// database and plugin.
fn is_physical(slot: &Value) -> bool {
    match slot.get("type").and_then(Value::as_str) {
        Some(kind) => kind == "physical",
        None => slot.get("database").is_none() || slot.get("plugin").is_none(),
    }
}

/// Whether a matcher of `ignore_slots` is about this physical slot: all that it names must fit, and a physical slot has
/// neither database nor plugin.
fn ignores(matcher: &Map<String, Value>, slot: &str) -> bool {
    matcher.iter().all(|(field, value)| match field.as_str() {
        "name" => value.as_str() == Some(slot),
        "type" => value.as_str() == Some("physical"),
        _ => false,
    })
}

/// Notes which members' slots are in use now. A node that doesn't lead also keeps what the leader retains, so that it
/// knows them should it be promoted.
pub fn note_slots(seen: &mut BTreeMap<String, Instant>, view: &ClusterView, leads: bool, now: Instant) {
    let members = view.members.iter().filter(|(_, member)| !member.tag_is_true("nostream"));
    seen.extend(members.map(|(name, _)| (name.slot_name(), now)));
    if !leads {
        seen.extend(view.status.retain_slots.iter().flatten().map(|slot| (slot.clone(), now)));
    }
    let keep = view.settings.member_slots_ttl.max(Duration::from_secs(1));
    seen.retain(|_, at| now.since(*at) < keep);
}

/// The `status` key of a running primary.
pub fn status(view: &ClusterView, me: &Me, pg: &PgStatus, wanted: &BTreeMap<String, Option<Lsn>>) -> Option<Status> {
    let PgStatus::Running(running) = pg else { return None };
    let mut slots = running.slots.clone();
    slots.insert(me.name.slot_name(), running.lsn);
    let mut retain: Vec<String> = wanted.keys().cloned().chain([me.name.slot_name()]).collect();
    retain.sort();
    retain.dedup();
    let with_slots = me.use_slots && !view.settings.member_slots_ttl.is_zero();
    Some(Status { optime: running.lsn, slots: with_slots.then_some(slots), retain_slots: with_slots.then_some(retain) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use trunkline_config::Settings;

    #[test]
    fn slots_of_members_permanent_ones_and_ignored_ones_are_kept() {
        let settings = json!({
            "slots": { "archive": null, "typed": { "type": "physical" }, "logical": { "database": "d", "plugin": "p" } },
            "ignore_slots": [{ "name": "theirs", "type": "physical" }, { "name": "nobodys", "plugin": "x" }],
        });
        let view = ClusterView { settings: Settings::from_value(&settings).0, ..ClusterView::default() };
        let me = Me {
            name: "a".into(),
            tags: Map::new(),
            may_bootstrap: true,
            use_pg_rewind: true,
            use_slots: true,
            reclone_diverged: false,
            reclone_unrewindable: false,
        };
        let now = Instant::from_boot(Duration::from_secs(10_000));
        let seen = BTreeMap::from([
            ("a".to_owned(), now),
            ("b".to_owned(), now - Duration::from_secs(60)),
            ("long_gone".to_owned(), now - Duration::from_secs(2000)),
        ]);
        let existing = ["theirs", "nobodys", "stray"].map(|slot| (slot.to_owned(), Lsn(1))).into();
        let wanted = slots(&view, &me, &existing, &seen, now);
        assert_eq!(wanted.keys().map(String::as_str).collect::<Vec<_>>(), ["archive", "b", "theirs", "typed"]);
    }
}
