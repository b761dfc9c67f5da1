//! What this node writes about itself, and what a leader writes about the cluster. Pure.

use std::collections::{BTreeMap, BTreeSet};

use trunkline_common::cluster::{HistoryLine, Member, Status};
use trunkline_common::timeline::Switch;
use trunkline_common::{ClusterView, History, Lsn, MemberName, TimelineId};
use trunkline_config::tags;

use super::situation::{Me, Memory};
use super::slots;
use super::sync;
use super::task::TaskKind;
use super::timelines;
use crate::node::PATRONI_VERSION;
use crate::postgres::{ControlState, PgRole, PgStatus, WalSender, WantedSlot};

/// Patroni's state text (dcs-layout §4.1).
pub fn state_text(pg: &PgStatus, task: Option<&TaskKind>, memory: &Memory, paused: bool) -> &'static str {
    match task {
        Some(TaskKind::Bootstrap) => return "initializing new cluster",
        Some(TaskKind::CustomBootstrap) => return "running custom bootstrap script",
        Some(TaskKind::Clone | TaskKind::Reinitialize) => return sync::BEING_COPIED,
        Some(TaskKind::Start | TaskKind::CopySlots) => return "starting",
        Some(TaskKind::Restart) => return "restarting",
        Some(TaskKind::HandOver | TaskKind::Demote | TaskKind::DemoteCluster | TaskKind::Stop) => return "stopping",
        // Stopped for it, for as long as it takes: nobody may wait for WAL from here.
        Some(TaskKind::Rewind) => return "stopped",
        Some(TaskKind::Promote | TaskKind::CheckDivergence | TaskKind::Discard) | None => {}
    }
    match pg {
        PgStatus::Running(_) => "running",
        PgStatus::Refusing(_) | PgStatus::Unresponsive => "running",
        PgStatus::Starting => "starting",
        PgStatus::Stopping => "stopping",
        PgStatus::NoData | PgStatus::Broken(_) => "stopped",
        // Whoever has stopped it has done so on purpose, as far as this node is concerned.
        PgStatus::Stopped(_) if paused => "stopped",
        PgStatus::Stopped(_) if memory.failures > 0 => "start failed",
        PgStatus::Stopped(control) => match control.state {
            ControlState::ShutDown | ControlState::ShutDownInRecovery => "stopped",
            _ if memory.demoted || memory.fresh_copy => "stopped",
            _ => "crashed",
        },
    }
}

/// Patroni's role text (dcs-layout §4.2).
pub fn role_text(pg: &PgStatus, memory: &Memory) -> &'static str {
    match pg {
        PgStatus::NoData => "uninitialized",
        PgStatus::Running(running) if running.role == PgRole::Primary => "primary",
        PgStatus::Running(_) => memory.standby_role.unwrap_or("replica"),
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
        state: state_text(pg, task, memory, view.is_some_and(|view| view.settings.pause)).to_owned(),
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
    // Numbers that were left out: whoever reads this, Patroni too, takes the timeline after the last line for the cluster's.
    if let Some(last) = lines.last().cloned() {
        let reason = "number left out".to_owned();
        let numbers = (last.timeline.0 + 1..timeline.0).rev().take(timelines::LEFT_OUT_MAX).collect::<Vec<_>>();
        let left_out =
            |number: u32| HistoryLine { timeline: TimelineId(number), reason: reason.clone(), ..last.clone() };
        lines.extend(numbers.into_iter().rev().map(left_out));
    }
    let keep = view.settings.max_timelines_history;
    if keep > 0 && lines.len() > keep {
        lines.drain(..lines.len() - keep);
    }
    Some(lines)
}

/// The `status` key of a running primary: its position, and that of the slots that it keeps (`kept`). `seen`: those of
/// members.
pub fn status(
    view: &ClusterView,
    me: &Me,
    pg: &PgStatus,
    kept: &BTreeMap<String, WantedSlot>,
    seen: &slots::Seen,
) -> Option<Status> {
    let PgStatus::Running(running) = pg else { return None };
    let optime = running.lsn;
    if !me.use_slots {
        return Some(Status { optime, slots: None, retain_slots: None });
    }
    let for_members = !view.settings.member_slots_ttl.is_zero();
    let permanent: BTreeSet<&String> = slots::permanent(view).map(|(slot, _)| slot).collect();
    let own = me.name.slot_name();
    let streamed = |slot: &str| {
        let by = |sender: &&WalSender| MemberName::from(sender.application_name.as_str()).slot_name() == slot;
        running.replication.iter().filter(by).filter_map(|sender| sender.flush_lsn).max()
    };
    let position = |(slot, wanted): (&String, &WantedSlot)| {
        let at = running.slots.get(slot).copied();
        let position = match seen.contains_key(slot) {
            true => slots::published(view, slot, at, wanted.position.max(streamed(slot))),
            false => at,
        };
        Some((slot.clone(), position?))
    };
    let reported = kept.iter().filter(|(slot, _)| for_members || permanent.contains(slot));
    let mut positions: BTreeMap<String, Lsn> = reported.filter_map(position).collect();
    if for_members || permanent.contains(&own) {
        positions.insert(own, optime);
    }
    let retain_slots = for_members.then(|| slots::retained(view, seen, me));
    let slots = (for_members || !positions.is_empty()).then_some(positions);
    Some(Status { optime, slots, retain_slots })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_to_stream_from_a_member_that_is_rewound() {
        // What was seen of the server before the task began.
        for pg in [PgStatus::Starting, PgStatus::Unresponsive] {
            let state = |task| state_text(&pg, task, &Memory::default(), false);
            assert_ne!(state(None), "stopped");
            assert_eq!(state(Some(&TaskKind::Rewind)), "stopped");
        }
    }
}
