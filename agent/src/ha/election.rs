//! Who may lead when nobody does, and who could take over when somebody is to step down. Pure.
//!
//! The rules are Patroni's (ha-loop §8), so that mixed clusters elect the same node. Positions are compared as bytes of
//! WAL received or replayed; a member that can't be asked doesn't count, whatever the DCS says of it.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use trunkline_common::cluster::Initialize;
use trunkline_common::{ClusterView, Lsn, Member, MemberName, TimelineId};
use trunkline_config::dynamic::SynchronousMode;

use super::situation::{PeerAnswers, Situation};
use crate::peer::PeerStatus;
use crate::postgres::PgStatus;

/// The keys that say who may lead.
const BY_WHICH_TO_LEAD: [&str; 4] = ["failsafe", "history", "status", "sync"];

/// The answer to "may this node lead now?", with the numbers compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may try to take the key.
    Race(String),
    /// It must not.
    Yield(String),
    /// It depends on these members (name → `api_url`): ask them, then decide again.
    Ask(BTreeMap<MemberName, String>),
}

/// Whether this node may race for the leader key (ha-loop §8.2); the view has no leader. Nobody races beside a leader that
/// has lost its key and does not know yet: who has left the DCS is asked as well, by the way or, where nothing else is in doubt,
/// alone.
pub fn may_race(s: &Situation, view: &ClusterView) -> Verdict {
    let gone = gone(s, view);
    match (by_the_rules(s, view), s.peers) {
        (Verdict::Ask(members), _) => Verdict::Ask(members.into_iter().chain(gone).collect()),
        (Verdict::Race(_), None) if !gone.is_empty() => Verdict::Ask(gone),
        (Verdict::Race(why), Some(peers)) => {
            let primary = |name: &&MemberName| answer(peers, name).is_some_and(|peer| !peer.in_recovery);
            let holds_key = |name: &&MemberName| answer(peers, name).is_some_and(|peer| peer.holds_key);
            if let Some(name) = gone.keys().find(primary) {
                return Verdict::Yield(still_primary(name));
            }
            match peers.keys().find(holds_key) {
                Some(name) => Verdict::Yield(format!("{name} has the leader key, as far as it knows")),
                None => Verdict::Race(why),
            }
        }
        (verdict, _) => verdict,
    }
}

/// Whether somebody was promoted since this node led, whose server takes no writes, though the leader key bears its name: the
/// key may be that of a backup. The DCS may not know it (yet), so every member is asked, also who could not lead. `None`: not
/// that anybody knows.
pub fn overtaken(s: &Situation, view: &ClusterView) -> Option<Verdict> {
    let own = match s.pg {
        PgStatus::Stopped(control) => Some(control.timeline),
        _ => s.timeline(),
    };
    let outside = view.settings.standby_cluster.is_some();
    let own = own.filter(|_| !s.is_primary() && !outside && !view.settings.pause)?;
    if is_left_behind(Some(own), view) {
        return Some(Verdict::Yield(left_behind(Some(own), view)));
    }
    let Some(peers) = s.peers else {
        let others = view.members.iter().filter(|(name, _)| **name != s.me.name);
        let others = others.filter_map(|(name, member)| Some((name.clone(), member.api_url.clone()?)));
        return Some(Verdict::Ask(others.collect())).filter(|ask| *ask != Verdict::Ask(BTreeMap::new()));
    };
    let later = |(name, peer): (&MemberName, &Option<PeerStatus>)| {
        let theirs = peer.as_ref()?.timeline.filter(|theirs| *theirs > own)?;
        Some(Verdict::Yield(format!("{name} is on timeline {theirs}, this node on {own}")))
    };
    peers.iter().find_map(later)
}

fn by_the_rules(s: &Situation, view: &ClusterView) -> Verdict {
    let settings = &view.settings;
    let Some(running) = s.running() else {
        return Verdict::Yield("PostgreSQL is not running here".to_owned());
    };
    if s.memory.abstain_until.is_some_and(|until| s.now < until) {
        return Verdict::Yield("this node has just given the leader key back".to_owned());
    }
    if view.initialize == Initialize::Running {
        return Verdict::Yield("another member is bootstrapping the cluster".to_owned());
    }
    if !is_in_failsafe(view, &s.me.name) {
        return Verdict::Yield("not in the failsafe key, so a leader without DCS would not ask this node".to_owned());
    }
    let unknown = BY_WHICH_TO_LEAD.iter().find(|key| view.unknown.contains(**key));
    if let Some(key) = unknown {
        return Verdict::Yield(format!(
            "the {key} key is malformed, and this agent has not seen a good one: mend or delete it"
        ));
    }
    let asked_for = view.failover.as_ref().filter(|request| request.scheduled_at.is_none());
    if settings.pause && asked_for.is_none() {
        return match s.is_primary() {
            // Somebody else was promoted beside it: that one has what clients were told since.
            true if is_left_behind(running.timeline, view) => Verdict::Yield(left_behind(running.timeline, view)),
            true => Verdict::Race("paused, and this node runs as primary".to_owned()),
            false => Verdict::Yield("the cluster is paused".to_owned()),
        };
    }
    if let Some(why) = &s.memory.must_not_lead {
        return Verdict::Yield(format!("the watchdog is required and does not work: {why}"));
    }
    if s.me.failover_priority() <= 0 {
        return Verdict::Yield("following a different leader because I am not allowed to promote".to_owned());
    }
    let manual = asked_for.filter(|request| request.leader.is_none());
    if manual.is_some_and(|request| request.candidate.as_ref() == Some(&s.me.name)) {
        // An operator's word, also for a node outside the synchronous set or on an older timeline: that is what `failover`
        // is for.
        return Verdict::Race("a failover to this node was requested".to_owned());
    }
    if is_left_behind(running.timeline, view) {
        return Verdict::Yield(left_behind(running.timeline, view));
    }
    if let Some(later) = s.memory.overtaken_by.filter(|later| running.timeline.unwrap_or_default() < *later) {
        let own = running.timeline.unwrap_or_default();
        return Verdict::Yield(format!("this node is on timeline {own}, and somebody was on {later}"));
    }
    let quorum = settings.synchronous_mode == SynchronousMode::Quorum;
    let synchronous = settings.synchronous_mode != SynchronousMode::Off && view.sync.is_active();
    if synchronous && !quorum && !view.sync.includes(&s.me.name) {
        return Verdict::Yield(format!(
            "not among the synchronous nodes ({}), so commits could be missing here",
            sync_names(view)
        ));
    }
    if s.is_primary() {
        return Verdict::Race("this node already runs as primary".to_owned());
    }
    // Also for a switchover, maybe one of next week: whoever leads may have died before it stepped down.
    if is_far_behind(s.lsn(), view) {
        return Verdict::Yield(format!(
            "{} bytes behind the last position of the leader ({}), more than maximum_lag_on_failover allows ({})",
            s.lsn().lag_behind(view.status.optime),
            view.status.optime,
            settings.maximum_lag_on_failover
        ));
    }
    if let Some(request) = &view.failover {
        let verdict = requested(s, view, request.candidate.as_ref(), request.leader.as_ref(), synchronous);
        // Who was asked for may not have been there to the end: a request is no vote.
        return if synchronous && by_votes(view) { with_votes(s, view, verdict) } else { verdict };
    }
    healthiest(s, view, synchronous, |_| true)
}

/// A race that an operator asked for (ha-loop §8.3).
fn requested(
    s: &Situation,
    view: &ClusterView,
    candidate: Option<&MemberName>,
    old_leader: Option<&MemberName>,
    synchronous: bool,
) -> Verdict {
    if candidate == Some(&s.me.name) {
        return Verdict::Race("a switchover to this node was requested".to_owned());
    }
    if s.memory.unfulfilled.is_some_and(|(_, since)| s.now.since(since) > view.settings.ttl) && !view.settings.pause {
        // Checking out is one thing and being promoted another: from here on it is anybody's.
        return healthiest(s, view, synchronous, |_| true);
    }
    if let Some(candidate) = candidate {
        if view.settings.pause {
            return Verdict::Yield(format!("paused, and {candidate} is the requested candidate"));
        }
        // A candidate outside the synchronous set or the failsafe key won't race, so nobody must wait for it; into the former
        // an operator's failover leads.
        let may =
            (!synchronous || view.sync.includes(candidate) || old_leader.is_none()) && is_in_failsafe(view, candidate);
        if let Some(api_url) = view.members.get(candidate).filter(|_| may).and_then(|member| member.api_url.clone()) {
            let Some(peers) = s.peers else {
                let mut ask = electorate(s, view, synchronous);
                ask.insert(candidate.clone(), api_url);
                return Verdict::Ask(ask);
            };
            // An operator's failover asks for a node whatever it lacks.
            let near = |peer: &PeerStatus| old_leader.is_none() || !is_far_behind(peer.lsn, view);
            if answer(peers, candidate).is_some_and(|peer| can_lead(peer, view) && near(peer)) {
                return Verdict::Yield(format!("{candidate} is the requested candidate"));
            }
        }
        // The candidate can't: anybody healthy may (otherwise a typo would leave the cluster without a leader).
        return healthiest(s, view, synchronous, |name| Some(name) != old_leader);
    }
    if view.settings.pause {
        return Verdict::Yield("paused, and the request names no candidate".to_owned());
    }
    if old_leader == Some(&s.me.name) {
        let Some(peers) = s.peers else {
            let ask = electorate(s, view, synchronous);
            return if ask.is_empty() { Verdict::Race("nobody else could lead".to_owned()) } else { Verdict::Ask(ask) };
        };
        return match peers.iter().find(|(_, status)| status.as_ref().is_some_and(|peer| can_lead(peer, view))) {
            Some((name, _)) => Verdict::Yield(format!("was asked to step down, and {name} can lead")),
            None => Verdict::Race("was asked to step down, but nobody else can lead".to_owned()),
        };
    }
    healthiest(s, view, synchronous, |name| Some(name) != old_leader)
}

/// Whether no other member that counts is a better choice (ha-loop §8.2, common check).
fn healthiest(s: &Situation, view: &ClusterView, synchronous: bool, counts: impl Fn(&MemberName) -> bool) -> Verdict {
    let electorate = electorate(s, view, synchronous);
    let Some(peers) = s.peers else {
        if !electorate.is_empty() {
            return Verdict::Ask(electorate);
        }
        return if synchronous && by_votes(view) {
            quorum(s, view, &PeerAnswers::new())
        } else {
            Verdict::Race("no other member could lead".to_owned())
        };
    };
    let quorum_mode = synchronous && by_votes(view);
    let (own, priority) = (s.lsn(), s.me.failover_priority());
    // Whoever is as far as this node gets as many as it would; only the former leader needs none.
    let (confirming, needed) = votes(s, view, peers);
    let gets_votes = confirming >= needed;
    for name in electorate.keys().filter(|name| counts(name)) {
        let Some(peer) = answer(peers, name) else { continue };
        if !peer.in_recovery {
            return Verdict::Yield(still_primary(name));
        }
        if !can_lead(peer, view) {
            continue;
        }
        match timelines(peer, s) {
            Ordering::Less => continue,
            Ordering::Equal => {}
            // It would not lead either.
            Ordering::Greater if is_far_behind(peer.lsn, view) => continue,
            Ordering::Greater => {
                let [theirs, ours] = [peer.timeline, s.timeline()].map(Option::unwrap_or_default);
                return Verdict::Yield(format!("{name} is on timeline {theirs}, this node on {ours}"));
            }
        }
        let former_leader = synchronous && view.sync.leader.as_ref() == Some(name);
        if peer.lsn > own && !former_leader {
            return Verdict::Yield(format!(
                "Wal position of {name} is ahead of my wal position ({} > {own})",
                peer.lsn
            ));
        }
        if peer.lsn == own
            && peer.failover_priority > priority
            && !former_leader
            && (!quorum_mode || view.sync.lists(name) && gets_votes)
        {
            return Verdict::Yield(format!(
                "{name} has equally tolerable WAL position and priority {}, while this node has priority {priority}",
                peer.failover_priority
            ));
        }
    }
    if quorum_mode {
        return quorum(s, view, peers);
    }
    if electorate.is_empty() {
        // Only who is gone from the DCS was asked.
        return Verdict::Race("no other member could lead".to_owned());
    }
    let said = |name: &MemberName| match answer(peers, name) {
        Some(peer) if promotable(peer) => format!("{name} is at {}", peer.lsn),
        Some(_) => format!("{name} may not be promoted"),
        None => format!("{name} did not answer"),
    };
    let said: Vec<String> = electorate.keys().map(said).collect();
    Verdict::Race(format!("at {own} with priority {priority}; nobody is a better choice ({})", said.join(", ")))
}

/// Nobody races without votes.
fn with_votes(s: &Situation, view: &ClusterView, verdict: Verdict) -> Verdict {
    match (&verdict, s.peers) {
        (Verdict::Race(_), Some(peers)) => quorum(s, view, peers),
        (Verdict::Race(_), None) => {
            let ask = electorate(s, view, true);
            if ask.is_empty() { quorum(s, view, &PeerAnswers::new()) } else { Verdict::Ask(ask) }
        }
        _ => verdict,
    }
}

/// The vote of quorum commit: a node that is not certain to have every commit needs others that are not ahead of it.
fn quorum(s: &Situation, view: &ClusterView, peers: &PeerAnswers) -> Verdict {
    let (own, (confirming, needed)) = (s.lsn(), votes(s, view, peers));
    if confirming >= needed || view.sync.leader.as_ref() == Some(&s.me.name) {
        return Verdict::Race(format!("at {own}; {confirming} of {needed} votes needed"));
    }
    let reading = voters(view, peers).filter(|(_, peer)| peer.reads_own_wal).map(|(name, _)| name.as_str());
    let reading = reading.collect::<Vec<_>>().join(", ");
    let without = match reading.is_empty() {
        true => String::new(),
        false => format!("; none of {reading} until it has replayed what is on its disk"),
    };
    Verdict::Yield(format!("at {own}; only {confirming} of {needed} votes needed{without}"))
}

/// How many confirm that they are not ahead of this node, and how many it takes. Who has just been started may have more on its
/// disk than it knows of.
fn votes(s: &Situation, view: &ClusterView, peers: &PeerAnswers) -> (usize, usize) {
    let not_ahead = |peer: &PeerStatus| match timelines(peer, s) {
        Ordering::Less => true,
        Ordering::Equal => peer.lsn <= s.lsn(),
        Ordering::Greater => false,
    };
    let confirms = |peer: &PeerStatus| peer.lsn.is_valid() && !peer.reads_own_wal && not_ahead(peer);
    let confirming = voters(view, peers).filter(|(_, peer)| confirms(peer)).count();
    (confirming, view.sync.quorum as usize + usize::from(!view.sync.includes(&s.me.name)))
}

/// The members of the synchronous set that answered.
fn voters<'p>(view: &'p ClusterView, peers: &'p PeerAnswers) -> impl Iterator<Item = (&'p MemberName, &'p PeerStatus)> {
    let answered = peers.iter().filter_map(|(name, status)| Some((name, status.as_ref()?)));
    answered.filter(|(name, _)| view.sync.includes(name))
}

/// Whether somebody could take over from a leader that runs or ran here (ha-loop §8.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Takeover {
    /// At least this member can; with its position.
    Possible(String),
    /// Nobody can; the words say why.
    Impossible(String),
    /// It depends on these members: ask them.
    Ask(BTreeMap<MemberName, String>),
}

/// Whether another member can lead: the candidate, if there is one, else anybody. `manual` failovers (no leader named)
/// may go to nodes outside the synchronous set, because an operator said so.
pub fn takeover(s: &Situation, view: &ClusterView, candidate: Option<&MemberName>, manual: bool) -> Takeover {
    if let Some(until) = s.promised_until.filter(|until| s.now < *until) {
        let left = until.since(s.now);
        return Takeover::Impossible(format!("the others have promised not to lead for another {left:.1?}"));
    }
    let synchronous = view.settings.synchronous_mode != SynchronousMode::Off && view.sync.is_active() && !manual;
    let mut ask = electorate(s, view, synchronous);
    if let Some(candidate) = candidate {
        ask.retain(|name, _| name == candidate);
    }
    if ask.is_empty() {
        let who = candidate.map_or("no member".to_owned(), |name| format!("{name} is not a member that"));
        let which =
            if synchronous { format!(" of the synchronous nodes ({})", sync_names(view)) } else { String::new() };
        return Takeover::Impossible(format!("{who}{which} could take over"));
    }
    let Some(peers) = s.peers else { return Takeover::Ask(ask) };
    let end = s.lsn().max(view.status.optime);
    let mut why = Vec::new();
    // Whoever takes over needs votes besides its own.
    let mut votes = if synchronous && candidate.is_none() && by_votes(view) { view.sync.quorum as usize } else { 0 };
    for name in ask.keys() {
        let Some(peer) = answer(peers, name) else {
            why.push(format!("{name} did not answer"));
            continue;
        };
        let lag = peer.lsn.lag_behind(end);
        let behind = is_left_behind(peer.timeline, view);
        if !promotable(peer) {
            why.push(format!("{name} may not be promoted"));
        } else if lag > view.settings.maximum_lag_on_failover {
            let allowed = view.settings.maximum_lag_on_failover;
            why.push(format!("{name} is {lag} bytes behind, {allowed} are allowed"));
        } else if behind {
            let known = view.timeline().unwrap_or_default();
            why.push(format!("{name} is on timeline {}, not {known}", peer.timeline.unwrap_or_default()));
        } else if votes > 0 {
            votes -= 1;
            why.push(format!("{name} needs more votes"));
        } else {
            return Takeover::Possible(format!("{name} (at {}, {lag} bytes behind)", peer.lsn));
        }
    }
    Takeover::Impossible(why.join(", "))
}

/// The members whose word counts: not this node, reachable by REST, allowed to lead (or voting), and in the synchronous
/// set where there is one.
fn electorate(s: &Situation, view: &ClusterView, synchronous: bool) -> BTreeMap<MemberName, String> {
    let quorum = by_votes(view);
    let counts = |(name, member): (&MemberName, &Member)| {
        let votes = synchronous && quorum && view.sync.includes(name);
        let may = is_in_failsafe(view, name) && (!synchronous || view.sync.includes(name));
        let eligible = (!member.nofailover() || votes) && may;
        (*name != s.me.name && eligible).then(|| Some((name.clone(), member.api_url.clone()?)))?
    };
    view.members.iter().filter_map(counts).collect()
}

/// Who may run as primary although its keys are gone from the DCS (name → `api_url`): the leader as it was last seen, whose lease
/// may have been revoked before its time, the one that `sync` names, which this node may not have seen lead, and who is on the
/// failsafe key. For as long as a lease may last; whoever does not answer, or does not run as primary, is not waited for.
fn gone(s: &Situation, view: &ClusterView) -> BTreeMap<MemberName, String> {
    if s.memory.leaderless_since.is_none_or(|since| s.now.since(since) >= view.settings.ttl) {
        return BTreeMap::new();
    }
    let leaders = s.memory.former_leader.iter().chain(&view.sync.leader);
    let seen = leaders.filter_map(|leader| s.memory.apis.get_key_value(leader));
    let known = view.failsafe.iter().flatten().chain(seen);
    let gone = known.filter(|(name, _)| **name != s.me.name && !view.members.contains_key(*name));
    gone.map(|(name, url)| (name.clone(), url.clone())).collect()
}

fn still_primary(name: &MemberName) -> String {
    format!("{name} still runs as primary")
}

/// Whether a node that is on the key may lack commits, and needs the word of others: in mode `quorum`, and after it until the
/// key has been written anew.
fn by_votes(view: &ClusterView) -> bool {
    view.settings.synchronous_mode == SynchronousMode::Quorum || view.sync.quorum > 0
}

/// Whether a leader without DCS would ask this member for its word, where failsafe mode is in use: nobody else may lead.
fn is_in_failsafe(view: &ClusterView, name: &MemberName) -> bool {
    view.failsafe.as_ref().is_none_or(|members| members.is_empty() || members.contains_key(name))
}

fn answer<'p>(peers: &'p PeerAnswers, name: &MemberName) -> Option<&'p PeerStatus> {
    peers.get(name)?.as_ref()
}

/// Whether a node on `timeline` has missed a promotion that the cluster knows of. Also without `check_timeline`, where
/// Patroni promotes such a node: what was written since would be lost without anybody's word.
pub(super) fn is_left_behind(timeline: Option<TimelineId>, view: &ClusterView) -> bool {
    let known = view.timeline().filter(|known| *known > TimelineId(1) || view.settings.check_timeline);
    // The timelines of a standby cluster are made elsewhere.
    view.settings.standby_cluster.is_none() && timeline.unwrap_or_default() < known.unwrap_or_default()
}

/// Whether a node at `lsn` lacks more of what the last leader had than an asynchronous failover may lose.
fn is_far_behind(lsn: Lsn, view: &ClusterView) -> bool {
    lsn.lag_behind(view.status.optime) > view.settings.maximum_lag_on_failover
}

fn left_behind(timeline: Option<TimelineId>, view: &ClusterView) -> String {
    let (own, known) = (timeline.unwrap_or_default(), view.timeline().unwrap_or_default());
    format!("this node is on timeline {own}, the cluster is on {known}")
}

/// Whose WAL counts whatever the positions say: who is on a later timeline has followed a promotion that the other has
/// missed, also where nobody has lived to write it into the `history` key, and what the other has written since belongs to
/// nobody.
fn timelines(peer: &PeerStatus, s: &Situation) -> Ordering {
    peer.timeline.zip(s.timeline()).map_or(Ordering::Equal, |(theirs, ours)| theirs.cmp(&ours))
}

/// Whether a member that answered so may take the leader key.
fn can_lead(peer: &PeerStatus, view: &ClusterView) -> bool {
    promotable(peer) && !is_left_behind(peer.timeline, view)
}

fn promotable(peer: &PeerStatus) -> bool {
    peer.in_recovery && peer.failover_priority > 0 && !peer.watchdog_failed && peer.lsn > Lsn::INVALID
}

fn sync_names(view: &ClusterView) -> String {
    let leader = view.sync.leader.iter().map(MemberName::as_str);
    leader.chain(view.sync.standbys.iter().map(String::as_str)).collect::<Vec<_>>().join(", ")
}
