//! Situations in plain words, and what must hold in all of them.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use trunkline_common::cluster::{FailoverRequest, HistoryLine, LeaderKey, Member, RouterRecord, SyncState};
use trunkline_common::{Instant, LeaseId, Lsn, Revision, SystemId, TimelineId};

use super::*;
use crate::ha::situation::{DivergenceState, FailsafeAttempt, Me, Memory, PeerAnswers, Promise};
use crate::peer::PeerStatus;
use crate::postgres::{ControlData, ControlState, PgRole, Running};

const NOW: Instant = Instant::from_boot(Duration::from_secs(1000));
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);

/// Everything a situation borrows from, with a healthy cluster of a, b and c led by a as the start; we are b.
#[derive(Debug, Clone)]
struct World {
    me: Me,
    view: Option<ClusterView>,
    leader_until: Option<Instant>,
    /// The leadership is by the members' word, and the key is not known to be ours.
    by_word: bool,
    has_lease: bool,
    dcs_away: bool,
    pg: PgStatus,
    memory: Memory,
    peers: Option<PeerAnswers>,
}

fn world() -> World {
    let mut view = ClusterView {
        revision: Revision(100),
        initialize: Initialize::Done(SYSTEM),
        leader: Some(key("a")),
        ..ClusterView::default()
    };
    view.settings.ttl = Duration::from_secs(5);
    view.settings.loop_wait = Duration::from_secs(1);
    view.settings.retry_timeout = Duration::from_secs(1);
    view.status.optime = Lsn(1000);
    for (name, port) in [("a", 1), ("b", 2), ("c", 3)] {
        let member = Member {
            conn_url: Some(format!("postgres://127.0.0.1:{port}/postgres")),
            api_url: Some(format!("http://127.0.0.1:800{port}/patroni")),
            state: "running".to_owned(),
            role: if name == "a" { "primary" } else { "replica" }.to_owned(),
            timeline: Some(TimelineId(1)),
            ..Member::default()
        };
        view.members.insert(name.into(), member);
    }
    World {
        me: Me {
            name: "b".into(),
            tags: serde_json::Map::new(),
            may_bootstrap: true,
            use_pg_rewind: true,
            use_slots: true,
            restores_alone: false,
            reclone_diverged: false,
            reclone_unrewindable: false,
        },
        view: Some(view),
        leader_until: None,
        by_word: false,
        has_lease: true,
        dcs_away: false,
        pg: standby(1000),
        memory: Memory::default(),
        peers: None,
    }
}

fn key(name: &str) -> LeaderKey {
    LeaderKey { name: name.into(), lease: LeaseId(7), created: Revision(50), modified: Revision(50) }
}

fn running(role: PgRole, lsn: u64) -> PgStatus {
    PgStatus::Running(Running {
        role,
        system_id: SYSTEM,
        timeline: Some(TimelineId(1)),
        checkpoint_timeline: None,
        lsn: Lsn(lsn),
        receive_lsn: None,
        replay_lsn: None,
        replay_timestamp: None,
        replay_paused: false,
        latest_end_lsn: None,
        replication_state: (role == PgRole::Standby).then(|| "streaming".to_owned()),
        upstream: (role == PgRole::Standby).then(|| "127.0.0.1:1".to_owned()),
        server_version: 150_018,
        postmaster_start_time: String::new(),
        replication: Vec::new(),
        synchronous_standby_names: String::new(),
        synchronous_commit: "on".to_owned(),
        pending_restart: std::collections::BTreeMap::new(),
        slots: std::collections::BTreeMap::new(),
    })
}

fn standby(lsn: u64) -> PgStatus {
    running(PgRole::Standby, lsn)
}

fn primary(lsn: u64) -> PgStatus {
    running(PgRole::Primary, lsn)
}

fn stopped(state: ControlState, standby: bool) -> PgStatus {
    PgStatus::Stopped(ControlData { system_id: SYSTEM, state, timeline: TimelineId(1), checkpoint: Lsn(900), standby })
}

fn peer(lsn: u64) -> Option<PeerStatus> {
    Some(PeerStatus {
        in_recovery: true,
        lsn: Lsn(lsn),
        timeline: Some(TimelineId(1)),
        failover_priority: 1,
        watchdog_failed: false,
    })
}

impl World {
    fn decide(&self) -> Decision {
        decide(&self.situation())
    }

    fn situation(&self) -> Situation<'_> {
        Situation {
            now: NOW,
            wall: chrono::DateTime::from_timestamp(1_900_000_000, 0).unwrap(),
            me: &self.me,
            view: self.view.as_ref(),
            leader_until: self.leader_until,
            holds_key: !self.by_word && self.leader_until.is_some_and(|until| NOW < until),
            promised_until: self.leader_until.filter(|_| self.by_word),
            has_lease: self.has_lease,
            ttl: self.view.as_ref().map_or(Duration::from_secs(5), |view| view.settings.ttl),
            dcs_away: self.dcs_away,
            pg: &self.pg,
            memory: &self.memory,
            peers: self.peers.as_ref(),
        }
    }

    fn view(&mut self) -> &mut ClusterView {
        self.view.as_mut().unwrap()
    }

    /// We hold the key.
    fn leading(mut self) -> Self {
        self.view().leader = Some(key("b"));
        self.leader_until = Some(NOW + Duration::from_secs(4));
        self.pg = primary(1000);
        self
    }

    /// Nobody leads; the old leader's keys are gone with its lease.
    fn leaderless(mut self) -> Self {
        self.view().leader = None;
        self.view().members.remove(&"a".into());
        self
    }

    fn answers(mut self, answers: &[(&str, Option<PeerStatus>)]) -> Self {
        self.peers = Some(answers.iter().map(|(name, status)| ((*name).into(), status.clone())).collect());
        self
    }

    fn synchronous(mut self, leader: &str, standbys: &[&str]) -> Self {
        self.view().settings.synchronous_mode = SynchronousMode::On;
        self.view().sync = SyncState {
            leader: Some(leader.into()),
            standbys: standbys.iter().map(|name| (*name).to_owned()).collect(),
            quorum: 0,
            revision: Revision(60),
        };
        self
    }

    /// Failsafe mode is on, and these members are in its key.
    fn failsafe(mut self, members: &[&str]) -> Self {
        self.view().settings.failsafe_mode = true;
        let url = |name: &&str| ((*name).into(), format!("http://{name}/patroni"));
        self.view().failsafe = Some(members.iter().map(url).collect());
        self.view().failsafe_revision = Revision(70);
        self
    }

    /// The lease ends in so many milliseconds.
    fn left(mut self, ms: u64) -> Self {
        self.leader_until = Some(NOW + Duration::from_millis(ms));
        self
    }

    /// We have given our word to a.
    fn promised(mut self, ms: u64) -> Self {
        self.memory.promise = Some(Promise {
            leader: "a".into(),
            until: NOW + Duration::from_millis(ms),
            conn_url: Some("postgres://127.0.0.1:1/postgres".to_owned()),
            api_url: Some("http://127.0.0.1:8001/patroni".to_owned()),
            slots: BTreeMap::new(),
        });
        self
    }

    fn requested(mut self, leader: Option<&str>, candidate: Option<&str>) -> Self {
        self.view().failover_revision = Revision(90);
        self.view().failover = Some(FailoverRequest {
            leader: leader.map(Into::into),
            candidate: candidate.map(Into::into),
            scheduled_at: None,
            scheduled_at_text: None,
        });
        self
    }
}

#[test]
fn a_member_judges_itself_as_if_the_leader_were_gone() {
    let judged = |world: &World| {
        let decision = without_leader(&world.situation());
        format!("{}: {}", decision.action.label(), decision.reason)
    };
    let asked = world().answers(&[("c", peer(1000))]);
    assert_eq!(judged(&asked), "acquire: at 0/3E8 with priority 1; nobody is a better choice (c is at 0/3E8)");
    let behind = world().answers(&[("c", peer(1001))]);
    assert_eq!(judged(&behind), "abstain: Wal position of c is ahead of my wal position (0/3E9 > 0/3E8)");
    let mut never = world();
    never.me.tags.insert("nofailover".to_owned(), true.into());
    assert_eq!(judged(&never), "abstain: following a different leader because I am not allowed to promote");
    let outside = world().synchronous("a", &["c"]);
    assert!(judged(&outside).starts_with("abstain: not among the synchronous nodes (a, c)"));
    let mut down = world();
    down.pg = PgStatus::Starting;
    assert_eq!(judged(&down), "wait: PostgreSQL is starting; nobody leads");
    // Who leads, or where nobody does, decides as ever.
    assert_eq!(without_leader(&world().leading().situation()), world().leading().decide());
    assert_eq!(without_leader(&world().leaderless().situation()), world().leaderless().decide());
}

#[test]
fn a_comparison_that_is_tried_again_and_again_is_said_once() {
    let mut down = world();
    down.pg = stopped(ControlState::ShutDown, false);
    down.memory.divergence = DivergenceState::Check;
    let mut dry = world();
    let PgStatus::Running(running) = &mut dry.pg else { unreachable!() };
    running.replication_state = None;
    dry.view().members.get_mut(&"a".into()).unwrap().timeline = Some(TimelineId(2));
    for mut world in [down, dry] {
        assert!(matches!(world.decide().action, Action::CheckDivergence(_)));
        world.memory.last_failure = Some("a has no checkpoint on its timeline yet".to_owned());
        let again = world.decide();
        assert!(matches!(again.action, Action::CheckDivergence(_)));
        world.memory.retry_at = Some(NOW + Duration::from_millis(200));
        let waits = world.decide();
        assert_eq!((waits.action.label(), &waits.reason), ("wait", &again.reason));
        assert!(waits.reason.contains("no checkpoint"), "{}", waits.reason);
    }
}

#[test]
fn a_standby_that_gets_nothing_says_so() {
    let mut dry = world();
    let PgStatus::Running(running) = &mut dry.pg else { unreachable!() };
    running.replication_state = None;
    dry.memory.dry_since = Some(NOW - follower::DRY * 2);
    assert!(matches!(dry.decide().action, Action::CheckDivergence(_)), "{:?}", dry.decide());
    dry.me.use_pg_rewind = false;
    let waits = dry.decide();
    assert_eq!(waits.action, Action::Wait);
    let expected = "following a, but nothing is streamed from a: PostgreSQL's log says why, \
                    and neither pg_rewind nor a new copy is allowed here";
    assert_eq!(waits.reason, expected);
}

#[test]
fn steady_states_do_nothing() {
    assert_eq!(world().decide().action, Action::Wait);
    assert_eq!(world().decide().reason, "no action. I am (b), a secondary, and following a leader (a)");
    assert_eq!(world().leading().decide().action, Action::Lead);
    assert_eq!(world().leading().decide().reason, "no action. I am (b), the leader with the lock");
}

#[test]
fn the_most_advanced_standby_takes_the_key_when_the_leader_is_gone() {
    let alone = world().leaderless();
    assert!(matches!(alone.decide().action, Action::Ask(members) if members.keys().map(|n| n.as_str()).eq(["c"])));
    assert_eq!(alone.clone().answers(&[("c", peer(1000))]).decide().action, Action::Acquire(None));
    assert_eq!(alone.clone().answers(&[("c", None)]).decide().action, Action::Acquire(None));
    let behind = alone.answers(&[("c", peer(1001))]).decide();
    assert_eq!(behind.action, Action::Abstain);
    assert!(behind.reason.contains("Wal position of c is ahead of my wal position"), "{}", behind.reason);
}

#[test]
fn a_standby_too_far_behind_or_not_allowed_stays_out() {
    let mut far = world().leaderless().answers(&[("c", None)]);
    far.view().status.optime = Lsn(10_000_000);
    assert_eq!(far.decide().action, Action::Abstain);
    assert!(far.decide().reason.contains("maximum_lag_on_failover"));
    let mut barred = world().leaderless().answers(&[("c", None)]);
    barred.me.tags = json!({ "nofailover": true }).as_object().unwrap().clone();
    assert_eq!(barred.decide().reason, "following a different leader because I am not allowed to promote");
}

#[test]
fn another_running_primary_stops_the_race() {
    let mut old = peer(0).unwrap();
    old.in_recovery = false;
    assert_eq!(world().leaderless().answers(&[("c", Some(old))]).decide().action, Action::Abstain);
}

#[test]
fn a_request_is_tried_once() {
    let mut world = world().leading().requested(Some("b"), Some("c"));
    world.view().failover_revision = Revision(49);
    let decision = world.decide();
    assert_eq!(decision.action, Action::ClearFailover, "asked for before this leader key was made: {decision:?}");
}

#[test]
fn nobody_waits_for_a_candidate_that_may_not_race() {
    let asked = |candidate: &str| {
        let world = world().leaderless().synchronous("a", &["b"]).requested(Some("a"), Some(candidate));
        world.answers(&[("c", peer(1000))]).decide()
    };
    let outside = asked("c");
    assert!(matches!(outside.action, Action::Acquire(_)), "{outside:?}");
}

#[test]
fn who_missed_a_promotion_neither_races_nor_counts() {
    let second = |mut world: World| {
        let line = HistoryLine {
            timeline: TimelineId(1),
            switchpoint: Lsn(900),
            reason: String::new(),
            promoted_at: None,
            new_leader: None,
        };
        (world.view().history, world.view().has_history) = (vec![line], true);
        world
    };
    let behind = second(world().leaderless()).decide();
    assert_eq!(behind.action, Action::Abstain);
    assert!(behind.reason.contains("timeline 1, the cluster is on 2"), "{}", behind.reason);

    let mut ahead = second(world().leaderless());
    let PgStatus::Running(running) = &mut ahead.pg else { panic!() };
    (running.timeline, running.lsn) = (Some(TimelineId(2)), Lsn(1000));
    let decision = ahead.answers(&[("c", peer(5000))]).decide();
    assert!(matches!(decision.action, Action::Acquire(_)), "{decision:?}");
}

#[test]
fn only_synchronous_nodes_race_in_synchronous_mode() {
    let outside = world().leaderless().synchronous("a", &["c"]).decide();
    assert_eq!(outside.action, Action::Abstain);
    // With nobody else in the set alive, there is nobody to ask, and the key and the list change in one transaction.
    let inside = world().leaderless().synchronous("a", &["b"]).decide();
    let Action::Acquire(Some(write)) = inside.action else { panic!("{inside:?}") };
    assert_eq!(write.seen, Revision(60));
    assert_eq!(write.value, Some(json!({ "leader": "b", "quorum": 0, "sync_standby": null })));
}

#[test]
fn higher_priority_wins_at_equal_positions() {
    let mut better = peer(1000).unwrap();
    better.failover_priority = 2;
    let decision = world().leaderless().answers(&[("c", Some(better))]).decide();
    assert_eq!(decision.reason, "c has equally tolerable WAL position and priority 2, while this node has priority 1");
}

#[test]
fn the_holder_of_the_key_promotes_and_nobody_else() {
    let mut holder = world().leading();
    holder.pg = standby(1000);
    holder.memory.elected = Some(Revision(50));
    assert_eq!(holder.decide().action, Action::Promote(None));
    holder.leader_until = Some(NOW);
    assert_eq!(holder.decide().action, Action::Confirm);
}

#[test]
fn a_key_that_was_not_won_just_now_is_only_used_by_the_best_node() {
    let mut late = world().leading();
    late.pg = standby(1000);
    late.memory.elected = Some(Revision(49));
    late.memory.up_since = Some(NOW);
    assert!(matches!(late.decide().action, Action::Ask(_)), "positions are compared again");
    assert_eq!(late.clone().answers(&[("c", peer(1000))]).decide().action, Action::Promote(None));
    let behind = late.clone().answers(&[("c", peer(1001))]);
    assert_eq!(behind.decide().action, Action::Release);
    late = behind;
    late.memory.up_since = None;
    late.memory.started_at = NOW;
    assert_eq!(late.decide().action, Action::Demote(DemoteMode::Sick), "an earlier agent may be promoting it");
}

#[test]
fn a_primary_without_dcs_goes_on_with_the_word_of_all_members() {
    let asked = |world: World| match world.decide().action {
        Action::Failsafe(members) => members.keys().map(|name| name.as_str().to_owned()).collect(),
        action => vec![format!("{action:?}")],
    };
    let mut away = world().leading().failsafe(&["a", "b", "c"]);
    away.dcs_away = true;
    assert_eq!(asked(away.clone().left(4100)), ["Lead"], "not yet");
    assert_eq!(asked(away.clone().left(3900)), ["a", "c"]);
    away.dcs_away = false;
    assert_eq!(asked(away.clone().left(3100)), ["Lead"], "a slow answer");
    assert_eq!(asked(away.clone().left(2900)), ["a", "c"]);
    assert_eq!(asked(away.clone().left(900)), ["Demote(Offline)"], "too late");
    assert_eq!(asked(world().leading().failsafe(&["b"]).left(2900)), Vec::<String>::new(), "alone");
    assert_eq!(asked(world().leading().failsafe(&["a", "c"]).left(2900)), ["Lead"], "not on the list");
    // What was sent to the DCS may be in force.
    let members = BTreeMap::from([("d".into(), "http://d".to_owned())]);
    away.memory.failsafe_attempt = Some(FailsafeAttempt { seen: Revision(70), members, at: NOW });
    assert_eq!(asked(away.clone().left(2900)), ["a", "c", "d"]);
    away.view().failsafe_revision = Revision(71);
    assert_eq!(asked(away.clone().left(2900)), ["a", "c"]);
    away.memory.leading_since = Revision(101);
    assert_eq!(asked(away.clone().left(2900)), ["Lead"], "this list may be older than what we hold");
    away.memory.leading_since = Revision(100);
    away.memory.failsafe_refused = Some((NOW, "no promise from c".to_owned()));
    assert_eq!(asked(away.clone().left(2900)), ["Lead"], "a pause");
    assert!(away.left(900).decide().reason.contains("no promise from c"));
}

#[test]
fn a_primary_that_leads_by_word_takes_its_key_again() {
    let mut back = world().leading().failsafe(&["a", "b", "c"]).left(4000);
    back.by_word = true;
    assert_eq!(back.decide().action, Action::Confirm, "the view still shows the key");
    back.view().leader = None;
    assert_eq!(back.decide().action, Action::Acquire(None));
    let mut alone = back.clone();
    alone.dcs_away = true;
    assert_eq!(alone.decide().action, Action::Lead);
    back.view().leader = Some(key("c"));
    assert_eq!(back.decide().action, Action::Demote(DemoteMode::LostKey), "somebody who was not on the list");
    let mut asked = world().leading().failsafe(&["a", "b", "c"]).requested(Some("b"), Some("c")).left(4000);
    asked.by_word = true;
    assert_eq!(asked.decide().action, Action::Confirm);
}

#[test]
fn whoever_has_given_its_word_follows_and_does_not_race() {
    let free = world().leaderless().answers(&[("c", peer(1000))]);
    assert!(matches!(free.decide().action, Action::Acquire(_)));
    assert_eq!(free.clone().promised(1).decide().action, Action::Wait);
    assert!(matches!(free.clone().promised(0).decide().action, Action::Acquire(_)), "over");
    assert!(free.clone().promised(1).decide().reason.contains("following a leader (a) (by failsafe mode"));
    // A key of ours that turns up late changes nothing.
    let mut late = world().promised(1);
    late.view().leader = Some(key("b"));
    assert_eq!(late.decide().action, Action::Wait);
    late.memory.promise = None;
    assert_eq!(late.decide().action, Action::Confirm);
    // A stopped server follows whom it has promised to.
    let mut down = world().leaderless().promised(1);
    down.pg = stopped(ControlState::ShutDownInRecovery, true);
    assert!(matches!(down.decide().action, Action::Start(StartAs::Standby(Some(to))) if to.name == "a".into()));
}

#[test]
fn with_failsafe_mode_a_stranger_and_an_agent_that_has_just_started_do_not_race() {
    let stranger = world().leaderless().failsafe(&["a", "c"]).answers(&[("c", peer(1000))]).decide();
    assert_eq!(stranger.action, Action::Abstain);
    assert!(stranger.reason.contains("not in the failsafe key"), "{}", stranger.reason);
    let mut young = world().leaderless().failsafe(&["a", "b", "c"]).answers(&[("c", peer(1000))]);
    young.memory.started_at = NOW - Duration::from_millis(4900);
    assert_eq!(young.decide().reason, MAY_HAVE_PROMISED);
    young.pg = primary(1000);
    assert!(matches!(young.decide().action, Action::Acquire(_)), "a primary has promised nothing");
    young.pg = standby(1000);
    young.memory.started_at = NOW - Duration::from_secs(5);
    assert!(matches!(young.decide().action, Action::Acquire(_)));
}

#[test]
fn a_crashed_primary_restarts_in_place_or_fails_over_as_configured() {
    let mut crashed = world().leading();
    crashed.pg = stopped(ControlState::InProduction, false);
    crashed.memory.down_since = Some(NOW);
    crashed.view().settings.primary_start_timeout = Duration::from_secs(300);
    assert_eq!(crashed.decide().action, Action::Start(StartAs::Primary));
    crashed.view().settings.primary_start_timeout = Duration::ZERO;
    assert!(matches!(crashed.decide().action, Action::Ask(_)));
    let healthy = crashed.clone().answers(&[("a", None), ("c", peer(1000))]);
    assert_eq!(healthy.decide().action, Action::Release);
    let nobody = crashed.answers(&[("a", None), ("c", None)]);
    assert_eq!(nobody.decide().action, Action::Start(StartAs::Primary));
}

#[test]
fn a_node_that_could_not_be_promoted_gives_the_key_back_once_it_is_down() {
    let mut failed = world().leading();
    failed.pg = stopped(ControlState::ShutDownInRecovery, true);
    failed.memory.demoted = true;
    failed.memory.abstain_until = Some(NOW + Duration::from_secs(5));
    assert_eq!(failed.decide().action, Action::Release);
    failed.memory.abstain_until = Some(NOW);
    assert!(matches!(failed.decide().action, Action::Ask(_)));
}

#[test]
fn a_leader_that_the_view_does_not_show_proves_its_key_first() {
    let mut replaced = world().leading();
    for leader in [None, Some(key("a"))] {
        replaced.view().leader = leader;
        assert_eq!(replaced.decide().action, Action::Confirm);
    }
    replaced.leader_until = None;
    assert_eq!(replaced.decide().action, Action::Demote(DemoteMode::LostKey), "it has been disowned");
}

#[test]
fn a_silent_server_that_took_writes_is_stopped_beside_another_leader() {
    for silent in [PgStatus::Unresponsive, PgStatus::Starting] {
        let mut second = world();
        second.pg = silent;
        assert_eq!(second.decide().action, Action::Wait, "a standby");
        second.memory.was_primary = true;
        assert_eq!(second.decide().action, Action::Demote(DemoteMode::LostKey));
        second.memory.demoted = true;
        assert_eq!(second.decide().action, Action::Wait, "it comes back as a standby");
        second.memory.demoted = false;
        second.view().settings.pause = true;
        assert_eq!(second.decide().action, Action::Wait, "an operator has taken over");
    }
}

#[test]
fn a_hung_server_is_given_up_after_several_looks_if_somebody_can_take_over() {
    let mut hung = world().leading().answers(&[("a", None), ("c", peer(1000))]);
    hung.pg = PgStatus::Unresponsive;
    for (silent, seconds, ttl, given_up) in
        [(2, 60, 5, false), (3, 9, 5, false), (3, 10, 5, true), (30, 29, 30, false), (30, 30, 30, true)]
    {
        hung.view().settings.ttl = Duration::from_secs(ttl);
        (hung.memory.silent, hung.memory.down_since) = (silent, Some(NOW - Duration::from_secs(seconds)));
        let expected = if given_up { Action::Demote(DemoteMode::Sick) } else { Action::Wait };
        assert_eq!(hung.decide().action, expected, "{silent} times, {seconds} s, ttl {ttl}");
    }
    assert_eq!(hung.clone().answers(&[("a", None), ("c", None)]).decide().action, Action::Wait, "nobody else");
    hung.view().settings.pause = true;
    assert_eq!(hung.decide().action, Action::Wait);
    // Full, but alive.
    let mut full = world().leading();
    full.pg = PgStatus::Refusing("sorry, too many clients already (53300)".to_owned());
    (full.memory.was_primary, full.memory.down_since) = (true, Some(NOW - Duration::from_secs(900)));
    assert_eq!(full.decide().action, Action::Lead);
}

#[test]
fn what_cannot_be_killed_does_not_take_its_key_again() {
    let mut stuck = world().leading();
    (stuck.pg, stuck.leader_until) = (PgStatus::Unresponsive, None);
    assert_eq!(stuck.decide().action, Action::Confirm);
    stuck.memory.abstain_until = Some(NOW + Duration::from_secs(10));
    assert_eq!(stuck.decide().action, Action::Wait);
}

#[test]
fn a_leader_without_an_address_is_not_unfollowed() {
    let mut hidden = world();
    hidden.view().members.remove(&"a".into());
    assert_eq!(hidden.decide().action, Action::Wait);
}

#[test]
fn in_pause_only_what_this_node_demoted_comes_back() {
    let mut down = world();
    down.view().settings.pause = true;
    down.pg = stopped(ControlState::ShutDown, false);
    assert_eq!(down.decide().action, Action::Wait, "somebody stopped it");
    down.memory.demoted = true;
    down.memory.divergence = DivergenceState::Check;
    assert!(matches!(down.decide().action, Action::CheckDivergence(_)));
}

#[test]
fn what_was_copied_in_pause_is_started() {
    let mut copy = world();
    copy.view().settings.pause = true;
    copy.pg = stopped(ControlState::InArchiveRecovery, true);
    copy.memory.fresh_copy = true;
    assert!(matches!(copy.decide().action, Action::Start(StartAs::Standby(Some(_)))));
}

#[test]
fn a_new_leader_is_promoted_when_routers_have_let_go_of_the_former_one_or_their_leases_are_over() {
    let mut world = world().leading();
    world.pg = standby(1000);
    world.memory.elected = Some(Revision(50));
    let action = |world: &World| world.decide().action;
    for (what, setting, epoch, held_for, expected) in [
        ("it has not seen the new leader", 5, 40, 0, Action::Wait),
        ("nor for nearly its lease", 5, 40, 4, Action::Wait),
        ("its lease is over", 5, 40, 5, Action::Promote(None)),
        ("it has let go", 5, 50, 0, Action::Promote(None)),
        ("nobody is to wait", 0, 40, 0, Action::Promote(None)),
    ] {
        world.view().settings.router_lease = Duration::from_secs(setting);
        let router = RouterRecord { name: "web1/7".into(), lease: Duration::from_secs(5), epoch: Revision(epoch) };
        world.view().routers = [("7b".to_owned(), router)].into();
        world.memory.key_held = Some((Revision(50), NOW - Duration::from_secs(held_for)));
        assert_eq!(action(&world), expected, "{what}");
    }
    world.view().settings.router_lease = Duration::from_secs(5);
    world.memory.key_held = None;
    let decision = world.decide();
    assert!(decision.action == Action::Wait && decision.reason.contains("web1/7"), "{}", decision.reason);
    world.pg = primary(1000);
    assert_eq!(action(&world), Action::Lead, "who leads already does not wait");
}

#[test]
fn while_wal_arrives_the_race_is_put_off_for_a_while() {
    let mut world = world();
    world.view().leader = None;
    world.view().settings.primary_race_backoff = Duration::from_secs(6);
    let at = |seconds: u64| NOW - Duration::from_secs(seconds);
    let races = |world: &World| !matches!(world.decide().action, Action::Abstain);
    for (what, since, moved, expected) in [
        ("too early to say", 0, 5, false),
        ("it moves", 4, 0, false),
        ("it does not", 4, 2, true),
        ("for long enough", 6, 0, true),
    ] {
        world.memory.leaderless_since = Some(at(since));
        world.memory.position_since = Some((Lsn(1000), at(moved)));
        assert_eq!(races(&world), expected, "{what}");
    }
    world.memory.leaderless_since = Some(at(4));
    assert!(!races(&world), "it moves");
    assert!(races(&world.clone().requested(Some("a"), Some("b"))), "an operator asks for it");
    if let PgStatus::Running(running) = &mut world.pg {
        running.replication_state = None;
    }
    assert!(races(&world), "nobody sends any more");
}

#[test]
fn a_replica_can_be_restored_without_a_leader() {
    let mut empty = world();
    empty.view().leader = None;
    empty.pg = PgStatus::NoData;
    assert_eq!(empty.decide().action, Action::Wait);
    empty.me.restores_alone = true;
    assert_eq!(empty.decide().action, Action::RestoreReplica);
    empty.view().initialize = Initialize::Running;
    assert_eq!(empty.decide().action, Action::Wait, "the cluster is only coming to be");
}

/// A standby cluster that follows `outside:5433`.
fn standby_cluster() -> World {
    let mut world = world();
    let section = serde_json::json!({ "host": "outside", "port": 5433, "primary_slot_name": "us" });
    world.view().settings.standby_cluster = section.as_object().cloned();
    world
}

fn standby_leader() -> World {
    World { pg: standby(1000), ..standby_cluster().leading() }
}

fn follows(world: &mut World, upstream: &str) {
    if let PgStatus::Running(running) = &mut world.pg {
        running.upstream = Some(upstream.to_owned());
    }
}

#[test]
fn the_leader_of_a_standby_cluster_follows_the_server_outside_and_is_never_promoted() {
    let mut leader = standby_leader();
    let Action::Follow(Some(remote)) = leader.decide().action else { panic!("{:?}", leader.decide()) };
    assert_eq!((remote.host.as_str(), remote.port, remote.slot.as_deref()), ("outside", 5433, Some("us")));
    follows(&mut leader, "outside:5433");
    assert_eq!(leader.decide().action, Action::Lead);
    let mut archive = leader.clone();
    archive.view().settings.standby_cluster = serde_json::json!({ "restore_command": "cp" }).as_object().cloned();
    assert_eq!(archive.decide().action, Action::Follow(None), "only the archive is left");
    let mut down = leader.clone();
    down.pg = stopped(ControlState::ShutDownInRecovery, true);
    assert!(matches!(down.decide().action, Action::Start(StartAs::Standby(Some(remote))) if remote.host == "outside"));
    down.pg = stopped(ControlState::ShutDown, false);
    down.memory.divergence = DivergenceState::Check;
    assert!(matches!(down.decide().action, Action::CheckDivergence(remote) if remote.host == "outside"));
    let mut late = leader.clone().left(300);
    late.dcs_away = true;
    assert_eq!(late.decide().action, Action::Resign, "and is not killed for it");
    leader.view().settings.standby_cluster = None;
    assert!(!matches!(leader.decide().action, Action::Lead | Action::Follow(_)), "an ordinary cluster again");
}

#[test]
fn a_cluster_becomes_a_standby_cluster() {
    let mut primary_leads = standby_cluster().leading();
    assert_eq!(primary_leads.decide().action, Action::DemoteCluster);
    primary_leads.view().settings.pause = true;
    assert_eq!(primary_leads.decide().action, Action::Lead);
}

#[test]
fn a_switchover_in_a_standby_cluster_stops_nothing() {
    let mut asked = standby_leader().requested(Some("b"), Some("c"));
    follows(&mut asked, "outside:5433");
    assert!(matches!(asked.decide().action, Action::Ask(_)));
    assert_eq!(asked.answers(&[("c", peer(1000))]).decide().action, Action::Release);
}

#[test]
fn members_of_a_standby_cluster_race_and_follow_its_leader() {
    let mut world = standby_cluster();
    assert_eq!(world.decide().action, Action::Wait, "a replica of the leader");
    world.view().leader = None;
    assert!(matches!(world.clone().answers(&[("a", None), ("c", peer(1000))]).decide().action, Action::Acquire(_)));
    world.pg = PgStatus::NoData;
    world.view().initialize = Initialize::Absent;
    world.view().members.clear();
    assert!(matches!(world.decide().action, Action::CloneRemote(Some(remote)) if remote.host == "outside"));
    let mut copy = standby_cluster();
    copy.pg = PgStatus::NoData;
    copy.view().members.get_mut(&"a".into()).unwrap().role = "standby_leader".to_owned();
    assert!(matches!(copy.decide().action, Action::Clone(source) if source.name.as_str() == "a"));
}

#[test]
fn a_primary_that_cannot_renew_steps_down_before_its_lease_ends() {
    let mut late = world().leading();
    late.leader_until = Some(NOW + Duration::from_millis(900));
    assert_eq!(late.decide().action, Action::Demote(DemoteMode::Offline));
    late.view().settings.pause = true;
    assert_eq!(late.decide().action, Action::Lead);
}

#[test]
fn a_primary_beside_another_leader_stops_at_once() {
    let mut second = world();
    second.pg = primary(2000);
    assert_eq!(second.decide().action, Action::Demote(DemoteMode::LostKey));
    second.view().settings.pause = true;
    assert_eq!(second.decide().action, Action::Wait);
}

#[test]
fn a_switchover_needs_a_candidate_that_can() {
    let asked = world().leading().requested(Some("b"), Some("c"));
    assert!(matches!(asked.decide().action, Action::Ask(members) if members.len() == 1));
    assert_eq!(asked.clone().answers(&[("c", peer(1000))]).decide().action, Action::HandOver);
    assert_eq!(asked.answers(&[("c", None)]).decide().action, Action::ClearFailover);
    assert_eq!(world().leading().requested(Some("a"), None).decide().action, Action::ClearFailover);
    assert_eq!(world().leading().requested(None, Some("b")).decide().action, Action::ClearFailover);
}

#[test]
fn after_a_switchover_the_candidate_leads_and_others_wait_for_it() {
    let mut candidate = world().requested(Some("a"), Some("b"));
    candidate.view().leader = None;
    assert!(matches!(candidate.decide().action, Action::Acquire(_)));
    let mut other = world().requested(Some("a"), Some("c"));
    other.view().leader = None;
    assert_eq!(other.answers(&[("c", peer(1000)), ("a", None)]).decide().action, Action::Abstain);
}

#[test]
fn a_candidate_that_checks_out_but_does_not_come_is_not_waited_for_for_ever() {
    let mut yielding = world().requested(Some("b"), Some("c")).answers(&[("a", None), ("c", peer(1000))]);
    yielding.view().leader = None;
    yielding.memory.unfulfilled = Some((Revision(0), NOW - Duration::from_secs(5)));
    assert_eq!(yielding.decide().action, Action::Abstain);
    yielding.memory.unfulfilled = Some((Revision(0), NOW - Duration::from_millis(5001)));
    assert!(matches!(yielding.decide().action, Action::Acquire(_)));
    let anybody = yielding.requested(Some("b"), None);
    assert!(matches!(anybody.decide().action, Action::Acquire(_)));
    assert_eq!(anybody.answers(&[("c", peer(1001))]).decide().action, Action::Abstain, "the best one, still");
}

#[test]
fn a_half_rewound_directory_is_not_started() {
    let mut cut_off = world().leaderless();
    cut_off.pg = stopped(ControlState::InProduction, false);
    cut_off.memory.divergence = DivergenceState::RewindFailed("cut off".to_owned());
    assert_eq!(cut_off.decide().action, Action::Wait);
}

#[test]
fn a_deposed_primary_compares_rewinds_and_only_then_follows() {
    let mut deposed = world();
    deposed.pg = stopped(ControlState::InProduction, false);
    deposed.memory.divergence = DivergenceState::Check;
    assert!(matches!(deposed.decide().action, Action::CheckDivergence(source) if source.name == "a".into()));
    deposed.memory.divergence = DivergenceState::Rewind("past the fork".to_owned());
    assert!(matches!(deposed.decide().action, Action::Rewind(_)));
    deposed.memory.divergence = DivergenceState::RewindFailed("no WAL".to_owned());
    assert_eq!(deposed.decide().action, Action::Wait);
    deposed.me.reclone_unrewindable = true;
    assert!(matches!(deposed.decide().action, Action::Reclone(_)));
    deposed.memory.divergence = DivergenceState::NotAsked;
    assert!(matches!(deposed.decide().action, Action::Start(StartAs::Standby(Some(_)))));
    // The new leader is not promoted yet: nothing to compare with.
    deposed.memory.divergence = DivergenceState::Check;
    deposed.view().members.get_mut(&"a".into()).unwrap().role = "replica".to_owned();
    assert_eq!(deposed.decide().action, Action::Wait);
}

#[test]
fn a_former_primary_that_came_up_while_nobody_led_is_compared_before_it_follows() {
    let mut deposed = world();
    if let PgStatus::Running(running) = &mut deposed.pg {
        running.upstream = None;
    }
    assert!(matches!(deposed.decide().action, Action::Follow(Some(_))), "any other standby follows");
    deposed.memory.divergence = DivergenceState::Check;
    assert!(matches!(deposed.decide().action, Action::CheckDivergence(source) if source.name == "a".into()));
    deposed.memory.divergence = DivergenceState::RewindFailed("two nodes have begun its timeline".to_owned());
    assert_eq!(deposed.decide().action, Action::Wait);
    deposed.me.reclone_unrewindable = true;
    assert!(matches!(deposed.decide().action, Action::Reclone(_)));
    deposed.memory.divergence = DivergenceState::Check;
    deposed.view().members.get_mut(&"a".into()).unwrap().role = "replica".to_owned();
    assert_eq!(deposed.decide().action, Action::Wait, "the new leader is not promoted yet");
}

#[test]
fn an_empty_node_bootstraps_or_copies() {
    let mut empty = world().leaderless();
    empty.pg = PgStatus::NoData;
    empty.view().initialize = Initialize::Absent;
    assert_eq!(empty.decide().reason, "waiting for c, which has data, to lead", "the DCS has lost its keys");
    empty.view().members.get_mut(&"c".into()).unwrap().role = "uninitialized".to_owned();
    assert_eq!(empty.decide().action, Action::Bootstrap);
    empty.view().initialize = Initialize::Running;
    assert_eq!(empty.decide().action, Action::Wait);
    let mut replica = world();
    replica.pg = PgStatus::NoData;
    assert!(matches!(replica.decide().action, Action::Clone(source) if source.name == "a".into()));
}

#[test]
fn half_a_cluster_neither_leads_nor_is_in_the_way() {
    let at_rest = stopped(ControlState::InProduction, false);
    let aside = || Action::Discard(Some(SYSTEM));
    for (initialize, pg, action) in [
        (Initialize::Absent, at_rest.clone(), aside()),
        (Initialize::Done(SystemId(1_234_567_890)), at_rest.clone(), aside()),
        // The right to finish it may be the earlier agent's, whose last request is still on its way.
        (Initialize::Running, at_rest.clone(), Action::Wait),
        (Initialize::Absent, PgStatus::Broken("no pg_control".to_owned()), Action::Discard(None)),
        (Initialize::Absent, primary(1000), Action::Demote(DemoteMode::LostKey)),
        (Initialize::Running, primary(1000), Action::Demote(DemoteMode::LostKey)),
        (Initialize::Absent, PgStatus::NoData, Action::Wait),
    ] {
        let mut half = world().leaderless();
        half.memory.half_made = true;
        half.view().initialize = initialize.clone();
        half.pg = pg.clone();
        assert_eq!(half.decide().action, action, "{initialize:?} {pg:?}");
        half.view().settings.pause = true;
        assert_eq!(half.decide().action, Action::Wait, "paused, {initialize:?} {pg:?}");
        half.view().settings.pause = false;
        half.dcs_away = true;
        assert!(!matches!(half.decide().action, Action::Discard(_)), "what is known may be old");
    }
}

#[test]
fn nobody_leads_while_a_cluster_is_being_made() {
    let mut beside = world().leaderless().answers(&[("c", peer(1000))]);
    assert!(matches!(beside.decide().action, Action::Acquire(_)));
    beside.view().initialize = Initialize::Running;
    assert_eq!(beside.decide().reason, "another member is bootstrapping the cluster");
    assert_eq!(beside.decide().action, Action::Abstain);
}

#[test]
fn data_of_another_cluster_ends_the_agent() {
    let mut foreign = world();
    foreign.view().initialize = Initialize::Done(SystemId(1_234_567_890));
    assert_eq!(foreign.decide().action, Action::Exit);
    foreign.view().settings.pause = true;
    assert_eq!(foreign.decide().action, Action::Wait);
}

#[test]
fn without_the_dcs_a_found_primary_is_not_left_alone() {
    let mut blind = world();
    blind.view = None;
    blind.pg = primary(1000);
    blind.memory.started_at = NOW;
    assert_eq!(blind.decide().action, Action::Wait);
    blind.memory.started_at = NOW - Duration::from_secs(3);
    assert_eq!(blind.decide().action, Action::Demote(DemoteMode::LostKey));
}

fn any_pg() -> impl Strategy<Value = PgStatus> {
    let control = prop_oneof![
        Just(ControlState::ShutDown),
        Just(ControlState::InProduction),
        Just(ControlState::InArchiveRecovery),
        Just(ControlState::ShutDownInRecovery),
    ];
    prop_oneof![
        Just(PgStatus::NoData),
        Just(PgStatus::Broken("x".to_owned())),
        Just(PgStatus::Starting),
        Just(PgStatus::Stopping),
        Just(PgStatus::Unresponsive),
        Just(PgStatus::Refusing("x".to_owned())),
        (control, any::<bool>()).prop_map(|(state, standby)| stopped(state, standby)),
        (900u64..1100).prop_map(standby),
        (900u64..1100).prop_map(primary),
    ]
}

fn any_name() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![Just(None), Just(Some("a")), Just(Some("b")), Just(Some("c")), Just(Some("stranger"))]
}

prop_compose! {
    fn any_world()(
        pg in any_pg(),
        leader in any_name(),
        lease_ms in prop_oneof![Just(None), (0u64..6000).prop_map(Some)],
        sync in (any_name(), any_name(), any::<bool>(), any::<bool>()),
        request in (any::<bool>(), any_name(), any_name()),
        (pause, has_lease, dcs_away, known) in (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.95)),
        divergence in prop_oneof![
            Just(DivergenceState::NotAsked), Just(DivergenceState::Check),
            Just(DivergenceState::Rewind("w".into())), Just(DivergenceState::RewindFailed("w".into())),
        ],
        (rewind, reclone, demoted) in (any::<bool>(), any::<bool>(), any::<bool>()),
        start_timeout in prop_oneof![Just(0u64), Just(300)],
        (by_word, promise, failsafe) in
            (any::<bool>(), prop::option::of(0u64..3000), prop::option::of(prop_oneof![Just(&["a", "b", "c"][..]), Just(&["a"][..]), Just(&[][..])])),
        (won, young) in (any::<bool>(), any::<bool>()),
        peers in prop::option::of((prop::option::of(900u64..1100), prop::option::of(900u64..1100), any::<bool>())),
    ) -> World {
        let mut world = world();
        world.pg = pg;
        world.has_lease = has_lease;
        world.dcs_away = dcs_away;
        world.memory.divergence = divergence;
        world.memory.demoted = demoted;
        world.me.use_pg_rewind = rewind;
        world.me.reclone_diverged = reclone;
        let view = world.view();
        view.leader = leader.map(key);
        view.settings.pause = pause;
        view.settings.primary_start_timeout = Duration::from_secs(start_timeout);
        if let (Some(owner), standby, on, _) = sync {
            view.settings.synchronous_mode = if on { SynchronousMode::On } else { SynchronousMode::Off };
            view.sync = SyncState {
                leader: Some(owner.into()),
                standbys: standby.iter().map(|name| (*name).to_owned()).collect(),
                quorum: 0,
                revision: Revision(60),
            };
        }
        if let (true, from, to) = request {
            world = world.requested(from, to);
        }
        // The key can only be held where it bears our name, and led without it only by the members' word.
        world.by_word = by_word;
        let may_lead = leader == Some("b") || (by_word && leader.is_none());
        world.leader_until = lease_ms.filter(|_| may_lead).map(|ms| NOW + Duration::from_millis(ms));
        if let Some(members) = failsafe {
            world = world.failsafe(members);
        }
        if let Some(ms) = promise {
            world = world.promised(ms);
        }
        world.memory.elected = won.then_some(Revision(50));
        if young {
            world.memory.started_at = NOW;
        }
        world.peers = peers.map(|(a, c, a_leads)| {
            let mut old = a.and_then(peer);
            if let Some(old) = old.as_mut() {
                old.in_recovery = !a_leads;
            }
            PeerAnswers::from([("a".into(), old), ("c".into(), c.and_then(peer)), ("stranger".into(), None)])
        });
        if !known {
            world.view = None;
            world.leader_until = None;
        }
        world
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(world in any_world()) {
        let decision = world.decide();
        let leads = world.leader_until.is_some_and(|until| NOW < until);
        let view = world.view.as_ref();
        let paused = view.is_some_and(|view| view.settings.pause);
        prop_assert!(!decision.reason.is_empty());

        match &decision.action {
            // Writing is for the holder of the key, in the same view.
            Action::Start(StartAs::Primary) | Action::Lead | Action::HandOver => prop_assert!(leads),
            Action::Promote(_) => prop_assert!(leads && view.unwrap().is_leader(&world.me.name)),
            // Only a primary that leads and is on the list asks for the members' word.
            Action::Failsafe(members) => {
                let list = view.unwrap().failsafe.as_ref().unwrap();
                prop_assert!(leads && matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary));
                prop_assert!(list.contains_key(&world.me.name) && !members.contains_key(&world.me.name));
                prop_assert_eq!(members.len(), list.len() - 1);
            }
            // The key is only taken where there is none, by a node with a lease and a server that runs.
            Action::Acquire(_) => {
                let view = view.unwrap();
                prop_assert!(view.leader.is_none() && world.has_lease && matches!(world.pg, PgStatus::Running(_)));
                let manual = view.failover.as_ref()
                    .is_some_and(|r| r.leader.is_none() && r.candidate.as_ref() == Some(&world.me.name));
                let restricted = view.settings.synchronous_mode == SynchronousMode::On && view.sync.is_active();
                let already = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
                prop_assert!(!restricted || view.sync.includes(&world.me.name) || manual || (paused && already));
            }
            // Giving up the key needs a server that can't write.
            Action::Release => prop_assert!(!matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary)
                && !matches!(world.pg, PgStatus::Starting | PgStatus::Refusing(_) | PgStatus::Unresponsive | PgStatus::Stopping)),
            // Data is only replaced where a setting allows it and somebody else leads.
            Action::Reclone(_) => prop_assert!(world.me.reclone_diverged || world.me.reclone_unrewindable),
            Action::Clone(_) => prop_assert_eq!(&world.pg, &PgStatus::NoData),
            Action::Rewind(source) => prop_assert!(world.me.use_pg_rewind && source.name != world.me.name),
            Action::Bootstrap => prop_assert!(world.pg == PgStatus::NoData && view.unwrap().initialize == Initialize::Absent),
            // Members are asked once.
            Action::Ask(members) => prop_assert!(world.peers.is_none() && !members.is_empty()),
            _ => {}
        }

        // Whoever has given its word to a leader without DCS does nothing that could make it a leader.
        let word = world.memory.promise.as_ref().is_some_and(|promise| NOW < promise.until);
        let takes_writes = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
        if word && !leads && !takes_writes {
            let towards_leading = matches!(
                decision.action,
                Action::Acquire(_) | Action::Confirm | Action::Promote(_) | Action::Bootstrap | Action::Start(StartAs::Primary)
            );
            prop_assert!(!towards_leading, "{:?}", decision);
        }

        // A primary without the key never just goes on, unless an operator paused, it may win the key, or it waits
        // for the first proof.
        let is_primary = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
        if is_primary && !leads && !paused && view.is_some_and(|view| view.leader.as_ref().is_some_and(|l| l.name != world.me.name)) {
            prop_assert_eq!(decision.action, Action::Demote(DemoteMode::LostKey));
        }
    }
}

#[test]
fn without_a_required_watchdog_nobody_leads() {
    let why =
        || Memory { must_not_lead: Some("/dev/watchdog: No such file or directory".to_owned()), ..Memory::default() };
    let mut racer = world().leaderless().answers(&[("c", peer(900))]);
    assert!(matches!(racer.decide().action, Action::Acquire(_)), "{:?}", racer.decide());
    racer.memory = why();
    assert_eq!(racer.decide().action, Action::Abstain);
    let mut leader = world().leading();
    leader.memory = why();
    assert_eq!(leader.decide().action, Action::Demote(DemoteMode::Sick));
    leader.pg = stopped(ControlState::InProduction, false);
    assert_eq!(leader.decide().action, Action::Release);
    leader.pg = standby(1000);
    assert_eq!(leader.decide().action, Action::Release);
    leader.view().settings.pause = true;
    leader.pg = primary(1000);
    assert_eq!(leader.decide().action, Action::Lead, "paused");
}
