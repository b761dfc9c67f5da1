//! Synchronous replication: which standbys confirm commits, and in which order DCS and PostgreSQL learn of it. Pure.
//!
//! The promise: a node that the `sync` key names has every acknowledged commit. Hence the order (ha-loop §15): a name is
//! taken off the key *before* PostgreSQL stops waiting for it, and put on the key only *after* PostgreSQL waits for it and
//! it has caught up with what was committed before that.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use trunkline_common::dcs::codec;
use trunkline_common::dcs::store::SyncWrite;
use trunkline_common::{ClusterView, Lsn, MemberName, Revision};
use trunkline_config::dynamic::SynchronousMode;
use trunkline_config::tags;

use super::quorum::{self, Names, Quorum};
use super::situation::replicates_from;
use crate::postgres::{Running, WalSender};

/// Stands in `synchronous_standby_names` where strict mode has nobody to name: commits wait (Patroni's name for it).
pub const STRICT_PLACEHOLDER: &str = "__patroni_strict_sync_replica_placeholder__";

/// The state of a member whose data directory is about to be replaced by a copy, or is being replaced.
pub const BEING_COPIED: &str = "creating replica";

/// `synchronous_standby_names` of strict mode where nobody can be named.
pub fn strict_placeholder() -> String {
    quoted(STRICT_PLACEHOLDER)
}

/// The next single step towards the wanted state.
#[derive(Debug, Clone, PartialEq)]
pub enum SyncStep {
    /// Write the `sync` key, if it still is what was read.
    Key(SyncWrite, String),
    /// Set `synchronous_standby_names`.
    Names(String, String),
}

/// What a node writes to `sync` as it becomes leader: itself, and in strict mode the standbys that it will wait for; also
/// where the key says just that, so that nothing older can be carried out any more (see [`settle`]). `None`: nothing to
/// write, or written with the leader key.
pub fn on_promotion(view: &ClusterView, me: &MemberName) -> Option<SyncWrite> {
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return (view.sync.revision.0 != 0).then(|| SyncWrite::new(view, None));
    }
    if view.settings.synchronous_mode == SynchronousMode::Quorum && view.sync.is_active() {
        // The same votes, and the one before is one of the voters now. Left as it was, the key would say that the one
        // before has every commit, which ends with the first commit of this one.
        let others: Vec<String> = before(view).into_iter().filter(|name| !me.matches(name)).collect();
        let unchanged = view.sync.leader.as_ref() == Some(me) && written_in_this_reign(view);
        let value = || key(me.as_str(), view.sync.quorum as usize, &others);
        return (!unchanged).then(|| SyncWrite::new(view, Some(value())));
    }
    // What mode `quorum` left behind: not each of those named has every commit.
    let by_votes = view.sync.quorum > 0;
    let standbys = if by_votes { Vec::new() } else { inherited(view, me) };
    let unchanged =
        view.sync.leader.as_ref() == Some(me) && view.sync.standbys == standbys && written_in_this_reign(view);
    (!unchanged).then(|| SyncWrite::new(view, Some(key(me.as_str(), 0, &standbys))))
}

fn written_in_this_reign(view: &ClusterView) -> bool {
    view.leader.as_ref().is_some_and(|leader| leader.created <= view.sync.revision)
}

/// What settles the `sync` key where commits wait by it; `None` where nothing is promised.
pub fn settle(view: &ClusterView) -> Option<SyncWrite> {
    again(view).filter(|_| view.settings.synchronous_mode != SynchronousMode::Off && view.sync.leader.is_some())
}

/// The `sync` key as it is, to be written once more: a write whose answer never came names the revision that it was to
/// replace, and comes to nothing after this one. Otherwise it might add to the key, much later, somebody whom a server that
/// is started by the key of now does not wait for. `None` where there is no key.
pub fn again(view: &ClusterView) -> Option<SyncWrite> {
    let sync = &view.sync;
    let value = codec::encode_sync(sync.leader.as_ref(), sync.quorum, &sync.standbys);
    (sync.revision > Revision(0)).then(|| SyncWrite::new(view, Some(value)))
}

/// `synchronous_standby_names` at the moment of promotion: whom the first commits wait for.
pub fn names_on_promotion(view: &ClusterView, me: &MemberName, configured: &str) -> String {
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return configured.to_owned();
    }
    if view.settings.synchronous_mode == SynchronousMode::Quorum {
        return any_on_promotion(view, me);
    }
    let standbys = inherited(view, me);
    match standbys.is_empty() && view.settings.synchronous_mode_strict {
        true => strict_placeholder(),
        false => names_text(&standbys),
    }
}

/// In mode `quorum`: of those who could have voted, as many have to confirm as leave no majority without one of them.
fn any_on_promotion(view: &ClusterView, me: &MemberName) -> String {
    let before = before(view);
    let others: Names = before.iter().filter(|name| !me.matches(name)).cloned().collect();
    let outsider = usize::from(others.len() == before.len());
    let count = (before.len() + outsider).saturating_sub(view.sync.quorum as usize + 1);
    any_or_strict(view, count, &others)
}

/// Everybody on the key, its owner too.
fn before(view: &ClusterView) -> Names {
    let names = view.sync.standbys.iter().chain(view.sync.leader.iter().map(|leader| &leader.0));
    if view.sync.is_active() { names.cloned().collect() } else { Names::new() }
}

/// `ANY count (names)`; in strict mode somebody has to confirm, whoever it may be.
fn any_or_strict(view: &ClusterView, count: usize, names: &Names) -> String {
    let strict = view.settings.synchronous_mode_strict;
    match (names.is_empty(), strict) {
        (true, true) => any_text(1, &Names::from([STRICT_PLACEHOLDER.to_owned()])),
        (true, false) => String::new(),
        (false, _) => any_text(count.max(usize::from(strict)).min(names.len()), names),
    }
}

/// `synchronous_standby_names` for a primary that comes back in place: everybody on the key is waited for, because
/// everybody on the key may be promoted.
pub fn names_in_key(view: &ClusterView, me: &MemberName, configured: &str) -> String {
    if view.settings.synchronous_mode == SynchronousMode::Off {
        return configured.to_owned();
    }
    if view.settings.synchronous_mode == SynchronousMode::Quorum {
        return match view.sync.leader.as_ref() == Some(me) {
            true => {
                let voters: Names = view.sync.standbys.iter().cloned().collect();
                any_or_strict(view, voters.len().saturating_sub(view.sync.quorum as usize), &voters)
            }
            false => any_on_promotion(view, me),
        };
    }
    match view.sync.standbys.is_empty() && view.settings.synchronous_mode_strict {
        true => strict_placeholder(),
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
        Some(SyncStep::Key(SyncWrite::new(view, Some(key(me.as_str(), 0, standbys))), why))
    };
    let set = |names: String, why: String| (names != in_force).then_some(SyncStep::Names(names, why));

    if settings.synchronous_mode == SynchronousMode::Off {
        if sync.revision.0 != 0 {
            let gone = SyncWrite::new(view, None);
            return Some(SyncStep::Key(gone, "synchronous mode is off".to_owned()));
        }
        return set(configured.to_owned(), "synchronous mode is off".to_owned());
    }
    if settings.synchronous_mode == SynchronousMode::Quorum && sync.is_active() {
        return quorum_step(view, running, since, me);
    }
    if sync.leader.as_ref() != Some(me) {
        return write(&[], "this node leads now".to_owned());
    }

    // What mode `quorum` left behind: not each of those named has every commit.
    let by_votes = sync.quorum > 0;
    let all_confirm = InForce::parse(in_force).all_confirm();
    let listed = if by_votes { &[] } else { sync.standbys.as_slice() };
    let active = active(view, running, me);
    let anew = |name: &String| made_anew(view, name);
    if active.is_empty() && settings.synchronous_mode_strict && sync.standbys.iter().any(anew) {
        let (lost, kept): (Vec<String>, Vec<String>) = listed.iter().cloned().partition(anew);
        return write(&kept, format!("{} is made anew", lost.join(", ")));
    }
    if active.is_empty() && settings.synchronous_mode_strict {
        // Nobody can confirm, and commits shall wait: keep waiting for those that were synchronous, so that the first
        // one to come back is enough.
        let names = if sync.standbys.is_empty() { strict_placeholder() } else { names_text(&sync.standbys) };
        return set(names, "no standby can confirm commits, and synchronous_mode_strict is set".to_owned());
    }
    let confirmed: Vec<String> = active
        .iter()
        .filter(|sender| all_confirm && waits_for(in_force, sender) && caught_up(listed, since, sender))
        .map(|sender| member_name(view, sender))
        .collect();
    let active: Vec<String> = active.iter().map(|sender| member_name(view, sender)).collect();

    let kept: Vec<String> = sync.standbys.iter().filter(|name| confirmed.contains(name)).cloned().collect();
    if kept.len() < sync.standbys.len() || by_votes {
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

/// Whether what a member had is gone, and with it what the `sync` key says of it.
fn made_anew(view: &ClusterView, name: &str) -> bool {
    view.members.iter().any(|(member, m)| member.matches(name) && m.state == BEING_COPIED)
}

/// The next step in mode `quorum`; this node or its predecessor is on the key.
fn quorum_step(
    view: &ClusterView,
    running: &Running,
    since: &BTreeMap<String, Lsn>,
    me: &MemberName,
) -> Option<SyncStep> {
    let (settings, sync) = (&view.settings, &view.sync);
    let text = running.synchronous_standby_names.as_str();
    let set = |names: String, why: &str| (names != text).then(|| SyncStep::Names(names, why.to_owned()));
    let voters: Names = sync.standbys.iter().cloned().collect();
    let active = active(view, running, me);
    let ours = sync.leader.as_ref() == Some(me);
    let (lost, kept): (Vec<String>, Vec<String>) = voters.iter().cloned().partition(|name| made_anew(view, name));
    if active.is_empty() && ours && settings.synchronous_mode_strict && !lost.is_empty() {
        // A commit may be with those alone: of the others as many have to agree as before. Where there are not as many, nobody
        // is known to have every commit.
        let (quorum, kept) = if sync.quorum as usize >= kept.len() { (0, Vec::new()) } else { (sync.quorum, kept) };
        let write = SyncWrite::new(view, Some(key(me.as_str(), quorum as usize, &kept)));
        return Some(SyncStep::Key(write, format!("{} is made anew", lost.join(", "))));
    }
    if active.is_empty() && ours && settings.synchronous_mode_strict {
        let count = voters.len().saturating_sub(sync.quorum as usize);
        let why = "no standby can confirm commits, and synchronous_mode_strict is set";
        return set(any_or_strict(view, count, &voters), why);
    }
    if active.is_empty() && ours && voters.is_empty() {
        return set(String::new(), "no standby can confirm commits");
    }
    let in_force = InForce::parse(text);
    let confirms = |sender: &&&WalSender| waits_for(text, sender) && caught_up(&[], since, sender);
    let confirmed = active.iter().filter(confirms).count();
    let state = Quorum {
        leader: sync.leader.as_ref().map_or_else(|| me.0.clone(), |leader| leader.0.clone()),
        quorum: sync.quorum as usize,
        voters,
        count: in_force.count,
        names: in_force.names.iter().map(|name| spelled(view, name)).collect(),
        confirmed,
        active: active.iter().map(|sender| member_name(view, sender)).collect(),
        wanted: settings.synchronous_node_count,
        me: me.0.clone(),
    };
    match quorum::steps(&state).into_iter().next() {
        Some(quorum::Step::Key { leader, quorum, voters }) => {
            let list: Vec<String> = voters.into_iter().collect();
            let why = format!("Setting leader to {leader}, quorum to {quorum} of ({})", list.join(", "));
            let write = SyncWrite::new(view, Some(key(&leader, quorum, &list)));
            Some(SyncStep::Key(write, why))
        }
        Some(quorum::Step::Names { count, names }) => set(any_text(count, &names), "quorum commit"),
        Some(quorum::Step::Wait) => None,
        None if in_force.any => None,
        None => set(any_text(in_force.count, &state.names), "any of them may confirm"),
    }
}

/// Whether `standby` is on the `sync` key of whoever leads: commits may wait for it.
pub fn counts_on(view: &ClusterView, standby: &MemberName) -> bool {
    let leader = view.leader.as_ref().map(|leader| &leader.name);
    let synchronous = view.settings.synchronous_mode != SynchronousMode::Off;
    synchronous
        && leader.is_some_and(|leader| leader != standby)
        && view.sync.leader.as_ref() == leader
        && view.sync.lists(standby)
}

/// Whether the `sync` key says that `member` has every commit.
pub fn promises(view: &ClusterView, member: &MemberName) -> bool {
    view.settings.synchronous_mode != SynchronousMode::Off && view.sync.includes(member)
}

/// Whether nobody can come to count on what `member` had: the `sync` key does not, and its member key says what becomes of it.
pub fn is_forgone(view: &ClusterView, member: &MemberName) -> bool {
    !promises(view, member) && made_anew(view, &member.0)
}

/// Whether strict mode makes commits wait for somebody who is not there.
pub fn waits_in_vain(view: &ClusterView, running: &Running, me: &MemberName) -> bool {
    let settings = &view.settings;
    settings.synchronous_mode != SynchronousMode::Off
        && settings.synchronous_mode_strict
        && view.sync.leader.as_ref() == Some(me)
        && active(view, running, me).is_empty()
}

/// Whether a commit waits for each of the names in this value of `synchronous_standby_names`.
pub fn all_confirm(in_force: &str) -> bool {
    InForce::parse(in_force).all_confirm()
}

/// A value of `synchronous_standby_names`.
struct InForce {
    /// `ANY`: whoever is first.
    any: bool,
    count: usize,
    names: Vec<String>,
}

impl InForce {
    fn parse(text: &str) -> Self {
        let mut names = crate::postgres::standby_names(text);
        // Nobody is called that.
        names.retain(|name| name != STRICT_PLACEHOLDER && name != "*");
        let method = text.split_once('(').map_or("", |(method, _)| method);
        let count = method.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(1);
        let any = names.is_empty() || method.trim_start().to_ascii_lowercase().starts_with("any");
        Self { any, count: usize::min(count, names.len()), names }
    }

    /// Whether a commit waits for each of the names.
    fn all_confirm(&self) -> bool {
        self.count == self.names.len()
    }
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
    let may_lead = |sender: &WalSender| {
        view.members.iter().any(|(name, member)| name.matches(&sender.application_name) && !member.nofailover())
    };
    let mut senders: Vec<&WalSender> = running.replication.iter().filter(eligible).collect();
    let streaming: Names = senders.iter().map(|sender| member_name(view, sender)).collect();
    senders.retain(|sender| !cascades(view, me, &member_name(view, sender), &streaming));
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
        // Those that can't be promoted come last: alone on the list, they would leave nobody to lead after this node.
        (!may_lead(sender), std::cmp::Reverse(key), sender.application_name.clone())
    });
    // A standby that reconnects has two senders for a moment.
    let mut seen = Vec::new();
    senders.retain(|sender| {
        let name = sender.application_name.to_lowercase();
        let new = !seen.contains(&name);
        seen.push(name);
        new
    });
    // In mode `quorum` everybody may confirm, but those that can't be promoted only where there are too few of the others.
    let electors = senders.iter().filter(|sender| may_lead(sender)).count();
    let all = if settings.synchronous_mode == SynchronousMode::Quorum { electors } else { 0 };
    senders.truncate(settings.synchronous_node_count.max(1).max(all));
    senders
}

/// Whether a standby is to stream from another one (`replicatefrom`), by however many in between, that is one of
/// `streaming`: it is on its way there, and nobody here will hear of what it has.
fn cascades(view: &ClusterView, me: &MemberName, standby: &str, streaming: &Names) -> bool {
    let feeds = |from: &MemberName| {
        let member = view.members.get(from);
        from != me && member.is_some_and(|member| member.is_running() && !member.nosync())
    };
    let from = |name: &MemberName| replicates_from(view, name, &view.members.get(name)?.tags).filter(feeds);
    let mut way = std::iter::successors(from(&standby.into()), from).take(view.members.len());
    way.any(|name| streaming.contains(name.as_str()))
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
    spelled(view, &sender.application_name)
}

fn spelled(view: &ClusterView, name: &str) -> String {
    let member = view.members.keys().find(|member| member.matches(name));
    let listed = || view.sync.standbys.iter().find(|listed| listed.eq_ignore_ascii_case(name)).cloned();
    member.map(|member| member.0.clone()).or_else(listed).unwrap_or_else(|| name.to_owned())
}

/// Whether `synchronous_standby_names` mentions a standby.
pub fn mentions(names: &str, standby: &str) -> bool {
    crate::postgres::standby_names(names).iter().any(|name| name.eq_ignore_ascii_case(standby))
}

/// The `sync` key's value. `quorum` is 0 in mode `on`: each listed node has everything.
fn key(leader: &str, quorum: usize, standbys: &[String]) -> Value {
    let mut sorted = standbys.to_vec();
    sorted.sort();
    let listed = if sorted.is_empty() { Value::Null } else { Value::from(sorted.join(",")) };
    json!({ "leader": leader, "quorum": quorum, "sync_standby": listed })
}

/// The text of `synchronous_standby_names` where any `count` of the names are enough. PostgreSQL takes no 0 there, neither at its start
/// nor later.
fn any_text(count: usize, names: &Names) -> String {
    if names.is_empty() || count == 0 {
        return String::new();
    }
    format!("ANY {count} ({})", names.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(","))
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
mod states;
#[cfg(test)]
mod tests;
