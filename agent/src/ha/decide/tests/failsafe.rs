//! The DCS is gone: what the word of the members is good for.

use super::*;

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
    assert_eq!(asked(away.clone().left(2900).refused(0)), ["Lead"], "a pause");
    assert!(away.left(900).refused(0).decide().reason.contains("no promise from c"));
}

#[test]
fn a_primary_that_answers_nobody_else_goes_on_with_the_word_of_all_members() {
    let mut away = world().leading().failsafe(&["a", "b", "c"]);
    (away.dcs_away, away.memory.was_primary) = (true, true);
    let too_many = || PgStatus::Refusing("sorry, too many clients already (53300)".to_owned());
    for pg in [too_many(), PgStatus::Unresponsive, PgStatus::Starting] {
        away.pg = pg;
        assert!(matches!(away.clone().left(2900).decide().action, Action::Failsafe(_)), "{:?}", away.pg);
        let late = away.clone().left(900).decide().action;
        assert!(!matches!(late, Action::Failsafe(_) | Action::Demote(_)), "the keeper ends it: {late:?}");
        let mut standby = away.clone().left(2900);
        standby.memory.was_primary = false;
        assert!(!matches!(standby.decide().action, Action::Failsafe(_)), "{:?}", standby.pg);
    }
    (away.pg, away.by_word) = (too_many(), true);
    away.view().leader = None;
    assert_eq!(away.left(4500).decide().action, Action::Lead, "the key is gone, the word holds");
}

#[test]
fn a_primary_that_leads_by_word_and_gets_it_no_more_waits_as_long_as_the_operator_allows() {
    let mut away = world().leading().failsafe(&["a", "b", "c"]).left(2900);
    (away.dcs_away, away.by_word) = (true, true);
    (away.view().settings.loop_wait, away.view().settings.retry_timeout) =
        (Duration::from_secs(1), Duration::from_secs(1));
    let asks = |world: &World| matches!(world.decide().action, Action::Failsafe(_));
    assert!(asks(&away.clone().refused(1900)));
    let over = away.clone().refused(2000).decide();
    assert_eq!(over.action, Action::Demote(DemoteMode::Offline));
    assert!(over.reason.ends_with("no promise from c for 2.0s"), "{}", over.reason);
    let mut before = away.clone().refused(2000);
    before.memory.failsafe_refused.as_mut().unwrap().until = NOW - Duration::from_secs(9);
    assert!(asks(&before), "they gave it again since");
    let mut holds = away.refused(2000);
    holds.by_word = false;
    assert!(asks(&holds), "without failsafe mode it would go on as well");
    let mut back = holds;
    (back.by_word, back.dcs_away) = (true, false);
    assert_eq!(back.clone().left(1500).refused(3000).decide().action, Action::Confirm, "the DCS is back");
    assert_eq!(back.left(900).refused(3000).decide().action, Action::Demote(DemoteMode::Offline), "too late");
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
    assert_eq!(late.answers(&[("a", None), ("c", peer(1000))]).decide().action, Action::Confirm);
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
    // The ttl was longer when the agent before gave its word.
    young.memory.promised_before = Some(NOW + Duration::from_millis(1));
    assert_eq!(young.decide().reason, MAY_HAVE_PROMISED);
    young.memory.promised_before = Some(NOW);
    assert!(matches!(young.decide().action, Action::Acquire(_)));
    // A DCS that was made anew has no list.
    young.view().failsafe = None;
    young.memory.promised_before = Some(NOW + Duration::from_millis(1));
    assert_eq!(young.decide().reason, MAY_HAVE_PROMISED);
}
