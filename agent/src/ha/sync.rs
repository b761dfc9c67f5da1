//! Synchronous replication: which standbys confirm commits, and in which order DCS and PostgreSQL learn of it. Pure.
//!
//! The promise: a node that the `sync` key names has every acknowledged commit. Hence the order (ha-loop §15): a name is
//! taken off the key *before* PostgreSQL stops waiting for it, and put on the key only *after* PostgreSQL waits for it and
//! it has caught up with what was committed before that.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use trunkline_common::dcs::store::SyncWrite;
use trunkline_common::{ClusterView, Lsn, MemberName};
use trunkline_config::dynamic::SynchronousMode;
use trunkline_config::tags;

use crate::postgres::{Running, WalSender};

/// Stands in `synchronous_standby_names` where strict mode has nobody to name: commits wait (Patroni's name for it).
pub const STRICT_PLACEHOLDER: &str = "__patroni_strict_sync_replica_placeholder__";

/// The next single step towards the wanted state.
#[derive(Debug, Clone, PartialEq)]
pub enum SyncStep {
    /// Write the `sync` key, if it still is what was read.
    Key(SyncWrite, String),
    /// Set `synchronous_standby_names`.
    Names(String, String),
}

/// What a node writes to `sync` as it becomes leader: itself, and in strict mode the standbys that it will wait for.
/// `None`: nothing to write.
pub fn on_promotion(view: &ClusterView, me: &MemberName) -> Option<SyncWrite> {
    let seen = view.sync.revision;
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return (seen.0 != 0).then_some(SyncWrite { value: None, seen });
    }
    let standbys = inherited(view, me);
    let unchanged = view.sync.leader.as_ref() == Some(me) && view.sync.standbys == standbys;
    (!unchanged).then(|| SyncWrite { value: Some(key(me, &standbys)), seen })
}

/// `synchronous_standby_names` at the moment of promotion: whom the first commits wait for.
pub fn names_on_promotion(view: &ClusterView, me: &MemberName, configured: &str) -> String {
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return configured.to_owned();
    }
    let standbys = inherited(view, me);
    match standbys.is_empty() && view.settings.synchronous_mode_strict {
        true => quoted(STRICT_PLACEHOLDER),
        false => names_text(&standbys),
    }
}

/// `synchronous_standby_names` for a primary that comes back in place: everybody on the key is waited for, because
/// everybody on the key may be promoted.
pub fn names_in_key(view: &ClusterView, configured: &str) -> String {
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return configured.to_owned();
    }
    match view.sync.standbys.is_empty() && view.settings.synchronous_mode_strict {
        true => quoted(STRICT_PLACEHOLDER),
        false => names_text(&view.sync.standbys),
    }
}

/// In strict mode the new leader waits for the nodes that were synchronous before; otherwise for nobody.
fn inherited(view: &ClusterView, me: &MemberName) -> Vec<String> {
    if !view.settings.synchronous_mode_strict || !view.sync.is_active() {
        return Vec::new();
    }
    let before = view.sync.standbys.iter().chain(view.sync.leader.iter().map(|leader| &leader.0));
    let mut standbys: Vec<String> = before.filter(|name| !me.matches(name)).cloned().collect();
    standbys.sort();
    standbys
}

/// The next step of a leader that runs as primary, or `None` when all is as it should be. `since` has the primary's
/// position when each name came into force in PostgreSQL; `configured` is the operator's own setting for mode `off`.
pub fn step(
    view: &ClusterView,
    running: &Running,
    since: &BTreeMap<String, Lsn>,
    me: &MemberName,
    configured: &str,
) -> Option<SyncStep> {
    let (settings, sync) = (&view.settings, &view.sync);
    let in_force = running.synchronous_standby_names.as_str();
    let write = |standbys: &[String], why: String| {
        Some(SyncStep::Key(SyncWrite { value: Some(key(me, standbys)), seen: sync.revision }, why))
    };
    let set = |names: String, why: String| (names != in_force).then_some(SyncStep::Names(names, why));

    if settings.synchronous_mode == SynchronousMode::Off {
        if sync.revision.0 != 0 {
            let gone = SyncWrite { value: None, seen: sync.revision };
            return Some(SyncStep::Key(gone, "synchronous mode is off".to_owned()));
        }
        return set(configured.to_owned(), "synchronous mode is off".to_owned());
    }
    if sync.leader.as_ref() != Some(me) {
        return write(&[], "this node leads now".to_owned());
    }

    let active = active(view, running, me);
    if active.is_empty() && settings.synchronous_mode_strict {
        // Nobody can confirm, and commits shall wait: keep waiting for those that were synchronous, so that the first
        // one to come back is enough.
        let names = if sync.standbys.is_empty() { quoted(STRICT_PLACEHOLDER) } else { names_text(&sync.standbys) };
        return set(names, "no standby can confirm commits, and synchronous_mode_strict is set".to_owned());
    }
    let confirmed: Vec<String> = active
        .iter()
        .filter(|sender| waits_for(in_force, sender) && caught_up(sync.standbys.as_slice(), since, sender))
        .map(|sender| member_name(view, sender))
        .collect();
    let active: Vec<String> = active.iter().map(|sender| member_name(view, sender)).collect();

    let kept: Vec<String> = sync.standbys.iter().filter(|name| confirmed.contains(name)).cloned().collect();
    if kept.len() < sync.standbys.len() {
        let lost: Vec<&str> = sync.standbys.iter().filter(|name| !kept.contains(name)).map(String::as_str).collect();
        return write(&kept, format!("{} no longer confirms commits", lost.join(", ")));
    }
    let mut names = active.clone();
    names.sort();
    if let Some(step) = set(names_text(&names), format!("commits shall wait for [{}]", names.join(", "))) {
        return Some(step);
    }
    let mut confirmed = confirmed;
    confirmed.sort();
    if confirmed != sync.standbys {
        let why = format!("commits wait for [{}], which have caught up", confirmed.join(", "));
        return write(&confirmed, why);
    }
    None
}

/// The standbys that should confirm commits: streaming members that may be synchronous, the best ones first.
fn active<'r>(view: &ClusterView, running: &'r Running, me: &MemberName) -> Vec<&'r WalSender> {
    let settings = &view.settings;
    let eligible = |sender: &&WalSender| {
        let member = view.members.iter().find(|(name, _)| name.matches(&sender.application_name));
        sender.state == "streaming"
            && position(running, sender).is_some()
            && member.is_some_and(|(name, member)| name != me && member.is_running() && !member.nosync())
    };
    let mut senders: Vec<&WalSender> = running.replication.iter().filter(eligible).collect();
    let at = |sender: &WalSender| position(running, sender).unwrap_or_default();
    if let Some(limit) = settings.maximum_lag_on_syncnode {
        let head = match senders.len() {
            0 | 1 => running.lsn,
            _ => senders.iter().map(|sender| at(sender)).max().unwrap_or_default(),
        };
        senders.retain(|sender| at(sender).lag_behind(head) <= limit);
    }
    senders.sort_by_key(|sender| {
        let name = MemberName::from(sender.application_name.as_str());
        let tag = view.members.iter().find(|(member, _)| member.matches(&name.0));
        let priority = tag.map_or(1, |(_, member)| tags::sync_priority(&member.tags));
        let synchronous = matches!(sender.sync_state.as_str(), "sync" | "quorum");
        // Highest priority first, then whoever is synchronous already (no needless change), then the most advanced.
        let key = (priority, view.sync.lists(&name), synchronous, at(sender));
        (std::cmp::Reverse(key), sender.application_name.clone())
    });
    // A standby that reconnects has two senders for a moment.
    let mut seen = Vec::new();
    senders.retain(|sender| {
        let name = sender.application_name.to_lowercase();
        let new = !seen.contains(&name);
        seen.push(name);
        new
    });
    senders.truncate(settings.synchronous_node_count.max(1));
    senders
}

/// How far a standby has got with what commits wait for (`synchronous_commit`).
fn position(running: &Running, sender: &WalSender) -> Option<Lsn> {
    match running.synchronous_commit.as_str() {
        "remote_apply" => sender.replay_lsn,
        "remote_write" => sender.write_lsn,
        _ => sender.flush_lsn,
    }
}

/// Whether PostgreSQL makes commits wait for this sender now.
fn waits_for(in_force: &str, sender: &WalSender) -> bool {
    matches!(sender.sync_state.as_str(), "sync" | "quorum") && mentions(in_force, &sender.application_name)
}

/// Whether it has everything that was committed before commits began to wait for it.
fn caught_up(listed: &[String], since: &BTreeMap<String, Lsn>, sender: &WalSender) -> bool {
    let name = &sender.application_name;
    let known = listed.iter().any(|listed| listed.eq_ignore_ascii_case(name));
    let from = since.iter().find(|(waited, _)| waited.eq_ignore_ascii_case(name)).map(|(_, lsn)| *lsn);
    known || from.is_some_and(|from| sender.flush_lsn.is_some_and(|flushed| flushed >= from))
}

/// The member's name as the DCS has it (PostgreSQL may have folded its case).
fn member_name(view: &ClusterView, sender: &WalSender) -> String {
    let member = view.members.keys().find(|name| name.matches(&sender.application_name));
    member.map_or_else(|| sender.application_name.clone(), |name| name.0.clone())
}

/// Whether `synchronous_standby_names` mentions a standby.
pub fn mentions(names: &str, standby: &str) -> bool {
    names.split(['(', ')', ',', ' ']).any(|name| name.trim_matches('"').eq_ignore_ascii_case(standby))
}

/// The `sync` key's value. `quorum` is 0 in mode `on`: each listed node has everything.
fn key(leader: &MemberName, standbys: &[String]) -> Value {
    let mut sorted = standbys.to_vec();
    sorted.sort();
    let listed = if sorted.is_empty() { Value::Null } else { Value::from(sorted.join(",")) };
    json!({ "leader": leader.as_str(), "quorum": 0, "sync_standby": listed })
}

/// The text of `synchronous_standby_names` (ha-loop §15.6): one bare name, or `N (a,b)` when all of them must confirm.
fn names_text(names: &[String]) -> String {
    let list = names.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(",");
    if names.len() > 1 { format!("{} ({list})", names.len()) } else { list }
}

/// Quoted where PostgreSQL's parser needs it.
fn quoted(name: &str) -> String {
    let mut chars = name.chars();
    let plain = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$')
        && !matches!(name.to_ascii_lowercase().as_str(), "first" | "any");
    if plain { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

#[cfg(test)]
mod tests;
