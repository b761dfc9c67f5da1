//! Which servers a port's sessions may go to, and why not to the others. Pure.
//!
//! The same judgement serves new sessions, `/routes`, `/why` and the log, so they can't disagree.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use trunkline_common::{Instant, MemberName};
use trunkline_config::router::{Lag, NoCandidate, Port, Target};

use crate::table::{Backend, Certainty, RouteTable};

/// What a port makes of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// New sessions may go to it.
    Candidate,
    /// So they may because there is no candidate.
    Substitute,
    /// They may not.
    No(Reason),
}

/// Why a server is no candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// No port sends sessions to it.
    Member(&'static str),
    /// The leader has not proven that it leads while the DCS is silent.
    Unproven,
    /// It is another kind of server than the port leads to.
    Kind(Target),
    /// It lacks this tag, or has another value.
    Tag(String),
    /// How far it is behind is not known.
    LagUnknown,
    /// It is too many bytes behind.
    LagBytes(u64, u64),
    /// It is too long behind.
    LagTime(Duration, Duration),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Candidate => f.write_str("candidate"),
            Verdict::Substitute => f.write_str("used because there is no candidate"),
            Verdict::No(reason) => reason.fmt(f),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Member(why) => f.write_str(why),
            Reason::Unproven => f.write_str("leader, but the DCS does not confirm it and it has not proven it"),
            Reason::Kind(wanted) => write!(f, "not what target {} means", wanted.as_str()),
            Reason::Tag(tag) => write!(f, "tag {tag} is not as wanted"),
            Reason::LagUnknown => f.write_str("how far it is behind is not known"),
            Reason::LagBytes(lag, limit) => write!(f, "{lag} bytes behind, {limit} allowed"),
            Reason::LagTime(lag, limit) => {
                write!(f, "{:.1} s behind, {} allowed", lag.as_secs_f64(), limit.as_secs_f64())
            }
        }
    }
}

/// The servers that a new session of `port` may go to.
pub fn candidates(table: &RouteTable, port: &Port, now: Instant) -> Vec<Arc<Backend>> {
    let standbys = table.standbys.iter().filter(|standby| judge(standby, false, port, now).is_ok());
    let leader = table.leader.iter().filter(|leader| judge(leader, true, port, now).is_ok());
    let chosen: Vec<_> = standbys.chain(leader).cloned().collect();
    match port.no_candidate {
        NoCandidate::Leader if chosen.is_empty() => table.leader.iter().cloned().collect(),
        _ => chosen,
    }
}

/// The servers that may have sessions of `port`, through this router or another one: whatever their lag now, also if they get no
/// new ones, and of every kind where clients choose.
pub fn possible(table: &RouteTable, port: &Port) -> Vec<Arc<Backend>> {
    let port =
        Port { max_lag: Lag::default(), ..port.with_target(if port.choice { Target::Any } else { port.target }) };
    let now = Instant::default();
    let standbys = table.standbys.iter().filter(|standby| judge(standby, false, &port, now).is_ok());
    let substitute = port.no_candidate == NoCandidate::Leader;
    let leader = table.leader.iter().filter(|leader| substitute || judge(leader, true, &port, now).is_ok());
    let leads = |other: &Backend| other.epoch.is_some();
    let others = table.others.iter();
    let others = others.filter(|other| (substitute && leads(other)) || judge(other, leads(other), &port, now).is_ok());
    standbys.chain(leader).chain(others).cloned().collect()
}

/// What `port` makes of every member, by name.
pub fn explain(table: &RouteTable, port: &Port, now: Instant) -> Vec<(MemberName, Verdict)> {
    let candidates = candidates(table, port, now);
    let explain = |(name, verdict): &(MemberName, &'static str)| {
        let leader = table.leader.iter().find(|leader| leader.member == *name);
        let standby = table.standbys.iter().find(|standby| standby.member == *name);
        let judged = match (leader, standby) {
            (Some(leader), _) => judge(leader, true, port, now),
            (None, Some(standby)) => judge(standby, false, port, now),
            (None, None) if *verdict == crate::table::LEADER => Err(Reason::Unproven),
            (None, None) => Err(Reason::Member(verdict)),
        };
        let verdict = match judged {
            Ok(()) => Verdict::Candidate,
            Err(_) if candidates.iter().any(|candidate| candidate.member == *name) => Verdict::Substitute,
            Err(reason) => Verdict::No(reason),
        };
        (name.clone(), verdict)
    };
    table.verdicts.iter().map(explain).collect()
}

/// Whether sessions of `port` on `member` must end because it is too far behind. Not knowing is no reason to end any.
pub fn must_end(table: &RouteTable, port: &Port, member: &MemberName, now: Instant) -> bool {
    let standby = table.standbys.iter().find(|standby| standby.member == *member);
    standby.is_some_and(|standby| {
        matches!(within(standby, &port.end_lag, now), Err(Reason::LagBytes(..) | Reason::LagTime(..)))
    })
}

/// Since when each member with sessions has been down, as far as the DCS knows: its record is gone, or says so. The leader's
/// sessions are the business of leadership, and what is not confirmed says nothing.
pub fn down_since(
    before: &BTreeMap<MemberName, Instant>,
    table: &RouteTable,
    in_use: impl Iterator<Item = MemberName>,
    now: Instant,
) -> BTreeMap<MemberName, Instant> {
    let leads = |name: &MemberName| table.reign.as_ref().is_some_and(|reign| reign.member == *name);
    let known = table.certainty == Certainty::Confirmed;
    let down = in_use.filter(|name| known && !table.up.contains(name) && !leads(name));
    down.map(|name| (before.get(&name).copied().unwrap_or(now), name)).map(|(since, name)| (name, since)).collect()
}

fn judge(server: &Backend, leads: bool, port: &Port, now: Instant) -> Result<(), Reason> {
    let kind = match port.target {
        Target::Leader => leads,
        Target::Replica => !leads,
        Target::Sync => !leads && server.sync,
        Target::Async => !leads && !server.sync,
        Target::Any => true,
    };
    if !kind {
        return Err(Reason::Kind(port.target));
    }
    for (tag, wanted) in &port.tags {
        if !server.tags.get(tag).is_some_and(|value| wanted.contains(value)) {
            return Err(Reason::Tag(tag.clone()));
        }
    }
    if leads { Ok(()) } else { within(server, &port.max_lag, now) }
}

fn within(standby: &Backend, limit: &Lag, now: Instant) -> Result<(), Reason> {
    if *limit == Lag::default() {
        return Ok(());
    }
    let Some(bytes) = standby.lag else { return Err(Reason::LagUnknown) };
    let time = standby.behind_since.map_or(Duration::ZERO, |since| now.since(since));
    match (limit.bytes, limit.time) {
        (Some(limit), _) if bytes > limit => Err(Reason::LagBytes(bytes, limit)),
        (_, Some(limit)) if time > limit => Err(Reason::LagTime(time, limit)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use trunkline_common::cluster::SyncState;
    use trunkline_common::{Lsn, Member};
    use trunkline_config::router::Listen;

    use super::*;
    use crate::table::tests::{member, view};

    fn port(target: Target, no_candidate: NoCandidate) -> Port {
        Port { no_candidate, ..Port::new("p", Listen::Tcp("127.0.0.1:0".into()), target) }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    /// a leads; b is close, in time as well, synchronous and in zone x; c is far behind; of d nothing is known.
    fn table() -> RouteTable {
        let far = Member { xlog_location: Some(Lsn(100)), ..member("replica", "running") };
        let blind = Member { xlog_location: None, ..member("replica", "running") };
        let mut near = member("replica", "running");
        near.tags.insert("zone".into(), "x".into());
        near.tags.insert("tier".into(), 1.into());
        let mut view = view(
            Some(("a", 7)),
            &[
                ("a", member("primary", "running")),
                ("b", near),
                ("c", far),
                ("d", blind),
                ("e", member("replica", "starting")),
            ],
        );
        view.sync = SyncState { leader: Some("a".into()), standbys: vec!["B".into()], ..SyncState::default() };
        let mut table = RouteTable::from_view(&view);
        for standby in &mut table.standbys {
            let since = match standby.member.as_str() {
                "b" => Some(at(98)),
                "c" => Some(at(40)),
                _ => None,
            };
            *standby = Arc::new(Backend { behind_since: since, ..(**standby).clone() });
        }
        table
    }

    fn names(port: &Port) -> String {
        candidates(&table(), port, at(100)).iter().map(|server| server.member.as_str()).collect()
    }

    #[test]
    fn ports_choose_by_target_tags_lag_and_fallback() {
        let lag = |bytes, seconds: Option<u64>| Lag { bytes, time: seconds.map(Duration::from_secs) };
        let tags = |tag: &str, values: &[&str]| {
            [(tag.to_owned(), values.iter().map(|value| (*value).to_owned()).collect())].into_iter().collect()
        };
        let hold = |target| port(target, NoCandidate::Hold);
        for (port, expected) in [
            (hold(Target::Leader), "a"),
            (hold(Target::Replica), "bcd"),
            (Port { max_lag: lag(Some(100), None), ..hold(Target::Replica) }, "b"),
            (Port { max_lag: lag(Some(99), None), ..hold(Target::Replica) }, ""),
            (Port { max_lag: lag(Some(99), None), ..port(Target::Replica, NoCandidate::Leader) }, "a"),
            (Port { max_lag: lag(Some(99), None), ..port(Target::Replica, NoCandidate::Refuse) }, ""),
            (Port { max_lag: lag(None, Some(2)), ..hold(Target::Replica) }, "b"),
            (Port { max_lag: lag(None, Some(1)), ..hold(Target::Replica) }, ""),
            (Port { max_lag: lag(Some(5_000), Some(60)), ..hold(Target::Replica) }, "bc"),
            (hold(Target::Sync), "b"),
            (hold(Target::Async), "cd"),
            (Port { max_lag: lag(Some(500), None), ..hold(Target::Any) }, "ba"),
            (Port { tags: tags("zone", &["x", "y"]), ..hold(Target::Any) }, "b"),
            (Port { tags: tags("tier", &["1"]), ..hold(Target::Replica) }, "b"),
            (Port { tags: tags("zone", &["z"]), ..hold(Target::Replica) }, ""),
            (Port { tags: tags("zone", &["z"]), ..port(Target::Replica, NoCandidate::Leader) }, "a"),
            (Port { tags: tags("zone", &["x"]), ..hold(Target::Leader) }, ""),
        ] {
            assert_eq!(names(&port), expected, "{port:?}");
        }
    }

    #[test]
    fn where_sessions_may_be_is_wider_than_where_they_may_go() {
        let max_lag = Lag { bytes: Some(1), time: None };
        let lagging = Port { max_lag, ..port(Target::Replica, NoCandidate::Hold) };
        for (port, expected) in [
            (lagging.clone(), "bcde"),
            (Port { no_candidate: NoCandidate::Leader, ..lagging.clone() }, "bcdae"),
            (Port { choice: true, ..port(Target::Leader, NoCandidate::Hold) }, "bcdae"),
            (port(Target::Leader, NoCandidate::Hold), "a"),
        ] {
            let found: String = possible(&table(), &port).iter().map(|server| server.member.as_str()).collect();
            assert_eq!(found, expected, "{port:?}");
        }
    }

    #[test]
    fn every_member_has_a_reason() {
        let limited =
            Port { max_lag: Lag { bytes: Some(500), time: None }, ..port(Target::Replica, NoCandidate::Hold) };
        let why = |table: &RouteTable, port: &Port| {
            let line = |(name, verdict): &(MemberName, Verdict)| format!("{}: {verdict}", name.as_str());
            explain(table, port, at(100)).iter().map(line).collect::<Vec<_>>()
        };
        assert_eq!(
            why(&table(), &limited),
            [
                "a: not what target replica means",
                "b: candidate",
                "c: 900 bytes behind, 500 allowed",
                "d: how far it is behind is not known",
                "e: not running"
            ]
        );
        let nobody = Port { no_candidate: NoCandidate::Leader, max_lag: Lag { bytes: Some(1), time: None }, ..limited };
        assert_eq!(why(&table(), &nobody)[0], "a: used because there is no candidate");
        let leader = port(Target::Leader, NoCandidate::Hold);
        let silent = table().unconfirmed(false);
        assert_eq!(why(&silent, &leader)[0], "a: leader, but the DCS does not confirm it and it has not proven it");
    }

    #[test]
    fn sessions_end_only_by_a_known_lag_beyond_the_second_threshold() {
        let end_lag = Lag { bytes: Some(500), time: Some(Duration::from_secs(30)) };
        let port = Port { end_lag, ..port(Target::Replica, NoCandidate::Hold) };
        let ends: Vec<_> = ["a", "b", "c", "d", "e"]
            .into_iter()
            .filter(|name| must_end(&table(), &port, &(*name).into(), at(100)))
            .collect();
        assert_eq!(ends, ["c"]);
        assert!(must_end(&table(), &port, &"b".into(), at(129)), "in time");
    }

    /// Records as some agent might write them, sensible or not.
    fn any_member() -> impl Strategy<Value = Member> {
        let word = |words: &'static [&'static str]| proptest::sample::select(words).prop_map(str::to_owned);
        let url = word(&["postgres://h:1/d", "postgres://[::1]/d", "h", "postgres://h:x", "", "://@:0/?"]);
        let role = word(&["primary", "master", "replica", "standby_leader", "promoted", "", "\u{0}"]);
        let state = word(&["running", "starting", "stopped", "", "unknown"]);
        let replication = proptest::option::of(word(&["streaming", "in archive recovery", ""]));
        let tags = proptest::collection::btree_map("[a-z]{0,2}|noloadbalance", any::<(bool, i64)>(), 0..3);
        let positions = any::<(Option<u64>, Option<u64>, Option<u64>)>();
        (proptest::option::of(url), role, state, replication, tags, positions).prop_map(
            |(conn_url, role, state, replication_state, tags, (xlog, receive, replay))| Member {
                conn_url,
                role,
                state,
                replication_state,
                tags: tags
                    .into_iter()
                    .map(|(tag, (flag, n))| (tag, if flag { flag.into() } else { n.into() }))
                    .collect(),
                xlog_location: xlog.map(Lsn),
                receive_lsn: receive.map(Lsn),
                replay_lsn: replay.map(Lsn),
                ..Member::default()
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_the_dcs_says_candidates_and_reasons_agree(
            members in proptest::collection::btree_map("[a-d]", any_member(), 0..5),
            leader in proptest::option::of("[a-e]"),
            optime: u64,
            measured in proptest::collection::btree_map("[a-e]", any::<u64>(), 0..5),
            (target, no_candidate) in (0usize..5, 0usize..3),
            limits in any::<(Option<u64>, Option<u16>)>(),
            confirmed: bool,
            seconds: u16,
        ) {
            let members: Vec<_> = members.iter().map(|(name, member)| (name.as_str(), member.clone())).collect();
            let mut view = view(leader.as_deref().map(|name| (name, 1)), &members);
            view.status.optime = Lsn(optime);
            let mut table = RouteTable::from_view(&view);
            let measured = measured.into_iter().map(|(name, at)| (name.as_str().into(), Lsn(at))).collect();
            crate::lag::Lags::default().complete(&mut table, &view, &measured, at(50));
            let table = if confirmed { table } else { table.unconfirmed(seconds % 2 == 0) };
            let target = [Target::Leader, Target::Replica, Target::Sync, Target::Async, Target::Any][target];
            let no_candidate = [NoCandidate::Hold, NoCandidate::Leader, NoCandidate::Refuse][no_candidate];
            let time = limits.1.map(|seconds| Duration::from_secs(seconds.into()));
            let port = Port { max_lag: Lag { bytes: limits.0, time }, ..port(target, no_candidate) };
            let now = at(seconds.into());
            let mut chosen: Vec<_> = candidates(&table, &port, now).iter().map(|server| server.member.clone()).collect();
            chosen.sort();
            let explained = explain(&table, &port, now);
            prop_assert_eq!(explained.len(), members.len());
            let good = explained.iter().filter(|(_, verdict)| !matches!(verdict, Verdict::No(_)));
            prop_assert_eq!(&good.map(|(name, _)| name.clone()).collect::<Vec<_>>(), &chosen);
            let possible = possible(&table, &port);
            prop_assert!(chosen.iter().all(|name| possible.iter().any(|server| server.member == *name)));
            // Whoever writes goes to the holder of the key, or nowhere.
            let holder: Option<MemberName> = leader.map(|name| name.as_str().into());
            prop_assert!(target != Target::Leader || chosen.iter().all(|name| Some(name) == holder.as_ref()));
        }
    }

    #[test]
    fn down_is_who_is_gone_or_says_so_and_only_while_that_is_confirmed() {
        let blind = Member { xlog_location: None, replication_state: None, ..member("replica", "running") };
        let dry = Member { replication_state: None, ..member("replica", "running") };
        let stopping = Member { state: "stopping".into(), ..member("primary", "running") };
        let view = view(
            Some(("a", 7)),
            &[
                ("a", stopping),
                ("b", member("replica", "running")),
                ("c", member("replica", "stopped")),
                ("d", blind),
                ("e", dry),
            ],
        );
        let in_use = || ["a", "b", "c", "d", "e", "gone"].into_iter().map(MemberName::from);
        let table = RouteTable::from_view(&view);
        let before = BTreeMap::from([("b".into(), at(10)), ("c".into(), at(50))]);
        let down = down_since(&before, &table, in_use(), at(100));
        let expected = [("c", 50), ("d", 100), ("gone", 100)].map(|(name, since)| (MemberName::from(name), at(since)));
        assert_eq!(down, BTreeMap::from(expected), "a leads, b is well, and e only has nobody to stream from");
        assert_eq!(down_since(&down, &table.unconfirmed(true), in_use(), at(200)), BTreeMap::new());
    }
}
