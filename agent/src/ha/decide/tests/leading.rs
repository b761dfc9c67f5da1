//! A leader: how it goes on, comes back, steps down and hands over.

use super::*;

#[test]
fn a_request_is_tried_once() {
    let mut world = world().leading().requested(Some("b"), Some("c"));
    world.view().failover_revision = Revision(49);
    let decision = world.decide();
    assert_eq!(decision.action, Action::ClearFailover, "asked for before this leader key was made: {decision:?}");
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
    // One that has not been promoted yet serves nobody who writes.
    full.memory.was_primary = false;
    let mut full = full.answers(&[("a", None), ("c", peer(1000))]);
    assert_eq!(full.clone().decide().action, Action::Demote(DemoteMode::Sick));
    full.memory.down_since = Some(NOW - Duration::from_secs(200));
    assert_eq!(full.decide().action, Action::Wait);
}

#[test]
fn a_stop_that_does_not_end_is_ended_if_somebody_can_take_over() {
    let mut stopping = world().leading().answers(&[("a", None), ("c", peer(1000))]);
    stopping.pg = PgStatus::Stopping;
    stopping.view().settings.primary_stop_timeout = Some(Duration::from_secs(20));
    for (seconds, ended) in [(0, false), (19, false), (20, true), (900, true)] {
        stopping.memory.down_since = Some(NOW - Duration::from_secs(seconds));
        let expected = if ended { Action::Demote(DemoteMode::Sick) } else { Action::Wait };
        assert_eq!(stopping.decide().action, expected, "{seconds} s");
    }
    assert_eq!(stopping.clone().answers(&[("a", None), ("c", None)]).decide().action, Action::Wait, "nobody else");
    stopping.view().settings.pause = true;
    assert_eq!(stopping.decide().action, Action::Wait);
}

#[test]
fn the_key_of_a_standby_that_may_yet_be_promoted_is_given_back_after_its_stop() {
    let mut promoting = world().leading();
    promoting.pg = standby(1000);
    promoting.memory.must_not_lead = Some("/dev/watchdog: it is gone".to_owned());
    promoting.memory.up_since = Some(NOW - Duration::from_secs(90));
    assert_eq!(promoting.decide().action, Action::Release);
    promoting.memory.promotions = 1;
    assert_eq!(promoting.decide().action, Action::Demote(DemoteMode::Sick));
    promoting.view().settings.pause = true;
    assert_eq!(promoting.decide().action, Action::Demote(DemoteMode::Sick), "in a pause, too");
    promoting.memory.promotions = 0;
    assert_eq!(promoting.decide().action, Action::Release);
}

#[test]
fn a_leader_whose_disk_takes_no_wal_gives_way_if_somebody_can_take_over() {
    let mut stalled = world().leading().answers(&[("a", None), ("c", peer(1000))]);
    stalled.view().settings.ttl = Duration::from_secs(20);
    for (seconds, given_up) in [(0, false), (19, false), (20, true), (300, true)] {
        stalled.memory.disk_silent = Some((Lsn(1000), NOW - Duration::from_secs(seconds)));
        let expected = if given_up { Action::Demote(DemoteMode::Sick) } else { Action::Lead };
        assert_eq!(stalled.decide().action, expected, "{seconds} s");
    }
    assert_eq!(
        stalled.clone().answers(&[("a", None), ("c", None)]).decide().action,
        Action::Lead,
        "readers are served"
    );
    stalled.view().settings.pause = true;
    assert_eq!(stalled.decide().action, Action::Lead);
}

#[test]
fn a_key_that_is_found_is_left_to_whoever_is_on_a_later_timeline() {
    let mut found = world().leading();
    found.leader_until = None;
    assert_eq!(found.decide().action, Action::Confirm, "a primary under it has led all the time");
    let later = |timeline| peer(500).map(|peer| PeerStatus { timeline: Some(TimelineId(timeline)), ..peer });
    for down in [standby(1000), stopped(ControlState::InProduction, false)] {
        found.pg = down;
        let Action::Ask(asked) = found.decide().action else { panic!("{:?}", found.decide()) };
        assert!(asked.keys().map(MemberName::as_str).eq(["a", "c"]), "also who is not synchronous");
        for (answer, action) in [(None, Action::Confirm), (later(1), Action::Confirm), (later(2), Action::Release)] {
            let answered = found.clone().answers(&[("a", None), ("c", answer.clone())]);
            assert_eq!(answered.decide().action, action, "{answer:?}");
        }
        let mut told = found.clone();
        told.view().has_history = true;
        told.view().history = vec![HistoryLine {
            timeline: TimelineId(1),
            switchpoint: Lsn(900),
            reason: String::new(),
            promoted_at: None,
            new_leader: None,
        }];
        assert_eq!(told.decide().action, Action::Release, "the DCS knows");
    }
    let mut held = world().leading().answers(&[("a", None), ("c", later(2))]);
    held.pg = standby(1000);
    assert_eq!(held.decide().action, Action::Release, "it was not won just now");
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
    assert_eq!(asked.clone().answers(&[("c", None)]).decide().action, Action::ClearFailover);
    let away = World { dcs_away: true, ..asked.clone() };
    assert_eq!(away.answers(&[("c", peer(1000))]).decide().action, Action::Lead, "who leads then nobody could say");
    assert_eq!(world().leading().requested(Some("a"), None).decide().action, Action::ClearFailover);
    assert_eq!(world().leading().requested(None, Some("b")).decide().action, Action::ClearFailover);
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
    blind.memory.paused_before = true;
    assert_eq!(blind.decide().action, Action::Wait, "nor would its agent have stopped it");
}

#[test]
fn without_the_dcs_a_stopped_primary_comes_back_as_a_standby_once_no_router_takes_it_for_one() {
    let mut away = world();
    away.view().leader = Some(key("b"));
    (away.dcs_away, away.pg) = (true, stopped(ControlState::ShutDown, false));
    let waits = |down: u64, left: i64| {
        let mut away = away.clone();
        away.memory.down_since = Some(NOW - Duration::from_millis(down));
        away.lease_until = Some(match u64::try_from(left) {
            Ok(left) => NOW + Duration::from_millis(left),
            Err(_) => NOW - Duration::from_millis(left.unsigned_abs()),
        });
        away.decide().action == Action::Wait
    };
    assert!(waits(1900, -5000), "they ask twice a second");
    assert!(!waits(2000, -700));
    assert!(waits(2000, -600), "the DCS may still have the key, for those who have a DCS");
    assert!(waits(4000, 1000));
}
