use super::*;
use crate::table::Certainty;
use crate::table::tests::{member, view};

fn at(ms: u64) -> Instant {
    Instant::from_boot(Duration::from_millis(ms))
}

/// Who reigns since which revision, whether new sessions have a leader, and whether there is doubt.
type Routed = (Option<(String, i64)>, bool, bool);

fn reign(name: &str, created: i64) -> Option<(String, i64)> {
    Some((name.to_owned(), created))
}

/// A cluster in failsafe mode, and what was heard of it.
#[derive(Default)]
struct World {
    heard: Heard,
    failsafe: bool,
}

impl World {
    fn view(&self, leader: Option<(&str, i64)>) -> ClusterView {
        let standby = ("b", member("replica", "running"));
        let mut view = match leader {
            Some((name, created)) => {
                let primary = Member { api_url: Some(format!("http://{name}")), ..member("primary", "running") };
                view(Some((name, created)), &[standby, (name, primary)])
            }
            // The record goes away with the key: both are attached to the same lease.
            None => view(None, &[standby]),
        };
        view.settings.failsafe_mode = self.failsafe;
        view.failsafe = Some([("a".into(), "http://a".into()), ("b".into(), "http://b".into())].into());
        view
    }

    fn read(&mut self, leader: Option<(&str, i64)>, ms: u64) -> Routed {
        self.read_as(leader, ms, true)
    }

    fn read_as(&mut self, leader: Option<(&str, i64)>, ms: u64, confirmed: bool) -> Routed {
        let table = self.heard.read(&self.view(leader), at(ms), confirmed, confirmed).table;
        let reign = table.reign.map(|epoch| (epoch.member.as_str().to_owned(), epoch.created.0));
        (reign, table.leader.is_some(), table.certainty != Certainty::Confirmed)
    }

    fn hear(&mut self, name: &str, answer: Result<bool, ()>, leader: Option<(&str, i64)>, ms: u64) {
        let view = self.view(leader);
        let view = self.heard.read(&view, at(ms), leader.is_none(), leader.is_none()).view;
        self.heard.hear(&view, &[(name.into(), answer.map_err(|()| "no answer".to_owned()))], at(ms));
    }
}

fn failsafe() -> World {
    let mut world = World { failsafe: true, ..World::default() };
    assert_eq!(world.read(Some(("a", 7)), 0), (reign("a", 7), true, false));
    world
}

#[test]
fn one_that_is_about_to_stop_gets_nothing_new_though_it_still_takes_writes() {
    let mut world = World::default();
    let mut view = world.view(Some(("a", 7)));
    world.heard.read(&view, at(0), true, true);
    if let Some(member) = view.members.get_mut(&"a".into()) {
        member.state = "stopping".into();
    }
    world.heard.read(&view, at(10), true, true);
    world.heard.hear(&view, &[("a".into(), Ok(true))], at(11));
    let table = world.heard.read(&view, at(12), true, true).table;
    assert!(table.resigns && table.leader.is_none());
    assert_eq!(table.reign.map(|epoch| epoch.created.0), Some(7));
}

#[test]
fn members_that_are_known_without_the_dcs_lead_once_they_prove_it() {
    let known = |name: &str| KnownMember {
        name: name.into(),
        api_url: format!("http://{name}"),
        connect_address: "10.0.0.1:5433".into(),
    };
    let (mut world, seed) = (World::default(), seed(&[known("a"), known("b")]));
    let routed = |world: &mut World, ms| world.heard.read_seed(&seed, at(ms)).table;
    let table = routed(&mut world, 0);
    assert!(table.leader.is_none() && table.reign.is_none() && table.standbys.is_empty());
    world.heard.hear(&seed, &[("a".into(), Ok(true)), ("b".into(), Ok(true))], at(0));
    assert!(routed(&mut world, 1).leader.is_none(), "two of them: none");
    world.heard.hear(&seed, &[("a".into(), Ok(true)), ("b".into(), Ok(false))], at(100));
    let table = routed(&mut world, 101);
    assert_eq!((table.certainty, table.key), (Certainty::Unconfirmed { proven: true }, None));
    assert!(table.leader.is_some_and(|leader| leader.member == "a".into() && leader.epoch == table.reign));
    // The DCS is there: sessions go on, and what it says may be old, so it is proved once more.
    assert_eq!(world.read(Some(("a", 7)), 200), (reign("a", 0), false, true));
    world.hear("a", Ok(true), Some(("a", 7)), 210);
    assert_eq!(world.read(Some(("a", 7)), 220), (reign("a", 0), true, false));
    let mut late = World::default();
    late.heard.read_seed(&seed, at(0));
    assert_eq!(late.read(Some(("a", 7)), 200), (reign("a", 7), false, true), "not proved yet");
    late.hear("a", Ok(true), Some(("a", 7)), 210);
    assert_eq!(late.read(Some(("a", 7)), 220), (reign("a", 7), true, false));
    // Another one leads by the DCS: at once.
    assert_eq!(world.read(Some(("b", 9)), 300).0, reign("b", 9));
}

#[test]
fn who_leads_by_a_backup_has_to_prove_it() {
    let mut world = World::default();
    assert_eq!(world.read(Some(("c", 9)), 0), (reign("c", 9), true, false));
    world.heard.restored(1);
    assert_eq!(world.read(Some(("a", 7)), 10), (reign("a", 7), false, true));
    world.hear("a", Ok(false), Some(("a", 7)), 20);
    world.heard.restored(1);
    assert_eq!(world.read(Some(("a", 7)), 30), (reign("a", 7), false, true));
    world.hear("a", Ok(true), Some(("a", 7)), 40);
    assert_eq!(world.read(Some(("a", 7)), 50), (reign("a", 7), true, false));
    world.heard.restored(1);
    assert_eq!(world.read(Some(("a", 7)), 60), (reign("a", 7), true, false), "that is past");
}

#[test]
fn who_led_when_the_dcs_went_back_is_no_standby_by_what_it_said_before_it_led() {
    let mut world = World::default();
    let mut backup = world.view(Some(("a", 7)));
    backup.settings.ttl = Duration::from_secs(5);
    let led_by_b = view(Some(("b", 60)), &[("b", member("primary", "running")), ("a", member("replica", "running"))]);
    let standbys = |world: &mut World, view: &ClusterView, ms| -> Vec<String> {
        let table = world.heard.read(view, at(ms), true, true).table;
        table.standbys.iter().map(|standby| standby.member.as_str().to_owned()).collect()
    };
    assert_eq!(standbys(&mut world, &led_by_b, 0), ["a"]);
    // In between it was a standby, as the backup says.
    world.heard.restored(1);
    assert!(standbys(&mut world, &backup, 10).is_empty());
    assert_eq!(world.heard.excludes_until(), Some(at(5_010)));
    world.heard.restored(2);
    assert!(standbys(&mut world, &backup, 20).is_empty(), "and once more");
    let mut anew = backup.clone();
    if let Some(record) = anew.members.get_mut(&"b".into()) {
        record.xlog_location = Some(trunkline_common::Lsn(901));
    }
    assert_eq!(standbys(&mut world, &anew, 30), ["b"]);
    assert_eq!((standbys(&mut world, &backup, 40), world.heard.excludes_until()), (vec!["b".to_owned()], None));
    // One that had become a standby by the time of the first look has nothing to say anew.
    standbys(&mut world, &led_by_b, 50);
    world.heard.restored(3);
    assert!(standbys(&mut world, &backup, 60).is_empty() && standbys(&mut world, &backup, 5_059).is_empty());
    assert_eq!(standbys(&mut world, &backup, 5_060), ["b"]);
}

#[test]
fn a_leader_that_denies_it_while_the_dcs_is_silent_gets_nothing_new() {
    let mut world = World::default();
    let view = world.view(Some(("a", 7)));
    let silent = |world: &mut World, ms| {
        let table = world.heard.read(&view, at(ms), true, false).table;
        (table.reign.is_some(), table.leader.is_some(), table.certainty != Certainty::Confirmed)
    };
    world.read(Some(("a", 7)), 0);
    assert_eq!(silent(&mut world, 1000), (true, true, false), "it has not been silent for long");
    let says = |world: &mut World, who: &str, answer, ms| world.heard.hear(&view, &[(who.into(), answer)], at(ms));
    says(&mut world, "a", Err("no answer".to_owned()), 1100);
    says(&mut world, "b", Ok(false), 1100);
    assert_eq!(silent(&mut world, 1200), (true, true, false), "says nothing, or is another one");
    says(&mut world, "a", Ok(false), 1600);
    assert_eq!(silent(&mut world, 1700), (true, false, true));
    says(&mut world, "b", Ok(true), 2000);
    assert_eq!(silent(&mut world, 2100), (true, false, true), "that proves nothing of a");
    // The DCS is back, and its record is from before.
    assert_eq!(world.read(Some(("a", 7)), 3000), (reign("a", 7), false, true));
    says(&mut world, "a", Ok(true), 3100);
    assert_eq!(world.read(Some(("a", 7)), 3200), (reign("a", 7), true, false));
}

#[test]
fn without_failsafe_mode_an_absent_key_is_the_end_at_once() {
    let mut world = World::default();
    world.read(Some(("a", 7)), 0);
    assert_eq!(world.read(None, 1), (None, false, false));
    assert_eq!(world.heard.suspect(), None);
    // Nor does it help that the member said so before.
    let mut world = World::default();
    world.read(Some(("a", 7)), 0);
    world.hear("a", Ok(true), Some(("a", 7)), 10);
    assert_eq!(world.read(None, 20), (None, false, false));
}

#[test]
fn a_leader_without_its_key_keeps_its_sessions_and_gets_new_ones_once_it_has_proved_itself() {
    let mut world = failsafe();
    world.hear("a", Ok(true), Some(("a", 7)), 90);
    assert_eq!(world.read(None, 100), (reign("a", 7), false, true), "what it said before proves nothing");
    world.hear("a", Ok(true), None, 110);
    assert_eq!(world.read(None, 120), (reign("a", 7), true, true));
    // A silent one loses its clients 2 s after it was asked last when it answered.
    world.hear("a", Err(()), None, 1_000);
    assert_eq!(world.read(None, 2_109), (reign("a", 7), true, true));
    assert_eq!(world.read(None, 2_110), (None, false, false));
    // It is still asked, and may still prove itself.
    assert_eq!(world.heard.suspect(), Some(&"a".into()));
    world.hear("a", Ok(true), None, 5_000);
    assert_eq!(world.read(None, 5_010).0, reign("a", 7));
}

#[test]
fn a_leader_without_its_key_is_over_when_it_says_so_or_says_nothing_or_another_one_has_the_key() {
    let mut world = failsafe();
    world.read(None, 100);
    world.hear("a", Ok(false), None, 110);
    assert_eq!(world.read(None, 111), (None, false, false), "it says so");

    let mut world = failsafe();
    assert_eq!(world.read(None, 100), (reign("a", 7), false, true));
    assert_eq!(world.read(None, 2_099), (reign("a", 7), false, true));
    assert_eq!(world.read(None, 2_100), (None, false, false), "it says nothing");

    let mut world = failsafe();
    world.read(None, 100);
    world.hear("a", Ok(true), None, 110);
    assert_eq!(world.read(Some(("b", 9)), 120), (reign("b", 9), true, false), "another one's key");
    assert_eq!(world.heard.suspect(), None);
}

#[test]
fn one_that_was_stepping_down_is_not_waited_for() {
    let mut world = failsafe();
    let mut stepping_down = world.view(Some(("a", 7)));
    stepping_down.members.insert("a".into(), member("demoted", "stopping"));
    world.heard.read(&stepping_down, at(50), true, true);
    assert_eq!(world.read(None, 100), (None, false, false));
    assert_eq!(world.heard.suspect(), None);
}

#[test]
fn a_leader_that_takes_its_key_anew_goes_on_if_it_has_proved_just_now_that_it_led() {
    let mut world = failsafe();
    world.read(None, 100);
    world.hear("a", Ok(true), None, 110);
    assert_eq!(world.read(Some(("a", 9)), 500), (reign("a", 7), true, false));
    assert_eq!(world.read(Some(("a", 9)), 50_000), (reign("a", 7), true, false), "the same key later");
    let key = world.heard.read(&world.view(Some(("a", 9))), at(50_000), true, true).table.key;
    assert_eq!(key, Some(Revision(9)), "the next process is told what the DCS says");
    assert_eq!(world.read(Some(("a", 11)), 50_001).0, reign("a", 11), "anew without a word");

    let mut world = failsafe();
    world.hear("a", Ok(true), Some(("a", 7)), 1_000);
    assert_eq!(world.read(Some(("a", 9)), 3_001).0, reign("a", 9), "its word was too old");

    let mut world = failsafe();
    world.hear("a", Ok(true), Some(("a", 7)), 1_000);
    assert_eq!(world.heard.word(), Some(("a".into(), at(3_000))));
    world.hear("a", Err(()), Some(("a", 7)), 1_200);
    assert!(world.heard.word().is_some(), "it may be busy");
    world.hear("a", Ok(false), Some(("a", 7)), 1_500);
    assert_eq!(world.heard.word(), None);
    assert_eq!(world.read(Some(("a", 9)), 1_600).0, reign("a", 9), "it has taken its word back");
}

#[test]
fn what_the_dcs_said_before_it_was_silent_is_proved_or_written_anew_before_it_counts_again() {
    let told = |world: &mut World, answer: Result<bool, String>| {
        let view = world.view(Some(("a", 7)));
        world.heard.hear(&view, &[("a".into(), answer)], at(60_100));
    };
    let silent = || {
        let mut world = World::default();
        assert_eq!(world.read(Some(("a", 7)), 0), (reign("a", 7), true, false));
        assert_eq!(world.read_as(Some(("a", 7)), 10_000, false), (reign("a", 7), false, true));
        assert_eq!(world.read(Some(("a", 7)), 60_000), (reign("a", 7), false, true), "it may be a standby by now");
        world
    };
    let mut world = silent();
    told(&mut world, Ok(true));
    assert_eq!(world.read(Some(("a", 7)), 60_101), (reign("a", 7), true, false));

    let mut world = silent();
    told(&mut world, Ok(false));
    assert_eq!(world.read(Some(("a", 7)), 70_000), (reign("a", 7), false, true), "it is, and will say so");
    assert_eq!(world.read(Some(("a", 9)), 70_001), (reign("a", 9), true, false), "elected anew");

    let mut world = silent();
    told(&mut world, Err("no answer".to_owned()));
    assert_eq!(world.read(Some(("a", 7)), 62_099), (reign("a", 7), false, true));
    assert_eq!(world.read(Some(("a", 7)), 62_100), (reign("a", 7), true, false), "it can't be asked");
}

/// Patroni's record says `replica`, `promoted` and `primary` in turn; sessions begin with the proof.
#[test]
fn a_leader_that_proved_its_promotion_goes_on_while_its_record_follows() {
    let mut heard = Heard::default();
    let read = |heard: &mut Heard, role: &str, ms: u64| {
        let table = heard.read(&view(Some(("a", 7)), &[("a", member(role, "running"))]), at(ms), true, true).table;
        (table.reign.is_some(), table.leader.is_some())
    };
    assert_eq!(read(&mut heard, "replica", 0), (false, false));
    heard.hear(&view(Some(("a", 7)), &[("a", member("replica", "running"))]), &[("a".into(), Ok(true))], at(10));
    for role in ["replica", "promoted", "primary"] {
        assert_eq!(read(&mut heard, role, 20), (true, true), "{role}");
    }
    assert_eq!(read(&mut heard, "demoted", 30), (false, false), "written after the proof");
    assert_eq!(read(&mut heard, "promoted", 40), (true, false), "nobody has proved anything since");
}

#[test]
fn one_that_was_found_by_asking_goes_on_when_the_dcs_is_back() {
    let mut world = failsafe();
    assert_eq!(world.read_as(Some(("a", 7)), 100, false), (reign("a", 7), false, true));
    world.hear("b", Ok(true), Some(("a", 7)), 200);
    let found = world.read_as(Some(("a", 7)), 210, false);
    assert_eq!((found.0.clone().map(|(name, _)| name), found.1), (Some("b".to_owned()), true));
    assert_eq!(world.read(Some(("b", 9)), 300), (found.0, true, false));
    // Had it been a mistake, the leader's word would be over.
    assert_eq!(world.read(Some(("a", 7)), 400).0, reign("a", 7));
}
